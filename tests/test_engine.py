"The engine: runs that are killed, interrupted, short of disk or spread over processes; options of memory and speed that change no number."
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from ddpo_scratch import train as T
from ddpo_scratch.evaluate import read_metrics
from ddpo_scratch.rollout import replay_log_prob
from ddpo_scratch.sd import denoiser_for, load_lora, load_pipeline

ROOT = Path(__file__).parents[1]
SMALL = dict(sample_num_steps=5, sample_batch_size=8, sample_num_batches_per_epoch=1, train_batch_size=4, sample_guidance_scale=1., num_epochs=2,
             eval_num_images=0, stop_gain=0., lora_rank=2, lora_alpha=2)
# forks of a server that has imported everything once
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ddpo_scratch.train", "diffusers", "transformers", "peft", "accelerate"])


def small(tmp_path, **fields): return T.TrainConfig(**dict(SMALL, logdir=str(tmp_path)) | fields)
def numbers(folder): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in read_metrics(folder)]
def trained(config, **parts):
    state = T.setup(config, **parts)
    for _ in T.train(state=state): pass
    return state
def rows(folder):
    path = Path(folder)/"metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _child(fields, run, log):
    torch.set_num_threads(1)
    with open(log, "a", buffering=1) as f, contextlib.redirect_stdout(f): getattr(T, run)(T.TrainConfig(**fields)) if run == "fit" else [None for _ in T.train(T.TrainConfig(**fields))]


def child(config, log, run="train"):
    p = CONTEXT.Process(target=_child, args=(dataclasses.asdict(config), run, str(log)))
    p.start()
    return p


def until(true, process, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert process.is_alive() and time.monotonic() < end, f"exit code {process.exitcode}"
        time.sleep(.02)


def test_a_run_killed_at_random_moments_ends_with_the_same_numbers(tmp_path):
    torch.set_num_threads(1)
    whole, moments = trained(small(tmp_path, run_name="whole", num_epochs=5)), random.Random(3)
    config = small(tmp_path, run_name="cut", num_epochs=5)
    for after in (1, 3):
        p, start = child(config, tmp_path/"log"), time.monotonic()
        until(lambda: rows(tmp_path/"cut") >= after, p)
        time.sleep(moments.uniform(0, .3)*(time.monotonic() - start)/after)              # somewhere in the next epoch, or in saving this one
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL
        saved = list((tmp_path/"cut").glob("checkpoints/epoch_*"))
        config = small(tmp_path, num_epochs=5, resume_from=str(tmp_path/"cut")) if saved else small(tmp_path, run_name=f"cut{after}", num_epochs=5)
    resumed = trained(config)
    assert numbers(resumed.folder) == numbers(tmp_path/"whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.params, resumed.params))


def test_sigterm_saves_what_was_not_and_says_where(tmp_path):
    torch.set_num_threads(1)
    p = child(small(tmp_path, run_name="a", num_epochs=50, save_freq=20, sample_num_steps=10), tmp_path/"log", "fit")
    until(lambda: rows(tmp_path/"a") >= 2, p)
    os.kill(p.pid, signal.SIGTERM)
    p.join(120)
    done = rows(tmp_path/"a")
    saved = [int(f.name[6:]) for f in (tmp_path/"a"/"checkpoints").iterdir()]
    assert p.exitcode not in (0, None) and saved in ([done], [done - 1])               # it may come while the last epoch is being copied
    assert f"saved up to epoch_{saved[0]:04d}: resume with --resume_from {tmp_path/'a'}" in (tmp_path/"log").read_text()
    state = T.setup(small(tmp_path, num_epochs=50, save_freq=20, sample_num_steps=10, resume_from="a"))
    assert state.epoch == saved[0] and state.folder == tmp_path/"a"


@pytest.mark.parametrize("at", [1, 4], ids=["in the middle of epoch 3", "at the end of epoch 2"])
def test_leaving_the_loop_saves_what_was_not(tmp_path, at):
    steps = T.train(small(tmp_path, run_name="a", num_epochs=9, save_freq=5))
    for _ in range(4 + at % 4): next(steps)
    steps.close()
    assert T.setup(small(tmp_path, num_epochs=9, save_freq=5, resume_from=str(tmp_path/"a"))).epoch == 2


def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch):
    state = T.setup(small(tmp_path, run_name="a", num_epochs=3))
    steps = T.train(state=state)
    for _ in range(2): next(steps)                                                     # epoch 1 is saved
    def full(path, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no checkpoint of epoch 2 .*No space left on device; make room and resume"): list(steps)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path/"a"/"checkpoints").iterdir()] == ["epoch_0001"]
    assert trained(small(tmp_path, num_epochs=3, resume_from=str(tmp_path/"a"))).epoch == 3


def test_a_reward_that_fails_is_asked_again_then_stops_the_run(tmp_path):
    calls = []
    def shaky(images, prompts, metadata):
        calls.append(1)
        if len(calls) in (2, 4, 5): raise ConnectionError("no answer")
        return images.mean((1, 2, 3))
    config = small(tmp_path, run_name="a", num_epochs=4, reward_retries=1)
    with pytest.raises(RuntimeError, match="reward 'shaky' failed on 8 pictures .* ConnectionError: no answer"): list(T.train(config, reward_fn=shaky))
    assert len(calls) == 5 and T.find_checkpoint(tmp_path/"a").name == "epoch_0002"
    calls += [0]*10
    assert trained(dataclasses.replace(config, run_name="", resume_from=str(tmp_path/"a")), reward_fn=shaky).epoch == 4


OPTIONS = {"gradient_checkpointing": dict(gradient_checkpointing=True), "rollout on the CPU": dict(rollout_device="cpu"), "decoded two at a time": dict(decode_batch_size=2),
           "slices": dict(slicing=True)}

@pytest.fixture(scope="module")
def plain(tmp_path_factory): return trained(small(tmp_path_factory.mktemp("plain"), run_name="a", sample_guidance_scale=2.))

@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_options_of_memory_change_no_number(tmp_path, plain, fields):
    state = trained(small(tmp_path, run_name="a", sample_guidance_scale=2., **fields))
    for a, b in zip(numbers(plain.folder), numbers(state.folder), strict=True):
        assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=2e-3) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    assert distance(plain, state) < .02

def distance(a, b):
    "Of two trained LoRAs, relative to what training moved: their B matrices start from zero."
    a, b = (torch.cat([p.detach().flatten() for name, p in s.denoiser.pipe.unet.named_parameters() if "lora_B" in name]) for s in (a, b))
    return ((a - b).norm()/a.norm()).item()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_trajectories_in_half_precision_take_half_the_memory_and_replay_exactly(tmp_path, plain, dtype):
    config = small(tmp_path, run_name="a", sample_guidance_scale=2., rollout_dtype=dtype, train_batch_size=8, train_micro_batch_size=8, num_epochs=3)
    state = T.setup(config)
    r = T.collect(state).rollout
    assert r.xs.element_size() == 2 and r.log_probs.dtype == torch.float32
    with torch.no_grad(): again = replay_log_prob(state.denoiser, r, config.sample_eta)
    assert torch.equal(again, r.log_probs), "ratio 1, bit for bit"
    whole = trained(dataclasses.replace(config, run_name="whole"))
    for step in T.train(dataclasses.replace(config, run_name="part")):
        if step.epoch == 2: break
    T.fit(dataclasses.replace(config, run_name="", resume_from=str(tmp_path/"part")))
    assert numbers(whole.folder) == numbers(tmp_path/"part")
    assert numbers(whole.folder)[0]["reward_mean"] == pytest.approx(numbers(plain.folder)[0]["reward_mean"], abs=.1 if dtype == "bf16" else .02)  # kB


def test_weighted_regression_on_half_precision_pictures(tmp_path):
    state = trained(small(tmp_path, run_name="a", method="rwr", rollout_dtype="fp16", num_epochs=1))
    assert state.epoch == 1 and state.global_step == 2


def test_runs_that_start_together_take_folders_of_their_own(tmp_path):
    a, b = (T.setup(small(tmp_path, num_epochs=1)) for _ in range(2))
    assert a.folder == b.folder
    for state in (a, b): list(T.train(state=state))
    assert a.folder != b.folder and len(read_metrics(a.folder)) == len(read_metrics(b.folder)) == 1
    c, d = (T.setup(small(tmp_path, num_epochs=1, run_name="mine")) for _ in range(2))
    list(T.train(state=c))
    with pytest.raises(ValueError, match="already holds a run"): list(T.train(state=d))
    assert len(read_metrics(c.folder)) == 1


def test_another_number_of_processes_is_refused(tmp_path):
    state = trained(small(tmp_path, run_name="a", num_epochs=1))
    path = T.find_checkpoint(state.folder)/"state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(world=8)))
    with pytest.raises(ValueError, match="trained by 8 processes, and now there are 1"): T.setup(small(tmp_path, resume_from=str(state.folder)))


def test_looks_begin_with_the_base_model_or_not_at_all(tmp_path):
    "Under full fine-tuning the base model is gone when a run is resumed."
    full = dict(use_lora=False, train_learning_rate=1e-5)
    state = trained(small(tmp_path, run_name="a", num_epochs=1, **full))
    with pytest.raises(ValueError, match="no fixed-seed pictures from before training"): T.setup(small(tmp_path, resume_from=str(state.folder), eval_num_images=2, eval_freq=1, **full))


def test_steps_that_float16_cannot_take_are_counted(tmp_path, monkeypatch):
    from accelerate.optimizer import AcceleratedOptimizer
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self.state_of_test.global_step % 2 == 0), raising=False)
    state = T.setup(small(tmp_path, run_name="a", num_epochs=1, ema_decay=.5))
    state.optimizer.state_of_test = state
    steps = list(T.train(state=state))
    assert [s.grad_norm != s.grad_norm for s in steps] == [True, False] and state.average.optimization_step == 1
    assert numbers(state.folder)[0]["grad_norm"] == pytest.approx(steps[1].grad_norm) and "NaN" not in (state.folder/"metrics.jsonl").read_text()
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    with pytest.raises(FloatingPointError, match="20 steps in a row .* float16 cannot hold, the last at epoch 10, optimizer step 20"): list(T.train(small(tmp_path, run_name="b", num_epochs=30)))


def test_extras_of_any_kind_are_no_obstacle(tmp_path):
    calls = []
    def reward(images, prompts, metadata):
        calls.append(1)
        return images.mean((1, 2, 3)), dict(words=list(prompts), nothing=[None]*len(images), numbers=list(range(len(images)))) | ({} if len(calls) == 2 else dict(now_and_then=[1.]*len(images)))
    state = trained(small(tmp_path, run_name="a", num_epochs=1, sample_num_batches_per_epoch=2), reward_fn=reward)
    row = numbers(state.folder)[0]
    assert row["reward/numbers"] == 3.5 and not {"reward/words", "reward/nothing", "reward/now_and_then"} & set(row)


def test_a_denoiser_that_is_brought_along_is_used_as_the_config_says(tmp_path):
    denoiser = denoiser_for(load_pipeline("tiny"), 5., "blue")
    state = T.setup(small(tmp_path, sample_guidance_scale=2., negative_prompts="red"), denoiser=denoiser)
    assert (state.denoiser.guidance_scale, state.denoiser.negative_prompt) == (2., "red")


def test_an_offloaded_reward_comes_back_for_each_look(tmp_path):
    where = []
    class Moves:
        differentiable, name = False, "moves"
        def to(self, device): where.append(str(device)); return self
        def __call__(self, images, prompts, metadata): return images.mean((1, 2, 3))
    trained(small(tmp_path, reward_offload=True, num_epochs=1, eval_num_images=2, eval_freq=1), reward_fn=Moves())
    assert where == ["cpu", "cpu"]*3                                                   # first look, samples, last look: to the device, which is the CPU here, and away


def test_gradient_checkpointing_is_on(tmp_path):
    state = T.setup(small(tmp_path, gradient_checkpointing=True))
    assert state.denoiser.pipe.unet.is_gradient_checkpointing and any(getattr(m, "gradient_checkpointing", False) for m in state.denoiser.pipe.unet.modules())


def test_a_kl_penalty_under_full_fine_tuning_keeps_a_copy_of_the_base_model(tmp_path):
    steps = [s for s in T.train(small(tmp_path, run_name="a", use_lora=False, train_learning_rate=1e-4, kl_weight=.1))]
    assert steps[0].kl == 0 and steps[-1].kl > 0


def test_negative_prompts_are_what_guidance_leaves(tmp_path):
    a, b = (T.setup(small(tmp_path, sample_guidance_scale=2., negative_prompts=n)).denoiser.encode(["a fox"]) for n in ("", "a blue background"))
    assert torch.equal(a.cond, b.cond) and not torch.equal(a.uncond, b.uncond)


def test_a_compiled_policy_trains_resumes_and_saves_its_lora(tmp_path, monkeypatch):
    "Traced, but run by the eager backend, so that the test does not wait for a compiler."
    compiled = []
    def compile_(module): compiled.append(module); module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", dynamic=True)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    plain = trained(small(tmp_path, run_name="plain"))
    config = small(tmp_path, run_name="a", compile=True)
    for step in T.train(config):
        if step.epoch == 2: break
    folder = T.fit(dataclasses.replace(config, run_name="", resume_from=str(tmp_path/"a")))
    assert compiled and numbers(folder)[-1]["reward_mean"] == pytest.approx(numbers(plain.folder)[-1]["reward_mean"], abs=2e-3)
    assert load_lora(load_pipeline("tiny"), folder).unet.peft_config


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_diffusers(tmp_path, schedule):
    from diffusers.optimization import get_scheduler
    config, found = small(tmp_path, train_lr_schedule=schedule, train_lr_warmup_steps=2, num_epochs=3), []
    state = T.setup(config)
    for _ in T.train(state=state): found.append(state.optimizer.param_groups[0]["lr"])
    optimizer = torch.optim.SGD([torch.zeros(1)], config.train_learning_rate)
    reference, want = get_scheduler("constant_with_warmup" if schedule == "constant" else schedule, optimizer, num_warmup_steps=2, num_training_steps=6), []
    for _ in range(6):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert found == pytest.approx(want, rel=1e-12)


def test_scheduled_and_averaged_runs_resume_to_the_same_numbers(tmp_path):
    fields = dict(train_lr_schedule="cosine", train_lr_warmup_steps=1, ema_decay=.5, num_epochs=3)
    whole = trained(small(tmp_path, run_name="whole", **fields))
    for step in T.train(small(tmp_path, run_name="cut", **fields)):
        if step.epoch == 2: break
    with pytest.raises(ValueError, match="num_epochs was 3, now 4"): T.setup(small(tmp_path, resume_from=str(tmp_path/"cut"), **fields | dict(num_epochs=4)))
    resumed = trained(small(tmp_path, resume_from=str(tmp_path/"cut"), **fields))
    assert numbers(tmp_path/"cut") == numbers(tmp_path/"whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.average.shadow_params, resumed.average.shadow_params))


def test_the_average_is_the_one_of_its_definition_and_is_what_is_saved(tmp_path):
    state = T.setup(small(tmp_path, run_name="a", ema_decay=.9))
    shadow, n = [p.detach().clone() for p in state.params], 0
    for _ in T.train(state=state):
        decay = min(.9, (1 + n)/(10 + n)) if n else 0.                                 # it warms up: the first average is the first weights
        shadow, n = [decay*s + (1 - decay)*p.detach() for s, p in zip(shadow, state.params)], n + 1
    for a, b in zip(shadow, state.average.shadow_params): torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    last = [p.detach().clone() for p in state.params]
    with T._averaged(state): assert all(torch.equal(p, s) for p, s in zip(state.params, state.average.shadow_params))
    assert all(torch.equal(a, b) for a, b in zip(last, state.params)) and not torch.equal(last[0], state.average.shadow_params[0])


def test_8bit_adam_without_bitsandbytes_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"): T.setup(small(tmp_path, train_use_8bit_adam=True))
    assert not list(tmp_path.iterdir())


SCRIPT = '''
import json, sys, torch
from ddpo_scratch import train as T
torch.set_num_threads(1)
out, where, configs = {}, sys.argv[1], json.loads(sys.argv[2])
for name, fields in configs.items():
    state = T.setup(T.TrainConfig(**fields))
    steps = list(T.train(state=state))
    out[name] = dict(params=[p.detach() for p in state.params], named=[n for n, p in state.denoiser.pipe.unet.named_parameters() if p.requires_grad], rewards=[s.metrics["reward_mean"] for s in steps if s.metrics],
                     tracker=state.tracker.state_dict()["stats"], queries=state.reward_queries, grad_norms=[s.grad_norm for s in steps])
torch.save(out, f"{where}/rank{state.accelerator.process_index}.pt")
'''

def test_one_process_and_two_make_the_same_updates(tmp_path):
    "Traps 1 and 8 of TRL: gradients are synchronised, and rewards are gathered before they become advantages."
    (tmp_path/"script.py").write_text(SCRIPT)
    def configs(world): return {method: dict(SMALL, logdir=str(tmp_path/f"{method}{world}"), method=method, eval_num_images=2, eval_freq=1, sample_batch_size=8//world, train_batch_size=8//world,
                                             per_prompt_stat_tracking_min_count=2, **more)
                                for method, more in dict(ddpo_is=dict(train_num_inner_epochs=2), alignprop=dict(reward_fn="brightness", sample_num_steps=3)).items()}
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
    found = {}
    for world, start in ((1, [sys.executable]), (2, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        (tmp_path/str(world)).mkdir()
        done = subprocess.run([*start, str(tmp_path/"script.py"), str(tmp_path/str(world)), json.dumps(configs(world))], env=env, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        found[world] = [torch.load(f, weights_only=True) for f in sorted((tmp_path/str(world)).glob("rank*.pt"))]
    (one,), (first, second) = found[1], found[2]
    for method in one:
        a, b, c = one[method], first[method], second[method]
        assert all(torch.equal(x, y) for x, y in zip(b["params"], c["params"]))                            # both processes hold one policy
        assert a["queries"] == b["queries"] and b["tracker"] == c["tracker"] and a["rewards"] == pytest.approx(b["rewards"], abs=2e-3)
        assert a["grad_norms"][0] == pytest.approx(b["grad_norms"][0], rel=1e-4)
        x, y = (torch.cat([p.flatten() for n, p in zip(r["named"], r["params"]) if "lora_B" in n]) for r in (a, b))
        assert ((x - y).norm()/x.norm()) < .02, method


SHARDED = '''
import dataclasses, json, sys, torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from ddpo_scratch import train as T
# accelerate shards on devices alone (state.py: MULTI_GPU becomes FSDP, MULTI_CPU never does, and DeepSpeed asks for "not cpu"), so two CPUs are called GPUs here
PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
torch.set_num_threads(1)
where, configs, out = sys.argv[1], {k: T.TrainConfig(**v) for k, v in json.loads(sys.argv[2]).items()}, {"errors": []}
for config in configs.values(): T.fit(config)

cut = dataclasses.replace(configs["ddpo_is"], run_name="cut")
for step in T.train(cut):
    if step.epoch == 2: break                                                          # epoch 1 is saved
T.fit(dataclasses.replace(cut, run_name="", resume_from=f"{cut.logdir}/cut"))

state, loss_of = T.setup(dataclasses.replace(cut, run_name="nan")), T._policy_loss
local = lambda: [getattr(p, "_local_tensor", p).detach().clone() for p in state.params]
before = local()
def bad_gradient(*args): loss, gauges = loss_of(*args); return loss + (loss - loss.detach()).abs().sqrt(), gauges
def bad_loss(*args): loss, gauges = loss_of(*args); return loss*float("inf"), gauges
for T._policy_loss in (bad_gradient, bad_loss):
    try: next(T.train(state=state))
    except FloatingPointError as e: out["errors"].append(str(e))
out["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, local()))
out["held"] = sum(getattr(p, "_local_tensor", p).numel() for g in state.optimizer.param_groups for p in g["params"])
torch.save(out, f"{where}/rank{state.accelerator.process_index}.pt")
'''

FULL = dict(use_lora=False, train_learning_rate=1e-4, train_adam_epsilon=1e-6, train_lr_schedule="linear", sample_num_steps=3, per_prompt_stat_tracking_min_count=2)

def whole_runs(tmp_path, world, **more):
    "Fields of runs of 4 pictures an update and 2 updates an epoch: DDPO-IS in micro-batches with a KL penalty, AlignProp in two accumulated minibatches."
    runs = dict(ddpo_is=dict(sample_batch_size=4//world, train_batch_size=4//world, train_micro_batch_size=4, train_num_inner_epochs=2, kl_weight=.1, eval_num_images=4, eval_freq=1),
                alignprop=dict(method="alignprop", reward_fn="brightness", sample_batch_size=8//world, train_batch_size=2//world, train_gradient_accumulation_steps=2,
                               backprop_checkpointing=True))
    return {k: SMALL | FULL | dict(logdir=str(tmp_path/f"{k}{world}"), run_name="a", **v, **more) for k, v in runs.items()}

def weights(folder): return torch.cat([p.detach().flatten() for p in load_pipeline(str(folder)).unet.parameters()])

no_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed, and no requirement of this project: pip install deepspeed")

@pytest.mark.parametrize("name, more", [("fsdp", {}), pytest.param("deepspeed_zero2", dict(ema_decay=.5), marks=no_deepspeed)], ids=["FSDP", "ZeRO-2"])
def test_sharded_full_fine_tuning_makes_the_updates_of_one_process_resumes_and_saves_all_weights(tmp_path, name, more):
    torch.set_num_threads(1)
    (tmp_path/"script.py").write_text(SHARDED)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT/"configs"/f"{name}.yaml"), "--num_processes", "2", "--main_process_port", "0",
             "--num_cpu_threads_per_process", "1"]
    done = subprocess.run([*launch, str(tmp_path/"script.py"), str(tmp_path), json.dumps(whole_runs(tmp_path, 2, **more))], capture_output=True, text=True, timeout=1500,
                          env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu"))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path/f"rank{k}.pt", weights_only=True) for k in (0, 1))
    start = weights("tiny")
    for k, fields in whole_runs(tmp_path, 1, **more).items():
        one, two = T.fit(T.TrainConfig(**fields)), tmp_path/f"{k}2"/"a"
        for a, b in zip(numbers(one), numbers(two), strict=True):
            assert a["global_step"] == b["global_step"] == 2*a["epoch"] and a["lr"] == b["lr"]
            assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=2e-3) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert (weights(one/"pipeline") - weights(two/"pipeline")).norm() < .02*(weights(one/"pipeline") - start).norm(), k
    resumed = tmp_path/"ddpo_is2"/"cut"
    assert numbers(resumed) == numbers(tmp_path/"ddpo_is2"/"a") and torch.equal(weights(resumed/"pipeline"), weights(tmp_path/"ddpo_is2"/"a"/"pipeline"))
    for rank in (first, second):
        assert .45 < rank["held"]/len(start) < .55 and rank["unchanged"] and ["the gradient norm is" in e for e in rank["errors"]] == [True, False]


REFUSED = [("FSDP", dict(use_lora=True), "LoRA .*several_gpus.yaml"), ("FSDP", dict(ema_decay=.9), "ema_decay .*deepspeed_zero2.yaml"), ("FSDP", dict(mixed_precision="fp16"), "'bf16' or 'no'"),
           ("DEEPSPEED", dict(mixed_precision="bf16"), "fsdp.yaml"), ("DEEPSPEED", dict(train_use_8bit_adam=True), "leave train_use_8bit_adam off")]

@pytest.mark.parametrize("engine, fields, said", REFUSED, ids=[f"{e} {next(iter(f))}" for e, f, _ in REFUSED])
def test_what_cannot_be_sharded_is_refused(engine, fields, said):
    from accelerate.utils import DistributedType
    acc = types.SimpleNamespace(distributed_type=DistributedType(engine), is_fsdp2=engine == "FSDP", deepspeed_plugin=types.SimpleNamespace(zero_stage=2))
    T._check_engine(T.TrainConfig(use_lora=False), acc)
    with pytest.raises(ValueError, match=f"under {engine}: .*{said}"): T._check_engine(T.TrainConfig(**dict(use_lora=False) | fields), acc)
    acc.is_fsdp2, acc.deepspeed_plugin.zero_stage = False, 3
    with pytest.raises(ValueError, match="fsdp_version|zero_stage"): T._check_engine(T.TrainConfig(use_lora=False), acc)


def test_a_sharded_checkpoint_is_not_resumed_unsharded(tmp_path):
    saved = T.save_checkpoint(T.setup(small(tmp_path, run_name="a")))/"state.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"engine": "FSDP"}))
    with pytest.raises(ValueError, match="saved under FSDP, but this run is unsharded: resume it with the accelerate configuration"): T.setup(small(tmp_path, resume_from="a"))


@pytest.mark.parametrize("path", sorted((ROOT/"configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_every_config_and_each_says_whether_it_was_run(path):
    from accelerate.commands.config.config_args import load_config_from_file
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and str(config.mixed_precision) == "no"
    assert "un" in (first := path.read_text().splitlines()[0]) and ("Not run" in first or "Run:" in first)
