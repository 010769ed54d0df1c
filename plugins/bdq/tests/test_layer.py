"""A layer with scales and rotations is the layer, until something is rounded; folded, it is what was learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.transform.kv import set_kv
from graftwork.transform.modules import CompressedLinear, Factored, Rotation
from graftwork.transform.quantizer import fake_quantize_weight
from graftwork.transform.scheme import KVScheme, WeightScheme
from graftwork.transform.structure import places
from graftwork_bdq.layer import LayerTransform, PlaceTransform, Statistics, starting_sigma
from graftwork_bdq.options import BdqOptions
from graftwork_bdq.rounding import activation_scheme, nearest
from graftwork_bdq.statistics import Gatherer

Make = Callable[..., Any]
# Weights as small as a trained model's, in relation to its width.
MILD = {"initializer_range": 0.04, "outliers": False}
SHAPES: list[dict[str, Any]] = [MILD, {**MILD, "tie_word_embeddings": False, "num_key_value_heads": 9}]


def options(**given: Any) -> BdqOptions:
    return BdqOptions.model_validate(given)


def shaken(layer: Any, config: Any, given: Any, seed: int, size: float = 3) -> LayerTransform:
    """Return a transform whose scales (ln s within +-``size``), rotations and clips are far from where they start."""
    found = LayerTransform(layer, config, given, {}, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "diagonal" in name:
                spread = size * (torch.rand(parameter.shape, generator=generator) * 2 - 1)
                parameter.copy_(spread / (1 if given.diag == "full" else 2))
            elif "cayley" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif "clip" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 1.5)
    return found


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


CASES = [
    {"diag": "full", "rotation": "hadamard+learned"},
    {"diag": "kron", "rotation": "hadamard"},
    {"diag": "full", "rotation": "random"},
    {"diag": "full", "rotation": "none"},
    {"diag": "none", "rotation": "learned"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['diag']}-{case['rotation']}")
@pytest.mark.parametrize("shape", SHAPES, ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("kv", [16, 4])
def test_without_rounding_it_is_the_dense_model(
    make: Make, case: dict[str, Any], shape: dict[str, Any], kv: int, ids: torch.Tensor
) -> None:
    """Logits to 1e-4, while it is learned and folded, with 9 query and 3 value heads and tied embeddings.

    In float64 where values are turned: float32 loses what channels of 1/400 of another's size say when they are mixed.
    """
    model = make(1, dtype=torch.float64 if kv < 16 else torch.float32, **shape)
    original = copy.deepcopy(model)
    before = logits(model, ids)
    given = options(scheme=f"W16A16KV{kv}", init="identity", learn="block", learned_block=16, **case)
    parts = [shaken(layer, model.config, given, number) for number, layer in enumerate(model.model.layers)]
    assert (parts[0].turned is not None) == (kv == 4 and "hadamard" in case["rotation"])
    for part in parts:
        with part.student():
            assert (logits(model, ids) - before).abs().max() < 1e-4
        part.fold()
        assert (logits(model, ids) - before).abs().max() < 1e-4
    assert isinstance(model.model.layers[0].self_attn.q_proj, CompressedLinear)
    # Something was moved: the weights are others, and norms with them where there are scales.
    now, then = model.model.layers[0], original.model.layers[0]
    assert not torch.allclose(now.mlp.down_proj.weight, then.mlp.down_proj.weight)
    same_norm = torch.equal(now.input_layernorm.weight, then.input_layernorm.weight)
    assert same_norm == (case["diag"] == "none")


def test_biases_are_scaled_and_turned_with_their_rows(make: Make, ids: torch.Tensor) -> None:
    model = make(2, **MILD, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    before = logits(model, ids)
    given = options(scheme="W16A16KV4", init="identity", learn="block")
    for number, layer in enumerate(model.model.layers):
        shaken(layer, model.config, given, number, 1).fold()
    assert (logits(model, ids) - before).abs().max() < 1e-4


@pytest.mark.parametrize(("scheme", "allowed"), [("W4A16", 1e-8), ("W16A4", 1e-4), ("W4A4KV4", 1e-2)])
def test_folded_is_what_was_learned_with(make: Make, ids: torch.Tensor, scheme: str, allowed: float) -> None:
    """Rounded weights, inputs and cache: the layer while it learns computes what the folded one does.

    Where inputs are rounded, float32's last digit decides a rounding now and then.
    """
    model = make(3)
    before = logits(model, ids)
    layer = model.model.layers[0]
    given = options(
        scheme=scheme,
        quantizer="rtn",
        init="identity",
        learn="block",
        rotation="hadamard+learned",
        learned_block=16,
    )
    part = shaken(layer, model.config, given, 0, 0.5)
    if given.kv.rounds:
        set_kv(model, KVScheme(bits=4, rotate_keys=True))
    with part.student():
        learned = logits(model, ids)
    for name, module in part.fold().items():
        if part.weights.rounds:
            module.quantized(nearest(module.weight.detach(), part.weights, *part.kept(name)))
        reader = part.reader(name)
        assert reader is not None
        rounding = activation_scheme(reader)
        assert rounding.ratio < 0.98 or not rounding.rounds
        module.activations = rounding if rounding.rounds else None
    size = (learned - before).square().mean()
    assert size > 1e-3 * before.square().mean()
    assert (logits(model, ids) - learned).square().mean() < allowed * size


def factor(layer: Any, names: tuple[str, ...]) -> None:
    """Replace linears by products that are equal to them."""
    for name in names:
        linear = layer.get_submodule(name)
        u, s, v = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        parent, _, last = name.rpartition(".")
        product = Factored.from_factors((u * s.sqrt()).float(), (s.sqrt()[:, None] * v).float())
        setattr(layer.get_submodule(parent), last, product)


def test_products_of_two_are_scaled_and_rotated_at_their_ends(make: Make, ids: torch.Tensor) -> None:
    model = make(1, **MILD)
    before = logits(model, ids)
    given = options(scheme="W16A16KV4", init="identity", learn="block", rotation="hadamard")
    for number, layer in enumerate(model.model.layers):
        factor(layer, ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))
        part = shaken(layer, model.config, given, number, 1)
        assert len(part.linears()) == 11
        with part.student():
            assert (logits(model, ids) - before).abs().max() < 1e-4
        part.fold()
        assert (logits(model, ids) - before).abs().max() < 1e-4
    product = model.model.layers[0].mlp.up_proj
    assert isinstance(product, Factored)
    assert product.first.rotation is not None
    assert product.second.rotation is None


def test_nearest_has_the_values_of_the_fake_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    for symmetric in (True, False):
        for group in (None, 8):
            scheme = WeightScheme(bits=3, group=group, symmetric=symmetric)
            high, low = torch.rand(2, 6, 32 // (group or 32), generator=generator) * 0.6 + 0.4
            expected = fake_quantize_weight(weight, scheme, high, low)
            assert torch.equal(nearest(weight, scheme, high, low).dequantized(), expected)


def statistics(model: Any, ids: torch.Tensor) -> dict[str, Statistics]:
    layer = model.model.layers[0]
    gatherer = Gatherer()
    with gatherer.watching(layer, places(layer, model.config), "model.layers.0"):
        logits(model, ids)
    return dict(gatherer.result())


def test_smoothquant_start_is_smoothquant(make: Make, ids: torch.Tensor) -> None:
    """Scales and folded weights of q/k/v against Xiao et al.'s formula."""
    model = make(4)
    original = copy.deepcopy(model)
    layer = model.model.layers[0]
    found = statistics(model, ids)
    seen: list[torch.Tensor] = []
    handle = layer.input_layernorm.register_forward_hook(lambda m, a, out: seen.append(out))
    logits(model, ids)
    handle.remove()
    x = seen[0].flatten(0, 1).abs().amax(0)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    w = torch.cat([layer.get_submodule(name).weight for name in names]).abs().amax(0)
    divisor = x.sqrt() / w.sqrt()
    given = options(scheme="W4A16", init="smoothquant", rotation="none")
    LayerTransform(layer, model.config, given, found, 0).fold()
    old = original.model.layers[0]
    torch.testing.assert_close(
        layer.input_layernorm.weight, old.input_layernorm.weight / divisor, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        layer.self_attn.q_proj.weight, old.self_attn.q_proj.weight * divisor, rtol=1e-4, atol=1e-6
    )


def test_the_first_token_can_be_left_out() -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    every, rest = Gatherer(), Gatherer(skip_first=True)
    for gatherer in (every, rest):
        gatherer.add("qkv", x[:2])
        gatherer.add("qkv", x[2:])
    torch.testing.assert_close(every.result()["qkv"].energy, x.double().square().sum((0, 1)))
    torch.testing.assert_close(rest.result()["qkv"].energy, x[:, 1:].double().square().sum((0, 1)))
    torch.testing.assert_close(rest.result()["qkv"].largest, x[:, 1:].double().abs().amax((0, 1)))


def test_inputs_that_are_no_numbers_are_named() -> None:
    with pytest.raises(UserError, match=r"input of 'model\.layers\.3\.mlp\.down_proj' is no number"):
        Gatherer().add("down", torch.tensor([[[1.0, torch.nan]]]), "model.layers.3.mlp.down_proj")


def test_identity_and_no_rotation_leave_every_bit(make: Make) -> None:
    model = make(5)
    original = copy.deepcopy(model.model.layers[0])
    given = options(scheme="W4A4", init="identity", rotation="none")
    made = LayerTransform(model.model.layers[0], model.config, given, {}, 0).fold()
    assert len(made) == 7
    for name, module in made.items():
        assert torch.equal(module.weight, original.get_submodule(name).weight)
        assert module.rotation is None
    assert torch.equal(model.model.layers[0].input_layernorm.weight, original.input_layernorm.weight)


def test_linears_that_read_the_same_share_what_they_see(make: Make) -> None:
    model = make(6)
    layer = model.model.layers[0]
    place = places(layer, model.config)[0]
    sigma = starting_sigma(layer, place, None, options(init="identity"))
    part = PlaceTransform(place, sigma, 144, options(init="identity"), 0)
    x = torch.randn(2, 3, 144)
    assert part.seen(x) is part.seen(x)
    assert part.seen(x.clone()) is not part.seen(x)


def test_what_an_earlier_plugin_rotated_rounded_or_factored_is_refused(make: Make) -> None:
    model = make(7)
    layer = model.model.layers[0]
    linear = layer.mlp.down_proj
    rotated = Rotation(16, torch.ones(192, dtype=torch.int8))
    for module, match in (
        (CompressedLinear.from_linear(linear, rotation=rotated), "'mlp.down_proj'; bdq does so itself"),
        (CompressedLinear(nearest(linear.weight.detach(), WeightScheme(bits=4))), "is rounded already"),
        (torch.nn.Sequential(linear), "'mlp.down_proj' is a Sequential"),
    ):
        layer.mlp.down_proj = module
        with pytest.raises(UserError, match=match):
            LayerTransform(layer, model.config, options(init="identity"), {}, 0)
