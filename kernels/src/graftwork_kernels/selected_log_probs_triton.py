"""The Triton kernels of :mod:`graftwork_kernels.selected_log_probs`; Triton must be there.

Forward: a program has some rows and a part of the vocabulary, goes through it block by block and keeps a running
maximum, sum, first moment and the chosen logit per row; the parts are put together afterwards. Backward: a kernel makes
the gradient of some thousand columns of the logits again, and matrix products of PyTorch take it to the hidden states
and the weight. Nothing of size N x V exists in either.

Block sizes are fixed and not tuned at run time: 128 x 128 logits a program are what fills the registers of 8 warps.

Shapes: N tokens, D width, V words, S parts of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from graftwork_kernels import dispatch

BLOCK_V = 128
# Programs that keep a large GPU busy, and bytes of the gradient of logits that exist at a time.
PROGRAMS, CHUNK_BYTES = 264, 64 * 2**20


@triton.jit
def _logits(
    hidden, weight, bias, rows, words, count, limit, width,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return a block of logits in float32; words from ``limit`` on have -inf."""
    at_rows = rows.to(tl.int64)[:, None] * stride_hn
    at_words = words.to(tl.int64)[None, :] * stride_wv
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(
            hidden + at_rows + d[None, :] * stride_hd,
            mask=(rows[:, None] < count) & (d[None, :] < width),
            other=0.0,
        )
        w = tl.load(
            weight + at_words + d[:, None] * stride_wd,
            mask=(words[None, :] < limit) & (d[:, None] < width),
            other=0.0,
        )
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += tl.load(bias + words * stride_b, mask=words < limit, other=0.0).to(tl.float32)[None, :]
    return tl.where(words[None, :] < limit, z, -float("inf"))


@triton.jit
def _forward_kernel(
    hidden, weight, bias, labels, found, count, vocabulary, width, part,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b, stride_y, size,
    HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write maximum, sum, moment and chosen logit (4 x S x N) of one part of the vocabulary."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(labels + rows * stride_y, mask=rows < count, other=-1)
    largest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)
    begin = split * part
    limit = tl.minimum(begin + part, vocabulary)
    for start in range(begin, limit, BLOCK_V):
        words = start + tl.arange(0, BLOCK_V)
        z = _logits(
            hidden, weight, bias, rows, words, count, limit, width,
            stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
            HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        chosen = (words[None, :] == label[:, None]) & (words[None, :] < limit)
        picked += tl.sum(tl.where(chosen, z, 0.0), 1)
        now = tl.maximum(largest, tl.max(z, 1))
        origin = tl.where(now == -float("inf"), 0.0, now)
        step = tl.minimum(tl.maximum(largest - origin, FLOOR), 0.0)
        factor = tl.exp(step)
        shifted = z - origin[:, None]
        raised = tl.exp(shifted)
        if ENTROPY:
            # Before the product: 0 * -inf is no number.
            terms = raised * tl.where(raised == 0, 0.0, shifted)
            moment = factor * (moment + step * total) + tl.sum(terms, 1)
        total = factor * total + tl.sum(raised, 1)
        largest = now
    target = found + split.to(tl.int64) * count + rows
    tl.store(target, largest, mask=rows < count)
    tl.store(target + size, total, mask=rows < count)
    tl.store(target + 2 * size, moment, mask=rows < count)
    tl.store(target + 3 * size, picked, mask=rows < count)


@triton.jit
def _backward_kernel(
    hidden, weight, bias, labels, normaliser, entropy, of_selected, of_entropy, of_logits,
    count, begin, limit, width,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b, stride_y, stride_s, stride_e, stride_z,
    HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits of the words from ``begin`` to ``limit`` (N x their number)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = begin + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    there = rows < count
    z = _logits(
        hidden, weight, bias, rows, words, count, limit, width,
        stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
        HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, UPCAST,
    )  # fmt: skip
    label = tl.load(labels + rows * stride_y, mask=there, other=-1)
    given = tl.load(of_selected + rows * stride_s, mask=there, other=0.0).to(tl.float32)
    log_p = z - tl.load(normaliser + rows, mask=there, other=0.0)[:, None]
    p = tl.exp(log_p)
    gradient = tl.where(words[None, :] == label[:, None], given[:, None], 0.0) - p * given[:, None]
    if ENTROPY:
        asked = tl.load(of_entropy + rows * stride_e, mask=there, other=0.0).to(tl.float32)
        middle = tl.load(entropy + rows, mask=there, other=0.0)
        gradient -= p * tl.where(p == 0, 0.0, log_p + middle[:, None]) * asked[:, None]
    target = of_logits + rows.to(tl.int64)[:, None] * stride_z + (words - begin)[None, :]
    tl.store(
        target,
        gradient.to(of_logits.dtype.element_ty),
        mask=there[:, None] & (words[None, :] < limit),
    )


def _settings(hidden: torch.Tensor, count: int) -> dict[str, Any]:
    single = hidden.dtype == torch.float32
    precise = torch.get_float32_matmul_precision() == "highest"
    return {
        "BLOCK_N": 128 if count > 64 else 64 if count > 32 else 32 if count > 16 else 16,
        "BLOCK_V": BLOCK_V,
        # The operands of three stages stay below 100 KB of shared memory.
        "BLOCK_D": 32 if single else 64,
        "PRECISION": "ieee" if not single or precise else "tf32",
        "UPCAST": dispatch.INTERPRETED,
        "num_warps": 8 if count > 64 else 4,
        "num_stages": 2 if torch.version.hip else 3,
    }


def forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    entropies: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities, entropies (empty where not asked for) and log-sum-exps, N in float32."""
    count, width = hidden_ND.shape
    vocabulary = len(weight_VD)
    settings = _settings(hidden_ND, count)
    tiles = triton.cdiv(count, settings["BLOCK_N"])
    blocks = triton.cdiv(vocabulary, BLOCK_V)
    parts = max(1, min(blocks, PROGRAMS // max(tiles, 1)))
    part = triton.cdiv(blocks, parts) * BLOCK_V
    parts = triton.cdiv(vocabulary, part)
    found = torch.empty((4, parts, count), dtype=torch.float32, device=hidden_ND.device)
    if count:
        bias = weight_VD if bias_V is None else bias_V
        launch: Any = _forward_kernel[(tiles, parts)]
        launch(
            hidden_ND, weight_VD, bias, labels_N, found, count, vocabulary, width, part,
            *hidden_ND.stride(), *weight_VD.stride(), bias.stride(0), labels_N.stride(0), found.stride(0),
            HAS_BIAS=bias_V is not None, ENTROPY=entropies, FLOOR=-1000.0, **settings,
        )  # fmt: skip
    largest, total, moment, picked = found
    top = largest.amax(0)
    step = (largest - top.masked_fill(top == -torch.inf, 0.0)).clamp(-1000.0, 0.0)
    factor = step.exp()
    entropy = found.new_empty(0)
    whole = (factor * total).sum(0)
    log_whole = whole.log()
    if entropies:
        entropy = log_whole - (factor * (moment + step * total)).sum(0) / whole
    normaliser = top + log_whole
    known = (labels_N >= 0) & (labels_N < vocabulary)
    return torch.where(known, picked.sum(0), torch.nan) - normaliser, entropy, normaliser


def backward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    normaliser_N: torch.Tensor,
    entropy_N: torch.Tensor,
    of_selected_N: torch.Tensor,
    of_entropy_N: torch.Tensor | None,
    wanted: list[bool],
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write those gradients of hidden states, weight and bias into ``found`` that are ``wanted``."""
    count, width = hidden_ND.shape
    bias = weight_VD if bias_V is None else bias_V
    of_hidden, of_weight, of_bias = found
    if not count:
        of_weight.zero_()
        of_bias.zero_()
        return
    settings = _settings(hidden_ND, count)
    tiles = triton.cdiv(count, settings["BLOCK_N"])
    columns = max(1, CHUNK_BYTES // (count * hidden_ND.itemsize * BLOCK_V)) * BLOCK_V
    columns = min(columns, triton.cdiv(len(weight_VD), BLOCK_V) * BLOCK_V)
    room = hidden_ND.new_empty(count, columns)
    sums = hidden_ND.new_zeros(hidden_ND.shape if wanted[0] else (0,), dtype=torch.float32)
    of_entropy = of_selected_N if of_entropy_N is None else of_entropy_N
    for begin in range(0, len(weight_VD), columns):
        limit = min(begin + columns, len(weight_VD))
        of_logits = room[:, : limit - begin]
        launch: Any = _backward_kernel[(tiles, triton.cdiv(limit - begin, BLOCK_V))]
        launch(
            hidden_ND, weight_VD, bias, labels_N, normaliser_N, entropy_N, of_selected_N, of_entropy, of_logits,
            count, begin, limit, width,
            *hidden_ND.stride(), *weight_VD.stride(), bias.stride(0), labels_N.stride(0),
            of_selected_N.stride(0), of_entropy.stride(0), of_logits.stride(0),
            HAS_BIAS=bias_V is not None, ENTROPY=of_entropy_N is not None, **settings,
        )  # fmt: skip
        if wanted[0]:
            sums += _product(of_logits, weight_VD[begin:limit])
        if wanted[1]:
            of_weight[begin:limit] = _product(of_logits.T, hidden_ND)
        if wanted[2]:
            of_bias[begin:limit] = of_logits.sum(0, dtype=torch.float32)
    if wanted[0]:
        of_hidden.copy_(sums)


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the product in float32."""
    if one.is_cuda and one.dtype != torch.float32:
        return torch.mm(one, other, out_dtype=torch.float32)
    return one.float() @ other.float()
