"""The benchmark ``dem:localization``: is common sense less localized than facts?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from graftwork import Benchmark, HeatMap, LineChart, Measurement, UserError
from graftwork.edit.encoding import encode_request
from graftwork.edit.layouts import read_requests
from graftwork.edit.requests import Request
from graftwork.edit.scoring import score
from graftwork.edit.sites import KINDS, Site, find_sites
from graftwork.evaluate.benchmarks import Evaluation
from graftwork.evaluate.modes import evaluating
from pydantic import Field, model_validator

from graftwork_dem.dispersion import Dispersion, dispersion, rank_correlation
from graftwork_dem.events import commonsense
from graftwork_dem.facts import facts
from graftwork_dem.locate import Located, locate
from graftwork_dem.options import LocateOptions
from graftwork_dem.passes import noise_scale
from graftwork_dem.trace import SMALLEST

KNOWN = 0.3
"""A fact counts as known from this mean probability of its tokens on, or where all of them are the likeliest."""
SETS = ("commonsense", "facts")
MAPS = {
    "scores": "decoupled: mean over the request and its variants",
    "own": "the request's own line, before decoupling",
}
WORDS = {
    "entropy": "entropy of the map of scores over all sites, 0: one site, 1: even",
    "attention": "share of attention sites in the map",
    "top5": "share of the five highest sites",
    "spread": "evenly weighted sites of the same entropy",
}
_FIELDS = {"entropy": "entropy", "attention": "attention", "top5": "top", "spread": "spread"}


class LocalizationOptions(LocateOptions):
    """Options of dem:localization beside those of the search itself."""

    mode: Literal["trace", "attribution", "recall"] = Field(  # type: ignore[assignment]
        "trace", description="how sites are scored"
    )
    commonsense: str | None = Field(
        None, description="requests of common sense, see dem's requests; 200 edits of ours if not set"
    )
    facts: str | None = Field(None, description="factual requests; 110 of ours if not set")
    items: int = Field(50, ge=1, description="requests of each set that count, the first ones that do")
    least: float = Field(
        SMALLEST, ge=0, description="log-probability per token that noise must cost for a request to count"
    )
    known: bool = Field(True, description="count only facts that the model knows")
    compare: bool = Field(
        True, description="mode trace: score by attribution, too, and say how both maps agree"
    )

    @model_validator(mode="after")
    def _no_choice(self) -> LocalizationOptions:
        chosen = {"n_sites", "min_attn", "min_mlp", "kinds", "l_min", "l_max", "weights", "scope", "sites"}
        given = sorted(chosen & self.model_fields_set)
        if given:
            raise ValueError(f"a map has every site, so there is no use for '{given[0]}' here")
        return self


def localization_benchmark() -> Benchmark:
    """Return the benchmark."""
    metrics: dict[str, str] = {}
    for name, words in WORDS.items():
        for which in SETS:
            metrics[f"{name}_{which}"] = f"{words}; {which}"
        metrics[f"{name}_before"] = f"{words}; commonsense before decoupling, by the request's own line alone"
    metrics |= {
        **{f"lost_{which}": f"log-probability per token that the noise costs; {which}" for which in SETS},
        **{f"clean_{which}": f"log-probability per token of the target; {which}" for which in SETS},
        **{f"items_{which}": f"requests that count; {which}" for which in SETS},
        **{f"passed_{which}": f"requests that were passed over; {which}" for which in SETS},
        "agreement": "Spearman's rho of the maps by tracing and by attribution",
    }
    return Benchmark(
        "where events of common sense and facts sit in the model, and how spread out",
        metrics,
        measure_localization,
        LocalizationOptions,
    )


def measure_localization(evaluation: Evaluation) -> Measurement:
    """Locate both sets request by request and compare their maps.

    Raises:
        UserError: fewer than two requests of a set count.
    """
    options: LocalizationOptions = evaluation.options
    given = {
        "commonsense": read_requests(options.commonsense) if options.commonsense else commonsense(),
        "facts": read_requests(options.facts) if options.facts else facts(),
    }
    with evaluating(evaluation.model):
        sites = find_sites(evaluation.model)
        found = {which: _Set(evaluation, which, given[which], sites) for which in SETS}
    return _measurement(options, found)


class _Set:
    """The requests of one set that count, with their maps."""

    def __init__(
        self, evaluation: Evaluation, which: str, requests: Sequence[Request], sites: Sequence[Site]
    ) -> None:
        self.which = which
        self.located: list[Located] = []
        self.passed: list[dict[str, Any]] = []
        self.agreement: list[float | None] = []
        options: LocalizationOptions = evaluation.options
        model, tokenizer, seed = evaluation.model, evaluation.tokenizer, evaluation.run.seed
        std = noise_scale(model)
        started = time.monotonic()
        with evaluation.console.bar(options.items, f"locating {which}", "request") as bar:
            for request in requests:
                if len(self.located) == options.items:
                    break
                unknown = options.known and which == "facts" and not knows(model, tokenizer, request)
                one = None
                if not unknown:
                    one = locate(
                        model,
                        tokenizer,
                        request,
                        sites,
                        options,
                        seed=seed,
                        std=std,
                        gate=True,
                        least=options.least,
                    )
                why = "the model does not know it" if one is None else one.skipped
                if one is not None and why is None and dispersion(one.scores) is None:
                    why = "no site has a positive score"
                if one is None or why is not None:
                    self.passed.append({"set": which, "id": request.id, "passed over": why})
                    continue
                self.located.append(one)
                bar.update(1)
                if options.mode == "trace" and options.compare:
                    cheap = options.model_copy(update={"mode": "attribution"})
                    other = locate(model, tokenizer, request, sites, cheap, seed=seed, std=std)
                    self.agreement.append(rank_correlation(one.gains, other.gains))
        self.seconds = time.monotonic() - started
        if len(self.located) < 2:
            reason = f", the first because {self.passed[0]['passed over']}" if self.passed else ""
            raise UserError(
                f"of {len(requests)} requests of {which}, {len(self.located)} can be located, and two are needed to "
                f"compare; {len(self.passed)} were passed over{reason}"
            )

    def mean(self, what: str = "scores") -> torch.Tensor:
        """Return the mean map, layers x 2."""
        return torch.stack([getattr(one, what).clamp(min=0) for one in self.located]).mean(0)

    def dispersions(self, what: str = "scores") -> list[Dispersion | None]:
        return [dispersion(getattr(one, what)) for one in self.located]


def knows(model: Any, tokenizer: Any, request: Request) -> bool:
    """Return whether the model gives the target: all tokens the likeliest, or a mean probability above 0.3."""
    (found,) = score(model, tokenizer, [encode_request(tokenizer, request)])
    return bool(found.strict) or float(found.log_probs.exp().mean()) > KNOWN


def _measurement(options: LocalizationOptions, found: dict[str, _Set]) -> Measurement:
    items: dict[str, list[float | None]] = {}
    values: dict[str, float | None] = {}
    # Lists of one length are compared pair by pair; pairs of independent items give the interval of two means.
    count = min(len(one.located) for one in found.values())
    for which, one in found.items():
        maps = {which: one.dispersions()}
        if which == "commonsense":
            maps["before"] = one.dispersions("own")
        for name, field in _FIELDS.items():
            for label, each in maps.items():
                items[f"{name}_{label}"] = [
                    None if single is None else getattr(single, field) for single in each[:count]
                ]
        if options.mode != "recall":
            pairs = [(float(x.clean or 0), float(x.corrupted or 0)) for x in one.located[:count]]
            items[f"lost_{which}"] = [clean - dirty for clean, dirty in pairs]
            items[f"clean_{which}"] = [clean for clean, _ in pairs]
        values[f"items_{which}"] = float(len(one.located))
        values[f"passed_{which}"] = float(len(one.passed))
    agreement = [value for one in found.values() for value in one.agreement]
    notes = [
        f"{which}: {len(one.located)} requests count, {len(one.passed)} were passed over; "
        f"{one.seconds / max(1, len(one.located) + len(one.passed)):.1f} s per request"
        for which, one in found.items()
    ]
    known = [value for value in agreement if value is not None]
    if agreement:
        items["agreement"] = agreement
        if known and sum(known) / len(known) < 0.5:
            notes.append(
                f"attribution is no good stand-in for tracing here: their maps agree with a rank correlation of "
                f"{sum(known) / len(known):.2f}, and 0.5 was hoped for"
            )
    return Measurement(
        items,
        values,
        charts=_charts(options, found),
        rows=[*_rows(found), *(row for one in found.values() for row in one.passed)],
        notes=notes,
    )


def _charts(options: LocalizationOptions, found: dict[str, _Set]) -> list[LineChart | HeatMap]:
    charts: list[LineChart | HeatMap] = []
    layers = len(next(iter(found.values())).mean())
    what = {
        "trace": "share of the lost log-probability that a site gives back",
        "attribution": "the same to first order",
        "recall": "contribution to the target's logits",
    }[options.mode]
    maps = {
        f"{which}, {kind}": one.mean()[:, place].tolist()
        for which, one in found.items()
        for place, kind in enumerate(KINDS)
    }
    caption = f"Mean over requests: {what}; negative values count as 0."
    columns = [str(layer) for layer in range(layers)]
    charts.append(HeatMap("Where it sits", caption, "layer", "score", columns, maps))
    lines = {key: [(float(x), y) for x, y in enumerate(values)] for key, values in maps.items()}
    charts.append(LineChart("Score by layer", caption, "layer", "score", lines))
    one = found["commonsense"]
    before = {
        f"{what}, {kind}": [(float(x), y) for x, y in enumerate(one.mean(field)[:, place].tolist())]
        for field, what in (("own", "one instance"), ("scores", "decoupled"))
        for place, kind in enumerate(KINDS)
    }
    caption = "Events of common sense: their own line, and the mean over other names in its place."
    charts.append(LineChart("Before and after decoupling", caption, "layer", "score", before))
    relations: dict[str, list[torch.Tensor]] = {}
    for each in one.located:
        relations.setdefault(each.request.prompt, []).append(each.scores.clamp(min=0).sum(1))
    if 1 < len(relations) <= 12:
        rows = {key: torch.stack(some).mean(0).tolist() for key, some in relations.items()}
        caption = "Attention and MLP together, mean over the requests of a template."
        charts.append(HeatMap("Common sense by relation", caption, "layer", "score", columns, rows))
    return charts


def _rows(found: dict[str, _Set]) -> list[dict[str, Any]]:
    rows = []
    for which, one in found.items():
        for number, each in enumerate(one.located):
            row: dict[str, Any] = {
                "set": which,
                "id": each.request.id,
                "prompt": each.request.text,
                "target": each.request.target,
                "clean": each.clean,
                "corrupted": each.corrupted,
            }
            for field in MAPS:
                values = getattr(each, field)
                row[field] = {
                    kind: [round(float(x), 5) for x in values[:, place]] for place, kind in enumerate(KINDS)
                }
            if one.agreement:
                row["agreement"] = one.agreement[number]
            rows.append(row)
    return rows
