"""What every method of PEFT must do, checked on tiny models: save, load, unload, be registered.

Use the checks on an adapter that does something: where what it adds is zero, they would pass without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graftwork.compat.peft_methods import check_known, register
from graftwork.errors import UserError
from graftwork.testing.models import tiny_checkpoint, tiny_model

if TYPE_CHECKING:
    import pytest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tiny_batch() -> dict[str, torch.Tensor]:
    """Return three rows of 12 tokens, half of them prompt; the last row is two tokens shorter."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    ids[2, 10:], mask[2, 10:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted_tiny(
    config: PeftConfig, kind: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any
) -> PeftModel:
    """Return a tiny model (``changes`` go to its config) with a new adapter, both in eval mode.

    In float64 the adapter is float64 as well; else it has the precision that its method gives it.
    """
    model: Any = get_peft_model(tiny_model(kind, dtype=dtype, **changes), config)
    if dtype == torch.float64:
        model.to(dtype)
    return model.eval()


def assert_round_trip(
    adapted: PeftModel, folder: Path, *, kind: str = "llama", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Assert that a saved adapter comes back as the same bits; return its saved config.

    Loaded on a new model, in fp32 also with low memory, it answers alike and does not train; saved again, it is
    the same tensors.
    """
    batch = tiny_batch()
    expected = adapted(**batch).logits
    adapted.save_pretrained(str(folder))
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".md") == [CONFIG, WEIGHTS]
    # With low memory PEFT 0.21 rounds every adapter, LoRA's too, to the precision of the base.
    for lean in (False, True) if dtype == torch.float32 else (False,):
        again: Any = PeftModel.from_pretrained(
            tiny_model(kind, dtype=dtype), str(folder), low_cpu_mem_usage=lean
        )
        assert torch.equal(again.eval()(**batch).logits, expected)
        assert not any(parameter.requires_grad for parameter in again.parameters())
        second = folder / f"again-{lean}"
        again.save_pretrained(second)
        before, after = load_file(folder / WEIGHTS), load_file(second / WEIGHTS)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert after[key].dtype == value.dtype, key
            assert torch.equal(after[key], value), key
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def assert_transformers_loads(adapted: PeftModel, folder: Path, *, kind: str = "llama") -> None:
    """Assert that transformers' own ``load_adapter`` and ``from_pretrained`` read the saved adapter."""
    batch = tiny_batch()
    expected = adapted(**batch).logits
    adapted.save_pretrained(str(folder / "adapter"))
    model: Any = tiny_model(kind)
    model.load_adapter(str(folder / "adapter"))
    assert torch.equal(model.eval()(**batch).logits, expected)
    path = folder / "adapter" / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(tiny_checkpoint(folder / "base", kind))
    path.write_text(json.dumps(config), encoding="utf-8")
    whole = AutoModelForCausalLM.from_pretrained(folder / "adapter").eval()
    assert torch.equal(whole(**batch).logits, expected)


def assert_unloads(adapted: PeftModel, *, kind: str = "llama") -> Any:
    """Assert that the base model is left as it was, with no hook on it, and return it."""
    plain: Any = adapted.unload()
    base, batch = tiny_model(kind), tiny_batch()
    assert torch.equal(plain(**batch).logits, base(**batch).logits)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert not any(module._forward_pre_hooks for module in plain.modules())
    return plain


def assert_names_its_plugin(adapted: PeftModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that whoever lacks the plugin is told which one brings the saved adapter's method."""
    adapted.save_pretrained(str(folder))
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    method, plugin = config["peft_type"], config["graftwork_plugin"]
    check_known(config, folder)
    monkeypatch.delitem(PeftType._member_map_, method)
    said = ""
    try:
        check_known(config, folder)
    except UserError as error:
        said = str(error)
    assert said == (
        f"adapter '{folder}' is of the method {method}, which PEFT does not have by itself; "
        f"add `--plugin {plugin}` (`pip install graftwork-{plugin}` brings it)"
    )


def assert_registered_once(config: PeftConfig, model_class: Any) -> None:
    """Assert that registering the method of ``config`` again changes nothing and PEFT finds ``model_class``."""
    name = str(getattr(config.peft_type, "value", config.peft_type))
    member = register(name=name, config_cls=type(config), model_cls=model_class, prefix=model_class.prefix)
    assert member is PeftType(name)
    assert isinstance(get_peft_model(tiny_model(), config).base_model, model_class)
