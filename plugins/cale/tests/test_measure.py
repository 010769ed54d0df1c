"""The profile against its definition, computed from whole logits of whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.generate import Prompt
from graftwork.testing.models import tiny_tokenizer
from graftwork_cale import Item, encode_item, measure
from graftwork_cale.layers import final_norm, layers_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

KINDS = ["llama", "mistral", "qwen2", "gpt2"]
TOKENIZER = tiny_tokenizer()
Lively = Callable[..., Any]
ITEMS = [
    Item([20, 21, 22, 23, 24, 25], [24, 25], [30]),
    Item([40, 41, 42], [42], [50, 51, 52, 53]),
    Item([60, 61, 62, 63, 64, 65, 66, 67, 68], [66, 67, 68], [70, 71]),
]


def lens_of_all(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Return ln p_l at every position, layers 1 to L, T x V each: transformers' own recorded states."""
    with torch.no_grad():
        recorded = model(torch.tensor([ids]), output_hidden_states=True)
        head = model.get_output_embeddings()
        # The last recorded state is normalised already.
        streams = [head(final_norm(model)(h)) for h in recorded.hidden_states[1:-1]]
    return [z[0].log_softmax(-1) for z in [*streams, recorded.logits]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_figure_is_its_definition(lively: Lively, kind: str, batch_size: int) -> None:
    model = lively(kind, dtype=torch.float64)
    profile = measure(model, ITEMS, batch_size=batch_size)
    for row, item in enumerate(ITEMS):
        likelihoods = []
        for prompt, first, mean in (
            (item.main, profile.first, profile.mean),
            (item.contrast, profile.first_without, profile.mean_without),
        ):
            lens = lens_of_all(model, prompt + item.answer[:-1])
            begin = len(prompt) - 1
            likelihoods.append([p[begin] for p in lens])
            answers = [
                torch.stack([p[begin + place, token] for place, token in enumerate(item.answer)])
                for p in lens
            ]
            torch.testing.assert_close(first[row], torch.stack([a[0] for a in answers]), atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(
                mean[row], torch.stack([a.mean() for a in answers]), atol=1e-6, rtol=1e-6
            )
        kl = [(p.exp() * (p - q)).sum() for p, q in zip(*likelihoods, strict=True)]
        torch.testing.assert_close(profile.kl[row], torch.stack(kl), atol=1e-6, rtol=1e-6)


def test_the_last_layer_is_the_model(lively: Lively) -> None:
    model = lively()
    profile = measure(model, ITEMS)
    for row, item in enumerate(ITEMS):
        with torch.no_grad():
            logits = model(torch.tensor([item.main])).logits[0, -1]
        expected = torch.nn.functional.cross_entropy(logits[None], torch.tensor(item.answer[:1]))
        torch.testing.assert_close(profile.first[row, -1].float(), -expected, atol=1e-5, rtol=1e-5)
    assert profile.norm[:, -1].tolist() == [1, 1, 1]


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 250), min_size=1, max_size=12), min_size=2, max_size=5),
    seed=st.integers(0, 9),
)
def test_divergence_is_positive_and_zero_for_the_same_prompt(
    lively: Lively, prompts: list[list[int]], seed: int
) -> None:
    model = lively(seed=seed)
    different = measure(model, [Item(p, q, []) for p, q in zip(prompts, prompts[::-1], strict=True)])
    assert (different.kl >= 0).all()
    assert different.first is None
    same = measure(model, [Item(p, p, []) for p in prompts])
    assert (same.kl == 0).all()


def test_batches_of_one_and_eight_agree(lively: Lively) -> None:
    generator = torch.Generator().manual_seed(1)
    items = [
        Item(*(torch.randint(3, 250, (n,), generator=generator).tolist() for n in sizes))
        for sizes in (
            (5, 3, 2),
            (17, 4, 1),
            (8, 8, 5),
            (30, 2, 3),
            (1, 1, 1),
            (9, 12, 2),
            (4, 4, 4),
            (6, 2, 1),
        )
    ]
    one, eight = (measure(lively(), items, batch_size=size).curves() for size in (1, 8))
    for name in ("kl", "norm", "first", "first_without", "mean", "mean_without"):
        torch.testing.assert_close(torch.tensor(one[name]), torch.tensor(eight[name]), atol=1e-4, rtol=1e-4)


def test_measuring_leaves_no_trace_and_reads_adapters(lively: Lively) -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=64, target_modules="all-linear")
    adapted = get_peft_model(lively(), config)
    adapted.train()
    clean = sum(len(m._forward_hooks) for m in adapted.modules())
    with_adapter = measure(adapted, ITEMS)
    assert sum(len(m._forward_hooks) for m in adapted.modules()) == clean
    assert adapted.training
    merged = measure(adapted.merge_and_unload(), ITEMS)
    torch.testing.assert_close(with_adapter.kl, merged.kl, atol=1e-3, rtol=1e-3)
    assert (with_adapter.kl - measure(lively(), ITEMS).kl).abs().max() > 1e-2


def test_memory_is_one_position_at_a_time(lively: Lively, monkeypatch: Any) -> None:
    from graftwork_cale.lens import Lens

    shapes = []
    own = Lens.logits
    monkeypatch.setattr(Lens, "logits", lambda self, hidden: shapes.append(hidden.shape) or own(self, hidden))
    model = lively()
    measure(model, ITEMS, batch_size=3)
    assert {wide for _, wide in shapes} == {model.config.hidden_size}
    assert max(rows for rows, _ in shapes) == 3


def test_a_head_that_does_more_is_refused(lively: Lively) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8}
    scaled = AutoConfig.for_model("granite", **small, **heads, logits_scaling=7.0, initializer_range=0.3)
    with pytest.raises(UserError, match="cannot read GraniteForCausalLM: at the last layer"):
        measure(AutoModelForCausalLM.from_config(scaled).eval(), ITEMS)
    # A soft cap on the logits is known.
    capped = AutoConfig.for_model(
        "gemma2", **small, **heads, final_logit_softcapping=2.0, initializer_range=0.3
    )
    model = AutoModelForCausalLM.from_config(capped).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ITEMS[0].main])).logits[0, -1]
    torch.testing.assert_close(
        measure(model, ITEMS[:1]).first[0, -1].float(), logits.log_softmax(-1)[30], atol=1e-5, rtol=1e-5
    )


def test_items_from_prompts() -> None:
    pair = Prompt("The sky is green. Sky?", "Sky?")
    item = encode_item(TOKENIZER, pair, "green", "record 1")
    assert TOKENIZER.decode(item.main + item.answer) == "The sky is green. Sky? green"
    assert TOKENIZER.decode(item.contrast) == "Sky?"
    assert encode_item(TOKENIZER, pair, None, "record 1").answer == []
    chat = Prompt([{"role": "user", "content": "Sky?"}], [{"role": "user", "content": "?"}])
    item = encode_item(TOKENIZER, chat, "green", "record 1")
    assert TOKENIZER.decode(item.main + item.answer).endswith("<assistant>green")


@pytest.mark.parametrize(
    ("prompt", "answer", "problem"),
    [
        (Prompt("only one"), "x", "record 7 has no context: layers are compared by prompts with and without"),
        (Prompt("a", "b"), "  ", "record 7: the answer '  ' has no tokens"),
        (Prompt("", "b"), "x", "a prompt is empty"),
    ],
)
def test_bad_items(prompt: Prompt, answer: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        encode_item(TOKENIZER, prompt, answer, "record 7")


def test_nothing_to_measure(lively: Lively) -> None:
    with pytest.raises(UserError, match="no items to measure"):
        measure(lively(), [])


def test_the_layers_are_those_of_the_model(lively: Lively) -> None:
    for kind in KINDS:
        assert len(layers_of(lively(kind))) == 4
