"""Edit sets: applied, taken back bit for bit, kept in files, composed, cut, exported; and drafts, which make them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.edit.draft import Draft, checked, gain_note
from graftwork.edit.edits import Change, EditSet
from graftwork.edit.errors import UnsafeEditError
from graftwork.edit.lora import to_lora
from graftwork.edit.sites import find_sites
from graftwork.testing.editing import REQUESTS, corpus, editable_model, same_bits, weights


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=corpus()[:2]).logits


def drawn(model: Any, seed: int, name: str, size: float = 0.01, layers: tuple[int, ...] = (0, 2)) -> EditSet:
    """Return an edit set of random changes."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model, layers=layers)
    with Draft(model, sites) as draft:
        for site in sites:
            left = torch.randn(site.h, 2, generator=generator) * size
            draft.write(site, Change(left, torch.randn(site.d, 2, generator=generator)))
        return draft.edit_set(name, "drawn", REQUESTS, {})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_applied_is_taken_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model = editable_model(kind, dtype=dtype)
    before, plain = weights(model), logits(model)
    edits = drawn(model, 1, "one", 0.02)
    assert same_bits(model, before)
    with edits.apply(model) as applied:
        assert not same_bits(model, before)
        assert not torch.equal(logits(model), plain)
        with pytest.raises(UserError, match="holds other weights"):
            edits.apply(model)
    assert same_bits(model, before)
    applied.undo()
    with pytest.raises(RuntimeError, match="midway"), edits.apply(model):
        raise RuntimeError("midway")
    assert same_bits(model, before)
    kept = edits.apply(model)
    kept.commit()
    kept.undo()
    assert not same_bits(model, before)


def test_factors_undo_within_rounding(model: Any) -> None:
    before = weights(model)
    edits = drawn(model, 1, "one")
    edits.apply(model).commit()
    minus = EditSet(
        {name: Change(-one.left, one.right) for name, one in edits.changes.items()},
        [dataclasses.replace(edits.parts[0], base=edits.parts[0].after)],
    )
    minus.apply(model).commit()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


def test_a_change_of_zero_keeps_every_bit(model: Any) -> None:
    site = find_sites(model, ["mlp"], [1])[0]
    with torch.no_grad():
        site.matrix[0, :4] = -0.0
    before = weights(model)
    with Draft(model, [site]) as draft:
        draft.write(site, Change(torch.zeros(site.h, 2), torch.ones(site.d, 2)))
        edits = draft.edit_set("zero", "zero", REQUESTS, {})
    with edits.apply(model):
        assert same_bits(model, before)


def test_a_file_gives_back_the_same_set(tmp_path: Path, made: EditSet, model: Any) -> None:
    path = made.save(tmp_path / "edits.safetensors")
    found = EditSet.load(path)
    assert found.to_bytes() == made.to_bytes()
    assert list(found.requests) == [one.record() for one in REQUESTS]
    with made.apply(model):
        wanted = weights(model)
    with found.apply(model):
        assert same_bits(model, wanted)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        EditSet.load(path)
    with pytest.raises(UserError, match="does not exist"):
        EditSet.load(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is no edit set"):
        EditSet.load(path)


def test_sets_add_up_and_come_apart(model: Any) -> None:
    one, two = drawn(model, 1, "one"), drawn(model, 2, "two", layers=(2, 3))
    both = one + two
    with one.apply(model):
        only_one = weights(model)
    with two.apply(model):
        only_two = weights(model)
    with both.apply(model):
        together = weights(model)
    with (two + one).apply(model):
        # Sums of four columns in another order, rounded once.
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, together[name], atol=1e-6, rtol=0)
    with both.without("two").apply(model):
        assert same_bits(model, only_one)
    with both.without("one").apply(model):
        assert same_bits(model, only_two)
    assert both.without("one").without("two").changes == {}
    with pytest.raises(UserError, match="no part 'three'; it has: one, two"):
        both.without("three")
    with pytest.raises(UserError, match="both edit sets have a part 'one'"):
        _ = one + one
    assert [part.name for part in (one + one.renamed("again")).parts] == ["one", "again"]


def test_three_parts_keep_their_columns(model: Any) -> None:
    sets = [drawn(model, seed, f"s{seed}") for seed in (1, 2, 3)]
    both = (sets[0] + sets[1] + sets[2]).without("s2")
    torch.testing.assert_close(
        both.changes["model.layers.2.mlp.down_proj"].dense(),
        sum(sets[i].changes["model.layers.2.mlp.down_proj"].dense() for i in (0, 2)),
    )
    start, stop = both.parts[1].columns["model.layers.2.mlp.down_proj"]
    name = "model.layers.2.mlp.down_proj"
    torch.testing.assert_close(both.changes[name].columns(start, stop).dense(), sets[2].changes[name].dense())


def test_a_set_of_an_edited_model_follows_the_first(model: Any) -> None:
    one = drawn(model, 1, "one")
    with one.apply(model):
        later = drawn(model, 2, "later")
        with later.apply(model):
            wanted = weights(model)
    with pytest.raises(UserError, match="holds other weights"):
        later.apply(model)
    with (one + later).apply(model):
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=0)
    other = drawn(editable_model(seed=5), 3, "other")
    with pytest.raises(UserError, match="do not fit together"):
        _ = one + other


def test_sets_are_refused_by_models_they_were_not_made_for(made: EditSet) -> None:
    with pytest.raises(UserError, match="holds other weights than the edit set was made for"):
        made.apply(editable_model(seed=1))
    with pytest.raises(UserError, match=r"is 32 x 40, and the edit set was made for 32 x 48"):
        made.apply(editable_model(intermediate_size=40))
    with pytest.raises(UserError, match="has no module"):
        made.apply(editable_model("gpt2"))
    other = editable_model(seed=1)
    before = weights(other)
    with made.apply(other, check=False):
        assert not same_bits(other, before)


def test_unsafe_edits_are_refused_before_anything_is_written(model: Any) -> None:
    site = find_sites(model, ["mlp"], [1])[0]
    before = weights(model)
    right = torch.ones(site.d, 1)
    with Draft(model, [site]) as draft:
        with pytest.raises(UnsafeEditError, match="is no number"):
            draft.write(site, Change(torch.full((site.h, 1), torch.nan), right))
        with pytest.raises(
            UnsafeEditError, match=r"times the size of the weight itself, and at most 0\.5 is safe"
        ):
            draft.write(site, Change(torch.full((site.h, 1), 10.0), right))
        assert same_bits(model, before)
        # Two halves of too much are too much together.
        size = 0.3 * float(site.matrix.norm()) / float(right.norm()) / site.h**0.5
        draft.write(site, Change(torch.full((site.h, 1), size), right))
        with pytest.raises(UnsafeEditError, match=r"0\.60 times"):
            draft.write(site, Change(torch.full((site.h, 1), size), right))
    assert same_bits(model, before)
    with pytest.raises(UnsafeEditError, match=r"overflows torch\.float16"):
        checked("w", torch.full((1, 1), 6e4, dtype=torch.float16), Change.of_dense(torch.full((1, 1), 2e4)))


def test_what_the_dtype_swallows_is_told() -> None:
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    delta = torch.tensor([[0.1, 0.0], [1e-4, 0.0]])
    new, figures = checked("w", weight, Change.of_dense(delta))
    assert figures["lost"] == 0.5
    assert figures["share"] == pytest.approx(0.05, rel=1e-4)
    assert new.tolist() == [[pytest.approx(1.1, abs=4e-3), 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_dense_change_loses_nothing_in_factors(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Change.of_dense(delta).dense().float(), delta)


def test_small_gains_are_told(made: EditSet) -> None:
    assert gain_note(made) is None
    (part,) = made.parts
    site = next(iter(part.report["sites"]))
    low = dataclasses.replace(part, report={"sites": {site: {"gain": 0.2}}})
    assert "0.20" in str(gain_note(EditSet(made.changes, [low])))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_gives_the_edited_models_logits(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    model = editable_model(kind)
    edits = drawn(model, 1, "one", layers=(1, 2)) + drawn(model, 2, "two", layers=(2,))
    folder = to_lora(edits, tmp_path / "adapter", model, "base")
    with edits.apply(model):
        wanted = logits(model)
    plain = logits(model)
    adapted = PeftModel.from_pretrained(model, folder).eval()
    torch.testing.assert_close(logits(adapted), wanted, atol=1e-4, rtol=0)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), plain, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="exists already"):
        to_lora(edits, folder, editable_model(kind), "base")
    with pytest.raises(UserError, match="changes nothing"):
        to_lora(EditSet({}, []), tmp_path / "none", model, "base")
