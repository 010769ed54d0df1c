"""The private seams: loud where a new version of PEFT or transformers is built differently."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from graftwork import UserError
from graftwork.compat.peft_methods import check_known, register
from graftwork.compat.trainer import keep_adapter_activity, loss_is_scaled
from graftwork.testing.models import tiny_model
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel


@dataclass
class TwinConfig(LoraConfig):
    """LoRA under another name: what any new method needs from the seam, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("TWIN")


class TwinModel(LoraModel):
    pass


@pytest.fixture
def twin():
    member = register(name="TWIN", config_cls=TwinConfig, model_cls=TwinModel, prefix="lora_")
    yield member
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member, None)
    PeftType._member_names_.remove("TWIN")
    del PeftType._member_map_["TWIN"], PeftType._value2member_map_["TWIN"]


def test_the_tested_version_of_peft_is_installed() -> None:
    assert peft.__version__.split(".")[:2] == ["0", "21"], "look at compat/peft_methods.py before raising it"


def test_a_method_is_saved_loaded_and_merged_like_any_other(twin: Any, tmp_path: Path) -> None:
    assert PeftType("TWIN") is PeftType["TWIN"] is twin
    assert twin == "TWIN"
    assert twin in list(PeftType)
    model = get_peft_model(tiny_model(), TwinConfig(r=2, target_modules="all-linear")).eval()
    torch.nn.init.ones_(model.base_model.model.model.layers[0].mlp.up_proj.lora_B.default.weight)
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    model.save_pretrained(str(tmp_path))
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is TwinConfig
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert isinstance(loaded.base_model, TwinModel)
    assert torch.equal(loaded(ids).logits, expected)
    loaded.add_adapter("second", TwinConfig(r=2, target_modules="all-linear"))
    assert set(loaded.peft_config) == {"default", "second"}
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    plain = tiny_model()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(plain(ids).logits, expected)


def test_registering_twice_does_nothing_and_a_stranger_is_refused(twin: Any) -> None:
    again = register(name="TWIN", config_cls=TwinConfig, model_cls=TwinModel, prefix="lora_")
    assert again is twin
    with pytest.raises(ValueError, match=r"TWIN is already registered by .*TwinConfig"):
        register(name="TWIN", config_cls=LoraConfig, model_cls=TwinModel, prefix="lora_")


def test_an_enum_of_another_make_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(Enum):
        LORA = 1

    monkeypatch.setattr(peft, "PeftType", Closed)
    with pytest.raises(RuntimeError, match="no longer a string enum"):
        register(name="TWIN", config_cls=TwinConfig, model_cls=TwinModel, prefix="lora_")


@pytest.mark.parametrize(
    ("plugin", "cure"),
    [
        ("twin-plugin", "add `--plugin twin-plugin` (`pip install graftwork-twin-plugin` brings it)"),
        ("x; rm -rf ~", "name the plugin that brings it"),
        (None, "name the plugin that brings it"),
    ],
)
def test_an_adapter_of_an_unknown_method_names_its_plugin(plugin: str | None, cure: str) -> None:
    check_known({"peft_type": "LORA"}, Path("x"))
    with pytest.raises(UserError) as caught:
        check_known({"peft_type": "NOBODYS", "graftwork_plugin": plugin}, Path("x"))
    assert str(caught.value).startswith("adapter 'x' is of the method NOBODYS")
    assert cure in str(caught.value)


def test_loading_a_checkpoint_keeps_what_is_active_and_what_trains() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["a", "b"])
    model.set_requires_grad("a", False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert 0 < sum(before.values()) < len(before)
    with keep_adapter_activity(model):
        model.base_model.set_adapter("a")
    assert model.active_adapters == ["a", "b"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("own", "accepts", "function", "items", "scaled"),
    [
        (None, True, None, 8, True),
        (None, True, None, None, False),
        (None, False, None, 8, False),
        (None, False, len, 8, True),
        (True, False, None, None, True),
        (False, True, None, 8, False),
    ],
)
def test_who_divides_by_the_accumulation(
    own: Any, accepts: bool, function: Any, items: Any, scaled: bool
) -> None:
    class Stub:
        loss_is_scaled_for_ga = own
        model_accepts_loss_kwargs = accepts
        compute_loss_func = function

    assert loss_is_scaled(Stub(), items) is scaled


def test_trainers_still_have_the_attributes_that_are_read() -> None:
    import inspect

    from transformers import Trainer

    source = inspect.getsource(Trainer)
    for name in ("loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "compute_loss_func"):
        assert f"self.{name}" in source
    assert list(inspect.signature(Trainer._load_from_checkpoint).parameters) == [
        "self",
        "resume_from_checkpoint",
        "model",
    ]
