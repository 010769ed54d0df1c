"""PaRSP as a PEFT tuner, and what a stream does with it: begin a region, fold it in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from graftwork import UserError
from graftwork.compat.peft_methods import register
from graftwork.compat.peft_tuner import LayerTuner
from peft import PeftConfig
from torch import nn

from graftwork_parsp.config import ParspConfig
from graftwork_parsp.layer import ColumnDelta, RowDelta
from graftwork_parsp.neurons import Mlp, base_of, find_mlps, short_names
from graftwork_parsp.nullspace import Basis


class ParspModel(LayerTuner):
    """The tuner behind ``peft_type: PARSP``."""

    prefix = "parsp_"
    tuner_layer_cls = RowDelta
    layer_cls = RowDelta

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def make_layer(self, target: nn.Module, name: str, config: ParspConfig, key: str) -> RowDelta:
        kind = ColumnDelta if _ends_with(key, config.column_modules or []) else RowDelta
        return kind(target, name, config, key)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Every adapter writes its own sizes into its config.
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        config.sizes = dict(config.sizes)
        if config.target_modules is None:
            set_targets(config, find_mlps(model, config.neurons))
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Ours are made in fp32 and stay so.
        return


register(name="PARSP", config_cls=ParspConfig, model_cls=ParspModel, prefix=ParspModel.prefix)


def set_targets(config: ParspConfig, mlps: list[Mlp]) -> None:
    """Name the projections of ``mlps`` in ``config``."""
    columns = short_names(mlps, "out") if config.down == "columns" else []
    config.target_modules = {*short_names(mlps, "ins"), *columns}
    config.column_modules = columns or None


def layers_of(model: nn.Module, adapter: str | None = None) -> dict[str, RowDelta]:
    """Return the adapted layers of ``model`` (those with ``adapter``, where named) by their names in the base model."""
    return {
        key: module
        for key, module in base_of(model).named_modules()
        if isinstance(module, RowDelta) and (adapter is None or adapter in module.configs)
    }


def active_adapter(model: nn.Module) -> str:
    """Return the name of the active PaRSP adapter of ``model``.

    Raises:
        UserError: there is none.
    """
    for layer in layers_of(model).values():
        for name in layer.active_adapters:
            if name in layer.configs:
                return name
    raise UserError("the model has no active PaRSP adapter")


def begin_region(
    model: nn.Module,
    cores: Mapping[str, torch.Tensor],
    bases: Mapping[str, Basis] | None = None,
    *,
    column_bases: Mapping[str, Basis] | None = None,
    seed: int = 0,
    adapter: str | None = None,
) -> None:
    """Start a task: neurons ``cores`` of each MLP (by its name) train, outside of ``bases``.

    ``column_bases`` (core x k) are for the output projections where those are adapted. ``seed`` draws the factors A
    of form "lora". Theta is new, so make the optimizer afterwards.
    """
    name = adapter or active_adapter(model)
    layers = layers_of(model, name)
    generator = torch.Generator().manual_seed(seed)
    for mlp in find_mlps(model, next(iter(layers.values())).configs[name].neurons):
        for key in (*mlp.ins, mlp.out):
            if key in layers:
                columns = isinstance(layers[key], ColumnDelta)
                known = (column_bases if columns else bases) or {}
                layers[key].begin(name, cores[mlp.name], known.get(mlp.name), generator)


def fold(model: nn.Module, adapter: str | None = None) -> None:
    """End a task: add Theta P to D in fp32 and empty the region; the model computes the same as before."""
    name = adapter or active_adapter(model)
    for layer in layers_of(model, name).values():
        layer.fold(name)


@torch.no_grad()
def kept_share(model: nn.Module, adapter: str | None = None) -> float:
    """Return |Theta P| / |Theta| over all layers; where nothing was learned: 0 if no direction was free, else 1."""
    name = adapter or active_adapter(model)
    whole = kept = 0.0
    free = False
    for layer in layers_of(model, name).values():
        whole += layer.theta(name).square().sum().item()
        kept += layer.projected(name).square().sum().item()
        free = free or not layer.parsp_complement[name] or layer.parsp_basis[name].numel() > 0
    return (kept / whole) ** 0.5 if whole else float(free)


def _ends_with(key: str, endings: list[str]) -> bool:
    return any(key == ending or key.endswith("." + ending) for ending in endings)
