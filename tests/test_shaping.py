"Shaping: against numpy, by hand, invariances, a run resumed bit for bit, one process and two."

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from runs import leave_in, numbers, small, trained
from samples import of_all_types, randn, type_name
from torch.testing import assert_close

from ddpo_scratch.advantage import standardize
from ddpo_scratch.config import TrainConfig, check_config
from ddpo_scratch.diffusion import GaussianDenoiser, Schedule
from ddpo_scratch.run.engine import Engine
from ddpo_scratch.methods.base import Batch, Method, PolicyCopy
from ddpo_scratch.rewards.base import get_reward
from ddpo_scratch.rollout import generator_for, sample, step_kl
from ddpo_scratch.run.setup import setup
from ddpo_scratch.methods.shaping import (
    GDPO,
    Shaped,
    Shaping,
    favour_rare,
    find_shaping,
    gdpo_rewards,
    kl_gate,
    nearest_distances,
    standardize_within,
    variance_shares,
    win_rates,
)
from ddpo_scratch.train import collect, own_numbers, micro_batches

PROMPTS = [f"p{k}" for k in (0, 1, 0, 2, 1, 0, 1, 1, 0, 3)]
SUM = "jpeg_compressibility + 2*tiny_animal"
GARDO = "jpeg_compressibility + 0*tiny_animal + 0*tiny_clip_score"
GATED = dict(reward_fn=GARDO, kl_weight=1.0)


def normal(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert_close(a, b, atol=tolerance, rtol=0)


# ---------------------------------------------------------------- GDPO


def test_standardize_within_against_numpy():
    r = normal(10).numpy() * 3 + 7
    theirs = np.zeros(10)
    for prompt in set(PROMPTS):
        own = np.array(PROMPTS) == prompt
        theirs[own] = (r[own] - r[own].mean()) / max(r[own].std(), 1e-6)
    close(standardize_within(r, PROMPTS), theirs)
    assert theirs[3] == theirs[9] == 0  # prompts of one picture


@pytest.mark.parametrize("rewards", of_all_types([1, 2, 6]), ids=type_name)
def test_types(rewards):
    close(standardize_within(rewards, ["a"] * 3).square().mean(), 1.0)
    assert win_rates(rewards).tolist() == [0, 0.5, 1]
    assert favour_rare(rewards, torch.ones(3), ["a"] * 3).tolist() == [1, 2, 6]


def test_gdpo_by_hand_on_two_prompts_three_pictures_and_two_rewards():
    prompts = ["a", "b", "a", "b", "a", "b"]
    one = [0.0, 5.0, 2.0, 5.0, 4.0, 8.0]  # a: 0 2 4, b: 5 5 8
    two = [0.1, 3.0, 0.1, 1.0, 0.4, 2.0]  # a: 0.1 0.1 0.4, b: 3 1 2
    g, h = math.sqrt(3 / 2), math.sqrt(1 / 2)  # m-d m m+d -> -g 0 g; m m m+d -> -h -h 2h
    z_one = [-g, -h, 0, -h, g, 2 * h]
    z_two = [-h, g, -h, -g, 2 * h, 0]
    s = np.array(z_one) - 0.5 * np.array(z_two)
    theirs = (s - s.mean()) / s.std()
    ours = gdpo_rewards(dict(one=one, two=two), dict(one=1.0, two=-0.5), prompts)
    assert ours.dtype == torch.float32
    close(ours, theirs, 1e-5)


def test_gdpo_knows_no_unit_and_no_level():
    parts = dict(a=normal(10), b=normal(10, seed=1))
    weights = dict(a=1.0, b=0.3)
    ours = gdpo_rewards(parts, weights, PROMPTS)
    other = dict(a=1e4 * parts["a"] - 3, b=1e-3 * parts["b"] + 5)
    close(gdpo_rewards(other, weights, PROMPTS), ours, 1e-5)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    moved = {name: part[order] for name, part in parts.items()}
    close(gdpo_rewards(moved, weights, [PROMPTS[k] for k in order]), ours[order], 1e-6)
    close(gdpo_rewards(parts, dict(a=7.0, b=2.1), PROMPTS), ours, 1e-5)


def test_gdpo_of_one_part_or_equal_parts_is_the_standardised_reward():
    r = normal(10)
    alone = standardize(standardize_within(r, PROMPTS))
    close(gdpo_rewards(dict(a=r), dict(a=3.0), PROMPTS), alone, 1e-5)
    close(gdpo_rewards(dict(a=r, b=5 * r), dict(a=1.0, b=1.0), PROMPTS), alone, 1e-5)
    opposite = gdpo_rewards(dict(a=r, b=-5 * r), dict(a=1.0, b=1.0), PROMPTS)
    assert opposite.abs().max() < 1e-6


def test_a_reward_that_is_constant_within_prompts_has_no_say():
    r, level = normal(10), torch.tensor([float(p[1]) for p in PROMPTS])
    with_it = gdpo_rewards(dict(a=r, b=level), dict(a=1.0, b=1.0), PROMPTS)
    assert torch.equal(with_it, gdpo_rewards(dict(a=r), dict(a=1.0), PROMPTS))


def test_variance_shares_are_of_a_covariance_matrix():
    terms = dict(a=normal(500), b=3 * normal(500, seed=1), c=normal(500, seed=2))
    terms["c"] = terms["c"] - 0.5 * terms["b"]
    matrix = np.cov(np.stack([term.numpy() for term in terms.values()]))
    shares = variance_shares(terms)
    close(list(shares.values()), matrix.sum(1) / matrix.sum())
    close(sum(shares.values()), 1.0)
    assert shares["c"] < 0  # it works against b


# ---------------------------------------------------------------- ranks


def test_win_rates_are_ranks_and_sum_to_half_the_group():
    r = normal(10)
    ours = win_rates(r, PROMPTS)
    for prompt in set(PROMPTS):
        own = torch.tensor([p == prompt for p in PROMPTS])
        n = int(own.sum())
        close(ours[own].sum(), n / 2)
        ranks = r[own].argsort().argsort()
        close(ours[own], ranks.double() / (n - 1) if n > 1 else [0.5])


def test_win_rates_of_ties_are_mean_ranks():
    r = torch.tensor([2.0, 1, 2, 3, 2, 1])
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        rates = win_rates(r[list(order)])
        by_value = {1.0: 0.5 / 5, 2.0: 3 / 5, 3.0: 1.0}
        close(rates, [by_value[r[k].item()] for k in order])
        close(rates.sum(), 3.0)
    assert win_rates([4.0] * 7).tolist() == [0.5] * 7


@pytest.mark.parametrize("f", [torch.exp, torch.atan, lambda r: r**3, lambda r: 1e6 * r - 1e6])
def test_win_rates_do_not_change_under_an_increasing_function(f):
    r = normal(10)
    assert torch.equal(win_rates(f(r), PROMPTS), win_rates(r, PROMPTS))
    close(win_rates(-f(r), PROMPTS), 1 - win_rates(r, PROMPTS))


# ---------------------------------------------------------------- GARDO


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.3, 0.5, 0.99, 1.0])
def test_the_top_share_of_the_doubt_pays(share):
    n = 30
    reward, judges = normal(n), [normal(n, seed=1), normal(n, seed=2)]
    doubt = np.array([(reward > r).sum().item() for r in reward])  # of each: how many beat it
    doubt = (n - 1 - doubt) - np.mean([[(j < s).sum().item() for s in j] for j in judges], 0)
    gate = kl_gate(reward, judges, share)
    assert gate.dtype == torch.float32 and len(set(gate.tolist()) - {0.0}) == 1
    close(gate.double().mean(), 1.0, 1e-6)
    paying = gate.numpy() > 0
    least = math.ceil(round(share * n, 9))
    assert paying.sum() >= least
    assert paying.all() or doubt[paying].min() > doubt[~paying].max()
    ties = (np.isclose(doubt, np.sort(doubt)[-least])).sum()
    assert paying.sum() < least + ties


def test_a_share_of_one_is_the_plain_penalty_and_judges_that_agree_find_nothing():
    r = normal(10)
    assert torch.equal(kl_gate(r, [normal(10, seed=1)], 1.0), torch.ones(10))
    # all doubts are 0, so all tie
    assert torch.equal(kl_gate(r, [r.exp(), 5 * r], 0.1), torch.ones(10))


def test_diversity_by_hand():
    angles = torch.tensor([0.0, 10, 70, 90, 0]).deg2rad()
    arrows = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor(
        [[1.0], [2], [3], [4], [9]]
    )
    prompts = ["a", "a", "a", "a", "b"]
    ten, twenty = 1 - math.cos(math.radians(10)), 1 - math.cos(math.radians(20))
    distances = nearest_distances(arrows, prompts)
    close(distances[:4], [ten, ten, twenty, twenty], 1e-6)
    assert distances[4].isnan()
    shaped = favour_rare([1.0, 4, 4, 3, 8], distances, prompts)  # of a the mean is 3
    mean = (ten + twenty) / 2
    close(shaped, [1, 3 + ten / mean, 3 + twenty / mean, 3, 8], 1e-6)


def test_diversity_of_equal_pictures_and_of_pairs_changes_nothing():
    r = normal(10)
    alike = nearest_distances(torch.ones(10, 3), PROMPTS)
    assert torch.equal(favour_rare(r, alike, PROMPTS), r)
    pairs = [f"p{k // 2}" for k in range(10)]
    close(favour_rare(r, nearest_distances(normal(10, 5), pairs), pairs), r)


def test_factors_are_one_in_the_mean_of_a_group():
    prompts = ["a"] * 6
    distances = nearest_distances(normal(6, 4), prompts)
    r = torch.tensor([0.0, 2, 2, 2, 2, 2]).double()
    shaped = favour_rare(r, distances, prompts)
    factors = (shaped - r.mean()) / (r - r.mean())
    close(factors[1:], distances[1:] / distances.mean())
    assert factors[0] == 1


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: standardize_within([1.0, 2.0], ["a"]), "2 rewards and 1 prompts"),
        (lambda: win_rates([1.0, math.nan]), "NaN"),
        (lambda: gdpo_rewards(dict(a=[1.0]), dict(b=1.0), ["a"]), "a weight for each part"),
        (lambda: kl_gate([1.0, 2.0], [], 0.5), "at least one judge"),
        (lambda: kl_gate([1.0, 2.0], [[1.0, 2.0]], 0.0), "share in"),
        (lambda: find_shaping("rank"), "did you mean ranks"),
        (lambda: find_shaping("ranks(2)"), "ranks takes"),
        (lambda: find_shaping("gardo(share=True)"), "share is True .*, expected a value like 0.1"),
        (lambda: find_shaping("gardo(diversity=1)"), "diversity is 1 .*like True"),
        (lambda: find_shaping("gardo(refresh=True)"), "refresh is True .*like 0"),
        (lambda: find_shaping("file.py:Mine"), "no shaping called .*; known: "),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(reward_shaping="gdpo"), "write a sum such as"),
        (dict(reward_shaping="gardo", kl_weight=1.0), "is a single one"),
        (dict(reward_shaping="gardo", reward_fn=GARDO), "set kl_weight"),
        (dict(GATED, reward_shaping="gardo(share=0)"), "allowed for gardo is 0 < share <= 1"),
        (dict(GATED, reward_shaping="gardo(share=2)"), "share is 2, allowed for gardo"),
        (dict(GATED, reward_shaping="gardo(refresh=-1)"), "a number of epochs, or 0"),
        (dict(reward_shaping="ranks", method="refl", reward_fn="brightness"), "follows the grad"),
        (dict(reward_shaping="gdpo(", reward_fn=SUM), "bracket"),
        (dict(reward_shaping="ranks", sample_images_per_prompt=1), "ranks, which compares"),
        (dict(reward_shaping="gdpo", reward_fn=SUM, sample_images_per_prompt=1), "set it to 2"),
    ],
)
def test_configurations_that_cannot_be_shaped(fields, words):
    with pytest.raises(ValueError, match=words):
        check_config(TrainConfig(**fields))


def test_a_sum_that_only_loading_shows_is_refused_when_asked():
    check_config(TrainConfig(reward_shaping="gdpo", reward_fn="my_file.py:reward"))
    with pytest.raises(ValueError, match="'brightness' is a single one"):
        GDPO().needs(get_reward("brightness"))
    with pytest.raises(ValueError, match="embeds pictures"):
        find_shaping("gardo").needs(get_reward("brightness + redness"))
    assert find_shaping("gardo(diversity=False)").needs(get_reward("brightness + redness")) == [
        "brightness",
        "redness",
    ]


# ---------------------------------------------------------------- the penalty


def test_only_those_who_pay_are_charged():
    schedule = Schedule(torch.linspace(0.99, 0.01, 100).double())
    toy = GaussianDenoiser(schedule, (3,), mu=0.3)
    rollout = sample(toy, toy.encode(["-"] * 4), 4, 1.0, [generator_for(0, k) for k in range(4)])
    config = TrainConfig(sample_num_steps=4)
    method = Method(config, (3,))
    batch = Batch(rollout, torch.arange(4), torch.tensor([0, 1, 2, 0]), torch.ones(4), toy.device)
    penalties = normal(4).square()
    assert batch.paid(penalties) == penalties.mean()
    batch.kl_share = torch.ones(4)
    assert batch.paid(penalties) == penalties.mean()
    batch.kl_share = torch.tensor([0.0, 4, 0, 0])
    assert batch.paid(penalties) == penalties[1]
    kl = step_kl(toy, batch.x_t, batch.t, batch.t_next, batch.c, method.rule)
    assert_close(method.penalty(toy, batch), kl[1])


# ---------------------------------------------------------------- runs


def test_without_shaping_nothing_is_shaped(tmp_path):
    samples = collect(setup(small(tmp_path)))
    assert samples.kl_share is None and "kl_payers" not in samples.gauges


def test_collect_shapes_the_parts_and_logs_the_sum(tmp_path):
    fields = dict(reward_fn=SUM, per_prompt_stat_tracking=False, sample_num_batches_per_epoch=2)
    plain = collect(setup(small(tmp_path, **fields)))
    samples = collect(setup(small(tmp_path, reward_shaping="gdpo", **fields)))
    assert torch.equal(samples.all_rewards, plain.all_rewards)
    assert not torch.allclose(samples.weights, plain.weights, atol=0.1)
    reward = get_reward(SUM)
    _, parts = reward(samples.images, samples.prompts[:8], [{}] * 8)
    close(parts["jpeg_compressibility"] + 2 * parts["tiny_animal"], samples.rewards[:8], 1e-5)
    shares = {k: v for k, v in samples.gauges.items() if k.startswith("gdpo_share")}
    close(sum(shares.values()), 1.0)
    close(samples.weights.mean(), 0.0, 1e-5)
    close(samples.weights.std(correction=0), 1.0, 1e-4)


class Backwards(Shaping):
    "Turn the sign."

    name = "backwards"

    def __call__(self, rewards, prompts, reward, parts, embeddings):
        return Shaped(-rewards, gauges=dict(level=rewards.mean().item()))


def test_a_shaping_of_ones_own_reaches_every_method(tmp_path):
    for method in ("ddpo_is", "rwr"):
        fields = dict(method=method, per_prompt_stat_tracking=False)
        plain = collect(setup(small(tmp_path, **fields)))
        turned = collect(setup(small(tmp_path, reward_shaping="backwards", **fields)))
        assert torch.equal(plain.all_rewards, turned.all_rewards)
        close(turned.gauges["level"], plain.all_rewards.mean())
        assert torch.equal(plain.weights.argsort(), turned.weights.argsort(descending=True))


RUNS = {
    "gdpo": dict(reward_shaping="gdpo", reward_fn=SUM),
    "gardo": dict(reward_shaping="gardo(share=0.25)", reward_fn=GARDO, kl_weight=1.0),
}


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    fields = dict(sample_num_steps=3, **RUNS["gardo"])
    whole = trained(small(tmp_path, run_name="whole", **fields))
    trained(small(tmp_path, run_name="cut", **fields | dict(num_epochs=1)))
    resumed = trained(small(tmp_path, resume_from=str(tmp_path / "cut"), **fields))
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.params, resumed.params, strict=True))
    with pytest.raises(ValueError, match="reward_shaping was"):
        other = fields | dict(reward_shaping="", num_epochs=3)
        setup(small(tmp_path, resume_from=str(tmp_path / "cut"), **other))


@pytest.mark.parametrize("method", ["ddpo_is", "flow_grpo(rule='ddim', kl='published')", "nft"])
def test_a_refreshed_reference_is_the_policy_of_that_moment_and_resumes(method, tmp_path):
    fields = dict(sample_num_steps=2, num_epochs=3, method=method, **RUNS["gardo"])
    fields["reward_shaping"] = "gardo(share=0.25, refresh=2)"
    whole = trained(small(tmp_path, run_name="whole", **fields))
    leave_in(small(tmp_path, run_name="cut", **fields), epoch=3)
    after_two = setup(small(tmp_path, resume_from=str(tmp_path / "cut"), **fields))
    policy = PolicyCopy(after_two.denoiser).weights
    for state in (whole, after_two):
        reference = state.method.anchored_at.weights
        assert all(torch.equal(a, b) for a, b in zip(reference, policy, strict=True))
    now = PolicyCopy(whole.denoiser).weights
    assert not all(torch.equal(a, b) for a, b in zip(now, policy))
    resumed = trained(small(tmp_path, resume_from=str(tmp_path / "cut"), **fields))
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    for a, b in zip(whole.params, resumed.params, strict=True):
        assert torch.equal(a, b)


def test_micro_batches_carry_the_share_of_their_samples(tmp_path):
    state = setup(small(tmp_path, **RUNS["gardo"]))
    samples = collect(state)
    assert samples.kl_share.mean() == 1 and samples.kl_share.min() == 0
    index, steps = torch.arange(8).flip(0), torch.arange(5).expand(8, 5)
    batches = micro_batches(state, samples, index, steps)
    paid = torch.cat([batch.kl_share for batch in batches])
    assert torch.equal(paid, samples.kl_share.flip(0).repeat_interleave(5))


def test_a_penalty_that_only_one_picture_pays_leaves_the_others_gradient_alone(tmp_path):
    "The gradient with a gate is that of the plain penalty on those who pay."
    state = setup(small(tmp_path, **RUNS["gardo"]))
    samples = collect(state)
    with torch.no_grad():
        for p in state.params:
            p.add_(0.02 * torch.randn(p.shape, generator=generator_for(1)))
    paying = samples.kl_share.nonzero().flatten()
    steps = torch.arange(3)

    def gradient(index, share):
        rows = samples.__dict__ | dict(kl_share=share)
        batch = micro_batches(state, type(samples)(**rows), index, steps.expand(len(index), 3))[0]
        kl = state.method.penalty(state.denoiser, batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(kl, state.params)])

    gated = gradient(torch.arange(8), samples.kl_share)
    assert_close(gated, gradient(paying, None), atol=1e-6, rtol=1e-3)
    assert gated.norm() > 0


class Half(Engine):
    "One of two processes, which are threads here and exchange what they gather in a list."

    def __init__(self, accelerator, rank, barrier, places):
        super().__init__(accelerator)
        self.world, self.rank = 2, rank
        self.barrier, self.places = barrier, places

    def exchanged(self, thing):
        self.places[self.rank] = thing
        self.barrier.wait(60)
        things = list(self.places)
        self.barrier.wait(60)
        return things

    def gather(self, tensor):
        return torch.cat(self.exchanged(tensor))

    def gather_objects(self, items):
        return [item for items_ in self.exchanged(items) for item in items_]


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_one_process_and_two_shape_alike(tmp_path, fields):
    fields = dict(sample_num_steps=2, sample_num_batches_per_epoch=2, **fields)
    one = collect(setup(small(tmp_path, **fields)))
    barrier, places = threading.Barrier(2), [None, None]
    states = [setup(small(tmp_path, sample_batch_size=4, **fields)) for _ in range(2)]
    for rank, state in enumerate(states):
        state.engine = Half(state.engine.accelerator, rank, barrier, places)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(collect, states)
    close(first.all_rewards, one.all_rewards, 2e-3)
    assert first.gauges == second.gauges
    for name in ("rewards", "weights", "kl_share"):
        whole = getattr(one, name)
        if whole is None:
            continue
        joined = torch.cat([getattr(first, name), getattr(second, name)])
        numbers = torch.tensor(own_numbers(states[0]) + own_numbers(states[1]))
        close(joined[numbers.argsort()], whole, 2e-2)
