"""What PaRSP remembers of a stream: moments, relevance, cores, and which base model they belong to.

Only statistics, never items: sums of outer products of hidden states, and relevances of neurons.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from graftwork import UserError
from torch import nn

from graftwork_parsp.moments import Collected
from graftwork_parsp.neurons import Mlp, base_of
from graftwork_parsp.nullspace import Basis, Sketch, top_directions

CALIBRATION = "calibration"
_SAMPLE = 4096


@dataclass
class Past:
    """Statistics of the tasks so far, the calibration text among them as the task :data:`CALIBRATION`.

    ``full`` (d x d), ``sketch`` and ``columns`` are sums over tasks of their means, by MLP. ``shares`` (m, R~),
    ``cores`` and ``taken`` (k, the protected directions afterwards) have one entry per task, by MLP.
    """

    base: torch.Tensor
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    sketch: dict[str, Sketch] = field(default_factory=dict)
    columns: dict[str, Sketch] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    shares: list[dict[str, torch.Tensor]] = field(default_factory=list)
    cores: list[dict[str, torch.Tensor]] = field(default_factory=list)
    taken: list[dict[str, int]] = field(default_factory=list)
    _bases: dict[str, Basis] | None = None
    _short: list[str] = field(default_factory=list)

    def record(
        self,
        name: str,
        shares: Mapping[str, torch.Tensor],
        cores: Mapping[str, torch.Tensor],
        moments: Collected,
    ) -> None:
        """Add a task that has ended."""
        self.names.append(name)
        self.shares.append(dict(shares))
        self.cores.append(dict(cores))
        for key, value in moments.full.items():
            self.full[key] = self.full[key] + value if key in self.full else value
        for mine, theirs in ((self.sketch, moments.sketch), (self.columns, moments.columns)):
            for key, sketch in theirs.items():
                if key in mine:
                    mine[key].merge(sketch)
                else:
                    mine[key] = sketch
        self._bases = None

    def bases(self, eps: float, device: torch.device) -> dict[str, Basis]:
        """Return the protected directions of every layer; nothing where nothing was recorded. Made once per task."""
        if self._bases is None:
            self._bases, self._short = {}, []
            for key, moment in self.full.items():
                basis = top_directions(moment.to(device), eps)
                self._bases[key] = Basis(basis.matrix.cpu(), basis.k, basis.complement)
            for key, sketch in self.sketch.items():
                self._bases[key], kept = sketch.directions(eps)
                if not kept:
                    self._short.append(key)
        return self._bases

    def column_bases(self, eps: float, cores: Mapping[str, torch.Tensor]) -> dict[str, Basis]:
        """Return the protected directions among the activations of each layer's core."""
        found = {}
        for key, sketch in self.columns.items():
            found[key], kept = sketch.directions(eps, cores[key])
            if not kept and key not in self._short:
                self._short.append(key)
        return found

    @property
    def short(self) -> list[str]:
        """Return the layers whose sketch has too few rows for what ``eps`` promises, as of the last bases."""
        return self._short

    def used(self, mlps: Sequence[Mlp]) -> dict[str, torch.Tensor]:
        """Return which neurons (m, booleans) of each layer some core had."""
        result = {mlp.name: torch.zeros(mlp.neurons, dtype=torch.bool) for mlp in mlps}
        for cores in self.cores:
            for key, core in cores.items():
                result[key][core.long()] = True
        return result

    def check_base(self, base: torch.Tensor) -> None:
        """Refuse statistics of another model.

        Raises:
            UserError: ``base`` is not the fingerprint they were made with.
        """
        if not torch.equal(base, self.base):
            raise UserError(
                "PaRSP: this run's statistics belong to another base model than the one that was loaded; resume with "
                "the model it was begun with"
            )

    # ------------------------------------------------------------------ state

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything as tensors, as a checkpoint keeps it."""
        state = {"base": self.base, "names": _as_bytes(self.names)}
        for key, value in self.full.items():
            state[f"moment/{key}"] = value
        for kind, sketches in (("sketch", self.sketch), ("columns", self.columns)):
            for key, sketch in sketches.items():
                state[f"{kind}/{key}/rows"], state[f"{kind}/{key}/energy"] = sketch.rows, sketch.energy
        for number, shares in enumerate(self.shares):
            for key, value in shares.items():
                state[f"relevance/{number}/{key}"] = value
            for key, value in self.cores[number].items():
                state[f"core/{number}/{key}"] = value.to(torch.int32)
        for number, taken in enumerate(self.taken):
            for key, k in taken.items():
                state[f"taken/{number}/{key}"] = torch.tensor(k)
        return state

    @classmethod
    def from_tensors(cls, state: Mapping[str, torch.Tensor]) -> Past:
        """Return what :meth:`tensors` was made of."""
        names = json.loads(bytes(state["names"].tolist()).decode())
        past = cls(state["base"], names=names)
        past.shares = [{} for _ in names]
        past.cores = [{} for _ in names]
        past.taken = [{} for _ in names]
        for path, value in state.items():
            kind, _, key = path.partition("/")
            if kind == "moment":
                past.full[key] = value
            elif kind in ("sketch", "columns") and key.endswith("/rows"):
                key = key.removesuffix("/rows")
                sketch = Sketch(value, state[f"{kind}/{key}/energy"])
                (past.sketch if kind == "sketch" else past.columns)[key] = sketch
            elif kind in ("relevance", "core", "taken"):
                number, _, key = key.partition("/")
                if kind == "taken":
                    past.taken[int(number)][key] = int(value)
                else:
                    (past.shares if kind == "relevance" else past.cores)[int(number)][key] = value
        return past

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.tensors().values())


def estimate_bytes(
    mlps: Sequence[Mlp], tasks: int, *, moments: str | None, columns: bool, size: int, density: float
) -> int:
    """Return how many bytes a :class:`Past` of ``tasks`` tasks takes."""
    total = 0
    for mlp in mlps:
        rows = mlp.inputs if moments == "full" else min(size, mlp.inputs) + 1 if moments == "sketch" else 0
        total += 4 * rows * mlp.inputs
        total += 4 * (min(size, mlp.neurons) + 1) * mlp.neurons if columns else 0
        total += tasks * int(4 * mlp.neurons * (1 + density) + 8)
    return total


def fingerprint(model: nn.Module, mlps: Sequence[Mlp]) -> torch.Tensor:
    """Return a hash (32 bytes) of a sample of every output projection's weight, which no task changes."""
    digest = hashlib.sha256()
    base = base_of(model)
    for mlp in mlps:
        module = base.get_submodule(mlp.out)
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        weight = layer.weight.detach().flatten()
        sample = weight[:: max(len(weight) // _SAMPLE, 1)].cpu().contiguous()
        digest.update(f"{mlp.out} {tuple(layer.weight.shape)} {sample.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _as_bytes(names: Sequence[str]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(list(names)).encode()), dtype=torch.uint8)
