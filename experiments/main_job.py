"""The main job pushed further: DDPO-IS on the embedded model, JPEG size over 45 common animals.

    python experiments/main_job.py         # jobs 0 1 2, up and collapse; finished jobs are skipped
    python experiments/main_job.py 0,1 2   # these jobs, on 2 threads

Jobs 0, 1 and 2 are seeds of the main job that run on to a gain of 25 %, where the first animals
are lost; main_job_guard.py measures the default, which stops before. "up" is seed 0 with
jpeg_incompressibility, the other way; "collapse" is preset tiny_collapse. Base and fine-tuned model
draw the 45 animals with 2 held-out seeds each, at eval_guidance_scale; the run itself stops by
other pictures, its own. Writes main_job.json (sizes and classifier accuracy, minutes, metrics of
every epoch) and main_job.png, main_job_up.png and main_job_collapse.png (ten animals before and
after).
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddpo_scratch.config import TrainConfig, preset
from ddpo_scratch.evaluate import before_after, fixed_seed_images
from ddpo_scratch.models.lora import load_lora
from ddpo_scratch.models.sd import StableDiffusion, load_pipeline
from ddpo_scratch.models.tiny import load_classifier
from ddpo_scratch.prompts import COMMON_ANIMALS, article
from ddpo_scratch.rewards.jpeg import jpeg_size
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.train import fit

HERE = Path(__file__).with_suffix("")
LOG = HERE.with_suffix(".json")
JOBS = {
    "0": preset("tiny", stop_gain=0.25),
    "1": preset("tiny", stop_gain=0.25, seed=1),
    "2": preset("tiny", stop_gain=0.25, seed=2),
    "up": preset("tiny", stop_gain=0.25, reward_fn="jpeg_incompressibility"),
    "collapse": preset("tiny_collapse"),
}
NAMES = COMMON_ANIMALS * 2
PROMPTS = [f"{article(name)} {name}" for name in NAMES]
# Ten animals for the picture: every third, as far as they fill one row.
SHOWN = range(0, 30, 3)


def measure(pipe, classifier, guidance_scale):
    "Draw the 45 animals twice; the pictures, and a summary of their sizes and of what they show."
    denoiser = StableDiffusion(pipe, guidance_scale)
    images = fixed_seed_images(denoiser, PROMPTS, seed=1000, batch_size=45)
    kb = jpeg_size(images).double()
    right = sum(name == seen for name, seen in zip(NAMES, classifier.names(images)))
    return images, dict(
        n=len(kb),
        kb_mean=kb.mean().item(),
        kb_se=(kb.std() / len(kb) ** 0.5).item(),
        accuracy=right / len(NAMES),
    )


def five_digits(row):
    "Round to significant digits, not decimals: approx_kl is about 1e-7."
    return {k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in row.items()}


def run(job, classifier, before, log_dir):
    "Train, then draw with the LoRA that the run left, as a user would."
    config = dataclasses.replace(JOBS[job], logdir=log_dir)
    start = time.perf_counter()
    folder = fit(config)
    minutes = (time.perf_counter() - start) / 60
    tuned = load_lora(load_pipeline("tiny"), folder)
    images, after = measure(tuned, classifier, config.eval_guidance_scale)
    rows = [five_digits(row) for row in read_metrics(folder)]
    fields = dataclasses.asdict(JOBS[job])
    changed = {k: v for k, v in fields.items() if v != getattr(TrainConfig, k)}
    return images, dict(
        config=changed,
        guidance_scale=config.eval_guidance_scale,
        before=before,
        after=after,
        fall=1 - after["kb_mean"] / before["kb_mean"],
        epochs=len(rows),
        reward_queries=rows[-1]["reward_queries"],
        minutes=round(minutes, 1),
        threads=torch.get_num_threads(),
        rows=rows,
    )


def read_log():
    "Read main_job.json, or begin it."
    if LOG.exists():
        return json.loads(LOG.read_text())
    return dict(command="python experiments/main_job.py", runs={})


def save(job, record):
    "Add a job to main_job.json, read anew: another process may have finished a job meanwhile."
    log = read_log()
    log["runs"] = dict(sorted((log["runs"] | {job: record}).items()))
    LOG.write_text(json.dumps(log, indent=1) + "\n")


def save_picture(job, before, after):
    "Draw ten animals before and after."
    name = "main_job" if job == "0" else f"main_job_{job}"
    shown = list(SHOWN)
    prompts = [PROMPTS[i] for i in shown]
    figure = before_after(before[shown], after[shown], prompts, n_cols=10)
    figure.savefig(HERE.with_name(f"{name}.png"))


def report(job, record):
    "Print a job's result in one line."
    before, after = record["before"], record["after"]
    print(
        f"job {job}: {before['kb_mean']:.3f} -> {after['kb_mean']:.3f} kB ({-record['fall']:.1%}),"
        f" accuracy {before['accuracy']:.0%} -> {after['accuracy']:.0%},"
        f" {record['epochs']} epochs, {record['minutes']:.1f} min",
        flush=True,
    )


def main(jobs=JOBS, threads=2):
    torch.set_num_threads(threads)
    classifier = load_classifier()
    base = {}  # guidance scale -> what the base model draws with it
    for job in jobs:
        if job in read_log()["runs"]:
            continue
        w = JOBS[job].eval_guidance_scale
        if w not in base:
            base[w] = measure(load_pipeline("tiny"), classifier, w)
        before, summary = base[w]
        with tempfile.TemporaryDirectory() as folder:
            after, record = run(job, classifier, summary, folder)
        if job not in ("1", "2"):
            save_picture(job, before, after)
        save(job, record)
        report(job, record)


if __name__ == "__main__":
    main(
        sys.argv[1].split(",") if len(sys.argv) > 1 else JOBS,
        int(sys.argv[2]) if len(sys.argv) > 2 else 2,
    )
