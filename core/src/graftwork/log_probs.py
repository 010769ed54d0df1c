"""Log-probabilities of given answers, without the logits of the whole batch.

The logits of a batch are tokens x vocabulary numbers, mostly more than all the rest of a training step, and a
loss over pairs of answers wants one number of each row. :func:`answer_log_probs` gets at the hidden states of the
answer's tokens in any causal language model, by a hook on the head which gives the head no row at all to compute, and
leaves the arithmetic to a :class:`TokenLogProbs` that its caller brings. Without one TRL's own head does it, or
the logits are made.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from graftwork.compat.fused_head import changes_logits, fused_head_is_right, has_fused_head

Way = Literal["hidden", "fused", "logits"]


class TokenLogProbs(Protocol):
    """The arithmetic of a head, such as ``graftwork_kernels.selected_log_probs``."""

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None, /
    ) -> torch.Tensor:
        """Return log softmax(``hidden`` ``weight``^T + ``bias``)[n, ``labels``[n]], (n) in fp32 or fp64.

        ``hidden`` is n x d, ``weight`` v x d, ``labels`` (n) are from 0 to v - 1. Products are taken in the dtype of
        autocast, else of the inputs; gradients reach whatever trains. n may be 0.
        """
        ...


def answer_log_probs(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    answer_mask: torch.Tensor,
    *,
    bare: Any = None,
    token_log_probs: TokenLogProbs | None = None,
) -> torch.Tensor:
    """Return each row's sum of log p(token | the tokens before it) over its answer, (b) in fp32.

    ``batch`` has ``input_ids`` and, where rows are padded on either side, ``attention_mask`` (b x t);
    ``answer_mask`` (b x t) marks the answer's tokens. A row's first token has nothing before it, so it never
    counts, and padding does not either. A row without answer has 0.

    ``model`` is what is called, wrapped as it may be (PEFT, DDP, DeepSpeed); ``bare`` is the same model without
    the wrappers of distributed training, found where None. :func:`how` says which way is taken;
    ``token_log_probs`` makes ``hidden`` possible.
    """
    bare = _bare(model) if bare is None else bare
    base = _base(bare)
    ids = batch["input_ids"]
    seen = batch.get("attention_mask")
    seen = torch.ones_like(ids, dtype=torch.bool) if seen is None else seen.bool()
    asked = answer_mask[:, 1:].bool() & seen[:, 1:] & seen[:, :-1]
    labels = ids[:, 1:]
    inputs = _inputs(bare, base, batch, seen)
    way = how(model, bare=bare, token_log_probs=token_log_probs)
    if way == "hidden" and token_log_probs is not None:
        found = _of_hidden(model, base, inputs, asked, labels, token_log_probs)
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


def how(model: nn.Module, *, bare: Any = None, token_log_probs: TokenLogProbs | None = None) -> Way:
    """Return how :func:`answer_log_probs` gets at this model's log-probabilities.

    ``hidden`` is ``token_log_probs`` on what a plain head is given. ``fused`` is TRL's own head, where a trainer of TRL
    has put it on the model: for heads whose weight is spread over processes, for models that change their logits
    after the head, and where there is no ``token_log_probs``. ``logits`` makes the logits; it is right for every
    model, and used where the others might not be.
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
    return fused if token_log_probs is None else "hidden"


# Heads that were seen in use: whether their output is the model's logits, untouched.
_same_logits: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _of_hidden(
    model: nn.Module,
    base: Any,
    inputs: dict[str, Any],
    asked: torch.Tensor,
    labels: torch.Tensor,
    token_log_probs: TokenLogProbs,
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
        taken.append(token_log_probs(chosen, module.weight, labels[asked].to(hidden.device), module.bias))
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
