"""Recipes: expansion, overrides, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftwork import UserError
from graftwork.recipe import deep_merge, expand, load
from graftwork.yaml_lines import parse, parse_value

RECIPE = """\
title: Two arms
model: tiny
data: {source: tasks, order: [a, b]}
train:
  max_steps: 10
  learning_rate: 1e-3
steps:
  - name: plain
  - name: other
    train: {max_steps: 5}
repeat:
  seed: [1, 2]
  data.order: {forward: [a, b], reverse: [b, a]}
sizes:
  smoke: {train: {max_steps: 2}}
  paper: {model: big, repeat: {seed: [7]}}
expect:
  - other.ap > plain.ap
"""


def recipe(text: str = RECIPE, **changes):
    return expand(parse(text, "r.yaml"), **changes)


def test_steps_times_repeat() -> None:
    jobs = recipe().jobs
    assert len(jobs) == 2 * 2 * 2
    assert [spec.variant for spec in jobs[:2]] == ["seed=1,order=forward", "seed=1,order=reverse"]
    assert jobs[1].job.data.order == ["b", "a"]
    assert {spec.folder for spec in jobs} == {
        f"{arm}-seed={seed}_order={order}"
        for arm in ("plain", "other")
        for seed in (1, 2)
        for order in ("forward", "reverse")
    }


def test_a_step_wins_over_the_size_and_the_size_over_the_recipe() -> None:
    by_arm = {spec.arm: spec.job for spec in recipe(size="smoke").jobs}
    assert by_arm["plain"].train["max_steps"] == 2
    assert by_arm["other"].train["max_steps"] == 5


def test_a_size_may_change_what_is_repeated() -> None:
    jobs = recipe(size="paper").jobs
    assert {spec.job.seed for spec in jobs} == {7}
    assert jobs[0].job.model.ref == "big"


def test_set_wins_over_everything() -> None:
    jobs = recipe(sets=["train.max_steps=1", "repeat.seed=[3]", "repeat.data.order={x: [a]}"]).jobs
    assert [(spec.job.train["max_steps"], spec.job.seed) for spec in jobs] == [(1, 3), (1, 3)]
    assert jobs[0].job.data.order == ["a"]


def test_set_reaches_a_plugin_only_where_it_is_used() -> None:
    text = RECIPE.replace("  - name: plain\n", "  - name: plain\n    plugins: {p: {x: 1}}\n")
    by_arm = {spec.arm: spec.job for spec in recipe(text, sets=["plugins.p.x=2"]).jobs}
    assert by_arm["plain"].plugins == {"p": {"x": 2}}
    assert by_arm["other"].plugins == {}


def test_plugin_flag_reaches_every_step() -> None:
    assert all("p" in spec.job.plugins for spec in recipe(plugins=["p"]).jobs)


def test_a_recipe_without_steps_is_one_job() -> None:
    jobs = recipe("model: tiny\ndata: tasks\n").jobs
    assert [(spec.arm, spec.variant) for spec in jobs] == [("train", "")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modell: x\ndata: y\n", "r.yaml:1: unknown key 'modell' (did you mean 'model'?)"),
        ("model: x\ndata: y\nevaluate: {batchsize: 3}\n", "r.yaml:3: unknown option 'evaluate.batchsize'"),
        ("model: x\n", "option 'data' is missing"),
        ("model: x\ndata: y\nseed: many\n", "r.yaml:3: option 'seed' = 'many'"),
        (
            "model: x\ndata: y\nsteps:\n  - name: a\n    trian: {}\n",
            "r.yaml:5: unknown key 'trian' in step 'a'",
        ),
        ("model: x\ndata: y\nsteps:\n  - train: {}\n", "r.yaml:4: step 1 needs a 'name'"),
        ("model: x\ndata: y\nsteps: [{name: a}, {name: a}]\n", "two steps are named 'a'"),
        ("model: x\ndata: y\nsteps: [{name: ../a}]\n", "needs a 'name' of letters"),
        ("model: x\nmodel: y\n", "r.yaml:2: key 'model' stands here twice"),
        ("- a\n", "a recipe is a mapping"),
        ("model: [x\n", "r.yaml:2: not valid YAML"),
        ("model: ${NOT_SET_ANYWHERE}\n", "r.yaml:1: the environment variable NOT_SET_ANYWHERE is not set"),
        ("model: !!python/object/apply:os.system ['true']\n", "r.yaml:1"),
    ],
)
def test_mistakes_are_told_with_file_line_and_key(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": "smok"}, "no size 'smok' (did you mean 'smoke'?)"),
        ({"steps": ["plane"]}, "no step 'plane' (did you mean 'plain'?)"),
        ({"sets": ["train"]}, "write it as dotted.key=value"),
        ({"sets": ["trian.x=1"]}, "unknown key 'trian' (did you mean 'train'?)"),
        ({"sets": ["seed=-1"]}, "option 'seed' = -1"),
    ],
)
def test_wrong_flags(changes: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(**changes)
    assert said in str(caught.value)


def test_an_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UserError, match="more nested or repeated entries"):
        parse("\n".join(lines), "bomb.yaml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "no.yaml")


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "there")
    document = parse("a: ${WHERE}/x\nb: ${UNSET_HERE:-here}/y\n", "r.yaml")
    assert document.data == {"a": "there/x", "b": "here/y"}


def test_values_of_set_are_yaml() -> None:
    assert [parse_value(text) for text in ("1", "[a, 2]", "true", "x y", "", "[")] == [
        1,
        ["a", 2],
        True,
        "x y",
        "",
        "[",
    ]


def test_deep_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1}, "c": [1]}
    merged = deep_merge(base, {"a": {"d": 2}, "c": [3]})
    assert merged == {"a": {"b": 1, "d": 2}, "c": [3]}
    assert base == {"a": {"b": 1}, "c": [1]}
