"""Which modules form an MLP, model family by model family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork_parsp import ParspConfig, find_mlps
from graftwork_parsp.model import layers_of
from graftwork_parsp.neurons import short_names
from peft import get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

# model type, config, input projections of the last MLP, output projection, PEFT's endings
FAMILIES: dict[str, tuple[dict[str, Any], list[str], str, list[str]]] = {
    "opt": (
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
        ["model.decoder.layers.1.fc1"],
        "model.decoder.layers.1.fc2",
        ["fc1"],
    ),
    "phi": (
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        ["model.layers.1.mlp.fc1"],
        "model.layers.1.mlp.fc2",
        ["mlp.fc1"],
    ),
    "gpt_neox": (
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        ["gpt_neox.layers.1.mlp.dense_h_to_4h"],
        "gpt_neox.layers.1.mlp.dense_4h_to_h",
        ["mlp.dense_h_to_4h"],
    ),
}


def small(kind: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=259, **FAMILIES[kind][0]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind: str) -> None:
    _, ins, out, endings = FAMILIES[kind]
    model = small(kind)
    mlps = find_mlps(model)
    assert len(mlps) == 2
    assert (list(mlps[-1].ins), mlps[-1].out) == (ins, out)
    assert (mlps[-1].inputs, mlps[-1].neurons) == (32, 48)
    assert short_names(mlps, "ins") == endings
    adapted = get_peft_model(model, ParspConfig(density=0.25, down="columns"))
    assert sorted(layers_of(adapted)) == sorted(key for mlp in mlps for key in (*mlp.ins, mlp.out))
    assert find_mlps(adapted) == mlps


@pytest.mark.parametrize(
    ("kind", "ins", "out"),
    [
        (
            "llama",
            ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"],
            "model.layers.1.mlp.down_proj",
        ),
        ("gpt2", ["transformer.h.1.mlp.c_fc"], "transformer.h.1.mlp.c_proj"),
        ("t5", ["decoder.block.1.layer.2.DenseReluDense.wi"], "decoder.block.1.layer.2.DenseReluDense.wo"),
    ],
)
def test_tiny_models(kind: str, ins: list[str], out: str) -> None:
    mlps = find_mlps(tiny_model(kind))
    assert len(mlps) == (4 if kind == "t5" else 2)
    assert (list(mlps[-1].ins), mlps[-1].out) == (ins, out)
    assert (mlps[-1].inputs, mlps[-1].neurons) == (32, 48)


def test_gated_t5_has_two_input_projections() -> None:
    mlps = find_mlps(tiny_model("t5", feed_forward_proj="gated-gelu"))
    assert [len(mlp.ins) for mlp in mlps] == [2] * 4
    assert mlps[0].ins == (
        "encoder.block.0.layer.1.DenseReluDense.wi_0",
        "encoder.block.0.layer.1.DenseReluDense.wi_1",
    )


def test_an_unknown_model_is_refused_and_can_be_named() -> None:
    config = AutoConfig.for_model(
        "bert",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=99,
    )
    model = AutoModel.from_config(config)
    with pytest.raises(UserError) as caught:
        find_mlps(model)
    assert str(caught.value) == (
        "PaRSP finds 0 MLPs in BertModel, which has 2 layers; name its projections with plugins.parsp.neurons: "
        "{in: [gate, up], out: down}, relative to what they share"
    )
    names = {"in": ["intermediate.dense"], "out": "output.dense"}
    mlps = find_mlps(model, names)
    assert [mlp.ins for mlp in mlps] == [(f"encoder.layer.{n}.intermediate.dense",) for n in (0, 1)]
    assert mlps[1].out == "encoder.layer.1.output.dense"
    adapted = get_peft_model(model, ParspConfig(density=0.25, neurons=names))
    assert sorted(layers_of(adapted)) == [f"encoder.layer.{n}.intermediate.dense" for n in (0, 1)]
    with pytest.raises(UserError, match=r"finds 0 MLPs in BertModel.* with the names in 'neurons'"):
        find_mlps(model, {"in": ["nothing"], "out": "output.dense"})
    with pytest.raises(UserError, match=r"'encoder.layer.0.attention.self' is no MLP: .* 32 to 32, 48 to 32"):
        # An output projection that reads something else.
        model.encoder.layer[0].attention.self.other = torch.nn.Linear(48, 32)
        find_mlps(model, {"in": ["key"], "out": "other"})
