"""A permanent form: weights that compute what the hook does.

With every position of layer l scaled by s, all later sublayers read the same normalised input as before (a norm
takes the scale out), so s h + sum of u_j = s (h + sum of u_j / s): dividing what later layers write by s gives
the same model, up to the norm's epsilon. Ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from graftwork import UserError
from torch import nn

from graftwork_cale.layers import check_layer, layers_of

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3")
"""Types of models whose sublayers read the stream through an RMSNorm and add to it, with nothing after."""


@torch.no_grad()
def fold(model: Any, layer: int, strength: float) -> None:
    """Divide ``o_proj`` and ``down_proj`` of the layers after ``layer`` by ``strength``, in place.

    The model then computes what ``LayerEnhancement(model, layer, strength, "amplify", "all")`` does, with
    no hook: save it with ``save_pretrained`` and serve it anywhere. Powers of two are exact.

    Raises:
        UserError: an architecture for which this does not hold, an adapter that is not merged, packed
            weights, a layer or strength out of range.
    """
    if hasattr(model, "peft_config"):
        raise UserError("cale-fold changes plain weights; call merge_and_unload() on the adapted model first")
    kind, name = model.config.get_text_config().model_type, type(model).__name__
    if kind not in ARCHITECTURES:
        raise UserError(
            f"cale-fold does not hold for {name}: its algebra needs sublayers that read through an RMSNorm and add "
            f"to the stream unchanged, as in {', '.join(ARCHITECTURES)}; use the hook"
        )
    layers = layers_of(model)
    check_layer(layer, len(layers))
    if not (math.isfinite(strength) and strength > 0):
        raise UserError(f"strength = {strength}: a positive finite number is expected; 1 changes nothing")
    names = ("self_attn.o_proj", "mlp.down_proj")
    projections: list[Any] = [later.get_submodule(part) for later in layers[layer:] for part in names]
    for projection in projections:
        if type(projection) is not nn.Linear or not projection.weight.is_floating_point():
            raise UserError(
                f"cale-fold changes plain weights, and {name} has {type(projection).__name__}; fold before "
                f"quantising"
            )
    for projection in projections:
        for tensor in (projection.weight, projection.bias):
            if tensor is not None:
                tensor.div_(strength)
