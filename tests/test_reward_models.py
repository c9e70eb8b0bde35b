"What would bore a reader of 04: preprocessing against PIL, the true architectures with random weights, loading and moving, every error."
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
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ddpo_scratch
from ddpo_scratch import reward_models as rm
from ddpo_scratch.reward_models import (AestheticScore, CLIPReward, CLIPScore, HPSv2, LLaVA, LLaVABERTScore, LLaVAQuestions, PickScore,
                                        aesthetic_head, llava_server, resize_pixels)
from ddpo_scratch.rewards import compute_rewards, get_reward

TOKENIZER = Path(ddpo_scratch.__file__).parent / "tiny_model" / "tokenizer"
QUESTION = "Answer concisely: what is going on in this image?"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
needs_bert = pytest.mark.skipif(importlib.util.find_spec("bert_score") is None, reason="bert-score is not installed: pip install 'ddpo_scratch[llava]'")


@pytest.fixture(autouse=True)
def threads():
    "As many threads as asked for."
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def big():
    "A test of a model of gigabytes leaves nothing in memory."
    yield
    gc.collect()


def pictures(b=3, h=40, w=40, seed=0):
    "Smooth colours with sharp edges and some noise: what resizing differs on."
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(b, 3, 5, 5, generator=g), (h, w), mode="bilinear")
    edges = F.interpolate((torch.rand(b, 3, 4, 4, generator=g) > .5).float(), (h, w))
    images = (.4*smooth + .4*edges + .2*torch.rand(b, 3, h, w, generator=g)).clamp(0, 1)
    return (images*255).round() / 255


def args(images, prompt="a fox"): return images, [prompt]*len(images), [{}]*len(images)


def pil(image): return Image.fromarray((image.permute(1, 2, 0).numpy()*255).round().astype("uint8"))


# ---------------------------------------------------------------- small random models in folders

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from open_clip.model import CLIP, set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_for_hf
    from open_clip.tokenizer import HFTokenizer
    folder, tokenizer = tmp_path_factory.mktemp("clip"), HFTokenizer(str(TOKENIZER), context_length=16)
    text = dict(context_length=16, vocab_size=len(tokenizer.tokenizer), width=32, heads=2, layers=2, hf_tokenizer_name="tokenizer of this folder")
    config = dict(embed_dim=24, vision_cfg=dict(image_size=48, layers=2, width=32, head_width=16, patch_size=8), text_cfg=text)
    torch.manual_seed(0)
    net = CLIP(**config)
    set_model_preprocess_cfg(net, dict(size=48, mean=MEAN, std=STD, interpolation="bicubic", resize_mode="shortest"))
    save_for_hf(net, tokenizer, config, folder, safe_serialization=True)
    return f"local-dir:{folder}", net.eval()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    torch.manual_seed(0)
    torch.save((net := aesthetic_head(24)).state_dict(), path := tmp_path_factory.mktemp("head") / "head.pth")
    return path, net.eval()


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    folder, tokenizer = str(tmp_path_factory.mktemp("pick")), CLIPTokenizer.from_pretrained(TOKENIZER)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48), tokenizer).save_pretrained(folder)
    common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu")
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=dict(common, vocab_size=len(tokenizer), max_position_embeddings=16, **ends), projection_dim=24,
                         vision_config=dict(common, image_size=48, patch_size=8), logit_scale_init_value=4.6)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hps(tmp_path_factory, clip):
    import open_clip
    folder = tmp_path_factory.mktemp("hps")
    config = json.loads((Path(clip[0].removeprefix("local-dir:")) / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"] = config["text_cfg"] | dict(hf_tokenizer_name="", vocab_size=49408)
    (folder / "small-H.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.CLIP(**config).state_dict()}, folder / "HPS.pt")
    return dict(checkpoint=str(folder / "HPS.pt"), model="small-H")


@pytest.fixture
def small(request, clip, head, pick, hps):
    "A function (name, **options) -> a small reward of that class."
    return lambda name, **kw: {"clip_score": lambda: CLIPScore(clip[0], **kw), "aesthetic": lambda: AestheticScore(head[0], clip[0], **kw),
                               "pickscore": lambda: PickScore(pick, pick, **kw), "hpsv2": lambda: HPSv2(**hps, **kw)}[name]()


SMALL = ["clip_score", "aesthetic", "pickscore", "hpsv2"]


# ---------------------------------------------------------------- preprocessing

@pytest.mark.parametrize("h, w", [(40, 40), (64, 40), (33, 70), (224, 224), (300, 260), (7, 9)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_tensor_resize_is_pils_but_for_rounding(h, w, mode, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    cfg = PreprocessCfg(size=48, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=mode)
    images = pictures(2, h, w)
    want = torch.stack([image_transform_v2(cfg, is_train=False)(pil(im)) for im in images])
    d = (resize_pixels(images, 48, mode, interpolation) - want).abs() * 255
    assert d.max() < 1.6 and d.mean() < .5, (d.max(), d.mean())


@pytest.mark.parametrize("h, w", [(40, 40), (64, 40), (33, 70)])
def test_resize_by_hand(h, w):
    "Resize the shorter side, crop the middle: with PIL alone."
    im = pictures(1, h, w)
    big = pil(im[0]).resize((int(48*w/min(h, w)), int(48*h/min(h, w))), Image.BICUBIC)
    x, y = round((big.width - 48)/2), round((big.height - 48)/2)
    want = torch.from_numpy(np.asarray(big.crop((x, y, x + 48, y + 48))).copy()).permute(2, 0, 1) / 255
    assert (resize_pixels(im, 48)[0] - want).abs().max()*255 < 1.6


def test_resize_keeps_the_gradient_of_white():
    white = torch.ones(1, 3, 40, 40, requires_grad=True)
    resize_pixels(white, 48).sum().backward()
    torch.testing.assert_close(white.grad.sum(), torch.tensor(3*48*48.), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["clip_score", "aesthetic", "pickscore"])
@pytest.mark.parametrize("h, w", [(64, 64), (33, 70)])
def test_both_ways_in_differ_little(small, name, h, w):
    images = pictures(2, h, w)
    a, b = (small(name, preprocess=p) for p in ("tensor", "published"))
    d = (a.pixels(images) - b.pixels(images)) * torch.tensor(a.config["std"])[:, None, None] * 255
    assert d.abs().max() < 1.6
    assert (a.embed_images(images) * b.embed_images(images)).sum(1).min() > 1 - 1e-4


def test_pickscore_prepares_as_its_processor(pick):
    from transformers import AutoProcessor
    images = pictures(2, 64, 64)
    want = AutoProcessor.from_pretrained(pick).image_processor(images=[pil(im) for im in images], return_tensors="pt")["pixel_values"]
    for preprocess in ("published", "tensor"):
        d = (PickScore(pick, pick, preprocess).pixels(images) - want) * torch.tensor(STD)[:, None, None] * 255
        assert d.abs().max() < 2.1, preprocess  # the processor resizes bytes with torchvision, which rounds by itself


@pytest.mark.parametrize("h, w", [(64, 64), (64, 40), (33, 70)])
def test_hps_prepares_as_its_code(small, h, w):
    "To a tensor first, then the longer side by torchvision, no clamp, black around."
    from torchvision.transforms import functional as TF
    im = pictures(1, h, w)
    scale = 48 / max(h, w)
    new = [round(d*scale) for d in (h, w)]
    x = TF.resize(TF.to_tensor(pil(im[0])), new, TF.InterpolationMode.BICUBIC, antialias=True)
    ph, pw = 48 - new[0], 48 - new[1]
    want = TF.normalize(TF.pad(x, [pw//2, ph//2, pw - pw//2, ph - ph//2]), MEAN, STD)
    for preprocess in ("published", "tensor"): torch.testing.assert_close(small("hpsv2", preprocess=preprocess).pixels(im)[0], want, atol=1e-5, rtol=0)


def test_published_has_no_gradient_and_says_so(small):
    x = pictures().requires_grad_()
    for name in SMALL:
        reward = small(name, preprocess="published")
        assert not reward.differentiable and not reward(*args(x))[0].requires_grad
    with pytest.raises(ValueError, match="needs 'tensor' or 'published'"): CLIPScore(preprocess="pil")
    for make in (CLIPScore, LLaVA):
        with pytest.raises(ValueError, match="dtype='fp16': needs 'float32'"): make(dtype="fp16")


# ---------------------------------------------------------------- what every CLIP reward keeps

@pytest.mark.parametrize("name", SMALL)
def test_contract(small, name):
    reward, images = small(name), pictures(4)
    assert reward.name == name and reward.differentiable and reward.net is None
    rewards, info = compute_rewards(reward, *args(images))
    assert rewards.shape == (4,) and rewards.dtype == torch.float32 and info == {}
    one, _ = compute_rewards(reward, *args(images[:1]))
    torch.testing.assert_close(one, rewards[:1], atol=1e-5 * (100 if name == "pickscore" else 1), rtol=0)  # a batch changes the order of sums
    assert torch.equal(reward(*args(images)), rewards)
    assert not reward.net.training and not any(m.training or any(p.requires_grad for p in m.parameters()) for m in reward.net.modules())
    other = reward(images, ["a blue dog"]*4, [{}]*4)
    assert torch.equal(other, rewards) != reward.uses_prompt and reward.uses_prompt == (name != "aesthetic")


@pytest.mark.parametrize("name", SMALL)
def test_gradient_is_the_slope(small, name):
    "Against finite differences along random directions, in float64."
    reward, x = small(name, dtype="float64"), (.1 + .8*pictures(1)).double().requires_grad_()
    reward.load()
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # the rewards round to float32 on their way
        if name == "aesthetic": reward.net.aesthetic_head.double()
        f = lambda im: reward(im, ["a fox"], [{}]).sum()
        g, = torch.autograd.grad(f(x), x)
        for seed in range(3):
            d = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            slope = (f(x.detach() + 1e-5*d) - f(x.detach() - 1e-5*d)) / 2e-5
            torch.testing.assert_close((g*d).sum(), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_stays_near(small, name):
    a, b = (small(name, dtype=d)(*args(pictures())) for d in ("float32", "bfloat16"))
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=.03 * (100 if name == "pickscore" else 1), rtol=0)


def test_folder_round_trip(clip):
    "What open_clip saved is what runs: the same embeddings, the tokenizer of the folder."
    from open_clip.transform import PreprocessCfg, image_transform_v2
    reward, images = CLIPReward(clip[0], preprocess="published"), pictures(2, 64, 64)
    cfg = PreprocessCfg(size=48, mean=MEAN, std=STD)
    x = torch.stack([image_transform_v2(cfg, is_train=False)(pil(im)) for im in images])
    torch.testing.assert_close(reward.embed_images(images), F.normalize(clip[1].encode_image(x), dim=1))
    from transformers import CLIPTokenizer
    ids = CLIPTokenizer.from_pretrained(TOKENIZER)(["a red fox"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    torch.testing.assert_close(reward.embed_prompts(["a red fox"]), F.normalize(clip[1].encode_text(ids), dim=1).detach())


def test_a_folder_without_weights_is_refused(clip, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((Path(clip[0].removeprefix("local-dir:")) / "open_clip_config.json").read_text())
    with pytest.raises(RuntimeError, match="could not be loaded"): CLIPReward(f"local-dir:{tmp_path}").load()


def test_lazy_movable_picklable(clip):
    reward = CLIPScore(clip[0], w=2.5)
    assert reward.to("meta") is reward and reward.net is None and reward.device.type == "meta"
    assert "not loaded yet" in repr(reward)
    want = reward.to("cpu")(*args(pictures()))
    assert "loaded" in repr(reward) and reward.load().net is reward.net
    again = pickle.loads(pickle.dumps(reward))
    assert again.net is None and torch.equal(again(*args(pictures())), want)
    reward.to("meta")
    assert next(reward.net.parameters()).device.type == "meta"


def test_threads_load_once(clip):
    built, reward = [], CLIPScore(clip[0])
    original = CLIPScore._build
    with mock.patch.object(CLIPScore, "_build", lambda self: built.append(1) or original(self)):
        threads = [threading.Thread(target=reward, args=args(pictures())) for _ in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert len(built) == 1


def test_wrong_activation_and_names():
    for model, tag, want in (("ViT-L-14", "openai", "ViT-L-14-quickgelu"), ("ViT-B-32", "openai", "ViT-B-32-quickgelu")):
        with pytest.raises(ValueError, match=f"wrong activation: use '{want}'"): CLIPScore(model, tag)
    with pytest.raises(ValueError, match="did you mean ViT-L-14"): CLIPScore("ViTL14")
    CLIPScore("ViT-L-14", "laion2b_s32b_b82k"), CLIPScore("ViT-L-14-quickgelu", None), AestheticScore()  # nothing is loaded


def test_clip_score_scales(clip):
    cosine, scaled = (CLIPScore(clip[0], w=w)(*args(pictures(8))) for w in (None, 2.5))
    torch.testing.assert_close(scaled, 2.5*cosine.clamp(min=0))


def test_pickscore_is_the_models_own_logit(pick):
    "transformers' logits_per_image, on its processor's input."
    from transformers import CLIPModel, CLIPProcessor
    reward, images, prompts = PickScore(pick, pick, preprocess="published"), pictures(3, 64, 64), ["a fox", "a blue dog on a wall", "cat"]
    tokens = CLIPProcessor.from_pretrained(pick).tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad(): want = CLIPModel.from_pretrained(pick).eval()(pixel_values=reward.pixels(images), **tokens).logits_per_image.diag()
    torch.testing.assert_close(reward(images, prompts, [{}]*3), want, atol=1e-4, rtol=0)


def test_hps_checkpoint(hps):
    reward = HPSv2(**hps)
    assert reward.load().net.state_dict().keys() == torch.load(hps["checkpoint"], weights_only=True)["state_dict"].keys()
    with pytest.raises(ValueError, match="version 'v3': needs one of v2.0, v2.1"): HPSv2("v3")
    asked = []
    with mock.patch("huggingface_hub.hf_hub_download", lambda *a: asked.append(a) or hps["checkpoint"]): HPSv2("v2.1", model="small-H").load()
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]


# ---------------------------------------------------------------- the aesthetic head

def test_head_has_the_published_shape():
    shapes = {k: tuple(v.shape) for k, v in aesthetic_head().state_dict().items()}
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    assert shapes == {f"layers.{i}.{n}": s if n == "weight" else s[:1] for i, s in widths.items() for n in ("weight", "bias")}


def test_head_from_safetensors_and_what_does_not_fit(clip, head, tmp_path):
    from safetensors.torch import save_file
    save_file(head[1].state_dict(), tmp_path / "head.safetensors")
    want = AestheticScore(head[0], clip[0])(*args(pictures()))
    assert torch.equal(AestheticScore(tmp_path / "head.safetensors", clip[0])(*args(pictures())), want)
    torch.save(aesthetic_head(768).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="the head takes 768 numbers, .* gives 24"): AestheticScore(tmp_path / "wide.pth", clip[0]).load()
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is no aesthetic head"): AestheticScore(tmp_path / "other.pth", clip[0]).load()
    with pytest.raises(FileNotFoundError): AestheticScore(tmp_path / "nothing.pth", clip[0]).load()


def test_trls_name_for_it(clip, head, monkeypatch):
    import huggingface_hub
    from ddpo_scratch.trl import aesthetic_scorer
    images, prompts, metadata = args(pictures())
    want, asked = AestheticScore(head[0], clip[0])(images, prompts, metadata), []
    scores, extras = aesthetic_scorer(str(head[0].parent), head[0].name, model=clip[0])(images, prompts, metadata)
    assert torch.equal(scores, want) and extras == {}
    images.requires_grad_()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: asked.append((repo, file)) or str(head[0]))
    scores, _ = aesthetic_scorer(model=clip[0])(images, prompts, metadata)
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")] and torch.autograd.grad(scores.sum(), images)[0].abs().sum() > 0


def test_a_bad_head_is_named_before_the_network_is_fetched(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is no aesthetic head"): AestheticScore(tmp_path / "other.pth", "local-dir:nowhere").load()


def test_head_runs_no_code(clip, tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"layers.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError): AestheticScore(tmp_path / "evil.pth", clip[0]).load()
    assert not (tmp_path / "ran").exists()


def test_download_compares_the_checksum(tmp_path, monkeypatch):
    "From a file, as urllib reads one: kept once, refused when it is another or was changed."
    published = tmp_path / "published.pth"
    torch.save(aesthetic_head().state_dict(), published)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(rm._HEAD, "url", published.as_uri())
    with pytest.raises(RuntimeError, match="invalid hash"): rm._published_head()
    assert not list((tmp_path / "hub").rglob("*.pth"))
    monkeypatch.setitem(rm._HEAD, "sha256", hashlib.sha256(published.read_bytes()).hexdigest())
    path = rm._published_head()
    published.unlink()
    assert rm._published_head() == path and path.is_relative_to(tmp_path / "hub")  # no second download
    path.write_bytes(b"cut short")
    with pytest.raises(ValueError, match="delete the file"): rm._published_head()


@pytest.mark.skipif("DDPO_AESTHETIC_HEAD" not in os.environ, reason="DDPO_AESTHETIC_HEAD does not name the published head's file")
def test_published_head():
    path = Path(os.environ["DDPO_AESTHETIC_HEAD"])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == rm._HEAD["sha256"]
    net = rm._read_head(path).eval()
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {k: tuple(v.shape) for k, v in aesthetic_head().state_dict().items()}
    e = F.normalize(torch.linspace(-1, 1, 2*768).view(2, 768).sin(), dim=1)
    torch.testing.assert_close(net(e)[:, 0], torch.tensor([5.0844, 4.4144]), atol=1e-4, rtol=0)
    zero = torch.zeros(1, 768, requires_grad=True)
    w, = torch.autograd.grad(net(zero).sum(), zero)
    assert abs(net(zero).item() - 5.2366) < 1e-3 and abs(w.norm().item() - 17.9956) < 1e-3  # scores lie in 5.24 -+ 18.00


# ---------------------------------------------------------------- the true architectures, with random weights

@contextlib.contextmanager
def no_init():
    "torch.nn.init does nothing: a billion normal numbers take a minute."
    with contextlib.ExitStack() as stack:
        for n in dir(torch.nn.init):
            if n.endswith("_") and not n.startswith("_"): stack.enter_context(mock.patch.object(torch.nn.init, n, lambda t, *a, **k: t))
        yield


@torch.no_grad()
def fill(net):
    "Random weights quickly: one block of numbers again and again, scaled by fan-in; layer norms as new."
    block = torch.rand(1_000_003, generator=torch.Generator().manual_seed(0))*2 - 1
    for name, p in net.named_parameters():
        if p.ndim >= 2:
            flat, scale = p.view(-1), (3/p[0].numel())**.5
            for i in range(0, len(flat), len(block)): flat[i:i + len(block)] = block[:len(flat) - i] * scale
        elif p.ndim == 1: p.fill_(float(name.endswith("weight")))
    return net


def at_true_size(reward, gain=1):
    "Two 96-pixel pictures at the network's full resolution: shape; the first alone scores the same and has a gradient."
    x, prompts = pictures(2, 96, 96), ["a fox", "a lion on a hill"]
    rewards, _ = compute_rewards(reward, x, prompts, [{}]*2)
    assert rewards.shape == (2,) and rewards.dtype == torch.float32 and reward.config["size"] in (224, (224, 224)) and rewards[0] != rewards[1]
    one = x[:1].clone().requires_grad_()
    alone = reward(one, prompts[:1], [{}])
    torch.testing.assert_close(alone.detach(), rewards[:1], atol=2e-5*gain, rtol=0)
    g, = torch.autograd.grad(alone.sum(), one)
    assert g.isfinite().all() and (g.abs().amax((1, 2, 3)) > 0).all()
    assert not reward.net.training and not any(p.requires_grad for p in reward.net.parameters())
    return x[:1], rewards[:1]


def test_aesthetic_at_true_size(big, tmp_path):
    torch.manual_seed(0)
    torch.save(aesthetic_head().state_dict(), tmp_path / "head.pth")
    with no_init(): reward = AestheticScore(tmp_path / "head.pth", pretrained=None).load()
    fill(reward.net)
    assert sum(p.numel() for p in reward.net.parameters()) == 427_616_513 + sum(p.numel() for p in aesthetic_head().parameters())
    assert type(reward.net.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    x, rewards = at_true_size(reward)
    assert torch.equal(reward(x, [""], [{}]), reward(x, ["a fox"], [{}]))
    reward.preprocess = "published"
    torch.testing.assert_close(reward(x, [""], [{}]), rewards, atol=2e-3, rtol=0)


def test_hps_at_true_size(big):
    import open_clip
    create = open_clip.create_model
    with no_init(), mock.patch("open_clip.create_model", lambda name, file, **kw: create(name, None)): reward = HPSv2(checkpoint="given").load()
    fill(reward.net)
    assert len(reward.net.state_dict()) == 686 and sum(p.numel() for p in reward.net.parameters()) == 986_109_441
    at_true_size(reward)


def clip_tokenizer(folder):
    "CLIP's tokenizer as transformers has it, from the word list in open_clip."
    import open_clip
    from transformers import CLIPTokenizer
    simple = open_clip.SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({ends.get(w, w): i for w, i in simple.encoder.items()}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in simple.bpe_ranks))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}))
    return CLIPTokenizer.from_pretrained(folder)


def test_pickscore_at_true_size(big, tmp_path):
    import open_clip
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    tokenizer = clip_tokenizer(tmp_path)
    ids = tokenizer(["A lion on a hill, 4k"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    n = (ids[0] == tokenizer.eos_token_id).nonzero()[0, 0] + 1
    assert len(tokenizer) == 49408 and torch.equal(ids[0, :n], open_clip.get_tokenizer("ViT-H-14")(["A lion on a hill, 4k"])[0, :n])
    config = CLIPConfig(text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"),
                        vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, hidden_act="gelu"),
                        projection_dim=1024, logit_scale_init_value=4.6052)
    with no_init(), mock.patch.object(CLIPModel, "from_pretrained", lambda *a, **k: fill(CLIPModel(config))), \
            mock.patch("transformers.AutoProcessor.from_pretrained", lambda *a: CLIPProcessor(CLIPImageProcessor(), tokenizer)): reward = PickScore().load()
    assert sum(p.numel() for p in reward.net.parameters()) == 986_109_441
    reward.net.logit_scale.data.fill_(4.6052)
    reward.scale = 100.
    at_true_size(reward, gain=100)


# ---------------------------------------------------------------- LLaVA

def words(folder):
    from transformers import BertTokenizer
    known = "the image contains a fox dog two foxes riding washing bike dishes in snow some animal cat user assistant what which colour how many is it".split()
    return BertTokenizer(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known])})


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    folder = str(tmp_path_factory.mktemp("llava"))
    tokenizer = words(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer, patch_size=8, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1).save_pretrained(folder)
    common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=.3)  # so wide that pictures matter
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**common, image_size=32, patch_size=8), text_config=LlamaConfig(**common, vocab_size=len(tokenizer)),
                                              image_token_index=len(tokenizer) - 1)).save_pretrained(folder)
    return folder


def options(folder): return dict(model=folder, dtype="float32", max_new_tokens=6)


QUESTIONS = [["what is it"], ["which animal", "what colour is the fox in the snow"], [], ["how many foxes"]]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_llava_answers_do_not_depend_on_the_batch(llava_folder, batch_size):
    images = pictures(4)
    llava = LLaVA(**options(llava_folder), batch_size=batch_size)
    answers = llava(images, QUESTIONS)
    assert [len(a) for a in answers] == [1, 2, 0, 1] and all(isinstance(a, str) for aa in answers for a in aa)
    assert answers == llava(images, QUESTIONS)  # greedy
    assert len({tuple(llava(im[None], [QUESTIONS[1]])[0]) for im in images}) > 1  # and not the same whatever one sees
    alone = LLaVA(**options(llava_folder), batch_size=1)
    assert [alone(images[i:i + 1], [q])[0] for i, q in enumerate(QUESTIONS)] == answers
    assert not llava.net.training and not any(p.requires_grad for p in llava.net.parameters())


def test_llava_sees_the_picture(llava_folder):
    "Other pixels, other logits: the picture reaches the language model."
    llava = LLaVA(**options(llava_folder)).load()
    out = []
    for im in pictures(2):
        inputs = llava.processor(images=[pil(im)], text=["USER: <image>\nwhat ASSISTANT:"], return_tensors="pt")
        out.append(llava.net(**inputs).logits[0, -1])
    assert (inputs["input_ids"] == llava.net.config.image_token_id).sum() == 16 and not torch.allclose(*out)


def test_llava_wants_a_list_for_each_picture(llava_folder):
    with pytest.raises(ValueError, match="3 pictures and 1 lists of questions"): LLaVA(**options(llava_folder))(pictures(3), [["what"]])


def llama_tokenizer():
    "A tokenizer of LLaVA's class with bytes for words, and its two extra tokens at their places."
    from transformers import LlamaTokenizerFast
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}, "▁": 259, **{c: 260 + i for i, c in enumerate("USERAITN:?abcdefghijklmnopqrstuvwxyz")}}
    vocab = {w: i for i, w in enumerate(dict.fromkeys(vocab))}
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), 32000)}
    tokenizer = LlamaTokenizerFast(vocab=vocab, merges=[])
    for special in ({"additional_special_tokens": ["<image>"]}, {"pad_token": "<pad>"}): tokenizer.add_special_tokens(special)
    return tokenizer


def llava_config(layers=None):
    "llava-1.5-7b-hf's config.json, with fewer layers if wanted."
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=layers or 24, image_size=336, patch_size=14,
                              projection_dim=768, vocab_size=32000)
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, num_hidden_layers=layers or 32)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, pad_token_id=32001, tie_word_embeddings=False,
                       vision_feature_layer=-2, vision_feature_select_strategy="default")


def test_llava_at_its_true_config_with_one_layer(big):
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor
    tokenizer = llama_tokenizer()
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    processor = LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336), tokenizer, patch_size=14,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1)
    with no_init(), mock.patch.object(LlavaForConditionalGeneration, "from_pretrained", lambda *a, **k: fill(LlavaForConditionalGeneration(llava_config(1)))), \
            mock.patch("transformers.AutoProcessor.from_pretrained", lambda *a: processor): llava = LLaVA(dtype="float32", max_new_tokens=3).load()
    inputs = processor(images=[pil(pictures(1)[0])], text=[f"USER: <image>\n{QUESTION} ASSISTANT:"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 336, 336) and (inputs["input_ids"] == 32000).sum() == 576
    images = pictures(2, 96, 96)
    answers = llava(images, [[QUESTION], ["is it a fox?"]])
    assert [len(a) for a in answers] == [1, 1] and all(isinstance(a, str) for a, in answers)
    assert llava(images[:1], [[QUESTION]]) == answers[:1]  # one picture, the same answer


def test_llava_has_every_key_of_the_real_one():
    "On the meta device: the published 7,063,427,072 parameters in 686 tensors."
    from transformers import LlavaForConditionalGeneration
    with torch.device("meta"): net = LlavaForConditionalGeneration(llava_config())
    assert sum(p.numel() for p in net.parameters()) == 7_063_427_072 and len(net.state_dict()) == 686
    names = sorted(k.replace("vision_model.", "").removeprefix("model.").replace("language_model.model.", "language_model.") for k in net.state_dict())
    text = [f"language_model.layers.{i}.{n}.weight" for i in range(32) for n in
            ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))]
    vision = [f"vision_tower.encoder.layers.{i}.{n}.{w}" for i in range(24) for w in ("weight", "bias") for n in
              ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))]
    ends = [f"vision_tower.{n}.{w}" for n in ("pre_layrnorm", "post_layernorm") for w in ("weight", "bias")]
    other = ["vision_tower.embeddings.class_embedding", "vision_tower.embeddings.patch_embedding.weight", "vision_tower.embeddings.position_embedding.weight",
             "language_model.embed_tokens.weight", "language_model.norm.weight", *(f"multi_modal_projector.linear_{i}.{w}" for i in (1, 2) for w in ("weight", "bias"))]
    assert [n for n in names if "lm_head" not in n] == sorted([*text, *vision, *ends, *other]) and sum("lm_head" in n for n in names) == 1


def test_llava_loads_the_names_of_the_published_file(llava_folder, tmp_path):
    "The hub's file says language_model.model... and vision_tower.vision_model...; nothing may be left random."
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(llava_folder, tmp_path / "hub")
    saved = load_file(Path(llava_folder) / "model.safetensors")
    strip = lambda k: k.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    hub = {strip(k).replace("vision_tower.", "vision_tower.vision_model."): v for k, v in saved.items()}
    hub = {("language_model." + k if k.startswith("lm_head") else k): v for k, v in hub.items()}
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight", "vision_tower.vision_model.pre_layrnorm.bias"} <= set(hub)
    save_file(hub, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    a, b = (LLaVA(**options(f)).load().net.state_dict() for f in (llava_folder, str(tmp_path / "hub")))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- the server

@contextlib.contextmanager
def serving(ask):
    with llava_server(ask, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_server_gets_the_very_pixels():
    seen, images = [], pictures(5, 17, 33)
    def ask(ims, questions):
        seen.append(ims)
        return [[q.upper() for q in qs] for qs in questions]
    with serving(ask) as url: answers = rm._Remote(url, batch_size=2)(images, [["a", "b"], ["c"], [], ["d"], ["e"]])
    assert answers == [["A", "B"], ["C"], [], ["D"], ["E"]] and [len(s) for s in seen] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(seen), images, atol=0, rtol=0)


def test_server_and_process_agree(llava_folder):
    llava, images = LLaVA(**options(llava_folder)), pictures(2)
    metadata = [{"questions": ["what is it", "how many"], "answers": ["fox", ""]}]*2
    here = LLaVAQuestions(**options(llava_folder))
    with serving(llava) as url: there = LLaVAQuestions(url=url).to("cpu"); got, info = compute_rewards(there, images, ["a", "b"], metadata)
    want, info_here = compute_rewards(here, images, ["a", "b"], metadata)
    assert torch.equal(got, want) and info == info_here


def test_protocol():
    "What a server in another language would have to read and write."
    with serving(lambda images, questions: [[str(tuple(images.shape))]]) as url:
        with io.BytesIO() as png: Image.new("RGB", (5, 4)).save(png, "PNG"); picture = base64.b64encode(png.getvalue()).decode()
        request = urllib.request.Request(url, json.dumps({"images": [picture], "questions": [["?"]]}).encode())
        with urllib.request.urlopen(request) as reply: assert json.load(reply) == {"answers": [["(1, 3, 4, 5)"]]}


def test_server_errors():
    def fails(images, questions): raise KeyError("no such thing")
    with serving(fails) as url, pytest.raises(RuntimeError, match=r"server at http://127.*answered 500: .*KeyError: 'no such thing'"):
        rm._Remote(url)(pictures(1), [["?"]])
    with mock.patch("time.sleep"), pytest.raises(ConnectionError, match="no answer from a LLaVA server at http://127.0.0.1:9 after 3 tries.*llava_server"):
        rm._Remote("http://127.0.0.1:9", tries=3)(pictures(1), [["?"]])
    with serving(lambda images, questions: [[]]) as url, pytest.raises(RuntimeError, match="answered 1 lists for 2 pictures"):
        rm._Remote(url)(pictures(2), [["?"], ["?"]])


def test_a_server_that_hangs_or_hangs_up_is_asked_again_and_named():
    late = threading.Event()
    with mock.patch("time.sleep") as slept, serving(lambda images, questions: [[late.wait(.5)]]) as url:
        with pytest.raises(ConnectionError, match=f"no answer from a LLaVA server at {url} after 2 tries: .*timed out"): rm._Remote(url, timeout=.05, tries=2)(pictures(1), [["?"]])
        assert slept.call_count == 1
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, then hangs up
        def hang_up():
            for _ in range(2): listener.accept()[0].close()
        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with mock.patch("time.sleep"), pytest.raises(ConnectionError, match=f"no answer from a LLaVA server at {url} after 2 tries: "):
            rm._Remote(url, tries=2)(pictures(1), [["?"]])
        thread.join()


def test_a_server_loads_before_it_listens():
    class Model:
        loaded = False
        def load(self): self.loaded = True
        def __call__(self, images, questions): return [["yes"]]*len(images)
    model = Model()
    with llava_server(model, port=0): assert model.loaded


# ---------------------------------------------------------------- BERTScore and questions

@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    "A small DeBERTa whose tokenizer, like the published one's, states no length."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import DebertaConfig, DebertaModel, DebertaTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    bpe.train_from_iterator(["The image contains a fox", "a cat washing the dishes"]*3,
                            trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model, folder = json.loads(bpe.to_str())["model"], str(tmp_path_factory.mktemp("deberta"))
    tokenizer = DebertaTokenizerFast(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    DebertaModel(DebertaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, relative_attention=True,
                               pos_att_type=["c2p", "p2c"], type_vocab_size=0, position_biased_input=False, max_position_embeddings=64)).save_pretrained(folder)
    return folder


REFERENCES = ["The image contains a fox", "The image contains a cat washing the dishes", "The image contains a fox"]


@needs_bert
def test_bertscore_by_hand(deberta):
    "Precision, recall and F1 from the third layer's embeddings, without the special tokens; silence scores 0."
    from transformers import AutoModel, AutoTokenizer
    answers = ["a fox on a wall", "The image contains a cat washing the dishes", ""]
    p, r, f = rm._BERTScore(deberta, 3)(answers, REFERENCES)
    torch.testing.assert_close(torch.stack([p, r, f])[:, 1:], torch.tensor([[1., 0], [1, 0], [1, 0]]))
    net, tokenizer = AutoModel.from_pretrained(deberta).eval(), AutoTokenizer.from_pretrained(deberta)
    with torch.no_grad():
        a, b = (F.normalize(net(**tokenizer(t, return_tensors="pt"), output_hidden_states=True).hidden_states[3][0, 1:-1], dim=1) for t in (answers[0], REFERENCES[0]))
    cosines = a @ b.T
    precision, recall = cosines.amax(1).mean(), cosines.amax(0).mean()
    torch.testing.assert_close(torch.stack([p[0], r[0], f[0]]), torch.stack([precision, recall, 2*precision*recall/(precision + recall)]), atol=1e-5, rtol=0)


@needs_bert
def test_bertscore_one_sentence_is_as_good_as_many(deberta):
    bert = rm._BERTScore(deberta, 3)
    answers = ["a fox on a wall", "a cat", "the dishes"]
    many = torch.stack(bert(answers, REFERENCES))
    for i in range(3): torch.testing.assert_close(torch.stack(bert(answers[i:i + 1], REFERENCES[i:i + 1])), many[:, i:i + 1], atol=1e-5, rtol=0)
    again = pickle.loads(pickle.dumps(bert))
    assert again.net is None and torch.equal(torch.stack(again(answers, REFERENCES)), many)
    assert all(s.tolist() == [0, 0] for s in bert(["", "  "], REFERENCES[:2]))


@needs_bert
def test_llava_bertscore(llava_folder, deberta):
    reward = LLaVABERTScore(bert=deberta, bert_layers=3, **options(llava_folder))
    images, prompts = pictures(3), ["a fox", "a cat washing the dishes", "a fox"]
    rewards, info = compute_rewards(reward, images, prompts, [{}]*3)
    assert rewards.shape == (3,) and set(info) == {"precision", "f1", "answers"} and len(info["answers"]) == 3
    one, _ = compute_rewards(reward.to("cpu"), images[:1], prompts[:1], [{}])
    torch.testing.assert_close(one, rewards[:1], atol=1e-5, rtol=0)
    asked = []
    reward.ask = lambda images, questions: asked.extend(questions) or [[r] for r in REFERENCES]
    torch.testing.assert_close(compute_rewards(reward, images, prompts, [{}]*3)[0], torch.ones(3))  # LLaVA says the references
    assert asked == [[QUESTION]]*3


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bert_score" else find(name, *a))
    for make in (LLaVABERTScore, lambda: LLaVABERTScore(url="http://127.0.0.1:1")):
        with pytest.raises(ImportError, match=r"pip install 'ddpo_scratch\[llava\]'"): make()
    LLaVAQuestions()  # needs none


def test_extras():
    requires = importlib.metadata.requires("ddpo_scratch")
    extra = lambda name: {r.split(";")[0].strip() for r in requires if f'extra == "{name}"' in r}
    assert any(r.startswith("bert-score") for r in extra("llava")) and any(r.startswith("datasets") for r in extra("pickapic"))
    assert extra("all") == extra("llava") | extra("pickapic") and extra("all") <= extra("dev")


def test_questions_rule():
    exam = LLaVAQuestions()
    said = [["There are TWO of them.", "Foxes."], ["one", "a bat"], ["elephant"]]
    exam.ask = lambda images, questions: said
    metadata = [dict(questions=["?", "?"], answers=a) for a in (["two", "fox"], ["two", "Bat"])] + [dict(questions=["?"], answers=["ant"])]
    rewards, info = compute_rewards(exam, *args(pictures(3))[:2], metadata)
    assert rewards.tolist() == [1, .5, 1] and info["answers"] == said


@pytest.mark.parametrize("m", [{}, {"questions": ["?"]}, {"questions": [], "answers": []}, {"questions": ["?", "?"], "answers": ["a"]}], ids=str)
def test_questions_need_metadata(m):
    with pytest.raises(RuntimeError, match="'llava_vqa' failed on 2 pictures.*metadata of 'a fox' are .*need as many questions as answers"):
        compute_rewards(LLaVAQuestions(), *args(pictures(2))[:2], [m, m])


# ---------------------------------------------------------------- names

@pytest.mark.parametrize("name, kind", [("aesthetic", AestheticScore), ("clip_score", CLIPScore), ("pickscore", PickScore), ("hpsv2", HPSv2),
                                        pytest.param("llava_bertscore", LLaVABERTScore, marks=needs_bert), ("llava_vqa", LLaVAQuestions)])
def test_by_name(name, kind):
    reward = get_reward(name)
    assert type(reward) is kind and reward.name == name


def test_names_with_arguments(clip, head):
    reward = get_reward(f"aesthetic(head={str(head[0])!r}, model={clip[0]!r}) + 0.5*clip_score(model={clip[0]!r}, w=2.5)")
    rewards, info = compute_rewards(reward, *args(pictures()))
    parts = [AestheticScore(head[0], clip[0])(*args(pictures())), CLIPScore(clip[0], w=2.5)(*args(pictures()))]
    torch.testing.assert_close(rewards, parts[0] + .5*parts[1])


def test_import_is_light():
    code = "import sys, ddpo_scratch.reward_models; print(sorted({'PIL', 'torchvision', 'open_clip', 'transformers', 'bert_score', 'safetensors'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
