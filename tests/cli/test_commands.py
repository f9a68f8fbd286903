"""Commands on a tiny model that one real run has trained."""

import functools
import io
import json
import os
import shutil
import sys

import pytest
import torch
from cli_support import headwater_process, run_main, write_run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from transformers import AutoModelForCausalLM

from headwater.analysis import GateStatistics
from headwater.cli import app
from headwater.cli.adapters import locate
from headwater.cli.console import out_console
from headwater.cli.evaluate import _what_to_score
from headwater.cli.inspect import _print_tasks
from headwater.cli.inspect_gates import GatesOnText
from headwater.config import RECOMMENDED, load_config


@pytest.fixture
def headwater(capsys):
    return functools.partial(run_main, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run made by the real command; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    write_run(folder)
    done = headwater_process("train", "run.yaml", "--set", "seed=3", cwd=folder)
    assert done.code == 0, done.err
    (folder / "stdout.txt").write_text(done.out)
    return folder / "run"


def test_train_leaves_a_whole_run_folder_and_says_what_came_of_it(trained):
    names = {"adapter", "config.yaml", "results.json", "history.jsonl", "report.html", "checkpoint-2", "checkpoint-4"}
    assert names <= {path.name for path in trained.iterdir()}
    results = json.loads((trained / "results.json").read_text())
    assert (results["steps"], results["seed"], results["method"]) == (4, 3, "rlora")
    printed = (trained.parent / "stdout.txt").read_text()
    for name, task in results["tasks"].items():
        numbers = [f"{task[when]:.3f}" for when in ("before", "after")]
        assert any(name in line and all(number in line for number in numbers) for line in printed.splitlines())
    assert f"report: {trained / 'report.html'}" in printed
    assert load_config(trained / "config.yaml").seed == 3


def test_evaluate_a_run_scores_its_tasks_as_training_did(headwater, trained, tmp_path):
    done = headwater("evaluate", trained, "--output", tmp_path / "scores.json")
    assert done.code == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    results = json.loads((trained / "results.json").read_text())
    assert scores["method"] == "rlora"
    assert scores["base_model"] == results["base_model"]
    for name, task in results["tasks"].items():
        assert scores["tasks"][name]["value"] == pytest.approx(task["after"])
        assert scores["tasks"][name]["n"] == task["n"] == 8
        assert f"{task['after']:.3f}" in next(line for line in done.out.splitlines() if name in line)
    assert scores["tasks"]["animals"]["majority"] == 0.5
    assert scores["mean"] == pytest.approx(results["mean"]["after"])


def test_evaluate_an_adapter_folder_on_a_tasks_file(headwater, trained, tmp_path):
    row = {"prompt": "train animals 1 is", "completion": " dog"}
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "tasks.yaml").write_text("tasks:\n  - {name: new, test: new.jsonl}\n")
    arguments = ["evaluate", trained / "adapter", "--tasks", tmp_path / "tasks.yaml", "-o", tmp_path / "s.json"]
    assert headwater(*arguments).code == 0
    score = json.loads((tmp_path / "s.json").read_text())["tasks"]["new"]
    # The oracle: Hugging Face's own loss on the same tokens, through plain PEFT.
    model = PeftModel.from_pretrained(make_tiny_llama(), trained / "adapter").eval()
    tokenizer = make_tiny_tokenizer()
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(prompt) + completion])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([prompt + completion]), labels=labels).loss
    assert score["metric"] == "loss"
    assert score["value"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("section", "normalization"),
    [
        ("", "bytes"),
        ("evaluation: {batch_size: 2}\n", "bytes"),
        ("evaluation: {choice_normalization: tokens}\n", "tokens"),
    ],
)
def test_a_tasks_file_leaves_to_the_run_what_it_does_not_say(headwater, trained, tmp_path, section, normalization):
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("choice_normalization: none", "choice_normalization: bytes"))
    assert config.read_text() != text
    file = tmp_path / "tasks.yaml"
    file.write_text(f"tasks: [{{name: new, test: {trained.parent}/animals-test.jsonl}}]\n{section}")
    assert headwater("evaluate", tmp_path / "run", "--tasks", file, "-o", tmp_path / "s.json").code == 0
    detail = json.loads((tmp_path / "s.json").read_text())["tasks"]["new"]["detail"]
    assert detail["normalization"] == normalization


def test_a_key_of_a_section_leaves_the_runs_other_keys_as_they_are(headwater, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text().replace("choice_normalization: none", "choice_normalization: bytes")
    config.write_text(text.replace("chat_template: auto", "chat_template: always"))
    rows = f"{trained.parent}/animals-test.jsonl"
    (tmp_path / "tasks.yaml").write_text(
        f"tasks: [{{name: tokens, test: {rows}, metric: loss}}, {{name: choice, test: {rows}}}]\n"
    )
    found = []
    for overrides in ([], ["data.max_length=512", "evaluation.batch_size=8"], ["data.chat_template=never"]):
        options = [part for override in overrides for part in ("--set", override)]
        command = ["evaluate", tmp_path / "run", "--tasks", tmp_path / "tasks.yaml", *options]
        assert headwater(*command, "-o", tmp_path / "s.json").code == 0
        scores = json.loads((tmp_path / "s.json").read_text())["tasks"]
        assert scores["choice"]["detail"]["normalization"] == "bytes"
        found.append(scores["tokens"]["value"])
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert abs(found[2] - found[0]) > 1e-3
    with (tmp_path / "tasks.yaml").open("a") as file:
        file.write("training: {max_steps: 3}\n")
    config = _what_to_score(locate(str(tmp_path / "run")), str(tmp_path / "tasks.yaml"), [])
    assert (config.training["max_steps"], config.training["use_cpu"]) == (3, True)


def test_another_base_model_is_the_one_that_is_scored(headwater, trained, tmp_path):
    """Of the same shape, since the adapter has to fit; with a tasks file as without."""
    torch.manual_seed(8)
    make_tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "tasks.yaml").write_text(
        f"model_name_or_path: some/model\n"
        f"tasks: [{{name: colours, test: {trained.parent}/colours-test.jsonl, metric: loss}}]\n"
    )
    shutil.copytree(trained / "adapter", tmp_path / "bare")
    other = ["--set", f"model_name_or_path={tmp_path / 'model'}"]
    found = []
    for source, options in (
        (trained, []),
        (trained, ["--tasks", tmp_path / "tasks.yaml"]),  # what that names is not the run's
        (trained, other),
        (trained, ["--tasks", tmp_path / "tasks.yaml", *other]),
        (tmp_path / "bare", ["--tasks", tmp_path / "tasks.yaml", *other]),
    ):
        done = headwater("evaluate", source, *options, "-o", tmp_path / "s.json")
        assert done.code == 0, done.err
        scores = json.loads((tmp_path / "s.json").read_text())
        found.append((scores["tasks"]["colours"]["value"], scores["base_model"]))
    assert found[0] == found[1]
    assert found[2] == found[3] == found[4]
    assert found[0][1] == str(trained.parent / "model")
    assert found[2][1] == str(tmp_path / "model")
    assert abs(found[0][0] - found[2][0]) > 0.01


def test_evaluate_takes_overrides_and_splits(headwater, trained):
    done = headwater("evaluate", trained, "--split", "train", "--set", "tasks.0.max_train_rows=5")
    assert done.code == 0
    cells = [line.split() for line in done.out.splitlines()]
    rows = {line[0]: line[2] for line in cells if line and line[0] in ("animals", "colours")}
    assert rows == {"animals": "5", "colours": "24"}


def test_validation_rows_are_as_many_as_asked_for_and_one_row_of_loss_has_no_interval(headwater, trained, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"tasks: [{{name: colours, test: {trained.parent}/colours-test.jsonl, "
        f"validation: {trained.parent}/colours-train.jsonl, metric: loss, max_test_rows: 1}}]"
    )
    for split in ("test", "validation"):
        output = tmp_path / f"{split}.json"
        done = headwater("evaluate", trained, "--tasks", tmp_path / "run.yaml", "--split", split, "-o", output)
        assert done.code == 0, done.err
        (row,) = (line.split() for line in done.out.splitlines() if line.split()[:1] == ["colours"])
        score = json.loads(output.read_text())["tasks"]["colours"]
        assert score["n"] == 1
        assert score["detail"]["interval"] is None
        assert row == ["colours", "loss", "1", f"{score['value']:.3f}"]


def test_without_a_method_the_recommended_one_is_trained_and_said(headwater, tmp_path):
    path = write_run(tmp_path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("method")))
    done = headwater("train", path, "--set", "training.max_steps=1", "--set", "training.learning_rate=1e-4")
    assert done.code == 0, done.err
    assert "recommended one is trained: rlora, r 8, num_heads 3, " in done.out
    assert "target_modules all-linear; learning rate 0.0001" in done.out
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert kept.method == RECOMMENDED
    assert "method" in kept.model_fields_set


def test_a_method_that_goes_by_task_keeps_its_task_ids(headwater, tmp_path):
    path = write_run(tmp_path)
    # so that the tasks' parts of the adapter differ by much
    rate = ["--set", "training.learning_rate=0.1", "--set", "training.max_steps=12"]
    assert headwater("train", path, "--set", "method={name: mtl_lora, r: 4}", *rate).code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "tasks.yaml").write_text("tasks:\n  - {name: colours, test: colours-test.jsonl, metric: loss}\n")
    done = headwater("evaluate", tmp_path / "run", "--tasks", tmp_path / "tasks.yaml", "-o", tmp_path / "s.json")
    assert done.code == 0
    value = json.loads((tmp_path / "s.json").read_text())["tasks"]["colours"]["value"]
    assert value == pytest.approx(results["tasks"]["colours"]["after"], abs=1e-6)

    (tmp_path / "tasks.yaml").write_text("tasks:\n  - {name: shapes, test: colours-test.jsonl}\n")
    done = headwater("evaluate", tmp_path / "run", "--tasks", tmp_path / "tasks.yaml")
    assert done.code == 2
    assert "was not trained on `shapes`\n    it knows animals, colours" in done.err

    answers = {t: headwater("generate", tmp_path / "run", "-p", "x", "--task", t).out for t in ("animals", "colours")}
    assert answers["animals"] != answers["colours"]
    done = headwater("generate", tmp_path / "run", "-p", "x")
    assert done.code == 2
    assert "no task was given" in done.err


def test_generate_equals_plain_greedy_decoding(headwater, trained):
    prompts = ["train animals 1 is", "colours"]
    done = headwater("generate", trained, "-p", prompts[0], "-p", prompts[1], "--max-new-tokens", 6, "--json")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [a["prompt"] for a in answers] == prompts
    model = PeftModel.from_pretrained(make_tiny_llama(), trained / "adapter").eval()
    tokenizer = make_tiny_tokenizer()
    for answer in answers:
        inputs = tokenizer(answer["prompt"], return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer["answer"] == tokenizer.decode(output, skip_special_tokens=True)


def test_generate_answers_each_line_of_standard_input(headwater, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    done = headwater("generate", trained, "--max-new-tokens", 2, "--json", "--task", "colours")
    assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["one", "two"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffone\n\ufefftwo"))  # a mark at the beginning is no text
    done = headwater("generate", trained, "--max-new-tokens", 2, "--json", "--task", "colours")
    assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["one", "\ufefftwo"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff\ntwo\n"))
    done = headwater("generate", trained, "--max-new-tokens", 2)
    assert "standard input:1: 1 of 2 lines are blank" in done.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  \ntwo\n"))
    done = headwater("generate", trained, "--max-new-tokens", 2)
    assert (done.code, done.out) == (2, "")
    assert "standard input:2: 2 of 4 lines are blank" in done.err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    done = headwater("generate", trained)
    assert done.code == 2
    assert "there is no prompt" in done.err


def test_without_a_number_of_tokens_answers_end_where_the_model_does(headwater, trained, tmp_path):
    short = tmp_path / "run"
    shutil.copytree(trained, short)
    make_tiny_llama(max_position_embeddings=32).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    for file in (short / "config.yaml", short / "adapter" / "adapter_config.json"):
        file.write_text(file.read_text().replace(str(trained.parent / "model"), str(tmp_path / "model")))
    prompts = ("-p", "one two", "-p", "one two three four")
    done = headwater("generate", short, *prompts, "--json")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 2
    done = headwater("generate", short, *prompts, "--max-new-tokens", 32)
    assert done.code == 2
    assert "are more than the model's 32" in done.err
    assert "--max-new-tokens" in done.err


def test_generate_in_chat_form_uses_the_template(headwater, trained):
    plain = headwater("generate", trained, "-p", "<|user|>hi<eos><|assistant|>", "--max-new-tokens", 8)
    chat = headwater("generate", trained, "-p", "hi", "--chat", "--max-new-tokens", 8)
    bare = headwater("generate", trained, "-p", "hi", "--max-new-tokens", 8)
    assert chat.out == plain.out != bare.out


def test_inspect_agrees_with_the_file(headwater, trained):
    found = json.loads(headwater("inspect", trained, "--json").out)
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert found["method"] == "rlora"
    assert found["parameters"] == sum(t.numel() for name, t in tensors.items() if not name.endswith(("A0", "B0")))
    assert len(found["layers"]) == 4
    for layer in found["layers"]:
        (B,) = (t for name, t in tensors.items() if layer["name"] in name and name.endswith(".B"))
        cosine = torch.cosine_similarity(B[0].flatten(), B[1].flatten(), dim=0).item()
        assert layer["head_similarity"]["mean"] == pytest.approx(cosine, abs=1e-5)
        assert (layer["r"], layer["heads"], layer["scaling"], layer["routed"]) == (4, 2, 1.0, True)
    shown = headwater("inspect", trained / "checkpoint-4").out
    first = found["layers"][0]["head_similarity"]["mean"]
    assert f"{found['parameters']:,}" in shown
    assert f"{first:+.3f}" in shown


def gates_by_hand(trained, texts):
    """Mean softmax of each router over the tokens of some texts, one text at a time: module -> [N]."""
    model = PeftModel.from_pretrained(make_tiny_llama(), trained / "adapter").eval()
    tokenizer, sums, count = make_tiny_tokenizer(), {}, 0
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "branches")}
    for name, layer in layers.items():
        router = layer.branches["default"].router.detach()
        layer.register_forward_pre_hook(
            lambda _, args, n=name, r=router: sums.__setitem__(
                n, sums.get(n, 0) + (args[0][0] @ r.T).softmax(-1).sum(0)
            )
        )
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            count += len(ids)
            model(input_ids=torch.tensor([ids]))
    return {name: (total / count).tolist() for name, total in sums.items()}, count


def test_inspect_shows_what_the_gates_do_on_the_runs_rows(headwater, trained):
    found = json.loads(headwater("inspect", trained, "--rows", 8, "--json").out)
    rows = {
        task: [json.loads(line) for line in (trained.parent / f"{task}-test.jsonl").read_text().splitlines()]
        for task in ("animals", "colours")
    }
    texts = {task: [row["prompt"] + row["completion"] + "<eos>" for row in each] for task, each in rows.items()}
    wanted, count = gates_by_hand(trained, [text for each in texts.values() for text in each])
    assert found["gates"] == {"tokens": count, "texts": {"animals": 8, "colours": 8}, "dead_below": 0.1}
    assert list(wanted) == [layer["name"] for layer in found["layers"]]
    by_task = {task: gates_by_hand(trained, each)[0] for task, each in texts.items()}
    for layer in found["layers"]:
        gates = layer["gates"]
        assert gates["load"] == pytest.approx(wanted[layer["name"]], abs=1e-5)
        assert (gates["top_k"], gates["dead_experts"]) == (2, [])
        for task in texts:
            assert gates["load_by_task"][task] == pytest.approx(by_task[task][layer["name"]], abs=1e-5)
    shown = headwater("inspect", trained, "--rows", 8).out
    first = found["layers"][0]["gates"]
    assert f"{count:,} tokens, 16 texts of 2 tasks" in shown
    assert f"{first['gate_entropy']:.3f}" in shown
    assert "0 of 8 (load below 10% of an equal one)" in shown
    mean = sum(layer["gates"]["load_by_task"]["colours"][1] for layer in found["layers"]) / 4
    assert f"{100 * mean:.1f}" in next(line for line in shown.splitlines() if line.strip().startswith("colours"))


def test_load_by_task_says_which_layers_it_is_of_where_they_differ(capsys):
    layers = {f"layer.{n}": statistics(load) for n, load in enumerate(([0.5, 0.5], [0.1, 0.2, 0.7], [0.3, 0.2, 0.5]))}
    _print_tasks(out_console(), GatesOnText({"a": layers, "b": layers}, layers, {"a": 1, "b": 1}))
    printed = capsys.readouterr().out
    assert "averaged over the 2 layers with 3 heads" in printed
    assert ["a", "20.0", "20.0", "60.0"] in [line.split() for line in printed.splitlines()]


def statistics(load):
    numbers = torch.tensor(load)
    return GateStatistics(9, len(load), numbers, numbers, numbers, 1.0, 1.0)


def test_conflict_is_measured_and_shown_by_the_report_made_anew(headwater, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    found = json.loads(headwater("conflict", tmp_path / "run", "--rows", 3, "--json").out)
    assert (found["rows_per_task"], found["tasks"]) == (3, ["animals", "colours"])
    assert {"all", "A", "B", "router", "head 1", "head 2"} <= set(found["parts"])
    assert -1 <= found["parts"]["all"]["mean"] <= 1
    assert json.loads((tmp_path / "run" / "conflict.json").read_text()) == found
    assert "Do the tasks' gradients conflict" not in (tmp_path / "run" / "report.html").read_text()
    assert "report.html" in headwater("report", tmp_path / "run").out
    assert 'id="figure-conflict"' in (tmp_path / "run" / "report.html").read_text()


def test_conflict_of_tasks_without_a_gradient_is_json_and_an_empty_cell(headwater, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("on_too_long: error", "on_too_long: drop").replace("1024", "2"))
    printed = headwater("conflict", tmp_path / "run", "--json").out
    found = json.loads(printed, parse_constant=pytest.fail)  # which JSON does not have: NaN
    assert found["parts"]["all"] == {"cosine": [[None, None], [None, None]], "mean": None, "negative": None}
    assert "nan" not in headwater("conflict", tmp_path / "run").out


def test_inspect_reads_no_text_unless_there_is_some(headwater, trained, tmp_path):
    shutil.copytree(trained / "adapter", tmp_path / "bare")
    for source, rows, fix in ((tmp_path / "bare", 4, "or --text FILE"), (trained, 0, "give --rows 4")):
        found = json.loads(headwater("inspect", source, "--rows", rows, "--json").out)
        assert (found["gated"], found["gates"]) == (True, None)
        assert {layer["gates"] for layer in found["layers"]} == {None}
        assert fix in headwater("inspect", source, "--rows", rows).out

    (tmp_path / "lines.txt").write_text("one text\n\n  \nand another one\n")
    done = headwater("inspect", tmp_path / "bare", "--text", tmp_path / "lines.txt", "--json")
    found = json.loads(done.out)
    wanted, count = gates_by_hand(trained, ["one text", "and another one"])
    assert found["gates"] == {"tokens": count, "texts": {"text": 2}, "dead_below": 0.1}
    for layer in found["layers"]:
        assert layer["gates"]["load"] == pytest.approx(wanted[layer["name"]], abs=1e-5)

    (tmp_path / "lines.txt").write_text("\n")
    done = headwater("inspect", trained, "--text", tmp_path / "lines.txt")
    assert (done.code, "there is no text in this file" in done.err) == (2, True)
    done = headwater("inspect", trained, "--text", tmp_path / "none.txt")
    assert (done.code, "cannot be read as text" in done.err) == (2, True)


def test_inspect_still_shows_the_weights_when_the_runs_rows_are_gone(headwater, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("animals-test.jsonl", "gone.jsonl"))
    done = headwater("inspect", tmp_path / "run", "--json")
    assert done.code == 0
    assert "what the gates do is not shown" in done.err
    assert "gone.jsonl" in done.err
    found = json.loads(done.out)
    assert found["gates"] is None
    assert len(found["layers"]) == 4


def test_inspect_a_method_that_goes_by_task(headwater, trained, tmp_path):
    """An adapter of top-k experts routed by task, alone, on text: every task it knows has its own experts."""
    import headwater as package

    fields = {"num_experts": 10, "top_k": 2, "router": "task", "num_tasks": 3, "target_modules": ["up_proj"]}
    base = AutoModelForCausalLM.from_pretrained(trained.parent / "model")
    model = get_peft_model(base, package.make_config("moe_lora", r=2, task_type="CAUSAL_LM", init_seed=0, **fields))
    model.save_pretrained(tmp_path / "moe")
    (tmp_path / "lines.txt").write_text("a text\n")
    found = json.loads(headwater("inspect", tmp_path / "moe", "--text", tmp_path / "lines.txt", "--json").out)
    owner = next(m for m in model.modules() if hasattr(m, "task_gate"))
    chosen = (owner.task_embedding @ owner.task_gate.T).topk(2).indices.tolist()
    assert found["gates"]["texts"] == {"task 0": 1, "task 1": 1, "task 2": 1}
    for layer in found["layers"]:
        for task, experts in enumerate(chosen):
            load = layer["gates"]["load_by_task"][f"task {task}"]
            assert load == [1.0 if n in experts else 0.0 for n in range(10)]
        used = {n for experts in chosen for n in experts}
        assert layer["gates"]["dead_experts"] == [n for n in range(10) if n not in used]
    shown = headwater("inspect", tmp_path / "moe", "--text", tmp_path / "lines.txt").out
    best = sorted(n + 1 for n in chosen[0])
    assert f"{best[0]} (100%), {best[1]} (100%)" in shown
    done = headwater("inspect", tmp_path / "moe")
    assert "or --text FILE" in done.out


def test_inspect_a_plain_lora(headwater, trained, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(trained.parent / "model")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "lora")
    found = json.loads(headwater("inspect", tmp_path / "lora", "--json").out)
    assert (found["method"], found["parameters"], found["layers"]) == ("lora", 2 * 2 * (32 + 32), [])
    assert headwater("inspect", tmp_path / "lora").code == 0


def test_methods_as_json(headwater):
    found = json.loads(headwater("methods", "--json").out)
    keys = ["name", "title", "paper", "family", "config", "peft_type", "needs_task_ids", "mergeable"]
    assert all(list(method) == keys for method in found)
    by_name = {method["name"]: method for method in found}
    assert by_name["rlora"]["config"] == "RLoraConfig"
    assert by_name["rlora"]["peft_type"] == "RLORA"
    assert by_name["rlora"]["paper"] == "arXiv:2502.15455"
    table = headwater("methods").out
    assert all(name in table for name in by_name)


def test_data_check_counts_and_warns(headwater, tmp_path):
    run_file = write_run(tmp_path)
    test = run_file.with_name("animals-test.jsonl")
    train = run_file.with_name("animals-train.jsonl").read_text().splitlines()
    test.write_text(test.read_text() + train[0] + "\n")
    found = json.loads(headwater("data", "check", run_file, "--json").out)
    assert [task["splits"]["train"]["rows"] for task in found] == [24, 24]
    assert [task["splits"]["test"]["rows"] for task in found] == [9, 8]
    assert [task["overlap"] for task in found] == [1, 0]
    shown = headwater("data", "check", run_file).out
    assert "animals" in next(line for line in shown.splitlines() if "1 of 9 test rows" in line)


def test_the_threads_setting_and_the_help_of_every_command(headwater, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    shown = headwater("--help").out
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    for command in headwater_commands():
        assert command[-1] in shown or len(command) > 1
        assert headwater(*command, "--help").code == 0
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    headwater("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def headwater_commands():
    names = [[c.name or c.callback.__name__] for c in app.registered_commands]
    return [*names, ["data", "check"]]
