"""Every format that rows are read from, and files that cannot be read."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from headwater.data.rows import Row, read_rows
from headwater.errors import HeadwaterError

RECORDS = [
    {"prompt": "Is it 1?\nAnswer:", "completion": " yes", "choices": [" yes", " no"]},
    {"prompt": 'Is it "2", or ü?', "completion": " no", "choices": [" yes", " no"]},
    {"prompt": "", "completion": " yes", "choices": [" yes", " no"]},
]
EXPECTED = [(r["prompt"], r["completion"], tuple(r["choices"])) for r in RECORDS]


def contents(rows: list[Row]):
    return [(row.prompt, row.completion, row.choices) for row in rows]


def said(source, **options) -> str:
    with pytest.raises(HeadwaterError) as caught:
        read_rows(source, **options)
    return str(caught.value)


def write_jsonl(path, records=RECORDS):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_jsonl(tmp_path):
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl"))
    assert contents(rows) == EXPECTED
    assert [row.line for row in rows] == [1, 2, 3]
    assert {row.source for row in rows} == {str(tmp_path / "a.jsonl")}


def test_jsonl_with_blank_lines_windows_line_ends_and_a_byte_order_mark(tmp_path):
    lines = [json.dumps(r, ensure_ascii=False).encode() for r in RECORDS]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    rows = read_rows(tmp_path / "a.jsonl")
    assert contents(rows) == EXPECTED
    assert [row.line for row in rows] == [1, 3, 5]


def test_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1))
    rows = read_rows(tmp_path / "a.json")
    assert contents(rows) == EXPECTED
    assert [row.line for row in rows] == [1, 2, 3]


def test_csv_lines_are_where_a_row_starts(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["completion", "id", "choices", "prompt"])
        for i, record in enumerate(RECORDS):
            writer.writerow([record["completion"], i, json.dumps(record["choices"]), record["prompt"]])
    rows = read_rows(tmp_path / "a.csv")
    assert contents(rows) == EXPECTED
    assert [row.line for row in rows] == [2, 4, 5]


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert contents(rows) == EXPECTED
    assert [row.line for row in rows] == [1, 2, 3]


def test_parquet_conversations(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    table = pyarrow.Table.from_pylist([{"messages": [{**messages[0], "name": "Ann"}]}, {"messages": messages}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    text = said(tmp_path / "a.parquet")
    assert "a.parquet:1: message 1 has fields that are not read: name" in text
    assert "a.parquet:2" not in text


def test_folder_saved_by_datasets(tmp_path):
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "one")
    assert contents(read_rows(tmp_path / "one")) == EXPECTED
    datasets.DatasetDict(train=data, extra=data.select([1])).save_to_disk(tmp_path / "two")
    assert contents(read_rows(tmp_path / "two")) == EXPECTED
    assert contents(read_rows(tmp_path / "two", split="extra")) == EXPECTED[1:2]
    datasets.DatasetDict(validation=data).save_to_disk(tmp_path / "three")
    assert contents(read_rows(tmp_path / "three")) == EXPECTED
    assert "there is no split 'tset'\n    it has train, extra" in said(tmp_path / "two", split="tset")


def test_folder_of_files_that_datasets_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")
    write_jsonl(folder / "test.jsonl", RECORDS[:1])
    assert contents(read_rows(folder)) == EXPECTED
    assert contents(read_rows(folder, split="test")) == EXPECTED[:1]


def test_class_numbers_are_read_as_names(tmp_path):
    features = datasets.Features(prompt=datasets.Value("string"), completion=datasets.ClassLabel(names=["no", "yes"]))
    records = [{"prompt": "a", "completion": 1}, {"prompt": "b", "completion": 0}, {"prompt": "c", "completion": -1}]
    datasets.Dataset.from_list(records[:2], features).save_to_disk(tmp_path / "good")
    assert [row.completion for row in read_rows(tmp_path / "good")] == ["yes", "no"]
    datasets.Dataset.from_list(records, features).save_to_disk(tmp_path / "unlabelled")
    assert ":3: field 'completion' is null" in said(tmp_path / "unlabelled")


def test_items_of_a_json_list_are_not_taken_for_lines(tmp_path):
    rows = [{"prompt": str(i)} for i in range(12)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    places = [line.partition(": field")[0] for line in said(path).splitlines()]
    assert [place for place in places if place.startswith(str(path))] == [f"{path}: item {i}" for i in range(1, 13)]
    assert Row("", "", source="b.json", line=2).where == "b.json: item 2"


def test_a_cell_of_a_csv_file_may_be_long(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{long},yes\n")
    limit = csv.field_size_limit()
    assert read_rows(tmp_path / "a.csv")[0].prompt == long
    assert csv.field_size_limit() == limit


def test_malformed_jsonl_names_every_line(tmp_path):
    good = json.dumps(RECORDS[0]).encode()
    (tmp_path / "a.jsonl").write_bytes(
        b"\n".join([good, b'{"prompt": ', good, b"[1]", b'{"prompt": "caf\xe9"}', b'"x"', b"[" * 100_000])
    )
    text = said(tmp_path / "a.jsonl")
    assert "a.jsonl:2: not JSON: Expecting value at column 12" in text
    assert "a.jsonl:4: the row is a list" in text
    assert "a.jsonl:5: byte 16 of the line is not UTF-8" in text
    assert "a.jsonl:6: the row is text" in text
    assert "a.jsonl:7: not JSON" in text
    assert "a.jsonl:1:" not in text
    assert "a.jsonl:3:" not in text


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.json", b'{"prompt": 1}', "a.json: holds an object, not a list of rows"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "a.json:2: not JSON: Extra data"),
        ("a.json", b"[\n\n{]", "a.json:3: not JSON"),
        ("a.json", b'[\n"\xff"]', "a.json:2: byte 4 of the file is not UTF-8"),
        ("a.json", b"[1]", "a.json: item 1: the row is a number"),
        ("a.csv", b"prompt,completion\na\n", "a.csv:2: the header has 2 cells, the row 1"),
        ("a.csv", b"prompt,completion\n\na,b,c\n", "a.csv:3: the header has 2 cells, the row 3"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv:1: the header names prompt more than once"),
        ("a.csv", b'prompt,completion\na,"b\n', "a.csv:2: not CSV"),
        ("a.csv", b"prompt,completion\na,b\n\xff,b\n", "a.csv:3: byte 23 of the file is not UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), "is UTF-16 text, not UTF-8"),
        ("a.parquet", b"PAR?", "not a Parquet file"),
        ("a.xlsx", b"", "the ending '.xlsx' is not one that can be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert expected in said(tmp_path / name)


def test_missing_files(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert said(tmp_path / name) == f"{tmp_path / name}: no such file"
    assert said(tmp_path / "a") == f"{tmp_path / 'a'}: no such file or folder"


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it"), RuntimeError("Dataset scripts are no longer supported")]
)
def test_a_hub_name_that_cannot_be_had(monkeypatch, error):
    def unreachable(*_args, **_options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert f"nobody/nothing: no such file or folder, and as a hub data set: {error}" in said("nobody/nothing")


def test_a_hub_name_gives_name_subset_and_split(monkeypatch):
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS), test=datasets.Dataset.from_list([]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("openai/gsm8k", subset="main")
    assert contents(rows) == EXPECTED
    assert rows[2].where == "openai/gsm8k:3"
    assert asked == [("openai/gsm8k", "main")]


def test_an_empty_folder(tmp_path):
    assert "`datasets` cannot load this folder" in said(tmp_path)
