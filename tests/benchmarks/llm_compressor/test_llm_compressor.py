"""Against llm-compressor: the same method, settings, model, calibration windows and machine.

Each side is a process of its own that reads SmolLM2-135M (float32), compresses it and writes a checkpoint in
compressed-tensors' format. Its time is that of the processor, for the whole process; its memory is the largest
resident size. Both checkpoints are then read by the same library and scored by the same perplexity.

The weights came from a 4-bit file, so perplexities say nothing about models that never were rounded; here they are
compared with each other only. ``GRAFTWORK_DATA`` names the folder with ``text/c4_demo.jsonl`` (calibration) and
``text/wikitext-2/test.txt`` (evaluation).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from graftwork.evaluate.perplexity import perplexity
from graftwork.models import load_config, load_model, load_tokenizer, resolve
from graftwork.testing.runs import trainer_command
from graftwork.transform.calibration import read_windows
from graftwork.transform.options import TransformOptions
from measured import in_pairs
from processes import Used, peer_python, run_measured
from safetensors.torch import save_file

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
MODEL = "smollm2-135m"
SEED = 1
# Windows as long as those of the published tables; few, because each side also runs on two cores in minutes.
SAMPLES, WINDOW, BATCH = 2, 2048, 1
SCORED, SCORED_WINDOW = 16, 512
TIME, MEMORY, PERPLEXITY = 1.0, 0.6, 1.01

W4 = ["scheme=W4A16", "group=64", "convention=half-range"]
W8 = ["scheme=W8A8", "convention=half-range", "activation_symmetric=true"]
GPTQ = ["order=importance", "sequential=false"]
"""As llm-compressor has it: columns in the order of their importance, all linears of a layer from one pass."""
METHODS: dict[str, dict[str, list[str]]] = {
    "rtn": {"rtn": W4},
    "gptq": {"gptq": [*W4, *GPTQ]},
    "smoothquant+gptq": {"smoothquant": ["measure=range"], "gptq": [*W8, *GPTQ]},
    "awq": {"awq": [*W4, "search_clip=false", "places=[qkv,gate_up,down]"]},
}


@pytest.fixture(scope="module")
def texts() -> Path:
    folder = Path(os.environ.get("GRAFTWORK_DATA", "data")) / "text"
    if not (folder / "c4_demo.jsonl").is_file():
        pytest.skip("set GRAFTWORK_DATA to the folder that holds text/c4_demo.jsonl and text/wikitext-2")
    return folder


@pytest.fixture(scope="module")
def peer() -> Path:
    return peer_python("llm-compressor", HERE / "requirements.txt")


@pytest.fixture(scope="module")
def windows(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibration windows that ``trainer transform`` draws with this seed."""
    options = TransformOptions(
        calibration=str(texts / "c4_demo.jsonl"), samples=SAMPLES, window=WINDOW, batch_size=BATCH
    )
    found = read_windows(options, load_tokenizer(MODEL), load_config(MODEL), SEED).calibration
    assert found is not None
    path = tmp_path_factory.mktemp("windows") / "windows.safetensors"
    save_file({"input_ids": found.contiguous()}, path)
    return path


def ours(method: str, texts: Path, output: Path) -> Used:
    settings = [
        f"seed={SEED}",
        f"transform.calibration={texts / 'c4_demo.jsonl'}",
        f"transform.samples={SAMPLES}",
        f"transform.window={WINDOW}",
        f"transform.batch_size={BATCH}",
        "transform.format=compressed-tensors",
    ]
    words = ["transform", "--model", MODEL, "--output", str(output)]
    for plugin, options in METHODS[method].items():
        words += ["--plugin", plugin]
        settings += [f"plugins.{plugin}.{option}" for option in options]
    words += [word for one in settings for word in ("--set", one)]
    used = run_measured(trainer_command(words))
    seconds = json.loads((output / "result.json").read_text())["eval_seconds"]
    return Used(used.seconds, used.peak_mib, {"compress_seconds": seconds})


def theirs(method: str, python: Path, windows: Path, output: Path) -> Used:
    folder = resolve(MODEL).path
    return run_measured([python, HERE / "quantize.py", folder, windows, method, output])


def score(folder: Path, texts: Path) -> float:
    model = load_model(str(folder)).eval()
    found = perplexity(
        model,
        load_tokenizer(MODEL),
        texts / "wikitext-2" / "test.txt",
        window=SCORED_WINDOW,
        max_windows=SCORED,
        batch_size=1,
    )
    return float(found["perplexity"])


@pytest.mark.parametrize("method", METHODS)
def test_time_memory_and_perplexity(
    method: str, record: Any, texts: Path, peer: Path, windows: Path, tmp_path: Path
) -> None:
    runs: dict[str, list[Used]] = {"ours": [], "theirs": []}

    def one(side: str) -> float:
        output = tmp_path / f"{side}-{len(runs[side])}"
        done = ours(method, texts, output) if side == "ours" else theirs(method, peer, windows, output)
        runs[side].append(done)
        return done.seconds

    in_pairs(lambda: one("ours"), lambda: one("theirs"), pairs=1, warmup=0, label=f"{method}, two libraries")
    misses: list[str] = []

    def hold(what: str, mine: list[float], other: list[float], limit: float, unit: str) -> None:
        # All figures of a method are written, whichever of them misses.
        try:
            record(
                f"llm_compressor_{what}", (f"graftwork {method}", mine), ("llm-compressor", other),
                limit=limit, unit=unit,
            )  # fmt: skip
        except AssertionError as error:
            misses.append(str(error))

    mine, other = runs["ours"], runs["theirs"]
    hold("time", [run.seconds for run in mine], [run.seconds for run in other], TIME, "s of processor")
    hold(
        "compress_time",
        [run.said["compress_seconds"] for run in mine],
        [run.said["compress_seconds"] for run in other],
        TIME,
        "s",
    )
    hold("memory", [run.peak_mib for run in mine], [run.peak_mib for run in other], MEMORY, "MiB")
    scores = [score(tmp_path / "ours-0" / "model", texts)], [score(tmp_path / "theirs-0", texts)]
    hold("perplexity", *scores, PERPLEXITY, "ppl")
    assert not misses, "\n".join(misses)
