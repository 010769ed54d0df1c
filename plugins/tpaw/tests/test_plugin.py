"""The four methods in real runs of a tiny model: what they train on, what they log, how they resume and refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from graftwork import PairBatch, PluginError, Sample, UserError
from graftwork.compat.pair_trainer import PairTrainer
from graftwork.models import load_model
from graftwork.plugins import construct
from graftwork.testing.data import tiny_sums
from graftwork.testing.models import tiny_checkpoint, tiny_judge, tiny_tokenizer
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork_tpaw import dpo_loss, spin_loss, team_loss
from graftwork_tpaw.iterative_dpo import best_and_worst
from graftwork_tpaw.rewards import RewardModel, exact, overlap, reward
from graftwork_tpaw.spin import Spin
from graftwork_tpaw.tpaw import Tpaw
from safetensors.torch import load_file

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
SHARED = ("log-probability/target", "log-probability/generated")
REWARDS = ("reward/target", "reward/generated", "reward/margin")
TEAM = ("player weight/age 0", "player weight/entropy", "boosted/age 0")
LOGGED = {
    "tpaw": {*SHARED, *REWARDS, *TEAM},
    "spin": {*SHARED, *REWARDS},
    "iterative-dpo": {*SHARED, *REWARDS},
    "continued-sft": {"log-probability/target"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sums(tmp_path_factory.mktemp("data") / "sums", train=24, test=6)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model: one logit for a text."""
    return tiny_judge(tmp_path_factory.mktemp("judge") / "judge")


Play = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def play(checkpoint: Path, sums: Path, judge: Path, tmp_path: Path) -> Play:
    """Run a method (``tpaw``, ...) for two iterations and return its result and folder."""

    def call(
        method: str,
        name: str = "run",
        resume: bool = False,
        adapter: Any = LORA,
        train: Any = None,
        **options: Any,
    ) -> tuple[dict[str, Any], Path]:
        shared = {"iterations": 2}
        if method != "continued-sft":
            shared["writing"] = {"max_new_tokens": 6, "batch_size": 4}
        if method == "iterative-dpo":
            shared["reward"] = str(judge)
        recipe = tiny_recipe(
            checkpoint,
            sums,
            plugins={method: {**shared, **options}},
            train={"max_steps": 4, "max_length": 64, **(train or {})},
            evaluate={"max_new_tokens": 6, "batch_size": 4},
            **({"adapter": adapter} if adapter else {}),
        )
        return run_tiny(recipe, tmp_path / name, resume=resume), tmp_path / name

    return call


def logs(folder: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "log"]


def pairs(folder: Path, iteration: int) -> dict[str, list[Any]]:
    return pq.read_table(folder / "rounds" / f"iteration-{iteration}" / "pairs.parquet").to_pydict()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return load_file(path)


# ---------------------------------------------------------------- what every method does


@pytest.mark.parametrize("method", LOGGED)
def test_two_iterations_of_every_method(play: Play, method: str) -> None:
    result, folder = play(method)
    assert result["order"] == ["iteration-1", "iteration-2"]
    first = logs(folder)[0]
    assert {key for key in first if "/" in key} == LOGGED[method]
    # The newest player is the model itself, so no reward yet.
    for key in REWARDS:
        assert first.get(key, 0.0) == pytest.approx(0, abs=1e-5)
    assert all(
        math.isfinite(value) for event in logs(folder) for value in event.values() if type(value) is float
    )
    assert len(result["items"]["target_reward"]) == 6
    groups = {line["title"] for line in result["lines"]}
    assert {key.partition("/")[0].capitalize() for key in LOGGED[method]} <= groups


@pytest.mark.parametrize(
    ("method", "adapter"),
    [
        *(pytest.param(name, LORA, marks=[] if name == "tpaw" else pytest.mark.slow) for name in LOGGED),
        pytest.param("tpaw", None, marks=pytest.mark.slow),
    ],
    ids=[*LOGGED, "tpaw, full weights"],
)
def test_a_run_cut_in_its_second_iteration_resumes_to_the_same_bits(
    play: Play, monkeypatch: pytest.MonkeyPatch, method: str, adapter: Any
) -> None:
    settings = {"adapter": adapter, "train": {"save_strategy": "steps", "save_steps": 1}}
    expected, whole = play(method, "whole", **settings)
    original, calls = PairTrainer.compute_loss, [0]

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "compute_loss", compute_loss)
        with pytest.raises(KeyboardInterrupt):
            play(method, "cut", **settings)
    resumed, cut = play(method, "cut", resume=True, **settings)
    assert losses(cut) == losses(whole)
    for iteration in (1, 2):
        assert pairs(cut, iteration) == pairs(whole, iteration)
    for name, value in weights(whole).items():
        assert torch.equal(weights(cut)[name], value)
    assert resumed["metrics"] == expected["metrics"]


# ---------------------------------------------------------------- TPAW and SPIN


def test_the_team_grows_and_its_members_are_weighed(play: Play) -> None:
    _, folder = play("tpaw", iterations=3, players=2, rounds=3)
    assert [len(pairs(folder, k)["reference_chosen"][0]) for k in (1, 2, 3)] == [1, 2, 2]
    assert [len(set(pairs(folder, k)["player"])) for k in (1, 2, 3)] == [1, 2, 3]
    alone, two = logs(folder)[0], logs(folder)[4]
    assert alone["player weight/age 0"] == 1
    assert alone["player weight/entropy"] == 0
    assert two["player weight/age 0"] + two["player weight/age 1"] == pytest.approx(1)
    # gamma lambda = 0.05: nearly even on answers of a few tokens.
    assert two["player weight/entropy"] == pytest.approx(math.log(2), abs=0.05)


def test_one_player_and_unit_weights_are_spin_bit_for_bit(play: Play) -> None:
    _, spin = play("spin", "spin")
    _, tpaw = play("tpaw", "tpaw", players=1, rounds=1, eta=1.0)
    assert losses(spin) == losses(tpaw)
    assert pairs(spin, 2) == pairs(tpaw, 2)
    for name, value in weights(spin).items():
        assert torch.equal(weights(tpaw)[name], value)
    _, boosted = play("tpaw", "boosted", players=1, rounds=1)
    # The first step has P = 0 under the only player, so the same loss; its gradient is another.
    assert losses(boosted)[0] == losses(spin)[0]
    assert losses(boosted)[1:] != losses(spin)[1:]


def test_the_first_iteration_of_spin_is_trl_s_dpo(play: Play, checkpoint: Path, tmp_path: Path) -> None:
    """TRL's own trainer, loss and reference model on the pairs that were written."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    _, folder = play("spin", adapter=None, iterations=1)
    found = pairs(folder, 1)

    class Tokens(DPOTrainer):
        """The pairs are tokens already."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        beta=0.1,
        seed=42,
    )
    trainer = Tokens(
        load_model(str(checkpoint), dtype="float32"),
        load_model(str(checkpoint), dtype="float32"),
        args=config,
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_dict(
            {key: found[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
        ),
    )
    trainer.train()
    theirs = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    assert [loss for _, _, loss in losses(folder)] == pytest.approx(theirs, abs=2e-4)
    assert abs(theirs[-1] - theirs[0]) > 1e-2


def batch(players: int, iteration: int = 1, seed: int = 0) -> PairBatch:
    draw = torch.Generator().manual_seed(seed)
    chosen, rejected = (-30 + 5 * torch.randn(2, 6, generator=draw)).unbind()
    references = -30 + 5 * torch.randn(2, 6, players, generator=draw)
    tokens = torch.randint(3, 30, (2, 6), generator=draw)
    return PairBatch(
        chosen.requires_grad_(), rejected.requires_grad_(), *references.unbind(), *tokens.unbind(), iteration
    )


def test_metrics_are_those_of_the_newest_player() -> None:
    given = batch(3)
    found = Tpaw(Tpaw.Options()).loss(given)
    target = 0.1 * (given.chosen - given.reference_chosen[:, 0])
    generated = 0.1 * (given.rejected - given.reference_rejected[:, 0])
    torch.testing.assert_close(found.metrics["reward/target"], target.detach())
    torch.testing.assert_close(found.metrics["reward/generated"], generated.detach())
    torch.testing.assert_close(found.metrics["reward/margin"], (target - generated).detach())
    torch.testing.assert_close(
        found.metrics["log-probability/target"], given.chosen.detach() / given.chosen_tokens
    )
    for age in range(3):
        below = given.chosen.detach() - given.reference_chosen[:, age] <= 1e-4 * given.chosen_tokens
        assert torch.equal(found.metrics[f"boosted/age {age}"] == 1, below)
    shares = torch.stack([found.metrics[f"player weight/age {age}"] for age in range(3)])
    torch.testing.assert_close(found.metrics["player weight/entropy"], -(shares * shares.log()).sum(0))
    assert not any(value.requires_grad for value in found.metrics.values())


def test_switches_of_the_controls() -> None:
    given = batch(3)
    references = given.reference_chosen, given.reference_rejected
    team_only = Tpaw(Tpaw.Options(eta=1)).loss(given).rows
    torch.testing.assert_close(team_only, team_loss(given.chosen, given.rejected, *references, eta=1))
    uniform = Tpaw(Tpaw.Options(eta=1, gamma=0)).loss(given).rows
    single = [
        dpo_loss(given.chosen, given.rejected, *(part[:, age] for part in references)) for age in range(3)
    ]
    torch.testing.assert_close(uniform, torch.stack(single).mean(0))
    other = Tpaw(Tpaw.Options(margin_uses_alpha=True)).loss(given).rows
    assert not torch.allclose(other, Tpaw(Tpaw.Options()).loss(given).rows)


def test_spin_takes_the_beta_of_its_iteration_and_its_loss() -> None:
    plugin = Spin(Spin.Options(iterations=2, beta=[0.1, 5.0], loss="hinge"))
    for iteration, beta in ((1, 0.1), (2, 5.0)):
        given = batch(1, iteration)
        references = given.reference_chosen[:, 0], given.reference_rejected[:, 0]
        expected = spin_loss(given.chosen, given.rejected, *references, beta=beta, kind="hinge")
        assert torch.equal(plugin.loss(given).rows, expected)
        reward_ = plugin.loss(given).metrics["reward/target"]
        torch.testing.assert_close(reward_, beta * (given.chosen.detach() - references[0]))


def test_a_team_that_is_one_player_is_told(play: Play) -> None:
    plugin = Tpaw(Tpaw.Options(gamma=5.0, scale=1.0))
    chosen = torch.tensor([[-10.0, -5.0, -10.0]]).repeat(20, 1)
    assert plugin.inspect(chosen, torch.full_like(chosen, -10)) == [
        "in 100% of the pairs player 1 of 0 (the newest) to 2 has 99% or more of the weight, so that the team is this "
        "one player; a smaller plugins.tpaw.gamma (5) or plugins.tpaw.scale (1) weighs more evenly"
    ]
    chosen[:3] = -10.0
    assert plugin.inspect(chosen, torch.full_like(chosen, -10)) == []
    assert Tpaw(Tpaw.Options()).inspect(chosen, torch.full_like(chosen, -10)) == []
    assert plugin.inspect(chosen[:, :1], chosen[:, :1]) == []
    result, _ = play("tpaw", gamma=1e5)
    assert any(
        "iteration-2: in " in note and "the team is this one player" in note for note in result["notes"]
    )


# ---------------------------------------------------------------- iterative DPO


def sample(text: str, score: float | None = None, prompt: Any = "ask", target: str = "The end") -> Sample:
    return Sample(0, prompt, target, text, [len(text), 2], True, score)


def test_the_best_is_paired_with_the_worst() -> None:
    samples = [
        sample("b" * length, score) for length, score in ((1, 0.5), (2, 2.0), (3, -1.0), (4, 2.0), (5, -1.0))
    ]
    assert best_and_worst([7], samples) == [([2, 2], [3, 2])]
    assert best_and_worst([7], [sample("x", 1.0), sample("y", 1.0)]) == []
    assert best_and_worst([7], [sample("x", 1.0)]) == []
    assert best_and_worst([7], []) == []


def test_own_rewards_compare_with_the_target() -> None:
    answers = [sample("end!"), sample("The end of it"), sample("no")]
    assert reward("exact") is exact
    assert exact(answers) == [1, 0, 0]
    # Words: end; end of it. Articles do not count.
    assert overlap(answers) == [1, pytest.approx(2 * 1 / (1 + 3)), 0]


def test_a_reward_model_gives_its_logit(judge: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    samples = [sample("yes", prompt=f"question {number}") for number in range(20)]
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    tokenizer = tiny_tokenizer()
    for one, found in zip(samples, RewardModel(str(judge))(samples), strict=True):
        ids = tokenizer(one.prompt, one.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert found == pytest.approx(model(ids).logits.item(), abs=1e-4)
    talk = [{"role": "user", "content": "hello"}]
    with_template = RewardModel(str(tiny_judge(tmp_path / "chat", template=True)))
    (found,) = with_template([sample("yes", prompt=talk)])
    ids = tokenizer("<user>hello\n<assistant>yes\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert found == pytest.approx(model(ids).logits.item(), abs=1e-4)
    with pytest.raises(UserError, match="has no chat template and the prompts are chats"):
        RewardModel(str(judge))([sample("yes", prompt=talk)])


def test_the_reference_is_the_last_checkpoint_or_the_start(play: Play) -> None:
    _, previous = play("iterative-dpo", "previous")
    _, start = play("iterative-dpo", "start", reference="start")
    assert losses(previous)[:4] == losses(start)[:4]
    second = pairs(start, 2)
    assert len(second["reference_chosen"][0]) == 2
    # Against itself the model begins with log 2, against the start it has moved.
    assert losses(previous)[4][2] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses(start)[4][2] - math.log(2)) > 1e-3
    # The same pairs: the last column is the start's, which the first iteration has as its only one.
    assert second["rejected_ids"] == pairs(previous, 2)["rejected_ids"]


def test_chosen_and_rejected_are_the_model_s_own_answers(play: Play) -> None:
    _, folder = play("iterative-dpo", iterations=1, samples=3)
    table = pq.read_table(folder / "rounds" / "start" / "samples.parquet").to_pydict()
    assert table["sample"] == [0, 1, 2] * 24
    written: dict[int, dict[tuple[int, ...], float]] = {}
    for item, tokens, score in zip(table["item"], table["generated_ids"], table["score"], strict=True):
        written.setdefault(item, {})[tuple(tokens)] = score
    found = pairs(folder, 1)
    for item, chosen, rejected in zip(found["item"], found["chosen_ids"], found["rejected_ids"], strict=True):
        assert written[item][tuple(chosen)] == max(written[item].values())
        assert written[item][tuple(rejected)] == min(written[item].values())


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tpaw", {"eta": 0.5}, "'eta' = 0.5: input should be greater than or equal to 1"),
        ("tpaw", {"gamma": -1}, "'gamma' = -1: input should be greater than or equal to 0"),
        ("tpaw", {"scale": 0}, "'scale' = 0: input should be greater than 0"),
        ("tpaw", {"players": 0}, "'players' = 0: input should be greater than or equal to 1"),
        ("tpaw", {"rounds": 0}, "'rounds' = 0: input should be greater than or equal to 1"),
        ("tpaw", {"tolerance": -1e-4}, "'tolerance' = -0.0001"),
        ("tpaw", {"eta": math.inf}, "'eta' = inf: input should be a finite number"),
        ("tpaw", {"lambda": 1}, "unknown option 'lambda'"),
        ("tpaw", {"margin_uses_alpha": True, "gamma": 0}, "margin_uses_alpha does nothing with"),
        (
            "tpaw",
            {"team": ["a", "b", "c"]},
            "team names 3 older checkpoints, and beside the newest 2 take part",
        ),
        ("spin", {"beta": 0}, "greater than 0"),
        ("spin", {"beta": [0.1]}, "beta has 1 values for 4 iterations"),
        ("spin", {"rounds": 3}, "'rounds' = 3: input should be 1 or 2"),
        ("spin", {"loss": "ipo"}, "'loss' = 'ipo': input should be 'logistic' or 'hinge'"),
        ("spin", {"team": ["a"]}, "beside the newest 0 take part"),
        ("iterative-dpo", {"samples": 1}, "'samples' = 1: input should be greater than or equal to 2"),
        ("iterative-dpo", {"reference": "best"}, "'reference' = 'best'"),
        ("iterative-dpo", {"team": ["a"]}, "team does nothing in iterative DPO"),
        ("iterative-dpo", {"identical": "drop"}, "identical: drop does nothing"),
        ("iterative-dpo", {"reward": ""}, "'reward' = ''"),
        ("continued-sft", {"writing": {"temperature": 0.5}}, "writing does nothing in continued SFT"),
        ("continued-sft", {"team": ["a"]}, "team does nothing in continued SFT"),
        ("continued-sft", {"truncated": "drop"}, "truncated does nothing in continued SFT"),
        ("continued-sft", {"iterations": 0}, "'iterations' = 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        construct(method, options)


def test_controls_are_accepted() -> None:
    for options in (
        {"eta": 1},
        {"players": 1, "rounds": 1},
        {"gamma": 0},
        {"tolerance": 0},
        {"team": ["a", "b"]},
    ):
        construct("tpaw", options)
    construct("spin", {"rounds": 2, "team": ["a"]})


def test_a_reward_that_cannot_be_used_is_refused_before_anything_is_loaded(
    play: Play, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has 3 outputs; name exact, f1, or a sequence-classification model"):
        play("iterative-dpo", reward=str(tiny_judge(tmp_path / "three", labels=3)))
    with pytest.raises(UserError, match=r"does not exist"):
        play("iterative-dpo", reward="./nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError):
        play("iterative-dpo", reward=str(empty))
    assert not (tmp_path / "run" / "rounds").exists()


def test_a_language_model_is_no_reward_model(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint, num_labels=1)
    with pytest.raises(UserError, match=r"has no trained 'score.weight'"):
        folder = tmp_path / "language"
        load_model(str(checkpoint)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        config.save_pretrained(folder)
        RewardModel(str(folder))([sample("x")])


def test_a_loss_that_fails_names_the_plugin(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spin, "loss", lambda self, given: 1 / 0)
    with pytest.raises(PluginError, match=r"plugin 'spin' failed in hook 'self_play \(loss\)'"):
        play("spin")
