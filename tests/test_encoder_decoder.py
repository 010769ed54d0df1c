"""An encoder-decoder through the command line, with a plugin's adapters: train, evaluate, generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.models import load_model
from graftwork.testing.models import tiny_checkpoint, tiny_model
from peft import PeftModel

TRAIN = ("max_steps=4", "learning_rate=1e-2", "per_device_train_batch_size=4", "logging_steps=1")
SETS = [word for field in (*TRAIN, "save_strategy=no") for word in ("--set", f"train.{field}")]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("t5") / "model", "t5")


def test_a_plugin_s_stack_trains_scores_and_answers(
    t5: Path, stream: Path, trainer: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = ["--model", t5, "--data", stream, "--algorithm", "seq2seq", *SETS, "--output", output]
    option = ["--set", "plugins.o-lora.target_modules=[q, v]"]
    outcome = trainer("train", *words, "--plugin", "o-lora", *option)
    assert outcome.code == 0, outcome.err
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    penalties = [event["loss/orth"] for event in events if event["event"] == "log" and "loss/orth" in event]
    # From the second task on there is something to be orthogonal to.
    assert len(penalties) == 4
    assert min(penalties) > 0
    config = json.loads((output / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert config["r"] == 2 * 8
    ids, begin = torch.arange(3, 20)[None], torch.zeros(1, 1, dtype=torch.long)
    plain = PeftModel.from_pretrained(tiny_model("t5"), output / "adapter").eval()
    ours = load_model(str(output)).eval()
    expected = plain(input_ids=ids, decoder_input_ids=begin).logits
    torch.testing.assert_close(ours(input_ids=ids, decoder_input_ids=begin).logits, expected)

    outcome = trainer("evaluate", "--model", output, "--data", stream, "--output", tmp_path / "scores.json")
    assert outcome.code == 0, outcome.err
    scores = {
        row["task"]: row["accuracy"] for row in json.loads((tmp_path / "scores.json").read_text())["tasks"]
    }
    last = json.loads((output / "result.json").read_text())
    assert scores == dict(zip(last["order"], last["scores"][-1], strict=True))

    outcome = trainer("generate", "--model", output, "--prompt", "Which fruit?", "--plain")
    assert outcome.code == 0, outcome.err
    # An answer only: the prompt is not repeated.
    assert "Which fruit?" not in outcome.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--data", "{stream}"], "algorithm 'sft' trains causal language models"),
        (["evaluate", "--text", "{stream}/instructions.json"], "t5 is an encoder-decoder"),
    ],
)
def test_what_an_encoder_decoder_cannot_do_is_refused(
    words: list[str], said: str, t5: Path, stream: Path, trainer: Callable[..., Any]
) -> None:
    filled = [word.format(stream=stream) for word in words]
    outcome = trainer(*filled, "--model", t5)
    assert outcome.code == 2
    assert said in outcome.err


def test_gpus_without_a_dry_run_are_refused(t5: Path, stream: Path, trainer: Callable[..., Any]) -> None:
    outcome = trainer("train", "--model", t5, "--data", stream, "--gpus", 8)
    assert outcome.code == 2
    assert "--gpus 8 is what --dry-run counts with" in outcome.err
