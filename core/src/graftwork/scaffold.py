"""``trainer plugins new``: a complete distribution of a new plugin, from the templates of its kind.

A template is a file below ``templates/common`` or ``templates/<kind>``. Its place is its place in the new folder, less
the ending ``.tmpl``, which keeps unfinished Python from whoever collects Python files. In its name and text,
``{{name}}`` and the other words of :func:`words` are replaced; nothing else is.
"""

from __future__ import annotations

import ast
import builtins
import importlib.metadata
import importlib.util
import keyword
import os
from collections.abc import Mapping
from pathlib import Path

from graftwork import __version__
from graftwork.errors import UserError, did_you_mean
from graftwork.files import atomic_folder
from graftwork.plugins import NAME, discover

TEMPLATES = Path(__file__).with_name("templates")
KINDS = {
    "adapter": "LoRA whose rank grows with depth, at the parameters of one rank for all layers",
    "loss": "L2-SP in a stream of tasks: a pull towards the weights at the start of each task",
    "logits": "A frequency penalty: a token is the less likely, the more often it was written already",
    "transform": "Wanda: weights that move their outputs least become zero, without training",
    "trainer": "Focal loss for fine-tuning: tokens that the model knows already count less",
    "data": "Tasks from tab-separated files of questions and answers",
    "benchmark": "How well a model copies random tokens that it has read before",
}
"""What the method of each kind's template is."""
LONGEST = 30
"""Letters of a name; lines of the templates are short enough for it."""
_ENDING = ".tmpl"


def create(name: str, kind: str, folder: Path | None = None) -> Path:
    """Write the distribution ``graftwork-<name>`` to ``folder`` (of that name where None); return where it is.

    Raises:
        UserError: a name that none may have or that is taken, an unknown kind, something at ``folder`` already.
    """
    if kind not in KINDS:
        raise UserError(f"no kind '{kind}'{did_you_mean(kind, KINDS)}; there are: {', '.join(KINDS)}")
    _check_form(name)
    files = _templates(kind)
    replaced = words(name, kind)
    _check_taken(name, replaced, files)
    target = folder or Path(f"graftwork-{name}")
    occupied = UserError(f"'{target}' exists already; name another folder with --output, or remove it")
    if os.path.lexists(target):
        raise occupied
    try:
        with atomic_folder(target) as building:
            for place, text in files.items():
                path = building / _filled(place, replaced).removesuffix(_ENDING)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(_filled(text, replaced), encoding="utf-8")
    except FileExistsError:
        raise occupied from None
    except OSError as error:
        raise UserError(f"'{target}' cannot be written: {error.strerror or error}") from None
    return target


def words(name: str, kind: str) -> dict[str, str]:
    """Return what the templates leave open, by the word that stands for it."""
    snake = name.replace("-", "_")
    camel = "".join(part.capitalize() for part in name.split("-"))
    major, minor = (int(part) for part in __version__.split(".")[:2])
    return {
        "name": name,
        "module": f"graftwork_{snake}",
        "class": camel if camel.isidentifier() else f"Plugin{camel}",
        "snake": snake,
        "summary": KINDS[kind],
        "core": f">={major}.{minor},<{major}.{minor + 1}",
    }


def _check_form(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!a} is no name for a plugin: write small letters and digits with single hyphens, such as my-method"
        )
    if len(name) > LONGEST:
        raise UserError(f"the name '{name}' has {len(name)} letters; {LONGEST} are the most")


def _check_taken(name: str, replaced: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Refuse names that are taken: by Python, by the template's own code, by a plugin, a package or a module."""
    camel, module = replaced["class"], replaced["module"]
    if any(keyword.iskeyword(word) or hasattr(builtins, word) for word in (replaced["snake"], camel)):
        raise UserError(f"'{name}' is a word of Python's own; choose another name")
    if camel in _other_names(files, replaced):
        raise UserError(
            f"a plugin '{name}' would be a class {camel}, and its file has another {camel}; choose another name"
        )
    found = discover().get(name)
    if found:
        raise UserError(
            f"a plugin '{name}' is installed already, by package {found.distribution} {found.version}; choose another "
            f"name, or uninstall it"
        )
    try:
        version = importlib.metadata.version(f"graftwork-{name}")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise UserError(f"a package graftwork-{name} {version} is installed already; choose another name")
    if importlib.util.find_spec(module) is not None:
        raise UserError(f"a module {module} can be imported already; choose another name than '{name}'")


def _other_names(files: Mapping[str, str], replaced: Mapping[str, str]) -> set[str]:
    """Return the classes, functions and imports of the template's code, without the plugin's own class."""
    found: set[str] = set()
    for place, text in files.items():
        if not place.endswith(f".py{_ENDING}"):
            continue
        for node in ast.walk(ast.parse(_filled(text, {**replaced, "class": "_"}))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found |= {alias.asname or alias.name for alias in node.names}
    return found


def _templates(kind: str) -> dict[str, str]:
    """Return the texts of the templates of a kind by their places, the common ones first."""
    found: dict[str, str] = {}
    for folder in (TEMPLATES / "common", TEMPLATES / kind):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_text(encoding="utf-8")
    return found


def _filled(text: str, replaced: Mapping[str, str]) -> str:
    for word, value in replaced.items():
        text = text.replace(f"{{{{{word}}}}}", value)
    return text
