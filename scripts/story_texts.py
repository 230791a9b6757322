"""Write 100 little stories beside 100 other English texts: a benchmark that fools every score.

The stories are put together here, in the manner of TinyStories: a model trained on such stories
finds them familiar, though it saw not one of them. The other texts are answers of TOFU.

    python scripts/story_texts.py ../shared/data/tofu/full.json stories.jsonl
    unlearn detect bench --data stories.jsonl --model ../shared/models/stories260k
"""

import argparse
import json
import random
from pathlib import Path

GIRLS, BOYS = ("Lily", "Mia", "Sue", "Anna"), ("Tom", "Ben", "Tim", "Max")
THINGS = ("red ball", "big box", "toy car", "little doll", "blue hat", "shiny stone", "old book",
          "small boat", "yellow flower", "soft blanket")  # fmt: skip
PLACES = ("park", "garden", "house", "forest", "beach", "school")
FRIENDS = ("bird", "dog", "cat", "rabbit", "frog", "bear", "mouse", "duck")
MOODS = ("happy", "sad", "scared", "excited", "tired", "surprised")
LESSONS = ("to share", "to be kind", "to listen to {his} mom", "to help {his} friends",
           "to say sorry", "to be brave")  # fmt: skip


def story(chance: random.Random) -> str:
    """Put one story together."""
    name = chance.choice((*GIRLS, *BOYS))
    he, his = ("she", "her") if name in GIRLS else ("he", "his")
    thing, place, friend = (chance.choice(some) for some in (THINGS, PLACES, FRIENDS))
    lesson = chance.choice(LESSONS).format(his=his)
    return (
        f"Once upon a time, there was a little {'girl' if he == 'she' else 'boy'} named {name}. "
        f"{name} loved to play with {his} {thing}. One day, {he} went to the {place} with {his} "
        f"mom. {he.capitalize()} saw a {friend}. The {friend} was {chance.choice(MOODS)}. "
        f'"Do you want to play with me?" asked {name}. The {friend} said, "Yes, I want to play!" '
        f"They played with the {thing} all day. {name} was very {chance.choice(MOODS)}. "
        f"{he.capitalize()} learned {lesson}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tofu", type=Path, help="full.json of TOFU, one row per line")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=100)
    given = parser.parse_args()
    chance = random.Random(0)
    with given.tofu.open(encoding="utf-8") as file:
        others = [json.loads(line)["answer"] for line in file]
    rows = [{"text": story(chance), "label": 1} for _ in range(given.count)]
    rows += [{"text": text, "label": 0} for text in chance.sample(others, given.count)]
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{given.out}: {given.count} stories, {given.count} other texts")


if __name__ == "__main__":
    main()
