"""Second moments of keys over a corpus: ``C = E[k k^T]`` per site, kept in files that know what they were made from.

Tiles of a few thousand tokens are summed in float32 and added in float64. A pass that was cut off goes on where it was,
to the same bits. Batches are bounded in tokens, whatever the model's window is (protocol section 3).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from graftwork.console import Console
from graftwork.edit.errors import StatsError, StatsMismatchError
from graftwork.edit.sites import Site
from graftwork.edit.solve import RIDGE, Factor, factorise
from graftwork.files import cache_folder, write_bytes_atomic

FORMAT = "graftwork-moment/1"
BUDGET = 2048
MEMORY = 2 * 2**30
KEEP_EVERY = 30.0
"""Seconds between the points that a cut-off pass goes on from."""
SAME = ("weights", "tokenizer", "dtype", "module", "d")
"""What two moments must share to be added, and what a model must share with a moment to be edited with it."""


@dataclass(frozen=True)
class Moment:
    """Second moments of one site's keys.

    Attributes:
        mean: C, d x d, float64.
        count: tokens.
        fingerprint: what it was made from: ``weights`` (sha256 of all the model's parameters), ``site`` (of the
            site's weight), ``tokenizer``, ``dtype``, ``module``, ``d``, and ``corpora``, a list of sha256.
    """

    mean: torch.Tensor
    count: int
    fingerprint: Mapping[str, Any]

    def __add__(self, other: Moment) -> Moment:
        """Return the moments over both corpora.

        Raises:
            StatsMismatchError: of another model, module or tokenizer, or over a text that is counted already.
        """
        check_same(self.fingerprint, other.fingerprint, "moments that are to be added")
        mine, theirs = self.fingerprint["corpora"], other.fingerprint["corpora"]
        twice = set(mine) & set(theirs)
        if twice:
            raise StatsMismatchError(f"both moments count the text {min(twice)[:12]}; it would count twice")
        total = self.count + other.count
        mean = (self.mean * self.count + other.mean * other.count) / total
        return Moment(mean, total, {**self.fingerprint, "corpora": sorted([*mine, *theirs])})

    def save(self, path: Path) -> None:
        """Write the lower triangle in float32, the count and the fingerprint; the file is whole or absent."""
        d = len(self.mean)
        rows, columns = torch.tril_indices(d, d)
        # In one entry: several come in any order, and the same moments would not make the same bytes.
        about = {"format": FORMAT, "count": self.count, "fingerprint": dict(self.fingerprint)}
        write_bytes_atomic(
            path, save({"lower": self.mean[rows, columns].float()}, {"moment": json.dumps(about)})
        )

    @classmethod
    def load(cls, path: Path) -> Moment:
        """Read a moment. Raises StatsError where the file is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt", device="cpu") as reader:
                about = json.loads((reader.metadata() or {})["moment"])
                if about["format"] != FORMAT:
                    raise ValueError(f"its format is not {FORMAT}")
                fingerprint = about["fingerprint"]
                d = int(fingerprint["d"])
                lower = reader.get_tensor("lower").double()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise StatsError(f"'{path}' holds no second moments: {error}") from None
        mean = torch.zeros(d, d, dtype=torch.float64)
        rows, columns = torch.tril_indices(d, d)
        mean[rows, columns] = lower
        return cls(mean + mean.T - mean.diagonal().diag(), int(about["count"]), fingerprint)


def check_same(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raise StatsMismatchError, with both fingerprints, where they are of different models or modules."""
    other = next((key for key in SAME if wanted.get(key) != found.get(key)), None)
    if other is not None:
        raise StatsMismatchError(
            f"{where}: {other} is {_short(found.get(other))}, and {_short(wanted.get(other))} is wanted; they were "
            f"made for another model, module or tokenizer"
        )


class Provider(Protocol):
    """What an editor gets its second moments from; collect before the model is written to."""

    def collect(self, sites: Sequence[Site]) -> None: ...

    def moment(self, site: Site) -> torch.Tensor:
        """Return C of a site (d x d, float64)."""
        ...

    def factor(self, site: Site, lam: float, ridge: float = RIDGE) -> Factor:
        """Return the factor of ``lam C + eps I``, kept for the next call."""
        ...


class _Factors:
    """Factors by site and weight, as many as fit into a bound of bytes; the oldest go."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._kept: dict[tuple[str, float, float], Factor] = {}

    def get(self, provider: Provider, site: Site, lam: float, ridge: float) -> Factor:
        key = (site.name, lam, ridge)
        if key not in self._kept:
            made = factorise(provider.moment(site), lam, ridge=ridge, where=site.name)
            while self._kept and (len(self._kept) + 1) * 8 * made.d**2 > self.memory:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = made
        return self._kept[key]


class IdentityStatistics:
    """C = I: what an edit does where nothing is known about other keys; a control."""

    def __init__(self) -> None:
        self._factors = _Factors(MEMORY)

    def collect(self, sites: Sequence[Site]) -> None:
        """Nothing is needed."""

    def moment(self, site: Site) -> torch.Tensor:
        return torch.eye(site.d, dtype=torch.float64)

    def factor(self, site: Site, lam: float, ridge: float = RIDGE) -> Factor:
        return self._factors.get(self, site, lam, ridge)


class Statistics:
    """Second moments of the sites of one model over one corpus, collected when asked for.

    Args:
        model: unedited while moments are collected; an edited one has another fingerprint, and other moments.
        tokenizer: its own.
        windows: token ids of the corpus (windows x window), without padding.
        tokens: use the first windows with so many tokens; all where None.
        folder: where files are; a cache of the user's by default, with a folder for each fingerprint. Files in a
            folder that was named are refused where they are another model's.
        budget: tokens that go through the model together, at most 4,096 (one tile).
        memory: bytes of float64 sums at a time; sites beyond take another pass.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        windows: torch.Tensor,
        *,
        tokens: int | None = None,
        folder: Path | None = None,
        budget: int = BUDGET,
        memory: int = MEMORY,
        console: Console | None = None,
    ) -> None:
        if tokens is not None:
            windows = windows[: max(1, -(-tokens // windows.shape[1]))]
        self.model, self.windows = model, windows
        self.console = console or Console(enabled=False)
        self.memory = memory
        self.batch = max(1, min(budget, 4096) // windows.shape[1])
        self._model = {
            "weights": model_digest(model),
            "tokenizer": tokenizer_digest(tokenizer),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }
        raw = windows.contiguous().cpu()
        self._corpus = hashlib.sha256(f"{tuple(raw.shape)}".encode() + raw.numpy().tobytes()).hexdigest()
        key = hashlib.sha256(json.dumps([self._model, self._corpus]).encode()).hexdigest()[:24]
        self.folder = folder or cache_folder() / "moments" / key
        self._factors = _Factors(memory)

    @property
    def tokens(self) -> int:
        """How many tokens are counted."""
        return self.windows.numel()

    def fingerprint(self, site: Site) -> dict[str, Any]:
        """Return what moments of a site are made from."""
        return {
            **self._model,
            "site": site.digest(),
            "module": site.name,
            "d": site.d,
            "corpora": [self._corpus],
        }

    def path(self, site: Site) -> Path:
        return self.folder / f"{site.name}.safetensors"

    def collect(self, sites: Sequence[Site]) -> None:
        """Make sure that the moments of ``sites`` are in the folder.

        Raises:
            StatsMismatchError: those in the folder are of another model, module or tokenizer.
            StatsError: keys that are no numbers.
        """
        missing = []
        for site in sites:
            if not self.path(site).is_file():
                missing.append(site)
        for some in self._groups(missing):
            self._pass(some)

    def moment(self, site: Site) -> torch.Tensor:
        """Return C of a site (d x d, float64), collected where it is missing. Raises: see :meth:`collect`."""
        self.collect([site])
        return self.read(site).mean

    def read(self, site: Site) -> Moment:
        """Return the moments of a site with their count. Raises StatsMismatchError: see :meth:`collect`."""
        moment = Moment.load(self.path(site))
        check_same(self.fingerprint(site), moment.fingerprint, f"'{self.path(site)}'")
        return moment

    def factor(self, site: Site, lam: float, ridge: float = RIDGE) -> Factor:
        return self._factors.get(self, site, lam, ridge)

    # ------------------------------------------------------------ inside

    def _groups(self, sites: Sequence[Site]) -> Iterator[list[Site]]:
        some: list[Site] = []
        size = 0
        for site in sites:
            if some and size + 8 * site.d**2 > self.memory:
                yield some
                some, size = [], 0
            some.append(site)
            size += 8 * site.d**2
        if some:
            yield some

    def _pass(self, sites: Sequence[Site]) -> None:
        if model_digest(self.model) != self._model["weights"]:
            raise StatsMismatchError(
                "the model was edited before its second moments were collected; collect them first"
            )
        sums = {site.name: torch.zeros(site.d, site.d, dtype=torch.float64) for site in sites}
        names = json.dumps([*sorted(sums), self._corpus, self._model])
        partial = self.folder / f"partial-{hashlib.sha256(names.encode()).hexdigest()[:16]}.safetensors"
        done = self._resumed(partial, sums)
        parts = self.windows.split(self.batch)
        kept = time.monotonic()
        with self.console.bar(len(parts), "second moments", "batch") as bar:
            bar.update(done)
            for number in range(done, len(parts)):
                for name, x in self._inputs(parts[number], sites).items():
                    tile = (x.T @ x).double().cpu()
                    if not bool(torch.isfinite(tile).all()):
                        raise StatsError(
                            f"'{name}': its inputs in batch {number + 1} of the statistics are no numbers (NaN or "
                            f"infinity); look at the weights before it, or use float32"
                        )
                    sums[name] += tile
                bar.update(1)
                if time.monotonic() - kept > KEEP_EVERY and number + 1 < len(parts):
                    write_bytes_atomic(partial, save(sums, {"done": str(number + 1)}))
                    kept = time.monotonic()
        for site in sites:
            mean = sums.pop(site.name) / self.tokens
            Moment(mean, self.tokens, self.fingerprint(site)).save(self.path(site))
        partial.unlink(missing_ok=True)

    def _resumed(self, path: Path, sums: dict[str, torch.Tensor]) -> int:
        if not path.is_file():
            return 0
        with safe_open(path, framework="pt", device="cpu") as reader:
            for name in sums:
                sums[name] = reader.get_tensor(name)
            return int(reader.metadata()["done"])

    def _inputs(self, ids: torch.Tensor, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        device = self.model.get_input_embeddings().weight.device
        with contextlib.ExitStack() as stack:
            for site in sites:

                def hook(_: Any, args: tuple[Any, ...], name: str = site.name) -> None:
                    seen[name] = args[0].detach().flatten(0, -2).float()
                    if len(seen) == len(sites):
                        raise _Enough

                stack.callback(site.module.register_forward_pre_hook(hook).remove)
            with torch.no_grad(), contextlib.suppress(_Enough):
                self.model(input_ids=ids.to(device), use_cache=False)
        return seen


class _Enough(Exception):
    """Ends a forward pass when all that was wanted has been seen."""


def model_digest(model: Any) -> str:
    """Return the sha256 of a model's parameters, by name."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the sha256 of a tokenizer's vocabulary and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # How texts are cut and filled up belongs to the last call, not to the tokenizer.
        known = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    else:
        known = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
