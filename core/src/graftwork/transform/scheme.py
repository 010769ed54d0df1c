"""How numbers are rounded: bits, who shares a scale, and how the scale comes from the largest value."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from graftwork.errors import UserError

Convention = Literal["largest-level", "half-range"]
"""How a symmetric scale follows from the largest absolute value ``a`` at ``b`` bits.

``largest-level``: ``a / (2^(b-1) - 1)``, so that ``a`` itself is a level. ``half-range``: ``a / ((2^b - 1) / 2)``, as
the library compressed-tensors has it, where the largest positive value is clamped.
"""

FULL = 16
"""So many bits and more are not rounded."""

_SCHEME = re.compile(r"W(\d+)A(\d+)(?:KV(\d+))?", re.IGNORECASE)


class WeightScheme(BaseModel):
    """Rounding of a weight (out x in): a scale per output row, or per ``group`` values of a row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int = Field(default=4, ge=2, le=FULL)
    group: int | None = Field(None, ge=1)
    symmetric: bool = True
    convention: Convention = "largest-level"
    clip: Literal["none", "mse"] = "none"

    @field_validator("bits")
    @classmethod
    def _storable(cls, bits: int) -> int:
        if 8 < bits < FULL:
            raise ValueError("weights have 2 to 8 bits, or 16 (as they are)")
        return bits

    @property
    def rounds(self) -> bool:
        return self.bits < FULL


class ActivationScheme(BaseModel):
    """Rounding of activations, per token, when they are there (dynamic). ``ratio`` of the range is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int = Field(default=8, ge=2, le=FULL)
    symmetric: bool = False
    convention: Convention = "largest-level"
    ratio: float = Field(default=1.0, gt=0, le=1)

    @property
    def rounds(self) -> bool:
        return self.bits < FULL


class KVScheme(BaseModel):
    """Rounding of the keys (after their position is in them) and values: asymmetric, per token and head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int = Field(default=8, ge=2, le=FULL)
    rotate_keys: bool = False

    @property
    def rounds(self) -> bool:
        return self.bits < FULL


class QuantizeOptions(BaseModel):
    """The options of every plugin that rounds."""

    model_config = ConfigDict(extra="forbid")

    scheme: str = Field(
        "W4A16",
        description="bits of weights, activations and KV cache: W4A16, W4A4, W2A4KV16; 16 rounds nothing",
    )
    group: int | None = Field(
        None, ge=1, description="values of a weight's row that share a scale; one scale per row if not set"
    )
    symmetric: bool = Field(
        True, description="weights: levels lie around zero; else each scale has a zero point"
    )
    activation_symmetric: bool = Field(False, description="the same of activations")
    convention: Convention = Field(
        "largest-level",
        description="the largest value is a level, or lies half a level above the last "
        "(half-range, as compressed-tensors has it)",
    )
    clip: Literal["none", "mse"] = Field(
        "none", description="mse: narrow each range to where the rounding error is least"
    )
    activation_ratio: float = Field(
        default=1.0, gt=0, le=1, description="share of a token's range that is kept"
    )

    @field_validator("scheme")
    @classmethod
    def _readable(cls, scheme: str) -> str:
        read_scheme(scheme)
        return scheme.upper()

    @property
    def weights(self) -> WeightScheme:
        return WeightScheme(
            bits=read_scheme(self.scheme)[0],
            group=self.group,
            symmetric=self.symmetric,
            convention=self.convention,
            clip=self.clip,
        )

    @property
    def activations(self) -> ActivationScheme:
        return ActivationScheme(
            bits=read_scheme(self.scheme)[1],
            symmetric=self.activation_symmetric,
            convention=self.convention,
            ratio=self.activation_ratio,
        )

    @property
    def kv(self) -> KVScheme:
        return KVScheme(bits=read_scheme(self.scheme)[2])


def read_scheme(text: str) -> tuple[int, int, int]:
    """Return the bits of weights, activations and KV cache that ``text`` (``W4A4KV4``) names.

    Raises:
        ValueError: another form, or bits that cannot be stored.
    """
    match = _SCHEME.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not of the form W4A16 or W4A4KV4")
    weights, activations, kv = (int(bits or FULL) for bits in match.groups())
    for bits in (weights, activations, kv):
        if bits != FULL and not 2 <= bits <= 8:
            raise ValueError(f"'{text}': {bits} bits are not to be had; 2 to 8, or 16 (as they are)")
    return weights, activations, kv


def check_group(scheme: WeightScheme, columns: int, name: str) -> None:
    """Refuse a group size that does not divide the row of a weight.

    Raises:
        UserError: with the sizes that would.
    """
    group = scheme.group
    if group is None or not scheme.rounds or columns % group == 0:
        return
    divisors = [d for d in range(1, columns + 1) if columns % d == 0]
    near = sorted(sorted(divisors, key=lambda d: abs(d - group))[:4])
    raise UserError(
        f"group size {group} does not divide the {columns} inputs of '{name}'; near it do "
        f"{', '.join(map(str, near))}"
    )
