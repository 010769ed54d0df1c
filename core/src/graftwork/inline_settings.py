"""Settings written inside a reference, as in ``exact:arithmetic,train=512,seed=1``."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from graftwork.errors import UserError
from graftwork.validation import first_problem

Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(kind: type[Settings], text: str, where: str) -> Settings:
    """Return the settings of ``text`` (``key=value`` parts between commas; may be empty) as a ``kind``.

    ``where`` they stand begins the sentence of an error.

    Raises:
        UserError: a part that is no ``key=value``, a key that is unknown or stands there twice, a bad value.
    """
    found: dict[str, str] = {}
    for part in text.split(",") if text.strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise UserError(f"{where}: '{part}' is no setting; write key=value, with commas in between")
        if key in found:
            raise UserError(f"{where}: '{key}' stands there twice; name it once")
        found[key] = value
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, kind)}") from None
