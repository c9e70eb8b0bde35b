"""Every method on the embedded model at equal reward queries, and what is left of the pictures.

    python experiments/comparison.py           # work on the queue until it is empty
    python experiments/comparison.py --list    # what is done, running, and to do

Several workers may run side by side, and a killed one loses at most its job: each job takes a lock,
and adds a line to comparison.jsonl when it is finished. Order: for each method three learning rates
of 192 pictures (seed 10), then seeds 0, 1 and 2 at the best rate with 512 pictures, then baselines
without training and controls.

All methods draw alike (10 steps with DDIM's noise, no guidance, 16 prompts x 4 pictures an epoch),
but for the rule that Flow-GRPO and its kin are about. All are measured alike, on pictures
of the 45 animals from held-out noise (10 steps, guidance 3): by every reward and judge, the share
of animals that the classifier names, diversity, and the KL divergence to the base model along
trajectories of the training's sampler.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import time
from pathlib import Path

import torch

from ddpo_scratch.config import preset
from ddpo_scratch.evaluate import fixed_seed_images, save_sheet
from ddpo_scratch.models.base import load
from ddpo_scratch.prompts import COMMON_ANIMALS, article
from ddpo_scratch.rewards.base import Reward, compute_rewards, get_reward
from ddpo_scratch.rollout import generator_for, sample, step_kl
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.run.setup import setup
from ddpo_scratch.steering import best_of_n, fk_steering
from ddpo_scratch.train import train

HERE = Path(__file__).with_suffix("")
LOG = HERE.with_suffix(".jsonl")
RUNS = Path("runs/comparison")
PROMPTS = [f"{article(name)} {name}" for name in COMMON_ANIMALS]
JUDGES = ("tiny_clip_score", "tiny_preference", "tiny_aesthetic", "tiny_animal")
HELD_OUT_SEED, LOOK_STEPS, LOOK_GUIDANCE = 1000, 10, 3.0
FACTORS = (0.5, 1.0, 2.0)  # of a method's usual rate
# a policy gradient's steps are held by its clip, or are few: 192 pictures want larger ones
LARGER = (1.0, 2.0, 4.0)
POLICY_GRADIENTS = ("ddpo_is", "ddpo_sf", "flow_grpo", "dance", "mix", "guard")
SWEEP_EPOCHS, SWEEP_SEED = 3, 10
LOOKS = (2, 4, 8)  # epochs of 64 pictures: 128, 256, 512
SEEDS = (0, 1, 2)
# a rate is not taken where fewer animals are named: it is fast, and breaks the pictures
NAMED = 0.9

COMMON = dict(
    sample_num_steps=10,
    num_epochs=max(LOOKS),
    stop_gain=0.0,
    eval_num_images=0,
    eval_freq=0,
    save_freq=2,
    num_checkpoint_limit=1,
    per_prompt_stat_tracking_buffer_size=8,
    train_micro_batch_size=64,
)
# 8 noisings a picture in 8 updates, twice
RWR = dict(train_batch_size=8, train_num_inner_epochs=2, train_timestep_fraction=0.4)
# REINFORCE takes one update an epoch: 16 pictures
SF = dict(sample_batch_size=16, sample_num_batches_per_epoch=1, train_batch_size=16)
CHAIN = dict(train_batch_size=8)
# method -> preset and what differs from it
METHODS = {
    "ddpo_is": ("tiny", {}),
    "awm": ("tiny_awm", {}),
    "rwr": ("tiny_rwr", RWR),
    "nft": ("tiny_nft", {}),
    "flow_grpo": ("tiny_flow_grpo", {}),
    "dpo": ("tiny_dpo", {}),
    "ddpo_sf": ("tiny_sf", SF),
    "epg": ("tiny_epg", {}),
    "ram": ("tiny_ram", {}),
    "dance": ("tiny_dance", {}),
    "itm": ("tiny_itm", {}),
    "par": ("tiny_par", {}),
}
MORE = {
    "mix": ("tiny_mix", {}),
    "kto": ("tiny_kto", {}),
    "guard": ("tiny_guard", {}),
    "d3po": ("tiny_d3po", {}),
}
GRADIENT = {
    "draft_lv": ("tiny_draft_lv", CHAIN | dict(train_learning_rate=1e-3)),
    "alignprop": ("tiny_alignprop", CHAIN | dict(train_learning_rate=1e-3)),
    "drtune": ("tiny_drtune", CHAIN),
    "srpo": ("tiny_srpo", CHAIN),
}
# reward that is counted -> the reward that a gradient method trains on, and RWR's beta, which is
# about 2 / standard deviation of the base model's rewards
REWARDS = {
    "jpeg_compressibility": ("jpeg_compressibility_estimate", 10.0),
    "tiny_preference": ("tiny_preference", 3.0),
}


class Shuffled(Reward):
    "Give each picture another picture's reward: what training does when it learns nothing."

    def __init__(self, name, seed):
        self.reward, self.seed, self.calls = get_reward(name), seed, 0
        self.name = f"shuffled {name}"

    def __call__(self, images, prompts, metadata):
        scores = compute_rewards(self.reward, images, prompts, metadata)[0]
        generator = generator_for(self.seed, self.calls, "shuffled")
        self.calls += 1
        return scores[torch.randperm(len(scores), generator=generator)]


@dataclasses.dataclass(frozen=True)
class Job:
    "One line of the log to be."

    kind: str  # "sweep", "run", "control" or "baseline"
    reward: str
    method: str
    seed: int = 0
    factor: float = 0.0  # of the usual rate; 0: the best of the sweep

    @property
    def name(self):
        factor = f"-x{self.factor:g}" if self.factor else ""
        return f"{self.kind}-{self.reward}-{self.method}-{self.seed}{factor}"


def sweep(reward, method):
    "List a method at every rate."
    factors = LARGER if method in POLICY_GRADIENTS else FACTORS
    return [Job("sweep", reward, method, SWEEP_SEED, factor) for factor in factors]


def sweeps(reward, methods):
    "List every method at every rate."
    return [job for method in methods for job in sweep(reward, method)]


def runs(reward, methods):
    "List every method at every seed, all methods at the first seed before the second."
    return [Job("run", reward, method, seed) for seed in SEEDS for method in methods]


def all_jobs():
    "List the jobs, in the order of their importance."
    jpeg, taste = REWARDS
    jobs = [Job("baseline", jpeg, m) for m in ("base", "best_of_n", "fk_steering")]
    jobs += sweeps(jpeg, METHODS) + runs(jpeg, METHODS)
    controls = ("shuffled ddpo_is", "shuffled awm", "equal rwr")
    jobs += [Job("control", jpeg, m, seed) for seed in SEEDS for m in controls]
    jobs += sweeps(jpeg, GRADIENT) + runs(jpeg, GRADIENT)
    jobs += [Job("baseline", taste, m) for m in ("base", "best_of_n", "fk_steering")]
    jobs += sweeps(taste, METHODS) + runs(taste, METHODS)
    jobs += sweeps(taste, GRADIENT) + runs(taste, GRADIENT)
    for reward in REWARDS:
        jobs += sweeps(reward, MORE) + runs(reward, MORE)
    return jobs


def read_log(log=LOG):
    "Read the finished jobs: name -> record."
    if not log.exists():
        return {}
    records = map(json.loads, log.read_text().splitlines())
    return {record["name"]: record for record in records}


def add_line(record, log=LOG):
    "Add a line to the log, as one of several workers."
    with log.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(record) + "\n")


def best_factor(log, reward, method):
    "Choose a method's rate: the most reward of those that keep the animals, or the lowest."
    rows = {job.factor: log[job.name]["looks"][-1] for job in sweep(reward, method)}
    kept = [factor for factor in rows if rows[factor]["named"] >= NAMED]
    return max(kept, key=lambda factor: rows[factor]["reward"], default=min(rows))


def config_of(job, log):
    "Write the job's configuration."
    control, _, method = job.method.rpartition(" ")
    name, fields = (METHODS | MORE | GRADIENT)[method]
    trained, beta = REWARDS[job.reward]
    config = dataclasses.replace(preset(name), **COMMON | fields)
    factor = job.factor or best_factor(log, job.reward, method)
    rounds = 4 if method == "ddpo_sf" else 1  # epochs of 16 pictures
    epochs = SWEEP_EPOCHS if job.kind == "sweep" else max(LOOKS)
    return dataclasses.replace(
        config,
        reward_fn=trained if method in GRADIENT else job.reward,
        rwr_beta=0.0 if control == "equal" else beta,
        train_learning_rate=config.train_learning_rate * factor,
        num_epochs=epochs * rounds,
        seed=job.seed,
        logdir=str(RUNS),
    )


class Ruler:
    "Measure what a denoiser draws from held-out noise."

    def __init__(self, reward):
        self.reward = reward
        self.judges = {name: get_reward(name) for name in (*REWARDS, *JUDGES)}

    def draw(self, denoiser):
        "Draw the 45 animals."
        before, denoiser.guidance_scale = denoiser.guidance_scale, LOOK_GUIDANCE
        images = fixed_seed_images(denoiser, PROMPTS, HELD_OUT_SEED, LOOK_STEPS, 1.0, 45)
        denoiser.guidance_scale = before
        return images

    @torch.no_grad()
    def judge(self, images):
        "Sum up pictures of the 45 animals; of reward and animal each picture's number is kept."
        n, empty = len(images), [{}] * len(images)
        scores = {
            name: compute_rewards(judge, images, PROMPTS, empty)[0]
            for name, judge in self.judges.items()
        }
        names = self.judges["tiny_animal"].network.names(images)
        named = [name == animal for name, animal in zip(names, COMMON_ANIMALS)]
        # 1 - mean cosine between two pictures' embeddings, which have length 1
        z = self.judges["tiny_clip_score"].embed_images(images)
        diversity = (1 - (z.sum(0).square().sum() - n) / (n * (n - 1))).item()
        row = {name: v.mean().item() for name, v in scores.items()}
        each = [round(v, 4) for v in scores[self.reward].tolist()]
        animal = [round(v, 3) for v in scores["tiny_animal"].tolist()]
        row |= dict(reward=row[self.reward], named=sum(named) / n, diversity=diversity)
        return {k: round(v, 5) for k, v in row.items()} | dict(each=each, animal=animal)

    @torch.no_grad()
    def divergence(self, denoiser, n=16):
        "Estimate KL(policy || base model) of a trajectory of the training's sampler, in nats."
        before, denoiser.guidance_scale = denoiser.guidance_scale, 1.0
        generators = [generator_for(HELD_OUT_SEED, i, "divergence") for i in range(n)]
        c = denoiser.encode(PROMPTS[::2][:n])
        rollout = sample(denoiser, c, LOOK_STEPS, 1.0, generators)
        grid, total = rollout.timesteps, 0.0
        for i in range(LOOK_STEPS):
            total += step_kl(denoiser, rollout.xs[:, i], grid[i], grid[i + 1], c, 1.0)
        denoiser.guidance_scale = before
        # step_kl is a mean over dimensions
        return (total.mean() * rollout.x0[0].numel()).item()


def follow(config, ruler, when, **parts):
    "Train, measure after the epochs `when`, and return the record and the last pictures."
    # a job that was killed begins anew: its folder is another
    name = f"{config.run_name}-{os.getpid()}-{int(time.time())}"
    state = setup(dataclasses.replace(config, run_name=name), **parts)
    looks = []
    for step in train(state=state):
        if step.metrics and state.epoch in when:
            images = ruler.draw(state.denoiser)
            looks.append(dict(queries=state.reward_queries, **ruler.judge(images)))
    looks[-1]["kl"] = round(ruler.divergence(state.denoiser), 2)
    rows = read_metrics(state.folder)
    record = dict(
        config=dict(
            method=config.method,
            rate=config.train_learning_rate,
            updates=state.global_step,
        ),
        looks=looks,
        train_reward=[round(row["reward_mean"], 4) for row in rows],
        seconds=round(sum(row["seconds_sampling"] + row["seconds_training"] for row in rows), 1),
    )
    return record, images


def train_job(job, log):
    "Train, measure at the looks, and return the record."
    config = dataclasses.replace(config_of(job, log), run_name=job.name)
    parts = {}
    if job.method.startswith("shuffled"):
        parts = dict(reward_fn=Shuffled(job.reward, job.seed))
    per_look = config.num_epochs // max(LOOKS)
    when = [config.num_epochs] if job.kind == "sweep" else [n * per_look for n in LOOKS]
    record, images = follow(config, Ruler(job.reward), when, **parts)
    if job.seed == 0:
        save_sheet(images, HERE / f"{job.reward}-{job.method.replace(' ', '_')}.webp")
    return record


def steered_pictures(job, denoiser):
    "Yield what a baseline draws for more and more queries."
    shared = dict(n_steps=LOOK_STEPS, rule=1.0, seed=HELD_OUT_SEED, batch_size=45)
    if job.method == "best_of_n":
        for n in (2, 4, 8, 16):
            yield best_of_n(denoiser, PROMPTS, job.reward, n=n, **shared)
    if job.method == "fk_steering":
        strength = REWARDS[job.reward][1]
        for n, scores in ((2, 2), (4, 2), (4, 4)):
            counts = dict(n_particles=n, n_scores=scores, strength=strength)
            yield fk_steering(denoiser, PROMPTS, job.reward, **counts, **shared)


def baseline_job(job):
    "Measure what is drawn without any training."
    ruler = Ruler(job.reward)
    denoiser = load("tiny", guidance_scale=LOOK_GUIDANCE)
    looks = []
    if job.method == "base":
        looks.append(dict(queries=0, **ruler.judge(ruler.draw(denoiser))))
    start = time.perf_counter()
    for steered in steered_pictures(job, denoiser):
        looks.append(dict(queries=steered.queries, **ruler.judge(steered.images)))
    return dict(looks=looks, seconds=round(time.perf_counter() - start, 1))


def run(job, log):
    "Do a job and write its line."
    record = baseline_job(job) if job.kind == "baseline" else train_job(job, log)
    add_line(
        dict(name=job.name, **dataclasses.asdict(job), threads=torch.get_num_threads()) | record
    )
    last = record["looks"][-1]
    print(
        f"{job.name}: reward {last['reward']:.3f}, named {last['named']:.0%}, "
        f"{last['queries']} queries, {record['seconds']:.0f} s",
        flush=True,
    )


def ready(job, log):
    "Say whether what the job needs is there: a run needs its method's sweep."
    if job.kind not in ("run", "control"):
        return True
    method = job.method.rpartition(" ")[2]
    return all(needed.name in log for needed in sweep(job.reward, method))


def work():
    "Take jobs until none is left."
    RUNS.mkdir(parents=True, exist_ok=True)
    for job in all_jobs():
        with (RUNS / f"{job.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another worker has it
            log = read_log()
            while job.name not in log and not ready(job, log):
                time.sleep(5)
                log = read_log()
            if job.name not in log:
                run(job, log)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--list", action="store_true", help="list the jobs, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.list:
        done = read_log()
        for job in all_jobs():
            print("done" if job.name in done else "    ", job.name)
    else:
        work()


if __name__ == "__main__":
    main()
