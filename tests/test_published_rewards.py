"ImageReward and HPSv3 against numbers of their own libraries; UnifiedReward against a fake server."

import base64
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import requests
import torch
import transformers
from PIL import Image
from runs import leave_in, numbers, small, trained
from safetensors.torch import save_file

import ddpo_scratch
from ddpo_scratch.rewards import published
from ddpo_scratch.rewards.base import RewardError, Scorer, compute_rewards, get_reward
from ddpo_scratch.rewards.pixels import as_pictures
from ddpo_scratch.rewards.published import HPSv3, ImageReward, UnifiedReward, final_score

TOKENIZER = Path(ddpo_scratch.__file__).parent / "tiny_model" / "tokenizer"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def waves(shapes, size, is_scale):
    "Make weights by a formula, so that another program can make the same."
    made = {}
    for n, name in enumerate(sorted(shapes)):
        shape = torch.Size(shapes[name])
        wave = size * torch.sin(
            torch.arange(shape.numel(), dtype=torch.float64) * 0.7312 + n * 1.37
        )
        made[name] = (1 + 0.3 * wave if is_scale(name) else wave).view(shape).float()
    return made


def pair(weight, *shape):
    return {f"{weight}.weight": shape, f"{weight}.bias": shape[:1]}


# ---------------------------------------------------------------- ImageReward


def blip_shapes(vocabulary=1124, layers=2):
    "List ImageReward's weights under their published names, in small."
    vit, bert, w = "blip.visual_encoder.", "blip.text_encoder.", 128
    shapes = {vit + "cls_token": (1, 1, w), vit + "pos_embed": (1, 5, w)}
    shapes |= {vit + "patch_embed.proj.weight": (w, 3, 16, 16), vit + "patch_embed.proj.bias": (w,)}
    shapes |= pair(vit + "norm", w)
    for i in range(layers):
        block = f"{vit}blocks.{i}."
        shapes |= pair(block + "norm1", w) | pair(block + "norm2", w)
        shapes |= pair(block + "attn.qkv", 3 * w, w) | pair(block + "attn.proj", w, w)
        shapes |= pair(block + "mlp.fc1", 4 * w, w) | pair(block + "mlp.fc2", w, 4 * w)
        layer = f"{bert}encoder.layer.{i}."
        for kind in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                shapes |= pair(f"{layer}{kind}.self.{part}", w, w)
            shapes |= pair(f"{layer}{kind}.output.dense", w, w)
            shapes |= pair(f"{layer}{kind}.output.LayerNorm", w)
        shapes |= pair(layer + "intermediate.dense", 64, w) | pair(layer + "output.dense", w, 64)
        shapes |= pair(layer + "output.LayerNorm", w)
    shapes |= {bert + "embeddings.word_embeddings.weight": (vocabulary, w)}
    shapes |= {bert + "embeddings.position_embeddings.weight": (64, w)}
    shapes |= {bert + "embeddings.position_ids": (1, 64)}
    shapes |= pair(bert + "embeddings.LayerNorm", w)
    widths = {0: (1024, w), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    for i, shape in widths.items():
        shapes |= pair(f"mlp.layers.{i}", *shape)
    return shapes


def blip_weights():
    shapes = blip_shapes()
    return waves(shapes, 0.08, lambda name: name.endswith("weight") and len(shapes[name]) == 1)


def blip_inputs():
    wave = torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.113) * 0.5 + 0.5
    ids = torch.tensor([[2, 7, 9, 100, 3, 0, 0, 0], [2, 55, 800, 3, 0, 0, 0, 0]])
    return wave.view(2, 3, 32, 32).float(), dict(input_ids=ids, attention_mask=(ids != 0).long())


def test_imagereward_gives_the_librarys_numbers():
    "image-reward 1.5 (timm 0.6.13, transformers 4.30.2), score_gard, on the same weights."
    network = published._BLIPReward(published._renamed(blip_weights())).eval()
    images, tokens = blip_inputs()
    images.requires_grad_()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    scores = (network((images - mean) / std, tokens) - ImageReward.mean) / ImageReward.std
    assert scores.tolist() == pytest.approx([-0.2553878426551819, -0.25107571482658386], abs=1e-6)
    scores.sum().backward()
    assert images.grad.abs().sum().item() == pytest.approx(0.13359098136425018, rel=1e-4)
    swapped = {key: value.flip(0) for key, value in tokens.items()}
    other = (network((images - mean) / std, swapped) - ImageReward.mean) / ImageReward.std
    assert other.tolist() == pytest.approx([-0.2509799003601074, -0.2554945647716522], abs=1e-6)


def test_imagereward_refuses_a_checkpoint_that_lacks_weights():
    weights = published._renamed(blip_weights())
    del weights["head.layers.7.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*head.layers.7.bias"):
        published._BLIPReward(weights)
    spare = published._renamed(blip_weights()) | {"vision_proj.weight": torch.zeros(2, 2)}
    assert published._BLIPReward(spare).vision.config.image_size == 32


@pytest.fixture(scope="module")
def blip_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("blip") / "ImageReward.pt"
    torch.save(blip_weights(), file)
    return file


def test_imagereward_reads_the_published_pickle_and_scales(blip_file):
    images = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    args = (images, ["a fox", "an owl on a " + "very " * 60 + "tall tree"], [{}, {}])
    reward = ImageReward(blip_file, TOKENIZER)
    scores, _ = compute_rewards(reward, *args)
    scaled, _ = compute_rewards(ImageReward(blip_file, TOKENIZER, scaled=True), *args)
    torch.testing.assert_close(scaled, (scores + 2) / 4)
    theirs = ImageReward(blip_file, TOKENIZER, preprocess="published")
    assert not theirs.differentiable and reward.differentiable
    torch.testing.assert_close(compute_rewards(theirs, *args)[0], scores, atol=2e-4, rtol=0)


def test_imagereward_says_what_is_missing(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "head", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(RewardError) as e:
        Scorer(ImageReward(tokenizer=TOKENIZER)).load("cpu")
    assert "checkpoint='ImageReward.pt'" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="needs 'tensor' or 'published'"):
        get_reward("imagereward(preprocess='pil')")


def test_imagereward_takes_the_published_file_at_its_commit_and_no_other(blip_file, monkeypatch):
    download = mock.Mock(return_value=str(blip_file))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match="ImageReward.pt: sha256 is .*: delete the file"):
        Scorer(ImageReward(tokenizer=TOKENIZER)).load("cpu")
    where = ("THUDM/ImageReward", "ImageReward.pt")
    download.assert_called_once_with(*where, revision=ImageReward.published_revision)
    # another commit has another file, of which nobody has published a checksum here
    assert ImageReward(tokenizer=TOKENIZER, revision="main").load("cpu").network is not None
    checksum = hashlib.sha256(blip_file.read_bytes()).hexdigest()
    monkeypatch.setattr(ImageReward, "published_sha256", checksum)
    assert ImageReward(tokenizer=TOKENIZER).load("cpu").network is not None


# ---------------------------------------------------------------- HPSv3


def qwen_config(vocabulary=300, patch=4, **ids):
    text = dict(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e6),
        bos_token_id=None,
        eos_token_id=None,
    )
    eyes = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=patch)
    return transformers.Qwen2VLConfig(text_config=text, vision_config=eyes, **ids)


def qwen_weights(vocabulary=300, patch=4):
    "Make HPSv3's weights under their published names, in small."
    eye, w, m = "visual.", 16, 32
    shapes = {eye + "patch_embed.proj.weight": (w, 3, 2, patch, patch)}
    for i in range(2):
        block, layer = f"{eye}blocks.{i}.", f"model.layers.{i}."
        shapes |= pair(block + "norm1", w) | pair(block + "norm2", w)
        shapes |= pair(block + "attn.qkv", 3 * w, w) | pair(block + "attn.proj", w, w)
        shapes |= pair(block + "mlp.fc1", 2 * w, w) | pair(block + "mlp.fc2", w, 2 * w)
        shapes |= pair(layer + "self_attn.q_proj", m, m) | pair(layer + "self_attn.k_proj", 16, m)
        shapes |= pair(layer + "self_attn.v_proj", 16, m)
        shapes |= {layer + "self_attn.o_proj.weight": (m, m)}
        shapes |= {layer + f"mlp.{kind}_proj.weight": (64, m) for kind in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": (m, 64)}
        shapes |= {layer + "input_layernorm.weight": (m,)}
        shapes |= {layer + "post_attention_layernorm.weight": (m,)}
    shapes |= pair(eye + "merger.ln_q", w) | pair(eye + "merger.mlp.0", 64, 64)
    shapes |= pair(eye + "merger.mlp.2", m, 64)
    shapes |= {"model.embed_tokens.weight": (vocabulary, m), "model.norm.weight": (m,)}
    shapes |= {"lm_head.weight": (vocabulary, m)}
    shapes |= pair("rm_head.0", 1024, m) | pair("rm_head.3", 16, 1024) | pair("rm_head.5", 2, 16)

    def is_scale(name):
        return name.endswith("weight") and ("norm" in name.split(".")[-2] or "ln_q" in name)

    return waves(shapes, 0.25, is_scale)


def test_hpsv3_gives_the_librarys_numbers():
    "hpsv3 1.0.0's Qwen2VLRewardModelBT under transformers 4.45.2, on the same weights."
    ids = dict(image_token_id=290, video_token_id=291, vision_start_token_id=292)
    network = published._QwenReward(qwen_config(**ids), qwen_weights(), 299).eval()
    wave = torch.sin(torch.arange(2 * 16 * 96, dtype=torch.float64) * 0.113)
    seen = [292, 290, 290, 290, 290, 293]
    tokens = torch.tensor([[5, 6, *seen, 9, 299, 11], [5, *seen, 9, 8, 299, 0]])
    inputs = dict(
        input_ids=tokens,
        attention_mask=(tokens != 0).long(),
        pixel_values=wave.view(32, 96).float(),
        image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]),
    )
    with torch.no_grad():
        first, second = network(inputs).tolist()
    assert first == pytest.approx([-1.6099027395248413, -2.790757894515991], abs=1e-5)
    assert second == pytest.approx([-1.6110267639160156, -2.7761740684509277], abs=1e-5)
    # with positions by row and column that code gives -1.60787: 1e-5 tells them apart
    assert abs(first[0] + 1.6078732013702393) > 1e-3


CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    "A folder with a small checkpoint, a processor of bytes and a package hpsv3."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spoken = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    spoken.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spoken.decoder = decoders.ByteLevel()
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|end|>"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=spoken, additional_special_tokens=marks, pad_token="<|end|>"
    )
    names = ["image_token_id", "video_token_id", "vision_start_token_id"]
    config = qwen_config(patch=14, **dict(zip(names, tokenizer.convert_tokens_to_ids(marks))))
    config.save_pretrained(folder / "base")
    transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    ).save_pretrained(folder / "base")
    save_file(qwen_weights(patch=14), folder / "HPSv3.safetensors")
    package = folder / "packages" / "hpsv3"
    (package / "dataset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "dataset" / "data_collator_qwen.py").write_text(
        'import nothing_like_this\nINSTRUCTION = """\nRate {text_prompt}.\n"""\n'
        'prompt_with_special_token = "So: <|Reward|> END"\nOTHER = 3 + 4\n'
    )
    return folder


@pytest.fixture
def hpsv3(qwen, monkeypatch):
    monkeypatch.syspath_prepend(qwen / "packages")
    importlib.invalidate_caches()
    yield HPSv3(qwen / "HPSv3.safetensors", qwen / "base", dtype="float32", batch_size=2)
    assert "hpsv3" not in sys.modules  # its texts are read, it is not imported


def test_hpsv3_prepares_pictures_and_texts(hpsv3):
    hpsv3.load("cpu")
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    inputs = hpsv3._inputs(images, ["a {fox}", "an owl"])
    text = hpsv3.processor.tokenizer.decode(inputs["input_ids"][0])
    assert "\nRate a {fox}.\nSo: <|Reward|> END" in text
    # about 448x448 pixels, sides that 28 divides, as wide to high as the picture
    height, width = (14 * side for side in inputs["image_grid_thw"][0, 1:].tolist())
    assert height % 28 == width % 28 == 0 and 0.9 < height * width / 448**2 <= 1.2
    assert 1.7 < width / height < 2.4
    theirs = hpsv3.processor.image_processor(
        images=as_pictures(images)[0].resize((width, height)),
        return_tensors="pt",
    )["pixel_values"]
    assert torch.equal(inputs["pixel_values"][: len(theirs)], theirs)


def test_hpsv3_scores_batches_as_it_scores_alone(hpsv3, qwen):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a fox", "an owl on a very tall tree", "a cat"]
    scores, extras = compute_rewards(hpsv3, images, prompts, [{}] * 3)
    assert extras["deviation"].shape == (3,)
    alone, _ = compute_rewards(hpsv3, images[:1], prompts[:1], [{}])
    torch.testing.assert_close(alone, scores[:1], atol=1e-5, rtol=0)
    hpsv3.scaled = True
    scaled, _ = compute_rewards(hpsv3, images[:1], prompts[:1], [{}])
    torch.testing.assert_close(scaled, alone / 15)


def test_hpsv3_names_the_package_it_needs(monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "hpsv3" else known(name)
    )
    with pytest.raises(ImportError) as e:
        get_reward("hpsv3")
    assert "pip install --no-deps 'hpsv3==1.0.0'" in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------- UnifiedReward


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Alignment is good.\nFinal Score: 4", 4),
        ("Final Score: 3.5", 3.5),
        ("Final Score:4.25 out of 5", 4.25),
        ("**Final Score**: 2/5", 2),
        ("**Final Score:** 5", 5),
        ("final score: 1", 1),
        ("Final Score: 5.9", 5),
        ("Final Score: 0", 0),
        ("Final Score: high", 0),
        ("Score: 4", 0),
        ("", 0),
    ],
)
def test_scores_of_answers(answer, score):
    assert final_score(answer) == score


class Handler(BaseHTTPRequestHandler):
    def answer(self, status, content):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.seen.append((self.path, None, dict(self.headers)))
        self.answer(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, body, dict(self.headers)))
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
            status, content = self.server.script.pop(0) if self.server.script else (200, None)
        time.sleep(self.server.pause)
        with self.server.lock:
            self.server.at_once -= 1
        if content is None:
            question = body["messages"][0]["content"][1]["text"]
            score = question.rpartition("[")[2].partition("]")[0]
            content = {"choices": [{"message": {"content": f"Final Score: {score}"}}]}
        self.answer(status, content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vars(server).update(seen=[], script=[], models=["UnifiedReward-7b-v1.5"], pause=0.0)
    vars(server).update(lock=threading.Lock(), at_once=0, most=0)
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch, request):
    "Wait for no busy server; the handler's own pauses are in another thread's time.sleep."
    if "server" in request.fixturenames:
        slept = []
        real = time.sleep
        monkeypatch.setattr(
            published.time, "sleep", lambda s: slept.append(s) if s >= 1 else real(s)
        )
        return slept


def asked(server, n=1, **options):
    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = [str(1 + i % 5) for i in range(n)]
    return compute_rewards(UnifiedReward(server.url, **options), images, prompts, [{}] * n)


def test_what_is_asked(server, monkeypatch):
    monkeypatch.setenv("UNIFIEDREWARD_TOKEN", "secret")
    scores, extras = asked(server)
    assert scores.tolist() == [1] and extras["answers"] == ["Final Score: 1"]
    path, body, headers = server.seen[-1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "UnifiedReward-7b-v1.5" and body["temperature"] == 0
    picture, question = body["messages"][0]["content"]
    kind, _, data = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 512)
    assert "Final Score:" in question["text"] and question["text"].endswith("Caption: [1]")


def test_answers_come_in_order_from_several_clients(server):
    server.pause = 0.05
    scores, _ = asked(server, 10, clients=5, scaled=True)
    torch.testing.assert_close(scores, torch.tensor([1.0, 2, 3, 4, 5] * 2) / 5)
    assert 2 <= server.most <= 5


def test_a_busy_server_is_asked_again(server, no_pauses):
    server.script = [(503, {"error": "starting"}), (429, b"slow down"), (500, b"")]
    assert asked(server)[0].tolist() == [1]
    assert no_pauses == [1, 2, 4] and len(server.seen) == 4


@pytest.mark.parametrize(
    "script, message",
    [
        ([(503, {"error": "out of memory"})] * 2, "after 2 tries: it answers 503.*out of memory"),
        ([(404, {"error": "no such model"})], "answered 404: .*no such model"),
        ([(401, b"who are you?")], "answered 401: who are you"),
        ([(302, b"")], "answered 302"),
        ([(200, b"<html>")], "answered what is not JSON: '<html>'"),
        ([(200, {"choices": []})], "answered without choices"),
        ([(200, {"error": "x"})], "answered without choices"),
    ],
)
def test_errors_of_the_server_are_told_in_one_line(server, script, message):
    server.script = script
    with pytest.raises(RewardError, match=message) as e:
        asked(server, tries=2)
    assert "\n" not in str(e.value)


def test_a_silent_server_and_none_at_all(server):
    server.pause = 1.0 - 1e-3  # less than what the fixture counts as a pause
    with pytest.raises(RewardError, match="after 1 tries: ReadTimeout"):
        asked(server, tries=1, timeout=0.1)
    with pytest.raises(RewardError, match="after 2 tries.*sglang.launch_server"):
        Scorer(UnifiedReward("http://127.0.0.1:9/v1", tries=2)).load()


def test_the_model_must_be_served(server):
    Scorer(UnifiedReward(server.url)).load()
    server.models = ["qwen"]
    with pytest.raises(RewardError, match="has qwen, not 'UnifiedReward-7b-v1.5'"):
        Scorer(UnifiedReward(server.url)).load()
    Scorer(UnifiedReward(server.url, model="qwen")).load()


def test_answers_without_a_score(server):
    reply = {"choices": [{"message": {"content": "I see a fox."}}]}
    server.script = [(200, reply)]
    assert asked(server)[0].tolist() == [0]
    server.script = [(200, reply)]
    assert sorted(asked(server, 2, clients=1)[0].tolist()) == [0, 2]
    server.script = [(200, reply)] * 2
    with pytest.raises(RewardError, match="none of 2 answers .*'I see a fox.'"):
        asked(server, 2)


def test_another_question(server, tmp_path):
    (tmp_path / "q.txt").write_text("Score {x} of [{prompt}]")
    assert asked(server, question=str(tmp_path / "q.txt"))[0].tolist() == [1]
    assert server.seen[-1][1]["messages"][0]["content"][1]["text"] == "Score {x} of [1]"
    (tmp_path / "q.txt").write_text("Score it")
    with pytest.raises(ValueError, match=r"has no \{prompt\}"):
        asked(server, question=str(tmp_path / "q.txt"))


# ---------------------------------------------------------------- by name, and several at once


def test_names_and_scales():
    assert get_reward("imagereward(scaled=True)").scaled
    assert get_reward("unifiedreward(scaled=True, clients=2)").server.clients == 2
    parts = get_reward("pickscore/26 + 0.5*imagereward(scaled=True)").parts
    assert [weight for weight, _ in parts] == [1 / 26, 0.5]


def test_nothing_heavy_is_imported_with_the_module():
    code = (
        "import sys, ddpo_scratch.rewards.published, ddpo_scratch.rewards.geneval\n"
        "print({'transformers', 'requests', 'PIL', 'accelerate', 'open_clip'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_gdpo_of_a_published_reward_and_resumed_bit_for_bit(tmp_path, blip_file):
    "Scales play no part, a resumed run goes on as an unbroken one."
    blip = f"imagereward({str(blip_file)!r}, {str(TOKENIZER)!r}, scaled={{}})"
    fields = dict(reward_shaping="gdpo", method="ddpo_is")
    fields |= dict(reward_fn=f"jpeg_compressibility + 0.5*{blip.format(False)}")
    whole = trained(small(tmp_path, run_name="whole", **fields))
    leave_in(small(tmp_path, run_name="cut", **fields), 2)
    resumed = trained(small(tmp_path, resume_from=str(tmp_path / "cut"), **fields))
    rows = numbers(whole.folder)
    assert len(rows) == 2 and numbers(resumed.folder) == rows
    shares = [value for key, value in rows[0].items() if key.startswith("gdpo_share/")]
    assert len(shares) == 2 and sum(shares) == pytest.approx(1) and min(shares) > 0
