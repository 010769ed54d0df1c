"""Passes through a model that read, corrupt and restore: what causal tracing is made of.

B: rows (draws of noise), T: tokens, h: hidden size. All rows of a pass are one text, so nothing is padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graftwork.edit.sites import Site
from graftwork.transform.structure import find_layers, first_tensor, leave

from graftwork_dem.lines import Line

Change = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def on_outputs(changes: Mapping[Site, Change]) -> Iterator[None]:
    """Give the output of every site (B x T x h) to its function, which returns what takes its place."""
    handles = [
        site.module.register_forward_hook(lambda _m, _x, output, change=change: change(output))
        for site, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def embeddings(model: Any, line: Line) -> torch.Tensor:
    """Return the embeddings of the line's tokens, 1 x T x h."""
    return model.get_input_embeddings()(line.ids[None].to(model.device)).detach()


def noise_scale(model: Any) -> float:
    """Return the standard deviation of the entries of the embedding table."""
    return float(model.get_input_embeddings().weight.detach().float().std())


def corrupted(model: Any, line: Line, *, std: float, draws: int, generator: torch.Generator) -> torch.Tensor:
    """Return the line's embeddings ``draws`` times with Gaussian noise on the event's tokens, draws x T x h."""
    clean = embeddings(model, line)
    noise = std * torch.randn(draws, len(line.event), clean.shape[-1], generator=generator)
    dirty = clean.repeat(draws, 1, 1)
    dirty[:, line.event] += noise.to(clean)
    return dirty


def target_log_prob(logits: torch.Tensor, line: Line) -> torch.Tensor:
    """Return J, the mean log-probability of the target's tokens, for every row (B).

    ``logits`` (B x n x V) are those at ``line.predicts``; summed up in float32 at least.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = torch.log_softmax(logits.to(dtype), -1)
    targets = line.targets.to(logits.device)
    return scores.gather(-1, targets.expand(len(scores), -1)[..., None]).squeeze(-1).mean(-1)


@dataclass(frozen=True)
class Record:
    """A pass as it was.

    Attributes:
        outputs: of every site, B x T x h.
        inputs: of every layer, B x T x h, and after them what the last one gave.
        calls: of every layer, what it was called with beside the hidden states.
        j: B; see :func:`target_log_prob`.
    """

    outputs: Mapping[Site, torch.Tensor]
    inputs: Sequence[torch.Tensor]
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    j: torch.Tensor


def record(model: Any, line: Line, hidden: torch.Tensor, sites: Sequence[Site]) -> Record:
    """Run the model on embeddings (B x T x h) and keep what its sites and layers saw.

    Gradients are tracked where they are switched on.
    """
    outputs: dict[Site, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def entered(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        inputs.append(hidden)
        calls.append((args[1:], kwargs))

    def keep(site: Site) -> Change:
        def kept(output: torch.Tensor) -> torch.Tensor:
            outputs[site] = output
            return output

        return kept

    _, layers = find_layers(model)
    last: list[torch.Tensor] = []
    handles = [layer.register_forward_pre_hook(entered, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda _m, _x, output: last.append(first_tensor(output))))
    try:
        with on_outputs({site: keep(site) for site in sites}):
            logits = model(inputs_embeds=hidden, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    predicts = line.predicts.to(logits.device)
    return Record(outputs, [*inputs, last[0]], calls, target_log_prob(logits[:, predicts], line))


def rerun(model: Any, line: Line, of: Record, start: int, changes: Mapping[Site, Change]) -> torch.Tensor:
    """Run a recorded pass again from layer ``start`` on with ``changes``, and return J (B).

    Earlier layers have no site in ``changes``: what they gave is known. Only positions that predict the target go
    through final norm and head.
    """
    _, layers = find_layers(model)
    hidden = of.inputs[start]
    with on_outputs(changes):
        for layer, (args, kwargs) in zip(layers[start:], of.calls[start:], strict=True):
            hidden = first_tensor(layer(hidden, *args, **kwargs))
    # ``leave`` puts stand-ins where the layers were and runs the rest of the model as it is.
    return target_log_prob(leave(model, hidden[:, line.predicts.to(hidden.device)]), line)


def restore(clean: torch.Tensor, positions: torch.Tensor) -> Change:
    """Return a change that sets a site's output (B x T x h) at ``positions`` to its clean value (1 x T x h)."""

    def change(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, positions] = clean[:, positions].to(output)
        return output

    return change
