"""Rewards of written answers: agreement with the target, or the logit of a reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from graftwork import UserError
from graftwork.errors import first_line
from graftwork.evaluate.answer_metrics import exact_match, f1
from graftwork.models import load_tokenizer, resolve

if TYPE_CHECKING:
    from graftwork import Sample

Reward = Callable[[Sequence["Sample"]], list[float]]
BATCH = 16


def exact(samples: Sequence[Sample]) -> list[float]:
    """Return 1 for an answer whose words are the target's, else 0."""
    return [exact_match(sample.text, [sample.target]) for sample in samples]


def overlap(samples: Sequence[Sample]) -> list[float]:
    """Return the F1 of the words that an answer shares with the target."""
    return [f1(sample.text, [sample.target]) for sample in samples]


OWN: dict[str, Reward] = {"exact": exact, "f1": overlap}
WANTED = (
    "name exact, f1, or a sequence-classification model with one output, a folder or hub id of safetensors"
)


class RewardModel:
    """The logit of a sequence-classification model with one output, read from safetensors; loaded when first used.

    The prompt and the answer are put into the reward model's chat template where it has one, else they are
    read as a pair of texts. A prompt of chat messages needs a template. Longer texts than the model's
    window are cut at their end.
    """

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Return a logit for every sample.

        Raises:
            UserError: the model cannot be read, has several outputs, or cannot read chats.
        """
        model, tokenizer = self._model()
        found: list[float] = []
        for start in range(0, len(samples), BATCH):
            inputs = self._encoded(tokenizer, samples[start : start + BATCH], _window(model, tokenizer))
            found += model(**inputs.to(model.device)).logits[:, 0].float().tolist()
        if not all(map(math.isfinite, found)):
            raise UserError(f"the reward model '{self.ref}' gives a reward that is not finite")
        return found

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            tokenizer = load_tokenizer(self.ref)
            model = _load(self.ref)
            model.config.pad_token_id = tokenizer.pad_token_id
            device = torch.accelerator.current_accelerator()
            self._loaded = (model if device is None else model.to(device)).eval(), tokenizer
        return self._loaded

    def _encoded(self, tokenizer: Any, samples: Sequence[Sample], window: int) -> Any:
        cut = {"padding": True, "truncation": True, "max_length": window, "return_tensors": "pt"}
        if tokenizer.chat_template:
            talks = [[*_messages(one.prompt), {"role": "assistant", "content": one.text}] for one in samples]
            texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
            return tokenizer(texts, add_special_tokens=False, **cut)
        if not all(isinstance(one.prompt, str) for one in samples):
            raise UserError(
                f"the reward model '{self.ref}' has no chat template and the prompts are chats; use data.prompt: plain"
            )
        return tokenizer([one.prompt for one in samples], [one.text for one in samples], **cut)


def reward(name: str) -> Reward:
    """Return the reward ``exact``, ``f1``, or that of a model reference."""
    return OWN.get(name) or RewardModel(name)


def check_reward(name: str) -> None:
    """Refuse a reward that is neither ours nor a sequence-classification model with one output.

    Raises:
        UserError: what is wrong with it.
    """
    if name not in OWN:
        _config(name)


def _messages(prompt: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _window(model: Any, tokenizer: Any) -> int:
    own = getattr(model.config, "max_position_embeddings", None)
    return min(tokenizer.model_max_length, own or tokenizer.model_max_length)


def _config(ref: str) -> Any:
    from transformers import AutoConfig

    path = resolve(ref).path
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"the reward '{ref}' cannot be read ({first_line(error)}); {WANTED}") from error
    if config.num_labels != 1:
        raise UserError(f"the reward model '{ref}' has {config.num_labels} outputs; {WANTED}")
    return config


def _load(ref: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = _config(ref)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            resolve(ref).path, config=config, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the reward model '{ref}' cannot be read ({first_line(error)}); {WANTED}") from error
    if report["missing_keys"]:
        raise UserError(f"the reward model '{ref}' has no trained '{min(report['missing_keys'])}'; {WANTED}")
    return model
