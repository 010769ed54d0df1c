"""What stands before what: methods that prepare a model come before the one that rounds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftwork import UserError, hookimpl

if TYPE_CHECKING:
    from graftwork.run import Run


class WeightPlugin:
    """What the plugins of this package share: where they may stand in a run.

    Attributes:
        name: of the plugin.
        rescales: whether it scales inputs of linears by folding into the norms before them.
        clears_norms: whether it folds the norms' weights into the linears after them.
    """

    name: str
    rescales = False
    clears_norms = False

    @hookimpl
    def check(self, run: Run) -> None:
        if run.job.transform is None:
            raise UserError(
                f"plugin '{self.name}' changes weights with `trainer transform` or in a step with a section "
                f"transform, and does nothing elsewhere; leave it out"
            )
        check_order(
            self, [other for other in run.plugins.objects.values() if isinstance(other, WeightPlugin)]
        )


def check_order(plugin: Any, everyone: list[Any]) -> None:
    """Refuse an order of plugins in which one would undo the work of one before it.

    Raises:
        UserError: ``plugin`` undoes what was scaled before it.
    """
    before = everyone[: everyone.index(plugin)]
    scaled = next((other.name for other in before if other.rescales), None)
    if scaled and plugin.clears_norms:
        raise UserError(
            f"plugins '{scaled}' and '{plugin.name}' cannot be combined in this order: '{plugin.name}' folds the norms "
            f"into the linears after them, which undoes the scales of '{scaled}' (hook weight_transforms); name "
            f"'{scaled}' after it"
        )


def touches_rotated(places: Sequence[str]) -> bool:
    """Return whether inputs are scaled that a rotation can turn without a norm before them: those of o and down."""
    return bool({"o", "down"} & set(places))
