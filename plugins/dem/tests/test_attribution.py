"""Attribution is tracing to first order; recall's contributions add up to the logit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork.edit.requests import Request
from graftwork.edit.sites import find_sites
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_dem.attribution import attribute
from graftwork_dem.lines import line
from graftwork_dem.recall import contributions
from graftwork_dem.trace import trace

LINE = line(
    tiny_tokenizer(), Request("r", "{}. Then this person wants", "PersonX misses the bus", "to run home")
)


def model_of(kind: str = "llama") -> Any:
    layers = {"gpt2": "n_layer"}.get(kind, "num_hidden_layers")
    return tiny_model(kind, initializer_range=0.2, **{layers: 3}).double()


def gains(model: Any, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    sites = find_sites(model)
    common: dict[str, Any] = {"std": std, "draws": 2}
    traced = trace(
        model, LINE, sites, generator=torch.Generator().manual_seed(1), where="event", gate=False, **common
    )
    cheap = attribute(model, LINE, sites, generator=torch.Generator().manual_seed(1), **common)
    assert cheap.clean == pytest.approx(traced.clean, abs=1e-12)
    assert cheap.corrupted == pytest.approx(traced.corrupted, abs=1e-12)
    return traced.gains, cheap.gains


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_difference_to_tracing_is_of_second_order(kind: str) -> None:
    model = model_of(kind)
    errors, sizes = [], []
    for std in (2e-3, 1e-3):
        traced, cheap = gains(model, std)
        assert traced.abs().max() > 0
        errors.append(float((traced - cheap).norm()))
        sizes.append(float(traced.norm()))
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.05 * sizes[1]


def test_in_the_limit_of_no_noise_both_are_the_same() -> None:
    # GPT-2's norms stay in float64; those of the llama family do not.
    traced, cheap = gains(model_of("gpt2"), 1e-6)
    torch.testing.assert_close(cheap, traced, rtol=1e-5, atol=1e-5 * float(traced.abs().max()))


def test_it_works_where_gradients_are_off_and_parameters_ask_for_none() -> None:
    model = model_of().requires_grad_(False)
    sites = find_sites(model)
    with torch.no_grad():
        found = attribute(model, LINE, sites, std=0.5, draws=2, generator=torch.Generator().manual_seed(0))
    assert found.gains.abs().max() > 0
    # What the last layer writes at the event's tokens reaches no prediction.
    assert not found.gains[-1].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_contributions_add_up_to_the_logit(kind: str) -> None:
    model = model_of(kind)
    norm: Any = model.get_submodule("transformer.ln_f" if kind == "gpt2" else "model.norm")
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        found, rest = contributions(model, LINE, find_sites(model))
        logits = model(input_ids=LINE.ids[None]).logits[0, LINE.predicts]
        wanted = logits.gather(-1, LINE.targets[:, None]).mean()
    assert found.abs().min() > 0
    # GPT-2's projections have biases, which are part of their outputs; the final norm's bias is zero here.
    torch.testing.assert_close(found.sum() + rest, wanted.double(), rtol=1e-5, atol=1e-6)
