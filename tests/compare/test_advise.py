"""`headwater advise`: a pilot that leaves test rows alone, and what it says."""

from __future__ import annotations

import json
import re

import pytest
from comparing import FILE, write_file
from rich.console import Console
from tiny_models import make_tiny_llama

from headwater.cli import main
from headwater.cli.advise import _difference, sentence
from headwater.compare.advise import advice_of, full_steps
from headwater.compare.advise import advise as advice_on
from headwater.compare.budget import trainable_parameters
from headwater.config import load_config
from headwater.data.encode import Encoded
from headwater.data.mixture import MixtureSpec
from headwater.errors import HeadwaterError
from headwater.training.run import training_arguments
from headwater.training.trainer import HeadwaterTrainer

EIGHT_STEPS = FILE.replace("max_steps: 4", "max_steps: 8")


def advise(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["advise", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def comparison(differences: list[float], interval: list[float] | None) -> dict:
    def entry(method: str, mean: float, difference: float | None, pair: list[float] | None) -> dict:
        tasks = {
            "a": {"metric": "choice_accuracy", "paired_difference": difference, "paired_ci95": pair},
            "b": {"metric": "loss", "paired_difference": 9.0, "paired_ci95": [8.0, 10.0]},
        }
        extra = {"tasks": tasks, "seconds_per_step": 2.0 if method == "lora" else 3.0}
        return {
            "method": method, "mean": mean, "paired_difference": difference, "paired_ci95": pair,
            "trainable_parameters": 100, "extra": extra,
        }  # fmt: skip

    mean = sum(differences) / len(differences)
    return {
        "summary": [entry("lora", 0.5, None, None), entry("rlora", 0.5 + mean, mean, interval)],
        "extra": {
            "seeds": list(range(len(differences))),
            "methods": [
                {"label": "lora", "method": {"name": "lora", "r": 18}, "learning_rate": 1e-3},
                {"label": "rlora", "method": {"name": "rlora"}, "learning_rate": 1e-3},
            ],
        },
    }


@pytest.mark.parametrize(
    ("interval", "verdict", "said"),
    [
        ([0.01, 0.05], "multi-head", "pays"),
        ([-0.05, -0.01], "plain", "for the file: method: {name: lora, r: 18}, training: {learning_rate: 0.001}"),
        ([-0.01, 0.05], "undecided", "tell"),
    ],
)
def test_the_verdict_needs_an_interval_that_keeps_off_zero(interval, verdict, said):
    advice = advice_of(comparison([0.02, 0.03], interval), steps=30, full=300)
    assert advice["verdict"] == verdict
    assert said in sentence(advice)
    assert advice["full_run_seconds"] == {"lora": 600.0, "rlora": 900.0}
    assert set(advice["tasks"]) == {"a"}  # a loss is no score


def test_an_undecided_pilot_says_what_it_could_have_seen():
    assert "about 0.030 to show" in sentence(advice_of(comparison([0.02, 0.02], [-0.01, 0.05]), steps=3, full=9))


def test_a_pilot_whose_seeds_agree_to_the_last_digit_decides_nothing():
    advice = advice_of(comparison([0.02, 0.02], None), steps=3, full=9)
    assert (advice["verdict"], advice["ci95"]) == ("undecided", None)
    assert "over 2 seeds: +0.020 with each, which tells no spread" in sentence(advice)
    assert _difference(advice) == ["+0.020", ""]


def test_a_pilot_on_a_tiny_model(tmp_path, capsys):
    path = write_file(tmp_path, EIGHT_STEPS)
    code, out, err = advise(capsys, path, "--minutes", 30, "--seeds", "0,1", "--method", "rlora")  # fmt: skip
    assert code == 0, err
    folder = tmp_path / "out" / "advice"
    advice = json.loads((folder / "advice.json").read_text())
    assert (advice["steps"], advice["full_steps"]) == (8, 8)  # no longer than the run itself
    assert advice["method"] == "rlora"
    assert f"{advice['difference']:+.3f}" in out
    texts = ((tmp_path / f"{task}-test.jsonl").read_text() for task in ("animals", "colours"))
    test_rows = {json.loads(line)["prompt"] for text in texts for line in text.splitlines()}
    texts = (file.read_text() for file in (folder / "tasks").glob("*.jsonl"))
    used = {json.loads(line)["prompt"] for text in texts for line in text.splitlines()}
    assert used
    assert not used & test_rows
    file, pilots = folder / "pilot.json", "pilot-rlora-8/*/*/results.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps": 7}))
    assert advise(capsys, path, "--minutes", 30, "--seeds", "0,1", "--method", "rlora")[0] == 0
    assert json.loads((folder / "advice.json").read_text())["steps"] == 7  # that pilot goes on, however long it is
    runs = [p.stat().st_mtime_ns for p in sorted(folder.glob(pilots))]
    assert len(runs) == 4
    code, _, err = advise(capsys, path, "--minutes", 31, "--seeds", "0,1", "--method", "rlora")  # fmt: skip
    assert code == 0, err
    assert json.loads((folder / "advice.json").read_text())["steps"] == 8  # other minutes are measured anew
    assert runs == [p.stat().st_mtime_ns for p in sorted(folder.glob(pilots))]  # and what is finished is kept


def test_plain_lora_takes_the_nearest_rank_and_how_far_off_it_is_is_said(tmp_path, capsys):
    path = write_file(tmp_path)
    code, out, err = advise(capsys, path, "--minutes", 30, "--seeds", "0,1", "--method", "rlora",
                            "--set", "method.num_heads=3", "--set", "method.name=rlora",
                            "--set", "compare.methods=[lora]", "--set", "compare.tolerance=0")  # fmt: skip
    assert code == 0, err
    sizes = json.loads((tmp_path / "out" / "advice" / "advice.json").read_text())["trainable_parameters"]
    assert sizes["lora"] != sizes["rlora"]
    off = sizes["lora"] / sizes["rlora"] - 1
    assert (
        f"plain LoRA has {sizes['lora']:,} trainable parameters, {off:+.1%} from the {sizes['rlora']:,} of rlora" in out
    )


def test_too_little_time_and_one_seed_are_said(tmp_path, capsys):
    path = write_file(tmp_path, FILE.replace("max_steps: 4", "max_steps: 400"))
    code, _, err = advise(capsys, path, "--minutes", 0.001, "--method", "hydralora", "--set", "method.num_heads=2",
                          "--set", "method.name=hydralora")  # fmt: skip
    assert code == 2
    assert "too short for a pilot of 20 steps" in err
    assert re.search(r"give --minutes \d+ or more", err)  # how many, the machine decides
    for option, value, said in (
        ("--seeds", "0", "no interval"),
        ("--seeds", "0,0,1", "--seeds: 0 is given more than once"),
        ("--seeds", "0,x", "not whole numbers"),
        ("--method", "lora", "--method lora: plain LoRA is what a method is compared with"),
        *(("--minutes", minutes, "--minutes: this is no length of time") for minutes in ("inf", "1e308")),
    ):
        code, _, err = advise(capsys, path, option, value)
        assert (code, said in err) == (2, True)
        assert "Traceback" not in err


def test_losses_alone_are_refused_before_anything_is_trained(tmp_path, capsys):
    path = write_file(tmp_path)
    for file in tmp_path.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in rows))
    code, out, err = advise(capsys, path)
    assert (code, out) == (2, "")
    assert "run.yaml:3: tasks: the tasks have no score to compare, only a loss" in err


def test_the_budget_is_counted_with_a_part_for_each_task(tmp_path, monkeypatch):
    budgets = []

    def planned(run):
        budgets.append(run.compare.parameters)
        raise HeadwaterError("far enough")

    monkeypatch.setattr("headwater.compare.advise.make_plan", planned)
    config = load_config(write_file(tmp_path))
    with pytest.raises(HeadwaterError, match="far enough"):
        advice_on(config, minutes=1, seeds=[0, 1], method="mtl_lora", console=Console(quiet=True))
    section = {**config.method, "name": "mtl_lora", "num_tasks": 2}
    assert budgets == [trainable_parameters(config, section)]
    assert trainable_parameters(config, {**section, "num_tasks": 1}) != budgets[0]


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ("num_train_epochs: 2", 24),  # 48 rows in batches of 4, twice
        ("num_train_epochs: 1.5", 18),
        ("num_train_epochs: 1.4", 17),
        ("num_train_epochs: 1.5, gradient_accumulation_steps: 5", 5),  # 12 batches an epoch: 3 steps
        ("num_train_epochs: 2, per_device_train_batch_size: 5", 20),  # 9 full batches and one more
        ("num_train_epochs: 2, per_device_train_batch_size: 5, dataloader_drop_last: true", 18),
        ("max_steps: 7, num_train_epochs: 2", 7),
    ],
)
def test_steps_of_a_run_are_those_that_the_trainer_takes(tmp_path, training, steps):
    text = FILE.replace("per_device_train_batch_size: 4, ", "") if "per_device" in training else FILE
    config = load_config(write_file(tmp_path, text.replace("max_steps: 4", training)))
    assert full_steps(config) == steps
    rows = {task: [Encoded([1, 2], [3], i)] * 24 for i, task in enumerate(("animals", "colours"))}
    trainer = HeadwaterTrainer(
        make_tiny_llama(), training_arguments(config), train=rows, pad_token_id=0, mixture=MixtureSpec()
    )
    assert trainer.total_steps() == steps


@pytest.mark.parametrize("limit", ["data.max_length=200", "the model's"])
def test_rows_that_are_too_long_to_be_trained_on_take_no_steps(tmp_path, limit):
    """A few of 48 rows, in batches of 4: 12 steps with them."""
    path = write_file(tmp_path, FILE.replace("max_steps: 4", "num_train_epochs: 1"))
    lines = (tmp_path / "animals-train.jsonl").read_text().splitlines()
    long = json.loads(lines[0])
    lines[:8] = [json.dumps({**long, "prompt": f"{i} " + "x" * 300}) for i in range(8)]
    (tmp_path / "animals-train.jsonl").write_text("\n".join(lines))
    overrides = [limit]
    if limit == "the model's":
        make_tiny_llama(max_position_embeddings=200).save_pretrained(tmp_path / "model")
        overrides = []
    for fate, steps in (("drop", 10), ("truncate_prompt", 12)):
        assert full_steps(load_config(path, [*overrides, f"data.on_too_long={fate}"])) == steps
