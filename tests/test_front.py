"The front page: its picture is that of the log, and its tables are complete."

import json
import re
import sys

import pytest
import torch
from page import ROOT
from PIL import Image

from ddpo_scratch.methods.base import find_method, method_names

sys.path.insert(0, str(ROOT / "experiments"))
import front  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    "Return a section of README.md."
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_table_of_methods_names_all_of_them():
    rows = [line.split("|")[1] for line in section("The methods").splitlines() if line[:1] == "|"]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    ours = [
        name for name in method_names() if find_method(name).__module__.startswith("ddpo_scratch.")
    ]
    assert sorted(named) == sorted(ours)


@pytest.mark.parametrize("folder", ["book", "derivations", "library", "making", "gpu"])
def test_every_notebook_is_named(folder):
    files = sorted(path.name for path in (ROOT / "nbs" / folder).glob("*.ipynb"))
    assert files and not [name for name in files if f"nbs/{folder}/{name})" not in README]


def test_the_first_screen_shows_the_picture_and_the_doors_come_before_numbers():
    assert README.index("(nbs/images/front.webp)") < README.index("## Two commands")
    assert README.index("## Three doors") < README.index("## What to expect")


def test_the_picture_loops_and_is_small():
    file = front.IMAGES / "front.webp"
    assert file.stat().st_size < 2e6
    with Image.open(file) as film:
        looks = max(len(rows) for rows in json.loads(front.LOG.read_text())["looks"].values())
        assert film.n_frames == 1 + (looks - 1) * front.BLENDS and film.info["loop"] == 0
        assert film.size == Image.open(front.IMAGES / "front.png").size


def test_the_log_is_of_the_rewards_and_each_learnt_and_kept_its_animals():
    log = json.loads(front.LOG.read_text())
    assert log["animals"] == front.ANIMALS and list(log["looks"]) == list(front.REWARDS)
    for reward, looks in log["looks"].items():
        epochs = front.REWARDS[reward][1]
        assert looks[0]["queries"] == 0 and looks[-1]["queries"] == 64 * epochs
        assert looks[-1]["reward"] > looks[0]["reward"]
        assert looks[-1]["named"] >= len(front.ANIMALS) - 1


def test_a_drawing_fades_into_the_next_and_a_short_run_waits(monkeypatch):
    seen = []
    monkeypatch.setattr(front, "sheet", lambda rows, most: seen.append((rows, most)))
    long = dict(images=torch.arange(3.0)[:, None], queries=[0, 64, 128])
    short = dict(images=torch.arange(2.0)[:, None], queries=[0, 64])
    looks = dict(a=[dict(reward=r) for r in (5, 6, 7)], b=[dict(reward=r) for r in (8, 9)])
    pages, durations = front.film(dict(a=long, b=short), looks)
    assert len(pages) == len(durations) == 1 + 2 * front.BLENDS
    shown = torch.tensor([[rows["a"][0].item(), rows["b"][0].item()] for rows, _ in seen])
    steps = torch.arange(len(pages)) / front.BLENDS
    torch.testing.assert_close(shown, torch.stack([steps, steps.clamp(max=1)], 1))
    rows, most = seen[-1]
    assert most == 128 and rows["a"][1:] == (7, 128) and rows["b"][1:] == (9, 64)
