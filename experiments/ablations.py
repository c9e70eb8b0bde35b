"""What each part of DDPO-IS does, on the embedded model: one part is changed, all else is equal.

    python experiments/ablations.py                 # every change, seeds 0, 1 and 2: about an hour
    python experiments/ablations.py clip_off        # one of them

The whole method is the comparison's DDPO-IS (experiments/comparison.py: its rate, 512 pictures,
its measures), whose runs are not repeated. Work is resumed at the first run that has no line in
ablations.jsonl. The rate is the one that suits the whole method: a change that wants another rate
looks worse here than it is.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from comparison import LOOKS, SEEDS, Job, Ruler, add_line, config_of, follow, read_log

from ddpo_scratch.evaluate import save_sheet
from ddpo_scratch.methods.ppo import DDPOIS, ppo_loss

HERE = Path(__file__).with_suffix("")
LOG = HERE.with_suffix(".jsonl")
REWARD = "jpeg_compressibility"


class ExactRatio(DDPOIS):
    "Take the ratio of whole steps, of which the trained one is the root, with PPO's own clip."

    name = "exact_ratio"

    def loss(self, denoiser, batch):
        "Compute the clipped losses of log-probs that are summed over the latent."
        log_prob = self.log_prob(denoiser, batch)
        d = batch.x_t[0].numel()
        # the gradient is d times as large, which Adam divides out
        losses = ppo_loss(
            log_prob * d, batch.old_log_prob * d, batch.weight, clip_range=0.2, reduction="none"
        )
        return losses, self.gauges(log_prob, batch)


class NoRatio(DDPOIS):
    "Take REINFORCE's step again and again, as if every sample were fresh."

    name = "no_ratio"

    def loss(self, denoiser, batch):
        "Compute the losses without ratio and clip."
        log_prob = self.log_prob(denoiser, batch)
        return -batch.weight * log_prob, self.gauges(log_prob, batch)


# what is changed -> fields
CHANGES = {
    "no_ratio": dict(method="no_ratio"),
    "exact_ratio": dict(method="exact_ratio"),
    "clip_x10": dict(train_clip_range=0.016),
    "clip_off": dict(train_clip_range=1e6),
    "guard": dict(method="flow_grpo(rule='ddim', noise_level=1.0, guard='guard')"),
    "batch_statistics": dict(per_prompt_stat_tracking=False),
    "one_picture_a_prompt": dict(sample_images_per_prompt=1),
    "half_of_the_steps": dict(train_timestep_fraction=0.5),
    "guidance_in_training": dict(sample_guidance_scale=3.0),
}


def names():
    "List the runs: every change at the first seed before the second."
    return [f"{change}-{seed}" for seed in SEEDS for change in CHANGES]


def run(name, whole):
    "Train with one change, and write a line."
    change, _, seed = name.rpartition("-")
    config = dataclasses.replace(
        config_of(Job("run", REWARD, "ddpo_is", int(seed)), whole),
        run_name=name,
        logdir="runs/ablations",
        **CHANGES[change],
    )
    record, images = follow(config, Ruler(REWARD), LOOKS)
    if seed == "0":
        save_sheet(images, HERE / f"{change}.webp")
    line = dict(name=name, change=change, seed=int(seed), threads=torch.get_num_threads()) | record
    add_line(line, LOG)
    last = record["looks"][-1]
    print(f"{name}: reward {last['reward']:.3f}, named {last['named']:.0%}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("change", nargs="?", choices=CHANGES, help="one of them; else all")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    whole = read_log()
    for name in names():
        if args.change in (None, name.rpartition("-")[0]) and name not in read_log(LOG):
            run(name, whole)


if __name__ == "__main__":
    main()
