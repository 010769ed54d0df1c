"""Keys and values rounded as a cache would hold them, through transformers' registry of attention functions.

The attention function that a model uses has a name. We register one more, which rounds keys and values and then calls
the one that would have run. It sees every key at every call, those from the cache too; since each token of each head
has a scale of its own, rounding them at each call is the same as rounding them once, when they are stored.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from graftwork.errors import UserError
from graftwork.transform.hadamard import hadamard, rotation_block
from graftwork.transform.quantizer import fake_quantize_tokens
from graftwork.transform.scheme import ActivationScheme, KVScheme

INNER = ("sdpa", "eager")
"""Attention functions that the rounding can stand in front of."""

_NAME = re.compile(r"graftwork-kv(\d+)(-rotated)?-(\w+)")
_NORMS = re.compile(r"(q|k|query|key)_?(layer)?_?norm")


def round_kv(query: Tensor, key: Tensor, value: Tensor, scheme: KVScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value (each batch x heads x tokens x head size) with keys and values rounded.

    Asymmetric, one scale and zero point per token and head (compression protocol, section 3). With ``rotate_keys``
    queries and keys are first turned by the same Hadamard matrix, which leaves their products as they were; the
    rotated keys go to the rounding in float32.
    """
    tokens = ActivationScheme(bits=scheme.bits, symmetric=False)
    turned = key
    if scheme.rotate_keys:
        block = rotation_block(key.shape[-1])
        turned = hadamard(key.float(), block)
        query = hadamard(query.float(), block).to(query.dtype)
    return query, fake_quantize_tokens(turned, tokens).to(key.dtype), fake_quantize_tokens(value, tokens)


def kv_attention(scheme: KVScheme, inner: str) -> str:
    """Return the name of the attention function that rounds by ``scheme`` and then calls ``inner``.

    The name is good for ``attn_implementation`` and ``set_attn_implementation`` in this process from now on. Where
    nothing is to be rounded it is ``inner`` itself.

    Raises:
        UserError: ``inner`` is no function that the rounding can stand in front of.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    inner = plain_attention(inner)
    if not scheme.rounds:
        return inner
    if inner not in INNER:
        raise UserError(
            f"the KV cache is rounded in front of the attention functions {' and '.join(INNER)} only, and the model "
            f"uses '{inner}'; pass attn_implementation='sdpa'"
        )
    name = f"graftwork-kv{scheme.bits}{'-rotated' if scheme.rotate_keys else ''}-{inner}"
    AttentionInterface.register(name, _function(scheme, inner))
    AttentionMaskInterface.register(name, AttentionMaskInterface._global_mapping[inner])
    return name


def plain_attention(name: str) -> str:
    """Return the attention function that runs after the rounding that ``name`` means; ``name`` where it means none."""
    match = _NAME.fullmatch(name)
    return match[3] if match else name


def set_kv(model: Any, scheme: KVScheme | None) -> None:
    """Round the KV cache of ``model`` by ``scheme`` from now on; None stops it.

    Raises:
        UserError: see :func:`check_kv` and :func:`kv_attention`.
    """
    scheme = scheme or KVScheme(bits=16)
    if scheme.rounds:
        check_kv(model, scheme)
    model.set_attn_implementation(kv_attention(scheme, model.config._attn_implementation))


def check_kv(model: Any, scheme: KVScheme) -> None:
    """Refuse a model (with weights or on the meta device) whose KV cache cannot be rounded by ``scheme``.

    Raises:
        UserError: its attention is not reached, or ``rotate_keys`` is asked for and queries and keys are normalised
            or only partly rotated by their position.
    """
    if not scheme.rounds:
        return
    config = model.config
    kind = config.model_type
    if not model._can_set_attn_implementation():
        raise UserError(
            f"the KV cache of a {kind} model cannot be rounded: its attention is not reached through transformers' "
            f"AttentionInterface; use a scheme without KV"
        )
    if getattr(config, "kv_lora_rank", None):
        raise UserError(
            f"the KV cache of a {kind} model cannot be rounded: it holds latents, not the keys and values that "
            f"attention sees; use a scheme without KV"
        )
    if not scheme.rotate_keys:
        return
    norm = query_key_norm(model)
    if norm is not None:
        raise UserError(
            f"keys of this {kind} model are not rotated: '{norm}' normalises queries and keys per head; "
            f"leave the rotation of keys out"
        )
    share = rotary_share(config)
    if share != 1:
        attention = next(
            (name for name, _ in model.named_modules() if name.endswith(("attn", "attention"))), kind
        )
        raise UserError(
            f"keys of this {kind} model are not rotated: '{attention}' gives a position to {share:.0%} of each head "
            f"only; leave the rotation of keys out"
        )


def query_key_norm(model: nn.Module) -> str | None:
    """Return the name of the first module that normalises queries or keys, or None."""
    for name, _ in model.named_modules():
        if _NORMS.fullmatch(name.rpartition(".")[2]):
            return name
    return None


def rotary_share(config: Any) -> float:
    """Return the share of each head that rotary positions turn; 1 where the config says nothing."""
    parameters = getattr(config, "rope_parameters", None)
    shares = [getattr(config, name, None) for name in ("partial_rotary_factor", "rotary_pct")]
    if isinstance(parameters, dict):
        shares.append(parameters.get("partial_rotary_factor"))
    return next((float(share) for share in shares if share is not None), 1.0)


def _function(scheme: KVScheme, inner: str) -> Callable[..., Any]:
    from transformers import AttentionInterface

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        run = AttentionInterface._global_mapping[inner] if inner != "eager" else _eager(module)
        return run(module, *round_kv(query, key, value, scheme), mask, **options)

    return attention


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention of the family that ``module`` belongs to: each has one beside its classes."""
    family = sys.modules[type(module).__module__]
    try:
        return family.eager_attention_forward
    except AttributeError:
        raise UserError(
            f"'{family.__name__}' has no eager attention function of the usual name; use attn_implementation='sdpa'"
        ) from None
