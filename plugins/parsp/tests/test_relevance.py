"""Equation (1): against its definition, against switching neurons off, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork.train.statistics import answer_losses
from graftwork_parsp import find_mlps, relevance
from torch import nn

KINDS = ["llama", "mistral", "qwen2", "gpt2", "t5"]


def items(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """One item per batch, without its padding."""
    for n in range(len(batch["input_ids"])):
        size = int(batch["attention_mask"][n].sum())
        yield {key: value[n : n + 1, :size] for key, value in batch.items()}


def exact_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return each item's mean answer loss without leaving float64, which difference quotients need."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        logits = model(**inputs, labels=labels).logits
    else:
        logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return each.sum(1) / (labels != -100).sum(1)


def switched_off(
    model: nn.Module, out: str, j: int, batch: dict[str, torch.Tensor], to: float = 0.0
) -> torch.Tensor:
    """Return the items' losses with neuron j of the MLP with output ``out`` scaled by ``to``."""

    def hook(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        a = args[0].clone()
        a[..., j] *= to
        return (a,)

    handle = model.get_submodule(out).register_forward_pre_hook(hook)
    with torch.no_grad():
        losses = exact_losses(model, batch)
    handle.remove()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_derivative_with_respect_to_a_neurons_scale(kind: str, batch) -> None:
    """sum over tokens of a dL/da = dL/ds at s = 1 for a neuron scaled by s: by central differences, in float64."""
    model = tiny_model(kind, dtype=torch.float64)
    mlps = find_mlps(model)
    found = relevance(model, mlps, [batch], task="t", losses=exact_losses)
    h = 0.003
    for mlp in mlps:
        assert found[mlp.name].shape == (48,)
        for j in (0, 17, 47):
            slopes = [
                (switched_off(model, mlp.out, j, part, 1 + h) - switched_off(model, mlp.out, j, part, 1 - h))
                / (2 * h)
                for part in items(batch)
            ]
            expected = torch.cat(slopes).abs().mean().item()
            assert found[mlp.name][j].item() == pytest.approx(expected, rel=0.01)
    in_fp32 = relevance(model, mlps, [batch], task="t")
    for name, value in found.items():
        torch.testing.assert_close(in_fp32[name], value, rtol=1e-3, atol=1e-7)


def test_it_estimates_the_loss_change_when_a_neuron_is_off(batch) -> None:
    """|L(a_j = 0) - L| to second order: relative error below 5 % for activations scaled down."""
    model = tiny_model(dtype=torch.float64)
    mlp = find_mlps(model)[-1]
    with torch.no_grad():
        model.get_submodule(mlp.out).weight.mul_(0.05)
        model.get_submodule(mlp.out).weight[:, :4] *= 40
    found = relevance(model, [mlp], [batch], task="t")[mlp.name]
    plain = exact_losses(model, batch)
    for j in range(4):
        change = (switched_off(model, mlp.out, j, batch) - plain).abs().mean().item()
        assert change > 1e-5
        assert found[j].item() == pytest.approx(change, rel=0.05)


def test_a_neuron_that_nothing_reads_is_irrelevant(batch) -> None:
    model = tiny_model()
    mlps = find_mlps(model)
    with torch.no_grad():
        model.get_submodule(mlps[0].out).weight[:, 5] = 0
    found = relevance(model, mlps, [batch], task="t")[mlps[0].name]
    assert found[5] == 0
    assert (found[:5] > 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_neither_padding_nor_batch_size_matters(kind: str, batch) -> None:
    model = tiny_model(kind)
    mlps = find_mlps(model)
    together = relevance(model, mlps, [batch], task="t")
    single = relevance(model, mlps, list(items(batch)), task="t")
    padded = {}
    for key, value in batch.items():
        fill = -100 if key == "labels" else 0
        padded[key] = nn.functional.pad(value, (0, 7), value=fill)
    wide = relevance(model, mlps, [padded], task="t")
    for name, value in together.items():
        torch.testing.assert_close(single[name], value, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(wide[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("frozen", [True, False])
def test_it_leaves_no_trace(batch, frozen: bool) -> None:
    """Weights, gradients, modes, hooks and the random state stay; frozen weights do not matter."""
    model = tiny_model(attention_dropout=0.5).train().requires_grad_(not frozen)
    mlps = find_mlps(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first = relevance(model, mlps, [batch], task="t")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    again = relevance(model.requires_grad_(frozen), mlps, [batch], task="t")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_checkpointing_does_not_swallow_it(batch) -> None:
    model = tiny_model()
    mlps = find_mlps(model)
    expected = relevance(model, mlps, [batch], task="t")
    model.gradient_checkpointing_enable()
    found = relevance(model.train(), mlps, [batch], task="t")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_loss_without_gradient_names_task_and_layer(batch) -> None:
    model = tiny_model()
    mlps = find_mlps(model)
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(
        UserError, match=r"task 'news': the loss has no gradient at the neurons of 'model.layers.0.mlp'"
    ):
        relevance(model, mlps, [silent], task="news")

    def detached(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return answer_losses(model, batch)

    with pytest.raises(UserError, match="the model must not run without gradients"):
        relevance(model, mlps, [batch], task="news", losses=detached)
    with torch.no_grad():
        model.get_submodule(mlps[1].out).weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"task 'news': the relevance .* is not a finite number"):
        relevance(model, mlps, [batch], task="news")
