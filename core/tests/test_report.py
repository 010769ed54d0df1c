"""Tables and report.html: what they say, what they leave out, and that nothing in a result breaks them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from graftwork.errors import UserError
from graftwork.report import areas, cosines, plots, tables
from graftwork.report.canvas import VARIABLES, series
from graftwork.report.css import CSS
from graftwork.report.html import render, write_report
from graftwork.report.words import clean, count, mebibytes, percent, points, short, width
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VOID = {"meta", "br", "link", "img", "hr"}


def job(name: str = "alpha", seed: int = 1, tasks: int = 3, **changes: Any) -> dict[str, Any]:
    """Return a stream of ``tasks`` tasks: learned to 0.9, forgotten by 0.1 a stage, 0.25 before."""
    order = changes.pop("order", [f"t{j}" for j in range(tasks)])
    tasks = len(order)
    scores: list[list[float | None]] = [
        [0.25 if j >= i else 0.9 - 0.1 * (i - j - 1) + 0.01 * seed for j in range(tasks)]
        for i in range(tasks + 1)
    ]
    losses = [
        {"task": task, "step": step, "loss": 2.0 / step, "loss/pull": 0.1 * step, "learning_rate": 1e-3}
        for task in order
        for step in (1, 2, 3, 4)
    ]
    return {
        "name": name,
        "plugins": {name: {"rank": 8, "targets": ["q_proj"]}},
        "seed": seed,
        "order": order,
        "variant": f"seed={seed}",
        "scores": scores,
        "invalid": [[0.05] * tasks for _ in scores],
        "metrics": {
            "ap": 0.8 + 0.01 * seed,
            "la": 0.91,
            "bwt": -0.15 if tasks > 1 else None,
            "fwt": 0.0 if tasks > 1 else None,
            "forgetting": 0.15 if tasks > 1 else None,
            "stage_average": 0.85,
        },
        "general": {"before": {"perplexity": 12.0, "held": 0.5}, "after": {"perplexity": 13.5, "held": 0.48}},
        "leaks": ["label options in the prompt"],
        "trainable_parameters": 3_050_000,
        "total_parameters": 134_515_008,
        "extra_state_bytes": 0,
        "adapter_bytes": 0,
        "train_seconds": 61.5,
        "statistics_seconds": 0.01,
        "eval_seconds": 10.0,
        "peak_memory_bytes": 3 * 2**30,
        "steps": 12,
        "losses": losses,
        **changes,
    }


def result(*jobs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "title": "A title",
        "size": "smoke",
        "model": "tiny",
        "command": "trainer run alpha:claim",
        "jobs": list(jobs),
        "expect": [
            {"text": "alpha.ap > beta.ap", "verdict": "held", "detail": "difference +2.1 points"},
            {"text": "alpha.la > beta.la", "verdict": "refuted", "detail": "difference -3.3 points"},
            {"text": "alpha.bwt > -0.05", "verdict": "not decided", "detail": "[-1.0, 1.0]"},
        ],
        "hardware": {"machine": "x86_64", "cores": 2, "accelerators": []},
        "versions": {"python": "3.11"},
        "notes": ["one note"],
        **changes,
    }


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            if key in ("href", "src", "xlink:href"):
                self.references.append(str(value))
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words += data + " "


def checked(text: str) -> Page:
    """Return the page after the checks that hold for every page."""
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    return page


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (12_345, "12.3 k"),
        (3_050_000, "3.05 M"),
        (134_515_008, "135 M"),
        (7e9, "7.00 G"),
    ],
)
def test_counts_are_for_humans(value: float, text: str) -> None:
    assert count(value) == text


def test_differences_have_a_sign_and_zero_has_none() -> None:
    assert [points(value) for value in (0.021, -0.045, 0.0, -0.0001)] == ["+2.1", "-4.5", "0.0", "0.0"]
    assert [percent(value) for value in (1.0, -0.0001, math.nan, math.inf, 1e300)] == [
        "100.0",
        "0.0",
        "nan",
        "inf",
        "1e+302",
    ]


def test_a_little_memory_is_not_nothing() -> None:
    assert [mebibytes(value) for value in (10, 2**20, 300 * 2**20)] == ["<0.01", "1.00", "300"]


def test_names_cannot_steer_a_terminal() -> None:
    assert clean("a\x1b[31m\nb\u202ec\ud800") == "a\ufffd[31m b\ufffdc\ufffd"
    assert [short(text, 5) for text in ("abcdefgh", "abcde", "分類分類")] == ["abcd…", "abcde", "分類…"]


# ---------------------------------------------------------------- tables


def test_score_table_shows_every_stage_and_averages_what_was_learned() -> None:
    assert tables.score_table(job(tasks=2)).splitlines() == [
        "accuracy %         t0    t1  mean of learned",
        "---------------  ----  ----  ---------------",
        "untouched model  25.0  25.0",
        "after t0         91.0  25.0             91.0",
        "after t1         81.0  91.0             86.0",
    ]


def test_cells_that_were_not_measured_are_blank() -> None:
    scores = [[None, None], [0.5, None], [None, 0.75]]
    lines = tables.score_table(job(tasks=2, scores=scores)).splitlines()
    assert len(lines) == 4  # no row for the untouched model, of which nothing is known
    assert lines[2].split() == ["after", "t0", "50.0", "50.0"]
    assert lines[3].split() == ["after", "t1", "75.0"]  # no mean over half the tasks


def test_a_stream_that_was_cut_short_is_shown_as_far_as_it_went() -> None:
    assert "after t0" in tables.score_table(job(scores=job()["scores"][:2]))


def test_a_wide_score_table_numbers_its_columns_and_fits() -> None:
    table = tables.score_table(job(order=[f"a_rather_long_name_{j}" for j in range(12)]))
    assert max(map(len, table.splitlines())) <= tables.COLUMNS
    assert re.search(r"^1 a_rather_long", table, re.MULTILINE)


def test_comparison_gives_mean_and_deviation_over_runs() -> None:
    table = tables.comparison_table([job("alpha", 1), job("alpha", 3), job("beta", 1)])
    assert "AP %" in table
    assert "82.0 ± 1.4" in table  # of 81 and 83
    assert "-15.0 ± 0.0" in table
    assert "3.05 M" in table
    assert "3072" in table
    assert "unseen" not in table  # nobody measured it
    assert "state" not in table  # nobody keeps any
    beta = next(line for line in table.splitlines() if line.startswith("beta"))
    assert "±" not in beta


def test_comparison_that_is_too_wide_goes_on_below_with_the_same_rows() -> None:
    jobs = [job(name, seed, extra_state_bytes=5) for name in ("alpha", "beta") for seed in (1, 2)]
    blocks = tables.comparison_table(jobs).split("\n\n")
    assert len(blocks) == 2
    assert all(len(line) <= tables.COLUMNS for block in blocks for line in block.splitlines())
    assert all([line.split()[0] for line in block.splitlines()[2:]] == ["alpha", "beta"] for block in blocks)


def test_comparison_shows_what_a_method_keeps_and_takes_besides_training() -> None:
    table = tables.comparison_table(
        [
            job("alpha", 1, adapter_bytes=3 * 2**20, statistics_seconds=12.0),
            job("alpha", 2, adapter_bytes=5 * 2**20, statistics_seconds=14.0),
            job("beta", 1),
        ]
    )
    heads, *rows = (line.split() for line in table.split("\n\n")[-1].splitlines() if "---" not in line)
    assert heads[-8:] == ["adapter", "MiB", "train", "s", "statistics", "s", "peak", "MiB"]
    assert rows[0][-4:] == ["4.00", "62", "13", "3072"]
    assert rows[1][-3:] == ["62", "0.0", "3072"]
    assert "adapter MiB" in tables.comparison_markdown([job(adapter_bytes=1)])


def test_a_moment_before_a_task_is_no_column() -> None:
    """Every method takes some microseconds; only where it takes time does the table say so."""
    assert "statistics" not in tables.comparison_table([job(statistics_seconds=0.05), job("beta")])
    assert "statistics" in tables.comparison_table([job(statistics_seconds=0.06), job("beta")])


def test_comparison_hides_neither_a_failed_nor_a_missing_run() -> None:
    broken = job("alpha", 2, metrics={"ap": math.nan, "la": None, "bwt": -0.1})
    row = tables.comparison_table([job("alpha", 1), broken]).splitlines()[2]
    assert row.split()[2] == "nan"
    assert "91.0 (n=1)" in row


def test_columns_of_a_table_stand_one_below_the_other() -> None:
    lines = tables.align(["name", "x"], [["分類", "1.0"], ["e\u0301a", "10.0"]]).splitlines()
    assert [width(line) for line in lines] == [10] * 4


def test_general_table_has_units_and_changes() -> None:
    lines = [line.split() for line in tables.general_table(job()).splitlines()]
    assert ["perplexity", "12.00", "13.50", "+1.50"] in lines
    assert ["held", "%", "50.0", "48.0", "-2.0"] in lines


def test_expect_table_never_cuts_a_claim() -> None:
    short_table = tables.expect_table(result())
    assert re.search(r"alpha.bwt > -0.05\s+not decided", short_table)
    claim = {"text": "a" * 60, "verdict": "held", "detail": "b" * 60}
    assert tables.expect_table({"expect": [claim]}) == f"held: {'a' * 60}\n    {'b' * 60}"


def test_markdown_keeps_its_columns_whatever_a_name_holds() -> None:
    lines = tables.comparison_markdown([job("a|b<i>")]).splitlines()
    assert r"a\|b&lt;i>" in lines[2]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(lines[0].split("|")) - 1}
    assert tables.expect_markdown(result()).splitlines()[2].startswith("| alpha.ap > beta.ap | held |")


# ---------------------------------------------------------------- figures


def test_figures_are_the_same_each_time_and_keep_text_as_text() -> None:
    jobs = [job("alpha", 1), job("alpha", 2), job("beta", 1)]
    draws = (plots.heat_maps, plots.forgetting_curves, plots.bars, plots.loss_curves, plots.general_ability)
    for draw in draws:
        svg = draw(jobs)
        assert svg == draw(jobs)
        texts = "".join(ElementTree.fromstring(svg).itertext())
        assert "alpha" in texts
        assert "beta" in texts


def test_heat_map_writes_the_mean_over_runs_in_readable_letters() -> None:
    svg = plots.heat_maps([job("alpha", 1), job("alpha", 3)])
    texts = list(ElementTree.fromstring(svg).itertext())
    assert "92" in texts  # of 91 and 93
    assert "after t2" in texts
    assert "#0a0a0a" in svg
    assert "#ffffff" in svg


def test_loss_terms_are_drawn_by_their_names() -> None:
    svg = plots.loss_curves([job()])
    assert "training loss" in svg
    assert "loss term: pull" in svg
    assert "learning_rate" not in svg


def test_a_long_loss_curve_is_thinned_but_keeps_its_peak_and_its_nan() -> None:
    points = [(float(step), 1.0, 1.0, 1.0) for step in range(5000)]
    points[1234] = (1234.0, 9.0, 9.0, 9.0)
    points[4000] = (4000.0, math.nan, math.nan, math.nan)
    thinned = plots._thin(points, 240)
    assert len(thinned) <= 240
    assert points[1234] in thinned
    assert any(math.isnan(point[1]) for point in thinned)


def test_figures_without_anything_to_draw_are_empty() -> None:
    bare = job(scores=[], metrics={}, general={}, losses=[])
    assert [draw([bare]) for draw in (plots.bars, plots.loss_curves, plots.general_ability)] == [""] * 3


def test_bars_of_nothing_have_an_axis_in_points() -> None:
    svg = plots.bars([job(name, metrics={"ap": 0.0, "bwt": -1e-20}) for name in ("alpha", "beta")])
    assert "1e" not in "".join(ElementTree.fromstring(svg).itertext())


def test_an_arm_keeps_its_colour() -> None:
    numbers = {"alpha": 0, "beta": 1}
    assert "--series-2" in plots.loss_curves([job("beta")], numbers)
    assert "--series-1" not in plots.loss_curves([job("beta")], numbers)


def test_no_two_arms_of_a_page_look_alike() -> None:
    looks = [series(number) for number in range(32)]
    assert len(set(looks)) == 32
    assert len({(look.colour, look.dashes) for look in looks}) == 32  # also where lines have no markers


def test_the_page_defines_every_colour_of_the_figures() -> None:
    light, dark = CSS.split("@media screen and (prefers-color-scheme: dark)")
    for variable in VARIABLES.values():
        assert f"{variable}:" in light
        assert f"{variable}:" in dark


# ---------------------------------------------------------------- what a method has used up


def chart(parts: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    layers = [f"model.layers.{n}.mlp" for n in range(2)]
    return {
        "title": "Neurons",
        "caption": "Of every MLP.",
        "layers": layers,
        "parts": parts,
        "rest": "left",
        **changes,
    }


def charted(seed: int, *charts: dict[str, Any], name: str = "alpha") -> dict[str, Any]:
    return job(name, seed, tasks=2, charts=list(charts))


def test_charts_are_means_over_runs_and_add_up_task_by_task() -> None:
    jobs = [
        charted(1, chart({"t1": [0.3, 0.1], "t0": [0.1, 0.2]})),
        charted(2, chart({"t1": [0.1, 0.1], "t0": [0.3, 0.2]})),
    ]
    (found,) = areas.charts(jobs)
    assert list(found.parts) == ["t0", "t1"]  # the order of the tasks, whatever that of the chart
    assert found.over_runs == "Mean over 2 runs."
    # Means over runs and layers: t0 (.2 + .2) / 2, t1 (.2 + .1) / 2.
    assert areas.used_cells(found) == (
        ["mean over layers", "this task %", "used %", "left %"],
        [["after t0", "20.0", "20.0", "80.0"], ["after t1", "15.0", "35.0", "65.0"]],
    )


def test_runs_of_other_layers_are_not_averaged() -> None:
    other = chart({"t0": [0.5]}, layers=["model.layers.1.mlp"])
    (found,) = areas.charts([charted(1, chart({"t0": [0.1, 0.2]})), charted(2, other)])
    assert found.parts == {"t0": [0.1, 0.2]}
    assert found.over_runs == "The first of 2 runs; the others differ in their layers."


def test_bands_stand_on_each_other_up_to_the_sum() -> None:
    """The path of the last band goes through the sum of all, at the height that the axis gives it."""
    (found,) = areas.charts([charted(1, chart({"t0": [0.25, 0.25], "t1": [0.25, 0.5]}))])
    svg = areas.area_chart(found)
    texts = list(ElementTree.fromstring(svg).itertext())
    assert {"1  t0", "2  t1", "left", "0", "1", "layer (model.layers.*.mlp)"} <= set(texts)
    assert svg == areas.area_chart(found)
    heights = []
    for band in re.split(r'<g id="FillBetweenPolyCollection_\d+">', svg)[1:]:
        points = re.findall(r"[ML] [\d.-]+ ([\d.-]+)", band[: band.index("</g>")])
        offset = re.search(r'<use [^>]*\by="([\d.]+)"', band[: band.index("</g>")])
        heights.append({float(y) + (float(offset[1]) if offset else 0) for y in points})
    bottom, top = max(heights[0]), min(heights[-1])  # the first starts at 0 %, the rest ends at 100 %
    shares = [sorted({round((bottom - y) / (bottom - top), 3) for y in band}) for band in heights]
    assert shares == [[0.0, 0.25], [0.25, 0.5, 0.75], [0.5, 0.75, 1.0]]


@pytest.mark.parametrize(
    ("layers", "labels", "common"),
    [
        (["h.0.mlp", "h.2.mlp"], ["0", "2"], "h.*.mlp"),
        (["a.q_proj", "b.layers.k_proj"], ["a.q_proj", "layers.k_proj"], ""),
        ([f"h.{n}.mlp" for n in range(99)], [], "h.*.mlp"),
        ([f"h.{n}.mlp" for n in range(1, 99)], [], ""),
        ([f"layer-{n % 7}-{n}" for n in range(99)], [], ""),
    ],
)
def test_names_of_layers_are_as_short_as_they_can_be(
    layers: list[str], labels: list[str], common: str
) -> None:
    assert areas._layer_names(layers) == (labels, common)


def test_page_shows_charts_per_method_and_order() -> None:
    one = chart({"t0": [0.1, 0.2], "t1": [0.1, 0.2]}, title="<Neurons>")
    other = {**charted(1, one, name="beta"), "order": ["t1", "t0"]}
    page = checked(render(result(charted(1, one), charted(2, one), other, job("plain", tasks=2))))
    assert "What the method has used up" in page.words
    assert page.words.count("alpha: <Neurons>") == 1
    assert page.words.count("beta: <Neurons>") == 1
    assert "Of every MLP. Mean over 2 runs." in page.words
    assert "What the method has used up" not in checked(render(result(job()))).words


# ---------------------------------------------------------------- how updates point


def with_cosines(value: float | None, seed: int = 1, name: str = "alpha") -> dict[str, Any]:
    matrix = [[1.0, value, None], [value, 1.0, None], [None, None, None]]
    return job(name, seed, interference=matrix, interference_error=0.02)


def test_cosines_are_means_over_runs_of_later_with_earlier_tasks() -> None:
    svg = cosines.heat_maps([with_cosines(-0.2, 1), with_cosines(-0.25, 2), with_cosines(0.5, 1, "beta")])
    texts = list(ElementTree.fromstring(svg).itertext())
    cells = [text for text in texts if re.fullmatch("[\N{MINUS SIGN}]?[.][0-9]{2}", text)]
    assert cells == ["\N{MINUS SIGN}.23", ".50"] or cells == ["\N{MINUS SIGN}.22", ".50"]
    assert texts.count("t0") == 2  # below both panels; an earlier task only
    assert texts.count("t2") == 1  # a later task only
    assert {"alpha", "beta", "cosine"} <= set(texts)


def test_colours_of_cosines_are_centred_at_zero_and_shared_by_the_page() -> None:
    jobs = [with_cosines(-0.2), with_cosines(0.55, 1, "beta")]
    assert cosines.scale(jobs) == 0.6
    assert cosines.scale([with_cosines(0.01)]) == cosines.SMALLEST_SCALE == 0.3
    texts = list(ElementTree.fromstring(cosines.heat_maps(jobs[:1], 0.6)).itertext())
    assert {"\N{MINUS SIGN}0.6", "0.0", "0.6"} <= set(texts)


def test_the_page_says_what_the_cosines_mean_and_their_error() -> None:
    unknown = [job("beta", interference=[], interference_error=None), with_cosines(None, 1, "gamma")]
    page = checked(render(result(with_cosines(0.4), *unknown)))
    assert "How the tasks' updates point" in page.words
    assert "a standard error of at most 0.02" in page.words
    assert ".40" in page.words
    assert "Not known for beta, gamma;" in page.words
    assert "updates point" not in checked(render(result(*unknown))).words


# ---------------------------------------------------------------- the page


def test_page_says_the_verdicts_first_and_then_the_numbers() -> None:
    jobs = [job("alpha", 1), job("alpha", 2), job("beta", 1)]
    text = render(result(*jobs))
    page = checked(text)
    assert "Of 3 claims: 1 held, 1 refuted, 1 not decided" in page.words
    for words in ("✓ held", "✗ refuted", "? not decided", "81.5 ± 0.7", "\N{MINUS SIGN}15.0", "3.05 M"):
        assert words in page.words
    for words in ("rank=8", "x86_64", "one note", "trainer run alpha:claim", "label options in the prompt"):
        assert words in page.words
    order = [text.index(f'id="{a}"') for a in ("verdict", "comparison", "scores", "curves", "losses", "runs")]
    assert order == sorted(order)
    assert "http" not in text
    assert text == render(result(*jobs))


@pytest.mark.parametrize(("verdict", "style"), [("held", "held"), ("not held", "refuted"), ("odd", "open")])
def test_every_verdict_has_a_colour(verdict: str, style: str) -> None:
    claim = {"text": "x", "verdict": verdict, "detail": ""}
    assert f'class="chip {style}"' in render(result(expect=[claim]))


def test_names_are_escaped_everywhere() -> None:
    evil = "<script>alert('1')</script>&\"$x^$\x00"
    odd = job(evil, order=[evil, "_b", "$\\frac{$"], variant=evil, leaks=[evil], plugins={evil: {evil: evil}})
    odd["general"] = {"before": {evil: 0.1}, "after": {evil: 0.2}}
    claim = {"text": evil, "verdict": evil, "detail": evil}
    texts = dict.fromkeys(("title", "size", "model", "command"), evil)
    text = render(
        result(
            odd,
            job("_b"),
            expect=[claim],
            hardware={evil: evil},
            versions={evil: evil},
            notes=[evil],
            **texts,
        )
    )
    page = checked(text)
    assert "<script" not in text
    assert "\x00" not in text
    assert "alert('1')" in page.words


def test_no_jobs() -> None:
    page = checked(render(result(expect=[])))
    assert "No runs" in page.words
    assert checked(render({})).words


def test_training_without_scores_shows_its_losses() -> None:
    single = job(order=["data"], scores=[], invalid=[], metrics={}, general={}, leaks=[])
    page = checked(render(result(single, expect=[])))
    assert page.tags.count("svg") == 1
    assert "Accuracy on every task" not in page.words


def test_one_task_has_no_forgetting() -> None:
    page = checked(render(result(job(tasks=1))))
    assert "Forgetting" not in page.words
    assert "BWT" not in page.words


def test_many_tasks_and_arms_are_all_there() -> None:
    page = checked(render(result(*(job(f"arm-{n}", tasks=11, losses=[]) for n in range(9)))))
    heat_maps = [n for n in range(9) if page.words.count(f"arm-{n}") >= 4]
    assert heat_maps == list(range(9))
    assert "details" in page.tags


def test_every_order_of_tasks_gets_its_figures() -> None:
    page = checked(render(result(job(order=["a", "b"]), job(order=["b", "a"]))))
    assert "a → b" in page.words
    assert "b → a" in page.words


def test_a_loss_that_is_no_number_is_marked() -> None:
    losses = [{"task": "t0", "step": step, "loss": math.nan if step > 2 else 1.0} for step in range(1, 6)]
    calm = [{**point, "loss": 1.0} for point in losses]
    broken, whole = (plots.loss_curves([job(losses=values)]) for values in (losses, calm))
    assert broken.count("<use") > whole.count("<use")


def test_report_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(result(job()), path)
    assert path.read_text(encoding="utf-8") == render(result(job()))
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match="cannot be written"):
        write_report(result(), path / "below-a-file.html")


def test_the_report_needs_no_torch() -> None:
    modules = "graftwork.report.html, graftwork.report.tables"
    code = f"import sys, {modules}; print({{'torch', 'matplotlib.pyplot'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- anything at all

_number = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1)
_name = st.text(min_size=1, max_size=30)


_charts = st.fixed_dictionaries(
    {
        "title": st.text(max_size=9),
        "caption": st.text(max_size=9),
        "layers": st.lists(_name, max_size=4),
        "parts": st.dictionaries(_name, st.lists(_number, max_size=4), max_size=3),
        "rest": st.text(max_size=9),
    }
)


@st.composite
def _jobs(draw: st.DrawFn) -> dict[str, Any]:
    order = draw(st.lists(_name, min_size=1, max_size=4))
    matrix = st.lists(
        st.lists(_number, min_size=len(order), max_size=len(order)),
        min_size=len(order) + 1,
        max_size=len(order) + 1,
    )
    metrics = st.sampled_from(["ap", "la", "bwt", "fwt", "forgetting", "stage_average", "unseen"])
    ability = st.dictionaries(st.just("perplexity") | _name, _number, max_size=2)
    point = st.fixed_dictionaries(
        {"task": st.sampled_from(order), "step": st.integers(0, 10**6), "loss": _number},
        optional={"loss/term": _number, "learning_rate": _number},
    )
    return {
        "name": draw(_name),
        "plugins": draw(
            st.dictionaries(_name, st.dictionaries(_name, _number | _name, max_size=2), max_size=2)
        ),
        "seed": draw(st.integers(0, 2**32)),
        "order": order,
        "variant": draw(st.text(max_size=5)),
        "scores": draw(st.just([]) | matrix),
        "invalid": draw(st.just([]) | matrix),
        "metrics": draw(st.dictionaries(metrics, _number)),
        "general": draw(st.just({}) | st.fixed_dictionaries({"before": ability, "after": ability})),
        "leaks": draw(st.lists(_name, max_size=2)),
        "trainable_parameters": draw(st.integers(0, 10**13)),
        "total_parameters": draw(st.integers(0, 10**13)),
        "extra_state_bytes": draw(st.integers(0, 10**13)),
        "adapter_bytes": draw(st.integers(0, 10**13)),
        "statistics_seconds": draw(st.floats(0, 1e9)),
        "charts": draw(st.lists(_charts, max_size=2)),
        "interference": draw(st.just([]) | matrix),
        "interference_error": draw(st.none() | st.floats(0, 1)),
        "train_seconds": draw(st.floats(0, 1e9)),
        "eval_seconds": draw(st.floats(0, 1e9)),
        "peak_memory_bytes": draw(st.integers(0, 10**13)),
        "steps": draw(st.integers(0, 10**9)),
        "losses": draw(st.lists(point, max_size=6)),
    }


@given(st.lists(_jobs(), max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_tables_take_any_result(jobs: list[dict[str, Any]]) -> None:
    for text in [
        tables.comparison_table(jobs),
        *map(tables.score_table, jobs),
        *map(tables.general_table, jobs),
    ]:
        assert all(character.isprintable() or character == "\n" for character in text)
        text.encode("utf-8")
    assert len(tables.comparison_markdown(jobs).splitlines()) == 2 + len({job["name"] for job in jobs})


@given(st.lists(_jobs(), max_size=2))
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_page_takes_any_result(jobs: list[dict[str, Any]]) -> None:
    text = render(result(*jobs))
    checked(text)
    text.encode("utf-8")
