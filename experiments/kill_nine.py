"""Kill a run at random moments, resume it, and compare what it ends with, byte for byte.

    python experiments/kill_nine.py        # 50 kills
    python experiments/kill_nine.py 200    # as many as you like
    python experiments/kill_nine.py 50 7   # other moments: another seed

A small run (a random Stable Diffusion 1.5 of a few thousand weights, 6 epochs of 4 pictures at 4
steps, looks, checkpoints every second epoch of which two are kept) is trained once without a kill;
then once more, and resumed from its first checkpoint, to see how often each of these calls is
made and how long it takes. Then runs are started and killed, mostly with SIGKILL, or with SIGTERM,
SIGINT, SIGHUP or two of them in a row, at a random moment of one of these calls: sampling,
training, looking, saving, deleting, resuming, setting a branch aside, saving the LoRA, reporting.
Each is resumed, and killed again, until it ends; a quarter of the resumed runs go back to an
earlier checkpoint first. At the end weights, optimizer, state, rows (without seconds) and LoRA must
be those of the run that nobody killed. It prints as it goes; the log of the last start is
kill_nine.txt, which ends with how many kills hit each place. About 3 s a kill on one core.
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
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpo_scratch.config import TrainConfig, read_config
from ddpo_scratch.run.checkpoint import checkpoints, find_checkpoint, reported_epochs
from ddpo_scratch.run.runfolder import is_free
from ddpo_scratch.train import fit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from runs import numbers, random_model  # noqa: E402

LOG = Path(__file__).with_suffix(".txt")
EPOCHS = 6
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
    model=random_model(),
    reward_fn="brightness",
    num_checkpoint_limit=2,
    lora_rank=2,
    lora_alpha=2,
)
# functions of the package: a kill comes at a random moment of one of their calls
FIRST = ("setup", "collect", "update", "look", "row", "snapshot", "write_checkpoint", "_remove")
FIRST += ("_report", "save", "write_report")
RESUMING = ("load_checkpoint", "_set_branch_aside", "_forget_after")
# every second kill is one that no program hears of
SIGNALS = [("KILL",)] * 6 + [("TERM",), ("INT",), ("HUP",), ("TERM", "TERM"), ("INT", "TERM")]


def config_of(folder, **fields):
    "Configure the run of a folder, new or resumed."
    return TrainConfig(logdir=str(folder.parent), run_name=folder.name, **FIELDS | fields)


def watched(tell):
    "Call tell(name, is_over) when a function of FIRST or RESUMING begins and when it ends."

    def watch(frame, event, _):
        code = frame.f_code
        if event in ("call", "return") and code.co_name in FIRST + RESUMING:
            if "ddpo_scratch" in code.co_filename:
                tell(code.co_name, event == "return")

    sys.setprofile(watch)


def killed_at(place, which, delay, signals):
    "Have this process kill itself some seconds after a function was called for the which-th time."
    numbers = [getattr(signal, f"SIG{name}") for name in signals]
    calls = 0

    def strike():
        time.sleep(delay)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.02)

    def tell(name, is_over):
        nonlocal calls
        calls += name == place and not is_over
        if calls == which:
            sys.setprofile(None)
            threading.Thread(target=strike, daemon=True).start()

    watched(tell)


def measured(file):
    "Have this process write down how often each of them was called, and its longest seconds."
    begun, found = {}, {}

    def tell(name, is_over):
        if not is_over:
            begun[name] = time.perf_counter()
            return
        calls, longest = found.get(name, (0, 0.0))
        seconds = time.perf_counter() - begun[name]
        found[name] = calls + 1, max(longest, seconds)
        file.write_text(json.dumps(found))

    watched(tell)


def child(config, output, prepare=None, *words):
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
            if prepare:
                prepare(*words)
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


def optimizer_of(checkpoint):
    "Read every number of a checkpoint's optimizer, as text and bytes."
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = {
        (i, name): value.numpy().tobytes() if torch.is_tensor(value) else value
        for i, values in saved["state"].items()
        for name, value in values.items()
    }
    return moments, str(saved["param_groups"])


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
        optimizer=optimizer_of(newest),
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


def a_kill(calls, how, moments):
    "Draw where, when and how a start is killed."
    places = [place for place in (FIRST if how == "anew" else FIRST + RESUMING) if place in calls]
    place = moments.choice(places)
    times, longest = calls[place]
    which = 1 if place in RESUMING else moments.randint(1, times)
    return place, which, moments.uniform(0, longest), moments.choice(SIGNALS)


def a_run(folder, moments, budget, calls, say):
    "Start a run, kill it and resume it until it ends; list the places where kills hit it."
    config, how, hits, output = config_of(folder), "anew", [], folder.with_suffix(".log")
    while config is not None:
        kill = a_kill(calls, how, moments) if len(hits) < budget else None
        # one start in ten is left in peace, so that runs end
        kill = kill if moments.random() < 0.9 else None
        code = child(config, output, killed_at, *kill) if kill else child(config, output)
        if code == 1:
            print(output.read_text())
            raise SystemExit(f"{folder.name} failed by itself, {how}, {kill}")
        if code:
            place, which, delay, signals = kill
            hits.append(place)
            where = f"{delay:.3f} s into call {which} of {place}"
            say(f"  {how}: {'+'.join(signals)} {where}, exit code {code}")
        config, how = start_again(folder, moments)
        if code == 0 and config is not None:
            raise SystemExit(f"{folder.name} ended, but its report is of another epoch")
    return hits


def measure(root):
    "Run twice, the second time from an earlier checkpoint; say how often and long places are."
    config = config_of(root / "measured")
    assert child(config, root / "measured.log", measured, root / "calls.json") == 0
    earlier = find_checkpoint(checkpoints(root / "measured")[0][1])
    again = read_config(earlier, resume_from=str(earlier))
    assert child(again, root / "measured.log", measured, root / "resumed.json") == 0
    calls, resumed = (
        json.loads((root / f"{name}.json").read_text()) for name in ("calls", "resumed")
    )
    return calls | {place: resumed[place] for place in RESUMING if place in resumed}


def main(kills=50, seed=0):
    "Kill runs until so many kills have hit."
    moments, done, runs = random.Random(seed), [], 0
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
        calls = measure(root)
        assert calls.keys() == {*FIRST, *RESUMING}, {*FIRST, *RESUMING} - calls.keys()
        while len(done) < kills:
            runs += 1
            folder = root / f"run-{runs}"
            hits = a_run(folder, moments, kills - len(done), calls, say)
            done += hits
            found = ended_with(folder)
            wrong = [name for name in expected if found[name] != expected[name]]
            if wrong:
                raise SystemExit(f"run {runs} differs in {', '.join(wrong)}: {folder}")
            say(f"run {runs}: {len(hits)} kills, the same bytes; {len(done)} of {kills}")
        minutes = (time.monotonic() - start) / 60
        say(f"{len(done)} kills of {runs} runs in {minutes:.0f} min: all ended with the same bytes")
        hit = Counter(done)
        say("where: " + ", ".join(f"{place} {hit[place]}" for place in (*FIRST, *RESUMING)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
