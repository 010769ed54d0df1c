"""Tracing: what restoring everything and nothing gives, how windows tile the layers, that the model stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork.edit.requests import Request
from graftwork.edit.sites import find_sites
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_dem.attribution import attribute
from graftwork_dem.lines import line
from graftwork_dem.passes import corrupted, embeddings, noise_scale, record, rerun, restore, target_log_prob
from graftwork_dem.trace import trace, windows
from hypothesis import given
from hypothesis import strategies as st

TOKENIZER = tiny_tokenizer()
REQUEST = Request("r", "{}. Then this person wants", "PersonX misses the bus", "to run home")
LINE = line(TOKENIZER, REQUEST)


def model_of(kind: str = "llama", **changes: Any) -> Any:
    layers = {"gpt2": "n_layer"}.get(kind, "num_hidden_layers")
    wide = {"initializer_range": 0.2, layers: 3, **changes}
    return tiny_model(kind, **wide).double()


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def both(model: Any, std: float = 1.0, draws: int = 3) -> tuple[Any, Any, Any]:
    sites = find_sites(model)
    with torch.no_grad():
        clean = record(model, LINE, embeddings(model, LINE), sites)
        dirty = record(model, LINE, corrupted(model, LINE, std=std, draws=draws, generator=noise()), sites)
    return sites, clean, dirty


def test_a_line_knows_its_event_and_its_target() -> None:
    ids = LINE.ids.tolist()
    assert TOKENIZER.decode([ids[n] for n in LINE.event]) == "PersonX misses the bus"
    assert TOKENIZER.decode(LINE.targets.tolist()) == " to run home"
    assert [ids[n + 1] for n in LINE.predicts] == LINE.targets.tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_restoring_everything_is_the_clean_run_and_restoring_nothing_the_corrupted_one(kind: str) -> None:
    model = model_of(kind)
    sites, clean, dirty = both(model)
    assert (clean.j - dirty.j).abs().min() > 1e-3
    everywhere = torch.arange(len(LINE.ids))
    with torch.no_grad():
        everything = {site: restore(clean.outputs[site], everywhere) for site in sites}
        torch.testing.assert_close(
            rerun(model, LINE, dirty, 0, everything), clean.j.expand(3), rtol=0, atol=1e-12
        )
        for start in range(3):
            torch.testing.assert_close(rerun(model, LINE, dirty, start, {}), dirty.j, rtol=0, atol=1e-12)


def test_a_run_from_the_windows_first_layer_is_the_whole_run() -> None:
    model = model_of()
    sites, clean, dirty = both(model)
    change = {sites[3]: restore(clean.outputs[sites[3]], LINE.last)}
    with torch.no_grad():
        late = rerun(model, LINE, dirty, sites[3].layer, change)
        torch.testing.assert_close(late, rerun(model, LINE, dirty, 0, change), rtol=0, atol=1e-12)


def test_the_log_probability_is_that_of_the_formula() -> None:
    model = model_of()
    with torch.no_grad():
        logits = model(input_ids=LINE.ids[None]).logits
        wanted = torch.stack(
            [
                logits[0, int(at)].log_softmax(-1)[int(token)]
                for at, token in zip(LINE.predicts, LINE.targets, strict=True)
            ]
        ).mean()
        found = target_log_prob(logits[:, LINE.predicts], LINE)
    torch.testing.assert_close(found[0], wanted)


def test_without_noise_nothing_is_lost_and_the_line_is_skipped() -> None:
    model = model_of()
    sites = find_sites(model)
    for found in (
        trace(model, LINE, sites, std=0.0, draws=2, generator=noise(), gate=False),
        attribute(model, LINE, sites, std=0.0, draws=2, generator=noise()),
    ):
        assert found.corrupted == found.clean
        assert not found.scores.any()
        assert not found.gains.any()
        assert found.skipped is not None
        assert "costs 0 of log-probability" in found.skipped


def test_scores_are_shares_of_the_loss_cut_at_one_and_a_half() -> None:
    model = model_of()
    sites = find_sites(model)
    tries = (
        trace(model, LINE, sites, std=2.0, draws=2, generator=noise(seed), gate=False) for seed in range(20)
    )
    found = next(one for one in tries if one.skipped is None)
    lost = found.clean - found.corrupted
    assert lost >= 0.05
    torch.testing.assert_close(found.scores, (found.gains / lost).clamp(0, 1.5))


def test_noise_has_the_spread_of_the_embeddings_and_stays_on_the_event() -> None:
    model = model_of()
    scale = noise_scale(model)
    assert scale == pytest.approx(float(model.get_input_embeddings().weight.detach().std()))
    added = corrupted(model, LINE, std=scale, draws=400, generator=noise()) - embeddings(model, LINE)
    outside = [n for n in range(len(LINE.ids)) if n not in LINE.event.tolist()]
    assert not added[:, outside].any()
    assert float(added[:, LINE.event].std()) == pytest.approx(scale, rel=0.02)


def test_tracing_leaves_weights_gradients_and_hooks_alone() -> None:
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    sites = find_sites(model)
    trace(model, LINE, sites, std=1.0, draws=2, generator=noise(), gate=False)
    attribute(model, LINE, sites, std=1.0, draws=2, generator=noise())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@given(layers=st.integers(1, 40), width=st.integers(1, 12), stride=st.integers(1, 12))
def test_every_layer_has_one_window_and_a_window_is_as_wide_as_asked(
    layers: int, width: int, stride: int
) -> None:
    found = windows(layers, width, stride)
    assert [layer for _, _, own in found for layer in own] == list(range(layers))
    for centre, restored, own in found:
        assert centre in restored
        assert centre in own
        inside = width // 2 <= centre < layers - width // 2
        assert len(restored) == width if inside else len(restored) <= width
        nearest = [min(abs(layer - other) for other, _, _ in found) for layer in own]
        assert nearest == [abs(layer - centre) for layer in own]
    if stride == 1:
        assert [centre for centre, _, _ in found] == list(range(layers))
