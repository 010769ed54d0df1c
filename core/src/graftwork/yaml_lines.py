"""Read YAML and remember on which line every key was written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from graftwork.errors import UserError

MAX_BYTES = 1_000_000
# Aliases can blow a few lines up to billions of nodes; no honest recipe has this many.
MAX_NODES = 100_000

MERGE = "<<"
KeyPath = tuple[int | str, ...]
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words and numbers: ``save_strategy: no`` is the word, ``1e-4`` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?i:true|false)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Document:
    """Plain data read from a YAML file, with the line number of every key path."""

    def __init__(self, data: Any, lines: dict[KeyPath, int], name: str) -> None:
        self.data = data
        self.lines = lines
        self.name = name

    def where(self, path: KeyPath) -> str:
        """Return ``file:line`` of the deepest known part of ``path``."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


def read(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    ``${NAME}`` and ``${NAME:-default}`` in strings are replaced by environment variables.

    Raises:
        UserError: missing file, not UTF-8, not YAML, duplicate key, unset variable, too many nodes.
    """
    name = str(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"recipe file '{name}' does not exist") from None
    except IsADirectoryError:
        raise UserError(f"recipe '{name}' is a folder; name the YAML file in it") from None
    except OSError as error:
        raise UserError(f"recipe file '{name}' cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"recipe file '{name}' has {len(raw)} bytes; a recipe has at most {MAX_BYTES}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe file '{name}' is not UTF-8 (byte {error.start})") from None
    return parse(text, name)


def parse(text: str, name: str) -> Document:
    """Parse YAML text; see :func:`read`."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable characters"
        raise UserError(f"{name}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{name}: more nested entries than a recipe can have") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name}: a recipe is a mapping of keys, such as 'model: ...'")
    reader = _Reader(name)
    return Document(reader.convert(root, ()), reader.lines, name)


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[KeyPath, int] = {}
        self.count = 0
        self.constructor = _Loader("")

    def convert(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > MAX_NODES or len(path) > 50:
            raise UserError(f"{self.name}:{line}: more nested or repeated entries than a recipe can have")
        if path:
            self.lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(child, (*path, index)) for index, child in enumerate(node.value)]
        try:
            value = self.constructor.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            problem = getattr(error, "problem", None) or error
            raise UserError(f"{self.name}:{line}: {problem}") from None
        return self._expand(value, line) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{self.name}:{line}: a key must be a plain word")
            key = str(key_node.value)
            if key == MERGE and not shared:
                shared = self._shared(value_node, path, line)
                continue
            if key in result or key == MERGE:
                raise UserError(f"{self.name}:{line}: key '{key}' stands here twice")
            self.lines[(*path, key)] = line
            result[key] = self.convert(value_node, (*path, key))
        return {**shared, **result}

    def _shared(self, node: yaml.Node, path: KeyPath, line: int) -> dict[str, Any]:
        """Return the mapping behind ``<<: *name``, whose keys those written beside it override."""
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.name}:{line}: '{MERGE}' takes one mapping, such as '{MERGE}: *name'")
        return self._mapping(node, path)

    def _expand(self, value: str, line: int) -> str:
        def replace(match: re.Match[str]) -> str:
            found = os.environ.get(match[1], match[2])
            if found is None:
                raise UserError(f"{self.name}:{line}: the environment variable {match[1]} is not set")
            return found

        return _VARIABLE.sub(replace, value)


def parse_value(text: str) -> Any:
    """Return the value that ``text`` has in YAML, as ``--set key=value`` writes it."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return "" if node is None else _Reader("--set").convert(node, ())
    except yaml.YAMLError:
        return text
