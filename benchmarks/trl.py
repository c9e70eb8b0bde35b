"""Take an epoch of this package and of TRL 0.23.1, on the same pipeline folder, in one run.

    python -m venv trlenv && trlenv/bin/pip install trl==0.23.1 torch diffusers peft accelerate
    python benchmarks/trl.py --trl_python trlenv/bin/python            # seconds and peak memory
    python benchmarks/trl.py --trl_python trlenv/bin/python --compile  # and ours compiled
    python benchmarks/trl.py --trl_python trlenv/bin/python --tuned    # to the same reward

--help lists the options. On a GPU, with random weights of a published model's shapes:

    python benchmarks/trl.py --trl_python trlenv/bin/python --shape sd15   # all sides
    python benchmarks/trl.py --shape sdxl                                  # ours alone
    python benchmarks/trl.py --shape sd35m
    python benchmarks/trl.py --trl_python ... --shape small --precision no # does it run? on a CPU

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

Shapes: 16 pictures in 10 steps, guidance 5, LoRA of rank 4, float16. "batches of 4" and "of 16"
are what goes through the network at a time, on both sides; "filled" is ours with
train_micro_batch_size auto. One process takes all settings of a side, one after the other, and each
row is written as it comes; no setting is begun after --minutes. Ours also notes what one update of
one micro-batch launches, counted by torch.profiler: operators, and on a GPU kernels and the share
of the time in which the device works. TRL knows neither SDXL nor Stable Diffusion 3.5.

Writes benchmarks/trl.json: under "equal", "tuned" or a shape with its device, a row a side. A row
that is there is measured again only when --only names it."""

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
    if job.get("profile"):
        job["profiled"] = profile_of(state)
        job["chosen"] = state.config.train_micro_batch_size


def profile_of(state):
    "Count what an update of one micro-batch launches, and the share of time the device works."
    import dataclasses

    import torch
    from torch.profiler import ProfilerActivity, profile
    from ddpo_scratch.train import collect, update

    size = max(1, state.config.train_micro_batch_size)
    state.config = dataclasses.replace(state.config, sample_num_batches_per_epoch=1)
    samples = collect(state)
    rows = torch.arange(size) % len(samples.rollout)
    steps = state.method.steps(state.denoiser.path)[:1].expand(size, 1)
    update(state, samples, rows, steps)  # whatever is done once is done
    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    start = now()
    with profile(activities=kinds) as seen:
        update(state, samples, rows, steps)
        seconds = now() - start
    events = seen.events()
    out = dict(rows=size, seconds=round(seconds, 4))
    # those that call no others: a linear layer is one matrix product
    out["operators"] = sum(e.name.startswith("aten::") and not e.cpu_children for e in events)
    if on_gpu:
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        out["kernels"] = len(kernels)
        out["launches"] = sum("LaunchKernel" in event.name for event in events)
        # of one stream: kernels do not overlap
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
        out["device_works"] = round(busy / seconds, 3)
    return out


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
    out |= {name: job[name] for name in ("profiled", "chosen") if name in job}
    if goal is not None:
        out.update(goal_kb=goal, reached=rows[-1]["held_out_kb"] <= goal)
    return out


def did(job):
    "Do a job; return what it measured."
    import gc

    import diffusers
    import torch

    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    if job["side"] == "rate":
        rate = matrix_rate(job["fields"]["mixed_precision"])
        return dict(epoch_flops=epoch_flops(job), matrix_flops_per_second=rate)
    out = measure(job)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return out


def worker(jobs):
    "Do jobs, one after the other, in a process of their own; print a line of JSON for each."
    for job in jobs:
        print(json.dumps(did(job)), flush=True)


# ---------------------------------------------------------------- the comparison


def text_encoder(tokenizer, width, layers, projected):
    "Make a CLIP text encoder of a shape, with random weights."
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def decoder(channels=4, widths=(128, 256, 512, 512)):
    "Make an autoencoder of Stable Diffusion's shape, with random weights."
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        force_upcast=False,
    )


def vp_scheduler():
    "Make the scheduler of Stable Diffusion 1 and XL."
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd15(tokenizer):
    "Make a pipeline of Stable Diffusion 1.5's shapes."
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=decoder(),
        text_encoder=text_encoder(tokenizer, 768, 12, projected=False),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=vp_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def small(tokenizer):
    "Make a pipeline with Stable Diffusion 1.5's blocks, and a fraction of its channels."
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 64, 64), cross_attention_dim=64
    )
    return StableDiffusionPipeline(
        vae=decoder(widths=(32, 32)),
        text_encoder=text_encoder(tokenizer, 64, 2, projected=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=vp_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(tokenizer):
    "Make a pipeline of Stable Diffusion XL's shapes."
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=decoder(),
        text_encoder=text_encoder(tokenizer, 768, 12, projected=False),
        text_encoder_2=text_encoder(tokenizer, 1280, 32, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=vp_scheduler(),
    )


def sd35m(tokenizer):
    "Make a pipeline of Stable Diffusion 3.5 medium's shapes, without T5, which nothing trains."
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=decoder(channels=16),
        text_encoder=text_encoder(tokenizer, 768, 12, projected=True),
        text_encoder_2=text_encoder(tokenizer, 1280, 32, projected=True),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


# shape -> how it is made, and whether TRL knows such pipelines
SHAPES = dict(sd15=(sd15, True), small=(small, True), sdxl=(sdxl, False), sd35m=(sd35m, False))


def write_old_tokenizer(folder):
    "Write vocab.json and merges.txt beside a tokenizer.json, which transformers 4 reads alone."
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def make_shape(name, folder, precision):
    "Write a pipeline of a model's shapes: random weights, the embedded model's tokenizer."
    import torch
    from ddpo_scratch.models.sd import load_pipeline

    make, _ = SHAPES[name]
    tokenizer = load_pipeline("tiny").tokenizer
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # billions of numbers are drawn where they are drawn fastest, and written as they are read
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipe = make(tokenizer)
    pipe.to("cpu", dtype).save_pretrained(folder)
    for part in Path(folder).glob("tokenizer*"):
        write_old_tokenizer(part)
    return str(folder)


def run(jobs, python):
    "Do jobs in one process of their own; yield what each has measured as it comes."
    with tempfile.TemporaryDirectory() as folder:
        jobs = [dict(job, folder=folder) for job in jobs]
        threads = str(jobs[0]["threads"])
        process = subprocess.Popen(
            [python, __file__, "--worker", json.dumps(jobs)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, **QUIET},
            cwd=folder,
        )
        try:
            for job in jobs:
                line = next((line for line in process.stdout if line.startswith("{")), None)
                if line is None:
                    raise SystemExit(
                        f"{job['name']} failed: see above; its settings were {job['fields']}"
                    )
                yield json.loads(line)
        finally:
            process.kill()
            process.wait()


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


def shape_jobs(args):
    "Yield the jobs of a shape: all of one side, then all of the next."
    fields = dict(
        sample_num_steps=4 if args.quick else 10,
        sample_guidance_scale=5.0,
        mixed_precision=args.precision,
        seed=0,
        train_learning_rate=3e-4,
    )
    sizes = (4, 16) if args.shape in ("sd15", "small") else (1, 4)
    batches = {f"batches of {n}": (n, {}) for n in sizes}
    filled = batches | {"filled": (16, dict(train_micro_batch_size="auto"))}
    if args.compile:
        filled["compiled"] = (4, dict(compile=True))
    family = dict(sd35m=dict(method="flow_grpo", sample_eta=0.0)).get(args.shape, {})
    for side in ("here", "trl", "drop-in"):
        if side != "here" and not (SHAPES[args.shape][1] and args.trl_python):
            continue
        for name, (n, more) in (filled if side == "here" else batches).items():
            drawn = dict(sample_batch_size=n, sample_num_batches_per_epoch=16 // n)
            same = fields | drawn | dict(train_batch_size=n)
            ours = AS_TRL | family | dict(train_micro_batch_size=n) | more
            if args.shape == "sd35m":
                ours |= dict(height=512, width=512, sample_images_per_prompt=4)
            yield dict(
                name=f"{name}, {side}",
                side=side,
                method="ddpo",
                k=0,
                compile=bool(ours.pop("compile", False)),
                fields=same | ours if side == "here" else same,
                epochs=1 + args.epochs,
                target=0,
                limit=0,
                profile=side == "here",
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
    out |= {name: measured[name] for name in ("profiled", "chosen") if name in measured}
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
    if profiled := row.get("profiled"):
        parts.append(f"{profiled['operators']} operators for {profiled['rows']} transitions")
    if "kernels" in row.get("profiled", {}):
        works = f"the device works {profiled['device_works']:.0%} of the time"
        parts.append(f"{profiled['kernels']} kernels, {profiled['launches']} launches, {works}")
    if "share_of_matrix_rate" in row:
        parts.append(f"{row['share_of_matrix_rate']:.0%} of the device's matrix rate")
    return ", ".join(parts)


def share_of_matrix_rate(job, row):
    "Return which share of the device's rate on matrix products a row reaches."
    (rate,) = run([job | dict(side="rate")], sys.executable)
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

    if args.shape:
        return make_shape(args.shape, Path(scratch) / "model", args.precision)
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
    kind = shape_jobs if args.shape else tuned_jobs if args.tuned else equal_jobs
    jobs = [job for job in kind(args) if args.trl_python or job["side"] != "trl"]
    if not args.only:
        return [job for job in jobs if job["name"] not in rows]
    for name in [name for name in rows if args.only in name]:
        del rows[name]
    return [job for job in jobs if args.only in job["name"]]


def part_of(args, about):
    "Name the part of the log: a shape has one for each device that it ran on."
    if args.shape:
        return f"{args.shape} on {about['device']}"
    return "tuned" if args.tuned else "equal"


def in_processes(args, jobs):
    "Group jobs by the process that does them: of a shape, all of a side; otherwise one each."
    jobs = jobs * (1 if args.tuned else args.rounds)
    if not args.shape:
        return [[job] for job in jobs]
    sides = dict.fromkeys(job["side"] for job in jobs)
    return [[job for job in jobs if job["side"] == side] for side in sides]


def kept_row(args, job, measured, rows):
    "Make the row of a job that was measured once more, with the rate that it reaches."
    row = summary(job, measured)
    row["load"] = round(os.getloadavg()[0], 1)
    if args.tuned:
        return row
    row = faster(row, rows.get(job["name"]))
    if args.rate and job["side"] == "here" and job["method"] == "ddpo":
        row["share_of_matrix_rate"] = share_of_matrix_rate(job, row)
    return row


def compare(args, model, python):
    "Do the jobs, and write and print each row as it comes."
    about, start = about_run(args, model), time.monotonic()
    path = Path(tempfile.gettempdir()) / "trl_quick.json" if args.quick else HERE / "trl.json"
    log, rows = open_log(path, part_of(args, about), about)
    line = tuned_line if args.tuned else equal_line
    for jobs in in_processes(args, jobs_to_do(args, rows)):
        jobs = [dict(j, model=model, threads=args.threads, quick=args.quick) for j in jobs]
        measured = run(jobs, python if jobs[0]["side"] == "trl" else sys.executable)
        for job in jobs:
            if args.minutes and time.monotonic() - start > 60 * args.minutes:
                print(f"{job['name']}: not begun, {args.minutes:g} minutes are over", flush=True)
                continue
            rows[job["name"]] = kept_row(args, job, next(measured), rows)
            path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
            print(line(job["name"], rows[job["name"]], rows), flush=True)
        measured.close()
    print()
    for name, row in rows.items():
        print(line(name, row, rows))


def options():
    "Return the command line's parser."
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument(
        "--trl_python", help="python of an environment with trl==0.23.1; else ours alone"
    )
    p.add_argument("--model", default="tiny", help="'tiny' or a folder in diffusers' format")
    p.add_argument("--shape", choices=[*SHAPES], help="random weights of a model's shapes instead")
    p.add_argument("--minutes", type=float, help="begin no setting later; of a shape 12")
    p.add_argument("--precision", choices=["no", "bf16", "fp16"], help="no, and of a shape fp16")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--epochs", type=int, default=1, help="measured in a round, after a warm-up")
    p.add_argument("--rounds", type=int, help="turns that the sides take: 2, and of a shape 1")
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
    python = args.trl_python and shutil.which(args.trl_python)
    if args.trl_python and python is None:
        raise SystemExit(
            f"--trl_python {args.trl_python}: no such program; "
            "give the python of an environment with trl==0.23.1"
        )
    args.precision = args.precision or ("fp16" if args.shape else "no")
    args.rounds = args.rounds or (1 if args.shape else 2)
    args.minutes = args.minutes or (12 if args.shape else 0)
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, folder_of(args, scratch), python and os.path.abspath(python))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        main(options().parse_args())
