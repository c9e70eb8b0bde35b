"Models by name: where a name leads, which family drives a pipeline, and how large a model is."

import json

import pytest
import torch
from safetensors.torch import save_file
from sd_models import build

from ddpo_scratch.diffusion import GaussianDenoiser, Schedule
from ddpo_scratch.models import base, sd


def write_index(folder, pipeline):
    (folder / "model_index.json").write_text(json.dumps(dict(_class_name=pipeline)))
    return folder.as_posix()


def test_names_lead_to_folders_and_ids_of_the_hub(tmp_path):
    assert base.find_model("tiny") == str(sd.TINY)
    assert base.find_model("owner/model") == "owner/model"
    folder = write_index(tmp_path, "AnyPipeline")
    assert base.find_model(folder) == base.find_model(tmp_path) == folder


@pytest.mark.parametrize("name", ["./missing", "/missing", "~/missing", "sdxl", "a/b/c"])
def test_names_that_lead_nowhere(name):
    with pytest.raises(ValueError, match="expected 'tiny', a folder"):
        base.find_model(name)


def test_a_folder_without_a_model_is_not_taken_for_an_id_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a folder that holds model_index.json"):
        base.find_model("owner/model")


def test_each_class_is_loaded_by_its_family(tmp_path):
    for name, cls in (("sd21", sd.StableDiffusion), ("sdxl", sd.StableDiffusionXL)):
        build(name, tmp_path / name)
        options = dict(dtype=torch.float64, vae_dtype=torch.float32, slicing=True)
        denoiser = base.load(str(tmp_path / name), 2.0, "a cat", **options)
        assert type(denoiser) is cls
        assert (denoiser.guidance_scale, denoiser.negative_prompt) == (2.0, "a cat")
        pipe = denoiser.pipe
        assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float64, torch.float32)
        assert pipe.vae.use_slicing


def test_loading_by_name_gives_what_the_family_gives():
    x, t = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0)), torch.tensor([500])
    ours, theirs = base.load("tiny"), sd.denoiser_for(sd.load_pipeline("tiny"))
    with torch.no_grad():
        a, b = (d(x, t, d.encode(["a fox"])) for d in (ours, theirs))
    assert torch.equal(a, b)


def test_a_family_in_a_file_of_the_folder_is_found_by_itself(tmp_path, monkeypatch):
    "No list names it: a file beside models/sd.py is enough"
    (tmp_path / "line.py").write_text(
        "from ddpo_scratch.diffusion import GaussianDenoiser\n"
        "class Line(GaussianDenoiser):\n"
        "    pipelines = ('LinePipeline',)\n"
        "    @classmethod\n"
        "    def load(cls, source, guidance_scale, negative_prompt, **options):\n"
        "        return source, guidance_scale, negative_prompt, options\n"
        "    @classmethod\n"
        "    def sizes(cls, source):\n"
        "        return dict(network=7) if str(source).endswith('/line') else None\n"
    )
    monkeypatch.setattr(base.models, "__path__", [*base.models.__path__, str(tmp_path)])
    (tmp_path / "line").mkdir()
    folder = write_index(tmp_path / "line", "LinePipeline")
    options = dict(dtype=torch.float32, device="cpu", vae_dtype=None, slicing=False)
    assert base.load(folder, 3.0, "no") == (folder, 3.0, "no", options)
    assert base.sizes(folder) == dict(network=7) and base.sizes("tiny")["network"] == 5_599_652


def test_a_class_of_ones_own_counts_and_its_children_do_not_inherit_the_pipelines(tmp_path):
    class Own(GaussianDenoiser):
        pipelines = ("OwnPipeline",)

        @classmethod
        def load(cls, source, *args, **options):
            return cls(Schedule(torch.linspace(0.99, 0.01, 10).double()))

    class Child(Own):
        pass

    assert base.families()["OwnPipeline"] is Own and Child not in base.families().values()
    assert type(base.load(write_index(tmp_path, "OwnPipeline"))) is Own


def test_other_classes_are_told_so_before_their_weights_are_read(tmp_path):
    with pytest.raises(
        ValueError, match="is a KolorsPipeline: expected one of .*StableDiffusionXL"
    ):
        base.load(write_index(tmp_path, "KolorsPipeline"))


@pytest.mark.parametrize("name", ["owner/unheard-of", "no/such/folder", "./missing"])
def test_the_size_of_an_unknown_model_is_unknown(name):
    assert base.sizes(name) is None


# Places


def test_a_revision_belongs_to_an_id_of_the_hub(tmp_path, monkeypatch):
    assert base.find_model("owner/model@v2") == "owner/model@v2"
    assert base.split_revision("owner/model@refs/pr/1") == ("owner/model", "refs/pr/1")
    folder = tmp_path / "me@home"
    folder.mkdir()
    write_index(folder, "AnyPipeline")
    assert base.split_revision(base.find_model(folder)) == (str(folder), None)
    seen = []

    def load_config(name, revision=None):
        seen.append((name, revision))
        return dict(_class_name="AnyPipeline")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", load_config)
    for options in (dict(name="owner/model@v2"), dict(name="owner/model", revision="v2")):
        with pytest.raises(ValueError, match="is a AnyPipeline: expected one of"):
            base.load(**options)
    assert seen == [("owner/model", "v2")] * 2
    assert base.sizes("CompVis/stable-diffusion-v1-4@v2")["network"] == 859_520_964
    with pytest.raises(ValueError, match="no model 'tiny@v2'"):
        base.load("tiny", revision="v2")


def test_a_run_that_trained_a_whole_network_is_a_model(tmp_path):
    (tmp_path / "pipeline").mkdir()
    build("sd15", tmp_path / "pipeline")
    assert base.find_model(tmp_path) == str(tmp_path / "pipeline")
    assert base.load(tmp_path).name == str(tmp_path / "pipeline")
    assert base.sizes(tmp_path)["side"] == 8


@pytest.mark.parametrize("place", ["", "lora"])
def test_a_folder_with_a_lora_is_told_from_a_model(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(ValueError, match="this folder holds a LoRA: name the model"):
        base.find_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"_class_name": ["a", "B"]}'])
def test_an_index_without_a_class_is_one_line(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match="names no pipeline|is damaged") as caught:
        base.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="download it elsewhere and give its folder") as caught:
        base.load("owner/unheard-of")
    assert "\n" not in str(caught.value)


def test_a_file_that_no_family_reads(tmp_path):
    save_file({"some.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"\x10")
    for name, message in (("a", "is not a checkpoint that any family reads"), ("b", "is damaged")):
        with pytest.raises(ValueError, match=message):
            base.load(tmp_path / f"{name}.safetensors")


# Sizes of pictures


def test_pictures_of_another_size_are_asked_for_by_name(tmp_path):
    assert base.load("tiny", height=32, width=96).latent_shape == (4, 8, 24)
    assert base.load("tiny", width=96).latent_shape == (4, 16, 24)

    class OneSize(GaussianDenoiser):
        pipelines = ("OneSizePipeline",)

        @classmethod
        def load(cls, source, *args, **options):
            return cls(Schedule(torch.linspace(0.99, 0.01, 10).double()))

    folder = write_index(tmp_path, "OneSizePipeline")
    assert type(base.load(folder)) is OneSize
    with pytest.raises(ValueError, match="draws one size only: leave height and width at 0"):
        base.load(folder, height=64)


def test_our_own_reading_and_writing_shows_no_bars(tmp_path, capfd):
    "And what others load afterwards shows them as before."
    import diffusers
    import transformers
    from huggingface_hub import utils as hub

    logs = [library.utils.logging for library in (diffusers, transformers)]
    shown = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.enable_progress_bar()
    try:
        denoiser = base.load("tiny")
        denoiser.save(tmp_path)
        assert "it/s]" not in capfd.readouterr().err
        assert all(log.is_progress_bar_enabled() for log in logs)
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
        assert "it/s]" in capfd.readouterr().err
        with pytest.raises(KeyError), base.quiet_bars():
            assert not any(log.is_progress_bar_enabled() for log in logs)
            assert not hub.are_progress_bars_disabled()  # of downloads
            raise KeyError
        hub.disable_progress_bars()
        with base.quiet_bars():
            pass
        assert hub.are_progress_bars_disabled()
    finally:
        for log, was in zip(logs, shown):
            (log.enable_progress_bar if was else log.disable_progress_bar)()


def test_a_model_that_is_no_longer_that_of_its_place_is_asked_for_again():
    "A run on a fused LoRA was filed as its base model, and resumed on that."
    from ddpo_scratch.named import name_of, was_passed

    own = base.load("tiny")
    assert name_of(own) == "tiny"
    own.trainable(2)
    assert name_of(own) == "tiny"  # a LoRA is what a run trains
    fused = base.load("tiny")
    with torch.no_grad():
        fused.bare.conv_in.weight.mul_(1.01)
    assert was_passed(name_of(fused)) and fused.name == "tiny"
    with pytest.raises(ValueError, match="was passed from Python .* pass it again as denoiser="):
        base.load(name_of(fused))
    for name in ("owner/model(...)", "/some/folder(...)"):
        with pytest.raises(ValueError, match="was passed from Python"):
            base.find_model(name)
    wrapped = sd.StableDiffusion(sd.load_pipeline("tiny"))
    assert name_of(wrapped) == "tiny"
    wrapped.resize(128, 64)
    assert was_passed(name_of(wrapped))
