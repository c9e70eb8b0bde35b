"The table of families in 63: what it says in words holds for small random models of each class."

import functools
import tempfile
from pathlib import Path

import pytest
import torch

import flow_models
import sd_models
from ddpo_scratch.diffusion import Schedule
from ddpo_scratch.flow import CPS, FlowPath, FlowSDE
from ddpo_scratch.models.base import families, load
from ddpo_scratch.rollout import replay_log_prob, sample

_PLACE = tempfile.TemporaryDirectory()
FLOWS = ["sd35_medium", "flux_dev", "klein_base", "klein", "qwen"]
TWO_HALVES = ["sd21", "sdxl", "sd3", "sd35_medium", "sd35_large", "klein_base", "qwen"]


def fresh(name, guidance_scale=3.0, **options):
    "Load a small model of one's own, with guidance."
    if name in flow_models.BUILDERS:
        folder = flow_models.folder(name)
    else:
        folder = Path(_PLACE.name) / name
        if not folder.exists():
            sd_models.build(name, folder)
    return load(str(folder), guidance_scale, **options)


@functools.cache
def model(name, guidance_scale=3.0):
    "Load a small model once, for tests that change no weight."
    return fresh(name, guidance_scale)


def inputs(denoiser):
    "Draw noisy latents for two prompts, and times as the path counts them."
    x, t, c = flow_models.inputs(denoiser)
    return x, torch.tensor([801, 201]) if isinstance(denoiser.path, Schedule) else t, c


def rows_of(denoiser):
    "Count the rows that the network answers for two samples."
    x, t, c = inputs(denoiser)
    seen = []

    def count(module, arguments, keywords):
        seen.append(len(arguments[0] if arguments else keywords["hidden_states"]))

    handle = denoiser.network.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        denoiser(x, t, c)
    handle.remove()
    return sum(seen) // len(x)


def test_the_table_lists_every_family():
    assert {family.__name__ for family in families().values()} == {
        "StableDiffusion",
        "StableDiffusionXL",
        "StableDiffusion3",
        "Flux",
        "Flux2Klein",
        "QwenImage",
    }


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_diffusion_models_say_noise(name):
    path = model(name).path
    assert isinstance(path, Schedule) and path.prediction_type == "epsilon"
    assert rows_of(model(name)) == 2


@pytest.mark.parametrize("name", FLOWS)
def test_flow_models_say_velocity(name):
    "x0 and noise follow from the prediction as on a straight line."
    path = model(name).path
    assert isinstance(path, FlowPath)
    x0, eps, t = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([0.7, 0.2])
    x_t = path.add_noise(x0, eps, t)
    for found, wanted in zip(path.x0_eps(x_t, eps - x0, t), (x0, eps)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name,rows", [("sd35_medium", 2), ("flux_dev", 1), ("klein_base", 2), ("klein", 1), ("qwen", 2)]
)
def test_rows_of_a_guided_prediction(name, rows):
    assert rows_of(model(name)) == rows
    # the dry run counts on it; a folder's configs do not say that klein was distilled
    sizes = type(model(name)).sizes(flow_models.folder(name))
    assert sizes.get("halves", 2) == (2 if name == "klein" else rows)


@pytest.mark.parametrize("name", ["sd35_medium", "flux_dev", "klein_base", "qwen"])
def test_guidance_changes_the_prediction(name):
    "As a difference of two answers or as an input, it is not ignored."
    x, t, c = inputs(model(name, 3.0))
    with torch.no_grad():
        weak, strong = model(name, 2.0)(x, t, c), model(name, 5.0)(x, t, c)
    assert (weak - strong).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*TWO_HALVES, "flux_dev", "flux_schnell", "klein"])
def test_one_sample_and_a_batch_agree(name):
    "Indexed, joined, and in another order"
    denoiser = model(name)
    x, t, c = inputs(denoiser)
    swapped_twice = type(c).cat([c[1], c[0]])[[1, 0]]
    with torch.no_grad():
        both = denoiser(x, t, c)
        alone = torch.cat([denoiser(x[i : i + 1], t[i : i + 1], c[i]) for i in range(2)])
        torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(denoiser(x, t, swapped_twice), both, atol=1e-6, rtol=1e-6)
        assert (denoiser(x, t, c[[1, 0]]) - both).abs().max() > 1e-4


@pytest.mark.parametrize("name", [name for name in TWO_HALVES if name != "qwen"])
def test_a_guided_prediction_lies_on_the_line_through_both_halves(name):
    "At guidance 1 half the work is left out; Qwen-Image's keeps its length instead"
    denoiser = model(name)
    x, t, c = inputs(denoiser)
    answers = {}
    with torch.no_grad():
        for scale in (3.0, 1.0, 0.0):
            denoiser.guidance_scale = scale
            answers[scale] = denoiser(x, t, c)
    denoiser.guidance_scale = 3.0
    line = answers[0.0] + 3 * (answers[1.0] - answers[0.0])
    torch.testing.assert_close(answers[3.0], line, atol=1e-5, rtol=1e-5)
    assert (answers[3.0] - answers[1.0]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [FlowSDE(), CPS()], ids=["sde", "cps"])
@pytest.mark.parametrize(
    "name,guidance",
    [*((name, 3.0) for name in TWO_HALVES if "sd2" not in name), ("flux_dev", 3.0), ("qwen", 1.0)],
)
def test_a_rollout_replays_with_ratio_one(name, guidance, dtype, rule):
    "Weights and stored latents of this precision; the gradient flows in the replay"
    side = 0 if name == "sdxl" else 32
    denoiser = fresh(name, guidance, dtype=dtype, height=side, width=side)
    flow_models.shake(denoiser.trainable(2, 2))
    streams, c = flow_models.streams(), denoiser.encode(flow_models.PROMPTS)
    rollout = sample(denoiser, c, 4, rule, streams, dtype)
    again = replay_log_prob(denoiser, rollout, rule)
    assert rollout.xs.dtype == dtype and rollout.log_probs.isfinite().all()
    assert again.requires_grad and torch.equal(again.detach(), rollout.log_probs)
    again.sum().backward()
    grads = [p.grad for p in denoiser.network.parameters() if p.requires_grad]
    # the last block of Qwen-Image also answers to the text, and nobody reads that
    assert any(g is None for g in grads) == (name == "qwen")
    assert all(g.isfinite().all() for g in grads if g is not None)


def test_only_flux_and_qwen_shift_by_the_pictures_size():
    for name, by_size in (("sd35_medium", False), ("flux_dev", True), ("qwen", True)):
        denoiser = model(name, 1.0)
        before = denoiser.path.grid(8)
        denoiser.resize(64, 64)
        small = denoiser.path.grid(8)
        denoiser.resize(128, 128)
        assert torch.equal(small, denoiser.path.grid(8)) != by_size, name
        denoiser.resize(0, 0)
        assert torch.equal(before, denoiser.path.grid(8))
