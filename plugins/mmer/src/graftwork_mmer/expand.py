"""From a base and stored masks to the plain checkpoint that stands for one expert, without any expert at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from graftwork import UserError
from graftwork.hookspecs import WeightTransform
from graftwork.merge.rows import as_matrix, digest
from graftwork.transform.source import CheckpointSource
from graftwork.transform.structure import find_layers
from graftwork_kernels import announce
from graftwork_kernels.masked_delta import masked_delta

from graftwork_mmer.artefact import Artefact

if TYPE_CHECKING:
    from graftwork.run import Run
    from graftwork.transform.block import Block
    from graftwork.transform.outer import Outer


def expansion_transform(run: Run, artefact: str, expert: str) -> WeightTransform:
    """Return the transform that writes ``theta_0 + gamma m u`` of ``expert`` from what the run ``artefact`` stored.

    Raises:
        UserError: see :meth:`Artefact.read`; also for a base that is not the one of the masks.
    """
    model = run.job.model
    source = CheckpointSource(model.ref, dtype=model.dtype, trust_remote_code=model.trust_remote_code)
    base = digest(sorted({path for path, _ in source.places.values()}))
    expansion = Expansion(Artefact.read(Path(artefact), base_sha256=base, experts=[expert]), expert)
    return WeightTransform("mmer", expansion.block, needs="none", begin=expansion.begin)


class Expansion:
    """Adds an expert's part of the merge to a base, layer by layer."""

    def __init__(self, artefact: Artefact, expert: str) -> None:
        self.artefact, self.expert = artefact, expert

    def begin(self, outer: Outer) -> None:
        """Change what stands outside the layers."""
        announce(outer.console.say, next(outer.model.parameters()).device)
        layers, _ = find_layers(outer.model)
        names = [name for name in self.artefact.merged if not name.startswith(f"{layers}.")]
        self._add({name: outer.model.get_parameter(name) for name in names})

    def block(self, block: Block) -> None:
        """Change one layer."""
        start = f"{block.name}."
        names = [name for name in self.artefact.merged if name.startswith(start)]
        self._add({name: block.module.get_parameter(name.removeprefix(start)) for name in names})

    def _add(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if as_matrix(tuple(parameter.shape)) != tuple(self.artefact.merged[name].shape):
                raise UserError(
                    f"the masks are for '{name}' of shape {tuple(self.artefact.merged[name].shape)}, and the base's is "
                    f"{tuple(parameter.shape)}"
                )
            base = parameter.data.view(self.artefact.merged[name].shape)
            base.copy_(
                masked_delta(
                    base,
                    self.artefact.merged[name].to(base.device),
                    self.artefact.masks[self.expert][name].words.to(base.device),
                    self.artefact.scales[self.expert],
                )
            )
