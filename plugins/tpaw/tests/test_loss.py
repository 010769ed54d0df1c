"""The losses against their formulas, in float64: identities, reductions, gradients, edges, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_tpaw import (
    dpo_loss,
    dpop_loss,
    player_weights,
    sft_loss,
    spin_loss,
    target_weights,
    team_loss,
    team_terms,
)
from hypothesis import assume, given
from hypothesis import strategies as st

SCALES = st.sampled_from([0.01, 0.1, 1.0, 5.0])
ETAS = st.sampled_from([1.0, 1.5, 6.0, 50.0])
GAMMAS = st.sampled_from([0.0, 0.1, 0.5, 3.0])
SPREADS = st.sampled_from([0.1, 3.0, 30.0, 300.0])
SEEDS = st.integers(0, 2**31)


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of a batch: chosen and rejected (B, with gradient), under the players (B x J)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.chosen, self.rejected, self.reference_chosen, self.reference_rejected))

    @property
    def references(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.reference_chosen, self.reference_rejected

    def seen_by(self, players: list[int]) -> Pairs:
        return replace(
            self,
            reference_chosen=self.reference_chosen[:, players],
            reference_rejected=self.reference_rejected[:, players],
        )

    def alone(self, player: int = 0) -> tuple[torch.Tensor, ...]:
        """The four log-probabilities (B each) with one player as the reference."""
        return (
            self.chosen,
            self.rejected,
            self.reference_chosen[:, player],
            self.reference_rejected[:, player],
        )

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients (B each) of the sum of a loss to chosen and rejected."""
        return torch.autograd.grad(loss.sum(), (self.chosen, self.rejected), retain_graph=True)


def random_pairs(rows: int, players: int, seed: int, spread: float = 10.0) -> Pairs:
    """Answers of some -40 nats; the model and every player differ by ``spread`` nats, roughly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    levels = -40 + 20 * draw(2, rows)
    chosen, rejected = (levels + spread * draw(2, rows)).unbind()
    references = levels[:, :, None] + spread * draw(2, rows, players)
    return Pairs(chosen.requires_grad_(), rejected.requires_grad_(), *references.unbind())


@st.composite
def pairs(draw: Any, players: int | None = None) -> Pairs:
    """Near zero, where the losses bend, and far out, where they saturate."""
    count = draw(st.integers(1, 4)) if players is None else players
    return random_pairs(draw(st.integers(1, 5)), count, draw(SEEDS), draw(SPREADS))


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def printed(batch: Pairs, scale: float, eta: float, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The digest's formulas, term by term, in Python floats: loss (B) and beta (B x J)."""
    losses, weights = [], []
    for lp_y, lp_g, r_y, r_g in zip(*(part.tolist() for part in batch), strict=True):
        p_y = [scale * (lp_y - one) for one in r_y]
        p_g = [scale * (lp_g - one) for one in r_g]
        margins = [one - other for one, other in zip(p_y, p_g, strict=True)]
        least = min(margins)
        shares = [math.exp(-gamma * (margin - least)) for margin in margins]
        beta = [share / sum(shares) for share in shares]
        total = 0.0
        for b, y, g in zip(beta, p_y, p_g, strict=True):
            u = (eta if y <= 0 else 1.0) * y - g
            total += b * (max(0.0, -u) + math.log1p(math.exp(-abs(u))))
        losses.append(total)
        weights.append(beta)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


# ---------------------------------------------------------------- the formulas


@given(pairs(), SCALES, ETAS, GAMMAS)
def test_loss_and_weights_are_those_of_the_printed_formulas(
    batch: Pairs, scale: float, eta: float, gamma: float
) -> None:
    loss, beta = printed(batch, scale, eta, gamma)
    close(team_loss(*batch, scale=scale, eta=eta, gamma=gamma).detach(), loss, 1e-9)
    close(player_weights(*batch.references, scale=scale, gamma=gamma), beta, 1e-9)


@given(pairs(), SCALES, ETAS, GAMMAS, st.floats(-500, 500), st.floats(-500, 500))
def test_player_weights_do_not_depend_on_the_model(
    batch: Pairs, scale: float, eta: float, gamma: float, first: float, second: float
) -> None:
    settings = {"scale": scale, "eta": eta, "gamma": gamma}
    before = team_terms(*batch, **settings).player_weights
    moved = replace(batch, chosen=batch.chosen + first, rejected=batch.rejected + second)
    after = team_terms(*moved, **settings).player_weights
    assert torch.equal(before, after)
    assert torch.equal(before, player_weights(*batch.references, scale=scale, gamma=gamma))
    assert not before.requires_grad
    logits = gamma * scale * (batch.reference_chosen - batch.reference_rejected)
    close(before, logits.softmax(1), 1e-12)


@given(pairs(), SCALES, GAMMAS)
def test_player_weights_are_a_distribution(batch: Pairs, scale: float, gamma: float) -> None:
    beta = player_weights(*batch.references, scale=scale, gamma=gamma)
    close(beta.sum(1), torch.ones(len(beta), dtype=torch.float64), 1e-12)
    assert (beta >= 0).all()
    if gamma == 0:
        assert torch.equal(beta, torch.full_like(beta, 1 / beta.shape[1]))


@given(pairs(), SCALES)
def test_a_sharp_weight_takes_the_player_that_tells_the_answers_apart_best(
    batch: Pairs, scale: float
) -> None:
    gaps = batch.reference_chosen - batch.reference_rejected
    if gaps.shape[1] > 1:
        first, second = gaps.topk(2, dim=1).values.unbind(1)
        assume(bool((first - second > 1e-2).all()))
    beta = player_weights(*batch.references, scale=scale, gamma=1e6)
    close(beta, torch.nn.functional.one_hot(gaps.argmax(1), gaps.shape[1]).double(), 1e-12)


@given(pairs(), ETAS)
def test_targets_are_boosted_where_they_are_no_likelier(batch: Pairs, eta: float) -> None:
    alpha = target_weights(batch.chosen, batch.reference_chosen, eta=eta)
    literal = torch.tensor(
        [
            [eta if lp - one <= 0 else 1.0 for one in row]
            for lp, row in zip(batch.chosen.tolist(), batch.reference_chosen.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    assert torch.equal(alpha, literal)
    assert not alpha.requires_grad


def test_at_the_first_step_the_newest_player_boosts_every_target() -> None:
    """theta = theta_t, so P = 0 exactly; rounding of 1e-6 nats flips the literal rule, the tolerance does not."""
    reference = torch.full((4, 1), -37.25)
    assert (target_weights(reference[:, 0], reference, eta=6) == 6).all()
    rounded = reference[:, 0] + 4e-6
    assert (target_weights(rounded, reference, eta=6) == 1).all()
    tokens = torch.full((4,), 12)
    assert (target_weights(rounded, reference, eta=6, tolerance=1e-4 * tokens) == 6).all()


@given(pairs(), st.sampled_from([0.1, 1.0, 4.0]))
def test_the_tolerance_is_per_row_and_in_nats_of_the_log_ratio(batch: Pairs, nats: float) -> None:
    limit = nats * torch.arange(1, len(batch.chosen) + 1)
    alpha = target_weights(batch.chosen, batch.reference_chosen, eta=6, tolerance=limit)
    for row, most in enumerate(limit.tolist()):
        ratio = batch.chosen[row].item() - batch.reference_chosen[row]
        assert torch.equal(alpha[row] == 6, ratio <= most)


# ---------------------------------------------------------------- reductions


@given(pairs(), SCALES, st.sampled_from([1.5, 6.0, 50.0]))
def test_one_player_is_dpo_positive(batch: Pairs, scale: float, eta: float) -> None:
    batch = batch.seen_by([0])
    ours = team_loss(*batch, scale=scale, eta=eta)
    theirs = dpop_loss(*batch.alone(), beta=scale, penalty=eta - 1)
    close(ours, theirs, 1e-9)
    close(torch.stack(batch.gradients(ours)), torch.stack(batch.gradients(theirs)), 1e-9)
    # Written out: l(lambda [r(y) - r(y') - (eta - 1) max(0, -r(y))]), and as a minimum.
    lp_y, lp_g, r_y, r_g = batch.alone()
    inside = scale * ((lp_y - r_y) - (lp_g - r_g) - (eta - 1) * (r_y - lp_y).clamp(min=0))
    close(ours, torch.log1p(torch.exp(-inside.abs())) + (-inside).clamp(min=0), 1e-9)
    p_y, p_g = scale * (lp_y - r_y), scale * (lp_g - r_g)
    close(ours, -torch.nn.functional.logsigmoid(torch.minimum(p_y, eta * p_y) - p_g), 1e-9)


@given(pairs(), SCALES, GAMMAS, st.sampled_from([torch.float32, torch.float64]))
def test_one_player_without_boost_is_spin_and_dpo_bit_for_bit(
    batch: Pairs, scale: float, gamma: float, dtype: torch.dtype
) -> None:
    batch = Pairs(*(part.detach().to(dtype).requires_grad_(part.requires_grad) for part in batch)).seen_by(
        [0]
    )
    ours = team_loss(*batch, scale=scale, eta=1, gamma=gamma)
    for theirs in (dpo_loss(*batch.alone(), beta=scale), spin_loss(*batch.alone(), beta=scale)):
        assert torch.equal(ours, theirs)
        for one, other in zip(batch.gradients(ours), batch.gradients(theirs), strict=True):
            assert torch.equal(one, other)
    lp_y, lp_g, r_y, r_g = batch.alone()
    close(
        ours.double(), -torch.nn.functional.logsigmoid(scale * ((lp_y - lp_g) - (r_y - r_g))).double(), 1e-3
    )


@given(pairs(), SCALES)
def test_without_weights_it_is_the_mean_of_one_dpo_loss_per_player(batch: Pairs, scale: float) -> None:
    count = batch.reference_chosen.shape[1]
    single = torch.stack([dpo_loss(*batch.alone(player), beta=scale) for player in range(count)])
    close(team_loss(*batch, scale=scale, eta=1, gamma=0), single.mean(0))


@given(pairs(players=1), st.integers(2, 4), SCALES, ETAS, GAMMAS)
def test_equal_players_are_one_player(
    batch: Pairs, count: int, scale: float, eta: float, gamma: float
) -> None:
    settings = {"scale": scale, "eta": eta, "gamma": gamma}
    close(team_loss(*batch.seen_by([0] * count), **settings), team_loss(*batch, **settings))


@given(pairs(), SCALES, GAMMAS)
def test_jensen_without_boost(batch: Pairs, scale: float, gamma: float) -> None:
    """The loss is at least that of one DPO whose reference log-ratio is the weighted mean of the players'."""
    beta = player_weights(*batch.references, scale=scale, gamma=gamma)
    mean_y, mean_g = ((beta * part).sum(1) for part in batch.references)
    bound = dpo_loss(batch.chosen, batch.rejected, mean_y, mean_g, beta=scale)
    ours = team_loss(*batch, scale=scale, eta=1, gamma=gamma)
    assert (ours >= bound - 1e-9 * (1 + bound.abs())).all()


def test_the_hinge_loss_is_that_of_spin() -> None:
    batch = random_pairs(64, 1, 0)
    lp_y, lp_g, r_y, r_g = batch.alone()
    logits = (lp_y - lp_g) - (r_y - r_g)
    ours = spin_loss(*batch.alone(), beta=0.1, kind="hinge")
    close(ours, torch.clamp(1 - 0.1 * logits, min=0))
    assert (ours == 0).any()
    assert (ours > 0).any()


def test_sft_is_the_mean_over_a_target_s_tokens() -> None:
    chosen = torch.tensor([-6.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss = sft_loss(chosen, torch.tensor([3, 4]))
    assert loss.tolist() == [2.0, 0.5]
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    close(gradient, torch.tensor([-1 / 3, -1 / 4], dtype=torch.float64))


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's own DPOTrainer on four pairs, with a reference that is another model than the policy."""
    from trl import DPOConfig, DPOTrainer

    texts = [("2 + 2 =", " 4", " five"), ("Say a", "a", "b b"), ("cat:", " meow", ""), ("x", "y z", "y")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=4,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        loss_type="sigmoid",
        beta=0.1,
    )
    return DPOTrainer(
        tiny_model(seed=0, initializer_range=0.3),
        tiny_model(seed=1, initializer_range=0.3),
        args=config,
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(rows),
    )


def test_one_player_without_boost_is_trl_s_dpo(trl_trainer: Any) -> None:
    inputs = next(iter(trl_trainer.get_train_dataloader()))
    theirs = trl_trainer.compute_loss(trl_trainer.model, inputs)

    def fused(model: Any) -> torch.Tensor:
        """The log-probabilities as TRL's trainer computes them, chosen above rejected."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return model(**given, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum(1)

    def plain(model: Any) -> torch.Tensor:
        """The same from the logits, without TRL's code, in float64."""
        ids, answer = inputs["input_ids"], inputs["completion_mask"][:, 1:]
        with torch.no_grad():
            hidden = model.model(ids, attention_mask=inputs["attention_mask"]).last_hidden_state
            logp = model.lm_head(hidden)[:, :-1].double().log_softmax(-1)
        return (logp.gather(-1, ids[:, 1:, None])[..., 0] * answer).sum(1)

    for way, tolerance in ((fused, 0.0), (plain, 1e-5)):
        lp_y, lp_g = way(trl_trainer.model).chunk(2)
        r_y, r_g = (part[:, None] for part in way(trl_trainer.ref_model).chunk(2))
        ours = team_loss(lp_y, lp_g, r_y, r_g, scale=0.1, eta=1).mean()
        assert ours.item() == pytest.approx(theirs.item(), abs=tolerance)
    assert abs(theirs.item() - math.log(2)) > 1e-3


# ---------------------------------------------------------------- order, and players that are missing


@given(pairs(), SCALES, ETAS, GAMMAS)
def test_the_players_order_does_not_matter(batch: Pairs, scale: float, eta: float, gamma: float) -> None:
    settings = {"scale": scale, "eta": eta, "gamma": gamma}
    terms = team_terms(*batch, **settings)
    for order in map(list, permutations(range(batch.reference_chosen.shape[1]))):
        other = team_terms(*batch.seen_by(order), **settings)
        close(other.player_weights, terms.player_weights[:, order], 1e-12)
        close(other.rows, terms.rows, 1e-12)


@given(
    pairs(),
    SCALES,
    ETAS,
    GAMMAS,
    st.booleans(),
    st.sampled_from([0.0, math.inf, -math.inf, math.nan]),
    st.data(),
)
def test_missing_players_change_nothing_whatever_stands_in_their_columns(
    batch: Pairs, scale: float, eta: float, gamma: float, uses_alpha: bool, junk: float, data: Any
) -> None:
    settings = {"scale": scale, "eta": eta, "gamma": gamma, "margin_uses_alpha": uses_alpha}
    count = batch.reference_chosen.shape[1]
    there = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
    present = torch.zeros_like(batch.reference_chosen, dtype=torch.bool)
    present[:, there] = True
    filled = [part.masked_fill(~present, junk).requires_grad_() for part in batch.references]
    terms = team_terms(batch.chosen, batch.rejected, *filled, present=present, **settings)
    alone = team_terms(*batch.seen_by(there), **settings)
    close(terms.rows, alone.rows, 1e-12)
    close(terms.player_weights[:, there], alone.player_weights, 1e-12)
    assert (terms.player_weights[~present] == 0).all()
    gradients = torch.autograd.grad(
        terms.rows.sum(), (batch.chosen, batch.rejected, *filled), retain_graph=True, allow_unused=True
    )
    for one, other in zip(gradients, batch.gradients(alone.rows), strict=False):
        close(one, other, 1e-12)
    # Players are constants, missing or not.
    assert gradients[2:] == (None, None)


@given(pairs(), SCALES, ETAS, GAMMAS)
def test_rows_do_not_know_of_each_other(batch: Pairs, scale: float, eta: float, gamma: float) -> None:
    settings = {"scale": scale, "eta": eta, "gamma": gamma}
    whole = team_loss(*batch, **settings)
    for row in range(len(whole)):
        close(team_loss(*(part[row : row + 1] for part in batch), **settings)[0], whole[row], 1e-12)


# ---------------------------------------------------------------- gradients


@given(pairs(), SCALES, ETAS, GAMMAS)
def test_gradients_are_those_of_the_closed_form(batch: Pairs, scale: float, eta: float, gamma: float) -> None:
    of_chosen, of_rejected = batch.gradients(team_loss(*batch, scale=scale, eta=eta, gamma=gamma))
    p_y = scale * (batch.chosen.detach()[:, None] - batch.reference_chosen)
    p_g = scale * (batch.rejected.detach()[:, None] - batch.reference_rejected)
    alpha = torch.where(p_y <= 0, eta, 1.0)
    beta = torch.softmax(-gamma * (p_y - p_g), 1)
    s = 1 / (1 + torch.exp(alpha * p_y - p_g))
    close(of_chosen, -scale * (beta * s * alpha).sum(1), 1e-9)
    close(of_rejected, scale * (beta * s).sum(1), 1e-9)


@pytest.mark.parametrize("uses_alpha", [False, True])
def test_gradcheck(uses_alpha: bool) -> None:
    batch = random_pairs(4, 3, seed=5)
    assert ((batch.chosen[:, None] - batch.reference_chosen).abs() > 1e-3).all()

    # Weights take no gradient, which differences of the loss cannot tell: they are held where they are.
    held = team_terms(*batch, margin_uses_alpha=True).player_weights

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        terms = team_terms(chosen, rejected, *batch.references, margin_uses_alpha=uses_alpha)
        if not uses_alpha:
            return terms.rows
        u = terms.target_weights * terms.reward_target - terms.reward_generated
        return (held * -torch.nn.functional.logsigmoid(u)).sum(1)

    assert torch.autograd.gradcheck(loss, (batch.chosen, batch.rejected))
    if uses_alpha:
        expected = batch.gradients(loss(batch.chosen, batch.rejected))
        found = batch.gradients(team_loss(*batch, margin_uses_alpha=True))
        close(torch.stack(found), torch.stack(expected))


@given(pairs(players=1), SCALES, ETAS)
def test_continuous_where_the_reward_is_zero_with_a_slope_that_jumps_by_eta(
    batch: Pairs, scale: float, eta: float
) -> None:
    lp_g, r_y, r_g = batch.rejected.detach(), batch.reference_chosen, batch.reference_rejected
    assume(bool((scale * (lp_g[:, None] - r_g) < 30).all()))
    step = 1e-7 / scale

    def slope(side: float) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = (r_y[:, 0] + side * step).requires_grad_()
        loss = team_loss(chosen, lp_g, r_y, r_g, scale=scale, eta=eta)
        return loss.detach(), torch.autograd.grad(loss.sum(), chosen)[0]

    (below, steep), (above, flat) = slope(-1), slope(1)
    # |d loss / d P| is at most eta, so the two values are at most this far apart.
    assert ((below - above).abs() <= 2 * eta * 1e-7 * (1 + 1e-3) + 1e-12).all()
    assume(bool((flat.abs() > 1e-9).all()))
    close(steep / flat, torch.full_like(flat, eta), 1e-4)


@given(pairs(), SCALES, GAMMAS)
def test_an_answer_that_is_the_target_teaches_nothing_without_boost(
    batch: Pairs, scale: float, gamma: float
) -> None:
    """y = y': lp(y) and lp(y') are one number, and so are the players'. Through it, the gradient is zero."""
    same = batch.chosen
    references = batch.reference_chosen
    loss = team_loss(same, same, references, references, scale=scale, eta=1, gamma=gamma)
    (gradient,) = torch.autograd.grad(loss.sum(), same)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    close(loss, torch.full_like(loss, math.log(2)), 1e-12)
    boosted = team_loss(same, same, references, references, scale=scale, eta=6, gamma=gamma)
    below = (same[:, None] <= references).any(1)
    (pushed,) = torch.autograd.grad(boosted.sum(), same)
    assert torch.equal(pushed < -1e-12, below & (pushed.abs() > 1e-12))


# ---------------------------------------------------------------- the other margin


@given(pairs(), SCALES, st.sampled_from([1.5, 6.0]), st.sampled_from([0.1, 0.5]))
def test_alpha_in_the_margin(batch: Pairs, scale: float, eta: float, gamma: float) -> None:
    terms = team_terms(*batch, scale=scale, eta=eta, gamma=gamma, margin_uses_alpha=True)
    p_y = scale * (batch.chosen.detach()[:, None] - batch.reference_chosen)
    p_g = scale * (batch.rejected.detach()[:, None] - batch.reference_rejected)
    u = torch.where(p_y <= 0, eta, 1.0) * p_y - p_g
    beta = torch.softmax(-gamma * u, 1)
    close(terms.player_weights, beta, 1e-9)
    assert not terms.player_weights.requires_grad
    close(terms.rows.detach(), (beta * torch.logaddexp(-u, torch.zeros_like(u))).sum(1), 1e-9)


def test_alpha_in_the_margin_makes_the_weights_depend_on_the_model() -> None:
    batch = random_pairs(8, 3, seed=0)
    moved = replace(batch, chosen=batch.chosen + 5)
    one, other = (team_terms(*each, margin_uses_alpha=True).player_weights for each in (batch, moved))
    assert (one - other).abs().max() > 1e-3


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("far", [1e3, 1e5])
def test_far_out_nothing_overflows(far: float) -> None:
    for sign in (1.0, -1.0):
        chosen = torch.tensor([sign * far], requires_grad=True)
        loss = team_loss(chosen, torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2), scale=1.0, eta=6.0)
        (gradient,) = torch.autograd.grad(loss, chosen)
        # Below: the line -eta P, with its slope. Above: nothing is left.
        assert loss.item() == (0.0 if sign > 0 else pytest.approx(6 * far))
        assert gradient.item() == (0.0 if sign > 0 else pytest.approx(-6.0))


def test_small_losses_keep_their_digits() -> None:
    """exp(-u) in float64 where u = 30, which a softplus that turns linear at 20 would lose."""
    loss = team_loss(
        *torch.tensor([[30.0], [0.0]], dtype=torch.float64), *torch.zeros(2, 1, 1).double(), scale=1.0
    )
    assert loss.item() == pytest.approx(math.log1p(math.exp(-30)), rel=1e-12)


# ---------------------------------------------------------------- bad input


def _good(rows: int = 2, players: int = 2) -> dict[str, torch.Tensor]:
    batch = random_pairs(rows, players, seed=0)
    return dict(zip(("chosen", "rejected", "reference_chosen", "reference_rejected"), batch, strict=True))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("eta", 0.5, "eta = 0.5: it is a number at least 1"),
        ("eta", math.nan, "eta = nan"),
        ("gamma", -0.1, "gamma = -0.1: it is a number at least 0"),
        ("gamma", math.inf, "gamma = inf"),
        ("scale", 0.0, "scale = 0.0: it is a number above 0"),
        ("scale", -1.0, "scale = -1.0"),
    ],
)
def test_settings_out_of_bounds_are_refused(setting: str, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        team_loss(**_good(), **{setting: value})


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_out_of_bounds_is_refused(beta: float) -> None:
    batch = random_pairs(2, 1, seed=0).alone()
    for loss in (dpo_loss, spin_loss, dpop_loss):
        with pytest.raises(ValueError, match=f"beta = {beta}: it is a number above 0"):
            loss(*batch, beta=beta)


def test_shapes_that_do_not_fit_are_refused() -> None:
    good = _good()
    with pytest.raises(ValueError, match=r"are B x J, not \(2, 2\) and \(2, 1\)"):
        team_loss(**good | {"reference_rejected": good["reference_rejected"][:, :1]})
    with pytest.raises(ValueError, match="there is no player"):
        team_loss(**good | {key: good[key][:, :0] for key in ("reference_chosen", "reference_rejected")})
    with pytest.raises(ValueError, match=r"one value per row of reference_chosen \(2, 2\), not \(1,\)"):
        team_loss(**good | {"chosen": good["chosen"][:1]})
    with pytest.raises(ValueError, match="present is bool of shape"):
        team_loss(**good, present=torch.ones(2, 2))
    with pytest.raises(ValueError, match="have one shape"):
        dpo_loss(*random_pairs(2, 2, seed=0))


def test_a_row_without_a_player_is_refused() -> None:
    present = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="row 1 has no present player"):
        team_loss(**_good(), present=present)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["reference_chosen", "reference_rejected"])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    good = _good()
    good[name][1, 0] = value
    with pytest.raises(ValueError, match=f"{name} of row 1, player 0, is {value}"):
        team_loss(**good)
    with pytest.raises(ValueError, match=f"{name} of row 1, player 0, is {value}"):
        player_weights(good["reference_chosen"], good["reference_rejected"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_refused(dtype: torch.dtype) -> None:
    for name, value in _good().items():
        with pytest.raises(ValueError, match=f"float32 or float64 sums, not {dtype}"):
            team_loss(**_good() | {name: value.to(dtype)})


def test_the_loss_needs_no_trainer() -> None:
    source = (Path(__file__).parents[1] / "src/graftwork_tpaw/loss.py").read_text()
    imports = {
        line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import", "from"))
    }
    assert imports == {"__future__", "math", "dataclasses", "typing", "torch"}
