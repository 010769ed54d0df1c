"""Subspaces of a layer's inputs: what old tasks used, what is still free, and how a task extends it.

The rules are those of InfLoRA (Liang and Li, CVPR 2024) and of DualGPM (Liang and Li, CVPR 2023) within it.
All decompositions are done in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Subspace:
    """A subspace of R^d, kept as whichever basis is smaller.

    ``basis`` has orthonormal columns in fp32: those of the subspace M (d x k), or with ``complement`` those of
    everything orthogonal to it (d x (d - k)).
    """

    basis: torch.Tensor
    complement: bool = False

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Subspace:
        return cls(torch.zeros(width, 0, device=device))

    @property
    def size(self) -> int:
        """Return the number of dimensions of the subspace M."""
        width, columns = self.basis.shape
        return width - columns if self.complement else columns

    @property
    def room(self) -> int:
        """Return the number of dimensions that are free."""
        return len(self.basis) - self.size

    def free(self) -> torch.Tensor:
        """Return an orthonormal basis Q (d x room, float64) of what is free; ``I - M M^T = Q Q^T``."""
        basis = self.basis.double()
        if self.complement:
            return torch.linalg.qr(basis)[0]
        if not basis.shape[1]:
            return torch.eye(len(basis), dtype=torch.float64, device=basis.device)
        return torch.linalg.qr(basis, mode="complete")[0][:, basis.shape[1] :]

    def directions(self, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared singular values (room) and left singular vectors (d x room) of ``H - M M^T H``.

        H is a second moment (d x d). They are found within the free space, so that vectors of vanishing
        singular values stay free as well.
        """
        free = self.free()
        inner = free.T @ moment.double()
        squares, vectors = torch.linalg.eigh(inner @ inner.T)
        return squares.flip(0).clamp_min(0), free @ vectors.flip(1)

    def inputs(self, moment: torch.Tensor, rank: int) -> torch.Tensor:
        """Return InfLoRA's input factor A (rank x d): the top left singular vectors of ``H - M M^T H`` over sqrt 3."""
        return self.directions(moment)[1][:, :rank].T / 3**0.5

    def project_out(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows`` (r x d) without their part in M, each rescaled to norm 1/sqrt 3.

        GainLoRA's plain InfLoRA (Liang et al., 2025) chooses A so.
        """
        free = self.free()
        left = rows.double() @ free @ free.T
        return left / left.norm(dim=1, keepdim=True) / 3**0.5

    def extended(self, moment: torch.Tensor, threshold: float) -> Subspace:
        """Return M with what a task with the second moment H needs (DualGPM).

        The smallest k with ``(||H||^2 - ||H_res||^2 + sum_{i<=k} S_i^2) / ||H||^2 >= threshold`` directions
        of ``H_res = H - M M^T H`` are added. Over d/2 dimensions the complement is kept instead.
        """
        squares, vectors = self.directions(moment)
        total = moment.double().square().sum()
        covered = (total - squares.sum() + torch.cat([squares.new_zeros(1), squares.cumsum(0)])) / total
        # Rounding may leave the last sum just below 1; all of them cover everything.
        needed = int((covered[:-1] < threshold).sum()) if total > 0 else 0
        if self.complement or self.size + needed > len(self.basis) / 2:
            return Subspace(vectors[:, needed:].float(), complement=True)
        return Subspace(torch.cat([self.basis.double(), vectors[:, :needed]], 1).float())
