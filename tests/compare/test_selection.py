"""Rows that choose a learning rate: never test rows, and nothing that is trained on."""

import json

import pytest
from comparing import write_file

from headwater.compare.selection import MOST, best_rate, choosing_tasks, hold_out, quality
from headwater.config import load_config
from headwater.data.rows import Row
from headwater.data.tasks import Task, load_tasks
from headwater.errors import HeadwaterError


def task_of(count, repeat=1):
    rows = [Row(f"question {i // repeat}", f" {i}", line=i) for i in range(count)]
    return Task("t", 0, "loss", train=rows)


def test_a_tenth_is_held_out_and_at_most_so_many():
    for count, held in ((5, 1), (40, 4), (5000, MOST)):
        train, chosen = hold_out(task_of(count))
        assert (len(chosen), len(train)) == (held, count - held)
        assert {row.line for row in train} | {row.line for row in chosen} == set(range(count))
    assert hold_out(task_of(40)) == hold_out(task_of(40))


def test_a_prompt_that_chooses_is_not_trained_on_with_another_answer():
    train, chosen = hold_out(task_of(60, repeat=3))
    assert not {row.prompt for row in train} & {row.prompt for row in chosen}
    assert len(train) < 60 - len(chosen)


def test_the_files_hold_the_same_rows(tmp_path):
    path = write_file(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": "a é\n?"}, {"role": "assistant", "content": "b"}]},
        {"text": "no prompt here"},
        {"instruction": "do", "input": "this", "output": "done"},
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = "{name: a, train: animals-train.jsonl, validation: mixed.jsonl, metric: loss, weight: 2.0}"
    config = load_config(path, [f"tasks=[{first}, {{name: b, test: mixed.jsonl}}]"])
    sections = choosing_tasks(config, tmp_path / "chosen", [{"name": "moe_lora", "num_tasks": 2}])
    assert [section["name"] for section in sections] == ["a"]  # the other has nothing but test rows
    for by_place in ({"continue_from": "earlier"}, {"task_types": [0, 1]}):
        with pytest.raises(HeadwaterError, match=r"task b has only test rows.*\n.*`validation:`") as caught:
            choosing_tasks(config, tmp_path / "chosen", [{"name": "lora"}, {"num_tasks": 2, **by_place}])
        assert caught.value.problems[0].where == "tasks[1]"
    again = load_tasks(load_config(path, [f"tasks={json.dumps(sections)}"]).tasks, tmp_path)[0]
    given = load_tasks(config.tasks, tmp_path)[0]
    strip = [[(r.prompt, r.completion, r.choices, r.messages) for r in rows] for rows in (again.train, again.test)]
    assert strip == [
        [(r.prompt, r.completion, r.choices, r.messages) for r in rows] for rows in (given.train, given.validation)
    ]
    assert (again.weight, again.metric) == (2.0, given.metric)


def test_conversations_keep_their_choices(tmp_path):
    path = write_file(tmp_path)
    turns = [[{"role": "user", "content": f"{n} is"}, {"role": "assistant", "content": "b"}] for n in range(10)]
    rows = [{"messages": messages, "choices": ["a", "b"]} for messages in turns]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = choosing_tasks(load_config(path, ["tasks=[{name: a, train: chats.jsonl}]"]), tmp_path / "chosen", [])
    (task,) = load_tasks(load_config(path, [f"tasks={json.dumps(sections)}"]).tasks, tmp_path)
    assert task.metric == "choice_accuracy"
    assert {row.choices for row in (*task.train, *task.test)} == {("a", "b")}


def test_validation_rows_are_drawn_from_everywhere_as_evaluate_draws_them(tmp_path):
    path = write_file(tmp_path)
    first = "{name: a, train: animals-test.jsonl, validation: animals-train.jsonl, max_test_rows: 6}"
    config = load_config(path, [f"tasks=[{first}]"])
    (section,) = choosing_tasks(config, tmp_path / "chosen", [])
    with open(section["test"]) as file:
        chosen = [json.loads(line)["prompt"] for line in file]
    assert len(chosen) == 6
    assert chosen != [f"train animals {i} is" for i in range(6)]
    assert chosen == [row.prompt for row in load_tasks(config.tasks, tmp_path)[0].validation]


def test_tasks_with_too_few_rows_are_named_with_their_place_in_the_file(tmp_path):
    path = write_file(tmp_path)
    row = json.dumps({"prompt": "one", "completion": " cat", "choices": [" cat", " dog"]}) + "\n"
    (tmp_path / "animals-train.jsonl").write_text(row)
    (tmp_path / "colours-train.jsonl").write_text(row * 3)
    with pytest.raises(HeadwaterError) as caught:
        choosing_tasks(load_config(path), tmp_path / "chosen", [])
    for problem, line, task in zip(caught.value.problems, (4, 5), ("animals", "colours"), strict=True):
        assert problem.where.endswith(f"run.yaml:{line}: tasks[{line - 4}].train")
        assert f"task {task} has too few" in problem.what
        assert "validation" in problem.fix
    (tmp_path / "animals-train.jsonl").unlink()
    with pytest.raises(HeadwaterError, match=r"run\.yaml:4"):
        choosing_tasks(load_config(path), tmp_path / "chosen", [])


def test_what_is_said_of_a_chosen_learning_rate():
    assert best_rate({1e-3: 0.5, 1e-2: 0.6, 1e-1: 0.5}) == (1e-2, "")
    assert best_rate({1e-3: 0.5}) == (1e-3, "")
    for scores, best, edge in (({1e-3: 0.6, 1e-2: 0.6, 1e-1: 0.5}, 1e-3, "smallest"), ({1: 0, 2: 1}, 2, "largest")):
        rate, said = best_rate(scores)
        assert rate == best
        assert f"the {edge} tried: a wider grid" in said
    rate, said = best_rate({1e-2: 0.5, 1e-3: 0.5})
    assert rate == 1e-3
    assert "all that were tried score the same" in said
    assert "wider grid" not in said


def test_quality_is_the_mean_score_of_what_was_trained_on():
    tasks = {
        "a": {"metric": "exact_match", "after": 0.5},
        "b": {"metric": "choice_accuracy", "after": 0.9},
        "c": {"metric": "loss", "after": 3.0},
    }
    assert quality({"tasks": tasks}, ["a", "b", "c"]) == 0.7
    assert quality({"tasks": tasks}, ["a"]) == 0.5
    assert quality({"tasks": tasks}, ["c"]) == -3.0
