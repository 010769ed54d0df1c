"""What a generated token costs, and how much faster fewer layers can make it at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftwork.generate.passes import inner_model

from graftwork_d3.stack import find_decoder


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one token at full depth: in all layers together, and in the head that every token passes.

    At batch 1 these are also the weights that a step reads. Embedding rows are looked up, which costs nothing here.
    """

    layers: float
    head: float

    @property
    def head_share(self) -> float:
        """Share (0 to 1) of a token's arithmetic that leaving out layers cannot save."""
        return self.head / (self.layers + self.head)

    def saved(self, ratio: float) -> float:
        """Return the share of a token's arithmetic that a mean depth of ``ratio`` of all layers saves."""
        return (1 - self.head_share) * (1 - ratio)

    def bound(self, ratio: float) -> float:
        """Return the speed-up if time went with arithmetic: 1 / (head + layers * ratio)."""
        return 1 / (1 - self.saved(ratio))


def cost_of(model: Any, context: int = 0) -> Cost:
    """Return the cost of one token after ``context`` tokens.

    Weights of two and more dimensions count one multiply-add each; attention adds two of the queries' width per
    layer and earlier token. Experts of which a token uses a few are counted whole.
    """
    inner = inner_model(model)
    _, layers = find_decoder(model)
    config = inner.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = sum(
        parameter.numel() for layer in layers for parameter in layer.parameters() if parameter.dim() > 1
    )
    head = inner.get_output_embeddings()
    return Cost(float(weights + 2 * len(layers) * width * context), float(head.weight.numel()))
