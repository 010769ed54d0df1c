"""Many prompts: answers in order whatever the batches, the same in one go or in several, and a file of them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import Combiner, UserError
from graftwork.evaluate.answers import generate_answers, score_task
from graftwork.generate import Decoding, Prompt, Trace, decode, generate
from graftwork.generate.decoding import Encoded
from graftwork.generate.output import AnswerFile, line_fields
from graftwork.generate.session import POOL, batches
from graftwork.testing.models import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor

TOKENIZER = tiny_tokenizer()
TEXTS = ["a", "what is this", "x" * 30, "Option: yes, no \nAnswer:", "日本", "one more", "b" * 12]
PAIRS = [Prompt(f"It is {word}. What is it?", "What is it?") for word in ("red", "a stone", "x" * 20)]
SAMPLED = {"do_sample": True, "temperature": 1.5}
GUIDED = Decoding(Combiner("guided", lambda main, contrast: 2 * main - contrast))


def answers(model: Any, prompts: Any = TEXTS, **options: Any) -> list[Any]:
    return list(generate(model, TOKENIZER, prompts, **{"max_new_tokens": 8, **options}))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_greedy_answers_are_those_of_single_prompts(kind: str, batch_size: int) -> None:
    model = tiny_model(kind)
    found = answers(model, batch_size=batch_size)
    assert [one.index for one in found] == list(range(len(TEXTS)))
    for text, one in zip(TEXTS, found, strict=True):
        ids = TOKENIZER(text, return_tensors="pt")
        begin = 1 if kind == "t5" else ids["input_ids"].shape[1]
        written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, begin:].tolist()
        assert one.tokens == written
        assert one.text == TOKENIZER.decode(written, skip_special_tokens=True).strip()


def test_an_answer_ends_with_its_end_token() -> None:
    class Ends(LogitsProcessor):
        """Write 'ok' and end; rows go on as long as they are let."""

        step = 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, [*TOKENIZER("ok")["input_ids"], 2, 9, 9][self.step]] = 0
            self.step += 1
            return forced

    for kind in ("llama", "t5"):
        found = answers(tiny_model(kind), ["abc", "defghi"], decoding=Decoding(processors=[Ends()]))
        assert [(one.text, one.tokens[-1], len(one.tokens)) for one in found] == [("ok", 2, 3)] * 2


@given(
    lengths=st.lists(st.integers(1, 30), max_size=60), batch_size=st.integers(1, 5), begin=st.integers(0, 59)
)
def test_batches_hold_every_prompt_once_and_the_longest_first(
    lengths: list[int], batch_size: int, begin: int
) -> None:
    pools = batches([Encoded([5] * length) for length in lengths], batch_size)
    whole = [index for pool in pools for batch in pool for index in batch]
    assert sorted(whole) == list(range(len(lengths)))
    for number, pool in enumerate(pools):
        members = [index for batch in pool for index in batch]
        # A pool holds neighbours: its answers come before those of the next.
        size = POOL * batch_size if batch_size > 1 else 1
        assert sorted(members) == list(range(number * size, number * size + len(members)))
        assert [lengths[index] for index in members] == sorted(
            (lengths[index] for index in members), reverse=True
        )
        assert all(len(batch) <= batch_size for batch in pool)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_going_on_gives_what_one_go_gives(options: dict[str, Any], batch_size: int) -> None:
    model, prompts = tiny_model(), [*TEXTS, *TEXTS, *TEXTS]
    whole = answers(model, prompts, batch_size=batch_size, **options)
    for begin in (1, 6, 16, 17, 20, 21):
        assert answers(model, prompts, batch_size=batch_size, begin=begin, **options) == (whole[begin:])


def test_samples_follow_the_seed_and_leave_the_random_state_alone() -> None:
    model = tiny_model()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = answers(model, ["a", "a"], batch_size=1, seed=3, **SAMPLED)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert answers(model, ["a", "a"], batch_size=1, seed=3, **SAMPLED) == first
    assert answers(model, ["a", "a"], batch_size=1, seed=4, **SAMPLED) != first
    # The same prompt twice is drawn twice.
    assert first[0].tokens != first[1].tokens


def test_pairs_and_the_trace_are_in_order() -> None:
    model, trace, seen = tiny_model(), Trace(top=2), []
    found = answers(model, PAIRS, decoding=GUIDED, batch_size=2, trace=trace, progress=seen.append)
    assert [[step.chosen.token for step in row] for row in trace.rows] == [one.tokens for one in found]
    assert sum(seen) == len(PAIRS)
    alone = [
        decode(model, [pair], tokenizer=TOKENIZER, decoding=GUIDED, max_new_tokens=8)[0] for pair in PAIRS
    ]
    assert [one.tokens for one in found] == alone
    assert found != answers(model, PAIRS)


def test_everything_is_checked_before_anything_is_answered() -> None:
    model, passes = tiny_model(), []
    decoding = Decoding(GUIDED.combiner, before_forward=[passes.append])
    names = ["line 1", "line 2"]
    cases: list[tuple[list[Any], dict[str, Any], str]] = [
        ([PAIRS[0], Prompt("alone")], {}, "^line 2 has no context: 'guided' contrasts"),
        ([PAIRS[0], Prompt("x" * 1100, "x")], {}, "^line 2 has 1100 tokens"),
        ([PAIRS[0], Prompt("", "x")], {}, "^line 2: a prompt is empty"),
        (PAIRS[:2], {"num_beams": 2}, "num_beams=2 cannot be used"),
        (PAIRS[:2], {"num_return_sequences": 2}, "a prompt gets one answer"),
        (PAIRS[:2], {"streamer": object()}, "2 prompts cannot be streamed"),
    ]
    for prompts, options, problem in cases:
        with pytest.raises(UserError, match=problem):
            generate(model, TOKENIZER, prompts, decoding=decoding, names=names, **options)
    assert not passes


def test_stop_strings_and_other_options_of_generate() -> None:
    model = tiny_model()
    free = answers(model, ["hello"], max_new_tokens=12)[0]
    # A letter that is not the first: the answer ends with it.
    place, stop = next(
        (place, text)
        for place, text in enumerate(map(TOKENIZER.decode, free.tokens))
        if place and text.isascii() and text.isprintable() and len(text) == 1
    )
    for decoding, prompts in (
        (None, ["hello"]),
        (Decoding(Combiner("main", lambda a, b: a)), [Prompt("hello", "x")]),
    ):
        cut = answers(model, prompts, decoding=decoding, max_new_tokens=12, stop_strings=[stop])[0]
        assert cut.tokens == free.tokens[: place + 1]
    beams = answers(model, ["hello"], num_beams=3)[0].tokens
    ids = TOKENIZER("hello", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=8, num_beams=3, do_sample=False)[0, 5:].tolist()
    assert beams == expected


def test_an_adapter_and_inference_mode() -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=64, target_modules="all-linear")
    adapted = get_peft_model(tiny_model(), config)
    found = answers(adapted, PAIRS, decoding=GUIDED)
    assert found != answers(tiny_model(), PAIRS, decoding=GUIDED)
    with torch.inference_mode():
        assert answers(adapted, PAIRS, decoding=GUIDED) == found


# ---------------------------------------------------------------------- scores of tasks


def test_scores_are_written_with_what_plugins_bring() -> None:
    model, seen = tiny_model(), []
    plain = generate_answers(model, TOKENIZER, TEXTS)
    watched = generate_answers(model, TOKENIZER, TEXTS, decoding=Decoding(before_forward=[seen.append]))
    assert watched == plain
    assert [one.step for one in seen][:3] == [0, 1, 2]
    amateur = tiny_model(seed=1)
    alone = Decoding(Combiner("amateur alone", lambda main, contrast: contrast, amateur))
    assert generate_answers(model, TOKENIZER, TEXTS, decoding=alone) == generate_answers(
        amateur, TOKENIZER, TEXTS
    )


def test_a_task_has_no_context_apart() -> None:
    from datasets import Dataset
    from graftwork.data.tasks import Task

    data = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    task = Task(index=0, name="t", train=data, test=data, labels=[])
    with pytest.raises(UserError, match=r"'guided' contrasts .* the items of a task have no context apart"):
        score_task(tiny_model(), TOKENIZER, task, decoding=GUIDED)


# ---------------------------------------------------------------------- the file


SETTINGS = {"input": "abc", "seed": 3, "options": {"top_p": 0.5}}


def write(path: Path, count: int, *, resume: bool = False, settings: Any = SETTINGS) -> AnswerFile:
    file = AnswerFile(path, settings, resume=resume)
    with file.open():
        for index in range(file.done, count):
            file.write({"prompt": "日本", "index": index})
    return file


def test_a_file_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "out" / "answers.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    assert [json.loads(line)["prompt"] for line in whole.decode().splitlines()] == ["日本"] * 3
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        file = AnswerFile(path, SETTINGS, resume=True)
        assert file.done == sum(end <= length for end in ends)
        assert path.read_bytes() == whole[:length]
        write(path, 3, resume=True)
        assert path.read_bytes() == whole


def test_a_file_is_only_gone_on_with_as_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, 2)
    before = path.read_bytes()
    with pytest.raises(UserError, match="already exists; add --resume"):
        AnswerFile(path, SETTINGS, resume=False)
    with pytest.raises(UserError, match="holds answers to another input"):
        AnswerFile(path, {**SETTINGS, "input": "abd"}, resume=True)
    with pytest.raises(UserError, match=r"'options' was .*0\.5.* and is now .*0\.6"):
        AnswerFile(path, {**SETTINGS, "options": {"top_p": 0.6}}, resume=True)
    with pytest.raises(UserError, match="is a folder"):
        AnswerFile(tmp_path, SETTINGS, resume=True)
    beside = path.with_name("answers.jsonl.settings.json")
    kept = beside.read_text()
    beside.write_text(kept[:20])
    with pytest.raises(UserError, match="is damaged"):
        AnswerFile(path, SETTINGS, resume=True)
    beside.unlink()
    with pytest.raises(UserError, match=r"has no 'answers\.jsonl\.settings\.json' beside it"):
        AnswerFile(path, SETTINGS, resume=True)
    beside.write_text(kept)
    path.write_bytes(before + b'{"index": 7}\n')
    with pytest.raises(UserError, match="line 3 is not what was written there"):
        AnswerFile(path, SETTINGS, resume=True)


def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    one, two = (AnswerFile(path, SETTINGS, resume=False) for _ in range(2))
    with one.open():
        one.write({"index": 0})
        with pytest.raises(UserError, match="is being written by another process"), two.open():
            pass
    with pytest.raises(UserError, match="was written by another process meanwhile"), two.open():
        pass
    assert path.read_text() == '{"index": 0}\n'


def test_a_file_that_is_held_is_not_taken_for_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, SETTINGS, resume=False).open():
        for resume in (False, True):
            with (
                pytest.raises(UserError, match="is being written by another process"),
                AnswerFile(path, SETTINGS, resume=resume).open(),
            ):
                pass
    assert list(tmp_path.iterdir()) == [], "nothing was answered"


def test_a_line_that_does_not_fit_is_cut_off(tmp_path: Path) -> None:
    class Full:
        def write(self, content: memoryview) -> int:
            with path.open("ab") as file:
                file.write(content[:4])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, SETTINGS, resume=False)
    with pytest.raises(UserError, match="cannot be written: the disk is full; make room there"), file.open():
        file.write({"index": 0})
        file.file = Full()
        file.write({"index": 1})
    assert path.read_text() == '{"index": 0}\n'
    with (again := AnswerFile(path, SETTINGS, resume=True)).open():
        again.write({"index": 1})
    assert path.read_text() == '{"index": 0}\n{"index": 1}\n'


def test_fields_of_the_input_keep_their_values() -> None:
    assert line_fields({"prompt": "a", "answer": "gold", "more": 1}, "line 1") == {
        "prompt": "a",
        "input_answer": "gold",
        "more": 1,
    }
    with pytest.raises(UserError, match="line 1: 'answer' would be written as 'input_answer'"):
        line_fields({"answer": "a", "input_answer": "b"}, "line 1")
