"""Stable Diffusion behind the protocol.

The shipped model in plain diffusers; each model of the table with its published scheduler config,
small and with random weights, the same as diffusers step by step; LoRA files; what a trainer asks.
Largest differences seen in float32, over the latents of every step and the pictures: 0 for the
classes of SD 1.x and 2.x, 6e-7 for SDXL, whose prompts diffusers encodes together, we one by one.
"""

import dataclasses
import json

import diffusers
import pytest
import torch
import transformers
from flow_models import PROMPTS, shake, streams
from safetensors.torch import save_file
from sd_models import SCHEDULERS, build

from ddpo_scratch.diffusion import Schedule, ddim_mean_std
from ddpo_scratch.models import base, sd
from ddpo_scratch.rollout import sample, step_log_prob

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()

STEPS, W = 5, 3.0
TOLERANCE = 1e-5  # of the largest latent, and of a pixel


@pytest.fixture(scope="module")
def denoisers(folders):
    "A function from a model's name to its one untouched denoiser, for tests that only read"
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = sd.denoiser_for(sd.load_pipeline(folders(name)), W)
        return loaded[name]

    return get


@pytest.fixture
def tiny():
    return sd.StableDiffusion(sd.load_pipeline("tiny"), W)


def inputs(denoiser, seed=0):
    x = torch.randn(2, *denoiser.latent_shape, generator=torch.manual_seed(seed))
    return x, torch.tensor([801, 201]), denoiser.encode(PROMPTS)


# The shipped model


def test_shipped_folder_loads_in_plain_diffusers_with_no_dtype_named():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd.TINY)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    options = dict(num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt")
    image = pipe(["a fox"], **options).images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()


def test_shipped_tokenizer_has_the_files_of_older_transformers():
    vocab = json.loads((sd.TINY / "tokenizer" / "vocab.json").read_text())
    merges = (sd.TINY / "tokenizer" / "merges.txt").read_text().splitlines()[1:]
    tokenizer = sd.load_pipeline("tiny").tokenizer
    assert vocab == tokenizer.get_vocab()
    assert all("".join(m.split(" ")) in vocab for m in merges)


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in sd.TINY.rglob("*.safetensors")) <= 15e6


# The same as diffusers


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_equals_the_diffusers_pipeline_step_by_step(fresh, name, eta):
    "From the same random streams: each latent on the way, and the pictures"
    denoiser, seen = fresh(name), []
    pipe = denoiser.pipe
    # 1.4's config lacks clip_sample, and DDIM would clip
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)

    def watch(pipe, i, t, tensors):
        seen.append((int(t), tensors["latents"]))
        return tensors

    options = dict(num_inference_steps=STEPS, guidance_scale=W, eta=eta, generator=streams())
    images = pipe(PROMPTS, output_type="pt", callback_on_step_end=watch, **options).images
    ours = sample(denoiser, denoiser.encode(PROMPTS), STEPS, eta, streams())
    assert [t for t, _ in seen] == ours.timesteps[:-1].tolist() and ours.timesteps[0] == 801
    theirs = torch.stack([x for _, x in seen], 1)
    error = (theirs - ours.xs[:, 1:]).abs().max() / ours.xs.abs().max()
    pixel = (images - denoiser.decode(ours.x0)).abs().max()
    print(f"{name}, eta {eta:g}: latents {error:.1e} of the largest, pixels {pixel:.1e}")
    assert error < TOLERANCE and pixel < TOLERANCE


def test_v_prediction_read_as_noise_would_be_noticed(fresh):
    denoiser = fresh("sd21")
    c = denoiser.encode(PROMPTS)
    a = sample(denoiser, c, STEPS, 0.0, streams()).x0
    denoiser.path = dataclasses.replace(denoiser.path, prediction_type="epsilon")
    b = sample(denoiser, c, STEPS, 0.0, streams()).x0
    assert (a - b).abs().max() > 1e3 * TOLERANCE * a.abs().max()


@pytest.mark.parametrize(
    "name,prediction",
    [("sd15", "epsilon"), ("sd21_base", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")],
)
def test_the_config_alone_says_what_is_predicted(denoisers, name, prediction):
    denoiser = denoisers(name)
    assert type(denoiser) is (sd.StableDiffusionXL if name == "sdxl" else sd.StableDiffusion)
    assert denoiser.path.prediction_type == prediction
    assert denoiser.path.grid(50)[[0, 1, -2, -1]].tolist() == [981, 961, 1, -1]
    assert denoiser.path.abar_final == float(denoiser.path.abar[0])
    assert torch.equal(denoiser.path.abar, Schedule.from_config(SCHEDULERS[name]).abar)


def test_the_first_and_the_last_step_of_sd1_are_finite(denoisers):
    denoiser = denoisers("sd15")
    x, _, c = inputs(denoiser)
    t, t_next = torch.tensor([981, 1]), torch.tensor([961, -1])
    with torch.no_grad():
        mean, std = ddim_mean_std(x, denoiser(x, t, c), t, t_next, denoiser.path, 1.0)
    assert mean.isfinite().all() and (std > 0).all()


# Guidance and conditioning


@pytest.mark.parametrize("negative", ["", "a cat"])
def test_negative_prompts_of_sdxl_are_those_of_its_pipeline(folders, negative):
    "An empty one is zeros, as where the pipeline is given none; any other is encoded"
    denoiser = sd.denoiser_for(sd.load_pipeline(folders("sdxl")), W, negative)
    given = [negative] * 2 if negative else None
    theirs = denoiser.pipe.encode_prompt(PROMPTS, device="cpu", negative_prompt=given)
    c = denoiser.encode(PROMPTS)
    for a, b in zip((c.cond, c.uncond, c.pooled, c.uncond_pooled), theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert bool(c.uncond.any()) == bool(negative)
    assert c.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    denoiser.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert denoiser.encode(PROMPTS).uncond.any()


def test_sdxl_reads_its_pooled_embedding_and_its_size(denoisers):
    denoiser = denoisers("sdxl")
    x, t, c = inputs(denoiser)
    with torch.no_grad():
        before = denoiser(x, t, c)
        for name in ("pooled", "time_ids"):
            other = type(c)(**{**vars(c), name: vars(c)[name] + 1})
            assert (denoiser(x, t, other) - before).abs().max() > 1e-6, name


def test_guidance_one_costs_one_pass(tiny):
    rows = []
    tiny.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    x, c = torch.randn(3, 4, 16, 16), tiny.encode(["a"] * 3)
    with torch.no_grad():
        for tiny.guidance_scale in (1.0, 2.0):
            tiny(x, 10, c)
    assert rows == [3, 6]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_prompt_is_encoded_once_and_the_oldest_are_forgotten(fresh, name):
    denoiser, seen = fresh(name), []
    denoiser.pipe.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(1))
    first = denoiser.encode(PROMPTS * 2)
    assert len(seen) == 3 and len(first) == 4  # two prompts and the empty one
    denoiser.encode(PROMPTS)
    assert len(seen) == 3
    denoiser.n_remembered = 2
    for prompt in ("a", "b", "c"):
        denoiser.embed(prompt)
    assert len(seen) == 6
    denoiser.n_remembered = 1000
    again = denoiser.encode(PROMPTS)
    assert len(seen) == 9  # only "b" and "c" were left
    assert torch.equal(again.cond, first.cond[:2])


# Precision and memory


@pytest.mark.parametrize(
    "name,dtype,vae",
    [
        ("sdxl", torch.float16, torch.float32),
        ("sdxl", torch.bfloat16, torch.float32),
        ("sdxl", torch.float64, torch.float64),
        ("sd15", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_decoder_of_sdxl_stays_in_float32(folders, name, dtype, vae):
    pipe = sd.load_pipeline(folders(name), dtype)
    assert (pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (dtype, dtype, vae)
    chosen = sd.load_pipeline(folders(name), dtype, vae_dtype=torch.float64)
    assert chosen.vae.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_decoder_of_sdxl_that_others_loaded_is_widened_where_it_overflows(folders, dtype):
    "float16 overflows, if its config says so; another dtype was somebody's choice"
    pipe = sd.load_pipeline(folders("sdxl"))
    torch.nn.Module.to(pipe.vae, dtype)
    sd.denoiser_for(pipe)
    assert pipe.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    pipe.vae.register_to_config(force_upcast=False)
    torch.nn.Module.to(pipe.vae, dtype)
    sd.denoiser_for(pipe)
    assert pipe.vae.dtype == dtype


def test_sdxl_in_bfloat16_gives_its_prediction_and_float32_pictures(fresh, denoisers):
    half, wide = fresh("sdxl", torch.bfloat16), denoisers("sdxl")
    x, t, c = inputs(half)
    with torch.no_grad():
        pred, pictures = half(x, t, c), half.decode(x)
        expected = wide(x, t, wide.encode(PROMPTS))
        torch.testing.assert_close(pred.float(), expected, atol=0.1, rtol=0)
        torch.testing.assert_close(pictures, wide.decode(x), atol=1e-5, rtol=0)
    assert pred.dtype == c.cond.dtype == c.pooled.dtype == torch.bfloat16
    assert c.time_ids.dtype == torch.float32


def test_sdxl_in_float64_computes_in_float64(fresh):
    denoiser = fresh("sdxl", torch.float64)
    x, t, c = inputs(denoiser)
    with torch.no_grad():
        assert denoiser(x.double(), t, c).dtype == denoiser.decode(x.double()).dtype
    assert denoiser.decode(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precision_of_weights_adapter_and_pictures(dtype, tiny):
    "Half-precision weights give float32 adapters and pictures; float64 stays float64"
    denoiser = sd.StableDiffusion(sd.load_pipeline("tiny", dtype=dtype), W)
    params = sd.add_lora(denoiser, 2)
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    c = denoiser.encode(["a fox"])
    with torch.no_grad():
        pred, pictures = denoiser(x, 501, c), denoiser.decode(x)
        expected = tiny(x, 501, tiny.encode(["a fox"]))
    assert c.cond.dtype == pred.dtype == dtype
    assert {p.dtype for p in params} == {at_least} and pictures.dtype == at_least
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(pred.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_slices_change_memory_and_not_results(fresh, denoisers, name):
    "Loaded in slices, or told later"
    whole, sliced, told = denoisers(name), fresh(name, slicing=True), fresh(name)
    told.configure(slicing=True)
    x, t, c = inputs(whole)
    for denoiser in (sliced, told):
        processors = denoiser.network.attn_processors.values()
        assert denoiser.pipe.vae.use_slicing
        assert all("Sliced" in type(p).__name__ for p in processors)
        with torch.no_grad():
            torch.testing.assert_close(denoiser(x, t, c), whole(x, t, c), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(denoiser.decode(x), whole.decode(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name,own", [("sd15", [3]), ("sdxl", [1, 1, 1])])
def test_pictures_are_decoded_some_at_a_time(fresh, name, own):
    denoiser, seen = fresh(name), []
    decoder = denoiser.pipe.vae.post_quant_conv
    decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        for size in (0, 2, 1):
            denoiser.configure(decode_batch_size=size)
            assert denoiser.decode(x).shape == (3, 3, 16, 16)
    assert seen == own + [2, 1, 1, 1, 1]


# LoRA


@pytest.mark.parametrize(
    "rank,alpha,targets", [(4, None, "attention"), (2, 8, "all"), (3, 1, ["to_q"])]
)
def test_lora_file_gives_the_same_pictures_in_plain_diffusers(tmp_path, tiny, rank, alpha, targets):
    shake(sd.add_lora(tiny, rank, alpha, targets))
    sd.save_lora(tiny, tmp_path)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(sd.TINY)
    plain.load_lora_weights(tmp_path)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([981, 21])
    embeddings = tiny.encode(["a fox", "a cat"]).cond
    with torch.no_grad():
        a = tiny.pipe.unet(x, t, embeddings).sample
        b = plain.unet(x, t, embeddings).sample
        with tiny.reference():
            before = tiny.pipe.unet(x, t, embeddings).sample
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert (a - before).abs().max() > 1e-3


@pytest.mark.parametrize("name,targets", [("sd21", "attention"), ("sdxl", "all")])
def test_gradients_reach_the_lora_only(fresh, name, targets):
    denoiser = fresh(name)
    params = sd.add_lora(denoiser, 2, targets=targets)
    shake(params)
    x, t, c = inputs(denoiser)
    step_log_prob(denoiser, x, 0.9 * x, t, t - 20, c, 1.0).sum().backward()
    touched = []
    for part in denoiser.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            touched += [name for name, p in part.named_parameters() if p.grad is not None]
    assert len(touched) == len(params) and all("lora" in name for name in touched)
    assert all(p.grad.any() for p in params)


@pytest.mark.parametrize("name,targets", [("sd21", "attention"), ("sdxl", "all")])
def test_a_lora_of_each_class_loads_in_plain_diffusers_and_here(
    folders, fresh, tmp_path, name, targets
):
    denoiser = fresh(name)
    shake(sd.add_lora(denoiser, 2, targets=targets))
    x, t, c = inputs(denoiser)
    sd.save_lora(denoiser, tmp_path)
    plain = type(denoiser.pipe).from_pretrained(folders(name))
    plain.load_lora_weights(tmp_path)
    loaded = sd.load_lora(sd.load_pipeline(folders(name)), tmp_path)
    with torch.no_grad():
        ours = denoiser(x, t, c)
        for pipe in (plain, loaded):
            again = sd.denoiser_for(pipe, W)
            torch.testing.assert_close(again(x, t, c), ours, atol=1e-5, rtol=1e-5)
        with again.reference():
            assert (again(x, t, c) - ours).abs().max() > 1e-4


# What a trainer asks


def test_trainable_is_a_lora_or_the_whole_network_and_nothing_else(tiny):
    lora = tiny.trainable(2, 4, "all", seed=3)
    same = sd.add_lora(sd.StableDiffusion(sd.load_pipeline("tiny")), 2, 4, "all", 3)
    assert all(torch.equal(a, b) for a, b in zip(lora, same, strict=True))
    whole = sd.StableDiffusion(sd.load_pipeline("tiny"))
    params = whole.trainable()
    assert len(params) == len(list(whole.pipe.unet.parameters()))
    for denoiser, trained in ((tiny, lora), (whole, params)):
        asked = set()
        for part in (denoiser.pipe.unet, denoiser.pipe.vae, denoiser.pipe.text_encoder):
            asked |= {id(p) for p in part.parameters() if p.requires_grad}
        assert asked == {id(p) for p in trained}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_whole_networks_in_half_precision_are_trained_in_float32(fresh, name):
    denoiser = fresh(name, torch.bfloat16)
    denoiser.encode(PROMPTS)  # remembered in half precision, and not to be used again
    params = denoiser.trainable()
    assert {p.dtype for p in params} == {torch.float32}
    x, t, c = inputs(denoiser)
    denoiser(x, t, c).sum().backward()
    assert any(p.grad.any() for p in params)


def test_reference_under_full_fine_tuning_is_the_kept_copy(tiny):
    with pytest.raises(ValueError, match="keep_reference"):
        with tiny.reference():
            pass
    prepared = []

    def prepare(unet):
        prepared.append(unet)
        return unet

    tiny.keep_reference(prepare)
    x, t, c = torch.randn(1, 4, 16, 16), torch.tensor([500]), tiny.encode(["a fox"])
    with torch.no_grad():
        before = tiny(x, t, c)
        shake(tiny.trainable())
        after = tiny(x, t, c)
        with tiny.reference():
            assert torch.equal(tiny(x, t, c), before) and tiny.network is prepared[0]
        assert torch.equal(tiny(x, t, c), after) and not torch.allclose(after, before)
    assert not any(p.requires_grad for p in prepared[0].parameters())
    assert tiny.network is tiny.pipe.unet and len(list(tiny.parameters())) == len(
        list(tiny.pipe.unet.parameters())
    )


def test_a_wrapped_network_is_the_one_that_is_asked(tiny):
    class Wrapped(torch.nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    tiny.network = Wrapped(tiny.network)
    with torch.no_grad():
        tiny(torch.randn(1, 4, 16, 16), 10, tiny.encode(["a fox"]))
    assert tiny.network.calls == 1 and tiny.device.type == "cpu"


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_place_moves_every_part_and_what_is_remembered(fresh, name):
    "To the meta device, which exists everywhere"
    denoiser = fresh(name)
    x, _, before = inputs(denoiser)
    assert denoiser.place("meta") is denoiser and denoiser.device.type == "meta"
    c = denoiser.encode(PROMPTS)
    assert {v.device.type for v in vars(c).values()} == {"meta"}
    assert denoiser.decode(x.to("meta")).device.type == "meta"
    assert denoiser(x.to("meta"), 10, c).shape == x.shape
    assert {v.device.type for v in vars(before).values()} == {"cpu"}


@pytest.mark.parametrize("slicing,processor", [(False, "AttnProcessor"), (True, "Sliced")])
def test_a_compiled_network_on_a_cpu_has_plain_attention_or_slices(
    tiny, monkeypatch, slicing, processor
):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    x, c = torch.randn(1, 4, 16, 16), tiny.encode(["a fox"])
    with torch.no_grad():
        before = tiny(x, 500, c)
        tiny.configure(compile=True, slicing=slicing, gradient_checkpointing=True)
        torch.testing.assert_close(tiny(x, 500, c), before, atol=1e-5, rtol=1e-5)
    unet = tiny.pipe.unet
    blocks = [m for m in unet.modules() if type(m).__name__ in unet._repeated_blocks]
    # with plain attention the whole network, else the blocks that share what is compiled
    assert compiled == (blocks if slicing else [unet]) and unet.is_gradient_checkpointing
    for p in tiny.pipe.unet.attn_processors.values():
        assert type(p).__name__ == processor or type(p).__name__.startswith(processor + "Attn")


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_what_is_saved_loads_again(fresh, tmp_path, name):
    "A LoRA as its file; a whole network as a pipeline, from its own weights or from gathered ones"
    lora, whole = fresh(name), fresh(name)
    shake(lora.trainable(2))
    x, t, c = inputs(lora)
    assert lora.save(tmp_path) == tmp_path / "pytorch_lora_weights.safetensors"
    shake(whole.trainable())
    gathered = {k: v.clone() for k, v in whole.pipe.unet.state_dict().items()}
    places = [whole.save(tmp_path)]
    with torch.no_grad():
        expected = whole(x, t, c)
        for p in whole.pipe.unet.parameters():
            p.zero_()  # as good as shards: they must not be what is saved
    places.append(whole.save(tmp_path / "again", gathered))
    assert places == [tmp_path / "pipeline", tmp_path / "again" / "pipeline"]
    with torch.no_grad():
        for place in places:
            loaded = sd.denoiser_for(sd.load_pipeline(str(place)), W)
            torch.testing.assert_close(loaded(x, t, c), expected, atol=1e-6, rtol=1e-6)
        again = fresh(name)
        sd.load_lora(again.pipe, tmp_path)
        torch.testing.assert_close(again(x, t, c), lora(x, t, c), atol=1e-6, rtol=1e-6)
    assert whole.network is whole.pipe.unet and not any(
        p.any() for p in whole.pipe.unet.parameters()
    )


# Places and shapes of models


def test_a_model_knows_its_name_and_its_judges(tiny, folders, denoisers):
    assert (tiny.name, tiny.judges()) == ("tiny", ("tiny_clip_score", "tiny_animal"))
    denoiser = denoisers("sdxl")
    assert (denoiser.name, denoiser.judges()) == (folders("sdxl"), ())
    plain = diffusers.StableDiffusionPipeline.from_pretrained(sd.TINY)
    assert sd.denoiser_for(plain).name == "tiny"
    made = diffusers.StableDiffusionPipeline(**plain.components, requires_safety_checker=False)
    assert sd.denoiser_for(made).name == "diffusers:StableDiffusionPipeline"


def test_the_revision_reaches_diffusers_and_the_name(monkeypatch):
    pipe, seen = sd.load_pipeline("tiny"), []

    def from_pretrained(source, revision=None, **options):
        seen.append((source, revision))
        return pipe

    index = dict(_class_name="StableDiffusionPipeline")
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda *a, **options: index)
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", from_pretrained)
    assert sd.StableDiffusion.load("owner/model@abc").name == "owner/model@abc"
    assert sd.StableDiffusion.load("owner/model").judges() == ()
    assert seen == [("owner/model", "abc"), ("owner/model", None)]


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_damaged_weights_are_one_line(tmp_path, part):
    folder = build("sd15", tmp_path)
    file = next((folder / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded: ") as caught:
        sd.load_pipeline(folder)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_folders_with_half_precision_only_are_loaded_with_a_word(tmp_path, name):
    pipe = sd.load_pipeline(build(name, tmp_path / "whole"))
    expected = {k: v.half().float() for k, v in pipe.unet.state_dict().items()}
    for part in (*sd._text_encoders(pipe), pipe.unet, pipe.vae):
        torch.nn.Module.to(part, torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").glob("*/*model.safetensors"))
    with pytest.warns(UserWarning, match="half precision only"):
        again = sd.load_pipeline(tmp_path / "half")
    assert all(torch.equal(v, expected[k]) for k, v in again.unet.state_dict().items())
    assert again.unet.dtype == torch.float32
    onward = sd.denoiser_for(again)
    assert all(p.requires_grad for p in onward.trainable(start_from=tmp_path / "half"))


def checkpoint(file, *names):
    "Write a single file with weights of these names"
    tensors = {name: torch.zeros(1, 4, 1, 1) for name in names}
    if file.suffix == ".ckpt":
        torch.save(dict(state_dict=tensors), file)
    else:
        save_file(tensors, file)
    return file


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_files_are_read_by_diffusers_where_it_has_their_configuration(
    folders, tmp_path, monkeypatch, suffix
):
    seen, pipes = [], dict(sd=sd.load_pipeline("tiny"), xl=sd.load_pipeline(folders("sdxl")))
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    for kind, cls, more in (
        ("sd", "StableDiffusionPipeline", "cond_stage_model.transformer.a"),
        ("xl", "StableDiffusionXLPipeline", "conditioner.embedders.1.model.a"),
    ):
        file = checkpoint(tmp_path / f"{kind}{suffix}", unet, more)

        def from_single_file(path, kind=kind, **options):
            seen.append(path)
            return pipes[kind]

        monkeypatch.setattr(f"diffusers.{cls}.from_single_file", from_single_file)
        denoiser = base.load(file)
        assert denoiser.pipe is pipes[kind] and denoiser.name == str(file) == seen[-1]
        assert denoiser.judges() == ()


def test_a_single_file_without_a_configuration_gets_the_command_that_converts_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    file = checkpoint(tmp_path / "model.safetensors", name)
    with pytest.raises(ValueError, match="convert it where there is a network") as caught:
        base.load(file)
    message = str(caught.value)
    assert "\n" not in message and f"P.from_single_file('{file}').save_pretrained(" in message


def test_networks_that_do_not_draw_from_a_prompt_and_noise_are_one_line(folders):
    "Inpainting, SDXL's refiner, and a subclass that forgot to call its parent"
    pipe = sd.load_pipeline(folders("sd15"))
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels, and its decoder 4: .*inpainting"):
        sd.denoiser_for(pipe)
    refiner = sd.load_pipeline(folders("sdxl"))
    refiner.text_encoder = refiner.tokenizer = None
    with pytest.raises(ValueError, match="has no text_encoder and no tokenizer: .*refiner"):
        sd.denoiser_for(refiner)

    class Forgetful(diffusers.StableDiffusionPipeline):
        def __init__(self):
            pass

    with pytest.raises(ValueError, match="has no unet and no vae and no .*super"):
        sd.denoiser_for(Forgetful())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("own", [False, True])
def test_rectangular_pictures_are_those_of_diffusers(folders, name, own):
    "By the model's own sample_size, a pair, or by height and width; SDXL is told both"
    denoiser = sd.denoiser_for(sd.load_pipeline(folders(name)), W)
    pipe = sd.load_pipeline(folders(name))
    if own:
        denoiser.pipe.unet.register_to_config(sample_size=[4, 12])
        denoiser = sd.denoiser_for(denoiser.pipe, W)
    else:
        assert denoiser.resize(8, 24) is denoiser
    assert denoiser.latent_shape == (4, 4, 12)
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    options = dict(num_inference_steps=STEPS, guidance_scale=W, eta=1.0, generator=streams())
    images = pipe(PROMPTS, height=8, width=24, output_type="pt", **options).images
    c = denoiser.encode(PROMPTS)
    if name == "sdxl":
        assert c.time_ids.tolist() == [[8, 24, 0, 0, 8, 24]] * 2
    with torch.no_grad():
        ours = denoiser.decode(sample(denoiser, c, STEPS, 1.0, streams()).x0)
    assert ours.shape == (2, 3, 8, 24) and (images - ours).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "sides, message",
    [
        ((10, 0), "height 10 does not fit this model: expected a multiple of 4, such as 8 or 12"),
        ((0, 1), "width 1 does not fit this model: expected a multiple of 4, such as 4 or 8"),
        ((-4, 0), "height -4 does not fit"),
    ],
)
def test_sizes_that_the_levels_cannot_halve(fresh, sides, message):
    denoiser = fresh("sd15")
    with pytest.raises(ValueError, match=message):
        denoiser.resize(*sides)
    assert denoiser.latent_shape == (4, 8, 8)
    assert denoiser.resize(12, 0).latent_shape == (4, 6, 8)
    assert denoiser.resize().latent_shape == (4, 8, 8)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_long_prompt_is_cut_with_one_warning_that_says_what_is_lost(fresh, recwarn, name):
    denoiser, long = fresh(name), "a " + "very " * 13 + "old fox"
    kept = denoiser.encode(["a " + "very " * 13]).cond
    assert not [w for w in recwarn if "is not read" in str(w.message)]
    for _ in range(2):
        cut = denoiser.encode([long, "a fox"]).cond
        denoiser._embeddings.clear()
    found = [str(w.message) for w in recwarn if "is not read" in str(w.message)]
    assert len(found) == 1
    assert "reads 16 tokens" in found[0] and "the end 'old fox' is not read" in found[0]
    assert torch.equal(cut[:1], kept)


# Sizes


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_sizes_of_a_folder_are_those_of_its_weights(folders, fresh, name):
    denoiser = fresh(name)
    sizes, pipe = type(denoiser).sizes(folders(name)), denoiser.pipe
    counts = {}
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            counts[part] = sum(p.numel() for p in module.parameters())
    assert (sizes["network"], sizes["vae"]) == (counts["unet"], counts["vae"])
    assert sizes["text"] == counts["text_encoder"] + counts.get("text_encoder_2", 0)
    for targets in sd.LORA_TARGETS:
        params = sd.add_lora(fresh(name), 1, targets=targets)
        assert sizes[targets] == sum(p.numel() for p in params), targets
    assert (sizes["channels"], *sizes["latent"]) == denoiser.latent_shape
    assert (sizes["tokens"], sizes["width"]) == tuple(denoiser.encode(PROMPTS).cond.shape[1:])
    assert sizes["factor"] == 2


def test_sizes_count_a_weight_once(tmp_path):
    "A folder may hold its weights a second time, in half precision"
    folder = build("sd15", tmp_path)
    once = sd.StableDiffusion.sizes(folder)
    pipe = sd.load_pipeline(str(folder), torch.float16)
    pipe.unet.save_pretrained(folder / "unet", variant="fp16")
    assert len(list((folder / "unet").glob("*.safetensors"))) == 2
    assert sd.StableDiffusion.sizes(folder) == once
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    assert sd.StableDiffusion.sizes(folder) is None


def test_sizes_of_a_rectangle(tmp_path):
    folder = build("sdxl", tmp_path)
    square = sd.StableDiffusion.sizes(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | dict(sample_size=[4, 16])))
    sizes = sd.StableDiffusion.sizes(folder)
    assert sizes["latent"] == (4, 16) and sizes["side"] == 8
    assert sizes == square | dict(latent=(4, 16))


@pytest.mark.parametrize("name, needs", [("sd15", False), ("sdxl", True)])
def test_sizes_say_whether_the_decoder_needs_float32(folders, name, needs):
    assert sd.StableDiffusion.sizes(folders(name))["decoder_needs_float32"] is needs
    known = {k: v["decoder_needs_float32"] for k, v in sd._HUB.items()}
    assert all(v is ("xl" in k) for k, v in known.items())


@pytest.mark.parametrize(
    "name,network,lora", [("tiny", 5_599_652, 12_992), ("sd-v1-4", 859_520_964, 199_296)]
)
def test_sizes_of_known_models(name, network, lora):
    source = sd.TINY if name == "tiny" else "CompVis/stable-diffusion-v1-4"
    sizes = sd.StableDiffusion.sizes(source)
    assert (sizes["network"], sizes["attention"]) == (network, lora)


# Errors


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda d: sd.load_pipeline("./missing"), "expected 'tiny', a folder"),
        (lambda d: sd.load_pipeline("sdxl"), "expected 'tiny', a folder"),
        (lambda d: sd.add_lora(d, targets="everything"), "expected one of"),
        (lambda d: sd.add_lora(d, rank=0), "at least 1"),
        (lambda d: d.trainable(2) and d.trainable(2), "already has a LoRA"),
        (lambda d: sd.save_lora(d, "x"), "no LoRA to save"),
        (lambda d: sd.load_lora(d.pipe, "nowhere"), "no LoRA in"),
        (lambda d: d.encode("a fox"), r"write \[prompt\]"),
    ],
)
def test_errors_say_what_to_do(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


def test_other_classes_are_told_so_before_their_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(dict(_class_name="FluxPipeline")))
    expected = "expected one of StableDiffusionPipeline, StableDiffusionXLPipeline"
    with pytest.raises(ValueError, match=f"is a FluxPipeline: {expected}"):
        sd.load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match=f"no denoiser for an object of class dict: {expected}"):
        sd.denoiser_for({})


def test_a_child_of_a_pipeline_counts_as_it(folders):
    class Child(diffusers.StableDiffusionXLPipeline):
        pass

    pipe = Child.from_pipe(sd.load_pipeline(folders("sdxl")))
    assert type(sd.denoiser_for(pipe)) is sd.StableDiffusionXL


def test_a_unet_that_takes_the_guidance_scale_is_refused(folders):
    "One such as a latent consistency model would ignore w otherwise"
    pipe = sd.load_pipeline(folders("sd15"))
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="distilled"):
        sd.denoiser_for(pipe)
