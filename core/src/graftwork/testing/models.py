"""Tiny random models with a byte-level tokenizer: the same classes as the real ones, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from graftwork.models import auto_class

SPECIALS = ["<pad>", "<bos>", "<eos>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_WIDE, "num_key_value_heads": 2},
    "mistral": {**_WIDE, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {**_WIDE, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48},
    "t5": {
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "d_kv": 8,
        "d_ff": 48,
        "decoder_start_token_id": 0,
        # Positions are relative: there is no window.
        "max_position_embeddings": None,
    },
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: 256 bytes and three special tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIALS + alphabet)}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=1024
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Return a random model of ``kind`` (llama, mistral, qwen2, gpt2, t5); ``changes`` go to its config."""
    settings = {
        "vocab_size": len(SPECIALS) + 256,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **CONFIGS[kind],
        **changes,
    }
    config = AutoConfig.for_model(kind, **settings)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config).to(dtype)
    torch.random.set_rng_state(state)
    return model.eval()


def tiny_checkpoint(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Save a tiny model and its tokenizer to ``folder`` and return it."""
    tiny_model(kind, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_judge(folder: Path, *, labels: int = 1, template: bool = False) -> Path:
    """Save a random model that gives a text ``labels`` logits to ``folder`` and return it.

    ``template``: its tokenizer has a chat template.
    """
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    config = AutoConfig.for_model(
        "llama",
        **CONFIGS["llama"],
        vocab_size=len(tokenizer),
        num_labels=labels,
        pad_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
