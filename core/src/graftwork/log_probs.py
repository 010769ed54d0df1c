"""Log-probabilities of given answers, without the logits of the whole batch.

The logits of a batch are tokens x vocabulary numbers, mostly more than all the rest of a training step, and a
loss over pairs of answers wants one number of each row. :func:`selected_log_probs` makes them a few rows at a time
and keeps none. :func:`answer_log_probs` gets it what it needs from any causal language model: a hook on the head
takes the hidden states of the answer's tokens and gives the head no row at all to compute.

The equations are the definition of softmax. Where the head is frozen, log p_n = z_n[y_n] - logsumexp z_n with
z_n = W h_n + b has the gradient g_n (W[y_n] - sum_v p_n[v] W[v]) with respect to h_n. Its direction does not depend
on g_n, the gradient that arrives, so it is taken while the logits are there, in the forward pass, and the backward
pass has nothing to recompute: two products with the head instead of three. That order is ours.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from graftwork.compat.fused_head import changes_logits, fused_head_is_right, has_fused_head

Way = Literal["chunked", "fused", "logits"]
CHUNK_BYTES = 64 * 2**20


def selected_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Return log softmax(``hidden`` ``weight``^T + ``bias``)[n, ``labels``[n]], (n) in fp32 (fp64 for fp64 input).

    ``hidden`` is n x d, ``weight`` v x d, ``labels`` (n) are from 0 to v - 1. As many rows are taken at a time as
    make at most ``chunk_bytes`` of fp32 logits, one at least; besides the gradients nothing larger exists.

    The products are taken in the dtype of autocast, else of the inputs; all sums and the softmax are in fp32. In
    bf16 each logit is rounded, so it is off by up to 2^-9 of itself, as it is with the model's own head; the
    log-probability is off by at most twice what the largest logit is.
    """
    direction_now = torch.is_grad_enabled() and hidden.requires_grad
    return cast(
        torch.Tensor, _SelectedLogProbs.apply(hidden, weight, bias, labels, chunk_bytes, direction_now)
    )


class _SelectedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_bytes: int,
        hidden_trains: bool,
    ) -> torch.Tensor:
        chunks = _Chunks(hidden, weight, bias, chunk_bytes)
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        direction = (
            torch.empty(hidden.shape, dtype=chunks.exact, device=hidden.device)
            if hidden_trains and not head_trains
            else None
        )
        selected = torch.empty(len(hidden), dtype=chunks.exact, device=hidden.device)
        normaliser = torch.empty_like(selected)
        for rows in chunks:
            logits = chunks.logits(hidden, rows)
            picked = logits.gather(1, labels[rows, None]).squeeze(1)
            largest = logits.amax(1)
            total = logits.sub_(largest[:, None]).exp_().sum(1)
            normaliser[rows] = largest + total.log()
            selected[rows] = picked - normaliser[rows]
            if direction is not None:
                probabilities = logits.div_(total[:, None])
                direction[rows] = weight[labels[rows]].to(chunks.exact) - chunks.times_weight(probabilities)
        if direction is not None:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(hidden, weight, bias, labels, normaliser)
        ctx.dtypes = hidden.dtype, chunks.dtype
        ctx.chunk_bytes = chunk_bytes
        return selected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype, computed = ctx.dtypes
        if len(ctx.saved_tensors) == 1:
            (direction,) = ctx.saved_tensors
            return (direction * gradient[:, None]).to(dtype), None, None, None, None, None
        hidden, weight, bias, labels, normaliser = ctx.saved_tensors
        chunks = _Chunks(hidden, weight, bias, ctx.chunk_bytes, computed)
        of_hidden, of_weight, of_bias = (
            torch.zeros(tensor.shape, dtype=chunks.exact, device=tensor.device) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for rows in chunks:
            logits = chunks.logits(hidden, rows)
            of_logits = logits.sub_(normaliser[rows, None]).exp_().neg_()
            of_logits.scatter_add_(1, labels[rows, None], torch.ones_like(of_logits[:, :1]))
            of_logits.mul_(gradient[rows, None])
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, hidden[rows].to(chunks.exact))
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            if of_hidden is not None:
                of_hidden[rows] = chunks.times_weight(of_logits).to(chunks.exact)
        return (
            of_hidden if of_hidden is None else of_hidden.to(hidden.dtype),
            of_weight if of_weight is None else of_weight.to(weight.dtype),
            of_bias if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
        )


class _Chunks:
    """Walks over the rows of ``hidden`` (n x d), a few at a time, and makes their logits in the same memory."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        chunk_bytes: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is None:
            kind = hidden.device.type
            dtype = (
                torch.get_autocast_dtype(kind)
                if torch.is_autocast_enabled(kind)
                else torch.promote_types(hidden.dtype, weight.dtype)
            )
        self.dtype = dtype
        self.exact = torch.promote_types(dtype, torch.float32)
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(self.exact)
        self.count = len(hidden)
        self.rows = max(1, min(self.count, chunk_bytes // (4 * len(weight))))
        size = (self.rows, len(weight))
        self.rounded = torch.empty(size, dtype=dtype, device=hidden.device)
        same = dtype == self.exact
        self.buffer = self.rounded if same else torch.empty(size, dtype=self.exact, device=hidden.device)

    def __iter__(self) -> Any:
        return (slice(start, min(start + self.rows, self.count)) for start in range(0, self.count, self.rows))

    def logits(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the logits (rows x v) in the exact dtype; the next call writes over them."""
        chunk = hidden[rows].to(self.dtype)
        exact = self.buffer[: len(chunk)]
        torch.mm(chunk, self.weight.T, out=self.rounded[: len(chunk)])
        if exact.dtype != self.dtype:
            exact.copy_(self.rounded[: len(chunk)])
        return exact if self.bias is None else exact.add_(self.bias)

    def times_weight(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` (rows x v) times the weight, taken in the dtype of the products; (rows x d)."""
        if values.dtype != self.dtype:
            values = self.rounded[: len(values)].copy_(values)
        return values @ self.weight


def answer_log_probs(
    model: nn.Module, batch: Mapping[str, torch.Tensor], answer_mask: torch.Tensor, *, bare: Any = None
) -> torch.Tensor:
    """Return each row's sum of log p(token | the tokens before it) over its answer, (b) in fp32.

    ``batch`` has ``input_ids`` and, where rows are padded on either side, ``attention_mask`` (b x t);
    ``answer_mask`` (b x t) marks the answer's tokens. A row's first token has nothing before it, so it never
    counts, and padding does not either. A row without answer has 0.

    ``model`` is what is called, wrapped as it may be (PEFT, DDP, DeepSpeed); ``bare`` is the same model without
    the wrappers of distributed training, found where None. :func:`how` says which way is taken.
    """
    bare = _bare(model) if bare is None else bare
    base = _base(bare)
    ids = batch["input_ids"]
    seen = batch.get("attention_mask")
    seen = torch.ones_like(ids, dtype=torch.bool) if seen is None else seen.bool()
    asked = answer_mask[:, 1:].bool() & seen[:, 1:] & seen[:, :-1]
    labels = ids[:, 1:]
    inputs = _inputs(bare, base, batch, seen)
    way = how(model, bare=bare)
    if way == "chunked":
        found = _chunked(model, base, inputs, asked, labels)
        if found is not None:
            return _sums(found, asked)
        _same_logits[base.get_output_embeddings()] = False
        way = "logits"
    if way == "fused":
        wanted = torch.cat([ids[:, :1], labels.masked_fill(~asked, -100)], 1)
        per_token = cast(Any, model(**inputs, labels=wanted, fused_lm_head=True)).log_probs
        return per_token[:, -asked.shape[1] :].float().sum(1)
    logits = model(**inputs).logits[:, -ids.shape[1] :][:, :-1][asked.to(ids.device)]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = labels[asked].to(logits.device)
    return _sums(logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(1), asked)


def how(model: nn.Module, *, bare: Any = None) -> Way:
    """Return how :func:`answer_log_probs` gets at this model's log-probabilities.

    ``chunked`` is :func:`selected_log_probs` on what a plain head is given. ``fused`` is TRL's own head, where a
    trainer of TRL has put it on the model: for heads whose weight is spread over processes, for models that change
    their logits after the head, and on GPUs, where it has a kernel of its own. ``logits`` makes the logits; it is
    right for every model, and used where the others might not be.
    """
    base = _base(_bare(model) if bare is None else bare)
    head = base.get_output_embeddings()
    # A weight that is spread over processes shows no numbers here.
    known = _is_sharded(head.weight) or _multiplies(head.weight)
    if type(head).forward is not nn.Linear.forward or not known:
        # An adapter's layer, a quantised one: only itself knows what it computes.
        return "logits"
    fused: Way = "fused" if has_fused_head(base) and fused_head_is_right(base.config) else "logits"
    if _is_sharded(head.weight) or changes_logits(base.config):
        return fused
    if not _same_logits.get(head, True):
        return "logits"
    return "fused" if fused == "fused" and _has_kernel(head.weight.device) else "chunked"


# Heads that were seen in use: whether their output is the model's logits, untouched.
_same_logits: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _chunked(
    model: nn.Module, base: Any, inputs: dict[str, Any], asked: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor | None:
    """Return the log-probability of every asked token, in order; None if this model cannot be read so.

    PEFT calls the forward of the model inside it without its hooks, so the hook is on the head. In the first call
    of a model the head gets the last token of every row, and its output must come out of the model as it is: a
    model that changed it would have other probabilities than its head says.
    """
    head = base.get_output_embeddings()
    first_time = head not in _same_logits
    rows, width = labels.shape[0], labels.shape[1] + 1
    taken: list[torch.Tensor] = []
    made: list[torch.Tensor] = []

    def take(module: Any, args: tuple[Any, ...]) -> Any:
        if not args or taken or args[0].dim() != 3 or len(args[0]) != rows or args[0].shape[1] < width:
            return None
        # An adapter that prepends tokens makes the rows longer.
        hidden = args[0][:, -width:][:, :-1].to(module.weight.device)
        chosen = hidden[asked.to(hidden.device)]
        taken.append(selected_log_probs(chosen, module.weight, labels[asked].to(hidden.device), module.bias))
        return (args[0][:, -1:] if first_time else args[0][:, :0], *args[1:])

    hooks = [head.register_forward_pre_hook(take)]
    if first_time:
        hooks.append(head.register_forward_hook(lambda module, args, output: made.append(output.detach())))
    try:
        logits = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(taken) != 1:
        return None
    if first_time:
        if len(made) != 1 or not _equal(logits, made[0]):
            return None
        _same_logits[head] = True
    return taken[0].to(labels.device)


def _equal(logits: torch.Tensor, made: torch.Tensor) -> bool:
    """Return whether both are the same numbers; not-a-number is equal to itself."""
    if logits.shape != made.shape:
        return False
    one, other = logits.detach().float(), made.float().to(logits.device)
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _sums(per_token: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Return the sums (b) of the values of the asked tokens, which stand in the order of ``asked`` (b x t - 1)."""
    table = torch.zeros(asked.shape, dtype=per_token.dtype, device=asked.device)
    return table.masked_scatter(asked, per_token.to(asked.device)).sum(1).float()


def _inputs(bare: Any, base: Any, batch: Mapping[str, torch.Tensor], seen: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of the forward pass; in rows that are padded on the left, positions start at 0."""
    inputs: dict[str, Any] = {
        key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch
    }
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters
    # An adapter that prepends tokens counts positions itself.
    if takes_positions and not _prepends(bare) and "position_ids" not in inputs and not seen[:, 0].all():
        inputs["position_ids"] = (seen.long().cumsum(1) - 1).clamp_min(0)
    return {**inputs, "use_cache": False}


def _prepends(bare: Any) -> bool:
    configs = getattr(bare, "peft_config", {})
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def _bare(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def _base(bare: Any) -> Any:
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare


def _multiplies(weight: Any) -> bool:
    """Return whether ``weight`` is a plain matrix of numbers, on a device."""
    return (
        weight.dim() == 2 and weight.is_floating_point() and weight.dtype.itemsize > 1 and not weight.is_meta
    )


def _is_sharded(weight: Any) -> bool:
    """Return whether other processes hold parts of ``weight`` (DeepSpeed ZeRO-3, FSDP 2)."""
    return hasattr(weight, "ds_id") or hasattr(weight, "full_tensor")


def _has_kernel(device: torch.device) -> bool:
    from transformers.utils.import_utils import is_triton_available

    return device.type in ("cuda", "xpu") and is_triton_available()
