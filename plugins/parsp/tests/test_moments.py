"""Equation (3): what is collected, from which tensor, over which tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork_parsp import find_mlps
from graftwork_parsp.moments import collect
from graftwork_parsp.past import Past, estimate_bytes, fingerprint
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

KINDS = ["llama", "mistral", "qwen2", "gpt2", "t5", "opt"]


def build(kind: str) -> nn.Module:
    if kind != "opt":
        return tiny_model(kind)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt", hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        vocab_size=259, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def seen_by(model: nn.Module, key: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what module ``key`` reads on each item alone, without padding (tokens x d), in float64."""
    rows: list[torch.Tensor] = []
    handle = model.get_submodule(key).register_forward_pre_hook(
        lambda module, args: rows.append(args[0].detach().flatten(0, -2).double())
    )
    for n in range(len(batch["input_ids"])):
        size = int(batch["attention_mask"][n].sum())
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"][n : n + 1, :size]}
        if model.config.is_encoder_decoder:
            answer = batch["labels"][n]
            inputs["labels"] = answer[answer != -100][None]
        with torch.no_grad():
            model(**inputs)
    handle.remove()
    return torch.cat(rows)


@pytest.fixture
def answers(batch) -> dict[str, torch.Tensor]:
    """The batch, with answers at the front of the labels as encoder-decoders have them."""
    labels = torch.full_like(batch["labels"], -100)
    for row, source in zip(labels, batch["labels"], strict=True):
        answer = source[source != -100]
        row[: len(answer)] = answer
    return {**batch, "labels": labels}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["full", "sketch"])
def test_moments_are_those_of_the_tokens_without_padding(kind: str, form: str, answers) -> None:
    model = build(kind)
    mlps = find_mlps(model)
    halves = [{key: value[part] for key, value in answers.items()} for part in (slice(0, 1), slice(1, 3))]
    found = collect(model, mlps, halves, moments=form, columns=True, size=64)
    for mlp in mlps:
        x = seen_by(model, mlp.ins[-1], answers)
        expected = x.T @ x / len(x)
        if form == "full":
            got = found.full[mlp.name].double()
            assert found.full[mlp.name].dtype == torch.float32
        else:
            rows = found.sketch[mlp.name].rows.double()
            got = rows.T @ rows
            torch.testing.assert_close(
                found.sketch[mlp.name].energy.double(), expected.diagonal(), rtol=1e-4, atol=1e-6
            )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got, got.T)
        assert torch.linalg.eigvalsh(got)[0] >= -1e-6 * torch.trace(got)
        a = seen_by(model, mlp.out, answers)
        rows = found.columns[mlp.name].rows.double()
        torch.testing.assert_close(rows.T @ rows, a.T @ a / len(a), rtol=1e-4, atol=1e-5)


def test_two_kinds_of_padding_and_two_halves(batch) -> None:
    model = tiny_model()
    mlps = find_mlps(model)

    def moments(*batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return collect(model, mlps, batches).full

    whole = moments(batch)
    wide = {k: nn.functional.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    first, second = ({k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 3)))
    parts = moments(first, second)
    one, two = moments(first), moments(second)
    for name, value in whole.items():
        torch.testing.assert_close(moments(wide)[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)
        # 24 and 10 tokens.
        torch.testing.assert_close((24 * one[name] + 10 * two[name]) / 34, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["full", "sketch"])
def test_nothing_behind_the_last_input_is_computed_and_the_bits_stay(batch, form: str) -> None:
    """With columns every pass reaches the last output projection; the inputs' moments are the same bits."""
    model = tiny_model()
    mlps = find_mlps(model)
    calls: list[int] = []
    model.get_submodule(mlps[-1].out).register_forward_pre_hook(lambda *_: calls.append(1))
    rows = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(3)]
    short = collect(model, mlps, rows, moments=form, size=6)
    assert len(calls) == 1
    long = collect(model, mlps, rows, moments=form, size=6, columns=True)
    assert len(calls) == 1 + 3
    for mlp in mlps:
        if form == "full":
            assert torch.equal(short.full[mlp.name], long.full[mlp.name])
        else:
            assert torch.equal(short.sketch[mlp.name].rows, long.sketch[mlp.name].rows)
            assert torch.equal(short.sketch[mlp.name].energy, long.sketch[mlp.name].energy)


def test_the_input_is_that_after_the_norm() -> None:
    """RMSNorm makes every token's mean square 1 (times the norm's own weight, which is 1 here)."""
    model = tiny_model()
    mlps = find_mlps(model)
    batch = {"input_ids": torch.arange(3, 40)[None], "attention_mask": torch.ones(1, 37).long()}
    for value in collect(model, mlps, [batch]).full.values():
        assert torch.trace(value).item() == pytest.approx(32, rel=1e-2)


def test_projections_that_read_different_tensors_are_refused(batch) -> None:
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x.clone()))
    with pytest.raises(UserError, match=r"input projections of 'model.layers.0.mlp' read different tensors"):
        collect(model, find_mlps(model), [batch])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("form", ["full", "sketch"])
def test_what_is_no_number_names_the_layer(batch, form: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"layer 'model.layers.1.mlp' are not finite"):
        collect(model, find_mlps(model), [batch], moments=form)


# ---------------------------------------------------------------- what is kept


def a_past(batch, columns: bool = True, form: str = "sketch") -> tuple[Past, list[Any]]:
    model = tiny_model()
    mlps = find_mlps(model)
    past = Past(fingerprint(model, mlps))
    for n, name in enumerate(["first", "zweite-ü"]):
        found = collect(
            model, mlps, [{k: v[n : n + 2] for k, v in batch.items()}], moments=form, columns=columns, size=6
        )
        shares = {mlp.name: torch.rand(48) for mlp in mlps}
        past.record(name, shares, {mlp.name: torch.tensor([n, 7]) for mlp in mlps}, found)
        past.taken.append({name: basis.k for name, basis in past.bases(0.1, torch.device("cpu")).items()})
    return past, mlps


@pytest.mark.parametrize("form", ["full", "sketch"])
def test_state_comes_back_as_it_was(batch, form: str) -> None:
    past, mlps = a_past(batch, form=form)
    state = {key: value.clone() for key, value in past.tensors().items()}
    again = Past.from_tensors(state)
    assert again.names == ["first", "zweite-ü"]
    assert again.taken == past.taken
    assert {name: used.nonzero().flatten().tolist() for name, used in again.used(mlps).items()} == {
        mlp.name: [0, 1, 7] for mlp in mlps
    }
    after = again.tensors()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    cores = {mlp.name: torch.arange(4) for mlp in mlps}
    for bases in (
        [p.bases(0.1, torch.device("cpu")) for p in (past, again)],
        [p.column_bases(0.1, cores) for p in (past, again)],
    ):
        assert all(torch.equal(bases[0][name].matrix, bases[1][name].matrix) for name in bases[0])
    assert again.short == past.short


def test_moments_of_tasks_add_up_with_equal_weight(batch) -> None:
    past, mlps = a_past(batch, form="full", columns=False)
    model = tiny_model()
    both = [collect(model, mlps, [{k: v[n : n + 2] for k, v in batch.items()}]).full for n in range(2)]
    for mlp in mlps:
        torch.testing.assert_close(past.full[mlp.name], both[0][mlp.name] + both[1][mlp.name])


@pytest.mark.parametrize("form", ["full", "sketch"])
@pytest.mark.parametrize("columns", [True, False])
def test_the_estimate_is_what_it_takes(batch, form: str, columns: bool) -> None:
    past, mlps = a_past(batch, form=form, columns=columns)
    estimate = estimate_bytes(mlps, 2, moments=form, columns=columns, size=6, density=2 / 48)
    # All but names and fingerprint.
    assert 0 <= past.nbytes - estimate < 100


def test_another_base_has_another_fingerprint() -> None:
    model = tiny_model()
    mlps = find_mlps(model)
    own = fingerprint(model, mlps)
    assert own.dtype == torch.uint8
    assert len(own) == 32
    assert torch.equal(own, fingerprint(tiny_model(), mlps))
    assert not torch.equal(own, fingerprint(tiny_model(seed=1), mlps))
    assert not torch.equal(own, fingerprint(tiny_model(dtype=torch.bfloat16), mlps))
    with pytest.raises(UserError, match="belong to another base model"):
        Past(own).check_base(fingerprint(tiny_model(seed=1), mlps))
