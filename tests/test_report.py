"The report of a run: numbers, pictures, page, card, and what is uploaded."

import dataclasses
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_scratch.run import report as R
from ddpo_scratch.config import TrainConfig
from ddpo_scratch.evaluate import summarize
from ddpo_scratch.run.runlog import RunLog

PICTURES = {"reward_curve.png", "curves.png", "before_after.png", "strip.png", "strip.gif"}


def row(epoch, **more):
    "An epoch of a run that goes well."
    rewards = dict(reward_std=0.3, reward_min=-3.0, reward_max=-1.0)
    return dict(
        epoch=epoch, reward_queries=64 * epoch, reward_mean=-2 + 0.1 * epoch, **rewards, **more
    )


def save_look(folder, epoch, n, **changes):
    "What a look leaves: n random pictures with prompts, rewards and a judge's scores."
    generator = torch.Generator().manual_seed(epoch)
    images = torch.rand(n, 3, 8, 8, generator=generator).mul(255).round().byte()
    rewards = -3.0 + epoch + torch.linspace(-0.5, 0.5, n)
    prompts = [f"animal {i}" for i in range(n)]
    record = dict(images=images, prompts=prompts, rewards=rewards, judges=dict(clip=rewards / 9))
    torch.save(record | changes, folder / f"eval/epoch_{epoch:04d}.pt")


def finished(folder, config=None, epochs=3, n=3, evaluated=(0, 3)):
    "A run's folder, as training leaves it, without weights."
    log = RunLog(folder, config or TrainConfig())
    for epoch in range(1, epochs + 1):
        log.row(row(epoch, grad_norm=0.1, eval_start=-3.0, eval_reward_mean=-3.0 + epoch))
    (folder / "eval").mkdir(exist_ok=True)
    for epoch in evaluated:
        save_look(folder, epoch, n)
    return folder


def readme(folder):
    "The card as text."
    return (folder / "README.md").read_text(encoding="utf-8")


# The report.


def test_report_has_every_part_and_ignores_evaluations_after_its_last_epoch(tmp_path):
    folder = finished(tmp_path / "run", n=5, evaluated=(0, 1, 3, 4))
    report = R.write_report(folder, TrainConfig(), "quiet")
    texts = {"report.json", "report.html", "README.md"}
    others = {"environment.json", "command.txt", "config.yaml", "metrics.jsonl", "eval"}
    assert {path.name for path in folder.iterdir()} == PICTURES | texts | others
    assert set(report["files"]) == PICTURES | texts
    assert report == json.loads((folder / "report.json").read_text())
    numbers = {"before", "after", "difference", "gain", "judges"}
    assert set(report) == numbers | {"epochs", "unit", "findings", "fallen", "files"}
    assert report["epochs"] == 3 and report["gain"] == pytest.approx(1)
    assert report["before"]["reward_mean"] == pytest.approx(-3)
    look = torch.load(folder / "eval/epoch_0003.pt", weights_only=True)
    assert report["after"] == dict(epoch=3) | summarize(look["images"] / 255, look["rewards"])
    # every picture's reward rose by the same amount
    assert report["difference"]["mean"] == pytest.approx(3, abs=1e-6)
    assert report["difference"]["se"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "n, height, width, size", [(4, 64, 128, (768, 120)), (5, 30, 20, (768, 600))]
)
def test_the_animation_keeps_the_shape_of_pictures(n, height, width, size):
    images = torch.zeros(n, 3, height, width)
    images[:, :, : height // 2] = 1
    frame = R._frame(images, "")
    assert frame.size == size
    white = (np.asarray(frame)[24:, 0] == 255).all(-1).sum()
    rows = -(-n // 4)
    assert white == rows * round(192 * height / width / 2)


def test_pictures_are_wide_enough(tmp_path):
    folder = finished(tmp_path / "run", n=5, evaluated=(0, 1, 3))
    R.write_report(folder, TrainConfig(), "quiet")
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width >= 720, path.name
    with Image.open(folder / "strip.gif") as animation:
        # two rows of 192 pixels under 24 of title; the last frame's copies are one long frame
        assert animation.size == (768, 408)
        assert (animation.n_frames, animation.info["loop"]) == (3, 0)


@pytest.mark.parametrize("n, evaluated", [(1, range(41)), (20, (0, 40))])
def test_report_of_any_number_of_pictures_and_of_many_evaluations(tmp_path, n, evaluated):
    folder = finished(tmp_path / "run", epochs=40, n=n, evaluated=evaluated)
    report = R.write_report(folder, TrainConfig())
    assert report["before"]["n"] == report["judges"]["clip"]["n"] == n
    text = (folder / "report.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    looks, notes = R._read_looks(folder, 40)
    epochs = [look.epoch for look in looks]
    assert notes == []
    assert epochs[0] == 0 and epochs[-1] == 40 and epochs == sorted(set(epochs))
    assert len(epochs) == min(24, len(evaluated))


def test_report_without_pictures_or_epochs(tmp_path):
    folder = tmp_path / "run"
    log = RunLog(folder, TrainConfig())
    report = R.write_report(folder, TrainConfig())
    assert report["epochs"] == 0 and "after" not in report and "judges" not in report
    assert report == json.loads((folder / "report.json").read_text())
    assert "no epoch was finished" in readme(folder) and not (folder / "strip.gif").exists()
    for epoch in (1, 2):
        log.row(row(epoch))
    report = R.write_report(folder, TrainConfig())
    assert report["epochs"] == 2 and json.loads((folder / "report.json").read_text()) == report
    assert "![Reward against" in readme(folder)
    # what was not written is not named
    assert not set(report["files"]) & {"before_after.png", "strip.png", "strip.gif"}
    assert "before_after" not in readme(folder) and "strip" not in readme(folder)
    assert "nothing unusual" in readme(folder) and "judge" not in readme(folder)


def test_a_folder_without_a_log_gets_a_report_of_its_pictures(tmp_path):
    folder = finished(tmp_path / "run", evaluated=(0,))
    for name in ("metrics.jsonl", "environment.json", "command.txt"):
        (folder / name).unlink()
    assert R.write_report(folder, TrainConfig())["gain"] == 0
    assert (folder / "command.txt").exists()


# What lies in eval/ beside whole looks.


def test_names_are_parsed_and_files_of_others_left_alone(tmp_path):
    folder = finished(tmp_path / "run", evaluated=(0, 3))
    for name in ("epoch_old.pt", "epoch_0002_keep.pt", "epoch_.pt", "epoch_0001.pt.part", "a.png"):
        (folder / "eval" / name).write_bytes(b"mine")
    report = R.write_report(folder, TrainConfig())
    assert report["findings"] == [] and report["after"]["epoch"] == 3
    assert (folder / "eval/epoch_old.pt").read_bytes() == b"mine"


def test_epochs_are_ordered_by_number(tmp_path):
    folder = finished(tmp_path / "run", epochs=0, evaluated=(0, 9998, 9999, 10000, 10001))
    looks, _ = R._read_looks(folder, 10001)
    assert [look.epoch for look in looks] == [0, 9998, 9999, 10000, 10001]


class Planted:
    "Something that only a full unpickler would make."


DAMAGES = dict(
    empty=lambda path: path.write_bytes(b""),
    cut=lambda path: path.write_bytes(path.read_bytes()[:700]),
    text=lambda path: path.write_text("not a zip file"),
    older=lambda path: torch.save((torch.zeros(3, 3, 8, 8), ["a"] * 3, torch.zeros(3)), path),
    fewer=lambda path: torch.save(torch.load(path) | dict(prompts=["a"]), path),
    none=lambda path: torch.save(torch.load(path) | dict(prompts=None), path),
    numpy=lambda path: torch.save(torch.load(path) | dict(prompts=[np.str_("a")] * 3), path),
    code=lambda path: torch.save(torch.load(path) | dict(judges=Planted()), path),
    flat=lambda path: torch.save(torch.load(path) | dict(images=torch.zeros(3)), path),
)


@pytest.mark.parametrize(
    "damage, epoch", [*((name, 3) for name in DAMAGES), ("cut", 0), ("cut", 1)]
)
def test_a_damaged_look_costs_its_pictures_and_one_line(tmp_path, damage, epoch):
    folder = finished(tmp_path / "run", evaluated=(0, 1, 3))
    DAMAGES[damage](folder / f"eval/epoch_{epoch:04d}.pt")
    report = R.write_report(folder, TrainConfig())
    line = report["findings"][0]
    assert line.startswith(f"eval/epoch_{epoch:04d}.pt is damaged (") and "\n" not in line
    assert len(line) < 250 and line in readme(folder)
    assert ("after" in report) == (epoch > 0) == ("before_after.png" in report["files"])
    if epoch:
        assert report["after"]["epoch"] == (1 if epoch == 3 else 3)
    else:
        assert "no whole pictures from before training" in report["findings"][1]


def test_looks_of_other_prompts_are_not_paired(tmp_path):
    folder = finished(tmp_path / "run", evaluated=(0, 1, 2, 3))
    save_look(folder, 0, 5)
    save_look(folder, 1, 5)
    report = R.write_report(folder, TrainConfig())
    assert "different prompts" in report["findings"][0] and "after" not in report
    assert "strip.gif" in report["files"]


def test_a_report_can_be_written_again_and_no_file_is_ever_half(tmp_path, monkeypatch):
    folder = finished(tmp_path / "run", evaluated=(0, 3))
    R.write_report(folder, TrainConfig(), "quiet", "kB")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report = R.write_report(folder, TrainConfig(), "quiet", "kB")
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert before == after and report["unit"] == "kB"

    def break_off(*args, **options):
        raise KeyboardInterrupt

    for name in ("_strip", "_save_animation", "run_card", "_page"):
        with monkeypatch.context() as patch:
            patch.setattr(R, name, break_off)
            with pytest.raises(KeyboardInterrupt):
                R.write_report(folder, TrainConfig(), "quiet", "kB")
        assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_report_json_is_last(tmp_path, monkeypatch):
    folder = finished(tmp_path / "run")
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    R.write_report(folder, TrainConfig())
    assert order[-1] == "report.json" and len(order) == 8


# Judges and the page.


def test_a_judge_that_falls_is_said_in_report_card_and_page(tmp_path):
    folder = finished(tmp_path / "run", n=9)
    for epoch in (0, 3):
        scores = (3 - epoch) / 9 + torch.linspace(-0.05, 0.05, 9)
        save_look(folder, epoch, 9, judges=dict(clip=scores))
    report = R.write_report(folder, TrainConfig(), "size", "kB", dict(clip="points"))
    clip = report["judges"]["clip"]
    assert clip["unit"] == "points"
    assert clip["before"]["mean"] == pytest.approx(1 / 3)
    assert clip["difference"]["mean"] == pytest.approx(-1 / 3)
    (finding,) = report["findings"]
    assert finding.startswith("clip fell from 0.333 to ") and "points" in finding
    page = (folder / "report.html").read_text()
    for text in (readme(folder), page):
        assert "clip fell from 0.333" in text and "nothing unusual" not in text
        assert "judge" in text and "not trained on" in text
    assert "| reward `size` | -3.00 ± 0.11 kB | " in readme(folder) and "| fell |" in readme(folder)
    assert '<td class="bad" data-head="">fell</td>' in page


def test_a_judge_that_has_nothing_to_say_is_left_out(tmp_path):
    folder = finished(tmp_path / "run")
    for epoch in (0, 3):
        save_look(folder, epoch, 3, judges=dict(animal=torch.full((3,), float("nan"))))
    report = R.write_report(folder, TrainConfig())
    assert report["judges"] == {} and report["findings"] == []
    json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


class Parts(HTMLParser):
    "Collects what a page refers to, and whether its tags are closed."

    VOID = {"meta", "img", "input", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.alts, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag == "img":
            self.alts.append(attrs.get("alt"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_one_file_that_needs_nothing_else(tmp_path):
    folder = finished(tmp_path / "run", n=20, evaluated=(0, 1, 3))
    R.write_report(folder, TrainConfig(reward_fn="a<b"), unit="kB")
    page = (folder / "report.html").read_text(encoding="utf-8")
    parts = Parts()
    parts.feed(page)
    assert parts.open == []
    assert parts.sources and all(source.startswith("data:image/") for source in parts.sources)
    assert all(parts.alts)
    # 20 in the slider, 20 pairs
    assert len(parts.alts) == 60
    text = " ".join(parts.texts)
    for words in ("a<b", "Look by look", "Before and after", "Use it", "-3.000 ± ", "animal 19"):
        assert words in text
    assert "http" not in re.sub(r'base64,[^"]*', "", page).split("<h2>Use it")[0]
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
    data = json.loads(data)
    assert [label[:7] for label in data["labels"]] == ["epoch 0", "epoch 1", "epoch 3"]
    assert len(data["looks"]) == len(data["captions"]) == 3
    assert data["captions"][0][0] == "-3.50 kB"


def test_the_page_of_large_pictures_and_many_looks_can_be_sent(tmp_path):
    folder = finished(tmp_path / "run", epochs=30, n=8, evaluated=())
    for epoch in range(31):
        generator = torch.Generator().manual_seed(epoch)
        clouds = torch.rand(8, 3, 32, 32, generator=generator)
        images = torch.nn.functional.interpolate(clouds, 256, mode="bicubic").clamp(0, 1)
        save_look(folder, epoch, 8, images=images.mul(255).byte())
    R.write_report(folder, TrainConfig())
    assert (folder / "report.html").stat().st_size < 2e6


def test_hostile_words_stay_words(tmp_path):
    words = "</script><script>alert(1)</script> $\\frac{$"
    folder = finished(tmp_path / "run")
    for epoch in (0, 3):
        save_look(folder, epoch, 3, prompts=[words, '"><img src=x onerror=alert(1)>', "`a`"])
    R.write_report(folder, TrainConfig(reward_fn=words, prompt_fn=words))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page
    assert page.count("<script") == 2


# The model card and the hub.


def test_the_card_is_what_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    config = TrainConfig(
        model="CompVis/stable-diffusion-v1-4",
        prompt_fn="a|b",
        hub_model_id="someone/quiet",
        logdir=str(tmp_path),
    )
    folder = finished(tmp_path / "run", config)
    R.write_report(folder, config, "jpeg_compressibility")
    card = ModelCard.load(folder / "README.md")
    head = card.data.to_dict()
    assert head["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert head["base_model_relation"] == "adapter"
    assert (head["library_name"], head["license"]) == ("diffusers", "other")
    assert {"lora", "ddpo_is", "text-to-image"} <= set(head["tags"])
    assert 'from_pretrained("CompVis/stable-diffusion-v1-4")' in card.text
    assert 'load_lora_weights("someone/quiet")' in card.text
    assert str(tmp_path) not in card.content  # nobody's disk is described
    assert "| `prompt_fn` | `a\\|b` |" in card.text
    # only what differs from the defaults
    assert len(re.findall(r"^\| `", card.text, re.M)) == 2
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", card.text)
    assert len(pictures) == 3 and all((folder / picture).exists() for _, picture in pictures)
    assert all(re.search(r"\d", alt) for alt, _ in pictures)


def test_the_card_of_a_whole_network_loads_it_from_its_own_repository(tmp_path):
    from huggingface_hub import ModelCard

    config = TrainConfig(model="a/b", hub_model_id="someone/quiet", use_lora=False)
    folder = finished(tmp_path / "run", config)
    R.write_report(folder, config)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert 'from_pretrained("someone/quiet")' in card.text and "lora" not in card.data.tags
    assert "load_lora_weights" not in card.text


def test_the_card_of_a_local_model_names_no_base_model_and_no_path(tmp_path):
    (tmp_path / "my-sd").mkdir()
    config = TrainConfig(model=str(tmp_path / "my-sd"))
    folder = finished(tmp_path / "run", config)
    R.write_report(folder, config)
    assert "base_model" not in readme(folder) and str(tmp_path) not in readme(folder)
    assert 'from_pretrained("FOLDER/my-sd")' in readme(folder)


def test_the_card_holds_long_texts_in_any_script(tmp_path):
    config = TrainConfig(
        negative_prompts="blurry, " * 40 + "絵", prompt_fn=f"from_list({['a fox'] * 40})"
    )
    folder = finished(tmp_path / "run", config)
    R.write_report(folder, config)
    assert config.negative_prompts in readme(folder)


def test_the_licence_of_the_embedded_model_is_known(tmp_path):
    from huggingface_hub import ModelCard

    folder = finished(tmp_path / "run")
    R.write_report(folder, TrainConfig())
    assert ModelCard.load(folder / "README.md").data.to_dict()["license"] == "apache-2.0"


@pytest.mark.parametrize("model", ["my_room:Denoiser", "base"])
def test_a_model_from_python_is_named_as_it_is(tmp_path, model):
    folder = finished(tmp_path / "run")
    R.write_report(folder, TrainConfig(model=model, reward_fn="my_room:redness"))
    assert f"A LoRA for `{model}`, fine-tuned with the reward `my_room:redness`" in readme(folder)
    assert "license: other" in readme(folder) and "embedded" not in readme(folder)


def test_the_example_is_neither_the_best_nor_the_worst(tmp_path):
    folder = finished(tmp_path / "run", n=5)
    scores = torch.tensor([0.0, -0.4, 0.3, -0.1, -0.2])  # the median is the fourth
    save_look(folder, 0, 5, judges=dict(clip=torch.zeros(5)))
    save_look(folder, 3, 5, judges=dict(clip=scores))
    R.write_report(folder, TrainConfig())
    assert 'pipe(prompt="animal 3", ' in readme(folder) and "ddpo_sample 'animal 3'" in readme(
        folder
    )


class FakeApi:
    "Records uploads in place of the hub."

    calls = []

    def create_repo(self, repo_id, **fields):
        from huggingface_hub import RepoUrl

        self.calls.append(("create_repo", repo_id, fields))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")

    def upload_folder(self, **fields):
        self.calls.append(("upload_folder", fields))


@pytest.mark.parametrize("repo_id", ["", "someone/quiet"])
@pytest.mark.parametrize("lora", [True, False])
def test_push_uploads_weights_to_the_top_and_the_card_beside_them(
    tmp_path, monkeypatch, repo_id, lora
):
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    FakeApi.calls.clear()
    config = TrainConfig(hub_model_id=repo_id, use_lora=lora)
    folder = finished(tmp_path / "run-007", config)
    with pytest.raises(ValueError, match="nothing to upload"):
        R.push_report(folder, repo_id)
    weights = {"pytorch_lora_weights.safetensors", "comfyui.safetensors"} if lora else set()
    for name in weights:
        (folder / name).touch()
    if not lora:
        (folder / "pipeline").mkdir()
    with pytest.raises(ValueError, match="no README.md in"):
        R.push_report(folder, repo_id)
    R.write_report(folder, config)
    assert not FakeApi.calls
    url = R.push_report(folder, repo_id)
    name = repo_id or "me/run-007"
    assert url == f"https://huggingface.co/{name}"
    (_, asked, fields), *pipeline, (_, rest) = FakeApi.calls
    assert asked == (repo_id or "run-007") and fields == dict(exist_ok=True)
    assert [call["folder_path"] for _, call in pipeline] == [folder / "pipeline"] * (not lora)
    assert rest["repo_id"] == name and "path_in_repo" not in rest
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/other.png").touch()
    (folder / "lock").touch()
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    patterns = {key: rest[key] for key in ("allow_patterns", "ignore_patterns")}
    texts = {"README.md", "report.html", "report.json", "environment.json", "metrics.jsonl"}
    assert set(filter_repo_objects(paths, **patterns)) == PICTURES | texts | weights
    for text in (readme(folder), (folder / "report.html").read_text()):
        assert name in text and "YOUR_NAME" not in text


def test_hub_is_checked_before_training(monkeypatch):
    config = TrainConfig(push_to_hub=True, hub_model_id="someone/quiet")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    R.check_hub(TrainConfig())
    with pytest.raises(ValueError, match="push_to_hub needs a token"):
        R.check_hub(config)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    R.check_hub(config)
    R.check_hub(dataclasses.replace(config, hub_model_id=""))
    with pytest.raises(ValueError, match="hub_model_id is 'a/b/c'"):
        R.check_hub(dataclasses.replace(config, hub_model_id="a/b/c"))


def test_the_cards_snippet_runs(tmp_path, monkeypatch):
    "Where the run's LoRA lies under the repository's name, the code of the card draws with it."
    from ddpo_scratch.models.sd import StableDiffusion, add_lora, load_pipeline, save_lora

    config = TrainConfig(hub_model_id="someone/quiet", sample_num_steps=2)
    folder = finished(tmp_path / "run", config)
    policy = StableDiffusion(load_pipeline("tiny"))
    for parameter in add_lora(policy, 2, 2):
        parameter.data.normal_(std=0.5)
    save_lora(policy, tmp_path / "someone/quiet")
    R.write_report(folder, config)
    (code,) = re.findall(r"```python\n(.*?)```", readme(folder), re.S)
    without_lora = re.sub(r"pipe.load_lora.*", "", code)
    monkeypatch.chdir(tmp_path)
    drawn = []
    for text in (code, without_lora):
        scope = {}
        torch.manual_seed(0)
        exec(text, scope)
        assert scope["image"].size == (64, 64)
        pixels = bytearray(scope["image"].tobytes())
        drawn.append(torch.frombuffer(pixels, dtype=torch.uint8).float())
    assert (drawn[0] - drawn[1]).abs().mean() > 1
