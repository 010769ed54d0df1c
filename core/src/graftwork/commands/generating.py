"""``trainer generate``: let a model answer one prompt or a file of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from graftwork.console import Console
from graftwork.data.json_lines import as_text, objects, read_text
from graftwork.errors import UserError, did_you_mean
from graftwork.generate.output import AnswerFile, line_fields
from graftwork.generate.prompts import Prompt, Templates, as_chat, prompt_from_record
from graftwork.plugins import Plugins
from graftwork.recipe import ModelOptions, expand
from graftwork.run import Run, versions
from graftwork.yaml_lines import Document, parse_value

DEFAULTS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 128}


@dataclass(frozen=True)
class Record:
    """What is asked, and what stands beside it in the output."""

    where: str
    fields: dict[str, Any]
    prompt: Prompt


@dataclass(frozen=True)
class Settings:
    """What ``--set`` holds: options of ``generate``, templates, and settings of the model and the plugins."""

    options: dict[str, Any]
    templates: Templates
    of_job: list[str]
    own_templates: bool


def generate(
    model: str,
    prompt: str | None,
    source: str | None,
    context: str | None,
    question: str | None,
    plain: bool,
    plugins: Sequence[str],
    sets: Sequence[str],
    seed: int,
    batch_size: int,
    stream: bool | None,
    output: str | None,
    resume: bool,
    max_prompt_tokens: int | None,
    rows: str | None,
    trace: str | None,
) -> None:
    """Answer; print the answers, or write them to a file that can be gone on with."""
    settings = read_settings(sets, plugins)
    records = read_records(prompt, source, context, question, settings.templates)
    if settings.own_templates and not any("question" in one.fields for one in records):
        raise UserError(
            "--set templates.*: templates are for a context and a question, and there is no question"
        )
    _check_flags(records, settings.options, stream, output, resume, trace)
    document = Document({"model": model, "data": "none", "seed": seed % 2**32}, {}, "generate")
    job = expand(document, sets=settings.of_job, plugins=plugins).jobs[0].job
    run = Run(Path(), job, Plugins.from_options(job.plugins))
    if not run.plugins.implements("combiner"):
        for flag, value in (("--trace", trace), ("--rows", rows)):
            if value:
                raise UserError(
                    f"{flag} is about the two prompts of a combiner, and no plugin in use has one; name its --plugin"
                )
    run.plugins.call("check", run=run)
    file = None
    if output:
        made = {
            "versions": {name: versions()[name] for name in ("graftwork", "torch", "transformers", "peft")},
            "input": _digest(records),
            "model": job.model.model_dump(),
            "weights": _fingerprint(job.model.ref),
            "plugins": {
                name: {**about, "options": job.plugins[name]}
                for name, about in run.plugins.versions().items()
            },
            "options": settings.options,
            "templates": asdict(settings.templates),
            "plain": plain,
            "seed": seed,
            "batch_size": batch_size,
            "max_prompt_tokens": max_prompt_tokens,
            "rows": rows or "joint",
        }
        file = AnswerFile(Path(output), made, resume=resume)
        if file.done == len(records):
            click.echo(f"all {len(records)} answers are in '{output}' already", err=True)
            return
    _answer(
        run,
        records,
        settings,
        lines=source is not None,
        plain=plain,
        seed=seed,
        batch_size=batch_size,
        stream=stream,
        file=file,
        max_prompt_tokens=max_prompt_tokens,
        rows=rows or "joint",
        trace=trace,
    )


def _answer(
    run: Run,
    records: Sequence[Record],
    settings: Settings,
    *,
    lines: bool,
    plain: bool,
    seed: int,
    batch_size: int,
    stream: bool | None,
    file: AnswerFile | None,
    max_prompt_tokens: int | None,
    rows: Any,
    trace: str | None,
) -> None:
    from graftwork.evaluate.job import load
    from graftwork.generate.decoding import Decoding
    from graftwork.generate.session import generate
    from graftwork.generate.trace import Trace
    from graftwork.train.job import quiet_libraries

    quiet_libraries()
    model, tokenizer = load(run.job)
    prompts = _as_asked(records, tokenizer, run.job.model.ref, plain)
    decoding = Decoding.from_plugins(run, model)
    if trace and decoding.combiner is None:
        raise UserError("--trace is about the two prompts of a combiner, and the plugins in use bring none")
    steps = Trace() if trace else None
    if stream is None:
        beams = (settings.options.get("num_beams") or 1) > 1
        stream = not lines and file is None and not beams and sys.stdout.isatty()
    total = len(records)
    # A bar on top of answers that are printed would garble both.
    console = Console(enabled=total > 1 and (file is not None or not sys.stdout.isatty()))
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(console.bar(total, "generate", "answer"))
        bar.update(file.done if file else 0)
        stack.enter_context(_refused_options())
        answers = generate(
            model,
            tokenizer,
            prompts,
            decoding=decoding,
            batch_size=batch_size,
            seed=seed,
            begin=file.done if file else 0,
            rows=rows,
            max_prompt_tokens=max_prompt_tokens,
            names=[one.where for one in records],
            streamer=_streamer(tokenizer) if stream else None,
            trace=steps,
            # When going on, the rest of a batch may be answered again.
            progress=lambda count: bar.update(min(count, total - bar.n)),
            **settings.options,
        )
        for number, answer in enumerate(answers):
            if file is not None and not number:
                # Not before: where the first answer fails, nothing is left behind.
                stack.enter_context(file.open())
            record = records[answer.index]
            line = {
                **record.fields,
                "answer": answer.text,
                "tokens": len(answer.tokens),
                "index": answer.index,
            }
            if file is not None:
                file.write(line)
            elif lines:
                click.echo(json.dumps(line, ensure_ascii=False))
            elif not stream:
                click.echo(answer.text)
    if trace and steps is not None and decoding.combiner is not None:
        from graftwork.report.trace import write_trace

        write_trace(Path(trace), steps, tokenizer, prompts, decoding.combiner.name)
        click.echo(f"trace: {trace}", err=True)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _as_asked(records: Sequence[Record], tokenizer: Any, ref: str, plain: bool) -> list[Prompt]:
    """Return the prompts, through the chat template where there is one and ``plain`` does not leave it out.

    Raises:
        UserError: chat messages without a template.
    """
    chat = bool(tokenizer.chat_template) and not plain
    for record in records:
        if not chat and not all(
            isinstance(part, str | None) for part in (record.prompt.main, record.prompt.contrast)
        ):
            reason = "which --plain leaves out" if plain else f"which the tokenizer of '{ref}' does not have"
            raise UserError(f"{record.where}: messages need a chat template, {reason}; write a 'prompt'")
    return [as_chat(record.prompt) if chat else record.prompt for record in records]


@contextlib.contextmanager
def _refused_options() -> Iterator[None]:
    """Turn what transformers says about options of ``generate`` into a sentence."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if f"{os.sep}transformers{os.sep}generation{os.sep}" not in frames[-1].filename:
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"transformers' generate refuses these options: {first}") from error


# ---------------------------------------------------------------------- what is asked


def read_records(
    prompt: str | None,
    source: str | None,
    context: str | None,
    question: str | None,
    templates: Templates,
) -> list[Record]:
    """Return what the flags ask, or the records of the JSONL file ``source``; ``-`` is standard input.

    Raises:
        UserError: no flag or too many, a file that cannot be read, a record that asks nothing.
    """
    given = [
        flag
        for flag, value in (("--prompt", prompt), ("--input", source), ("--question", question))
        if value is not None
    ]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise UserError(f"generate needs one of --prompt, --input or --question, got {found}")
    if context is not None and question is None:
        raise UserError(f"--context goes with --question, not with {given[0]}")
    if source is not None:
        return _records_of(source, templates)
    if prompt is not None:
        text = as_text(_standard_input(), "standard input").removesuffix("\n") if prompt == "-" else prompt
        if not text.strip():
            raise UserError("the prompt is empty; write something after --prompt")
        fields = {"prompt": text}
    else:
        fields = {"question": question} if context is None else {"context": context, "question": question}
    where = "the command line"
    return [Record(where, dict(fields), prompt_from_record(fields, templates, where=where))]


def _records_of(source: str, templates: Templates) -> list[Record]:
    if source == "-":
        name = "standard input"
        text = as_text(_standard_input(), name)
    else:
        name, text = source, read_text(Path(source))
    records = [
        Record(where, line_fields(record, where), prompt_from_record(record, templates, where=where))
        for where, record in objects(text, name)
    ]
    if not records:
        raise UserError(f'{name} is empty; expected one JSON object per line, such as {{"prompt": "..."}}')
    return records


def _standard_input() -> bytes:
    buffer = getattr(sys.stdin, "buffer", None)
    return buffer.read() if buffer is not None else sys.stdin.read().encode()


def _check_flags(
    records: Sequence[Record],
    options: dict[str, Any],
    stream: bool | None,
    output: str | None,
    resume: bool,
    trace: str | None,
) -> None:
    if stream and len(records) > 1:
        raise UserError(f"--stream shows one answer as it is written, and {len(records)} are asked for")
    if stream and (options.get("num_beams") or 1) > 1:
        raise UserError(
            "--stream cannot be used with beams, which change what they have written; leave it out"
        )
    if resume and output is None:
        raise UserError("--resume needs --output, the file to go on with")
    if resume and trace:
        raise UserError("--trace holds all answers of one process, so it cannot be used with --resume")


def _digest(records: Sequence[Record]) -> str:
    text = json.dumps([one.fields for one in records], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(ref: str) -> str | None:
    """Return a hash of sizes, beginnings and ends of the model's weight files; None where they lie in the hub's
    cache. Reading all of a large model would take as long as loading it."""
    from graftwork.models import resolve

    folder = resolve(ref).folder
    if folder is None:
        return None
    seen, part = hashlib.sha256(), 2**20
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        seen.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            seen.update(file.read(part))
            file.seek(max(size - part, 0))
            seen.update(file.read(part))
    return seen.hexdigest()


# ---------------------------------------------------------------------- --set


def read_settings(sets: Sequence[str], plugins: Sequence[str]) -> Settings:
    """Return what ``--set`` items say: options of transformers' ``generate`` by their own names, ``templates.*``
    (text as it stands, with ``\\n`` for a line break), ``model.*`` and ``plugins.NAME.*`` as in a recipe.

    Raises:
        UserError: an unknown name, a plugin that is not in use, a value that does not fit.
    """
    options, templates, of_job = dict(DEFAULTS), {}, []
    names = list(Templates.__dataclass_fields__)
    for item in sets:
        key, equals, value = item.partition("=")
        first, dot, rest = key.partition(".")
        if not equals:
            raise UserError(f"--set {item}: write it as key=value, for example max_new_tokens=64")
        if first == "templates":
            if rest not in names:
                raise UserError(
                    f"--set {item}: no template '{rest}'{did_you_mean(rest, names)}; there are {', '.join(names)}"
                )
            templates[rest] = value.replace("\\n", "\n")
        elif first == "plugins":
            plugin = rest.partition(".")[0]
            if plugin not in plugins:
                raise UserError(
                    f"--set {item}: plugin '{plugin}' is not in use; add --plugin {plugin or 'NAME'}"
                )
            of_job.append(item)
        elif first == "model" and dot:
            if rest in ("ref", "config") or rest.startswith("config."):
                raise UserError(f"--set {item}: the model is what --model names; known: {_model_fields()}")
            of_job.append(item)
        elif dot:
            known = ("model", "plugins", "templates")
            raise UserError(
                f"--set {item}: unknown key '{first}'{did_you_mean(first, known)}; dotted keys begin with model, "
                f"plugins or templates"
            )
        else:
            options[key] = parse_value(value)
            if key == "max_length":
                options.pop("max_new_tokens", None)
    check_options(options)
    return Settings(options, Templates(**templates), of_job, bool(templates))


def _model_fields() -> str:
    return ", ".join(name for name in ModelOptions.model_fields if name not in ("ref", "config"))


def check_options(options: dict[str, Any]) -> None:
    """Refuse options of ``generate`` that do not exist, are of a wrong kind, or would be ignored.

    Raises:
        UserError: says which, and what would be right.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    known = {name for name in GenerationConfig().to_dict() if name not in _NOT_OPTIONS}
    level = logging.get_verbosity()
    # What it would warn of is refused.
    logging.set_verbosity_error()
    try:
        for name, value in options.items():
            if name not in known:
                raise UserError(
                    f"--set {name}={value}: transformers' generate has no option '{name}'{did_you_mean(name, known)}"
                )
            try:
                GenerationConfig(**{name: value})
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"--set {name}={value}: transformers' generate refuses it: {_first_line(error)}"
                ) from error
        try:
            GenerationConfig(**options).validate(strict=True)
        except (ValueError, TypeError) as error:
            raise UserError(f"--set: these options do not fit together: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(level)


# Fields of the config that are about the config.
_NOT_OPTIONS = ("_from_model_config", "transformers_version", "is_assistant")


def _first_line(error: Exception) -> str:
    """Return what transformers says, without its heading and its hints."""
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "is invalid" not in line), type(error).__name__).rstrip(".")
