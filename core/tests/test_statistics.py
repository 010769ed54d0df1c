"""Statistics of a task: the fixed order of its batches, second moments and losses against plain references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork import UserError
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.train.algorithms import algorithm, build_arguments
from graftwork.train.statistics import answer_losses, attended, second_moments, task_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F


def a_trainer(folder: Path, items: int = 7) -> Any:
    rows = [
        {"prompt": "a" * (1 + index), "completion": " " + "xy" * (1 + index % 3)} for index in range(items)
    ]
    chosen = algorithm("sft")
    return chosen.trainer(
        model=tiny_model(),
        args=build_arguments(chosen.config, {}, output_dir=str(folder), seed=0),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def a_batch(rows: list[int], width: int, left: bool) -> dict[str, torch.Tensor]:
    """Return rows of the given lengths, padded on one side; the first two tokens of each are the prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(rows):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place] = torch.randint(3, 250, (length,), generator=generator)
        mask[row, place] = 1
        labels[row, place] = ids[row, place]
        labels[row, place.start : place.start + 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_batches_come_in_the_order_of_the_data_and_each_item_once(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    seen = [ids for batch in task_batches(trainer, batch_size=3) for ids in batch["input_ids"]]
    expected = [row["input_ids"] for row in trainer.train_dataset]
    assert [
        [i for i in ids.tolist() if i][: len(e)] for ids, e in zip(seen, expected, strict=True)
    ] == expected
    assert sum(len(batch["input_ids"]) for batch in task_batches(trainer, items=5, batch_size=2)) == 5
    twice = [[batch["labels"] for batch in task_batches(trainer, batch_size=3)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_the_random_state_is_left_alone(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    before = torch.random.get_rng_state()
    second_moments(trainer.model, {"a": trainer.model.model.layers[0].mlp.gate_proj}, task_batches(trainer))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_moments_are_those_of_the_tokens_that_are_no_padding(kind: str) -> None:
    """Against a loop over single unpadded rows, in float64; two paddings give the same."""
    model = tiny_model(kind, dtype=torch.float64).train()
    module = model.get_submodule(
        "model.layers.1.mlp.gate_proj" if kind == "llama" else "transformer.h.1.mlp.c_fc"
    )
    lengths = [5, 9, 3]
    right = a_batch(lengths, 9, left=False)
    reference, inputs = torch.zeros(32, 32, dtype=torch.float64), []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()
        for row, length in enumerate(lengths):
            model(input_ids=right["input_ids"][row : row + 1, :length])
    handle.remove()
    for x in inputs:
        for token in x[0]:
            reference += torch.outer(token, token)
    model.train()
    moment = second_moments(model, {"m": module}, [right], dtype=torch.float64)["m"]
    assert model.training
    assert moment.tokens == sum(lengths)
    torch.testing.assert_close(moment.matrix, reference, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moment.mean, reference / sum(lengths), rtol=1e-10, atol=1e-12)
    wider = {key: F.pad(value, (0, 4), value=-100 if key == "labels" else 0) for key, value in right.items()}
    other = second_moments(model, {"m": module}, [wider], dtype=torch.float64)["m"]
    torch.testing.assert_close(other.matrix, reference, rtol=1e-10, atol=1e-12)
    assert other.tokens == moment.tokens


def count_calls(module: torch.nn.Module, calls: list[int]) -> None:
    module.register_forward_pre_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_passes_that_end_early_give_the_bits_of_whole_ones(kind: str) -> None:
    """What stands behind the last layer that is watched runs in the first pass only."""
    model = tiny_model(kind)
    key, behind = {
        "llama": ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
        "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
        "t5": ("decoder.block.1.layer.2.DenseReluDense.wi", "decoder.block.1.layer.2.DenseReluDense.wo"),
    }[kind]
    first = key.replace(".1.", ".0.", 1)
    modules = {name: model.get_submodule(name) for name in (first, key)}
    batches = [a_batch([5, 9 - n, 3], 9 - n, left=False) for n in range(4)]
    calls: list[int] = []
    count_calls(model.get_submodule(behind), calls)
    found = second_moments(model, modules, batches)
    assert len(calls) == 1
    # The output head is the last of all, so these passes are whole.
    whole = second_moments(model, modules, batches, also=[model.get_output_embeddings()])
    assert len(calls) == 1 + 4
    for name in modules:
        assert found[name].tokens == whole[name].tokens
        assert torch.equal(found[name].matrix, whole[name].matrix)
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name != behind)


def test_a_layer_that_is_called_twice_is_seen_twice_in_every_pass() -> None:
    model = tiny_model(dtype=torch.float64)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    module = model.model.layers[0].mlp.gate_proj
    batches = [a_batch([5, 9 - n], 9 - n, left=False) for n in range(3)]
    inputs: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    masks = [batch["attention_mask"].bool() for batch in batches for _ in range(2)]
    rows = torch.cat([x[mask] for x, mask in zip(inputs, masks, strict=True)])
    moment = second_moments(model, {"m": module}, batches, dtype=torch.float64)["m"]
    assert moment.tokens == len(rows)
    torch.testing.assert_close(moment.matrix, rows.T @ rows, rtol=1e-10, atol=1e-12)


def test_a_layer_that_some_passes_leave_out_is_seen_in_all_others() -> None:
    """As experts are; the watched layers change their order too."""
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    order: list[list[torch.nn.Module]] = [
        [mlp.gate_proj], [mlp.up_proj, mlp.gate_proj], [mlp.up_proj], [mlp.gate_proj, mlp.up_proj], [],
    ]  # fmt: skip
    experts = iter(order)
    mlp.forward = lambda x: sum((mlp.down_proj(expert(x)) for expert in next(experts)), x)
    modules = {"gate": mlp.gate_proj, "up": mlp.up_proj, "first": model.model.layers[0].mlp.gate_proj}
    found = second_moments(model, modules, [a_batch([4 + n], 9, left=False) for n in range(5)])
    assert {name: moment.tokens for name, moment in found.items()} == {
        "gate": 4 + 5 + 7, "up": 5 + 6 + 7, "first": 4 + 5 + 6 + 7 + 8,
    }  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(3, 9), min_size=2, max_size=5), st.integers(1, 4))
def test_half_streams_add_up(lengths: list[int], cut: int) -> None:
    model = tiny_model(dtype=torch.float64)
    module = {"m": model.get_submodule("model.layers.0.mlp.gate_proj")}
    batch = a_batch(lengths, max(lengths), left=False)
    cut = min(cut, len(lengths) - 1)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(cut), slice(cut, None))]
    whole = second_moments(model, module, [batch], dtype=torch.float64)["m"]
    halves = [second_moments(model, module, [part], dtype=torch.float64)["m"] for part in parts]
    torch.testing.assert_close(sum(half.matrix for half in halves), whole.matrix, rtol=1e-9, atol=1e-12)
    assert sum(half.tokens for half in halves) == whole.tokens
    torch.testing.assert_close(whole.matrix, whole.matrix.T, rtol=1e-12, atol=1e-14)
    assert torch.linalg.eigvalsh(whole.matrix).min() >= -1e-8 * whole.matrix.trace()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_items_loss_is_its_own(reduction: str, left: bool) -> None:
    """By hand from single unpadded rows: the log-probability of each answer token."""
    model = tiny_model(dtype=torch.float64)
    lengths = [5, 9, 3, 2]
    batch = a_batch(lengths, 9, left=left)
    if left:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    losses = answer_losses(model, batch, reduction)
    for row, length in enumerate(lengths):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        logs = model(input_ids=ids[None]).logits[0].detach().log_softmax(-1)
        picked = [-logs[place - 1, ids[place]] for place in range(2, length)]
        expected = sum(picked) / (len(picked) if reduction == "mean" else 1) if picked else torch.tensor(0.0)
        # Losses are taken in fp32 whatever the model computes in.
        assert losses[row].item() == pytest.approx(float(expected), rel=1e-5, abs=1e-7)


def test_items_do_not_touch_each_other() -> None:
    model = tiny_model(dtype=torch.float64)
    batch = a_batch([5, 9], 9, left=False)
    embedded = model.get_input_embeddings().weight
    (whole,) = torch.autograd.grad(answer_losses(model, batch).sum(), embedded)
    parts = [
        torch.autograd.grad(
            answer_losses(model, {key: value[row : row + 1] for key, value in batch.items()}).sum(), embedded
        )[0]
        for row in range(2)
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-5, atol=1e-8)


def test_without_a_mask_everything_counts() -> None:
    assert attended({"input_ids": torch.zeros(2, 3)}).all()


def test_inputs_that_are_no_numbers_are_told_with_their_layer() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.inf
    batch = {"input_ids": torch.tensor([[5, 6]])}
    with pytest.raises(UserError, match="inputs of layer 'gate' are not finite") as caught:
        second_moments(model, {"gate": model.model.layers[0].mlp.gate_proj}, [batch])
    assert "\n" not in str(caught.value)


def test_no_data_is_told() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="no data to take second moments of"):
        second_moments(model, {"gate": model.model.layers[0].mlp.gate_proj}, [])
