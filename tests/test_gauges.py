"Gauges: what a log shows in panels, and what is said of it."

import json
import math
from pathlib import Path

import pytest

from ddpo_scratch.run import gauges as G
from ddpo_scratch.config import TrainConfig, preset

ROOT = Path(__file__).resolve().parents[1]


def row(epoch, **more):
    "An epoch of a run that goes well."
    rewards = dict(reward_std=0.3, reward_min=-3.0, reward_max=-1.0)
    return dict(
        epoch=epoch, reward_queries=64 * epoch, reward_mean=-2 + 0.1 * epoch, **rewards, **more
    )


# Panels.


def titled(rows, config=None, unit=""):
    "The panels of a log by their titles in one line."
    made = G.panels(rows, config or TrainConfig(), unit)
    return {" ".join(panel.title.split()): panel for panel in made}


def test_a_panel_for_each_gauge_that_moves_and_fixed_seeds_start_before_the_first_epoch():
    rows = [
        row(e, eval_start=-3.0, eval_reward_mean=float(e), k=5.0, own_statistics=1.0, lr=1e-3 * e)
        for e in (1, 2)
    ]
    panels = titled(rows, unit="kB")
    assert list(panels) == [
        "reward of the samples (kB)",
        "reward of the fixed-seed pictures (kB)",
        "learning rate",
    ]
    fixed = panels["reward of the fixed-seed pictures (kB)"]
    assert (fixed.epochs, fixed.values) == ([0, 1, 2], [-3, 1, 2])
    samples = panels["reward of the samples (kB)"]
    assert (samples.low, samples.high) == ([-3, -3], [-1, -1])


def test_a_constant_gauge_is_shown_where_it_is_off_and_after_one_epoch():
    share = "share of samples measured against their own prompt"
    off = titled([row(e, own_statistics=0.2) for e in (1, 2)])
    assert off[share].off == [True, True] and off[share].limits == (0.5, math.inf)
    assert share in titled([row(1, own_statistics=1.0)])
    assert share not in titled([row(e, own_statistics=1.0) for e in (1, 2)])


def test_judges_and_parts_of_a_reward_have_panels():
    rows = [
        row(e) | {"judge/clip": 0.8 - 0.1 * e, "judge_start/clip": 0.8, "reward/size": float(e)}
        for e in (1, 2)
    ]
    panels = titled(rows)
    clip = panels["clip of the fixed-seed pictures, not trained on"]
    assert clip.epochs == [0, 1, 2] and clip.values == pytest.approx([0.8, 0.7, 0.6])
    assert panels["size of the samples"].values == [1, 2]
    assert not any("judge_start" in title for title in panels)


def test_panels_skip_what_was_not_measured():
    nan = float("nan")
    rows = [row(1, grad_norm=nan), row(2, grad_norm=0.5), row(3, grad_norm=0.6)]
    assert titled(rows)["size of the gradient"].epochs == [2, 3]
    assert not titled([row(e, kl=nan) for e in (1, 2)]).keys() & {"distance to the base model (KL)"}
    assert G.panels([], TrainConfig()) == []


def test_limits_are_those_of_the_findings():
    "Where a panel is off in every epoch diagnose speaks, and where it is not it is silent."
    clip = 1e-3
    for ratio, off in ((1.9, False), (2.1, True)):
        gauges = dict(approx_kl=(ratio * clip) ** 2 / 2, clip_range=clip)
        rows = [row(e, **gauges) | dict(reward_std=0.3 + 0.01 * e) for e in range(1, 7)]
        made = G.panels(rows, TrainConfig())
        assert any(all(panel.off) for panel in made) == off == bool(G.diagnose(rows, TrainConfig()))
    for gauge, value in dict(own_statistics=0.5, clip_fraction=0.5, grad_norm=1.0).items():
        for shift in (-0.01, 0.01):
            rows = [row(e) | {gauge: value + shift} for e in range(1, 7)]
            made = G.panels(rows, TrainConfig())
            spoken = bool(G.diagnose(rows, TrainConfig()))
            assert (
                any(all(panel.off) for panel in made)
                == spoken
                == ((shift < 0) == (gauge == "own_statistics"))
            )


@pytest.mark.parametrize("n", [0, 1, 3, 5, 8, 10, 11])
def test_curves_are_wide_enough_with_few_empty_places_and_epochs_below_each(n):
    shown = [G.Panel(f"gauge {i}", [1, 2, 3], [1.0, 2.0, 1.5], limits=(-1, 1.8)) for i in range(n)]
    fig = G.gauge_curves(shown)
    assert fig.get_size_inches()[0] * fig.dpi >= 720
    assert len(fig.axes) == n
    assert all(ax.get_xlabel() == "epoch" for ax in fig.axes)
    sizes = [ax.title.get_fontsize() for ax in fig.axes]
    assert all(size >= 9 for size in sizes)


def test_an_edge_that_is_near_is_seen_and_one_that_is_far_does_not_squeeze_the_line():
    near = G.Panel("near", [1, 2], [1.0, 2.0], limits=(-math.inf, 2.2))
    far = G.Panel("far", [1, 2], [1.0, 2.0], limits=(-math.inf, 100.0))
    first, second = G.gauge_curves([near, far]).axes
    assert first.get_ylim()[1] > 2.2 and second.get_ylim()[1] < 2.2


# Judges.


def test_pairs_are_compared_by_their_differences():
    before = [1.0, 2.0, 3.0, 4.0]
    after = [1.5, 2.3, 3.5, 4.3]
    got = G.compare(before, after, "kB")
    assert (got["n"], got["unit"]) == (4, "kB")
    assert got["before"]["mean"] == 2.5 and got["before"]["se"] == pytest.approx(0.6455, abs=1e-4)
    # of 0.5, 0.3, 0.5, 0.3
    assert got["difference"]["mean"] == pytest.approx(0.4)
    assert got["difference"]["se"] == pytest.approx(0.11547 / 2, abs=1e-5)
    assert json.loads(json.dumps(got)) == got


def test_pictures_that_a_judge_cannot_judge_are_left_out():
    nan = float("nan")
    assert G.compare([1.0, nan, 3.0], [nan, 2.0, 4.0])["n"] == 1
    nothing = G.compare([nan], [1.0])
    assert nothing["n"] == 0 and nothing["difference"] == dict(mean=0.0, se=0.0)
    assert G.compare([1.0], [2.0])["difference"] == dict(mean=1.0, se=0.0)


def well():
    "A log without findings."
    return [row(e, grad_norm=0.1) for e in range(1, 6)]


@pytest.mark.parametrize(
    "fall, wobble, speaks",
    [
        (0.0, 0.01, False),
        (-0.5, 0.01, False),  # rises
        (0.5, 0.01, True),
        (0.1, 0.001, False),  # certain, but a trifle beside the pictures' spread of 1
        (0.5, 3.0, False),  # an amount, but not certain
    ],
)
def test_a_judge_falls_if_it_is_certain_and_by_an_amount(fall, wobble, speaks):
    before = [math.sin(7 * i) * 2**0.5 for i in range(45)]
    after = [x - fall + wobble * math.cos(11 * i) for i, x in enumerate(before)]
    found = G.diagnose(well(), TrainConfig(), dict(clip=G.compare(before, after)))
    assert bool(found) == speaks
    if speaks:
        assert found[0].startswith("clip fell from ") and "Try: --lora_weight 0.5" in found[0]
        assert "kl_weight" in found[0] and "paired difference -0.5 ± " in found[0]


def test_judges_of_a_log_alone_fall_by_a_tenth():
    def said(after):
        judge = {"judge_start/clip": 0.76, "judge/clip": after}
        return G.diagnose([row | judge for row in well()], TrainConfig())

    (finding,) = said(0.58)
    assert finding.startswith("clip fell from 0.76 to 0.58: the pictures lose")
    assert said(0.73) == said(0.9) == []
    # pairs say more than means
    same = dict(clip=G.compare([0.5, 0.6], [0.5, 0.6]))
    judge = {"judge_start/clip": 0.76, "judge/clip": 0.58}
    assert G.diagnose([row | judge for row in well()], TrainConfig(), same) == []


# Findings. The rules one by one are in the notebook.


def test_findings_stay_quiet_on_runs_that_went_well_and_speak_on_the_one_that_collapsed():
    runs = json.loads((ROOT / "experiments/main_job.json").read_text())["runs"]
    findings = {
        name: G.diagnose(run["rows"], TrainConfig(**run["config"])) for name, run in runs.items()
    }
    good = [name for name in runs if name.isdigit()]
    assert len(good) >= 3 and not any(findings[name] for name in good)
    assert any("approx_kl" in finding for finding in findings["collapse"])


METHODS = "tiny tiny_sf tiny_rwr tiny_rwr_sparse tiny_alignprop tiny_draft_lv tiny_refl".split()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("epochs", [1, 3, 20])
def test_findings_of_any_method_and_length(name, epochs):
    gauges = dict(loss=1.0, grad_norm=0.1)
    if preset(name).method_class.differentiable:
        gauges |= dict(k=3.0)
    elif name in ("tiny", "tiny_sf"):
        gauges |= dict(approx_kl=0.0, clip_fraction=0.0, advantage_spread=2.0)
        gauges |= dict(ratio_spread=0.0 if name == "tiny_sf" else 0.01)
    else:
        gauges |= dict(advantage_spread=2.0)
    rows = [row(epoch, **gauges) for epoch in range(1, epochs + 1)]
    assert G.diagnose(rows, preset(name)) == []
    flat = dict(reward_mean=1.0, reward_std=0.0, reward_min=1.0, reward_max=1.0)
    findings = G.diagnose([r | flat for r in rows], preset(name))
    assert findings[0].startswith("reward_std is 0")


def test_findings_ignore_gauges_that_were_not_measured():
    nan = float("nan")
    rows = [row(epoch, approx_kl=nan, clip_fraction=nan, clip_range=1e-4) for epoch in range(1, 10)]
    assert G.diagnose(rows, TrainConfig()) == []
    assert G.diagnose([], TrainConfig()) == ["no epoch was finished: there is nothing to read yet"]


def test_a_picture_alone_has_no_advantage_and_that_is_what_is_said():
    "Its reward may depend on the picture as much as it likes."
    nan = float("nan")
    rows = [row(epoch, grad_norm=0.0, own_statistics=0.0) for epoch in range(1, 6)]
    alone = [
        r | dict(reward_queries=r["epoch"], reward_std=std, advantage_spread=nan)
        for r in rows
        for std in ([nan, 0.0][r["epoch"] % 2],)
    ]
    (finding,) = G.diagnose(alone, TrainConfig())
    assert "an epoch has one picture" in finding and "advantage is 0" in finding
    assert "sample_batch_size" in finding and "depends on the picture" not in finding
    several = G.diagnose(rows, TrainConfig())
    assert any("depends on the picture" in finding for finding in several)
    (finding,) = G.diagnose(alone, preset("tiny_alignprop"))
    assert "differentiable all the way" in finding


def test_samples_that_look_flat_are_no_finding_where_the_fixed_seeds_rise():
    flat = [row(e) | dict(reward_mean=-2.0 + 0.1 * (-1) ** e) for e in range(1, 13)]
    (finding,) = G.diagnose(flat, TrainConfig())
    assert finding.startswith(
        "reward_mean is flat over 12 epochs: an update averages over 4 samples of 20 steps"
    )
    start = dict(eval_start=-2.5)
    risen = [r | start | dict(eval_reward_mean=-2.5 + 0.02 * r["epoch"]) for r in flat]
    assert G.diagnose(risen, TrainConfig()) == []
    stayed = [r | start | dict(eval_reward_mean=-2.5) for r in flat]
    assert G.diagnose(stayed, TrainConfig()) == [finding]


def test_clipped_gradients_are_normal_for_long_chains_only():
    rows = [row(epoch, grad_norm=4.0) for epoch in range(1, 6)]
    config = preset("tiny_alignprop")
    assert G.diagnose(rows, config) == []
    (finding,) = G.diagnose([r | dict(grad_norm=40.0) for r in rows], config)
    assert "fewer backprop_steps" in finding
    (finding,) = G.diagnose(rows, TrainConfig())
    assert "always clipped to 1" in finding and "outliers" in finding


def test_overshooting_is_measured_against_the_runs_clip_range():
    gauges = dict(grad_norm=0.1, approx_kl=5e-7, clip_fraction=0.1, ratio_spread=0.01)
    rows = [row(epoch, clip_range=1.6e-3, **gauges) for epoch in range(1, 6)]
    assert G.diagnose(rows, TrainConfig()) == []
    (finding,) = G.diagnose([r | dict(clip_range=2.5e-5) for r in rows], TrainConfig())
    assert "the clip range of 2.5e-05" in finding
    without = [row(epoch, **gauges) for epoch in range(1, 6)]
    assert G.diagnose(without, TrainConfig()) == []


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_axes_of_epochs_have_whole_numbers(n):
    "A run of one epoch would else have ticks at 0.96, 0.98, 1.00 ..."
    epochs = list(range(1, n + 1))
    (ax,) = G.gauge_curves([G.Panel("a", epochs, [0.5 * k for k in epochs])]).axes
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks)


def test_judges_that_fell_are_named_as_they_are_said():
    generator = G.torch.Generator().manual_seed(0)
    old = G.torch.randn(45, generator=generator)
    lost, kept = G.compare(old, old - 0.5), G.compare(old, old + 0.1)
    assert G.fallen(dict(clip=lost, animal=kept, other=lost)) == ["clip", "other"]
    said = G.diagnose([row(1)], TrainConfig(), dict(clip=lost, animal=kept))
    assert [line.split(" fell")[0] for line in said if " fell from" in line] == ["clip"]
    assert G.fallen({}) == []
