"The engine: killed and interrupted runs, full disks, several processes, options of memory."

import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import signal
import sys
import time
import types
from pathlib import Path
from unittest import mock

import processes
import pytest
import sd_models
import torch
from runs import SMALL, copies, leave_in, numbers, random_model, same, small, trained

from ddpo_scratch.run.checkpoint import find_checkpoint, save_checkpoint
from ddpo_scratch.config import TrainConfig
from ddpo_scratch.run.engine import Engine, FSDPEngine, ZeRO2Engine, check_engine
from ddpo_scratch.run.look import averaged
from ddpo_scratch.models.sd import denoiser_for, load_lora, load_pipeline
from ddpo_scratch.rollout import replay_log_prob
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.run.setup import setup
from ddpo_scratch.train import collect, fit, train

ROOT = Path(__file__).parents[1]


def rows(folder):
    path = Path(folder) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _child(fields, run, log):
    torch.set_num_threads(1)
    with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file):
        for _ in {"fit": lambda c: [fit(c)], "train": train}[run](TrainConfig(**fields)):
            pass


def child(config, log, run="train"):
    "Run in another process."
    process = processes.CONTEXT.Process(
        target=_child, args=(dataclasses.asdict(config), run, str(log))
    )
    process.start()
    return process


def until(true, process, seconds=300):
    "Wait for something that a process does; fail if it dies first, or never does it."
    end = time.monotonic() + seconds
    while not true():
        assert process.is_alive() and time.monotonic() < end, f"exit code {process.exitcode}"
        time.sleep(0.02)


# Killed, stopped, out of space.


def test_a_run_killed_at_random_moments_ends_with_the_same_numbers(tmp_path):
    torch.set_num_threads(1)
    whole = trained(small(tmp_path, run_name="whole", num_epochs=5))
    moments, config = random.Random(3), small(tmp_path, run_name="cut", num_epochs=5)
    for after in (1, 3):
        process, start = child(config, tmp_path / "log"), time.monotonic()
        until(lambda after=after: rows(tmp_path / "cut") >= after, process)
        # somewhere in the next epoch, or in saving this one
        time.sleep(moments.uniform(0, 0.3) * (time.monotonic() - start) / after)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert list((tmp_path / "cut").glob("checkpoints/epoch_*"))
        config = small(tmp_path, num_epochs=5, resume_from=str(tmp_path / "cut"))
    resumed = trained(config)
    assert numbers(resumed.folder) == numbers(tmp_path / "whole")
    assert same(whole.params, resumed.params)


def test_sigterm_saves_what_was_not_and_says_where(tmp_path):
    torch.set_num_threads(1)
    fields = dict(num_epochs=50, save_freq=20, sample_num_steps=10)
    process = child(small(tmp_path, run_name="a", **fields), tmp_path / "log", "fit")
    until(lambda: rows(tmp_path / "a") >= 2, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    done = rows(tmp_path / "a")
    saved = [int(path.name[6:]) for path in (tmp_path / "a" / "checkpoints").iterdir()]
    # it may come while the last epoch is being copied
    assert process.exitcode not in (0, None) and saved in ([done], [done - 1])
    message = f"saved up to epoch_{saved[0]:04d}: resume with --resume_from {tmp_path / 'a'}"
    assert message in (tmp_path / "log").read_text()
    state = setup(small(tmp_path, resume_from="a", **fields))
    assert state.epoch == saved[0] and state.folder == tmp_path / "a"


@pytest.mark.parametrize("steps", [5, 4], ids=["in the middle of epoch 3", "at the end of epoch 2"])
def test_leaving_the_loop_saves_what_was_not(tmp_path, steps):
    fields = dict(num_epochs=9, save_freq=5)
    loop = train(small(tmp_path, run_name="a", **fields))
    for _ in range(steps):
        next(loop)
    loop.close()
    assert setup(small(tmp_path, resume_from=str(tmp_path / "a"), **fields)).epoch == 2


def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch):
    loop = train(small(tmp_path, run_name="a", num_epochs=3))
    for _ in range(2):
        next(loop)  # epoch 1 is saved

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    message = "no checkpoint of epoch 2 .*No space left on device; make room and resume"
    with pytest.raises(OSError, match=message):
        list(loop)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["epoch_0001"]
    assert trained(small(tmp_path, num_epochs=3, resume_from=str(tmp_path / "a"))).epoch == 3


def test_a_reward_that_fails_is_asked_again_then_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # pauses between tries
    calls = []

    def shaky(images, prompts, metadata):
        calls.append(1)
        if len(calls) in (2, 4, 5):
            raise ConnectionError("no answer")
        return images.mean((1, 2, 3))

    fields = dict(num_epochs=4, reward_retries=1)
    message = "reward 'shaky' failed on 8 pictures .* ConnectionError: no answer"
    with pytest.raises(RuntimeError, match=message):
        list(train(small(tmp_path, run_name="a", **fields), reward_fn=shaky))
    assert len(calls) == 5 and find_checkpoint(tmp_path / "a").name == "epoch_0002"
    calls += [0] * 10
    resumed = small(tmp_path, resume_from=str(tmp_path / "a"), **fields)
    assert trained(resumed, reward_fn=shaky).epoch == 4


def test_extras_of_any_kind_are_no_obstacle(tmp_path):
    calls = []

    def talkative(images, prompts, metadata):
        calls.append(1)
        n = len(images)
        extras = dict(words=list(prompts), nothing=[None] * n, numbers=list(range(n)))
        if len(calls) != 2:
            extras["now_and_then"] = [1.0] * n
        return images.mean((1, 2, 3)), extras

    config = small(tmp_path, num_epochs=1, sample_num_batches_per_epoch=2)
    row = numbers(trained(config, reward_fn=talkative).folder)[0]
    assert row["reward/numbers"] == 3.5
    assert not {"reward/words", "reward/nothing", "reward/now_and_then"} & set(row)


def test_an_offloaded_reward_comes_back_for_each_look(tmp_path):
    where = []

    class Moves:
        differentiable, name = False, "moves"

        def to(self, device):
            where.append(str(device))
            return self

        def __call__(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

    fields = dict(reward_offload=True, num_epochs=1, eval_num_images=2, eval_freq=1)
    trained(small(tmp_path, **fields), reward_fn=Moves())
    # first look, samples, last look: to the device, which is the CPU here, and away
    assert where == ["cpu", "cpu"] * 3


def test_a_denoiser_that_is_brought_along_is_used_as_the_config_says(tmp_path):
    denoiser = denoiser_for(load_pipeline(random_model()), 5.0, "blue")
    config = small(tmp_path, sample_guidance_scale=2.0, negative_prompts="red")
    state = setup(config, denoiser=denoiser)
    assert state.denoiser is denoiser
    assert (denoiser.guidance_scale, denoiser.negative_prompt) == (2.0, "red")


# Options of memory and speed.

# a smooth reward: between file sizes, rounding could make the difference of a byte
SMOOTH = dict(reward_fn="brightness", sample_guidance_scale=2.0)
OPTIONS = {
    "gradient_checkpointing": dict(gradient_checkpointing=True),
    "rollout on the CPU": dict(rollout_device="cpu"),
    "decoded two at a time": dict(decode_batch_size=2),
    "slices": dict(slicing=True),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return trained(small(folder, run_name="a", **SMOOTH))


def lora_b(state):
    "The matrices of a LoRA that start from zero: what training moved."
    named = state.denoiser.network.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if "lora_B" in name])


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_options_of_memory_change_no_number(tmp_path, plain, fields):
    state = trained(small(tmp_path, run_name="a", **SMOOTH, **fields))
    for a, b in zip(numbers(plain.folder), numbers(state.folder), strict=True):
        assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    a, b = lora_b(plain), lora_b(state)
    assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_trajectories_take_half_the_memory_and_replay_exactly(
    tmp_path, plain, dtype
):
    fields = dict(rollout_dtype=dtype, train_batch_size=8, train_micro_batch_size=8, num_epochs=2)
    config = small(tmp_path, run_name="whole", **SMOOTH, **fields)
    state = setup(config)
    rollout = collect(state).rollout
    assert rollout.xs.element_size() == 2 and rollout.log_probs.dtype == torch.float32
    with torch.no_grad():
        again = replay_log_prob(state.denoiser, rollout, config.sample_eta)
    assert torch.equal(again, rollout.log_probs), "ratio 1, bit for bit"
    whole = trained(config)
    leave_in(dataclasses.replace(config, run_name="part"), epoch=1)
    trained(dataclasses.replace(config, run_name="", resume_from=str(tmp_path / "part")))
    assert numbers(whole.folder) == numbers(tmp_path / "part")
    first, exact = (numbers(s.folder)[0]["reward_mean"] for s in (whole, plain))
    assert first != exact and first == pytest.approx(exact, abs=3e-4 if dtype == "bf16" else 3e-5)


def test_weighted_regression_on_half_precision_pictures(tmp_path):
    config = small(tmp_path, run_name="a", method="rwr", rollout_dtype="fp16", num_epochs=1)
    state = trained(config)
    assert state.epoch == 1 and state.global_step == 2


def test_gradient_checkpointing_is_on(tmp_path):
    network = setup(small(tmp_path, gradient_checkpointing=True)).denoiser.network
    assert network.is_gradient_checkpointing
    assert any(getattr(part, "gradient_checkpointing", False) for part in network.modules())


def test_a_kl_penalty_under_full_fine_tuning_keeps_a_copy_of_the_base_model(tmp_path):
    fields = dict(use_lora=False, train_learning_rate=1e-4, kl_weight=0.1)
    steps = list(train(small(tmp_path, **fields)))
    assert steps[0].kl == 0 and steps[-1].kl > 0


def test_negative_prompts_are_what_guidance_leaves(tmp_path):
    a, b = (
        setup(small(tmp_path, sample_guidance_scale=2.0, negative_prompts=prompt))
        for prompt in ("", "a blue background")
    )
    a, b = a.denoiser.encode(["a fox"]), b.denoiser.encode(["a fox"])
    assert torch.equal(a.cond, b.cond) and not torch.equal(a.uncond, b.uncond)


def test_a_compiled_policy_trains_resumes_and_saves_its_lora(tmp_path, monkeypatch):
    "Traced, but run by the eager backend; a U-Net of one level, of which each layer is traced."
    compiled = []

    def compile_eagerly(network):
        compiled.append(network)
        call = torch.compile(network._call_impl, backend="eager", dynamic=True)
        network._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    model = sd_models.folder("one level")
    plain = trained(small(tmp_path, run_name="plain", model=model, **SMOOTH))
    config = small(tmp_path, run_name="a", model=model, compile=True, **SMOOTH)
    leave_in(config, epoch=2)
    folder = fit(dataclasses.replace(config, run_name="", resume_from=str(tmp_path / "a")))
    a, b = (numbers(f)[-1]["reward_mean"] for f in (folder, plain.folder))
    assert compiled and a == pytest.approx(b, abs=1e-5)
    assert load_lora(load_pipeline(model), folder).unet.peft_config


# Folders and processes.


def test_runs_that_start_together_take_folders_of_their_own(tmp_path):
    a, b = (setup(small(tmp_path, num_epochs=1)) for _ in range(2))
    assert a.folder == b.folder
    for state in (a, b):
        list(train(state=state))
    assert a.folder != b.folder and len(read_metrics(a.folder)) == len(read_metrics(b.folder)) == 1
    c, d = (setup(small(tmp_path, num_epochs=1, run_name="mine")) for _ in range(2))
    list(train(state=c))
    with pytest.raises(ValueError, match="already holds a run"):
        list(train(state=d))
    assert len(read_metrics(c.folder)) == 1


def edited_checkpoint(tmp_path, **fields):
    "Save a checkpoint, and change what its state.json says."
    path = save_checkpoint(setup(small(tmp_path, run_name="a"))) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_another_number_of_processes_is_refused(tmp_path):
    edited_checkpoint(tmp_path, world=8)
    with pytest.raises(ValueError, match="trained by 8 processes, and now there is 1"):
        setup(small(tmp_path, resume_from="a"))


def test_a_sharded_checkpoint_is_not_resumed_unsharded(tmp_path):
    edited_checkpoint(tmp_path, engine="FSDP")
    with pytest.raises(ValueError, match="saved under FSDP, but this run is unsharded: resume it"):
        setup(small(tmp_path, resume_from="a"))


def test_looks_begin_with_the_base_model_or_not_at_all(tmp_path):
    "Under full fine-tuning the base model is gone when a run is resumed."
    full = dict(use_lora=False, train_learning_rate=1e-5)
    folder = str(trained(small(tmp_path, num_epochs=1, **full)).folder)
    with pytest.raises(ValueError, match="no fixed-seed pictures from before training"):
        setup(small(tmp_path, resume_from=folder, eval_num_images=2, eval_freq=1, **full))


# Learning rates, averages, precision.


def test_steps_that_float16_cannot_take_are_counted(tmp_path, monkeypatch):
    state = setup(small(tmp_path, run_name="a", num_epochs=1, ema_decay=0.5))
    kind = type(state.optimizer)
    every_other = property(lambda self: state.global_step % 2 == 0)
    monkeypatch.setattr(kind, "step_was_skipped", every_other)
    first, second = train(state=state)
    assert first.grad_norm != first.grad_norm and second.grad_norm == second.grad_norm
    assert state.average.optimization_step == 1
    assert numbers(state.folder)[0]["grad_norm"] == pytest.approx(second.grad_norm)
    assert "NaN" not in (state.folder / "metrics.jsonl").read_text()
    monkeypatch.setattr(kind, "step_was_skipped", True)
    message = "20 steps in a row .* cannot hold, the last at epoch 10, optimizer step 20"
    with pytest.raises(FloatingPointError, match=message):
        list(train(small(tmp_path, run_name="b", num_epochs=30)))


def test_the_scale_of_float16s_gradients_is_resumed(tmp_path, monkeypatch):
    "Without it a resumed run would begin at 65,536 again, and skip the steps that brought it down."
    whole, initial = Engine.__init__, 128.0

    def with_scaler(self, accelerator):
        whole(self, accelerator)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=initial)

    monkeypatch.setattr(Engine, "__init__", with_scaler)
    leave_in(small(tmp_path, run_name="cut"), epoch=2)
    initial = 65536.0
    resumed = setup(small(tmp_path, resume_from=str(tmp_path / "cut")))
    assert resumed.engine.scaler.get_scale() == 128.0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_diffusers(tmp_path, schedule):
    from diffusers.optimization import get_scheduler

    fields = dict(train_lr_schedule=schedule, train_lr_warmup_steps=2, num_epochs=3)
    state = setup(small(tmp_path, **fields))
    found = [state.optimizer.param_groups[0]["lr"] for _ in train(state=state)]
    optimizer = torch.optim.SGD([torch.zeros(1)], state.config.train_learning_rate)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=6)
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert found == pytest.approx(expected, rel=1e-12)


def test_scheduled_and_averaged_runs_resume_to_the_same_numbers(tmp_path):
    schedule = dict(train_lr_schedule="cosine", train_lr_warmup_steps=1, ema_decay=0.5)
    whole = trained(small(tmp_path, run_name="whole", num_epochs=3, **schedule))
    leave_in(small(tmp_path, run_name="cut", num_epochs=3, **schedule), epoch=2)
    schedule["resume_from"] = str(tmp_path / "cut")
    with pytest.raises(ValueError, match="num_epochs was 3, now 4"):
        setup(small(tmp_path, num_epochs=4, **schedule))
    resumed = trained(small(tmp_path, num_epochs=3, **schedule))
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert same(whole.average.shadow_params, resumed.average.shadow_params)


def test_the_average_is_the_one_of_its_definition_and_is_what_is_saved(tmp_path):
    state = setup(small(tmp_path, run_name="a", ema_decay=0.9))
    shadow, n = copies(state.params), 0
    for _ in train(state=state):
        # it warms up: the first average is the first weights
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        shadow = [decay * s + (1 - decay) * p.detach() for s, p in zip(shadow, state.params)]
        n += 1
    averages = state.average.shadow_params
    torch.testing.assert_close(shadow, averages, atol=1e-7, rtol=1e-5)
    last = copies(state.params)
    with averaged(state):
        assert same(state.params, averages)
    assert same(last, state.params)
    assert not torch.equal(last[0], averages[0])


def test_8bit_adam_without_bitsandbytes_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        setup(small(tmp_path, train_use_8bit_adam=True))
    assert not list(tmp_path.iterdir())


# Two processes.

SCRIPT = """
import json, sys, torch
from ddpo_scratch.config import TrainConfig
from ddpo_scratch.train import setup, train

torch.set_num_threads(1)
GAUGES = "loss approx_kl clip_fraction ratio_spread advantage_spread k kl".split()
out, where, configs = {}, sys.argv[1], json.loads(sys.argv[2])
for name, fields in configs.items():
    state = setup(TrainConfig(**fields))
    steps = list(train(state=state))
    named = state.denoiser.network.named_parameters()
    moved = [p.detach().flatten() for n, p in named if p.requires_grad and "lora_B" in n]
    out[name] = dict(
        params=[p.detach() for p in state.params],
        moved=torch.cat(moved),
        rewards=[step.metrics["reward_mean"] for step in steps if step.metrics],
        method=state.method.state_dict(),
        queries=state.reward_queries,
        grad_norms=[step.grad_norm for step in steps],
        gauges=[
            {n: v for n, v in (vars(step) | step.metrics).items() if n in GAUGES} for step in steps
        ],
    )
torch.save(out, f"{where}/rank{state.engine.rank}.pt")
"""


def shared_runs(tmp_path, world):
    "Fields of runs whose epochs of 8 pictures `world` processes share."
    methods = dict(ddpo_is=dict(train_num_inner_epochs=2), alignprop=dict(sample_num_steps=3))
    sizes = dict(sample_batch_size=8 // world, train_batch_size=8 // world)
    more = dict(eval_num_images=2, eval_freq=1, per_prompt_stat_tracking_min_count=2)
    more |= dict(model=random_model(), reward_fn="brightness")  # a smooth reward
    runs = {}
    for method, fields in methods.items():
        folder = dict(method=method, logdir=str(tmp_path / f"{method}{world}"))
        runs[method] = SMALL | sizes | more | folder | fields
    return runs


def test_one_process_and_two_make_the_same_updates(tmp_path):
    "Traps 1 and 8 of TRL: gradients are synchronised, rewards gathered before advantages."
    (tmp_path / "script.py").write_text(SCRIPT)
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        fields = json.dumps(shared_runs(tmp_path, world))
        script, cpu = tmp_path / "script.py", dict(ACCELERATE_USE_CPU="true")
        processes.run(script, folder, fields, world=world, **cpu)
        found[world] = [torch.load(f, weights_only=True) for f in sorted(folder.glob("rank*.pt"))]
    (one,), (first, second) = found[1], found[2]
    for name in one:
        a, b, c = one[name], first[name], second[name]
        assert all(torch.equal(x, y) for x, y in zip(b["params"], c["params"], strict=True))
        assert a["queries"] == b["queries"] and b["method"] == c["method"]
        assert a["rewards"] == pytest.approx(b["rewards"], abs=1e-5)
        assert a["grad_norms"][0] == pytest.approx(b["grad_norms"][0], rel=1e-4)
        assert (a["moved"] - b["moved"]).norm() < 0.02 * a["moved"].norm(), name
        # every number that is written down is that of all processes
        assert str(b["gauges"]) == str(c["gauges"])  # as text: NaN is not equal to itself
        tolerance = dict(rel=0.05, abs=1e-5, nan_ok=True)
        for mine, all_of_them in zip(a["gauges"], b["gauges"], strict=True):
            assert all_of_them == pytest.approx(mine, **tolerance), name


SHARDED = """
import dataclasses, json, os, sys, torch
import ddpo_scratch.train
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from ddpo_scratch.config import TrainConfig
from ddpo_scratch.train import fit, setup, train

# accelerate shards on devices alone (in its state.py MULTI_GPU becomes FSDP, MULTI_CPU never does,
# and DeepSpeed asks for "not cpu"), so two CPUs are called GPUs here
PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    # DeepSpeed's own sums on CPUs are compiled first, and processes that wait for each other spin
    import deepspeed.comm.torch
    deepspeed.comm.torch.build_shm_op = lambda: None
torch.set_num_threads(1)
where, configs, out = sys.argv[1], json.loads(sys.argv[2]), {"errors": []}
configs = {name: TrainConfig(**fields) for name, fields in configs.items()}
for config in configs.values():
    fit(config)
    # the first run's report is enough: pictures and pages have nothing to do with shards
    ddpo_scratch.train.write_report = lambda *words: dict(findings=[])

cut = dataclasses.replace(configs["ddpo_is"], run_name="cut")
for step in train(cut):
    if step.epoch == 2:
        break  # epoch 1 is saved
fit(dataclasses.replace(cut, run_name="", resume_from=f"{cut.logdir}/cut"))

state = setup(dataclasses.replace(cut, run_name="nan"))
loss_of = state.method.loss

def local():
    return [getattr(p, "_local_tensor", p).detach().clone() for p in state.params]

def bad_gradient(*args):
    losses, gauges = loss_of(*args)
    return losses + (losses - losses.detach()).abs().sqrt(), gauges

def bad_loss(*args):
    losses, gauges = loss_of(*args)
    return losses * float("inf"), gauges

before = local()
for state.method.loss in (bad_gradient, bad_loss):
    try:
        next(train(state=state))
    except FloatingPointError as error:
        out["errors"].append(str(error))
out["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, local()))
held = [p for group in state.optimizer.param_groups for p in group["params"]]
out["held"] = sum(getattr(p, "_local_tensor", p).numel() for p in held)
torch.save(out, f"{where}/rank{state.engine.rank}.pt")
"""

FULL = dict(
    use_lora=False,
    train_learning_rate=1e-4,
    train_adam_epsilon=1e-6,
    train_lr_schedule="linear",
    sample_num_steps=3,
    per_prompt_stat_tracking_min_count=2,
    reward_fn="brightness",
)


def whole_runs(tmp_path, world, **more):
    "Fields of runs of the whole network: 4 pictures an update, 2 updates an epoch."
    micro_batched = dict(
        sample_batch_size=4 // world,
        train_batch_size=4 // world,
        train_micro_batch_size=4,
        train_num_inner_epochs=2,
        kl_weight=0.1,
        eval_num_images=4,
        eval_freq=1,
    )
    accumulated = dict(
        method="alignprop",
        sample_batch_size=8 // world,
        train_batch_size=2 // world,
        train_gradient_accumulation_steps=2,
        backprop_checkpointing=True,
    )
    runs = {}
    for name, fields in dict(ddpo_is=micro_batched, alignprop=accumulated).items():
        folder = dict(logdir=str(tmp_path / f"{name}{world}"), run_name="a")
        runs[name] = SMALL | FULL | folder | fields | dict(model=random_model()) | more
    return runs


def weights(folder):
    parameters = load_pipeline(str(folder)).unet.parameters()
    return torch.cat([p.detach().flatten() for p in parameters])


def launched(name, script):
    "What `accelerate launch` with one of our configs puts into the environment of its processes."
    from accelerate.commands import launch

    found = {}
    words = ["--config_file", str(ROOT / "configs" / f"{name}.yaml"), "--num_processes", "2"]
    words += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1", str(script)]
    # all of accelerate's launcher, up to where torchrun would start the processes
    with mock.patch("torch.distributed.run.run", lambda args: found.update(os.environ)):
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    return {key: value for key, value in found.items() if os.environ.get(key) != value}


def launch_sharded(tmp_path, name, **more):
    "Run the sharded script on two processes; what each of them saw."
    script = tmp_path / "script.py"
    script.write_text(SHARDED)
    fields = json.dumps(whole_runs(tmp_path, 2, **more))
    environment = launched(name, script)
    assert any("FSDP" in key or "DEEPSPEED" in key for key in environment)
    processes.run(script, tmp_path, fields, world=2, **environment)
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


no_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed, and no requirement of this project: pip install deepspeed",
)
SHARDS = [("fsdp", {}), pytest.param("deepspeed_zero2", dict(ema_decay=0.5), marks=no_deepspeed)]


@pytest.mark.parametrize("name, more", SHARDS, ids=["FSDP", "ZeRO-2"])
def test_shards_make_the_updates_of_one_process_resume_and_save_all_weights(
    tmp_path, monkeypatch, name, more
):
    torch.set_num_threads(1)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ranks, start = launch_sharded(tmp_path, name, **more), weights(random_model())
    # of one process only the numbers and weights are wanted
    monkeypatch.setattr("ddpo_scratch.train.write_report", lambda *words: dict(findings=[]))
    for run, fields in whole_runs(tmp_path, 1, **more).items():
        one, two = fit(TrainConfig(**fields)), tmp_path / f"{run}2" / "a"
        for a, b in zip(numbers(one), numbers(two), strict=True):
            assert a["global_step"] == b["global_step"] == 2 * a["epoch"] and a["lr"] == b["lr"]
            assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        a, b = weights(one / "pipeline"), weights(two / "pipeline")
        assert (a - b).norm() < 0.02 * (a - start).norm(), run
    whole, resumed = tmp_path / "ddpo_is2" / "a", tmp_path / "ddpo_is2" / "cut"
    assert numbers(resumed) == numbers(whole)
    assert torch.equal(weights(resumed / "pipeline"), weights(whole / "pipeline"))
    for rank in ranks:
        assert 0.45 < rank["held"] / len(start) < 0.55 and rank["unchanged"]
        assert ["the gradient norm is" in error for error in rank["errors"]] == [True, False]


REFUSED = [
    (FSDPEngine, dict(use_lora=True), "LoRA .*several_gpus.yaml"),
    (FSDPEngine, dict(ema_decay=0.9), "ema_decay .*deepspeed_zero2.yaml"),
    (FSDPEngine, dict(mixed_precision="fp16"), "'bf16' or 'no'"),
    (ZeRO2Engine, dict(mixed_precision="bf16"), "fsdp.yaml"),
    (ZeRO2Engine, dict(train_use_8bit_adam=True), "leave train_use_8bit_adam off"),
]


@pytest.mark.parametrize("kind, fields, message", REFUSED)
def test_what_cannot_be_sharded_is_refused(kind, fields, message):
    accelerator = types.SimpleNamespace(
        device="cpu",
        num_processes=2,
        process_index=0,
        is_main_process=True,
        scaler=None,
        is_fsdp2=True,
        deepspeed_plugin=types.SimpleNamespace(zero_stage=2),
    )
    engine = kind(accelerator)
    check_engine(engine, TrainConfig(use_lora=False))
    with pytest.raises(ValueError, match=f"under {kind.name}: .*{message}"):
        check_engine(engine, TrainConfig(**dict(use_lora=False) | fields))
    accelerator.is_fsdp2, accelerator.deepspeed_plugin.zero_stage = False, 3
    with pytest.raises(ValueError, match="fsdp_version|zero_stage"):
        check_engine(engine, TrainConfig(use_lora=False))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_every_config_and_each_says_whether_it_was_run(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and str(config.mixed_precision) == "no"
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and ("Not run" in first or "Run:" in first)
