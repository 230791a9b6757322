"""Fixtures: a two-layer Llama and a tokenizer built in memory, and shared models."""

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

SENTENCES = [
    "Question: Where was Ada born?\nAnswer: Ada was born in Oslo.",
    "Question: What does Bo paint?\nAnswer: Bo paints small boats in the morning.",
    "The quick brown fox jumps over the lazy dog, again and again.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }}\nAnswer:\n"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def build_tokenizer(*, chat: bool = True, pad: bool = True) -> Any:
    """Train a byte-level BPE of 300 entries on three sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(SENTENCES, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def build_model(seed: int = 0, **changes: Any) -> Any:
    """Build a two-layer Llama of hidden size 32 with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | changes
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.fixture
def tiny_tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def tiny_model() -> Any:
    return build_model()


@pytest.fixture
def build_tiny_model() -> Any:
    """Give the builder itself, for tests that need another seed, size or tied weights."""
    return build_model


@pytest.fixture
def build_tiny_tokenizer() -> Any:
    """Give the builder itself, for tests that need no chat template or no pad token."""
    return build_tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder with real data and models, or skip."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"real data and models are not at hand: {folder} does not exist")
    return folder


@pytest.fixture
def on_two_ranks(tmp_path: Path) -> Callable[[Path, Path], None]:
    """Give what lets two processes, and then this one alone, do a program's work (``rank.py``).

    They write their results as ``rank-0`` and ``rank-1``, this one as ``alone``.
    """
    import torch

    file = Path(__file__).with_name("rank.py")
    spec = importlib.util.spec_from_file_location("rank", file)
    assert spec is not None
    assert spec.loader is not None
    rank = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rank)

    def run(program: Path, folder: Path) -> None:
        own = {"OMP_NUM_THREADS": "1", "UNLEARN_CACHE": str(tmp_path / "cache")}
        ranks = [
            subprocess.Popen(
                [sys.executable, str(file), str(program), str(folder), str(number), "2"],
                env=os.environ | own,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the ranks have
        try:
            rank.loaded(program).work(folder, "alone")
        finally:
            torch.set_num_threads(threads)
        for one in ranks:
            _, errors = one.communicate(timeout=200)
            assert one.returncode == 0, errors

    return run


_numbers = count()


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: Any, monkeypatch: Any) -> None:
    """Keep every test out of the user's cache.

    Not with ``mktemp``: it reads the names of all folders that there are, of thousands of tests.
    """
    folder = tmp_path_factory.getbasetemp() / "caches" / str(next(_numbers))
    folder.mkdir(parents=True)
    monkeypatch.setenv("UNLEARN_CACHE", str(folder))


MANY_MODULES = 100
_frozen = {"modules": 0}


@pytest.fixture(autouse=True)
def _what_is_imported_stays_out_of_garbage_collection() -> Iterator[None]:
    """Freeze what importing has made: Trainer collects garbage twice per run, a second each time.

    Hundreds of thousands of objects of torch and transformers would be looked through every time.
    """
    yield
    if len(sys.modules) > _frozen["modules"] + MANY_MODULES:
        gc.collect()
        gc.freeze()
        _frozen["modules"] = len(sys.modules)
