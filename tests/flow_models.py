"""SD3, FLUX.1, FLUX.2 klein and Qwen-Image, small and random: no file is downloaded."""

import functools
import json
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from sd_models import text_encoder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ddpo_scratch.models.sd import TINY

DYNAMIC = dict(
    base_image_seq_len=256,
    base_shift=0.5,
    max_image_seq_len=4096,
    max_shift=1.15,
    num_train_timesteps=1000,
)
SCHEDULERS = {  # scheduler/scheduler_config.json of each model, as published
    "sd3": dict(num_train_timesteps=1000, shift=3.0),
    "sd35_medium": dict(num_train_timesteps=1000, shift=3.0),
    "sd35_large": dict(num_train_timesteps=1000, shift=3.0),
    "flux_dev": dict(shift=3.0, use_dynamic_shifting=True, **DYNAMIC),
    "flux_schnell": dict(shift=1.0, use_dynamic_shifting=False, **DYNAMIC),
    "klein": dict(shift=3.0, use_dynamic_shifting=True, time_shift_type="exponential", **DYNAMIC),
    "klein_base": dict(
        shift=3.0, use_dynamic_shifting=True, time_shift_type="exponential", **DYNAMIC
    ),
    "qwen": DYNAMIC
    | dict(
        max_image_seq_len=8192,
        max_shift=0.9,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    ),
}


def t5_tokenizer():
    "Spell prompts letter by letter, in the class that FLUX has for T5."
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    letters += [(chr(code), -2.0) for code in range(33, 127)]
    return transformers.T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=512)


def t5(tokenizer, width):
    "Build T5's encoder with one layer."
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_ff=16,
        d_kv=4,
        num_heads=2,
        num_layers=1,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def clip(tokenizer, width, cls=transformers.CLIPTextModel):
    "Build CLIP's text encoder with two layers."
    options = dict(intermediate_size=16, projection_dim=width, num_hidden_layers=2)
    options |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return text_encoder(cls, tokenizer, width, **options)


TEMPLATE = (  # of Qwen-Image's prompts, without its special tokens
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:",
    "\nuser\n",
    "\nassistant\n",
)
CHAT = (  # what FLUX.2 klein reads of Qwen3's template
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer():
    "Learn the template's words, a token each: its beginning is 34 tokens long, as published."
    pre_tokenizer = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=2000, min_frequency=1, show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=sorted(alphabet), **options)
    learner.train_from_iterator(TEMPLATE, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=learned["vocab"] | {"<|endoftext|>": len(learned["vocab"])},
        merges=[tuple(pair) for pair in learned["merges"]],
        model_max_length=131072,
        chat_template=CHAT,
    )
    marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


def qwen_vl(tokenizer, width):
    "Build Qwen2.5-VL with two layers, and the least that may see."
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling=dict(mrope_section=[1, 1, 2], rope_type="default", type="default"),
    )
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=width)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3(tokenizer, width):
    "Build Qwen3 with as many layers as FLUX.2 klein reads: it takes the 9th, 18th and 27th."
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=28,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=width,
    )
    return transformers.Qwen3ForCausalLM(config)


def autoencoder(cls, channels, **options):
    "Build an autoencoder of two levels: a latent is half as wide as its picture."
    return cls(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        **options,
    )


def transformer(cls, in_channels, text_width, **options):
    "Build a transformer of two heads of 8."
    return cls(
        in_channels=in_channels,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        **options,
    )


def scheduler(name):
    "Build the scheduler as its file says."
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULERS[name])


def sd3(name):
    "Build a Stable Diffusion 3: 3.5 norms queries, and its medium one has a second attention."
    letters, words = t5_tokenizer(), transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    network = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3 if name == "sd35_large" else 2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 8,
        pos_embed_max_size=32 if name == "sd35_medium" else 24,
        dual_attention_layers=(0,) if name == "sd35_medium" else (),
        qk_norm=None if name == "sd3" else "rms_norm",
    )
    vae = autoencoder(
        diffusers.AutoencoderKL,
        4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    projected = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        vae=vae,
        scheduler=scheduler(name),
        tokenizer=words,
        text_encoder=clip(words, 16, projected),
        tokenizer_2=words,
        text_encoder_2=clip(words, 8, projected),
        tokenizer_3=letters,
        text_encoder_3=t5(letters, 32),
    )


def flux(name):
    "Build a FLUX.1: dev is told the guidance, schnell is not."
    letters, words = t5_tokenizer(), transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    network = transformer(
        diffusers.FluxTransformer2DModel,
        16,
        24,
        num_layers=1,
        num_single_layers=1,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=name == "flux_dev",
    )
    vae = autoencoder(
        diffusers.AutoencoderKL,
        4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    return diffusers.FluxPipeline(
        transformer=network,
        vae=vae,
        scheduler=scheduler(name),
        tokenizer=words,
        text_encoder=clip(words, 16),
        tokenizer_2=letters,
        text_encoder_2=t5(letters, 24),
    )


def klein(name):
    "Build a FLUX.2 klein: the base model is guided, the distilled one is not."
    tokenizer = qwen_tokenizer()
    network = transformer(
        diffusers.Flux2Transformer2DModel,
        16,
        24,
        num_layers=1,
        num_single_layers=1,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = autoencoder(diffusers.AutoencoderKLFlux2, 4)
    # statistics of the latents, which training has left there
    vae.bn.running_mean.normal_(0, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    return diffusers.Flux2KleinPipeline(
        transformer=network,
        vae=vae,
        scheduler=scheduler(name),
        tokenizer=tokenizer,
        text_encoder=qwen3(tokenizer, 8),
        is_distilled=name == "klein",
    )


def qwen(name):
    "Build a Qwen-Image, whose autoencoder is one for films: a picture is a film of one frame."
    tokenizer = qwen_tokenizer()
    network = transformer(
        diffusers.QwenImageTransformer2DModel,
        16,
        16,
        out_channels=4,
        num_layers=2,
        axes_dims_rope=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
        latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    )
    return diffusers.QwenImagePipeline(
        transformer=network,
        vae=vae,
        scheduler=scheduler(name),
        tokenizer=tokenizer,
        text_encoder=qwen_vl(tokenizer, 16),
    )


SD3 = dict(sd3=sd3, sd35_medium=sd3, sd35_large=sd3)
BUILDERS = SD3 | dict(flux_dev=flux, flux_schnell=flux, klein=klein, klein_base=klein, qwen=qwen)


def build(name, folder):
    "Write a pipeline of the model's class: its structure and scheduler, few channels."
    torch.manual_seed(0)
    pipe = BUILDERS[name](name)
    # diffusers leaves some last layers at zero or nearly there: a random model says something
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    pipe.save_pretrained(folder)
    # diffusers adds its defaults to what it writes; the published file has none
    config = dict(_class_name="FlowMatchEulerDiscreteScheduler", **SCHEDULERS[name])
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


_PLACE = tempfile.TemporaryDirectory()


@functools.cache
def folder(name):
    "Build a model once, in a folder that lasts as long as the tests."
    return str(build(name, Path(_PLACE.name) / name))


# what the tests of every family ask

PROMPTS = ["a fox", "a lion on a blue background"]


def streams():
    "Open the random stream of each sample anew."
    return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]


def watched(pipe, steps, height, width, **options):
    "Let diffusers' own pipeline draw: the latents after each step, and the pictures."
    seen = []

    def watch(pipe, i, t, tensors):
        seen.append(tensors["latents"])
        return tensors

    options |= dict(num_inference_steps=steps, height=height, width=width, generator=streams())
    pictures = pipe(prompt=PROMPTS, output_type="pt", callback_on_step_end=watch, **options).images
    return torch.stack(seen, 1), pictures


def shake(params, seed=1, by=0.05):
    "Move parameters a little, as training would."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in params:
            p += by * torch.randn(p.shape, generator=generator)


def inputs(denoiser, seed=0):
    "Draw noisy latents for two prompts, and times in between."
    x = torch.randn(2, *denoiser.latent_shape, generator=torch.manual_seed(seed))
    return x, torch.tensor([0.8, 0.3]), denoiser.encode(PROMPTS)


# of runs that ask only whether nothing is forgotten
RUN = dict(
    sample_num_steps=3,
    sample_images_per_prompt=2,
    sample_batch_size=4,
    train_batch_size=2,
    train_micro_batch_size=4,
)

# what the published models are made of, as far as their sizes depend on it

_FLUX = ("diffusers", "FluxTransformer2DModel")
_KLEIN = ("diffusers", "Flux2Transformer2DModel")
_CLIP_L = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
)
_T5_XXL = dict(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)
_QWEN3_4B = dict(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
_QWEN3_8B = _QWEN3_4B | dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)
_QWEN_VL_7B = dict(
    text_config=dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    vision_config=dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584
    ),
    tie_word_embeddings=False,
)
_LEVELS = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
)
_HEADS = dict(attention_head_dim=128, num_attention_heads=24)


def flux_configs(guidance_embeds):
    "Describe FLUX.1 dev, or schnell without the embedding of guidance."
    network = dict(in_channels=64, num_layers=19, num_single_layers=38, joint_attention_dim=4096)
    network |= dict(guidance_embeds=guidance_embeds, pooled_projection_dim=768, **_HEADS)
    vae = dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **_LEVELS)
    return dict(
        transformer=(*_FLUX, network),
        vae=("diffusers", "AutoencoderKL", vae | dict(force_upcast=True)),
        text_encoder=("transformers", "CLIPTextModel", _CLIP_L),
        text_encoder_2=("transformers", "T5EncoderModel", _T5_XXL),
    )


def klein_configs(large):
    "Describe FLUX.2 klein with 4 or with 9 billion weights."
    network = dict(in_channels=128, num_layers=5, num_single_layers=20, joint_attention_dim=7680)
    network |= dict(guidance_embeds=False, **_HEADS)
    if large:
        network |= dict(num_layers=8, num_single_layers=24, joint_attention_dim=12288)
        network |= dict(num_attention_heads=32)
    vae = dict(latent_channels=32, **_LEVELS)
    text = _QWEN3_8B if large else _QWEN3_4B
    return dict(
        transformer=(*_KLEIN, network),
        vae=("diffusers", "AutoencoderKLFlux2", vae),
        text_encoder=("transformers", "Qwen3ForCausalLM", text),
    )


def qwen_configs():
    "Describe Qwen-Image."
    network = dict(in_channels=64, out_channels=16, num_layers=60, joint_attention_dim=3584)
    vae = dict(
        base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]
    )
    text = ("transformers", "Qwen2_5_VLForConditionalGeneration", _QWEN_VL_7B)
    return dict(
        transformer=("diffusers", "QwenImageTransformer2DModel", network | _HEADS),
        vae=("diffusers", "AutoencoderKLQwenImage", vae),
        text_encoder=text,
    )
