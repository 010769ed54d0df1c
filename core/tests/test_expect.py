"""Claims: how they are read, and when they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftwork import UserError
from graftwork.expect import PLAIN_METRICS, concerns, judge, parse
from graftwork.testing.runs import run_tiny, tiny_recipe

ARMS = ["ours", "lora"]


def job(name: str, share: float, variant: str = "seed=1", **more: Any) -> dict[str, Any]:
    """One task and one stage; ``share`` of 200 items are right."""
    right = [int(index < share * 200) for index in range(200)]
    return {
        "name": name,
        "variant": variant,
        "order": ["fruit"],
        "items": [[None], [right]],
        "metrics": {"ap": share, **more},
        "train_seconds": more.get("train_seconds", 1.0),
    }


def verdict(text: str, *jobs: dict[str, Any]) -> str:
    return judge(parse(text, ARMS), jobs)["verdict"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ours.ap is better", "is not of the form"),
        ("our.ap > lora.ap", "no step 'our' (did you mean 'ours'?)"),
        ("ours.app > lora.ap", "no metric 'app' (did you mean 'ap'?)"),
        ("ours.ap > lora.seed", "no metric 'seed'"),
    ],
)
def test_a_claim_that_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, ARMS)
    assert said in str(caught.value)


def test_all_parts_of_a_claim_are_read() -> None:
    claim = parse("ours.ap >= lora.la - 0.01", ARMS)
    assert (claim.arm, claim.metric, claim.relation, claim.other, claim.other_metric, claim.margin) == (
        "ours",
        "ap",
        ">=",
        "lora",
        "la",
        -0.01,
    )
    assert parse("ours.bwt > -0.05", ARMS).margin == -0.05


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [(0.9, 0.5, "held"), (0.5, 0.9, "refuted"), (0.52, 0.5, "not decided")],
)
def test_two_arms_are_compared_by_the_interval(left: float, right: float, expected: str) -> None:
    # Different items are right, so that a small difference is not certain.
    ours, lora = job("ours", left), job("lora", right)
    lora["items"][1][0].reverse()
    assert verdict("ours.ap > lora.ap", ours, lora) == expected


def test_the_margin_must_be_cleared() -> None:
    ours, lora = job("ours", 0.9), job("lora", 0.5)
    assert verdict("ours.ap > lora.ap + 0.2", ours, lora) == "held"
    assert verdict("ours.ap > lora.ap + 0.6", ours, lora) == "refuted"
    assert verdict("ours.ap < lora.ap", ours, lora) == "refuted"


def test_a_number_is_compared_with_the_mean_over_variants() -> None:
    jobs = [job("ours", 0.4, "seed=1"), job("ours", 0.8, "seed=2")]
    assert verdict("ours.ap > 0.55", *jobs) == "held"
    assert verdict("ours.ap > 0.65", *jobs) == "refuted"


def test_costs_are_compared_by_their_means() -> None:
    ours, lora = job("ours", 0.5, train_seconds=3.0), job("lora", 0.5, train_seconds=2.0)
    assert verdict("ours.train_seconds < lora.train_seconds + 2", ours, lora) == "held"
    assert verdict("ours.train_seconds < lora.train_seconds", ours, lora) == "refuted"


@pytest.mark.parametrize("metric", ["statistics_seconds", "adapter_bytes", "extra_state_bytes"])
def test_what_a_method_keeps_and_computes_besides_training_can_be_claimed(metric: str) -> None:
    ours, lora = ({**job(name, 0.5), metric: value} for name, value in (("ours", 2), ("lora", 3)))
    assert verdict(f"ours.{metric} < lora.{metric}", ours, lora) == "held"
    assert verdict(f"lora.{metric} <= ours.{metric}", ours, lora) == "refuted"
    assert verdict(f"ours.{metric} < 2.5", ours) == "held"
    assert verdict(f"ours.{metric} < 2.5", job("ours", 0.5)) == "not decided"


def test_every_plain_metric_is_in_a_run_s_result(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    """A claim about a name that no run writes would never be decided."""
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
    evaluate = {"cells": "final"}
    train = {"max_steps": 1}
    result = run_tiny(
        tiny_recipe(checkpoint, stream, adapter=adapter, evaluate=evaluate, train=train), tmp_path / "run"
    )
    assert set(PLAIN_METRICS) - set(result) == {"unseen"}  # asked for by evaluate.general.tasks


def test_what_was_not_measured_decides_nothing() -> None:
    assert verdict("ours.fwt > 0", job("ours", 0.5, fwt=None)) == "not decided"


def test_claims_about_steps_that_are_left_out() -> None:
    assert concerns("a.ap > b.ap", {"b"})
    assert concerns("a.ap > 0.5", {"a"})
    assert concerns("a.kl < 0.5 * b.kl", {"b"})
    assert not concerns("a.ap > b.ap", {"c"})
    assert not concerns("no claim", {"no"})
