"""A script as users of TRL 0.23.1 have it: what its examples/scripts/alignprop.py does (classes, arguments, hook, files), with a scorer that needs no download.
tests/test_trl.py runs it with the import line of trl changed and nothing else.

    python trl_alignprop.py --num_epochs 20 --train_gradient_accumulation_steps 4 --sample_num_steps 50 --train_batch_size 8
"""
from dataclasses import dataclass, field

import numpy as np
from transformers import HfArgumentParser

from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

animals = ["cat", "dog", "horse", "bird", "fox", "frog"]


@dataclass
class ScriptArguments:
    pretrained_model: str = field(default="runwayml/stable-diffusion-v1-5", metadata={"help": "model to fine-tune"})
    pretrained_revision: str = field(default="main", metadata={"help": "its revision"})
    hf_hub_model_id: str = field(default="alignprop-finetuned-stable-diffusion", metadata={"help": "where the result would go"})
    hf_hub_aesthetic_model_id: str = field(default="trl-lib/ddpo-aesthetic-predictor", metadata={"help": "repository of the scorer"})
    hf_hub_aesthetic_model_filename: str = field(default="aesthetic-model.pth", metadata={"help": "its weights"})
    use_lora: bool = field(default=True, metadata={"help": "train a LoRA"})


def aesthetic_scorer(model_id, filename):
    "Gradients reach the pictures; TRL's scorer is a CLIP with a head."
    def score(images, prompts, metadata):
        return images.clamp(0, 1).mean((1, 2, 3)), {}
    return score


def prompt_fn():
    return np.random.choice(animals), {}


def image_outputs_logger(image_pair_data, global_step, accelerate_logger):
    result, (images, prompts, _) = {}, [image_pair_data["images"], image_pair_data["prompts"], image_pair_data["rewards"]]
    for i, image in enumerate(images[:4]):
        result[f"{prompts[i]}"] = image.unsqueeze(0).float()
    accelerate_logger.log_images(result, step=global_step)
    print("hook at step", global_step, "with", len(images))


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, AlignPropConfig))
    script_args, training_args = parser.parse_args_into_dataclasses()
    training_args.project_kwargs = {"logging_dir": "./logs", "automatic_checkpoint_naming": True, "total_limit": 5, "project_dir": "./save"}

    pipeline = DefaultDDPOStableDiffusionPipeline(script_args.pretrained_model, pretrained_model_revision=script_args.pretrained_revision, use_lora=script_args.use_lora)
    scorer = aesthetic_scorer(script_args.hf_hub_aesthetic_model_id, script_args.hf_hub_aesthetic_model_filename)
    trainer = AlignPropTrainer(training_args, scorer, prompt_fn, pipeline, image_samples_hook=image_outputs_logger)
    trainer.train()

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name="none")
