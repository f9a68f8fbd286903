"""Fine-tuning the sentence encoder on a pool's sample texts: LoraRetriever (arXiv 2402.09997), sec. 3.2.

    L_i = -log  exp(s(x_i, x_i+) / g) / ( exp(s(x_i, x_i+) / g) + sum_j exp(s(x_i, x_j-) / g) )

x+ is another text of the same adapter, x- are texts of other adapters. The paper prints the ratio alone; what it
trains is its negative logarithm. It does not say g, the learning rate or the number of epochs. Here g, the learning
rate and the warm-up are those of Instructor, on which the paper builds. Unlike Instructor's, the training has 3 epochs,
not 10, because samples are few, and the loss has no second term from the positive to its query.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import HeadwaterError, Problem
from . import ranges
from .encoder import PROMPT

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Pair = tuple[str, str, str]
"""Adapter, text, another text of the same adapter."""


@dataclass(frozen=True)
class ContrastiveSpec:
    """How the encoder is fine-tuned.

    Args:
        epochs: how often each sample text is an anchor.
        learning_rate: the highest; warmed up over a tenth of the steps, then falling linearly to 0.
        temperature: g.
        batch_size: most adapters in a batch; a text's negatives are the batch's texts of the other adapters.
    """

    epochs: int = 3
    learning_rate: float = 2e-5
    temperature: float = 0.01
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.require(
            self,
            {
                "epochs": ranges.at_least(1, self.epochs),
                "learning_rate": ranges.rate(self.learning_rate),
                "temperature": ranges.positive(self.temperature),
                "batch_size": ranges.at_least(2, self.batch_size),
                "seed": ranges.seed(self.seed),
            },
        )


def usable_texts(samples: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each adapter's different texts, of those adapters that have two or more: a text needs another as its positive."""
    different = {name: list(dict.fromkeys(texts)) for name, texts in samples.items()}
    return {name: texts for name, texts in different.items() if len(texts) > 1}


def batches(samples: Mapping[str, Sequence[str]], spec: ContrastiveSpec) -> list[list[Pair]]:
    """All batches of the training. Each holds an adapter once at most, so that no text's negative is of its own kind.

    Raises:
        HeadwaterError: fewer than two adapters have two texts.
    """
    usable = usable_texts(samples)
    if len(usable) < 2:
        what = f"{len(usable)} adapters have two or more different sample texts"
        raise HeadwaterError(Problem(what, fix="telling adapters apart needs at least two of them"))
    draw = random.Random(spec.seed)
    result = []
    for _ in range(spec.epochs):
        turns = {name: draw.sample(texts, len(texts)) for name, texts in usable.items()}
        for turn in range(max(map(len, turns.values()))):
            names = [name for name, texts in turns.items() if turn < len(texts)]
            if len(names) < 2:
                break
            draw.shuffle(names)
            parts = -(-len(names) // spec.batch_size)
            for part in range(parts):
                rows = []
                for name in names[part::parts]:
                    anchor = turns[name][turn]
                    rows.append((name, anchor, draw.choice([text for text in usable[name] if text != anchor])))
                result.append(rows)
    return [rows for rows in result if len(rows) > 1]


class _AsGiven:
    """A batch sampler that yields batches of the sizes it was given, in their order."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = sizes

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size

    def __len__(self) -> int:
        return len(self.sizes)


def fine_tune(encoder: SentenceTransformer, samples: Mapping[str, Sequence[str]], spec: ContrastiveSpec) -> float:
    """Fine-tune the encoder in place; returns the mean loss over all steps.

    Args:
        encoder: a sentence encoder, from `load_encoder`; its prompt "retrieval" is put before every text.
        samples: adapter name -> its texts; those of the adapters to learn from only.

    Raises:
        HeadwaterError: there are too few adapters or texts, or the training ran away.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import PrinterCallback

    class Trainer(SentenceTransformerTrainer):
        def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
            """None: it would copy sample texts into the README.md that is saved with the encoder."""

    planned = batches(samples, spec)
    rows = [pair for batch in planned for pair in batch]
    data = Dataset.from_dict({"anchor": [row[1] for row in rows], "positive": [row[2] for row in rows]})
    sizes = [len(batch) for batch in planned]
    with tempfile.TemporaryDirectory() as scratch:
        instruction = encoder.prompts.get(PROMPT)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=max(sizes),
            learning_rate=spec.learning_rate,
            warmup_steps=len(planned) // 10,
            batch_sampler=lambda _data, **_options: _AsGiven(sizes),  # type: ignore[arg-type]
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            seed=spec.seed,
            prompts=instruction or None,
        )
        loss = MultipleNegativesRankingLoss(encoder, scale=1 / spec.temperature)
        encoder.model_card_data.generate_widget_examples = False
        trainer = Trainer(model=encoder, args=arguments, train_dataset=data, loss=loss)
        trainer.remove_callback(PrinterCallback)
        done = trainer.train()
    encoder.eval()
    if not all(parameter.isfinite().all() for parameter in encoder.parameters()):
        what = f"training ran away: at learning rate {spec.learning_rate:g} the encoder's numbers are no longer finite"
        raise HeadwaterError(Problem(what, "learning_rate", "lower it"))
    return float(done.training_loss)
