"What would bore a reader of 09: weights against numpy, ties and rounding, dtypes, gradients, minibatches, bad input."

import math

import numpy as np
import pytest
import torch

from ddpo_scratch.diffusion import GaussianDenoiser, Schedule, add_noise, eps_loss
from ddpo_scratch.methods.rwr import rwr_loss, softmax_weights, sparse_weights

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
KINDS = [
    list,
    np.array,
    torch.tensor,
    lambda r: torch.tensor(r, dtype=torch.int32),
    lambda r: torch.tensor(r, dtype=torch.float16),
    lambda r: torch.tensor(r, dtype=torch.bfloat16),
    lambda r: torch.tensor(r, dtype=torch.float32, requires_grad=True),
]


def normal(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.7, 30.0])
@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_softmax_weights_against_numpy(n, beta):
    r = normal(n, n).numpy() * 2 + 5
    want = np.exp(beta * (r - r.max()))
    want /= want.mean()
    got = softmax_weights(r, beta)
    assert got.dtype == torch.float32 and got.shape == (n,)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-12)
    assert abs(got.double().mean() - 1) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_types(kind):
    for w in (softmax_weights(kind([1, 2, 6]), 0.5), sparse_weights(kind([1, 2, 6]), 0.3)):
        assert w.dtype == torch.float32 and not w.requires_grad
    torch.testing.assert_close(
        softmax_weights(kind([1, 2, 6]), 0.5), 3 * torch.tensor([0.5, 1.0, 3.0]).softmax(0)
    )
    assert sparse_weights(kind([1, 2, 6]), 0.3).tolist() == [0, 0, 3]


def test_softmax_weights_keep_order_and_ignore_an_offset():
    r = normal(50)
    w = softmax_weights(r, 3.0)
    assert torch.equal(w.argsort(), r.argsort())
    torch.testing.assert_close(softmax_weights(r - 1e4, 3.0), w, rtol=1e-5, atol=0)
    torch.testing.assert_close(softmax_weights(1000 * r, 0.003), w)  # beta has the unit 1 / reward
    order = torch.randperm(50)
    torch.testing.assert_close(softmax_weights(r[order], 3.0), w[order])


def test_softmax_weights_in_float64_tell_close_rewards_apart():
    "1e6 and 1e6 + 0.01 are one number in float32."
    r = torch.tensor([1e6, 1e6 + 0.01], dtype=torch.float64)
    torch.testing.assert_close(
        softmax_weights(r, 100.0), 2 * torch.tensor([0.0, 1.0]).softmax(0), rtol=1e-5, atol=0
    )


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
    den = GaussianDenoiser(Schedule(ABAR, prediction_type=prediction_type), shape, mu=0.3).to(dtype)
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(n, *shape, generator=g, dtype=dtype)
    return den, (draw(), draw(), torch.randint(1000, (n,), generator=g), den.encode(["-"] * n))


@pytest.mark.parametrize("shape", [(3,), (3, 4, 4)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_weighted_mean_of_the_denoising_loss(prediction_type, shape):
    den, args = batch(shape=shape, prediction_type=prediction_type)
    w = normal(6).exp().float()
    each = torch.stack(
        [eps_loss(den, *(a[i : i + 1] for a in args[:3]), args[3][i])[0] for i in range(6)]
    )
    torch.testing.assert_close(rwr_loss(den, *args, w), (w * each).sum() / 6)


def test_loss_by_hand():
    den, (x0, eps, t, c) = batch()
    w = softmax_weights(normal(6), 2.0)
    x_t = add_noise(x0, eps, t, den.path)
    torch.testing.assert_close(
        rwr_loss(den, x0, eps, t, c, w), (w[:, None] * (den(x_t, t, c) - eps) ** 2).mean()
    )


def test_one_timestep_for_all_and_weights_of_any_kind():
    den, (x0, eps, _, c) = batch()
    want = rwr_loss(den, x0, eps, torch.full((6,), 300), c, torch.arange(6.0))
    for w in (list(range(6)), np.arange(6), torch.arange(6), torch.arange(6, dtype=torch.float64)):
        got = rwr_loss(den, x0, eps, 300, c, w)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want)


def test_gradient_goes_to_the_weights_of_the_model_only():
    den, (x0, eps, t, c) = batch()
    w, x0 = torch.ones(6, requires_grad=True), x0.requires_grad_(False)
    rwr_loss(den, x0, eps, t, c, w).backward()
    assert w.grad is None and den.mu.grad.abs().sum() > 0


def test_minibatches_average_to_the_round():
    "Weights of mean 1 over the round make equal minibatches an unbiased split of its loss."
    den, (x0, eps, t, c) = batch()
    w = softmax_weights(normal(6), 3.0)
    parts = [rwr_loss(den, x0[i], eps[i], t[i], c[i], w[i]) for i in torch.randperm(6).split(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), rwr_loss(den, x0, eps, t, c, w))


def test_a_sample_without_weight_has_no_say():
    den, (x0, eps, t, c) = batch()
    w = torch.tensor([0.0, 0.0, 3.0, 3.0, 0.0, 0.0])
    a = torch.autograd.grad(rwr_loss(den, x0, eps, t, c, w), den.mu)[0]
    x0[[0, 1, 4, 5]] += 7.0
    torch.testing.assert_close(
        torch.autograd.grad(rwr_loss(den, x0, eps, t, c, w), den.mu)[0], a, rtol=0, atol=0
    )


def test_finite_differences_in_float64():
    den, (x0, eps, t, c) = batch(dtype=torch.float64)
    w = normal(6).exp()

    def loss(mu):
        with torch.no_grad():
            den.mu.copy_(mu)
        return rwr_loss(den, x0, eps, t, c, w)

    mu, h = den.mu.detach().clone(), 1e-5
    (gradient,) = torch.autograd.grad(loss(mu), den.mu)
    assert gradient.dtype == torch.float64
    differences = torch.stack(
        [
            (loss(mu + h * e) - loss(mu - h * e)).detach() / (2 * h)
            for e in torch.eye(3, dtype=torch.float64)
        ]
    )
    torch.testing.assert_close(gradient, differences, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (5,), (6, 1), (1, 6), (7,)])
def test_weights_that_do_not_fit(shape):
    den, args = batch()
    with pytest.raises(ValueError, match="one weight a sample"):
        rwr_loss(den, *args, torch.ones(shape))


@pytest.mark.parametrize(
    "weigh", [lambda r: softmax_weights(r, 4.0), lambda r: sparse_weights(r, 0.2)]
)
def test_regression_moves_the_mean_to_the_weighted_mean_of_the_samples(weigh):
    "The optimum of the weighted loss in mu, for data with the denoiser's own spread, is the weighted mean."
    den, _ = batch()
    x0 = 0.5 * normal(4000).view(-1, 1).repeat(1, 3).float()
    w = weigh(x0[:, 0])
    optimizer = torch.optim.Adam([den.mu], lr=0.02)
    g = torch.Generator().manual_seed(1)
    trail = []
    for _ in range(300):
        loss = rwr_loss(
            den,
            x0,
            torch.randn(x0.shape, generator=g),
            torch.randint(1000, (4000,), generator=g),
            den.encode(["-"] * 4000),
            w,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trail.append(den.mu.detach().clone())
    torch.testing.assert_close(
        torch.stack(trail[-100:]).mean(0), (w[:, None] * x0).mean(0), rtol=0, atol=0.02
    )


def test_the_smallest_share_keeps_one():
    assert sparse_weights([1.0, 3.0, 2.0], 1e-10).tolist() == [0.0, 3.0, 0.0]
