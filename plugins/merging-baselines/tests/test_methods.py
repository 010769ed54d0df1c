"""Every method against its definition, written out densely in float64 over the whole model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.masks import Bits, unpack
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.signs import disjoint, elect
from graftwork.testing.experts import open_tiny
from graftwork_merging_baselines.average import AverageMethod, AverageOptions
from graftwork_merging_baselines.consensus import ConsensusMethod, ConsensusOptions
from graftwork_merging_baselines.dare import DareMethod, DareOptions
from graftwork_merging_baselines.draws import dropped
from graftwork_merging_baselines.emr import EmrMethod
from graftwork_merging_baselines.kept_lora import KeptLoraMethod
from graftwork_merging_baselines.one_bit import OneBitMethod
from graftwork_merging_baselines.task_arithmetic import TaskArithmeticMethod
from graftwork_merging_baselines.ties import TiesMethod, TiesOptions
from graftwork_merging_baselines.unmerged import UnmergedMethod

QUIET = Console(enabled=False)
Family = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def experts(family: Family) -> Experts:
    return open_tiny(*family)


@pytest.fixture(scope="module")
def taus(experts: Experts) -> dict[str, torch.Tensor]:
    """All differences, by parameter, experts x rows x columns in float64."""
    return {
        name: torch.cat([piece.deltas for piece in experts.pieces_of(name)], 1).double()
        for name in experts.shapes
    }


def begun(method: MergeMethod, experts: Experts) -> MergeMethod:
    method.begin(experts, QUIET)
    return method


def flat(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten(1) for part in parts.values()], 1)


def trimmed(taus: torch.Tensor, keep: float) -> torch.Tensor:
    """Keep the largest, of equal ones the first (experts x entries)."""
    count = math.ceil(keep * taus.shape[1])
    found = torch.zeros_like(taus)
    for row, target in zip(taus, found, strict=True):
        kept = torch.sort(row.abs(), descending=True, stable=True).indices[:count]
        target[kept] = row[kept]
    return found


def ties(taus: torch.Tensor, keep: float, how: str) -> torch.Tensor:
    kept = trimmed(taus, keep)
    sign = kept.sum(0).sign()
    agrees = (kept * sign > 0).double()
    if how == "max":
        return (kept.abs() * agrees).amax(0) * sign
    total = (kept * agrees).sum(0)
    return total / agrees.sum(0).clamp_min(1) if how == "mean" else total


def merged(method: MergeMethod, experts: Experts) -> torch.Tensor:
    return torch.cat([method.merge(piece).flatten() for piece in experts.pieces()]).double()


def routed(method: MergeMethod, experts: Experts, index: int) -> torch.Tensor:
    return torch.cat([method.expert(piece, index).flatten() for piece in experts.pieces()]).double()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-10)


# ---------------------------------------------------------------------- one model


def test_average(experts: Experts, taus: dict[str, torch.Tensor]) -> None:
    method = begun(AverageMethod(AverageOptions()), experts)
    close(merged(method, experts), flat(taus).mean(0))
    weighted = begun(AverageMethod(AverageOptions(weights={"a": 3, "b": 0})), experts)
    close(merged(weighted, experts), (3 * flat(taus)[0] + flat(taus)[2]) / 4)
    with pytest.raises(UserError, match="weights names 'z', which is no expert"):
        begun(AverageMethod(AverageOptions(weights={"z": 1})), experts)
    with pytest.raises(UserError, match="weight of 'a' is -1"):
        begun(AverageMethod(AverageOptions(weights={"a": -1})), experts)
    with pytest.raises(UserError, match="all weights are 0"):
        begun(AverageMethod(AverageOptions(weights=dict.fromkeys("abc", 0.0))), experts)


def test_task_arithmetic(experts: Experts, taus: dict[str, torch.Tensor]) -> None:
    close(merged(TaskArithmeticMethod(0.3), experts), 0.3 * flat(taus).sum(0))


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
@pytest.mark.parametrize("keep", [0.01, 0.2, 1.0])
def test_ties(experts: Experts, taus: dict[str, torch.Tensor], keep: float, how: Any) -> None:
    whole = begun(TiesMethod(TiesOptions(keep=keep, aggregate=how, alpha=0.5)), experts)
    close(merged(whole, experts), 0.5 * ties(flat(taus), keep, how))
    single = begun(TiesMethod(TiesOptions(keep=keep, aggregate=how, trim_scope="tensor")), experts)
    for name, tau in taus.items():
        found = torch.cat([single.merge(piece) for piece in experts.pieces_of(name)]).flatten().double()
        close(found, ties(tau.flatten(1), keep, how))


def test_ties_keeps_exactly_as_many_as_asked(experts: Experts) -> None:
    method = begun(TiesMethod(TiesOptions(keep=0.137)), experts)
    kept = sum(method.trim(piece).count_nonzero(dim=(1, 2)) for piece in experts.pieces())
    assert kept.tolist() == [math.ceil(0.137 * experts.count)] * 3


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_ties_is_its_steps_byte_for_byte(experts: Experts, how: Any) -> None:
    """Trim, elect and merge in one op give what they give one after the other, also where sizes are equal."""
    method = begun(TiesMethod(TiesOptions(keep=0.137, aggregate=how)), experts)
    for piece in experts.pieces():
        kept = method.trim(piece)
        assert torch.equal(method.merge(piece), disjoint(kept, elect(kept), how))


# ---------------------------------------------------------------------- DARE


def test_dropped_entries_are_their_own(experts: Experts) -> None:
    """However a tensor is cut, whatever the order of the experts."""
    key = (42, "a", "some.weight")
    whole = dropped(key, 0, 1000, 0.7)
    for step in (1, 2, 3, 7, 64):
        parts = [dropped(key, at, min(step, 1000 - at), 0.7) for at in range(0, 1000, step)]
        assert torch.equal(torch.cat(parts), whole)
    for other in ((43, *key[1:]), (42, "b", key[2]), (42, "a", "another.weight")):
        assert 0.3 < (dropped(other, 0, 1000, 0.7) == whole).float().mean() < 0.8
    assert whole.float().mean().item() == pytest.approx(0.7, abs=0.05)
    assert not dropped(key, 0, 1000, 0.0).any()


def test_dare_is_the_definition_with_exact_rescaling(experts: Experts, taus: dict[str, torch.Tensor]) -> None:
    method = DareMethod(DareOptions(drop=0.8, alpha=0.3), seed=7)
    parts = []
    for name, tau in taus.items():
        kept = torch.zeros_like(tau)
        for index, expert in enumerate(experts.names):
            gone = dropped((7, expert, name), 0, tau[index].numel(), 0.8).view_as(tau[index])
            kept[index] = torch.where(gone, 0.0, tau[index] / (1 - 0.8))
        parts.append(0.3 * kept.sum(0).flatten())
    torch.testing.assert_close(merged(method, experts), torch.cat(parts), rtol=1e-6, atol=1e-10)


def test_dare_is_unbiased() -> None:
    """The mean over many seeds is the sum of the differences."""
    deltas = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0))
    piece = Piece("w", 0, slice(0, 1), ("a", "b"), torch.zeros(1, 50), deltas)
    options = DareOptions(drop=0.5, alpha=1.0)
    found = torch.stack([DareMethod(options, seed).merge(piece) for seed in range(2000)]).mean(0)
    torch.testing.assert_close(found, deltas.sum(0), rtol=0, atol=0.2)


def test_dare_with_nothing_dropped_is_what_it_merges_with(experts: Experts) -> None:
    sums = DareMethod(DareOptions(drop=0, alpha=0.4), seed=1)
    close(merged(sums, experts), merged(TaskArithmeticMethod(0.4), experts))
    signs = DareMethod(DareOptions(drop=0, alpha=1, merge="ties"), seed=1)
    close(merged(signs, experts), merged(begun(TiesMethod(TiesOptions(keep=1)), experts), experts))


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("lam", [0.3, 1.0, 1.5])
def test_tall_masks_and_consensus(experts: Experts, taus: dict[str, torch.Tensor], lam: float) -> None:
    method = begun(ConsensusMethod(ConsensusOptions(lam=lam, agree=2, alpha=0.5)), experts)
    tau = flat(taus)
    total = tau.sum(0).float().double()
    masks = (tau.abs() > lam * (total - tau).abs()) & (total != 0)
    for index in range(3):
        found = routed(method, experts, index)
        assert ((found != 0) == masks[index]).double().mean() > 0.9999
        torch.testing.assert_close(found[masks[index]], total[masks[index]], rtol=1e-3, atol=1e-6)
    found = merged(method, experts)
    expected = torch.where(masks.sum(0) >= 2, 0.5 * total, 0.0)
    assert (found - expected).abs().gt(1e-9).double().mean() < 1e-4
    every = begun(ConsensusMethod(ConsensusOptions(lam=lam, agree=0, alpha=0.5)), experts)
    close(merged(every, experts), 0.5 * total)


def test_tall_mask_at_one_is_the_best_in_l1(experts: Experts) -> None:
    """No other mask brings the merged difference nearer to the expert's."""
    method = begun(ConsensusMethod(ConsensusOptions(lam=1.0)), experts)
    for piece in experts.pieces():
        total = method._merged(piece)
        for index, tau in enumerate(piece.deltas):
            with_it, without = (total - tau).abs(), tau.abs()
            assert torch.equal((method.expert(piece, index) - tau).abs(), torch.minimum(with_it, without))


def test_tall_masks_are_nested(experts: Experts) -> None:
    for piece in experts.pieces():
        kept = [
            begun(ConsensusMethod(ConsensusOptions(lam=lam)), experts).expert(piece, 1) != 0
            for lam in (0.2, 0.6, 1.0, 2.0)
        ]
        for wide, narrow in itertools.pairwise(kept):
            assert not (narrow & ~wide).any()


def test_a_threshold_per_expert(experts: Experts) -> None:
    each = begun(ConsensusMethod(ConsensusOptions(lam={"a": 0.2, "b": 0.4, "c": 0.6})), experts)
    same = begun(ConsensusMethod(ConsensusOptions(lam=0.4)), experts)
    assert torch.equal(routed(each, experts, 1), routed(same, experts, 1))
    assert not torch.equal(routed(each, experts, 0), routed(same, experts, 0))
    with pytest.raises(UserError, match="lam is for a, and the experts are a, b, c"):
        begun(ConsensusMethod(ConsensusOptions(lam={"a": 0.2})), experts)


def test_emr(experts: Experts, taus: dict[str, torch.Tensor]) -> None:
    method = begun(EmrMethod(), experts)
    own, masked, rows = torch.zeros(3).double(), torch.zeros(3).double(), []
    for tau in taus.values():
        sign = tau.sum(0).sign()
        agrees = (tau * sign > 0).double()
        unified = (tau.abs() * agrees).amax(0) * sign
        own += tau.abs().mean((1, 2))
        masked += (agrees * unified).abs().mean((1, 2))
        rows.append((agrees * unified).flatten(1))
    for index in range(3):
        expected = torch.cat(rows, 1)[index] * (own / masked)[index]
        torch.testing.assert_close(routed(method, experts, index), expected, rtol=1e-6, atol=1e-10)


def test_one_bit(experts: Experts, taus: dict[str, torch.Tensor]) -> None:
    method = begun(OneBitMethod(), experts)
    expected = torch.cat(
        [(tau.sign() * tau.abs().mean((1, 2), keepdim=True)).flatten(1) for tau in taus.values()], 1
    )
    for index in range(3):
        changed = flat(taus)[index] != 0
        close(routed(method, experts, index)[changed], expected[index][changed])


@pytest.mark.parametrize("kind", ["tall", "emr", "one-bit"])
def test_what_is_stored_is_enough(experts: Experts, kind: str) -> None:
    """The weights of an expert from the stored tensors and the manifest alone."""
    options = ConsensusOptions(store_masks=True)
    made = {"tall": lambda: ConsensusMethod(options), "emr": EmrMethod, "one-bit": OneBitMethod}
    method = begun(made[kind](), experts)
    manifest = method.manifest()
    for piece in experts.pieces():
        stored = method.beside(piece)
        for index, name in enumerate(experts.names):
            bits = stored[f"sign.{name}" if kind == "one-bit" else f"mask.{name}"]
            assert isinstance(bits, Bits)
            mask = unpack(bits.words, bits.columns).float()
            if kind == "one-bit":
                found = (2 * mask - 1) * manifest["scales"][piece.name][index]
            else:
                scale = manifest["scales"][index] if kind == "emr" else 1.0
                found = mask * stored["merged"] * scale
            assert torch.equal(found, method.expert(piece, index))


# ---------------------------------------------------------------------- alike and exact


def every_method() -> Iterator[tuple[str, Any]]:
    yield "average", lambda: AverageMethod(AverageOptions())
    yield "task-arithmetic", lambda: TaskArithmeticMethod(0.4)
    yield "ties", lambda: TiesMethod(TiesOptions())
    yield "ties by tensor", lambda: TiesMethod(TiesOptions(trim_scope="tensor"))
    yield "dare", lambda: DareMethod(DareOptions(), 3)
    yield "dare-ties", lambda: DareMethod(DareOptions(merge="ties"), 3)
    yield "consensus", lambda: ConsensusMethod(ConsensusOptions())
    yield "consensus of ties", lambda: ConsensusMethod(ConsensusOptions(merge="ties"))
    yield "emr", EmrMethod
    yield "one-bit", OneBitMethod


@pytest.mark.parametrize(("name", "make"), every_method())
def test_tiles_and_order_do_not_count(family: Family, name: str, make: Any) -> None:
    base, refs = family
    found: list[dict[str, torch.Tensor]] = []
    for rows, order in ((None, refs), (1, refs), (7, dict(reversed(refs.items())))):
        experts = open_tiny(base, order, rows=rows)
        method = begun(make(), experts)
        mine: dict[str, list[torch.Tensor]] = {}
        for piece in experts.pieces():
            values = [method.expert(piece, index) for index in range(3)]
            if method.merges:
                values.append(method.merge(piece))
            mine.setdefault(piece.name, []).append(torch.stack(values))
        found.append({key: torch.cat(parts, 1) for key, parts in mine.items()})
    for other in found[1:]:
        for key, value in found[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize(("name", "make"), every_method())
def test_experts_that_changed_nothing_add_nothing(family: Family, name: str, make: Any) -> None:
    base, _ = family
    experts = open_tiny(base, {"x": str(base), "y": str(base)})
    method = begun(make(), experts)
    for piece in experts.pieces():
        assert not method.expert(piece, 1).any()
        if method.merges:
            assert not method.merge(piece).any()


EXACT: dict[str, Any] = {
    "average": lambda: AverageMethod(AverageOptions()),
    "task-arithmetic": lambda: TaskArithmeticMethod(1.0),
    "ties": lambda: TiesMethod(TiesOptions(keep=1)),
    "tall": lambda: ConsensusMethod(ConsensusOptions()),
    "emr": EmrMethod,
}


@pytest.mark.parametrize("name", EXACT)
def test_one_expert_is_exact(family: Family, name: str) -> None:
    base, refs = family
    experts = open_tiny(base, {"a": refs["a"]})
    method = begun(EXACT[name](), experts)
    for piece in experts.pieces():
        assert torch.equal(method.expert(piece, 0), piece.deltas[0])


def test_references(experts: Experts) -> None:
    for piece in experts.pieces():
        assert not UnmergedMethod("base").expert(piece, 1).any()
        assert torch.equal(UnmergedMethod("expert").expert(piece, 1), piece.deltas[1])


def test_storage(experts: Experts) -> None:
    """As counted in bytes per weight: N models 4 N in float32, a mask 1/8, and so on."""
    bits = {
        "average": AverageMethod(AverageOptions()).bits_per_weight(experts),
        "tall": ConsensusMethod(ConsensusOptions()).bits_per_weight(experts),
        "emr": EmrMethod().bits_per_weight(experts),
        "one-bit": OneBitMethod().bits_per_weight(experts),
        "base": UnmergedMethod("base").bits_per_weight(experts),
        "experts": UnmergedMethod("expert").bits_per_weight(experts),
    }
    assert bits == {"average": 32, "tall": 67, "emr": 67, "one-bit": 35, "base": 32, "experts": 96}
    with pytest.raises(UserError, match="expert 'a' is a whole model; this keeps LoRA adapters"):
        KeptLoraMethod().check(experts)
