"""What stands before what: methods that prepare a model come before the one that rounds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftwork import UserError, hookimpl

if TYPE_CHECKING:
    from graftwork.run import Run


class WeightPlugin:
    """What the plugins of this package share: where they may stand in a run.

    Attributes:
        name: of the plugin.
        rounds: whether it rounds weights, so that nothing may scale, rotate or factorise them afterwards.
        rescales: whether it scales inputs of linears by folding into the norms before them.
        clears_norms: whether it folds the norms' weights into the linears after them.
    """

    name: str
    rounds = False
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
    """Refuse an order of plugins in which one would find its work impossible or undone.

    Raises:
        UserError: something rounds before ``plugin``, or ``plugin`` undoes what was scaled before it.
    """
    before = everyone[: everyone.index(plugin)]
    rounding = next((other.name for other in before if other.rounds), None)
    if rounding:
        raise UserError(
            f"plugin '{rounding}' rounds the weights before '{plugin.name}' sees them; what scales, rotates or "
            f"factorises comes first, and one plugin rounds"
        )
    scaled = next((other.name for other in before if other.rescales), None)
    if scaled and plugin.clears_norms:
        raise UserError(
            f"plugin '{plugin.name}' folds the norms into the linears after them, which undoes the scales of "
            f"'{scaled}'; name '{scaled}' after it"
        )
