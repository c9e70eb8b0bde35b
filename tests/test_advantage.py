"Advantages: types, order, rollover against a slow reference, state, bad input."

import json

import numpy as np
import pytest
import torch
from samples import of_all_types, randn, type_name
from torch.testing import assert_close

from ddpo_scratch.advantage import PerPromptStatTracker, as_rewards, standardize


def slow(history, prompts, rewards, buffer_size, min_count):
    "Track in plain numpy, one prompt at a time."
    advantages = []
    for prompt, reward in zip(prompts, rewards):
        history.setdefault(prompt, []).append(reward)
    for prompt, reward in zip(prompts, rewards):
        own = np.array(history[prompt][-buffer_size:], dtype=np.float64)
        if len(own) < min_count:
            own = np.array(rewards, dtype=np.float64)
        advantages.append((reward - own.mean()) / (own.std() + 1e-6))
    return np.array(advantages)


@pytest.mark.parametrize("buffer_size, min_count", [(4, 1), (4, 4), (8, 3), (32, 16)])
def test_tracker_against_a_slow_reference(buffer_size, min_count):
    tracker, history = PerPromptStatTracker(buffer_size, min_count), {}
    rng = np.random.default_rng(0)
    for _ in range(12):
        prompts, rewards = list(rng.choice(["a", "b", "c", "d"], 9)), rng.normal(3, 2, 9)
        ours = tracker.update(prompts, rewards)
        theirs = slow(history, prompts, rewards, buffer_size, min_count)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)
    lengths = {prompt: min(len(rewards), buffer_size) for prompt, rewards in history.items()}
    assert {prompt: len(memory) for prompt, memory in tracker.stats.items()} == lengths


@pytest.mark.parametrize("rewards", of_all_types([1, 2, 6]), ids=type_name)
def test_types(rewards):
    by_hand = torch.tensor([-2.0, -1.0, 3.0]) / (14 / 3) ** 0.5
    for a in (standardize(rewards), PerPromptStatTracker(4, 2).update(["x"] * 3, rewards)):
        assert a.dtype == torch.float32 and not a.requires_grad
        assert_close(a, by_hand, rtol=1e-5, atol=1e-5)
    assert as_rewards(rewards, "here").tolist() == [1.0, 2.0, 6.0]


def test_standardize():
    a = standardize(randn(1000) * 7 + 100)
    assert abs(a.mean()) < 1e-6 and abs(a.std(correction=0) - 1) < 1e-5
    assert (standardize([3.7]) == 0).all() and (standardize([0.1] * 77) == 0).all()


def test_repeated_prompts_keep_their_order():
    prompts, r = ["b", "a", "b", "a", "b"], [5.0, 1.0, 3.0, 2.0, 4.0]
    a = PerPromptStatTracker(8, 2).update(prompts, r)
    for prompt in "ab":
        i = [k for k, other in enumerate(prompts) if other == prompt]
        assert_close(a[i], standardize([r[k] for k in i]))


def test_order_of_the_batch_does_not_matter_within_the_buffer():
    prompts, r = list("aabbcab"), randn(7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    whole = PerPromptStatTracker(8, 2).update(prompts, r)
    mixed = PerPromptStatTracker(8, 2).update([prompts[i] for i in order], r[order])
    assert_close(mixed, whole[order])


def test_numpy_prompts_and_state_through_json():
    tracker = PerPromptStatTracker(3, 2)
    tracker.update(np.array(["é fox", "an owl", "é fox"]), np.array([1, 2, 3]))
    other = PerPromptStatTracker(3, 2)
    other.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert other.stats == tracker.stats
    assert all(memory.maxlen == 3 for memory in other.stats.values())
    batch = ["é fox", "an owl", "new"], [5.0, 6.0, 7.0]
    assert torch.equal(other.update(*batch), tracker.update(*batch))


def test_coverage():
    tracker = PerPromptStatTracker(4, 2)
    assert tracker.coverage(["a"]) == 0
    tracker.update(["a", "a", "b"], [1, 2, 3])
    assert tracker.coverage(["a", "b", "a", "never"]) == 0.5


@pytest.mark.parametrize("rewards", [[], [[1.0]], [float("nan")], [float("-inf")], 3.0])
def test_bad_rewards(rewards):
    tracker = PerPromptStatTracker(4, 2)
    with pytest.raises(ValueError, match="standardize"):
        standardize(rewards)
    with pytest.raises(ValueError, match="PerPromptStatTracker"):
        tracker.update(["a"], rewards)
    assert tracker.stats == {}


def test_bad_settings_and_prompts():
    for size, count in ((0, 0), (4, 5), (4, 0), (-1, -1)):
        with pytest.raises(ValueError, match="min_count"):
            PerPromptStatTracker(size, count)
    tracker = PerPromptStatTracker(4, 2)
    for prompts in ("ab", ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError):
            tracker.update(prompts, [1.0, 2.0])
    with pytest.raises(ValueError, match="saved with"):
        tracker.load_state_dict(PerPromptStatTracker(8, 2).state_dict())
    assert tracker.stats == {}


def test_five_numbers_by_hand():
    "Mean 7.8, squared distances 236.8 in all; cats 1 2 6 and dogs 10 20 by themselves."
    five, names = [1, 10, 2, 20, 6], ["cat", "dog", "cat", "dog", "cat"]
    over_the_batch = torch.tensor([-6.8, 2.2, -5.8, 12.2, -1.8]) / 47.36**0.5
    assert_close(standardize(five), over_the_batch, rtol=1e-5, atol=0)
    s = (14 / 3) ** 0.5
    by_prompt = torch.tensor([-2 / s, -1, -1 / s, 1, 3 / s])
    assert_close(PerPromptStatTracker(4, 2).update(names, five), by_prompt, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [2, 3, 10, 100])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e9])
def test_no_advantage_exceeds_the_root_of_n_minus_1(n, scale):
    g = torch.Generator().manual_seed(n)
    for power in (1, 5, 25):  # heavier and heavier tails
        r = scale * torch.randn(n, generator=g, dtype=torch.float64) ** power
        tracker = PerPromptStatTracker(n, 1)
        tracker.update(["x"] * (n - 1), r[:-1])
        for a in (standardize(r), tracker.update(["x"], r[-1:])):
            assert a.abs().max() <= (n - 1) ** 0.5 * (1 + 1e-6)
    assert standardize([0.0] * (n - 1) + [scale * 1e9]).max() > 0.999 * (n - 1) ** 0.5


@pytest.mark.parametrize("seen, own", [(0, False), (1, False), (2, True), (3, True)])
def test_new_rewards_count_towards_min_count(seen, own):
    "With min_count 3, two of the prompt's rewards seen and one new make three."
    tracker, past = PerPromptStatTracker(8, 3), [4.0, 8.0, 5.0][:seen]
    if past:
        tracker.update(["a"] * seen, past)
    prompts, rewards = ["a", "b", "b", "b"], [6.0, 1.0, 2.0, 3.0]
    a = tracker.update(prompts, rewards)
    assert_close(a[0], standardize(past + [6.0])[-1] if own else standardize(rewards)[0])
    assert_close(a[1:], standardize([1.0, 2.0, 3.0]))


def test_more_new_rewards_than_the_buffer_holds():
    "Only the last ones make the statistics, and every reward is measured against those."
    a = PerPromptStatTracker(2, 2).update(["x"] * 4, [100.0, 50.0, 1.0, 3.0])
    assert_close(a, torch.tensor([98.0, 48.0, -1.0, 1.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_copies_fed_the_gathered_rewards_agree_and_single_ones_do_not(world):
    g = torch.Generator().manual_seed(0)
    shares = [slice(rank * 12 // world, (rank + 1) * 12 // world) for rank in range(world)]
    one = PerPromptStatTracker(8, 2)
    copies = [PerPromptStatTracker(8, 2) for _ in shares]
    lonely = [PerPromptStatTracker(8, 2) for _ in shares]
    for _ in range(4):
        prompts = [str(i) for i in torch.randint(5, (12,), generator=g).tolist()]
        rewards = torch.rand(12, generator=g)
        whole = one.update(prompts, rewards)
        for copy, share in zip(copies, shares):
            assert torch.equal(copy.update(prompts, rewards)[share], whole[share])
            assert copy.state_dict() == one.state_dict()
        apart = [own.update(prompts[share], rewards[share]) for own, share in zip(lonely, shares)]
    assert (torch.cat(apart) - whole).abs().max() > 0.1


def test_nearly_equal_rewards():
    "Noise below 1e-6 is damped by the guard beside the deviation; equal rewards give exactly zero."
    a = PerPromptStatTracker(4, 2).update(["x", "x", "y", "y"], [0.1, 0.1, 5.0, 5.0 + 1e-9])
    assert (a[:2] == 0).all() and a[2:].abs().max() < 1e-3
