"""Whole jobs with the plugin: streams, options, limits, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.data.stream import build_stream
from graftwork.evaluate.answers import score_task
from graftwork.testing.models import tiny_checkpoint, tiny_model, tiny_tokenizer
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork_kernels.region_update import fold_rows
from graftwork_parsp import stream as stream_module
from graftwork_parsp.model import layers_of
from graftwork_parsp.options import ParspOptions
from graftwork_parsp.past import Past
from graftwork_parsp.plugin import Parsp
from peft import PeftModel
from safetensors.torch import load_file

OPTIONS = {"density": 0.25, "eps": 0.05}
ADAPTER = "adapter_model.safetensors"
TEXT = "A general text, about nothing in particular, that goes on for a while and then some more. "


def recipe_of(checkpoint: Path, stream: Path, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    settings.setdefault("train", {"max_steps": 3})
    settings.setdefault("evaluate", {"cells": "final", "max_new_tokens": 2})
    chosen = {**OPTIONS, **(options or {})}
    if chosen.get("null_space") is False:
        del chosen["eps"]
    plugins = {"parsp": chosen}
    return tiny_recipe(checkpoint, stream, plugins=plugins, **{"seed": 1, **settings})


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def past_of(directory: Path, task: int = -1) -> Past:
    stages = sorted((directory / "stages").iterdir())
    return Past.from_tensors(load_file(stages[task] / "plugins/parsp.safetensors"))


@pytest.fixture
def run(checkpoint: Path, stream: Path, tmp_path: Path) -> Callable[..., Path]:
    """``run(options, **settings)`` trains the two tasks and returns the run's directory."""
    count = 0

    def call(options: dict[str, Any] | None = None, model: Path = checkpoint, **settings: Any) -> Path:
        nonlocal count
        count += 1
        directory = tmp_path / f"run-{count}"
        run_tiny(recipe_of(model, stream, options, **settings), directory)
        return directory

    return call


# ---------------------------------------------------------------- a stream


def test_a_stream_learns_folds_and_remembers(
    run: Callable[..., Path], checkpoint: Path, stream: Path, batch: Any
) -> None:
    directory = run(train={"max_steps": 6}, evaluate={"cells": "all", "max_new_tokens": 8})
    result = json.loads((directory / "result.json").read_text())
    assert result["trainable_parameters"] == 2 * 2 * 12 * 32
    first, second = past_of(directory, 0), past_of(directory, 1)
    assert (first.names, second.names) == (["fruit"], ["fruit", "metal"])
    for name, moment in first.full.items():
        assert torch.equal(second.shares[0][name], first.shares[0][name])
        assert second.shares[1][name].sum().item() == pytest.approx(1, abs=1e-5)
        # Every token has a mean square of 1 after the norm.
        assert torch.trace(moment).item() == pytest.approx(32, rel=0.02)
        assert torch.trace(second.full[name]).item() == pytest.approx(64, rel=0.02)
        core = second.cores[1][name].long()
        best = second.shares[1][name].argsort(descending=True)[:12]
        assert core.tolist() == sorted(best.tolist())

    # What was exported: the union of the cores, nothing that still trains.
    saved = load_file(directory / "adapter" / ADAPTER)
    used = {name: torch.cat([cores[name] for cores in second.cores]).unique() for name in first.full}
    for key, rows in saved.items():
        if key.endswith("parsp_rows"):
            assert torch.equal(rows, used[key.removeprefix("base_model.model.").rsplit(".", 2)[0]])
        elif key.endswith(("parsp_theta", "parsp_core", "parsp_basis")):
            assert rows.numel() == 0
    loaded = PeftModel.from_pretrained(tiny_model(), directory / "adapter").eval()
    assert not torch.allclose(loaded(**batch).logits, tiny_model()(**batch).logits, atol=1e-3)
    tokenizer = tiny_tokenizer()
    data = recipe_of(checkpoint, stream).jobs[0].job.data
    for column, task in enumerate(build_stream(data, seed=1, tokenizer=tokenizer)):
        assert score_task(loaded, tokenizer, task).accuracy == result["scores"][-1][column]

    # What the second task added lies where the first one's inputs hardly are: tr(dW K dW^T) <= |Theta|^2 e_{k+1}.
    # |Theta P| <= |Theta|, so with the change itself: mean |dW x|^2 <= |dW|^2 e_{k+1}.
    folders = sorted((directory / "stages").iterdir())
    before, after = (
        layers_of(PeftModel.from_pretrained(tiny_model(), folder / "model")) for folder in folders
    )
    for key, layer in after.items():
        change = (layer.get_delta_weight("default") - before[key].get_delta_weight("default")).double()
        moment = first.full[key.rpartition(".")[0]].double()
        energies = torch.linalg.eigvalsh(moment).flip(0)
        k = first.taken[0][key.rpartition(".")[0]]
        assert energies[k:].sum() <= 0.05 * energies.sum()
        seen = torch.trace(change @ moment @ change.T)
        assert change.norm() > 1e-3
        assert seen <= change.square().sum() * energies[k] * (1 + 1e-3)


def test_the_capacity_report(run: Callable[..., Path]) -> None:
    directory = run()
    past = past_of(directory)
    one, two = events(directory, "capacity")
    assert (one["task"], two["task"]) == ("fruit", "metal")
    assert one["used"] == pytest.approx(0.25)
    assert one["overlap"] == one["entropy"] == one["generalist"] == 0
    assert one["kept"] == pytest.approx(1, abs=1e-6)
    assert 0 < two["kept"] < 1
    assert two["directions"] == pytest.approx(sum(past.taken[1].values()) / 64)
    assert two["free"] == pytest.approx(1 - two["directions"])
    assert two["state_bytes"] == past.nbytes
    union = [len(torch.cat([cores[name] for cores in past.cores]).unique()) / 48 for name in past.full]
    assert [layer["used"] for layer in two["layers"]] == pytest.approx(union)
    both = [2 * 12 / 48 - share for share in union]
    assert [layer["overlap"] for layer in two["layers"]] == pytest.approx([share * 4 for share in both])
    charts = json.loads((directory / "result.json").read_text())["charts"]
    assert [chart["title"] for chart in charts] == ["neurons", "input directions"]
    assert list(charts[0]["parts"]) == ["fruit", "metal"]
    total = [sum(values) for values in zip(*charts[0]["parts"].values(), strict=True)]
    assert total == pytest.approx(union)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("mode", ["adapter", "gradient"])
def test_other_decoders(kind: str, mode: str, run: Callable[..., Path], tmp_path: Path) -> None:
    directory = run({"mode": mode}, tiny_checkpoint(tmp_path / "model", kind))
    assert len(losses(directory)) == 6
    assert len(past_of(directory).full) == 2
    assert events(directory, "capacity")[1]["directions"] > 0


def test_an_encoder_decoder(run: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "t5")
    directory = run({"eps": 0.2}, model, algorithm="seq2seq", train={"max_steps": 3, "num_train_epochs": 1})
    past = past_of(directory)
    assert len(past.full) == 4
    adapter = load_file(directory / "adapter" / ADAPTER)
    assert sum(key.endswith("parsp_delta") for key in adapter) == 4
    assert all(value.abs().sum() > 0 for key, value in adapter.items() if key.endswith("parsp_delta"))
    config = json.loads((directory / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"


# ---------------------------------------------------------------- options


@pytest.fixture(scope="module")
def size_of(checkpoint: Path, stream: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """``size_of(options)`` trains the two tasks and returns how far the weights went; each setting once."""
    done: dict[str, float] = {}
    folder = tmp_path_factory.mktemp("arms")
    text = folder / "text.txt"
    text.write_text(TEXT * 10)

    def call(options: dict[str, Any]) -> float:
        key = json.dumps(options)
        if key not in done:
            if "calibration" in options:
                options = {**options, "calibration": str(text)}
            directory = folder / str(len(done))
            run_tiny(recipe_of(checkpoint, stream, options, train={"max_steps": 2}), directory)
            gradient = options.get("mode") == "gradient"
            file = "model/model.safetensors" if gradient else f"adapter/{ADAPTER}"
            weights = load_file(directory / file)
            start = tiny_model().state_dict()
            changes = [
                value.double() - (start[name].double() if gradient else 0)
                for name, value in weights.items()
                if gradient or name.endswith("parsp_delta")
            ]
            assert all(torch.isfinite(change).all() for change in changes)
            done[key] = sum(change.square().sum().item() for change in changes)
        return done[key]

    return call


@pytest.mark.parametrize(
    ("options", "without"),
    [
        ({"density": 0.1}, {}),
        ({"eps": 0.5}, {}),
        ({"null_space": False}, {}),
        ({"select": "global"}, {}),
        ({"rows": "random"}, {}),
        ({"generalist": "freeze"}, {}),
        ({"generalist": "freeze", "h": 0.97}, {"generalist": "freeze"}),
        ({"form": "lora"}, {}),
        ({"form": "lora", "rank": 2}, {"form": "lora"}),
        ({"mode": "gradient"}, {}),
        ({"down": "columns"}, {}),
        ({"down": "columns", "sketch": 4}, {"down": "columns"}),
        ({"moments": "sketch"}, {}),
        ({"moments": "sketch", "sketch": 6}, {"moments": "sketch"}),
        ({"moment_items": 3}, {}),
        ({"relevance_items": 1}, {}),
        ({"calibration": "text"}, {}),
        ({"calibration": "text", "calibration_windows": 1}, {"calibration": "text"}),
        ({"budget": 0.27, "exhausted": "share"}, {}),
    ],
    ids=str,
)
def test_every_option_makes_a_difference(
    options: dict[str, Any], without: dict[str, Any], size_of: Callable[..., float]
) -> None:
    assert size_of(options) > 1e-4
    assert size_of(options) != size_of(without)


def test_full_weights_and_the_adapter_learn_the_same(run: Callable[..., Path]) -> None:
    """Without momentum and decay a projected gradient is the gradient of the parametrisation."""
    # Adam would divide element by element, before the projection here and after it there.
    train = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    adapter, gradient = (run({"mode": mode}, train=train) for mode in ("adapter", "gradient"))
    values = [[loss for _, _, loss in losses(directory)] for directory in (adapter, gradient)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    weights = load_file(gradient / "model/model.safetensors")
    before = tiny_model().state_dict()
    loaded = PeftModel.from_pretrained(tiny_model(), adapter / "adapter")
    for key, layer in layers_of(loaded).items():
        change = weights[f"{key}.weight"] - before[f"{key}.weight"]
        assert change.abs().sum() > 0
        torch.testing.assert_close(layer.get_delta_weight("default"), change, rtol=1e-2, atol=1e-6)
    others = set(before) - {f"{key}.weight" for key in layers_of(loaded)} - {"lm_head.weight"}
    assert all(torch.equal(weights[key], before[key]) for key in others)


def test_calibration_is_a_task_before_the_first(run: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    directory = run({"calibration": str(text)})
    past = past_of(directory, 0)
    assert past.names == ["calibration", "fruit"]
    assert past.cores[0] == {}
    assert events(directory, "capacity")[0]["entropy"] > 0
    first = json.loads((directory / "result.json").read_text())["charts"]
    assert list(first[1]["parts"]) == ["calibration", "fruit", "metal"]
    assert list(first[0]["parts"]) == ["fruit", "metal"]


def test_regions_only_protects_nothing(run: Callable[..., Path]) -> None:
    directory = run({"null_space": False})
    past = past_of(directory)
    assert past.full == {}
    assert [event["free"] for event in events(directory, "capacity")] == [1, 1]
    charts = json.loads((directory / "result.json").read_text())["charts"]
    assert [chart["title"] for chart in charts] == ["neurons"]


def test_eps_zero_after_a_task_that_fills_all_directions(run: Callable[..., Path]) -> None:
    """Nothing is left to learn; the run goes on, and says so."""
    directory = run({"eps": 0.0})
    first, second = (load_file(f / "model" / ADAPTER) for f in sorted((directory / "stages").iterdir()))
    taken = past_of(directory, 0).taken[0]
    assert all(k == 32 for k in taken.values())
    for key, value in second.items():
        if key.endswith("parsp_delta"):
            assert value[value.any(1)].equal(first[key][first[key].any(1)])
    texts = [event["text"] for event in events(directory, "warning")]
    assert any("0.0% of the input directions" in text and "raise plugins.parsp.eps" in text for text in texts)
    assert any("the null space leaves 0.0% of what was learned" in text for text in texts)


def test_accumulation_gives_the_same(run: Callable[..., Path]) -> None:
    settings = {"max_steps": 3, "adam_epsilon": 1e-5, "max_grad_norm": 0.01}
    whole = run(train={**settings, "per_device_train_batch_size": 4})
    halves = run(train={**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    assert [loss for *_, loss in losses(whole)] == pytest.approx(
        [loss for *_, loss in losses(halves)], rel=1e-5
    )
    one, two = (load_file(directory / "adapter" / ADAPTER) for directory in (whole, halves))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd"])
def test_packed_batches(strategy: str, run: Callable[..., Path]) -> None:
    directory = run(
        {"moment_items": 4},
        train={"max_steps": 2, "packing": True, "packing_strategy": strategy, "max_length": 64},
    )
    assert len(losses(directory)) == 4
    assert len(events(directory, "capacity")) == 2


def test_a_half_precision_base(run: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    directory = run(model=model)
    saved = load_file(directory / "adapter" / ADAPTER)
    assert all(value.dtype == torch.float32 for key, value in saved.items() if "delta" in key)
    bases = past_of(directory, 0).bases(0.05, torch.device("cpu"))
    folders = sorted((directory / "stages").iterdir())
    loaded = [layers_of(PeftModel.from_pretrained(tiny_model(), folder / "model")) for folder in folders]
    for key, layer in loaded[1].items():
        change = (
            layer.get_delta_weight("default").double() - loaded[0][key].get_delta_weight("default").double()
        )
        basis = bases[key.rpartition(".")[0]]
        assert 0 < basis.k < 32
        assert change.norm() > 1e-3
        kept = fold_rows(change, basis.matrix.double(), basis.complement)
        assert (change - kept).norm() < 1e-5 * change.norm()


def test_nothing_is_drawn_from_the_runs_random_state(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[torch.Tensor] = []
    for name in ("begin", "end"):
        original = getattr(stream_module.Stream, name)

        def spy(self: Any, *args: Any, original: Any = original) -> None:
            states.append(torch.random.get_rng_state())
            original(self, *args)
            states.append(torch.random.get_rng_state())

        monkeypatch.setattr(stream_module.Stream, name, spy)
    run({"form": "lora", "rows": "random"})
    assert len(states) == 8
    assert all(torch.equal(before, after) for before, after in zip(states[::2], states[1::2], strict=True))


# ---------------------------------------------------------------- refusals


def refused(checkpoint: Path, stream: Path, tmp_path: Path, options: Any = None, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        run_tiny(recipe_of(checkpoint, stream, options, **settings), tmp_path / "refused")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"density": 0}, "greater than 0"),
        ({"density": 1.1}, "less than or equal to 1"),
        ({"eps": 1}, "less than 1"),
        ({"eps": -0.1}, "greater than or equal to 0"),
        ({"nonsense": 1}, "nonsense"),
        ({"density": 0.01}, "of the 48 neurons of 'model.layers.0.mlp' is none; raise it to at least 0.021"),
        ({"budget": 0.1}, "budget = 0.1 must be at least density = 0.25"),
        ({"rank": 4}, "rank = 4 does nothing without form: lora"),
        ({"sketch": 4}, "sketch = 4 does nothing without moments: sketch or down: columns"),
        ({"null_space": False, "moments": "sketch"}, "moments = sketch does nothing without null_space: true"),
        ({"calibration_windows": 4}, "calibration_windows = 4 does nothing without a calibration text"),
        ({"mode": "gradient", "down": "columns"}, "down = columns does nothing without mode: adapter"),
        ({"calibration": "text.txt"}, "'text.txt' is a relative path; name a text file by its absolute path"),
        ({"calibration": "/nowhere/text.txt"}, "does not exist"),
        ({"neurons": {"in": ["w1"], "out": "w2"}}, "finds 0 MLPs in LlamaForCausalLM, which has 2 layers"),
        ({"state_limit_mib": 0.001}, "MiB of statistics for 2 tasks.*set plugins.parsp.moments: sketch"),
    ],
)  # fmt: skip
def test_bad_options(options: Any, says: str, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    assert re.search(says, refused(checkpoint, stream, tmp_path, options))
    assert not (tmp_path / "refused").exists()


def test_a_limit_on_statistics_is_kept_before_weights_are_read(
    checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    order = {"data_options": {"order": ["metal", "fruit"]}}
    says = refused(checkpoint, stream, tmp_path, {"state_limit_mib": 0.001}, **order)
    assert "statistics for 2 tasks" in says
    assert not (tmp_path / "refused").exists()
    # 2 layers of 32 x 32, and of 2 tasks x 48 neurons
    run_tiny(recipe_of(checkpoint, stream, {"state_limit_mib": 0.012}, **order), tmp_path / "fits")
    state = sorted((tmp_path / "fits/stages").iterdir())[-1] / "plugins/parsp.safetensors"
    assert sum(v.numel() * v.element_size() for v in load_file(state).values()) < 0.012 * 2**20


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({"algorithm": "dpo"}, {}, "algorithm: dpo does not have; use algorithm: sft"),
        ({"train": {"fsdp": True}}, {}, "does not declare that it can be trained under FSDP2"),
        ({"train": {"deepspeed": {"zero_optimization": {"stage": 3}}}}, {}, "under ZeRO stage 3"),
        ({"train": {"deepspeed": {"zero_optimization": {"stage": 2}}}}, {"mode": "gradient"}, "not declare"),
        ({"adapter": {"peft_type": "LORA"}}, {}, "brings a whole-model adapter"),
        ({"adapter": {"peft_type": "LORA"}}, {"mode": "gradient"}, "remove 'adapter' from the recipe"),
    ],
)
def test_settings_that_do_not_go_together(
    settings: Any, options: Any, says: str, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    assert says in refused(checkpoint, stream, tmp_path, options, **settings)
    assert not (tmp_path / "refused").exists()


def test_an_exhausted_budget_stops_with_layer_and_task(
    checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    says = refused(checkpoint, stream, tmp_path, {"budget": 0.25, "rows": "random"})
    assert says.startswith("task 'metal' needs ")
    assert "new neurons in 'model.layers.0.mlp', and plugins.parsp.budget = 0.25 leaves 0" in says


def test_few_tokens_are_warned_about(run: Callable[..., Path]) -> None:
    directory = run({"moment_items": 2})
    texts = [event["text"] for event in events(directory, "warning") if event["task"] == "fruit"]
    assert any(
        "tokens for the second moments of 32 inputs are few; 4 per input are advised" in t for t in texts
    )
    assert not any("are few" in event["text"] for event in events(run(), "warning"))


def test_fewer_tokens_than_inputs_are_refused_before_training(stream: Path, tmp_path: Path) -> None:
    wide = tiny_checkpoint(tmp_path / "wide", hidden_size=64)
    says = refused(wide, stream, tmp_path, {"moment_items": 1})
    assert re.match(
        r"task 'fruit' has \d\d tokens for the second moments of 64 inputs, and with fewer tokens", says
    )
    assert not (tmp_path / "refused/metrics.jsonl").exists() or not losses(tmp_path / "refused")


def test_moments_that_are_no_numbers_name_layer_and_task(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stream_module.fold

    def broken(model: torch.nn.Module) -> None:
        original(model)
        layers_of(model)["model.layers.0.mlp.gate_proj"].parsp_delta["default"][0] = float("nan")

    monkeypatch.setattr(stream_module, "fold", broken)
    says = refused(checkpoint, stream, tmp_path)
    assert says.startswith("task 'fruit': the inputs of layer 'model.layers.1.mlp' are not finite")


def test_a_sketch_that_is_too_small_is_told(run: Callable[..., Path]) -> None:
    directory = run({"moments": "sketch", "sketch": 2, "eps": 0.01})
    texts = [event["text"] for event in events(directory, "warning") if event["task"] == "metal"]
    assert any("the sketch of 2 rows is too small to protect all but eps = 0.01" in text for text in texts)


def test_state_of_no_task_is_no_state() -> None:
    plugin = Parsp(ParspOptions())
    assert plugin.save_state(None) is None
    plugin.load_state(None, {})
    assert plugin.stream.past is None
    assert plugin.charts(None) == []
