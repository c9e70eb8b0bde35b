"""How long the embedded model takes: 16 pictures, 20 steps, with and without guidance, decoded.

    python benchmarks/sampling.py [threads]

Prints seconds (they depend on the machine) and ratios (they do so less).
"""

import sys
import time

import torch

from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.models.sd import StableDiffusion, load_pipeline


def seconds(policy):
    "Time four drawings; return the best of the last three, since the first one warms up."
    times = []
    for _ in range(4):
        start = time.perf_counter()
        fixed_seed_images(policy, ["a fox"] * 16, n_steps=20)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main(threads=2):
    torch.set_num_threads(threads)
    pipe = load_pipeline("tiny")
    times = {}
    for guidance in (3, 1):
        times[guidance] = seconds(StableDiffusion(pipe, float(guidance)))
        print(f"guidance {guidance}: {times[guidance]:.2f} s for 16 pictures (best of 3)")
    print(f"guidance costs {times[3] / times[1]:.2f} times as much")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
