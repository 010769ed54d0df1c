"""An edit set: low-rank changes of a model's weights that can be kept in a file, applied, composed and taken back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from graftwork.edit.sites import oriented, tensor_digest
from graftwork.errors import UserError
from graftwork.files import write_bytes_atomic
from graftwork.transform.beside import FOLDER, beside_files, metadata_of, read_beside

FORMAT = "graftwork-edits/1"
HEADER = "edits"
LABEL = "edits"
"""Where a transform stores its edits, beside the model."""
LEFT, RIGHT = "R", "Z"


@dataclass(frozen=True)
class Change:
    """``dW = left right^T`` of one module: left h x n, right d x n, float32; W is outputs x inputs."""

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of_dense(cls, delta: torch.Tensor) -> Change:
        """Return a dense change (h x d) in factors: an identity on its smaller side, so that nothing is lost."""
        h, d = delta.shape
        delta = delta.float()
        if h <= d:
            return cls(torch.eye(h), delta.T.contiguous())
        return cls(delta, torch.eye(d))

    def dense(self) -> torch.Tensor:
        """Return dW, h x d in float64."""
        return self.left.double() @ self.right.double().T

    def columns(self, start: int, stop: int) -> Change:
        """Return the change that these columns make."""
        return Change(self.left[:, start:stop], self.right[:, start:stop])


@dataclass(frozen=True)
class Part:
    """What one call of an editor has made, inside a set.

    Attributes:
        name: to take it out again with.
        method: the editor.
        requests: what was edited.
        options: of the editor.
        columns: by module, from which column of its change to which.
        base, after: by module, the digests of W before and after, as the editor saw it; see
            :func:`graftwork.edit.sites.tensor_digest`.
        report: what the editor has to say: scores, gains, sizes.
    """

    name: str
    method: str
    requests: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    columns: Mapping[str, tuple[int, int]]
    base: Mapping[str, str]
    after: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EditSet:
    """Changes by the names of modules, and the parts they are made of, in the order in which they were made."""

    changes: Mapping[str, Change]
    parts: Sequence[Part]

    @property
    def requests(self) -> list[Mapping[str, Any]]:
        return [one for part in self.parts for one in part.requests]

    @property
    def report(self) -> Mapping[str, Any]:
        """The report of the last part; empty where there is none."""
        return self.parts[-1].report if self.parts else {}

    # ------------------------------------------------------------ files

    def save(self, path: Path) -> Path:
        """Write the set to ``path``, one safetensors file that is whole or absent.

        Raises:
            UserError: the place cannot be written.
        """
        write_bytes_atomic(path, self.to_bytes())
        return path

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return ``<module>.R`` (h x n) and ``<module>.Z`` (d x n) of every module, float32."""
        found: dict[str, torch.Tensor] = {}
        for name, change in self.changes.items():
            found[f"{name}.{LEFT}"] = change.left.detach().float().cpu().contiguous()
            found[f"{name}.{RIGHT}"] = change.right.detach().float().cpu().contiguous()
        return found

    def metadata(self) -> dict[str, str]:
        """Return what the file's header says: the format and the parts, in one entry.

        Entries of a header come in any order; with one of them the same set makes the same bytes.
        """
        parts = [dataclasses.asdict(part) for part in self.parts]
        return {HEADER: json.dumps({"format": FORMAT, "parts": parts}, ensure_ascii=False)}

    def to_bytes(self) -> bytes:
        return save(self.tensors(), self.metadata())

    @classmethod
    def load(cls, path: Path) -> EditSet:
        """Read a set from a file, or from what a transform has stored beside a model (a run's folder, or the label's).

        Raises:
            UserError: it is missing, damaged, or no edit set.
        """
        if path.is_dir():
            return cls._beside(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as reader:
                return cls.of_tensors(
                    {key: reader.get_tensor(key) for key in reader.keys()},  # noqa: SIM118
                    reader.metadata() or {},
                    f"'{path}'",
                )
        except FileNotFoundError:
            raise UserError(f"edit set '{path}' does not exist") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"edit set '{path}' cannot be read: {error}") from None

    @classmethod
    def _beside(cls, folder: Path) -> EditSet:
        inner = folder / FOLDER / LABEL
        folder = inner if inner.is_dir() else folder
        files = beside_files(folder)
        return cls.of_tensors(read_beside(folder), metadata_of(next(iter(files))), f"'{folder}'")

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], where: str
    ) -> EditSet:
        """Return the set that :meth:`tensors` and :meth:`metadata` describe. Raises UserError where they do not."""
        try:
            about = json.loads(metadata[HEADER])
            if about["format"] != FORMAT:
                raise ValueError
            parts = []
            for fields in about["parts"]:
                columns = {name: (int(a), int(b)) for name, (a, b) in fields.pop("columns").items()}
                parts.append(Part(columns=columns, **fields))
            names = sorted(key.removesuffix(f".{LEFT}") for key in tensors if key.endswith(f".{LEFT}"))
            changes = {n: Change(tensors[f"{n}.{LEFT}"], tensors[f"{n}.{RIGHT}"]) for n in names}
            for part in parts:
                for name, (start, stop) in part.columns.items():
                    if not 0 <= start <= stop <= changes[name].left.shape[1]:
                        raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where} is no edit set: it needs {FORMAT} in its header, and factors") from None
        return cls(changes, parts)

    # ------------------------------------------------------------ sets of sets

    def __add__(self, other: EditSet) -> EditSet:
        """Return both together: the changes add up.

        Raises:
            UserError: they were made for different models, or have a part of one name.
        """
        twice = {part.name for part in self.parts} & {part.name for part in other.parts}
        if twice:
            raise UserError(f"both edit sets have a part '{min(twice)}'; rename one")
        for part in other.parts:
            for name, digest in part.base.items():
                seen = [{one.base[name], one.after.get(name)} for one in self.parts if name in one.base]
                if seen and not any(digest in known for known in seen):
                    raise UserError(
                        f"the edit sets do not fit together: '{part.name}' was made for another weight "
                        f"'{name}' than '{self.parts[-1].name}' was made for, or has made"
                    )
        changes = dict(self.changes)
        moved: dict[str, int] = {}
        for name, change in other.changes.items():
            mine = changes.get(name)
            if mine is None:
                changes[name] = change
                continue
            moved[name] = mine.left.shape[1]
            changes[name] = Change(
                torch.cat([mine.left, change.left], 1), torch.cat([mine.right, change.right], 1)
            )
        parts = [
            dataclasses.replace(
                part,
                columns={
                    name: (start + moved.get(name, 0), stop + moved.get(name, 0))
                    for name, (start, stop) in part.columns.items()
                },
            )
            for part in other.parts
        ]
        return EditSet(changes, [*self.parts, *parts])

    def without(self, name: str) -> EditSet:
        """Return the set without the part ``name``. Raises UserError where there is none."""
        gone = next((part for part in self.parts if part.name == name), None)
        if gone is None:
            known = ", ".join(part.name for part in self.parts) or "none"
            raise UserError(f"the edit set has no part '{name}'; it has: {known}")
        kept = [part for part in self.parts if part is not gone]
        if not kept:
            return EditSet({}, [])
        changes: dict[str, Change] = {}
        for module, change in self.changes.items():
            cut = gone.columns.get(module)
            if cut is None:
                changes[module] = change
                continue
            keep = [*range(cut[0]), *range(cut[1], change.left.shape[1])]
            if keep:
                changes[module] = Change(change.left[:, keep], change.right[:, keep])
        parts = []
        for part in kept:
            columns = {}
            for module, (start, stop) in part.columns.items():
                cut = gone.columns.get(module)
                shift = cut[1] - cut[0] if cut is not None and cut[1] <= start else 0
                columns[module] = (start - shift, stop - shift)
            parts.append(dataclasses.replace(part, columns=columns))
        return EditSet(changes, parts)

    def renamed(self, name: str) -> EditSet:
        """Return the set with its parts called ``name`` (``name-2``, ... where there are several)."""
        parts = [
            dataclasses.replace(part, name=name if not number else f"{name}-{number + 1}")
            for number, part in enumerate(self.parts)
        ]
        return EditSet(self.changes, parts)

    # ------------------------------------------------------------ use

    def apply(self, model: nn.Module, *, check: bool = True) -> Applied:
        """Change ``model`` in place and return how to take it back; also a context manager.

        Raises:
            UserError: a module that the model lacks, another shape, or, with ``check``, other weights than the edits
                were made for. The model is unchanged then.
        """
        return Applied(model, self, check)


def added(weight: torch.Tensor, change: Change) -> torch.Tensor:
    """Return ``weight`` (h x d) with the change, summed in float64 and rounded once to the weight's dtype.

    Where the change is zero the weight keeps its bits, those of a negative zero, too.
    """
    delta = change.left.to(weight.device).double() @ change.right.to(weight.device).double().T
    return torch.where(delta == 0, weight, (weight.double() + delta).to(weight.dtype))


class Applied:
    """A model with an edit set in its weights.

    Leaving the ``with`` block, or :meth:`undo`, puts the original weights back bit for bit, unless :meth:`commit`
    has made the edits permanent.
    """

    def __init__(self, model: nn.Module, edits: EditSet, check: bool) -> None:
        self.model, self.edits = model, edits
        self._kept: dict[str, torch.Tensor] = {}
        modules = dict(model.named_modules())
        for name, change in edits.changes.items():
            module = modules.get(name)
            if module is None:
                raise UserError(f"the model has no module '{name}' that the edit set changes")
            shape = tuple(oriented(module).shape)
            wanted = (len(change.left), len(change.right))
            if shape != wanted:
                raise UserError(
                    f"'{name}' is {shape[0]} x {shape[1]}, and the edit set was made for {wanted[0]} x {wanted[1]}"
                )
            if check:
                found = tensor_digest(oriented(module))
                first = next(part for part in edits.parts if name in part.base)
                if found != first.base[name]:
                    raise UserError(
                        f"'{name}' holds other weights than the edit set was made for (sha256 {found[:12]}, not "
                        f"{first.base[name][:12]}); apply it to the model it was made from"
                    )
        with torch.no_grad():
            for name, change in edits.changes.items():
                matrix = oriented(modules[name])
                self._kept[name] = matrix.clone()
                matrix.copy_(added(matrix, change))

    def undo(self) -> None:
        """Put the original weights back, bit for bit; a second call, or one after :meth:`commit`, does nothing."""
        modules = dict(self.model.named_modules())
        with torch.no_grad():
            for name, weight in self._kept.items():
                oriented(modules[name]).copy_(weight)
        self._kept = {}

    def commit(self) -> None:
        """Keep the edits: the original weights are forgotten."""
        self._kept = {}

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()
