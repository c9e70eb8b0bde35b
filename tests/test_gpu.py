"""The notebooks for a GPU, cell by cell, on small random models of the same classes.

Only the installation is left out. The models are those of tests/sd_models.py and
tests/flow_models.py; the hub is a record of what would have been uploaded.
"""

import re

import flow_models
import matplotlib.pyplot as plt
import pytest
import sd_models
from page import ROOT

import notebooks as nbt
import stale

FOLDER = ROOT / "nbs/gpu"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# what makes a run small; everything else stays as the notebook has it
FEW = dict(
    num_epochs=1,
    sample_num_steps=6,
    sample_batch_size=4,
    sample_num_batches_per_epoch=2,
    train_batch_size=4,
    train_gradient_accumulation_steps=1,
    eval_num_images=2,
    eval_num_steps=4,
    mixed_precision="no",
    lora_rank=2,
    eval_judges="",
)
# what stands for judges whose weights are not here; the reader of text is here
CHANGES = {
    "70_sd15": dict(reward_fn="brightness"),
    "71_sdxl": dict(reward_fn="brightness", height=0, width=0),
    # nothing can be read in a random model's pictures
    "72_sd35": dict(reward_fn="ocr + brightness", height=32, width=32),
}


class Hub:
    "Records uploads in place of the hub."

    calls = []

    def create_repo(self, repo_id, **fields):
        from huggingface_hub import RepoUrl

        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, **fields):
        self.calls.append(fields)


def cells(path):
    "Return the sources of the cells that a reader runs, but for the installation."
    sources = [cell.source for cell in stale.code_cells(nbt.read(path))]
    installed = [source for source in sources if "%pip" in source]
    assert len(installed) == 1, "a notebook for Colab installs the package, once"
    return [source for source in sources if source not in installed]


def model(name, folder):
    "Build a small model of the class that a notebook trains."
    if name == "72_sd35":
        return flow_models.folder("sd35_medium")
    return str(sd_models.build("sdxl" if name == "71_sdxl" else "sd15", folder / "model"))


def test_there_are_three_and_each_says_that_it_was_not_run():
    assert [path.stem for path in NOTEBOOKS] == list(CHANGES)
    for path in NOTEBOOKS:
        text = nbt.read(path).cells[1].source
        assert "**Not run by us on these weights.**" in text and "tests/test_gpu.py" in text
        assert (
            f"colab.research.google.com/github/OWNER/ddpo_scratch/blob/main/nbs/gpu/{path.name}"
            in text
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_works_on_a_small_model(path, tmp_path, monkeypatch):
    shown = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.notebook_login", lambda: None)
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr(Hub, "calls", [])
    changes = FEW | CHANGES[path.stem] | dict(model=model(path.stem, tmp_path))
    space = {"__name__": path.stem}
    for source in cells(path):
        source = source.replace("CHANGES = {}", f"CHANGES = {changes!r}")
        source = re.sub(r"(?m)^N = 16$", "N = 2", source)
        exec(compile(source, path.name, "exec"), space)
    plt.close("all")
    run, config = space["run"], space["config"]
    assert {name: getattr(config, name) for name in changes} == changes
    assert (run / "ddpo_eval.json").is_file() and (run / "report.html").is_file()
    # three pictures of the run, and one for each weight of the LoRA
    assert len(shown) == 6
    pictures = [picture.tobytes() for picture in shown[3:]]
    assert len(set(pictures)) == 3, "the LoRA, loaded by diffusers, changes the picture"
    assert len(Hub.calls) == 1 and Hub.calls[0]["repo_id"].startswith("YOUR_NAME/")
