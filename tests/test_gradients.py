"""DRTune, Adjoint Matching and SRPO: pictures of `sample`, gradients by hand, closed forms.

Adjoint Matching against the regression it is published as, and against Gaussians that are tilted.
"""

import contextlib
import dataclasses
import types

import pytest
import torch
from differences import slope_along
from runs import small, trained, whole_and_resumed
from samples import generators, randn, schedule, with_lora
from torch.testing import assert_close

from ddpo_scratch.config import TrainConfig, check_config
from ddpo_scratch.diffusion import Conditioning, Denoiser, GaussianDenoiser, Schedule
from ddpo_scratch.flow import FlowPath
from ddpo_scratch.methods.backprop import truncated_sample
from ddpo_scratch.methods.base import find_method
from ddpo_scratch.methods.gradients import (
    adjoint_sample,
    direct_align,
    drtune_sample,
    matching_loss,
    spread_steps,
)
from ddpo_scratch.rewards.base import RelativeReward, Reward, get_reward
from ddpo_scratch.rewards.jpeg import jpeg_size_estimate
from ddpo_scratch.rollout import (
    draw,
    generator_for,
    policy,
    sample,
    step_rule,
    trainable_steps,
)
from ddpo_scratch.run.setup import setup
from ddpo_scratch.train import backprop_update

T = 4
WIDE = dict(dtype=torch.float64)


@pytest.fixture
def toy():
    return GaussianDenoiser(schedule(), (3, 4, 4), mu=0.3).double()


@pytest.fixture(scope="module")
def exact():
    "Return the embedded model with a LoRA off zero, all in float64, and its parameters."
    return with_lora(torch.float64)


def flat_grad(value, params):
    "Differentiate a scalar, and join the gradients of all parameters."
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])


def of(denoiser):
    "Return a function that scores latents with a gradient, the higher the better."
    return lambda x0: -jpeg_size_estimate(denoiser.decode(x0)).mean()


# ---------------------------------------------------------------- which steps


@pytest.mark.parametrize("n, k", [(10, 1), (10, 3), (7, 7), (20, 4)])
def test_every_step_is_chosen_as_often_and_they_are_equally_spaced(n, k):
    counts, draws = torch.zeros(n), 1000
    for i in range(draws):
        steps = spread_steps(n, k, generator_for(0, i))
        gaps = {b - a for a, b in zip(steps, steps[1:])}
        assert len(set(steps)) == k and gaps <= {n // k, -(-n // k)}
        counts[steps] += 1
    stderr = (k / n * (1 - k / n) / draws) ** 0.5
    assert ((counts / draws - k / n).abs() <= 4 * stderr + 1e-6).all()


@pytest.mark.parametrize("k", [0, 11])
def test_too_many_or_no_steps(k):
    with pytest.raises(ValueError, match=f"k={k} is out of range"):
        spread_steps(10, k)


# ---------------------------------------------------------------- DRTune


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("changes", [{}, dict(prediction_type="v_prediction")])
def test_pictures_are_those_of_sample(eta, dtype, changes):
    d = GaussianDenoiser(schedule(**changes), (2, 4, 4), mu=0.3)
    c, streams = d.encode(["-"] * 3), generators(3)
    x0 = sample(d, c, T, eta, streams, dtype=dtype).x0
    after = draw(streams, (1,), "cpu")
    streams = generators(3)
    ours = drtune_sample(d, c, T, eta, streams, [0, 2], dtype=dtype)
    assert torch.equal(ours, x0) and ours.dtype == dtype and ours.requires_grad
    assert torch.equal(draw(streams, (1,), "cpu"), after)
    if eta:
        streams = generators(3)
        ours, kl = adjoint_sample(d, c, T, eta, streams, [0, 2], dtype=dtype)
        assert torch.equal(ours, x0) and ours.dtype == dtype and ours.requires_grad
        assert torch.equal(draw(streams, (1,), "cpu"), after)
        assert kl.shape == (3, 2) and (kl == 0).all()


def test_an_early_stop_predicts_the_picture(toy):
    c = toy.encode(["-"] * 3)
    r = sample(toy, c, T, 1.0, generators(3), **WIDE)
    for stop in range(T):
        t = r.timesteps[stop]
        x0 = toy.path.x0_eps(r.xs[:, stop], toy(r.xs[:, stop], t, c), t)[0]
        ours = drtune_sample(toy, c, T, 1.0, generators(3), [0], stop, **WIDE)
        assert_close(ours, x0, rtol=1e-12, atol=1e-12)


def slopes(d, grid, eta):
    "Return how each step's mean moves with its latent and with the network's prediction, apart."
    rows, rule = [], step_rule(eta)
    for t, t_next in zip(grid[:-1], grid[1:]):
        one, zero = torch.ones(1, 1, **WIDE), torch.zeros(1, 1, **WIDE)
        by_x = rule.mean_std(d.path, one, zero, t, t_next)[0].item()
        by_prediction = rule.mean_std(d.path, zero, one, t, t_next)[0].item()
        rows.append((by_x, by_prediction))
    return rows


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [[0], [3], [0, 2], [0, 1, 2, 3]])
def test_gradient_on_a_linear_network_by_hand(toy, eta, steps):
    "Sum B_i times the A_j after it: no step's network is asked how it moves with its input."
    grid, by_hand = toy.path.grid(T), 0.0
    rows = slopes(toy, grid, eta)
    for i in steps:
        abar = toy.path.abar[grid[i]]
        # how the Gaussian's eps moves with mu
        told = -((1 - abar) * abar).sqrt() / (abar * toy.s**2 + 1 - abar)
        weight = rows[i][1]
        for by_x, _ in rows[i + 1 :]:
            weight *= by_x
        by_hand += (weight * told).item()
    x0 = drtune_sample(toy, toy.encode(["-"] * 3), T, eta, generators(3), steps, **WIDE)
    (gradient,) = torch.autograd.grad(x0.sum() / 3, toy.mu)
    assert_close(gradient, torch.full_like(gradient, by_hand), rtol=1e-10, atol=1e-12)


def test_a_detached_step_weighs_as_much_as_direct_align_takes(toy):
    "At eta 0 step i counts k_next - k, with k = sigma / alpha: x / alpha is moved by nothing else."
    grid = toy.path.grid(T)
    for i, (_, by_prediction) in enumerate(rows := slopes(toy, grid, 0.0)):
        weight = by_prediction
        for later, _ in rows[i + 1 :]:
            weight *= later
        alpha, sigma = toy.path.alpha_sigma(grid, torch.zeros(T + 1, 1, **WIDE))
        k = (sigma / alpha).flatten()
        assert weight / alpha[-1].item() == pytest.approx((k[i + 1] - k[i]).item(), rel=1e-9)


def test_finite_differences_on_the_unet(exact):
    "Hold what the networks see while the weights move: then DRTune's is a whole gradient."
    d, params = exact
    c = d.encode(["a fox"])
    r = sample(d, c, 3, 1.0, generators(1), **WIDE)
    grid, rows = r.timesteps, slopes(d, r.timesteps, 1.0)
    with torch.no_grad():
        old = [d(r.xs[:, i], grid[i], c) for i in range(3)]

    def value():
        x = r.xs[:, 0]
        for i, (by_x, by_prediction) in enumerate(rows):
            said = d(r.xs[:, i], grid[i], c) if i in (0, 2) else old[i]
            noise = r.xs[:, i + 1] - by_x * r.xs[:, i] - by_prediction * old[i]
            x = by_x * x + by_prediction * said + noise
        return of(d)(x)

    x0 = drtune_sample(d, c, 3, 1.0, generators(1), [0, 2], **WIDE)
    grad = flat_grad(of(d)(x0), params)
    length = grad.norm().item()
    assert length > 0
    assert abs(slope_along(grad / length, value, params) / length - 1) < 1e-5


def test_a_step_that_is_computed_again_has_the_same_gradient(toy):
    c, gradients = toy.encode(["-"] * 2), []
    for again in (False, True):
        ends = drtune_sample(toy, c, T, 1.0, generators(2), [0, 2], None, again, **WIDE)
        gradients.append(flat_grad(ends.pow(3).sum(), [toy.mu]))
        ends, kl = adjoint_sample(toy, c, T, 1.0, generators(2), [0, 2], again, **WIDE)
        gradients.append(flat_grad(ends.pow(3).sum() + kl.sum(), [toy.mu]))
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])


# ---------------------------------------------------------------- Adjoint Matching


def published(d, c, n_steps, eta, streams, steps, reward_scale):
    "Write Adjoint Matching out: a trajectory, adjoints by autograd, then the regression."
    r = sample(d, c, n_steps, eta, streams, **WIDE)
    grid, states = r.timesteps, [r.xs[:, 0].clone().requires_grad_()]
    for i in range(n_steps):
        with d.reference():
            mean, _ = policy(d, states[-1], grid[i], grid[i + 1], c, eta)
        # the base model's chain, moved so that it visits the latents that were drawn
        states.append(mean + (r.xs[:, i + 1] - mean).detach())
    cost = -reward_scale * sum(of(d)(x0[None]) for x0 in states[-1])
    adjoints, losses = torch.autograd.grad(cost, states), []
    for i in steps:
        mean, std = policy(d, r.xs[:, i], grid[i], grid[i + 1], c, eta)
        with torch.no_grad(), d.reference():
            kept, _ = policy(d, r.xs[:, i], grid[i], grid[i + 1], c, eta)
        losses.append(matching_loss(mean, kept, std, adjoints[i + 1]))
    return torch.stack(losses).sum(0).mean()


def test_gradient_is_that_of_the_published_regression(exact):
    "The regression's gradient, halved, is that of KL - reward_scale times the reward."
    d, params = exact
    c, scale, n, steps = d.encode(["a fox", "a cow"]), 20.0, 1024, [1, 2]
    theirs = flat_grad(published(d, c, T, 1.0, generators(2), steps, scale), params)
    x0, kl = adjoint_sample(d, c, T, 1.0, generators(2), steps, **WIDE)
    loss = -of(d)(x0) + T * n / scale * kl.mean()
    # few steps stand for all
    ours = flat_grad(loss, params) * scale * len(steps) / T
    assert_close(ours, theirs / 2, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def test_lean_adjoint_is_the_base_chains_gradient_and_not_the_policys(exact):
    "Before anything is trained, and only then, it is AlignProp's through all steps."
    d, params = exact
    c, gradients = d.encode(["a fox"]), {}
    kept = [p.detach().clone() for p in params]
    for share in (1.0, 0.0):
        with torch.no_grad():
            for p, old in zip(params, kept):
                p.copy_(share * old if "lora_B" in names(d)[id(p)] else old)
        lean, _ = adjoint_sample(d, c, 3, 1.0, generators(1), [0, 1, 2], **WIDE)
        whole = truncated_sample(d, c, 3, 1.0, generators(1), 3, **WIDE)
        gradients[share] = [flat_grad(of(d)(x0), params) for x0 in (lean, whole)]
    with torch.no_grad():
        for p, old in zip(params, kept):
            p.copy_(old)
    assert_close(*gradients[0.0], rtol=1e-9, atol=1e-12)
    assert torch.cosine_similarity(*gradients[1.0], dim=0) < 0.99


def names(d):
    return {id(p): name for name, p in d.network.named_parameters()}


def test_checkpointed_blocks_have_the_same_lean_adjoint():
    "What is computed again in backward is the base model's, whose LoRA is off."
    d, params = with_lora(torch.float64)
    c, gradients = d.encode(["a fox"]), []
    for again in (False, True):
        if again:
            d.bare.enable_gradient_checkpointing()
        x0, kl = adjoint_sample(d, c, 3, 1.0, generators(1), [0, 2], **WIDE)
        gradients.append(flat_grad(of(d)(x0) + kl.mean(), params))
    assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_more_steps_than_have_a_density_are_refused_with_the_model():
    "A flow's last step has no noise, which a configuration does not know."
    flow, vp = (types.SimpleNamespace(path=path) for path in (FlowPath(), schedule()))
    config = TrainConfig(method="adjoint(steps=4)", kl_weight=1.0, sample_num_steps=4, **BRIGHT)
    method = find_method("adjoint")(check_config(config), (1,))
    method.prepare(vp)
    with pytest.raises(ValueError, match=r"of this model's 4 steps only 3 .* adjoint\(steps=3\)"):
        method.prepare(flow)


@pytest.mark.parametrize("steps", [[], [0, 4], [-1]])
def test_steps_without_a_density(toy, steps):
    with pytest.raises(ValueError, match="choose steps with a density"):
        adjoint_sample(toy, toy.encode(["-"]), T, 1.0, generators(1), steps)
    with pytest.raises(ValueError, match="2 generators for 1 samples"):
        adjoint_sample(toy, toy.encode(["-"]), T, 1.0, generators(2), [0])


class LinearSteps(Denoiser):
    "Denoise one number ~ N(1, 0.5^2), with a correction linear in x_t as weights of each step."

    def __init__(self, n_steps):
        super().__init__()
        # noise to signal from 0.03 to 30, so that the first latent is all but noise
        k = torch.logspace(-1.5, 1.5, n_steps, **WIDE)
        self.path = Schedule(1 / (1 + k**2))
        self.latent_shape = (1,)
        self.weight = torch.nn.Parameter(torch.zeros(n_steps, 2, **WIDE))
        self.base = GaussianDenoiser(self.path, (1,), mu=1.0, s=0.5).requires_grad_(False)
        self.corrects = True

    def encode(self, prompts):
        return Conditioning(nothing=torch.zeros(len(prompts)))

    def forward(self, x_t, t, c):
        slope, shift = self.weight[t].unsqueeze(-1).unbind(-2)
        correction = slope * x_t + shift if self.corrects else 0.0
        return self.base(x_t, t, c) + correction

    @contextlib.contextmanager
    def reference(self):
        self.corrects = False
        try:
            yield self
        finally:
            self.corrects = True

    @torch.no_grad()
    def lines(self, eta):
        "State each step's mean as gain x + shift, its std, and how it moves with the prediction."
        grid = self.path.grid(len(self.weight))
        x, c = torch.tensor([[0.0], [1.0]], **WIDE), self.encode(["", ""])
        rows = []
        for (t, t_next), (_, by_prediction) in zip(zip(grid, grid[1:]), slopes(self, grid, eta)):
            mean, std = policy(self, x, t, t_next, c, eta)
            shift, gain = mean[0].item(), (mean[1] - mean[0]).item()
            rows.append((int(t), gain, shift, std[0].item(), by_prediction))
        return rows

    def moments(self, eta):
        "Compute mean and variance of x0, and its covariance with the first latent."
        m, v, cov = 0.0, 1.0, 1.0
        for _, gain, shift, std, _ in self.lines(eta):
            m, v, cov = gain * m + shift, gain**2 * v + std**2, gain * cov
        return m, v, cov

    @torch.no_grad()
    def solve(self, eta, reward_scale, curvature, slope):
        "Set the weights at which the matching loss has no gradient, for r = slope x - c x^2 / 2."
        g, p, q = 1.0, 1.0, 0.0  # d x0 / d x_next of the base; E[x0 | x_next] = p x_next + q
        for t, gain, shift, std, by_prediction in reversed(self.lines(eta)):
            pull, steep = std**2 * reward_scale * g, std**2 * reward_scale * g * curvature
            # move = pull slope - steep E[x0], where E[x0] = p (gain x + shift + move) + q
            by_x = -steep * p * gain / (1 + steep * p)
            constant = (pull * slope - steep * (p * shift + q)) / (1 + steep * p)
            self.weight[t, 0], self.weight[t, 1] = by_x / by_prediction, constant / by_prediction
            q = p * (shift + constant) + q
            p = p * (gain + by_x)
            g = g * gain


def gradient_at(d, eta, reward_scale, curvature, slope, n):
    "Return the matching gradient of n samples, apart: (n, weights)."
    steps = trainable_steps(d.path, len(d.weight), eta).tolist()
    c = d.encode([""] * n)
    x0, kl = adjoint_sample(d, c, len(d.weight), eta, generators(n), steps, **WIDE)
    losses = -(slope * x0 - curvature * x0**2 / 2).flatten() + len(steps) / reward_scale * kl.mean(
        1
    )
    rows = [torch.autograd.grad(loss, d.weight, retain_graph=True)[0] for loss in losses]
    return torch.stack(rows).flatten(1)


@pytest.mark.parametrize("n_steps", [3, 8])
def test_a_linear_reward_tilts_a_gaussian_exactly(n_steps):
    "With eta 1 the mean moves by reward_scale times the variance, at any number of steps."
    d = LinearSteps(n_steps)
    m, v, cov = d.moments(1.0)
    assert gradient_at(d, 1.0, 2.0, 0.0, 1.0, 2).abs().max() > 0.01
    d.solve(1.0, 2.0, 0.0, 1.0)
    assert gradient_at(d, 1.0, 2.0, 0.0, 1.0, 4).abs().max() < 1e-10
    mean, variance, _ = d.moments(1.0)
    assert mean == pytest.approx(m + 2.0 * (v - cov**2), rel=1e-9)
    assert variance == pytest.approx(v, rel=1e-9)
    # memoryless: x0 has forgotten the first latent
    assert cov**2 < 2e-3 * v and mean == pytest.approx(m + 2.0 * v, rel=1e-3)


@pytest.mark.parametrize("eta", [0.2, 0.5])
def test_without_memorylessness_the_tilt_falls_short(eta):
    d = LinearSteps(8)
    m, v, cov = d.moments(eta)
    d.solve(eta, 2.0, 0.0, 1.0)
    assert gradient_at(d, eta, 2.0, 0.0, 1.0, 4).abs().max() < 1e-10
    mean, _, _ = d.moments(eta)
    # only what is still open after the first latent can be tilted
    assert mean - m == pytest.approx(2.0 * (v - cov**2), rel=1e-9)
    assert mean - m < 0.8 * 2.0 * v


def test_a_quadratic_reward_tilts_mean_and_variance():
    "Steps keep their std, so the variance is the tilted one in the limit of small steps only."
    errors = []
    for n_steps in (20, 80, 320):
        d = LinearSteps(n_steps)
        m, v, _ = d.moments(1.0)
        d.solve(1.0, 2.0, 1.0, 0.0)
        mean, variance, _ = d.moments(1.0)
        tilted = 1 / (1 / v + 2.0)
        assert mean == pytest.approx(tilted * m / v, rel=2e-3)
        errors.append(variance / tilted - 1)
    assert 0.03 < errors[0] < 0.05 and errors[2] < 0.005
    assert errors[1] / errors[0] == pytest.approx(0.25, abs=0.05)
    assert errors[2] / errors[1] == pytest.approx(0.25, abs=0.05)


def test_the_solution_for_a_quadratic_reward_has_no_gradient_on_average():
    d = LinearSteps(4)
    d.solve(1.0, 2.0, 1.0, 0.0)
    g = gradient_at(d, 1.0, 2.0, 1.0, 0.0, 100)
    assert (g.mean(0).abs() < 4 * g.std(0) / len(g) ** 0.5 + 1e-12).all()
    d.weight.data *= 0
    g = gradient_at(d, 1.0, 2.0, 1.0, 0.0, 100)
    assert (g.mean(0).abs() > 6 * g.std(0) / len(g) ** 0.5).any()


# ---------------------------------------------------------------- in the loop

BRIGHT = dict(reward_fn="brightness")
ADJOINT = dict(method="adjoint(steps=2)", kl_weight=5.0) | BRIGHT


def lone_update(tmp_path, monkeypatch, **fields):
    "Take one update whose step leaves weights and gradients as they are; return the gradient."
    state = setup(small(tmp_path, train_max_grad_norm=1e9, **fields))
    with torch.no_grad():
        for i, p in enumerate(state.params):
            p += 0.05 * torch.randn(p.shape, generator=generator_for(i))
    for name in ("step", "zero_grad"):
        monkeypatch.setattr(state.optimizer, name, lambda *args, **kwargs: None)
    backprop_update(state, 0)
    return torch.cat([p.grad.flatten() for p in state.params])


def test_accumulated_gradients_are_those_of_one_batch(tmp_path, monkeypatch):
    fields = ADJOINT | dict(sample_batch_size=4, sample_num_steps=3)
    whole = lone_update(tmp_path, monkeypatch, train_batch_size=4, **fields)
    parts = dict(train_batch_size=2, train_gradient_accumulation_steps=2)
    cut = lone_update(tmp_path, monkeypatch, **parts, **fields)
    assert_close(cut, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("limit", [0.0, 1.2])
def test_a_loss_scale_scales_the_gradient_exactly(toy, limit):
    "Powers of two are exact: float16's scaler, and shares of a batch, change nothing else."
    config = TrainConfig(method=f"adjoint(limit={limit})", kl_weight=5.0, sample_num_steps=4)
    method, gradients = find_method("adjoint")(config, toy.latent_shape), []
    with torch.no_grad():
        toy.mu += 0.1
    for scale in (1.0, 2.0**10):
        x0, gauges = method.chain(toy, toy.encode(["-"] * 3), generators(3), generator_for(0))
        loss = 5.0 * gauges["kl"] - x0.pow(3).mean()
        gradients.append(flat_grad(scale * loss, [toy.mu]))
    assert torch.equal(gradients[0] * 2.0**10, gradients[1]) and gradients[0].abs().min() > 0


def test_a_limit_shortens_the_longest_gradients_only(toy):
    config = TrainConfig(method="adjoint(limit=2.0)", kl_weight=5.0, sample_num_steps=4)
    method = find_method("adjoint")(config, toy.latent_shape)
    x0, _ = method.chain(toy, toy.encode(["-"] * 3), generators(3), generator_for(0))
    found, weights = [], torch.tensor([1.0, 1.5, 9.0])
    x0.register_hook(found.append)
    (x0.flatten(1).sum(1) * weights).sum().backward()
    assert_close(found[0][:, 0, 0, 0], torch.tensor([1.0, 1.5, 3.0]))


RESUMED = {
    "drtune": dict(method="drtune(steps=2, early=1)", **BRIGHT),
    "adjoint": ADJOINT,
    "srpo": dict(method="srpo(copies=2, inversion=0.5)", **BRIGHT),
}


@pytest.mark.parametrize("fields", RESUMED.values(), ids=RESUMED)
def test_resumed_run_equals_uninterrupted_run(tmp_path, fields):
    # few steps and pictures: only that nothing is forgotten is asked here
    fields = fields | dict(sample_num_steps=3, sample_batch_size=4, train_batch_size=2)
    whole, resumed = whole_and_resumed(tmp_path, **fields)


class Counting(GaussianDenoiser):
    "Count the rows that are asked for, with a gradient and without."

    asked, differentiated = 0, 0

    def forward(self, x_t, t, c):
        self.asked += len(x_t)
        self.differentiated += len(x_t) * torch.is_grad_enabled()
        return super().forward(x_t, t, c)


@pytest.mark.parametrize(
    "method",
    [
        "drtune(steps=2, early=2)",
        "drtune(steps=3, early=0)",
        "adjoint(steps=4)",
        "adjoint(steps=10)",
        "adjoint(steps=3)",
        "srpo(copies=3)",
    ],
)
def test_passes_are_counted_truly(method):
    config = TrainConfig(method=method, sample_num_steps=10, kl_weight=5.0 * ("adj" in method))
    made = config.method_class(config, (2,))
    d, n = Counting(schedule(), (2,), mu=0.3), 100
    for i in range(n):
        x0, gauges = made.chain(d, d.encode([""]), generators(1), generator_for(0, i))
        x0.sum().backward()
        assert gauges["k"] >= 1
    sampling, training, differentiated = config.method_class.passes(config)
    assert d.asked / n == pytest.approx(sampling + training, rel=0.03)
    assert d.differentiated / n == pytest.approx(differentiated, rel=0.03)
    assert len(x0) == config.method_class.copies(config)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(method="drtune(steps=0)"), "steps is 0, but drtune trains 1 to"),
        (dict(method="drtune(early=19)"), "early is 19, but of 20 steps 2 are trained: leave out"),
        (dict(method="drtune", kl_weight=1.0), "drtune takes no KL penalty"),
        (dict(method="adjoint"), "adjoint needs a kl_weight"),
        (dict(method="adjoint", kl_weight=1.0, sample_eta=0.5), "set it to 1"),
        (dict(method="adjoint(steps=21)", kl_weight=1.0), "steps is 21"),
        (dict(method="adjoint(limit=-1.0)", kl_weight=1.0), "limit is -1"),
        (dict(method="srpo(copies=0)"), "copies is 0, expected 1 or more"),
        (dict(method="srpo(inversion=2.0)"), "inversion is 2, expected a share"),
        (dict(method="srpo(first=0.5, last=0.5)"), "0 <= first < last <= 1"),
        (dict(method="srpo(first=0.51, last=0.54)"), "no step lies between 0.51 and 0.54 of 20"),
        (dict(method="srpo", kl_weight=1.0), "srpo takes no KL penalty"),
        (dict(method="srpo(1.5)"), "copies is 1.5"),
        (dict(method="drtune", train_num_inner_epochs=2), "uses each sample once"),
    ],
)
def test_mistakes_are_sentences(fields, sentence):
    with pytest.raises(ValueError, match="(?s).*") as error:
        check_config(TrainConfig(**BRIGHT, **fields))
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["drtune", "adjoint", "srpo"])
def test_long_gradients_are_found_and_the_advice_is_this_methods(name):
    config = TrainConfig(method=name)
    cls = config.method_class
    (finding,) = cls.findings(dict(grad_norm=50.0), [], config)
    assert "grad_norm is 50" in finding and name in finding and "backprop_steps" not in finding
    assert not list(cls.findings(dict(grad_norm=2.0), [], config))


# ---------------------------------------------------------------- SRPO


class Knows(GaussianDenoiser):
    "Say the noise that was put on a picture, or what else the path asks for."

    def forward(self, x_t, t, c):
        return self.path.target(c.x0, c.eps, t)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_known_noise_comes_off_exactly(prediction_type):
    d = Knows(schedule(prediction_type=prediction_type), (3, 4, 4)).double()
    x0, eps = randn(4, 3, 4, 4, **WIDE), randn(4, 3, 4, 4, seed=1, **WIDE)
    t = torch.tensor([951, 501, 51, 901])
    for t_next in (torch.tensor([901, 451, -1, 951]), torch.tensor([999, 700, 101, 0])):
        found = direct_align(d, x0, eps, t, t_next, Conditioning(x0=x0, eps=eps))
        assert_close(found, x0, rtol=1e-10, atol=1e-10)


def test_errors_are_those_of_one_step_prediction_times_a_known_factor(exact):
    "1 - k'/k, with k = sigma / alpha: small where the step is small, below 0 for inversion."
    d, _ = exact
    c = d.encode(["a fox"] * 3)
    x0, eps = randn(3, *d.latent_shape, **WIDE), randn(3, *d.latent_shape, seed=1, **WIDE)
    t, t_next = torch.tensor([951, 501, 51]), torch.tensor([901, 551, -1])
    with torch.no_grad():
        x_t = d.path.add_noise(x0, eps, t)
        predicted = d.path.x0_eps(x_t, d(x_t, t, c), t)[0]
        found = direct_align(d, x0, eps, t, t_next, c)
    ks = []
    for times in (t, t_next):
        alpha, sigma = d.path.alpha_sigma(times, x0)
        ks.append(sigma / alpha)
    assert_close(found - x0, (1 - ks[1] / ks[0]) * (predicted - x0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("inversion", [0.0, 1.0])
def test_both_branches_pull_the_same_way(toy, inversion):
    "The last latent judged is nearer the truth, or beyond it; the gradient climbs in both."
    config = TrainConfig(method=f"srpo(inversion={inversion}, last=0.7)", sample_num_steps=10)
    method = find_method("srpo")(config, toy.latent_shape)
    x0, _ = method.chain(toy, toy.encode(["-"] * 8), generators(8), generator_for(0))
    # of Gaussian data eps falls as mu rises, so pictures are brighter with more of mu
    assert torch.autograd.grad(x0.sum(), toy.mu)[0].min() > 0


class Straight(Denoiser):
    "Predict velocity mu on a straight path, which begins with noise alone."

    def __init__(self):
        super().__init__()
        self.path, self.latent_shape = FlowPath(), (3, 4, 4)
        self.mu = torch.nn.Parameter(torch.zeros(3, 4, 4))

    def encode(self, prompts):
        return Conditioning(nothing=torch.zeros(len(prompts)))

    def forward(self, x_t, t, c):
        return (x_t + self.mu) / 2


def test_inversion_does_not_go_where_no_picture_is_left():
    d, n = Straight(), 32
    config = TrainConfig(method="srpo(inversion=1.0)", sample_num_steps=4)
    method = find_method("srpo")(config, d.latent_shape)
    assert method._invertible(d.path).tolist() == [False, True, True, False]
    x0, _ = method.chain(d, d.encode(["-"] * n), generators(n), generator_for(0))
    assert x0.isfinite().all() and torch.autograd.grad(x0.sum(), d.mu)[0].isfinite().all()
    # without a terminal signal a schedule begins so, too
    abar = torch.linspace(0.99, 0.0, 100, **WIDE)
    assert not method._invertible(
        Schedule(abar, prediction_type="v_prediction", spacing="trailing")
    )[0]
    with pytest.raises(ValueError, match="t_next is a time of noise alone"):
        t, t_next = torch.tensor([0.7]), torch.tensor([1.0])
        direct_align(d, x0[:1], x0[:1], t, t_next, d.encode(["-"]))


def test_levels_are_those_asked_for():
    config = TrainConfig(method="srpo(first=0.2, last=0.5)", sample_num_steps=10)
    assert config.method_class._levels(config) == [2, 3, 4]


# ---------------------------------------------------------------- the relative reward


class Letters(Reward):
    "Count how often a prompt has the letter e, times a picture's brightness."

    name, uses_prompt, differentiable = "letters", True, True

    def __call__(self, images, prompts, metadata):
        counts = torch.tensor([float(prompt.count("e")) for prompt in prompts])
        return counts * images.mean((1, 2, 3))


def test_a_relative_reward_asks_with_both_words():
    reward = RelativeReward(Letters(), "Free", "Red", extra=0.5)
    images = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    scores = reward(images, ["a fox", "a bee"], [{}, {}])
    # 1.5 x (2, 4) - (1, 3), halved
    assert_close(scores, torch.tensor([1.0, 1.5]))
    assert scores.requires_grad and reward.uses_prompt and reward.differentiable
    with pytest.raises(ValueError, match="does not read prompts"):
        RelativeReward("target_color('teal')", "Free", "Red")


def test_a_relative_reward_trains_by_its_name(tmp_path):
    text = "relative('tiny_clip_score', 'red', 'blue')"
    assert get_reward(text).name == "relative(tiny_clip_score, red, blue)"
    fields = dict(sample_num_steps=2, sample_batch_size=2, train_batch_size=2, num_epochs=1)
    state = trained(small(tmp_path, method="srpo", reward_fn=text, **fields))
    assert dataclasses.asdict(state.config)["reward_fn"] == text and state.epoch == 1
