"""What must not change: the numbers of small runs of every method, recorded once.

    python tests/pins.py                  record tests/data/pins.json anew, where numbers are right
    python tests/pins.py --only ddpo_is   print the pins whose name holds a text

Each run is two epochs of 8 pictures at 4 steps on one thread in float32: every number of every
Step, and a hash of the trained weights. Bits depend on the processor and on the versions of the
libraries; `arithmetic` is a hash of what diffusers alone computes with the embedded model, and says
whether bits can be compared at all.

Two processes have no pins of their own: they are held against those of one.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import math
import tempfile
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests/data/pins.json"

BASE = dict(
    eval_judges="",  # judges change no number, and were not there when the pins were recorded
    sample_num_steps=4,
    sample_batch_size=4,
    sample_num_batches_per_epoch=2,
    sample_images_per_prompt=2,
    train_batch_size=4,
    train_micro_batch_size=6,
    num_epochs=2,
    eval_num_images=0,
    stop_gain=0.0,
    lora_rank=2,
    lora_alpha=2,
    per_prompt_stat_tracking_min_count=2,
)
METHODS = {
    "ddpo_is": dict(method="ddpo_is"),
    "ddpo_sf": dict(method="ddpo_sf", train_batch_size=8),
    "rwr": dict(method="rwr"),
    "rwr_sparse": dict(method="rwr_sparse", rwr_fraction=0.3),
    "alignprop_fixed": dict(
        method="alignprop", reward_fn="jpeg_compressibility_estimate", backprop_steps="2"
    ),
    "alignprop_random": dict(method="alignprop", reward_fn="brightness"),
    "draft_lv": dict(method="draft_lv", reward_fn="jpeg_compressibility_estimate"),
    "refl": dict(method="refl", reward_fn="colorfulness"),
}
LOOKS = dict(eval_num_images=2, eval_freq=1)
FULL = dict(use_lora=False, train_learning_rate=1e-4)
OPTIONS = {
    "plain": (LOOKS, list(METHODS)),
    "kl": (
        dict(kl_weight=0.1),
        "ddpo_is ddpo_sf rwr rwr_sparse alignprop_fixed alignprop_random".split(),
    ),
    "batch_statistics": (dict(per_prompt_stat_tracking=False), ["ddpo_is", "ddpo_sf"]),
    "guidance": (
        dict(sample_guidance_scale=3.0, negative_prompts="a blue background"),
        list(METHODS),
    ),
    "ema": (
        LOOKS | dict(ema_decay=0.9),
        "ddpo_is ddpo_sf rwr rwr_sparse alignprop_fixed draft_lv refl".split(),
    ),
    "full": (FULL, list(METHODS)),
    "full_kl": (FULL | dict(kl_weight=0.1), ["ddpo_is", "alignprop_fixed"]),
    "inner_epochs": (dict(train_num_inner_epochs=2), ["ddpo_is", "rwr", "rwr_sparse"]),
}
ONE_OF_A_KIND = {
    "parts_of_paths": dict(
        train_timestep_fraction=0.5, train_gradient_accumulation_steps=2, train_lr_schedule="cosine"
    ),
    "half_trajectories": dict(rollout_dtype="bf16", rollout_device="cpu", lora_targets="all"),
    "stop_gain": LOOKS | dict(stop_gain=0.005, train_lr_warmup_steps=1, eval_freq=2),
    "sum_of_rewards": dict(
        reward_fn="jpeg_compressibility + 0.1*tiny_aesthetic",
        reward_workers=1,
        prompt_fn="counting(max_count=3)",
    ),
    "bf16": dict(mixed_precision="bf16"),
    "alignprop_accumulated": dict(
        method="alignprop",
        reward_fn="tiny_preference",
        backprop_steps="normal(2, 1)",
        backprop_checkpointing=True,
        train_batch_size=2,
        train_gradient_accumulation_steps=2,
        sample_eta=0.0,
    ),
}
RUNS = {
    f"{method}/{option}": METHODS[method] | fields
    for option, (fields, methods) in OPTIONS.items()
    for method in methods
} | {f"ddpo_is/{name}": fields for name, fields in ONE_OF_A_KIND.items()}
TWO_PROCESSES = ["ddpo_is/plain", "rwr/kl", "alignprop_random/plain"]
# of two processes: a JPEG's size jumps where a pixel is rounded to another of 256 levels
SMOOTH = dict(reward_fn="brightness")
RESUMED = ["ddpo_is/ema", "rwr/inner_epochs", "alignprop_random/kl"]
# gauges that came after the record was made, and move nothing
NEWER = ("ratio_first", "noise_left")


def hash_of(tensors):
    "Return 16 hexadecimal digits that stand for the bits of some tensors."
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def arithmetic():
    "Hash what this machine makes of the embedded model through diffusers alone."
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = ROOT / "ddpo_scratch/tiny_model"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in (4, 6, 8):
        x = torch.randn(n, 4, 16, 16, generator=generator)
        c = torch.randn(n, 16, unet.config.cross_attention_dim, generator=generator)
        out = unet(x, torch.arange(n) * 100, c).sample
        out.square().mean().backward()
        found += [out, *(p.grad for p in unet.parameters())]
        unet.zero_grad()
        found.append(vae.decode(x).sample)
    return hash_of(found)


def plain(value):
    "Make a number that JSON can hold; NaN, which is not equal to itself, becomes a word."
    return "nan" if isinstance(value, float) and value != value else value


def numbers(step):
    "List every number of a Step but its seconds."
    row = dataclasses.asdict(step)
    metrics, gauges = row.pop("metrics"), row.pop("gauges")
    assert not gauges
    left_out = [name for name in metrics if name.startswith("seconds") or name in NEWER]
    row |= {f"metrics/{k}": v for k, v in metrics.items() if k not in left_out}
    return {k: plain(v) for k, v in row.items() if plain(v) != "nan"}


def finish(state):
    "Train to the end; every Step's numbers, and a hash and the size of the weights."
    from ddpo_scratch.train import train

    steps = [numbers(step) for step in train(state=state)]
    size = sum(p.detach().double().square().sum() for p in state.params).sqrt().item()
    found = dict(steps=steps, weights=hash_of(state.params), size=size)
    if state.average is not None:
        found["average"] = hash_of(state.average.shadow_params)
    return found


def config_of(name, folder, **more):
    from ddpo_scratch.config import TrainConfig

    return TrainConfig(
        **BASE | RUNS[name] | dict(logdir=str(folder), run_name=name.replace("/", "-")) | more
    )


def run(name, folder, **more):
    from ddpo_scratch.train import setup

    return finish(setup(config_of(name, folder, **more)))


def resumed(name, folder):
    "Leave a run in the middle of its second epoch, and go on from its checkpoint."
    from ddpo_scratch.train import setup, train

    config = config_of(name, folder)
    for step in train(config):
        if step.epoch == 2:
            break
    again = dataclasses.replace(
        config, run_name="", resume_from=str(Path(folder) / config.run_name)
    )
    return finish(setup(again))


def share(folder):
    "Run on each of two processes: the runs of TWO_PROCESSES, with half the samples each."
    from ddpo_scratch.train import setup

    torch.set_num_threads(1)
    found = {}
    for name in TWO_PROCESSES:
        size = RUNS[name].get("train_batch_size", 4) // 2
        halves = dict(sample_batch_size=2, train_batch_size=size)
        state = setup(config_of(name, folder, **SMOOTH, **halves))
        found[name] = finish(state)
        rank = state.engine.rank
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))


def two_processes(folder):
    "Run what `share` says; list for each process the name of each run and its numbers."
    import processes

    script = Path(folder) / "share.py"
    tests = str(ROOT / "tests")
    script.write_text(
        f"import sys; sys.path.insert(0, {tests!r}); import pins; pins.share({folder!r})"
    )
    processes.run(script, world=2, ACCELERATE_USE_CPU="true")
    return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def trl(name, folder):
    "Record what the trainers with TRL's interface do, by the recorder of TRL's own numbers."
    import ddpo_scratch.trl as lib

    spec = importlib.util.spec_from_file_location(
        "make_trl_reference", ROOT / "tests/data/make_trl_reference.py"
    )
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made.record(lib, name, str(ROOT / "ddpo_scratch/tiny_model"))


TRL = ["ddpo", "ddpo_per_prompt", "ddpo_train_cfg_off", "alignprop", "alignprop_full"]


def pictures(folder):
    "Hash the pictures that ddpo_sample draws, with the embedded model and with a LoRA of a run."
    from ddpo_scratch.cli.commands import ddpo_sample
    from ddpo_scratch.train import fit
    from PIL import Image

    torch.set_num_threads(1)
    lora = fit(config_of("ddpo_is/plain", folder))
    found = {}
    for name, more in {"base": [], "lora": ["--lora", str(lora), "--lora_weight", "0.5"]}.items():
        out = Path(folder) / f"pictures-{name}"
        words = [
            "a fox",
            "a red car",
            "--n",
            "2",
            "--seed",
            "3",
            "--num_steps",
            "5",
            "--scale",
            "1",
            "--out",
            str(out),
            *more,
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            assert ddpo_sample(words) == 0
        for file in sorted(out.glob("*.png")):
            found[f"{name}/{file.name}"] = hashlib.sha256(Image.open(file).tobytes()).hexdigest()[
                :16
            ]
    return found


PINS = (
    {f"run/{name}": (run, name) for name in RUNS}
    | {f"resumed/{name}": (resumed, name) for name in RESUMED}
    | {f"trl/{name}": (trl, name) for name in TRL}
    | {"pictures": (pictures,)}
)


def pin(name):
    "Compute one pin, in a folder of its own."
    torch.set_num_threads(1)
    function, *arguments = PINS[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments, folder)


@functools.cache
def record():
    "What was recorded."
    return json.loads(FILE.read_text(encoding="utf-8"))


@functools.cache
def same_bits():
    "Does this machine compute the embedded model to the same bits as the recording one?"
    return arithmetic() == record()["arithmetic"]


def leaves(value, path=""):
    "List (path, leaf) of nested lists and dicts."
    if isinstance(value, dict):
        items = sorted(value.items())
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return [(path, value)]
    return [leaf for key, inner in items for leaf in leaves(inner, f"{path}/{key}")]


def check(name, value):
    "Hold a pin against its record; on other arithmetic numbers agree to a few in a hundred."
    found = leaves(json.loads(json.dumps(value)))
    expected = leaves(record()["pins"][name])
    if same_bits():
        assert found == expected
        return
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(found, expected, strict=True):
        if isinstance(b, float):
            # a share of few steps jumps where one of them falls on the other side of the clip
            least = 0.1 if path.endswith("clip_fraction") else 5e-3
            assert math.isclose(a, b, rel_tol=5e-2, abs_tol=least), path


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="print the pins whose name holds this text, record nothing")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    if only:
        print(json.dumps({name: pin(name) for name in PINS if only in name}, indent=1))
        return
    recorded = dict(arithmetic=arithmetic(), torch=torch.__version__)
    pins = {}
    for name in PINS:
        pins[name] = pin(name)
        print(name, flush=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pins.items())
    FILE.write_text(json.dumps(recorded)[:-1] + ', "pins": {\n' + lines + "\n}}\n")


if __name__ == "__main__":
    main()
