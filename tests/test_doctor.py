"A run examines itself: ratios before the first update, passes it can save, noise, a dead penalty."

import dataclasses
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from runs import random_model

import ddpo_scratch.train as room
from ddpo_scratch.config import TrainConfig
from ddpo_scratch.flow import CPS, ODE, DanceSDE, FlowDDIM, FlowPath, FlowSDE
from ddpo_scratch.methods.ppo import DDPOIS
from ddpo_scratch.rollout import noise_left
from ddpo_scratch.train import fit, train

SMALL = TrainConfig(
    sample_batch_size=8,
    sample_num_batches_per_epoch=1,
    sample_num_steps=3,
    train_batch_size=4,
    train_micro_batch_size=4,
    num_epochs=1,
    stop_gain=0,
    eval_num_images=0,
    eval_freq=0,
)


def last_row(config, folder, **parts):
    "Train, and return the last epoch's metrics."
    *_, step = train(dataclasses.replace(config, logdir=str(folder)), **parts)
    return step.metrics


@pytest.fixture
def replayed(monkeypatch):
    "Count how often all log-probs are computed again."
    calls, replay = [], room._replay

    def counting(*arguments):
        calls.append(1)
        replay(*arguments)

    monkeypatch.setattr(room, "_replay", counting)
    return calls


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["ddpo_is", "flow_grpo(guard='guard')"])
def test_no_second_pass_where_shapes_agree(precision, method, tmp_path, replayed):
    "Sampling 4 at a time and training on 4 at a time is one computation; all ratios are 1."
    fields = dict(sample_batch_size=4, sample_num_batches_per_epoch=2, sample_guidance_scale=2.0)
    fields |= dict(model=random_model(), mixed_precision=precision, method=method)
    config = dataclasses.replace(SMALL, **fields)
    row = last_row(config, tmp_path)
    assert not replayed
    assert row["ratio_first"] <= (1e-5 if precision == "no" else 0)


def test_other_shapes_are_computed_again(tmp_path, replayed, capsys):
    "Micro-batches of 4 after batches of 8: the fallback, and a ratio of 1 all the same."
    row = last_row(dataclasses.replace(SMALL, mixed_precision="bf16"), tmp_path)
    assert len(replayed) == 1 and row["ratio_first"] == 0


def test_a_remainder_is_computed_again(tmp_path, replayed):
    "4 samples of 3 steps are no whole number of micro-batches of 8."
    config = dataclasses.replace(SMALL, mixed_precision="bf16", train_micro_batch_size=8)
    row = last_row(config, tmp_path)
    assert len(replayed) == 1 and row["ratio_first"] == 0


def test_methods_without_ratios_record_nothing(tmp_path, replayed):
    config = dataclasses.replace(SMALL, mixed_precision="bf16", method="rwr")
    assert "ratio_first" not in last_row(config, tmp_path) and not replayed


class _DeadPenalty(DDPOIS):
    "A KL penalty under no_grad: the mistake of a trainer that went unseen for months."

    def penalty(self, denoiser, batch):
        with torch.no_grad():
            return super().penalty(denoiser, batch)


def test_a_penalty_without_a_gradient_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(DDPOIS.named, "ddpo_is", _DeadPenalty)
    with pytest.raises(ValueError, match="has no gradient, so that kl_weight would do nothing"):
        last_row(dataclasses.replace(SMALL, kl_weight=0.1), tmp_path)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_left_is_the_last_steps_on_an_even_grid(shift):
    "Flow-SDE: fresh noise a sqrt(t / (1 - t)) sqrt(t), and what it puts into the guess's place."
    path = FlowPath(shift=shift)
    t = path.grid(10)[-2].item()
    fresh = 0.7 * math.sqrt(t / (1 - t)) * math.sqrt(t)
    kept = -(fresh**2) / (2 * t)
    assert noise_left(path, 10, FlowSDE(0.7)) == pytest.approx(math.hypot(fresh, kept), rel=1e-5)


def test_rules_that_keep_the_total_leave_none():
    for path in (FlowPath(shift=3.0), FlowPath(FlowMatchEulerDiscreteScheduler(shift=3.0))):
        for rule in (ODE(), CPS(0.8), FlowDDIM(1.0), 0.5):
            assert noise_left(path, 10, rule) < 1e-3
        for rule in (FlowSDE(0.7), DanceSDE(0.3)):
            assert noise_left(path, 10, rule) > 0.1


def test_a_run_says_after_its_first_epoch_what_cannot_go_well(tmp_path, capsys):
    "Flow-GRPO's SDE on few steps: the note comes with the first epoch, and once."
    config = dataclasses.replace(SMALL, method="flow_grpo", num_epochs=2, logdir=str(tmp_path))
    fit(config)
    lines = capsys.readouterr().out.splitlines()
    notes = [i for i, line in enumerate(lines) if line.startswith("note: noise_left is")]
    second = next(i for i, line in enumerate(lines) if "epoch 2/2" in line)
    assert notes and notes[0] < second
