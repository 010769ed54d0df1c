"""Layers with rounded, rotated, corrected or factored weights: what they compute, hold and store."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.transform.hadamard import hadamard_matrix
from graftwork.transform.modules import CompressedLinear, Factored, Rotation, packing
from graftwork.transform.quantizer import fake_quantize_tokens, quantize_weight
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from torch import nn

ROWS, COLUMNS = 24, 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotation(columns: int = COLUMNS, block: int = 16, orthogonal: int | None = None) -> Rotation:
    signs = torch.where(drawn(columns, seed=5) > 0, 1, -1).to(torch.int8)
    turns = None
    if orthogonal is not None:
        turns = torch.linalg.qr(drawn(columns // orthogonal, orthogonal, orthogonal, seed=6)).Q
    return Rotation(block, signs, turns)


def rotation_matrix(turn: Rotation) -> torch.Tensor:
    """The rotation as one matrix (d x d, float64), from its definition."""
    columns = len(turn.signs)
    matrix = torch.diag(turn.signs.double()) @ torch.block_diag(
        *[hadamard_matrix(turn.block)] * (columns // turn.block)
    )
    if turn.orthogonal is not None:
        matrix = matrix @ torch.block_diag(*turn.orthogonal.double())
    return matrix


def whole_layer(dtype: torch.dtype = torch.float32, **changes: Any) -> CompressedLinear:
    """A layer that has everything."""
    scheme = WeightScheme(bits=4, group=16, symmetric=False)
    parts: dict[str, Any] = {
        "bias": drawn(ROWS, seed=2, dtype=dtype),
        "rotation": rotation(orthogonal=8),
        "activations": ActivationScheme(bits=6),
        "correction": (drawn(ROWS, 3, seed=3, dtype=dtype), drawn(3, COLUMNS, seed=4, dtype=dtype)),
        **changes,
    }
    return CompressedLinear(quantize_weight(drawn(ROWS, COLUMNS, dtype=dtype), scheme), **parts)


def test_a_layer_with_nothing_special_is_the_linear() -> None:
    linear = nn.Linear(COLUMNS, ROWS)
    layer, x = CompressedLinear.from_linear(linear), drawn(5, COLUMNS)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias


def test_the_rotation_is_the_product_of_its_matrices() -> None:
    x = drawn(7, COLUMNS)
    for orthogonal in (None, 8, 48):
        turn = rotation(orthogonal=orthogonal)
        matrix = rotation_matrix(turn)
        assert torch.allclose(matrix @ matrix.T, torch.eye(COLUMNS, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(turn(x).double(), x.double() @ matrix, atol=1e-5)
        assert turn(x.bfloat16()).dtype == torch.float32


def test_the_output_is_that_of_the_formula() -> None:
    layer, x = whole_layer(), drawn(2, 5, COLUMNS, seed=9)
    assert layer.rotation is not None
    assert layer.correction is not None
    assert layer.bias is not None
    seen = fake_quantize_tokens(layer.rotation(x), ActivationScheme(bits=6)).double()
    left, right = (part.double() for part in layer.correction)
    weight = quantize_weight(
        drawn(ROWS, COLUMNS), WeightScheme(bits=4, group=16, symmetric=False)
    ).dequantized()
    wanted = seen @ weight.double().T + x.double() @ right.T @ left.T + layer.bias.double()
    assert torch.allclose(layer(x).double(), wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 7, None), (24, 48, 16)])
def test_what_was_rounded_comes_back_bit_for_bit(
    dtype: torch.dtype, bits: int, symmetric: bool, rows: int, columns: int, group: int | None
) -> None:
    scheme = WeightScheme(bits=bits, group=group, symmetric=symmetric)
    weight = drawn(rows, columns, dtype=dtype)
    # The extremes of the range are there, the lowest code too.
    weight[0, 0], weight[1, 1] = 9, -9
    rounded = quantize_weight(weight, scheme)
    rounded.codes[0, 1] = -(2 ** (bits - 1))
    layer = CompressedLinear.from_linear(nn.Linear(columns, rows, dtype=dtype)).quantized(rounded)
    again = layer.codes()
    assert torch.equal(again.codes, rounded.codes)
    assert torch.equal(again.scale, rounded.scale)
    if rounded.zero is None:
        assert again.zero is None
    else:
        assert torch.equal(again.zero, rounded.zero)  # pyright: ignore[reportArgumentType]
    assert torch.equal(layer.dense_weight(), rounded.dequantized())
    assert layer.dense_weight().dtype == dtype
    assert layer.weight_packed is not None
    assert layer.weight_packed.shape[1] == -(-columns * bits // 32)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_the_same_weight(bits: int, symmetric: bool) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=16)
    rounded = quantize_weight(drawn(ROWS, COLUMNS), WeightScheme(bits=bits, group=16, symmetric=symmetric))
    layer = CompressedLinear(rounded)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(
        dict(layer.state_dict()), QuantizationScheme(targets=["Linear"], weights=args)
    )
    assert torch.equal(theirs["weight"], layer.dense_weight())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_dict_round_trips(dtype: torch.dtype) -> None:
    layer, x = whole_layer(dtype), drawn(5, COLUMNS, dtype=dtype)
    empty = CompressedLinear.from_settings(layer.settings(), ROWS, COLUMNS, dtype)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    assert empty.settings() == layer.settings()


def test_loading_other_numbers_into_a_layer_is_seen() -> None:
    layer, x = whole_layer(), drawn(5, COLUMNS)
    other = CompressedLinear(
        quantize_weight(drawn(ROWS, COLUMNS, seed=8), WeightScheme(bits=4, group=16, symmetric=False)),
        drawn(ROWS),
        rotation=rotation(orthogonal=8),
        activations=ActivationScheme(bits=6),
        correction=(drawn(ROWS, 3, seed=3), drawn(3, COLUMNS, seed=4)),
    )
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_another_dtype_casts_the_scales_and_leaves_the_rotation() -> None:
    layer = whole_layer()
    layer(drawn(5, COLUMNS))
    before = layer.rotation_orthogonal
    layer.to(torch.bfloat16)
    assert layer.rotation_orthogonal is not None
    assert before is not None
    assert layer.rotation_orthogonal.dtype == torch.float32
    assert torch.equal(layer.rotation_orthogonal, before)
    assert layer.weight_packed is not None
    assert layer.weight_packed.dtype == torch.int32
    assert layer.dense_weight().dtype == torch.bfloat16
    assert layer(drawn(5, COLUMNS, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_reach_the_input() -> None:
    layer = CompressedLinear(
        quantize_weight(drawn(ROWS, COLUMNS), WeightScheme(bits=4)),
        correction=(drawn(ROWS, 3, seed=3), drawn(3, COLUMNS, seed=4)),
    )
    x = drawn(5, COLUMNS, seed=1).requires_grad_()
    layer(x).sum().backward()
    left, right = drawn(ROWS, 3, seed=3), drawn(3, COLUMNS, seed=4)
    assert x.grad is not None
    assert torch.allclose(x.grad, (layer.dense_weight() + left @ right).sum(0).expand(5, -1), atol=1e-4)
    everything = whole_layer()
    x.grad = None
    everything(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_the_numbers_are_kept_until_they_are_dropped() -> None:
    layer = CompressedLinear(quantize_weight(drawn(ROWS, COLUMNS), WeightScheme(bits=4)))
    layer(drawn(5, COLUMNS))
    kept = layer.dense_weight()
    assert layer.dense_weight() is kept
    layer.forget()
    assert layer.dense_weight() is not kept
    assert torch.equal(layer.dense_weight(), kept)
    assert "weight" not in layer.state_dict()


def test_bits_are_those_of_everything_stored() -> None:
    layer = whole_layer(torch.float16)
    codes, scales, zeros = 24 * 48 * 4, 24 * 3 * 16, 24 * 3 * 4
    turns, correction, bias, shape = 48 * 8 + 6 * 8 * 8 * 32, (24 * 3 + 3 * 48) * 16, 24 * 16, 2 * 64
    assert layer.bits() == codes + scales + zeros + turns + correction + bias + shape


@pytest.mark.parametrize("rounded", [True, False])
def test_a_product_of_two(rounded: bool) -> None:
    left, right, bias = drawn(ROWS, 6), drawn(6, COLUMNS, seed=1), drawn(ROWS, seed=2)
    layer, x = Factored.from_factors(left, right, bias), drawn(5, COLUMNS, seed=3)
    if rounded:
        for part in (layer.first, layer.second):
            part.quantized(quantize_weight(part.dense_weight(), WeightScheme(bits=4)))
        left, right = layer.second.dense_weight(), layer.first.dense_weight()
    assert (layer.in_features, layer.rank, layer.out_features) == (COLUMNS, 6, ROWS)
    assert torch.allclose(layer(x), x @ right.T @ left.T + bias, atol=1e-4)
    assert torch.allclose(layer.dense_weight(), left @ right, atol=1e-5)
    assert layer.is_quantized == rounded
    assert layer.bits() == layer.first.bits() + layer.second.bits()


def test_shapes_that_do_not_fit_are_refused() -> None:
    layer = CompressedLinear(drawn(ROWS, COLUMNS))
    with pytest.raises(ValueError, match="codes"):
        layer.quantized(quantize_weight(drawn(ROWS, COLUMNS + 1), WeightScheme(bits=4)))
    with pytest.raises(ValueError, match="rotation"):
        layer.rotated(rotation(32))
    with pytest.raises(ValueError, match="correction"):
        layer.corrected((drawn(ROWS, 3), drawn(2, COLUMNS)))
    with pytest.raises(ValueError, match="no product"):
        Factored(CompressedLinear(drawn(5, COLUMNS)), CompressedLinear(drawn(ROWS, 6)))
    with pytest.raises(ValueError, match="not rounded"):
        layer.codes()


def test_an_old_or_missing_packer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    with pytest.raises(
        UserError, match=r"0\.17\.1 packs 3, 5, 6 and 7 bits otherwise.*graftwork\[compress\]"
    ):
        packing()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"not there; `pip install 'graftwork\[compress\]'`"):
        packing()


def test_parts_in_another_order_in_memory_compute_with_what_is_stored() -> None:
    turned = rotation(orthogonal=8)
    assert turned.orthogonal is not None
    turned = Rotation(turned.block, turned.signs, turned.orthogonal.mT)
    layer = CompressedLinear(
        drawn(COLUMNS, ROWS).T, rotation=turned, correction=(drawn(3, ROWS).T, drawn(COLUMNS, 3).T)
    )
    assert all(tensor.is_contiguous() for tensor in layer.state_dict().values())
    assert torch.equal(layer.dense_weight(), drawn(COLUMNS, ROWS).T)
    again = CompressedLinear.from_settings(layer.settings(), ROWS, COLUMNS, torch.float32).to_empty(
        device="cpu"
    )
    again.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    x = drawn(5, COLUMNS, seed=9)
    assert torch.equal(again(x), layer(x))
