"""Rounding while scales and rotations are learned: what the kernels do in one pass, from the schemes of the core.

Values are those of the core's ``fake_quantize_tokens`` and ``fake_quantize_weight`` (float32; bit for bit on a CPU), so
what is learned is what is stored.
"""

from __future__ import annotations

import functools

import torch
from graftwork.transform.hadamard import hadamard_matrix, has_hadamard
from graftwork.transform.modules import Rotation
from graftwork.transform.quantizer import TOKEN_FLOOR, fake_quantize_weight
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from graftwork_kernels.scaled_quantize import Rounding, fake_scaled_quantize

LEAST_SCALE = 1e-30
"""Of weights; only a slice of zeros has less."""


def fake_tokens(
    x: torch.Tensor,
    scheme: ActivationScheme,
    scale: torch.Tensor | None = None,
    rotation: Rotation | None = None,
    ratio: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``Qa(rotation(x * scale))`` (..., d) in float32 or wider; ``ratio`` of each token's range is kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    block, core = 1, None
    if rotation is not None and scheme.rounds and rotation.orthogonal is None:
        signs = rotation.signs.to(x.device, wide)
        scale = signs if scale is None else scale * signs
        block, core = rotation.block, hadamard_core(rotation.block, x.device)
    elif rotation is not None:
        # Learned or dense matrices are products of their own.
        x, scale = rotation(x.to(wide) if scale is None else x.to(wide) * scale), None
    if not scheme.rounds:
        return x.to(wide) if scale is None else x.to(wide) * scale
    rounding = Rounding(
        scheme.bits,
        symmetric=scheme.symmetric,
        half_range=scheme.convention == "half-range",
        ratio=scheme.ratio,
        floor=TOKEN_FLOOR,
    )
    return fake_scaled_quantize(x, rounding, scale, block=block, core=core, high=ratio, low=ratio, dtype=wide)


def fake_weight(
    weight: torch.Tensor, scheme: WeightScheme, high: torch.Tensor | None, low: torch.Tensor | None
) -> torch.Tensor:
    """Return the weight (out x in, float32 or wider) that rounding would leave; shares (out x groups) or None."""
    if not scheme.rounds or (high is None and scheme.clip != "none"):
        # The range with the least error is looked for in many passes.
        return fake_quantize_weight(weight, scheme, high, low)
    rounding = Rounding(
        scheme.bits, scheme.group, scheme.symmetric, scheme.convention == "half-range", floor=LEAST_SCALE
    )
    return fake_scaled_quantize(weight, rounding, high=high, low=low)


@functools.lru_cache(maxsize=16)
def hadamard_core(block: int, device: torch.device) -> torch.Tensor | None:
    """Return the part of a Hadamard matrix (block) that is no power of two, of 1 and -1; None where there is none."""
    order = next(
        n for n in range(1, block + 1)
        if has_hadamard(n) and block % n == 0 and not (block // n) & (block // n - 1)
    )  # fmt: skip
    if order == 1:
        return None
    # Made in inference mode, it could take no part in training later.
    with torch.inference_mode(False):
        return (hadamard_matrix(order) * order**0.5).round().float().to(device)
