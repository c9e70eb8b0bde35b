"""The experiments of the results chapter: every method on the embedded model, measured by rewards it was not trained on.

    python experiments/results.py               # all jobs in turn; a finished job is not run again, a killed one resumes
    python experiments/results.py --part 0/2    # every other job: run 0/2 and 1/2 side by side, one thread each
    python experiments/results.py --only backprop
    python experiments/results.py --timing      # seconds a reward query of each method, with nothing else running: results/timing.json
    python experiments/results.py --list

Each job writes results/NAME.json: config, metrics of every epoch, minutes of training, and what was measured on the run's fixed-seed pictures at every look (its own
reward, JPEG size, the three tiny reward models, the share of animals that the classifier names, diversity). Seeds 0 also measure what the run draws of concepts that
were not trained on, and leave results/NAME.webp: nine animals at every look, one row each. base.json has the same of the base model.
Runs (checkpoints, LoRA) stay in runs/results, which is not committed. About 7 minutes a job on one core, with another on the other.
"""
import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import torch

from ddpo_scratch.evaluate import fixed_seed_images, read_metrics
from ddpo_scratch.prompts import COMMON_ANIMALS, OBJECTS, OTHER_ANIMALS, article, from_list
from ddpo_scratch.rewards import compute_rewards, get_reward
from ddpo_scratch.sd import StableDiffusion, load_lora, load_pipeline
from ddpo_scratch.tiny import CONCEPTS, load_classifier
from ddpo_scratch.train import TrainConfig, fit, train

OUT = Path(__file__).with_suffix("")
SECOND = ("jpeg_compressibility", "tiny_aesthetic", "tiny_preference", "tiny_clip_score")

# One budget for the four methods that see a reward as a number: 384 reward queries, of seed 0 512, with looks every 128.
COMMON = dict(stop_gain=0., num_checkpoint_limit=1)
METHODS = {"ddpo_is": dict(num_epochs=8, eval_freq=2),
           "ddpo_sf": dict(num_epochs=32, eval_freq=8, sample_batch_size=16, sample_num_batches_per_epoch=1, train_batch_size=16),
           "rwr": dict(num_epochs=4, eval_freq=1, sample_num_batches_per_epoch=4, train_batch_size=16, train_num_inner_epochs=4, train_timestep_fraction=.25),
           "rwr_sparse": dict(num_epochs=4, eval_freq=1, sample_num_batches_per_epoch=4, train_batch_size=16, train_num_inner_epochs=4, train_timestep_fraction=.25)}
BETA = {"jpeg_compressibility": 10., "tiny_aesthetic": 1.5}                # about 2 / standard deviation of the base model's rewards
# Reward backpropagation: 8 pictures an update, 128 queries, of seed 0 256.
CHAIN = dict(num_epochs=8, eval_freq=2, sample_batch_size=32, sample_num_batches_per_epoch=1, train_batch_size=8)
BACKPROP = {"alignprop_1": dict(method="alignprop", backprop_steps="1"), "alignprop_random": dict(method="alignprop"),
            "draft_lv": dict(method="draft_lv"), "refl": dict(method="refl")}
# Captions of animal, size and background: 23 animals on three backgrounds are trained on; other animals and two other backgrounds are not.
SCENES = lambda animals, kinds: [f"{article(size)} {size} {a} on {article(k)} {k} background" for a in animals for size in ("small", "big") for k in kinds]
ALIGNED = SCENES(COMMON_ANIMALS[::2], ("striped", "blue", "checked"))
UNALIGNED = {"same animals, other backgrounds": SCENES(COMMON_ANIMALS[::2], ("gradient", "red"))[::4], "other animals, same backgrounds": SCENES(COMMON_ANIMALS[1::2], ("striped", "blue", "checked"))[::5]}


def jobs():
    "name -> (group, TrainConfig), in the order of their importance"
    out = {}
    def add(group, name, seed=0, **fields):
        if seed:                                                                # fewer queries, and looked at before and after only
            fields["num_epochs"] = fields["eval_freq"] = fields["num_epochs"]//2 if group == "backprop" else fields["num_epochs"]*3//4
        out[f"{group}-{name}-{seed}"] = group, TrainConfig(seed=seed, **COMMON | fields)
    methods = lambda reward, seed: [add("methods", f"{m}-{reward}", seed, method=m, reward_fn=reward, rwr_beta=BETA[reward], **f) for m, f in METHODS.items()]
    chains = lambda seed: [add("backprop", m, seed, reward_fn="tiny_aesthetic", **CHAIN | f) for m, f in BACKPROP.items()]
    methods("jpeg_compressibility", 0)
    chains(0)
    methods("tiny_aesthetic", 0)
    add("others", "rwr_unweighted", method="rwr", rwr_beta=0., reward_fn="jpeg_compressibility", **METHODS["rwr"])   # how much of RWR's gain is imitation alone
    add("others", "incompressibility", reward_fn="jpeg_incompressibility", **METHODS["ddpo_is"])
    add("others", "alignment", reward_fn="tiny_clip_score", prompt_fn="aligned", **METHODS["ddpo_is"])
    for kl in (0., 1.): add("overoptimised", f"kl_{kl:g}", method="alignprop", reward_fn="tiny_aesthetic", kl_weight=kl, **CHAIN | dict(num_epochs=15, eval_freq=3))
    for seed in (1, 2): methods("jpeg_compressibility", seed)
    for seed in (1, 2): methods("tiny_aesthetic", seed)
    for seed in (1, 2): chains(seed)
    return out


def concept(prompt):
    "The longest name of a concept in a prompt."
    return max((c for c in CONCEPTS if f" {c} " in f" {prompt} "), key=len)


class Judges:
    "What pictures are measured by, whatever they were trained on."
    def __init__(self): self.names, self.rewards = load_classifier().names, {r: get_reward(r) for r in SECOND}

    @torch.no_grad()
    def __call__(self, images, prompts):
        images = images.float()/255 if images.dtype == torch.uint8 else images
        found = {name: compute_rewards(r, images, list(prompts), [{}]*len(images))[0] for name, r in self.rewards.items()}
        z = self.rewards["tiny_clip_score"].embed_images(images)
        n = len(images)
        out = {k: v.mean().item() for k, v in found.items()} | {f"{k}_se": (v.std()/n**.5).item() for k, v in found.items()}
        named = [name == concept(p) for name, p in zip(self.names(images), prompts)]
        spread = (1 - (z.sum(0).square().sum() - n)/(n*(n - 1))).item()                  # 1 - mean cosine between two pictures' embeddings
        return {k: round(v, 5) for k, v in dict(out, accuracy=sum(named)/n, diversity=spread, n=n).items()}


def held_out(denoiser, judges, aligned):
    "Concepts that no job was trained on, drawn with seeds that no run looked at."
    lists = UNALIGNED if aligned else {"common animals": [f"{article(a)} {a}" for a in COMMON_ANIMALS], "other animals": [f"{article(a)} {a}" for a in OTHER_ANIMALS]*2,
                                       "everyday objects": [f"{article(a)} {a}" for a in OBJECTS]*2}
    return {k: judges(fixed_seed_images(denoiser, p, seed=1000, batch_size=32), p) for k, p in lists.items()}


def save_strip(looks, path):
    "The first nine prompts that differ, one row a look."
    from PIL import Image
    images, prompts, _ = zip(*looks.values())
    which = [prompts[0].index(p) for p in list(dict.fromkeys(prompts[0]))[:9]]
    rows = torch.cat([torch.cat(list(x[which]), 2) for x in images], 1)
    Image.fromarray(rows.permute(1, 2, 0).numpy()).save(path, quality=90)


def run(name, group, config, judges, runs):
    "Train, or go on training; then measure what the run left."
    folder, parts = runs/name, dict(prompt_fn=from_list(ALIGNED)) if config.prompt_fn == "aligned" else {}
    resume = str(folder) if list(folder.glob("checkpoints/epoch_*")) else ""
    if not resume: shutil.rmtree(folder, ignore_errors=True)                    # killed before its first checkpoint
    finished = resume and len(read_metrics(folder)) >= config.num_epochs
    if not finished: fit(dataclasses.replace(config, logdir=str(runs), run_name="" if resume else name, resume_from=resume), **parts)
    looks = {int(f.stem[-4:]): torch.load(f, weights_only=True) for f in sorted((folder/"eval").glob("epoch_*.pt"))}
    measured = [dict(epoch=e, reward=r.mean().item(), **judges(images, prompts)) for e, (images, prompts, r) in looks.items()]
    tuned = StableDiffusion(load_lora(load_pipeline("tiny"), folder), config.eval_guidance_scale)
    fields = {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(TrainConfig, k)}
    rows = [{k: round(v, 5) for k, v in r.items()} for r in read_metrics(folder)]
    minutes = sum(r["seconds_sampling"] + r["seconds_training"] for r in rows)/60
    record = dict(command="python experiments/results.py", group=group, config=fields, seed=config.seed, looks=measured, rows=rows, minutes=round(minutes, 1),
                  threads=torch.get_num_threads())
    if config.seed == 0:
        record["held_out"] = held_out(tuned, judges, config.prompt_fn == "aligned")
        save_strip(looks, OUT/f"{name}.webp")
    (OUT/f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def timing(threads):
    "Seconds a reward query: an epoch of each method on the aesthetic reward, looks not counted."
    out = dict(threads=threads)
    for name, (group, config) in jobs().items():
        if config.seed or group not in ("methods", "backprop") or config.reward_fn != "tiny_aesthetic": continue
        with tempfile.TemporaryDirectory() as tmp:
            for _ in train(dataclasses.replace(config, logdir=tmp, num_epochs=1, eval_num_images=0, eval_freq=0)): pass
            row = read_metrics(next(Path(tmp).iterdir()))[-1]
        out[name.rsplit("-", 1)[0]] = (row["seconds_sampling"] + row["seconds_training"])/row["reward_queries"]
        print(name, round(out[name.rsplit("-", 1)[0]], 3), flush=True)
    (OUT/"timing.json").write_text(json.dumps(out, indent=1) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--part", default="0/1", help="I/N: jobs I, I+N, ...")
    p.add_argument("--only", default="", help="jobs whose name contains this")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--runs", type=Path, default=Path("runs/results"))
    p.add_argument("--timing", action="store_true")
    p.add_argument("--list", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    i, n = map(int, args.part.split("/"))
    todo = {k: v for k, v in jobs().items() if args.only in k}
    if args.list:
        for name in todo: print("done" if (OUT/f"{name}.json").exists() else "    ", name)
        return
    OUT.mkdir(exist_ok=True)
    if args.timing: return timing(args.threads)
    judges = Judges()
    if not (OUT/"base.json").exists():
        base = StableDiffusion(load_pipeline("tiny"), TrainConfig.eval_guidance_scale)
        (OUT/"base.json").write_text(json.dumps(held_out(base, judges, False) | held_out(base, judges, True), indent=1) + "\n")
    for name, (group, config) in list(todo.items())[i::n]:
        if (OUT/f"{name}.json").exists(): continue
        record = run(name, group, config, judges, args.runs)
        first, last = record["looks"][0], record["looks"][-1]
        print(f"{name}: reward {first['reward']:.3f} -> {last['reward']:.3f}, named {first['accuracy']:.0%} -> {last['accuracy']:.0%}, "
              f"diversity {first['diversity']:.2f} -> {last['diversity']:.2f}, {record['minutes']} min", flush=True)


if __name__ == "__main__": main()
