"""An alignment loss in a run's file: the batches that it needs come by themselves, and it is logged by name."""

from __future__ import annotations

import json
import shutil

import pytest
from cli_support import run_main, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_run(folder)
    return folder


@pytest.fixture
def train(made, tmp_path, capsys):
    """`headwater train` with settings, into a folder of the given name; returns its logged lines."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run.yaml"
    path.write_text((made / "run.yaml").read_text().replace(str(made), str(tmp_path)))
    common = ["training.logging_steps=1", "training.save_strategy=no", "method.init_seed=1", "training.max_steps=6"]

    def run(*settings, name="run"):
        every = [*common, f"output_dir={tmp_path / name}", *settings]
        done = run_main(capsys, "train", path, *(part for setting in every for part in ("--set", setting)))
        if done.code:
            return done
        lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]

    return run


def test_batches_are_balanced_and_the_loss_is_logged(train):
    lines = train("align={kind: kl, weight: 0.2}", "mixture={strategy: proportional}")
    assert len(lines) == 6
    for line in lines:  # with rows drawn at random, some batches would hold too few of one task
        assert line["auxiliary_losses"]["align"] > 0
        assert line["task_losses"].keys() == {"animals", "colours"}


def test_weight_zero_is_the_run_without_it(train):
    balanced = "mixture={batching: balanced}"
    plain = train(balanced, name="plain")
    off = train("align={weight: 0}", name="off")
    on = train("align={weight: 5}", name="on")
    assert [line["loss"] for line in off] == [line["loss"] for line in plain]
    assert [line["loss"] for line in on] != [line["loss"] for line in plain]
    assert "auxiliary_losses" not in off[0]


def test_batches_too_small_to_compare_are_refused(train):
    done = train("align={kind: kl}", "training.per_device_train_batch_size=3")
    assert done.code == 2
    assert "training.per_device_train_batch_size: the alignment loss compares tasks within a batch" in done.err
    assert "use at least 4 rows" in done.err
    done = train("align={kind: kl, tokens: answers}")
    assert done.code == 2
    assert "align.tokens" in done.err


@pytest.mark.parametrize("strategy", ["temperature", "weights"])
def test_shares_that_balanced_batches_cannot_have_are_refused(train, strategy):
    done = train("align={kind: kl}", f"mixture={{strategy: {strategy}}}", "training.per_device_train_batch_size=3")
    assert done.code == 2
    assert "--set mixture: mixture.strategy: with align every batch has an equal share of each task" in done.err
    assert "use at least 4 rows" in done.err
    assert train("align={kind: kl}", f"mixture={{strategy: {strategy}, batching: mixed}}", name="mixed")
