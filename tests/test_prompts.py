"What would bore a reader of 24: every list, article and plural, files of odd shape, bad names."

import enum
import hashlib
import itertools
import json
import pathlib
import pickle
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from ddpo_scratch import prompts
from ddpo_scratch.rewards import tiny_animal
from ddpo_scratch.rollout import generator_for

NOUNS = ["common_animals", "other_animals", "everyday_objects", "imagenet_animals"]
FINITE = {
    "common_animals": 45,
    "other_animals": 16,
    "everyday_objects": 16,
    "imagenet_animals": 398,
    "animal_activities": 135,
    "counting": 360,
    "counting(max_count=6)": 225,
    "counting(1, 1, words=True)": 45,
    "imagenet_animals(dogs_only=True)": 118,
    "common_animals(suffix=', 4k')": 45,
    "from_list(['a fox', 'an owl'])": 2,
}


class Rhymes(prompts.Prompts):
    "A user's own source, for `package.module:attribute`."

    def __init__(self, word="cat"):
        self.prompts = [f"a {word} in a hat", f"a {word} on a mat"]


def rhymes(word):
    return Rhymes(word)  # a user's factory


def no_source(word="cat"):
    return f"a {word}"


def one_fox(generator):
    return "a fox", {}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_the_45_animals_of_the_paper():
    animals = prompts.COMMON_ANIMALS
    assert (len(animals), animals[0], animals[-1]) == (45, "cat", "kangaroo")
    every = prompts.COMMON_ANIMALS + prompts.OTHER_ANIMALS + prompts.OBJECTS
    assert len(set(every)) == len(every) == 77


@pytest.mark.parametrize(
    "name, digest",
    [
        ("common_animals", "754c85f16e2b3394"),
        ("other_animals", "053c7451c05d27ac"),
        ("everyday_objects", "e126f0f7626b7ae4"),
        ("animal_activities", "734ebef35abd2f6a"),
        ("counting", "9f6de6874b67d576"),
        ("counting(1, 12, True)", "0f6450926697b008"),
    ],
)
def test_prompts_are_as_they_were(name, digest):
    "Recorded runs rely on every letter, and on the order."
    fn = prompts.get_prompt_fn(name)
    text = json.dumps([fn.prompts, fn.metadata])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_imagenet_names():
    names = prompts.all_prompts("imagenet_animals")
    assert len(names) == len(set(names)) == 398
    assert (names[0], names[397]) == ("a tench", "a puffer")
    assert names[151] == "a Chihuahua"
    assert names[268:270] == ["a Mexican hairless", "a timber wolf"]
    assert not any("," in n for n in names)
    assert prompts.all_prompts("imagenet_animals(dogs_only=True)") == names[151:269]


ARTICLES = {
    "an": "ant|Owl|umbrella|hour|honest fox|eel|onion|uninhabited isle| apple|X-ray|orange fish",
    "a": "European fire salamander|unicorn|house|horse|ewe|one|ukulele|useful cat|yak|striped fish",
}


@pytest.mark.parametrize("article", ARTICLES)
def test_article(article):
    nouns = ARTICLES[article].split("|")
    assert [prompts.article(n) for n in nouns] == [article] * len(nouns)


def test_articles_of_all_nouns_follow_the_first_letter_but_two():
    nouns = prompts.COMMON_ANIMALS + prompts.OTHER_ANIMALS + prompts.OBJECTS
    nouns += [metadata["noun"] for metadata in prompts.imagenet_animals().metadata]
    by_letter = {n: "an" if n[0].lower() in "aeiou" else "a" for n in nouns}
    odd = [n for n in nouns if prompts.article(n) != by_letter[n]]
    assert odd == ["European fire salamander", "European gallinule"]


@pytest.mark.parametrize("noun", ["", "  ", "\n"])
def test_article_of_nothing(noun):
    with pytest.raises(ValueError, match="empty"):
        prompts.article(noun)


@pytest.mark.parametrize("name", NOUNS)
def test_contract(name):
    fn = prompts.get_prompt_fn(name)
    prompt, metadata = fn(generator_for(0, 1, 2, "prompt"))
    assert metadata == {"noun": prompt.split(" ", 1)[1]} and prompt in prompts.all_prompts(name)
    assert fn(generator_for(0, 1, 2, "prompt")) == (prompt, metadata)
    assert len({fn(generator_for(0, 1, i, "prompt"))[0] for i in range(60)}) > 5


@pytest.mark.parametrize("name", FINITE)
def test_finite_sources(name):
    every = prompts.all_prompts(name)
    assert len(every) == len(set(every)) == FINITE[name]
    fn = prompts.get_prompt_fn(name)
    copied = pickle.loads(pickle.dumps(fn))
    draws = [fn(generator_for(0, 0, i, "prompt")) for i in range(50)]
    assert {p for p, _ in draws} <= set(every) and all(isinstance(m, dict) for _, m in draws)
    assert draws == [copied(generator_for(0, 0, i, "prompt")) for i in range(50)]


@pytest.mark.parametrize("name", NOUNS)
def test_a_draw_is_randint_over_the_list(name):
    "Recorded runs rely on it."
    fn = prompts.get_prompt_fn(name)
    for seed in range(5):
        i = torch.randint(FINITE[name], (1,), generator=seeded(seed)).item()
        assert fn(seeded(seed)) == (fn.prompts[i], fn.metadata[i])


def test_only_the_given_generator_is_used():
    state = torch.get_rng_state()
    for name in FINITE:
        prompts.get_prompt_fn(name)(seeded(0))
    assert torch.equal(state, torch.get_rng_state())


def test_options_leave_others_alone():
    photos = prompts.imagenet_animals(prefix="a photo of ", suffix="!")
    assert photos.prompts[1] == "a photo of a goldfish!"
    assert prompts.imagenet_animals().prompts[1] == "a goldfish"
    assert prompts.counting(3, 3).prompts[0] == "3 cats"
    assert repr(prompts.counting(3, 3)) == "<45 prompts, '3 cats' ... '3 kangaroos'>"


@pytest.mark.parametrize("make", [prompts.common_animals, prompts.counting])
def test_a_generator_is_not_an_option(make):
    with pytest.raises(ValueError, match="needs 1 <= min_count|a source draws when it is made"):
        make(torch.Generator())


# ---------------------------------------------------------------- counting


def test_counting_asks_as_ddpo_pytorch_does():
    fn = prompts.counting(min_count=1, max_count=12)
    pairs = dict(zip(fn.prompts, fn.metadata))
    assert pairs["3 foxes"] == {
        "questions": ["How many foxes are there in this image?", "What animal is in this image?"],
        "answers": ["3", "fox"],
    }
    assert pairs["1 goose"]["questions"][0] == "How many geese are there in this image?"
    words = prompts.counting(1, 12, True)
    assert words.metadata[words.prompts.index("twelve wolves")]["answers"] == ["twelve", "wolf"]
    assert "one mouse" in words.prompts


def test_plurals():
    fn = prompts.counting(2, 2)
    plurals = {m["answers"][1]: p.removeprefix("2 ") for p, m in zip(fn.prompts, fn.metadata)}
    odd = {"sheep": "sheep", "deer": "deer", "fox": "foxes", "wolf": "wolves", "fish": "fish"}
    odd |= {"butterfly": "butterflies", "mouse": "mice", "goose": "geese", "fly": "flies"}
    assert plurals == {n: odd.get(n, n + "s") for n in prompts.COMMON_ANIMALS}


def test_counting_draws_number_and_animal_independently():
    n = 6000
    fn = prompts.counting()
    generator = seeded(0)
    draws = Counter(fn(generator)[1]["answers"][0] for _ in range(n))
    deviation = (n / 8 * 7 / 8) ** 0.5
    assert len(draws) == 8 and all(abs(c - n / 8) < 4 * deviation for c in draws.values())


@pytest.mark.parametrize(
    "options",
    [{"min_count": 0}, {"min_count": 5, "max_count": 4}, {"max_count": 1}, {"max_count": 2.5}],
)
def test_counting_bad_range(options):
    with pytest.raises(ValueError, match="needs 1 <= min_count <= max_count"):
        prompts.counting(**options)


def test_metadata_is_a_copy():
    for fn in (prompts.counting(), prompts.from_list([("a fox", {"questions": ["?"]})])):
        fn(seeded(0))[1]["questions"].append("spoilt")
        assert "spoilt" not in fn(seeded(0))[1]["questions"]


# ---------------------------------------------------------------- lists, files, classes


def test_from_list():
    items = ["fox", ("owl", {"answers": ["owl"]})]
    fn = prompts.from_list(items, prefix="a photo of the ", suffix="!")
    assert fn.prompts == ["a photo of the fox!", "a photo of the owl!"]
    assert fn.metadata == [{"line": 0}, {"answers": ["owl"]}]
    assert prompts.from_list(p for p in ("a", "b")).prompts == ["a", "b"]


@pytest.mark.parametrize("bad", ["a fox", [], [1], [("a", "b")], [("a",)], [("a", {}, {})], [None]])
def test_bad_lists(bad):
    with pytest.raises(ValueError, match="from_list"):
        prompts.from_list(bad)


class Endless(prompts.Prompts):
    def __call__(self, generator):
        return f"number {torch.randint(10**9, (1,), generator=generator).item()}", {}


def test_a_subclass_may_draw_as_it_pleases():
    assert Endless()(seeded(1))[0] != Endless()(seeded(2))[0]
    with pytest.raises(ValueError, match="no list of its prompts"):
        prompts.all_prompts(Endless())
    with pytest.raises(NotImplementedError, match="Prompts lists no prompts"):
        prompts.Prompts()(torch.Generator())
    assert repr(Endless()) == "<Endless>"


def test_files(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa cr\u00eape\r\n\r\n  a fox \r\n".encode())
    lines = ["a cr\u00eape", "a fox"]
    assert prompts.from_file(path).prompts == prompts.from_file(str(path)).prompts == lines
    monkeypatch.chdir(tmp_path)
    assert prompts.all_prompts("list.txt") == prompts.all_prompts(str(path)) == lines
    photos = prompts.all_prompts("from_file('list.txt', prefix='a photo of ')")
    assert photos == ["a photo of a cr\u00eape", "a photo of a fox"]
    odd = tmp_path / "no_suffix (1)"
    odd.write_text("an owl\n")
    assert prompts.get_prompt_fn(str(odd))(torch.Generator()) == ("an owl", {"line": 0})


def test_bad_files(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for path in (tmp_path / "empty.txt", tmp_path / "missing.txt", tmp_path):
        with pytest.raises(ValueError, match="from_file"):
            prompts.from_file(path)
    with pytest.raises(ValueError, match="no file"):
        prompts.get_prompt_fn(str(tmp_path / "missing.txt"))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "animals.txt").write_text("a fox", encoding="utf-16")
    with pytest.raises(ValueError, match="animals.txt' is not UTF-8 text .*: save it as UTF-8"):
        prompts.from_file(tmp_path / "animals.txt")


FILES = {
    "comments": (
        "a.txt",
        "# mine\na fox\n  # not this\nan owl # but this\n",
        ["a fox", "an owl # but this"],
    ),
    "odd line ends": (
        "a.txt",
        "a\u2028b\x0bc\x0cd\x85e\nf\rg\r\nh",
        ["a\u2028b\x0bc\x0cd\x85e", "f\rg", "h"],
    ),
    "no ending": ("list", "a fox\n", ["a fox"]),
    "jsonl": ("a.jsonl", '{"prompt": "a fox"}\r\n\n"an owl"\n', ["a fox", "an owl"]),
    "odd ends in jsonl": ("a.jsonl", '{"prompt": "a\u2028b"}', ["a\u2028b"]),
    "JSONL": ("a.JSONL", '{"prompt": "a fox"}', ["a fox"]),
    "csv": ("a.csv", 'n,prompt\n1,"a fox, red"\n2, an owl \n\n', ["a fox, red", "an owl"]),
    "csv with a line break": ("a.csv", 'prompt\n"a\nfox"\n', ["a\nfox"]),
}


@pytest.mark.parametrize("name, text, want", FILES.values(), ids=FILES)
def test_kinds_of_files(name, text, want, tmp_path):
    (tmp_path / name).write_bytes(("\ufeff" + text).encode())
    assert prompts.all_prompts(str(tmp_path / name)) == want
    assert prompts.from_file(tmp_path / name, suffix="!").prompts == [f"{p}!" for p in want]


def test_metadata_of_files(tmp_path):
    geneval = {"tag": "counting", "include": [{"class": "fox", "count": 3}], "prompt": "3 foxes"}
    nested = {"prompt": "an owl", "metadata": {"noun": "owl"}, "n": 1}
    lines = [json.dumps(geneval), json.dumps(nested), json.dumps({"prompt": "a cat"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    fn = prompts.get_prompt_fn(str(tmp_path / "a.jsonl"))
    want = {key: value for key, value in geneval.items() if key != "prompt"}
    assert fn.metadata == [want, {"n": 1, "noun": "owl"}, {"line": 2}]
    (tmp_path / "a.csv").write_text("prompt,noun\na fox,fox\n")
    assert prompts.get_prompt_fn(str(tmp_path / "a.csv")).metadata == [{"noun": "fox"}]


WRONG = {
    "JSON lines in a text file": (
        "a.txt",
        '{"prompt": "a fox"}\n',
        "give the file's name the ending .jsonl",
    ),
    "a list in JSON": (
        "a.json",
        '["a fox"]',
        "one object a line, and give the name the ending .jsonl",
    ),
    "a program": ("a.py", "x = 3", r"write .*a.py:NAME"),
    "only comments": ("a.txt", "# a fox\n", "holds no prompt"),
    "a NUL byte": ("a.txt", "a\0fox\n", "NUL byte"),
    "two megabytes": ("a.txt", "fox " * 500_000, "1,999,999 characters, .*at most 10,000"),
    "half a character": ("a.jsonl", '{"prompt": "\\ud800"}', "half of a character"),
    "not JSON": ("a.jsonl", '{"prompt": "a fox"}\n{"prompt"', "line 2, is not JSON"),
    "very deep": ("a.jsonl", "[" * 100_000, "line 1, is not JSON"),
    "no prompt": (
        "a.jsonl",
        '{"text": "a", "tag": 1}',
        "line 1, has text, tag: needs a text called",
    ),
    "an empty prompt": (
        "a.jsonl",
        '{"prompt": " "}',
        "line 1, has prompt: needs a text called prompt",
    ),
    "a number": ("a.jsonl", "3", "line 1, is no object"),
    "no column": ("a.csv", "text,n\na fox,1\n", "line 2, has text, n: needs a text called prompt"),
    "an empty cell": ("a.csv", "prompt,n\n,1\n", "line 2, has prompt, n: needs a text called"),
    "a comma too many": ("a.csv", "prompt\na fox, red\n", "line 2, has 2 fields, the header 1"),
    "only a header": ("a.csv", "prompt\n", "holds no prompt"),
    "a large field": ("a.csv", "prompt\n" + "a" * 200_000, "is not CSV: field larger"),
}


@pytest.mark.parametrize("name, text, message", WRONG.values(), ids=WRONG)
def test_files_that_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=f"(?s)^from_.*{message}") as e:
        prompts.get_prompt_fn(str(tmp_path / name))
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


# ---------------------------------------------------------------- what people bring along


class Word(str, enum.Enum):
    FOX = "a fox"


class Text(str):
    pass


PLAIN = {
    "numpy": (np.str_("a fox"), "a fox"),
    "an enumeration": (Word.FOX, "a fox"),
    "a class of one's own": (Text("a fox"), "a fox"),
}


@pytest.mark.parametrize("given, want", PLAIN.values(), ids=PLAIN)
def test_prompts_become_plain_strings(given, want):
    def draws(generator):
        return given, {given: given}

    def listed(generator):
        return "x"

    listed.prompts = [given]
    prompt, metadata = prompts.get_prompt_fn(draws)(seeded(0))
    drawn = [prompt, *metadata, *metadata.values(), prompts.all_prompts(listed)[0]]
    drawn += prompts.from_list([given, (given, {})]).prompts
    own = prompts.Prompts()
    own.prompts = [given]
    drawn += [own(seeded(0))[0], prompts.all_prompts(own)[0]]
    assert drawn == [want] * len(drawn) and {type(text) for text in drawn} == {str}


METADATA = {
    "numbers of numpy": (
        {"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True)},
        {"a": 3, "b": 0.5, "c": True},
    ),
    "arrays": (
        {"a": np.arange(2), "b": torch.ones(1), "c": torch.tensor(2)},
        {"a": [0, 1], "b": [1.0], "c": 2},
    ),
    "a path": ({"a": pathlib.PurePosixPath("a/b")}, {"a": "a/b"}),
    "tuples": ({"a": (1, (2,))}, {"a": [1, [2]]}),
    "nothing": (None, {}),
    "dicts": ({"a": {1: None, "b": {"c": 2**70}}}, {"a": {1: None, "b": {"c": 2**70}}}),
}


@pytest.mark.parametrize("given, want", METADATA.values(), ids=METADATA)
def test_metadata_become_plain(given, want):
    _, metadata = prompts.get_prompt_fn(lambda g: ("a fox", given))(seeded(0))
    assert metadata == want and repr(metadata) == repr(want)
    json.dumps(metadata)


def as_in_trl():
    return np.random.choice(["a fox", "an owl", "an ant"]), {}


def as_in_ddpo_pytorch():
    return random.choice(["a fox", "an owl", "an ant"]), {"u": torch.rand(1).item()}


def with_an_option(n=3):
    return f"{n} foxes", {}


def alone(generator):
    return ["a fox", "an owl"][torch.randint(2, (1,), generator=generator).item()]


@pytest.mark.parametrize("fn", [as_in_trl, as_in_ddpo_pytorch, with_an_option, alone])
def test_functions_without_a_generator_or_metadata(fn):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    one, two = prompts.get_prompt_fn(fn), prompts.get_prompt_fn(f"{__name__}:{fn.__name__}")
    draws = [one(generator_for(0, 1, i, "prompt")) for i in range(40)]
    assert draws[20:] == [two(generator_for(0, 1, i, "prompt")) for i in range(20, 40)]
    assert len({p for p, _ in draws}) == {with_an_option: 1, alone: 2}.get(fn, 3)
    assert all(type(p) is str and type(m) is dict for p, m in draws)
    g = seeded(0)
    assert fn is with_an_option or len({one(g)[0] for _ in range(40)}) > 1  # a shared one goes on
    copied = pickle.loads(pickle.dumps(one))
    assert copied(seeded(5)) == one(seeded(5))
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert now == states


def test_looks_show_the_metadata_that_training_gives():
    "A list of prompts without metadata: what a draw says of them is not made up."
    from ddpo_scratch.evaluate import spread_prompts

    def told(generator):
        return "a fox", {"noun": "fox"}

    def silent(generator):
        return "a fox"

    for fn, metadata in ((told, {"noun": "fox"}), (silent, {})):
        fn.prompts = ["a fox", "an owl"]
        source = prompts.get_prompt_fn(fn)
        assert source(seeded(0)) == ("a fox", metadata)
        assert spread_prompts(source, 4)[1] == [metadata] * 4
        assert prompts.all_prompts(source) == fn.prompts
        assert source.draws_tell is bool(metadata)
    assert spread_prompts(source, 4)[0] == ["a fox", "a fox", "an owl", "an owl"]
    silent.metadata = [{"n": 1}, {"n": 2}]
    assert spread_prompts(prompts.get_prompt_fn(silent), 2)[1] == silent.metadata
    lines = prompts.get_prompt_fn("from_list(['a fox', 'an owl'])")
    assert spread_prompts(lines, 2)[1] == [{"line": 0}, {"line": 1}] and not lines.draws_tell


def test_a_function_that_uses_its_generator_draws_as_before():
    for i in range(5):
        key = (0, 3, i, "prompt")
        assert prompts.get_prompt_fn(alone)(generator_for(*key))[0] == alone(generator_for(*key))


def make_rhymes():
    return Rhymes("fox")


def of_two(first, second):
    return "a fox"


count = itertools.count()
BAD_FUNCTIONS = {
    "a number": (lambda g: 3, "gave '3' of type int: needs a prompt, or a pair"),
    "nothing": (lambda: None, "gave 'None' of type NoneType"),
    "three": (
        lambda g: ("a", {}, 1),
        "of type tuple: needs a prompt, or a pair of a prompt and a dict",
    ),
    "no dict": (lambda g: ("a", "b"), "needs a prompt, or a pair"),
    "bytes": (lambda g: b"a fox", "of type bytes"),
    "a generator function": (lambda g: (yield "a fox"), "of type generator"),
    "a source": (make_rhymes, "made a source: write it with brackets"),
    "two arguments": (of_two, r"cannot be called as f\(generator\), nor as f\(\): .*with brackets"),
    "a counter": (
        lambda: f"fox {next(count)}",
        "drew 'fox 0' and then 'fox 1' from equal generators",
    ),
    "a picture": (lambda g: ("a", {"x": object()}), "type object: need text, numbers"),
    "long": (lambda g: "a" * 20_000, "of 20,000 characters"),
}


@pytest.mark.parametrize("fn, message", BAD_FUNCTIONS.values(), ids=BAD_FUNCTIONS)
def test_functions_that_are_refused(fn, message):
    with pytest.raises(ValueError, match=f"^prompt function '.*{message}") as e:
        prompts.get_prompt_fn(fn)(seeded(0))
    assert "\n" not in str(e.value)
    if fn is make_rhymes:
        assert prompts.all_prompts(f"{__name__}:make_rhymes()")[0] == "a fox in a hat"


def test_every_source_says_what_it_asks_for():
    for name, make in prompts.SOURCES.items():
        assert len(make.__doc__.splitlines()[0]) > 20, name


# ---------------------------------------------------------------- by name


@pytest.mark.parametrize(
    "name, message",
    [
        ("comon_animals", "did you mean common_animals"),
        ("countin(max_count=3)", "did you mean counting"),
        (
            "qqq",
            r"known: from_list, .*, counting, .*the path of a \.txt, \.jsonl or \.csv file, FILE",
        ),
        ("no_such_module:fn", "cannot load 'no_such_module:fn'"),
        ("ddpo_scratch.prompts:nothing", "cannot load"),
        ("ddpo_scratch.prompts:", "cannot read"),
        (":fn", "cannot read"),
        ("ddpo_scratch.prompts:OBJECTS", "is of type list"),
        ("from_list", "missing a required argument"),
        ("from_file", "missing a required argument"),
        ("", "cannot read"),
        (3, "is of type int"),
        (None, "is of type NoneType"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=f"^get_prompt_fn: .*{message}"):
        prompts.get_prompt_fn(name)


@pytest.mark.parametrize(
    "text",
    [
        "counting(",
        "counting)",
        "counting(max_count=n)",
        "counting() + counting()",
        "2*counting",
        "counting(open('x'))",
        "counting(maximum=3)",
        "counting(1, 2, False, 4)",
        "animal_activities(prefix='x')",
        "from_list()",
    ],
)
def test_bad_calls(text):
    with pytest.raises(ValueError, match="get_prompt_fn"):
        prompts.get_prompt_fn(text)


@pytest.mark.parametrize(
    "text, word",
    [
        ("Rhymes", "cat"),
        ("Rhymes()", "cat"),
        ("Rhymes(word='fox (red)')", "fox (red)"),
        ("rhymes('a:b')", "a:b"),
    ],
)
def test_a_users_own(text, word):
    assert prompts.all_prompts(f"{__name__}:{text}")[0] == f"a {word} in a hat"


def test_functions_and_classes_are_taken_as_they_are():
    assert prompts.all_prompts(Rhymes)[0] == "a cat in a hat"
    fn = prompts.get_prompt_fn(f"{__name__}:one_fox")
    assert fn.function is one_fox and prompts.get_prompt_fn(fn) is fn
    for made in (prompts.common_animals, "ddpo_scratch.prompts:common_animals"):
        assert prompts.all_prompts(made)[0] == "a cat"


@pytest.mark.parametrize(
    "text, message",
    [
        ("rhymes(wrd='x')", r"rhymes takes \(word\)"),
        ("no_source()", "is of type str"),
        ("Rhymes(1, 2)", "too many positional"),
    ],
)
def test_a_users_mistakes(text, message):
    with pytest.raises(ValueError, match=f"get_prompt_fn: .*{message}"):
        prompts.get_prompt_fn(f"{__name__}:{text}")


def test_a_long_list_is_not_a_path():
    text = f"from_list({[f'a fox number {i}' for i in range(500)]!r})"
    assert len(prompts.all_prompts(text)) == 500


# ---------------------------------------------------------------- Pick-a-Pic


@pytest.fixture
def folder(tmp_path):
    "A dataset of the published one's form: parquet files named by split, several rows a caption."
    datasets = pytest.importorskip(
        "datasets",
        reason="the extra pickapic is not installed: pip install 'ddpo_scratch[pickapic]'",
    )
    captions = ["a fox in a spacesuit", "  Castle, fog, 4k", "cat wearing a crown", "", None]
    for split, part in (("train", captions), ("validation_unique", ["an owl"])):
        rows = [{"caption": c, "label_0": 0.5, "user_id": k} for c in part for k in range(3)]
        file = tmp_path / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet"
        datasets.Dataset.from_list(rows).to_parquet(file)
    return str(tmp_path)


def test_pick_a_pic_streams_a_local_dataset(folder):
    train = prompts.get_prompt_fn(f"pick_a_pic(dataset={folder!r})")
    assert train.prompts == ["a fox in a spacesuit", "Castle, fog, 4k", "cat wearing a crown"]
    assert all(m == {"dataset": folder, "split": "train"} for m in train.metadata)
    assert prompts.all_prompts(f"pick_a_pic('validation_unique', dataset={folder!r})") == ["an owl"]
    assert prompts.all_prompts(f"pick_a_pic(n=2, dataset={folder!r})") == train.prompts[:2]
    assert prompts.pick_a_pic(dataset=folder).prompts == train.prompts  # after a restart


def test_pick_a_pic_names_columns_and_splits(folder):
    with pytest.raises(ValueError, match="no column 'prompt': it has caption"):
        prompts.pick_a_pic(dataset=folder, column="prompt")
    with pytest.raises(ValueError, match="(?i)split"):
        prompts.pick_a_pic(split="tset", dataset=folder)


class FakeDatasets:
    "A module with the one call that is made, which counts the rows that are read."

    rows = 0
    __spec__ = object()

    def load_dataset(self, name, split, streaming):
        assert streaming and name == "yuvalkirstain/pickapic_v1_no_images"
        for k in range(10**9):
            self.rows += 1
            yield {"caption": f"{split} {k // 4}"}


def test_pick_a_pic_reads_once_and_no_more_than_it_needs(monkeypatch):
    fake = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    fn = prompts.get_prompt_fn("pick_a_pic(split='test', n=50)")
    draws = [fn(generator_for(0, 0, i, "prompt")) for i in range(200)]
    assert fake.rows == 4 * 49 + 1  # the first row of the fiftieth caption is the last one read
    assert {m["split"] for _, m in draws} == {"test"} and len({p for p, _ in draws}) > 40


@pytest.mark.parametrize("text", ["pick_a_pic", "pick_a_pic(split='train')"])
def test_pick_a_pic_without_datasets(monkeypatch, text):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'ddpo_scratch\[pickapic\]'"):
        prompts.get_prompt_fn(text)


@pytest.mark.parametrize("n", [0, -3, 2.5])
def test_pick_a_pic_of_no_captions(n):
    with pytest.raises(ValueError, match=f"n is {n}: needs a whole number of at least 1, or None"):
        prompts.pick_a_pic(n=n)


# ---------------------------------------------------------------- as a Dataset


def batches(data, **options):
    loader = torch.utils.data.DataLoader(data, batch_size=5, collate_fn=prompts.collate, **options)
    return list(loader)


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 2},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
    ],
)
def test_same_batches_for_any_workers(options):
    data = prompts.PromptDataset("counting(max_count=6)", 23, seed=5)
    here = batches(data)
    assert batches(data, **options) == here and [len(p) for p, _ in here] == [5, 5, 5, 5, 3]
    for part, metadata in here:
        assert isinstance(part, list) and isinstance(metadata, list)
        assert set(metadata[0]) == {"questions", "answers"}


def listed(n, seed=0):
    return [prompt for prompt, _ in prompts.PromptDataset("imagenet_animals", n, seed=seed)]


def test_dataset_draws_are_keyed_by_seed_and_item():
    first = listed(300)
    assert len(first) == 300 and len(set(first)) > 150  # 398 names, 300 draws: 211 expected
    assert listed(300) == first == listed(400)[:300]  # a longer one begins the same
    other = listed(300, seed=1)
    assert sum(a == b for a, b in zip(first, other)) < 8  # 0.75 expected by chance
    assert sum(a == b for a, b in zip(first[1:], other)) < 8  # a seed is not a shift of another


def test_dataset_items():
    data = prompts.PromptDataset("imagenet_animals", 300)
    assert len(data) == 300 and data[-1] == data[299] and data[torch.tensor(3)] == data[3]
    for i in (300, -301):
        with pytest.raises(IndexError, match="among 300"):
            data[i]
    assert prompts.PromptDataset(one_fox, 1, seed=-1)[0] == ("a fox", {})
    with pytest.raises(ValueError, match="n is 0"):
        prompts.PromptDataset("counting", 0)
    with pytest.raises(ValueError, match="did you mean counting"):
        prompts.PromptDataset("countin", 3)


def test_dataset_of_a_runs_own_prompts():
    def generator(i):
        return generator_for(42, 3, i, "prompt")

    data = prompts.PromptDataset("common_animals", 16, generator=generator)
    animals = prompts.common_animals()
    assert list(data) == [animals(generator(i)) for i in range(16)]


@pytest.mark.parametrize("name", ["common_animals", "other_animals", "everyday_objects"])
def test_the_packages_own_words_need_no_dictionary(name, monkeypatch):
    "The library inflect takes two seconds to import: more than the rest of a short run's prompts."
    expected = prompts.all_prompts(name)
    monkeypatch.setitem(sys.modules, "inflect", None)
    prompts._english.cache_clear()
    assert prompts.all_prompts(name) == expected
    judge = tiny_animal._concept
    assert [judge(prompt, {}) for prompt in expected] == [
        judge("", {"noun": prompt.split(" ", 1)[1]}) for prompt in expected
    ]
    with pytest.raises(ImportError):
        prompts.article("hour")
    prompts._english.cache_clear()
