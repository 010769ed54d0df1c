"""The additivity experiment on a tiny model: every figure against its definition, and the model unharmed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.console import Console
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.transform.calibration import read_windows
from graftwork.transform.options import TransformOptions
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import WeightScheme
from graftwork_dam import factorise, normalised, power_split
from graftwork_dam.benchmark import additivity_benchmark, measure_additivity
from graftwork_dam.settings import AdditivityOptions, Setting, metric_words, settings
from pydantic import ValidationError
from torch.nn import functional

RATIO, DAMP = 0.7, 0.01
OPTIONS: dict[str, Any] = {
    "calibration": "random",
    "evaluation": "random",
    "window": 24,
    "samples": 6,
    "evaluation_windows": 3,
    "batch_size": 2,
    "ratios": [RATIO, 0.9],
    "bits": [8, 3],
    "latents": [16, 4],
    "learn": {"steps": 2, "tokens": 64},
    "damp": DAMP,
}


def measured(model: Any, **changes: Any) -> Any:
    options = AdditivityOptions.model_validate({**OPTIONS, **changes})
    evaluation = SimpleNamespace(
        run=SimpleNamespace(seed=0),
        model=model,
        tokenizer=tiny_tokenizer(),
        options=options,
        console=Console(enabled=False),
    )
    return measure_additivity(evaluation)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", initializer_range=0.3)


@pytest.fixture(scope="module")
def found(model: Any) -> Any:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = measured(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return result


def windows(model: Any) -> Any:
    texts = TransformOptions(
        calibration="random",
        samples=6,
        window=24,
        evaluation=["random"],
        evaluation_window=24,
        evaluation_windows=3,
    )
    return read_windows(texts, tiny_tokenizer(), model.config, 0)


def nll(model: Any, ids: torch.Tensor) -> list[float]:
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return [functional.cross_entropy(a, b).item() for a, b in zip(logits, ids[:, 1:], strict=True)]


def moments_of(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moments of the inputs of all linears in the decoder layers of the unchanged model."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def see(module: Any, arguments: Any) -> None:
            x = arguments[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return see

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears(model).items()]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return sums


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return quantize_weight(weight.float(), WeightScheme(bits=bits)).dequantized()


def compressed(kind: str, weight: torch.Tensor, moments: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight in a setting, from the formulas."""
    rows, columns = weight.shape
    rank = int(RATIO * rows * columns / (rows + columns))
    if kind == "q":
        return rounded(weight, bits)
    if kind in ("ql", "qlq"):
        factors = factorise(rounded(weight, bits), rank, moments=moments, damp=DAMP)
    else:
        factors = factorise(weight, rank, moments=moments, damp=DAMP)
    if kind in ("l", "ql"):
        return factors.product().float()
    if kind == "q_of_l":
        return rounded(factors.product(), bits)
    power = {"p0": 0.0, "p05": 0.5, "p1": 1.0, "qlq": 0.5}[kind]
    left, right = factors.split(normalised(power_split(factors.values, power)))
    return rounded(left, bits) @ rounded(right, bits)


@pytest.mark.parametrize("kind", ["l", "q", "q_of_l", "ql", "qlq", "p0", "p05", "p1"])
def test_losses_and_errors_are_those_of_the_compressed_model(model: Any, found: Any, kind: str) -> None:
    texts = windows(model)
    moments = moments_of(model, texts.calibration)
    changed = copy.deepcopy(model)
    errors: list[tuple[float, float]] = []
    for name, module in linears(changed).items():
        weight = module.weight.detach()
        new = compressed(kind, weight, moments[name], 3)
        e = (weight - new).double()

        def outputs(one: torch.Tensor, name: str = name) -> float:
            return ((one @ moments[name]) * one).sum().sqrt().item()

        errors.append(((e.norm() / weight.norm()).item(), outputs(e) / outputs(weight.double())))
        module.weight.data = new
    ids = texts.evaluation[0]
    expected = [a - b for a, b in zip(nll(changed, ids), nll(model, ids), strict=True)]
    suffix = "" if kind == "l" else "_w3"
    assert found.items[f"delta_{kind}{suffix}"] == pytest.approx(expected, abs=2e-3)
    assert found.items["dense_nll"] == pytest.approx(nll(model, ids), abs=1e-5)
    row = next(
        r for r in found.rows if r["kind"] == kind and r["ratio"] in (None, RATIO) and r["bits"] in (None, 3)
    )
    assert row["tensor_error"] == pytest.approx(sum(a for a, _ in errors) / len(errors), rel=2e-3)
    assert row["dot_error"] == pytest.approx(sum(b for _, b in errors) / len(errors), rel=2e-3)


@pytest.mark.parametrize("kind", ["q_of_l", "ql", "qlq", "p05", "learned"])
def test_gaps_are_beyond_the_sum_of_both_alone(found: Any, kind: str) -> None:
    items = found.items
    expected = [a + b for a, b in zip(items["delta_l"], items["delta_q_w3"], strict=True)]
    assert items["delta_sum_w3"] == pytest.approx(expected)
    gap = [a - b for a, b in zip(items[f"delta_{kind}_w3"], expected, strict=True)]
    assert items[f"gap_{kind}_w3"] == pytest.approx(gap)
    linear = found.files["additivity.json"]
    low = linear[Setting("l", RATIO).words]["linears"]
    alone = linear[Setting("q", None, 3).words]["linears"]
    joint = linear[Setting(kind, RATIO, 3).words]["linears"]
    for index, level in enumerate(("tensor", "dot")):
        gaps = [joint[n][index] - low[n][index] - alone[n][index] for n in joint]
        assert items[f"{level}_gap_{kind}_w3"] == pytest.approx(gaps)
        shares = [joint[n][index] ** 2 / (low[n][index] ** 2 + alone[n][index] ** 2) for n in joint]
        assert items[f"{level}_ratio_{kind}_w3"] == pytest.approx(shares)
        assert len(gaps) == 14


def test_dam_is_no_worse_than_any_split_on_the_calibration_text(found: Any) -> None:
    linear = found.files["additivity.json"]
    names = [Setting(kind, RATIO, 3).words for kind in ("p0", "p05", "p1", "grid", "learned")]
    p0, p05, p1, grid, learned = (linear[name]["linears"] for name in names)
    for name in learned:
        assert grid[name][1] <= min(one[name][1] for one in (p0, p05, p1)) * (1 + 1e-5)
        assert learned[name][1] <= grid[name][1] * (1 + 1e-5)


def test_bits_are_those_of_the_formula(found: Any) -> None:
    total = bits = parameters = 0.0
    for rows, columns in 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]:
        rank = int(RATIO * rows * columns / (rows + columns))
        # Codes, and a scale of 16 bits per row of each factor.
        total += 3 * rank * (rows + columns) + 16 * (rows + rank)
        bits += 3 * rows * columns + 16 * rows
        parameters += rows * columns
    row = {r["setting"]: r["bits_per_weight"] for r in found.rows}
    assert row[Setting("p05", RATIO, 3).words] == pytest.approx(total / parameters)
    assert row[Setting("q", None, 3).words] == pytest.approx(bits / parameters)


def test_latents_are_rounded_where_that_is_asked(found: Any) -> None:
    items = found.items
    assert items["delta_p0_w8l4"] != items["delta_p0_w8"]
    assert "gap_p0_w8l4" not in items
    assert not any(name.startswith("delta_q_of_l") and name.endswith("l4") for name in items)


def test_everything_has_its_words_and_charts_have_all_series(found: Any) -> None:
    asked = metric_words(AdditivityOptions.model_validate(OPTIONS))
    assert {*found.items, *found.values} == {*asked}
    assert additivity_benchmark({"name": "dam:additivity", **OPTIONS}).metrics == asked
    assert {*asked} < {*metric_words()}
    assert additivity_benchmark({"name": "qa", "data": "x"}).metrics == metric_words()
    over_bits = next(c for c in found.charts if c.x == "bits of weights" and "latents" not in c.title)
    assert len(over_bits.series) == 11
    assert [x for x, _ in over_bits.series["DAM"]] == [3.0, 8.0]
    over_ratio = next(c for c in found.charts if c.x != "bits of weights")
    assert [x for x, _ in over_ratio.series["sum of both alone"]] == [0.7, 0.9]
    low, alone, both = (
        dict(over_bits.series[name]) for name in ("low rank alone", "rounding alone", "sum of both alone")
    )
    assert both[3.0] == pytest.approx(low[3.0] + alone[3.0])


def test_only_what_is_asked_for_is_measured(model: Any) -> None:
    found = measured(model, ratios=[0.9], bits=[4], latents=[16], compositions=["p05"], quantizer="gptq")
    assert [row["kind"] for row in found.rows] == ["l", "q", "p05"]
    assert not found.charts
    few = AdditivityOptions.model_validate(
        {**OPTIONS, "ratios": [0.9], "bits": [4], "latents": [16], "compositions": ["p05"]}
    )
    assert {*found.items} == {*metric_words(few)}
    rounded = few.model_copy(update={"latents": [4]})
    assert {*metric_words(rounded)} == {"dense_nll", "delta_l", "delta_q_w4", "delta_p05_w4l4"}
    seen = settings(AdditivityOptions.model_validate({**OPTIONS, "compositions": ["ql", "p0"]}))
    assert {one.latents for one in seen if one.kind == "ql"} == {16}


def test_inputs_are_rounded_too_where_that_is_asked(model: Any) -> None:
    few = {"ratios": [0.9], "bits": [8], "latents": [16], "compositions": ["p05"]}
    plain, acts = measured(model, **few), measured(model, **few, activation_bits=3)
    assert acts.items["delta_l"] == plain.items["delta_l"]
    for name in ("delta_q_w8", "delta_p05_w8"):
        difference = [a - b for a, b in zip(acts.items[name], plain.items[name], strict=True)]
        assert max(map(abs, difference)) > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratios": [1.2]}, "each lies above 0 and is at most 1"),
        ({"ratios": []}, "at least 1 item"),
        ({"bits": [5]}, "Input should be 2, 3, 4, 6 or 8"),
        ({"latents": [5]}, r"16 \(as they are\), 8 or 4"),
        ({"compositions": ["lq"]}, "Input should be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AdditivityOptions.model_validate({**OPTIONS, **changes})


def test_a_ratio_too_small_and_a_missing_text_are_refused_by_name(model: Any) -> None:
    with pytest.raises(UserError, match=r"ratio 0.01 leaves 'self_attn.q_proj' \(32 x 32\) a rank of 0"):
        measured(model, ratios=[0.01])
    with pytest.raises(UserError, match=r"text file 'nowhere.txt' does not exist"):
        measured(model, evaluation="nowhere.txt")
