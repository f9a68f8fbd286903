"""Each benchmark runs, at a size where its numbers mean nothing, and writes what it says it writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from benchmarks import (
    adapter_speed,
    decode_speed,
    formulations,
    gpu_speed,
    layers,
    measure,
    method_costs,
    page,
    scaling,
    study_page,
    training_throughput,
)
from benchmarks.layers import Shape
from headwater.evaluation.intervals import t_interval

FEW = ["--rounds", "2"]
METHODS = ["--methods", "rlora", "mtl_lora", "cond_mixlora"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama().save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_adapter_speed(tmp_path, capsys):
    adapter_speed.main(["--smoke", *FEW, "--json", str(tmp_path / "r.json")])
    assert "floor: frozen linear" in capsys.readouterr().out
    (shape,) = json.loads((tmp_path / "r.json").read_text())["shapes"]
    found = shape["variants"]
    assert {"floor", "PEFT LoRA r=2", "R-LoRA, public loop", "R-LoRA", "SMoRA"} <= found.keys()
    assert found["floor"]["saved"] == 0
    assert found["floor"]["flops"] == 1


def test_formulations(tmp_path, capsys):
    formulations.main(["--smoke", *FEW, "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert {"floor", "headwater", "heads as one batched matmul"} <= found["shapes"][0]["variants"].keys()


def test_formulations_are_one_equation():
    """Without dropout, and with one A, router and B, they agree."""
    shape = Shape(6, 10, 8, r=2, N=3, dropout=0.0, rows=2)
    torch.manual_seed(0)
    linear = layers.frozen_linear(shape)
    x, _ = shape.inputs()
    loop = layers.PublicLoop(linear, 2, 3, 0.0)
    expected = loop(x)
    for form in (formulations.InPlace, formulations.OutOfPlace, formulations.BatchedHeads, formulations.DroppedInputs):
        model = form(linear, shape)
        with torch.no_grad():
            model.A.copy_(loop.A.weight)
            model.router.copy_(loop.router.weight)
            model.B.copy_(torch.stack([up.weight.T for up in loop.B]))
        torch.testing.assert_close(model(x), expected)


def test_scaling_draws_its_picture(tmp_path, capsys):
    scaling.main(["--smoke", *FEW, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "picture")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert [sweep["values"][-1] for sweep in found["sweeps"]] == [2, 2, 1000, 16]
    assert "frozen layer (floor)" in (tmp_path / "picture.svg").read_text()
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_decode_speed(model_folder, tmp_path, capsys):
    decode_speed.main(["--model", model_folder, *FEW, *METHODS, "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert [batch["batch"] for batch in found["batches"]] == [1, 8]
    assert {"floor", "M-LoRA, merged", "MTL-LoRA"} <= found["batches"][0]["variants"].keys()


def test_training_throughput(model_folder, tmp_path, capsys):
    for task in ("one", "two"):
        rows = [{"prompt": f"{task} {'very ' * (n % 5)}{n} is", "completion": f" {n % 3}"} for n in range(12)]
        (tmp_path / "tasks" / task).mkdir(parents=True)
        (tmp_path / "tasks" / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--r", "2", "--num-heads", "2", "--steps", "3", "--repeats", "1", "--tasks", str(tmp_path / "tasks")]
    training_throughput.main(["--model", model_folder, *FEW, *METHODS, *sizes, "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["steps"]["variants"]["floor"]["time"]["median"] == 1
    assert found["trainers"]["headwater_to_trl"]["median"] > 0
    for trainer in found["trainers"]["trainers"].values():
        assert 0 < trainer["share_of_useful_tokens"]["median"] <= 1
    assert found["trainers"]["trainers"][training_throughput.OURS]["share_of_useful_tokens"]["median"] == 1


def test_gpu_speed_runs_on_the_cpu_as_well(tmp_path, capsys):
    gpu_speed.main(["--device", "cpu", "--smoke", "--layers", "2", *FEW, "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert {"floor", "R-LoRA, public loop", "R-LoRA, autograd"} <= found["shapes"][0]["variants"].keys()
    assert found["model"]["variants"]["floor"]["tokens_per_second"] > 0


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    layer = torch.nn.Linear(6, 4).requires_grad_(True)
    x = torch.randn(5, 6, requires_grad=True)
    assert measure.saved_bytes(lambda: layer(x), without=layer) == x.nbytes
    assert measure.saved_bytes(lambda: (x * x).exp(), without=layer) == 2 * x.nbytes


def test_in_place_products_count_as_work():
    y, a, b = torch.zeros(5, 7), torch.ones(5, 3), torch.ones(3, 7)
    assert measure.flops(lambda: y.addmm_(a, b)) == 2 * 5 * 3 * 7


def test_the_kept_heap_is_set_before_the_process_starts():
    root = Path(__file__).parents[2]
    code = "import os; from benchmarks import measure; o = measure.arguments('').parse_args(['--heap', 'kept'])"
    code += "; measure.prepare(o); print(os.environ['MALLOC_MMAP_MAX_'])"
    plain = {key: value for key, value in os.environ.items() if key not in measure.KEPT_HEAP}
    environment = {**plain, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def test_the_performance_page_says_what_was_measured():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text) == text, "run python -m benchmarks.page"


@pytest.mark.parametrize("name", ["claim_rates-H200", "claim_rates-H200-32"])
def test_the_claim_page_s_learning_rates_are_those_of_the_runs(name):
    text = (study_page.PAGES / "claim.md").read_text(encoding="utf-8")
    found = json.loads((measure.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["scores"]
    for method, rates in found.items():
        row = " | ".join(f"{rates[rate]['mean']:.3f}" for rate in sorted(rates))
        assert f"| {method} | {row} |" in text


def test_the_table_of_scales_is_that_of_the_runs():
    text = (study_page.PAGES / "claim-gpu.md").read_text(encoding="utf-8")
    names = {
        "hydralora": "HydraLoRA",
        "hydralora+rslora": "HydraLoRA, `true`",
        "hydralora+init-alone": "`hydralora+init`, `false`",
        "hydralora+init": "`hydralora+init`",
        "rlora-rslora": "R-LoRA, `false`",
        "rlora": "R-LoRA",
        "lora": "LoRA",
        "lora-scaled": "LoRA, `lora_alpha: 102`",
    }
    rows = {
        (name, on): cells
        for name, on, cells in re.findall(r"^\| ([^|]+) \| \d\.\d\d \| ([CG]PU) \|(.*)\|$", text, re.M)
    }
    found = json.loads((measure.RESULTS / "claim_scale.json").read_text(encoding="utf-8"))["runs"]
    assert {run["method"] for run in found} == set(names)
    assert set(rows) == {(names[run["method"]], run["device"].upper()) for run in found}
    for (name, on), cells in rows.items():
        mine = [run for run in found if (names[run["method"]], run["device"].upper()) == (name, on)]
        losses = {run["seed"]: f"{run['loss']:.3f}" for run in mine}
        assert [cell.strip() for cell in cells.split("|")] == [losses.get(seed, "") for seed in range(4)]


def test_what_is_said_over_seven_seeds_is_that_of_the_runs():
    text = (study_page.PAGES / "claim-gpu.md").read_text(encoding="utf-8")
    (part,) = json.loads((measure.RESULTS / "study-claim-gpu.json").read_text(encoding="utf-8"))["comparisons"]
    runs = {m["label"]: list(m["runs"]) for m in part["methods"] if m["label"] in ("rlora", "hydralora")}
    for run in json.loads((measure.RESULTS / "claim_seeds.json").read_text(encoding="utf-8"))["runs"]:
        runs[run["method"]].append(run)
    for read in (lambda run: run["mean"], lambda run: run["tasks"]["gsm8k"]):
        mine, other = ({run["seed"]: read(run) for run in runs[label]} for label in ("rlora", "hydralora"))
        assert sorted(mine) == sorted(other) == list(range(7))
        differences = [mine[seed] - other[seed] for seed in mine]
        low, high = t_interval(differences)
        said = f"{sum(differences) / 7:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
        assert f"{said} by " in text
        for seed in (5, 6):
            assert f"{mine[seed]:.3f}" in text
            assert f"{other[seed]:.3f}" in text


def test_costs_are_measured_of_each_method_as_its_study_says():
    (part,) = json.loads((measure.RESULTS / "study-methods.json").read_text(encoding="utf-8"))["comparisons"]
    file = Path(__file__).parents[2] / "examples/studies/small/methods.yaml"
    made = {m["label"]: method_costs.run_file(file, m, 3, Path("out")) for m in part["methods"]}
    assert {label for label, content in made.items() if content["mixture"]["batching"] == "balanced"} == {
        "lora+align", "lora+balanced", "rlora+balanced", "mlora+balanced"
    }  # fmt: skip
    assert [label for label, content in made.items() if "align" in content] == ["lora+align"]
    for entry in part["methods"]:
        content = made[entry["label"]]
        assert content["method"] == entry["method"]
        assert content["training"]["max_steps"] == 3
        assert all(Path(task["train"]).is_absolute() and "test" not in task for task in content["tasks"])
        assert "compare" not in content


def test_the_readme_s_table_of_costs_is_what_was_measured():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").replace("**", "")
    found = page.load("gpu_speed-H200")["model"]["variants"]
    rows = {
        "frozen model": "floor",
        "PEFT's LoRA": "PEFT LoRA r=8",
        "R-LoRA": "R-LoRA, triton",
        "R-LoRA as public code writes it, a loop over heads": "R-LoRA, public loop",
    }
    for title, name in rows.items():
        v = found[name]
        cells = (f"{v['time']['median']:.2f}", f"{v['tokens_per_second']:,.0f}", f"{v['peak_bytes'] / 2**30:.0f}")
        assert f"| {title} | {' | '.join(cells)} |" in readme
