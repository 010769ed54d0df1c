"""Which modules of a model form an MLP, and so what a neuron is.

Neuron j is row j of every input projection and column j of the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork import UserError
from torch import nn
from transformers.pytorch_utils import Conv1D

# Names of the input projections and of the output projection, relative to a common parent.
KNOWN: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen2
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # OPT, Phi
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
    (("wi_0", "wi_1"), "wo"),  # T5 v1.1
    (("wi",), "wo"),  # T5
)


@dataclass(frozen=True)
class Mlp:
    """One MLP: input projections ``ins`` (each m x d) and output projection ``out`` (d x m), by module name."""

    name: str
    ins: tuple[str, ...]
    out: str
    inputs: int
    neurons: int

    @property
    def moment_at(self) -> str:
        """Return the projection whose input all of ``ins`` share."""
        return self.ins[0]


def base_of(model: nn.Module) -> nn.Module:
    """Return the model below what PEFT wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_mlps(model: nn.Module, names: Mapping[str, Any] | None = None) -> list[Mlp]:
    """Return the MLPs of ``model`` in its own order, adapted or not, also on the meta device.

    ``names`` is ``{"in": [...], "out": name}`` for a model that :data:`KNOWN` does not cover.

    Raises:
        UserError: the model is not recognised, or only a part of it.
    """
    base = base_of(model)
    modules = dict(base.named_modules())
    shapes = KNOWN if names is None else ((tuple(names["in"]), str(names["out"])),)
    found = [mlp for key in modules for ins, out in shapes if (mlp := _mlp_at(modules, key, ins, out))]
    layers = _layer_count(base)
    if len(found) < max(layers, 1):
        asked = "" if names is None else " with the names in 'neurons'"
        raise UserError(
            f"PaRSP finds {len(found)} MLPs in {type(base).__name__}, which has {layers} layers{asked}; name its "
            f"projections with plugins.parsp.neurons: {{in: [gate, up], out: down}}, relative to what they share"
        )
    return found


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer of any kind.

    Raises:
        TypeError: the module has neither.
    """
    if hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    raise TypeError(f"PaRSP adapts linear layers; {type(module).__name__} is none")


def short_names(mlps: Sequence[Mlp], which: str) -> list[str]:
    """Return the endings by which PEFT finds the ``"ins"`` or the ``"out"`` of all ``mlps``."""
    endings: dict[str, None] = {}
    for mlp in mlps:
        for full in mlp.ins if which == "ins" else (mlp.out,):
            parent = mlp.name.rpartition(".")[2]
            own = full[len(mlp.name) + 1 :] if mlp.name else full
            endings[own if not parent or parent.isdigit() else f"{parent}.{own}"] = None
    return list(endings)


def _mlp_at(modules: Mapping[str, nn.Module], key: str, ins: Sequence[str], out: str) -> Mlp | None:
    if key != ins[0] and not key.endswith("." + ins[0]):
        return None
    prefix = key[: -len(ins[0])]
    names = [prefix + name for name in (*ins, out)]
    if not all(name in modules for name in names):
        return None
    shapes = [sizes(modules[name]) for name in names]
    width, neurons = shapes[0]
    if any(shape != (width, neurons) for shape in shapes[:-1]) or shapes[-1][0] != neurons:
        raise UserError(
            f"PaRSP: '{prefix.rstrip('.')}' is no MLP: its projections {', '.join((*ins, out))} have the sizes "
            f"{', '.join(f'{a} to {b}' for a, b in shapes)}; name others in plugins.parsp.neurons"
        )
    return Mlp(prefix.rstrip("."), tuple(names[:-1]), names[-1], width, neurons)


def _layer_count(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if config is None:
        return 0
    text = config.get_text_config()
    count = int(getattr(text, "num_hidden_layers", 0) or 0)
    if getattr(config, "is_encoder_decoder", False):
        count += int(getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", 0) or 0)
    return count
