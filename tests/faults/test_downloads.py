"""A model that comes from the hub, whole or not at all, and a sentence where it does not come."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from graftwork.testing.hub import WEIGHTS, Hub
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.processes import Started, Warm

Told = Callable[[Started], str]
Ask = Callable[[str], Started]


@pytest.fixture
def ask(server: Warm, served: Hub, tmp_path: Path) -> Ask:
    """Let a model of some name, not in the cache yet, answer a prompt."""
    served.asked.clear()

    def call(name: str, plugin: str = "graftwork.testing.hub:impatient") -> Started:
        words = ["generate", "--model", f"tiny/{name}", "--prompt", "hello", "--set", "max_new_tokens=4"]
        return server.run(words, tmp_path / "log", before=plugin)

    return call


def _got(served: Hub) -> list[str | None]:
    """Return from where on the weights were asked for."""
    return [begin for method, file, begin in served.asked if (method, file) == ("GET", WEIGHTS)]


def test_a_connection_that_breaks_in_the_middle_of_the_weights(ask: Ask, served: Hub, sentence: Told) -> None:
    served.cut = (served.folder / WEIGHTS).stat().st_size // 2
    try:
        said = sentence(ask("cut"))
    finally:
        served.cut = None
    assert said.startswith(f"model 'tiny/cut' has not come whole from {served.url}")
    assert said.endswith("nothing of it is used; try again")
    assert _got(served)
    again = ask("cut")
    assert again.poll() == 0, again.said()
    served.asked.clear()
    assert ask("cut").said() == again.said()
    assert _got(served) == [], "what has come is not fetched again"


def test_a_download_goes_on_where_it_broke_off(ask: Ask, served: Hub, tmp_path: Path) -> None:
    """More than huggingface_hub writes at once, so that it has something to go on with."""
    small, large = served.folder, tmp_path / "large"
    tiny_checkpoint(large, vocab_size=40_000, hidden_size=128)
    served.folder, served.once = large, 12 * 2**20
    try:
        assert ask("large").poll() == 0
    finally:
        served.folder = small
    first, second = _got(served)
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) >= 10 * 2**20


def test_other_weights_after_a_break_are_not_mixed_with_the_first(
    ask: Ask, served: Hub, sentence: Told, tmp_path: Path
) -> None:
    wanted = ask("calm").said()
    first = tmp_path / "first"
    shutil.copytree(served.folder, first)
    tiny_checkpoint(first, seed=7)
    second, served.folder = served.folder, first
    served.cut = (first / WEIGHTS).stat().st_size // 2
    try:
        sentence(ask("changed"))
    finally:
        served.folder, served.cut = second, None
    again = ask("changed")
    assert again.poll() == 0
    assert again.said() == wanted


def test_weights_that_are_said_to_be_longer_are_not_taken(ask: Ask, served: Hub, sentence: Told) -> None:
    served.claimed = (served.folder / WEIGHTS).stat().st_size + 100
    try:
        said = sentence(ask("longer"))
    finally:
        served.claimed = None
    assert said.startswith("model 'tiny/longer' has not come whole")
    assert ask("longer").poll() == 0


def test_weights_that_are_said_to_be_shorter_are_not_taken(ask: Ask, served: Hub, sentence: Told) -> None:
    """The hub's client keeps them, since their size is the promised one; we name the file."""
    served.claimed = (served.folder / WEIGHTS).stat().st_size - 100
    try:
        said = sentence(ask("shorter"))
    finally:
        served.claimed = None
    assert said.startswith("model 'tiny/shorter': a safetensors file is damaged")
    found = re.search(r"; remove '(.*)' to fetch it again$", said)
    assert found is not None
    assert sentence(ask("shorter")) == said
    Path(found[1]).unlink()
    assert ask("shorter").poll() == 0


def test_a_hub_that_cannot_be_reached(ask: Ask, served: Hub, sentence: Told) -> None:
    with served.down():
        said = sentence(ask("far"))
    assert said.startswith(f"model 'tiny/far' is not in the cache, and {served.url} cannot be reached")
    assert "look at the network" in said
    assert "HF_HUB_OFFLINE=1" in said


def test_offline_names_the_way_out(ask: Ask, sentence: Told) -> None:
    said = sentence(ask("away", "graftwork.testing.hub:offline"))
    assert said.startswith("model 'tiny/away' is not in the cache, and HF_HUB_OFFLINE keeps from the network")
