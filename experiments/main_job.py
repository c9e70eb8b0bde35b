"""The main job, three times: DDPO-IS on the embedded model, JPEG compressibility over the 45 common animals.

    python experiments/main_job.py              # seeds 0 1 2; a finished seed is not run again

Each seed trains with the defaults of `ddpo_train`, then base and fine-tuned model draw the 45 animals with 2 held-out seeds each.
Writes main_job.json (sizes, classifier accuracy, minutes, metrics of every epoch) and main_job.png (the first seed, before and after).
"""
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddpo_scratch.evaluate import before_after, fixed_seed_images, read_metrics
from ddpo_scratch.prompts import COMMON_ANIMALS, article
from ddpo_scratch.rewards import jpeg_size
from ddpo_scratch.sd import StableDiffusion, load_lora, load_pipeline
from ddpo_scratch.tiny import load_classifier
from ddpo_scratch.train import TrainConfig, fit

HERE = Path(__file__).with_suffix("")
PROMPTS, NAMES = [f"{article(a)} {a}" for a in COMMON_ANIMALS]*2, COMMON_ANIMALS*2


def measure(pipe, judge):
    images = fixed_seed_images(StableDiffusion(pipe, TrainConfig.sample_guidance_scale), PROMPTS, seed=1000, batch_size=45)
    kb = jpeg_size(images).double()
    return images, dict(n=len(kb), kb_mean=kb.mean().item(), kb_se=(kb.std()/len(kb)**.5).item(),
                        accuracy=sum(a == b for a, b in zip(judge.names(images), NAMES))/len(NAMES))


def main(seeds=(0, 1, 2), threads=2):
    torch.set_num_threads(threads)
    judge, path = load_classifier(), HERE.with_suffix(".json")
    for seed in seeds:
        log = json.loads(path.read_text()) if path.exists() else dict(command="python experiments/main_job.py", config=None, runs={})
        if str(seed) in log["runs"]: continue
        with tempfile.TemporaryDirectory() as tmp:
            config, start = TrainConfig(seed=seed, logdir=tmp), time.perf_counter()
            folder = fit(config)
            minutes = (time.perf_counter() - start)/60
            before, a = measure(load_pipeline("tiny"), judge)
            after, b = measure(load_lora(load_pipeline("tiny"), folder), judge)
            rows = [{k: round(v, 5) for k, v in r.items()} for r in read_metrics(folder)]
        if seed == 0:
            before_after(before[:45][::2][:16], after[:45][::2][:16], PROMPTS[:45][::2][:16]).savefig(HERE.with_suffix(".png"))
        log = json.loads(path.read_text()) if path.exists() else log                      # another process may have finished a seed
        log["config"] = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("seed", "logdir")}
        log["runs"][str(seed)] = dict(before=a, after=b, fall=1 - b["kb_mean"]/a["kb_mean"], minutes=round(minutes, 1), threads=threads, rows=rows)
        log["runs"] = dict(sorted(log["runs"].items()))
        path.write_text(json.dumps(log, indent=1) + "\n")
        print(f"seed {seed}: {a['kb_mean']:.3f} -> {b['kb_mean']:.3f} kB, accuracy {a['accuracy']:.0%} -> {b['accuracy']:.0%}, {minutes:.1f} min", flush=True)


if __name__ == "__main__":
    main(tuple(int(s) for s in sys.argv[1].split(",")) if len(sys.argv) > 1 else (0, 1, 2), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
