"The log, the trackers, the report and the findings of a run."
import csv
import dataclasses
import importlib.machinery
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpo_scratch import report as R
from ddpo_scratch.config import TrainConfig, preset, read_config
from ddpo_scratch.evaluate import read_metrics, summarize

ROOT = Path(__file__).resolve().parents[1]


def row(epoch, **more): return dict(epoch=epoch, reward_queries=64*epoch, reward_mean=-2 + .1*epoch, reward_std=.3, reward_min=-3., reward_max=-1., **more)


def table(folder):
    with open(folder/"metrics.csv", newline="") as f: return list(csv.DictReader(f))


def test_log_writes_the_same_rows_as_json_and_csv_and_a_late_key_adds_a_column(tmp_path):
    log = R.RunLog(tmp_path/"run", TrainConfig(seed=3))
    rows = [row(1), row(2, eval_reward_mean=float("nan")), row(3, eval_reward_mean=.25)]
    for r in rows: log.row(r)
    assert list(table(tmp_path/"run")[0]) == [*rows[0], "eval_reward_mean"]
    assert [{k: float(v) for k, v in r.items() if v} for r in table(tmp_path/"run")][::2] == rows[::2]
    assert str(read_metrics(tmp_path/"run")) == str(rows) and table(tmp_path/"run")[1]["eval_reward_mean"] == "nan"
    assert read_config(tmp_path/"run") == TrainConfig(seed=3)
    log.close(); log.close()


def test_a_resumed_log_forgets_rows_after_its_checkpoint_and_a_half_written_line(tmp_path):
    log = R.RunLog(tmp_path, TrainConfig())
    for e in (1, 2, 3): log.row(row(e))
    with open(tmp_path/"metrics.jsonl", "a") as f: f.write('{"epoch": 4, "rew')
    again = R.RunLog(tmp_path, TrainConfig(), epoch=2)
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 2] and len(table(tmp_path)) == 2
    again.row(row(3, kl=.5))
    assert [r["epoch"] for r in table(tmp_path)] == ["1", "2", "3"] and table(tmp_path)[2]["kl"] == "0.5"
    assert len((tmp_path/"command.txt").read_text().splitlines()) == 2


def test_a_broken_line_in_the_middle_is_no_accident_and_is_not_hidden(tmp_path):
    (tmp_path/"metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(json.JSONDecodeError): R.RunLog(tmp_path, TrainConfig(), epoch=3)


# Trackers.

def pictures(n=3): return torch.linspace(0, 1, n)[:, None, None, None].expand(n, 3, 8, 8)


class Recorder(R._Tensorboard):
    def __init__(self, folder, config, epoch): self.sent = []
    def row(self, row): self.sent.append(row)
    def images(self, arrays, captions, epoch): self.sent.append((arrays, captions, epoch))
    def close(self): self.sent.append("closed")


def test_trackers_get_rows_sixteen_captioned_pictures_and_one_end(tmp_path, monkeypatch):
    monkeypatch.setitem(R._trackers, "tensorboard", Recorder)
    log = R.RunLog(tmp_path, TrainConfig(log_with="tensorboard"))
    (tracker,) = log.trackers
    log.row(row(1))
    log.images(pictures(20).requires_grad_(), [f"animal {i}" for i in range(20)], torch.arange(20)/8, 1)
    log.close(); log.close()
    assert tracker.sent[0] == row(1) and tracker.sent[2:] == ["closed"]
    arrays, captions, epoch = tracker.sent[1]
    assert len(arrays) == len(captions) == 16 and captions[3] == "animal 3 | 0.375" and epoch == 1
    assert arrays[15].shape == (8, 8, 3) and arrays[15].dtype.name == "uint8" and arrays[0].max() == 0 and arrays[15].max() == round(15/19*255)


def test_unknown_and_missing_trackers_are_errors_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="log_with names 'mlflow': expected some of wandb, tensorboard, trackio"): R.check_trackers(TrainConfig(log_with="wandb,mlflow"))
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match="pip install trackio"): R.RunLog(tmp_path/"run", TrainConfig(log_with="trackio"))
    assert not (tmp_path/"run").exists()
    assert R.check_trackers(TrainConfig(log_with=" ")) == []


def test_a_folder_called_like_a_tracker_is_not_that_tracker(tmp_path, monkeypatch):
    "wandb leaves ./wandb, which Python would import as an empty package."
    (tmp_path/"trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ImportError, match="pip install trackio"): R.check_trackers(TrainConfig(log_with="trackio"))


def test_tensorboard_reads_back_and_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an option: pip install tensorboard")
    config = TrainConfig(log_with="tensorboard")
    log = R.RunLog(tmp_path, config)
    log.images(pictures(), ["a", "b", "c"], [1., 2., 3.], 0)
    for e in (1, 2, 3): log.row(dict(epoch=e, reward_mean=float(e)))
    log.close()
    again = R.RunLog(tmp_path, config, epoch=1)
    again.row(dict(epoch=2, reward_mean=20.))
    again.close()
    read = event_accumulator.EventAccumulator(str(tmp_path/"tensorboard")).Reload()
    assert [(s.step, s.value) for s in read.Scalars("reward_mean")] == [(1, 1.), (2, 20.)]
    image = read.Images("pictures/02")[0]
    assert (image.step, image.width, image.height) == (0, 8, 8)
    assert read.Tensors("captions/01/text_summary")[0].tensor_proto.string_val[0] == b"b | 2"


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE", "CONFIG", "DATA"): monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path/name))
    config, ids = TrainConfig(log_with="wandb", tracker_project_name="animals"), []
    for epoch in (0, 1):
        log = R.RunLog(tmp_path/"run", config, epoch)
        run = log.trackers[0].run
        ids.append(run.id)
        assert run.name == "run" and run.project == "animals" and run.config["method"] == "ddpo_is"
        log.row(dict(epoch=epoch + 1, reward_mean=.25))
        log.images(pictures(2), ["a", "b"], [1., 2.], epoch + 1)
        assert run.summary["reward_mean"] == .25 and run.summary["epoch"] == epoch + 1
        log.close()
    assert ids[0] == ids[1] == (tmp_path/"run/wandb_id.txt").read_text()
    assert len(list((tmp_path/"run/wandb").glob("offline-run-*"))) == 2 and len(list((tmp_path/"run").rglob("pictures*.png"))) == 4


def test_trackio_rows_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path/"trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is an option: pip install trackio; 0.43 needs pillow below 13")
    log = R.RunLog(tmp_path/"quiet-run", TrainConfig(log_with="trackio", tracker_project_name="animals"))
    log.row(dict(epoch=1, reward_mean=.25))
    log.images(pictures(2), ["a", "b"], [1., 2.], 1)
    log.close()
    (run,) = trackio.Api().runs("animals")
    assert run.name == "quiet-run" and len(list((tmp_path/"trackio").rglob("*.png"))) == 2


class FakeTrackio:
    "Records calls in place of the package."
    def __init__(self): self.calls, self.__spec__ = [], importlib.machinery.ModuleSpec("trackio", None, origin="fake")
    def __getattr__(self, name): return lambda *args, **fields: self.calls.append((name, args, fields)) or name


def test_trackio_is_called_as_its_manual_says(tmp_path, monkeypatch):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    log = R.RunLog(tmp_path/"quiet-run", TrainConfig(log_with="trackio", tracker_project_name="animals"))
    log.row(row(1))
    log.images(pictures(2), ["a", "b"], [1., 2.], 1)
    log.close()
    names, args, fields = zip(*fake.calls)
    assert names == ("init", "log", "Image", "Image", "log", "finish")
    assert (fields[0]["project"], fields[0]["name"], fields[0]["resume"]) == ("animals", "quiet-run", "allow")
    assert args[1] == (row(1),) and fields[1] == fields[4] == dict(step=1) and fields[3] == dict(caption="b | 2") and list(args[4][0]) == ["pictures/00", "pictures/01"]


# The report.

def finished(folder, config=TrainConfig(), epochs=3, n=3, looks=(0, 3)):
    "A run's folder, as training leaves it, without weights."
    log = R.RunLog(folder, config)
    for e in range(1, epochs + 1): log.row(row(e, grad_norm=.1, eval_start=-3., eval_reward_mean=-3. + e))
    (folder/"eval").mkdir(exist_ok=True)
    for e in looks:
        images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(e)).mul(255).round().byte()
        torch.save((images, [f"animal {i}" for i in range(n)], -3. + e + torch.linspace(-.5, .5, n)), folder/f"eval/epoch_{e:04d}.pt")
    return folder


def test_report_has_every_part_and_ignores_looks_after_its_last_epoch(tmp_path):
    folder = finished(tmp_path/"run", n=5, looks=(0, 1, 3, 4))
    report = R.write_report(folder, TrainConfig(), "quiet")
    assert {"reward_curve.png", "curves.png", "before_after.png", "strip.png", "strip.gif", "report.json", "environment.json", "command.txt", "README.md", "config.yaml"} <= {p.name for p in folder.iterdir()}
    assert report == json.loads((folder/"report.json").read_text()) and set(report) == {"before", "after", "epochs", "gain"}
    assert report["epochs"] == 3 and report["before"]["reward_mean"] == pytest.approx(-3) and report["after"]["reward_mean"] == pytest.approx(0) and report["gain"] == pytest.approx(1)
    images, _, rewards = torch.load(folder/"eval/epoch_0003.pt", weights_only=True)
    assert report["after"] == summarize(images.float()/255, rewards)
    with Image.open(folder/"strip.gif") as gif: assert (gif.n_frames, gif.size, gif.info["loop"]) == (3, (512, 272), 0)


@pytest.mark.parametrize("n", [1, 20])
def test_report_of_any_number_of_pictures_and_of_many_looks(tmp_path, n):
    folder = finished(tmp_path/"run", epochs=40, n=n, looks=range(0, 41) if n == 1 else (0, 40))
    report = R.write_report(folder, TrainConfig())
    assert report["before"]["n"] == n
    json.loads((folder/"report.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    epochs = [e for e, *_ in R._looks(folder, 40)]
    assert epochs[0] == 0 and epochs[-1] == 40 and len(epochs) == (24 if n == 1 else 2) and epochs == sorted(set(epochs))


def test_report_without_pictures_or_epochs(tmp_path):
    log = R.RunLog(tmp_path/"run", TrainConfig())
    assert R.write_report(tmp_path/"run", TrainConfig()) == {}
    assert "no epoch was finished" in (tmp_path/"run/README.md").read_text() and not (tmp_path/"run/strip.gif").exists()
    for e in (1, 2): log.row(row(e))
    assert R.write_report(tmp_path/"run", TrainConfig()) == {} and "![Reward against" in (tmp_path/"run/README.md").read_text()


def test_a_folder_without_a_log_gets_a_report_of_its_pictures(tmp_path):
    folder = finished(tmp_path/"run", looks=(0,))
    for name in ("metrics.jsonl", "environment.json", "command.txt"): (folder/name).unlink()
    assert R.write_report(folder, TrainConfig())["gain"] == 0 and (folder/"command.txt").exists()


# The model card and the hub.

def test_the_card_is_what_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard
    config = TrainConfig(model="CompVis/stable-diffusion-v1-4", prompt_fn="a|b", hub_model_id="someone/quiet", logdir=str(tmp_path))
    folder = finished(tmp_path/"run", config)
    R.write_report(folder, config, "jpeg_compressibility")
    card = ModelCard.load(folder/"README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "CompVis/stable-diffusion-v1-4" and data["base_model_relation"] == "adapter" and data["library_name"] == "diffusers" and data["license"] == "other"
    assert {"lora", "ddpo_is", "text-to-image"} <= set(data["tags"])
    assert 'from_pretrained("CompVis/stable-diffusion-v1-4")' in card.text and 'load_lora_weights("someone/quiet")' in card.text and "reward hacking" not in card.text
    assert str(tmp_path) not in card.content and "| `prompt_fn` | `a\\|b` |" in card.text                      # nobody's disk is described
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card.text): assert (folder/picture).exists()
    full = dataclasses.replace(config, use_lora=False)
    R._write_card(folder, full, "quiet", read_metrics(folder), {})
    assert ModelCard.load(folder/"README.md").data.to_dict()["base_model_relation"] == "finetune" and 'from_pretrained("someone/quiet")' in (folder/"README.md").read_text()


def test_the_card_of_a_local_model_names_no_base_model_and_no_path(tmp_path):
    (tmp_path/"my-sd").mkdir()
    config = TrainConfig(model=str(tmp_path/"my-sd"))
    text = (R.write_report(finished(tmp_path/"run", config), config), (tmp_path/"run/README.md").read_text())[1]
    assert "base_model" not in text and str(tmp_path) not in text and 'from_pretrained("FOLDER/my-sd")' in text


def test_the_card_holds_long_texts_in_any_script(tmp_path):
    config = TrainConfig(negative_prompts="blurry, " * 40 + "絵", prompt_fn=f"from_list({['a fox'] * 40})")
    R.write_report(finished(tmp_path/"run", config), config)
    assert config.negative_prompts in (tmp_path/"run/README.md").read_text(encoding="utf-8")


class FakeApi:
    calls = []
    def create_repo(self, repo_id, **fields):
        from huggingface_hub import RepoUrl
        self.calls.append(("create_repo", repo_id, fields))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")
    def upload_folder(self, **fields): self.calls.append(("upload_folder", fields))


@pytest.mark.parametrize("repo_id, kind", [("", "lora"), ("someone/quiet", "pipeline")])
def test_push_uploads_weights_to_the_top_and_the_card_beside_them(tmp_path, monkeypatch, repo_id, kind):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    FakeApi.calls.clear()
    config = TrainConfig(hub_model_id=repo_id)
    folder = finished(tmp_path/"run-007", config)
    with pytest.raises(ValueError, match="nothing to upload"): R.push_report(folder, repo_id)
    (folder/kind).mkdir()
    with pytest.raises(ValueError, match="no model card"): R.push_report(folder, repo_id)
    R.write_report(folder, config)
    assert not FakeApi.calls
    url, name = R.push_report(folder, repo_id), repo_id or "me/run-007"
    (_, asked, fields), (_, weights), (_, rest) = FakeApi.calls
    assert url == f"https://huggingface.co/{name}" and asked == (repo_id or "run-007") and fields == dict(exist_ok=True)
    assert weights["folder_path"] == folder/kind and weights["repo_id"] == rest["repo_id"] == name and "path_in_repo" not in weights
    from huggingface_hub.utils import filter_repo_objects
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    sent = set(filter_repo_objects(files, allow_patterns=rest["allow_patterns"], ignore_patterns=rest["ignore_patterns"]))
    assert sent == {"README.md", "reward_curve.png", "curves.png", "before_after.png", "strip.png", "strip.gif", "report.json", "environment.json", "metrics.csv"}
    assert name in (folder/"README.md").read_text() and "YOUR_NAME" not in (folder/"README.md").read_text()


def test_hub_is_checked_before_training(monkeypatch):
    config = TrainConfig(push_to_hub=True, hub_model_id="someone/quiet")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    R.check_hub(TrainConfig())
    with pytest.raises(ValueError, match="push_to_hub needs a token"): R.check_hub(config)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    R.check_hub(config); R.check_hub(dataclasses.replace(config, hub_model_id=""))
    with pytest.raises(ValueError, match="hub_model_id is 'a/b/c'"): R.check_hub(dataclasses.replace(config, hub_model_id="a/b/c"))


def test_the_cards_snippet_runs(tmp_path, monkeypatch):
    "In a process that knows the run's LoRA under the repository's name, the code of the card draws a picture, and another one than the base model's."
    from ddpo_scratch.sd import StableDiffusion, add_lora, load_pipeline, save_lora
    config = TrainConfig(hub_model_id="someone/quiet", sample_num_steps=2)
    folder, policy = finished(tmp_path/"run", config), StableDiffusion(load_pipeline("tiny"))
    for p in add_lora(policy, 2, 2): p.data.normal_(std=.5)
    save_lora(policy, tmp_path/"someone/quiet")
    R.write_report(folder, config)
    (code,) = re.findall(r"```python\n(.*?)```", (folder/"README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    drawn = []
    for text in (code, re.sub(r"pipe.load_lora.*", "", code)):
        scope = {}
        torch.manual_seed(0)
        exec(text, scope)
        drawn.append(torch.frombuffer(bytearray(scope["image"].tobytes()), dtype=torch.uint8).float())
    assert scope["image"].size == (64, 64) and (drawn[0] - drawn[1]).abs().mean() > 1


# Findings. The rules one by one are in the notebook.

def test_findings_stay_quiet_on_runs_that_went_well_and_speak_on_the_one_that_collapsed():
    runs = json.loads((ROOT/"experiments/main_job.json").read_text())["runs"]
    found = {name: R.diagnose(run["rows"], TrainConfig(**run["config"])) for name, run in runs.items()}
    assert not found["0"] + found["1"] + found["2"] and any("approx_kl" in f for f in found["collapse"])


@pytest.mark.parametrize("name", ["tiny", "tiny_sf", "tiny_rwr", "tiny_rwr_sparse", "tiny_alignprop", "tiny_draft_lv", "tiny_refl"])
@pytest.mark.parametrize("epochs", [1, 3, 20])
def test_findings_of_any_method_and_length(name, epochs):
    config = preset(name)
    gauges = dict(loss=1., grad_norm=.1) | (dict(advantage_spread=2.) if config.family != "backprop" else dict(k=3.))
    if config.family == "policy": gauges |= dict(approx_kl=0., clip_fraction=0., ratio_spread=0. if name == "tiny_sf" else .01)
    rows = [row(e, **gauges) for e in range(1, epochs + 1)]
    assert R.diagnose(rows, config) == []
    assert R.diagnose([r | dict(reward_mean=1., reward_std=0., reward_min=1., reward_max=1.) for r in rows], config)[0].startswith("reward_std is 0")


def test_findings_ignore_gauges_that_were_not_measured():
    assert R.diagnose([row(e, approx_kl=float("nan"), clip_fraction=float("nan")) for e in range(1, 10)], TrainConfig()) == []
    assert R.diagnose([], TrainConfig()) == ["no epoch was finished: there is nothing to read yet"]


def test_samples_that_look_flat_are_no_finding_where_the_fixed_seeds_rise():
    flat = [row(e) | dict(reward_mean=-2. + .1*(-1)**e) for e in range(1, 13)]
    (finding,) = R.diagnose(flat, TrainConfig())
    assert finding.startswith("reward_mean is flat over 12 epochs: an update averages over 4 samples of 20 steps")
    assert R.diagnose([r | dict(eval_start=-2.5, eval_reward_mean=-2.5 + .02*r["epoch"]) for r in flat], TrainConfig()) == []
    assert R.diagnose([r | dict(eval_start=-2.5, eval_reward_mean=-2.5) for r in flat], TrainConfig()) == [finding]


def test_clipped_gradients_are_normal_for_long_chains_only():
    rows = [row(e, grad_norm=4.) for e in range(1, 6)]
    assert not R.diagnose(rows, preset("tiny_alignprop")) and "fewer backprop_steps" in R.diagnose([r | dict(grad_norm=40.) for r in rows], preset("tiny_alignprop"))[0]
    assert "always clipped to 1" in R.diagnose(rows, TrainConfig())[0]


def test_overshooting_is_measured_against_the_runs_clip_range():
    rows = [row(e, grad_norm=.1, approx_kl=5e-7, clip_fraction=.1, ratio_spread=.01, clip_range=1.6e-3) for e in range(1, 6)]
    assert not R.diagnose(rows, TrainConfig(model="a folder"))
    assert "the clip range of 2.5e-05" in R.diagnose([r | dict(clip_range=2.5e-5) for r in rows], TrainConfig())[0]
