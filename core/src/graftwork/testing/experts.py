"""Tiny experts: fine-tunes of one tiny base, made by adding noise; and a merge of them in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from graftwork.hookspecs import WeightTransform
from graftwork.merge.experts import Experts
from graftwork.merge.method import MergeMethod
from graftwork.merge.options import MergeOptions
from graftwork.merge.transform import merge_transform
from graftwork.models import load_model
from graftwork.recipe import Job
from graftwork.run import Run
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.transform.beside import FOLDER, Beside
from graftwork.transform.engine import Engine, Outcome, Texts
from graftwork.transform.source import CheckpointSource
from graftwork.transform.writer import Writer


def tiny_experts(
    folder: Path,
    names: Sequence[str] = ("a", "b", "c"),
    *,
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    size: float = 0.004,
    **changes: Any,
) -> tuple[Path, dict[str, str]]:
    """Write a base and an expert per name to ``folder``; return the base's folder and the experts' by name.

    Every parameter of an expert is the base's plus noise of standard deviation ``size``. ``changes`` go to the config.
    """
    base = save_tiny(tiny_model(kind, dtype=dtype, **changes), folder / "base")
    refs = {}
    for number, name in enumerate(names):
        model = tiny_model(kind, dtype=dtype, **changes)
        draw = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (size * torch.randn(parameter.shape, generator=draw)).to(dtype)
        refs[name] = str(save_tiny(model, folder / name))
    return base, refs


def tiny_lora_experts(folder: Path, base: Path, names: Sequence[str] = ("a", "b")) -> dict[str, str]:
    """Write a LoRA adapter of ``base`` per name to ``folder`` and return the folders by name."""
    from peft import LoraConfig, get_peft_model

    refs = {}
    for number, name in enumerate(names):
        wrapped = get_peft_model(load_model(str(base)), LoraConfig(r=2, target_modules="all-linear"))
        draw = torch.Generator().manual_seed(200 + number)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
        wrapped.save_pretrained(str(folder / f"lora-{name}"))
        refs[name] = str(folder / f"lora-{name}")
    return refs


def save_tiny(model: Any, folder: Path) -> Path:
    """Save a model with the tiny tokenizer and return the folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint's folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            found |= {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    return found


def open_tiny(base: Path, refs: Mapping[str, str], **options: Any) -> Experts:
    """Return experts opened with a base; ``options`` of :class:`graftwork.merge.options.MergeOptions`."""
    return Experts(refs, CheckpointSource(str(base)), MergeOptions.model_validate(options))


def merge_tiny(
    base: Path,
    refs: Mapping[str, str],
    method: MergeMethod,
    output: Path,
    *,
    expand: str | None = None,
    after: Sequence[WeightTransform] = (),
    texts: Texts | None = None,
    **options: Any,
) -> Outcome:
    """Merge into ``output/model`` and ``output/beside``, as a transform job does, and return what was found.

    ``after`` are transforms that follow. A second call goes on where an earlier one was cut off.
    """
    settings = {"experts": dict(refs), "merge": options}
    job = Job.model_validate({"model": {"ref": str(base)}, "transform": settings})
    transform = merge_transform(Run(output, job), "tiny-merge", method, expand=expand)
    experts = open_tiny(base, refs, **options)
    merging = transform.merging
    assert merging is not None
    merging.open(experts)
    work = output / "work"
    engine = Engine(
        experts.source,
        [("tiny-merge", transform), *((one.name, one) for one in after)],
        texts or Texts(),
        work=work,
        format="dense",
    )
    outcome = engine.run()
    layers = len(outcome.layers)
    Beside(work, layers).finish(output / FOLDER, lambda: {"tiny-merge": merging.about()})
    Writer(work, layers).finish(output / "model", outcome.config.to_dict(), experts.source.folder)
    return outcome
