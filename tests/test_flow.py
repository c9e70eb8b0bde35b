"The straight path, one step for every sampler, and windows: against diffusers and by hand."

import dataclasses
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from ddpo_scratch.diffusion import DDIM, GaussianDenoiser, Schedule
from ddpo_scratch.flow import (
    CPS,
    ODE,
    DanceSDE,
    FlowDDIM,
    FlowPath,
    FlowRule,
    FlowSDE,
    Window,
    flow_coordinates,
    shifted,
)
from ddpo_scratch.rollout import (
    gaussian_log_prob,
    generator_for,
    replay_log_prob,
    sample,
    trainable_steps,
)

VP = Schedule.from_config(DDIMScheduler(clip_sample=False))
RULES = [ODE(), CPS(0.8), FlowDDIM(0.6), FlowSDE(0.7), DanceSDE(0.3)]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The path.


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("n_steps", [1, 10, 28])
def test_grid_is_that_of_diffusers(shift, n_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = FlowPath(scheduler).grid(n_steps)
    scheduler.set_timesteps(n_steps)
    assert grid.equal(scheduler.sigmas.double())
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


def test_asking_for_a_grid_leaves_the_scheduler_as_it_was():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = scheduler.sigmas.clone()
    FlowPath(scheduler).grid(7)
    assert scheduler.sigmas.equal(before)


def test_network_time_is_the_timestep_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    path = FlowPath(scheduler)
    scheduler.set_timesteps(10)
    assert_close(path.network_time(path.grid(10)[:-1]), scheduler.timesteps.double())


def test_even_grid_is_shifted():
    assert FlowPath().grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert_close(FlowPath(shift=3.0).grid(4), shifted(FlowPath().grid(4), 3.0))
    with pytest.raises(ValueError, match="n_steps=0 is out of range"):
        FlowPath().grid(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_ends_are_found_from_any_point(dtype):
    path, x0, eps = FlowPath(), normal(5, 3, 4).to(dtype), normal(5, 3, 4, seed=1).to(dtype)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    x_t = path.add_noise(x0.double(), eps.double(), t)
    found = path.x0_eps(x_t, eps.double() - x0.double(), t)
    assert_close(found, (x0.double(), eps.double()), atol=1e-12, rtol=0)
    half = path.x0_eps(x_t.to(dtype), path.target(x0, eps, t), t)
    assert all(
        x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for x in half
    )


def test_drawn_times_follow_the_shift():
    "P(t <= 1/2) of shift 3 is the u whose shifted time is 1/2: a quarter."
    t = FlowPath(shift=3.0).draw_t(20_000, torch.Generator().manual_seed(0))
    share = (t <= 0.5).double().mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    assert 0 < t.min() and t.max() < 1


@pytest.mark.parametrize("path", [VP, FlowPath()], ids=["VP", "flow"])
def test_any_path_is_a_straight_line_in_flow_coordinates(path):
    x0, eps = normal(3, 4), normal(3, 4, seed=1)
    t = path.grid(10)[[0, 4, 9]]
    flow_t, scale = flow_coordinates(path, t, x0)
    line = (1 - flow_t) * x0 + flow_t * eps
    assert_close(path.add_noise(x0, eps, t) / scale, line, atol=1e-12, rtol=0)


# The rules.


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ode_is_the_step_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    path = FlowPath(scheduler)
    grid = path.grid(10)
    scheduler.set_timesteps(10)
    x, v = normal(2, 3, 4, dtype=torch.float32), normal(2, 3, 4, seed=1, dtype=torch.float32)
    for i, when in enumerate(scheduler.timesteps):
        theirs = scheduler.step(v, when, x).prev_sample
        assert_close(ODE().mean_std(path, x, v, grid[i], grid[i + 1])[0], theirs)


def flow_grpo_step(x, v, t, t_next, second, a):
    "Flow-GRPO's mean and std, as its code has them; `second` is the grid's second time."
    std = a * (t / (1 - torch.where(t == 1, second, t))).sqrt()
    dt = t_next - t
    mean = x * (1 + std**2 / (2 * t) * dt) + v * (1 + std**2 * (1 - t) / (2 * t)) * dt
    return mean, std * (-dt).sqrt()


@pytest.mark.parametrize("a", [0.7, 1.2])
@pytest.mark.parametrize("n_steps", [4, 10, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sde_is_the_published_step(shift, n_steps, a):
    "At every step, the first (t = 1) and the last (t_next = 0) included: mean, std and log-prob."
    path = FlowPath(FlowMatchEulerDiscreteScheduler(shift=shift))
    grid = path.grid(n_steps).double()
    x, v, x_next = normal(3, 2, 4, 8, 8)
    for t, t_next in zip(grid[:-1], grid[1:]):
        mean, std = FlowSDE(a).mean_std(path, x, v, t, t_next)
        their_mean, their_std = flow_grpo_step(x, v, t, t_next, grid[1], a)
        assert_close(mean, their_mean, atol=1e-9, rtol=1e-9)
        assert_close(std, their_std.expand_as(std), atol=1e-9, rtol=1e-9)
        drawn = their_mean + their_std * x_next
        theirs = torch.distributions.Normal(their_mean, their_std).log_prob(drawn).mean((1, 2, 3))
        # a log-prob divides by the std, which is 7e-4 at the last step
        assert_close(gaussian_log_prob(drawn, mean, std), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dance_and_cps_are_the_published_steps(shift):
    path = FlowPath(FlowMatchEulerDiscreteScheduler(shift=shift))
    grid = path.grid(10)
    x, v = normal(2, 2, 4)
    for t, t_next in zip(grid[:-1], grid[1:]):
        x0, eps = x - t * v, x + (1 - t) * v
        pull = 0.5 * 0.3**2 * (x - (1 - t) * x0) / t**2
        mean, std = DanceSDE(0.3).mean_std(path, x, v, t, t_next)
        assert_close(mean, x + (v + pull) * (t_next - t), atol=1e-12, rtol=0)
        assert_close(std.flatten(), (0.3 * (t - t_next).sqrt()).expand(2))
        share = math.sin(0.8 * math.pi / 2)
        mean, std = CPS(0.8).mean_std(path, x, v, t, t_next)
        rest = (t_next**2 - (t_next * share) ** 2).sqrt()
        assert_close(mean, x0 * (1 - t_next) + eps * rest, atol=1e-12, rtol=0)
        assert_close(std.flatten(), (t_next * share).expand(2))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_flow_ddim_is_ddim(kind, eta):
    schedule = dataclasses.replace(VP, prediction_type=kind)
    x, prediction = normal(2, 3, 8)
    t, t_next = torch.tensor([999, 500, 21]), torch.tensor([949, 450, 1])
    theirs = DDIM(eta).mean_std(schedule, x, prediction, t, t_next)
    ours = FlowDDIM(eta).mean_std(schedule, x, prediction, t, t_next)
    assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_flow_ddim_is_the_posterior_on_a_flow(eta):
    "Its s is eta times the spread of x' that x_t and x0 leave: Bayes' rule for two Gaussians."
    t, t_next = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    # x_t = g x' + noise, of the variance that makes its total t^2
    g = (1 - t) / (1 - t_next)
    fresh = t**2 - g**2 * t_next**2
    posterior = 1 / (1 / t_next**2 + g**2 / fresh)
    assert_close(FlowDDIM(eta).s_c(t, t_next)[0], eta * posterior.sqrt())


@each_rule
@pytest.mark.parametrize("path", [VP, FlowPath(), FlowPath(shift=3.0)], ids=["VP", "flow", "3"])
def test_rules_are_finite_on_every_path_and_pass_gradients(path, rule):
    x, prediction = normal(2, 1, 8, dtype=torch.float32)
    prediction.requires_grad_()
    grid = path.grid(10)
    for t, t_next in zip(grid[:-1], grid[1:]):
        mean, std = rule.mean_std(path, x, prediction, t, t_next)
        (slope,) = torch.autograd.grad(mean.sum(), prediction)
        assert mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()
        assert slope.isfinite().all() and mean.dtype == std.dtype == torch.float32


@each_rule
def test_samples_take_their_own_times(rule):
    path = FlowPath()
    grid, x, v = path.grid(10), *normal(2, 3, 8)
    together = rule.mean_std(path, x, v, grid[[0, 4, 9]], grid[[1, 5, 10]])
    for row, i in enumerate((0, 4, 9)):
        one = slice(row, row + 1)
        alone = rule.mean_std(path, x[one], v[one], grid[i], grid[i + 1])
        assert_close(alone, tuple(part[one] for part in together), atol=1e-12, rtol=0)


def test_a_rule_without_numbers_is_refused():
    with pytest.raises(NotImplementedError):
        FlowRule().stds(FlowPath(), 3)


@each_rule
def test_rollouts_replay(rule):
    "A rollout of any rule replays to the same log-probs, and steps without noise have none."
    toy = GaussianDenoiser(VP, (8,), mu=0.5)
    generators = [generator_for(0, i) for i in range(4)]
    rollout = sample(toy, toy.encode([""] * 4), 6, rule, generators)
    assert replay_log_prob(toy, rollout, rule).equal(rollout.log_probs)
    assert ((rollout.log_probs != 0).all(0) == (rule.stds(VP, 6) > 0)).all()


# Windows.


@pytest.mark.parametrize("path", [VP, FlowPath(shift=3.0)], ids=["VP", "flow"])
@pytest.mark.parametrize("first, size", [(0, 1), (0, 10), (3, 4), (9, 1)])
def test_window_has_noise_inside_alone(path, first, size):
    rule = FlowSDE(0.7)
    window = Window.at(rule, path, 10, first, size)
    expected = torch.zeros(10)
    expected[first : first + size] = rule.stds(path, 10)[first : first + size]
    assert window.stds(path, 10).equal(expected)
    assert trainable_steps(path, 10, window).tolist() == list(range(first, first + size))
    x, v = normal(2, 2, 8)
    grid = path.grid(10)
    for i in range(10):
        inside = first <= i < first + size
        ours = window.mean_std(path, x, v, grid[i], grid[i + 1])
        assert_close(ours, (rule if inside else ODE()).mean_std(path, x, v, grid[i], grid[i + 1]))


@pytest.mark.parametrize("first, size", [(-1, 2), (0, 0), (9, 2), (10, 1)])
def test_window_must_fit(first, size):
    with pytest.raises(ValueError, match="does not fit in 10 steps"):
        Window.at(FlowSDE(), FlowPath(), 10, first, size)


def test_window_draws_no_noise_outside():
    "Streams are asked for noise at x_T and in the window, and not elsewhere."
    toy = GaussianDenoiser(VP, (8,), mu=0.5)
    stream, fresh = generator_for(0, 0), generator_for(0, 0)
    window = Window.at(FlowSDE(0.7), VP, 10, 2, 3)
    sample(toy, toy.encode([""]), 10, window, [stream])
    for _ in range(4):
        torch.randn(8, generator=fresh)
    assert torch.randn(3, generator=stream).equal(torch.randn(3, generator=fresh))
