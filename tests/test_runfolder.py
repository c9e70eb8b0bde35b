"A run's folder: one run, one process, one line of history, and nothing lost."

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import time
import traceback
from types import SimpleNamespace

import pytest
import torch
from miniature import epoch, epochs, mini, train_to
from runs import small
from safetensors.torch import load, load_file

from ddpo_scratch.run import runfolder as F
from ddpo_scratch.run.checkpoint import checkpoints, find_checkpoint, save_checkpoint, snapshot
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.train import fit

RESULTS = ("report.json", "README.md", "pytorch_lora_weights.safetensors", "strip.gif")


def saved(folder):
    return [number for number, _ in checkpoints(folder)]


def rows(folder):
    return [row["epoch"] for row in read_metrics(folder)]


def looks(folder):
    "The epochs of the pictures, each of which has two files."
    names = [path.name for path in folder.glob("eval/*")]
    numbers = sorted({int(name[6:10]) for name in names})
    assert len(names) == 2 * len(numbers)
    return numbers


def story(folder):
    return saved(folder), rows(folder), looks(folder)


def resumed(folder, number=None, **fields):
    "Go on from the newest checkpoint, or from that of an epoch."
    where = find_checkpoint(folder)
    if number:
        where = where.with_name(f"epoch_{number:04d}")
    return mini(folder.parent, resume=where, **dict(num_epochs=9, num_checkpoint_limit=9) | fields)


@pytest.fixture
def run(tmp_path):
    "A run of four epochs, with its report."
    folder = train_to(mini(tmp_path, num_epochs=9, num_checkpoint_limit=9), 4).folder
    for name in RESULTS:
        (folder / name).write_text('{"epochs": 4}')
    return folder


# One line of history.


def test_a_branch_that_is_given_up_is_set_aside_as_a_whole(run, capsys):
    train_to(resumed(run, 2), 3)
    assert story(run) == ([1, 2, 3], [1, 2, 3], [1, 2, 3])
    assert story(run / "abandoned/001") == ([3, 4], [3, 4], [3, 4])
    assert not any((run / name).exists() for name in RESULTS)
    assert all((run / "abandoned/001" / name).exists() for name in RESULTS)
    words = (
        r"what came after epoch 2 is set aside in .*001 \(2 checkpoints, 2 rows, 2 looks, report"
    )
    assert re.search(words, capsys.readouterr().out)
    # killed one epoch later, it goes on from what was trained last
    assert resumed(run).epoch == 3
    train_to(resumed(run, 1), 2)
    assert story(run) == ([1, 2],) * 3
    assert story(run / "abandoned/002") == ([2, 3],) * 3


def test_with_one_checkpoint_kept_the_new_one_stays(run):
    train_to(resumed(run, 2, num_checkpoint_limit=1), 3)
    assert story(run) == ([3], [1, 2, 3], [1, 2, 3])


def test_going_on_from_the_newest_sets_nothing_aside(run, capsys):
    train_to(resumed(run), 5)
    assert story(run) == ([1, 2, 3, 4, 5],) * 3
    assert not (run / "abandoned").exists() and "aside" not in capsys.readouterr().out
    assert all((run / name).exists() for name in RESULTS)


def test_rows_and_pictures_of_epochs_that_were_not_saved_are_set_aside_too(run):
    "They will be trained again, or never: in neither case may the report count them."
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5}\n{"epoch": 6}\n{"epo')
    (run / "eval/epoch_0006.pt").touch()
    (run / "eval/epoch_0006.png").touch()
    train_to(resumed(run), 5)
    assert story(run) == ([1, 2, 3, 4, 5],) * 3
    assert rows(run / "abandoned/001") == [5, 6] and looks(run / "abandoned/001") == [6]
    # the report is of epoch 4, and so is the run
    assert (run / "report.json").exists()


def test_what_others_keep_there_stays(run):
    (run / "eval/epoch_old.pt").touch()
    (run / "notes.txt").touch()
    copied = run / "checkpoints/epoch_0009_keep"
    copied.mkdir()
    train_to(resumed(run, 2), 3)
    assert (run / "eval/epoch_old.pt").exists() and (run / "notes.txt").exists()
    assert copied.exists()


@pytest.mark.parametrize("moves", range(7))
def test_a_kill_while_a_branch_is_set_aside_loses_nothing(run, monkeypatch, moves):
    "However far the moving came, the newest checkpoint has its rows."

    class Killed(BaseException):
        pass

    real, left = os.replace, iter(range(moves))

    def replace(old, new):
        if "abandoned" in str(new) and next(left, None) is None:
            raise Killed
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(F.os, "replace", replace)
        with pytest.raises(Killed):
            train_to(resumed(run, 2), 3)
    newest = max(saved(run))
    assert newest == (4, 3, 2)[min(moves, 2)]
    assert set(range(1, newest + 1)) <= set(rows(run))
    train_to(resumed(run), 5)
    assert saved(run)[-1] == 5 and rows(run) == [1, 2, 3, 4, 5]


def test_what_was_half_written_or_half_deleted_is_cleared(run):
    for name in (".part_0005", ".gone_epoch_0001", ".shards"):
        (run / "checkpoints" / name).mkdir()
    train_to(resumed(run), 5)
    assert all(path.name.startswith("epoch_") for path in (run / "checkpoints").iterdir())


def test_missing_rows_are_told(run, capsys):
    (run / "metrics.jsonl").unlink()
    train_to(resumed(run), 5)
    assert rows(run) == [5]
    assert "note: the rows of epochs 1 to 4 are not in" in capsys.readouterr().out


def test_damaged_rows_stop_the_run_before_anything_is_moved(run):
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl': line 2 is not JSON"):
        train_to(resumed(run, 2), 3)
    assert saved(run) == [1, 2, 3, 4] and not (run / "abandoned").exists()
    assert not (run / ".holder").exists()


# One process at a time.


def test_a_folder_in_use_is_refused_and_given_back(run):
    with F.held(resumed(run)):
        message = "in use by this process itself: close the loop over train.. that it left open"
        with pytest.raises(ValueError, match=message), F.held(resumed(run)):
            pytest.fail("both hold it")
    with F.held(resumed(run)):
        assert (run / ".holder").exists()
    assert not (run / ".holder").exists()


def test_a_loop_that_is_left_gives_the_folder_back(run):
    loop = epochs(resumed(run), 9)
    assert next(loop) == 5
    with pytest.raises(ValueError, match="in use"), F.held(resumed(run)):
        pass
    loop.close()
    assert train_to(resumed(run), 6).epoch == 6


def test_holding_again_does_nothing(run):
    state = resumed(run)
    with F.held(state):
        log = state.log
        with F.held(state):
            assert state.log is log
        assert state.log is log and (run / ".holder").exists()
    assert state.log is None


def hold(folder):
    with F.held(resumed(folder)):
        (folder / "ready").write_text(str(os.getpid()))
        time.sleep(60)


@pytest.fixture
def other(run):
    "Start another process, and wait until it holds the run's folder."
    processes = []

    def start(target):
        process = multiprocessing.get_context("fork").Process(target=target, args=(run,))
        process.start()
        processes.append(process)
        until = time.monotonic() + 60
        while not (run / "ready").exists() or not (run / "ready").read_text():
            assert process.is_alive() and time.monotonic() < until
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_the_second_process_is_told_who_was_first_until_it_is_killed(run, other):
    first = other(hold)
    who = f"process {first.pid} on {re.escape(socket.gethostname())}, since 20"
    with pytest.raises(ValueError, match=f"{run.name}' is in use by {who}.*: wait until it ends"):
        train_to(resumed(run), 5)
    first.kill()
    first.join()
    assert train_to(resumed(run), 5).epoch == 5


def test_one_folder_for_each_of_several_that_start_at_once(tmp_path):
    states = [mini(tmp_path, name="", num_epochs=9) for _ in range(3)]
    loops = [epochs(state, 2) for state in states]
    for loop in loops:
        next(loop)
    names = [state.folder.name for state in states]
    assert names == ["ddpo_is-001", "ddpo_is-002", "ddpo_is-003"]
    for loop in loops:
        assert list(loop) == [2]
    assert all(story(state.folder) == ([1, 2],) * 3 for state in states)


def test_a_name_is_not_given_twice(tmp_path):
    first, second = mini(tmp_path), mini(tmp_path)
    loop = epochs(first, 2)
    next(loop)
    with pytest.raises(ValueError, match="run' is in use by this process"):
        train_to(second, 1)
    list(loop)
    with pytest.raises(ValueError, match="run' already holds a run: resume it .* nothing was over"):
        train_to(second, 1)
    assert story(first.folder) == ([1, 2],) * 3


def test_what_the_main_process_finds_all_hear(tmp_path):
    "A process that is not the main one writes nothing, and stops with it."
    state = mini(tmp_path)
    state.engine = SimpleNamespace(is_main=False, share=lambda item: ("elsewhere", "no room"))
    with pytest.raises(ValueError, match="no room"), F.held(state):
        pass
    state.engine.share = lambda item: (str(tmp_path / "run-002"), "")
    with F.held(state):
        assert state.folder == tmp_path / "run-002" and state.claimed and state.log is None
    assert not list(tmp_path.iterdir())


def test_a_folder_given_from_here_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = mini("runs", folder="runs/run")
    loop = epochs(state, 2)
    next(loop)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert list(loop) == [2] and story(tmp_path / "runs/run") == ([1, 2],) * 3


# Free or not.


def fail_in_the_first(state, error):
    with F.held(state), F.nothing_lost(state):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt(), SystemExit(3)])
def test_a_run_that_fails_before_anything_is_saved_leaves_no_folder(tmp_path, error):
    with pytest.raises(type(error)):
        fail_in_the_first(mini(tmp_path), error)
    assert not list(tmp_path.iterdir())


def test_an_error_while_the_log_is_opened_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="log_with"):
        train_to(mini(tmp_path, log_with="wandb,wandb_"), 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_of_others_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError):
        fail_in_the_first(mini(tmp_path), RuntimeError())
    assert F.is_free(tmp_path / "run")  # it was there before the run
    state = mini(tmp_path, "other")
    with pytest.raises(RuntimeError), F.held(state):
        (state.folder / "notes.txt").touch()
        raise RuntimeError
    assert (tmp_path / "other/notes.txt").exists() and not F.is_free(tmp_path / "other")


def test_a_loop_that_is_left_in_the_first_epoch_leaves_a_folder_that_is_free(tmp_path):
    state = mini(tmp_path)

    def loop():
        with F.held(state):
            yield

    left = loop()
    next(left)
    left.close()
    assert state.folder.exists() and F.is_free(state.folder)


def test_a_run_may_start_where_another_died(tmp_path, capsys):
    state = mini(tmp_path, save_freq=99)
    with F.held(state):
        epoch(state, lambda due: None)
    # killed: a lock that nobody holds, a name that nobody has
    (state.folder / ".holder").write_text("process 1 on elsewhere, since ever")
    (state.folder / "checkpoints/.part_0001").mkdir(parents=True)
    assert F.is_free(state.folder)
    train_to(mini(tmp_path, num_epochs=9), 2)
    assert story(state.folder) == ([1, 2],) * 3
    assert rows(state.folder / "abandoned/001") == [1]
    assert "what a run that saved nothing left here is set aside" in capsys.readouterr().out


def test_a_run_that_died_without_a_trace_is_replaced(tmp_path):
    for _ in range(2):
        state = mini(tmp_path)
        with F.held(state):
            pass
    assert not (state.folder / "abandoned").exists()
    assert len((state.folder / "command.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["notes.txt", "report.json", "lora", "checkpoints/epoch_0001"])
def test_a_folder_with_results_or_with_anything_else_is_not_free(tmp_path, name):
    assert F.is_free(tmp_path) and F.is_free(tmp_path / "missing")
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl.part").touch()
    assert F.is_free(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert not F.is_free(tmp_path)
    assert not F.is_free(tmp_path / "config.yaml")


# Nothing lost.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_what_is_only_in_memory(tmp_path, number):
    state = mini(tmp_path, num_epochs=9, save_freq=100)

    def train():
        for done in epochs(state, 9):
            if done == 3:
                os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt), F.held(state), F.says_where(state):
        train()
    assert saved(state.folder) == [3]


def test_a_second_signal_while_that_is_written_loses_nothing(tmp_path, monkeypatch, capfd):
    state = mini(tmp_path, num_epochs=9, save_freq=100)
    real = F.write_checkpoint

    def told_again(*args):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        real(*args)

    monkeypatch.setattr(F, "write_checkpoint", told_again)
    with pytest.raises(KeyboardInterrupt), F.held(state), F.says_where(state):
        with contextlib.closing(epochs(state, 9)) as loop:
            for done in loop:
                if done == 2:
                    os.kill(os.getpid(), signal.SIGINT)
    assert saved(state.folder) == [2]
    out, err = capfd.readouterr()
    assert "saving, please wait" in err and "saved up to epoch_0002: resume with" in out


def test_a_signal_just_before_the_shield_is_up_loses_nothing(tmp_path, monkeypatch):
    state, tries = mini(tmp_path, num_epochs=9, save_freq=100), iter([True, False])
    real = F.shielded

    def late(*args):
        if next(tries):
            raise KeyboardInterrupt
        return real(*args)

    def train():
        with F.held(state), F.nothing_lost(state) as keep:
            epoch(state, keep)
            monkeypatch.setattr(F, "shielded", late)
            raise RuntimeError

    with pytest.raises(KeyboardInterrupt):
        train()
    assert saved(state.folder) == [1]


def test_a_signal_while_a_due_epoch_is_saved_waits(tmp_path, monkeypatch):
    state, real = mini(tmp_path, num_epochs=9), F.save_checkpoint

    def told(state):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return real(state)

    monkeypatch.setattr(F, "save_checkpoint", told)
    with pytest.raises(KeyboardInterrupt), F.held(state), F.says_where(state):
        train_to(state, 9)
    assert story(state.folder) == ([1],) * 3


def test_an_epoch_that_is_not_finite_is_not_kept_in_place_of_one_that_is(tmp_path):
    state = mini(tmp_path, num_epochs=9, save_freq=100)

    def train():
        for done in epochs(state, 9):
            if done == 2:
                state.params[0].data.fill_(float("inf"))

    with pytest.raises(FloatingPointError, match="are not finite after optimizer step"):
        train()
    assert saved(state.folder) == [2]


def test_an_error_while_saving_keeps_what_is_in_memory(tmp_path, monkeypatch):
    state = mini(tmp_path, num_epochs=9, save_freq=3)

    def full(state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(F, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"):
        train_to(state, 9)
    assert saved(state.folder) == [2] and state.epoch == 3


# The last line.


def last_line(state, prepare=lambda state: None, capsys=None):
    with pytest.raises(RuntimeError), F.held(state), F.says_where(state):
        prepare(state)
        raise RuntimeError
    return capsys.readouterr().out.strip()


def test_where_a_run_stopped_is_true_in_every_case(tmp_path, capsys):
    def told(name, prepare, **fields):
        text = last_line(mini(tmp_path, name, **dict(num_epochs=9) | fields), prepare, capsys)
        return text.replace(str(tmp_path), "RUNS")

    def unsaved(state):
        state.epoch = 3

    def behind(state):
        train_to(state, 2)
        state.epoch = 4

    def reported(state):
        train_to(state, 2)
        (state.folder / "report.json").write_text('{"epochs": 2}')

    use = "for its {} and report as they are: ddpo_train --resume_from RUNS/{} --num_epochs 2"
    nothing = "stopped in epoch 1; no epoch was finished, so nothing is saved"
    assert told("a", lambda state: None) == nothing
    assert told("b", unsaved) == "stopped in epoch 4; 3 epochs finished, but nothing is saved"
    resume = "saved up to epoch_0002: resume with --resume_from RUNS"
    assert told("c", lambda state: train_to(state, 2)) == (
        f"stopped in epoch 3; {resume}/c\n{use.format('LoRA', 'c')}"
    )
    full = told("d", lambda state: train_to(state, 2), use_lora=False)
    assert full.endswith(use.format("model", "d"))
    assert told("e", behind) == (
        f"stopped in epoch 5; {resume}/e\nepochs 3 to 4 finished, but not saved: "
        f"trained again by it\n{use.format('LoRA', 'e')}"
    )
    assert told("f", reported).endswith("\nits report and weights are in RUNS/f")
    assert told("g", lambda state: train_to(state, 2), num_epochs=2) == (
        "stopped after the last epoch (2), before the report was finished: "
        "--resume_from RUNS/g writes it"
    )
    assert told("h", reported, num_epochs=2) == (
        "stopped after the last epoch (2); the report is written: RUNS/h"
    )


def test_the_advice_for_the_report_of_a_stopped_run_can_be_followed(tmp_path):
    folder = train_to(mini(tmp_path, num_epochs=9), 2).folder
    state = resumed(folder, num_epochs=2)
    assert state.finished and train_to(state, 2).epoch == 2
    assert story(folder) == ([1, 2],) * 3


def test_other_processes_say_nothing(tmp_path, capsys):
    state = mini(tmp_path)
    state.engine = SimpleNamespace(is_main=False)
    with pytest.raises(RuntimeError), F.says_where(state):
        raise RuntimeError
    assert capsys.readouterr().out == ""


def test_snapshots_are_kept_by_the_main_process_of_whole_networks_alone(tmp_path):
    state = mini(tmp_path, num_epochs=9, save_freq=9)
    files = snapshot(state)
    assert json.loads(files["state.json"])["epoch"] == 0
    save_checkpoint(state)
    assert saved(state.folder) == [0]


# A real run.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "A run of two epochs, with its report."
    fields = dict(eval_num_images=2, eval_judges="", num_checkpoint_limit=2)
    return fit(small(tmp_path_factory.mktemp("runs"), run_name="a", **fields))


def test_every_file_of_a_run_is_known_here(real):
    "What is not known would stay behind when a branch is set aside."
    names = {path.name for path in real.iterdir()}
    assert names <= F._EARLY | set(F._RESULTS), names - F._EARLY - set(F._RESULTS)
    assert names >= {"report.json", "report.html", "pytorch_lora_weights.safetensors", ".lock"}


def test_a_run_killed_before_its_report_is_finished_gets_it_by_resuming(real):
    weights = (real / "pytorch_lora_weights.safetensors").read_bytes()
    for name in ("report.json", "README.md", "pytorch_lora_weights.safetensors"):
        (real / name).unlink()
    fields = dict(eval_num_images=2, eval_judges="")
    again = small(real.parent, resume_from=str(real), **fields)
    assert fit(again) == real and json.loads((real / "report.json").read_text())["epochs"] == 2
    tensors = load_file(real / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(tensors[name], old) for name, old in load(weights).items())
    assert len(read_metrics(real)) == 2
    with pytest.raises(ValueError, match="has already finished epoch 2 of 2, and its report is"):
        fit(again)


def test_an_interrupt_ends_with_the_line_that_says_how_to_go_on(tmp_path):
    "Where in the libraries it came is no news: the traceback has this file and that of the run."
    state = mini(tmp_path, num_epochs=9)
    with pytest.raises(KeyboardInterrupt) as caught:
        with F.held(state), F.says_where(state):
            train_to(state, 2)
            signal.raise_signal(signal.SIGTERM)
    lines = traceback.format_exception(caught.value)
    message = (
        f"stopped in epoch 3; saved up to epoch_0002: resume with --resume_from {state.folder}"
    )
    assert lines[-1].strip() == f"KeyboardInterrupt: {message}"
    assert len(caught.traceback) <= 3 and "During handling" not in "".join(lines)
    assert caught.traceback[-1].path.name == "runfolder.py"


def test_how_to_go_on_repeats_what_a_file_cannot_ask_for(tmp_path):
    for number, (fields, more) in enumerate(
        [
            (dict(push_to_hub=True), " --push_to_hub"),
            (dict(push_to_hub=True, reward_fn="my.py:red"), " --trust"),
            (dict(), ""),
        ]
    ):
        state = mini(tmp_path, name=f"run-{number}", num_epochs=9, **fields)
        train_to(state, 1)
        assert F._again(state) == f"--resume_from {state.folder}{more}"


def test_how_to_go_on_can_be_pasted(tmp_path):
    import shlex
    from types import SimpleNamespace

    from ddpo_scratch.config import TrainConfig

    folder = tmp_path / "it's my run"
    state = SimpleNamespace(folder=folder, config=TrainConfig(eval_judges="redness, my.py:red"))
    assert shlex.split(F._again(state, 3)) == [
        "--resume_from",
        str(folder),
        "--num_epochs",
        "3",
        "--trust",
    ]
    state.config = TrainConfig(reward_fn="__main__:score")
    assert F._again(state).count(f'"{folder}"') == 2
