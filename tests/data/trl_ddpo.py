"""A script as users of TRL 0.23.1 have it: what its examples/scripts/ddpo.py does (classes, arguments, hook, files), with a scorer that needs no download.
tests/test_trl.py runs it with the import line of trl changed and nothing else.

    python trl_ddpo.py --num_epochs 200 --sample_batch_size 6 --train_batch_size 3 --sample_num_batches_per_epoch 4 --per_prompt_stat_tracking True
"""
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from transformers import HfArgumentParser

from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

animals = ["cat", "dog", "horse", "bird", "fox", "frog"]


@dataclass
class ScriptArguments:
    pretrained_model: str = field(default="runwayml/stable-diffusion-v1-5", metadata={"help": "model to fine-tune"})
    pretrained_revision: str = field(default="main", metadata={"help": "its revision"})
    hf_hub_model_id: str = field(default="ddpo-finetuned-stable-diffusion", metadata={"help": "where the result would go"})
    hf_hub_aesthetic_model_id: str = field(default="trl-lib/ddpo-aesthetic-predictor", metadata={"help": "repository of the scorer"})
    hf_hub_aesthetic_model_filename: str = field(default="aesthetic-model.pth", metadata={"help": "its weights"})
    use_lora: bool = field(default=True, metadata={"help": "train a LoRA"})


class Scorer(torch.nn.Module):
    "An MLP on pictures of 8 x 8 pixels; TRL's has a CLIP in front."
    def __init__(self, *, dtype, model_id, model_filename):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(192, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
        try: path = hf_hub_download(model_id, model_filename)
        except HFValidationError: path = os.path.join(model_id, model_filename)  # a folder
        self.mlp.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.dtype = dtype
        self.eval()

    @torch.no_grad()
    def __call__(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.to(self.dtype) / 255, 8)
        return self.mlp(small.flatten(1)).squeeze(1)


def aesthetic_scorer(model_id, filename):
    scorer = Scorer(model_id=model_id, model_filename=filename, dtype=torch.float32)
    def score(images, prompts, metadata):
        return scorer((images * 255).round().clamp(0, 255).to(torch.uint8)), {}
    return score


def prompt_fn():
    return np.random.choice(animals), {}


def image_outputs_logger(image_data, global_step, accelerate_logger):
    result, (images, prompts, _, rewards, _) = {}, image_data[-1]
    for i, image in enumerate(images):
        result[f"{prompts[i]:.25} | {rewards[i].item():.2f}"] = image.unsqueeze(0).float()
    accelerate_logger.log_images(result, step=global_step)
    print("hook at step", global_step, "with", len(image_data), "batches of", len(images))


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, DDPOConfig))
    script_args, training_args = parser.parse_args_into_dataclasses()
    training_args.project_kwargs = {"logging_dir": "./logs", "automatic_checkpoint_naming": True, "total_limit": 5, "project_dir": "./save"}

    pipeline = DefaultDDPOStableDiffusionPipeline(script_args.pretrained_model, pretrained_model_revision=script_args.pretrained_revision, use_lora=script_args.use_lora)
    scorer = aesthetic_scorer(script_args.hf_hub_aesthetic_model_id, script_args.hf_hub_aesthetic_model_filename)
    trainer = DDPOTrainer(training_args, scorer, prompt_fn, pipeline, image_samples_hook=image_outputs_logger)
    trainer.train()

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name="none")
