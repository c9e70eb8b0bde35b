"""What K costs and buys on the embedded model: memory, time, bias of the gradient, and how pictures
rot.

    python benchmarks/backprop.py [cost] [train]

Writes benchmarks/backprop.json and backprop.png, which the chapter on reward backpropagation shows.
Cost: 4 batches of 4 pictures, 8 steps, eta 1, guidance 3, LoRA of rank 4 on attention with weights
nudged off zero, reward tiny_aesthetic; one thread. Seconds are CPU seconds; memory is the growth of
the process's peak (Linux alone tells it).
Bias: one minus the cosine of the mean gradient with that of the full chain, same pictures; noise:
spread of the 4 batches over their mean.
Train: 12 updates on 6 animals, eta 0, 8 steps, AdamW 1e-2; scored on held-out noise by the reward,
by the cosine of picture and prompt (tiny_clip_score, not trained on), and by diversity, the mean
distance between the pictures' embeddings. One seed.
"""

import ctypes
import json
import os
import re
import sys
import time
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

from ddpo_scratch.methods.backprop import draft_lv_sample, draw_k, refl_sample, truncated_sample
from ddpo_scratch.models.sd import StableDiffusion, add_lora, load_pipeline
from ddpo_scratch.rewards.tiny_clip import tiny_aesthetic, tiny_clip_score
from ddpo_scratch.rollout import generator_for, sample

HERE = Path(__file__).parent
LOG = HERE / "backprop.json"
T = 8
PROMPTS = ["a fox", "a cow", "a lion", "a cat", "a frog", "a dog"]
# The C library reads them when it starts: freed memory goes back at once, so peaks mean something.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def restart_with_environment():
    "Run this script anew with ENVIRONMENT, unless that has been done."
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        command = [sys.executable, *sys.argv]
        os.execve(sys.executable, command, os.environ | ENVIRONMENT)


def load_model():
    "Load the embedded model with a LoRA; the denoiser, and the parameters to train."
    denoiser = StableDiffusion(load_pipeline("tiny"), guidance_scale=3.0)
    return denoiser, add_lora(denoiser, 4)


def reset_peak():
    "Give freed memory back and begin a new peak."
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak():
    "Read the process's largest resident size since the last reset, in MiB."
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def generators(seed, n):
    return [generator_for(seed, i) for i in range(n)]


def methods(eta):
    "Return name -> sampler(denoiser, c, generators, batch), whose x0 is differentiable."

    def truncated(rule, **options):
        def draw(denoiser, c, noise, batch):
            k = draw_k(rule, T, generator_for(0, batch, "k"))
            return truncated_sample(denoiser, c, T, eta, noise, k, **options)

        return draw

    def draft_lv(denoiser, c, noise, batch):
        return draft_lv_sample(denoiser, c, T, eta, noise, n=2)

    def refl(denoiser, c, noise, batch):
        stop = generator_for(0, batch, "stop")
        return refl_sample(denoiser, c, T, eta, noise, generator=stop)

    return {
        "K=1": truncated(1),
        "K=2": truncated(2),
        "K=4": truncated(4),
        "K=8": truncated("full"),
        "K=8, checkpointed": truncated("full", checkpoint=True),
        "K=1..8": truncated((1, T)),
        "DRaFT-LV": draft_lv,
        "ReFL": refl,
    }


def gradient(denoiser, params, reward, draw, batch):
    "Return one batch's gradient, CPU seconds, and the peak in MiB above where it began."
    c = denoiser.encode(PROMPTS[:4])
    noise = [generator_for(0, batch, i) for i in range(4)]
    reset_peak()
    before = peak()
    start = time.process_time()
    images = denoiser.decode(draw(denoiser, c, noise, batch))
    gradients = torch.autograd.grad(reward(images, None, None).mean(), params)
    seconds = time.process_time() - start
    return torch.cat([g.flatten() for g in gradients]), seconds, peak() - before


def cost_row(batches, full):
    "Summarize a method's batches; `full` is the mean gradient of the whole chain."
    gradients = torch.stack([g for g, _, _ in batches])
    mean = gradients.mean(0)
    return dict(
        mib=round(max(mib for _, _, mib in batches)),
        seconds=round(min(seconds for _, seconds, _ in batches), 2),
        cosine=round(torch.cosine_similarity(mean, full, dim=0).item(), 3),
        length=round((mean.norm() / full.norm()).item(), 3),
        noise=round((gradients.std(0).norm() / mean.norm()).item(), 2),
    )


def cost():
    "Measure what each method's gradient costs, and how far it is from the full chain's."
    denoiser, params = load_model()
    reward = tiny_aesthetic()
    # A new LoRA's B is zero, and with it the gradient of A: nudge both off it.
    torch.manual_seed(0)
    for p in params:
        p.data += 0.02 * torch.randn_like(p)
    draws = {name: draw for name, draw in methods(1.0).items() if name != "K=1..8"}
    gradient(denoiser, params, reward, draws["K=1"], 9)  # warm up
    batches = {
        name: [gradient(denoiser, params, reward, draw, batch) for batch in range(4)]
        for name, draw in draws.items()
    }
    full = torch.stack([g for g, _, _ in batches["K=8"]]).mean(0)
    rows = {}
    for name in draws:
        rows[name] = cost_row(batches[name], full)
        print(name, rows[name], flush=True)
    return rows


@torch.no_grad()
def judge(denoiser, reward, clip):
    "Draw on held-out noise; the pictures, and what the three judges say."
    rollout = sample(denoiser, denoiser.encode(PROMPTS), T, 0.0, generators(1, 6))
    images = denoiser.decode(rollout.x0)
    return images, dict(
        reward=round(reward(images, PROMPTS, None).mean().item(), 2),
        clip=round(clip(images, PROMPTS, None).mean().item(), 3),
        diversity=round(torch.pdist(reward.embed_images(images)).mean().item(), 2),
    )


def train_one(draw, reward, clip):
    "Train 12 updates, judged every four; the rows, and the pictures before and after."
    denoiser, params = load_model()
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    c = denoiser.encode(PROMPTS)
    first, row = judge(denoiser, reward, clip)
    rows = [dict(update=0, **row)]
    for update in range(12):
        noise = [generator_for(0, update, i) for i in range(6)]
        x0 = draw(denoiser, c, noise, update)
        loss = -reward(denoiser.decode(x0), None, None).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if update % 4 == 3:
            last, row = judge(denoiser, reward, clip)
            rows.append(dict(update=update + 1, **row))
    return rows, first, last


def train():
    "Train by each method, and save a strip of pictures: untrained, then one row a method."
    reward = tiny_aesthetic()
    clip = tiny_clip_score()
    runs = {}
    strips = []
    for name in ("K=1", "K=8", "K=1..8", "DRaFT-LV", "ReFL"):
        runs[name], first, last = train_one(methods(0.0)[name], reward, clip)
        strips += [last] if strips else [first, last]
        print(name, runs[name], flush=True)
    grids = [make_grid(images, nrow=6, padding=1, pad_value=1.0) for images in strips]
    save_image(torch.stack(grids), HERE / "backprop.png", nrow=1, padding=0)
    return runs


def main(names):
    torch.set_num_threads(1)
    log = json.loads(LOG.read_text()) if LOG.exists() else {}
    for part in (cost, train):
        if not names or part.__name__ in names:
            log[part.__name__] = part()
            LOG.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    restart_with_environment()
    main(sys.argv[1:])
