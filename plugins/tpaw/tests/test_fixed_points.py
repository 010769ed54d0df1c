"""Self-play where everything is known: answers of up to two of three tokens, exact policies, exact gradients.

What the iterations tend to (derived here; p the targets' distribution, pi_t the policy of iteration t; all ours
but where said). Per prompt, with a policy that can be any distribution:

SPIN. The pairs of an iteration are those of a Bradley-Terry model with score ``log p / pi_t``, so the iteration's
minimiser is ``lambda log(pi / pi_t) = log(p / pi_t) + c`` (Chen et al. 2024, theorem 5.4), that is::

    log(pi_{t+1} / p) = (1 - 1/lambda) log(pi_t / p) + c

The fixed point is p. Iterations that are solved reach it at once for lambda = 1, step by step for lambda > 1/2, and
run away from it below: at lambda = 0.1 every log-ratio is multiplied by -9. Iterations of few steps do not.

TPAW. Its loss bends at theta_t, where P = 0. The gradient that autograd takes there (P <= 0: alpha = eta) is eta times
SPIN's, so iterations of one step lead to p as well. But pi_t minimises its own iteration, and solved iterations
stay, as soon as no direction descends from it::

    max_y p(y) / pi_t(y)  <=  eta  min_y p(y) / pi_t(y)

p is in that zone; so is much else. A team changes the way, not the zone: at a fixed point all players are equal.
With one step an iteration a team of J equally weighed players has a zone too, with ``J eta / (eta + J - 1)`` in the
place of eta: in a direction that keeps its course the newest player pulls with ``eta E_p[c]`` (c: the change of
log pi), each older one with ``E_p[min(c, eta c)]``. For J = 1 or eta = 1 that zone is p alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from graftwork import PairBatch
from graftwork_tpaw import player_weights, spin_loss, team_loss
from graftwork_tpaw.spin import Spin, SpinOptions
from graftwork_tpaw.tpaw import Tpaw, TpawOptions
from hypothesis import given, settings
from hypothesis import strategies as st

PREFIXES, TOKENS = ("", "a", "b"), ("a", "b", ".")
ANSWERS = (".", "a.", "b.", "aa", "ab", "ba", "bb")
SEEDS = st.integers(0, 2**31)
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _steps() -> torch.Tensor:
    """Which (prefix, token) decisions every answer is made of, 7 x 9."""
    made = torch.zeros(len(ANSWERS), len(PREFIXES), len(TOKENS), dtype=torch.float64)
    for row, answer in enumerate(ANSWERS):
        for place, token in enumerate(answer):
            made[row, PREFIXES.index(answer[:place]), TOKENS.index(token)] = 1
    return made.flatten(1)


STEPS = _steps()


def policy(table: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all answers (X x 7) of a token-by-token policy: logits X x prefix x token."""
    return table.log_softmax(-1).flatten(1) @ STEPS.T


def random_table(seed: int, spread: float, prompts: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, len(PREFIXES), len(TOKENS))
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64)


def expected(
    log_pi: torch.Tensor, p: torch.Tensor, players: Sequence[torch.Tensor], loss: Loss
) -> torch.Tensor:
    """The mean loss (scalar) over prompts, targets from ``p`` and answers from all players, without sampling.

    ``log_pi``, ``p`` and each of ``players`` (log-probabilities, the newest first) are X x 7.
    """
    count = p.shape[1]
    target = torch.arange(count).repeat_interleave(count)
    written = torch.arange(count).repeat(count)
    references = torch.stack(list(players), -1)
    weight = p[:, target] * references.exp().mean(-1)[:, written]
    rows = loss(
        log_pi[:, target].flatten(),
        log_pi[:, written].flatten(),
        references[:, target].flatten(0, 1),
        references[:, written].flatten(0, 1),
    )
    return (weight.flatten() * rows).sum() / len(p)


def spin(scale: float) -> Loss:
    return lambda y, g, r_y, r_g: spin_loss(y, g, r_y[:, 0], r_g[:, 0], beta=scale)


def tpaw(scale: float, eta: float, gamma: float = 0.5) -> Loss:
    return lambda y, g, r_y, r_g: team_loss(y, g, r_y, r_g, scale=scale, eta=eta, gamma=gamma)


def variation(log_pi: torch.Tensor, p: torch.Tensor) -> float:
    """The largest total variation distance over prompts."""
    return float(0.5 * (log_pi.exp() - p).abs().sum(1).max())


def zone(log_pi: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """max p/pi over min p/pi, per prompt: what TPAW's eta is compared with."""
    ratio = p.log() - log_pi
    return (ratio.amax(1) - ratio.amin(1)).exp()


def gradient(
    table: torch.Tensor, p: torch.Tensor, players: Sequence[torch.Tensor], loss: Loss
) -> torch.Tensor:
    table = table.detach().requires_grad_()
    return torch.autograd.grad(expected(policy(table), p, players, loss), table)[0]


# ---------------------------------------------------------------- where the gradient vanishes


@given(SEEDS, st.sampled_from([0.1, 1.0]), st.sampled_from([1.0, 6.0]), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_the_first_gradient_is_that_towards_the_data_and_eta_times_spin_s(
    seed: int, scale: float, eta: float, players: int
) -> None:
    p, table = policy(random_table(seed, 1.0)).exp(), random_table(seed + 1, 1.0)
    now = policy(table)
    # -lambda/2 eta E_p[grad log pi]: the answers' own part has mean zero at theta_t.
    free = table.clone().requires_grad_()
    (towards,) = torch.autograd.grad((p * policy(free)).sum() / len(p), free)
    found = gradient(table, p, [now] * players, tpaw(scale, eta))
    torch.testing.assert_close(found, -scale / 2 * eta * towards, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, eta * gradient(table, p, [now], spin(scale)), rtol=1e-9, atol=1e-12)
    # It is zero at the data.
    assert gradient(table, now.exp(), [now] * players, tpaw(scale, eta)).abs().max() < 1e-12


@given(SEEDS, st.sampled_from([0.1, 1.0]), st.sampled_from([1.0, 1.5, 6.0]), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_once_all_players_write_as_the_data_nothing_is_better(
    seed: int, scale: float, eta: float, players: int
) -> None:
    """Jensen: where both are drawn from p the mean of alpha P(y) - P(y') is at most 0, so the loss at least log 2."""
    data = policy(random_table(seed, 1.0))
    loss = tpaw(scale, eta)
    at_data = expected(data, data.exp(), [data] * players, loss)
    assert at_data.item() == pytest.approx(math.log(2), abs=1e-12)
    for spread in (1e-3, 0.1, 3.0):
        other = policy(random_table(seed, 1.0) + random_table(seed + 1, spread))
        assert expected(other, data.exp(), [data] * players, loss) > at_data


@given(SEEDS, st.sampled_from([0.1, 1.0]), st.sampled_from([1.5, 6.0, 40.0]), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_no_direction_descends_within_the_zone_and_one_does_outside(
    seed: int, scale: float, eta: float, players: int
) -> None:
    p = policy(random_table(seed, 1.0, prompts=1)).exp()
    now = policy(random_table(seed + 1, 0.7, prompts=1))
    loss = tpaw(scale, eta)
    here = expected(now, p, [now] * players, loss)

    def slope(direction: torch.Tensor) -> float:
        """One-sided derivative along a direction of log-probabilities with mean zero under pi."""
        step = 1e-6
        moved = (now + step * direction).log_softmax(1)
        return float((expected(moved, p, [now] * players, loss) - here) / step)

    ratio = (p / now.exp())[0]
    high, low = int(ratio.argmax()), int(ratio.argmin())
    steepest = torch.zeros_like(p)
    steepest[0, high], steepest[0, low] = 1 / now[0, high].exp(), -1 / now[0, low].exp()
    derived = -scale / 2 * float(ratio[high] - eta * ratio[low])
    assert slope(steepest) == pytest.approx(derived, abs=1e-3 * scale * eta)
    if float(zone(now, p)) <= eta:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            direction -= (now.exp() * direction).sum()
            assert slope(direction) > -1e-4 * scale * eta


# ---------------------------------------------------------------- iterations of one step


def one_step_iterations(
    loss: Loss, start: torch.Tensor, p: torch.Tensor, players: int, steps: Sequence[float]
) -> torch.Tensor:
    """Return the policy (X x 7) after iterations of one exact gradient step each."""
    table, team = start, [policy(start)]
    for size in steps:
        table = table - size * gradient(table, p, team[-players:][::-1], loss)
        team.append(policy(table))
    return team[-1]


# 10, shrinking: the gradient is lambda / 2 = 0.05 of the way, and halved by the mean over two prompts.
SIZES = [20 / (1 + number / 50) for number in range(1500)]


@pytest.mark.parametrize(("eta", "players"), [(1.0, 1), (6.0, 1), (1.0, 3)])
def test_with_one_step_an_iteration_the_data_is_reached(eta: float, players: int) -> None:
    p, start = policy(random_table(3, 1.0)).exp(), random_table(4, 1.0)
    assert variation(policy(start), p) > 0.3
    reached = one_step_iterations(tpaw(0.1, eta), start, p, players, SIZES)
    assert variation(reached, p) < 1e-2
    if (eta, players) == (1.0, 1):
        assert torch.equal(reached, one_step_iterations(spin(0.1), start, p, 1, SIZES))


def test_with_one_step_an_iteration_a_boosting_team_reaches_its_zone() -> None:
    """Older players hold back what moves: they boost the targets that sink, and not those that rise."""
    p, start = policy(random_table(3, 1.0)).exp(), random_table(4, 1.0)
    eta, players = 6.0, 3
    bound = players * eta / (eta + players - 1)
    assert (zone(policy(start), p) > 3 * bound).all()
    reached = one_step_iterations(tpaw(0.1, eta), start, p, players, SIZES)
    assert (zone(reached, p) < bound).all()
    assert 1e-2 < variation(reached, p) < 1e-1


# ---------------------------------------------------------------- iterations that are solved


def solved_smoothly(
    table: torch.Tensor, p: torch.Tensor, players: Sequence[torch.Tensor], loss: Loss
) -> torch.Tensor:
    """Return the table (X x 3 x 3) that minimises an iteration's loss without a bend."""
    table = table.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table],
        lr=1,
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = expected(policy(table), p, players, loss)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


@pytest.mark.parametrize("scale", [1.0, 0.75, 2.0])
def test_solved_spin_reaches_the_data_at_the_rate_of_theory(scale: float) -> None:
    p, table = policy(random_table(5, 0.7)).exp(), random_table(6, 0.7)
    factor = 1 - 1 / scale
    shrunk = 1.0
    # factor^k < 1e-3, and one iteration where the factor is 0.
    for _ in range(1 if factor == 0 else math.ceil(math.log(1e-3) / math.log(abs(factor)))):
        before = policy(table)
        table = solved_smoothly(table, p, [before], spin(scale))
        error, was = (one - p.log() for one in (policy(table), before))
        rest = error - factor * was
        torch.testing.assert_close(rest, rest.mean(1, keepdim=True).expand_as(rest), atol=1e-4, rtol=0)
        shrunk *= factor
    assert abs(shrunk) < 1e-3
    assert variation(policy(table), p) < 1e-2


def test_solved_spin_runs_away_at_its_own_scale() -> None:
    """lambda = 0.1: what was 1.1 times too likely is 1.1^9 times too unlikely after one iteration."""
    p, table = policy(random_table(5, 0.7)).exp(), random_table(5, 0.7) + random_table(6, 0.05)
    before = policy(table)
    after = policy(solved_smoothly(table, p, [before], spin(0.1)))
    error, was = after - p.log(), before - p.log()
    rest = error + 9 * was
    torch.testing.assert_close(rest, rest.mean(1, keepdim=True).expand_as(rest), atol=1e-3, rtol=0)
    assert variation(after, p) > 3 * variation(before, p)


def descended(
    table: torch.Tensor, p: torch.Tensor, players: Sequence[torch.Tensor], loss: Loss, steps: int = 700
) -> torch.Tensor:
    """Return the table after exact gradient steps that shrink, for a loss that bends."""
    table = table.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.03)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 2)
    for _ in range(steps):
        optimizer.zero_grad()
        expected(policy(table), p, players, loss).backward()
        optimizer.step()
        schedule.step()
    return table.detach()


def interior(
    p: torch.Tensor, players: Sequence[torch.Tensor], scale: float, eta: float, gamma: float
) -> torch.Tensor:
    """Return the minimiser (7 log-probabilities) of a TPAW iteration for one prompt, by an interior-point method.

    In log-probabilities v the iteration is a convex programme (ours): with a bound ``t_j(y)`` below both ``P_j(y)`` and
    ``eta P_j(y)``, the logistic loss of ``P_j(y') - t_j(y)`` is smooth and convex, and so is ``sum exp(v) <= 1``, which
    holds with equality at the minimum. Newton's method on the barrier; neither the loss function nor its gradient
    are used.
    """
    references = torch.stack([one[0] for one in players], 1)
    answers, count = references.shape
    gaps = gamma * scale * (references[:, None] - references[None])
    weight = (p[0][:, None] * references.exp().mean(1)[None])[..., None] * gaps.softmax(-1)

    def split(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        v, t = z[:answers], z[answers:].view(answers, count)
        return v, t, scale * (v[:, None] - references)

    def objective(z: torch.Tensor, sharpness: float) -> torch.Tensor:
        v, t, rewards = split(z)
        u = t[:, None] - rewards[None]
        loss = (weight * torch.logaddexp(-u, torch.zeros_like(u))).sum()
        slack = torch.cat([(rewards - t).flatten(), (eta * rewards - t).flatten(), 1 - v.exp().sum()[None]])
        return loss - sharpness * slack.log().sum()

    v = references[:, 0] - math.log(1.5)
    rewards = scale * (v[:, None] - references)
    z = torch.cat([v, (torch.minimum(rewards, eta * rewards) - 1).flatten()])
    sharpness = 1.0
    while sharpness > 1e-9:
        for _ in range(50):
            value = objective(z, sharpness)
            slope = torch.func.grad(objective)(z, sharpness)
            curve = torch.func.hessian(objective)(z, sharpness)
            step = -torch.linalg.solve(curve, slope)
            drop, size = -(slope @ step), 1.0
            while not objective(z + size * step, sharpness) <= value - 1e-4 * size * drop and size > 1e-12:
                size /= 2
            z = z + size * step
            if drop < 1e-3 * sharpness:
                break
        sharpness /= 10
    return z[:answers].log_softmax(0)


@pytest.mark.parametrize(
    ("scale", "players"),
    [(0.1, 1), pytest.param(0.1, 3, marks=pytest.mark.slow), pytest.param(1.0, 3, marks=pytest.mark.slow)],
)
def test_solved_tpaw_follows_theory_into_the_zone(scale: float, players: int) -> None:
    """Exact-gradient iterations against an independent solution; what they reach is in the zone and stays there."""
    eta, gamma = 3.0, 0.5
    p, table = policy(random_table(7, 0.8, prompts=1)).exp(), random_table(8, 0.5, prompts=1)
    assert float(zone(policy(table), p)) > 2 * eta
    team = [policy(table)]
    theory = [team[0]]
    for _ in range(4):
        seen = team[-players:][::-1]
        table = descended(table, p, seen, tpaw(scale, eta, gamma))
        team.append(policy(table))
        theory.append(interior(p, theory[-players:][::-1], scale, eta, gamma)[None])
        assert variation(team[-1], theory[-1].exp()) < 1e-2
    assert float(zone(theory[-1], p)) < eta * 1.3
    # From anywhere in the zone nothing moves, one player or several.
    inside = policy(random_table(7, 0.8, prompts=1) + random_table(9, 0.1, prompts=1))
    assert 1.2 < float(zone(inside, p)) < eta
    stayed = interior(p, [inside] * players, scale, eta, gamma)[None]
    assert variation(stayed, inside.exp()) < 1e-3
    assert variation(stayed, p) > 1e-2


# ---------------------------------------------------------------- step for step


def trained(
    loss: Callable[[PairBatch], Any], batches: Sequence[Any], seed: int, steps: int
) -> list[torch.Tensor]:
    """Return the table after every step of two iterations on sampled pairs, with AdamW in float32."""
    table = random_table(seed, 1.0).float().requires_grad_()
    optimizer = torch.optim.AdamW([table], lr=1e-2)
    seen = []
    for iteration in (1, 2):
        reference = policy32(table.detach())
        for x, y, g in batches[(iteration - 1) * steps : iteration * steps]:
            now = policy32(table)
            lengths = torch.tensor([len(answer) for answer in ANSWERS])
            references = reference[x, y][:, None], reference[x, g][:, None]
            batch = PairBatch(now[x, y], now[x, g], *references, lengths[y], lengths[g], iteration)
            optimizer.zero_grad()
            loss(batch).rows.mean().backward()
            optimizer.step()
            seen.append(table.detach().clone())
    return seen


def policy32(table: torch.Tensor) -> torch.Tensor:
    return table.log_softmax(-1).flatten(1) @ STEPS.T.float()


@given(SEEDS, st.sampled_from([0.1, 1.0]), st.sampled_from([0.0, 0.5, 5.0]))
@settings(max_examples=10, deadline=None)
def test_one_player_and_unit_weights_train_as_spin_bit_for_bit(seed: int, scale: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = 8
    draws = [
        (
            torch.randint(2, (4,), generator=generator),
            *torch.randint(len(ANSWERS), (2, 4), generator=generator),
        )
        for _ in range(2 * steps)
    ]
    ours = Tpaw(TpawOptions(players=1, rounds=1, eta=1, gamma=gamma, scale=scale))
    theirs = Spin(SpinOptions(beta=scale))
    one, other = (trained(plugin.loss, draws, seed, steps) for plugin in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in pairwise(one))
    boosted = trained(Tpaw(TpawOptions(players=1, rounds=1, scale=scale)).loss, draws, seed, steps)
    assert not torch.equal(boosted[-1], one[-1])


def test_weights_on_a_team_of_real_length_are_nearly_uniform() -> None:
    """gamma lambda = 0.05: odds of e need a difference of 20 nats in how well two players tell the answers apart."""
    gaps = torch.tensor([[20.0, 0.0]], dtype=torch.float64)
    weights = player_weights(gaps, torch.zeros_like(gaps), scale=0.1, gamma=0.5)
    assert float(weights[0, 0] / weights[0, 1]) == pytest.approx(math.e)
