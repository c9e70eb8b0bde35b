"LoRAs of the embedded model that were not trained, for tests of several rooms."

import torch
from ddpo_scratch.models import sd


def random_lora(seed, folder):
    "Save a LoRA whose B is not zero."
    denoiser = sd.denoiser_for(sd.load_pipeline("tiny"))
    for i, p in enumerate(sd.add_lora(denoiser, rank=4, seed=seed)):
        generator = torch.Generator().manual_seed(100 * seed + i)
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    sd.save_lora(denoiser, folder)
    return folder
