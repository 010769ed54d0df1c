"""Tiny models of eight layers that all change what is predicted, and the plain way to decode at reduced depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graftwork.testing.models import tiny_checkpoint, tiny_model, tiny_tokenizer

LAYERS = 8


def _lively(kind: str = "llama", layers: int = LAYERS, **changes: Any) -> Any:
    """Return a random model whose layers all matter: wider initial weights than usual."""
    depth = {"n_layer": layers} if kind == "gpt2" else {"num_hidden_layers": layers}
    return tiny_model(kind, **{**depth, "initializer_range": 0.15, **changes})


@torch.no_grad()
def _recomputed(
    model: Any, ids: Sequence[int], prompt: int, skipped: Callable[[int], frozenset[int]]
) -> torch.Tensor:
    """Return logits (A + 1) x V after the prompt and after every answer token, from the whole text at once.

    Dense and slow, Llama-like models only: every layer is computed for every token by plain matrix products; a
    token that goes past a layer keeps its state, and the others do not see it there. No cache, no gates.
    """
    decoder = model.model
    config = model.config
    count = len(ids)
    steps = [0] * prompt + list(range(1, count - prompt + 1))
    hidden = decoder.embed_tokens(torch.tensor([list(ids)]))
    cos, sin = decoder.rotary_emb(hidden, torch.arange(count)[None])
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    causal = torch.ones(count, count, dtype=torch.bool).tril()

    def split(values: torch.Tensor, number: int) -> torch.Tensor:
        return values.view(1, count, number, width).transpose(1, 2)

    def turned(values: torch.Tensor) -> torch.Tensor:
        first, second = values.chunk(2, dim=-1)
        return values * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    for number, layer in enumerate(decoder.layers):
        runs = torch.tensor([number not in skipped(step) for step in steps])
        normed = layer.input_layernorm(hidden)
        attention = layer.self_attn
        query = turned(split(attention.q_proj(normed), heads))
        key = turned(split(attention.k_proj(normed), groups)).repeat_interleave(heads // groups, 1)
        value = split(attention.v_proj(normed), groups).repeat_interleave(heads // groups, 1)
        scores = query @ key.transpose(-1, -2) / width**0.5
        # A token that goes past sees something all the same: its result is thrown away.
        seen = causal & (runs[None] | torch.eye(count, dtype=torch.bool))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(1, count, -1)
        after = hidden + attention.o_proj(mixed)
        after = after + layer.mlp(layer.post_attention_layernorm(after))
        hidden = torch.where(runs[None, :, None], after, hidden)
    return model.lm_head(decoder.norm(hidden))[0, prompt - 1 :]


@torch.no_grad()
def _stepwise(
    model: Any, ids: torch.Tensor, prompt: int, plan: Any, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return logits B x (A + 1) x V of decoding step by step with a cache, tokens given."""
    from graftwork_d3 import depth_decay

    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with depth_decay(model, plan) as depth:
        output = model(
            ids[:, :prompt],
            attention_mask=mask[:, :prompt],
            position_ids=positions[:, :prompt],
            use_cache=True,
        )
        found = [output.logits[:, -1]]
        for at in range(prompt, ids.shape[1]):
            depth.step(at - prompt + 1)
            output = model(
                ids[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=positions[:, at : at + 1],
                past_key_values=output.past_key_values,
            )
            found.append(output.logits[:, -1])
    return torch.stack(found, 1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of 7 tokens of prompt and 12 of answer."""
    return torch.randint(3, 250, (2, 19), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=LAYERS, initializer_range=0.15
    )


@pytest.fixture(scope="session")
def lively() -> Callable[..., Any]:
    """``lively(kind, layers, **config)`` returns a random model whose layers all matter."""
    return _lively


@pytest.fixture(scope="session")
def recomputed() -> Callable[..., torch.Tensor]:
    """``recomputed(model, ids, prompt, skipped)``: the dense reference."""
    return _recomputed


@pytest.fixture(scope="session")
def stepwise() -> Callable[..., torch.Tensor]:
    """``stepwise(model, ids, prompt, plan, mask)``: decoding with a cache, tokens given."""
    return _stepwise


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    """Models in float64 by kind; leave them as they are."""
    return {kind: _lively(kind, dtype=torch.float64) for kind in ("llama", "mistral", "qwen2", "gpt2")}
