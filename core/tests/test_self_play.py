"""Self-play: players write, their answers are paired and compared with, the model is trained, again and again."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from graftwork import UserError
from graftwork.testing.data import tiny_sums
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from safetensors.torch import load_file, save_file

CODE = """
import torch
from torch.nn.functional import softplus
from pydantic import Field
from graftwork import PairLoss, SelfPlay, hookimpl
from graftwork.self_play.options import SelfPlayOptions

class DuelOptions(SelfPlayOptions):
    players: int = 2
    rounds: int = 2
    samples: int = 1
    scale: float = 0.1
    broken: int = 0

class Duel:
    Options = DuelOptions

    def __init__(self, options):
        self.options = options

    def loss(self, batch):
        if self.options.broken == batch.iteration:
            return PairLoss(batch.chosen * float("nan"))
        if not len(batch.rejected):
            return PairLoss(-batch.chosen / batch.chosen_tokens)
        margin = (batch.chosen - batch.rejected)[:, None] - (batch.reference_chosen - batch.reference_rejected)
        rows = softplus(-self.options.scale * margin).mean(1)
        return PairLoss(rows, {"margin/mean": margin.mean(1), "margin/newest": margin[:, 0]})

    @hookimpl
    def self_play(self, run):
        o = self.options
        return SelfPlay(o, self.loss, players=o.players, rounds=o.rounds, samples=o.samples,
                        inspect=lambda chosen, rejected: [f"{chosen.shape[1]} players"])

class Judge(Duel):
    @hookimpl
    def self_play(self, run):
        def choose(target, samples):
            ranked = sorted(samples, key=lambda one: one.score)
            return [(ranked[-1].tokens, ranked[0].tokens)] if ranked[-1].score > ranked[0].score else []
        return SelfPlay(self.options, self.loss, samples=3, choose=choose,
                        score=lambda samples: [float(len(set(one.text))) for one in samples])

class Rival:
    def __init__(self, options): ...
    @hookimpl
    def training_algorithm(self, run):
        from graftwork import TrainingAlgorithm
        from transformers import Trainer, TrainingArguments
        return TrainingAlgorithm(Trainer, TrainingArguments)
"""
ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
TRAIN = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_length": 64,
}
WRITING = {"max_new_tokens": 6, "batch_size": 2}


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    for name, target in {"duel": "Duel", "judge": "Judge", "rival": "Rival"}.items():
        install_plugin(folder, name, f"selfplaying:{target}", CODE, package=f"graftwork-play-{name}")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield folder
    importlib.invalidate_caches()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty sums with their answers to train on, and eight held out."""
    return tiny_sums(tmp_path_factory.mktemp("data") / "sums")


Play = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def play(checkpoint: Path, pairs: Path, tmp_path: Path) -> Play:
    """Run a job of self-play and return its result and its folder."""

    def call(name: str = "run", resume: bool = False, **options: Any) -> tuple[dict[str, Any], Path]:
        recipe = job(checkpoint, pairs, **options)
        return run_tiny(recipe, tmp_path / name, resume=resume), tmp_path / name

    return call


SAVING = {"train": {"save_strategy": "steps", "save_steps": 1}}
_WHOLE: dict[str, tuple[dict[str, Any], Path]] = {}


@pytest.fixture(params=["lora", "full"])
def whole(
    request: pytest.FixtureRequest, checkpoint: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Settings of a run that was not interrupted, its result and its folder, made once."""
    settings = {**SAVING, "adapter": ADAPTER if request.param == "lora" else None}
    if request.param not in _WHOLE:
        folder = tmp_path_factory.mktemp("whole") / request.param
        _WHOLE[request.param] = run_tiny(job(checkpoint, pairs, **settings), folder), folder
    return settings, *_WHOLE[request.param]


def job(
    model: Path, data: Any, plugin: str = "duel", adapter: Any = ADAPTER, beside: str = "", **options: Any
) -> Any:
    train = {**TRAIN, **options.pop("train", {})}
    plugins = {plugin: {"iterations": 3, "writing": WRITING, **options}}
    return tiny_recipe(
        model,
        data,
        plugins={**plugins, beside: {}} if beside else plugins,
        train=train,
        evaluate={"max_new_tokens": 6, "batch_size": 4},
        **({"adapter": adapter} if adapter else {}),
    )


def rounds(folder: Path, iteration: int) -> dict[str, list[Any]]:
    return pq.read_table(folder / "rounds" / f"iteration-{iteration}" / "pairs.parquet").to_pydict()


# ---------------------------------------------------------------------- what a run makes


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["lora", "full"])
def test_three_iterations_play_with_the_last_two_players(play: Play, adapter: Any) -> None:
    result, folder = play(adapter=adapter)
    first, second, third = (rounds(folder, k) for k in (1, 2, 3))
    assert len(first["item"]) == 40
    assert set(first["player"]) == {"start"}
    assert set(second["player"]) == {"start", "iteration-1"}
    assert set(third["player"]) == {"iteration-1", "iteration-2"}
    assert [len(one["reference_chosen"][0]) for one in (first, second, third)] == [1, 2, 2]
    assert len(set(third["checkpoint"])) == 2
    assert result["order"] == ["iteration-1", "iteration-2", "iteration-3"]
    assert result["steps"] == 3
    assert [step for _, step, _ in losses(folder)] == [1, 2, 3] * 3
    assert any("iteration-2: 2 players" in note for note in result["notes"])
    assert {"Margin", "Target reward of held-out items"} <= {line["title"] for line in result["lines"]}
    assert len(result["items"]["target_reward"]) == 8


def test_the_newest_player_is_the_model_itself_before_its_first_step(play: Play) -> None:
    """So the loss of every iteration with one player begins at log 2."""
    _, folder = play(players=1, rounds=1)
    begins = [loss for _, step, loss in losses(folder) if step == 1]
    assert begins == pytest.approx([0.6931472] * 3, abs=1e-5)


def test_references_are_the_players_log_probabilities(play: Play, checkpoint: Path) -> None:
    from graftwork.models import load_model

    _, folder = play(iterations=2)
    second = rounds(folder, 2)
    players = [folder / "stages" / "01-iteration-1" / "model", folder / "rounds" / "start" / "model"]
    for column, player in enumerate(players):
        model = load_model(str(player)).eval()
        for row in (0, 17, 63):
            for which in ("chosen", "rejected"):
                prompt, answer = second["prompt_ids"][row], second[f"{which}_ids"][row]
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
                exact = sum(
                    logits[len(prompt) + place - 1, token].item() for place, token in enumerate(answer)
                )
                assert second[f"reference_{which}"][row][column] == pytest.approx(exact, abs=1e-4)


def test_the_sampled_answers_tell_where_they_come_from(play: Play) -> None:
    _, folder = play(iterations=1, samples=2)
    table = pq.read_table(folder / "rounds" / "start" / "samples.parquet").to_pydict()
    assert table["sample"] == [0, 1] * 40
    assert set(table["finish"]) <= {"end", "length"}
    assert table["prompt"][:2] == ["0+1=", "0+1="]
    # Parts of eight batches of two, each with a seed of its own.
    assert len(set(table["seed"])) == 5
    assert any(table["text"][k] != table["text"][k + 1] for k in range(0, 80, 2))


def test_scores_choose_the_pairs(play: Play) -> None:
    _, folder = play(plugin="judge", iterations=1)
    table = pq.read_table(folder / "rounds" / "start" / "samples.parquet").to_pydict()
    assert table["score"] == [float(len(set(text))) for text in table["text"]]
    by_item: dict[int, list[tuple[float, list[int]]]] = {}
    for item, score, tokens in zip(table["item"], table["score"], table["generated_ids"], strict=True):
        by_item.setdefault(item, []).append((score, tokens))
    found = rounds(folder, 1)
    assert 0 < len(found["item"]) <= 40
    for item, chosen, rejected in zip(found["item"], found["chosen_ids"], found["rejected_ids"], strict=True):
        scores = {tuple(tokens): score for score, tokens in by_item[item]}
        assert scores[tuple(chosen)] == max(scores.values()) > scores[tuple(rejected)]


def test_without_samples_the_targets_alone_are_learned(play: Play) -> None:
    result, folder = play(samples=0, players=0, iterations=1, train={"max_steps": 30})
    found = rounds(folder, 1)
    assert found["rejected_ids"] == [[]] * 40
    assert found["player"] == [None] * 40
    assert result["metrics"]["target_reward"] > 0


def test_same_seed_same_run(play: Play) -> None:
    _, one = play("one")
    _, two = play("two")
    assert losses(one) == losses(two)
    for name in ("iteration-1", "iteration-3"):
        files = [folder / "rounds" / name / "pairs.parquet" for folder in (one, two)]
        assert files[0].read_bytes() == files[1].read_bytes()


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("graftwork.self_play.writing.BatchedWriter.__call__", 1),
        ("graftwork.self_play.writing.BatchedWriter.__call__", 7),
        ("graftwork.self_play.scoring.Scorer.__call__", 5),
        ("graftwork.self_play.stream.save_pairs", 2),
        ("graftwork.compat.pair_trainer.PairTrainer.compute_loss", 4),
        ("graftwork.compat.pair_trainer.PairTrainer.compute_loss", 5),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    play: Play, whole: Any, monkeypatch: pytest.MonkeyPatch, target: str, count: int
) -> None:
    settings, expected, reference = whole
    with monkeypatch.context() as patch:
        patch.setattr(target, stopping_at(target, count))
        with pytest.raises(KeyboardInterrupt):
            play("cut", **settings)
    resumed, folder = play("cut", resume=True, **settings)
    assert losses(folder) == losses(reference)
    for number in (1, 2, 3):
        name = Path("rounds") / f"iteration-{number}" / "pairs.parquet"
        assert (folder / name).read_bytes() == (reference / name).read_bytes()
    for key in ("metrics", "items", "notes", "lines"):
        assert resumed[key] == expected[key]
    assert not [*(folder / "rounds").rglob("*.parts"), *(folder / "rounds").rglob("written")]


def stopping_at(target: str, count: int) -> Any:
    """Return a replacement for ``target`` that interrupts at its call number ``count``."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:cut]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[cut:]:
        owner = getattr(owner, part)
    original, calls = owner, [0]

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return stop


def test_a_player_that_has_changed_is_refused(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "graftwork.self_play.stream.save_pairs"
    with monkeypatch.context() as patch:
        patch.setattr(target, stopping_at(target, 2))
        with pytest.raises(KeyboardInterrupt):
            play()
    weights = tmp_path / "run" / "rounds" / "start" / "model" / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="player 'start' has changed since it took part"):
        play(resume=True)


# ---------------------------------------------------------------------- a team to begin with


def test_older_checkpoints_write_and_are_compared_with(play: Play) -> None:
    _, older = play("older", iterations=2)
    team = [str(older / "stages" / "01-iteration-1" / "model"), str(older / "adapter")]
    _, folder = play(iterations=1, team=team, players=3, rounds=3)
    found = rounds(folder, 1)
    assert set(found["player"]) == {"team-1", "team-2", "start"}
    assert set(found["round"]) == {-2, -1, 0}
    assert len(found["reference_chosen"][0]) == 3


def test_a_player_of_another_base_model_is_refused(play: Play, tmp_path: Path) -> None:
    _, older = play("older", iterations=1)
    config = older / "adapter" / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": "', '"base_model_name_or_path": "other/')
    )
    with pytest.raises(UserError, match="adapter of the base model 'other/"):
        play(team=[str(older / "adapter")])


def test_a_whole_model_among_adapters_is_refused(play: Play, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="is a whole model, but what is trained here is an adapter"):
        play(team=[str(checkpoint)])


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": ""}], "training item 0: the answer is empty"),
        ([{"text": "a"}], "has no 'prompt'"),
        ([{"prompt": "a", "completion": "b" * 80}], "no prompt fits train.max_length = 64"),
    ],
)
def test_bad_items(checkpoint: Path, tmp_path: Path, rows: list[Any], message: str) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        run_tiny(job(checkpoint, data), tmp_path / "run")


def test_notes_tell_of_long_answers_and_double_prompts(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * 80}, {"prompt": "c", "completion": "d"}] * 2
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_tiny(job(checkpoint, data, iterations=1), tmp_path / "run")
    assert any("2 items are left out" in note for note in result["notes"])
    assert any("2 prompts stand there more than once" in note for note in result["notes"])


def test_several_tasks_are_refused(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learns one task in iterations, and the data has 3"):
        run_tiny(job(checkpoint, stream), tmp_path / "run")


def test_a_loss_that_is_no_number_leaves_its_batch(play: Play, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss of iteration 2 is nan after step 0; the batch is in"):
        play(broken=2)
    batch = json.loads((tmp_path / "run" / "no-number-0.json").read_text())
    assert len(batch["item"]) == 4
    assert batch["loss"] == ["nan"] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"beta": 0.1}}, "train.beta is for DPO's own loss"),
        ({"beside": "rival"}, "'duel' and 'rival' cannot be combined"),
        ({"adapter": {**ADAPTER, "policy": "stacked"}}, "of the policy 'stacked'"),
        ({"writing": {"template": "no place"}}, "holds {prompt}"),
    ],
)
def test_what_cannot_work_is_refused(play: Play, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        play(**settings)
