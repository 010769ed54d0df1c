"""report.html: one self-contained page with verdicts, tables and figures."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.files import write_text_atomic
from graftwork.report import plots
from graftwork.report.summary import Job, comparison, orders
from graftwork.report.tables import score_cells

CSS = """
:root { color-scheme: light; --ink: #1a1a1a; --faint: #666; --line: #ddd; --paper: #fff; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.sub { color: var(--faint); margin: 0; } figure { margin: 0; overflow-x: auto; }
figcaption { color: var(--faint); font-size: .9rem; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
.scroll { overflow-x: auto; } th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; } .left td, .left th { text-align: left; white-space: normal; }
.held { color: #00694b; font-weight: 600; } .refuted { color: #a63c00; font-weight: 600; }
.not { color: #6b5b00; font-weight: 600; } details { margin: .6rem 0; }
summary { cursor: pointer; } pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: .85rem; }
@media print { details { display: block; } body { max-width: none; } }
"""


def render(result: Mapping[str, Any]) -> str:
    """Return the page for the results of a run (see ``results.json``)."""
    jobs: Sequence[Job] = result["jobs"]
    groups = orders(jobs)
    size = f"size {result['size']} · " if result["size"] else ""
    runs = f"{len(jobs)} run{'s' if len(jobs) != 1 else ''}"
    parts = [
        f"<h1>{_text(result['title'])}</h1>",
        f"<p class=sub>{_text(result['model'])} · {_text(size)}{runs}</p>",
        _verdicts(result["expect"]),
    ]
    if groups:
        parts += [_section("Comparison", _table(*comparison(jobs)) + _caption_comparison(jobs))]
        if len({job["name"] for job in jobs}) > 1:
            parts.append(_figure(plots.bars([job for job in jobs if job["scores"]]), "A dot is one run."))
    for group in groups:
        title = " → ".join(group[0]["order"])
        parts.append(
            _section(
                f"Accuracy of every task after every task: {title}",
                _figure(
                    plots.heat_maps(group),
                    "Percent, mean over seeds. Read a column downwards to see forgetting.",
                ),
            )
        )
        parts.append(
            _figure(plots.forgetting_curves(group), "The task of a panel is learned in its grey band.")
        )
    parts += [_section("Runs", "".join(_job(job) for job in jobs)), _provenance(result)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(result['title'])}</title><style>{CSS}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def write_report(result: Mapping[str, Any], path: Path) -> None:
    """Write the page to ``path``, complete or not at all."""
    write_text_atomic(path, render(result))


def _verdicts(claims: Sequence[Mapping[str, str]]) -> str:
    if not claims:
        return ""
    rows = "".join(
        f"<tr><td><code>{_text(c['text'])}</code></td>"
        f'<td><span class="{_text(c["verdict"].split()[0])}">{_text(c["verdict"])}</span></td>'
        f"<td>{_text(c['detail'])}</td></tr>"
        for c in claims
    )
    table = f"<table class=left><tr><th>claim</th><th>verdict</th><th>detail</th></tr>{rows}</table>"
    return _section("What was claimed", f"<div class=scroll>{table}</div>")


def _caption_comparison(jobs: Sequence[Job]) -> str:
    leaks = list(dict.fromkeys(leak for job in jobs for leak in job["leaks"]))
    given = f" The prompts give away: {_text('; '.join(leaks))}." if leaks else ""
    return (
        "<p class=sub>AP: mean accuracy on all tasks at the end. LA: accuracy right after learning. BWT: change of a "
        "task from then to the end (negative: forgotten). FWT: gain on a task before it is learned. "
        f"± standard deviation over runs.{given}</p>"
    )


def _job(job: Job) -> str:
    title = " ".join(filter(None, [job["name"], job["variant"]]))
    inner = []
    if job["scores"]:
        inner.append(_table(*score_cells(job["order"], job["scores"])))
    if job["general"]:
        before, after = job["general"].get("before", {}), job["general"].get("after", {})
        rows = [[n, _number(before.get(n)), _number(after.get(n))] for n in dict.fromkeys([*before, *after])]
        inner.append(_table(["general ability", "before", "after"], rows))
    if job["losses"]:
        inner.append(_figure(plots.losses(job), "Training loss, and every loss term by its name."))
    settings = {"plugins": job["plugins"], "seed": job["seed"], "notes": job.get("notes", [])}
    inner.append(f"<pre>{_text(json.dumps(settings, indent=1))}</pre>")
    return f"<details><summary>{_text(title)}</summary>{''.join(inner)}</details>"


def _provenance(result: Mapping[str, Any]) -> str:
    facts = {"hardware": result["hardware"], "versions": result["versions"], "notes": result["notes"]}
    return _section(
        "How to repeat this",
        f"<pre>{_text(result['command'])}</pre><pre>{_text(json.dumps(facts, indent=1))}</pre>",
    )


def _section(title: str, inner: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{inner}"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
