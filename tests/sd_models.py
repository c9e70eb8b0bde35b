"""Models of every class in the table of chapter 22, small and with random weights."""

import functools
import json
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers

from ddpo_scratch.models.sd import TINY

BETAS = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    trained_betas=None,
)
SCHEDULERS = {  # scheduler/scheduler_config.json of each model, as published
    "sd14": dict(_class_name="PNDMScheduler", **BETAS),
    "sd15": dict(_class_name="PNDMScheduler", clip_sample=False, **BETAS),
    "sd21_base": dict(
        _class_name="PNDMScheduler", clip_sample=False, prediction_type="epsilon", **BETAS
    ),
    "sd21": dict(
        _class_name="DDIMScheduler", clip_sample=False, prediction_type="v_prediction", **BETAS
    ),
    "sdxl": dict(
        _class_name="EulerDiscreteScheduler",
        clip_sample=False,
        prediction_type="epsilon",
        interpolation_type="linear",
        sample_max_value=1.0,
        timestep_spacing="leading",
        use_karras_sigmas=False,
        **BETAS,
    ),
}


def text_encoder(cls, tokenizer, hidden, **options):
    "Build a text encoder of three layers, unless told otherwise."
    sizes = dict(intermediate_size=32, projection_dim=16, num_hidden_layers=3)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        **sizes | options,
    )
    return cls(config)


def unet(name):
    "Build a U-Net of two levels with the attention of the model's class, or of one level."
    xl, two = name == "sdxl", name.startswith("sd2")
    options = dict(
        cross_attention_dim=48 if xl else 16,
        use_linear_projection=xl or two,
        attention_head_dim=(2, 4) if xl or two else 2,
    )
    if xl:
        options |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
            transformer_layers_per_block=(1, 2),
        )
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    if name == "one level":
        down, up = down[1:], up[1:]
        options |= dict(mid_block_type=None)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32)[: len(down)],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=down[::-1] if xl else down,
        up_block_types=up[::-1] if xl else up,
        **options,
    )


def vae(name):
    "Build an autoencoder of two levels."
    xl = name == "sdxl"
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.13025 if xl else 0.18215,
        force_upcast=xl,
    )


def build(name, folder):
    "Write a pipeline of the model's class, or 'one level': Stable Diffusion 1.5's, still smaller."
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    config = SCHEDULERS["sd15" if name == "one level" else name]
    parts = dict(
        unet=unet(name),
        vae=vae(name),
        tokenizer=tokenizer,
        scheduler=getattr(diffusers, config["_class_name"]).from_config(config),
        text_encoder=text_encoder(transformers.CLIPTextModel, tokenizer, 16),
    )
    if name == "sdxl":
        encoder_2 = text_encoder(transformers.CLIPTextModelWithProjection, tokenizer, 32)
        parts |= dict(tokenizer_2=tokenizer, text_encoder_2=encoder_2)
        pipe = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = diffusers.StableDiffusionPipeline(**parts)
    pipe.save_pretrained(folder)
    # diffusers adds its defaults to what it writes; the published file has none
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


_PLACE = tempfile.TemporaryDirectory()


@functools.cache
def folder(name):
    "Build a model once, in a folder that lasts as long as the tests."
    return str(build(name, Path(_PLACE.name) / name))
