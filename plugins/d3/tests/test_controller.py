"""Decoding at reduced depth: against a dense reference, the one-pass score, transformers' own loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.generate import touching_layers
from graftwork_d3 import DepthController, DepthSchedule, cost_of, depth_decay, teacher_forced
from graftwork_d3.policies import even, random_order, reversed_steps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

KINDS = ["llama", "mistral", "qwen2", "gpt2"]
LAYERS = 8
STEEP = DepthSchedule.of(LAYERS, alpha=0.9)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_step_by_step_is_recomputation_from_scratch(
    kind: str,
    dtype: torch.dtype,
    tolerance: float,
    ids: torch.Tensor,
    lively: Any,
    recomputed: Any,
    stepwise: Any,
) -> None:
    """Invariants 3 and 4, and the one-pass score against both."""
    model = lively(kind, dtype=dtype)
    decoded, scored = stepwise(model, ids, 7, STEEP), teacher_forced(model, ids, 7, STEEP)
    for row in range(2):
        dense = recomputed(model, ids[row].tolist(), 7, STEEP.skipped)
        assert (decoded[row] - dense).abs().max() < tolerance / 10
        assert (scored[row] - dense).abs().max() < tolerance / 10
        assert (dense - recomputed(model, ids[row].tolist(), 7, lambda step: frozenset())).abs().max() > 0.01


@given(
    alpha=st.floats(0.7, 1.0),
    start=st.integers(1, 4),
    order=st.sampled_from(["from_start", "from_end", "spread", "list"]),
    prompt=st.integers(1, 12),
    levels=st.none() | st.integers(2, 4),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schedule_step_by_step_is_one_pass(
    alpha: float,
    start: int,
    order: Any,
    prompt: int,
    levels: int | None,
    seed: int,
    stepwise: Any,
    models: Any,
) -> None:
    model = models["llama"]
    if order == "list":
        order = list(range(start, LAYERS - 2))[::2] + list(range(start, LAYERS - 2))[1::2]
    schedule = DepthSchedule.of(LAYERS, alpha=alpha, start=start, order=order, levels=levels)
    ids = torch.randint(3, 250, (1, prompt + 9), generator=torch.Generator().manual_seed(seed))
    decoded, scored = stepwise(model, ids, prompt, schedule), teacher_forced(model, ids, prompt, schedule)
    assert (decoded - scored).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_are_single_rows_in_both_ways(
    kind: str, attention: str, ids: torch.Tensor, lively: Any, stepwise: Any, models: Any
) -> None:
    """Invariant 5; also what the layers' arguments are cut to."""
    # In float64, transformers' eager attention has NaN where a row sees nothing; plain decoding has it, too.
    model = models[kind] if attention == "sdpa" else lively(kind, attn_implementation=attention)
    limit = 1e-9 if attention == "sdpa" else 1e-4
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    decoded = stepwise(model, ids, 7, STEEP, mask)
    scored = teacher_forced(model, ids, 7, STEEP, mask)
    assert (decoded - scored).abs().max() < limit
    alone = stepwise(model, ids[1:, 3:], 4, STEEP)
    assert (decoded[1] - alone[0]).abs().max() < limit
    assert (teacher_forced(model, ids[1:, 3:], 4, STEEP)[0] - alone[0]).abs().max() < limit


@pytest.mark.parametrize("make", [even, reversed_steps])
def test_sets_that_are_not_nested_are_scored_as_if_keys_were_dropped(
    make: Any, ids: torch.Tensor, recomputed: Any, models: Any
) -> None:
    table = make(STEEP, 12)
    assert not table.nested
    dense = recomputed(models["llama"], ids[0].tolist(), 7, table.skipped)
    assert (teacher_forced(models["llama"], ids[:1], 7, table)[0] - dense).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "plan", [DepthSchedule.of(LAYERS, alpha=1.0), DepthSchedule.of(LAYERS, alpha=0.5, minimum=8)]
)
def test_nothing_left_out_changes_no_bit(
    kind: str, plan: DepthSchedule, ids: torch.Tensor, lively: Any, stepwise: Any
) -> None:
    """Invariant 1."""
    model = lively(kind)
    full = stepwise(model, ids, 7, DepthSchedule.of(LAYERS, alpha=1.0))
    assert torch.equal(stepwise(model, ids, 7, plan), full)
    scored = teacher_forced(model, ids, 7, plan)
    assert torch.equal(scored, teacher_forced(model, ids, 7))


def test_the_cache_holds_what_each_layer_has_read(ids: torch.Tensor, lively: Any) -> None:
    """Invariant 6."""
    model = lively()
    with torch.no_grad(), depth_decay(model, STEEP) as depth:
        output = model(ids[:, :7], use_cache=True)
        for step in range(1, 13):
            depth.step(step)
            output = model(ids[:, 6 + step : 7 + step], past_key_values=output.past_key_values)
            for layer in range(LAYERS):
                ran = sum(layer not in STEEP.skipped(one) for one in range(1, step + 1))
                assert output.past_key_values.get_seq_length(layer) == 7 + ran
    assert output.past_key_values.get_seq_length(0) == 19
    assert depth.report.layers_per_position == [STEEP.depth(step) for step in range(1, 13)]
    assert depth.report.mean_ratio == STEEP.mean_ratio(12)


@pytest.mark.parametrize("own", [False, True])
def test_no_trace_is_left(own: bool, ids: torch.Tensor, lively: Any, stepwise: Any) -> None:
    """Invariant 7, also after an exception, also where a layer had a forward of its own."""
    model = lively()
    layers = model.model.layers
    if own:
        inner = layers[3].forward
        layers[3].forward = lambda *args, **kwargs: inner(*args, **kwargs)
    before = [dict(layer.__dict__) for layer in layers]
    hooks = len(model.model._forward_pre_hooks)
    logits = model(ids).logits
    stepwise(model, ids, 7, STEEP)
    with pytest.raises(ZeroDivisionError), depth_decay(model, STEEP) as depth:
        depth.step(9)
        assert layers[3].__dict__["forward"] is not before[3].get("forward")
        raise ZeroDivisionError
    assert [layer.__dict__.get("forward") for layer in layers] == [one.get("forward") for one in before]
    assert [layer.__dict__.keys() for layer in layers] == [one.keys() for one in before]
    assert len(model.model._forward_pre_hooks) == hooks
    assert torch.equal(model(ids).logits, logits)
    with touching_layers(model, "another", "steers", range(LAYERS)):
        pass


def test_leaving_out_layers_that_do_nothing_changes_nothing(
    ids: torch.Tensor, lively: Any, stepwise: Any
) -> None:
    """Invariant 8."""
    model = lively()
    schedule = DepthSchedule(LAYERS, 0.01, 2, 2, 4)
    for number in range(2, LAYERS - 2):
        layer = model.model.layers[number]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            torch.nn.init.zeros_(weight)
    full = DepthSchedule.of(LAYERS, alpha=1.0)
    assert schedule.depth(1) == 4
    assert torch.equal(stepwise(model, ids, 7, schedule), stepwise(model, ids, 7, full))


def test_a_second_text_begins_at_full_depth(ids: torch.Tensor, lively: Any) -> None:
    """Also without step(0), and with a prompt of one token."""
    model = lively()
    with torch.no_grad(), depth_decay(model, STEEP) as depth:
        first = model(ids[:, :7], use_cache=True)
        depth.step(12)
        model(ids[:, 7:8], past_key_values=first.past_key_values)
        again = model(ids[:, :7], use_cache=True)
        assert torch.equal(again.logits, first.logits)
        depth.step(12)
        model(ids[:, 7:8], past_key_values=again.past_key_values)
        one = model(ids[:, :1], use_cache=True)
    assert torch.equal(one.logits, model(ids[:, :1]).logits)
    assert one.past_key_values.get_seq_length(LAYERS - 3) == 1


def test_hidden_states_of_a_layer_that_is_left_out_are_those_before(ids: torch.Tensor, lively: Any) -> None:
    model = lively()
    with torch.no_grad(), depth_decay(model, STEEP) as depth:
        output = model(ids[:, :7], use_cache=True)
        depth.step(30)
        output = model(ids[:, 7:8], past_key_values=output.past_key_values, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    for layer in range(LAYERS):
        same = torch.equal(output.hidden_states[layer], output.hidden_states[layer + 1])
        assert same is (layer in STEEP.skipped(30))


def test_a_cache_of_fixed_size(ids: torch.Tensor, lively: Any) -> None:
    from transformers import StaticCache

    model = lively(dtype=torch.float64)
    cache = StaticCache(config=model.config, max_cache_len=19)
    with torch.no_grad(), depth_decay(model, STEEP) as depth:
        found = [model(ids[:, :7], past_key_values=cache).logits[:, -1]]
        for step in range(1, 13):
            depth.step(step)
            position = torch.tensor([[6 + step]])
            output = model(ids[:, 6 + step : 7 + step], past_key_values=cache, position_ids=position)
            found.append(output.logits[:, -1])
    assert (torch.stack(found, 1) - teacher_forced(model, ids, 7, STEEP)).abs().max() < 1e-9


def test_compiled_one_graph_for_every_depth(ids: torch.Tensor, lively: Any, stepwise: Any) -> None:
    """A compiler that only records graphs: quantised depths need one each, and leave none behind."""
    from torch._dynamo.testing import CompileCounter
    from transformers import StaticCache

    model = lively(layers=4)
    schedule = DepthSchedule.of(4, alpha=0.9, start=1, tail=1, levels=2)
    assert {schedule.depth(step) for step in range(1, 13)} == {4, 2}
    torch._dynamo.reset()
    counter = CompileCounter()
    plain = stepwise(model, ids, 7, schedule)
    cache = StaticCache(config=model.config, max_cache_len=19)
    compiled = torch.compile(model.forward, backend=counter, dynamic=False)
    with torch.no_grad(), depth_decay(model, schedule) as depth:
        found = [model(ids[:, :7], past_key_values=cache).logits[:, -1]]
        for step in range(1, 13):
            depth.step(step)
            position = torch.tensor([[6 + step]])
            output = compiled(ids[:, 6 + step : 7 + step], past_key_values=cache, position_ids=position)
            found.append(output.logits[:, -1])
        graphs = counter.frame_count
    assert (torch.stack(found, 1) - plain).abs().max() < 1e-4
    assert graphs == len({schedule.depth(step) for step in range(1, 13)})
    # Outside, a graph with gates is not used: all layers run again.
    cache = StaticCache(config=model.config, max_cache_len=19)
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
        after = compiled(ids[:, 7:8], past_key_values=cache, position_ids=torch.tensor([[7]])).logits[:, -1]
    assert (after - teacher_forced(model, ids, 7)[:, 1]).abs().max() < 1e-4
    torch._dynamo.reset()


def test_an_adapter_s_layers_are_left_out_with_theirs(ids: torch.Tensor, lively: Any, stepwise: Any) -> None:
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(lively(dtype=torch.float64), config)
    decoded = stepwise(model, ids, 7, STEEP)
    assert (decoded - teacher_forced(model, ids, 7, STEEP)).abs().max() < 1e-9
    merged = model.merge_and_unload()
    assert (stepwise(merged, ids, 7, STEEP) - decoded).abs().max() < 1e-9


def test_inside_inference_mode(ids: torch.Tensor, lively: Any, stepwise: Any) -> None:
    model = lively()
    with torch.inference_mode():
        inside = stepwise(model, ids, 7, STEEP)
    assert torch.equal(inside, stepwise(model, ids, 7, STEEP))


# ---------------------------------------------------------------------- refusals


def test_sets_that_are_not_nested_are_refused_before_the_first_token(lively: Any) -> None:
    """Invariant 11."""
    for table in (even(STEEP, 12), reversed_steps(STEEP, 12)):
        with pytest.raises(UserError, match="a layer comes back after it was left out"):
            DepthController(lively(), table)
    DepthController(lively(), random_order(STEEP, 12, 0))


@pytest.mark.parametrize("mistake", ["use_cache", "forgotten"])
def test_without_a_cache_it_is_refused(mistake: str, ids: torch.Tensor, lively: Any) -> None:
    model = lively()
    with depth_decay(model, STEEP) as depth, pytest.raises(UserError, match="d3 needs the cache"):
        if mistake == "use_cache":
            model(ids, use_cache=False)
        else:
            depth.step(1)
            model(ids)


def test_several_tokens_a_step_are_refused(ids: torch.Tensor, lively: Any) -> None:
    model = lively()
    with depth_decay(model, STEEP) as depth:
        output = model(ids[:, :7], use_cache=True)
        depth.step(1)
        with pytest.raises(UserError, match="one token a row, and this pass reads 3; assisted decoding"):
            model(ids[:, 7:10], past_key_values=output.past_key_values)


def test_a_step_that_was_not_announced_is_a_bug_of_the_loop(ids: torch.Tensor, lively: Any) -> None:
    model = lively()
    with depth_decay(model, STEEP):
        output = model(ids[:, :7], use_cache=True)
        with pytest.raises(RuntimeError, match=r"step\(t\) was not called"):
            model(ids[:, 7:8], past_key_values=output.past_key_values)


def test_a_cache_filled_at_smaller_depth_is_refused(ids: torch.Tensor, lively: Any) -> None:
    """A second turn of a chat on the first one's cache, and a step backwards."""
    model = lively()
    for again, layer in ((0, 2), (1, 3)):
        with torch.no_grad(), depth_decay(model, STEEP) as depth:
            output = model(ids[:, :7], use_cache=True)
            depth.step(12)
            output = model(ids[:, 7:8], past_key_values=output.past_key_values)
            depth.step(again)
            with pytest.raises(UserError, match=f"layer {layer} holds 7 tokens where layer 0 holds 8"):
                model(ids[:, 8:9], past_key_values=output.past_key_values)


def test_continuous_batching_is_refused(ids: torch.Tensor, lively: Any) -> None:
    """As transformers' own calls the model: every request in one row, and a cache of pages."""
    model = lively()
    with depth_decay(model, STEEP), pytest.raises(UserError, match="continuous batching"):
        model(ids.reshape(1, -1), cache=object(), use_cache=False)


def test_another_patch_of_a_layer_is_refused_with_both_numbers(lively: Any) -> None:
    model = lively()
    with (
        touching_layers(model, "other", "steers", [3], composes=True),
        pytest.raises(
            UserError, match=r"'other' steers layer 3 and 'd3' leaves out layers 2 to 5.*both touch layer 3"
        ),
        depth_decay(model, STEEP),
    ):
        pass
    with touching_layers(model, "other", "steers", [7], composes=True), depth_decay(model, STEEP):
        pass


def test_models_that_cannot_be_cut_are_refused_by_name(ids: torch.Tensor) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(kind: str, **config: Any) -> Any:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))

    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    from graftwork.testing.models import tiny_model

    cases = {
        "t5 reads an encoder's output": tiny_model("t5"),
        "of rwkv: it has layers with a recurrent state": build(
            "rwkv", vocab_size=32, hidden_size=16, num_hidden_layers=4, attention_hidden_size=16
        ),
        r"layer 0 \(linear_attention\) has a state of its own": build(
            "qwen3_next", **small, num_hidden_layers=4, num_key_value_heads=1, linear_num_value_heads=2,
            linear_num_key_heads=1, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
            num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8, head_dim=8,
        ),
        "layer 2 and those after it read the keys and values of earlier layers": build(
            "gemma3n_text", **{**small, "intermediate_size": [16] * 4}, num_hidden_layers=4, num_key_value_heads=1,
            num_kv_shared_layers=2, head_dim=8, vocab_size_per_layer_input=32, hidden_size_per_layer_input=4,
            laurel_rank=2, activation_sparsity_pattern=None, layer_types=["full_attention"] * 4,
        ),
        "add_cross": tiny_model("gpt2", add_cross_attention=True, n_layer=4),
    }  # fmt: skip
    for problem, model in cases.items():
        expected = "gpt2 reads an encoder's output" if problem == "add_cross" else problem
        with pytest.raises(UserError, match=expected):
            DepthController(model, DepthSchedule.of(4, alpha=0.9))


def test_an_unknown_stack_and_a_wrong_number_of_layers(lively: Any) -> None:
    model = lively()
    with pytest.raises(UserError, match="the schedule is for 6 layers, the model has 8"):
        DepthController(model, DepthSchedule.of(6, alpha=0.9))
    with pytest.raises(UserError, match="the schedule is for 6 layers, the model has 8"):
        teacher_forced(model, torch.ones(1, 4, dtype=torch.long), 2, DepthSchedule.of(6, alpha=0.9))
    blocks = model.model.layers
    del model.model.layers
    model.model.blocks = blocks
    with pytest.raises(UserError, match=r"does not find the decoder layers of llama \(LlamaForCausalLM\)"):
        DepthController(model, STEEP)
    model = lively()
    model.model.layers[2].self_attn.layer_idx = 1
    with pytest.raises(
        UserError, match=r"layer 2 .LlamaDecoderLayer. does not keep keys and values under its own"
    ):
        DepthController(model, STEEP)


def test_the_first_layer_of_every_kind_of_attention_stays(lively: Any, stepwise: Any) -> None:
    """Masks of all layers of a kind come from the first one's cache."""
    kinds = ["sliding_attention", "full_attention"] * 4
    model = lively("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=4, dtype=torch.float64)
    with pytest.raises(UserError, match=r"layer 1 cannot be left out.*full_attention.*start at 2 or later"):
        DepthController(model, DepthSchedule.of(LAYERS, alpha=0.9, start=1))
    ids = torch.randint(3, 250, (1, 19), generator=torch.Generator().manual_seed(0))
    schedule = DepthSchedule.of(LAYERS, alpha=0.9, start=2)
    decoded, scored = stepwise(model, ids, 7, schedule), teacher_forced(model, ids, 7, schedule)
    assert (decoded - scored).abs().max() < 1e-9


def test_virtual_tokens_and_flex_attention_are_refused(ids: torch.Tensor, lively: Any) -> None:
    model = get_peft_model(lively(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="virtual tokens"):
        DepthController(model, STEEP)
    model = lively()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UserError, match="flex_attention"):
        teacher_forced(model, ids, 7, STEEP)


# ---------------------------------------------------------------------- what it saves


def test_the_cost_is_that_of_the_weights(lively: Any) -> None:
    model = lively()
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    cost = cost_of(model)
    assert (cost.layers, cost.head) == (layers, 259 * 32)
    # 8 layers, 4 heads of 8: queries of width 32 meet 10 keys, and 10 values are summed.
    assert cost_of(model, 10).layers == layers + 8 * 2 * 32 * 10
    assert cost.bound(0.67) == pytest.approx(1 / (cost.head_share + (1 - cost.head_share) * 0.67))
    assert cost.saved(1.0) == 0
    assert cost.bound(1.0) == 1


def test_the_bound_of_a_135m_model() -> None:
    """The figure of the issue: a tied head of 28 M of 134.5 M parameters, mean depth 0.67."""
    from graftwork_d3 import Cost

    cost = Cost(layers=134.5e6 - 28.3e6, head=28.3e6)
    assert cost.bound(0.67) == pytest.approx(1.35, abs=0.005)
