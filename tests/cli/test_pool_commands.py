"""`headwater pool create | add | list | remove | check | merge | cluster` as typed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cli_support import run_main
from compose.pool_support import save_base, save_lora

from headwater.compose import Adapter, AdapterPool, LowRank
from headwater.compose.adapter import read_adapter, write_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    base = save_base(folder / "base")
    for seed, name in enumerate(("cats", "dogs")):
        save_lora(folder / name, base, seed)
    save_lora(folder / "wide", base, 2, r=6)
    rows = [{"prompt": f"text {i} ", "completion": "x"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def pool(made, tmp_path, capsys):
    folder = tmp_path / "pool"
    assert run_main(capsys, "pool", "create", folder, "--model", made / "base").code == 0
    for name in ("cats", "dogs", "wide"):
        added = run_main(
            capsys, "pool", "add", folder, made / name, "--samples", made / "rows.jsonl", "--num-samples", 5
        )
        assert added.code == 0
        assert "5 sample texts" in added.out
    return folder


def test_a_pool_s_life(pool, made, capsys):
    listed = run_main(capsys, "pool", "list", pool)
    assert [line.split()[0] for line in listed.out.splitlines() if line.strip()][-3:] == ["cats", "dogs", "wide"]
    index = json.loads(run_main(capsys, "pool", "list", pool, "--json").out)
    assert index["adapters"]["cats"]["rank"] == 4
    assert len(index["adapters"]["dogs"]["samples"]) == 5
    assert index["adapters"]["dogs"]["samples"][0].startswith("text ")
    assert "3 adapters, all files as they were added" in run_main(capsys, "pool", "check", pool).out
    gone = run_main(capsys, "pool", "remove", pool, "cats", "nobody")
    assert (gone.code, "no adapter 'nobody'" in gone.err, "cats" in AdapterPool(pool)) == (2, True, True)
    assert run_main(capsys, "pool", "remove", pool, "cats", "dogs", "cats").code == 0
    assert AdapterPool(pool).names == ["wide"]
    weights = pool / "adapters" / "wide" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    checked = run_main(capsys, "pool", "check", pool)
    assert checked.code == 2
    assert "not the one that was added" in checked.err
    assert "not a readable safetensors file" in checked.err


def test_a_pool_that_cannot_be_locked_is_named(pool, capsys):
    (pool / ".lock").unlink(missing_ok=True)
    (pool / ".lock").mkdir()  # as a folder that is to be read only, also for root
    refused = run_main(capsys, "pool", "remove", pool, "cats")
    assert (refused.code, "cats" in AdapterPool(pool)) == (2, True)
    assert ".lock: this cannot be written: Is a directory" in refused.err


def test_merging(pool, tmp_path, capsys):
    options = ["--adapter", "cats=0.5", "--adapter", "dogs=-0.25", "--output", tmp_path / "both"]
    assert run_main(capsys, "pool", "merge", pool, *options).code == 0
    cats, dogs = (AdapterPool(pool).load(name).layers for name in ("cats", "dogs"))
    for layer, factors in read_adapter(tmp_path / "both", "both").layers.items():
        want = 0.5 * cats[layer].delta() - 0.25 * dogs[layer].delta()
        torch.testing.assert_close(factors.delta(), want, rtol=1e-5, atol=1e-5)
    again = run_main(capsys, "pool", "merge", pool, *options)
    assert (again.code, "not an empty folder" in again.err) == (2, True)
    elsewhere = ["--output", tmp_path / "new"]
    for wrong, message in (
        (["--adapter", "cats=1", "--adapter", "wide=1", "--how", "fuse"], "different ranks"),
        (["--adapter", "cats=1", "--how", "svd"], "unknown way 'svd'"),
        (["--adapter", "cats"], "does not say which weight"),
        (["--adapter", "nobody=1"], "no adapter 'nobody'"),
        (["--adapter", "cats=nan", "--adapter", "dogs=0.5"], "the weight of 'cats=nan' is not a finite number"),
        (["--adapter", "cats=-inf"], "the weight of 'cats=-inf' is not a finite number"),
        (["--adapter", "cats=1e999"], "the weight of 'cats=1e999' is not a finite number"),
        (["--adapter", "cats=0.5", "--adapter", "dogs=1", "--adapter", "cats=0.5"], "'cats' is given twice"),
        (["--adapter", "cats=1e300"], "numbers that are not finite"),
    ):
        refused = run_main(capsys, "pool", "merge", pool, *wrong, *elsewhere)
        assert (refused.code, message in refused.err) == (2, True), refused.err
    assert not (tmp_path / "new").exists()


def test_clustering(pool, made, capsys):
    layers = AdapterPool(pool).load("cats").layers
    again = Adapter("more-cats", {name: LowRank(f.A * 2, f.B, f.scaling) for name, f in layers.items()})
    write_adapter(again, pool.parent / "more-cats", str(made / "base"))
    assert run_main(capsys, "pool", "add", pool, pool.parent / "more-cats").code == 0
    found = json.loads(run_main(capsys, "pool", "cluster", pool, "--clusters", 3, "--json").out)
    assert found["clusters"] == [["cats", "more-cats"], ["dogs"], ["wide"]]
    assert found["adapters"] == ["cats", "dogs", "wide", "more-cats"]
    assert found["similarity"][0][3] == pytest.approx(1)
    for other, clusters in (("dogs", ["1 cats", "2 dogs"]), ("more-cats", ["1 cats, more-cats"])):
        shown = run_main(capsys, "pool", "cluster", pool, "--clusters", 2, "--adapter", "cats", "--adapter", other)
        lines = [" ".join(line.split()) for line in shown.out.splitlines()]
        rows = [line for line in lines if line[:1].isdigit()]
        assert [row[: len(names)] for row, names in zip(rows, clusters, strict=True)] == clusters
        assert shown.err == ("" if len(clusters) == 2 else "1 clusters, not 2: other adapters are the same\n")
    refused = run_main(capsys, "pool", "cluster", pool, "--clusters", 5)
    assert (refused.code, "4 adapters cannot make 5 clusters" in refused.err) == (2, True)
    refused = run_main(capsys, "pool", "cluster", pool, "--clusters", 1, "--adapter", "nobody")
    assert (refused.code, "no adapter 'nobody'" in refused.err) == (2, True)


def test_what_is_refused(pool, made, tmp_path, capsys):
    twice = run_main(capsys, "pool", "add", pool, made / "cats")
    assert (twice.code, "already" in twice.err) == (2, True)
    bare = run_main(capsys, "pool", "add", pool, made / "cats", "--name", "more")
    assert (bare.code, "retrieval cannot find more" in bare.err) == (0, True)
    assert run_main(capsys, "pool", "add", pool, tmp_path / "nothing").code == 2
    shutil.copytree(made / "cats", tmp_path / "dora")
    config = tmp_path / "dora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    dora = run_main(capsys, "pool", "add", pool, tmp_path / "dora")
    assert (dora.code, "use_dora is True" in dora.err, "Traceback" in dora.err) == (2, True, False)
    assert run_main(capsys, "pool", "create", pool, "--model", made / "base").code == 2
    assert run_main(capsys, "pool", "list", tmp_path).code == 2


def test_a_run_brings_its_own_samples(pool, made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made / "cats", run / "adapter")
    (run / "config.yaml").write_text(
        f"model_name_or_path: {made / 'base'}\nmethod: {{name: lora}}\n"
        f"tasks: [{{name: t, train: {made / 'rows.jsonl'}}}]\noutput_dir: {run}\n"
    )
    assert run_main(capsys, "pool", "add", pool, run, "--name", "trained", "--seed", 1).code == 0
    entry = AdapterPool(pool)["trained"]
    assert len(entry.samples) == 20
    assert set(entry.samples) <= {f"text {i}" for i in range(30)}
