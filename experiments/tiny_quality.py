"""How well the embedded model draws what it is asked for.

    python experiments/tiny_quality.py          # about 4 minutes on two CPU cores

Every common animal with 8 seeds, every other concept with 4, at the default guidance (3) and at the main job's, 20 steps,
each with the sampler of that use: eta 0 and eta 1. The judge was trained on composed pictures only. Writes tiny_quality.json.
"""
import json
from pathlib import Path

import torch

from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.prompts import COMMON_ANIMALS, OBJECTS, OTHER_ANIMALS, article
from ddpo_scratch.sd import StableDiffusion, load_pipeline
from ddpo_scratch.tiny import CONCEPTS, compose, draw_scenes, load_classifier, load_sprites
from ddpo_scratch.train import TrainConfig

torch.set_num_threads(2)
judge, pipe, rows = load_classifier(), load_pipeline("tiny"), []
g = torch.Generator().manual_seed(4321)
for group, weights in (("common animals", [1.]*45 + [0.]*32), ("other animals", [0.]*45 + [1.]*16 + [0.]*16), ("objects", [0.]*61 + [1.]*16)):
    scenes = draw_scenes(1000, g, torch.tensor(weights))
    named = judge.names(compose(load_sprites(), scenes, g)[0])
    right = sum(n == CONCEPTS[int(s[0])] for n, s in zip(named, scenes))/len(scenes)
    rows.append(dict(pictures="held-out composed", group=group, n=1000, accuracy=round(right, 3)))
for guidance, eta, use in ((3., 0., "default"), (TrainConfig.sample_guidance_scale, 1., "main job")):
    policy = StableDiffusion(pipe, guidance)
    for group, names, seeds in (("common animals", COMMON_ANIMALS, 8), ("other animals", OTHER_ANIMALS, 4), ("objects", OBJECTS, 4)):
        prompts = [f"{article(a)} {a}" for a in names]
        hits = torch.tensor([[n == a for n, a in zip(judge.names(fixed_seed_images(policy, prompts, 100 + s, 20, eta, 45)), names)] for s in range(seeds)]).float()
        by = dict(zip(names, hits.mean(0).tolist()))
        worst = min(by, key=by.get)
        rows.append(dict(pictures=f"generated, {use}", group=group, guidance=guidance, eta=eta, n=hits.numel(), accuracy=round(hits.mean().item(), 3),
                         worst=f"{worst} {by[worst]:.0%}", under_half=sum(v < .5 for v in by.values()), by_concept=by))
        print({k: v for k, v in rows[-1].items() if k != "by_concept"}, {k: v for k, v in by.items() if v < .75}, flush=True)
Path(__file__).with_suffix(".json").write_text(json.dumps(dict(command="python experiments/tiny_quality.py", rows=rows), indent=1) + "\n")
