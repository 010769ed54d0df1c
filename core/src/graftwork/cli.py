"""The command ``trainer``: thin, and quick to start. Every verb imports its work when it is called."""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import click

from graftwork.errors import PluginError, UserError
from graftwork.hookspecs import HOOKS_VERSION

_model = click.option(
    "--model",
    required=True,
    metavar="REF",
    help="Hub id, folder, run, GGUF file, smollm2-135m (bundled), or scratch:<settings> (random weights).",
)
_plugin = click.option(
    "--plugin", "plugins", multiple=True, metavar="NAME", help="Use this plugin; repeatable."
)
_set = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, e.g. train.max_steps=10; repeatable.",
)
_output = click.option("--output", metavar="DIR", help="Run directory.  [default: runs/<name>-<time>]")
_resume = click.option("--resume", is_flag=True, help="Go on with the run in --output.")
_versions = click.option(
    "--allow-other-versions", is_flag=True, help="Resume although plugin versions have changed."
)
_dry = click.option(
    "--dry-run",
    is_flag=True,
    help="Resolve everything, report parameters, memory and steps; read no weights or data.",
)
_gpus = click.option(
    "--gpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="What --dry-run counts with.  [default: as many as the launcher starts, else 1]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(
    package_name="graftwork",
    prog_name="trainer",
    message=f"%(prog)s %(version)s (hooks {HOOKS_VERSION})",
)
def cli(debug: bool) -> None:
    """Train, transform, evaluate and generate with research papers as plugins.

    \b
    trainer plugins list
    trainer train --model smollm2-135m --data tasks/ --plugin NAME
    trainer run NAME:claim --size smoke
    """


@cli.command()
@_model
@click.option(
    "--data",
    required=True,
    metavar="SOURCE",
    help="Task folder, JSONL or Alpaca file, <layout>:<path>, or exact:<kind>.",
)
@click.option(
    "--algorithm",
    type=click.Choice(["sft", "dpo", "grpo", "seq2seq", "trainer"]),
    default="sft",
    show_default=True,
    help="TRL's SFT, DPO or GRPO trainer; transformers' Seq2SeqTrainer for encoder-decoders; or its own Trainer.",
)
@_plugin
@_set
@_output
@_resume
@_versions
@_dry
@_gpus
def train(**options: Any) -> None:
    """Train a model on one task or on a stream of tasks."""
    from graftwork.commands.training import train

    sys.exit(train(**options))


@cli.command()
@_model
@_plugin
@_set
@_output
@_resume
@_versions
@_dry
def transform(**options: Any) -> None:
    """Change a model's weights layer by layer, and write a checkpoint.

    \b
    trainer transform --model smollm2-135m --plugin NAME --set transform.calibration=FILE
    """
    from graftwork.commands.training import transform

    sys.exit(transform(**options))


@cli.command()
@click.argument("recipe")
@click.option("--size", metavar="NAME", help="One of the recipe's sizes.  [default: its first]")
@click.option("--step", "steps", multiple=True, metavar="NAME", help="Run only this step; repeatable.")
@_plugin
@_set
@_output
@_resume
@_versions
@_dry
@_gpus
def run(**options: Any) -> None:
    """Run RECIPE: a YAML file, or <plugin>:<recipe> for one that an installed plugin ships.

    Exits with 1 when a claim that the recipe expects does not hold.
    """
    from graftwork.commands.training import run

    sys.exit(run(**options))


@cli.command()
@_model
@click.option("--data", metavar="SOURCE", help="Tasks to score: a folder or <layout>:<path>.")
@click.option("--text", metavar="FILE", help="Text file to take the perplexity of.")
@click.option(
    "--benchmark",
    metavar="NAME",
    help="qa, <plugin>:<benchmark> or lm-eval:<task>; its options are --set benchmark.KEY=VALUE.",
)
@_plugin
@_set
@click.option("--output", metavar="FILE", help="Write the scores as JSON here.")
def evaluate(**options: Any) -> None:
    """Score a model on tasks, measure its perplexity on a text, or run a benchmark."""
    from graftwork.commands.using import evaluate

    evaluate(**options)


@cli.command()
@_model
@click.option("--prompt", metavar="TEXT", help="What to say to the model; '-' reads standard input.")
@click.option("--question", metavar="TEXT", help="What to ask, put into a template.")
@click.option("--context", metavar="TEXT", help="What --question is about.")
@click.option(
    "--input",
    "source",
    metavar="FILE",
    help="JSONL with a prompt, a question (and context), or messages in each line; '-' reads standard input.",
)
@click.option("--plain", is_flag=True, help="Send prompts as they are, without the chat template.")
@_plugin
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of transformers' generate, e.g. max_new_tokens=64; templates.with_context, "
    "templates.without_context, model.* or plugins.NAME.*; repeatable.",
)
@click.option("--seed", type=int, default=42, show_default=True, help="Where samples are drawn from.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Prompts that are answered together.",
)
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Show one answer as it is written.  [default: on a terminal]",
)
@click.option("--output", metavar="FILE", help="Write answers here, as JSONL with the fields of the input.")
@click.option("--resume", is_flag=True, help="Go on with the answers in --output.")
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the last N tokens of a prompt.  [default: refuse one that does not fit]",
)
@click.option(
    "--rows",
    type=click.Choice(["joint", "split"]),
    help="Both prompts of a combiner in one pass, or a pass for each, with less memory where contexts are long.  "
    "[default: joint]",
)
@click.option("--trace", metavar="FILE", help="Write an HTML page of what a combiner did, token by token.")
def generate(**options: Any) -> None:
    """Let a model answer a prompt, or a file of them."""
    from graftwork.commands.generating import generate

    generate(**options)


@cli.command()
@click.argument("directory")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
def report(**options: Any) -> None:
    """Print the tables of a finished run and write its report.html again."""
    from graftwork.commands.training import report

    report(**options)


@cli.group()
def plugins() -> None:
    """See what is installed, check it, begin a new one."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table of packages.")
def list_plugins(as_json: bool, markdown: bool) -> None:
    """List installed plugins; imports none of them."""
    from graftwork.commands.ecosystem import list_plugins

    list_plugins(as_json, markdown)


@plugins.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_plugin(name: str, as_json: bool) -> None:
    """Show a plugin's options, hooks, recipes and claims, and what it cannot be combined with."""
    from graftwork.commands.ecosystem import show_plugin

    show_plugin(name, as_json)


@plugins.command("new")
@click.argument("name")
@click.option(
    "--kind",
    required=True,
    type=click.Choice(["adapter", "loss", "logits", "transform", "trainer", "data", "benchmark"]),
    help="What the method changes.",
)
@click.option("--output", metavar="FOLDER", help="Where to write it.  [default: graftwork-NAME]")
def new_plugin(**options: Any) -> None:
    """Write a package of a new plugin: a small method that works, with its tests, recipe, README and CI."""
    from graftwork.commands.ecosystem import new_plugin

    new_plugin(**options)


@plugins.command("check")
@click.argument("names", nargs=-1, required=True)
@click.option("--static", is_flag=True, help="Leave out what runs the plugin's smoke recipe.")
def check_plugins(**options: Any) -> None:
    """Check whether plugins keep what users rely on: metadata, options, recipes, repeatability.

    Exits with 1 where something failed; each failure says what to do.
    """
    from graftwork.commands.ecosystem import check_plugins

    sys.exit(check_plugins(**options))


@plugins.command("matrix")
@click.argument("names", nargs=-1)
@click.option("--triples", default=0, type=click.IntRange(min=0), help="How many triples are drawn, too.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Draws the triples.")
@click.option("--markdown", metavar="FILE", help="Where to write the table as a page.")
def plugins_matrix(**options: Any) -> None:
    """Try plugins in pairs on a tiny model: NAMES with all that are installed, or all with all.

    A pair trains, transforms and answers, is stored and read again in another process; it composes, or is refused
    before weights are read. Exits with 1 where a pair does neither.
    """
    from graftwork.commands.ecosystem import plugins_matrix

    sys.exit(plugins_matrix(**options))


@cli.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors, with the options of installed plugins."""
    from graftwork.commands.ecosystem import recipe_schema

    recipe_schema()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 failed or a claim not held, 2 bad input, 130 and 143 stopped."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    with _termination():
        code = _guarded(lambda: cli.main(arguments, "trainer", standalone_mode=False), debug)
    sys.exit(code)


class _Terminated(KeyboardInterrupt):
    """The signal by which systems end a process (SIGTERM): it tidies up as after Ctrl-C."""


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:
        # Not the main thread of a program of somebody else, who handles signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(call: Callable[[], Any], debug: bool) -> int:
    try:
        result = call()
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort as error:
        return _stopped(error.__cause__)
    except KeyboardInterrupt as error:
        return _stopped(error)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        _tell(UserError(_sentence(error)), debug)
        return 2
    except UserError as error:
        _tell(error, debug)
        return 2
    except PluginError as error:
        _tell(error, debug)
        return 1


def _stopped(error: BaseException | None) -> int:
    terminated = isinstance(error, _Terminated)
    word = "terminated" if terminated else "interrupted"
    _say(f"{word}; where a run or a file was begun, the same command with --resume goes on")
    return 143 if terminated else 130


def _sentence(error: click.ClickException) -> str:
    """Return click's message about the words on the command line, in the form of our own."""
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    text = text[:1].lower() + text[1:]
    return f"{text}; see `{context.command_path} --help`" if context else text


def _tell(error: Exception, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    _say(f"error: {error}")
    if not debug and error.__cause__ is not None:
        click.echo("(add --debug before the verb for the traceback)", err=True)


def _say(text: str) -> None:
    if "tqdm" in sys.modules:
        # A progress bar that was cut short stands on the line still.
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        click.echo(text, err=True)
