"""Over-optimisation, on purpose: the whole U-Net, a higher rate, and no early stop.

    python experiments/collapse.py              # one seed

The same eight prompts and noise are drawn every few epochs. Writes collapse.png (a row of pictures for each of those epochs) and
collapse.json (JPEG size and classifier accuracy over the 45 animals there, and the metrics of every epoch).
"""
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddpo_scratch.evaluate import fixed_seed_images, plot_grid, read_metrics
from ddpo_scratch.prompts import COMMON_ANIMALS, article
from ddpo_scratch.rewards import jpeg_size
from ddpo_scratch.tiny import load_classifier
from ddpo_scratch.train import preset, setup, train

HERE = Path(__file__).with_suffix("")
EVERY, SHOWN = 4, ["a fox", "a frog", "a zebra", "a bee", "a lion", "a pig", "a duck", "a butterfly"]
torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
prompts = SHOWN + [f"{article(a)} {a}" for a in COMMON_ANIMALS]
judge, rows, strips, start = load_classifier(), [], [], time.perf_counter()


def look(state, epoch):
    images = fixed_seed_images(state.denoiser, prompts, seed=1000, batch_size=len(prompts))
    kb = jpeg_size(images[8:])
    named = sum(a == b for a, b in zip(judge.names(images[8:]), COMMON_ANIMALS))/45
    rows.append(dict(epoch=epoch, kb_mean=round(kb.mean().item(), 4), accuracy=round(named, 4)))
    strips.append(images[:8])
    print(rows[-1], flush=True)


with tempfile.TemporaryDirectory() as tmp:
    config = preset("tiny_collapse", logdir=tmp, eval_num_images=0)
    state = setup(config)
    look(state, 0)
    for step in train(state=state):
        if step.metrics and step.epoch % EVERY == 0: look(state, step.epoch)
    metrics = [{k: round(v, 5) for k, v in r.items()} for r in read_metrics(state.folder)]
labels = [f"epoch {r['epoch']}\n{r['kb_mean']:.2f} kB\n{r['accuracy']:.0%} named" for r in rows]
plot_grid(torch.cat(strips), SHOWN + [""]*(8*(len(rows) - 1)), n_cols=8, size=1.1, row_labels=labels).savefig(HERE.with_suffix(".png"))
log = dict(command="python experiments/collapse.py", minutes=round((time.perf_counter() - start)/60, 1), rows=rows, metrics=metrics)
HERE.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")
