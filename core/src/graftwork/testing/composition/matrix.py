"""The table of all pairs: which compose, which are refused and with which sentence."""

from __future__ import annotations

import itertools
import json
import random
import re
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.testing.composition.compose import Composer, Outcome, write_stored

COMPOSES, BROKEN = "o", "!"
LETTERS = string.ascii_lowercase.replace(COMPOSES, "") + string.ascii_uppercase


@dataclass
class Matrix:
    """What came of every plugin alone, of pairs, and of some triples.

    Attributes:
        names: the plugins of the rows and columns, sorted.
        outcomes: by the sorted names of a combination.
    """

    names: list[str]
    outcomes: dict[tuple[str, ...], Outcome] = field(default_factory=dict)

    @property
    def broken(self) -> list[Outcome]:
        """What neither composes nor is refused as it should be."""
        return [one for one in self.outcomes.values() if one.verdict == "broken"]

    def of_size(self, size: int) -> list[Outcome]:
        """Return the outcomes of combinations of so many plugins."""
        return [one for names, one in self.outcomes.items() if len(names) == size]

    def summary(self) -> list[str]:
        """Return a line for the plugins alone, the pairs, and the triples: tried, composes, refused, broken."""
        lines = []
        for size, what in ((1, "plugins alone"), (2, "pairs"), (3, "triples")):
            found = self.of_size(size)
            if found:
                counts = {
                    v: sum(one.verdict == v for one in found) for v in ("composes", "refused", "broken")
                }
                told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
                lines.append(f"{len(found)} {what}: {told}")
        return lines

    def reasons(self) -> dict[str, str]:
        """Return a letter for every way in which a pair is refused, the most frequent first; A and B stand for the
        two names."""
        counts: dict[str, int] = {}
        for one in self.of_size(2):
            if one.verdict == "refused":
                reason = pattern(one)
                counts[reason] = counts.get(reason, 0) + 1
        ranked = sorted(counts, key=lambda reason: (-counts[reason], reason))
        return {reason: LETTERS[number % len(LETTERS)] for number, reason in enumerate(ranked)}

    def rows(self) -> list[str]:
        """Return the table: a row per plugin, a column per plugin up to itself, which is the plugin alone."""
        letters, width = self.reasons(), max(map(len, self.names), default=0)
        lines = []
        for number, name in enumerate(self.names):
            cells = [self._cell(tuple(sorted({name, other})), letters) for other in self.names[: number + 1]]
            lines.append(f"{number + 1:>3} {name.ljust(width)} {''.join(cells)}")
        return lines

    def _cell(self, key: tuple[str, ...], letters: dict[str, str]) -> str:
        one = self.outcomes.get(key)
        if one is None:
            return "-"
        if one.verdict == "refused":
            return letters.get(pattern(one), "x")
        return COMPOSES if one.verdict == "composes" else BROKEN

    def text(self) -> str:
        """Return the table, the sentences of the refusals, and the sums, for a terminal."""
        lines = [*self.rows(), "", f"{COMPOSES}: composes"]
        lines += [f"{letter}: {reason}" for reason, letter in self.reasons().items()]
        lines += [f"{BROKEN}: {' + '.join(one.plugins)}: {one.detail}" for one in self.broken]
        return "\n".join([*lines, "", *self.summary()])

    def markdown(self) -> str:
        """Return a page: what the table says, the table, the refusals, and which order composes where one does not."""
        sums = "\n".join(f"- {line}" for line in self.summary())
        table = "\n".join(self.rows())
        refusals = "\n".join(
            f"| {letter} | {self._count(reason)} | {reason} |" for reason, letter in self.reasons().items()
        )
        turned = "\n".join(
            f"| {' '.join(f'`--plugin {name}`' for name in one.plugins)} |"
            for names, one in sorted(self.outcomes.items())
            if len(names) == 2 and one.verdict == "composes" and one.plugins != names
        )
        return PAGE.format(sums=sums, table=table, refusals=refusals, turned=turned or "| none |")

    def _count(self, reason: str) -> int:
        return sum(one.verdict == "refused" and pattern(one) == reason for one in self.of_size(2))


PAGE = """# Which plugins go together

Every plugin alone, every pair, and triples drawn with a seed, on a model of four small layers: it learns two tasks for
two steps each, is transformed, and answers, in each command with the plugins that take part in it; it is saved, read
again in another process, and must give the same bits there. Written by `trainer plugins matrix --markdown`; `make
matrix` compares this page with what comes out.

{sums}

A pair composes where losses are finite, each of the two changes losses, weights or answers, and the stored model is
the one that was measured. All others are refused in a sentence before weights are read.

Row and column are plugins by number; the last letter of a row is the plugin alone. `o` composes.

```text
{table}
```

| letter | pairs | A and B are refused with |
|---|---|---|
{refusals}

Where the order of the names decides, this one composes and the other is refused:

| order |
|---|
{turned}
"""


def pattern(outcome: Outcome) -> str:
    """Return the sentence of a refusal with A and B in the place of the names, in the order in which they occur."""
    names = sorted(outcome.plugins, key=lambda name: (_at(outcome.detail, name), name))
    text = outcome.detail
    # The longest first: one name may be a part of another.
    for name in sorted(outcome.plugins, key=len, reverse=True):
        letter = string.ascii_uppercase[names.index(name)]
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", letter, text)
    return re.sub(r"'[^' ]*/[^' ]*'", "'MODEL'", text)


def _at(text: str, name: str) -> int:
    found = re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)
    return found.start() if found else len(text)


def pairs_of(names: Sequence[str], all_names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the plugins ``names`` alone and every unordered pair of one of them with any of ``all_names``."""
    wanted = {(name,) for name in names}
    wanted |= {tuple(sorted((one, other))) for one in names for other in all_names if one != other}
    return sorted(wanted, key=lambda one: (len(one), one))


def triples_of(names: Sequence[str], count: int, seed: int) -> list[tuple[str, ...]]:
    """Return ``count`` triples drawn without repetition; all where there are fewer."""
    every = list(itertools.combinations(sorted(names), 3))
    return sorted(random.Random(seed).sample(every, min(count, len(every))))


def make_matrix(
    composer: Composer,
    names: Sequence[str],
    all_names: Sequence[str],
    *,
    combinations: Sequence[tuple[str, ...]] | None = None,
    triples: int = 0,
    seed: int = 0,
    console: Console | None = None,
) -> Matrix:
    """Try plugins ``names`` alone and with any of ``all_names``, or the ``combinations`` given, and some triples.

    Every model that was written is read again in one further process.
    """
    console = console or Console(enabled=False)
    wanted = list(combinations) if combinations is not None else pairs_of(names, all_names)
    wanted += triples_of(all_names, triples, seed)
    matrix = Matrix(sorted(all_names))
    with console.bar(len(wanted), "combinations", "combination") as bar:
        for one in wanted:
            matrix.outcomes[one] = composer.outcome(one)
            bar.update(1)
    stored = [(names, one) for names, one in matrix.outcomes.items() if one.stored]
    path = composer.folder / "stored.json"
    write_stored([one for _, one in stored], path)
    for number in _changed(path):
        names, one = stored[number]
        detail = "logits or answers differ when the stored model is read in another process"
        matrix.outcomes[names] = replace(one, verdict="broken", detail=detail)
    return matrix


def _changed(path: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-m", "graftwork.testing.composition.reload", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise UserError(f"the process that reads the stored models again ended with: {last}")
    return list(json.loads(done.stdout.strip().splitlines()[-1]))
