"""The losses of self-play as functions of log-probabilities; every row is one pair, and knows of no other.

Notation: y is the target, y' an answer that a player wrote; lp(y) = log pi(y|x) under the model being trained
(B, with gradient), R_j(y) the same under player j (B x J, constants); both are float32 or float64 *sums* over
the answer's tokens. ``l(u) = log(1 + exp(-u))`` is the logistic loss and ``lambda`` the reward's scale (``scale``)::

    r_j(y) = lp(y) - R_j(y)         log-ratio, nats
    P_j(y) = lambda r_j(y)          implicit reward by player j
    m_j    = P_j(y) - P_j(y')       margin

Players may be missing in some rows: ``present`` (B x J, bool) is then False, and what stands in their columns,
inf and nan included, reaches neither loss nor gradient.

Sources: "digest" is a reader's account of TPAW (Li et al., ACL 2026), whose paper and code we have not seen;
"ours" is our derivation or decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class TeamTerms:
    """A batch's loss and what it is made of.

    Attributes:
        rows: B, the loss of every pair.
        player_weights: B x J, beta; constants; 0 where a player is missing.
        target_weights: B x J, alpha: eta or 1; constants.
        reward_target: B x J, P_j(y), before alpha.
        reward_generated: B x J, P_j(y').
    """

    rows: torch.Tensor
    player_weights: torch.Tensor
    target_weights: torch.Tensor
    reward_target: torch.Tensor
    reward_generated: torch.Tensor


def player_weights(
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    scale: float = 0.1,
    gamma: float = 0.5,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return beta, every player's weight in every row (B x J; rows sum to 1, missing players have 0).

    The digest prints ``beta_j = exp(-gamma m_j) / sum_k exp(-gamma m_k)``. What of ``m_j`` belongs to the model
    is the same for all players and a softmax does not see it (ours), which leaves::

        beta_j = softmax_j(gamma lambda (R_j(y) - R_j(y')))

    So a row's weights are constants while a model trains. They favour the player that already tells the target
    from the generation best.

    Raises:
        ValueError: shapes that do not fit, a setting out of bounds, or a player's value that is not finite.
    """
    _check_settings(scale=scale, gamma=gamma)
    chosen, rejected, present = _players(reference_chosen, reference_rejected, present)
    return _weights(chosen, rejected, present, scale, gamma)


def target_weights(
    chosen: torch.Tensor,
    reference_chosen: torch.Tensor,
    *,
    eta: float = 6.0,
    tolerance: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """Return alpha (B x J): ``eta`` where ``P_j(y) <= 0``, else 1 (digest). A constant: no gradient.

    ``tolerance`` (nats of the log-ratio, one number or B) takes the place of 0: two computations of the same
    log-probability differ by rounding, and the newest player's is the model's own at the first step (ours). With 0
    it is the formula. lambda > 0 does not matter for the sign.
    """
    _check_settings(eta=eta)
    ratio = chosen.detach()[:, None] - reference_chosen
    limit = tolerance[:, None] if isinstance(tolerance, torch.Tensor) else tolerance
    return torch.where(ratio <= limit, eta, 1.0).to(ratio.dtype)


def team_terms(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    scale: float = 0.1,
    eta: float = 6.0,
    gamma: float = 0.5,
    tolerance: float | torch.Tensor = 0.0,
    present: torch.Tensor | None = None,
    margin_uses_alpha: bool = False,
) -> TeamTerms:
    """Return TPAW's loss with its parts; see :func:`team_loss`."""
    _check_settings(scale=scale, eta=eta, gamma=gamma)
    _check_policy(chosen, rejected, reference_chosen)
    of_target, of_generated, present = _players(reference_chosen, reference_rejected, present)
    target = chosen[:, None] - of_target
    generated = rejected[:, None] - of_generated
    alpha = target_weights(chosen, of_target, eta=eta, tolerance=tolerance)
    # lambda multiplies the difference, not its parts: with one player and alpha = 1 these are the
    # roundings of DPO as TRL computes it, bit for bit.
    margin = alpha * target - generated
    if margin_uses_alpha:
        logits = (-gamma * scale * margin.detach()).masked_fill(~present, -math.inf)
        beta = logits.softmax(1)
    else:
        beta = _weights(of_target, of_generated, present, scale, gamma)
    losses = -F.logsigmoid(scale * margin)
    rows = (beta * losses.masked_fill(~present, 0.0)).sum(1)
    return TeamTerms(rows, beta, alpha, scale * target, scale * generated)


def team_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    scale: float = 0.1,
    eta: float = 6.0,
    gamma: float = 0.5,
    tolerance: float | torch.Tensor = 0.0,
    present: torch.Tensor | None = None,
    margin_uses_alpha: bool = False,
) -> torch.Tensor:
    """Return TPAW's loss of every pair (B): ``sum_j beta_j l(alpha_j P_j(y) - P_j(y'))`` (digest).

    ``margin_uses_alpha`` puts alpha into the margin that the player weights are made of. They then depend on
    the model, and no gradient passes through them (ours: they are weights, not something to minimise; a
    gradient through a softmax of ``-m_j`` would reward a player for being beaten).

    Gradients (ours; ``s_j = sigmoid(-(alpha_j P_j(y) - P_j(y')))``)::

        dL/dlp(y)  = -lambda sum_j beta_j s_j alpha_j
        dL/dlp(y') =  lambda sum_j beta_j s_j

    Raises:
        ValueError: shapes that do not fit, low precision, a setting out of bounds, a row without a player, or a
            present player's value that is not finite.
    """
    return team_terms(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        scale=scale,
        eta=eta,
        gamma=gamma,
        tolerance=tolerance,
        present=present,
        margin_uses_alpha=margin_uses_alpha,
    ).rows


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """Return DPO's loss of every pair (B) against one reference (B): ``l(beta (r(y) - r(y')))``.

    Rafailov et al., NeurIPS 2023, equation 7. Rounded as TRL's ``loss_type="sigmoid"``.
    """
    return -F.logsigmoid(beta * _gap(chosen, rejected, reference_chosen, reference_rejected, beta))


def spin_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    kind: Literal["logistic", "hinge"] = "logistic",
) -> torch.Tensor:
    """Return SPIN's loss of every pair (B) against the last checkpoint (B).

    Chen et al., ICML 2024, and its code: ``l(beta (r(y) - r(y')))`` with l logistic, which is DPO's, or
    ``max(0, 1 - beta (r(y) - r(y')))`` (hinge).
    """
    gap = beta * _gap(chosen, rejected, reference_chosen, reference_rejected, beta)
    return -F.logsigmoid(gap) if kind == "logistic" else torch.relu(1 - gap)


def dpop_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    penalty: float = 5.0,
) -> torch.Tensor:
    """Return DPO-Positive's loss of every pair (B): ``l(beta (r(y) - r(y') - penalty max(0, -r(y))))``.

    Pal et al. 2024, arXiv 2402.13228; the penalty inside the logistic. TPAW with one player is this with
    ``penalty = eta - 1`` (ours).
    """
    gap = _gap(chosen, rejected, reference_chosen, reference_rejected, beta)
    return -F.logsigmoid(beta * (gap - penalty * torch.relu(reference_chosen - chosen)))


def sft_loss(chosen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood per token of every target (B); ``tokens`` (B) were summed.

    Every answer counts the same, so the loss does not depend on how a batch is cut (ours; a mean over all
    tokens of a batch gives long answers more weight).
    """
    return -chosen / tokens


def _gap(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Return ``r(y) - r(y')`` (B)."""
    _check_settings(beta=beta)
    if not chosen.shape == rejected.shape == reference_chosen.shape == reference_rejected.shape:
        shapes = [tuple(part.shape) for part in (chosen, rejected, reference_chosen, reference_rejected)]
        raise ValueError(f"log-probabilities of pairs have one shape, not {shapes}")
    _check_precision(chosen, rejected, reference_chosen, reference_rejected)
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def _weights(
    chosen: torch.Tensor, rejected: torch.Tensor, present: torch.Tensor, scale: float, gamma: float
) -> torch.Tensor:
    logits = gamma * scale * (chosen - rejected)
    return logits.masked_fill(~present, -math.inf).softmax(1)


def _players(
    chosen: torch.Tensor, rejected: torch.Tensor, present: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the players' values as constants, 0 where one is missing, and who is present."""
    if chosen.shape != rejected.shape or chosen.dim() != 2:
        raise ValueError(
            f"reference_chosen and reference_rejected are B x J, not {tuple(chosen.shape)} and "
            f"{tuple(rejected.shape)}"
        )
    if not chosen.shape[1]:
        raise ValueError("reference_chosen has no column: there is no player (J = 0)")
    _check_precision(chosen, rejected)
    chosen, rejected = chosen.detach(), rejected.detach()
    if present is None:
        present = torch.ones_like(chosen, dtype=torch.bool)
    elif present.shape != chosen.shape or present.dtype != torch.bool:
        raise ValueError(
            f"present is bool of shape {tuple(chosen.shape)}, not {present.dtype} of {tuple(present.shape)}"
        )
    alone = ~present.any(1)
    if alone.any():
        raise ValueError(f"row {int(alone.nonzero()[0])} has no present player")
    # 0 times nan would poison the backward pass, so missing values leave before any arithmetic.
    chosen, rejected = chosen.masked_fill(~present, 0.0), rejected.masked_fill(~present, 0.0)
    for name, values in (("reference_chosen", chosen), ("reference_rejected", rejected)):
        broken = ~values.isfinite()
        if broken.any():
            row, player = broken.nonzero()[0].tolist()
            raise ValueError(f"{name} of row {row}, player {player}, is {values[row, player].item()}")
    return chosen, rejected, present


def _check_policy(chosen: torch.Tensor, rejected: torch.Tensor, reference: torch.Tensor) -> None:
    if not chosen.shape == rejected.shape == reference.shape[:1]:
        raise ValueError(
            f"chosen and rejected hold one value per row of reference_chosen {tuple(reference.shape)}, not "
            f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    _check_precision(chosen, rejected)


def _check_precision(*values: torch.Tensor) -> None:
    for value in values:
        if value.dtype not in PRECISE:
            raise ValueError(
                f"log-probabilities of answers are float32 or float64 sums, not {value.dtype}: a sum over hundreds of "
                f"tokens loses a nat there"
            )


def _check_settings(**settings: float) -> None:
    least = {"eta": 1.0, "gamma": 0.0}
    for name, value in settings.items():
        if name in least:
            good, bound = value >= least[name], f"at least {least[name]:g}"
        else:
            good, bound = value > 0, "above 0"
        if not good or math.isinf(value):
            raise ValueError(f"{name} = {value}: it is a number {bound}")
