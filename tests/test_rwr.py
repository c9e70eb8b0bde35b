"Reward-weighted regression: weights against numpy, ties, gradients, minibatches, bad input."

import math

import numpy as np
import pytest
import torch
from samples import of_all_types, randn, type_name
from torch.testing import assert_close

from ddpo_scratch.diffusion import GaussianDenoiser, Schedule, add_noise, eps_loss
from ddpo_scratch.methods.rwr import rwr_loss, softmax_weights, sparse_weights

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def normal(n, seed=0):
    return randn(n, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.7, 30.0])
@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_softmax_weights_against_numpy(n, beta):
    r = normal(n, n).numpy() * 2 + 5
    theirs = np.exp(beta * (r - r.max()))
    theirs /= theirs.mean()
    ours = softmax_weights(r, beta)
    assert ours.dtype == torch.float32 and ours.shape == (n,)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-12)
    assert abs(ours.double().mean() - 1) < 1e-6


@pytest.mark.parametrize("rewards", of_all_types([1, 2, 6]), ids=type_name)
def test_types(rewards):
    softmax, sparse = softmax_weights(rewards, 0.5), sparse_weights(rewards, 0.3)
    assert softmax.dtype == sparse.dtype == torch.float32
    assert not softmax.requires_grad and not sparse.requires_grad
    assert_close(softmax, 3 * torch.tensor([0.5, 1.0, 3.0]).softmax(0))
    assert sparse.tolist() == [0, 0, 3]


def test_softmax_weights_keep_order_and_ignore_an_offset():
    r = normal(50)
    w = softmax_weights(r, 3.0)
    assert torch.equal(w.argsort(), r.argsort())
    assert_close(softmax_weights(r - 1e4, 3.0), w, rtol=1e-5, atol=0)
    assert_close(softmax_weights(1000 * r, 0.003), w)  # beta has the unit 1 / reward
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert_close(softmax_weights(r[order], 3.0), w[order])


def test_softmax_weights_in_float64_tell_close_rewards_apart():
    "1e6 and 1e6 + 0.01 are one number in float32."
    r = torch.tensor([1e6, 1e6 + 0.01], dtype=torch.float64)
    apart = 2 * torch.tensor([0.0, 1.0]).softmax(0)
    assert_close(softmax_weights(r, 100.0), apart, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 40, 99, 100, 101, 1000])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 1.0])
def test_sparse_weights_keep_the_rounded_up_share(n, fraction):
    r = normal(n, n)
    w = sparse_weights(r, fraction)
    n_kept = math.ceil(round(fraction * n, 6))
    assert int((w > 0).sum()) == n_kept and abs(w.double().mean() - 1) < 1e-6
    assert set(w.tolist()) <= {0.0, torch.tensor(n / n_kept).item()}
    assert n_kept == n or r[w > 0].min() > r[w == 0].max()


@pytest.mark.parametrize("n", [1, 7, 10, 11, 128, 1000])
def test_sparse_weights_of_a_tenth_are_the_papers_percentile(n):
    r = normal(n, n + 1).numpy()
    assert np.array_equal(sparse_weights(r, 0.1).numpy() > 0, r >= np.percentile(r, 90))


def test_ties_are_kept_whatever_their_order():
    r = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0, 0.0, 0.0, 0.0])
    for seed in range(5):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        w = sparse_weights(r[order], 0.125)
        assert torch.equal(w > 0, r[order] == 3) and abs(w.mean() - 1) < 1e-6
    assert (sparse_weights([0.1] * 77, 0.1) == 1).all() and (sparse_weights([3.0], 0.01) == 1).all()


@pytest.mark.parametrize("bad", [[], [[1.0]], 3.0, [float("nan")], [1.0, float("-inf")]])
def test_bad_rewards(bad):
    with pytest.raises(ValueError, match="softmax_weights"):
        softmax_weights(bad, 1.0)
    with pytest.raises(ValueError, match="sparse_weights"):
        sparse_weights(bad, 0.5)


@pytest.mark.parametrize("beta", [-0.1, float("nan"), float("inf")])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta"):
        softmax_weights([1.0, 2.0], beta)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, 10, float("nan")])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match="fraction"):
        sparse_weights([1.0, 2.0], fraction)


def batch(n=6, shape=(3,), prediction_type="epsilon", dtype=torch.float32):
    "Return a denoiser and (x0, eps, t, c) of n samples."
    path = Schedule(ABAR, prediction_type=prediction_type)
    denoiser = GaussianDenoiser(path, shape, mu=0.3).to(dtype)
    x0, eps = (randn(n, *shape, seed=seed, dtype=dtype) for seed in (0, 1))
    t = path.draw_t(n, torch.Generator().manual_seed(2))
    return denoiser, (x0, eps, t, denoiser.encode(["-"] * n))


@pytest.mark.parametrize("shape", [(3,), (3, 4, 4)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_weighted_mean_of_the_denoising_loss(prediction_type, shape):
    denoiser, (x0, eps, t, c) = batch(shape=shape, prediction_type=prediction_type)
    w = normal(6).exp().float()
    each = []
    for i in range(6):
        one = slice(i, i + 1)
        each.append(eps_loss(denoiser, x0[one], eps[one], t[one], c[one]))
    weighted = w * torch.cat(each)
    assert_close(rwr_loss(denoiser, x0, eps, t, c, w), weighted.mean())
    assert_close(rwr_loss(denoiser, x0, eps, t, c, w, reduction="none"), weighted)


def test_loss_by_hand():
    denoiser, (x0, eps, t, c) = batch()
    w = softmax_weights(normal(6), 2.0)
    x_t = add_noise(x0, eps, t, denoiser.path)
    by_hand = (w[:, None] * (denoiser(x_t, t, c) - eps) ** 2).mean()
    assert_close(rwr_loss(denoiser, x0, eps, t, c, w), by_hand)


@pytest.mark.parametrize("w", of_all_types([0, 1, 2, 3, 4, 5]), ids=type_name)
def test_one_timestep_for_all_and_weights_of_any_type(w):
    denoiser, (x0, eps, _, c) = batch()
    ours = rwr_loss(denoiser, x0, eps, 300, c, w)
    assert ours.dtype == torch.float32
    t = torch.full((6,), 300)
    assert_close(ours, rwr_loss(denoiser, x0, eps, t, c, torch.arange(6.0)))


def test_gradient_goes_to_the_weights_of_the_model_only():
    denoiser, args = batch()
    w = torch.ones(6, requires_grad=True)
    rwr_loss(denoiser, *args, w).backward()
    assert w.grad is None and denoiser.mu.grad.abs().sum() > 0


def test_minibatches_average_to_the_round():
    "Weights of mean 1 over the round make equal minibatches an unbiased split of its loss."
    denoiser, (x0, eps, t, c) = batch()
    w = softmax_weights(normal(6), 3.0)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    parts = [rwr_loss(denoiser, x0[i], eps[i], t[i], c[i], w[i]) for i in order.split(2)]
    assert_close(torch.stack(parts).mean(), rwr_loss(denoiser, x0, eps, t, c, w))


def test_a_sample_without_weight_has_no_say():
    denoiser, (x0, *others) = batch()
    w = torch.tensor([0.0, 0.0, 3.0, 3.0, 0.0, 0.0])
    (before,) = torch.autograd.grad(rwr_loss(denoiser, x0, *others, w), denoiser.mu)
    x0[[0, 1, 4, 5]] += 7.0
    (after,) = torch.autograd.grad(rwr_loss(denoiser, x0, *others, w), denoiser.mu)
    assert torch.equal(before, after)


def test_finite_differences_in_float64():
    denoiser, args = batch(dtype=torch.float64)
    w = normal(6).exp()

    def loss(mu):
        with torch.no_grad():
            denoiser.mu.copy_(mu)
        return rwr_loss(denoiser, *args, w)

    mu, h = denoiser.mu.detach().clone(), 1e-5
    (gradient,) = torch.autograd.grad(loss(mu), denoiser.mu)
    assert gradient.dtype == torch.float64
    units = torch.eye(3, dtype=torch.float64)
    differences = [(loss(mu + h * e) - loss(mu - h * e)).detach() / (2 * h) for e in units]
    assert_close(gradient, torch.stack(differences), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (5,), (6, 1), (1, 6), (7,)])
def test_weights_that_do_not_fit(shape):
    denoiser, args = batch()
    with pytest.raises(ValueError, match="one weight a sample"):
        rwr_loss(denoiser, *args, torch.ones(shape))


@pytest.mark.parametrize("weigh, number", [(softmax_weights, 4.0), (sparse_weights, 0.2)])
def test_regression_moves_the_mean_to_the_weighted_mean_of_the_samples(weigh, number):
    "That is the optimum in mu for data with the denoiser's own spread."
    denoiser, _ = batch()
    x0 = 0.5 * normal(4000).view(-1, 1).repeat(1, 3).float()
    w, c = weigh(x0[:, 0], number), denoiser.encode(["-"] * 4000)
    optimizer = torch.optim.Adam([denoiser.mu], lr=0.02)
    g = torch.Generator().manual_seed(1)
    trail = []
    for _ in range(300):
        eps = torch.randn(x0.shape, generator=g)
        loss = rwr_loss(denoiser, x0, eps, denoiser.path.draw_t(4000, g), c, w)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trail.append(denoiser.mu.detach().clone())
    ours = torch.stack(trail[-100:]).mean(0)
    assert_close(ours, (w[:, None] * x0).mean(0), rtol=0, atol=0.02)


def test_the_smallest_share_keeps_one():
    assert sparse_weights([1.0, 3.0, 2.0], 1e-10).tolist() == [0.0, 3.0, 0.0]
