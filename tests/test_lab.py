"What would bore a reader of 05b: other sizes and schedules, float64, finite differences of the losses, how sharp the judge is."
import pytest
import torch

from ddpo_scratch.diffusion import Conditioning, GaussianDenoiser, Schedule
from ddpo_scratch.lab import ToyDenoiser, estimates, exact_gradient, expected_reward, per_batch, summary, toy_reward
from ddpo_scratch.policy_gradient import leave_one_out, reinforce_loss
from ddpo_scratch.ppo import ppo_loss
from ddpo_scratch.rollout import generator_for, policy, replay_log_prob, sample

THETA = (0.2, -0.3, -0.5, -0.2)
LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def draw(toy, n, n_steps=4, eta=1.0, dtype=torch.float32):
    return sample(toy, toy.encode([""] * n), n_steps, eta, [generator_for(3, i) for i in range(n)], dtype=dtype)


def test_it_is_the_gaussian_denoiser_of_the_first_chapter():
    toy, other = ToyDenoiser((0.4, -0.7)), GaussianDenoiser(ToyDenoiser().schedule, (1,), mu=0.4, s=float(torch.tensor(-0.7).exp()))
    x, t = torch.randn(6, 1), torch.tensor([0, 1, 2, 3, 0, 3])
    torch.testing.assert_close(toy(x, t, toy.encode([""] * 6)), other(x, t, None))


def test_each_sample_uses_its_own_copy_and_one_copy_serves_all():
    toy = ToyDenoiser(torch.randn(3, 4))
    c, x, t = Conditioning(batch=torch.tensor([2, 0, 2, 1])), torch.randn(4, 2), torch.full((4,), 2)
    want = torch.cat([ToyDenoiser(toy.theta[k])(x[i:i+1], t[:1], c[i]) for i, k in enumerate((2, 0, 2, 1))])
    torch.testing.assert_close(toy(x, t, c), want)


def test_protocol():
    toy = ToyDenoiser()
    assert toy.latent_shape == (2,) and toy.decode(torch.zeros(5, 2)).shape == (5, 3, 1, 2)
    toy.theta.data += 1
    with toy.reference(): assert torch.equal(toy.theta.data, torch.tensor([THETA]))
    assert torch.equal(toy.theta.data, torch.tensor([THETA]) + 1)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(4, dtype=torch.long)])
def test_theta_that_makes_no_sense(bad):
    with pytest.raises(ValueError, match="theta"): ToyDenoiser(bad)


@pytest.mark.parametrize("n_steps, eta", [(1, 1.0), (4, 1.0), (4, 0.3), (2, 0.0)])
@pytest.mark.parametrize("schedule", [None, Schedule(LINEAR, abar_final=float(LINEAR[0]), steps_offset=1), Schedule(LINEAR, spacing="trailing")])
def test_recursion_against_the_policy_itself(n_steps, eta, schedule):
    "The policy is affine in x_t: push mean and variance through its own mean and std."
    toy = ToyDenoiser(THETA, schedule).double()
    c, grid = toy.encode([""]), toy.schedule.grid(n_steps)
    m, v = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    for t, t_next in zip(grid[:-1], grid[1:]):
        mean, std = policy(toy, m, t, t_next, c, eta)
        slope = policy(toy, m + 1, t, t_next, c, eta)[0] - mean
        m, v = mean, slope**2 * v + std**2
    want = -((m - 1)**2 + v).mean()
    torch.testing.assert_close(expected_reward(toy, n_steps, eta), want, rtol=1e-9, atol=1e-9)


def test_gradient_by_finite_differences():
    toy = ToyDenoiser(torch.tensor(THETA).double())
    def f(theta):
        t = ToyDenoiser(theta.detach())
        return expected_reward(t, 4, 0.7, target=0.5).detach()
    h = 1e-6
    want = torch.stack([(f(toy.theta[0] + h*e) - f(toy.theta[0] - h*e)) / (2*h) for e in torch.eye(4).double()])
    torch.testing.assert_close(exact_gradient(toy, 4, 0.7, target=0.5), want, rtol=1e-6, atol=1e-8)


def test_parts_add_up_and_no_step_gives_nothing():
    toy = ToyDenoiser(torch.randn(6).double())
    parts = [exact_gradient(toy, 4, 1.0, steps=[i]) for i in range(4)]
    torch.testing.assert_close(sum(parts), exact_gradient(toy, 4, 1.0))
    torch.testing.assert_close(parts[2] + parts[3], exact_gradient(toy, 4, 1.0, steps=range(2, 4)))
    assert exact_gradient(toy, 4, 1.0, steps=[]).abs().max() == 0


def test_a_list_of_toys_is_one_policy_a_step():
    a, b = ToyDenoiser(THETA), ToyDenoiser((0.5, 0.5, -1., -1.))
    assert torch.equal(expected_reward([a]*4, 4, 1.0), expected_reward(a, 4, 1.0))
    assert expected_reward([a, a, b, b], 4, 1.0) != expected_reward([b, b, a, a], 4, 1.0)
    with pytest.raises(ValueError, match="one for each of 4 steps"): expected_reward([a]*3, 4, 1.0)


def test_per_batch_takes_batches_of_different_size():
    c = Conditioning(batch=torch.tensor([0, 0, 0, 1, 1]))
    assert per_batch(lambda v: v - v.mean(), torch.tensor([1., 2., 3., 5., 7.]), c).tolist() == [-1, 0, 1, -1, 1]


def sf(toy, c, generators):
    ro = sample(toy, c, 4, 1.0, generators)
    return reinforce_loss(replay_log_prob(toy, ro, 1.0), per_batch(leave_one_out, toy_reward(ro.x0), c)) * 8


def test_copies_equal_separate_batches():
    toy = ToyDenoiser()
    many = estimates(sf, toy, 3, 5, seed=2)
    for k in range(3):
        one = ToyDenoiser(THETA)
        loss = sf(one, one.encode([""]*5), [torch.Generator().manual_seed(2*10**9 + k*5 + i) for i in range(5)])
        torch.testing.assert_close(-torch.autograd.grad(loss, one.theta)[0][0].double(), many[k], rtol=1e-4, atol=1e-5)


def test_the_judge_passes_the_right_and_fails_the_wrong():
    toy, g = ToyDenoiser(), torch.Generator().manual_seed(0)
    exact = exact_gradient(toy, 4, 1.0)
    noise = torch.randn(5000, 4, generator=g, dtype=torch.float64)
    right, wrong = summary(exact + noise, exact), summary(exact*1.2 + noise, exact)
    assert right.z.abs().max() < 4 < wrong.z.abs().max() and wrong.cosine > 0.99
    torch.testing.assert_close(right.variance, 4.0, rtol=.05, atol=0)
    torch.testing.assert_close(right.relative_error(100), 0.2 / exact.norm().item(), rtol=.15, atol=0)
    torch.testing.assert_close(wrong.relative_error(10**9), 0.2, rtol=.2, atol=0)


@pytest.mark.parametrize("loss", ["reinforce", "ppo", "ppo clipped"])
def test_losses_through_the_sampler_by_finite_differences(loss):
    "Replay in float64 under weights that have moved: autograd against central differences, mean and variance weights alike."
    old = ToyDenoiser(torch.tensor(THETA).double())
    ro = draw(old, 12, dtype=torch.float64)
    assert ro.xs.dtype == ro.log_probs.dtype == torch.float64
    a = leave_one_out(toy_reward(ro.x0)).double()
    def value(theta):
        lp = replay_log_prob(ToyDenoiser(theta) if not theta.requires_grad else live, ro, 1.0)
        return reinforce_loss(lp, a) if loss == "reinforce" else ppo_loss(lp, ro.log_probs, a, 1e9 if loss == "ppo" else 0.02)
    live = ToyDenoiser(old.theta + torch.tensor([0.05, 0.1, -0.03, 0.08]).double())
    gradient, = torch.autograd.grad(value(live.theta), live.theta)
    theta, h = live.theta.detach(), 1e-6
    want = torch.stack([(value(theta + h*e) - value(theta - h*e)) / (2*h) for e in torch.eye(4).double()])
    torch.testing.assert_close(gradient[0], want, rtol=1e-6, atol=1e-9)
    assert gradient.abs().min() > 1e-4


def test_steps_of_the_gradient_count_from_the_end_where_negative():
    toy = ToyDenoiser(THETA)
    torch.testing.assert_close(exact_gradient(toy, 4, 1., [-1]), exact_gradient(toy, 4, 1., [3]), rtol=0, atol=0)
    with pytest.raises(IndexError): exact_gradient(toy, 4, 1., [4])


def test_a_toy_predicts_eps():
    with pytest.raises(ValueError, match="a toy predicts eps, given a schedule of 'v_prediction'"): ToyDenoiser(schedule=Schedule(LINEAR, prediction_type="v_prediction"))
