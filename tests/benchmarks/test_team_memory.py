"""Players are adapters of one model: a team of four must need hardly more memory than one.

Each run is a process of its own: four iterations of writing, scoring and training with LoRA of rank 16 on
SmolLM2-135M's geometry (30 layers, 576 wide, random weights, a byte-level vocabulary so that the head, which has no
part in this, is small). The peak is that of the whole process: resident on a CPU, allocated on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.runs import call_trainer
from measured import in_pairs

pytestmark = pytest.mark.slow
MODEL = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
}
LIMIT = 1.15
SETTINGS = [
    "adapter.peft_type=LORA",
    "adapter.r=16",
    "adapter.target_modules=all-linear",
    "plugins.tpaw.iterations=4",
    "plugins.tpaw.rounds=1",
    "plugins.tpaw.writing.max_new_tokens=4",
    "plugins.tpaw.writing.batch_size=4",
    "data.train_items=8",
    "data.test_items=2",
    "train.max_steps=1",
    "train.per_device_train_batch_size=2",
    "train.save_strategy=no",
    "evaluate.max_new_tokens=1",
]


def test_a_team_of_four_adapters(record: Any, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", **MODEL)
    runs = iter(range(100))

    def peak(players: int) -> float:
        output = tmp_path / f"run-{next(runs)}"
        settings = [*SETTINGS, f"plugins.tpaw.players={players}"]
        words = ["train", "--model", str(model), "--data", "exact:arithmetic", "--plugin", "tpaw"]
        words += ["--output", str(output), *(word for one in settings for word in ("--set", one))]
        done = call_trainer(words)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((output / "result.json").read_text())["peak_memory_bytes"] / 2**20

    four, one = in_pairs(
        lambda: peak(4), lambda: peak(1), pairs=1, warmup=0, label="memory of a team of four players"
    )
    record("team_memory", ("4 players", four), ("1 player", one), limit=LIMIT, unit="MiB")
