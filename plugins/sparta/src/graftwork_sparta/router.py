"""The router: one pair of gates per sequence and block of decoder layers, from the prompt's hidden states."""

from __future__ import annotations

import math
from typing import Any

import torch
from graftwork import UserError
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from graftwork_sparta.config import SpartaConfig
from graftwork_sparta.prompt import PromptContext

SHARED, SPECIFIC = 0, 1


class SpartaPart(BaseTunerLayer):
    """What layers and routers have in common for PEFT's bookkeeping."""

    def __init__(self) -> None:
        self._disable_adapters = False
        self.merged_adapters: list[str] = []


class SpartaRouter(nn.Module, SpartaPart):
    """Gates of one block. Shapes: batch b, tokens l, hidden size d, rows n = tasks x components.

    Per adapter and branch beta it holds components A, K (n x d) and weights w (n). Rows of finished
    tasks are buffers (``old``), those of the current one parameters (``new``).

    ``router="prompt"`` (ours):

        q       = mean of h over prompt tokens, unit length, detached
        c_k     = cos(q * A_k, K_k)
        g_beta  = 2 sigmoid(sum_k w_k c_k)                     w = 0 at first, hence g = 1

    ``router="lineage"`` (read from DATA's code): with a = <h, A_k> normalised over k, K_k normalised,

        g_beta  = sigmoid( sum_l sum_k a_lk (sum_c K_kc) (sum_c W_kc) / sqrt(d) )

    where W is a third matrix (n x d).
    """

    adapter_layer_names = ("sparta_router_A", "sparta_router_K", "sparta_router_w")
    other_param_names = ("sparta_old_A", "sparta_old_K", "sparta_old_w", "configs")

    def __init__(self, block: int, width: int, context: PromptContext) -> None:
        super().__init__()
        SpartaPart.__init__(self)
        self.block = block
        self.width = width
        self.context = context
        self.configs: dict[str, SpartaConfig] = {}
        self.sparta_router_A = nn.ParameterDict({})
        self.sparta_router_K = nn.ParameterDict({})
        self.sparta_router_w = nn.ParameterDict({})
        self.sparta_old_A = BufferDict({}, persistent=True)
        self.sparta_old_K = BufferDict({}, persistent=True)
        self.sparta_old_w = BufferDict({}, persistent=True)
        self.gates: dict[str, torch.Tensor] = {}
        self._kept: dict[tuple[bool, str], torch.Tensor] = {}
        self.static: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------ growth

    def add(self, name: str, config: SpartaConfig, device: torch.device) -> None:
        """Make the components of adapter ``name`` for ``config.tasks`` tasks; only the last ones train."""
        self.configs[name] = config
        self.device = device
        n = config.components * (config.tasks - 1)
        _check_room(config, self.width)
        w_shape = (self.width,) if config.router == "lineage" else ()
        self.sparta_old_A[name] = torch.zeros(2, n, self.width, device=device)
        self.sparta_old_K[name] = torch.zeros(2, n, self.width, device=device)
        self.sparta_old_w[name] = torch.zeros(2, n, *w_shape, device=device)
        self._fresh(name, None)

    def grow(self, name: str, generator: torch.Generator) -> None:
        """Freeze the components of the task so far and add those of the next one.

        With ``router="prompt"`` the new weights are 0, so the gates stay what they were, bit for bit.
        """
        self.sparta_old_A[name] = torch.cat([self.sparta_old_A[name], self.sparta_router_A[name].detach()], 1)
        self.sparta_old_K[name] = torch.cat([self.sparta_old_K[name], self.sparta_router_K[name].detach()], 1)
        self.sparta_old_w[name] = torch.cat([self.sparta_old_w[name], self.sparta_router_w[name].detach()], 1)
        self._fresh(name, generator)

    def _fresh(self, name: str, generator: torch.Generator | None) -> None:
        config, old = self.configs[name], self.sparta_old_A[name]
        count = config.components

        def rows(earlier: torch.Tensor) -> nn.Parameter:
            if old.device.type == "meta":
                return nn.Parameter(torch.empty(2, count, self.width, device="meta"))
            return nn.Parameter(orthonormal_rows(earlier.cpu().float(), count, generator).to(old.device))

        self.sparta_router_A[name] = rows(old)
        if config.router == "lineage":
            self.sparta_router_K[name] = rows(self.sparta_old_K[name])
            self.sparta_router_w[name] = rows(self.sparta_old_w[name])
        else:
            # K starts as A: every component's c_k then is how much of the query's energy lies along A_k.
            self.sparta_router_K[name] = nn.Parameter(self.sparta_router_A[name].detach().clone())
            self.sparta_router_w[name] = nn.Parameter(torch.zeros(2, count, device=old.device))

    # ------------------------------------------------------------------ gates

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the block's first decoder layer: compute the gates of this forward pass."""
        hidden = args[0] if args else kwargs["hidden_states"]
        for name in self.active_adapters:
            if name not in self.configs or self.disable_adapters:
                continue
            config = self.configs[name]
            every_step = config.router == "lineage" and config.lineage_pool == "all"
            if self.context.now.reuse and not every_step:
                continue
            mask = (
                self.context.attended(hidden)
                if every_step
                else self.context.prompt(hidden, config.prompt_fallback)
            )
            gates = self._gates(name, hidden, mask)
            if not torch.isfinite(gates).all():
                raise UserError(
                    f"SpaRTA: the gate of block {self.block} is not a number; lower 'learning_rate' or 'mu', "
                    f"or turn the router off (router: off)"
                )
            self.gates[name] = self._kept[torch.is_grad_enabled(), name] = gates

    def _gates(self, name: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the gates (b x 2), in fp32, from hidden states (b x l x d) and a mask (b x l)."""
        config = self.configs[name]
        a_BND = torch.cat([self.sparta_old_A[name], self.sparta_router_A[name]], 1).float()
        k_BND = torch.cat([self.sparta_old_K[name], self.sparta_router_K[name]], 1).float()
        w = torch.cat([self.sparta_old_w[name], self.sparta_router_w[name]], 1).float()
        h = hidden.detach().float() if config.router == "prompt" else hidden.float()
        mask = mask.to(h.dtype)
        if config.router == "prompt":
            pooled = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            query = F.normalize(pooled, dim=-1)
            return 2 * torch.sigmoid(prompt_logits(query, a_BND, k_BND, w))
        return torch.sigmoid(lineage_logits(h, mask, a_BND, k_BND, w))

    def rank_gates(self, name: str, ranks: tuple[int, int], batch: int) -> torch.Tensor:
        """Return the gates of adapter ``name`` expanded to ranks: (b x (r_shared + r_specific))."""
        # With gradients, those of the pass with gradients: another method may ask the model for something without
        # them before the backward pass, in which checkpointed layers run again.
        gates = self._kept.get((torch.is_grad_enabled(), name))
        if gates is None or gates.shape[0] != batch:
            have = "none" if gates is None else str(gates.shape[0])
            raise UserError(
                f"SpaRTA: block {self.block} has gates for {have} sequences but sees {batch}; decoding with a "
                f"cache must start with the prompts of the same batch"
            )
        shared = gates[:, SHARED : SHARED + 1].expand(-1, ranks[0])
        specific = gates[:, SPECIFIC:].expand(-1, ranks[1])
        return torch.cat([shared, specific], 1)

    # ------------------------------------------------------------------ PEFT walks over all tuner layers

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to merge here: the layers fold the gates in."""

    def unmerge(self) -> None:
        """Nothing to undo."""

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT asks for it after it loaded weights; there is no base layer here, the block says where.
        for name in (*self.adapter_layer_names, *self.other_param_names):
            tensors = getattr(self, name)
            if name != "configs" and adapter_name in tensors:
                tensors[adapter_name].data = tensors[adapter_name].data.to(device or self.device)


def prompt_logits(
    q_bD: torch.Tensor, a_BND: torch.Tensor, k_BND: torch.Tensor, w_BN: torch.Tensor
) -> torch.Tensor:
    """Return z (b x 2) = sum_k w_k cos(q * A_k, K_k) without building a (b x 2 x n x d) tensor.

    <q*A, K> = q . (A*K) and |q*A|^2 = q^2 . A^2, two small matrix products. Shape suffixes: b batch,
    B branch, N row, D hidden size.
    """
    inner = torch.einsum("bd,Bnd->bBn", q_bD, a_BND * k_BND)
    left = torch.einsum("bd,Bnd->bBn", q_bD**2, a_BND**2).clamp_min(1e-24).sqrt()
    right = k_BND.norm(dim=-1).clamp_min(1e-12)
    return torch.einsum("bBn,Bn->bB", inner / (left * right), w_BN)


def lineage_logits(
    h_bLD: torch.Tensor, mask_bL: torch.Tensor, a_BND: torch.Tensor, k_BND: torch.Tensor, w_BND: torch.Tensor
) -> torch.Tensor:
    """Return z (b x 2) of the lineage router in its closed form (the algebra is ours).

    The original sums K and W over their feature axis, so of each only kappa_k = (sum_c K_kc)(sum_c W_kc) /
    sqrt(d) matters: z = sum_k kappa_k sum_l a_lk.
    """
    a_bBLN = F.normalize(torch.einsum("bld,Bnd->bBln", h_bLD, a_BND), dim=-1)
    kappa = F.normalize(k_BND, dim=-1).sum(-1) * w_BND.sum(-1) / math.sqrt(h_bLD.shape[-1])
    return torch.einsum("bBln,bl,Bn->bB", a_bBLN, mask_bL, kappa)


def orthonormal_rows(earlier: torch.Tensor, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Return ``count`` random rows per branch, orthonormal and orthogonal to ``earlier`` (2 x n x d).

    Rows that were trained since are no longer orthonormal; their span is what counts.
    """
    branches = []
    for old in earlier:
        width = old.shape[-1]
        fresh = torch.randn(count, width, generator=generator)
        if len(old):
            basis = torch.linalg.qr(old.double().T).Q
            fresh = (fresh.double() - fresh.double() @ basis @ basis.T).float()
        branches.append(torch.linalg.qr(fresh.double().T).Q.T.float())
    return torch.stack(branches).contiguous()


def _check_room(config: SpartaConfig, width: int) -> None:
    if config.components * config.tasks > width:
        raise UserError(
            f"SpaRTA: {config.tasks} tasks with {config.components} components each need more orthogonal rows than "
            f"the hidden size {width} has; lower 'components'"
        )
