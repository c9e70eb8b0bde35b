"""An epoch of this package and of TRL 0.23.1, on the same pipeline folder and with the same settings, in one run.

    python -m venv trlenv && trlenv/bin/pip install trl==0.23.1 torch diffusers peft accelerate
    python benchmarks/trl.py --trl_python trlenv/bin/python                # DDPO and AlignProp: seconds of sampling and training, peak memory
    python benchmarks/trl.py --trl_python trlenv/bin/python --compile      # and ours compiled
    python benchmarks/trl.py --trl_python trlenv/bin/python --tuned        # seconds and reward queries to the same reward, three settings each

Options: --quick (8 pictures, 4 steps: does it run?), --epochs N, --rounds N, --threads N, --model FOLDER, --shape sd15 (random weights of Stable Diffusion 1.5's shapes,
which cost what the real ones do), --precision no|bf16|fp16, --rate (the share of the device's matrix rate that ours reaches), --only WORDS, --limit SECONDS, --target GAIN.

Equal settings: 64 pictures an epoch in batches of 16, 20 steps, guidance 3, LoRA of rank 4 on attention, minibatches of 16, one process. Three sides: "trl" is TRL,
"drop-in" is ddpo_scratch.trl with the same lines, "here" is ddpo_scratch.train. Each runs in a process of its own; its first epoch warms up and is left out, the rest
are averaged. The sides take turns, --rounds times, and each keeps its fastest round: a shared machine's speed drifts. CPU seconds are of all threads. AlignProp
differentiates the last step (K = 1), with --full_chain also all of them, recomputing activations, as TRL always does; its epoch is one update of 64 pictures in parts of 16,
and "here" counts its sampling as training.
Memory is the peak while training, above what was there with the model loaded: resident memory on a CPU (Linux), allocated memory on a GPU (there from zero).

Tuned: the reward is JPEG size, the goal that 45 pictures with fixed noise (guidance 3, eta 0, never trained on) weigh --target less than the base model's. They are
drawn after every epoch, outside the clock. "here, recommended" is TrainConfig's defaults, "trl, its example" the command line of TRL's example script; the other
trials turn the same levers on both sides: guidance only where it pays, fewer steps, more updates an epoch, a fraction of the timesteps. One seed.

Writes benchmarks/trl.json: under "equal" or "tuned", a row a side. A row that is there is measured again only when --only names it.
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
sys.path = [p for p in sys.path if Path(p or ".").resolve() != HERE]                                     # or `import trl` would find this file
ANIMALS = ("cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat "
           "snake turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo").split()
PROMPTS = [f"{'an' if a[0] in 'aeiou' else 'a'} {a}" for a in ANIMALS]

QUIET = dict(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", PYTHONWARNINGS="ignore")

BOTH = dict(sample_num_steps=20, sample_guidance_scale=3., mixed_precision="no", seed=0)
DDPO = dict(BOTH, sample_batch_size=16, sample_num_batches_per_epoch=4, train_batch_size=16, train_learning_rate=3e-4)
ALIGN = dict(BOTH, train_batch_size=16, train_gradient_accumulation_steps=4, train_learning_rate=1e-3)
PLAIN = dict(stop_gain=0., eval_num_images=0, eval_freq=0, save_freq=10**6)                              # nothing but the loop
AS_TRL = PLAIN | dict(lora_rank=4, lora_alpha=4, sample_images_per_prompt=1, per_prompt_stat_tracking=False, train_clip_range=1e-4)
QUICK = dict(ddpo=dict(sample_num_steps=4, sample_batch_size=4, sample_num_batches_per_epoch=2, train_batch_size=4),
             align=dict(sample_num_steps=4, train_batch_size=4, train_gradient_accumulation_steps=2))

EXAMPLE = dict(mixed_precision="no", sample_batch_size=6, sample_num_batches_per_epoch=4, train_batch_size=3, per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=32)
UNGUIDED = EXAMPLE | dict(sample_num_steps=20, sample_guidance_scale=1.0001, train_cfg=False)               # at 1 its pipeline crashes: so it pays for guidance in sampling
UPDATES = UNGUIDED | dict(sample_batch_size=32, sample_num_batches_per_epoch=2, train_batch_size=4, train_learning_rate=2e-3, train_clip_range=1.6e-3,
                          per_prompt_stat_tracking=False)                                                # TRL draws prompts singly: a prompt's memory would span many epochs
TUNED = {"here, recommended": ("here", PLAIN), "here, half of the timesteps": ("here", PLAIN | dict(train_timestep_fraction=.5)),
         "here, rank 4": ("here", PLAIN | dict(lora_rank=4, lora_alpha=4)),
         "trl, its example": ("trl", EXAMPLE), "trl, 20 steps without guidance": ("trl", UNGUIDED), "trl, more updates": ("trl", UPDATES)}


# ---------------------------------------------------------------- one side, in a process of its own

def jpeg_kb(image):
    "Size of one picture (3, h, w) in [0, 1] as a JPEG of quality 95, in kB"
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()).save(file, "JPEG", quality=95)
    return file.tell()/1000

def compressibility(images, prompts, metadata):
    import torch
    return torch.tensor([-jpeg_kb(i) for i in images.float().clamp(0, 1)]), {}

def blueness(images, prompts, metadata): return images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3)), {}


def memory(reset=False):
    "Peak MiB since the last reset, on the device that trains"
    import torch
    if torch.cuda.is_available():
        if reset: torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()/2**20
    status = Path("/proc/self/status")
    if not status.exists(): return float("nan")
    if reset: Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])/1024

def now():
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()


def epochs_of_trl(lib, job):
    "Trainers with TRL's interface -> (plain pipeline, iterator of epochs)"
    import numpy as np
    from accelerate import PartialState
    PartialState()                                                                                       # TRL logs before it has one
    fields, align, clock = dict(job["fields"]), job["method"] == "align", {"sampling": 0., "queries": 0}
    if align: fields.update(truncated_backprop_rand=False, truncated_backprop_timestep=fields["sample_num_steps"] - job["k"])
    config = (lib.AlignPropConfig if align else lib.DDPOConfig)(**fields, num_epochs=job["epochs"], save_freq=10**6)
    config.project_kwargs = {"project_dir": job["folder"]}
    pipe = lib.DefaultDDPOStableDiffusionPipeline(job["model"])
    trainer = (lib.AlignPropTrainer if align else lib.DDPOTrainer)(config, blueness if align else compressibility, lambda: (np.random.choice(PROMPTS), {}), pipe)
    pipe.set_progress_bar_config(disable=True)
    seen, reward, generate = [], trainer.reward_fn, trainer._generate_samples

    def scored(*args):
        start, out = now(), reward(*args)
        clock["sampling"] += now() - start if not align else 0.
        seen.extend(out[0].detach().float().tolist())
        return out
    def generated(*args, **kwargs):
        start, out = now(), generate(*args, **kwargs)
        clock["sampling"] += now() - start
        return out
    trainer.reward_fn, trainer._generate_samples = scored, generated

    def run():
        step = 0
        for epoch in range(job["epochs"]):
            clock["sampling"], start, cpu = 0., now(), time.process_time()
            seen.clear()
            step = trainer.step(epoch, step)
            total = now() - start
            yield dict(sampling=clock["sampling"], training=total - clock["sampling"], cpu=time.process_time() - cpu, queries=len(seen), reward=sum(seen)/len(seen), updates=step)
    return pipe.sd_pipeline, run()


def epochs_of_train(job):
    "The same of ddpo_scratch.train"
    from ddpo_scratch.prompts import from_list
    from ddpo_scratch.train import TrainConfig, setup, train
    align, f = job["method"] == "align", dict(job["fields"])
    if align: f.update(method="alignprop", backprop_steps=str(job["k"]), backprop_checkpointing=True, sample_batch_size=f["train_batch_size"],
                       sample_num_batches_per_epoch=f["train_gradient_accumulation_steps"])
    config = TrainConfig(**f, model=job["model"], num_epochs=job["epochs"], logdir=job["folder"], compile=job["compile"])
    state = setup(config, reward_fn=blueness if align else compressibility, prompt_fn=from_list(PROMPTS))

    def run():
        queries, cpu = 0, time.process_time()
        for step in train(state=state):
            if not step.metrics: continue
            m = step.metrics                                                                             # AlignProp samples within the update: seconds_sampling is 0
            yield dict(sampling=m["seconds_sampling"], training=m["seconds_training"], cpu=time.process_time() - cpu, queries=m["reward_queries"] - queries, reward=m["reward_mean"], updates=m["global_step"])
            queries, cpu = m["reward_queries"], time.process_time()
    return state.denoiser.pipe, run()


def held_out(pipe, prompts, n_steps):
    "Mean JPEG kB of a picture a prompt with fixed noise, by plain diffusers"
    import torch
    unet, sizes = pipe.unet, []
    noise = torch.randn(len(prompts), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size, generator=torch.Generator().manual_seed(1000))
    pipe.set_progress_bar_config(disable=True)
    for lo in range(0, len(prompts), 15):
        ask = dict(latents=noise[lo:lo + 15].to(unet.device, pipe.text_encoder.dtype), num_inference_steps=n_steps, guidance_scale=3., eta=0., output_type="pt")
        sizes += map(jpeg_kb, pipe(prompts[lo:lo + 15], **ask).images.float())
    return sum(sizes)/len(sizes)


def rate(job):
    "FLOPs of an epoch of DDPO as PyTorch counts them (forward passes and the backward passes of a LoRA), and this device's rate on large matrix products"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from ddpo_scratch.sd import add_lora, denoiser_for, load_pipeline
    f, cuda = job["fields"], torch.cuda.is_available()
    denoiser = denoiser_for(load_pipeline(job["model"]), f["sample_guidance_scale"])
    add_lora(denoiser, 4)
    x, c = torch.randn(1, *denoiser.latent_shape), denoiser.encode(PROMPTS[:1])
    with FlopCounterMode(display=False) as forward: out = denoiser(x, 500, c)
    with FlopCounterMode(display=False) as backward: out.sum().backward()
    steps = f["sample_batch_size"]*f["sample_num_batches_per_epoch"]*f["sample_num_steps"]
    kind, n = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[f["mixed_precision"]], 8192 if cuda else 1024
    a, times = torch.randn(n, n, device="cuda" if cuda else "cpu", dtype=kind), []
    torch.backends.cuda.matmul.allow_tf32 = True                                                         # as TrainConfig has it
    for _ in range(8):
        start = now()
        a @ a
        times.append(now() - start)
    return dict(epoch_flops=steps*(2*forward.get_total_flops() + backward.get_total_flops()), matrix_flops_per_second=2*n**3/min(times))


def worker(job):
    import diffusers
    import torch
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    if job["side"] == "rate": return rate(job)
    if job["side"] == "here": pipe, run = epochs_of_train(job)
    elif job["side"] == "drop-in":
        import ddpo_scratch.trl as lib
        pipe, run = epochs_of_trl(lib, job)
    else:
        import trl as lib
        pipe, run = epochs_of_trl(lib, job)
    look = (PROMPTS[:6], 4) if job["quick"] else (PROMPTS, 20)
    goal = job["target"] and held_out(pipe, *look)*(1 - job["target"])
    loaded, rows, seconds, queries = memory(reset=True), [], 0., 0
    for row in run:
        seconds, queries = seconds + row["sampling"] + row["training"], queries + row["queries"]
        rows.append(dict(row, seconds_so_far=seconds, queries_so_far=queries))
        if goal:
            rows[-1]["held_out_kb"] = held_out(pipe, *look)
            print(f"  {job['name']}: {seconds:.0f} s, {queries} queries, {rows[-1]['held_out_kb']:.3f} kB (goal {goal:.3f})", file=sys.stderr, flush=True)
            if rows[-1]["held_out_kb"] <= goal or seconds > job["limit"]: break
    out = dict(peak_mib=round(memory() - (0 if torch.cuda.is_available() else loaded)), rows=rows)
    if goal: out.update(goal_kb=goal, reached=rows[-1]["held_out_kb"] <= goal)
    return out


# ---------------------------------------------------------------- the comparison

def make_sd15(folder):
    "A pipeline with Stable Diffusion 1.5's shapes, random weights, and the embedded model's tokenizer"
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from ddpo_scratch.sd import load_pipeline
    torch.manual_seed(0)
    tiny, widths = load_pipeline("tiny"), (128, 256, 512, 512)
    tiny.tokenizer.model_max_length = 77
    ids = {k: getattr(tiny.text_encoder.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768, **ids))
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=2, sample_size=512, down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4)
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae, text, tiny.tokenizer, UNet2DConditionModel(sample_size=64, cross_attention_dim=768), scheduler, None, None, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)


def ask(job, python):
    "Run a side in a process of its own -> what it printed last"
    with tempfile.TemporaryDirectory() as folder:
        job = dict(job, folder=folder)
        env = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), **QUIET}
        done = subprocess.run([python, __file__, "--worker", json.dumps(job)], stdout=subprocess.PIPE, text=True, env=env, cwd=folder)
    if done.returncode: raise SystemExit(f"{job['name']} failed: see above; its settings were {job['fields']}")
    return json.loads(done.stdout.splitlines()[-1])


def equal_jobs(args):
    sides = [("trl", False), ("drop-in", False), ("here", False)] + [("here", True)]*args.compile
    for method, base, quick in (("ddpo", DDPO, QUICK["ddpo"]), ("align", ALIGN, QUICK["align"])):
        fields = base | (quick if args.quick else {}) | dict(mixed_precision=args.precision)
        for k in (0,) if method == "ddpo" else (1, *[fields["sample_num_steps"]]*args.full_chain):
            for side, compiled in sides:
                name = f"{'ddpo' if method == 'ddpo' else f'alignprop K={k}'}, {side}{' compiled' if compiled else ''}"
                yield dict(name=name, side=side, method=method, k=k, compile=compiled, fields=fields | (AS_TRL | dict(train_micro_batch_size=fields["train_batch_size"]) if side == "here" else {}), epochs=1 + args.epochs, target=0, limit=0)


def tuned_jobs(args):
    for name, (side, fields) in TUNED.items():
        yield dict(name=name, side=side, method="ddpo", k=0, compile=False, fields=fields | (QUICK["ddpo"] if args.quick else {}) | dict(seed=args.seed), epochs=2 if args.quick else 400, target=args.target, limit=args.limit)


def summary(job, found):
    rows = found["rows"][1:] if not job["target"] else found["rows"]
    mean = lambda k: round(sum(r[k] for r in rows)/len(rows), 2)
    out = dict(seconds_sampling=mean("sampling"), seconds_training=mean("training"), cpu_seconds=mean("cpu"), pictures=rows[-1]["queries"], epochs=len(rows), peak_mib=found["peak_mib"])
    if job["target"]: out.update(seconds=round(rows[-1]["seconds_so_far"], 1), queries=rows[-1]["queries_so_far"], reached=found["reached"], goal_kb=round(found["goal_kb"], 4))
    keep = ("queries_so_far", "seconds_so_far", "reward", "held_out_kb")
    return out | dict(fields=job["fields"], curve=[{k: round(r[k], 4) for k in keep if k in r} for r in found["rows"]])


def faster(row, other):
    total = lambda r: r["seconds_sampling"] + r["seconds_training"]
    return row | dict(rounds=[total(row)]) if other is None else min(row, other, key=total) | dict(rounds=[*other["rounds"], total(row)])


def table(rows, part):
    if part == "tuned": return [f"{n:42} {'reached' if r['reached'] else 'NOT reached'} after {r['seconds']:8.1f} s, {r['queries']:6} queries" for n, r in rows.items()]
    lines = []
    for name, r in rows.items():
        total, trl = r["seconds_sampling"] + r["seconds_training"], rows.get(f"{name.split(',')[0]}, trl")
        against = f"{(trl['seconds_sampling'] + trl['seconds_training'])/total:.2f} x TRL's speed" if trl else ""
        share = f", {r['share_of_matrix_rate']:.0%} of the device's matrix rate" if "share_of_matrix_rate" in r else ""
        lines.append(f"{name:28} sampling {r['seconds_sampling']:7.2f} s, training {r['seconds_training']:7.2f} s, in all {total:7.2f} s ({r['cpu_seconds']:7.2f} s of CPU), peak {r['peak_mib']:6} MiB  {against}{share}")
    return lines


def main(args):
    import torch
    if (python := shutil.which(args.trl_python)) is None: raise SystemExit(f"--trl_python {args.trl_python}: no such program; give the python of an environment with trl==0.23.1")
    part, path = "tuned" if args.tuned else "equal", Path(tempfile.gettempdir())/"trl_quick.json" if args.quick else HERE/"trl.json"
    log, model = json.loads(path.read_text()) if path.exists() else {}, args.model
    with tempfile.TemporaryDirectory() as folder:
        if args.shape == "sd15": model = make_sd15(folder)
        if model == "tiny":
            from ddpo_scratch.sd import TINY
            model = str(TINY)
        else: model = str(Path(model).resolve())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = dict(model=args.shape or Path(model).name, device=device, threads=args.threads, torch=torch.__version__, precision=args.precision, quick=args.quick)
        found = log.setdefault(part, dict(about=about, rows={}))
        if found["about"] != about: raise SystemExit(f"{path.name} holds a run of {found['about']}, this one is of {about}: move the file away first")
        if args.only: found["rows"] = {name: row for name, row in found["rows"].items() if args.only not in name}
        jobs = [job for job in (tuned_jobs if args.tuned else equal_jobs)(args) if (args.only in job["name"] if args.only else job["name"] not in found["rows"])]
        for job in jobs*(1 if args.tuned else args.rounds):
            job = dict(job, model=model, threads=args.threads, quick=args.quick)
            row = summary(job, ask(job, os.path.abspath(python) if job["side"] == "trl" else sys.executable)) | dict(load=round(os.getloadavg()[0], 1))
            if not args.tuned: row = faster(row, found["rows"].get(job["name"]))
            found["rows"][job["name"]] = row
            if args.rate and job["side"] == "here" and job["method"] == "ddpo" and part == "equal":
                r = ask(job | dict(side="rate"), sys.executable)
                row["share_of_matrix_rate"] = round(r["epoch_flops"]/(row["seconds_sampling"] + row["seconds_training"])/r["matrix_flops_per_second"], 4)
            path.write_text(json.dumps(log, indent=1) + "\n")
            print(dict(zip(found["rows"], table(found["rows"], part)))[job["name"]], flush=True)
    print("\n".join(["", *table(found["rows"], part)]))


if __name__ == "__main__":
    if sys.argv[1] == "--worker": print(json.dumps(worker(json.loads(sys.argv[2]))))
    else:
        p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        p.add_argument("--trl_python", required=True, help="python of an environment with trl==0.23.1")
        p.add_argument("--model", default="tiny", help="'tiny' or a folder in diffusers' format")
        p.add_argument("--shape", choices=["sd15"], help="random weights of these shapes in place of --model")
        p.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
        p.add_argument("--threads", type=int, default=2)
        p.add_argument("--epochs", type=int, default=1, help="measured in each round, after one that warms up")
        p.add_argument("--rounds", type=int, default=2, help="turns that the sides take")
        p.add_argument("--full_chain", action="store_true", help="also AlignProp through all steps")
        p.add_argument("--compile", action="store_true", help="also ours compiled")
        p.add_argument("--rate", action="store_true", help="also the share of the device's matrix rate")
        p.add_argument("--quick", action="store_true", help="sizes that only show that it runs; writes trl_quick.json in the temporary folder")
        p.add_argument("--tuned", action="store_true", help="time to the same reward")
        p.add_argument("--target", type=float, default=.1, help="fall of JPEG size to reach, as a share")
        p.add_argument("--limit", type=float, default=1200., help="training seconds after which a trial gives up")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--only", default="", help="rows whose names hold these words")
        main(p.parse_args())
