"The plan of a run: what it counts is what a run does, and its memory is that of the parts."

import dataclasses

import pytest

from ddpo_scratch.config import TrainConfig, preset, preset_names
from ddpo_scratch.models.base import sizes
from ddpo_scratch.plan import describe, memory, plan

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
        dict(method="draft_lv", draft_lv_copies=3, **DIFFERENTIABLE),
    ],
)
def test_the_plan_counts_what_a_run_does(tmp_path, fields):
    "Count the rows that go through the network itself."
    from ddpo_scratch.train import setup, train

    config = TrainConfig(logdir=str(tmp_path), **SMALL | fields)
    rows = []
    state = setup(config)
    state.denoiser.network.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    updates = len(list(train(state=state)))
    counts = plan(config)
    assert sum(rows) == counts["passes_sampling"] + counts["passes_training"]
    assert updates == counts["updates"]
    assert state.reward_queries == counts["reward_queries"]


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
    with pytest.raises(ValueError, match="unknown method"):
        describe(TrainConfig(method="dpo"))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_described(name):
    text = describe(preset(name))
    heads = [line[:24].split(",")[0].strip() for line in text.splitlines()[1:]]
    for head in ("samples an epoch", "effective batch", "updates", "reward queries"):
        assert head in heads
    assert "network passes an epoch" in heads and "memory" in heads
    assert preset(name).model in text.splitlines()[0]
    assert "unet" not in text.lower() and "u-net" not in text.lower()


def test_words_of_a_description():
    text = describe(preset("ddpo_pytorch_aesthetic", world=8), world=8)
    assert "samples an epoch        256 (32 on each of 8 processes), 50 steps, guidance 5\n" in text
    assert "updates                 2 an epoch, at most 400 in 200 epochs\n" in text
    assert "every 10 epochs" in text and "on average" not in text
    assert "on average" in describe(preset("alignprop_aesthetic"))
    assert "on average" not in describe(preset("alignprop_aesthetic_k1"))
    assert "before and after" in describe(preset("tiny_collapse"))
    assert "every epoch" in describe(preset("alignprop_aesthetic"))
    assert "on the CPU" in describe(preset("ddpo_paper_rwr"))
    assert "a look" not in describe(TrainConfig(eval_num_images=0, stop_gain=0.0))


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
    assert more["average (EMA)"] == full["gradients"] == more["base model for KL"]


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
