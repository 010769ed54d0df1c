"""A merge as a transform: exact where it can be, alike for all tiles and orders, and the same bytes after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.hookspecs import WeightTransform
from graftwork.merge.masks import unpack
from graftwork.merge.stored import read_masks
from graftwork.models import load_model
from graftwork.testing.experts import merge_tiny, open_tiny, save_tiny, tensors_of, tiny_experts
from graftwork.testing.models import tiny_model
from graftwork.transform.beside import read_beside
from graftwork.transform.engine import Texts
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import WeightScheme
from merge_methods import Mean, Own, Trimmed

Family = tuple[Path, dict[str, str]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["llama", "qwen2", "gpt2"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, but: tuple[str, ...] = ()) -> None:
    """Equal to the last bit, signs of zeros included."""
    names = {name for name in other if not name.endswith(but)}
    assert names <= set(one)
    for name in names:
        assert one[name].dtype == other[name].dtype
        assert one[name].contiguous().view(torch.uint8).equal(other[name].contiguous().view(torch.uint8)), (
            name
        )


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))
    }


# ---------------------------------------------------------------------- exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_comes_out_byte_for_byte(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base, refs = tiny_experts(tmp_path, ["a"], kind=kind, dtype=dtype)
    merge_tiny(base, refs, Mean(), tmp_path / "out", embeddings="merge")
    same(tensors_of(tmp_path / "out/model"), tensors_of(tmp_path / "a"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_added_leaves_the_bytes_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base, refs = tiny_experts(tmp_path, ["a", "b"], dtype=dtype)
    model = load_model(str(base))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :4] = -0.0
    save_tiny(model, base)
    merge_tiny(base, refs, Mean(alpha=0), tmp_path / "zero", embeddings="merge")
    same(tensors_of(tmp_path / "zero/model"), tensors_of(base))
    merge_tiny(base, {"x": str(base), "y": str(base)}, Trimmed(), tmp_path / "base")
    same(tensors_of(tmp_path / "base/model"), tensors_of(base))


def test_sums_of_very_different_size_are_still_exact(tmp_path: Path) -> None:
    base, refs = tiny_experts(tmp_path, ["a"], dtype=torch.bfloat16)
    expert = load_model(refs["a"])
    with torch.no_grad():
        for layer in expert.model.layers:
            layer.mlp.up_proj.weight.mul_(1e-12)
    save_tiny(expert, tmp_path / "a")
    merge_tiny(base, refs, Mean(), tmp_path / "out", embeddings="merge")
    same(tensors_of(tmp_path / "out/model"), tensors_of(tmp_path / "a"))


def test_experts_that_change_different_entries_all_keep_theirs(tmp_path: Path) -> None:
    base, _ = tiny_experts(tmp_path, [])
    whole = tensors_of(base)
    refs = {}
    for number in range(3):
        model = load_model(str(base))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.view(-1)[number::3] += 0.01
        refs[f"e{number}"] = str(save_tiny(model, tmp_path / f"e{number}"))
    merge_tiny(base, refs, Trimmed(), tmp_path / "out", expand="e1")
    found, own = tensors_of(tmp_path / "out/model"), tensors_of(tmp_path / "e1")
    name = "model.layers.0.self_attn.q_proj.weight"
    # Half of all entries are kept: more than the third that is not zero.
    assert torch.equal(found[name], own[name])
    assert torch.equal(found["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


def test_the_mean_is_that_of_float64(family: Family, tmp_path: Path) -> None:
    base, refs = family
    merge_tiny(base, refs, Mean(), tmp_path / "out", embeddings="merge")
    theta = {name: tensor.double() for name, tensor in tensors_of(base).items()}
    experts = [tensors_of(Path(ref)) for ref in refs.values()]
    for name, found in tensors_of(tmp_path / "out/model").items():
        mean = sum(expert[name].double() for expert in experts) / len(experts)
        torch.testing.assert_close(found.double(), mean, rtol=0, atol=2e-7 * float(theta[name].abs().max()))


# ---------------------------------------------------------------------- alike


def test_order_in_the_config_does_not_count(family: Family, tmp_path: Path) -> None:
    base, refs = family
    merge_tiny(base, refs, Trimmed(), tmp_path / "one")
    merge_tiny(base, dict(reversed(refs.items())), Trimmed(), tmp_path / "other")
    assert files(tmp_path / "one/model") == files(tmp_path / "other/model")
    assert files(tmp_path / "one/beside") == files(tmp_path / "other/beside")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_do_not_count(tmp_path: Path, dtype: torch.dtype) -> None:
    base, refs = tiny_experts(tmp_path, dtype=dtype)
    for rows in (None, 1, 7):
        merge_tiny(base, refs, Trimmed(), tmp_path / f"out-{rows}", rows=rows, embeddings="merge")
    whole = files(tmp_path / "out-None")
    for rows in (1, 7):
        assert files(tmp_path / f"out-{rows}") == whole


def test_a_run_that_was_cut_off_gives_the_same_bytes(family: Family, tmp_path: Path) -> None:
    base, refs = family
    merge_tiny(base, refs, Trimmed(), tmp_path / "whole")

    def cut(block: Any) -> None:
        if block.index == 1:
            raise KeyboardInterrupt

    after = WeightTransform("cut", cut, needs="none")
    with pytest.raises(KeyboardInterrupt):
        merge_tiny(base, refs, Trimmed(), tmp_path / "cut", after=[after])
    assert not (tmp_path / "cut/model").exists()
    assert not (tmp_path / "cut/beside").exists()
    merge_tiny(base, refs, Trimmed(), tmp_path / "cut")
    assert files(tmp_path / "cut/model") == files(tmp_path / "whole/model")
    assert files(tmp_path / "cut/beside") == files(tmp_path / "whole/beside")


# ---------------------------------------------------------------------- beside the model


def test_what_is_stored_makes_the_model_of_an_expert(family: Family, tmp_path: Path) -> None:
    base, refs = family
    method = Trimmed()
    merge_tiny(base, refs, method, tmp_path / "out")
    experts = open_tiny(base, refs)
    merged = read_beside(tmp_path / "out/beside/merged")
    masks = read_masks(tmp_path / "out/beside/mask.b", base_sha256=experts.base_digest)
    assert set(merged) == set(masks) == set(experts.shapes)
    for piece in experts.pieces():
        bits = masks[piece.name]
        assert torch.equal(unpack(bits.words, bits.columns), method.mask(piece, 1))
        assert torch.equal(merged[piece.name].view_as(piece.base), method.merge(piece))
    assert merged["model.norm.weight"].shape == (32,)
    manifest = json.loads((tmp_path / "out/beside/manifest.json").read_text())
    assert set(manifest["labels"]) == {"merged", "mask.a", "mask.b", "mask.c"}
    about = manifest["transforms"]["tiny-merge"]
    assert about["base"]["sha256"] == experts.base_digest
    assert list(about["experts"]) == ["a", "b", "c"]
    with pytest.raises(UserError, match="masks for another base"):
        read_masks(tmp_path / "out/beside/mask.b", base_sha256="0" * 64)
    with pytest.raises(UserError, match="no masks of the format"):
        read_masks(tmp_path / "out/beside/merged")


def test_nothing_stored_makes_no_folder(family: Family, tmp_path: Path) -> None:
    merge_tiny(*family, Mean(), tmp_path / "out")
    assert not (tmp_path / "out/beside").exists()


def test_figures_of_a_layer(family: Family, tmp_path: Path) -> None:
    base, refs = family
    outcome = merge_tiny(base, refs, Trimmed(), tmp_path / "out")
    theta, expert = tensors_of(base), tensors_of(Path(refs["b"]))
    for layer in outcome.layers:
        names = [name for name in theta if name.startswith(f"{layer.name}.")]
        moved = sum((expert[name] - theta[name]).double().square().sum() for name in names)
        size = sum(theta[name].double().square().sum() for name in names)
        record = layer.linears[""]
        assert record["change_b"] == pytest.approx((moved / size).sqrt().item(), rel=1e-6)
        assert 0.3 < record["kept"] < 1


# ---------------------------------------------------------------------- with what else a transform does


def test_the_merged_model_is_scored_and_compressed_in_the_same_pass(family: Family, tmp_path: Path) -> None:
    """Merging and rounding at once is rounding what merging wrote."""
    base, refs = family
    scheme = WeightScheme(bits=4, group=16)

    def rounded(block: Any) -> None:
        for name, module in block.linears().items():
            block.round(name, quantize_weight(module.weight, scheme, name))

    texts = Texts(None, torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(3)))
    rtn = WeightTransform("rounded", rounded, needs="none")
    both = merge_tiny(base, refs, Mean(), tmp_path / "both", after=[rtn], texts=texts)
    merge_tiny(base, refs, Mean(), tmp_path / "merged")
    found, merged = tensors_of(tmp_path / "both/model"), tensors_of(tmp_path / "merged/model")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = merged[name]
    expected = quantize_weight(weight, scheme, name).dequantized().view_as(weight)
    assert torch.equal(found[name], expected.to(weight.dtype))
    assert torch.equal(found["model.norm.weight"], merged["model.norm.weight"])
    model = load_model(str(tmp_path / "both/model"))
    with torch.no_grad():
        logits = model(texts.evaluation).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits[0], texts.evaluation[0, 1:]).item()
    assert both.nll[0] == pytest.approx(nll, abs=1e-5)
    assert both.nll != both.dense_nll


def test_another_precision_than_the_files(family: Family, tmp_path: Path) -> None:
    """Differences are taken of what is stored; only the result is rounded."""
    from graftwork.merge.experts import Experts
    from graftwork.merge.options import MergeOptions
    from graftwork.merge.transform import applied
    from graftwork.transform.source import CheckpointSource

    base, refs = family
    source = CheckpointSource(str(base), dtype="bfloat16")
    experts = Experts(refs, source, MergeOptions.model_validate({}))
    name = "model.layers.0.mlp.up_proj.weight"
    piece, stored = experts.read(name, slice(0, 4))
    found = applied(piece, stored, piece.deltas[0], piece.base.bfloat16())
    assert torch.equal(found, tensors_of(Path(refs["a"]))[name][:4].bfloat16())


def test_experts_by_themselves(family: Family, tmp_path: Path) -> None:
    base, refs = family
    merge_tiny(base, refs, Own(), tmp_path / "out", expand="c", embeddings="merge")
    same(tensors_of(tmp_path / "out/model"), tensors_of(Path(refs["c"])))


def test_models_that_are_not_there_are_refused(family: Family, tmp_path: Path) -> None:
    base, refs = family
    with pytest.raises(UserError, match=r"no single model .*\(expand: a or b or c\)"):
        merge_tiny(base, refs, Own(), tmp_path / "out")
    with pytest.raises(UserError, match=r"for expert 'bb' \(did you mean 'b'"):
        merge_tiny(base, refs, Own(), tmp_path / "out", expand="bb")
    with pytest.raises(UserError, match="one model that serves all experts"):
        merge_tiny(base, refs, Mean(), tmp_path / "out", expand="b")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_are_merged_once(tmp_path: Path) -> None:
    base, refs = tiny_experts(tmp_path, ["a"], tie_word_embeddings=True)
    merge_tiny(base, refs, Mean(), tmp_path / "out", embeddings="merge")
    found = tensors_of(tmp_path / "out/model")
    assert "lm_head.weight" not in found
    same(found, tensors_of(tmp_path / "a"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours = load_model(str(tmp_path / "out/model"))(ids).logits
        assert torch.equal(ours, load_model(refs["a"])(ids).logits)


def test_a_base_in_several_files(tmp_path: Path) -> None:
    base, refs = tiny_experts(tmp_path, ["a", "b"])
    load_model(str(base)).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for path in base.glob("tokenizer*"):
        (tmp_path / "shards" / path.name).write_bytes(path.read_bytes())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    merge_tiny(base, refs, Trimmed(), tmp_path / "one")
    merge_tiny(tmp_path / "shards", refs, Trimmed(), tmp_path / "many")
    assert files(tmp_path / "one/model") == files(tmp_path / "many/model")
    assert tiny_model().config.vocab_size == 259
