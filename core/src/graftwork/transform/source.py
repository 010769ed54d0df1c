"""Where weights come from: a checkpoint, read tensor by tensor, or a model in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from graftwork.errors import UserError, did_you_mean, first_line
from graftwork.files import safetensors_header
from graftwork.models import PICKLES, load_config, load_model, resolve
from graftwork.transform.structure import skeleton

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Source(Protocol):
    """What the engine reads weights from, a few at a time.

    ``held``: bytes of this process's memory that it takes all the while. Where several processes share a run, all ask
    for the same tensors at the same time.
    """

    config: Any
    dtype: torch.dtype
    held: int

    def skeleton(self) -> Any:
        """Return the model with parameters on the meta device and real buffers."""
        ...

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the named parameters of the model, on the CPU, for the caller to keep and change."""
        ...

    def whole(self) -> Any:
        """Return the whole model, alive."""
        ...


class CheckpointSource:
    """A folder of safetensors files with a config, of which one layer at a time is read.

    Attributes:
        folder: where the files are.
        files: file and shape of every tensor, by its key.
        places: file and key of every parameter, by its name in the model; a tied head has none.

    Raises:
        UserError: no safetensors, an index that names files that are not there, damaged files, tensors that the
            model does not have or lacks, an adapter, an encoder-decoder, weights that are quantised already.
    """

    def __init__(self, ref: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> None:
        from graftwork.transform.format import check_not_quantized

        source = resolve(ref)
        if source.adapter:
            raise UserError(
                f"model '{ref}' is an adapter; merge it into its base model first (PEFT: merge_and_unload), then "
                f"transform the result"
            )
        self.ref, self._trust, self.held = ref, trust_remote_code, 0
        self.folder = Path(source.path) if source.folder else downloaded(ref)
        self.config = load_config(ref, trust_remote_code=trust_remote_code)
        check_not_quantized(self.config, ref)
        self.files = checkpoint_files(self.folder)
        self._skeleton = skeleton(self.config, torch.float32)
        self.places = self._matched()
        stored = self._stored_dtype()
        self.dtype = stored if dtype == "auto" else getattr(torch, dtype)

    def skeleton(self) -> Any:
        return self._skeleton.to(self.dtype)

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for file in sorted({self.places[name][0] for name in names}):
            try:
                # Opened for these tensors only: pages of a mapped file that was read count as our memory.
                with safe_open(file, framework="pt", device="cpu") as reader:
                    for name in names:
                        path, key = self.places[name]
                        if path == file:
                            found[name] = reader.get_tensor(key).to(self.dtype, copy=True)
            except (SafetensorError, OSError) as error:
                raise UserError(f"model '{self.ref}': '{file.name}' cannot be read: {error}") from None
        for name, tensor in found.items():
            # The extremes of a tensor with NaN are NaN, and finding them takes no memory.
            if tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise UserError(
                    f"model '{self.ref}': tensor '{name}' holds {bad} values that are no numbers (NaN or infinity); "
                    f"a model with broken weights is not transformed"
                )
        return found

    def whole(self) -> Any:
        name = str(self.dtype).removeprefix("torch.")
        return load_model(self.ref, dtype=name, trust_remote_code=self._trust).eval()

    def _matched(self) -> dict[str, tuple[Path, str]]:
        """Return file and key of every parameter of the model."""
        model = self._skeleton
        prefix = f"{model.base_model_prefix}."
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        shared = getattr(self.config.get_text_config(), "tie_word_embeddings", False)
        where: dict[str, tuple[Path, str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            keys = (name, name.removeprefix(prefix))
            key = next((key for key in keys if key in self.files), None)
            if key is None:
                if shared and name in tied:
                    continue
                raise UserError(
                    f"model '{self.ref}' lacks the tensor '{name}'{did_you_mean(name, self.files)} that a "
                    f"{self.config.model_type} model has"
                )
            file, shape = self.files[key]
            if tuple(shape) != tuple(parameter.shape):
                raise UserError(
                    f"model '{self.ref}': tensor '{key}' has shape {tuple(shape)}, and its config wants "
                    f"{tuple(parameter.shape)}"
                )
            where[name] = (file, key)
        return where

    def _stored_dtype(self) -> torch.dtype:
        file, key = next(iter(self.places.values()))
        with safe_open(file, framework="pt", device="cpu") as reader:
            return reader.get_tensor(key).dtype


class ModelSource:
    """A model in memory; it is not changed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = copy.deepcopy(model.config)
        self.dtype = next(model.parameters()).dtype
        self.held = sum(p.numel() * p.element_size() for p in model.parameters())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def skeleton(self) -> Any:
        return skeleton(self.config, self.dtype)

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._parameters[name].detach().to("cpu", copy=True) for name in names}

    def whole(self) -> Any:
        return self.model


def fill(module: nn.Module, prefix: str, source: Source, device: torch.device) -> None:
    """Give the meta parameters of ``module``, called ``prefix`` in the model, their values, on ``device``."""
    from accelerate.utils import set_module_tensor_to_device

    start = f"{prefix}." if prefix else ""
    names = [start + name for name, _ in module.named_parameters()]
    values = source.tensors(names)
    for name in names:
        set_module_tensor_to_device(module, name.removeprefix(start), device, value=values.pop(name))
    for name, buffer in list(module.named_buffers()):
        if buffer.device != device:
            set_module_tensor_to_device(module, name, device)


def downloaded(ref: str) -> Path:
    """Return the folder of a hub model, fetched the first time. Raises UserError where it cannot be."""
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(ref, allow_patterns=wanted))
    except Exception as error:
        raise UserError(f"model '{ref}' cannot be downloaded: {first_line(error)}") from error


def checkpoint_files(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """Return file and shape of every tensor of a checkpoint, from the files' headers."""
    index = folder / INDEX
    listed: dict[str, str] = {}
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(listed.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"'{index}' is no index of a checkpoint: it needs a weight_map") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"'{index}' lists '{missing[0]}', which is not there; {len(names) - len(missing)} of {len(names)} "
                f"files are; copy the rest"
            )
    else:
        names = (
            [SINGLE] if (folder / SINGLE).is_file() else sorted(p.name for p in folder.glob("*.safetensors"))
        )
    if not names:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        what = f"only a pickle ({pickles[0]}), which is refused" if pickles else "no weights"
        raise UserError(f"model folder '{folder}' has {what}; safetensors are wanted")
    found: dict[str, tuple[Path, list[int]]] = {}
    for name in names:
        for key, entry in safetensors_header(folder / name).items():
            found[key] = (folder / name, entry["shape"])
    absent = [key for key in listed if key not in found]
    if absent:
        raise UserError(f"'{index}' lists the tensor '{absent[0]}', which is in none of the files")
    return found
