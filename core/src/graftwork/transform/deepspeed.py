"""Weights from a model that DeepSpeed ZeRO-3 has partitioned over processes, in the CPUs' memory or on NVMe drives."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import logging
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graftwork.distributed import meet, rank_and_world, started
from graftwork.errors import UserError
from graftwork.files import temporary_folder
from graftwork.hookspecs import WeightTransform
from graftwork.models import auto_class
from graftwork.train.deepspeed import parsed
from graftwork.transform.source import CheckpointSource

KEY = "transform.deepspeed"
# They are for training, which does not happen here, or change weights on the way.
_TRAINING = ("optimizer", "scheduler", "compression_training", "weight_quantization")
_TRAINING_ZERO = (
    "offload_optimizer",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "memory_efficient_linear",
)
# The trainer's: how a batch is made up of those of the processes, which here are not DeepSpeed's concern.
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


_NO_WHOLE = (
    "{} learns from the whole model, and transform.deepspeed leaves no process with it; run it without"
)


def check_partitioned(transforms: Sequence[tuple[str, WeightTransform]]) -> None:
    """Refuse transforms that read or change the weights of the whole model, which are nowhere whole.

    Raises:
        UserError: with the plugin.
    """
    for plugin, transform in transforms:
        if transform.prepare is not None:
            raise UserError(_NO_WHOLE.format(f"plugin '{plugin}'"))


def inference_config(
    value: str | Mapping[str, Any], dtype: torch.dtype, largest: int, processes: int
) -> dict[str, Any]:
    """Return the DeepSpeed config of ``value`` (a file or the config itself) with what it leaves open filled in.

    ``"auto"`` counts as left open.

    Args:
        value: what ``transform.deepspeed`` says.
        dtype: of the model.
        largest: number of values of the model's largest parameter.
        processes: which the parameters are partitioned over.

    Raises:
        UserError: no ZeRO stage 3, sections for training, another precision than the model's, an offload that cannot
            work.
    """
    config = _decided(parsed(value, KEY))
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    if zero.get("stage", 0) != 3:
        raise UserError(
            f"{KEY} asks for ZeRO stage {zero.get('stage', 0)}, which leaves the whole model in every process; set "
            f"zero_optimization.stage to 3"
        )
    unfit = [name for name in _TRAINING if config.get(name)]
    unfit += [f"zero_optimization.{name}" for name in _TRAINING_ZERO if zero.get(name)]
    if unfit:
        raise UserError(
            f"{KEY} has '{unfit[0]}', which is for training or changes weights on the way, and here weights are only "
            f"read; leave it out"
        )
    _same_precision(config, dtype)
    offload = zero.get("offload_param")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        _check_nvme(offload, -(-largest // processes), processes)
    for name in _BATCHES:
        config.pop(name, None)
    # Left on, it would replace torch's own linear for all that comes after.
    zero = {**zero, "memory_efficient_linear": False}
    return {**config, "zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}


def _decided(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without what is ``"auto"``."""
    return {
        key: _decided(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for key, value in tree.items()
        if value != "auto"
    }


def _same_precision(config: dict[str, Any], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if dtype not in (*_HALF.values(), torch.float32):
        raise UserError(
            f"DeepSpeed holds float32, bfloat16 and float16, and the model is {name}; set model.dtype"
        )
    for key, half in _HALF.items():
        section = config.setdefault(key, {})
        wanted = dtype == half
        if section.setdefault("enabled", wanted) != wanted:
            raise UserError(
                f"{KEY} turns {key} {'off' if wanted else 'on'}, and the model is {name}; leave {key} out, or set "
                f"model.dtype={str(half).removeprefix('torch.') if not wanted else 'float32'}"
            )


def _check_nvme(offload: dict[str, Any], largest: int, processes: int) -> None:
    """Check the section and fill in the size of the buffers; ``largest``: values of the largest partition."""
    path = offload.get("nvme_path")
    if not path or not Path(path).is_dir():
        what = f"'{path}', which is no folder" if path else "no folder"
        raise UserError(
            f"{KEY} offloads to NVMe and names {what}; set zero_optimization.offload_param.nvme_path"
        )
    if offload.setdefault("buffer_size", largest) < largest:
        share = "" if processes == 1 else f" (its part in one of {processes} processes)"
        raise UserError(
            f"{KEY}: buffers of {offload['buffer_size']:.0f} values do not hold the model's largest parameter{share}; "
            f"set zero_optimization.offload_param.buffer_size to {largest} or more, or leave it out"
        )


class DeepSpeedSource:
    """A checkpoint whose model DeepSpeed partitions over the processes, of which a layer at a time is gathered.

    No process ever has the whole model: the main process reads one tensor after the other from the files and hands
    its parts out. That happens when the first tensors are asked for.

    Args:
        ref, dtype, trust_remote_code: as in :class:`~graftwork.transform.source.CheckpointSource`.
        value: the DeepSpeed config, or a file with one.

    Raises:
        UserError: see :func:`inference_config` and :class:`~graftwork.transform.source.CheckpointSource`; DeepSpeed
            is not installed, does not accept the config, or cannot reach NVMe drives.
    """

    def __init__(
        self,
        ref: str,
        value: str | Mapping[str, Any],
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(f"{KEY} needs DeepSpeed; install it with: pip install 'graftwork[deepspeed]'")
        self._files = CheckpointSource(ref, dtype=dtype, trust_remote_code=trust_remote_code)
        self.folder, self.config, self.dtype = self._files.folder, self._files.config, self._files.dtype
        self._trust = trust_remote_code
        sizes = [parameter.numel() for parameter in self._files.skeleton().parameters()]
        _, processes = started()
        self.settings = inference_config(value, self.dtype, max(sizes), processes)
        _check_accepted(self.settings)
        self.held = self._held(sum(sizes), processes)
        self._parameters: dict[str, Any] = {}
        # Closed with this object, or when the process ends.
        self._folders = contextlib.ExitStack()
        weakref.finalize(self, self._folders.close)

    def skeleton(self) -> Any:
        return self._files.skeleton()

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return copies of the named parameters, on the CPU, the same in all processes, which must all ask."""
        zero = _deepspeed().zero
        if not self._parameters:
            self._parameters = self._partitioned()
        found: dict[str, torch.Tensor] = {}
        # One by one: the buffers for NVMe hold a few parameters only.
        for name in names:
            parameter = self._parameters[name]
            with zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().to("cpu", self.dtype, copy=True)
        return found

    def whole(self) -> Any:
        raise UserError(_NO_WHOLE.format("a plugin of this run"))

    def _held(self, values: int, processes: int) -> int:
        """Return the bytes of this process's memory that its part of the model takes."""
        offload = self.settings["zero_optimization"].get("offload_param") or {}
        item = torch.empty((), dtype=self.dtype).element_size()
        if offload.get("device") == "nvme":
            return int(offload.get("buffer_count", 5) * offload["buffer_size"] * item)
        on_accelerator = torch.accelerator.is_available() and offload.get("device") != "cpu"
        return 0 if on_accelerator else -(-values // processes) * item

    def _partitioned(self) -> dict[str, Any]:
        """Build the model in parts, fill it from the files, and return its parameters by their names."""
        from transformers.initialization import no_init_weights

        meet()
        zero = _deepspeed().zero
        settings = self._with_own_folder()
        with _quiet(), _local_rank(), no_init_weights(), zero.Init(config_dict_or_path=settings):
            model = auto_class(self.config).from_config(
                copy.deepcopy(self.config), dtype=self.dtype, trust_remote_code=self._trust
            )
        model.tie_weights()
        main = rank_and_world()[0] == 0
        for name, parameter in model.named_parameters():
            if not hasattr(parameter, "ds_id"):
                raise RuntimeError(f"DeepSpeed has not partitioned the parameter '{name}'")
            with zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if main:
                    parameter.copy_(self._files.tensors([name])[name])
        return dict(model.named_parameters(remove_duplicate=False))

    def _with_own_folder(self) -> dict[str, Any]:
        """Return the config; where it offloads to NVMe, to a folder that no other run uses and that is removed."""
        settings = copy.deepcopy(self.settings)
        offload = settings["zero_optimization"].get("offload_param") or {}
        if offload.get("device") == "nvme":
            path = Path(offload["nvme_path"]) / "graftwork"
            offload["nvme_path"] = str(self._folders.enter_context(temporary_folder(path)))
        return settings


def _check_accepted(settings: Mapping[str, Any]) -> None:
    """Let DeepSpeed look at its part of the config, and at what it needs for NVMe.

    Raises:
        UserError: it refuses.
    """
    zero = settings["zero_optimization"]
    try:
        _deepspeed("deepspeed.runtime.zero.config").DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        errors = getattr(error, "errors", list)()
        what = ".".join(map(str, errors[0]["loc"])) + ": " + errors[0]["msg"] if errors else str(error)
        raise UserError(f"{KEY}: DeepSpeed refuses zero_optimization: {what}") from None
    offload = zero.get("offload_param") or {}
    if offload.get("device") == "nvme":
        builder = _deepspeed("deepspeed.ops.op_builder").AsyncIOBuilder()
        if not builder.is_compatible():
            raise UserError(
                f"{KEY} offloads to NVMe, for which DeepSpeed compiles against libaio, and that is not there; install "
                f"it (Debian: libaio-dev; elsewhere its folder goes into CFLAGS and LDFLAGS), or offload to the cpu"
            )


def _deepspeed(name: str = "deepspeed") -> Any:
    # By name, since it need not be installed.
    return importlib.import_module(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to our own lines; warnings stay, in the main process."""
    level = logging.WARNING if rank_and_world()[0] == 0 else logging.ERROR
    logging.getLogger("DeepSpeed").setLevel(level)
    # Meant for DeepSpeed's authors, once per call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _local_rank() -> Iterator[None]:
    """Tell DeepSpeed the number of a process that was started alone; others would take it for torchrun's."""
    if "LOCAL_RANK" in os.environ:
        yield
        return
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
