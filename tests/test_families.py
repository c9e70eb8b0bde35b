"The table of families in 63: what it says in words holds for small random models of each class."

import functools
import tempfile
from pathlib import Path

import pytest
import torch

import flow_models
import sd_models
from ddpo_scratch.diffusion import Schedule
from ddpo_scratch.flow import FlowPath
from ddpo_scratch.models.base import families, load

_PLACE = tempfile.TemporaryDirectory()
FLOWS = ["sd35_medium", "flux_dev", "klein_base", "klein", "qwen"]


@functools.cache
def model(name, guidance_scale=3.0):
    "Load a small model with guidance."
    if name in flow_models.BUILDERS:
        folder = flow_models.folder(name)
    else:
        folder = Path(_PLACE.name) / name
        if not folder.exists():
            sd_models.build(name, folder)
    return load(str(folder), guidance_scale)


def rows_of(denoiser):
    "Count the rows that the network answers for two samples."
    x, t, c = flow_models.inputs(denoiser)
    if isinstance(denoiser.path, Schedule):
        t = torch.tensor([800, 300])
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
    x, t, c = flow_models.inputs(model(name, 3.0))
    with torch.no_grad():
        weak, strong = model(name, 2.0)(x, t, c), model(name, 5.0)(x, t, c)
    assert (weak - strong).abs().max() > 1e-4


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
