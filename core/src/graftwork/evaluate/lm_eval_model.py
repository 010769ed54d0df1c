"""A model with plugins in use, as EleutherAI's lm-eval-harness takes models.

Tested with lm-eval 0.4.13: ``TemplateLM``, ``Instance`` and the windows of rolling likelihoods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from transformers import StoppingCriteria

from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.evaluate.answers import GREEDY
from graftwork.evaluate.continuations import Likelihood, continuation_likelihoods
from graftwork.generate.decoding import Decoding, Encoded, decode_tokens
from graftwork.models import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 2048
"""Tokens of a window where the model has no limit, as in lm-eval."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest answer; the first that is there counts."""


class PluginLM(TemplateLM):
    """Answers requests of lm-eval through :class:`graftwork.generate.Decoding`.

    A prompt that does not fit the window loses its beginning, as in lm-eval; ``cut`` counts them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer: Any = tokenizer
        self.decoding = decoding
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.console = console or Console(enabled=False)
        self.cut = 0
        self._device = model.device
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = window or UNLIMITED

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text that has no prompt."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        if add_special_tokens is None and self._begun(string):
            # A chat template has written the beginning already.
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **special)["input_ids"]

    def _begun(self, string: str) -> bool:
        begin = self.tokenizer.decode([self.prefix_token_id])
        return bool(begin) and string.startswith(begin)

    # ------------------------------------------------------------------ likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[Likelihood]:
        pairs = [self._fitting(prompt, answer) for _, prompt, answer in requests]
        with self.console.bar(len(pairs), "likelihoods", "request") as bar:
            return continuation_likelihoods(
                self.model,
                self.tokenizer,
                pairs,
                decoding=self.decoding,
                batch_size=self.batch_size,
                progress=bar.update,
            )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [make_disjoint_window(window) for window in found]
            windows += [(None, *part) for part in parts]
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _fitting(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        # The last token is not read.
        room = self.max_length + 1 - len(answer)
        if room < 1:
            raise UserError(
                f"lm-eval asks for a continuation of {len(answer)} tokens, which the model's window of "
                f"{self.max_length} does not hold; leave the task out"
            )
        self.cut += len(prompt) > room
        return prompt[-room:], answer

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        jobs = [(self.tok_encode(text), dict(options)) for text, options in (one.args for one in requests)]
        answers = [""] * len(jobs)
        groups: dict[str, list[int]] = {}
        for index, (_, options) in enumerate(jobs):
            groups.setdefault(repr(sorted(options.items())), []).append(index)
        with self.console.bar(len(jobs), "answers", "request") as bar:
            for members in groups.values():
                members.sort(key=lambda index: -len(jobs[index][0]))
                for start in range(0, len(members), self.batch_size):
                    chosen = members[start : start + self.batch_size]
                    texts = self._write([jobs[index][0] for index in chosen], jobs[chosen[0]][1])
                    for index, text in zip(chosen, texts, strict=True):
                        answers[index] = text
                    bar.update(len(chosen))
        return answers

    def _write(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Return the answers of one batch, each up to the first of the strings that end it."""
        lengths = [options.pop(name, None) for name in LENGTHS]
        new = int(next((length for length in lengths if length is not None), self.max_new_tokens))
        until = options.pop("until", None) or []
        until = [text for text in ([until] if isinstance(until, str) else until) if text]
        apart = is_encoder_decoder(self.model.config)
        room = self.max_length if apart else self.max_length - new
        if room < 1:
            raise UserError(
                f"an lm-eval task asks for {new} new tokens, which the model's window of {self.max_length} does "
                f"not hold; set benchmark.max_new_tokens where the task says nothing, or leave it out"
            )
        self.cut += sum(len(prompt) > room for prompt in prompts)
        encoded = [Encoded(prompt[-room:]) for prompt in prompts]
        begin = 1 if apart else max(len(one.main) for one in encoded)
        found = decode_tokens(
            self.model,
            encoded,
            tokenizer=self.tokenizer,
            decoding=self.decoding,
            stopping_criteria=[_Until(self.tokenizer, begin, until)] if until else [],
            **{**_sampling(options), "max_new_tokens": new, "use_cache": True},
        )
        answers = []
        for tokens in found:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for end in until:
                text = text.split(end)[0]
            answers.append(text)
        return answers


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of transformers' ``generate``; a task that names a temperature alone wants samples."""
    temperature = float(options.get("temperature") or 0)
    if options.get("do_sample") is None:
        options["do_sample"] = temperature > 0
    if not options["do_sample"] or temperature == 0:
        options.pop("temperature", None)
    return {**({} if options["do_sample"] else GREEDY), **options}


class _Until(StoppingCriteria):
    """Stop a row whose answer holds one of ``ends``; answers begin at token ``begin``."""

    def __init__(self, tokenizer: Any, begin: int, ends: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.begin = begin
        self.ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.begin :], skip_special_tokens=True)
        stopped = [any(end in text for end in self.ends) for text in texts]
        return torch.tensor(stopped, device=input_ids.device)
