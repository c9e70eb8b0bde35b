"Progress: the passes that are counted are those that were planned, to the last one."

import flow_models
import pytest
import torch
from runs import finished, small

from ddpo_scratch.models.base import load, sizes
from ddpo_scratch.rollout import generator_for, sample
from ddpo_scratch.run import plan as room
from ddpo_scratch.run.progress import Progress, watch
from ddpo_scratch.run.setup import setup

DIFFERENTIABLE = dict(reward_fn="jpeg_compressibility_estimate", sample_batch_size=4)
ALIGNPROP = dict(method="alignprop", backprop_steps="3", **DIFFERENTIABLE)
DRTUNE = dict(method="drtune(steps=2, early=0)", **DIFFERENTIABLE)
# all of five steps, so that none is drawn
ADJOINT = dict(method="adjoint(steps=5)", kl_weight=1.0, **DIFFERENTIABLE)
BLOCKS, STEPS = dict(gradient_checkpointing=True), dict(backprop_checkpointing=True)
RUNS = {
    "plain": {},
    "guidance": dict(sample_guidance_scale=3.0),
    "looks": dict(eval_num_images=3, eval_guidance_scale=3.0, eval_freq=1),
    "penalty": dict(kl_weight=0.1),
    "blocks again": BLOCKS,
    "penalty, blocks again": dict(kl_weight=0.1, **BLOCKS),
    "nft, blocks again": dict(method="nft", **BLOCKS),
    "alignprop": ALIGNPROP,
    "alignprop, blocks again": ALIGNPROP | BLOCKS,
    "alignprop, steps again": ALIGNPROP | STEPS,
    "alignprop, penalty, steps again": ALIGNPROP | STEPS | dict(kl_weight=0.1),
    "alignprop, both again": ALIGNPROP | STEPS | BLOCKS,
    "drtune, steps again": DRTUNE | STEPS,
    "adjoint": ADJOINT,
    "adjoint, steps again": ADJOINT | STEPS,
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_a_run_ends_at_the_work_that_was_planned(fields, tmp_path):
    state = setup(small(tmp_path, **dict(num_epochs=1) | fields))
    state.progress = Progress(total=state.work["work"])
    handle = watch(state.denoiser, state.progress)
    finished(state)
    handle.remove()
    assert state.progress.done == state.progress.total


def test_guidance_that_the_network_reads_counts_once():
    "Of FLUX.1 it is an input: the plan knows it by the model's sizes, progress by the model."
    denoiser = load(flow_models.folder("flux_dev"), 3.5)
    progress = Progress()
    watch(denoiser, progress)
    prompts, generators = ["a fox"] * 2, [generator_for(0, i) for i in range(2)]
    sample(denoiser, denoiser.encode(prompts), 4, 0.0, generators)
    assert progress.done == 2 * 4
    assert room._rows(3.5, sizes("black-forest-labs/FLUX.1-dev")) == 1


def test_a_pass_that_is_computed_again_is_known_by_its_callers():
    "Also where checkpointing breaks it off, and where a pass is differentiated within backward."

    class Net(torch.nn.Module):
        guidance_scale = 1.0

        def forward(self, x_t):
            return x_t.exp()[:]

    counts, net = [], Net()
    progress = Progress()
    progress.advance = counts.append
    watch(net, progress)
    x = torch.ones(1, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    assert counts == [3]
    y.sum().backward()
    assert counts == [3, 1]
