"""Operators that one training micro-batch launches, in a U-Net as deep as Stable Diffusion 1.5's.

    python benchmarks/operators.py              # autocast, and without it; writes operators.json
    python benchmarks/operators.py --kinds      # which operators, too

A small micro-batch on a GPU spends its time on launches, not on arithmetic. The network has Stable
Diffusion 1.5's blocks and a tenth of its channels, so that the operators are the same ones; views
launch nothing and are not counted. Loss, gauges and backward pass of one guided micro-batch of
DDPO-IS are counted, on a CPU, in eager mode.
"""

import argparse
import collections
import dataclasses
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

import ddpo_scratch.models.sd
from ddpo_scratch.config import preset
from ddpo_scratch.models.sd import StableDiffusion, load_pipeline
from ddpo_scratch.run.setup import DTYPES, setup
from ddpo_scratch.train import collect, micro_batches, minibatches

LOG = Path(__file__).with_suffix(".json")
VIEWS = """view t transpose expand as_strided detach unsqueeze squeeze slice select split permute
alias _unsafe_view unbind split_with_sizes chunk lift_fresh empty empty_like empty_strided
new_empty new_empty_strided""".split()


class Counter(TorchDispatchMode):
    "Count the operators that reach the device."

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        name = operator.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return operator(*arguments, **(keywords or {}))


def denoiser_as_deep(dtype):
    "Put a U-Net with Stable Diffusion 1.5's blocks into the embedded model's pipeline."
    pipe = load_pipeline("tiny")
    pipe.unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128),
        cross_attention_dim=pipe.unet.config.cross_attention_dim,
        attention_head_dim=8,
        sample_size=16,
    )
    for part in (pipe.unet, pipe.text_encoder):
        torch.nn.Module.to(part, dtype)
    return StableDiffusion(pipe)


def operators(precision):
    "Count the operators of a micro-batch of two transitions."
    config = dataclasses.replace(
        preset("tiny"),
        mixed_precision=precision,
        sample_guidance_scale=5.0,
        sample_num_steps=2,
        sample_batch_size=2,
        sample_num_batches_per_epoch=1,
        sample_images_per_prompt=2,
        train_batch_size=2,
        train_micro_batch_size=2,
        eval_num_images=0,
        logdir=tempfile.mkdtemp(),
    )
    state = setup(config, denoiser=denoiser_as_deep(DTYPES[precision]))
    samples = collect(state)
    index, steps, _ = minibatches(state, 0)[0]
    batch = micro_batches(state, samples, index, steps)[0]
    # the second micro-batch adds to gradients that are there
    for _ in range(2):
        with Counter() as counter:
            with state.engine.micro_batch(state.denoiser.network, True) as backward:
                losses, _ = state.method.loss(state.denoiser, batch)
                backward(losses.mean())
    return counter.counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kinds", action="store_true", help="list the operators, most first")
    args = parser.parse_args()
    counts = {"float32": operators("no"), "bf16": operators("bf16")}
    with mock.patch.object(ddpo_scratch.models.sd, "compute_in_half", lambda network: False):
        counts["bf16 under autocast"] = operators("bf16")
    totals = {name: sum(count.values()) for name, count in counts.items()}
    for name, total in totals.items():
        print(f"{name:20} {total:6} operators, {total / totals['bf16 under autocast']:.0%}")
        if args.kinds:
            print(dict(counts[name].most_common(20)))
    LOG.write_text(json.dumps(dict(torch=torch.__version__, operators=totals), indent=1) + "\n")


if __name__ == "__main__":
    main()
