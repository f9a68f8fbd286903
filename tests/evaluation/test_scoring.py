"""From rows to a task's score."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing

import headwater
import headwater.evaluation.forward as forward
from headwater.compose.scoring import Composition, score_mixtures
from headwater.data.encode import DataSpec, encode_rows
from headwater.data.rows import Row
from headwater.data.tasks import Task
from headwater.errors import HeadwaterError
from headwater.evaluation import EvaluationSpec, interval, score_task, score_tasks
from headwater.evaluation.scoring import METRICS, _best, check_rows
from headwater.tuner.context import KEYWORD

CHOICES = (" yes", " no", " perhaps so")


def task_of(metric: str, rows: list[Row], name: str = "task", index: int = 0) -> Task:
    return Task(name, index, metric, 1.0, train=[], validation=[], test=rows)


def rows_with_choices(count: int = 9) -> list[Row]:
    return [
        Row(f"Question {i} " + "and more " * (i % 4), CHOICES[i % 3], CHOICES, source="test.jsonl", line=i + 1)
        for i in range(count)
    ]


def plain_log_probs(model, tokenizer, row: Row) -> list[float]:
    """In a byte-level tokenizer without merges, a text's ids are its bytes' ids, so joining texts joins ids."""
    prompt = tokenizer(row.prompt)["input_ids"]
    values = []
    for choice in row.choices:
        tokens = tokenizer(choice)["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
        values.append(sum(log_probs[len(prompt) - 1 + j, t].item() for j, t in enumerate(tokens)))
    return values


@pytest.mark.parametrize("normalization", ["none", "tokens", "bytes"])
def test_choice_accuracy(tiny_llama, tiny_tokenizer, normalization):
    model, rows = tiny_llama(), rows_with_choices()
    sizes = [1, 1, 1] if normalization == "none" else [len(choice) for choice in CHOICES]
    best = []
    for row in rows:
        values = [v / size for v, size in zip(plain_log_probs(model, tiny_tokenizer, row), sizes, strict=True)]
        best.append(CHOICES[values.index(max(values))])
    rows = [
        replace(row, completion=b if i % 3 else row.completion)
        for i, (row, b) in enumerate(zip(rows, best, strict=True))
    ]
    wanted = [float(row.completion == b) for row, b in zip(rows, best, strict=True)]

    spec = EvaluationSpec(batch_size=4, choice_normalization=normalization)
    score = score_task(model, tiny_tokenizer, task_of("choice_accuracy", rows), rows, spec, DataSpec())
    assert score.correct == wanted
    assert score.value == pytest.approx(sum(wanted) / 9)
    assert (score.task, score.metric, score.n) == ("task", "choice_accuracy", 9)
    assert score.majority == max(sum(row.completion == choice for row in rows) for choice in CHOICES) / 9
    assert score.detail["predicted_shares"] == pytest.approx({choice: best.count(choice) / 9 for choice in CHOICES})
    assert score.detail["interval"] == list(interval(wanted))
    assert score.detail["chance"] == pytest.approx(1 / 3)
    json.dumps(score.detail)


def test_chance_is_of_each_rows_own_choices(tiny_llama, tiny_tokenizer):
    def detail(*choices):
        rows = [Row(f"row {n}", " no", some) for n, some in enumerate(choices)]
        task = task_of("choice_accuracy", rows)
        return score_task(tiny_llama(), tiny_tokenizer, task, rows, EvaluationSpec(), DataSpec()).detail

    assert detail(CHOICES, CHOICES[:2])["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert "predicted_shares" not in detail(CHOICES, CHOICES[:2])
    assert sum(detail(CHOICES, CHOICES[::-1])["predicted_shares"].values()) == 1


@pytest.mark.parametrize(("by", "best"), [("none", 0), ("tokens", 1), ("bytes", 2)])
def test_choices_are_compared_per_token_or_per_byte(by, best):
    log_probs, ids = [-4.0, -6.0, -5.0], [[1], [2, 3], [4]]
    assert _best(log_probs, ["ab", "abcd", "ééé"], ids, by) == best  # per token -4, -3, -5; per byte -2, -1.5, -0.83


def test_an_adapter_is_scored_and_plain_lora_too(tiny_llama, tiny_tokenizer):
    rows = rows_with_choices(5)
    for method in ("rlora", "lora"):
        config = headwater.make_config(method, r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(), config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        model.train()
        score = score_task(model, tiny_tokenizer, task_of("choice_accuracy", rows), rows, EvaluationSpec(), DataSpec())
        assert model.training
        model.eval()
        best = [max(zip(plain_log_probs(model, tiny_tokenizer, row), CHOICES, strict=True))[1] for row in rows]
        assert score.correct == [float(row.completion == b) for row, b in zip(rows, best, strict=True)]


def test_exact_match_and_its_examples(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    rows = [Row(f"Say {i}:", "?", source="test.jsonl", line=i) for i in range(6)]
    said = headwater.evaluation.generate_text(model, tiny_tokenizer, [row.prompt for row in rows], max_new_tokens=5)
    rows = [
        replace(row, completion=f" {text}" if i % 2 else "no")
        for i, (row, text) in enumerate(zip(rows, said, strict=True))
    ]
    spec = EvaluationSpec(batch_size=4, max_new_tokens=5)
    score = score_task(model, tiny_tokenizer, task_of("exact_match", rows), rows, spec, DataSpec())
    assert score.correct == [0.0, 1.0] * 3
    assert score.majority == 0.5
    assert score.detail["unfinished"] == 6
    assert [e["generated"] for e in score.detail["examples"]] == said[:3]
    assert [e["reference"] for e in score.detail["examples"]] == [row.completion for row in rows[:3]]


def test_final_number_needs_numbers_in_the_answers(tiny_llama, tiny_tokenizer):
    answers = enumerate((" #### 2", " four", "2", "#### n/a"), 1)
    rows = [Row("1 + 1 =", answer, source="a.jsonl", line=line) for line, answer in answers]
    task = task_of("final_number", rows)
    spec = EvaluationSpec(max_new_tokens=3)
    with pytest.raises(HeadwaterError, match=r"a\.jsonl:2: .*####") as caught:
        score_task(tiny_llama(), tiny_tokenizer, task, rows, spec, DataSpec())
    assert [problem.where for problem in caught.value.problems] == [f"a.jsonl:{line}" for line in (2, 3, 4)]
    score = score_task(tiny_llama(), tiny_tokenizer, task, rows[:1], spec, DataSpec())
    assert (score.value, score.majority) == (0.0, None)


def test_loss_is_the_mean_over_tokens(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    rows = [Row("Q", " a"), Row("A longer question", " a longer answer"), Row("", "only text")]
    score = score_task(model, tiny_tokenizer, task_of("loss", rows), rows, EvaluationSpec(batch_size=2), DataSpec())
    totals, counts = [], []
    for row in rows:
        prompt = tiny_tokenizer(row.prompt)["input_ids"] if row.prompt else []
        ids = torch.tensor([[*prompt, *tiny_tokenizer(row.completion)["input_ids"], 257]])
        start = max(len(prompt), 1)
        logits = model(input_ids=ids).logits[0, start - 1 : -1].double()
        totals.append(torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item())
        counts.append(ids.shape[1] - start)
    assert score.value == pytest.approx(sum(totals) / sum(counts), abs=1e-4)
    assert score.correct == pytest.approx([t / c for t, c in zip(totals, counts, strict=True)], abs=1e-4)
    assert (score.n, score.majority, score.detail["tokens"]) == (3, None, sum(counts))


def test_the_check_finds_a_loss_of_rows_of_which_none_is_left(tiny_llama, tiny_tokenizer):
    """It is asked before a run's folder is replaced; the score comes hours later."""
    long = Row("x" * 50, " yes", source="a.jsonl", line=1)
    tasks = [
        task_of("loss", [long, long], "dropped"),
        task_of("loss", [long, Row("Q", " yes")], "one is left"),
        task_of("loss", [Row("", "")], "unpredicted"),  # its end token is its first
    ]
    settings = (EvaluationSpec(), DataSpec(max_length=20, on_too_long="drop"))
    with pytest.raises(HeadwaterError) as caught:
        check_rows(tiny_llama(), tiny_tokenizer, tasks, *settings)
    first, second = caught.value.problems
    assert (first.where, second.where) == ("dropped", "unpredicted")
    dropped = "no row has a token to score: 2 of 2 are too long, and data.on_too_long: drop leaves them out"
    assert (first.what, second.what) == (dropped, "no row has a token to score")
    for task in (tasks[0], tasks[2]):
        with pytest.raises(HeadwaterError, match="no row has a token to score"):
            score_task(tiny_llama(), tiny_tokenizer, task, task.test, *settings)
    score = score_tasks(tiny_llama(), tiny_tokenizer, [tasks[1]], *settings)["one is left"]
    assert (len(score.correct), score.detail["dropped_rows"]) == (1, 1)


def test_answers_of_composed_adapters_are_compared_with_the_commonest_too(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    pooled = SimpleNamespace(model=model, rows=lambda mixtures, fused: nullcontext())
    rows = [Row(f"Say {i}:", answer) for i, answer in enumerate((" a", "a", "b", "c"))]
    task, spec = task_of("exact_match", rows), EvaluationSpec(max_new_tokens=2)
    composition = Composition(None, pooled, tiny_tokenizer)
    composed = score_mixtures(composition, task, rows, [{}] * 4, spec, DataSpec())
    assert composed.majority == score_task(model, tiny_tokenizer, task, rows, spec, DataSpec()).majority == 0.5


def test_several_tasks_progress_and_the_same_sample_every_time(tiny_llama, tiny_tokenizer):
    rows = rows_with_choices(9)
    tasks = [task_of("choice_accuracy", rows, "a"), task_of("loss", rows, "b", 1), task_of("loss", [], "empty", 2)]
    seen: list[tuple[str, int, int]] = []
    scores = score_tasks(
        tiny_llama(),
        tiny_tokenizer,
        tasks,
        EvaluationSpec(batch_size=2),
        DataSpec(),
        max_rows=5,
        progress=lambda *report: seen.append(report),
    )
    assert seen == [(name, done, 5) for name in ("a", "b") for done in (2, 4, 5)]
    assert list(scores) == ["a", "b"]
    assert scores["a"].n == 5
    again = score_tasks(tiny_llama(), tiny_tokenizer, tasks, EvaluationSpec(batch_size=5), DataSpec(), max_rows=5)
    assert again["b"].correct == pytest.approx(scores["b"].correct, abs=1e-5)
    assert score_tasks(tiny_llama(), tiny_tokenizer, tasks, EvaluationSpec(), DataSpec(), split="validation") == {}


@pytest.mark.parametrize("metric", ["choice_accuracy", "exact_match", "loss"])
def test_methods_that_go_by_task_get_the_tasks_index(tiny_llama, tiny_tokenizer, monkeypatch, metric):
    config = headwater.make_config("rlora", r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    seen: list[list[int]] = []
    context = model.get_base_model()._headwater_context
    model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda *_: seen.append(None if context.state.task_ids is None else context.state.task_ids.tolist())
    )
    rows = rows_with_choices(3)
    spec = EvaluationSpec(max_new_tokens=3)
    score_task(model, tiny_tokenizer, task_of(metric, rows, index=7), rows, spec, DataSpec())
    assert seen
    assert set(map(str, seen)) == {"None"}  # R-LoRA goes by token
    seen.clear()
    monkeypatch.setattr(forward, "needs_task_ids", lambda model: True)
    score_task(model, tiny_tokenizer, task_of(metric, rows, index=7), rows, spec, DataSpec())
    assert seen
    assert {task for ids in seen for task in ids} == {7}
    assert KEYWORD == "headwater_task_ids"


@pytest.mark.parametrize("start", [[], [256]])
def test_long_prompts_are_cut_where_training_cuts_them(tiny_llama, tiny_tokenizer, start):
    """Behind the start token, where the tokenizer adds one."""
    if start:
        tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", None, [("<bos>", start[0])])
    rows = [Row("x" * 90 + " end", " yes", CHOICES, source="t.jsonl", line=1)]
    short = rows[0].prompt[-(50 - len(start) - len(" yes") - 1) :]
    task = task_of("choice_accuracy", rows)
    model, spec = tiny_llama(), EvaluationSpec()
    cut = DataSpec(max_length=50, on_too_long="truncate_prompt")
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"][0].tolist()), with_kwargs=True)
    score = score_task(model, tiny_tokenizer, task, rows, spec, cut)
    assert score.detail["shortened_prompts"] == 1
    assert seen[0] == tiny_tokenizer(short)["input_ids"]
    seen.clear()
    score_task(model, tiny_tokenizer, task, rows, spec, DataSpec(max_length=50))
    assert seen[0] == tiny_tokenizer(rows[0].prompt)["input_ids"]


def test_generated_answers_are_asked_for_with_the_prompts_of_training(tiny_llama, tiny_tokenizer):
    """However much longer than the completion an answer may get."""
    model, data = tiny_llama(), DataSpec(max_length=60, on_too_long="truncate_prompt")
    rows = [Row("x" * length + " end", " yes", source="t.jsonl", line=1) for length in (20, 50, 90)]
    trained = [len(item) - len(" yes") - 1 for item in encode_rows(rows, tiny_tokenizer, data, 0)[0]]
    seen: list[int] = []
    for new in (5, 55, 400):  # of the model's 512 positions
        seen.clear()
        hook = model.register_forward_pre_hook(
            lambda _m, _a, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True
        )
        spec = EvaluationSpec(max_new_tokens=new, batch_size=1)
        task = task_of("exact_match", rows)
        score = score_task(model, tiny_tokenizer, task, rows, spec, data)
        hook.remove()
        assert sorted(length for length in seen if length > 1) == sorted(trained)  # the others are its own tokens
        assert score.detail["shortened_prompts"] == 1


def test_choices_that_begin_another_are_told_apart_by_where_they_end(tiny_llama, tiny_tokenizer):
    model, choices, end = tiny_llama(), (" 1", " 10", " 100"), tiny_tokenizer.eos_token_id
    one, nought = tiny_tokenizer("10")["input_ids"]
    for dim, (token, following) in enumerate(((one, nought), (nought, end))):  # a model that says 10 and no more
        model.model.embed_tokens.weight.data[token, dim] = 50
        model.lm_head.weight.data[following, dim] = 10
    rows = [Row(f"Question {i * i}:", choices[i % 3], choices, source="t.jsonl", line=i + 1) for i in range(9)]
    best, without = [], []
    for row in rows:
        prompt = tiny_tokenizer(row.prompt)["input_ids"]
        sums = {}
        for choice in choices:
            tokens = [*tiny_tokenizer(choice)["input_ids"], end]
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
            each = [log_probs[len(prompt) - 1 + j, t].item() for j, t in enumerate(tokens)]
            sums[choice] = (sum(each), sum(each[:-1]))
        best.append(max(choices, key=lambda c: sums[c][0]))
        without.append(max(choices, key=lambda c: sums[c][1]))
    assert {*best} == {" 10"}
    assert " 1" in without
    score = score_task(model, tiny_tokenizer, task_of("choice_accuracy", rows), rows, EvaluationSpec(), DataSpec())
    assert (score.detail["predicted_shares"][" 10"], score.detail["end_scored"]) == (1.0, 9)
    plain = score_task(model, tiny_tokenizer, task_of("choice_accuracy", rows_with_choices()), rows_with_choices(),
                       EvaluationSpec(), DataSpec())  # fmt: skip
    assert "end_scored" not in plain.detail


def test_the_model_s_own_limit_cuts_and_refuses_too(tiny_llama, tiny_tokenizer):
    model, rows = tiny_llama(max_position_embeddings=50), [Row("x" * 90, " yes", CHOICES, source="t.jsonl", line=1)]
    cut, spec = DataSpec(on_too_long="truncate_prompt"), EvaluationSpec(max_new_tokens=20)
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    for metric, longest in (("choice_accuracy", 50 - len(CHOICES[2])), ("exact_match", 30), ("loss", 50)):
        lengths.clear()
        score = score_task(model, tiny_tokenizer, task_of(metric, rows), rows, spec, cut)
        assert score.detail["shortened_prompts"] == 1
        assert max(lengths) == longest
        with pytest.raises(HeadwaterError, match="the model's 50"):
            score_task(model, tiny_tokenizer, task_of(metric, rows), rows, spec, DataSpec())


def test_what_cannot_be_scored_is_named(tiny_llama, tiny_tokenizer):
    model, spec = tiny_llama(max_position_embeddings=40), EvaluationSpec(max_new_tokens=20)

    def problems(metric: str, rows: list[Row]) -> list[str]:
        with pytest.raises(HeadwaterError) as caught:
            score_task(model, tiny_tokenizer, task_of(metric, rows), rows, spec, DataSpec())
        return [str(problem) for problem in caught.value.problems]

    (found,) = problems("accuracy", rows_with_choices())
    assert all(metric in found for metric in METRICS)
    assert "no rows" in problems("loss", [])[0]
    rows = [
        Row("no choices", "a", source="t.jsonl", line=1),
        Row("good", " yes", CHOICES, source="t.jsonl", line=2),
        Row("", " yes", CHOICES, source="t.jsonl", line=3),
        Row("long " * 10, " yes", CHOICES, source="t.jsonl", line=4),
    ]
    named = problems("choice_accuracy", rows)
    assert [next(line for line in "1234" if f"t.jsonl:{line}" in text) for text in named] == ["1", "3", "4"]
    assert len(problems("choice_accuracy", [rows[0]] * 30)) <= 21
    assert "t.jsonl:9" in problems("exact_match", [Row("x" * 25, "a", source="t.jsonl", line=9)])[0]


@pytest.mark.parametrize("metric", ["choice_accuracy", "loss"])
def test_a_diverged_model_has_no_score(tiny_llama, tiny_tokenizer, metric):
    model, rows = tiny_llama(), rows_with_choices(3)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(HeadwaterError, match=r"test\.jsonl:1: .*NaN or infinity\) on 3 rows"):
        score_task(model, tiny_tokenizer, task_of(metric, rows), rows, EvaluationSpec(), DataSpec())
