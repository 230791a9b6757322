"""Positions, labels and views of masks, written out by hand; which blocks the layouts carry."""

import random

import pytest
import torch

from unlearn.errors import UserError
from unlearn.mtp.layout import Blocks, block_rows, draw_anchors, eligible, step_layout
from unlearn.mtp.layouts import Budget, Layout, Linear, Quadratic, layout_named

NO = -100


def test_index_table_of_two_blocks_by_hand() -> None:
    """Six tokens 10 … 15, k = 2, blocks at tokens 1 and 3.

    Mask j of block a stands at a + j and foretells token a + j + 1; the last mask of block 3 stands
    at 5 and would foretell token 6, which is not there. Rows of the view: masks (1, 1), (1, 2),
    (3, 1), (3, 2); columns: tokens 0 … 5, then these masks.
    """
    ids = torch.arange(10, 16)
    blocks = Blocks.at(torch.tensor([1, 3]), ids, ids, 2)
    assert blocks.positions.tolist() == [[2, 3], [4, 5]]
    assert blocks.labels.tolist() == [[13, 14], [15, NO]]
    assert blocks.previous.tolist() == [[12, 13], [14, 15]]
    assert blocks.counterpart.tolist() == [[2, 3], [4, 5]]
    assert blocks.pairs.tolist() == [[True, True], [True, False]]
    assert blocks.visible().int().tolist() == [
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 1, 1],
    ]


def test_a_prompt_gets_no_masks() -> None:
    """Tokens 0 to 2 are the prompt. Token 2 foretells the first learnt one, so it is an anchor.

    4 is the last, whose mask 1 foretells the last token, 6.
    """
    ids = torch.arange(7)
    labels = torch.tensor([NO, NO, NO, 3, 4, 5, 6])
    assert eligible(labels).tolist() == [2, 3, 4]
    assert Blocks.at(torch.tensor([2]), ids, labels, 2).labels.tolist() == [[4, 5]]
    assert eligible(ids[:2]).tolist() == []


def test_anchors_are_drawn_evenly_and_in_order() -> None:
    """Two of four anchors: each is in half of 2,000 draws, +- 4.5 deviations of sqrt(2000 / 4)."""
    labels = torch.arange(6)
    generator = torch.Generator().manual_seed(0)
    draws = [draw_anchors(labels, 2, generator).tolist() for _ in range(2000)]
    assert all(first < second for first, second in draws)
    for anchor in range(4):
        assert abs(sum(anchor in draw for draw in draws) - 1000) < 100
    assert draw_anchors(labels, 9, generator).tolist() == [0, 1, 2, 3]


def test_a_step_by_hand() -> None:
    """Two ordinary tokens, a block of 2 at the first and of 1 at the second."""
    offsets, sees, which = step_layout(2, ((0, 2), (1, 1)))
    assert offsets.tolist() == [0, 1, 1, 2, 2]
    assert which.tolist() == [0, 1, 0]
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert block_rows(2, ((0, 2), (1, 1)), 1) == slice(4, 5)
    assert block_rows(2, ((0, 2),), 1) is None


def test_blocks_of_the_layouts() -> None:
    """k = 3 after 2 drafts: one block of 3; three of them, 9 = k (q + 1) masks."""
    assert Linear(3).blocks(2) == ((2, 3),)
    assert Quadratic(3).blocks(2) == ((0, 3), (1, 3), (2, 3))
    assert layout_named("budget", 3, 4).blocks(0) == ((0, 3),)
    with pytest.raises(UserError, match="unknown layout 'cubic'"):
        layout_named("cubic", 3)


def test_a_budget_goes_where_it_is_likeliest_to_be_used() -> None:
    """Chances .9, .5 of two drafts: the text ends at 0, 1, 2 with .1, .45, .45.

    Mask 1 is used with .9, mask 2 with .9 x .5 = .45. Worth: place 0 .09 and .045, places 1 and 2
    .405 and .2025 each. Four masks: both of places 1 and 2; five: the first of place 0 too.
    """
    budget = Budget(2, 4)
    budget.counts = [(9.0, 10.0), (1.0, 2.0)]
    assert budget.blocks(2) == ((1, 2), (2, 2))
    budget.masks = 5
    assert budget.blocks(2) == ((0, 1), (1, 2), (2, 2))
    budget.saw(2, 0)
    assert budget.right == [pytest.approx(9 * 0.95 / (10 * 0.95 + 1)), 0.5]
    budget.saw(2, 1)
    assert budget.right[1] == pytest.approx(0.95 / (2 * 0.95 + 1))


class Printed(Linear):
    """The paper's own: blocks after drafts only (after x_0 when there are none)."""

    def blocks(self, drafted: int) -> tuple[tuple[int, int], ...]:
        return tuple((place, self.k) for place in range(min(1, drafted), drafted + 1))


def simulated(layout: Layout, chance: float, steps: int = 4000) -> float:
    """Tokens per step when each draft is right with a chance, given that those before it are."""
    draw, drafted, tokens = random.Random(0), 0, 0
    for _ in range(steps):
        blocks = dict(layout.blocks(drafted))
        kept = next((j for j in range(drafted) if draw.random() >= chance), drafted)
        layout.saw(drafted, kept)
        tokens += kept + 1
        drafted = blocks.get(kept, 0)
    return tokens / steps


def expected_with_drafts_always(k: int, chance: float) -> float:
    """1 + p + p^2 + … + p^k: what k drafts at every step give."""
    return sum(chance**j for j in range(k + 1))


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.9])
def test_more_blocks_write_more_tokens_a_step(chance: float) -> None:
    """k = 8. The linear layout has drafts again only after a full acceptance or a step without."""
    k = 8
    linear, printed = simulated(Linear(k), chance), simulated(Printed(k), chance)
    quadratic, budget = simulated(Quadratic(k), chance), simulated(Budget(k), chance)
    assert linear < printed < quadratic
    assert quadratic == pytest.approx(expected_with_drafts_always(k, chance), rel=0.03)
    assert linear < budget < quadratic * 1.01
