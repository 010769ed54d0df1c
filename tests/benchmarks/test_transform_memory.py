"""Peak memory of a transform does not grow with the number of layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.runs import call_trainer

LAYERS = (2, 8, 16, 32)
LIMIT = 1.05
WIDE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_peak_memory_is_that_of_a_layer(tmp_path: Path, place: str) -> None:
    """The layers have 6.3 million parameters each, 25 MB in float32: 32 of them would be 800 MB."""
    peaks: dict[int, float] = {}
    for layers in LAYERS:
        model = tiny_checkpoint(tmp_path / f"model-{layers}", num_hidden_layers=layers, **WIDE)
        root = tmp_path / f"run-{layers}"
        settings = {"calibration": "random", "samples": 16, "window": 256, "activations": place}
        finished = call_trainer(
            [
                *("transform", f"--model={model}", "--plugin=gptq", f"--output={root}"),
                *(f"--set=transform.{key}={value}" for key, value in settings.items()),
            ]
        )
        assert finished.returncode == 0, finished.stderr
        peaks[layers] = json.loads((root / "result.json").read_text())["peak_memory_bytes"] / 2**20
    print(f"\npeak MiB, hidden states {'in' if place == 'memory' else 'on'} {place}:", end="")
    print("".join(f"  {layers} layers {peak:.0f}" for layers, peak in peaks.items()))
    assert max(peaks.values()) <= LIMIT * peaks[LAYERS[0]]
