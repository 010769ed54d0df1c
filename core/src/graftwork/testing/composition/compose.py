"""Try plugins together on a tiny model: train, transform, generate, each in which one of them takes part."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from graftwork.card import hooks_of
from graftwork.errors import PluginError, UserError
from graftwork.plugins import load_class
from graftwork.testing.composition.reading import decoding_run, read
from graftwork.testing.composition.trail import Broken, Trail
from graftwork.testing.composition.workshop import Workshop

Verdict = Literal["composes", "refused", "broken"]


@dataclass(frozen=True)
class Outcome:
    """What came of trying some plugins together.

    Attributes:
        plugins: in the order in which they were tried, which is the one that composes where only one does.
        verdict: ``composes``; ``refused`` in a sentence, before any weight was read; or ``broken``.
        detail: the sentence, or what is wrong.
        stored: the model that was written and how it is read, for a comparison in another process.
    """

    plugins: tuple[str, ...]
    verdict: Verdict
    detail: str = ""
    stored: Mapping[str, Any] | None = None


class Composer:
    """Tries combinations in a :class:`graftwork.testing.composition.workshop.Workshop` of the same arguments."""

    def __init__(self, folder: Path, options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.folder = folder
        self.shop = Workshop(folder, options)
        self._trails: dict[tuple[tuple[str, ...], bool], Trail | Exception] = {}

    def outcome(self, names: Sequence[str]) -> Outcome:
        """Try plugins together, in the order given and, where that is refused, in every other."""
        refusals = []
        for order in itertools.permutations(names):
            try:
                trail = self._trail(order)
                self._effects(order, trail)
            except UserError as error:
                refusals.append(Outcome(order, "refused", str(error)))
                continue
            except (Broken, PluginError) as error:
                return Outcome(order, "broken", str(error))
            reading = trail.reading
            assert reading is not None
            stored = {
                "model": trail.model,
                "plugins": trail.decoders,
                "imports": list(order),
                **asdict(reading),
            }
            return Outcome(order, "composes", stored=stored)
        return _judged(refusals[0])

    def again(self, name: str) -> list[str]:
        """Run a plugin alone once more; return what came out otherwise: losses, weights, logits, tokens.

        Raises:
            UserError: it is refused alone.
        """
        first = self._trail((name,)).marks()
        second = (
            Composer(self.folder / "again" / name, {name: self.shop.options(name)})._trail((name,)).marks()
        )
        return _changed(first, second)

    def from_plain(self, name: str) -> list[str]:
        """Return what a plugin alone changes of what would be without it: losses, logits, tokens.

        Raises:
            UserError: it is refused alone.
        """
        mine = self._trail((name,)).marks()
        theirs = self._trail((), trained="train" in self.shop.stages(name)).marks()
        del theirs["offers"]
        if "combiner" in hooks_of(load_class(name)):
            # Two streams are read as one batch, whose size rounds the scores otherwise; their tokens are the same.
            del theirs["scores"]
        return _changed(theirs, mine)

    def _effects(self, order: tuple[str, ...], trail: Trail) -> None:
        """Every one of the plugins must have changed something that the others alone do not."""
        trained = bool(self.shop.members(order, "train"))
        for name in order:
            others = tuple(one for one in order if one != name)
            try:
                without = self._trail(others, trained)
            except (UserError, PluginError, Broken):
                # Nothing to compare with: this one makes the others possible.
                continue
            if trail.marks() == without.marks():
                rest = f"with {' and '.join(others)} " if others else ""
                raise Broken(f"'{name}' {rest}changes nothing: losses, weights and answers are the same")

    def _trail(self, order: tuple[str, ...], trained: bool = False) -> Trail:
        """Return what some plugins leave; ``trained``: of a model that was trained, also where none takes part."""
        key = order, trained or bool(self.shop.members(order, "train"))
        if key not in self._trails:
            try:
                self._trails[key] = self._go(*key)
            except (UserError, PluginError, Broken) as error:
                self._trails[key] = error
        found = self._trails[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _go(self, order: tuple[str, ...], trained: bool) -> Trail:
        trail = Trail(self.shop.base)
        for stage in ("train", "transform"):
            members = self.shop.members(order, stage)
            if members or (stage == "train" and trained):
                trail.model, numbers = self.shop.write(stage, trail.model, members)
                trail.numbers |= numbers
        trail.decoders = {name: self.shop.options(name) for name in self.shop.members(order, "generate")}
        trail.numbers["offers"] = self.shop.offers(order)
        decoding_run(trail.model, trail.decoders)
        try:
            trail.reading = read(trail.model, trail.decoders)
        except UserError as error:
            raise Broken(f"refused only after the weights were read: {error}") from error
        return trail


def _judged(refusal: Outcome) -> Outcome:
    """A refusal names two plugins, the hook, and the way out, which follows a semicolon."""
    named = sum(f"'{name}'" in refusal.detail for name in refusal.plugins)
    if named >= 2 and "(hook " in refusal.detail and ";" in refusal.detail:
        return refusal
    what = (
        "refused alone" if len(refusal.plugins) == 1 else "refused without both names, the hook, the way out"
    )
    return replace(refusal, verdict="broken", detail=f"{what}: {refusal.detail}")


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [key for key in before if before[key] != after.get(key)]


def write_stored(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write what composes as the input of :mod:`graftwork.testing.composition.reload`."""
    path.write_text(json.dumps([one.stored for one in outcomes if one.stored]), encoding="utf-8")
