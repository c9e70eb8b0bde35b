"""The tour's own training loop, run at three seeds: does a minute of it learn each time?

    python experiments/tour.py                 # a few minutes on two idle cores
    python experiments/tour.py --threads 1

The cells of nbs/book/00_tour.ipynb that define the loop are executed as they stand there; nothing
is written twice. For DDPO, AWM, DDPO on all steps of a trajectory, and DDPO with shuffled
advantages (the control: it sees the same pictures and learns nothing from their rewards), and for
each seed, tour.json gets the seconds of training, the mean reward of each epoch, the gain over the
pictures before training (45 animals from held-out noise, paired by noise) with its standard error,
and the share of animals that the classifier still names.
"""

import argparse
import ast
import contextlib
import functools
import io
import json
import re
import time
from pathlib import Path

import nbformat
import torch

from ddpo_scratch.models.tiny import load_classifier

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs/book/00_tour.ipynb"
LOG = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
# name, function of the notebook, constants that differ from the notebook's
VARIANTS = (
    ("DDPO", "ddpo", {}),
    ("AWM", "awm", {}),
    # at the notebook's own rate it gains less
    ("DDPO, nine steps", "ddpo", dict(STEPS=range(9), RATE=4e-3)),
    ("DDPO, shuffled", "control", {}),
)


def definitions():
    "Execute the notebook's imports, constants and functions, and return its names."
    space = {"__name__": "tour"}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        source = "\n".join(x for x in cell.source.split("\n") if not x.startswith("%"))
        kept = [node for node in ast.parse(source).body if defines(node)]
        exec(compile(ast.Module(kept, []), str(NOTEBOOK), "exec"), space)
    space["control"] = functools.partial(control, space)
    return space


def defines(node):
    "Say whether a statement imports, defines a function, or names a constant in capitals."
    if isinstance(node, ast.Assign):
        return all(
            isinstance(x, ast.Name) and re.fullmatch("[A-Z_]{2,}|T", x.id) for x in node.targets
        )
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))


def control(tour, denoiser, rollout, advantages, optimizer, generator):
    "Learn as DDPO does, with each picture's advantage given to another picture."
    order = torch.randperm(len(advantages), generator=generator)
    return tour["ddpo"](denoiser, rollout, advantages[order], optimizer, generator)


def run(tour, variant, seed, classifier):
    "Train once and return the record."
    name, update, changed = variant
    # functions look their constants up in the dictionary that they were made in
    kept = {key: tour[key] for key in changed}
    tour.update(changed)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        model, rewards = tour["train"](tour[update], seed, tour["EPOCHS"], tour["RATE"])
    seconds = time.perf_counter() - start
    tour.update(kept)
    images = tour["look"](model)
    mean, error = tour["gain"](images)
    animals = tour["COMMON_ANIMALS"]
    named = [a == b for a, b in zip(classifier.names(images), animals, strict=True)]
    return dict(
        name=name,
        seed=seed,
        seconds=round(seconds, 1),
        rewards=[round(value, 4) for value in rewards],
        gain=round(mean, 4),
        error=round(error, 4),
        named=round(sum(named) / len(named), 4),
    )


def add(row, threads):
    "Put a run's record into the log, in place of an older one."
    log = json.loads(LOG.read_text()) if LOG.exists() else dict(runs=[])
    order = [(name, seed) for name, *_ in VARIANTS for seed in SEEDS]
    runs = {(old["name"], old["seed"]): old for old in log["runs"]}
    runs[row["name"], row["seed"]] = row | dict(threads=threads)
    runs = [runs[key] for key in order if key in runs]
    LOG.write_text(
        json.dumps(dict(command="python experiments/tour.py", runs=runs), indent=1) + "\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument("--only", choices=[name for name, *_ in VARIANTS], help="one of the four")
    args = parser.parse_args()
    tour, classifier = definitions(), load_classifier()
    torch.set_num_threads(args.threads)
    tour["before"] = tour["look"](tour["load"]("tiny", guidance_scale=1.0))
    for variant in VARIANTS:
        for seed in SEEDS:
            if args.only in (None, variant[0]):
                row = run(tour, variant, seed, classifier)
                print(json.dumps(row), flush=True)
                add(row, args.threads)


if __name__ == "__main__":
    main()
