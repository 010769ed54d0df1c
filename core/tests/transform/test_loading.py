"""A stored model gives the logits it had, bit for bit; what plain transformers cannot read it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.models import load_config, load_model, load_tokenizer
from graftwork.testing.compressed import replace_linears, store
from graftwork.testing.models import tiny_model
from graftwork.transform.hadamard import random_signs
from graftwork.transform.kv import set_kv
from graftwork.transform.modules import CompressedLinear, Factored, Rotation
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import ActivationScheme, KVScheme, WeightScheme
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    LlamaForCausalLM,
)

IDS = torch.arange(3, 43).reshape(2, 20)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
DTYPES = [torch.float32, torch.bfloat16]
HALF = ActivationScheme(bits=8, symmetric=True, convention="half-range")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Any]:
    """Models as ``from_pretrained`` gives them: their positions stay in float32, whatever the weights are."""
    folder = tmp_path_factory.mktemp("base")

    def load(kind: str, dtype: torch.dtype) -> Any:
        path = folder / f"{kind} {dtype}"
        if not path.exists():
            tiny_model(kind, dtype=dtype, **WIDE).save_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path).eval()

    return load


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def rounded(linear: nn.Linear, bits: int = 4, group: int | None = 64, **parts: Any) -> CompressedLinear:
    scheme = WeightScheme(bits=bits, group=group, symmetric=parts.pop("symmetric", True))
    return CompressedLinear.from_linear(linear, **parts).quantized(quantize_weight(linear.weight, scheme))


def noise(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).mul(0.1).to(like.dtype)


def rotation(columns: int) -> Rotation:
    turns = torch.linalg.qr(torch.randn(columns // 8, 8, 8, generator=torch.Generator().manual_seed(1))).Q
    return Rotation(32, random_signs(columns, 3), turns)


def rotated(name: str, linear: nn.Linear) -> nn.Module:
    activations = ActivationScheme(bits=4)
    return rounded(linear, 4, None, rotation=rotation(linear.in_features), activations=activations)


def corrected(name: str, linear: nn.Linear) -> nn.Module:
    weight = linear.weight
    return rounded(
        linear,
        2,
        correction=(noise(len(weight), 3, like=weight), noise(3, weight.shape[1], like=weight)),
    )


def factored(name: str, linear: nn.Linear) -> nn.Module:
    if "k_proj" in name:
        return linear
    weight, rank = linear.weight, 12 if "mlp" in name else 8
    parts = Factored.from_factors(
        noise(len(weight), rank, like=weight), noise(rank, weight.shape[1], like=weight), linear.bias
    )
    for part in (parts.first, parts.second):
        part.quantized(quantize_weight(part.dense_weight(), WeightScheme(bits=4, group=None)))
    parts.second.activations = ActivationScheme(bits=8)
    return parts


def unrounded_factors(name: str, linear: nn.Linear) -> nn.Module:
    return Factored.from_factors(linear.weight[:, :4], linear.weight[:4], linear.bias)


COMPRESSED_TENSORS: dict[str, Callable[[str, nn.Linear], nn.Module]] = {
    "W4 group 64": lambda name, linear: rounded(linear),
    "W4 per row": lambda name, linear: rounded(linear, 4, None),
    "W3 group 64": lambda name, linear: rounded(linear, 3),
    "W8 per row": lambda name, linear: rounded(linear, 8, None),
    "W8A8": lambda name, linear: rounded(linear, 8, None, activations=HALF),
    "W8A8, both asymmetric": lambda name, linear: rounded(
        linear, 8, None, symmetric=False, activations=ActivationScheme(bits=8)
    ),
    "W4A8": lambda name, linear: rounded(linear, 4, activations=HALF),
    "several, one left out": lambda name, linear: (
        linear if name.endswith("0.mlp.down_proj") else rounded(linear, 8 if "self_attn" in name else 4)
    ),
}
OURS: dict[str, tuple[Callable[[str, nn.Linear], nn.Module], KVScheme | None]] = {
    "rotation, W4A4": (rotated, None),
    "rotation, W4A4KV4": (rotated, KVScheme(bits=4, rotate_keys=True)),
    "correction": (corrected, None),
    "factors": (factored, None),
    "factors as they are": (unrounded_factors, None),
    "asymmetric W4": (lambda name, linear: rounded(linear, symmetric=False), None),
    "asymmetric W3 per row": (lambda name, linear: rounded(linear, 3, None, symmetric=False), None),
    "W4KV4": (lambda name, linear: rounded(linear), KVScheme(bits=4)),
    "KV4 alone": (lambda name, linear: linear, KVScheme(bits=4)),
    "W4A4 by another convention": (
        lambda name, linear: rounded(linear, activations=ActivationScheme(bits=4, symmetric=True)),
        None,
    ),
    "W16A8": (lambda name, linear: CompressedLinear.from_linear(linear, activations=HALF), None),
    "mixed": (
        lambda name, linear: (rotated if "self_attn" in name else factored if "up" in name else corrected)(
            name, linear
        ),
        None,
    ),
}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


# ---------------------------------------------------------------------- compressed-tensors, without us

PLAIN = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith("graftwork") for name in sys.modules)
for folder in sys.argv[1:]:
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.arange(3, 43).reshape(2, 20)).logits
    save_file({"logits": logits}, Path(folder) / "logits.out")
assert not any(name.startswith("graftwork") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def plainly(
    tmp_path_factory: pytest.TempPathFactory, live: Any
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Logits before saving, and those that plain transformers gets in a process that does not know us."""
    folder = tmp_path_factory.mktemp("plain")
    before: dict[str, torch.Tensor] = {}
    for dtype in DTYPES:
        for name, make in COMPRESSED_TENSORS.items():
            kind = "qwen2" if "row" in name else "llama"
            model = replace_linears(live(kind, dtype), make)
            key = f"{name} {dtype}"
            before[key] = logits(model)
            store(model, folder / key)
    done = run(PLAIN, *(str(folder / key) for key in before))
    assert done.returncode == 0, done.stderr[-3000:]
    return {key: (value, load_file(folder / key / "logits.out")["logits"]) for key, value in before.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMPRESSED_TENSORS)
def test_plain_transformers_gives_the_same_logits(name: str, dtype: torch.dtype, plainly: Any) -> None:
    before, after = plainly[f"{name} {dtype}"]
    assert after.dtype == dtype
    assert torch.equal(before, after)


@pytest.mark.parametrize("bits", [3, 4])
def test_packed_zero_points_load_dequantised_and_never_wrongly(bits: int, tmp_path: Path) -> None:
    model = replace_linears(tiny_model(**WIDE), lambda name, linear: rounded(linear, bits, symmetric=False))
    folder = store(model, tmp_path / "m", format="compressed-tensors")
    whole = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert torch.equal(logits(whole), logits(model))
    try:
        packed = AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError:
        return
    assert torch.equal(logits(packed), logits(model))


def test_dense_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = replace_linears(tiny_model(), lambda name, linear: rounded(linear, group=16))
    folder = store(model, tmp_path / "m", format="dense")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(logits(load_model(str(folder))), logits(model))


# ---------------------------------------------------------------------- our layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", OURS)
def test_a_reloaded_model_gives_the_same_logits(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path, live: Any
) -> None:
    make, kv = OURS[name]
    model = replace_linears(live(kind, dtype), make)
    if kind == "qwen2":
        for layer in model.model.layers:
            bias = layer.self_attn.q_proj.second.bias if "factors" in name else layer.self_attn.q_proj.bias
            nn.init.normal_(bias)
    plain = logits(model)
    set_kv(model, kv)
    before = logits(model)
    if kv is not None:
        assert not torch.equal(plain, before)
    folder = store(model, tmp_path / "m", kv)
    loaded = load_model(str(folder))
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), before)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert torch.allclose(logits(again), before, atol=1e-2 if dtype == torch.float32 else 0.2)
    assert ("kv4" in again.config._attn_implementation) == (kv is not None)


def test_config_and_tokenizer_are_those_of_the_base_model(tmp_path: Path) -> None:
    model = replace_linears(tiny_model(**WIDE), rotated)
    folder = store(model, tmp_path / "m")
    config = load_config(str(folder))
    assert type(config) is type(model.config)
    assert config.model_type == "llama"
    assert config.hidden_size == 64
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
    assert load_tokenizer(str(folder)).encode("ab") == AutoTokenizer.from_pretrained(folder).encode("ab")


def test_a_loaded_model_generates_moves_and_trains_what_is_beside_it(tmp_path: Path) -> None:
    folder = store(replace_linears(tiny_model(**WIDE), rotated), tmp_path / "m", KVScheme(bits=8))
    model = load_model(str(folder))
    out = model.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 23)
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.float().sum().backward()
    assert embedded.grad is not None
    assert float(embedded.grad.abs().sum()) > 0


def test_saving_a_loaded_model_is_refused(tmp_path: Path) -> None:
    model = load_model(str(store(replace_linears(tiny_model(**WIDE), rotated), tmp_path / "m")))
    with pytest.raises(UserError, match="copy its folder instead") as caught:
        model.save_pretrained(tmp_path / "again")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "again").glob("*.safetensors"))


# ---------------------------------------------------------------------- refused, not loaded wrongly

REFUSED = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM, AutoConfig
folder = sys.argv[1]
for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained, AutoConfig.from_pretrained):
    try:
        load(folder)
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
    else:
        print("LOADED")
import graftwork.transform.loading
print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
"""


def test_without_us_transformers_refuses(tmp_path: Path) -> None:
    folder = store(replace_linears(tiny_model(**WIDE), rotated), tmp_path / "m")
    done = run(REFUSED, str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    auto, named, config, after = done.stdout.splitlines()
    assert auto.startswith(
        "ValueError The checkpoint you are trying to load has model type `graftwork-compressed`"
    )
    assert named.startswith("OSError")
    assert config.startswith("ValueError")
    assert after == "LlamaForCausalLM"


def test_a_class_of_the_family_by_name_works_with_the_config(tmp_path: Path) -> None:
    model = replace_linears(tiny_model(**WIDE), rotated)
    folder = store(model, tmp_path / "m")
    loaded = LlamaForCausalLM.from_pretrained(folder, config=load_config(str(folder)))
    assert torch.equal(logits(loaded), logits(model))


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_configs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def stored(name: str) -> Path:
        return store(replace_linears(tiny_model(**WIDE), rotated), tmp_path / name)

    assert "names its base_model_type as 'llama9'" in refused(
        changed(stored("a"), lambda config: config.update(base_model_type="llama9"))
    )
    assert "version 2 of our layout, and this graftwork reads version 1" in refused(
        changed(stored("b"), lambda config: config["quantization_config"].update(version=2))
    )

    def other_module(config: dict[str, Any]) -> None:
        config["quantization_config"]["groups"][0]["modules"]["model.layers.*.mlp.side_proj"] = [[0, 0]]

    assert "a linear 'model.layers.0.mlp.side_proj', which the model does not have" in refused(
        changed(stored("c"), other_module)
    )


def test_a_checkpoint_without_a_weight_is_refused(tmp_path: Path) -> None:
    folder = store(replace_linears(tiny_model(**WIDE), rotated), tmp_path / "m")
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    index = json.loads((folder / "graftwork.safetensors.index.json").read_text())
    for name in [name for name in tensors if "layers.1.mlp.up_proj.weight" in name]:
        del tensors[name], index["weight_map"][name]
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "graftwork.safetensors.index.json").write_text(json.dumps(index))
    assert "no usable weight for 'model.layers.1.mlp.up_proj'" in refused(folder)
