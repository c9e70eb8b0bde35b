"""How well the embedded model draws what it is asked for.

    python experiments/tiny_quality.py          # about 4 minutes on two CPU cores

Every common animal with 8 seeds, every other concept with 4, at the default guidance (3) and at the
main job's, 20 steps, each with the sampler of that use: eta 0 and eta 1. The judge was trained on
composed pictures only. Writes tiny_quality.json.
"""

import json
from pathlib import Path

import torch

from ddpo_scratch.config import TrainConfig
from ddpo_scratch.evaluate import fixed_seed_images
from ddpo_scratch.models.sd import StableDiffusion, load_pipeline
from ddpo_scratch.models.tiny import CONCEPTS, compose, draw_scenes, load_classifier, load_sprites
from ddpo_scratch.prompts import COMMON_ANIMALS, OBJECTS, OTHER_ANIMALS, article

# group -> (names, seeds for each); CONCEPTS holds the groups one after the other
GROUPS = {
    "common animals": (COMMON_ANIMALS, 8),
    "other animals": (OTHER_ANIMALS, 4),
    "objects": (OBJECTS, 4),
}
USES = [(3.0, 0.0, "default"), (TrainConfig.sample_guidance_scale, 1.0, "main job")]


def composed_row(judge, group, generator):
    "Measure the judge itself, on pictures composed as those it was trained on."
    names = GROUPS[group][0]
    weights = torch.tensor([float(concept in names) for concept in CONCEPTS])
    scenes = draw_scenes(1000, generator, weights)
    seen = judge.names(compose(load_sprites(), scenes, generator)[0])
    right = sum(name == CONCEPTS[int(scene[0])] for name, scene in zip(seen, scenes))
    accuracy = round(right / len(scenes), 3)
    return dict(pictures="held-out composed", group=group, n=1000, accuracy=accuracy)


def recognised(judge, policy, names, seed, eta):
    "Draw each name once, and tell which pictures the judge names right."
    prompts = [f"{article(name)} {name}" for name in names]
    seen = judge.names(fixed_seed_images(policy, prompts, seed, 20, eta, 45))
    return [a == b for a, b in zip(names, seen)]


def generated_row(judge, pipe, group, guidance, eta, use):
    "Measure the embedded model on one group of concepts."
    names, seeds = GROUPS[group]
    policy = StableDiffusion(pipe, guidance)
    rows = [recognised(judge, policy, names, 100 + seed, eta) for seed in range(seeds)]
    hits = torch.tensor(rows).float()
    by_concept = dict(zip(names, hits.mean(0).tolist()))
    worst = min(by_concept, key=by_concept.get)
    return dict(
        pictures=f"generated, {use}",
        group=group,
        guidance=guidance,
        eta=eta,
        n=hits.numel(),
        accuracy=round(hits.mean().item(), 3),
        worst=f"{worst} {by_concept[worst]:.0%}",
        under_half=sum(share < 0.5 for share in by_concept.values()),
        by_concept=by_concept,
    )


def main():
    torch.set_num_threads(2)
    judge = load_classifier()
    pipe = load_pipeline("tiny")
    generator = torch.Generator().manual_seed(4321)
    rows = [composed_row(judge, group, generator) for group in GROUPS]
    for guidance, eta, use in USES:
        for group in GROUPS:
            row = generated_row(judge, pipe, group, guidance, eta, use)
            rows.append(row)
            weak = {name: share for name, share in row["by_concept"].items() if share < 0.75}
            print({k: v for k, v in row.items() if k != "by_concept"}, weak, flush=True)
    log = dict(command="python experiments/tiny_quality.py", rows=rows)
    Path(__file__).with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
