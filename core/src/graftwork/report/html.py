"""report.html: one self-contained page with verdicts, tables and figures."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.files import write_text_atomic
from graftwork.report import areas, cosines, heat, measured, plots
from graftwork.report.css import CSS
from graftwork.report.summary import (
    Cells,
    Job,
    by_arm,
    by_order,
    comparison,
    general_cells,
    label,
    score_cells,
    scored,
    untouched,
)
from graftwork.report.words import clean, clean_lines, count, mebibytes, percent, seconds, short

FEW_TASKS = 6
HEAT_MAPS = (6, 16)
"""Arms per figure of matrices, of many and of few tasks."""

SHOWN_ORDERS = 3
"""Task orders whose figures stand open on the page; those of the others are folded."""

WIDEST = 12
"""Columns of the comparison that fit the page side by side."""

_VERDICTS = {
    "held": ("held", "✓"),
    "refuted": ("refuted", "✗"),
    "not held": ("refuted", "✗"),
    "not decided": ("open", "?"),
}
_MEANINGS = {
    "AP": "AP: mean accuracy over all tasks at the end.",
    "LA": "LA: mean accuracy right after each task was learned.",
    "BWT": "BWT: change of a task from then to the end; negative means forgotten.",
    "FWT": "FWT: gain on a task before it is learned.",
    "forgetting": "Forgetting: loss since a task's best.",
    "unseen": "Unseen: accuracy on tasks that were never trained.",
    "invalid": "Invalid: answers that are no label of the task.",
    "trained": "Trained: parameters that are trained.",
    "adapter": "Adapter: all adapters that are kept, as files.",
    "state": "State: what the method keeps between tasks besides.",
    "statistics": "Statistics: time of the method before and after a task, such as passes over its data.",
    "peak": "Peak: most memory used at once.",
}
_UNITS = {"%", "points", "s", "MiB"}


def render(result: Mapping[str, Any]) -> str:
    """Return the page for the results of a run (see ``results.json``)."""
    return _Page(result).render()


def write_report(result: Mapping[str, Any], path: Path) -> None:
    """Write the page to ``path``, complete or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    write_text_atomic(Path(path), render(result))


class _Page:
    """The sections of one page, in reading order; counts figures, whose ids must differ."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.result = result
        self.jobs: list[Job] = list(result.get("jobs") or [])
        self.numbers = plots.arm_numbers(self.jobs)
        self.figures: Iterator[int] = itertools.count(1)

    def render(self) -> str:
        sections = [
            ("verdict", "What was claimed, and what came out", self.verdict()),
            ("measured", "What was measured", self.measured()),
            ("comparison", "Comparison", self.comparison()),
            ("scores", "Accuracy on every task, after every task", self.scores()),
            ("curves", "Forgetting, task by task", self.curves()),
            ("capacity", "What the method has used up", self.capacity()),
            ("updates", "How the tasks' updates point", self.updates()),
            ("losses", "Training loss", self.losses()),
            ("general", "General ability", self.general()),
            ("runs", "Every run", "".join(self.run(job) for job in self.jobs)),
            ("leaks", "What the prompts give away", self.leaks()),
            ("settings", "Settings", self.settings()),
            ("repeat", "How to repeat this", self.repeat()),
        ]
        if not self.jobs:
            sections.insert(0, ("empty", "No runs", "<p>Nothing was run, so there is nothing to show.</p>"))
        shown = [(anchor, title, body) for anchor, title, body in sections if body]
        links = " ".join(f'<a href="#{anchor}">{_text(title)}</a>' for anchor, title, _ in shown)
        body = "\n".join(
            f'<section id="{anchor}"><h2>{_text(title)}</h2>\n{inner}</section>'
            for anchor, title, inner in shown
        )
        title = _text(self.result.get("title") or "Report")
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            f'<h1>{title}</h1>\n<p class="sub">{self.subtitle()}</p>\n{self.headline()}<nav>{links}</nav>\n'
            f"{body}\n</body>\n</html>\n"
        )

    def subtitle(self) -> str:
        arms, runs = len(by_arm(self.jobs)), len(self.jobs)
        size = self.result.get("size")
        facts = [self.result.get("model"), f"size {size}" if size else "", _plural(arms, "method")]
        return " · ".join(_text(fact) for fact in [*facts, _plural(runs, "run")] if fact)

    def headline(self) -> str:
        verdicts = [str(claim.get("verdict", "")) for claim in self.result.get("expect") or []]
        if not verdicts:
            return ""
        counts = [(word, verdicts.count(word)) for word in dict.fromkeys(verdicts)]
        if len(counts) == 1 and len(verdicts) > 1:
            words = f"All {len(verdicts)} claims: {counts[0][0]}"
        else:
            words = f"Of {_plural(len(verdicts), 'claim')}: " + ", ".join(f"{n} {word}" for word, n in counts)
        return f'<p class="headline">{_text(words)}</p>\n'

    def verdict(self) -> str:
        claims = self.result.get("expect") or []
        rows = []
        for claim in claims:
            word = str(claim.get("verdict", ""))
            style, sign = _VERDICTS.get(word, ("open", "?"))
            rows.append(
                f"<tr><td><code>{_text(claim.get('text', ''))}</code></td>"
                f'<td><span class="chip {style}">{sign} {_text(word)}</span></td>'
                f"<td>{_text(claim.get('detail', ''))}</td></tr>"
            )
        heads = "<tr><th>claim</th><th>verdict</th><th>measured</th></tr>"
        note = "Not decided: the interval includes the claimed border, so these runs cannot tell."
        table = f'<div class="scroll"><table class="words">{heads}{"".join(rows)}</table></div>'
        undecided = any(claim.get("verdict") == "not decided" for claim in claims)
        return (table + (_note(note) if undecided else "")) if claims else ""

    def measured(self) -> str:
        """Show, for each benchmark, a table of the arms, what its metrics are, and the charts of every arm."""
        parts = []
        groups = measured.measured(self.jobs)
        for benchmark, jobs in groups.items():
            if len(groups) > 1:
                parts.append(f"<h3>{_text(benchmark)}</h3>")
            words = "; ".join(f"{key}: {text}" for key, text in measured.metric_words(jobs).items())
            parts.append(_table(measured.metric_cells(jobs)) + _note(f"{words}." if words else ""))
            shared = measured.together(jobs)
            parts += [self.line_chart(chart, chart["title"]) for chart in shared]
            drawn = {chart["title"] for chart in shared}
            arms = by_arm(jobs)
            for arm, members in arms.items():
                own = [chart for chart in members[0].get("lines") or () if chart["title"] not in drawn]
                heads = [chart["title"] if len(arms) == 1 else f"{arm}: {chart['title']}" for chart in own]
                figures = "".join(map(self.line_chart, own, heads))
                parts.append(
                    _fold(_text(f"{arm}: its own charts"), figures) if figures and shared else figures
                )
        return "".join(parts)

    def line_chart(self, chart: Mapping[str, Any], head: str) -> str:
        draw = heat.heat_map if "columns" in chart else measured.line_chart
        drawn = self.figure(draw(chart), str(chart.get("caption") or ""))
        return f"<h4>{_text(head)}</h4>{drawn}" if drawn else ""

    def comparison(self) -> str:
        trained = [job for job in self.jobs if not job.get("benchmark")]
        if not trained:
            return ""
        heads, rows = comparison(trained)
        if not scored(trained):
            return _table((heads, rows)) if len(heads) > 1 else ""
        # What does not fit the page in one table is two: how well, and at what cost.
        tables = [(heads, rows)]
        if len(heads) > WIDEST:
            tables = [comparison(trained, cost=cost) for cost in (False, True)]
        base = untouched(trained)
        note = [
            *(words for start, words in _MEANINGS.items() if any(head.startswith(start) for head in heads)),
            "±: standard deviation over runs." if len(trained) > len(by_arm(trained)) else "",
            f"The untouched model scores {percent(base)} % on these tasks." if base is not None else "",
        ]
        figure = plots.bars(scored(trained), self.numbers) if len(by_arm(trained)) > 1 else ""
        caption = "Mean over runs; whiskers are one standard deviation, each dot is one run."
        drawn = "".join(_table(cells) for cells in tables if len(cells[0]) > 1)
        return drawn + _note(" ".join(filter(None, note))) + self.figure(figure, caption)

    def scores(self) -> str:
        caption = (
            "Percent, mean over runs. A row is the model after a task, a column one task: read downwards to "
            "see it learned (bold) and forgotten. Left of the steps are the tasks learned so far."
        )
        return self.per_order(scored(self.jobs), plots.heat_maps, caption, *HEAT_MAPS)

    def curves(self) -> str:
        jobs = [job for job in scored(self.jobs) if len(job["order"]) > 1]
        caption = (
            "The dashed line marks where the task of the panel is learned; right of it, falling lines are "
            "forgetting. 0 is the untouched model. Bands are one standard deviation over runs."
        )
        return self.per_order(
            jobs, lambda jobs: plots.forgetting_curves(jobs, self.numbers), caption, plots.LINES
        )

    def capacity(self) -> str:
        """Draw what plugins say of themselves (hook charts): a figure and a table per method, chart and order."""
        parts = []
        groups = by_order([job for job in self.jobs if job.get("charts")])
        for number, group in enumerate(groups):
            if len(groups) > 1:
                parts.append(self.order_head(group))
            drawn = [
                f"<h4>{_text(f'{arm}: {chart.title}')}</h4>"
                + self.figure(areas.area_chart(chart), f"{chart.caption} {chart.over_runs}".strip())
                + _table(areas.used_cells(chart))
                for arm, members in by_arm(group).items()
                for chart in areas.charts(members)
            ]
            folded = number >= SHOWN_ORDERS and drawn
            parts.append(_fold("the charts of this order", "".join(drawn)) if folded else "".join(drawn))
        return "".join(parts)

    def updates(self) -> str:
        jobs = [job for job in self.jobs if cosines.measured(job)]
        errors = [job["interference_error"] for job in jobs if job.get("interference_error")]
        error = (
            f" Estimated from sketches, with a standard error of at most {max(errors):.2g}." if errors else ""
        )
        caption = (
            "The cosine between the changes that two tasks made to the weights, over all adapted layers together, "
            "mean over runs. 1: the later task moved the weights in the direction of the earlier one; 0: in "
            "directions of its own; \N{MINUS SIGN}1: it took the earlier change back."
        )
        limit = cosines.scale(jobs)
        drawn = self.per_order(jobs, lambda jobs: cosines.heat_maps(jobs, limit), caption + error, *HEAT_MAPS)
        unknown = [arm for arm in by_arm(self.jobs) if arm not in by_arm(jobs)]
        words = (
            f"Not known for {', '.join(unknown)}; notes below 'Every run' say why, where it was asked for."
        )
        return drawn + _note(words) if drawn and unknown else drawn

    def losses(self) -> str:
        caption = (
            "Mean over the runs of a method; the band goes from the lowest to the highest run. Dashed lines "
            "separate the tasks. A cross on the axis marks a loss that is not a finite number."
        )
        return self.per_order(
            [job for job in self.jobs if job.get("losses")],
            lambda jobs: plots.loss_curves(jobs, self.numbers),
            caption,
            plots.LINES,
        )

    def per_order(
        self,
        jobs: Sequence[Job],
        draw: Callable[[Sequence[Job]], str],
        caption: str,
        few: int,
        many: int | None = None,
    ) -> str:
        """Draw the jobs of every task order, at most ``few`` arms in a figure (``many`` where tasks are few).

        What would be much is folded.
        """
        parts = []
        groups = by_order(jobs)
        for number, group in enumerate(groups):
            arms = by_arm(group)
            names = list(arms)
            limit = many if many and len(group[0].get("order") or ()) <= FEW_TASKS else few
            pieces = [names[k : k + limit] for k in range(0, len(names), limit)]
            if len(groups) > 1:
                parts.append(self.order_head(group))
            for place, piece in enumerate(pieces):
                drawn = self.figure(draw([job for arm in piece for job in arms[arm]]), caption)
                caption = "" if drawn else caption  # said once
                if drawn and (place or number >= SHOWN_ORDERS):
                    drawn = _fold(_text(", ".join(short(arm, 40) for arm in piece)), drawn)
                parts.append(drawn)
        return "".join(parts) if any(part.startswith(("<figure", "<details")) for part in parts) else ""

    @staticmethod
    def order_head(group: Sequence[Job]) -> str:
        return f"<h3>{_text(' → '.join(map(str, group[0].get('order') or ())))}</h3>"

    def general(self) -> str:
        jobs = [job for job in self.jobs if job.get("general")]
        caption = "Hollow: before training. Filled: after. Mean over runs."
        return self.figure(plots.general_ability(jobs, self.numbers), caption) if jobs else ""

    def run(self, job: Job) -> str:
        total, trained = job.get("total_parameters"), job.get("trainable_parameters")
        share = f" ({100 * trained / total:.2g} %)" if trained and total else ""
        facts = {
            "trained parameters": f"{count(trained)} of {count(total)}{share}" if trained and total else "",
            "state kept": _shown(job.get("extra_state_bytes"), mebibytes, " MiB"),
            "steps": _shown(job.get("steps"), count, ""),
            "adapters": _shown(job.get("adapter_bytes"), mebibytes, " MiB"),
            "training": _shown(job.get("train_seconds"), seconds, " s"),
            "statistics": _shown(job.get("statistics_seconds"), seconds, " s"),
            "evaluation": _shown(job.get("eval_seconds"), seconds, " s"),
            "peak memory": _shown(job.get("peak_memory_bytes"), mebibytes, " MiB"),
        }
        inner = [_note(" · ".join(f"{key} {value}" for key, value in facts.items() if value))]
        if scored([job]):
            inner.append(_table(score_cells(job)))
        if job.get("general"):
            inner.append(_table(general_cells(job)))
        inner += [_note(str(note)) for note in job.get("notes") or ()]
        ap = (job.get("metrics") or {}).get("ap")
        summary = f"<b>{_text(label(job))}</b>" + (f"AP {percent(ap)} %" if ap is not None else "")
        return _fold(summary, "".join(inner))

    def leaks(self) -> str:
        arms: dict[str, list[str]] = {}
        for job in self.jobs:
            for leak in job.get("leaks") or ():
                if job["name"] not in arms.setdefault(str(leak), []):
                    arms[str(leak)].append(str(job["name"]))
        if not arms:
            return "<p>Nothing that was found.</p>" if scored(self.jobs) else ""
        everyone = len(by_arm(self.jobs))
        items = "".join(
            f"<li>{_text(leak)}{'' if len(names) == everyone else _text(' (' + ', '.join(names) + ')')}</li>"
            for leak, names in arms.items()
        )
        return f"<ul>{items}</ul>" + _note(
            "This makes the tasks easier to tell apart than they are in use, so forgetting looks smaller."
        )

    def settings(self) -> str:
        rows = []
        for arm, members in by_arm(self.jobs).items():
            # Runs of one arm usually share their options, and are then written once.
            for plugins in {_json(job.get("plugins") or {}): job for job in members}.values():
                chosen = plugins.get("plugins") or {}
                rows += [[arm, str(slug), _options(options)] for slug, options in chosen.items()] or [
                    [arm, "", ""]
                ]
        if not rows:
            return ""
        seeds = list(dict.fromkeys(str(job["seed"]) for job in self.jobs if job.get("seed") is not None))
        note = _note(f"Seeds: {', '.join(seeds)}.") if seeds else ""
        return _table((["method", "plugin", "options"], rows), words=True) + note

    def repeat(self) -> str:
        facts = [
            [group, str(key), value if isinstance(value, str) else _json(value)]
            for group in ("hardware", "versions")
            for key, value in (self.result.get(group) or {}).items()
        ]
        notes = [_note(str(note)) for note in self.result.get("notes") or ()]
        command = self.result.get("command")
        return "".join(
            [
                f"<pre>{html.escape(clean_lines(command))}</pre>" if command else "",
                *notes,
                _table((["", "", ""], facts), words=True) if facts else "",
            ]
        )

    def figure(self, svg: str, caption: str) -> str:
        if not svg:
            return ""
        words = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        return f"<figure>{_scoped(svg, next(self.figures))}{words}</figure>"


def _scoped(svg: str, number: int) -> str:
    """Return the SVG for use inside a page: its ids are its own, its namespace is the page's."""
    prefix = f"f{number}-"
    svg = re.sub(r' xmlns="[^"]*"', "", svg, count=1)
    svg = re.sub(r'(<[^<>]*?\bid=")', rf"\g<1>{prefix}", svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)


def _table(cells: Cells, *, words: bool = False) -> str:
    heads, rows = cells
    top = "".join(f"<th>{_head(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{_number(text)}</td>" for text in row) + "</tr>" for row in rows)
    style = ' class="words"' if words else ""
    first = f"<tr>{top}</tr>" if any(heads) else ""
    return f'<div class="scroll"><table{style}>{first}{body}</table></div>'


def _head(text: str) -> str:
    """Return a head with its unit on a line of its own."""
    start, _, unit = text.rpartition(" ")
    return f'{_text(start)} <span class="unit">{unit}</span>' if start and unit in _UNITS else _text(text)


def _number(text: str) -> str:
    """Return a cell; a negative number gets the sign that is as wide as a plus."""
    return _text(re.sub(r"^-(?=\d)", "\N{MINUS SIGN}", text))


def _fold(summary: str, inner: str) -> str:
    return f"<details><summary>{summary}</summary>{inner}</details>"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


def _options(options: Any) -> str:
    if not isinstance(options, Mapping):
        return _json(options)
    return ", ".join(f"{key}={_json(value)}" for key, value in options.items()) or "defaults"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _shown(value: float | None, show: Callable[[float], str], unit: str) -> str:
    return f"{show(value)}{unit}" if value else ""


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _text(value: Any) -> str:
    return html.escape(clean(value))
