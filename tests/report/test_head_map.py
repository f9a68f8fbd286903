"""The map of heads over training: what is read from the checkpoints, and that alike heads come to lie together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from comparison_runs import METHODS, write_comparison
from report_runs import TASKS
from safetensors.torch import save_file

from headwater.report import head_map
from headwater.report.comparison import read_comparison
from headwater.report.comparison_sections import build_comparison_page
from headwater.report.head_map import heads_over_steps, tsne
from headwater.report.html import FigureBlock, draw

ONE = {name: TASKS[name] for name in list(TASKS)[:1]}


def write_checkpoints(run: Path, steps=(2, 4, 10), layers=3, heads=2) -> dict:
    torch.manual_seed(0)
    kept = {}
    for step in steps:
        tensors = {}
        for layer in range(layers):
            stem = f"base_model.model.model.layers.{layer}.mlp"
            for projection, size in (("up_proj", 6), ("down_proj", 4)):
                tensors[f"{stem}.{projection}.rlora_branch.A"] = torch.randn(2, 5)
                tensors[f"{stem}.{projection}.rlora_branch.B"] = torch.randn(heads, 2, size).bfloat16()
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file(tensors, run / f"checkpoint-{step}" / "adapter_model.safetensors")
        kept[step] = tensors
    return kept


def test_it_reads_one_projection_of_every_layer_and_step(tmp_path):
    kept = write_checkpoints(tmp_path)
    name, found = heads_over_steps(tmp_path)
    assert (name, list(found)) == ("up_proj", [2, 4, 10])
    for step, tensors in kept.items():
        for layer in range(3):
            key = f"base_model.model.model.layers.{layer}.mlp.up_proj.rlora_branch.B"
            np.testing.assert_array_equal(found[step][layer], tensors[key].float().flatten(1).numpy())


def test_few_checkpoints_or_heads_give_nothing_and_many_are_thinned(tmp_path, monkeypatch):
    write_checkpoints(tmp_path / "one", steps=(5,))
    write_checkpoints(tmp_path / "plain", heads=1)
    write_checkpoints(tmp_path / "many", steps=range(1, 21))
    assert heads_over_steps(tmp_path / "one") == heads_over_steps(tmp_path / "plain") == ("", {})
    assert heads_over_steps(tmp_path / "none") == ("", {})
    _, found = heads_over_steps(tmp_path / "many")
    assert len(found) == head_map.MOST_STEPS
    assert (min(found), max(found)) == (1, 20)
    monkeypatch.setattr(head_map, "MOST_POINTS", 24)  # two heads at six steps leave room for two of three layers
    assert {values.shape[0] for values in heads_over_steps(tmp_path / "many")[1].values()} == {2}


def test_heads_that_are_alike_lie_together(tmp_path):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 40))
    heads = {step: centres + 0.05 * rng.normal(size=(8, 2, 40)) for step in (1, 2, 3)}
    places = tsne(heads)
    assert places.shape == (3, 8, 2, 2)
    middles = places.mean((0, 1))
    within = np.linalg.norm(places - middles, axis=-1).mean()
    assert np.linalg.norm(middles[0] - middles[1]) > 2 * within
    np.testing.assert_array_equal(places, tsne(heads))
    shorter = {step: values / 128 for step, values in heads.items()}
    np.testing.assert_array_equal(places, tsne(shorter))  # a cosine does not see how long heads are


def test_the_comparison_draws_it_for_each_method_with_checkpoints(tmp_path):
    pytest.importorskip("sklearn")
    methods = {label: METHODS[label] for label in ("lora", "rlora")}
    folder = write_comparison(tmp_path / "c", methods=methods, seeds=(0,), tasks=ONE)
    write_checkpoints(folder / "rlora" / "seed-0")
    page = build_comparison_page(read_comparison(folder))
    blocks = [
        b for s in page.sections for b in s.blocks if isinstance(b, FigureBlock) and b.name.startswith("head_map")
    ]
    assert [b.name for b in blocks] == ["head_map_1"]
    assert "rlora" in blocks[0].caption
    assert "2, 4, 10" in blocks[0].caption
    assert draw(blocks[0]).files["png"].startswith(b"\x89PNG")
