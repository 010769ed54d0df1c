"""Everything that plugins bring to generation, and one function that decodes a batch with it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from graftwork.errors import UserError
from graftwork.evaluate.encoding import encode_prompt, pad_token
from graftwork.evaluate.modes import evaluating
from graftwork.generate.paired import PairedLoop, Rows
from graftwork.generate.passes import BeforeForward, inner_model, watching
from graftwork.generate.prompts import Prompt
from graftwork.generate.stopping import FirstLine, until_end
from graftwork.generate.trace import Trace
from graftwork.hookspecs import Combiner, ForwardPass
from graftwork.models import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedTokenizerBase

    from graftwork.run import Run

# Options of generate under which several candidates or several tokens share a step.
_ONE_BY_ONE = {
    "num_beams": (1, "beam search keeps several texts a row"),
    "num_return_sequences": (1, "several texts a prompt are not decoded together"),
    "assistant_model": (None, "assisted decoding takes several tokens a step"),
    "prompt_lookup_num_tokens": (None, "assisted decoding takes several tokens a step"),
    "assistant_early_exit": (None, "assisted decoding takes several tokens a step"),
    "guidance_scale": (None, "guidance is a combiner of its own"),
    "penalty_alpha": (None, "contrastive search is a loop of its own"),
    "dola_layers": (None, "contrasting layers is a loop of its own"),
    "prefill_chunk_size": (None, "prompts are read in one pass"),
    "token_healing": (False, "both prompts are read as they are"),
}


@dataclass(frozen=True)
class Decoding:
    """What takes part in decoding: a combiner, processors, callbacks, and contexts entered around a call.

    The neutral object is plain ``generate``.
    """

    combiner: Combiner | None = None
    processors: Sequence[LogitsProcessor] = ()
    before_forward: Sequence[BeforeForward] = ()
    contexts: Callable[[], Iterable[AbstractContextManager[Any]]] = tuple

    @property
    def plain(self) -> bool:
        """Whether nothing takes part: the model alone."""
        parts = self.combiner, *self.processors, *self.before_forward
        return parts == (None,) and self.contexts is tuple

    @classmethod
    def from_plugins(cls, run: Run, model: Any) -> Decoding:
        """Ask the plugins of ``run`` what they bring.

        Raises:
            UserError: two plugins bring a combiner.
        """
        plugins = run.plugins
        found = plugins.call_one("combiner", run=run, model=model)

        def callback(name: str) -> BeforeForward:
            def before(coming: ForwardPass) -> None:
                plugins.call_on(name, "before_forward", run=run, coming=coming)

            return before

        return cls(
            combiner=found[1] if found else None,
            processors=tuple(
                item for _, many in plugins.call("logits_processors", run=run, model=model) for item in many
            ),
            before_forward=tuple(callback(name) for name in plugins.implements("before_forward")),
            contexts=(
                (lambda: [one for _, one in plugins.call("generation_context", run=run, model=model)])
                if plugins.implements("generation_context")
                else tuple
            ),
        )


def check_pairing(model: Any, options: Mapping[str, Any]) -> None:
    """Refuse what two streams cannot be decoded with; ``options`` are those of ``generate``.

    Raises:
        UserError: an encoder-decoder, beams, assisted decoding, guidance, no cache, a prompt-tuning adapter.
    """
    if is_encoder_decoder(model.config):
        raise UserError(
            f"a combiner of two prompts needs a decoder-only model; {model.config.model_type} has an encoder"
        )
    for name, (neutral, reason) in _ONE_BY_ONE.items():
        value = options.get(name)
        if value is not None and value != neutral:
            raise UserError(
                f"{name}={value} cannot be used with a combiner of two prompts: {reason}; leave it out"
            )
    if options.get("use_cache") is False:
        raise UserError("use_cache=false cannot be used with a combiner of two prompts; leave it out")
    configs = getattr(model, "peft_config", {})
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        raise UserError("a combiner of two prompts cannot be used with an adapter that learns virtual tokens")


@dataclass(frozen=True)
class Encoded:
    """A prompt as tokens; ``contrast`` is what the second stream reads, None where there is none."""

    main: list[int]
    contrast: list[int] | None = None


def encode(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding | None = None,
    max_prompt_tokens: int | None = None,
    names: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Encoded]:
    """Return the tokens of prompts, checked for what ``decoding`` and ``options`` (of ``generate``) need.

    ``names`` say where each prompt comes from. See :func:`decode` for the rest.

    Raises:
        UserError: see :func:`decode`; the name of the prompt is in the message.
    """
    decoding, options = decoding or Decoding(), options or {}
    names = names or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    paired = False
    if decoding.combiner is not None:
        check_pairing(model, options)
        paired = decoding.combiner.amateur is None
        if decoding.combiner.amateur is not None:
            _check_vocabularies(model, decoding.combiner.amateur)
        else:
            _check_contrasts(decoding.combiner, prompts, names)
    found = []
    for prompt, name in zip(prompts, names, strict=True):
        parts = [prompt.main, prompt.contrast] if paired else [prompt.main]
        try:
            tokens = [_tokens(tokenizer, part, max_prompt_tokens) for part in parts]
        except UserError as error:
            raise UserError(f"{name}: {error}") from error.__cause__
        for ids in tokens:
            _check_window(model, ids, options, name)
        found.append(Encoded(*tokens))
    return found


def decode(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding | None = None,
    rows: Rows = "joint",
    stopping_criteria: Sequence[Any] = (),
    first_line: bool = False,
    streamer: Any = None,
    trace: Trace | None = None,
    max_prompt_tokens: int | None = None,
    **options: Any,
) -> list[list[int]]:
    """Return the new tokens of every prompt of one batch, without padding and end tokens' padding.

    ``options`` are those of transformers' ``generate``. Prompts are padded on the left (an encoder's on the
    right).
    ``first_line`` ends an answer at its first line break after some text.
    ``max_prompt_tokens`` keeps the last so many tokens of each prompt; without it a prompt that does not fit
    is refused. ``streamer`` serves a single prompt.

    Raises:
        UserError: see :func:`check_pairing`; a prompt that is empty, without its contrast where a combiner
            needs one, or too long for the model's window.
    """
    encoded = encode(
        model,
        prompts,
        tokenizer=tokenizer,
        decoding=decoding,
        max_prompt_tokens=max_prompt_tokens,
        options=options,
    )
    return decode_tokens(
        model,
        encoded,
        tokenizer=tokenizer,
        decoding=decoding,
        rows=rows,
        stopping_criteria=stopping_criteria,
        first_line=first_line,
        streamer=streamer,
        trace=trace,
        **options,
    )


def decode_tokens(
    model: Any,
    encoded: Sequence[Encoded],
    *,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding | None = None,
    rows: Rows = "joint",
    stopping_criteria: Sequence[Any] = (),
    first_line: bool = False,
    streamer: Any = None,
    trace: Trace | None = None,
    **options: Any,
) -> list[list[int]]:
    """Decode what :func:`encode` returned for one batch; see :func:`decode`."""
    decoding = decoding or Decoding()
    pad = pad_token(tokenizer)
    apart = is_encoder_decoder(model.config)
    ids, mask = _batch([one.main for one in encoded], pad, left=not apart)
    given: dict[str, Any] = {"pad_token_id": pad, **options}
    end = getattr(model.generation_config, "eos_token_id", None)
    given.setdefault("eos_token_id", tokenizer.eos_token_id if end is None else end)
    if given.get("token_healing"):
        given["tokenizer"] = tokenizer
    begin = 1 if apart else ids.shape[1]
    criteria = [*stopping_criteria, *([FirstLine(tokenizer, begin)] if first_line else [])]
    if stop_strings := given.pop("stop_strings", None):
        # Made here, since a loop of our own would not be given the tokenizer they need.
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    if criteria:
        given["stopping_criteria"] = StoppingCriteriaList(criteria)
    if decoding.processors:
        given["logits_processor"] = LogitsProcessorList(decoding.processors)
    watched: AbstractContextManager[Any]
    if decoding.combiner is None:
        watched = watching(model, decoding.before_forward, begin)
        given["streamer"] = streamer
    else:
        check_pairing(model, given)
        amateur = decoding.combiner.amateur is not None
        contrast_ids, contrast_mask = _batch(
            [one.main if amateur else one.contrast or [] for one in encoded], pad
        )
        watched = contextlib.nullcontext()
        given["custom_generate"] = PairedLoop(
            decoding.combiner,
            contrast_ids,
            contrast_mask,
            rows=rows,
            before_forward=decoding.before_forward,
            streamer=streamer,
            trace=trace,
        )
    with evaluating(model), contextlib.ExitStack() as stack:
        for context in decoding.contexts():
            stack.enter_context(context)
        stack.enter_context(watched)
        output = model.generate(
            input_ids=ids.to(inner_model(model).device),
            attention_mask=mask.to(inner_model(model).device),
            **given,
        )
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    ends = given.get("eos_token_id")
    stops = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return [until_end(row, stops) for row in sequences[:, begin:].tolist()]


def _check_contrasts(combiner: Combiner, prompts: Sequence[Prompt], names: Sequence[str]) -> None:
    for prompt, name in zip(prompts, names, strict=True):
        if prompt.contrast is None:
            raise UserError(
                f"{name} has no context: '{combiner.name}' contrasts a prompt with the same question without "
                f"its context; give 'context' and 'question', or a 'contrast_prompt'"
            )
        if prompt.contrast == prompt.main:
            warnings.warn(
                f"the two prompts of {name} are the same: the contrast of '{combiner.name}' is zero",
                stacklevel=2,
            )


def _check_vocabularies(model: Any, amateur: Any) -> None:
    ours, theirs = (one.config.get_text_config().vocab_size for one in (model, amateur))
    if ours != theirs:
        raise UserError(
            f"the amateur model '{amateur.config._name_or_path}' has {theirs} tokens and "
            f"'{model.config._name_or_path}' has {ours}; both need the same vocabulary"
        )


def _tokens(tokenizer: Any, prompt: Any, limit: int | None) -> list[int]:
    ids = encode_prompt(tokenizer, prompt)
    return ids if limit is None else ids[-limit:]


def _check_window(model: Any, ids: list[int], options: Mapping[str, Any], name: str) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    new = options.get("max_new_tokens") or 0
    if window and not is_encoder_decoder(model.config) and len(ids) + new > window:
        raise UserError(
            f"{name} has {len(ids)} tokens, which with {new} new ones do not fit the model's window "
            f"of {window}; shorten it, or set max_prompt_tokens to keep only its end"
        )


def _batch(encoded: list[list[int]], pad: int, *, left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    wide = max(len(ids) for ids in encoded)
    ids = torch.full((len(encoded), wide), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        place = slice(wide - len(tokens), wide) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids, mask
