"The embedded model's data and its measured quality."
import json
from pathlib import Path

import torch

from ddpo_scratch import tiny

LOG = Path(__file__).parents[1]/"experiments"/"tiny_quality.json"


def test_scenes_and_pictures_depend_on_the_generator_alone():
    make = lambda: tiny.compose(tiny.load_sprites(), tiny.draw_scenes(6, g := torch.Generator().manual_seed(3)), g)[0]
    a, b = make(), make()
    assert torch.equal(a, b) and a.shape == (6, 3, 64, 64) and a.min() >= 0 and a.max() <= 1


def test_every_caption_fits_the_text_encoder_and_every_word_is_a_token():
    from ddpo_scratch.sd import load_pipeline
    tokenizer = load_pipeline("tiny").tokenizer
    scenes = torch.cartesian_prod(torch.arange(77), torch.arange(5), torch.arange(9), torch.arange(3))
    words = {w for s in scenes for w in tiny.caption(s).split()}
    assert all(len(tokenizer.tokenize(w)) == 1 for w in words) and max(len(tiny.caption(s).split()) for s in scenes[::7]) <= 14


def test_rebuilt_tokenizer_has_the_shipped_tokens(tmp_path):
    shipped = json.loads((tiny.HERE/"tiny_model"/"tokenizer"/"vocab.json").read_text())
    assert set(tiny.make_tokenizer(tmp_path).get_vocab()) == set(shipped)


def test_measured_quality_meets_the_bars():
    rows = json.loads(LOG.read_text())["rows"]
    for row in rows:
        if row["group"] == "common animals" and "generated" in row["pictures"]: assert row["accuracy"] >= .9 and row["under_half"] == 0
        elif "generated" in row["pictures"]: assert row["accuracy"] >= .6
        else: assert row["accuracy"] >= .95
    assert len(rows) == 9


def test_a_build_that_was_interrupted_goes_on_from_whole_parts(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(tiny, "train_vae", lambda vae, *a: trained.append(1) or vae)
    monkeypatch.setattr(tiny, "train_unet", lambda unet, text, *a, **k: (unet, text))
    (tmp_path/"work"/"vae.part").mkdir(parents=True)  # what a stop while writing leaves
    for said in ("", "is kept: remove that folder to train it again"):
        tiny.build(tmp_path)
        assert trained == [1] and said in capsys.readouterr().out
    from diffusers import StableDiffusionPipeline
    assert StableDiffusionPipeline.from_pretrained(tmp_path).unet.config.sample_size == 16
