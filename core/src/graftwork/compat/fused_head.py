"""TRL's own fused LM head: whether a model has one, and which models it is right for.

``trl.trainer.utils.add_fused_lm_head`` replaces a model's ``forward`` by one that also takes
``fused_lm_head=True``; the trainers of TRL call it on their model. Nothing public tells whether it was called.

Tested with trl 1.16.
"""

from __future__ import annotations

from typing import Any

# Fields of a config by which some models change their logits after the head; TRL's fused head applies these.
_APPLIED = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)
# It does not know these, nor does anything else but the model itself.
_UNKNOWN = ("output_logit_soft_cap", "logits_soft_cap", "logits_mup_width_multiplier")


def has_fused_head(base: Any) -> bool:
    """Return whether ``base``, a causal language model without wrappers, was given TRL's fused head."""
    # Accelerate's mixed precision puts a forward of its own in front and keeps the one that was there.
    forwards = (vars(base).get("forward"), vars(base).get("_original_forward"))
    functions = (getattr(forward, "__func__", forward) for forward in forwards)
    codes = (getattr(function, "__code__", None) for function in functions)
    return any(code is not None and "fused_lm_head" in code.co_varnames for code in codes)


def changes_logits(config: Any) -> bool:
    """Return whether a model with this config is known to change its logits after the head."""
    return _says(config, (*_APPLIED, *_UNKNOWN))


def fused_head_is_right(config: Any) -> bool:
    """Return whether TRL's fused head computes what the model's own forward does, as far as is known."""
    return not _says(config, _UNKNOWN)


def _says(config: Any, fields: tuple[str, ...]) -> bool:
    text = config.get_text_config()
    values = {field: getattr(text, field, None) for field in fields}
    # A scale of one changes nothing; a cap of one does.
    return any(
        value is not None and not (value == 1 and "cap" not in field) for field, value in values.items()
    )
