"Patterns: composed pictures with known backgrounds, a solver, gradients, and a run."

import math

import pytest
import torch
from runs import small, trained

from ddpo_scratch.models.tiny import CONCEPTS, KINDS, compose, draw_scenes, load_sprites
from ddpo_scratch.prompts import COMMON_ANIMALS, from_list
from ddpo_scratch.rewards.base import RewardError, compute_rewards, get_reward
from ddpo_scratch.rewards.patterns import PATTERNS, name_patterns, pattern_shares

NAMES = [kind if kind in PATTERNS else "plain" for kind in KINDS]


def composed(n, seed, concepts, kinds=None):
    "Compose n pictures of some concepts, and say which pattern each has."
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(name in concepts) for name in CONCEPTS])
    scenes = draw_scenes(n, generator, weights)
    if kinds:
        scenes[:, 1] = torch.tensor([KINDS.index(kind) for kind in kinds]).repeat(n)[:n]
    return compose(load_sprites(), scenes, generator)[0], [NAMES[i] for i in scenes[:, 1]]


def share_right(images, wanted, kind):
    "Divide how often a kind is named rightly by how often it is there."
    pairs = [(a, b) for a, b in zip(wanted, name_patterns(images)) if a == kind]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.fixture(scope="module")
def animals():
    "Composed pictures of the 45 common animals, and their patterns"
    return composed(1500, 7, COMMON_ANIMALS)


@pytest.mark.parametrize("kind, least", [("striped", 0.95), ("checked", 0.93), ("plain", 0.98)])
def test_composed_animals_are_named(animals, kind, least):
    assert share_right(*animals, kind) > least


def test_one_pattern_is_never_the_other(animals):
    swapped = {("striped", "checked"), ("checked", "striped")}
    assert not swapped & set(zip(animals[1], name_patterns(animals[0])))


@pytest.mark.parametrize("coat", ["zebra", "tiger", "bee", "snake"])
def test_a_coat_is_no_background(coat):
    images, _ = composed(100, 2, [coat], ["plain", "gradient"])
    assert name_patterns(images).count("plain") >= 99


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_flats_are_plain(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(20, 3, 64, 64, generator=generator)
    flat = torch.rand(20, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64)
    grain = flat + 0.01 * torch.randn(20, 3, 64, 64, generator=generator)
    names = name_patterns(torch.cat([noise, flat, grain.clamp(0, 1)]))
    assert names == ["plain"] * 60


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("period", [8, 11, 16])
@pytest.mark.parametrize("phase", [0.0, 0.7, 2.0])
def test_pure_stripes_at_each_phase(axis, period, phase):
    wave = torch.sin(2 * math.pi * torch.arange(64) / period + phase)
    stripes = wave.expand(64, 64) if axis == 2 else wave[:, None].expand(64, 64)
    striped, checked = pattern_shares((0.5 + 0.3 * stripes).expand(1, 3, 64, 64))[0]
    assert striped > 0.99 and striped > checked


def test_the_share_is_what_a_solver_leaves():
    images, _ = composed(3, 4, ["fox"], ["striped"])
    i = torch.arange(64)
    edge = torch.minimum(i, 63 - i) + 1
    seen = edge[:, None] * edge <= 24
    y, x = torch.meshgrid(i.double(), i.double(), indexing="ij")
    slopes = [torch.ones_like(x), x, y]

    def left(columns, pixels):
        fit = torch.stack(columns)[:, seen].T
        return (pixels - fit @ torch.linalg.lstsq(fit, pixels).solution).square().sum()

    for image, share in zip(images, pattern_shares(images)):
        pixels = image.double()[:, seen].T
        total = left(slopes, pixels)
        best = 0
        for period in range(7, 18):
            for along in (x, y):
                turn = 2 * math.pi * along / period
                rest = left([*slopes, turn.sin(), turn.cos()], pixels)
                best = max(best, (total - rest) / (total + pixels.numel() * 1e-4))
        assert abs(share[0] - best) < 1e-4


def test_pictures_of_another_size_are_scaled():
    images, wanted = composed(40, 5, COMMON_ANIMALS, ["striped", "checked"])
    large = torch.nn.functional.interpolate(images, scale_factor=4, mode="bilinear")
    assert (pattern_shares(large) - pattern_shares(images)).abs().mean() < 0.05


def test_shares_do_not_depend_on_the_batch():
    images, _ = composed(6, 6, COMMON_ANIMALS)
    alone = torch.cat([pattern_shares(image[None]) for image in images])
    torch.testing.assert_close(pattern_shares(images), alone, atol=1e-5, rtol=0)


def test_the_reward_reads_the_prompt():
    images, wanted = composed(30, 8, ["fox"], ["striped", "checked", "plain"])
    judge, strict = get_reward("patterns"), get_reward("patterns(graded=False)")
    prompts = [f"a fox on a {kind} background" for kind in wanted]
    plain = [{}] * 30
    striped, checked = pattern_shares(images).unbind(1)
    gap = striped - checked
    want = {"striped": gap, "checked": -gap, "plain": -torch.maximum(striped, checked)}
    scores, _ = compute_rewards(judge, images, prompts, plain)
    torch.testing.assert_close(scores, torch.stack([want[k][i] for i, k in enumerate(wanted)]))
    right = [float(a == b) for a, b in zip(wanted, name_patterns(images))]
    assert compute_rewards(strict, images, prompts, plain)[0].tolist() == right
    # metadata go before the prompt's words
    metadata = [{"pattern": "checked"}] * 30
    torch.testing.assert_close(compute_rewards(judge, images, prompts, metadata)[0], -gap)
    with pytest.raises(RewardError, match="'dotted': needs one of plain, striped, checked"):
        compute_rewards(judge, images[:1], ["a fox"], [{"pattern": "dotted"}])


def test_the_gradient_against_finite_differences():
    images, wanted = composed(4, 9, ["fox"], ["striped", "checked"])
    images.requires_grad_()
    prompts = [f"a {kind} background" for kind in wanted]
    judge = get_reward("patterns")
    assert judge.differentiable and not get_reward("patterns(graded=False)").differentiable
    (gradient,) = torch.autograd.grad(judge(images, prompts, [{}] * 4).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    # float32: a step much smaller than this drowns in rounding
    ends = [judge(images + sign * 5e-3 * direction, prompts, [{}] * 4) for sign in (1, -1)]
    slope = (ends[0] - ends[1]).sum().item() / 1e-2
    assert abs(slope - (gradient * direction).sum().item()) < 0.02 * max(1, abs(slope))


@pytest.mark.parametrize("method", ["ddpo_is", "draft_lv"])
def test_a_run_trains_on_it(method, tmp_path):
    source = from_list(["a fox on a striped background", "a cat on a checked background"])
    state = trained(small(tmp_path, method=method, reward_fn="patterns"), prompt_fn=source)
    assert state.scorer.name == "patterns" and state.global_step > 0
