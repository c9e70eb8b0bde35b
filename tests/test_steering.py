"Steering without training: closed forms, costs that are counted, and what must change no picture."

import math

import pytest
import torch
from samples import randn, schedule
from torch.distributions import Normal
from torch.testing import assert_close

from ddpo_scratch import steering
from ddpo_scratch.diffusion import GaussianDenoiser
from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.flow import FlowPath
from ddpo_scratch.methods.backprop import truncated_sample
from ddpo_scratch.models.sd import StableDiffusion, load_pipeline
from ddpo_scratch.rewards.base import Reward, Scorer
from ddpo_scratch.rollout import draw, generator_for, policy
from ddpo_scratch.steering import best_of_n, fk_steering, from_noise, reno

KINDS = ("difference", "max", "sum")


def toy(shape=(2,), prediction="epsilon", s=0.3):
    "A denoiser of Gaussian data; it counts the latents that it is asked about."

    class Counting(GaussianDenoiser):
        asked = 0

        def forward(self, x_t, t, c):
            self.asked += len(x_t)
            return super().forward(x_t, t, c)

    return Counting(schedule(prediction_type=prediction), shape, mu=0.1, s=s)


class Grey(Reward):
    "Score the mean grey value; count the pictures that were seen."

    name, differentiable = "grey", True

    def __init__(self, differentiable=True):
        self.seen, self.prompts, self.facts = 0, [], []
        self.differentiable = differentiable

    def __call__(self, images, prompts, metadata):
        self.seen += len(images)
        self.prompts += prompts
        self.facts += metadata
        return images.mean((1, 2, 3))


# ---------------------------------------------------------------- best of N


@pytest.mark.parametrize("n, exact", [(1, 0), (2, 0.5641895835), (3, 0.8462843753)])
def test_expected_maximum_has_its_closed_forms(n, exact):
    assert abs(steering.expected_maximum(n) - exact) < 1e-9


@pytest.mark.parametrize("n", [4, 5, 50])
def test_expected_maximum_is_that_of_draws(n):
    best = randn(50_000, n, dtype=torch.float64).max(1).values
    assert abs(best.mean() - steering.expected_maximum(n)) < 4 * best.std() / 50_000**0.5


@pytest.mark.parametrize("n", [1, 3, 20])
def test_distance_of_the_best_is_that_of_draws(n):
    best = randn(50_000, n, seed=n, dtype=torch.float64).max(1).values
    log_ratio = math.log(n) + (n - 1) * Normal(0.0, 1.0).cdf(best).log()
    error = max(log_ratio.std() / 50_000**0.5, 1e-12)
    assert abs(log_ratio.mean() - steering.best_of_n_kl(n)) <= 4 * error


def test_best_of_n_is_nested_and_begins_with_the_fixed_seed_picture():
    denoiser, prompts = toy((3, 2, 2)), ["a", "b", "c"]
    big = best_of_n(denoiser, prompts, Grey(), 5, 1.0, 7, n=6, batch_size=4)
    small = best_of_n(denoiser, prompts, Grey(), 5, 1.0, 7, n=3, batch_size=100)
    first = best_of_n(denoiser, prompts, Grey(), 5, 1.0, 7, n=1)
    assert torch.equal(big.scores[:, :3], small.scores)
    assert torch.equal(big.candidates[:, :3], small.candidates)
    assert torch.equal(first.images, fixed_seed_images(denoiser, prompts, 7, 5))
    assert (big.rewards >= small.rewards).all() and torch.equal(big.rewards, big.scores.amax(1))
    chosen = big.candidates[range(3), big.scores.argmax(1)]
    assert torch.equal(denoiser.decode(chosen), big.images) and len(big) == 3


def test_of_equal_candidates_the_first_is_kept():
    def same(images, prompts, metadata):
        return torch.zeros(len(images))

    denoiser = toy((3, 2, 2))
    found = best_of_n(denoiser, ["a", "b"], same, 4, n=5, batch_size=3)
    assert torch.equal(found.images, fixed_seed_images(denoiser, ["a", "b"], n_steps=4))


def test_seeds_and_prompts_have_noise_of_their_own():
    runs = [best_of_n(toy(), ["a", "a"], Grey(), 4, seed=seed, n=2) for seed in (0, 1)]
    latents = torch.cat([run.candidates.flatten(0, 1) for run in runs])
    assert latents.unique(dim=0).shape == latents.shape


# ---------------------------------------------------------------- what is asked, and what it costs

CALLS = dict(
    best=lambda *args: best_of_n(*args, n_steps=3, n=4, metadata=FACTS, batch_size=5),
    fk=lambda *args: fk_steering(
        *args, n_steps=3, n_particles=4, n_scores=2, metadata=FACTS, batch_size=9
    ),
    reno=lambda *args: reno(*args, n_steps=3, n_iterations=4, metadata=FACTS, batch_size=2),
)
FACTS = [dict(k=k) for k in range(3)]


@pytest.mark.parametrize("call", CALLS)
def test_queries_and_passes_are_those_that_were_made(call):
    denoiser, reward = toy(), Grey()
    found = CALLS[call](denoiser, ["a", "b", "c"], reward)
    assert reward.seen == found.queries == 3 * 4 * (2 if call == "fk" else 1)
    assert denoiser.asked == found.passes == 3 * 4 * 3
    assert found.images.shape == (3, 3, 1, 2) and found.scores.shape == (3, 4)
    assert found.candidates.shape == (3, 4, 2)


@pytest.mark.parametrize("call", CALLS)
def test_the_reward_hears_which_prompt_a_picture_is_for(call):
    reward = Grey()
    CALLS[call](toy(), ["a", "b", "c"], reward)
    pairs = {(prompt, fact["k"]) for prompt, fact in zip(reward.prompts, reward.facts)}
    assert pairs == {("a", 0), ("b", 1), ("c", 2)}


@pytest.mark.parametrize("call", CALLS)
def test_rewards_come_as_functions_names_and_scorers(call):
    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3))

    forms = (brightness, "brightness", Scorer("brightness"))
    found = [CALLS[call](toy(), ["a", "b", "c"], reward).rewards for reward in forms]
    assert_close(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_a_reward_is_on_its_device_while_it_scores():
    places = []

    class Moves(Grey):
        def to(self, device):
            places.append(str(device))
            return self

    best_of_n(toy(), ["a"], Scorer(Moves(), offload_device="cpu"), 3, n=4, batch_size=2)
    assert places == ["cpu"] * 4  # there and back, twice


@pytest.mark.parametrize("call", CALLS)
def test_no_weight_and_no_gradient_changes(call):
    denoiser = toy()
    before = denoiser.mu.clone()
    CALLS[call](denoiser, ["a", "b", "c"], Grey())
    assert torch.equal(denoiser.mu, before) and denoiser.mu.grad is None


@pytest.mark.parametrize(
    "f, options, words",
    [
        (best_of_n, dict(prompts="a fox"), "write \\[prompt\\]"),
        (best_of_n, dict(prompts=[]), "list of at least one"),
        (best_of_n, dict(n=0), "n is 0"),
        (best_of_n, dict(n=1.5), "n is 1.5"),
        (best_of_n, dict(metadata=[{}]), "1 metadata for 2 prompts"),
        (fk_steering, dict(n_particles=0), "n_particles is 0"),
        (fk_steering, dict(n_scores=5), "n_scores is 5, with n_steps 4"),
        (fk_steering, dict(rule=0.0), "eta > 0"),
        (fk_steering, dict(potential="mean"), "use difference, max or sum"),
        (fk_steering, dict(n_scores=1, potential="mean"), "use difference, max or sum"),
        (reno, dict(n_iterations=0), "n_iterations is 0"),
        (reno, dict(reward="jpeg_compressibility"), "is not differentiable"),
        (reno, dict(reward=lambda x, p, m: torch.zeros(len(x))), "have no gradient"),
    ],
)
def test_mistakes_are_refused(f, options, words):
    given = dict(denoiser=toy((3, 2, 2)), prompts=["a", "b"], reward="brightness", n_steps=4)
    with pytest.raises(ValueError, match=words):
        f(**(given | options))


@pytest.mark.parametrize("n_steps, most", [(2, 1), (4, 2), (10, 6), (20, 13)])
def test_a_sampler_whose_last_step_has_no_noise_takes_fewer_scores(n_steps, most):
    path = FlowPath()
    for n_scores in range(most + 1, n_steps + 1):
        with pytest.raises(ValueError, match=f"this sampler draws no noise.* of at most {most}$"):
            steering._scored_steps(path, 1.0, n_steps, n_scores)
    assert len(steering._scored_steps(path, 1.0, n_steps, most)) == most - 1


def test_a_deterministic_sampler_is_fine_where_nothing_is_resampled():
    found = fk_steering(toy(), ["a"], Grey(), 4, rule=0.0, n_scores=1)
    assert torch.equal(found.candidates, best_of_n(toy(), ["a"], Grey(), 4, 0.0).candidates)


# ---------------------------------------------------------------- particles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 6])
def test_potentials_multiply_to_the_tilt(kind, m):
    history = randn(4, 3, m, seed=m, dtype=torch.float64)
    logs = [
        steering.log_potential(history[..., : k + 1], 1.7, kind, last=k == m - 1) for k in range(m)
    ]
    assert_close(sum(logs), 1.7 * history[..., -1])


def test_potentials_on_the_way_are_the_papers():
    r = torch.tensor([1.0, 3.0, 2.0, 4.0])
    logs = {
        kind: [steering.log_potential(r[:k], 2.0, kind).item() for k in (1, 2, 3)] for kind in KINDS
    }
    assert logs == dict(difference=[2, 4, -2], max=[2, 6, 6], sum=[2, 8, 12])


@pytest.mark.parametrize("shift", [0.0, -800.0, 800.0])
def test_effective_size_is_that_of_the_weights(shift):
    w = torch.tensor([[1.0, 2.0, 5.0, 0.5], [1, 1, 1, 1]]).double()
    exact = w.sum(1) ** 2 / w.square().sum(1)
    assert_close(steering.effective_size(w.log() + shift), exact)


def test_effective_size_knows_particles_without_weight():
    w = torch.tensor([0.0, 0.0, -math.inf])
    assert_close(steering.effective_size(w).item(), 2.0)


def test_systematic_resampling_is_unbiased_and_even():
    log_w = randn(1, 7, seed=3).double()
    u = (torch.arange(5000).double() + 0.5) / 5000
    index = steering.systematic(log_w.expand(5000, -1), u)
    copies = torch.nn.functional.one_hot(index, 7).sum(1).double()
    expected = 7 * log_w.softmax(1)
    assert_close(copies.mean(0), expected[0], rtol=0, atol=1e-3)
    assert ((copies - expected).abs() < 1).all()
    assert (index.diff(dim=1) >= 0).all()


def test_rows_are_resampled_by_their_own_weights_and_shifts():
    log_w, u = randn(6, 5, seed=4), torch.rand(6, generator=generator_for(0))
    together = steering.systematic(log_w, u)
    alone = [steering.systematic(log_w[i : i + 1], u[i : i + 1]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_particle_without_weight_is_never_drawn(u):
    log_w = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    index = steering.systematic(log_w, torch.tensor([u], dtype=torch.float64))
    assert set(index.flatten().tolist()) <= {1, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_change_no_particle(kind):
    options = dict(n_steps=5, n_particles=3, n_scores=3, strength=20.0, potential=kind)
    prompts = ["a", "b", "c", "d", "e"]
    runs = [fk_steering(toy(), prompts, Grey(), **options, batch_size=size) for size in (1, 7, 100)]
    for run in runs[1:]:
        assert torch.equal(run.candidates, runs[0].candidates)
        assert torch.equal(run.history, runs[0].history)
        assert torch.equal(run.images, runs[0].images)
    assert torch.equal(runs[0].history[..., -1], runs[0].scores)


def test_without_strength_particles_are_the_candidates():
    plain = best_of_n(toy(), ["a", "b"], Grey(), 6, n=5)
    steered = fk_steering(toy(), ["a", "b"], Grey(), 6, n_particles=5, n_scores=3, strength=0.0)
    assert torch.equal(steered.candidates, plain.candidates)
    assert torch.equal(steered.images, plain.images)
    assert torch.equal(steered.log_weights, torch.zeros(2, 5).double())


def test_copies_get_noise_of_their_own():
    found = fk_steering(toy(), ["a"], Grey(), 6, n_particles=8, n_scores=3, strength=1e4)
    # all particles descend from few, and no two are equal
    assert len(found.history[0, :, 0].unique()) < 3
    assert len(found.candidates[0].unique(dim=0)) == 8


def law(denoiser, n_steps, eta):
    "Mean and variance of x0, each dimension by itself, as this sampler draws it."
    grid, c = denoiser.path.grid(n_steps), denoiser.encode([""])
    shape = (1, *denoiser.latent_shape)
    m, v = torch.zeros(shape).double(), torch.ones(shape).double()
    for t, t_next in zip(grid[:-1], grid[1:]):
        mean, std = policy(denoiser, m, t, t_next, c, eta)
        slope = policy(denoiser, m + 1, t, t_next, c, eta)[0] - mean
        m, v = mean, slope**2 * v + std**2
    return m.detach()[0], v.detach()[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction, eta", [("epsilon", 1.0), ("v_prediction", 0.5)])
def test_particles_have_the_mean_and_variance_of_the_tilted_law(kind, prediction, eta):
    denoiser = toy((1,), prediction, s=0.25)
    (m,), (v,) = law(denoiser, 6, eta)
    precision, centre = (1 / v).item(), 0.25

    def quadratic(images, prompts, metadata):
        return -((2 * images[:, 0, 0, 0] - 1 - centre) ** 2) / 2

    found = fk_steering(
        denoiser, ["-"] * 12, quadratic, 6, eta, 5, 400, 3, precision, kind, batch_size=4800
    )
    mean, variance = (m + centre) / 2, v / 2  # data and reward weigh alike
    x, w = found.candidates[..., 0].double(), found.log_weights.softmax(1)
    for moment, exact in (((w * x).sum(1), mean), ((w * (x - mean) ** 2).sum(1), variance)):
        assert abs(moment.mean() - exact) < 4 * moment.std() / 12**0.5
    # far enough that the untilted law would fail
    assert abs(mean - m) > 0.5 * v.sqrt()


def test_resampling_waits_until_half_of_the_particles_count(monkeypatch):
    seen = []
    resample = steering._Population.resample

    def watched(self):
        sizes = steering.effective_size(self.log_weights)
        index = resample(self)
        for size, row, now in zip(sizes, index.view_as(self.log_weights) % 6, self.log_weights):
            seen.append((bool(size < 3), bool((now == 0).all())))
            assert size < 3 or row.tolist() == [0, 1, 2, 3, 4, 5]
        return index

    monkeypatch.setattr(steering._Population, "resample", watched)
    fk_steering(
        toy(), ["-"] * 20, Grey(), 6, n_particles=6, n_scores=4, strength=60.0, batch_size=60
    )
    assert {poor for poor, _ in seen} == {True, False}
    assert all(poor == resampled for poor, resampled in seen)


# ---------------------------------------------------------------- the initial noise


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_from_noise_is_the_sampler_with_a_gradient(eta, checkpoint):
    denoiser = toy()
    c = denoiser.encode(["a", "b"])
    streams = [[generator_for(0, i) for i in range(2)] for _ in range(3)]
    z = draw(streams[0], (2,), "cpu").requires_grad_()
    x0 = from_noise(denoiser, z, c, 4, eta, streams[1], checkpoint)
    assert torch.equal(x0, truncated_sample(denoiser, c, 4, eta, streams[2], 4))
    # in one dimension after the other the toy's steps are linear
    slope = torch.autograd.grad(x0.sum(), z)[0]
    streams = [[generator_for(0, i) for i in range(2)] for _ in range(2)]
    with torch.no_grad():
        far = [from_noise(denoiser, z + h, c, 4, eta, g) for h, g in zip((1.0, -1.0), streams)]
    assert_close(slope, (far[0] - far[1]) / 2)


def test_from_noise_asks_for_the_noise_of_its_steps():
    denoiser = toy()
    with pytest.raises(ValueError, match="give generators"):
        from_noise(denoiser, torch.zeros(1, 2), denoiser.encode(["a"]), 3, 1.0)


def test_noise_penalty_has_its_gradient_and_its_least_value():
    z = randn(3, 2, 4, dtype=torch.float64).requires_grad_()
    squared = z.detach().flatten(1).square().sum(1).view(-1, 1, 1)
    slope = torch.autograd.grad(steering.noise_penalty(z).sum(), z)[0]
    assert_close(slope, z.detach() * (1 - 7 / squared))
    least = z.detach() * (7 / squared).sqrt()
    for factor in (0.9, 1.1):
        assert (steering.noise_penalty(factor * least) > steering.noise_penalty(least)).all()


def test_reno_takes_clipped_nesterov_steps_each_picture_by_itself():
    denoiser, reward = toy((3, 2, 2)), Grey()
    prompts, options = ["a", "b", "c"], dict(n_steps=3, n_iterations=4, learning_rate=2.0)
    together = reno(denoiser, prompts, reward, **options)
    alone = reno(denoiser, prompts, reward, **options, batch_size=1)
    assert_close(together.candidates, alone.candidates)

    z = draw([generator_for(0, i, "eval") for i in range(3)], (3, 2, 2), "cpu")
    c, velocity = denoiser.encode(prompts), torch.zeros_like(z)
    for k in range(4):
        z = z.detach().requires_grad_()
        x0 = from_noise(denoiser, z, c, 3)
        assert_close(together.candidates[:, k], x0.detach())
        loss = 0.01 * steering.noise_penalty(z).sum() - denoiser.decode(x0).mean((1, 2, 3)).sum()
        g = torch.autograd.grad(loss, z)[0]
        g = g * (0.1 / g.flatten(1).norm(dim=1).clamp(min=0.1)).view(3, 1, 1, 1)
        velocity = 0.9 * velocity + g
        z = z - 2.0 * (g + 0.9 * velocity)


def test_reno_repeats_the_noise_of_a_random_sampler():
    found = reno(toy(), ["a", "b"], Grey(), 4, 1.0, n_iterations=3, learning_rate=0.0)
    first = best_of_n(toy(), ["a", "b"], Grey(), 4, 1.0, n=1)
    assert torch.equal(found.scores, first.scores.expand(2, 3))
    assert torch.equal(found.images, first.images)


# ---------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def tiny():
    return StableDiffusion(load_pipeline("tiny"), guidance_scale=3.0)


def test_embedded_model_is_steered_with_guidance(tiny):
    prompts = ["a fox", "a cat"]
    plain = fixed_seed_images(tiny, prompts, 3, n_steps=2)
    found = best_of_n(tiny, prompts, "jpeg_compressibility", 2, seed=3, n=3)
    assert_close(best_of_n(tiny, prompts, "jpeg_compressibility", 2, seed=3, n=1).images, plain)
    assert (found.rewards > found.scores[:, 0]).any()
    steered = fk_steering(
        tiny, prompts, "jpeg_compressibility", 2, seed=3, n_particles=3, n_scores=2, strength=30.0
    )
    assert steered.queries == 12 and steered.images.shape == plain.shape
    assert not torch.equal(steered.candidates, found.candidates)


def test_noise_gradient_of_the_embedded_model_is_that_of_finite_differences(tiny):
    c, z = tiny.encode(["a fox"]), randn(1, *tiny.latent_shape)
    score = Scorer("jpeg_compressibility_estimate")

    def size(z):
        return score(tiny.decode(from_noise(tiny, z, c, 2)), ["a fox"], [{}])[0].sum()

    z = z.requires_grad_()
    slope = torch.autograd.grad(size(z), z)[0]
    direction = slope / slope.norm()
    h = 0.02  # float32 leaves four digits of such a difference
    with torch.no_grad():
        difference = (size(z + h * direction) - size(z - h * direction)) / (2 * h)
    assert_close(difference, slope.norm(), rtol=0.05, atol=0)
