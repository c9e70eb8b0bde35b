"Reward backpropagation: the pictures of `sample`, gradients against finite differences, K's rules against TRL's loop, LV and ReFL against naive code."
import pytest
import torch
from torch.testing import assert_close

from ddpo_scratch.backprop import draft_lv_sample, draw_k, refl_sample, trl_k_rule, truncated_sample
from ddpo_scratch.diffusion import GaussianDenoiser, Schedule, add_noise, pred_x0
from ddpo_scratch.lab import ToyDenoiser, estimates, exact_gradient, summary, toy_reward
from ddpo_scratch.rollout import generator_for, policy, sample

SD1 = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
           steps_offset=1, timestep_spacing="leading", prediction_type="epsilon")
T = 4


def schedule(**changes): return Schedule.from_config({**SD1, **changes})


def generators(n, seed=0): return [generator_for(seed, 0, i, "sample") for i in range(n)]


def flat(grads): return torch.cat([g.flatten() for g in grads])


@pytest.fixture
def toy(): return GaussianDenoiser(schedule(), (3, 4, 4), mu=.3)


@pytest.fixture(scope="module")
def sd():
    "The embedded model with a LoRA whose weights are off zero"
    from ddpo_scratch import sd
    if not (sd.TINY / "model_index.json").is_file(): pytest.skip("the embedded model is not here")
    denoiser = sd.StableDiffusion(sd.load_pipeline("tiny"), guidance_scale=3.)
    denoiser.params = sd.add_lora(denoiser, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in denoiser.params: p.data += .05 * torch.randn_like(p)
    return denoiser


# ---------------------------------------------------------------- the pictures of sample

@pytest.mark.parametrize("changes", [{}, dict(steps_offset=0), dict(set_alpha_to_one=True), dict(timestep_spacing="trailing"), dict(prediction_type="v_prediction"),
                                     dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")])
@pytest.mark.parametrize("eta", [0., .3, 1.])
def test_same_pictures_as_sample_at_every_k(changes, eta):
    d = GaussianDenoiser(schedule(**changes), (2, 4, 4), mu=.3)
    c = d.encode(["-"] * 3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        gs = generators(3)
        x0 = sample(d, c, T, eta, gs, dtype=dtype).x0
        after = [torch.randn(1, generator=g) for g in gs]
        for k in range(1, T + 1):
            mine = truncated_sample(d, c, T, eta, gs := generators(3), k, dtype=dtype)
            assert torch.equal(mine, x0) and mine.dtype == dtype and mine.requires_grad
            assert [torch.randn(1, generator=g) for g in gs] == after  # as many draws, too


@pytest.mark.parametrize("checkpoint", [False, True])
def test_same_pictures_on_the_unet(sd, checkpoint):
    c = sd.encode(["a fox", "a cow"])
    x0 = sample(sd, c, 2, 1., generators(2)).x0
    for k in (1, 2): assert torch.equal(truncated_sample(sd, c, 2, 1., generators(2), k, checkpoint), x0)


def test_no_autograd_asked_none_given(toy):
    with torch.no_grad(): assert not truncated_sample(toy, toy.encode(["-"]), T, 1., generators(1), T).requires_grad


def test_errors(toy):
    c = toy.encode(["-"] * 2)
    for k in (0, -1, T + 1):
        with pytest.raises(ValueError, match=f"k={k} is out of range"): truncated_sample(toy, c, T, 1., generators(2), k)
    for call in (lambda g: truncated_sample(toy, c, T, 1., g, 1), lambda g: draft_lv_sample(toy, c, T, 1., g), lambda g: refl_sample(toy, c, T, 1., g)):
        with pytest.raises(ValueError, match="3 generators for 2 samples"): call(generators(3))
    with pytest.raises(ValueError, match="eta=1.5 is out of range"): truncated_sample(toy, c, T, 1.5, generators(2), 1)
    with pytest.raises(ValueError, match="n=0 is out of range"): draft_lv_sample(toy, c, T, 1., generators(2), n=0)


# ---------------------------------------------------------------- gradients

def naive(d, c, n_steps, eta, gs, k, f):
    "f of x0, the first steps detached; written out"
    draw = lambda: torch.stack([torch.randn(d.latent_shape, generator=g) for g in gs])
    grid, x_t = d.schedule.grid(n_steps), draw()
    for i in range(n_steps):
        mean, std = policy(d, x_t, grid[i], grid[i+1], c, eta)
        x_t = mean + (std * draw() if eta else 0.)
        if i < n_steps - k: x_t = x_t.detach()
    return f(x_t)


@pytest.mark.parametrize("eta", [0., 1.])
@pytest.mark.parametrize("k", range(1, T + 1))
def test_gradient_is_that_of_a_detached_chain(toy, eta, k):
    c, f = toy.encode(["-"] * 3), lambda x: x.pow(3).sum()
    mine, = torch.autograd.grad(f(truncated_sample(toy, c, T, eta, generators(3), k)), toy.mu)
    theirs, = torch.autograd.grad(naive(toy, c, T, eta, generators(3), k, f), toy.mu)
    assert_close(mine, theirs)


def test_full_k_is_full_autograd_on_the_unet_and_checkpointing_changes_nothing(sd):
    c, f = sd.encode(["a fox"]), lambda x: x.square().mean()
    full = flat(torch.autograd.grad(naive(sd, c, 3, 1., generators(1), 3, f), sd.params))
    for checkpoint in (False, True):
        assert_close(flat(torch.autograd.grad(f(truncated_sample(sd, c, 3, 1., generators(1), 3, checkpoint)), sd.params)), full, atol=1e-6, rtol=1e-4)


def test_only_the_lora_gets_a_gradient(sd):
    for p in sd.parameters(): p.grad = None
    sd.decode(truncated_sample(sd, sd.encode(["a fox"]), 2, 0., generators(1), 1)).mean().backward()
    ids = {id(p) for p in sd.params}
    assert all((p.grad is not None) == (id(p) in ids) for p in sd.parameters())
    assert sum(p.grad.abs().sum() for p in sd.params) > 0
    for part in (sd.pipe.vae, sd.pipe.text_encoder): assert all(p.grad is None for p in part.parameters())
    for p in sd.params: p.grad = None


@pytest.fixture(scope="module")
def exact():
    "The embedded model with a LoRA off zero, all in float64"
    from ddpo_scratch import sd
    if not (sd.TINY / "model_index.json").is_file(): pytest.skip("the embedded model is not here")
    d = sd.StableDiffusion(sd.load_pipeline("tiny", dtype=torch.float64), guidance_scale=3.)
    d.params = sd.add_lora(d, 2)
    with torch.no_grad():
        for i, p in enumerate(d.params): p += .05 * torch.randn(p.shape, generator=generator_for(i)).double()
    return d


@pytest.mark.parametrize("name", ["full, eta 1", "full, eta 0", "checkpointed", "DRaFT-LV", "ReFL"])
def test_finite_differences_in_float64_through_the_unet(exact, name):
    "Along the gradient itself; what runs without autograd (LV's picture, nothing for the others) is held fixed while the weights move"
    from ddpo_scratch.rewards import jpeg_size_estimate
    d, c, grid, wide = exact, exact.encode(["a fox"]), exact.schedule.grid(2), torch.float64
    score = lambda x0: jpeg_size_estimate(d.decode(x0)).mean()
    def full(): return score(truncated_sample(d, c, 2, 0. if name == "full, eta 0" else 1., generators(1), 2, name == "checkpointed", dtype=wide))
    def lv(): return score(draft_lv_sample(d, c, 2, 0., generators(1), n=1, dtype=wide))
    def refl(): return score(refl_sample(d, c, 2, 0., generators(1), stop=(0, 0), dtype=wide))
    gs = generators(1)
    held = add_noise(sample(d, c, 2, 0., gs, dtype=wide).x0, torch.randn(d.latent_shape, generator=gs[0])[None], grid[1], d.schedule)
    def lv_held(): return score(policy(d, held, grid[1], grid[2], c, 0.)[0])
    mine, value = {"DRaFT-LV": (lv, lv_held), "ReFL": (refl, refl)}.get(name, (full, full))
    grad = flat(torch.autograd.grad(mine(), d.params))
    assert grad.dtype == wide and grad.norm() > 0
    def at(h):
        old, moves = [p.detach().clone() for p in d.params], (grad / grad.norm()).split([p.numel() for p in d.params])
        with torch.no_grad():
            for p, m in zip(d.params, moves): p += h * m.view_as(p)
            v = value().item()
            for p, o in zip(d.params, old): p.copy_(o)
        return v
    h = 1e-5
    assert abs((at(h) - at(-h)) / (2 * h) / grad.norm().item() - 1) < 1e-5


def test_visit_sees_each_differentiated_step_and_its_input(toy):
    c, r = toy.encode(["-"] * 2), None
    r = sample(toy, c, T, 1., generators(2))
    for k in range(1, T + 1):
        seen = []
        truncated_sample(toy, c, T, 1., generators(2), k, visit=lambda *a: seen.append(a))
        assert [(int(t), int(t_next)) for _, t, t_next in seen] == list(zip(r.timesteps[:-1].tolist(), r.timesteps[1:].tolist()))[-k:]
        assert all(torch.equal(x_t, r.xs[:, T - k + j]) for j, (x_t, _, _) in enumerate(seen))
        assert [x_t.requires_grad for x_t, _, _ in seen] == [False] + [True] * (k - 1)


# ---------------------------------------------------------------- unbiased and biased, in the lab

@pytest.mark.parametrize("eta", [0., .5, 1.])
def test_full_is_unbiased_and_truncated_misses_exactly_the_early_steps(eta):
    toy = ToyDenoiser(((.4, -.1, -.2, -.6),))
    for k in range(1, T + 1):
        s = summary(estimates(lambda toy, c, g: -toy_reward(truncated_sample(toy, c, T, eta, g, k)).mean(), toy, 500, 8), exact_gradient(toy, T, eta))
        part = exact_gradient(toy, T, eta, steps=range(T - k, T))
        assert ((s.mean - part) / s.stderr).abs().max() < 4
        assert (s.z.abs().max() < 4) == (k == T)


# ---------------------------------------------------------------- rules for K

def test_rules():
    for n in (1, 4, 50):
        assert draw_k("full", n) == n
        assert [draw_k(k, n) for k in range(1, n + 1)] == list(range(1, n + 1)) == [draw_k((k, k), n) for k in range(1, n + 1)]
    assert {draw_k((2, 5), 8, generator_for(0, i)) for i in range(200)} == {2, 3, 4, 5} == {draw_k([2, 5], 8, generator_for(0, i)) for i in range(200)}
    assert draw_k((1, 50), 50, generator_for(3)) == draw_k((1, 50), 50, generator_for(3))
    torch.manual_seed(0); a = draw_k((1, 1000), 1000); torch.manual_seed(0); assert draw_k((1, 1000), 1000) == a


@pytest.mark.parametrize("mean, std, n", [(8, 5, 50), (1, .2, 3), (3., 4., 4)])
def test_a_normal_k_has_the_chances_of_its_distribution(mean, std, n):
    "AlignProp's later scripts: cut = int(N(n - mean, std)), drawn again until 1 <= cut < n; here cut 0, K = n, is allowed too"
    import statistics
    below = statistics.NormalDist(mean, std).cdf
    mass = torch.tensor([below(k) - below(k - 1) for k in range(1, n + 1)])
    chances, g, draws = mass/mass.sum(), generator_for(0), 4000
    counts = torch.bincount(torch.tensor([draw_k(("normal", mean, std), n, g) for _ in range(draws)]), minlength=n + 1)
    assert counts[0] == 0 and len(counts) == n + 1
    stderr = (chances*(1 - chances)/draws).sqrt() + 1/draws
    assert ((counts[1:]/draws - chances).abs() < 4*stderr).all()


def test_a_fixed_k_draws_nothing():
    g, fresh = generator_for(0), generator_for(0)
    for rule in ("full", 3, (3, 3)): draw_k(rule, 5, g)
    assert torch.equal(torch.randn(2, generator=g), torch.randn(2, generator=fresh))


@pytest.mark.parametrize("rule, said", [(0, "out of range"), (-1, "out of range"), (9, "out of range"), ((0, 8), "out of range"), ((5, 4), "out of range"),
                                        ((1, 9), "out of range"), ("8", "is no rule"), ("random", "is no rule"), (1.5, "is no rule"), (True, "is no rule"),
                                        ((1, 2, 3), "is no rule"), (None, "is no rule"), (("normal", 0, 2), "out of range"), (("normal", 9, 2), "out of range"),
                                        (("normal", 3, 0), "out of range"), (("normal", "3", 1), "out of range"), (("gamma", 3, 1), "is no rule")])
def test_rules_that_are_refused(rule, said):
    with pytest.raises(ValueError, match=said): draw_k(rule, 8)


def trl_trained(T, cut):
    "TRL 0.23.1, modeling_sd_base, pipeline_step_with_grad: which steps keep the gradient of noise_pred"
    trained = []
    for i in range(T):
        grad = True
        if i < cut: grad = False  # noise_pred = noise_pred.detach()
        trained.append(grad)
    return trained


@pytest.mark.parametrize("n", [1, 4, 20, 50])
def test_trl_options_are_trls_steps(n):
    for cut in range(n):
        k = trl_k_rule(n, truncated_backprop_rand=False, truncated_backprop_timestep=cut)
        assert 1 <= k <= n and trl_trained(n, cut) == [i >= n - k for i in range(n)]
    for lo in range(n):
        for hi in range(lo, n + 1):
            rule = trl_k_rule(n, truncated_rand_backprop_minmax=(lo, hi))
            ks = {rule} if isinstance(rule, int) else set(range(rule[0], rule[1] + 1))
            assert ks == {sum(trl_trained(n, cut)) for cut in range(lo, hi + 1)} - {0}  # upper end included; a cut at n trains nothing
            assert draw_k(rule, n, generator_for(0)) in ks


def test_trl_defaults():
    assert trl_k_rule() == (1, 50) and trl_k_rule(truncated_backprop_rand=False) == 1
    assert trl_k_rule(truncated_rand_backprop_minmax=[10, 40]) == (10, 40) and trl_k_rule(20, truncated_rand_backprop_minmax=(19, 20)) == 1


@pytest.mark.parametrize("options, said", [(dict(n_steps=20), "minmax=.0, 50. is out of range"), (dict(truncated_rand_backprop_minmax=(-1, 5)), "out of range"),
                                           (dict(truncated_rand_backprop_minmax=(7, 5)), "out of range"), (dict(truncated_rand_backprop_minmax=(50, 50)), "trains nothing"),
                                           (dict(n_steps=20, truncated_backprop_rand=False), "a cut at 49 of 20 steps trains nothing"),
                                           (dict(truncated_backprop_rand=False, truncated_backprop_timestep=-1), "timestep=-1 is out of range")])
def test_trl_options_that_are_refused(options, said):
    with pytest.raises(ValueError, match=said): trl_k_rule(**options)


# ---------------------------------------------------------------- DRaFT-LV and ReFL

@pytest.mark.parametrize("eta", [0., 1.])
@pytest.mark.parametrize("n", [1, 3])
def test_lv_is_naive_code(toy, eta, n):
    c, gs = toy.encode(["-"] * 2), generators(2)
    mine = draft_lv_sample(toy, c, T, eta, generators(2), n)
    x0, t = sample(toy, c, T, eta, gs).x0, toy.schedule.grid(T)[-2]
    draw = lambda: torch.stack([torch.randn(toy.latent_shape, generator=g) for g in gs])
    noised = [add_noise(x0, draw(), t, toy.schedule) for _ in range(n)]
    rows = []
    for x_t in noised:
        mean, std = policy(toy, x_t, t, -1, c, eta)
        rows.append(mean + std * draw() if eta else mean)
    assert mine.shape == (2 * n, 3, 4, 4)
    assert_close(mine, torch.cat(rows))
    grads = [torch.autograd.grad(r.square().mean(), toy.mu)[0] for r in rows]
    assert_close(torch.autograd.grad(mine.square().mean(), toy.mu)[0], torch.stack(grads).mean(0))


def test_lv_rows_belong_to_their_prompts(sd):
    prompts, n = ["a fox", "a cow"], 2
    with torch.no_grad(): images = sd.decode(draft_lv_sample(sd, sd.encode(prompts), 3, 0., generators(2), n))
    far = lambda a, b: (images[a] - images[b]).abs().mean()
    assert far(0, 2) < far(0, 1) and far(1, 3) < far(0, 3)  # rows: fox, cow, fox, cow


@pytest.mark.parametrize("i", range(T))
def test_refl_is_naive_code(toy, i):
    c = toy.encode(["-"] * 2)
    x_t, t = sample(toy, c, T, 1., generators(2)).xs[:, i], toy.schedule.grid(T)[i].expand(2)
    mine, theirs = refl_sample(toy, c, T, 1., generators(2), stop=(i, i)), pred_x0(x_t, toy(x_t, t, c), t, toy.schedule)
    assert torch.equal(mine, theirs)
    assert torch.equal(torch.autograd.grad(mine.square().sum(), toy.mu)[0], torch.autograd.grad(theirs.square().sum(), toy.mu)[0])


def test_refl_stops_where_it_is_told(toy):
    c = toy.encode(["-"])
    at = {i: refl_sample(toy, c, 8, 1., generators(1), stop=(i, i)).detach() for i in range(8)}
    def stops(stop): return {next(i for i in at if torch.equal(at[i], refl_sample(toy, c, 8, 1., generators(1), stop, generator_for(0, j)))) for j in range(60)}
    assert stops((2, 4)) == {2, 3, 4} and stops(None) == {6, 7}  # the paper's 30 to 39 of 40 is the last quarter
    for stop in ((-1, 3), (0, 8), (5, 4)):
        with pytest.raises(ValueError, match="stop=.* is out of range"): refl_sample(toy, c, 8, 1., generators(1), stop)


def test_half_precision_latents(toy):
    c = toy.encode(["-"] * 2)
    assert draft_lv_sample(toy, c, T, 1., generators(2), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert refl_sample(toy, c, T, 1., generators(2), dtype=torch.bfloat16).dtype == torch.float32
    assert refl_sample(toy.double(), c, T, 1., generators(2), dtype=torch.float64).dtype == torch.float64
