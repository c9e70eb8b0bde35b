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
from PIL import Image

from ddpo_scratch import cli
from ddpo_scratch.config import TrainConfig, preset_names, write_config
from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.models import sd

FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]
TINY_RUN = """--num_epochs 1 --sample_num_steps 4 --sample_batch_size 4 --train_batch_size 2
--sample_num_batches_per_epoch 1 --eval_num_images 2 --sample_guidance_scale 1""".split()
COMMANDS = ("ddpo_train", "ddpo_sample", "ddpo_eval")


def run(command, *words):
    "Run a command in a process of its own."
    script = f"import sys; from ddpo_scratch.cli import {command}; sys.exit({command}())"
    words = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True)


def help_of(command, capsys, monkeypatch, *words):
    "Return a command's help, on one line."
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        getattr(cli, command)([*words, "--help"])
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    return " ".join(" ".join(line.strip("│ ") for line in lines).split())


def mistake(capsys, command, *words):
    "Return the one line that a command says of a mistake."
    assert getattr(cli, command)([*map(str, words)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    return message


# Help


def test_help_names_every_field_and_preset(capsys, monkeypatch):
    text = help_of("ddpo_train", capsys, monkeypatch)
    for name in FIELDS:
        assert f"--{name}" in text
    for name in preset_names():
        assert name in text


def test_help_shows_the_comments_beside_and_above_fields(capsys, monkeypatch):
    text = help_of("ddpo_train", capsys, monkeypatch)
    assert "--num_epochs INT epochs at most (default: 20)" in text
    assert "--lora_targets {attention,all}" in text
    assert "PPO's clip range; 0 picks 1e-4 scaled from 16,384 latent dimensions" in text
    assert "--compile [true|false]" in text
    assert "(default: the launcher's WORLD_SIZE, or 1)" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command, capsys, monkeypatch):
    "An option without a comment shows its type and its default alone."
    text = help_of(command, capsys, monkeypatch)
    options = re.split(r" --(?=[a-z])", text)
    assert len(options) > 8
    for option in options[1:]:
        _, *words = option.split("(")[0].split()
        assert len(words) > 1, option


def test_help_shows_the_values_of_the_preset(capsys, monkeypatch):
    text = help_of("ddpo_train", capsys, monkeypatch, "--preset", "tiny_rwr")
    assert "(default: rwr)" in text and "(default: ddpo_is)" not in text


@pytest.mark.parametrize("command", ("ddpo_sample", "ddpo_eval"))
def test_help_says_what_a_run_decides(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    assert "denoising steps; without a run, 20 for tiny, else 50 (default: the run's)" in text
    assert "--lora FOLDER a run's folder" in text


def test_help_says_what_a_model_is_drawn_from_without_a_run():
    tiny, other = cli._usual_numbers("tiny", None), cli._usual_numbers("owner/model", None)
    assert (tiny["guidance_scale"], tiny["num_steps"], tiny["eta"]) == (3.0, 20, 1.0)
    assert (other["guidance_scale"], other["num_steps"], other["eta"]) == (5.0, 50, 1.0)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_process_ends_well_after_help(command):
    done = run(command, "--help")
    assert done.returncode == 0 and command in done.stdout and not done.stderr


# Options over file over run over preset


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


def test_options_lie_over_a_file_over_the_run_that_is_resumed(tmp_path):
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "epoch_0001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    for place in (folder, checkpoint):
        write_config(TrainConfig(num_epochs=3, seed=4, lora_rank=2), place)
    path = tmp_path / "mine.yaml"
    path.write_text("num_epochs: 7\nseed: 5\n")
    words = ["--config", str(path), "--seed", "6", "--resume_from", str(folder)]
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


@pytest.mark.parametrize("word,value", cli._TRUTH.items())
def test_words_for_true_and_false(word, value):
    for spelling in (word, word.upper()):
        assert cli.parse_train(["--use_lora", spelling]).use_lora is value


# Mistakes


@pytest.mark.parametrize(
    "words,message",
    [
        ("--num_epoch 3", "--num_epochs"),
        ("--num_epochs three", "--num_epochs"),
        ("--num_epochs", "--num_epochs"),
        ("--use_lora maybe", "--use_lora"),
        ("--use_lora true false", "--use_lora"),
        ("--mixed_precision fp8", "--mixed_precision"),
        ("--world two", "--world"),
        ("stray", "stray"),
    ],
)
def test_words_that_do_not_fit_end_with_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.ddpo_train(words.split())
    told = capsys.readouterr()
    assert exit.value.code == 2 and message in told.err and not told.out


@pytest.mark.parametrize(
    "words,message",
    [
        (["--preset", "tinny"], "unknown preset 'tinny'"),
        (["--method", "ppo"], "'ppo'"),
        (["--lora_rank", "0"], "lora_rank is 0"),
        (["--world", "0"], "--world is 0"),
        (["--reward_fn", "jpg"], "'jpg'"),
        (["--prompt_fn", "animals"], "'animals'"),
        (["--model", "./nowhere"], "no model './nowhere'"),
        (["--sample_eta", "0"], "needs noise in every step"),
        (["--train_batch_size", "24"], "must be a multiple"),
        (["--resume_from", "nowhere"], "no checkpoint in 'nowhere'"),
        (["--prompt_fn", "missing.txt"], "no file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, words, message):
    assert message in mistake(capsys, "ddpo_train", *words, "--logdir", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words,message",
    [
        (["--n", "1"], "a standard error needs at least 2"),
        (["--base"], "there is none"),
        (["no/such/model"], "no/such/model"),
        (["--rewards", "brightnes"], "did you mean brightness"),
        (["--prompts", "animals"], "'animals'"),
        (["--lora", "a", "--lora", "b", "--lora_weight", "1"], "2 LoRAs and 1 weights"),
    ],
)
def test_mistakes_of_an_evaluation(tmp_path, capsys, words, message):
    assert message in mistake(capsys, "ddpo_eval", *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "no prompt: give one or more"),
        (["a fox", "--n", "0"], "--n is 0, but must be at least 1"),
        (["a fox", "--lora", "nowhere"], "no LoRA in 'nowhere'"),
    ],
)
def test_mistakes_of_drawing(capsys, words, message):
    assert message in mistake(capsys, "ddpo_sample", *words)


def test_a_reward_that_fails_stops_with_one_line(tmp_path, monkeypatch, capsys):
    code = "def reward(images, prompts, metadata): raise ConnectionError('no answer')\n"
    (tmp_path / "failing.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    words = "--reward_fn failing:reward --sample_num_steps 2 --sample_batch_size 4".split()
    words += "--eval_num_images 0 --stop_gain 0".split()
    assert cli.ddpo_train([*words, "--logdir", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr()
    assert "error: reward 'reward' failed on 4 pictures" in told.err
    assert "ConnectionError: no answer" in told.err and "resume" not in told.err
    assert "stopped in epoch 1; no epoch was finished, so nothing is saved" in told.out


def test_a_command_that_trains_nothing_promises_nothing(capsys):
    def stopped(args):
        raise KeyboardInterrupt

    assert cli._command(stopped)([]) == 2
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("setting,threads", [(None, min(2, os.cpu_count())), ("1", 1)])
def test_two_threads_where_there_are_two(monkeypatch, setting, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    try:
        torch.set_num_threads(1)
        assert cli._command(lambda args: torch.get_num_threads())([]) == threads
    finally:
        torch.set_num_threads(before)


# Dry runs


@pytest.mark.parametrize("name", preset_names())
def test_dry_run_of_every_preset(tmp_path, capsys, name):
    assert cli.ddpo_train(["--preset", name, "--dry_run", "--logdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in ("effective batch", "memory, estimated", "reward queries"):
        assert part in out
    assert not list(tmp_path.iterdir())


def test_dry_run_is_for_as_many_processes_as_are_meant(capsys, monkeypatch):
    words = "--preset ddpo_pytorch_alignment --dry_run".split()
    assert cli.ddpo_train([*words, "--world", "6"]) == 0
    assert "288 (48 on each of 6 processes)" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert cli.ddpo_train(words) == 0
    assert "288 (48 on each of 6 processes)" in capsys.readouterr().out


# Runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of one epoch, and what its process printed."
    logdir = tmp_path_factory.mktemp("runs")
    done = run("ddpo_train", "--logdir", logdir, *TINY_RUN)
    assert done.returncode == 0, done.stderr
    return logdir / "ddpo_is-jpeg_compressibility-001", done.stdout


def test_training_leaves_files_and_says_what_it_did(trained):
    folder, out = trained
    assert "\r" not in out and "\nepoch 1: reward" in out  # no bar in a log
    assert "fixed seeds, 2 pictures: reward" in out and f"wrote {folder}" in out
    names = {path.name for path in folder.iterdir()}
    assert {"before_after.png", "reward_curve.png", "metrics.jsonl", "config.yaml"} <= names
    assert (folder / "report.json").is_file()
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_a_run_is_drawn_from_and_measured(trained, tmp_path):
    folder, _ = trained
    words = ["a fox", "an owl", "--lora", folder, "--num_steps", 4, "--out", tmp_path]
    assert cli.ddpo_sample([*map(str, words)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a_fox-0-0.png", "an_owl-0-1.png"}
    assert Image.open(tmp_path / "a_fox-0-0.png").size == (64, 64)
    words = "--base --prompts other_animals --n 3 --num_steps 4 --rewards".split()
    assert cli.ddpo_eval([str(folder), *words, "jpeg_compressibility", "0.5*brightness"]) == 0
    record = json.loads((folder / "ddpo_eval.json").read_text())
    assert list(record["lists"]) == ["other_animals", "other_animals, base"]
    assert (record["model"], record["lora"]) == ("tiny", [str(folder)])
    assert (folder / "ddpo_eval.png").is_file()
    tuned, base = (x["rewards"]["jpeg_compressibility"] for x in record["lists"].values())
    assert tuned["mean"] != base["mean"] and abs(tuned["mean"] - base["mean"]) < 1
    assert base["se"] > 0


def test_a_run_is_resumed(tmp_path):
    assert cli.ddpo_train([*TINY_RUN, "--logdir", str(tmp_path)]) == 0
    folder = tmp_path / "ddpo_is-jpeg_compressibility-001"
    assert cli.ddpo_train(["--resume_from", str(folder), "--num_epochs", "2"]) == 0
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert [row["epoch"] for row in rows] == [1, 2]


def test_a_reward_in_the_current_folder_is_found_by_the_installed_command(tmp_path):
    code = "def reward(images, prompts, metadata): return images.mean((1, 2, 3)), {}\n"
    (tmp_path / "mine.py").write_text(code)
    command = Path(sys.executable).with_name("ddpo_eval")
    words = "tiny --rewards mine:reward --prompts common_animals --n 2 --num_steps 2".split()
    done = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine:reward" in (tmp_path / "ddpo_eval.json").read_text()


# Drawing


def random_lora(seed, folder):
    "Save a LoRA whose B is not zero."
    denoiser = sd.denoiser_for(sd.load_pipeline("tiny"))
    for i, p in enumerate(sd.add_lora(denoiser, rank=4, seed=seed)):
        generator = torch.Generator().manual_seed(100 * seed + i)
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    sd.save_lora(denoiser, folder)
    return folder


def fused(folders, weights=None):
    "Return the weights of the queries with a mixture of LoRAs added to them."
    network = cli.mix_loras(sd.load_pipeline("tiny"), folders, weights).unet
    network.fuse_lora()
    end = "to_q.base_layer.weight"
    return {k: p.detach().clone() for k, p in network.named_parameters() if k.endswith(end)}


def test_loras_of_two_rewards_mix(tmp_path):
    "Weights 1 and 0 are the first alone; a half and a quarter add as the formula says."
    a, b = random_lora(1, tmp_path / "1"), random_lora(2, tmp_path / "2")
    plain = dict(sd.load_pipeline("tiny").unet.named_parameters())
    one, two = fused([a]), fused([b])
    half, off = fused([a, b], [0.5, 0.25]), fused([a, b], [1.0, 0.0])
    assert len(one) > 4
    for name, weight in one.items():
        base = plain[name.replace(".base_layer", "")]
        assert (weight - base).abs().max() > 0.01
        assert torch.allclose(off[name], weight, atol=1e-6)
        mixed = 0.5 * (weight - base) + 0.25 * (two[name] - base)
        assert torch.allclose(half[name] - base, mixed, atol=1e-5)


def test_mixed_loras_draw(tmp_path):
    a, b = random_lora(1, tmp_path / "1"), random_lora(2, tmp_path / "2")
    words = f"--lora {a} --lora {b} --num_steps 3 --out {tmp_path} --lora_weight".split()
    assert cli.ddpo_sample(["a fox", *words, ".5", ".5"]) == 0
    pipe = cli.mix_loras(sd.load_pipeline("tiny"), [a, b], [0.5, 0.5])
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

    def draw(denoiser, prompts, seed, n_steps, rule):
        calls.append((denoiser.guidance_scale, denoiser.negative_prompt, n_steps, rule))
        return torch.zeros(len(prompts), 3, 8, 8)

    monkeypatch.setattr(cli, "fixed_seed_images", draw)
    words = ["a fox", "--lora", str(tmp_path), "--out", str(tmp_path / "out"), *more.split()]
    assert cli.ddpo_sample(words) == 0
    assert calls == [expected]
