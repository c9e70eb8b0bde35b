"What would bore a reader of 02: every list, every article and plural, files of odd shape, bad names; and that nothing heavy is imported."
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import torch

from ddpo_scratch import prompts
from ddpo_scratch.rollout import generator_for

NOUNS = ["common_animals", "other_animals", "everyday_objects", "imagenet_animals"]
FINITE = {**dict(zip(NOUNS, (45, 16, 16, 398))), "animal_activities": 135, "counting": 360, "counting(max_count=6)": 225, "counting(1, 1, words=True)": 45,
          "imagenet_animals(dogs_only=True)": 118, "common_animals(suffix=', 4k')": 45, "from_list(['a fox', 'an owl'])": 2}


class Rhymes(prompts.Prompts):
    "A user's own source, for `package.module:attribute`."
    def __init__(self, word="cat"): self.prompts = [f"a {word} in a hat", f"a {word} on a mat"]


def rhymes(word): return Rhymes(word)  # a user's factory
def no_source(word="cat"): return f"a {word}"
def one_fox(generator): return "a fox", {}


def test_the_45_animals_of_the_paper():
    assert len(prompts.COMMON_ANIMALS) == 45 and prompts.COMMON_ANIMALS[0] == "cat" and prompts.COMMON_ANIMALS[-1] == "kangaroo"
    every = prompts.COMMON_ANIMALS + prompts.OTHER_ANIMALS + prompts.OBJECTS
    assert max(Counter(every).values()) == 1 and len(every) == 77


def test_imagenet_names():
    names = prompts.all_prompts("imagenet_animals")
    assert len(names) == len(set(names)) == 398 and names[0] == "a tench" and names[397] == "a puffer"
    assert names[151] == "a Chihuahua" and names[268] == "a Mexican hairless" and names[269] == "a timber wolf"
    assert not any("," in n for n in names)
    assert prompts.all_prompts("imagenet_animals(dogs_only=True)") == names[151:269]


@pytest.mark.parametrize("noun, want", [("ant", "an"), ("Owl", "an"), ("European fire salamander", "a"), ("unicorn", "a"), ("umbrella", "an"), ("hour", "an"),
                                        ("honest fox", "an"), ("house", "a"), ("horse", "a"), ("eel", "an"), ("ewe", "a"), ("one", "a"), ("onion", "an"),
                                        ("ukulele", "a"), ("useful cat", "a"), ("usher", "an"), ("uninhabited isle", "an"), (" apple", "an"), ("yak", "a")])
def test_article(noun, want): assert prompts.article(noun) == want


def test_articles_agree_with_inflect():
    import inflect
    english = inflect.engine()
    nouns = prompts.COMMON_ANIMALS + prompts.OTHER_ANIMALS + prompts.OBJECTS + prompts._imagenet_nouns()
    assert [f"{prompts.article(n)} {n}" for n in nouns] == [english.a(n) for n in nouns]


@pytest.mark.parametrize("noun", ["", "  ", "\n"])
def test_article_of_nothing(noun):
    with pytest.raises(ValueError, match="empty"): prompts.article(noun)


@pytest.mark.parametrize("name", NOUNS)
def test_contract(name):
    fn = prompts.get_prompt_fn(name)
    prompt, metadata = fn(generator_for(0, 1, 2, "prompt"))
    assert isinstance(prompt, str) and metadata == {"noun": prompt.split(" ", 1)[1]} and prompt in prompts.all_prompts(name)
    assert fn(generator_for(0, 1, 2, "prompt")) == (prompt, metadata)
    assert len({fn(generator_for(0, 1, i, "prompt"))[0] for i in range(60)}) > 5


@pytest.mark.parametrize("name", FINITE)
def test_finite_sources(name):
    every, fn = prompts.all_prompts(name), prompts.get_prompt_fn(name)
    assert len(every) == len(set(every)) == FINITE[name]
    draws = [fn(generator_for(0, 0, i, "prompt")) for i in range(50)]
    assert {p for p, _ in draws} <= set(every) and all(isinstance(m, dict) for _, m in draws)
    assert draws == [pickle.loads(pickle.dumps(fn))(generator_for(0, 0, i, "prompt")) for i in range(50)]


def test_draws_did_not_change():
    "The draw of a noun is torch.randint over the list: recorded runs rely on it."
    for name, nouns in (("common_animals", prompts.COMMON_ANIMALS), ("imagenet_animals", prompts._imagenet_nouns())):
        for seed in range(5):
            i = torch.randint(len(nouns), (1,), generator=torch.Generator().manual_seed(seed)).item()
            assert prompts.get_prompt_fn(name)(torch.Generator().manual_seed(seed))[1] == {"noun": nouns[i]}


def test_only_the_given_generator_is_used():
    state = torch.get_rng_state()
    for name in FINITE: prompts.get_prompt_fn(name)(torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


def test_options():
    fn = prompts.imagenet_animals(prefix="a photo of ")
    assert fn(suffix=", high quality").prompts[1] == "a photo of a goldfish, high quality"  # options add up
    assert fn.prompts[1] == "a photo of a goldfish" and prompts.imagenet_animals.prompts[1] == "a goldfish"  # and leave the others alone
    assert repr(fn) == "<prompts imagenet_animals(prefix='a photo of ')>" and prompts.counting(3, 3).prompts[0] == "3 cats"
    for wrong in (lambda: prompts.counting(3, maximum=4), lambda: prompts.counting(2, 3, True, 5), lambda: prompts.counting(torch.Generator(), max_count=3)):
        with pytest.raises(ValueError, match="(?i)^counting: .*generator"): wrong()


def test_a_list_that_was_made_travels_with_the_pickle(monkeypatch):
    fn = prompts.counting(max_count=3)
    fn.prompts
    data = pickle.dumps(fn)
    monkeypatch.setitem(sys.modules, "inflect", None)  # now it could not be made again
    assert pickle.loads(data).prompts[0] == "2 cats"
    with pytest.raises(ImportError): prompts.counting(max_count=4).prompts


# ---------------------------------------------------------------- counting

def test_counting_says_what_peers_say():
    fn = prompts.counting(min_count=1, max_count=12)
    pairs = dict(zip(fn.prompts, fn.metadata))
    assert pairs["3 foxes"] == {"questions": ["How many foxes are there in this image?", "What animal is in this image?"], "answers": ["3", "fox"]}
    assert pairs["1 goose"]["questions"][0] == "How many geese are there in this image?" and "12 butterflies" in pairs
    words = prompts.counting(1, 12, True)
    assert dict(zip(words.prompts, words.metadata))["twelve wolves"]["answers"] == ["twelve", "wolf"] and "one mouse" in words.prompts
    plurals = {m["answers"][1]: p.split(" ", 1)[1] for p, m in zip(words.prompts, words.metadata) if m["answers"][0] == "two"}
    odd = {"sheep": "sheep", "deer": "deer", "fox": "foxes", "wolf": "wolves", "butterfly": "butterflies", "fish": "fish", "mouse": "mice", "goose": "geese", "fly": "flies"}
    assert plurals == {n: odd.get(n, n + "s") for n in prompts.COMMON_ANIMALS}


def test_counting_draws_number_and_animal_independently():
    n, draws = 6000, Counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(n): draws[prompts.counting(generator)[1]["answers"][0]] += 1
    assert len(draws) == 8 and all(abs(c - n/8) < 4 * (n/8 * 7/8)**.5 for c in draws.values())


@pytest.mark.parametrize("options", [dict(min_count=0), dict(min_count=5, max_count=4), dict(max_count=1)])
def test_counting_bad_range(options):
    with pytest.raises(ValueError, match="needs 1 <= min_count <= max_count"): prompts.counting(**options).prompts


def test_metadata_is_a_copy():
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    for fn in (prompts.counting, prompts.from_list([("a fox", {"questions": ["?"]})])):
        fn(g())[1]["questions"].append("spoilt")
        assert "spoilt" not in fn(g())[1]["questions"]


# ---------------------------------------------------------------- lists, files, classes

def test_from_list():
    fn = prompts.from_list(["fox", ("owl", {"answers": ["owl"]})], prefix="a photo of the ", suffix="!")
    assert fn.prompts == ["a photo of the fox!", "a photo of the owl!"] and fn.metadata == [{"line": 0}, {"answers": ["owl"]}]
    assert isinstance(fn, prompts.Prompts) and prompts.from_list(p for p in ("a", "b")).prompts == ["a", "b"]


@pytest.mark.parametrize("bad", ["a fox", [], [1], [("a", "b")], [("a",)], [("a", {}, {})], [None]])
def test_bad_lists(bad):
    with pytest.raises(ValueError, match="from_list"): prompts.from_list(bad)


def test_a_subclass_may_draw_as_it_pleases():
    class Endless(prompts.Prompts):
        def __call__(self, generator): return f"number {torch.randint(10**9, (1,), generator=generator).item()}", {}
    assert Endless()(torch.Generator().manual_seed(1))[0] != Endless()(torch.Generator().manual_seed(2))[0]
    with pytest.raises(ValueError, match="no list of its prompts"): prompts.all_prompts(Endless())
    with pytest.raises(NotImplementedError, match="Prompts lists no prompts"): prompts.Prompts()(torch.Generator())


def test_files(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa cr\u00eape\r\n\r\n  a fox \r\n".encode())
    for p in (path, str(path)):
        assert prompts.from_file(p).prompts == ["a cr\u00eape", "a fox"]
    monkeypatch.chdir(tmp_path)
    assert prompts.get_prompt_fn("list.txt").prompts == prompts.all_prompts(str(path)) == ["a cr\u00eape", "a fox"]
    assert prompts.all_prompts("from_file('list.txt', prefix='a photo of ')") == ["a photo of a cr\u00eape", "a photo of a fox"]
    (tmp_path / "no_suffix (1)").write_text("an owl\n")
    assert prompts.get_prompt_fn(str(tmp_path / "no_suffix (1)"))(torch.Generator()) == ("an owl", {"line": 0})


def test_bad_files(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for p in (tmp_path / "empty.txt", tmp_path / "missing.txt", tmp_path):
        with pytest.raises(ValueError, match="from_file"): prompts.from_file(p)
    with pytest.raises(ValueError, match="no file"): prompts.get_prompt_fn(str(tmp_path / "missing.txt"))


# ---------------------------------------------------------------- by name

def test_bad_names():
    with pytest.raises(ValueError, match="did you mean common_animals"): prompts.get_prompt_fn("comon_animals")
    with pytest.raises(ValueError, match="did you mean counting"): prompts.get_prompt_fn("countin(max_count=3)")
    with pytest.raises(ValueError, match="known: common_animals"): prompts.get_prompt_fn("qqq")
    for name in ("no_such_module:fn", "ddpo_scratch.prompts:nothing", "ddpo_scratch.prompts:", ":fn", "ddpo_scratch.prompts:OBJECTS", "from_list", "from_file", "", 3, None):
        with pytest.raises(ValueError, match="get_prompt_fn"): prompts.get_prompt_fn(name)
    with pytest.raises(ValueError, match="prompts"): prompts.all_prompts(lambda g: ("x", {}))


@pytest.mark.parametrize("text", ["counting(", "counting)", "counting(max_count=n)", "counting(max_count=1+n)", "counting(**{'max_count': 3})", "counting(*[2, 3])",
                                  "counting()()", "counting() + counting()", "counting(open('x'))", "(counting)()", "counting(maximum=3)",
                                  "counting(1, 2, False, 4)", "animal_activities(prefix='x')", "from_list()"])
def test_bad_calls(text):
    with pytest.raises(ValueError, match="get_prompt_fn"): prompts.get_prompt_fn(text)


def test_text_of_a_users_own(monkeypatch):
    for text, want in (("test_prompts:Rhymes", "cat"), ("test_prompts:Rhymes()", "cat"), ("test_prompts:Rhymes(word='fox (red)')", "fox (red)"), ("test_prompts:rhymes('a:b')", "a:b")):
        assert prompts.all_prompts(text)[0] == f"a {want} in a hat"
    assert prompts.all_prompts(Rhymes)[0] == "a cat in a hat" and prompts.get_prompt_fn("test_prompts:one_fox") is not None
    assert prompts.get_prompt_fn("test_prompts:one_fox")(torch.Generator()) == ("a fox", {})
    for text, said in (("test_prompts:rhymes(wrd='x')", "wrd"), ("test_prompts:no_source()", "is a str"), ("test_prompts:Rhymes(1, 2)", "too many positional")):
        with pytest.raises(ValueError, match=said): prompts.get_prompt_fn(text)


def test_a_long_list_is_no_path():
    text = f"from_list({[f'a fox number {i}' for i in range(500)]!r})"
    assert len(prompts.all_prompts(text)) == 500


# ---------------------------------------------------------------- Pick-a-Pic

@pytest.fixture
def folder(tmp_path):
    "A dataset of the published one's form: parquet files named by split, several rows a caption."
    datasets = pytest.importorskip("datasets", reason="the extra pickapic is not installed: pip install 'ddpo_scratch[pickapic]'")
    captions = ["a fox in a spacesuit", "  Castle, fog, 4k", "cat wearing a crown", "", None]
    for split, part in (("train", captions), ("validation_unique", ["an owl"])):
        rows = [{"caption": c, "label_0": 0.5, "user_id": k} for c in part for k in range(3)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet")
    return str(tmp_path)


def test_pick_a_pic_streams_a_local_dataset(folder):
    train = prompts.get_prompt_fn(f"pick_a_pic(dataset={folder!r})")
    assert train.prompts == ["a fox in a spacesuit", "Castle, fog, 4k", "cat wearing a crown"]
    assert all(m == {"dataset": folder, "split": "train"} for m in train.metadata)
    assert prompts.all_prompts(f"pick_a_pic('validation_unique', dataset={folder!r})") == ["an owl"]
    assert prompts.all_prompts(f"pick_a_pic(n=2, dataset={folder!r})") == train.prompts[:2]
    epoch = lambda fn, samples: [fn(generator_for(0, 3, i, "prompt"))[0] for i in samples]  # noqa: E731
    again = prompts.pick_a_pic(dataset=folder)  # another process, or after a restart
    whole = epoch(train, range(32))
    assert epoch(again, range(0, 32, 2)) == whole[::2] and epoch(again, range(1, 32, 2)) == whole[1::2] and len(set(whole)) == 3
    with pytest.raises(ValueError, match="no column 'prompt': it has caption"): prompts.pick_a_pic(dataset=folder, column="prompt").prompts
    with pytest.raises(ValueError, match="(?i)split"): prompts.pick_a_pic(split="tset", dataset=folder).prompts


class FakeDatasets:
    "A module with the one call that is made, which counts the rows that are read."
    read = 0
    __spec__ = object()
    def load_dataset(self, name, split, streaming):
        assert streaming and name == "yuvalkirstain/pickapic_v1_no_images"
        for k in range(10**9):
            self.read += 1
            yield {"caption": f"{split} {k // 4}"}


def test_pick_a_pic_reads_once_and_no_more_than_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", fake := FakeDatasets())
    fn = prompts.get_prompt_fn("pick_a_pic(split='test', n=50)")
    assert fake.read == 0  # not before the first draw
    draws = [fn(generator_for(0, 0, i, "prompt")) for i in range(200)]
    assert fake.read == 4*49 + 1 and {m["split"] for _, m in draws} == {"test"} and len({p for p, _ in draws}) > 40


def test_pick_a_pic_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for ask in (lambda: prompts.get_prompt_fn("pick_a_pic(split='train')"), lambda: prompts.pick_a_pic(torch.Generator())):
        with pytest.raises(ImportError, match=r"pip install 'ddpo_scratch\[pickapic\]'"): ask()


# ---------------------------------------------------------------- as a Dataset

def loaded(data, **options):
    return [b for b in torch.utils.data.DataLoader(data, batch_size=5, collate_fn=prompts.collate, **options)]


@pytest.mark.parametrize("options", [dict(num_workers=1), dict(num_workers=2), dict(num_workers=1, multiprocessing_context="spawn")])
def test_same_batches_for_any_workers(options):
    data = prompts.PromptDataset("counting(max_count=6)", 23, seed=5)
    batches = loaded(data, **options)
    assert batches == loaded(data) and [len(p) for p, _ in batches] == [5, 5, 5, 5, 3]
    assert all(isinstance(p, list) and isinstance(m, list) and set(m[0]) == {"questions", "answers"} for p, m in batches)


def test_dataset_items():
    data = prompts.PromptDataset(prompts.imagenet_animals, 300)
    first = [p for p, _ in data]
    assert len(first) == len(data) == 300 and len(set(first)) > 150  # 398 names, 300 draws: 211 expected
    assert first == [p for p, _ in prompts.PromptDataset(prompts.imagenet_animals, 300)]
    assert [p for p, _ in prompts.PromptDataset(prompts.imagenet_animals, 400)][:300] == first  # a longer one begins the same
    assert sum(a == b[0] for a, b in zip(first, prompts.PromptDataset(prompts.imagenet_animals, 300, seed=1))) < 8  # 0.75 expected by chance
    assert sum(a == b[0] for a, b in zip(first[1:], prompts.PromptDataset(prompts.imagenet_animals, 299, seed=1))) < 8  # seeds are no shifts of each other
    assert data[-1] == data[299] and data[torch.tensor(3)] == data[3]
    for i in (300, -301):
        with pytest.raises(IndexError, match="among 300"): data[i]
    assert prompts.PromptDataset(one_fox, 1, seed=-1)[0] == ("a fox", {})
    with pytest.raises(ValueError, match="n is 0"): prompts.PromptDataset("counting", 0)
    with pytest.raises(ValueError, match="did you mean counting"): prompts.PromptDataset("countin", 3)


def test_dataset_of_a_runs_own_prompts():
    data = prompts.PromptDataset("common_animals", 16, generator=lambda i: generator_for(42, 3, i, "prompt"))
    assert [p for p, _ in data] == [prompts.common_animals(generator_for(42, 3, i, "prompt"))[0] for i in range(16)]


def test_import_is_light():
    code = "import sys, ddpo_scratch.prompts; print(sorted({'timm', 'torchvision', 'diffusers', 'matplotlib', 'inflect', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("n", [0, -3, 2.5])
def test_pick_a_pic_of_no_captions(n):
    with pytest.raises(ValueError, match=f"pick_a_pic: n is {n}: needs a whole number of at least 1, or None"): prompts.pick_a_pic(n=n)(torch.Generator())


def test_a_file_that_is_no_utf8_is_named(tmp_path):
    (tmp_path/"animals.txt").write_text("a fox", encoding="utf-16")
    with pytest.raises(ValueError, match="animals.txt' is no UTF-8 text .*: save it as UTF-8"): prompts.from_file(tmp_path/"animals.txt")
