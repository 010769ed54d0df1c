"""What MMER stores beside a model, in memory: the merged difference, a mask and a scale per expert."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from graftwork import UserError
from graftwork.console import Console
from graftwork.errors import did_you_mean
from graftwork.files import sha256
from graftwork.merge.experts import Experts
from graftwork.merge.masks import Bits, pack, unpack
from graftwork.merge.rows import as_matrix
from graftwork.merge.stored import read_masks
from graftwork.transform.beside import FOLDER, MANIFEST, beside_files, read_beside

from graftwork_mmer.method import FORMAT, MASK, MERGED, MmerMethod


@dataclass
class Artefact:
    """One merge with its masks.

    Attributes:
        experts: names, sorted.
        merged: u by parameter, rows x columns in the precision that it is stored in (see
            :func:`graftwork.merge.rows.as_matrix`).
        masks: by expert, then by parameter.
        scales: gamma by expert.
        base_sha256: of the files of the base that it belongs to.
    """

    experts: tuple[str, ...]
    merged: dict[str, torch.Tensor]
    masks: dict[str, dict[str, Bits]]
    scales: dict[str, float]
    base_sha256: str
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, method: MmerMethod, experts: Experts, console: Console | None = None) -> Artefact:
        """Merge in memory; ``method`` has not begun yet.

        Raises:
            UserError: see :meth:`MmerMethod.begin` and :class:`graftwork.merge.experts.Experts`.
        """
        console = console or Console(enabled=False)
        method.begin(experts, console)
        merged: dict[str, list[torch.Tensor]] = {}
        masks: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in experts.names}
        for piece in experts.pieces(console, "merge"):
            merged.setdefault(piece.name, []).append(method.merge(piece).to(method.dtype))
            for index, name in enumerate(experts.names):
                masks[name].setdefault(piece.name, []).append(method.mask(piece, index))
        return cls(
            experts.names,
            {name: torch.cat(parts) for name, parts in merged.items()},
            {
                expert: {name: pack(torch.cat(parts)) for name, parts in mine.items()}
                for expert, mine in masks.items()
            },
            dict(method.scales),
            experts.base_digest,
            method.manifest(),
        )

    @classmethod
    def read(
        cls, run: Path | str, *, base_sha256: str | None = None, experts: Sequence[str] | None = None
    ) -> Artefact:
        """Read what the run in folder ``run`` has stored, and check that it is whole and belongs together.

        Args:
            run: a run of ``trainer transform --plugin mmer``.
            base_sha256: of the base's files, where it is known; refused where the artefact is for another.
            experts: whose masks are wanted; all by default.

        Raises:
            UserError: nothing of MMER is there, a file was changed or comes from another merge, an expert that it
                has no mask of, another base.
        """
        folder = Path(run) / FOLDER
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            about = manifest["transforms"]["mmer"]
            known = tuple(sorted(about["experts"]))
            labels, digest, scales = manifest["labels"], about["base"]["sha256"], about["scales"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"'{run}' holds no masks of mmer ({FOLDER}/{MANIFEST}); name a run of 'trainer transform --plugin mmer'"
            ) from None
        if about.get("format") != FORMAT:
            raise UserError(f"'{run}' holds masks of format {about.get('format')}, and this reads {FORMAT}")
        wanted = known if experts is None else tuple(sorted(experts))
        for name in wanted:
            if name not in known:
                raise UserError(
                    f"'{run}' has no mask of '{name}'{did_you_mean(name, known)}; it has those of {', '.join(known)}"
                )
        if base_sha256 is not None and digest != base_sha256:
            raise UserError(
                f"the masks in '{run}' are for another base (its files' SHA-256 begins with {digest[:12]}, here it is "
                f"{base_sha256[:12]}); name the base that they were made with"
            )
        for label in (MERGED, *(f"{MASK}{name}" for name in wanted)):
            _unchanged(folder, label, labels)
        merged = {name: _matrix(tensor) for name, tensor in read_beside(folder / MERGED).items()}
        masks = {name: read_masks(folder / f"{MASK}{name}", base_sha256=digest) for name in wanted}
        for name, mine in masks.items():
            shapes = {key: (bits.words.shape[0], bits.columns) for key, bits in mine.items()}
            if shapes != {key: tuple(tensor.shape) for key, tensor in merged.items()}:
                raise UserError(
                    f"'{folder}': the mask of '{name}' is not for the merged difference beside it"
                )
        return cls(wanted, merged, masks, {name: scales[name] for name in wanted}, digest, about)

    def kept(self, expert: str, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Return ``gamma m u`` of an expert for a parameter (float32, rows x columns)."""
        bits = self.masks[expert][name]
        mask = unpack(bits.words[rows], bits.columns)
        found = torch.where(mask, self.merged[name][rows].float(), 0.0)
        scale = self.scales[expert]
        return found if scale == 1 else found * scale


def _unchanged(folder: Path, label: str, labels: Mapping[str, Any]) -> None:
    """Refuse files that are not those that the merge has written."""
    expected = labels.get(label, {}).get("sha256", {})
    for path in beside_files(folder / label):
        if sha256(path) != expected.get(path.name):
            raise UserError(
                f"'{path}' is not the file that this merge has stored (its SHA-256 is another); masks serve only the "
                f"merge that they were made for"
            )


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(as_matrix(tuple(tensor.shape)))
