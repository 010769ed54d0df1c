"""What config.json says of a compressed model, which tensors are stored, and which layout holds what."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.compressed import replace_linears
from graftwork.testing.models import tiny_model
from graftwork.transform.format import (
    check_change,
    check_fits,
    check_not_quantized,
    checkpoint_config,
    choose,
    combine,
    describe,
    describe_layer,
    index_name,
    layer_tensors,
    layout_of,
    module_names,
)
from graftwork.transform.modules import CompressedLinear, Factored, Rotation
from graftwork.transform.quantizer import fake_quantize_tokens, quantize_weight
from graftwork.transform.scheme import ActivationScheme, KVScheme, WeightScheme
from torch import nn

HALF = ActivationScheme(bits=8, symmetric=True, convention="half-range")


def rounded(linear: nn.Linear, bits: int = 4, **parts: Any) -> CompressedLinear:
    scheme = WeightScheme(bits=bits, group=parts.pop("group", 16), symmetric=parts.pop("symmetric", True))
    return CompressedLinear.from_linear(linear, **parts).quantized(quantize_weight(linear.weight, scheme))


def model_with(make: Any, **changes: Any) -> Any:
    return replace_linears(tiny_model("llama", **changes), make)


def rotation(columns: int) -> Rotation:
    return Rotation(8, torch.ones(columns, dtype=torch.int8))


def factored(linear: nn.Linear) -> Factored:
    return Factored.from_factors(linear.weight[:, :4], linear.weight[:4])


# ---------------------------------------------------------------------- which layout


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda name, linear: CompressedLinear.from_linear(linear), "dense"),
        (lambda name, linear: rounded(linear), "pack-quantized"),
        (lambda name, linear: rounded(linear, 3, group=None), "pack-quantized"),
        (lambda name, linear: rounded(linear, 8), "pack-quantized"),
        (lambda name, linear: rounded(linear, 8, activations=HALF), "int-quantized"),
        (lambda name, linear: rounded(linear, 4, activations=HALF), "pack-quantized"),
        (lambda name, linear: rounded(linear, 8, activations=ActivationScheme(bits=8)), "int-quantized"),
        (
            lambda name, linear: rounded(
                linear, 8, activations=HALF.model_copy(update={"convention": "largest-level"})
            ),
            "graftwork",
        ),
        (
            lambda name, linear: rounded(linear, 8, activations=HALF.model_copy(update={"ratio": 0.9})),
            "graftwork",
        ),
        (lambda name, linear: rounded(linear, rotation=rotation(linear.in_features)), "graftwork"),
        (
            lambda name, linear: rounded(
                linear, correction=(linear.weight[:, :2].detach(), linear.weight[:2].detach())
            ),
            "graftwork",
        ),
        (lambda name, linear: factored(linear), "graftwork"),
        (lambda name, linear: CompressedLinear.from_linear(linear, activations=HALF), "graftwork"),
    ],
)
def test_auto_takes_the_first_layout_that_holds_everything(make: Any, layout: str) -> None:
    model = model_with(make)
    assert layout_of(describe(model)) == layout
    if layout == "graftwork":
        with pytest.raises(UserError, match=r"format 'compressed-tensors' cannot hold the model: .*q_proj"):
            describe(model, format="compressed-tensors")


def test_packed_zero_points_are_for_those_who_ask() -> None:
    """Plain transformers does not load them; see test_loading."""
    model = model_with(lambda name, linear: rounded(linear, symmetric=False))
    assert layout_of(describe(model)) == "graftwork"
    assert layout_of(describe(model, format="compressed-tensors")) == "pack-quantized"


def test_a_rounded_kv_cache_needs_our_layout() -> None:
    kv = KVScheme(bits=4)
    for make in (lambda name, linear: linear, lambda name, linear: rounded(linear)):
        model = model_with(make)
        assert layout_of(describe(model, kv)) == "graftwork"
        for format in ("dense", "compressed-tensors"):
            with pytest.raises(UserError, match="the KV cache is rounded to 4 bits"):
                describe(model, kv, format)
        assert layout_of(describe(model, KVScheme(bits=16))) != "graftwork"


def test_dense_refuses_what_it_would_lose() -> None:
    cases = {
        "has a rotation of its inputs": lambda name, linear: rounded(
            linear, rotation=rotation(linear.in_features)
        ),
        "has a correction": lambda name, linear: rounded(
            linear, correction=(linear.weight[:, :2], linear.weight[:2])
        ),
        "the inputs of '.*' are rounded": lambda name, linear: rounded(linear, activations=HALF),
        "is a product of two matrices": lambda name, linear: factored(linear),
    }
    for why, make in cases.items():
        with pytest.raises(UserError, match=f"format 'dense' cannot hold the model: .*{why}"):
            describe(model_with(make), format="dense")
    assert describe(model_with(lambda name, linear: rounded(linear)), format="dense") is None


def test_our_layout_can_be_asked_for() -> None:
    assert (
        layout_of(describe(model_with(lambda name, linear: rounded(linear)), format="graftwork"))
        == "graftwork"
    )


def test_later_layers_may_need_more_but_not_other_tensors() -> None:
    check_change("dense", "pack-quantized")
    check_change("pack-quantized", "graftwork")
    check_change("int-quantized", "int-quantized")
    for after in ("pack-quantized", "graftwork"):
        with pytest.raises(UserError, match="set format 'graftwork'"):
            check_change("int-quantized", after)


def test_what_check_change_allows_is_stored_alike() -> None:
    plain = tiny_model().model.layers[0]
    packed = replace_linears(tiny_model(), lambda name, linear: rounded(linear)).model.layers[0]
    for layer, layouts in (
        (plain, ("dense", "pack-quantized", "graftwork", "int-quantized")),
        (packed, ("pack-quantized", "graftwork")),
    ):
        stored = [layer_tensors("l", layer, layout) for layout in layouts]
        for other in stored[1:]:
            assert other.keys() == stored[0].keys()
            assert all(torch.equal(other[name], stored[0][name]) for name in other)


def test_fitting_is_checked_per_layer() -> None:
    layer = describe_layer("model.layers.7", nn.ModuleDict({"up": factored(nn.Linear(16, 16))}))
    check_fits("graftwork", layer)
    with pytest.raises(UserError, match=r"'model.layers.7.up' is a product"):
        check_fits("pack-quantized", layer)
    assert choose("auto", layer) == "graftwork"


# ---------------------------------------------------------------------- what compressed-tensors would compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_are_rounded_to_the_same_numbers(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    scheme = ActivationScheme(bits=bits, symmetric=symmetric, convention="half-range")
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True)
    source = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 64, 32, generator=source) * torch.rand(4, 64, 1, generator=source).mul(8).exp2()).to(
        dtype
    )
    x[0, 0] = 0
    x[0, 1] = x[0, 1].abs()
    theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, nn.Module()), args)
    assert torch.equal(fake_quantize_tokens(x, scheme), theirs)


# ---------------------------------------------------------------------- config.json


def test_one_scheme_targets_all_linears() -> None:
    config = describe(model_with(lambda name, linear: rounded(linear)))
    assert config is not None
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        "dynamic": False,
        "actorder": None,
    }
    assert group["input_activations"] is None
    assert group["format"] == "pack-quantized"


def test_their_library_accepts_every_config() -> None:
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig

    for bits, symmetric, group, activations in product(
        (2, 3, 4, 8), (True, False), (None, 16), (None, HALF, ActivationScheme(bits=8))
    ):

        def make(name: str, linear: nn.Linear, bits: int = bits, **parts: Any) -> nn.Module:
            return rounded(linear, bits, **parts)

        parts = {"symmetric": symmetric, "group": group, "activations": activations}
        config = describe(model_with(partial(make, **parts)), format="compressed-tensors")
        assert config is not None
        assert config["version"] == __version__
        json.dumps(config)
        QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "version"})


def test_skipped_linears_are_ignored_and_several_schemes_are_named() -> None:
    def make(name: str, linear: nn.Linear) -> nn.Module:
        if name.endswith("layers.0.mlp.down_proj"):
            return linear
        return rounded(linear, 8 if "o_proj" in name else 4)

    config = describe(model_with(make))
    assert config is not None
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    by_bits = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert by_bits[8] == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert len(by_bits[4]) == 2 * 7 - 2 - 1


def test_our_config_says_what_each_module_holds() -> None:
    def make(name: str, linear: nn.Linear) -> nn.Module:
        if "down_proj" in name:
            return factored(linear)
        if name == "model.layers.1.mlp.up_proj":
            return linear
        return rounded(linear, rotation=rotation(linear.in_features), activations=ActivationScheme(bits=4))

    model = model_with(make, num_hidden_layers=4)
    config = describe(model, KVScheme(bits=4, rotate_keys=True))
    assert config is not None
    assert config["kv"] == {"bits": 4, "rotate_keys": True}
    names = {
        name: {k: v for k, v in group.items() if k != "modules"}
        for group in config["groups"]
        for name in module_names(group["modules"])
    }
    described = describe_layer("", model)
    assert names == {name: settings for name, settings in described.items() if settings is not None}
    assert "model.layers.1.mlp.up_proj" not in names
    modules = {template: spans for group in config["groups"] for template, spans in group["modules"].items()}
    assert modules["model.layers.*.mlp.up_proj"] == [[0, 0], [2, 3]]
    assert modules["model.layers.*.self_attn.q_proj"] == [[0, 3]]
    assert json.loads(json.dumps(config)) == config


def test_layers_described_one_by_one_combine_to_the_whole() -> None:
    model = model_with(lambda name, linear: rounded(linear, rotation=rotation(linear.in_features)))
    layers = [describe_layer(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)]
    assert combine(layers) == describe(model)


def test_config_json_keeps_the_base_type_apart() -> None:
    base = {"model_type": "llama", "hidden_size": 32}
    ours = describe(model_with(lambda name, linear: factored(linear)))
    written = checkpoint_config({**base, "quantization_config": ours})
    assert (written["model_type"], written["base_model_type"]) == ("graftwork-compressed", "llama")
    assert index_name(written) != "model.safetensors.index.json"
    theirs = describe(model_with(lambda name, linear: rounded(linear)))
    written = checkpoint_config({**base, "quantization_config": theirs})
    assert written == {**base, "quantization_config": theirs}
    assert index_name(written) == "model.safetensors.index.json"
    assert checkpoint_config({**base, "quantization_config": None}) == base


# ---------------------------------------------------------------------- tensors


def test_whole_bytes_are_stored_as_int8() -> None:
    layer = rounded(nn.Linear(32, 24, bias=True), 8, symmetric=False, activations=HALF)
    stored = layer_tensors("x", nn.ModuleDict({"y": layer}), "int-quantized")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "x.y.bias": torch.float32,
        "x.y.weight": torch.int8,
        "x.y.weight_scale": torch.float32,
        "x.y.weight_zero_point": torch.int8,
    }
    zero = stored["x.y.weight_zero_point"].repeat_interleave(16, 1)
    scale = stored["x.y.weight_scale"].repeat_interleave(16, 1)
    assert torch.equal((stored["x.y.weight"].float() - zero.float()) * scale, layer.dense_weight())


def test_dense_stores_the_numbers_and_nothing_else() -> None:
    layer = rounded(nn.Linear(32, 24))
    stored = layer_tensors("x", nn.ModuleDict({"y": layer, "norm": nn.LayerNorm(4)}), "dense")
    assert sorted(stored) == ["x.norm.bias", "x.norm.weight", "x.y.bias", "x.y.weight"]
    assert torch.equal(stored["x.y.weight"], layer.dense_weight())


def test_linears_that_share_a_rotation_are_stored_one_by_one() -> None:
    shared = rotation(32)
    layer = nn.ModuleDict({name: CompressedLinear(torch.ones(8, 32), rotation=shared) for name in ("q", "k")})
    stored = layer_tensors("x", layer, "graftwork")
    assert stored["x.q.rotation_signs"].data_ptr() != stored["x.k.rotation_signs"].data_ptr()


# ---------------------------------------------------------------------- input


def test_a_quantised_model_is_no_input() -> None:
    config = tiny_model().config
    check_not_quantized(config, "m")
    for method in ("compressed-tensors", "gptq", "graftwork"):
        config.quantization_config = {"quant_method": method}
        with pytest.raises(
            UserError, match=rf"model 'm' is quantised already \({method}\).*made from"
        ) as caught:
            check_not_quantized(config, "m")
        assert "\n" not in str(caught.value)
