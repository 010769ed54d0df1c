"""``trainer generate`` as a user meets it: prompts, files of them, going on after a kill, sentences."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.testing.runs import kill_when

FEW = ("--set", "max_new_tokens=6")
RECORDS = [
    {"prompt": "one"},
    {"question": "Which?", "answer": "gold", "id": 7},
    {"context": "It is red.", "question": "Which colour?"},
    {"messages": [{"role": "user", "content": "日本"}]},
    {"prompt": "with", "contrast_prompt": "without"},
]
PAIRS = [
    {"context": f"It is {colour}.", "question": "Which colour?"} for colour in ("red", "blue", "dark green")
]
COMBINER = """
from graftwork import Combiner, UserError, hookimpl
from pydantic import BaseModel, ConfigDict

class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weight: float = 1.0

class Plugin:
    Options = Options
    def __init__(self, options):
        self.options = options
    @hookimpl
    def check(self, run):
        if self.options.weight < 0:
            raise UserError("weight is negative; leave it out")
    @hookimpl
    def combiner(self, run, model):
        weight = self.options.weight
        if weight == 0:
            return None
        fn = lambda main, contrast: main + weight * (main - contrast)
        explain = lambda main, contrast: {"gains": main > contrast}
        return Combiner("pulled", fn, explain=explain)
"""


@pytest.fixture
def generate(trainer: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``trainer generate`` on a tiny model."""
    return lambda *words: trainer("generate", "--model", "tiny-random", *words)


@pytest.fixture
def refused(generate: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Call it with bad input; return the sentence."""

    def call(*words: object) -> str:
        before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
        outcome = generate(*words)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        lines = [line for line in outcome.err.split("\n") if line.startswith("error: ")]
        assert len(lines) == 1, outcome.err
        assert "Traceback" not in outcome.err
        after = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
        assert after == before, "bad input left files behind"
        return lines[0].removeprefix("error: ")

    return call


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Write a JSONL file."""

    def write(records: Any = RECORDS, name: str = "in.jsonl") -> Path:
        path = tmp_path / name
        text = records if isinstance(records, str) else "".join(json.dumps(one) + "\n" for one in records)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def pulled(install: Callable[..., None]) -> tuple[str, ...]:
    install("pulled", "pulled_plugin", COMBINER)
    return ("--plugin", "pulled")


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line]


# ---------------------------------------------------------------------- what is asked


def test_a_question_and_its_context_go_through_the_template(generate: Callable[..., Any]) -> None:
    # The tiny model hears the end of a prompt best: the context stands there.
    words = ("--plain", "--question", "Which?", *FEW)
    template = r"templates.with_context=Q: {question}\nC: {context}"
    asked = generate("--context", "It is red.", *words, "--set", template)
    assert asked.code == 0, asked.err
    assert asked.out == generate("--plain", "--prompt", "Q: Which?\nC: It is red.", *FEW).out
    alone = generate(*words, "--set", "templates.without_context=Q: {question}")
    assert alone.out == generate("--plain", "--prompt", "Q: Which?", *FEW).out
    assert alone.out != asked.out


def test_the_chat_template_is_applied_unless_plain(generate: Callable[..., Any]) -> None:
    plain = generate("--prompt", "<user>hello\n<assistant>", "--plain", *FEW)
    assert generate("--prompt", "hello", *FEW).out == plain.out
    assert generate("--prompt", "hello", "--plain", *FEW).out != plain.out


def test_standard_input(generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert generate("--prompt", "-", *FEW).out == generate("--prompt", "hello", *FEW).out
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "hello"}\n{"prompt": "you"}\n'))
    found = lines(generate("--input", "-", *FEW).out)
    assert [(one["prompt"], one["index"]) for one in found] == [("hello", 0), ("you", 1)]
    assert found[0]["answer"] == generate("--prompt", "hello", *FEW).out.rstrip("\n")


def test_a_file_in_any_batches_keeps_its_order_and_its_fields(
    generate: Callable[..., Any], file: Callable[..., Path]
) -> None:
    path = file()
    outcome = generate("--input", path, "--output", "out.jsonl", *FEW)
    assert outcome.code == 0, outcome.err
    assert outcome.out == ""
    text = Path("out.jsonl").read_text()
    found = lines(text)
    assert [one["index"] for one in found] == list(range(len(RECORDS)))
    assert [one["tokens"] for one in found] == [6] * len(RECORDS)
    ours = {"answer", "tokens", "index"}
    assert [{key: one[key] for key in one if key not in ours} for one in found] == [
        RECORDS[0],
        {"question": "Which?", "input_answer": "gold", "id": 7},
        *RECORDS[2:],
    ]
    assert generate("--input", path, "--batch-size", 1, *FEW).out == text
    assert generate("--input", path, "--batch-size", 2, *FEW).out == text


def test_streaming_gives_the_same_answer(
    generate: Callable[..., Any], pulled: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--context", "It is red.", "--question", "Which?", "--set", "max_new_tokens=20")
    for plugin in ((), pulled):
        whole = generate(*words, *plugin, "--no-stream").out
        streamed = generate(*words, *plugin, "--stream").out
        assert streamed.strip() == whole.strip()
    # A terminal streams by itself; a pipe does not.
    used: list[bool] = []
    monkeypatch.setattr("transformers.TextStreamer.end", lambda self: used.append(True))
    generate(*words)
    assert not used
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate(*words)
    assert used == [True]
    generate(*words, "--set", "num_beams=2")
    assert used == [True]


def test_options_of_generate_by_their_own_names(generate: Callable[..., Any]) -> None:
    for options in (
        ("num_beams=2",),
        ("do_sample=true", "top_p=0.9", "temperature=0.7"),
        ("repetition_penalty=1.3", "no_repeat_ngram_size=2"),
        ("suppress_tokens=[5, 6]", "min_new_tokens=3"),
        ("max_length=60",),
        ("cache_implementation=static",),
        ("stop_strings=[a, b]",),
        ("return_dict_in_generate=true", "output_scores=true"),
    ):
        words = [word for option in options for word in ("--set", option)]
        outcome = generate("--prompt", "hello", *FEW[: 0 if "max_length=60" in options else 2], *words)
        assert outcome.code == 0, (options, outcome.err)


def test_model_settings(generate: Callable[..., Any]) -> None:
    outcome = generate("--prompt", "hello", *FEW, "--set", "model.dtype=bfloat16")
    assert outcome.code == 0, outcome.err


def test_long_prompts_are_cut_only_when_asked(
    generate: Callable[..., Any], refused: Callable[..., str], file: Callable[..., Path]
) -> None:
    path = file([{"prompt": "short"}, {"prompt": "x" * 2000 + "end"}])
    said = refused("--input", path, "--plain", "--output", "out.jsonl", *FEW)
    assert said.startswith(f"{path}:2 has 2003 tokens")
    assert "max_prompt_tokens" in said
    cut = lines(generate("--input", path, "--plain", "--max-prompt-tokens", 8, *FEW).out)
    assert cut[1]["answer"] == generate("--prompt", "xxxxxend", "--plain", *FEW).out.rstrip("\n")


# ---------------------------------------------------------------------- going on


SAMPLED = ("--set", "do_sample=true", "--set", "max_new_tokens=20", "--batch-size", "2")


def test_a_killed_run_goes_on_to_the_same_answers(
    generate: Callable[..., Any], file: Callable[..., Path]
) -> None:
    path = file([{"prompt": f"{'again ' * (number % 5)}{number}"} for number in range(40)])
    words = ["--input", path, *SAMPLED]
    assert generate(*words, "--output", "whole.jsonl").code == 0
    output = Path("killed.jsonl").resolve()
    kill_when(
        ["generate", "--model", "tiny-random", *map(str, words), "--output", str(output)],
        lambda: output.exists() and output.stat().st_size > 0,
    )
    done = output.read_bytes().count(b"\n")
    assert 0 < done < 40
    # A line that was cut off in the middle is written again.
    with output.open("ab") as torn:
        torn.write(b'{"prompt": "agai')
    assert generate(*words, "--output", output, "--resume").code == 0
    assert output.read_bytes() == Path("whole.jsonl").read_bytes()
    again = generate(*words, "--output", output, "--resume")
    assert again.code == 0
    assert "all 40 answers are in" in again.err


def test_only_the_same_run_is_gone_on_with(
    generate: Callable[..., Any], refused: Callable[..., str], file: Callable[..., Path]
) -> None:
    path = file(RECORDS[:2])
    words = ("--input", path, "--output", "out.jsonl")
    assert generate(*words, *FEW, "--resume").code == 0, "with nothing there, it begins"
    assert "already exists; add --resume" in refused(*words, *FEW)
    assert "'options' was" in refused(*words, "--set", "max_new_tokens=7", "--resume")
    assert "'batch_size' was 8 and is now 4" in refused(*words, *FEW, "--batch-size", 4, "--resume")
    assert "'seed'" in refused(*words, *FEW, "--seed", 1, "--resume")
    file(RECORDS[:3])
    assert "answers to another input" in refused(*words, *FEW, "--resume")


# ---------------------------------------------------------------------- a combiner


def test_a_combiner_in_batches_and_rows(
    generate: Callable[..., Any], file: Callable[..., Path], pulled: tuple[str, ...]
) -> None:
    path = file(PAIRS)
    outcome = generate("--input", path, *pulled, *FEW)
    assert outcome.code == 0, outcome.err
    assert outcome.out != generate("--input", path, *FEW).out
    for words in (("--batch-size", 1), ("--rows", "split"), ("--rows", "joint")):
        assert generate("--input", path, *pulled, *FEW, *words).out == outcome.out
    weak = generate("--input", path, *pulled, *FEW, "--set", "plugins.pulled.weight=0")
    assert weak.out == generate("--input", path, *FEW).out


def test_the_trace_is_a_page_of_all_answers(
    generate: Callable[..., Any], file: Callable[..., Path], pulled: tuple[str, ...]
) -> None:
    outcome = generate("--input", file(PAIRS), *pulled, *FEW, "--trace", "trace.html")
    assert outcome.code == 0, outcome.err
    page = Path("trace.html").read_text()
    assert page.rstrip().endswith("</html>")
    for record in PAIRS:
        assert record["context"] in page
    assert "pulled" in page
    assert "gains" in page


def test_a_record_without_context_is_named_before_anything_is_written(
    refused: Callable[..., str], file: Callable[..., Path], pulled: tuple[str, ...]
) -> None:
    path = file([PAIRS[0], {"question": "Which?"}, PAIRS[1]])
    said = refused("--input", path, *pulled, *FEW, "--output", "out.jsonl")
    assert said.startswith(f"{path}:2 has no context: 'pulled' contrasts")
    assert "the command line has no context" in refused("--prompt", "hello", *pulled)
    assert "num_beams=2 cannot be used" in refused("--input", file(PAIRS), *pulled, "--set", "num_beams=2")


def test_a_plugin_is_asked_before_weights_are_read(
    refused: Callable[..., str], pulled: tuple[str, ...]
) -> None:
    negative = ("--set", "plugins.pulled.weight=-1")
    said = refused("--prompt", "hello", *pulled, *negative, "--set", "model.attn_implementation=nonsense")
    assert said == "weight is negative; leave it out"
    assert "did you mean 'weight'" in refused("--prompt", "a", *pulled, "--set", "plugins.pulled.wieght=1")


def test_trace_and_rows_need_a_combiner(refused: Callable[..., str], pulled: tuple[str, ...]) -> None:
    assert "--trace is about the two prompts" in refused("--prompt", "a", "--trace", "t.html")
    assert "--rows is about the two prompts" in refused("--prompt", "a", "--rows", "split")
    off = ("--set", "plugins.pulled.weight=0")
    assert "the plugins in use bring none" in refused("--prompt", "a", *pulled, *off, "--trace", "t.html")


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "in.jsonl is empty; expected one JSON object per line"),
        ('{"prompt": "a"}\n{"prompt": \n', "in.jsonl:2: not valid JSON"),
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', "in.jsonl:2: an empty line"),
        ('[{"prompt": "a"}]', "in.jsonl:1: a JSON array"),
        ('{"prompt": "a"}\n3\n', "in.jsonl:2: a int, where a JSON object is expected"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "in.jsonl:2: needs one of 'prompt'"),
        ('{"context": "", "question": "b"}\n', "in.jsonl:1: 'context' is empty"),
        ('{"prompt": "\\ud800"}\n', "in.jsonl:1: an escape is half of a surrogate pair"),
        ('{"prompt": "a", "answer": 1, "input_answer": 2}\n', "in.jsonl:1: 'answer' would be written as"),
    ],
)
def test_bad_files(refused: Callable[..., str], file: Callable[..., Path], text: str, problem: str) -> None:
    assert problem in refused("--input", file(text), "--output", "out.jsonl")


def test_a_file_that_is_not_there_or_not_text(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "data file 'nowhere.jsonl' does not exist" in refused("--input", "nowhere.jsonl")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert "is not UTF-8 (byte 15)" in refused("--input", path)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "needs one of --prompt, --input or --question, got none of them"),
        (("--prompt", "a", "--question", "b"), "got --prompt and --question"),
        (("--prompt", "a", "--context", "b"), "--context goes with --question, not with --prompt"),
        (("--question", "a", "--context", " "), "the command line: 'context' is empty"),
        (("--prompt", "a", "--resume"), "--resume needs --output"),
        (("--prompt", "a", "--output", "."), "'.' is a folder"),
        (("--prompt", "a", "--set", "max_new_token=3"), "did you mean 'max_new_tokens'?"),
        (("--prompt", "a", "--set", "top_p=0.5"), "You should set `do_sample=True`"),
        (("--prompt", "a", "--set", "num_return_sequences=2"), "num_return_sequences"),
        (("--prompt", "a", "--set", "max_new_tokens"), "write it as key=value"),
        (("--prompt", "a", "--set", "modle.dtype=float32"), "unknown key 'modle' (did you mean 'model'?)"),
        (("--prompt", "a", "--set", "model.dtpye=float32"), "did you mean 'dtype'?"),
        (("--prompt", "a", "--set", "model.ref=x"), "the model is what --model names"),
        (
            ("--prompt", "a", "--set", "plugins.sparta.x=1"),
            "plugin 'sparta' is not in use; add --plugin sparta",
        ),
        (("--prompt", "a", "--set", "templates.without_context={question}"), "there is no question"),
        (
            ("--question", "a", "--set", "templates.with_contxt=x"),
            "no template 'with_contxt' (did you mean 'with_context'?)",
        ),
        (("--question", "a", "--set", "templates.without_context=x"), "without_context lacks {question}"),
        (("--prompt", "a", "--stream", "--set", "num_beams=2"), "--stream cannot be used with beams"),
        (("--prompt", "a", "--batch-size", "0"), "--batch-size"),
        (("--prompt", "a", "--set", "repetition_penalty=-1"), "transformers' generate refuses these options"),
        (
            ("--prompt", "a", "--set", "do_sample=true", "--set", "temperature=hot"),
            "transformers' generate refuses these options",
        ),
        (("--prompt", "a", "--plugin", "spatra"), "did you mean 'sparta'?"),
    ],
)
def test_bad_flags_and_settings(refused: Callable[..., str], words: tuple[str, ...], problem: str) -> None:
    assert problem in refused(*words)


def test_one_answer_is_streamed(refused: Callable[..., str], file: Callable[..., Path]) -> None:
    assert "--stream shows one answer as it is written, and 5 are" in refused("--input", file(), "--stream")


def test_messages_need_a_template(refused: Callable[..., str], file: Callable[..., Path]) -> None:
    said = refused("--input", file(), "--plain")
    assert "in.jsonl:4: messages need a chat template, which --plain leaves out" in said


def test_a_method_tells_what_it_did_beside_the_answer(generate: Callable[..., Any]) -> None:
    asked = generate("--prompt", "hello", "--plugin", "d3", "--set", "plugins.d3.alpha=0.9", *FEW)
    assert asked.code == 0, asked.err
    assert "d3: of 4 layers" in asked.err
    assert "d3:" not in asked.out
