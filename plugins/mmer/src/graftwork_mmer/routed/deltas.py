"""What is added to the base for a key: from a merge and its masks, or from experts that are kept whole."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from graftwork.merge.experts import Experts
from graftwork_kernels.masked_delta import masked_delta, unpack_mask

from graftwork_mmer.artefact import Artefact
from graftwork_mmer.routed.plan import Key


@dataclass(frozen=True)
class Masks:
    """A matrix's keys as masks: ``merged`` is u, ``words`` keys x rows x words, ``scales`` float32, one per key."""

    merged: torch.Tensor
    words: torch.Tensor
    scales: torch.Tensor


def added(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return base plus delta (float32) in the base's precision, rounded once; the base's bytes where delta is 0."""
    return torch.where(delta == 0, base, (base.float() + delta).to(base.dtype))


class Deltas(Protocol):
    """Differences to the base by key.

    Attributes:
        experts: names, sorted.
        shapes: rows and columns of every parameter that is changed.
        base_sha256: of the base's files.
    """

    experts: tuple[str, ...]
    shapes: dict[str, tuple[int, int]]
    base_sha256: str

    def delta(self, name: str, key: Key) -> torch.Tensor | None:
        """Return what is added to a parameter (float32, rows x columns); None where nothing is."""
        ...

    def rebuilt(self, name: str, key: Key, base: torch.Tensor) -> torch.Tensor | None:
        """Return a parameter's weights for a key, in the base's precision and shape; None where they are the base's."""
        ...

    def masks(self, name: str, keys: Sequence[Key]) -> Masks | None:
        """Return what :func:`masked_delta_linear` takes for these keys, if each of them is a mask and a scale."""
        ...

    def to(self, device: torch.device) -> None:
        """Move all that is kept to a device."""
        ...


class MaskedDeltas:
    """One merged difference u with a packed mask per expert, shared by all routes."""

    def __init__(self, artefact: Artefact) -> None:
        self.experts, self.base_sha256 = artefact.experts, artefact.base_sha256
        self.merged = dict(artefact.merged)
        self.words = {
            name: [artefact.masks[expert][name].words for expert in self.experts] for name in self.merged
        }
        self.scales = [artefact.scales[expert] for expert in self.experts]
        self.shapes = {name: (tensor.shape[0], tensor.shape[1]) for name, tensor in self.merged.items()}

    def delta(self, name: str, key: Key) -> torch.Tensor | None:
        """Return ``c u`` with c of the key.

        expert: gamma_i m_i. union: 1 where any present mask has a bit (with scales: the mean of those that have
        one). mean: the mean of gamma_i m_i. merged: 1.

        Raises:
            RuntimeError: u is to be trained.
        """
        merged = self._frozen(name)
        if key.kind == "base":
            return None
        if key.kind == "merged":
            return merged.float()
        masks = [unpack_mask(self.words[name][index], merged.shape[1]) for index in key.experts]
        scales = [self.scales[index] for index in key.experts]
        if len(masks) == 1:
            found = torch.where(masks[0], merged.float(), 0.0)
            return found if scales[0] == 1 else found * scales[0]
        share = torch.zeros(merged.shape, device=merged.device)
        for mask, scale in zip(masks, scales, strict=True):
            share += mask * scale
        if key.kind == "mean":
            return merged.float() * (share / len(masks))
        count = torch.stack(masks).sum(0)
        return torch.where(count > 0, merged.float() * (share / count.clamp_min(1)), 0.0)

    def rebuilt(self, name: str, key: Key, base: torch.Tensor) -> torch.Tensor | None:
        """Return the weights of a key; raises: see :meth:`delta`."""
        if key.kind == "base":
            return None
        mask = self._mask(name, key)
        if mask is None:
            delta = self.delta(name, key)
            return None if delta is None else added(base, delta.view(base.shape))
        merged = self._frozen(name)
        return masked_delta(base.view(merged.shape), merged, *mask).view(base.shape)

    def masks(self, name: str, keys: Sequence[Key]) -> Masks | None:
        """Return the masks of these keys; None where one of them is a mean. Raises: see :meth:`delta`."""
        merged = self._frozen(name)
        found = [self._mask(name, key) for key in keys]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        scales = torch.tensor([scale for _, scale in known], dtype=torch.float32, device=merged.device)
        return Masks(merged, torch.stack([words for words, _ in known]), scales)

    def _mask(self, name: str, key: Key) -> tuple[torch.Tensor, float] | None:
        """Return words and scale of a key that is a mask."""
        words = [self.words[name][index] for index in key.experts]
        if key.kind == "expert":
            return words[0], self.scales[key.experts[0]]
        if key.kind == "union" and all(self.scales[index] == 1 for index in key.experts):
            return functools.reduce(torch.bitwise_or, words), 1.0
        if key.kind in ("merged", "base"):
            return torch.full_like(self.words[name][0], -1 if key.kind == "merged" else 0), 1.0
        return None

    def _frozen(self, name: str) -> torch.Tensor:
        merged = self.merged[name]
        if merged.requires_grad:
            raise RuntimeError(f"the merged difference of '{name}' is frozen: masks are made for its values")
        return merged

    def to(self, device: torch.device) -> None:
        """Move u and the words."""
        self.merged = {name: tensor.to(device) for name, tensor in self.merged.items()}
        self.words = {name: [one.to(device) for one in words] for name, words in self.words.items()}


class KeptDeltas:
    """The experts' own differences, whole; what masks are compared with.

    Text tokens get the mean over present experts (``union`` and ``mean`` are the same here), or over all (``merged``).
    """

    def __init__(self, experts: Experts) -> None:
        self.experts, self.base_sha256 = experts.names, experts.base_digest
        self.shapes = dict(experts.shapes)
        self._deltas = {
            name: torch.cat([piece.deltas for piece in experts.pieces_of(name)], 1) for name in experts.shapes
        }

    def delta(self, name: str, key: Key) -> torch.Tensor | None:
        """Return the difference, or the mean of several."""
        if key.kind == "base":
            return None
        deltas = self._deltas[name]
        return (deltas if key.kind == "merged" else deltas[list(key.experts)]).mean(0)

    def rebuilt(self, name: str, key: Key, base: torch.Tensor) -> torch.Tensor | None:
        """Return base plus difference."""
        delta = self.delta(name, key)
        return None if delta is None else added(base, delta.view(base.shape))

    def masks(self, name: str, keys: Sequence[Key]) -> Masks | None:
        """Return nothing: whole differences have no masks."""
        return None

    def to(self, device: torch.device) -> None:
        """Move the differences."""
        self._deltas = {name: tensor.to(device) for name, tensor in self._deltas.items()}
