"""Words and symbols of the book are defined in or before the cell of their first use."""

import sys

import nbformat
import pytest
from page import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import first_uses as fu  # noqa: E402


@pytest.fixture(scope="module")
def cells():
    return fu.book()


@pytest.mark.parametrize("word", fu.WORDS)
def test_word_is_defined_in_or_before_its_first_use(word, cells):
    assert not (faults := fu.faults(cells, [word], {})), faults


@pytest.mark.parametrize("symbol", fu.SYMBOLS)
def test_symbol_is_explained_where_it_first_stands(symbol, cells):
    assert not (faults := fu.faults(cells, [], {symbol: fu.SYMBOLS[symbol]})), faults


@pytest.mark.parametrize(
    "texts, fault",
    [
        (["A policy acts.", "A *policy* is a rule."], "policy is used in ('a', 0) and defined in"),
        (["Two policies.", "**Policy**"], "policy is used in ('a', 0) and defined in"),
        (["Many policies."], "policy is not defined"),
        (["Read [this](policy.md), `policy`, $policy$.", "The *policy*"], None),
        (["| policy | a rule |", "A policy."], None),
        (["off-policy, policymaker", "*policies*"], None),
    ],
)
def test_words_used_too_early_are_seen(texts, fault):
    found = fu.faults([("a", k, text) for k, text in enumerate(texts)], ["policy"], {})
    assert len(found) == (fault is not None)
    assert all(message.startswith(fault) for message in found), found


@pytest.mark.parametrize(
    "text, fault",
    [
        (r"noise $$\eta^2$$", None),
        (r"by $\eta$", r"\eta is used in ('a', 0) without the word 'noise'"),
        (r"noise $\etax$, \eta", r"\eta is not used"),
    ],
)
def test_symbols_that_nothing_explains_are_seen(text, fault):
    found = fu.faults([("a", 0, text)], [], {r"\eta": "noise"})
    assert found == ([] if fault is None else [fault])


def test_cells_come_in_the_order_of_reading(tmp_path):
    for name in ("02_b", "01_a"):
        cells = [nbformat.v4.new_code_cell("1"), nbformat.v4.new_markdown_cell(name)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    assert fu.book(tmp_path) == [("01_a", 1, "01_a"), ("02_b", 1, "02_b")]
