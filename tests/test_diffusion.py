"Diffusion: equality with diffusers, conversions, grids, the closed-form denoiser, errors."

import copy
import pickle
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from samples import SD1, randn, schedule
from torch.testing import assert_close

from ddpo_scratch.diffusion import (
    DDIM,
    Conditioning,
    Denoiser,
    GaussianDenoiser,
    Schedule,
    add_noise,
    ddim_mean_std,
    eps_loss,
    pred_eps,
    pred_x0,
    prediction_target,
)

TYPES = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO_SNR = dict(
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    set_alpha_to_one=True,
)


def ddim(**changes):
    "Build diffusers' scheduler of Stable Diffusion, with some fields changed."
    return DDIMScheduler(**SD1 | changes)


def target(x0, eps, t, s):
    a = s.at(t, x0)
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    return {"epsilon": eps, "sample": x0, "v_prediction": v}[s.prediction_type]


def pair(s, x0, eps, t):
    "Return a noisy latent and what the network should say of it."
    return add_noise(x0, eps, t, s), target(x0, eps, t, s)


# ---------------------------------------------------------------- reading a scheduler


def test_schedule_of_sd1():
    s = schedule()
    d = ddim()
    assert torch.equal(s.abar.float(), d.alphas_cumprod) and s.abar.dtype == torch.float64
    assert s.abar_final == d.final_alpha_cumprod.item() == d.alphas_cumprod[0].item()
    assert (s.prediction_type, s.spacing, s.steps_offset) == ("epsilon", "leading", 1)
    assert s.grid(50)[-2:].tolist() == [1, -1] and s.grid(50)[0] == 981


@pytest.mark.parametrize(
    "make",
    [
        dict,
        DDIMScheduler.from_config,
        lambda c: DDIMScheduler.from_config(c).config,
        lambda c: dict(DDIMScheduler.from_config(c).config),
    ],
)
def test_schedule_from_scheduler_config_or_dict(make):
    s = Schedule.from_config(make(SD1))
    assert torch.equal(s.abar, schedule().abar) and s.abar_final == schedule().abar_final


def test_recorded_defaults_of_the_original_class_count():
    # PNDM's default lands at abar[0], DDIM's at 1
    assert Schedule.from_config(PNDMScheduler(**BETAS)).abar_final == schedule().abar_final
    assert Schedule.from_config(EulerDiscreteScheduler(**BETAS)).spacing == "linspace"
    assert Schedule.from_config(DDPMScheduler(**BETAS, clip_sample=False)).abar_final == 1


@pytest.mark.parametrize(
    "extra",
    [
        dict(beta_schedule="linear"),
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(trained_betas=[0.1, 0.2, 0.3, 0.4], num_train_timesteps=4),
        dict(rescale_betas_zero_snr=True),
        dict(num_train_timesteps=100),
    ],
)
def test_every_dialect_of_betas(extra):
    assert torch.equal(schedule(**extra).abar.float(), ddim(**extra).alphas_cumprod)


def test_clipping_schedulers_warn_and_others_do_not():
    with pytest.warns(UserWarning, match="clips"):
        schedule(clip_sample=True)
    with pytest.warns(UserWarning, match="clips"):
        schedule(thresholding=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule()
        Schedule.from_config({k: v for k, v in SD1.items() if k != "clip_sample"})


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, EDMEulerScheduler])
def test_schedulers_without_betas_are_refused(scheduler):
    with pytest.raises(ValueError, match=f"{scheduler.__name__} has no betas: use"):
        Schedule.from_config(scheduler())
    with pytest.raises(ValueError, match="Flow has no betas"):
        Schedule.from_config({"_class_name": "Flow", "shift": 1.0})


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_grids_list_what_diffusers_lists(spacing, offset):
    d = ddim(timestep_spacing=spacing, steps_offset=offset)
    s = Schedule.from_config(d)
    for n in range(1, 1001):
        d.set_timesteps(n)
        if spacing == "leading" and d.timesteps[0] > 999:
            continue  # refused, see below
        grid = s.grid(n)
        assert grid.dtype == torch.int64 and grid.shape == (n + 1,)
        assert grid[-1] == -1 and (grid.diff() < 0).all()
        # diffusers lists one too many where floats add up past the end
        assert torch.equal(grid[:-1], d.timesteps[:n]), n


def test_where_diffusers_lands_elsewhere():
    "It subtracts 1000 // n: the next listed timestep for leading grids only."

    def landings_that_differ(spacing, n):
        d = ddim(timestep_spacing=spacing)
        d.set_timesteps(n)
        lands = (d.timesteps - 1000 // n).clamp(min=-1)
        return (lands != Schedule.from_config(d).grid(n)[1:]).sum().item()

    assert [landings_that_differ("leading", n) for n in (10, 30, 50, 77)] == [0, 0, 0, 0]
    assert [landings_that_differ("trailing", n) for n in (10, 50)] == [0, 0]
    assert landings_that_differ("trailing", 30) == 10 and landings_that_differ("linspace", 30) == 29


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_n_steps_out_of_range(n):
    with pytest.raises(ValueError, match=f"n_steps={n} is out of range: use 1 to 1000"):
        schedule().grid(n)


def test_grid_that_starts_after_training_ended():
    with pytest.raises(ValueError, match="starts at t=1000, but training ended at t=999"):
        schedule().grid(1000)
    assert schedule().grid(999)[0] == 999 and schedule(steps_offset=0).grid(1000)[0] == 999


def test_words_outside_the_vocabulary():
    abar = torch.linspace(0.99, 0.01, 10)
    types = "epsilon, v_prediction, sample"
    with pytest.raises(ValueError, match=f"prediction_type='eps' is unknown: use one of {types}"):
        Schedule(abar, prediction_type="eps")
    spacings = "leading, trailing, linspace"
    with pytest.raises(ValueError, match=f"spacing='even' is unknown: use one of {spacings}"):
        Schedule(abar, spacing="even")


def test_at_shapes_dtypes_and_values():
    s, like = schedule(), torch.zeros(3, 4, 8, 8, dtype=torch.float16)
    a = s.at(torch.tensor([-1, 0, 999]), like)
    assert a.shape == (3, 1, 1, 1) and a.dtype == torch.float32
    assert_close(a.flatten(), torch.tensor([s.abar_final, s.abar[0], s.abar[999]]).float())
    assert s.at(5, like).shape == s.at(torch.tensor(5), like).shape == (3, 1, 1, 1)
    assert s.at(torch.tensor([1, 2]), torch.zeros(2, 7)).shape == (2, 1)
    with pytest.raises(ValueError, match="t has 2 entries for a batch of 3"):
        s.at(torch.tensor([1, 2]), like)
    with pytest.raises(ValueError, match="t lies in 1000"):
        s.at(1000, like)


def test_schedule_survives_copies_and_cannot_be_changed():
    s = schedule()
    s.at(3, torch.zeros(1, 1))
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert torch.equal(other.abar, s.abar) and torch.equal(other.grid(7), s.grid(7))
    with pytest.raises(AttributeError):
        s.spacing = "trailing"


# ---------------------------------------------------------------- conversions


@pytest.mark.parametrize("kind", TYPES)
def test_conversions_round_trip(kind):
    s, t = schedule(prediction_type=kind), torch.tensor([1, 10, 300, 700, 999])
    x0, eps = randn(5, 4, 8, 8), randn(5, 4, 8, 8, seed=1)
    x_t, pred = pair(s, x0, eps, t)
    assert_close(pred_x0(x_t, pred, t, s), x0, atol=1e-4, rtol=0)
    assert_close(pred_eps(x_t, pred, t, s), eps, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_conversions_invert_for_any_prediction(kind):
    "x_t is put together again from what any prediction implies."
    s, t = schedule(prediction_type=kind), torch.tensor([1, 300, 700, 999])
    x_t, pred = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1)
    again = add_noise(pred_x0(x_t, pred, t, s), pred_eps(x_t, pred, t, s), t, s)
    assert_close(again, x_t, atol=1e-5, rtol=0)


def test_add_noise_and_v_equal_diffusers():
    x0, eps = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1)
    t = torch.tensor([0, 300, 700, 999])
    x_t, v = pair(schedule(prediction_type="v_prediction"), x0, eps, t)
    assert_close(x_t, ddim().add_noise(x0, eps, t), atol=1e-6, rtol=0)
    assert_close(v, ddim().get_velocity(x0, eps, t), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_the_target_is_what_the_conversions_invert(kind):
    s, t = schedule(prediction_type=kind), torch.tensor([1, 300, 999])
    x0, eps = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    assert_close(prediction_target(x0, eps, t, s), target(x0, eps, t, s))
    assert torch.equal(s.target(x0, eps, t), prediction_target(x0, eps, t, s))


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_zero_terminal_snr_is_finite(kind, eta):
    s = schedule(**ZERO_SNR, prediction_type=kind)
    assert s.abar[-1] == 0
    x_t, pred = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1).requires_grad_()
    for t, t_next in zip(s.grid(10)[:-1], s.grid(10)[1:]):
        mean, std = ddim_mean_std(x_t, pred, t, t_next, s, eta)
        assert mean.isfinite().all() and std.isfinite().all()
        assert torch.autograd.grad(mean.sum(), pred)[0].isfinite().all()


def test_zero_terminal_snr_with_epsilon_is_an_error():
    with pytest.raises(ValueError, match="abar is 0 at t=999"):
        schedule(**ZERO_SNR).grid(10)
    leading = schedule(**ZERO_SNR | dict(timestep_spacing="leading"))
    assert leading.grid(10)[0] < 999  # it never goes there


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [False, True])
def test_step_equals_diffusers(kind, spacing, eta, to_one):
    d = ddim(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=to_one)
    s, n = Schedule.from_config(d), 30 if spacing == "linspace" else 50
    x_t, pred, noise = (randn(2, 4, 8, 8, seed=seed) for seed in range(3))
    d.set_timesteps(n)
    for t in d.timesteps.tolist():
        t_next = max(t - 1000 // n, -1)  # diffusers' own transition
        mean, std = ddim_mean_std(x_t, pred, t, t_next, s, eta)
        theirs = d.step(pred, t, x_t, eta=eta, variance_noise=noise if eta else None)
        assert std.shape == (2, 1, 1, 1) and mean.dtype == std.dtype == torch.float32
        x0 = theirs.pred_original_sample
        atol = 2e-6 * max(x0.abs().max().item(), 1)  # at t=999, x0 is eps divided by 0.07
        assert_close(mean + std * noise, theirs.prev_sample, atol=atol, rtol=0)
        assert_close(pred_x0(x_t, pred, t, s), x0, atol=atol, rtol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [10, 30, 50])
def test_step_on_our_grid_equals_diffusers_given_the_same_transition(spacing, n):
    "Make diffusers step where we do, by telling its variance and alphas the next listed timestep."
    s, x_t, pred = schedule(timestep_spacing=spacing), randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=1)
    grid = s.grid(n)
    for t, t_next in zip(grid[:-1].tolist(), grid[1:].tolist()):
        d = ddim()
        d.num_inference_steps = 1
        d.register_to_config(num_train_timesteps=t - t_next)  # what it subtracts
        mean, std = ddim_mean_std(x_t, pred, t, t_next, s, 1.0)
        theirs = d.step(pred, t, x_t, eta=1.0, variance_noise=torch.zeros_like(x_t)).prev_sample
        assert_close(mean, theirs, atol=2e-5, rtol=0)
        assert_close(std.flatten()[0], d._get_variance(t, t_next).sqrt(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_step_takes_a_timestep_per_sample(kind):
    s, x_t, pred = schedule(prediction_type=kind), randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1)
    t, t_next = torch.tensor([981, 501, 21, 1]), torch.tensor([961, 481, 1, -1])
    mean, std = ddim_mean_std(x_t, pred, t, t_next, s, 1.0)
    for i in range(4):
        one = slice(i, i + 1)
        alone = ddim_mean_std(x_t[one], pred[one], int(t[i]), int(t_next[i]), s, 1.0)
        assert torch.equal(mean[one], alone[0]) and torch.equal(std[one], alone[1])


def test_eta_one_between_neighbours_is_the_ddpm_posterior():
    s, x0, eps = schedule(), randn(1, 4, 8, 8).double(), randn(1, 4, 8, 8, seed=1).double()
    d = DDPMScheduler(**BETAS, variance_type="fixed_small", clip_sample=False)
    for t in (1, 2, 10, 100, 500, 999):
        a, a_next = s.abar[t], s.abar[t - 1]
        beta = 1 - a / a_next
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        mean, std = ddim_mean_std(x_t, eps, t, t - 1, s, 1.0)
        from_x0 = a_next.sqrt() * beta / (1 - a) * x0  # DDPM eq. 7
        from_x_t = (1 - beta).sqrt() * (1 - a_next) / (1 - a) * x_t
        assert_close(mean.double(), from_x0 + from_x_t, atol=5e-4, rtol=0)
        assert_close(std.item() ** 2, ((1 - a_next) / (1 - a) * beta).item(), rtol=2e-3, atol=0)
        assert_close(std.item() ** 2, d._get_variance(t).item(), rtol=2e-3, atol=0)


def last_std(eta=1.0, **changes):
    s, one = schedule(**changes), torch.ones(1, 1)
    return ddim_mean_std(one, one, *s.grid(50)[-2:], s, eta)[1].item()


def test_last_step():
    a = schedule().abar
    by_hand = ((1 - a[0]) / (1 - a[1]) * (1 - a[1] / a[0])).sqrt().item()
    assert_close(last_std(), by_hand, atol=1e-5, rtol=0)  # 0.0206
    assert 0 < last_std(eta=0.5) < last_std()
    assert last_std(steps_offset=0) == 0  # t = 0 lands at abar[0]
    assert last_std(steps_offset=0, set_alpha_to_one=True) == 0
    assert last_std(set_alpha_to_one=True) == 0  # lands at 1
    assert last_std(timestep_spacing="linspace") == 0  # t = 0 again


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_step_as_a_rule(eta):
    s, x_t, pred = schedule(), randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    ours = DDIM(eta).mean_std(s, x_t, pred, 500, 480)
    assert_close(ours, ddim_mean_std(x_t, pred, 500, 480, s, eta), atol=0, rtol=0)
    grid, stds = s.grid(7), DDIM(eta).stds(s, 7)
    for std, t, t_next in zip(stds, grid[:-1], grid[1:]):
        assert_close(std, ddim_mean_std(x_t, pred, t, t_next, s, eta)[1][0].squeeze())


@pytest.mark.parametrize("eta", [-0.1, 1.01, 2])
def test_eta_out_of_range(eta):
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=f"eta={eta} is out of range: use 0"):
        ddim_mean_std(x, x, 500, 480, schedule(), eta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_give_float32(dtype):
    x_t, pred = randn(2, 4, 8, 8).to(dtype), randn(2, 4, 8, 8, seed=1).to(dtype)
    for kind in TYPES:
        s = schedule(prediction_type=kind)
        mean, std = ddim_mean_std(x_t, pred, 500, 480, s, 1.0)
        assert mean.dtype == std.dtype == torch.float32
        assert_close(mean, ddim_mean_std(x_t.float(), pred.float(), 500, 480, s, 1.0)[0])


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("kind", TYPES)
def test_float64_goes_through(kind):
    "All stays in float64, from the schedule to the loss, and agrees with float32 to rounding."
    s = schedule(prediction_type=kind)
    t, t_next = torch.tensor([981, 501, 1]), torch.tensor([961, 481, -1])
    x, p = randn(3, 4, 8, 8).double(), randn(3, 4, 8, 8, seed=1).double()
    narrow, wide = GaussianDenoiser(s, (4, 8, 8), 0.3), GaussianDenoiser(s, (4, 8, 8), 0.3).double()
    calls = dict(
        at=lambda d, x, p: s.at(t, x),
        noisy=lambda d, x, p: add_noise(x, p, t, s),
        x0=lambda d, x, p: pred_x0(x, p, t, s),
        eps=lambda d, x, p: pred_eps(x, p, t, s),
        mean=lambda d, x, p: ddim_mean_std(x, p, t, t_next, s, 0.7)[0],
        std=lambda d, x, p: ddim_mean_std(x, p, t, t_next, s, 0.7)[1],
        loss=lambda d, x, p: eps_loss(d, x, p, t, None),
        denoiser=lambda d, x, p: d(x, t, None),
        guess=lambda d, x, p: d.eps(x, t, None),
        pictures=lambda d, x, p: d.decode(x),
    )
    for name, call in calls.items():
        a, b = call(wide, x, p), call(narrow, x.float(), p.float())
        assert a.dtype == torch.float64 and b.dtype == torch.float32, name
        assert_close(a.float(), b, atol=1e-4, rtol=1e-4)


def test_the_float64_table_is_not_a_rounded_one():
    s = Schedule(torch.linspace(0.999, 0.001, 1000, dtype=torch.float64) ** 2, 0.9999)
    x = torch.zeros(3, 1, dtype=torch.float64)
    three = torch.tensor([0.9999, s.abar[0], s.abar[500]], dtype=torch.float64)
    assert torch.equal(s.at(torch.tensor([-1, 0, 500]), x).flatten(), three)
    assert torch.equal(s.at(500, x.float()).double()[0], s.abar[500].float().double()[None])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_step_in_float32_is_the_formula_in_float32(kind, dtype):
    "Bit for bit: a float32 table, then eq. 9, 16 and 12; runs and weights on record depend on it."
    s = schedule(prediction_type=kind)
    x, p = randn(2, 4, 8, 8).to(dtype), randn(2, 4, 8, 8, seed=1).to(dtype)
    table = torch.cat([torch.tensor([s.abar_final]), s.abar]).float()
    for t, t_next in ((981, 961), (21, 1), (1, -1)):
        a, b = table[t + 1].expand(2).view(2, 1, 1, 1), table[t_next + 1].expand(2).view(2, 1, 1, 1)
        x0 = {
            "epsilon": (x - (1 - a).sqrt() * p) / a.sqrt(),
            "sample": p.float(),
            "v_prediction": a.sqrt() * x - (1 - a).sqrt() * p,
        }[kind]
        eps = {
            "epsilon": p.float(),
            "sample": (x - a.sqrt() * p) / (1 - a).sqrt(),
            "v_prediction": a.sqrt() * p + (1 - a).sqrt() * x,
        }[kind]
        std = 0.7 * ((1 - b) / (1 - a) * (1 - a / b)).clamp(min=0).sqrt()
        mean = b.sqrt() * x0 + (1 - b - std**2).clamp(min=0).sqrt() * eps
        ours = ddim_mean_std(x, p, t, t_next, s, 0.7)
        assert torch.equal(ours[0], mean) and torch.equal(ours[1], std)


# ---------------------------------------------------------------- conditioning


def test_conditioning():
    c = Conditioning(a=torch.arange(5.0).view(5, 1), ids=torch.arange(5))
    assert len(c) == 5 and len(c[1:4]) == 3
    assert len(c[3]) == len(c[-1]) == 1 and c[-1].ids.item() == 4
    assert c[torch.tensor([4, 4, 0])].ids.tolist() == c[[4, 4, 0]].ids.tolist() == [4, 4, 0]
    assert c[c.ids > 2].ids.tolist() == [3, 4]
    assert torch.equal(Conditioning.cat([c[:1], c[1:]]).a, c.a)
    wide = c.to(dtype=torch.float64)
    assert wide.a.dtype == torch.float64 and wide.ids.dtype == torch.int64
    assert c.to("cpu").a.device.type == "cpu"
    assert pickle.loads(pickle.dumps(c)).ids.tolist() == c.ids.tolist()
    assert len(copy.deepcopy(c)) == 5 and not hasattr(c, "nothing")
    for bad in (dict(), dict(a=torch.zeros(2), b=torch.zeros(3))):
        with pytest.raises(ValueError, match="Conditioning got lengths"):
            Conditioning(**bad)


# ---------------------------------------------------------------- the closed-form denoiser


@pytest.mark.parametrize("kind", TYPES)
def test_score_is_minus_eps_over_sigma(kind):
    s = schedule(prediction_type=kind)
    d = GaussianDenoiser(s, (4,), mu=torch.tensor([1.0, -1.0, 0.0, 2.0]), s=0.7)
    x_t, t = randn(5, 4).requires_grad_(), torch.tensor([1, 50, 300, 700, 999])
    a = s.at(t, x_t)
    law = torch.distributions.Normal(a.sqrt() * d.mu, (a * 0.49 + 1 - a).sqrt())
    (score,) = torch.autograd.grad(law.log_prob(x_t).sum(), x_t)
    assert_close(-d.eps(x_t, t, None) / (1 - a).sqrt(), score, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_samples_have_the_right_mean_and_variance(eta, kind):
    "3000 draws, 250 steps, zero terminal SNR: within 4 standard errors."
    s, n = schedule(**ZERO_SNR, prediction_type=kind), 3000
    g = torch.Generator().manual_seed(3)
    d = GaussianDenoiser(s, (2,), mu=torch.tensor([0.7, -1.0]), s=0.5)
    x, grid = torch.randn(n, 2, generator=g), s.grid(250)
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:]):
            mean, std = ddim_mean_std(x, d(x, t, None), t, t_next, s, eta)
            x = mean + std * torch.randn(x.shape, generator=g)
    assert ((x.mean(0) - d.mu).abs() < 4 * 0.5 / n**0.5).all()
    assert ((x.std(0) - 0.5).abs() < 4 * 0.5 / (2 * n) ** 0.5).all()


@pytest.mark.parametrize("kind", TYPES)
def test_the_exact_denoiser_minimises_its_loss(kind):
    s, n = schedule(prediction_type=kind), 20_000
    x0, eps = 1 + 0.5 * randn(n, 1), randn(n, 1, seed=1)
    t = s.draw_t(n, torch.Generator().manual_seed(2))

    def loss(mu):
        return eps_loss(GaussianDenoiser(s, (1,), mu, 0.5), x0, eps, t, None).detach()

    slope = (loss(1.01) - loss(0.99)) / 0.02
    assert slope.mean().abs() < 4 * slope.std() / n**0.5
    assert loss(1.0).mean() < loss(0.7).mean() and loss(1.0).mean() < loss(1.3).mean()


@pytest.mark.parametrize("kind", TYPES)
def test_eps_loss_is_the_mean_square_on_the_target(kind):
    s = schedule(prediction_type=kind)

    class Zero(Denoiser):
        def forward(self, x_t, t, c):
            assert t.shape == (len(x_t),)
            return torch.zeros_like(x_t)

    zero = Zero()
    zero.path = s
    x0, eps, t = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), torch.tensor([5, 500, 900])
    loss = eps_loss(zero, x0, eps, t, None)
    assert_close(loss, target(x0, eps, t, s).square().mean((1, 2, 3)))
    assert eps_loss(zero, x0, eps, 500, None).shape == (3,)


def test_gaussian_denoiser_keeps_the_protocol():
    d = GaussianDenoiser(schedule(), (1, 8, 8), mu=0.2)
    c = d.encode(["a", "b"])
    assert isinstance(d, Denoiser) and len(c) == 2
    assert d.device.type == "cpu" and d.guidance_scale == 1
    assert [n for n, _ in d.named_parameters()] == ["mu"] and d.mu.shape == (1, 8, 8)
    for shape in ((1, 8, 8), (3, 8, 8), (4, 8, 8), (5,)):
        x0 = randn(2, *shape).requires_grad_()
        images = GaussianDenoiser(schedule(), shape).decode(x0)
        assert images.shape[:2] == (2, 3) and images.dim() == 4
        assert images.min() >= 0 and images.max() <= 1
        assert torch.autograd.grad(images.sum(), x0)[0].abs().sum() > 0
    with torch.no_grad():
        d.mu += 1
    with pytest.raises(RuntimeError, match="stop"):
        with d.reference():
            assert (d.mu == 0.2).all()
            raise RuntimeError("stop")
    assert (d.mu == 1.2).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda denoiser: denoiser.encode([]),
        lambda denoiser: denoiser(None, None, None),
        lambda denoiser: denoiser.decode(None),
        lambda denoiser: denoiser.reference(),
        lambda denoiser: denoiser.place("cpu"),
        lambda denoiser: denoiser.trainable(),
        lambda denoiser: denoiser.save("here"),
    ],
)
def test_what_a_denoiser_must_define(call):
    with pytest.raises(NotImplementedError):
        call(Denoiser())


@pytest.mark.parametrize("t", [-2, 1000, torch.tensor([3, 1000])])
def test_timesteps_out_of_range(t):
    advice = "give timesteps from 0 to 999, or -1 for the clean end"
    with pytest.raises(ValueError, match=f"t lies in .*: {advice}"):
        schedule().at(t, randn(2, 3))
