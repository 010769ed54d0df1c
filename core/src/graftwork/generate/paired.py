"""One decode loop for two streams: every token is chosen from the logits of a main and a contrast prompt.

The loop is what ``transformers.GenerationMixin.generate`` takes as ``custom_generate``: prompts, caches,
processors and stopping criteria are prepared there, and greedy search and sampling behave as there.
The combiner sees raw logits, before any processor; the processors see the tokens of the main stream.

Tested with transformers 5.19 to 5.23: the call that ``custom_generate`` gets, and the names of a forward
pass's arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from graftwork.errors import UserError
from graftwork.generate.passes import BeforeForward
from graftwork.generate.trace import Trace
from graftwork.hookspecs import Combiner, ForwardPass

Rows = Literal["joint", "split"]
# What generate may hand over besides; anything else would be dropped silently.
_KNOWN = {"use_cache", "position_ids", "logits_to_keep", "return_dict", "token_type_ids"}


class PairedLoop:
    """Decode B rows from B main and B contrast prompts with a :class:`graftwork.Combiner`.

    ``contrast_ids``, ``contrast_mask``: B x T', left-padded. ``rows``: both prompts of an item in one forward
    pass of 2B rows (``joint``), or a pass and a cache for each stream (``split``: less memory where the
    context is much longer than the question). A combiner with an amateur model is always split.

    An object serves one ``generate`` call. It is given as ``custom_generate``; the streamer is given here,
    because ``generate`` does not hand it on.
    """

    def __init__(
        self,
        combiner: Combiner,
        contrast_ids: torch.Tensor,
        contrast_mask: torch.Tensor,
        *,
        rows: Rows = "joint",
        before_forward: Sequence[BeforeForward] = (),
        streamer: Any = None,
        trace: Trace | None = None,
    ) -> None:
        self.combiner = combiner
        self.contrast_ids = contrast_ids
        self.contrast_mask = contrast_mask
        self.rows = rows
        self.before_forward = before_forward
        self.streamer = streamer
        self.trace = trace

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **given: Any,
    ) -> Any:
        """Return the token ids, main prompt included, B x (T + new); or transformers' output object."""
        # Not named in the signature: generate would take a named one for an argument of ours.
        attention_mask = given.pop("attention_mask", None)
        past_key_values = given.pop("past_key_values", None)
        unknown = sorted(key for key, value in given.items() if key not in _KNOWN and value is not None)
        if unknown:
            raise UserError(
                f"the paired decode loop does not pass '{unknown[0]}' on to the model; give text prompts only"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        streams = self._streams(model, input_ids, mask, past_key_values)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        collects = generation_config.return_dict_in_generate
        scores: tuple[torch.Tensor, ...] = ()
        logits: tuple[torch.Tensor, ...] = ()
        live = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        step = 0
        while _any(live, model):
            main, contrast = self._forward(streams, step)
            combined = self.combiner.fn(main, contrast)
            chosen_from = logits_processor(input_ids, combined)
            if collects and generation_config.output_scores:
                scores += (chosen_from,)
            if collects and generation_config.output_logits:
                logits += (main,)
            tokens = _choose(chosen_from, generation_config.do_sample)
            tokens = torch.where(live, tokens, generation_config.pad_token_id)
            if self.trace is not None:
                self.trace.add(self.combiner, main, contrast, chosen_from, tokens, live)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            live = live & ~stopping_criteria(input_ids, scores or None).to(live.device)
            for stream in streams:
                stream.append(tokens)
            step += 1
        if self.streamer is not None:
            self.streamer.end()
        if not collects:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids,  # type: ignore[arg-type]
            scores=scores or None,  # type: ignore[arg-type]
            logits=logits or None,  # type: ignore[arg-type]
            past_key_values=streams[0].cache,
        )

    def _streams(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> list[Stream]:
        contrast_ids = self.contrast_ids.to(ids.device)
        contrast_mask = self.contrast_mask.to(ids.device)
        if len(contrast_ids) != len(ids):
            raise UserError(f"{len(ids)} prompts but {len(contrast_ids)} contrast prompts; each needs one")
        amateur = self.combiner.amateur
        # A cache of fixed size is made for the main prompts.
        fits = type(cache) is DynamicCache or contrast_ids.shape[1] <= ids.shape[1]
        count = len(ids)
        if self.rows == "split" or amateur is not None or not fits:
            other = model if amateur is None else amateur
            return [
                Stream(model, ids, mask, cache, slice(0, count), slice(0, 0)),
                Stream(
                    other,
                    contrast_ids,
                    contrast_mask,
                    DynamicCache(config=other.config),
                    slice(0, 0),
                    slice(0, count),
                ),
            ]
        wide = max(ids.shape[1], contrast_ids.shape[1])
        return [
            Stream(
                model,
                torch.cat([_left(ids, wide), _left(contrast_ids, wide)]),
                torch.cat([_left(mask, wide), _left(contrast_mask, wide)]),
                cache,
                slice(0, count),
                slice(count, 2 * count),
            )
        ]

    def _forward(self, streams: list[Stream], step: int) -> tuple[torch.Tensor, torch.Tensor]:
        found: list[torch.Tensor] = []
        for stream in streams:
            coming = ForwardPass(step, step == 0, True, stream.main, stream.contrast)
            for callback in self.before_forward:
                callback(coming)
            found.append(stream.forward())
        both = torch.cat([logits.to(found[0].device) for logits in found]) if len(found) > 1 else found[0]
        count = len(both) // 2
        return both[:count], both[count:]


class Stream:
    """Rows that go through the model together, with their cache and positions."""

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: Any,
        main: slice,
        contrast: slice,
    ) -> None:
        self.model = model
        self.coming = ids
        self.mask = mask
        self.cache = cache
        self.main = main
        self.contrast = contrast
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0)
        takes = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def forward(self) -> torch.Tensor:
        """Return the logits after the last token of every row, float32, rows x V."""
        positions = {"position_ids": self.positions} if self.takes_positions else {}
        output = self.model(
            input_ids=self.coming,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **positions,
            **self.keep,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1].to(copy=True, dtype=torch.float32)

    def append(self, tokens: torch.Tensor) -> None:
        """Let every row go on with its token (B); where both streams are here, both get it."""
        rows = len(self.coming) // len(tokens)
        self.coming = tokens.to(self.coming.device).repeat(rows)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        self.positions = self.positions[:, -1:] + 1


def _choose(scores: torch.Tensor, sample: bool) -> torch.Tensor:
    if not sample:
        return scores.argmax(dim=-1)
    # The same call as in transformers, so that a seed gives the same tokens.
    return torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)


def _left(rows: torch.Tensor, wide: int) -> torch.Tensor:
    """Pad on the left with zeros, which the mask takes out."""
    return torch.nn.functional.pad(rows, (wide - rows.shape[1], 0))


def _any(live: torch.Tensor, model: Any) -> bool:
    """Return whether a row goes on, in any process where weights are sharded and passes are joint ones."""
    going = live.any()
    if torch.distributed.is_available() and torch.distributed.is_initialized() and _sharded(model):
        flag = going.to(torch.int32)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        going = flag > 0
    return bool(going)


def _sharded(model: Any) -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
