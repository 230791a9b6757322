"""What is to be scored and how; the same for the library, the command and a settings file."""

from collections.abc import Mapping
from dataclasses import dataclass

from unlearn.detect.several_passes import MEMBER_WEIGHT
from unlearn.detect.single_pass import CLIP, WINDOW, K
from unlearn.detect.tokens import Bos
from unlearn.errors import UserError, unknown

SINGLE_PASS = frozenset(("loss", "ppl", "zlib", "mink", "minkpp", "gapk", "dcpdd"))
"""Scores that the pass over the text itself gives."""
STATISTICS = frozenset(("minkpp", "gapk"))
"""Scores that look at the whole vocabulary."""
WITH_SHARE = ("mink", "minkpp", "gapk")
"""Scores that are taken for every share ``k``."""
NEEDS = {
    "dcpdd": "a token frequency table",
    "ref": "a reference model",
    "recall": "texts that are no members",
    "conrecall": "texts that are no members and texts that are",
}
"""What some scores cannot do without."""
SCORES = ("loss", "ppl", "zlib", "mink", "minkpp", "gapk", "dcpdd", "lowercase", "ref", "recall",
          "conrecall", "neighbour", "pac")  # fmt: skip
DEFAULT = ("loss", "ppl", "zlib", "mink", "minkpp", "gapk")


@dataclass(frozen=True)
class Settings:
    """Which scores, of how much of a text.

    The first ``k`` goes by the score's plain name (``mink``), others by ``mink_0.4``. ``clip`` is
    DC-PDD's bound, ``gap_window`` Gap-K%'s smoothing, ``gamma`` Con-ReCaLL's weight, ``shots`` the
    most texts of a prefix. Texts are cut at ``max_tokens`` ids (or the model's context), because
    scores of texts of different length are hard to compare.
    """

    scores: tuple[str, ...] = DEFAULT
    k: tuple[float, ...] = (K,)
    gap_window: int = WINDOW
    clip: float = CLIP
    gamma: float = MEMBER_WEIGHT
    shots: int = 7
    max_tokens: int | None = 512
    min_tokens: int = 16
    bos: Bos = "auto"
    batch_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.scores:
            if name not in SCORES:
                raise unknown("score", name, SCORES)
        if not self.scores:
            raise UserError("no score was asked for", f"give some of {', '.join(SCORES)}")
        for k in self.k or (0.0,):
            if not 0 < k <= 1:
                raise UserError(
                    f"k={k} is not a share of the tokens", "give more than 0 and at most 1"
                )
        least = {"gap_window": 1, "shots": 1, "min_tokens": 1, "batch_tokens": 1, "max_tokens": 2}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UserError(f"{name}={value} is too small", f"give {bound} or more")
        if not self.clip > 0:
            raise UserError(f"clip={self.clip} is not above 0", "DC-PDD's default is 0.01")

    def named(self, score: str, k: float) -> str:
        """Name a score's column for one of the shares."""
        return score if k == self.k[0] else f"{score}_{k:g}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Give the names of all numbers per text, in order."""
        found: list[str] = []
        for score in filter(self.scores.__contains__, SCORES):
            shares = self.k if score in WITH_SHARE else self.k[:1]
            found += [self.named(score, k) for k in shares]
        return tuple(found)

    @property
    def readings(self) -> tuple[str, ...]:
        """Say what the scores need to know of every token beside its log-probability."""
        return ("statistics",) if STATISTICS & set(self.scores) else ()

    @property
    def prefixes(self) -> frozenset[str]:
        """Say which prefixes the scores need."""
        needed = {"recall": {"nonmembers"}, "conrecall": {"nonmembers", "members"}}
        return frozenset().union(*(needed.get(name, set()) for name in self.scores))

    def check_inputs(self, given: Mapping[str, bool]) -> None:
        """Refuse a score that lacks what it needs.

        Raises:
            UserError: names the score and what it lacks.
        """
        for name in self.scores:
            if name in NEEDS and not given.get(name):
                raise UserError(
                    f"the score '{name}' needs {NEEDS[name]}", "give it, or leave it out"
                )
