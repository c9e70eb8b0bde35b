"Configuration and presets: what is refused, what files hold, and the runs of the literature."

import dataclasses
import enum
import math
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ddpo_scratch.config import (
    Preset,
    TrainConfig,
    check_config,
    config_hash,
    preset,
    preset_names,
    read_config,
    read_fields,
    read_preset,
    suggest_fields,
    write_config,
)
from ddpo_scratch.methods.backprop import k_rule
from ddpo_scratch.named import parse_sum
from ddpo_scratch.prompts import SOURCES, get_prompt_fn
from ddpo_scratch.rewards.base import REWARDS

PRESETS = files("ddpo_scratch") / "presets"
# those of the embedded model follow the literature on a model of their own size
LITERATURE = [
    name
    for name in preset_names()
    if read_preset(name).source != "this book" and not name.startswith("tiny")
]
# what came after DDPO: groups of pictures, and methods that bring their own rules
LATER = [n for n in LITERATURE if preset(n).method_name in ("flow_grpo", "nft", "awm")]
FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}

# ---- the check


@pytest.mark.parametrize(
    "fields,message",
    [
        (
            dict(train_lr_schedule="step"),
            "train_lr_schedule is 'step', allowed are 'constant', 'linear', 'cosine'",
        ),
        (dict(vae_dtype="float16"), "vae_dtype is 'float16', allowed are 'auto', 'fp32', 'fp16'"),
        (dict(rollout_device="cuda"), "rollout_device is 'cuda', allowed are 'auto', 'cpu'"),
        (dict(rollout_dtype="half"), "rollout_dtype is 'half', allowed are 'fp32', 'fp16', 'bf16'"),
        (dict(lora_targets="mlp"), "lora_targets is 'mlp', allowed are 'attention', 'all'"),
        (dict(ema_decay=1.0), "ema_decay is 1, allowed is 0 <= decay < 1"),
        (dict(ema_decay=-0.1), "ema_decay is -0.1, allowed is 0 <= decay < 1"),
        (dict(train_adam_beta2=1.0), "train_adam_beta2 is 1, allowed is 0 <= decay < 1"),
        (dict(rwr_fraction=0.0), "rwr_fraction is 0, allowed is 0 < fraction <= 1"),
        (dict(rwr_fraction=1.5), "rwr_fraction is 1.5, allowed is 0 < fraction <= 1"),
        (dict(decode_batch_size=-1), "decode_batch_size is -1, but must be 0 or more"),
        (dict(kl_weight=-0.5), "kl_weight is -0.5, allowed is a finite number, 0 or more"),
        (
            dict(train_learning_rate=math.nan),
            "train_learning_rate is nan, allowed is 0 <= rate <= 1",
        ),
        (dict(train_max_grad_norm=0.0), "train_max_grad_norm is 0, but must be greater than 0"),
        (dict(train_max_grad_norm=0), "train_max_grad_norm is 0, but must be greater than 0"),
        (dict(lora_rank=0), "lora_rank is 0, allowed is 1 to 2048, the width of the widest layer"),
        (dict(draft_lv_copies=0), "draft_lv_copies is 0, but must be at least 1"),
        (dict(num_epochs="3"), r"num_epochs is '3', but must be a number \(int\)"),
        (dict(num_epochs=2.5), r"num_epochs is 2.5, but must be a number \(int\)"),
        (dict(num_epochs=None), r"num_epochs is None, but must be a number \(int\)"),
        (dict(sample_eta="1"), r"sample_eta is '1', but must be a number \(float\)"),
        (dict(use_lora="yes"), "use_lora is 'yes', but must be true or false"),
        (dict(use_lora=1), "use_lora is 1, but must be true or false"),
        (dict(backprop_steps=3), "backprop_steps is 3, but must be text"),
        (
            dict(log_with="wandb, mlflow"),
            "log_with is 'wandb, mlflow', allowed is wandb, tensorboard, trackio, or several",
        ),
        (dict(push_to_hub=True, hub_model_id="my model"), "hub_model_id is 'my model', allowed is"),
        (
            dict(eval_num_images=0, stop_gain=0.5),
            "stop_gain is 0.5, but eval_freq is 1 and eval_num_images 0",
        ),
        (
            dict(train_batch_size=24),
            r"samples per epoch \(32 x 2 = 64\) must be a multiple of samples per update "
            r"\(24 x 1 = 24\): train_batch_size 16 or 32, or sample_batch_size 24 or 36 would do",
        ),
        (
            dict(train_micro_batch_size=-1),
            "train_micro_batch_size is -1, allowed is a whole number",
        ),
        (
            dict(train_micro_batch_size="some"),
            "train_micro_batch_size is 'some', but must be a num",
        ),
        (
            dict(train_batch_size=3, train_gradient_accumulation_steps=7),
            r"\(3 x 7 = 21\): sample_batch_size 21 or 42 would do",
        ),
        (dict(method="dqn"), "no method called 'dqn'.*ddpo_is"),
        (dict(method="ddpo_is", sample_eta=0.0), "a policy gradient needs noise in every step"),
        (dict(method="rwr", kl_weight=0.1, sample_eta=0.0), "no step has a density to compare"),
        (dict(method="refl", kl_weight=0.1), "refl has no trajectory"),
        (dict(method="alignprop", reward_offload=True), "alignprop asks it in every update"),
        (
            dict(method="alignprop", backprop_steps="normal(0, 5)"),
            r"backprop_steps is 'normal\(0, 5\)'.* mean from 1 to n_steps=20",
        ),
        (dict(method="alignprop", backprop_steps="normal(5)"), r"'normal\(MEAN, STD\)'"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message) as e:
        check_config(TrainConfig(**fields))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("word", ["auto", " auto ", 0])
def test_auto_is_kept_as_a_number(tmp_path, word):
    config = check_config(TrainConfig(train_micro_batch_size=word))
    assert config.train_micro_batch_size == 0 and config.seed == 0
    file = tmp_path / "own.yaml"
    file.write_text(f"train_micro_batch_size: {word}\n")
    assert read_fields(file) == dict(train_micro_batch_size=0)
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    with pytest.raises(ValueError, match="seed is 'auto'"):
        check_config(TrainConfig(seed="auto"))


@pytest.mark.parametrize(
    "batch, parts, drawn, times", [(24, 1, 32, 2), (5, 3, 7, 11), (9, 2, 8, 8)]
)
def test_batch_sizes_that_are_proposed_fit(batch, parts, drawn, times):
    config = TrainConfig(
        train_batch_size=batch,
        train_gradient_accumulation_steps=parts,
        sample_batch_size=drawn,
        sample_num_batches_per_epoch=times,
    )
    with pytest.raises(ValueError, match="would do") as error:
        check_config(config)
    found = re.findall(r"(\w+_batch_size) (\d+)(?: or (\d+))?", str(error.value).split("): ")[-1])
    assert found
    for name, *sizes in found:
        for size in filter(None, sizes):
            check_config(dataclasses.replace(config, **{name: int(size)}))


FLOATS = [name for name, f in FIELDS.items() if isinstance(f.default, float)]
INTS = [name for name, f in FIELDS.items() if type(f.default) is int]
TEXTS = [name for name, f in FIELDS.items() if isinstance(f.default, str)]
LIMITS = ["train_max_grad_norm", "train_adv_clip_max"]  # infinity limits nothing


def refused(name, value):
    "Return the sentence with which a value is refused; None where it is taken."
    try:
        check_config(TrainConfig(**{name: value}))
    except ValueError as e:
        assert "\n" not in str(e) and len(str(e)) < 400
        assert name in str(e)
        return str(e)


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite_where_infinity_means_nothing(name):
    assert refused(name, math.nan) and refused(name, -math.inf)
    assert bool(refused(name, math.inf)) == (name not in LIMITS)
    assert refused(name, 10**400)


@pytest.mark.parametrize("name", INTS)
def test_whole_numbers_have_two_ends(name):
    for value in (10**30, -(10**30), 1.5, math.inf, math.nan):
        assert refused(name, value)


ANYTHING = [None, [], ["a"], {}, {"a": 1}, b"a", object(), 3, 2.5, np.zeros(2), ()]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", ANYTHING, ids=[type(v).__name__ + str(v)[:9] for v in ANYTHING])
def test_text_is_text(name, value):
    assert refused(name, value)


LETTERS = "a" * 300
REFUSED = [
    *[("run_name", v) for v in ("../../x", "/tmp/x", "a/b", "a\\b", "..", ".", " ", " a", "a ")],
    *[
        ("run_name", v)
        for v in ("a\nb", "a\0b", "a\x1b[0m", "\u2028", LETTERS, "🦊" * 60, "\udcff")
    ],
    *[("logdir", v) for v in ("", " ", "a\nb", "a\0b")],
    *[(name, v) for name in ("resume_from", "start_from") for v in (" ", "a\0b", "a\nb")],
    *[("lora_alpha", 0), ("lora_alpha", -1), ("lora_rank", 100_000), ("lora_rank", 2049)],
    *[("seed", v) for v in (99999999999999999999999999, 2**70, 2**63, -(2**63) - 1)],
    *[("train_learning_rate", v) for v in (1e38, 1e4, 1.5)],
    *[("train_adam_weight_decay", v) for v in (1e38, 500.0)],
    *[("train_adam_epsilon", 0.0), ("train_adam_epsilon", -1.0)],
    *[("sample_num_steps", 1001), ("height", -8), ("width", -8)],
    *[(name, v) for name in ("method", "model", "reward_fn", "prompt_fn") for v in ("", " ")],
    *[("hub_model_id", v) for v in ("a", "a/b/c", "a b/c", "a/b\n")],
    *[("log_with", v) for v in ("all", "false", "wandb tensorboard", "wandb;trackio")],
    *[("tracker_project_name", v) for v in ("", " ")],
]
TAKEN = [
    *[("run_name", v) for v in ("", "007", "2026-01-01", "a run, of foxes", "🦊" * 50, "..a", "é")],
    *[("logdir", v) for v in ("runs", "/tmp/x", "../x", "a b")],
    *[("lora_alpha", 1), ("lora_rank", 2048), ("seed", -(2**63)), ("seed", 2**63 - 1)],
    *[("train_learning_rate", 0.0), ("train_learning_rate", 1.0), ("train_adam_epsilon", 1e-30)],
    *[("log_with", v) for v in ("", "wandb", "wandb, trackio,tensorboard", ",")],
    *[("hub_model_id", v) for v in ("", "me/my-model.v2")],
    *[("height", 64), ("sample_num_steps", 1000), ("eval_judges", ""), ("start_from", "a/b c")],
]


@pytest.mark.parametrize("name, value", REFUSED, ids=[f"{n}={v!a:.20}" for n, v in REFUSED])
def test_a_value_that_would_go_wrong_later_is_refused_now(name, value):
    assert refused(name, value)


@pytest.mark.parametrize("name, value", TAKEN, ids=[f"{n}={v!a:.20}" for n, v in TAKEN])
def test_a_value_that_works_is_taken_and_kept(tmp_path, name, value):
    config = check_config(TrainConfig(**{name: value}))
    assert getattr(config, name) == value
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


def test_a_home_folder_is_written_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = dict(logdir="~/runs", resume_from="~", start_from="~/a", model="~/m")
    config = TrainConfig(**fields, run_name="~")
    home = str(tmp_path)
    assert [getattr(config, name) for name in fields] == [
        f"{home}/runs",
        home,
        f"{home}/a",
        f"{home}/m",
    ]
    assert config.run_name == "~"


class Word(str, enum.Enum):
    FOX = "fox"


@pytest.mark.parametrize(
    "name, given, kept",
    [
        ("train_learning_rate", np.float64(1e-4), 1e-4),
        ("train_learning_rate", np.float32(0.5), 0.5),
        ("train_learning_rate", 1, 1.0),
        ("train_learning_rate", np.int64(1), 1.0),
        ("train_learning_rate", torch.tensor(0.5), 0.5),
        ("seed", np.int64(3), 3),
        ("seed", np.array(3), 3),
        ("use_lora", np.bool_(False), False),
        ("reward_fn", np.str_("redness"), "redness"),
        ("reward_fn", Word.FOX, "fox"),
        ("logdir", Path("a") / "b", str(Path("a") / "b")),
        ("resume_from", Path("a"), "a"),
        ("model", Path("a"), "a"),
    ],
)
def test_relatives_of_text_and_numbers_become_pythons_own(tmp_path, name, given, kept):
    config = check_config(TrainConfig(**{name: given}))
    value = getattr(config, name)
    assert type(value) is type(kept) and value == kept
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert config_hash(config) == config_hash(read_config(tmp_path))
    assert dataclasses.replace(TrainConfig(), **{name: given}) == config


def test_a_bad_value_of_a_notebook_is_told_in_a_line():
    for given in (np.zeros(3), torch.zeros(2), 1 + 2j, np.datetime64("2026-01-01")):
        assert refused("train_learning_rate", given) and refused("seed", given)
    assert refused("use_lora", np.zeros(2))


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ValueError) as e:
        check_config(TrainConfig(num_epochs=0, mixed_precision="int8", kl_weight=-1.0))
    names = [sentence.split(" is ")[0] for sentence in str(e.value).split("; ")]
    assert names == ["num_epochs", "kl_weight", "mixed_precision"]
    with pytest.raises(ValueError, match="stop_gain is.*; samples per epoch.*; sample_eta is 0"):
        check_config(TrainConfig(stop_gain=1.0, eval_freq=0, train_batch_size=24, sample_eta=0.0))


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if not isinstance(f.default, bool)])
def test_a_switch_is_neither_a_number_nor_text(name):
    with pytest.raises(ValueError, match=f"{name} is True, (but must be|allowed)"):
        check_config(TrainConfig(**{name: True}))


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(log_with="wandb,tensorboard, trackio"),
        dict(hub_model_id="me/my-model.v2", push_to_hub=True),
        dict(train_learning_rate=1),
        dict(train_max_grad_norm=math.inf),
        dict(ema_decay=0.999),
        dict(rwr_fraction=1.0),
        dict(stop_gain=0.0, eval_freq=0),
        dict(method="refl", sample_eta=0.0),
    ],
)
def test_what_is_allowed_passes(fields):
    config = TrainConfig(**fields)
    assert check_config(config) is config


def test_what_follows_from_the_fields():
    c = TrainConfig(sample_batch_size=6, sample_num_batches_per_epoch=4, train_batch_size=3)
    assert (c.samples_per_epoch, c.samples_per_update, c.updates_per_epoch) == (24, 3, 8)
    assert dataclasses.replace(c, train_num_inner_epochs=5).updates_per_epoch == 40
    fractions = (0.02, 0.021, 0.14)
    steps = {f: TrainConfig(sample_num_steps=50, train_timestep_fraction=f) for f in fractions}
    assert [c.steps_per_sample for c in steps.values()] == [1, 2, 7]


def test_a_stop_needs_looks_only_where_it_was_asked_for():
    for off in (dict(eval_num_images=0), dict(eval_freq=0)):
        assert check_config(TrainConfig(**off)).goal == 0
        with pytest.raises(ValueError, match="stop_gain is 0.5, but .*: stopping needs both"):
            check_config(TrainConfig(stop_gain=0.5, **off))
        assert check_config(TrainConfig(stop_gain=0.0, **off)).goal == 0
    assert TrainConfig().goal == TrainConfig.stop_gain > 0


def test_a_record_shows_what_is_not_the_default():
    assert repr(TrainConfig()) == "TrainConfig()" and not TrainConfig().changed
    config = TrainConfig(num_epochs=3, reward_fn="<b>", seed=np.zeros(2))
    assert list(config.changed) == ["reward_fn", "seed", "num_epochs"]
    assert repr(TrainConfig(num_epochs=3)) == "TrainConfig(num_epochs=3)"
    assert eval(repr(TrainConfig(num_epochs=3, kl_weight=0.5))).kl_weight == 0.5
    page = config._repr_html_()
    assert page.count("<tr>") == 4 and "&lt;b&gt;" in page and "<b>" not in page
    assert "default" in TrainConfig()._repr_html_()


def test_importing_the_room_does_not_import_pydantic_or_yaml():
    code = "import ddpo_scratch.config, sys; print({'pydantic', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "name, fields",
    [
        ("lr", ["train_learning_rate"]),
        ("learning_rate", ["train_learning_rate"]),
        ("sample.num_steps", ["sample_num_steps"]),
        ("train.adam-beta1", ["train_adam_beta1"]),
        ("adam_beta1", ["train_adam_beta1"]),
        ("num_inference_steps", ["sample_num_steps"]),
        ("pretrained_model_name_or_path", ["model"]),
        ("resolution", ["height", "width"]),
        ("batch_size", ["sample_batch_size", "train_batch_size"]),
        ("rank", ["lora_rank"]),
        ("output_dir", ["logdir"]),
        ("report_to", ["log_with"]),
        ("num_epoch", ["num_epochs"]),
        ("rewrd_fn", ["reward_fn"]),
        ("epochs", ["num_epochs"]),
        ("gradient_accumulation_steps", ["train_gradient_accumulation_steps"]),
        ("a", []),
        (1, []),
        ("", []),
        ("fox", []),
        ("snr_gamma", []),
        ("resume_from_checkpoint", ["resume_from"]),
    ],
)
def test_what_somebody_may_have_meant(name, fields):
    assert suggest_fields(name) == fields


def test_no_field_is_another_projects_name_for_another_field():
    from ddpo_scratch.config import _FOREIGN

    assert set(_FOREIGN) <= set(FIELDS)
    assert not {word for words in _FOREIGN.values() for word in words.split()} & set(FIELDS)


# ---- files


def test_the_fields_type_decides_what_a_word_means(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "train_learning_rate: 1e-3\nnum_epochs: 5\nuse_lora: no\nkl_weight: 0\n"
        "mixed_precision: no\nbackprop_steps: 3\nrun_name: 007\nresume_from:\n"
    )
    assert yaml.safe_load("[1e-3, no, 007]") == ["1e-3", False, 7]  # YAML's own guesses
    fields = read_fields(path)
    assert fields == dict(
        train_learning_rate=1e-3,
        num_epochs=5,
        use_lora=False,
        kl_weight=0.0,
        mixed_precision="no",
        backprop_steps="3",
        run_name="007",
        resume_from="",
    )
    assert all(type(value) is type(FIELDS[name].default) for name, value in fields.items())
    check_config(TrainConfig(**fields))


@pytest.mark.parametrize(
    "text,message",
    [
        ("num_epoch: 3", "unknown field 'num_epoch': did you mean num_epochs"),
        ("- a", "holds a list"),
        ("just words", "holds a str"),
        ("a: [", "is not YAML"),
        ("num_epochs: many", r"num_epochs is 'many', but must be a number \(int\)"),
        ("num_epochs: 0", "num_epochs is '0', but must be at least 1"),
        ("num_epochs: true", r"num_epochs is 'true', but must be a number \(int\)"),
        ("use_lora: perhaps", "use_lora is 'perhaps', but must be true or false"),
        ("num_epochs: [1]", r"num_epochs is \['1'\], but must be a number"),
        ("config: 3", "config is '3', but must be fields with their values"),
        (
            "inherits: tiny\nnum_epochs: 3",
            "unknown field 'num_epochs': fields stand under 'config'",
        ),
        ("inherit: tiny\nconfig: {}", "unknown field 'inherit': did you mean inherits"),
        ("config:\n  num_epoch: 3", "unknown field 'num_epoch': did you mean num_epochs"),
        ("lr: 1e-4", "unknown field 'lr': did you mean train_learning_rate?"),
        ("sample:\n  num_steps: 5", "unknown field 'sample': did you mean sample_num_steps?"),
        ("1: 2", "unknown field '1': fields are method, model"),
        ("a: 2", "unknown field 'a': fields are method, model"),
        ("preset: tiny\nconfig: {}", "beside 'config' the preset is named by 'inherits'"),
        ("preset: [a]", r"preset is \['a'\], but must be one name"),
        ("seed: 1\nseed: 2", "'seed' stands twice"),
        ("config:\n  seed: 1\n  seed: 2", "'seed' stands twice"),
        ("? [a]\n: b", "is not YAML"),
        ("a: 1\n--- \nb: 2", "is not YAML"),
        ("run_name: " + "[" * 3000, "nested too deep"),
        ("run_name: " + "[" * 300 + "]" * 300, "run_name is .*, allowed is one folder's name"),
        ("log_with: 3", "log_with is '3', allowed is wandb, tensorboard, trackio"),
        ("log_with: {a: b}", "log_with is .*, allowed is wandb"),
        ("hub_model_id: 3", "hub_model_id is '3', allowed is 'owner/name'"),
        ("logdir: [a]", r"logdir is \['a'\], allowed is a folder's path"),
        ("resume_from: {}", "resume_from is {}, allowed is a path"),
        ("reward_fn: {aesthetic: 1}", "reward_fn is .*, allowed is text such as 'aesthetic"),
        ("prompt_fn: [a fox]", r"prompt_fn is \['a fox'\], allowed is text such as"),
        ("run_name: ../x", "run_name is '../x', allowed is one folder's name"),
        ("train_learning_rate: .inf", "train_learning_rate is 'inf', allowed is 0 <= rate <= 1"),
        ("kl_weight: .nan", "kl_weight is '.nan', but must be a number"),
        ("num_epochs: ~", "num_epochs is '', but must be a number"),
        ("per_prompt_stat_tracking: {buffer_size: 16}", "per_prompt_stat_tracking is .* true or"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"own.yaml.*{message}") as e:
        read_fields(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, field, value",
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: 2026-01-01", "run_name", "2026-01-01"),
        ("run_name: null", "run_name", ""),
        ("run_name: ~", "run_name", ""),
        ("run_name:", "run_name", ""),
        ("run_name: 'null'", "run_name", "null"),
        ("log_with: false", "log_with", ""),
        ("log_with: none", "log_with", ""),
        ("log_with: [wandb, tensorboard]", "log_with", "wandb, tensorboard"),
        ("log_with: []", "log_with", ""),
        ("eval_judges: [redness]", "eval_judges", "redness"),
        ("train_max_grad_norm: .inf", "train_max_grad_norm", math.inf),
        ("num_epochs: 5 # a comment", "num_epochs", 5),
        ("use_lora: off", "use_lora", False),
        ("negative_prompts: blurry, über", "negative_prompts", "blurry, über"),
        ("resume_from: 3", "resume_from", "3"),
        ("\ufeffseed: 3", "seed", 3),
    ],
)
def test_what_files_of_other_projects_hold_is_read(tmp_path, text, field, value):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_fields(path) == {field: value}
    check_config(TrainConfig(**read_fields(path)))


def test_a_file_is_utf_8_whatever_the_locale_says(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes("negative_prompts: über\n".encode("latin-1"))
    with pytest.raises(ValueError, match="own.yaml' is not text in UTF-8"):
        read_fields(path)
    write_config(TrainConfig(negative_prompts="über 🦊"), tmp_path)
    code = (
        f"from ddpo_scratch.config import read_config; print(ascii(read_config({str(tmp_path)!r})))"
    )
    environment = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PATH="")
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert r"\xfcber \U0001f98a" in printed.stdout


def test_a_bomb_of_aliases_is_told_in_a_line(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    path = tmp_path / "own.yaml"
    path.write_text("\n".join(lines) + "\nseed: *a11\n")
    with pytest.raises(ValueError, match="unknown field 'a0'"):
        read_fields(path)
    path.write_text("\n".join(lines).replace("a0:", "seed:", 1))
    with pytest.raises(ValueError) as e:
        read_fields(path)
    assert len(str(e.value)) < 500


def test_files_that_name_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, more in (("preset", ""), ("inherits", "config: {}\n")):
        Path("a.yaml").write_text(f"{key}: b.yaml\n{more}")
        Path("b.yaml").write_text(f"{key}: a.yaml\n{more}")
        with pytest.raises(ValueError, match="'a.yaml' (names itself|inherits from itself)"):
            preset("a.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file .*none.yaml"):
        read_fields(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="no file .*none.yaml"):
        preset(tmp_path / "none.yaml")


def test_an_empty_file_holds_no_fields(tmp_path):
    (tmp_path / "own.yaml").write_text("# nothing yet\n")
    assert read_fields(tmp_path / "own.yaml") == {}
    assert preset(tmp_path / "own.yaml") == TrainConfig()


ODD = TrainConfig(
    run_name="007",
    negative_prompts="no\nyes: 1 # not a comment",
    tracker_project_name=" true",
    hub_model_id="1/2",
    train_max_grad_norm=math.inf,
    train_learning_rate=1e-30,
    seed=-(2**40),
)


@pytest.mark.parametrize("config", [ODD, *map(preset, preset_names())])
def test_a_configuration_reads_back(tmp_path, config):
    write_config(config, tmp_path)
    again = read_config(tmp_path)
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert repr(again) == repr(config)  # 5 and 5.0 are told apart
    assert read_config(tmp_path, seed=9) == dataclasses.replace(config, seed=9)
    assert preset(tmp_path / "config.yaml", world=2) == config  # a run's numbers are per process


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_in_a_runs_file_is_damage(tmp_path, name):
    write_config(TrainConfig(), tmp_path)
    path = tmp_path / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{name}:")]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"config.yaml' lacks {name}: a run writes every field"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "seed: 3"])
def test_an_empty_file_of_a_run_is_damage_and_no_default(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml' lacks method, model, height and \d+ more"):
        read_config(tmp_path)


def test_the_hash_tells_that_a_number_was_changed(tmp_path):
    write_config(ODD, tmp_path)
    path = tmp_path / "config.yaml"
    assert config_hash(read_config(tmp_path)) == config_hash(ODD)
    path.write_text("# a comment is no change\n" + path.read_text())
    assert config_hash(read_config(tmp_path)) == config_hash(ODD)
    path.write_text(path.read_text().replace("kl_weight: 0.0", "kl_weight: 0.1"))
    assert config_hash(read_config(tmp_path)) != config_hash(ODD)
    assert re.fullmatch("[0-9a-f]{64}", config_hash(ODD))


def test_a_configuration_that_cannot_be_written_leaves_the_one_before(tmp_path):
    write_config(ODD, tmp_path)
    with pytest.raises(Exception, match="represent"):
        write_config(TrainConfig(seed=object()), tmp_path)
    assert read_config(tmp_path) == ODD
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


# ---- presets


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_file_to_be_copied(tmp_path, name):
    path = tmp_path / "own.yaml"
    p = read_preset(name)
    assert p.source and isinstance(p, Preset)
    fields = "".join(f"  {k}: {v}\n" for k, v in p.config.items() if k != "prompt_fn")
    prompts = p.config.get("prompt_fn", TrainConfig.prompt_fn)
    path.write_text(f'source: a copy\nconfig:\n  prompt_fn: "{prompts}"\n{fields}')
    for world in (1, 2, 4, 8):
        try:
            expected = preset(name, world=world)
        except ValueError as e:
            with pytest.raises(ValueError) as copied:
                preset(path, world=world)
            assert str(copied.value).split(":", 1)[1] == str(e).split(":", 1)[1]
        else:
            assert preset(path, world=world) == expected


@pytest.mark.parametrize("name", preset_names())
def test_a_heir_takes_what_it_does_not_say(tmp_path, name):
    path = tmp_path / "own.yaml"
    path.write_text(f"inherits: {name}\ndevices: 3\nconfig:\n  seed: 77\n")
    own, parent = read_preset(path), read_preset(name)
    assert (own.devices, own.inherits) == (3, name)
    assert (own.source, own.kept, own.differs) == (parent.source, parent.kept, parent.differs)
    assert own.config == parent.config | dict(seed=77)
    if parent.inherits:
        before = preset(parent.inherits)
        changed = {k for k in FIELDS if getattr(before, k) != getattr(preset(name), k)}
        assert changed <= set(read_fields(PRESETS / f"{name}.yaml"))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_passes_the_check(name):
    check_config(preset(name))


@pytest.mark.parametrize("name", LITERATURE)
def test_a_preset_of_the_literature_says_what_it_keeps_and_what_not(name):
    p = read_preset(name)
    assert p.kept and p.differs and p.source != "this book"


@pytest.mark.parametrize("name", [name for name in LITERATURE if name not in LATER])
def test_presets_before_flow_models_share_their_habits(name):
    c = preset(name)
    # measured for the embedded model alone: early stops, prompts in groups, wide clip ranges
    assert (c.stop_gain, c.sample_images_per_prompt, c.train_clip_range) == (0.0, 1, 1e-4)
    assert c.sample_guidance_scale == c.eval_guidance_scale  # they look as they sample
    assert c.sample_num_steps == 50


@pytest.mark.parametrize("name", LATER)
def test_presets_of_flow_models_compare_groups_and_look_by_the_ode(name):
    c = preset(name)
    assert c.stop_gain == 0.0 and c.sample_images_per_prompt >= 12
    assert c.sample_guidance_scale == c.eval_guidance_scale
    assert c.samples_per_epoch % c.sample_images_per_prompt == 0
    # Stable Diffusion 1.4 looks as it samples
    assert c.look_eta == (1.0 if name == "dance_grpo_sd14" else 0.0)


def test_the_embedded_models_preset_is_the_default():
    assert preset("tiny") == TrainConfig()


# What a preset's `kept` says in words, held against its numbers.
CLAIMS = [
    (r"advantage clip (\d+)", lambda c: c.train_adv_clip_max),
    (r"guidance ([\d.]+)", lambda c: c.sample_guidance_scale),
    (r"\beta (\d)", lambda c: c.sample_eta),
    (r"(\d+) pictures an update", lambda c: c.samples_per_update),
    (r"of (\d+) pictures", lambda c: c.samples_per_update),
    (r"(\d+) updates an epoch", lambda c: c.updates_per_epoch),
    (r"^(\d+) updates$", lambda c: c.updates_per_epoch),
    (r"passes of (\d+) updates", lambda c: c.updates_per_epoch / c.train_num_inner_epochs),
    (r"(\d+) passes of", lambda c: c.train_num_inner_epochs),
    (r"(?:buffer (\d+)|(\d+) remembered)", lambda c: c.per_prompt_stat_tracking_buffer_size),
    (r"at least (\d+)", lambda c: c.per_prompt_stat_tracking_min_count),
    (r"softmax\(([\d.]+) r\)", lambda c: c.rwr_beta),
    (r"about ([\d.]+)k rewards", lambda c: round(c.samples_per_epoch * c.num_epochs / 1e3, 1)),
    (r"loss times ([\d.]+)", lambda c: float(c.reward_fn.split("*")[0])),
    (r"(\d+) (?:common|bare) animals", lambda c: len(get_prompt_fn(c.prompt_fn).prompts)),
    (r"(\d+) groups of", lambda c: c.samples_per_epoch / c.sample_images_per_prompt),
    (r"of (\d+) groups,", lambda c: c.samples_per_epoch / c.sample_images_per_prompt),
    (r"^(\d+) epochs", lambda c: c.num_epochs),
    (r"every (\d+) epochs", lambda c: c.method_class.options_of(c).window_epochs),
    (r"groups of (\d+)", lambda c: c.sample_images_per_prompt),
    (r"noise (?:level of )?([\d.]+)", lambda c: c.method_class.options_of(c).noise_level),
    (r"Flow-SDE at ([\d.]+)", lambda c: c.method_class.options_of(c).noise_level),
    (r"penalty of ([\de.-]+) to", lambda c: c.kl_weight),
    (r"^beta ([\d.]+);", lambda c: c.method_class.options_of(c).beta),
    (r"(\d+) of \d+ steps", lambda c: c.steps_per_sample),
    (r"(\d+) steps", lambda c: c.sample_num_steps),
    (r"(\d+) for the pictures that are compared", lambda c: c.look_steps),
    (r"pictures of (\d+) pixels", lambda c: c.height),
    (r"(\d+) ImageNet animals", lambda c: len(get_prompt_fn(c.prompt_fn).prompts)),
]


@pytest.mark.parametrize("pattern,number", CLAIMS, ids=[pattern for pattern, _ in CLAIMS])
def test_the_numbers_are_those_of_the_words(pattern, number):
    checked = 0
    for name in LITERATURE:
        found = [m for sentence in read_preset(name).kept if (m := re.search(pattern, sentence))]
        for match in found:
            words = [group for group in match.groups() if group]
            assert float(words[0]) == number(preset(name)), f"{name}: {match[0]}"
            checked += 1
    assert checked


@pytest.mark.parametrize("name", LITERATURE)
def test_a_preset_can_run_on_as_many_devices_as_its_source_did(name):
    devices = read_preset(name).devices
    if devices:
        c = check_config(preset(name, world=devices))
        for sentence in read_preset(name).kept:
            if match := re.search(r"(\d+) GPUs x (\d+) x (\d+)", sentence):
                shape = (devices, c.train_batch_size, c.train_gradient_accumulation_steps)
                assert shape == tuple(map(int, match.groups()))


def test_numbers_that_the_papers_state():
    "DDPO's Appendix D.5 and AlignProp's section 4, each once."
    for name in ("ddpo_paper_is", "ddpo_paper_sf", "ddpo_paper_rwr", "ddpo_paper_rwr_sparse"):
        c = preset(name)
        assert (c.train_learning_rate, c.train_adam_weight_decay) == (1e-5, 1e-4)
        assert (c.train_adam_beta1, c.train_adam_beta2, c.train_adam_epsilon) == (0.9, 0.999, 1e-8)
        assert (c.train_max_grad_norm, c.sample_eta, c.use_lora) == (1.0, 1.0, False)
    is_, sf, rwr = (preset(f"ddpo_paper_{m}") for m in ("is", "sf", "rwr"))
    assert (is_.samples_per_epoch, is_.samples_per_update, is_.updates_per_epoch) == (256, 64, 4)
    assert (sf.samples_per_epoch, sf.updates_per_epoch) == (256, 1)
    assert (rwr.samples_per_epoch, rwr.samples_per_update, rwr.steps_per_sample) == (10240, 128, 1)
    for name in (n for n in LITERATURE if "alignprop" in n):
        assert preset(name).train_learning_rate == 1e-3 and preset(name).samples_per_update == 128


def test_numbers_that_the_scripts_of_dance_grpo_and_mix_grpo_state():
    "Counted by their code: 12 pictures on each GPU, and an update after so many of them."
    published = {"dance_grpo_flux": (16, 4, 3), "mix_grpo_flux": (32, 3, 4)}
    for name, (gpus, accumulation, updates) in published.items():
        c = preset(name, world=gpus)
        assert (c.samples_per_epoch, c.samples_per_update) == (12, accumulation)
        # max_train_steps counts rollouts
        assert (c.updates_per_epoch, c.num_epochs) == (updates, 300)
    dance, mix = map(preset, published)
    # timestep_fraction 0.6 is of the 15 steps before the last, rounded down
    assert (dance.steps_per_sample, dance.sample_num_steps, dance.seed) == (9, 16, 42)
    assert (mix.steps_per_sample, mix.sample_num_steps, mix.seed) == (4, 25, 714)
    # iters_per_group counts rollouts as well; multi_reward is HPS, ImageReward and PickScore
    assert mix.method_class.options_of(mix).window_epochs == 25
    names = {part.partition("(")[0] for _, part, _ in parse_sum(mix.reward_fn, "", "")}
    assert names == {"hpsv2", "imagereward", "pickscore"}


def test_how_deep_alignprop_goes():
    def rule(name):
        c = preset(name)
        return k_rule(c.backprop_steps, c.sample_num_steps)

    assert {rule("alignprop_aesthetic"), rule("alignprop_hps"), rule("trl_alignprop")} == {(1, 50)}
    assert {rule("alignprop_aesthetic_k1"), rule("alignprop_hps_k1")} == {(1, 1)}
    # 50 - N(42, 5) is N(8, 5)
    assert rule("alignprop_later_aesthetic") == rule("alignprop_later_hps") == ("normal", 8, 5)


@pytest.mark.parametrize("name", preset_names())
def test_reward_and_prompts_of_a_preset_are_known(name):
    c = preset(name)
    for _, part, _ in parse_sum(c.reward_fn, "reward_fn", "a + b"):
        assert part in REWARDS
    if c.prompt_fn.endswith((".txt", ".jsonl")):
        # a preset of the book says so in its comment
        said = [*read_preset(name).differs, (PRESETS / f"{name}.yaml").read_text()]
        assert any("to be put beside the run" in text or "of your own" in text for text in said)
    else:
        assert c.prompt_fn.split("(")[0] in SOURCES
        if not c.prompt_fn.startswith("pick_a_pic"):  # a download
            assert callable(get_prompt_fn(c.prompt_fn))


def test_prompts_of_two_sources():
    assert "fox" not in get_prompt_fn(preset("trl_ddpo").prompt_fn).prompts
    assert get_prompt_fn(preset("counting").prompt_fn).prompts[:2] == ["two cats", "three cats"]


# ---- several processes


@pytest.mark.parametrize(
    "name,world,batches,accumulation",
    [
        ("ddpo_pytorch_compressibility", 8, (8, 4), (4, 2)),
        ("ddpo_pytorch_aesthetic", 8, (8, 4), (4, 4)),
        ("ddpo_pytorch_alignment", 6, (8, 6), (4, 6)),
        ("alignprop_aesthetic", 4, (8, 4), (8, 4)),
        ("drlx_pickapic", 4, (32, 2), (4, 1)),
        ("blog", 2, (32, 2), (2, 1)),
        ("tiny", 2, (32, 1), (2, 1)),
    ],
)
def test_processes_share_the_global_numbers_as_their_source_did(name, world, batches, accumulation):
    c = check_config(preset(name, world=world))
    assert (c.sample_batch_size, c.sample_num_batches_per_epoch) == batches
    assert (c.train_batch_size, c.train_gradient_accumulation_steps) == accumulation
    one = preset(name)
    assert c.samples_per_epoch * world == one.samples_per_epoch
    assert c.samples_per_update * world == one.samples_per_update
    assert c.updates_per_epoch == one.updates_per_epoch


def test_what_cannot_be_shared_out_is_named():
    message = "train_batch_size x train_gradient_accumulation_steps = 3 x 1 = 3 cannot be shared"
    with pytest.raises(ValueError, match=f"{message} out among 2 processes"):
        preset("trl_ddpo", world=2)
    c = preset("trl_ddpo", world=2, train_batch_size=3, train_gradient_accumulation_steps=1)
    assert c.samples_per_update == 3 and c.samples_per_epoch == 12
    with pytest.raises(ValueError, match="world is 0"):
        preset("tiny", world=0)


def test_flat_fields_are_of_one_process_and_a_presets_of_all(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("preset: tiny\nsample_num_batches_per_epoch: 4\n")
    assert preset(path, world=2).samples_per_epoch == 32 * 4
    assert preset(path, world=2) == preset("tiny", world=2, sample_num_batches_per_epoch=4)
    path.write_text("inherits: tiny\nconfig:\n  sample_num_batches_per_epoch: 4\n")
    assert preset(path, world=2).samples_per_epoch == 32 * 2
    assert preset(path, sample_num_batches_per_epoch=8).samples_per_epoch == 32 * 8


def test_unknown_presets_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="unknown preset 'tinny': did you mean tiny .*of .*tiny_sf"
    ):
        preset("tinny")
    with pytest.raises(ValueError, match="unknown field 'lr': did you mean train_learning_rate"):
        preset("tiny", lr=1e-3)
    with pytest.raises(ValueError, match="unknown field 'fox'$"):
        preset("tiny", fox=1)
    (tmp_path / "own.yaml").write_text("inherits: tinny\nconfig: {}\n")
    with pytest.raises(ValueError, match="unknown preset 'tinny'"):
        preset(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    "text, judges",
    [
        ("f(a=1, b=[2, 3]), redness", ["f(a=1, b=[2, 3])", "redness"]),
        ("f({'a': [1, (2, 3)]}, 4),g", ["f({'a': [1, (2, 3)]}, 4)", "g"]),
        ("f('a, b)'), g(\"it's, (\")", ["f('a, b)')", 'g("it\'s, (")']),
        ("f(a, b", ["f(a, b"]),
        ("a), b", ["a)", "b"]),
        ("it's, b", ["it's", "b"]),
    ],
)
def test_only_commas_between_judges_part_them(text, judges):
    assert TrainConfig(eval_judges=text).judges == judges


def test_more_than_are_remembered_cannot_be_asked_for():
    few = dict(per_prompt_stat_tracking_buffer_size=8, per_prompt_stat_tracking_min_count=20)
    with pytest.raises(ValueError, match="min_count is 20, but .*keeps 8 rewards .* at most 8"):
        check_config(TrainConfig(**few))
    off = TrainConfig(**few, per_prompt_stat_tracking=False)
    assert check_config(off).method_class(off, (4, 8, 8))
    few["per_prompt_stat_tracking_min_count"] = 8
    assert check_config(TrainConfig(**few))


def test_commas_in_brackets_do_not_part_judges():
    config = TrainConfig(eval_judges="tiny_animal, my.module:judge(1, 2),brightness,")
    assert config.judges == ["tiny_animal", "my.module:judge(1, 2)", "brightness"]
    assert TrainConfig().judges == ["auto"] and TrainConfig(eval_judges="").judges == []
