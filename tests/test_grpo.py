"Flow-GRPO: groups, the ratio's theorem, guards, windows, and runs that resume."

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from runs import numbers, small, trained, whole_and_resumed
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ddpo_scratch.config import TrainConfig, check_config, preset, preset_names
from ddpo_scratch.diffusion import Denoiser, GaussianDenoiser, Schedule
from ddpo_scratch.flow import FlowPath, FlowSDE, flow_coordinates
from ddpo_scratch.methods.base import Batch, find_method
from ddpo_scratch.methods.grpo import (
    RULES,
    FlowGRPO,
    MeanRollout,
    dppo_loss,
    expected_ratio,
    group_advantages,
    guarded_log_ratio,
    mean_distance,
    published_kl,
    sample_with_means,
)
from ddpo_scratch.run.gauges import diagnose
from ddpo_scratch.run.plan import plan
from ddpo_scratch.rollout import gaussian_log_prob, generator_for, policy, sample, step_kl

VP = Schedule.from_config(DDIMScheduler(clip_sample=False))
SHAPE = (2, 2, 2)


def toy(mu=0.5):
    return GaussianDenoiser(VP, SHAPE, mu=mu)


def streams(n, *keys):
    return [generator_for(0, *keys, i) for i in range(n)]


def method(options="", **fields):
    "A method as a run would make it, of ten steps."
    fields = dict(sample_num_steps=10) | fields
    config = check_config(TrainConfig(method=f"flow_grpo({options})", **fields))
    return FlowGRPO(config, SHAPE)


def batch_of(made, denoiser, n=6):
    "A batch of all steps of n samples, as the method draws them."
    made.before_epoch(denoiser)
    rollout = made.sample(denoiser, denoiser.encode([""] * n), streams(n), starts=streams(n, "s"))
    steps = made.steps(denoiser.path)
    sample_of, step_of = torch.arange(n).repeat_interleave(len(steps)), steps.repeat(n)
    advantage = torch.randn(len(step_of), generator=generator_for(1))
    return Batch(rollout, sample_of, step_of, advantage, torch.device("cpu"))


# Groups.


def by_hand(rewards, prompts, spread):
    "Advantages in plain Python."
    everything = torch.tensor(rewards).double().std(correction=0).item()
    found = []
    for reward, prompt in zip(rewards, prompts, strict=True):
        own = [r for r, p in zip(rewards, prompts, strict=True) if p == prompt]
        mean = sum(own) / len(own)
        std = (sum((r - mean) ** 2 for r in own) / len(own)) ** 0.5
        found.append((reward - mean) / ((std if spread == "prompt" else everything) + 1e-4))
    return found


@pytest.mark.parametrize("spread", ["global", "prompt"])
def test_groups_need_not_be_neighbours(spread):
    rewards, prompts = [1.0, 5.0, 2.0, 9.0, 4.0, 4.0], list("abacbb")
    found = group_advantages(rewards, prompts, spread)
    assert found.dtype == torch.float32
    assert_close(found.tolist(), by_hand(rewards, prompts, spread), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spread", ["global", "prompt"])
def test_groups_that_say_nothing_have_no_advantage(spread):
    found = group_advantages([0.1, 0.1, 0.1, 7.0, 3.0, 5.0], list("aaabcc"), spread)
    assert (found[:4].abs() < 1e-6).all() and found[4] == -found[5] != 0


def test_groups_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="2 prompts for 3 rewards"):
        group_advantages([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(ValueError, match="NaN or infinite"):
        group_advantages([1.0, math.nan], ["a", "a"])


def test_advantages_are_clipped_and_equal_groups_counted():
    made = method(train_adv_clip_max=1.0)
    weights = made.weights([1.0, 1.0, 0.0, 9.0], ["a", "a", "b", "b"])
    assert weights.tolist()[:2] == [0, 0] and weights.abs().max() == 1
    assert made.epoch_gauges(["a", "a", "b", "b"])["equal_groups"] == 0.5


def test_groups_are_equal_as_a_whole():
    "A picture that is as good as its group's mean does not make a group equal."
    made = method()
    made.weights([1.0, 2.0, 3.0] * 2 + [5.0] * 2, list("aaabbbcc"))
    assert made.equal_groups == 1 / 3


# The ratio's theorem.


@pytest.mark.parametrize("d", [1, 3, 50])
def test_expected_ratio_is_the_integral(d):
    "The ratio as trained factors over dimensions; each factor is integrated by torch."
    moved = torch.linspace(-0.4, 0.7, d, dtype=torch.float64)
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    old = Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    mean = torch.tensor(1.0, dtype=torch.float64)
    for shift in moved:
        log_ratio = Normal(shift, 1.0).log_prob(z) - old.log_prob(z)
        mean *= ((log_ratio / d).exp() * old.log_prob(z).exp()).sum() * (z[1] - z[0])
    distance = mean_distance(moved[None], torch.zeros(1, d), torch.ones(1, 1))
    assert_close(expected_ratio(distance, d)[0], mean, atol=1e-9, rtol=0)
    exact = kl_divergence(old, Normal(moved, 1.0)).mean()
    assert_close(distance[0], exact)


def test_expected_ratio_in_many_dimensions():
    "At d = 12,288 and D = 0.01 the reference has 0.990052 drawn against 0.990051."
    d, n = 12_288, 400
    moved = math.sqrt(0.02) * torch.ones(1, d)
    z = torch.randn(n, d, generator=generator_for(0))
    now = gaussian_log_prob(z, moved, torch.ones(1, 1))
    old = gaussian_log_prob(z, 0 * moved, torch.ones(1, 1))
    ratio = (now - old).exp().double()
    distance = mean_distance(moved, 0 * moved, torch.ones(1, 1))
    assert_close(expected_ratio(distance, d).item(), 0.990051, atol=1e-6, rtol=0)
    assert abs(ratio.mean() - 0.990051) < 4 * ratio.std() / n**0.5


# KL.


@pytest.mark.parametrize("name", RULES)
def test_published_kl_lacks_the_length_of_the_step(name):
    denoiser = toy()
    with torch.no_grad():
        denoiser.mu += 0.2
    rule = RULES[name](0.5)
    x_t = torch.randn(3, *SHAPE, generator=generator_for(0))
    t, t_next = torch.tensor([901, 501, 101]), torch.tensor([801, 401, 1])
    where = x_t, t, t_next, denoiser.encode([""] * 3)
    mean, std = policy(denoiser, *where, rule)
    with denoiser.reference():
        mean_ref, _ = policy(denoiser, *where, rule)
    exact = kl_divergence(Normal(mean, std), Normal(mean_ref, std)).mean((1, 2, 3))
    assert_close(step_kl(denoiser, *where, rule), exact)
    (now, _), (later, _) = flow_coordinates(VP, t, x_t), flow_coordinates(VP, t_next, x_t)
    published = published_kl(denoiser, *where, rule)
    assert_close(published, exact * (now - later).flatten())
    assert torch.autograd.grad(published.sum(), denoiser.mu)[0].abs().min() > 0


@pytest.mark.parametrize("kl", ["exact", "published"])
def test_penalty_is_the_one_that_was_asked_for(kl):
    denoiser, made = toy(), method(f"kl={kl!r}", kl_weight=0.1)
    batch = batch_of(made, denoiser)
    with torch.no_grad():
        denoiser.mu += 0.2
    measure = published_kl if kl == "published" else step_kl
    where = batch.x_t, batch.t, batch.t_next, batch.c
    assert_close(made.penalty(denoiser, batch), measure(denoiser, *where, FlowSDE(0.7)).mean())


# Guards.


class FlowToy(Denoiser):
    "Predict a fixed velocity plus a weight: the smallest policy on a flow's path."

    def __init__(self, shift=3.0):
        super().__init__()
        self.path = FlowPath(FlowMatchEulerDiscreteScheduler(shift=shift))
        self.latent_shape = SHAPE
        self.w = torch.nn.Parameter(torch.zeros(SHAPE))

    def encode(self, prompts):
        return toy().encode(prompts)

    def forward(self, x_t, t, c):
        return 0.3 * x_t + self.w


@pytest.mark.parametrize("made_by", [toy, FlowToy], ids=["VP", "flow"])
def test_guard_is_the_published_ratio_and_loss(made_by):
    denoiser, made = made_by(), method("guard='guard'", train_clip_range=1e-3)
    batch = batch_of(made, denoiser)
    with torch.no_grad():
        next(denoiser.parameters()).add_(0.02)
    losses, gauges = made.loss(denoiser, batch)
    where = batch.x_t, batch.t, batch.t_next, batch.c
    mean, std = policy(denoiser, *where, made.rule)
    now, _ = flow_coordinates(denoiser.path, batch.t, mean)
    later, scale = flow_coordinates(denoiser.path, batch.t_next, mean)
    # as in the published code, with its std, sqrt(-dt) and means in flow coordinates
    k, dt = (std / scale).flatten(), (later - now).flatten()
    old_mean = batch.rollout.means[batch.sample, batch.step]
    bias = ((mean - old_mean) / scale).square().flatten(1).mean(1) / (2 * k**2)
    log_prob = gaussian_log_prob(batch.x_next, mean, std)
    ratio = ((log_prob - batch.old_log_prob + bias) * k).exp()
    unclipped = -batch.weight * ratio
    clipped = -batch.weight * ratio.clamp(1 - 1e-3, 1 + 1e-3)
    assert_close(losses, torch.maximum(unclipped, clipped) / -dt, rtol=1e-4, atol=1e-4)
    assert_close(gauges["ratio_spread"], (ratio - 1).abs().max(), rtol=1e-2, atol=1e-6)
    assert gauges["clip_fraction"] > 0


def test_guarded_log_ratio_has_no_drift():
    n, d = 20_000, 8
    old_mean, mean = torch.zeros(1, d), torch.linspace(-0.3, 0.3, d)[None] + 0.1
    drawn = 0.5 * torch.randn(n, d, generator=generator_for(0))
    std = torch.full((1, 1), 0.5)
    log_ratio = guarded_log_ratio(drawn, mean, old_mean, std, torch.ones(1, 1)).double()
    assert abs(log_ratio.mean()) < 4 * log_ratio.std() / n**0.5
    # its size is the move of the mean alone: sqrt(sum delta^2) / d
    assert_close(log_ratio.std().item(), (mean.norm() / d).item(), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    "ratio, advantage, far",
    [(1.1, 1.0, True), (0.9, 1.0, False), (1.1, -1.0, False), (0.9, -1.0, True), (1.0, 1.0, False)],
)
def test_dppo_leaves_out_what_is_far_and_would_go_further(ratio, advantage, far):
    for distance, dropped in ((0.9e-5, False), (1e-5, far), (1.0, far)):
        log_prob = torch.tensor([ratio]).log().requires_grad_()
        inputs = torch.zeros(1), torch.tensor([advantage]), torch.tensor([distance])
        loss = dppo_loss(log_prob, *inputs, limit=1e-5)
        (slope,) = torch.autograd.grad(loss.sum(), log_prob)
        expected = 0.0 if dropped else -advantage * ratio
        assert_close((loss.item(), slope.item()), (expected, expected), rtol=1e-5, atol=1e-6)


def test_dppo_counts_what_its_limit_holds_and_advises_a_larger_one():
    denoiser, made = toy(), method("guard='dppo', limit=1e-9")
    batch = batch_of(made, denoiser)
    batch.weight[::2] = 0.0
    assert made.loss(denoiser, batch)[1]["clip_fraction"] == 0
    with torch.no_grad():
        denoiser.mu += 0.1
    share = made.loss(denoiser, batch)[1]["clip_fraction"].item()
    assert 0 < share < 0.5
    row = dict(epoch=1, reward_mean=0.0, reward_std=1.0, clip_fraction=0.9)
    (found,) = [text for text in diagnose([row] * 6, made.config) if "clip_fraction" in text]
    assert "a larger limit in flow_grpo(guard='dppo', limit=...)" in found
    assert "train_clip_range" not in found


def test_clip_ranges_and_limits_scale_with_the_latents():
    config = TrainConfig(method="flow_grpo(guard='guard')")
    assert_close(FlowGRPO(config, (16, 64, 64)).clip_range, 4e-6)
    assert_close(FlowGRPO(config, (4, 16, 16)).clip_range, 64 * 4e-6)
    assert_close(FlowGRPO(config, (4, 16, 16)).limit, 64e-5)
    assert method("guard='guard'", train_clip_range=0.5).clip_range == 0.5
    assert method("guard='dppo', limit=0.25").limit == 0.25


@pytest.mark.parametrize("guard", ["clip", "guard", "dppo"])
@pytest.mark.parametrize("name", RULES)
def test_first_gradient_is_reinforce_for_every_rule_and_guard(name, guard):
    "At the policy that drew, ratios are 1; the guard's steps weigh k / -dt."
    denoiser = toy()
    made = method(f"rule={name!r}, noise_level=0.5, guard={guard!r}, drop_last=True")
    batch = batch_of(made, denoiser)
    losses, gauges = made.loss(denoiser, batch)
    assert_close(gauges["ratio_mean"].item(), 1.0, rtol=0, atol=1e-6)
    assert gauges["approx_kl"] < 1e-12 and gauges["clip_fraction"] == 0
    (ours,) = torch.autograd.grad(losses.sum(), denoiser.mu)
    where = batch.x_t, batch.t, batch.t_next, batch.c
    mean, std = policy(denoiser, *where, made.rule)
    weight = batch.weight
    if guard == "guard":
        now, _ = flow_coordinates(VP, batch.t, mean)
        later, scale = flow_coordinates(VP, batch.t_next, mean)
        weight = weight * (std / scale / (now - later)).flatten()
    loss = -(weight * gaussian_log_prob(batch.x_next, mean, std)).sum()
    assert_close(ours, torch.autograd.grad(loss, denoiser.mu)[0], rtol=1e-4, atol=1e-5)


# Means.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_means_are_those_of_the_replay(dtype):
    denoiser, rule = toy(), FlowSDE(0.7)
    args = denoiser, denoiser.encode([""] * 4), 6, rule
    drawn = sample_with_means(*args, streams(4), dtype)
    plain = sample(*args, streams(4), dtype)
    assert drawn.xs.equal(plain.xs) and drawn.log_probs.equal(plain.log_probs)
    for i, (t, t_next) in enumerate(zip(drawn.timesteps, drawn.timesteps[1:])):
        mean, _ = policy(denoiser, drawn.xs[:, i], t, t_next, drawn.c, rule)
        assert drawn.means[:, i].equal(mean)
    joined = MeanRollout.cat([drawn[:1], drawn[[1, 2]], drawn[torch.tensor(3)]])
    assert joined.means.equal(drawn.means) and joined.xs.equal(drawn.xs)


def test_replay_renews_log_probs_and_means():
    denoiser, made = toy(), method("guard='dppo'")
    batch = batch_of(made, denoiser)
    means, log_probs = batch.rollout.means.clone(), batch.rollout.log_probs.clone()
    batch.rollout.means.zero_()
    batch.rollout.log_probs.zero_()
    with torch.no_grad():
        made.replay(denoiser, batch)
    assert_close((batch.rollout.means, batch.rollout.log_probs), (means, log_probs))


def test_a_group_begins_with_one_noise_only_where_it_is_asked_to():
    denoiser = toy()
    for same in (True, False):
        made = method(f"same_noise={same}")
        starts = [generator_for(5, i // 2) for i in range(4)]
        rollout = made.sample(denoiser, denoiser.encode([""] * 4), streams(4), starts=starts)
        x_T = rollout.xs[:, 0]
        assert x_T[0].equal(x_T[1]) == x_T[2].equal(x_T[3]) == same
        assert not x_T[1].equal(x_T[2]) and not rollout.x0[0].equal(rollout.x0[1])


# What a configuration may say.


@pytest.mark.parametrize(
    "options, fields, sentence",
    [
        ("rule='sde'", {}, "rule is 'sde', allowed are flow_sde, cps, dance_sde, ddim"),
        ("guard='ppo'", {}, "guard is 'ppo', allowed are clip, guard, dppo"),
        ("rule='cps', noise_level=1.5", {}, "allowed for cps is 0 < noise_level <= 1"),
        ("noise_level=0.0", {}, "allowed for flow_sde is noise_level > 0"),
        ("limit=-1.0", {}, "limit is -1"),
        ("window='drawn'", {}, "a window of .* = 20 steps cannot move"),
        ("window='drawn', window_share=0.2", dict(train_timestep_fraction=0.5), "cannot move"),
        ("window_share=0.0", {}, "window_share is 0"),
        ("", dict(sample_images_per_prompt=1), "set it to 2 or more"),
        ("", dict(sample_eta=2.0), "sample_eta is 2"),
        ("drop_last=True", dict(sample_num_steps=1), "drop_last leaves nothing"),
        ("beta=1", {}, "flow_grpo.*no beta|beta"),
    ],
)
def test_mistakes_are_named(options, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_config(TrainConfig(method=f"flow_grpo({options})", **fields))


def test_pictures_may_be_looked_at_with_the_ode():
    "Here sample_eta draws the compared pictures alone: 0 takes no density from training."
    config = TrainConfig(method="flow_grpo", sample_eta=0.0, kl_weight=0.1)
    assert check_config(config).look_eta == 0


def test_costs_are_counted():
    def passes(options, **fields):
        config = TrainConfig(method=f"flow_grpo({options})", sample_num_steps=10, **fields)
        return find_method(config.method).passes(check_config(config))

    assert passes("") == (10, 10, 10)
    assert passes("drop_last=True") == (10, 9, 9)
    assert passes("drop_last=True", train_timestep_fraction=0.6) == (10, 6, 6)
    window = "window='drawn', window_share=0.5"
    assert passes(window, train_timestep_fraction=0.3) == (10, 3, 3)
    assert passes("guard='guard'") == (10, 10, 10)
    assert passes("", kl_weight=0.1) == (10, 30, 20)
    config = TrainConfig(method="flow_grpo(guard='dppo')", sample_num_steps=10)
    assert FlowGRPO.states_kept(config) == 11 + 10
    assert FlowGRPO.states_kept(TrainConfig(method="flow_grpo", sample_num_steps=10)) == 11


def test_findings_name_equal_groups_and_a_wrong_ratio():
    config = TrainConfig(method="flow_grpo")
    good = dict(equal_groups=0.0, ratio_mean=0.99, ratio_expected=0.9901)
    assert not list(FlowGRPO.findings(good, [], config))
    bad = dict(equal_groups=0.9, ratio_mean=0.97, ratio_expected=0.99)
    found = " ".join(FlowGRPO.findings(bad, [], config))
    assert "equal_groups is 90%" in found and "different policies" in found
    (early,) = FlowGRPO.first_findings(dict(equal_groups=0.95), config)
    assert early.startswith("equal_groups is 95%")
    assert not list(FlowGRPO.first_findings(dict(equal_groups=0.9), config))


# Windows.


def windows(made, epochs):
    found = []
    for _ in range(epochs):
        made.before_epoch(toy())
        found.append(made.steps(VP).tolist())
        made.after_epoch(toy())
    return found


def test_drawn_windows_lie_in_their_share_and_come_back():
    options = "window='drawn', window_share=0.5"
    made = method(options, train_timestep_fraction=0.2, seed=1)
    found = windows(made, 20)
    assert all(b == a + 1 and b < 5 for a, b in found)
    assert {a for a, _ in found} == {0, 1, 2, 3}
    assert found == windows(method(options, train_timestep_fraction=0.2, seed=1), 20)
    assert found != windows(method(options, train_timestep_fraction=0.2, seed=2), 20)


def test_sliding_windows_move_every_few_epochs_and_begin_again():
    made = method(
        "window='sliding', window_epochs=2, drop_last=True",
        sample_num_steps=6,
        train_timestep_fraction=0.5,
    )
    first = [found[0] for found in windows(made, 9)]
    assert first == [0, 0, 1, 1, 2, 2, 0, 0, 1]


@pytest.mark.parametrize("rule", ["cps", "ddim", "flow_sde"])
@pytest.mark.parametrize("kind", ["drawn", "sliding"])
def test_windows_end_at_the_last_step_with_noise(kind, rule):
    "On a flow the last step of CPS and DDIM has none."
    made = method(f"rule={rule!r}, window={kind!r}, window_epochs=1", train_timestep_fraction=0.2)
    flow, found = FlowToy(), []
    made.prepare(flow)
    for _ in range(40):
        made.before_epoch(flow)
        found.append(made.steps(flow.path).tolist())
        made.after_epoch(flow)
    assert all(b == a + 1 for a, b in found)
    assert {b for _, b in found} == set(range(1, 10 if rule == "flow_sde" else 9))


def test_a_window_that_cannot_move_on_this_model_is_refused_with_it():
    made = method("rule='cps', window='drawn', noise_level=0.5", train_timestep_fraction=0.9)
    with pytest.raises(ValueError, match="with cps only the first 9 of this model's 10 steps"):
        made.prepare(FlowToy())
    with pytest.raises(ValueError, match=r"CPS\(a=0.7\) draws no noise in any step"):
        method("rule='cps'", sample_num_steps=1).prepare(FlowToy())


# Runs.

RUNS = {
    "window": dict(
        method="flow_grpo(rule='cps', window='drawn', window_share=0.8)",
        train_timestep_fraction=0.4,
    ),
    "guard": dict(method="flow_grpo(guard='guard', same_noise=True, drop_last=True)"),
    "dppo": dict(method="flow_grpo(guard='dppo', kl='published')", kl_weight=0.1),
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_resumed_run_equals_uninterrupted_run(tmp_path, fields):
    whole, resumed = whole_and_resumed(tmp_path, **fields)
    assert whole.method.state_dict() == resumed.method.state_dict() == dict(epoch=2)
    row = numbers(tmp_path / "whole")[-1]
    assert 0.9 < row["ratio_mean"] < 1.1 and row["ratio_mean"] != 1
    if fields is not RUNS["window"]:
        assert 0 < row["kl_old"] and abs(row["ratio_mean"] - row["ratio_expected"]) < 5e-3


def test_half_precision_replays_by_the_training_path(tmp_path):
    fields = dict(method="flow_grpo(guard='guard')", mixed_precision="bf16", num_epochs=1)
    config = small(tmp_path, run_name="half", train_batch_size=8, **fields)
    trained(config)
    assert numbers(tmp_path / "half")[-1]["ratio_spread"] == 0


OURS = [n for n in preset_names() if n.startswith("tiny") and "flow_grpo(" in preset(n).method]


@pytest.mark.parametrize("name", OURS)
def test_presets_are_sound(name):
    config = check_config(preset(name))
    assert plan(config)["samples_per_epoch"] == 64 and config.eval_num_steps == 20


def test_there_is_a_preset_for_each_published_setting():
    assert set(OURS) >= {"tiny_flow_grpo", "tiny_dance", "tiny_mix", "tiny_guard"}
