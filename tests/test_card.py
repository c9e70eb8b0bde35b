"What is said of a run: cards, numbers in words, snippets."

import pytest

from ddpo_scratch.run import card as C
from ddpo_scratch.config import TrainConfig, preset


def test_a_card_is_a_head_and_parts(tmp_path):
    from huggingface_hub import ModelCard

    parts = ["Text: *yes*", "", "## More\n\n絵"]
    card = C.model_card("Name", parts, dict(tags=["a"], base_model="b/c"))
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == dict(base_model="b/c", tags=["a"])
    assert read.text.strip() == "# Name\n\nText: *yes*\n\n## More\n\n絵"


def facts(tmp_path, config=None, **report):
    "Facts of a run without rows."
    found = dict(epochs=0, unit="kB", findings=[]) | report
    return C.Facts(tmp_path, config or TrainConfig(), "size", [], found)


def compared(before, after, se):
    "Facts as `write_report` has them, of one picture fewer than two standard errors need."
    numbers = dict(n=9, epoch=0, reward_se=0.1)
    return dict(
        before=numbers | dict(reward_mean=before),
        after=numbers | dict(reward_mean=after),
        difference=dict(mean=after - before, se=se),
        judges={},
    )


@pytest.mark.parametrize(
    "after, se, difference, verdict",
    [
        (-1.0, 0.1, "+1.00 ± 0.10 kB", "rose"),
        (-3.0, 0.1, "-1.00 ± 0.10 kB", "fell"),
        (-1.0, 0.6, "+1.00 ± 0.60 kB", "no clear change"),
        (-2.0, 0.0, "0.00 kB", "no clear change"),
        (-1.5, 0.0, "+0.500 kB", "rose"),
    ],
)
def test_a_difference_is_put_in_words(tmp_path, after, se, difference, verdict):
    (row,) = C.number_rows(facts(tmp_path, **compared(-2.0, after, se)))
    assert row[0] == "reward `size`" and row[1] == "-2.00 ± 0.10 kB"
    assert row[3:] == [difference, verdict]
    assert C.number_rows(facts(tmp_path)) == []


def test_one_picture_has_no_verdict(tmp_path):
    from ddpo_scratch.run.gauges import compare

    report = compared(1.0, 1.001, 0.0)
    report["after"]["n"] = 1
    judges = {name: compare([1.0] * n, [1.001] * n) for name, n in dict(one=1, two=2).items()}
    rows = C.number_rows(facts(tmp_path, **report | dict(judges=judges)))
    assert [row[-1] for row in rows] == ["one picture only", "one picture only", "rose"]


def test_nouns_agree_with_their_numbers(tmp_path):
    one = C.Facts(tmp_path, TrainConfig(), "size", [dict(reward_queries=1)], {})
    assert C.summary(one).endswith("1 epoch, 1 scored picture.")
    two = C.Facts(tmp_path, TrainConfig(), "size", [dict(reward_queries=2048)] * 2, {})
    assert C.summary(two).endswith("2 epochs, 2,048 scored pictures.")


def test_changed_fields_are_those_that_differ(tmp_path):
    assert C.changed_fields(TrainConfig()) == []
    config = TrainConfig(seed=3, negative_prompts="", eval_judges="", logdir="x", run_name="y")
    assert C.changed_fields(config) == [["`seed`", "`3`"], ["`eval_judges`", "(empty)"]]
    # what the embedded model's preset sets anyway
    assert len(C.changed_fields(preset("ddpo_pytorch_aesthetic"))) > 5


@pytest.mark.parametrize(
    "prompt", ["a fox", 'a "quoted" fox', "it's", "line\nbreak", "$HOME `id`", "絵"]
)
def test_prompts_are_quoted_for_python_and_for_the_shell(tmp_path, prompt):
    import ast
    import shlex

    found = facts(tmp_path)
    found.prompt = prompt
    command, python = (text for _, text in C.snippets(found))
    assert shlex.split(command, comments=True)[1] == prompt
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    words = [word for call in calls for word in call.keywords if word.arg == "prompt"]
    assert [word.value.value for word in words] == [prompt]


def test_ways_to_use_a_run_are_those_that_it_has(tmp_path):
    titles = [title for title, _ in C.snippets(facts(tmp_path))]
    assert titles == ["With ddpo_scratch, where the run's folder is", "With diffusers"]
    (tmp_path / "comfyui.safetensors").touch()
    assert "ComfyUI" in C.snippets(facts(tmp_path))[-1][0]
    (tmp_path / "comfyui.safetensors").unlink()
    ((title, text),) = C.snippets(facts(tmp_path, TrainConfig(use_lora=False)))
    assert title == "With diffusers" and "lora" not in text


def drawn_with(tmp_path, config):
    "Return the snippet of diffusers of a run that was called run."
    return dict(C.snippets(facts(tmp_path / "run", config)))["With diffusers"]


def test_how_models_are_loaded(tmp_path):
    def line(model, **fields):
        text = drawn_with(tmp_path, TrainConfig(model=model, **fields))
        (found,) = [row for row in text.splitlines() if row.startswith("pipe = ")]
        return found.removeprefix("pipe = DiffusionPipeline.from_pretrained").removeprefix(
            "pipe = "
        )

    assert line("owner/name@a1") == '("owner/name", revision="a1")'
    assert line("owner/name") == '("owner/name")'
    assert line("owner/name", use_lora=False) == '("YOUR_NAME/run")'
    (tmp_path / "sd.safetensors").write_bytes(b"")
    file = str(tmp_path / "sd.safetensors")
    assert line(file) == 'StableDiffusionPipeline.from_single_file("FOLDER/sd.safetensors")'
    (tmp_path / "full/pipeline").mkdir(parents=True)
    (tmp_path / "full/pipeline/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert line(str(tmp_path / "full")) == '("FOLDER/full/pipeline")'
    head = C.run_card(facts(tmp_path / "run", TrainConfig(model="owner/name@a1"))).data.to_dict()
    assert head["base_model"] == "owner/name"


@pytest.mark.parametrize(
    "model, has, has_not",
    [
        ("owner/unknown", "DDIMScheduler eta=1 guidance_scale=3 negative_prompt=", "true_cfg"),
        ("stabilityai/stable-diffusion-3.5-medium", "guidance_scale=3 negative_prompt=", "eta="),
        ("stabilityai/stable-diffusion-3.5-medium@x", "guidance_scale=3", "DDIMScheduler"),
        ("black-forest-labs/FLUX.1-dev", "guidance_scale=3", "negative_prompt DDIMScheduler eta="),
        ("black-forest-labs/FLUX.2-klein-4B", "guidance_scale=3", "negative_prompt DDIM eta="),
        ("Qwen/Qwen-Image", "true_cfg_scale=3 negative_prompt=", "guidance_scale DDIM eta="),
    ],
)
def test_each_family_is_asked_in_its_own_words(tmp_path, model, has, has_not):
    config = TrainConfig(model=model, negative_prompts='"blurry"', height=512, width=768)
    text = drawn_with(tmp_path, config)
    for word in [*has.split(), "height=512", "width=768", "num_inference_steps=20"]:
        assert word in text, word
    for word in has_not.split():
        assert word not in text, word
    # what is the model's own is not said
    plain = drawn_with(tmp_path, TrainConfig(model=model))
    assert "height" not in plain and "width" not in plain
    assert ("negative_prompt" in plain) is (model == "Qwen/Qwen-Image")


def test_the_class_of_a_hubs_model_is_read_from_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    def cached(name, file, revision=None):
        assert (name, file, revision) == ("owner/theirs", "model_index.json", "v2")
        return str(tmp_path / file)

    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert C._pipeline_of("owner/theirs@v2") == "StableDiffusion3Pipeline"


SIZED = dict(height=16, width=24, negative_prompts="blurry", eval_num_steps=2)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35_medium", "flux_dev", "klein_base", "qwen"])
def test_the_snippet_draws_what_the_looks_draw(tmp_path, monkeypatch, name):
    "Small random models in folders, at a size of their own: no library raises, and pixels agree."
    import flow_models
    import sd_models
    import torch

    from ddpo_scratch.models.base import load
    from ddpo_scratch.rollout import sample

    is_sd = name in sd_models.SCHEDULERS
    place = (sd_models if is_sd else flow_models).folder(name)
    method = dict(method="rwr" if is_sd else "flow_grpo", sample_eta=0)
    fields = SIZED | method | (dict(negative_prompts="") if name == "klein_base" else {})
    config = TrainConfig(model=place, hub_model_id="someone/quiet", **fields)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").symlink_to(f"{place}/..")
    found = facts(tmp_path / "run", config)
    found.prompt = "a fox"
    text = dict(C.snippets(found))["With diffusers"]
    assert ("DDIMScheduler" in text) is is_sd
    bare = "\n".join(line for line in text.splitlines() if "load_lora" not in line)
    noise = "generator=torch.Generator().manual_seed(0)"
    scope = dict(torch=torch)
    exec(bare.replace("pipe(", f"pipe({noise}, "), scope)
    assert scope["image"].size == (24, 16)
    own = load(place, config.eval_guidance_scale, config.negative_prompts, height=16, width=24)
    stream = [torch.Generator().manual_seed(0)]
    with torch.no_grad():
        rollout = sample(own, own.encode(["a fox"]), config.look_steps, config.look_eta, stream)
        picture = own.decode(rollout.x0)[0]
    array = torch.frombuffer(bytearray(scope["image"].tobytes()), dtype=torch.uint8)
    theirs = array.float().view(16, 24, 3).permute(2, 0, 1) / 255
    assert (picture - theirs).abs().max() < 0.01


def test_a_model_that_was_passed_from_python_is_not_loaded_by_its_name(tmp_path):
    (*_, (_, text)) = C.snippets(facts(tmp_path, TrainConfig(model="my_room:Denoiser")))
    assert "pipe = ...  # the model that the run was given from Python: my_room:Denoiser" in text
