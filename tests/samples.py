"Schedules, random streams and the embedded model, for tests of several rooms."

import numpy as np
import torch

from ddpo_scratch.diffusion import Schedule
from ddpo_scratch.models.sd import StableDiffusion, add_lora, load_pipeline
from ddpo_scratch.rollout import generator_for

SD1 = dict(  # the scheduler of Stable Diffusion 1.x
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="leading",
    prediction_type="epsilon",
)


def schedule(**changes):
    "Read Stable Diffusion's schedule, with some fields changed."
    return Schedule.from_config(SD1 | changes)


def generators(which, seed=0):
    "Open the streams of samples: of the first `which` samples, or of those with these numbers."
    numbers = range(which) if isinstance(which, int) else which
    return [generator_for(seed, 0, i, "sample") for i in numbers]


def randn(*shape, seed=0, dtype=torch.float32):
    "Draw normal numbers that are the same in every run."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_lora(dtype=torch.float32):
    "Load the embedded model with a LoRA off zero; return it and the LoRA's parameters."
    denoiser = StableDiffusion(load_pipeline("tiny", dtype=dtype), guidance_scale=3.0)
    params = add_lora(denoiser, rank=2)
    with torch.no_grad():
        for i, p in enumerate(params):
            p += 0.05 * torch.randn(p.shape, generator=generator_for(i)).to(dtype)
    return denoiser, params


def of_all_types(numbers):
    "Return integers as everything that rewards may come as."
    dtypes = (torch.int32, torch.float16, torch.bfloat16, torch.float32)
    tensors = [torch.tensor(numbers, dtype=dtype) for dtype in dtypes]
    tensors.append(torch.tensor(numbers, dtype=torch.float32, requires_grad=True))
    return [list(numbers), np.array(numbers), *tensors]


def type_name(rewards):
    "Name a case of a test after the type of its rewards."
    dtype = getattr(rewards, "dtype", "")
    return f"{type(rewards).__name__} {dtype} {getattr(rewards, 'requires_grad', '')}".strip()
