"Preferences: losses by hand and in diffusers' words, pairs, files of pairs, and short runs."

import json
import math
import sys

import flow_models
import processes
import pytest
import torch
import torch.nn.functional as F
from runs import SMALL, finished, numbers, random_model, small, whole_and_resumed
from samples import randn
from torch.distributions import Normal
from torch.testing import assert_close
from torchvision.utils import save_image

from ddpo_scratch.config import TrainConfig, check_config
from ddpo_scratch.diffusion import GaussianDenoiser, Schedule
from ddpo_scratch.methods.base import Batch, find_method
from ddpo_scratch.methods.dpo import D3PO, DPO, KTO, OfflineDPO, Pair, best_and_worst
from ddpo_scratch.methods.dpo import d3po_loss, dpo_loss, encode_pictures, kto_loss, read_pairs
from ddpo_scratch.methods.dpo import thumbs
from ddpo_scratch.models.base import load
from ddpo_scratch.models.sd import StableDiffusion
from ddpo_scratch.rollout import generator_for, replay_log_prob, sample
from ddpo_scratch.run.setup import GroupStream, setup
from ddpo_scratch.train import collect, train

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
METHODS = dict(dpo=DPO, kto=KTO, d3po=D3PO, dpo_offline=OfflineDPO)


def normal(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float64)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


# Losses.


@pytest.mark.parametrize(
    "numbers_, beta, value",
    [
        # -log sigmoid(-(beta / 2) ((w - w_ref) - (l - l_ref)))
        ((0.80, 0.90, 0.85, 0.85), 20.0, 0.31326168751822286),
        ((0.90, 0.80, 0.85, 0.85), 20.0, 1.3132616875182228),
        ((0.10, 0.10, 0.10, 0.10), 5000.0, 0.6931471805599453),
        ((0.1004, 0.1, 0.1, 0.1), 5000.0, 1.3132616875182228),
    ],
)
def test_dpo_loss_by_hand(numbers_, beta, value):
    loss = dpo_loss(*(column(number) for number in numbers_), beta)
    assert abs(loss.item() - value) < 1e-9


def script_loss(policy, base, beta):
    "Write the loss as diffusers' script does: chunks of winners and losers, no half."
    model_w, model_l = policy.chunk(2)
    ref_w, ref_l = base.chunk(2)
    inside = -1 * beta * ((model_w - model_l) - (ref_w - ref_l))
    return -F.logsigmoid(inside)


@pytest.mark.parametrize("beta", [1.0, 500.0, 5000.0])
def test_dpo_loss_is_that_of_the_scripts_with_and_without_the_half(beta):
    policy, base = 0.1 + 1e-3 * normal(64), 0.1 + 1e-3 * normal(64, seed=1)
    ours = dpo_loss(*policy.chunk(2), *base.chunk(2), beta, reduction="none")
    assert_close(ours, script_loss(policy, base, beta / 2), rtol=0, atol=1e-12)
    assert_close(dpo_loss(*policy.chunk(2), *base.chunk(2), beta), ours.mean())


@pytest.mark.parametrize(
    "numbers_, label, anchor, value",
    [
        ((0.80, 0.85), 1.0, 0.0, 0.2689414213699951),
        ((0.80, 0.85), -1.0, 0.0, 0.7310585786300049),
        ((0.80, 0.85), 1.0, 0.05, 0.5),
        ((0.80, 0.85), -1.0, 0.10, 0.2689414213699951),
        ((0.80, 0.85), 0.0, 0.0, 0.0),
    ],
)
def test_kto_loss_by_hand(numbers_, label, anchor, value):
    loss = kto_loss(*(column(number) for number in numbers_), column(label), 20.0, anchor)
    assert abs(loss.item() - value) < 1e-9


def test_d3po_loss_of_gaussians_is_that_of_torchs_log_probs():
    x, now, base = normal(2, 5), normal(2, 5, seed=1), normal(2, 5, seed=2)
    log_prob = Normal(now, 1.0).log_prob(x).mean(1)
    base_log_prob = Normal(base, 1.0).log_prob(x).mean(1)
    ratio = (log_prob - base_log_prob).exp()
    clipped = ratio.clamp(0.5, 1.5)
    by_hand = math.log(1 + (clipped[1] / clipped[0]).item() ** 2.0)
    ours = d3po_loss(*log_prob[:, None], *base_log_prob[:, None], beta=2.0, clip_range=0.5)
    assert abs(ours.item() - by_hand) < 1e-9


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "log_ratio, moves", [(-0.2, False), (-0.05, True), (0.05, True), (0.2, False)]
)
def test_d3po_clips_both_sides_of_both(side, log_ratio, moves):
    log_probs = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        log_probs[side] += log_ratio
    d3po_loss(*log_probs, column(0.0), column(0.0), beta=1.0, clip_range=0.1).backward()
    assert (log_probs[side].grad != 0) == moves
    assert log_probs[1 - side].grad.abs() > 0.1


@pytest.mark.parametrize("loss", [dpo_loss, kto_loss])
def test_no_gradient_goes_into_the_base_model(loss):
    columns = [torch.full((3,), 0.5, requires_grad=True) for _ in range(4)]
    more = (1.0, 0.0) if loss is kto_loss else (1.0,)
    given = columns[:3] if loss is kto_loss else columns
    loss(*given, *more).backward()
    base = columns[1:2] if loss is kto_loss else columns[2:]
    assert columns[0].grad.abs().min() > 0
    assert all(column.grad is None for column in base)


@pytest.mark.parametrize(
    "loss, more", [(dpo_loss, (1.0,)), (kto_loss, (1.0, 0.0)), (d3po_loss, (1.0, 0.1))]
)
def test_shapes_that_do_not_fit(loss, more):
    n = 3 if loss is kto_loss else 4
    for shape in ((1,), (3, 1), ()):
        with pytest.raises(ValueError, match=f"{loss.__name__}: given shapes"):
            loss(torch.ones(shape), *[torch.ones(3)] * (n - 1), *more)


@pytest.mark.parametrize("clip_range", [0.0, 1.0, -0.1, float("nan")])
def test_a_clip_range_of_nothing(clip_range):
    with pytest.raises(ValueError, match="clip_range"):
        d3po_loss(*[torch.ones(1)] * 4, 1.0, clip_range)


def test_gradient_of_dpo_against_finite_differences():
    now, base = normal(2, 6).requires_grad_(), normal(2, 6, seed=1)
    assert torch.autograd.gradcheck(lambda x: dpo_loss(*x, *base, 3.0), now)


# Where preferences lead.


def test_the_optimum_of_noisy_choices_among_three_is_the_tilt():
    p, r, beta = column(0.5, 0.3, 0.2), column(0.0, 1.0, 2.5), 0.7
    tilt = (p.log() + r / beta).softmax(0)
    chosen = torch.sigmoid(r[:, None] - r[None])
    logits = p.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        # minus a log-ratio is what the denoising error's change stands for; twice, for the half
        change = -2 * (logits.log_softmax(0) - p.log())
        row, other = torch.meshgrid(change, change, indexing="ij")
        zero = torch.zeros(9).double()
        each = dpo_loss(row.flatten(), other.flatten(), zero, zero, beta, reduction="none")
        loss = (chosen.flatten() * each).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_close(logits.detach().softmax(0), tilt, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_first_step_is_a_quarter_of_beta_times_the_difference_of_gradients(prediction_type):
    path = Schedule(ABAR, prediction_type=prediction_type)
    denoiser = GaussianDenoiser(path, (3,), mu=0.3).double()
    win, lose, eps = normal(3, 8, 3)
    t, c = path.draw_t(8, torch.Generator().manual_seed(0)), denoiser.encode([""] * 8)

    def slope(loss):
        return torch.autograd.grad(loss, denoiser.mu)[0]

    error_w, error_l = (denoiser.denoising_loss(x, eps, t, c) for x in (win, lose))
    plain = slope((error_w - error_l).mean())
    error_w, error_l = (denoiser.denoising_loss(x, eps, t, c) for x in (win, lose))
    loss = dpo_loss(error_w, error_l, error_w.detach(), error_l.detach(), beta=40.0)
    assert_close(slope(loss), 10 * plain)
    assert plain.norm() > 1e-3


# Pairs.


def test_every_sample_points_to_its_groups_ends():
    rewards = normal(24)
    for group in (2, 3, 4, 12, 24):
        ends = torch.arange(24)[:, None] + best_and_worst(rewards, group)
        rows = rewards.view(-1, group)
        values = rewards[ends].view(-1, group, 2)
        assert (values[..., 0] == rows.amax(1, keepdim=True)).all()
        assert (values[..., 1] == rows.amin(1, keepdim=True)).all()
        assert (ends // group == torch.arange(24)[:, None] // group).all()


def test_a_tie_in_part_is_a_pair_and_a_whole_one_is_none():
    offsets = best_and_worst([1.0, 1.0, 0.0, 5.0, 5.0, 5.0], 3)
    assert offsets.tolist() == [[0, 2], [-1, 1], [-2, 0], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("n, group", [(4, 1), (4, 3), (4, 8)])
def test_groups_that_do_not_fit(n, group):
    with pytest.raises(ValueError, match="whole groups"):
        best_and_worst(torch.arange(float(n)), group)


def test_thumbs():
    assert thumbs([1.0, 2.0, 6.0, 3.0], 4).tolist() == [-1, -1, 1, 0]
    assert thumbs([1.0, 2.0, 6.0, 3.0], 2).tolist() == [-1, 1, 1, -1]
    assert thumbs(torch.zeros(3), 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="3 rewards do not fall into groups of 2"):
        thumbs(torch.zeros(3), 2)


def batch_of(method, denoiser, rewards, index, step=0):
    "Make a Batch of samples of a fresh rollout."
    c = denoiser.encode([""] * len(rewards))
    generators = [generator_for(0, i) for i in range(len(rewards))]
    rollout = sample(denoiser, c, 5, 1.0, generators)
    weights = method.weights(torch.tensor(rewards), [])
    steps = torch.full((len(index),), step)
    batch = Batch(method.keep(rollout), torch.tensor(index), steps, weights[index], denoiser.device)
    batch.draws = method.draws(denoiser, len(index), generator_for(1))
    return batch, rollout


def toy(name, **fields):
    "Make a method, and a Gaussian policy that has left its base model."
    method = find_method(name)(
        TrainConfig(method=name, sample_batch_size=8, sample_num_steps=5, **fields), (3,)
    )
    denoiser = GaussianDenoiser(Schedule(ABAR), (3,), mu=0.2)
    with torch.no_grad():
        denoiser.mu += 0.1
    return method, denoiser


REWARDS = [0.3, 0.9, 0.1, 0.5, 2.0, 2.0, 2.0, 2.0]


def test_d3po_loss_is_that_of_the_replayed_steps():
    method, denoiser = toy("d3po(beta=10.0, clip_range=0.2)")
    assert method.steps(denoiser.path).tolist() == [0, 1, 2, 3]  # the last one has no density
    for step in range(4):
        batch, rollout = batch_of(method, denoiser, REWARDS, [0, 1, 4], step)
        losses, gauges = method.loss(denoiser, batch)
        now = replay_log_prob(denoiser, rollout, 1.0, [step])[:, 0]
        with torch.no_grad(), denoiser.reference():
            base = replay_log_prob(denoiser, rollout, 1.0, [step])[:, 0]
        by_hand = d3po_loss(now[1:2], now[2:3], base[1:2], base[2:3], 10.0, 0.2)
        assert_close(losses[:2], by_hand.expand(2), rtol=1e-4, atol=1e-6)
        assert losses[2] == 0


@pytest.mark.parametrize("name", ["dpo(beta=5.0)", "kto(beta=5.0)", "d3po"])
def test_rows_without_a_label_teach_nothing(name):
    method, denoiser = toy(name)
    batch, _ = batch_of(method, denoiser, REWARDS, [4, 5, 6])
    losses, gauges = method.loss(denoiser, batch)
    (gradient,) = torch.autograd.grad(losses.mean(), denoiser.mu)
    assert (losses == 0).all() and (gradient == 0).all()
    assert all(value == 0 for value in gauges.values())


def half_tie(images, prompts, metadata):
    "Let the pictures of every second group of four score the same."
    rewards = images.mean((1, 2, 3))
    return torch.where(torch.arange(len(rewards)) // 4 % 2 == 0, rewards, torch.zeros(()))


@pytest.mark.parametrize("method", ["dpo(beta=300.0)", "kto(beta=300.0)", "d3po"])
def test_gauges_are_means_over_labelled_rows_however_they_are_cut(method, tmp_path, monkeypatch):
    "Micro-batches and updates hold some with a label and some without: rows count alike."
    from ddpo_scratch.methods import dpo as room

    fields = dict(method=method, sample_images_per_prompt=4, train_learning_rate=1e-2)
    averaged, rows = room._gauges, {}
    for size in (20, 4, 1):
        seen = []

        def told(counted, share, margin, seen=seen, **changes):
            seen.append((counted.float(), margin))
            return averaged(counted, share, margin, **changes)

        monkeypatch.setattr(room, "_gauges", told)
        config = small(tmp_path, train_micro_batch_size=size, num_epochs=1, **fields)
        *_, last = train(config, reward_fn=half_tie)
        counted, margin = map(torch.cat, zip(*seen))
        assert counted.mean() == 0.5
        pooled = (counted * margin).sum() / counted.sum()
        assert last.metrics["margin"] == pytest.approx(pooled.item(), rel=1e-4)
        rows[size] = last.metrics
    for name in ("preferred", "margin", "winner_change", "gain"):
        values = [row.get(name, 0.0) for row in rows.values()]
        assert values[1:] == [pytest.approx(values[0], rel=1e-2, abs=1e-6)] * 2, name


def test_a_pair_is_noised_alike_and_each_row_anew():
    method, denoiser = toy("dpo(beta=5.0)")
    batch, rollout = batch_of(method, denoiser, REWARDS, [0, 1])
    eps, t = batch.draws
    losses, _ = method.loss(denoiser, batch)
    for row in range(2):
        both = rollout.x0[[1, 2]]
        given = (both, eps[[row, row]], t[[row, row]], rollout.c[[1, 2]])
        now = denoiser.denoising_loss(*given)
        with torch.no_grad(), denoiser.reference():
            base = denoiser.denoising_loss(*given)
        by_hand = dpo_loss(*now.chunk(2), *base.chunk(2), 5.0, reduction="none")
        assert_close(losses[row : row + 1], by_hand)
    assert losses[0] != losses[1]


def test_ktos_anchor_is_the_last_updates_mean_however_it_was_cut():
    whole, denoiser = toy("kto(beta=5.0)")
    batch, _ = batch_of(whole, denoiser, REWARDS, [0, 1, 2, 4])
    whole.loss(denoiser, batch)
    parts, _ = toy("kto(beta=5.0)")
    for rows in (slice(0, 1), slice(1, 4)):
        eps, t = batch.draws
        part = Batch(
            batch.rollout, batch.sample[rows], batch.step[rows], batch.weight[rows], batch.device
        )
        part.draws = (eps[rows], t[rows])
        parts.loss(denoiser, part)
    resumed, _ = toy("kto(beta=5.0)")
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for method in (whole, parts, resumed):
        method.draws(denoiser, 2, generator_for(2))
    assert whole.anchor == resumed.anchor == pytest.approx(parts.anchor, rel=1e-6)
    whole.draws(denoiser, 2, generator_for(3))
    assert whole.anchor == 0  # nothing was seen


def seen_by_kto(folder, broken_at=0):
    "Take one update by KTO, whose memory is full once at some call of the loss; say what it saw."
    fields = dict(sample_batch_size=8, train_batch_size=8, sample_images_per_prompt=4)
    fields |= dict(train_micro_batch_size=4, num_epochs=1, method="kto(beta=50.0)")
    fields |= dict(sample_num_steps=2)
    state = setup(small(folder, **fields), reward_fn="jpeg_compressibility_estimate")
    with torch.no_grad():
        for i, p in enumerate(state.params):
            p += 0.1 * torch.randn(p.shape, generator=generator_for(i))
    sizes, loss = [], state.method.loss

    def breaking(denoiser, batch):
        sizes.append(len(batch))
        if len(sizes) == broken_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(denoiser, batch)

    state.method.loss = breaking
    finished(state)
    assert set(sizes) == ({4, 2} if broken_at else {4})
    return state.method.state_dict()["seen"]


def test_ktos_anchor_counts_an_attempt_that_broke_off_once(tmp_path):
    gain, count = seen_by_kto(tmp_path)
    again = seen_by_kto(tmp_path, broken_at=4)
    assert again[1] == count > 0 and again[0] == pytest.approx(gain, rel=1e-4)


# Pairs of others.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Write four pairs of flat and of noisy pictures."
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["prompt,winner,loser"]
    for i in range(4):
        flat = torch.full((3, 64, 64), 0.2 + 0.2 * i)
        save_image(flat, folder / f"flat_{i}.png")
        noisy = flat + 0.2 * torch.randn(3, 64, 64, generator=generator_for(0, i))
        save_image(noisy.clamp(0, 1), folder / f"noisy_{i}.png")
        lines.append(f"a fox,flat_{i}.png,noisy_{i}.png")
    (folder / "pairs.csv").write_text("\n".join(lines))
    record = dict(prompt="a fox", winner="flat_0.png", loser="noisy_0.png")
    (folder / "pairs.jsonl").write_text(json.dumps(record))
    return folder


def test_pairs_of_files(table):
    pairs = read_pairs(str(table / "pairs.csv"))
    assert pairs[2] == Pair("a fox", table / "flat_2.png", table / "noisy_2.png")
    assert len(pairs) == 4 and len(read_pairs(table / "pairs.csv", first=2)) == 2
    assert len(read_pairs(table / "pairs.csv", first=0)) == 4
    assert read_pairs(table / "pairs.jsonl") == pairs[:1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("prompt,winner\na fox,flat_0.png", "has no loser for 'a fox'"),
        ("prompt,winner,loser\na fox,flat_0.png,gone.png", "gone.png': no such file"),
        ("winner,loser\nflat_0.png,noisy_0.png", "needs a text called prompt"),
        ("prompt,winner,loser\n", "holds no prompt"),
    ],
)
def test_files_without_pairs(table, text, message):
    (table / "wrong.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(str(table / "wrong.csv"))


def rows(n):
    "Make rows as Pick-a-Pic has them; every third is a tie."
    labels = (1, 0, 0.5)
    return [
        dict(caption=f"fox {i}", jpg_0=b"one", jpg_1=b"two", label_0=labels[i % 3], more=i)
        for i in range(n)
    ]


class Stream(list):
    "Stand in for a data set that streams, and count what is read."

    features = None
    read = 0

    def __iter__(self):
        for row in super().__iter__():
            Stream.read += 1
            yield row


def test_a_data_set_is_read_no_further_than_asked(monkeypatch):
    seen = []

    class Fake:
        Image = type("Image", (), {})
        __spec__ = sys.__spec__

        @staticmethod
        def load_dataset(*args, **kwargs):
            seen.append((args, kwargs))
            return Stream(rows(1000))

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    Stream.read = 0
    pairs = read_pairs("owner/name", first=3, split="validation")
    assert seen == [(("owner/name",), dict(split="validation", streaming=True))]
    assert [pair.prompt for pair in pairs] == ["fox 0", "fox 1", "fox 3"] and Stream.read == 4
    assert pairs[0].winner == pairs[1].loser == b"one"
    # 0 is all, also where the first row is a tie
    monkeypatch.setattr(Fake, "load_dataset", lambda *a, **k: Stream(rows(9)[2:]))
    assert len(read_pairs("owner/name", first=0)) == 4
    monkeypatch.setattr(Fake, "load_dataset", lambda *a, **k: Stream([dict(caption="a fox")]))
    with pytest.raises(ValueError, match="has no column 'jpg_0': it has caption"):
        read_pairs("owner/name")
    monkeypatch.setattr(Fake, "load_dataset", lambda *a, **k: Stream(rows(9)[2::3]))
    with pytest.raises(ValueError, match="no pair with a winner"):
        read_pairs("owner/name")


def test_a_data_set_in_a_folder_is_streamed(table, tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install 'ddpo_scratch[pickapic]'")
    flat, noisy = ((table / f"{kind}_0.png").read_bytes() for kind in ("flat", "noisy"))
    row = dict(caption="a fox", jpg_0=noisy, jpg_1=flat, label_0=0.0)
    datasets.Dataset.from_list([row, row | dict(label_0=0.5)]).to_parquet(
        tmp_path / "train.parquet"
    )
    assert read_pairs(str(tmp_path)) == [Pair("a fox", flat, noisy)]


def test_a_data_set_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"ddpo_scratch\[pickapic\]"):
        read_pairs("owner/name")


def test_encoded_pictures_are_those_that_diffusers_encodes():
    denoiser = StableDiffusion.load("tiny", 1.0)
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    denoiser.decode_batch = 2
    ours = encode_pictures(denoiser, pictures)
    x = denoiser.pipe.image_processor.preprocess(pictures)
    theirs = denoiser.pipe.vae.encode(x).latent_dist.mean * denoiser.pipe.vae.config.scaling_factor
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    denoiser.pipe.vae.register_to_config(shift_factor=0.5)
    scale = denoiser.pipe.vae.config.scaling_factor
    assert_close(encode_pictures(denoiser, pictures), theirs - 0.5 * scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd35_medium", "flux_dev", "klein_base", "qwen"])
def test_encoded_pictures_are_what_each_familys_decoder_is_given(name):
    "Scaled back they are the autoencoder's own, and klein's are those of its pipeline."
    denoiser = load(flow_models.folder(name), 1.0)
    vae, (_, h, w) = denoiser.pipe.vae, denoiser.latent_shape
    size = 3, denoiser.factor * h, denoiser.factor * w
    pictures = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    x = 2 * pictures - 1
    with torch.no_grad():
        ours = encode_pictures(denoiser, pictures)
        z = vae.encode(x[:, :, None] if name == "qwen" else x).latent_dist.mode()
        assert ours.dtype == torch.float32 and ours.shape[1:] == denoiser.latent_shape
        assert_close(denoiser.scaled(ours), z.squeeze(2), rtol=1e-4, atol=1e-5)
        assert denoiser.decode(ours).shape == pictures.shape
        if name == "klein_base":
            theirs = denoiser.pipe._encode_vae_image(x, torch.Generator())
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="give pictures of the size"):
        encode_pictures(denoiser, pictures[..., : size[1] // 2, : size[2] // 2])


# Configurations.


def texts(table):
    "Name each method with its options."
    names = {name: f"{name}(beta=50.0)" for name in METHODS}
    return names | dict(dpo_offline=f"dpo_offline(pairs={str(table / 'pairs.csv')!r})")


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_found_and_their_fields_are_checked(name, table):
    text = texts(table)[name]
    config = check_config(TrainConfig(method=text))
    assert config.method_class is METHODS[name]
    sampling, training, differentiated = config.method_class.passes(config)
    rows = 1 if name == "kto" else 2
    assert differentiated == rows * config.steps_per_sample and training == 2 * differentiated
    assert sampling == (0 if name == "dpo_offline" else 20)
    with pytest.raises(ValueError, match="set kl_weight to 0"):
        check_config(TrainConfig(method=text, kl_weight=0.1))
    with pytest.raises(ValueError, match="beta is 0"):
        check_config(
            TrainConfig(
                method=text.replace(")", ", beta=0.0)")
                if name == "dpo_offline"
                else f"{name}(beta=0.0)"
            )
        )


@pytest.mark.parametrize("name", ["dpo", "d3po", "dpo_offline"])
def test_pairs_need_whole_groups(name, table):
    for fields in (dict(sample_images_per_prompt=1), dict(sample_images_per_prompt=3)):
        with pytest.raises(ValueError, match="must be 2 or more and divide sample_batch_size"):
            check_config(TrainConfig(method=texts(table)[name], **fields))


@pytest.mark.parametrize(
    "text, fields, message",
    [
        ("dpo_offline", {}, "needs pairs"),
        ("dpo_offline(pairs='a.csv', first=-1)", {}, "first is -1"),
        (
            "dpo_offline(pairs='a.csv')",
            dict(sample_images_per_prompt=3, sample_batch_size=9, train_batch_size=3),
            "must be even",
        ),
        ("d3po(clip_range=1.5)", {}, "clip_range is 1.5"),
        ("d3po", dict(sample_eta=0.0), "needs noise in every step"),
        ("dpo(gamma=1.0)", {}, "gamma"),
        (
            "kto",
            dict(sample_images_per_prompt=5, sample_batch_size=8, train_batch_size=8),
            r"must divide the samples of an epoch \(.*\): 2 or 4 would do",
        ),
        (
            "dpo",
            dict(sample_images_per_prompt=5, sample_batch_size=8, train_batch_size=8),
            r"must be 2 or more and divide sample_batch_size \(8\): 2 or 4 would do",
        ),
    ],
)
def test_mistakes(text, fields, message):
    with pytest.raises(ValueError, match=message):
        check_config(TrainConfig(method=text, **fields))


def test_findings():
    config = TrainConfig(method="dpo")
    assert not list(DPO.findings(dict(tied=0.1, margin=0.3), [], config))
    assert "tied is 75%" in next(iter(DPO.findings(dict(tied=0.75), [], config)))
    assert "margin is 6" in next(iter(DPO.findings(dict(margin=6.0), [], config)))


# Runs.


@pytest.mark.parametrize("name", METHODS)
def test_resumed_run_is_the_uninterrupted_one(name, table, tmp_path):
    fields = dict(method=texts(table)[name], train_timestep_fraction=0.5, num_epochs=2)
    fields |= dict(sample_num_steps=3, sample_batch_size=4, train_batch_size=2)
    whole, resumed = whole_and_resumed(tmp_path, **fields)
    first, last = numbers(tmp_path / "whole")
    # at the first of all updates the policy is the base model
    assert first["grad_norm"] > 0 and last["grad_norm"] > 0


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_fully_fine_tuned_in_half_precision_the_policy_begins_as_its_base_model(name, tmp_path):
    fields = dict(method=name, use_lora=False, train_learning_rate=1e-4, mixed_precision="bf16")
    fields |= dict(num_epochs=1, sample_num_steps=2, sample_batch_size=4, train_batch_size=2)
    first, *_, last = train(small(tmp_path, **fields))
    moved = "gain" if name == "kto" else "winner_change"
    # in another precision the copy would differ from the policy before anything was learnt
    assert first.gauges[moved] == 0 != last.gauges[moved]


@pytest.mark.parametrize("name, kl_weight", [("d3po", 0.0), ("rwr", 1.0)])
def test_nobody_advises_to_save_a_pass_that_is_not_taken(name, kl_weight, tmp_path):
    "These keep all states and no log-probs: in half precision nothing is computed again."
    fields = dict(method=name, kl_weight=kl_weight, num_epochs=1, sample_num_steps=2)
    fields |= dict(mixed_precision="bf16", train_micro_batch_size=3)
    state, lines = setup(small(tmp_path, **fields)), []
    state.progress.line = lines.append
    finished(state)
    assert not any("log-probs are computed again" in line for line in lines)
    rollout = collect(state).rollout
    assert rollout.log_probs.shape == (8, 0) and rollout.n_steps == 2 == rollout.xs.shape[1] - 1


def test_rewards_are_told_the_prompts_of_the_pairs(table, tmp_path):
    told, metadata = [], []

    def reward(images, prompts, facts):
        told.extend(prompts)
        metadata.extend(facts)
        return images.mean((1, 2, 3))

    fields = dict(method=texts(table)["dpo_offline"], sample_images_per_prompt=2, num_epochs=1)
    state = setup(small(tmp_path, **fields), reward_fn=reward)
    samples = collect(state)
    pairs = {pair.prompt for pair in state.method.pairs}
    assert set(told) <= pairs and told == samples.prompts and metadata == [{}] * 8
    c = state.denoiser.encode(told)
    assert all(torch.equal(a, b) for a, b in zip(c, samples.rollout.c) if torch.is_tensor(a))
    chosen = state.method.chosen(state.starts(range(8)))
    assert told == [pair.prompt for pair, _ in chosen]


@pytest.mark.parametrize("group, size", [(2, 1), (2, 3), (4, 2), (4, 1)])
def test_pairs_stay_pairs_where_a_group_is_drawn_in_pieces(table, tmp_path, group, size):
    "Else a winner would be compared with itself, or the two sides change places."
    fields = dict(method=texts(table)["dpo_offline"], sample_images_per_prompt=group, num_epochs=1)
    whole, pieces = (
        collect(setup(small(tmp_path, **fields, sample_micro_batch_size=n), reward_fn="brightness"))
        for n in (0, size)
    )
    torch.testing.assert_close(whole.rollout.xs, pieces.rollout.xs)


SHARED = """
import json, sys, torch
from ddpo_scratch.config import TrainConfig
from ddpo_scratch.methods.base import Batch, find_method
from ddpo_scratch.diffusion import GaussianDenoiser, Schedule
from ddpo_scratch.rollout import generator_for, sample
from ddpo_scratch.train import setup, train

torch.set_num_threads(1)
where, fields = sys.argv[1], json.loads(sys.argv[2])


def trained(**more):
    "Train; what there is afterwards, and the anchors on the way."
    state, anchors = setup(TrainConfig(**fields | more)), []
    for step in train(state=state):
        anchors.append(state.method.anchor)
        if more.get("run_name") == "cut" and step.epoch == 2:
            return
    params = [p.detach() for p in state.params]
    return dict(params=params, method=state.method.state_dict(), anchors=anchors)


whole = trained(run_name="whole")
trained(run_name="cut")
resumed = trained(resume_from=f"{fields['logdir']}/cut")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

# the same samples on one process, and shared among all
config = TrainConfig(method="kto(beta=5.0)", sample_batch_size=8, sample_num_steps=5)
denoiser = GaussianDenoiser(Schedule(torch.linspace(0.999, 0.01, 1000).double()), (3,), mu=0.2)
with torch.no_grad():
    denoiser.mu += 0.1
generators = [generator_for(0, i) for i in range(8)]
rollout = sample(denoiser, denoiser.encode([""] * 8), 5, 1.0, generators)


def method_after(rows):
    "Make a method that has seen some of eight samples."
    method = find_method("kto")(config, (3,))
    weights = method.weights(torch.arange(8.0) ** 2, [])
    noise = torch.randn(8, 3, generator=generator_for(1)), torch.arange(0, 800, 100)
    batch = Batch(method.keep(rollout), rows, rows * 0, weights[rows], denoiser.device)
    batch.draws = tuple(column[rows] for column in noise)
    method.loss(denoiser, batch)
    return method


alone = method_after(torch.arange(8))._seen
shared = method_after(torch.arange(8)[rank::world])
torch.save([whole, resumed, alone, shared._together(denoiser)], f"{where}/rank{rank}.pt")
"""


def test_two_processes_have_one_anchor_and_resume_to_it(tmp_path):
    (tmp_path / "script.py").write_text(SHARED)
    fields = SMALL | dict(method="kto(beta=50.0)", logdir=str(tmp_path), sample_num_steps=2)
    fields |= dict(sample_batch_size=4, train_batch_size=2, train_timestep_fraction=0.5)
    fields["model"] = random_model()
    words = tmp_path, json.dumps(fields)
    processes.run(tmp_path / "script.py", *words, world=2, ACCELERATE_USE_CPU="true")
    ranks = [torch.load(tmp_path / f"rank{k}.pt", weights_only=True) for k in (0, 1)]
    (whole, resumed, alone, together), (others, *_) = ranks
    assert whole["anchors"] == others["anchors"] and max(whole["anchors"]) > 0
    assert whole["method"] == others["method"] == resumed["method"]
    assert resumed["anchors"] == whole["anchors"][-2:]
    for a, b, c in zip(whole["params"], others["params"], resumed["params"], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert together == pytest.approx(alone, rel=1e-6)


def test_offline_pairs_meet_whatever_batches_and_groups(table, tmp_path):
    config = TrainConfig(
        method=texts(table)["dpo_offline"], sample_images_per_prompt=4, sample_batch_size=8
    )
    denoiser = StableDiffusion.load("tiny", 1.0)
    method = OfflineDPO(config, denoiser.latent_shape)
    method.prepare(denoiser)

    def starts(numbers):
        "Open the streams of samples as a run does."
        streams = [GroupStream() for _ in numbers]
        for k, stream in zip(numbers, streams):
            stream.manual_seed(k // 4)
            stream.place = k % 4
        return streams

    chosen = method.chosen(starts(range(8)))
    assert [won for _, won in chosen] == [True, False] * 4
    assert all(chosen[k][0] is chosen[k + 1][0] for k in range(0, 8, 2))
    # smaller batches, within groups too, choose the same
    assert method.chosen(starts(range(4))) == chosen[:4]
    assert method.chosen(starts(range(3, 8))) == chosen[3:]
