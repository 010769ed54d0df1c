"""The shipped recipes resolve, name arms that exist, and run at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftwork import recipe
from graftwork.cli import main
from graftwork_parsp import __file__ as package

RECIPES = Path(package).parent / "recipes"


@pytest.mark.parametrize("size", ["small", "smoke", "paper"])
def test_the_claim_has_all_its_arms(size: str) -> None:
    found = recipe.load(RECIPES / "claim.yaml", size=size)
    assert found.arms == [
        "seq-lora", "region-only", "parsp", "parsp-random", "parsp-dense", "o-lora", "inf-lora", "ewc",
    ]  # fmt: skip
    jobs = {job.arm: job.job for job in found.jobs}
    assert jobs["region-only"].plugins == {"parsp": {"density": 0.05, "null_space": False}}
    assert jobs["parsp-random"].plugins["parsp"]["rows"] == "random"
    assert jobs["parsp-dense"].plugins["parsp"]["density"] == 1.0
    assert len({json.dumps(job.train) for job in jobs.values()}) == 1
    if size == "smoke":
        assert found.expect == []
    else:
        assert found.expect == [
            "parsp.bwt > region-only.bwt",
            "parsp.bwt > seq-lora.bwt",
            "parsp.la > parsp-random.la",
            "parsp.ap > seq-lora.ap",
        ]
    if size == "small":
        assert all(job.data.options_in_prompt is False for job in jobs.values())


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["trainer", *words])
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def test_the_papers_size_dry_runs_without_a_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """144 M numbers train at density .05: 2 x 550 rows of 4096 in 32 layers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert call(monkeypatch, "run", "parsp:paper", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "meta-llama/Llama-2-7b-hf" in printed
    assert f"{2 * 550 * 4096 * 32:,} parameters" in printed


def test_the_paper_recipe_runs_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    assert call(monkeypatch, "run", "parsp:paper", "--size", "smoke", "--output", str(tmp_path / "run")) == 0
    assert list((tmp_path / "run").rglob("parsp.safetensors"))
