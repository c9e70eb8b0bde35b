"A run in miniature, for tests of its folder and of its checkpoints: two weights, no pictures."

from pathlib import Path
from types import SimpleNamespace

import torch

from ddpo_scratch.run.checkpoint import COUNTERS, load_checkpoint
from ddpo_scratch.config import TrainConfig
from ddpo_scratch.run.engine import start_engine
from ddpo_scratch.run.runfolder import held, nothing_lost


class Remembers:
    "A method with a memory."

    def __init__(self):
        self.stats = {"a fox": [1.0]}

    def memory(self):
        return {}

    def state_dict(self):
        return dict(stats=self.stats)

    def load_state_dict(self, state):
        self.stats = {
            prompt: list(map(float, rewards)) for prompt, rewards in state["stats"].items()
        }


class MiniState(SimpleNamespace):
    "What a TrainState has, as far as its folder is concerned."

    @property
    def finished(self):
        return self.epoch >= self.config.num_epochs


def mini(logdir, name="run", resume=None, folder=None, average=True, **fields):
    "Make a state of a run in logdir/name, new or resumed from a checkpoint; a step is taken."
    config = TrainConfig(logdir=str(logdir), run_name=name, stop_gain=0.0, **fields)
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    params = list(network.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.1)
    if not resume:
        network(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    state = MiniState(
        config=config,
        folder=Path(folder or Path(logdir) / (name or "ddpo_is-001")),
        engine=start_engine(config),
        denoiser=SimpleNamespace(network=network),
        params=params,
        optimizer=optimizer,
        average=None,
        method=Remembers(),
        log=None,
        claimed=resume is not None,
    )
    if average:
        from diffusers.training_utils import EMAModel

        state.average = EMAModel(params, decay=0.9)
    vars(state).update(dict.fromkeys(COUNTERS, 0), eval_start=None, judge_start={})
    if resume:
        load_checkpoint(state, resume)
    return state


def epoch(state, keep):
    "Finish an epoch: a row, a look, a checkpoint if it is due."
    state.epoch += 1
    state.log.row(dict(epoch=state.epoch, reward_mean=0.1 * state.epoch))
    look = state.folder / f"eval/epoch_{state.epoch:04d}.pt"
    look.parent.mkdir(exist_ok=True)
    look.touch()
    look.with_suffix(".png").touch()
    keep(due=state.epoch % state.config.save_freq == 0)


def epochs(state, last):
    "Train to an epoch, one yield after each, as `train` does."
    with held(state), nothing_lost(state) as keep:
        while state.epoch < last:
            epoch(state, keep)
            yield state.epoch


def train_to(state, last):
    "Train to an epoch."
    for _ in epochs(state, last):
        pass
    return state
