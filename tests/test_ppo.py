"PPO: both sides of the clip for both signs at many ranges, gauges, the lab, bad input."

import pytest
import torch
from samples import generators, randn
from torch.testing import assert_close

from ddpo_scratch.lab import (
    ToyDenoiser,
    estimates,
    exact_gradient,
    expected_reward,
    per_batch,
    summary,
    toy_reward,
)
from ddpo_scratch.methods.policy_gradient import leave_one_out, reinforce_loss
from ddpo_scratch.methods.ppo import approx_kl, clip_fraction, importance_ratio, ppo_loss
from ddpo_scratch.rollout import replay_log_prob, sample


@pytest.mark.parametrize("clip_range", [1e-4, 1.6e-3, 0.2])
@pytest.mark.parametrize("advantage", [-1.5, 2.0])
@pytest.mark.parametrize("where", [-3.0, -0.5, 0.5, 3.0])  # ratio = 1 + where * clip_range
def test_both_sides_for_both_signs(clip_range, advantage, where):
    ratio = 1 + where * clip_range
    log_prob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    old = torch.zeros(1, dtype=torch.float64)
    loss = ppo_loss(log_prob, old, torch.tensor([advantage]).double(), clip_range)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    flat = (advantage > 0 and where > 1) or (advantage < 0 and where < -1)
    bound = 1 + clip_range if where > 0 else 1 - clip_range
    assert abs(loss.item() + advantage * (bound if flat else ratio)) < 1e-12
    assert abs(gradient.item() - (0 if flat else -advantage * ratio)) < 1e-12


def test_gradient_against_finite_differences():
    old, advantage = randn(3, 4, dtype=torch.float64), randn(3, seed=1, dtype=torch.float64)
    log_prob = (old + 0.3 * randn(3, 4, seed=2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda now: ppo_loss(now, old, advantage, 0.2), log_prob)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_fresh_samples_give_reinforce_at_any_scale_of_log_prob(scale):
    log_prob, advantage = (scale * randn(8, 5)).requires_grad_(), randn(8, seed=1)
    loss = ppo_loss(log_prob, log_prob.detach(), advantage, 1e-4)
    (g_is,) = torch.autograd.grad(loss, log_prob)
    (g_sf,) = torch.autograd.grad(reinforce_loss(log_prob, advantage), log_prob)
    assert_close(g_is, g_sf)


def test_only_log_prob_gets_a_gradient():
    log_prob, old, advantage = (randn(4, seed=seed).requires_grad_() for seed in range(3))
    ppo_loss(log_prob, old, advantage, 0.2).backward()
    assert log_prob.grad is not None and old.grad is None and advantage.grad is None
    assert not approx_kl(log_prob, old).requires_grad
    assert not clip_fraction(importance_ratio(log_prob, old), 0.2).requires_grad


def test_one_advantage_a_sample_equals_flat():
    log_prob, old, advantage = 0.1 * randn(6, 4), 0.1 * randn(6, 4, seed=1), randn(6, seed=2)
    flat = ppo_loss(log_prob.flatten(), old.flatten(), advantage.repeat_interleave(4), 0.05)
    assert_close(ppo_loss(log_prob, old, advantage, 0.05), flat)
    each = ppo_loss(log_prob, old, advantage, 0.05, reduction="none")
    assert each.shape == (6, 4)
    assert_close(each.mean(), flat)


def test_gauges():
    a = torch.tensor([0.1, -0.1, 0.3])
    assert_close(approx_kl(a, torch.zeros(3)), torch.tensor((0.01 + 0.01 + 0.09) / 6))
    assert approx_kl(a, a) == 0 and clip_fraction(torch.ones(5), 1e-4) == 0
    assert clip_fraction(torch.tensor([0.5, 1.0, 2.0, 1.05]), 0.1).item() == 0.5


@pytest.mark.parametrize("function", [importance_ratio, approx_kl])
def test_log_probs_of_different_shapes(function):
    with pytest.raises(ValueError, match="one shape"):
        function(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize("n, shape", [(4, (3,)), (4, (1, 4)), (4, (4, 1)), (0, (0,)), (3, ())])
def test_advantages_that_do_not_fit(n, shape):
    with pytest.raises(ValueError, match="do not fit"):
        ppo_loss(torch.zeros(n), torch.zeros(n), torch.zeros(shape), 0.2)


@pytest.mark.parametrize("clip_range", [0.0, -0.1, float("nan")])
def test_clip_ranges_that_make_no_sense(clip_range):
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match="clip_range"):
        ppo_loss(zeros, zeros, zeros, clip_range)


def test_the_first_update_is_reinforce_for_weights_of_means_and_of_variances():
    toy = ToyDenoiser()
    rollout = sample(toy, toy.encode([""] * 32), 4, 1.0, generators(32))
    a, log_prob = leave_one_out(toy_reward(rollout.x0)), replay_log_prob(toy, rollout, 1.0)
    assert (importance_ratio(log_prob, rollout.log_probs) == 1).all()
    loss = ppo_loss(log_prob, rollout.log_probs, a, 1e-4)
    (g_is,) = torch.autograd.grad(loss, toy.theta, retain_graph=True)
    (g_sf,) = torch.autograd.grad(reinforce_loss(log_prob, a), toy.theta)
    assert_close(g_is, g_sf)


@pytest.mark.parametrize("share", [0.8, 1.2])
def test_the_per_step_ratio_follows_mixtures_of_two_policies(share):
    "Its mean adds up gradients with the new policy in one step alone: not the gradient there."
    old = ToyDenoiser()
    new = ToyDenoiser(old.theta + share * torch.tensor([0.2, 0.2, -0.1, -0.1]))
    mixtures = sum(expected_reward([old] * i + [new] + [old] * (3 - i), 4, 1.0) for i in range(4))
    (followed,) = torch.autograd.grad(mixtures, new.theta)

    def loss(toy, c, generators):
        rollout = sample(old, c, 4, 1.0, generators)
        a = per_batch(leave_one_out, toy_reward(rollout.x0), c)
        now, then = replay_log_prob(toy, rollout, 1.0) * 2, rollout.log_probs * 2
        return ppo_loss(now, then, a, 1e9) * 4

    g = estimates(loss, new, 1500, 8)
    assert summary(g, followed[0]).z.abs().max() < 4
    assert summary(g, exact_gradient(new, 4, 1.0)).z.abs().max() > 4


@pytest.mark.parametrize("d", [1, 2, 1024])
def test_as_trained_each_score_is_weighed_by_a_root_of_its_ratio(d):
    "Log-probs that are means over d dimensions, and the clip range that belongs to them."
    old, advantage = randn(64, dtype=torch.float64), randn(64, seed=1, dtype=torch.float64)
    now = (old + randn(64, seed=2, dtype=torch.float64)).requires_grad_()
    ratio = (now.detach() - old).exp()
    loss = d * ppo_loss(now / d, old / d, advantage, 0.2 / d)
    (gradient,) = torch.autograd.grad(loss, now)
    root = ratio ** (1 / d)
    stopped = torch.where(advantage > 0, root > 1 + 0.2 / d, root < 1 - 0.2 / d)
    assert 0 < stopped.sum() < 64
    assert_close(gradient, torch.where(stopped, 0.0, -advantage * root) / 64)
    assert_close(approx_kl(now / d, old / d) * d**2, approx_kl(now, old))
