"""Rewards per second: every reward that runs without a download, at 64 and 512 pixels, alone and with the gradient to the pixels.

    python benchmarks/rewards.py [threads]

The LAION aesthetic score has its true shape, CLIP ViT-L/14 at 224 pixels, and random weights: the time is right, the score is not.
A dash: no gradient, or not part of this version. Numbers depend on the machine; ratios do so less.
"""
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddpo_scratch.rewards import REWARDS, RewardWorkers, compute_rewards, get_reward, jpeg_size

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 2


def per_second(n, call, seconds=1.):
    "Best of repeated calls; a slow one is made once."
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() < begin + seconds:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return n/best


def pictures(n, size):
    "Smooth colours under a little noise: they compress about as photographs do."
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(n, 3, 8, 8, generator=g), size=(size, size), mode="bicubic").clamp(0, 1)
    return (smooth + .03*torch.randn(n, 3, size, size, generator=g)).clamp(0, 1)


def both(reward, images):
    "Rewards per second, and with the gradient."
    prompts, metadata = ["a fox"]*len(images), [{}]*len(images)
    plain = per_second(len(images), torch.no_grad()(lambda: compute_rewards(reward, images, prompts, metadata)))
    if not getattr(reward, "differentiable", False): return plain, None
    x = images.clone().requires_grad_()
    return plain, per_second(len(images), lambda: torch.autograd.grad(compute_rewards(reward, x, prompts, metadata)[0].sum(), x))


def rewards():
    "(name, reward or a function that makes it, pictures of 64 and of 512 pixels in a batch)"
    here = [n for n, r in REWARDS.items() if callable(r) and n != "target_color"] + ["target_color('orange')"]
    yield from ((n, lambda n=n: get_reward(n), 64, 8) for n in here)
    yield "jpeg_compressibility + 2*target_color('orange')", lambda: get_reward("jpeg_compressibility + 2*target_color('orange')"), 64, 8
    if importlib.util.find_spec("ddpo_scratch.tiny_clip"):
        yield from ((n, lambda n=n: get_reward(n), 64, 8) for n in ("tiny_clip_score", "tiny_preference", "tiny_aesthetic"))
    if importlib.util.find_spec("ddpo_scratch.reward_models"): yield "aesthetic (ViT-L/14, random weights)", aesthetic, 2, 2


def aesthetic():
    from ddpo_scratch.reward_models import AestheticScore, aesthetic_head
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.save({f"layers.{k.split('layers.')[-1]}": v for k, v in aesthetic_head().state_dict().items()}, head := Path(folder)/"head.pth")
        return AestheticScore(head=str(head), pretrained=None).load()


def main():
    torch.set_num_threads(THREADS)
    show = lambda x: "-" if x is None else f"{x:,.1f}" if x < 100 else f"{x:,.0f}"
    row = lambda *cells: print(f"{cells[0]:48}" + "".join(f"{c:>14}" for c in cells[1:]), flush=True)
    print(f"rewards per second, {THREADS} threads of torch")
    row("", "64 px", "+ gradient", "512 px", "+ gradient")
    for name, make, small, large in rewards():
        reward = make()
        row(name, *(show(x) for n, size in ((small, 64), (large, 512)) for x in both(reward, pictures(n, size))))
    small, large = pictures(64, 64), pictures(8, 512)
    for n in (1, 2, 4):
        row(f"jpeg_size, n_threads={n}", show(per_second(64, lambda: jpeg_size(small, n_threads=n))), "-", show(per_second(8, lambda: jpeg_size(large, n_threads=n))), "-")
    for n in (1, 2):
        with RewardWorkers(lambda images, p, m: jpeg_size(images, n_threads=1), n) as workers:
            score = lambda: [f.result() for f in [workers.submit(large, ["a fox"]*8, [{}]*8) for _ in range(4)]]
            row(f"RewardWorkers('thread', {n}), jpeg_size", "-", "-", show(per_second(32, score)), "-")


if __name__ == "__main__": main()
