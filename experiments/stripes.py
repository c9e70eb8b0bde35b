"""Can the embedded model be made to obey "striped" and "checked", which it ignores?

    python experiments/stripes.py           # every job that stripes.jsonl does not have yet
    python experiments/stripes.py base      # one of them

All jobs ask for eight animals on striped and on checked backgrounds, and are measured on the same
64 pictures from held-out noise (10 steps, no guidance, as in training): how often the background is
what was asked for (name_patterns), how often the classifier names the animal, and both for eight
animals that no job has trained on.

base        nothing is trained: what a policy gradient has to start from, in groups of four pictures
awm         advantage-weighted matching on the graded reward, from the base model
varied      denoising loss on composed pictures whose stripes have any direction, period and phase
fixed       the same number of steps on pictures that all have the same stripes, or the same checks
short       fewer steps of it: a model that draws the patterns sometimes, and starts the warm jobs
dpo         Diffusion-DPO on pairs of such a picture and the same scene on a plain background
warm        advantage-weighted matching from that model, three seeds
shuffled    the same with each reward given to another picture, three seeds
gradient    AlignProp through the graded reward, from the base model: no picture need obey by chance
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import torch
from comparison import Shuffled, add_line, read_log
from PIL import Image

from ddpo_scratch.config import preset
from ddpo_scratch.evaluate import fixed_seed_images, save_sheet
from ddpo_scratch.methods.dpo import encode_pictures
from ddpo_scratch.models.base import load
from ddpo_scratch.models.tiny import CONCEPTS, KINDS, caption, compose, draw_scenes, load_sprites
from ddpo_scratch.prompts import article, from_list
from ddpo_scratch.rewards.base import compute_rewards, get_reward
from ddpo_scratch.rewards.patterns import name_patterns, pattern_shares
from ddpo_scratch.rollout import generator_for
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.run.setup import setup
from ddpo_scratch.train import train

HERE = Path(__file__).with_suffix("")
LOG = HERE.with_suffix(".jsonl")
RUNS = Path("runs/stripes")
ANIMALS = "cat dog fox frog pig bee lion rabbit".split()
OTHERS = "bird sheep cow monkey mouse duck wolf bear".split()
WANTED = ("striped", "checked")
STEPS, HELD_OUT_SEED = 10, 1000
SCENES, BATCH, RATE = 512, 32, 1e-3  # of the supervised jobs: pictures, a batch, Adam
LONG, SHORT = 40, 20  # their steps
EPOCHS = 4  # of 64 pictures, for the methods that ask the reward
SEEDS = (0, 1, 2)


def prompts_of(animals):
    "Ask for every animal before every pattern."
    return [f"{article(a)} {a} on a {kind} background" for kind in WANTED for a in animals]


PROMPTS = prompts_of(ANIMALS)


@torch.no_grad()
def measure(denoiser, animals, copies):
    "Draw every prompt with several seeds; return the pictures and what they show."
    prompts = prompts_of(animals) * copies
    images = fixed_seed_images(denoiser, prompts, HELD_OUT_SEED, STEPS, 1.0, 32)
    right = [name in prompt for name, prompt in zip(name_patterns(images), prompts)]
    judge = get_reward("tiny_animal").load()
    named = [name in prompt for name, prompt in zip(judge.network.names(images), prompts)]
    graded, _ = compute_rewards(get_reward("patterns"), images, prompts, [{}] * len(prompts))
    each = [round(value, 3) for value in graded.tolist()]
    row = dict(right=[int(x) for x in right], named=[int(x) for x in named], graded=each)
    return images, row


def look(denoiser, job):
    "Measure a model on its own animals and on others, and keep a sheet of pictures."
    images, row = measure(denoiser, ANIMALS, 4)
    if not job.endswith(("-1", "-2")):
        save_sheet(images[:32], HERE / f"{job}.webp", columns=8)
    return dict(animals=row, others=measure(denoiser, OTHERS, 1)[1])


# ---------------------------------------------------------------- what exploration finds


def explore(job):
    "Draw 48 groups of four as training does, and say which of them tell pictures apart."
    denoiser = load("tiny", guidance_scale=1.0)
    prompts = [p for p in PROMPTS * 3 for _ in range(4)]
    with torch.no_grad():
        images = fixed_seed_images(denoiser, prompts, 0, STEPS, 1.0, 32)
    shares = pattern_shares(images)
    asked = torch.tensor([WANTED.index(w) for p in prompts for w in WANTED if w in p])
    own = shares.gather(1, asked[:, None])[:, 0]
    right = [name in prompt for name, prompt in zip(name_patterns(images), prompts)]
    blue = [f"{article(a)} {a} on a blue background" for a in ANIMALS] * 4
    with torch.no_grad():
        plain = fixed_seed_images(denoiser, blue, HELD_OUT_SEED, STEPS, 1.0, 32)
    return dict(
        share=[round(value, 4) for value in own.tolist()],
        right=[int(x) for x in right],
        plain=[int(name == "plain") for name in name_patterns(plain)],
        look=look(denoiser, job),
    )


# ---------------------------------------------------------------- composed pictures


def scenes_of(seed):
    "Draw scenes of the eight animals, half of them striped and half checked."
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(name in ANIMALS) for name in CONCEPTS])
    scenes = draw_scenes(SCENES, generator, weights)
    scenes[:, 1] = KINDS.index("striped") + torch.arange(SCENES) % 2
    scenes[:, 3] = 1  # of medium size
    return scenes, generator


def varied_pictures(seed):
    "Compose pictures whose patterns have any direction, period and phase, with their captions."
    scenes, generator = scenes_of(seed)
    return compose(load_sprites(), scenes, generator)[0], [caption(scene) for scene in scenes]


def fixed_pictures(seed):
    "Compose pictures with one kind of stripes and one of checks; plain ones of the same scenes."
    scenes, generator = scenes_of(seed)
    flat = scenes.clone()
    flat[:, 1] = KINDS.index("plain")
    plain, masks = compose(load_sprites(), flat, generator)
    turn = 2 * math.pi * torch.arange(64)
    # the shapes of `_masks` in models.tiny, at phase 0
    stripes = (3 * (turn / 16).sin()).clamp(-1, 1).expand(64, 64) / 2 + 0.5
    wave = (turn / 20).sin()
    checks = (4 * wave[:, None] * wave).clamp(-1, 1) / 2 + 0.5
    is_striped = (scenes[:, 1] == KINDS.index("striped"))[:, None, None, None]
    bars = torch.where(is_striped, stripes, checks)
    # the corner pixel has the background's colour; bars are darker by two fifths
    pictures = plain - 0.4 * plain[:, :, :1, :1] * bars * (1 - masks)
    return pictures.clamp(0, 1), plain, [caption(scene) for scene in scenes]


def supervise(job):
    "Minimise the denoising loss on composed pictures, and measure."
    start = time.perf_counter()
    denoiser = load("tiny", guidance_scale=1.0)
    pictures, *_, captions = varied_pictures(3) if job == "varied" else fixed_pictures(3)
    latents = torch.cat([encode_pictures(denoiser, part) for part in pictures.split(64)])
    known = sorted(set(captions))
    c = denoiser.encode(known)
    line = torch.tensor([known.index(text) for text in captions])
    parameters = [p.requires_grad_() for p in denoiser.network.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=1e-4)
    losses = []
    for step in range(SHORT if job == "short" else LONG):
        generator = generator_for(3, step, "supervised")
        i = torch.randint(SCENES, (BATCH,), generator=generator)
        eps = torch.randn(latents[i].shape, generator=generator)
        t = denoiser.path.draw_t(BATCH, generator)
        loss = denoiser.denoising_loss(latents[i], eps, t, c[line[i]]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(round(loss.item(), 4))
    seconds = time.perf_counter() - start
    if job == "short":
        denoiser.pipe.save_pretrained(RUNS / "short")
    return dict(loss=losses, seconds=round(seconds, 1), look=look(denoiser, job))


def write_pairs(folder):
    "Write pairs of a patterned picture and the same scene on a plain background."
    pictures, plain, captions = fixed_pictures(3)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["prompt,winner,loser"]
    for i in range(SCENES):
        for side, image in (("winner", pictures[i]), ("loser", plain[i])):
            pixels = image.permute(1, 2, 0).mul(255).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{i}-{side}.png")
        lines.append(f"{captions[i]},{i}-winner.png,{i}-loser.png")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


# ---------------------------------------------------------------- methods of the package


def run(job, config, **parts):
    "Train by the package's own loop, and measure."
    config = dataclasses.replace(
        config,
        sample_num_steps=STEPS,
        num_epochs=EPOCHS,
        stop_gain=0.0,
        eval_num_images=0,
        eval_freq=0,
        per_prompt_stat_tracking_buffer_size=8,
        train_micro_batch_size=64,
        # attention alone is on the lower levels, where a stripe is less than a pixel wide
        lora_targets="all",
        logdir=str(RUNS),
        run_name=job,
        # a job that was killed goes on at its last epoch
        resume_from=str(RUNS / job) if any(RUNS.glob(f"{job}/checkpoints/epoch_*")) else "",
    )
    state = setup(config, prompt_fn=from_list(PROMPTS), **parts)
    for _ in train(state=state):
        pass
    rows = read_metrics(state.folder)
    return dict(
        queries=state.reward_queries,
        updates=state.global_step,
        train_reward=[round(row["reward_mean"], 4) for row in rows],
        seconds=round(sum(r["seconds_sampling"] + r["seconds_training"] for r in rows), 1),
        look=look(state.denoiser, job),
    )


def match(job):
    "Run advantage-weighted matching on the graded reward."
    kind, _, seed = job.rpartition("-")
    seed = int(seed)
    model = "tiny" if kind == "awm" else str(RUNS / "short")
    if kind != "awm" and not Path(model).exists():
        raise SystemExit(f"{model} is not there: run the job 'short' first")
    parts = dict(reward_fn=Shuffled("patterns", seed)) if kind == "shuffled" else {}
    config = dataclasses.replace(
        preset("tiny_awm"), model=model, reward_fn="patterns", seed=seed, eval_judges=""
    )
    return run(job, config, **parts)


def backpropagate(job):
    "Send the graded reward's gradient back through the last steps."
    config = dataclasses.replace(
        preset("tiny_alignprop"),
        reward_fn="patterns",
        eval_judges="",
        train_batch_size=8,
        train_learning_rate=1e-3,
    )
    return run(job, config)


def prefer(job):
    "Run Diffusion-DPO on pairs of composed pictures."
    pairs = write_pairs(RUNS / "pairs")
    config = dataclasses.replace(
        preset("tiny_dpo_offline"),
        method=f"dpo_offline(pairs={str(pairs)!r}, beta=300.0)",
        reward_fn="patterns",
    )
    return run(job, config)


JOBS = dict(base=explore, short=supervise, fixed=supervise, varied=supervise)
JOBS |= {f"{kind}-{seed}": match for seed in SEEDS for kind in ("warm", "shuffled")}
JOBS |= {"awm-0": match, "dpo-0": prefer, "gradient-0": backpropagate}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("job", nargs="?", choices=JOBS, help="one of them; else all")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RUNS.mkdir(parents=True, exist_ok=True)
    for job in [args.job] if args.job else JOBS:
        if job in read_log(LOG):
            continue
        record = dict(name=job) | JOBS[job](job)
        add_line(record, LOG)
        animals = record["look"]["animals"]
        right, named = (sum(animals[key]) / len(animals[key]) for key in ("right", "named"))
        print(f"{job}: {right:.0%} as asked, {named:.0%} of the animals named", flush=True)


if __name__ == "__main__":
    main()
