"""Each model of the table with its published scheduler config, small and with random weights: the same as diffusers, step by step.

Largest differences seen in float32, over the latents of every step and the pictures: 0 for the classes of SD 1.x and 2.x, 6e-7 for SDXL,
whose prompts diffusers encodes together and we one by one."""
import dataclasses
import json

import diffusers
import pytest
import torch
import transformers

from ddpo_scratch import sd
from ddpo_scratch.diffusion import Schedule
from ddpo_scratch.rollout import sample, step_log_prob

for library in (diffusers, transformers): library.utils.logging.disable_progress_bar()

BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True,
             steps_offset=1, trained_betas=None)
SCHEDULERS = {  # scheduler/scheduler_config.json of each model
    "sd14": dict(_class_name="PNDMScheduler", **BETAS),
    "sd15": dict(_class_name="PNDMScheduler", clip_sample=False, **BETAS),
    "sd21_base": dict(_class_name="PNDMScheduler", clip_sample=False, prediction_type="epsilon", **BETAS),
    "sd21": dict(_class_name="DDIMScheduler", clip_sample=False, prediction_type="v_prediction", **BETAS),
    "sdxl": dict(_class_name="EulerDiscreteScheduler", clip_sample=False, prediction_type="epsilon", interpolation_type="linear", sample_max_value=1.,
                 timestep_spacing="leading", use_karras_sigmas=False, **BETAS)}
PROMPTS, STEPS, W = ["a fox", "a lion on a blue background"], 5, 3.
TOLERANCE = 1e-5  # of the largest latent, and of a pixel


def text_encoder(cls, tokenizer, hidden):
    return cls(transformers.CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=32, projection_dim=16, num_hidden_layers=3,
                                           num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length))


def build(name, folder):
    "Write a pipeline of the model's class: its structure and scheduler, few channels, random weights."
    xl, two = name == "sdxl", name.startswith("sd2")
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(sd.TINY/"tokenizer")
    options = dict(cross_attention_dim=48 if xl else 16, use_linear_projection=xl or two, attention_head_dim=(2, 4) if xl or two else 2)
    if xl: options |= dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6*8,
                           transformer_layers_per_block=(1, 2))
    unet = diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
                                          down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if xl else ("CrossAttnDownBlock2D", "DownBlock2D"),
                                          up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if xl else ("UpBlock2D", "CrossAttnUpBlock2D"), **options)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",)*2, up_block_types=("UpDecoderBlock2D",)*2,
                                  latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=.13025 if xl else .18215, force_upcast=xl)
    config = SCHEDULERS[name]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    parts = dict(vae=vae, unet=unet, tokenizer=tokenizer, scheduler=scheduler, text_encoder=text_encoder(transformers.CLIPTextModel, tokenizer, 16))
    if xl: pipe = diffusers.StableDiffusionXLPipeline(tokenizer_2=tokenizer, text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection, tokenizer, 32), **parts)
    else: pipe = diffusers.StableDiffusionPipeline(safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts)
    pipe.save_pretrained(folder)
    (folder/"scheduler"/"scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}
    def get(name):
        if name not in made: made[name] = build(name, root/name)
        return made[name]
    return get


@pytest.fixture(scope="module")
def denoisers(folders):
    "One untouched denoiser of each model, for tests that only read"
    made = {}
    def get(name):
        if name not in made: made[name] = sd.denoiser_for(sd.load_pipeline(str(folders(name))), W)
        return made[name]
    return get


def streams(): return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]


def inputs(den, seed=0):
    x = torch.randn(2, *den.latent_shape, generator=torch.manual_seed(seed))
    return x, torch.tensor([801, 201]), den.encode(PROMPTS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("eta", [0., 1.])
def test_sampling_equals_the_diffusers_pipeline_step_by_step(denoisers, name, eta):
    "From the same random streams: each latent on the way, and the pictures; v-prediction and SDXL as they come"
    den, seen = denoisers(name), []
    pipe, theirs_scheduler = den.pipe, den.pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(theirs_scheduler.config, clip_sample=False)  # 1.4's config lacks the key, and DDIM would clip
    try:
        images = pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=W, eta=eta, generator=streams(), output_type="pt",
                      callback_on_step_end=lambda p, i, t, kw: seen.append((int(t), kw["latents"])) or kw).images
    finally: pipe.scheduler = theirs_scheduler
    ours = sample(den, den.encode(PROMPTS), STEPS, eta, streams())
    assert [t for t, _ in seen] == ours.timesteps[:-1].tolist() and ours.timesteps[0] == 801
    error = max((x - ours.xs[:, i + 1]).abs().max() for i, (_, x) in enumerate(seen))/ours.xs.abs().max()
    pixel = (images - den.decode(ours.x0)).abs().max()
    print(f"{name}, eta {eta:g}: latents {error:.1e} of the largest, pixels {pixel:.1e}")
    assert error < TOLERANCE and pixel < TOLERANCE


def test_v_prediction_read_as_noise_would_be_noticed(denoisers):
    den, right = denoisers("sd21"), denoisers("sd21").schedule
    a = sample(den, den.encode(PROMPTS), STEPS, 0., streams()).x0
    den.schedule = dataclasses.replace(right, prediction_type="epsilon")
    b, den.schedule = sample(den, den.encode(PROMPTS), STEPS, 0., streams()).x0, right
    assert (a - b).abs().max() > 1e3*TOLERANCE*a.abs().max()


@pytest.mark.parametrize("name,prediction", [("sd15", "epsilon"), ("sd21_base", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")])
def test_the_config_alone_says_what_is_predicted(denoisers, name, prediction):
    den = denoisers(name)
    assert type(den) is (sd.StableDiffusionXL if name == "sdxl" else sd.StableDiffusion)
    assert den.schedule.prediction_type == prediction and den.schedule.grid(50)[[0, -2, -1]].tolist() == [981, 1, -1]
    assert den.schedule.abar_final == float(den.schedule.abar[0])
    assert torch.equal(den.schedule.abar, Schedule.from_config(SCHEDULERS[name]).abar)


@pytest.mark.parametrize("negative", ["", "a cat"])
def test_negative_prompts_of_sdxl_are_those_of_its_pipeline(folders, negative):
    "An empty one is zeros, as where the pipeline is given none; any other is encoded"
    den = sd.denoiser_for(sd.load_pipeline(str(folders("sdxl"))), W, negative)
    theirs = den.pipe.encode_prompt(PROMPTS, device="cpu", negative_prompt=[negative]*2 if negative else None)
    c = den.encode(PROMPTS)
    for a, b in zip((c.cond, c.uncond, c.pooled, c.uncond_pooled), theirs): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert bool(c.uncond.any()) == bool(negative) and c.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]*2
    den.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert den.encode(PROMPTS).uncond.any()


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_one_sample_and_a_batch_agree(denoisers, name):
    "Indexed, joined, and at guidance 1, where half the work is left out"
    den = denoisers(name)
    x, t, c = inputs(den)
    with torch.no_grad():
        both = den(x, t, c)
        alone = torch.cat([den(x[i:i + 1], t[i:i + 1], c[i]) for i in range(2)])
        torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(den(x, t, type(c).cat([c[1], c[0]])[[1, 0]]), both, atol=1e-6, rtol=1e-6)
        den.guidance_scale = 1.
        cond = den(x, t, c)
        den.guidance_scale = 0.
        uncond = den(x, t, c)
        den.guidance_scale = W
    torch.testing.assert_close(both, uncond + W*(cond - uncond), atol=1e-5, rtol=1e-5)
    assert (both - cond).abs().max() > 1e-4


def test_sdxl_reads_its_pooled_embedding_and_its_size(denoisers):
    den = denoisers("sdxl")
    x, t, c = inputs(den)
    with torch.no_grad():
        before = den(x, t, c)
        for k in ("pooled", "time_ids"):
            other = type(c)(**{**vars(c), k: vars(c)[k] + 1})
            assert (den(x, t, other) - before).abs().max() > 1e-6, k


@pytest.mark.parametrize("name,targets", [("sd21", "attention"), ("sdxl", "all")])
def test_gradients_reach_the_lora_only_and_its_file_loads_in_plain_diffusers(folders, tmp_path, name, targets):
    den = sd.denoiser_for(sd.load_pipeline(str(folders(name))), W)
    params = sd.add_lora(den, 2, targets=targets)
    for p in params: p.data += .05*torch.randn(p.shape, generator=torch.manual_seed(1))
    x, t, c = inputs(den)
    step_log_prob(den, x, .9*x, t, t - 20, c, 1.).sum().backward()
    parts = {k: m for k, m in den.pipe.components.items() if isinstance(m, torch.nn.Module)}
    touched = {f"{k}.{n}" for k, m in parts.items() for n, p in m.named_parameters() if p.grad is not None}
    assert len(touched) == len(params) and all("lora" in n for n in touched) and all(p.grad.any() for p in params)
    sd.save_lora(den, tmp_path)
    plain = type(den.pipe).from_pretrained(folders(name))
    plain.load_lora_weights(tmp_path)
    again = sd.denoiser_for(plain, W)
    with torch.no_grad():
        ours = den(x, t, c)
        torch.testing.assert_close(again(x, t, again.encode(PROMPTS)), ours, atol=1e-5, rtol=1e-5)
        loaded = sd.denoiser_for(sd.load_lora(sd.load_pipeline(str(folders(name))), tmp_path), W)
        torch.testing.assert_close(loaded(x, t, c), ours, atol=1e-5, rtol=1e-5)
        with den.reference(): assert (den(x, t, c) - ours).abs().max() > 1e-4


@pytest.mark.parametrize("name,dtype,vae", [("sdxl", torch.float16, torch.float32), ("sdxl", torch.bfloat16, torch.float32),
                                            ("sdxl", torch.float64, torch.float64), ("sd15", torch.bfloat16, torch.bfloat16)])
def test_the_decoder_of_sdxl_stays_in_float32(folders, name, dtype, vae):
    pipe = sd.load_pipeline(str(folders(name)), dtype)
    assert (pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (dtype, dtype, vae)
    if dtype == torch.float64:
        den = sd.denoiser_for(pipe, W)
        x, t, c = inputs(den)
        with torch.no_grad(): assert den(x.double(), t, c).dtype == den.decode(x.double()).dtype == torch.float64
    if name == "sdxl":
        torch.nn.Module.to(pipe.vae, dtype)  # a pipeline loaded by others: float16 overflows, another dtype was somebody's choice
        assert sd.denoiser_for(pipe).pipe.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        pipe.vae.register_to_config(force_upcast=False)
        torch.nn.Module.to(pipe.vae, dtype)
        assert sd.denoiser_for(pipe).pipe.vae.dtype == dtype
    else: assert sd.load_pipeline(str(folders(name)), dtype, vae_dtype=torch.float32).vae.dtype == torch.float32


def test_sdxl_in_bfloat16_gives_its_prediction_and_float32_pictures(folders, denoisers):
    den, wide = sd.denoiser_for(sd.load_pipeline(str(folders("sdxl")), torch.bfloat16), W), denoisers("sdxl")
    x, t, c = inputs(den)
    with torch.no_grad():
        pred, pictures = den(x, t, c), den.decode(x)
        torch.testing.assert_close(pred.float(), wide(x, t, wide.encode(PROMPTS)), atol=.1, rtol=0)
        torch.testing.assert_close(pictures, wide.decode(x), atol=1e-5, rtol=0)
    assert pred.dtype == torch.bfloat16 and c.cond.dtype == c.pooled.dtype == torch.bfloat16 and c.time_ids.dtype == torch.float32


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_slices_change_memory_and_not_results(folders, denoisers, name):
    whole, sliced = denoisers(name), sd.denoiser_for(sd.load_pipeline(str(folders(name)), slicing=True), W)
    x, t, c = inputs(whole)
    assert sliced.pipe.vae.use_slicing and all("Sliced" in type(p).__name__ for p in sliced.unet.attn_processors.values())
    seen = []
    whole.pipe.vae.post_quant_conv.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    with torch.no_grad():
        torch.testing.assert_close(sliced(x, t, c), whole(x, t, c), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sliced.decode(x), whole.decode(x), atol=1e-5, rtol=0)
        x3 = torch.cat([x, x[:1]])
        for whole.decode_batch in (None, 2, 1): assert whole.decode(x3).shape == (3, 3, 16, 16)
    assert seen == ([1, 1] if name == "sdxl" else [2]) + [3, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_prompt_is_encoded_once_and_the_oldest_are_forgotten(folders, name):
    den, seen = sd.denoiser_for(sd.load_pipeline(str(folders(name))), W), []
    den.pipe.text_encoder.register_forward_pre_hook(lambda m, args: seen.append(1))
    first = den.encode(PROMPTS*2)
    assert len(seen) == 3 and len(first) == 4  # two prompts and the empty one
    den.encode(PROMPTS)
    assert len(seen) == 3
    den.n_remembered = 2
    for p in ("a", "b", "c"): den.embed(p)
    assert len(seen) == 6
    den.n_remembered = 1000
    again = den.encode(PROMPTS)
    assert len(seen) == 9  # only "b" and "c" were left
    assert torch.equal(again.cond, first.cond[:2])


def test_other_classes_are_told_so_before_their_weights_are_read(tmp_path):
    (tmp_path/"model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0"}))
    with pytest.raises(ValueError, match="is a FluxPipeline: expected one of StableDiffusionPipeline, StableDiffusionXLPipeline"): sd.load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match="no denoiser for a object"): sd.denoiser_for(object())


def test_a_unet_that_takes_the_guidance_scale_is_refused(folders):
    "One such as a latent consistency model would ignore w otherwise"
    pipe = sd.load_pipeline(str(folders("sd15")))
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="distilled"): sd.denoiser_for(pipe)
