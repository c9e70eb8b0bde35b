"The rewards shipped for the embedded model: open_clip reads them, they are what their chapter says, and they train."
import math

import pytest
import torch
import torch.nn.functional as F

from ddpo_scratch import tiny, tiny_clip
from ddpo_scratch.prompts import article
from ddpo_scratch.reward_models import CLIPReward
from ddpo_scratch.rewards import compute_rewards, get_reward
from ddpo_scratch.train import TrainConfig, train

NAMES = ["tiny_clip_score", "tiny_preference", "tiny_aesthetic"]


@pytest.fixture(scope="module")
def batch(): return tiny_clip.draw_batch(32, torch.Generator().manual_seed(5), tiny.load_sprites())


def test_plain_open_clip_reads_the_folder(batch):
    import open_clip
    model = open_clip.create_model(f"local-dir:{tiny_clip.FOLDER}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip.FOLDER}")
    _, images, texts = batch
    with torch.no_grad():
        cosine = (F.normalize(model.encode_image(2*images - 1), dim=1)*F.normalize(model.encode_text(tokenizer(texts)), dim=1)).sum(1)
        score = tiny_clip.tiny_clip_score()(images, texts, [{}]*32)
    torch.testing.assert_close(score, cosine, atol=2e-3, rtol=0)                     # the reward's resize to 64 pixels may round


@pytest.mark.parametrize("name", NAMES)
def test_each_keeps_the_contract_and_gives_gradients(name, batch):
    _, images, texts = batch
    reward, x = get_reward(name), images.clone().requires_grad_(True)
    values, _ = compute_rewards(reward, x, texts, [{}]*32)
    assert reward.name == name and reward.differentiable and values.shape == (32,) and values.std() > .01
    g, = torch.autograd.grad(values.sum(), x)
    assert g.isfinite().all() and (g.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad for p in reward.net.parameters()) and not reward.net.training
    with torch.no_grad():
        alone = torch.cat([reward(images[i:i + 1], texts[i:i + 1], [{}]) for i in range(4)])
        torch.testing.assert_close(alone, values[:4].detach(), atol=1e-4, rtol=1e-4)
        assert torch.equal(reward(images, texts, [{}]*32), reward(images, texts, [{}]*32))
    other = texts[1:] + texts[:1]
    assert reward.uses_prompt != torch.equal(reward(images, texts, [{}]*32), reward(images, other, [{}]*32))


def test_shipped_clip_names_held_out_pictures():
    scenes, images, _ = tiny_clip.draw_batch(300, torch.Generator().manual_seed(11), tiny.load_sprites())
    names = [f"{article(c)} {c}" for c in tiny.CONCEPTS]
    assert tiny_clip.retrieval_accuracy(tiny_clip.tiny_clip_score(), images, names, [names[i] for i in scenes[:, 0]]) > .97


def test_preference_prefers_the_right_subject():
    scenes, images, _ = tiny_clip.draw_batch(100, torch.Generator().manual_seed(12), tiny.load_sprites())
    names = [tiny.CONCEPTS[i] for i in scenes[:, 0]]
    wrong = [tiny.CONCEPTS[(tiny.CONCEPTS.index(n) + 7) % 77] for n in names]
    reward = tiny_clip.tiny_preference()
    with torch.no_grad(): gain = reward(images, [f"{article(n)} {n}" for n in names], None) - reward(images, [f"{article(n)} {n}" for n in wrong], None)
    assert (gain > 0).float().mean() > .95 and 1 < gain.mean() < 6                    # the judge's odds say 3


def test_bradley_terry_loss_is_the_bernoulli_likelihood():
    a, b = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = -torch.distributions.Bernoulli(logits=a - b).log_prob(torch.ones(50, dtype=torch.float64)).mean()
    torch.testing.assert_close(tiny_clip.bradley_terry_loss(a, b), want)
    torch.testing.assert_close(tiny_clip.bradley_terry_loss(a + 3, b + 3), want)
    assert abs(tiny_clip.bradley_terry_loss(a, a).item() - math.log(2)) < 1e-12


def test_all_three_are_built_from_nothing(tmp_path):
    folder = tiny_clip.build_twins(tmp_path/"twins", clip_steps=2, head_steps=2, n=500, log=lambda line: None)
    shipped = {p.name for p in tiny_clip.FOLDER.iterdir()}
    assert shipped <= {p.name for p in folder.iterdir()}
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert tiny_clip.TinyPreference(folder)(images, ["a fox", "a cat"], None).shape == (2,)
    assert CLIPReward(f"local-dir:{folder}", None).embed_images(images).shape == (2, 64)


@pytest.mark.parametrize("name", NAMES)
def test_each_drives_the_trainer_by_name(name, tmp_path):
    config = TrainConfig(logdir=str(tmp_path), reward_fn=name, num_epochs=1, sample_num_steps=4, sample_batch_size=8, sample_num_batches_per_epoch=1, eval_num_images=0, stop_gain=0.)
    step = [s for s in train(config) if s.metrics][-1]
    assert math.isfinite(step.metrics["reward_mean"]) and step.metrics["reward_std"] > 0
