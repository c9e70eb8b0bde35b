"What would bore a reader of 03: exact sizes at many shapes and dtypes, gradients, and every way a reward can misbehave."
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_scratch.rewards import REWARDS, Reward, compute_rewards, get_reward, jpeg_size, target_color


HERE = [n for n, r in REWARDS.items() if callable(r) and n != "target_color"]  # those that need neither a network nor an argument


def pictures(b=4, h=24, w=32, seed=0): return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def args(images): return images, ["a fox"] * len(images), [{}] * len(images)


@pytest.mark.parametrize("quality", [50, 95])
@pytest.mark.parametrize("h, w", [(64, 64), (17, 33), (1, 1)])
def test_jpeg_size_is_the_file_that_pil_writes(h, w, quality):
    images = pictures(3, h, w)
    for im, size in zip(images, jpeg_size(images, quality)):
        file = io.BytesIO()
        Image.fromarray((np.moveaxis(im.numpy(), 0, -1) * 255).round().astype("uint8")).save(file, "JPEG", quality=quality)
        assert size == torch.tensor(len(file.getvalue()) / 1000)


def test_jpeg_of_values_that_are_a_little_outside_or_half_precision():
    images = pictures()
    assert torch.equal(jpeg_size(images + 2.0), jpeg_size(torch.ones_like(images)))
    eight_bit = (images * 255).round() / 255
    assert torch.equal(jpeg_size(eight_bit.half()), jpeg_size(eight_bit))
    assert jpeg_size(images.requires_grad_()).requires_grad is False


def test_jpeg_orders_flat_and_noise():
    assert jpeg_size(torch.full((1, 3, 64, 64), 0.3)) < 0.8 < 5 < jpeg_size(pictures(1, 64, 64))


@pytest.mark.parametrize("name", [*HERE, "target_color('teal')"])
def test_contract(name):
    rewards, info = compute_rewards(get_reward(name), *args(pictures()))
    assert rewards.shape == (4,) and rewards.dtype == torch.float32 and info == {}
    one, _ = compute_rewards(get_reward(name), *args(pictures()[:1]))
    torch.testing.assert_close(one, rewards[:1])


@pytest.mark.parametrize("reward", [*(r for r in REWARDS.values() if getattr(r, "differentiable", False)), target_color("teal")], ids=str)
def test_gradients(reward):
    x = pictures(2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda im: reward(*args(im)), x)
    for flat in (0.0, 0.5, 1.0):
        x = torch.full((1, 3, 4, 4), flat, requires_grad=True)
        compute_rewards(reward, *args(x))[0].sum().backward()
        assert x.grad.isfinite().all()


def test_colours_want_what_they_say():
    solid = {n: torch.tensor(c).float()[None, :, None, None].expand(1, 3, 8, 8) for n, c in
             dict(red=(1, 0, 0), green=(0, 1, 0), blue=(0, 0, 1), white=(1, 1, 1), black=(0, 0, 0)).items()}
    score = lambda reward: {n: compute_rewards(reward, *args(im))[0].item() for n, im in solid.items()}
    for name, best in (("redness", "red"), ("blueness", "blue"), ("brightness", "white")):
        s = score(get_reward(name))
        assert max(s, key=s.get) == best and s[best] == 1
    for color in ((0, 1, 0), "lime", "#00ff00"):
        s = score(target_color(color))
        assert max(s, key=s.get) == "green" and s["green"] == 0
    s = score(get_reward("colorfulness"))
    assert s["white"] < 1e-3 and s["black"] < 1e-3 and s["red"] > 0.1


def test_colorfulness_is_the_published_formula():
    im = pictures()
    r, g, b = im.numpy().astype(np.float64).transpose(1, 0, 2, 3)
    rg, yb = r - g, 0.5 * (r + g) - b
    want = np.hypot(rg.std((1, 2)), yb.std((1, 2))) + 0.3 * np.hypot(rg.mean((1, 2)), yb.mean((1, 2)))
    np.testing.assert_allclose(get_reward("colorfulness")(*args(im)).numpy(), want, atol=2e-4)


@pytest.mark.parametrize("color", ["", "oranje", "#12", (1, 2), (0, 0, 255), (0, 0, float("nan")), None, 7])
def test_bad_colours(color):
    with pytest.raises(ValueError, match="target_color"): target_color(color)


@pytest.mark.parametrize("good", [lambda i, p, m: np.arange(4), lambda i, p, m: [1, 2, 3, 4], lambda i, p, m: (torch.ones(4, dtype=torch.float64), {"a": 1}),
                                  lambda i, p, m: torch.ones(4, dtype=torch.float16)])
def test_what_a_reward_may_return(good):
    rewards, info = compute_rewards(good, *args(pictures()))
    assert rewards.dtype == torch.float32 and rewards.shape == (4,) and isinstance(info, dict)


def bad_reward(out): return lambda images, prompts, metadata: out


@pytest.mark.parametrize("out", [torch.ones(4, 1), torch.ones(3), torch.tensor(1.0), [1.0, float("nan"), 0, 0], [float("inf")] * 4, None, "good", [None] * 4,
                                 (torch.ones(4),), (torch.ones(4), "log"), (torch.ones(4), {}, 1)], ids=str)
def test_what_it_may_not(out):
    with pytest.raises(ValueError, match="reward '<lambda>' returned .* 4 pictures .*'a fox'"): compute_rewards(bad_reward(out), *args(pictures()))


def test_an_exception_inside_keeps_its_cause():
    class Broken(Reward):
        name = "broken"
        def __call__(self, images, prompts, metadata): return 1 / 0
    with pytest.raises(RuntimeError, match=r"'broken' failed on 4 pictures \(4, 3, 24, 32\).*ZeroDivisionError") as e: compute_rewards(Broken(), *args(pictures()))
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="write it"): compute_rewards(Reward(), *args(pictures()))


@pytest.mark.parametrize("images", [pictures()[0], pictures()[:, :1], pictures() * 2 - 1, pictures() * 255, pictures() * float("nan"), pictures()[:0],
                                    (pictures() * 255).byte(), np.zeros((4, 3, 8, 8))], ids=lambda x: str(tuple(x.shape)))
def test_bad_images(images):
    with pytest.raises(ValueError, match="reward 'redness'"): compute_rewards(REWARDS["redness"], images, ["a"] * len(images), [{}] * len(images))


def test_bad_lengths():
    images = pictures()
    for prompts, metadata in ((["a"] * 3, [{}] * 4), (["a"] * 4, [{}] * 5), ("abcd", [{}] * 4)):
        with pytest.raises(ValueError, match="4 images"): compute_rewards(REWARDS["redness"], images, prompts, metadata)


class Nine(Reward):
    name = "nine"
    def __call__(self, images, prompts, metadata): return [9] * len(images)


def test_names():
    assert compute_rewards(get_reward(f"{__name__}:Nine"), *args(pictures()))[0].tolist() == [9] * 4
    assert isinstance(get_reward(f"{__name__}:Nine"), Nine)
    with pytest.raises(ValueError, match="did you mean redness"): get_reward("rednes")
    with pytest.raises(ValueError, match="did you mean jpeg_compressibility or jpeg_incompressibility"): get_reward("jpeg")
    for name in ("qqq", "no_such_module:fn", "ddpo_scratch.rewards:nothing", "ddpo_scratch.rewards:", ":fn", "", "ddpo_scratch.rewards:REWARDS"):
        with pytest.raises(ValueError, match="get_reward"): get_reward(name)


def test_import_is_light():
    code = "import sys, ddpo_scratch.rewards; print(sorted({'PIL', 'torchvision', 'diffusers', 'matplotlib', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
