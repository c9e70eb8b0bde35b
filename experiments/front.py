"""The front page's picture: eight animals learn to please four rewards.

    python experiments/front.py FOLDER                    # all four; finished ones are not repeated
    python experiments/front.py FOLDER --only blueness    # one of them: four minutes on one core

Each run is `ddpo_train --preset tiny_minute` with another reward and a fixed number of epochs.
After every second optimizer step the same eight animals are drawn from the same noise. FOLDER gets
a file of pictures for each run. Once all are there, nbs/images/front.webp is made of them (one
drawing fades into the next), a still of its end, nbs/images/front.png, and front.json, which has
the rewards.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from ddpo_scratch.config import preset
from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.models.tiny import load_classifier
from ddpo_scratch.prompts import article
from ddpo_scratch.rewards.base import Scorer, get_reward
from ddpo_scratch.run.setup import setup
from ddpo_scratch.train import train

ROOT = Path(__file__).resolve().parents[1]
LOG = Path(__file__).with_suffix(".json")
IMAGES = ROOT / "nbs/images"
ANIMALS = ["cat", "dog", "fox", "lion", "raccoon", "butterfly", "frog", "rabbit"]
PROMPTS = [f"{article(name)} {name}" for name in ANIMALS]
SEED = 0  # of training and of the pictures' noise
PER_EPOCH = 64  # pictures drawn and scored
EVERY = 2  # updates between two drawings; an epoch has four
# reward: what it likes in a reader's words; epochs of 64 pictures, fewer where the animals would
# lose their faces; how its number is written
REWARDS = {
    "jpeg_compressibility": ("small files", 4, lambda value: f"{-value:.2f} kB"),
    "jpeg_incompressibility": ("large files", 6, lambda value: f"{value:.2f} kB"),
    "tiny_aesthetic": ("sunsets", 8, lambda value: f"score {value:.1f}"),
    "blueness": ("blue", 6, lambda value: f"blueness {100 * value:+.0f} %"),
}
PICTURE, LABEL, HEAD, GAP = 96, 132, 40, 4  # pixels
INK, FAINT, BAR = (30, 30, 30), (110, 110, 110), (66, 133, 190)
BLENDS = 3  # pictures shown from one drawing to the next, the next included
STEP_MS, FIRST_MS, LAST_MS = 150, 1500, 3000


@torch.no_grad()
def draw(state):
    "Draw the animals with the weights as they are; the base model's guidance, as every look has."
    config, denoiser = state.config, state.denoiser
    trained_scale, denoiser.guidance_scale = denoiser.guidance_scale, config.eval_guidance_scale
    options = (config.look_steps, config.look_eta)
    images = fixed_seed_images(denoiser, PROMPTS, SEED, *options)
    denoiser.guidance_scale = trained_scale
    return images.mul(255).round().byte()


def run(reward, folder):
    "Train for one reward, on from where an earlier call ended; keep pictures of the way."
    file, epochs = folder / f"{reward}.pt", REWARDS[reward][1]
    options = dict(reward_fn=reward, num_epochs=epochs, stop_gain=0.0, eval_num_images=0, seed=SEED)
    frames, queries, start = [], [], time.perf_counter()
    if file.exists():
        kept = torch.load(file)
        frames, queries = list(kept["frames"]), kept["queries"]
        options["resume_from"] = str(folder / "runs" / f"awm-{reward}-001")
    state = setup(preset("tiny_minute", logdir=str(folder / "runs"), **options))
    if not frames:
        frames, queries = [draw(state)], [0]
    for step in train(state=state):
        if step.update % EVERY == 0:
            frames.append(draw(state))
            queries.append(state.reward_queries)
        if step.metrics:
            mean, seconds = step.metrics["reward_mean"], time.perf_counter() - start
            print(f"{reward}, epoch {step.epoch}: {mean:.3f}, {seconds:.0f} s", flush=True)
    torch.save(dict(frames=torch.stack(frames), queries=queries), file)


def finished(reward, folder):
    "Say whether a reward's pictures are all there."
    file = folder / f"{reward}.pt"
    return file.exists() and torch.load(file)["queries"][-1] >= PER_EPOCH * REWARDS[reward][1]


@torch.no_grad()
def measure(reward, images):
    "Score a drawing: the mean reward, and how many animals the classifier names."
    scores, _ = Scorer(get_reward(reward))(images, PROMPTS, [{}] * len(PROMPTS))
    names = load_classifier().names(images)
    named = sum(a == b for a, b in zip(names, ANIMALS, strict=True))
    return dict(reward=round(scores.mean().item(), 4), named=named)


def font(size, bold=False):
    "Open the font that comes with matplotlib."
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}", size)


def sheet(rows, most):
    "Lay a moment out: for each reward its pictures, their mean reward, and the pictures scored."
    width = LABEL + len(ANIMALS) * (PICTURE + GAP)
    page = Image.new("RGB", (width, HEAD + len(rows) * (PICTURE + GAP)), "white")
    pen = ImageDraw.Draw(page)
    count = max(queries for _, _, queries in rows.values())
    pen.text((8, 9), f"pictures scored: {count:3}", INK, font(17, bold=True))
    left, right = LABEL + 2 * (PICTURE + GAP), width - GAP - 1
    pen.rectangle((left, 15, right, 25), outline=FAINT)
    pen.rectangle((left, 15, left + (right - left) * count / most, 25), fill=BAR)
    for y, (reward, (images, value, queries)) in enumerate(rows.items()):
        likes, _, written = REWARDS[reward]
        top = HEAD + y * (PICTURE + GAP)
        pen.text((8, top + 18), likes, INK, font(16, bold=True))
        pen.text((8, top + 43), written(value), FAINT, font(13))
        pen.text((8, top + 63), f"{queries} scored", FAINT, font(13))
        for x, image in enumerate(images):
            pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
            large = Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            page.paste(large, (LABEL + x * (PICTURE + GAP), top))
    return page


def film(runs, looks):
    "Make the film's pages and their durations: drawings fade into the next, short runs wait."
    n = max(len(run["queries"]) for run in runs.values())
    most = max(run["queries"][-1] for run in runs.values())
    pages = []
    for k in range(n):
        for blend in range(1, BLENDS + 1) if k else [BLENDS]:
            rows = {}
            for reward, run in runs.items():
                last = len(run["queries"]) - 1
                now, before = min(k, last), min(max(k - 1, 0), last)
                images = torch.lerp(run["images"][before], run["images"][now], blend / BLENDS)
                rows[reward] = images, looks[reward][now]["reward"], run["queries"][now]
            pages.append(sheet(rows, most))
    return pages, [FIRST_MS] + [STEP_MS] * (len(pages) - 2) + [LAST_MS]


def compose(folder):
    "Make the picture, the still and the log of all runs."
    runs, looks = {}, {}
    for reward in REWARDS:
        kept = torch.load(folder / f"{reward}.pt")
        runs[reward] = dict(images=kept["frames"].float() / 255, queries=kept["queries"])
        looks[reward] = []
        for images, queries in zip(runs[reward]["images"], kept["queries"], strict=True):
            looks[reward].append(dict(queries=queries) | measure(reward, images))
    pages, durations = film(runs, looks)
    options = dict(save_all=True, append_images=pages[1:], duration=durations, loop=0)
    # method 6 is the slowest and smallest; at quality 60 no block is seen
    pages[0].save(IMAGES / "front.webp", quality=60, method=6, **options)
    pages[-1].save(IMAGES / "front.png")
    log = dict(command="python experiments/front.py FOLDER", animals=ANIMALS, seed=SEED)
    LOG.write_text(json.dumps(log | dict(looks=looks), indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where pictures wait")
    parser.add_argument("--only", choices=REWARDS, help="one of the rewards")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for reward in REWARDS:
        if args.only in (None, reward) and not finished(reward, args.folder):
            run(reward, args.folder)
    if all(finished(reward, args.folder) for reward in REWARDS):
        compose(args.folder)


if __name__ == "__main__":
    main()
