"A page's fragments: words are escaped, curves stand where they must, pictures fit a budget."

import base64
import io
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ddpo_scratch.run import page as P


def opened(uri):
    "The picture of a data URI."
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_pictures_keep_their_colours_and_small_ones_their_size():
    images = torch.rand(3, 3, 1, 1).expand(3, 3, 40, 24)
    for uri, image in zip(P.picture_uris(images), images):
        picture = opened(uri)
        assert picture.size == (24, 40) and picture.format == "JPEG"
        shown = torch.tensor(picture.getpixel((3, 5))) / 255
        torch.testing.assert_close(shown, image[:, 0, 0], atol=0.02, rtol=0)


def test_many_large_pictures_shrink_to_their_budget_but_can_still_be_seen():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(40, 3, 16, 16, generator=generator)
    images = torch.nn.functional.interpolate(small, 256, mode="bicubic").clamp(0, 1)
    uris = P.picture_uris(images, 4e5)
    assert sum(map(len, uris)) < 4e5
    assert 64 <= opened(uris[0]).width < 256
    assert opened(P.picture_uris(images, 1)[0]).size == (64, 64)


def panel(**changes):
    "A gauge of four epochs."
    fields = dict(title="a\ngauge", epochs=[1, 2, 3, 4], values=[1.0, 2.0, 4.0, 3.0])
    fields |= dict(low=None, high=None, limits=(-math.inf, math.inf))
    return SimpleNamespace(**fields | changes)


def numbers(pattern, text):
    "All matches as floats."
    return [float(x) for x in re.findall(pattern, text)]


def test_a_curve_stands_where_its_values_are():
    svg = P.curve(panel())
    ys, xs = numbers(r'cy="([^"]+)"', svg), numbers(r'cx="([^"]+)"', svg)
    assert xs == sorted(xs) and (xs[0], xs[-1]) == (P._LEFT, P._RIGHT)
    assert ys[2] < ys[3] < ys[1] < ys[0]  # a larger value is higher up
    assert ys[0] - ys[1] == pytest.approx((ys[1] - ys[2]) / 2, abs=0.2)
    assert "a gauge: 1 at epoch 1, 3 at epoch 4" in svg and "usual" not in svg


def test_bands_meet_at_the_limit():
    svg = P.curve(panel(limits=(-math.inf, 3.5)))
    usual = re.search(r'class="usual".*?y="([^"]+)" width="\d+" height="([^"]+)"', svg)
    off = re.search(r'class="off".*?y="([^"]+)" width="\d+" height="([^"]+)"', svg)
    top, height = map(float, off.groups())
    assert top == P._TOP and top + height == pytest.approx(float(usual[1]), abs=0.2)
    ys = numbers(r'cy="([^"]+)"', svg)
    assert ys[2] < float(usual[1]) < ys[3]
    assert svg.count('class="off"') == 1


@pytest.mark.parametrize(
    "values", [[0.0], [5.0], [1e-9, 2e-9], [1e7, 3e7], [-1.0, -1.0], [0.0, 0.0], [1e-3, 1e5]]
)
def test_any_numbers_can_be_drawn(values):
    svg = P.curve(panel(epochs=list(range(1, len(values) + 1)), values=values))
    labels = re.findall(r'text-anchor="end">([^<]+)<', svg)
    assert 1 <= len(labels) <= 7 and len(set(labels)) == len(labels)
    assert all(len(label) <= 7 for label in labels)
    for place in numbers(r' c?[xy]="([^"]+)"', svg):
        assert -1 <= place <= P._WIDTH


def test_ticks_are_round_and_cover_the_range():
    for low, high in ((0.1, 0.9), (-3.0, 7.0), (1e-8, 9e-8), (0, 100)):
        ticks = P._ticks(low, high)
        assert 2 <= len(ticks) <= 6
        assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)


def test_epochs_are_whole_numbers():
    svg = P.curve(panel(epochs=[1, 2], values=[1.0, 2.0]))
    assert re.findall(r'text-anchor="middle">([^<]+)<', svg) == ["1", "2", "epoch"]


def test_prompts_cannot_leave_their_place():
    words = "</script>'\"<b>&"
    shown = P.slider([words], [words], [["data:,"]], [[words]])
    assert shown.count("</script>") == 1 and "<b>" not in shown
    data = re.search(r'<script type="application/json">(.*)</script>', shown)[1]
    assert json.loads(data)["captions"] == [[words]]
    assert "<b>" not in P.pairs([words], ["data:,"], ["data:,"], [[words], [words]])
    assert "<b>" not in P.table([words], [[words, words]]) + P.paragraph(words) + P.code(
        words, words
    )
    assert "<b>" not in P.bullets([words]) + P.folded(words, "")
    assert "<b>" not in P.html_page(words, "", [(words, "x")])


def test_tables_keep_their_heads_on_a_phone():
    shown = P.table(["", "before"], [["reward", "-2.39 kB"], ["judge", "fell"]])
    assert '<td data-head="before">-2.39 kB</td>' in shown
    assert '<td class="bad" data-head="before">fell</td>' in shown
