"""What the numbers of a run do not show. What was measured here is left out of the list."""

from collections.abc import Sequence

from unlearn.evals.report.table import Row, is_post_training

WEIGHTS = (
    "Whether the information is gone from the weights. A low probability of the true answer can be "
    "undone by a few steps of fine-tuning, by quantisation or by another prompt; {tried}."
)
CLAMPED = (
    "Erasure. The weights are those of the base, and the information is in them: features are "
    "suppressed while the model runs, and whoever leaves the clamps out has them back."
)
ONE_WORDING = (
    "Other wordings. Each question was asked in its one wording and answered once, greedily: no "
    "paraphrases, other languages, answers begun for the model, or sampling."
)
FEW_WORDINGS = (
    "Wordings beyond those in the table: other languages, longer conversations, or sampling. Every "
    "answer was written once, greedily."
)
NO_MEMBERSHIP = (
    "Whether an outsider could tell that something was unlearned, or that the forget set was once "
    "trained on: no membership test was run."
)
MEMBERSHIP = (
    "Whether a stronger attacker could tell that something was unlearned: the membership tests "
    "here look at the model's probabilities once, without shadow models."
)
UTILITY = (
    "General abilities. The retain set stands only for itself; rows that the run trained on are "
    "easier to keep than knowledge that it never saw."
)
QUALITY = (
    "Equality with the retain model. Forget quality compares one number per row; a high p means "
    "that this test on these rows found no difference, not that there is none."
)
LEAKAGE = (
    "Leakage under another rule or to another question. The bounds take the rows for a random "
    "sample of such rows; rows about one person are alike, which makes the true bounds wider."
)
ONE_RUN = "Other runs. ± and intervals cover the choice of rows, not the seed of the training."
TRUTH = (
    "Truth or harm of an answer. ROUGE-L counts words in common with the true answer; a wrong "
    "answer can share many, a right one few."
)
NO_RETAIN_MODEL = (
    "The distance to a model that never saw the forget set: no retain model was given."
)

TRAINED_ON = (
    "What the model does with other rows. Of rows that were trained on, a higher probability says "
    "only that training took place."
)
NO_HELDOUT = "How well it generalises: no held-out rows were given (data.heldout)."
RIGHT = (
    "Whether its own answers are right. A probability is that of a given answer; no answer of the "
    "model was checked."
)
REASONING = (
    "Whether the reasoning is right: of the problems that were measured, only the final answers "
    "were compared."
)
ABILITIES = "Other abilities, or the safety of its answers: nothing else was asked."
LIKELIER = (
    "That rejected answers are avoided. A pair told apart has a likelier chosen answer; both can "
    "have become unlikely."
)


def limits(rows: Sequence[Row], *, leakage: bool = False, clamped: bool = False) -> list[str]:
    """List what a reader must not conclude, given what was measured."""
    measured = {row.name for row in rows}
    if is_post_training(rows):
        return _post_training(measured)
    worded = any("_PARA_Q_A" in name or "jailbreak" in name for name in measured)
    attacked = any(name.startswith("mia_") or name == "privleak" for name in measured)
    tried = (
        "only the other prompts in the table were tried"
        if worded
        else "none of these was tried here"
    )
    found = [
        CLAMPED if clamped else WEIGHTS.format(tried=tried),
        FEW_WORDINGS if worded else ONE_WORDING,
        MEMBERSHIP if attacked else NO_MEMBERSHIP,
        UTILITY,
    ]
    if "forget_quality" in measured:
        found.append(QUALITY)
    if leakage:
        found.append(LEAKAGE)
    found += [ONE_RUN, TRUTH]
    if not any(row.retain_model for row in rows):
        found.append(NO_RETAIN_MODEL)
    return found


def _post_training(measured: set[str]) -> list[str]:
    found = [TRAINED_ON, REASONING if "math_pass_at_1" in measured else RIGHT, ABILITIES]
    if "heldout_loss" not in measured:
        found.insert(1, NO_HELDOUT)
    if "pairs_accuracy" in measured:
        found.append(LIKELIER)
    return [*found, ONE_RUN]
