"""Predictions of a model's earlier layers through its own final norm and head, by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from graftwork import UserError
from graftwork.generate.passes import inner_model
from graftwork.generate.patches import touching_layers
from graftwork.models import is_encoder_decoder

Replace = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")


class EarlyLogits:
    """Find the layers, the final norm and the head of a decoder-only model.

    Raises:
        UserError: it is an encoder-decoder, or these cannot be told.
    """

    def __init__(self, model: Any) -> None:
        self.model = inner_model(model)
        kind = self.model.config.model_type
        if is_encoder_decoder(self.model.config):
            raise UserError(f"earlier layers can be contrasted in decoder-only models; {kind} has an encoder")
        decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
        self.depth = int(self.model.config.get_text_config().num_hidden_layers)
        stacks = [
            child
            for child in decoder.children()
            if isinstance(child, torch.nn.ModuleList) and len(child) == self.depth
        ]
        norms = [child for name, child in decoder.named_children() if name in _NORMS]
        if len(stacks) != 1 or len(norms) != 1 or self.head is None:
            raise UserError(f"the layers, the final norm and the head of a {kind} model cannot be told")
        self.layers, self.norm = stacks[0], norms[0]

    @property
    def tied(self) -> bool:
        """Return whether the head is the embedding matrix."""
        return self.head.weight is self.model.get_input_embeddings().weight

    @contextlib.contextmanager
    def replacing(self, wanted: Sequence[int], replace: Replace, owner: str = "dola") -> Iterator[None]:
        """Let every forward pass inside return ``replace(logits, early logits)`` as its logits.

        ``replace`` gets float32 N x V and C x N x V and returns N x V, N being the batch's positions for which
        the model computes logits and C the layers in ``wanted`` (0: embeddings, k: after k layers).

        Raises:
            UserError: the model's logits are not its head's (they are scaled or capped after it); another
                method changes a layer that is read here, in a way that composes with nothing.
        """
        states: dict[int, torch.Tensor] = {}
        checked = False

        def keep(number: int) -> Callable[..., None]:
            def hook(module: Any, arguments: Any, output: Any) -> None:
                states[number] = output[0] if isinstance(output, tuple) else output

            return hook

        def begin(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            states[0] = arguments[0] if arguments else named["hidden_states"]

        def end(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> Any:
            nonlocal checked
            logits = output.logits
            at = named.get("logits_to_keep", 0)
            at = (
                slice(-at, None) if isinstance(at, int) and at else slice(None) if isinstance(at, int) else at
            )
            if not checked:
                self._check(states[self.depth][:, at], logits)
                checked = True
            last = logits.flatten(0, 1).float()
            early = torch.stack([self._logits(states[k][:, at]).flatten(0, 1).float() for k in wanted])
            states.clear()
            output.logits = replace(last, early).view(logits.shape)
            return output

        numbers = sorted({*wanted, self.depth} - {0})
        with contextlib.ExitStack() as stack:
            read = [number - 1 for number in numbers]
            stack.enter_context(touching_layers(self.model, owner, "reads", read, composes=True))
            handles = [self.layers[k - 1].register_forward_hook(keep(k)) for k in numbers]
            if 0 in wanted:
                handles.append(self.layers[0].register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(self.model.register_forward_hook(end, with_kwargs=True))
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(hidden))

    def _check(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        ours = self._logits(hidden)
        if not torch.allclose(ours.float(), logits.float(), rtol=1e-2, atol=1e-2):
            raise UserError(
                f"a {self.model.config.model_type} model changes its logits after the head, so those of earlier "
                f"layers are not comparable"
            )
