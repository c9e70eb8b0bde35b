"Records as command lines: comments, words, help."

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from ddpo_scratch.cli.options import Mark, Parser, UsageError, closest, comments
from pydantic import Field, FiniteFloat


@dataclass(frozen=True)
class Base:
    "Hold what a parent has."

    # how many, above
    number: int = 1  # and beside
    silent: str = ""
    again: int = 0  # of the parent


@dataclass(frozen=True)
class Record(Base):
    "Hold one field of each kind."

    again: int = 2  # of the child
    rate: Annotated[float, Field(gt=0, description="more than 0")] = 0.5  # a rate
    finite: FiniteFloat | None = None  # or nothing
    kind: Literal["a", "b"] = "a"  # one of two
    off: bool = False  # a switch
    on: bool = True  # another one
    names: tuple[str, ...] = ()  # words
    weights: tuple[FiniteFloat, ...] = ()  # numbers
    each: Annotated[tuple[str, ...], Mark(metavar="FILE", each=True)] = ()  # one at a time
    place: Annotated[tuple[str, ...], Mark(metavar="WORD", place=True)] = ()  # without a name


@dataclass(frozen=True)
class Dashed:
    "Hold a name of two words."

    two_words: str = ""  # about 5% of it


PARSER = Parser("demo", "Demonstrate.", [Record], {"some": ["number", "rate"]}, ["rate"])


def refusal(*words):
    "Return the first line of what is wrong with words."
    with pytest.raises(UsageError) as error:
        PARSER.read(words)
    line, usage = str(error.value).splitlines()
    assert usage == "usage: demo WORD ... [OPTIONS]  (--help lists them)"
    return line


def test_comments_above_and_beside_and_of_parents():
    found = comments(Record)
    assert found["number"] == "how many, above and beside"
    assert found["silent"] == "" and found["again"] == "of the child"


@pytest.mark.parametrize(
    "words,given",
    [
        ("--number 3", dict(number=3)),
        ("--number=3 --again -4", dict(number=3, again=-4)),
        ("--rate 1e-3", dict(rate=0.001)),
        ("--finite -2", dict(finite=-2.0)),
        ("--kind b", dict(kind="b")),
        ("--off", dict(off=True)),
        ("--off no", dict(off=False)),
        ("--off=TRUE --on 0", dict(off=True, on=False)),
        ("--names a b --number 1", dict(names=("a", "b"), number=1)),
        ("--names a --names b", dict(names=("a", "b"))),
        ("--weights .5 -1 word", dict(weights=(0.5, -1.0), place=("word",))),
        ("--each x word --each y", dict(each=("x", "y"), place=("word",))),
        ("--off word --number 2 other", dict(off=True, number=2, place=("word", "other"))),
        ("--silent=--dashes", dict(silent="--dashes")),
        ("--silent -0.5*x", dict(silent="-0.5*x")),
        ("--number 1 --number 2", dict(number=2)),
        ("--silent=", dict(silent="")),
        ("first --off second", dict(off=True, place=("first", "second"))),
        ("-x --silent a%b", dict(silent="a%b", place=("-x",))),
        ("", {}),
    ],
)
def test_words_become_values(words, given):
    assert PARSER.read(words.split()) == given
    assert Record(**given)


@pytest.mark.parametrize(
    "words,message",
    [
        ("--numbers 3", "no option --numbers: did you mean --number?"),
        ("--zzz", "no option --zzz: demo --help lists them"),
        ("--number three", "--number 'three': should be a valid integer"),
        ("--number", "--number needs a value: INT"),
        ("--number --off", "--number needs a value: INT"),
        ("--rate 0", "--rate '0': allowed is more than 0"),
        ("--rate nan", "--rate 'nan': "),
        ("--finite inf", "--finite 'inf': should be a finite number"),
        ("--kind c", "--kind 'c': should be 'a' or 'b'"),
        ("--on=maybe", "--on 'maybe': should be true or false"),
        ("--weights inf", "--weights 'inf': should be a finite number"),
    ],
)
def test_words_that_do_not_fit(words, message):
    assert refusal(*words.split()).startswith(message)


def test_dashes_are_underscores_and_names_are_whole():
    parser = Parser("demo", "", [Dashed])
    assert parser.read(["--two-words", "a-b"]) == dict(two_words="a-b")
    assert parser.read(["--two-words=a-b", "--two_words=c-d"]) == dict(two_words="c-d")
    with pytest.raises(UsageError, match="no option --two: did you mean --two_words"):
        parser.read(["--two", "a"])
    assert "about 5% of it" in parser.help()


def test_nothing_heavy_is_imported():
    heavy = "{'torch', 'pydantic', 'yaml'}"
    code = f"import sys, ddpo_scratch.cli.options; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_word_too_many():
    parser = Parser("demo", "", [Base])
    with pytest.raises(UsageError, match="'stray' belongs to no option; --number takes INT"):
        parser.read(["--number", "1", "stray"])
    with pytest.raises(UsageError, match="'stray' belongs to no option\n"):
        parser.read(["stray"])


def test_a_command_may_propose_names_itself():
    parser = Parser("demo", "", [Base], propose=lambda word: ["again"] if word == "lr" else [])
    for word, name in (("lr", "again"), ("numbr", "number")):
        with pytest.raises(UsageError, match=f"did you mean --{name}"):
            parser.read([f"--{word}", "1"])


def test_help_has_groups_defaults_and_every_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = PARSER.help(defaults=dict(rate=7.0))
    assert text.startswith("usage: demo WORD ... [OPTIONS]\n\nDemonstrate.\n\nsome:\n")
    assert "  --rate NUMBER               a rate (default: 7)\n\nmore:\n" in text
    for name in Record.__dataclass_fields__:
        assert f"  {'' if name == 'place' else '--'}{name}" in text
    assert "--off                       a switch\n" in text  # to name it is to switch it on
    assert "--on [true|false]           another one (default: true)" in text
    assert "--names TEXT ..." in text and "--each FILE  " in text
    assert max(map(len, text.splitlines())) <= 100
    short = PARSER.help(everything=False)
    assert "--rate" in short and "--number" not in short


def test_the_closest_names():
    names = "train_learning_rate num_epochs train_num_inner_epochs logdir seed".split()
    assert closest("lr", names) == closest("learning_rate", names) == ["train_learning_rate"]
    assert closest("epochs", names) == ["num_epochs", "train_num_inner_epochs"]
    assert closest("", names) == closest("qqqq", names) == []
