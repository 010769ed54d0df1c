"""Rounding with error feedback: what one column loses, the columns after it make good.

For a weight ``W`` (out x in) and second moments ``H = sum x x^T`` of its inputs, columns are rounded one after another.
The error of a column is spread over those not yet rounded so that ``tr((W - W^) H (W - W^)^T)``, the squared error of
the outputs, grows least. With ``H^-1 = U^T U``, ``U`` upper triangular, that is
``W_{:,k} -= (w_j - q_j) U_jk / U_jj`` for all ``k > j``.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from graftwork.errors import UserError
from graftwork.transform.quantizer import Quantized, levels, quantize_weight, weight_scales
from graftwork.transform.scheme import WeightScheme

Order = Literal["given", "importance"]
"""``given``: columns as they stand. ``importance``: those with the largest moments first."""


@torch.no_grad()
def round_with_feedback(
    weight: Tensor,
    moments: Tensor,
    scheme: WeightScheme,
    *,
    damp: float = 0.01,
    order: Order = "given",
    block: int = 128,
    singular: Literal["raise", "nearest"] = "raise",
    name: str = "",
) -> Quantized:
    """Round a weight (out x in) column by column, each column's error fed to those after it.

    Scales are set before the first column, from the weight as it is (their groups stay those of the given order).
    Inputs that were always zero have nothing to say: their columns become zero. Factorised in float64, rounded in
    float32 (float64 for such a weight).

    Args:
        weight: out x in.
        moments: in x in, the sum (or any multiple) of ``x x^T``.
        scheme: bits, groups, levels.
        damp: share of the mean of the moments' diagonal that is added to it.
        order: in which columns are rounded.
        block: columns after which the later ones hear of the errors; the result is the same but for summation order.
        singular: what to do where the damped moments have no Cholesky factor: an error, or, with a warning,
            rounding to nearest.
        name: of the weight, for errors.

    Raises:
        UserError: the weight or the moments hold NaN or infinity, no input was ever different from zero, or the
            damped moments are not positive definite.
    """
    if moments.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"moments {tuple(moments.shape)} for a weight {tuple(weight.shape)}")
    if not bool(torch.isfinite(moments).all()):
        raise UserError(
            f"the second moments of the inputs of '{name}' hold NaN or infinity; look at the weights before it, or "
            f"use float32"
        )
    diagonal = moments.diagonal().double()
    dead = diagonal == 0
    columns = torch.arange(weight.shape[1], device=weight.device)
    if order == "importance":
        columns = diagonal.argsort(descending=True, stable=True)
    factor = _spread(moments, dead, damp, columns)
    if factor is None:
        if singular == "raise":
            raise UserError(_trouble(moments, dead, damp, name))
        warnings.warn(f"{_trouble(moments, dead, damp, name)}; it was rounded to nearest", stacklevel=2)
        return quantize_weight(weight, scheme, name)

    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.detach().masked_fill(dead, 0)
    scale, zero = weight_scales(weight, scheme, name)
    codes = torch.empty(weight.shape[1], weight.shape[0], dtype=wide, device=weight.device)
    _round_columns(
        weight.to(wide).t()[columns].contiguous(),
        factor.to(wide),
        codes,
        scale,
        zero,
        (columns // (scheme.group or weight.shape[1])).tolist(),
        scheme.bits,
        block,
    )
    codes[columns] = codes.clone()
    return Quantized(codes.t().to(torch.int8).contiguous(), scale, zero, scheme)


def output_error(difference: Tensor, moments: Tensor) -> float:
    """Return ``tr(D H D^T)``: the squared error of the outputs over all tokens, for ``D = W - W^`` (out x in)."""
    wide = difference.double()
    return float(torch.sum((wide @ moments.double()) * wide))


def _spread(moments: Tensor, dead: Tensor, damp: float, columns: Tensor) -> Tensor | None:
    """Return ``U`` with its rows divided by their diagonal, or None where there is no factor.

    in x in, float64, its columns in the order of ``columns``.

    With the order of columns reversed, a Cholesky factor turns upper triangular: ``H = R R^T``. Then
    ``H^-1 = R^-T R^-1`` and ``U = R^-1``, without the inverse of ``H``.
    """
    if bool(dead.all()):
        return None
    damped = moments.double().clone()
    diagonal = damped.diagonal()
    diagonal[dead] = diagonal[~dead].mean()
    diagonal += damp * diagonal.mean()
    backwards = columns.flip(0)
    lower, info = torch.linalg.cholesky_ex(damped[backwards][:, backwards])
    if int(info):
        return None
    upper = lower.flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse / inverse.diagonal().unsqueeze(1)


def _round_columns(
    rest: Tensor,
    spread: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: list[int],
    bits: int,
    block: int,
) -> None:
    """Fill ``codes`` (in x out) with integers for ``rest`` (in x out), which is used up."""
    # Columns of the weight are rows here: what one step touches lies together.
    scales = scale.to(rest.dtype).t().contiguous()
    zeros = None if zero is None else zero.to(rest.dtype).t().contiguous()
    least, largest = levels(bits)
    stored = scale.dtype
    half = stored != torch.promote_types(stored, torch.float32)
    value = torch.empty_like(rest[0])
    for start in range(0, len(rest), block):
        stop = min(start + block, len(rest))
        wrong = torch.empty_like(rest[start:stop])
        for j in range(start, stop):
            w, q, e, s = rest[j], codes[j], wrong[j - start], scales[groups[j]]
            torch.div(w, s, out=q)
            if zeros is None:
                q.clamp_(least, largest).round_()
                torch.mul(q, s, out=value)
            else:
                z = zeros[groups[j]]
                q.add_(z).clamp_(least, largest).round_()
                torch.sub(q, z, out=value).mul_(s)
            # What will run is the value in the dtype of the scale.
            torch.sub(w, value.to(stored) if half else value, out=e)
            if j + 1 < stop:
                rest[j + 1 : stop].addr_(spread[j, j + 1 : stop], e, alpha=-1)
        if stop < len(rest):
            rest[stop:].addmm_(spread[start:stop, stop:].t(), wrong, alpha=-1)


def _trouble(moments: Tensor, dead: Tensor, damp: float, name: str) -> str:
    if bool(dead.all()):
        return f"the inputs of '{name}' were zero for every calibration token, so there is nothing to weigh errors with"
    least = float(torch.linalg.eigvalsh(moments.double())[0])
    return (
        f"the second moments of the inputs of '{name}' are not positive definite with damp={damp:g} (smallest "
        f"eigenvalue {least:.3g} of a mean diagonal {float(moments.diagonal().double().mean()):.3g}); more "
        f"calibration tokens or a larger damp would help"
    )
