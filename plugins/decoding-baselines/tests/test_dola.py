"""DoLa on hooks: logits of earlier layers are right, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.generate import Decoding, Prompt, decode
from graftwork.generate.patches import touching_layers
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_decoding_baselines.dola import Dola, DolaOptions, dola_scores
from graftwork_decoding_baselines.early_logits import EarlyLogits
from peft import LoraConfig, get_peft_model

TOKENIZER = tiny_tokenizer()
KINDS = ["llama", "qwen2", "mistral", "gpt2"]
LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer"}


def deep(kind: str = "llama", **changes: Any) -> Any:
    return tiny_model(kind, **{LAYERS.get(kind, "num_hidden_layers"): 4, **changes})


def using(model: Any, **options: Any) -> Decoding:
    plugin = Dola(DolaOptions(**options))
    return Decoding(contexts=lambda: [plugin.generation_context(run=None, model=model)])  # type: ignore[arg-type]


def hooks(model: torch.nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_early_logits_are_norm_and_head_of_the_hidden_states(kind: str) -> None:
    model = deep(kind, dtype=torch.float64)
    ids = torch.tensor([TOKENIZER("hello there")["input_ids"]])
    plain = model(ids, output_hidden_states=True)
    decoder = model.get_decoder()
    norm = decoder.ln_f if kind == "gpt2" else decoder.norm
    wanted = torch.stack([model.get_output_embeddings()(norm(plain.hidden_states[k]))[0] for k in range(4)])
    seen: list[torch.Tensor] = []

    def note(last: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
        seen.extend((last, early))
        return last

    with EarlyLogits(model).replacing([0, 1, 2, 3], note), torch.no_grad():
        model(ids)
    torch.testing.assert_close(seen[0], plain.logits[0].float())
    torch.testing.assert_close(seen[1], wanted.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_recomputation_without_cache(kind: str) -> None:
    model = deep(kind)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    ids = TOKENIZER("hello there")["input_ids"]
    found = decode(
        model,
        [Prompt("hello there")],
        tokenizer=TOKENIZER,
        decoding=using(model, layers=[1, 2]),
        max_new_tokens=6,
        do_sample=False,
    )[0]
    decoder = model.get_decoder()
    norm = decoder.ln_f if kind == "gpt2" else decoder.norm
    for step, token in enumerate(found):
        with torch.no_grad():
            output = model(torch.tensor([ids + found[:step]]), output_hidden_states=True)
            early = [model.get_output_embeddings()(norm(output.hidden_states[k][:, -1])) for k in (1, 2)]
        scores, _ = dola_scores(output.logits[:, -1].float(), torch.stack(early).float())
        assert int(scores.argmax()) == token


def test_a_penalty_acts_on_the_scores() -> None:
    model = deep()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    ids = torch.tensor([TOKENIZER("hello")["input_ids"]])
    plugin = Dola(DolaOptions())
    with plugin.generation_context(run=None, model=model):  # type: ignore[arg-type]
        output = model.generate(ids, repetition_penalty=1.2, output_scores=True, **options)
    raw, penalised = output.logits[0][0], output.scores[0][0]
    assert (raw == -torch.inf).any()
    seen = torch.zeros_like(raw, dtype=torch.bool)
    seen[ids[0]] = True
    assert torch.equal(raw[~seen], penalised[~seen])
    expected = torch.where(raw < 0, raw * 1.2, raw / 1.2)
    torch.testing.assert_close(penalised[seen], expected[seen])


def test_beams_choose_per_beam() -> None:
    model = deep()
    found = decode(
        model,
        [Prompt("hello"), Prompt("a longer one")],
        tokenizer=TOKENIZER,
        decoding=using(model),
        max_new_tokens=4,
        num_beams=3,
    )
    assert all(len(row) == 4 for row in found)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "adapter"])
def test_nothing_is_left_behind(wrapped: bool) -> None:
    model: Any = deep()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    before = hooks(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(ids).logits
        with pytest.raises(ZeroDivisionError), EarlyLogits(model).replacing([1], lambda *_: 1 / 0):
            model(ids)
        assert hooks(model) == before
        assert torch.equal(model(ids).logits, plain)


def test_models_whose_parts_cannot_be_told() -> None:
    with pytest.raises(UserError, match="earlier layers can be contrasted in decoder-only models; t5"):
        EarlyLogits(tiny_model("t5"))
    model = deep()
    model.model.norm = torch.nn.Sequential(model.model.norm)
    model.model.norm_2 = model.model.norm
    model.model.final_norm = torch.nn.Identity()
    with pytest.raises(UserError, match="cannot be told"):
        EarlyLogits(model)


def test_logits_that_are_changed_after_the_head() -> None:
    model = deep()
    head, ids = model.forward, torch.tensor([[5, 6, 7]])

    def scaled(*given: Any, **named: Any) -> Any:
        output = head(*given, **named)
        output.logits = output.logits * 30 + 1
        return output

    model.forward = scaled
    with (
        torch.no_grad(),
        EarlyLogits(model).replacing([1], lambda last, early: last),
        pytest.raises(UserError, match="changes its logits after the head"),
    ):
        model(ids)


def test_a_layer_that_may_not_run_cannot_be_read() -> None:
    model = deep()
    with touching_layers(model, "other", "leaves out", [1]):
        with EarlyLogits(model).replacing([1, 3], lambda last, early: last):
            pass
        with (
            pytest.raises(UserError, match="'other' leaves out layer 1 and 'dola' reads layers 1, 3"),
            EarlyLogits(model).replacing([2], lambda last, early: last),
        ):
            pass


def test_two_ways_to_contrast_and_likelihoods_are_refused() -> None:
    from graftwork.plugins import Plugins
    from graftwork.testing.runs import tiny_recipe

    for plugins, settings, problem in (
        ({"dola": {}, "cad": {}}, {}, "'dola' contrasts layers and 'cad' prompts"),
        ({"dola": {}}, {"evaluate": {"scoring": "likelihood"}}, "labels have no likelihood"),
    ):
        job = tiny_recipe("tiny-random", "nowhere", plugins=plugins, **settings).jobs[0].job
        objects = Plugins.from_options(job.plugins)
        run = type("Run", (), {"job": job, "plugins": objects})()
        with pytest.raises(UserError, match=problem):
            objects.call("check", run=run)
