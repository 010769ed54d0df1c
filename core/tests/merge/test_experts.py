"""Experts that do not fit are refused with one sentence before anything is written; odd ones are told with figures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.console import Console
from graftwork.models import load_model
from graftwork.testing.experts import merge_tiny, open_tiny, save_tiny, tensors_of, tiny_experts
from graftwork.testing.models import tiny_model
from merge_methods import Mean, Trimmed
from safetensors.torch import save_file

Family = tuple[Path, dict[str, str]]
QUIET = Console(enabled=False)


@pytest.fixture
def changed(family: Family, tmp_path: Path) -> Callable[..., str]:
    """Return a copy of expert a whose tensors and config were changed."""

    def make(
        change: Callable[[dict[str, torch.Tensor]], Any] | None = None, name: str = "x", **config: Any
    ) -> str:
        folder = tmp_path / name
        shutil.copytree(family[1]["a"], folder)
        tensors = tensors_of(folder)
        if change is not None:
            change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return str(folder)

    return make


NAME = "model.layers.1.mlp.up_proj.weight"
BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any] | None, dict[str, Any], str]] = {
    "shape": (
        lambda t: t.update({NAME: torch.zeros(50, 32)}),
        {},
        rf"expert 'x': tensor '{NAME}' has shape \(50, 32\), and the base's has \(48, 32\)",
    ),
    "missing": (
        lambda t: t.pop(NAME),
        {},
        rf"expert 'x' lacks 1 tensors that the base has: '{NAME}'.*missing=base",
    ),
    "extra": (
        lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}),
        {},
        r"has 1 tensors that the base lacks: 'model\.layers\.9\.mlp\.up_proj\.weight'; .*extra=ignore",
    ),
    "vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(300, 32)}),
        {},
        r"another vocabulary than the base: 300 tokens, the base 259; .*vocab=crop",
    ),
    "smaller vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(200, 32)}),
        {},
        r"another vocabulary than the base: 200 tokens, the base 259$",
    ),
    "integers": (
        lambda t: t.update({NAME: torch.zeros(48, 32, dtype=torch.int8)}),
        {},
        rf"tensor '{NAME}' is I8; what is rounded already",
    ),
    "quantised": (None, {"quantization_config": {"quant_method": "gptq"}}, "expert 'x' is quantised"),
    "tied": (
        None,
        {"tie_word_embeddings": True},
        "a head that is tied to its embeddings and the base a head of",
    ),
    "heads": (None, {"num_attention_heads": 8}, "its num_attention_heads is 8, the base's 4"),
    "kind": (None, {"model_type": "mistral"}, "its model_type is mistral, the base's llama"),
}


@pytest.mark.parametrize("kind", BAD)
def test_experts_that_do_not_fit(
    family: Family, changed: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    change, config, sentence = BAD[kind]
    with pytest.raises(UserError, match=sentence):
        merge_tiny(family[0], {"x": changed(change, **config)}, Mean(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers(
    family: Family, changed: Callable[..., str], tmp_path: Path, value: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME][3, 4] = value

    with pytest.raises(
        UserError, match=f"expert 'x': tensor '{re.escape(NAME)}' holds values that are no numbers"
    ):
        merge_tiny(family[0], {"x": changed(spoil)}, Trimmed(), tmp_path / "out")
    assert not (tmp_path / "out/model").exists()


def test_named_ways_out(family: Family, changed: Callable[..., str]) -> None:
    base, _ = family
    lacking = open_tiny(base, {"x": changed(BAD["missing"][0], "lacking")}, missing="base")
    piece, stored = lacking.read(NAME, slice(0, 48))
    assert not piece.deltas.any()
    assert stored == [None]
    more = open_tiny(base, {"x": changed(BAD["extra"][0], "more")}, extra="ignore")
    assert more.notes[0] == "expert 'x': 1 tensors are left out"

    def longer(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(41, 32)])

    cropped = open_tiny(base, {"x": changed(longer, "longer")}, vocab="crop", embeddings="merge")
    rows, _ = cropped.shapes["model.embed_tokens.weight"]
    piece, _ = cropped.read("model.embed_tokens.weight", slice(0, rows))
    own = tensors_of(Path(family[1]["a"]))["model.embed_tokens.weight"]
    assert torch.equal(piece.base + piece.deltas[0], own) or torch.allclose(piece.base + piece.deltas[0], own)


def test_names(family: Family) -> None:
    base, refs = family
    with pytest.raises(UserError, match="there is no expert to merge"):
        open_tiny(base, {})
    with pytest.raises(UserError, match=r"'\.\./x' is no name"):
        open_tiny(base, {"../x": refs["a"]})
    with pytest.raises(UserError, match="prefix names 'y', which is none of the experts: a"):
        open_tiny(base, {"a": refs["a"]}, prefix={"y": "model."})
    twice = open_tiny(base, {"x": refs["a"], "y": refs["a"]})
    assert any("is named as 2 experts" in note for note in twice.notes)


def test_a_pickle_is_refused(family: Family, tmp_path: Path) -> None:
    folder = tmp_path / "pickle"
    shutil.copytree(family[1]["a"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as a pickle \(pytorch_model.bin\)"):
        open_tiny(family[0], {"x": str(folder)})


def test_another_tokenizer_is_told(family: Family, changed: Callable[..., str]) -> None:
    folder = Path(changed())
    assert not any("tokenizer" in note for note in open_tiny(family[0], {"x": str(folder)}).notes)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    notes = open_tiny(family[0], {"x": str(folder)}).notes
    assert any("another tokenizer than the base: 2 numbers mean other tokens" in note for note in notes)


# ---------------------------------------------------------------------- multimodal checkpoints


def multimodal(source: Path, target: Path, start: str, *, twins: int = 1) -> Path:
    """Write a checkpoint that holds the language model of ``source`` under ``start``, and an encoder."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    tensors = {}
    for key, tensor in tensors_of(source).items():
        tensors[start + key] = tensor
        if twins == 2:
            tensors[f"other.{start}{key}"] = tensor.clone()
    tensors["vision.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config}))
    return target


def test_the_language_model_inside_another(family: Family, tmp_path: Path) -> None:
    base, refs = family
    folder = multimodal(Path(refs["a"]), tmp_path / "vlm", "language_model.")
    inside = open_tiny(base, {"a": str(folder)}, embeddings="merge")
    plain = open_tiny(base, {"a": refs["a"]}, embeddings="merge")
    for one, other in zip(inside.pieces(), plain.pieces(), strict=True):
        assert torch.equal(one.deltas, other.deltas)
    assert "its language model is 'language_model.model.'; 1 other tensors" in inside.notes[0]
    named = open_tiny(base, {"a": str(folder)}, prefix={"a": "language_model."})
    assert named.notes[0] == inside.notes[0]
    with pytest.raises(UserError, match=r"no tensor 'language\.model\.layers\.0"):
        open_tiny(base, {"a": str(folder)}, prefix={"a": "language."})


def test_two_language_models_need_a_name(family: Family, tmp_path: Path) -> None:
    base, refs = family
    folder = multimodal(Path(refs["a"]), tmp_path / "two", "llm.", twins=2)
    with pytest.raises(UserError, match=r"holds 2 models like the base: .*merge.prefix\.a"):
        open_tiny(base, {"a": str(folder)})
    assert open_tiny(base, {"a": str(folder)}, prefix={"a": "other.llm."}).count


# ---------------------------------------------------------------------- is the base the base


def test_another_base_is_told_with_figures(family: Family, tmp_path: Path) -> None:
    base, refs = family
    stranger = str(save_tiny(tiny_model(seed=9), tmp_path / "stranger"))
    experts = open_tiny(base, {"a": refs["a"], "x": stranger, "y": str(base)})
    x, y = experts.survey(QUIET)
    figure = float(re.search(r"expert 'x' differs from the base by (\d\.\d\d)", x)[1])
    # Independent weights of the same size.
    assert figure == pytest.approx(2**0.5, abs=0.05)
    assert y == "expert 'y' is the base, weight for weight; it brings nothing"


def test_an_expert_that_changed_other_layers_is_not_the_base(tmp_path: Path) -> None:
    base, _ = tiny_experts(tmp_path, [])
    model = load_model(str(base))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01
    expert = save_tiny(model, tmp_path / "x")
    assert open_tiny(base, {"x": str(expert)}).survey(QUIET) == []


def test_changed_embeddings_are_told_where_they_are_kept(family: Family, tmp_path: Path) -> None:
    base, refs = family
    outcome = merge_tiny(base, {"a": refs["a"]}, Mean(), tmp_path / "out")
    kept = [note for note in outcome.notes if "is kept as in the base" in note]
    assert kept == [
        "expert 'a' has changed 'model.embed_tokens.weight', which is kept as in the base; "
        "transform.merge.embeddings=merge merges it, too"
    ]
    assert torch.equal(
        tensors_of(tmp_path / "out/model")["lm_head.weight"], tensors_of(base)["lm_head.weight"]
    )
