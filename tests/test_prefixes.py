"""Trees of tokens: what is laid out once, and the same numbers as rows apart."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.packing import layout_forward, packable
from unlearn.prefixes import TokenTree

ROWS = [[5, 6, 7], [5, 6, 8, 9], [5, 6], [4, 6, 7], [5, 6, 8, 9]]


def test_a_common_beginning_is_there_once() -> None:
    """5 6 begins four rows: 5 6 (7 | 8 9) and 4 6 7 are 8 tokens of the rows' 16."""
    tree = TokenTree.of(ROWS)
    assert tree.ids.shape == (1, 8)
    for row, path in zip(ROWS, tree.paths, strict=True):
        assert tree.ids[0, path].tolist() == row
        assert tree.positions[0, path].tolist() == list(range(len(row)))
    assert len({tuple(path) for path in tree.paths}) == 4  # the two equal rows are one path
    assert tree.paths[0][1] == tree.paths[2][1] != tree.paths[3][1]  # 6 after 5 is not 6 after 4


def test_every_token_attends_in_exactly_one_row() -> None:
    tree = TokenTree.of(ROWS)
    tokens = torch.cat([branch.tokens for branch in tree.branches])
    assert sorted(tokens.tolist()) == list(range(8))
    masked = [branch for branch in tree.branches if branch.mask is not None]
    assert [branch.tokens.tolist() for branch in masked] == [[int(tree.paths[0][2])]]


def logits_of(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0] for row in rows]


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_tree_gives_the_numbers_of_rows_apart(kv_heads: int, build_tiny_model: Any) -> None:
    """Rows over four tokens share beginnings of every length, some end inside others."""
    model = build_tiny_model(num_key_value_heads=kv_heads).double()

    @given(st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=12), min_size=1, max_size=9))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(rows: list[list[int]]) -> None:
        tree = TokenTree.of(rows)
        assert tree.ids.shape[1] == len({tuple(r[:n]) for r in rows for n in range(1, len(r) + 1)})
        with packable(model), torch.no_grad():
            found = layout_forward(model, tree.ids, tree).logits[0]
        for path, expected in zip(tree.paths, logits_of(model, rows), strict=True):
            torch.testing.assert_close(found[path], expected, rtol=0, atol=1e-10)

    check()


def test_a_long_prompt_and_many_short_answers(build_tiny_model: Any) -> None:
    """Keys are laid out a few rows at a time; the tree has 100 + 40 * 3 tokens, the rows 4120."""
    model = build_tiny_model().double()
    prompt = torch.randint(3, 300, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [[*prompt, 10 + row, 7, 8] for row in range(40)]
    tree = TokenTree.of(rows)
    assert tree.ids.shape[1] == 220
    assert max(branch.keys.numel() for branch in tree.branches) <= 4 * 220
    with packable(model), torch.no_grad():
        found = layout_forward(model, tree.ids, tree).logits[0]
    for path, expected in zip(tree.paths, logits_of(model, rows), strict=True):
        torch.testing.assert_close(found[path], expected, rtol=0, atol=1e-10)
