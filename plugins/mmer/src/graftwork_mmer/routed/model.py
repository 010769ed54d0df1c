"""A causal language model whose tokens take routes."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from graftwork import UserError

from graftwork_mmer.routed.deltas import Deltas
from graftwork_mmer.routed.layer import Shared, patch
from graftwork_mmer.routed.plan import TEXT, TextRoute, check_routes, expert_index, make_plan

Present = Sequence[Collection[str]]


class RoutedModel:
    """A base model that answers with the weights of its experts, each token with those of its route.

    Attention mixes tokens behind the routed projections, so caches need no change. Positions behind a prompt's
    route ids are text: what is generated has one set of weights.

    Args:
        model: the base as it is stored, any causal language model of transformers. It is changed in place and frozen.
        deltas: from stored masks (:class:`MaskedDeltas`) or whole experts (:class:`KeptDeltas`).
        text_route: how text tokens follow the experts that are present in their row; ``union``: an entry is added
            where any of them has a bit.
        materialize: keep the dense weights of every route that was used: no slower than the base, but a copy each.
        base_sha256: of the model's files, where known; deltas for another base are refused.

    Raises:
        UserError: the deltas are for another base or another model.
    """

    def __init__(
        self,
        model: Any,
        deltas: Deltas,
        *,
        text_route: TextRoute = "union",
        materialize: bool = False,
        base_sha256: str | None = None,
    ) -> None:
        if base_sha256 is not None and base_sha256 != deltas.base_sha256:
            raise UserError(
                f"the deltas are for another base (its files' SHA-256 begins with {deltas.base_sha256[:12]}, here it "
                f"is {base_sha256[:12]})"
            )
        self.model, self.experts = model.eval(), deltas.experts
        self.text_route: TextRoute = text_route
        model.requires_grad_(False)
        deltas.to(model.device)
        self._shared = Shared(deltas, materialize=materialize)
        patch(model, self._shared)
        self._prompt: torch.Tensor | None = None
        self._present: list[set[int]] | None = None
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    # ------------------------------------------------------------ use

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        route_ids: torch.Tensor | None = None,
        present: Present | None = None,
        **inputs: Any,
    ) -> Any:
        """Return the model's outputs.

        Args:
            input_ids: B x T; or ``inputs_embeds`` among ``inputs``, B x T x h.
            route_ids: B x T of these tokens: 0 for text, ``i + 1`` for expert i; all text where not given.
            present: of each row, the experts that text follows; where not given, those that its tokens are routed to.

        Raises:
            ValueError: route ids of another shape than the tokens, or that are no route.
            UserError: a name that is no expert's.
        """
        self._check(route_ids, input_ids, inputs)
        past = inputs.get("past_key_values")
        before = 0 if past is None else past.get_seq_length()
        if route_ids is not None and before:
            # Earlier tokens are in the cache; their routes do not matter any more.
            route_ids = torch.nn.functional.pad(route_ids, (before, 0), value=TEXT)
        with self.routes(route_ids, present):
            return self.model(input_ids, **inputs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        route_ids: torch.Tensor | None = None,
        present: Present | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Generate as transformers does; ``route_ids`` are of the prompt. Raises: see :meth:`__call__`."""
        self._check(route_ids, input_ids, options)
        with self.routes(route_ids, present):
            return self.model.generate(input_ids, **options)

    @contextlib.contextmanager
    def routes(self, route_ids: torch.Tensor | None, present: Present | None = None) -> Iterator[Any]:
        """Yield the model, which computes positions from 0 on by these routes, and as text behind them."""
        saved = self._prompt, self._present
        self._prompt = route_ids
        if present is not None:
            self._present = [{expert_index(name, self.experts) for name in row} for row in present]
        elif route_ids is not None:
            self._present = [
                {route - 1 for route in row.unique().tolist() if route != TEXT} for row in route_ids
            ]
        else:
            self._present = None
        try:
            yield self.model
        finally:
            self._prompt, self._present = saved
            self._shared.plan = None

    def embed(self, input_ids: torch.Tensor, present: Present) -> torch.Tensor:
        """Return the embeddings of text tokens (B x T x h) in rows where some experts are present."""
        with self.routes(None, present), torch.no_grad():
            self._shared.plan = self._planned(input_ids.shape[0], input_ids.shape[1], 0, input_ids.device)
            return self.model.get_input_embeddings()(input_ids)

    # ------------------------------------------------------------ before every forward pass

    def _check(
        self, routes: torch.Tensor | None, tokens: torch.Tensor | None, inputs: Mapping[str, Any]
    ) -> None:
        """Refuse routes that are not one per token; raises: see :meth:`__call__`."""
        if routes is None:
            return
        given = tokens if tokens is not None else inputs.get("inputs_embeds")
        if given is None:
            raise ValueError("give input_ids or inputs_embeds")
        check_routes(routes, (given.shape[0], given.shape[1]), self.experts)

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None and args:
            tokens = args[0]
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        past = kwargs.get("past_key_values")
        before = 0 if past is None else int(past.get_seq_length())
        self._shared.plan = self._planned(tokens.shape[0], tokens.shape[1], before, tokens.device)

    def _planned(self, rows: int, count: int, before: int, device: torch.device) -> Any:
        routes = torch.zeros(rows, count, dtype=torch.long, device=device)
        prompt = self._prompt
        if prompt is not None:
            # Beams are copies of a row.
            copies = rows // len(prompt)
            known = prompt[:, before : before + count].to(device)
            routes[:, : known.shape[1]] = known.repeat_interleave(copies, 0)
        present = self._present if self._present is not None else [set()] * rows
        if rows % max(1, len(present)):
            raise ValueError(f"'present' is about {len(present)} rows, and there are {rows}")
        copies = rows // max(1, len(present))
        each = [some for some in present for _ in range(copies)]
        return make_plan(routes, each, self.text_route)
