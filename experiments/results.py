"""The experiments of the results chapter: every method on the embedded model, measured by rewards
it was not trained on.

    python experiments/results.py              # all jobs in turn; finished jobs are skipped
    python experiments/results.py --part 0/2   # every other job: run 0/2 and 1/2 side by side
    python experiments/results.py --only backprop
    python experiments/results.py --timing     # seconds a reward query of each method: timing.json
    python experiments/results.py --list

Each job writes results/NAME.json: config, metrics of every epoch, minutes of training, and what was
measured on the run's fixed-seed pictures at every look (its own reward, JPEG size, the three tiny
reward models, the share of animals that the classifier names, diversity). Seeds 0 also measure what
the run draws of concepts that were not trained on, and leave results/NAME.webp: nine animals at
every look, one row each. base.json has the same of the base model. A killed job resumes. Runs
(checkpoints, LoRA) stay in runs/results, which is not committed. About 7 minutes a job on one core,
with another on the other; --timing wants a machine that does nothing else.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image

from ddpo_scratch.config import TrainConfig
from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.models.sd import StableDiffusion, load_lora, load_pipeline
from ddpo_scratch.models.tiny import CONCEPTS, load_classifier
from ddpo_scratch.prompts import COMMON_ANIMALS, OBJECTS, OTHER_ANIMALS, article, from_list
from ddpo_scratch.rewards.base import compute_rewards, get_reward
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.train import fit, train

OUT = Path(__file__).with_suffix("")
SECOND = ("jpeg_compressibility", "tiny_aesthetic", "tiny_preference", "tiny_clip_score")

# One budget for the four methods that see a reward as a number: 384 reward queries, of seed 0 512,
# with looks every 128.
COMMON = dict(stop_gain=0.0, num_checkpoint_limit=1, eval_freq=3)
REGRESSION = dict(
    num_epochs=4,
    eval_freq=1,
    sample_num_batches_per_epoch=4,
    train_batch_size=16,
    train_num_inner_epochs=4,
    train_timestep_fraction=0.25,
)
METHODS = {
    "ddpo_is": dict(num_epochs=8, eval_freq=2),
    "ddpo_sf": dict(
        num_epochs=32,
        eval_freq=8,
        sample_batch_size=16,
        sample_num_batches_per_epoch=1,
        train_batch_size=16,
    ),
    "rwr": REGRESSION,
    "rwr_sparse": REGRESSION,
}
# About 2 / standard deviation of the base model's rewards.
BETA = {"jpeg_compressibility": 10.0, "tiny_aesthetic": 1.5}
# Reward backpropagation: 8 pictures an update, 128 queries, of seed 0 256.
CHAIN = dict(
    num_epochs=8,
    eval_freq=2,
    sample_batch_size=32,
    sample_num_batches_per_epoch=1,
    train_batch_size=8,
)
BACKPROP = {
    "alignprop_1": dict(method="alignprop", backprop_steps="1"),
    "alignprop_random": dict(method="alignprop"),
    "draft_lv": dict(method="draft_lv"),
    "refl": dict(method="refl"),
}


def named(words):
    "Put an article before each word."
    return [f"{article(word)} {word}" for word in words]


def scenes(animals, backgrounds):
    "Write captions of animal, size and background, such as 'a small fox on a red background'."
    return [
        f"{article(size)} {size} {animal} on {article(kind)} {kind} background"
        for animal in animals
        for size in ("small", "big")
        for kind in backgrounds
    ]


# 23 animals on three backgrounds are trained on; other animals and two other backgrounds are not.
SEEN = ("striped", "blue", "checked")
ALIGNED = scenes(COMMON_ANIMALS[::2], SEEN)
UNALIGNED = {
    "same animals, other backgrounds": scenes(COMMON_ANIMALS[::2], ("gradient", "red"))[::4],
    "other animals, same backgrounds": scenes(COMMON_ANIMALS[1::2], SEEN)[::5],
}
UNTRAINED = {
    "common animals": named(COMMON_ANIMALS),
    "other animals": named(OTHER_ANIMALS) * 2,
    "everyday objects": named(OBJECTS) * 2,
}


def job(group, name, seed=0, **fields):
    "Return {name: (group, config)}; seeds after 0 ask fewer queries and look only twice."
    if seed:
        epochs = fields["num_epochs"]
        fewer = epochs // 2 if group == "backprop" else epochs * 3 // 4
        fields |= dict(num_epochs=fewer, eval_freq=fewer)
    return {f"{group}-{name}-{seed}": (group, TrainConfig(seed=seed, **COMMON | fields))}


def method_jobs(reward, seed):
    "List the four methods that see a reward as a number."
    jobs = {}
    for method, fields in METHODS.items():
        more = dict(method=method, reward_fn=reward, rwr_beta=BETA[reward])
        jobs |= job("methods", f"{method}-{reward}", seed, **more, **fields)
    return jobs


def chain_jobs(seed):
    "List the ways to send a reward's gradient back."
    jobs = {}
    for name, fields in BACKPROP.items():
        jobs |= job("backprop", name, seed, reward_fn="tiny_aesthetic", **CHAIN | fields)
    return jobs


def other_jobs():
    "List the control without a reward, the other way, alignment, and two runs that go too far."
    control = dict(method="rwr", rwr_beta=0.0, reward_fn="jpeg_compressibility")
    aligned = dict(reward_fn="tiny_clip_score", prompt_fn="aligned")
    too_far = dict(method="alignprop", reward_fn="tiny_aesthetic", num_epochs=15, eval_freq=3)
    ddpo = METHODS["ddpo_is"]
    return (
        # how much of RWR's gain is imitation alone
        job("others", "rwr_unweighted", **control, **METHODS["rwr"])
        | job("others", "incompressibility", reward_fn="jpeg_incompressibility", **ddpo)
        | job("others", "alignment", **aligned, **ddpo)
        | job("overoptimised", "kl_0", kl_weight=0.0, **CHAIN | too_far)
        | job("overoptimised", "kl_1", kl_weight=1.0, **CHAIN | too_far)
    )


def all_jobs():
    "Return {name: (group, config)}, in the order of their importance."
    jobs = method_jobs("jpeg_compressibility", 0) | chain_jobs(0)
    jobs |= method_jobs("tiny_aesthetic", 0) | other_jobs()
    for reward in ("jpeg_compressibility", "tiny_aesthetic"):
        jobs |= method_jobs(reward, 1) | method_jobs(reward, 2)
    return jobs | chain_jobs(1) | chain_jobs(2)


def concept(prompt):
    "Find the longest name of a concept in a prompt."
    return max((c for c in CONCEPTS if f" {c} " in f" {prompt} "), key=len)


class Judges:
    "What pictures are measured by, whatever they were trained on."

    def __init__(self):
        self.names = load_classifier().names
        self.rewards = {name: get_reward(name) for name in SECOND}

    @torch.no_grad()
    def __call__(self, images, prompts):
        "Return mean and standard error of each reward, accuracy, diversity and n."
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        n = len(images)
        scores = {
            name: compute_rewards(reward, images, list(prompts), [{}] * n)[0]
            for name, reward in self.rewards.items()
        }
        means = {name: v.mean().item() for name, v in scores.items()}
        errors = {f"{name}_se": (v.std() / n**0.5).item() for name, v in scores.items()}
        right = sum(name == concept(p) for name, p in zip(self.names(images), prompts))
        # 1 - mean cosine between two pictures' embeddings, which have length 1
        z = self.rewards["tiny_clip_score"].embed_images(images)
        diversity = (1 - (z.sum(0).square().sum() - n) / (n * (n - 1))).item()
        row = dict(means | errors, accuracy=right / n, diversity=diversity, n=n)
        return {k: round(v, 5) for k, v in row.items()}


def held_out(denoiser, judges, prompt_lists):
    "Measure concepts that no job was trained on, drawn with seeds that no run looked at."
    return {
        name: judges(fixed_seed_images(denoiser, prompts, seed=1000, batch_size=32), prompts)
        for name, prompts in prompt_lists.items()
    }


def save_strip(looks, path):
    "Save the first nine prompts that differ, one row a look."
    images, prompts, _ = zip(*looks.values())
    which = [prompts[0].index(prompt) for prompt in list(dict.fromkeys(prompts[0]))[:9]]
    rows = [torch.cat(list(pictures[which]), 2) for pictures in images]
    strip = torch.cat(rows, 1).permute(1, 2, 0)
    Image.fromarray(strip.numpy()).save(path, quality=90)


def five_digits(row):
    "Round to significant digits, not decimals: approx_kl is about 1e-7."
    return {k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in row.items()}


def train_job(name, config, runs):
    "Train, or go on training, or do nothing where a run is finished; return the run's folder."
    folder = runs / name
    parts = dict(prompt_fn=from_list(ALIGNED)) if config.prompt_fn == "aligned" else {}
    config = dataclasses.replace(config, logdir=str(runs))
    if not list(folder.glob("checkpoints/epoch_*")):
        shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint
        fit(dataclasses.replace(config, run_name=name), **parts)
    elif len(read_metrics(folder)) < config.num_epochs:
        fit(dataclasses.replace(config, resume_from=str(folder)), **parts)
    return folder


def load_looks(folder):
    "Load what a run saved at its looks: epoch -> (images, prompts, rewards)."
    files = sorted((folder / "eval").glob("epoch_*.pt"))
    looks = {int(file.stem[-4:]): torch.load(file, weights_only=True) for file in files}
    return {epoch: (k["images"], k["prompts"], k["rewards"]) for epoch, k in looks.items()}


def run(name, group, config, judges, runs):
    "Train, then measure what the run left."
    folder = train_job(name, config, runs)
    looks = load_looks(folder)
    measured = [
        dict(epoch=epoch, reward=rewards.mean().item(), **judges(images, prompts))
        for epoch, (images, prompts, rewards) in looks.items()
    ]
    rows = read_metrics(folder)
    seconds = sum(row["seconds_sampling"] + row["seconds_training"] for row in rows)
    fields = dataclasses.asdict(config)
    record = dict(
        command="python experiments/results.py",
        group=group,
        config={k: v for k, v in fields.items() if v != getattr(TrainConfig, k)},
        seed=config.seed,
        looks=measured,
        rows=[five_digits(row) for row in rows],
        minutes=round(seconds / 60, 1),
        threads=torch.get_num_threads(),
    )
    if config.seed == 0:
        pipe = load_lora(load_pipeline("tiny"), folder)
        tuned = StableDiffusion(pipe, config.eval_guidance_scale)
        prompt_lists = UNALIGNED if config.prompt_fn == "aligned" else UNTRAINED
        record["held_out"] = held_out(tuned, judges, prompt_lists)
        save_strip(looks, OUT / f"{name}.webp")
    (OUT / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def seconds_a_query(config):
    "Time one epoch, looks not counted."
    with tempfile.TemporaryDirectory() as folder:
        once = dict(logdir=folder, num_epochs=1, eval_num_images=0, eval_freq=0)
        for _ in train(dataclasses.replace(config, **once)):
            pass
        row = read_metrics(next(Path(folder).iterdir()))[-1]
    return (row["seconds_sampling"] + row["seconds_training"]) / row["reward_queries"]


def timing(threads):
    "Write seconds a reward query of each method on the aesthetic reward."
    log = dict(threads=threads)
    for name, (group, config) in all_jobs().items():
        timed = group in ("methods", "backprop") and config.reward_fn == "tiny_aesthetic"
        if config.seed or not timed:
            continue
        stem = name.rsplit("-", 1)[0]
        log[stem] = seconds_a_query(config)
        print(name, round(log[stem], 3), flush=True)
    (OUT / "timing.json").write_text(json.dumps(log, indent=1) + "\n")


def measure_base(judges):
    "Write what the base model draws of every held-out list, once."
    path = OUT / "base.json"
    if path.exists():
        return
    base = StableDiffusion(load_pipeline("tiny"), TrainConfig.eval_guidance_scale)
    measured = held_out(base, judges, UNTRAINED | UNALIGNED)
    path.write_text(json.dumps(measured, indent=1) + "\n")


def report(name, record):
    "Print a job's result in one line."
    first, last = record["looks"][0], record["looks"][-1]
    print(
        f"{name}: reward {first['reward']:.3f} -> {last['reward']:.3f},"
        f" named {first['accuracy']:.0%} -> {last['accuracy']:.0%},"
        f" diversity {first['diversity']:.2f} -> {last['diversity']:.2f}, {record['minutes']} min",
        flush=True,
    )


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", default="0/1", help="I/N: jobs I, I+N, ...")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/results"), help="folder of the runs"
    )
    parser.add_argument("--timing", action="store_true", help="time the methods, and nothing else")
    parser.add_argument("--list", action="store_true", help="list the jobs, and nothing else")
    return parser.parse_args()


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    i, n = map(int, args.part.split("/"))
    todo = {name: pair for name, pair in all_jobs().items() if args.only in name}
    done = {name for name in todo if (OUT / f"{name}.json").exists()}
    if args.list:
        for name in todo:
            print("done" if name in done else "    ", name)
        return
    OUT.mkdir(exist_ok=True)
    if args.timing:
        timing(args.threads)
        return
    judges = Judges()
    measure_base(judges)
    for name, (group, config) in list(todo.items())[i::n]:
        if not (OUT / f"{name}.json").exists():
            report(name, run(name, group, config, judges, args.runs))


if __name__ == "__main__":
    main()
