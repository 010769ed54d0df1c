"""Likelihood scoring: against one plain forward pass per label, against training's own loss, and as an option."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork.cli import main
from graftwork.data.tasks import Task
from graftwork.errors import UserError
from graftwork.evaluate.answers import score_task
from graftwork.evaluate.likelihood import check_model, label_likelihoods, most_likely, question
from graftwork.recipe import EvaluateOptions, expand
from graftwork.testing.data import tiny_stream
from graftwork.testing.likelihood import naive_label_likelihoods
from graftwork.testing.models import tiny_checkpoint, tiny_model, tiny_tokenizer
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import run_tiny, tiny_recipe
from graftwork.train.scores import candidates, scoring_leaks, scoring_notes
from graftwork.train.statistics import answer_losses
from graftwork.yaml_lines import Document
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

TOKENIZER = tiny_tokenizer()
PROMPTS = ["a", "what is this", "x" * 30, "Option: yes, no \nAnswer:", "日本"]
# One begins another, two begin alike, one is of one token.
NAMES = ["no", "not", "very good", "very bad", "y", "entail", "entailment"]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("qwen2", {}),
    ("gpt2", {}),
    # A window shorter than prompt and label, in all layers and in some.
    ("mistral", {"sliding_window": 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
]


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------------- the figure itself


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_equal_to_a_forward_pass_per_label(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_model(kind, dtype=torch.float64, **changes)
    naive = naive_label_likelihoods(model, TOKENIZER, PROMPTS, NAMES)
    found = label_likelihoods(model, TOKENIZER, PROMPTS, NAMES, batch_size=3)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-10)
    assert found.argmax(1).tolist() == naive.argmax(1).tolist()
    model = model.float()
    single = label_likelihoods(model, TOKENIZER, PROMPTS, NAMES, batch_size=3)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), naive, rtol=1e-5, atol=1e-5)
    assert single.argmax(1).tolist() == naive.argmax(1).tolist()


def test_equal_with_adapters_on() -> None:
    model: Any = get_peft_model(
        tiny_model(dtype=torch.float64), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    naive = naive_label_likelihoods(model, TOKENIZER, PROMPTS, NAMES)
    torch.testing.assert_close(label_likelihoods(model, TOKENIZER, PROMPTS, NAMES), naive, rtol=0, atol=1e-10)
    with model.disable_adapter():
        assert (label_likelihoods(model, TOKENIZER, PROMPTS, NAMES) - naive).abs().max() > 1e-3


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.text("ab c", min_size=1, max_size=12), min_size=1, max_size=6),
    st.lists(st.text("xyz ", min_size=1, max_size=5), min_size=1, max_size=5, unique=True),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
def test_batches_and_orders_change_nothing(
    prompts: list[str], labels: list[str], batch_size: int, shuffle: random.Random
) -> None:
    model = tiny_model(dtype=torch.float64)
    naive = naive_label_likelihoods(model, TOKENIZER, prompts, labels)
    rows, columns = list(range(len(prompts))), list(range(len(labels)))
    shuffle.shuffle(rows)
    shuffle.shuffle(columns)
    found = label_likelihoods(
        model,
        TOKENIZER,
        [prompts[row] for row in rows],
        [labels[column] for column in columns],
        batch_size=batch_size,
    )
    torch.testing.assert_close(found, naive[rows][:, columns], rtol=0, atol=1e-10)


@pytest.mark.parametrize("chats", [False, True])
def test_it_is_the_loss_that_training_would_have(tmp_path: Path, chats: bool) -> None:
    """TRL tokenises the items, and the loss is summed over the answers: no code of scoring takes part."""
    model = tiny_model(dtype=torch.float64)
    rows: list[dict[str, Any]] = [
        {
            "prompt": chat(prompt) if chats else prompt,
            "completion": [{"role": "assistant", "content": label}] if chats else f" {label}",
        }
        for prompt in PROMPTS
        for label in NAMES
    ]
    trainer = SFTTrainer(
        tiny_model(),
        SFTConfig(str(tmp_path), report_to=[], max_length=None, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    dataset: Any = trainer.train_dataset
    batch = trainer.data_collator([dataset[index] for index in range(len(rows))])
    with torch.no_grad():
        losses = answer_losses(model, batch, reduction="sum").double().view(len(PROMPTS), len(NAMES))
    prompts = [chat(prompt) if chats else prompt for prompt in PROMPTS]
    found = label_likelihoods(model, TOKENIZER, prompts, NAMES)
    # The losses are summed in fp32.
    torch.testing.assert_close(found, -losses, rtol=1e-5, atol=1e-5)


def test_the_end_belongs_to_the_answer() -> None:
    """Without it a label that begins another could never be less likely, whatever the model thinks."""
    tokens = question(TOKENIZER, "Is it?", ["entail", "entailment"])
    assert [TOKENIZER.decode(list(ids)) for ids in tokens.answers] == [" entail<eos>", " entailment<eos>"]
    model = tiny_model(dtype=torch.float64)
    writes = TOKENIZER("Is it? entailment<eos>")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=torch.tensor([writes]), labels=torch.tensor([writes])).loss.backward()
        optimizer.step()
    found = label_likelihoods(model, TOKENIZER, ["Is it?"], ["entail", "entailment"])
    assert most_likely(found, ["entail", "entailment"]) == ["entailment"]


def test_tokens_that_melt_at_the_border() -> None:
    """'b' and the blank after it are one token, so the prompt's last letter is explained with the label."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "x", "y", "Ġ", "bĠ", "bĠx"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "Ġ"), ("bĠ", "x")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    melting = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    asked = question(melting, "aab", ["x", "y"])
    assert (asked.prompt, asked.answers) == ([1, 1], ((7, 0), (6, 4, 0)))
    model = tiny_model(dtype=torch.float64)
    prompts = ["aab", "aaa", "ab", "aa"]
    batches: list[int] = []
    naive = naive_label_likelihoods(model, melting, prompts, ["x", "y"])
    found = label_likelihoods(model, melting, prompts, ["x", "y"], progress=batches.append)
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-10)
    # Those that end in b have other answers than those that end in a, and each kind is one batch.
    assert batches == [2, 2]
    with pytest.raises(UserError, match="no first token in common"):
        question(melting, "b", ["x", "y"])


def test_prompts_are_read_once_and_shared_beginnings_too() -> None:
    model = tiny_model()
    seen: list[tuple[int, ...]] = []

    def look(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        seen.append(tuple(inputs["input_ids"].shape))
        behind = inputs["past_key_values"].get_seq_length()
        assert inputs["attention_mask"].shape[1] == behind + inputs["input_ids"].shape[1]

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    label_likelihoods(model, TOKENIZER, ["abc", "a"], ["xz", "xy", "x", "w"])
    hook.remove()
    # The prompt; " w"; "x" (the blank is there); "y" after it; "z" in its place. Ends are predicted, not read.
    assert seen == [(2, 3), (2, 2), (2, 1), (2, 1), (2, 1)]


def test_ties_and_broken_models() -> None:
    assert most_likely(torch.tensor([[-1.0, -1.0], [-2.0, -1.0]]), ["a", "b"]) == ["a", "b"]
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    score = score_task(model, TOKENIZER, task(["no", "yes"], ["no", "yes"]), scoring="likelihood")
    assert (score.accuracy, score.invalid, score.answers) == (0, 1, ["", ""])


def test_leaves_no_trace_on_a_model_in_training() -> None:
    model: Any = get_peft_model(tiny_model(), LoraConfig(r=2, task_type="CAUSAL_LM", lora_dropout=0.5))
    expected = label_likelihoods(model.eval(), TOKENIZER, PROMPTS, NAMES)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    assert torch.equal(label_likelihoods(model, TOKENIZER, PROMPTS, NAMES), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert TOKENIZER.padding_side == tiny_tokenizer().padding_side


# ---------------------------------------------------------------------- what is refused


def test_what_cannot_be_scored() -> None:
    model, bare = tiny_model(), tiny_tokenizer()
    with pytest.raises(
        UserError, match="a prompt and its answer of 2004 tokens do not fit the model's window"
    ):
        label_likelihoods(model, TOKENIZER, ["x" * 2000], ["yy"])
    with pytest.raises(UserError, match="a prompt is empty"):
        label_likelihoods(model, TOKENIZER, [""], NAMES)
    bare.chat_template = bare.eos_token = None
    with pytest.raises(UserError, match="no chat template"):
        label_likelihoods(model, bare, [chat("a")], NAMES)
    with pytest.raises(UserError, match="the tokenizer has no end token"):
        label_likelihoods(model, bare, ["a"], NAMES)


SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        ("mamba", {"state_size": 4}, "mamba has no key-value cache"),
        (
            "lfm2",
            {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
            "the cache of lfm2 cannot go back to the end of the prompt",
        ),
    ],
)
def test_models_that_cannot_go_back(kind: str, fields: dict[str, Any], sentence: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **fields))
    with pytest.raises(UserError, match=sentence):
        check_model(model)


def test_prompt_learning_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for complain in (
        lambda: check_model(tiny_model(), config),
        lambda: label_likelihoods(get_peft_model(tiny_model(), config), TOKENIZER, ["a"], NAMES),
    ):
        with pytest.raises(UserError, match="which PEFT's prompt learning does not"):
            complain()


def test_a_model_that_ignores_the_cache_is_refused() -> None:
    model = tiny_model()
    plain = model.forward
    model.forward = lambda past_key_values=None, **inputs: plain(**{**inputs, "use_cache": False})  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the cache of llama cannot go back"):
        label_likelihoods(model, TOKENIZER, ["a"], NAMES)


# ---------------------------------------------------------------------- tasks


def task(gold: list[str], labels: list[str]) -> Task:
    rows = [{"prompt": PROMPTS[i % len(PROMPTS)], "completion": f" {text}"} for i, text in enumerate(gold)]
    dataset = Dataset.from_list(rows)
    return Task("t", dataset, dataset, labels)


def test_a_tasks_answers_are_its_likeliest_labels() -> None:
    model, gold = tiny_model(dtype=torch.float64), ["no", "y", "not", "No", "y"]
    naive = naive_label_likelihoods(model, TOKENIZER, PROMPTS, ["no", "not", "y"])
    expected = [["no", "not", "y"][column] for column in naive.argmax(1)]
    score = score_task(model, TOKENIZER, task(gold, ["no", "not", "y"]), scoring="likelihood", batch_size=2)
    assert (score.scoring, score.answers, score.invalid) == ("likelihood", expected, 0)
    assert score.correct == [a == b.lower() for a, b in zip(expected, gold, strict=True)]
    # Another task's label is no label of this one.
    others = score_task(
        model, TOKENIZER, task(gold, ["very bad"]), scoring="likelihood", candidates=["very bad", "y"]
    )
    assert (others.answers, others.invalid) == (["y"] * 5, 1)


def test_a_task_without_labels_is_answered_by_generation() -> None:
    written = [
        score_task(tiny_model(), TOKENIZER, task(["a"], []), scoring=how)
        for how in ("generate", "likelihood")
    ]
    assert written[0] == written[1]
    assert written[1].scoring == "generate"


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    score = score_task(
        tiny_model(), TOKENIZER, task(["no"] * 5, ["no", "y"]), scoring="likelihood", batch_size=2
    )
    (Path(folder) / f"{rank}.json").write_text(json.dumps([score.answers, score.correct]))
    torch.distributed.destroy_process_group()


def test_processes_share_the_items_and_all_get_the_whole(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, args=(3, port, str(tmp_path)), nprocs=3, start_method="fork")
    alone = score_task(tiny_model(), TOKENIZER, task(["no"] * 5, ["no", "y"]), scoring="likelihood")
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [alone.answers, alone.correct]


# ---------------------------------------------------------------------- the option


def options(**fields: Any) -> EvaluateOptions:
    return EvaluateOptions.model_validate(fields)


def test_candidates_of_a_task() -> None:
    first, second = task(["a"], ["no", "yes"]), task(["b"], ["yes", "maybe"])
    assert candidates(second, [first], "task") == ["yes", "maybe"]
    assert candidates(second, [first, second], "seen") == ["yes", "maybe", "no"]
    assert candidates(first, [], "seen") == ["no", "yes"]


def test_a_run_says_how_it_scores() -> None:
    free = task(["a"], [])
    assert scoring_notes([free], options(), "all") == []
    own = options(scoring="likelihood")
    assert scoring_notes([free], own, "all tasks") == [
        "the answer to an item is the likeliest of its task's labels; nothing is written",
        "t has no labels and is scored by what the model writes",
    ]
    assert scoring_leaks(own) == ["answers chosen among the task's own labels"]
    seen = options(scoring="likelihood", candidates="seen")
    assert scoring_leaks(seen) == scoring_leaks(options()) == []
    assert "the labels of all tasks and its own" in scoring_notes([], seen, "all tasks")[0]


def test_candidates_without_likelihood_are_refused() -> None:
    document = Document({"model": "m", "data": "d"}, {}, "test")
    with pytest.raises(
        UserError, match=r"'evaluate.candidates' = 'seen': needs evaluate.scoring: likelihood"
    ):
        expand(document, sets=["evaluate.candidates=seen"])
    sets = ["evaluate.candidates=seen", "evaluate.scoring=likelihood"]
    assert expand(document, sets=sets).jobs[0].job.evaluate.candidates == "seen"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("likelihood")
    tiny_checkpoint(folder / "model")
    tiny_stream(folder / "data", ["fruit", "metal"])
    return folder


def run(folder: Path, output: Path, **evaluate: Any) -> dict[str, Any]:
    adapter = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
    recipe = tiny_recipe(
        folder / "model", folder / "data", adapter=adapter, train={"max_steps": 12}, evaluate=evaluate
    )
    return run_tiny(recipe, output)


def test_a_stream_is_scored_by_likelihood(folder: Path, tmp_path: Path) -> None:
    own = run(folder, tmp_path / "own", scoring="likelihood")
    seen = run(folder, tmp_path / "seen", scoring="likelihood", candidates="seen")
    assert own["scoring"] == seen["scoring"] == "likelihood"
    assert own["leaks"] == ["label options in the prompt", "answers chosen among the task's own labels"]
    assert seen["leaks"] == ["label options in the prompt"]
    assert "the likeliest of its task's labels" in own["notes"][0]
    assert "the labels of all tasks learned so far" in seen["notes"][0]
    # Two labels each, and one of them always is chosen.
    assert own["invalid"] == [[0, 0]] * 3
    # Before a second task is learned there are no others' labels to be led astray by.
    assert seen["scores"][0] == own["scores"][0]
    assert seen["scores"][1][0] == own["scores"][1][0]
    assert all(a <= b for a, b in zip(seen["scores"][2], own["scores"][2], strict=True))
    assert run(folder, tmp_path / "written", cells="final")["scoring"] == "generate"


def test_evaluate_agrees_with_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(folder, tmp_path / "run", cells="final", scoring="likelihood", candidates="seen")
    with contextlib.suppress(SystemExit):
        main(
            [
                *("evaluate", "--model", str(tmp_path / "run"), "--data", str(folder / "data")),
                *("--set", "evaluate.scoring=likelihood", "--set", "evaluate.candidates=seen"),
                *("--output", str(tmp_path / "scores.json")),
            ]
        )
    rows = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert [row["accuracy"] for row in rows] == result["scores"][2]
    assert all(row["scoring"] == "likelihood" and row["items_per_second"] > 0 for row in rows)
    assert "the likeliest of the labels of all tasks given" in capsys.readouterr().err


def test_what_a_run_refuses_before_it_trains(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin(
        tmp_path,
        "steers",
        "steers:Steers",
        "from graftwork import hookimpl\n"
        "class Steers:\n"
        "    def __init__(self, options): pass\n"
        "    @hookimpl\n"
        "    def logits_processors(self, run, model): return [lambda ids, scores: scores]\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    likelihood = {"scoring": "likelihood", "cells": "final"}
    recipe = tiny_recipe(folder / "model", folder / "data", plugins={"steers": {}}, evaluate=likelihood)
    with pytest.raises(UserError, match="plugin 'steers' changes how answers are written"):
        run_tiny(recipe, tmp_path / "a")
    free = tmp_path / "free.jsonl"
    free.write_text("".join(f'{{"prompt": "{i}?", "completion": " {i}"}}\n' for i in range(40)))
    recipe = tiny_recipe(folder / "model", free, data_options={"validation": 0.3}, evaluate=likelihood)
    with pytest.raises(UserError, match="no task here has any"):
        run_tiny(recipe, tmp_path / "b")
    prompts = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    recipe = tiny_recipe(folder / "model", folder / "data", adapter=prompts, evaluate=likelihood)
    with pytest.raises(UserError, match="which PEFT's prompt learning does not"):
        run_tiny(recipe, tmp_path / "c")
    assert not list(tmp_path.glob("?/**/adapter*"))
