"""Import this, and ``from_pretrained`` of transformers loads checkpoints in the layout of ours.

Such a folder says ``"model_type": "graftwork-compressed"`` and names its weights' index otherwise than usual. Without
this module transformers knows neither and refuses, which is right: it would leave out rotations and factors and say
nothing. With it, the config that comes back is that of the base model (``base_model_type``), the linears are rebuilt
on the meta device before weights are read, and a rounded KV cache is set up.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftwork.errors import UserError
from graftwork.transform.format import LAYOUT_VERSION, METHOD, MODEL_TYPE, OUR_INDEX, module_names
from graftwork.transform.kv import set_kv
from graftwork.transform.modules import CompressedLinear, Factored
from graftwork.transform.scheme import KVScheme


class CompressedModelConfig(PreTrainedConfig):
    """Stands for a compressed model of any family; read from a folder it is the config of that family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        fields = dict(config_dict)
        base = fields.pop("base_model_type", None)
        if base not in CONFIG_MAPPING:
            raise UserError(
                f"config.json of a compressed model names its base_model_type as '{base}', which transformers does "
                f"not know"
            )
        # The one field by which a config says that its weights have another name.
        fields.update(model_type=base, transformers_weights=OUR_INDEX)
        return CONFIG_MAPPING[base].from_dict(fields, **kwargs)


class CompressedModelQuantization(QuantizationConfigMixin):
    """The ``quantization_config`` of our layout, as :func:`graftwork.transform.format.combine` writes it."""

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = LAYOUT_VERSION,
        groups: list[dict[str, Any]] | None = None,
        kv: dict[str, Any] | None = None,
    ) -> None:
        if version != LAYOUT_VERSION:
            raise UserError(
                f"the model is stored in version {version} of our layout, and this graftwork reads version "
                f"{LAYOUT_VERSION}; install the graftwork that wrote it"
            )
        self.quant_method: Any = quant_method
        self.version = version
        self.groups = groups or []
        self.kv = kv


class CompressedModelQuantizer(HfQuantizer):
    """Puts the modules of :mod:`graftwork.transform.modules` where the config says, before weights are read."""

    # Nothing is rounded on the fly: a model comes to us rounded or not at all.
    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._model: weakref.ref[Any] | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for group in cast(CompressedModelQuantization, self.quantization_config).groups:
            settings = {key: value for key, value in group.items() if key != "modules"}
            for name in module_names(group["modules"]):
                rebuild(model, name, settings)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear):
                _check_loaded(name, module)
        self._model = weakref.ref(model)
        kv = cast(CompressedModelQuantization, self.quantization_config).kv
        if kv is not None:
            set_kv(model, KVScheme.model_validate(kv))
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        model = self._model() if self._model is not None else None
        if getattr(model, "_hf_peft_config_loaded", False):
            # Only the adapter is saved then, and transformers does not ask for more.
            return False
        raise UserError(
            "a compressed model that was loaded is not saved again, because save_pretrained would lose what holds its "
            "rotations and factors; copy its folder instead"
        )

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Gradients reach the inputs of every layer, so adapters beside them train.
        return True


def rebuild(model: nn.Module, name: str, settings: dict[str, Any]) -> None:
    """Put an empty compressed layer with these settings in the place of the linear ``name``, on the meta device.

    Raises:
        UserError: there is no such linear.
    """
    parent, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        old = getattr(owner, last)
    except AttributeError:
        old = owner = None
    if owner is None or not isinstance(old, nn.Linear):
        raise UserError(
            f"the compressed model's config describes a linear '{name}', which the model does not have"
        )
    rows, columns, dtype = old.out_features, old.in_features, old.weight.dtype
    if "factors" in settings:
        rank, (first, second) = settings["rank"], settings["factors"]
        new: nn.Module = Factored(
            CompressedLinear.from_settings(first, rank, columns, dtype),
            CompressedLinear.from_settings(second, rows, rank, dtype),
        )
    else:
        new = CompressedLinear.from_settings(settings, rows, columns, dtype)
    setattr(owner, last, new.train(old.training))


def _check_loaded(name: str, module: CompressedLinear) -> None:
    """Refuse a layer whose tensors were not in the checkpoint: the loader fills what is missing with anything."""
    shape = module.weight_shape
    if shape is None or shape.device.type == "meta":
        return
    if shape.tolist() != [module.out_features, module.in_features]:
        raise UserError(
            f"the compressed model's checkpoint has no usable weight for '{name}': its stored shape is "
            f"{shape.tolist()}, and the model wants {[module.out_features, module.in_features]}"
        )
    signs = module.rotation_signs
    if signs is not None and not bool(torch.all(signs.abs() == 1)):
        raise UserError(f"the compressed model's checkpoint has no usable rotation for '{name}'")


AutoConfig.register(MODEL_TYPE, CompressedModelConfig, exist_ok=True)
register_quantization_config(METHOD)(CompressedModelQuantization)
register_quantizer(METHOD)(CompressedModelQuantizer)
