"""From a transform job's settings to opened experts: which plugin merges, and whether it may."""

from __future__ import annotations

from collections.abc import Sequence

from graftwork.errors import UserError
from graftwork.hookspecs import WeightTransform
from graftwork.merge.experts import Experts
from graftwork.merge.method import MergeMethod
from graftwork.merge.transform import Merging
from graftwork.transform.options import TransformOptions
from graftwork.transform.source import CheckpointSource, Source


def merging_of(
    transforms: Sequence[tuple[str, WeightTransform]], options: TransformOptions
) -> Merging | None:
    """Return the merge among the transforms of a job, if there is one; it is the first of them.

    Raises:
        UserError: experts that nobody merges, or a merge without experts.
    """
    found = [plugin for plugin, one in transforms if one.merging is not None]
    if not found:
        if options.experts:
            raise UserError(
                f"transform.experts names {', '.join(options.experts)}, but no plugin of this run merges; name one "
                f"with --plugin"
            )
        return None
    if not options.experts:
        raise UserError(
            f"plugin '{found[0]}' merges experts, and none is named; set transform.experts.NAME=MODEL"
        )
    return transforms[0][1].merging


def open_experts(merging: Merging, source: Source, options: TransformOptions) -> Experts:
    """Open and check the experts of a job and hand them to its merge; only headers are read.

    Raises:
        UserError: see :class:`graftwork.merge.experts.Experts`; also for a base that is not read from files.
    """
    if not isinstance(source, CheckpointSource):
        raise UserError("experts are merged file by file, in one process; leave transform.deepspeed out")
    experts = Experts(options.experts, source, options.merge)
    merging.open(experts)
    return experts


def stored_beside(method: MergeMethod, experts: Experts) -> int:
    """Return the bytes, at most, that a method stores beside the model."""
    if type(method).beside is MergeMethod.beside:
        return 0
    return int(method.bits_per_weight(experts) / 8 * experts.count)
