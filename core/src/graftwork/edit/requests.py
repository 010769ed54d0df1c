"""What is to be written into a model: requests, and what is wrong with some of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.edit.errors import RequestError

SLOT = "{}"


@dataclass(frozen=True)
class Probe:
    """A full prompt beside the edit, and what is right there where that is known."""

    prompt: str
    target: str | None = None


@dataclass(frozen=True)
class Request:
    """One edit: after ``prompt``, with ``subject`` in its slot, the model is to say ``target``.

    Attributes:
        id: for messages and rows.
        prompt: text with exactly one ``{}``.
        subject: what stands in the slot: a name, or an event.
        target: what is to follow, without the space before it.
        target_true: what followed before, where that is known.
        variants: other texts for the slot that the edit is to hold for, such as names in place of PersonX.
        paraphrases: full prompts that ask the same.
        neighbors: prompts of the same relation about something else, whose ``target`` must stay.
        locality: prompts that have nothing to do with the edit.
    """

    id: str
    prompt: str
    subject: str
    target: str
    target_true: str | None = None
    variants: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Probe, ...] = ()
    locality: tuple[Probe, ...] = ()

    @property
    def text(self) -> str:
        """The prompt with the subject in its slot."""
        return self.filled(self.subject)

    def filled(self, subject: str) -> str:
        """Return the prompt with ``subject`` in its slot."""
        before, after = self.parts
        return before + subject + after

    @property
    def parts(self) -> tuple[str, str]:
        """What stands before and after the slot."""
        before, _, after = self.prompt.partition(SLOT)
        return before, after

    def record(self) -> dict[str, Any]:
        """Return what is edited, as JSON values: id, prompt, subject, target, and variants where there are some."""
        fields = {"id": self.id, "prompt": self.prompt, "subject": self.subject, "target": self.target}
        return {**fields, **({"variants": list(self.variants)} if self.variants else {})}


def check_requests(requests: Sequence[Request]) -> None:
    """Refuse requests that cannot be made, without a tokenizer.

    Raises:
        RequestError: there is none; an empty target, subject, variant or id; a prompt without exactly one slot; two
            of one id; two of one filled prompt, be it with the same target or another.
    """
    if not requests:
        raise RequestError("there is no request to edit")
    ids: dict[str, int] = {}
    prompts: dict[str, int] = {}
    for number, one in enumerate(requests):
        where = f"request {number + 1} ('{one.id}')"
        if not one.id:
            raise RequestError(f"request {number + 1} has no id")
        if not one.subject.strip():
            raise RequestError(f"{where} has an empty subject; name what the edit is about")
        if not one.target.strip():
            raise RequestError(f"{where} has an empty target; say what the model is to answer")
        if one.prompt.count(SLOT) != 1:
            raise RequestError(
                f"{where}: its prompt '{one.prompt}' has {one.prompt.count(SLOT)} slots; it needs exactly one {SLOT}, "
                f"where the subject '{one.subject}' stands"
            )
        if any(not variant.strip() for variant in one.variants):
            raise RequestError(f"{where} has an empty variant; leave it out")
        if one.id in ids:
            raise RequestError(f"requests {ids[one.id] + 1} and {number + 1} have one id, '{one.id}'")
        ids[one.id] = number
        text = " ".join(one.text.split())
        if text in prompts:
            other = requests[prompts[text]]
            what = (
                f"ask for the same ('{one.target}')"
                if other.target.strip() == one.target.strip()
                else f"contradict each other ('{other.target}' and '{one.target}')"
            )
            raise RequestError(
                f"requests {prompts[text] + 1} ('{other.id}') and {number + 1} ('{one.id}') share the prompt '{text}' "
                f"and {what}; keep one"
            )
        prompts[text] = number


def digest(requests: Sequence[Request]) -> str:
    """Return the sha256 of what is edited; evaluation prompts do not count."""
    text = json.dumps([one.record() for one in requests], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def with_slot(text: str, subject: str, where: str) -> str:
    """Return a full prompt as a template: the last place of ``subject`` becomes the slot.

    Raises:
        RequestError: the subject is empty or does not stand in the prompt.
    """
    at = text.rfind(subject) if subject else -1
    if at < 0:
        raise RequestError(f"{where}: the subject '{subject}' does not stand in the prompt '{text}'")
    return text[:at] + SLOT + text[at + len(subject) :]


def without_probes(request: Request) -> Request:
    """Return the request with nothing but the edit itself."""
    return dataclasses.replace(request, paraphrases=(), neighbors=(), locality=())
