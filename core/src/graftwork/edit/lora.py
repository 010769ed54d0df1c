"""An edit set as a PEFT adapter: dW = R Z^T is a LoRA with B = R, A = Z^T and scale 1, to be switched on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from graftwork.edit.edits import EditSet
from graftwork.errors import UserError
from graftwork.files import atomic_folder


def to_lora(edits: EditSet, folder: Path, model: Any, base: str) -> Path:
    """Write ``edits`` as a LoRA adapter of ``model``, whose reference is ``base``, into ``folder`` and return it.

    Raises:
        UserError: the set is empty, a module is missing, or the folder exists or cannot be written.
    """
    from peft import LoraConfig

    if not edits.changes:
        raise UserError("the edit set changes nothing, so there is no adapter to write")
    modules = dict(model.named_modules())
    missing = [name for name in edits.changes if name not in modules]
    if missing:
        raise UserError(f"the model has no module '{missing[0]}' that the edit set changes")
    ranks = {name: change.left.shape[1] for name, change in edits.changes.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in ranks),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    tensors = {}
    for name, change in edits.changes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = change.right.float().T.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = change.left.float().contiguous()
    try:
        with atomic_folder(folder) as building:
            save_file(tensors, building / "adapter_model.safetensors", {"format": "pt"})
            config.save_pretrained(str(building))
    except FileExistsError:
        raise UserError(f"'{folder}' exists already; name another folder for the adapter") from None
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written: {error.strerror or error}") from None
    return folder
