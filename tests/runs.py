"Small runs that several test files share."

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


def small(tmp_path, **fields):
    "Configure a run of 8 pictures at 5 steps in a folder of its own."
    return TrainConfig(**SMALL | dict(logdir=str(tmp_path)) | fields)


def numbers(folder):
    "Read every number of a run's rows but its seconds."
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def trained(config, **parts):
    "Train to the end."
    state = setup(config, **parts)
    for _ in train(state=state):
        pass
    return state


def leave_in(config, epoch, **parts):
    "Train, and leave the loop in the middle of an epoch."
    for step in train(config, **parts):
        if step.epoch == epoch:
            return


def whole_and_resumed(tmp_path, **fields):
    "Train in one go, and cut off in the second epoch and resumed: the same numbers, bit for bit."
    whole = trained(small(tmp_path, run_name="whole", **fields))
    leave_in(small(tmp_path, run_name="cut", **fields), epoch=2)
    resumed = trained(small(tmp_path, resume_from=str(tmp_path / "cut"), **fields))
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.params, resumed.params, strict=True))
    assert whole.method.state_dict() == resumed.method.state_dict()
    return whole, resumed
