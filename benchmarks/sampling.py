"""How long the embedded model takes: 16 pictures, 20 steps, with and without guidance, decoding included.

    python benchmarks/sampling.py [threads]

Prints seconds (they depend on the machine) and ratios (they do so less).
"""
import sys
import time

import torch

from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.sd import StableDiffusion, load_pipeline

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
pipe, seconds = load_pipeline("tiny"), {}
for name, guidance in (("guidance 3", 3.), ("guidance 1", 1.)):
    policy, times = StableDiffusion(pipe, guidance), []
    for _ in range(4):
        start = time.perf_counter()
        fixed_seed_images(policy, ["a fox"]*16, n_steps=20)
        times.append(time.perf_counter() - start)
    seconds[name] = min(times[1:])
    print(f"{name}: {seconds[name]:.2f} s for 16 pictures (best of 3)")
print(f"guidance costs {seconds['guidance 3']/seconds['guidance 1']:.2f} times as much")
