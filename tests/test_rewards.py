"What would bore a reader of 03: exact sizes at many shapes and dtypes, gradients, and every way a reward can misbehave."
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_scratch import tiny
from ddpo_scratch.rewards import (REWARDS, Reward, RewardError, RewardWorkers, WeightedSum, _jpeg_blocks, _load, compute_rewards, get_reward, jpeg_compressibility, jpeg_compressibility_estimate,
                                  jpeg_size, jpeg_size_estimate, target_color)

torch.set_num_threads(1)


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


@pytest.mark.parametrize("reward", [*(REWARDS[n] for n in HERE if getattr(REWARDS[n], "differentiable", False)), target_color("teal")], ids=str)
def test_gradients(reward):
    x = pictures(2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda im: reward(*args(im)), x)
    assert compute_rewards(reward, *args(x))[0].dtype == torch.float32
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
    with pytest.raises(RewardError, match=r"'broken' failed on 4 pictures \(4, 3, 24, 32\).*ZeroDivisionError") as e: compute_rewards(Broken(), *args(pictures()))
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
    assert isinstance(get_reward(Nine), Nine)
    for name in ("qqq", "no_such_module:fn", "ddpo_scratch.rewards:nothing", "ddpo_scratch.rewards:", ":fn", "", "ddpo_scratch.rewards:REWARDS"):
        with pytest.raises(ValueError, match="get_reward"): get_reward(name)


def test_import_is_light():
    heavy = {"PIL", "scipy", "torchvision", "diffusers", "matplotlib", "transformers", "open_clip", "ddpo_scratch.reward_models", "ddpo_scratch.tiny_clip"}
    code = f"import sys, ddpo_scratch.rewards; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---------------------------------------------------------------- the size of a JPEG on threads, and its estimate

@pytest.mark.parametrize("n_threads", [1, 2, 3, 8, None])
def test_threads_change_no_size(n_threads):
    for images in (pictures(7, 17, 33), pictures(1), pictures(5, 256, 256)):
        assert torch.equal(jpeg_size(images, n_threads=n_threads), torch.cat([jpeg_size(im[None], n_threads=1) for im in images]))


def test_threads_are_counted():
    for n in (0, -1):
        with pytest.raises(ValueError, match="n_threads"): jpeg_size(pictures(), n_threads=n)


def rank_correlation(a, b):
    from scipy.stats import spearmanr
    return spearmanr(a.detach().flatten(), b.detach().flatten()).statistic


def natural(n, h, w, seed):
    "Coloured random fields of power 1/f^a from white noise to clouds, at any contrast, half of them on a ramp."
    g = torch.Generator().manual_seed(seed)
    u = lambda lo, hi: lo + (hi - lo) * torch.rand(n, 1, 1, 1, generator=g)
    f = torch.sqrt(torch.fft.fftfreq(h)[:, None]**2 + torch.fft.rfftfreq(w)**2).clamp(min=1 / max(h, w))
    z, grey = torch.randn(n, 3, h, w, generator=g), u(0, 1)
    z = torch.fft.irfft2(torch.fft.rfft2(grey * z[:, :1] + (1 - grey) * z) * f**-u(0, 3), s=(h, w))
    ramp = (u(0, 1) < .5) * (torch.rand(n, 3, 1, 1, generator=g) - .5) * torch.linspace(-1, 1, w)
    return (torch.rand(n, 3, 1, 1, generator=g) + ramp + 10**u(-2.5, -.5) * z / z.std((1, 2, 3), keepdim=True)).clamp(0, 1)


def composed(n, seed):
    g = torch.Generator().manual_seed(seed)
    return tiny.compose(tiny.load_sprites(), tiny.draw_scenes(n, g), g)[0]


@pytest.mark.parametrize("images", [composed(100, 5), natural(100, 64, 64, 6), natural(30, 96, 160, 7), natural(60, 33, 50, 8), natural(60, 9, 17, 9)],
                         ids=["composed", "fields", "wide fields", "odd fields", "small odd fields"])
@pytest.mark.parametrize("quality", [50, 75, 95])
def test_estimate_ranks_as_the_file_does(images, quality):
    estimate, true = jpeg_size_estimate(images, quality), jpeg_size(images, quality)
    assert estimate.shape == true.shape and estimate.dtype == torch.float32
    assert rank_correlation(estimate, true) >= .95
    assert ((estimate - true) / true).abs().mean() < (.06 if quality == 95 else .15)  # the prices were fitted at 95


def optimise(images, sign, decode=lambda x: x, n_steps=300, lr=.005, stops=6):
    "Adam on the estimate; pictures at each stop. Pixels stay in [0, 1], latents are free."
    x, way = images.clone().requires_grad_(), [decode(images).detach().clone()]
    optimizer = torch.optim.Adam([x], lr=lr)
    for i in range(n_steps):
        optimizer.zero_grad()
        (sign * jpeg_size_estimate(decode(x)).sum()).backward()
        optimizer.step()
        if x.shape[1] == 3: x.data.clamp_(0, 1)
        if (i + 1) % (n_steps // stops) == 0: way.append(decode(x).detach().clone())
    return torch.stack(way)


def check_way(way, sign):
    true, estimate = (torch.stack([size(x) for x in way]) for size in (jpeg_size, jpeg_size_estimate))
    assert rank_correlation(true, estimate) >= .95  # all stops together
    assert min(rank_correlation(t, e) for t, e in zip(true, estimate)) >= .9  # at each stop among the pictures
    assert (sign * true.mean(1).diff() < 0).all()  # at each stop smaller (or bigger) than before
    assert (sign * (true[-1] - true[0]) < 0).all()  # and so is every single picture in the end


@pytest.mark.parametrize("sign", [1, -1], ids=["smaller", "bigger"])
@pytest.mark.parametrize("lr", [.002, .01])
def test_pixels_optimised_against_the_estimate(sign, lr):
    contrasty = natural(60, 64, 64, 11)
    check_way(optimise(torch.cat([composed(16, 10), contrasty[jpeg_size(contrasty) > 2][:12], pictures(2, 64, 64)]), sign, lr=lr), sign)


@pytest.fixture(scope="module")
def drawn():
    from ddpo_scratch.prompts import all_prompts
    from ddpo_scratch.rollout import generator_for, sample
    from ddpo_scratch.sd import StableDiffusion, load_pipeline
    model = StableDiffusion(load_pipeline("tiny"), 1.)
    with torch.no_grad(): latents = sample(model, model.encode(all_prompts("common_animals")[:24]), 20, 1., [generator_for(0, i, "eval") for i in range(24)]).x0
    return model, latents


def test_estimate_on_pictures_of_the_model(drawn):
    images = drawn[0].decode(drawn[1])
    assert rank_correlation(jpeg_size_estimate(images), jpeg_size(images)) >= .9


@pytest.mark.parametrize("sign", [1, -1], ids=["smaller", "bigger"])
def test_latents_optimised_against_the_estimate(drawn, sign):
    check_way(optimise(drawn[1][::3], sign, drawn[0].decode, n_steps=24, lr=.05, stops=4), sign)


def test_quantised_blocks_are_those_in_the_file():
    "A picture rebuilt from our rounded coefficients is the picture that PIL reads back from its file, up to rounding of pixels."
    from ddpo_scratch.rewards import _jpeg_tables
    images = (natural(4, 32, 32, 3) * 255).round() / 255
    images = images[:, :1].expand(-1, 3, -1, -1)  # grey: nothing is halved
    basis, q, _ = _jpeg_tables(95)
    blocks = _jpeg_blocks(images.double(), 95)[0].round() * q[0]
    rebuilt = torch.einsum("ui,bnuv,vk->bnik", basis, blocks, basis) + 128
    rebuilt = rebuilt.view(4, 2, 2, 2, 2, 8, 8).permute(0, 1, 3, 5, 2, 4, 6).reshape(4, 32, 32)
    for im, mine in zip(images, rebuilt):
        file = io.BytesIO()
        Image.fromarray((np.moveaxis(im.numpy(), 0, -1) * 255).round().astype("uint8")).save(file, "JPEG", quality=95)
        theirs = np.asarray(Image.open(file).convert("L")).astype(float)
        off = np.abs(mine.clamp(0, 255).numpy() - theirs)
        assert off.max() < 5 and off.mean() < .5  # libjpeg computes in integers: a few coefficients round to the other side


@pytest.mark.parametrize("h, w", [(16, 16), (8, 24), (17, 9), (1, 1)])
def test_estimate_has_its_gradient_at_any_size(h, w):
    x = pictures(1, h, w).double().requires_grad_()
    assert torch.autograd.gradcheck(jpeg_size_estimate, x, fast_mode=True)
    for flat in (0., .5, 1.):
        x = torch.full((1, 3, h, w), flat, requires_grad=True)
        assert torch.autograd.grad(jpeg_size_estimate(x).sum(), x)[0].isfinite().all()


def test_estimate_of_each_picture_is_its_own_and_of_any_dtype():
    images = natural(5, 48, 40, 2)
    torch.testing.assert_close(jpeg_size_estimate(images), torch.cat([jpeg_size_estimate(im[None]) for im in images]))
    torch.testing.assert_close(jpeg_size_estimate(images.half()), jpeg_size_estimate(images.half().float()))
    assert jpeg_size_estimate(images.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16): inside = jpeg_compressibility_estimate(images)
    torch.testing.assert_close(inside.float(), -jpeg_size_estimate(images))


# ---------------------------------------------------------------- names, arguments, sums

class Constant(Reward):
    "Always the same."
    made = 0
    def __init__(self, value=1., name="constant", log=None):
        type(self).made += 1
        self.value, self.name, self.log, self.device = value, name, log, "cpu"
    def __call__(self, images, prompts, metadata):
        rewards = torch.full((len(images),), float(self.value))
        return rewards if self.log is None else (rewards, {self.log: list(prompts)})
    def to(self, device):
        self.device = device
        return self


def make_seven(): return Constant(7, "seven")
def make_any(value, name="any"): return Constant(value, name)
def plain(images, prompts, metadata): return [2.] * len(images)
def not_a_reward(value): return value


C = f"{__name__}:Constant"


@pytest.mark.parametrize("text, value", [
    (C, 1), (f"{C}(3)", 3), (f"{C}(value=-3.5)", -3.5), (f"2*{C}", 2), (f"{C}*2", 2), (f"{C}/4", .25), (f"-{C}", -1), (f"-{C}(2) - -{C}(3)", 1),
    (f"{C}(1) + {C}(2)", 3), (f"{C}(1) - {C}(2)", -1), (f"1/2*({C}(1) - 3*({C}(2) - {C}(4)))", 3.5), (f" {C} ", 1), (f"2e-1 * {C}", .2),
    (f"{__name__}:make_seven", 7), (f"{__name__}:make_seven()", 7), (f"{__name__}:make_any(5, name='a:b + 2*c')", 5), (f"{__name__}:plain + {C}", 3)])
def test_expressions(text, value):
    rewards, _ = compute_rewards(get_reward(text), *args(pictures()))
    torch.testing.assert_close(rewards, torch.full((4,), float(value)))


def test_registered_strings_are_loaded_when_asked_for(monkeypatch):
    monkeypatch.setitem(REWARDS, "lazy", C)
    monkeypatch.setitem(REWARDS, "lazy_plain", f"{__name__}:plain")
    monkeypatch.setitem(REWARDS, "lazy_factory", f"{__name__}:make_any")
    before = Constant.made
    assert isinstance(get_reward("lazy"), Constant) and Constant.made == before + 1
    assert get_reward("lazy_plain") is plain and get_reward("lazy(4)").value == 4 and get_reward("lazy_factory(3)").value == 3
    assert get_reward("0.5*lazy(4, 'four') - lazy_plain").name == "0.5*four - 1*plain"
    monkeypatch.setitem(REWARDS, "missing", "no_such_package.module:Thing")
    for text in ("missing", "2*missing"):
        with pytest.raises(ValueError, match="no_such_package"): get_reward(text)


@pytest.mark.parametrize("name", [n for n, r in REWARDS.items() if isinstance(r, str)])
def test_lazy_names_lead_to_something(name):
    module = REWARDS[name].partition(":")[0]
    if importlib.util.find_spec(module) is None: pytest.skip(f"{module} is not part of this version")
    assert callable(_load(REWARDS[name]))


@pytest.mark.parametrize("text, said", [
    ("2*rednes", "did you mean redness"), ("redness + blue", "did you mean blueness"), ("target_color", "missing a required argument: 'color'"),
    ("target_color(colour='red')", "target_color\\(color"), ("target_color('oranje')", "is no colour"), ("redness()", "without brackets"), ("redness(3)", "without brackets"),
    ("2", "is a number"), ("1 + 1", "is a number"), ("redness + 1", "cannot read"), ("redness*blueness", "cannot read"), ("1/redness", "cannot read"),
    ("redness/0", "cannot read"), ("redness**2", "cannot read"), ("redness if 1 else blueness", "cannot read"), ("[redness]", "cannot read"), ("True*redness", "cannot read"),
    ("redness +", "cannot read"), ("lambda: 0", "cannot read"), ("redness; blueness", "cannot read"), ("'redness'", "cannot read"), ("(redness)(1)", "without brackets"),
    ("target_color(redness)", "must be literals"), ("target_color(*'abc')", "must be literals"), ("target_color(**{'color': 'red'})", "get_reward"),
    (f"{__name__}:not_a_reward(3)", "made a int"), (f"{__name__}:not_a_reward", "missing a required argument"), ("redness.x", "cannot load"), (3, "is a int"), (None, "NoneType")])
def test_texts_that_are_no_reward(text, said):
    with pytest.raises(ValueError, match=said): get_reward(text)


def test_nothing_is_evaluated(tmp_path):
    file = tmp_path / "made"
    for text in (f"target_color(open({str(file)!r}, 'w'))", f"open({str(file)!r}, 'w')", f"__import__('pathlib').Path({str(file)!r}).touch()"):
        with pytest.raises(ValueError, match="get_reward"): get_reward(text)
    assert not file.exists()


def test_weighted_sum_logs_its_parts():
    total = WeightedSum([(2, Constant(3, "a", log="said")), (-1, Constant(1, "a")), (.5, "brightness")])
    images, prompts, metadata = args(pictures())
    rewards, extras = compute_rewards(total, images, prompts, metadata)
    torch.testing.assert_close(rewards, 6 - 1 + .5 * images.mean((1, 2, 3)))
    assert list(extras) == ["a#1", "a#1/said", "a#2", "brightness"] and extras["a#1/said"] == prompts
    assert total.name == "2*a - 1*a + 0.5*brightness" and all(len(v) == 4 for v in extras.values())
    inner, _ = compute_rewards(WeightedSum({total: 2}), images, prompts, metadata)
    torch.testing.assert_close(inner, 2 * rewards)


def test_weighted_sum_says_what_its_parts_are():
    class Reads(Constant): uses_prompt = True
    assert WeightedSum({"redness": 1, "brightness": 2}).differentiable and not WeightedSum({"redness": 1, jpeg_compressibility: 1}).differentiable
    assert WeightedSum({"redness": 1, Reads(): 1}).uses_prompt and not WeightedSum({"redness": 1}).uses_prompt
    parts = [Constant(), Constant()]
    total = WeightedSum([(1, parts[0]), (1, plain), (1, WeightedSum([(1, parts[1])]))])
    assert total.to("meta") is total and [p.device for p in parts] == ["meta", "meta"] and Reward().to("meta").name == "reward"


def test_weighted_sum_has_the_gradient_of_its_parts():
    x = pictures().requires_grad_()
    grad = lambda r: torch.autograd.grad(compute_rewards(r, *args(x))[0].sum(), x)[0]
    a, b = get_reward("colorfulness"), get_reward("jpeg_compressibility_estimate")
    torch.testing.assert_close(grad(get_reward("3*colorfulness - jpeg_compressibility_estimate")), 3 * grad(a) - grad(b))


def test_weighted_sum_names_the_part_that_fails():
    def broken(images, prompts, metadata): return 1 / 0
    with pytest.raises(RuntimeError, match=r"'redness \+ 2\*broken' failed .* reward 'broken' failed .*ZeroDivisionError"):
        compute_rewards(WeightedSum([(1, "redness"), (2, broken)]), *args(pictures()))
    for parts in ({}, [], {"redness": "1"}, {"redness": float("nan")}, {"redness": float("inf")}, {"rednes": 1}, [(1, 3)]):
        with pytest.raises(ValueError, match="WeightedSum|get_reward"): WeightedSum(parts)


@pytest.mark.parametrize("extras, ok", [({"a": torch.ones(4)}, True), ({"a": list("abcd")}, True), ({"a": 1., "b": "text", "c": torch.tensor(2.)}, True), ({"a": np.ones((4, 2))}, True),
                                        ({"a": torch.ones(3)}, False), ({"a": [1]}, False), ({"a": ()}, False), ({"a": np.ones((2, 4))}, False)], ids=str)
def test_extras_are_one_a_picture_or_one_for_all(extras, ok):
    call = lambda: compute_rewards(lambda i, p, m: ([0.] * 4, extras), *args(pictures()))
    if ok: assert call()[1] is extras
    else:
        with pytest.raises(ValueError, match="reward '<lambda>' returned . extras 'a' on 4 pictures"): call()


# ---------------------------------------------------------------- workers

class Counts(Reward):
    "Says in which process it is and how often it was made there; sleeps as long as the first prompt says."
    made = 0
    name = "counts"
    def __init__(self): type(self).made += 1
    def __reduce__(self): return Counts, ()
    def __call__(self, images, prompts, metadata):
        time.sleep(float(prompts[0]))
        return images.mean((1, 2, 3)), {"pid": os.getpid(), "made": Counts.made, "images": images * 2}


def one(value, seconds=0.): return torch.full((1, 3, 4, 4), value), [str(seconds)], [{}]


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_workers_keep_the_order_and_raise(kind):
    with RewardWorkers(f"{__name__}:Counts", 2, kind) as workers:
        futures = [workers.submit(*one(v, s)) for v, s in ((.1, .3), (.2, 0), (2., 0), (.4, 0), (.5, "x"), (.6, 0))]
        assert [round(f.result()[0].item(), 4) for f in (futures[0], futures[1], futures[3], futures[5])] == [.1, .2, .4, .6]
        with pytest.raises(ValueError, match="images lie in 2"): futures[2].result()
        with pytest.raises(RuntimeError, match="'counts' failed .*ValueError"): futures[4].result()
        assert torch.equal(futures[1].result()[1]["images"], one(.2)[0] * 2)
    assert all(f.done() for f in futures)


def test_processes_are_others_and_load_once():
    for reward in (f"{__name__}:Counts", Counts()):
        with RewardWorkers(reward, 1, "process") as workers:
            extras = [workers.submit(*one(.5)).result()[1] for _ in range(3)]
        assert {e["pid"] for e in extras} != {os.getpid()} and len({e["pid"] for e in extras}) == 1
        assert {e["made"] for e in extras} == {1}


def test_threads_work_at_the_same_time_and_carry_gradients():
    barrier = threading.Barrier(3, timeout=20)
    def meet(images, prompts, metadata):
        barrier.wait()
        return images.mean((1, 2, 3))
    x = pictures().requires_grad_()
    with RewardWorkers(meet, 3) as workers:
        futures = [workers.submit(*args(x)) for _ in range(3)]
    torch.autograd.grad(sum(f.result()[0].sum() for f in futures), x)


def test_leaving_by_an_exception_cancels_what_has_not_begun():
    futures = []
    with pytest.raises(KeyError):
        with RewardWorkers(Counts(), 1) as workers:
            futures = [workers.submit(*one(.5, .2)) for _ in range(5)]
            while not futures[0].running() and not futures[0].done(): time.sleep(.01)
            raise KeyError("stop")
    assert futures[0].result() and all(f.cancelled() for f in futures[2:])
    with pytest.raises(CancelledError): futures[-1].result()
    with pytest.raises(RuntimeError): workers.submit(*one(.5))


def test_threads_take_the_callers_grad_mode():
    weight = torch.ones(3, requires_grad=True)
    def mine(images, prompts, metadata): return (images.mean((2, 3))*weight).sum(1)
    with RewardWorkers(mine, 1) as workers:
        a = workers.submit(*args(pictures()))
        with torch.no_grad(): b = workers.submit(*args(pictures()))
    assert a.result()[0].requires_grad and not b.result()[0].requires_grad


def test_what_workers_refuse():
    for given in (dict(kind="fork"), dict(kind=None), dict(n_workers=0), dict(n_workers=1.5), dict(n_workers=None)):
        with pytest.raises(ValueError, match="RewardWorkers"): RewardWorkers("redness", **given)
    with pytest.raises(ValueError, match="did you mean redness"): RewardWorkers("rednes", kind="process")
    with pytest.raises(ValueError, match="kind='thread'"): RewardWorkers(lambda i, p, m: [0.] * len(i), kind="process")
    with RewardWorkers("redness", 1, "process") as workers:
        with pytest.raises(ValueError, match="gradient"): workers.submit(*args(pictures().requires_grad_()))


def test_a_slice_is_sent_without_its_batch():
    from ddpo_scratch.rewards import _ByValue
    whole, sent = pictures(64), []
    workers = RewardWorkers("redness", 1, "process")
    workers._pool.shutdown()
    workers._pool = type("Pool", (), {"submit": lambda self, fn, *given: sent.append(given)})()
    workers.submit(*args(whole[:1]))
    assert isinstance(sent[0][0], _ByValue) and len(pickle.dumps(sent[0][0])) < 2 * whole[0].nbytes


@pytest.mark.parametrize("name", [*HERE, "target_color('teal')", "redness - 2*target_color('teal')"])
def test_rewards_of_this_room_can_be_pickled(name):
    reward = get_reward(name)
    assert torch.equal(compute_rewards(pickle.loads(pickle.dumps(reward)), *args(pictures()))[0], compute_rewards(reward, *args(pictures()))[0])


def built(value): return Constant(value[1])


def test_literal_arguments_keep_their_colons():
    assert compute_rewards(get_reward(f"2*{__name__}:built({{1:2}})"), *args(pictures()))[0].tolist() == [4.]*4


def test_colours_of_a_grey_picture_in_half_precision_have_a_gradient():
    images = torch.full((1, 3, 8, 8), .5, dtype=torch.float16, requires_grad=True)
    get_reward("colorfulness")(images, [""], [{}]).sum().backward()
    assert images.grad.isfinite().all()
