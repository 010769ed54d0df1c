"""Which entries of the merged difference are an expert's own: the masks, and a scale for what they keep.

Notation: ``delta`` is an expert minus the base (tau), ``merged`` the merged difference as it is stored (u). All are
rows x columns in float32; masks are bool. An entry where ``merged`` is 0 is in no mask: there is nothing to keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from graftwork.merge.sums import row_sums

Rule = Literal["l1", "congruence"]
Scale = Literal["none", "l2", "l1"]


def nearest(delta: torch.Tensor, merged: torch.Tensor, lam: float) -> torch.Tensor:
    """Return ``[ |tau| > lam |u - tau| ]``: at lam 1 the mask that brings the expert back nearest, in L1 distance.

    A tie (both errors equal) keeps nothing. Where signs differ an entry is kept only by lam < 1. Closed form and
    threshold after TALL masks (Wang et al., ICML 2024); MMER's own rule is said to minimise a Manhattan distance.
    """
    return (delta.abs() > lam * (merged - delta).abs()) & (merged != 0)


def congruent(delta: torch.Tensor, merged: torch.Tensor, lam: float) -> torch.Tensor:
    """Return ``[ tau u > 0 ] & [ |tau| > lam |u| ]``: same direction, and not much smaller. Ours.

    At lam 1/2 it is :func:`nearest` at lam 1. Signs are compared, not multiplied: products of small numbers are 0.
    """
    return (delta.sign() == merged.sign()) & (delta.abs() > lam * merged.abs()) & (merged != 0)


RULES: dict[Rule, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "l1": nearest,
    "congruence": congruent,
}


def stored(merged: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the merged difference rounded to the precision that it is stored in, as float32."""
    return merged.to(dtype).float()


class ScaleSums:
    """The sums that an expert's scale comes from, row by row.

    ``l2``: gamma = <m u, tau> / ||m u||^2, nearest in L2. ``l1``: gamma = sum |tau| / sum |m u|, which gives the kept
    part the size of the whole (over all weights; EMR-Merging's, by tensors, is close to it).
    """

    def __init__(self, kind: Scale) -> None:
        self.kind = kind
        self._over: list[float] = []
        self._under: list[float] = []

    def add(self, delta: torch.Tensor, kept: torch.Tensor) -> None:
        """Add some rows of an expert's difference and of what its mask keeps of the merged one."""
        if self.kind == "l2":
            self._over += row_sums(kept.double() * delta.double())
            self._under += row_sums(kept.double().square())
        else:
            self._over += row_sums(delta.abs())
            self._under += row_sums(kept.abs())

    @property
    def value(self) -> float:
        """Return gamma; 1 where the mask keeps nothing."""
        under = math.fsum(self._under)
        return math.fsum(self._over) / under if under else 1.0
