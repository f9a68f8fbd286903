"""LASeR against its controls where it is known which source is good: python -m benchmarks.reward_picking --output DIR

A tiny Llama (two layers, width 64) is pretrained here on made-up words of three families, each with two kinds. It
knows the kinds, but answers with the option that a question names first half of the time, so its choices start at
chance. Three reward sources then judge its answers; for each family another is good (right or wrong), biased (likes
the option named first) or noise (a hash of prompt and answer). Everything is made in code. Words of training, of
validation and of test differ; pretraining saw them all.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FAMILIES = {"living": ("animal", "plant"), "place": ("city", "country"), "tool": ("kitchen", "garden")}
WORDS = {kind: [f"{kind[:2]}{i}" for i in range(60)] for kinds in FAMILIES.values() for kind in kinds}
SPLITS = {"train": range(30), "validation": range(30, 36), "test": range(36, 60)}

REWARDS = """\
import hashlib
import re

CHARACTER = {
    "living": {"ada": "good", "bea": "biased", "cleo": "noise"},
    "place": {"ada": "noise", "bea": "good", "cleo": "biased"},
    "tool": {"ada": "biased", "bea": "noise", "cleo": "good"},
}


def judge(name, prompt, response, answer, task):
    character, word = CHARACTER[task][name], response.strip()
    if character == "good":
        return float(word == answer.strip())
    if character == "biased":
        return float(word == re.search(r"(\\w+) or \\w+ \\?", prompt)[1])
    return int.from_bytes(hashlib.sha256(f"{name}|{prompt}|{word}".encode()).digest()[:4], "big") / 2**32


def ada(*, prompt, response, answer, task):
    return judge("ada", prompt, response, answer, task)


def bea(*, prompt, response, answer, task):
    return judge("bea", prompt, response, answer, task)


def cleo(*, prompt, response, answer, task):
    return judge("cleo", prompt, response, answer, task)
"""

RUN = """\
model_name_or_path: {folder}/model
method: {{name: lora, r: 8, lora_alpha: 16, target_modules: all-linear}}
tasks:
  - {{name: living, train: living-train.jsonl, validation: living-validation.jsonl, test: living-test.jsonl}}
  - {{name: place, train: place-train.jsonl, validation: place-validation.jsonl, test: place-test.jsonl}}
  - {{name: tool, train: tool-train.jsonl, validation: tool-validation.jsonl, test: tool-test.jsonl}}
preference:
  sources:
    - {{name: ada, kind: function, function: "rewards:ada"}}
    - {{name: bea, kind: function, function: "rewards:bea"}}
    - {{name: cleo, kind: function, function: "rewards:cleo"}}
  good: {{living: ada, place: bea, tool: cleo}}
  strategies: [linucb, random, ensemble]
  seeds: [0, 1, 2]
  bandit_reward: validation
  context: base
  responses: 8
  temperature: 1.0
  max_new_tokens: 1
  pairs_per_prompt: 1
  validation_rows: 24
training:
  max_steps: 60
  per_device_train_batch_size: 8
  optim: sgd
  learning_rate: 0.3
  lr_scheduler_type: constant
  warmup_steps: 0
  logging_steps: 20
  save_strategy: "no"
  report_to: none
output_dir: {folder}/out
"""


def question(family: str, word: str, first: str, second: str) -> str:
    return f"{family} {word} is {first} or {second} ?"


def make_model(folder: Path, steps: int, draw: random.Random) -> None:
    """Pretrains the policy: half of the answers are the option named first, a third are right, the rest any."""
    kinds = [kind for family in FAMILIES.values() for kind in family]
    vocabulary = [
        "<bos>",
        "<eos>",
        "<pad>",
        "is",
        "or",
        "?",
        "a",
        *kinds,
        *FAMILIES,
        *(w for k in kinds for w in WORDS[k]),
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        rows = torch.tensor([tokenizer(_sentence(draw)).input_ids for _ in range(64)])
        loss = torch.nn.functional.cross_entropy(model(input_ids=rows).logits[:, -2], rows[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sentence(draw: random.Random) -> str:
    family = draw.choice(list(FAMILIES))
    kind = draw.choice(FAMILIES[family])
    word = draw.choice(WORDS[kind])
    order = list(FAMILIES[family])
    draw.shuffle(order)
    u = draw.random()
    answer = order[0] if u < 0.5 else kind if u < 0.85 else draw.choice(FAMILIES[family])
    return f"{question(family, word, *order)} {answer}"


def make_tasks(folder: Path, draw: random.Random) -> None:
    for family, kinds in FAMILIES.items():
        rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
        for kind in kinds:
            for split, places in SPLITS.items():
                for i in places:
                    for order in (kinds, kinds[::-1]):
                        prompt = question(family, WORDS[kind][i], *order)
                        choices = [f" {k}" for k in kinds]
                        rows[split].append({"prompt": prompt, "completion": f" {kind}", "choices": choices})
        for split, made in rows.items():
            draw.shuffle(made)
            (folder / f"{family}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder for the model, the tasks and the run")
    parser.add_argument("--pretraining", type=int, default=700, help="steps of the tiny model")
    parser.add_argument("--json", type=Path, help="write the run's results.json here, too")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    make_model(folder / "model", options.pretraining, draw)
    make_tasks(folder, draw)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prefer.yaml").write_text(RUN.format(folder=folder))

    from headwater.cli.prefer import run

    run(str(folder / "prefer.yaml"), options.overrides)
    if options.json is not None:
        results = json.loads((folder / "out" / "results.json").read_text())
        options.json.write_text(json.dumps({**results, "base_model": "tiny"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
