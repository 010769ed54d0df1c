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
from graftwork.compat.peft_tuner import LayerTuner
from graftwork.compat.trainer import keep_adapter_activity, loss_is_scaled
from graftwork.testing.adapters import (
    adapted_tiny,
    assert_names_its_plugin,
    assert_registered_once,
    assert_round_trip,
    assert_transformers_loads,
    assert_unloads,
    tiny_batch,
)
from graftwork.testing.models import tiny_model
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer


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
    forget(member)


def forget(member: Any) -> None:
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member, None)
    PeftType._member_names_.remove(member)
    PeftType._member_map_.pop(member, None)
    del PeftType._value2member_map_[member]


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


class ScaleLayer(torch.nn.Module, BaseTunerLayer):
    """y = base(x) + the sum over active adapters of scale * x, for square layers only."""

    adapter_layer_names = ("scale_of",)

    def __init__(self, base_layer: torch.nn.Linear, name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], name
        self.scale_of = torch.nn.ParameterDict({})
        self.add(name, config)

    def add(self, name: str, config: Any) -> None:
        if self.in_features != self.out_features:
            raise TypeError("is not square")
        self.scale_of[name] = torch.nn.Parameter(torch.zeros(self.in_features))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.scale_of]
        return self.base_layer(x) + sum((self.scale_of[name].to(x) * x for name in names), torch.zeros(1))


@dataclass
class ScaleConfig(PeftConfig):
    target_modules: Any = None
    graftwork_plugin: str = "scaler"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SCALE")


class ScaleModel(LayerTuner):
    prefix = "scale_"
    tuner_layer_cls = ScaleLayer
    layer_cls = ScaleLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config


@pytest.fixture
def scale():
    member = register(name="SCALE", config_cls=ScaleConfig, model_cls=ScaleModel, prefix="scale_")
    yield member
    forget(member)


def scaled(*targets: str) -> Any:
    model = adapted_tiny(ScaleConfig(target_modules=list(targets)))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "scale_of" in name:
            torch.nn.init.constant_(parameter, 0.1 * index)
    return model


def test_a_method_with_layers_of_its_own_needs_little_more_than_the_layer(scale: Any, tmp_path: Path) -> None:
    """Its wrapped layers answer by the formula, and all checks for methods hold."""
    model = scaled("q_proj", "o_proj")
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    assert isinstance(layer, ScaleLayer)
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, layer.base_layer.weight) + x * layer.scale_of["default"]
    )
    assert assert_round_trip(model, tmp_path / "saved")["peft_type"] == "SCALE"
    assert_transformers_loads(model, tmp_path / "other")
    assert_registered_once(ScaleConfig(target_modules=["q_proj"]), ScaleModel)
    assert_unloads(model)


def test_a_second_adapter_leaves_the_first_training(scale: Any) -> None:
    model = scaled("q_proj")
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = model(**tiny_batch()).logits
    model.add_adapter("second", ScaleConfig(target_modules=["q_proj", "o_proj"]))
    # One layer has both, one is new; what is active has not changed.
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert torch.equal(model(**tiny_batch()).logits, expected)


def test_what_a_layer_refuses_is_told_with_its_name(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"^'model.layers.0.mlp.down_proj': is not square$"):
        scaled("down_proj")


def test_who_lacks_the_plugin_is_told(scale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_names_its_plugin(scaled("q_proj"), tmp_path, monkeypatch)


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
