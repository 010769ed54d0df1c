"""The logit lens: the model's own final norm and head on the residual stream after any layer."""

from __future__ import annotations

from typing import Any

import torch
from graftwork import UserError
from graftwork.generate.passes import inner_model

from graftwork_cale.layers import final_norm


class Lens:
    """p_l = softmax(W_U N(h_l)) as log-probabilities, in float32 or the model's better precision."""

    def __init__(self, model: Any) -> None:
        inner = inner_model(model)
        self.name = type(inner).__name__
        self.norm = final_norm(model)
        head = inner.get_output_embeddings()
        self.precision = torch.promote_types(inner.dtype, torch.float32)
        self.weight = head.weight.detach().to(self.precision)
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias.detach().to(self.precision)
        self.cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
        # What half precision rounds off in the model's own head.
        self.tolerance = 1e-3 if inner.dtype in (torch.float32, torch.float64) else 5e-2

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return B x V for ``hidden`` B x d."""
        normed = self.norm(hidden).to(self.precision)
        logits = torch.nn.functional.linear(normed.to(self.weight.device), self.weight, self.bias)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities B x V for ``hidden`` B x d."""
        return self.logits(hidden).log_softmax(-1)

    def check(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare the lens at the last layer (``hidden`` B x d) with the model's own ``logits`` (B x V).

        Raises:
            UserError: the model's head does more than a norm and a projection.
        """
        own = logits.to(self.precision)
        apart = (self.logits(hidden) - own).abs().max().item()
        if apart > self.tolerance * (1 + own.abs().max().item()):
            raise UserError(
                f"the logit lens cannot read {self.name}: at the last layer it is {apart:.2g} away from the model's "
                f"own logits, so the head is more than a final norm and a projection"
            )
