"""Hadamard matrices of many sizes, and fast products with them.

Orders are built from Sylvester's doubling, from Paley's two constructions over the field of ``q`` elements
(``q + 1`` for a prime power ``q`` that is 3 modulo 4, ``2 (q + 1)`` where it is 1), and from Kronecker products of
these. A matrix here is orthonormal: entries are ``1 / sqrt(n)`` or ``-1 / sqrt(n)``.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

_CHUNK = 64
"""A power of two is applied in factors up to this: a small matrix product beats as many passes over memory."""


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return an orthonormal Hadamard matrix (n x n): a core of the least order there is, by Sylvester's of the rest.

    Raises:
        ValueError: none can be built.
    """
    core, power = _split(n)
    return (torch.kron(_core(core), _sylvester(power)) / math.sqrt(n)).to(dtype)


def has_hadamard(n: int) -> bool:
    """Return whether :func:`hadamard_matrix` can build the order ``n``."""
    return n > 0 and _recipe(n) is not None


def rotation_block(d: int) -> int:
    """Return the largest order of a Hadamard matrix that divides ``d``; ``d`` itself where it can be."""
    return next(k for k in range(d, 0, -1) if d % k == 0 and has_hadamard(k))


def hadamard(x: Tensor, block: int) -> Tensor:
    """Return ``x`` (..., d) times the block-diagonal matrix of :func:`hadamard_matrix` (block), in the dtype of ``x``.

    Gradients pass.

    Raises:
        ValueError: ``block`` does not divide d, or there is no such matrix.
    """
    return _product(x, block, transposed=False)


def hadamard_transposed(x: Tensor, block: int) -> Tensor:
    """Return ``x`` (..., d) times the transpose of what :func:`hadamard` multiplies with: it undoes that."""
    return _product(x, block, transposed=True)


def random_signs(d: int, seed: int) -> Tensor:
    """Return ``d`` random signs, int8 of 1 and -1, on the host; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (d,), generator=generator) * 2 - 1).to(torch.int8)


def _product(x: Tensor, block: int, *, transposed: bool) -> Tensor:
    d = x.shape[-1]
    if block < 1 or d % block:
        raise ValueError(f"blocks of {block} do not make up {d}")
    core, power = _split(block)
    y = x.reshape(-1, core, power)
    width = power
    while width > 1:
        # The factors of a Sylvester matrix act on digits of the index; each is symmetric.
        size = min(width, _CHUNK)
        width //= size
        factor = _on("sylvester", size, x.dtype, x.device)
        y = y.reshape(-1, size, power // (width * size)) if width * size < power else y.reshape(-1, size)
        y = torch.matmul(factor, y) if y.ndim == 3 else y @ factor
    if core > 1:
        matrix = _on("core", core, x.dtype, x.device)
        y = torch.matmul(matrix if transposed else matrix.t(), y.reshape(-1, core, power))
    return (y * (1 / math.sqrt(block))).reshape(x.shape)


@functools.lru_cache(maxsize=64)
def _on(kind: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix of ones and minus ones where it is wanted."""
    # Made in inference mode, it could take no part in training later.
    with torch.inference_mode(False):
        return (_sylvester(n) if kind == "sylvester" else _core(n)).to(dtype).to(device)


def _split(n: int) -> tuple[int, int]:
    """Return ``n`` as the order of a core times a power of two, with the core as small as can be.

    Raises:
        ValueError: there is no such core.
    """
    odd = n // (n & -n) if n > 0 else 0
    core = odd
    while core and core <= n:
        if has_hadamard(core):
            return core, n // core
        core *= 2
    raise ValueError(f"no Hadamard matrix of order {n} is known here; the largest that divides it is of order "
                     f"{rotation_block(n)}" if n > 0 else f"no matrix has order {n}")  # fmt: skip


@functools.cache
def _recipe(n: int) -> tuple[str, int] | None:
    """Return how the order ``n`` is built, with the field's or the first factor's size; None if it cannot be."""
    if n <= 2:
        return "sylvester", n
    if n % 4:
        return None
    if _prime_power(n - 1):
        return "paley-1", n - 1
    if (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1):
        return "paley-2", n // 2 - 1
    for a in range(2, math.isqrt(n) + 1):
        if n % a == 0 and _recipe(a) and _recipe(n // a):
            return "product", a
    return None


@functools.lru_cache(maxsize=16)
def _core(n: int) -> Tensor:
    """Return a matrix of order ``n`` with entries 1 and -1 (float64)."""
    how, size = _recipe(n) or ("", 0)
    if how == "sylvester":
        return _sylvester(n)
    if how == "product":
        return torch.kron(_core(size), _core(n // size))
    residues = _residues(size)
    ones = torch.ones(size, 1, dtype=torch.float64)
    corner = torch.zeros(1, 1, dtype=torch.float64)
    identity = torch.eye(size + 1, dtype=torch.float64)
    if how == "paley-1":
        return identity + torch.cat([torch.cat([corner, ones.t()], 1), torch.cat([-ones, residues], 1)])
    # Paley's second: a symmetric conference matrix, each entry a 2 x 2 block.
    conference = torch.cat([torch.cat([corner, ones.t()], 1), torch.cat([ones, residues], 1)])
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(identity, diagonal)


@functools.lru_cache(maxsize=16)
def _sylvester(n: int) -> Tensor:
    """Return Sylvester's matrix of order ``n``, a power of two, with entries 1 and -1 (float64)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return the prime and the exponent of an odd prime power."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((p for p in range(3, math.isqrt(q) + 1, 2) if q % p == 0), q)
    exponent, rest = 0, q
    while rest % p == 0:
        exponent, rest = exponent + 1, rest // p
    return (p, exponent) if rest == 1 else None


def _residues(q: int) -> Tensor:
    """Return the matrix of ``chi(a - b)`` over the field of ``q`` elements: 1 for a square, -1 for none, 0 for zero."""
    found = _prime_power(q)
    assert found is not None
    p, k = found
    elements = list(itertools.product(range(p), repeat=k))
    modulus = _irreducible(p, k)
    squares = {_times(a, a, modulus, p) for a in elements}
    chi = torch.tensor([1.0 if a in squares else -1.0 for a in elements], dtype=torch.float64)
    chi[0] = 0
    digits = torch.tensor(elements)
    weights = torch.tensor([p ** (k - 1 - i) for i in range(k)])
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return chi[(difference * weights).sum(-1)]


def _times(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """Multiply two polynomials (coefficients, constant first) modulo a monic one, without its leading coefficient."""
    k = len(modulus)
    product = [0] * (2 * k)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    for top in range(2 * k - 1, k - 1, -1):
        lead = product[top] % p
        for i, c in enumerate(modulus):
            product[top - k + i] -= lead * c
    return tuple(c % p for c in product[:k])


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Return a monic irreducible polynomial of degree ``k`` modulo ``p``, without its leading coefficient."""
    for candidate in itertools.product(range(p), repeat=k):
        # x generates a field if no power of it below p^k - 1 is one: then all powers differ.
        x = tuple(int(i == 1) for i in range(k)) if k > 1 else ((-candidate[0]) % p,)
        one = tuple(int(i == 0) for i in range(k))
        power, order = x, 1
        while power != one and any(power) and order < p**k:
            power, order = _times(power, x, candidate, p), order + 1
        if order == p**k - 1 and power == one:
            return candidate
    raise AssertionError(f"no field of {p}^{k} elements")
