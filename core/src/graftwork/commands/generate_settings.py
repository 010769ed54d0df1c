"""What ``--set`` means to ``trainer generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.errors import UserError, did_you_mean
from graftwork.generate.prompts import Templates
from graftwork.recipe import ModelOptions
from graftwork.yaml_lines import parse_value

DEFAULTS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 128}


@dataclass(frozen=True)
class Settings:
    """What ``--set`` holds: options of ``generate``, templates, and settings of the model and the plugins."""

    options: dict[str, Any]
    templates: Templates
    of_job: list[str]
    own_templates: bool


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
