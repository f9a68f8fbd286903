"""From module names to layers and projections, and the sums over heads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from headwater.report.modules import arrange, distance_from_mean, mean_off_diagonal, mean_over, routing_arrays

FINITE = st.floats(-1, 1, allow_nan=False)


def test_a_module_is_a_layer_of_a_projection():
    names = [f"base_model.model.model.layers.{i}.mlp.{p}_proj" for i in (10, 2) for p in ("up", "down")]
    table = arrange(names)
    assert list(table) == ["up_proj", "down_proj"]
    assert list(table["up_proj"]) == [2, 10]
    assert table["down_proj"][10] == "base_model.model.model.layers.10.mlp.down_proj"


def test_projections_that_end_alike_keep_longer_names():
    names = ["layers.0.self_attn.out_proj", "layers.0.mlp.out_proj", "layers.0.mlp.up"]
    assert set(arrange(names)) == {"self_attn.out_proj", "mlp.out_proj", "up"}
    names = ["encoder.layers.0.fc.out", "decoder.layers.0.fc.out"]
    assert len(arrange(names)) == 2


def test_experts_and_names_without_a_number_are_kept():
    table = arrange(["layers.3.experts.0.w1", "layers.3.experts.1.w1", "lm_head", "mlp2.fc"])
    assert sorted(module for row in table.values() for module in row.values()) == sorted(
        ["layers.3.experts.0.w1", "layers.3.experts.1.w1", "lm_head", "mlp2.fc"]
    )
    assert table["lm_head"] == {0: "lm_head"}
    assert {0: "mlp2.fc"} in table.values()


@settings(deadline=None)
@given(st.integers(2, 6).flatmap(lambda n: arrays(float, (n, n), elements=FINITE)))
def test_mean_off_diagonal_is_the_mean_over_ordered_pairs(matrix):
    pairs = list(itertools.permutations(range(len(matrix)), 2))
    expected = math.fsum(matrix[i, j] for i, j in pairs) / len(pairs)
    assert mean_off_diagonal(matrix.tolist()) == pytest.approx(expected, abs=1e-12)


def test_mean_off_diagonal_of_what_has_no_pairs_is_none():
    assert mean_off_diagonal([[1.0]]) is None
    assert mean_off_diagonal([]) is None
    assert mean_off_diagonal([[1.0, 0.5], [0.5]]) is None
    assert mean_off_diagonal([[1.0, math.nan], [0.5, 1.0]]) is None


def test_mean_over_skips_what_is_missing():
    values = np.array([[1.0, np.nan], [3.0, np.nan]])
    np.testing.assert_array_equal(mean_over(values, 0), [2.0, np.nan])
    np.testing.assert_array_equal(mean_over(values, 1), [1.0, 3.0])


def test_distance_of_disjoint_and_of_equal_tasks():
    disjoint = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # tasks, layers, heads
    np.testing.assert_allclose(distance_from_mean(disjoint), [[0.5], [0.5]])
    equal = np.full((3, 2, 4), 0.25)
    np.testing.assert_allclose(distance_from_mean(equal), 0.0)
    four = np.eye(4)[:, None, :]
    np.testing.assert_allclose(distance_from_mean(four), 0.75)


def test_routing_arrays_leave_holes_where_a_task_lacks_a_module():
    routing = {"a": {"layers.0.up": [0.2, 0.8], "layers.1.up": [0.5, 0.5]}, "b": {"layers.1.up": [0.1, 0.9]}}
    layers, tasks, shares = routing_arrays(routing)["up"]
    assert (layers, tasks) == ([0, 1], ["a", "b"])
    np.testing.assert_array_equal(shares, [[[0.2, 0.8], [0.5, 0.5]], [[np.nan, np.nan], [0.1, 0.9]]])
    assert routing_arrays({}) == {}
    assert routing_arrays({"a": {}}) == {}
