"""Weights while they are edited: written site by site, put back bit for bit at the end, kept as an edit set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graftwork.edit.edits import Change, EditSet, Part, added
from graftwork.edit.errors import UnsafeEditError
from graftwork.edit.requests import Request
from graftwork.edit.sites import Site, tensor_digest
from graftwork.edit.solve import Update

MAX_SHARE = 0.5
"""An edit whose ||dW|| is more than this share of ||W|| is refused; dem.md's bound."""


class Draft:
    """A model that an editor writes to; leaving the ``with`` block puts its weights back, whatever happened.

    Args:
        model: the model; its weights change in place.
        sites: those that may be written.
        max_share: largest ||dW|| / ||W|| of a site, all its writes together.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], *, max_share: float = MAX_SHARE) -> None:
        self.model, self.sites = model, {site.name: site for site in sites}
        self.max_share = max_share
        self._original: dict[str, torch.Tensor] = {}
        self._changes: dict[str, Change] = {}
        self._figures: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the original weights back; what was written stays in :meth:`edit_set`."""
        with torch.no_grad():
            for name, weight in self._original.items():
                self.sites[name].matrix.copy_(weight)

    def matrix(self, site: Site) -> torch.Tensor:
        """Return the unedited W (h x d) of a site."""
        return self._original.get(site.name, site.matrix)

    def write(self, site: Site, update: Update | Change) -> None:
        """Add a change to a site's weight: one sum in float64 over all its changes, one rounding.

        Raises:
            UnsafeEditError: the change is no number, or too large; nothing was written.
        """
        change = Change(update.left.float().cpu(), update.right.float().cpu())
        mine = self._changes.get(site.name)
        if mine is not None:
            change = Change(torch.cat([mine.left, change.left], 1), torch.cat([mine.right, change.right], 1))
        original = self.matrix(site)
        new, figures = checked(site.name, original, change, self.max_share)
        if isinstance(update, Update):
            figures["gain"] = float(update.gain.mean()) if update.gain.numel() else 1.0
            figures["condition"] = update.condition
        if site.name not in self._original:
            self._original[site.name] = site.matrix.clone()
        with torch.no_grad():
            site.matrix.copy_(new)
        self._changes[site.name] = change
        self._figures[site.name] = figures

    def edit_set(
        self,
        name: str,
        method: str,
        requests: Sequence[Request],
        options: Mapping[str, Any],
        report: Mapping[str, Any] | None = None,
    ) -> EditSet:
        """Return all that was written as an edit set of one part.

        Its report holds, by site, ``share`` (||dW|| / ||W||), ``lost`` (share of changed entries that the weight's
        dtype rounds away), ``rank``, and ``gain`` and ``condition`` of the last update.
        """
        base, after, columns = {}, {}, {}
        order = sorted(self._changes, key=lambda one: self.sites[one].order)
        for one in order:
            original, change = self._original[one], self._changes[one]
            base[one] = tensor_digest(original)
            after[one] = tensor_digest(added(original, change))
            columns[one] = (0, change.left.shape[1])
        part = Part(
            name,
            method,
            [request.record() for request in requests],
            dict(options),
            columns,
            base,
            after,
            {**(report or {}), "sites": {one: self._figures[one] for one in order}},
        )
        return EditSet({one: self._changes[one] for one in order}, [part])


def checked(
    name: str, weight: torch.Tensor, change: Change, max_share: float = MAX_SHARE
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return ``weight`` (h x d) with the change, and figures about it.

    Raises:
        UnsafeEditError: a change that is no number, is larger than ``max_share`` of the weight, or overflows its
            dtype.
    """
    delta = change.left.to(weight.device).double() @ change.right.to(weight.device).double().T
    norm = float(delta.norm())
    size = float(weight.double().norm())
    if not norm < float("inf"):
        raise UnsafeEditError(f"the edit of '{name}' is no number (NaN or infinity); nothing was written")
    if norm > max_share * size:
        raise UnsafeEditError(
            f"the edit of '{name}' has {norm / max(size, 1e-30):.2f} times the size of the weight itself, and at "
            f"most {max_share:g} is safe; nothing was written. Raise the weight of the second moments (lam), take "
            f"fewer requests, or set max_share higher"
        )
    new = added(weight, change)
    if not bool(torch.isfinite(new).all()):
        raise UnsafeEditError(f"the edit of '{name}' overflows {new.dtype}; nothing was written")
    changed = delta != 0
    count = int(changed.sum())
    lost = int((changed & (new == weight)).sum()) / count if count else 0.0
    return new, {"share": norm / size if size else 0.0, "lost": lost, "rank": change.left.shape[1]}


def gain_note(edits: EditSet) -> str | None:
    """Return a sentence where keys get less than half of what they need: the second moments weigh too much."""
    gains = [one["gain"] for one in edits.report.get("sites", {}).values() if "gain" in one]
    if not gains or min(gains) >= 0.5:
        return None
    return (
        f"a key gets {min(gains):.2f} to {max(gains):.2f} of its residual per weight; below 0.5 says that the second "
        f"moments weigh too much (lam)"
    )
