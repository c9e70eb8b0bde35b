"""Take an epoch of this package and of TRL 0.23.1, on the same pipeline folder, in one run.

    python -m venv trlenv && trlenv/bin/pip install trl==0.23.1 torch diffusers peft accelerate
    python benchmarks/trl.py --trl_python trlenv/bin/python            # seconds and peak memory
    python benchmarks/trl.py --trl_python trlenv/bin/python --compile  # and ours compiled
    python benchmarks/trl.py --trl_python trlenv/bin/python --tuned    # to the same reward

--help lists the options.

Equal settings: 64 pictures an epoch in batches of 16, 20 steps, guidance 3, LoRA of rank 4 on
attention, minibatches of 16, one process. Three sides: "trl" is TRL, "drop-in" is ddpo_scratch.trl
with the same lines, "here" is ddpo_scratch.train. Each runs in a process of its own; its first
epoch warms up and is left out, the rest are averaged. The sides take turns, --rounds times, and
each keeps its fastest round: a shared machine's speed drifts. CPU seconds are of all threads.
AlignProp differentiates the last step (K = 1), with --full_chain also all of them, recomputing
activations, as TRL always does; its epoch is one update of 64 pictures in parts of 16, and "here"
counts its sampling as training. Memory is the peak while training, above what was there with the
model loaded: resident memory on a CPU (Linux), allocated memory on a GPU (there from zero).

Tuned: the reward is JPEG size, the goal that 45 pictures with fixed noise (guidance 3, eta 0, never
trained on) weigh --target less than the base model's. They are drawn after every epoch, outside
the clock. "here, recommended" is TrainConfig's defaults, "trl, its example" the command line of
TRL's example script; the other trials turn the same levers on both sides: guidance only where it
pays, fewer steps, more updates an epoch, a fraction of the timesteps. One seed.

Writes benchmarks/trl.json: under "equal" or "tuned", a row a side. A row that is there is measured
again only when --only names it.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Or `import trl` would find this file.
sys.path = [path for path in sys.path if Path(path or ".").resolve() != HERE]
ANIMALS = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox
    wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog
    chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo
""".split()
PROMPTS = [f"{'an' if a[0] in 'aeiou' else 'a'} {a}" for a in ANIMALS]

QUIET = dict(
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    DIFFUSERS_VERBOSITY="error",
    PYTHONWARNINGS="ignore",
)

BOTH = dict(sample_num_steps=20, sample_guidance_scale=3.0, mixed_precision="no", seed=0)
DDPO = dict(
    BOTH,
    sample_batch_size=16,
    sample_num_batches_per_epoch=4,
    train_batch_size=16,
    train_learning_rate=3e-4,
)
ALIGN = dict(
    BOTH, train_batch_size=16, train_gradient_accumulation_steps=4, train_learning_rate=1e-3
)
NEVER = 10**6  # an epoch that no run reaches
PLAIN = dict(stop_gain=0.0, eval_num_images=0, eval_freq=0, save_freq=NEVER)  # nothing but the loop
AS_TRL = PLAIN | dict(
    lora_rank=4,
    lora_alpha=4,
    sample_images_per_prompt=1,
    per_prompt_stat_tracking=False,
    train_clip_range=1e-4,
)
QUICK = dict(
    ddpo=dict(
        sample_num_steps=4, sample_batch_size=4, sample_num_batches_per_epoch=2, train_batch_size=4
    ),
    align=dict(sample_num_steps=4, train_batch_size=4, train_gradient_accumulation_steps=2),
)

EXAMPLE = dict(
    mixed_precision="no",
    sample_batch_size=6,
    sample_num_batches_per_epoch=4,
    train_batch_size=3,
    per_prompt_stat_tracking=True,
    per_prompt_stat_tracking_buffer_size=32,
)
# At guidance 1 its pipeline crashes: so it pays for guidance in sampling.
UNGUIDED = EXAMPLE | dict(sample_num_steps=20, sample_guidance_scale=1.0001, train_cfg=False)
# It draws prompts singly: a prompt's memory would span many epochs.
UPDATES = UNGUIDED | dict(
    sample_batch_size=32,
    sample_num_batches_per_epoch=2,
    train_batch_size=4,
    train_learning_rate=2e-3,
    train_clip_range=1.6e-3,
    per_prompt_stat_tracking=False,
)
TUNED = {
    "here, recommended": ("here", PLAIN),
    "here, half of the timesteps": ("here", PLAIN | dict(train_timestep_fraction=0.5)),
    "here, rank 4": ("here", PLAIN | dict(lora_rank=4, lora_alpha=4)),
    "trl, its example": ("trl", EXAMPLE),
    "trl, 20 steps without guidance": ("trl", UNGUIDED),
    "trl, more updates": ("trl", UPDATES),
}


# ---------------------------------------------------------------- one side, in a process of its own


def jpeg_kb(image):
    "Return the size of a picture (3, h, w) in [0, 1] as a JPEG of quality 95, in kB."
    from PIL import Image

    file = io.BytesIO()
    pixels = image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.tell() / 1000


def compressibility(images, prompts, metadata):
    import torch

    return torch.tensor([-jpeg_kb(image) for image in images.float().clamp(0, 1)]), {}


def blueness(images, prompts, metadata):
    return images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3)), {}


def memory(reset=False):
    "Return the peak MiB since the last reset, on the device that trains."
    import torch

    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024


def now():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def trl_trainer(lib, job):
    "Make a trainer with TRL's interface."
    import numpy as np
    from accelerate import PartialState

    PartialState()  # TRL logs before it has one
    fields, kind, reward = dict(job["fields"]), "DDPO", compressibility
    if job["method"] == "align":
        kind, reward = "AlignProp", blueness
        fields["truncated_backprop_rand"] = False
        fields["truncated_backprop_timestep"] = fields["sample_num_steps"] - job["k"]
    run = dict(num_epochs=job["epochs"], save_freq=NEVER)
    config = getattr(lib, f"{kind}Config")(**fields, **run)
    config.project_kwargs = {"project_dir": job["folder"]}
    pipe = lib.DefaultDDPOStableDiffusionPipeline(job["model"])

    def prompt_fn():
        return np.random.choice(PROMPTS), {}

    trainer = getattr(lib, f"{kind}Trainer")(config, reward, prompt_fn, pipe)
    pipe.set_progress_bar_config(disable=True)
    return trainer


def watch(trainer, count_scoring):
    "Note a trainer's rewards, and the seconds of its sampling, with those of scoring or without."
    reward, generate = trainer.reward_fn, trainer._generate_samples
    seen = dict(sampling=0.0, rewards=[])

    def scored(*args):
        start, out = now(), reward(*args)
        if count_scoring:
            seen["sampling"] += now() - start
        seen["rewards"] += out[0].detach().float().tolist()
        return out

    def generated(*args, **kwargs):
        start, out = now(), generate(*args, **kwargs)
        seen["sampling"] += now() - start
        return out

    trainer.reward_fn, trainer._generate_samples = scored, generated
    return seen


def epochs_of_trl(lib, job):
    "Yield a plain pipeline, then a row for each epoch of a trainer with TRL's interface."
    trainer = trl_trainer(lib, job)
    # A reward of AlignProp is part of its graph, and its seconds are training.
    seen = watch(trainer, count_scoring=job["method"] != "align")
    yield trainer.sd_pipeline.sd_pipeline
    step = 0
    for epoch in range(job["epochs"]):
        seen.update(sampling=0.0)
        seen["rewards"].clear()
        start, cpu = now(), time.process_time()
        step = trainer.step(epoch, step)
        total, rewards = now() - start, seen["rewards"]
        yield dict(
            sampling=seen["sampling"],
            training=total - seen["sampling"],
            cpu=time.process_time() - cpu,
            queries=len(rewards),
            reward=sum(rewards) / len(rewards),
            updates=step,
        )


def train_config(job):
    "Return the TrainConfig of a job."
    from ddpo_scratch.config import TrainConfig

    fields = dict(job["fields"])
    if job["method"] == "align":
        fields |= dict(
            method="alignprop",
            backprop_steps=str(job["k"]),
            backprop_checkpointing=True,
            sample_batch_size=fields["train_batch_size"],
            sample_num_batches_per_epoch=fields["train_gradient_accumulation_steps"],
        )
    run = dict(num_epochs=job["epochs"], logdir=job["folder"], compile=job["compile"])
    return TrainConfig(**fields, **run, model=job["model"])


def epochs_of_train(job):
    "Yield a plain pipeline, then a row for each epoch of ddpo_scratch.train."
    from ddpo_scratch.prompts import from_list
    from ddpo_scratch.train import setup, train

    reward = blueness if job["method"] == "align" else compressibility
    state = setup(train_config(job), reward_fn=reward, prompt_fn=from_list(PROMPTS))
    yield state.denoiser.pipe
    queries, cpu = 0, time.process_time()
    for step in train(state=state):
        if not step.metrics:
            continue
        metrics = step.metrics  # AlignProp samples within the update: seconds_sampling is 0
        yield dict(
            sampling=metrics["seconds_sampling"],
            training=metrics["seconds_training"],
            cpu=time.process_time() - cpu,
            queries=metrics["reward_queries"] - queries,
            reward=metrics["reward_mean"],
            updates=metrics["global_step"],
        )
        queries, cpu = metrics["reward_queries"], time.process_time()


def held_out(pipe, prompts, n_steps):
    "Return the mean JPEG kB of a picture a prompt with fixed noise, by plain diffusers."
    import torch

    unet, sizes = pipe.unet, []
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(1000))
    noise = noise.to(unet.device, pipe.text_encoder.dtype)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=n_steps, guidance_scale=3.0, eta=0.0, output_type="pt")
    for lo in range(0, len(prompts), 15):
        images = pipe(prompts[lo : lo + 15], latents=noise[lo : lo + 15], **call).images
        sizes += [jpeg_kb(image) for image in images.float()]
    return sum(sizes) / len(sizes)


def epoch_flops(job):
    "Return FLOPs of an epoch of DDPO as PyTorch counts them: forward, and backward of a LoRA."
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from ddpo_scratch.models.sd import add_lora, denoiser_for, load_pipeline

    fields = job["fields"]
    denoiser = denoiser_for(load_pipeline(job["model"]), fields["sample_guidance_scale"])
    add_lora(denoiser, 4)
    x, c = torch.randn(1, *denoiser.latent_shape), denoiser.encode(PROMPTS[:1])
    with FlopCounterMode(display=False) as forward:
        out = denoiser(x, 500, c)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    pictures = fields["sample_batch_size"] * fields["sample_num_batches_per_epoch"]
    # Forward twice: once to sample, once to train.
    step = 2 * forward.get_total_flops() + backward.get_total_flops()
    return pictures * fields["sample_num_steps"] * step


def matrix_rate(precision):
    "Return this device's FLOPs a second on large matrix products."
    import torch

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    n, device = (8192, "cuda") if torch.cuda.is_available() else (1024, "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # as TrainConfig has it
    a, times = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(8):
        start = now()
        _ = a @ a
        times.append(now() - start)
    return 2 * n**3 / min(times)


def epochs_of(job):
    "Yield a plain pipeline, then a row for each epoch of a job's side."
    if job["side"] == "here":
        return epochs_of_train(job)
    if job["side"] == "drop-in":
        import ddpo_scratch.trl as lib
    else:
        import trl as lib
    return epochs_of_trl(lib, job)


def measure(job):
    "Run a job's epochs; return its rows and its peak memory."
    import torch

    epochs = epochs_of(job)
    pipe = next(epochs)
    look = (PROMPTS[:6], 4) if job["quick"] else (PROMPTS, 20)
    goal = held_out(pipe, *look) * (1 - job["target"]) if job["target"] else None
    loaded, rows, seconds, queries = memory(reset=True), [], 0.0, 0
    for row in epochs:
        seconds += row["sampling"] + row["training"]
        queries += row["queries"]
        rows.append(dict(row, seconds_so_far=seconds, queries_so_far=queries))
        if goal is not None:
            size = held_out(pipe, *look)
            rows[-1]["held_out_kb"] = size
            progress = f"{seconds:.0f} s, {queries} queries, {size:.3f} kB (goal {goal:.3f})"
            print(f"  {job['name']}: {progress}", file=sys.stderr, flush=True)
            if size <= goal or seconds > job["limit"]:
                break
    out = dict(peak_mib=round(memory() - (0 if torch.cuda.is_available() else loaded)), rows=rows)
    if goal is not None:
        out.update(goal_kb=goal, reached=rows[-1]["held_out_kb"] <= goal)
    return out


def worker(job):
    "Do a job, in a process of its own."
    import diffusers
    import torch

    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    if job["side"] == "rate":
        rate = matrix_rate(job["fields"]["mixed_precision"])
        return dict(epoch_flops=epoch_flops(job), matrix_flops_per_second=rate)
    return measure(job)


# ---------------------------------------------------------------- the comparison


def sd15_parts():
    "Return the networks of Stable Diffusion 1.5's shapes but the text encoder, and a scheduler."
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return dict(vae=vae, unet=unet, scheduler=scheduler)


def make_sd15(folder):
    "Write a pipeline of Stable Diffusion 1.5's shapes: random weights, the tiny tokenizer."
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel
    from ddpo_scratch.models.sd import load_pipeline

    torch.manual_seed(0)
    tiny = load_pipeline("tiny")
    tiny.tokenizer.model_max_length = 77
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    sizes = dict(hidden_size=768, intermediate_size=3072)
    layers = dict(num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
    ids = {name: getattr(tiny.text_encoder.config, name) for name in names}
    pipe = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, **layers, **ids)),
        tokenizer=tiny.tokenizer,
        **sd15_parts(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return str(folder)


def run(job, python):
    "Do a job in a process of its own; return what it printed last."
    with tempfile.TemporaryDirectory() as folder:
        job = dict(job, folder=folder)
        done = subprocess.run(
            [python, __file__, "--worker", json.dumps(job)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(job["threads"]), **QUIET},
            cwd=folder,
        )
    if done.returncode:
        raise SystemExit(f"{job['name']} failed: see above; its settings were {job['fields']}")
    return json.loads(done.stdout.splitlines()[-1])


def equal_jobs(args):
    "Yield a job for each side at equal settings."
    sides = [("trl", False), ("drop-in", False), ("here", False)] + [("here", True)] * args.compile
    for method, base in (("ddpo", DDPO), ("align", ALIGN)):
        fields = base | (QUICK[method] if args.quick else {})
        fields |= dict(mixed_precision=args.precision)
        ours = AS_TRL | dict(train_micro_batch_size=fields["train_batch_size"])
        ks = [0] if method == "ddpo" else [1, *[fields["sample_num_steps"]] * args.full_chain]
        for k in ks:
            title = "ddpo" if method == "ddpo" else f"alignprop K={k}"
            for side, compiled in sides:
                yield dict(
                    name=f"{title}, {side}{' compiled' if compiled else ''}",
                    side=side,
                    method=method,
                    k=k,
                    compile=compiled,
                    fields=fields | ours if side == "here" else fields,
                    epochs=1 + args.epochs,
                    target=0,
                    limit=0,
                )


def tuned_jobs(args):
    "Yield a job for each trial."
    quick = QUICK["ddpo"] if args.quick else {}
    for name, (side, fields) in TUNED.items():
        yield dict(
            name=name,
            side=side,
            method="ddpo",
            k=0,
            compile=False,
            fields=fields | quick | dict(seed=args.seed),
            epochs=2 if args.quick else 400,
            target=args.target,
            limit=args.limit,
        )


KEPT = ("queries_so_far", "seconds_so_far", "reward", "held_out_kb")


def summary(job, measured):
    "Return the row of a job: means of its epochs, and its curve."
    rows = measured["rows"] if job["target"] else measured["rows"][1:]

    def mean(name):
        return round(sum(row[name] for row in rows) / len(rows), 2)

    out = dict(
        seconds_sampling=mean("sampling"),
        seconds_training=mean("training"),
        cpu_seconds=mean("cpu"),
        pictures=rows[-1]["queries"],
        epochs=len(rows),
        peak_mib=measured["peak_mib"],
    )
    if job["target"]:
        out["seconds"] = round(rows[-1]["seconds_so_far"], 1)
        out["queries"] = rows[-1]["queries_so_far"]
        out["reached"] = measured["reached"]
        out["goal_kb"] = round(measured["goal_kb"], 4)
    curve = []
    for row in measured["rows"]:
        curve.append({name: round(row[name], 4) for name in KEPT if name in row})
    return out | dict(fields=job["fields"], curve=curve)


def total(row):
    return row["seconds_sampling"] + row["seconds_training"]


def faster(row, other):
    "Keep the faster of two rounds, and the seconds of all."
    if other is None:
        return row | dict(rounds=[total(row)])
    return min(row, other, key=total) | dict(rounds=[*other["rounds"], total(row)])


def tuned_line(name, row, rows):
    reached = "reached" if row["reached"] else "NOT reached"
    return f"{name:42} {reached} after {row['seconds']:8.1f} s, {row['queries']:6} queries"


def equal_line(name, row, rows):
    parts = [
        f"{name:28} sampling {row['seconds_sampling']:7.2f} s",
        f"training {row['seconds_training']:7.2f} s",
        f"in all {total(row):7.2f} s ({row['cpu_seconds']:7.2f} s of CPU)",
        f"peak {row['peak_mib']:6} MiB",
    ]
    trl = rows.get(f"{name.split(',')[0]}, trl")
    if trl:
        parts.append(f"{total(trl) / total(row):.2f} x TRL's speed")
    if "share_of_matrix_rate" in row:
        parts.append(f"{row['share_of_matrix_rate']:.0%} of the device's matrix rate")
    return ", ".join(parts)


def share_of_matrix_rate(job, row):
    "Return which share of the device's rate on matrix products a row reaches."
    rate = run(job | dict(side="rate"), sys.executable)
    return round(rate["epoch_flops"] / total(row) / rate["matrix_flops_per_second"], 4)


def open_log(path, part, about):
    "Return the log and the part of it to fill; refuse to mix runs of different kinds."
    log = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entry = log.setdefault(part, dict(about=about, rows={}))
    if entry["about"] != about:
        raise SystemExit(
            f"{path.name} holds a run of {entry['about']}, this one is of {about}: "
            "move the file away first"
        )
    return log, entry["rows"]


def folder_of(args, scratch):
    "Return the pipeline folder that all sides load."
    from ddpo_scratch.models.sd import TINY

    if args.shape == "sd15":
        return make_sd15(scratch)
    return str(TINY if args.model == "tiny" else Path(args.model).resolve())


def about_run(args, model):
    "Say what must be the same for rows to be compared."
    import torch

    return dict(
        model=args.shape or Path(model).name,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        threads=args.threads,
        torch=torch.__version__,
        precision=args.precision,
        quick=args.quick,
    )


def jobs_to_do(args, rows):
    "List the jobs that --only names, whose rows are dropped, or else those without a row."
    jobs = list((tuned_jobs if args.tuned else equal_jobs)(args))
    if not args.only:
        return [job for job in jobs if job["name"] not in rows]
    for name in [name for name in rows if args.only in name]:
        del rows[name]
    return [job for job in jobs if args.only in job["name"]]


def compare(args, model, python):
    "Do the jobs, and write and print each row as it comes."
    part = "tuned" if args.tuned else "equal"
    path = Path(tempfile.gettempdir()) / "trl_quick.json" if args.quick else HERE / "trl.json"
    log, rows = open_log(path, part, about_run(args, model))
    line = tuned_line if args.tuned else equal_line
    for job in jobs_to_do(args, rows) * (1 if args.tuned else args.rounds):
        job = dict(job, model=model, threads=args.threads, quick=args.quick)
        row = summary(job, run(job, python if job["side"] == "trl" else sys.executable))
        row["load"] = round(os.getloadavg()[0], 1)
        if not args.tuned:
            row = faster(row, rows.get(job["name"]))
            if args.rate and job["side"] == "here" and job["method"] == "ddpo":
                row["share_of_matrix_rate"] = share_of_matrix_rate(job, row)
        rows[job["name"]] = row
        path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        print(line(job["name"], row, rows), flush=True)
    print()
    for name, row in rows.items():
        print(line(name, row, rows))


def options():
    "Return the command line's parser."
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--trl_python", required=True, help="python of an environment with trl==0.23.1")
    p.add_argument("--model", default="tiny", help="'tiny' or a folder in diffusers' format")
    p.add_argument("--shape", choices=["sd15"], help="random weights of SD 1.5's shapes instead")
    p.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--epochs", type=int, default=1, help="measured in a round, after a warm-up")
    p.add_argument("--rounds", type=int, default=2, help="turns that the sides take")
    p.add_argument("--full_chain", action="store_true", help="also AlignProp through all steps")
    p.add_argument("--compile", action="store_true", help="also ours compiled")
    p.add_argument("--rate", action="store_true", help="also the share of the device's matrix rate")
    p.add_argument("--quick", action="store_true", help="does it run? 8 pictures, 4 steps, no log")
    p.add_argument("--tuned", action="store_true", help="time to the same reward")
    p.add_argument("--target", type=float, default=0.1, help="fall of JPEG size to reach")
    p.add_argument("--limit", type=float, default=1200.0, help="seconds until a trial gives up")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", default="", help="measure rows again whose names hold these words")
    return p


def main(args):
    python = shutil.which(args.trl_python)
    if python is None:
        raise SystemExit(
            f"--trl_python {args.trl_python}: no such program; "
            "give the python of an environment with trl==0.23.1"
        )
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, folder_of(args, scratch), os.path.abspath(python))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(json.loads(sys.argv[2]))))
    else:
        main(options().parse_args())
