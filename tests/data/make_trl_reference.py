"""Record reference numbers of TRL 0.23.1 for tests/test_trl.py.

It runs in an environment of its own that has `trl==0.23.1`, torch, diffusers, accelerate and peft:

    python tests/data/make_trl_reference.py ddpo_scratch/tiny_model tests/data/trl_reference.json

The settings live here alone: the test reads SETTINGS and gives the same to this package.
"""

import dataclasses
import functools
import inspect
import json
import random
import sys
import warnings

COMMON = dict(
    seed=3,
    mixed_precision="no",
    sample_num_steps=5,
    sample_guidance_scale=3.0,
    save_freq=100,
    train_learning_rate=1e-5,
)
DDPO = dict(
    COMMON,
    sample_batch_size=4,
    sample_num_batches_per_epoch=2,
    train_batch_size=2,
    train_gradient_accumulation_steps=2,
    train_clip_range=1e-3,
)
SETTINGS = {
    "ddpo": dict(DDPO),
    "ddpo_per_prompt": dict(
        DDPO,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=4,
        per_prompt_stat_tracking_min_count=2,
        negative_prompts="blue",
        train_timestep_fraction=0.6,
        train_num_inner_epochs=2,
    ),
    "ddpo_train_cfg_off": dict(DDPO, train_cfg=False),
    "alignprop": dict(
        COMMON,
        train_batch_size=3,
        train_gradient_accumulation_steps=2,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=3,
    ),
    "alignprop_full": dict(
        COMMON, train_batch_size=3, truncated_backprop_rand=False, truncated_backprop_timestep=0
    ),
}
PROMPTS = ["a cat", "a dog"]


def prompt_fn():
    return random.choice(PROMPTS), {}


def reward_fn(images, prompts, metadata):
    "Score red minus blue, with a term that the prompt decides."
    red = images.float()[:, 0].mean((1, 2)) - images.float()[:, 2].mean((1, 2))
    cats = images.new_tensor([prompt == "a cat" for prompt in prompts]).float()
    return 10 * red + cats, {}


def spy(owner, method, see):
    "Let `see` have each result of a method."
    original = getattr(owner, method)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        see(result)
        return result

    setattr(owner, method, wrapped)


def scalars(result):
    "Return one tensor, or a tuple of them, as a list of floats."
    values = result if isinstance(result, tuple) else (result,)
    return [float(value.detach()) for value in values]


def new_trainer(lib, name, pipeline_folder):
    "Make the trainer of a setting."
    kind = "AlignProp" if name.startswith("alignprop") else "DDPO"
    pipe = lib.DefaultDDPOStableDiffusionPipeline(pipeline_folder, use_lora=False)
    config = getattr(lib, f"{kind}Config")(**SETTINGS[name])
    trainer = getattr(lib, f"{kind}Trainer")(config, reward_fn, prompt_fn, pipe)
    pipe.set_progress_bar_config(disable=True)
    return trainer


def watch_alignprop(trainer, out):
    "Note prompts and rewards of AlignProp."
    spy(trainer, "_generate_samples", lambda result: out["prompts"].extend(result["prompts"]))
    spy(trainer, "compute_rewards", lambda result: out["rewards"].extend(result.tolist()))


def watch_ddpo(trainer, out):
    "Note prompts, rewards and the first samples of DDPO."

    def samples(result):
        parts, pairs = result
        for pair in pairs:
            out["prompts"] += pair[1]
        if "x0" not in out:
            out["x0"] = parts[0]["next_latents"][:2, -1].flatten(1)[:, :16].tolist()
            out["log_probs"] = parts[0]["log_probs"].tolist()
            out["timesteps"] = parts[0]["timesteps"][0].tolist()

    spy(trainer, "_generate_samples", samples)
    original = trainer.compute_rewards

    def compute(*args, **kwargs):
        result = tuple(original(*args, **kwargs))  # the trainer could not read an iterator again
        for rewards in result[0]:
            out["rewards"] += rewards.tolist()
        return result

    trainer.compute_rewards = compute


def record(lib, name, pipeline_folder):
    "Train two epochs; return samples, rewards, each loss and gradient norm, a few weights after."
    trainer = new_trainer(lib, name, pipeline_folder)
    out = {"losses": [], "grad_norms": [], "rewards": [], "prompts": []}
    spy(trainer, "calculate_loss", lambda result: out["losses"].append(scalars(result)))
    spy(
        trainer.accelerator,
        "clip_grad_norm_",
        lambda result: out["grad_norms"].append(float(result)),
    )
    watch = watch_alignprop if name.startswith("alignprop") else watch_ddpo
    watch(trainer, out)
    trainer.train(2)
    parameters = sorted(trainer.sd_pipeline.unet.named_parameters())
    out["weights"] = [float(p.detach().double().norm()) for _, p in parameters][:40]
    return out


def default_of(field):
    "Return a field's default as text; the experiment's name, which is the script's, as None."
    if field.name == "exp_name":
        return "None"
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return repr(field.default)


def parameters_of(function):
    "Return a function's parameters with their defaults as text, empty where there is none."
    parameters = inspect.signature(function).parameters
    return {
        name: "" if parameter.default is parameter.empty else repr(parameter.default)
        for name, parameter in parameters.items()
    }


BOTH = "__init__ train step calculate_loss loss compute_rewards _generate_samples create_model_card"
METHODS = {
    "DDPOTrainer": f"{BOTH} _config_check",
    "AlignPropTrainer": BOTH,
    "DefaultDDPOStableDiffusionPipeline": (
        "__init__ get_trainable_layers save_checkpoint load_checkpoint save_pretrained"
    ),
}


def interface(lib):
    "Return fields with their defaults, and parameters of methods with theirs, as text."
    fields, methods = {}, {}
    for name in ("DDPOConfig", "AlignPropConfig"):
        listed = dataclasses.fields(getattr(lib, name))
        fields[name] = {field.name: default_of(field) for field in listed}
    for name, words in METHODS.items():
        kind = getattr(lib, name)
        methods[name] = {word: parameters_of(getattr(kind, word)) for word in words.split()}
    return dict(fields=fields, methods=methods)


def step_reference(scheduler_step, scheduler):
    "Call a scheduler step: given noise prediction, timesteps, latents and next latents."
    import torch

    g = torch.Generator().manual_seed(0)
    pred, x, x_next = (torch.randn(3, 4, 8, 8, generator=g) for _ in range(3))
    t = scheduler.timesteps[[0, 4, 8]]
    free = scheduler_step(pred, t, x, eta=0.7, generator=torch.Generator().manual_seed(1))
    given = scheduler_step(pred, t, x, eta=0.7, prev_sample=x_next)
    return {
        "latents": free.latents.flatten(1)[:, :8].tolist(),
        "log_probs": free.log_probs.tolist(),
        "given": given.log_probs.tolist(),
    }


def steps_of_trl(kind):
    "Record TRL's step for a type of prediction."
    from diffusers import DDIMScheduler
    from trl.models.modeling_sd_base import scheduler_step

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=kind,
    )
    scheduler.set_timesteps(10)
    return step_reference(functools.partial(scheduler_step, scheduler), scheduler)


def interface_of_trl(trl):
    "Record TRL's interface; its pipeline's calls are functions that take anything else by name."
    from trl.models import modeling_sd_base as base

    found = interface(trl)
    functions = dict(
        scheduler_step=base.scheduler_step,
        __call__=base.pipeline_step,
        rgb_with_grad=base.pipeline_step_with_grad,
    )
    for name, function in functions.items():
        (_, first), *others = parameters_of(function).items()
        found["methods"]["DefaultDDPOStableDiffusionPipeline"][name] = {
            "self": first,
            **dict(others),
        }
    return found


def rounded(value):
    "Round the numbers in nested lists and dicts to nine digits."
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return value


def main(folder, target):
    import torch
    import trl
    from accelerate import PartialState

    PartialState()  # TRL's trainers log before they make their accelerator, which would raise
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = dict(
        trl=trl.__version__,
        torch=torch.__version__,
        runs={name: record(trl, name, folder) for name in SETTINGS},
        steps={kind: steps_of_trl(kind) for kind in ("epsilon", "v_prediction", "sample")},
        interface=interface_of_trl(trl),
    )
    with open(target, "w", encoding="utf-8") as file:
        json.dump(rounded(reference), file)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
