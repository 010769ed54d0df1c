"""How far a result may be from its float64 reference, for tests of kernels, ours and others'."""

from __future__ import annotations

import torch

# Relative to the largest magnitude that enters an entry (a dot product: the sum of its terms' sizes). A rounded result
# has half an ulp; the interpreter truncates to bfloat16 instead of rounding, which is a whole one.
BOUNDS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def relative_error(found: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """Return the largest |found - wanted| over ``size`` (|wanted| where None; at least the mean of all), 0 if empty.

    Infinities and NaN must stand in the same places; they count as no error there.
    """
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    if not found.numel():
        return 0.0
    finite = wanted.isfinite()
    assert torch.equal(finite, found.isfinite())
    assert torch.equal(found[~finite].nan_to_num(nan=7.0), wanted[~finite].nan_to_num(nan=7.0))
    if not finite.any():
        return 0.0
    magnitude = (wanted if size is None else size.detach().double().cpu().expand_as(wanted)).abs()[finite]
    floor = magnitude.mean().clamp_min(1e-30)
    return float(((found - wanted).abs()[finite] / magnitude.clamp_min(floor)).max())


def assert_within(
    found: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor | None = None, *, factor: float = 1.0
) -> None:
    """Hold ``found`` to the bound of its dtype, times ``factor``."""
    error = relative_error(found, wanted, size)
    assert error <= factor * BOUNDS[found.dtype], f"{error:.3g} > {factor:g} x {BOUNDS[found.dtype]:.3g}"
