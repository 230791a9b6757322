"""Frequency tables: counts by hand, any number of processes, files, refusal, and the default."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unlearn.detect.corpus import corpus_texts
from unlearn.detect.english import english_share, generic_english, table_warnings, words
from unlearn.detect.frequency import (
    About,
    Corpus,
    FrequencyTable,
    build_table,
    load_table,
)
from unlearn.errors import UserError

CORPUS = Corpus("a corpus")
TEXTS = ["Ada was born in Oslo.", "Bo paints small boats.", "", "Ada paints. Ada paints."]
GOLDEN = [10, 5, 0, 85]


def table(counts: list[int]) -> FrequencyTable:
    about = About("c", None, "t", "0" * 64, len(counts), sum(counts), 1, None)
    return FrequencyTable(np.array(counts), about)


def test_laplace_smoothing_by_hand() -> None:
    """11/104, 6/104, 1/104 and 86/104; the tokens 0, 2 and 3 surprise by their -log on average."""
    found = table(GOLDEN)
    assert found.probabilities().tolist() == pytest.approx([11 / 104, 6 / 104, 1 / 104, 86 / 104])
    assert found.probabilities().round(6).tolist() == [0.105769, 0.057692, 0.009615, 0.826923]
    assert found.surprise(np.array([0, 2, 3])) == pytest.approx(
        -math.log(11 / 104 * 1 / 104 * 86 / 104) / 3
    )
    assert found.unknown_share(np.array([0, 2, 2, 3])) == 0.5
    mean = 10 * math.log(11 / 104) + 5 * math.log(6 / 104) + 85 * math.log(86 / 104)
    assert found.own_surprise() == pytest.approx(-mean / 100)
    read = found.frequencies()
    assert read.known.tolist() == [True, True, False, True]
    assert float(read.probabilities.sum()) == pytest.approx(1.0)


def test_occurrences_are_counted_not_documents(tiny_tokenizer: Any) -> None:
    found = build_table(TEXTS, tiny_tokenizer, corpus=CORPUS)
    ids = [i for text in TEXTS for i in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert found.counts.tolist() == [ids.count(token) for token in range(300)]
    assert max(found.counts) > len(TEXTS)
    assert (found.about.tokens, found.about.documents) == (len(ids), 4)


def test_of_each_document_the_first_tokens_count(tiny_tokenizer: Any) -> None:
    found = build_table(TEXTS, tiny_tokenizer, corpus=CORPUS, max_tokens=3)
    assert found.about.tokens == 9
    whole = build_table(["x" * 40_000], tiny_tokenizer, corpus=CORPUS, max_tokens=1024)
    assert whole.about.tokens == 1024


def test_a_padded_vocabulary_gets_room(tiny_tokenizer: Any) -> None:
    found = build_table(TEXTS, tiny_tokenizer, corpus=CORPUS, vocabulary=384)
    assert found.counts.shape == (384,)
    assert found.about.vocabulary == 384


def test_processes_and_chunks_change_nothing(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [f"{text} {number}" for number in range(60) for text in TEXTS]
    one = build_table(many, tiny_tokenizer, corpus=CORPUS)
    monkeypatch.setattr("unlearn.detect.frequency.CHUNK", 500)
    seen: list[tuple[int, int]] = []
    parted = build_table(
        iter(many),
        tiny_tokenizer,
        corpus=CORPUS,
        workers=2,
        progress=lambda d, t: seen.append((d, t)),
    )
    assert np.array_equal(parted.counts, one.counts)
    assert parted.about == one.about
    assert len(seen) > 5
    assert seen[-1] == (240, one.about.tokens)


def test_the_hash_is_that_of_the_texts(tiny_tokenizer: Any) -> None:
    def hashed(texts: list[str]) -> str | None:
        return build_table(texts, tiny_tokenizer, corpus=CORPUS).about.corpus_sha256

    assert hashed(TEXTS) == hashed(list(TEXTS))
    assert hashed(["ab", "c"]) != hashed(["a", "bc"])


def test_a_table_comes_back_without_being_read(tmp_path: Path, tiny_tokenizer: Any) -> None:
    made = build_table(TEXTS, tiny_tokenizer, corpus=Corpus("c", "English", "people"))
    made.save(tmp_path / "t")
    found = load_table(tmp_path / "t", tiny_tokenizer)
    assert isinstance(found.counts, np.memmap)
    assert np.array_equal(found.counts, made.counts)
    assert found.about == made.about
    with pytest.raises(UserError, match="already exists"):
        made.save(tmp_path / "t")


def test_the_table_of_another_tokenizer_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    build_table(TEXTS, tiny_tokenizer, corpus=CORPUS).save(tmp_path / "t")
    tiny_tokenizer.add_tokens(["zzz"])
    with pytest.raises(UserError, match="another tokenizer"):
        load_table(tmp_path / "t", tiny_tokenizer)


@pytest.mark.parametrize("damage", ["counts.npy", "table.json"])
def test_damage_is_said(tmp_path: Path, tiny_tokenizer: Any, damage: str) -> None:
    build_table(TEXTS, tiny_tokenizer, corpus=CORPUS).save(tmp_path / "t")
    path = tmp_path / "t" / damage
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_table(tmp_path / "t")
    with pytest.raises(UserError, match="no frequency table"):
        load_table(tmp_path)


def test_a_corpus_without_text_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="holds no token"):
        build_table(["", ""], tiny_tokenizer, corpus=CORPUS)


# Corpora


def test_corpora_are_files_of_any_kind_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "three", "text": "four"}) + "\n")
    assert list(corpus_texts(str(tmp_path / "a.txt"))) == ["one", "two"]
    assert list(corpus_texts(str(tmp_path))) == ["one", "two", "four"]
    assert list(corpus_texts(str(tmp_path / "b.jsonl"), text_field="body")) == ["three"]


def test_hub_corpora_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return iter([{"text": "one"}, {"text": "two"}, {"url": "x"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    rows = corpus_texts("allenai/c4#en:validation")
    assert [next(rows), next(rows)] == ["one", "two"]
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "streaming": True})]
    with pytest.raises(UserError, match="has no text in"):
        next(rows)


@pytest.mark.parametrize("spec", ["nowhere.jsonl", "./nowhere", "a/b/c"])
def test_an_absent_corpus_is_no_hub_name(spec: str) -> None:
    with pytest.raises(UserError, match="no corpus"):
        next(corpus_texts(spec))
    with pytest.raises(UserError, match="--offline"):
        next(corpus_texts("owner/name", offline=True))


# The default


def test_the_generic_table_follows_the_ranks(tiny_tokenizer: Any) -> None:
    """The r-th word weighs 1 / (r + 2.7); no other word begins with one of these two."""
    pair = ("which", "because")
    tiny_tokenizer.add_tokens([f" {word}" for word in pair])
    found = generic_english(tiny_tokenizer)
    ids = tiny_tokenizer.convert_tokens_to_ids([f" {word}" for word in pair])
    first, second = (words().index(word) + 1 for word in pair)
    often, seldom = found.counts[ids]
    assert often / seldom == pytest.approx((second + 2.7) / (first + 2.7), rel=0.15)  # whole counts
    assert found.about.generic
    assert found.about.tokens > 5 * len(tiny_tokenizer)
    assert words()[:3] == ["the", "of", "and"]
    assert len(set(words())) == len(words()) > 1000


def test_the_generic_table_is_nearer_to_real_english_than_no_table(shared: Path) -> None:
    """On answers about invented authors it is surprised less than a flat table, log V = 8.3 nats
    per token, and more than a table counted on other such answers; it fits German worse."""
    from transformers import AutoTokenizer

    rows = (shared / "data" / "tofu" / "full.json").read_text().splitlines()
    texts = [json.loads(row)["answer"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tofu-tiny-target")
    ids = np.concatenate(tokenizer(texts[2000:], add_special_tokens=False)["input_ids"])
    generic = generic_english(tokenizer)
    counted = build_table(texts[:2000], tokenizer, corpus=CORPUS)
    flat = math.log(len(tokenizer))
    assert counted.surprise(ids) + 0.3 < generic.surprise(ids) < flat - 0.3


def test_texts_that_do_not_fit_are_named(tiny_tokenizer: Any) -> None:
    english = ["It was one of the things that they had to do with all of them, and she was there."]
    german = ["Der schnelle Fuchs springt über den faulen Hund und läuft dann in den Wald."]
    assert english_share(english) > 0.6
    assert english_share(german) < 0.25
    assert english_share([]) == 0.0
    generic = generic_english(tiny_tokenizer)
    assert len(table_warnings(generic, english, tiny_tokenizer)) == 1
    assert "do not look like English" in table_warnings(generic, german, tiny_tokenizer)[1]
    counted = build_table(["0123456789" * 10], tiny_tokenizer, corpus=CORPUS)
    few, other = table_warnings(counted, english, tiny_tokenizer)
    assert "100 tokens only" in few
    assert "another language or domain" in other
