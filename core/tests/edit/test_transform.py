"""Edits through the engine and the command: exact where there is nothing to change, resumed to the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.edit.edits import EditSet
from graftwork.edit.encoding import encode_request
from graftwork.edit.errors import RequestError
from graftwork.edit.requests import Request
from graftwork.edit.scoring import score
from graftwork.edit.transform import edit_transform
from graftwork.hookspecs import WeightTransform
from graftwork.models import load_model
from graftwork.testing.editing import REQUESTS, STATE, PlainEditor, corpus, editable_model
from graftwork.transform.beside import FOLDER, Beside
from graftwork.transform.block import Block
from graftwork.transform.engine import Engine, Outcome, Texts
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import WeightScheme
from graftwork.transform.source import CheckpointSource, ModelSource
from safetensors.torch import load_file


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    editable_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def engine(
    source: Any, work: Path | None, tokenizer: Any, *transforms: WeightTransform, **options: Any
) -> Engine:
    named = [(f"plugin{number}", one) for number, one in enumerate(transforms)]
    texts = options.pop("texts", Texts(corpus(), corpus(9)[:4]))
    return Engine(source, named, texts, work=work, tokenizer=lambda: tokenizer, **options)


def stored(work: Path) -> dict[str, torch.Tensor]:
    return {
        key: value for path in sorted(work.glob("*.safetensors")) for key, value in load_file(path).items()
    }


def digests(work: Path) -> dict[str, str]:
    files = [path for path in sorted(work.rglob("*")) if path.is_file() and "hidden" not in path.parts]
    return {
        str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        # Seconds are in the progress.
        if path.suffix == ".safetensors"
    }


def rounds() -> WeightTransform:
    def block(layer: Block) -> None:
        for name, module in layer.linears().items():
            layer.round(name, quantize_weight(module.weight, WeightScheme.model_validate({"bits": 8}), name))

    return WeightTransform("round", block, needs="none")


def finished(work: Path, target: Path) -> EditSet:
    Beside(work, 4).finish(target / FOLDER, dict)
    return EditSet.load(target)


def test_the_model_that_is_written_is_the_edited_one(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    transform = edit_transform(PlainEditor(), REQUESTS, max_share=10)
    outcome = engine(CheckpointSource(str(folder)), tmp_path / "work", tokenizer, transform).run()
    edits = finished(tmp_path / "work", tmp_path / "run")
    assert list(edits.changes) == ["model.layers.1.mlp.down_proj"]
    assert list(edits.requests) == [one.record() for one in REQUESTS]
    base = load_model(str(folder))
    with edits.apply(base):
        wanted = {name: value.clone() for name, value in base.state_dict().items()}
        rows = [encode_request(tokenizer, one) for one in REQUESTS]
        better = [one.mean for one in score(base, tokenizer, rows)]
    found = stored(tmp_path / "work")
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert sum(better) > sum(one.mean for one in score(base, tokenizer, rows))
    assert "of 2 targets" in outcome.notes[0]
    record = outcome.layers[1].linears["mlp.down_proj"]
    assert 0 < float(record["edit_share"]) < 10
    assert record["edit_rank"] == 2.0
    # The texts of the second moments are not passed through the layers again.
    assert not outcome.layers[0].linears


def test_a_model_in_bfloat16_is_rounded_once(tokenizer: Any, tmp_path: Path) -> None:
    base = editable_model(dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    transform = edit_transform(PlainEditor(lam=30.0), REQUESTS, max_share=10)
    outcome = engine(CheckpointSource(str(tmp_path / "base")), tmp_path / "work", tokenizer, transform).run()
    (change,) = finished(tmp_path / "work", tmp_path / "run").changes.values()
    name = "model.layers.1.mlp.down_proj.weight"
    old = base.get_parameter(name).detach()
    new = stored(tmp_path / "work")[name]
    assert torch.equal(new, (old.double() + change.dense()).to(torch.bfloat16))
    changed = change.dense() != 0
    lost = int(((new == old) & changed).sum()) / int(changed.sum())
    assert 0 < lost < 1
    assert outcome.layers[1].linears["mlp.down_proj"]["edit_lost"] == pytest.approx(lost, abs=1e-9)


def test_nothing_found_changes_no_byte(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    nothing = PlainEditor(state=STATE.model_copy(update={"stop": 1e9}))
    source = CheckpointSource(str(folder))
    engine(source, tmp_path / "edited", tokenizer, edit_transform(nothing, REQUESTS)).run()
    engine(
        source, tmp_path / "plain", tokenizer, WeightTransform("nothing", lambda _: None, needs="none")
    ).run()
    edited, plain = digests(tmp_path / "edited"), digests(tmp_path / "plain")
    assert plain
    assert {name: one for name, one in edited.items() if name in plain} == plain
    assert {name for name in edited if name not in plain} >= {"prepared-0.safetensors"}


@pytest.mark.parametrize("when", ["states", "layers"])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(
    folder: Path, tokenizer: Any, tmp_path: Path, when: str
) -> None:
    class Stopped(PlainEditor):
        def edit(self, *args: Any, **options: Any) -> EditSet:
            raise KeyboardInterrupt

    def stop(block: Block) -> None:
        if when == "layers" and block.index == 2:
            raise KeyboardInterrupt

    source = CheckpointSource(str(folder))
    whole = edit_transform(PlainEditor(), REQUESTS, max_share=10)
    none = WeightTransform("stop", lambda _: None, needs="none")
    engine(source, tmp_path / "whole", tokenizer, whole, none).run()
    first = edit_transform(Stopped() if when == "states" else PlainEditor(), REQUESTS, max_share=10)
    with pytest.raises(KeyboardInterrupt):
        engine(source, tmp_path / "cut", tokenizer, first, WeightTransform("stop", stop, needs="none")).run()
    again = edit_transform(PlainEditor() if when == "states" else Stopped(), REQUESTS, max_share=10)
    engine(source, tmp_path / "cut", tokenizer, again, none).run()
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_compression_may_follow_and_nothing_may_come_before(tokenizer: Any) -> None:
    source = ModelSource(editable_model())
    edit = edit_transform(PlainEditor(), REQUESTS, max_share=10)
    outcome: Outcome = engine(source, None, tokenizer, edit, rounds()).run()
    assert outcome.quantization is not None
    assert float(outcome.layers[1].linears["mlp.down_proj"]["edit_share"]) > 0

    def double(block: Block) -> None:
        block.get("mlp.down_proj").weight.data *= 2

    with pytest.raises(
        UserError, match=r"'plain' edits 'model.layers.1.mlp.down_proj' as it is in the model"
    ):
        engine(source, None, tokenizer, WeightTransform("double", double, needs="none"), edit).run()
    # A change elsewhere does no harm.
    engine(source, None, tokenizer, edit, WeightTransform("double", double, needs="none")).run()


def test_an_edit_without_statistics_needs_no_text(tokenizer: Any) -> None:
    source = ModelSource(editable_model())
    edit = edit_transform(PlainEditor(), REQUESTS, identity=True, max_share=10)
    outcome = engine(source, None, tokenizer, edit, texts=Texts(None, corpus(9)[:4])).run()
    assert outcome.nll != outcome.dense_nll


def test_conv1d_weights_are_edited_as_they_are_stored(tokenizer: Any) -> None:
    model = editable_model("gpt2")
    editor = PlainEditor()
    outcome = engine(
        ModelSource(model), None, tokenizer, edit_transform(editor, REQUESTS, max_share=10)
    ).run()
    assert float(outcome.layers[1].linears["mlp.c_proj"]["edit_share"]) > 0
    assert outcome.nll != outcome.dense_nll


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([], "no request"),
        ([REQUESTS[0], Request("2", "{} is in", "Lyon", "Peru")], "contradict each other"),
        ([Request("1", "{} is", "Lyon", "")], "empty target"),
    ],
)
def test_requests_are_checked_before_the_model_is_read(requests: Sequence[Request], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        edit_transform(PlainEditor(), requests)


def test_a_target_that_is_too_long_stops_the_run(tokenizer: Any) -> None:
    edit = edit_transform(PlainEditor(), REQUESTS, max_target_tokens=3)
    with pytest.raises(RequestError, match="at most 3 are allowed"):
        engine(ModelSource(editable_model()), None, tokenizer, edit).run()
