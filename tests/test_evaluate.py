"Fixed seeds do not depend on batches, and summaries are the numbers they say."
import pytest
import torch

from ddpo_scratch import evaluate as E
from ddpo_scratch.sd import StableDiffusion, load_pipeline


def test_a_picture_depends_on_its_place_seed_and_prompt_alone():
    den = StableDiffusion(load_pipeline("tiny"), 1.)
    prompts = ["a fox", "a cat", "a cat"]
    a, b = (E.fixed_seed_images(den, prompts, n_steps=4, batch_size=n) for n in (3, 1))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert not torch.allclose(a[1], a[2], atol=.05) and not torch.allclose(a, E.fixed_seed_images(den, prompts, seed=1, n_steps=4), atol=.05)


def test_summary():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    s = E.summarize(images, [1, 2, 3, 4], classify=lambda x: list("abca"), names=list("abcd"))
    assert s["n"] == 4 and s["reward_mean"] == 2.5 and s["accuracy"] == .75
    assert abs(s["reward_se"] - torch.tensor([1., 2, 3, 4]).std().item()/2) < 1e-6
    with pytest.raises(ValueError): E.summarize(images, [1]*4, classify=lambda x: list("ab"), names=list("abcd"))


def test_bad_input():
    with pytest.raises(ValueError, match="pairs"): E.before_after(torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8))
    with pytest.raises(ValueError, match="metrics.jsonl"): E.read_metrics("nowhere")
