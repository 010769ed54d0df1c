"""Second moments of a layer's inputs, added up over batches: K += x^T x over the tokens that count.

The result is symmetric, so only the lower triangle is multiplied (a SYRK: half the arithmetic of a product). Inputs in
16 bits are multiplied as they are and summed in fp32 over at most 4096 tokens, and those sums are added to K in its own
dtype: in float64 no batch is lost however many there are (PaRSP's equation 3; DEM, section "Cost and kernels").

Shape suffixes: N tokens, D width.
"""

from __future__ import annotations

import torch

from graftwork_kernels import dispatch

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns per step of the PyTorch path; narrower, and its products lose more than half the arithmetic saves.
_COLUMNS = 256


def second_moments_reference(
    sum_DD: torch.Tensor, x_ND: torch.Tensor, mask_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Return sum + x^T x over the rows of x that ``mask_N`` keeps, in the sum's dtype: the definition."""
    if mask_N is not None:
        x_ND = x_ND[mask_N]
    x_ND = x_ND.to(sum_DD.dtype)
    return sum_DD + x_ND.T @ x_ND


def add_second_moments_(
    sum_DD: torch.Tensor, x_ND: torch.Tensor, mask_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Add x^T x over the rows of x that ``mask_N`` keeps to ``sum_DD`` in place, and return it. Without gradients.

    Kernels run where all is on a GPU and x is in fp32, bf16 or fp16.

    Args:
        sum_DD: the sum so far, symmetric and contiguous, in fp32 or float64. What a row that does not count holds,
            also if it is no number, changes nothing.
        x_ND: inputs, in any floating dtype.
        mask_N: which rows count, as booleans; all where None.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check(sum_DD, x_ND, mask_N)
    x_ND = x_ND.detach()
    given = [sum_DD, x_ND, *([] if mask_N is None else [mask_N])]
    if dispatch.fused(*given) and x_ND.dtype in _KERNEL_DTYPES:
        torch.ops.graftwork.add_second_moments_(sum_DD, x_ND, mask_N)
        return sum_DD
    if mask_N is not None and torch.compiler.is_compiling():
        # How many rows count is in the data; a graph has sizes only.
        x_ND = torch.where(mask_N[:, None], x_ND, 0)
    elif mask_N is not None:
        x_ND = x_ND[mask_N]
    x_ND = x_ND.to(sum_DD.dtype)
    with torch.no_grad():
        if len(sum_DD) <= _COLUMNS:
            return sum_DD.addmm_(x_ND.T, x_ND)
        for start in range(0, len(sum_DD), _COLUMNS):
            end = min(start + _COLUMNS, len(sum_DD))
            sum_DD[start:end, :end].addmm_(x_ND[:, start:end].T, x_ND[:, :end])
            sum_DD[:start, start:end] = sum_DD[start:end, :start].T
    return sum_DD


def _check(sum_DD: torch.Tensor, x_ND: torch.Tensor, mask_N: torch.Tensor | None) -> None:
    if x_ND.dim() != 2 or sum_DD.shape != (x_ND.shape[1], x_ND.shape[1]):
        raise ValueError(
            f"inputs must be (tokens x width) and their sum (width x width), not {tuple(x_ND.shape)} and "
            f"{tuple(sum_DD.shape)}"
        )
    if sum_DD.dtype not in (torch.float32, torch.float64) or not sum_DD.is_contiguous():
        raise ValueError(f"the sum must be contiguous and in float32 or float64, not {sum_DD.dtype}")
    if mask_N is not None and (mask_N.shape != x_ND.shape[:1] or mask_N.dtype != torch.bool):
        raise ValueError(
            f"the mask must be booleans, one per token, not {mask_N.dtype} of {tuple(mask_N.shape)} for "
            f"{len(x_ND)} tokens"
        )


if dispatch.HAS_TRITON:
    from graftwork_kernels import second_moments_triton as kernels

    @torch.library.custom_op("graftwork::add_second_moments_", mutates_args=("sum",))
    def _op(sum: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add x^T x to ``sum``."""
        kernels.add(sum, x.contiguous(), None if mask is None else mask.contiguous())

    @_op.register_fake
    def _(sum: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        return None
