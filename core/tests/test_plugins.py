"""Finding, selecting and calling plugins."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from graftwork import PluginError, UserError, hookimpl
from graftwork.data.layouts import RawTask
from graftwork.data.options import DataOptions
from graftwork.data.stream import build_stream
from graftwork.plugins import Plugins, construct, discover, find
from graftwork.testing.packages import install_plugin


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


GOOD = """
from pydantic import BaseModel, ConfigDict, Field

class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    strength: float = Field(0.5, gt=0, le=1)

class Plugin:
    Options = Options
    def __init__(self, options):
        self.options = options
"""


def test_discovery_reads_metadata_and_runs_no_code(site: Path) -> None:
    install_plugin(site, "loud", "loud_plugin:Plugin", "raise SystemExit('imported')")
    info = discover()["loud"]
    assert (info.distribution, info.version) == ("graftwork-loud", "1.0")


def test_construct_validates_options(site: Path) -> None:
    install_plugin(site, "good", "good_plugin:Plugin", GOOD)
    assert construct("good", {"strength": 1}).options.strength == 1.0
    for options, said in (
        ({"strenght": 1}, "plugin 'good': unknown option 'strenght' (did you mean 'strength'?)"),
        ({"strength": 2}, "option 'strength' = 2: input should be less than or equal to 1"),
        ({"strength": "much"}, "option 'strength' = 'much'"),
    ):
        with pytest.raises(UserError) as caught:
            construct("good", options)
        assert said in str(caught.value)


def test_unknown_plugin_names_the_package_to_install(site: Path) -> None:
    install_plugin(site, "good", "good_plugin2:Plugin", GOOD)
    with pytest.raises(UserError) as caught:
        find("goood")
    assert "pip install graftwork-goood" in str(caught.value)
    assert "did you mean 'good'?" in str(caught.value)


def test_a_plugin_whose_import_fails_is_named(site: Path) -> None:
    install_plugin(site, "broken", "broken_plugin:Plugin", "import a_module_that_is_not_there")
    with pytest.raises(UserError) as caught:
        construct("broken", {})
    assert "plugin 'broken' (package graftwork-broken 1.0) cannot be imported" in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_entry_point_that_is_no_class_is_refused(site: Path) -> None:
    install_plugin(site, "odd", "odd_plugin:Plugin", "Plugin = 3")
    with pytest.raises(UserError, match="where a class is expected"):
        construct("odd", {})


def test_two_packages_with_the_same_plugin_are_refused(site: Path) -> None:
    install_plugin(site, "twin", "twin_a:Plugin", GOOD)
    install_plugin(site, "twin", "twin_b:Plugin", GOOD, package="graftwork-twin-two")
    with pytest.raises(UserError, match="offered by two installed packages"):
        discover()


class Terms:
    def __init__(self, *terms: str) -> None:
        self.terms = list(terms)

    @hookimpl
    def loss_terms(self, run, model):
        return self.terms


class Failing:
    @hookimpl
    def loss_terms(self, run, model):
        raise ZeroDivisionError("inside")


def test_results_come_in_plugin_order_with_their_names() -> None:
    plugins = Plugins({"b": Terms("1"), "a": Terms("2", "3")})
    assert plugins.call("loss_terms", run=None, model=None) == [("b", ["1"]), ("a", ["2", "3"])]


def test_a_plugin_that_raises_is_named_with_its_hook() -> None:
    plugins = Plugins({"good": Terms(), "bad": Failing()})
    with pytest.raises(
        PluginError, match="plugin 'bad' failed in hook 'loss_terms': ZeroDivisionError: inside"
    ) as caught:
        plugins.call("loss_terms", run=None, model=None)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_two_answers_where_one_is_allowed_name_both_plugins() -> None:
    class Adapting:
        @hookimpl
        def adapter_config(self, run, model):
            return "an adapter"

    plugins = Plugins({"x": Adapting(), "y": Adapting()})
    with pytest.raises(UserError, match="plugins 'x' and 'y' cannot be combined") as caught:
        plugins.call_one("adapter_config", run=None, model=None)
    assert "a whole-model adapter (hook adapter_config)" in str(caught.value)
    assert "leave one of them out" in str(caught.value)


def test_a_hook_that_does_not_exist_is_refused() -> None:
    class Typo:
        @hookimpl
        def los_terms(self, run, model):
            return []

    with pytest.raises(UserError, match="does not fit this version of the hooks"):
        Plugins({"typo": Typo()})


def test_options_of_a_plugin_without_any_must_be_empty(site: Path) -> None:
    install_plugin(
        site, "bare", "bare_plugin:Plugin", "class Plugin:\n    def __init__(self, options): pass\n"
    )
    construct("bare", {})
    with pytest.raises(UserError, match="unknown option 'x'"):
        construct("bare", {"x": 1})


class Source:
    """A plugin that reads data of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def data_sources(self, run):
        def layout(path: Path):
            rows = [{"prompt": line, "completion": " x"} for line in path.read_text().splitlines()]
            return {"lines": lambda: RawTask("lines", "completion", rows)}

        return {self.name: layout}


def test_a_plugin_reads_data_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a\nb\n")
    sources = Plugins({"reader": Source("notes")}).data_sources(None)
    options = DataOptions(source=f"notes:{tmp_path / 'notes.txt'}")
    (task,) = build_stream(options, seed=0, sources=sources)
    assert (task.name, task.train["prompt"]) == ("lines", ["a", "b"])


def test_a_plugin_makes_data_of_its_own() -> None:
    def layout(path: Path):
        rows = [{"prompt": str(number), "completion": " x"} for number in range(int(path.name))]
        return {"made": lambda: RawTask("made", "completion", rows)}

    (task,) = build_stream(DataOptions(source="made:3"), seed=0, sources={"made": layout})
    assert task.train["prompt"] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("plugins", "owner"),
    [({"b": Source("jsonl")}, "graftwork itself"), ({"a": Source("n"), "b": Source("n")}, "plugin 'a'")],
)
def test_a_data_source_has_one_owner(plugins: dict, owner: str) -> None:
    with pytest.raises(UserError, match=rf"plugin 'b' names a data source .*, which {owner} has already"):
        Plugins(plugins).data_sources(None)
