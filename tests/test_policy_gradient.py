"The policy gradient: closed forms in several shapes, shifts, bias in the lab, bad input."

import pytest
import torch
from samples import randn
from torch.testing import assert_close

from ddpo_scratch.lab import ToyDenoiser, estimates, exact_gradient, per_batch, summary, toy_reward
from ddpo_scratch.methods.policy_gradient import leave_one_out, reinforce_loss
from ddpo_scratch.rollout import replay_log_prob, sample


@pytest.mark.parametrize("n", [2, 3, 17, 256])
def test_leave_one_out_is_reward_minus_the_mean_of_the_others(n):
    r = randn(n, seed=n, dtype=torch.float64) * 3 + 5
    by_hand = torch.stack([r[i] - torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(n)])
    ours = leave_one_out(r).double()
    assert_close(ours, by_hand, rtol=1e-5, atol=1e-6)
    assert_close(ours * (n - 1) / n, r - r.mean(), rtol=1e-5, atol=1e-6)


def test_leave_one_out_ignores_an_offset_and_takes_integers_and_lists():
    ours = leave_one_out([1, 2, 6])
    assert_close(ours, leave_one_out(torch.tensor([1001.0, 1002.0, 1006.0])))
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("bad", [[], [1.0], [[1.0, 2.0]], [1.0, float("nan")], [1.0, float("inf")]])
def test_leave_one_out_refuses(bad):
    with pytest.raises(ValueError, match="leave_one_out"):
        leave_one_out(bad)


@pytest.mark.parametrize("shape", [(5,), (5, 7)])
def test_gradient_of_the_loss_is_minus_advantage_over_count(shape):
    log_prob = randn(*shape).requires_grad_()
    advantage = randn(5, seed=1).requires_grad_()
    reinforce_loss(log_prob, advantage).backward()
    each = advantage.detach().view(5, *[1] * (len(shape) - 1)).expand(shape)
    assert_close(log_prob.grad, -each / log_prob.numel())
    assert advantage.grad is None  # a constant


def test_micro_batches_add_up():
    log_prob, advantage = randn(6, 4), randn(6, seed=1)
    total = 0.0
    for i in torch.arange(6).split(4):
        total += reinforce_loss(log_prob[i], advantage[i]) * len(i) / 6
    assert_close(total, reinforce_loss(log_prob, advantage))
    each = reinforce_loss(log_prob, advantage, reduction="none")
    assert_close(each.mean(), reinforce_loss(log_prob, advantage))


@pytest.mark.parametrize(
    "log_prob, advantage",
    [
        ((4,), (3,)),
        ((4, 1), (1, 4)),
        ((4, 2), (2,)),
        ((4, 4), (4, 1)),
        ((0,), (0,)),
        ((4,), (4, 4)),
    ],
)
def test_shapes_that_do_not_fit(log_prob, advantage):
    with pytest.raises(ValueError, match="do not fit"):
        reinforce_loss(torch.zeros(log_prob), torch.zeros(advantage))


@pytest.mark.parametrize(
    "theta, eta, n_steps",
    [
        ((0.2, -0.3, -0.5, -0.2), 0.5, 4),
        ((0.5, -0.4), 1.0, 2),
        ((0.1, 0.9, -0.2, -1.0, 0.1, -0.5), 1.0, 3),
    ],
)
def test_leave_one_out_is_unbiased_and_the_batch_mean_short_by_its_share(theta, eta, n_steps):
    toy, d = ToyDenoiser(theta), len(theta) // 2
    exact = exact_gradient(toy, n_steps, eta)

    def sf(advantage):
        def loss(toy, c, generators):
            rollout = sample(toy, c, n_steps, eta, generators)
            a = per_batch(advantage, toy_reward(rollout.x0), c)
            return reinforce_loss(replay_log_prob(toy, rollout, eta), a) * n_steps * d

        return loss

    g = estimates(sf(leave_one_out), toy, 2000, 3)
    assert summary(g, exact).z.abs().max() < 4
    with_the_mean = estimates(sf(lambda r: r - r.mean()), toy, 2000, 3)
    assert_close(with_the_mean.mean(0), g.mean(0) * 2 / 3, rtol=1e-4, atol=1e-4)


def test_one_advantage_for_all_samples_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        reinforce_loss(torch.zeros(3), torch.tensor(1.0))
