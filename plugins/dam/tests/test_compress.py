"""DAM on a tiny model, through the engine: exact limits, orders, places, formats, resuming, bad input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError, WeightTransform
from graftwork.testing.models import tiny_model
from graftwork.transform.block import Block
from graftwork.transform.engine import Engine, Outcome, Texts
from graftwork.transform.modules import CompressedLinear, Factored
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import WeightScheme
from graftwork.transform.source import ModelSource
from graftwork_dam import factorise, product_output
from graftwork_dam.compress import FIGURES, compress_block
from graftwork_dam.options import DamOptions
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

FAST = {"steps": 3, "tokens": 64}
LINEARS = 7


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", initializer_range=0.3)


def texts(vocabulary: int = 259) -> Texts:
    generator = torch.Generator().manual_seed(3)
    return Texts(
        torch.randint(vocabulary, (8, 24), generator=generator),
        torch.randint(vocabulary, (4, 24), generator=generator),
    )


class Seen:
    """Keeps the layers that a transform leaves behind."""

    def __init__(self, work: Any) -> None:
        self.work = work
        self.modules: list[nn.Module] = []
        self.moments: list[dict[str, torch.Tensor]] = []

    def __call__(self, block: Block) -> None:
        self.moments.append(block.second_moments([*block.linears()]))
        self.work(block)
        self.modules.append(block.module)


def transform(model: Any, *works: Any, work: Path | None = None, **options: Any) -> Outcome:
    transforms = [(f"plugin-{n}", WeightTransform("t", one)) for n, one in enumerate(works)]
    return Engine(ModelSource(model), transforms, texts(), batch_size=4, work=work, **options).run()


def dam(**options: Any) -> Any:
    given = options if options.get("order") == "q_of_l" else {"learn": FAST, **options}
    return partial(compress_block, options=DamOptions.model_validate(given))


def compressed(model: Any, **options: Any) -> tuple[Outcome, Seen]:
    seen = Seen(dam(**options))
    return transform(model, seen), seen


def named(layer: nn.Module, kind: Any) -> dict[str, Any]:
    return {name: one for name, one in layer.named_modules() if isinstance(one, kind)}


def weight_of(model: Any, layer: int, name: str) -> torch.Tensor:
    return model.model.layers[layer].get_submodule(name).weight.detach().double()


# ---------------------------------------------------------------- exact limits


@pytest.mark.parametrize("extra", [{}, {"init": "p05"}, {"init": "p1", "place": "both"}, {"loss": "block"}])
def test_with_nothing_rounded_it_is_svd_llm(model: Any, extra: dict[str, Any]) -> None:
    outcome, seen = compressed(model, scheme="W16A16", ratio=0.6, **extra)
    layer = seen.modules[0]
    assert len(named(layer, Factored)) == LINEARS
    for name, factored in named(layer, Factored).items():
        weight = weight_of(model, 0, name)
        rows, columns = weight.shape
        rank = math.floor(0.6 * rows * columns / (rows + columns))
        assert factored.rank == rank
        s = torch.linalg.cholesky(seen.moments[0][name])
        u, _, _ = torch.linalg.svd(weight @ s, full_matrices=False)
        expected = u[:, :rank] @ u[:, :rank].T @ weight
        if extra.get("place") != "both":
            torch.testing.assert_close(factored.dense_weight().double(), expected, rtol=1e-5, atol=1e-5)
    # Where a diagonal was folded, the whole layer still gives the same.
    _, plain = compressed(model, scheme="W16A16", ratio=0.6, init="p05", learn={"steps": 0})
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    kwargs = position_arguments(model, hidden)
    torch.testing.assert_close(
        layer(hidden, **kwargs), plain.modules[0](hidden, **kwargs), rtol=1e-4, atol=1e-5
    )
    assert all(math.isfinite(one) for one in outcome.nll)


def position_arguments(model: Any, hidden: torch.Tensor) -> dict[str, Any]:
    positions = torch.arange(hidden.shape[1])[None]
    return {"position_embeddings": model.model.rotary_emb(hidden, positions)}


@pytest.mark.parametrize("metric", ["whiten", "plain"])
def test_full_rank_in_numbers_is_the_model_itself(model: Any, metric: str) -> None:
    # Keys and values have 16 outputs; the rest 32 and more.
    _, seen = compressed(model, scheme="W16A16", rank=16, targets=["*.k_proj", "*.v_proj"], metric=metric)
    for index, layer in enumerate(seen.modules):
        found = named(layer, Factored)
        assert {name.rpartition(".")[2] for name in found} == {"k_proj", "v_proj"}
        for name, factored in found.items():
            torch.testing.assert_close(
                factored.dense_weight().double(), weight_of(model, index, name), rtol=1e-5, atol=1e-5
            )


def test_a_given_split_does_not_change_what_float_factors_do(model: Any) -> None:
    nll = [
        compressed(model, scheme="W16A16", init=init, learn={"steps": 0})[0].nll
        for init in ("p0", "p1", "p0.3")
    ]
    torch.testing.assert_close(torch.tensor(nll[0]), torch.tensor(nll[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(nll[0]), torch.tensor(nll[2]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what is stored


def test_factors_are_rounded_and_inputs_and_latents_with_them(model: Any) -> None:
    _, seen = compressed(model, scheme="W4A8", latent_bits=6, quantizer="rtn")
    factored = seen.modules[0].get_submodule("mlp.up_proj")
    assert isinstance(factored, Factored)
    first, second = factored.first, factored.second
    assert first.activations is not None
    assert second.activations is not None
    assert (first.activations.bits, second.activations.bits) == (8, 6)
    assert first.weights is not None
    assert first.weights.bits == 4
    for part in (first, second):
        codes = part.codes()
        assert codes.codes.abs().max() <= 8
        torch.testing.assert_close(part.dense_weight(), codes.codes * codes.scale)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    how = DamOptions.model_validate({"scheme": "W4A8", "latent_bits": 6}).rounding
    expected = product_output(x, second.dense_weight(), first.dense_weight(), how)
    torch.testing.assert_close(factored(x), expected)


def test_the_kv_cache_is_rounded_in_every_layer(model: Any) -> None:
    seen: list[Any] = []

    def looks(block: Block) -> None:
        dam(scheme="W16A16KV4", targets=["model.layers.1.mlp.*"])(block)
        seen.append(block.kv)

    rounded = transform(model, looks)
    assert [scheme.bits for scheme in seen] == [4, 4]
    plain, _ = compressed(model, scheme="W16A16", targets=["model.layers.1.mlp.*"])
    assert max(abs(a - b) for a, b in zip(rounded.nll, plain.nll, strict=True)) > 1e-4


def test_merged_is_what_the_factors_make(model: Any) -> None:
    outcome, seen = compressed(model)
    merged, kept = compressed(model, format="merged")
    assert not any(named(layer, Factored) for layer in kept.modules)
    # The first layer of both got the very same inputs.
    for name, factored in named(seen.modules[0], Factored).items():
        one = kept.modules[0].get_submodule(name)
        torch.testing.assert_close(one.weight, factored.dense_weight(), rtol=1e-5, atol=1e-6)
        x = torch.randn(4, factored.in_features, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(one(x), factored(x), rtol=1e-4, atol=1e-5)
    for name, figures in merged.layers[0].linears.items():
        assert figures == outcome.layers[0].linears[name]
    # Its size is lost: 32 bits a weight of this model, and no rounding of inputs unless it is asked for.
    assert merged.layers[0].bits == 32 * merged.layers[0].parameters
    _, kept = compressed(model, format="merged", scheme="W4A8")
    assert kept.modules[0].get_submodule("mlp.up_proj").activations.bits == 8


def test_figures_are_those_of_the_layer(model: Any) -> None:
    outcome, seen = compressed(model, quantizer="rtn")
    name = "mlp.down_proj"
    figures = outcome.layers[0].linears[name]
    factored, moments = seen.modules[0].get_submodule(name), seen.moments[0][name]
    weight = weight_of(model, 0, name)
    error = weight - factored.second.dense_weight().double() @ factored.first.dense_weight().double()

    def outputs(e: torch.Tensor) -> float:
        return ((e @ moments) * e).sum().sqrt().item()

    assert figures["dam_error"] == pytest.approx((outputs(error) / outputs(weight)) ** 2, rel=1e-3)
    assert float(figures["dam_error"]) <= float(figures["dam_start_error"])
    low = factorise(weight, factored.rank, moments=moments).product()
    alone = quantize_weight(weight.float(), WeightScheme(bits=4)).dequantized().double()
    for level, norm in (("tensor_gap", lambda e: float(e.norm())), ("dot_gap", outputs)):
        expected = (norm(error) - norm(weight - low) - norm(weight - alone)) / norm(weight)
        assert figures[level] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert figures["low_rank"] == factored.rank
    assert {*figures} - {"start"} <= {*FIGURES}
    # Four bits a code, a scale a row, padded words.
    assert outcome.layers[0].bits < 6 * outcome.layers[0].parameters


# ---------------------------------------------------------------- orders and places


def test_orders_are_their_formulas(model: Any) -> None:
    name, scheme = "mlp.gate_proj", WeightScheme(bits=4)
    weight = weight_of(model, 0, name)
    _, seen = compressed(model, order="ql", quantizer="rtn", learn={"steps": 0})
    moments = seen.moments[0][name]
    rounded = quantize_weight(weight.float(), scheme).dequantized()
    rank = seen.modules[0].get_submodule(name).rank
    first = factorise(rounded, rank, moments=moments)
    torch.testing.assert_close(
        seen.modules[0].get_submodule(name).dense_weight(), first.product().float(), rtol=1e-4, atol=1e-5
    )
    _, seen = compressed(model, order="q_of_l", quantizer="rtn")
    stored = seen.modules[0].get_submodule(name)
    low = factorise(weight, rank, moments=moments).product().float()
    assert isinstance(stored, CompressedLinear)
    torch.testing.assert_close(stored.dense_weight(), quantize_weight(low, scheme).dequantized())
    _, seen = compressed(model, order="qlq", quantizer="rtn", init="p05", learn={"steps": 0})
    factored = seen.modules[0].get_submodule(name)
    left, right = first.left * first.values.sqrt(), first.scaled / first.values.sqrt()[:, None]
    expected = [quantize_weight(one.float(), scheme).dequantized() for one in (left, right)]
    torch.testing.assert_close(factored.dense_weight(), expected[0] @ expected[1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("place", ["input", "both"])
def test_a_diagonal_on_the_inputs_is_folded_away(model: Any, place: str) -> None:
    """With nothing rounded the model stays what low rank alone makes of it, to the last layer."""
    plain, _ = compressed(model, scheme="W16A16", learn={"steps": 0})
    init = "smoothquant0.5" if place == "input" else "p0.25"
    folded, seen = compressed(model, scheme="W16A16", learn={"steps": 0}, place=place, init=init)
    torch.testing.assert_close(torch.tensor(folded.nll), torch.tensor(plain.nll), rtol=1e-3, atol=1e-4)
    if place == "input":
        norm = seen.modules[0].get_submodule("input_layernorm")
        assert not torch.allclose(norm.weight, torch.ones(32))


def test_a_linear_that_is_no_target_takes_its_part_of_the_fold(model: Any) -> None:
    some = ["*.q_proj", "*.up_proj", "*.down_proj", "*.o_proj"]
    plain, _ = compressed(model, scheme="W16A16", learn={"steps": 0}, targets=some)
    folded, seen = compressed(
        model, scheme="W16A16", learn={"steps": 0}, targets=some, place="input", init="smoothquant"
    )
    assert {name.rpartition(".")[2] for name in named(seen.modules[0], Factored)} == {
        "q_proj", "up_proj", "down_proj", "o_proj",
    }  # fmt: skip
    torch.testing.assert_close(torch.tensor(folded.nll), torch.tensor(plain.nll), rtol=1e-3, atol=1e-4)


def test_biases_stay_where_they_belong() -> None:
    model = tiny_model("qwen2", initializer_range=0.3)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(
                layer.self_attn.get_submodule(name).bias, generator=torch.Generator().manual_seed(1)
            )
    plain, seen = compressed(model, scheme="W16A16", learn={"steps": 0})
    for name in ("q_proj", "v_proj"):
        factored = seen.modules[0].get_submodule(f"self_attn.{name}")
        assert factored.first.bias is None
        torch.testing.assert_close(
            factored.second.bias, model.model.layers[0].self_attn.get_submodule(name).bias
        )
    folded, _ = compressed(model, scheme="W16A16", learn={"steps": 0}, place="input", init="smoothquant")
    torch.testing.assert_close(torch.tensor(folded.nll), torch.tensor(plain.nll), rtol=1e-3, atol=1e-4)


def test_learning_by_the_layer_makes_its_output_better(model: Any) -> None:
    outcome, _ = compressed(
        model, scheme="W3A16", loss="block", learn={"steps": 12, "tokens": 64}, quantizer="rtn"
    )
    for record in outcome.layers:
        whole = record.linears[""]
        assert float(whole["block_error"]) <= float(whole["block_start_error"])
    assert any(
        float(r.linears[""]["block_error"]) < 0.999 * float(r.linears[""]["block_start_error"])
        for r in outcome.layers
    )


def test_factors_can_be_left_to_a_plugin_that_rounds(model: Any) -> None:
    def rounds(block: Block) -> None:
        for name, linear in block.linears().items():
            block.round(name, quantize_weight(linear.weight, WeightScheme(bits=4)))

    kept = Seen(rounds)
    transform(model, dam(quantizer="none", scheme="W4A16"), kept)
    _, seen = compressed(model, quantizer="rtn")
    assert len(kept.moments[0]) == 2 * LINEARS
    for name, factored in named(seen.modules[0], Factored).items():
        other = kept.modules[0].get_submodule(name)
        assert other.is_quantized
        torch.testing.assert_close(other.dense_weight(), factored.dense_weight())


# ---------------------------------------------------------------- resuming


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(model: Any, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for path in sorted(folder.rglob("*.safetensors")):
            if "hidden" not in path.parts:
                found |= load_file(path)
        return found

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = transform(model, dam(), work=whole)

    class Killed(Exception):
        pass

    def dies(block: Block) -> None:
        if block.index == 1:
            raise Killed
        dam()(block)

    with pytest.raises(Exception, match="Killed"):
        transform(model, dies, work=cut)
    found = transform(model, dam(), work=cut)
    a, b = files(whole), files(cut)
    assert a.keys() == b.keys()
    assert len(a) > 2 * LINEARS
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert found.nll == expected.nll
    assert [one.linears for one in found.layers] == [one.linears for one in expected.layers]


# ---------------------------------------------------------------- bad input


def refused(model: Any, works: Sequence[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        transform(model, *works)


def test_patterns_that_fit_nothing_are_refused(model: Any) -> None:
    refused(
        model, [dam(targets=["*.up_prj"])], r"plugins.dam.targets: '\*.up_prj' fits no linear.*mlp.up_proj"
    )
    # One layer may be meant.
    outcome, _ = compressed(model, targets=["model.layers.1.mlp.*"])
    assert [len(one.linears) for one in outcome.layers] == [0, 3]


def test_what_is_factored_or_rounded_already_is_refused(model: Any) -> None:
    refused(model, [dam(quantizer="none"), dam()], r"'model.layers.0.self_attn.q_proj' is factored already")

    def rounds_one(block: Block) -> None:
        block.round("mlp.up_proj", quantize_weight(block.get("mlp.up_proj").weight, WeightScheme(bits=4)))

    refused(
        model,
        [rounds_one, dam()],
        r"'model.layers.0.mlp.up_proj' is rounded already, and low rank comes first",
    )

    def corrects_one(block: Block) -> None:
        block.compressed("mlp.up_proj").corrected((torch.zeros(48, 1), torch.zeros(1, 32)))

    refused(model, [corrects_one, dam()], "has a low-rank correction")


def test_ranks_and_groups_that_do_not_fit_are_refused_by_name(model: Any) -> None:
    refused(model, [dam(rank=17)], r"rank 17 is more than 'model.layers.0.self_attn.k_proj' \(16 x 32\) has")
    refused(
        model,
        [dam(ratio=0.05)],
        r"ratio 0.05 leaves 'model.layers.0.self_attn.q_proj' \(32 x 32\) a rank of 0",
    )
    refused(model, [dam(group=7, rank=14)], r"group size 7 does not divide the 32 inputs")


def test_few_calibration_tokens_are_told(model: Any) -> None:
    transforms = [("dam", WeightTransform("dam", dam(learn={"steps": 0})))]
    few = Texts(torch.randint(259, (1, 6)), None)
    outcome = Engine(ModelSource(model), transforms, few, batch_size=1).run()
    assert any("6 calibration tokens are fewer than the rank" in note for note in outcome.notes)
    assert len(outcome.notes) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0}, "greater than 0"),
        ({"ratio": 1.1}, "less than or equal to 1"),
        ({"latent_bits": 4, "place": "input"}, "latent_bits = 4 needs a diagonal between the factors"),
        ({"latent_bits": 12}, "latents have 2 to 8 bits, or 16"),
        ({"latent_bits": 4, "quantizer": "none"}, "the latents are rounded by the plugin that comes after"),
        (
            {"scheme": "W4A16KV4", "quantizer": "none"},
            "the KV cache is rounded by the plugin that comes after",
        ),
        ({"latent_bits": 4, "format": "merged"}, "format: merged makes one matrix"),
        ({"latent_bits": 4, "order": "q_of_l"}, "order: q_of_l makes one matrix"),
        ({"place": "input", "init": "p0"}, "place: input has no diagonal there"),
        ({"ratio": 0.5, "rank": 3}, "ratio or rank, not both"),
        ({"order": "q_of_l", "init": "p0"}, "leave out init"),
        ({"order": "qlq", "quantizer": "none"}, "order: qlq rounds"),
        ({"loss": "block", "learn": {"steps": 0}}, "loss: block learns nothing"),
        ({"loss": "block", "place": "both"}, "place: rank only"),
        ({"init": "p3"}, "between 0 and 1"),
        ({"scheme": "W9A16"}, "9 bits are not to be had"),
        ({"rnak": 3}, "Extra inputs"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DamOptions.model_validate(options)
