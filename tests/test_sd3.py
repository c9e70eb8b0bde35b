"""Stable Diffusion 3 behind the protocol: the same as diffusers, latent by latent.

Small random models of 3, 3.5 medium and 3.5 large. Largest differences seen in float32, over the
latents of every step and the pictures: 3e-6, where the largest latent is 5.
"""

import json

import diffusers
import processes
import pytest
import torch
import transformers
from flow_models import PROMPTS, RUN, folder, inputs, shake, streams, watched
from runs import SMALL, whole_and_resumed
from safetensors.torch import load_file, save_file

from ddpo_scratch.cli import commands as cli
from ddpo_scratch.flow import ODE
from ddpo_scratch.models import base, flow_models, lora, sd3
from ddpo_scratch.rollout import sample

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()

TOLERANCE = 1e-5
NAMES = ["sd3", "sd35_medium", "sd35_large"]
each = pytest.mark.parametrize("name", NAMES)
W, NEGATIVE = 4.5, "blurry"


def fresh(name="sd35_medium", guidance=W, size=(32, 32), **options):
    "Load a model of one's own."
    denoiser = base.load(folder(name), guidance, NEGATIVE, height=size[0], width=size[1], **options)
    assert type(denoiser) is sd3.StableDiffusion3
    return denoiser


def without(denoiser, *ends):
    "Drive the same pipeline without some of its text encoders."
    missing = [f"{what}{end}" for end in ends for what in ("text_encoder", "tokenizer")]
    parts = denoiser.pipe.components | dict.fromkeys(missing)
    return sd3.StableDiffusion3(diffusers.StableDiffusion3Pipeline(**parts), W, NEGATIVE)


def differences(denoiser, steps, size, **options):
    "Draw with diffusers' pipeline and with ours: how far latents and pixels are apart."
    options |= dict(guidance_scale=denoiser.guidance_scale)
    options |= dict(negative_prompt=[NEGATIVE] * len(PROMPTS))
    theirs, pictures = watched(denoiser.pipe, steps, *size, **options)
    with torch.no_grad():
        ours = sample(denoiser, denoiser.encode(PROMPTS), steps, ODE(), streams())
        pixel = (pictures - denoiser.decode(ours.x0)).abs().max()
    assert torch.equal(ours.timesteps.float(), denoiser.pipe.scheduler.sigmas)
    return (theirs - ours.xs[:, 1:]).abs().max(), pixel


# ---- the same as diffusers


@each
@pytest.mark.parametrize(
    "size,steps,guidance",
    [((32, 32), 1, 1.0), ((32, 48), 4, 4.5), ((64, 64), 7, 4.5), ((48, 32), 10, 1.0)],
)
def test_the_ode_equals_the_diffusers_pipeline_step_by_step(name, size, steps, guidance):
    "From the same random streams: each latent on the way, and the pictures"
    error, pixel = differences(fresh(name, guidance, size), steps, size)
    print(f"{name}, {size}, {steps} steps, guidance {guidance:g}: {error:.1e}, pixels {pixel:.1e}")
    assert error < TOLERANCE and pixel < TOLERANCE


SCHEDULES = {
    "no shift": dict(shift=1.0),
    "shift 6": dict(shift=6.0),
    "by size": dict(use_dynamic_shifting=True),
    "by size, linear": dict(use_dynamic_shifting=True, time_shift_type="linear"),
    "stretched": dict(shift=3.0, shift_terminal=0.02),
    "karras": dict(shift=3.0, use_karras_sigmas=True),
}


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_of_diffusers_is_followed(config):
    denoiser = fresh()
    denoiser.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    denoiser.resize(32, 48)  # the path is read anew
    error, pixel = differences(denoiser, 5, (32, 48))
    assert error < TOLERANCE and pixel < TOLERANCE


def test_another_shift_would_be_noticed():
    denoiser = fresh()
    theirs, _ = watched(denoiser.pipe, 4, 32, 32, guidance_scale=W)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5)
    denoiser.path = flow_models.SchedulerPath(scheduler)
    ours = sample(denoiser, denoiser.encode(PROMPTS), 4, ODE(), streams())
    assert (theirs - ours.xs[:, 1:]).abs().max() > 100 * TOLERANCE


def test_a_schedule_that_cannot_be_followed_is_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    with pytest.raises(ValueError, match="end at 0.02: use 2 or more"):
        flow_models.SchedulerPath(scheduler, even=True).grid(1)
    with pytest.raises(ValueError, match="n_steps=0 is out of range"):
        flow_models.SchedulerPath(scheduler).grid(0)
    pipe = fresh().pipe
    for other in (
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        diffusers.DDIMScheduler(),
    ):
        pipe.scheduler = other
        with pytest.raises(ValueError, match="expected a FlowMatchEulerDiscreteScheduler"):
            sd3.StableDiffusion3(pipe)


# ---- prompts


@pytest.mark.parametrize("ends", [(), ("_3",)], ids=["all", "without T5"])
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_embeddings_are_those_of_diffusers(ends, negative):
    denoiser = without(fresh(), *ends)
    denoiser.negative_prompt = negative
    c = denoiser.encode(PROMPTS)
    theirs = denoiser.pipe.encode_prompt(PROMPTS, None, None, negative_prompt=[negative] * 2)
    for ours, others in zip((c.cond, c.uncond, c.pooled, c.uncond_pooled), theirs, strict=True):
        torch.testing.assert_close(ours, others, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "ends", [("_3",), ("",), ("_2",), ("", "_2"), ("", "_3"), ("_2", "_3")], ids="+".join
)
def test_zeros_stand_for_an_encoder_that_is_missing(ends):
    "As in a copy of the whole model whose encoder says zeros; the picture is that of diffusers"
    whole, less = fresh(), without(fresh(), *ends)
    c, found = whole.encode(PROMPTS), less.encode(PROMPTS)
    n = whole.pipe.tokenizer.model_max_length if set(ends) < {"", "_2"} or "_3" in ends else 77
    at = {"": (slice(0, n), slice(0, 16)), "_2": (slice(0, n), slice(16, 24))}
    at["_3"] = (slice(n, None), slice(None))
    if set(ends) != {"", "_2"}:
        for name in ("cond", "uncond"):
            expected = getattr(c, name).clone()
            for end in ends:
                expected[:, *at[end]] = 0
            torch.testing.assert_close(getattr(found, name), expected, atol=1e-6, rtol=0)
    pooled = c.pooled.clone()
    for end in set(ends) - {"_3"}:
        pooled[:, at[end][1]] = 0
    torch.testing.assert_close(found.pooled, pooled, atol=1e-6, rtol=0)
    less.resize(32, 32)
    given = dict(prompt_embeds=found.cond, negative_prompt_embeds=found.uncond)
    given |= dict(pooled_prompt_embeds=found.pooled, guidance_scale=W, latents=inputs(whole)[0])
    given |= dict(negative_pooled_prompt_embeds=found.uncond_pooled, output_type="latent")
    theirs = whole.pipe(num_inference_steps=2, height=32, width=32, **given).images
    with torch.no_grad():
        x, grid = given["latents"], less.path.grid(2)
        for t, t_next in zip(grid[:-1], grid[1:]):
            x = x + (t_next - t).float() * less(x, t, found)
    torch.testing.assert_close(x, theirs, atol=TOLERANCE, rtol=0)


def test_a_folder_without_t5_is_loaded_and_saved(tmp_path):
    denoiser = without(fresh(), "_3")
    denoiser.pipe.save_pretrained(tmp_path / "short")
    again = base.load(str(tmp_path / "short"), W, NEGATIVE)
    assert again.pipe.text_encoder_3 is None
    c, expected = again.encode(PROMPTS), denoiser.encode(PROMPTS)
    assert torch.equal(c.cond, expected.cond) and torch.equal(c.uncond, expected.uncond)
    with_t5, size = base.sizes(folder("sd35_medium")), base.sizes(str(tmp_path / "short"))
    t5 = sum(p.numel() for p in fresh().pipe.text_encoder_3.parameters())
    assert size == with_t5 | dict(text=with_t5["text"] - t5)


def test_a_pipeline_that_is_no_policy_is_refused():
    with pytest.raises(ValueError, match="no text encoder: expected one of three"):
        without(fresh(), "", "_2", "_3")
    pipe = fresh().pipe
    pipe.transformer.register_to_config(in_channels=8)
    with pytest.raises(ValueError, match="takes 8 channels, and its decoder 4"):
        sd3.StableDiffusion3(pipe)
    pipe.register_modules(vae=None)
    with pytest.raises(ValueError, match="has no vae: expected a whole pipeline"):
        sd3.StableDiffusion3(pipe)


def test_t5_reads_more_of_a_prompt_than_clip_and_what_is_lost_is_said_once():
    denoiser, long = fresh(), "a red fox " * 20
    with pytest.warns(UserWarning, match="reads 256 tokens") as caught:
        for end in ("", "", "in snow " * 20):
            denoiser.encode([long + end + "x" * 100])
    assert len(caught) == 2  # one a prompt
    c = denoiser.encode([long, long + "in snow"])
    n = denoiser.clip_tokens
    assert torch.equal(c.cond[0, :n], c.cond[1, :n])
    assert not torch.equal(c.cond[0, n:], c.cond[1, n:])
    with pytest.warns(UserWarning, match="reads 16 tokens"):
        without(denoiser, "_3").encode([long])


@pytest.mark.parametrize("name", ["cond", "uncond", "pooled", "uncond_pooled"])
def test_every_part_of_a_prompt_reaches_the_network(name):
    denoiser = fresh()
    x, t, c = inputs(denoiser)
    with torch.no_grad():
        before = denoiser(x, t, c)
        other = type(c)(**{**vars(c), name: vars(c)[name] + 1})
        assert (denoiser(x, t, other) - before).abs().max() > 1e-4


# ---- size, memory, precision


@pytest.mark.parametrize(
    "sides, message",
    [
        ((30, 32), "height 30 does not fit this model: expected a multiple of 4, such as 28 or 32"),
        ((32, 132), "32 x 132 pixels do not fit this model: .* 128 pixels at most"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sides, message):
    denoiser = fresh()
    with pytest.raises(ValueError, match=message):
        denoiser.resize(*sides)
    assert denoiser.latent_shape == (4, 16, 16)
    assert denoiser.resize(128, 4).latent_shape == (4, 64, 2) and denoiser.path.n_tokens == 32
    assert denoiser.resize().latent_shape == (4, 16, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_decoder_and_the_lora_in_float32(dtype):
    denoiser = fresh(dtype=dtype)
    pipe = denoiser.pipe
    encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    assert {part.dtype for part in (*encoders, pipe.transformer)} == {dtype}
    assert pipe.vae.dtype == torch.float32
    assert fresh(dtype=dtype, vae_dtype=dtype).pipe.vae.dtype == dtype
    assert {p.dtype for p in denoiser.trainable(2, 2)} == {torch.float32}
    less = without(denoiser, "", "_3")
    assert less.encode(PROMPTS).cond.dtype == dtype
    x, t, c = inputs(denoiser)
    with torch.no_grad():
        assert denoiser(x, t, c).dtype == dtype and denoiser.decode(x).dtype == torch.float32


def test_what_saves_memory_changes_no_result():
    "Checkpointing, slices, and pictures decoded one by one"
    plain, spare = fresh(), fresh()
    spare.configure(gradient_checkpointing=True, slicing=True, decode_batch_size=1)
    found = []
    for denoiser in (plain, spare):
        params = denoiser.trainable(2, 2)
        shake(params)
        x, t, c = inputs(denoiser)
        denoiser(x, t, c).square().sum().backward()
        pictures = denoiser.decode(x)
        found.append([pictures, *(p.grad for p in params)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert spare.bare.gradient_checkpointing and spare.pipe.vae.use_slicing


def test_compiling_is_of_blocks(monkeypatch):
    "The first of a kind is compiled, the others are alike; here it is only counted"
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    denoiser = fresh()
    denoiser.configure(compile=True)
    assert [cls.__name__ for cls in compiled] == ["JointTransformerBlock"] * 2


# ---- what is trained


@pytest.mark.parametrize("targets", ["attention", "all", ["attn.to_q"]])
@each
def test_a_lora_loads_in_plain_diffusers_and_here(name, targets, tmp_path):
    denoiser = fresh(name)
    shake(denoiser.trainable(2, 3, targets))
    x, t, c = inputs(denoiser)
    denoiser.save(tmp_path)
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder(name))
    plain.load_lora_weights(tmp_path)
    here, comfy, onward = fresh(name), fresh(name), fresh(name)
    lora.load_lora(here.pipe, tmp_path)
    lora.load_lora(comfy.pipe, tmp_path / "comfyui.safetensors")
    onward.trainable(2, 3, targets, start_from=str(tmp_path))
    with torch.no_grad():
        ours = denoiser(x, t, c)
        for again in (sd3.StableDiffusion3(plain, W), here, comfy, onward):
            torch.testing.assert_close(again(x, t, c), ours, atol=1e-6, rtol=1e-5)
        with denoiser.reference():
            assert (denoiser(x, t, c) - ours).abs().max() > 1e-3
            assert torch.equal(denoiser(x, t, c), fresh(name)(x, t, c))


PUBLISHED = "add_k_proj add_q_proj add_v_proj to_add_out to_k to_out.0 to_q to_v".split()


def adapted(name, targets):
    "Add a LoRA: the names of the layers that it changes."
    denoiser, end = fresh(name), ".lora_A.default"
    denoiser.trainable(2, 2, targets)
    names = [layer for layer, _ in denoiser.bare.named_modules()]
    return {layer.removesuffix(end) for layer in names if layer.endswith(end)}


@each
def test_the_targets_are_those_of_the_published_code(name):
    'flow_grpo\'s scripts/train_sd3.py; what "all" leaves are the layers that the time scales'
    denoiser = fresh(name)
    assert set(denoiser.lora_targets["attention"]) == {f"attn.{end}" for end in PUBLISHED}
    few, many = adapted(name, "attention"), adapted(name, "all")
    assert few < many and not any(".attn2." in layer for layer in few)
    assert any(".attn2." in layer for layer in many) == (name == "sd35_medium")
    for layer, module in denoiser.bare.transformer_blocks.named_modules():
        if isinstance(module, torch.nn.Linear) and f"transformer_blocks.{layer}" not in many:
            assert ".norm1" in layer, layer


def test_files_that_fit_nothing_say_so(tmp_path):
    denoiser = fresh()
    shake(denoiser.trainable(2, 2))
    file = denoiser.save(tmp_path)
    tensors = load_file(file)
    lost = {k.replace("to_q", "to_z"): v for k, v in tensors.items()}
    kohya = {"lora_unet_a.lora_down.weight": torch.ones(2, 2)}
    kohya |= {"lora_unet_a.lora_up.weight": torch.ones(2, 2)}
    for found, message in (
        (lost, "does not fit this model: 2 of its 15 layers.*expected layers such as .*attn.to_q"),
        (kohya, "has kohya's names, which are read for a U-Net only"),
    ):
        save_file(found, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=message):
            lora.read_lora(base.load(folder("sd35_medium")).pipe, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="already has a LoRA"):
        denoiser.trainable(2, 2)
    with pytest.raises(ValueError, match=r"has rank 2, alpha 2, targets attention, .* rank 4"):
        fresh().trainable(4, 4, start_from=str(tmp_path))


def test_the_whole_network_is_trained_saved_and_gone_on_from(tmp_path):
    "With its reference, from shards' gathered weights, and as the start of another run"
    denoiser = fresh()
    x, t, c = inputs(denoiser)
    denoiser.keep_reference()
    params = denoiser.trainable()
    assert sum(p.numel() for p in params) == base.sizes(folder("sd35_medium"))["network"]
    with torch.no_grad():
        before = denoiser(x, t, c)
        shake(params)
        moved = denoiser(x, t, c)
        with denoiser.reference():
            assert torch.equal(denoiser(x, t, c), before)
    place = denoiser.save(tmp_path)
    gathered = {name: weight.clone() for name, weight in denoiser.bare.state_dict().items()}
    rebuilt = fresh().save(tmp_path / "rebuilt", gathered)
    onward = fresh()
    onward.trainable(start_from=str(tmp_path))
    onward.keep_reference()
    with torch.no_grad():
        for again in (base.load(str(p), W, NEGATIVE) for p in (place, rebuilt)):
            assert torch.equal(again(x, t, c), moved)
        assert torch.equal(onward(x, t, c), moved)
        with onward.reference():
            assert torch.equal(onward(x, t, c), before)
    plain = diffusers.DiffusionPipeline.from_pretrained(place)
    assert type(plain) is diffusers.StableDiffusion3Pipeline


# ---- runs

METHODS = {
    "flow_grpo": dict(method="flow_grpo"),
    "guidance, KL, bf16": dict(
        method="flow_grpo(rule='cps')",
        mixed_precision="bf16",
        rollout_dtype="bf16",
        sample_guidance_scale=4.5,
        kl_weight=0.04,
    ),
    "nft": dict(method="nft"),
    "awm": dict(method="awm", kl_weight=0.1),
    "draft_lv": dict(method="draft_lv", reward_fn="brightness"),
    "drtune, whole": dict(method="drtune(early=1)", reward_fn="brightness", use_lora=False),
}


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_a_run_of_two_epochs_goes_on_from_a_checkpoint(tmp_path, fields):
    fields = RUN | dict(model=folder("sd35_medium")) | fields
    whole, resumed = whole_and_resumed(tmp_path, **fields)
    moved = resumed.params[1::2]  # a LoRA's second matrices begin at zero
    assert all(p.any() and p.isfinite().all() for p in moved[:4])


SCRIPT = """
import json, sys, torch
from ddpo_scratch.config import TrainConfig
from ddpo_scratch.train import setup, train

where, runs = sys.argv[1], json.loads(sys.argv[2])
out = {}
for name, fields in runs.items():
    state = setup(TrainConfig(**fields))
    steps = list(train(state=state))
    out[name] = dict(
        params=[p.detach() for p in state.params],
        rewards=[step.metrics["reward_mean"] for step in steps if step.metrics],
        grad_norms=[step.grad_norm for step in steps],
        queries=state.reward_queries,
    )
torch.save(out, f"{where}/rank{state.engine.rank}.pt")
"""


def test_one_process_and_two_make_the_same_updates(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    found = {}
    for world in (1, 2):
        place = tmp_path / str(world)
        place.mkdir()
        # two updates an epoch
        shares = dict(sample_batch_size=8 // world, train_batch_size=4 // world)
        fields = SMALL | RUN | shares | dict(model=folder("sd35_medium"), kl_weight=0.04)
        # a smooth reward: of file sizes a byte more or less is a fifth of a group's spread
        fields |= dict(reward_fn="brightness")
        runs = {
            # the last step's noise is 0.006: divided by its square, rounding is a KL gradient
            "flow_grpo": fields | dict(method="flow_grpo(drop_last=True)", logdir=str(place)),
            "ddpo_is": fields | dict(method="ddpo_is", logdir=str(place), kl_weight=0.0),
            "nft": fields | dict(method="nft", logdir=str(place)),
            "awm": fields | dict(method="awm", logdir=str(place)),
            "draft_lv": fields | dict(method="draft_lv", logdir=str(place), kl_weight=0.0),
        }
        cpu = dict(ACCELERATE_USE_CPU="true")
        processes.run(tmp_path / "script.py", place, json.dumps(runs), world=world, **cpu)
        found[world] = [torch.load(f, weights_only=True) for f in sorted(place.glob("rank*.pt"))]
    (one,), (first, second) = found[1], found[2]
    for name in one:
        a, b, c = one[name], first[name], second[name]
        assert all(torch.equal(x, y) for x, y in zip(b["params"], c["params"], strict=True))
        assert a["queries"] == b["queries"]
        assert a["rewards"] == pytest.approx(b["rewards"], abs=2e-3)
        assert a["grad_norms"][0] == pytest.approx(b["grad_norms"][0], rel=1e-3)
        # of the matrices that begin at zero: all that they are was learnt
        mine, both = (torch.cat([p.flatten() for p in run["params"][1::2]]) for run in (a, b))
        assert mine.any() and (mine - both).norm() < 0.02 * mine.norm(), name


# ---- sizes


@each
def test_sizes_of_a_folder_are_those_of_its_weights(name):
    denoiser, size = fresh(name), base.sizes(folder(name))
    counts = {}
    for part, module in denoiser.pipe.components.items():
        if isinstance(module, torch.nn.Module):
            counts[part] = sum(p.numel() for p in module.parameters())
    text = sum(n for part, n in counts.items() if "text" in part)
    expected = (counts["transformer"], text, counts["vae"])
    assert (size["network"], size["text"], size["vae"]) == expected
    for targets in denoiser.lora_targets:
        params = fresh(name).trainable(1, 1, targets)
        assert size[targets] == sum(p.numel() for p in params), targets
    assert (size["channels"], *size["latent"]) == denoiser.shape_of(denoiser.pipe)
    c = denoiser.encode(PROMPTS)
    # the embedded model's tokenizer reads 16 tokens, CLIP's 77
    assert (size["tokens"] - 77 + 16, size["width"]) == tuple(c.cond.shape[1:])
    assert size["factor"] == denoiser.factor and size["decoder_needs_float32"]


def test_sizes_need_no_weights(tmp_path):
    "Configs alone, which take some kilobytes"
    pipe = fresh().pipe
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert base.sizes(str(tmp_path)) == base.sizes(folder("sd35_medium"))


@pytest.mark.parametrize("config", ["sd3", "sd35_medium", "sd35_large"])
def test_what_autograd_keeps_is_as_estimated(config):
    "Saved tensors that are no weights, of one row, when the whole network is trained"
    denoiser = fresh(config)
    network = denoiser.bare.requires_grad_(True)
    weights = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}
    saved, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # or its place would be used again
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    x, t, c = inputs(denoiser)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoiser.guidance_scale = 1.0
        denoiser(x[:1], t[:1], c[[0]])
    given = sd3._kept_for_backward(network.config, c.cond.shape[1])
    print(f"{config}: {sum(saved.values()):,} kept, {given:,} estimated")
    # the rest, such as patches and the time's embedding, weighs more in a model as small as this
    assert abs(given / sum(saved.values()) - 1) < 0.25


def test_commands_work_on_a_folder(tmp_path, monkeypatch, capsys):
    "A dry run knows the sizes; a run trains for an epoch, and is drawn from"
    monkeypatch.chdir(tmp_path)
    model = folder("sd35_medium")
    words = ["--preset", "tiny", "--model", model, "--method", "flow_grpo"]
    fields = SMALL | RUN | dict(num_epochs=1, run_name="a", logdir=str(tmp_path))
    words += [word for field, value in fields.items() for word in (f"--{field}", str(value))]
    assert cli.ddpo_train([*words, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "memory, estimated" in said and "not estimated" not in said
    assert cli.ddpo_train(words) == 0
    drawn = ["a fox", "--lora", str(tmp_path / "a"), "--num_steps", "2", "--out", str(tmp_path)]
    assert cli.ddpo_sample(drawn) == 0
    assert (tmp_path / "a_fox-0-0.png").is_file()


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_alphas_beside_keys_without_a_prefix(prefix, tmp_path):
    denoiser = base.load(folder("sd35_medium"))
    denoiser.trainable(2, 8)
    denoiser.save(tmp_path)
    tensors = load_file(tmp_path / "comfyui.safetensors")
    named = {prefix + key.removeprefix("transformer."): t for key, t in tensors.items()}
    save_file(named, tmp_path / "other.safetensors")
    read = lora.read_lora(base.load(folder("sd35_medium")).pipe, tmp_path / "other.safetensors")
    assert {alpha for _, _, alpha in read.layers.values()} == {8.0}
