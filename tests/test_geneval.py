"GenEval: boxes by hand and by brute force, small detectors of each class, a run."

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
import transformers
from runs import leave_in, numbers, small, trained

import ddpo_scratch
from ddpo_scratch.prompts import from_file
from ddpo_scratch.rewards.base import RewardError, compute_rewards, get_reward
from ddpo_scratch.rewards.geneval import (
    COLORS,
    ColorNamer,
    Detector,
    GenEval,
    graded,
    is_right,
    relations,
    sure_boxes,
)
from ddpo_scratch.rewards.tiny_clip import tiny_clip_score

TOKENIZER = Path(ddpo_scratch.__file__).parent / "tiny_model" / "tokenizer"
BOX = (10, 10, 20, 20)


def rows_of(rng, n=300, size=100):
    for _ in range(n):
        x, y, u, v = (rng.uniform(0, size) for _ in range(4))
        yield min(x, u), min(y, v), max(x, u), max(y, v)


# ---------------------------------------------------------------- boxes


def test_relations_against_plain_arithmetic():
    rng = random.Random(0)
    for a, b in zip(rows_of(rng), rows_of(rng)):
        ox, oy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
        x = max(abs(ox) - 0.1 * (a[2] - a[0] + b[2] - b[0]), 0) * math.copysign(1, ox)
        y = max(abs(oy) - 0.1 * (a[3] - a[1] + b[3] - b[1]), 0) * math.copysign(1, oy)
        want, far = set(), math.hypot(ox, oy)
        want |= {"left of"} if x / far < -0.5 else {"right of"} if x / far > 0.5 else set()
        want |= {"above"} if y / far < -0.5 else {"below"} if y / far > 0.5 else set()
        assert relations(a, b) == want
        mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        assert relations(b, a) == {mirror[side] for side in want}


def test_relations_of_a_box_with_itself():
    assert relations(BOX, BOX) == set()


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(threshold=0.3), ["a", "b", "c"]),
        (dict(threshold=0.5), ["a", "b"]),  # 0.5 does not exceed 0.5
        (dict(threshold=0.3, most=2), ["a", "b"]),
        (dict(threshold=0.3, overlap=0.8), ["a", "c"]),
        (dict(threshold=0.95), []),
    ],
)
def test_sure_boxes(options, want):
    boxes = dict(a=(0, 0, 99, 99), b=(0, 0, 99, 89), c=(200, 0, 299, 99), d=(0, 0, 1, 1))
    sure = dict(c=0.5, a=0.9, b=0.8, d=0.1)
    found = [(sure[name], boxes[name]) for name in sure]
    assert sure_boxes(found, **options) == [boxes[name] for name in want]


# ---------------------------------------------------------------- rules


def wish(name, count, **more):
    return {"class": name, "count": count, **more}


def seen(*colors):
    return lambda name, boxes: list(colors)[: len(boxes)]


LEFT, RIGHT = (0, 40, 20, 60), (80, 40, 100, 60)


@pytest.mark.parametrize(
    "wishes, boxes, colors, score, strict",
    [
        ([wish("cat", 1)], {}, (), 0, False),
        ([wish("cat", 1)], {"cat": [BOX]}, (), 1, True),
        ([wish("cat", 4)], {"cat": [BOX] * 3}, (), 3 / 4, False),
        ([wish("cat", 4)], {"cat": [BOX] * 5}, (), 3 / 4, False),
        ([wish("cat", 1)], {"cat": [BOX] * 3}, (), -1, False),
        ([wish("cat", 1), wish("dog", 1)], {"cat": [BOX]}, (), 1 / 2, False),
        ([wish("cat", 1, color="red")], {"cat": [BOX]}, ("red",), 1, True),
        ([wish("cat", 1, color="red")], {"cat": [BOX]}, ("blue",), 1 / 2, False),
        ([wish("cat", 1, color="red")], {}, (), 0, False),
        ([wish("cat", 2, color="red")], {"cat": [BOX] * 2}, ("red", "blue"), 3 / 4, False),
        (
            [wish("dog", 1), wish("cat", 1, position=["left of", 0])],
            {"cat": [LEFT], "dog": [RIGHT]},
            (),
            1,
            True,
        ),
        (  # a wrong place: a zero, and the published one after it
            [wish("dog", 1), wish("cat", 1, position=["right of", 0])],
            {"cat": [LEFT], "dog": [RIGHT]},
            (),
            3 / 4,
            False,
        ),
        (  # nothing to lie beside: a zero alone
            [wish("dog", 1), wish("cat", 1, position=["left of", 0])],
            {"cat": [LEFT]},
            (),
            (0 + 1 + 0) / 3,
            False,
        ),
        (  # the wrong number: a zero for the place
            [wish("dog", 1), wish("cat", 1, position=["left of", 0])],
            {"dog": [RIGHT]},
            (),
            (1 + 0 + 0) / 3,
            False,
        ),
        (  # a wrong colour leaves the place out
            [wish("dog", 1), wish("cat", 1, color="red", position=["left of", 0])],
            {"cat": [LEFT], "dog": [RIGHT]},
            ("blue",),
            (1 + 1 + 0) / 3,
            False,
        ),
    ],
)
def test_graded_by_hand(wishes, boxes, colors, score, strict):
    found, met = graded(wishes, boxes, seen(*colors))
    assert found == pytest.approx(score, abs=1e-12) and met is strict


@pytest.mark.parametrize(
    "metadata, boxes, colors, right",
    [
        (dict(include=[wish("cat", 2)]), {"cat": [BOX]}, (), False),
        (dict(include=[wish("cat", 2)]), {"cat": [BOX] * 3}, (), True),
        (dict(include=[wish("cat", 2)], exclude=[wish("cat", 3)]), {"cat": [BOX] * 3}, (), False),
        (dict(include=[wish("cat", 1)], exclude=[wish("dog", 1)]), {"cat": [BOX]}, (), True),
        (dict(include=[wish("cat", 1, color="red")]), {"cat": [BOX]}, ("red",), True),
        (dict(include=[wish("cat", 1, color="red")]), {"cat": [BOX] * 2}, ("blue", "red"), False),
        (
            dict(include=[wish("dog", 1), wish("cat", 1, position=["left of", 0])]),
            {"cat": [LEFT, RIGHT], "dog": [RIGHT]},  # the surest cat counts
            (),
            True,
        ),
        (
            dict(include=[wish("dog", 1), wish("cat", 1, position=["left of", 0])]),
            {"cat": [RIGHT, LEFT], "dog": [RIGHT]},
            (),
            False,
        ),
        (
            dict(include=[wish("dog", 1), wish("cat", 1, position=["left of", 0])]),
            {"cat": [LEFT]},
            (),
            False,
        ),
    ],
)
def test_benchmark_by_hand(metadata, boxes, colors, right):
    assert is_right(metadata, boxes, seen(*colors)) is right


def test_what_is_met_exactly_is_right():
    "Over all small cases: strict implies the benchmark's rule, and a score of 1 is strict."
    options = [None, "red", "blue"]
    places = [None, ["left of", 0], ["right of", 0]]
    for n, have, color, place, got in itertools.product((1, 2), range(4), options, places, options):
        second = wish("cat", n)
        second |= {"color": color} if color else {}
        second |= {"position": place} if place else {}
        wishes = [wish("dog", 1), second]
        boxes = {"dog": [RIGHT], "cat": [LEFT] * have}
        colors_of = seen(*[got] * 9)
        score, strict = graded(wishes, boxes, colors_of)
        assert strict is (score == 1)
        if strict:
            assert is_right(dict(include=wishes), boxes, colors_of)


# ---------------------------------------------------------------- detectors


TOWER = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
SIZE = dict(height=32, width=32)


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owl")
    config = transformers.Owlv2Config(
        text_config=dict(**TOWER, vocab_size=1024),
        vision_config=dict(**TOWER, image_size=32, patch_size=16),
        projection_dim=32,
    )
    torch.manual_seed(0)
    transformers.Owlv2ForObjectDetection(config).save_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    eyes = transformers.Owlv2ImageProcessor(size=SIZE)
    transformers.Owlv2Processor(eyes, words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yolos")
    config = transformers.YolosConfig(
        **TOWER,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=5,
        id2label={0: "N/A", 1: "apple", 2: "mouse", 3: "bench"},
    )
    torch.manual_seed(0)
    transformers.YolosForObjectDetection(config).save_pretrained(folder)
    transformers.YolosImageProcessor(size=SIZE).save_pretrained(folder)
    return folder


def pictures(n=4):
    return torch.rand(n, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def by_name(found):
    return sorted((name, round(sure, 4), [round(x, 2) for x in box]) for name, sure, box in found)


def test_open_detector_finds_what_it_is_asked_for(owl):
    names = [["apple"], ["apple", "bench"], ["apple", "bench"], ["bench"]]
    detector = Detector(owl)
    found = detector(pictures(), names)
    assert detector.is_open
    for own, triples in zip(names, found):
        assert triples and {name for name, _, _ in triples} <= set(own)
        assert all(0 <= sure <= 1 and len(box) == 4 for _, sure, box in triples)
    alone = [
        Detector(owl, batch_size=1)(pictures()[i : i + 1], [own]) for i, own in enumerate(names)
    ]
    assert [by_name(triples) for (triples,) in alone] == [by_name(triples) for triples in found]


def test_open_detector_is_asked_as_transformers_own_pipeline_is(owl):
    image = pictures(1)
    (found,) = Detector(owl)(image, [["apple"]])
    processor = transformers.AutoProcessor.from_pretrained(owl)
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(owl).eval()
    array = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    inputs = processor(images=array, text=[["a photo of a apple"]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    scores = outputs.logits.sigmoid()[0, :, 0]
    want = sorted(round(score, 4) for score in scores.tolist() if score > 0)
    assert sorted(round(sure, 4) for _, sure, _ in found) == want
    # centre, width and height in [0, 1] of the picture, padded to a square of its longer side
    x, y, w, h = (64 * outputs.pred_boxes[0, scores.argmax()]).tolist()
    box = max(found, key=lambda triple: triple[1])[2]
    assert box == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=1e-2)


def test_closed_detector_knows_cocos_classes(yolos):
    detector = Detector(yolos)
    found = detector(pictures(), [["apple", "computer mouse", "bench"]] * 4)
    assert not detector.is_open
    names = {name for triples in found for name, _, _ in triples}
    assert names and names <= {"apple", "computer mouse", "bench"}
    with pytest.raises(ValueError, match="does not know fox, owl: use an open detector"):
        detector(pictures(1), [["apple", "owl", "fox"]])


def test_detectors_that_answer_in_phrases_are_refused(tmp_path):
    transformers.GroundingDinoConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type grounding-dino, whose answers are phrases"):
        Detector(tmp_path).load()


# ---------------------------------------------------------------- colours


@pytest.fixture(scope="module")
def namer():
    tiny = tiny_clip_score()
    return ColorNamer(tiny.model, tiny.pretrained)


def test_colours_are_the_nearest_of_averaged_arrows(namer):
    image = pictures(1)[0]
    got = namer.name_colors(image, "apple", [(8, 4, 40, 36)])
    arrow = namer.embed_images(image[None, :, 4:36, 8:40])[0]
    best, nearest = None, -2
    for color in COLORS:
        texts = [f"a photo of a {color} apple", f"a photo of a {color}-colored apple"]
        mean = namer.embed_prompts([*texts, f"a photo of a {color} object"]).mean(0)
        cosine = (arrow @ mean / mean.norm()).item()
        best, nearest = (color, cosine) if cosine > nearest else (best, nearest)
    assert got == [best]


def test_boxes_outside_the_picture_still_have_a_colour(namer):
    odd = [(-9, -9, -1, -1), (100, 100, 200, 200), (5, 5, 5, 5), (63.7, 47.9, 64, 48)]
    colors = namer.name_colors(pictures(1)[0], "apple", odd)
    assert len(colors) == 4 and set(colors) <= set(COLORS)


# ---------------------------------------------------------------- the reward


def triples(*found):
    return lambda images, names: [list(found)] * len(images)


def test_thresholds_go_by_the_tag():
    found = triples(
        ("cat", 0.95, BOX), ("cat", 0.5, (50, 50, 60, 60)), ("cat", 0.45, (50, 50, 60, 61))
    )
    reward = GenEval(found, clip=Named())
    for tag, overlap, count in [("counting", 0.5, 1), ("single_object", 0.5, 2), ("colors", 1, 3)]:
        reward.overlap = overlap
        metadata = dict(tag=tag, include=[wish("cat", count)])
        scores, extras = compute_rewards(reward, pictures(1), ["cats"], [metadata])
        assert scores.tolist() == [1] and extras["found"] == [{"cat": count}]
        assert extras["strict"] == [1.0]


class Named:
    def name_colors(self, image, name, boxes):
        return ["red"] * len(boxes)


def test_rules():
    found = triples(("cat", 0.95, BOX), ("cat", 0.94, (50, 50, 60, 60)))
    metadata = dict(tag="colors", include=[wish("cat", 1, color="red")])
    got = {
        rule: compute_rewards(GenEval(found, rule, clip=Named()), pictures(1), ["p"], [metadata])[0]
        for rule in ("graded", "strict", "benchmark")
    }
    assert {rule: value.item() for rule, value in got.items()} == dict(
        graded=0, strict=0, benchmark=1
    )
    with pytest.raises(ValueError, match="needs 'graded', 'strict' or 'benchmark'"):
        get_reward("geneval(rule='exact')")


def test_detector_is_asked_for_all_names_once():
    asked = []

    def detector(images, names):
        asked.extend(names)
        return [[]] * len(images)

    metadata = dict(include=[wish("cat", 1), wish("dog", 1)], exclude=[wish("cat", 2)])
    compute_rewards(GenEval(detector, clip=Named()), pictures(1), ["p"], [metadata])
    assert asked == [["cat", "dog"]]


@pytest.mark.parametrize("metadata", [{}, {"include": []}, {"include": [{"class": "cat"}]}])
def test_metadata_without_wishes_are_refused(metadata):
    with pytest.raises(RewardError, match="need a list include of dicts with class and count"):
        compute_rewards(GenEval(triples(), clip=Named()), pictures(1), ["a cat"], [metadata])


def test_networks_are_loaded_late_and_moved_together(owl, namer):
    reward = GenEval(str(owl), clip=namer)
    assert reward.detector.network is None
    assert reward.load("cpu") is reward and reward.detector.network is not None
    assert reward.to("cpu").detector.device == torch.device("cpu")
    assert isinstance(get_reward("geneval").detector, Detector)


class Bright:
    "Find one cat more in a brighter picture."

    def __call__(self, images, names):
        boxes = [(20 * i, 0, 20 * i + 9, 9) for i in range(9)]
        return [[("cat", 0.95, box) for box in boxes[: int(9 * image.mean())]] for image in images]


def test_metadata_travel_from_a_file_and_a_run_resumes_bit_for_bit(tmp_path):
    lines = [dict(tag="counting", include=[wish("cat", n)], prompt=f"{n} cats") for n in (4, 6, 8)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts = dict(reward_fn=GenEval(Bright(), clip=Named()))
    # the bright part of the random model's pictures is always as large
    fields = dict(prompt_fn=str(tmp_path / "m.jsonl"), method="ddpo_is", model="tiny")
    assert from_file(tmp_path / "m.jsonl").metadata[0]["include"] == [wish("cat", 4)]
    whole = trained(small(tmp_path, run_name="whole", **fields), **parts)
    leave_in(small(tmp_path, run_name="cut", **fields), 2, **parts)
    resumed = trained(small(tmp_path, resume_from=str(tmp_path / "cut"), **fields), **parts)
    rows = numbers(whole.folder)
    assert len(rows) == 2 and rows[0]["reward_std"] > 0 and numbers(resumed.folder) == rows
