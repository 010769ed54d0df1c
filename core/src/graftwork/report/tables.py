"""Plain tables for the terminal, and the same as Markdown for a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.report.measured import metric_cells, metric_words
from graftwork.report.summary import Job, comparison, expect_cells, general_cells, score_cells
from graftwork.report.words import short, width

COLUMNS = 100
"""Tables that would be wider are broken in two, or written more closely."""


def align(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), gap: str = "  "
) -> str:
    """Return a table with the columns ``left`` flush left and the others flush right."""
    table = [list(heads), *(list(row) for row in rows)]
    widths = [max(width(row[column]) for row in table) for column in range(len(heads))]
    lines = [gap.join(_pad(text, widths[i], i in left) for i, text in enumerate(row)) for row in table]
    lines.insert(1, gap.join("-" * size for size in widths))
    return "\n".join(line.rstrip() for line in lines)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Return a Markdown table."""
    rule = "|" + "|".join("---" if column in left else "---:" for column in range(len(heads))) + "|"
    body = ["| " + " | ".join(map(_markdown_text, row)) + " |" for row in (heads, *rows)]
    return "\n".join([body[0], rule, *body[1:]])


def score_table(job: Job) -> str:
    """Return the accuracy of every task after every task, in percent.

    Where task names make it too wide, the columns are numbered and the rows carry the numbers.
    """
    table = align(*score_cells(job))
    if _fits(table):
        return table
    heads, rows = score_cells(job, numbered=True)
    rows = [[short(row[0], 18), *row[1:]] for row in rows]
    table = align(heads, rows)
    return table if _fits(table) else align(heads, rows, gap=" ")


def benchmark_table(jobs: Sequence[Job]) -> str:
    """Return one row per arm of one benchmark, and below it what the metrics are."""
    words = metric_words(jobs)
    widest = max(map(len, words), default=0)
    meanings = "\n".join(f"  {key.ljust(widest)}  {text}" for key, text in words.items())
    return f"{_broken(*metric_cells(jobs))}\n\n{meanings}"


def benchmark_markdown(jobs: Sequence[Job]) -> str:
    """Return the rows of :func:`benchmark_table` as a Markdown table."""
    return markdown(*metric_cells(jobs))


def comparison_table(jobs: Sequence[Job]) -> str:
    """Return one row per arm: metrics as mean ± standard deviation over runs, cost, size.

    Where it is too wide, the columns that do not fit follow in a second table with the same rows.
    """
    return _broken(*comparison(jobs))


def _broken(heads: list[str], rows: list[list[str]]) -> str:
    blocks: list[list[int]] = [[0]]
    for column in range(1, len(heads)):
        wider = [*blocks[-1], column]
        if _fits(align(*_columns(heads, rows, wider))) or len(blocks[-1]) == 1:
            blocks[-1] = wider
        else:
            blocks.append([0, column])
    return "\n\n".join(align(*_columns(heads, rows, block)) for block in blocks)


def comparison_markdown(jobs: Sequence[Job]) -> str:
    """Return :func:`comparison_table` as one Markdown table."""
    return markdown(*comparison(jobs))


def general_table(job: Job) -> str:
    """Return general ability before and after: perplexity, and accuracy on other tasks in percent."""
    return align(*general_cells(job))


def expect_table(result: Mapping[str, Any]) -> str:
    """Return the claims with their verdicts."""
    heads, rows = expect_cells(result)
    table = align(heads, rows, left=(0, 1, 2))
    if _fits(table) or not rows:
        return table
    # A claim is a sentence: rather than cut it, its detail goes on the next line.
    return "\n".join(
        line
        for text, verdict, detail in rows
        for line in (f"{verdict}: {text}", f"    {detail}".rstrip())
        if line
    )


def expect_markdown(result: Mapping[str, Any]) -> str:
    """Return :func:`expect_table` as a Markdown table."""
    return markdown(*expect_cells(result), left=(0, 1, 2))


def _columns(
    heads: Sequence[str], rows: Sequence[Sequence[str]], chosen: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    return [heads[i] for i in chosen], [[row[i] for i in chosen] for row in rows]


def _fits(table: str) -> bool:
    return all(width(line) <= COLUMNS for line in table.splitlines())


def _pad(text: str, size: int, left: bool) -> str:
    space = " " * (size - width(text))
    return text + space if left else space + text


def _markdown_text(text: str) -> str:
    # Markdown passes HTML through, so a name must not become a tag.
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
