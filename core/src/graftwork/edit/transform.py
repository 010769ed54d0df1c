"""Edits as a weight transform: found on the whole model, written layer by layer, kept beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graftwork.edit.draft import MAX_SHARE, checked, gain_note
from graftwork.edit.editor import Editor
from graftwork.edit.edits import HEADER, LABEL, LEFT, RIGHT, EditSet
from graftwork.edit.encoding import check_lengths, encode_request
from graftwork.edit.requests import Request, check_requests
from graftwork.edit.scoring import score
from graftwork.edit.sites import oriented, tensor_digest
from graftwork.edit.statistics import IdentityStatistics, Provider, Statistics
from graftwork.errors import UserError
from graftwork.hookspecs import WeightTransform

if TYPE_CHECKING:
    from graftwork.transform.block import Block
    from graftwork.transform.whole import Whole

FIGURES = {
    "edit_share": "||dW|| / ||W||, mean over the edited weights",
    "edit_lost": "share of changed entries that the model's dtype rounds away",
    "edit_rank": "columns of the change",
}
_ABOUT = "about"


def edit_transform(
    editor: Editor,
    requests: Sequence[Request],
    *,
    identity: bool = False,
    tokens: int | None = None,
    max_target_tokens: int = 64,
    max_share: float = MAX_SHARE,
) -> WeightTransform:
    """Return the transform that edits a model with ``requests``.

    The corpus of the second moments is the calibration text. Weights get their change in float64 and are rounded once.

    Args:
        editor: the method.
        requests: checked at once.
        identity: whether C = I takes the place of the corpus.
        tokens: of the corpus; all calibration windows where None.
        max_target_tokens: longest target.
        max_share: largest ||dW|| / ||W||.

    Raises:
        RequestError: see :func:`graftwork.edit.requests.check_requests`.
    """
    check_requests(requests)

    def prepare(whole: Whole) -> Mapping[str, torch.Tensor]:
        check_lengths(whole.tokenizer, requests, max_target_tokens)
        statistics: Provider = IdentityStatistics()
        if editor.uses_statistics and not identity:
            statistics = Statistics(
                whole.model, whole.tokenizer, whole.windows, tokens=tokens, console=whole.console
            )
        edits = editor.edit(
            whole.model, whole.tokenizer, requests, statistics, console=whole.console, seed=whole.seed
        )
        notes = [_outcome(whole, requests, edits), gain_note(edits)]
        told = {**edits.metadata(), "notes": [note for note in notes if note]}
        raw = json.dumps(told, ensure_ascii=False).encode()
        return {**edits.tensors(), _ABOUT: torch.frombuffer(bytearray(raw), dtype=torch.uint8)}

    def block(block: Block) -> None:
        about, edits = _prepared(block.prepared, editor.name)
        if block.index == 0:
            block.notes += about["notes"]
        stored: dict[str, torch.Tensor] = {}
        for name, change in edits.changes.items():
            if not name.startswith(f"{block.name}."):
                continue
            inner = name.removeprefix(f"{block.name}.")
            matrix = oriented(block.get(inner))
            if tensor_digest(matrix) != edits.parts[0].base[name]:
                raise UserError(
                    f"'{editor.name}' edits '{name}' as it is in the model, and another plugin of this run changed it "
                    f"before; name '{editor.name}' first, or edit the result of the other in a run of its own"
                )
            new, figures = checked(name, matrix, change, max_share)
            with torch.no_grad():
                matrix.copy_(new)
            block.record(
                inner,
                edit_share=figures["share"],
                edit_lost=figures["lost"],
                edit_rank=float(figures["rank"]),
            )
            stored[f"{name}.{LEFT}"], stored[f"{name}.{RIGHT}"] = change.left, change.right
        if stored:
            block.beside(LABEL, stored, {HEADER: about[HEADER]})

    return WeightTransform(editor.name, block, needs="none", stored=True, prepare=prepare, figures=FIGURES)


def _prepared(prepared: Mapping[str, torch.Tensor], name: str) -> tuple[dict[str, Any], EditSet]:
    tensors = dict(prepared)
    about = json.loads(bytes(tensors.pop(_ABOUT).numpy().tobytes()))
    return about, EditSet.of_tensors(tensors, about, f"what '{name}' prepared")


def _outcome(whole: Whole, requests: Sequence[Request], edits: EditSet) -> str:
    """Return in a sentence how many targets the model gives before and after."""
    rows = [encode_request(whole.tokenizer, one) for one in requests]
    before = sum(one.strict for one in score(whole.model, whole.tokenizer, rows))
    with edits.apply(whole.model):
        scored = score(whole.model, whole.tokenizer, rows)
    after = sum(one.strict for one in scored)
    bad = sum(not bool(torch.isfinite(one.log_probs).all()) for one in scored)
    if bad:
        raise UserError(
            f"after the edit the model gives no numbers for {bad} of {len(rows)} requests; nothing was written"
        )
    return (
        f"of {len(rows)} targets, all tokens were the likeliest for {before:.0f} before the edit and are for "
        f"{after:.0f} after; {len(edits.changes)} weights were edited"
    )
