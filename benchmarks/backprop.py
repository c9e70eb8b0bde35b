"""What K costs and buys on the embedded model: memory, time, bias of the gradient, and how pictures rot.

    python benchmarks/backprop.py [cost] [train]

Writes benchmarks/backprop.json and backprop.png, which the chapter on reward backpropagation shows.
Cost: 4 batches of 4 pictures, 8 steps, eta 1, guidance 3, LoRA of rank 4 on attention with weights nudged off zero, reward tiny_aesthetic;
one thread. Seconds are CPU seconds; memory is the growth of the process's peak (Linux alone tells it).
Bias: one minus the cosine of the mean gradient with that of the full chain, same pictures; noise: spread of the 4 batches over their mean.
Train: 12 updates on 6 animals, eta 0, 8 steps, AdamW 1e-2; scored on held-out noise by the reward, by the cosine of picture and prompt
(tiny_clip_score, not trained on), and by diversity, the mean distance between the pictures' embeddings. One seed.
"""
import ctypes
import json
import os
import re
import sys
import time
from pathlib import Path

if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:  # freed memory goes back at once, so that peaks mean something
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"})

import torch
from torchvision.utils import make_grid, save_image

from ddpo_scratch.backprop import draft_lv_sample, draw_k, refl_sample, truncated_sample
from ddpo_scratch.rollout import generator_for, sample
from ddpo_scratch.sd import StableDiffusion, add_lora, load_pipeline
from ddpo_scratch.tiny_clip import tiny_aesthetic, tiny_clip_score

HERE, T = Path(__file__).parent, 8
PROMPTS = ["a fox", "a cow", "a lion", "a cat", "a frog", "a dog"]
REWARD, CLIP = tiny_aesthetic(), tiny_clip_score()
torch.set_num_threads(1)


def model():
    denoiser = StableDiffusion(load_pipeline("tiny"), guidance_scale=3.)
    return denoiser, add_lora(denoiser, 4)


def peak(reset=False):
    "MiB, the process's largest resident size since the last reset"
    if reset: ctypes.CDLL("libc.so.6").malloc_trim(0); Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def methods(eta):
    "name -> sampler(denoiser, c, generators, epoch), a differentiable x0"
    def cut(rule, **options):
        return lambda d, c, g, e: truncated_sample(d, c, T, eta, g, draw_k(rule, T, generator_for(0, e, "k")), **options)
    return {"K=1": cut(1), "K=2": cut(2), "K=4": cut(4), "K=8": cut("full"), "K=8, checkpointed": cut("full", checkpoint=True), "K=1..8": cut((1, T)),
            "DRaFT-LV": lambda d, c, g, e: draft_lv_sample(d, c, T, eta, g, n=2),
            "ReFL": lambda d, c, g, e: refl_sample(d, c, T, eta, g, generator=generator_for(0, e, "stop"))}


def gradient(denoiser, params, draw, batch):
    "One batch's gradient, CPU seconds, peak MiB above where it began"
    c, g = denoiser.encode(PROMPTS[:4]), [generator_for(0, batch, i) for i in range(4)]
    before, start = peak(reset=True), time.process_time()
    grads = torch.autograd.grad(REWARD(denoiser.decode(draw(denoiser, c, g, batch)), None, None).mean(), params)
    seconds = time.process_time() - start
    return torch.cat([v.flatten() for v in grads]), seconds, peak() - before


def cost():
    denoiser, params = model()
    torch.manual_seed(0)
    for p in params: p.data += .02*torch.randn_like(p)
    draws = {name: draw for name, draw in methods(1.).items() if name != "K=1..8"}
    gradient(denoiser, params, draws["K=1"], 9)  # warm up
    found = {name: [gradient(denoiser, params, draw, b) for b in range(4)] for name, draw in draws.items()}
    full, rows = torch.stack([g for g, _, _ in found["K=8"]]).mean(0), {}
    for name, runs in found.items():
        grads = torch.stack([g for g, _, _ in runs])
        mean = grads.mean(0)
        rows[name] = dict(mib=round(max(m for _, _, m in runs)), seconds=round(min(s for _, s, _ in runs), 2),
                          cosine=round(torch.cosine_similarity(mean, full, dim=0).item(), 3), length=round((mean.norm()/full.norm()).item(), 3),
                          noise=round((grads.std(0).norm()/mean.norm()).item(), 2))
        print(name, rows[name], flush=True)
    return rows


@torch.no_grad()
def judge(denoiser):
    "Pictures on held-out noise, and what the three judges say"
    images = denoiser.decode(sample(denoiser, denoiser.encode(PROMPTS), T, 0., [generator_for(1, i) for i in range(6)]).x0)
    return images, dict(reward=round(REWARD(images, PROMPTS, None).mean().item(), 2), clip=round(CLIP(images, PROMPTS, None).mean().item(), 3),
                        diversity=round(torch.pdist(REWARD.embed_images(images)).mean().item(), 2))


def train():
    runs, strips = {}, []
    for name in ("K=1", "K=8", "K=1..8", "DRaFT-LV", "ReFL"):
        denoiser, params = model()
        draw, optimizer, c = methods(0.)[name], torch.optim.AdamW(params, lr=1e-2, weight_decay=0.), denoiser.encode(PROMPTS)
        images, row = judge(denoiser)
        if not strips: strips.append(images)
        rows = [dict(update=0, **row)]
        for e in range(12):
            x0 = draw(denoiser, c, [generator_for(0, e, i) for i in range(6)], e)
            loss = -REWARD(denoiser.decode(x0), None, None).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.)
            optimizer.step()
            if e % 4 == 3: images, row = judge(denoiser); rows.append(dict(update=e + 1, **row))
        runs[name] = rows
        strips.append(images)
        print(name, rows, flush=True)
    save_image(torch.stack([make_grid(s, nrow=6, padding=1, pad_value=1.) for s in strips]), HERE/"backprop.png", nrow=1, padding=0)
    return runs


if __name__ == "__main__":
    path = HERE/"backprop.json"
    log = json.loads(path.read_text()) if path.exists() else {}
    for part in (p for p in (cost, train) if len(sys.argv) < 2 or p.__name__ in sys.argv[1:]):
        log[part.__name__] = part()
        path.write_text(json.dumps(log, indent=1) + "\n")
