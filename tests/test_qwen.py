"""Qwen-Image behind the protocol: the same as diffusers, latent by latent.

A small random model. Largest difference seen in float32, over the latents of every step and the
pictures: 1e-6, where the largest latent is 5; diffusers pads prompts to another length.
"""

import diffusers
import pytest
import torch
import transformers
from flow_models import PROMPTS, RUN, folder, inputs, qwen_configs, shake, streams, watched
from runs import whole_and_resumed

from ddpo_scratch.flow import ODE
from ddpo_scratch.models import base, flux, qwen
from ddpo_scratch.models.lora import load_lora
from ddpo_scratch.rollout import sample

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()

TOLERANCE = 1e-5
W = 4.0


def fresh(guidance=W, negative=" ", size=(32, 32), **options):
    "Load a model of one's own."
    options |= dict(height=size[0], width=size[1])
    denoiser = base.load(folder("qwen"), guidance, negative, **options)
    assert type(denoiser) is qwen.QwenImage
    return denoiser


# ---- the same as diffusers


@pytest.mark.parametrize("negative", ["", " ", "a cat that is blurred"])
@pytest.mark.parametrize(
    "size,steps,guidance", [((32, 32), 2, 1.0), ((32, 64), 4, 4.0), ((64, 48), 7, 1.5)]
)
def test_the_ode_equals_the_diffusers_pipeline_step_by_step(size, steps, guidance, negative):
    "From the same random streams: each latent on the way, and the pictures"
    denoiser = fresh(guidance, negative, size)
    options = dict(true_cfg_scale=guidance)
    if guidance != 1:
        options |= dict(negative_prompt=[negative] * 2)
    theirs, pictures = watched(denoiser.pipe, steps, *size, **options)
    with torch.no_grad():
        ours = sample(denoiser, denoiser.encode(PROMPTS), steps, ODE(), streams())
        pixel = (pictures - denoiser.decode(ours.x0)).abs().max()
    xs = flux.pack(ours.xs[:, 1:].flatten(0, 1)).unflatten(0, (2, steps))
    error = (theirs - xs).abs().max()
    print(f"{size}, {steps} steps, guidance {guidance:g}: {error:.1e}, pixels {pixel:.1e}")
    assert torch.equal(ours.timesteps.float(), denoiser.pipe.scheduler.sigmas)
    assert error < TOLERANCE and pixel < TOLERANCE


def test_guidance_that_does_not_keep_its_length_would_be_noticed():
    denoiser = fresh()
    options = dict(true_cfg_scale=W, negative_prompt=[" "] * 2)
    theirs, _ = watched(denoiser.pipe, 4, 32, 32, **options)
    denoiser.guide = lambda uncond, cond: uncond + W * (cond - uncond)
    ours = sample(denoiser, denoiser.encode(PROMPTS), 4, ODE(), streams())
    assert (theirs[:, -1] - flux.pack(ours.x0)).abs().max() > 100 * TOLERANCE


def test_one_step_is_refused_since_its_grid_cannot_be_stretched():
    with pytest.raises(ValueError, match="use 2 or more"):
        fresh().path.grid(1)
    assert fresh().path.grid(2)[1] == pytest.approx(0.02)


# ---- prompts


def test_prompts_are_read_as_the_pipeline_reads_them():
    "In the template, without its beginning; padded to one length, whatever their company"
    denoiser = fresh()
    c = denoiser.encode(PROMPTS)
    theirs, mask = denoiser.pipe.encode_prompt(PROMPTS)
    n = theirs.shape[1]
    assert torch.equal(c.mask[:, :n], mask.bool()) and not c.mask[:, n:].any()
    torch.testing.assert_close(c.cond[:, :n][c.mask[:, :n]], theirs[mask.bool()], atol=1e-5, rtol=0)
    assert c.cond.shape[1] == denoiser.n_text and not c.cond[~c.mask].any()
    alone = type(c).cat([denoiser.encode([prompt]) for prompt in PROMPTS])
    assert all(torch.equal(a, b) for a, b in zip(vars(alone).values(), vars(c).values()))


def test_a_prompt_that_is_too_long_is_said():
    denoiser = fresh()
    n = denoiser.reader[1]
    denoiser.encode(["1" * n])
    with pytest.warns(UserWarning, match=f"reads {n} tokens"):
        c = denoiser.encode(["1" * (n + 10)])
    assert c.mask.all() and c.cond.shape[1] == denoiser.n_text


# ---- what is trained


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_lora_loads_in_plain_diffusers_and_here(targets, tmp_path):
    denoiser = fresh()
    shake(denoiser.trainable(2, 3, targets))
    x, t, c = inputs(denoiser)
    denoiser.save(tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(folder("qwen"))
    plain.load_lora_weights(tmp_path)
    here = fresh()
    load_lora(here.pipe, tmp_path)
    going_on = fresh()
    going_on.trainable(2, 3, targets, start_from=str(tmp_path))
    with torch.no_grad():
        ours = denoiser(x, t, c)
        for again in (qwen.QwenImage(plain, W, " "), here, going_on):
            again.resize(32, 32)
            torch.testing.assert_close(again(x, t, c), ours, atol=1e-6, rtol=1e-5)
        with denoiser.reference():
            assert (denoiser(x, t, c) - ours).abs().max() > 1e-3


def test_the_whole_network_is_saved_as_plain_diffusers_reads_it(tmp_path):
    denoiser = fresh()
    shake(denoiser.trainable())
    place = denoiser.save(tmp_path)
    again = base.load(str(place), W, " ", height=32, width=32)
    x, t, c = inputs(denoiser)
    with torch.no_grad():
        assert torch.equal(again(x, t, c), denoiser(x, t, c))
    assert type(diffusers.DiffusionPipeline.from_pretrained(place)) is diffusers.QwenImagePipeline


METHODS = {
    "flow_grpo": dict(method="flow_grpo", sample_guidance_scale=W, negative_prompts=" "),
    "nft": dict(method="nft"),
    "awm": dict(method="awm", kl_weight=0.1, mixed_precision="bf16", rollout_dtype="bf16"),
    "drtune": dict(method="drtune(early=0)", reward_fn="brightness"),
    "draft_lv": dict(method="draft_lv", reward_fn="brightness"),
}
PICTURE = dict(height=32, width=32)


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_a_run_of_two_epochs_goes_on_from_a_checkpoint(tmp_path, fields):
    fields = RUN | PICTURE | dict(model=folder("qwen")) | fields
    whole, resumed = whole_and_resumed(tmp_path, **fields)
    moved = any(p.any() for p in resumed.params[1::2])  # the LoRA's second matrices begin at zero
    assert moved and all(p.isfinite().all() for p in resumed.params)


def test_editors_are_refused():
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("qwen"))
    pipe.transformer.register_to_config(in_channels=32)
    with pytest.raises(ValueError, match="made for filling in or editing"):
        qwen.QwenImage(pipe)


def test_sizes_are_those_of_the_published_configs_and_of_a_folder():
    counted = qwen.QwenImage.counted_sizes(qwen_configs())
    assert base.sizes("Qwen/Qwen-Image") == counted
    denoiser, sizes = fresh(size=(0, 0)), base.sizes(folder("qwen"))
    assert sizes["network"] == sum(p.numel() for p in denoiser.network.parameters())
    assert (sizes["channels"], *sizes["latent"]) == denoiser.latent_shape
    assert sizes["factor"] == denoiser.factor
    assert (sizes["tokens"], sizes["width"]) == denoiser.encode(PROMPTS).cond.shape[1:]


def test_the_end_that_is_not_read_is_named_whole():
    "This tokenizer adds no end mark: what was lost was off by one at both ends."
    denoiser = base.load(folder("qwen"))
    tokenizer, n = denoiser.reader
    words = "abcdefghijklmnopqrstuvwxyz" * 20
    while len(tokenizer(words).input_ids) > n + 1:
        words = words[:-1]
    with pytest.warns(UserWarning, match=f"the end '{words[-1]}' is not read"):
        denoiser.encode([words])
