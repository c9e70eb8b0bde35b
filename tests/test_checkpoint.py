"Checkpoints: their names, what is written and pruned, what is damaged, what may go on."

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from miniature import mini, train_to
from safetensors.torch import load_file, save_file

from ddpo_scratch.run import checkpoint as C
from ddpo_scratch.config import read_config

STATE, CONFIG = "state.json", "config.yaml"
WEIGHTS, OPTIMIZER, AVERAGE = "trained.safetensors", "optimizer.pt", "average.pt"


@pytest.fixture
def run(tmp_path):
    "A run's folder with the checkpoints of epochs 1 and 2."
    return train_to(mini(tmp_path, num_epochs=9), 2).folder


def saved(run, epoch=2):
    return run / f"checkpoints/epoch_{epoch:04d}"


def resume(run, **fields):
    "Go on from a run's newest checkpoint."
    where = C.find_checkpoint(run)
    return mini(run.parent, resume=where, **dict(num_epochs=9) | fields)


# Names.


def test_names_are_read_and_sorted_by_number(run):
    root = run / "checkpoints"
    for name in (
        "epoch_9999",
        "epoch_10000",
        "epoch_0002_keep",
        "epoch_best",
        "epoch_",
        "epoch_-1",
    ):
        shutil.copytree(saved(run), root / name)
    (root / "epoch_20000").write_text("a file")
    (root / "epoch_0000.txt").write_text("a file")
    assert [epoch for epoch, _ in C.checkpoints(run)] == [1, 2, 9999, 10000]
    assert C.find_checkpoint(run).name == "epoch_10000"


def test_only_older_checkpoints_of_a_run_are_pruned(run):
    root = run / "checkpoints"
    for name in ("epoch_0001_keep", "epoch_best", "epoch_0009"):
        shutil.copytree(saved(run), root / name)
    (root / "epoch_0000.txt").write_text("notes")
    state = mini(run.parent, num_checkpoint_limit=1)
    state.epoch = 3
    C.save_checkpoint(state)
    left = {path.name for path in root.iterdir()}
    kept = {"epoch_0001_keep", "epoch_best", "epoch_0000.txt"}
    # epoch 9 is of another branch: `held` sets it aside, and no checkpoint is deleted for it
    assert left == kept | {"epoch_0003", "epoch_0009"}


@pytest.mark.parametrize("limit", [1, 2, 3, 10])
def test_as_many_are_kept_as_asked_for(tmp_path, limit):
    state = train_to(mini(tmp_path, num_epochs=5, num_checkpoint_limit=limit), 5)
    assert [epoch for epoch, _ in C.checkpoints(state.folder)] == list(range(1, 6))[-limit:]


# Finding.


def test_a_run_its_name_its_folder_of_checkpoints_and_a_checkpoint_are_found(run, monkeypatch):
    newest, logdir = saved(run), run.parent
    for where in (run, str(run), run / "checkpoints", newest):
        assert C.find_checkpoint(where) == newest
    assert C.find_checkpoint("run", logdir) == newest
    assert C.find_checkpoint("run/checkpoints/epoch_0001", logdir) == saved(run, 1)
    for place, where in ((logdir, "run"), (run, "."), (newest, "."), (run, "checkpoints")):
        monkeypatch.chdir(place)
        found = C.find_checkpoint(where)
        assert found == newest and found.parent.parent == run


def test_latest_is_the_run_that_saved_last_wherever_it_lies(run):
    logdir = run.parent
    deep = train_to(mini(logdir, "a/b/deep", num_epochs=9), 1).folder
    now = os.stat(saved(deep, 1) / STATE).st_mtime_ns
    os.utime(saved(run) / STATE, ns=(now - 10**9, now - 10**9))
    assert C.find_checkpoint("latest", logdir) == saved(deep, 1)
    os.utime(saved(run, 1) / STATE, ns=(now + 10**9, now + 10**9))
    # by time among runs, by number in a run
    assert C.find_checkpoint("latest", logdir) == saved(run, 2)


def test_what_was_set_aside_is_not_the_latest(run):
    aside = run / "abandoned/001/checkpoints"
    aside.mkdir(parents=True)
    shutil.copytree(saved(run), aside / "epoch_0007")
    assert C.find_checkpoint("latest", run.parent) == saved(run)
    assert C.find_checkpoint(run) == saved(run)


def test_where_no_checkpoint_is_and_one_outside_of_a_run(run, tmp_path):
    for where in (tmp_path / "missing", tmp_path, "latest"):
        with pytest.raises(ValueError, match="no checkpoint in .*can be started again"):
            C.find_checkpoint(where, tmp_path / "missing")
    shutil.copytree(saved(run), tmp_path / "copied")
    with pytest.raises(ValueError, match="'.*copied' is a checkpoint outside of a run"):
        C.find_checkpoint(tmp_path / "copied")


# Writing.


def test_everything_comes_back(run):
    before = mini(run.parent)
    state = resume(run)
    assert all(torch.equal(a, b) for a, b in zip(before.params, state.params, strict=True))
    old, new = (s.optimizer.state_dict()["state"] for s in (before, state))
    assert all(torch.equal(old[i][name], new[i][name]) for i in old for name in old[i])
    assert state.method.stats == {"a fox": [1.0]} and (state.epoch, state.folder) == (2, run)


def test_weights_that_are_not_finite_are_named_and_not_saved(tmp_path):
    state = train_to(mini(tmp_path, num_epochs=9, num_checkpoint_limit=1), 1)
    with torch.no_grad():
        state.denoiser.network.bias[0] = float("nan")
    message = r"not finite after optimizer step 0 \('bias' is one of 1 among 2\)"
    with pytest.raises(FloatingPointError, match=message):
        train_to(state, 2)
    assert [epoch for epoch, _ in C.checkpoints(state.folder)] == [1]
    state.denoiser.network = torch.nn.ModuleDict(dict(module=state.denoiser.network))
    with pytest.raises(FloatingPointError, match=r"\('bias' is"):  # as DDP wraps it
        C.check_finite(state)


def test_an_average_that_is_not_finite_is_named(tmp_path):
    state = mini(tmp_path)
    C.check_finite(state)
    state.average.shadow_params[0][0] = float("inf")
    with pytest.raises(FloatingPointError, match="'the average of weight' is one of 1"):
        C.check_finite(state)


def test_a_full_disk_is_told_with_what_there_is(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    state = mini(tmp_path, num_epochs=9)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        message = "no checkpoint of epoch 1 .*No space left on device; make room and start it again"
        with pytest.raises(OSError, match=message):
            train_to(state, 1)
    state.epoch = 1
    C.save_checkpoint(state)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="make room and resume: epoch_0001 is whole"):
        train_to(state, 2)
    assert [path.name for path in (state.folder / "checkpoints").iterdir()] == ["epoch_0001"]


def test_a_checkpoint_written_again_is_never_half_there(run, monkeypatch):
    "The old one is renamed before it is deleted."
    real, seen = shutil.rmtree, []

    def look(path, **options):
        seen.append({path.name for path in (run / "checkpoints").glob("epoch_*")})
        real(path, **options)

    monkeypatch.setattr(C.shutil, "rmtree", look)
    state = mini(run.parent, num_checkpoint_limit=2)
    for state.epoch in (2, 3):
        C.save_checkpoint(state)
    pruned = {"epoch_0002", "epoch_0003"}
    assert seen[-1] == pruned == {path.name for path in (run / "checkpoints").iterdir()}


# Damage: each kind is one line that names the file, and from where to go on.


def cut(share):
    def damage(path):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edited(**fields):
    def damage(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def without(name):
    def damage(path):
        values = json.loads(path.read_text())
        del values[name]
        path.write_text(json.dumps(values))

    return damage


def replaced(old, new):
    def damage(path):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return damage


def remember(path):
    "Let state.json know the file as it is: what is wrong with it is then inside."
    state = path.with_name(STATE)
    values = json.loads(state.read_text())
    values["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    state.write_text(json.dumps(values))


def tensors(change):
    def damage(path):
        values = load_file(path)
        change(values)
        save_file(values, path)
        remember(path)

    return damage


def pickled(change):
    def damage(path):
        values = torch.load(path, weights_only=True)
        torch.save(change(values), path)
        remember(path)

    return damage


def moment(value, name="exp_avg_sq"):
    def change(values):
        values["state"][0][name] = value
        return values

    return pickled(change)


class Hostile:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def hostile(path):
    torch.save(Hostile(), path)
    remember(path)


def written(data):
    def damage(path):
        path.write_bytes(data)
        remember(path)

    return damage


DAMAGED = {
    "no weights": (WEIGHTS, Path.unlink, "is missing"),
    "no optimizer": (OPTIMIZER, Path.unlink, "is missing"),
    "no average": (AVERAGE, Path.unlink, "is missing"),
    "no state": (STATE, Path.unlink, "is missing"),
    "no config": (CONFIG, Path.unlink, "is missing"),
    "empty weights": (WEIGHTS, cut(0), "is damaged: its SHA-256"),
    "half the weights": (WEIGHTS, cut(0.5), "is damaged: its SHA-256"),
    "a bit of the weights": (WEIGHTS, flip_a_bit, "is damaged: its SHA-256"),
    "half the optimizer": (OPTIMIZER, cut(0.5), "is damaged: its SHA-256"),
    "a bit of the average": (AVERAGE, flip_a_bit, "is damaged: its SHA-256"),
    "empty state": (STATE, cut(0), "is not JSON"),
    "half the state": (STATE, cut(0.5), "is not JSON"),
    "binary state": (STATE, lambda path: path.write_bytes(b"\xff\xfe{"), "is not JSON"),
    "a list as state": (STATE, lambda path: path.write_text("[]"), "holds a list"),
    "no memory": (STATE, without("method"), "does not say method"),
    "no epoch": (STATE, without("epoch"), "does not say epoch"),
    "epoch as text": (STATE, edited(epoch="4"), "says that epoch is '4'"),
    "epoch -1": (STATE, edited(epoch=-1), "says that epoch is -1"),
    "epoch true": (STATE, edited(epoch=True), "says that epoch is True"),
    "gain none": (STATE, edited(eval_gain=None), "says that eval_gain is None"),
    "another memory": (STATE, edited(method={}), "holds no memory of Remembers .KeyError"),
    "a memory of words": (STATE, edited(method={"stats": {"a": "b"}}), "ValueError"),
    "files unknown": (STATE, edited(sha256={}), "does not know trained.safetensors"),
    "empty config": (CONFIG, cut(0), ""),
    "half the config": (CONFIG, cut(0.5), ""),
    "an edited config": (CONFIG, replaced("rate: 0.002", "rate: 0.003"), "was changed after"),
    "a config of words": (CONFIG, lambda path: path.write_text("no fields"), "holds a str"),
    "other bytes as weights": (WEIGHTS, written(b"PK\3\4"), "cannot be read"),
    "no bytes as optimizer": (OPTIMIZER, written(b""), "cannot be read .EOFError"),
    "text as optimizer": (OPTIMIZER, written(b"hello"), "cannot be read"),
    "code as optimizer": (OPTIMIZER, hostile, "cannot be read .UnpicklingError"),
    "a list as optimizer": (OPTIMIZER, pickled(lambda _: [1]), "holds no optimizer's state"),
    "a number as average": (AVERAGE, pickled(lambda _: 7), "holds no average"),
    "nan in the weights": (
        WEIGHTS,
        tensors(lambda values: values["0"].fill_(float("nan"))),
        "holds numbers in 0 that are not finite",
    ),
    "nan in the moments": (OPTIMIZER, moment(torch.full((2, 3), float("nan"))), "not finite"),
    "negative moments": (OPTIMIZER, moment(-torch.ones(2, 3)), "a negative second moment"),
    "moments as text": (OPTIMIZER, moment("much"), "moments that are no tensors"),
}


@pytest.mark.parametrize("file, damage, message", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_one_line_with_the_file_and_a_way_on(run, file, damage, message):
    path = saved(run) / file
    damage(path)
    with pytest.raises(ValueError) as caught:
        resume(run)
    line = str(caught.value)
    assert line.startswith(f"{str(path)!r} ") and message in line.replace("(", ".")
    assert line.endswith(
        f"; the newest whole checkpoint before it is --resume_from {saved(run, 1)}"
    )
    assert "\n" not in line and len(line) < 500
    assert mini(run.parent, resume=saved(run, 1), num_epochs=9).epoch == 1


def test_a_way_on_can_be_pasted(tmp_path):
    import shlex

    from ddpo_scratch.run.checkpoint import _advice

    state = mini(tmp_path, name="my run", num_epochs=9)
    train_to(state, 1)
    words = _advice(tmp_path / "my run/checkpoints/epoch_0002").rpartition(" is ")[2]
    assert shlex.split(words) == ["--resume_from", str(saved(tmp_path / "my run", 1))]


def test_advice_passes_over_what_is_damaged_too(run):
    state = resume(run)
    state.epoch = 3
    C.save_checkpoint(state)
    for epoch in (2, 3):
        (saved(run, epoch) / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=f"--resume_from {saved(run, 1)}$"):
        resume(run)
    shutil.rmtree(saved(run, 1))
    with pytest.raises(ValueError, match="epoch_0003.*no whole checkpoint before it: the run must"):
        resume(run)


FOREIGN = {
    "one number each": lambda values: values.update({k: torch.zeros(1) for k in values}),
    "another rank": lambda values: values.update({"0": torch.zeros(4, 3)}),
    "one too few": lambda values: values.pop("1"),
    "one too many": lambda values: values.update({"2": torch.zeros(2)}),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_weights_of_another_model_are_not_copied(run, change):
    tensors(change)(saved(run) / WEIGHTS)
    with pytest.raises(ValueError, match="trained.safetensors' .*resume with the model that"):
        resume(run)


def test_an_optimizer_over_other_parameters_is_refused(run):
    def one_less(values):
        values["param_groups"][0]["params"].pop()
        return values

    path = saved(run) / OPTIMIZER
    pickled(one_less)(path)
    with pytest.raises(ValueError, match="optimizer.pt' is of an optimizer over other parameters"):
        resume(run)


def test_moments_of_another_shape_are_refused(run):
    moment(torch.zeros(1))(saved(run) / OPTIMIZER)
    with pytest.raises(ValueError, match=r"exp_avg_sq is \(1,\), and the model's \(2, 3\)"):
        resume(run)


# Going on, or not.


def read(run):
    return json.loads((saved(run) / STATE).read_text())


def test_the_names_of_the_fields_that_may_not_differ(run):
    old = read_config(saved(run))
    state, values = resume(run), read(run)
    strict = dict(
        seed=1,
        height=64,
        width=64,
        start_from="lora",
        lora_rank=2,
        rollout_dtype="fp16",
        reward_fn="brightness",
    )
    for name, value in strict.items():
        new = dataclasses.replace(old, **{name: value})
        (sentence,) = C.refusals(values, old, new, state.engine)
        assert f"{name} was {getattr(old, name)!r}, now {value!r}" in sentence
    for name, value in dict(eval_judges="", num_epochs=99, save_freq=7, logdir="x").items():
        new = dataclasses.replace(old, **{name: value})
        assert not list(C.refusals(values, old, new, state.engine)), name


def test_a_run_that_is_trained_is_refused_only_with_its_report(run):
    assert resume(run, num_epochs=2).finished
    for text in ("", "[]", '{"epochs": 1}', '{"epochs": "2"}'):
        (run / "report.json").write_text(text)
        assert resume(run, num_epochs=2).finished
    (run / "report.json").write_text('{"epochs": 2}')
    message = "already finished epoch 2 of 2, and its report is written: ask for more"
    with pytest.raises(ValueError, match=message):
        resume(run, num_epochs=2)
    assert not resume(run, num_epochs=3).finished


def test_a_run_that_reached_its_goal_is_refused_only_with_its_report(run):
    old, values, engine = read_config(saved(run)), read(run), mini(run.parent).engine
    goal = dataclasses.replace(old, stop_gain=0.2)
    values["eval_gain"] = 0.25
    old = goal
    assert not list(C.refusals(values, old, goal, engine, reported=1))
    (sentence,) = C.refusals(values, old, goal, engine, reported=2)
    assert sentence.startswith("stopped after epoch 2, where its reward had gained 25.0%")


def test_a_falling_learning_rate_ends_where_it_ended_unless_only_the_report_is_left(run):
    old, values, engine = read_config(saved(run)), read(run), mini(run.parent).engine
    old = dataclasses.replace(old, train_lr_schedule="linear")
    shorter = dataclasses.replace(old, num_epochs=2)
    assert not list(C.refusals(values, old, shorter, engine))
    longer = dataclasses.replace(old, num_epochs=10)
    (sentence,) = C.refusals(values, old, longer, engine)
    assert "num_epochs was 9, now 10" in sentence


def test_processes_are_counted_in_words(run):
    old, values = read_config(saved(run)), read(run)
    engine = mini(run.parent).engine
    (sentence,) = C.refusals(values | dict(world=8), old, old, engine)
    assert sentence.startswith("was trained by 8 processes, and now there is 1: start as many")


def test_a_checkpoint_holds_what_its_state_says(run):
    values = read(run)
    assert values["config_sha256"] == C.config_hash(read_config(saved(run)))
    files = {path.name for path in saved(run).iterdir()}
    assert set(values["sha256"]) == files - {STATE, CONFIG} == {WEIGHTS, OPTIMIZER, AVERAGE}
    assert set(C.COUNTERS) <= set(values) and values["judge_start"] == {}
