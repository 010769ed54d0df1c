"""The gates: their equations in float64, what they may see, growth, and decoding."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork import UserError
from graftwork_sparta import freeze_new, gate_values, grow, prompt_context
from graftwork_sparta.model import routers_of
from graftwork_sparta.prompt import prompt_mask
from graftwork_sparta.router import lineage_logits, prompt_logits

FOUR = {"num_hidden_layers": 4}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- equations


def lineage_by_loops(h, mask, a, k, w) -> torch.Tensor:
    """Equation (2) as DATA's code runs it: every sum of its own, nothing folded."""
    out = torch.zeros(len(h), len(a), dtype=torch.float64)
    for row in range(len(h)):
        for branch in range(len(a)):
            for position in range(h.shape[1]):
                if not mask[row, position]:
                    continue
                scores = [torch.dot(h[row, position], vector) for vector in a[branch]]
                length = math.sqrt(sum(s.item() ** 2 for s in scores))
                for index, score in enumerate(scores):
                    key = k[branch, index] / k[branch, index].norm()
                    for c in key:
                        sim = score / length * c / math.sqrt(h.shape[-1])
                        out[row, branch] += (sim * w[branch, index]).sum()
    return out


def test_lineage_equals_its_loops() -> None:
    h, a, k, w = drawn(2, 3, 5), drawn(2, 4, 5, seed=1), drawn(2, 4, 5, seed=2), drawn(2, 4, 5, seed=3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    expected = lineage_by_loops(h, mask, a, k, w)
    torch.testing.assert_close(lineage_logits(h, mask.double(), a, k, w), expected, rtol=0, atol=1e-10)
    turned = lineage_logits(h, mask.double(), a, k[..., [3, 0, 4, 1, 2]], w[..., [1, 0, 2, 4, 3]])
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(lineage_logits(h, mask.double(), a[..., [3, 0, 4, 1, 2]], k, w), expected)


def test_prompt_router_equals_its_loops() -> None:
    q, a, k, w = drawn(3, 6), drawn(2, 4, 6, seed=1), drawn(2, 4, 6, seed=2), drawn(2, 4, seed=3)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for row in range(3):
        for branch in range(2):
            for index in range(4):
                left, right = q[row] * a[branch, index], k[branch, index]
                cosine = torch.dot(left, right) / (left.norm() * right.norm())
                expected[row, branch] += w[branch, index] * cosine
    torch.testing.assert_close(prompt_logits(q, a, k, w), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("router", ["prompt", "lineage"])
def test_the_model_computes_its_gates_from_the_blocks_input(adapt, batch, router) -> None:
    adapted = adapt(router=router, model=FOUR)
    seen = []
    for part in routers_of(adapted):
        block = adapted.base_model.model.model.layers[2 * part.block]
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    adapted(**batch)
    for part, h in zip(routers_of(adapted), seen, strict=True):
        a, k, w = (getattr(part, f"sparta_router_{n}")["default"].detach().double() for n in ("A", "K", "w"))
        if router == "lineage":
            expected = torch.sigmoid(lineage_by_loops(h, batch["attention_mask"], a, k, w))
        else:
            prompt = (batch["labels"] == -100) & (torch.arange(12) < 6)
            pooled = torch.stack([row[keep].mean(0) for row, keep in zip(h, prompt, strict=True)])
            query = pooled / pooled.norm(dim=-1, keepdim=True)
            expected = 2 * torch.sigmoid(prompt_logits(query, a, k, w))
        torch.testing.assert_close(part.gates["default"].double(), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- growth


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("components", [3, 8])
def test_growing_changes_no_output_bit(adapt, scramble, batch, kind, components) -> None:
    adapted = adapt(kind, scrambled=False, components=components)
    adapted(**batch)
    assert torch.equal(gate_values(adapted), torch.ones(3, 1, 2))
    for task in (1, 2, 3):
        scramble(adapted)
        before, gates = adapted(**batch).logits, gate_values(adapted)
        assert gates.std() > 1e-3
        grow(adapted, torch.Generator().manual_seed(task))
        assert torch.equal(adapted(**batch).logits, before)
        assert torch.equal(gate_values(adapted), gates)
        assert adapted.peft_config["default"].tasks == task + 1


def test_new_rows_are_orthonormal_to_all_older_ones(adapt, scramble) -> None:
    adapted = adapt(router="lineage", components=8)
    for task in (1, 2, 3):
        grow(adapted, torch.Generator().manual_seed(task))
        for part in routers_of(adapted):
            for name in ("A", "K", "w"):
                old = getattr(part, f"sparta_old_{name}")["default"].double()
                new = getattr(part, f"sparta_router_{name}")["default"].detach().double()
                assert old.shape[1] == 8 * task
                assert (new @ old.mT).abs().max() < 1e-5
                torch.testing.assert_close(new @ new.mT, torch.eye(8).double().expand(2, 8, 8))
        scramble(adapted)
    with pytest.raises(
        UserError, match="task 5 with 8 components does not fit the hidden size 32; lower"
    ) as e:
        grow(adapted, torch.Generator().manual_seed(4))
    assert "\n" not in str(e.value)
    assert adapted.peft_config["default"].tasks == 4
    assert routers_of(adapted)[0].sparta_old_A["default"].shape[1] == 24


def test_too_many_components_are_refused_at_once(adapt) -> None:
    with pytest.raises(UserError, match="1 tasks with 40 components each need more orthogonal rows"):
        adapt(components=40)


def test_growth_is_drawn_from_the_generator_alone(adapt) -> None:
    rows = []
    for _ in range(2):
        torch.rand(3)
        adapted = adapt()
        grow(adapted, torch.Generator().manual_seed(7))
        rows.append(routers_of(adapted)[0].sparta_router_A["default"])
    assert torch.equal(*rows)


def test_old_components_do_not_train(adapt, batch) -> None:
    adapted = adapt()
    grow(adapted, torch.Generator().manual_seed(1))
    part = routers_of(adapted)[0]
    olds = {n: getattr(part, f"sparta_old_{n}")["default"].clone() for n in "AKw"}
    names = {name for name, _ in adapted.named_parameters()}
    assert not any("sparta_old" in name for name in names)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(**batch).loss.backward()
    assert part.sparta_router_w["default"].grad.abs().sum() > 0
    optimizer.step()
    for name, old in olds.items():
        now = getattr(part, f"sparta_old_{name}")["default"]
        assert not now.requires_grad
        assert torch.equal(now, old)


def test_freezing_leaves_only_the_branches_to_train(adapt, batch) -> None:
    adapted = adapt()
    freeze_new(adapted)
    adapted(**batch).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("sparta_s" in name), name
        if "sparta_router" in name:
            assert parameter.grad is None


def test_a_pass_without_gradients_leaves_those_of_a_checkpointed_one(adapt, batch) -> None:
    """Another method's question to the model, before the backward pass in which checkpointed layers run again."""

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        adapted = adapt(model=FOUR)
        adapted.enable_input_require_grads()
        adapted.train()
        if checkpointed:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        loss = adapted(**batch, use_cache=False).loss
        if checkpointed:
            with torch.no_grad():
                adapted(input_ids=batch["input_ids"].flip(1), use_cache=False)
        loss.backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}

    plain, asked = gradients(False), gradients(True)
    assert plain.keys() == asked.keys()
    assert any("sparta_router_w" in name for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(asked[name], value, rtol=1e-5, atol=1e-8)


def test_the_gates_send_no_gradient_into_the_layers_below(adapt, batch) -> None:
    adapted = adapt(model=FOUR)
    adapted(**batch)
    routers_of(adapted)[1].gates["default"].sum().backward()
    reached = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(reached) == 3
    assert all("layers.2.branch_router.sparta_router" in name for name in reached)


# ---------------------------------------------------------------- what the gates may see


def gates_of(adapted, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    more = {} if labels is None else {"labels": labels}
    with torch.no_grad():
        adapted(input_ids=ids, attention_mask=mask, position_ids=positions, **more)
    return gate_values(adapted)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_gates_do_not_depend_on_padding(adapt, batch, kind) -> None:
    adapted = adapt(kind, model={"n_layer": 4} if kind == "gpt2" else FOUR)
    ids, labels = batch["input_ids"][:2], batch["labels"][:2]
    ones = torch.ones_like(ids)
    plain = gates_of(adapted, ids, ones, labels)
    assert plain.shape == (2, 2, 2)
    assert plain.std() > 0.01
    pad = torch.nn.functional.pad
    for sides in ((0, 5), (5, 0), (1, 0), (3, 4)):
        padded = gates_of(adapted, pad(ids, sides), pad(ones, sides), pad(labels, sides, value=-100))
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def test_gates_do_not_depend_on_the_answer_or_on_neighbours(adapt, batch) -> None:
    adapted = adapt(model=FOUR)
    ids, labels = batch["input_ids"][:2], batch["labels"][:2]
    ones = torch.ones_like(ids)
    plain = gates_of(adapted, ids, ones, labels)
    other_ids, other_labels = ids.clone(), labels.clone()
    other_ids[:, 6:] = other_labels[:, 6:] = 77
    torch.testing.assert_close(gates_of(adapted, other_ids, ones, other_labels), plain, rtol=0, atol=1e-6)
    other_ids[:, 3] = 99
    assert (gates_of(adapted, other_ids, ones, other_labels) - plain).abs().max() > 1e-3
    alone = torch.cat([gates_of(adapted, ids[i : i + 1], ones[:1], labels[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, plain, rtol=0, atol=1e-6)


def test_the_lineage_router_does_see_the_answer(adapt, batch) -> None:
    """The finding of the lineage: its gate depends on the text it is to predict; pooled over the prompt it does not."""
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 7] = 99
    changes = {}
    for pool in ("all", "prompt"):
        adapted = adapt(router="lineage", lineage_pool=pool)
        adapted(**batch)
        before = gate_values(adapted)
        adapted(**other)
        changes[pool] = (gate_values(adapted) - before).abs().max().item()
    assert changes["prompt"] < 1e-6 < 1e-3 < changes["all"]


def test_prompt_mask_ends_at_the_first_answer_token() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 6], [-100, -100, -100, 7, -100], [-100] * 5])
    attended = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    expected = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(prompt_mask(labels, attended), expected)


def test_text_without_a_prompt_uses_its_first_half_or_is_refused(adapt, batch) -> None:
    adapted = adapt()
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    mask[2, 9] = 0
    labels = ids.masked_fill(mask == 0, -100)
    half = gates_of(adapted, ids, mask, labels)
    # Rows of 12, 12 and 9 tokens: the first 6, 6 and 5 are the prompt.
    expected = torch.where(torch.arange(12) < torch.tensor([[6], [6], [5]]), -100, labels)
    assert torch.equal(half, gates_of(adapted, ids, mask, expected))
    strict = adapt(prompt_fallback="refuse")
    with pytest.raises(
        UserError, match=r"a row of the batch has no prompt token.*set prompt_fallback: half"
    ) as e:
        strict(input_ids=ids, attention_mask=mask, labels=labels)
    assert "\n" not in str(e.value)


def test_a_mask_that_was_given_beats_the_labels_for_one_pass(adapt, batch) -> None:
    adapted = adapt()
    context = prompt_context(adapted)
    adapted(**batch)
    from_labels = gate_values(adapted)
    context.give(torch.arange(12)[None].expand(3, 12) < 3)
    adapted(**batch)
    given = gate_values(adapted)
    shorter = {**batch, "labels": batch["labels"].clone()}
    shorter["labels"][:, 3:6] = 7
    adapted(**shorter)
    assert torch.equal(given, gate_values(adapted))
    assert not torch.equal(given, from_labels)
    adapted(**batch)
    assert torch.equal(gate_values(adapted), from_labels)


def test_refusals_at_run_time(adapt, batch) -> None:
    adapted = adapt(model=FOUR)
    prompt_context(adapted).give(torch.ones(3, 5))
    with pytest.raises(
        UserError, match=r"covers \(3, 5\) positions, the batch has \(3, 12\).*router: off"
    ) as e:
        adapted(**batch)
    assert "\n" not in str(e.value)
    with torch.no_grad():
        routers_of(adapted)[1].sparta_router_w["default"][0, 0] = float("nan")
    with pytest.raises(UserError, match="the gate of block 1 is not a number; lower 'learning_rate'") as e:
        adapted(**batch)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_and_without_cache_agree(adapt, batch, kind, beams) -> None:
    adapted = adapt(kind, model={"n_layer": 4} if kind == "gpt2" else FOUR)
    ids, mask = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    answers, gates, scores = [], [], []
    for cache in (True, False):
        with prompt_context(adapted).generation():
            out = adapted.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=6,
                do_sample=False,
                num_beams=beams,
                use_cache=cache,
                output_scores=True,
                return_dict_in_generate=True,
                eos_token_id=None,
            )
        answers.append(out.sequences)
        scores.append(torch.stack(out.scores))
        gates.append(gate_values(adapted))
    assert torch.equal(*answers)
    assert answers[0].shape == (3, 18)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gates, rtol=1e-5, atol=1e-5)
    prompt_gates = gates_of(adapted, ids, mask, None).repeat_interleave(beams, 0)
    torch.testing.assert_close(gates[0], prompt_gates, rtol=1e-5, atol=1e-5)


def test_teacher_forced_and_generated_gates_agree(adapt, batch) -> None:
    adapted = adapt(model=FOUR)
    prompt = batch["input_ids"][:, :6]
    with prompt_context(adapted).generation():
        text = adapted.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False
        )
    generated = gate_values(adapted)
    labels = text.clone()
    labels[:, :6] = -100
    forced = gates_of(adapted, text, torch.ones_like(text), labels)
    torch.testing.assert_close(forced, generated, rtol=0, atol=1e-5)


def test_a_generation_leaves_nothing_behind(adapt, batch) -> None:
    adapted = adapt()
    before = adapted(**batch).logits
    for _ in range(2):
        with prompt_context(adapted).generation():
            adapted.generate(input_ids=batch["input_ids"][:1, :4], max_new_tokens=2, do_sample=False)
    assert torch.equal(adapted(**batch).logits, before)


def test_a_cache_of_other_rows_is_refused(adapt, batch) -> None:
    adapted = adapt()
    cache = adapted(input_ids=batch["input_ids"], use_cache=True).past_key_values
    with pytest.raises(UserError, match="block 0 has gates for 3 sequences but sees 2") as e:
        adapted(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    assert "\n" not in str(e.value)
