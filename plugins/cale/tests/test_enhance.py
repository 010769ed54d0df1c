"""The enhancement against its formulas and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork_cale import LayerEnhancement
from graftwork_cale.enhance import added, amplified
from graftwork_cale.layers import final_norm, layers_of, model_id
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

KINDS = ["llama", "mistral", "qwen2", "gpt2"]
VARIANTS = ["amplify", "residual", "growth"]
Lively = Callable[..., Any]


def logits(model: Any, ids: torch.Tensor, **named: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **named).logits


def states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the residual stream after the embedding and after every layer, none of them normalised."""
    found: list[torch.Tensor] = []
    handles = [layers_of(model)[0].register_forward_pre_hook(lambda m, a: found.append(a[0]))]
    handles += [
        layer.register_forward_hook(lambda m, a, out: found.append(out)) for layer in layers_of(model)
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_output_embeddings()(final_norm(model)(hidden))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("positions", ["predicting", "all"])
def test_strength_1_changes_no_bit(
    lively: Lively, ids: torch.Tensor, kind: str, variant: Any, positions: Any
) -> None:
    model = lively(kind)
    before, tokens = logits(model, ids), model.generate(ids, max_new_tokens=8, do_sample=False)
    with LayerEnhancement(model, 2, 1.0, variant, positions):
        assert torch.equal(logits(model, ids), before)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_another_strength_changes_the_last_position_only(
    lively: Lively, ids: torch.Tensor, kind: str, variant: Any
) -> None:
    model = lively(kind)
    before = logits(model, ids)
    with LayerEnhancement(model, 2, 1.7, variant):
        after = logits(model, ids)
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(strength=st.floats(0.5, 4))
def test_scaling_the_last_layer_does_nothing(kind: str, strength: float) -> None:
    # With the epsilon that such models have.
    depth = {"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}
    model, ids = tiny_model(kind, initializer_range=0.3, **depth), torch.arange(20, 32)[None]
    hook = layers_of(model)[-1].register_forward_hook(lambda m, a, out: amplified(out, strength))
    after = logits(model, ids)
    hook.remove()
    assert (after - logits(model, ids)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_without_end_it_is_the_logit_lens(lively: Lively, ids: torch.Tensor, kind: str, layer: int) -> None:
    model = lively(kind)
    lens = head(model, states(model, ids)[layer])
    for variant in ("amplify", "residual"):
        with LayerEnhancement(model, layer, 1e6, variant):
            torch.testing.assert_close(logits(model, ids)[:, -1], lens[:, -1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 1.3, 3.0])
def test_residual_is_the_formula(lively: Lively, ids: torch.Tensor, kind: str, strength: float) -> None:
    model = lively(kind, dtype=torch.float64)
    # The last entry is normalised already, so the stream is taken from the layers themselves.
    streams = states(model, ids)
    with torch.no_grad():
        recorded = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(streams[2], recorded[2])
    with LayerEnhancement(model, 2, strength, "residual", "all"):
        found = logits(model, ids)
    by_hand = head(model, streams[-1] + (strength - 1) * recorded[2])
    torch.testing.assert_close(found, by_hand, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_growth_and_amplify_are_the_formulas(lively: Lively, ids: torch.Tensor, kind: str) -> None:
    """Continue by hand from the changed stream, layer after layer, through a model cut behind layer 2."""
    model, strength = lively(kind, dtype=torch.float64), 1.4
    streams = states(model, ids)
    for variant, expected in (
        ("amplify", strength * streams[2]),
        ("growth", streams[1] + strength * (streams[2] - streams[1])),
    ):
        replaced = layers_of(model)[1].register_forward_hook(lambda m, a, out, e=expected: e)
        by_hand = logits(model, ids)
        replaced.remove()
        with LayerEnhancement(model, 2, strength, variant, "all"):
            torch.testing.assert_close(logits(model, ids), by_hand, atol=1e-12, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(strength=st.floats(0.1, 8), seed=st.integers(0, 99))
def test_the_functions_on_tensors(strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, before = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(amplified(h, strength), strength * h)
    torch.testing.assert_close(added(h, h - before, strength), before + strength * (h - before))
    each = torch.tensor([1.0, strength, 1.0], dtype=torch.float64)
    assert torch.equal(amplified(h, each)[::2], h[::2])
    torch.testing.assert_close(amplified(h, each)[1], strength * h[1])


@pytest.mark.parametrize("mlp", [False, True])
def test_amplify_and_residual_differ_by_the_last_mlp_alone(
    lively: Lively, ids: torch.Tensor, mlp: bool
) -> None:
    model, strength = lively(dtype=torch.float64), 1.5
    if not mlp:
        layers_of(model)[-1].mlp.down_proj.weight.data.zero_()  # type: ignore[union-attr, operator]
    found = []
    for variant in ("amplify", "residual"):
        with LayerEnhancement(model, 3, strength, variant):
            found.append(logits(model, ids)[:, -1])
    apart = (found[0] - found[1]).abs().max().item()
    # The norm works in float32 whatever the model's precision.
    assert apart > 1e-2 if mlp else apart < 1e-5


def test_all_and_predicting_differ_because_keys_and_values_do(lively: Lively, ids: torch.Tensor) -> None:
    model, found = lively(), []
    for positions in ("all", "predicting"):
        with LayerEnhancement(model, 2, 1.7, "amplify", positions):
            found.append(logits(model, ids)[:, -1])
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_strength_per_row_is_a_run_per_row(lively: Lively, ids: torch.Tensor) -> None:
    model, rows = lively(), ids.repeat(3, 1)
    for variant in VARIANTS:
        with LayerEnhancement(model, 2, torch.tensor([1.0, 1.5, 3.0]), variant):  # type: ignore[arg-type]
            together = logits(model, rows)
        for row, strength in enumerate((1.0, 1.5, 3.0)):
            with LayerEnhancement(model, 2, strength, variant):  # type: ignore[arg-type]
                torch.testing.assert_close(together[row], logits(model, ids)[0], atol=1e-5, rtol=1e-5)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_left_behind(lively: Lively, ids: torch.Tensor, variant: Any) -> None:
    model = lively()
    before, clean = logits(model, ids), hooks(model)
    enhancement = LayerEnhancement(model, 2, 2.0, variant)
    for _ in range(2):
        with enhancement:
            assert hooks(model) > clean
        assert hooks(model) == clean
    with pytest.raises(RuntimeError), enhancement:
        logits(model, ids)
        raise RuntimeError
    assert hooks(model) == clean
    with pytest.raises(ValueError, match="exactly one"), enhancement:
        model()
    assert hooks(model) == clean
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("pair", [("amplify", "amplify"), ("residual", "residual"), ("growth", "residual")])
def test_two_layers_compose_in_any_order(lively: Lively, ids: torch.Tensor, pair: tuple[Any, Any]) -> None:
    model, found = lively(dtype=torch.float64), []
    for order in ((0, 1), (1, 0)):
        parts = [LayerEnhancement(model, 1, 1.3, pair[0]), LayerEnhancement(model, 3, 1.6, pair[1])]
        with parts[order[0]], parts[order[1]]:
            found.append(logits(model, ids))
    torch.testing.assert_close(found[0], found[1])
    with LayerEnhancement(model, 1, 1.3, pair[0]):
        assert (logits(model, ids) - found[0]).abs().max() > 1e-6


def test_the_same_layer_twice_is_refused_and_leaves_the_first(lively: Lively, ids: torch.Tensor) -> None:
    model = lively()
    clean = hooks(model)
    with LayerEnhancement(model, 2, 1.5):
        once, within = logits(model, ids), hooks(model)
        with pytest.raises(UserError, match=r"'cale' enhances \(as layer 2 of 1 to 4\) .* both touch"):
            LayerEnhancement(model, 2, 1.5, "residual").__enter__()
        assert hooks(model) == within
        assert torch.equal(logits(model, ids), once)
        # Another model is another matter.
        with LayerEnhancement(lively(), 2, 1.5):
            pass
    assert hooks(model) == clean


@pytest.mark.parametrize(
    ("layer", "strength", "problem"),
    [
        (0, 1.5, "layer 0 is not in a model of 4 layers; choose 1 to 3"),
        (5, 1.5, "layer 5 is not in a model of 4 layers"),
        (4, 1.5, "layer 4 is the last one, where scaling has no effect after the final norm; choose 1 to 3"),
        (2, 0.0, "strength = 0.0: a positive finite number"),
        (2, -1.0, "positive finite"),
        (2, float("nan"), "positive finite"),
        (2, float("inf"), "positive finite"),
    ],
)
def test_bad_layers_and_strengths(lively: Lively, layer: int, strength: float, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        LayerEnhancement(lively(), layer, strength)


def test_models_without_known_layers_are_refused_by_name(lively: Lively) -> None:
    with pytest.raises(UserError, match="T5ForConditionalGeneration has an encoder"):
        LayerEnhancement(tiny_model("t5"), 1, 1.5)
    with pytest.raises(UserError, match="does not know the layers of Linear"):
        LayerEnhancement(torch.nn.Linear(2, 2), 1, 1.5)
    model = lively()
    model.model.blocks_of_its_own = model.model.layers
    del model.model.layers
    with pytest.raises(UserError, match="does not know the layers of LlamaForCausalLM"):
        LayerEnhancement(model, 1, 1.5)


def test_a_compiled_model_is_refused(lively: Lively) -> None:
    model = lively()
    with pytest.raises(UserError, match="was compiled before CaLE was set"), LayerEnhancement(model, 1, 1.5):
        model.compile()
        LayerEnhancement(model, 2, 1.5).__enter__()


def test_peft_wrapped_models_and_their_adapters(lively: Lively, ids: torch.Tensor) -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=32, target_modules="all-linear")
    base, adapted = lively(), get_peft_model(lively(), config)
    assert model_id(adapted) == model_id(base) == "llama"
    plain = logits(adapted, ids)
    assert not torch.allclose(plain, logits(base, ids))
    with LayerEnhancement(adapted, 2, 1e6):
        lens = head(adapted.get_base_model(), states(adapted, ids)[2])
        torch.testing.assert_close(logits(adapted, ids)[:, -1], lens[:, -1], atol=1e-3, rtol=1e-3)
    assert torch.equal(logits(adapted, ids), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(lively: Lively, ids: torch.Tensor, dtype: torch.dtype) -> None:
    model = lively(dtype=dtype)
    before = logits(model, ids)
    for strength in (1.5, torch.tensor([1.5])):
        with LayerEnhancement(model, 2, strength):
            after = logits(model, ids)
        assert after.dtype == dtype
        assert not torch.equal(after[:, -1], before[:, -1])
    with LayerEnhancement(model, 2, torch.tensor([1.0])):
        assert torch.equal(logits(model, ids), before)
