"""Rewards per second: all that run without a download, at 64 and 512 pixels, and with the gradient.

    python benchmarks/rewards.py [threads]

The LAION aesthetic score has its true shape, CLIP ViT-L/14 at 224 pixels, and random weights: the
time is right, the score is not. A dash: there is no gradient, or it was not measured. Numbers
depend on the machine; ratios do so less.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from ddpo_scratch.rewards.base import RewardWorkers, compute_rewards, get_reward
from ddpo_scratch.rewards.jpeg import jpeg_size

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 2
REWARDS = [
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "jpeg_compressibility_estimate",
    "jpeg_incompressibility_estimate",
    "redness",
    "blueness",
    "brightness",
    "colorfulness",
    "target_color('orange')",
    "jpeg_compressibility + 2*target_color('orange')",
    "tiny_clip_score",
    "tiny_preference",
    "tiny_aesthetic",
]


def per_second(n, call, seconds=1.0):
    "Measure n things a call: the best of repeated calls; a slow one is made once."
    best = float("inf")
    begin = time.perf_counter()
    while best == float("inf") or time.perf_counter() < begin + seconds:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return n / best


def pictures(n, size):
    "Draw smooth colours under a little noise: they compress about as photographs do."
    g = torch.Generator().manual_seed(0)
    colors = torch.rand(n, 3, 8, 8, generator=g)
    smooth = torch.nn.functional.interpolate(colors, size=(size, size), mode="bicubic").clamp(0, 1)
    return (smooth + 0.03 * torch.randn(n, 3, size, size, generator=g)).clamp(0, 1)


def plain(reward, images):
    "Score without a gradient."
    with torch.no_grad():
        compute_rewards(reward, images, ["a fox"] * len(images), [{}] * len(images))


def with_gradient(reward, images):
    "Score, and take the gradient to the pixels."
    x = images.clone().requires_grad_()
    rewards, _ = compute_rewards(reward, x, ["a fox"] * len(x), [{}] * len(x))
    torch.autograd.grad(rewards.sum(), x)


def aesthetic():
    "Make the aesthetic score of a CLIP and a head with random weights."
    from ddpo_scratch.rewards.models import AestheticScore, aesthetic_head

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "head.pth"
        torch.save(aesthetic_head().state_dict(), head)
        return AestheticScore(head=str(head), pretrained=None).load()


def show(number):
    "Write a speed with about three digits."
    if number is None:
        return "-"
    return f"{number:,.1f}" if number < 100 else f"{number:,.0f}"


def row(name, *speeds):
    "Print a line of the table."
    print(f"{name:48}" + "".join(f"{show(speed):>14}" for speed in speeds), flush=True)


def reward_row(name, reward, n_small, n_large):
    "Measure a reward at both sizes, with the gradient where there is one."
    speeds = []
    for n, size in ((n_small, 64), (n_large, 512)):
        images = pictures(n, size)
        speeds.append(per_second(n, partial(plain, reward, images)))
        is_differentiable = getattr(reward, "differentiable", False)
        gradient = partial(with_gradient, reward, images)
        speeds.append(per_second(n, gradient) if is_differentiable else None)
    row(name, *speeds)


def one_thread(images, prompts, metadata):
    "Score as jpeg_incompressibility does, on one thread."
    return jpeg_size(images, n_threads=1)


def score_in_background(workers, images):
    "Score four batches, as many at a time as there are workers."
    futures = [
        workers.submit(images, ["a fox"] * len(images), [{}] * len(images)) for _ in range(4)
    ]
    for future in futures:
        future.result()


def main():
    torch.set_num_threads(THREADS)
    print(f"rewards per second, {THREADS} threads of torch")
    print(f"{'':48}" + "".join(f"{c:>14}" for c in ("64 px", "+ gradient", "512 px", "+ gradient")))
    for name in REWARDS:
        reward_row(name, get_reward(name), 64, 8)
    reward_row("aesthetic (ViT-L/14, random weights)", aesthetic(), 2, 2)
    small, large = pictures(64, 64), pictures(8, 512)
    for n in (1, 2, 4):
        speeds = [per_second(len(x), partial(jpeg_size, x, n_threads=n)) for x in (small, large)]
        row(f"jpeg_size, n_threads={n}", speeds[0], None, speeds[1], None)
    for n in (1, 2):
        with RewardWorkers(one_thread, n) as workers:
            speed = per_second(4 * len(large), partial(score_in_background, workers, large))
        row(f"RewardWorkers('thread', {n}), jpeg_size", None, None, speed, None)


if __name__ == "__main__":
    main()
