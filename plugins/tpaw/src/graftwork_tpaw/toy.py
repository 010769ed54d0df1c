"""Self-play in the smallest setting where it can fail: one decision per answer, a policy that cannot be exact.

    python -m graftwork_tpaw.toy

40 prompts, 200 answers each, 400 pairs of SFT data, and a log-linear policy of 60 features that the prompts share.
The targets' distribution is known, so the end of every method is its Kullback-Leibler divergence from it, exactly. All
methods make the same number of steps of the same size from the same start; gradients are those of the softmax.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from graftwork_tpaw.loss import spin_loss, team_loss

PROMPTS, ANSWERS, FEATURES, PAIRS = 40, 200, 60, 400
ITERATIONS, BATCH = 5, 32
# One pass over the pairs of three rounds, for all.
STEPS = math.ceil(3 * PAIRS / BATCH)
SCALE, ETA, GAMMA = 0.1, 6.0, 0.5
NOISE, SFT_STEPS = 0.8, 20
# Chosen so that the start is 0.59 nats away from the data; neither is given where the problem comes from.
LENGTH, SIGNAL, SFT_SIZE = 2.0, 1.7, 0.8


@dataclass(frozen=True)
class Method:
    """``players`` and ``rounds`` of the last checkpoints; None for both: the targets alone."""

    players: int = 1
    rounds: int = 1
    eta: float = 1.0
    gamma: float = GAMMA
    targets_alone: bool = False


METHODS = {
    "SPIN": Method(),
    "SPIN, 2 rounds": Method(rounds=2),
    "team only": Method(3, 3),
    "TPAW": Method(3, 3, ETA),
    "TPAW, gamma 0": Method(3, 3, ETA, gamma=0.0),
    "no team (DPOP)": Method(eta=ETA),
    "continued SFT": Method(targets_alone=True),
}


@dataclass(frozen=True)
class Problem:
    """``features`` X x A x F, ``data`` X x A (the targets' distribution), ``prompts`` and ``targets`` N (the pairs)."""

    features: torch.Tensor
    data: torch.Tensor
    prompts: torch.Tensor
    targets: torch.Tensor

    def log_policy(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of all answers, X x A."""
        return (self.features @ weights).log_softmax(-1)

    def divergence(self, weights: torch.Tensor) -> float:
        """Return KL(data || policy), the mean over prompts, in nats."""
        log_policy = self.log_policy(weights)
        return float((self.data * (self.data.log() - log_policy)).sum(1).mean())


def make_problem(generator: torch.Generator) -> Problem:
    """Return a problem: ``phi(x, y) = base(y) (1 + ctx(x) / 2)``, ``data = softmax(phi w + 0.8 noise(x, y))``."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = (
        LENGTH / FEATURES**0.5 * draw(ANSWERS, FEATURES)[None] * (1 + 0.5 * draw(PROMPTS, FEATURES))[:, None]
    )
    data = (features @ (SIGNAL * draw(FEATURES)) + NOISE * draw(PROMPTS, ANSWERS)).softmax(-1)
    prompts = torch.arange(PAIRS) % PROMPTS
    return Problem(features, data, prompts, sampled(data, prompts, generator))


def sampled(probabilities: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return an answer per prompt (N), drawn from X x A probabilities."""
    return torch.multinomial(probabilities[prompts], 1, generator=generator)[:, 0]


def start(problem: Problem) -> torch.Tensor:
    """Return the SFT checkpoint: full-batch steps from zero."""
    weights = torch.zeros(FEATURES, dtype=torch.float64)
    for _ in range(SFT_STEPS):
        weights = weights - SFT_SIZE * _gradient(
            problem, weights, lambda lp: -lp[problem.prompts, problem.targets].mean()
        )
    return weights


@dataclass(frozen=True)
class Outcome:
    """``divergence``: of the end, nats. ``reward``: lambda times what the last iteration added to the targets' lp."""

    divergence: float
    reward: float


def play(problem: Problem, method: Method, size: float, generator: torch.Generator) -> Outcome:
    """Return what a method makes of the SFT checkpoint."""
    weights = start(problem)
    team, rounds = [problem.log_policy(weights)], []
    for _ in range(ITERATIONS):
        rounds.append(sampled(team[-1].exp(), problem.prompts, generator))
        written = rounds[-method.rounds :]
        rows = torch.stack([torch.arange(PAIRS).repeat(len(written)), torch.cat(written)])
        players = torch.stack(team[-method.players :][::-1], -1)
        for batch in _batches(rows, generator):
            step = _gradient(problem, weights, _loss(problem, method, players, *batch))
            weights = weights - size / SCALE * step
        team.append(problem.log_policy(weights))
    added = (team[-1] - team[-2])[problem.prompts, problem.targets]
    return Outcome(problem.divergence(weights), SCALE * float(added.mean()))


def _batches(rows: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield STEPS batches (2 x B) of the columns of ``rows``, each column once before any comes again."""
    left = rows[:, :0]
    for _ in range(STEPS):
        while left.shape[1] < BATCH:
            left = torch.cat([left, rows[:, torch.randperm(rows.shape[1], generator=generator)]], 1)
        batch, left = left[:, :BATCH], left[:, BATCH:]
        yield batch


def _loss(
    problem: Problem, method: Method, players: torch.Tensor, pairs: torch.Tensor, written: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    x, y = problem.prompts[pairs], problem.targets[pairs]

    def loss(log_policy: torch.Tensor) -> torch.Tensor:
        chosen, rejected = log_policy[x, y], log_policy[x, written]
        if method.targets_alone:
            # The half makes its first step SPIN's: s = 1/2 where both rewards are 0.
            return -SCALE / 2 * chosen.mean()
        references = players[x, y], players[x, written]
        if method == METHODS["SPIN"]:
            return spin_loss(chosen, rejected, *(one[:, 0] for one in references), beta=SCALE).mean()
        return team_loss(
            chosen, rejected, *references, scale=SCALE, eta=method.eta, gamma=method.gamma
        ).mean()

    return loss


def _gradient(
    problem: Problem, weights: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    weights = weights.detach().requires_grad_()
    return torch.autograd.grad(loss(problem.log_policy(weights)), weights)[0]


def outcomes(size: float, seeds: Sequence[int]) -> tuple[list[float], dict[str, list[Outcome]]]:
    """Return the start's divergence and every method's outcome, one per seed; all of a seed share their problem."""
    begun: list[float] = []
    found: dict[str, list[Outcome]] = {name: [] for name in METHODS}
    for seed in seeds:
        problem = make_problem(torch.Generator().manual_seed(seed))
        begun.append(problem.divergence(start(problem)))
        for name, method in METHODS.items():
            found[name].append(play(problem, method, size, torch.Generator().manual_seed(seed + 1_000_003)))
    return begun, found


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; nan for one value."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return (math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


def table(size: float, seeds: Sequence[int]) -> str:
    """Return the outcomes of one step size as a table in Markdown."""
    begun, found = outcomes(size, seeds)
    lines = [
        f"Step size {size:g}, seeds: {len(seeds)}, {ITERATIONS} iterations of {STEPS} steps; "
        f"start: KL {mean(begun):.3f}",
        "",
        "| method | KL(data, policy), nats | standard error | target reward of the last iteration |",
        "|---|---|---|---|",
    ]
    for name, results in found.items():
        ends = [one.divergence for one in results]
        reward = mean([one.reward for one in results])
        lines.append(f"| {name} | {mean(ends):.3f} | {error(ends):.3f} | {reward:+.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table per step size."""
    parser = argparse.ArgumentParser(
        prog="python -m graftwork_tpaw.toy",
        description="TPAW and what it is compared with on a log-linear policy whose optimum is known; a minute",
    )
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="problems to average over (8)")
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.2, 0.6], metavar="SIZE", help="step sizes (0.2 0.6)"
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1 or min(arguments.sizes) <= 0:
        parser.error("there is at least one seed, and step sizes are above 0")
    for size in arguments.sizes:
        print(table(size, range(arguments.seeds)) + "\n", flush=True)


if __name__ == "__main__":
    main()
