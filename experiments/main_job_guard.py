"""What the main job reaches, and what it costs: five seeds on the embedded model.

    python experiments/main_job_guard.py              # seeds 0 to 4; finished ones are skipped
    python experiments/main_job_guard.py 0,1 2        # these seeds, on 2 threads
    python experiments/main_job_guard.py 0 1 SHEETS   # and all 45 pairs of pictures, into SHEETS

Each run is `ddpo_train` without options. Of the run's own fixed-seed pictures, and of two
pictures of each of the 45 animals from held-out noise, it measures the JPEG size, the embedded
CLIP's score, and what the classifier that was trained on composed pictures says of the right
animal. Writes main_job_guard.json, and main_job_guard.png: ten animals from held-out noise, before
and after each of the runs.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddpo_scratch.config import MAIN_JOB, preset
from ddpo_scratch.evaluate import before_after, fixed_seed_images, plot_grid
from ddpo_scratch.models.sd import StableDiffusion, load_lora, load_pipeline
from ddpo_scratch.models.tiny import CONCEPTS, load_classifier
from ddpo_scratch.prompts import COMMON_ANIMALS, article
from ddpo_scratch.rewards.jpeg import jpeg_size
from ddpo_scratch.rewards.tiny_clip import tiny_clip_score
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.train import fit

HERE = Path(__file__).with_suffix("")
LOG = HERE.with_suffix(".json")
SEEDS = ["0", "1", "2", "3", "4"]
OPTIONS = dict(preset=MAIN_JOB, stop_gain=preset(MAIN_JOB).stop_gain)
NAMES = list(COMMON_ANIMALS)
PROMPTS = [f"{article(name)} {name}" for name in NAMES]
HELD_OUT_SEED = 1000  # of no run's own pictures
SHOWN = list(range(0, 30, 3))  # ten animals for the picture
# what the default run must keep: see bar()
MIN_FALL, MAX_CLIP_LOSS, MAX_NATS_LOST, MAX_WRONG = 0.15, 0.03, 0.3, 1


def draw(pipe, prompts, guidance_scale):
    "Draw pictures from held-out noise."
    denoiser = StableDiffusion(pipe, guidance_scale)
    return fixed_seed_images(denoiser, prompts, HELD_OUT_SEED, batch_size=45)


def kept(folder):
    "Read the fixed-seed pictures that a run's first and last look kept."
    first, *_, last = sorted((folder / "eval").glob("epoch_*.pt"))
    looks = [torch.load(file, weights_only=False) for file in (first, last)]
    pictures = [look["images"] if isinstance(look, dict) else look[0] for look in looks]
    return [images.float() / 255 for images in pictures]


@torch.no_grad()
def measure(images, judges):
    "Sum up pictures of the 45 animals, in their order, once or several times."
    classifier, clip = judges
    times = len(images) // len(NAMES)
    labels = torch.tensor([CONCEPTS.index(name) for name in NAMES] * times)
    log_probs = classifier(images).log_softmax(1)
    wrong = (log_probs.argmax(1) != labels).nonzero().flatten().tolist()
    kb = jpeg_size(images).double()
    return dict(
        n=len(kb),
        kb_mean=kb.mean().item(),
        kb_se=(kb.std() / len(kb) ** 0.5).item(),
        clip=clip(images, PROMPTS * times, [{}] * len(kb)).mean().item(),
        log_prob=log_probs.gather(1, labels[:, None]).mean().item(),
        wrong=[NAMES[i % len(NAMES)] for i in wrong],
    )


def changes(before, after):
    "Say how far the pictures came, and what they lost."
    return dict(
        fall=1 - after["kb_mean"] / before["kb_mean"],
        clip=after["clip"] - before["clip"],
        log_prob=after["log_prob"] - before["log_prob"],
        wrong=len(after["wrong"]),
    )


def bar(record):
    "List what a run misses of the bar: size on held-out noise, the rest on its own pictures."
    held_out, own = record["held_out"]["change"], record["fixed_seed"]["change"]
    missed = dict(
        size=held_out["fall"] < MIN_FALL,
        clip=own["clip"] < -MAX_CLIP_LOSS,
        log_prob=own["log_prob"] < -MAX_NATS_LOST,
        named=own["wrong"] > MAX_WRONG,
    )
    return [name for name, is_missed in missed.items() if is_missed]


def compared(before, after, judges):
    "Measure pictures before and after."
    sums = dict(before=measure(before, judges), after=measure(after, judges))
    return sums | dict(change=changes(**sums))


def run(seed, judges, base, log_dir):
    "Train, then draw with the LoRA that the run left, as a user would."
    config = preset(MAIN_JOB, seed=int(seed), logdir=log_dir)
    start = time.perf_counter()
    folder = Path(fit(config))
    minutes = (time.perf_counter() - start) / 60
    rows = read_metrics(folder)
    own = kept(folder)
    pipe = load_lora(load_pipeline("tiny"), folder)
    held_out = draw(pipe, PROMPTS * 2, config.eval_guidance_scale)
    record = dict(
        held_out=compared(base, held_out, judges),
        fixed_seed=compared(*own, judges),
        epochs=len(rows),
        reward_queries=rows[-1]["reward_queries"],
        minutes=round(minutes, 1),
        threads=torch.get_num_threads(),
        gains={row["epoch"]: round(row["eval_gain"], 4) for row in rows if "eval_gain" in row},
    )
    return record | dict(missed=bar(record)), own, held_out


def read_log():
    "Read main_job_guard.json, or begin it."
    if LOG.exists():
        return json.loads(LOG.read_text())
    return dict(command="python experiments/main_job_guard.py", options=OPTIONS, runs={})


def save(seed, record):
    "Add a run to the log, read anew: another process may have finished one meanwhile."
    log = read_log()
    log["runs"] = dict(sorted((log["runs"] | {seed: record}).items()))
    LOG.write_text(json.dumps(log, indent=1) + "\n")


def report(seed, record):
    "Print a run in one line."
    own, held_out = record["fixed_seed"]["change"], record["held_out"]["change"]
    print(
        f"seed {seed}: held out {-held_out['fall']:.1%}, own {-own['fall']:.1%}, "
        f"CLIP {own['clip']:+.3f} ({held_out['clip']:+.3f}), "
        f"log-prob {own['log_prob']:+.2f} ({held_out['log_prob']:+.2f}), wrong {own['wrong']} of "
        f"45 ({held_out['wrong']} of 90), {record['epochs']} epochs, {record['minutes']} min, "
        f"misses {record['missed'] or 'nothing'}",
        flush=True,
    )


def save_picture(base, after):
    "Draw ten animals from held-out noise: before, and after each run."
    rows = torch.cat([base[SHOWN], *(images[SHOWN] for images in after.values())])
    labels = ["before", *(f"seed {seed}" for seed in after)]
    titles = [PROMPTS[i] for i in SHOWN] + [""] * len(SHOWN) * len(after)
    figure = plot_grid(rows, titles, n_cols=len(SHOWN), row_labels=labels)
    figure.savefig(HERE.with_suffix(".png"), dpi=70)


def main(seeds=SEEDS, threads=2, sheets=None):
    "Run the seeds that the log lacks."
    torch.set_num_threads(threads)
    judges = load_classifier(), tiny_clip_score()
    base = draw(load_pipeline("tiny"), PROMPTS * 2, preset(MAIN_JOB).eval_guidance_scale)
    after = {}
    for seed in seeds:
        if seed in read_log()["runs"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            record, own, after[seed] = run(seed, judges, base, folder)
        if sheets:
            figure = before_after(*own, PROMPTS, n_cols=9)
            figure.savefig(Path(sheets) / f"seed{seed}.png")
            torch.save(
                after[seed].mul(255).round().byte(), Path(sheets) / f"seed{seed}_held_out.pt"
            )
        save(seed, record)
        report(seed, record)
        if after.keys() == read_log()["runs"].keys():  # none of them from an earlier call
            save_picture(base, after)


if __name__ == "__main__":
    main(
        sys.argv[1].split(",") if len(sys.argv) > 1 else SEEDS,
        int(sys.argv[2]) if len(sys.argv) > 2 else 2,
        sys.argv[3] if len(sys.argv) > 3 else None,
    )
