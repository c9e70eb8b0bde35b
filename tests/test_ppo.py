"What would bore a reader of 07: both sides of the clip for both signs at many ranges, boundaries, gauges, bad input."
import math

import pytest
import torch

from ddpo_scratch.lab import ToyDenoiser, estimates, exact_gradient, expected_reward, per_batch, summary, toy_reward
from ddpo_scratch.policy_gradient import leave_one_out, reinforce_loss
from ddpo_scratch.ppo import approx_kl, clip_fraction, default_clip_range, importance_ratio, ppo_loss
from ddpo_scratch.rollout import generator_for, replay_log_prob, sample


@pytest.mark.parametrize("clip_range", [1e-4, 1.6e-3, 0.2])
@pytest.mark.parametrize("advantage", [-1.5, 2.0])
@pytest.mark.parametrize("where", [-3.0, -0.5, 0.5, 3.0])  # ratio = 1 + where * clip_range
def test_both_sides_for_both_signs(clip_range, advantage, where):
    ratio = 1 + where * clip_range
    log_prob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss = ppo_loss(log_prob, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64), clip_range)
    gradient, = torch.autograd.grad(loss, log_prob)
    flat = (advantage > 0 and where > 1) or (advantage < 0 and where < -1)
    bound = 1 + clip_range if where > 0 else 1 - clip_range
    assert abs(loss.item() + advantage * (bound if flat else ratio)) < 1e-12
    assert abs(gradient.item() - (0 if flat else -advantage * ratio)) < 1e-12


def test_gradient_against_finite_differences():
    g = torch.Generator().manual_seed(0)
    old, advantage = torch.randn(3, 4, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)
    log_prob = (old + 0.3 * torch.randn(3, 4, generator=g, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda lp: ppo_loss(lp, old, advantage, 0.2), log_prob)


def test_fresh_samples_give_reinforce_at_any_scale_of_log_prob():
    for scale in (1.0, 1e4):
        log_prob = (scale * torch.randn(8, 5)).requires_grad_()
        advantage = torch.randn(8)
        g_is, = torch.autograd.grad(ppo_loss(log_prob, log_prob.detach(), advantage, 1e-4), log_prob)
        g_sf, = torch.autograd.grad(reinforce_loss(log_prob, advantage), log_prob)
        torch.testing.assert_close(g_is, g_sf)


def test_only_log_prob_gets_a_gradient():
    log_prob, old, advantage = (torch.randn(4, requires_grad=True) for _ in range(3))
    ppo_loss(log_prob, old, advantage, 0.2).backward()
    assert log_prob.grad is not None and old.grad is None and advantage.grad is None
    assert not approx_kl(log_prob, old).requires_grad and not clip_fraction(importance_ratio(log_prob, old), 0.2).requires_grad


def test_one_advantage_a_sample_equals_flat():
    log_prob, old, advantage = torch.randn(6, 4) * 0.1, torch.randn(6, 4) * 0.1, torch.randn(6)
    flat = ppo_loss(log_prob.flatten(), old.flatten(), advantage.repeat_interleave(4), 0.05)
    torch.testing.assert_close(ppo_loss(log_prob, old, advantage, 0.05), flat)


def test_gauges():
    a = torch.tensor([0.1, -0.1, 0.3])
    torch.testing.assert_close(approx_kl(a, torch.zeros(3)), torch.tensor((0.01 + 0.01 + 0.09) / 6))
    assert approx_kl(a, a) == 0 and clip_fraction(torch.ones(5), 1e-4) == 0
    assert clip_fraction(torch.tensor([0.5, 1.0, 2.0, 1.05]), 0.1).item() == 0.5


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 16, 16), (4, 128, 128), (3,)])
def test_clip_range_keeps_the_joint_log_ratio(shape):
    assert math.isclose(default_clip_range(shape) * math.prod(shape), 1.6384)


def test_known_clip_ranges():
    assert default_clip_range((4, 64, 64)) == 1e-4
    assert math.isclose(default_clip_range(torch.Size((4, 16, 16))), 1.6e-3)


@pytest.mark.parametrize("shape", [(), [], (0,), (4, 0, 16)])
def test_empty_latent_shape(shape):
    with pytest.raises(ValueError, match="latent_shape"): default_clip_range(shape)


def test_bad_input():
    z = torch.zeros
    for f in (importance_ratio, approx_kl):
        with pytest.raises(ValueError, match="one shape"): f(z(4, 1), z(4))
    for advantage in (z(3), z(1, 4), z(4, 1)):
        with pytest.raises(ValueError, match="do not fit"): ppo_loss(z(4), z(4), advantage, 0.2)
    for clip_range in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="clip_range"): ppo_loss(z(4), z(4), z(4), clip_range)
    with pytest.raises(ValueError, match="do not fit"): ppo_loss(z(0), z(0), z(0), 0.2)


def test_first_update_is_reinforce_for_weights_that_move_means_and_for_those_that_move_variances():
    toy = ToyDenoiser()
    ro = sample(toy, toy.encode([""] * 32), 4, 1.0, [generator_for(0, i) for i in range(32)])
    a, lp = leave_one_out(toy_reward(ro.x0)), replay_log_prob(toy, ro, 1.0)
    assert (importance_ratio(lp, ro.log_probs) == 1).all()
    g_is, = torch.autograd.grad(ppo_loss(lp, ro.log_probs, a, 1e-4), toy.theta, retain_graph=True)
    g_sf, = torch.autograd.grad(reinforce_loss(lp, a), toy.theta)
    torch.testing.assert_close(g_is, g_sf)


@pytest.mark.parametrize("share", [0.8, 1.2])
def test_the_per_step_ratio_follows_mixtures_of_two_policies(share):
    "Its mean is the sum over steps of the gradient with the new policy in that step alone; not the gradient at the new weights."
    old = ToyDenoiser()
    new = ToyDenoiser(old.theta + share * torch.tensor([0.2, 0.2, -0.1, -0.1]))
    mixtures = sum(expected_reward([old] * i + [new] + [old] * (3 - i), 4, 1.0) for i in range(4))
    followed, = torch.autograd.grad(mixtures, new.theta)
    def loss(toy, c, generators):
        ro = sample(old, c, 4, 1.0, generators)
        a = per_batch(leave_one_out, toy_reward(ro.x0), c)
        return ppo_loss(replay_log_prob(toy, ro, 1.0) * 2, ro.log_probs * 2, a, 1e9) * 4
    g = estimates(loss, new, 1500, 8)
    assert summary(g, followed[0]).z.abs().max() < 4 < summary(g, exact_gradient(new, 4, 1.0)).z.abs().max()


def test_one_advantage_for_all_samples_is_refused():
    with pytest.raises(ValueError, match="do not fit"): ppo_loss(torch.zeros(3), torch.zeros(3), torch.tensor(1.), .1)
