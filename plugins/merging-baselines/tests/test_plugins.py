"""The plugins through the command line: one pass, resumed after a kill, refused with one sentence; retention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.cli import main
from graftwork.models import load_model
from graftwork.testing.data import tiny_stream
from graftwork.testing.experts import save_tiny, tensors_of, tiny_experts, tiny_lora_experts
from graftwork.testing.models import tiny_tokenizer
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import call_trainer, kill_when, run_tiny, tiny_recipe
from peft import PeftModel

Family = tuple[Path, dict[str, str]]


@pytest.fixture
def trainer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*words: object) -> tuple[int, str, str]:
        arguments = [str(word) for word in words]
        monkeypatch.setattr("sys.argv", ["trainer", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return call


def words(family: Family, output: Path, *plugins: str, **settings: Any) -> list[str]:
    base, refs = family
    sets = {**{f"transform.experts.{name}": ref for name, ref in refs.items()}, **settings}
    return [
        *("transform", f"--model={base}", f"--output={output}"),
        *(f"--plugin={plugin}" for plugin in plugins or ["ties"]),
        *(f"--set={key}={value}" for key, value in sets.items()),
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.parametrize(
    "plugin", ["average", "task-arithmetic", "ties", "dare", "consensus", "emr", "unmerged"]
)
def test_every_plugin_writes_a_model_that_loads(
    trainer: Any, family: Family, tmp_path: Path, plugin: str
) -> None:
    more = {"plugins.unmerged.weights": "base"} if plugin == "unmerged" else {}
    code, _, err = trainer(*words(family, tmp_path / "run", plugin, **more))
    assert code == 0, err
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert 0 < result["metrics"]["change_a"] < 1
    found = tensors_of(tmp_path / "run/model")
    changed = not torch.equal(found["model.norm.weight"], tensors_of(family[0])["model.norm.weight"])
    assert changed == (plugin != "unmerged")
    assert load_model(str(tmp_path / "run")).config.num_hidden_layers == 2
    assert (tmp_path / "run/beside/merged").is_dir() == (plugin == "emr")


@pytest.mark.parametrize("plugin", ["consensus", "emr", "one-bit", "unmerged"])
def test_the_model_for_one_expert(trainer: Any, family: Family, tmp_path: Path, plugin: str) -> None:
    code, _, err = trainer(*words(family, tmp_path / "run", plugin, **{f"plugins.{plugin}.expand": "b"}))
    assert code == 0, err
    found, own = tensors_of(tmp_path / "run/model"), tensors_of(Path(family[1]["b"]))
    base = tensors_of(family[0])
    name = "model.layers.0.mlp.up_proj.weight"
    delta, wanted = (found[name] - base[name]).flatten(), (own[name] - base[name]).flatten()
    assert torch.nn.functional.cosine_similarity(delta, wanted, dim=0) > 0.7


@pytest.mark.slow
def test_killed_merges_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    family = tiny_experts(tmp_path, ["a", "b"], num_hidden_layers=6)
    merge = {"transform.merge.rows": 4}
    done = call_trainer(words(family, tmp_path / "whole", "emr", **merge))
    assert done.returncode == 0, done.stderr
    cut = words(family, tmp_path / "cut", "emr", **merge)
    work = tmp_path / "cut/work"
    moments = [
        (tmp_path / "cut/manifest.json").exists,
        lambda: len(list(work.glob("model-*.safetensors"))) >= 4,
        lambda: len(list((work / "beside/mask.b").glob("*.safetensors"))) >= 6,
    ]
    for number, moment in enumerate(moments):
        kill_when([*cut, *(["--resume"] if number else [])], moment)
        assert not (tmp_path / "cut/model").exists()
    done = call_trainer([*cut, "--resume"])
    assert done.returncode == 0, done.stderr
    for part in ("model", "beside"):
        assert files(tmp_path / "cut" / part) == files(tmp_path / "whole" / part)


def test_merge_and_compress_in_one_pass(trainer: Any, family: Family, tmp_path: Path) -> None:
    pytest.importorskip("graftwork_compression_baselines")
    settings = {
        "transform.calibration": "random",
        "transform.samples": 4,
        "transform.window": 24,
        "transform.format": "dense",
        "plugins.gptq.scheme": "W4A16",
        "plugins.gptq.group": 16,
    }
    code, _, err = trainer(*words(family, tmp_path / "both", "ties", "gptq", **settings))
    assert code == 0, err
    assert trainer(*words(family, tmp_path / "merged", "ties"))[0] == 0
    later = [
        *("transform", f"--model={tmp_path / 'merged'}", "--plugin=gptq", f"--output={tmp_path / 'later'}"),
        *(f"--set={key}={value}" for key, value in settings.items()),
    ]
    assert trainer(*later)[0] == 0
    one, other = tensors_of(tmp_path / "both/model"), tensors_of(tmp_path / "later/model")
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])
    code, _, err = trainer(*words(family, tmp_path / "order", "gptq", "ties", **settings))
    assert code == 2
    assert "cannot be combined in this order: 'ties' changes the weights as they are stored" in err
    assert "name 'ties' first" in err


def test_a_plan_names_the_experts_and_reads_headers_only(
    trainer: Any, family: Family, tmp_path: Path
) -> None:
    code, out, err = trainer(*words(family, tmp_path / "run", "ties"), "--dry-run")
    assert code == 0, err
    assert f"expert b: {family[1]['b']}" in out
    assert not (tmp_path / "run").exists()


REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "no experts": (["ties"], {}, "plugin 'ties' merges experts, and none is named"),
    "nobody merges": (["hadamard"], {"transform.experts.a": "x"}, "no plugin of this run merges"),
    "two merges": (
        ["ties", "average"],
        {"transform.experts.a": "x"},
        "'ties' and 'average' cannot be combined in this order: both change the weights as they are stored",
    ),
    "missing": (["ties"], {"transform.experts.a": "./nowhere"}, "model './nowhere' does not exist"),
    "no model": (["one-bit"], {"transform.experts.a": None}, "'one-bit' makes no single model"),
    "keep": (["ties"], {"plugins.ties.keep": 0}, "'keep' = 0: input should be greater than 0"),
    "alpha": (
        ["ties"],
        {"plugins.ties.alpha": -1},
        "'alpha' = -1: input should be greater than or equal to 0",
    ),
    "drop": (["dare"], {"plugins.dare.drop": 1}, "'drop' = 1: input should be less than 1"),
    "lam": (["consensus"], {"plugins.consensus.lam": 0}, "is above 0"),
    "merge": (
        ["ties"],
        {"transform.merge.row": 4},
        "unknown option 'transform.merge.row' (did you mean 'rows'?)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(trainer: Any, family: Family, tmp_path: Path, kind: str) -> None:
    plugins, settings, sentence = REFUSED[kind]
    given = {key: family[1]["a"] if value is None else value for key, value in settings.items()}
    code, _, err = trainer(*words((family[0], {}), tmp_path / "run", *plugins, **given))
    assert code == 2, err
    assert sentence in err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- a method of somebody else


METHOD = """
import torch
from graftwork.merge.method import MergeMethod
from graftwork.merge.plugin import MergePlugin

class Median(MergeMethod):
    def merge(self, piece):
        return piece.deltas.median(0).values

class Plugin(MergePlugin):
    name = "median"

    @classmethod
    def method(cls, options, seed):
        return Median()
"""


def test_a_third_party_adds_a_method_in_twenty_lines(family: Family, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install_plugin(site, "median", "merge_by_median:Plugin", METHOD)
    done = call_trainer(words(family, tmp_path / "run", "median"), env={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    name = "model.layers.1.self_attn.o_proj.weight"
    base = tensors_of(family[0])[name]
    median = torch.stack([tensors_of(Path(ref))[name] - base for ref in family[1].values()]).median(0).values
    torch.testing.assert_close(tensors_of(tmp_path / "run/model")[name] - base, median, rtol=0, atol=1e-8)


# ---------------------------------------------------------------------- retention


def learned(base: Path, folder: Path, task: str, data: Path) -> str:
    """Train an expert on one task; return its run."""
    train = {"max_steps": 60, "per_device_train_batch_size": 8, "lr_scheduler_type": "cosine"}
    options = {"order": [task]}
    how = {"scoring": "likelihood"}
    result = run_tiny(tiny_recipe(base, data, data_options=options, train=train, evaluate=how), folder)
    assert result["scores"][-1][0] > 0.8 > result["scores"][0][0]
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A base, tasks, and two experts that can do one of the tasks each."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny_stream(folder / "data", ("fruit", "metal"), train=64, test=20)
    base, _ = tiny_experts(folder, [])
    experts = {
        name: {"model": learned(base, folder / f"run-{name}", name, data), "tasks": [name]}
        for name in ("fruit", "metal")
    }
    return base, data, experts


def measured(trainer: Any, trained: Any, output: Path, plugin: str, **settings: Any) -> dict[str, Any]:
    base, data, experts = trained
    recipe = {
        "model": str(base),
        "plugins": {plugin: settings.pop("options", {})},
        "benchmark": {
            "name": f"{plugin}:retention",
            "experts": experts,
            "data": {"source": str(data)},
            "merge": {"embeddings": "merge"},
            **settings,
        },
    }
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(recipe))
    code, _, err = trainer("run", path, f"--output={output}")
    assert code == 0, err
    return json.loads((output / "result.json").read_text())


def test_references_of_retention(trainer: Any, trained: Any, tmp_path: Path) -> None:
    """Experts keep all of themselves; the base keeps what it had."""
    own = measured(trainer, trained, tmp_path / "own", "unmerged")
    assert own["metrics"]["retention"] == pytest.approx(1.0)
    assert own["metrics"]["retention_min"] == 1.0
    assert own["metrics"]["retention_above_base"] == pytest.approx(1.0)
    assert own["metrics"]["bits_per_weight_per_expert"] == 32
    base = measured(trainer, trained, tmp_path / "base", "unmerged", options={"weights": "base"})
    assert base["metrics"]["retention_above_base"] == pytest.approx(0.0)
    assert base["metrics"]["score_fruit"] == base["metrics"]["base_fruit"] < own["metrics"]["expert_fruit"]
    assert len(base["items"]["retention"]) == 40


def test_an_expert_whose_answers_are_no_labels(trainer: Any, trained: Any, tmp_path: Path) -> None:
    """It has its own data, and its score is the share of tokens that it would have written."""
    base, data, experts = trained
    asked = {"source": "exact:arithmetic", "train_items": 4, "test_items": 6}
    more = {**experts, "sums": {"model": experts["fruit"]["model"], "data": asked}}
    run = measured(trainer, (base, data, more), tmp_path / "own", "unmerged", answer_tokens=3)
    assert run["metrics"]["retention"] == pytest.approx(1.0)
    scores = run["items"]["score_sums"]
    assert len(scores) == 6
    assert all(round(6 * score, 6) in range(7) for score in scores)  # of at most three tokens


def test_masks_keep_more_than_the_mean(trainer: Any, trained: Any, tmp_path: Path) -> None:
    emr = measured(trainer, trained, tmp_path / "emr", "emr")
    mean = measured(trainer, trained, tmp_path / "mean", "average")
    assert emr["metrics"]["retention"] > mean["metrics"]["retention"]
    assert emr["metrics"]["bits_per_weight_per_expert"] == 33
    assert mean["metrics"]["bits_per_weight_per_expert"] == 16
    expected = (
        sum(mean["metrics"][f"score_{n}"] / mean["metrics"][f"expert_{n}"] for n in ("fruit", "metal")) / 2
    )
    assert mean["metrics"]["retention"] == pytest.approx(expected)


def test_settings_are_chosen_on_other_items(trainer: Any, trained: Any, tmp_path: Path) -> None:
    grid = {"alpha": [0.0, 0.5]}
    found = measured(trainer, trained, tmp_path / "run", "task-arithmetic", grid=grid, validation=16)
    chosen = json.loads((tmp_path / "run/chosen.json").read_text())
    assert [one["alpha"] for one in chosen["tried"]] == [0.0, 0.5]
    best = max(chosen["tried"], key=lambda one: one["score"])
    assert chosen["chosen"] == {"alpha": best["alpha"]}
    assert any("validation items" in note for note in found["notes"])


def test_the_model_is_put_back_bit_by_bit(trained: Any) -> None:
    from graftwork.console import Console
    from graftwork.merge.standing import Standing
    from graftwork.testing.experts import open_tiny
    from graftwork_merging_baselines.average import AverageMethod, AverageOptions

    base, _, experts = trained
    opened = open_tiny(base, {name: one["model"] for name, one in experts.items()})
    model = load_model(str(base))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet = Console(enabled=False)
    with (
        pytest.raises(RuntimeError, match="stop"),
        Standing(model, opened).showing(AverageMethod(AverageOptions()), None, quiet),
    ):
        assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])
        raise RuntimeError("stop")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_kept_adapters(trainer: Any, tmp_path: Path) -> None:
    base, whole = tiny_experts(tmp_path, ["a", "b"])
    refs = tiny_lora_experts(tmp_path, base)
    merged = PeftModel.from_pretrained(load_model(str(base)), refs["b"]).merge_and_unload()
    save_tiny(merged, tmp_path / "dense-b")
    code, _, err = trainer(
        *words((base, whole), tmp_path / "refused", "kept-lora", **{"plugins.kept-lora.expand": "b"})
    )
    assert code == 2
    assert "expert 'a' is a whole model" in err
    assert not (tmp_path / "refused").exists()
    code, _, err = trainer(
        *words((base, refs), tmp_path / "run", "kept-lora", **{"plugins.kept-lora.expand": "b"})
    )
    assert code == 0, err
    expected = tensors_of(tmp_path / "dense-b")
    for name, tensor in tensors_of(tmp_path / "run/model").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)
    assert tiny_tokenizer().vocab_size == 259
