"""What a method of PEFT with layers of its own has to do when an adapter is put on a model.

The methods of ``BaseTuner`` that a tuner must override are private to PEFT.

Tested with peft 0.21.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class LayerTuner(BaseTuner):
    """A tuner that wraps every target module in ``layer_cls``, which may hold several adapters.

    ``layer_cls(target, name, config)`` is a layer around ``target`` with its first adapter, and its
    ``add(name, config)`` makes another one; both refuse what does not fit with ``ValueError`` or ``TypeError``. A
    subclass names ``prefix``, ``tuner_layer_cls`` and ``layer_cls``.
    """

    layer_cls: ClassVar[Any]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as in BaseTuner

    def make_layer(self, target: nn.Module, name: str, config: PeftConfig, key: str) -> nn.Module:
        """Return the layer that takes the place of ``target``, which the base model calls ``key``."""
        return self.layer_cls(target, name, config)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Put adapter ``adapter_name`` on ``target``.

        Raises:
            ValueError: it does not fit; begins with the name of the layer.
        """
        try:
            if isinstance(target, self.layer_cls):
                cast(Any, target).add(adapter_name, peft_config)
                return
            layer = self.make_layer(target, adapter_name, peft_config, current_key)
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{current_key}': {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
