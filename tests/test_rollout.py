"The rollout room: log-probs, replay with ratio 1 in every dtype, named randomness, steps without density, errors."
import math
import pickle

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ddpo_scratch.diffusion import Conditioning, Denoiser, GaussianDenoiser, Schedule, ddim_mean_std
from ddpo_scratch.rollout import (Rollout, gaussian_log_prob, generator_for, policy, replay_log_prob, sample,
                                  step_kl, step_log_prob, trainable_steps)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SD1 = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
           steps_offset=1, timestep_spacing="leading", prediction_type="epsilon")
STEPS = 8


def schedule(**changes): return Schedule.from_config({**SD1, **changes})


def generators(*indices, seed=0): return [generator_for(seed, 0, i, "sample") for i in indices]


class TinyUNet(Denoiser):
    "Stable Diffusion's U-Net with random weights, a few thousand times smaller, with classifier-free guidance"
    def __init__(self, guidance_scale=3., **changes):
        super().__init__()
        from diffusers import UNet2DConditionModel
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.unet = UNet2DConditionModel(
                sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
                cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8)
        self.schedule, self.latent_shape, self.guidance_scale = schedule(**changes), (4, 8, 8), guidance_scale

    def encode(self, prompts):
        text = torch.stack([torch.randn(5, 16, generator=generator_for(0, p)) for p in prompts])
        return Conditioning(text=text, blank=torch.zeros_like(text))

    def forward(self, x_t, t, c):
        both = self.unet(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([c.blank, c.text])).sample
        uncond, cond = both.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


@pytest.fixture(scope="module")
def tiny(): return TinyUNet()


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def rollout(request, tiny):
    return sample(tiny, tiny.encode(list("abcd")), STEPS, 1., generators(*range(4)), dtype=request.param)


# ---------------------------------------------------------------- named randomness

def test_generators_are_named():
    draw = lambda *name: torch.randn(4, generator=generator_for(*name)).tolist()
    assert draw(1, 2, 3, "noise") == draw(1, 2, 3, "noise")
    names = [(0,), (1,), (0, 0), (1, 0), (0, 1), (0, 0, 0), (0, "a"), (0, "b"), (0, "ab"), (0, ""), (0, 2**32), (0, 2**32 + 1), (0, -1), (-1,), (0, "a", 1), (0, 1, "a")]
    assert len({tuple(draw(*name)) for name in names}) == len(names)
    assert draw(0, torch.tensor(3)) == draw(0, 3)
    assert generator_for(0).device.type == "cpu"


def test_generators_stay_what_they_were():
    "Streams must not change between versions or processes: runs are resumed and compared by them"
    assert [generator_for(*k).initial_seed() for k in ((0,), (42, 7, 255, "noise"))] == [15793235383387715774, 2132001528800742382]


def test_generators_look_independent():
    x = torch.stack([torch.randn(64, generator=generator_for(0, e, i, "noise")) for e in range(8) for i in range(64)])
    n = x.numel()
    assert x.mean().abs() < 4 / n**.5 and abs(x.std() - 1) < 4 / (2 * n)**.5
    corr = (x @ x.T / 64 - torch.diag(x.square().mean(1)))
    assert abs(corr.square().sum() / (512 * 511) * 64 - 1) < .05


@pytest.mark.parametrize("eta", [0., 1.])
def test_a_sample_draws_the_same_noise_in_any_batch(tiny, eta):
    c = tiny.encode(list("abcd"))
    whole = sample(tiny, c, STEPS, eta, generators(0, 1, 2, 3))
    parts = Rollout.cat([sample(tiny, c[i], STEPS, eta, generators(*i)) for i in ([0], [1, 2], [3])])
    mixed = sample(tiny, c[[3, 1, 0, 2]], STEPS, eta, generators(3, 1, 0, 2))
    assert torch.equal(parts.xs[:, 0], whole.xs[:, 0]) and torch.equal(mixed.xs[:, 0], whole.xs[[3, 1, 0, 2], 0])
    assert_close(parts.xs, whole.xs, atol=1e-4, rtol=0)
    assert_close(mixed.xs, whole.xs[[3, 1, 0, 2]], atol=1e-4, rtol=0)


def test_step_noise_is_bitwise_the_same_in_any_batch():
    "A denoiser that computes row by row: nothing but the noise could differ"
    d = GaussianDenoiser(schedule(), (3, 4, 4), mu=.3)
    whole = sample(d, d.encode(["-"] * 6), STEPS, 1., generators(*range(6)))
    alone = sample(d, d.encode(["-"]), STEPS, 1., generators(4))
    assert torch.equal(whole[4].xs, alone.xs)


# ---------------------------------------------------------------- log-prob

@pytest.mark.parametrize("std", [1e-3, .02, 1., 30.])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_log_prob_equals_torch_distributions(std, reduce):
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 4, 8, 8, generator=g); x = mean + std * torch.randn(mean.shape, generator=g)
    theirs = torch.distributions.Normal(mean, std).log_prob(x).flatten(1)
    ours = gaussian_log_prob(x, mean, torch.full((5, 1, 1, 1), std), reduce)
    assert ours.shape == (5,) and ours.dtype == torch.float32
    assert_close(ours, getattr(theirs, reduce)(1), atol=1e-5, rtol=1e-5)
    assert_close(gaussian_log_prob(x, mean, torch.tensor(std), reduce), ours)


def test_sum_is_mean_times_dimensions():
    x, mean, std = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16), torch.ones(3, 1, 1, 1)
    assert_close(gaussian_log_prob(x, mean, std, "sum"), 1024 * gaussian_log_prob(x, mean, std))
    assert round(1e-4 * 4*64*64, 2) == 1.64 and round(1e-4 * 4*16*16, 2) == .10


def test_log_prob_without_density():
    x, mean = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    std = torch.tensor([[0.], [.5]])
    log_prob = gaussian_log_prob(x, mean, std)
    grad, = torch.autograd.grad(log_prob.sum(), mean)
    assert log_prob[0] == 0 and (grad[0] == 0).all() and grad[1].isfinite().all() and (grad[1] != 0).all()
    with pytest.raises(ValueError, match="reduce='avg' is unknown: use mean or sum"): gaussian_log_prob(x, mean, std, "avg")


def test_log_prob_gradient_is_the_standardised_residual():
    x, mean, std = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True), torch.full((2, 1), .3)
    grad, = torch.autograd.grad(gaussian_log_prob(x, mean, std).sum(), mean)
    assert_close(grad, ((x - mean) / .09 / 3).detach())


# ---------------------------------------------------------------- sampling

def test_rollout_is_diffusers_sampling(tiny):
    "Same noise in, same latents out, as DDIMScheduler.step in a loop"
    from diffusers import DDIMScheduler
    c, g = tiny.encode(["a"]), generators(0)[0]
    r = sample(tiny, c, STEPS, 1., generators(0))
    d = DDIMScheduler(**SD1); d.set_timesteps(STEPS)
    x = torch.randn(tiny.latent_shape, generator=g)[None]
    with torch.no_grad():
        for i, t in enumerate(d.timesteps):
            x = d.step(tiny(x, t[None], c), t, x, eta=1., variance_noise=torch.randn(tiny.latent_shape, generator=g)[None]).prev_sample
            assert_close(r.xs[:, i+1], x, atol=2e-4, rtol=1e-4)


def test_shapes_and_dtypes(tiny, rollout):
    assert rollout.xs.shape == (4, STEPS + 1, 4, 8, 8) and rollout.log_probs.shape == (4, STEPS)
    assert rollout.log_probs.dtype == torch.float32 and not rollout.xs.requires_grad
    assert torch.equal(rollout.timesteps, tiny.schedule.grid(STEPS)) and rollout.n_steps == STEPS
    assert torch.equal(rollout.x0, rollout.xs[:, -1]) and len(rollout) == len(rollout.c) == 4


def test_rollouts_index_join_and_pickle(rollout):
    for i, n in ((2, 1), (-1, 1), (slice(1, 3), 2), ([3, 0], 2), (torch.tensor([3, 0, 0]), 3), (torch.tensor([True, False, True, False]), 2)):
        r = rollout[i]
        assert len(r) == len(r.c) == len(r.log_probs) == n and r.n_steps == STEPS
    assert torch.equal(rollout[-1].xs, rollout.xs[3:])
    again = Rollout.cat([rollout[:1], rollout[1:]])
    assert torch.equal(again.xs, rollout.xs) and torch.equal(again.log_probs, rollout.log_probs) and torch.equal(again.c.text, rollout.c.text)
    assert torch.equal(pickle.loads(pickle.dumps(rollout)).xs, rollout.xs)
    other = Rollout(rollout.xs, rollout.timesteps + 1, rollout.log_probs, rollout.c)
    with pytest.raises(ValueError, match="different grids"): Rollout.cat([rollout, other])


def test_progress_wraps_the_steps():
    d, seen = GaussianDenoiser(schedule(), (2,)), []
    def progress(steps):
        for i in steps: seen.append(i); yield i
    sample(d, d.encode(["-"]), 5, 1., generators(0), progress=progress)
    assert seen == list(range(5))


def test_policy_is_one_ddim_step(tiny):
    c, x_t, t, t_next = tiny.encode(list("ab")), torch.randn(2, 4, 8, 8), torch.tensor([501, 21]), torch.tensor([481, 1])
    mean, std = policy(tiny, x_t, t, t_next, c, .7)
    m, s = ddim_mean_std(x_t, tiny(x_t, t, c), t, t_next, tiny.schedule, .7)
    assert torch.equal(mean, m) and torch.equal(std, s) and mean.requires_grad
    assert torch.equal(policy(tiny, x_t, 501, 481, c, .7)[0][0], policy(tiny, x_t, torch.tensor([501, 501]), torch.tensor(481), c, .7)[0][0])


@pytest.mark.parametrize("n", [0, 1, 3])
def test_wrong_number_of_generators(tiny, n):
    with pytest.raises(ValueError, match=f"{n} generators for 2 samples: give one per sample"):
        sample(tiny, tiny.encode(list("ab")), STEPS, 1., generators(*range(n)))


@pytest.mark.parametrize("n_steps, eta, said", [(0, 1., "n_steps=0 is out of range"), (1001, 1., "n_steps=1001 is out of range"), (5, 1.5, "eta=1.5 is out of range"), (5, -1., "eta=-1.0 is out of range")])
def test_sampling_errors(n_steps, eta, said):
    d = GaussianDenoiser(schedule(), (2,))
    with pytest.raises(ValueError, match=said): sample(d, d.encode(["-"]), n_steps, eta, generators(0))


# ---------------------------------------------------------------- replay

def test_ratio_is_one_bitwise_at_the_same_shape(tiny, rollout):
    with torch.no_grad(): assert torch.equal(replay_log_prob(tiny, rollout, 1.), rollout.log_probs)
    assert torch.equal(replay_log_prob(tiny, rollout, 1.).detach(), rollout.log_probs), "with autograd on"
    some = replay_log_prob(tiny, rollout, 1., steps=torch.tensor([STEPS - 1, 2]))
    assert torch.equal(some.detach(), rollout.log_probs[:, [STEPS - 1, 2]])


@torch.no_grad()
def test_ratio_is_one_at_other_shapes(tiny, rollout):
    "Alone, split unevenly, and as shuffled pairs that span timesteps: |log ratio| <= 1e-6"
    parts = [torch.cat([replay_log_prob(tiny, rollout[i], 1.) for i in split]) for split in (([0], [1], [2], [3]), ([0, 1, 2], [3]))]
    row, step = torch.cartesian_prod(torch.arange(4), torch.arange(STEPS))[torch.randperm(4 * STEPS, generator=generator_for(0))].T
    pairs = torch.zeros(4, STEPS)
    for r, s in zip(row.split(7), step.split(7)):
        pairs[r, s] = step_log_prob(tiny, rollout.xs[r, s], rollout.xs[r, s + 1], rollout.timesteps[s], rollout.timesteps[s + 1], rollout.c[r], 1.)
    for now in (*parts, pairs): assert (now - rollout.log_probs).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [.3, 1.])
def test_ratio_is_one_for_every_prediction_type(kind, eta):
    d = TinyUNet(prediction_type=kind)
    c = d.encode(list("ab"))
    for dtype in DTYPES:
        r = sample(d, c, 4, eta, generators(0, 1), dtype=dtype)
        with torch.no_grad(): assert torch.equal(replay_log_prob(d, r, eta), r.log_probs)


@torch.no_grad()
def test_scoring_before_rounding_is_the_bug_we_do_not_have(tiny, rollout):
    "Scored, then rounded: far outside a clip range of 1e-4 at the last step"
    i = STEPS - 1
    mean, std = policy(tiny, rollout.xs[:, i], rollout.timesteps[i], -1, rollout.c, 1.)
    x_next = mean + std * torch.randn(mean.shape, generator=generator_for(1))
    gap = (gaussian_log_prob(x_next.to(rollout.xs.dtype), mean, std) - gaussian_log_prob(x_next, mean, std)).abs().max()
    if rollout.xs.dtype == torch.float32: assert gap == 0
    else: assert gap > {torch.float16: 1e-4, torch.bfloat16: 1e-3}[rollout.xs.dtype]


def test_ratio_is_one_under_bf16_autocast_at_the_same_shape(tiny):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        r = sample(tiny, tiny.encode(list("ab")), 4, 1., generators(0, 1), dtype=torch.bfloat16)
        assert torch.equal(replay_log_prob(tiny, r, 1.), r.log_probs) and r.log_probs.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_embedded_model_replays(dtype):
    sd = pytest.importorskip("ddpo_scratch.sd")
    if not (sd.TINY / "model_index.json").is_file(): pytest.skip("the embedded model is not here")
    d = sd.StableDiffusion(sd.load_pipeline("tiny"), guidance_scale=3.)
    r = sample(d, d.encode(["a fox", "a cow"]), 4, 1., generators(0, 1), dtype=dtype)
    with torch.no_grad():
        assert torch.equal(replay_log_prob(d, r, 1.), r.log_probs)
        assert (replay_log_prob(d, r[1], 1.) - r[1].log_probs).abs().max() <= 1e-6


def test_changed_weights_change_the_ratio_and_gradients_are_right():
    "Central differences in one weight"
    d = GaussianDenoiser(schedule(), (2,), mu=.5)
    r = sample(d, d.encode(["-"] * 3), 5, 1., generators(0, 1, 2))
    grad, = torch.autograd.grad(replay_log_prob(d, r, 1.).sum(), d.mu)
    with torch.no_grad():
        values = []
        for h in (1e-2, -1e-2):
            d.mu[0] += h; values.append(replay_log_prob(d, r, 1.).double().sum()); d.mu[0] -= h
        assert values[0] != r.log_probs.sum()
    assert_close(grad[0].double(), (values[0] - values[1]) / 2e-2, rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- float64

@pytest.fixture(scope="module")
def exact():
    "The embedded model with a LoRA, all in float64, and its parameters"
    sd = pytest.importorskip("ddpo_scratch.sd")
    d = sd.StableDiffusion(sd.load_pipeline("tiny", dtype=torch.float64), guidance_scale=3.)
    params = sd.add_lora(d, rank=2)
    with torch.no_grad():
        for i, p in enumerate(params): p += .05 * torch.randn(p.shape, generator=generator_for(i)).double()
    return d, params


@torch.no_grad()
def test_float64_goes_through_the_real_model(exact):
    d, params = exact
    c = d.encode(["a fox", "a cow"])
    r = sample(d, c, 3, 1., generators(0, 1), dtype=torch.float64)
    assert {p.dtype for p in params} == {c.cond.dtype, r.xs.dtype, r.log_probs.dtype, d.decode(r.x0).dtype} == {torch.float64}
    assert d(r.xs[:, 0], 501, c).dtype == torch.float64
    assert {x.dtype for x in policy(d, r.xs[:, 0], 501, 481, c, 1.)} == {step_kl(d, r.xs[:, 0], 501, 481, c, 1.).dtype} == {torch.float64}
    assert torch.equal(replay_log_prob(d, r, 1.), r.log_probs)
    narrow = sample(d, c, 3, 1., generators(0, 1))
    assert torch.equal(narrow.xs[:, 0].double(), r.xs[:, 0]), "the same draws, in any dtype"
    assert_close(narrow.xs.double(), r.xs, atol=1e-5, rtol=0)


def test_step_log_prob_through_ppo_loss(exact):
    "Central differences along three directions of the LoRA's weights, through the real U-Net, guidance, step, density and clip"
    from ddpo_scratch.ppo import importance_ratio, ppo_loss
    d, params = exact
    r = sample(d, d.encode(["a fox", "a cow"]), 3, 1., generators(0, 1), dtype=torch.float64)
    kept = [p.detach().clone() for p in params]
    def move(direction, far):
        with torch.no_grad():
            for p, k, v in zip(params, kept, direction): p.copy_(k + far * v)
    directions = [[torch.randn(p.shape, generator=generator_for(n, i)).double() for i, p in enumerate(params)] for n in range(4)]
    try:
        move(directions[3], 5e-3); kept = [p.detach().clone() for p in params]   # off the old policy
        row, step, advantage = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 2]), torch.tensor([1., -2., .5, 1.5]).double()
        log_prob = lambda: step_log_prob(d, r.xs[row, step], r.xs[row, step + 1], r.timesteps[step], r.timesteps[step + 1], r.c[row], 1.)
        far = (importance_ratio(log_prob(), r.log_probs[row, step]) - 1).abs().detach()
        loss = lambda: ppo_loss(log_prob(), r.log_probs[row, step], advantage, far.median().item() * 1.01)
        grads = torch.autograd.grad(loss(), params)
        for v in directions[:3]:
            with torch.no_grad():
                move(v, 1e-5); up = loss()
                move(v, -1e-5); down = loss()
                move(v, 0.)
            slope = sum((g * x).sum() for g, x in zip(grads, v))
            assert abs(slope) > 1e-5
            assert_close((up - down) / 2e-5, slope, rtol=1e-5, atol=1e-9)
    finally: move(directions[3], -5e-3)


# ---------------------------------------------------------------- distance to the base model

@pytest.mark.parametrize("eta", [.3, 1.])
def test_step_kl_equals_torch_distributions(tiny, eta):
    "With a reference that differs: the mean of torch's KL over dimensions, timesteps mixed, gradient through the policy alone"
    import contextlib, copy
    d = copy.deepcopy(tiny); base = copy.deepcopy(tiny.unet)
    @contextlib.contextmanager
    def reference():
        trained, d.unet = d.unet, base
        try: yield d
        finally: d.unet = trained
    d.reference = reference
    x, t, t_next, c = torch.randn(3, 4, 8, 8), torch.tensor([981, 501, 1]), torch.tensor([961, 481, -1]), d.encode(list("abc"))
    assert (step_kl(d, x, t, t_next, c, eta) == 0).all()
    with torch.no_grad():
        for p in d.unet.parameters(): p.mul_(1.05)
    kl = step_kl(d, x, t, t_next, c, eta)
    with torch.no_grad(): mean, std = policy(d, x, t, t_next, c, eta)
    with torch.no_grad(), reference(): mean_ref, _ = policy(d, x, t, t_next, c, eta)
    theirs = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(mean_ref, std))
    assert kl.shape == (3,) and kl.dtype == torch.float32 and (kl > 0).all()
    assert_close(kl.detach(), theirs.flatten(1).mean(1), rtol=1e-4, atol=0)
    kl.sum().backward()
    assert any((p.grad != 0).any() for p in d.unet.parameters()) and all(p.grad is None for p in base.parameters())
    moving = x.clone().requires_grad_()
    assert not torch.autograd.grad(step_kl(d, moving, t, t_next, c, eta).sum(), moving, allow_unused=True)[0], "the state is data: only one of the two policies would be differentiated by it"


def test_step_kl_gradient_is_that_of_the_formula():
    d = GaussianDenoiser(schedule(), (3,), mu=.5).double()
    with torch.no_grad(): d.mu += .2
    x, c = torch.randn(2, 3).double(), d.encode(["-"] * 2)
    kl = step_kl(d, x, 501, 401, c, .8)
    with torch.no_grad(), d.reference(): mean_ref, _ = policy(d, x, 501, 401, c, .8)
    mean, std = policy(d, x, 501, 401, c, .8)
    by_hand = ((mean - mean_ref)**2 / (2 * std**2)).mean(1)
    assert_close(kl, by_hand)
    assert_close(torch.autograd.grad(kl.sum(), d.mu)[0], torch.autograd.grad(by_hand.sum(), d.mu)[0])
    assert torch.equal(d.mu_base, torch.full((3,), .5).double()) and (d.mu == .7).all(), "the policy is back in place"


def test_step_kl_is_zero_without_density():
    d = GaussianDenoiser(schedule(steps_offset=0), (3,), mu=.5)
    with torch.no_grad(): d.mu += .2
    x, c = torch.randn(2, 3), d.encode(["-"] * 2)
    for t, t_next, eta in ((501, 401, 0.), (0, -1, 1.)):
        kl = step_kl(d, x, t, t_next, c, eta)
        assert (kl == 0).all() and (torch.autograd.grad(kl.sum(), d.mu)[0] == 0).all()
    mixed = step_kl(d, x, torch.tensor([501, 0]), torch.tensor([401, -1]), c, 1.)
    assert mixed[0] > 0 and mixed[1] == 0


# ---------------------------------------------------------------- steps without density

@pytest.mark.parametrize("changes, dropped", [({}, 0), (dict(steps_offset=0), 1), (dict(steps_offset=0, set_alpha_to_one=True), 1),
                                              (dict(set_alpha_to_one=True), 1), (dict(timestep_spacing="trailing"), 0),
                                              (dict(timestep_spacing="trailing", set_alpha_to_one=True), 1), (dict(timestep_spacing="linspace"), 1)])
@pytest.mark.parametrize("eta", [.1, 1.])
@pytest.mark.parametrize("n", [5, 30, 50])
def test_trainable_steps(changes, dropped, eta, n):
    steps = trainable_steps(schedule(**changes), n, eta)
    assert steps.dtype == torch.int64 and steps.tolist() == list(range(n - dropped))


@pytest.mark.parametrize("eta, said", [(0, "eta=0 makes every step deterministic"), (0., "eta=0 makes every step deterministic"), (2., "eta=2.0 is out of range"), (-1., "eta=-1.0 is out of range")])
def test_trainable_steps_errors(eta, said):
    with pytest.raises(ValueError, match=said): trainable_steps(schedule(), 10, eta)


def test_a_step_without_density_draws_nothing_and_has_no_gradient():
    d = GaussianDenoiser(schedule(steps_offset=0), (2,), mu=.5)
    gs, fresh = generators(0), generators(0)[0]
    r = sample(d, d.encode(["-"]), 5, 1., gs)
    for _ in range(1 + 4): torch.randn(2, generator=fresh)  # x_T and four steps
    assert torch.equal(torch.randn(3, generator=gs[0]), torch.randn(3, generator=fresh))
    assert (r.log_probs[:, -1] == 0).all() and r.xs.isfinite().all()
    replayed = replay_log_prob(d, r, 1.)
    assert torch.equal(replayed.detach(), r.log_probs)
    assert (torch.autograd.grad(replayed[:, -1].sum(), d.mu, retain_graph=True)[0] == 0).all()
    assert torch.autograd.grad(replayed.sum(), d.mu)[0].isfinite().all()


def test_eta_zero_samples_without_log_probs(tiny):
    r = sample(tiny, tiny.encode(list("ab")), STEPS, 0., generators(0, 1))
    assert (r.log_probs == 0).all() and r.xs.isfinite().all()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_zero_terminal_snr_rolls_out_and_replays(spacing):
    d = GaussianDenoiser(schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing=spacing), (4, 4, 4), mu=.3)
    for eta in (.5, 1.):
        r = sample(d, d.encode(["-"] * 2), 10, eta, generators(0, 1))
        now = replay_log_prob(d, r, eta)
        assert r.xs.isfinite().all() and torch.equal(now.detach(), r.log_probs)
        assert torch.autograd.grad(now.sum(), d.mu)[0].isfinite().all()


# ---------------------------------------------------------------- statistics

def test_log_probs_have_the_level_of_a_gaussian_entropy():
    d = GaussianDenoiser(schedule(), (4, 8, 8), mu=.3)
    r, n, dims = sample(d, d.encode(["-"] * 50), 10, 1., generators(*range(50))), 50, 256
    std = torch.stack([ddim_mean_std(r.xs[:1, i], r.xs[:1, i], t, t_next, d.schedule, 1.)[1].flatten()[0]
                       for i, (t, t_next) in enumerate(zip(r.timesteps[:-1], r.timesteps[1:]))])
    expected = -.5 - std.log() - math.log(2 * math.pi) / 2
    assert ((r.log_probs.mean(0) - expected).abs() < 4 / (2 * dims * n)**.5).all()


def test_the_score_function_has_mean_zero():
    n = 20_000
    d = GaussianDenoiser(schedule(), (n,), mu=.5)
    r = sample(d, d.encode(["-"]), 5, 1., generators(0))
    for i in range(5):
        score = torch.autograd.grad(replay_log_prob(d, r, 1., steps=[i]).sum(), d.mu)[0] * n
        assert score.mean().abs() < 4 * score.std() / n**.5


def test_one_sample_by_any_index_is_a_batch_of_one(rollout):
    for i in (2, torch.tensor(2), np.int64(2)):
        one = rollout[i]
        assert len(one) == len(one.c) == 1 and torch.equal(one.x0, rollout.x0[2:3]) and torch.equal(one.log_probs, rollout.log_probs[2:3])


def test_steps_count_from_the_end_where_negative(tiny, rollout):
    with torch.no_grad():
        assert_close(replay_log_prob(tiny, rollout, 1., [-2, 0]), replay_log_prob(tiny, rollout, 1., [rollout.n_steps - 2, 0]), rtol=0, atol=0)
    for i in (rollout.n_steps, -rollout.n_steps - 1):
        with pytest.raises(IndexError): replay_log_prob(tiny, rollout, 1., [i])
