"""The main job, three times: DDPO-IS on the embedded model, JPEG compressibility over the 45 common animals.

    python experiments/main_job.py              # jobs 0 1 2, up and collapse; a finished job is not run again

Jobs 0, 1 and 2 are seeds of the main job; "up" is 5 epochs of seed 0 with jpeg_incompressibility, the other way; "collapse" is preset tiny_collapse. Each trains with the defaults of `ddpo_train` and two epochs more; base and fine-tuned model draw the 45 animals with 2 held-out seeds each, at eval_guidance_scale.
Writes main_job.json (sizes and classifier accuracy at the job's end and after each epoch more, minutes of training, metrics of every epoch) and main_job.png, main_job_up.png, main_job_collapse.png (ten animals before and after).
"""
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch

from ddpo_scratch.evaluate import before_after, fixed_seed_images, read_metrics
from ddpo_scratch.prompts import COMMON_ANIMALS, article
from ddpo_scratch.rewards import jpeg_size
from ddpo_scratch.sd import StableDiffusion, load_lora, load_pipeline, save_lora
from ddpo_scratch.tiny import load_classifier
from ddpo_scratch.train import TrainConfig, preset, setup, train

HERE = Path(__file__).with_suffix("")
JOBS = {"0": preset("tiny"), "1": preset("tiny", seed=1), "2": preset("tiny", seed=2),
        "up": preset("tiny", reward_fn="jpeg_incompressibility", num_epochs=5), "collapse": preset("tiny_collapse")}
PROMPTS, NAMES = [f"{article(a)} {a}" for a in COMMON_ANIMALS]*2, COMMON_ANIMALS*2


def measure(pipe, judge, guidance_scale):
    images = fixed_seed_images(StableDiffusion(pipe, guidance_scale), PROMPTS, seed=1000, batch_size=45)
    kb = jpeg_size(images).double()
    return images, dict(n=len(kb), kb_mean=kb.mean().item(), kb_se=(kb.std()/len(kb)**.5).item(),
                        accuracy=sum(a == b for a, b in zip(judge.names(images), NAMES))/len(NAMES))


def run(config, judge, base, past=2):
    "Train `past` epochs longer than the job asks, and measure at its end and after each epoch more."
    w, n, measured = config.eval_guidance_scale, config.num_epochs, []
    state = setup(dataclasses.replace(config, num_epochs=n + past))
    for step in train(state=state):
        if not step.metrics or step.epoch < n: continue
        save_lora(state.denoiser, state.folder/"lora")
        images, row = measure(load_lora(load_pipeline("tiny"), state.folder), judge, w)
        measured.append(dict(epoch=step.epoch, **row, fall=1 - row["kb_mean"]/base["kb_mean"]))
        if step.epoch == n: after = images
        print({k: round(v, 3) for k, v in measured[-1].items()}, flush=True)
    return after, measured, [{k: round(v, 5) for k, v in r.items()} for r in read_metrics(state.folder)]


def main(jobs=JOBS, threads=2):
    torch.set_num_threads(threads)
    judge, path, base = load_classifier(), HERE.with_suffix(".json"), {}
    for job in jobs:
        log = json.loads(path.read_text()) if path.exists() else dict(command="python experiments/main_job.py", runs={})
        if job in log["runs"]: continue
        with tempfile.TemporaryDirectory() as tmp:
            config = dataclasses.replace(JOBS[job], logdir=tmp)
            w = config.eval_guidance_scale
            if w not in base: base[w] = measure(load_pipeline("tiny"), judge, w)
            before, a = base[w]
            after, measured, rows = run(config, judge, a)
        b, minutes = measured[0], sum(r["seconds_sampling"] + r["seconds_training"] for r in rows[:config.num_epochs])/60
        if job not in ("1", "2"):
            name = "main_job" if job == "0" else f"main_job_{job}"
            before_after(before[:45][::3][:10], after[:45][::3][:10], PROMPTS[:45][::3][:10], n_cols=10).savefig(HERE.with_name(f"{name}.png"))
        log = json.loads(path.read_text()) if path.exists() else log                      # another process may have finished a seed
        changed = {k: v for k, v in dataclasses.asdict(JOBS[job]).items() if v != getattr(TrainConfig, k)}
        log["runs"][job] = dict(config=changed, guidance_scale=w, before=a, after=b, fall=b["fall"], minutes=round(minutes, 1), threads=threads, measured=measured, rows=rows)
        log["runs"] = dict(sorted(log["runs"].items()))
        path.write_text(json.dumps(log, indent=1) + "\n")
        print(f"job {job}: {a['kb_mean']:.3f} -> {b['kb_mean']:.3f} kB, accuracy {a['accuracy']:.0%} -> {b['accuracy']:.0%}, {minutes:.1f} min", flush=True)


if __name__ == "__main__":
    main(sys.argv[1].split(",") if len(sys.argv) > 1 else JOBS, int(sys.argv[2]) if len(sys.argv) > 2 else 2)
