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


@pytest.mark.parametrize("n, rows", [(3, 2), (9, 4)])
def test_captions_stand_under_their_pictures(n, rows):
    pictures = flat_pictures(n)
    before, after = ([f"{when} {i}" for i in range(n)] for when in ("old", "new"))
    fig = E.before_after(pictures, pictures, captions=[before, after])
    captions = [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]
    assert sorted(captions) == sorted(before + after)
    for ax in fig.axes:
        if name := ax.get_xlabel():
            grey = pictures[int(name.split()[1]), 0, 0, 0].item()
            assert abs(ax.images[0].get_array().mean() - grey) < 1e-6
    first_row = [ax.get_xlabel() for ax in fig.axes[: min(n, 8)]]
    assert first_row == before[: min(n, 8)]


def test_dollars_in_prompts_are_not_mathematics(tmp_path):
    from PIL import Image

    words = [r"$\frac{$", "a $5 bill, not $6"]
    E.save_look(tmp_path / "look.png", flat_pictures(2), words, [1.0, 2.0], "$")
    Image.open(tmp_path / "look.png").verify()


def test_long_prompts_end_after_three_lines():
    fig = E.plot_grid(flat_pictures(1), ["word " * 99 + "end"], n_cols=8)
    title = fig.axes[0].get_title()
    assert title.count("\n") == 2 and title.endswith("...")


@pytest.mark.parametrize("n", [1, 8, 46])
def test_a_look_is_a_picture_on_disk_with_its_numbers(tmp_path, monkeypatch, n):
    from PIL import Image

    drawn = []
    plot_grid = E.plot_grid
    monkeypatch.setattr(
        E, "plot_grid", lambda *a, **k: drawn.append(plot_grid(*a, **k)) or drawn[0]
    )
    path = tmp_path / "eval/epoch_0003.png"
    E.save_look(path, flat_pictures(n), [f"p{i}" for i in range(n)], torch.arange(n) * 1.5, "kB")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width >= 720
    assert [path.name for path in path.parent.iterdir()] == ["epoch_0003.png"]
    shown = [ax for ax in drawn[0].axes if ax.images]
    assert len(shown) == min(n, 45)
    assert (shown[-1].get_title(), shown[0].get_xlabel()) == (f"p{len(shown) - 1}", "0.00 kB")
    heading = drawn[0].get_suptitle()
    mean = 1.5 * (n - 1) / 2
    assert heading.startswith(f"mean reward {E.amount(mean, 'kB')}")
    assert ("the first 45 of 46 pictures" in heading) == (n > 45)


def test_a_look_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "look.png"
    path.write_bytes(b"before")

    def half(self, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        E.save_look(path, flat_pictures(1), ["a"], [1.0])
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "value, se, text",
    [
        (-2.3936, None, "-2.39"),
        (-2.3936, 0.0437, "-2.394 ± 0.044"),
        (2.0, None, "2.00"),
        (999.9, None, "1,000"),
        (51234.5, 1234.5, "51,234 ± 1,234"),
        (0.5, 0.0, "0.500"),
        (0.5, float("nan"), "0.500"),
        (float("nan"), None, "nan"),
        (float("inf"), None, "inf"),
        (1e-7, None, "1.00e-07"),
    ],
)
def test_amounts_have_the_digits_that_they_deserve(value, se, text):
    assert E.amount(value, se=se) == text
    assert E.amount(value, "kB", se) == f"{text} kB"


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
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert labels == [samples.get_label(), fixed_seeds.get_label()]
    alone = E.reward_curve(rows[:1], names=["guidance 1", ""])
    assert [text.get_text() for text in alone.axes[0].get_legend().get_texts()] == ["guidance 1"]
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


@pytest.mark.parametrize("n", [1, 2, 20])
def test_the_axis_of_queries_has_whole_numbers(n):
    rows = [
        dict(reward_queries=2 * k, reward_mean=0.1 * k, reward_std=0.1) for k in range(1, n + 1)
    ]
    (ax,) = E.reward_curve(rows).axes
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_a_sheet_is_cut_into_the_pictures_it_holds(ending, tmp_path):
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(16, 2).repeat_interleave(16, 3)  # what JPEG keeps
    file = tmp_path / "new" / f"sheet.{ending}"
    E.save_sheet(images, file, columns=3, quality=100)
    again = E.read_sheet(file)
    assert again.shape == images.shape and again.dtype == torch.float32
    error = (again - images).abs()
    assert error.max() <= 0.51 / 255 if ending == "png" else error.mean() < 0.1
    nearest = torch.cdist(again.flatten(1), images.flatten(1)).argmin(1)
    assert nearest.tolist() == list(range(6)), "row by row"
    with pytest.raises(ValueError, match="6 pictures in rows of 4"):
        E.save_sheet(images, file, columns=4)
    with pytest.raises(ValueError, match="192 x 128 pixels: pictures of 48 x 48 do not fill it"):
        E.read_sheet(file, size=48)


def test_figures_show_themselves_before_pyplot_is_used():
    "Jupyter draws a plain Figure only once pyplot has been; before, a reader sees its repr."
    from IPython.core.formatters import DisplayFormatter

    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = [dict(reward_queries=i, reward_mean=-2.0 + i, reward_std=0.4) for i in range(3)]
    for fig in (E.plot_grid(images), E.before_after(images, images), E.reward_curve(rows)):
        data, _ = DisplayFormatter().format(fig)
        assert data["image/png"].startswith(b"\x89PNG")
