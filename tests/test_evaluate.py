"Fixed seeds do not depend on batches, grids can be read, and summaries are the numbers they say."

import itertools

import pytest
import torch

from ddpo_scratch import evaluate as E
from ddpo_scratch.rollout import generator_for


def test_a_picture_depends_on_its_place_seed_and_prompt_alone():
    from ddpo_scratch.models.sd import StableDiffusion, load_pipeline

    denoiser = StableDiffusion(load_pipeline("tiny"), 1.0)
    prompts = ["a fox", "a cat", "a cat"]
    whole, single = (
        E.fixed_seed_images(denoiser, prompts, n_steps=4, batch_size=n) for n in (3, 1)
    )
    torch.testing.assert_close(whole, single, atol=1e-3, rtol=0)
    assert not torch.allclose(whole[1], whole[2], atol=0.05)
    other_seed = E.fixed_seed_images(denoiser, prompts, seed=1, n_steps=4)
    assert not torch.allclose(whole, other_seed, atol=0.05)


@pytest.mark.parametrize("prompts", ["a fox", []])
def test_prompts_are_a_list(prompts):
    with pytest.raises(ValueError, match=r"a list of prompts, given .*: write \[prompt\]"):
        E.fixed_seed_images(None, prompts)


# Prompts.


class Listed:
    "A source that lists its prompts."

    prompts = [f"animal {i}" for i in range(45)]
    metadata = None

    def __call__(self, generator):
        raise AssertionError("a source with a list is not asked to draw")


def test_prompts_are_spread_over_a_list():
    prompts, metadata = E.spread_prompts(Listed(), 5)
    assert prompts == [f"animal {i}" for i in (0, 9, 18, 27, 36)]
    assert metadata == [{"line": i} for i in (0, 9, 18, 27, 36)]
    assert E.spread_prompts(Listed(), 45)[0] == Listed.prompts
    assert E.spread_prompts(Listed(), 90)[0][::2] == Listed.prompts


def test_metadata_of_a_list_is_copied():
    source = Listed()
    source.metadata = [{"noun": i} for i in range(45)]
    metadata = E.spread_prompts(source, 3)[1]
    assert metadata == [{"noun": 0}, {"noun": 15}, {"noun": 30}]
    metadata[0]["noun"] = "changed"
    assert source.metadata[0] == {"noun": 0}


def test_a_source_without_a_list_draws_with_keyed_generators():
    def source(generator):
        return f"a {torch.randint(999, (1,), generator=generator).item()}", {"drawn": True}

    prompts, metadata = E.spread_prompts(source, 3, seed=7)
    assert prompts == [source(generator_for(7, i, "eval prompt"))[0] for i in range(3)]
    assert metadata == [{"drawn": True}] * 3
    assert prompts == E.spread_prompts(source, 4, seed=7)[0][:3]
    assert prompts != E.spread_prompts(source, 3, seed=8)[0]


# Grids.


def flat_pictures(n):
    "n grey pictures, each of another grey."
    return torch.linspace(0, 0.9, n)[:, None, None, None].expand(-1, 3, 8, 8).clone()


@pytest.mark.parametrize("n, rows", [(3, 2), (8, 2), (9, 4)])
def test_pairs_of_rows_show_every_picture(n, rows):
    pictures = flat_pictures(n).requires_grad_()
    names = [f"p{i}" for i in range(n)]
    fig = E.before_after(pictures, pictures, names)
    assert len(fig.axes) == rows * min(n, 8)
    assert [ax.get_title() for ax in fig.axes if ax.get_title()] == names
    shown = [ax.images[0].get_array().mean() for ax in fig.axes]
    for grey in pictures[:, 0, 0, 0].tolist():
        assert sum(abs(v - grey) < 1e-6 for v in shown) == 2
    assert [ax.get_ylabel() for ax in fig.axes if ax.get_ylabel()] == ["before", "after"] * (
        rows // 2
    )


def test_before_and_after_are_pairs():
    with pytest.raises(ValueError, match="pairs"):
        E.before_after(torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8))


@pytest.mark.parametrize("n_cols", [1, 4, 8])
def test_grids_are_wide_enough_and_titles_do_not_overlap(n_cols):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    titles = ["an otter washing the dishes\n-1.23", "a cat", "eight green wolves\nand a boat"] * 4
    fig = E.plot_grid(flat_pictures(12), titles, n_cols)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    assert canvas.get_width_height()[0] >= 720
    boxes = [ax.title.get_window_extent(canvas.get_renderer()) for ax in fig.axes if ax.get_title()]
    assert len(boxes) == 12
    assert all(ax.title.get_fontsize() >= 9 for ax in fig.axes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_reward_curve_starts_where_the_fixed_seeds_did():
    rows = [
        dict(reward_queries=8, reward_mean=1.0, reward_std=0.5),
        dict(
            reward_queries=16, reward_mean=2.0, reward_std=0.5, eval_start=0.0, eval_reward_mean=3.0
        ),
    ]
    fig = E.reward_curve(rows, "kB")
    samples, fixed_seeds = fig.axes[0].lines
    assert samples.get_xydata().tolist() == [[8, 1], [16, 2]]
    assert fixed_seeds.get_xydata().tolist() == [[0, 0], [16, 3]]
    assert fig.axes[0].get_ylabel() == "kB"
    assert fig.get_size_inches()[0] * fig.dpi >= 720


# Summaries.


def test_summary():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    summary = E.summarize(images, [1, 2, 3, 4], lambda x: list("abca"), list("abcd"))
    assert (summary["n"], summary["reward_mean"], summary["accuracy"]) == (4, 2.5, 0.75)
    assert summary["reward_se"] == pytest.approx(torch.tensor([1.0, 2, 3, 4]).std().item() / 2)
    assert summary["pixel_std"] == images.std(0).mean().item()
    with pytest.raises(ValueError):
        E.summarize(images, [1] * 4, lambda x: list("ab"), list("abcd"))


def test_one_picture_has_no_spread():
    summary = E.summarize(torch.rand(1, 3, 8, 8), [2.0])
    assert summary == dict(n=1, reward_mean=2.0, reward_se=0.0, pixel_std=0.0)
