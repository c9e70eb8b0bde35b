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


def test_one_picture_has_no_spread():
    s = E.summarize(torch.rand(1, 3, 8, 8), [2.])
    assert s == dict(n=1, reward_mean=2., reward_se=0., pixel_std=0.)


@pytest.mark.parametrize("n, rows", [(3, 2), (8, 2), (9, 4)])
def test_pairs_of_rows_show_every_picture(n, rows):
    pictures = torch.linspace(0, .9, n)[:, None, None, None].expand(-1, 3, 8, 8).clone().requires_grad_()
    fig = E.before_after(pictures, pictures, [f"p{i}" for i in range(n)])
    assert len(fig.axes) == rows*min(n, 8) and [ax.get_title() for ax in fig.axes if ax.get_title()] == [f"p{i}" for i in range(n)]
    shown = [ax.images[0].get_array().mean() for ax in fig.axes]
    assert all(sum(abs(v - x) < 1e-6 for v in shown) == 2 for x in pictures[:, 0, 0, 0].tolist())


def test_prompts_are_a_list():
    for prompts in ("a fox", []):
        with pytest.raises(ValueError, match=r"a list of prompts, given .*: write \[prompt\]"): E.fixed_seed_images(None, prompts)


def test_a_log_cut_off_in_its_last_line_is_read_and_one_broken_before_is_named(tmp_path):
    (tmp_path/"metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert E.read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    (tmp_path/"metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl': line 2 is no JSON"): E.read_metrics(tmp_path)
