"""One plain LoRA per task from a routed adapter: from the right rows, and honestly scored."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from tuner.helpers import adapt, stir
from tuner.rows import BY_ID

import headwater
from headwater.analysis import heads as heads_of
from headwater.data.encode import DataSpec
from headwater.data.rows import Row
from headwater.data.tasks import Task
from headwater.errors import HeadwaterError
from headwater.evaluation import EvaluationSpec, TaskScore, score_task
from headwater.export import by_mean_gates, check_differs_by_task
from headwater.export.per_task import Exported
from headwater.export.plain import WEIGHTS_FILE

ROUTED = ["rlora", "hydralora", "moe_lora", "malora", "smora", "cond_mixlora"]
SPECS = EvaluationSpec(), DataSpec()


def make_tasks(**splits) -> list[Task]:
    def rows(name, count, text):
        return [Row(f"{text} {name} {i}", " yes" if i % 2 else " no", choices=(" yes", " no")) for i in range(count)]

    return [
        Task(
            name,
            index,
            "choice_accuracy",
            **{split: rows(name, count, split) for split, count in {"train": 5, "test": 6, **splits}.items()},
        )
        for index, name in enumerate(("first", "second"))
    ]


def export(row_id, folder, tasks, change=stir, fields=None, **options):
    model = adapt(BY_ID[row_id], make_tiny_llama(), **(fields or {}))
    change(model)
    model.save_pretrained(folder / "adapter")
    found = by_mean_gates(model, folder / "adapter", make_tiny_tokenizer(), tasks, *SPECS, folder, **options)
    again = PeftModel.from_pretrained(make_tiny_llama(), folder / "adapter")
    return found, again


def routers_to_zero(model):
    with torch.no_grad():
        for held in heads_of(model).values():
            held.router.zero_()


@pytest.mark.parametrize("row_id", ["rlora", "hydralora"])
def test_nothing_is_lost_where_gates_are_the_same_for_every_token(row_id, tmp_path):
    found, routed = export(row_id, tmp_path, make_tasks(), routers_to_zero)
    for task in found:
        assert (task.exact, task.rows, task.lost, task.interval) == (False, 5, 0.0, None)
        assert task.routed.n == 6
        x = torch.randint(0, 250, (2, 9))
        plain = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / task.task)
        torch.testing.assert_close(plain(x).logits, routed(x).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("row_id", ROUTED)
def test_the_update_is_that_of_the_mean_gate_over_training_tokens(row_id, tmp_path):
    """Oracle: each training row by itself, its gates averaged token by token, merged by the public function. Prompts
    are told from completions, because Conditional MixLoRA chooses by the prompt alone.
    """
    tasks, tokenizer = make_tasks(), make_tiny_tokenizer()
    found, _ = export(row_id, tmp_path, tasks, score_rows=0)
    assert [task.task for task in found] == ["first", "second"]
    assert found[0].lost is found[0].interval is None
    for task in tasks:
        routed = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "adapter").eval()
        seen: dict[str, list] = {}

        def see(name, gate, seen=seen):
            seen.setdefault(name, []).append(gate)

        with torch.no_grad(), headwater.observe(routed, see, merging=True):
            for row in task.train:
                prompt = tokenizer(row.prompt)["input_ids"]
                answer = [*tokenizer(row.completion)["input_ids"], 257]
                labels = [*[-100] * len(prompt), *answer]
                routed(input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([labels]))
        gates = {name: torch.cat([g[0] for g in gates]).mean(0) for name, gates in seen.items()}
        merged = headwater.merge_with_gates(routed, gates)
        plain = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / task.name)
        x = torch.randint(0, 250, (2, 9))
        torch.testing.assert_close(plain(x).logits, merged(x).logits, atol=5e-5, rtol=1e-4)


def test_layers_that_no_text_runs_through_are_left_out(tmp_path, caplog):
    base = make_tiny_llama()
    base.vision_tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16)})
    alone = adapt(BY_ID["rlora"], copy.deepcopy(base), target_modules=["vision_tower.q_proj"])
    with pytest.raises(HeadwaterError, match=r"first: its rows run through no layer"):
        by_mean_gates(alone, tmp_path / "alone", make_tiny_tokenizer(), make_tasks(), *SPECS, tmp_path)
    model = adapt(BY_ID["rlora"], base, target_modules="all-linear")
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    found = by_mean_gates(model, tmp_path / "adapter", make_tiny_tokenizer(), make_tasks(), *SPECS, tmp_path)
    assert [task.plain.n for task in found] == [6, 6]
    assert "second: left out, as its rows do not run through them: vision_tower.q_proj" in caplog.text
    targets = PeftConfig.from_pretrained(tmp_path / "first").target_modules
    assert "model.layers.1.mlp.up_proj" in targets
    assert not any("vision_tower" in name for name in [*targets, *load_file(tmp_path / "first" / WEIGHTS_FILE)])


def test_scores_are_those_of_the_adapter_and_of_what_was_written(tmp_path):
    tasks = make_tasks(validation=2)
    said = []
    found, routed = export("rlora", tmp_path, tasks, progress=lambda *args: said.append(args))
    for task, got in zip(tasks, found, strict=True):
        plain = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / task.name)
        for score, model in ((got.routed, routed), (got.plain, plain)):
            assert score.correct == score_task(model, make_tiny_tokenizer(), task, task.test, *SPECS).correct
        assert got.lost == pytest.approx(got.routed.value - got.plain.value)
        if got.routed.correct == got.plain.correct:
            assert got.interval is None
        else:
            low, high = got.interval
            assert low <= got.lost <= high
    assert ("averaging gates", 2, 2) in said
    assert {what for what, _, _ in said} >= {"scoring the adapter: first", "scoring the plain LoRA: second"}
    some = export("rlora", tmp_path / "some", tasks, score_rows=4)[0]
    assert [(task.routed.n, task.plain.n) for task in some] == [(4, 4), (4, 4)]


def test_rows_that_all_lose_the_same_tell_no_interval():
    score = TaskScore("t", "choice_accuracy", 2 / 3, 3, None, [1.0, 0.0, 1.0])
    assert Exported("t", 4, False, 3, score, score).interval is None
    worse = TaskScore("t", "choice_accuracy", 1 / 3, 3, None, [1.0, 0.0, 0.0])
    low, high = Exported("t", 4, False, 3, score, worse).interval
    assert low <= 1 / 3 <= high


def test_a_loss_that_rises_is_a_score_lost(tmp_path):
    tasks = [Task(t.name, t.index, "loss", train=t.train, test=t.test) for t in make_tasks()]
    found, _ = export("rlora", tmp_path, tasks)
    for task in found:
        assert task.lost == pytest.approx(task.plain.value - task.routed.value)
        assert task.lost != 0
        assert task.interval is None


def test_test_rows_have_no_say_in_the_gates(tmp_path):
    with pytest.raises(headwater.HeadwaterError, match="neither training nor validation rows"):
        export("rlora", tmp_path, make_tasks(train=0))
    found, _ = export("rlora", tmp_path, make_tasks(train=0, validation=3), score_rows=0)
    assert [task.rows for task in found] == [3, 3]


def test_an_adapter_that_is_one_lora_is_refused():
    with pytest.raises(headwater.HeadwaterError, match="the same LoRA for every task"):
        check_differs_by_task(adapt(BY_ID["mlora"], make_tiny_llama()))
    check_differs_by_task(adapt(BY_ID["rlora"], make_tiny_llama()))


def test_pairs_of_factors_are_averaged_and_nothing_is_lost_where_all_rows_choose_alike(tmp_path):
    """With as many factors as a row uses and one choice for both pools, every row has the same update."""
    fields = {"router": "tied", "num_factors": 4, "r": 4}
    found, routed = export("cond_mixlora", tmp_path, make_tasks(), fields=fields)
    for task in found:
        assert (task.exact, task.rank, task.lost) == (False, 4, 0.0)
        x = torch.randint(0, 250, (2, 9))
        plain = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / task.task)
        torch.testing.assert_close(plain(x).logits, routed(x).logits, atol=2e-5, rtol=1e-4)
    assert [task.rank for task in export("cond_mixlora", tmp_path / "apart", make_tasks(), score_rows=0)[0]] == [6, 6]
