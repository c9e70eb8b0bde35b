"What would bore a reader of 02: every list, every article, files of odd shape, bad names; and that nothing heavy is imported."
import subprocess
import sys
from collections import Counter

import pytest
import torch

from ddpo_scratch import prompts
from ddpo_scratch.rollout import generator_for

SOURCES = ["common_animals", "other_animals", "everyday_objects", "imagenet_animals"]


def test_the_45_animals_of_the_paper():
    assert len(prompts.COMMON_ANIMALS) == 45 and prompts.COMMON_ANIMALS[0] == "cat" and prompts.COMMON_ANIMALS[-1] == "kangaroo"
    every = prompts.COMMON_ANIMALS + prompts.OTHER_ANIMALS + prompts.OBJECTS
    assert max(Counter(every).values()) == 1 and len(every) == 77


def test_imagenet_names():
    names = prompts.all_prompts("imagenet_animals")
    assert len(names) == len(set(names)) == 398 and names[0] == "a tench" and names[397] == "a puffer"
    assert names[151] == "a Chihuahua" and names[268] == "a Mexican hairless" and names[269] == "a timber wolf"
    assert not any("," in n for n in names)


@pytest.mark.parametrize("noun, want", [("ant", "an"), ("Owl", "an"), ("European fire salamander", "a"), ("unicorn", "a"), ("umbrella", "an"), ("hour", "an"),
                                        ("honest fox", "an"), ("house", "a"), ("horse", "a"), ("eel", "an"), ("ewe", "a"), ("one", "a"), ("onion", "an"),
                                        ("ukulele", "a"), ("useful cat", "a"), ("usher", "an"), ("uninhabited isle", "an"), (" apple", "an"), ("yak", "a")])
def test_article(noun, want): assert prompts.article(noun) == want


@pytest.mark.parametrize("noun", ["", "  ", "\n"])
def test_article_of_nothing(noun):
    with pytest.raises(ValueError, match="empty"): prompts.article(noun)


@pytest.mark.parametrize("name", SOURCES)
def test_contract(name):
    fn = prompts.get_prompt_fn(name)
    prompt, metadata = fn(generator_for(0, 1, 2, "prompt"))
    assert isinstance(prompt, str) and metadata == {"noun": prompt.split(" ", 1)[1]} and prompt in prompts.all_prompts(name)
    assert fn(generator_for(0, 1, 2, "prompt")) == (prompt, metadata)
    assert len({fn(generator_for(0, 1, i, "prompt"))[0] for i in range(60)}) > 5


def test_only_the_given_generator_is_used():
    state = torch.get_rng_state()
    prompts.common_animals(torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


def test_files(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa cr\u00eape\r\n\r\n  a fox \r\n".encode())
    for p in (path, str(path)):
        assert prompts.from_file(p).prompts == ["a cr\u00eape", "a fox"]
    monkeypatch.chdir(tmp_path)
    assert prompts.get_prompt_fn("list.txt").prompts == prompts.all_prompts(str(path)) == ["a cr\u00eape", "a fox"]
    (tmp_path / "no_suffix").write_text("an owl\n")
    assert prompts.get_prompt_fn(str(tmp_path / "no_suffix"))(torch.Generator()) == ("an owl", {"line": 0})


def test_bad_files(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for p in (tmp_path / "empty.txt", tmp_path / "missing.txt", tmp_path):
        with pytest.raises(ValueError, match="from_file"): prompts.from_file(p)
    with pytest.raises(ValueError, match="no file"): prompts.get_prompt_fn(str(tmp_path / "missing.txt"))


def test_bad_names():
    with pytest.raises(ValueError, match="did you mean common_animals"): prompts.get_prompt_fn("comon_animals")
    with pytest.raises(ValueError, match="known: common_animals"): prompts.get_prompt_fn("qqq")
    for name in ("no_such_module:fn", "ddpo_scratch.prompts:nothing", "ddpo_scratch.prompts:", ":fn", "ddpo_scratch.prompts:OBJECTS"):
        with pytest.raises(ValueError, match="get_prompt_fn"): prompts.get_prompt_fn(name)
    with pytest.raises(ValueError, match="prompts"): prompts.all_prompts(lambda g: ("x", {}))


def test_import_is_light():
    code = "import sys, ddpo_scratch.prompts; print(sorted({'timm', 'torchvision', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
