"The training loop: resume, the methods agree where they must, precision, bad input, looks."

import dataclasses

import pytest
import torch
from runs import (
    copies,
    finished,
    leave_in,
    numbers,
    random_model,
    same,
    small,
    trained,
    whole_and_resumed,
)

import ddpo_scratch.train as module
from ddpo_scratch.run.checkpoint import find_checkpoint
from ddpo_scratch.config import read_config
from ddpo_scratch.evaluate import fixed_seed_images, spread_prompts
from ddpo_scratch.run.look import look, look_is_due
from ddpo_scratch.methods.base import Method, find_method
from ddpo_scratch.methods.rwr import rwr_loss
from ddpo_scratch.models.sd import StableDiffusion, load_lora, load_pipeline
from ddpo_scratch.prompts import COMMON_ANIMALS
from ddpo_scratch.rewards.base import Reward, get_reward as find_reward, reward
from ddpo_scratch.rollout import default_clip_range, policy
from ddpo_scratch.run.runlog import read_metrics
from ddpo_scratch.run.setup import setup
from ddpo_scratch.train import (
    backprop_update,
    collect,
    fit,
    micro_batches,
    train,
    update,
)

BRIGHT = dict(reward_fn="brightness")
ALIGN = dict(method="alignprop", **BRIGHT)


class Blunt(Reward):
    name, differentiable = "blunt", False

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))


def pairs(n=8, n_steps=5):
    "All samples of an epoch, and all of their steps."
    return torch.arange(n), torch.arange(n_steps).expand(n, n_steps)


# Resuming.

RESUMED = {
    "tracker": dict(per_prompt_stat_tracking_min_count=2),
    "full": dict(use_lora=False, train_learning_rate=1e-5),
    "guided": dict(sample_guidance_scale=2.0, train_num_inner_epochs=2),
    "rwr": dict(method="rwr"),
    "alignprop": ALIGN | dict(kl_weight=0.1, train_gradient_accumulation_steps=2),
    "draft_lv": dict(method="draft_lv", **BRIGHT),
    "refl": dict(method="refl", **BRIGHT),
}


@pytest.mark.parametrize("fields", RESUMED.values(), ids=RESUMED)
def test_resumed_run_equals_uninterrupted_run(tmp_path, fields):
    whole_and_resumed(tmp_path, **fields)


def test_resumed_lora_run_goes_on_training(tmp_path):
    "Elsewhere an optimizer held the parameters of the adapter that resuming had replaced."
    trained(small(tmp_path, run_name="a", num_epochs=1))
    state = setup(small(tmp_path, num_epochs=2, resume_from=str(tmp_path / "a")))
    assert state.epoch == 1
    before = copies(state.params)
    assert finished(state).epoch == 2 and not same(before, state.params)


def test_checkpoints_are_pruned_and_the_last_epoch_is_saved(tmp_path):
    trained(small(tmp_path, run_name="a", num_epochs=5, save_freq=2, num_checkpoint_limit=2))
    saved = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert saved == ["epoch_0004", "epoch_0005"]
    assert read_config(tmp_path / "a").num_epochs == 5


def test_a_run_is_never_overwritten(tmp_path):
    trained(small(tmp_path, run_name="a", num_epochs=1))
    rows = (tmp_path / "a" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a run"):
        setup(small(tmp_path, run_name="a"))
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == rows
    assert setup(small(tmp_path)).folder.name == "ddpo_is-jpeg_compressibility-001"


def test_resume_refuses_what_is_no_checkpoint_or_another_configuration(tmp_path):
    trained(small(tmp_path, run_name="a", num_epochs=1))
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(ValueError, match="no checkpoint in"):
            find_checkpoint(where)
    assert find_checkpoint("latest", tmp_path) == find_checkpoint(tmp_path / "a")
    resumed = dict(resume_from=str(tmp_path / "a"))
    with pytest.raises(ValueError, match="train_learning_rate was 0.002, now 0.5"):
        setup(small(tmp_path, num_epochs=3, train_learning_rate=0.5, **resumed))
    # a run without its report may be resumed, which writes it
    assert setup(small(tmp_path, num_epochs=1, **resumed)).finished
    fit(small(tmp_path, num_epochs=1, **resumed))
    with pytest.raises(ValueError, match="already finished epoch 1"):
        setup(small(tmp_path, num_epochs=1, **resumed))


# What others add from outside the package.


class Follow(Method):
    "Imitate the better half, and let a memory of the best reward grow."

    name = "toy_follow"

    def __init__(self, config, latent_shape):
        super().__init__(config, latent_shape)
        self.best = -1e9

    def weights(self, rewards, prompts):
        self.best = max(self.best, rewards.max().item())
        return (rewards >= rewards.median()).float()

    def epoch_gauges(self, prompts):
        return dict(best=self.best)

    def loss(self, denoiser, batch):
        prediction = denoiser(batch.x_t, batch.t, batch.c)
        errors = (prediction - batch.x_next).square().flatten(1).mean(1)
        return batch.weight * errors, dict(error=errors.mean())

    def state_dict(self):
        return dict(best=self.best)

    def load_state_dict(self, state):
        self.best = state["best"]


@reward("toy_red")
def toy_red(images, prompts, metadata):
    "Pay for red."
    return images[:, 0].mean((1, 2))


def test_a_toy_method_and_a_toy_reward_train_and_resume(tmp_path):
    assert find_method("toy_follow") is Follow
    fields = dict(method="toy_follow", reward_fn="toy_red", num_epochs=3, kl_weight=0.1)
    whole, resumed = whole_and_resumed(tmp_path, **fields)
    assert resumed.method.best == whole.method.best == numbers(tmp_path / "cut")[-1]["best"]
    assert all("error" in row and row["kl"] >= 0 for row in numbers(tmp_path / "cut"))


def test_a_methods_own_gauges_come_with_the_step(tmp_path):
    step, *_ = train(small(tmp_path, method="toy_follow", num_epochs=1))
    assert set(step.gauges) == {"error"} and step.approx_kl != step.approx_kl


# DDPO.


def gradient(state):
    return torch.cat([p.grad.flatten() for p in state.params])


def clear(state):
    for p in state.params:
        p.grad = None


@pytest.fixture
def held(monkeypatch):
    "Make a state whose optimizer steps leave the weights and the gradients as they are."

    def hold(config, **parts):
        state = setup(dataclasses.replace(config, train_max_grad_norm=1e9), **parts)
        for name in ("step", "zero_grad"):
            monkeypatch.setattr(state.optimizer, name, lambda *args, **kwargs: None)
        return state

    return hold


def test_score_function_and_importance_sampling_have_one_gradient_at_the_start(tmp_path, held):
    state = held(small(tmp_path))
    samples, gradients = collect(state), []
    for name in ("ddpo_is", "ddpo_sf"):
        state.method = find_method(name)(state.config, state.denoiser.latent_shape)
        update(state, samples, *pairs())
        gradients.append(gradient(state))
        clear(state)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert gradients[0].norm() > 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_ratio_is_one_in_float32_whatever_the_micro_batch(tmp_path, guidance):
    state = setup(small(tmp_path, sample_guidance_scale=guidance, train_micro_batch_size=5))
    for batch in micro_batches(state, collect(state), *pairs()):
        log_prob = state.method.log_prob(state.denoiser, batch)
        assert (log_prob - batch.old_log_prob).abs().max() <= 1e-6


def test_first_ratios_under_bf16_stay_within_a_tenth_of_the_clip_range(tmp_path):
    fields = dict(model="tiny", mixed_precision="bf16", num_epochs=1, train_batch_size=8)
    config = small(tmp_path, **fields)
    for step in train(config):
        assert step.ratio_spread <= default_clip_range((4, 16, 16)) / 10


def test_score_function_trains(tmp_path):
    steps = list(train(small(tmp_path, method="ddpo_sf", train_batch_size=8)))
    assert [step.update for step in steps] == [1, 1]
    assert all(step.clip_fraction == 0 for step in steps)


def test_nan_stops_before_the_weights_change_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    state = setup(small(tmp_path, run_name="a", num_epochs=3))

    def poisoned(state):
        samples = collect(state)
        if state.epoch == 1:
            samples.weights[:] = float("nan")
        return samples

    monkeypatch.setattr(module, "collect", poisoned)
    with pytest.raises(FloatingPointError, match="loss is nan at epoch 2, optimizer step 3"):
        finished(state)
    assert find_checkpoint(tmp_path / "a").name == "epoch_0001"
    assert all(p.isfinite().all() for p in state.params)


# Bad input.

BAD = [
    (dict(sample_eta=0.0), "sample_eta is 0"),
    (dict(train_batch_size=3), "8 x 1 = 8.*3 x 1 = 3"),
    (dict(method="ddpo_i"), "no method called 'ddpo_i'; did you mean ddpo_is"),
    (dict(reward_fn="jpeg_compresibility"), "did you mean jpeg_compressibility"),
    (dict(prompt_fn="comon_animals"), "did you mean common_animals"),
    (dict(prompt_fn="/no/such/prompts.txt"), "no file"),
    (dict(model="./no/such/model"), "model_index.json"),
    (dict(num_epochs=0), "at least 1"),
    (dict(method="ddpo_sf"), "1 update an epoch"),
    (dict(mixed_precision="int8"), "allowed are"),
    (dict(train_timestep_fraction=0.0), "allowed is"),
    (dict(stop_gain=0.2), "eval_num_images 0: stopping needs both"),
    (dict(kl_weight=-1.0), "kl_weight is -1"),
    (ALIGN | dict(backprop_steps="7"), "expected a number from 1 to sample_num_steps = 5"),
    (ALIGN | dict(backprop_steps="5..3"), "backprop_steps is '5..3'"),
    (ALIGN | dict(backprop_steps="some"), "'some'"),
    (dict(method="refl", train_num_inner_epochs=2, **BRIGHT), "uses each sample once"),
    (dict(method="refl", kl_weight=0.1, **BRIGHT), "no trajectory"),
    (ALIGN | dict(reward_fn=f"{__name__}:Blunt"), "but 'blunt' is not differentiable"),
]


@pytest.mark.parametrize("fields, message", BAD)
def test_bad_configurations_are_named_and_write_nothing(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        setup(small(tmp_path, **fields))
    assert not list(tmp_path.iterdir())


def nan(images, prompts, metadata):
    return torch.full((len(images),), float("nan"))


def two_numbers(images, prompts, metadata):
    return torch.zeros(len(images), 2)


def divides_by_zero(images, prompts, metadata):
    return 1 / 0


@pytest.mark.parametrize(
    "reward_fn, error, message",
    [
        (nan, ValueError, "finite"),
        (two_numbers, ValueError, "one number a picture"),
        (divides_by_zero, RuntimeError, "ZeroDivisionError"),
    ],
)
def test_bad_rewards_stop_before_any_update(tmp_path, reward_fn, error, message):
    state = setup(small(tmp_path), reward_fn=reward_fn)
    before = copies(state.params)
    with pytest.raises(error, match=message):
        next(train(state=state))
    assert same(before, state.params)


# Rewards.


def test_parts_of_a_weighted_sum_are_logged_one_by_one(tmp_path):
    reward_fn = "0.5*brightness - 2*jpeg_incompressibility"
    folder = trained(small(tmp_path, num_epochs=1, reward_fn=reward_fn)).folder
    (row,) = read_metrics(folder)
    assert folder.name == "ddpo_is-0.5-brightness-2-jpeg_incompressibility-001"
    total = 0.5 * row["reward/brightness"] - 2 * row["reward/jpeg_incompressibility"]
    assert row["reward_mean"] == pytest.approx(total, abs=1e-5)


def test_rewards_scored_by_workers_are_those_scored_in_turn(tmp_path):
    fields = dict(num_epochs=1, sample_batch_size=4, sample_num_batches_per_epoch=3)
    for name, workers in (("turn", 0), ("workers", 2)):
        trained(small(tmp_path, run_name=name, reward_workers=workers, **fields))
    assert numbers(tmp_path / "turn") == numbers(tmp_path / "workers")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        next(train(small(tmp_path, reward_workers=2), reward_fn=divides_by_zero))
    with pytest.raises(ValueError, match="reward_workers is -1"):
        setup(small(tmp_path, reward_workers=-1))


def test_an_offloaded_reward_waits_on_the_cpu(tmp_path):
    class Moved(Reward):
        moves = []

        def to(self, device):
            self.moves.append(str(device))
            return self

        def __call__(self, images, prompts, metadata):
            self.moves.append("scored")
            return images.mean((1, 2, 3))

    moved = Moved()
    collect(setup(small(tmp_path, reward_offload=True), reward_fn=moved))
    assert moved.moves == ["cpu", "scored", "cpu"]
    collect(setup(small(tmp_path), reward_fn=moved))
    assert moved.moves[3:] == ["scored"]


# A full memory.


def holds(state, most, with_gradient=True, every=1):
    "Let a network run out of memory above some rows of a pass, in every such pass or in some."
    seen = []

    def full(network, inputs):
        if len(inputs[0]) > most and torch.is_grad_enabled() == with_gradient:
            seen.append(1)
            if len(seen) % every:
                return
            raise torch.OutOfMemoryError(f"no room for {len(inputs[0])} rows")

    state.denoiser.network.register_forward_pre_hook(full)
    lines = []
    state.progress.line = lines.append
    return lines


def flattened(state):
    return torch.cat([p.detach().flatten() for p in state.params])


# brightness is smooth: between file sizes, rounding could make the difference of a byte
FULL = {"ddpo_is": {}, "rwr": dict(method="rwr"), "kl": dict(kl_weight=0.1)}


@pytest.mark.parametrize("fields", FULL.values(), ids=FULL)
def test_an_update_is_repeated_by_halves_where_the_memory_is_full(tmp_path, fields):
    "20 transitions an update, and room for 6: twice halved, with the numbers of the plain run."
    fields = fields | BRIGHT
    state = setup(small(tmp_path, run_name="plain", **fields))
    start, plain = flattened(state), flattened(finished(state))
    state = setup(small(tmp_path, run_name="halved", **fields))
    # at once, or in the second half of an update, when the gradient of the first is there
    lines = holds(state, 6, every=1 if "kl_weight" in fields else 2)
    halved = flattened(finished(state))
    assert state.config.train_micro_batch_size == 5 and len(lines) == 2
    assert "memory is full at train_micro_batch_size 20: it is 10 from here on" in lines[0]
    # rounding alone: sums of 5 transitions in place of 20
    assert (halved - plain).norm() < 1e-3 * (plain - start).norm()
    for a, b in zip(numbers(tmp_path / "plain"), numbers(tmp_path / "halved"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=1e-5)
    saved = read_config(find_checkpoint(tmp_path / "halved"))
    assert saved.train_micro_batch_size == 5, "a resumed run goes on with it"


def simulate_a_gpu(monkeypatch, free=10**9):
    "Let torch answer for a GPU's memory, of which nothing is in use."
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (free, free))


@pytest.mark.parametrize("most, here", [(1, True), (0, True), (9, False)])
def test_a_size_that_is_measured_is_one_where_two_do_not_fit(tmp_path, monkeypatch, most, here):
    "On this process or on another: all agree. What does not fit at all is said by the update."
    state = setup(small(tmp_path, train_micro_batch_size="auto"))
    samples = collect(state)
    index, steps, _ = module.minibatches(state, 0)[0]
    lines = holds(state, most)
    simulate_a_gpu(monkeypatch)
    if not here:
        monkeypatch.setattr(type(state.engine), "any", lambda self, flag: True)
    config = state.config
    assert module._measured(state, samples, index, steps) == 1
    assert lines == ["two transitions do not fit the memory at a time: it is one"]
    assert state.config == config and all(p.grad is None for p in state.params)


def test_a_size_that_is_measured_is_more_than_one_where_there_is_room(tmp_path, monkeypatch):
    state = setup(small(tmp_path, train_micro_batch_size="auto"))
    samples = collect(state)
    lines = holds(state, 2)
    simulate_a_gpu(monkeypatch)
    assert module._measured(state, samples, *module.minibatches(state, 0)[0][:2]) > 1 and not lines


def test_samples_are_drawn_by_halves_where_the_memory_is_full(tmp_path):
    plain, state = (setup(small(tmp_path, **BRIGHT)) for _ in range(2))
    plain = collect(plain)
    lines = holds(state, 3, with_gradient=False)
    pieces = collect(state)
    assert state.config.sample_micro_batch_size == 2 and len(lines) == 2
    assert pieces.prompts == plain.prompts and pieces.at_once == 2
    torch.testing.assert_close(pieces.rollout.xs, plain.rollout.xs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pieces.rewards, plain.rewards, atol=1e-5, rtol=0)
    assert state.config.sample_batch_size == 8, "what decides an epoch stays"


def test_pictures_are_decoded_by_halves_where_the_memory_is_full(tmp_path):
    plain, state = collect(setup(small(tmp_path))), setup(small(tmp_path))
    decoded, sizes = state.denoiser.decoded, []

    def narrow(z):
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("no room")
        return decoded(z)

    state.denoiser.decoded = narrow
    pieces = collect(state)
    assert sizes == [8, 4, 2, 2, 2, 2] and state.config.decode_batch_size == 2
    assert state.config.sample_micro_batch_size == 0
    torch.testing.assert_close(pieces.images, plain.images, atol=1e-4, rtol=1e-4)


def test_a_look_is_drawn_by_halves_where_the_memory_is_full(tmp_path):
    fields = dict(eval_num_images=8, eval_judges="", **BRIGHT)
    plain = setup(small(tmp_path, run_name="plain", **fields))
    state = setup(small(tmp_path, run_name="halved", **fields))
    # guidance sends each picture twice through the network
    lines = holds(state, 6, with_gradient=False)
    next(train(state=plain))
    next(train(state=state))
    assert state.config.sample_micro_batch_size == 2 and len(lines) == 2
    assert state.eval_start == pytest.approx(plain.eval_start, abs=1e-5)
    a, b = (torch.load(s.folder / "eval/epoch_0000.pt")["images"].int() for s in (plain, state))
    assert (a - b).abs().max() <= 1, "the same pictures but for rounding"


def test_one_transition_that_does_not_fit_ends_with_what_to_turn(tmp_path):
    state = setup(small(tmp_path))
    holds(state, 0)
    before = copies(state.params)
    with pytest.raises(torch.OutOfMemoryError, match="train_micro_batch_size 1 .*checkpointing"):
        next(train(state=state))
    assert same(before, state.params)
    state = setup(small(tmp_path, **ALIGN))
    holds(state, 0)
    with pytest.raises(torch.OutOfMemoryError, match="train_batch_size 4: try backprop_check"):
        backprop_update(state, 0)


def test_processes_that_wait_for_each_other_do_not_repeat_an_update(tmp_path):
    state = setup(small(tmp_path))
    state.engine.world = 2
    holds(state, 6)
    with pytest.raises(
        torch.OutOfMemoryError, match="process 0 of 2.*set train_micro_batch_size be"
    ):
        module._where_it_fits(state, "train_micro_batch_size", 20, out_of_memory, exchanges=True)


def out_of_memory():
    raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_auto_is_settled_once_recorded_and_gone_on_with(tmp_path, precision):
    "In half precision sampling takes the number over, and old log-probs are exact from then on."
    fields = dict(train_micro_batch_size="auto", mixed_precision=precision, num_epochs=3)
    fields |= dict(train_batch_size=8, train_timestep_fraction=0.2)
    whole = trained(small(tmp_path, run_name="whole", **fields))
    assert whole.config.train_micro_batch_size == 8
    assert whole.config.sample_micro_batch_size == (8 if precision == "bf16" else 0)
    leave_in(small(tmp_path, run_name="cut", **fields), epoch=2)
    cut = str(tmp_path / "cut")
    # as the command does; and by the configuration of the beginning, which has measured nothing
    asked = read_config(find_checkpoint(cut), resume_from=cut)
    if precision == "no":
        asked = small(tmp_path, resume_from=cut, **fields)
        assert asked.train_micro_batch_size == 0
    resumed = trained(asked)
    assert resumed.config.train_micro_batch_size == 8
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert all(row["ratio_first"] <= 1e-6 for row in numbers(tmp_path / "whole"))


@pytest.mark.parametrize("room, found", [(20e9, 8), (1e9, 1), (1e12, 449)])
def test_what_fits_follows_from_what_one_and_two_take(room, found):
    assert module._room(3e9, 5e9, room, 0) == found


# The other methods.


def test_regression_gradient_is_that_of_the_weighted_denoising_loss(tmp_path, held):
    "Whatever the micro-batch."
    state, gradients = held(small(tmp_path, method="rwr", rwr_beta=5.0)), []
    samples, (index, steps) = collect(state), pairs(n_steps=3)
    softmax = 8 * (5.0 * samples.rewards.double()).softmax(0).float()
    torch.testing.assert_close(samples.weights, softmax, atol=1e-5, rtol=1e-4)
    for size in (24, 5):
        state.config = dataclasses.replace(state.config, train_micro_batch_size=size)
        update(state, samples, index, steps)
        state.global_step -= 1  # the noise is keyed by it
        gradients.append(gradient(state))
        clear(state)
    eps, t = state.method.draws(state.denoiser, 24, state.generator(0, "denoising", 0))
    rows, rollout = index.repeat_interleave(3), samples.rollout
    x0, c, weights = rollout.x0[rows], rollout.c[rows], samples.weights[rows]
    rwr_loss(state.denoiser, x0, eps, t, c, weights).backward()
    for found in gradients:
        torch.testing.assert_close(found, gradient(state), atol=1e-6, rtol=1e-3)


def test_sparse_weights_keep_the_best_of_the_epoch(tmp_path):
    samples = collect(setup(small(tmp_path, method="rwr_sparse", rwr_fraction=0.25)))
    second = samples.rewards.sort().values[-2]
    assert torch.equal(samples.weights, 4.0 * (samples.rewards >= second))


def test_backprop_gradient_is_autograds_through_the_sampler(tmp_path, held):
    state = held(small(tmp_path, backprop_steps="full", **ALIGN))
    _, rewards, _ = backprop_update(state, 1)
    ours, denoiser, ks = gradient(state), state.denoiser, range(4, 8)
    clear(state)
    noise, grid, c = state.noise(ks), state.denoiser.path.grid(5), state.prompts(ks)[0]

    def draw():
        return torch.stack([torch.randn(denoiser.latent_shape, generator=g) for g in noise])

    x = draw()
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        mean, std = policy(denoiser, x, t, t_next, denoiser.encode(c), 1.0)
        x = mean + std * draw()
    bright = denoiser.decode(x).mean((1, 2, 3))
    (-bright.mean()).backward()
    torch.testing.assert_close(ours, gradient(state), atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(rewards, bright.detach(), atol=1e-5, rtol=0)


def test_accumulated_backprop_equals_one_batch(tmp_path, held):
    gradients = []
    for n, parts in ((8, 1), (2, 4)):
        fields = dict(train_batch_size=n, train_gradient_accumulation_steps=parts)
        state = held(small(tmp_path, backprop_steps="2", **ALIGN, **fields))
        backprop_update(state, 0)
        gradients.append(gradient(state))
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-3)


def nothing(images, prompts, metadata):
    "Pay nothing, with a gradient of zero: only a penalty moves the weights."
    return 0 * images.mean((1, 2, 3))


@pytest.mark.parametrize("method", ["ddpo_is", "ddpo_sf", "rwr", "alignprop"])
def test_kl_penalty_is_zero_at_the_base_model_and_pulls_back_to_it(tmp_path, method):
    fields = dict(method=method, kl_weight=1.0, backprop_steps="full", rwr_beta=0.0)
    sizes = dict(sample_batch_size=4, train_batch_size=4, sample_num_steps=4, num_epochs=1)
    state = setup(small(tmp_path, **fields, **sizes), reward_fn=nothing)
    (first,) = train(state=state)
    assert first.kl == 0
    with torch.no_grad():
        for i, p in enumerate(state.params):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    state.config = dataclasses.replace(state.config, num_epochs=7)
    kls = [step.kl for step in train(state=state)]
    assert len(kls) == 6 and kls[-1] < 0.9 * kls[0]


def flat(images, prompts, metadata):
    return images.detach().mean((1, 2, 3))


def test_a_reward_without_a_gradient_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'flat' returned rewards without a gradient"):
        next(train(small(tmp_path, method="alignprop"), reward_fn=flat))
    with pytest.raises(ValueError, match="'jpeg_compressibility' (is not|returned)"):
        next(train(small(tmp_path, method="refl")))


def test_methods_without_a_ratio_report_none(tmp_path):
    config = small(tmp_path, method="refl", num_epochs=1, run_name="a", **BRIGHT)
    step, *_ = train(config)
    assert step.approx_kl != step.approx_kl and step.k == 1
    assert "approx_kl" not in read_metrics(tmp_path / "a")[0]
    assert "NaN" not in (tmp_path / "a" / "metrics.jsonl").read_text()


# Looking and stopping.


def test_pictures_of_before_and_after_are_drawn_at_their_own_guidance(tmp_path):
    state = setup(small(tmp_path, eval_num_images=3, eval_guidance_scale=3.0))
    look(state)
    kept = torch.load(state.folder / "eval/epoch_0000.pt", weights_only=True)
    images, prompts = kept["images"], kept["prompts"]
    assert state.denoiser.guidance_scale == 1.0
    guided = StableDiffusion(load_pipeline(random_model()), 3.0)
    expected = fixed_seed_images(guided, prompts, seed=0, n_steps=5, batch_size=8)
    assert (images.float() / 255 - expected).abs().max() < 0.6 / 255


def rewards_of_looks(values):
    "A reward that scores the first, second, ... look as told, and training pictures as 0."
    values = iter(values)

    def scripted(images, prompts, metadata):
        return torch.full((len(images),), next(values) if len(images) == 2 else 0.0)

    return scripted


def test_a_run_stops_at_its_gain_and_resuming_knows_it(tmp_path, capsys):
    fields = dict(num_epochs=8, eval_num_images=2, eval_freq=2)
    scripted = rewards_of_looks([1.0, 1.05, 1.3])
    config = small(tmp_path, run_name="a", stop_gain=0.25, **fields)
    folder = fit(config, reward_fn=scripted)
    rows = read_metrics(folder)
    assert [row["epoch"] for row in rows if "eval_gain" in row] == [2, 4] and len(rows) == 4
    assert rows[-1]["eval_gain"] == pytest.approx(0.3)
    assert "stopped after epoch 4" in capsys.readouterr().out
    assert find_checkpoint(folder).name == "epoch_0004"
    fields |= dict(resume_from=str(folder))
    with pytest.raises(ValueError, match="stopped after epoch 4, .* had gained 30.0%"):
        setup(small(tmp_path, stop_gain=0.25, **fields), reward_fn=scripted)
    again = setup(small(tmp_path, stop_gain=0.5, **fields), reward_fn=scripted)
    assert not again.finished


def test_looks_come_every_epoch_near_the_goal_in_shorter_strides(tmp_path):
    state = setup(small(tmp_path, eval_num_images=2, eval_freq=4, stop_gain=0.3))
    state.epoch, state.eval_gain = 5, 0.19
    assert not look_is_due(state) and state.stride == 1
    strides = []
    for state.eval_gain in (0.21, 0.25, 0.29, 0.35):
        assert look_is_due(state)
        strides.append(state.stride)
    assert strides == pytest.approx([0.9, 0.5, 0.25, 0.25])
    state.epoch, state.eval_gain = 8, 0.0
    assert look_is_due(state)


def test_strides_set_the_learning_rate(tmp_path):
    state = setup(small(tmp_path, num_epochs=1, eval_num_images=2, eval_freq=4, stop_gain=0.3))
    state.eval_start, state.eval_gain = -1.0, 0.25
    next(train(state=state))
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3, abs=1e-9)


def test_looks_are_spread_over_the_prompts(tmp_path):
    source = setup(small(tmp_path)).prompt_fn
    prompts, metadata = spread_prompts(source, 45, 0)
    assert [prompt.split(" ", 1)[1] for prompt in prompts] == COMMON_ANIMALS
    assert metadata[2] == {"noun": COMMON_ANIMALS[2]}
    assert len(set(spread_prompts(source, 5, 0)[0])) == 5


@pytest.mark.parametrize("fields", [{}, dict(method="alignprop", sample_batch_size=8)], ids=str)
def test_looks_score_no_more_pictures_at_a_time_than_training(tmp_path, fields):
    "A reward that fits a batch of training fits a look; what scores each alone gives the same."
    lists, seen = {}, []

    def narrow(images, prompts, metadata):
        assert len(images) == len(prompts) == len(metadata)
        seen.append(len(images))
        lists.update(dict(zip(prompts, metadata)))
        return images.mean((1, 2, 3))

    fields = dict(sample_batch_size=4, train_batch_size=4, eval_num_images=9) | fields
    whole = look(setup(small(tmp_path, **fields | BRIGHT)))
    state = setup(small(tmp_path, **fields), reward_fn=narrow)
    parts = look(state)
    # in like parts, none of which is a picture alone
    assert seen == [3, 3, 3] and len(lists) == 9
    assert parts["eval_reward_mean"] == pytest.approx(whole["eval_reward_mean"], abs=1e-6)
    saved = torch.load(state.folder / "eval" / "epoch_0000.pt")
    means = saved["images"].float().mean((1, 2, 3)) / 255  # of rounded pixels
    torch.testing.assert_close(saved["rewards"], means, atol=1e-4, rtol=0)


def test_a_single_picture_has_no_spread(tmp_path, recwarn):
    fields = dict(sample_batch_size=1, train_batch_size=1, num_epochs=1)
    folder = fit(small(tmp_path, **fields, **BRIGHT))
    (row,) = read_metrics(folder)
    assert row["reward_std"] == row["advantage_spread"] == 0
    assert not [w for w in recwarn if "degrees of freedom" in str(w.message)]


def test_looking_changes_no_number_of_training(tmp_path):
    rows = {}
    for name, freq in (("blind", 0), ("looks", 1)):
        trained(small(tmp_path, run_name=name, eval_num_images=2, eval_freq=freq))
        rows[name] = numbers(tmp_path / name)
    assert "eval_gain" in rows["looks"][0]
    for row in rows["looks"]:
        for key in [key for key in row if key.startswith(("eval", "judge"))]:
            del row[key]
    assert rows["blind"] == rows["looks"]


def test_the_first_look_is_at_the_base_model_even_after_training(tmp_path):
    state = setup(small(tmp_path, eval_num_images=3, **BRIGHT))
    with torch.no_grad():
        for p in state.params:
            p.add_(0.05)
    look(state)
    fresh = setup(small(tmp_path / "fresh", eval_num_images=3, **BRIGHT))
    look(fresh)
    assert state.eval_start == pytest.approx(fresh.eval_start, abs=1e-6)
    assert abs(look(state)["eval_reward_mean"] - state.eval_start) > 1e-4


def test_the_first_look_is_at_the_weights_that_training_starts_from(tmp_path):
    "Not at the base model's: a gain is of this training alone."
    lora = fit(small(tmp_path, train_learning_rate=1e-2, lora_alpha=8, **BRIGHT))
    fields = dict(eval_num_images=3, lora_alpha=8, **BRIGHT)
    onward = setup(small(tmp_path / "onward", start_from=str(lora), **fields))
    first, second = (look(onward)["eval_reward_mean"] for _ in range(2))
    assert first == onward.eval_start == pytest.approx(second, abs=1e-6)
    base = setup(small(tmp_path / "base", **fields))
    assert abs(look(base)["eval_start"] - first) > 1e-4


def test_looks_of_a_run_are_pairs_after_resuming_too(tmp_path):
    run = dict(run_name="a", eval_num_images=2, eval_freq=1)
    folder = fit(small(tmp_path, num_epochs=1, **run))
    run["resume_from"] = str(folder)
    for field, value in dict(eval_num_images=3, eval_guidance_scale=2.0).items():
        with pytest.raises(ValueError, match=f"another configuration: {field} was .*, now {value}"):
            setup(small(tmp_path, **run | {field: value}))
    # looking no more is not another look
    assert not setup(small(tmp_path, **run | dict(eval_num_images=0))).finished
    clip_ranges = [row["clip_range"] for row in read_metrics(folder)]
    assert clip_ranges == [default_clip_range((4, 8, 8))]


# What people see.


def test_a_run_leaves_its_folder_and_a_lora_that_diffusers_loads(tmp_path):
    folder = fit(small(tmp_path, eval_num_images=3, num_epochs=1))
    left = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "reward_curve.png", "before_after.png"} <= left
    assert {"pytorch_lora_weights.safetensors", "comfyui.safetensors", "checkpoints"} <= left
    assert {"report.json", "report.html", "README.md"} <= left
    assert load_lora(load_pipeline(random_model()), folder).unet.peft_config


def test_a_run_that_an_error_stops_says_from_where_it_can_go_on(tmp_path, capsys):
    def fails(step):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fit(small(tmp_path, run_name="a", save_freq=1), on_epoch=fails)
    message = f"saved up to epoch_0001: resume with --resume_from {tmp_path / 'a'}"
    assert message in capsys.readouterr().out


def test_a_log_says_what_happens_from_the_first_pass_on_and_a_line_an_epoch(tmp_path, capsys):
    fit(small(tmp_path, run_name="a", num_epochs=2, eval_num_images=2, eval_freq=2))
    printed = capsys.readouterr().out
    assert "\r" not in printed
    first, *others = printed.splitlines()
    assert first.startswith("looking at the base model 0/2 pictures") or "1/2" in first
    lines = [line for line in others if line.startswith("epoch") and ": reward -" in line]
    assert [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("kB (sd " in line and line.endswith(" s") for line in lines)
    assert "fixed seeds" not in lines[0]  # nobody looked


def test_gauges_are_for_those_who_ask(tmp_path, capsys):
    fit(small(tmp_path, run_name="a", num_epochs=1), verbose=True)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch 1/1: "))
    assert "approx_kl" in line and "8 scored pictures" in line


@pytest.mark.parametrize(
    "trained_on, judges, left",
    [
        ("brightness + 0.5*redness", "redness, blueness", {"blueness"}),
        ("brightness - redness", "brightness - 2*redness, blueness", {"blueness"}),
        ("brightness + 0*redness", "redness, blueness", {"redness", "blueness"}),
        ("brightness + target_color('red')", "target_color('red'), target_color('teal')", {"teal"}),
        ("redness", "redness, 2*redness, redness + blueness", {"redness + blueness"}),
    ],
)
def test_a_part_of_the_reward_is_no_judge(tmp_path, trained_on, judges, left):
    fields = dict(reward_fn=trained_on, eval_judges=judges, eval_num_images=2)
    found = setup(small(tmp_path, **fields)).judges
    assert {"teal" if "teal" in name else name for name in found} == left


def test_a_look_is_on_disk_at_once_with_its_judges(tmp_path):
    fields = dict(eval_num_images=3, eval_freq=1, num_epochs=1, sample_num_steps=2)
    state = setup(small(tmp_path, model="tiny", **fields))
    steps = train(state=state)
    next(steps)
    sheet = state.folder / "eval" / "epoch_0000.png"
    assert sheet.is_file()  # though the first epoch has not ended
    (*_, last) = steps
    judges = {"tiny_clip_score", "tiny_animal"}
    assert {f"judge/{name}" for name in judges} <= set(last.metrics)
    kept = torch.load(state.folder / "eval/epoch_0001.pt", weights_only=True)
    assert set(kept["judges"]) == judges and kept["prompts"] == kept["prompts"]
    mean = kept["judges"]["tiny_animal"].double().mean().item()
    assert last.metrics["judge/tiny_animal"] == pytest.approx(mean)
    assert last.metrics["judge_start/tiny_animal"] == state.judge_start["tiny_animal"]


def test_a_judge_that_cannot_judge_these_prompts_is_left_out_and_one_asked_for_is_not(tmp_path):
    (tmp_path / "p.txt").write_text("a spaceship\n")
    fields = dict(prompt_fn=str(tmp_path / "p.txt"), eval_num_images=2, num_epochs=1)
    fields |= dict(model="tiny", sample_num_steps=2)
    state = trained(small(tmp_path, eval_freq=1, **fields))
    assert set(state.judges) == {"tiny_clip_score"}
    again = dict(resume_from=str(state.folder)) | fields | dict(num_epochs=2)
    assert set(trained(small(tmp_path, eval_freq=1, **again)).judges) == {"tiny_clip_score"}
    with pytest.raises((ValueError, RuntimeError), match="tiny_animal"):
        trained(small(tmp_path, eval_freq=1, eval_judges="tiny_animal", **fields))


# What is passed in from Python.


def test_a_passed_reward_names_the_run_and_a_resumed_run_asks_for_it(tmp_path):
    def mine(images, prompts, metadata):
        return images.mean((1, 2, 3))

    state = trained(small(tmp_path, num_epochs=1), reward_fn=mine)
    assert state.folder.name == "ddpo_is-mine-001"
    assert "mine" in read_config(state.folder).reward_fn
    again = dataclasses.replace(
        read_config(state.folder), num_epochs=2, resume_from=str(state.folder)
    )
    with pytest.raises(ValueError, match="passed from Python.*pass it again as reward_fn="):
        setup(again)
    other = dataclasses.replace(again, reward_fn="brightness")
    with pytest.raises(ValueError, match="reward_fn was '.*mine', now 'brightness'"):
        setup(other)
    assert setup(again, reward_fn=mine).epoch == 1


def test_passed_prompts_and_models_are_named_too(tmp_path):
    def foxes(generator):
        return "a fox", {}

    denoiser = StableDiffusion(load_pipeline("tiny"), 1.0)
    state = setup(small(tmp_path), prompt_fn=foxes, denoiser=denoiser)
    assert "foxes" in state.config.prompt_fn and state.config.model == "tiny"
    assert state.prompts([0, 1])[0] == ["a fox", "a fox"]
    reward = find_reward("0.5*brightness - redness")
    written = setup(small(tmp_path), reward_fn=reward).config.reward_fn
    assert written == "0.5*brightness - redness" and find_reward(written).name == reward.name


# Weights are checked, not only outputs.


def test_weights_that_are_not_finite_are_named_and_not_saved(tmp_path):
    state = setup(small(tmp_path, run_name="a", num_epochs=3, num_checkpoint_limit=1))
    with pytest.raises(FloatingPointError, match="not finite after .*lora_A") as error:
        for step in train(state=state):
            if step.epoch == 2 and step.update == 1:
                with torch.no_grad():
                    state.params[0].fill_(float("nan"))
    assert "reward" not in str(error.value)
    assert find_checkpoint(tmp_path / "a").name == "epoch_0001"
