"Text in pictures: edits against a recursion, the published score, the engine on drawn letters."

import configparser
import functools
import importlib.util
import itertools
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from runs import leave_in, numbers, small, trained

from ddpo_scratch.prompts import from_list
from ddpo_scratch.rewards.base import RewardError, RewardWorkers, compute_rewards, get_reward
from ddpo_scratch.rewards.ocr import OCR, RapidReader, levenshtein, quoted, text_score

ROOT = Path(__file__).resolve().parents[1]
SIGN = 'a sign that reads "OPEN"'


def drawn(text, size=192):
    picture = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(size // 7)
    ImageDraw.Draw(picture).text((size / 2, size / 2), text, "black", font, anchor="mm")
    return np.array(picture)


def batch(*texts):
    arrays = np.stack([drawn(text) for text in texts])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255


# ---------------------------------------------------------------- the score


@functools.cache
def edits(a, b):
    "The definition, as a recursion."
    if not a or not b:
        return len(a) + len(b)
    replaced = edits(a[1:], b[1:]) + (a[0] != b[0])
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, replaced)


def test_levenshtein_against_its_definition():
    rng = random.Random(0)
    words = ["".join(rng.choices("abc", k=rng.randrange(8))) for _ in range(40)]
    for a, b in itertools.product(words, words):
        assert levenshtein(a, b) == edits(a, b)


@pytest.mark.parametrize(
    "read, wanted, score",
    [
        ("Hello World", "hello world", 1),
        ("say: h e l l o !", "Hello", 1),
        ("hxllo", "hello", 1 - 1 / 5),
        ("hell", "hello", 1 - 1 / 5),
        ("helo wrld", "hello world", 1 - 2 / 10),
        ("", "hello", 0),
        ("something else altogether", "hello", 0),
        ("ÉTÉ", "été", 1),
        ("開店", "開店", 1),
    ],
)
def test_score_by_hand(read, wanted, score):
    assert text_score(read, wanted) == pytest.approx(score, abs=1e-12)


def test_score_is_the_published_formula():
    "1 - min(distance, length)/length after spaces and capitals are gone; 1 where it is contained."
    rng = random.Random(1)
    for _ in range(300):
        read, wanted = ("".join(rng.choices("aB c", k=rng.randrange(9))) for _ in "ab")
        r, w = read.replace(" ", "").lower(), wanted.replace(" ", "").lower()
        if w:
            distance = 0 if w in r else edits(r, w)
            assert text_score(read, wanted) == 1 - min(distance, len(w)) / len(w)


@pytest.mark.parametrize(
    "prompt, text",
    [
        (SIGN, "OPEN"),
        ('"a" and "b"', "a"),
        ("a “quoted” word", "quoted"),
        ('the shop "Joe\'s"', "Joe's"),
        ('"two words"', "two words"),
    ],
)
def test_text_between_quotes(prompt, text):
    assert quoted(prompt) == text


@pytest.mark.parametrize("prompt", ["a sign", 'a "', 'a ""', 'a "  "', "a 'sign'"])
def test_prompts_that_ask_for_no_text_are_refused(prompt):
    with pytest.raises(ValueError, match="between quotes"):
        quoted(prompt)


# ---------------------------------------------------------------- the reward


def test_reader_gets_bytes_and_what_it_is_unsure_of_is_left_out():
    seen = []

    def reader(picture):
        seen.append((picture.shape, picture.dtype, picture.flatten()[:3].tolist()))
        return [("OP", 0.9), ("xx", 0.0), ("EN", 0.2)]

    images = torch.tensor([0.0, 0.499 / 255, 0.501 / 255]).view(1, 3, 1, 1).expand(2, 3, 4, 6)
    scores, extras = compute_rewards(OCR(reader), images, [SIGN, SIGN], [{}, {}])
    assert scores.tolist() == [1, 1] and extras["read"] == ["OPEN", "OPEN"]
    assert seen == [((4, 6, 3), np.uint8, [0, 0, 1])] * 2


def test_errors_of_the_engine_are_raised():
    def reader(picture):
        raise OSError("no such font")

    with pytest.raises(RewardError, match="'ocr' failed .*no such font"):
        compute_rewards(OCR(reader), torch.rand(1, 3, 8, 8), [SIGN], [{}])
    with pytest.raises(RewardError, match="asks for no text"):
        compute_rewards(OCR(lambda picture: []), torch.rand(1, 3, 8, 8), ["a sign"], [{}])


def test_without_the_extra_one_line_says_so(monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else known(name)
    )
    with pytest.raises(ImportError) as e:
        get_reward("ocr")
    assert "needs onnxruntime: pip install 'ddpo_scratch[ocr]'" in str(e.value)
    assert "\n" not in str(e.value)
    assert OCR(reader=lambda picture: [])  # another engine needs no extra


def test_the_extra_names_what_is_imported():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    settings = parser["DEFAULT"]
    assert "ocr" in settings["extras"].split()
    names = {r.partition(">=")[0] for r in settings["ocr_requirements"].split()}
    assert names == {"rapidocr", "onnxruntime"}


def test_nothing_heavy_is_imported_with_the_module():
    code = (
        "import sys, ddpo_scratch.rewards.ocr; print({'rapidocr', 'PIL', 'cv2'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def ocr():
    return get_reward("ocr").load()


def test_engine_reads_what_is_drawn(ocr):
    prompts = ['"OPEN"', '"NASA 2049"', '"OPEN"']
    images = batch("OPEN", "NASA 2049", "OPEM")
    scores, extras = compute_rewards(ocr, images, prompts, [{}] * 3)
    assert scores.tolist() == [1, 1, 0.75], extras
    blank = torch.ones(1, 3, 64, 64)
    scores, extras = compute_rewards(ocr, blank, prompts[:1], [{}])
    assert scores.tolist() == [0] and extras["read"] == [""]


def test_each_thread_has_an_engine_of_its_own(ocr):
    images = batch("OPEN")
    with RewardWorkers(ocr, 2) as workers:
        jobs = [workers.submit(images, ['"OPEN"'], [{}]) for _ in range(2)]
        assert [job.result()[0].item() for job in jobs] == [1, 1]
    reader = RapidReader()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(reader._engine).result() is not reader._engine()


def test_pickled_without_its_engine(ocr):
    copy = pickle.loads(pickle.dumps(ocr))
    assert ocr.reader._own.engine is not None and not hasattr(copy.reader._own, "engine")
    assert copy.reader.threads == ocr.reader.threads


# ---------------------------------------------------------------- a run


class Shades:
    "Read more letters off a brighter picture, which a tiny model can be."

    def __call__(self, picture):
        return [("abcdefghijklmnopqrstuvwxyz"[: int(picture.mean()) // 10], 1.0)]


def test_two_epochs_and_resumed_bit_for_bit(tmp_path):
    words = [f'a cat with "{text}"' for text in ("abcdefghijklmnopqr", "abcdefghijklmnop")]
    parts = dict(reward_fn=OCR(Shades()), prompt_fn=from_list(words))
    fields = dict(method="ddpo_is")
    whole = trained(small(tmp_path, run_name="whole", **fields), **parts)
    leave_in(small(tmp_path, run_name="cut", **fields), 2, **parts)
    resumed = trained(small(tmp_path, resume_from=str(tmp_path / "cut"), **fields), **parts)
    rows = numbers(whole.folder)
    assert len(rows) == 2 and 0 < rows[0]["reward_mean"] < 1 and rows[0]["reward_std"] > 0
    assert numbers(resumed.folder) == rows
