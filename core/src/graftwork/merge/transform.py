"""A merge as a weight transform: layer by layer, a few rows at a time, in the engine that every transform runs in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from graftwork.errors import UserError, did_you_mean
from graftwork.hookspecs import WeightTransform
from graftwork.merge import masks
from graftwork.merge.masks import Bits
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.threads import one_thread
from graftwork.transform.structure import find_layers

if TYPE_CHECKING:
    from graftwork.merge.experts import Experts
    from graftwork.run import Run
    from graftwork.transform.block import Block
    from graftwork.transform.outer import Outer

Store = Callable[[str, Mapping[str, torch.Tensor], Mapping[str, str]], None]


def merge_transform(
    run: Run, name: str, method: MergeMethod, *, expand: str | None = None
) -> WeightTransform:
    """Return the transform that merges the experts of ``run`` into its model by ``method``.

    Args:
        run: whose ``transform.experts`` are merged.
        name: of the method, for messages.
        method: how.
        expand: write the model that stands for this expert instead of the merged one.
    """
    merging = Merging(name, method, expand)
    options = run.job.transform
    sizes = {
        f"change_{expert}": f"size of what '{expert}' changed, relative to the base's, mean over layers"
        for expert in sorted(options.experts if options is not None else ())
    }
    return WeightTransform(
        name,
        merging.block,
        needs="none",
        stored=True,
        begin=merging.begin,
        figures={**sizes, **method.words()},
        merging=merging,
        about=merging.about,
    )


class Merging:
    """One merge of one run. The experts are opened by the job, before anything is read."""

    def __init__(self, name: str, method: MergeMethod, expand: str | None) -> None:
        self.name, self.method, self.expand = name, method, expand
        self._experts: Experts | None = None

    def open(self, experts: Experts) -> None:
        """Take the experts.

        Raises:
            UserError: the method has no such model as is asked for.
        """
        if self.expand is not None and self.expand not in experts.names:
            raise UserError(
                f"'{self.name}' is to write the model for expert '{self.expand}'"
                f"{did_you_mean(self.expand, experts.names)}, and the experts are {', '.join(experts.names)}"
            )
        if self.expand is None and not self.method.merges:
            raise UserError(
                f"'{self.name}' makes no single model of the experts; say whose is wanted "
                f"(expand: {' or '.join(experts.names)})"
            )
        if self.expand is not None and not self.method.routes:
            raise UserError(f"'{self.name}' makes one model that serves all experts; leave expand out")
        self.method.check(experts)
        self._experts = experts

    @property
    def experts(self) -> Experts:
        assert self._experts is not None, "the job opens the experts before it begins"
        return self._experts

    # ------------------------------------------------------------ as a transform

    def begin(self, outer: Outer) -> None:
        """Look at the experts, let the method learn what is global, merge what stands outside the layers."""
        with one_thread():
            self._begin(outer)

    def block(self, block: Block) -> None:
        """Merge one layer."""
        start = f"{block.name}."
        names = [name for name in self.experts.shapes if name.startswith(start)]
        parameters = {name: block.module.get_parameter(name.removeprefix(start)) for name in names}
        with one_thread():
            block.record("", **self._merge(parameters, block.beside))

    def about(self) -> dict[str, Any]:
        """Return what the manifest says of the stored tensors."""
        experts = self.experts
        digests = experts.digests()
        return {
            "base": {"ref": experts.source.ref, "sha256": experts.base_digest},
            "experts": {
                name: {"ref": ref, "sha256": digests[name]}
                for name, ref in zip(experts.names, experts.refs, strict=True)
            },
            "merged": list(experts.shapes),
            **self.method.manifest(),
        }

    # ------------------------------------------------------------ inside

    def _begin(self, outer: Outer) -> None:
        experts = self.experts
        for note in (*experts.notes, *experts.survey(outer.console)):
            outer.note(note)
        self.method.begin(experts, outer.console)
        layers, _ = find_layers(outer.model)
        names = [name for name in experts.shapes if not name.startswith(f"{layers}.")]
        self._merge({name: outer.model.get_parameter(name) for name in names}, outer.beside)

    def _merge(self, parameters: Mapping[str, torch.nn.Parameter], store: Store) -> dict[str, float]:
        """Merge parameters in place, store what lies beside them, return figures over all of them."""
        experts, index = self.experts, self._index()
        beside: dict[str, dict[str, list[torch.Tensor | Bits]]] = {}
        sums: dict[str, list[tuple[float, float]]] = {}
        moved, size = torch.zeros(len(experts.names), dtype=torch.float64), 0.0
        for name, parameter in parameters.items():
            target = parameter.data.view(experts.shapes[name])
            for rows in experts.tiles(name):
                piece, stored = experts.read(name, rows)
                delta = self.method.merge(piece) if index is None else self.method.expert(piece, index)
                target[rows] = applied(piece, stored, delta, target[rows].cpu()).to(target.device)
                for label, values in self.method.beside(piece).items():
                    beside.setdefault(label, {}).setdefault(name, []).append(values)
                for figure, pair in self.method.figures(piece).items():
                    sums.setdefault(figure, []).append(pair)
                size += square(piece.base)
                moved += torch.tensor([square(one) for one in piece.deltas], dtype=torch.float64)
        for label, values in beside.items():
            tensors, metadata = _joined(values, {n: tuple(p.shape) for n, p in parameters.items()})
            store(label, tensors, {**metadata, "base_sha256": experts.base_digest, "method": self.name})
        ratios = (moved / max(size, 1e-300)).sqrt().tolist()
        changes = {f"change_{name}": ratio for name, ratio in zip(experts.names, ratios, strict=True)}
        pooled = {
            figure: math.fsum(one for one, _ in pairs) / max(1e-300, math.fsum(count for _, count in pairs))
            for figure, pairs in sums.items()
        }
        return {**changes, **pooled}

    def _index(self) -> int | None:
        return None if self.expand is None else self.experts.names.index(self.expand)


def applied(
    piece: Piece, stored: Iterable[torch.Tensor | None], delta: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    """Return base plus delta in the precision of ``base``, which holds the piece's rows as the model stores them.

    Rounded once. Where nothing is added the base's own bytes stay, and where exactly an expert's difference is added
    they are the expert's own: a sum in float32 would miss them where base and expert are of very different size.
    """
    found = (piece.base + delta).to(base.dtype)
    for index, own in enumerate(stored):
        if own is None:
            continue
        same = delta == piece.deltas[index]
        if bool(same.any()):
            found = torch.where(same, own.to(base.dtype), found)
    return torch.where(delta == 0, base, found)


def square(values: torch.Tensor) -> float:
    """Return the sum of squares, summed in float32 by rows and in float64 over them."""
    return float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())


def _joined(
    values: Mapping[str, list[torch.Tensor | Bits]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the rows of every parameter in one tensor, in the parameter's shape where they fill it; and metadata."""
    tensors: dict[str, torch.Tensor] = {}
    columns: dict[str, int] = {}
    for name, parts in values.items():
        packed = [part for part in parts if isinstance(part, Bits)]
        if packed:
            columns[name] = packed[0].columns
        whole = torch.cat([part.words if isinstance(part, Bits) else part for part in parts])
        fills = not packed and whole.numel() == math.prod(shapes[name])
        tensors[name] = whole.view(shapes[name]) if fills else whole
    if columns:
        return tensors, {"format": masks.FORMAT, "columns": json.dumps(columns)}
    return tensors, {"format": "pt"}
