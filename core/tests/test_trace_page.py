"""The page that shows why every token was chosen: complete, self-contained, safe with any text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from graftwork import Combiner, UserError
from graftwork.generate import Decoding, Prompt, Trace, decode
from graftwork.generate.trace import Candidate, TracedStep
from graftwork.report.trace import render_trace, write_trace
from graftwork.testing.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOID = {"meta", "br"}


class Checked(HTMLParser):
    """Every element is closed in order; collects texts by the class of the element they stand in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1][1], data))


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def one(token: str, main: float, contrast: float, score: float, *sets: str) -> Candidate:
    return Candidate(ids(token)[0], main, contrast, score, sets)


def example() -> Trace:
    first = one("b", 0.25, 0.5, 1.5, "likely")
    other = one("a", 0.5, 0.00001, float("-inf"), "unlikely <b>")
    second = one("\n", 1.0, 0.1, -2.0)
    return Trace(rows=[[TracedStep(first, (first, other)), TracedStep(second, (second,))]])


def test_every_token_with_both_probabilities_score_and_set() -> None:
    page = render_trace(example(), TOKENIZER, [Prompt("c? q?", "q?")], "mine")
    checked = Checked(page)
    shown = [text for style, text in checked.texts if style.startswith("set-") or style in ("changed", "")]
    assert "b" in shown
    for text in ("25.0 %", "50.0 %", "&lt;0.01 %", "1.50", "\N{MINUS SIGN}2.00", "ruled out", "c? q?", "q?"):
        assert text in page
    assert "Why every token was chosen: mine" in page
    assert "1 of 2 tokens" in page  # 'a' was likelier than 'b' after the prompt
    assert page.count("set-1 changed") == 1
    assert "\u23ce" in page
    assert "unlikely &lt;b&gt;" in page
    assert "<b>" not in page


def test_the_page_needs_nothing_from_outside_and_runs_nothing() -> None:
    page = render_trace(example(), TOKENIZER, [Prompt("<script>alert(1)</script>", "b")], "<img src=x>")
    assert {"script", "img", "link", "iframe"}.isdisjoint(Checked(page).tags)
    assert not re.search(r"https?://|url\(|@import", page)


def test_tokens_of_a_real_run_read_as_the_answer() -> None:
    trace = Trace(top=3)
    combiner = Combiner("c", lambda main, contrast: main, explain=lambda a, b: {"all": a > -1e9})
    prompts = [
        Prompt("a b", "b"),
        Prompt([{"role": "user", "content": "hi"}], [{"role": "user", "content": "h"}]),
    ]
    found = decode(
        tiny_model(),
        prompts,
        tokenizer=TOKENIZER,
        decoding=Decoding(combiner),
        trace=trace,
        max_new_tokens=5,
        suppress_tokens=list(range(3)),
    )
    page = render_trace(trace, TOKENIZER, prompts, "c")
    checked = Checked(page)
    assert checked.tags.count("section") == 2
    assert page.count('<summary class="set-1') == sum(map(len, found))
    assert "[user]\nhi" in page


def test_blanks_that_a_tokenizer_hides_from_single_tokens() -> None:
    class Joining:
        def decode(self, tokens: list[int]) -> str:
            return " ".join(f"w{token}" for token in tokens)

    step = TracedStep(Candidate(1, 1, 1, 0, ()), (Candidate(1, 1, 1, 0, ()),))
    next_step = TracedStep(Candidate(2, 1, 1, 0, ()), (Candidate(2, 1, 1, 0, ()),))
    page = render_trace(Trace(rows=[[step, next_step]]), Joining(), [Prompt("p")], "c")
    assert '">w1</summary>' in page
    assert '"> w2</summary>' in page


def test_more_sets_than_colours() -> None:
    many = [one(chr(97 + k), 0.1, 0.1, 0.0, f"set {k}") for k in range(12)]
    page = render_trace(Trace(rows=[[TracedStep(many[0], tuple(many))]]), TOKENIZER, [Prompt("p")], "c")
    Checked(page)
    assert "set-8" in page
    assert "set-9" not in page
    assert "set 11" in page


def test_nothing_generated() -> None:
    page = render_trace(Trace(rows=[[]]), TOKENIZER, [Prompt("p", "q")], "c")
    Checked(page)
    assert "Nothing was generated." in page


def test_a_row_for_every_prompt() -> None:
    with pytest.raises(ValueError, match="zip"):
        render_trace(example(), TOKENIZER, [], "c")


def test_writing(tmp_path: Path) -> None:
    path = tmp_path / "deep/trace.html"
    write_trace(path, example(), TOKENIZER, [Prompt("p")], "c")
    assert path.read_text(encoding="utf-8") == render_trace(example(), TOKENIZER, [Prompt("p")], "c")
    assert not list(path.parent.glob("*.part"))
    with pytest.raises(UserError, match="cannot be written"):
        write_trace(path / "below.html", example(), TOKENIZER, [Prompt("p")], "c")
