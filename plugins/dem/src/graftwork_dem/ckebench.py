"""The layout of CKEBench: a list of 15,600 records in JSON, which the user brings; we ship nothing of it.

Its prompts end with their target, which is taken off. Its kinds of noise are told, record by record, and what cannot
be used is left out of the record; records themselves are all kept. What the fields are and how they are flawed: dem.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.edit.errors import RequestError
from graftwork.edit.requests import SLOT, Probe, Request, with_slot
from graftwork.errors import UserError

ANYBODY = "personx"
NOISE = {
    "target_in_prompt": "the prompt ends with its target, which was taken off",
    "to_to": "the prompt reads 'to to' before its target; one was taken off",
    "template_differs": "the prompt's wording is not that of its paraphrases (intent and effect)",
    "blank": "the event holds a blank ___",
    "few_paraphrases": "fewer than five different paraphrases",
    "neighbor_is_edit": "a neighbour asks for the edited event itself; left out",
    "neighbor_is_other_edit": "a neighbour asks for another edit of the file; left out",
    "generation_same_relation": "a question about another relation asks for the edited one; it counts as yes",
    "variant_not_named": "an instantiated event still says PersonX; left out",
}
_RELATIONS = (
    ("oWant", r"\bothers?\b.*\bwants?\b"),
    ("oReact", r"\bothers?\b.*\bfeels?\b"),
    ("xNeed", r"\bneed(s|ed)?\b"),
    ("xIntent", r"\b(which means|because)\b"),
    ("xAttr", r"\b(seen|viewed|described) as\b"),
    ("xWant", r"\bas a result\b.*\bwants?\b"),
    ("xEffect", r"\b(resulting in|as a result\b.*\bwill)\b"),
)


@dataclass(frozen=True)
class Bench:
    """What was read: a request and its kinds of noise (keys of ``NOISE``) per record, in the file's order."""

    requests: Sequence[Request]
    noise: Sequence[frozenset[str]]

    @property
    def counts(self) -> dict[str, int]:
        """How many records have each kind of noise."""
        found = Counter(kind for one in self.noise for kind in one)
        return {kind: found[kind] for kind in NOISE}

    def notes(self) -> list[str]:
        """Return a sentence per kind of noise that occurs."""
        total = len(self.requests)
        return [f"{count} of {total} records: {NOISE[kind]}" for kind, count in self.counts.items() if count]


def relation(text: str) -> str | None:
    """Return the relation that a prompt asks for, by its wording; None where it is none of the seven."""
    text = " ".join(text.lower().split())
    return next((name for name, pattern in _RELATIONS if re.search(pattern, text)), None)


def strip_target(prompt: str, target: str) -> tuple[str, bool]:
    """Return the prompt without the target at its end, and whether it was there; case and a full stop do not count."""
    text, tail = prompt.rstrip().rstrip("."), target.strip().rstrip(".")
    if tail and text.lower().endswith(tail.lower()):
        cut = text[: len(text) - len(tail)]
        if not cut or not cut[-1].isalnum():
            return cut.rstrip(), True
    return prompt.rstrip(), False


def read(path: Path) -> Bench:
    """Read a file of this layout.

    Raises:
        UserError: it is missing, or no JSON list of records.
        RequestError: a record without event or target, or whose event is not in its prompt (with its index).
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"CKEBench file '{path}' does not exist; it is not shipped (no licence is stated): give your own copy"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"CKEBench file '{path}' cannot be read as JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"CKEBench file '{path}' is no JSON list of records")
    edited: dict[str, set[str]] = {}
    for number, record in enumerate(records):
        _, event, target = _rewrite(record, "requested_rewrite", number)
        edited.setdefault(_plain(target), set()).add(_plain(event))
    found = [_record(record, number, edited) for number, record in enumerate(records)]
    return Bench([request for request, _ in found], [noise for _, noise in found])


def requests(path: Path | None = None) -> list[Request]:
    """Return the records that can be edited together, for ``requests: graftwork_dem.ckebench:requests:FILE``.

    Of several records with one prompt the first is kept: together they would contradict each other.
    """
    if path is None:
        raise UserError(
            "CKEBench is not shipped (no licence is stated); name your copy: graftwork_dem.ckebench:requests:FILE"
        )
    first: dict[str, Request] = {}
    for request in read(path).requests:
        first.setdefault(" ".join(request.text.split()), request)
    return list(first.values())


def _record(
    record: Mapping[str, Any], number: int, edited: Mapping[str, set[str]]
) -> tuple[Request, frozenset[str]]:
    prompt, event, target = _rewrite(record, "requested_rewrite", number)
    where = f"record {number}"
    noise: set[str] = set()
    prompt, there = strip_target(prompt, target)
    if there:
        noise.add("target_in_prompt")
    if there and prompt.lower().endswith(" to") and target.lower().startswith("to "):
        prompt = prompt[:-3].rstrip()
        noise.add("to_to")
    template = prompt if SLOT in prompt else with_slot(prompt, event, where)
    asked = relation(template.replace(SLOT, ""))
    if "which means" in template.lower() or "resulting in" in template.lower():
        noise.add("template_differs")
    if "___" in event:
        noise.add("blank")
    paraphrases = tuple(
        dict.fromkeys(strip_target(one, target)[0] for one in _texts(record, "paraphrase_prompts", number))
    )
    if len(paraphrases) < 5:
        noise.add("few_paraphrases")
    probes = []
    for one in _texts(record, "neighborhood_prompts", number):
        plain = _plain(one)
        if _plain(event) in plain:
            noise.add("neighbor_is_edit")
        elif any(other in plain for other in edited[_plain(target)]):
            noise.add("neighbor_is_other_edit")
        else:
            probes.append(Probe(one, "no"))
    for one in _texts(record, "generation_prompts", number):
        same = asked is not None and relation(_without(one, event)) == asked
        if same:
            noise.add("generation_same_relation")
        probes.append(Probe(one, "yes" if same else "no"))
    variants = []
    # The key has a hyphen, unlike the others.
    for one in _list(record, "sub-neighborhood_prompts_rewrite", number):
        _, subject, _ = _rewrite({"": one}, "", number)
        if subject.lower().startswith(ANYBODY):
            noise.add("variant_not_named")
        else:
            variants.append(subject)
    request = Request(
        id=str(record.get("case_id", number)),
        prompt=template,
        subject=event,
        target=target,
        variants=tuple(dict.fromkeys(variants)),
        paraphrases=paraphrases,
        locality=tuple(probes),
    )
    return request, frozenset(noise)


def _rewrite(record: Any, key: str, number: int) -> tuple[str, str, str]:
    """Return prompt, event and target of a rewrite."""
    rewrite = record.get(key) if isinstance(record, dict) else None
    new = rewrite.get("target_new") if isinstance(rewrite, dict) else None
    target = new.get("str") if isinstance(new, dict) else new
    given = rewrite if isinstance(rewrite, dict) else {}
    found = []
    for name, value in (
        ("prompt", given.get("prompt")),
        ("subject", given.get("subject")),
        ("target_new.str", target),
    ):
        if not isinstance(value, str) or not value.strip():
            place = key or "sub-neighborhood_prompts_rewrite"
            raise RequestError(f"record {number} has no text at {place}.{name}")
        found.append(value.strip())
    prompt, event, answer = found
    return prompt, event, answer


def _list(record: Mapping[str, Any], key: str, number: int) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list):
        raise RequestError(f"record {number}: '{key}' is no list")
    return value


def _texts(record: Mapping[str, Any], key: str, number: int) -> list[str]:
    values = _list(record, key, number)
    if any(not isinstance(one, str) for one in values):
        raise RequestError(f"record {number}: '{key}' holds something other than texts")
    return values


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _without(text: str, event: str) -> str:
    return re.sub(re.escape(event), "", text, flags=re.IGNORECASE)
