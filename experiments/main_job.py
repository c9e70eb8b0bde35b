"""The main job, three times: DDPO-IS on the embedded model, JPEG compressibility over the 45 common animals.

    python experiments/main_job.py              # jobs 0 1 2, up and collapse; a finished job is not run again
    python experiments/main_job.py 0,1 2        # these jobs, on 2 threads

Jobs 0, 1 and 2 are seeds of the main job, with the defaults of `ddpo_train`; "up" is seed 0 with jpeg_incompressibility, the other way; "collapse" is preset tiny_collapse.
Base and fine-tuned model draw the 45 animals with 2 held-out seeds each, at eval_guidance_scale; the run itself stops by other pictures, its own.
Writes main_job.json (sizes and classifier accuracy, minutes, metrics of every epoch) and main_job.png, main_job_up.png, main_job_collapse.png (ten animals before and after).
"""
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddpo_scratch.config import TrainConfig, preset
from ddpo_scratch.evaluate import before_after, fixed_seed_images, read_metrics
from ddpo_scratch.prompts import COMMON_ANIMALS, article
from ddpo_scratch.rewards import jpeg_size
from ddpo_scratch.sd import StableDiffusion, load_lora, load_pipeline
from ddpo_scratch.tiny import load_classifier
from ddpo_scratch.train import fit

HERE = Path(__file__).with_suffix("")
JOBS = {"0": preset("tiny"), "1": preset("tiny", seed=1), "2": preset("tiny", seed=2),
        "up": preset("tiny", reward_fn="jpeg_incompressibility"), "collapse": preset("tiny_collapse")}
PROMPTS, NAMES = [f"{article(a)} {a}" for a in COMMON_ANIMALS]*2, COMMON_ANIMALS*2


def measure(pipe, judge, guidance_scale):
    images = fixed_seed_images(StableDiffusion(pipe, guidance_scale), PROMPTS, seed=1000, batch_size=45)
    kb = jpeg_size(images).double()
    return images, dict(n=len(kb), kb_mean=kb.mean().item(), kb_se=(kb.std()/len(kb)**.5).item(),
                        accuracy=sum(a == b for a, b in zip(judge.names(images), NAMES))/len(NAMES))


def run(job, judge, base, log_dir):
    "Train, then draw with the LoRA that the run left, as a user would."
    config = dataclasses.replace(JOBS[job], logdir=log_dir)
    start = time.perf_counter()
    folder = fit(config)
    minutes = (time.perf_counter() - start)/60
    after, b = measure(load_lora(load_pipeline("tiny"), folder), judge, config.eval_guidance_scale)
    rows = [{k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in r.items()} for r in read_metrics(folder)]
    changed = {k: v for k, v in dataclasses.asdict(JOBS[job]).items() if v != getattr(TrainConfig, k)}
    return after, dict(config=changed, guidance_scale=config.eval_guidance_scale, before=base, after=b, fall=1 - b["kb_mean"]/base["kb_mean"],
                       epochs=len(rows), reward_queries=rows[-1]["reward_queries"], minutes=round(minutes, 1), threads=torch.get_num_threads(), rows=rows)


def main(jobs=JOBS, threads=2):
    torch.set_num_threads(threads)
    judge, path, base = load_classifier(), HERE.with_suffix(".json"), {}
    read = lambda: json.loads(path.read_text()) if path.exists() else dict(command="python experiments/main_job.py", runs={})
    for job in jobs:
        if job in read()["runs"]: continue
        w = JOBS[job].eval_guidance_scale
        if w not in base: base[w] = measure(load_pipeline("tiny"), judge, w)
        before, a = base[w]
        with tempfile.TemporaryDirectory() as tmp: after, found = run(job, judge, a, tmp)
        if job not in ("1", "2"):
            name = "main_job" if job == "0" else f"main_job_{job}"
            before_after(before[:45][::3][:10], after[:45][::3][:10], PROMPTS[:45][::3][:10], n_cols=10).savefig(HERE.with_name(f"{name}.png"))
        log = read()                                                                     # another process may have finished a job
        log["runs"] = dict(sorted((log["runs"] | {job: found}).items()))
        path.write_text(json.dumps(log, indent=1) + "\n")
        b = found["after"]
        print(f"job {job}: {a['kb_mean']:.3f} -> {b['kb_mean']:.3f} kB ({-found['fall']:.1%}), accuracy {a['accuracy']:.0%} -> {b['accuracy']:.0%}, "
              f"{found['epochs']} epochs, {found['minutes']:.1f} min", flush=True)


if __name__ == "__main__":
    main(sys.argv[1].split(",") if len(sys.argv) > 1 else JOBS, int(sys.argv[2]) if len(sys.argv) > 2 else 2)
