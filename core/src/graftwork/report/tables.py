"""Plain tables for the terminal, and the same as Markdown for a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.report.summary import Job, comparison, finite, mean, percent


def align(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with the first column left and the others right aligned."""
    table = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    lines = []
    for row in table:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---", *["---:"] * (len(heads) - 1)]) + "|"
    return "\n".join([line(heads), rule, *(line(row) for row in rows)])


def score_table(job: Job) -> str:
    """Return the accuracy of every task after every task, in percent."""
    heads, rows = score_cells(job["order"], job["scores"])
    return align(heads, rows)


def score_cells(
    order: Sequence[str], scores: Sequence[Sequence[float | None]]
) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of a score table; the last column averages the tasks learned so far."""
    rows = []
    for index, row in enumerate(scores):
        stage = "untouched model" if index == 0 else f"after {order[index - 1]}"
        cells = ["" if value is None else percent(value) for value in row]
        if not any(cells):
            continue
        seen = finite(row[:index])
        rows.append([stage, *cells, percent(mean(seen)) if index and len(seen) == index else ""])
    return ["accuracy %", *order, "mean of learned"], rows


def comparison_table(jobs: Sequence[Job]) -> str:
    """Return one row per arm: metrics as mean (± standard deviation over runs), cost, size."""
    return align(*comparison(jobs))


def comparison_markdown(jobs: Sequence[Job]) -> str:
    return markdown(*comparison(jobs))


def general_table(job: Job) -> str:
    """Return general ability before and after: perplexity, and accuracy on unseen tasks in percent."""
    before, after = job["general"].get("before", {}), job["general"].get("after", {})

    def show(name: str, values: Mapping[str, float]) -> str:
        if name not in values:
            return ""
        return f"{values[name]:.2f}" if name == "perplexity" else f"{percent(values[name])} %"

    names = list(dict.fromkeys([*before, *after]))
    return align(
        ["general ability", "before", "after"], [[n, show(n, before), show(n, after)] for n in names]
    )


def expect_table(result: Mapping[str, Any]) -> str:
    """Return the claims with their verdicts."""
    return align(*_expect(result))


def expect_markdown(result: Mapping[str, Any]) -> str:
    return markdown(*_expect(result))


def _expect(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    return ["claim", "verdict", "detail"], [[e["text"], e["verdict"], e["detail"]] for e in result["expect"]]
