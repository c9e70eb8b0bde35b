"Small runs that several test files share."

import sd_models
import torch

from ddpo_scratch.config import TrainConfig
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.run.setup import setup
from ddpo_scratch.train import train

SMALL = dict(
    sample_num_steps=5,
    sample_batch_size=8,
    sample_num_batches_per_epoch=1,
    train_batch_size=4,
    num_epochs=2,
    eval_num_images=0,
    stop_gain=0.0,
    lora_rank=2,
    lora_alpha=2,
)


def random_model():
    """Name the model of small runs: Stable Diffusion 1.5 with few channels and random weights.

    A pass takes a sixth of the embedded model's; its pictures have 16 x 16 pixels.
    """
    return sd_models.folder("sd15")


def small(tmp_path, **fields):
    "Configure a run of 8 pictures at 5 steps in a folder of its own, of the random model."
    fields = dict(logdir=str(tmp_path), model=random_model()) | fields
    return TrainConfig(**SMALL | fields)


def numbers(folder):
    "Read every number of a run's rows but its seconds."
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def copies(parameters):
    "Copy weights as they are now."
    return [p.detach().clone() for p in parameters]


def same(some, others):
    "Tell whether two lists of weights are equal, bit for bit."
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def finished(state):
    "Train a state to the end."
    for _ in train(state=state):
        pass
    return state


def trained(config, **parts):
    "Train to the end."
    return finished(setup(config, **parts))


def leave_in(config, epoch, **parts):
    "Train, and leave the loop in the middle of an epoch."
    for step in train(config, **parts):
        if step.epoch == epoch:
            return


def whole_and_resumed(tmp_path, **fields):
    "Train in one go, and cut off in the second epoch and resumed: the same numbers, bit for bit."
    whole = setup(small(tmp_path, run_name="whole", **fields))
    start = copies(whole.params)
    finished(whole)
    assert not same(start, whole.params), "nothing was trained"
    leave_in(small(tmp_path, run_name="cut", **fields), epoch=2)
    resumed = trained(small(tmp_path, resume_from=str(tmp_path / "cut"), **fields))
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert same(whole.params, resumed.params)
    assert whole.method.state_dict() == resumed.method.state_dict()
    return whole, resumed
