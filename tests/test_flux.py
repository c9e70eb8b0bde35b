"""FLUX.1 and FLUX.2 klein behind the protocol: the same as diffusers, latent by latent.

Small random models of each class. Largest differences seen in float32, over the latents of every
step and the pictures: 2e-6, where the largest latent is 5.
"""

import functools

import diffusers
import pytest
import torch
import transformers
from flow_models import (
    RUN,
    PROMPTS,
    flux_configs,
    folder,
    inputs,
    klein_configs,
    shake,
    streams,
    watched,
)
from runs import small, whole_and_resumed

from ddpo_scratch.flow import ODE, FlowPath
from ddpo_scratch.models import base, flux
from ddpo_scratch.models.lora import load_lora
from ddpo_scratch.rollout import sample
from ddpo_scratch.train import fit

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()

TOLERANCE = 1e-5
NAMES = ["flux_dev", "flux_schnell", "klein_base", "klein"]
each = pytest.mark.parametrize("name", NAMES)
W = 3.5


def fresh(name, guidance=W, size=(32, 32), **options):
    "Load a model of one's own."
    denoiser = base.load(folder(name), guidance, height=size[0], width=size[1], **options)
    assert type(denoiser) is (flux.Flux2Klein if "klein" in name else flux.Flux)
    return denoiser


@functools.cache
def kept(name):
    "Load a model once, for tests that change no weight."
    return fresh(name)


def shared(name, guidance=W, size=(32, 32)):
    "Set up the model that tests share."
    denoiser = kept(name)
    denoiser.guidance_scale = guidance
    return denoiser.resize(*size)


def packed(denoiser, x):
    "Lay the latents of all steps out as the pipeline does."
    pack = flux.pack if type(denoiser) is flux.Flux else (lambda x: x.flatten(2).transpose(1, 2))
    return pack(x.flatten(0, 1)).unflatten(0, x.shape[:2])


# ---- the same as diffusers


@each
@pytest.mark.parametrize(
    "size,steps,guidance",
    [((32, 32), 1, 1.0), ((32, 64), 4, 3.5), ((64, 64), 7, 3.5), ((48, 32), 10, 1.0)],
)
def test_the_ode_equals_the_diffusers_pipeline_step_by_step(name, size, steps, guidance):
    "From the same random streams: each latent on the way, and the pictures"
    denoiser = shared(name, guidance, size)
    theirs, pictures = watched(denoiser.pipe, steps, *size, guidance_scale=guidance)
    with torch.no_grad():
        ours = sample(denoiser, denoiser.encode(PROMPTS), steps, ODE(), streams())
        pixel = (pictures - denoiser.decode(ours.x0)).abs().max()
    error = (theirs - packed(denoiser, ours.xs[:, 1:])).abs().max()
    times = denoiser.pipe.scheduler.sigmas
    print(f"{name}, {size}, {steps} steps, guidance {guidance:g}: {error:.1e}, pixels {pixel:.1e}")
    assert torch.equal(ours.timesteps.float(), times)
    assert error < TOLERANCE and pixel < TOLERANCE


@pytest.mark.parametrize("name", ["flux_dev", "klein"])
def test_another_shift_would_be_noticed(name):
    "The published one follows the size of the picture; a fixed one, or another size's, does not"
    denoiser = shared(name)
    theirs, _ = watched(denoiser.pipe, 4, 32, 32, guidance_scale=W)
    pipe, shape = denoiser.pipe, denoiser.shape_of(denoiser.pipe)
    for other in (FlowPath(shift=3.0), denoiser.path_of(pipe, shape)):
        denoiser.path = other
        ours = sample(denoiser, denoiser.encode(PROMPTS), 4, ODE(), streams())
        error = (theirs - packed(denoiser, ours.xs[:, 1:])).abs().max()
        assert error > 100 * TOLERANCE


# ---- conditioning and guidance


@each
def test_guidance_is_what_the_model_means_by_it(name):
    "An input of dev, nothing to schnell and the distilled klein, two halves of klein's base"
    denoiser, rows = shared(name), []
    hook = denoiser.network.register_forward_pre_hook(
        lambda module, args, given: rows.append(len(given["hidden_states"])), with_kwargs=True
    )
    x, t, c = inputs(denoiser)
    with torch.no_grad():
        weak, strong, off = [], [], []
        for answers, denoiser.guidance_scale in ((weak, 3.0), (strong, 6.0), (off, 1.0)):
            answers.append(denoiser(x, t, c))
    hook.remove()
    assert rows == ([4, 4, 2] if name == "klein_base" else [2, 2, 2])
    listens = name in ("flux_dev", "klein_base")
    assert bool((weak[0] - strong[0]).abs().max() > 1e-4) == listens
    if name == "klein_base":
        uncond = off[0] - (weak[0] - off[0]) / 2
        torch.testing.assert_close(strong[0], uncond + 6 * (off[0] - uncond), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell", "klein"])
def test_a_negative_prompt_that_is_not_read_is_said(name):
    with pytest.warns(UserWarning, match="negative prompt is not read"):
        base.load(folder(name), W, "blurred")


def test_t5_reads_more_of_a_prompt_than_clip():
    denoiser = shared("flux_dev")
    long = "a red fox " * 30
    c = denoiser.encode([long, long + "in snow"])
    assert not torch.equal(c.cond[0], c.cond[1])
    with pytest.warns(UserWarning, match="reads 512 tokens"):
        denoiser.encode(["fox " * 200])


def test_sizes_that_do_not_fit_are_refused_with_those_that_do():
    denoiser = shared("flux_dev")
    with pytest.raises(ValueError, match="multiple of 4, such as 28 or 32"):
        denoiser.resize(30, 32)
    denoiser.resize(32, 64)
    assert denoiser.latent_shape == (4, 16, 32) and denoiser.path.n_tokens == 128
    klein = shared("klein", size=(32, 64))
    assert klein.latent_shape == (16, 8, 16) and klein.path.n_tokens == 128


# ---- precision


@pytest.mark.parametrize("name", ["flux_dev", "klein_base"])
def test_memory_is_saved_without_changing_a_number(name):
    "Activations computed again, pictures decoded one by one: the same gradient and pictures"
    results = []
    for options in ({}, dict(gradient_checkpointing=True, slicing=True, decode_batch_size=1)):
        denoiser = fresh(name)
        params = denoiser.trainable(2, 2)
        shake(params)
        denoiser.configure(**options)
        assert denoiser.bare.is_gradient_checkpointing == bool(options)
        x, t, c = inputs(denoiser)
        x0 = x - t.view(-1, 1, 1, 1) * denoiser(x, t, c)
        pictures = denoiser.decode(x0)
        pictures.square().mean().backward()
        assert all(p.grad.any() for p in params)
        results.append((pictures.detach(), *(p.grad for p in params)))
    for plain, saving in zip(*results, strict=True):
        torch.testing.assert_close(saving, plain, atol=1e-6, rtol=1e-4)


# ---- what is trained


@pytest.mark.parametrize(
    "name,targets", [("flux_dev", "attention"), ("flux_dev", "all"), ("klein_base", "all")]
)
def test_a_lora_loads_in_plain_diffusers_and_here(name, targets, tmp_path):
    denoiser = fresh(name)
    shake(denoiser.trainable(2, 3, targets))
    x, t, c = inputs(denoiser)
    denoiser.save(tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(folder(name))
    plain.load_lora_weights(tmp_path)
    here = fresh(name)
    load_lora(here.pipe, tmp_path)
    going_on = fresh(name)
    going_on.trainable(2, 3, targets, start_from=str(tmp_path))
    with torch.no_grad():
        ours = denoiser(x, t, c)
        for again in (type(denoiser)(plain, W), here, going_on):
            again.resize(32, 32)
            torch.testing.assert_close(again(x, t, c), ours, atol=1e-6, rtol=1e-5)
        with denoiser.reference():
            assert (denoiser(x, t, c) - ours).abs().max() > 1e-3


@each
def test_the_targets_are_layers_of_the_published_model(name):
    "Every name of the table finds layers, and all of attention's are among all"
    denoiser = shared(name)
    linear = [
        layer
        for layer, module in denoiser.network.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]

    def found(targets):
        ends = tuple(f".{name}" for name in targets)
        return {layer for layer in linear if f".{layer}".endswith(ends)}

    table = denoiser.lora_targets
    assert found(table["attention"]) < found(table["all"])
    for target in table["attention"] + table["all"]:
        # of klein's single blocks the published list numbers 24, and this one has 1
        assert found([target]) or target.startswith("single_transformer_blocks"), target


def test_the_whole_network_is_saved_as_plain_diffusers_reads_it(tmp_path):
    denoiser = fresh("flux_schnell")
    shake(denoiser.trainable())
    place = denoiser.save(tmp_path)
    again = base.load(str(place), W, height=32, width=32)
    x, t, c = inputs(denoiser)
    with torch.no_grad():
        assert torch.equal(again(x, t, c), denoiser(x, t, c))
    assert type(diffusers.DiffusionPipeline.from_pretrained(place)) is diffusers.FluxPipeline


METHODS = {
    "flow_grpo": dict(method="flow_grpo"),
    "guidance, bf16": dict(
        method="flow_grpo(rule='cps', drop_last=True)",
        mixed_precision="bf16",
        rollout_dtype="bf16",
        sample_guidance_scale=3.5,
    ),
    "nft": dict(method="nft"),
    "awm": dict(method="awm", kl_weight=0.1),
    "drtune": dict(method="drtune(early=0)", reward_fn="brightness"),
    "klein": dict(model="klein_base", method="flow_grpo", sample_guidance_scale=3.0),
    "klein, awm": dict(model="klein", method="awm"),
    "schnell": dict(model="flux_schnell", method="nft"),
}
PICTURE = dict(height=32, width=32)


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_a_run_of_two_epochs_goes_on_from_a_checkpoint(tmp_path, fields):
    fields = RUN | PICTURE | dict(model="flux_dev") | fields
    fields["model"] = folder(fields["model"])
    whole, resumed = whole_and_resumed(tmp_path, **fields)
    moved = any(p.any() for p in resumed.params[1::2])  # the LoRA's second matrices begin at zero
    assert moved and all(p.isfinite().all() for p in resumed.params)


def test_klein_trains_and_its_report_is_written(tmp_path):
    fields = RUN | PICTURE | dict(model=folder("klein_base"), eval_num_images=2, eval_num_steps=2)
    state = fit(small(tmp_path, run_name="a", method="flow_grpo", **fields))
    assert (tmp_path / "a" / "pytorch_lora_weights.safetensors").is_file(), state


# ---- how large it is


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_sizes_of_flux_are_those_of_its_published_configs(name):
    counted = flux.Flux.counted_sizes(flux_configs(name == "dev"))
    assert flux.Flux.known[f"black-forest-labs/FLUX.1-{name}"] == counted


@pytest.mark.parametrize("size", ["4B", "9B"])
def test_sizes_of_klein_are_those_of_its_published_configs(size):
    "Of the distilled models a prediction costs one row, whatever the guidance"
    counted, known = flux.Flux2Klein.counted_sizes(klein_configs(size == "9B")), base.sizes
    assert known(f"black-forest-labs/FLUX.2-klein-base-{size}") == counted
    assert known(f"black-forest-labs/FLUX.2-klein-{size}") == counted | dict(halves=1)


@each
def test_sizes_of_a_folder_are_those_of_the_model_in_it(name):
    denoiser, sizes = shared(name), base.sizes(folder(name))
    for part, key in (("transformer", "network"), ("vae", "vae")):
        n_weights = sum(p.numel() for p in getattr(denoiser.pipe, part).parameters())
        assert sizes[key] == n_weights
    denoiser.resize()
    channels, *sides = denoiser.latent_shape
    assert (sizes["channels"], sizes["latent"]) == (channels, tuple(sides))
    assert sizes["factor"] == denoiser.factor
    c = denoiser.encode(PROMPTS).cond
    assert (sizes["tokens"], sizes["width"]) == c.shape[1:]


def test_models_that_fill_in_are_refused():
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("flux_dev"))
    pipe.transformer.register_to_config(in_channels=32)
    with pytest.raises(ValueError, match="32 numbers a token.*made for filling in or editing"):
        flux.Flux(pipe)


def test_t5_in_half_precision_keeps_the_layers_that_overflow():
    "As transformers has it: T5's `wo` in float32, all else and what it says in float16."
    denoiser = base.load(folder("flux_dev"), dtype=torch.float16)
    t5 = denoiser.pipe.text_encoder_2
    dtypes = {name.endswith("wo.weight"): p.dtype for name, p in t5.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.float16}
    assert denoiser.encode(["a fox"]).cond.dtype == torch.float16
