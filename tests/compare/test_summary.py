"""The numbers of a comparison, against a plain reading of their definitions."""

import math

import pytest

from headwater.compare.summary import summarise
from headwater.evaluation.intervals import t_interval, t_quantile

# From any printed table of Student's t, two-sided 95 %.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 9: 2.262, 10: 2.228, 29: 2.045, 120: 1.980}


@pytest.mark.parametrize(("df", "value"), TABLE.items())
def test_the_quantile_is_that_of_the_tables(df, value):
    assert t_quantile(df) == pytest.approx(value, abs=6e-4)


def test_the_quantile_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 7, 10, 31, 200):
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-12)


def test_an_interval_is_the_mean_and_t_standard_errors():
    values = [0.5, 0.7, 0.9]
    half = 4.302652729749464 * 0.2 / math.sqrt(3)  # the standard deviation of these three is 0.2
    assert t_interval(values) == pytest.approx((0.7 - half, 0.7 + half), rel=1e-12)
    assert t_interval([0.5]) is None
    assert t_interval([0.7 - 0.6, 0.3 - 0.2]) is None  # equal but for rounding
    assert t_interval(values, (0, 1)) == pytest.approx((0.7 - half, 1), rel=1e-12)
    assert t_interval([0.1, 0.3, 0.2], (0, 1))[0] == 0


def run(seed, before, after, losses=()):
    tasks = {f"t{i}": {"metric": "choice_accuracy", "before": before, "after": a} for i, a in enumerate(after)}
    tasks |= {f"l{i}": {"metric": "loss", "before": 5.0, "after": a} for i, a in enumerate(losses)}
    mean = {"before": before, "after": sum(after) / len(after)} if after else {"before": None, "after": None}
    return {"seed": seed, "trainable_parameters": 7, "train_seconds": 3.0, "steps": 6, "tasks": tasks, "mean": mean,
            "extra": {}}  # fmt: skip


def test_differences_are_taken_seed_by_seed():
    a = [run(s, 0.25, [x, x + 0.1]) for s, x in enumerate([0.3, 0.6, 0.5])]
    b = [
        run(s, 0.25, [x + d, x + 0.1]) for s, (x, d) in enumerate(zip([0.3, 0.6, 0.5], [0.02, 0.04, 0.06], strict=True))
    ]
    first, second = summarise({"a": a, "b": b})
    assert first["method"] == "a"
    assert (first["n"], first["trainable_parameters"]) == (3, 7)
    assert first["paired_difference"] is None
    assert first["paired_ci95"] is None
    assert first["mean"] == pytest.approx((0.35 + 0.65 + 0.55) / 3)
    assert second["paired_difference"] == pytest.approx(0.02)  # means differ by 0.01, 0.02 and 0.03
    half = 4.302652729749464 * 0.01 / math.sqrt(3)
    assert second["paired_ci95"] == pytest.approx((0.02 - half, 0.02 + half))
    width = first["ci95"][1] - first["ci95"][0]
    assert width > 10 * half  # seeds differ much more than methods do on one seed
    tasks = second["extra"]["tasks"]
    assert tasks["t0"]["paired_difference"] == pytest.approx(0.04)
    assert tasks["t1"]["paired_difference"] == pytest.approx(0)
    assert second["extra"]["seconds_per_step"] == 0.5


def test_a_start_is_the_methods_own_and_a_mean_is_of_all_runs_or_none():
    measured, not_measured = run(0, 0.2, [0.4]), run(1, 0.4, [0.5])
    measured["extra"] = {"activation_bytes": 8}
    first, second = summarise({"a": [run(0, 0.1, [0.4]), run(1, 0.1, [0.5])], "b": [measured, not_measured]})
    assert first["extra"]["before"] == first["extra"]["tasks"]["t0"]["before"] == pytest.approx(0.1)
    assert second["extra"]["before"] == second["extra"]["tasks"]["t0"]["before"] == pytest.approx(0.3)
    assert second["extra"]["activation_bytes"] is None


def test_one_seed_has_no_interval():
    first, second = summarise({"a": [run(0, 0.2, [0.4])], "b": [run(0, 0.2, [0.5])]})
    assert (first["ci95"], second["ci95"], second["paired_ci95"]) == (None, None, None)
    assert second["paired_difference"] == pytest.approx(0.1)


def test_losses_have_no_mean_but_are_compared_task_by_task():
    first, second = summarise({"a": [run(0, 0, [], [2.0]), run(1, 0, [], [3.0])],
                               "b": [run(0, 0, [], [1.5]), run(1, 0, [], [2.5])]})  # fmt: skip
    assert first["mean"] is second["mean"] is second["paired_difference"] is None
    loss = second["extra"]["tasks"]["l0"]
    assert loss["paired_difference"] == pytest.approx(-0.5)
    assert (loss["ci95"][0], loss["ci95"][1] > 8) == (0, True)


def test_intervals_of_scores_end_at_zero_and_one():
    (entry,) = summarise({"a": [run(0, 0, [0.2]), run(1, 0, [0.9])]})
    assert entry["ci95"] == entry["extra"]["tasks"]["t0"]["ci95"] == (0, 1)
