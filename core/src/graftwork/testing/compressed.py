"""Tiny models with compressed layers, and the folder that such a model becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from graftwork.testing.models import tiny_tokenizer
from graftwork.transform.format import (
    Format,
    checkpoint_config,
    combine,
    describe_layer,
    index_name,
    layer_tensors,
    layout_of,
)
from graftwork.transform.scheme import KVScheme
from graftwork.transform.structure import find_layers


def replace_linears(model: Any, make: Callable[[str, nn.Linear], nn.Module]) -> Any:
    """Put ``make(name, linear)`` in the place of every linear of the decoder layers, and return the model."""
    prefix, layers = find_layers(model)
    for name, linear in list(layers.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(layers.get_submodule(parent), last, make(f"{prefix}.{name}", linear))
    return model


def store(model: Any, folder: Path, kv: KVScheme | None = None, format: Format = "auto") -> Path:
    """Write a compressed model with a tokenizer to ``folder`` and return it.

    Raises:
        UserError: ``format`` cannot hold the model.
    """
    prefix, layers = find_layers(model)
    descriptions = [describe_layer(f"{prefix}.{index}", layer) for index, layer in enumerate(layers)]
    quantization = combine(descriptions, kv, format)
    layout = layout_of(quantization)
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{prefix}.")}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for index, layer in enumerate(layers):
        tensors |= layer_tensors(f"{prefix}.{index}", layer, layout)
    folder.mkdir(parents=True)
    file = "model-00001-of-00001.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / file, metadata={"format": "pt"})
    fields: Mapping[str, Any] = json.loads(model.config.to_json_string())
    config = checkpoint_config({**fields, "quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index_of = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / index_name(config)).write_text(json.dumps(index_of), encoding="utf-8")
    tiny_tokenizer().save_pretrained(folder)
    return folder
