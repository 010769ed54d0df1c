"""How a compressed model is stored: which tensors, and what config.json says about them.

There are four layouts. ``dense`` is an ordinary checkpoint. ``pack-quantized`` and ``int-quantized`` are those of
compressed-tensors, which transformers and vLLM read without us. ``graftwork`` holds what these cannot: rotations,
low-rank factors and corrections, a rounded KV cache. A folder in the last layout has a model type and a name of its
weight file that transformers does not know by itself, so that nobody loads it as something it is not; see
:mod:`graftwork.transform.loading`.

A model is described layer by layer (:func:`describe_layer`), and descriptions are small dictionaries for JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from graftwork.errors import UserError
from graftwork.transform.modules import CompressedLinear, Factored
from graftwork.transform.scheme import ActivationScheme, KVScheme

Format = Literal["auto", "dense", "compressed-tensors", "graftwork"]
"""What can be asked for; ``auto`` takes the first that holds everything: dense, compressed-tensors, graftwork."""

Layout = Literal["dense", "pack-quantized", "int-quantized", "graftwork"]

METHOD = "graftwork"
MODEL_TYPE = "graftwork-compressed"
OUR_INDEX = "graftwork.safetensors.index.json"
LAYOUT_VERSION = 1
_PARTS = ("weights", "activations", "rotation", "correction")
# A name without its first number, which is that of the layer.
_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")

Description = dict[str, Any]
"""Linears by their full names: None for a plain one, the settings of a :class:`CompressedLinear`, or ``factors``."""


# ---------------------------------------------------------------------- what is there


def describe_layer(prefix: str, module: nn.Module) -> Description:
    """Return what ``module``, called ``prefix`` in its model, holds; ready for JSON, a few hundred bytes a linear."""
    found: Description = {}
    inside: set[nn.Module] = set()
    for name, child in module.named_modules():
        full = ".".join(part for part in (prefix.rstrip("."), name) if part)
        if child in inside:
            continue
        if isinstance(child, Factored):
            inside.update(child.children())
            found[full] = {"factors": [child.first.settings(), child.second.settings()], "rank": child.rank}
        elif isinstance(child, CompressedLinear):
            settings = child.settings()
            found[full] = None if _is_plain(settings) else settings
        elif isinstance(child, nn.Linear):
            found[full] = None
    return found


def combine(
    descriptions: Iterable[Description],
    kv: KVScheme | None = None,
    format: Format = "auto",
    *,
    ignore: Iterable[str] = ("lm_head",),
) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a model with these layers; None where it needs none.

    ``ignore`` names linears outside the layers, which are never compressed. More layers may follow: see
    :func:`check_change`.

    Raises:
        UserError: the format asked for cannot hold a layer.
    """
    whole: Description = {}
    for description in descriptions:
        whole.update(description)
    layout = choose(format, whole, kv)
    if layout == "dense":
        return None
    if layout == "graftwork":
        return {
            "quant_method": METHOD,
            "version": LAYOUT_VERSION,
            "groups": [
                {**settings, "modules": _ranges(names)}
                for settings, names in _groups(whole)
                if settings is not None
            ],
            "kv": kv.model_dump() if kv is not None and kv.rounds else None,
        }
    return _compressed_tensors(whole, layout, ignore)


def describe(model: nn.Module, kv: KVScheme | None = None, format: Format = "auto") -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a whole model. Raises: see :func:`combine`."""
    description = describe_layer("", model)
    outside = [name for name, settings in description.items() if settings is None and not _LAYER.search(name)]
    layers = {name: settings for name, settings in description.items() if name not in outside}
    return combine([layers], kv, format, ignore=outside or ("lm_head",))


def layout_of(quantization_config: Mapping[str, Any] | None) -> Layout:
    """Return the layout of tensors that a config made by :func:`combine` means."""
    if quantization_config is None:
        return "dense"
    return "graftwork" if quantization_config["quant_method"] == METHOD else quantization_config["format"]


def check_change(before: Layout, after: Layout) -> None:
    """Refuse another layout for a layer after others were written in ``before``.

    A plain linear is stored alike in all layouts, and rounded weights are the same tensors in ``pack-quantized`` and
    in ``graftwork``. So ``auto`` may go from one to the next as layers come, but never away from ``int-quantized``.

    Raises:
        UserError: the layers that are written would have to be written anew.
    """
    if before != after and before not in ("dense", "pack-quantized"):
        raise UserError(
            f"this layer cannot be stored as those before it are ({before}); set format 'graftwork' to store "
            f"all of them alike"
        )


# ---------------------------------------------------------------------- which layout


def choose(format: Format, description: Description, kv: KVScheme | None = None) -> Layout:
    """Return the layout for a model whose layers are like ``description``.

    ``auto`` takes compressed-tensors' only where plain transformers loads it.

    Raises:
        UserError: the format asked for cannot hold it; the sentence names a linear and what is in the way.
    """
    used = [settings for settings in description.values() if settings is not None]
    # Whole bytes for what computes in whole bytes, as others expect it; else no bit is wasted.
    bytes_only = bool(used) and all(
        settings.get("activations") is not None and (settings["weights"] or {}).get("bits") == 8
        for settings in used
    )
    compressed: Layout = "int-quantized" if bytes_only else "pack-quantized"
    first: Layout = compressed if used else "dense"
    layouts: dict[str, tuple[Layout, ...]] = {
        "auto": (first, "graftwork"),
        "dense": ("dense",),
        "compressed-tensors": (compressed,),
        "graftwork": ("graftwork",),
    }
    for layout in layouts[format]:
        # Up to 0.20 compressed-tensors gives packed zero points a wrong shape when a model is loaded packed, and
        # transformers then refuses it; vLLM reads them, and so does transformers with dequantize=True.
        unread = format == "auto" and layout == "pack-quantized" and _has_zero_points(used)
        if not unread and obstacle(layout, description, kv) is None:
            return layout
    check_fits(layouts[format][-1], description, kv)
    raise AssertionError(format)


def check_fits(layout: Layout, description: Description, kv: KVScheme | None = None) -> None:
    """Refuse a layer that ``layout`` cannot hold.

    Raises:
        UserError: with the linear and what is in the way.
    """
    why = obstacle(layout, description, kv)
    if why is None:
        return
    name = "dense" if layout == "dense" else "compressed-tensors"
    raise UserError(f"format '{name}' cannot hold the model: {why}; format 'auto' or 'graftwork' can")


def obstacle(layout: Layout, description: Description, kv: KVScheme | None = None) -> str | None:
    """Return what of ``description`` does not fit into ``layout``, in half a sentence, or None."""
    rounds_kv = kv is not None and kv.rounds
    if layout == "graftwork":
        return None
    if rounds_kv and kv is not None:
        return f"the KV cache is rounded to {kv.bits} bits when the model runs"
    for name, settings in description.items():
        if settings is None:
            continue
        if "factors" in settings:
            return f"'{name}' is a product of two matrices"
        for part in ("rotation", "correction"):
            if settings[part] is not None:
                return f"'{name}' has a {part}{' of its inputs' if part == 'rotation' else ''}"
        if layout == "dense":
            if settings["activations"] is not None:
                return f"the inputs of '{name}' are rounded when the model runs"
            continue
        if settings["weights"] is None:
            return f"the weight of '{name}' is not rounded, but its inputs are"
        why = activation_obstacle(settings["activations"])
        if why is not None:
            return f"the inputs of '{name}' are rounded {why}"
    return None


def activation_obstacle(activations: Mapping[str, Any] | None) -> str | None:
    """Return why compressed-tensors would round activations to other numbers than ours, or None."""
    if activations is None:
        return None
    scheme = ActivationScheme.model_validate(activations)
    if scheme.ratio != 1:
        return f"within {scheme.ratio:g} of their range"
    if scheme.symmetric and scheme.convention != "half-range":
        return f"by the convention '{scheme.convention}', not 'half-range'"
    return None


# ---------------------------------------------------------------------- tensors and config.json


def layer_tensors(prefix: str, module: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Return what is stored of ``module`` (called ``prefix`` in its model), by full name, contiguous and on the CPU."""
    stored: dict[str, Tensor] = {}
    start = f"{prefix.rstrip('.')}." if prefix else ""
    owners = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, CompressedLinear) and layout in ("dense", "int-quantized") and child.is_quantized
    }
    for name, tensor in module.state_dict().items():
        if name.rpartition(".")[0] not in owners or name.endswith(".bias") or name == "bias":
            stored[start + name] = tensor
    for name, child in owners.items():
        here = f"{start}{name}." if name else start
        if layout == "dense":
            stored[f"{here}weight"] = child.dense_weight()
            child.forget()
            continue
        numbers = child.codes()
        stored[f"{here}weight"] = numbers.codes
        stored[f"{here}weight_scale"] = numbers.scale
        if numbers.zero is not None:
            stored[f"{here}weight_zero_point"] = numbers.zero
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(stored.items())}


def checkpoint_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json holds, given the model's own config with a ``quantization_config`` of :func:`combine`.

    In the layout of ours the model type becomes one that transformers does not know before
    :mod:`graftwork.transform.loading` is imported.
    """
    written = {
        key: value for key, value in config.items() if value is not None or key != "quantization_config"
    }
    if layout_of(written.get("quantization_config")) == "graftwork":
        written.update(model_type=MODEL_TYPE, base_model_type=config["model_type"])
    return written


def index_name(config: Mapping[str, Any]) -> str:
    """Return the name of the index of the weight files, beside a config.json with the contents ``config``.

    In the layout of ours it is one that transformers does not look for, and no file may be called
    ``model.safetensors``: even a class that does not look at the model type then finds no weights.
    """
    return OUR_INDEX if config.get("model_type") == MODEL_TYPE else "model.safetensors.index.json"


def check_not_quantized(config: Any, ref: str) -> None:
    """Refuse a model whose weights are rounded already.

    Raises:
        UserError: its config has a ``quantization_config``.
    """
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is None:
            continue
        fields = found if isinstance(found, dict) else found.to_dict()
        method = fields.get("quant_method", "unknown")
        raise UserError(
            f"model '{ref}' is quantised already ({getattr(method, 'value', method)}), and what rounding took away is "
            f"not there to be measured or rounded better; name the model that it was made from"
        )


# ---------------------------------------------------------------------- compressed-tensors


def _compressed_tensors(description: Description, layout: Layout, ignore: Iterable[str]) -> dict[str, Any]:
    groups = _groups(description)
    skipped = [name for settings, names in groups if settings is None for name in names]
    used = [(settings, names) for settings, names in groups if settings is not None]
    config_groups = {}
    for index, (settings, names) in enumerate(used):
        config_groups[f"group_{index}"] = {
            # One scheme for all: vLLM and older readers match by class.
            "targets": ["Linear"] if len(used) == 1 else sorted(names),
            "weights": _weight_args(settings["weights"]),
            "input_activations": _activation_args(settings["activations"]),
            "output_activations": None,
            "format": layout,
        }
    return {
        "quant_method": "compressed-tensors",
        "version": importlib.metadata.version("compressed-tensors"),
        "format": layout,
        "quantization_status": "compressed",
        "ignore": sorted({*ignore, *skipped}),
        "kv_cache_scheme": None,
        "config_groups": config_groups,
    }


def _weight_args(weights: Mapping[str, Any]) -> dict[str, Any]:
    group = weights["group"]
    return {
        "num_bits": weights["bits"],
        "type": "int",
        "symmetric": weights["symmetric"],
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }


def _activation_args(activations: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    return {
        "num_bits": activations["bits"],
        "type": "int",
        "symmetric": activations["symmetric"],
        "strategy": "token",
        "dynamic": True,
        "observer": None,
    }


def _has_zero_points(used: Iterable[Mapping[str, Any]]) -> bool:
    return any(settings.get("weights") and not settings["weights"]["symmetric"] for settings in used)


# ---------------------------------------------------------------------- groups of names


def _is_plain(settings: Mapping[str, Any]) -> bool:
    return all(settings[part] is None for part in _PARTS)


def _groups(description: Description) -> list[tuple[dict[str, Any] | None, list[str]]]:
    """Return linears of the same settings together, in the order of their first."""
    groups: dict[str, tuple[dict[str, Any] | None, list[str]]] = {}
    for name, settings in description.items():
        groups.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(name)
    return list(groups.values())


def _ranges(names: Iterable[str]) -> dict[str, list[list[int]]]:
    """Return names with ``*`` for the layer's number, each with the ranges (both ends included) of that number."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = _LAYER.search(name)
        template = name if match is None else f"{name[: match.start()]}*{name[match.end() :]}"
        numbers.setdefault(template, []).extend([] if match is None else [int(match[1])])
    ranges: dict[str, list[list[int]]] = {}
    for template, layers in numbers.items():
        found = ranges.setdefault(template, [])
        for layer in sorted(layers):
            if found and found[-1][1] == layer - 1:
                found[-1][1] = layer
            else:
                found.append([layer, layer])
    return ranges


def module_names(ranges: Mapping[str, list[list[int]]]) -> list[str]:
    """Return the names that the ``modules`` of a group stand for."""
    names = []
    for template, spans in ranges.items():
        if "*" not in template:
            names.append(template)
        for first, last in spans:
            names.extend(template.replace("*", str(layer)) for layer in range(first, last + 1))
    return names
