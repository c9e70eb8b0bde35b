"TRL's trainers: fields, defaults, checks, hooks; the numbers of TRL 0.23.1; what it gets wrong."

import importlib.util
import json
import runpy
import sys
import threading
from pathlib import Path

import numpy as np
import pins
import processes
import pytest
import torch
from runs import copies, random_model, same

import ddpo_scratch.trl as lib
from ddpo_scratch.diffusion import Schedule
from ddpo_scratch.methods.ppo import ppo_loss
from ddpo_scratch.models.lora import add_lora, save_lora
from ddpo_scratch.models.sd import TINY, load_pipeline

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "trl_reference.json").read_text(encoding="utf-8"))
SPEC = importlib.util.spec_from_file_location("make_trl_reference", DATA / "make_trl_reference.py")
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
SMALL = dict(
    mixed_precision="no", sample_num_steps=3, sample_guidance_scale=1.0, train_learning_rate=1e-3
)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def close(values, expected, tolerance):
    values = torch.tensor(values, dtype=torch.float64)
    expected = torch.tensor(expected, dtype=torch.float64)
    assert values.shape == expected.shape
    assert (values - expected).abs().max() <= tolerance


def pipeline(name=None, **options):
    "Load TRL's pipeline of a model, or of the random one."
    pipe = lib.DefaultDDPOStableDiffusionPipeline(name or random_model(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trainer(folder, kind="DDPO", pipe=None, reward=made.reward_fn, hook=None, **fields):
    config = getattr(lib, f"{kind}Config")(**SMALL | dict(logdir=str(folder)) | fields)
    pipe = pipe or pipeline()
    t = getattr(lib, f"{kind}Trainer")(config, reward, made.prompt_fn, pipe, hook)
    pipe.set_progress_bar_config(disable=True)
    return t


def ddpo(folder, **options):
    return trainer(folder, **dict(sample_batch_size=2, train_batch_size=2) | options)


def alignprop(folder, **options):
    return trainer(folder, "AlignProp", **dict(truncated_rand_backprop_minmax=(0, 3)) | options)


def losses_of(t):
    "Collect what calculate_loss returns."
    losses = []
    made.spy(t, "calculate_loss", losses.append)
    return losses


# ---- the same numbers as TRL 0.23.1, from the same weights and the same seed


@pytest.mark.filterwarnings("ignore:train_cfg=False")
@pytest.mark.parametrize("name", sorted(made.SETTINGS))
def test_numbers_of_trl(name, tmp_path, monkeypatch):
    "Two epochs in float32 without LoRA: prompts, samples, rewards, losses, norms, weights."
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # as the pins were recorded
    ours, trl = made.record(lib, name, str(TINY)), REFERENCE["runs"][name]
    pins.check(f"trl/{name}", ours)
    assert ours["prompts"] == trl["prompts"]
    assert ("x0" in trl) == name.startswith("ddpo")
    if "x0" in trl:
        assert ours["timesteps"] == trl["timesteps"]
        close(ours["x0"], trl["x0"], 1e-5)
        close(ours["log_probs"], trl["log_probs"], 1e-5)
    close(ours["rewards"], trl["rewards"], 1e-4)
    close(ours["losses"], trl["losses"], 1e-4)
    assert np.allclose(ours["grad_norms"], trl["grad_norms"], rtol=1e-3)
    close(ours["weights"], trl["weights"], 1e-5)


def test_train_cfg_off_warns(tmp_path):
    with pytest.warns(UserWarning, match="train_cfg=False"):
        ddpo(tmp_path, train_cfg=False)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_scheduler_step_of_trl(kind):
    from diffusers import DDIMScheduler

    pipe = pipeline("tiny", use_lora=False)
    config = dict(pipe.sd_pipeline.scheduler.config)
    scheduler = DDIMScheduler.from_config(config, prediction_type=kind)
    pipe.sd_pipeline.scheduler = scheduler
    pipe.denoiser.path = Schedule.from_config(scheduler)
    scheduler.set_timesteps(10)
    ours, trl = made.step_reference(pipe.scheduler_step, scheduler), REFERENCE["steps"][kind]
    close(ours["latents"], trl["latents"], 2e-5)
    close(ours["log_probs"], trl["log_probs"], 2e-4)
    close(ours["given"], trl["given"], 2e-4)


# ---- the configs


@pytest.mark.parametrize("config, n", [("DDPOConfig", 41), ("AlignPropConfig", 33)])
def test_fields_and_defaults_are_trls(config, n):
    ours = made.interface(lib)["fields"][config]
    trl = REFERENCE["interface"]["fields"][config]
    assert list(ours.items()) == list(trl.items()) and len(trl) == n


@pytest.mark.parametrize("config", [lib.DDPOConfig, lib.AlignPropConfig])
def test_configs_are_mutable_and_have_help(config):
    c = config()
    c.project_kwargs = {"total_limit": 5}
    assert c.to_dict()["project_kwargs/total_limit"] == 5
    assert all(field.metadata["help"] for field in config.__dataclass_fields__.values())


KINDS = ["DDPOTrainer", "AlignPropTrainer", "DefaultDDPOStableDiffusionPipeline"]


@pytest.mark.parametrize("kind", KINDS)
def test_methods_take_what_trls_take(kind):
    ours, trl = made.interface(lib)["methods"][kind], REFERENCE["interface"]["methods"][kind]
    for name in trl.keys() - ours.keys():  # TRL's pipeline has them as functions
        ours[name] = made.parameters_of(getattr(getattr(lib, kind), name))
    for name in trl:
        assert list(ours[name].items()) == list(trl[name].items()), name


def test_8bit_adam_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr("ddpo_scratch.trl.config.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="bitsandbytes"):
        lib.DDPOConfig(train_use_8bit_adam=True)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(sample_batch_size=1, train_batch_size=2), "greater than or equal"),
        (dict(sample_batch_size=3, train_batch_size=2), "divisible by the train"),
        (dict(sample_batch_size=2, train_gradient_accumulation_steps=3), "total train batch size"),
        (dict(sample_eta=0.0), "eta"),
        (dict(train_timestep_fraction=0.1), "leaves none"),
    ],
)
def test_config_checks(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ddpo(tmp_path, **fields)


# ---- the pipeline


def test_a_pipeline_may_define_some_names():
    "TRL's users subclass its interface partially: what is missing shows where it is used."

    class Partial(lib.DDPOStableDiffusionPipeline):
        def get_trainable_layers(self):
            return "layers"

    pipe = Partial()
    assert pipe.get_trainable_layers() == "layers"
    with pytest.raises(NotImplementedError, match="Partial must define unet"):
        _ = pipe.unet
    with pytest.raises(NotImplementedError, match="Partial must define save_checkpoint"):
        pipe.save_checkpoint([], [], "")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_equal_diffusers(guidance):
    pipe, prompts = pipeline("tiny", use_lora=False), ["a cat", "a dog"]
    generator = torch.Generator().manual_seed(0)
    call = dict(
        num_inference_steps=4,
        guidance_scale=guidance,
        eta=0.0,
        latents=torch.randn(2, *pipe.denoiser.latent_shape, generator=generator),
        output_type="pt",
        negative_prompt=["blue"] * 2,
    )
    ours, theirs = pipe(prompts, **call), load_pipeline()(prompts, **call)
    close(ours.images.tolist(), theirs.images.tolist(), 2e-5)
    assert len(ours.latents) == 5
    assert not torch.stack(ours.log_probs).any()  # eta 0: no density, and not NaN


def test_guidance_rescale_equals_diffusers():
    call = dict(num_inference_steps=3, guidance_scale=4.0, guidance_rescale=0.7, output_type="pt")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe, plain = pipeline("tiny", use_lora=False), load_pipeline()
    ours, theirs = pipe("a cat", latents=latents, **call), plain("a cat", latents=latents, **call)
    close(ours.images.tolist(), theirs.images.tolist(), 2e-5)
    call["guidance_rescale"] = 0.0
    unscaled = pipe("a cat", latents=latents, **call)
    assert (unscaled.images - ours.images).abs().max() > 1e-3


def test_outputs_callbacks_and_generators():
    pipe, seen = pipeline(use_lora=False), []

    def generators():
        return [torch.Generator().manual_seed(i) for i in (1, 2)]

    def callback(i, t, x):
        seen.append(i)

    call = dict(num_inference_steps=3, eta=1.0)
    two = dict(num_images_per_prompt=2, generator=generators(), callback=callback)
    one = pipe("a cat", **call, **two)
    side = pipe.unet.config.sample_size * pipe.sd_pipeline.vae_scale_factor
    assert one.images[0].size == (side, side) and seen == [0, 1, 2]
    two = pipe(["a cat"] * 2, **call, generator=generators(), output_type="latent")
    assert torch.equal(one.latents[-1], two.images)
    assert pipe("a cat", num_inference_steps=2, output_type="np").images.shape[-1] == 3


def test_rgb_with_grad_is_call_with_a_gradient():
    pipe, grads = pipeline(use_lora=False), []
    call = dict(num_inference_steps=3, eta=1.0, output_type="pt")
    cut = dict(truncated_backprop_rand=False, truncated_backprop_timestep=2)
    for recompute in (False, True):
        torch.manual_seed(0)
        out = pipe.rgb_with_grad("a cat", **call, **cut, gradient_checkpoint=recompute)
        grads.append(torch.autograd.grad(out.images.sum(), pipe.unet.conv_in.weight)[0])
    torch.manual_seed(0)
    assert torch.equal(out.images.detach(), pipe("a cat", **call).images)
    torch.testing.assert_close(*grads)
    assert [x.requires_grad for x in out.latents] == [False, False, False, True]


def test_a_cut_beyond_sampling():
    pipe = pipeline(use_lora=False)
    with pytest.raises(ValueError, match="trains nothing"):
        pipe.rgb_with_grad("a cat", num_inference_steps=3, truncated_backprop_rand=False)
    with pytest.warns(UserWarning, match="beyond"):
        out = pipe.rgb_with_grad("a cat", num_inference_steps=2, output_type="latent")
    assert out.images.requires_grad


def test_wrong_timesteps_are_named():
    pipe, x = pipeline(use_lora=False), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="no timesteps"):
        pipe.scheduler_step(x, 1, x)
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="not among"):
        pipe.scheduler_step(x, 3, x)
    with pytest.raises(ValueError, match="not both"):
        pipe.scheduler_step(x, 1, x, generator=torch.Generator(), prev_sample=x)


def test_missing_clip_sample_does_not_clamp(tmp_path):
    "DDIMScheduler clamps the predicted latents where the config lacks the key."
    load_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config.pop("clip_sample")
    file.write_text(json.dumps(config))
    assert pipeline(str(tmp_path)).scheduler.config.clip_sample is False


# ---- scripts as TRL's users have them

DDPO_OPTIONS = (
    "--sample_batch_size 2 --sample_num_batches_per_epoch 2 --train_batch_size 2 "
    "--per_prompt_stat_tracking True --per_prompt_stat_tracking_buffer_size 32 "
    "--async_reward_computation True --tracker_project_name stable_diffusion_training"
)
# TRL's command line cannot set the range (0, 50) of a drawn cut.
ALIGNPROP_OPTIONS = "--train_batch_size 2 --train_gradient_accumulation_steps 2"
SCRIPTS = {
    "ddpo": (
        DDPO_OPTIONS.split(),
        ["hook at step 0 with 2 batches of 2", "hook at step 2 with 2 batches of 2"],
        ["hook at step 4 with 2 batches of 2"],
    ),
    "alignprop": (
        ALIGNPROP_OPTIONS.split(),
        ["hook at step 1 with 2", "hook at step 2 with 2"],
        ["hook at step 3 with 2"],
    ),
}


def script_of(name, folder):
    "Write a user's script with its import line changed, and a head for its scorer; return it."
    theirs = (DATA / f"trl_{name}.py").read_text(encoding="utf-8")
    assert theirs.count("trl import") == theirs.count("\nfrom trl import ") == 1
    script = folder / f"{name}.py"
    script.write_text(theirs.replace("from trl import ", "from ddpo_scratch.trl import "))
    (folder / "scorer").mkdir()
    layers = [torch.nn.Linear(192, 16), torch.nn.Dropout(), torch.nn.Linear(16, 1)]
    torch.save(torch.nn.Sequential(*layers).state_dict(), folder / "scorer/aesthetic-model.pth")
    return script


def hooks(text):
    return [line for line in text.splitlines() if line.startswith("hook")]


def saved(folder):
    "Return the LoRA that a script saved, and the names of its checkpoints."
    from safetensors.torch import load_file

    names = sorted(path.name for path in (folder / "save/checkpoints").iterdir())
    return load_file(folder / "save/pytorch_lora_weights.safetensors"), names


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_with_its_import_line_changed(name, tmp_path, monkeypatch, capsys):
    "Two epochs in a process of its own; then the LoRA is resumed for a third, in this process."
    from diffusers import StableDiffusionPipeline

    options, first, later = SCRIPTS[name]
    script = script_of(name, tmp_path)
    model = ["--pretrained_model", random_model()]
    model += ["--hf_hub_aesthetic_model_id", f"{tmp_path}/scorer"]
    words = [*model, "--mixed_precision", "no", "--sample_num_steps", "3", *options]
    (said,) = processes.run(script, "--num_epochs", "2", *words)
    before, names = saved(tmp_path)
    assert hooks(said) == first and names == ["checkpoint_0"]
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    resume = ["--num_epochs", "3", "--resume_from", "./save/checkpoints"]
    monkeypatch.setattr(sys, "argv", [str(script), *resume, *words])
    ran = runpy.run_path(str(script), run_name="__main__")
    after, names = saved(tmp_path)
    assert hooks(capsys.readouterr().out) == later and names == ["checkpoint_0", "checkpoint_1"]
    assert ran["trainer"].first_epoch == 3 and after.keys() == before.keys()
    assert not same(after.values(), [before[name] for name in after])
    StableDiffusionPipeline.from_pretrained("save", safety_checker=None).load_lora_weights("save")


# ---- the trainers


def test_ddpo_hook(tmp_path):
    seen = []
    ddpo(tmp_path, hook=lambda *arguments: seen.append(arguments)).train(1)
    ((data, step, tracker),) = seen
    images, prompts, metadata, rewards, reward_metadata = data[-1]
    assert len(data) == 2 and step == 0 and reward_metadata == {}
    assert len(images) == len(prompts) == len(metadata) == len(rewards) == 2
    tracker.log_images({}, step=0)  # no tracker was asked for: nothing happens


def test_alignprop_hook(tmp_path):
    seen = []
    hook = dict(hook=lambda *arguments: seen.append(arguments), log_image_freq=2)
    alignprop(tmp_path, **hook).train(2)
    ((data, step, _),) = seen
    assert step == 2 and {"images", "prompts", "prompt_metadata", "rewards"} <= set(data)


@pytest.mark.parametrize("kind", [lib.DDPOTrainer, lib.AlignPropTrainer])
def test_loss_is_ppo_loss(kind):
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    log_prob, old, advantage = values * 0.1
    ours = kind.loss(None, advantage, 0.05, (log_prob - old).exp())
    torch.testing.assert_close(ours, ppo_loss(log_prob, old, advantage, 0.05))


OVERRIDDEN = ["loss", "calculate_loss", "compute_rewards", "_generate_samples", "step"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_is_called(name, tmp_path):
    calls = []

    def override(self, *args, **kwargs):
        calls.append(name)
        return getattr(lib.DDPOTrainer, name)(self, *args, **kwargs)

    kind = type("Mine", (lib.DDPOTrainer,), {name: override})
    fields = SMALL | dict(sample_num_steps=1, sample_batch_size=2, train_batch_size=2)
    config = lib.DDPOConfig(**fields, logdir=str(tmp_path))
    kind(config, made.reward_fn, made.prompt_fn, pipeline()).train(1)
    assert set(calls) == {name}


def test_ratio_is_one_and_only_the_lora_moves(tmp_path):
    t = ddpo(tmp_path)
    losses = losses_of(t)
    before = {name: tensor.clone() for name, tensor in t.sd_pipeline.unet.state_dict().items()}
    t.train(1)
    kls = [float(kl) for _, kl, _ in losses[:3]]  # of the first update
    assert len(kls) == 3 and max(kls) < 1e-10
    after = t.sd_pipeline.unet.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_async_rewards_are_the_same(tmp_path):
    threads = []

    def reward(images, prompts, metadata):
        threads.append(threading.current_thread())
        return made.reward_fn(images, prompts, metadata)

    t = ddpo(tmp_path, reward=reward, async_reward_computation=True)
    pairs = t._generate_samples(3, 2)[1]
    fast, _ = t.compute_rewards(pairs, is_async=True)
    assert len(threads) == 3 and threading.main_thread() not in threads
    threads.clear()
    slow, _ = t.compute_rewards(pairs, is_async=False)
    assert same(fast, slow) and threads == [threading.main_thread()] * 3


def test_resumed_lora_equals_uninterrupted(tmp_path):
    "TRL resumes a LoRA into parameters that its optimizer does not hold."
    tracked = dict(per_prompt_stat_tracking=True)
    whole = ddpo(tmp_path / "whole", num_epochs=4, **tracked)
    whole.train()
    parts = tmp_path / "parts"
    ddpo(parts, num_epochs=2, **tracked).train()
    rest = ddpo(parts, num_epochs=4, resume_from=str(parts), **tracked)
    assert rest.first_epoch == 2 and rest.global_step == 4
    before = copies(rest.trainable_layers)
    rest.train()
    assert not same(before, rest.trainable_layers)
    assert same(whole.trainable_layers, rest.trainable_layers)
    assert rest.stat_tracker.state_dict() == whole.stat_tracker.state_dict()
    assert rest.global_step == whole.global_step == 8
    names = sorted(path.name for path in (parts / "checkpoints").iterdir())
    # epochs 1, 2 and 3: the last is always there
    assert names == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]


def test_going_back_to_an_earlier_checkpoint_overwrites_none(tmp_path):
    ddpo(tmp_path, num_epochs=3).train()
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"checkpoint_0", "checkpoint_1"}
    before = (folder / "checkpoint_1/custom_checkpoint_0.pkl").stat()
    again = ddpo(tmp_path, num_epochs=3, resume_from=str(folder / "checkpoint_0"))
    assert again.first_epoch == 2
    again.train()
    assert (folder / "checkpoint_1/custom_checkpoint_0.pkl").stat() == before
    assert (folder / "checkpoint_2").is_dir()


def test_resumed_full_unet(tmp_path):
    first = ddpo(tmp_path, pipe=pipeline(use_lora=False))
    fresh = copies(first.sd_pipeline.unet.parameters())
    first.train(1)
    again = ddpo(tmp_path, pipe=pipeline(use_lora=False), resume_from=str(tmp_path))
    trained = list(first.sd_pipeline.unet.parameters())
    assert same(trained, again.sd_pipeline.unet.parameters()) and not same(trained, fresh)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    ddpo(tmp_path).train(1)
    wider = pipeline()
    add_lora(wider.denoiser, targets="all")
    with pytest.raises(ValueError, match="another model"):
        wider.load_checkpoint([wider.unet], tmp_path / "checkpoints/checkpoint_0")


def test_a_folder_of_another_run_is_refused_before_training(tmp_path):
    ddpo(tmp_path).train(1)
    with pytest.raises(ValueError, match="another run"):
        ddpo(tmp_path)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="No checkpoints found"):
        ddpo(tmp_path, resume_from=str(tmp_path))


def test_saved_pipeline_loads_everywhere(tmp_path):
    from diffusers import StableDiffusionPipeline

    t, folder = ddpo(tmp_path, pipe=pipeline("tiny")), str(tmp_path / "saved")
    t.train(1)
    t.save_model(folder)
    shape, generator = t.sd_pipeline.denoiser.latent_shape, torch.Generator().manual_seed(0)
    latents = torch.randn(1, *shape, generator=generator)
    call = dict(num_inference_steps=2, guidance_scale=2.0, latents=latents, output_type="pt")
    trained = t.sd_pipeline("a cat", **call).images
    base = load_pipeline()("a cat", **call).images
    assert (trained - base).abs().max() > 1e-4
    plain = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    close(plain("a cat", **call).images.tolist(), base.tolist(), 1e-5)
    plain.load_lora_weights(folder)
    close(plain("a cat", **call).images.tolist(), trained.tolist(), 1e-5)


def test_saved_lora_is_trained_further(tmp_path):
    t, folder = ddpo(tmp_path), str(tmp_path / "saved")
    t.train(1)
    t.save_model(folder)
    again = ddpo(tmp_path / "more", pipe=pipeline(folder))
    assert same(again.trainable_layers, t.trainable_layers)
    before = copies(again.trainable_layers)
    again.train(1)
    assert not same(again.trainable_layers, before)


def test_model_card(tmp_path):
    from huggingface_hub import ModelCard

    ddpo(tmp_path).save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved/README.md")
    assert card.data.tags == ["ddpo", "trl"] and card.data.library_name == "diffusers"
    assert "2305.13301" in card.text and 'load_lora_weights("saved")' in card.text


def test_push_to_hub(tmp_path, monkeypatch):
    import huggingface_hub

    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return type("Repo", (), {"repo_id": "me/" + repo_id})

        def upload_folder(self, folder_path, **options):
            sent.update(options, files={path.name for path in Path(folder_path).iterdir()})
            sent["card"] = (Path(folder_path) / "README.md").read_text(encoding="utf-8")
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    t = alignprop(tmp_path)
    assert t.push_to_hub("small", token="x", dataset_name="animals") == "address"
    assert sent["repo_id"] == "me/small" and sent["token"] == "x"
    files = {"README.md", "model_index.json", "pytorch_lora_weights.safetensors"}
    assert files <= sent["files"]
    for words in ("# me/small", "Data: animals", "2310.03739", "- alignprop"):
        assert words in sent["card"]


def test_alignprop_needs_a_gradient_where_it_trains(tmp_path):
    "Scoring and the loss take any reward, as TRL's own test wants; a step does not."

    def detached(images, prompts, metadata):
        return images.detach().mean((1, 2, 3)), {}

    t = alignprop(tmp_path, reward=detached)
    before = copies(t.trainable_layers)
    rewards = t.compute_rewards(t._generate_samples(2))
    assert t.calculate_loss(rewards) == 10 - rewards.mean()
    with pytest.raises(ValueError, match="differentiable"):
        t.train(1)
    assert same(before, t.trainable_layers) and t.global_step == 0


# ---- what TRL's own tests of its trainers ask for (tests/test_ddpo_trainer.py and
# tests/test_alignprop_trainer.py of 0.23): their configs, a reward that ignores the pictures


@pytest.fixture(scope="module")
def small_model():
    "A random Stable Diffusion 1.5 of latents (4, 8, 8) and 16 tokens."
    return random_model()


def one_random_number(images, prompts, metadata):
    return torch.randn(1) * 3.0, {}


def as_in_trls_tests(kind, model, use_lora, folder, **fields):
    config = getattr(lib, f"{kind}Config")(
        num_epochs=2,
        train_gradient_accumulation_steps=1,
        mixed_precision=None,
        save_freq=1_000_000,
        logdir=str(folder),
        **fields,
    )
    pipe = pipeline(model, use_lora=use_lora)
    make = getattr(lib, f"{kind}Trainer")
    return make(config, one_random_number, lambda: ("cabbages", {}), pipe)


def ddpo_as_in_trls_tests(model, use_lora, folder):
    sizes = dict(sample_num_batches_per_epoch=2, sample_batch_size=2)
    tracked = dict(per_prompt_stat_tracking_buffer_size=32)
    return as_in_trls_tests("DDPO", model, use_lora, folder, **sizes, **tracked)


def alignprop_as_in_trls_tests(model, use_lora, folder):
    fields = dict(train_batch_size=2, truncated_backprop_rand=False)
    return as_in_trls_tests("AlignProp", model, use_lora, folder, **fields)


@pytest.mark.parametrize("use_lora", [False, True])
def test_trls_ddpo_loss(use_lora, small_model, tmp_path):
    t = ddpo_as_in_trls_tests(small_model, use_lora, tmp_path)
    loss = t.loss(torch.tensor([-1.0]), 0.0001, torch.tensor([1.0]))
    assert loss.item() == 1.0


@pytest.mark.parametrize("use_lora", [False, True])
def test_trls_ddpo_generate_samples(use_lora, small_model, tmp_path):
    samples, pairs = ddpo_as_in_trls_tests(small_model, use_lora, tmp_path)._generate_samples(1, 2)
    assert len(samples) == len(pairs) == 1 and len(pairs[0][0]) == 2


@pytest.mark.parametrize("use_lora", [False, True])
def test_trls_ddpo_calculate_loss(use_lora, small_model, tmp_path):
    t = ddpo_as_in_trls_tests(small_model, use_lora, tmp_path)
    (sample,), _ = t._generate_samples(1, 2)
    names = ("latents", "timesteps", "next_latents", "log_probs")
    first = [sample[name][0, :1] for name in names]
    shapes = [tuple(tensor.shape) for tensor in first]
    assert shapes == [(1, 4, 8, 8), (1,), (1, 4, 8, 8), (1,)]
    assert sample["prompt_embeds"].shape == (2, 16, 16)
    # one sample and two embeddings, the first of which is taken for the negative prompt's
    loss, *_ = t.calculate_loss(*first, torch.tensor([1.0]), sample["prompt_embeds"])
    assert torch.isfinite(loss)


@pytest.mark.parametrize("use_lora", [False, True])
def test_trls_alignprop_generate_samples(use_lora, small_model, tmp_path):
    t = alignprop_as_in_trls_tests(small_model, use_lora, tmp_path)
    pairs = t._generate_samples(2, with_grad=True)
    assert len(pairs) == 3 and len(pairs["images"]) == 2


@pytest.mark.parametrize("use_lora", [False, True])
def test_trls_alignprop_calculate_loss(use_lora, small_model, tmp_path):
    t = alignprop_as_in_trls_tests(small_model, use_lora, tmp_path)
    sample = t._generate_samples(2)
    assert sample["images"].shape == (2, 3, 16, 16) and len(sample["prompts"]) == 2
    loss = t.calculate_loss(t.compute_rewards(sample))
    assert torch.isfinite(loss)


# ---- what users bring along


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "inpainting", "nameless"])
def test_another_class_of_model_is_named(name, tmp_path):
    "They ended in size mismatches, or in an argument of type NoneType."
    classes = dict(
        sdxl="StableDiffusionXLPipeline",
        sd3="StableDiffusion3Pipeline",
        flux="FluxPipeline",
        inpainting="StableDiffusionInpaintPipeline",
    )
    load_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    index.pop("_class_name")
    if name in classes:
        index["_class_name"] = classes[name]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=classes.get(name, "_class_name")) as caught:
        pipeline(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_unet_with_more_channels_than_latents_is_named(small_model, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(small_model, safety_checker=None)
    config = dict(pipe.unet.config) | dict(in_channels=9)
    pipe.unet = type(pipe.unet).from_config(config)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="9 channels"):
        pipeline(str(tmp_path))


def saved_lora(folder, seed=0):
    "Save a LoRA that changes something; return its folder."
    denoiser = pipeline().denoiser
    add_lora(denoiser, rank=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in denoiser.pipe.unet.named_parameters():
            if "lora_B" in name:
                p.copy_(0.01 * torch.randn(p.shape, generator=generator))
    save_lora(denoiser, folder)
    return str(folder)


@pytest.mark.parametrize("name", [None, "mine"])
def test_an_adapter_of_any_name_is_trained_saved_and_resumed(name, tmp_path):
    "trl#2505: load_lora_weights before the trainer, which failed at the first save."
    lora = saved_lora(tmp_path / "lora")

    def loaded():
        pipe = pipeline()
        pipe.sd_pipeline.load_lora_weights(lora, adapter_name=name)
        return pipe

    t = ddpo(tmp_path / "run", pipe=loaded())
    start = copies(t.trainable_layers)
    assert all(p.any() for p in start)  # that of the file, not a fresh one: its B is zero
    t.train(2)
    assert not same(start, t.trainable_layers)
    again = ddpo(tmp_path / "run", pipe=loaded(), resume_from=str(tmp_path / "run"))
    assert same(t.trainable_layers, again.trainable_layers)
    t.save_model(str(tmp_path / "saved"))
    further = pipeline(str(tmp_path / "saved"))
    further.get_trainable_layers()
    trained = [p for p in further.unet.parameters() if p.requires_grad]
    assert same(t.trainable_layers, trained)


def test_two_adapters_are_refused_before_training(tmp_path):
    pipe = pipeline()
    for seed, name in enumerate(("one", "two")):
        lora = saved_lora(tmp_path / name, seed)
        pipe.sd_pipeline.load_lora_weights(lora, adapter_name=name)
    with pytest.raises(ValueError, match="2 LoRAs, one, two"):
        ddpo(tmp_path / "run", pipe=pipe)


class Bare(lib.DefaultDDPOStableDiffusionPipeline):
    "A user's pipeline that makes its parts itself."

    def __init__(self, pipe=None):
        if pipe is not None:
            self.sd_pipeline = pipe


def test_a_pipeline_without_super_init(tmp_path):
    with pytest.raises(ValueError, match=r"Bare is not a complete .*super\(\).__init__"):
        ddpo(tmp_path, pipe=Bare())
    from diffusers import PNDMScheduler

    pipe = load_pipeline(random_model())
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    t = ddpo(tmp_path, pipe=Bare(pipe))
    t.train(1)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert (tmp_path / "checkpoints/checkpoint_0/pytorch_lora_weights.safetensors").is_file()


def test_a_pipeline_of_diffusers_is_named(tmp_path):
    config = lib.DDPOConfig(**SMALL, logdir=str(tmp_path))
    with pytest.raises(ValueError, match=r"give a DefaultDDPOStableDiffusionPipeline\(MODEL\)"):
        lib.DDPOTrainer(config, made.reward_fn, made.prompt_fn, load_pipeline(random_model()))


class Listing(lib.DefaultDDPOStableDiffusionPipeline):
    "A user's pipeline that trains some parameters of the U-Net, and says which."

    def get_trainable_layers(self):
        self.unet.requires_grad_(False)
        chosen = [p for name, p in self.unet.named_parameters() if "attn2.to_k" in name]
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen


def test_a_list_of_parameters_is_trained_saved_and_resumed(tmp_path):
    "It failed at the first save."
    t = ddpo(tmp_path, pipe=Listing(random_model(), use_lora=False))
    before = copies(t.sd_pipeline.unet.parameters())
    t.train(1)
    moved = [not torch.equal(p, q) for p, q in zip(before, t.sd_pipeline.unet.parameters())]
    assert sum(moved) == len(t.trainable_layers) < len(before)
    pipe = Listing(random_model(), use_lora=False)
    again = ddpo(tmp_path, pipe=pipe, resume_from=str(tmp_path))
    assert same(t.sd_pipeline.unet.parameters(), again.sd_pipeline.unet.parameters())


@pytest.mark.parametrize("listed", [[], [torch.nn.Parameter(torch.zeros(2))]])
def test_a_list_that_cannot_be_trained_is_refused_at_once(listed, tmp_path):
    pipe = pipeline()
    pipe.get_trainable_layers = lambda: listed
    with pytest.raises(ValueError, match="get_trainable_layers returned"):
        ddpo(tmp_path, pipe=pipe)


REWARDS = dict(
    list=lambda r: r.tolist(),
    column=lambda r: r[:, None],
    tensors=lambda r: list(r),
    numpy=lambda r: r.detach().numpy(),
    tuple=lambda r: tuple(r),
)


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("form", REWARDS)
def test_rewards_in_any_form_are_the_same(form, pair, tmp_path):
    "Two pictures a batch: a pair of rewards is not rewards and metadata."

    def reward(images, prompts, metadata):
        rewards = REWARDS[form](images.mean((1, 2, 3)))
        return (rewards, {}) if pair else rewards

    t, seen = ddpo(tmp_path, reward=reward), []
    t._show = lambda pairs, step: seen.append(pairs[0])
    t.train(1)
    images, _, _, rewards, metadata = seen[0]
    assert torch.equal(rewards, images.mean((1, 2, 3))) and metadata == {}


@pytest.mark.parametrize("form", ["column", "tensors", "tuple"])
def test_gradients_pass_through_any_form(form, tmp_path):
    def reward(images, prompts, metadata):
        return REWARDS[form](images.mean((1, 2, 3))), {}

    t = alignprop(tmp_path, reward=reward, train_batch_size=2)
    before = copies(t.trainable_layers)
    t.train(1)
    assert not same(before, t.trainable_layers)


@pytest.mark.parametrize("make", [ddpo, alignprop])
def test_too_few_rewards_are_refused_before_the_update(make, tmp_path):
    def reward(images, prompts, metadata):
        return images.mean().reshape(1), {}

    t = make(tmp_path, reward=reward, train_batch_size=2)
    before = copies(t.trainable_layers)
    with pytest.raises(ValueError, match=r"shape \(1,\) for 2 pictures"):
        t.train(1)
    assert same(before, t.trainable_layers)


@pytest.mark.parametrize("make", [ddpo, alignprop])
def test_numpys_prompts_become_text(make, tmp_path):
    "np.random.choice, as in TRL's example."
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(type(prompt) for prompt in prompts)
        return images.mean((1, 2, 3)), {}

    t = make(tmp_path, reward=reward, train_batch_size=2)
    t.prompt_fn = lambda: (np.random.choice(["a cat", "a dog"]), {})
    t.train(1)
    assert set(seen) == {str}


@pytest.mark.parametrize("drawn", ["a cat", ("a cat",), (3, {}), None])
def test_a_prompt_function_that_gives_something_else_is_named(drawn, tmp_path):
    t = ddpo(tmp_path)
    t.prompt_fn = lambda: drawn
    with pytest.raises(ValueError, match="the prompt function returned"):
        t.train(1)


def test_alignprop_climbs(tmp_path):
    def light(images, prompts, metadata):
        return images.mean((1, 2, 3)), {}

    sizes = dict(train_batch_size=8, num_epochs=3, train_learning_rate=5e-2)
    t = alignprop(tmp_path, reward=light, **sizes)

    def look():
        torch.manual_seed(0)
        samples = t._generate_samples(8, with_grad=False, prompts=["a cat"] * 8)
        return samples["images"].mean().item()

    before = look()
    t.train()
    assert look() > before + 0.01


def test_nan_stops_before_the_weights_move(tmp_path):
    t = ddpo(tmp_path)
    t.loss = lambda advantages, clip_range, ratio: ratio.mean() * float("nan")
    before = copies(t.trainable_layers)
    with pytest.raises(FloatingPointError, match="epoch 0, optimizer step 0"):
        t.train(1)
    assert same(before, t.trainable_layers)


def test_integer_rewards(tmp_path):
    def count(images, prompts, metadata):
        return torch.arange(len(images)), {}

    tracked = dict(per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=1)
    t = ddpo(tmp_path, reward=count, **tracked)
    t.train(1)
    ids = torch.cat([t._embed(["a cat"])[0]] * 4)
    advantages = t._advantages(torch.tensor([0, 1, 3, 7]), ids)
    assert advantages.dtype == torch.float32 and advantages.unique().numel() == 4


def test_bf16_ratio_is_one(tmp_path):
    "The latent that is stored is the latent whose log-prob was taken."
    pipe = pipeline()
    t = ddpo(tmp_path, pipe=pipe, mixed_precision="bf16")
    losses = losses_of(t)
    t.train(1)
    assert pipe.vae.dtype == torch.bfloat16
    assert {p.dtype for p in t.trainable_layers} == {torch.float32}
    assert float(losses[0][1]) < 1e-8


def test_full_fine_tuning_keeps_float32(tmp_path):
    "TRL would train in half precision."
    t = ddpo(tmp_path, pipe=pipeline(use_lora=False), mixed_precision="bf16")
    assert t.sd_pipeline.unet.dtype == torch.float32


TWO = """
import sys, os, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from test_trl import alignprop, copies, ddpo, pipeline, same
align = sys.argv[1] == "AlignProp"
folder, pipe, seen = {folder!r}, pipeline({model!r}), []
if align:
    t = alignprop(folder, pipe=pipe, train_batch_size=2)
else:
    t = ddpo(folder, pipe=pipe, per_prompt_stat_tracking=True)
original = t._generate_samples

def spied(*args, **kwargs):
    out = original(*args, **kwargs)
    seen.append(out["images"].detach() if align else out[1][0][0])
    return out

t._generate_samples = spied
start = copies(t.trainable_layers)
t.train(2)
weights = torch.cat([p.detach().flatten() for p in t.trainable_layers])
both = t.accelerator.gather(weights[None])
assert t.accelerator.num_processes == 2 and torch.equal(*both), "weights differ between processes"
assert not same(start, t.trainable_layers), "nothing was trained"
images = t.accelerator.gather(seen[0].mean()[None])
assert images[0] != images[1], "both processes drew the same pictures"
t.accelerator.wait_for_everyone()
files = os.listdir(os.path.join(folder, "checkpoints", "checkpoint_0"))
assert {{"random_states_0.pkl", "random_states_1.pkl"}} <= set(files)
"""


@pytest.mark.parametrize("kind", ["DDPO", "AlignProp"])
def test_two_processes_stay_one_model(kind, tmp_path):
    "Each draws pictures of its own, and gradients are averaged: TRL's processes drift apart."
    script = tmp_path / "two.py"
    here, folder = str(Path(__file__).parent), str(tmp_path / "run")
    script.write_text(TWO.format(here=here, folder=folder, model=random_model()))
    processes.run(script, kind, world=2, ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("use_lora", [True, False])
def test_models_that_were_saved_in_half_precision_draw(precision, use_lora, tmp_path):
    "transformers keeps what it reads in half precision, and diffusers does not."
    from diffusers import StableDiffusionPipeline

    t = ddpo(tmp_path, pipe=pipeline("tiny", use_lora=use_lora), mixed_precision=precision)
    before = {n: (p.dtype, id(p)) for n, p in t.sd_pipeline.unet.named_parameters()}
    t.save_model(tmp_path / "saved")
    after = {n: (p.dtype, id(p)) for n, p in t.sd_pipeline.unet.named_parameters()}
    assert before == after
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    parts = (plain.unet, plain.vae, plain.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    assert plain("a cat", num_inference_steps=1, output_type="pt").images.isfinite().all()


def test_models_that_load_are_asked_for_a_lora(tmp_path, monkeypatch):
    import shutil

    import huggingface_hub.constants

    from ddpo_scratch.trl import pipeline as module

    cache, commit = tmp_path / "models--owner--tiny", "0" * 40
    shutil.copytree(TINY, cache / "snapshots" / commit)
    for revision in ("main", "v2"):
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TINY, tmp_path / "run/pipeline")
    (tmp_path / "one.safetensors").touch()
    names = ["owner/tiny", "owner/tiny@v2", str(tmp_path / "one.safetensors"), "~/run"]
    assert [module._has_lora(name, "main") for name in names] == [False] * 4
    file = module._LORA_FILE
    (cache / "snapshots" / commit / file).touch()
    (tmp_path / "run/pipeline" / file).touch()
    assert [module._has_lora(name, "main") for name in names] == [True, True, False, True]


def test_a_model_is_used_again_in_another_precision(tmp_path):
    "The first trainer's casts stayed around the U-Net."
    pipe = pipeline(use_lora=False)
    x, n = torch.randn(1, *pipe.denoiser.latent_shape), pipe.unet.config.cross_attention_dim
    words = torch.randn(1, 4, n)
    with torch.no_grad():
        want = pipe.unet(x, 500, words).sample
        ddpo(tmp_path / "half", pipe=pipe, mixed_precision="bf16")
        assert not torch.equal(pipe.unet(x, 500, words).sample, want)
        ddpo(tmp_path / "whole", pipe=pipe)
        assert torch.equal(pipe.unet(x, 500, words).sample, want)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_lora_that_is_trained_further_is_not_rounded(precision, tmp_path):
    t, folder = ddpo(tmp_path), str(tmp_path / "saved")
    t.train(1)
    t.save_model(folder)
    again = ddpo(tmp_path / "more", pipe=pipeline(folder), mixed_precision=precision)
    assert same(again.trainable_layers, t.trainable_layers)


def test_each_of_two_trainers_counts_for_itself(tmp_path):
    "accelerate holds one number of steps for the process, and one precision."
    fields = dict(sample_num_batches_per_epoch=2, train_batch_size=1)
    first = ddpo(tmp_path / "1", pipe=pipeline(use_lora=False), mixed_precision="bf16", **fields)
    ddpo(tmp_path / "4", train_gradient_accumulation_steps=4, **fields)
    with first.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    first.train(1)
    assert first.global_step == 4


def test_statistics_by_prompt_begin_where_a_run_is_resumed(tmp_path):
    ddpo(tmp_path, num_epochs=1).train()
    tracked = dict(per_prompt_stat_tracking=True)
    again = ddpo(tmp_path, num_epochs=2, resume_from=str(tmp_path), **tracked)
    assert again.first_epoch == 1 and again.stat_tracker.state_dict()
