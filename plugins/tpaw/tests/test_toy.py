"""The log-linear problem: what it computes, and that its outcome is the one first reported for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from graftwork_tpaw import toy
from graftwork_tpaw.toy import METHODS, Method, make_problem, mean, outcomes, play, start


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_problem_is_the_described_one() -> None:
    problem = make_problem(generator())
    assert problem.features.shape == (40, 200, 60)
    assert len(problem.targets) == len(problem.prompts) == 400
    assert (torch.bincount(problem.prompts) == 10).all()
    assert toy.STEPS == 38
    torch.testing.assert_close(problem.data.sum(1), torch.ones(40, dtype=torch.float64))
    # Targets come from the data's distribution: their mean log-probability is minus its entropy, within noise.
    seen = problem.data[problem.prompts, problem.targets].log()
    entropy = -(problem.data * problem.data.log()).sum(1).mean()
    assert abs(float(seen.mean() + entropy)) < 4 * float(seen.std()) / 20
    # A policy of shared features cannot be exact.
    assert problem.divergence(torch.zeros(60, dtype=torch.float64)) > 1


def test_gradients_are_those_of_the_softmax() -> None:
    problem = make_problem(generator())
    weights = torch.randn(60, generator=generator(1), dtype=torch.float64)
    pairs, written = torch.arange(32), torch.arange(32) * 3
    policy = problem.log_policy(weights).exp()
    x, y = problem.prompts[pairs], problem.targets[pairs]
    expected = torch.einsum("ba,baf->bf", policy[x], problem.features[x])
    reference = problem.log_policy(torch.zeros(60, dtype=torch.float64))[..., None]
    seen = problem.features[x, y], problem.features[x, written]
    ratios = [problem.log_policy(weights)[x, one] - reference[x, one, 0] for one in (y, written)]
    s = torch.sigmoid(-0.1 * (ratios[0] - ratios[1]))
    # d log pi(y) / d w = phi(y) - E phi: the means cancel in SPIN's difference and stay in SFT's.
    spin = (-0.1 * s[:, None] * (seen[0] - seen[1])).mean(0)
    sft = (-0.05 * (seen[0] - expected)).mean(0)
    for name, gradient in (("SPIN", spin), ("continued SFT", sft)):
        loss = toy._loss(problem, METHODS[name], reference, pairs, written)
        torch.testing.assert_close(toy._gradient(problem, weights, loss), gradient)


def test_one_player_and_unit_weights_are_spin_bit_for_bit() -> None:
    problem = make_problem(generator())
    ours = play(problem, Method(eta=1.0, gamma=0.25), 0.2, generator(3))
    assert ours == play(problem, METHODS["SPIN"], 0.2, generator(3))
    assert ours != play(problem, METHODS["no team (DPOP)"], 0.2, generator(3))


def test_the_table_is_printed() -> None:
    command = [sys.executable, "-m", "graftwork_tpaw.toy", "--seeds", "1", "--sizes", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Step size 0.1, seeds: 1, 5 iterations of 38 steps; start: KL 0.")
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[4:11]] == [
        f"| {name}" for name in METHODS
    ]
    refused = subprocess.run([*command, "--seeds", "0"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "at least one seed" in refused.stderr


# Reported for eight other problems of this description: KL at the end, for step sizes 0.2 and 0.6.
REPORTED = {
    "SPIN": (0.677, 2.63),
    "SPIN, 2 rounds": (0.418, 1.42),
    "team only": (0.405, 0.42),
    "TPAW": (0.364, 0.283),
    "TPAW, gamma 0": (0.364, 0.276),
    "no team (DPOP)": (0.341, 0.271),
    "continued SFT": (0.406, 0.285),
}


@pytest.mark.slow
def test_the_outcome_is_the_reported_one() -> None:
    small, large = (
        {name: mean([one.divergence for one in found]) for name, found in outcomes(size, range(8))[1].items()}
        for size in (0.2, 0.6)
    )
    for name, (at_small, at_large) in REPORTED.items():
        # What collapses has a wide spread over problems (reported: 0.17 for SPIN).
        if name != "SPIN":
            assert small[name] == pytest.approx(at_small, abs=0.02)
        if name not in ("SPIN", "SPIN, 2 rounds"):
            assert large[name] == pytest.approx(at_large, abs=0.04)
    problems = [make_problem(generator(seed)) for seed in range(8)]
    begun = mean([problem.divergence(start(problem)) for problem in problems])
    # SPIN collapses at large steps, its second round delays it, a team more so; the boost prevents it.
    assert large["SPIN"] > 2 * large["SPIN, 2 rounds"] > 2 * begun > 2 * large["team only"]
    for name in ("TPAW", "TPAW, gamma 0", "no team (DPOP)"):
        assert large[name] < 0.75 * large["team only"]
        assert small[name] < small["team only"] < small["SPIN"]
    # The players' weights change nothing that can be seen, the team adds nothing to the boost, and SFT is as good.
    assert abs(small["TPAW"] - small["TPAW, gamma 0"]) < 0.005
    assert small["no team (DPOP)"] < small["TPAW"]
    assert abs(large["continued SFT"] - large["TPAW"]) < 0.03
