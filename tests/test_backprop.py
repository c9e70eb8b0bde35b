"""Reward backpropagation: the pictures of `sample`, and gradients against finite differences.

Rules for K against TRL's loop, DRaFT-LV and ReFL against naive code.
"""

import itertools
import statistics

import pytest
import torch
from differences import slope_along
from runs import small
from samples import generators, schedule, with_lora
from torch.testing import assert_close

from ddpo_scratch.diffusion import GaussianDenoiser, add_noise, pred_x0
from ddpo_scratch.lab import ToyDenoiser, estimates, exact_gradient, summary, toy_reward
from ddpo_scratch.methods.backprop import (
    draft_lv_sample,
    draw_k,
    k_probabilities,
    k_rule,
    refl_sample,
    trl_k_rule,
    truncated_sample,
)
from ddpo_scratch.rewards.jpeg import jpeg_size_estimate
from ddpo_scratch.rollout import draw, generator_for, policy, sample
from ddpo_scratch.run.setup import setup

T = 4


def flat_grad(value, params):
    "Differentiate a scalar, and join the gradients of all parameters."
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])


@pytest.fixture
def toy():
    return GaussianDenoiser(schedule(), (3, 4, 4), mu=0.3)


@pytest.fixture(scope="module")
def sd():
    "Return the embedded model with a LoRA off zero, and the LoRA's parameters."
    return with_lora()


# ---------------------------------------------------------------- the pictures of sample


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(steps_offset=0),
        dict(set_alpha_to_one=True),
        dict(timestep_spacing="trailing"),
        dict(prediction_type="v_prediction"),
        dict(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    ],
)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_same_pictures_as_sample_at_every_k(changes, eta):
    d = GaussianDenoiser(schedule(**changes), (2, 4, 4), mu=0.3)
    c = d.encode(["-"] * 3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        streams = generators(3)
        x0 = sample(d, c, T, eta, streams, dtype=dtype).x0
        after = draw(streams, (1,), "cpu")
        for k in range(1, T + 1):
            streams = generators(3)
            ours = truncated_sample(d, c, T, eta, streams, k, dtype=dtype)
            assert torch.equal(ours, x0) and ours.dtype == dtype and ours.requires_grad
            assert torch.equal(draw(streams, (1,), "cpu"), after)  # as many draws, too


@pytest.mark.parametrize("checkpoint", [False, True])
def test_same_pictures_on_the_unet(sd, checkpoint):
    denoiser, _ = sd
    c = denoiser.encode(["a fox", "a cow"])
    x0 = sample(denoiser, c, 2, 1.0, generators(2)).x0
    for k in (1, 2):
        assert torch.equal(truncated_sample(denoiser, c, 2, 1.0, generators(2), k, checkpoint), x0)


def test_no_autograd_asked_none_given(toy):
    with torch.no_grad():
        assert not truncated_sample(toy, toy.encode(["-"]), T, 1.0, generators(1), T).requires_grad


def test_errors(toy):
    c = toy.encode(["-"] * 2)
    for k in (0, -1, T + 1):
        with pytest.raises(ValueError, match=f"k={k} is out of range"):
            truncated_sample(toy, c, T, 1.0, generators(2), k)
    for sampler, options in ((truncated_sample, (1,)), (draft_lv_sample, ()), (refl_sample, ())):
        with pytest.raises(ValueError, match="3 generators for 2 samples"):
            sampler(toy, c, T, 1.0, generators(3), *options)
    with pytest.raises(ValueError, match="eta=1.5 is out of range"):
        truncated_sample(toy, c, T, 1.5, generators(2), 1)
    with pytest.raises(ValueError, match="n=0 is out of range"):
        draft_lv_sample(toy, c, T, 1.0, generators(2), n=0)


# ---------------------------------------------------------------- gradients


def naive(d, c, n_steps, eta, streams, k):
    "Sample with the first steps detached, written out."
    grid, x_t = d.path.grid(n_steps), draw(streams, d.latent_shape, "cpu")
    for i in range(n_steps):
        mean, std = policy(d, x_t, grid[i], grid[i + 1], c, eta)
        x_t = mean + std * draw(streams, d.latent_shape, "cpu") if eta else mean
        if i < n_steps - k:
            x_t = x_t.detach()
    return x_t


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("k", range(1, T + 1))
def test_gradient_is_that_of_a_detached_chain(toy, eta, k):
    c = toy.encode(["-"] * 3)
    ours = truncated_sample(toy, c, T, eta, generators(3), k)
    theirs = naive(toy, c, T, eta, generators(3), k)
    gradients = [torch.autograd.grad(x0.pow(3).sum(), toy.mu)[0] for x0 in (ours, theirs)]
    assert_close(*gradients)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_full_k_is_full_autograd_on_the_unet(sd, checkpoint):
    denoiser, params = sd
    c = denoiser.encode(["a fox"])
    theirs = naive(denoiser, c, 3, 1.0, generators(1), 3).square().mean()
    ours = truncated_sample(denoiser, c, 3, 1.0, generators(1), 3, checkpoint).square().mean()
    assert_close(flat_grad(ours, params), flat_grad(theirs, params), atol=1e-6, rtol=1e-4)


def test_only_the_lora_gets_a_gradient(sd):
    denoiser, params = sd
    x0 = truncated_sample(denoiser, denoiser.encode(["a fox"]), 2, 0.0, generators(1), 1)
    denoiser.decode(x0).mean().backward()
    ids = {id(p) for p in params}
    assert all((p.grad is not None) == (id(p) in ids) for p in denoiser.parameters())
    assert sum(p.grad.abs().sum() for p in params) > 0
    for part in (denoiser.pipe.vae, denoiser.pipe.text_encoder):
        assert all(p.grad is None for p in part.parameters())
    for p in params:
        p.grad = None


@pytest.fixture(scope="module")
def exact():
    "Return the embedded model with a LoRA, all in float64, and its parameters."
    return with_lora(torch.float64)


def check_gradient(differentiated, value, params):
    "Compare the gradient of one function with differences of another, along the gradient itself."
    grad = flat_grad(differentiated(), params)
    assert grad.dtype == torch.float64 and grad.norm() > 0
    length = grad.norm().item()
    assert abs(slope_along(grad / length, value, params) / length - 1) < 1e-5


@pytest.mark.parametrize("eta, checkpoint", [(1.0, False), (0.0, False), (1.0, True)])
def test_finite_differences_of_the_full_chain(exact, eta, checkpoint):
    d, params = exact
    c = d.encode(["a fox"])

    def value():
        x0 = truncated_sample(d, c, 2, eta, generators(1), 2, checkpoint, dtype=torch.float64)
        return jpeg_size_estimate(d.decode(x0)).mean()

    check_gradient(value, value, params)


def test_finite_differences_of_refl(exact):
    d, params = exact
    c = d.encode(["a fox"])

    def value():
        x0 = refl_sample(d, c, 2, 0.0, generators(1), stop=(0, 0), dtype=torch.float64)
        return jpeg_size_estimate(d.decode(x0)).mean()

    check_gradient(value, value, params)


def test_finite_differences_of_lv(exact):
    "The picture that is noised again runs without autograd: it is held while the weights move."
    d, params = exact
    c, grid, streams = d.encode(["a fox"]), d.path.grid(2), generators(1)
    x0 = sample(d, c, 2, 0.0, streams, dtype=torch.float64).x0
    held = add_noise(x0, draw(streams, d.latent_shape, "cpu"), grid[1], d.path)

    def differentiated():
        x0 = draft_lv_sample(d, c, 2, 0.0, generators(1), n=1, dtype=torch.float64)
        return jpeg_size_estimate(d.decode(x0)).mean()

    def value():
        return jpeg_size_estimate(d.decode(policy(d, held, grid[1], grid[2], c, 0.0)[0])).mean()

    check_gradient(differentiated, value, params)


@pytest.mark.parametrize("k", range(1, T + 1))
def test_visit_sees_each_differentiated_step_and_its_input(toy, k):
    c, visits = toy.encode(["-"] * 2), []
    r = sample(toy, c, T, 1.0, generators(2))
    truncated_sample(toy, c, T, 1.0, generators(2), k, visit=lambda *step: visits.append(step))
    assert len(visits) == k
    for i, (x_t, t, t_next) in enumerate(visits, T - k):
        assert (t, t_next) == (r.timesteps[i], r.timesteps[i + 1])
        assert torch.equal(x_t, r.xs[:, i])
        assert x_t.requires_grad == (i > T - k)


# ---------------------------------------------------------------- unbiased and biased, in the lab


@pytest.mark.parametrize("k", range(1, T + 1))
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_full_is_unbiased_and_truncated_misses_exactly_the_early_steps(eta, k):
    toy = ToyDenoiser(((0.4, -0.1, -0.2, -0.6),))

    def loss(toy, c, streams):
        return -toy_reward(truncated_sample(toy, c, T, eta, streams, k)).mean()

    s = summary(estimates(loss, toy, 500, 8), exact_gradient(toy, T, eta))
    part = exact_gradient(toy, T, eta, steps=range(T - k, T))
    assert ((s.mean - part) / s.stderr).abs().max() < 4
    assert (s.z.abs().max() < 4) == (k == T)


# ---------------------------------------------------------------- rules for K


def test_rules():
    for n in (1, 4, 50):
        assert draw_k("full", n) == n
        for k in range(1, n + 1):
            assert draw_k(k, n) == draw_k((k, k), n) == k
    for pair in ((2, 5), [2, 5]):
        assert {draw_k(pair, 8, generator_for(0, i)) for i in range(200)} == {2, 3, 4, 5}
    assert draw_k((1, 50), 50, generator_for(3)) == draw_k((1, 50), 50, generator_for(3))
    torch.manual_seed(0)
    a = draw_k((1, 1000), 1000)
    torch.manual_seed(0)
    assert draw_k((1, 1000), 1000) == a


@pytest.mark.parametrize("mean, std, n", [(8, 5, 50), (1, 0.2, 3), (3.0, 4.0, 4)])
def test_a_normal_k_has_the_chances_of_its_distribution(mean, std, n):
    "AlignProp's later scripts draw cut = int(N(n - mean, std)) until 1 <= cut < n; ours allows 0."
    below = statistics.NormalDist(mean, std).cdf
    mass = torch.tensor([below(k) - below(k - 1) for k in range(1, n + 1)])
    chances, g, draws = mass / mass.sum(), generator_for(0), 4000
    ks = torch.tensor([draw_k(("normal", mean, std), n, g) for _ in range(draws)])
    counts = torch.bincount(ks, minlength=n + 1)
    assert counts[0] == 0 and len(counts) == n + 1
    stderr = (chances * (1 - chances) / draws).sqrt() + 1 / draws
    assert ((counts[1:] / draws - chances).abs() < 4 * stderr).all()


@pytest.mark.parametrize(
    "text, rule",
    [
        ("full", "full"),
        ("random", (1, 10)),
        ("3", (3, 3)),
        (" 2..5 ", (2, 5)),
        ("normal(8, 5)", ("normal", 8.0, 5.0)),
        ("several", "several"),
    ],
)
def test_rules_as_text(text, rule):
    assert k_rule(text, 10) == rule


def test_probabilities_of_k():
    assert k_probabilities("full", 10) == {10: 1.0}
    assert k_probabilities((2, 5), 10) == {k: 0.25 for k in (2, 3, 4, 5)}
    normal = k_probabilities(("normal", 8, 5), 50)
    assert abs(sum(normal.values()) - 1) < 0.01 and min(normal.values()) > 1e-3
    assert max(normal, key=normal.get) == 8


def test_a_fixed_k_draws_nothing():
    g, fresh = generator_for(0), generator_for(0)
    for rule in ("full", 3, (3, 3)):
        draw_k(rule, 5, g)
    assert torch.equal(torch.randn(2, generator=g), torch.randn(2, generator=fresh))


NORMALS = [("normal", 0, 2), ("normal", 9, 2), ("normal", 3, 0), ("normal", "3", 1)]
NO_RULES = ["8", "random", 1.5, True, (1, 2, 3), None, ("gamma", 3, 1)]


@pytest.mark.parametrize("rule", [0, -1, 9, (0, 8), (5, 4), (1, 9), *NORMALS], ids=str)
def test_rules_out_of_range(rule):
    with pytest.raises(ValueError, match="out of range"):
        draw_k(rule, 8)


@pytest.mark.parametrize("rule", NO_RULES, ids=str)
def test_what_is_not_a_rule(rule):
    with pytest.raises(ValueError, match="is not a rule"):
        draw_k(rule, 8)


def trl_trained(T, cut):
    "Say which steps keep noise_pred's gradient (TRL 0.23.1, pipeline_step_with_grad)."
    trained = []
    for i in range(T):
        grad = True
        if i < cut:
            grad = False  # noise_pred = noise_pred.detach()
        trained.append(grad)
    return trained


@pytest.mark.parametrize("n", [1, 4, 20, 50])
def test_trl_options_are_trls_steps(n):
    for cut in range(n):
        k = trl_k_rule(n, truncated_backprop_rand=False, truncated_backprop_timestep=cut)
        assert 1 <= k <= n and trl_trained(n, cut) == [i >= n - k for i in range(n)]
    trains = [sum(trl_trained(n, cut)) for cut in range(n + 1)]
    for lo, hi in itertools.combinations_with_replacement(range(n + 1), 2):
        if lo == n:
            continue  # refused: a cut at n trains nothing
        rule = trl_k_rule(n, truncated_rand_backprop_minmax=(lo, hi))
        ks = {rule} if isinstance(rule, int) else set(range(rule[0], rule[1] + 1))
        assert ks == set(trains[lo : hi + 1]) - {0}  # upper end included
        assert draw_k(rule, n, generator_for(0)) in ks


def test_trl_defaults():
    assert trl_k_rule() == (1, 50)
    assert trl_k_rule(truncated_backprop_rand=False) == 1
    assert trl_k_rule(truncated_rand_backprop_minmax=[10, 40]) == (10, 40)
    assert trl_k_rule(20, truncated_rand_backprop_minmax=(19, 20)) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_steps=20), "minmax=.0, 50. is out of range"),
        (dict(truncated_rand_backprop_minmax=(-1, 5)), "out of range"),
        (dict(truncated_rand_backprop_minmax=(7, 5)), "out of range"),
        (dict(truncated_rand_backprop_minmax=(50, 50)), "trains nothing"),
        (dict(n_steps=20, truncated_backprop_rand=False), "a cut at 49 of 20 steps trains nothing"),
        (
            dict(truncated_backprop_rand=False, truncated_backprop_timestep=-1),
            "timestep=-1 is out of range",
        ),
    ],
)
def test_trl_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trl_k_rule(**options)


# ---------------------------------------------------------------- DRaFT-LV and ReFL


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 3])
def test_lv_is_naive_code(toy, eta, n):
    c, streams = toy.encode(["-"] * 2), generators(2)
    ours = draft_lv_sample(toy, c, T, eta, generators(2), n)
    x0, t = sample(toy, c, T, eta, streams).x0, toy.path.grid(T)[-2]
    noises = [draw(streams, toy.latent_shape, "cpu") for _ in range(n)]
    rows = []
    for noise in noises:
        mean, std = policy(toy, add_noise(x0, noise, t, toy.path), t, -1, c, eta)
        rows.append(mean + std * draw(streams, toy.latent_shape, "cpu") if eta else mean)
    assert ours.shape == (2 * n, 3, 4, 4)
    assert_close(ours, torch.cat(rows))
    grads = [torch.autograd.grad(row.square().mean(), toy.mu)[0] for row in rows]
    assert_close(torch.autograd.grad(ours.square().mean(), toy.mu)[0], torch.stack(grads).mean(0))


def test_lv_rows_belong_to_their_prompts(sd):
    denoiser, _ = sd
    with torch.no_grad():
        c = denoiser.encode(["a fox", "a cow"])
        x0 = draft_lv_sample(denoiser, c, 3, 0.0, generators(2), n=2)
        fox, cow, fox_again, cow_again = denoiser.decode(x0)
    assert (fox - fox_again).abs().mean() < (fox - cow).abs().mean()
    assert (cow - cow_again).abs().mean() < (fox - cow_again).abs().mean()


@pytest.mark.parametrize("i", range(T))
def test_refl_is_naive_code(toy, i):
    c = toy.encode(["-"] * 2)
    x_t, t = sample(toy, c, T, 1.0, generators(2)).xs[:, i], toy.path.grid(T)[i].expand(2)
    ours = refl_sample(toy, c, T, 1.0, generators(2), stop=(i, i))
    theirs = pred_x0(x_t, toy(x_t, t, c), t, toy.path)
    assert torch.equal(ours, theirs)
    (gradient,) = torch.autograd.grad(ours.square().sum(), toy.mu)
    assert torch.equal(gradient, torch.autograd.grad(theirs.square().sum(), toy.mu)[0])


def test_refl_stops_where_it_is_told(toy):
    c = toy.encode(["-"])
    ends = [refl_sample(toy, c, 8, 1.0, generators(1), stop=(i, i)).detach() for i in range(8)]

    def stop_of(stop, j):
        x0 = refl_sample(toy, c, 8, 1.0, generators(1), stop, generator_for(0, j))
        return next(i for i, end in enumerate(ends) if torch.equal(end, x0))

    assert {stop_of((2, 4), j) for j in range(60)} == {2, 3, 4}
    # the paper's 30 to 39 of 40 is the last quarter
    assert {stop_of(None, j) for j in range(60)} == {6, 7}
    for stop in ((-1, 3), (0, 8), (5, 4)):
        with pytest.raises(ValueError, match="stop=.* is out of range"):
            refl_sample(toy, c, 8, 1.0, generators(1), stop)


def test_latents_in_other_precisions(toy):
    def dtype_of(sampler, denoiser, dtype):
        c = denoiser.encode(["-"] * 2)
        return sampler(denoiser, c, T, 1.0, generators(2), dtype=dtype).dtype

    assert dtype_of(draft_lv_sample, toy, torch.bfloat16) == torch.bfloat16
    assert dtype_of(refl_sample, toy, torch.bfloat16) == torch.float32
    assert dtype_of(refl_sample, toy.double(), torch.float64) == torch.float64


def kept_and_gradient(folder, k, checkpoint):
    "Count the numbers that autograd keeps of a chain with a KL penalty; return its gradient too."
    fields = dict(method="alignprop", backprop_steps=str(k), kl_weight=0.5, lora_rank=4)
    fields |= dict(reward_fn="brightness", backprop_checkpointing=checkpoint)
    state = setup(small(folder, **fields))
    generator = torch.Generator().manual_seed(0)
    for p in state.params:  # off zero, or the penalty would be flat
        torch.nn.init.normal_(p.data, std=0.1, generator=generator)
    held = {}

    def pack(tensor):
        held[tensor.data_ptr(), tensor.numel()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        c = state.denoiser.encode(["a fox", "a cat"])
        x0, gauges = state.method.chain(state.denoiser, c, state.noise([0, 1]), None)
    assert gauges["kl"] > 0
    return sum(held.values()), flat_grad(x0.mean() + gauges["kl"], state.params)


def test_a_penalty_keeps_no_more_where_steps_are_computed_again(tmp_path):
    "The gradient is the same, and of each step no more is kept than the latent it begins with."
    kept, gradients = zip(
        *[kept_and_gradient(tmp_path, k, again) for again in (False, True) for k in (1, 4)]
    )
    assert kept[1] > 2.5 * kept[0] and max(kept[2:]) < 0.01 * kept[0]
    for plain, again in zip(gradients[:2], gradients[2:]):
        assert_close(plain, again, rtol=1e-4, atol=1e-6)
