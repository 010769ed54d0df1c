"""The recursive cross-entropy in training: what is added is its definition, on the labelled tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint, tiny_model
from graftwork.testing.runs import run_tiny, tiny_recipe
from graftwork_bdq.term import RceTerm

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


def logged(folder: Path, **options: Any) -> list[dict[str, float]]:
    model, data = folder / "model", folder / "data"
    if not model.exists():
        tiny_checkpoint(model)
        tiny_stream(data, ["fruit"])
    output = folder / f"run-{len(list(folder.iterdir()))}"
    plugins = {"bdq": {"loss_term": True, **options}} if options.pop("on", True) else {}
    run_tiny(tiny_recipe(model, data, adapter=LORA, plugins=plugins), output)
    events = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    return [event for event in events if event["event"] == "log"]


@pytest.mark.parametrize("sign", ["symmetric", "printed"])
def test_the_term_is_the_definition(sign: str) -> None:
    model = tiny_model("llama").train()
    ids = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    term = RceTerm(model, 0.3, sign)  # type: ignore[arg-type]
    logits = model(input_ids=ids).logits
    found = term(model, {"labels": labels})
    kept = labels[:, 1:] != -100
    p = logits[:, :-1][kept].double().softmax(-1)
    q = torch.nn.functional.one_hot(labels[:, 1:][kept], 259).double()
    s = (p * (0.3 * p + 0.7 * q).log()).sum(-1).mean()
    torch.testing.assert_close(found.double(), -s if sign == "symmetric" else s, atol=1e-5, rtol=1e-5)
    ours, theirs = (
        torch.autograd.grad(loss, model.model.norm.weight, retain_graph=True)[0] for loss in (found, s)
    )
    torch.testing.assert_close(ours, -theirs if sign == "symmetric" else theirs, atol=1e-5, rtol=1e-3)
    term.close()
    assert not model.model._forward_hooks


def test_a_run_logs_it_and_learns_otherwise(tmp_path: Path) -> None:
    plain, ours = logged(tmp_path, on=False), logged(tmp_path)
    printed = logged(tmp_path, sign="printed")
    # Before the first step the weights are the same, so the loss is the plain one and the term.
    assert ours[0]["loss/rce"] > 0
    assert printed[0]["loss/rce"] == pytest.approx(-ours[0]["loss/rce"], rel=1e-4)
    assert ours[0]["loss"] == pytest.approx(plain[0]["loss"] + ours[0]["loss/rce"], rel=1e-3)
    assert ours[-1]["loss/rce"] < ours[0]["loss/rce"]


def test_in_training_it_must_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plugins\.bdq\.loss_term=true"):
        logged(tmp_path, loss_term=False)


def test_models_that_change_their_logits_are_refused() -> None:
    model = tiny_model("llama")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="needs logits that are the output embedding's own"):
        RceTerm.check(model)
    with pytest.raises(UserError, match="t5"):
        RceTerm.check(tiny_model("t5"))


def test_a_batch_without_labels_is_refused() -> None:
    model = tiny_model("llama").train()
    term = RceTerm(model, 0.5, "symmetric")
    with pytest.raises(UserError, match="labels for every position"):
        term(model, {})
