"""Rebuild the models that ship with the package: `python scripts/build_demo_models.py`.

Two Llamas of 0.93 million parameters, written to `unlearn/data/demo`. The *target* has memorised
the forget and the retain rows of `unlearn.data.people.people()`; the *retain* model started from
the same weights and followed the same recipe without the forget rows. They are trained in float32
and saved in float16, tokenizer included.

Takes about 3 minutes on 2 free CPU cores. At the end it prints, for the files it wrote, the mean
answer probability (geometric mean over the answer's tokens, then mean over rows) and ROUGE-L recall
of greedy answers on each group of rows, and the size on disk. It fails when the target has not
memorised its rows. The same machine and versions give the same bytes.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from unlearn.data.collate import pad
from unlearn.data.encode import Example, encode
from unlearn.data.people import SPLITS, People, people
from unlearn.data.templates import Template

DEMO = Path(__file__).parents[1] / "unlearn" / "data" / "demo"
VOCABULARY = 1024
NUM_EPOCHS = 60
BATCH = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 50
MAX_BYTES = 6_000_000

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant:\n{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def main() -> None:
    """Build both models and print what they know."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for both models")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and row order")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    rows = people()
    examples = {split: encode_rows(getattr(rows, split), tokenizer) for split in SPLITS}
    lessons = {"target": examples["forget"] + examples["retain"], "retain": examples["retain"]}
    for name, lesson in lessons.items():
        model = train(build_model(len(tokenizer), options.seed), lesson, name, options.seed)
        model.half().save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        for path in (options.out / name).iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which a wheel would pass on
    report(options.out, rows, examples, tokenizer)


def build_tokenizer() -> FastTokenizer:
    """Train a byte-level BPE on *other* people, so that no name here is a token of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    others = people(seed=1, num_people=300)
    columns = ("question", "answer", "paraphrased_question", "paraphrased_answer")
    texts = [row[column] for row in others.retain for column in columns]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([*texts, "System:\nUser:\nAssistant:\n"], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = FastTokenizer(tokenizer_object=core, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Make an untrained Llama; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def encode_rows(rows: Sequence[Mapping[str, Any]], tokenizer: FastTokenizer) -> list[Example]:
    """Label the answers, exactly as a run on these rows would."""
    template = Template.for_tokenizer(tokenizer)
    return encode(rows, tokenizer, template, max_length=512, source="people")


def train(
    model: LlamaForCausalLM, examples: Sequence[Example], name: str, seed: int
) -> LlamaForCausalLM:
    """Train on the answers until they are known by heart: AdamW, warm-up, then a cosine to 0."""
    started = time.monotonic()
    order = torch.Generator().manual_seed(seed)
    steps_per_epoch = math.ceil(len(examples) / BATCH)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, NUM_EPOCHS * steps_per_epoch)
    )
    model.train()
    for epoch in range(NUM_EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(examples), generator=order).split(BATCH):
            batch = pad([examples[row] for row in rows.tolist()], pad_id=0)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            loss_text = f"{total / steps_per_epoch:.4f} nats per token"
            print(f"{name}: epoch {epoch + 1}, {loss_text}, {time.monotonic() - started:.0f} s")
    return model


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Scale the learning rate at this step."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def report(
    folder: Path, rows: People, examples: Mapping[str, list[Example]], tokenizer: FastTokenizer
) -> None:
    """Print what the saved models know and how large they are; fail if that is not as promised."""
    print(f"\n{'model':8}" + "".join(f"{split:>22}" for split in SPLITS))
    print(" " * 8 + f"{'prob':>14}{'ROUGE-L':>8}" * len(SPLITS))
    known = {}
    for name in ("target", "retain"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        line = f"{name:8}"
        for split in SPLITS:
            answers = [row["answer"] for row in getattr(rows, split)]
            probability = mean_probability(model, examples[split])
            rouge = mean_rouge(model, tokenizer, examples[split], answers)
            known[name, split] = (probability, rouge)
            line += f"{probability:14.3f}{rouge:8.3f}"
        print(line)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"\n{size / 1e6:.2f} MB in {folder}")
    for split in ("forget", "retain"):
        probability, rouge = known["target", split]
        if probability < 0.9 or rouge < 0.98:
            raise SystemExit(f"the target has not memorised the {split} rows")
    if size > MAX_BYTES:
        raise SystemExit(f"larger than {MAX_BYTES / 1e6} MB")


@torch.no_grad()
def mean_probability(model: LlamaForCausalLM, examples: Sequence[Example]) -> float:
    """Give the mean over rows of exp(mean log-prob per answer token, EOS included)."""
    batch = pad(examples, pad_id=0)
    labels = batch.pop("labels")[:, 1:]
    mask = labels != -100
    log_probs = model(**batch).logits[:, :-1].float().log_softmax(-1)
    token = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((token * mask).sum(1) / mask.sum(1)).exp().mean().item()


@torch.no_grad()
def mean_rouge(
    model: LlamaForCausalLM,
    tokenizer: FastTokenizer,
    examples: Sequence[Example],
    answers: Sequence[str],
) -> float:
    """Give the mean ROUGE-L recall (stemmed) of greedy answers."""
    prompts = [
        Example(example.input_ids[:start], example.labels[:start], start, example.row)
        for example in examples
        for start in [example.prompt_length]
    ]
    batch = pad(prompts, pad_id=0, side="left")
    del batch["labels"]
    out = model.generate(**batch, max_new_tokens=64, do_sample=False)
    said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(answers, said, strict=True)
    scores = [scorer.score(answer, text)["rougeL"].recall for answer, text in pairs]
    return sum(scores) / len(scores)


if __name__ == "__main__":
    main()
