"""Tasks: what they hold, how they are checked and described."""

from __future__ import annotations

import json

import datasets
import pytest
from pydantic import ValidationError

from headwater.data.rows import Row
from headwater.data.tasks import Task, TaskSpec, describe, load_tasks, majority
from headwater.errors import HeadwaterError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def choice(i, completion=" a"):
    return {"prompt": f"Question {i}:", "completion": completion, "choices": [" a", " b"]}


def free(i):
    return {"prompt": f"Question {i}:", "completion": f" {i}"}


def said(specs, folder) -> str:
    with pytest.raises(HeadwaterError) as caught:
        load_tasks(specs, folder)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", [choice(i) for i in range(40)])
    write(tmp_path / "test.jsonl", [choice(i, " b" if i % 4 else " a") for i in range(38, 50)])
    write(tmp_path / "free.jsonl", [free(i) for i in range(30)])
    return tmp_path


def test_tasks_are_numbered_and_their_files_found_from_the_base_folder(folder):
    specs = [
        TaskSpec(name="first", train="train.jsonl", test="test.jsonl", weight=2),
        TaskSpec(name="second", train=str(folder / "free.jsonl"), validation="free.jsonl"),
        TaskSpec(name="held-out", test="free.jsonl", metric="exact_match"),
    ]
    first, second, third = load_tasks(specs, folder)
    assert [t.index for t in (first, second, third)] == [0, 1, 2]
    assert (first.weight, second.weight) == (2, 1)
    assert [len(rows) for rows in (first.train, first.validation, first.test)] == [40, 0, 12]
    assert [len(rows) for rows in (third.train, third.validation, third.test)] == [0, 0, 30]
    assert first.train[4].where == "train.jsonl:5"


def test_a_file_that_is_not_in_the_base_folder_is_not_looked_for_elsewhere(folder, monkeypatch):
    (folder / "runs").mkdir()
    monkeypatch.chdir(folder)
    assert said([TaskSpec(name="a", train="train.jsonl")], folder / "runs") == "train.jsonl: no such file"


def test_metric_follows_the_rows(folder):
    specs = [TaskSpec(name="a", train="train.jsonl"), TaskSpec(name="b", train="free.jsonl")]
    assert [task.metric for task in load_tasks(specs, folder)] == ["choice_accuracy", "loss"]
    assert load_tasks([TaskSpec(name="b", test="free.jsonl", metric="exact_match")], folder)[0].metric == "exact_match"


def test_rows_that_the_metric_cannot_score(folder):
    write(folder / "mixed.jsonl", [choice(1), free(2), free(3)])
    specs = [
        TaskSpec(name="a", train="train.jsonl", test="mixed.jsonl"),
        TaskSpec(name="b", train="free.jsonl", test="free.jsonl", metric="final_number"),
        TaskSpec(name="c", train="train.jsonl", validation="free.jsonl", test="test.jsonl"),
    ]
    text = said(specs, folder)
    assert "mixed.jsonl:2: tasks[0] a: 2 of 3 held-out rows have no choices" in text
    assert "free.jsonl:1: tasks[1] b: 30 of 30 held-out rows have no number after ####" in text
    assert "free.jsonl:1: tasks[2] c: 30 of 42 held-out rows have no choices" in text


def test_a_mark_without_a_number_is_no_answer(folder):
    rows = [{"prompt": f"{i} + 1 =", "completion": answer} for i, answer in enumerate(("#### 1", "#### n/a", " 42"))]
    write(folder / "sums.jsonl", rows)
    text = said([TaskSpec(name="a", test="sums.jsonl", metric="final_number")], folder)
    assert "sums.jsonl:2: tasks[0] a: 2 of 3 held-out rows have no number after ####" in text


def test_a_sample_is_the_same_every_time_in_order_and_said(folder):
    spec = TaskSpec(name="a", train="train.jsonl", test="test.jsonl", max_train_rows=10, max_test_rows=100)
    task, again = load_tasks([spec], folder)[0], load_tasks([spec], folder)[0]
    lines = [row.line for row in task.train]
    assert lines == sorted(set(lines))
    assert lines != list(range(1, 11))
    assert task.train == again.train
    assert len(task.train) == 10
    assert len(task.test) == 12
    assert task.notes == ["train: 10 of 40 rows of train.jsonl, drawn at random"]


def test_held_out_rows_are_drawn_in_both_splits(folder):
    spec = TaskSpec(name="a", train="free.jsonl", validation="train.jsonl", test="train.jsonl", max_test_rows=10)
    task = load_tasks([spec], folder)[0]
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 10, 10)
    assert [row.line for row in task.validation] != list(range(1, 11))
    assert task.notes[0] == "validation: 10 of 40 rows of train.jsonl, drawn at random"


def test_overlap_and_repetition_are_warned_about(folder):
    write(folder / "leaky.jsonl", [choice(1), choice(1), {**choice(50), "prompt": "Question  39:\n"}, choice(99)])
    task = load_tasks([TaskSpec(name="a", train="train.jsonl", test="leaky.jsonl")], folder)[0]
    assert task.warnings == [
        "3 of 4 test rows have a prompt that is also trained or validated on",
        "test: 1 of 4 rows repeat an earlier one",
    ]
    assert load_tasks([TaskSpec(name="a", train="train.jsonl")], folder)[0].warnings == []


def test_test_rows_that_are_validated_on_count_too(folder):
    spec = TaskSpec(name="a", train="train.jsonl", validation="test.jsonl", test="test.jsonl")
    (warning,) = load_tasks([spec], folder)[0].warnings
    assert warning.startswith("12 of 12 test rows")


def test_prompts_that_end_with_a_space_are_warned_about(folder):
    write(folder / "spaced.jsonl", [{"prompt": f"Question {i}: ", "completion": "yes"} for i in range(3)])
    (warning,) = load_tasks([TaskSpec(name="a", train="spaced.jsonl")], folder)[0].warnings
    assert "3 of 3 prompts end with a space" in warning


def test_overlap_of_conversations_is_by_all_that_is_asked(folder):
    def chat(system, asked, answer):
        turns = [("system", system), ("user", asked), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    write(folder / "c1.jsonl", [chat("x", "1", "yes"), chat("x", "2", "yes")])
    write(folder / "c2.jsonl", [chat("x", "1", "no"), chat("y", "2", "yes")])
    task = load_tasks([TaskSpec(name="a", train="c1.jsonl", test="c2.jsonl")], folder)[0]
    assert task.warnings == ["1 of 2 test rows have a prompt that is also trained or validated on"]


def test_rows_of_plain_text_overlap_where_they_are_the_same(folder):
    write(folder / "t1.jsonl", [{"text": "one"}, {"text": "two"}])
    write(folder / "t2.jsonl", [{"text": "two "}, {"text": "three"}])
    task = load_tasks([TaskSpec(name="a", train="t1.jsonl", test="t2.jsonl")], folder)[0]
    assert task.warnings == ["1 of 2 test rows have a prompt that is also trained or validated on"]


def test_all_problems_of_all_tasks_together(folder):
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "broken.jsonl").write_text('{"prompt": "x"}\n{\n')
    specs = [
        TaskSpec(name="same", train="missing.jsonl"),
        TaskSpec(name="same", train="empty.jsonl"),
        TaskSpec(name="nothing", validation="free.jsonl"),
        TaskSpec(name="third", train="broken.jsonl", test="broken.jsonl"),
    ]
    text = said(specs, folder)
    assert "tasks[1].name: 2 tasks are called 'same'" in text
    assert "missing.jsonl: no such file" in text
    assert "empty.jsonl: has no rows\n    task 'same' needs at least one train row" in text
    assert "tasks[2].name: task 'nothing' has neither `train` nor `test`\n    give it one, or both" in text
    assert "broken.jsonl:1: field 'completion' is missing" in text
    assert text.count("broken.jsonl:2: not JSON") == 1
    assert str(folder) not in text


def test_a_home_folder_that_nobody_has_is_one_problem_among_others(folder):
    specs = [TaskSpec(name="a", train="~nouser9/x.jsonl"), TaskSpec(name="b", train="nothing.jsonl")]
    with pytest.raises(HeadwaterError) as caught:
        load_tasks(specs, folder)
    first, second = caught.value.problems
    assert (first.where, first.what) == ("~nouser9/x.jsonl", "no home folder is known for `~nouser9`")
    assert second.where == "nothing.jsonl"


def test_the_home_folder_of_a_task(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (task,) = load_tasks([TaskSpec(name="a", train="~/train.jsonl")], folder / "elsewhere")
    assert len(task.train) == 40


def test_many_broken_files_fit_on_one_screen(folder):
    specs = []
    for i in range(12):
        (folder / f"{i}.jsonl").write_text('{"prompt": "x"}\n' * 500)
        specs.append(TaskSpec(name=f"t{i}", train=f"{i}.jsonl"))
    text = said(specs, folder)
    assert len(text.splitlines()) <= 40
    assert all(f"{i}.jsonl: and 499 more problems" in text for i in range(12))
    with pytest.raises(HeadwaterError) as caught:
        load_tasks(specs, folder, all_problems=True)
    assert len(caught.value.problems) == 12 * 500


def test_no_tasks(tmp_path):
    assert "there are no tasks" in said([], tmp_path)


def test_records_with_other_fields(folder):
    write(folder / "qa.jsonl", [{"question": "2 + 3", "answer": "It is 5\n#### 5"}])
    spec = TaskSpec(
        name="sums", train="qa.jsonl", prompt="Q: {question}\nA:", completion=" {answer}", metric="final_number"
    )
    (row,) = load_tasks([spec], folder)[0].train
    assert (row.prompt, row.completion) == ("Q: 2 + 3\nA:", " It is 5\n#### 5")


def test_a_source_that_is_no_path_is_a_hub_data_set_and_its_splits_are_those_of_the_task(folder, monkeypatch):
    def load_dataset(name, subset):
        assert (name, subset) == ("owner/name.v1", "main")
        return datasets.DatasetDict(
            train=datasets.Dataset.from_list([free(i) for i in range(3)]),
            validation=datasets.Dataset.from_list([free(i) for i in range(3, 5)]),
            held_out=datasets.Dataset.from_list([free(9)]),
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name = "owner/name.v1"
    spec = TaskSpec(name="a", train=name, validation=name, test=name, test_split="held_out", subset="main")
    (task,) = load_tasks([spec], folder)
    assert [len(rows) for rows in (task.train, task.validation, task.test)] == [3, 2, 1]
    assert task.train[2].where == "owner/name.v1:3"


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../up"},
        {"name": ""},
        {"name": "mean"},
        {"name": "loss"},
        {"name": "a", "train": ""},
        {"name": "a", "validation": ""},
        {"name": "a", "test": ""},
        {"name": "a", "weight": 0},
        {"name": "a", "weight": float("inf")},
        {"name": "a", "max_train_rows": 0},
        {"name": "a", "metric": "accuracy"},
        {"name": "a", "tain": "x.jsonl"},
        {"name": "a", "prompt": "{question}"},
        {"name": "a", "choices": ["{a}"]},
        {"name": "a", "prompt": "{question", "completion": "x"},
    ],
)
def test_specs_that_are_refused(fields):
    with pytest.raises(ValidationError):
        TaskSpec(**fields)


def test_describe_is_plain_and_counts_by_file(folder):
    specs = [
        TaskSpec(name="a", train="train.jsonl", test="test.jsonl"),
        TaskSpec(name="b", train="free.jsonl", test="free.jsonl", max_train_rows=5),
    ]
    first, second = describe(load_tasks(specs, folder))
    assert json.loads(json.dumps(first)) == first
    assert first["splits"] == {
        "train": {"rows": 40, "files": {"train.jsonl": 40}},
        "test": {"rows": 12, "files": {"test.jsonl": 12}},
    }
    assert first["majority"] == pytest.approx(9 / 12)
    assert first["overlap"] == 2
    assert second["majority"] is None
    assert second["splits"]["train"]["rows"] == 5
    assert second["notes"] == ["train: 5 of 30 rows of free.jsonl, drawn at random"]


@pytest.mark.parametrize(
    ("metric", "share"), [("choice_accuracy", 2 / 3), ("exact_match", 2 / 3), ("final_number", None), ("loss", None)]
)
def test_what_always_giving_the_same_answer_scores(metric, share):
    """With choices or without, and with white space at the ends aside, as a generated answer is scored."""
    rows = [Row("a", "#### 1", ("#### 1", "#### 2")), Row("b", " #### 1\n"), Row("c", "#### 2")]
    assert majority(rows, metric) == (share and pytest.approx(share))
    assert describe([Task("t", 0, metric, test=rows)])[0]["majority"] == majority(rows, metric)
    assert majority([], metric) is None
