"What would bore a reader of 27: preprocessing against PIL, true architectures, every error."

import base64
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pickle
import shutil
import socket
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import pytest
import requests
import torch
import torch.nn.functional as F
import transformers
from open_clip.model import set_model_preprocess_cfg
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import functional as TF

import ddpo_scratch
from ddpo_scratch.rewards import frozen
from ddpo_scratch.rewards import models as reward_models
from ddpo_scratch.rewards.base import RewardError, Scorer, compute_rewards, get_reward
from ddpo_scratch.rewards.models import (
    AestheticScore,
    CLIPReward,
    CLIPScore,
    HPSv2,
    LLaVA,
    LLaVABERTScore,
    LLaVAQuestions,
    PickScore,
    aesthetic_head,
    llava_server,
)
from ddpo_scratch.rewards.pixels import read_png

TOKENIZER = Path(ddpo_scratch.__file__).parent / "tiny_model" / "tokenizer"
QUESTION = "Answer concisely: what is going on in this image?"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


@pytest.fixture(autouse=True)
def threads():
    "As many threads as asked for."
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    "The hub, which is asked for nothing here; repositories about which it was asked."
    asked = []
    monkeypatch.setattr(frozen, "_ask_hub", asked.append)
    return asked


@pytest.fixture
def big():
    "A test of a model of gigabytes leaves nothing in memory."
    yield
    gc.collect()


def pictures(b=3, h=40, w=40, seed=0):
    "Smooth colours with sharp edges and some noise: what resizing differs on."
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(b, 3, 5, 5, generator=g), (h, w), mode="bilinear")
    edges = F.interpolate((torch.rand(b, 3, 4, 4, generator=g) > 0.5).float(), (h, w))
    images = (0.4 * smooth + 0.4 * edges + 0.2 * torch.rand(b, 3, h, w, generator=g)).clamp(0, 1)
    return (images * 255).round() / 255


def args(images, prompt="a fox"):
    return images, [prompt] * len(images), [{}] * len(images)


def pil(image):
    return Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype("uint8"))


def n_parameters(network):
    return sum(p.numel() for p in network.parameters())


def is_frozen(network):
    return not any(m.training for m in network.modules()) and not any(
        p.requires_grad for p in network.parameters()
    )


# ---------------------------------------------------------------- small random models in folders


def random_clip(folder, dim):
    "A CLIP of a few thousand parameters in open_clip's format, and the network itself."
    tokenizer = HFTokenizer(str(TOKENIZER), context_length=16)
    text = dict(
        context_length=16,
        vocab_size=len(tokenizer.tokenizer),
        width=32,
        heads=2,
        layers=2,
        hf_tokenizer_name="tokenizer of this folder",
    )
    vision = dict(image_size=48, layers=2, width=32, head_width=16, patch_size=8)
    config = dict(embed_dim=dim, vision_cfg=vision, text_cfg=text)
    torch.manual_seed(0)
    network = open_clip.CLIP(**config)
    pixels = dict(size=48, mean=MEAN, std=STD, interpolation="bicubic", resize_mode="shortest")
    set_model_preprocess_cfg(network, pixels)
    save_for_hf(network, tokenizer, config, folder, safe_serialization=True)
    return f"local-dir:{folder}", network.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return random_clip(tmp_path_factory.mktemp("clip"), dim=24)


@pytest.fixture(scope="module")
def wide_clip(tmp_path_factory):
    "The name of one whose embeddings are as wide as those of the published head."
    return random_clip(tmp_path_factory.mktemp("wide"), dim=768)[0]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    torch.manual_seed(0)
    network = aesthetic_head(24)
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(network.state_dict(), path)
    return path, network.eval()


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("pick"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    common = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
    )
    text = dict(common, vocab_size=len(tokenizer), max_position_embeddings=16)
    for end in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[end] = getattr(tokenizer, end)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config=dict(common, image_size=48, patch_size=8),
        projection_dim=24,
        logit_scale_init_value=4.6,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hps(tmp_path_factory, clip):
    "Options of an HPSv2 with a small checkpoint."
    folder = tmp_path_factory.mktemp("hps")
    saved = Path(clip[0].removeprefix("local-dir:")) / "open_clip_config.json"
    config = json.loads(saved.read_text())["model_cfg"]
    config["text_cfg"] |= dict(hf_tokenizer_name="", vocab_size=49408)
    (folder / "small-H.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.CLIP(**config).state_dict()}, folder / "HPS.pt")
    return dict(checkpoint=str(folder / "HPS.pt"), model="small-H")


@pytest.fixture
def small(clip, head, pick, hps):
    "A function (name, **options) -> a small reward of that class."

    def make(name, **options):
        if name == "clip_score":
            return CLIPScore(clip[0], **options)
        if name == "aesthetic":
            return AestheticScore(head[0], clip[0], **options)
        if name == "pickscore":
            return PickScore(pick, pick, **options)
        return HPSv2(**hps, **options)

    return make


SMALL = ["clip_score", "aesthetic", "pickscore", "hpsv2"]


# ---------------------------------------------------------------- preprocessing


@pytest.fixture(scope="module")
def resizer(clip):
    "A function (mode, interpolation) -> a reward whose pixels are resized to 48, not normalised."

    def make(mode="shortest", interpolation="bicubic"):
        reward = CLIPReward(clip[0]).load()
        reward.config = dict(
            size=48, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=mode
        )
        return reward

    return make


@pytest.mark.parametrize("h, w", [(40, 40), (64, 40), (33, 70), (224, 224), (300, 260), (7, 9)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_tensor_resize_is_pils_but_for_rounding(resizer, h, w, mode, interpolation):
    reward, images = resizer(mode, interpolation), pictures(2, h, w)
    transform = image_transform_v2(PreprocessCfg(**reward.config), is_train=False)
    want = torch.stack([transform(pil(image)) for image in images])
    difference = (reward.pixels(images) - want).abs() * 255
    assert difference.max() < 1.6 and difference.mean() < 0.5


@pytest.mark.parametrize("h, w", [(40, 40), (64, 40), (33, 70)])
def test_resize_by_hand(resizer, h, w):
    "Resize the shorter side, crop the middle: with PIL alone."
    images = pictures(1, h, w)
    new = pil(images[0]).resize((int(48 * w / min(h, w)), int(48 * h / min(h, w))), Image.BICUBIC)
    x, y = round((new.width - 48) / 2), round((new.height - 48) / 2)
    cropped = np.asarray(new.crop((x, y, x + 48, y + 48))).copy()
    want = torch.from_numpy(cropped).permute(2, 0, 1) / 255
    assert (resizer().pixels(images)[0] - want).abs().max() * 255 < 1.6


def test_resize_keeps_the_gradient_of_white(resizer):
    white = torch.ones(1, 3, 40, 40, requires_grad=True)
    resizer().pixels(white).sum().backward()
    torch.testing.assert_close(white.grad.sum(), torch.tensor(3 * 48 * 48.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["clip_score", "aesthetic", "pickscore"])
@pytest.mark.parametrize("h, w", [(64, 64), (33, 70)])
def test_both_ways_in_differ_little(small, name, h, w):
    images = pictures(2, h, w)
    a, b = (small(name, preprocess=p) for p in ("tensor", "published"))
    pixels = a.pixels(images) - b.pixels(images)
    assert (pixels * torch.tensor(a.config["std"])[:, None, None] * 255).abs().max() < 1.6
    assert (a.embed_images(images) * b.embed_images(images)).sum(1).min() > 1 - 1e-4


@pytest.mark.parametrize("preprocess", ["published", "tensor"])
def test_pickscore_prepares_as_its_processor(pick, preprocess):
    images = pictures(2, 64, 64)
    processor = transformers.AutoProcessor.from_pretrained(pick).image_processor
    want = processor(images=[pil(image) for image in images], return_tensors="pt")["pixel_values"]
    difference = PickScore(pick, pick, preprocess).pixels(images) - want
    # the processor resizes bytes with torchvision, which rounds by itself
    assert (difference * torch.tensor(STD)[:, None, None] * 255).abs().max() < 2.1


@pytest.mark.parametrize("h, w", [(64, 64), (64, 40), (33, 70)])
@pytest.mark.parametrize("preprocess", ["published", "tensor"])
def test_hps_prepares_as_its_code(small, h, w, preprocess):
    "To a tensor first, then the longer side by torchvision, no clamp, black around."
    images = pictures(1, h, w)
    new = [round(side * (48 / max(h, w))) for side in (h, w)]
    x = TF.to_tensor(pil(images[0]))
    x = TF.resize(x, new, TF.InterpolationMode.BICUBIC, antialias=True)
    top, left = (48 - new[0]) // 2, (48 - new[1]) // 2
    x = TF.pad(x, [left, top, 48 - new[1] - left, 48 - new[0] - top])
    reward = small("hpsv2", preprocess=preprocess)
    want = TF.normalize(x, MEAN, STD)
    torch.testing.assert_close(reward.pixels(images)[0], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_published_has_no_gradient_and_says_so(small, name):
    reward = small(name, preprocess="published")
    assert not reward.differentiable
    assert not reward(*args(pictures().requires_grad_()))[0].requires_grad


def test_wrong_options():
    with pytest.raises(ValueError, match="needs 'tensor' or 'published'"):
        CLIPScore(preprocess="pil")
    for make in (CLIPScore, LLaVA):
        with pytest.raises(ValueError, match="dtype='fp16': needs 'float32'"):
            make(dtype="fp16")


# ---------------------------------------------------------------- what every CLIP reward keeps


@pytest.mark.parametrize("name", SMALL)
def test_contract(small, name):
    reward, images = small(name), pictures(4)
    assert reward.name == name and reward.differentiable and reward.network is None
    rewards, info = compute_rewards(reward, *args(images))
    assert rewards.shape == (4,) and rewards.dtype == torch.float32 and info == {}
    one, _ = compute_rewards(reward, *args(images[:1]))
    scale = 100 if name == "pickscore" else 1
    # a batch changes the order of sums
    torch.testing.assert_close(one, rewards[:1], atol=1e-5 * scale, rtol=0)
    assert torch.equal(reward(*args(images)), rewards)
    assert is_frozen(reward.network)


@pytest.mark.parametrize("name", SMALL)
def test_uses_prompt_says_the_truth(small, name):
    reward, images = small(name), pictures(4)
    same = torch.equal(reward(*args(images)), reward(*args(images, "a blue dog")))
    assert reward.uses_prompt == (name != "aesthetic") and same != reward.uses_prompt


@pytest.mark.parametrize("name", SMALL)
def test_gradient_is_the_slope(small, name):
    "Against finite differences along random directions, in float64."
    reward, x = small(name, dtype="float64"), (0.1 + 0.8 * pictures(1)).double().requires_grad_()
    reward.load()
    if name == "aesthetic":
        reward.network.aesthetic_head.double()

    def score(image):
        return reward(image, ["a fox"], [{}]).sum()

    # the rewards round to float32 on their way
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        (g,) = torch.autograd.grad(score(x), x)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            d = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            slope = (score(x.detach() + 1e-5 * d) - score(x.detach() - 1e-5 * d)) / 2e-5
            torch.testing.assert_close((g * d).sum(), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_stays_near(small, name):
    a, b = (small(name, dtype=dtype)(*args(pictures())) for dtype in ("float32", "bfloat16"))
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=0.03 * (100 if name == "pickscore" else 1), rtol=0)


def test_folder_round_trip(clip):
    "What open_clip saved is what runs: the same embeddings, the tokenizer of the folder."
    reward, images = CLIPReward(clip[0], preprocess="published"), pictures(2, 64, 64)
    transform = image_transform_v2(PreprocessCfg(size=48, mean=MEAN, std=STD), is_train=False)
    x = torch.stack([transform(pil(image)) for image in images])
    want = F.normalize(clip[1].encode_image(x), dim=1)
    torch.testing.assert_close(reward.embed_images(images), want)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    tokens = tokenizer(["a red fox"], padding="max_length", max_length=16, return_tensors="pt")
    want = F.normalize(clip[1].encode_text(tokens.input_ids), dim=1).detach()
    torch.testing.assert_close(reward.embed_prompts(["a red fox"]), want)


def test_a_folder_without_weights_is_refused(clip, tmp_path):
    shutil.copy(Path(clip[0].removeprefix("local-dir:")) / "open_clip_config.json", tmp_path)
    with pytest.raises(RuntimeError, match="could not be loaded"):
        CLIPReward(f"local-dir:{tmp_path}").load()


def test_lazy_movable_picklable(clip):
    reward = CLIPScore(clip[0], w=2.5)
    assert reward.to("meta") is reward and reward.network is None and reward.device.type == "meta"
    assert "not loaded yet" in repr(reward)
    want = reward.to("cpu")(*args(pictures()))
    assert repr(reward).endswith(", loaded>") and reward.load().network is reward.network
    again = pickle.loads(pickle.dumps(reward))
    assert again.network is None and torch.equal(again(*args(pictures())), want)
    reward.to("meta")
    assert next(reward.network.parameters()).device.type == "meta"


def test_threads_load_once(clip):
    reward = CLIPScore(clip[0])
    with mock.patch("open_clip.create_model", side_effect=open_clip.create_model) as create:
        threads = [threading.Thread(target=reward, args=args(pictures())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert create.call_count == 1


@pytest.mark.parametrize("model", ["ViT-L-14", "ViT-B-32"])
def test_wrong_activation(model):
    with pytest.raises(ValueError, match=f"wrong activation: use '{model}-quickgelu'"):
        CLIPScore(model, "openai")


def test_unknown_architecture():
    with pytest.raises(ValueError, match="did you mean ViT-L-14"):
        CLIPScore("ViTL14")


def test_names_that_fit_load_nothing():
    for reward in (
        CLIPScore("ViT-L-14", "laion2b_s32b_b82k"),
        CLIPScore("ViT-L-14-quickgelu", None),
        AestheticScore(),
    ):
        assert reward.network is None


def test_clip_score_scales(clip):
    cosine, scaled = (CLIPScore(clip[0], w=w)(*args(pictures(8))) for w in (None, 2.5))
    torch.testing.assert_close(scaled, 2.5 * cosine.clamp(min=0))


@torch.no_grad()
def test_pickscore_is_the_models_own_logit(pick):
    "transformers' logits_per_image, on its processor's input."
    images, prompts = pictures(3, 64, 64), ["a fox", "a blue dog on a wall", "cat"]
    reward = PickScore(pick, pick, preprocess="published")
    tokenizer = transformers.CLIPProcessor.from_pretrained(pick).tokenizer
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    network = transformers.CLIPModel.from_pretrained(pick).eval()
    want = network(pixel_values=reward.pixels(images), **tokens).logits_per_image.diag()
    torch.testing.assert_close(reward(images, prompts, [{}] * 3), want, atol=1e-4, rtol=0)


def test_hps_checkpoint(hps):
    keys = torch.load(hps["checkpoint"], weights_only=True)["state_dict"].keys()
    assert HPSv2(**hps).load().network.state_dict().keys() == keys
    with pytest.raises(ValueError, match="version 'v3': needs one of v2.0, v2.1"):
        HPSv2("v3")
    with mock.patch("huggingface_hub.hf_hub_download", return_value=hps["checkpoint"]) as download:
        HPSv2("v2.1", model="small-H").load()
    commit = "697403c78157020a1ae59d23f111aa58ced35b0a"
    file = "HPS_v2.1_compressed.pt"
    download.assert_called_once_with("xswu/HPSv2", file, revision=commit)


# ---------------------------------------------------------------- the aesthetic head


def test_head_has_the_published_shape():
    shapes = {key: tuple(value.shape) for key, value in aesthetic_head().state_dict().items()}
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    want = {f"layers.{i}.weight": shape for i, shape in widths.items()}
    want |= {f"layers.{i}.bias": shape[:1] for i, shape in widths.items()}
    assert shapes == want


def test_head_from_safetensors(clip, head, tmp_path):
    save_file(head[1].state_dict(), tmp_path / "head.safetensors")
    want = AestheticScore(head[0], clip[0])(*args(pictures()))
    scores = AestheticScore(tmp_path / "head.safetensors", clip[0])(*args(pictures()))
    assert torch.equal(scores, want)


def test_a_head_that_does_not_fit(clip, tmp_path):
    torch.save(aesthetic_head(768).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="the head takes 768 numbers, .* gives 24"):
        AestheticScore(tmp_path / "wide.pth", clip[0]).load()
    with pytest.raises(FileNotFoundError):
        AestheticScore(tmp_path / "nothing.pth", clip[0]).load()


def test_a_bad_head_is_named_before_the_network_is_fetched(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not an aesthetic head: it has weight"):
        AestheticScore(tmp_path / "other.pth", "local-dir:nowhere").load()


def test_trls_name_for_it(clip, head, monkeypatch):
    import huggingface_hub

    from ddpo_scratch.trl import aesthetic_scorer

    images, prompts, metadata = args(pictures())
    want = AestheticScore(head[0], clip[0])(images, prompts, metadata)
    scorer = aesthetic_scorer(str(head[0].parent), head[0].name, model=clip[0])
    scores, extras = scorer(images, prompts, metadata)
    assert torch.equal(scores, want) and extras == {}
    download = mock.Mock(return_value=str(head[0]))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    images.requires_grad_()
    scores, _ = aesthetic_scorer(model=clip[0])(images, prompts, metadata)
    download.assert_called_once_with("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    assert torch.autograd.grad(scores.sum(), images)[0].abs().sum() > 0


def test_head_runs_no_code(clip, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"layers.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        AestheticScore(tmp_path / "evil.pth", clip[0]).load()
    assert not (tmp_path / "ran").exists()


def test_download_compares_the_checksum(wide_clip, tmp_path, monkeypatch):
    "From a file, as urllib reads one: kept once, refused when it is another or was changed."
    published, hub = tmp_path / "published.pth", tmp_path / "hub"
    torch.save(aesthetic_head().state_dict(), published)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    monkeypatch.setattr(AestheticScore, "head_url", published.as_uri())
    with pytest.raises(ValueError, match="published.pth: sha256 is .*: try again, or give aesth"):
        AestheticScore(model=wide_clip).load()
    assert not list(hub.rglob("*.pth"))
    checksum = hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setattr(AestheticScore, "head_sha256", checksum)
    want = AestheticScore(model=wide_clip)(*args(pictures()))
    published.unlink()  # a second download would fail
    assert torch.equal(AestheticScore(model=wide_clip)(*args(pictures())), want)
    (path,) = hub.rglob("*.pth")
    path.write_bytes(b"cut short")
    with pytest.raises(ValueError, match="delete the file"):
        AestheticScore(model=wide_clip).load()


@pytest.mark.skipif(
    "DDPO_AESTHETIC_HEAD" not in os.environ,
    reason="DDPO_AESTHETIC_HEAD does not name the published head's file",
)
def test_published_head(wide_clip):
    path = Path(os.environ["DDPO_AESTHETIC_HEAD"])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == AestheticScore.head_sha256
    network = AestheticScore(path, wide_clip).load().network.aesthetic_head
    e = F.normalize(torch.linspace(-1, 1, 2 * 768).view(2, 768).sin(), dim=1)
    want = torch.tensor([5.0844, 4.4144])
    torch.testing.assert_close(network(e)[:, 0], want, atol=1e-4, rtol=0)
    zero = torch.zeros(1, 768, requires_grad=True)
    (w,) = torch.autograd.grad(network(zero).sum(), zero)
    # scores lie in 5.24 -+ 18.00
    assert abs(network(zero).item() - 5.2366) < 1e-3 and abs(w.norm().item() - 17.9956) < 1e-3


@pytest.mark.parametrize(
    "place, message",
    [
        (
            lambda path: None,
            r"cannot be fetched \(.*\): fetch it elsewhere, and put it at",
        ),
        (lambda path: path.symlink_to("nowhere"), "cannot be fetched"),
        (lambda path: path.mkdir(), "is not a file: remove it, or give"),
        (lambda path: path.touch(), "sha256 is .*: delete the file"),
    ],
    ids=["nothing", "a link to nowhere", "a folder", "empty"],
)
def test_a_head_that_cannot_be_had(place, message, wide_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(AestheticScore, "head_url", "file:///nowhere/head.pth")
    (tmp_path / "checkpoints").mkdir()
    place(tmp_path / "checkpoints" / "head.pth")
    with pytest.raises(RewardError, match=f"'aesthetic' cannot be loaded: .*{message}") as e:
        Scorer(AestheticScore(model=wide_clip)).load()
    assert "\n" not in str(e.value)


def test_a_download_is_given_up(wide_clip, tmp_path, monkeypatch):
    "The time-out is urllib's own; that it is asked for, and what follows, is ours."
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with mock.patch("urllib.request.urlopen", side_effect=TimeoutError("timed out")) as urlopen:
        with pytest.raises(ConnectionError, match="timed out.*head='FILE'"):
            AestheticScore(model=wide_clip).load()
    urlopen.assert_called_once_with(AestheticScore.head_url, timeout=30)
    assert not list(tmp_path.rglob("*.pth*"))


# ---------------------------------------------------------------- which files, and none


COMMITS = {
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "llava-hf/llava-1.5-7b-hf": "b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
}
FETCHES = [
    ("pickscore", "transformers.CLIPModel.from_pretrained", "yuvalkirstain/PickScore_v1"),
    ("llava_vqa", "transformers.AutoProcessor.from_pretrained", "llava-hf/llava-1.5-7b-hf"),
]


@pytest.mark.parametrize("name, fetch, repository", FETCHES)
def test_the_hubs_models_are_taken_at_one_commit(name, fetch, repository, hub):
    for text, commit in ((name, COMMITS[repository]), (f"{name}(revision='mine')", "mine")):
        with mock.patch(fetch, side_effect=OSError("We couldn't connect\nto the hub")) as fetched:
            with pytest.raises(RewardError) as e:
                Scorer(text).load()
        fetched.assert_called_once_with(repository, revision=commit)
        message = f"{name}' cannot be loaded: ConnectionError: {repository} cannot be loaded"
        assert message in str(e.value) and "FOLDER" in str(e.value) and "\n" not in str(e.value)
    assert set(hub) == {repository}


def test_the_commit_of_a_processor(pick):
    processor = "transformers.AutoProcessor.from_pretrained"
    with mock.patch(processor, side_effect=OSError) as fetched, pytest.raises(ConnectionError):
        PickScore(pick).load()
    repository = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    fetched.assert_called_once_with(repository, revision=COMMITS[repository])


@pytest.mark.parametrize(
    "reward, repository",
    [
        (CLIPScore(), "timm/vit_large_patch14_clip_224.openai"),
        (CLIPScore("ViT-H-14", "laion2b_s32b_b79k"), "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        (CLIPScore("hf-hub:timm/some-clip", None), "timm/some-clip"),
        (HPSv2(), "xswu/HPSv2"),
        (LLaVABERTScore(), "microsoft/deberta-xlarge-mnli"),
    ],
    ids=["openai", "laion", "hub", "hps", "bert"],
)
def test_without_a_network_one_line_says_what_to_do(reward, repository, monkeypatch):
    def silent(asked):
        assert asked == repository
        raise requests.ConnectionError(mock.Mock(reason="no such host"))

    monkeypatch.setattr(frozen, "_ask_hub", silent)
    message = (
        f"cannot be loaded: ConnectionError: {repository} cannot be loaded .*no such host.*FI?O?LE?"
    )
    with pytest.raises(RewardError, match=message):
        Scorer(reward).load()


def test_the_hub_is_asked_only_for_what_is_not_here(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.undo()  # the fixture above
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "models--mine--here").mkdir()
    with mock.patch("requests.head") as head:
        for repository in ("mine/here", str(tmp_path), tmp_path):
            frozen._ask_hub(repository)
        assert not head.called
        frozen._ask_hub("mine/there")
        head.assert_called_once_with(constants.ENDPOINT, timeout=30)


def test_what_is_loaded_ahead_goes_to_the_device_of_the_pictures(clip):
    reward = Scorer(CLIPScore(clip[0])).load().reward
    assert reward.network is not None and reward.device is None
    reward(*args(pictures()))
    assert reward.device.type == "cpu"
    there = Scorer(CLIPScore(clip[0])).load("meta").reward
    assert there.device.type == "meta" and next(there.network.parameters()).is_meta
    away = Scorer(CLIPScore(clip[0]), offload_device="meta").load("meta")
    assert away.reward.device.type == "cpu"
    total = Scorer(f"clip_score(model={clip[0]!r}) + redness").load().reward
    assert total.parts[0][1].network is not None


# ---------------------------------------------------------------- the true architectures


@contextlib.contextmanager
def no_init():
    "torch.nn.init does nothing: a billion normal numbers take a minute."
    with contextlib.ExitStack() as stack:
        for name in dir(torch.nn.init):
            if name.endswith("_") and not name.startswith("_"):
                keep = mock.patch.object(torch.nn.init, name, lambda tensor, *a, **k: tensor)
                stack.enter_context(keep)
        yield


@torch.no_grad()
def fill(network):
    "Random weights quickly: one block again and again, scaled by fan-in; layer norms as new."
    block = torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, p in network.named_parameters():
        if p.ndim >= 2:
            flat, scale = p.view(-1), (3 / p[0].numel()) ** 0.5
            for i in range(0, len(flat), len(block)):
                flat[i : i + len(block)] = block[: len(flat) - i] * scale
        elif p.ndim == 1:
            p.fill_(float(name.endswith("weight")))
    return network


def test_aesthetic_at_true_size(big, tmp_path):
    "With random weights: the network that is meant, one picture as good as two, a gradient."
    torch.manual_seed(0)
    torch.save(aesthetic_head().state_dict(), tmp_path / "head.pth")
    with no_init():
        reward = AestheticScore(tmp_path / "head.pth", pretrained=None).load()
    fill(reward.network)
    assert n_parameters(reward.network) == 427_616_513 + n_parameters(aesthetic_head())
    gelu = reward.network.visual.transformer.resblocks[0].mlp.gelu
    assert type(gelu).__name__ == "QuickGELU" and reward.config["size"] == (224, 224)
    x = pictures(2, 96, 96)
    rewards, _ = compute_rewards(reward, *args(x))
    assert rewards[0] != rewards[1]
    one = x[:1].clone().requires_grad_()
    alone = reward(*args(one))
    torch.testing.assert_close(alone.detach(), rewards[:1], atol=2e-5, rtol=0)
    (g,) = torch.autograd.grad(alone.sum(), one)
    assert g.isfinite().all() and g.abs().max() > 0
    reward.preprocess = "published"
    torch.testing.assert_close(reward(*args(x[:1])), rewards[:1], atol=2e-3, rtol=0)


def shape_check(reward):
    "Two pictures through a network of the meta device, which has shapes and no numbers."
    x = pictures(2, 96, 96).to("meta")
    assert reward.pixels(x).shape == (2, 3, 224, 224)
    assert reward.embed_images(x).shape == (2, 1024)
    assert reward.embed_prompts(["a fox", "a lion on a hill"]).shape == (2, 1024)
    rewards = reward(*args(x))
    assert rewards.shape == (2,) and rewards.dtype == torch.float32 and is_frozen(reward.network)


def test_hps_at_true_size():
    "On the meta device: the published 986,109,441 parameters in 686 tensors."
    create = open_clip.create_model

    def without_weights(name, file, **options):
        assert file == "given" and options == {"require_pretrained": True}
        return create(name, None, device="meta")

    with torch.device("meta"), mock.patch("open_clip.create_model", without_weights):
        reward = HPSv2(checkpoint="given").load("meta")
    assert n_parameters(reward.network) == 986_109_441
    assert len(reward.network.state_dict()) == 686
    shape_check(reward)


def test_pickscore_at_true_size():
    "On the meta device: the published model's config.json, and as many parameters as HPSv2."
    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    vision = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14)
    config = transformers.CLIPConfig(
        text_config=dict(text, num_attention_heads=16, hidden_act="gelu"),
        vision_config=dict(vision, num_attention_heads=16, hidden_act="gelu"),
        projection_dim=1024,
        attn_implementation="eager",  # the others look at the mask's values, and there are none
    )
    with torch.device("meta"):
        network = transformers.CLIPModel(config)
    network.logit_scale = torch.nn.Parameter(torch.tensor(4.6052))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer)
    with (
        mock.patch("transformers.CLIPModel.from_pretrained", return_value=network),
        mock.patch("transformers.AutoProcessor.from_pretrained", return_value=processor),
    ):
        reward = PickScore().load("meta")
    assert n_parameters(reward.network) == 986_109_441
    torch.testing.assert_close(reward.scale, 100.0, rtol=1e-4, atol=0)
    shape_check(reward)


# ---------------------------------------------------------------- LLaVA


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("llava"))
    known = (
        "the image contains a fox dog snow animal user assistant what which colour how many is it"
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "in", *known.split()]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    common = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,  # so wide that pictures matter
    )
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**common, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**common, vocab_size=len(tokenizer)),
        image_token_index=len(tokenizer) - 1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def options(folder):
    return dict(model=folder, dtype="float32", max_new_tokens=6)


QUESTIONS = [
    ["what is it"],
    ["which animal", "what colour is the fox in the snow"],
    [],
    ["how many foxes"],
]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_llava_answers_do_not_depend_on_the_batch(llava_folder, batch_size):
    images = pictures(4)
    llava = LLaVA(**options(llava_folder), batch_size=batch_size)
    answers = llava(images, QUESTIONS)
    assert [len(texts) for texts in answers] == [1, 2, 0, 1]
    assert all(isinstance(text, str) for text in sum(answers, []))
    assert answers == llava(images, QUESTIONS)  # greedy
    alone = LLaVA(**options(llava_folder), batch_size=1)
    assert [alone(images[i : i + 1], [q])[0] for i, q in enumerate(QUESTIONS)] == answers
    assert is_frozen(llava.network)


def test_llava_does_not_say_the_same_whatever_it_sees(llava_folder):
    answers = LLaVA(**options(llava_folder))(pictures(4), [QUESTIONS[1]] * 4)
    assert len(set(map(tuple, answers))) > 1


def test_llava_sees_the_picture(llava_folder):
    "Other pixels, other logits: the picture reaches the language model."
    llava = LLaVA(**options(llava_folder)).load()
    text = ["USER: <image>\nwhat ASSISTANT:"]
    logits = []
    for image in pictures(2):
        inputs = llava.processor(images=[pil(image)], text=text, return_tensors="pt")
        logits.append(llava.network(**inputs).logits[0, -1])
    assert (inputs["input_ids"] == llava.network.config.image_token_id).sum() == 16
    assert not torch.allclose(*logits)


def test_llava_wants_a_list_for_each_picture(llava_folder):
    with pytest.raises(ValueError, match="3 pictures and 1 lists of questions"):
        LLaVA(**options(llava_folder))(pictures(3), [["what"]])


def llama_tokenizer():
    "A tokenizer of LLaVA's class with bytes for words, and its two extra tokens at their places."
    letters = "USERAITN:?abcdefghijklmnopqrstuvwxyz"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), 32000)}
    tokenizer = transformers.LlamaTokenizerFast(vocab=vocab, merges=[])
    for special in ({"additional_special_tokens": ["<image>"]}, {"pad_token": "<pad>"}):
        tokenizer.add_special_tokens(special)
    return tokenizer


def llava_config(layers=None):
    "llava-1.5-7b-hf's config.json, with fewer layers if wanted."
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=layers or 24,
        image_size=336,
        patch_size=14,
        projection_dim=768,
        vocab_size=32000,
    )
    text = transformers.LlamaConfig(
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        num_hidden_layers=layers or 32,
    )
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        pad_token_id=32001,
        tie_word_embeddings=False,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def test_llava_at_its_true_config_with_one_layer(big):
    tokenizer = llama_tokenizer()
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    llava_class = transformers.LlavaForConditionalGeneration
    with no_init():
        network = fill(llava_class(llava_config(1)))
    with (
        mock.patch.object(llava_class, "from_pretrained", return_value=network),
        mock.patch("transformers.AutoProcessor.from_pretrained", return_value=processor),
    ):
        llava = LLaVA(dtype="float32", max_new_tokens=3).load()
    text = [f"USER: <image>\n{QUESTION} ASSISTANT:"]
    inputs = processor(images=[pil(pictures(1)[0])], text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert (inputs["input_ids"] == 32000).sum() == 576
    images = pictures(2, 96, 96)
    answers = llava(images, [[QUESTION], ["is it a fox?"]])
    assert [len(texts) for texts in answers] == [1, 1]
    assert llava(images[:1], [[QUESTION]]) == answers[:1]  # one picture, the same answer


def published_llava_keys():
    "The names of the hub's weights, but for lm_head, without the prefixes that versions differ in."
    attention = [f"self_attn.{x}_proj" for x in "qkv"]
    language = [*attention, "self_attn.o_proj", *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    language += ["input_layernorm", "post_attention_layernorm"]
    vision = [*attention, "self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"]
    weights = [f"language_model.layers.{i}.{name}" for i in range(32) for name in language]
    weights += [f"vision_tower.embeddings.{x}_embedding" for x in ("patch", "position")]
    weights += ["language_model.embed_tokens", "language_model.norm"]
    both = [f"vision_tower.encoder.layers.{i}.{name}" for i in range(24) for name in vision]
    both += ["vision_tower.pre_layrnorm", "vision_tower.post_layernorm"]
    both += ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"]
    keys = [f"{name}.weight" for name in weights + both] + [f"{name}.bias" for name in both]
    return sorted([*keys, "vision_tower.embeddings.class_embedding"])


def test_llava_has_every_key_of_the_real_one():
    "On the meta device: the published 7,063,427,072 parameters in 686 tensors."
    with torch.device("meta"):
        network = transformers.LlavaForConditionalGeneration(llava_config())
    assert n_parameters(network) == 7_063_427_072 and len(network.state_dict()) == 686
    names = []
    for key in network.state_dict():
        key = key.replace("vision_model.", "").removeprefix("model.")
        names.append(key.replace("language_model.model.", "language_model."))
    assert sorted(name for name in names if "lm_head" not in name) == published_llava_keys()
    assert sum("lm_head" in name for name in names) == 1


def as_on_the_hub(key):
    "The hub's file says language_model.model... and vision_tower.vision_model..."
    key = key.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    key = key.replace("vision_tower.", "vision_tower.vision_model.")
    return "language_model." + key if key.startswith("lm_head") else key


def test_llava_loads_the_names_of_the_published_file(llava_folder, tmp_path):
    "Nothing may be left random."
    hub = tmp_path / "hub"
    shutil.copytree(llava_folder, hub)
    saved = load_file(hub / "model.safetensors")
    renamed = {as_on_the_hub(key): value for key, value in saved.items()}
    assert {
        "language_model.lm_head.weight",
        "language_model.model.norm.weight",
        "vision_tower.vision_model.pre_layrnorm.bias",
    } <= set(renamed)
    save_file(renamed, hub / "model.safetensors", {"format": "pt"})
    a, b = (LLaVA(**options(f)).load().network.state_dict() for f in (llava_folder, str(hub)))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- the server


@contextlib.contextmanager
def serving(llava):
    "The address of a server that runs in a thread of this process."
    with llava_server(llava, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch):
    "The seconds that were slept, in a test that sleeps none."
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def client(url, **options):
    "What a reward asks in place of a LLaVA."
    remote = LLaVAQuestions(url=url).llava
    for name, value in options.items():
        setattr(remote, name, value)
    return remote


def test_server_gets_the_very_pixels():
    received, images = [], pictures(5, 17, 33)

    def shout(batch, questions):
        received.append(batch)
        return [[text.upper() for text in texts] for texts in questions]

    with serving(shout) as url:
        remote = LLaVAQuestions(url=url, batch_size=2).llava
        answers = remote(images, [["a", "b"], ["c"], [], ["d"], ["e"]])
    assert answers == [["A", "B"], ["C"], [], ["D"], ["E"]]
    assert [len(batch) for batch in received] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(received), images, atol=0, rtol=0)


def test_server_and_process_agree(llava_folder):
    metadata = [{"questions": ["what is it", "how many"], "answers": ["fox", ""]}] * 2
    batch = (pictures(2), ["a", "b"], metadata)
    here = LLaVAQuestions(**options(llava_folder))
    with serving(LLaVA(**options(llava_folder))) as url:
        there = LLaVAQuestions(url=url).to("cpu")
        rewards, info = compute_rewards(there, *batch)
    want, want_info = compute_rewards(here, *batch)
    assert torch.equal(rewards, want) and info == want_info


def test_protocol():
    "What a server in another language would have to read and write."
    with io.BytesIO() as png:
        Image.new("RGB", (5, 4)).save(png, "PNG")
        picture = base64.b64encode(png.getvalue()).decode()
    with serving(lambda images, questions: [[str(tuple(images.shape))]]) as url:
        data = json.dumps({"images": [picture], "questions": [["?"]]})
        reply = requests.post(url, data=data, headers={"Content-Type": "application/json"})
    assert reply.status_code == 200 and reply.json() == {"answers": [["(1, 3, 4, 5)"]]}


def test_the_servers_error_is_repeated(pauses):
    def fails(images, questions):
        raise KeyError("no such thing")

    message = r"server at http://127.*answered 500: .*KeyError: 'no such thing'"
    with serving(fails) as url, pytest.raises(RuntimeError, match=message):
        client(url)(pictures(1), [["?"]])
    assert pauses == []  # asked once: the answer would be the same


def test_an_answer_too_few_is_an_error():
    with (
        serving(lambda images, questions: [[]]) as url,
        pytest.raises(RuntimeError, match="answered 1 lists for 2 pictures"),
    ):
        client(url)(pictures(2), [["?"], ["?"]])


def test_no_server_is_waited_for_and_named(pauses):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"  # free again in a moment
    message = f"no answer from a LLaVA server at {url} after 5 tries: .*refused.*; start one with"
    with pytest.raises(ConnectionError, match=message):
        client(url)(pictures(1), [["?"]])
    assert pauses == [1, 2, 4, 8]


def test_a_server_that_loads_is_asked_again(pauses):
    post = requests.post
    with serving(lambda images, questions: [["yes"]]) as url:
        late = [requests.ConnectionError("not yet"), requests.ReadTimeout("not yet")]
        answers = iter([*late, post])

        def reply(*args, **kwargs):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer(*args, **kwargs)

        with mock.patch("requests.post", side_effect=reply):
            assert client(url)(pictures(1), [["?"]]) == [["yes"]]
    assert pauses == [1, 2]


def test_a_server_that_hangs_is_given_up(pauses):
    "The time-out is requests' own; that it is asked for, and what follows, is ours."
    hangs = mock.Mock(side_effect=requests.ReadTimeout("Read timed out."))
    message = "no answer from a LLaVA server at http://x after 2 tries: ReadTimeout: Read timed out"
    with mock.patch("requests.post", hangs), pytest.raises(ConnectionError, match=message):
        client("http://x", timeout=7, tries=2)(pictures(1), [["?"]])
    assert [call.kwargs["timeout"] for call in hangs.call_args_list] == [7, 7] and pauses == [1]


@pytest.mark.parametrize(
    "begun", [b"", b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{"], ids=["at once", "half way"]
)
def test_a_server_that_hangs_up_is_asked_again_and_named(begun, pauses):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up():
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 20)
                    connection.sendall(begun)

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        message = f"no answer from a LLaVA server at {url} after 2 tries: "
        with pytest.raises(ConnectionError, match=message):
            client(url, tries=2)(pictures(1), [["?"]])
        thread.join()
    assert pauses == [1]


# ---------------------------------------------------------------- what the server refuses


def say_yes(images, questions):
    return [["yes"] * len(texts) for texts in questions]


def png(width=4, height=4, mode="RGB"):
    with io.BytesIO() as file:
        Image.new(mode, (width, height)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def request(images=None, questions=None):
    return json.dumps({"images": images or [png()], "questions": questions or [["?"]]}).encode()


def raw(url, text, wait=5):
    "What a server answers to bytes."
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(text)
        reply = b""
        while chunk := connection.recv(1 << 16):
            reply += chunk
    return reply


JSON = "Content-Type: application/json\r\n"
HEADERS = {
    "no length": (JSON, 411),
    "a negative length": (JSON + "Content-Length: -1\r\n", 411),
    "a length that is no number": (JSON + "Content-Length: 1e3\r\n", 411),
    "a length of another script": (JSON + "Content-Length: \u0663\r\n", 411),
    "too long": (JSON + f"Content-Length: {2**26 + 1}\r\n", 413),
    "another type": ("Content-Type: text/plain\r\nContent-Length: 2\r\n", 415),
    "no type": ("Content-Length: 2\r\n", 415),
    "another name for this machine": (JSON + "Content-Length: 2\r\nHost: evil.example\r\n", 403),
    "no JSON": (JSON + "Content-Length: 2\r\n", 400),
}


@pytest.mark.parametrize("headers, status", HEADERS.values(), ids=HEADERS)
def test_requests_that_are_refused(headers, status):
    with serving(say_yes) as url:
        reply = raw(url, f"POST / HTTP/1.0\r\n{headers}\r\n[1".encode())
        assert reply.startswith(f"HTTP/1.0 {status} ".encode()) and b'{"error": "' in reply
        assert client(url)(pictures(1), [["?"]]) == [["yes"]]  # others are served


BODIES = {
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no pictures": b'{"images": [], "questions": []}',
    "a question too many": request(questions=[["?"], ["?"]]),
    "questions that are none": request(questions=[3]),
    "a number for a question": request(questions=[[3]]),
    "no base64": request(images=["?!"]),
    "no PNG": request(images=[base64.b64encode(b"GIF89a").decode()]),
    "a picture too large": request(images=[png(2049, 2048, "1")]),
    "pictures too large together": request([png(2048, 2048, "1")] * 9, [["?"]] * 9),
    "pictures of two sizes": request([png(4, 4), png(4, 5)], [["?"]] * 2),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_are_refused(body):
    with serving(say_yes) as url:
        reply = requests.post(url, data=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]


def test_a_bomb_is_refused_by_its_header():
    "12,000 by 12,000 pixels took five gigabytes."
    bomb = png(12_000, 12_000, "1")
    with mock.patch("PIL.Image.Image.convert", side_effect=AssertionError("decoded")):
        with pytest.raises(ValueError, match="144,000,000 pixels: at most 4,194,304 each"):
            read_png([bomb])


def test_a_silent_client_keeps_nobody_waiting(capsys):
    begun = f"POST / HTTP/1.0\r\n{JSON}Content-Length: 100\r\n\r\n{{".encode()
    with serving(say_yes) as url:
        address = url.removeprefix("http://").split(":")
        silent = [socket.create_connection((address[0], int(address[1]))) for _ in range(4)]
        for connection in silent[:2]:
            connection.sendall(begun)  # half a body; the other two say nothing
        assert client(url, timeout=5, tries=1)(pictures(1), [["?"]]) == [["yes"]]
        for connection in silent:
            connection.close()
    assert capsys.readouterr().err == ""


def test_a_silent_client_is_let_go_and_one_that_leaves_leaves_no_trace(monkeypatch, capfd):
    monkeypatch.setattr(reward_models._Handler, "timeout", 0.2)
    begun = f"POST / HTTP/1.0\r\n{JSON}Content-Length: 100\r\n\r\n{{".encode()
    asked = threading.Event()

    def slow(images, questions):
        asked.set()
        time.sleep(0.3)
        return say_yes(images, questions)

    with serving(slow) as url:
        assert raw(url, begun) == raw(url, b"") == b""  # closed by the server
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            body = request()
            head = f"POST / HTTP/1.0\r\n{JSON}Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert asked.wait(5)
            # a reset, as of a client that was killed
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert client(url, tries=1)(pictures(1), [["?"]]) == [["yes"]]
    assert "Traceback" not in capfd.readouterr().err


def test_clients_are_served_at_the_same_time_and_the_network_asked_by_one():
    inside, most = [], []

    def count(images, questions):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return say_yes(images, questions)

    with serving(count) as url:
        ask = client(url)
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(ask(pictures(1), [["?"]])))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [[["yes"]]] * 4 and most == [1] * 4


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1", "example.org"])
def test_beyond_this_machine_a_token_is_needed(host, monkeypatch):
    monkeypatch.delenv("LLAVA_TOKEN", raising=False)
    with pytest.raises(ValueError, match="needs a token, in the environment variable LLAVA_TOKEN"):
        llava_server(say_yes, port=0, host=host)


@pytest.mark.parametrize("secret", ["secret", "schlüssel €"])
@pytest.mark.parametrize("token, status", [("", 200), ("wrong", 401), ("wröng", 401), (None, 401)])
def test_the_token(token, status, secret, monkeypatch):
    monkeypatch.setenv("LLAVA_TOKEN", secret)
    token = secret if token == "" else token
    with serving(say_yes) as url:
        if token:
            monkeypatch.setenv("LLAVA_TOKEN", token)
        else:
            monkeypatch.delenv("LLAVA_TOKEN")
        if status == 200:
            assert client(url)(pictures(1), [["?"]]) == [["yes"]]
        else:
            with pytest.raises(RuntimeError, match="answered 401: .*set LLAVA_TOKEN"):
                client(url)(pictures(1), [["?"]])


REPLIES = {
    "no JSON": (b"yes", "what is not a list of answers: b'yes'"),
    "no answers": (b'{"a": 1}', "what is not a list of answers"),
    "answers that are no lists": (b'{"answers": [3]}', "what is not a list of answers"),
    "an answer too many": (b'{"answers": [["a", "b"]]}', "answered 2 questions"),
    "too many bytes": (b" " * (2**26 + 1), "answered more than 67,108,864 bytes"),
}


@pytest.mark.parametrize("content, message", REPLIES.values(), ids=REPLIES)
def test_what_a_server_may_not_answer(content, message):
    reply = mock.MagicMock(status_code=200)
    reply.__enter__.return_value = reply
    reply.iter_content.side_effect = lambda size: iter([content])
    with mock.patch("requests.post", return_value=reply) as post:
        with pytest.raises(RuntimeError, match=message):
            client("http://x")(pictures(1), [["?"]])
    assert post.call_args.kwargs["allow_redirects"] is False


def test_a_server_is_looked_for_before_a_run(pauses):
    with serving(say_yes) as url:
        assert Scorer(LLaVAQuestions(url=url)).load().name == "llava_vqa"
    with pytest.raises(RewardError, match="no answer from a LLaVA server at"):
        Scorer(LLaVAQuestions(url=url)).load()
    assert pauses == [1, 2, 4, 8]


def test_a_server_loads_before_it_listens():
    model = mock.Mock()
    with llava_server(model, port=0):
        model.load.assert_called_once_with()


# ---------------------------------------------------------------- BERTScore and questions


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    "A small DeBERTa whose tokenizer, like the published one's, states no length."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["The image contains a fox", "a cat washing the dishes"] * 3, trainer)
    model, folder = json.loads(bpe.to_str())["model"], str(tmp_path_factory.mktemp("deberta"))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = transformers.DebertaTokenizerFast(vocab=model["vocab"], merges=merges)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.DebertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        type_vocab_size=0,
        position_biased_input=False,
        max_position_embeddings=64,
    )
    transformers.DebertaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(deberta):
    "BERTScore as a reward has it, on the third layer."
    return LLaVABERTScore(bert=deberta, bert_layers=3).bert


REFERENCES = [
    "The image contains a fox",
    "The image contains a cat washing the dishes",
    "The image contains a fox",
]


@torch.no_grad()
def test_bertscore_by_hand(bert, deberta):
    "From the third layer's embeddings, without the special tokens; silence scores 0."
    answers = ["a fox on a wall", "The image contains a cat washing the dishes", ""]
    scores = torch.stack(bert(answers, REFERENCES))  # precision, recall, F1
    torch.testing.assert_close(scores[:, 1:], torch.tensor([[1.0, 0], [1, 0], [1, 0]]))
    network = transformers.AutoModel.from_pretrained(deberta).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(deberta)

    def embed(text):
        tokens = tokenizer(text, return_tensors="pt")
        layer = network(**tokens, output_hidden_states=True).hidden_states[3]
        return F.normalize(layer[0, 1:-1], dim=1)

    cosines = embed(answers[0]) @ embed(REFERENCES[0]).T
    precision, recall = cosines.amax(1).mean(), cosines.amax(0).mean()
    f1 = 2 * precision * recall / (precision + recall)
    want = torch.stack([precision, recall, f1])
    torch.testing.assert_close(scores[:, 0], want, atol=1e-5, rtol=0)


def test_bertscore_one_sentence_is_as_good_as_many(bert):
    answers = ["a fox on a wall", "a cat", "the dishes"]
    many = torch.stack(bert(answers, REFERENCES))
    for i in range(3):
        one = torch.stack(bert(answers[i : i + 1], REFERENCES[i : i + 1]))
        torch.testing.assert_close(one, many[:, i : i + 1], atol=1e-5, rtol=0)
    again = pickle.loads(pickle.dumps(bert))
    assert again.network is None and torch.equal(torch.stack(again(answers, REFERENCES)), many)
    assert all(score.tolist() == [0, 0] for score in bert(["", "  "], REFERENCES[:2]))


def test_llava_bertscore(llava_folder, deberta):
    reward = LLaVABERTScore(bert=deberta, bert_layers=3, **options(llava_folder))
    images, prompts = pictures(3), ["a fox", "a cat washing the dishes", "a fox"]
    rewards, info = compute_rewards(reward, images, prompts, [{}] * 3)
    assert rewards.shape == (3,) and set(info) == {"precision", "f1", "answers"}
    assert len(info["answers"]) == 3
    one, _ = compute_rewards(reward.to("cpu"), images[:1], prompts[:1], [{}])
    torch.testing.assert_close(one, rewards[:1], atol=1e-5, rtol=0)


def test_llava_bertscore_of_the_very_references_is_1(deberta):
    reward = LLaVABERTScore(bert=deberta, bert_layers=3)
    reward.llava = mock.Mock(return_value=[[reference] for reference in REFERENCES])
    prompts = [reference.removeprefix("The image contains ") for reference in REFERENCES]
    rewards, _ = compute_rewards(reward, pictures(3), prompts, [{}] * 3)
    torch.testing.assert_close(rewards, torch.ones(3))
    assert reward.llava.call_args.args[1] == [[QUESTION]] * 3


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bert_score" else find(name, *rest),
    )
    for url in (None, "http://127.0.0.1:1"):
        with pytest.raises(ImportError, match=r"pip install 'ddpo_scratch\[llava\]'"):
            LLaVABERTScore(url=url)
    assert LLaVAQuestions().name == "llava_vqa"  # needs none


def test_extras():
    requires = importlib.metadata.requires("ddpo_scratch")

    def extra(name):
        return {r.split(";")[0].strip() for r in requires if f'extra == "{name}"' in r}

    assert any(r.startswith("bert-score") for r in extra("llava"))
    assert any(r.startswith("datasets") for r in extra("pickapic"))
    assert extra("all") == extra("llava") | extra("pickapic") | extra("ocr") and extra(
        "all"
    ) <= extra("dev")


def test_questions_rule():
    exam = LLaVAQuestions()
    answers = [["There are TWO of them.", "Foxes."], ["one", "a bat"], ["elephant"]]
    exam.llava = mock.Mock(return_value=answers)
    metadata = [
        dict(questions=["?", "?"], answers=["two", "fox"]),
        dict(questions=["?", "?"], answers=["two", "Bat"]),
        dict(questions=["?"], answers=["ant"]),
    ]
    rewards, info = compute_rewards(exam, pictures(3), ["a fox"] * 3, metadata)
    assert rewards.tolist() == [1, 0.5, 1] and info["answers"] == answers


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"questions": ["?"]},
        {"questions": [], "answers": []},
        {"questions": ["?", "?"], "answers": ["a"]},
    ],
    ids=str,
)
def test_questions_need_metadata(metadata):
    message = (
        "'llava_vqa' failed on 2 pictures.*metadata of 'a fox' are .*"
        "need as many questions as answers"
    )
    with pytest.raises(RuntimeError, match=message):
        compute_rewards(LLaVAQuestions(), pictures(2), ["a fox"] * 2, [metadata] * 2)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aesthetic", AestheticScore),
        ("clip_score", CLIPScore),
        ("pickscore", PickScore),
        ("hpsv2", HPSv2),
        ("llava_bertscore", LLaVABERTScore),
        ("llava_vqa", LLaVAQuestions),
    ],
)
def test_by_name(name, kind):
    reward = get_reward(name)
    assert type(reward) is kind and reward.name == name


def test_names_with_arguments(clip, head):
    reward = get_reward(
        f"aesthetic(head={str(head[0])!r}, model={clip[0]!r}) "
        f"+ 0.5*clip_score(model={clip[0]!r}, w=2.5)"
    )
    rewards, _ = compute_rewards(reward, *args(pictures()))
    aesthetic = AestheticScore(head[0], clip[0])(*args(pictures()))
    cosine = CLIPScore(clip[0], w=2.5)(*args(pictures()))
    torch.testing.assert_close(rewards, aesthetic + 0.5 * cosine)
