"The commands, as a user types them."

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddpo_scratch.cli import commands as cli
from ddpo_scratch.config import TrainConfig, preset, preset_names, write_config
from ddpo_scratch.cli.drawing import mix_loras
from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.models import base, sd
from loras import random_lora
from PIL import Image

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]
TINY_RUN = """--num_epochs 1 --sample_num_steps 4 --sample_batch_size 4 --train_batch_size 2
--sample_num_batches_per_epoch 1 --eval_num_images 2 --sample_guidance_scale 1""".split()
COMMANDS = ("ddpo_train", "ddpo_sample", "ddpo_eval")


def python(code, **options):
    "Run Python in a process of its own."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def help_of(command, capsys, monkeypatch, *words, option="--help_all"):
    "Return a command's help, on one line."
    monkeypatch.setenv("COLUMNS", "100")
    assert getattr(cli, command)([*words, option]) == 0
    told = capsys.readouterr()
    assert not told.err
    return " ".join(told.out.split())


def mistake(capsys, command, *words):
    "Return the one line that a command says of a mistake."
    assert getattr(cli, command)([*map(str, words)]) == 2
    told = capsys.readouterr()
    message = told.err.strip()
    assert message.startswith("error: ") and "\n" not in message
    return message


# ---------------------------------------------------------------- help


def test_help_names_every_field_in_one_group():
    grouped = [name for names in cli.GROUPS.values() for name in names]
    records = (cli.Layers, TrainConfig, cli.Asked)
    fields = [field.name for record in records for field in dataclasses.fields(record)]
    assert sorted(grouped) == sorted(fields)


def test_help_shows_every_option_only_when_all_are_asked_for(capsys, monkeypatch):
    everything = help_of("ddpo_train", capsys, monkeypatch)
    short = help_of("ddpo_train", capsys, monkeypatch, option="--help")
    for name in FIELDS:
        assert f"--{name}" in everything
    shown = set(re.findall(r" --(\w+)", short.partition("what people turn first:")[2]))
    assert shown == {*cli._FIRST, "help_all", "list"} and len(cli._FIRST) == 10
    for text in ("examples: ddpo_train ", "my_reward.py:redness", "--preset blog --dry_run"):
        assert text in short and text in everything
    for title in cli.GROUPS:
        assert f"{title}: " in everything
    assert short == help_of("ddpo_train", capsys, monkeypatch, option="-h")
    assert everything == help_of("ddpo_train", capsys, monkeypatch, option="--help-all")


def test_help_shows_the_comments_beside_and_above_fields(capsys, monkeypatch):
    text = help_of("ddpo_train", capsys, monkeypatch)
    assert "--num_epochs INT epochs at most (default: 20)" in text
    assert "--lora_targets {attention,all}" in text
    assert "PPO's clip range; 0 picks 1e-4 scaled from 16,384 latent dimensions" in text
    assert "--allow_tf32 [true|false]" in text and "--compile torch.compile" in text
    assert "(default: the launcher's WORLD_SIZE, or 1)" in text
    assert "FILE.yaml of your own" in text and "'inherits: NAME'" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command, capsys, monkeypatch):
    "An option without a comment shows its type and its default alone."
    text = help_of(command, capsys, monkeypatch).partition("OPTIONS]")[2]
    options = re.split(r" --(?=[a-z])", text.rpartition("examples:")[2].partition(": ")[2])
    assert len(options) > 8
    for option in options[1:]:
        _, *words = option.split("(")[0].split()
        assert len(words) > 1, option


def test_help_shows_the_values_of_the_preset(capsys, monkeypatch):
    text = help_of("ddpo_train", capsys, monkeypatch, "--preset", "tiny_rwr")
    assert "(default: rwr)" in text and "(default: ddpo_is)" not in text


@pytest.mark.parametrize("words", ([], ["--seed", "3"], ["--method", "ddpo_is"], ["--model", SD15]))
def test_help_shows_what_runs_with_these_words(words, capsys, monkeypatch):
    layers, fields = cli._split(cli._train_parser().read(words))
    shown = cli._shown_defaults(layers, fields)
    assert not capsys.readouterr().out
    assert shown == dataclasses.asdict(cli.parse_train(words))
    text = help_of("ddpo_train", capsys, monkeypatch, *words)
    assert f"(default: {shown['train_learning_rate']:g})" in text
    if not words:
        assert "(default: 0.165)" in text and "(default: 0.17)" not in text
        assert "(default: tiny_minute, or what fits the rest)" in text


def test_help_comes_where_other_words_are_wrong(capsys, monkeypatch):
    for words in (["--model", "no/such"], ["--resume_from", "nowhere"], ["--config", "no.yaml"]):
        assert "(default: 0.165)" in help_of("ddpo_train", capsys, monkeypatch, *words)


@pytest.mark.parametrize("command", ("ddpo_sample", "ddpo_eval"))
def test_help_says_what_a_run_decides(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch, option="--help")
    assert "denoising steps; without a run, 20 for tiny, else 50 (default: the run's)" in text
    assert "--lora FOLDER a run's folder" in text
    assert "(default: the run's, or tiny)" in text or "(default: tiny)" in text
    assert re.search(r"--seed INT [^-]*\(default: \d\)", text)


MISSPELT = {
    "train --reward_fn jpeg_compresibility": "get_reward: no reward called 'jpeg_compresibility'",
    "train --reward_fn brightness-2*rednes": "no reward called 'rednes'; did you mean redness",
    "train --eval_judges brightnes": "no reward called 'brightnes'; did you mean brightness",
    "train --prompt_fn comon_animals": "get_prompt_fn: no prompts called 'comon_animals'",
    "train --prompt_fn count(max_count=3)": "no prompts called 'count'; did you mean counting",
    "train --push_to_hub --reward_fn jpg --dry_run": "no reward called 'jpg'; ",
    "eval tiny --rewards brightnes": "no reward called 'brightnes'; did you mean brightness",
    "eval tiny --prompts other_animal": "no prompts called 'other_animal'; did you mean other_",
}


def test_help_and_mistakes_do_without_torch():
    done = python(
        "import sys; from ddpo_scratch.cli import commands as cli\n"
        f"for words in {list(MISSPELT)}:\n    assert cli.main(words.split()) == 2, words\n"
        "assert cli.ddpo_train(['--help']) == cli.ddpo_sample(['--help']) == 0\n"
        "assert cli.ddpo_train(['--epochs', '3']) == cli.ddpo_eval(['--n', '1']) == 2\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib'}\n"
        "print(*heavy & {name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    assert done.returncode == 0 and "usage: ddpo_train [OPTIONS]" in done.stdout, done.stderr
    lines = done.stderr.splitlines()
    for message in MISSPELT.values():
        assert message in lines.pop(0)
    assert lines[0] == "error: no option --epochs: did you mean --num_epochs?"
    assert lines[-1] == "", f"imported: {lines[-1]}"


def test_names_in_sums_files_and_quotes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("animals").write_text("a fox")
    for text in (
        "animals",
        "x.txt",
        "my.py:red",
        "pkg.red",
        "redness +",
        "red.py",
        "(",
        "a" * 9999,
    ):
        assert cli._own_names(text) in ([], ["a" * 9999]), text
    assert cli._own_names("redness * brightness") == []  # no sum
    assert cli._own_names("redness - 2*f('os:x') + a.b") == ["redness", "f"]


def test_the_version(capsys):
    for command in COMMANDS:
        assert getattr(cli, command)(["--version"]) == 0
        told = capsys.readouterr().out
        assert told.startswith("ddpo_scratch 0.") and "torch 2." in told and "Python 3" in told


@pytest.mark.parametrize("kind", ("rewards", "prompts", "presets", "methods"))
def test_lists_have_a_line_each(capsys, kind):
    from ddpo_scratch.methods.base import method_names
    from ddpo_scratch.prompts import SOURCES
    from ddpo_scratch.rewards.base import REWARDS

    assert cli.ddpo_train(["--list", kind]) == 0
    *lines, blank, own = capsys.readouterr().out.splitlines()
    names = dict(rewards=[*REWARDS], prompts=[*SOURCES], presets=preset_names())
    names["methods"] = list(method_names())
    assert [line.split()[0] for line in lines] == sorted(names[kind]) and not blank and own
    assert all(len(line.split()) > 2 for line in lines), lines


def test_the_list_of_rewards_says_units(capsys):
    assert cli.ddpo_eval(["--list", "rewards"]) == 0
    assert re.search(r"^jpeg_compressibility .*\[kB\]$", capsys.readouterr().out, re.MULTILINE)


def test_the_commands_run_as_a_module():
    words = [sys.executable, "-m", "ddpo_scratch.cli.commands"]
    done = subprocess.run([*words, "train", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("ddpo_scratch") and not done.stderr


def test_the_module_without_a_command_says_what_to_write(capsys):
    for words in ([], ["paint"]):
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert "usage: python -m ddpo_scratch.cli.commands train|sample|eval" in told
        assert all(command in told for command in COMMANDS)
    assert cli.main(["ddpo_sample", "--version"]) == 0


# ---------------------------------------------------------------- options over file over run


def test_options_lie_over_a_file_over_the_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: tiny_rwr\nnum_epochs: 7\ntrain_learning_rate: 1e-3\nseed: 5\n")
    c = cli.parse_train(["--config", str(path), "--seed", "6"])
    assert (c.method, c.num_epochs, c.train_learning_rate, c.seed) == ("rwr", 7, 1e-3, 6)


def test_a_preset_that_is_given_lies_over_the_one_in_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: tiny_rwr\nseed: 5\n")
    words = ["--config", str(path), "--preset", "tiny_sf", "--train_batch_size", "64"]
    c = cli.parse_train(words)
    assert (c.method, c.seed, c.train_batch_size) == ("ddpo_sf", 5, 64)


def test_a_preset_may_be_a_file_that_inherits(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("inherits: tiny_rwr\nconfig:\n  seed: 5\n")
    c = cli.parse_train(["--preset", str(path)])
    assert (c.method, c.seed) == ("rwr", 5)


def test_numbers_of_a_file_of_the_preset_form_are_of_all_processes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("inherits: t4_sd15\nconfig:\n  sample_num_batches_per_epoch: 32\n")
    words = ["--config", str(path), "--world", "8"]
    c = cli.parse_train(words)
    assert c == cli.parse_train(["--preset", str(path), "--world", "8"])
    assert c.sample_num_batches_per_epoch == 4 and c.samples_per_epoch == 4 * c.sample_batch_size
    given = cli.parse_train([*words, "--sample_num_batches_per_epoch", "3"])
    assert given.sample_num_batches_per_epoch == 3
    # a preset that is given stands in the place of the one that is inherited
    words = ["--config", str(path), "--preset", "tiny_rwr", "--world", "2"]
    c = cli.parse_train([*words, "--seed", "7"])
    assert (c.method_name, c.sample_num_batches_per_epoch, c.seed) == ("rwr", 16, 7)
    path.write_text("preset: t4_sd15\nsample_num_batches_per_epoch: 32\n")
    assert cli.parse_train(words[:2]).sample_num_batches_per_epoch == 32


def test_a_file_of_the_preset_form_over_a_run_is_shared_too(tmp_path):
    a_run(tmp_path / "run", sample_num_batches_per_epoch=4, seed=4)
    path = tmp_path / "mine.yaml"
    path.write_text("config:\n  sample_num_batches_per_epoch: 32\n  num_epochs: 7\n")
    words = ["--config", str(path), "--resume_from", str(tmp_path / "run"), "--world", "8"]
    c = cli.parse_train(words)
    assert (c.sample_num_batches_per_epoch, c.num_epochs, c.seed) == (4, 7, 4)


def a_run(folder, **fields):
    "Make a folder with the configuration and a checkpoint of a run, as far as options need it."
    checkpoint = folder / "checkpoints" / "epoch_0001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    for place in (folder, checkpoint):
        write_config(TrainConfig(**fields), place)
    return checkpoint


def test_options_lie_over_a_file_over_the_run_that_is_resumed(tmp_path):
    checkpoint = a_run(tmp_path / "run", num_epochs=3, seed=4, lora_rank=2)
    path = tmp_path / "mine.yaml"
    path.write_text("num_epochs: 7\nseed: 5\n")
    words = ["--config", str(path), "--seed", "6", "--resume_from", str(tmp_path / "run")]
    c = cli.parse_train(words)
    assert (c.num_epochs, c.seed, c.lora_rank) == (7, 6, 2)
    assert Path(c.resume_from) == checkpoint


def test_an_option_that_repeats_the_preset_is_given_all_the_same():
    "Of 32 batches of 8 each of 8 processes draws 4, unless the command says how many."
    words = "--preset ddpo_pytorch_aesthetic --world 8".split()
    assert cli.parse_train(words).sample_num_batches_per_epoch == 4
    words += ["--sample_num_batches_per_epoch=32"]
    assert cli.parse_train(words).sample_num_batches_per_epoch == 32


def test_numbers_that_cannot_be_shared_out_may_be_given():
    words = "--preset trl_ddpo --world 8 --train_batch_size 3".split()
    with pytest.raises(ValueError, match="3 x 1 = 3 cannot be shared out among 8 processes"):
        cli.parse_train(words)
    c = cli.parse_train([*words, "--train-gradient-accumulation-steps", "1"])
    assert (c.train_batch_size, c.train_gradient_accumulation_steps) == (3, 1)


def test_mistakes_in_a_file(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("num_epoch: 7\n")
    message = mistake(capsys, "ddpo_train", "--config", path)
    assert "unknown field 'num_epoch': did you mean num_epochs" in message
    assert "no file" in mistake(capsys, "ddpo_train", "--config", tmp_path / "none.yaml")


def test_a_true_or_false_option_may_stand_alone():
    words = ["--compile", "--gradient_checkpointing", "false", "--push_to_hub", "true"]
    c = cli.parse_train(words)
    assert (c.compile, c.gradient_checkpointing, c.push_to_hub) == (True, False, True)


@pytest.mark.parametrize(
    "word,value", dict(true=True, yes=True, on=True, false=False, no=False, off=False).items()
)
def test_words_for_true_and_false(word, value):
    for spelling in (word, word.upper()):
        assert cli.parse_train(["--use_lora", spelling]).use_lora is value


# ---------------------------------------------------------------- a model of another kind


def test_another_model_gets_a_preset_that_fits_and_says_so(capsys):
    c = cli.parse_train(["--model", SD15, "--reward_fn", "aesthetic"])
    told = capsys.readouterr().out
    taken = re.match(r"--preset (\w+) is taken, which fits \S+; others: \w+", told)
    assert taken and taken[1] in preset_names() and not taken[1].startswith("tiny")
    assert (c.model, c.reward_fn) == (SD15, "aesthetic")
    assert c == dataclasses.replace(
        cli.parse_train(["--preset", taken[1], "--model", SD15]), reward_fn="aesthetic"
    )
    assert c.train_learning_rate < 1e-3 and c.sample_num_steps > 20


@pytest.mark.parametrize(
    "words, method, said",
    [
        ([], "awm", False),
        (["--reward_fn", "blueness", "--seed", "3", "--num_epochs", "2"], "awm", False),
        (["--sample_num_batches_per_epoch", "1"], "ddpo_is", True),
        (["--sample_num_batches_per_epoch", "1", "--method", "ddpo_is"], "ddpo_is", False),
        (["--sample_num_batches_per_epoch", "1", "--preset", "tiny_minute"], "awm", False),
    ],
)
def test_numbers_that_leave_the_main_job_are_told(capsys, words, method, said):
    assert cli.parse_train(words).method_name == method
    told = capsys.readouterr().out
    assert ("sample_num_batches_per_epoch given: the method is ddpo_is" in told) is said
    assert ("--preset tiny_minute keeps those of the main job" in told) is said


def test_a_model_that_no_preset_fits_stops_and_some_are_named(capsys, monkeypatch):
    message = mistake(capsys, "ddpo_train", "--model", "somebody/their-model", "--dry_run")
    assert "no preset is known to fit 'somebody/their-model'" in message
    assert "--preset a100_sd15, a100_sd35, a100_sdxl, t4_sd15, or --preset tiny" in message


def test_a_preset_that_is_named_is_taken_without_a_word(capsys):
    assert cli.parse_train(["--preset", "tiny", "--model", SD15]).sample_num_steps == 20
    assert cli.parse_train([]).model == "tiny"
    assert not capsys.readouterr().out


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "words,message",
    [
        ("--num_epoch 3", "no option --num_epoch: did you mean --num_epochs"),
        ("--epochs 3", "no option --epochs: did you mean --num_epochs?"),
        ("--learning_rate 1", "no option --learning_rate: did you mean --train_learning_rate?"),
        ("--lr 1", "no option --lr: did you mean --train_learning_rate?"),
        ("--qqqqq", "no option --qqqqq: ddpo_train --help lists them"),
        ("--num_epochs three", "--num_epochs 'three': should be a valid integer"),
        ("--num_epochs", "--num_epochs needs a value: INT"),
        ("--use_lora maybe", "'maybe' belongs to no option; --use_lora takes [true|false]"),
        ("--use_lora true false", "'false' belongs to no option; --use_lora takes"),
        ("--mixed_precision fp8", "--mixed_precision 'fp8': should be 'no', 'bf16' or 'fp16'"),
        ("--world two", "--world 'two'"),
        ("--world 0", "--world '0': should be greater than 0"),
        ("stray", "'stray' belongs to no option"),
    ],
)
def test_words_that_do_not_fit_are_two_lines(words, message, capsys):
    assert cli.ddpo_train(words.split()) == 2
    told = capsys.readouterr()
    first, second = told.err.splitlines()
    assert first.startswith(f"error: {message}") and not told.out
    assert second == "usage: ddpo_train [OPTIONS]  (--help lists them)"


NUMBERS = [
    (command, name)
    for command, parser in zip(
        COMMANDS, (cli._train_parser(), cli._sample_parser(), cli._eval_parser())
    )
    for name, option in parser.options.items()
    if "NUMBER" in option.metavar or "INT" in option.metavar
]


@pytest.mark.parametrize("word", ("nan", "inf", "-inf"))
@pytest.mark.parametrize("command,name", NUMBERS)
def test_no_number_is_infinite_or_none(command, name, word, capsys, tmp_path):
    "What clips may be infinite, and then clips nothing."
    if word == "inf" and name in ("train_max_grad_norm", "train_adv_clip_max"):
        return
    first = [] if command == "ddpo_train" else ["a fox"]
    if command == "ddpo_eval":
        first = ["tiny"]
    assert getattr(cli, command)([*first, f"--{name}={word}"]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,message",
    [
        (["--preset", "tinny"], "unknown preset 'tinny'"),
        (["--method", "ppo"], "'ppo'"),
        (["--lora_rank", "0"], "lora_rank"),
        (["--reward_fn", "jpg"], "'jpg'"),
        (["--prompt_fn", "animals"], "'animals'"),
        (["--model", "./nowhere"], "no model './nowhere'"),
        (["--sample_eta", "0"], "needs noise in every step"),
        (["--train_batch_size", "24"], "must be a multiple"),
        (["--resume_from", "nowhere"], "no checkpoint in 'nowhere'"),
        (["--prompt_fn", "missing.txt"], "no file"),
    ],
)
@pytest.mark.parametrize("dry", ([], ["--dry_run"]))
def test_mistakes_leave_nothing(tmp_path, capsys, words, message, dry):
    assert cli.ddpo_train([*words, *dry, "--logdir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words,message",
    [
        (["--base"], "there is no LoRA"),
        (["no/such/model"], "no/such/model"),
        (["--rewards", "brightnes"], "did you mean brightness"),
        (["--prompts", "animals"], "'animals'"),
        (["--lora", "a", "--lora", "b", "--lora_weight", "1"], "2 and 1: give a weight for each"),
    ],
)
def test_mistakes_of_an_evaluation(tmp_path, capsys, words, message):
    assert message in mistake(capsys, "ddpo_eval", *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "no prompt: give one or more"),
        ([" "], "no prompt: give one or more"),
        (["a fox", "--lora", "nowhere"], "'nowhere'"),
        (["a fox", "--lora_weight", "0.5"], "0 and 1: give a weight for each"),
        (
            ["a fox", "--best_of", "8"],
            "--best_of 8 keeps what a reward likes most: give --reward_fn",
        ),
        (["a fox", "--reward_fn", "brightness"], "choose among several pictures: give --best_of"),
        (["a fox", "--steer", "fk"], "choose among several pictures: give --best_of"),
        (["a fox", "--best_of", "2", "--reward_fn", "brightnes"], "did you mean brightness"),
    ],
)
def test_mistakes_of_drawing(capsys, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, "ddpo_sample", *words)
    assert not list(tmp_path.iterdir())


def test_a_reward_that_fails_stops_with_one_line(tmp_path, monkeypatch, capsys):
    code = "def reward(images, prompts, metadata): raise ConnectionError('no answer')\n"
    (tmp_path / "failing.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    words = "--reward_fn failing:reward --sample_num_steps 2 --sample_batch_size 4".split()
    words += "--eval_num_images 0 --stop_gain 0".split()
    assert cli.ddpo_train([*words, "--logdir", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr()
    assert "failed on 4 pictures" in told.err and told.err.count("\n") == 1
    assert "ConnectionError: no answer" in told.err and "resume" not in told.err
    assert "no epoch was finished" in told.out


def test_what_libraries_raise_is_a_line(tmp_path, capsys):
    from safetensors.torch import load_file

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"\x40\0\0\0\0\0\0\0{")

    class HubError(Exception):
        pass

    HubError.__module__ = "huggingface_hub.errors"

    def raising(error):
        def run(words):
            raise error

        return cli._command(run)([])

    assert cli._command(lambda words: load_file(cut))([]) == 2
    assert "a file of weights is damaged" in capsys.readouterr().err
    assert raising(HubError("401 Client Error\n\nfor x")) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: 401 Client Error for x; is there a network?")
    assert told.count("\n") == 1 and "folder" in told
    assert raising(torch.cuda.OutOfMemoryError("CUDA out of memory")) == 2
    assert "the memory is full: try a smaller" in capsys.readouterr().err


def test_without_network_nobody_waits_for_the_hub(monkeypatch, capsys):
    "The hub's library would ask five times, 8 seconds apart."
    from huggingface_hub import constants

    def nobody(host, port):
        asked.append(host)
        raise OSError("Name or service not known")

    asked = []
    for name in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(base.socket, "getaddrinfo", nobody)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    base._offline_without_network()
    assert not asked  # who says HF_HUB_OFFLINE has said what to do
    monkeypatch.delenv("HF_HUB_OFFLINE")
    base.pipeline_class(base.find_model("tiny"))
    for model in ("./a/b", "a/b/c"):
        mistake(capsys, "ddpo_sample", "a fox", "--model", model)
    assert not asked  # what is on the disk, or nowhere
    message = mistake(capsys, "ddpo_sample", "a fox", "--model", "owner/nonexistent")
    assert asked[0] == "huggingface.co" and constants.HF_HUB_OFFLINE is True
    assert "no model 'owner/nonexistent'" in message and "folder" in message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # and what the test found is put back


def test_a_mistake_of_ours_keeps_its_traceback():
    for error in (KeyError("x"), AttributeError("x"), TypeError("x"), AssertionError("x")):

        def run(words, error=error):
            raise error

        with pytest.raises(type(error)):
            cli._command(run)([])


def test_a_stop_is_a_word(capsys):
    def stopped(args):
        raise KeyboardInterrupt

    assert cli._command(stopped)([]) == 2
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("said, err", [(["stopped in epoch 3; saved ..."], ""), ([], "stopped\n")])
def test_a_run_that_is_stopped_says_it_once(capsys, monkeypatch, said, err):
    "Where a run can go on, fit has said, if there was a run yet."

    def stopped(config, **options):
        print(*said)
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr("ddpo_scratch.train.fit", stopped)
    assert cli.ddpo_train([]) == 2
    told = capsys.readouterr()
    assert told.err == err and told.out.endswith("".join(said) + "\n")


@pytest.mark.parametrize("setting,threads", [(None, min(2, os.cpu_count())), ("1", 1)])
def test_two_threads_where_there_are_two(monkeypatch, setting, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    try:
        torch.set_num_threads(1)
        cli._make_ready()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "given, before, policy",
    [
        ({}, "", "PASSIVE"),
        (dict(OMP_WAIT_POLICY="ACTIVE"), "", "ACTIVE"),
        (dict(GOMP_SPINCOUNT="1000"), "", "None"),
        ({}, "import torch", "None"),
    ],
)
def test_waiting_threads_sleep_unless_somebody_says_otherwise(given, before, policy):
    "Said before torch is loaded, and never over what is said already."
    code = f"""
import os, sys
{before}
import ddpo_scratch.cli.commands as cli
assert "torch" not in sys.modules or {bool(before)}
cli.ddpo_train(["--list", "presets"])
print(os.environ.get("OMP_WAIT_POLICY"))
"""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == policy


# ---------------------------------------------------------------- nothing runs that was only read

HOSTILE = [
    "os:system('touch PWNED')",
    "os.system('touch PWNED')",
    "subprocess:Popen(['touch', 'PWNED'])",
    "brightness + 0*os:system('touch PWNED')",
    "2*(brightness - os:system('touch PWNED'))",
    "evil.py:reward",
    "./evil.py:reward",
    "evil:reward",
    "evil:json",
    "evil.json",
    "evil.tsv",
    "evil.reward",
    "relative('evil.py:reward', 'a', 'b')",
    "relative('evil.reward', 'a', 'b')",
    "relative('brightness + 0*evil:reward', 'a', 'b')",
    "brightness + 0*relative(of='relative(\"./evil.py:reward\", 1, 2)', positive=1, negative=2)",
    "relative({'evil.py:reward': 1}, 'a', 'b')",
    "brightness - relative(['brightness', ['evil:reward']], 'a', 'b')",
]
EVIL = "open('PWNED', 'w').close()\ndef reward(images, prompts, metadata): return images.mean()\n"


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    "Stand in a folder with code that leaves a mark; return a function that makes a run's folder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    (tmp_path / "evil.py").write_text(EVIL)

    def make(**fields):
        a_run(tmp_path / "run", **fields)
        (tmp_path / "run" / "evil.py").write_text(EVIL)
        return "run"

    yield make
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("dry", ([], ["--dry_run"]))
@pytest.mark.parametrize("field", ("reward_fn", "prompt_fn", "eval_judges"))
@pytest.mark.parametrize("text", HOSTILE)
def test_resuming_a_strangers_run_runs_nothing(stranger, capsys, text, field, dry):
    run = stranger(**{field: text})
    message = mistake(capsys, "ddpo_train", "--resume_from", run, *dry)
    assert not Path("PWNED").exists()
    assert f"run/checkpoints/epoch_0001/config.yaml is {text!r}" in message
    assert message.startswith(f"error: {field} in ")
    assert f"--{field} " in message and "--trust" in message


def test_judges_among_others_run_nothing(stranger, capsys):
    for text in (
        "brightness, os:system('touch PWNED, x')",
        "brightness,evil.reward( 'a, b')",
        "brightness, relative('evil.py:reward', 'a', 'b')",
        "relative('evil.py:reward', ['a, b'], 'c'), brightness",
    ):
        words = ["--eval_judges", "brightness"]
        write_config(TrainConfig(eval_judges=text), Path("."))
        assert "eval_judges" in mistake(capsys, "ddpo_train", "--config", "config.yaml")
        assert cli.parse_train(["--config", "config.yaml", *words]).eval_judges == "brightness"
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("repository", ["somebody/else", ""])
@pytest.mark.parametrize("kind", ["config", "preset", "run"])
def test_a_strangers_file_uploads_nothing(stranger, capsys, kind, repository):
    "Neither to the stranger's account nor to the user's."
    fields = dict(push_to_hub=True, hub_model_id=repository)
    Path("theirs.yaml").write_text(json.dumps(fields))
    words = [f"--{kind}", "theirs.yaml"]
    if kind == "run":
        words = ["--resume_from", stranger(**fields)]
    message = mistake(capsys, "ddpo_train", *words)
    assert message.startswith("error: push_to_hub in ") and "--push_to_hub yourself" in message
    assert (repository or "your own account") in message and "--trust" in message
    for more in (["--push_to_hub"], ["--push_to_hub", "false"], ["--trust"]):
        assert cli.parse_train([*words, *more]).push_to_hub is ("false" not in more)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_files_run_nothing(stranger, capsys, text):
    Path("flat.yaml").write_text(f"reward_fn: {json.dumps(text)}\n")
    Path("preset.yaml").write_text(f"config:\n  prompt_fn: {json.dumps(text)}\n")
    Path("child.yaml").write_text("inherits: preset.yaml\nconfig: {}\n")
    Path("names.yaml").write_text("preset: preset.yaml\n")
    for option, name in (
        ("--config", "flat.yaml"),
        ("--preset", "flat.yaml"),
        ("--preset", "preset.yaml"),
        ("--preset", "child.yaml"),
        ("--config", "names.yaml"),
    ):
        assert "--trust" in mistake(capsys, "ddpo_train", option, name, "--dry_run")
    assert cli.ddpo_train(["--help", "--preset", "preset.yaml"]) == 0
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_run_is_measured_with_nothing_of_its_own(stranger, capsys, text):
    run = stranger(reward_fn=text, prompt_fn=text, eval_judges=text)
    (Path(run) / "pytorch_lora_weights.safetensors").touch()
    message = mistake(capsys, "ddpo_eval", run)
    assert not Path("PWNED").exists()
    assert f"reward_fn in run/config.yaml is {text!r}" in message
    assert "--rewards " in message and "--trust" in message


def test_a_strangers_run_is_drawn_from_with_nothing_of_its_own(stranger):
    run = stranger(**dict.fromkeys(("reward_fn", "prompt_fn", "eval_judges"), HOSTILE[0]))
    random_lora(1, run)
    assert cli.ddpo_sample(["a fox", "--lora", run, "--num_steps", "2"]) == 0
    assert cli.ddpo_sample(["a fox", "--model", run, "--num_steps", "2"]) == 0
    assert not Path("PWNED").exists()
    assert len(list(Path("samples").iterdir())) == 2


@pytest.mark.parametrize("field", ("method", "reward_shaping", "model", "start_from"))
@pytest.mark.parametrize("text", ["evil.py:reward", "evil:reward", "gardo('evil.py:reward')"])
def test_other_fields_name_no_code(stranger, capsys, field, text):
    Path("flat.yaml").write_text(f"preset: tiny\n{field}: {json.dumps(text)}\n")
    mistake(capsys, "ddpo_train", "--config", "flat.yaml", "--dry_run")
    assert not Path("PWNED").exists()


def test_code_of_a_models_folder_does_not_run(stranger, tmp_path, capsys):
    import shutil

    shutil.copytree(sd.TINY, "model")
    index = json.loads(Path("model/model_index.json").read_text())
    for part, folder in (("unet", "model"), ("text_encoder", "model/text_encoder")):
        (tmp_path / folder / "evil.py").write_text(EVIL)
        bad = index | {part: ["evil", "Evil"]}
        Path("model/model_index.json").write_text(json.dumps(bad))
        assert "error: " in mistake(capsys, "ddpo_sample", "a fox", "--model", "./model")
    assert not Path("PWNED").exists()


def test_what_is_named_on_the_command_line_is_used(stranger, monkeypatch):
    "Asked for by name, or by --trust: the same text, or the file's."
    run = stranger(reward_fn="evil:reward", prompt_fn="evil:prompts")
    named = ["--reward_fn", "evil:reward", "--prompt_fn", "evil:prompts"]
    for words in (named, ["--trust"]):
        c = cli.parse_train(["--resume_from", run, *words])
        assert (c.reward_fn, c.prompt_fn) == ("evil:reward", "evil:prompts")
    other = ["--reward_fn", "brightness", "--prompt_fn", "common_animals"]
    assert cli.parse_train(["--resume_from", run, *other]).reward_fn == "brightness"


@pytest.mark.parametrize("words", (["--trust"], ["--rewards", "evil.py:reward"]))
def test_a_run_that_is_trusted_runs_its_code(stranger, words):
    "The marks that the other tests miss are really left."
    run = stranger(reward_fn="evil.py:reward")
    random_lora(1, run)
    words += "--n 2 --num_steps 1 --prompts common_animals".split()
    assert cli.ddpo_eval([run, *words]) == 2  # images.mean() is not a number a picture
    assert Path("PWNED").exists()


def test_data_needs_no_trust(stranger):
    Path("my.prompts").write_text("a fox\n")
    texts = ["prompts.txt", "./dir.d/prompts.jsonl", "my.prompts", "from_list(['a: b', 'c.d e:f'])"]
    texts += ["from_list(['sky:blue', 'St.Ives'])", "from_file('evil.txt', column='a')"]
    texts += [f"from_list({['a fox'] * 999})"]
    for text in texts:
        assert cli._code_in("prompt_fn", text) == [], text
    for text in (
        "brightness - 0.5*target_color('a:b.c')",
        "llava(server='http://a.b:80/x')",
        "relative('clip_score(model=\"owner/name\")', 'Realistic', 'CG: a render')",
        "geneval(model='model.safetensors')",
    ):
        assert cli._code_in("reward_fn", text) == [], text


def test_a_part_that_was_passed_from_python_is_asked_for(stranger, capsys):
    for text in ("__main__:mine", "my:make.<locals>.mine", "mine:Judge(...)"):
        write_config(TrainConfig(reward_fn=text), Path("."))
        message = mistake(capsys, "ddpo_train", "--config", "config.yaml")
        assert "was passed from Python" in message and "give --reward_fn" in message


def test_of_the_working_directory_only_what_is_named_is_imported(tmp_path):
    "Optional packages that are not installed were picked up where the command ran."
    for name in ("sentencepiece", "flash_attn", "bitsandbytes", "xformers", "evil"):
        (tmp_path / f"{name}.py").write_text(EVIL)
    code = "def reward(images, prompts, metadata): return images.mean((1, 2, 3)), {}\n"
    (tmp_path / "mine.py").write_text(code)
    command = Path(sys.executable).with_name("ddpo_eval")
    words = "tiny --prompts common_animals --n 2 --num_steps 2 --rewards".split()
    words += ["mine:reward", "mine.py:reward"]
    done = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ddpo_eval.json").read_text())
    first, second = record["lists"]["common_animals"]["rewards"].values()
    assert first == second and not (tmp_path / "PWNED").exists()


def test_the_command_that_draws_is_installed():
    command = Path(sys.executable).with_name("ddpo_sample")
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: ddpo_sample" in done.stdout, done.stderr


def test_commands_leave_the_path_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert cli.ddpo_train(["--dry_run"]) == 0
    assert sys.path == before and str(tmp_path) not in sys.path


# ---------------------------------------------------------------- dry runs


@pytest.mark.parametrize("name", preset_names())
def test_dry_run_of_every_preset(tmp_path, capsys, name, monkeypatch):
    "No preset's dry run asks the network for anything."
    import socket

    def no_network(*args, **options):
        raise AssertionError("a dry run asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    # some presets take prompts that their user must bring
    prompts = preset(name).prompt_fn
    brought = tmp_path / prompts
    if prompts.endswith((".txt", ".jsonl")):
        brought.parent.mkdir(parents=True, exist_ok=True)
        metadata = dict(prompt="two dogs", include=[{"class": "dog", "count": 2}], tag="counting")
        brought.write_text((json.dumps(metadata) if "jsonl" in prompts else "a fox") + "\n")
    there = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert cli.ddpo_train(["--preset", name, "--dry_run"]) == 0
    out = capsys.readouterr().out
    for part in ("effective batch", "memory, estimated", "reward queries"):
        assert part in out
    assert sorted(tmp_path.rglob("*")) == there


def test_dry_run_is_for_as_many_processes_as_are_meant(capsys, monkeypatch):
    words = "--preset ddpo_pytorch_alignment --dry_run".split()
    assert cli.ddpo_train([*words, "--world", "6"]) == 0
    assert "288 (48 on each of 6 processes)" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert cli.ddpo_train(words) == 0
    assert "288 (48 on each of 6 processes)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,message",
    [
        ("--reward_fn doesnotexist", "doesnotexist"),
        ("--eval_judges brightness,doesnotexist", "doesnotexist"),
        ("--prompt_fn doesnotexist.txt", "doesnotexist.txt"),
        ("--model ./doesnotexist", "doesnotexist"),
        ("--start_from ./doesnotexist", "doesnotexist"),
        ("--lora_targets some", "--lora_targets"),
        ("--preset tiny --model MODEL --lora_targets all", "has no such layers"),
    ],
)
def test_a_dry_run_checks_what_a_run_needs(words, message, capsys, monkeypatch):
    sizes = dict(network=1, text=1, vae=1, attention=1, all=0)
    if "MODEL" in words:
        monkeypatch.setattr("ddpo_scratch.models.base.sizes", lambda name: sizes)
        monkeypatch.setattr("ddpo_scratch.models.base.find_model", str)
    assert cli.ddpo_train([*words.split(), "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_judges_are_parted_at_commas_outside_of_brackets():
    c = TrainConfig(eval_judges="brightness, target_color('teal', 2) ,redness")
    assert cli._judges(c) == ["brightness", "target_color('teal', 2)", "redness"]
    assert cli._judges(TrainConfig()) == cli._judges(TrainConfig(eval_judges="")) == []


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of one epoch, and what its process printed."
    logdir = tmp_path_factory.mktemp("runs")
    words = ["--logdir", str(logdir), *TINY_RUN]
    done = python(
        f"import sys, ddpo_scratch.cli.commands as cli; sys.exit(cli.ddpo_train({words!r}))"
    )
    assert done.returncode == 0, done.stderr
    return logdir / "ddpo_is-jpeg_compressibility-001", done.stdout


def test_training_says_what_it_does_and_did(trained):
    folder, out = trained
    note, first, *_ = out.splitlines()
    assert note.startswith("sample_batch_size, ") and "the method is ddpo_is" in note
    assert first.startswith("ddpo_is trains a LoRA of rank 8 of tiny: reward jpeg_compressibility")
    assert first.endswith("at most 1 epoch of 4 pictures and 2 updates")
    assert "\r" not in out and "epoch 1" in out  # no bar in a log
    assert "2 pictures at fixed seeds" in out and "kB before" in out
    assert f'ddpo_sample "a cat" --lora {folder}' in out
    page = folder / "report.html"
    assert page.is_file() and f"open     {page}" in out
    assert "would rise further" not in out and "1 epochs" not in out and "too much" not in out


def test_a_run_is_drawn_from_and_measured(trained, tmp_path, capsys):
    folder, _ = trained
    words = ["a fox", "an owl", "--lora", folder, "--num_steps", 4, "--out", tmp_path, "--grid"]
    assert cli.ddpo_sample([*map(str, words)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a_fox-0-0.png", "an_owl-0-1.png", "sheet-0-0.png"}
    picture = Image.open(tmp_path / "a_fox-0-0.png")
    assert picture.size == (256, 256) and picture.text["lora"] == json.dumps([str(folder)])
    words = "--base --prompts other_animals other_animals --n 3 --num_steps 4 --rewards".split()
    capsys.readouterr()
    assert cli.ddpo_eval([str(folder), *words, "jpeg_compressibility", "0.5*brightness"]) == 0
    out = capsys.readouterr().out
    assert "note: --prompts names other_animals more than once: measured once" in out
    assert "6 pictures: 3 of each of 2 lists, with and without LoRA" in out
    assert "jpeg_compressibility [kB]" in out
    record = json.loads((folder / "ddpo_eval.json").read_text())
    assert list(record["lists"]) == ["other_animals", "other_animals, base"]
    assert (record["model"], record["lora"]) == ("tiny", [str(folder)])
    assert (folder / "ddpo_eval.png").is_file()
    tuned, base = (x["rewards"]["jpeg_compressibility"] for x in record["lists"].values())
    assert tuned["mean"] != base["mean"] and abs(tuned["mean"] - base["mean"]) < 1
    assert base["se"] > 0


def test_a_run_is_resumed(tmp_path, capsys):
    words = "--eval_num_images 0 --stop_gain 0".split()
    assert cli.ddpo_train([*TINY_RUN, *words, "--logdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ".png" not in out and "fixed seeds" not in out  # nothing that was not written
    folder = tmp_path / "ddpo_is-jpeg_compressibility-001"
    assert cli.ddpo_train(["--resume_from", str(folder), "--num_epochs", "2", "--verbose"]) == 0
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert [row["epoch"] for row in rows] == [1, 2]


# ---------------------------------------------------------------- last words


def closing(tmp_path, report, **fields):
    "Return the lines that end a run with this report."
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    return list(cli._closing_lines(tmp_path, TrainConfig(**fields), "a fox"))


REPORT = dict(
    unit="kB",
    before=dict(n=45, reward_mean=-2.394, reward_se=0.044),
    after=dict(n=45, reward_mean=-1.95, reward_se=0.05),
    difference=dict(mean=0.444, se=0.021),
    gain=0.15,
    judges={},
)


def test_numbers_have_units_and_a_paired_difference(tmp_path):
    _, line, _ = closing(tmp_path, REPORT)
    assert line == (
        "mean reward of 45 pictures at fixed seeds: -2.394 ± 0.044 kB before, -1.950 ± 0.050 kB "
        "after; difference, picture by picture: 0.444 ± 0.021 kB"
    )
    one = REPORT | dict(after=REPORT["after"] | dict(n=1))
    assert "mean reward of 1 picture at" in closing(tmp_path, one)[1]


def test_a_run_without_pictures_promises_none(tmp_path):
    for report in (None, dict(epochs=1, findings=[])):
        lines = closing(tmp_path, report)
        assert lines == [f"open     {tmp_path}", f'draw     ddpo_sample "a fox" --lora {tmp_path}']


def test_how_to_go_on_stands_only_where_the_goal_stopped_the_run(tmp_path):
    for gain, said in ((0.25, True), (0.4, True), (0.2, False), (-0.3, False)):
        lines = closing(tmp_path, REPORT | dict(gain=gain), stop_gain=0.25)
        assert any("at the pictures' cost" in line for line in lines) is said
    assert f"--resume_from {tmp_path} --stop_gain 0.5" in "".join(
        closing(tmp_path, REPORT | dict(gain=0.3), stop_gain=0.25)
    )
    assert len(closing(tmp_path, REPORT, stop_gain=0.0)) == 3


def test_too_much_stands_only_where_a_judge_fell(tmp_path):
    judges = dict.fromkeys(("clip", "animal", "other"), {})
    findings = ["other fell from 3 to 1: as text says"]
    report = REPORT | dict(judges=judges, findings=findings, fallen=["clip", "animal"])
    lines = closing(tmp_path, report)
    (line,) = [line for line in lines if line.startswith("too much?")]
    assert "clip and animal fell" in line and line.endswith(f"--lora {tmp_path} --lora_weight 0.5")
    assert not any("too much" in line for line in closing(tmp_path, REPORT))


def test_the_command_that_draws_fits_the_run(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    assert closing(folder, None)[1].endswith(f"--lora '{folder}'")
    assert closing(folder, None, use_lora=False)[1].endswith(f"--model '{folder}'")


def test_how_to_open_tensorboard_is_said_by_the_log_alone(tmp_path):
    lines = closing(tmp_path, REPORT, log_with="tensorboard")
    assert lines == closing(tmp_path, REPORT) and "tensorboard --logdir" not in " ".join(lines)


def test_long_texts_are_cut_in_the_first_line():
    c = TrainConfig(prompt_fn=f"from_list({['cat'] * 45!r})", num_epochs=2)
    line = cli._opening_line(c, 3)
    assert "prompts from_list(['cat', 'cat'" in line and "...; at most 2 epochs of 192" in line
    assert len(line) < 250 and "the whole network of" in cli._opening_line(
        TrainConfig(use_lora=False), 1
    )


# ---------------------------------------------------------------- drawing


def test_mixed_loras_draw(tmp_path):
    a, b = random_lora(1, tmp_path / "1"), random_lora(2, tmp_path / "2")
    words = f"--lora {a} --lora {b} --num_steps 3 --out {tmp_path} --scale 1 --lora_weight".split()
    assert cli.ddpo_sample(["a fox", *words, ".5", ".5"]) == 0
    pipe = mix_loras(sd.load_pipeline("tiny"), [a, b], [0.5, 0.5])
    expected = fixed_seed_images(sd.denoiser_for(pipe, 3.0), ["a fox"], 0, 3)[0]
    data = bytearray(Image.open(tmp_path / "a_fox-0-0.png").tobytes())
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
    assert (pixels.float() / 255 - expected).abs().max() < 0.51 / 255


def test_a_negative_prompt_changes_the_picture(tmp_path):
    drawn = []
    for i, more in enumerate(([], ["--negative_prompt", ""], ["--negative_prompt", "a cat"])):
        folder = tmp_path / str(i)
        assert cli.ddpo_sample(["a fox", "--num_steps", "3", "--out", str(folder), *more]) == 0
        drawn.append(Image.open(folder / "a_fox-0-0.png").tobytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_batches_change_no_picture(tmp_path):
    "Up to rounding: a kernel may add in another order where there are more rows."
    drawn = []
    for size in ("1", "3"):
        words = f"--n 3 --num_steps 2 --batch_size {size} --scale 1 --out {tmp_path / size}".split()
        assert cli.ddpo_sample(["a fox", *words]) == 0
        files = sorted((tmp_path / size).iterdir())
        drawn.append(torch.tensor([list(Image.open(path).tobytes()) for path in files]))
    assert drawn[0].shape == (3, 64 * 64 * 3) and (drawn[0] - drawn[1]).abs().max() <= 1


def test_words_that_the_embedded_model_does_not_know(tmp_path, capsys):
    words = ["--num_steps", "1", "--out", str(tmp_path)]
    assert cli.ddpo_sample(["a spaceship over Paris", *words]) == 0
    out = capsys.readouterr().out
    assert "does not know 'spaceship', 'over', 'Paris': it draws 77 things" in out
    assert cli.ddpo_sample(["a fox on a blue background", *words]) == 0
    assert "note" not in capsys.readouterr().out


def test_the_best_of_several_is_kept_and_named(tmp_path, capsys):
    words = f"--best_of 3 --reward_fn brightness --num_steps 2 --n 2 --grid --out {tmp_path}"
    for more in ([], ["--steer", "fk", "--seed", "1"]):
        assert cli.ddpo_sample(["a fox", *words.split(), *more]) == 0
        first, second, sheet = capsys.readouterr().out.splitlines()
        for line in (first, second):
            path, best, rest = line.split(" ", 2)
            mean = rest.removeprefix("(best of 3, whose mean is ").removesuffix(")")
            assert float(Image.open(path).text["reward"]) == pytest.approx(float(best), rel=0.01)
            assert float(best) >= float(mean)
        assert Path(sheet).is_file()


def test_steering_by_particles_needs_noise(tmp_path, capsys):
    words = "--best_of 3 --reward_fn brightness --num_steps 3 --eta 0 --steer fk --out".split()
    assert "use eta > 0" in mistake(capsys, "ddpo_sample", "a fox", *words, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more,expected",
    [
        ("", (1.5, "a cat", 3, 0.5)),
        ("--num_steps 2 --guidance_scale 3 --eta 1 --negative_prompt=", (3.0, "", 2, 1.0)),
    ],
)
def test_pictures_of_a_run_are_drawn_as_the_run_draws_them(tmp_path, monkeypatch, more, expected):
    config = dict(sample_num_steps=3, eval_guidance_scale=1.5, sample_eta=0.5)
    write_config(TrainConfig(**config, negative_prompts="a cat"), tmp_path)
    random_lora(1, tmp_path / "lora")
    calls = []

    def draw(denoiser, prompts, options):
        calls.append((denoiser.guidance_scale, denoiser.negative_prompt))
        calls[-1] += (options.num_steps, options.eta)
        return torch.zeros(len(prompts), 3, 8, 8)

    monkeypatch.setattr(cli, "draw", draw)
    words = ["a fox", "--lora", str(tmp_path), "--out", str(tmp_path / "out"), *more.split()]
    assert cli.ddpo_sample(words) == 0
    assert calls == [expected]


# ---------------------------------------------------------------- measuring


def test_rewards_are_loaded_before_the_model(monkeypatch, capsys):
    "A reward that cannot be had stops the command before anything is drawn."

    class Far:
        "Stand for a reward whose weights are far away."

        def load(self, device=None):
            raise ConnectionError("no answer")

        def __call__(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

    from ddpo_scratch.rewards.base import REWARDS

    def no_model(options):
        raise AssertionError("the model was loaded")

    monkeypatch.setitem(REWARDS._things, "far", Far)
    monkeypatch.setattr(cli, "denoiser_of", no_model)
    for text in ("far", "brightness + 0.5*far"):
        assert "no answer" in mistake(capsys, "ddpo_eval", "tiny", "--rewards", text)


def test_long_evaluations_say_how_long(monkeypatch, capsys):
    from ddpo_scratch.cli.drawing import resolved

    monkeypatch.setattr(cli, "_seconds", lambda denoiser, n, options: 240.0)
    options = resolved(cli.EvalOptions(num_steps=20, n=45))
    cli._tell_amount(None, options)
    told = capsys.readouterr().out
    assert told == "135 pictures: 45 of each of 3 lists; drawing takes about 4 min\n"
    cli._tell_amount(None, dataclasses.replace(options, n=2, prompts=("common_animals",)))
    assert capsys.readouterr().out == "2 pictures: 2 of each of 1 list\n"


def test_measuring_scores_no_more_pictures_than_are_drawn_at_a_time(monkeypatch):
    pictures, seen = torch.rand(5, 3, 8, 8), []

    def narrow(images, prompts, metadata):
        assert len(images) == len(prompts) == len(metadata)
        seen.append(len(images))
        return images.mean((1, 2, 3))

    monkeypatch.setattr(cli, "draw", lambda denoiser, prompts, options: pictures)
    options = cli.EvalOptions(n=5, batch_size=2)
    denoiser = type("Anything", (), dict(device="cpu"))
    *_, summary = cli._measure(denoiser, "common_animals", dict(narrow=narrow), options)
    assert seen == [2, 2, 1]
    assert summary["rewards"]["narrow"]["mean"] == pytest.approx(pictures.mean().item())


def test_an_evaluation_overwrites_none_before_it(tmp_path):
    def names():
        return [file.name for file in cli._free_files(tmp_path)]

    assert names() == ["ddpo_eval.json", "ddpo_eval.png"]
    (tmp_path / "ddpo_eval.png").touch()
    assert names() == ["ddpo_eval-002.json", "ddpo_eval-002.png"]
    (tmp_path / "ddpo_eval-002.json").touch()
    assert names() == ["ddpo_eval-003.json", "ddpo_eval-003.png"]


def test_prompts_come_with_the_metadata_of_their_draws(tmp_path, monkeypatch):
    (tmp_path / "numbered.py").write_text(
        "def fox(generator):\n    return 'a fox', {'n': 7}\nfox.prompts = ['a fox']\n"
    )
    prompts, metadata = cli._shuffled_prompts(f"{tmp_path}/numbered.py:fox", 3)
    assert prompts == ["a fox"] * 3 and metadata == [{"n": 7}] * 3


def test_two_evaluations_leave_two_and_say_what_the_model_does_not_know(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("a fox\na zyzzyva on Mars\n")
    words = f"tiny --prompts {tmp_path}/mine.txt --rewards redness --n 2 --num_steps 1".split()
    for name in ("ddpo_eval", "ddpo_eval-002"):
        assert cli.ddpo_eval([*words, "--out", str(tmp_path)]) == 0
        told = capsys.readouterr().out
        assert "note: the embedded model does not know 'zyzzyva'" in told
        assert f"wrote {tmp_path}/{name}.json and {tmp_path}/{name}.png" in told
        assert json.loads((tmp_path / f"{name}.json").read_text())["n"] == 2
