"""LoRA files: every style of keys has its effect, or an error names what fits nothing.

The file for ComfyUI and A1111 is tested twice: its keys by tables of what these programs know, and
its numbers by doing what they do (adding alpha / rank times up times down to the weights of the
original Stable Diffusion) and letting diffusers convert the result. Largest difference seen in a
prediction in float32: 2e-6.
"""

import json
import re

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpo_scratch.models import lora, sd

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()

W, PROMPTS = 3.0, ["a fox", "a lion on a blue background"]
DIFFUSERS, COMFY = "pytorch_lora_weights.safetensors", "comfyui.safetensors"


@pytest.fixture
def tiny():
    return sd.StableDiffusion(sd.load_pipeline("tiny"), W)


def shake(params, by=0.05):
    "Move parameters a little, as training would"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in params:
            p += by * torch.randn(p.shape, generator=generator)


@torch.no_grad()
def predict(denoiser):
    "Ask the network something"
    x = torch.randn(2, *denoiser.latent_shape, generator=torch.manual_seed(0))
    return denoiser(x, torch.tensor([801, 201]), denoiser.encode(PROMPTS))


def trained(denoiser, folder, rank=2, alpha=8, targets="all"):
    "Write a LoRA that does something; return the prediction with it"
    shake(lora.add_lora(denoiser, rank, alpha, targets))
    lora.save_lora(denoiser, folder)
    return predict(denoiser)


# Names: what ComfyUI and A1111 know


def original_name(layer, n_layers):
    "Name a U-Net's layer as the original Stable Diffusion does"
    resnet = dict(
        norm1="in_layers.0",
        conv1="in_layers.2",
        time_emb_proj="emb_layers.1",
        norm2="out_layers.0",
        conv2="out_layers.3",
        conv_shortcut="skip_connection",
    )
    single = dict(conv_in="input_blocks.0.0", conv_norm_out="out.0", conv_out="out.2")
    if layer in single:
        return single[layer]
    if match := re.fullmatch(r"(time|add)_embedding\.linear_(\d)", layer):
        kind, i = match.groups()
        return f"{dict(time='time_embed', add='label_emb.0')[kind]}.{2 * int(i) - 2}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)", layer):
        return f"middle_block.{2 * int(match[1])}.{resnet[match[2]]}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", layer):
        return f"middle_block.1.{match[1]}"
    way, i, kind, j, rest = re.fullmatch(r"(\w+)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", layer).groups()
    i, j = int(i), int(j)
    if kind == "downsamplers":
        return f"input_blocks.{(n_layers + 1) * (i + 1)}.0.op"
    at = (n_layers + 1) * i + j
    block = f"input_blocks.{1 + at}" if way == "down" else f"output_blocks.{at}"
    return f"{block}.0.{resnet[rest]}" if kind == "resnets" else f"{block}.1.{rest}"


def original_unet(unet):
    "Rename a U-Net's weights as the original Stable Diffusion has them"
    n_layers, renamed = unet.config.layers_per_block, {}
    blocks = [bool(getattr(block, "attentions", None)) for block in unet.up_blocks]
    for key, tensor in unet.state_dict().items():
        layer, _, kind = key.rpartition(".")
        match = re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", layer)
        if match:  # the last in its block, after a residual block and perhaps a transformer
            i = int(match[1])
            name = f"output_blocks.{(n_layers + 1) * i + n_layers}.{1 + blocks[i]}.conv"
        else:
            name = original_name(layer, n_layers)
        renamed[f"model.diffusion_model.{name}.{kind}"] = tensor.clone()
    return renamed


def a1111_name(key):
    "Name a layer as A1111 looks for it, by its rules for keys that begin with lora_unet_"
    resnet = dict(
        conv1="in_layers_2",
        conv2="out_layers_3",
        time_emb_proj="emb_layers_1",
        conv_shortcut="skip_connection",
    )
    middle = re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key)
    if middle:
        kind, j, rest = middle.groups()
        number = 1 if kind == "attentions" else 2 * int(j)
        return f"middle_block_{number}_{resnet.get(rest, rest)}"
    pattern = r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)"
    way, i, kind, j, rest = re.fullmatch(pattern, key).groups()
    at = 3 * int(i) + int(j) + (way == "down")
    part = "1" if kind == "attentions" else "0"
    block = "input_blocks" if way == "down" else "output_blocks"
    return f"{block}_{at}_{part}_{resnet.get(rest, rest)}"


SD1 = dict(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
SDXL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


@pytest.mark.parametrize("config, n_layers", [(SD1, 272), (SDXL, 784)])
def test_every_layer_of_the_published_models_has_a_key_that_both_programs_know(config, n_layers):
    "ComfyUI looks for diffusers' name with underscores, A1111 for the original one by its rules"
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    layers = lora._layers_of(unet, "all")
    state = {f"{layer}.lora_{side}.weight": torch.ones(2) for layer in layers for side in "AB"}
    keys = lora._comfy_tensors(state, dict(lora_alpha=16)).keys()
    names = {key.partition(".")[0] for key in keys}
    assert len(names) == len(layers) == n_layers and len(keys) == 3 * n_layers
    modules = dict(unet.named_modules())
    comfy = {"lora_unet_" + name.replace(".", "_") for name in modules}
    assert names <= comfy
    theirs = {original_name(layer, 2).replace(".", "_") for layer in layers}
    assert {a1111_name(name) for name in names} == theirs


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_what_comfyui_and_a1111_do_with_the_file_is_what_was_trained(fresh, tmp_path, name):
    expected = trained(fresh(name), tmp_path)
    plain = fresh(name)
    unet, tensors = plain.pipe.unet, load_file(tmp_path / COMFY)
    before, weights = predict(plain), original_unet(unet)
    for key, alpha in tensors.items():
        if not key.endswith(".alpha"):
            continue
        down = tensors[key.replace(".alpha", ".lora_down.weight")]
        up = tensors[key.replace(".alpha", ".lora_up.weight")]
        layer = next(
            n for n, _ in unet.named_modules() if f"lora_unet_{n.replace('.', '_')}.alpha" == key
        )
        weight = weights[f"model.diffusion_model.{original_name(layer, 1)}.weight"]
        change = alpha / len(down) * up.flatten(1) @ down.flatten(1)
        weight += change.reshape(weight.shape)
    unet.load_state_dict(convert_ldm_unet_checkpoint(weights, dict(unet.config)))
    torch.testing.assert_close(predict(plain), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_file_for_comfyui_loads_in_plain_diffusers(folders, fresh, tmp_path, name):
    expected = trained(fresh(name), tmp_path)
    plain = type(fresh(name).pipe).from_pretrained(folders(name))
    plain.load_lora_weights(tmp_path, weight_name=COMFY)
    torch.testing.assert_close(predict(sd.denoiser_for(plain, W)), expected, atol=1e-5, rtol=1e-5)


# Styles


def as_old_diffusers(key):
    "Rename as diffusers did before it used peft"
    key = re.sub(r"\.(to_[qkv])\.lora_A", r".processor.\1_lora.down", key)
    key = re.sub(r"\.(to_[qkv])\.lora_B", r".processor.\1_lora.up", key)
    key = key.replace(".to_out.0.lora_A", ".processor.to_out_lora.down")
    key = key.replace(".to_out.0.lora_B", ".processor.to_out_lora.up")
    return key.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up")


STYLES = {  # from diffusers' key
    "without unet": lambda key: key.removeprefix("unet."),
    "peft": lambda key: "base_model.model." + key.removeprefix("unet."),
    "peft, with the part": lambda key: "base_model.model." + key,
    "peft, with the adapter": lambda key: re.sub(
        r"(lora_[AB])", r"\1.my_adapter", "base_model.model." + key.removeprefix("unet.")
    ),
    "old diffusers": as_old_diffusers,
    "old diffusers without unet": lambda key: as_old_diffusers(key.removeprefix("unet.")),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_style_of_keys_has_its_effect(fresh, tmp_path, name, style):
    "Without alpha it is the rank: trained so here"
    expected = trained(fresh(name), tmp_path, rank=2, alpha=2)
    tensors = {STYLES[style](k): v for k, v in load_file(tmp_path / DIFFUSERS).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    other = fresh(name)
    lora.load_lora(other.pipe, tmp_path / "other.safetensors")
    torch.testing.assert_close(predict(other), expected, atol=1e-5, rtol=1e-5)


def test_pefts_folder_has_its_alpha_in_a_file_beside(fresh, tmp_path):
    expected = trained(fresh("sd15"), tmp_path / "ours", alpha=8)
    tensors = load_file(tmp_path / "ours" / DIFFUSERS)
    tensors = {STYLES["peft"](key): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = dict(r=2, lora_alpha=8, target_modules=["to_q"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = fresh("sd15")
    lora.load_lora(other.pipe, tmp_path)
    torch.testing.assert_close(predict(other), expected, atol=1e-5, rtol=1e-5)


def test_names_of_the_original_model_and_an_alpha_for_each_layer(fresh, tmp_path):
    "As kohya's trainer writes SDXL; diffusers' own loader loses alphas that differ"
    denoiser = fresh("sdxl")
    shake(lora.add_lora(denoiser, 2, 2, "attention"))
    unet, tensors = denoiser.pipe.unet, {}
    for i, layer in enumerate(lora._layers_of(unet, "attention")):
        module = unet.get_submodule(layer)
        module.scaling["default"] = (i + 1) / 2
        name = f"lora_unet_{original_name(layer, 1).replace('.', '_')}"
        tensors[f"{name}.alpha"] = torch.tensor(float(i + 1))
        tensors[f"{name}.lora_down.weight"] = module.lora_A["default"].weight.detach().clone()
        tensors[f"{name}.lora_up.weight"] = module.lora_B["default"].weight.detach().clone()
    save_file(tensors, tmp_path / "kohya.safetensors")
    other = fresh("sdxl")
    lora.load_lora(other.pipe, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(predict(other), predict(denoiser), atol=1e-5, rtol=1e-5)


def test_ranks_that_differ_and_rank_stabilized_scales_survive(fresh, tmp_path):
    denoiser, other = fresh("sd15"), fresh("sd15")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["to_q", "to_k"],
        rank_pattern={"attn2.to_k": 2},
        alpha_pattern={"attn1.to_q": 3},
    )
    denoiser.pipe.unet.add_adapter(config)
    shake(p for p in denoiser.pipe.unet.parameters() if p.requires_grad)
    lora.save_lora(denoiser, tmp_path)
    lora.load_lora(other.pipe, tmp_path)
    lora.load_lora((comfy := fresh("sd15")).pipe, tmp_path / COMFY)
    for again in (other, comfy):
        torch.testing.assert_close(predict(again), predict(denoiser), atol=1e-5, rtol=1e-5)


def test_a_convolution_of_one_pixel_is_a_linear_layer(fresh, tmp_path):
    trained(fresh("sd21"), tmp_path, alpha=2)
    tensors = {}
    for key, tensor in load_file(tmp_path / DIFFUSERS).items():
        tensors[key] = tensor[..., None, None].contiguous() if "proj_in" in key else tensor
    assert any(v.dim() == 4 for k, v in tensors.items() if "proj_in" in k)
    save_file(tensors, tmp_path / "other.safetensors")
    pipe = fresh("sd21").pipe
    flat = lora.read_lora(pipe, tmp_path / "other.safetensors")
    assert all(down.dim() == 2 for k, (down, _, _) in flat.layers.items() if "proj_in" in k)


def text_keys(pipe, part, prefix, ends):
    "Name the layers of a text encoder as kohya does"
    encoder, found = getattr(pipe, part), {}
    for name, module in encoder.named_modules():
        if name.endswith(ends):
            name = name if name.startswith("text_model.") else f"text_model.{name}"
            found[f"{prefix}_{name.replace('.', '_')}"] = module.weight
    return found


TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.mark.parametrize("ends", [TEXT, ("q_proj", "fc1"), ("fc1",)])
@pytest.mark.parametrize("name, parts", [("sd15", ["te"]), ("sdxl", ["te1", "te2"])])
def test_text_encoders_parts_of_kohyas_files_are_loaded(fresh, tmp_path, name, parts, ends):
    "All of them, where diffusers' own loader leaves out attention without out_proj"
    denoiser, generator = fresh(name), torch.Generator().manual_seed(0)
    expected = trained(fresh(name), tmp_path)
    tensors, before = load_file(tmp_path / COMFY), denoiser.encode(PROMPTS).cond
    for kind in parts:
        part = "text_encoder_2" if kind == "te2" else "text_encoder"
        for key, weight in text_keys(denoiser.pipe, part, f"lora_{kind}", ends).items():
            tensors[f"{key}.alpha"] = torch.tensor(1.0 + len(tensors) % 2)
            for end, shape in (("down", (2, weight.shape[1])), ("up", (weight.shape[0], 2))):
                tensors[f"{key}.lora_{end}.weight"] = torch.randn(shape, generator=generator)
    save_file(tensors, tmp_path / "both.safetensors")
    lora.load_lora(denoiser.pipe, tmp_path / "both.safetensors")
    denoiser._embeddings.clear()
    after = denoiser.encode(PROMPTS).cond
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, after))
    assert (predict(denoiser) - expected).abs().max() > 1e-5
    with pytest.raises(ValueError, match="changes text encoders too"):
        fresh(name).trainable(2, 8, "all", start_from=tmp_path / "both.safetensors")


# Errors: one line, and nothing half done


def damage(kind, folder):
    "Write a file that is no LoRA for this model"
    tensors, file = load_file(folder / DIFFUSERS), folder / "bad.safetensors"
    comfy = load_file(folder / COMFY)
    key = min(tensors)
    name = min(comfy).partition(".")[0]
    if kind == "cut":
        file.write_bytes((folder / DIFFUSERS).read_bytes()[:-100])
        return file
    changed = dict(
        empty={},
        half={k: v for k, v in tensors.items() if k != key},
        other={k.replace("unet.", "transformer."): v for k, v in tensors.items()},
        wide={k: torch.ones(2, 999) if "lora_A" in k else v for k, v in tensors.items()},
        extra=tensors | {"unet.no.such.lora_A.weight": torch.ones(2, 2)},
        weights={"unet.conv_in.weight": torch.ones(2)},
        dora=tensors | {key.replace(".lora_A.weight", ".lora_magnitude_vector"): torch.ones(2)},
        loha={f"{name}.hada_w1_a": torch.ones(2, 2), f"{name}.alpha": torch.tensor(1.0)},
        kohya_half={k: v for k, v in comfy.items() if k != f"{name}.lora_up.weight"},
        kohya_other={k.replace("down_blocks", "double_blocks"): v for k, v in comfy.items()},
        mixed=tensors | comfy,
    )
    save_file(changed[kind], file)
    return file


@pytest.mark.parametrize(
    "kind, message",
    [
        ("cut", "is damaged: .*"),
        ("empty", "is empty"),
        ("half", "is damaged: .* lack one of two matrices"),
        ("other", "does not fit this model: .*not in this model.*expected layers such as"),
        ("wide", r"does not fit this model: .*\(999 to \d+ numbers, here \d+ to"),
        ("extra", r"does not fit|is damaged: no.such lack"),
        ("weights", "expected keys that end in lora_A.weight"),
        ("dora", "expected keys that end in lora_A.weight"),
        ("loha", "is not a plain LoRA: .*hada_w1_a"),
        ("kohya_half", "is not a plain LoRA: .*found lora_unet_"),
        ("kohya_other", "does not fit this model|is not for a Stable Diffusion"),
        ("mixed", "expected keys that end in"),
    ],
)
def test_files_that_fit_nothing_say_so_in_one_line(tiny, tmp_path, kind, message):
    trained(sd.StableDiffusion(sd.load_pipeline("tiny"), W), tmp_path, targets="attention")
    before, file = predict(tiny), damage(kind, tmp_path)
    for load in (
        lambda: lora.load_lora(tiny.pipe, file),
        lambda: tiny.trainable(2, start_from=file),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)
    assert lora.adapters(tiny.pipe.unet) == [] and torch.equal(predict(tiny), before)


def test_a_load_that_skips_a_tensor_is_noticed(tiny, tmp_path, monkeypatch):
    trained(sd.StableDiffusion(sd.load_pipeline("tiny"), W), tmp_path)
    load = type(tiny.pipe).load_lora_into_unet

    def forget(state, **options):
        key = "unet.mid_block.resnets.0.conv1.lora_B.weight"
        return load(state | {key: torch.zeros_like(state[key])}, **options)

    def skip(state, **options):
        pass

    for broken in (skip, forget):
        pipe = sd.load_pipeline("tiny")
        monkeypatch.setattr(type(pipe), "load_lora_into_unet", staticmethod(broken))
        with pytest.raises(ValueError, match="was not loaded as the file has it"):
            lora.load_lora(pipe, tmp_path)


def test_folders_say_what_they_hold_instead(tiny, tmp_path):
    cases = {
        "nowhere": "expected pytorch_lora_weights.safetensors there",
        "run": "its run has not ended: finish it with --resume_from",
        "whole": "it holds a whole model: give '.*whole/pipeline' as the model",
        "lora.pt": "expected a .safetensors file: a pickle is not opened",
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "whole" / "pipeline").mkdir(parents=True)
    (tmp_path / "whole" / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "lora.pt").write_bytes(b"pickled")
    for name, message in cases.items():
        with pytest.raises(ValueError, match=f"no LoRA in .*{name}.*: {message}"):
            lora.load_lora(tiny.pipe, tmp_path / name)


def test_places_where_a_lora_is_found(tmp_path):
    for place in ("run", "old/lora", "peft", "single"):
        (tmp_path / place).mkdir(parents=True)
    files = {
        "run": f"run/{DIFFUSERS}",
        "old": f"old/lora/{DIFFUSERS}",
        "peft": "peft/adapter_model.safetensors",
        "single": "single/mine.safetensors",
    }
    for place, file in files.items():
        (tmp_path / file).touch()
        assert lora.find_lora(tmp_path / place) == lora.find_lora(tmp_path / file)
    (tmp_path / "run" / COMFY).touch()
    (tmp_path / "single" / "another.safetensors").touch()
    assert lora.find_lora(str(tmp_path / "run")).name == DIFFUSERS
    with pytest.raises(ValueError, match="the path of a .safetensors file"):
        lora.find_lora(tmp_path / "single")


# Save


def test_who_may_read_the_folder_may_read_the_loras_files(fresh, tmp_path):
    denoiser = fresh("sd15")
    sd.add_lora(denoiser)
    tmp_path.chmod(0o755)
    sd.save_lora(denoiser, tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {DIFFUSERS: 0o644, COMFY: 0o644}


def test_adapters_of_other_names_are_saved_and_several_are_refused(tiny, tmp_path):
    "As those that load_lora_weights adds, before a trainer sees the model"
    expected = trained(tiny, tmp_path)
    again = sd.StableDiffusion(sd.load_pipeline("tiny"), W)
    again.pipe.load_lora_weights(str(tmp_path), adapter_name="styled")
    lora.save_lora(again, tmp_path / "again")
    other = sd.StableDiffusion(sd.load_pipeline("tiny"), W)
    lora.load_lora(other.pipe, tmp_path / "again")
    torch.testing.assert_close(predict(other), expected, atol=1e-6, rtol=1e-6)
    lora.load_lora(other.pipe, tmp_path)
    with pytest.raises(ValueError, match=r"has 2 LoRAs \(default_0, default_1\), and one file"):
        lora.save_lora(other, tmp_path / "third")


def test_what_is_written_says_alpha_in_a_fixed_order_and_leaves_nothing_half(tiny, tmp_path):
    trained(tiny, tmp_path, rank=2, alpha=5)
    assert sorted(file.name for file in tmp_path.iterdir()) == [COMFY, DIFFUSERS]
    with safe_open(tmp_path / DIFFUSERS, "pt") as f:
        config = json.loads(f.metadata()["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (2, 5)
    assert config["unet.target_modules"] == sorted(lora.LORA_TARGETS["all"])
    alphas = {v.item() for k, v in load_file(tmp_path / COMFY).items() if k.endswith("alpha")}
    assert alphas == {5.0}


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_an_alpha_without_effect_is_refused(tiny, alpha):
    with pytest.raises(ValueError, match="LoRA alpha must be above 0, given"):
        tiny.trainable(2, alpha)
    assert lora.adapters(tiny.pipe.unet) == []


def test_a_model_that_has_a_lora_is_not_trained_as_if_it_had_none(tiny, tmp_path):
    trained(sd.StableDiffusion(sd.load_pipeline("tiny"), W), tmp_path)
    lora.load_lora(tiny.pipe, tmp_path)
    before = predict(tiny)
    for rank in (2, None):
        with pytest.raises(ValueError, match=r"pipe.fuse_lora\(\) and then pipe.unload_lora"):
            tiny.trainable(rank)
    # and the advice works
    tiny.pipe.fuse_lora()
    tiny.pipe.unload_lora_weights()
    tiny.trainable(2)
    torch.testing.assert_close(predict(tiny), before, atol=1e-4, rtol=1e-4)


# Going on


@pytest.mark.parametrize("file", [DIFFUSERS, COMFY, ""])
@pytest.mark.parametrize("name, targets", [("sd21", "attention"), ("sdxl", "all")])
def test_training_goes_on_from_a_lora(fresh, tmp_path, name, targets, file):
    first = fresh(name)
    expected = trained(first, tmp_path, 2, 8, targets)
    onward = fresh(name)
    before = predict(onward)
    params = onward.trainable(2, 8, targets, seed=7, start_from=tmp_path / file)
    assert torch.equal(predict(onward), expected)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in params)
    old = [p for p in first.pipe.unet.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(params, old, strict=True))
    with onward.reference():
        assert torch.equal(predict(onward), before)


@pytest.mark.parametrize(
    "given, options",
    [
        (dict(lora_rank=4, lora_alpha=8), "--lora_rank 2 --lora_alpha 8 --lora_targets attention"),
        (dict(lora_rank=2), "--lora_rank 2 --lora_alpha 8 --lora_targets attention"),
        (dict(lora_rank=2, lora_alpha=8, lora_targets="all"), "--lora_targets attention"),
    ],
)
def test_settings_that_disagree_with_the_lora_are_told_those_that_agree(
    tiny, tmp_path, given, options
):
    trained(sd.StableDiffusion(sd.load_pipeline("tiny"), W), tmp_path, 2, 8, "attention")
    with pytest.raises(ValueError, match="the settings say .*: start from it with ") as caught:
        tiny.trainable(**given, start_from=tmp_path)
    assert str(caught.value).endswith(options) and lora.adapters(tiny.pipe.unet) == []


def test_a_lora_that_no_settings_describe(tiny, tmp_path):
    trained(sd.StableDiffusion(sd.load_pipeline("tiny"), W), tmp_path, 2, 2, ["to_q", "net.2"])
    with pytest.raises(ValueError, match="which no settings describe"):
        tiny.trainable(2, start_from=tmp_path)
    tiny.trainable(2, lora_targets=["net.2", "to_q"], start_from=tmp_path)


@pytest.mark.parametrize("reference", ["before", "after"])
@pytest.mark.parametrize("source", ["run", "pipeline", "lora"])
def test_a_whole_network_goes_on_from_a_model_or_from_a_fused_lora(
    fresh, tmp_path, source, reference
):
    "The reference of a KL penalty stays the base model, whenever it is kept"
    first, onward = fresh("sdxl"), fresh("sdxl")
    before = predict(onward)
    if source == "lora":
        expected, place = trained(first, tmp_path), tmp_path
    else:
        shake(first.trainable(), by=0.01)
        first.save(tmp_path)
        expected, place = predict(first), tmp_path / ("" if source == "run" else "pipeline")
    if reference == "before":
        onward.keep_reference()
    params = onward.trainable(start_from=place)
    if reference == "after":
        onward.keep_reference()
    torch.testing.assert_close(predict(onward), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-3
    with onward.reference():
        assert torch.equal(predict(onward), before)
    assert len(params) == len(list(onward.pipe.unet.parameters()))
    assert onward._first is None and not lora.adapters(onward.pipe.unet)


def test_models_of_another_shape_and_of_another_kind_are_no_start(fresh, folders):
    before = predict(denoiser := fresh("sd15"))
    with pytest.raises(ValueError, match=r"does not fit this model: \d+ weights differ, such as"):
        denoiser.trainable(start_from=folders("sdxl"))
    assert torch.equal(predict(denoiser), before)
    with pytest.raises(ValueError, match="holds a whole model, and a LoRA is to be trained: give"):
        denoiser.trainable(2, start_from=folders("sd15"))


def test_a_number_that_a_deleted_lora_left_is_not_given_twice(tiny, tmp_path):
    trained(tiny, tmp_path)
    pipe = sd.load_pipeline()
    lora.load_lora(pipe, tmp_path)
    lora.load_lora(pipe, tmp_path)
    pipe.delete_adapters("default_0")
    lora.load_lora(pipe, tmp_path)
    assert lora.adapters(pipe.unet) == ["default_1", "default_2"]


def test_a_reference_in_a_reference_does_not_end_it(tiny, tmp_path):
    before = predict(tiny)
    trained(tiny, tmp_path)
    with tiny.reference():
        with tiny.reference():
            pass
        assert torch.equal(predict(tiny), before)
    assert not torch.equal(predict(tiny), before)
