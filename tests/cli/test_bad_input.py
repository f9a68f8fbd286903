"""Whatever is wrong with the input: exit code 2, one screen, no traceback, and what to do."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
from cli_support import headwater_process, run_main, write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def headwater(capsys):
    return functools.partial(run_main, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_run(folder)
    return folder


@pytest.fixture
def run_file(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace(str(made), str(tmp_path)))
    return path


def refused(done, *texts, lines=24):
    """The command ended with 2 and said all of `texts` on one screen of standard error, or in so many lines."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) <= lines
    for text in texts:
        assert str(text) in done.err
    return done


def test_missing_file(headwater, tmp_path):
    refused(headwater("train", tmp_path / "none.yaml"), f"{tmp_path}/none.yaml: there is no such file")


def test_missing_data_file_names_the_line_of_the_config(headwater, run_file):
    for command in (["train"], ["data", "check"]):
        done = headwater(*command, run_file, "--set", "tasks.1.train=nowhere.jsonl")
        refused(done, "--set tasks.1.train: nowhere.jsonl: no such file")
    run_file.with_name("animals-test.jsonl").unlink()
    refused(headwater("train", run_file), f"{run_file}:4: tasks[0].test: animals-test.jsonl: no such file")


def test_malformed_rows_of_all_tasks_in_one_go(run_file):
    """The real command, since this is what people meet first."""
    bad = run_file.with_name("animals-train.jsonl")
    bad.write_text('{"prompt": "a", "completion": " cat"}\n{"prompt": "b", \n{"prompt": "c"}\n')
    run_file.with_name("colours-train.jsonl").write_text("[1]\n")
    done = headwater_process("data", "check", "run.yaml", cwd=run_file.parent)
    refused(done, "animals-train.jsonl:2", "animals-train.jsonl:3", "completion", "colours-train.jsonl:1")
    assert done.out == ""
    assert done.err.startswith("error: ")  # and not with what libraries say as they are imported


def test_empty_task(headwater, run_file):
    run_file.with_name("colours-train.jsonl").write_text("\n")
    refused(headwater("train", run_file), f"{run_file}:5: tasks[1].train: colours-train.jsonl: has no rows", "colours")


def test_unknown_key_names_the_nearest(headwater, run_file):
    run_file.write_text(run_file.read_text().replace("max_steps", "max_stepz").replace("num_heads", "num_head"))
    refused(
        headwater("train", run_file),
        f"{run_file}:6: training.max_stepz: unknown key `max_stepz`\n    did you mean `max_steps`?",
        f"{run_file}:2: method.num_head: unknown key `num_head`\n    did you mean `num_heads`?",
    )


@pytest.mark.parametrize(("method", "page"), [("moe_lora", "methods/moe_lora.md"), ("lora", "config.md")])
def test_an_unknown_key_of_a_method_names_the_page_of_its_keys(headwater, run_file, method, page):
    done = headwater("train", run_file, "--set", f"method={{name: {method}, width: 8}}")
    refused(done, f"--set method: method.width: unknown key `width`\n    docs/{page} lists all keys")
    assert (ROOT / "docs" / page).is_file()


def test_unknown_method(headwater, run_file):
    refused(
        headwater("train", run_file, "--set", "method.name=rloar"), "unknown method `rloar`", "did you mean `rlora`?"
    )


@pytest.mark.parametrize("method", ["rlora", "lora"])
def test_target_module_not_found_lists_those_that_exist(headwater, run_file, method):
    done = headwater("train", run_file, "--set", f"method={{name: {method}, target_modules: [query, fc1]}}")
    names = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    refused(done, "--set method: method.target_modules: no layer of", "'fc1' or 'query'", names)
    assert "lm_head" not in done.err


@pytest.mark.parametrize("method", ["rlora", "lora"])
def test_an_expression_that_no_layer_matches(headwater, run_file, method):
    done = headwater("train", run_file, "--set", f"method={{name: {method}, target_modules: '.*query'}}")
    refused(done, "--set method: method.target_modules: no layer of", "matches '.*query'", "q_proj, k_proj")


def test_no_heads(headwater, run_file):
    refused(headwater("train", run_file, "--set", "method.num_heads=0"), "num_heads must be at least 1, not 0")


def test_rank_larger_than_the_layer(headwater, run_file):
    done = headwater("train", run_file, "--set", "method.r=64")
    refused(done, "--set method.r: rank 64 is larger than layer model.layers.0.mlp.up_proj", "use r <= 32")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(headwater, run_file):
    settings = ["training.learning_rate=1e38", "training.max_grad_norm=0", "training.save_steps=1"]
    settings += ["training.warmup_steps=0", "method.init_seed=1"]
    done = headwater("train", run_file, *(part for s in settings for part in ("--set", s)))
    refused(done, "step 2", "animals", "non-finite", "checkpoint-1")
    assert (run_file.parent / "run" / "checkpoint-1" / "adapter_model.safetensors").is_file()


def test_a_folder_that_holds_a_run(headwater, run_file):
    (run_file.parent / "run" / "adapter").mkdir(parents=True)
    refused(headwater("train", run_file), f"{run_file}:7: output_dir", "holds a run already")


def test_no_such_model(headwater, run_file):
    done = headwater("train", run_file, "--set", "model_name_or_path=./no/model")
    refused(done, "--set model_name_or_path: ./no/model: no such file or folder")
    run_file.with_name("model").joinpath("config.json").unlink()
    refused(headwater("train", run_file), f"{run_file}:1: model_name_or_path: {run_file.parent}/model: no config.json")


def test_training_keys_out_of_range(headwater, run_file):
    keys = dict.fromkeys(("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"), 0)
    keys |= dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers", "eval_steps"), -1
    )
    overrides = [part for key, value in keys.items() for part in ("--set", f"training.{key}={value}")]
    refused(headwater("train", run_file, *overrides), *(f"--set training.{key}: {key} is at least" for key in keys))
    done = headwater("train", run_file, "--set", "training.learning_rate=.nan")
    refused(done, "--set training.learning_rate: learning_rate is at least 0, not nan")
    done = headwater("train", run_file, "--set", "training={num_train_epochs: 0}")
    refused(done, "--set training: training.num_train_epochs: num_train_epochs is above 0, not 0")
    overrides = ("--set", "training.adam_beta1=1", "--set", "training.num_train_epochs=.inf")
    refused(headwater("train", run_file, *overrides), "adam_beta1 is below 1, not 1", "num_train_epochs is finite")


def test_an_optimizer_or_schedule_that_cannot_be_made_replaces_no_run(headwater, run_file):
    (run_file.parent / "run" / "adapter").mkdir(parents=True)
    over = ("--set", "training.overwrite_output_dir=true")
    done = headwater("train", run_file, *over, "--set", "training.optim=galore_adamw")
    refused(done, "--set training.optim: ", "galore")
    done = headwater("train", run_file, *over, "--set", "training.lr_scheduler_kwargs={foo: 1}")
    refused(done, "training.lr_scheduler_type: ", "unexpected keyword argument 'foo'")
    polynomial = ("--set", "training.lr_scheduler_type=polynomial", "--set", "training.lr_scheduler_kwargs={power: a}")
    refused(headwater("train", run_file, *over, *polynomial), "training.lr_scheduler_type: ", "unsupported operand")
    assert (run_file.parent / "run" / "adapter").is_dir()


def test_what_is_not_installed(headwater, run_file, monkeypatch):
    def missing(*args):
        raise ModuleNotFoundError("deepspeed is not installed")

    monkeypatch.setattr("transformers.training_args.TrainingArguments.__post_init__", missing)
    done = headwater("train", run_file, "--set", "training.deepspeed=ds.json")
    refused(done, f"{run_file}:6: training: deepspeed is not installed")


def test_trackers_that_are_not_there(headwater, run_file):
    done = headwater("train", run_file, "--set", "training.report_to=[tensorbord, swanlab]")
    refused(done, "--set training.report_to: unknown tracker 'tensorbord'", "report_to: swanlab is not installed")


def test_what_torch_compile_does_not_know(headwater, run_file):
    backend, mode = "training.torch_compile_backend=inducter", "training.torch_compile_mode=fast"
    done = headwater("train", run_file, "--set", backend, "--set", mode)
    refused(done, "training.torch_compile_backend: unknown backend 'inducter'", "one of: cudagraphs, inductor")
    refused(done, "training.torch_compile_mode: unknown mode 'fast'", "max-autotune")
    assert not (run_file.parent / "run").exists()


def test_no_task_to_train_on(headwater, run_file):
    run_file.write_text(re.sub(r"train: \S+ ", "", run_file.read_text()))
    refused(headwater("train", run_file), f"{run_file}:3: tasks: no task has training rows")


def test_a_file_in_another_encoding(headwater, run_file):
    run_file.write_bytes(run_file.read_bytes().replace(b"colours,", b"f\xe4rben,"))
    refused(headwater("train", run_file), f"{run_file}:5: the file is not UTF-8 text\n    save it as UTF-8")


def test_all_problems_of_a_file_are_named(headwater, run_file):
    run_file.write_text(run_file.read_text() + "".join(f"nonsense{i}: 1\n" for i in range(50)))
    refused(headwater("train", run_file), *(f"unknown key `nonsense{i}`" for i in range(50)), lines=100)


def test_data_check_names_every_row_and_train_says_how_to_see_them(headwater, run_file):
    for name in ("animals-train", "colours-train"):
        run_file.with_name(f"{name}.jsonl").write_text('{"prompt": "x"}\n' * 30)
    every = [f"{name}-train.jsonl:{line}:" for name in ("animals", "colours") for line in range(1, 31)]
    refused(headwater("data", "check", run_file), *every, lines=61)
    done = refused(headwater("train", run_file), "animals-train.jsonl: and 20 more problems")
    assert done.err.count("`headwater data check FILE` names them all") == 1


def test_two_tasks_of_one_name(headwater, run_file):
    run_file.write_text(run_file.read_text().replace("name: colours", "name: animals"))
    refused(headwater("train", run_file), f"error: {run_file}:5: tasks[1].name: 2 tasks are called 'animals'")


def test_a_folder_in_the_place_of_the_file(headwater, run_file):
    folder = run_file.parent
    refused(headwater("train", folder), f"{folder}: this is a folder", "YAML files there: run.yaml")


@pytest.mark.parametrize("where", ["run.yaml", "run.yaml/below", "/proc/headwater", "n" * 300, "a/" + "n" * 300])
def test_an_output_folder_that_cannot_be(headwater, run_file, where):
    for command in (["train", run_file], ["compare", run_file, "--methods", "lora,rlora"], ["advise", run_file]):
        done = headwater(*command, "--set", f"output_dir={run_file.parent / where}")
        refused(done, "--set output_dir: ", where, "choose another folder")
    for checkpoint, said in (("true", "there is no checkpoint in"), ("none", "none is no checkpoint folder")):
        resume = ["--set", f"training.resume_from_checkpoint={checkpoint}"]
        refused(headwater("train", run_file, "--set", f"output_dir={run_file.parent / where}", *resume), said)


def test_names_of_300_characters(headwater, run_file):
    name = "n" * 300
    refused(headwater("train", run_file, "--set", f"model_name_or_path=./{name}"), "no such file or folder")
    done = headwater("train", run_file, "--set", f"tasks.0.train={name}.jsonl")
    refused(done, f"--set tasks.0.train: {name}.jsonl: ")


def test_a_home_folder_that_nobody_has(headwater, run_file, monkeypatch):
    said = "no home folder is known for `~nouser9`"
    for key in ("model_name_or_path", "tasks.0.train", "output_dir"):
        refused(headwater("train", run_file, "--set", f"{key}=~nouser9/m"), f"--set {key}: ", said)
    done = headwater("subspace", "--model", "~nouser9/m", "--output", run_file.parent / "s.safetensors")
    refused(done, f"error: ~nouser9/m: {said}")
    refused(headwater("demo", "--output-dir", "~nouser9/m"), said)
    monkeypatch.setenv("HEADWATER_CACHE", "~nouser9/cache")
    refused(headwater("demo"), f"HEADWATER_CACHE: {said}")


def test_seeds_that_are_none(headwater, run_file):
    said = "from 0 to 2**32 - 1"
    for command in ("compare", "advise"):
        done = headwater(command, run_file, "--seeds", "0,4294967296")
        refused(done, "--seeds", f"{said}, not 4294967296")
    for seed in ("-1", "99999999999999999999"):
        done = headwater("generate", run_file.parent, "-p", "x", "--seed", seed)
        refused(done, f"--seed: should be {said}, not {seed}")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("lr", "learning_rate"), ("epochs", "num_train_epochs")],
)
def test_a_key_as_others_call_it(headwater, run_file, key, nearest):
    refused(headwater("train", run_file, "--set", f"training.{key}=3"), f"did you mean `{nearest}`?")


def test_a_resume_with_other_settings_names_the_place(headwater, run_file):
    assert headwater("train", run_file).code == 0
    resume = ["--set", "training.resume_from_checkpoint=true"]
    run_file.write_text(run_file.read_text().replace("num_heads: 2", "num_heads: 3"))
    done = headwater("train", run_file, *resume, "--set", "training.learning_rate=0.5")
    refused(
        done,
        f"{run_file}:2: method.num_heads: the checkpoint was trained with rlora num_heads 2, this run has rlora num_he",
        "--set training.learning_rate: the checkpoint was trained with learning_rate 0.0002, this run has 0.5",
        "resume with the data and settings that the run began with",
    )


@pytest.mark.parametrize("command", ["evaluate", "inspect", "generate"])
def test_no_adapter(headwater, tmp_path, command):
    refused(headwater(command, tmp_path / "none"), "there is no such folder")
    refused(headwater(command, tmp_path), "there is no adapter in this folder")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "adapter_config.json").write_text("{}")
    refused(headwater(command, tmp_path), "the run did not finish; give one of its checkpoints: checkpoint-7")


def adapter(folder, model, **fields):
    folder.mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(model), "target_modules": ["q_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def test_broken_adapters(headwater, made, tmp_path):
    model = made / "model"
    folder = adapter(tmp_path / "a", model)
    refused(headwater("inspect", folder), "there is no adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    refused(headwater("inspect", folder), "the adapter cannot be loaded", folder)
    (folder / "adapter_config.json").write_text("{")
    refused(headwater("inspect", folder), "not readable as JSON")
    folder = adapter(tmp_path / "b", model, peft_type="SOMETHING")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    refused(headwater("inspect", folder), "unknown adapter type 'SOMETHING'")
    refused(headwater("inspect", adapter(tmp_path / "c", "")), "does not name its base model")
    refused(headwater("generate", adapter(tmp_path / "d", tmp_path / "gone"), "-p", "x"), "gone")


def test_an_adapter_alone_has_no_tasks(headwater, made, tmp_path):
    folder = adapter(tmp_path / "a", made / "model")
    refused(headwater("evaluate", folder), "give --tasks FILE, or the run folder")
    refused(headwater("generate", folder, "-p", "x", "--task", "animals"), "give the run folder")


def test_a_setting_in_an_adapter_that_cannot_be(headwater, run_file, tmp_path):
    folder = adapter(tmp_path / "alone", run_file.parent / "model", peft_type="RLORA", compensation="none")
    (folder / "adapter_model.safetensors").touch()
    said = f"error: {folder}: compensation: compensation is one of buffer"
    refused(headwater("inspect", folder), said)
    refused(headwater("generate", folder, "-p", "x"), said)


def run_of(run_file, folder):
    """A run folder as training leaves it, as far as scoring needs one."""
    folder.mkdir()
    adapter(folder / "adapter", run_file.parent / "model")
    shutil.copy(run_file, folder / "config.yaml")
    for name in run_file.parent.glob("*.jsonl"):
        shutil.copy(name, folder)
    return folder


def test_tasks_that_cannot_be_scored(headwater, run_file, tmp_path):
    run = run_of(run_file, tmp_path / "run")
    refused(headwater("evaluate", run, "--split", "tset"), "unknown split 'tset'", "test, validation, train")
    refused(headwater("evaluate", run, "--split", "validation"), "no task has validation rows")
    refused(headwater("evaluate", run, "--tasks", tmp_path / "none.yaml"), "none.yaml: there is no such file")
    refused(headwater("evaluate", run, "-o", tmp_path / "no" / "s.json"), "the folder of this file does not exist")
    refused(headwater("evaluate", run, "-o", tmp_path), f"--output {tmp_path}: this is a folder")
    refused(headwater("evaluate", run, "-o", "/proc/s.json"), "nothing can be written to the folder of this file")
    refused(headwater("generate", run, "-p", "x", "--task", "animal"), "unknown task `animal`", "animals, colours")


def test_overrides_that_scoring_has_no_use_for_are_refused(headwater, run_file, tmp_path):
    run = run_of(run_file, tmp_path / "run")
    wrong = ["method.r=99", "method={name: lora}", "seed=3", "training.learning_rate=1", "output_dir=x"]
    kept = ["training.use_cpu=true", "training={use_cpu: true}", "evaluation={batch_size: 2}", "model.dtype=float32"]
    options = [part for override in wrong for part in ("--set", override)]
    for more in ([], ["--tasks", run_file], ["--lm-eval", "bbh", "--set", "data.max_length=9"]):
        where = [*wrong, *more[3:]]
        refused(headwater("evaluate", run, *options, *more), *(f"--set {one}: this has no effect" for one in where))
    options = [part for override in kept for part in ("--set", override)]
    for more in ([], ["--tasks", run_file]):
        refused(headwater("evaluate", run, *options, "--split", "validation", *more), "no task has validation rows")
    refused(headwater("evaluate", run, "--set", "evaluatoin.batch_size=2"), "did you mean `evaluation`?")
    alone = adapter(tmp_path / "alone", run_file.parent / "model")
    done = headwater("evaluate", alone, "--lm-eval", "bbh", "--set", "evaluation.batch_size=2")
    refused(done, "the adapter alone has no config to override")


@pytest.mark.parametrize(
    "options",
    [
        ["--num-fewshot", 0, "--limit", 5, "--task", "animals", "--chat", "--include-path", "."],
        ["--lm-eval", "bbh", "--tasks", "tasks.yaml", "--split", "test"],
    ],
)
def test_options_of_another_kind_of_evaluation_are_refused(headwater, tmp_path, options):
    done = headwater("evaluate", tmp_path, *options)
    wanted = [option for option in options if str(option).startswith("--") and option != "--lm-eval"]
    refused(done, *(f"{option}: the option does not apply here" for option in wanted))


def test_wrong_arguments(headwater):
    assert headwater("trian").code == 2
    assert headwater("train").code == 2
    assert headwater("generate", "x", "--temperature", "-1").code == 2


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    from headwater.cli import main
    from headwater.errors import HeadwaterError

    monkeypatch.setenv("HEADWATER_DEBUG", "1")
    with pytest.raises(HeadwaterError):
        main(["train", str(tmp_path / "none.yaml")])
