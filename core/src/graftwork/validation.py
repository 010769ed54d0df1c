"""Turn pydantic's errors into one sentence: where, what is wrong, what would be right."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from graftwork.errors import did_you_mean


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one sentence about the first problem in ``error``."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        word = str(problem["loc"][-1])
        return (
            f"unknown option '{path}'{did_you_mean(word, known)}; "
            f"known here: {', '.join(sorted(known)) or 'none'}"
        )
    if problem["type"] == "missing":
        return f"option '{path}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not path:
        return message
    return f"option '{path}' = {problem['input']!r}: {message}"


def problem_path(error: ValidationError) -> tuple[int | str, ...]:
    """Return the path of the first problem, for looking up the line of a file."""
    return error.errors()[0]["loc"]


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the nested model at ``path`` (empty where there is none)."""
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = _model_in(fields[part].annotation)
        # list indices and union tags do not change the model we look at
    return list(getattr(current, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None:
        for argument in get_args(annotation):
            inner = _model_in(argument)
            if inner is not None:
                return inner
    return None
