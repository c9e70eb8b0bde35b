"What would bore a reader of 25 and 26: exact sizes, gradients, and how a reward can misbehave."

import contextlib
import io
import multiprocessing.process
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from ddpo_scratch.models import tiny
from ddpo_scratch.models.sd import StableDiffusion, load_pipeline
from ddpo_scratch.prompts import all_prompts
from ddpo_scratch.rewards import base
from ddpo_scratch.rewards.base import (
    REWARDS,
    Reward,
    RewardError,
    RewardWorkers,
    Scorer,
    WeightedSum,
    _portable,
    compute_rewards,
    get_reward,
    reward,
    target_color,
)
from ddpo_scratch.rewards.jpeg import (
    _blocks,
    _dct_matrix,
    _tables,
    jpeg_compressibility,
    jpeg_compressibility_estimate,
    jpeg_size,
    jpeg_size_estimate,
)
from ddpo_scratch.rollout import generator_for, sample

torch.set_num_threads(1)

DIFFERENTIABLE = [
    "redness",
    "blueness",
    "brightness",
    "colorfulness",
    "target_color('teal')",
    "jpeg_compressibility_estimate",
    "jpeg_incompressibility_estimate",
]
ALL = ["jpeg_compressibility", "jpeg_incompressibility", *DIFFERENTIABLE]


def pictures(b=4, h=24, w=32, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def args(images):
    return images, ["a fox"] * len(images), [{}] * len(images)


def jpeg_file(image, quality=95):
    "The JPEG that PIL writes of a (3, h, w) picture."
    file = io.BytesIO()
    pixels = (np.moveaxis(image.numpy(), 0, -1) * 255).round().astype("uint8")
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file


@pytest.mark.parametrize("name", ALL)
def test_contract(name):
    fn = get_reward(name)
    rewards, extras = compute_rewards(fn, *args(pictures()))
    assert rewards.shape == (4,) and rewards.dtype == torch.float32 and extras == {}
    one, _ = compute_rewards(fn, *args(pictures()[:1]))
    torch.testing.assert_close(one, rewards[:1])
    assert getattr(fn, "differentiable", False) == (name in DIFFERENTIABLE)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name):
    fn = get_reward(name)
    x = pictures(2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda images: fn(*args(images)), x)
    assert compute_rewards(fn, *args(x))[0].dtype == torch.float32
    for flat in (0.0, 0.5, 1.0):
        x = torch.full((1, 3, 4, 4), flat, requires_grad=True)
        compute_rewards(fn, *args(x))[0].sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", [*ALL, "redness - 2*target_color('teal')"])
def test_rewards_without_a_network_can_be_pickled(name):
    fn = get_reward(name)
    copied = pickle.loads(pickle.dumps(fn))
    rewards, _ = compute_rewards(fn, *args(pictures()))
    assert torch.equal(compute_rewards(copied, *args(pictures()))[0], rewards)


def test_import_is_light():
    heavy = {"PIL", "scipy", "torchvision", "diffusers", "matplotlib", "transformers", "open_clip"}
    heavy |= {"ddpo_scratch.rewards.models", "ddpo_scratch.rewards.tiny_clip"}
    code = (
        "import sys; from ddpo_scratch.rewards import jpeg, base;"
        "base.get_reward('jpeg_compressibility + brightness');"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---------------------------------------------------------------- colours

SOLID = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}


def scores_of_solid(fn):
    images = torch.tensor(list(SOLID.values()))[:, :, None, None].expand(-1, -1, 8, 8)
    return dict(zip(SOLID, compute_rewards(fn, *args(images))[0].tolist()))


@pytest.mark.parametrize(
    "name, best", [("redness", "red"), ("blueness", "blue"), ("brightness", "white")]
)
def test_colours_want_what_they_say(name, best):
    scores = scores_of_solid(get_reward(name))
    assert max(scores, key=scores.get) == best and scores[best] == 1


@pytest.mark.parametrize("color", [(0, 1, 0), "lime", "#00ff00"])
def test_target_color_is_zero_at_its_colour(color):
    scores = scores_of_solid(target_color(color))
    assert max(scores, key=scores.get) == "green" and scores["green"] == 0


def test_colorfulness_is_the_published_formula():
    scores = scores_of_solid(get_reward("colorfulness"))
    assert scores["white"] < 1e-3 and scores["black"] < 1e-3 and scores["red"] > 0.1
    images = pictures()
    r, g, b = images.numpy().astype(np.float64).transpose(1, 0, 2, 3)
    rg, yb = r - g, 0.5 * (r + g) - b
    spread = np.hypot(rg.std((1, 2)), yb.std((1, 2)))
    want = spread + 0.3 * np.hypot(rg.mean((1, 2)), yb.mean((1, 2)))
    np.testing.assert_allclose(get_reward("colorfulness")(*args(images)).numpy(), want, atol=2e-4)


def test_colours_of_a_grey_picture_in_half_precision_have_a_gradient():
    images = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float16, requires_grad=True)
    get_reward("colorfulness")(images, [""], [{}]).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("color", ["", "oranje", "#12", (1, 2), (0, 0, 255), (0, 0, np.nan), None])
def test_bad_colours(color):
    with pytest.raises(ValueError, match="target_color: .* is not a colour"):
        target_color(color)


# ---------------------------------------------------------------- what goes in, what comes out

GOOD = {
    "numpy integers": np.arange(4),
    "a list": [1, 2, 3, 4],
    "a pair, float64": (torch.ones(4, dtype=torch.float64), {"a": 1}),
    "float16": torch.ones(4, dtype=torch.float16),
    "a column": torch.ones(4, 1),
    "tensors": [torch.tensor(1.0), torch.tensor([2.0])[0], torch.tensor(3.0), torch.tensor(4.0)],
    "tensors of one number": [torch.ones(1)] * 4,
    "with nothing beside them": (torch.ones(4), None),
    "with a dict a picture": ([1.0] * 4, [{"a": i} for i in range(4)]),
    "with a tuple of dicts": ([1.0] * 4, ({},) * 4),
    "bool": np.ones(4, dtype=bool),
}
BAD = {
    "two columns": torch.ones(4, 2),
    "a row": torch.ones(1, 4),
    "too few": torch.ones(3),
    "complex": torch.ones(4, dtype=torch.complex64),
    "complex of numpy": np.ones(4) * 1j,
    "complex in a list": [1j] * 4,
    "a dict": {"rewards": [1.0] * 4},
    "words beside them": ([1.0] * 4, ["a"] * 4),
    "a scalar": torch.tensor(1.0),
    "a NaN": [1.0, np.nan, 0, 0],
    "infinity": [np.inf] * 4,
    "nothing": None,
    "a word": "good",
    "nothings": [None] * 4,
    "one in a tuple": (torch.ones(4),),
    "no dict": (torch.ones(4), "log"),
    "three": (torch.ones(4), {}, 1),
}


class Returns(Reward):
    name = "returns"

    def __init__(self, out):
        self.out = out

    def __call__(self, images, prompts, metadata):
        return self.out


@pytest.mark.parametrize("out", GOOD.values(), ids=GOOD)
def test_what_a_reward_may_return(out):
    rewards, extras = compute_rewards(Returns(out), *args(pictures()))
    assert rewards.dtype == torch.float32 and rewards.shape == (4,) and isinstance(extras, dict)


@pytest.mark.parametrize("out", BAD.values(), ids=BAD)
def test_what_it_may_not(out):
    with pytest.raises(ValueError, match="reward 'returns' returned .* 4 pictures .*'a fox'"):
        compute_rewards(Returns(out), *args(pictures()))


@pytest.mark.parametrize(
    "value", [torch.ones(4), list("abcd"), 1.0, "text", torch.tensor(2.0), np.ones((4, 2))], ids=str
)
def test_extras_are_one_a_picture_or_one_for_all(value):
    extras = {"a": value}
    assert compute_rewards(Returns(([0.0] * 4, extras)), *args(pictures()))[1] is extras


@pytest.mark.parametrize("value", [torch.ones(3), [1], (), np.ones((2, 4))], ids=str)
def test_extras_of_another_number(value):
    with pytest.raises(ValueError, match="reward 'returns' returned . extras 'a' on 4 pictures"):
        compute_rewards(Returns(([0.0] * 4, {"a": value})), *args(pictures()))


def test_what_stands_beside_the_rewards_becomes_a_dict_of_lists():
    metadata = [{"noun": "fox", "n": i} for i in range(4)]
    extras = compute_rewards(Returns((np.arange(4), metadata)), *args(pictures()))[1]
    assert extras == {"noun": ["fox"] * 4, "n": [0, 1, 2, 3]}
    assert compute_rewards(Returns((5, 6)), *args(pictures(2)))[0].tolist() == [5, 6]
    pair = (torch.tensor(5.0), torch.tensor(6.0))
    assert compute_rewards(Returns(pair), *args(pictures(2)))[0].tolist() == [5, 6]


def test_a_list_of_tensors_keeps_its_gradients():
    def each(images, prompts, metadata):
        return [image.mean() for image in images]

    x = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(compute_rewards(each, *args(x))[0].sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / x[0].numel()))


# ---------------------------------------------------------------- units


@pytest.mark.parametrize(
    "text, unit",
    [
        ("jpeg_compressibility", "kB"),
        ("jpeg_incompressibility", "kB"),
        ("jpeg_compressibility_estimate", "kB"),
        ("jpeg_incompressibility_estimate", "kB"),
        ("2*jpeg_compressibility - jpeg_incompressibility_estimate", "kB"),
        ("jpeg_compressibility + redness", ""),
        ("redness", ""),
        ("target_color('teal')", ""),
        ("tiny_animal", "nats"),
        ("tiny_preference - 2*tiny_animal", "nats"),
        ("pickscore", "nats"),
        ("tiny_animal + jpeg_compressibility", ""),
    ],
)
def test_units(text, unit):
    assert Scorer(text).unit == unit


def test_the_unit_of_ones_own():
    def mine(images, prompts, metadata):
        return images.mean((1, 2, 3))

    assert Scorer(mine).unit == ""
    mine.unit = "points"
    assert Scorer(mine).unit == "points" == WeightedSum({mine: 2}).unit
    assert reward("mine_of_a_test", unit="cm")(mine).unit == "cm"
    assert reward("metres_of_a_test", unit="m")(type("Metres", (Reward,), {})).unit == "m"


def test_every_registered_reward_says_what_it_scores():
    for name, thing in REWARDS.items():
        if thing.__module__.startswith("ddpo_scratch."):  # other tests register rewards of theirs
            first = (thing.__doc__ or "").strip().splitlines()[0]
            assert len(first) > 20 and first[0].isupper() and first[-1] in ".:)", (name, first)


# ---------------------------------------------------------------- functions of fewer arguments


def of_images(images):
    return images.mean((1, 2, 3))


def of_prompts_too(images, prompts):
    assert prompts == ["a fox"] * len(images)
    return images.mean((1, 2, 3))


def of_prompts_first(prompt, image):
    assert prompt == ["a fox"] * len(image)
    return image.mean((1, 2, 3))


def of_metadata(images, metadata):
    assert metadata == [{}] * len(images)
    return images.mean((1, 2, 3))


def with_an_option(images, prompts, scale=1.0):
    return scale * images.mean((1, 2, 3))


def as_in_trl(images, prompts, prompt_metadata):
    return [image.mean() for image in images], prompt_metadata


def as_in_flow_grpo(images, prompts, metadata, only_strict=True):
    return images.mean((1, 2, 3)).numpy(), {}


def named_otherwise(pixels, words, rest):
    assert words == ["a fox"] * len(pixels) and rest == [{}] * len(pixels)
    return pixels.mean((1, 2, 3))


class Scores:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


FEWER = [of_images, of_prompts_too, of_prompts_first, of_metadata, with_an_option]
FEWER += [as_in_trl, as_in_flow_grpo, named_otherwise, Scores()]


@pytest.mark.parametrize("fn", FEWER, ids=lambda f: getattr(f, "__name__", "object"))
def test_rewards_of_fewer_arguments(fn):
    want = pictures().mean((1, 2, 3))
    for one in (fn, get_reward(fn), WeightedSum({fn: 1.0}), Scorer(fn)):
        scored = one(*args(pictures())) if one.__class__ is Scorer else None
        values, _ = scored or compute_rewards(one, *args(pictures()))
        torch.testing.assert_close(values, want)
    assert Scorer(fn).differentiable and Scorer(fn).name == getattr(fn, "__name__", "Scores")
    name = getattr(fn, "__name__", None)
    if name:
        values, _ = Scorer(f"2*{HERE}:{name}")(*args(pictures()))
        torch.testing.assert_close(values, 2 * want)
        with RewardWorkers(f"{HERE}:{name}", 1) as workers:
            torch.testing.assert_close(workers.submit(*args(pictures())).result()[0], want)


def of_a_colour(color):
    return target_color(color)


def of_strangers(one, two):
    return one


@pytest.mark.parametrize("fn", [of_a_colour, of_strangers])
def test_what_makes_a_reward_is_none_and_the_message_says_both(fn):
    message = f"{fn.__name__} takes .*if it scores pictures itself, name its arguments images, prom"
    for thing in (fn, f"{HERE}:{fn.__name__}"):
        with pytest.raises(ValueError, match=message):
            get_reward(thing)
    assert get_reward(f"{HERE}:of_a_colour('red')").name == "target_color(red)"


# ---------------------------------------------------------------- what a reward does by the way


def subtracts(images, prompts, metadata):
    return images.sub_(0.5).div_(0.25).mean((1, 2, 3))


def goes_past_autograd(images, prompts, metadata):
    images.data.mul_(3)
    return images.mean((1, 2, 3))


def goes_through_numpy(images, prompts, metadata):
    images.detach().numpy()[:] = 0
    return images.mean((1, 2, 3))


def empties(images, prompts, metadata):
    for m in metadata:
        m.get("questions", []).append("spoilt")
        m.clear()
    metadata.clear()
    prompts.clear()
    return images.mean((1, 2, 3))


IN_PLACE = [subtracts, goes_past_autograd, goes_through_numpy, empties]


def watched():
    metadata = [{"questions": ["?"]} for _ in range(4)]
    return pictures(), ["a fox"] * 4, metadata


@pytest.mark.parametrize("fn", IN_PLACE)
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_reward_that_works_in_place_changes_nothing(fn, wants_gradient):
    images, prompts, metadata = watched()
    x = images.clone().requires_grad_(wants_gradient)
    for one in (fn, WeightedSum([(1, fn), (1, "brightness"), (1, sees)])):
        values, extras = compute_rewards(one, x, prompts, metadata)
        assert torch.equal(x, images) and (prompts, metadata) == watched()[1:]
    torch.testing.assert_close(extras["brightness"], images.mean((1, 2, 3)))
    if wants_gradient and fn is subtracts:
        (gradient,) = torch.autograd.grad(compute_rewards(fn, x, prompts, metadata)[0].sum(), x)
        torch.testing.assert_close(gradient, torch.full_like(x, 4 / x[0].numel()))


def sees(images, prompts, metadata):
    assert (prompts, metadata) == watched()[1:]
    return images.mean((1, 2, 3))


def test_every_try_gets_its_own_copy(pauses):
    tries = []

    def shaky(images, prompts, metadata):
        tries.append(images.mean().item())
        images.zero_()
        prompts.clear()
        return [1 / (len(tries) - 1)]

    compute_rewards(shaky, *args(pictures(1)), retries=1)
    assert tries == [pictures(1).mean().item()] * 2


def test_pictures_that_are_kept_are_those_that_were_scored():
    images = pictures()
    with Scorer(subtracts, workers=1).batches() as submit:
        submit(*args(images)).result()
    assert torch.equal(images, pictures())


def wanders(images, prompts, metadata):
    os.chdir("/")
    return images.mean((1, 2, 3))


def wanders_and_fails(images, prompts, metadata):
    os.chdir("/")
    raise KeyError("lost")


@pytest.mark.parametrize("fn", [wanders, wanders_and_fails])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_working_directory_is_put_back(fn, workers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    context = pytest.raises(RewardError) if fn is wanders_and_fails else contextlib.nullcontext()
    with context, Scorer(fn, workers=workers).batches() as submit:
        submit(*args(pictures())).result()
    assert os.getcwd() == str(tmp_path)


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    compute_rewards(wanders, *args(pictures()))


def test_the_default_dtype_is_put_back_and_the_reward_named():
    def doubles(images, prompts, metadata):
        torch.set_default_dtype(torch.float64)
        return images.mean((1, 2, 3))

    message = (
        "'doubles' failed .* set torch's default dtype to torch.float64, which changes the run"
    )
    with pytest.raises(RewardError, match=message):
        compute_rewards(doubles, *args(pictures()))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_does_not_end_the_run(workers):
    def leaves(images, prompts, metadata):
        sys.exit(3)

    with pytest.raises(RewardError, match="'leaves' failed on 4 pictures .*: SystemExit: 3"):
        with Scorer(leaves, workers=workers).batches() as submit:
            submit(*args(pictures())).result()


BATCHES = {
    "a picture": lambda x: x[0],
    "grey": lambda x: x[:, :1],
    "-1 to 1": lambda x: x * 2 - 1,
    "0 to 255": lambda x: x * 255,
    "NaN": lambda x: x * torch.nan,
    "none": lambda x: x[:0],
    "bytes": lambda x: (x * 255).byte(),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("change", BATCHES.values(), ids=BATCHES)
def test_bad_images(change):
    with pytest.raises(ValueError, match="reward 'redness'"):
        compute_rewards(get_reward("redness"), *args(change(pictures())))


@pytest.mark.parametrize("prompts, n_metadata", [(["a"] * 3, 4), (["a"] * 4, 5), ("abcd", 4)])
def test_bad_lengths(prompts, n_metadata):
    with pytest.raises(ValueError, match="4 images"):
        compute_rewards(get_reward("redness"), pictures(), prompts, [{}] * n_metadata)


def broken(images, prompts, metadata):
    return 1 / 0


def test_an_exception_inside_keeps_its_cause():
    message = r"'broken' failed on 4 pictures \(4, 3, 24, 32\).*ZeroDivisionError"
    with pytest.raises(RewardError, match=message) as e:
        compute_rewards(broken, *args(pictures()))
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError, match="write it"):
        compute_rewards(Reward(), *args(pictures()))


# ---------------------------------------------------------------- the size of a JPEG


@pytest.mark.parametrize("quality", [50, 95])
@pytest.mark.parametrize("h, w", [(64, 64), (17, 33), (1, 1)])
def test_jpeg_size_is_the_file_that_pil_writes(h, w, quality):
    images = pictures(3, h, w)
    for image, size in zip(images, jpeg_size(images, quality)):
        assert size == torch.tensor(len(jpeg_file(image, quality).getvalue()) / 1000)


def test_jpeg_of_values_that_are_a_little_outside_or_half_precision():
    images = pictures()
    assert torch.equal(jpeg_size(images + 2.0), jpeg_size(torch.ones_like(images)))
    eight_bit = (images * 255).round() / 255
    assert torch.equal(jpeg_size(eight_bit.half()), jpeg_size(eight_bit))
    assert jpeg_size(images.requires_grad_()).requires_grad is False


def test_jpeg_orders_flat_and_noise():
    assert jpeg_size(torch.full((1, 3, 64, 64), 0.3)) < 0.8 < 5 < jpeg_size(pictures(1, 64, 64))


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8, None])
def test_threads_change_no_size(n_threads):
    for images in (pictures(7, 17, 33), pictures(1), pictures(5, 256, 256)):
        alone = torch.cat([jpeg_size(image[None], n_threads=1) for image in images])
        assert torch.equal(jpeg_size(images, n_threads=n_threads), alone)


@pytest.mark.parametrize("n", [0, -1])
def test_threads_are_counted(n):
    with pytest.raises(ValueError, match="n_threads"):
        jpeg_size(pictures(), n_threads=n)


# ---------------------------------------------------------------- and its estimate


def rank_correlation(a, b):
    return spearmanr(a.detach().flatten(), b.detach().flatten()).statistic


def natural(n, h, w, seed):
    "Random fields of power 1/f^a from white noise to clouds, at any contrast, half on a ramp."
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=g)

    f = torch.sqrt(torch.fft.fftfreq(h)[:, None] ** 2 + torch.fft.rfftfreq(w) ** 2)
    z = torch.randn(n, 3, h, w, generator=g)
    grey = uniform(0, 1)
    spectrum = torch.fft.rfft2(grey * z[:, :1] + (1 - grey) * z)
    z = torch.fft.irfft2(spectrum * f.clamp(min=1 / max(h, w)) ** -uniform(0, 3), s=(h, w))
    slope = (uniform(0, 1) < 0.5) * (torch.rand(n, 3, 1, 1, generator=g) - 0.5)
    color = torch.rand(n, 3, 1, 1, generator=g)
    contrast = 10 ** uniform(-2.5, -0.5)
    field = contrast * z / z.std((1, 2, 3), keepdim=True)
    return (color + slope * torch.linspace(-1, 1, w) + field).clamp(0, 1)


def composed(n, seed):
    g = torch.Generator().manual_seed(seed)
    return tiny.compose(tiny.load_sprites(), tiny.draw_scenes(n, g), g)[0]


SETS = {
    "composed": lambda: composed(100, 5),
    "fields": lambda: natural(100, 64, 64, 6),
    "wide fields": lambda: natural(30, 96, 160, 7),
    "odd fields": lambda: natural(60, 33, 50, 8),
    "small odd fields": lambda: natural(60, 9, 17, 9),
}


@pytest.fixture(scope="module", params=SETS.values(), ids=SETS)
def many(request):
    "Pictures of one kind."
    return request.param()


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_estimate_ranks_as_the_file_does(many, quality):
    estimate, true = jpeg_size_estimate(many, quality), jpeg_size(many, quality)
    assert estimate.shape == true.shape and estimate.dtype == torch.float32
    assert rank_correlation(estimate, true) >= 0.95
    bound = 0.06 if quality == 95 else 0.15  # the prices were fitted at 95
    assert ((estimate - true) / true).abs().mean() < bound


def identity(x):
    return x


def optimise(images, sign, decode=identity, n_steps=300, lr=0.005, stops=6):
    "Adam on the estimate; pictures at each stop. Pixels stay in [0, 1], latents are free."
    x = images.clone().requires_grad_()
    way = [decode(images).detach().clone()]
    optimizer = torch.optim.Adam([x], lr=lr)
    for i in range(n_steps):
        optimizer.zero_grad()
        (sign * jpeg_size_estimate(decode(x)).sum()).backward()
        optimizer.step()
        if decode is identity:
            x.data.clamp_(0, 1)
        if (i + 1) % (n_steps // stops) == 0:
            way.append(decode(x).detach().clone())
    return torch.stack(way)


def check_way(way, sign):
    true = torch.stack([jpeg_size(x) for x in way])
    estimate = torch.stack([jpeg_size_estimate(x) for x in way])
    assert rank_correlation(true, estimate) >= 0.95  # all stops together
    for t, e in zip(true, estimate):
        assert rank_correlation(t, e) >= 0.9  # at each stop among the pictures
    assert (sign * true.mean(1).diff() < 0).all()  # at each stop smaller (or bigger) than before
    assert (sign * (true[-1] - true[0]) < 0).all()  # and so is every single picture in the end


@pytest.mark.parametrize("sign", [1, -1], ids=["smaller", "bigger"])
@pytest.mark.parametrize("lr", [0.002, 0.01])
def test_pixels_optimised_against_the_estimate(sign, lr):
    fields = natural(60, 64, 64, 11)
    contrasty = fields[jpeg_size(fields) > 2][:12]
    start = torch.cat([composed(16, 10), contrasty, pictures(2, 64, 64)])
    check_way(optimise(start, sign, lr=lr), sign)


@pytest.fixture(scope="module")
def drawn():
    "The embedded model, and latents that it draws."
    model = StableDiffusion(load_pipeline("tiny"), 1.0)
    generators = [generator_for(0, i, "eval") for i in range(24)]
    with torch.no_grad():
        c = model.encode(all_prompts("common_animals")[:24])
        return model, sample(model, c, 20, 1.0, generators).x0


def test_estimate_on_pictures_of_the_model(drawn):
    model, latents = drawn
    images = model.decode(latents)
    assert rank_correlation(jpeg_size_estimate(images), jpeg_size(images)) >= 0.9


@pytest.mark.parametrize("sign", [1, -1], ids=["smaller", "bigger"])
def test_latents_optimised_against_the_estimate(drawn, sign):
    model, latents = drawn
    check_way(optimise(latents[::3], sign, model.decode, n_steps=24, lr=0.05, stops=4), sign)


def test_quantised_blocks_are_those_in_the_file():
    "A picture of our rounded coefficients is what PIL reads back, up to rounding of pixels."
    images = (natural(4, 32, 32, 3) * 255).round() / 255
    images = images[:, :1].expand(-1, 3, -1, -1)  # grey: nothing is halved
    D = _dct_matrix()
    blocks = _blocks(images.double(), 95)[0].round() * _tables(95)[0][0]
    rebuilt = torch.einsum("ui,bnuv,vk->bnik", D, blocks, D) + 128
    rebuilt = rebuilt.view(4, 2, 2, 2, 2, 8, 8).permute(0, 1, 3, 5, 2, 4, 6).reshape(4, 32, 32)
    for image, ours in zip(images, rebuilt):
        theirs = np.asarray(Image.open(jpeg_file(image)).convert("L")).astype(float)
        error = np.abs(ours.clamp(0, 255).numpy() - theirs)
        # libjpeg computes in integers: a few coefficients round to the other side
        assert error.max() < 5 and error.mean() < 0.5


@pytest.mark.parametrize("h, w", [(16, 16), (8, 24), (17, 9), (1, 1)])
def test_estimate_has_its_gradient_at_any_size(h, w):
    x = pictures(1, h, w).double().requires_grad_()
    assert torch.autograd.gradcheck(jpeg_size_estimate, x, fast_mode=True)
    for flat in (0.0, 0.5, 1.0):
        x = torch.full((1, 3, h, w), flat, requires_grad=True)
        assert torch.autograd.grad(jpeg_size_estimate(x).sum(), x)[0].isfinite().all()


def test_estimate_of_each_picture_is_its_own_and_of_any_dtype():
    images = natural(5, 48, 40, 2)
    alone = torch.cat([jpeg_size_estimate(image[None]) for image in images])
    torch.testing.assert_close(jpeg_size_estimate(images), alone)
    half = images.half()
    torch.testing.assert_close(jpeg_size_estimate(half), jpeg_size_estimate(half.float()))
    assert jpeg_size_estimate(images.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        inside = jpeg_compressibility_estimate(images)
    torch.testing.assert_close(inside.float(), -jpeg_size_estimate(images))


# ---------------------------------------------------------------- names, arguments, sums


class Constant(Reward):
    "Always the same."

    def __init__(self, value=1.0, name="constant", log=None):
        self.value = value
        self.name = name
        self.log = log
        self.device = "cpu"

    def __call__(self, images, prompts, metadata):
        rewards = torch.full((len(images),), float(self.value))
        return rewards if self.log is None else (rewards, {self.log: list(prompts)})

    def to(self, device):
        self.device = device
        return self


def make_seven():
    return Constant(7, "seven")


def make_any(value, name="any"):
    return Constant(value, name)


def plain(images, prompts, metadata):
    return [2.0] * len(images)


def not_a_reward(value):
    return value


HERE = __name__
C = f"{HERE}:Constant"


@pytest.mark.parametrize(
    "text, value",
    [
        (C, 1),
        (f"{C}(3)", 3),
        (f"{C}(value=-3.5)", -3.5),
        (f"2*{C}", 2),
        (f"{C}/4", 0.25),
        (f"-{C}(2) - -{C}(3)", 1),
        (f"{C}(1) + {C}(2)", 3),
        (f"1/2*({C}(1) - 3*({C}(2) - {C}(4)))", 3.5),
        (f" {C} ", 1),
        (f"{HERE}:make_seven", 7),
        (f"{HERE}:make_seven()", 7),
        (f"{HERE}:make_any(5, name='a:b + 2*c')", 5),
        (f"{HERE}:plain + {C}", 3),
    ],
)
def test_expressions(text, value):
    rewards, _ = compute_rewards(get_reward(text), *args(pictures()))
    torch.testing.assert_close(rewards, torch.full((4,), float(value)))


def test_a_reward_is_taken_as_it_is_and_a_class_is_made():
    assert get_reward(f"{HERE}:plain") is plain is get_reward(plain)
    assert isinstance(get_reward(Constant), Constant) and get_reward(make_seven).value == 7
    assert get_reward("target_color('teal')").name == "target_color(teal)"


def test_rewards_register_where_they_live():
    seven = Constant(7, "seven")
    assert reward("seven_of_a_test")(seven) is seven
    assert reward("any_of_a_test")(make_any) is make_any
    assert get_reward("seven_of_a_test") is seven
    assert get_reward("any_of_a_test(4, 'four')").value == 4
    total = get_reward("0.5*any_of_a_test(4, 'four') - seven_of_a_test")
    assert total.name == "0.5*four - 1*seven"


def test_the_folder_is_searched_for_names():
    known = {"jpeg_compressibility", "target_color", "aesthetic", "pickscore", "hpsv2"}
    known |= {"clip_score", "llava_bertscore", "llava_vqa"}
    known |= {"imagereward", "hpsv3", "unifiedreward", "ocr", "geneval"}
    known |= {"tiny_clip_score", "tiny_preference", "tiny_aesthetic"}
    assert known <= REWARDS.keys() and all(callable(REWARDS[name]) for name in known)


@pytest.mark.parametrize(
    "text, message",
    [
        ("rednes", "did you mean redness"),
        ("2*rednes", "did you mean redness"),
        ("jpeg", "did you mean jpeg_compressibility or jpeg_incompressibility"),
        ("redness + blue", "did you mean blueness"),
        ("qqq", "known: .*, and weighted sums of them"),
        ("target_color", "missing a required argument: 'color'"),
        ("target_color(colour='red')", r"target_color takes \(color\)"),
        ("target_color('oranje')", "is not a colour"),
        ("redness()", "without brackets"),
        ("(redness)(1)", "without brackets"),
        ("2", "is a number"),
        ("redness + 1", "cannot read"),
        ("redness*blueness", "cannot read"),
        ("redness +", "cannot read"),
        ("", "cannot read"),
        ("target_color(redness)", "must be literals"),
        ("no_such_module:fn", "cannot load"),
        ("redness.x", "cannot load"),
        ("ddpo_scratch.rewards.base:nothing", "cannot load"),
        ("ddpo_scratch.prompts:OBJECTS", "is of type list: needs a function or a Reward"),
        (f"{HERE}:not_a_reward(3)", "made a thing of type int"),
        (f"{HERE}:not_a_reward", "missing a required argument"),
        (3, "is of type int"),
        (None, "NoneType"),
    ],
)
def test_texts_that_do_not_name_a_reward(text, message):
    with pytest.raises(ValueError, match=message):
        get_reward(text)


def test_weighted_sum_logs_its_parts():
    total = WeightedSum(
        [(2, Constant(3, "a", log="words")), (-1, Constant(1, "a")), (0.5, "brightness")]
    )
    assert total.name == "2*a - 1*a + 0.5*brightness"
    images, prompts, metadata = args(pictures())
    rewards, extras = compute_rewards(total, images, prompts, metadata)
    torch.testing.assert_close(rewards, 6 - 1 + 0.5 * images.mean((1, 2, 3)))
    assert list(extras) == ["a#1", "a#1/words", "a#2", "brightness"]
    assert extras["a#1/words"] == prompts and all(len(v) == 4 for v in extras.values())
    inner, _ = compute_rewards(WeightedSum({total: 2}), images, prompts, metadata)
    torch.testing.assert_close(inner, 2 * rewards)


class Reads(Constant):
    uses_prompt = True


def test_weighted_sum_tells_what_its_parts_are():
    assert WeightedSum({"redness": 1, "brightness": 2}).differentiable
    assert not WeightedSum({"redness": 1, jpeg_compressibility: 1}).differentiable
    assert WeightedSum({"redness": 1, Reads(): 1}).uses_prompt
    assert not WeightedSum({"redness": 1}).uses_prompt


def test_weighted_sum_moves_its_parts():
    parts = [Constant(), Constant()]
    total = WeightedSum([(1, parts[0]), (1, plain), (1, WeightedSum([(1, parts[1])]))])
    assert total.to("meta") is total and [p.device for p in parts] == ["meta", "meta"]


def test_weighted_sum_has_the_gradient_of_its_parts():
    x = pictures().requires_grad_()

    def gradient(text):
        rewards, _ = compute_rewards(get_reward(text), *args(x))
        return torch.autograd.grad(rewards.sum(), x)[0]

    total = gradient("3*colorfulness - jpeg_compressibility_estimate")
    parts = 3 * gradient("colorfulness") - gradient("jpeg_compressibility_estimate")
    torch.testing.assert_close(total, parts)


def test_weighted_sum_names_the_part_that_fails():
    message = r"'redness \+ 2\*broken' failed .* reward 'broken' failed .*ZeroDivisionError"
    with pytest.raises(RewardError, match=message):
        compute_rewards(WeightedSum([(1, "redness"), (2, broken)]), *args(pictures()))


@pytest.mark.parametrize(
    "parts",
    [{}, [], {"redness": "1"}, {"redness": np.nan}, {"redness": np.inf}, {"red": 1}, [(1, 3)]],
    ids=str,
)
def test_bad_sums(parts):
    with pytest.raises(ValueError, match="WeightedSum|get_reward"):
        WeightedSum(parts)


# ---------------------------------------------------------------- workers


class Counts(Reward):
    "Tell the process, how often the reward was made there, and what of the images came along."

    made = 0
    name = "counts"

    def __init__(self):
        type(self).made += 1

    def __reduce__(self):
        return Counts, ()

    def __call__(self, images, prompts, metadata):
        time.sleep(float(prompts[0]))  # as long as the first prompt says
        extras = {"pid": os.getpid(), "made": Counts.made, "images": images * 2}
        return images.mean((1, 2, 3)), extras | {"bytes": images.untyped_storage().nbytes()}


def one(value, seconds=0.0):
    return torch.full((1, 3, 4, 4), value), [str(seconds)], [{}]


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_workers_keep_the_order_and_raise(kind):
    batches = [one(0.1, 0.3), one(0.2), one(2.0), one(0.4), one(0.5, "x"), one(0.6)]
    with RewardWorkers(f"{HERE}:Counts", 2, kind) as workers:
        futures = [workers.submit(*batch) for batch in batches]
        good = [futures[i].result()[0].item() for i in (0, 1, 3, 5)]
        assert good == pytest.approx([0.1, 0.2, 0.4, 0.6])
        with pytest.raises(ValueError, match="images lie in 2"):
            futures[2].result()
        with pytest.raises(RewardError, match="'counts' failed .*ValueError"):
            futures[4].result()
        assert torch.equal(futures[1].result()[1]["images"], one(0.2)[0] * 2)
    assert all(future.done() for future in futures)


@pytest.mark.parametrize("given", [f"{HERE}:Counts", Counts], ids=["text", "class"])
def test_processes_are_others_and_load_once(given):
    with RewardWorkers(given, 1, "process") as workers:
        extras = [workers.submit(*one(0.5)).result()[1] for _ in range(3)]
    pids = {e["pid"] for e in extras}
    assert len(pids) == 1 and pids != {os.getpid()}
    assert {e["made"] for e in extras} == {1}


def test_a_slice_is_sent_to_a_process_without_its_batch():
    whole = pictures(64, 4, 4)
    with RewardWorkers(Counts(), 1, "process") as workers:
        _, extras = workers.submit(whole[:1], ["0"], [{}]).result()
    assert extras["bytes"] == whole[0].nbytes


def test_threads_work_at_the_same_time_and_carry_gradients():
    barrier = threading.Barrier(3, timeout=20)

    def meet(images, prompts, metadata):
        barrier.wait()
        return images.mean((1, 2, 3))

    x = pictures().requires_grad_()
    with RewardWorkers(meet, 3) as workers:
        futures = [workers.submit(*args(x)) for _ in range(3)]
    (gradient,) = torch.autograd.grad(sum(f.result()[0].sum() for f in futures), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 3 / x[0].numel()))


def test_leaving_by_an_exception_cancels_what_has_not_begun():
    begun, go_on = threading.Event(), threading.Event()

    def wait(images, prompts, metadata):
        begun.set()
        go_on.wait(20)
        return [0.0]

    futures = []
    with pytest.raises(KeyError):
        with RewardWorkers(wait, 1) as workers:
            futures = [workers.submit(*one(0.5)) for _ in range(5)]
            begun.wait(20)
            threading.Timer(0.1, go_on.set).start()  # while the workers close
            raise KeyError("stop")
    assert futures[0].result() and all(f.cancelled() for f in futures[1:])
    with pytest.raises(CancelledError):
        futures[-1].result()
    with pytest.raises(RuntimeError):
        workers.submit(*one(0.5))


def hangs(images, prompts, metadata):
    time.sleep(600)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_nobody_waits_for_a_reward_that_hangs(kind):
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with RewardWorkers(f"{HERE}:hangs", 1, kind) as workers:
            futures = [workers.submit(*args(pictures())) for _ in range(3)]
            while not futures[0].running():
                time.sleep(0.001)
            raise KeyboardInterrupt  # its process may be there, or just being started
    assert [f.cancelled() for f in futures] == [False, True, True]
    assert time.monotonic() - start < 20
    if kind == "process" and (process := workers._processes[0].process):
        assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("is_first", [True, False])
def test_a_process_that_is_closed_while_it_starts_ends(is_first, monkeypatch):
    one = base._Process(f"{HERE}:hangs", threads=1, retries=0)
    made, go_on = threading.Event(), threading.Event()
    start = multiprocessing.process.BaseProcess.start

    def slow(self):
        made.set()
        go_on.wait(20)
        start(self)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", slow)
    if is_first:
        one.close(kill=True)
        with pytest.raises(RewardError, match="closed before its first batch"):
            one(*args(pictures()))
        return
    errors = []

    def ask():
        try:
            one(*args(pictures()))
        except RewardError as e:
            errors.append(e)

    asking = threading.Thread(target=ask)
    asking.start()
    made.wait(20)
    threading.Timer(0.1, go_on.set).start()  # while close waits
    one.close(kill=True)
    asking.join(20)
    assert one.process.exitcode == -signal.SIGKILL and len(errors) == 1


SCRIPT = """
import os, signal, threading, time
import torch
from ddpo_scratch.rewards.base import Scorer, RewardWorkers

def stop(*_):
    raise KeyboardInterrupt

def hangs(images, prompts, metadata):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)

signal.signal(signal.SIGTERM, stop)
try:
    with Scorer(hangs, workers=2).batches() as submit:
        submit(torch.rand(1, 3, 8, 8), ["a fox"], [{}]).result()
except KeyboardInterrupt:
    print("saved", flush=True)
"""


def test_a_process_ends_though_its_reward_hangs():
    "As a run does: a signal, the checkpoint, the end."
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("saved\n", 0), done.stderr


def crashes(images, prompts, metadata):
    os._exit(7)


def test_a_process_that_dies_is_named():
    with RewardWorkers(f"{HERE}:crashes", 1, "process") as workers:
        future = workers.submit(*args(pictures()))
        with pytest.raises(RewardError, match="process of a reward died with exit code 7"):
            future.result()


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_exception_comes_from_a_process_with_its_traceback():
    error = _portable(ZeroDivisionError("no"))
    assert type(error) is ZeroDivisionError and "ZeroDivisionError: no" in error.__notes__[0]
    error = _portable(Odd(1, 2))
    assert type(error) is RewardError and str(error) == "Odd: 1 and 2"
    assert pickle.loads(pickle.dumps(error)).__notes__ == error.__notes__


def test_threads_take_the_callers_grad_mode():
    weight = torch.ones(3, requires_grad=True)

    def weighted(images, prompts, metadata):
        return (images.mean((2, 3)) * weight).sum(1)

    with RewardWorkers(weighted, 1) as workers:
        with_grad = workers.submit(*args(pictures()))
        with torch.no_grad():
            without = workers.submit(*args(pictures()))
    assert with_grad.result()[0].requires_grad and not without.result()[0].requires_grad


@pytest.mark.parametrize(
    "reward_fn, options, message",
    [
        ("redness", {"kind": "fork"}, "needs 'thread' or 'process'"),
        ("redness", {"kind": None}, "needs 'thread' or 'process'"),
        ("redness", {"n_workers": 0}, "needs a whole number"),
        ("redness", {"n_workers": 1.5}, "needs a whole number"),
        ("redness", {"n_workers": None}, "needs a whole number"),
        ("rednes", {"kind": "process"}, "did you mean redness"),
        (lambda images, prompts, metadata: [0.0], {"kind": "process"}, "kind='thread'"),
    ],
)
def test_what_workers_refuse(reward_fn, options, message):
    with pytest.raises(ValueError, match=message):
        RewardWorkers(reward_fn, **options)


def test_a_gradient_does_not_come_back_from_a_process():
    with RewardWorkers("redness", 1, "process") as workers:
        with pytest.raises(ValueError, match="gradient"):
            workers.submit(*args(pictures().requires_grad_()))


# ---------------------------------------------------------------- what training holds


class Shaky(Constant):
    "Raises a number of times, then scores."

    failures = 2

    def __call__(self, images, prompts, metadata):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the server is busy")
        return super().__call__(images, prompts, metadata)


@pytest.fixture
def pauses(monkeypatch):
    "The pauses that are made, none of which is waited for."
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_raised_is_asked_again_after_longer_and_longer_pauses(pauses, workers):
    with Scorer(Shaky(3), retries=2, workers=workers).batches() as submit:
        rewards, _ = submit(*args(pictures())).result()
    assert rewards.tolist() == [3.0] * 4 and pauses == [1, 2]


def test_the_last_failure_is_raised(pauses):
    scorer = Scorer(Shaky(name="shaky"), retries=1)
    with pytest.raises(RewardError, match="'shaky' failed .*the server is busy"):
        scorer(*args(pictures()))
    assert pauses == [1] and scorer.reward.failures == 0


def test_a_pause_is_at_most_a_minute(pauses):
    reward_fn = Shaky()
    reward_fn.failures = 8
    Scorer(reward_fn, retries=8)(*args(pictures()))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_what_a_reward_returns_wrongly_is_not_asked_for_again(pauses):
    with pytest.raises(ValueError, match="returned shape"):
        Scorer(Returns([1.0]), retries=5)(*args(pictures()))
    assert pauses == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_back_in_order(workers):
    with Scorer(get_reward("brightness"), workers=workers).batches() as submit:
        futures = [submit(*one(value)) for value in (0.1, 0.2, 0.3)]
    assert [f.result()[0].item() for f in futures] == pytest.approx([0.1, 0.2, 0.3])


class Moves(Reward):
    "Note where it is asked to be, and when it scores."

    def __init__(self):
        self.events = []

    def to(self, device):
        self.events.append(str(device))
        return self

    def __call__(self, images, prompts, metadata):
        self.events.append("score")
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_offloaded_reward_is_on_the_device_while_it_scores(workers):
    scorer = Scorer(Moves(), workers=workers, offload_device="meta")
    with scorer.batches() as submit:
        submit(*args(pictures())).result()
    with scorer.at_hand():
        scorer(*args(pictures()))
    assert scorer.reward.events == ["meta", "score", "cpu"] * 2


def test_it_is_put_away_when_scoring_fails():
    scorer = Scorer(Moves(), offload_device="meta")
    with pytest.raises(KeyError):
        with scorer.at_hand():
            raise KeyError
    assert scorer.reward.events == ["meta", "cpu"]


@pytest.mark.parametrize("offload_device, reward_fn", [(None, Moves()), ("meta", plain)])
def test_what_is_not_offloaded_stays(offload_device, reward_fn):
    scorer = Scorer(reward_fn, offload_device=offload_device)
    with scorer.batches() as submit:
        submit(*args(pictures()))
    assert getattr(reward_fn, "events", ["score"]) == ["score"]


class Holds(Constant):
    "Holds something that has to be loaded, or cannot be."

    def __init__(self, error=None):
        super().__init__()
        self.loaded = []
        self.error = error

    def load(self, device=None):
        self.loaded.append(device)
        if self.error:
            raise self.error


def test_a_scorer_loads_what_its_reward_holds():
    first, second = Holds(), Holds()
    scorer = Scorer(WeightedSum([(1, first), (1, WeightedSum({second: 1})), (1, plain)]))
    assert scorer.load("meta") is scorer and first.loaded == second.loaded == ["meta"]
    offloaded = Scorer(Holds(), offload_device="meta").load("meta")
    assert offloaded.reward.loaded == ["cpu"]
    for cheap in ("redness", plain, of_images, Constant()):
        Scorer(cheap).load()


@pytest.mark.parametrize("error", [OSError("no\n  file"), ImportError("no package"), KeyError("x")])
def test_what_cannot_be_loaded_is_told_in_one_line(error):
    with pytest.raises(RewardError, match="reward 'constant' cannot be loaded: ") as e:
        Scorer(Holds(error)).load()
    assert "\n" not in str(e.value) and type(error).__name__ in str(e.value)


def test_what_a_scorer_tells_of_its_reward():
    scorers = [Scorer(r) for r in ("redness", "jpeg_compressibility", plain, Constant())]
    assert [s.name for s in scorers] == ["redness", "jpeg_compressibility", "plain", "constant"]
    assert [s.differentiable for s in scorers] == [True, False, True, False]


def optional_prompts(images, prompts=None):
    return torch.full((len(images),), float(bool(prompts)))


def prompts_by_name(images, *, prompts=None):
    return torch.full((len(images),), float(bool(prompts)))


def prompts_after_an_option(images, scale=1.0, prompts=None):
    return torch.full((len(images),), scale * bool(prompts))


def all_by_name(*, images, prompts, metadata):
    return optional_prompts(images, prompts)


def in_another_order(prompts, images, metadata):
    return optional_prompts(images, isinstance(prompts, list))


def a_mask_is_no_prompt(images, mask=None, scale=None):
    assert mask is None and scale is None
    return torch.ones(len(images))


class Brightness(torch.nn.Module):
    def forward(self, images):
        return torch.ones(len(images))


SPOKEN = [optional_prompts, prompts_by_name, prompts_after_an_option, all_by_name]
SPOKEN += [in_another_order, a_mask_is_no_prompt, Brightness()]


@pytest.mark.parametrize("fn", SPOKEN, ids=lambda f: getattr(f, "__name__", "module"))
def test_what_a_reward_names_it_is_given_and_nothing_else(fn):
    assert compute_rewards(fn, *args(pictures()))[0].eq(1).all()
    assert compute_rewards(get_reward(fn), *args(pictures()))[0].eq(1).all()


def test_makers_of_three_arguments(tmp_path):
    file = tmp_path / "makers.py"
    file.write_text("""
def score(images, prompts, metadata):
    return images[:, 0].mean((1, 2))

def color(red, green, blue):
    return score

def options(strength=None, color=None, k=None):
    return score
""")
    for call in ("color(1, 0, 0)", "options(color='red')", "options"):
        assert get_reward(f"{file}:{call}").__name__ == "score"
    with pytest.raises(ValueError, match="is a reward already: write it without brackets"):
        get_reward(f"{file}:score(1, 2, 3)")


def test_rewards_in_two_threads_leave_the_process_as_it_was(tmp_path):
    "The second remembered what the first had changed for a moment, and put that back."
    here, inside, left = os.getcwd(), threading.Event(), threading.Event()

    def score(images, prompts, metadata):
        if prompts[0] == "first":
            with contextlib.chdir(tmp_path):
                torch.set_default_dtype(torch.float64)
                inside.set()
                time.sleep(0.2)
                torch.set_default_dtype(torch.float32)
            left.set()
        else:
            left.wait(10)
            time.sleep(0.1)
        return torch.zeros(len(images))

    with base.RewardWorkers(score, 2) as workers:
        first = workers.submit(pictures(), ["first"] * len(pictures()), args(pictures())[2])
        assert inside.wait(10)
        second = workers.submit(*args(pictures()))
        first.result(), second.result()
    assert os.getcwd() == here and torch.get_default_dtype() == torch.float32


def test_workers_that_are_cancelled_twice():
    go = threading.Event()

    def score(images, prompts, metadata):
        go.wait(10)
        return images.mean((1, 2, 3))

    workers = base.RewardWorkers(score, 2)
    workers.submit(*args(pictures()))
    time.sleep(0.1)
    workers.close(cancel=True)
    workers.close(cancel=True)
    go.set()
    workers.close()
