"The commands, as a user types them."
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpo_scratch import cli
from ddpo_scratch.config import PRESETS, TrainConfig

TINY_RUN = "--num_epochs 1 --sample_num_steps 4 --sample_batch_size 4 --sample_num_batches_per_epoch 1 --train_batch_size 2 --eval_num_images 2 --sample_guidance_scale 1".split()


def run(command, *words):
    return subprocess.run([sys.executable, "-c", f"import sys; from ddpo_scratch.cli import {command}; sys.exit({command}())", *map(str, words)], capture_output=True, text=True)


def test_help_names_every_field_and_preset():
    text = cli.train_parser().format_help()
    assert all(f"--{f.name}" in text for f in dataclasses.fields(TrainConfig)) and all(p in text for p in PRESETS)
    assert run("ddpo_train", "--help").returncode == 0


def test_train_resume_and_sample(tmp_path):
    first = run("ddpo_train", "--logdir", tmp_path, *TINY_RUN)
    assert first.returncode == 0, first.stderr
    assert "\r" not in first.stdout and "\nepoch 1: reward" in first.stdout                 # no bar in a log
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
    assert cli.ddpo_eval([str(folder), "--prompts", "other_animals", "--n", "3", "--base", "--rewards", "jpeg_compressibility", "0.5*brightness", "--num_steps", "4"]) == 0
    found = json.loads((folder/"ddpo_eval.json").read_text())
    assert set(found["lists"]) == {"other_animals", "other_animals, base"} and found["lora"] == [str(folder)] and found["model"] == "tiny" and (folder/"ddpo_eval.png").is_file()
    tuned, base = (found["lists"][k]["rewards"]["jpeg_compressibility"] for k in ("other_animals", "other_animals, base"))
    assert tuned["mean"] != base["mean"] and abs(tuned["mean"] - base["mean"]) < 1 and base["se"] > 0


@pytest.mark.parametrize("words,message", [
    (["--preset", "tinny"], "unknown preset 'tinny'"), (["--reward_fn", "jpg"], "no reward called 'jpg'"), (["--prompt_fn", "animals"], "no prompts called 'animals'"),
    (["--model", "./nowhere"], "no model './nowhere'"), (["--sample_eta", "0"], "needs noise in every step"), (["--train_batch_size", "24"], "must be a multiple"),
    (["--resume_from", "nowhere"], "no checkpoint in 'nowhere'"), (["--prompt_fn", "missing.txt"], "no file")])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    assert cli.ddpo_train([*words, "--logdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err and "Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words,message", [
    (["--n", "1"], "a standard error needs at least 2"), (["--base"], "there is none"), (["no/such/model"], "no model 'no/such/model'"), (["--rewards", "brightnes"], "did you mean brightness"),
    (["--prompts", "animals"], "no prompts called 'animals'"), (["--lora", "a", "--lora", "b", "--lora_weight", "1"], "2 LoRAs and 1 weights")])
def test_mistakes_of_an_evaluation(tmp_path, capsys, words, message):
    assert cli.ddpo_eval([*words, "--out", str(tmp_path/"out")]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err and not (tmp_path/"out").exists()


def test_a_file_lies_under_the_options_and_over_the_preset(tmp_path, capsys):
    path = tmp_path/"mine.yaml"
    path.write_text("preset: tiny_rwr\nnum_epochs: 7\ntrain_learning_rate: 1e-3\nseed: 5\n")
    c = cli.parse_train(["--config", str(path), "--seed", "6"])
    assert (c.method, c.num_epochs, c.train_learning_rate, c.seed) == ("rwr", 7, 1e-3, 6)
    assert cli.parse_train(["--config", str(path), "--preset", "tiny_sf", "--train_batch_size", "64"]).method == "ddpo_sf"
    path.write_text("num_epoch: 7\n")
    assert cli.ddpo_train(["--config", str(path)]) == 2 and "unknown field 'num_epoch': did you mean num_epochs" in capsys.readouterr().err
    assert cli.ddpo_train(["--config", str(tmp_path/"none.yaml")]) == 2 and "no file" in capsys.readouterr().err


def test_a_true_or_false_option_may_stand_alone():
    c = cli.parse_train(["--compile", "--gradient_checkpointing", "false", "--push_to_hub", "true"])
    assert (c.compile, c.gradient_checkpointing, c.push_to_hub) == (True, False, True)


@pytest.mark.parametrize("name", PRESETS)
def test_dry_run_of_every_preset(tmp_path, capsys, name):
    assert cli.ddpo_train(["--preset", name, "--dry_run", "--logdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "effective batch" in out and "memory, estimated" in out and "reward queries" in out and not list(tmp_path.iterdir())


def test_dry_run_is_for_as_many_processes_as_are_meant(capsys, monkeypatch):
    assert cli.ddpo_train("--preset ddpo_pytorch_alignment --dry_run --world 6".split()) == 0 and "288 (48 on each of 6 processes)" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli.parse_train(["--preset", "ddpo_pytorch_aesthetic"]).sample_num_batches_per_epoch == 4
    assert cli.ddpo_train("--preset trl_ddpo --dry_run".split()) == 2 and "3 x 1 = 3 cannot be shared out among 8 processes" in capsys.readouterr().err


def test_two_threads_where_there_are_two(monkeypatch):
    before, seen = torch.get_num_threads(), []
    try:
        for set_to, n in ((None, min(2, os.cpu_count())), ("1", 1)):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False) if set_to is None else monkeypatch.setenv("OMP_NUM_THREADS", set_to)
            torch.set_num_threads(1)
            cli._command(lambda args: seen.append((torch.get_num_threads(), n)), [])
    finally: torch.set_num_threads(before)
    assert all(got == n for got, n in seen) and len(seen) == 2


def test_loras_of_two_rewards_mix(tmp_path, capsys):
    "Weights 1 and 0 are the first alone, in diffusers' own call too; half and half is between."
    from ddpo_scratch import sd
    from ddpo_scratch.evaluate import fixed_seed_images
    for k in (1, 2):
        den = sd.denoiser_for(sd.load_pipeline("tiny"))
        with torch.no_grad():
            for i, p in enumerate(sd.add_lora(den, rank=4, seed=k)): p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100*k + i))*.1)
        sd.save_lora(den, tmp_path/str(k))
    def weight(folders, weights=None):
        unet = cli.mix_loras(sd.load_pipeline("tiny"), folders, weights).unet
        unet.fuse_lora()
        return {n: p.detach().clone() for n, p in unet.named_parameters() if n.endswith("to_q.base_layer.weight")}
    a, b, base = tmp_path/"1", tmp_path/"2", {n.replace("to_q.", "to_q.base_layer."): p for n, p in sd.load_pipeline("tiny").unet.named_parameters() if n.endswith("to_q.weight")}
    one, two, half, off = weight([a]), weight([b]), weight([a, b], [.5, .25]), weight([a, b], [1., 0.])
    assert len(one) == len(base) > 4
    for n in one:
        assert torch.allclose(off[n], one[n], atol=1e-6) and (one[n] - base[n]).abs().max() > .01
        assert torch.allclose(half[n] - base[n], .5*(one[n] - base[n]) + .25*(two[n] - base[n]), atol=1e-5)
    assert cli.ddpo_sample(["a fox", "--lora", str(a), "--lora", str(b), "--lora_weight", ".5", ".5", "--negative_prompt", "a cat", "--num_steps", "3", "--out", str(tmp_path/"out")]) == 0
    assert (tmp_path/"out"/"a_fox-0-0.png").is_file()


def test_a_negative_prompt_changes_the_picture(tmp_path):
    drawn = []
    for i, more in enumerate(([], ["--negative_prompt", ""], ["--negative_prompt", "a cat"])):
        assert cli.ddpo_sample(["a fox", "--num_steps", "3", "--out", str(tmp_path/str(i)), *more]) == 0
        drawn.append(Image.open(tmp_path/str(i)/"a_fox-0-0.png").tobytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_wrong_lora_folder(capsys):
    assert cli.ddpo_sample(["a fox", "--lora", "nowhere"]) == 2 and "no LoRA in 'nowhere'" in capsys.readouterr().err


def test_a_reward_that_fails_stops_with_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path/"failing.py").write_text("def reward(images, prompts, metadata): raise ConnectionError('no answer')\n")
    monkeypatch.syspath_prepend(tmp_path)
    code = cli._command(cli._train, ["--reward_fn", "failing:reward", "--logdir", str(tmp_path/"runs"), "--sample_num_steps", "2", "--sample_batch_size", "4", "--eval_num_images", "0", "--stop_gain", "0"])
    told, said = capsys.readouterr()
    assert code == 2 and "error: reward 'reward' failed on 4 pictures" in said and "ConnectionError: no answer" in said and "resume" not in said
    assert "stopped in epoch 1; no epoch was finished, so nothing is saved" in told


def test_a_reward_in_the_current_folder_is_found_by_the_installed_command(tmp_path):
    (tmp_path/"mine.py").write_text("def reward(images, prompts, metadata): return images.mean((1, 2, 3)), {}\n")
    command = Path(sys.executable).with_name("ddpo_eval")
    done = subprocess.run([command, "tiny", "--rewards", "mine:reward", "--prompts", "common_animals", "--n", "2", "--num_steps", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine:reward" in (tmp_path/"ddpo_eval.json").read_text()


def test_pictures_of_a_run_are_drawn_as_the_run_draws_them(tmp_path, monkeypatch):
    from ddpo_scratch import sd
    from ddpo_scratch.config import write_config
    den = sd.denoiser_for(sd.load_pipeline("tiny"))
    sd.add_lora(den, 2)
    sd.save_lora(den, tmp_path/"lora")
    write_config(TrainConfig(sample_num_steps=3, eval_guidance_scale=1.5, sample_eta=.5, negative_prompts="a cat"), tmp_path)
    seen = []
    monkeypatch.setattr("ddpo_scratch.evaluate.fixed_seed_images", lambda den, prompts, seed, steps, eta: seen.append((den.guidance_scale, den.negative_prompt, steps, eta)) or torch.zeros(len(prompts), 3, 8, 8))
    for more in ([], ["--num_steps", "2", "--guidance_scale", "3", "--eta", "1", "--negative_prompt", ""]):
        assert cli.ddpo_sample(["a fox", "--lora", str(tmp_path), "--out", str(tmp_path/"out"), *more]) == 0
    assert seen == [(1.5, "a cat", 3, .5), (3., "", 2, 1.)]


def test_a_command_that_trains_nothing_promises_nothing(monkeypatch, capsys):
    def stopped(args): raise KeyboardInterrupt
    assert cli._command(stopped, []) == 2 and capsys.readouterr().err == "stopped\n"
