"""What is told about plugins: lists, cards, the schema of recipes, and the README's table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from graftwork.card import card, keep_result, last_result, option_rows, packages_table, provenance, type_words
from graftwork.plugins import discover, find
from graftwork.recipes import locate, shipped
from graftwork.schema import schema
from graftwork.yaml_lines import read
from pydantic import BaseModel, Field

ROOT = Path(__file__).parent.parent
OURS = {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}


def first_party() -> dict[str, Any]:
    """Return the plugins of this repository; others may be installed beside them."""
    return {
        name: info
        for name, info in discover().items()
        if info.distribution.removeprefix("graftwork-") in OURS
    }


def test_the_table_in_the_readme_is_what_the_plugins_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = text.split("<!-- plugins: printed by `trainer plugins list --markdown` -->\n")[1]
    table = inside.split("\n<!-- /plugins -->")[0]
    expected = packages_table(first_party(), ROOT)
    assert table == expected, "write the output of `trainer plugins list --markdown` into README.md"
    assert len(expected.splitlines()) == 2 + len(OURS)


def test_lists_for_machines(trainer: Callable[..., Any]) -> None:
    found = json.loads(trainer("plugins", "list", "--json").out)
    assert {"name": "sparta", "package": "graftwork-sparta", "version": "0.1.0"} in found
    assert [one["name"] for one in found] == sorted(discover())


@pytest.mark.parametrize("name", ["sparta", "memit"])
def test_a_card_for_machines_says_what_the_one_for_people_says(
    trainer: Callable[..., Any], name: str
) -> None:
    found = json.loads(trainer("plugins", "show", name, "--json").out)
    printed = " ".join(trainer("plugins", "show", name).out.split())
    assert found["hooks"]
    assert found["provenance"]
    for hook in found["hooks"]:
        assert hook in printed
    for option in found["options"]:
        assert f"{option['name']} {option['type']}" in printed
        assert option["help"]
    for recipe in found["recipes"]:
        assert all(" ".join(text.split()) in printed for text in recipe["expect"])


def test_every_plugin_of_ours_has_a_card() -> None:
    for name, info in first_party().items():
        found = card(name)
        assert found["summary"], name
        assert found["hooks"], name
        assert all(option["help"] for option in found["options"]), name
        assert provenance(info), f"the README of {info.distribution} has no table '| part | comes from |'"


def test_provenance_is_that_of_the_plugin_where_a_package_has_several() -> None:
    parts = [row["part"] for row in provenance(find("n-lora"))]
    assert any("L1 norm" in part for part in parts)
    assert not any("InfLoRA" in row["source"] for row in provenance(find("n-lora")))


def test_conflicts_are_those_of_hooks_that_a_run_has_once() -> None:
    (adapter,) = [one for one in card("sparta")["conflicts"] if one["hook"] == "adapter_config"]
    assert "parsp" in adapter["with"]
    assert "memit" not in adapter["with"]
    assert card("memit")["conflicts"] == []


def test_options_are_told_with_type_and_bounds() -> None:
    class Inner(BaseModel):
        steps: int = Field(3, ge=1, le=9, description="how many")

    class Options(BaseModel):
        path: str = Field(description="where")
        names: list[str] | None = Field(None, description="which")
        inner: Inner = Field(default_factory=Inner)

    rows = {row["name"]: row for row in option_rows(Options)}
    assert list(rows) == ["path", "names", "inner.steps"]
    assert rows["path"]["required"]
    assert rows["names"]["type"] == "list of str | none"
    assert rows["inner.steps"] == {
        "name": "inner.steps",
        "type": "int",
        "required": False,
        "default": 3,
        "bounds": ">= 1, <= 9",
        "help": "how many",
    }
    assert type_words(dict[str, float]) == "mapping of str to float"


def test_the_last_result_of_a_claim_is_kept(
    trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    path = shipped(find("sparta"))["claim"]
    assert last_result(path) is None
    assert "not run here" in trainer("plugins", "show", "sparta").out
    (expected, *_) = card("sparta")["recipes"][0]["expect"]
    verdicts = [{"text": expected, "verdict": "refuted", "detail": ""}]
    keep_result(path, {"size": "small", "command": "c", "expect": verdicts, "versions": {}}, tmp_path)
    shown = trainer("plugins", "show", "sparta").out
    assert "last run here: size small" in shown
    assert f"refuted       {expected}" in shown


# ---------------------------------------------------------------------- the schema


@pytest.fixture(scope="module")
def validator() -> Any:
    whole = schema()
    jsonschema.Draft202012Validator.check_schema(whole)
    return jsonschema.Draft202012Validator(whole)


def recipes() -> list[Path]:
    found = {path for info in first_party().values() for path in shipped(info).values()}
    return sorted({*found, *ROOT.glob("recipes/*/*.yaml")})


@pytest.mark.parametrize("path", recipes(), ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_every_recipe_fits_the_schema(validator: Any, path: Path) -> None:
    problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(read(path).data)]
    assert not problems


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"sed": 1}, "$"),
        ({"plugins": {"sparta": {"rank_specific": 0}}}, "$.plugins.sparta.rank_specific"),
        ({"plugins": {"sparta": {"scael": 1}}}, "$.plugins.sparta"),
        ({"steps": [{"title": "no name"}]}, "$.steps[0]"),
        ({"seed": -1}, "$.seed"),
    ],
)
def test_the_schema_refuses_what_the_trainer_refuses(validator: Any, change: Any, where: str) -> None:
    good = {"model": "tiny-random", "data": "tiny", "plugins": {"sparta": {"rank_specific": 4}}}
    assert not list(validator.iter_errors(good))
    assert {error.json_path for error in validator.iter_errors({**good, **change})} >= {where}


def test_the_command_prints_it(trainer: Callable[..., Any]) -> None:
    assert json.loads(trainer("schema").out)["title"] == "Recipe"
    assert yaml.safe_load(locate("sparta:claim").read_text(encoding="utf-8"))
