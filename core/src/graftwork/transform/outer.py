"""What stands around the decoder layers: embedding, final norm and head, loaded when they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftwork.console import Console
from graftwork.transform.beside import Stored
from graftwork.transform.source import Source
from graftwork.transform.structure import find_layers, find_norm


class Outer:
    """Embedding, final norm and head with real weights, for a transform's ``begin`` to change in place.

    Attributes:
        embedding, norm, head: the modules.
        model: the whole model, of which only what stands outside the layers has weights.
        config: of the model.
        console: for lines to the user.
    """

    def __init__(self, model: Any, console: Console | None = None) -> None:
        self.model, self.config = model, model.config
        self.console = console or Console(enabled=False)
        self.notes: list[str] = []
        self.stored = Stored()
        self.embedding: Any = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()
        self.norm: nn.Module = model.get_submodule(find_norm(model))

    def note(self, sentence: str) -> None:
        """Tell the user something, in the report."""
        self.notes.append(sentence)

    def beside(
        self, label: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Store tensors beside the model, under ``label``; see :mod:`graftwork.transform.beside`."""
        self.stored.add(label, tensors, metadata)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding's own table."""
        return bool(self.config.get_text_config().tie_word_embeddings)

    def untie(self) -> None:
        """Give the head a table of its own, equal to the embedding's, where they share one."""
        if not self.tied:
            return
        self.head.weight = nn.Parameter(self.embedding.weight.detach().clone(), requires_grad=False)
        set_tied(self.config, False)


def set_tied(config: Any, tied: bool) -> None:
    """Say in the config whether head and embedding share a table."""
    config.get_text_config().tie_word_embeddings = tied
    config.tie_word_embeddings = tied


class OuterWeights:
    """The parameters outside the layers: which there are, and how they get into the skeleton and out again.

    ``before`` are those that the first layer's input is made with, ``after`` those of final norm and head. A head
    that is tied to the embedding is in ``after`` and is never read or stored.
    """

    def __init__(self, model: Any, source: Source, device: torch.device) -> None:
        self.model, self.source, self.device = model, source, device
        layers, _ = find_layers(model)
        norm, head = find_norm(model), model.get_output_embeddings()
        late = [name for name, module in model.named_modules() if module is head or name == norm]
        names = [name for name, _ in model.named_parameters() if not name.startswith(f"{layers}.")]
        self.after = [name for name in names if any(name.startswith(f"{one}.") for one in late)]
        self.before = [name for name in names if name not in self.after]
        self._table = self._name_of(model.get_input_embeddings())
        self._head = self._name_of(head)
        self._layers = layers

    def load(self, names: list[str], stored: Mapping[str, torch.Tensor] | None = None) -> None:
        """Give parameters their values, from the source or from what was ``stored``."""
        from accelerate.utils import set_module_tensor_to_device

        wanted = self._own(names)
        values = self.source.tensors(wanted) if stored is None else stored
        for name in wanted:
            set_module_tensor_to_device(self.model, name, self.device, value=values[name])
        for name, buffer in list(self.model.named_buffers()):
            if not name.startswith(f"{self._layers}.") and buffer.device != self.device:
                set_module_tensor_to_device(self.model, name, self.device)
        if self._head in names and self._head not in wanted:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight
        for name in names:
            self.model.get_submodule(name.rpartition(".")[0]).requires_grad_(False)

    def tensors(self, names: list[str], changed: bool) -> dict[str, torch.Tensor]:
        """Return what is to be stored of ``names``: as they are in the source, or as they were changed."""
        wanted = self._own(names)
        if not changed:
            return self.source.tensors(wanted)
        return {name: self.model.get_parameter(name).detach().to("cpu") for name in wanted}

    def for_logits(self) -> list[str]:
        """Return what is needed to make logits of hidden states; the table of embeddings only where it is the head."""
        early = self.before if self._tied() else [name for name in self.before if name != self._table]
        return [*early, *self.after]

    def drop(self) -> None:
        """Put all on the meta device again."""
        for name in (*self.before, *self.after):
            owner, _, last = name.rpartition(".")
            module = self.model.get_submodule(owner)
            empty = torch.empty_like(getattr(module, last), device="meta")
            setattr(module, last, nn.Parameter(empty, requires_grad=False))

    def _own(self, names: list[str]) -> list[str]:
        return [name for name in names if not (self._tied() and name == self._head)]

    def _tied(self) -> bool:
        return bool(self.model.config.get_text_config().tie_word_embeddings)

    def _name_of(self, wanted: nn.Module) -> str:
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is wanted)
