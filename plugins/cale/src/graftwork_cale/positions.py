"""Which positions of a forward pass are enhanced.

``predicting`` means the last position of the prompt and every position after it. What a pass holds is told by
the decode loop (:meth:`Positions.tell`), or is taken from the cache: a pass on an empty cache, or on one not seen
before, is a prompt; what follows on the same cache is generated.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from graftwork import ForwardPass, UserError

Where = Literal["predicting", "all"]
Streams = Literal["main", "both"]
Continued = Literal["refuse", "answer"]


class Positions:
    """State over the passes of one generation.

    ``streams``: rows that read the main prompt only, or also those of the contrast prompt. ``continued``: what
    several tokens on top of a cache are where nobody tells: an ``answer`` (assisted decoding, scoring), or
    unknown and refused (they may be a prompt in chunks or another turn of a chat).
    """

    def __init__(self, where: Where, streams: Streams, continued: Continued) -> None:
        self.where = where
        self.streams = streams
        self.continued = continued
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._told: ForwardPass | None = None
        self._cache: Any = None
        self._prompt: torch.Tensor | None = None
        self._begin = 0

    def tell(self, coming: ForwardPass) -> None:
        """Take what the decode loop says about the next pass."""
        self._told = coming

    def mask(self, tokens: torch.Tensor, attention_mask: Any, cache: Any) -> torch.Tensor:
        """Return which positions of the coming pass are enhanced, bool B x T.

        ``tokens``: ids B x T or embeddings B x T x d. ``attention_mask``: as transformers' decoders take it
        (2-D over past and present, 4-D, or a dictionary of 4-D ones); what it masks is padding.

        Raises:
            UserError: a prompt padded on the right; several tokens of unknown kind on top of a cache.
        """
        rows, width = tokens.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        real = _real(attention_mask, past, width)
        chosen = torch.zeros(rows, width, dtype=torch.bool, device=tokens.device)
        told, self._told = self._told, None
        begin = self._begin_told(told, width) if told else self._begin_seen(tokens, cache, past, real)
        main = told.main_rows if told and self.streams == "main" else slice(None)
        chosen[main, 0 if self.where == "all" else begin :] = True
        return chosen if real is None else chosen & real.to(chosen.device)

    def made(self, cache: Any) -> None:
        """Take the cache that a pass without one has made, if it has."""
        if cache is not None and self._cache is None:
            self._cache = weakref.ref(cache)

    def _begin_told(self, told: ForwardPass, width: int) -> int:
        # The tokens generated so far and the prompt's last one, as many of them as this pass holds.
        return max(width - told.step - 1, 0) if told.predicts else width

    def _begin_seen(self, tokens: torch.Tensor, cache: Any, past: int, real: torch.Tensor | None) -> int:
        if self.where == "all":
            return 0
        width = tokens.shape[1]
        known = self._cache() if self._cache is not None else None
        if cache is not None and past and known is cache:
            if width > 1 and self.continued == "refuse":
                raise UserError(
                    f"CaLE cannot tell whether {width} tokens on top of {past} cached ones are prompt or answer; "
                    f"wrap generate in graftwork.generate.watching(model, [enhancement.before_forward], "
                    f"prompt_tokens), or use positions: all"
                )
            return max(self._begin - past, 0)
        if cache is None and self._goes_on(tokens):
            return self._begin
        if real is not None and not bool(real[:, -1].all()):
            raise UserError("CaLE enhances the last position of a prompt; pad prompts on the left")
        self._begin = past + width - 1
        self._cache = None if cache is None else weakref.ref(cache)
        self._prompt = tokens.detach().clone() if cache is None else None
        return width - 1

    def _goes_on(self, tokens: torch.Tensor) -> bool:
        """Return whether a pass without a cache reads the last prompt again, and more."""
        prompt = self._prompt
        if prompt is None or len(tokens) != len(prompt) or tokens.shape[1] <= prompt.shape[1]:
            return False
        return torch.equal(tokens[:, : prompt.shape[1]], prompt)


def _real(attention_mask: Any, past: int, width: int) -> torch.Tensor | None:
    """Return which positions of the pass are no padding, B x T; None where all are."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if not isinstance(attention_mask, torch.Tensor):
        return None
    if attention_mask.ndim == 2:
        begin = past if attention_mask.shape[1] >= past + width else attention_mask.shape[1] - width
        return attention_mask[:, begin : begin + width].bool()
    # A position that is no padding looks at itself.
    own = attention_mask[:, 0, :, past : past + width].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0
