"What would bore a reader of 08: types, order, rollover against a slow reference, state, bad input."
import json

import numpy as np
import pytest
import torch

from ddpo_scratch.advantage import PerPromptStatTracker, standardize


def slow(history, prompts, rewards, buffer_size, min_count):
    "The tracker in plain numpy, one prompt at a time."
    out = []
    for p, r in zip(prompts, rewards): history.setdefault(p, []).append(r)
    for p, r in zip(prompts, rewards):
        own = np.array(history[p][-buffer_size:], dtype=np.float64)
        if len(own) < min_count: own = np.array(rewards, dtype=np.float64)
        out.append((r - own.mean()) / (own.std() + 1e-6))
    return np.array(out)


@pytest.mark.parametrize("buffer_size, min_count", [(4, 1), (4, 4), (8, 3), (32, 16)])
def test_tracker_against_a_slow_reference(buffer_size, min_count):
    rng, tracker, history = np.random.default_rng(0), PerPromptStatTracker(buffer_size, min_count), {}
    for _ in range(12):
        prompts, rewards = list(rng.choice(["a", "b", "c", "d"], 9)), rng.normal(3, 2, 9)
        got, want = tracker.update(prompts, rewards), slow(history, prompts, rewards, buffer_size, min_count)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)
    assert {p: len(d) for p, d in tracker.stats.items()} == {p: min(len(h), buffer_size) for p, h in history.items()}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda r: torch.tensor(r, dtype=torch.int32), lambda r: torch.tensor(r, dtype=torch.float16),
                                  lambda r: torch.tensor(r, dtype=torch.bfloat16), lambda r: torch.tensor(r, dtype=torch.float32, requires_grad=True)])
def test_types(kind):
    r = [1, 2, 6]
    want = torch.tensor([-2.0, -1.0, 3.0]) / (14 / 3)**0.5
    for got in (standardize(kind(r)), PerPromptStatTracker(4, 2).update(["x"] * 3, kind(r))):
        assert got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_standardize():
    r = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 7 + 100
    a = standardize(r)
    assert abs(a.mean()) < 1e-6 and abs(a.std(correction=0) - 1) < 1e-5
    assert (standardize([3.7]) == 0).all() and (standardize([0.1] * 77) == 0).all()


def test_repeated_prompts_keep_their_order():
    prompts, r = ["b", "a", "b", "a", "b"], [5.0, 1.0, 3.0, 2.0, 4.0]
    a = PerPromptStatTracker(8, 2).update(prompts, r)
    for p in "ab":
        i = [k for k, q in enumerate(prompts) if q == p]
        torch.testing.assert_close(a[i], standardize([r[k] for k in i]))


def test_order_of_the_batch_does_not_matter_within_the_buffer():
    prompts, r = list("aabbcab"), torch.randn(7)
    order = torch.randperm(7)
    whole = PerPromptStatTracker(8, 2).update(prompts, r)
    torch.testing.assert_close(PerPromptStatTracker(8, 2).update([prompts[i] for i in order], r[order]), whole[order])


def test_numpy_prompts_and_state_through_json():
    tracker = PerPromptStatTracker(3, 2)
    tracker.update(np.array(["é fox", "an owl", "é fox"]), np.array([1, 2, 3]))
    other = PerPromptStatTracker(3, 2)
    other.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert other.stats == tracker.stats and all(d.maxlen == 3 for d in other.stats.values())
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
    with pytest.raises(ValueError, match="standardize"): standardize(rewards)
    with pytest.raises(ValueError, match="PerPromptStatTracker"): tracker.update(["a"], rewards)
    assert tracker.stats == {}


def test_bad_settings_and_prompts():
    for size, count in ((0, 0), (4, 5), (4, 0), (-1, -1)):
        with pytest.raises(ValueError, match="min_count"): PerPromptStatTracker(size, count)
    tracker = PerPromptStatTracker(4, 2)
    for prompts in ("ab", ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError): tracker.update(prompts, [1.0, 2.0])
    with pytest.raises(ValueError, match="saved with"): tracker.load_state_dict(PerPromptStatTracker(8, 2).state_dict())
    assert tracker.stats == {}
