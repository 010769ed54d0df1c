"""SpaRTA as a PEFT tuner: where layers and routers go, and how they grow with the tasks."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from graftwork import UserError
from graftwork.compat.peft_methods import register
from graftwork.compat.peft_tuner import LayerTuner
from peft import PeftConfig
from torch import nn

from graftwork_sparta.config import SpartaConfig
from graftwork_sparta.layer import SpartaLinear
from graftwork_sparta.prompt import PromptContext
from graftwork_sparta.router import SpartaPart, SpartaRouter

# Not "sparta_...": transformers would take the module for a parameter of the method when it loads.
ROUTER = "branch_router"
_INDEXED = re.compile(r"^(.*?)\.(\d+)\.")


class SpartaModel(LayerTuner):
    """The tuner behind ``peft_type: SPARTA``."""

    prefix = "sparta_"
    tuner_layer_cls = SpartaPart
    layer_cls = SpartaLinear

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT's own hook after an injection runs for the first adapter of a model only.
        config = self.peft_config[adapter_name]
        if any(config is other for name, other in self.peft_config.items() if name != adapter_name):
            # Every adapter counts its own tasks.
            config = self.peft_config[adapter_name] = copy.copy(config)
        with_router = config.router != "off"
        if with_router:
            check_blocks(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if with_router:
            place_routers(model, config, adapter_name, active=self.active_adapters)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT 0.21 makes new parameters of those in a ParameterDict, and new ones always train.
        trains = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains[name])

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in list(model.modules()):
            if hasattr(module, ROUTER):
                router = getattr(module, ROUTER)
                router.handle.remove()
                router.context.handle.remove()
                delattr(module, ROUTER)
        return model


register(name="SPARTA", config_cls=SpartaConfig, model_cls=SpartaModel, prefix=SpartaModel.prefix)


def layers_of(model: nn.Module, adapter: str | None = None) -> list[SpartaLinear]:
    """Return the adapted layers of ``model`` (those with ``adapter``, where named)."""
    found = [module for module in model.modules() if isinstance(module, SpartaLinear)]
    return [layer for layer in found if adapter is None or adapter in layer.configs]


def routers_of(model: nn.Module, adapter: str | None = None) -> list[SpartaRouter]:
    """Return the routers of ``model`` by block (those with ``adapter``, where named)."""
    found = [module for module in model.modules() if isinstance(module, SpartaRouter)]
    chosen = [router for router in found if adapter is None or adapter in router.configs]
    return sorted(chosen, key=lambda router: router.block)


def active_adapter(model: nn.Module) -> str:
    """Return the name of the active SpaRTA adapter of ``model``.

    Raises:
        UserError: there is none.
    """
    for layer in layers_of(model):
        for name in layer.active_adapters:
            if name in layer.configs:
                return name
    raise UserError("the model has no active SpaRTA adapter")


def check_blocks(model: nn.Module, config: SpartaConfig) -> None:
    """Refuse an adapter whose blocks differ from those of the adapters that are there.

    Raises:
        UserError: they do.
    """
    for router in routers_of(model):
        for other in router.configs.values():
            if other.block_layers != config.block_layers:
                raise UserError("SpaRTA: all adapters of one model need the same block_layers")


def place_routers(model: nn.Module, config: SpartaConfig, name: str, active: list[str]) -> None:
    """Put a router in front of every block of ``config.block_layers`` decoder layers.

    The router is a child of the block's first layer, so PEFT saves and loads it with the adapter. ``active``
    are the active adapters of the model; ``name`` trains if it is one of them.

    Raises:
        UserError: the adapted layers are not inside a numbered list of decoder layers, or a block would be
            longer than that list.
    """
    path, count = _decoder_list(model, name)
    if config.block_layers > count:
        raise UserError(
            f"SpaRTA: block_layers = {config.block_layers}, but the model has {count} decoder layers"
        )
    existing = routers_of(model)
    context = existing[0].context if existing else PromptContext()
    if not existing:
        context.handle = model.register_forward_pre_hook(context.begin, with_kwargs=True)
    decoder = model.get_submodule(path)
    by_layer: dict[int, SpartaRouter] = {}
    for first in range(0, count, config.block_layers):
        block = decoder[first]
        router = getattr(block, ROUTER, None)
        if router is None:
            router = SpartaRouter(first // config.block_layers, _width(model), context)
            router.handle = block.register_forward_pre_hook(router.observe, with_kwargs=True)
            router._active_adapter = list(active)
            setattr(block, ROUTER, router)
        router.add(name, config, next(block.parameters()).device)
        router.set_requires_grad(name, name in active and not config.inference_mode)
        for index in range(first, min(first + config.block_layers, count)):
            by_layer[index] = router
    for key, module in model.named_modules():
        if isinstance(module, SpartaLinear) and not module.router:
            module.router.append(by_layer[int(_INDEXED.match(key)[2])])


def grow(model: nn.Module, generator: torch.Generator, adapter: str | None = None) -> None:
    """Prepare the active adapter for one more task: new router components, older ones frozen.

    Raises:
        UserError: no more orthogonal rows fit into the hidden size.
    """
    name = adapter or active_adapter(model)
    config = layers_of(model, name)[0].configs[name]
    routers = routers_of(model, name)
    for router in routers:
        if config.components * (config.tasks + 1) > router.width:
            raise UserError(
                f"SpaRTA: task {config.tasks + 1} with {config.components} components does not fit the hidden size "
                f"{router.width}; lower 'components'"
            )
    for part in [*layers_of(model, name), *routers]:
        part.grow(name, generator)
    # One config object serves all parts, so a saved adapter remembers how often it grew.
    config.tasks += 1


def freeze_new(model: nn.Module, adapter: str | None = None) -> None:
    """Freeze the router components of the task that just ended; the branches stay trainable."""
    name = adapter or active_adapter(model)
    for router in routers_of(model, name):
        router.set_requires_grad(name, False)


def gate_values(model: nn.Module, adapter: str | None = None) -> torch.Tensor:
    """Return the gates of the last forward pass: (sequences x blocks x 2), shared then specific."""
    name = adapter or active_adapter(model)
    return torch.stack([router.gates[name].detach() for router in routers_of(model, name)], 1)


def prompt_context(model: nn.Module) -> PromptContext | None:
    """Return the object that decides what the prompt is, or None where no router is on."""
    routers = routers_of(model)
    return routers[0].context if routers else None


def _decoder_list(model: nn.Module, name: str) -> tuple[str, int]:
    keys = [
        key
        for key, module in model.named_modules()
        if isinstance(module, SpartaLinear) and name in module.configs
    ]
    matches = [_INDEXED.match(key) for key in keys]
    paths = {match[1] for match in matches if match}
    if len(paths) != 1 or not all(matches):
        outside = next((key for key, match in zip(keys, matches, strict=True) if not match), None)
        what = (
            f"'{outside}' is outside"
            if outside
            else f"they are in {len(paths)} lists: {', '.join(sorted(paths))}"
        )
        raise UserError(
            f"SpaRTA's router needs all adapted layers inside one list of decoder layers, but {what}; "
            f"narrow target_modules or set router: off"
        )
    path = paths.pop()
    return path, len(model.get_submodule(path))


def _width(model: nn.Module) -> int:
    return int(model.config.get_text_config().hidden_size)
