"The lab: other sizes and schedules, finite differences of the losses, how sharp the judge is."

import pytest
import torch
from samples import randn
from torch.testing import assert_close

from ddpo_scratch.diffusion import Conditioning, GaussianDenoiser, Schedule
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
from ddpo_scratch.methods.ppo import ppo_loss
from ddpo_scratch.rollout import generator_for, policy, replay_log_prob, sample

THETA = (0.2, -0.3, -0.5, -0.2)
LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def test_it_is_the_gaussian_denoiser_of_the_first_chapter():
    toy = ToyDenoiser((0.4, -0.7))
    other = GaussianDenoiser(toy.path, (1,), mu=0.4, s=torch.tensor(-0.7).exp())
    x, t = randn(6, 1), torch.tensor([0, 1, 2, 3, 0, 3])
    assert_close(toy(x, t, toy.encode([""] * 6)), other(x, t, None))


def test_each_sample_uses_its_own_copy_and_one_copy_serves_all():
    toy, x = ToyDenoiser(randn(3, 4)), randn(4, 2, seed=1)
    c, t = Conditioning(batch=torch.tensor([2, 0, 2, 1])), torch.full((4,), 2)
    together = toy(x, t, c)
    for i, k in enumerate(c.batch):
        alone = ToyDenoiser(toy.theta[k])(x[i : i + 1], t[:1], c[i])
        assert_close(together[i : i + 1], alone)


def test_protocol():
    toy = ToyDenoiser()
    assert toy.latent_shape == (2,) and toy.decode(torch.zeros(5, 2)).shape == (5, 3, 1, 2)
    toy.theta.data += 1
    with toy.reference():
        assert torch.equal(toy.theta.data, torch.tensor([THETA]))
    assert torch.equal(toy.theta.data, torch.tensor([THETA]) + 1)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(4, dtype=torch.long)])
def test_theta_that_makes_no_sense(bad):
    with pytest.raises(ValueError, match="theta"):
        ToyDenoiser(bad)


@pytest.mark.parametrize("n_steps, eta", [(1, 1.0), (4, 1.0), (4, 0.3), (2, 0.0)])
@pytest.mark.parametrize(
    "schedule",
    [
        None,
        Schedule(LINEAR, abar_final=float(LINEAR[0]), steps_offset=1),
        Schedule(LINEAR, spacing="trailing"),
    ],
)
def test_recursion_against_the_policy_itself(n_steps, eta, schedule):
    "The policy is affine in x_t: push mean and variance through its own mean and std."
    toy = ToyDenoiser(THETA, schedule).double()
    c, grid = toy.encode([""]), toy.path.grid(n_steps)
    m, v = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    for t, t_next in zip(grid[:-1], grid[1:]):
        mean, std = policy(toy, m, t, t_next, c, eta)
        slope = policy(toy, m + 1, t, t_next, c, eta)[0] - mean
        m, v = mean, slope**2 * v + std**2
    ours = expected_reward(toy, n_steps, eta)
    assert_close(ours, -((m - 1) ** 2 + v).mean(), rtol=1e-9, atol=1e-9)


def central_differences(f, theta, h=1e-6):
    "Differentiate f numerically at theta, a vector in float64."
    units = torch.eye(len(theta), dtype=torch.float64)
    with torch.no_grad():
        return torch.stack([(f(theta + h * e) - f(theta - h * e)) / (2 * h) for e in units])


def test_gradient_by_finite_differences():
    toy = ToyDenoiser(torch.tensor(THETA).double())

    def f(theta):
        return expected_reward(ToyDenoiser(theta), 4, 0.7, target=0.5)

    gradient = exact_gradient(toy, 4, 0.7, target=0.5)
    assert_close(gradient, central_differences(f, toy.theta[0]), rtol=1e-6, atol=1e-8)


def test_parts_add_up_and_no_step_gives_nothing():
    toy = ToyDenoiser(randn(6, dtype=torch.float64))
    parts = [exact_gradient(toy, 4, 1.0, steps=[i]) for i in range(4)]
    assert_close(sum(parts), exact_gradient(toy, 4, 1.0))
    assert_close(parts[2] + parts[3], exact_gradient(toy, 4, 1.0, steps=range(2, 4)))
    assert exact_gradient(toy, 4, 1.0, steps=[]).abs().max() == 0


def test_a_list_of_toys_is_one_policy_a_step():
    a, b = ToyDenoiser(THETA), ToyDenoiser((0.5, 0.5, -1.0, -1.0))
    assert torch.equal(expected_reward([a] * 4, 4, 1.0), expected_reward(a, 4, 1.0))
    assert expected_reward([a, a, b, b], 4, 1.0) != expected_reward([b, b, a, a], 4, 1.0)
    with pytest.raises(ValueError, match="one for each of 4 steps"):
        expected_reward([a] * 3, 4, 1.0)


def test_per_batch_takes_batches_of_different_size():
    c = Conditioning(batch=torch.tensor([0, 0, 0, 1, 1]))
    centred = per_batch(lambda v: v - v.mean(), torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]), c)
    assert centred.tolist() == [-1, 0, 1, -1, 1]


def score_function(toy, c, generators):
    rollout = sample(toy, c, 4, 1.0, generators)
    a = per_batch(leave_one_out, toy_reward(rollout.x0), c)
    return reinforce_loss(replay_log_prob(toy, rollout, 1.0), a)


def test_copies_equal_separate_batches():
    many = estimates(score_function, ToyDenoiser(), 3, 5, seed=2)
    for k in range(3):
        one, first = ToyDenoiser(), 2 * 10**9 + k * 5
        streams = [torch.Generator().manual_seed(first + i) for i in range(5)]
        loss = score_function(one, one.encode([""] * 5), streams)
        (gradient,) = torch.autograd.grad(loss, one.theta)
        assert_close(-gradient[0].double(), many[k], rtol=1e-4, atol=1e-5)


def test_the_judge_passes_the_right_and_fails_the_wrong():
    exact = exact_gradient(ToyDenoiser(), 4, 1.0)
    noise = randn(5000, 4, dtype=torch.float64)
    right, wrong = summary(exact + noise, exact), summary(exact * 1.2 + noise, exact)
    assert right.z.abs().max() < 4 < wrong.z.abs().max() and wrong.cosine > 0.99
    assert_close(right.variance, 4.0, rtol=0.05, atol=0)
    assert_close(right.relative_error(100), 0.2 / exact.norm().item(), rtol=0.15, atol=0)
    assert_close(wrong.relative_error(10**9), 0.2, rtol=0.2, atol=0)


LOSSES = {
    "reinforce": lambda log_prob, old, a: reinforce_loss(log_prob, a),
    "ppo": lambda log_prob, old, a: ppo_loss(log_prob, old, a, 1e9),
    "ppo clipped": lambda log_prob, old, a: ppo_loss(log_prob, old, a, 0.02),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_through_the_sampler_by_finite_differences(loss):
    "Replay in float64 under weights that have moved: autograd against central differences."
    old = ToyDenoiser(torch.tensor(THETA).double())
    streams = [generator_for(3, i) for i in range(12)]
    rollout = sample(old, old.encode([""] * 12), 4, 1.0, streams, dtype=torch.float64)
    assert rollout.xs.dtype == rollout.log_probs.dtype == torch.float64
    a = leave_one_out(toy_reward(rollout.x0)).double()

    def value(toy):
        return loss(replay_log_prob(toy, rollout, 1.0), rollout.log_probs, a)

    new = ToyDenoiser(old.theta + torch.tensor([0.05, 0.1, -0.03, 0.08]).double())
    (gradient,) = torch.autograd.grad(value(new), new.theta)
    differences = central_differences(lambda theta: value(ToyDenoiser(theta)), new.theta[0])
    assert_close(gradient[0], differences, rtol=1e-6, atol=1e-9)
    assert gradient.abs().min() > 1e-4


def test_steps_of_the_gradient_count_from_the_end_where_negative():
    toy = ToyDenoiser(THETA)
    assert torch.equal(exact_gradient(toy, 4, 1.0, [-1]), exact_gradient(toy, 4, 1.0, [3]))
    with pytest.raises(IndexError):
        exact_gradient(toy, 4, 1.0, [4])


def test_a_toy_predicts_eps():
    with pytest.raises(ValueError, match="a toy predicts eps, given a schedule of 'v_prediction'"):
        ToyDenoiser(schedule=Schedule(LINEAR, prediction_type="v_prediction"))
