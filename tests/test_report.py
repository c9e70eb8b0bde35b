"The report, the model card and the findings of a run."

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpo_scratch import report as R
from ddpo_scratch.config import TrainConfig, preset
from ddpo_scratch.evaluate import summarize
from ddpo_scratch.runlog import RunLog

ROOT = Path(__file__).resolve().parents[1]


def row(epoch, **more):
    "An epoch of a run that goes well."
    rewards = dict(reward_std=0.3, reward_min=-3.0, reward_max=-1.0)
    return dict(
        epoch=epoch, reward_queries=64 * epoch, reward_mean=-2 + 0.1 * epoch, **rewards, **more
    )


def save_evaluation(folder, epoch, n):
    "What an evaluation leaves: n random pictures with prompts and rewards."
    generator = torch.Generator().manual_seed(epoch)
    images = torch.rand(n, 3, 8, 8, generator=generator).mul(255).round().byte()
    rewards = -3.0 + epoch + torch.linspace(-0.5, 0.5, n)
    record = images, [f"animal {i}" for i in range(n)], rewards
    torch.save(record, folder / f"eval/epoch_{epoch:04d}.pt")


def finished(folder, config=None, epochs=3, n=3, evaluated=(0, 3)):
    "A run's folder, as training leaves it, without weights."
    log = RunLog(folder, config or TrainConfig())
    for epoch in range(1, epochs + 1):
        log.row(row(epoch, grad_norm=0.1, eval_start=-3.0, eval_reward_mean=-3.0 + epoch))
    (folder / "eval").mkdir(exist_ok=True)
    for epoch in evaluated:
        save_evaluation(folder, epoch, n)
    return folder


def readme(folder):
    "The card as text."
    return (folder / "README.md").read_text(encoding="utf-8")


# The report.


def test_report_has_every_part_and_ignores_evaluations_after_its_last_epoch(tmp_path):
    folder = finished(tmp_path / "run", n=5, evaluated=(0, 1, 3, 4))
    report = R.write_report(folder, TrainConfig(), "quiet")
    pictures = {"reward_curve.png", "curves.png", "before_after.png", "strip.png", "strip.gif"}
    texts = {"report.json", "environment.json", "command.txt", "README.md", "config.yaml"}
    assert pictures | texts <= {path.name for path in folder.iterdir()}
    assert report == json.loads((folder / "report.json").read_text())
    assert set(report) == {"before", "after", "epochs", "gain"}
    assert report["epochs"] == 3 and report["gain"] == pytest.approx(1)
    assert report["before"]["reward_mean"] == pytest.approx(-3)
    images, _, rewards = torch.load(folder / "eval/epoch_0003.pt", weights_only=True)
    assert report["after"] == summarize(images.float() / 255, rewards)


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
    assert report["before"]["n"] == n
    text = (folder / "report.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    epochs = [epoch for epoch, *_ in R._read_evaluations(folder, 40)]
    assert epochs[0] == 0 and epochs[-1] == 40 and epochs == sorted(set(epochs))
    assert len(epochs) == min(24, len(evaluated))


def test_report_without_pictures_or_epochs(tmp_path):
    folder = tmp_path / "run"
    log = RunLog(folder, TrainConfig())
    assert R.write_report(folder, TrainConfig()) == {}
    assert "no epoch was finished" in readme(folder) and not (folder / "strip.gif").exists()
    for epoch in (1, 2):
        log.row(row(epoch))
    assert R.write_report(folder, TrainConfig()) == {}
    assert "![Reward against" in readme(folder)


def test_a_folder_without_a_log_gets_a_report_of_its_pictures(tmp_path):
    folder = finished(tmp_path / "run", evaluated=(0,))
    for name in ("metrics.jsonl", "environment.json", "command.txt"):
        (folder / name).unlink()
    assert R.write_report(folder, TrainConfig())["gain"] == 0
    assert (folder / "command.txt").exists()


def test_a_panel_for_each_gauge_and_fixed_seeds_start_before_the_first_epoch():
    rows = [row(e, eval_start=-3.0, eval_reward_mean=float(e), k=5.0) for e in (1, 2)]
    panels = {ax.get_title(): ax for ax in R.gauge_curves(rows).axes if ax.get_visible()}
    assert list(panels) == [
        "reward of the samples",
        "reward of the fixed seeds",
        "steps differentiated",
    ]
    (line,) = panels["reward of the fixed seeds"].lines
    assert line.get_xydata().tolist() == [[0, -3], [1, 1], [2, 2]]


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
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert len(pictures) == 3 and all((folder / picture).exists() for picture in pictures)


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


def test_a_card_is_a_head_and_parts(tmp_path):
    from huggingface_hub import ModelCard

    parts = ["Text: *yes*", "", "## More\n\n絵"]
    card = R.model_card("Name", parts, dict(tags=["a"], base_model="b/c"))
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == dict(base_model="b/c", tags=["a"])
    assert read.text.strip() == "# Name\n\nText: *yes*\n\n## More\n\n絵"


class FakeApi:
    "Records uploads in place of the hub."

    calls = []

    def create_repo(self, repo_id, **fields):
        from huggingface_hub import RepoUrl

        self.calls.append(("create_repo", repo_id, fields))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")

    def upload_folder(self, **fields):
        self.calls.append(("upload_folder", fields))


@pytest.mark.parametrize("repo_id, kind", [("", "lora"), ("someone/quiet", "pipeline")])
def test_push_uploads_weights_to_the_top_and_the_card_beside_them(
    tmp_path, monkeypatch, repo_id, kind
):
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    FakeApi.calls.clear()
    config = TrainConfig(hub_model_id=repo_id)
    folder = finished(tmp_path / "run-007", config)
    with pytest.raises(ValueError, match="nothing to upload"):
        R.push_report(folder, repo_id)
    (folder / kind).mkdir()
    with pytest.raises(ValueError, match="no model card"):
        R.push_report(folder, repo_id)
    R.write_report(folder, config)
    assert not FakeApi.calls
    url = R.push_report(folder, repo_id)
    name = repo_id or "me/run-007"
    assert url == f"https://huggingface.co/{name}"
    (_, asked, fields), (_, weights), (_, rest) = FakeApi.calls
    assert asked == (repo_id or "run-007") and fields == dict(exist_ok=True)
    assert weights["folder_path"] == folder / kind and "path_in_repo" not in weights
    assert weights["repo_id"] == rest["repo_id"] == name
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    patterns = {key: rest[key] for key in ("allow_patterns", "ignore_patterns")}
    pictures = {"reward_curve.png", "curves.png", "before_after.png", "strip.png", "strip.gif"}
    texts = {"README.md", "report.json", "environment.json", "metrics.jsonl"}
    assert set(filter_repo_objects(paths, **patterns)) == pictures | texts
    assert name in readme(folder) and "YOUR_NAME" not in readme(folder)


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


# Findings. The rules one by one are in the notebook.


def test_findings_stay_quiet_on_runs_that_went_well_and_speak_on_the_one_that_collapsed():
    runs = json.loads((ROOT / "experiments/main_job.json").read_text())["runs"]
    findings = {
        name: R.diagnose(run["rows"], TrainConfig(**run["config"])) for name, run in runs.items()
    }
    assert findings["0"] == findings["1"] == findings["2"] == []
    assert any("approx_kl" in finding for finding in findings["collapse"])


METHODS = "tiny tiny_sf tiny_rwr tiny_rwr_sparse tiny_alignprop tiny_draft_lv tiny_refl".split()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("epochs", [1, 3, 20])
def test_findings_of_any_method_and_length(name, epochs):
    gauges = dict(loss=1.0, grad_norm=0.1)
    if preset(name).method_class.differentiable:
        gauges |= dict(k=3.0)
    elif name in ("tiny", "tiny_sf"):
        gauges |= dict(approx_kl=0.0, clip_fraction=0.0, advantage_spread=2.0)
        gauges |= dict(ratio_spread=0.0 if name == "tiny_sf" else 0.01)
    else:
        gauges |= dict(advantage_spread=2.0)
    rows = [row(epoch, **gauges) for epoch in range(1, epochs + 1)]
    assert R.diagnose(rows, preset(name)) == []
    flat = dict(reward_mean=1.0, reward_std=0.0, reward_min=1.0, reward_max=1.0)
    findings = R.diagnose([r | flat for r in rows], preset(name))
    assert findings[0].startswith("reward_std is 0")


def test_findings_ignore_gauges_that_were_not_measured():
    nan = float("nan")
    rows = [row(epoch, approx_kl=nan, clip_fraction=nan, clip_range=1e-4) for epoch in range(1, 10)]
    assert R.diagnose(rows, TrainConfig()) == []
    assert R.diagnose([], TrainConfig()) == ["no epoch was finished: there is nothing to read yet"]


def test_samples_that_look_flat_are_no_finding_where_the_fixed_seeds_rise():
    flat = [row(e) | dict(reward_mean=-2.0 + 0.1 * (-1) ** e) for e in range(1, 13)]
    (finding,) = R.diagnose(flat, TrainConfig())
    assert finding.startswith(
        "reward_mean is flat over 12 epochs: an update averages over 4 samples of 20 steps"
    )
    start = dict(eval_start=-2.5)
    risen = [r | start | dict(eval_reward_mean=-2.5 + 0.02 * r["epoch"]) for r in flat]
    assert R.diagnose(risen, TrainConfig()) == []
    stayed = [r | start | dict(eval_reward_mean=-2.5) for r in flat]
    assert R.diagnose(stayed, TrainConfig()) == [finding]


def test_clipped_gradients_are_normal_for_long_chains_only():
    rows = [row(epoch, grad_norm=4.0) for epoch in range(1, 6)]
    config = preset("tiny_alignprop")
    assert R.diagnose(rows, config) == []
    (finding,) = R.diagnose([r | dict(grad_norm=40.0) for r in rows], config)
    assert "fewer backprop_steps" in finding
    (finding,) = R.diagnose(rows, TrainConfig())
    assert "always clipped to 1" in finding and "outliers" in finding


def test_overshooting_is_measured_against_the_runs_clip_range():
    gauges = dict(grad_norm=0.1, approx_kl=5e-7, clip_fraction=0.1, ratio_spread=0.01)
    rows = [row(epoch, clip_range=1.6e-3, **gauges) for epoch in range(1, 6)]
    assert R.diagnose(rows, TrainConfig()) == []
    (finding,) = R.diagnose([r | dict(clip_range=2.5e-5) for r in rows], TrainConfig())
    assert "the clip range of 2.5e-05" in finding
    without = [row(epoch, **gauges) for epoch in range(1, 6)]
    assert R.diagnose(without, TrainConfig()) == []
