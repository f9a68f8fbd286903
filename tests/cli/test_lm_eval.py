"""lm-eval runs on headwater's adapters, and its scores are the in-house ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from cli_support import run_main, write_run
from peft import get_peft_model
from tiny_models import make_tiny_llama, make_tiny_tokenizer

import headwater
from headwater import base_model
from headwater.data.encode import DataSpec
from headwater.data.tasks import TaskSpec, load_tasks
from headwater.errors import HeadwaterError
from headwater.evaluation import EvaluationSpec, score_tasks
from headwater.evaluation.lm_eval import lm_eval_scores

TASK = """\
task: reviews
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{choices.index(completion)}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
CHOICES = [" good", " evil", " fair"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm-eval")
    draw = random.Random(1)
    rows = [
        {"prompt": f"Row {i}: " + "so " * draw.randrange(9) + "it is", "completion": draw.choice(CHOICES)}
        for i in range(37)
    ]
    lines = [json.dumps({**row, "choices": CHOICES}) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "reviews.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def adapted(name: str, **fields):
    config = headwater.make_config(name, r=4, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM", **fields)
    torch.manual_seed(3)
    model = get_peft_model(make_tiny_llama(initializer_range=0.5), config)  # with opinions that depend on the prompt
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    return model


def in_house(model, folder: Path, index: int = 0) -> float:
    specs = [TaskSpec(name=f"other{i}", test="rows.jsonl") for i in range(index)]
    tasks = load_tasks([*specs, TaskSpec(name="reviews", test="rows.jsonl")], folder)
    scores = score_tasks(model, make_tiny_tokenizer(), tasks[index:], EvaluationSpec(batch_size=5), DataSpec())
    return scores["reviews"].value


def test_scores_equal_the_in_house_ones_to_the_last_digit(folder):
    model = adapted("rlora", num_heads=3)
    (score,) = lm_eval_scores(model, make_tiny_tokenizer(), ["reviews"], include_path=str(folder / "tasks"))
    assert (score.task, score.metric, score.n, score.shots) == ("reviews", "acc", 37, 0)
    assert score.value == in_house(model, folder)
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / 36) ** 0.5)
    with model.disable_adapter():  # the adapter matters to the score, so it took part in it
        assert in_house(model, folder) != score.value


def test_an_adapter_that_goes_by_the_prompt_sees_no_answer_and_no_padding(folder):
    model = adapted("cond_mixlora", num_factors=64)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.mul_(5)
    run = {"include_path": str(folder / "tasks"), "batch_size": 5}
    (score,) = lm_eval_scores(model, make_tiny_tokenizer(), ["reviews"], **run)
    assert score.value == in_house(model, folder)


def test_an_adapter_that_goes_by_task_is_run_as_the_named_one(folder):
    model = adapted("mtl_lora", num_tasks=3)
    run = {"include_path": str(folder / "tasks")}
    values = {
        index: lm_eval_scores(model, make_tiny_tokenizer(), ["reviews"], task_index=index, **run)[0].value
        for index in range(3)
    }
    assert values == {index: in_house(model, folder, index) for index in range(3)}
    assert len(set(values.values())) > 1
    with pytest.raises(HeadwaterError, match="goes by task"):
        lm_eval_scores(model, make_tiny_tokenizer(), ["reviews"], **run)


def test_the_model_is_left_as_it_was(folder):
    model = adapted("rlora").train()
    lm_eval_scores(model, make_tiny_tokenizer(), [str(folder / "tasks" / "reviews.yaml")], limit=2)
    assert model.training


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path)
    assert run_main(capsys, "train", run).code == 0
    out = tmp_path / "scores.json"
    tasks = folder / "tasks"
    command = ["evaluate", tmp_path / "run", "--lm-eval", "reviews", "--include-path", tasks, "--output", out]
    done = run_main(capsys, *command, "--limit", 5, "--num-fewshot", 2)
    assert done.code == 0, done.err
    assert "reviews" in done.out
    written = json.loads(out.read_text())
    assert written["method"] == "rlora"
    assert (written["scores"][0]["n"], written["scores"][0]["shots"]) == (5, 2)
    assert f"{written['scores'][0]['value']:.4f}" in done.out

    make_tiny_llama(initializer_range=0.5).save_pretrained(tmp_path / "other")
    make_tiny_tokenizer().save_pretrained(tmp_path / "other")
    loaded = []
    load = base_model.load_to_run

    def watched(name, *args, **options):
        loaded.append(name)
        return load(name, *args, **options)

    monkeypatch.setattr(base_model, "load_to_run", watched)
    assert run_main(capsys, *command, "--limit", 5, "--set", f"model_name_or_path={tmp_path / 'other'}").code == 0
    assert loaded == [str(tmp_path / "other")]
    assert json.loads(out.read_text())["base_model"] == str(tmp_path / "other")

    wrong = run_main(capsys, "evaluate", tmp_path / "run", "--lm-eval", "revues,nothere", "--include-path", tasks)
    assert wrong.code == 2
    assert "`revues`" in wrong.err
    assert "`nothere`" in wrong.err
    assert "Traceback" not in wrong.err

    seen = {}
    monkeypatch.setattr("headwater.evaluation.lm_eval.lm_eval_scores", lambda *_, **options: seen.update(options) or [])
    assert run_main(capsys, *command, "--task", "colours", "--chat", "--set", "evaluation.batch_size=3").code == 0
    assert (seen["task_index"], seen["apply_chat_template"], seen["batch_size"]) == (1, True, 3)


@pytest.mark.parametrize(
    ("of_task", "said"),
    [("{{{{prompt.text.more}}}}", "has no attribute 'text'"), ("{{{{prompt}}}}", "JSON parse error")],
)
def test_a_mistyped_field_and_a_bad_line_are_errors_with_a_reason(folder, tmp_path, of_task, said):
    rows = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "completion": " good", "choices": CHOICES})
    rows.write_text(good + "\n" + ("{\n" if "JSON" in said else good + "\n"))
    task = TASK.replace("{{{{prompt}}}}", of_task).replace("reviews", "wrong").format(rows=rows)
    (tmp_path / "wrong.yaml").write_text(task)
    with pytest.raises(HeadwaterError, match=said):
        lm_eval_scores(adapted("rlora"), make_tiny_tokenizer(), ["wrong"], include_path=str(tmp_path))


def test_data_that_cannot_be_had_is_an_error_with_a_reason(folder, tmp_path):
    (tmp_path / "gone.yaml").write_text(TASK.format(rows=tmp_path / "missing.jsonl").replace("reviews", "gone"))
    with pytest.raises(HeadwaterError, match=r"missing\.jsonl"):
        lm_eval_scores(adapted("rlora"), make_tiny_tokenizer(), ["gone"], include_path=str(tmp_path))
