"""Second moments: those of plain algebra, kept with what they were made from, gone on with, added, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.edit import statistics as module
from graftwork.edit.errors import StatsError, StatsMismatchError
from graftwork.edit.sites import Site, find_sites
from graftwork.edit.statistics import IdentityStatistics, Moment, Statistics
from graftwork.testing.editing import corpus, editable_model


def plain(model: Any, site: Site, windows: torch.Tensor) -> torch.Tensor:
    """Return C by float64 algebra over all tokens at once."""
    seen: list[torch.Tensor] = []
    handle = site.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    x = seen[0].flatten(0, -2).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_they_are_the_mean_of_outer_products(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    model = editable_model(kind)
    sites = find_sites(model)
    statistics = Statistics(model, tokenizer, corpus(), folder=tmp_path, budget=96)
    for site in sites:
        wanted = plain(model, site, corpus())
        torch.testing.assert_close(
            statistics.moment(site), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max())
        )
        assert torch.equal(statistics.moment(site), statistics.moment(site).T)
    assert statistics.tokens == 32 * 32 == statistics.read(sites[0]).count


def test_batches_and_passes_are_bounded(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    sites = find_sites(model, ["mlp"])
    longest: list[int] = []
    passes: list[int] = []

    class Watched(Statistics):
        def _inputs(self, ids: torch.Tensor, sites: Any) -> Any:
            longest.append(ids.numel())
            passes.append(len(sites))
            return super()._inputs(ids, sites)

    few = Watched(model, tokenizer, corpus(), folder=tmp_path / "few", budget=100, memory=2 * 8 * 48 * 48)
    few.collect(sites)
    assert max(longest) == 96
    assert set(passes) == {2}
    all_at_once = Statistics(model, tokenizer, corpus(), folder=tmp_path / "all", budget=100)
    all_at_once.collect(sites)
    for site in sites:
        assert few.path(site).read_bytes() == all_at_once.path(site).read_bytes()


def test_they_are_cached_by_what_they_were_made_from(model: Any, tokenizer: Any, cache: Path) -> None:
    (site,) = find_sites(model, ["mlp"], [1])
    first = Statistics(model, tokenizer, corpus())
    first.moment(site)
    stamp = first.path(site).stat().st_mtime_ns
    again = Statistics(model, tokenizer, corpus())
    again.moment(site)
    assert again.path(site) == first.path(site)
    assert first.path(site).stat().st_mtime_ns == stamp
    assert cache in first.path(site).parents
    others = [
        Statistics(editable_model(seed=1), tokenizer, corpus()),
        Statistics(model, tokenizer, corpus(1)),
        Statistics(model, tokenizer, corpus(), tokens=64),
    ]
    assert len({one.path(site) for one in (first, *others)}) == 4


def test_a_pass_that_was_cut_off_goes_on_to_the_same_bits(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = find_sites(model, ["mlp"], [1])
    whole = Statistics(model, tokenizer, corpus(), folder=tmp_path / "whole", budget=64)
    whole.collect([site])
    monkeypatch.setattr(module, "KEEP_EVERY", 0.0)
    calls = 0

    class Cut(Statistics):
        def _inputs(self, ids: torch.Tensor, sites: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise KeyboardInterrupt
            return super()._inputs(ids, sites)

    cut = Cut(model, tokenizer, corpus(), folder=tmp_path / "cut", budget=64)
    with pytest.raises(KeyboardInterrupt):
        cut.collect([site])
    assert not cut.path(site).exists()
    cut.collect([site])
    # Sixteen batches, the sixth of them twice.
    assert calls == 17
    assert cut.path(site).read_bytes() == whole.path(site).read_bytes()
    assert [path.name for path in cut.folder.iterdir()] == [cut.path(site).name]


def test_moments_of_two_texts_add(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (site,) = find_sites(model, ["mlp"], [1])
    halves = []
    for number, windows in enumerate((corpus()[:8], corpus()[8:])):
        statistics = Statistics(model, tokenizer, windows, folder=tmp_path / str(number))
        statistics.collect([site])
        halves.append(statistics.read(site))
    both = halves[0] + halves[1]
    wanted = plain(model, site, corpus())
    torch.testing.assert_close(both.mean, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))
    assert both.count == 1024
    both.save(tmp_path / "both.safetensors")
    assert Moment.load(tmp_path / "both.safetensors").fingerprint == both.fingerprint
    with pytest.raises(StatsMismatchError, match="would count twice"):
        _ = both + halves[0]
    other = Statistics(editable_model(seed=1), tokenizer, corpus(1), folder=tmp_path / "other")
    other.collect([site])


def test_those_of_another_model_are_refused_with_both_fingerprints(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (site,) = find_sites(model, ["mlp"], [1])
    mine = Statistics(model, tokenizer, corpus(), folder=tmp_path)
    mine.collect([site])
    other_model = editable_model(seed=1)
    (other_site,) = find_sites(other_model, ["mlp"], [1])
    other = Statistics(other_model, tokenizer, corpus(), folder=tmp_path)
    mine_hash, other_hash = mine.fingerprint(site)["weights"], other.fingerprint(other_site)["weights"]
    with pytest.raises(
        StatsMismatchError, match=f"weights is {mine_hash[:12]}, and {other_hash[:12]} is wanted"
    ):
        other.moment(other_site)
    wide = editable_model(intermediate_size=40)
    (wide_site,) = find_sites(wide, ["mlp"], [1])
    with pytest.raises(StatsMismatchError):
        Statistics(wide, tokenizer, corpus(), folder=tmp_path).moment(wide_site)
    far = Moment(mine.moment(site), 1, {**mine.fingerprint(site), "module": "elsewhere", "corpora": ["x"]})
    with pytest.raises(StatsMismatchError, match="module is elsewhere"):
        _ = mine.read(site) + far
    mine.path(site).write_bytes(b"no moments")
    with pytest.raises(StatsError, match="holds no second moments"):
        mine.moment(site)


def test_an_edited_model_is_no_source_of_moments(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    first, second = find_sites(model, ["mlp"], [0, 1])
    statistics = Statistics(model, tokenizer, corpus(), folder=tmp_path)
    statistics.collect([first])
    with torch.no_grad():
        first.matrix.mul_(2)
    # What was collected before stays good.
    assert statistics.moment(first).shape == (48, 48)
    with pytest.raises(StatsMismatchError, match="edited before its second moments were collected"):
        statistics.collect([second])


def test_keys_that_are_no_numbers_are_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (site,) = find_sites(model, ["mlp"], [1])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(StatsError, match=r"'model.layers.1.mlp.down_proj': its inputs in batch 1"):
        Statistics(model, tokenizer, corpus(), folder=tmp_path).collect([site])
    assert not list(tmp_path.iterdir())


def test_the_identity_stands_in(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (site,) = find_sites(model, ["mlp"], [1])
    control = IdentityStatistics()
    control.collect([site])
    assert torch.equal(control.moment(site), torch.eye(48, dtype=torch.float64))
    statistics = Statistics(model, tokenizer, corpus(), folder=tmp_path)
    assert statistics.factor(site, 2.0) is statistics.factor(site, 2.0)
    assert statistics.factor(site, 2.0).lam == 2.0
    assert statistics.factor(site, 3.0).lam == 3.0
