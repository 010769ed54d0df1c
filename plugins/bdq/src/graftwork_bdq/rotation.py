"""The rotation of a place: Hadamard blocks with random signs, and orthogonal blocks that can be learned.

``R = diag(signs) blockdiag(H_k) blockdiag(O)``. O is the Cayley map of a skew matrix S, ``O = (I - S)(I + S)^-1``, the
identity at S = 0 and orthogonal for every S, so no step of an optimizer leaves the rotations.
"""

from __future__ import annotations

from typing import Literal

import torch
from graftwork import UserError
from graftwork.transform.hadamard import random_signs, rotation_block
from graftwork.transform.modules import Rotation
from torch import nn

Kind = Literal["hadamard", "none", "random", "hadamard+learned", "learned"]
LEAST_BLOCK = 16


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """Return ``(I - S)(I + S)^-1`` (... x k x k) of skew-symmetric S; the two factors commute."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew, identity - skew)


class Cayley(nn.Module):
    """Orthogonal blocks (count x k x k) that start at the identity; one parameter per pair of coordinates.

    Raises:
        UserError: the block does not divide ``size``.
    """

    def __init__(self, size: int, block: int, name: str = "") -> None:
        super().__init__()
        if size % block:
            raise UserError(
                f"'{name}': learned blocks of {block} do not divide its {size} inputs; set "
                f"plugins.bdq.learned_block to a divisor"
            )
        self.block = block
        self.pairs = nn.Parameter(torch.zeros(size // block, block * (block - 1) // 2))

    def forward(self) -> torch.Tensor:
        upper = self.pairs.new_zeros(len(self.pairs), self.block, self.block)
        one, other = torch.triu_indices(self.block, self.block, 1, device=self.pairs.device)
        upper[:, one, other] = self.pairs
        # Solved in float64, so that the result is orthogonal to float32's last digits however far S went.
        return cayley((upper - upper.mT).double()).float()


def random_orthogonal(size: int, seed: int) -> torch.Tensor:
    """Return an orthogonal matrix (size x size, float64), uniform over all: QR of normal numbers, signs put right."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def fixed_rotation(kind: Kind, size: int, seed: int, *, block: int | None, name: str) -> Rotation | None:
    """Return the part of a place's rotation that is not learned; None where there is none.

    Raises:
        UserError: there is no Hadamard block of at least 16 for ``size``, or ``block`` is none that fits.
    """
    if kind in ("none", "learned"):
        return None
    if kind == "random":
        signs = torch.ones(size, dtype=torch.int8)
        return Rotation(1, signs, random_orthogonal(size, seed)[None].float())
    best = rotation_block(size)
    if block is not None and size % block:
        raise UserError(f"'{name}': Hadamard blocks of {block} do not divide its {size} inputs; take {best}")
    chosen = block or best
    if chosen < LEAST_BLOCK:
        raise UserError(
            f"'{name}' has {size} inputs, for which Hadamard blocks have {chosen} at most, too few to spread an "
            f"outlier; set plugins.bdq.rotation=random"
        )
    return Rotation(chosen, random_signs(size, seed))
