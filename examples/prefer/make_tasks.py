"""Writes the tasks of examples/prefer.yaml: `python examples/prefer/make_tasks.py`. It wrote the files beside it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

SPLITS = {"train": 20, "validation": 6, "test": 14}  # words of each kind; every word is in one split only

ANIMALS = (
    "trout horse eagle otter spider shark beetle camel goat penguin lizard mouse wolf crab owl salmon tiger zebra "
    "rabbit dolphin parrot turtle whale frog snake lobster monkey sheep donkey pigeon badger hamster moth squid "
    "giraffe kangaroo falcon leopard panther weasel"
)
PLANTS = (
    "cedar tulip fern cactus moss willow oak daisy ivy bamboo rose pine lily maple clover thistle birch orchid "
    "poppy lavender nettle spruce sunflower juniper violet heather holly magnolia begonia dandelion hazel reed "
    "sycamore poplar marigold primrose bluebell jasmine laurel palm"
)
CLOTHES = (
    "shirt jacket sock skirt glove scarf hat coat sweater dress blouse hoodie cardigan vest belt boot shoe sandal "
    "slipper cap beret mitten apron robe gown kimono poncho cloak tunic bra stocking cape bonnet raincoat tuxedo "
    "blazer turban sari corset anorak"
)
FURNITURE = (
    "table chair sofa desk bed shelf cabinet stool couch dresser bench armchair bookcase wardrobe cupboard "
    "nightstand ottoman recliner futon crib cradle sideboard bunk hammock mattress footstool lectern loveseat "
    "rocker pew throne chest bureau credenza armoire bookshelf workbench settee headboard dinette"
)

QUESTION = "Question: Is a {word} a kind of {} or {}?\nAnswer: It is a kind of"
FAMILIES = {"living": {"animal": ANIMALS, "plant": PLANTS}, "home": {"clothing": CLOTHES, "furniture": FURNITURE}}
"""Per family of tasks its answers, with their words."""


def rows(family: str) -> dict[str, list[dict[str, object]]]:
    """The rows of each split: every word with both orders of the options, shuffled."""
    words = FAMILIES[family]
    draw = random.Random(family)
    found: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
    for side in words:
        shuffled = iter(draw.sample(words[side].split(), sum(SPLITS.values())))
        for split, count in SPLITS.items():
            for word in [next(shuffled) for _ in range(count)]:
                for first, second in (tuple(words), tuple(words)[::-1]):
                    prompt = QUESTION.format(first, second, word=word)
                    choices = [f" {other}" for other in words]
                    found[split].append({"prompt": prompt, "completion": f" {side}", "choices": choices})
    for made in found.values():
        draw.shuffle(made)
    return found


def files() -> Iterator[tuple[str, str]]:
    """File names and contents."""
    for family in FAMILIES:
        for split, made in rows(family).items():
            yield f"{family}-{split}.jsonl", "".join(json.dumps(row) + "\n" for row in made)


if __name__ == "__main__":
    for name, text in files():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
