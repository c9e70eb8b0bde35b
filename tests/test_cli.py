"The commands, as a user types them."
import dataclasses
import json
import subprocess
import sys

import pytest
from PIL import Image

from ddpo_scratch import cli
from ddpo_scratch.config import PRESETS, TrainConfig

TINY_RUN = "--num_epochs 1 --sample_num_steps 4 --sample_batch_size 4 --sample_num_batches_per_epoch 1 --train_batch_size 2 --eval_num_images 2 --sample_guidance_scale 1".split()


def run(command, *words):
    return subprocess.run([sys.executable, "-c", f"import sys; from ddpo_scratch.cli import {command}; sys.exit({command}())", *map(str, words)], capture_output=True, text=True)


def test_help_names_every_field_and_preset():
    text = cli.train_parser().format_help()
    assert all(f"--{f.name}" in text for f in dataclasses.fields(TrainConfig)) and all(p in text for p in PRESETS)
    assert run("ddpo_train", "--help").returncode == 0 and run("ddpo_sample", "--help").returncode == 0


def test_train_resume_and_sample(tmp_path):
    first = run("ddpo_train", "--logdir", tmp_path, *TINY_RUN)
    assert first.returncode == 0, first.stderr
    folder = tmp_path/"ddpo_is-jpeg_compressibility-001"
    assert {"before_after.png", "reward_curve.png", "metrics.jsonl", "config.yaml", "report.json", "lora"} <= {p.name for p in folder.iterdir()}
    assert (folder/"lora"/"pytorch_lora_weights.safetensors").is_file() and "fixed seeds" in first.stdout
    more = run("ddpo_train", "--resume_from", folder, "--num_epochs", 2)
    assert more.returncode == 0, more.stderr
    assert [json.loads(l)["epoch"] for l in (folder/"metrics.jsonl").read_text().splitlines()] == [1, 2]
    drawn = run("ddpo_sample", "a fox", "an owl", "--lora", folder, "--num_steps", 4, "--out", tmp_path/"pictures")
    assert drawn.returncode == 0, drawn.stderr
    assert sorted(p.name for p in (tmp_path/"pictures").iterdir()) == ["a_fox-0-0.png", "an_owl-0-1.png"]
    assert Image.open(tmp_path/"pictures"/"a_fox-0-0.png").size == (64, 64)


@pytest.mark.parametrize("words,message", [
    (["--preset", "tinny"], "unknown preset 'tinny'"), (["--reward_fn", "jpg"], "no reward called 'jpg'"), (["--prompt_fn", "animals"], "no prompts called 'animals'"),
    (["--model", "./nowhere"], "no model './nowhere'"), (["--sample_eta", "0"], "needs noise in every step"), (["--train_batch_size", "24"], "must be a multiple"),
    (["--resume_from", "nowhere"], "no checkpoint in 'nowhere'"), (["--prompt_fn", "missing.txt"], "no file")])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    assert cli.ddpo_train([*words, "--logdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err and "Traceback" not in err and not list(tmp_path.iterdir())


def test_wrong_lora_folder(capsys):
    assert cli.ddpo_sample(["a fox", "--lora", "nowhere"]) == 2 and "no LoRA in 'nowhere'" in capsys.readouterr().err
