"""The layout of CKEBench on records of ours: targets come off, noise is told, nothing is lost, mistakes are named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from graftwork import UserError
from graftwork.edit.errors import RequestError
from graftwork.edit.layouts import read_requests
from graftwork.edit.requests import check_requests
from graftwork_dem.ckebench import NOISE, read, relation, requests, strip_target

NAMES = ("Emily", "Michael", "James", "William", "Benjamin")


def rewrite(event: str, tail: str, target: str) -> dict[str, Any]:
    return {
        "prompt": f"{event}, {tail} {target}",
        "subject": event,
        "subsubject": "",
        "target_new": {"str": target},
        "target_true": {"str": ""},
        "relation_id": "",
        "attribute": "",
        "prediction": "",
    }


def record(number: int = 0, event: str = "PersonX waters the roses", **changes: Any) -> dict[str, Any]:
    tail, target = "as a result, PersonX wants", "to smell them"
    words = event.removeprefix("PersonX ")
    made = {
        "case_id": number,
        "requested_rewrite": rewrite(event, tail, target),
        "paraphrase_prompts": [f"{event}. Question {k}: PersonX wants" for k in range(5)],
        "neighborhood_prompts": [f"PersonX feeds cat {k}, does PersonX want {target}?" for k in range(5)],
        "sub-neighborhood_prompts": [f"{name} {words}" for name in NAMES],
        "sub-neighborhood_prompts_rewrite": [rewrite(f"{name} {words}", tail, target) for name in NAMES],
        "generation_prompts": [f"{event}, resulting in PersonX {target}, right {k}?" for k in range(5)],
    }
    made.update(changes)
    return made


def written(folder: Path, *records: Any) -> Path:
    path = folder / "bench.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def test_a_clean_record_becomes_a_request_without_its_target(tmp_path: Path) -> None:
    bench = read(written(tmp_path, record(7)))
    (request,) = bench.requests
    assert request.id == "7"
    assert request.prompt == "{}, as a result, PersonX wants"
    assert request.subject == "PersonX waters the roses"
    assert request.target == "to smell them"
    assert request.text + " " + request.target == record()["requested_rewrite"]["prompt"]
    assert request.variants == tuple(f"{name} waters the roses" for name in NAMES)
    assert len(request.paraphrases) == 5
    assert [probe.target for probe in request.locality] == ["no"] * 10
    assert bench.noise == [frozenset({"target_in_prompt"})]
    check_requests(bench.requests)


def test_prompts_with_a_slot_keep_it(tmp_path: Path) -> None:
    made = record()
    made["requested_rewrite"]["prompt"] = "{}, as a result, PersonX wants to smell them"
    (request,) = read(written(tmp_path, made)).requests
    assert request.prompt == "{}, as a result, PersonX wants"


def test_every_kind_of_noise_is_flagged_and_only_where_it_is(tmp_path: Path) -> None:
    target = "to smell them"

    def changed(**parts: Any) -> dict[str, Any]:
        return record(**parts)

    to_to = record()
    to_to["requested_rewrite"]["prompt"] = (
        "PersonX waters the roses, as a result, PersonX wants to to smell them"
    )
    intent = record()
    intent["requested_rewrite"] = rewrite("PersonX waters the roses", "which means PersonX wanted", target)
    blank = record(event="PersonX waters ___")
    few = changed(paraphrase_prompts=["PersonX waters the roses. PersonX wants"] * 5)
    same = changed(neighborhood_prompts=["PersonX waters the roses, does PersonX want to smell them?"] * 5)
    generation = changed(
        generation_prompts=["PersonX waters the roses, as a result, PersonX wants to smell them, right?"] * 5
    )
    unnamed = record()
    unnamed["sub-neighborhood_prompts_rewrite"][0] = rewrite(
        "PersonX waters the rose", "PersonX wants", target
    )
    other = record(event="PersonX paints a tulip")
    cases = [
        (to_to, "to_to"),
        (intent, "template_differs"),
        (blank, "blank"),
        (few, "few_paraphrases"),
        (same, "neighbor_is_edit"),
        (generation, "generation_same_relation"),
        (unnamed, "variant_not_named"),
    ]
    for made, kind in cases:
        assert read(written(tmp_path, made)).noise == [frozenset({"target_in_prompt", kind})], kind
    near = changed(neighborhood_prompts=["PersonX paints a tulip, does PersonX want to smell them?"] * 5)
    bench = read(written(tmp_path, near, other))
    assert bench.noise[0] == {"target_in_prompt", "neighbor_is_other_edit"}
    plain = record()
    plain["requested_rewrite"]["prompt"] = "PersonX waters the roses, as a result, PersonX wants"
    assert read(written(tmp_path, plain)).noise == [frozenset()]
    assert {kind for _, kind in cases} | {"neighbor_is_other_edit", "target_in_prompt"} == set(NOISE)


def test_what_noise_spoils_is_left_out_and_labels_are_turned(tmp_path: Path) -> None:
    made = record(
        neighborhood_prompts=["PersonX waters the roses, why?", "PersonX feeds a cat, why?"],
        generation_prompts=["PersonX waters the roses, as a result, PersonX wants to smell them, right?"],
    )
    made["sub-neighborhood_prompts_rewrite"][0]["subject"] = "PersonX waters the rose"
    (request,) = read(written(tmp_path, made)).requests
    assert [(probe.prompt[:15], probe.target) for probe in request.locality] == [
        ("PersonX feeds a", "no"),
        ("PersonX waters ", "yes"),
    ]
    assert len(request.variants) == 4


def test_no_record_is_lost_and_notes_count_them(tmp_path: Path) -> None:
    many = [record(number, f"PersonX meets friend {number % 4}") for number in range(12)]
    path = written(tmp_path, *many)
    bench = read(path)
    assert [request.id for request in bench.requests] == [str(number) for number in range(12)]
    assert bench.counts["target_in_prompt"] == 12
    assert "12 of 12 records: the prompt ends with its target, which was taken off" in bench.notes()
    # Of records that would contradict each other the first is edited.
    assert [request.id for request in requests(path)] == ["0", "1", "2", "3"]
    found = read_requests(f"graftwork_dem.ckebench:requests:{path}", limit=2, offset=1)
    assert [request.id for request in found] == ["1", "2"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda one: one["requested_rewrite"].update(subject=" "),
            "record 0 has no text at requested_rewrite.subject",
        ),
        (lambda one: one["requested_rewrite"].update(target_new={"str": ""}), "target_new.str"),
        (lambda one: one.pop("requested_rewrite"), "record 0 has no text at requested_rewrite.prompt"),
        (
            lambda one: one["requested_rewrite"].update(subject="PersonY sleeps"),
            "does not stand in the prompt",
        ),
        (lambda one: one.update(paraphrase_prompts="none"), "'paraphrase_prompts' is no list"),
        (lambda one: one.update(generation_prompts=[3]), "'generation_prompts' holds something other"),
    ],
)
def test_a_spoilt_record_is_named(tmp_path: Path, spoil: Any, says: str) -> None:
    made = copy.deepcopy(record())
    spoil(made)
    with pytest.raises(RequestError, match=says):
        read(written(tmp_path, made))


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not shipped"):
        requests()
    with pytest.raises(UserError, match="does not exist; it is not shipped"):
        read(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read(broken)
    broken.write_text("{}")
    with pytest.raises(UserError, match="no JSON list"):
        read(broken)


@pytest.mark.parametrize(
    ("prompt", "target", "left"),
    [
        ("PersonX wants to rest", "to rest", "PersonX wants"),
        ("PersonX wants To Rest.", "to rest", "PersonX wants"),
        ("PersonX wants to rest", "sleep", "PersonX wants to rest"),
        # Only whole words come off.
        ("PersonX likes oats", "ats", "PersonX likes oats"),
    ],
)
def test_targets_come_off_whole(prompt: str, target: str, left: str) -> None:
    assert strip_target(prompt, target) == (left, left != prompt)


def test_relations_are_told_by_wording() -> None:
    assert relation("as a result, PersonX wants") == "xWant"
    assert relation("before, PersonX needed") == "xNeed"
    assert relation("which means PersonX wanted") == "xIntent"
    assert relation("resulting in PersonX") == "xEffect"
    assert relation("as a result, others want") == "oWant"
    assert relation("PersonX is tall") is None
