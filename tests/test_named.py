"What would bore a reader of 23: every text that can and cannot be read, and whom a registry asks."

import math
import sys

import pytest

from ddpo_scratch.named import Registry, build, load_attribute, misfit, parse_call, parse_sum

ROOM = """
from {room} import THINGS

THINGS.register({name!r})({name!r} + " of the folder")
"""


@pytest.mark.parametrize(
    "text, name, call",
    [
        ("fox", "fox", None),
        ("  fox ", "fox", None),
        ("fox()", "fox", ((), {})),
        ("fox(3, [1, -2.5], words=True)", "fox", ((3, [1, -2.5]), {"words": True})),
        ("pkg:fox", "pkg:fox", None),
        ("pkg.room:fox('a:b + 2*c(')", "pkg.room:fox", (("a:b + 2*c(",), {})),
        ("pkg.room:fox({3: 2, True: None})", "pkg.room:fox", (({3: 2, True: None},), {})),
        ("fox(\n  3,\n)", "fox", ((3,), {})),
    ],
)
def test_calls(text, name, call):
    assert parse_call(text) == (name, call)
    assert parse_sum(text) == [(1.0, name, call)]


UNREADABLE = [
    *("", "fox(", "fox)", "fox(n)", "fox(1+n)", "fox(**{'n': 3})", "fox(*[2, 3])", "fox()()"),
    *("fox(open('x'))", "fox('", "[fox]", "'fox'", "lambda: fox", "fox; owl", ":fox", "pkg:"),
    *("open('x').read", "fox if 1 else owl", "fox\nowl", "fox(n=)", "2 fox"),
]


@pytest.mark.parametrize("text", UNREADABLE)
@pytest.mark.parametrize("parse", [parse_call, parse_sum])
def test_texts_that_cannot_be_read(parse, text):
    with pytest.raises(ValueError, match="^get_fox: cannot read .*such as fox"):
        parse(text, "get_fox", "fox(3)")


@pytest.mark.parametrize(
    "text, weights",
    [
        ("a + b", [1, 1]),
        ("a - b", [1, -1]),
        ("2*a", [2]),
        ("a*2", [2]),
        ("a/4", [0.25]),
        ("-a", [-1]),
        ("2e-1 * a", [0.2]),
        ("-a(2) - -b(3)", [-1, 1]),
        ("1/2*(a(1) - 3*(b(2) - c(4)))", [0.5, -1.5, 1.5]),
        ("(1 + 2)*3*a", [9]),
        ("0.5*pkg.room:a + pkg:b/2", [0.5, 0.5]),
    ],
)
def test_sums(text, weights):
    terms = parse_sum(text)
    assert [weight for weight, _, _ in terms] == weights
    assert [name[-1] for _, name, _ in terms] == list("abc"[: len(weights)])


@pytest.mark.parametrize(
    "text", ["a + 1", "1 - a", "a*b", "1/a", "a/0", "a**2", "a//2", "True*a", "a@b", "+a", "not a"]
)
def test_what_is_not_a_weighted_sum(text):
    with pytest.raises(ValueError, match="get_fox: cannot read .* is not a weighted sum; write"):
        parse_sum(text, "get_fox")


@pytest.mark.parametrize("text", ["2", "1 + 1", "-3*2"])
def test_a_number_is_refused(text):
    with pytest.raises(ValueError, match="is a number"):
        parse_sum(text)


def test_nothing_is_run(tmp_path):
    file = tmp_path / "made"
    for text in (
        f"fox(open({str(file)!r}, 'w'))",
        f"open({str(file)!r}, 'w') + fox",
        f"__import__('pathlib').Path({str(file)!r}).touch()",
    ):
        for parse in (parse_call, parse_sum):
            try:
                parse(text)
            except ValueError:
                pass
    assert not file.exists()


def test_load_attribute():
    assert load_attribute("math:pi") is math.pi
    assert load_attribute("pathlib:Path.cwd")().is_dir()
    for path in ("no_such_module:fn", "math:nothing", ":pi", "math:2", ""):
        with pytest.raises(ValueError, match="get_fox: cannot load"):
            load_attribute(path, "get_fox")


def test_build_refuses_before_it_calls():
    calls = []

    def maker(size, *, words=False) -> list:
        calls.append(size)
        return calls

    assert misfit(maker, 3) is None and misfit(maker) and misfit(maker, 3, 4)
    for text, message in (
        ("maker", "missing a required argument: 'size'"),
        ("maker(3, 4)", "too many positional arguments"),
        ("maker(3, word=1)", "unexpected keyword argument 'word'"),
    ):
        name, call = parse_call(text)
        with pytest.raises(ValueError) as e:
            build(maker, call, name, "get_fox")
        assert message in str(e.value)
        assert str(e.value).endswith("write maker(size, *, words=False) with values")
    assert calls == []
    assert build(maker, parse_call("maker(3)")[1], "maker") == [3]


def test_a_registry_is_a_mapping():
    things = Registry("get_fox", "fox")
    assert not things and "red" not in things and things.get("red") is None
    for name in ("red", "arctic"):
        things.register(name)(name.upper())
    assert dict(things) == {"red": "RED", "arctic": "ARCTIC"} and len(things) == 2
    things.register("red")("again")  # a cell that is run twice
    assert things["red"] == things.find("red") == "again"
    with pytest.raises(KeyError):
        things["blue"]
    assert things.find("math:pi") is math.pi


@pytest.mark.parametrize(
    "name, message",
    [
        ("rde", r"no fox called 'rde'; did you mean red\? known: red, red_one, arctic, a path"),
        ("ed", r"did you mean red or red_one\?"),
        ("qqq", r"no fox called 'qqq'; known: red"),
        ("", r"no fox called ''; known: red"),
        ("math:nothing", "get_fox: cannot load 'math:nothing'"),
    ],
)
def test_names_that_are_unknown(name, message):
    things = Registry("get_fox", "fox", also="a path")
    for known in ("red", "red_one", "arctic"):
        things.register(known)(known)
    with pytest.raises(ValueError, match=message):
        things.find(name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A package whose modules each register one thing, and the registry that they know."
    room = tmp_path / "room_of_things"
    room.mkdir()
    (room / "__init__.py").write_text(
        "from ddpo_scratch.named import Registry\n"
        "THINGS = Registry('get_thing', 'thing', 'room_of_things')\n"
    )
    for name in ("apple", "book", "clock"):
        (room / f"{name}.py").write_text(ROOM.format(room="room_of_things", name=name))
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("room_of_things").THINGS
    for module in [m for m in sys.modules if m.startswith("room_of_things")]:
        del sys.modules[module]


def imported():
    return sorted(m.partition(".")[2] for m in sys.modules if m.startswith("room_of_things."))


def test_modules_are_imported_until_one_brings_the_name(folder):
    assert imported() == []
    assert folder.find("book") == "book of the folder" and imported() == ["apple", "book"]
    assert list(folder) == ["apple", "book", "clock"] and imported() == ["apple", "book", "clock"]
    with pytest.raises(ValueError, match="did you mean clock"):
        folder.find("clocks")


def test_ones_own_thing_stays_when_the_folder_has_another(folder):
    folder.register("book")("mine")
    assert folder.find("clock") == "clock of the folder" and folder.find("book") == "mine"


def test_a_new_file_is_found_without_a_list(folder, tmp_path):
    (tmp_path / "room_of_things" / "zebra.py").write_text(
        ROOM.format(room="room_of_things", name="zebra")
    )
    assert folder.find("zebra") == "zebra of the folder"
