"""A page that shows why every token was chosen: both predictions, the sets a token fell into, its score."""

from __future__ import annotations

import html
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.files import write_text_atomic
from graftwork.generate.prompts import Prompt
from graftwork.generate.trace import Candidate, Trace, TracedStep
from graftwork.report.css import CSS
from graftwork.report.words import clean, clean_lines

COLOURS = 8
"""Sets of tokens with a colour of their own; see ``--series-*`` in the style."""

_BEFORE = 8
"""Tokens that are decoded together with one, so that it gets its blank where the tokenizer hides it."""

_STYLE = """
.answer { position: relative; border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem;
  font-size: 1.05rem; line-height: 2.1; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer:has(details[open]) { padding-bottom: 1rem; margin-bottom: calc(var(--rows) * 2.1rem + 6.5rem); }
.token { display: inline-block; border: 0; padding: 0; margin: 0; }
.token summary { display: inline-block; line-height: 1.5; list-style: none; padding: .12rem .1rem;
  border-radius: .2rem; }
.token summary::-webkit-details-marker { display: none; }
.token[open] summary, .token summary:hover { outline: 2px solid var(--ink); }
.box { position: absolute; left: 0; right: 0; top: calc(100% + .5rem); background: var(--panel); z-index: 1;
  border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .9rem .6rem; line-height: 1.5;
  font-size: .95rem; white-space: normal; overflow-x: auto; }
.changed { font-weight: 700; }
.changed::after { content: "*"; color: var(--faint); font-weight: 400; }
.key { display: inline-block; padding: 0 .45rem; margin-right: .9rem; border-radius: .2rem; }
.piece { white-space: pre-wrap; font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
tr.taken td { background: color-mix(in srgb, var(--ink) 8%, transparent); }
@media print { .box { display: none; } .answer { break-inside: avoid; } }
"""


def render_trace(trace: Trace, tokenizer: Any, prompts: Sequence[Prompt], combiner: str) -> str:
    """Return the page, self-contained: every answer in coloured tokens, and what each was chosen from.

    ``trace`` has a row for each of ``prompts``; ``combiner`` is the name of what chose.

    Raises:
        ValueError: there are more or fewer prompts than rows.
    """
    return _TracePage(trace, tokenizer, prompts, combiner).render()


def write_trace(path: Path, trace: Trace, tokenizer: Any, prompts: Sequence[Prompt], combiner: str) -> None:
    """Write the page to ``path``, complete or not at all; see :func:`render_trace`.

    Raises:
        UserError: the place cannot be written.
    """
    write_text_atomic(Path(path), render_trace(trace, tokenizer, prompts, combiner))


class _TracePage:
    def __init__(self, trace: Trace, tokenizer: Any, prompts: Sequence[Prompt], combiner: str) -> None:
        self.rows = list(zip(prompts, trace.rows, strict=True))
        self.tokenizer = tokenizer
        self.combiner = combiner
        named = (
            name
            for row in trace.rows
            for step in row
            for one in (step.chosen, *step.candidates)
            for name in one.sets
        )
        self.colours = {name: number for number, name in enumerate(dict.fromkeys(named), 1)}
        self.steps = [step for row in trace.rows for step in row]

    def render(self) -> str:
        title = f"Why every token was chosen: {self.combiner}"
        style = _STYLE + "".join(
            f".set-{number} {{ background: color-mix(in srgb, var(--series-{number}) 24%, transparent); "
            f"box-shadow: inset 0 -3px var(--series-{number}); }}\n"
            for number in range(1, min(len(self.colours), COLOURS) + 1)
        )
        sections = "\n".join(
            self.section(number, prompt, row) for number, (prompt, row) in enumerate(self.rows, 1)
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(title)}</title>\n<style>{CSS}{style}</style>\n</head>\n<body>\n"
            f"<h1>{_text(title)}</h1>\n"
            "<p>Each token was chosen from two predictions of the next one: after the prompt, and after the "
            "contrast prompt, both followed by the answer so far. Open a token to see what else was in the "
            f"running.</p>\n{self.legend()}\n{sections}\n</body>\n</html>\n"
        )

    def legend(self) -> str:
        if not self.steps:
            return "<p>Nothing was generated.</p>"
        counted = Counter(name for step in self.steps for name in step.chosen.sets)
        keys = [
            f'<span class="key{self.colour((name,))}">{_text(name)}</span>{counted[name]} chosen'
            for name in self.colours
        ]
        changed = sum(map(_changed, self.steps))
        words = (
            f"Bold with *: not the likeliest after the prompt alone; {changed} of {len(self.steps)} tokens."
        )
        line = f'<p class="legend">{" &nbsp; ".join(keys)}</p>' if keys else ""
        return f'{line}\n<p class="note">{_text(words)}</p>'

    def section(self, number: int, prompt: Prompt, row: Sequence[TracedStep]) -> str:
        tokens = [step.chosen.token for step in row]
        most = max((len(step.candidates) for step in row), default=0)
        written = "".join(self.token(number, tokens[:place], step) for place, step in enumerate(row))
        answer = f'<div class="answer" style="--rows: {most}">{written}</div>' if row else "<p>No answer.</p>"
        steps = [self.step(place, tokens[: place - 1], step) for place, step in enumerate(row, 1)]
        return (
            f'<section id="prompt-{number}"><h2>Prompt {number}</h2>\n'
            f"{_fold('the prompt', prompt.main)}{_fold('the contrast prompt', prompt.contrast)}\n{answer}\n"
            + (_details("every step", _table(_STEP_HEADS, steps)) if row else "")
            + "</section>"
        )

    def token(self, number: int, before: Sequence[int], step: TracedStep) -> str:
        one = step.chosen
        hint = (
            f"{', '.join(one.sets) + ': ' if one.sets else ''}{_percent(one.main)} after the prompt, "
            f"{_percent(one.contrast)} after the contrast prompt"
        )
        rows = [
            (
                ' class="taken"' if candidate.token == one.token else "",
                [
                    self.piece(before, candidate),
                    _percent(candidate.main),
                    _percent(candidate.contrast),
                    _score(candidate.score),
                    self.sets(candidate),
                ],
            )
            for candidate in step.candidates
        ]
        style = f"{self.colour(one.sets)}{' changed' if _changed(step) else ''}".strip()
        shown = self.shown(before, one.token)
        # A line break stands after its token, where a reader expects it.
        broken = "\n" if "\u23ce" in shown else ""
        return (
            f'<details class="token" name="prompt-{number}"><summary class="{style}" title="{_text(hint)}">'
            f'{html.escape(shown)}</summary><div class="box">{_table(_CANDIDATE_HEADS, rows)}</div></details>'
            f"{broken}"
        )

    def step(self, place: int, before: Sequence[int], step: TracedStep) -> tuple[str, list[str]]:
        one, likeliest = step.chosen, _likeliest(step)
        instead = self.piece(before, likeliest) if _changed(step) else ""
        cells = [str(place), self.piece(before, one), _percent(one.main), _percent(one.contrast)]
        return "", [*cells, _score(one.score), self.sets(one), instead]

    def piece(self, before: Sequence[int], one: Candidate) -> str:
        return f'<span class="piece">{html.escape(self.shown(before, one.token))}</span>'

    def shown(self, before: Sequence[int], token: int) -> str:
        """Return a token's text as it stands in the answer; what cannot be seen is made visible."""
        start = list(before[-_BEFORE:])
        text, known = (self.tokenizer.decode(ids) for ids in ([*start, token], start))
        text = text[len(known) :] if text.startswith(known) else self.tokenizer.decode([token])
        text = "".join("\u23ce" if part == "\n" else clean(part) for part in text)
        return text if text else "\u2205"

    def sets(self, one: Candidate) -> str:
        return "".join(f'<span class="key{self.colour((name,))}">{_text(name)}</span>' for name in one.sets)

    def colour(self, sets: Sequence[str]) -> str:
        """Return the style of a token: that of the first of its sets."""
        number = self.colours[sets[0]] if sets else 0
        return f" set-{number}" if 0 < number <= COLOURS else ""


_CANDIDATE_HEADS = ["token", "after the prompt", "after the contrast prompt", "score", "set"]
_STEP_HEADS = ["step", *_CANDIDATE_HEADS, "likeliest after the prompt"]


def _likeliest(step: TracedStep) -> Candidate:
    """Return what the main prompt alone would have chosen; ties go to the lowest number, as in a search."""
    return min((step.chosen, *step.candidates), key=lambda one: (-one.main, one.token))


def _changed(step: TracedStep) -> bool:
    return step.chosen.main < _likeliest(step).main


def _percent(share: float) -> str:
    if 0 < share < 1e-4:
        return "<0.01 %"
    return f"{100 * share:.{1 if share >= 0.1 else 2}f} %"


def _score(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "ruled out"


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table of cells that are HTML already; a row may have attributes."""
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = "".join(
        f"<tr{attributes}>"
        + "".join(f"<td>{cell if '<span' in cell else _text(cell)}</td>" for cell in cells)
        + "</tr>"
        for attributes, cells in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _fold(name: str, prompt: str | Sequence[Mapping[str, str]] | None) -> str:
    if prompt is None:
        return ""
    text = (
        prompt
        if isinstance(prompt, str)
        else "\n".join(
            itertools.chain.from_iterable((f"[{turn['role']}]", turn["content"]) for turn in prompt)
        )
    )
    return _details(name, f"<pre>{html.escape(clean_lines(text))}</pre>")


def _details(summary: str, inner: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{inner}</details>"


def _text(value: Any) -> str:
    return html.escape(clean(value))
