"""The experts of a merge on disk: opened, compared with the base, and read a few rows at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.merge.adapter import Adapter
from graftwork.merge.matching import Base, Match, match
from graftwork.merge.method import Piece
from graftwork.merge.options import MergeOptions
from graftwork.merge.rows import as_matrix, digest, read_rows, stored_tensors
from graftwork.merge.tokens import other_tokens
from graftwork.models import resolve
from graftwork.transform.source import CheckpointSource, checkpoint_files, downloaded
from graftwork.transform.structure import find_layers, find_norm

TILE = 4 * 2**20
"""Bytes that the rows of a tile take in the base and all experts, with what is computed of them: they fit into a
processor's cache, and are little enough for the allocator to use again instead of asking for fresh pages."""
HELD = 64 * 2**20
"""Bytes of one parameter's rows that may be held to be read again."""
FAR = 0.5
"""A task vector of more than so much of the base's size is no fine-tune of it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Experts:
    """Models that were made from one base, as differences to it.

    Attributes:
        names: sorted, so that nothing depends on the order in a config.
        refs: where each came from, in that order.
        shapes: rows and columns of every merged parameter, in the model's order.
        count: merged weights.
        dtype: that the merged model is stored in; ``item``: bytes of one such weight.
        notes: sentences for the user.
    """

    def __init__(
        self,
        refs: Mapping[str, str],
        source: CheckpointSource,
        options: MergeOptions,
    ) -> None:
        """Open and check them; only headers are read.

        Raises:
            UserError: no expert, a name that cannot be a file's, a setting for an expert that is not there, and all
                that is wrong with an expert; see :func:`graftwork.merge.matching.match` and
                :class:`graftwork.merge.adapter.Adapter`.
        """
        if not refs:
            raise UserError("there is no expert to merge; set transform.experts.NAME=MODEL")
        for name in refs:
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"transform.experts: '{name}' is no name of letters, digits, '-', '_' and '.'"
                )
        for name in options.prefix:
            if name not in refs:
                raise UserError(
                    f"transform.merge.prefix names '{name}', which is none of the experts: {', '.join(refs)}"
                )
        self.source, self.options = source, options
        self.names = tuple(sorted(refs))
        self.refs = tuple(refs[name] for name in self.names)
        self.dtype, self.item = source.dtype, source.dtype.itemsize
        self.notes: list[str] = []
        self._base = _base(source, options)
        self._places = stored_tensors(sorted({path for path, _ in source.places.values()}))
        self.shapes = {name: as_matrix(self._base.shapes[name]) for name in self._base.merged}
        self._order = {name: order for order, name in enumerate(self.shapes)}
        self.count = sum(rows * columns for rows, columns in self.shapes.values())
        self._opened = [self._open(name, ref) for name, ref in zip(self.names, self.refs, strict=True)]
        same = [ref for ref in self.refs if self.refs.count(ref) > 1]
        if same:
            self.notes.append(f"'{same[0]}' is named as {self.refs.count(same[0])} experts")

    # ------------------------------------------------------------ what a method reads

    def pieces(self, console: Console | None = None, label: str = "read experts") -> Iterator[Piece]:
        """Yield all merged parameters in their order, a few rows at a time.

        Raises:
            UserError: a value that is no number, with the expert and the tensor.
        """
        console = console or Console(enabled=False)
        with console.bar(self.count, label, "weight") as bar:
            for name in self.shapes:
                for piece in self.pieces_of(name):
                    yield piece
                    bar.update(piece.base.numel())

    def pieces_of(self, name: str) -> Iterator[Piece]:
        """Yield the rows of one parameter, a few at a time."""
        for rows in self.tiles(name):
            yield self.read(name, rows)[0]

    def passes_of(self, name: str) -> Callable[[], Iterable[Piece]]:
        """Return what starts a pass over one parameter's rows; they are read once where they are few."""
        rows, columns = self.shapes[name]
        if rows * columns * 4 * (1 + len(self.names)) > HELD:
            return lambda: self.pieces_of(name)
        held = list(self.pieces_of(name))
        return lambda: held

    def read(self, name: str, rows: slice) -> tuple[Piece, list[torch.Tensor | None]]:
        """Return some rows, and what each expert stores there (None for an adapter, or where it lacks the tensor)."""
        base = read_rows(self._places[self.source.places[name][1]], rows).float()
        self._finite(None, name, base)
        deltas = torch.empty(len(self.names), *base.shape)
        stored: list[torch.Tensor | None] = []
        for index, (expert, opened) in enumerate(zip(self.names, self._opened, strict=True)):
            own = None
            if isinstance(opened, Adapter):
                deltas[index] = opened.delta(name, rows, base.shape[1])
            elif name in opened.tensors:
                own = read_rows(opened.tensors[name], rows)
                torch.sub(own, base, out=deltas[index])
            else:
                deltas[index] = 0
            self._finite(expert, name, deltas[index])
            stored.append(own)
        return Piece(name, self._order[name], rows, self.names, base, deltas), stored

    def tiles(self, name: str) -> Iterator[slice]:
        """Yield the rows of a parameter that are read together."""
        rows, columns = self.shapes[name]
        # Of each entry: base and result, sums in float64, and per expert what is stored and the difference.
        row = columns * (32 + len(self.names) * (4 + self.item))
        step = self.options.rows or max(1, TILE // max(1, row))
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))

    def adapter(self, index: int) -> Adapter | None:
        """Return expert ``index`` if it is an adapter."""
        opened = self._opened[index]
        return opened if isinstance(opened, Adapter) else None

    # ------------------------------------------------------------ are they what they should be

    def survey(self, console: Console) -> list[str]:
        """Read the middle layer and return what is odd about the experts, in sentences.

        An expert as large as half the base was probably not made from it; one that is equal to it brings nothing.
        """
        layers, modules = find_layers(self.source.skeleton())
        middle = f"{layers}.{len(modules) // 2}."
        # Norms are nearly the same in all models, and may be larger than all else.
        matrices = [name for name, (rows, _) in self.shapes.items() if rows > 1 and name.startswith(middle)]
        sizes = self._sizes(matrices)
        found = []
        for index, (name, size) in enumerate(zip(self.names, sizes, strict=True)):
            if size > FAR:
                found.append(
                    f"expert '{name}' differs from the base by {size:.2f} of the base's size (matrices of "
                    f"layer {len(modules) // 2}); a fine-tune differs by a few hundredths: is it made from this base?"
                )
            elif size == 0 and self._same(index):
                found.append(f"expert '{name}' is the base, weight for weight; it brings nothing")
        for note in found:
            console.say(f"warning: {note}")
        return found

    @cached_property
    def base_digest(self) -> str:
        """SHA-256 of the base's files; see :func:`graftwork.merge.rows.digest`."""
        return digest(_weights(self.source.folder))

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every expert's files."""
        return {name: digest(_weights(_folder(ref))) for name, ref in zip(self.names, self.refs, strict=True)}

    def _sizes(self, names: Sequence[str]) -> list[float]:
        """Return the norm of each expert's difference over these parameters, relative to the base's."""
        moved, base = torch.zeros(len(self.names), dtype=torch.float64), 0.0
        for name in names:
            for piece in self.pieces_of(name):
                base += float(piece.base.double().square().sum())
                moved += torch.stack([delta.double().square().sum() for delta in piece.deltas])
        return (moved / max(base, 1e-300)).sqrt().tolist()

    def _same(self, index: int) -> bool:
        return not any(bool(piece.deltas[index].any()) for piece in self.pieces())

    def _finite(self, owner: str | None, name: str, values: torch.Tensor) -> None:
        # The extremes of a tensor with NaN are NaN, and finding them takes no memory.
        if values.numel() and not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
            who = "the base" if owner is None else f"expert '{owner}'"
            raise UserError(
                f"{who}: tensor '{name}' holds values that are no numbers (NaN or infinity); broken weights are not "
                f"merged"
            )

    # ------------------------------------------------------------ opening

    def _open(self, name: str, ref: str) -> Adapter | Match:
        folder = _folder(ref)
        # Of a hub id only the files tell what it is.
        if resolve(ref).adapter or (folder / "adapter_config.json").is_file():
            adapter = Adapter(name, folder, self._base.shapes)
            self._same_base(name, str(adapter.config["base_model_name_or_path"]))
            skipped = [key for key in adapter.changed if key not in self.shapes]
            if skipped:
                self.notes.append(
                    f"expert '{name}' also changes '{skipped[0]}', which is kept as in the base"
                )
            return adapter
        _not_quantized(name, folder)
        found = match(name, folder, stored_tensors(_weights(folder)), self._base, self.options)
        self.notes += [*found.notes, *other_tokens(name, folder, self.source.folder)]
        self.notes += self._kept(name, found)
        return found

    def _kept(self, expert: str, found: Match) -> list[str]:
        """Tell where an expert has embeddings of its own, which are not merged unless asked for."""
        for name in self._base.embeddings:
            if name in self.shapes or name not in found.tensors:
                continue
            rows = self._base.shapes[name][0]
            # A few rows tell: training moves all that it meets.
            for start in range(0, rows, max(1, rows // 16)):
                part = slice(start, start + 1)
                mine = read_rows(found.tensors[name], part).float()
                if not torch.equal(mine, read_rows(self._places[self.source.places[name][1]], part).float()):
                    return [
                        f"expert '{expert}' has changed '{name}', which is kept as in the base; "
                        f"transform.merge.embeddings=merge merges it, too"
                    ]
        return []

    def _same_base(self, expert: str, named: str) -> None:
        """Refuse an adapter that was trained on another base; where its base is not here, say so."""
        mine = self.source.folder.resolve()
        try:
            where = resolve(named)
        except UserError:
            self.notes.append(
                f"expert '{expert}' was trained on '{named}', which is not here to be compared with the base"
            )
            return
        if named == self.source.ref or Path(where.path).resolve() == mine:
            return
        local = resolve(self.source.ref).folder is not None
        if where.folder is None and local:
            self.notes.append(
                f"expert '{expert}' was trained on '{named}'; that the base is a copy of it was not checked"
            )
            return
        if where.folder is None:
            raise UserError(
                f"expert '{expert}' is an adapter of '{named}', and the base is '{self.source.ref}'; merge it with its "
                f"own base"
            )
        if digest(_weights(where.folder)) != digest(_weights(mine)):
            raise UserError(
                f"expert '{expert}' is an adapter of '{named}', whose weights are not those of the base "
                f"'{self.source.ref}'; merge it with its own base"
            )


def _base(source: CheckpointSource, options: MergeOptions) -> Base:
    """Return what experts are compared with, of the base's config and headers."""
    model: Any = source.skeleton()
    layers, _ = find_layers(model)
    norm = find_norm(model)
    tied = bool(getattr(source.config.get_text_config(), "tie_word_embeddings", False))
    tables = {id(one) for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = {f"{name}.weight" for name, module in model.named_modules() if id(module) in tables}
    head = next(
        f"{name}.weight" for name, one in model.named_modules() if one is model.get_output_embeddings()
    )
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name in source.places and not (tied and name == head)
    }
    merged = [
        name
        for name in shapes
        if options.embeddings == "merge" or name.startswith((f"{layers}.", f"{norm}."))
    ]
    prefix = f"{model.base_model_prefix}."
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return Base(
        config,
        shapes,
        merged,
        [name for name in shapes if name in names],
        prefix if layers.startswith(prefix) else "",
        frozenset(source.files),
        tied,
    )


def _folder(ref: str) -> Path:
    where = resolve(ref)
    return where.folder if where.folder is not None else downloaded(ref)


def _weights(folder: Path) -> list[Path]:
    """Return the files that hold a model's or an adapter's weights."""
    adapter = folder / "adapter_model.safetensors"
    return [adapter] if adapter.is_file() else sorted({path for path, _ in checkpoint_files(folder).values()})


def _not_quantized(expert: str, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"expert '{expert}': '{folder / 'config.json'}' is no config of a model") from None
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    if any(part.get("quantization_config") for part in parts):
        raise UserError(
            f"expert '{expert}' is quantised, so its difference to the base is not that of its training; name the "
            f"model that it was made from"
        )
