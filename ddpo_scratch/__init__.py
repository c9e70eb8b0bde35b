"""Reward fine-tuning of diffusion models, derived from scratch.

    from ddpo_scratch import fit, preset

    fit(preset("tiny_minute", reward_fn="jpeg_compressibility"))  # leaves a report in runs/
"""

__version__ = "0.1.0"

# name -> the module it lives in, imported when the name is first asked for: torch takes a second
_HOMES = {
    "fit": "train",
    "TrainConfig": "config",
    "preset": "config",
    "get_reward": "rewards.base",
    "get_prompt_fn": "prompts",
    "load": "models.base",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    "Import a public name from its module."
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted({*globals(), *_HOMES})
