"""The tour's loop, as the notebook has it: it does what it says, and it learned at three seeds."""

import dataclasses
import json
import re
import sys

import nbformat
import pytest
import torch
from page import ROOT

from ddpo_scratch.methods.base import find_method, method_names

sys.path.insert(0, str(ROOT / "experiments"))
import tour  # noqa: E402


@pytest.fixture
def names():
    "The notebook's own functions, at their smallest: two animals, two steps."
    space = tour.definitions()
    prompts = [p for p in space["ALL"][:2] for _ in range(space["GROUP"])]
    space.update(PROMPTS=prompts, T=2, STEPS=range(1))
    return space


def test_the_loop_fits_a_screen():
    cells = nbformat.read(tour.NOTEBOOK, as_version=4).cells
    (loop,) = (cell.source for cell in cells if "def train(" in cell.source)
    assert len(loop.splitlines()) <= 45


def test_the_map_names_every_method():
    cells = nbformat.read(tour.NOTEBOOK, as_version=4).cells
    (table,) = (cell.source for cell in cells if cell.source.startswith("## A map"))
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    ours = [
        name for name in method_names() if find_method(name).__module__.startswith("ddpo_scratch.")
    ]
    assert sorted(named) == sorted(ours)


def test_the_log_is_of_the_loop_as_it_is():
    log = json.loads(tour.LOG.read_text())
    epochs = tour.definitions()["EPOCHS"]
    assert all(len(row["rewards"]) == epochs for row in log["runs"])
    runs = {(row["name"], row["seed"]): row for row in log["runs"]}
    assert runs.keys() == {(v[0], seed) for v in tour.VARIANTS for seed in tour.SEEDS}
    for (name, seed), row in runs.items():
        if name in ("DDPO", "AWM"):
            assert row["gain"] > 4 * row["error"], row
        if name == "DDPO, shuffled":
            assert row["gain"] < 4 * row["error"], row
            assert row["gain"] < 0.5 * runs["DDPO", seed]["gain"]


@pytest.mark.parametrize("update", ["ddpo", "awm", "control"])
def test_an_epoch_trains_and_can_be_repeated(names, update, capsys):
    runs = [names["train"](names[update], seed, 1, 1e-3) for seed in (0, 0, 1)]
    assert capsys.readouterr().out.count("epoch 1") == 3
    same, again, other = ([p for p in model.parameters() if p.requires_grad] for model, _ in runs)
    assert same and all(map(torch.equal, same, again))
    assert not all(map(torch.equal, same, other))
    moved = [p for name, p in runs[0][0].named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 0 for p in moved)  # they start at zero
    assert runs[0][1] == runs[1][1] != runs[2][1]


def test_fresh_samples_follow_reinforce(names, monkeypatch):
    "At ratio 1 the first update's gradient is REINFORCE's."
    denoiser = names["load"]("tiny", guidance_scale=1.0)
    weights = denoiser.trainable(lora_rank=8, seed=0)
    noise = [names["generator_for"](0, i) for i in range(8)]
    rollout = names["sample"](denoiser, denoiser.encode(names["PROMPTS"]), 2, 1.0, noise)
    advantages = torch.linspace(-1, 1, 8)
    found = []

    def keep(optimizer):
        found.append([p.grad.clone() for p in weights])

    monkeypatch.setitem(names, "take_step", keep)
    generator = torch.Generator().manual_seed(0)
    names["ddpo"](denoiser, rollout, advantages, torch.optim.SGD(weights, lr=0.0), generator)
    times = rollout.timesteps
    log_prob = names["step_log_prob"](
        denoiser, rollout.xs[:, 0], rollout.xs[:, 1], times[0], times[1], rollout.c, 1.0
    )
    expected = torch.autograd.grad(-(advantages * log_prob).mean(), weights)
    torch.testing.assert_close(found[0], list(expected), rtol=1e-3, atol=1e-6)


def test_the_remark_is_the_share_of_clipped_steps(names, monkeypatch):
    "With a clip of zero, all steps that moved the right way are clipped; with a wide one, none."
    denoiser = names["load"]("tiny", guidance_scale=1.0)
    weights = denoiser.trainable(lora_rank=8, seed=0)
    noise = [names["generator_for"](0, i) for i in range(8)]
    rollout = names["sample"](denoiser, denoiser.encode(names["PROMPTS"]), 2, 1.0, noise)
    rollout = dataclasses.replace(rollout, log_probs=rollout.log_probs - 0.1)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    remarks = []
    for clip in (0.0, 1.0):
        monkeypatch.setitem(names, "CLIP", clip)
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(weights, lr=0.0)
        remarks.append(names["ddpo"](denoiser, rollout, advantages, optimizer, generator))
    assert remarks == [", 62% of the steps clipped", ", 0% of the steps clipped"]


def test_constants_and_functions_are_taken_and_runs_are_not(tmp_path, monkeypatch):
    source = "A, B_C = 1, 2\nD_E = 3\nF = 4\nT = 5\ndef g():\n    return D_E\nraise ValueError"
    cells = [nbformat.v4.new_code_cell(f"%matplotlib inline\n{source}")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    monkeypatch.setattr(tour, "NOTEBOOK", tmp_path / "a.ipynb")
    space = tour.definitions()
    assert space["g"]() == 3 and space["T"] == 5
    assert not {"A", "B_C", "F"} & space.keys()
