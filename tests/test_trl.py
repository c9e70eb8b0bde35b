"TRL's trainers: fields, defaults, checks and hooks; the numbers of TRL 0.23.1 where it is right; what it gets wrong."
import importlib.util
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpo_scratch.trl as lib
from ddpo_scratch.ppo import ppo_loss
from ddpo_scratch.sd import TINY, load_pipeline

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "trl_reference.json").read_text())
spec = importlib.util.spec_from_file_location("make_trl_reference", DATA / "make_trl_reference.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
SMALL = dict(mixed_precision="no", sample_num_steps=3, sample_guidance_scale=1.0, train_learning_rate=1e-3)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def close(got, expected, tol):
    got, expected = torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape and (worst := (got - expected).abs().max().item()) <= tol, worst


def pipeline(name="tiny", **options):
    pipe = lib.DefaultDDPOStableDiffusionPipeline(name, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trainer(tmp_path, kind="DDPO", pipe=None, reward=None, hook=None, **fields):
    config = getattr(lib, kind + "Config")(**SMALL | dict(logdir=str(tmp_path)) | fields)
    t = getattr(lib, kind + "Trainer")(config, reward or made.reward_fn, made.prompt_fn, pipe or pipeline(), hook)
    t.sd_pipeline.set_progress_bar_config(disable=True)
    return t


def ddpo(tmp_path, **kw): return trainer(tmp_path, **dict(sample_batch_size=2, train_batch_size=2) | kw)


# ---- the same numbers as TRL 0.23.1, from the same weights and the same seed

@pytest.mark.parametrize("name", sorted(made.SETTINGS))
def test_numbers_of_trl(name, tmp_path, monkeypatch):
    "float32, LoRA off: prompts, samples, log-probs, rewards, losses, gradient norms and weights of two epochs"
    monkeypatch.chdir(tmp_path)
    if name == "ddpo_train_cfg_off":
        with pytest.warns(UserWarning, match="train_cfg=False"): ours = made.record(lib, name, str(TINY))
    else: ours = made.record(lib, name, str(TINY))
    trl = REFERENCE["runs"][name]
    assert ours["prompts"] == trl["prompts"]
    if "x0" in trl:
        assert ours["timesteps"] == trl["timesteps"]
        close(ours["x0"], trl["x0"], 1e-5)
        close(ours["log_probs"], trl["log_probs"], 1e-5)
    close(ours["rewards"], trl["rewards"], 1e-4)
    close(ours["losses"], trl["losses"], 1e-4)
    assert np.allclose(ours["grad_norms"], trl["grad_norms"], rtol=1e-3)
    close(ours["weights"], trl["weights"], 1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_scheduler_step_of_trl(kind):
    from diffusers import DDIMScheduler
    pipe, config = pipeline(use_lora=False), dict(load_pipeline().scheduler.config)
    pipe.sd_pipeline.scheduler = s = DDIMScheduler.from_config(config, prediction_type=kind)
    pipe._network.schedule = lib.Schedule.from_config(s)
    s.set_timesteps(10)
    ours, trl = made.step_reference(pipe.scheduler_step, s), REFERENCE["steps"][kind]
    for key in trl: close(ours[key], trl[key], 2e-5 if key == "latents" else 2e-4)


# ---- the configs

def test_fields_and_defaults_are_trls():
    ours, trl = made.interface(lib)["fields"], REFERENCE["interface"]["fields"]
    assert ours == trl and all(list(ours[c]) == list(trl[c]) for c in trl) and len(trl["DDPOConfig"]) == 41


def test_configs_are_mutable_and_have_help():
    c = lib.DDPOConfig()
    c.project_kwargs = {"total_limit": 5}
    assert c.to_dict()["project_kwargs/total_limit"] == 5
    assert all(f.metadata["help"] for k in (lib.DDPOConfig, lib.AlignPropConfig) for f in k.__dataclass_fields__.values())


@pytest.mark.parametrize("kind", ["DDPOTrainer", "AlignPropTrainer", "DefaultDDPOStableDiffusionPipeline"])
def test_methods_take_what_trls_take(kind):
    ours, trl = made.interface(lib)["methods"][kind], REFERENCE["interface"]["methods"][kind]
    if "Pipeline" in kind:
        inner = lambda f: {k: repr(p.default) if p.default is not p.empty else "" for k, p in inspect.signature(f).parameters.items()}
        ours.update({m: inner(getattr(lib.DefaultDDPOStableDiffusionPipeline, m)) for m in ("scheduler_step", "__call__", "rgb_with_grad")})
    assert ours == trl and all(list(ours[m]) == list(trl[m]) for m in trl)


def test_8bit_adam_without_bitsandbytes():
    if importlib.util.find_spec("bitsandbytes"): pytest.skip("bitsandbytes is installed here")
    with pytest.raises(ImportError, match="bitsandbytes"): lib.DDPOConfig(train_use_8bit_adam=True)


@pytest.mark.parametrize("fields, words", [
    (dict(sample_batch_size=1, train_batch_size=2), "greater than or equal"), (dict(sample_batch_size=3, train_batch_size=2), "divisible by the train"),
    (dict(sample_batch_size=2, train_gradient_accumulation_steps=3), "total train batch size"), (dict(sample_eta=0.0), "eta"),
    (dict(train_timestep_fraction=0.1), "leaves none")])
def test_config_checks(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words): ddpo(tmp_path, **fields)


# ---- the pipeline

def test_pictures_equal_diffusers():
    pipe, plain = pipeline(use_lora=False), load_pipeline()
    latents = torch.randn(2, *pipe._network.latent_shape, generator=torch.Generator().manual_seed(0))
    for guidance in (1.0, 4.0):
        ask = dict(num_inference_steps=4, guidance_scale=guidance, eta=0.0, latents=latents, output_type="pt", negative_prompt=["blue"]*2)
        ours, theirs = pipe(["a cat", "a dog"], **ask), plain(["a cat", "a dog"], **ask)
        close(ours.images.tolist(), theirs.images.tolist(), 2e-5)
        assert len(ours.latents) == 5 and all((l == 0).all() for l in ours.log_probs)  # eta 0: no density, no NaN


def test_outputs_callbacks_and_generators():
    pipe, seen = pipeline(use_lora=False), []
    g = lambda: [torch.Generator().manual_seed(i) for i in (1, 2)]
    one = pipe("a cat", num_images_per_prompt=2, num_inference_steps=3, generator=g(), eta=1.0, callback=lambda i, t, x: seen.append((i, int(t))))
    assert one.images[0].size == (pipe.unet.config.sample_size*pipe.sd_pipeline.vae_scale_factor,)*2
    two = pipe(["a cat"]*2, num_inference_steps=3, generator=g(), eta=1.0, output_type="latent")
    assert torch.equal(one.latents[-1], two.images) and [i for i, _ in seen] == [0, 1, 2]
    assert pipe("a cat", num_inference_steps=2, output_type="np").images.shape[-1] == 3


def test_rgb_with_grad_is_call_with_a_gradient():
    pipe = pipeline(use_lora=False)
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        out = pipe.rgb_with_grad("a cat", num_inference_steps=3, eta=1.0, truncated_backprop_rand=False, truncated_backprop_timestep=2, gradient_checkpoint=recompute, output_type="pt")
        grads.append(torch.autograd.grad(out.images.sum(), pipe.unet.conv_in.weight)[0])
    torch.manual_seed(0)
    assert torch.equal(out.images.detach(), pipe("a cat", num_inference_steps=3, eta=1.0, output_type="pt").images)
    torch.testing.assert_close(*grads)
    assert [x.requires_grad for x in out.latents] == [False, False, False, True]


def test_a_cut_beyond_sampling():
    with pytest.raises(ValueError, match="trains nothing"): pipeline(use_lora=False).rgb_with_grad("a cat", num_inference_steps=3, truncated_backprop_rand=False)
    with pytest.warns(UserWarning, match="beyond"): assert 1 <= lib._cut_to_k(5, True, 49, (0, 50)) <= 5


def test_wrong_timesteps_are_named():
    pipe, x = pipeline(use_lora=False), torch.zeros(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="not among"): pipe.scheduler_step(x, 3, x)
    with pytest.raises(ValueError, match="not both"): pipe.scheduler_step(x, 1, x, generator=torch.Generator(), prev_sample=x)


def test_missing_clip_sample_does_not_clamp(tmp_path):
    "DDIMScheduler clamps the predicted latents where the config lacks the key"
    pipe = load_pipeline()
    pipe.save_pretrained(tmp_path)
    f = tmp_path / "scheduler" / "scheduler_config.json"
    f.write_text(json.dumps({k: v for k, v in json.loads(f.read_text()).items() if k != "clip_sample"}))
    assert pipeline(str(tmp_path)).scheduler.config.clip_sample is False


# ---- scripts as TRL's users have them

SCRIPTS = {"ddpo": (["--sample_batch_size", "2", "--sample_num_batches_per_epoch", "2", "--train_batch_size", "2", "--per_prompt_stat_tracking", "True",
                     "--per_prompt_stat_tracking_buffer_size", "32", "--async_reward_computation", "True", "--tracker_project_name", "stable_diffusion_training"],
                    ["hook at step 0 with 2 batches of 2", "hook at step 2 with 2 batches of 2"], ["hook at step 4 with 2 batches of 2"]),
           "alignprop": (["--train_batch_size", "2", "--train_gradient_accumulation_steps", "2"],  # the range (0, 50) of a drawn cut cannot be set on TRL's command line
                         ["hook at step 1 with 2", "hook at step 2 with 2"], ["hook at step 3 with 2"])}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_with_its_import_line_changed(name, tmp_path, monkeypatch, capsys):
    "Two epochs in a process of its own, then the LoRA run is resumed for a third (in this process, to save the imports)"
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file
    options, first, later = SCRIPTS[name]
    theirs = (DATA / f"trl_{name}.py").read_text()
    assert theirs.count("trl import") == theirs.count("\nfrom trl import ") == 1
    script = tmp_path / f"{name}.py"
    script.write_text(theirs.replace("from trl import ", "from ddpo_scratch.trl import "))
    (tmp_path / "scorer").mkdir()
    torch.save(torch.nn.Sequential(torch.nn.Linear(192, 16), torch.nn.Dropout(), torch.nn.Linear(16, 1)).state_dict(), tmp_path / "scorer" / "aesthetic-model.pth")
    args = ["--pretrained_model", str(TINY), "--hf_hub_aesthetic_model_id", str(tmp_path / "scorer"), "--mixed_precision", "no", "--sample_num_steps", "3", *options]
    done = subprocess.run([sys.executable, str(script), "--num_epochs", "2", *args], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(Path(__file__).parents[1])))
    assert done.returncode == 0, done.stderr[-3000:]
    hooks = lambda text: [l for l in text.splitlines() if l.startswith("hook")]
    lora = lambda: load_file(tmp_path / "save" / "pytorch_lora_weights.safetensors")
    numbers = lambda: sorted(p.name for p in (tmp_path / "save" / "checkpoints").iterdir())
    assert hooks(done.stdout) == first and numbers() == ["checkpoint_0"]
    before = lora()
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--num_epochs", "3", "--resume_from", "./save/checkpoints", *args])
    ran = runpy.run_path(str(script), run_name="__main__")
    assert hooks(capsys.readouterr().out) == later and numbers() == ["checkpoint_0", "checkpoint_1"]
    after = lora()
    assert ran["trainer"].first_epoch == 3 and after.keys() == before.keys() and any(not torch.equal(after[k], before[k]) for k in after)
    StableDiffusionPipeline.from_pretrained("save", safety_checker=None).load_lora_weights("save")


# ---- the trainers

def test_hooks(tmp_path):
    seen = []
    ddpo(tmp_path, hook=lambda *a: seen.append(a)).train(1)
    (data, step, tracker), = seen
    images, prompts, metadata, rewards, reward_metadata = data[-1]
    assert len(data) == 2 and images.shape[0] == len(prompts) == len(metadata) == len(rewards) == 2 and step == 0 and reward_metadata == {}
    tracker.log_images({}, step=0)  # no tracker was asked for: nothing happens
    seen.clear()
    trainer(tmp_path / "a", "AlignProp", hook=lambda *a: seen.append(a), truncated_rand_backprop_minmax=(0, 3), log_image_freq=2).train(2)
    (data, step, _), = seen
    assert step == 2 and {"images", "prompts", "prompt_metadata", "rewards"} <= set(data)


def test_loss_is_ppo_loss(tmp_path):
    lp, old, adv = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * .1
    for T in (lib.DDPOTrainer, lib.AlignPropTrainer): torch.testing.assert_close(T.loss(None, adv, .05, (lp - old).exp()), ppo_loss(lp, old, adv, .05))


def test_overridden_methods_are_called(tmp_path):
    calls = []
    class Mine(lib.DDPOTrainer):
        def loss(self, advantages, clip_range, ratio): calls.append("loss"); return super().loss(advantages, clip_range, ratio)
        def calculate_loss(self, *args): calls.append("calculate_loss"); return super().calculate_loss(*args)
        def compute_rewards(self, pairs, is_async=False): calls.append("compute_rewards"); return super().compute_rewards(pairs, is_async)
        def _generate_samples(self, iterations, batch_size): calls.append("_generate_samples"); return super()._generate_samples(iterations, batch_size)
        def step(self, epoch, global_step): calls.append("step"); return super().step(epoch, global_step)
    config = lib.DDPOConfig(**SMALL, sample_batch_size=2, train_batch_size=2, logdir=str(tmp_path))
    Mine(config, made.reward_fn, made.prompt_fn, pipeline()).train(1)
    assert set(calls) == {"loss", "calculate_loss", "compute_rewards", "_generate_samples", "step"}


def test_ratio_is_one_and_only_the_lora_moves(tmp_path):
    t = ddpo(tmp_path)
    losses, original = [], t.calculate_loss
    t.calculate_loss = lambda *a: losses.append(original(*a)) or losses[-1]
    before = {k: v.clone() for k, v in t.sd_pipeline.unet.state_dict().items()}
    t.train(1)
    assert max(float(l[1]) for l in losses[:3]) < 1e-10  # approx_kl of the first update
    moved = {k for k, v in t.sd_pipeline.unet.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all("lora_" in k for k in moved)


def test_async_rewards_are_the_same(tmp_path):
    threads = []
    def reward(images, prompts, metadata):
        threads.append(threading.current_thread().name)
        return made.reward_fn(images, prompts, metadata)
    a = ddpo(tmp_path, reward=reward, async_reward_computation=True)
    pairs = a._generate_samples(3, 2)[1]
    fast, slow = ([r.tolist() for r in next(iter(a.compute_rewards(pairs, is_async=k)))] for k in (True, False))
    assert fast == slow and any("ThreadPool" in n for n in threads) and threads[-1] == threading.main_thread().name


def test_resumed_lora_equals_uninterrupted(tmp_path):
    "TRL resumes a LoRA into parameters that its optimizer does not hold; here the continuation has the same numbers"
    whole = ddpo(tmp_path / "whole", per_prompt_stat_tracking=True, num_epochs=4)
    whole.train()
    ddpo(tmp_path / "parts", per_prompt_stat_tracking=True, num_epochs=2).train()
    rest = ddpo(tmp_path / "parts", per_prompt_stat_tracking=True, num_epochs=4, resume_from=str(tmp_path / "parts"))
    assert rest.first_epoch == 2 and rest.global_step == 4
    before = [p.clone() for p in rest.trainable_layers]
    rest.train()
    assert any(not torch.equal(p, q) for p, q in zip(before, rest.trainable_layers))
    for p, q in zip(whole.trainable_layers, rest.trainable_layers): assert torch.equal(p, q)
    assert rest.stat_tracker.state_dict() == whole.stat_tracker.state_dict() and rest.global_step == whole.global_step == 8
    names = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir())
    assert names == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]  # epochs 1, 2 and 3: the last is always there


def test_going_back_to_an_earlier_checkpoint_overwrites_none(tmp_path):
    ddpo(tmp_path, num_epochs=3).train()
    old = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    again = ddpo(tmp_path, num_epochs=3, resume_from=str(tmp_path / "checkpoints" / old[0]))
    first = again.first_epoch
    again.train()
    assert first == 2 and {*old, f"checkpoint_{len(old)}"} <= {p.name for p in (tmp_path / "checkpoints").iterdir()}


def test_resumed_full_unet(tmp_path):
    a = ddpo(tmp_path, pipe=pipeline(use_lora=False))
    a.train(1)
    b = ddpo(tmp_path, pipe=pipeline(use_lora=False), resume_from=str(tmp_path))
    for p, q in zip(a.sd_pipeline.unet.parameters(), b.sd_pipeline.unet.parameters()): assert torch.equal(p, q)


def test_a_folder_of_another_run_is_refused_before_training(tmp_path):
    ddpo(tmp_path).train(1)
    with pytest.raises(ValueError, match="another run"): ddpo(tmp_path)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="No checkpoints found"): ddpo(tmp_path, resume_from=str(tmp_path))


def test_saved_pipeline_loads_everywhere(tmp_path):
    from diffusers import StableDiffusionPipeline
    t = ddpo(tmp_path)
    t.train(1)
    t.save_model(str(tmp_path / "saved"))
    latents = torch.randn(1, *t.sd_pipeline._network.latent_shape, generator=torch.Generator().manual_seed(0))
    ask = dict(num_inference_steps=2, guidance_scale=2.0, latents=latents, output_type="pt")
    trained, base = t.sd_pipeline("a cat", **ask).images, load_pipeline()("a cat", **ask).images
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    close(plain("a cat", **ask).images.tolist(), base.tolist(), 1e-5)
    plain.load_lora_weights(str(tmp_path / "saved"))
    close(plain("a cat", **ask).images.tolist(), trained.tolist(), 1e-5)
    assert (trained - base).abs().max() > 1e-4
    more = pipeline(str(tmp_path / "saved"))  # and is trained further
    close(more("a cat", **ask).images.tolist(), trained.tolist(), 1e-5)
    again = ddpo(tmp_path / "more", pipe=more)
    assert len(again.trainable_layers) == len(t.trainable_layers) and all(torch.equal(p, q) for p, q in zip(again.trainable_layers, t.trainable_layers))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "2305.13301" in card and "ddpo" in card and "load_lora_weights" in card


def test_push_to_hub(tmp_path, monkeypatch):
    import huggingface_hub
    sent = {}
    class Api:
        def __init__(self, token=None): sent["token"] = token
        def create_repo(self, repo_id, private=None, exist_ok=False): return type("Repo", (), {"repo_id": "me/" + repo_id})
        def upload_folder(self, folder_path, **kw):
            sent.update(kw, files={p.name for p in Path(folder_path).iterdir()}, card=(Path(folder_path) / "README.md").read_text())
            return "address"
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    t = trainer(tmp_path, "AlignProp")
    assert t.push_to_hub("small", token="x", dataset_name="animals") == "address"
    assert sent["repo_id"] == "me/small" and {"README.md", "model_index.json", "pytorch_lora_weights.safetensors"} <= sent["files"]
    assert "Data: animals" in sent["card"] and "2310.03739" in sent["card"] and "alignprop" in sent["card"]


def test_alignprop_needs_a_gradient(tmp_path):
    t = trainer(tmp_path, "AlignProp", truncated_rand_backprop_minmax=(0, 3), reward=lambda i, p, m: (i.detach().mean((1, 2, 3)), {}))
    with pytest.raises(ValueError, match="differentiable"): t.train(1)


def test_alignprop_climbs(tmp_path):
    t = trainer(tmp_path, "AlignProp", truncated_rand_backprop_minmax=(0, 3), train_batch_size=8, reward=lambda i, p, m: (i.mean((1, 2, 3)), {}), train_learning_rate=5e-3, num_epochs=6)
    light = lambda: t._generate_samples(8, with_grad=False, prompts=["a cat"]*8)["images"].mean().item()
    torch.manual_seed(0)
    before = light()
    t.train()
    torch.manual_seed(0)
    assert light() > before


def test_nan_stops_before_the_weights_move(tmp_path):
    t = ddpo(tmp_path, reward=lambda i, p, m: (torch.tensor([1.0, 2.0]), {}))
    t.loss = lambda advantages, clip_range, ratio: ratio.mean() * float("nan")
    before = [p.clone() for p in t.trainable_layers]
    with pytest.raises(FloatingPointError, match="epoch 0, optimizer step 0"): t.train(1)
    assert all(torch.equal(p, q) for p, q in zip(before, t.trainable_layers))


def test_integer_rewards(tmp_path):
    t = ddpo(tmp_path, per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=1, reward=lambda i, p, m: (torch.arange(len(i)), {}))
    t.train(1)
    a = t._advantages(torch.tensor([0, 1, 3, 7]), torch.cat([t._embed(["a cat"])[0]]*4))
    assert a.dtype == torch.float32 and a.unique().numel() == 4


def test_bf16_ratio_is_one(tmp_path):
    "The latent that is stored is the latent whose log-prob was taken"
    pipe = pipeline()
    t = ddpo(tmp_path, pipe=pipe, mixed_precision="bf16")
    losses, original = [], t.calculate_loss
    t.calculate_loss = lambda *a: losses.append(original(*a)) or losses[-1]
    t.train(1)
    assert pipe.vae.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in t.trainable_layers)
    assert float(losses[0][1]) < 1e-8
    whole = ddpo(tmp_path / "full", pipe=pipeline(use_lora=False), mixed_precision="bf16")
    assert whole.sd_pipeline.unet.dtype == torch.float32  # TRL would train in half precision


TWO = """
import sys, os, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from test_trl import ddpo, trainer
align = sys.argv[1] == "AlignProp"
seen = []
t = trainer({folder!r}, "AlignProp", truncated_rand_backprop_minmax=(0, 3), train_batch_size=2) if align else ddpo({folder!r}, per_prompt_stat_tracking=True)
original = t._generate_samples
def spied(*args, **kwargs):
    out = original(*args, **kwargs)
    seen.append(out["images"].detach() if align else out[1][0][0])
    return out
t._generate_samples = spied
start = [p.clone() for p in t.trainable_layers]
t.train(2)
both = t.accelerator.gather(torch.cat([p.detach().flatten() for p in t.trainable_layers])[None])
assert t.accelerator.num_processes == 2 and torch.equal(both[0], both[1]), "weights differ between processes"
assert any(not torch.equal(p, q) for p, q in zip(start, t.trainable_layers)), "nothing was trained"
images = t.accelerator.gather(seen[0].mean()[None])
assert images[0] != images[1], "both processes drew the same pictures"
folder = os.path.join({folder!r}, "checkpoints", "checkpoint_0")
t.accelerator.wait_for_everyone()
assert {{"random_states_0.pkl", "random_states_1.pkl"}} <= set(os.listdir(folder))
"""


@pytest.mark.parametrize("kind", ["DDPO", "AlignProp"])
def test_two_processes_stay_one_model(kind, tmp_path):
    "Each draws pictures of its own, and gradients are averaged: TRL's processes drift apart"
    script = tmp_path / "two.py"
    script.write_text(TWO.format(here=str(Path(__file__).parent), folder=str(tmp_path / "run")))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = lambda rank: os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    procs = [subprocess.Popen([sys.executable, str(script), kind], env=env(r), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    outs = [p.communicate(timeout=300)[0] for p in procs]
    assert all(p.returncode == 0 for p in procs), outs[0][-2000:] + outs[1][-2000:]
