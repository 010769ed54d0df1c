"""``trainer generate``: let a model answer one prompt or a file of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from graftwork.commands.generate_settings import Settings, read_settings
from graftwork.commands.prompt_records import Record, as_asked, digest, read_records
from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.generate.output import AnswerFile
from graftwork.plugins import Plugins, generation_notes
from graftwork.recipe import expand
from graftwork.run import Run, versions
from graftwork.yaml_lines import Document


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
    run = Run(Path(), job, Plugins.from_options(job.plugins), console=Console())
    if not run.plugins.implements("combiner"):
        for flag, value in (("--trace", trace), ("--rows", rows)):
            if value:
                raise UserError(
                    f"{flag} is about the two prompts of a combiner, and no plugin in use has one; name its --plugin"
                )
    run.plugins.check(run)
    file = None
    if output:
        made = {
            "versions": {name: versions()[name] for name in ("graftwork", "torch", "transformers", "peft")},
            "input": digest(records),
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
    # Held before the model is loaded: a second process, or a place that cannot be written, is refused at once.
    with file.open() if file is not None else contextlib.nullcontext():
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
    from transformers.utils import logging

    from graftwork.generate.decoding import Decoding
    from graftwork.generate.session import generate
    from graftwork.generate.trace import Trace
    from graftwork.models import load_for_use

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
    # Standard output is for answers; DeepSpeed, where a model has to be converted, greets there.
    with contextlib.redirect_stdout(sys.stderr):
        model, tokenizer = load_for_use(run.job.model)
    prompts = as_asked(records, tokenizer, run.job.model.ref, plain)
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
        # The first sentence about the prompts has been said, if there was one.
        bar = stack.enter_context(console.bar(total, "generate", "answer"))
        bar.update(file.done if file else 0)
        for answer in answers:
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
    for note in generation_notes(run):
        click.echo(note, err=True)
    if trace and steps is not None and decoding.combiner is not None:
        from graftwork.report.trace import write_trace

        write_trace(Path(trace), steps, tokenizer, prompts, decoding.combiner.name)
        click.echo(f"trace: {trace}", err=True)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


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
    if trace and Path(trace).is_dir():
        raise UserError(f"'{trace}' is a folder; --trace names a file")
    if resume and trace:
        raise UserError("--trace holds all answers of one process, so it cannot be used with --resume")


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
