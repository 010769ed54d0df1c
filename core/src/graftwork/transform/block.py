"""One decoder layer with its real weights, as a weight transform sees and changes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.transform.activations import Stream
from graftwork.transform.beside import Stored
from graftwork.transform.kv import check_kv, kv_attention
from graftwork.transform.modules import CompressedLinear
from graftwork.transform.quantizer import Quantized
from graftwork.transform.scheme import ActivationScheme, KVScheme
from graftwork.transform.structure import Place, first_tensor, places

Names = str | Sequence[str]


class _Enough(Exception):
    """Ends a forward pass when all that was wanted has been seen."""


class Block:
    """A decoder layer that is being transformed.

    Attributes:
        index, count: which of how many layers, from 0.
        name: of the layer in the model, such as ``model.layers.3``.
        module: the layer, with real weights on its device; transforms change it in place.
        model: the whole model, of which only this layer has weights.
        config: of the model.
        seed: of this layer and transform.
        prepared: what the transform's ``prepare`` returned.
        console: for lines to the user.
    """

    def __init__(
        self,
        index: int,
        count: int,
        name: str,
        module: nn.Module,
        model: Any,
        *,
        inputs: Stream | None,
        dense: Stream | None = None,
        console: Console | None = None,
    ) -> None:
        self.index, self.count, self.name = index, count, name
        self.module, self.model, self.config = module, model, model.config
        self.console = console or Console(enabled=False)
        self.seed = 0
        self.prepared: Mapping[str, torch.Tensor] = {}
        self.records: dict[str, dict[str, float | str]] = {}
        self.notes: list[str] = []
        self.stored = Stored()
        self.kv: KVScheme | None = None
        self._inputs, self._dense = inputs, dense

    # ------------------------------------------------------------ the layer's parts

    def linears(self) -> dict[str, Any]:
        """Return the linears whose weights are not rounded yet, by their names within the layer.

        They are ``nn.Linear`` or :class:`~graftwork.transform.modules.CompressedLinear`.

        Raises:
            UserError: there are none: an earlier transform has rounded them all.
        """
        found = {
            name: module
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear | CompressedLinear) and not getattr(module, "is_quantized", False)
        }
        if not found:
            raise UserError(
                f"'{self.name}' has no linear left to change: an earlier plugin has rounded them; what scales, "
                f"rotates or factorises comes before what rounds, and one plugin rounds"
            )
        return found

    def places(self) -> list[Place]:
        """Return the places of the layer; see :func:`graftwork.transform.structure.places`."""
        return places(self.module, self.config)

    def get(self, name: str) -> Any:
        """Return the module ``name`` of the layer."""
        return self.module.get_submodule(name)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put ``module`` where ``name`` is."""
        parent, _, last = name.rpartition(".")
        setattr(self.module.get_submodule(parent), last, module)

    def compressed(self, name: str) -> CompressedLinear:
        """Return the linear ``name`` as one that can be rotated, corrected and rounded."""
        module = self.get(name)
        if not isinstance(module, CompressedLinear):
            module = CompressedLinear.from_linear(module)
            self.replace(name, module)
        return module

    def round(
        self, name: str, weight: Quantized | None, activations: ActivationScheme | None = None
    ) -> CompressedLinear:
        """Give the linear ``name`` a rounded weight (None leaves it) and rounding of its inputs."""
        module = self.compressed(name)
        if weight is not None:
            module.quantized(weight)
        if activations is not None and activations.rounds:
            module.activations = activations
        return module

    def set_kv(self, scheme: KVScheme) -> None:
        """Round keys and values of this layer; all layers must ask for the same.

        Raises:
            UserError: see :func:`graftwork.transform.kv.check_kv`.
        """
        if not scheme.rounds:
            return
        check_kv(self.model, scheme)
        for module in self.module.modules():
            # The layer's own copy of the config, which only its attention reads.
            if hasattr(module, "config"):
                config: Any = module.config
                config._attn_implementation = kv_attention(scheme, config._attn_implementation)
        self.kv = scheme

    def record(self, linear: str, **figures: float | str) -> None:
        """Keep figures about ``linear`` (a name within the layer, or ``""`` for the whole) for the report."""
        self.records.setdefault(linear, {}).update(figures)

    def note(self, sentence: str) -> None:
        """Tell the user something about this layer, in the report."""
        self.notes.append(f"{self.name}: {sentence}")

    def beside(
        self, label: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Store tensors of this layer beside the model, under ``label``; see :mod:`graftwork.transform.beside`."""
        self.stored.add(label, tensors, metadata)

    # ------------------------------------------------------------ activations

    @property
    def tokens(self) -> int:
        """How many calibration tokens there are."""
        return self._stream.tokens

    def batches(self, *, share: bool = False) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Yield the layer's inputs, hidden states (B x L x d) and the other arguments of its forward.

        Every process of the run gets all of them, so that all learn the same; those that iterate do so in step. With
        ``share`` each gets a share, for statistics that :meth:`reduced` joins.
        """
        return self._stream.share() if share else self._stream.every()

    def dense_batches(self) -> Iterator[tuple[torch.Tensor, dict[str, Any], torch.Tensor]]:
        """Yield inputs, arguments and outputs of the layer in the unchanged model, all of them in every process.

        Raises:
            UserError: the transform did not ask for them (``dense``).
        """
        stream = self._dense
        if stream is None or stream.following is None:
            raise UserError(f"'{self.name}': the activations of the unchanged model were not asked for")
        for number in range(len(stream)):
            hidden = stream.anywhere(stream.now, number)
            yield hidden, stream.arguments(number), stream.anywhere(stream.following, number)

    def run(self, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the layer's output (B x L x d), with gradient where it is on."""
        return first_tensor(self.module(hidden, **kwargs))

    def inputs(self, names: Names, *, share: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what the linears ``names`` read, batch by batch: name to tokens x inputs, rotated where they rotate.

        ``share`` as in :meth:`batches`.
        """
        wanted = _listed(names)
        for hidden, kwargs in self.batches(share=share):
            yield self._seen(hidden, kwargs, wanted)

    def second_moments(self, names: Names) -> dict[str, torch.Tensor]:
        """Return the sum of ``x x^T`` over all tokens (inputs x inputs, float64) for every linear.

        Linears that read the same tensor share one.

        Raises:
            UserError: an input that is no number, with the layer and the batch.
        """
        return self._summed(names, lambda x: (x.T @ x).double(), torch.add, "second moments")

    def energy(self, names: Names) -> dict[str, torch.Tensor]:
        """Return the sum of ``x_j^2`` over all tokens for every input ``j`` (float64)."""
        return self._summed(names, lambda x: x.double().square().sum(0), torch.add, "energies")

    def mean_abs(self, names: Names) -> dict[str, torch.Tensor]:
        """Return the mean of ``|x_j|`` over all tokens for every input ``j`` (float64)."""
        summed = self._summed(names, lambda x: x.abs().double().sum(0), torch.add, "means")
        return {name: value / self.tokens for name, value in summed.items()}

    def maxima(self, names: Names) -> dict[str, torch.Tensor]:
        """Return the largest value of every input over all tokens."""
        return self._summed(names, lambda x: x.amax(0).double(), torch.maximum, "maxima")

    def minima(self, names: Names) -> dict[str, torch.Tensor]:
        """Return the smallest value of every input over all tokens."""
        return self._summed(names, lambda x: x.amin(0).double(), torch.minimum, "minima")

    def reduced(
        self, value: torch.Tensor, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return a statistic over this process's share of :meth:`batches` or :meth:`inputs` joined with all others'.

        ``join`` is ``torch.add``, ``torch.maximum`` or ``torch.minimum``.
        """
        return self._stream.reduced(value, join)

    # ------------------------------------------------------------ inside

    @property
    def _stream(self) -> Stream:
        if self._inputs is None:
            raise UserError(
                f"'{self.name}': a plugin needs activations, but no calibration text is set; set "
                f"transform.calibration=FILE"
            )
        return self._inputs

    def _seen(
        self, hidden: torch.Tensor, kwargs: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        # With the tensor itself, so that its address is not given to another one meanwhile.
        raw: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def hook(name: str) -> Callable[..., None]:
            def see(module: Any, arguments: tuple[Any, ...]) -> None:
                x = arguments[0]
                rotation = getattr(module, "rotation", None)
                if rotation is not None:
                    found[name] = rotation(x).flatten(0, -2)
                else:
                    # Linears that read the same tensor get the same object.
                    found[name] = raw.setdefault(id(x), (x, x.flatten(0, -2)))[1]
                if len(found) == len(names):
                    raise _Enough

            return see

        with contextlib.ExitStack() as stack:
            for name in names:
                handle = self.get(name).register_forward_pre_hook(hook(name))
                stack.callback(handle.remove)
            with torch.no_grad(), contextlib.suppress(_Enough):
                self.module(hidden, **kwargs)
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"'{self.name}.{missing[0]}' was never called in the layer's forward pass")
        return found

    def _summed(
        self,
        names: Names,
        measure: Callable[[torch.Tensor], torch.Tensor],
        join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        what: str,
    ) -> dict[str, torch.Tensor]:
        wanted = _listed(names)
        total: dict[str, torch.Tensor] = {}
        owner: dict[str, str] = {}
        for number, seen in zip(self._stream.own, self.inputs(wanted, share=True), strict=True):
            if not owner:
                first: dict[int, str] = {}
                owner = {name: first.setdefault(id(x), name) for name, x in seen.items()}
            for name in dict.fromkeys(owner.values()):
                x = seen[name]
                value = measure(x if x.dtype == torch.float64 else x.float())
                if not bool(torch.isfinite(value).all()):
                    raise UserError(
                        f"'{self.name}.{name}': its inputs in calibration batch {number + 1} are no numbers (NaN or "
                        f"infinity), so there are no {what}; look at the weights before it, or use float32"
                    )
                total[name] = join(total[name], value) if name in total else value
        total = {name: self._stream.reduced(value, join) for name, value in total.items()}
        return {name: total[owner[name]] for name in wanted}


def _listed(names: Names | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
