"""The JSON schema of recipes, for editors: what stands where, with help, bounds, and the options of plugins."""

from __future__ import annotations

from typing import Any

from pydantic import create_model

from graftwork.errors import UserError
from graftwork.plugins import discover, load_class, options_class
from graftwork.recipe import Job, RecipeFrame

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SHORT = {"model": "ref", "data": "source", "benchmark": "name"}
"""Sections that may be written as a text, which then is this key of theirs."""


def schema() -> dict[str, Any]:
    """Return the schema of a recipe. A plugin that cannot be imported takes any options."""
    definitions: dict[str, Any] = {}
    shared = _properties(Job, definitions)
    definitions["plugins"] = {
        "type": "object",
        "description": "plugin name: its options, in order",
        "properties": {name: _options(name, definitions) for name in discover()},
    }
    shared["plugins"] = {"$ref": "#/$defs/plugins"}
    for key, inner in _SHORT.items():
        text = {"type": "string", "description": f"short for {key}: {{{inner}: ...}}"}
        shared[key] = {"anyOf": [text, shared[key]], "description": shared[key].get("description", "")}
    frame = _properties(RecipeFrame, definitions)
    step = {**shared, "name": {"type": "string", "description": "of letters, digits, '-', '_' and '.'"}}
    definitions["step"] = {
        "type": "object",
        "properties": step,
        "required": ["name"],
        "additionalProperties": False,
    }
    frame["steps"] = {
        "type": "array",
        "description": "jobs, each with its own overrides of what all share",
        "items": {"$ref": "#/$defs/step"},
    }
    whole = {**shared, **frame}
    definitions["size"] = {
        "type": ["object", "null"],
        "properties": {key: value for key, value in whole.items() if key != "sizes"},
        "additionalProperties": False,
    }
    whole["sizes"] = {
        "type": "object",
        "description": "named sets of overrides; the first is taken where none is named",
        "additionalProperties": {"$ref": "#/$defs/size"},
    }
    return {
        "$schema": DIALECT,
        "title": "Recipe",
        "type": "object",
        "properties": whole,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _properties(model: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a pydantic model, none of them required: overrides name what they change."""
    found = model.model_json_schema(ref_template="#/$defs/{model}")
    for name, inner in found.pop("$defs", {}).items():
        inner.pop("required", None)
        definitions[name] = inner
    return found.get("properties", {})


def _options(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    try:
        options = options_class(load_class(name))
    except UserError:
        return {"type": ["object", "null"]}
    # A copy under a name of its own: two plugins may call their options, or parts of them, alike.
    model: Any = create_model(f"{name}-options", __base__=options)
    found = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    for inner_name, inner in found.pop("$defs", {}).items():
        inner.pop("required", None)
        definitions[f"{name}.{inner_name}"] = inner
    found.pop("required", None)
    return {**found, "type": ["object", "null"], "title": name}
