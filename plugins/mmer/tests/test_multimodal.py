"""A LLaVA-style checkpoint: its language model is merged, its connector kept, its prompts routed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.models import load_model
from graftwork.testing.experts import open_tiny, save_tiny, tensors_of, tiny_experts
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_mmer import Artefact, MaskedDeltas, MmerMethod, MmerOptions, RoutedModel
from graftwork_mmer.multimodal.llava import load_connector
from graftwork_mmer.multimodal.prompt import Media, assemble
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 258
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def llava(folder: Path, **changes: Any) -> LlavaForConditionalGeneration:
    """Save a tiny LLaVA whose language model is the tiny one, fine-tuned by noise."""
    text = tiny_model("llama")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION).to_dict(),
        text_config=text.config.to_dict(),
        image_token_index=IMAGE,
        **changes,
    )
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config).eval()
    own = dict(text.named_parameters())
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            noise = 0 if "embed" in name else 0.01 * torch.randn(parameter.shape)
            parameter.copy_(own[f"model.{name}"] + noise)
        model.lm_head.weight.copy_(text.get_output_embeddings().weight)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    folder = tmp_path_factory.mktemp("vlm")
    base, _ = tiny_experts(folder, [])
    return base, folder / "llava", llava(folder / "llava")


@pytest.mark.parametrize(
    "changes", [{}, {"vision_feature_layer": [-1, -2], "vision_feature_select_strategy": "full"}]
)
def test_the_connector_is_the_experts(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = llava(tmp_path, **changes)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
    connector = load_connector(str(tmp_path))
    assert torch.equal(connector(pixels), expected)
    assert not any(parameter.requires_grad for parameter in connector.parameters())


def test_other_spellings_of_names(vlm: Any, tmp_path: Path) -> None:
    _, folder, _ = vlm
    shutil.copy(folder / "config.json", tmp_path)
    renamed = {
        ("model." + name).replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
        for name, tensor in tensors_of(folder).items()
    }
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(load_connector(str(tmp_path))(pixels), load_connector(str(folder))(pixels))


def test_a_routed_prompt_is_the_vlm_itself(vlm: Any) -> None:
    """One expert, everything kept: image and text give what the multimodal model gives, in any batch."""
    base, folder, model = vlm
    tokenizer = tiny_tokenizer()
    experts = open_tiny(base, {"vision": str(folder)})
    artefact = Artefact.of(MmerMethod(MmerOptions(keep=1)), experts)
    routed = RoutedModel(load_model(str(base)), MaskedDeltas(artefact), base_sha256=experts.base_digest)
    connector = load_connector(str(folder))
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    soft = connector(pixels)[0]
    prompts = [["see ", Media("vision", soft), " what?"], ["no image"]]
    batch = assemble(routed, tokenizer, prompts)
    assert batch.route_ids[0].tolist() == [0] * 4 + [1] * len(soft) + [0] * 6
    assert batch.present == [{"vision"}, set()]
    ids = tokenizer("see ", add_special_tokens=False).input_ids
    ids = ids + [IMAGE] * len(soft) + tokenizer(" what?", add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
        plain = load_model(str(base)).eval()(tokenizer("no image", return_tensors="pt").input_ids).logits
    found = routed(**batch.inputs()).logits
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1, -8:], plain[0], rtol=0, atol=1e-5)
    written = routed.generate(**batch.inputs(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        own = model.generate(
            input_ids=torch.tensor([ids]),
            pixel_values=pixels,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )[:, len(ids) :]
    assert written[0, : own.shape[1]].tolist() == own[0].tolist()


def test_a_task_of_text_is_a_route_too(vlm: Any, tmp_path: Path) -> None:
    base, folder, _ = vlm
    expert = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            if "layers" in name:
                parameter += 0.01 * torch.randn(parameter.shape)
    refs = {"vision": str(folder), "sums": str(save_tiny(expert, tmp_path / "sums"))}
    artefact = Artefact.of(MmerMethod(MmerOptions(keep=1)), open_tiny(base, refs))
    routed = RoutedModel(load_model(str(base)), MaskedDeltas(artefact))
    batch = assemble(routed, tiny_tokenizer(), [["1+1="]], tasks=[["sums"]])
    assert batch.present == [{"sums"}]
    plain = assemble(routed, tiny_tokenizer(), [["1+1="]])
    assert not torch.allclose(routed(**batch.inputs()).logits, routed(**plain.inputs()).logits, atol=1e-4)


def test_refusals(vlm: Any, tmp_path: Path) -> None:
    base, folder, _ = vlm
    with pytest.raises(UserError, match="type 'llama', not a LLaVA-style one"):
        load_connector(str(base))
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    tensors = tensors_of(folder)
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, cut / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 'multi_modal_projector.linear_2.bias'"):
        load_connector(str(cut))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 32
    shutil.copytree(folder, tmp_path / "wide")
    (tmp_path / "wide/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has shape .* and its config asks for"):
        load_connector(str(tmp_path / "wide"))
    artefact = Artefact.of(MmerMethod(MmerOptions(keep=1)), open_tiny(base, {"vision": str(folder)}))
    routed = RoutedModel(load_model(str(base)), MaskedDeltas(artefact))
    with pytest.raises(UserError, match="no route 'audio'"):
        assemble(routed, tiny_tokenizer(), [[Media("audio", torch.zeros(2, 32))]])
    with pytest.raises(UserError, match="tokens x 32"):
        assemble(routed, tiny_tokenizer(), [[Media("vision", torch.zeros(2, 31))]])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        assemble(routed, tiny_tokenizer(), [[]])
