"""The task of redi_toy.py: add column by column and say whether the last sum is odd; or guess."""

import random

COLUMNS = 3
CHARACTERS = "0123456789+,=?eo"
SLIP = 0.03
"""Share of sums that slip by one where answers are drawn to learn from."""


def problem(draw: random.Random) -> str:
    """Draw the columns of two numbers, the last one first."""
    pairs = (f"{draw.randint(0, 9)}+{draw.randint(0, 9)}" for _ in range(COLUMNS))
    return ",".join(pairs) + "="


def trace(
    asked: str, *, guess: bool = False, draw: random.Random | None = None, slip: float = 0.0
) -> str:
    """Answer a problem: column by column, whose sums may slip by one; or by a coin."""
    if guess and draw:
        return "?" + draw.choice("eo")
    carry, steps = 0, []
    for column in asked[:-1].split(","):
        total = sum(map(int, column.split("+"))) + carry
        if draw and draw.random() < slip:
            total = min(19, max(0, total + draw.choice((-1, 1))))
        steps.append(f"{carry}{total:02d}")
        carry = total // 10
    return ",".join(steps) + ("o" if total % 2 else "e")


def is_right(asked: str, answer: str) -> bool:
    """Tell whether an answer ends as it should, however it was found."""
    return answer[-1:] == trace(asked)[-1]


def texts(seed: int, number: int, guessed: float) -> list[dict[str, str]]:
    """Draw answers to learn from, a share of them guessed."""
    draw = random.Random(f"texts {guessed} {seed}")
    asked = [problem(draw) for _ in range(number)]
    kinds = [draw.random() < guessed for _ in asked]
    return [
        {"prompt": one, "completion": trace(one, guess=guess, draw=draw, slip=SLIP)}
        for one, guess in zip(asked, kinds, strict=True)
    ]


def problems(part: str, number: int, seed: int) -> list[str]:
    """Draw problems of a part: those to train on, to choose by, or to tell the outcome."""
    draw = random.Random(f"{part} {seed}")
    return [problem(draw) for _ in range(number)]
