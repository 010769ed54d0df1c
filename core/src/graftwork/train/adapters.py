"""Inject adapters through PEFT, and do with them what the stream's policy says."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer

from graftwork.compat.trainer import keep_adapter_activity
from graftwork.errors import UserError, did_you_mean, first_line
from graftwork.hookspecs import Adapter
from graftwork.models import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graftwork.run import Run

POLICIES = ("shared", "stacked", "separate")
# By whether the model is an encoder-decoder.
TASK_TYPES = {False: TaskType.CAUSAL_LM, True: TaskType.SEQ_2_SEQ_LM}


def choose(run: Run, model: PreTrainedModel) -> Adapter | None:
    """Return the one adapter of this run, from a plugin or from the recipe, or None for full weights.

    ``model`` may be on the meta device.

    Raises:
        UserError: two plugins, or a plugin and the recipe, both bring one; a field PEFT does not know.
    """
    found = run.plugins.call_one("adapter_config", run=run, model=model)
    written = run.job.adapter
    if found and written:
        raise UserError(
            f"plugin '{found[0]}' brings a whole-model adapter (hook adapter_config) and the recipe's 'adapter' "
            f"names another; a run has only one: remove 'adapter' from the recipe or leave the plugin out"
        )
    if found:
        value = found[1]
        adapter = value if isinstance(value, Adapter) else Adapter(value)
    elif written:
        adapter = from_fields(written)
    else:
        return None
    # Plugins and recipes write configs for any model; which of PEFT's wrappers fits is the model's own matter.
    if adapter.config.task_type in (None, *TASK_TYPES.values()):
        adapter.config.task_type = TASK_TYPES[is_encoder_decoder(model.config)]
    return adapter


def from_fields(fields: Mapping[str, Any]) -> Adapter:
    """Return the adapter that a recipe's ``adapter:`` section describes in PEFT's own field names."""
    fields = dict(fields)
    policy = fields.pop("policy", "shared")
    if policy not in POLICIES:
        raise UserError(f"adapter.policy = '{policy}': it is one of {', '.join(POLICIES)}")
    kind = fields.pop("peft_type", None)
    known = {str(getattr(key, "value", key)): cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(kind, str) or kind.upper() not in known:
        word = str(kind)
        raise UserError(
            f"adapter.peft_type = {kind!r}: PEFT has no such method{did_you_mean(word.upper(), known)}; "
            f"write for example peft_type: LORA"
        )
    config_class = known[kind.upper()]
    names = set(config_class.__dataclass_fields__)
    for key in fields:
        if key not in names:
            raise UserError(
                f"adapter.{key}: {config_class.__name__} has no field '{key}'{did_you_mean(key, names)}"
            )
    try:
        return Adapter(config_class(**fields), policy)
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter: {config_class.__name__} refuses these fields: {error}") from error


class AdapterStack:
    """The adapters of one run on one model: which exist, which train, where they are saved.

    With the policy ``shared`` there is one adapter named ``default``; with ``stacked`` and
    ``separate`` one per task, named after it.
    """

    def __init__(self, adapter: Adapter | None, base: PreTrainedModel, base_name: str) -> None:
        self.adapter = adapter
        self.base_name = base_name
        self.model: Any = base
        self.names: list[str] = []

    @property
    def policy(self) -> str:
        return self.adapter.policy if self.adapter else "shared"

    def begin(self, task_name: str, seed: int) -> None:
        """Make the adapter that ``task_name`` trains, or go on with the shared one."""
        if self.adapter is None:
            return
        name = "default" if self.policy == "shared" else adapter_name(task_name)
        if name not in self.names:
            torch.manual_seed(seed)
            self._add(name)
        self._activate(self.names if self.policy == "stacked" else [name], trains=name)

    def put_on(self, base: PreTrainedModel) -> None:
        """Put freshly made adapters of the same names on another copy of the base; their values are to be set."""
        names, self.model, self.names = self.names, base, []
        for name in names:
            self._add(name)
        if names:
            self._activate(names if self.policy == "stacked" else names[-1:], trains=names[-1])

    def use_for(self, task_name: str) -> None:
        """Activate the adapter that answers ``task_name`` (only ``separate`` has a choice)."""
        if self.policy == "separate" and adapter_name(task_name) in self.names:
            self._activate([adapter_name(task_name)], trains=None)

    def forget_others(self) -> None:
        """Remove adapters that a trainer added for itself, such as DPO's reference."""
        if self.adapter is None:
            return
        for name in [name for name in self.model.peft_config if name not in self.names]:
            self.model.delete_adapter(name)

    @contextlib.contextmanager
    def visited_by(self, folders: Mapping[str, Path | None]) -> Iterator[Callable[[str | None], None]]:
        """Load other states of the adapter beside it, by name; yield a function that puts one of them in place.

        ``None`` puts our own back. In the end all is as it was: what is active, and what trains.

        Raises:
            UserError: one of them does not fit the model.
        """
        active = list(self.model.base_model.active_adapters)

        def use(name: str | None) -> None:
            self.model.base_model.set_adapter(active if name is None else [name])

        with keep_adapter_activity(self.model):
            try:
                for name, folder in folders.items():
                    try:
                        self.model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
                    except (RuntimeError, ValueError, KeyError) as error:
                        raise UserError(
                            f"adapter '{folder}' does not fit this model: {first_line(error)}"
                        ) from error
                yield use
            finally:
                # None of those that go may be the active one.
                use(None)
                for name in folders:
                    if name in self.model.peft_config:
                        self.model.delete_adapter(name)

    def save(self, folder: Path) -> None:
        """Save all adapters (or the full model) below ``folder`` in Hugging Face formats."""
        self.model.save_pretrained(str(folder))
        self._name_base(folder)

    def load(self, folder: Path, names: Sequence[str]) -> None:
        """Put the adapters ``names`` that :meth:`save` wrote onto the base model again, in that order."""
        for name in names:
            path = str(folder if name == "default" else folder / name)
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(path, adapter_name=name, is_trainable=True)
            else:
                self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name, is_trainable=True)
            self.names.append(name)
        if self.policy == "stacked" and self.names:
            self._activate(self.names, trains=None)

    def export(self, folder: Path) -> None:
        """Write what a user takes away: one adapter folder that PEFT loads, or a full checkpoint.

        A stack of LoRA adapters is joined into one of the summed rank, which computes the same sum.
        """
        if self.policy == "stacked" and len(self.names) > 1 and self._is_lora():
            ones = [1.0] * len(self.names)
            self.model.add_weighted_adapter(self.names, ones, "default", combination_type="cat")
            _keep_precision(self.model, self.names)
            self.model.save_pretrained(str(folder), selected_adapters=["default"])
            self._name_base(folder)
            self.model.delete_adapter("default")
            self._activate(self.names, trains=None)
        else:
            self.save(folder)

    def _is_lora(self) -> bool:
        assert self.adapter is not None
        return str(self.adapter.config.peft_type).endswith("LORA") and hasattr(
            self.model, "add_weighted_adapter"
        )

    def _name_base(self, folder: Path) -> None:
        """Name the base as the user did, not by the cache folder it was loaded from: others have another cache."""
        for path in folder.rglob("adapter_config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = self.base_name
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _add(self, name: str) -> None:
        assert self.adapter is not None
        config = copy.deepcopy(self.adapter.config)
        try:
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(name, config)
            else:
                self.model = get_peft_model(self.model, config, adapter_name=name)
        except ValueError as error:
            raise UserError(f"the adapter does not fit this model: {error}") from error
        self.names.append(name)

    def _activate(self, names: list[str], trains: str | None) -> None:
        self.model.base_model.set_adapter(list(names))
        if self.policy != "shared":
            for other in self.names:
                self.model.set_requires_grad(other, other == trains)


def _keep_precision(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Fill the joined adapter ``default`` again, in the precision of its parts: PEFT makes it in the base's."""
    for module in model.modules():
        if not isinstance(module, LoraLayer) or "default" not in module.lora_A:
            continue
        layer: Any = module
        parts = [name for name in names if name in layer.lora_A]
        joined = {
            "lora_A": torch.cat([layer.lora_A[name].weight * layer.scaling[name] for name in parts], 0),
            "lora_B": torch.cat([layer.lora_B[name].weight for name in parts], 1),
        }
        for factor, values in joined.items():
            weight = getattr(layer, factor)["default"].weight
            # Where ranks differ between layers, PEFT gives all of them the largest and leaves the rest zero.
            whole = torch.zeros(weight.shape, dtype=values.dtype, device=weight.device)
            whole[: values.shape[0], : values.shape[1]] = values.detach()
            weight.data = whole


def adapter_name(task_name: str) -> str:
    """Return an adapter name for a task: no dots, which PyTorch forbids, and no part of a method's own prefix."""
    return "task-" + task_name.replace(".", "_")


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())
