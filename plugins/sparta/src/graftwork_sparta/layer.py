"""The adapted linear layer: the frozen weight plus a shared and a specific low-rank branch."""

from __future__ import annotations

import math
from typing import Any

import torch
from graftwork_kernels.gated_low_rank import gated_low_rank
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftwork_sparta.config import SpartaConfig
from graftwork_sparta.router import SpartaPart, SpartaRouter


class SpartaLinear(nn.Module, SpartaPart):
    """y = W0 x + c (g_s B_s A_s x + g_p B_p A_p x), both branches in one pair of products.

    A_s (r_s x d_in), B_s (d_out x r_s), A_p (r_p x d_in), B_p (d_out x r_p). B starts at 0, so y = W0 x.
    The stacked A = [A_s; A_p] and B = [B_s, B_p] need two products instead of four; the per-sequence gates
    scale the (tokens x ranks) middle. Source of the form: the lineage (DATA's code), one pair for all tasks.
    """

    adapter_layer_names = ("sparta_shared_A", "sparta_shared_B", "sparta_specific_A", "sparta_specific_B")
    other_param_names = ("sparta_frozen_A", "sparta_frozen_B", "configs", "sparta_dropout")

    def __init__(self, base_layer: nn.Module, name: str, config: SpartaConfig) -> None:
        super().__init__()
        SpartaPart.__init__(self)
        self.base_layer = base_layer
        bare = self.get_base_layer()
        if isinstance(bare, Conv1D):
            self.in_features, self.out_features = bare.weight.shape
        elif isinstance(bare, nn.Linear):
            self.in_features, self.out_features = bare.in_features, bare.out_features
        else:
            raise TypeError(
                f"SpaRTA adapts linear layers; {type(bare).__name__} is none, take it out of target_modules"
            )
        self.configs: dict[str, SpartaConfig] = {}
        self.sparta_shared_A = nn.ParameterDict({})
        self.sparta_shared_B = nn.ParameterDict({})
        self.sparta_specific_A = nn.ParameterDict({})
        self.sparta_specific_B = nn.ParameterDict({})
        self.sparta_frozen_A = BufferDict({}, persistent=True)
        self.sparta_frozen_B = BufferDict({}, persistent=True)
        self.sparta_dropout = nn.ModuleDict({})
        # A list, so that the router is not registered as a child of every layer that reads it.
        self.router: list[SpartaRouter] = []
        self._active_adapter = name
        self.add(name, config)

    def add(self, name: str, config: SpartaConfig) -> None:
        """Make the branches of adapter ``name``; ranks of 0 leave a branch out."""
        for rank in (config.rank_shared, config.rank_specific):
            if rank > min(self.in_features, self.out_features):
                raise ValueError(
                    f"SpaRTA: rank {rank} is larger than a target layer of {self.in_features} inputs and "
                    f"{self.out_features} outputs allows"
                )
        self.configs[name] = config
        self.sparta_dropout[name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        for rank, a, b in (
            (config.rank_shared, self.sparta_shared_A, self.sparta_shared_B),
            (config.rank_specific, self.sparta_specific_A, self.sparta_specific_B),
        ):
            if rank:
                a[name] = nn.Parameter(self._fresh_a(rank, config))
                b[name] = nn.Parameter(torch.zeros(self.out_features, rank))
        if config.specific == "per_task":
            frozen = config.rank_specific * (config.tasks - 1)
            self.sparta_frozen_A[name] = torch.zeros(frozen, self.in_features)
            self.sparta_frozen_B[name] = torch.zeros(self.out_features, frozen)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _fresh_a(
        self, rank: int, config: SpartaConfig, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        a = torch.empty(rank, self.in_features)
        if config.init == "lineage":
            return nn.init.normal_(a, std=1 / rank**2, generator=generator)
        return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)

    def grow(self, name: str, generator: torch.Generator) -> None:
        """With ``specific="per_task"``: freeze the specific branch and start a fresh one at zero."""
        config = self.configs[name]
        if config.specific != "per_task" or not config.rank_specific:
            return
        a, b = self.sparta_specific_A[name], self.sparta_specific_B[name]
        self.sparta_frozen_A[name] = torch.cat([self.sparta_frozen_A[name], a.detach()])
        self.sparta_frozen_B[name] = torch.cat([self.sparta_frozen_B[name], b.detach()], 1)
        fresh = self._fresh_a(config.rank_specific, config, generator).to(a.device, a.dtype)
        self.sparta_specific_A[name] = nn.Parameter(fresh)
        self.sparta_specific_B[name] = nn.Parameter(torch.zeros_like(b))

    # ------------------------------------------------------------------ factors

    def specific_a(self, name: str) -> torch.Tensor:
        """Return A_p as the forward pass uses it: with ``orth_mode="project"`` without A_s's row space."""
        a = self.sparta_specific_A[name]
        if self.configs[name].orth_mode == "project" and name in self.sparta_shared_A:
            basis = torch.linalg.qr(self.sparta_shared_A[name].float().T).Q
            return (a.float() - a.float() @ basis @ basis.T).to(a.dtype)
        return a

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """Return stacked A (r x d_in), stacked B (d_out x r) and (shared, specific) ranks."""
        a_parts, b_parts = [], []
        if name in self.sparta_shared_A:
            a_parts.append(self.sparta_shared_A[name])
            b_parts.append(self.sparta_shared_B[name])
        shared = sum(len(a) for a in a_parts)
        if name in self.sparta_frozen_A and len(self.sparta_frozen_A[name]):
            a_parts.append(self.sparta_frozen_A[name])
            b_parts.append(self.sparta_frozen_B[name])
        if name in self.sparta_specific_A:
            a_parts.append(self.specific_a(name))
            b_parts.append(self.sparta_specific_B[name])
        ranks = (shared, sum(len(a) for a in a_parts) - shared)
        if len(a_parts) == 1:
            return a_parts[0], b_parts[0], ranks
        return torch.cat(a_parts), torch.cat(b_parts, 1), ranks

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """Return c (g_s B_s A_s + g_p B_p A_p) (d_out x d_in), with fixed gates.

        Raises:
            ValueError: the router is on and no fixed gates were set: what depends on the input cannot merge.
        """
        a, b, ranks = self.factors(name)
        config = self.configs[name]
        if config.router != "off":
            static = self.router[0].static.get(name)
            if static is None:
                raise ValueError(
                    "SpaRTA's gates depend on the input and cannot be merged; use graftwork_sparta.merge_static, "
                    "which folds their mean over your prompts in, or an adapter with router: off"
                )
            b = b * torch.cat([static[:1].expand(ranks[0]), static[1:].expand(ranks[1])]).to(b)
        return b @ a * config.scale

    # ------------------------------------------------------------------ forward and merge

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name not in self.configs:
                continue
            a, b, ranks = self.factors(name)
            gate = None
            if self.configs[name].router != "off":
                gate = self.router[0].rank_gates(name, ranks, len(x))
            x_in = self.sparta_dropout[name](x.to(a.dtype))
            result = gated_low_rank(result, x_in, a, b, gate, self.configs[name].scale)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the delta of the named (or active) adapters to the base weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.configs:
                merged = self.get_base_layer().weight.data + self._delta_as_stored(name)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"merging adapter '{name}' gives weights that are not numbers")
                self.get_base_layer().weight.data = merged
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged deltas out again."""
        while self.merged_adapters:
            self.get_base_layer().weight.data -= self._delta_as_stored(self.merged_adapters.pop())

    def _delta_as_stored(self, name: str) -> torch.Tensor:
        weight = self.get_base_layer().weight
        delta = self.get_delta_weight(name).detach()
        return (delta.T if isinstance(self.get_base_layer(), Conv1D) else delta).to(weight)
