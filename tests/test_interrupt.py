"Signals: stop, wait while something is saved, and put back what was."

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ddpo_scratch.run.interrupt import shielded, stoppable

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@each_signal
def test_a_signal_stops(number):
    with pytest.raises(KeyboardInterrupt), stoppable():
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("went on")


@each_signal
def test_a_signal_waits_and_stops_after(number, capfd):
    done = []
    with pytest.raises(KeyboardInterrupt), stoppable():
        with shielded("writing the report"):
            for _ in range(3):
                os.kill(os.getpid(), number)
            done.append("all of it")
        done.append("went on")
    assert done == ["all of it"]
    assert capfd.readouterr().err.strip() == "writing the report, please wait"


def test_without_a_signal_nothing_happens(capfd):
    with stoppable(), shielded(), shielded():
        done = True
    assert done and capfd.readouterr() == ("", "")


def test_another_signal_does_not_break_through():
    done = []
    with pytest.raises(KeyboardInterrupt), stoppable(), shielded():
        with shielded():
            signal.raise_signal(signal.SIGINT)
            done.append("inner")
        signal.raise_signal(signal.SIGTERM)
        done.append("outer")
    assert done == ["inner", "outer"]


def test_a_shield_alone_keeps_ctrl_c_off():
    "`train` without `fit` saves behind a shield too."
    done = []
    with pytest.raises(KeyboardInterrupt), shielded():
        signal.raise_signal(signal.SIGINT)
        done.append("saved")
    assert done == ["saved"]


def test_an_error_says_more_than_the_signal_that_waited():
    with pytest.raises(OSError, match="no room"), stoppable(), shielded():
        signal.raise_signal(signal.SIGTERM)
        raise OSError("no room")


def test_what_is_ignored_stays_ignored():
    "nohup starts a process that way."
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(), shielded():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_in_another_thread_nothing_is_done():
    seen = []

    def elsewhere():
        with stoppable(), shielded():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


ALONE = """
import os, signal, sys
from ddpo_scratch.run.interrupt import shielded
with shielded():
    os.close(2)  # the terminal is gone
    os.kill(os.getpid(), signal.SIGHUP)
    print("saved", flush=True)
print("went on", flush=True)
"""


def test_outside_of_stoppable_the_process_ends_as_it_would_have_but_later():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGHUP, "saved\n")
