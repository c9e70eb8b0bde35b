"Configuration and presets: what is refused, what files hold, and the runs of the literature."

import dataclasses
import math
import re
from importlib.resources import files

import pytest
import yaml

from ddpo_scratch.config import (
    Preset,
    TrainConfig,
    check_config,
    preset,
    preset_names,
    read_config,
    read_fields,
    read_preset,
    write_config,
)
from ddpo_scratch.methods.backprop import k_rule
from ddpo_scratch.prompts import SOURCES, get_prompt_fn
from ddpo_scratch.rewards.base import REWARDS

PRESETS = files("ddpo_scratch") / "presets"
LITERATURE = [name for name in preset_names() if not name.startswith("tiny")]
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
        (dict(kl_weight=-0.5), "kl_weight is -0.5, but must be 0 or more"),
        (dict(train_learning_rate=math.nan), "train_learning_rate is nan, but must be 0 or more"),
        (dict(train_max_grad_norm=0.0), "train_max_grad_norm is 0, but must be greater than 0"),
        (dict(train_max_grad_norm=0), "train_max_grad_norm is 0, but must be greater than 0"),
        (dict(lora_rank=0), "lora_rank is 0, but must be at least 1"),
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
        (dict(eval_num_images=0), "stop_gain is 0.25, but eval_freq is 3 and eval_num_images 0"),
        (
            dict(train_batch_size=24),
            r"samples per epoch \(32 x 2 = 64\) must be a multiple of samples per update \(24 x 1",
        ),
        (dict(method="dpo"), "unknown method 'dpo'.*ddpo_is"),
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


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ValueError) as e:
        check_config(TrainConfig(num_epochs=0, mixed_precision="int8", kl_weight=-1.0))
    names = [sentence.split(" is ")[0] for sentence in str(e.value).split("; ")]
    assert names == ["num_epochs", "kl_weight", "mixed_precision"]
    with pytest.raises(ValueError, match="stop_gain is.*; samples per epoch.*; sample_eta is 0"):
        check_config(TrainConfig(eval_freq=0, train_batch_size=24, sample_eta=0.0))


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
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"own.yaml.*{message}") as e:
        read_fields(path)
    assert "\n" not in str(e.value)


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
    c = preset(name)
    # measured for the embedded model alone: early stops, prompts in groups, wide clip ranges
    assert (c.stop_gain, c.sample_images_per_prompt, c.train_clip_range) == (0.0, 1, 1e-4)
    assert c.sample_guidance_scale == c.eval_guidance_scale  # they look as they sample
    assert c.sample_num_steps == 50


def test_the_embedded_models_preset_is_the_default():
    assert preset("tiny") == TrainConfig()


# What a preset's `kept` says in words, held against its numbers.
CLAIMS = [
    (r"advantage clip (\d+)", lambda c: c.train_adv_clip_max),
    (r"guidance ([\d.]+)", lambda c: c.sample_guidance_scale),
    (r"eta (\d)", lambda c: c.sample_eta),
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
    assert c.reward_fn.removeprefix("0.01*") in REWARDS
    if c.prompt_fn == "hps_v2_all.txt":
        assert any("to be put beside the run" in sentence for sentence in read_preset(name).differs)
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
    with pytest.raises(ValueError, match="unknown preset 'tinny': expected one of .*tiny_sf"):
        preset("tinny")
    (tmp_path / "own.yaml").write_text("inherits: tinny\nconfig: {}\n")
    with pytest.raises(ValueError, match="unknown preset 'tinny'"):
        preset(tmp_path / "own.yaml")
