"""Experts that are themselves the outcome of a merge: recognised, because merging them again compounds its error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from graftwork import UserError
from graftwork.models import resolve


def refuse_merged(experts: Iterable[tuple[str, str]]) -> None:
    """Refuse experts (name, ref) that a merge has written: a run that merged, or its model.

    Raises:
        UserError: there is one; it names it.
    """
    for name, ref in experts:
        folder = resolve(ref).folder
        run = None if folder is None else _merged_run(folder)
        if run is not None:
            raise UserError(
                f"expert '{name}' ({ref}) was written by a merge, whose error a second one would add to; merge the "
                f"experts that it was made from, or set plugins.mmer.allow_merged=true"
            )


def _merged_run(folder: Path) -> Path | None:
    """Return the run that merged experts into the model in ``folder``, or None."""
    for run in (folder, folder.parent):
        try:
            job = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["job"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        transform = job.get("transform") if isinstance(job, dict) else None
        if not isinstance(transform, dict):
            continue
        artefact = (job.get("plugins") or {}).get("mmer") or {}
        if transform.get("experts") or artefact.get("artefact"):
            return run
    return None
