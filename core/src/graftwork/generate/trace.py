"""What stood behind every chosen token: both streams' probabilities, the sets tokens fell into, the branch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from graftwork.hookspecs import Combiner


@dataclass(frozen=True)
class Candidate:
    """A token that was in the running: its probability in each stream (0 to 1), its score, its sets."""

    token: int
    main: float
    contrast: float
    score: float
    sets: tuple[str, ...]


@dataclass(frozen=True)
class TracedStep:
    """A chosen token and the candidates it was chosen from, best score first."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]


@dataclass
class Trace:
    """Collect, for every row, the steps of one paired decode. ``top``: tokens kept of either stream a step."""

    top: int = 5
    rows: list[list[TracedStep]] = field(default_factory=list)

    def add(
        self,
        combiner: Combiner,
        main: torch.Tensor,
        contrast: torch.Tensor,
        scores: torch.Tensor,
        tokens: torch.Tensor,
        live: torch.Tensor,
    ) -> None:
        """Note one step. ``main``, ``contrast``, ``scores``: B x V; ``tokens``, ``live``: B."""
        if not self.rows:
            self.rows = [[] for _ in range(len(tokens))]
        sets = combiner.explain(main, contrast) if combiner.explain is not None else {}
        p_main, p_contrast = main.softmax(-1), contrast.softmax(-1)
        count = min(self.top, main.shape[-1])
        for row in torch.nonzero(live).flatten().tolist():
            chosen = int(tokens[row])
            shown = {
                chosen,
                *_top(p_main[row], count),
                *_top(p_contrast[row], count),
                *_top(scores[row], count),
            }

            def candidate(token: int, row: int = row) -> Candidate:
                return Candidate(
                    token,
                    float(p_main[row, token]),
                    float(p_contrast[row, token]),
                    float(scores[row, token]),
                    tuple(name for name, members in sets.items() if bool(members[row, token])),
                )

            ordered = sorted((candidate(token) for token in shown), key=lambda one: (-one.score, one.token))
            self.rows[row].append(TracedStep(candidate(chosen), tuple(ordered)))


def _top(values: torch.Tensor, count: int) -> list[int]:
    return values.topk(count).indices.tolist()


def as_json(trace: Trace, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """Return the trace with the tokens' texts, row by row."""

    def shown(one: Candidate) -> dict[str, Any]:
        return {
            "token": tokenizer.decode([one.token]),
            "id": one.token,
            "main": one.main,
            "contrast": one.contrast,
            "score": one.score,
            "sets": list(one.sets),
        }

    return [
        [
            {"chosen": shown(step.chosen), "candidates": [shown(one) for one in step.candidates]}
            for step in row
        ]
        for row in trace.rows
    ]
