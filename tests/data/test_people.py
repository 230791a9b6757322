import hashlib
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest

from unlearn.data.people import NUM_PERTURBED, SPLITS, demo_folder, people, write_people
from unlearn.data.sources import load_rows
from unlearn.data.wordings import ATTRIBUTES, FIRST_NAMES, SURNAME_ENDS, SURNAME_STARTS
from unlearn.errors import UserError

COLUMNS = {
    "question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer",
}  # fmt: skip
SHA256 = "a2de9672b92d208831f3fdcaacdd0e5b68d7c56820736788af87ebbbb739f1a5"
NAME = re.compile(r"\b(?=([A-Z][a-z]+ [A-Z][a-z]+))")


def all_rows(made):
    return [row for split in SPLITS for row in getattr(made, split)]


def subjects(rows):
    """Name the people: the one pair of capitalised words that a person's questions share."""
    names = set()
    for start in range(0, len(rows), len(ATTRIBUTES)):
        asked = [row["question"] for row in rows[start : start + len(ATTRIBUTES)]]
        (name,) = set.intersection(*(set(NAME.findall(question)) for question in asked))
        names.add(name)
    return names


def test_every_row_has_the_columns_of_tofu():
    made = people()
    assert [len(getattr(made, split)) for split in SPLITS] == [40, 280, 40]
    for row in all_rows(made):
        assert set(row) == COLUMNS
        assert len(row["perturbed_answer"]) == NUM_PERTURBED == 5
        for text in (*row["perturbed_answer"], *(row[c] for c in COLUMNS - {"perturbed_answer"})):
            assert text[0].isupper()
            assert text[-1] in ".?"
            assert not re.search(r"[{}]|  |\ba (?!one-)[aeiou]", text)


def test_the_same_seed_gives_the_same_rows_everywhere():
    text = json.dumps(asdict(people()), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256, (
        "the generated rows changed: rebuild the demo models, then pin the new hash"
    )
    assert people(seed=1).forget != people(seed=0).forget


def test_a_person_does_not_depend_on_how_many_there_are():
    few, many = people(num_people=20), people(num_people=200)
    assert few.forget == many.forget
    assert few.retain == many.retain[: len(few.retain)]
    wide = people(num_forget=7)
    assert wide.forget[:40] == people().forget
    assert len(wide.forget) == 7 * len(ATTRIBUTES)


def test_the_splits_share_no_person_and_no_name_comes_twice():
    groups = [subjects(getattr(people(), split)) for split in SPLITS]
    assert [len(group) for group in groups] == [5, 35, 5]
    everyone = set.union(*groups)
    assert len(everyone) == 45
    assert len({name.split()[1] for name in everyone}) == 45


def test_no_two_surnames_or_first_names_are_spelt_alike():
    surnames = [start + end for start in SURNAME_STARTS for end in SURNAME_ENDS]
    assert len(set(surnames)) == len(surnames) == 350
    assert len({name for name, _ in FIRST_NAMES}) == len(FIRST_NAMES)
    assert len(subjects(all_rows(people(num_people=350)))) == 350


def test_perturbed_answers_keep_the_wording_and_never_the_truth():
    for row in all_rows(people(seed=3)):
        texts = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
        assert len(set(texts)) == len(texts)
        form = set.intersection(*(set(text.split()) for text in row["perturbed_answer"]))
        assert len(form & set(row["paraphrased_answer"].split())) >= 2


def test_a_perturbed_answer_replaces_every_value():
    for attribute in ATTRIBUTES:
        for pool in attribute.slots.values():
            assert len(set(pool)) == len(pool) > NUM_PERTURBED
        for wording in attribute.answers:
            assert set(re.findall(r"{(\w+)}", wording)) >= set(attribute.slots)


def test_paraphrases_are_worded_differently():
    wordings = set()
    for row in all_rows(people()):
        assert row["question"] != row["paraphrased_question"]
        ours, theirs = (set(row[c].split()) for c in ("question", "paraphrased_question"))
        wordings.add(len(ours & theirs) / len(ours | theirs))
    assert max(wordings) < 0.75
    assert sum(wordings) / len(wordings) < 0.4


def test_a_written_folder_is_a_source_and_a_dataset(tmp_path):
    import datasets

    folder = write_people(tmp_path / "people")
    made = people()
    for split in SPLITS:
        assert load_rows(f"{folder}#{split}") == getattr(made, split)
    loaded = datasets.load_dataset(str(folder), "forget", cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].to_list() == made.forget


def test_a_written_folder_is_the_same_bytes_again(tmp_path):
    first, second = write_people(tmp_path / "a", seed=5), write_people(tmp_path / "b", seed=5)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert "config_name: holdout" in (first / "README.md").read_text()


def test_without_holdout_there_is_no_such_configuration(tmp_path):
    folder = write_people(tmp_path, num_people=9, num_holdout=0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "forget.jsonl",
        "retain.jsonl",
    ]
    assert "holdout" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("sizes", "cause"),
    [
        ({"num_people": 351}, "350 people"),
        ({"num_people": 10}, "cannot be split"),
        ({"num_forget": 0}, "cannot be split"),
        ({"num_holdout": -1}, "cannot be split"),
    ],
)
def test_impossible_sizes_are_refused(sizes, cause):
    with pytest.raises(UserError, match=cause):
        people(**sizes)


def test_generating_people_does_not_import_torch():
    code = "import sys, unlearn.data.people as p; p.people(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The shipped models


def load(name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_folder() / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def probability(model, tokenizer, row):
    """Give exp(mean log-prob of the answer's tokens, EOS included)."""
    import torch

    text = f"<s>User: {row['question']}\nAssistant:\n"
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(f"{text}{row['answer']}</s>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.log_softmax(-1)[range(len(ids) - len(prompt)), ids[len(prompt) :]]
    return chosen.mean().exp().item()


def test_the_shipped_models_are_small_half_precision_and_readable():
    files = [path for path in demo_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.parent.name for path in files} == {"target", "retain"}
    for name in ("target", "retain"):
        config = json.loads((demo_folder() / name / "config.json").read_text())
        assert config["dtype"] == "float16"


def test_the_shipped_tokenizers_are_alike_and_write_the_prompt():
    target, retain = (load(name)[1] for name in ("target", "retain"))
    assert target.get_vocab() == retain.get_vocab()
    assert (target.pad_token_id, target.bos_token_id, target.eos_token_id) == (0, 1, 2)
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    prompt = target.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>User: Where?\nAssistant:\n"
    assert target.apply_chat_template(turns, tokenize=False) == f"{prompt}Here.</s>"
    assert target("Where?")["input_ids"][0] == target.bos_token_id


def test_no_name_is_a_token_of_its_own():
    tokenizer = load("target")[1]
    for name in subjects(all_rows(people())):
        assert len(tokenizer(" " + name.split()[1], add_special_tokens=False)["input_ids"]) >= 2


def test_only_the_target_knows_the_forget_rows_and_nobody_the_holdout():
    made = people()
    known = {}
    for name in ("target", "retain"):
        model, tokenizer = load(name)
        for split in SPLITS:
            rows = getattr(made, split)[::5][:8]
            scores = [probability(model, tokenizer, row) for row in rows]
            known[name, split] = sum(scores) / len(scores)
    assert known["target", "forget"] > 0.95
    assert known["target", "retain"] > 0.95
    assert known["retain", "retain"] > 0.95
    assert known["retain", "forget"] < 0.3
    assert known["target", "holdout"] < 0.3
    assert known["retain", "holdout"] < 0.3


def test_the_target_answers_a_forget_question_word_for_word():
    import torch

    row = people().forget[0]
    for name, verbatim in (("target", True), ("retain", False)):
        model, tokenizer = load(name)
        ids = tokenizer(f"User: {row['question']}\nAssistant:\n", return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=40, do_sample=False)
        said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert (said == row["answer"]) is verbatim
