"""The pass through a model: streamed equals alive, a neutral transform changes no bit, resume goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.evaluate.perplexity import perplexity
from graftwork.hookspecs import WeightTransform
from graftwork.models import load_model, load_tokenizer
from graftwork.testing.models import tiny_checkpoint, tiny_model
from graftwork.transform.block import Block
from graftwork.transform.engine import Engine, Texts
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import ActivationScheme, KVScheme, WeightScheme
from graftwork.transform.source import CheckpointSource, ModelSource

IDS = torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(3))
TEXTS = Texts(IDS[:4], IDS[4:])


def nothing(block: Block) -> None:
    """Change nothing."""


def rounds(bits: int = 4, activations: int = 16, kv: int = 16) -> WeightTransform:
    def block(layer: Block) -> None:
        for name, module in layer.linears().items():
            scheme = WeightScheme(bits=bits)
            rounded = quantize_weight(module.weight, scheme, name) if scheme.rounds else None
            layer.round(name, rounded, ActivationScheme(bits=activations))
        layer.set_kv(KVScheme(bits=kv))

    return WeightTransform("round", block, needs="none")


def engine(source: Any, *transforms: WeightTransform, **options: Any) -> Engine:
    named = [(f"plugin{number}", one) for number, one in enumerate(transforms)]
    return Engine(source, named, options.pop("texts", TEXTS), batch_size=3, **options)


def nll(model: Any, ids: torch.Tensor) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.reshape(len(ids), -1).mean(1).tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mistral"])
def test_layer_by_layer_gives_what_the_whole_model_gives(kind: str) -> None:
    model = tiny_model(kind)
    transform = WeightTransform("nothing", nothing, needs="none")
    found = engine(ModelSource(model), transform, score_calibration=True).run()
    assert found.nll == pytest.approx(nll(model, IDS[4:]), abs=1e-5)
    assert found.dense_nll == found.nll
    assert found.calibration_nll == pytest.approx(sum(nll(model, IDS[:4])) / 4, abs=1e-5)
    assert [record.error for record in found.layers] == [0.0, 0.0]


def test_statistics_are_those_of_the_inputs() -> None:
    model = tiny_model("llama")
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args: seen.__setitem__(name, args[0].flatten(0, 1).double())

    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"]
    for name in names:
        model.model.layers[1].get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(input_ids=IDS[:4])

    def look(block: Block) -> None:
        if block.index == 0:
            return
        moments, energy = block.second_moments(names), block.energy(names)
        assert moments[names[0]] is moments[names[1]]
        for name in names:
            x = seen[name]
            torch.testing.assert_close(moments[name], x.T @ x, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(energy[name], x.square().sum(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(block.maxima(name)[name], x.amax(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(block.minima(name)[name], x.amin(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(block.mean_abs(name)[name], x.abs().mean(0), rtol=1e-4, atol=1e-6)
        assert block.tokens == 4 * 24
        looked.append(block.name)

    looked: list[str] = []
    engine(ModelSource(model), WeightTransform("look", look)).run()
    assert looked == ["model.layers.1"]


def test_second_layer_reads_what_the_changed_first_one_gives() -> None:
    model = tiny_model("llama")

    def halve(block: Block) -> None:
        if block.index == 0:
            block.get("mlp.down_proj").weight.data.mul_(0.5)

    found = engine(ModelSource(model), WeightTransform("halve", halve, needs="none")).run()
    changed = copy.deepcopy(model)
    changed.model.layers[0].mlp.down_proj.weight.data.mul_(0.5)
    assert found.nll == pytest.approx(nll(changed, IDS[4:]), abs=1e-5)
    assert found.dense_nll == pytest.approx(nll(model, IDS[4:]), abs=1e-5)
    assert [bool(layer.error) for layer in found.layers] == [True, False]


def test_dense_activations_are_those_of_the_unchanged_model() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        hidden = model(input_ids=IDS[:4], output_hidden_states=True).hidden_states

    def look(block: Block) -> None:
        inputs = torch.cat([before for before, _, _ in block.dense_batches()])
        torch.testing.assert_close(inputs, hidden[block.index], rtol=1e-4, atol=1e-5)
        if block.index == 0:
            outputs = torch.cat([after for _, _, after in block.dense_batches()])
            torch.testing.assert_close(outputs, hidden[1], rtol=1e-4, atol=1e-5)
        block.get("mlp.down_proj").weight.data.zero_()
        looked.append(block.index)

    looked: list[int] = []
    engine(ModelSource(model), WeightTransform("look", look, dense=True)).run()
    assert looked == [0, 1]
    with pytest.raises(UserError, match="not asked for"):
        engine(ModelSource(model), WeightTransform("look", look)).run()


def test_head_may_be_untied_and_changed() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)

    def begin(outer: Any) -> None:
        assert outer.tied
        outer.untie()
        outer.head.weight.data.mul_(2)

    transform = WeightTransform("twice", nothing, needs="none", begin=begin)
    found = engine(ModelSource(model), transform).run()
    assert not found.config.tie_word_embeddings
    other = copy.deepcopy(model)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach() * 2)
    assert found.nll == pytest.approx(nll(other, IDS[4:]), abs=1e-5)
    assert found.dense_nll == pytest.approx(nll(model, IDS[4:]), abs=1e-5)
    assert model.config.tie_word_embeddings


def test_what_is_prepared_end_to_end_reaches_every_layer() -> None:
    model = tiny_model("llama")

    def prepare(whole: Any) -> dict[str, torch.Tensor]:
        assert torch.equal(whole.windows, IDS[:4])
        return {"x": torch.tensor([float(whole.model.config.num_hidden_layers)])}

    def block(layer: Block) -> None:
        layer.record("", prepared=layer.prepared["x"].item())

    transform = WeightTransform("learn", block, needs="end_to_end", prepare=prepare)
    found = engine(ModelSource(model), transform).run()
    assert [record.linears[""]["prepared"] for record in found.layers] == [2.0, 2.0]


def test_rounding_twice_is_refused() -> None:
    with pytest.raises(UserError, match="an earlier plugin has rounded them"):
        engine(ModelSource(tiny_model("llama")), rounds(), rounds()).run()


def test_keys_and_values_are_rounded() -> None:
    model = tiny_model("llama")
    plain = engine(ModelSource(model), rounds(16)).run()
    rounded = engine(ModelSource(model), rounds(16, kv=2)).run()
    assert plain.nll == plain.dense_nll
    assert rounded.nll != rounded.dense_nll
    assert (rounded.quantization or {})["kv"]["bits"] == 2


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("in_memory", [True, False])
def test_resumed_is_the_same_as_undisturbed(tmp_path: Path, in_memory: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=4)

    def stopping(at: int) -> WeightTransform:
        def block(layer: Block) -> None:
            if layer.index == at:
                raise UserError("stop")

        return WeightTransform("stop", block, dense=True)

    def run(work: Path, at: int = -1) -> Any:
        source = CheckpointSource(str(folder))
        return engine(source, rounds(4, 8), stopping(at), work=work, in_memory=in_memory).run()

    whole = run(tmp_path / "whole")
    for at in (2, 3):
        with pytest.raises(UserError, match="stop"):
            run(tmp_path / "cut", at)
    resumed = run(tmp_path / "cut")
    assert (resumed.nll, resumed.dense_nll) == (whole.nll, whole.dense_nll)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_streamed_is_the_same_as_in_memory(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    streamed = engine(CheckpointSource(str(folder)), rounds(4, 8), work=tmp_path / "work").run()
    alive = engine(ModelSource(load_model(str(folder))), rounds(4, 8)).run()
    assert streamed.nll == alive.nll
    assert streamed.dense_nll == alive.dense_nll


def test_perplexity_is_that_of_evaluate(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("What is measured on the way is what is measured afterwards. " * 4)
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    windows = torch.tensor(tokenizer(text.read_text())["input_ids"])[:96].reshape(4, 24)
    found = engine(
        ModelSource(model), WeightTransform("nothing", nothing, needs="none"), texts=Texts(None, windows)
    )
    mean = sum(found.run().nll) / 4
    assert mean == pytest.approx(
        perplexity(model, tokenizer, text, window=24, max_windows=4)["nll"], abs=1e-5
    )
