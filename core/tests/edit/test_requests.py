"""Requests: what is refused, and that files of all layouts say what they mean."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from graftwork import UserError
from graftwork.edit.encoding import check_lengths
from graftwork.edit.errors import RequestError
from graftwork.edit.facts import facts, write_facts
from graftwork.edit.layouts import read_requests, write_requests
from graftwork.edit.requests import Probe, Request, check_requests, digest
from graftwork.testing.editing import REQUESTS

ONE = Request("1", "{} is in", "Lyon", "Rome")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": " "}, "empty target"),
        ({"subject": ""}, "empty subject"),
        ({"prompt": "Lyon is in"}, "0 slots"),
        ({"prompt": "{} and {}"}, "2 slots"),
        ({"variants": ("Bonn", "")}, "empty variant"),
        ({"id": ""}, "no id"),
    ],
)
def test_a_request_that_cannot_be_made_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_requests([dataclasses.replace(REQUESTS[1]), dataclasses.replace(ONE, **changes)])


def test_duplicates_and_contradictions_name_both() -> None:
    other = dataclasses.replace(ONE, id="2")
    with pytest.raises(RequestError, match=r"1 \('1'\) and 2 \('2'\).*ask for the same"):
        check_requests([ONE, other])
    with pytest.raises(
        RequestError, match=r"1 \('1'\) and 2 \('2'\).*contradict each other \('Rome' and 'Peru'\)"
    ):
        check_requests([ONE, dataclasses.replace(other, target="Peru")])
    # The same sentence with its slot elsewhere is the same prompt.
    with pytest.raises(RequestError, match="share the prompt"):
        check_requests([ONE, Request("3", "Lyon {} in", "is", "Peru")])
    with pytest.raises(RequestError, match="have one id"):
        check_requests([ONE, dataclasses.replace(REQUESTS[1], id="1")])
    with pytest.raises(RequestError, match="no request"):
        check_requests([])


def test_a_target_that_is_too_long_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match=r"'1'.*5 tokens, and at most 4"):
        check_lengths(tokenizer, [ONE], 4)
    check_lengths(tokenizer, [ONE], 5)


def test_jsonl_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    write_requests(path, REQUESTS)
    assert read_requests(str(path)) == REQUESTS
    assert read_requests(f"jsonl:{path}", offset=1) == REQUESTS[1:]
    assert digest(read_requests(str(path))) == digest(REQUESTS)


def test_a_prompt_without_a_slot_gets_one_where_its_subject_stands(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "Lyon is in", "subject": "Lyon", "target": "Rome"}\n')
    assert read_requests(str(path))[0].prompt == "{} is in"
    path.write_text('{"prompt": "Nice is in", "subject": "Lyon", "target": "Rome"}\n')
    with pytest.raises(RequestError, match=r"record 1: the subject 'Lyon' does not stand in the prompt"):
        read_requests(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "{} is", "subject": "a", "target": "b", "targets": []}', "unknown key 'targets'"),
        ('{"prompt": "{} is", "subject": "a"}', "record 1 has no 'target'"),
        ('{"prompt": "{} is", "subject": "a", "target": 3}', "'target' is int"),
        ('{"prompt": "{} is", "subject": "a", "target": "b", "variants": "c"}', "'variants' is no list"),
        ("[1", "line 1 is no JSON"),
        ("[]", "no JSON object"),
        ("", "has 0 requests"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(RequestError, match=words):
        read_requests(str(path))


def test_missing_files_and_layouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_requests(str(tmp_path / "no.jsonl"))
    with pytest.raises(RequestError, match="did you mean 'counterfact'"):
        read_requests("counterfacts:x.json")


def test_counterfact_in_both_forms(tmp_path: Path) -> None:
    record = {
        "case_id": 7,
        "pararel_idx": 1,
        "requested_rewrite": {
            "prompt": "{} speaks",
            "relation_id": "P1",
            "target_new": {"str": "Latin", "id": "Q1"},
            "target_true": {"str": "Greek", "id": "Q2"},
            "subject": "Homer",
        },
        "paraphrase_prompts": ["Odd words. Homer talks in"],
        "neighborhood_prompts": ["Plato speaks"],
        "attribute_prompts": [],
        "generation_prompts": [],
    }
    flat = {
        "case_id": 7,
        "prompt": "Homer speaks",
        "subject": "Homer",
        "target_new": "Latin",
        "ground_truth": "Greek",
        "rephrase_prompt": "Odd words. Homer talks in",
        "locality_prompt": "Plato speaks",
        "locality_ground_truth": "Greek",
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps([record, flat]))
    first, second = read_requests(f"counterfact:{path}")
    assert first == second
    assert first == Request(
        "7",
        "{} speaks",
        "Homer",
        "Latin",
        "Greek",
        paraphrases=("Odd words. Homer talks in",),
        neighbors=(Probe("Plato speaks", "Greek"),),
    )


def test_zsre_is_two_tasks_in_one_file(tmp_path: Path) -> None:
    record = {
        "subject": "Homer",
        "src": "What did Homer speak?",
        "rephrase": "Which tongue was Homer's?",
        "answers": ["Greek"],
        "alt": "Latin",
        "loc": "nq question: who wrote it",
        "loc_ans": "Homer",
    }
    path = tmp_path / "z.json"
    path.write_text(json.dumps([record]))
    (edited,) = read_requests(f"zsre:{path}")
    assert (edited.prompt, edited.target, edited.target_true) == ("What did {} speak?", "Greek", None)
    assert edited.locality == (Probe("nq question: who wrote it?", "Homer"),)
    (other,) = read_requests(f"zsre-alt:{path}")
    assert (other.target, other.target_true) == ("Latin", "Greek")
    path.write_text(json.dumps([{**record, "subject": "Plato"}]))
    with pytest.raises(RequestError, match="record 1: the subject 'Plato' does not stand"):
        read_requests(f"zsre:{path}")


def test_facts_are_counterfact_records_that_can_all_be_edited_together(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_facts(path, seed=3)
    found = read_requests(f"counterfact:{path}")
    assert found == read_requests("facts:3")
    check_requests(found)
    assert len(found) == len(facts()) > 100
    for one in found:
        assert one.target != one.target_true
        assert one.neighbors
        assert all(one.subject in text for text in one.paraphrases)
        assert not any(one.subject in probe.prompt for probe in one.neighbors)
    assert [one.id for one in read_requests("facts:3", limit=2, offset=1)] == ["1", "2"]
