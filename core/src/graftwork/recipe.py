"""The recipe: what a run is made of, as YAML with ``--set dotted.key=value`` on top.

A recipe holds the settings that all its steps share (``model``, ``data``, ``adapter``, ``plugins``,
``algorithm``, ``train``, ``per_task``, ``evaluate``, ``benchmark``, ``transform``, ``seed``), the ``steps`` (each
with its own overrides), ``repeat`` (settings to vary, such as seeds and task orders), ``sizes`` (named sets of
overrides) and ``expect`` (the claims that the results must show). A recipe without steps is one job. A step with
``benchmark`` measures, one with ``transform`` changes weights, every other trains.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from graftwork import yaml_lines
from graftwork.data.options import DataOptions
from graftwork.errors import UserError, did_you_mean
from graftwork.transform.options import TransformOptions
from graftwork.validation import first_problem, problem_path

SHARED_KEYS = (
    "model",
    "data",
    "adapter",
    "plugins",
    "algorithm",
    "train",
    "per_task",
    "evaluate",
    "benchmark",
    "transform",
    "seed",
)
RECIPE_KEYS = ("title", "steps", "repeat", "sizes", "expect")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_EARLIER = re.compile(r"step:([A-Za-z0-9][A-Za-z0-9_.-]*)(?:/(.+))?")
"""What an earlier step made: ``step:NAME`` is its folder, ``step:NAME/FILE`` a file in it."""


class ModelOptions(BaseModel):
    """Which model, and how it is loaded."""

    model_config = ConfigDict(extra="forbid")

    ref: str = Field(
        description="hub id, folder, GGUF file, the bundled smollm2-135m, or scratch:<settings> for random weights"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the loaded weights; auto keeps the checkpoint's own"
    )
    attn_implementation: str | None = Field(None, description="as in transformers' from_pretrained")
    trust_remote_code: bool = Field(False, description="run code that comes with a hub model")
    config: dict[str, Any] | None = Field(
        None, description="inline model config (model_type, hidden_size, ...) for a dry run without the hub"
    )


class GeneralOptions(BaseModel):
    """What is measured before and after the stream to see what else was lost."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, description="text file for perplexity")
    window: int = Field(256, ge=8, description="tokens per perplexity window")
    windows: int | None = Field(None, ge=1, description="use the first so many windows; all if not set")
    tasks: list[str] = Field([], description="tasks of the data source that are not in the stream")


class EvaluateOptions(BaseModel):
    """How the tasks are scored after every stage."""

    model_config = ConfigDict(extra="forbid")

    cells: Literal["all", "seen", "ends", "final"] = Field(
        "all",
        description="all tasks after every task; only those seen so far and the next; each when learned and at "
        "the end; or only at the end",
    )
    scoring: Literal["generate", "likelihood"] = Field(
        "generate",
        description="what the model writes must be the answer (the papers' exact match); or the likeliest label "
        "is the answer",
    )
    candidates: Literal["task", "seen"] = Field(
        "task",
        description="labels that likelihood scoring chooses from: the task's own; or also those of all tasks "
        "learned so far, which does not give the answer space away",
    )
    batch_size: int = Field(25, ge=1, description="prompts that are answered together")
    max_new_tokens: int = Field(8, ge=1, description="longest written answer, in tokens")
    interference: bool = Field(
        True, description="keep a sketch of every task's update, for the cosines between them"
    )
    general: GeneralOptions = Field(default_factory=lambda: GeneralOptions.model_validate({}))

    @field_validator("candidates")
    @classmethod
    def _chosen_by_likelihood(cls, value: str, info: ValidationInfo) -> str:
        if value != "task" and info.data.get("scoring") == "generate":
            raise ValueError("needs evaluate.scoring: likelihood; what a model writes has no candidates")
        return value


class Job(BaseModel):
    """One training job, evaluation job (with a benchmark) or transform job, with every setting resolved."""

    model_config = ConfigDict(extra="forbid")

    model: ModelOptions
    data: DataOptions
    adapter: dict[str, Any] | None = Field(
        None, description="fields of PEFT's config class, with peft_type, and policy: shared|stacked|separate"
    )
    plugins: dict[str, dict[str, Any]] = Field({}, description="plugin name: its options, in order")
    algorithm: Literal["sft", "dpo", "grpo", "seq2seq", "trainer"] = Field(
        "sft",
        description="TRL's SFT, DPO or GRPO trainer; transformers' Seq2SeqTrainer, for encoder-decoders; or "
        "transformers' own Trainer",
    )
    train: dict[str, Any] = Field({}, description="fields of the trainer's own config class")
    per_task: dict[str, dict[str, Any]] = Field(
        {}, description="task name: how long and how fast it is learned, where that differs from train"
    )
    evaluate: EvaluateOptions = Field(default_factory=lambda: EvaluateOptions.model_validate({}))
    benchmark: dict[str, Any] | None = Field(
        None, description="name of a benchmark and its options: measure the model instead of training it"
    )
    transform: TransformOptions | None = Field(
        None, description="change the weights instead of training, and write a checkpoint"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of data, weights and order")

    @model_validator(mode="before")
    @classmethod
    def _needs_no_tasks(cls, settings: Any) -> Any:
        """A benchmark brings its own data, and a transform reads texts."""
        if not isinstance(settings, dict) or "data" in settings:
            return settings
        if settings.get("benchmark") or settings.get("transform") is not None:
            return {**settings, "data": {"source": "none"}}
        return settings

    @model_validator(mode="after")
    def _one_kind(self) -> Job:
        if self.benchmark is not None and self.transform is not None:
            raise ValueError(
                "a step measures (benchmark) or changes weights (transform), not both; set one of them to null"
            )
        return self

    @field_validator("benchmark")
    @classmethod
    def _has_a_name(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("name"), str):
            raise ValueError("a benchmark needs its name, such as qa")
        return value

    @field_validator("plugins", mode="before")
    @classmethod
    def _empty_options(cls, value: Any) -> Any:
        return {k: v or {} for k, v in value.items()} if isinstance(value, dict) else value


class RecipeFrame(BaseModel):
    """The keys of a recipe that are not settings of a job."""

    model_config = ConfigDict(extra="forbid")

    title: str = ""
    steps: list[dict[str, Any]] = []
    repeat: dict[str, list[Any] | dict[str, Any]] = {}
    sizes: dict[str, dict[str, Any]] = {}
    expect: list[str] = []


@dataclass(frozen=True)
class JobSpec:
    """A job of a recipe: the arm it belongs to and the variant (seed, order, ...) it stands for."""

    arm: str
    variant: str
    job: Job
    where: str = ""
    needs: tuple[str, ...] = ()
    """Earlier steps whose output this one reads."""

    @property
    def folder(self) -> str:
        """Return a folder name made of the arm and the variant."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "_", f"{self.arm}-{self.variant}" if self.variant else self.arm)


def with_outputs(spec: JobSpec, folders: Mapping[tuple[str, str], Path]) -> JobSpec:
    """Return the job with every ``step:NAME`` replaced by the folder of that step's run of the same variant.

    ``folders``: by step and variant.

    Raises:
        UserError: a step was not run, or made no such file.
    """
    if not spec.needs:
        return spec

    def found(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: found(one) for key, one in value.items()}
        if isinstance(value, list):
            return [found(one) for one in value]
        match = _EARLIER.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return value
        folder = folders.get((match[1], spec.variant))
        if folder is None or not folder.exists():
            raise UserError(
                f"{spec.where}: step '{spec.arm}' reads what step '{match[1]}' makes, which was not run; "
                f"run it, too"
            )
        path = folder / match[2] if match[2] else folder
        if not path.exists():
            raise UserError(
                f"{spec.where}: step '{match[1]}' made no '{match[2]}', which step '{spec.arm}' reads"
            )
        return str(path)

    return replace(spec, job=Job.model_validate(found(spec.job.model_dump())))


@dataclass
class Recipe:
    """A recipe, expanded into its jobs."""

    title: str
    size: str
    jobs: list[JobSpec]
    expect: list[str]
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(spec.arm for spec in self.jobs))


def load(
    path: Path,
    *,
    size: str | None = None,
    sets: Sequence[str] = (),
    plugins: Sequence[str] = (),
    steps: Sequence[str] = (),
) -> Recipe:
    """Read the recipe at ``path`` and expand it; see :func:`expand`."""
    return expand(yaml_lines.read(path), size=size, sets=sets, plugins=plugins, steps=steps)


def expand(
    document: yaml_lines.Document,
    *,
    size: str | None = None,
    sets: Sequence[str] = (),
    plugins: Sequence[str] = (),
    steps: Sequence[str] = (),
) -> Recipe:
    """Return the jobs of a recipe: steps x repeat, with size, ``--set`` and ``--plugin`` applied.

    ``steps`` keeps only the named steps.

    Raises:
        UserError: unknown key (file, line, nearest known key), unknown size or step, bad value.
    """
    raw = document.data
    for key in raw:
        if key not in SHARED_KEYS + RECIPE_KEYS:
            known = SHARED_KEYS + RECIPE_KEYS
            raise UserError(
                f"{document.where((key,))}: unknown key '{key}'{did_you_mean(key, known)}; known: {', '.join(known)}"
            )
    tree, size = _with_size(document, size)
    overrides = [_parse_set(text) for text in sets]
    for path, value in overrides:
        if path[0] in RECIPE_KEYS:
            _assign(tree, path, value)
    frame = _validate(RecipeFrame, {k: v for k, v in tree.items() if k in RECIPE_KEYS}, document, [()])
    base = _normalised({k: v for k, v in tree.items() if k in SHARED_KEYS})
    jobs: list[JobSpec] = []
    for index, step in enumerate(frame.steps or [{}]):
        arm = _arm_name(step, index, document, "transform" if base.get("transform") is not None else "train")
        if steps and arm not in steps:
            continue
        merged = _merged(base, _normalised({k: v for k, v in step.items() if k != "name"}))
        _find_beside(merged, Path(document.name).parent)
        for variant, assignments in _variants(frame.repeat):
            settings = copy.deepcopy(merged)
            for path, value in assignments:
                _assign(settings, path, value)
            for name in plugins:
                settings.setdefault("plugins", {}).setdefault(name, {})
            _apply_sets(settings, overrides)
            prefixes = [("steps", index), ("sizes", size), ()]
            job = _validate(Job, settings, document, prefixes)
            jobs.append(JobSpec(arm, variant, job, document.name, _earlier(settings)))
    _check_steps(steps, frame, document)
    _check_earlier(jobs, frame, document)
    return Recipe(frame.title or Path(document.name).stem, size, jobs, frame.expect, tree)


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` on top: mappings merge, everything else is replaced."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = deep_merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge a step into what all share; options of one benchmark mean nothing to another."""
    mine, shared = over.get("benchmark"), base.get("benchmark")
    if mine and shared and mine.get("name", shared.get("name")) != shared.get("name"):
        base = {**base, "benchmark": {}}
    return deep_merge(base, over)


def _earlier(value: Any) -> tuple[str, ...]:
    """Return the steps that settings name as ``step:NAME``."""
    if isinstance(value, str):
        match = _EARLIER.fullmatch(value)
        return (match[1],) if match else ()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return tuple(dict.fromkeys(name for part in parts for name in _earlier(part)))


def _check_earlier(jobs: Sequence[JobSpec], frame: RecipeFrame, document: yaml_lines.Document) -> None:
    names = [str(step.get("name")) for step in frame.steps]
    for spec in jobs:
        before = names[: names.index(spec.arm)] if spec.arm in names else []
        for name in spec.needs:
            if name not in before:
                raise UserError(
                    f"{document.name}: step '{spec.arm}' reads 'step:{name}', but no step of that name comes "
                    f"before it{did_you_mean(name, before)}"
                )


def _find_beside(settings: dict[str, Any], folder: Path) -> None:
    """Let what divides a model name a file from the recipe's own folder, where it is there."""
    for key, part in (("train", "deepspeed"), ("train", "fsdp_config"), ("transform", "deepspeed")):
        section = settings.get(key)
        value = section.get(part) if isinstance(section, dict) else None
        if isinstance(value, str) and (folder / value).is_file():
            settings[key] = {**settings[key], part: str((folder / value).resolve())}


def _with_size(document: yaml_lines.Document, size: str | None) -> tuple[dict[str, Any], str]:
    tree = copy.deepcopy(document.data)
    sizes = tree.get("sizes") or {}
    if not isinstance(sizes, dict):
        raise UserError(
            f"{document.where(('sizes',))}: 'sizes' is a mapping of a size's name to its settings"
        )
    if size is None:
        size = next(iter(sizes), "")
    elif size not in sizes:
        known = ", ".join(sizes) or "none"
        raise UserError(f"{document.name}: no size '{size}'{did_you_mean(size, sizes)}; it has: {known}")
    over = sizes.get(size) or {}
    if not isinstance(over, dict):
        raise UserError(f"{document.where(('sizes', size))}: a size is a mapping of settings")
    for key in over:
        if key not in SHARED_KEYS + RECIPE_KEYS:
            known = SHARED_KEYS + RECIPE_KEYS
            raise UserError(
                f"{document.where(('sizes', size, key))}: unknown key '{key}'{did_you_mean(key, known)}"
            )
    return deep_merge(_normalised(tree), _normalised(over)), size


def _normalised(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write the short forms out: ``model: x`` is ``model: {ref: x}``, ``data: x`` names the source."""
    result = dict(settings)
    if isinstance(result.get("model"), str):
        result["model"] = {"ref": result["model"]}
    if isinstance(result.get("data"), str):
        result["data"] = {"source": result["data"]}
    if isinstance(result.get("benchmark"), str):
        result["benchmark"] = {"name": result["benchmark"]}
    return result


def _arm_name(step: Mapping[str, Any], index: int, document: yaml_lines.Document, kind: str) -> str:
    """Return the name of a step; a recipe without steps has one job, which is called by its ``kind``."""
    if not step:
        return kind
    name = step.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"{document.where(('steps', index))}: step {index + 1} needs a 'name' of letters, digits, '-', '_'"
        )
    for key in step:
        if key != "name" and key not in SHARED_KEYS:
            raise UserError(
                f"{document.where(('steps', index, key))}: unknown key '{key}' in step '{name}'"
                f"{did_you_mean(key, SHARED_KEYS)}; known: name, {', '.join(SHARED_KEYS)}"
            )
    return name


def _check_steps(wanted: Sequence[str], frame: RecipeFrame, document: yaml_lines.Document) -> None:
    names = [str(step.get("name")) for step in frame.steps]
    for name in wanted:
        if name not in names:
            raise UserError(
                f"{document.name}: no step '{name}'{did_you_mean(name, names)}; it has: {', '.join(names) or 'none'}"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{document.where(('steps',))}: two steps are named '{twice}'")


def _variants(repeat: Mapping[str, Any]) -> list[tuple[str, list[tuple[list[str], Any]]]]:
    """Return ``(name, assignments)`` of every combination of the repeated settings."""
    axes: list[list[tuple[str, list[str], Any]]] = []
    for dotted, values in repeat.items():
        path = dotted.split(".")
        named = values.items() if isinstance(values, dict) else ((str(value), value) for value in values)
        axes.append([(f"{path[-1]}={name}", path, value) for name, value in named])
    return [
        (",".join(part[0] for part in combination), [(part[1], part[2]) for part in combination])
        for combination in itertools.product(*axes)
    ]


def _parse_set(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set {text}: write it as dotted.key=value, for example train.max_steps=10")
    known = SHARED_KEYS + RECIPE_KEYS
    if path[0] not in known:
        raise UserError(
            f"--set {text}: unknown key '{path[0]}'{did_you_mean(path[0], known)}; known: {', '.join(known)}"
        )
    if path[0] == "repeat" and len(path) > 2:
        # The keys of 'repeat' are dotted paths themselves.
        path = ["repeat", ".".join(path[1:])]
    return path, yaml_lines.parse_value(value)


def _apply_sets(settings: dict[str, Any], overrides: Sequence[tuple[list[str], Any]]) -> None:
    for path, value in overrides:
        if path[0] in RECIPE_KEYS:
            continue
        # An option of a plugin is set where the plugin is used; it does not bring the plugin in.
        if path[0] == "plugins" and len(path) > 1 and path[1] not in (settings.get("plugins") or {}):
            continue
        # Likewise, an option of a benchmark does not make an evaluation of a training job.
        if path[0] == "benchmark" and len(path) > 1 and not settings.get("benchmark"):
            continue
        _assign(settings, path, value)


def _assign(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    if len(path) == 1 and path[0] in ("model", "data", "benchmark") and isinstance(value, str):
        value = _normalised({path[0]: value})[path[0]]
        if isinstance(settings.get(path[0]), dict):
            value = deep_merge(settings[path[0]], value)
    node = settings
    for part in path[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):
            child = {}
            node[part] = child
        node = child
    node[path[-1]] = value


def _validate(
    model: type[Any],
    settings: Mapping[str, Any],
    document: yaml_lines.Document,
    prefixes: Sequence[tuple[Any, ...]],
) -> Any:
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        path = problem_path(error)
        lines = [(*prefix, *path) for prefix in prefixes if (*prefix, *path) in document.lines]
        where = document.where(lines[0] if lines else (path[0],) if path else ())
        raise UserError(f"{where}: {first_problem(error, model)}") from None
