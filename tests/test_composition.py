"""Any two plugins: what the page of all pairs says is what comes out. `make matrix` tries all of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.plugins import discover
from graftwork.testing.composition import Composer, Matrix, make_matrix
from graftwork.testing.composition.matrix import pairs_of, pattern, triples_of

PAGE = Path(__file__).parent / "COMPOSITION.md"
TRIPLES = 60
SAMPLE, SEED = 14, 20261129


def table() -> tuple[list[str], dict[tuple[str, ...], str], dict[str, str]]:
    """Return the names on the page, the cell of every combination, and the sentence of every letter."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^ *\d+ (\S+) +(\S+)$", text.partition("```text")[2].partition("```")[0], re.MULTILINE)
    names = [name for name, _ in rows]
    cells = {
        tuple(sorted({name, names[column]})): cell for name, row in rows for column, cell in enumerate(row)
    }
    reasons = dict(re.findall(r"^\| (\w) \| \d+ \| (.+) \|$", text, re.MULTILINE))
    return names, cells, reasons


@pytest.fixture(scope="module")
def composer(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    return Composer(tmp_path_factory.mktemp("composition"))


def test_the_page_has_every_plugin_and_every_pair() -> None:
    names, cells, reasons = table()
    assert names == list(discover())
    assert cells.keys() == set(pairs_of(names, names))
    assert set(cells.values()) <= {"o", *reasons}
    # Every plugin works alone.
    assert all(cells[name,] == "o" for name in names)


def test_a_sample_of_pairs_is_what_the_page_says(composer: Composer) -> None:
    names, cells, reasons = table()
    # Two that train take a second or two: the sample takes fewer of them, all of which `make matrix` tries.
    drawn = random.Random(SEED).sample(sorted(key for key in cells if len(key) == 2), SAMPLE)
    matrix = make_matrix(composer, names, names, combinations=drawn)
    for key in drawn:
        outcome = matrix.outcomes[key]
        assert outcome.verdict == ("composes" if cells[key] == "o" else "refused"), outcome
        if outcome.verdict == "refused":
            assert pattern(outcome) == reasons[cells[key]]


@pytest.mark.slow
def test_the_whole_page(composer: Composer) -> None:
    names = list(discover())
    matrix = make_matrix(composer, names, names, triples=TRIPLES, seed=0)
    print(matrix.text())
    assert matrix.broken == []
    assert len(matrix.of_size(3)) == TRIPLES
    assert matrix.markdown() == PAGE.read_text(encoding="utf-8")


STILL = """
from graftwork import LossTerm, hookimpl
import torch

class Plugin:
    "A term that is always zero."
    def __init__(self, options): pass

    @hookimpl
    def loss_terms(self, run, model):
        return [LossTerm("still", lambda model, batch: torch.zeros((), requires_grad=True))]
"""
LATE = """
from graftwork import UserError, hookimpl

class Plugin:
    "Refuses when it is too late, and does not say whom."
    def __init__(self, options): pass

    @hookimpl
    def check(self, run):
        if len(run.plugins.objects) > 1:
            raise UserError("not with anybody else")

    @hookimpl
    def task_begin(self, run, task, trainer):
        raise UserError("not today")
"""


def test_a_plugin_without_an_effect_is_told(install: Any, composer: Composer) -> None:
    install("still", "still_module", STILL)
    outcome = composer.outcome(["still"])
    assert outcome.verdict == "broken"
    assert "'still' changes nothing" in outcome.detail


def test_a_refusal_that_comes_late_or_names_nobody_is_no_refusal(install: Any, composer: Composer) -> None:
    install("late", "late_module", LATE)
    alone = composer.outcome(["late"])
    assert (alone.verdict, alone.detail) == ("broken", "refused only after it began: not today")
    paired = composer.outcome(["ewc", "late"])
    assert paired.verdict == "broken"
    assert "without both names" in paired.detail


def test_a_command_prints_the_row_of_one_plugin(
    install: Any, trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "graftwork.commands.ecosystem.discover", lambda: {"cad": None, "coiecd": None, "dola": None}
    )
    page = tmp_path / "page.md"
    outcome = trainer("plugins", "matrix", "cad", "--markdown", page)
    assert outcome.code == 0, outcome.out
    assert "1 plugins alone: 1 composes, 0 refused, 0 broken" in outcome.out
    assert "2 pairs: 0 composes, 2 refused, 0 broken" in outcome.out
    assert "plugins 'A' and 'B' cannot be combined: each brings a combiner of two prompts" in page.read_text()
    assert trainer("plugins", "matrix", "no-such-plugin").code == 2


def test_triples_are_drawn_by_the_seed() -> None:
    names = ["a", "b", "c", "d", "e"]
    assert triples_of(names, 4, 0) == triples_of(names[::-1], 4, 0)
    assert len(triples_of(names, 100, 0)) == 10
    assert Matrix(names).rows()[1] == "  2 b --"
