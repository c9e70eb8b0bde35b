"""Kill a run at random moments, resume it, and compare what it ends with, byte for byte.

    python experiments/kill_nine.py        # 50 kills
    python experiments/kill_nine.py 200    # as many as you like
    python experiments/kill_nine.py 50 7   # other moments: another seed

A small run (4 epochs of 4 pictures at 4 steps, looks, checkpoints every second epoch of which two
are kept) is trained once without a kill. Then runs are started and killed, mostly with SIGKILL, or
with SIGTERM, SIGINT, SIGHUP or two of them in a row, after a random time or a random moment after
they have come to a place: saving, deleting, resuming, setting a branch aside, looking, saving the
LoRA, reporting. Each is resumed, and killed again, until it ends; a quarter of the resumed runs go
back to an earlier checkpoint first. At the end weights, optimizer, state, rows (without seconds)
and LoRA must be those of the run that nobody killed. It prints as it goes; the log of the last
start is kill_nine.txt. About 10 s a kill on one core.
"""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpo_scratch.run.checkpoint import checkpoints, find_checkpoint, reported_epochs
from ddpo_scratch.config import TrainConfig, read_config
from ddpo_scratch.run.runfolder import is_free
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.train import fit

LOG = Path(__file__).with_suffix(".txt")
EPOCHS = 4
FIELDS = dict(
    num_epochs=EPOCHS,
    sample_num_steps=4,
    sample_batch_size=4,
    sample_num_batches_per_epoch=1,
    train_batch_size=2,
    eval_num_images=2,
    eval_freq=2,
    stop_gain=0.0,
    save_freq=2,
    eval_judges="",
    num_checkpoint_limit=2,
    lora_rank=2,
    lora_alpha=2,
)
# function -> seconds that it takes at most: the kill comes at a random moment of these
PLACES = {
    "setup": 2.0,
    "load_checkpoint": 0.3,
    "_set_branch_aside": 0.02,
    "_forget_after": 0.02,
    "collect": 1.0,
    "update": 0.3,
    "look": 1.0,
    "row": 0.01,
    "snapshot": 0.05,
    "write_checkpoint": 0.1,
    "_remove": 0.01,
    "_report": 4.0,
    "save": 0.3,
    "write_report": 3.0,
}
# every second kill is one that no program hears of
SIGNALS = [("KILL",)] * 6 + [("TERM",), ("INT",), ("HUP",), ("TERM", "TERM"), ("INT", "TERM")]


def config_of(folder, **fields):
    "Configure the run of a folder, new or resumed."
    return TrainConfig(logdir=str(folder.parent), run_name=folder.name, **FIELDS | fields)


def killed_at(place, delay, signals):
    "Have this process kill itself a moment after it comes to a function for the first time."
    numbers = [getattr(signal, f"SIG{name}") for name in signals]

    def strike():
        time.sleep(delay)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.02)

    if not place:
        threading.Thread(target=strike, daemon=True).start()
        return

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_name == place:
            if "ddpo_scratch" in frame.f_code.co_filename:
                sys.setprofile(None)
                threading.Thread(target=strike, daemon=True).start()

    sys.setprofile(watch)


def child(config, output, kill=None):
    "Train in a process of its own, which a kill may end; return how it ended."
    pid = os.fork()
    if not pid:
        with open(output, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        code = 1
        try:
            torch.set_num_threads(1)
            if kill:
                killed_at(*kill)
            fit(config)
            code = 0
        except KeyboardInterrupt:
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def numbers(folder):
    "Read every number of a run's rows but its seconds."
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def ended_with(folder):
    "Read everything that must be the same: weights, optimizer, state, rows, looks, LoRA, report."
    epoch, newest = checkpoints(folder)[-1]
    state = json.loads((newest / "state.json").read_text())
    del state["config_sha256"]  # of a configuration with another folder
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    looks = sorted(path.name for path in (folder / "eval").iterdir())
    return dict(
        epoch=epoch,
        weights=(newest / "trained.safetensors").read_bytes(),
        state=state,
        rows=numbers(folder),
        lora={name: tensor.numpy().tobytes() for name, tensor in lora.items()},
        looks=looks,
        reported=reported_epochs(folder),
    )


def start_again(folder, moments):
    "Configure the next start of a run that was killed, from its newest checkpoint or an earlier."
    if not checkpoints(folder):
        assert is_free(folder), sorted(path.name for path in folder.iterdir())
        return config_of(folder), "anew"
    if reported_epochs(folder) >= EPOCHS:
        return None, "it had ended"
    where = find_checkpoint(folder)
    if moments.random() < 0.25:
        where = moments.choice([path for _, path in checkpoints(folder)])
    # the run's own file, as ddpo_train reads it
    return read_config(where, resume_from=str(where)), f"from {where.name}"


def a_run(folder, moments, budget, say):
    "Start a run, kill it and resume it until it ends; return how many kills hit it."
    config, how, hits, output = config_of(folder), "anew", 0, folder.with_suffix(".log")
    while config is not None:
        kill = None
        if hits < budget and moments.random() < 0.95:
            place = moments.choice(["", *PLACES])
            longest = PLACES.get(place, 8.0)
            kill = place, moments.uniform(0, longest), moments.choice(SIGNALS)
        code = child(config, output, kill)
        if code == 1:
            print(output.read_text())
            raise SystemExit(f"{folder.name} failed by itself, {how}, {kill}")
        if code:
            hits += 1
            where = f"{kill[1]:.2f} s after {kill[0] or 'its start'}"
            say(f"  {how}: {'+'.join(kill[2])} {where}, exit code {code}")
        config, how = start_again(folder, moments)
        if code == 0 and config is not None:
            raise SystemExit(f"{folder.name} ended, but its report is of another epoch")
    return hits


def main(kills=50, seed=0):
    "Kill runs until so many kills have hit."
    moments, done, runs = random.Random(seed), 0, 0
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = stack.enter_context(open(LOG, "w"))

        def say(line):
            print(line, flush=True)
            print(line, file=log, flush=True)

        start = time.monotonic()
        whole = root / "whole"
        assert child(config_of(whole), root / "whole.log") == 0, (root / "whole.log").read_text()
        expected = ended_with(whole)
        say(f"uninterrupted: {EPOCHS} epochs in {time.monotonic() - start:.0f} s")
        while done < kills:
            runs += 1
            folder = root / f"run-{runs}"
            hits = a_run(folder, moments, kills - done, say)
            done += hits
            found = ended_with(folder)
            wrong = [name for name in expected if found[name] != expected[name]]
            if wrong:
                raise SystemExit(f"run {runs} differs in {', '.join(wrong)}: {folder}")
            say(f"run {runs}: {hits} kills, the same bytes; {done} of {kills}")
        minutes = (time.monotonic() - start) / 60
        say(f"{done} kills of {runs} runs in {minutes:.0f} min: all ended with the same bytes")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
