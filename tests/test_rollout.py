"Rollouts: log-probs, replay with ratio 1 in every dtype, named randomness, steps without density."

import contextlib
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from samples import SD1, generators, randn, schedule, with_lora
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ddpo_scratch.diffusion import DDIM, Conditioning, Denoiser, GaussianDenoiser, ddim_mean_std
from ddpo_scratch.flow import CPS, FlowDDIM, FlowPath
from ddpo_scratch.methods.ppo import importance_ratio, ppo_loss
from ddpo_scratch.models.sd import StableDiffusion, load_pipeline
from ddpo_scratch.rollout import (
    Rollout,
    default_clip_range,
    draw,
    gaussian_log_prob,
    generator_for,
    policy,
    replay_log_prob,
    sample,
    step_kl,
    step_log_prob,
    step_rule,
    trainable_steps,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STEPS = 8
NETWORK = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(16, 32),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=8,
    norm_num_groups=8,
)


class SmallNetwork(Denoiser):
    "Guide Stable Diffusion's network, a few thousand times smaller and with random weights."

    def __init__(self, **changes):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = UNet2DConditionModel(**NETWORK)
        self.path = schedule(**changes)
        self.latent_shape = (4, 8, 8)
        self.guidance_scale = 3.0

    def encode(self, prompts):
        text = torch.stack([torch.randn(5, 16, generator=generator_for(0, p)) for p in prompts])
        return Conditioning(text=text, blank=torch.zeros_like(text))

    def forward(self, x_t, t, c):
        text = torch.cat([c.blank, c.text])
        both = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), text).sample
        uncond, cond = both.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


@pytest.fixture(scope="module")
def tiny():
    return SmallNetwork()


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def rollout(request, tiny):
    c = tiny.encode(list("abcd"))
    return sample(tiny, c, STEPS, 1.0, generators(4), dtype=request.param)


# ---------------------------------------------------------------- named randomness


def numbers_of(*name):
    return tuple(torch.randn(4, generator=generator_for(*name)).tolist())


def test_generators_are_named():
    assert numbers_of(1, 2, 3, "noise") == numbers_of(1, 2, 3, "noise")
    short = [(0,), (1,), (-1,), (0, 0), (1, 0), (0, 1), (0, 0, 0)]
    large = [(0, 2**32), (0, 2**32 + 1), (0, -1)]
    words = [(0, "a"), (0, "b"), (0, "ab"), (0, ""), (0, "a", 1), (0, 1, "a")]
    names = short + large + words
    assert len({numbers_of(*name) for name in names}) == len(names)
    assert numbers_of(0, torch.tensor(3)) == numbers_of(0, 3)
    assert generator_for(0).device.type == "cpu"


def test_generators_stay_what_they_were():
    "Streams must not change between versions or processes: runs are resumed and compared by them."
    assert generator_for(0).initial_seed() == 15793235383387715774
    assert generator_for(42, 7, 255, "noise").initial_seed() == 2132001528800742382


def test_generators_look_independent():
    streams = [generator_for(0, epoch, i, "noise") for epoch in range(8) for i in range(64)]
    x = draw(streams, (64,), "cpu")
    n = x.numel()
    assert x.mean().abs() < 4 / n**0.5 and abs(x.std() - 1) < 4 / (2 * n) ** 0.5
    corr = x @ x.T / 64 - torch.diag(x.square().mean(1))
    assert abs(corr.square().sum() / (512 * 511) * 64 - 1) < 0.05


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_draws_the_same_noise_in_any_batch(tiny, eta):
    c = tiny.encode(list("abcd"))
    whole = sample(tiny, c, STEPS, eta, generators(4))
    parts = [sample(tiny, c[i], STEPS, eta, generators(i)) for i in ([0], [1, 2], [3])]
    parts, order = Rollout.cat(parts), [3, 1, 0, 2]
    mixed = sample(tiny, c[order], STEPS, eta, generators(order))
    assert torch.equal(parts.xs[:, 0], whole.xs[:, 0])
    assert torch.equal(mixed.xs[:, 0], whole.xs[order, 0])
    assert_close(parts.xs, whole.xs, atol=1e-4, rtol=0)
    assert_close(mixed.xs, whole.xs[order], atol=1e-4, rtol=0)


def test_step_noise_is_bitwise_the_same_in_any_batch():
    "A denoiser that computes row by row: nothing but the noise could differ."
    d = GaussianDenoiser(schedule(), (3, 4, 4), mu=0.3)
    whole = sample(d, d.encode(["-"] * 6), STEPS, 1.0, generators(6))
    alone = sample(d, d.encode(["-"]), STEPS, 1.0, generators([4]))
    assert torch.equal(whole[4].xs, alone.xs)


def test_a_number_is_read_as_ddim():
    assert step_rule(1) == step_rule(1.0) == DDIM(eta=1.0)
    rule = object()
    assert step_rule(rule) is rule


# ---------------------------------------------------------------- log-prob


@pytest.mark.parametrize("std", [1e-3, 0.02, 1.0, 30.0])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_log_prob_equals_torch_distributions(std, reduce):
    mean = randn(5, 4, 8, 8)
    x = mean + std * randn(5, 4, 8, 8, seed=1)
    theirs = Normal(mean, std).log_prob(x).flatten(1)
    ours = gaussian_log_prob(x, mean, torch.full((5, 1, 1, 1), std), reduce)
    assert ours.shape == (5,) and ours.dtype == torch.float32
    assert_close(ours, getattr(theirs, reduce)(1), atol=1e-5, rtol=1e-5)
    assert_close(gaussian_log_prob(x, mean, torch.tensor(std), reduce), ours)


def test_sum_is_mean_times_dimensions():
    x, mean, std = randn(3, 4, 16, 16), randn(3, 4, 16, 16, seed=1), torch.ones(3, 1, 1, 1)
    assert_close(gaussian_log_prob(x, mean, std, "sum"), 1024 * gaussian_log_prob(x, mean, std))


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 16, 16), (4, 128, 128), (3,)])
def test_clip_range_keeps_the_joint_log_ratio(shape):
    assert math.isclose(default_clip_range(shape) * math.prod(shape), 1.6384)


def test_known_clip_ranges():
    assert default_clip_range((4, 64, 64)) == 1e-4
    assert math.isclose(default_clip_range(torch.Size((4, 16, 16))), 1.6e-3)


@pytest.mark.parametrize("shape", [(), [], (0,), (4, 0, 16)])
def test_empty_latent_shape(shape):
    with pytest.raises(ValueError, match="latent_shape"):
        default_clip_range(shape)


def test_log_prob_without_density():
    x, mean = randn(2, 3), randn(2, 3, seed=1).requires_grad_()
    std = torch.tensor([[0.0], [0.5]])
    log_prob = gaussian_log_prob(x, mean, std)
    (grad,) = torch.autograd.grad(log_prob.sum(), mean)
    assert log_prob[0] == 0 and (grad[0] == 0).all()
    assert grad[1].isfinite().all() and (grad[1] != 0).all()
    with pytest.raises(ValueError, match="reduce='avg' is unknown: use mean or sum"):
        gaussian_log_prob(x, mean, std, "avg")


def test_log_prob_gradient_is_the_standardised_residual():
    x, mean, std = randn(2, 3), randn(2, 3, seed=1).requires_grad_(), torch.full((2, 1), 0.3)
    (grad,) = torch.autograd.grad(gaussian_log_prob(x, mean, std).sum(), mean)
    assert_close(grad, ((x - mean) / 0.09 / 3).detach())


# ---------------------------------------------------------------- sampling


def test_rollout_is_diffusers_sampling(tiny):
    "Same noise in, same latents out, as DDIMScheduler.step in a loop."
    c, streams = tiny.encode(["a"]), generators(1)
    r = sample(tiny, c, STEPS, 1.0, generators(1))
    d = DDIMScheduler(**SD1)
    d.set_timesteps(STEPS)
    x = draw(streams, tiny.latent_shape, "cpu")
    with torch.no_grad():
        for i, t in enumerate(d.timesteps):
            noise = draw(streams, tiny.latent_shape, "cpu")
            x = d.step(tiny(x, t[None], c), t, x, eta=1.0, variance_noise=noise).prev_sample
            assert_close(r.xs[:, i + 1], x, atol=2e-4, rtol=1e-4)


def test_shapes_and_dtypes(tiny, rollout):
    assert rollout.xs.shape == (4, STEPS + 1, 4, 8, 8) and rollout.log_probs.shape == (4, STEPS)
    assert rollout.log_probs.dtype == torch.float32 and not rollout.xs.requires_grad
    assert torch.equal(rollout.timesteps, tiny.path.grid(STEPS)) and rollout.n_steps == STEPS
    assert torch.equal(rollout.x0, rollout.xs[:, -1]) and len(rollout) == len(rollout.c) == 4


def test_rollouts_index_join_and_pickle(rollout):
    mask = torch.tensor([True, False, True, False])
    indices = {1: 2, 2: slice(1, 3), 3: torch.tensor([3, 0, 0])}
    for n, i in [*indices.items(), (1, -1), (2, [3, 0]), (2, mask)]:
        r = rollout[i]
        assert len(r) == len(r.c) == len(r.log_probs) == n and r.n_steps == STEPS
    assert torch.equal(rollout[-1].xs, rollout.xs[3:])
    again = Rollout.cat([rollout[:1], rollout[1:]])
    assert torch.equal(again.xs, rollout.xs)
    assert torch.equal(again.log_probs, rollout.log_probs)
    assert torch.equal(again.c.text, rollout.c.text)
    assert torch.equal(pickle.loads(pickle.dumps(rollout)).xs, rollout.xs)
    other = Rollout(rollout.xs, rollout.timesteps + 1, rollout.log_probs, rollout.c)
    with pytest.raises(ValueError, match="different grids"):
        Rollout.cat([rollout, other])


def test_progress_wraps_the_steps():
    d, steps = GaussianDenoiser(schedule(), (2,)), []

    def progress(iterator):
        for i in iterator:
            steps.append(i)
            yield i

    sample(d, d.encode(["-"]), 5, 1.0, generators(1), progress=progress)
    assert steps == list(range(5))


def test_policy_is_one_ddim_step(tiny):
    c, x_t = tiny.encode(list("ab")), randn(2, 4, 8, 8)
    t, t_next = torch.tensor([501, 21]), torch.tensor([481, 1])
    ours = policy(tiny, x_t, t, t_next, c, 0.7)
    by_hand = ddim_mean_std(x_t, tiny(x_t, t, c), t, t_next, tiny.path, 0.7)
    assert torch.equal(ours[0], by_hand[0]) and torch.equal(ours[1], by_hand[1])
    assert ours[0].requires_grad
    numbers = policy(tiny, x_t, 501, 481, c, 0.7)[0]
    tensors = policy(tiny, x_t, torch.tensor([501, 501]), torch.tensor(481), c, DDIM(0.7))[0]
    assert torch.equal(numbers, tensors)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_wrong_number_of_generators(tiny, n):
    with pytest.raises(ValueError, match=f"{n} generators for 2 samples: give one per sample"):
        sample(tiny, tiny.encode(list("ab")), STEPS, 1.0, generators(n))


@pytest.mark.parametrize(
    "n_steps, eta, message",
    [
        (0, 1.0, "n_steps=0 is out of range"),
        (1001, 1.0, "n_steps=1001 is out of range"),
        (5, 1.5, "eta=1.5 is out of range"),
        (5, -1.0, "eta=-1.0 is out of range"),
    ],
)
def test_sampling_errors(n_steps, eta, message):
    d = GaussianDenoiser(schedule(), (2,))
    with pytest.raises(ValueError, match=message):
        sample(d, d.encode(["-"]), n_steps, eta, generators(1))


# ---------------------------------------------------------------- replay


def test_ratio_is_one_bitwise_at_the_same_shape(tiny, rollout):
    with torch.no_grad():
        assert torch.equal(replay_log_prob(tiny, rollout, 1.0), rollout.log_probs)
    # with autograd on, too
    assert torch.equal(replay_log_prob(tiny, rollout, 1.0).detach(), rollout.log_probs)
    some = replay_log_prob(tiny, rollout, 1.0, steps=torch.tensor([STEPS - 1, 2]))
    assert torch.equal(some.detach(), rollout.log_probs[:, [STEPS - 1, 2]])


def log_prob_of(denoiser, r, row, step):
    "Ask about some transitions of a rollout in one batch."
    x_t, x_next = r.xs[row, step], r.xs[row, step + 1]
    t, t_next = r.timesteps[step], r.timesteps[step + 1]
    return step_log_prob(denoiser, x_t, x_next, t, t_next, r.c[row], 1.0)


# At another shape sums are added up in another order; how much that changes depends on the number
# of threads, too. A fiftieth of the clip range of 1e-4 is far enough from it.
ROUNDING = 2e-6


@torch.no_grad()
@pytest.mark.parametrize("split", [([0], [1], [2], [3]), ([0, 1, 2], [3])])
def test_ratio_is_one_when_split(tiny, rollout, split):
    now = torch.cat([replay_log_prob(tiny, rollout[i], 1.0) for i in split])
    assert (now - rollout.log_probs).abs().max() <= ROUNDING


@torch.no_grad()
def test_ratio_is_one_for_shuffled_pairs_that_span_timesteps(tiny, rollout):
    order = torch.randperm(4 * STEPS, generator=generator_for(0))
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(STEPS))[order]
    for row, step in (part.T for part in pairs.split(7)):
        now = log_prob_of(tiny, rollout, row, step)
        assert (now - rollout.log_probs[row, step]).abs().max() <= ROUNDING


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ratio_is_one_for_every_prediction_type(kind, eta):
    d = SmallNetwork(prediction_type=kind)
    c = d.encode(list("ab"))
    for dtype in DTYPES:
        r = sample(d, c, 4, eta, generators(2), dtype=dtype)
        with torch.no_grad():
            assert torch.equal(replay_log_prob(d, r, eta), r.log_probs)


@torch.no_grad()
def test_scoring_before_rounding_is_the_bug_we_do_not_have(tiny, rollout):
    "Scored, then rounded: far outside a clip range of 1e-4 at the last step."
    i, dtype = STEPS - 1, rollout.xs.dtype
    mean, std = policy(tiny, rollout.xs[:, i], rollout.timesteps[i], -1, rollout.c, 1.0)
    x_next = mean + std * torch.randn(mean.shape, generator=generator_for(1))
    stored = gaussian_log_prob(x_next.to(dtype), mean, std)
    gap = (stored - gaussian_log_prob(x_next, mean, std)).abs().max()
    if dtype == torch.float32:
        assert gap == 0
    else:
        assert gap > {torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]


def test_ratio_is_one_under_bf16_autocast_at_the_same_shape(tiny):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        r = sample(tiny, tiny.encode(list("ab")), 4, 1.0, generators(2), dtype=torch.bfloat16)
        assert torch.equal(replay_log_prob(tiny, r, 1.0), r.log_probs)
        assert r.log_probs.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_embedded_model_replays(dtype):
    d = StableDiffusion(load_pipeline("tiny"), guidance_scale=3.0)
    r = sample(d, d.encode(["a fox", "a cow"]), 4, 1.0, generators(2), dtype=dtype)
    with torch.no_grad():
        assert torch.equal(replay_log_prob(d, r, 1.0), r.log_probs)
        assert (replay_log_prob(d, r[1], 1.0) - r[1].log_probs).abs().max() <= ROUNDING


def test_changed_weights_change_the_ratio_and_gradients_are_right():
    "Central differences in one weight."
    d = GaussianDenoiser(schedule(), (2,), mu=0.5)
    r = sample(d, d.encode(["-"] * 3), 5, 1.0, generators(3))
    (grad,) = torch.autograd.grad(replay_log_prob(d, r, 1.0).sum(), d.mu)
    with torch.no_grad():
        values = []
        for h in (1e-2, -1e-2):
            d.mu[0] += h
            values.append(replay_log_prob(d, r, 1.0).double().sum())
            d.mu[0] -= h
        assert values[0] != r.log_probs.sum()
    assert_close(grad[0].double(), (values[0] - values[1]) / 2e-2, rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- float64


@pytest.fixture(scope="module")
def exact():
    "Return the embedded model with a LoRA, all in float64, and its parameters."
    return with_lora(torch.float64)


@torch.no_grad()
def test_float64_goes_through_the_real_model(exact):
    d, params = exact
    c = d.encode(["a fox", "a cow"])
    r = sample(d, c, 3, 1.0, generators(2), dtype=torch.float64)
    x_t = r.xs[:, 0]
    results = [c.cond, r.xs, r.log_probs, d.decode(r.x0), d(x_t, 501, c)]
    results += [*policy(d, x_t, 501, 481, c, 1.0), step_kl(d, x_t, 501, 481, c, 1.0)]
    assert {tensor.dtype for tensor in (*params, *results)} == {torch.float64}
    assert torch.equal(replay_log_prob(d, r, 1.0), r.log_probs)
    narrow = sample(d, c, 3, 1.0, generators(2))
    assert torch.equal(narrow.xs[:, 0].double(), x_t), "the same draws, in any dtype"
    assert_close(narrow.xs.double(), r.xs, atol=1e-5, rtol=0)


@torch.no_grad()
def move(params, direction, far):
    "Walk along a direction, given as one tensor for each parameter."
    for p, v in zip(params, direction):
        p += far * v


def test_step_log_prob_through_ppo_loss(exact):
    "Central differences along three directions, through network, guidance, step, density and clip."
    d, params = exact
    r = sample(d, d.encode(["a fox", "a cow"]), 3, 1.0, generators(2), dtype=torch.float64)
    row, step = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 2])
    old, advantage = r.log_probs[row, step], torch.tensor([1.0, -2.0, 0.5, 1.5]).double()

    def direction(n):
        return [randn(*p.shape, seed=100 * n + i).double() for i, p in enumerate(params)]

    move(params, direction(3), 5e-3)  # off the old policy
    ratio = importance_ratio(log_prob_of(d, r, row, step), old).detach()
    clip_range = (ratio - 1).abs().median().item() * 1.01  # some are clipped, some are not

    def loss():
        return ppo_loss(log_prob_of(d, r, row, step), old, advantage, clip_range)

    grads = torch.autograd.grad(loss(), params)
    for v in map(direction, range(3)):
        move(params, v, 1e-5)
        up = loss().detach()
        move(params, v, -2e-5)
        down = loss().detach()
        move(params, v, 1e-5)
        slope = sum((g * x).sum() for g, x in zip(grads, v))
        assert abs(slope) > 1e-5
        assert_close((up - down) / 2e-5, slope, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- distance to the base model


class Moved(SmallNetwork):
    "Keep a frozen copy of the network for reference, and move the trained one away from it."

    def __init__(self):
        super().__init__()
        self.base = copy.deepcopy(self.network)

    def move(self):
        with torch.no_grad():
            for p in self.network.parameters():
                p.mul_(1.05)

    @contextlib.contextmanager
    def reference(self):
        trained, self.network = self.network, self.base
        try:
            yield self
        finally:
            self.network = trained


@pytest.fixture
def transitions():
    "Return states, times and conditioning of three transitions at different times."
    c = SmallNetwork().encode(list("abc"))
    return randn(3, 4, 8, 8), torch.tensor([981, 501, 1]), torch.tensor([961, 481, -1]), c


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_step_kl_equals_torch_distributions(transitions, eta):
    d = Moved()
    assert (step_kl(d, *transitions, eta) == 0).all()
    d.move()
    kl = step_kl(d, *transitions, eta)
    with torch.no_grad():
        mean, std = policy(d, *transitions, eta)
        with d.reference():
            mean_ref, _ = policy(d, *transitions, eta)
    theirs = kl_divergence(Normal(mean, std), Normal(mean_ref, std))
    assert kl.shape == (3,) and kl.dtype == torch.float32 and (kl > 0).all()
    assert_close(kl.detach(), theirs.flatten(1).mean(1), rtol=1e-4, atol=0)


def test_step_kl_differentiates_the_policy_alone(transitions):
    "The state is data: only one of the two policies would be differentiated by it."
    d = Moved()
    d.move()
    x, *others = transitions
    x = x.requires_grad_()
    step_kl(d, x, *others, 1.0).sum().backward()
    assert any((p.grad != 0).any() for p in d.network.parameters())
    assert all(p.grad is None for p in d.base.parameters())
    assert x.grad is None


def test_step_kl_gradient_is_that_of_the_formula():
    d = GaussianDenoiser(schedule(), (3,), mu=0.5).double()
    with torch.no_grad():
        d.mu += 0.2
    x, c = randn(2, 3).double(), d.encode(["-"] * 2)
    kl = step_kl(d, x, 501, 401, c, 0.8)
    with torch.no_grad(), d.reference():
        mean_ref, _ = policy(d, x, 501, 401, c, 0.8)
    mean, std = policy(d, x, 501, 401, c, 0.8)
    by_hand = ((mean - mean_ref) ** 2 / (2 * std**2)).mean(1)
    assert_close(kl, by_hand)
    (ours,) = torch.autograd.grad(kl.sum(), d.mu)
    assert_close(ours, torch.autograd.grad(by_hand.sum(), d.mu)[0])
    assert torch.equal(d.mu_base, torch.full((3,), 0.5).double())
    assert (d.mu == 0.7).all(), "the policy is back in place"


def test_step_kl_is_zero_without_density():
    d = GaussianDenoiser(schedule(steps_offset=0), (3,), mu=0.5)
    with torch.no_grad():
        d.mu += 0.2
    x, c = randn(2, 3), d.encode(["-"] * 2)
    for t, t_next, eta in ((501, 401, 0.0), (0, -1, 1.0)):
        kl = step_kl(d, x, t, t_next, c, eta)
        assert (kl == 0).all() and (torch.autograd.grad(kl.sum(), d.mu)[0] == 0).all()
    mixed = step_kl(d, x, torch.tensor([501, 0]), torch.tensor([401, -1]), c, 1.0)
    assert mixed[0] > 0 and mixed[1] == 0


# ---------------------------------------------------------------- steps without density


@pytest.mark.parametrize(
    "changes, dropped",
    [
        ({}, 0),
        (dict(steps_offset=0), 1),
        (dict(steps_offset=0, set_alpha_to_one=True), 1),
        (dict(set_alpha_to_one=True), 1),
        (dict(timestep_spacing="trailing"), 0),
        (dict(timestep_spacing="trailing", set_alpha_to_one=True), 1),
        (dict(timestep_spacing="linspace"), 1),
    ],
)
@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("n", [5, 30, 50])
def test_trainable_steps(changes, dropped, eta, n):
    steps = trainable_steps(schedule(**changes), n, eta)
    assert steps.dtype == torch.int64 and steps.tolist() == list(range(n - dropped))


@pytest.mark.parametrize(
    "eta, message",
    [
        (0, "eta=0 makes every step deterministic"),
        (0.0, "eta=0 makes every step deterministic"),
        (2.0, "eta=2.0 is out of range"),
        (-1.0, "eta=-1.0 is out of range"),
    ],
)
def test_trainable_steps_errors(eta, message):
    with pytest.raises(ValueError, match=message):
        trainable_steps(schedule(), 10, eta)


def test_a_rule_without_noise_is_told_apart_from_an_eta_of_zero():
    "With eta 1 a flow's only step has no noise, which a larger eta would not change."
    for rule, words in ((1.0, r"DDIM\(eta=1.0\)"), (CPS(0.8), r"CPS\(a=0.8\)")):
        with pytest.raises(ValueError, match=f"{words} draws no noise in any step .* more steps"):
            trainable_steps(FlowPath(), 1, rule)
    with pytest.raises(ValueError, match="use eta > 0"):
        trainable_steps(FlowPath(), 4, FlowDDIM(0.0))


def test_a_step_without_density_draws_nothing_and_has_no_gradient():
    d = GaussianDenoiser(schedule(steps_offset=0), (2,), mu=0.5)
    streams, fresh = generators(1), generators(1)
    r = sample(d, d.encode(["-"]), 5, 1.0, streams)
    for _ in range(1 + 4):  # x_T and four steps
        draw(fresh, (2,), "cpu")
    assert torch.equal(draw(streams, (3,), "cpu"), draw(fresh, (3,), "cpu"))
    assert (r.log_probs[:, -1] == 0).all() and r.xs.isfinite().all()
    replayed = replay_log_prob(d, r, 1.0)
    assert torch.equal(replayed.detach(), r.log_probs)
    assert (torch.autograd.grad(replayed[:, -1].sum(), d.mu, retain_graph=True)[0] == 0).all()
    assert torch.autograd.grad(replayed.sum(), d.mu)[0].isfinite().all()


def test_eta_zero_samples_without_log_probs(tiny):
    r = sample(tiny, tiny.encode(list("ab")), STEPS, 0.0, generators(2))
    assert (r.log_probs == 0).all() and r.xs.isfinite().all()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_zero_terminal_snr_rolls_out_and_replays(spacing):
    path = schedule(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing=spacing
    )
    d = GaussianDenoiser(path, (4, 4, 4), mu=0.3)
    for eta in (0.5, 1.0):
        r = sample(d, d.encode(["-"] * 2), 10, eta, generators(2))
        now = replay_log_prob(d, r, eta)
        assert r.xs.isfinite().all() and torch.equal(now.detach(), r.log_probs)
        assert torch.autograd.grad(now.sum(), d.mu)[0].isfinite().all()


# ---------------------------------------------------------------- statistics


def test_log_probs_have_the_level_of_a_gaussian_entropy():
    n, dims = 50, 4 * 8 * 8
    d = GaussianDenoiser(schedule(), (4, 8, 8), mu=0.3)
    r = sample(d, d.encode(["-"] * n), 10, 1.0, generators(n))
    expected = -0.5 - DDIM(1.0).stds(d.path, 10).log() - math.log(2 * math.pi) / 2
    assert ((r.log_probs.mean(0) - expected).abs() < 4 / (2 * dims * n) ** 0.5).all()


def test_the_score_function_has_mean_zero():
    n = 20_000
    d = GaussianDenoiser(schedule(), (n,), mu=0.5)
    r = sample(d, d.encode(["-"]), 5, 1.0, generators(1))
    for i in range(5):
        score = torch.autograd.grad(replay_log_prob(d, r, 1.0, steps=[i]).sum(), d.mu)[0] * n
        assert score.mean().abs() < 4 * score.std() / n**0.5


def test_one_sample_by_any_index_is_a_batch_of_one(rollout):
    for i in (2, torch.tensor(2), np.int64(2)):
        one = rollout[i]
        assert len(one) == len(one.c) == 1
        assert torch.equal(one.x0, rollout.x0[2:3])
        assert torch.equal(one.log_probs, rollout.log_probs[2:3])


def test_steps_count_from_the_end_where_negative(tiny, rollout):
    with torch.no_grad():
        from_the_end = replay_log_prob(tiny, rollout, 1.0, [-2, 0])
        assert torch.equal(from_the_end, replay_log_prob(tiny, rollout, 1.0, [STEPS - 2, 0]))
    for i in (rollout.n_steps, -rollout.n_steps - 1):
        with pytest.raises(IndexError):
            replay_log_prob(tiny, rollout, 1.0, [i])
