"""Reference numbers of TRL 0.23.1, for tests/test_trl.py: run in an environment of its own that has `trl==0.23.1`, torch, diffusers, accelerate and peft.

    python tests/data/make_trl_reference.py ddpo_scratch/tiny_model tests/data/trl_reference.json

The settings live here alone: the test reads SETTINGS and gives the same to this package's trainers.
"""
import json
import random
import sys
import warnings

COMMON = dict(seed=3, mixed_precision="no", sample_num_steps=5, sample_guidance_scale=3.0, save_freq=100, train_learning_rate=1e-5)
DDPO = dict(COMMON, sample_batch_size=4, sample_num_batches_per_epoch=2, train_batch_size=2, train_gradient_accumulation_steps=2, train_clip_range=1e-3)
SETTINGS = {
    "ddpo": dict(DDPO),
    "ddpo_per_prompt": dict(DDPO, per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=4, per_prompt_stat_tracking_min_count=2,
                            negative_prompts="blue", train_timestep_fraction=0.6, train_num_inner_epochs=2),
    "ddpo_train_cfg_off": dict(DDPO, train_cfg=False),
    "alignprop": dict(COMMON, train_batch_size=3, train_gradient_accumulation_steps=2, truncated_backprop_rand=False, truncated_backprop_timestep=3),
    "alignprop_full": dict(COMMON, train_batch_size=3, truncated_backprop_rand=False, truncated_backprop_timestep=0),
}
PROMPTS = ["a cat", "a dog"]


def prompt_fn():
    return random.choice(PROMPTS), {}


def reward_fn(images, prompts, metadata):
    "Red minus blue, with a term that the prompt decides"
    red = images.float()[:, 0].mean((1, 2)) - images.float()[:, 2].mean((1, 2))
    return 10 * red + images.new_tensor([len(p) == 5 and p.endswith("t") for p in prompts]).float(), {}


def record(lib, name, pipeline_folder):
    "Two epochs of a trainer, as numbers: samples, rewards, each loss, each gradient norm, a few weights after."
    align = name.startswith("alignprop")
    pipe = lib.DefaultDDPOStableDiffusionPipeline(pipeline_folder, use_lora=False)
    config = (lib.AlignPropConfig if align else lib.DDPOConfig)(**SETTINGS[name])
    trainer = (lib.AlignPropTrainer if align else lib.DDPOTrainer)(config, reward_fn, prompt_fn, pipe)
    pipe.set_progress_bar_config(disable=True)
    out = {"losses": [], "grad_norms": [], "rewards": [], "prompts": []}

    def spy(owner, method, see):
        original = getattr(owner, method)
        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            see(result, args)
            return result
        setattr(owner, method, wrapped)

    numbers = lambda x: [float(v.detach()) for v in (x if isinstance(x, tuple) else (x,))]
    spy(trainer, "calculate_loss", lambda r, a: out["losses"].append(numbers(r)))
    spy(trainer.accelerator, "clip_grad_norm_", lambda r, a: out["grad_norms"].append(float(r)))
    def samples(result, args):
        if align: out["prompts"] += list(result["prompts"])
        else:
            parts, pairs = result
            out["prompts"] += [p for pair in pairs for p in pair[1]]
            if "x0" not in out:
                out["x0"] = parts[0]["next_latents"][:2, -1].flatten(1)[:, :16].tolist()
                out["log_probs"] = parts[0]["log_probs"].tolist()
                out["timesteps"] = parts[0]["timesteps"][0].tolist()
    spy(trainer, "_generate_samples", samples)
    def rewards(result, args):
        out["rewards"] += result.tolist() if align else [v for r in list(result)[0] for v in r.tolist()]
        return result
    original = trainer.compute_rewards
    def compute(*args, **kwargs):
        result = original(*args, **kwargs)
        if not align: result = tuple(result)
        rewards(result, args)
        return result
    trainer.compute_rewards = compute
    trainer.train(2)
    out["weights"] = [float(p.detach().double().norm()) for _, p in sorted(pipe.unet.named_parameters())][:40]
    return out


def interface(lib):
    "Fields with their defaults, and parameters of methods with theirs, as text."
    import dataclasses
    import inspect
    default = lambda f: "None" if f.name == "exp_name" else repr(f.default_factory()) if f.default_factory is not dataclasses.MISSING else repr(f.default)
    fields = {c: {f.name: default(f) for f in dataclasses.fields(getattr(lib, c))} for c in ("DDPOConfig", "AlignPropConfig")}
    methods = {"DDPOTrainer": "__init__ train step calculate_loss loss compute_rewards _generate_samples create_model_card _config_check",
               "AlignPropTrainer": "__init__ train step calculate_loss loss compute_rewards _generate_samples create_model_card",
               "DefaultDDPOStableDiffusionPipeline": "__init__ get_trainable_layers save_checkpoint load_checkpoint save_pretrained"}
    parameters = lambda f: {k: repr(p.default) if p.default is not p.empty else "" for k, p in inspect.signature(f).parameters.items()}
    return dict(fields=fields, methods={c: {m: parameters(getattr(getattr(lib, c), m)) for m in ms.split()} for c, ms in methods.items()})


def step_reference(scheduler_step, scheduler):
    "One call of a scheduler step: given noise prediction, timesteps, latents and next latents."
    import torch
    g = torch.Generator().manual_seed(0)
    pred, x, x_next = (torch.randn(3, 4, 8, 8, generator=g) for _ in range(3))
    t = scheduler.timesteps[[0, 4, 8]]
    free = scheduler_step(pred, t, x, eta=0.7, generator=torch.Generator().manual_seed(1))
    given = scheduler_step(pred, t, x, eta=0.7, prev_sample=x_next)
    return {"latents": free.latents.flatten(1)[:, :8].tolist(), "log_probs": free.log_probs.tolist(), "given": given.log_probs.tolist()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import functools
    import torch
    import trl
    from accelerate import PartialState
    PartialState()  # TRL's trainers log a warning before they make their accelerator, which raises without this
    from diffusers import DDIMScheduler
    from trl.models.modeling_sd_base import scheduler_step
    torch.set_num_threads(1)
    folder, target = sys.argv[1:]
    torch.manual_seed(0)
    reference = {"trl": trl.__version__, "torch": torch.__version__, "runs": {name: record(trl, name, folder) for name in SETTINGS}, "steps": {}, "interface": interface(trl)}
    from trl.models import modeling_sd_base as base
    import inspect
    for name, f in (("scheduler_step", base.scheduler_step), ("__call__", base.pipeline_step), ("rgb_with_grad", base.pipeline_step_with_grad)):
        reference["interface"]["methods"]["DefaultDDPOStableDiffusionPipeline"][name] = {
            "self" if i == 0 else k: repr(p.default) if p.default is not p.empty else "" for i, (k, p) in enumerate(inspect.signature(f).parameters.items())}
    for kind in ("epsilon", "v_prediction", "sample"):
        s = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=kind)
        s.set_timesteps(10)
        reference["steps"][kind] = step_reference(functools.partial(scheduler_step, s), s)
    rounded = lambda v: float(f"{v:.9g}") if isinstance(v, float) else {k: rounded(x) for k, x in v.items()} if isinstance(v, dict) else [rounded(x) for x in v] if isinstance(v, list) else v
    with open(target, "w") as f: json.dump(rounded(reference), f)
