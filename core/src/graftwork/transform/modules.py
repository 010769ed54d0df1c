"""Linear layers whose weights are rounded or factored, as they run and as they are stored.

A layer of this kind holds its tensors under the names that compressed-tensors gives them (``weight_packed``,
``weight_scale``, ``weight_zero_point``, ``weight_shape``), and what that format has no name for under names of ours
(``rotation_signs``, ``rotation_orthogonal``, ``correction_left``, ``correction_right``). A state dict is therefore what
goes to disk.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.errors import UserError
from graftwork.transform.hadamard import hadamard
from graftwork.transform.quantizer import Quantized, fake_quantize_tokens
from graftwork.transform.scheme import ActivationScheme, WeightScheme

PACKING = "compressed_tensors.compressors.pack_quantized.helpers"
OLDEST_PACKING = (0, 18)
"""From this version on 3, 5, 6 and 7 bits are packed without gaps; before, each word held whole values only."""


def packing() -> ModuleType:
    """Return compressed-tensors' module with ``pack_to_int32`` and ``unpack_from_int32``.

    Raises:
        UserError: it is not installed, or is of a version that packs some bits otherwise.
    """
    cure = "`pip install 'graftwork[compress]'` brings the right one"
    try:
        version = importlib.metadata.version("compressed-tensors")
        module = importlib.import_module(PACKING)
    except (ImportError, importlib.metadata.PackageNotFoundError):
        raise UserError(
            f"rounded weights are packed by compressed-tensors, which is not there; {cure}"
        ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_PACKING:
        oldest = ".".join(map(str, OLDEST_PACKING))
        raise UserError(
            f"compressed-tensors {version} packs 3, 5, 6 and 7 bits otherwise than those after it; "
            f"{oldest} or newer is needed, and {cure}"
        )
    return module


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of the last axis: random signs, a Hadamard matrix per block, an orthogonal one per block.

    ``signs``: (d,) int8 of 1 and -1. ``block`` divides d. ``orthogonal``: (d/k, k, k) float32 or None; its ``k`` need
    not be ``block``. Called on ``x`` (..., d) it gives ``(x * signs) blockdiag(H) blockdiag(O)`` in float32 (float64
    stays so). Gradients reach ``x`` and ``orthogonal``.
    """

    block: int
    signs: Tensor
    orthogonal: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        turned = hadamard(wide * self.signs.to(wide), self.block)
        if self.orthogonal is None:
            return turned
        blocks, size, _ = self.orthogonal.shape
        parts = turned.unflatten(-1, (blocks, size))
        return torch.einsum("...nk,nkl->...nl", parts, self.orthogonal.to(wide)).flatten(-2)


class CompressedLinear(nn.Module):
    """``y = Qa(rotate(x)) W^T + (x right^T) left^T + bias``, with every part but ``W`` optional.

    ``Qa`` rounds each token (see :class:`ActivationScheme`). It sees the rotated input in float32 where there is a
    rotation, else ``x`` as it is; its result has the dtype of ``x``. ``W`` (out x in), which belongs to rotated inputs,
    is an ordinary parameter ``weight`` or is held in packed integers. The correction sees the plain input.

    Packed integers are turned to numbers at the first forward pass and these are kept until :meth:`forget`. They are
    the same whenever and wherever that is done.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    weight_shape: Tensor | None
    rotation_signs: Tensor | None
    rotation_orthogonal: Tensor | None
    correction_left: nn.Parameter | None
    correction_right: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor | Quantized,
        bias: Tensor | None = None,
        *,
        rotation: Rotation | None = None,
        activations: ActivationScheme | None = None,
        correction: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Make a layer of these parts; ``correction`` is (left: out x r, right: r x in)."""
        super().__init__()
        shape = weight.codes.shape if isinstance(weight, Quantized) else weight.shape
        self.out_features, self.in_features = int(shape[0]), int(shape[1])
        self.weights: WeightScheme | None = None
        self._dense: Tensor | None = None
        self.register_parameter("bias", _parameter(bias))
        for name in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
            self.register_buffer(name, None)
        self.register_buffer("rotation_signs", None)
        self.register_buffer("rotation_orthogonal", None)
        if isinstance(weight, Quantized):
            self.register_parameter("weight", None)
            self.quantized(weight)
        else:
            self.register_parameter("weight", _parameter(weight))
        self.rotated(rotation)
        self.activations = activations if activations is not None and activations.rounds else None
        self.corrected(correction)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rotation: Rotation | None = None,
        activations: ActivationScheme | None = None,
        correction: tuple[Tensor, Tensor] | None = None,
    ) -> CompressedLinear:
        """Return a layer with the weight and the bias of ``linear``, which are shared, not copied."""
        return cls(
            linear.weight, linear.bias, rotation=rotation, activations=activations, correction=correction
        )

    # ------------------------------------------------------------------ parts

    @property
    def is_quantized(self) -> bool:
        return self.weights is not None

    @property
    def rotation(self) -> Rotation | None:
        if self.rotation_signs is None:
            return None
        return Rotation(self.rotation_block, self.rotation_signs, self.rotation_orthogonal)

    @property
    def correction(self) -> tuple[Tensor, Tensor] | None:
        if self.correction_left is None or self.correction_right is None:
            return None
        return self.correction_left, self.correction_right

    def quantized(self, weight: Quantized) -> CompressedLinear:
        """Put rounded numbers in the place of the weight, and return the layer itself."""
        if tuple(weight.codes.shape) != (self.out_features, self.in_features):
            raise ValueError(f"codes {tuple(weight.codes.shape)} for a weight {self._size()}")
        bits = weight.scheme.bits
        pack = packing().pack_to_int32
        self.weight = None
        self.forget()
        # How a range was found leaves no trace in the stored integers: only what is needed to read them is kept.
        self.weights = weight.scheme.model_copy(update={"clip": "none"})
        self.weight_packed = pack(weight.codes, bits)
        self.weight_scale = _copy(weight.scale, weight.scale.dtype)
        self.weight_zero_point = None if weight.zero is None else pack(weight.zero, bits, packed_dim=0)
        self.weight_shape = torch.tensor(weight.codes.shape, device=weight.codes.device)
        return self

    def rotated(self, rotation: Rotation | None) -> CompressedLinear:
        """Rotate inputs so from now on (the weight is left as it is), and return the layer itself."""
        if rotation is not None and (
            tuple(rotation.signs.shape) != (self.in_features,) or self.in_features % rotation.block
        ):
            raise ValueError(
                f"rotation of {len(rotation.signs)} by {rotation.block} for a weight {self._size()}"
            )
        self.rotation_block = 0 if rotation is None else rotation.block
        # Copies: linears that share a rotation are stored one by one, and may be on several devices.
        orthogonal = None if rotation is None else rotation.orthogonal
        self.rotation_signs = None if rotation is None else _copy(rotation.signs, torch.int8)
        self.rotation_orthogonal = None if orthogonal is None else _copy(orthogonal, torch.float32)
        return self

    def corrected(self, correction: tuple[Tensor, Tensor] | None) -> CompressedLinear:
        """Add ``(x right^T) left^T`` from now on, and return the layer itself."""
        left, right = correction if correction is not None else (None, None)
        if left is not None and right is not None:
            rank = left.shape[1]
            if left.shape != (self.out_features, rank) or right.shape != (rank, self.in_features):
                raise ValueError(f"correction {tuple(left.shape)} x {tuple(right.shape)} of a {self._size()}")
        self.register_parameter("correction_left", _parameter(left))
        self.register_parameter("correction_right", _parameter(right))
        return self

    # ------------------------------------------------------------------ numbers

    def codes(self) -> Quantized:
        """Return what is packed. Raises ValueError where nothing is."""
        if self.weights is None or self.weight_packed is None or self.weight_scale is None:
            raise ValueError("the weight is not rounded")
        unpack = packing().unpack_from_int32
        bits, rows = self.weights.bits, torch.Size((self.out_features, self.weight_scale.shape[1]))
        zero = self.weight_zero_point
        return Quantized(
            codes=unpack(self.weight_packed, bits, torch.Size((self.out_features, self.in_features))),
            scale=self.weight_scale,
            zero=None if zero is None else unpack(zero, bits, rows, packed_dim=0),
            scheme=self.weights,
        )

    def dense_weight(self) -> Tensor:
        """Return ``W`` (out x in) as numbers: the parameter itself, or the packed integers times their scales."""
        if self.weight is not None:
            return self.weight
        if self._dense is None:
            with torch.no_grad():
                self._dense = self.codes().dequantized()
        return self._dense

    def forget(self) -> None:
        """Free the numbers that the packed integers were turned to."""
        self._dense = None

    def effective_input(self, x: Tensor) -> Tensor:
        """Return what ``W`` is multiplied with: ``Qa(rotate(x))`` in the dtype of ``x``."""
        rotation = self.rotation
        seen = x if rotation is None else rotation(x)
        if self.activations is not None:
            seen = fake_quantize_tokens(seen, self.activations)
        return seen.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(self.effective_input(x), self.dense_weight(), self.bias)
        if self.correction_left is not None and self.correction_right is not None:
            low = functional.linear(x, self.correction_right)
            y = y + functional.linear(low, self.correction_left)
        return y

    def bits(self) -> int:
        """Return the bits of all that is stored of this layer: codes with their filling, scales, rotation, bias."""
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    # ------------------------------------------------------------------ structure without numbers

    def settings(self) -> dict[str, Any]:
        """Return what :meth:`from_settings` needs to build a layer of the same shapes; ready for JSON."""
        orthogonal = self.rotation_orthogonal
        weights = self.weights
        rotation = None
        if self.rotation_signs is not None:
            rotation = {
                "block": self.rotation_block,
                "orthogonal": None if orthogonal is None else orthogonal.shape[1],
            }
        return {
            "bias": self.bias is not None,
            "weights": None
            if weights is None
            else {"bits": weights.bits, "group": weights.group, "symmetric": weights.symmetric},
            "activations": None if self.activations is None else self.activations.model_dump(),
            "rotation": rotation,
            "correction": None if self.correction_left is None else self.correction_left.shape[1],
        }

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], rows: int, columns: int, dtype: torch.dtype
    ) -> CompressedLinear:
        """Return a layer (out ``rows``, in ``columns``) without numbers, on the meta device.

        Raises:
            pydantic.ValidationError, KeyError: ``settings`` are not those of :meth:`settings`.
        """

        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        rotation, rank, scheme = settings["rotation"], settings["correction"], settings["weights"]
        activations = settings["activations"]
        layer = cls(
            empty(rows, columns),
            empty(rows) if settings["bias"] else None,
            activations=None if activations is None else ActivationScheme.model_validate(activations),
            correction=None if rank is None else (empty(rows, rank), empty(rank, columns)),
        )
        if rotation is not None:
            size = rotation["orthogonal"]
            orthogonal = None if size is None else empty(columns // size, size, size, of=torch.float32)
            layer.rotated(Rotation(rotation["block"], empty(columns, of=torch.int8), orthogonal))
        if scheme is not None:
            weights = WeightScheme.model_validate(scheme)
            groups = 1 if weights.group is None else columns // weights.group
            layer.weight, layer.weights = None, weights
            layer.weight_packed = empty(rows, _words(columns, weights.bits), of=torch.int32)
            layer.weight_scale = empty(rows, groups)
            if not weights.symmetric:
                layer.weight_zero_point = empty(_words(rows, weights.bits), groups, of=torch.int32)
            layer.weight_shape = empty(2, of=torch.int64)
        return layer

    # ------------------------------------------------------------------ torch

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CompressedLinear:
        """Move or cast; what was unpacked is unpacked anew, and a rotation stays in float32, where it is orthogonal."""
        self.forget()
        exact = self.rotation_orthogonal
        super()._apply(fn, recurse)
        cast_to = self.rotation_orthogonal
        if exact is not None and cast_to is not None and cast_to.dtype != exact.dtype:
            self.rotation_orthogonal = exact.to(cast_to.device)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **options)

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        ]
        if self.weights is not None:
            group = "row" if self.weights.group is None else self.weights.group
            parts.append(f"bits={self.weights.bits}, group={group}, symmetric={self.weights.symmetric}")
        if self.activations is not None:
            parts.append(f"activations={self.activations.bits}")
        if self.rotation_signs is not None:
            parts.append(f"rotation={self.rotation_block}")
        if self.correction_left is not None:
            parts.append(f"correction={self.correction_left.shape[1]}")
        return ", ".join(parts)

    def _size(self) -> str:
        return f"{self.out_features} x {self.in_features}"


class Factored(nn.Sequential):
    """A weight as a product: layer ``0`` from the inputs to the rank, layer ``1`` from the rank to the outputs."""

    def __init__(self, first: CompressedLinear, second: CompressedLinear) -> None:
        if first.out_features != second.in_features:
            raise ValueError(f"factors of rank {first.out_features} and {second.in_features} make no product")
        super().__init__(first, second)

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Factored:
        """Return ``y = left (right x) + bias`` for ``left`` (out x r) and ``right`` (r x in)."""
        return cls(CompressedLinear(right), CompressedLinear(left, bias))

    @property
    def first(self) -> CompressedLinear:
        return cast(CompressedLinear, self[0])

    @property
    def second(self) -> CompressedLinear:
        return cast(CompressedLinear, self[1])

    @property
    def in_features(self) -> int:
        return self.first.in_features

    @property
    def out_features(self) -> int:
        return self.second.out_features

    @property
    def rank(self) -> int:
        return self.first.out_features

    @property
    def is_quantized(self) -> bool:
        return self.first.is_quantized and self.second.is_quantized

    def dense_weight(self) -> Tensor:
        """Return the product of both weights (out x in); without a rotation it is the weight that acts."""
        return self.second.dense_weight() @ self.first.dense_weight()

    def forget(self) -> None:
        self.first.forget()
        self.second.forget()

    def bits(self) -> int:
        return self.first.bits() + self.second.bits()


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or (isinstance(tensor, nn.Parameter) and tensor.is_contiguous()):
        return tensor
    # Another order in memory is another order of summation: a model must compute with what is stored.
    return nn.Parameter(tensor.detach().contiguous())


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)


def _words(values: int, bits: int) -> int:
    """Return the 32-bit words that ``values`` numbers of ``bits`` fill."""
    return -(-values * bits // 32)
