"The log of a run: its rows, its surroundings, and the trackers."

import contextlib
import importlib.machinery
import importlib.metadata
import json
import os
import sys

import pytest
import torch

from ddpo_scratch.run import runlog as L
from ddpo_scratch.config import TrainConfig, read_config


def row(epoch, **more):
    "An epoch's numbers."
    return dict(epoch=epoch, reward_queries=64 * epoch, reward_mean=-2 + 0.1 * epoch, **more)


def pictures(n=3):
    "n grey pictures, black to white."
    return torch.linspace(0, 1, n)[:, None, None, None].expand(n, 3, 8, 8)


# Rows.


def test_rows_read_back_as_they_were_written_and_a_late_key_is_welcome(tmp_path):
    log = L.RunLog(tmp_path / "run", TrainConfig(seed=3))
    rows = [row(1), row(2, eval_reward_mean=float("nan")), row(3, eval_reward_mean=0.25)]
    for r in rows:
        log.row(r)
    assert str(L.read_metrics(tmp_path / "run")) == str(rows)  # as text, since nan != nan
    assert read_config(tmp_path / "run") == TrainConfig(seed=3)
    log.close()
    log.close()


def test_a_resumed_log_forgets_rows_after_its_checkpoint_and_a_half_written_line(tmp_path):
    log = L.RunLog(tmp_path, TrainConfig())
    for epoch in (1, 2, 3):
        log.row(row(epoch))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "rew')
    resumed = L.RunLog(tmp_path, TrainConfig(), epoch=2)
    assert L.read_metrics(tmp_path) == [row(1), row(2)]
    resumed.row(row(3, kl=0.5))
    assert L.read_metrics(tmp_path) == [row(1), row(2), row(3, kl=0.5)]
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 2
    assert not list(tmp_path.glob("*.part"))


def test_no_metrics(tmp_path):
    with pytest.raises(ValueError, match="no metrics in .*nowhere.*metrics.jsonl"):
        L.read_metrics(tmp_path / "nowhere")


def test_a_log_cut_off_in_its_last_line_is_read_and_one_broken_before_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert L.read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    broken = '{"epoch": 1}\n{"epo\n{"epoch": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(broken)
    with pytest.raises(ValueError, match="metrics.jsonl': line 2 is not JSON"):
        L.read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        L.RunLog(tmp_path, TrainConfig(), epoch=3)
    assert (tmp_path / "metrics.jsonl").read_text() == broken


BROKEN = {
    b'{"epoch": 2': "is not JSON",
    b"\xff\x00": "is not JSON",
    b"": "is not JSON",
    b"[2]": 'is not a row: it has no whole number "epoch"',
    b'{"reward_mean": 1.0}': "is not a row",
    b'{"epoch": "2"}': "is not a row",
}


@pytest.mark.parametrize("line, message", BROKEN.items(), ids=map(str, BROKEN))
def test_a_line_that_is_no_row_is_named_with_its_file(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + line + b'\n{"epoch": 3}\n')
    with pytest.raises(ValueError) as caught:
        L.read_metrics(tmp_path)
    assert str(caught.value).startswith(f"{str(path)!r}: line 2 {message}")
    assert str(caught.value).endswith(": mend it, or remove it")
    # what a crash leaves at the end is no part of the log
    path.write_bytes(b'{"epoch": 1}\n' + line)
    assert L.read_metrics(tmp_path) == [{"epoch": 1}]


def test_a_last_line_without_its_end_is_whole_after_resuming(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n{"epoch": 2}')
    L.RunLog(tmp_path, TrainConfig(), epoch=2).row(row(3))
    assert [r["epoch"] for r in L.read_metrics(tmp_path)] == [1, 2, 3]


def test_rows_that_are_not_there_are_told(tmp_path, capsys):
    lines = "".join(f'{{"epoch": {k}}}\n' for k in (1, 4, 6))
    (tmp_path / "metrics.jsonl").write_text(lines)
    path = str(tmp_path / "metrics.jsonl")
    for epoch, missing in ((2, "row of epoch 2 is"), (6, "rows of epochs 2 to 3, 5 are")):
        (tmp_path / "metrics.jsonl").write_text(lines)
        L.RunLog(tmp_path, TrainConfig(), epoch)
        said = f"note: the {missing} not in {path!r}: the curves will lack them\n"
        assert capsys.readouterr().out == said
    (tmp_path / "metrics.jsonl").unlink()
    L.RunLog(tmp_path, TrainConfig(), epoch=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "config.yaml"])
def test_files_are_whole_or_as_before(tmp_path, monkeypatch, name):
    L.RunLog(tmp_path, TrainConfig()).row(row(1))
    before, real = (tmp_path / name).read_bytes(), os.replace

    def replace(old, new):
        if str(new).endswith(name):
            raise OSError(28, "No space left on device")
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError):
        L.RunLog(tmp_path, TrainConfig(seed=5), epoch=1)
    assert (tmp_path / name).read_bytes() == before


# What ran.


def test_environment_says_what_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ddpo_train", "--prompt_fn", "from_list(['a fox'])"])
    L.record_environment(tmp_path)
    assert (tmp_path / "command.txt").read_text() == (
        "ddpo_train --prompt_fn 'from_list(['\"'\"'a fox'\"'\"'])'\n"
    )
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == importlib.metadata.version("torch")
    assert {"python", "system", "pillow", "accelerate", "device", "devices", "threads"} < set(
        environment
    )


STARTED = {
    "/opt/bin/ddpo_train --seed 3": "ddpo_train --seed 3",
    "ddpo_train.exe": "ddpo_train.exe",
    "/x/site-packages/ipykernel_launcher.py -f k.json": "from Python",
    "-c": "from Python",
    "": "from Python",
    "/x/bin/pytest -q": "from Python",
    "work/foxes.py --n 3": "from Python: foxes.py --n 3",
}


@pytest.mark.parametrize("words, line", STARTED.items(), ids=STARTED)
def test_only_a_command_is_kept_as_one(tmp_path, monkeypatch, words, line):
    monkeypatch.setattr(sys, "argv", words.split() or [""])
    L.record_environment(tmp_path)
    assert (tmp_path / "command.txt").read_text() == line + "\n"


# Trackers.


class Recorder(L._Tracker):
    "Stands in for a tracker, and remembers what it was sent."

    def __init__(self, folder, config, epoch):
        self.sent = []

    def row(self, row):
        self.sent.append(row)

    def images(self, arrays, captions, epoch):
        self.sent.append((arrays, captions, epoch))

    def close(self):
        self.sent.append("closed")


def test_trackers_get_rows_sixteen_captioned_pictures_and_one_end(tmp_path, monkeypatch):
    monkeypatch.setitem(L.TRACKERS, "tensorboard", Recorder)
    log = L.RunLog(tmp_path, TrainConfig(log_with="tensorboard"))
    (tracker,) = log.trackers
    prompts = [f"animal {i}" for i in range(20)]
    log.row(row(1))
    log.images(pictures(20).requires_grad_(), prompts, torch.arange(20) / 8, 1)
    log.close()
    log.close()
    assert tracker.sent[0] == row(1) and tracker.sent[2:] == ["closed"]
    arrays, captions, epoch = tracker.sent[1]
    assert len(arrays) == len(captions) == 16
    assert captions[3] == "animal 3 | 0.375" and epoch == 1
    assert arrays[15].shape == (8, 8, 3) and arrays[15].dtype.name == "uint8"
    assert [arrays[0].max(), arrays[15].max()] == [0, round(15 / 19 * 255)]


def test_unknown_and_missing_trackers_are_errors_before_anything_is_written(tmp_path, monkeypatch):
    unknown = "log_with names 'mlflow': expected some of wandb, tensorboard, trackio"
    with pytest.raises(ValueError, match=unknown):
        L.check_trackers(TrainConfig(log_with="wandb,mlflow"))
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match="pip install trackio"):
        L.RunLog(tmp_path / "run", TrainConfig(log_with="trackio"))
    assert not (tmp_path / "run").exists()
    assert L.check_trackers(TrainConfig(log_with=" ")) == []


def test_a_folder_called_like_a_tracker_is_not_that_tracker(tmp_path, monkeypatch):
    "wandb leaves ./wandb, which Python would import as an empty package."
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ImportError, match="pip install trackio"):
        L.check_trackers(TrainConfig(log_with="trackio"))


def test_tensorboard_reads_back_and_a_resumed_run_replaces_its_later_rows(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(log_with="tensorboard")
    log = L.RunLog(tmp_path, config)
    assert f"tensorboard --logdir {tmp_path.parent}\n" in capsys.readouterr().out
    log.images(pictures(), ["a", "b", "c"], [1.0, 2.0, 3.0], 0)
    for epoch in (1, 2, 3):
        log.row(dict(epoch=epoch, reward_mean=float(epoch)))
    log.close()
    (hparams,) = (tmp_path / "tensorboard").rglob("hparams.yml")
    assert "method: ddpo_is" in hparams.read_text()
    resumed = L.RunLog(tmp_path, config, epoch=1)
    resumed.row(dict(epoch=2, reward_mean=20.0))
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rewards = [(s.step, s.value) for s in events.Scalars("reward_mean")]
    assert rewards == [(1, 1.0), (2, 20.0)]
    image = events.Images("pictures/02")[0]
    assert (image.step, image.width, image.height) == (0, 8, 8)
    caption = events.Tensors("captions/01/text_summary")[0].tensor_proto.string_val[0]
    assert caption == b"b | 2"


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    config = TrainConfig(log_with="wandb", tracker_project_name="animals")
    folder = tmp_path / "run"
    ids = []
    for epoch in (0, 1):
        log = L.RunLog(folder, config, epoch)
        run = log.trackers[0].tracker.run
        ids.append(run.id)
        assert (run.name, run.project, run.config["method"]) == ("run", "animals", "ddpo_is")
        log.row(dict(epoch=epoch + 1, reward_mean=0.25))
        log.images(pictures(2), ["a", "b"], [1.0, 2.0], epoch + 1)
        assert run.summary["reward_mean"] == 0.25 and run.summary["epoch"] == epoch + 1
        assert run.summary["pictures"]["captions"] == ["a | 1", "b | 2"]
        log.close()
    assert ids[0] == ids[1] == (folder / "wandb_id.txt").read_text()
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    assert len(list(folder.rglob("pictures*.png"))) == 4


def test_trackio_rows_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip(
        "trackio", reason="trackio is an option: pip install trackio; 0.43 needs pillow below 13"
    )
    config = TrainConfig(log_with="trackio", tracker_project_name="animals")
    log = L.RunLog(tmp_path / "quiet-run", config)
    log.row(dict(epoch=1, reward_mean=0.25))
    log.images(pictures(2), ["a", "b"], [1.0, 2.0], 1)
    log.close()
    (run,) = trackio.Api().runs("animals")
    assert run.name == "quiet-run"
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2


class FakeTrackio:
    "Records calls in place of the package, and of the run that its `init` returns."

    __spec__ = importlib.machinery.ModuleSpec("trackio", None, origin="fake")

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def record(*args, **fields):
            self.calls.append((name, args, fields))
            return self if name == "init" else name

        return record


def test_trackio_is_called_as_its_manual_says(tmp_path, monkeypatch):
    trackio = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    config = TrainConfig(log_with="trackio", tracker_project_name="animals")
    log = L.RunLog(tmp_path / "quiet-run", config)
    with contextlib.closing(log):
        log.row(row(1))
        log.images(pictures(2), ["a", "b"], [1.0, 2.0], 1)
    names, args, fields = zip(*trackio.calls)
    assert names == ("init", "log", "Image", "Image", "log", "finish")
    init = fields[0]
    assert (init["project"], init["name"], init["resume"]) == ("animals", "quiet-run", "allow")
    assert init["config"]["method"] == "ddpo_is"
    assert args[1] == (row(1),) and fields[1] == fields[4] == dict(step=1)
    assert fields[3] == dict(caption="b | 2")
    assert list(args[4][0]) == ["pictures/00", "pictures/01"]
