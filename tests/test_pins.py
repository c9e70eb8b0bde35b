"No change moves a number unseen: every pin of pins.py is as it was recorded, bit for bit."

import copy
import json
import math

import pytest
import torch

import pins

# test_trl.py holds the same runs against TRL's own numbers, and checks their pins
HERE = [name for name in pins.PINS if not name.startswith("trl/")]


def test_every_pin_is_recorded():
    assert set(pins.record()["pins"]) == set(pins.PINS)
    assert {f"trl/{name}" for name in pins.TRL} | set(HERE) == set(pins.PINS)


@pytest.mark.parametrize("name", HERE)
def test_numbers_are_as_they_were(name):
    pins.check(name, pins.pin(name))


def near(a, b):
    "Are two leaves equal, but for the order in which processes add?"
    if isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=2e-6)
    return a == b


def test_two_processes_make_the_numbers_of_one(tmp_path):
    "In epochs of several updates too: they share order, steps, noise and minibatches."
    found = pins.two_processes(str(tmp_path))
    assert len(found) == 2 and found[0] == found[1]
    torch.set_num_threads(1)
    for name in pins.TWO_PROCESSES:
        alone = pins.run(name, str(tmp_path / "alone"), **pins.SMOOTH)
        one, two = (
            dict(pins.leaves({k: v for k, v in value.items() if k != "weights"}))
            for value in (json.loads(json.dumps(alone)), json.loads(json.dumps(found[0][name])))
        )
        assert one.keys() == two.keys()
        far = {path: (two[path], one[path]) for path in one if not near(two[path], one[path])}
        assert not far, name


def test_a_number_that_moved_is_seen():
    "In its last bit where bits can be compared, else by a tenth."
    name = "trl/ddpo"
    value = pins.record()["pins"][name]
    pins.check(name, value)
    moved = copy.deepcopy(value)
    reward = value["rewards"][0]
    moved["rewards"][0] = math.nextafter(reward, math.inf) if pins.same_bits() else 1.1 * reward
    with pytest.raises(AssertionError):
        pins.check(name, moved)
