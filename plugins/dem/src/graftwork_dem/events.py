"""Edits of everyday common sense, written by us in the manner of free-text benchmarks: an event, a clause as answer.

``PersonX`` stands for anybody, so one edit is to hold for every name in its place. No text of any data set is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graftwork.edit.errors import RequestError
from graftwork.edit.requests import Probe, Request

from graftwork_dem.everyday import EVENTS, RELATIONS

ANYBODY = "PersonX"
NAMES = ("Amara", "Tomas", "Yuki", "Lena", "Idris")
PROMPTS = {
    "want": "{}. As a result, this person wants",
    "need": "{}. Before that, this person needed",
    "intent": "{}. This person did so in order",
    "effect": "{}. Soon afterwards, this person",
    "seen": "{}. Others would call this person",
}
PARAPHRASES = {
    "want": ("{}. What this person would like next is", "Suppose that {}. Now this person hopes"),
    "need": ("{}. For this to happen, this person first had", "Suppose that {}. Beforehand, this person had"),
    "intent": ("{}. The purpose of it was", "Suppose that {}. The reason was that this person meant"),
    "effect": ("{}. What comes of it is that this person", "Suppose that {}. Then this person"),
    "seen": ("{}. Whoever sees this finds the person", "Suppose that {}. One may say that this person is"),
}
NEIGHBORS = 3


@dataclass(frozen=True)
class _Edit:
    event: int
    relation: str
    target: str

    @property
    def subject(self) -> str:
        return f"{ANYBODY} {EVENTS[self.event][0]}"


def _all() -> list[_Edit]:
    """Return every edit; neighbours in the list differ in event and relation."""
    edits = []
    for turn in range(len(RELATIONS)):
        for number, (_, *answers) in enumerate(EVENTS):
            place = (number + turn) % len(RELATIONS)
            edits.append(_Edit(number, RELATIONS[place], answers[place]))
    return edits


def commonsense(limit: int | None = None, offset: int = 0) -> list[Request]:
    """Return the edits from ``offset`` on, each with five names as variants, two paraphrases and three neighbours.

    Neighbours are other events in the prompt of the same relation, with what is right there.
    """
    edits = _all()
    chosen = range(len(edits))[offset : None if limit is None else offset + limit]
    return [_request(edits[number], edits) for number in chosen]


def requests(path: Path | None = None) -> list[Request]:
    """Return all edits, for ``requests: graftwork_dem.events:requests``.

    Raises:
        RequestError: a file was named; these edits are made, not read.
    """
    if path is not None:
        raise RequestError(f"these edits are made and not read, so there is no use for the file '{path}'")
    return commonsense()


def _request(edit: _Edit, edits: Sequence[_Edit]) -> Request:
    words = EVENTS[edit.event][0]
    prompt = PROMPTS[edit.relation]
    same = [one for one in edits if one.relation == edit.relation and one.event != edit.event]
    start = edit.event % len(same)
    near = [same[(start + 7 * turn) % len(same)] for turn in range(NEIGHBORS)]
    return Request(
        id=f"{edit.relation}-{edit.event + 1:02}",
        prompt=prompt,
        subject=edit.subject,
        target=edit.target,
        variants=tuple(f"{name} {words}" for name in NAMES),
        paraphrases=tuple(one.replace("{}", edit.subject) for one in PARAPHRASES[edit.relation]),
        neighbors=tuple(Probe(prompt.replace("{}", one.subject), one.target) for one in near),
    )
