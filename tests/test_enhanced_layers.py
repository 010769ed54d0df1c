"""An enhanced layer together with other papers: a second prompt, an adapter of its own kind, left-out layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.evaluate.qa import METRICS
from graftwork.expect import parse
from graftwork.generate import Decoding, Prompt, decode
from graftwork.plugins import Plugins
from graftwork.recipe import Job, load
from graftwork.run import Run
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_sparta import SpartaConfig
from peft import get_peft_model

TOKENIZER = tiny_tokenizer()
PAIRS = [Prompt("The sky is green. Sky?", "Sky?"), Prompt("Rome lies in France. Where is Rome?", "Rome?")]
STRONG = {"cale": {"layer": 4, "strength": 1.7}}
NEUTRAL = {"cale": {"layer": 4, "strength": 1.0}}
FOLDER = Path(__file__).parents[1] / "recipes/decoding"


def lively() -> Any:
    return tiny_model(num_hidden_layers=6, initializer_range=0.3)


def written(model: Any, plugins: dict[str, Any], prompts: Any = PAIRS) -> list[list[int]]:
    settings = {"model": {"ref": "x"}, "data": {"source": "none"}, "plugins": plugins}
    run = Run(Path(), Job.model_validate(settings), Plugins.from_options(plugins))
    decoding = Decoding.from_plugins(run, model)
    return decode(model, prompts, tokenizer=TOKENIZER, decoding=decoding, max_new_tokens=8, do_sample=False)


def with_sparta() -> Any:
    torch.manual_seed(3)
    model = get_peft_model(
        lively(), SpartaConfig(rank_shared=2, rank_specific=4, block_layers=2, components=3)
    )
    for name, parameter in model.named_parameters():
        if "sparta_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("method", ["cad", "adacad", "coiecd"])
def test_a_second_prompt_and_an_enhanced_layer(method: str) -> None:
    model = lively()
    alone = written(model, {method: {}})
    assert written(model, {**NEUTRAL, method: {}}) == alone
    both = written(model, {**STRONG, method: {}})
    assert both == written(model, {method: {}, **STRONG})
    assert both not in (alone, written(model, STRONG))
    assert both == [written(model, {**STRONG, method: {}}, [one])[0] for one in PAIRS]
    assert not any(module._forward_hooks for module in model.modules())


def test_an_adapter_with_a_router_and_an_enhanced_layer() -> None:
    model = with_sparta()
    alone = written(model, {"sparta": {}})
    assert alone != written(lively(), {})
    assert written(model, {"sparta": {}, **NEUTRAL}) == alone
    both = written(model, {"sparta": {}, **STRONG})
    assert both not in (alone, written(lively(), STRONG))
    assert both == [written(model, {"sparta": {}, **STRONG}, [one])[0] for one in PAIRS]


def test_layers_that_are_left_out_cannot_be_enhanced() -> None:
    model = lively()
    shallow = {"d3": {"alpha": 0.8, "flex_start": 1, "tail": 3, "minimum": 4}}
    # Layer 4 of 6 is not among those that may be left out.
    both = written(model, {**STRONG, **shallow})
    assert both == written(model, {**shallow, **STRONG})
    assert written(model, {**NEUTRAL, **shallow}) == written(model, shallow)
    for plugins in (
        {"cale": {"layer": 2, "strength": 1.7}, **shallow},
        {**shallow, "cale": {"layer": 2, "strength": 1.7}},
    ):
        with pytest.raises(UserError, match=r"enhances \(as layer 2 of 1 to 6\) layer 1|both touch layer 1"):
            written(model, plugins)
    assert written(model, {**STRONG, **shallow}) == both


def test_the_claims_of_the_comparison_name_what_is_measured() -> None:
    recipe = load(FOLDER / "cale.yaml", size="small")
    assert [parse(text, recipe.arms, list(METRICS)).arm for text in recipe.expect][-1] == "cale-fixed"


def test_the_comparison_of_decoding_methods_runs(trainer: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "run"
    outcome = trainer("run", FOLDER / "cale.yaml", "--size", "smoke", "--output", output)
    assert outcome.code == 0, outcome.err
    jobs = json.loads((output / "results.json").read_text())["jobs"]
    assert [job["name"] for job in jobs][-1] == "cale-and-cad"
    assert all("f1" in job["metrics"] for job in jobs)
