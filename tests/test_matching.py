"Matching: losses worked by hand on a flow, old policies, passes that are counted, resuming."

import contextlib

import pytest
import torch
from runs import numbers, small, trained, whole_and_resumed
from torch.testing import assert_close

from ddpo_scratch.config import TrainConfig, check_config
from ddpo_scratch.diffusion import Conditioning, Denoiser
from ddpo_scratch.flow import FlowPath
from ddpo_scratch.methods.base import Batch, find_method
from ddpo_scratch.methods.grpo import group_advantages
from ddpo_scratch.methods.matching import (
    ITM,
    Matching,
    elbo,
    matching_log_prob,
    nft_loss,
)
from ddpo_scratch.rollout import Rollout, generator_for
from ddpo_scratch.run.setup import setup

NAMES = ("awm", "epg", "pepg", "par", "nft", "ram", "itm")
ATOL = dict(atol=1e-6, rtol=1e-6)


class Linear(Denoiser):
    "Predict v = W x_t + b; the base model is the one it began with. It counts its passes."

    def __init__(self, d=6):
        super().__init__()
        self.path, self.latent_shape = FlowPath(), (d,)
        self.network = torch.nn.Linear(d, d)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.network.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
        self.base = [p.detach().clone() for p in self.network.parameters()]
        self.passes = dict(free=0, differentiated=0)

    def encode(self, prompts):
        return Conditioning(nothing=torch.zeros(len(prompts), 1))

    def forward(self, x_t, t, c):
        self.passes["differentiated" if torch.is_grad_enabled() else "free"] += len(x_t)
        return self.network(x_t)

    @contextlib.contextmanager
    def reference(self):
        now = [p.detach().clone() for p in self.network.parameters()]
        with torch.no_grad():
            for p, value in zip(self.network.parameters(), self.base):
                p.copy_(value)
            yield self
            for p, value in zip(self.network.parameters(), now):
                p.copy_(value)


def move(denoiser, by):
    "Train, as it were: change all weights."
    with torch.no_grad():
        for p in denoiser.network.parameters():
            p.add_(by)


def fresh(text, **fields):
    "A method, a denoiser that has moved twice since the base, and a batch of 8."
    denoiser = Linear()
    move(denoiser, 0.1)
    config = TrainConfig(method=text, **fields)
    method = config.method_class(config, denoiser.latent_shape)
    method.prepare(denoiser)
    method.before_epoch(denoiser)
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(8, 1, 6, generator=g)
    rollout = Rollout(x0, torch.zeros(1), torch.zeros(8, 0), denoiser.encode([""] * 8))
    weight = torch.linspace(-5, 5, 8)
    batch = Batch(rollout, torch.arange(8), torch.zeros(8).long(), weight, torch.device("cpu"))
    batch.draws = method.draws(denoiser, 8, generator_for(3))
    move(denoiser, 0.1)
    return method, denoiser, batch


def by_hand(batch):
    "t (8, 1), x0, u, v, v_old, v_ref in float64, in the notation of a flow."
    (eps, t), x0 = batch.draws, batch.x0.double()
    t, eps = t.double()[:, None], eps.double()
    x_t = (1 - t) * x0 + t * eps
    base = Linear()
    velocities = []
    for by in (0.2, 0.1, 0.0):
        weight = base.network.weight.double() + by
        velocities.append((x_t @ weight.T + base.network.bias.double() + by).detach())
    return t, x0, x_t, eps - x0, *velocities


def losses_of(method, denoiser, batch):
    return method.loss(denoiser, batch)[0].detach().double()


# Losses, in the notation of the papers' code.


def test_nft_is_the_published_loss():
    method, denoiser, batch = fresh("nft(beta=0.4)", kl_weight=1e-4)
    t, x0, x_t, u, v, v_old, v_ref = by_hand(batch)
    r = (batch.weight.double() / 5).clamp(-1, 1) / 2 + 0.5
    plus, minus = 0.4 * v + 0.6 * v_old, 1.4 * v_old - 0.4 * v
    parts = []
    for mixed in (plus, minus):
        error = x_t - t * mixed - x0
        parts.append((error**2).mean(1) / error.abs().mean(1))
    expected = 5 * (r * parts[0] + (1 - r) * parts[1]) / 0.4
    assert_close(losses_of(method, denoiser, batch), expected, **ATOL)
    penalty = method.penalty(denoiser, batch).detach().double()
    assert_close(penalty, ((v - v_ref) ** 2).mean(), **ATOL)


@pytest.mark.parametrize("name", ["epg", "pepg", "par"])
def test_elbo_policy_gradients_are_the_published_losses(name):
    method, denoiser, batch = fresh(f"{name}(scale=0.3)")
    t, x0, x_t, u, v, v_old, _ = by_hand(batch)
    E, E_old = (
        -((x_t - t * w - x0) ** 2).mean(1) / (x_t - t * w - x0).abs().mean(1) for w in (v, v_old)
    )
    A, gap = 0.3 * batch.weight.double(), E - E_old
    expected = dict(
        epg=-gap.exp() * A * E,
        pepg=-gap.exp() * (A - gap) * E,
        par=0.5 * gap.exp() * (A - gap) ** 2,
    )
    assert_close(losses_of(method, denoiser, batch), expected[name], **ATOL)


def test_published_awm_is_the_published_loss():
    text = "awm(weighting='ghuber', clip=0.1, beta=5, decay=0.3)"
    method, denoiser, batch = fresh(text)
    for old, base in zip(method.old.weights, denoiser.base):
        old.copy_(base)  # the average lags behind the policy that began the epoch
    t, x0, x_t, u, v, v_old, v_ref = by_hand(batch)
    p, delta = 0.25, 1e-10
    log_prob, old_log_prob = (
        -t[:, 0] / p * ((((w - u) ** 2).mean(1) + delta) ** p - delta**p) for w in (v, v_old)
    )
    ratio, A = (log_prob - old_log_prob).exp(), batch.weight.double()
    assert (ratio > 1.1).any() and (ratio < 0.9).any()  # both sides of the clip
    policy = torch.maximum(-A * ratio, -A * ratio.clamp(0.9, 1.1))
    expected = policy + 5 * ((v - v_ref) ** 2).mean(1)
    losses, gauges = method.loss(denoiser, batch)
    assert_close(losses.detach().double(), expected, **ATOL)
    outside = ((ratio - 1).abs() > 0.1).double().mean()
    assert_close(gauges["clip_fraction"].double(), outside)


@pytest.mark.parametrize("weighting", ["adaptive", "mse"])
def test_awm_without_a_ratio(weighting):
    method, denoiser, batch = fresh(f"awm(weighting='{weighting}', beta=0.5)")
    _, _, _, u, v, v_old, _ = by_hand(batch)
    error, old = ((v - u) ** 2).mean(1), ((v_old - u) ** 2).mean(1)
    scale = old if weighting == "adaptive" else 1.0
    expected = batch.weight.double() * error / scale + 0.5 * ((v - v_old) ** 2).mean(1)
    assert_close(losses_of(method, denoiser, batch), expected, **ATOL)


def test_ram_and_itm():
    method, denoiser, batch = fresh("ram(multiplier=1.5)")
    _, _, _, u, v, v_old, v_ref = by_hand(batch)
    A = batch.weight.double()[:, None]
    expected = ((v - (v_ref + 1.5 * A * (u - v_old))) ** 2).mean(1)
    assert_close(losses_of(method, denoiser, batch), expected, atol=1e-4, rtol=1e-5)
    method, denoiser, batch = fresh("itm")
    expected = ((v - (v_old + A * (u - v))) ** 2).mean(1)
    assert_close(losses_of(method, denoiser, batch), expected, atol=1e-4, rtol=1e-5)
    (weight,) = torch.autograd.grad(
        method.loss(denoiser, batch)[0].mean(), [denoiser.network.weight]
    )
    # the target is a constant: only the first v has a gradient
    (eps, t), x0 = batch.draws, batch.x0
    x_t = (1 - t[:, None]) * x0 + t[:, None] * eps
    by_chain = 2 / 6 * (v - (v_old + A * (u - v))).T @ x_t.double() / 8
    assert_close(weight.double(), by_chain, atol=1e-4, rtol=1e-4)


# What all share.


@pytest.mark.parametrize(
    "text, kl_weight",
    [(name, 0.0) for name in NAMES] + [("awm(decay=0.3)", 0.0), ("nft", 0.1), ("ram", 0.1)],
)
def test_passes_are_those_that_are_taken(text, kl_weight):
    method, denoiser, batch = fresh(text, sample_num_steps=1, kl_weight=kl_weight)
    denoiser.passes.update(free=0, differentiated=0)
    method.loss(denoiser, batch)
    if kl_weight:
        method.penalty(denoiser, batch)
    _, training, differentiated = type(method).passes(method.config)
    assert denoiser.passes["differentiated"] == 8 * differentiated
    assert denoiser.passes["free"] == 8 * (training - differentiated)


@pytest.mark.parametrize("name", ["awm", "ram"])
def test_a_penalty_follows_its_reference_and_the_loss_stays_with_the_base_model(name):
    judges = "brightness + 0*redness"
    shaping = "gardo(diversity=False, refresh=1)"
    fields = dict(sample_num_steps=1, kl_weight=0.1, reward_fn=judges, reward_shaping=shaping)
    method, denoiser, batch = fresh(name, **fields)
    before = losses_of(method, denoiser, batch)
    assert method.penalty(denoiser, batch) > 1e-3
    method.anchor_here(denoiser)
    denoiser.passes.update(free=0, differentiated=0)
    assert_close(losses_of(method, denoiser, batch), before)
    assert method.penalty(denoiser, batch) < 1e-12
    _, training, differentiated = type(method).passes(method.config)
    assert denoiser.passes["free"] == 8 * (training - differentiated)


@pytest.mark.parametrize("name", NAMES)
def test_at_the_old_weights_the_penalty_is_zero_and_others_stay(name):
    method, denoiser, batch = fresh(name)
    before = [p.detach().clone() for p in denoiser.network.parameters()]
    losses, gauges = method.loss(denoiser, batch)
    losses.mean().backward()  # weights that were changed in place would break it
    assert all(torch.equal(a, b) for a, b in zip(before, denoiser.network.parameters()))
    assert float(gauges["old_distance"]) > 0
    move(denoiser, -0.1)
    assert float(method.loss(denoiser, batch)[1]["old_distance"]) < 1e-12


@pytest.mark.parametrize("name, lags", [("nft", True), ("epg", True), ("awm", False)])
def test_a_lagging_policy_draws_the_samples(name, lags):
    method, denoiser, _ = fresh(f"{name}(decay=0.5)", sample_num_steps=1, sample_eta=0.0)
    move(denoiser, 1.0)
    seen = []
    denoiser.register_forward_hook(lambda *_: seen.append(denoiser.network.bias[0].item()))
    now = denoiser.network.bias[0].item()
    with method.drawn_by(denoiser):
        denoiser(torch.zeros(1, 6), torch.ones(1), None)
    assert abs(seen[0] - now) > 1 if lags else seen[0] == now
    assert denoiser.network.bias[0].item() == now


def test_the_old_policy_follows_as_published():
    "It keeps min(0.001 step, 0.5), or of a steeper rise the cap."
    method, denoiser, _ = fresh("nft(rise=0.01, decay=0.4)")
    updates = method.config.updates_per_epoch
    expected = method.old.weights[1].clone()
    for epoch in range(1, 5):
        move(denoiser, 1.0)
        method.after_epoch(denoiser)
        keep = min(0.01 * epoch * updates, 0.4)
        expected = keep * expected + (1 - keep) * denoiser.network.bias.detach()
        assert_close(method.tensors()["1"], expected)


def test_advantages_have_mean_zero_in_each_group():
    g = torch.Generator().manual_seed(0)
    groups = [str(int(k)) for k in torch.randint(7, (60,), generator=g)]
    rewards = torch.randn(60, generator=g) + torch.tensor([10.0 * int(k) for k in groups])
    for spread in ("within", "prompt"):
        advantages = group_advantages(rewards, groups, spread, eps=1e-6)
        for name in set(groups):
            own = advantages[[k for k, other in enumerate(groups) if other == name]]
            assert abs(float(own.mean())) < 1e-5
            if spread == "prompt":
                assert_close(own.std(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)
    advantages = group_advantages(rewards, groups, "within", eps=1e-6)
    assert abs(float(advantages.std(correction=0)) - 1) < 1e-4
    with pytest.raises(ValueError, match="give one group a reward"):
        group_advantages([1.0, 2.0], ["a"])
    assert group_advantages([3.0], ["a"], "within").tolist() == [0.0]


def test_lone_prompts_are_compared_with_each_other_and_itm_is_centred():
    config = TrainConfig(method="itm(tilt=0.7)")
    method = ITM(config, (2,))
    prompts = ["cat", "fox", "cat", "dog", "dog", "cow"]
    weights = method.weights([1.0, 5.0, 2.0, 7.0, 9.0, 6.0], prompts)
    for group in ([0, 2], [1, 5], [3, 4]):
        assert abs(float(weights[group].mean())) < 1e-6
    assert method.epoch_gauges(prompts) == dict(own_statistics=4 / 6)
    free = ITM(TrainConfig(method="itm", per_prompt_stat_tracking=False), (2,))
    assert free.groups(prompts) == [None] * 6 and free.epoch_gauges(prompts) == {}


def test_errors_name_what_is_expected():
    with pytest.raises(ValueError, match="weighting 'l1' is unknown: use 'adaptive'"):
        matching_log_prob(torch.ones(1), torch.ones(1), torch.ones(1), "l1")
    with pytest.raises(NotImplementedError, match="Matching must define compare"):
        Matching(TrainConfig(method="awm"), (2,)).compare(None)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(method="awm(beta=-1)"), "beta is -1, allowed is beta >= 0"),
        (dict(method="awm(clip=-1)"), "clip is -1, allowed is clip >= 0"),
        (dict(method="awm(weighting='l1')"), "weighting is 'l1', expected 'adaptive'"),
        (dict(method="awm(std='x')"), "std is 'x', expected 'global' or 'prompt'"),
        (dict(method="nft(decay=1)"), "decay is 1, allowed is 0 <= decay < 1"),
        (dict(method="nft(rise=0)"), "rise is 0, allowed is rise > 0"),
        (dict(method="nft(beta=0)"), "beta is 0, allowed is beta > 0"),
        (dict(method="nft", train_adv_clip_max=float("inf")), "set it to a number, such as 5"),
        (dict(method="par(scale=0)"), "scale is 0, allowed is scale > 0"),
        (dict(method="ram(multiplier=0)"), "multiplier is 0, allowed is multiplier > 0"),
        (dict(method="itm(tilt=0)"), "tilt is 0, allowed is tilt > 0"),
        (dict(method="awm", sample_eta=2.0), "sample_eta is 2, allowed is 0 <= eta <= 1"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        check_config(TrainConfig(**fields))


def test_findings_ask_whether_advantages_differ():
    config = TrainConfig(method="nft")
    assert "advantage_spread is 0.05" in next(
        Matching.findings(dict(advantage_spread=0.05), [], config)
    )
    assert not list(Matching.findings(dict(advantage_spread=1.0), [], config))


def test_a_kl_penalty_needs_no_noise_in_the_sampler():
    check_config(TrainConfig(method="awm", sample_eta=0.0, kl_weight=0.1))


def test_nft_at_the_start_has_the_gradient_of_the_advantage_weighted_elbo():
    g = torch.Generator().manual_seed(0)
    old, x0 = torch.randn(2, 5, 3, 4, 4, generator=g, dtype=torch.float64)
    A = torch.tensor([-5.0, -2.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    for beta in (0.1, 1.0, 3.0):
        now = old.clone().requires_grad_()
        nft = 5 * nft_loss(now, old, x0, A / 10 + 0.5, beta)
        (by_nft,) = torch.autograd.grad(nft.sum(), now)
        (by_elbo,) = torch.autograd.grad((-A * elbo(now, x0)).sum(), now)
        assert_close(by_nft, by_elbo)


# On the embedded model.

TINY = dict(
    sample_num_steps=2,
    sample_batch_size=4,
    sample_images_per_prompt=2,
    train_batch_size=2,
    lora_rank=1,
)
RUNS = dict(zip(NAMES, NAMES)) | dict(
    awm_average="awm(weighting='ghuber', clip=1, decay=0.3, rise=0.2)",
    nft="nft(rise=0.2)",
)


@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS)
def test_resumed_run_equals_uninterrupted_run(tmp_path, text):
    fields = TINY | dict(method=text, kl_weight=0.01 if text == "awm" else 0.0)
    whole, resumed = whole_and_resumed(tmp_path, **fields)
    for name, tensor in whole.method.tensors().items():
        assert torch.equal(tensor, resumed.method.tensors()[name])
    rows = numbers(tmp_path / "whole")
    assert all(row["grad_norm"] > 0 for row in rows)
    assert ("kl" in rows[-1]) == bool(fields["kl_weight"])


def test_the_base_model_stays_where_the_whole_network_is_trained(tmp_path):
    fields = TINY | dict(method="ram", use_lora=False, train_learning_rate=1e-4, num_epochs=1)
    state = trained(small(tmp_path, **fields))
    with state.denoiser.reference(), torch.no_grad():
        c = state.denoiser.encode(["a fox"])
        x = torch.ones(1, *state.denoiser.latent_shape)
        base = state.denoiser(x, 500, c)
    fresh = setup(small(tmp_path, **fields)).denoiser
    with torch.no_grad():
        assert torch.equal(base, fresh(x, 500, c))
        assert not torch.equal(base, state.denoiser(x, 500, c))


def test_names_find_their_methods():
    assert [find_method(name).name for name in NAMES] == list(NAMES)
