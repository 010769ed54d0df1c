"""The null space of the past: the directions that the inputs of earlier tasks hardly have.

From the uncentred second moment K (d x d) of a layer's inputs the smallest number k of leading eigenvectors is
protected for which the energy outside of them, tr(P K P) with P = I - U U^T, is at most ``eps`` * tr K. The second
moment with an energy threshold is that of GPM and InfLoRA; the plain energy and the sketch's bound are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Basis:
    """A subspace to stay out of, of dimension ``k``, by an orthonormal basis ``matrix`` (d x c) in fp32.

    ``complement`` says that the columns span what is left (c = d - k), which is the shorter where k > d/2; else
    they span what is protected (c = k).
    """

    matrix: torch.Tensor
    k: int
    complement: bool = False

    @property
    def width(self) -> int:
        return len(self.matrix)

    @classmethod
    def empty(cls, width: int) -> Basis:
        """Return the basis that protects nothing."""
        return cls(torch.zeros(width, 0), 0)


def top_directions(moment: torch.Tensor, eps: float) -> Basis:
    """Return the smallest leading eigenspace of ``moment`` (d x d) outside of which lies at most ``eps`` of its energy.

    Decomposed in float64 on the moment's device. Directions below the resolution of the moment's own dtype are
    never protected, so that with eps = 0 it is the span of the inputs and not all of space.
    """
    symmetric = moment.double()
    symmetric = (symmetric + symmetric.T) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    d = len(values)
    rank = int((values > 16 * torch.finfo(moment.dtype).eps * values[0]).sum())
    k = min(_smallest(values, values.sum(), eps), rank)
    complement = 2 * k > d
    chosen = vectors[:, k:] if complement else vectors[:, :k]
    return Basis(_stored(chosen), k, complement)


def _smallest(values: torch.Tensor, total: torch.Tensor, eps: float) -> int:
    """Return the smallest k with total - sum of the first k values <= eps * total."""
    # Summed from the small end, so that the tail of the last value is exactly 0.
    tails = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]) + (total - values.sum())
    enough = tails <= eps * total
    return int(enough.int().argmax()) if bool(enough.any()) else len(values)


def _stored(vectors: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the same span in fp32; QR once, against what the eigensolver leaves.

    Laid out as a checkpoint gives it back, since products depend on that in their last bits.
    """
    basis = torch.linalg.qr(vectors).Q if vectors.shape[1] else vectors
    return basis.float().contiguous()


@dataclass
class Sketch:
    """Frequent directions (Liberty, 2013): S (l x d) with 0 <= X^T X - S^T S, in the memory of l rows.

    ``energy`` (d) is the exact diagonal of X^T X, so what the sketch has lost is known.
    """

    rows: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def empty(cls, size: int, width: int) -> Sketch:
        return cls(torch.zeros(min(size, width), width), torch.zeros(width))

    def add(self, x: torch.Tensor, energy: torch.Tensor | None = None) -> None:
        """Take rows ``x`` (n x d) in; ``energy`` (d) where they are a sketch of more than they show."""
        own = x.double().square().sum(0) if energy is None else energy
        self.energy = (self.energy.to(own) + own).to(self.energy)
        size = len(self.rows)
        for start in range(0, len(x), size):
            self.rows = _shrink(torch.cat([self.rows.to(x.device), x[start : start + size].float()]), size)

    def scaled(self, factor: float) -> Sketch:
        """Return the sketch of the moment times ``factor``."""
        return Sketch(self.rows * factor**0.5, self.energy * factor)

    def merge(self, other: Sketch) -> None:
        """Add the moment that ``other`` stands for."""
        self.add(other.rows, other.energy.double())

    def directions(self, eps: float, columns: torch.Tensor | None = None) -> tuple[Basis, bool]:
        """Return what :func:`top_directions` does, and whether the sketch held enough to keep its promise.

        A direction of the sketch has at least the energy it has there, so the energy outside of the first k
        is at most tr K less theirs. ``columns`` takes that block of the moment only.
        """
        rows, energy = self.rows.double(), self.energy.double()
        if columns is not None:
            rows, energy = rows[:, columns], energy[columns]
        values, vectors = _rows_eigen(rows)
        total = energy.sum()
        resolution = torch.finfo(torch.float32).eps * total
        lost = (total - values.sum()).clamp_min(0)
        if lost <= resolution:
            total = values.sum()
        k = _smallest(values, total, eps)
        kept = bool(total - values[:k].sum() <= eps * total + resolution)
        return Basis(_stored(vectors[:, :k]), k), kept


def _rows_eigen(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues (descending, those above rounding) and eigenvectors (d x r) of rows^T rows."""
    values, left = torch.linalg.eigh(rows @ rows.T)
    values, left = values.flip(0).clamp_min(0), left.flip(1)
    keep = values > torch.finfo(torch.float32).eps * values[0]
    values, left = values[keep], left[:, keep]
    return values, rows.T @ (left / values.sqrt())


def _shrink(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``size`` rows: singular values squared, less the (size + 1)-th."""
    if len(rows) <= size:
        return rows
    exact = rows.double()
    values, left = torch.linalg.eigh(exact @ exact.T)
    values, left = values.flip(0).clamp_min(0), left.flip(1)
    shrunk = (values[:size] - values[size]).clamp_min(0)
    scale = torch.where(shrunk > 0, (shrunk / values[:size].clamp_min(1e-300)).sqrt(), 0.0)
    return ((left[:, :size] * scale).T @ exact).float()
