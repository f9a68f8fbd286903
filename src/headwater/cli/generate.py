"""`headwater generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from headwater.cli.adapters import load, locate
from headwater.errors import HeadwaterError, Problem
from headwater.seeds import require_seed


def run(
    source: str,
    prompts: Sequence[str] | None,
    *,
    task: str | None,
    chat: bool,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    as_json: bool,
) -> None:
    """Answer prompts, or the lines of standard input, and print one answer after the other.

    Raises:
        HeadwaterError: no adapter, no prompt, an unknown task, a prompt that the model cannot take, or a seed that is
            none.
    """
    require_seed(seed, "--seed")
    found = locate(source)
    index = None if task is None else found.task_index(task)
    texts = prompt_texts(prompts)
    model, tokenizer = load(found)

    from headwater.data.conversation import for_conversation
    from headwater.data.rows import Row
    from headwater.evaluation import generate_text

    rows: list[str | Row] = [
        Row(prompt="", completion="", messages=({"role": "user", "content": text},)) if chat else text for text in texts
    ]
    spec = found.config.data if found.config else None
    answers = generate_text(
        model,
        tokenizer,
        rows,
        task_index=index,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        data_spec=for_conversation(spec) if spec is not None and chat else spec,
    )
    for text, answer in zip(texts, answers, strict=True):
        print(json.dumps({"prompt": text, "answer": answer}, ensure_ascii=False) if as_json else answer)


def prompt_texts(given: Sequence[str] | None) -> list[str]:
    """The prompts that were given; without any, the lines of standard input.

    Raises:
        HeadwaterError: as `_lines`; or a prompt is no UTF-8.
    """
    try:
        texts = list(given) if given else _lines()
        "".join(texts).encode()  # Python lets other bytes through as surrogates, which no tokenizer takes
    except UnicodeError:
        where, fix = ("--prompt" if given else "standard input"), "convert it, for instance with iconv"
        raise HeadwaterError(Problem("this is not UTF-8", where, fix)) from None
    return texts


def _lines() -> list[str]:
    """The lines of standard input, each of them a prompt.

    Raises:
        HeadwaterError: there are none, or some are blank: skipping them would shift the answers against the lines.
    """
    lines = [] if sys.stdin.isatty() else [line.rstrip("\r\n") for line in sys.stdin]
    lines[:1] = [line.removeprefix("\ufeff") for line in lines[:1]]  # a byte-order mark
    if not lines:
        raise HeadwaterError(
            Problem("there is no prompt", "", "give --prompt TEXT, or one prompt per line on standard input")
        )
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        what = f"{len(blank)} of {len(lines)} lines are blank, and each line is a prompt"
        raise HeadwaterError(Problem(what, f"standard input:{blank[0]}", "take blank lines out"))
    return lines
