"""Files of requests: our JSONL, CounterFact (two forms) and zsRE (two tasks in one form)."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.edit.errors import RequestError
from graftwork.edit.requests import SLOT, Probe, Request, with_slot
from graftwork.errors import UserError, did_you_mean
from graftwork.plugins import ENTRY_POINT_GROUP

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_KNOWN = {
    "id",
    "prompt",
    "subject",
    "target",
    "target_true",
    "variants",
    "paraphrases",
    "neighbors",
    "locality",
}


def read_requests(ref: str, *, limit: int | None = None, offset: int = 0) -> list[Request]:
    """Return the requests that ``ref`` names: ``FILE`` (JSONL) or ``<layout>:FILE``.

    Layouts are ``jsonl``, ``counterfact`` (the paper's records or EasyEdit's flat ones), ``zsre`` (the target is the
    first answer), ``zsre-alt`` (the counterfactual one) and ``facts`` (generated ones; ``facts:SEED``, no file). What a
    plugin's package reads or makes is ``<module>:<function>`` or ``<module>:<function>:FILE``: the function takes the
    path, or None, and returns the requests.

    Raises:
        UserError: the file is missing or no JSON, or there is no such module or function.
        RequestError: a record that is no request, with its number.
    """
    layout, colon, rest = ref.partition(":")
    if colon and _MODULE.fullmatch(layout) and not Path(ref).is_file():
        return _cut(_of_module(layout, rest), ref, limit, offset)
    if ref == "facts" or layout == "facts":
        from graftwork.edit.facts import facts

        if rest and not rest.isdigit():
            raise RequestError(f"'{ref}': what follows facts: is a seed, a number")
        records: Sequence[Any] = facts(int(rest or 0))
        reader = _counterfact
    else:
        if not colon or (layout not in _READERS and Path(ref).is_file()):
            layout, rest = "jsonl", ref
        if layout not in _READERS:
            raise RequestError(
                f"no layout '{layout}' of requests{did_you_mean(layout, _READERS)}; there are {', '.join(_READERS)}, "
                f"facts"
            )
        records = _json_lines(Path(rest)) if layout == "jsonl" else _json_list(Path(rest))
        reader = _READERS[layout]
    found = []
    for number, record in enumerate(_cut(records, ref, limit, offset), offset + 1):
        where = f"'{ref}', record {number}"
        try:
            found.append(reader(record, number, where))
        except KeyError as error:
            raise RequestError(f"{where} has no {error}") from None
        except (TypeError, AttributeError, IndexError) as error:
            raise RequestError(f"{where} is not of the layout '{layout}': {error}") from None
    return found


def _cut(records: Sequence[Any], ref: str, limit: int | None, offset: int) -> list[Any]:
    chosen = records[offset : None if limit is None else offset + limit]
    if not chosen:
        raise RequestError(f"'{ref}' has {len(records)} requests, none of them after the first {offset}")
    return list(chosen)


def _of_module(module: str, rest: str) -> Sequence[Request]:
    """Return what a function of an installed package gives."""
    name, _, path = rest.partition(":")
    # A recipe is read by people who did not write it: it may name what plugins bring, not any function there is.
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if module.partition(".")[0] not in {point.module.partition(".")[0] for point in points}:
        raise UserError(
            f"requests '{module}:{rest}': '{module.partition('.')[0]}' is no package of an installed plugin, and only "
            f"functions of such are called"
        )
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"requests '{module}:{rest}': '{module}' cannot be imported: {error}") from None
    if not callable(function):
        raise UserError(f"requests '{module}:{rest}': '{module}' has no function '{name}'")
    made: Any = function(Path(path) if path else None)
    return made


def write_requests(path: Path, requests: Iterable[Request]) -> None:
    """Write requests as our JSONL."""
    from graftwork.files import write_text_atomic

    lines = []
    for one in requests:
        record = one.record()
        if one.target_true is not None:
            record["target_true"] = one.target_true
        if one.paraphrases:
            record["paraphrases"] = list(one.paraphrases)
        for name in ("neighbors", "locality"):
            probes = getattr(one, name)
            if probes:
                record[name] = [{"prompt": probe.prompt, "target": probe.target} for probe in probes]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text_atomic(path, "".join(lines))


# ---------------------------------------------------------------------- layouts


def _jsonl(record: Mapping[str, Any], number: int, where: str) -> Request:
    unknown = sorted(set(record) - _KNOWN)
    if unknown:
        raise RequestError(f"{where} has an unknown key '{unknown[0]}'{did_you_mean(unknown[0], _KNOWN)}")
    subject = _text(record["subject"], "subject", where)
    prompt = _text(record["prompt"], "prompt", where)
    if SLOT not in prompt:
        prompt = with_slot(prompt, subject, where)
    true = record.get("target_true")
    return Request(
        str(record.get("id", number)),
        prompt,
        subject,
        _text(record["target"], "target", where),
        None if true is None else _text(true, "target_true", where),
        _texts(record.get("variants", ()), "variants", where),
        _texts(record.get("paraphrases", ()), "paraphrases", where),
        _probes(record.get("neighbors", ()), "neighbors", where),
        _probes(record.get("locality", ()), "locality", where),
    )


def _counterfact(record: Mapping[str, Any], number: int, where: str) -> Request:
    if "requested_rewrite" not in record:
        return _flat_counterfact(record, number, where)
    asked = record["requested_rewrite"]
    true = _text(asked["target_true"]["str"], "target_true", where).strip() or None
    return Request(
        str(record.get("case_id", number)),
        _text(asked["prompt"], "prompt", where),
        _text(asked["subject"], "subject", where),
        _text(asked["target_new"]["str"], "target_new", where).strip(),
        true,
        paraphrases=_texts(record.get("paraphrase_prompts", ()), "paraphrase_prompts", where),
        neighbors=tuple(
            Probe(one, true)
            for one in _texts(record.get("neighborhood_prompts", ()), "neighborhood_prompts", where)
        ),
    )


def _flat_counterfact(record: Mapping[str, Any], number: int, where: str) -> Request:
    subject = _text(record["subject"], "subject", where)
    prompt = _text(record["prompt"], "prompt", where)
    rephrased = record.get("rephrase_prompt") or ()
    locality = record.get("locality_prompt")
    return Request(
        str(record.get("case_id", number)),
        prompt if SLOT in prompt else with_slot(prompt, subject, where),
        subject,
        _text(record["target_new"], "target_new", where).strip(),
        _text(record["ground_truth"], "ground_truth", where).strip() or None,
        paraphrases=_texts(
            [rephrased] if isinstance(rephrased, str) else rephrased, "rephrase_prompt", where
        ),
        neighbors=(Probe(locality, record.get("locality_ground_truth")),) if locality else (),
    )


def _zsre(target: Callable[[Mapping[str, Any]], str]) -> Callable[[Mapping[str, Any], int, str], Request]:
    def read(record: Mapping[str, Any], number: int, where: str) -> Request:
        subject = _text(record["subject"], "subject", where)
        wanted = _text(target(record), "target", where).strip()
        return Request(
            str(record.get("case_id", number)),
            with_slot(_text(record["src"], "src", where), subject, where),
            subject,
            wanted,
            # Where the target is the counterfactual one, the answer is what was true.
            _text(record["answers"][0], "answers", where).strip() if wanted != record["answers"][0] else None,
            paraphrases=_texts([record["rephrase"]], "rephrase", where) if record.get("rephrase") else (),
            locality=(Probe(f"{record['loc']}?", str(record["loc_ans"])),) if record.get("loc") else (),
        )

    return read


_READERS: dict[str, Callable[[Mapping[str, Any], int, str], Request]] = {
    "jsonl": _jsonl,
    "counterfact": _counterfact,
    "zsre": _zsre(lambda record: record["answers"][0]),
    "zsre-alt": _zsre(lambda record: record["alt"]),
}


# ---------------------------------------------------------------------- parts


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: '{key}' is {type(value).__name__}, and a text is wanted")
    return value


def _texts(values: Any, key: str, where: str) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RequestError(f"{where}: '{key}' is no list of texts")
    return tuple(_text(value, key, where) for value in values)


def _probes(values: Any, key: str, where: str) -> tuple[Probe, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RequestError(f"{where}: '{key}' is no list of prompts")
    found = []
    for value in values:
        if isinstance(value, str):
            found.append(Probe(value))
        else:
            target = value.get("target")
            found.append(Probe(_text(value["prompt"], key, where), None if target is None else str(target)))
    return tuple(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"file of requests '{path}' does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"file of requests '{path}' cannot be read as UTF-8 text: {error}") from None


def _json_lines(path: Path) -> list[Any]:
    found = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise RequestError(f"'{path}', line {number} is no JSON: {error}") from None
        if not isinstance(found[-1], dict):
            raise RequestError(f"'{path}', line {number} is no JSON object")
    return found


def _json_list(path: Path) -> list[Any]:
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        raise RequestError(f"'{path}' is no JSON: {error}") from None
    if not isinstance(found, list):
        raise RequestError(f"'{path}' is no JSON list of records")
    return found
