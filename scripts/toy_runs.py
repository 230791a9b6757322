"""What the toys of docs/posttraining.md share: small Llamas, runs of recipes, results kept.

A cell is one run of a recipe through the project's own ``prepare`` and ``train``, the functions
under ``unlearn run``, without its report and its measurements before and after.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from unlearn.models import load_model, weights_hash
from unlearn.monitors import StopRequest
from unlearn.recipes.files import load
from unlearn.recipes.prepare import prepare
from unlearn.recipes.train import train
from unlearn.runs import RunFolder, write_atomic

SPECIAL = ("<pad>", "<s>", "</s>")


def character_tokenizer(characters: str) -> Any:
    """Give a tokenizer with one token per character, which begins a text with ``<s>``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate((*SPECIAL, *characters))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def small_llama(vocabulary: int, *, width: int, layers: int, positions: int, seed: int) -> Any:
    """Give an untrained Llama with heads of 32; the same seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = max(1, width // 32)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=positions, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write a model that recipes can start from."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows to a jsonl file; give its name, as a recipe wants it."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained(
    method: str,
    model: str,
    data: Mapping[str, str],
    settings: Mapping[str, Any],
    *,
    seed: int,
    every: int | None = None,
    on_step: Callable[[Any, int], object] | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Run a recipe on a model in a folder; give the trained model and the events of its steps.

    ``settings`` are those of ``--set``. ``on_step`` sees the model every ``every`` steps.
    """
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    changes += ["training.save_steps=1000000", f"evals.every={json.dumps(every)}"]
    with tempfile.TemporaryDirectory() as folder:
        given = {"model": {"path": model}, "data": dict(data), "seed": seed, "out": folder}
        prepared = prepare(load(method, changes, given), offline=True)
        start, events = load_model(prepared.source), []
        torch.manual_seed(seed)
        changed, _ = train(
            prepared,
            start,
            RunFolder(Path(folder)),
            weights_hash=weights_hash(start),
            stop=StopRequest(),
            emit=events.append,
            on_step=on_step,
        )
    return changed, [event for event in events if event["event"] == "step"]


def weights_sha256(model: Any) -> str:
    """Give a hash of all weights, byte by byte."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Ledger:
    """Results of cells in a file, one line each; a cell that is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.found = {line["cell"]: line for line in map(json.loads, lines)}

    def get(self, cell: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Give the result of a cell; work it out and keep it if it is not there."""
        if cell not in self.found:
            line = {"cell": cell, **work()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.found[cell] = line
        return self.found[cell]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Write a mean and the standard deviation over seeds."""
    if len(values) < 2:
        return f"{mean(values):.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def paired(ours: Sequence[float], theirs: Sequence[float], digits: int = 1) -> str:
    """Write the mean of the differences seed by seed and the half-width of its 95 % interval."""
    from scipy.stats import t as student

    apart = [one - other for one, other in zip(ours, theirs, strict=True)]
    if len(apart) < 2:
        return f"{mean(apart):+.{digits}f}"
    half = student.ppf(0.975, len(apart) - 1) * stdev(apart) / math.sqrt(len(apart))
    return f"{mean(apart):+.{digits}f} ± {half:.{digits}f}"
