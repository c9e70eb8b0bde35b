"What is said of a run: cards, numbers in words, snippets."

import pytest

from ddpo_scratch.run import card as C
from ddpo_scratch.config import TrainConfig, preset


def test_a_card_is_a_head_and_parts(tmp_path):
    from huggingface_hub import ModelCard

    parts = ["Text: *yes*", "", "## More\n\n絵"]
    card = C.model_card("Name", parts, dict(tags=["a"], base_model="b/c"))
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == dict(base_model="b/c", tags=["a"])
    assert read.text.strip() == "# Name\n\nText: *yes*\n\n## More\n\n絵"


def facts(tmp_path, config=None, **report):
    "Facts of a run without rows."
    found = dict(epochs=0, unit="kB", findings=[]) | report
    return C.Facts(tmp_path, config or TrainConfig(), "size", [], found)


def compared(before, after, se):
    "Facts as `write_report` has them, of one picture fewer than two standard errors need."
    numbers = dict(n=9, epoch=0, reward_se=0.1)
    return dict(
        before=numbers | dict(reward_mean=before),
        after=numbers | dict(reward_mean=after),
        difference=dict(mean=after - before, se=se),
        judges={},
    )


@pytest.mark.parametrize(
    "after, se, difference, verdict",
    [
        (-1.0, 0.1, "+1.00 ± 0.10 kB", "rose"),
        (-3.0, 0.1, "-1.00 ± 0.10 kB", "fell"),
        (-1.0, 0.6, "+1.00 ± 0.60 kB", "no clear change"),
        (-2.0, 0.0, "0.00 kB", "no clear change"),
        (-1.5, 0.0, "+0.500 kB", "rose"),
    ],
)
def test_a_difference_is_put_in_words(tmp_path, after, se, difference, verdict):
    (row,) = C.number_rows(facts(tmp_path, **compared(-2.0, after, se)))
    assert row[0] == "reward `size`" and row[1] == "-2.00 ± 0.10 kB"
    assert row[3:] == [difference, verdict]
    assert C.number_rows(facts(tmp_path)) == []


def test_nouns_agree_with_their_numbers(tmp_path):
    one = C.Facts(tmp_path, TrainConfig(), "size", [dict(reward_queries=1)], {})
    assert C.summary(one).endswith("1 epoch, 1 scored picture.")
    two = C.Facts(tmp_path, TrainConfig(), "size", [dict(reward_queries=2048)] * 2, {})
    assert C.summary(two).endswith("2 epochs, 2,048 scored pictures.")


def test_changed_fields_are_those_that_differ(tmp_path):
    assert C.changed_fields(TrainConfig()) == []
    config = TrainConfig(seed=3, negative_prompts="", eval_judges="", logdir="x", run_name="y")
    assert C.changed_fields(config) == [["`seed`", "`3`"], ["`eval_judges`", "(empty)"]]
    # what the embedded model's preset sets anyway
    assert len(C.changed_fields(preset("ddpo_pytorch_aesthetic"))) > 5


@pytest.mark.parametrize(
    "prompt", ["a fox", 'a "quoted" fox', "it's", "line\nbreak", "$HOME `id`", "絵"]
)
def test_prompts_are_quoted_for_python_and_for_the_shell(tmp_path, prompt):
    import ast
    import shlex

    found = facts(tmp_path)
    found.prompt = prompt
    command, python = (text for _, text in C.snippets(found))
    assert shlex.split(command, comments=True)[1] == prompt
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    assert any(call.args and getattr(call.args[0], "value", "") == prompt for call in calls)


def test_ways_to_use_a_run_are_those_that_it_has(tmp_path):
    titles = [title for title, _ in C.snippets(facts(tmp_path))]
    assert titles == ["With ddpo_scratch, where the run's folder is", "With diffusers"]
    (tmp_path / "comfyui.safetensors").touch()
    assert "ComfyUI" in C.snippets(facts(tmp_path))[-1][0]
    (tmp_path / "comfyui.safetensors").unlink()
    ((title, text),) = C.snippets(facts(tmp_path, TrainConfig(use_lora=False)))
    assert title == "With diffusers" and "lora" not in text


def test_a_model_that_was_passed_from_python_is_not_loaded_by_its_name(tmp_path):
    (*_, (_, text)) = C.snippets(facts(tmp_path, TrainConfig(model="my_room:Denoiser")))
    assert "pipe = ...  # the model that the run was given from Python: my_room:Denoiser" in text
