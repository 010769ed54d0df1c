"""The merge and its masks on tiny models: what is exact is exact, and nothing depends on how rows are cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.merge.masks import unpack
from graftwork.merge.stored import read_masks
from graftwork.merge.trim import Trim
from graftwork.testing.experts import merge_tiny, open_tiny, save_tiny, tensors_of, tiny_experts
from graftwork.testing.models import tiny_model
from graftwork.transform.beside import read_beside
from graftwork_mmer import Artefact, MmerMethod, MmerOptions

Family = tuple[Path, dict[str, str]]
QUIET = Console(enabled=False)


def method(**options: Any) -> MmerMethod:
    return MmerMethod(MmerOptions.model_validate(options))


def merged_names(base: Path) -> list[str]:
    return [name for name in tensors_of(base) if "embed" not in name and "lm_head" not in name]


def changed(base: Path, folder: Path, changes: dict[str, Any]) -> str:
    """Write the base with some changes (name: function of the tensor)."""
    model = tiny_model("llama", dtype=next(iter(tensors_of(base).values())).dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name].copy_(change(parameters[name]))
    return str(save_tiny(model, folder))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))
    }


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("copies", [1, 3])
def test_one_expert_comes_back_bitwise(family: Family, tmp_path: Path, copies: int) -> None:
    base, refs = family
    same = {f"copy{number}": refs["a"] for number in range(copies)}
    merge_tiny(base, same, method(keep=1), tmp_path, expand="copy0")
    found, own = tensors_of(tmp_path / "model"), tensors_of(Path(refs["a"]))
    for name in merged_names(base):
        assert torch.equal(found[name], own[name])


def test_one_expert_in_half_precision(half_family: Family, tmp_path: Path) -> None:
    """Exact with u in float32; with u in bfloat16 wherever the difference is no larger than the weight."""
    base, refs = half_family
    before, own = tensors_of(base), tensors_of(Path(refs["a"]))
    for store in ("float32", "model"):
        merge_tiny(base, {"a": refs["a"]}, method(keep=1, store=store), tmp_path / store, expand="a")
        found = tensors_of(tmp_path / store / "model")
        for name in merged_names(base):
            equal = found[name] == own[name]
            small = (own[name].float() - before[name].float()).abs() <= own[name].float().abs()
            assert bool((equal if store == "float32" else equal | ~small).all()), (store, name)


@pytest.mark.parametrize("lam", [0.2, 1.0, 3.0])
def test_disjoint_experts_come_back_bitwise(family: Family, tmp_path: Path, lam: float) -> None:
    base, _ = family
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"
    refs = {
        "a": changed(base, tmp_path / "a", {one: lambda w: w + 0.01 * torch.randn(w.shape)}),
        "b": changed(base, tmp_path / "b", {other: lambda w: w * 1.5}),
    }
    for name, ref in refs.items():
        merge_tiny(base, refs, method(keep=1, lam=lam), tmp_path / f"out-{name}", expand=name)
        found, own = tensors_of(tmp_path / f"out-{name}/model"), tensors_of(Path(ref))
        assert all(torch.equal(found[key], own[key]) for key in own)
    masks = read_masks(tmp_path / "out-a/beside/mask.b")
    assert not bool(masks[one].words.any())
    assert bool(masks[other].words.any())


def test_two_experts_of_which_one_is_the_base(family: Family, tmp_path: Path) -> None:
    base, refs = family
    merge_tiny(base, {"a": refs["a"], "none": str(base)}, method(keep=1, lam=1), tmp_path / "a", expand="a")
    found, own = tensors_of(tmp_path / "a/model"), tensors_of(Path(refs["a"]))
    assert all(torch.equal(found[name], own[name]) for name in merged_names(base))


def test_small_lam_keeps_all_of_the_merge(family: Family, tmp_path: Path) -> None:
    """With all entries kept and lam to 0, the expert's model is plain TIES where the expert has moved."""
    base, refs = family
    merge_tiny(base, refs, method(keep=1, lam=1e-9), tmp_path / "a", expand="a")
    merge_tiny(base, refs, method(keep=1), tmp_path / "all")
    found, plain = tensors_of(tmp_path / "a/model"), tensors_of(tmp_path / "all/model")
    own, before = tensors_of(Path(refs["a"])), tensors_of(base)
    for name in merged_names(base):
        moved = own[name] != before[name]
        assert bool((found[name] == plain[name])[moved].all())


# ---------------------------------------------------------------------- the same whatever way it is computed


@pytest.mark.parametrize(
    ("options", "rows"), [({"keep": 0.3}, 1), ({"keep": 1, "scale": "l2"}, 7), ({"scale": "l1"}, 7)]
)
def test_rows_threads_and_order_change_no_byte(
    family: Family, tmp_path: Path, options: dict[str, Any], rows: int
) -> None:
    base, refs = family
    merge_tiny(base, refs, method(**options), tmp_path / "whole")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        turned = dict(reversed(refs.items()))
        merge_tiny(base, turned, method(**options), tmp_path / "cut", rows=rows)
    finally:
        torch.set_num_threads(threads)
    for part in ("model", "beside"):
        assert files(tmp_path / "cut" / part) == files(tmp_path / "whole" / part)
    manifests = [
        json.loads((tmp_path / run / "beside/manifest.json").read_text()) for run in ("whole", "cut")
    ]
    assert manifests[0] == manifests[1]


def test_names_permute_masks_and_leave_the_merge(family: Family, tmp_path: Path) -> None:
    """Sums over experts are taken in the order of their names, in float64: exact here."""
    base, refs = family
    merge_tiny(base, refs, method(), tmp_path / "one")
    turned = {"a": refs["b"], "b": refs["a"], "c": refs["c"]}
    merge_tiny(base, turned, method(), tmp_path / "other")
    one, other = tmp_path / "one/beside", tmp_path / "other/beside"
    assert files(one / "merged") == files(other / "merged")
    words = [read_masks(one / "mask.a"), read_masks(other / "mask.b")]
    assert all(torch.equal(words[0][name].words, words[1][name].words) for name in words[0])


def test_scaling_all_experts_scales_the_merge(tmp_path: Path) -> None:
    base = tiny_model("llama")
    noise = {n: torch.randn(p.shape) for n, p in base.named_parameters()}
    found = []
    for factor in (1.0, 4.0):
        folder = tmp_path / f"x{factor}"
        zero = tiny_model("llama")
        with torch.no_grad():
            for parameter in zero.parameters():
                parameter.zero_()
        root = save_tiny(zero, folder / "base")
        refs = {}
        for number, name in enumerate("ab"):
            model = tiny_model("llama")
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(factor * noise[key].roll(number, -1))
            refs[name] = str(save_tiny(model, folder / name))
        found.append(Artefact.of(method(keep=0.5), open_tiny(root, refs)))
    one, four = found
    for name, merged in one.merged.items():
        assert torch.equal(4 * merged, four.merged[name])
        for expert in ("a", "b"):
            assert torch.equal(one.masks[expert][name].words, four.masks[expert][name].words)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_exactly_the_largest_entries_are_kept(family: Family, scope: Any) -> None:
    experts = open_tiny(*family, rows=5)
    trim = Trim(0.13, scope)
    trim.begin(experts, QUIET)
    kept: dict[str, list[torch.Tensor]] = {}
    plain: dict[str, list[torch.Tensor]] = {}
    for piece in experts.pieces():
        kept.setdefault(piece.name, []).append(trim(piece).flatten(1))
        plain.setdefault(piece.name, []).append(piece.deltas.flatten(1))
    groups = list(experts.shapes) if scope == "tensor" else [None]
    for group in groups:
        names = experts.shapes if group is None else [group]
        mine, all_ = (
            torch.cat([torch.cat(found[name], 1) for name in names], 1).numpy() for found in (kept, plain)
        )
        keep = math.ceil(0.13 * all_.shape[1])
        for one, other in zip(mine, all_, strict=True):
            threshold = -np.partition(-np.abs(other), keep - 1)[keep - 1]
            assert np.count_nonzero(one) == keep
            assert np.abs(one[one != 0]).min() == threshold


# ---------------------------------------------------------------------- what is stored


def test_stored_masks_are_those_of_the_stored_merge(half_family: Family, tmp_path: Path) -> None:
    """Density is the number of bits, padding is 0, and bits are right for u as rounded."""
    base, refs = half_family
    outcome = merge_tiny(base, refs, MmerMethod(MmerOptions(keep=0.4, lam=1), ["a"]), tmp_path)
    merged = read_beside(tmp_path / "beside/merged")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    masks = read_masks(tmp_path / "beside/mask.a")
    before, own = tensors_of(base), tensors_of(Path(refs["a"]))
    for name, bits in masks.items():
        delta = (own[name].float() - before[name].float()).view(-1, bits.columns)
        u = merged[name].float().view(-1, bits.columns)
        mask = unpack(bits.words, bits.columns)
        assert torch.equal(mask, (delta.abs() > (u - delta).abs()) & (u != 0))
        ones = sum(bin(word & 0xFFFFFFFF).count("1") for word in bits.words.flatten().tolist())
        assert ones == int(mask.sum())
    assert outcome.layers
    layer = [name for name in masks if name.startswith("model.layers.0.")]
    counted = [unpack(masks[name].words, masks[name].columns) for name in layer]
    density = sum(int(one.sum()) for one in counted) / sum(one.numel() for one in counted)
    assert outcome.layers[0].linears[""]["density_a"] == pytest.approx(density)


def test_an_artefact_in_memory_is_the_one_on_disk(family: Family, tmp_path: Path) -> None:
    merge_tiny(*family, method(scale="l2"), tmp_path)
    about = json.loads((tmp_path / "beside/manifest.json").read_text())
    about["transforms"] = {"mmer": about["transforms"]["tiny-merge"]}
    (tmp_path / "beside/manifest.json").write_text(json.dumps(about))
    read = Artefact.read(tmp_path)
    made = Artefact.of(method(scale="l2"), open_tiny(*family))
    assert (read.experts, read.scales, read.base_sha256) == (made.experts, made.scales, made.base_sha256)
    assert read.scales["a"] != 1
    for name, merged in made.merged.items():
        assert torch.equal(read.merged[name], merged)
        for expert in made.experts:
            assert torch.equal(read.kept(expert, name), made.kept(expert, name))


def test_bits_per_weight(half_family: Family) -> None:
    experts = open_tiny(*half_family)
    assert method().bits_per_weight(experts) == 32 + 3
    assert method(store="float32").bits_per_weight(experts) == 48 + 3


def test_masks_come_nearer_than_the_merge(family: Family) -> None:
    experts = open_tiny(*family)
    mine = method(keep=1, lam=1)
    mine.begin(experts, QUIET)
    for piece in experts.pieces():
        for index, delta in enumerate(piece.deltas):
            missed = (mine.expert(piece, index) - delta).abs().sum()
            assert missed <= min(delta.abs().sum(), (mine.merge(piece) - delta).abs().sum())


def test_a_threshold_per_expert(family: Family) -> None:
    experts = open_tiny(*family)
    mine = method(lam={"a": 3.0, "b": 0.2, "c": 0.2})
    mine.begin(experts, QUIET)
    piece = next(experts.pieces())
    one = method(lam=3.0)
    one.begin(experts, QUIET)
    assert torch.equal(mine.mask(piece, 0), one.mask(piece, 0))
    assert not torch.equal(mine.mask(piece, 1), one.mask(piece, 1))
    with pytest.raises(UserError, match="lam is for a, and the experts are a, b, c"):
        method(lam={"a": 1.0}).begin(experts, QUIET)
    with pytest.raises(UserError, match="lam is for a, b, c, d"):
        method(lam=dict.fromkeys("abcd", 1.0)).begin(experts, QUIET)


def test_new_tasks_keep_what_is_there(tmp_path: Path) -> None:
    """A fourth expert is one more mask; the others still come nearer to their own than the merge does."""
    base, refs = tiny_experts(tmp_path, list("abcd"))
    experts = open_tiny(base, refs)
    artefact = Artefact.of(method(keep=1), experts)
    assert artefact.experts == ("a", "b", "c", "d")
    for piece in experts.pieces():
        u = artefact.merged[piece.name][piece.rows].float()
        for index, name in enumerate(artefact.experts):
            kept = artefact.kept(name, piece.name, piece.rows)
            assert (kept - piece.deltas[index]).abs().sum() < (u - piece.deltas[index]).abs().sum()
