"No change moves a number unseen: every pin of pins.py is as it was recorded, bit for bit."

import copy
import math

import pytest

import pins

# test_trl.py holds the same runs against TRL's own numbers, and checks their pins
HERE = [name for name in pins.PINS if not name.startswith("trl/")]


def test_every_pin_is_recorded():
    assert set(pins.record()["pins"]) == set(pins.PINS)
    assert {f"trl/{name}" for name in pins.TRL} | set(HERE) == set(pins.PINS)


@pytest.mark.parametrize("name", HERE)
def test_numbers_are_as_they_were(name):
    pins.check(name, pins.pin(name))


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
