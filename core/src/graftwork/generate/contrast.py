"""The arithmetic that combiners share: a log-linear mixture of two distributions, safe where one rules a token out."""

from __future__ import annotations

import torch

from graftwork.errors import UserError


def log_probabilities(main: torch.Tensor, contrast: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of both streams from their logits, B x V each.

    Raises:
        UserError: in a row of either no token has a finite logit, or one is not a number or infinite.
    """
    # The largest logit is finite where the row has a distribution: NaN and infinity both show in it.
    check_distributions(main.amax(-1), contrast.amax(-1))
    return main.log_softmax(-1), contrast.log_softmax(-1)


def check_distributions(main: torch.Tensor, contrast: torch.Tensor) -> None:
    """Refuse rows without a distribution: their largest logit, or their log-sum-exp (B each), is not finite.

    Raises:
        UserError: see :func:`log_probabilities`.
    """
    for name, of_rows in (("main", main), ("contrast", contrast)):
        bad = ~torch.isfinite(of_rows)
        if bad.any():
            row = int(torch.nonzero(bad)[0])
            raise UserError(
                f"the {name} prompt's logits of row {row + 1} are no distribution: a row needs finite numbers, "
                f"with -inf for tokens that are ruled out"
            )


def log_ratio(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """Return ``log p_main - log p_contrast``, B x V; -inf where ``main`` is -inf.

    A token that only ``contrast`` rules out counts as the least likely one of its row there: the formula's
    infinite score could not be sampled from.

    Raises:
        UserError: see :func:`log_probabilities`.
    """
    with_, without = log_probabilities(main, contrast)
    ruled_out = without == -torch.inf
    least = without.masked_fill(ruled_out, torch.inf).amin(-1, keepdim=True)
    return with_ - torch.where(ruled_out, least, without)


def tilt(main: torch.Tensor, contrast: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """Return ``main + weight * (log p_main - log p_contrast)``, B x V, on the scale of ``main``.

    ``weight`` is a number or a tensor that broadcasts to B x V. Up to a constant per row these are the
    log-probabilities of ``p_main^(1 + weight) p_contrast^(-weight)``: a weight of -1 is the contrast alone, 0 is
    ``main`` bit for bit.

    What is -inf in ``main`` stays so. A token that only ``contrast`` rules out is -inf under a negative
    weight, as in the formula; for a positive one see :func:`log_ratio`.

    Raises:
        UserError: see :func:`log_probabilities` and :func:`check_left`.
    """
    gain = log_ratio(main, contrast)
    weight = torch.as_tensor(weight, dtype=main.dtype, device=main.device)
    scores = torch.where(weight == 0, main, main + weight * gain)
    gone = (main == -torch.inf) | ((contrast == -torch.inf) & (weight < 0))
    return check_left(scores.masked_fill(gone, -torch.inf))


def check_left(scores: torch.Tensor) -> torch.Tensor:
    """Return ``scores`` (B x V), of which every row must have a token to choose.

    Raises:
        UserError: a row is -inf throughout.
    """
    empty = (scores == -torch.inf).all(-1)
    if empty.any():
        row = int(torch.nonzero(empty)[0])
        raise UserError(
            f"the two prompts of row {row + 1} have no possible token in common, so none can be chosen"
        )
    return scores
