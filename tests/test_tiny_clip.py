"The embedded model's rewards: open_clip reads them, they do as their chapter says, they train."

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

from ddpo_scratch.config import TrainConfig
from ddpo_scratch.models.tiny import CONCEPTS, caption, load_classifier, load_sprites
from ddpo_scratch.rewards.base import RewardError, compute_rewards, get_reward
from ddpo_scratch.rewards.models import CLIPReward
from ddpo_scratch.rewards.tiny_animal import _concept
from ddpo_scratch.rewards.tiny_clip import (
    TinyPreference,
    bradley_terry_loss,
    build_twins,
    draw_batch,
    tiny_clip_score,
)
from ddpo_scratch.train import train

REWARDS = ["tiny_clip_score", "tiny_preference", "tiny_aesthetic", "tiny_animal"]
NAMES = [caption((i, 0, 0, 0), (1.0, 1.0)) for i in range(len(CONCEPTS))]  # "a cat", "a dog", ...


@pytest.fixture(scope="module")
def sprites():
    return load_sprites()


@pytest.fixture(scope="module")
def batch(sprites):
    return draw_batch(32, torch.Generator().manual_seed(5), sprites)


@torch.no_grad()
def test_plain_open_clip_reads_the_folder(batch):
    score = tiny_clip_score()
    model = open_clip.create_model(score.model).eval()
    tokenizer = open_clip.get_tokenizer(score.model)
    _, images, texts = batch
    v = F.normalize(model.encode_image(2 * images - 1), dim=1)
    w = F.normalize(model.encode_text(tokenizer(texts)), dim=1)
    # the reward's resize to 64 pixels may round
    torch.testing.assert_close(score(images, texts, [{}] * 32), (v * w).sum(1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", REWARDS)
def test_each_keeps_the_contract(name, batch):
    _, images, texts = batch
    reward = get_reward(name)
    assert reward.name == name and reward.differentiable
    values, _ = compute_rewards(reward, images, texts, [{}] * 32)
    assert values.shape == (32,) and values.std() > 0.01
    again = reward(images, texts, [{}] * 32)
    assert torch.equal(again, values)
    alone = torch.cat([reward(images[i : i + 1], texts[i : i + 1], [{}]) for i in range(4)])
    torch.testing.assert_close(alone, values[:4], atol=1e-4, rtol=1e-4)
    other = reward(images, texts[1:] + texts[:1], [{}] * 32)
    assert reward.uses_prompt != torch.equal(values, other)


@pytest.mark.parametrize("name", REWARDS)
def test_each_gives_gradients_and_learns_nothing(name, batch):
    _, images, texts = batch
    reward = get_reward(name)
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(reward(x, texts, [{}] * 32).sum(), x)
    assert g.isfinite().all() and (g.flatten(1).norm(dim=1) > 0).all()
    assert not reward.network.training
    assert not any(p.requires_grad for p in reward.network.parameters())


@torch.no_grad()
def test_shipped_clip_names_held_out_pictures(sprites):
    scenes, images, _ = draw_batch(300, torch.Generator().manual_seed(11), sprites)
    score = tiny_clip_score()
    nearest = (score.embed_images(images) @ score.embed_prompts(NAMES).T).argmax(1)
    assert (nearest == scenes[:, 0]).float().mean() > 0.97


@torch.no_grad()
def test_preference_prefers_the_right_subject(sprites):
    scenes, images, _ = draw_batch(100, torch.Generator().manual_seed(12), sprites)
    reward = TinyPreference()
    right = reward(images, [NAMES[i] for i in scenes[:, 0]], None)
    wrong = reward(images, [NAMES[(i + 7) % 77] for i in scenes[:, 0]], None)
    gain = right - wrong
    assert (gain > 0).float().mean() > 0.95 and 1 < gain.mean() < 6  # the judge's odds say 3


@torch.no_grad()
def test_the_animal_is_the_classifiers_own_log_probability(sprites):
    scenes, images, _ = draw_batch(100, torch.Generator().manual_seed(13), sprites)
    nouns = [CONCEPTS[i] for i in scenes[:, 0]]
    animal = get_reward("tiny_animal")
    values, _ = compute_rewards(animal, images, ["x"] * 100, [{"noun": noun} for noun in nouns])
    want = load_classifier()(images).log_softmax(1)[torch.arange(100), scenes[:, 0]]
    torch.testing.assert_close(values, want)
    assert values.mean() > -0.3 and animal.unit == "nats"
    named, _ = compute_rewards(animal, images, [f"one {noun}" for noun in nouns], [{}] * 100)
    assert torch.equal(named, values)
    large = F.interpolate(images, (128, 96), mode="bilinear")
    big, _ = compute_rewards(animal, large, nouns, [{}] * 100)
    assert big.mean() > -1  # another size and shape, much the same animals


WHICH = {
    "a fox": "fox",
    "3 geese": "goose",
    "Wolves!": "wolf",
    "a cat in a boat": "cat",
    "a boat with a cat": "cat",
    "a boat": "boat",
    "a fox and an owl": "fox",
    "a panda, oil on canvas": "panda",
}


@pytest.mark.parametrize("prompt, noun", WHICH.items())
def test_the_animal_is_found_in_the_prompt(prompt, noun):
    assert CONCEPTS[_concept(prompt, {})] == noun == CONCEPTS[_concept("a car", {"noun": noun})]


@pytest.mark.parametrize(
    "prompt, metadata, message",
    [
        ("a spaceship", {}, "the prompt 'a spaceship' names nothing that the classifier"),
        ("", None, "the prompt '' names nothing"),
        ("a foxglove", {"answers": ["fox"]}, "'a foxglove' names nothing"),
        ("a fox", {"noun": "tench"}, "'tench' is nothing that .*one of 77 nouns such as cat, dog"),
    ],
)
def test_a_prompt_without_an_animal_is_named(prompt, metadata, message):
    with pytest.raises(RewardError, match=f"'tiny_animal' failed .*{message}.*common_animals"):
        compute_rewards(get_reward("tiny_animal"), torch.rand(1, 3, 64, 64), [prompt], [metadata])


def test_bradley_terry_loss_is_the_bernoulli_likelihood():
    a, b = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    choices = torch.distributions.Bernoulli(logits=a - b)
    want = -choices.log_prob(torch.ones(50, dtype=torch.float64)).mean()
    torch.testing.assert_close(bradley_terry_loss(a, b), want)
    torch.testing.assert_close(bradley_terry_loss(a + 3, b + 3), want)
    assert abs(bradley_terry_loss(a, a).item() - math.log(2)) < 1e-12


def test_all_three_are_built_from_nothing(tmp_path):
    lines = []
    folder = build_twins(tmp_path / "twins", clip_steps=2, head_steps=2, n=500, log=lines.append)
    assert [line.split()[0] for line in lines] == ["clip", "preference", "aesthetic"]
    shipped = {path.name for path in TinyPreference().folder.iterdir()}
    assert shipped == {path.name for path in folder.iterdir()}
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert TinyPreference(folder)(images, ["a fox", "a cat"], None).shape == (2,)
    assert CLIPReward(f"local-dir:{folder}", None).embed_images(images).shape == (2, 64)


@pytest.mark.parametrize("name", REWARDS)
def test_each_drives_the_trainer_by_name(name, tmp_path):
    config = TrainConfig(
        logdir=str(tmp_path),
        reward_fn=name,
        num_epochs=1,
        sample_num_steps=4,
        sample_batch_size=8,
        sample_num_batches_per_epoch=1,
        eval_num_images=0,
        stop_gain=0.0,
    )
    step = [step for step in train(config) if step.metrics][-1]
    assert math.isfinite(step.metrics["reward_mean"]) and step.metrics["reward_std"] > 0
