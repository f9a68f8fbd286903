"""`headwater export` on runs that `headwater train` has made."""

import functools
import json
import shlex

import pytest
import torch
from cli_support import run_main, write_run
from compose.pool_support import save_lora
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.cli import main
from headwater.export.vllm import RANKS, serve_command

METHODS = {
    "rlora": "{name: rlora, r: 4, num_heads: 2, lora_alpha: 2, target_modules: [up_proj]}",
    "mtl_lora": "{name: mtl_lora, r: 4, target_modules: [up_proj]}",
    "mlora": "{name: mlora, r: 4, target_modules: [up_proj]}",
    "lora": "{name: lora, r: 4, target_modules: [up_proj]}",
}


@pytest.fixture
def headwater(capsys):
    return functools.partial(run_main, capsys)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder)
    for name, method in METHODS.items():
        sets = [f"method={method}", f"output_dir={folder / name}", "training.max_steps=2", "training.learning_rate=0.1"]
        with pytest.raises(SystemExit) as ended:
            main(["train", str(folder / "run.yaml"), *(x for s in sets for x in ("--set", s))])
        assert not ended.value.code
    return folder


def record(folder):
    return json.loads((folder / "export.json").read_text())


@torch.no_grad()
def logits(model, **kwargs):
    return model.eval()(input_ids=torch.arange(20).view(2, 10), **kwargs).logits


def adapted(run, **kwargs):
    return logits(PeftModel.from_pretrained(make_tiny_llama(), run / "adapter"), **kwargs)


@pytest.mark.parametrize("method", ["mlora", "lora"])
def test_a_mergeable_adapter_becomes_plain_lora_or_a_model(headwater, runs, tmp_path, method):
    done = headwater("export", runs / method, "--output", tmp_path / "plain")
    assert done.code == 0, done.err
    assert record(tmp_path / "plain") | {"vllm": 0} == {
        "schema": 1,
        "source": str(runs / method),
        "method": method,
        "base_model": str(runs / "model"),
        "kind": "lora",
        "what": f"plain LoRA of rank {8 if method == 'mlora' else 4}, exact",
        "exact": True,
        "rank": 8 if method == "mlora" else 4,
        "tasks": [],
        "vllm": 0,
    }
    plain = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "plain")
    torch.testing.assert_close(logits(plain), adapted(runs / method), atol=2e-5, rtol=1e-4)

    assert headwater("export", runs / method, "-o", tmp_path / "merged", "--merge").code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(merged), adapted(runs / method), atol=2e-5, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a")["input_ids"]
    assert record(tmp_path / "merged")["kind"] == "merged"

    done = headwater("export", runs / method, "-o", tmp_path / "tasks", "--per-task")
    assert done.code == 2
    assert "the same" in done.err
    assert not (tmp_path / "tasks").exists()


def test_a_routed_adapter_becomes_one_lora_per_task_with_its_loss_of_score(headwater, runs, tmp_path):
    done = headwater("export", runs / "rlora", "-o", tmp_path / "tasks", "--per-task", "--rows", "7")
    assert done.code == 0, done.err
    results = json.loads((runs / "rlora" / "results.json").read_text())["tasks"]
    written = record(tmp_path / "tasks")
    assert (written["kind"], written["exact"]) == ("per_task", False)
    for task in written["tasks"]:
        assert task["adapter"] == pytest.approx(results[task["task"]]["after"])
        assert (task["n"], task["gate_rows"], task["rank"]) == (8, 7, 8)
        assert abs(task["lost"]) == pytest.approx(abs(task["adapter"] - task["plain"]))
        assert (tmp_path / "tasks" / task["task"] / "adapter_config.json").is_file()
        line = next(line for line in done.out.splitlines() if line.split()[:1] == [task["task"]])
        assert f"{task['lost']:+.3f}" in line
    assert headwater("export", runs / "rlora", "-o", tmp_path / "fast", "--per-task", "--score-rows", "0").code == 0
    assert [task["lost"] for task in record(tmp_path / "fast")["tasks"]] == [None, None]


@pytest.mark.parametrize(("method", "flags"), [("rlora", ()), ("rlora", ("--merge",)), ("mtl_lora", ())])
def test_what_cannot_be_written_exactly_is_refused_with_the_ways_out(headwater, runs, tmp_path, method, flags):
    done = headwater("export", runs / method, "-o", tmp_path / "out", *flags)
    assert done.code == 2
    assert "merg" in done.err
    assert "--per-task" in done.err
    assert not any(tmp_path.iterdir())


def test_a_task_conditioned_adapter_is_exact_task_by_task(headwater, runs, tmp_path):
    done = headwater("export", runs / "mtl_lora", "-o", tmp_path / "tasks", "--per-task")
    assert done.code == 0, done.err
    assert record(tmp_path / "tasks")["exact"] is True
    for index, name in enumerate(("animals", "colours")):
        plain = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "tasks" / name)
        expected = adapted(runs / "mtl_lora", headwater_task_ids=torch.full((2,), index))
        torch.testing.assert_close(logits(plain), expected, atol=2e-5, rtol=1e-4)


def lora(runs, folder, **fields):
    """A stock LoRA adapter with random factors, and its logits."""
    fields = {"r": 3, "lora_alpha": 7, "target_modules": ["up_proj", "v_proj"], **fields}
    save_lora(folder, runs / "model", **fields)
    return logits(PeftModel.from_pretrained(make_tiny_llama(), folder))


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_lora_with_patterns_becomes_lora_of_one_rank_and_scaling(headwater, runs, tmp_path, more):
    ranks, alphas = {"layers.1.mlp.up_proj": 5}, {"v_proj": 2}
    expected = lora(runs, tmp_path / "a", rank_pattern=ranks, alpha_pattern=alphas, **more)
    done = headwater("export", tmp_path / "a", "-o", tmp_path / "plain")
    assert done.code == 0, done.err
    fields = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert fields["r"] == fields["lora_alpha"] == record(tmp_path / "plain")["rank"] == 5
    assert not any(fields[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
    written = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert {t.shape["lora_B" in key] for key, t in written.items() if "lora_" in key} == {5}
    plain = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "plain")
    assert (logits(plain) - logits(make_tiny_llama())).abs().max() > 0.01
    torch.testing.assert_close(logits(plain), expected, atol=2e-5, rtol=1e-4)
    assert (record(tmp_path / "plain")["vllm"] is None) == ("modules_to_save" in more)


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"up_proj": 5}, "target_modules": ["up_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_lora_that_is_more_than_a_product_of_two_matrices_is_refused(headwater, runs, tmp_path, more):
    lora(runs, tmp_path / "a", **more)
    done = headwater("export", tmp_path / "a", "-o", tmp_path / "plain")
    assert done.code == 2
    assert next(iter({"embed_tokens"} & {*more.get("target_modules", ())} or more)) in done.err
    assert "--merge" in done.err
    assert "pool" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_dora_can_be_merged(headwater, runs, tmp_path):
    expected = lora(runs, tmp_path / "a", use_dora=True)
    assert headwater("export", tmp_path / "a", "-o", tmp_path / "merged", "--merge").code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)


def test_mistakes(headwater, runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "is there already" in headwater("export", runs / "mlora", "-o", tmp_path / "full").err
    assert (
        "exclude each other" in headwater("export", runs / "mlora", "-o", tmp_path / "o", "--merge", "--per-task").err
    )
    done = headwater("export", runs / "rlora" / "checkpoint-2", "-o", tmp_path / "o", "--per-task")
    assert done.code == 0, done.err
    alone = tmp_path / "alone"
    (runs / "rlora" / "adapter").rename(alone)
    try:
        done = headwater("export", alone, "-o", tmp_path / "p", "--per-task")
        assert "does not say which tasks there are" in done.err
    finally:
        alone.rename(runs / "rlora" / "adapter")


def test_the_command_for_vllm_says_what_was_written(headwater, runs, tmp_path):
    folder = tmp_path / "it's here"
    done = headwater("export", runs / "mtl_lora", "-o", folder, "--per-task")
    line = next(line for line in done.out.splitlines() if line.startswith("vllm serve"))
    assert line == record(folder)["vllm"]
    words = shlex.split(line)
    assert words[:4] == ["vllm", "serve", str(runs / "model"), "--enable-lora"]
    options = dict(zip(words[4:8:2], words[5:8:2], strict=True))
    assert options == {"--max-lora-rank": "8", "--max-loras": "2"}
    assert words[8] == "--lora-modules"
    for module, name in zip(map(json.loads, words[9:]), ("animals", "colours"), strict=True):
        assert module == {"name": name, "path": str(folder / name)}
        config = json.loads((folder / name / "adapter_config.json").read_text())
        assert config["r"] <= int(options["--max-lora-rank"]) in RANKS


@pytest.mark.parametrize("fields", [{"r": 600}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_no_command_for_what_vllm_does_not_take(tmp_path, fields):
    plain = {"r": 300, "bias": "none"}
    assert "--max-lora-rank 320" in serve_command("base", {"a": (tmp_path, plain)})
    assert serve_command("base", {"a": (tmp_path, plain), "b": (tmp_path, plain | fields)}) is None
