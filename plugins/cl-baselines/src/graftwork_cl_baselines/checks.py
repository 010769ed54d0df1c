"""What several of the methods must refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftwork import UserError

if TYPE_CHECKING:
    from graftwork.run import Run


def refuse_field(plugin: str, run: Run, field: str, why: str) -> None:
    """Refuse ``train.<field>``; ``why`` ends the sentence."""
    if run.job.train.get(field):
        raise UserError(f"plugin '{plugin}': {why}; remove train.{field}")
