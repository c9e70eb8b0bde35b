"Stable Diffusion behind the protocol: the shipped model in plain diffusers, guidance, LoRA files, and a random model of SD 1.x's class."
import json

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from ddpo_scratch import sd
from ddpo_scratch.diffusion import ddim_mean_std

SD1 = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def test_shipped_folder_loads_in_plain_diffusers_with_no_dtype_named():
    pipe = StableDiffusionPipeline.from_pretrained(sd.TINY)
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    image = pipe(["a fox"], num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()


def test_shipped_tokenizer_has_the_files_of_older_transformers():
    vocab = json.loads((sd.TINY/"tokenizer"/"vocab.json").read_text())
    merges = (sd.TINY/"tokenizer"/"merges.txt").read_text().splitlines()[1:]
    tokenizer = sd.load_pipeline("tiny").tokenizer
    assert vocab == tokenizer.get_vocab()
    assert all("".join(m.split(" ")) in vocab for m in merges)


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in sd.TINY.rglob("*.safetensors")) <= 15e6


@pytest.fixture(scope="module")
def random_sd1(tmp_path_factory):
    "A pipeline of Stable Diffusion 1.x's class and scheduler, small, with random weights and 8x8 latents."
    from diffusers import UNet2DConditionModel
    base = sd.load_pipeline("tiny")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                                block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=128, norm_num_groups=8)
    pipe = StableDiffusionPipeline(vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=unet, scheduler=PNDMScheduler(**SD1),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("sd1")
    pipe.save_pretrained(folder)
    return folder


def test_a_folder_with_the_scheduler_of_sd1(random_sd1):
    "PNDM's config gives the schedule and the leading grid with offset 1; latents take the U-Net's size."
    den = sd.StableDiffusion(sd.load_pipeline(random_sd1.as_posix()), 5.)
    assert den.latent_shape == (4, 8, 8) and den.schedule.grid(50)[:3].tolist() == [981, 961, 941] and den.schedule.grid(50)[-2:].tolist() == [1, -1]
    x, c = torch.randn(2, 4, 8, 8), den.encode(["a", "b"])
    with torch.no_grad(): mean, std = ddim_mean_std(x, den(x, torch.tensor([981, 1]), c), torch.tensor([981, 1]), torch.tensor([961, -1]), den.schedule, 1.)
    assert mean.isfinite().all() and (std > 0).all()


@pytest.mark.parametrize("rank,alpha,targets", [(4, None, "attention"), (2, 8, "all"), (3, 1, ["to_q"])])
def test_lora_file_gives_the_same_pictures_in_plain_diffusers(tmp_path, rank, alpha, targets):
    den = sd.StableDiffusion(sd.load_pipeline("tiny"), 3.)
    torch.manual_seed(1)
    for p in sd.add_lora(den, rank, alpha, targets): p.data += .05*torch.randn_like(p)
    sd.save_lora(den, tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(sd.TINY)
    plain.load_lora_weights(tmp_path)
    x, t, emb = torch.randn(2, 4, 16, 16), torch.tensor([981, 21]), den.encode(["a fox", "a cat"]).cond
    with torch.no_grad():
        a, b = den.pipe.unet(x, t, emb).sample, plain.unet(x, t, emb).sample
        with den.reference(): base = den.pipe.unet(x, t, emb).sample
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert (a - base).abs().max() > 1e-3


def test_reference_under_full_fine_tuning_is_the_kept_copy():
    den = sd.StableDiffusion(sd.load_pipeline("tiny"), 1.)
    with pytest.raises(ValueError, match="keep_reference"):
        with den.reference(): pass
    den.keep_reference()
    x, t, c = torch.randn(1, 4, 16, 16), torch.tensor([500]), den.encode(["a fox"])
    with torch.no_grad():
        before = den(x, t, c)
        for p in den.pipe.unet.parameters(): p.mul_(.9)
        assert not torch.allclose(den(x, t, c), before)
        with den.reference(): assert torch.equal(den(x, t, c), before)
        assert not torch.allclose(den(x, t, c), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precision_of_weights_adapter_and_pictures(dtype):
    "Half-precision weights give float32 adapters and pictures, as ever; float64 stays float64"
    den = sd.StableDiffusion(sd.load_pipeline("tiny", dtype=dtype), 3.)
    params, at_least = sd.add_lora(den, 2), torch.float64 if dtype == torch.float64 else torch.float32
    x, c = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0)), den.encode(["a fox"])
    with torch.no_grad(): pictures = den.decode(x)
    assert c.cond.dtype == dtype and {p.dtype for p in params} == {at_least} and pictures.dtype == at_least
    plain = sd.StableDiffusion(sd.load_pipeline("tiny"), 3.)
    with torch.no_grad():
        assert den(x, 501, c).dtype == dtype
        torch.testing.assert_close(den(x, 501, c).float(), plain(x, 501, plain.encode(["a fox"])), atol=1e-4 if dtype != torch.bfloat16 else .1, rtol=0)


def test_guidance_one_costs_one_pass():
    den = sd.StableDiffusion(sd.load_pipeline("tiny"), 1.)
    seen = []
    den.unet.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    with torch.no_grad():
        den(torch.randn(3, 4, 16, 16), 10, den.encode(["a"]*3))
        den.guidance_scale = 2.
        den(torch.randn(3, 4, 16, 16), 10, den.encode(["a"]*3))
    assert seen == [3, 6]


@pytest.mark.parametrize("call,message", [
    (lambda d: sd.load_pipeline("./missing"), "expected 'tiny', a folder"),
    (lambda d: sd.load_pipeline("sdxl"), "expected 'tiny', a folder"),
    (lambda d: sd.add_lora(d, targets="everything"), "expected one of"),
    (lambda d: sd.add_lora(d, rank=0), "at least 1"),
    (lambda d: sd.save_lora(d, "x"), "no LoRA to save"),
    (lambda d: sd.load_lora(d.pipe, "nowhere"), "no LoRA in"),
    (lambda d: d.encode("a fox"), r"write \[prompt\]")])
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message): call(sd.StableDiffusion(sd.load_pipeline("tiny")))
