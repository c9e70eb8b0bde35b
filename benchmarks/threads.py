"""Measure an epoch of the main job alone and beside a busy core, by threads and how they wait.

    python benchmarks/threads.py            # all settings, in turns, about three minutes
    python benchmarks/threads.py --rounds 5

OpenMP's threads meet after every operation. Those that are early spin, unless OMP_WAIT_POLICY is
PASSIVE: then they sleep. Where another program holds a core, what is waited for is the thread that
it displaced, and spinning takes the core from that very thread. Each setting runs in a process of
its own, for an epoch to warm up and one that counts; alone and beside, which is a process that
counts, follow each other, and the settings take turns, since a shared machine's speed drifts. A row
keeps its fastest round.

"commands" is what ddpo_train chooses by itself where nothing is set. Writes
benchmarks/threads.json.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOG = Path(__file__).with_suffix(".json")
SETTINGS = {
    "two threads, spinning": dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="ACTIVE"),
    "two threads, as libraries have it": dict(OMP_NUM_THREADS="2"),
    "two threads, sleeping": dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE"),
    "one thread": dict(OMP_NUM_THREADS="1"),
    "commands": {},
}
CHOSEN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "GOMP_SPINCOUNT")
# the main job with a quarter of its pictures, two epochs
WORDS = """--preset tiny_minute --num_epochs 2 --sample_num_batches_per_epoch 1
--sample_batch_size 16 --eval_num_images 0 --stop_gain 0 --seed 0""".split()


@contextlib.contextmanager
def busy_core():
    "Keep one core busy while inside."
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(setting):
    "Train two epochs by the command in a process of its own; return the second epoch's seconds."
    free = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys, ddpo_scratch.cli.commands as cli; sys.exit(cli.ddpo_train())"
        subprocess.run(
            [sys.executable, "-c", code, *WORDS, "--logdir", folder, "--run_name", "a"],
            env=free | SETTINGS[setting],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        rows = (Path(folder) / "a" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[-1])
    return row["seconds_sampling"] + row["seconds_training"]


def measure(rounds):
    "Yield a row for each setting and round."
    for number in range(rounds):
        for name in SETTINGS:
            load = os.getloadavg()[0]
            alone = seconds(name)
            with busy_core():
                beside = seconds(name)
            yield name, dict(alone=round(alone, 2), beside=round(beside, 2), load=round(load, 1))
            print(
                f"round {number + 1}: {name:34} {alone:6.2f} s alone, {beside:6.2f} s beside a "
                f"busy core: {beside / alone:.2f} times as long (load before: {load:.1f})",
                flush=True,
            )


def main(args):
    rows = {name: [] for name in SETTINGS}
    for name, row in measure(args.rounds):
        rows[name].append(row)
        about = dict(cores=os.cpu_count(), rounds=rows)
        LOG.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print()
    for name, measured in rows.items():
        alone, beside = (min(row[when] for row in measured) for when in ("alone", "beside"))
        print(f"{name:34} {alone:6.2f} s, {beside:6.2f} s: {beside / alone:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    main(parser.parse_args())
