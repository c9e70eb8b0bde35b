"What would bore a reader of 23: every text that can and cannot be read, and whom a registry asks."

import fractions
import functools
import importlib
import math
import subprocess
import sys
import threading

import pytest

from ddpo_scratch.named import (
    Registry,
    build,
    load_attribute,
    misfit,
    name_of,
    outside,
    parse_call,
    parse_sum,
    refuse_in_import,
    registered,
)
from ddpo_scratch.prompts import SOURCES
from ddpo_scratch.rewards.base import REWARDS, Reward, WeightedSum, get_reward, target_color

# now: `here` forgets what a test has imported, and torch cannot be imported in part again
importlib.import_module("ddpo_scratch.train")

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
        ("pkg.room.fox", "pkg.room:fox", None),
        ("pkg:Den.fox", "pkg:Den.fox", None),
        ("my.py:fox", "my.py:fox", None),
        ("./my.py:fox", "./my.py:fox", None),
        ("dens/my-fox.py:fox(3)", "dens/my-fox.py:fox", ((3,), {})),
        ("../a.b/my.py:Den.fox", "../a.b/my.py:Den.fox", None),
        ("~/my.py:fox", "~/my.py:fox", None),
        ("/a/b.py:fox('c/d.py:e')", "/a/b.py:fox", (("c/d.py:e",), {})),
        (r"C:\dens\my.py:fox", r"C:\dens\my.py:fox", None),
        ("dens/my.py", "dens/my.py", None),
    ],
)
def test_calls(text, name, call):
    assert parse_call(text) == (name, call)
    assert parse_sum(text) == [(1.0, name, call)]


UNREADABLE = [
    *("", "fox(", "fox)", "fox(n)", "fox(1+n)", "fox(**{'n': 3})", "fox(*[2, 3])", "fox()()"),
    *("fox(open('x'))", "fox('", "[fox]", "'fox'", "lambda: fox", "fox; owl", ":fox", "pkg:"),
    *("open('x').read", "fox if 1 else owl", "fox\nowl", "fox(n=)", "2 fox"),
    *("a:b:c", "(" * 3000 + ")" * 3000, "[" * 3000, "-" * 5000 + "fox"),
    *("+".join(["fox"] * 5000) + "(", "1e999*fox", "9" * 5000 + "*fox", "fox\0", "my fox.py:x"),
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
        ("0.5*my.py:a - ./den/my.py:b(1)/2", [0.5, -0.5]),
        ("-my.py:a", [-1]),
        ("2*(my.py:a + b)", [2, 2]),
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


@pytest.mark.parametrize("parse", [parse_call, parse_sum])
def test_a_long_sum_is_read_or_refused_in_one_line(parse):
    for text in ("+".join(["fox"] * 20_000), "fox(" + "[" * 90 + "]" * 90 + ")"):
        try:
            parse(text)
        except ValueError as e:
            assert len(str(e)) < 500 and "\n" not in str(e)


PASSED = [
    *("__main__:fox", "my:den.<locals>.fox", "my:<lambda>", "my:Den(...)", "0.5*__main__:fox"),
]


@pytest.mark.parametrize("text", PASSED)
def test_what_was_passed_from_python_is_not_looked_for(text):
    things = Registry("get_fox", "fox")
    with pytest.raises(ValueError, match="get_fox: .* was passed from Python and cannot be") as e:
        things.find(parse_sum(text, "get_fox")[0][1])
    assert str(e.value).endswith("pass it again as reward_fn= (or prompt_fn=)")
    with pytest.raises(ValueError, match="was passed from Python"):
        things.find(text.removeprefix("0.5*"))


class Den:
    def __init__(self, *, depth=1):
        self.depth = depth

    def fox(self, images):
        return images


class Plain:
    "Takes nothing."


class Named(Den):
    name = "a den"


def test_names_of_things():
    here = __name__
    assert name_of(math.hypot) == "math:hypot"
    assert name_of(Den) == f"{here}:Den" and name_of(Den.fox) == f"{here}:Den.fox"
    assert name_of(Plain()) == f"{here}:Plain"
    # made with arguments that nobody knows: another one would be made by the name
    assert name_of(Den(depth=3)) == f"{here}:Den(...)"
    assert name_of(Den().fox) == f"{here}:Den.fox(...)"
    assert name_of(functools.partial(math.hypot, 1)) == "math:hypot(...)"
    assert name_of(functools.partial(Den().fox)) == f"{here}:Den.fox(...)"
    assert name_of(fractions.Fraction(1, 2)) == "fractions:Fraction(...)"
    assert name_of(Named()) == f"{here}:Named(...)"  # its `name` might be another one's
    registered = REWARDS["brightness"]
    assert name_of(registered) == "brightness" and type(name_of(registered)) is str
    assert "<locals>.<lambda>" in name_of(lambda: 0)


@pytest.mark.parametrize("thing", [math.hypot, Den, Plain(), Den(), Den().fox, lambda: 0])
def test_a_name_finds_the_thing_or_says_that_it_cannot(thing):
    name = name_of(thing)
    things = Registry("get_fox", "fox")
    try:
        found = things.find(parse_sum(name)[0][1])
    except ValueError as e:
        assert "was passed from Python" in str(e)
    else:
        assert found is thing or found is type(thing)


@pytest.mark.parametrize(
    "text, names",
    [
        ("fox", []),
        ("0.5*fox - owl(3)", []),
        ("os:system('touch x')", ["os:system"]),
        ("os.system('touch x')", ["os:system"]),
        ("fox + 0*(owl - evil:r)", ["evil:r"]),
        ("my.py:fox - dir/my.py:owl + my.py:fox", ["my.py:fox", "dir/my.py:owl"]),
        ("ddpo_scratch.cli.commands:os.system('x')", ["ddpo_scratch.cli.commands:os.system"]),
        ("evil:Den.run", ["evil:Den.run"]),
        ("fox('os:system')", ["os:system"]),
        ("fox('os.system', 3)", ["os:system"]),
        ("fox(of='owl + 2*my.py:owl', n=1)", ["my.py:owl"]),
        ("owl - fox(['bear', ('wolf', 'my.py:owl')])", ["my.py:owl"]),
        ("fox({'os:system': 1, 'bear': {'a': 'my.py:owl'}})", ["os:system", "my.py:owl"]),
        ("fox('owl(\\'bear(\\\\\\'my.py:owl\\\\\\')\\')')", ["my.py:owl"]),
        ("fox('a bear: brown', 'sky:blue', 'model.safetensors', 'owner/name')", []),
        ("fox('http://a.b:80/x', 'C:/x.pt', 'my.py', 'a, b', '', 'prompts.json')", []),
        ("prompts.txt", []),
        ("prompts.jsonl", []),
        ("data/prompts.txt", []),
        ("evil:r(", []),
        ("3", []),
        ("", []),
    ],
)
def test_what_a_text_would_import(text, names):
    assert outside(text) == names


def test_what_is_nested_too_deep_to_be_read_counts_as_code():
    "Another reader may have more room on its stack."
    assert outside("-" * 5000 + "my.py:fox")
    assert outside(f"fox({'-' * 5000 + 'my.py:fox'!r})")


def test_a_name_in_an_argument_is_code_where_there_is_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert outside("fox('evil.red', 'weights.pt', __main__)") == []  # no literal
    assert outside("fox('evil.red', 'weights.pt')") == []
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    assert outside("fox('evil.red', 'weights.pt')") == ["evil:red"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["prompts.txt", "prompts.csv", "my:json"])
def test_a_file_of_data_is_not_imported(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in ("prompts", "my"):
        (tmp_path / f"{module}.py").write_text("open('ran', 'w')\ntxt = csv = json = 1\n")
    with pytest.raises(ValueError, match="is a file of data, which holds no fox"):
        Registry("get_fox", "fox").find(parse_call(text)[0])
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory with modules of its own, off the path as in a command."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_the_working_directory_is_searched_for_a_named_module_only(here):
    (here / "my_den.py").write_text("import my_helper\nfox = my_helper.fox\n")
    (here / "my_helper.py").write_text("fox = 7\n")
    (here / "optional_library.py").write_text("open('ran', 'w')\n")
    before = list(sys.path)
    assert load_attribute("my_den:fox") == 7
    assert sys.path == before
    with pytest.raises(ImportError):
        importlib.import_module("optional_library")
    assert not (here / "ran").exists()


def test_the_working_directory_shadows_nothing(here):
    (here / "fractions.py").write_text("Fraction = 1\n")
    (here / "colorsys.py").write_text("rgb_to_hls = 1\n")
    sys.modules.pop("colorsys", None)
    assert load_attribute("fractions:Fraction") is fractions.Fraction
    assert callable(load_attribute("colorsys:rgb_to_hls"))
    # asked for as a file, it is the file
    assert load_attribute("colorsys.py:rgb_to_hls") == 1
    assert callable(importlib.import_module("colorsys").rgb_to_hls)


def test_the_path_is_left_as_it_was_when_an_import_fails(here):
    (here / "my_den.py").write_text("raise KeyError('a')\n")
    before = list(sys.path)
    for path in ("my_den:fox", "my_den.py:fox", "no_such:fox"):
        with pytest.raises(ValueError):
            load_attribute(path)
    assert sys.path == before and "my_den" not in sys.modules


def test_files_by_path(here, monkeypatch):
    (here / "dens").mkdir()
    (here / "dens" / "my_fox.py").write_text("import beside\nclass Den:\n    fox = beside.fox\n")
    (here / "dens" / "beside.py").write_text("fox = 7\n")
    (here / "dens" / "2nd-fox.py").write_text("fox = 8\n")
    monkeypatch.setenv("HOME", str(here))
    for path in (
        "dens/my_fox.py",
        "./dens/my_fox.py",
        "~/dens/my_fox.py",
        f"{here}/dens/my_fox.py",
    ):
        assert load_attribute(f"{path}:Den.fox") == 7
    assert load_attribute("dens/2nd-fox.py:fox") == 8
    found = load_attribute("dens/my_fox.py:Den")
    assert found is load_attribute("./dens/my_fox.py:Den")  # a file is read once
    assert name_of(found) == "my_fox:Den" and sys.modules["my_fox"].Den is found


@pytest.mark.parametrize(
    "source, path, message",
    [
        ("", "my.py:fox", "'my' has no 'fox'$"),
        ("foxes = 1", "my.py:fox", "'my' has no 'fox'; did you mean foxes"),
        ("a = 1\nb = a +", "my.py:fox", r"invalid syntax \(my.py, line 2\)"),
        ("a = 1\nb = c", "my.py:fox", r"NameError: name 'c' is not defined \(my.py, line 2\)"),
        ("raise SystemExit(3)", "my.py:fox", r"SystemExit: 3 \(my.py, line 1\)"),
        ("import no_such", "my.py:fox", "No module named 'no_such'"),
        ("", "no.py:fox", "no file 'no.py'"),
        ("", "dens/no.py:fox", "no file 'dens/no.py'"),
        ("", "my.py", "'my.py' is a file: say what in it, as in my.py:NAME"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(here, source, path, message):
    (here / "my.py").write_text(source + "\n")
    things = Registry("get_fox", "fox")
    with pytest.raises(ValueError, match=f"^get_fox: .*{message}") as e:
        things.find(parse_call(path)[0])
    assert "\n" not in str(e.value)


TRAINS = """
from ddpo_scratch import TrainConfig, fit

def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2))

{guard}fit(TrainConfig(num_epochs=1, logdir="runs"), reward_fn=redness)
"""


@pytest.mark.parametrize("call", ["fit", "ddpo_scratch.train.setup"])
def test_a_script_that_trains_when_it_is_imported_starts_no_run(here, call):
    "Even where it lets no error through: what it defines is not loaded then."
    source = (
        TRAINS.format(guard="") if call == "fit" else "import ddpo_scratch.train\n" + call + "()"
    )
    (here / "script.py").write_text(source)
    with pytest.raises(ValueError) as error:
        REWARDS.find("script.py:redness")
    message = "script.py starts a training run while it is imported for what it defines: put that"
    assert message in str(error.value) and 'under if __name__ == "__main__":' in str(error.value)
    assert not (here / "runs").exists() and "script" not in sys.modules
    (here / "guarded.py").write_text(TRAINS.format(guard='if __name__ == "__main__":\n    '))
    assert REWARDS.find("guarded.py:redness").__module__ == "guarded"
    refuse_in_import("a training run")  # afterwards everything may be started


def test_while_one_thread_imports_another_may_start_a_run(here):
    text = "import threading\nfrom ddpo_scratch.named import refuse_in_import\n"
    text += "thread = threading.Thread(target=refuse_in_import, args=('a run',))\n"
    text += "raised = []\nthreading.excepthook = raised.append\nthread.start()\nthread.join()\n"
    (here / "threads.py").write_text(text)
    hook = threading.excepthook
    try:
        assert load_attribute("threads.py:raised") == []
    finally:
        threading.excepthook = hook


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
    assert misfit(dict, 1, 2, 3) is None  # whose signature Python does not know
    for text, message in (
        ("maker", "missing a required argument: 'size'"),
        ("maker(3, 4)", "too many positional arguments"),
        ("maker(3, word=1)", "unexpected keyword argument 'word'"),
    ):
        name, call = parse_call(text)
        with pytest.raises(ValueError) as e:
            build(maker, call, name, "get_fox", "such as maker(3)")
        assert message in str(e.value)
        assert str(e.value).startswith("get_fox: maker takes (size, *, words=False)")
        assert str(e.value).endswith("; such as maker(3)")
        with pytest.raises(ValueError, match=message):
            build(maker, call, name)
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


def test_sources_say_what_importing_registers():
    "Rewards and prompt sources are told by their decorators, whatever else a module holds."
    own = {name for name in REWARDS if REWARDS[name].__module__.startswith("ddpo_scratch.")}
    assert set(registered("ddpo_scratch.rewards", "reward")) == own
    own = {name for name in SOURCES if SOURCES[name].__module__.startswith("ddpo_scratch.")}
    assert set(registered("ddpo_scratch.prompts", "source")) == own


UNIMPORTED = """
import sys
from ddpo_scratch.named import registered
assert "pickscore" in registered("ddpo_scratch.rewards", "reward")
assert "torch" not in sys.modules
from ddpo_scratch.rewards.base import get_reward
try:
    get_reward("redness - 2*pikscore")
except ValueError as error:
    print(error)
print([name for name in sys.modules if name.startswith("ddpo_scratch.rewards.")])
"""


def test_a_misspelt_reward_is_refused_before_any_of_the_folder_is_imported():
    done = subprocess.run([sys.executable, "-c", UNIMPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no reward called 'pikscore'; did you mean pickscore or" in done.stdout
    assert done.stdout.endswith("['ddpo_scratch.rewards.base']\n")


def brightness(images, prompts):
    return -images.mean((1, 2, 3))


class Judge(Reward):
    name = "aesthetic"

    def __init__(self, strength=1):
        self.strength = strength

    def __call__(self, images, prompts, metadata):
        return self.strength * images.mean((1, 2, 3))


def test_a_name_of_this_package_stands_for_nothing_else():
    "Resumed, a run went on silently with another reward of the same name."
    from ddpo_scratch.prompts import common_animals, from_list, get_prompt_fn
    from ddpo_scratch.rewards.models import HPSv2
    from ddpo_scratch.rewards.ocr import OCR

    here = __name__
    assert name_of(get_reward(brightness)) == f"{here}:brightness"
    assert name_of(WeightedSum({brightness: 1, "redness": -0.1})) == (
        f"{here}:brightness - 0.1*redness"
    )
    assert name_of(Judge()) == f"{here}:Judge" and name_of(Judge(2)) == f"{here}:Judge(2)"
    assert name_of(Judge(strength=math.hypot)) == f"{here}:Judge(...)"
    assert name_of(HPSv2()) == "hpsv2" and name_of(HPSv2("v2.1")) == "hpsv2('v2.1')"
    assert name_of(OCR(reader=len)) == "ocr(...)" and name_of(OCR()) == "ocr"
    assert name_of(from_list(["a"])).endswith(":Prompts(...)")
    assert name_of(get_prompt_fn("common_animals")).endswith("(...)")
    assert name_of(common_animals) == "common_animals"
    assert name_of("brightness") == "brightness"


SAYABLE = [
    *("hpsv2('v2.1')", "tiny_clip_score", "tiny_aesthetic", "target_color((1, 0.5, 0))"),
    *("relative('tiny_clip_score', 'a', 'b')", "-redness + 0.5*target_color('teal')"),
    "redness - 2.0*(blueness + 0.3*brightness)",
]


@pytest.mark.parametrize("text", SAYABLE)
def test_what_a_text_made_is_called_so(text):
    if "(blueness" in text:
        made = WeightedSum([(1, "redness"), (-2, get_reward("blueness + 0.3*brightness"))])
    else:
        made = get_reward(text)
    assert name_of(made) == text and callable(get_reward(text))
    assert name_of(target_color("orange")) == "target_color('orange')"
