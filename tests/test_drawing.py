"Runs and LoRAs that are drawn from, and the files that pictures become."

import json

import pytest
import torch
from ddpo_scratch.cli import drawing
from ddpo_scratch.config import TrainConfig, write_config
from ddpo_scratch.cli.drawing import DrawOptions, resolved
from ddpo_scratch.models import sd
from loras import random_lora
from PIL import Image


def fused(folders, weights=None):
    "Return the weights of the queries with a mixture of LoRAs added to them."
    network = drawing.mix_loras(sd.load_pipeline("tiny"), folders, weights).unet
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


def test_as_many_weights_as_loras():
    with pytest.raises(ValueError, match="2 and 1: give a weight for each"):
        drawing.mix_loras(None, ["a", "b"], [1.0])


def a_run(folder, lora=True, **fields):
    "Make a folder that looks like a finished run's."
    folder.mkdir(parents=True)
    write_config(TrainConfig(**fields), folder)
    if lora:
        (folder / "pytorch_lora_weights.safetensors").touch()
    return str(folder)


def test_what_a_model_is_drawn_from_without_a_run():
    tiny, other = resolved(DrawOptions()), resolved(DrawOptions(model="owner/model"))
    assert (tiny.model, tiny.guidance_scale, tiny.num_steps, tiny.eta) == ("tiny", 3.0, 20, 1.0)
    assert (other.guidance_scale, other.num_steps, other.eta) == (5.0, 50, 1.0)


def test_a_run_brings_its_model_and_numbers(tmp_path):
    fields = dict(model="owner/model", sample_num_steps=7, eval_guidance_scale=2.0)
    run = a_run(tmp_path / "run", **fields, negative_prompts="blue", height=512, width=768)
    for given in (DrawOptions(lora=(run,)), DrawOptions(model=run)):
        options = resolved(given)
        assert (options.model, options.lora) == ("owner/model", (run,))
        assert (options.num_steps, options.guidance_scale) == (7, 2.0)
        assert (options.negative_prompt, options.height, options.width) == ("blue", 512, 768)
    options = resolved(DrawOptions(model="other/model", lora=(run,), num_steps=3, height=64))
    assert (options.model, options.num_steps, options.height) == ("other/model", 3, 64)


def test_a_lora_folder_of_older_runs_is_found(tmp_path):
    run = a_run(tmp_path / "run", lora=False)
    (tmp_path / "run" / "lora").mkdir()
    (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").touch()
    assert resolved(DrawOptions(lora=(run,))).lora == (run,)


def test_a_run_of_the_whole_network_is_its_pipeline(tmp_path):
    run = a_run(tmp_path / "run", lora=False, use_lora=False, model="owner/model")
    with pytest.raises(ValueError, match="no pipeline in .*nothing of it is saved"):
        resolved(DrawOptions(model=run))
    (tmp_path / "run" / "pipeline").mkdir()
    (tmp_path / "run" / "pipeline" / "model_index.json").touch()
    options = resolved(DrawOptions(model=run, lora=("other",)))
    assert (options.model, options.lora) == (f"{run}/pipeline", ("other",))
    with pytest.raises(ValueError, match=f"has no LoRA: give --model {run}"):
        resolved(DrawOptions(lora=(run,)))


def test_a_run_that_has_not_finished_names_the_commands(tmp_path):
    run = a_run(tmp_path / "run", lora=False)
    for name in ("epoch_0002", "epoch_0010", "epoch_best", "epoch_0011"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    for name in ("epoch_0002", "epoch_0010", "epoch_best"):
        (tmp_path / "run" / "checkpoints" / name / "state.json").touch()
    for given in (DrawOptions(lora=(run,)), DrawOptions(model=run)):
        with pytest.raises(ValueError) as error:
            resolved(given)
        assert f"`ddpo_train --resume_from {run}` goes on" in str(error.value)
        assert f"`ddpo_train --resume_from {run} --num_epochs 10` writes" in str(error.value)


def test_a_folder_with_a_space_is_quoted_in_commands(tmp_path):
    run = a_run(tmp_path / "my run", lora=False)
    with pytest.raises(ValueError, match="and nothing of it is saved"):
        resolved(DrawOptions(lora=(run,)))
    (tmp_path / "my run/checkpoints/epoch_0002").mkdir(parents=True)
    (tmp_path / "my run/checkpoints/epoch_0002/state.json").touch()
    with pytest.raises(ValueError, match=f"`ddpo_train --resume_from '{run}'` goes on"):
        resolved(DrawOptions(lora=(run,)))


def test_loras_of_different_models_do_not_mix(tmp_path):
    a = a_run(tmp_path / "a", model="owner/a")
    b = a_run(tmp_path / "b", model="owner/b")
    with pytest.raises(ValueError, match="do not mix: .*/a of owner/a, .*/b of owner/b"):
        resolved(DrawOptions(lora=(a, b)))
    assert resolved(DrawOptions(model="owner/c", lora=(a, b))).model == "owner/c"


def test_a_model_that_was_passed_from_python_must_be_given(tmp_path):
    run = a_run(tmp_path / "run", model="my_models:Mine")
    with pytest.raises(ValueError, match="passed from Python .my_models:Mine. .*give --model"):
        resolved(DrawOptions(lora=(run,)))


def test_unknown_words_are_asked_of_the_embedded_model_alone(tmp_path):
    denoiser = sd.denoiser_for(sd.load_pipeline("tiny"))
    assert drawing.unknown_words(denoiser, ["A Fox playing chess!", "2 cows"]) == ["cows"]
    denoiser.pipe.register_to_config(_name_or_path="owner/other")
    assert drawing.unknown_words(denoiser, ["spaceship"]) == []


@pytest.mark.parametrize("side,expected", [(8, 256), (64, 256), (100, 300), (256, 256), (300, 300)])
def test_small_pictures_are_enlarged(side, expected):
    assert drawing.enlarged(torch.rand(3, side, side)).size == (expected, expected)


def test_blocks_of_pixels_are_the_pixels():
    image = torch.rand(3, 20, 30)
    plain = drawing.enlarged(image, 1)
    large = drawing.enlarged(image, 3, "nearest")
    assert plain.size == (30, 20) and large.size == (90, 60)
    assert large.resize((30, 20), Image.NEAREST).tobytes() == plain.tobytes()


def test_a_png_says_how_it_was_drawn(tmp_path):
    from ddpo_scratch.cli.commands import SampleOptions

    options = SampleOptions(
        prompts=("füchse 狐",),
        model="m",
        lora=("a",),
        lora_weight=(0.5,),
        eta=0.0,
        out=str(tmp_path),
    )
    (path,) = drawing.write_pictures(torch.rand(1, 3, 8, 8), options.prompts, options)
    text = Image.open(path).text
    assert text["prompt"] == "füchse 狐" and text["model"] == "m" and text["eta"] == "0.0"
    assert json.loads(text["lora"]) == ["a"] and json.loads(text["lora_weight"]) == [0.5]
    assert set("seed index guidance_scale num_steps negative_prompt".split()) <= set(text)


@pytest.mark.parametrize("steer", ["best", "fk"])
def test_a_choice_is_what_steering_finds_and_its_first_candidate_what_is_drawn(steer, tmp_path):
    from ddpo_scratch.cli.commands import SampleOptions
    from ddpo_scratch.steering import best_of_n, fk_steering

    more = dict(steer=steer, strength=3.0, reward_fn="brightness", out=str(tmp_path))
    given = SampleOptions(prompts=("a fox",), num_steps=3, best_of=3, seed=5, batch_size=4, **more)
    options = drawing.resolved(given)
    denoiser, prompts = drawing.denoiser_of(options), ["a fox", "a cow"]
    found = drawing.draw_best(denoiser, prompts, "brightness", options)
    how = dict(n_steps=3, rule=1.0, seed=5, batch_size=4)
    if steer == "best":
        wanted = best_of_n(denoiser, prompts, "brightness", n=3, **how)
        drawn = drawing.draw(denoiser, prompts, options)
        first = denoiser.decode(wanted.candidates[:, 0])
        torch.testing.assert_close(first, drawn, atol=1e-5, rtol=0)
    else:
        more = dict(n_particles=3, n_scores=3, strength=3.0)
        wanted = fk_steering(denoiser, prompts, "brightness", **how, **more)
    assert torch.equal(found.images, wanted.images) and found.queries == wanted.queries
    path, _ = drawing.write_pictures(found.images, prompts, options, found.rewards)
    text = Image.open(path).text
    assert (text["reward_fn"], text["best_of"], text["steer"]) == ("brightness", "3", steer)
    assert float(text["reward"]) == found.rewards[0].item()
