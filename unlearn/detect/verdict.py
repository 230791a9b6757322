"""What was found, in words a reader cannot over-read. Never "was in the training data"."""

from collections.abc import Sequence
from dataclasses import dataclass

from unlearn.detect.decisions import Decisions, FileEvidence
from unlearn.detect.thresholds import Threshold

WEAK = (
    "On texts drawn alike such scores are close to guessing: on the Pile, AUC 0.51 for Pythia-6.9B "
    "and 0.52 for 12B with Min-K% (mimir)."
)
LIMITS = (
    "A call says that a text is unusually familiar to the model next to the references. Copies, "
    "quotations, paraphrases elsewhere and a simpler style do that too.",
    "No call is no proof of absence: most training texts leave no trace in these scores.",
    "All rests on references of the same kind, time and length that were surely never seen.",
    WEAK,
)
"""What no decision of this kind shows, whatever its numbers."""


@dataclass(frozen=True)
class Share:
    """How many of some texts were called members, and the exact 95 % interval of that share."""

    count: int
    n: int
    low: float
    high: float


def percent(share: float) -> str:
    """Write a rate as people do: 5 %, 0.1 %."""
    return f"{100 * share:.3g} %"


def of_text(p: float | None, *, fpr: float, known_members: bool = False) -> str:
    """Say what the p-value of one text means."""
    if p is None or p != p:
        return "no decision: too few references of its length"
    likeness = "scores like known members" if known_members else "scores like a member"
    if p <= fpr + 1e-9:
        return f"{likeness} at FPR {percent(fpr)} (p = {p:.3g})"
    return f"not detected at FPR {percent(fpr)} (p = {p:.3g})"


def of_texts(found: Decisions) -> list[str]:
    """Sum up many texts: how many calls, how many of them chance would give, how many hold up."""
    judged = int((found.deciding == found.deciding).sum())
    if not judged:
        return ["No text could be compared with references."]
    called, listed = int(found.member.sum()), int(found.listed.sum())
    chance = found.fpr * judged
    how = f"by {found.primary}" if found.primary else f"by {len(found.p)} scores together"
    lines = [
        f"{called} of {judged} texts score like members at FPR {percent(found.fpr)} {how}; "
        f"were none a member, about {chance:.3g} would."
    ]
    if listed:
        lines.append(
            f"{listed} of them hold up among so many texts: on average at most "
            f"{percent(found.fdr)} of such calls are false (Benjamini-Hochberg)."
        )
    else:
        lines.append(
            f"None holds up among so many texts at a false discovery rate of {percent(found.fdr)}."
        )
    if missing := found.deciding.size - judged:
        lines.append(
            f"{missing} texts have no decision: no score, or too few references of their length."
        )
    return lines


def of_members(found: Share | None, fpr: float) -> list[str]:
    """Say how many texts that surely were seen are found at this rate."""
    if found is None:
        return []
    ends = f"{percent(found.low)} to {percent(found.high)}"
    share = percent(found.count / found.n)
    return [
        f"Of {found.n} known members {share} are found at FPR {percent(fpr)} ({ends}): a text that "
        "is not detected may well be one of the others."
    ]


def of_file(found: FileEvidence, *, fpr: float) -> str:
    """Say what the windows of one long text mean together."""
    if found.p != found.p:
        return "No decision on the whole text: no window could be compared with references."
    strength = f"its middle window has p = {found.median_p:.2g}; 0.5 is like the references"
    words = "scores like members" if found.p <= fpr + 1e-9 else "is not detected"
    return f"The text as a whole {words} at FPR {percent(fpr)} (p = {found.p:.3g}; {strength})."


def of_threshold(found: Threshold) -> str:
    """Say what a fitted threshold promises."""
    mean, low, high = found.fpr
    words = (
        f"Above {found.value:.4g} a text is called a likely member. Of non-members like these "
        f"{found.nonmembers}, {percent(mean)} will be ({percent(low)} to {percent(high)})"
    )
    if found.tpr is None:
        return f"{words}; how many members that finds is unknown without members."
    rate, least, most = found.tpr
    return (
        f"{words}; of the {found.members} members given, "
        f"{percent(rate)} are ({percent(least)} to {percent(most)})."
    )


def numbered(texts: Sequence[str]) -> str:
    """Set limits or warnings one below the other."""
    return "\n".join(f"- {text}" for text in texts)
