"""A run's file: what is accepted, and what is said about everything that is not."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from headwater.config import (
    RECOMMENDED,
    RECOMMENDED_LEARNING_RATE,
    RunConfig,
    TasksFile,
    changed,
    dump_config,
    load_config,
)
from headwater.errors import HeadwaterError
from headwater.generate.spec import MetaConfig
from headwater.methods import methods
from headwater.preference.spec import PreferConfig

GOOD = """\
model_name_or_path: some/model
method: {name: rlora, r: 8, num_heads: 3, lora_alpha: 16, target_modules: [gate_proj, up_proj]}
tasks:
  - {name: a, train: a/train.jsonl, test: a/test.jsonl, metric: choice_accuracy}
  - name: b
    train: b.jsonl
    weight: 2
mixture: {strategy: temperature, temperature: 2.0}
training:
  max_steps: 400
  learning_rate: 2e-4
output_dir: runs/first
"""


GOOD_FIELDS = {"model_name_or_path": "m", "tasks": [{"name": "a", "train": "a.jsonl"}], "output_dir": "o"}


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def problems_of(path, overrides=(), **options):
    with pytest.raises(HeadwaterError) as caught:
        load_config(path, overrides, **options)
    return {problem.where.removeprefix(str(path)): problem for problem in caught.value.problems}


def test_an_unknown_key_of_a_method_hides_nothing_else_and_names_and_texts_are_explained(tmp_path):
    path = write(tmp_path, GOOD)
    overrides = ["method.rnk=3", "method.r=0", "method.num_heads=0", "tasks.0.name=a b", "tasks.1.prompt={text}"]
    found = problems_of(path, [*overrides, "compare.methods=[{label: a/b, method: lora}]"])
    assert set(found) == {f"--set {o.partition('=')[0]}" for o in overrides} | {
        "--set compare.methods: compare.methods[0].label"
    }
    assert "at least 1" in found["--set method.r"].what
    name = "should begin with a letter or a digit and hold only letters, digits, `.`, `_`"
    assert found["--set tasks.0.name"].what == f"{name} and `-`, not 'a b'"
    assert found["--set compare.methods: compare.methods[0].label"].what == f"{name}, `+` and `-`, not 'a/b'"
    assert found["--set tasks.1.prompt"].fix == "a text that begins with { or [ needs quotes"


def test_a_good_file(tmp_path):
    path = write(tmp_path, GOOD)
    config = load_config(path, ["training.max_steps=3", "tasks.0.weight=.5", "seed=7"])
    assert config.base_dir == tmp_path
    assert config.method == {
        "name": "rlora",
        "r": 8,
        "num_heads": 3,
        "lora_alpha": 16,
        "target_modules": ["gate_proj", "up_proj"],
    }
    assert config.training == {"max_steps": 3, "learning_rate": 2e-4}
    assert [(t.name, t.weight) for t in config.tasks] == [("a", 0.5), ("b", 2.0)]
    assert config.seed == 7
    assert config.where("tasks", 1, "train") == f"{path}:6: tasks[1].train"
    assert config.where("seed") == "--set seed"


@pytest.mark.parametrize("rate", [None, 3e-4])
def test_a_file_without_a_method_gets_the_recommended_one(tmp_path, rate):
    kept = [line for line in GOOD.splitlines() if not line.startswith(("method", "  learning_rate"))]
    overrides = [] if rate is None else [f"training.learning_rate={rate}"]
    config = load_config(write(tmp_path, "\n".join(kept)), overrides)
    assert config.method == RECOMMENDED
    assert config.training == {"max_steps": 400, "learning_rate": rate or RECOMMENDED_LEARNING_RATE}
    again = load_config(write(tmp_path, dump_config(config), "again.yaml"))
    assert (again.method, again.training) == (config.method, config.training)
    other = changed(config, {"method": {"name": "lora"}}, {})
    assert other.method == {"name": "lora"}
    named = {"training": {"max_steps": 2}, "method": {"name": "rlora"}}
    assert RunConfig(**GOOD_FIELDS, **named).training == {"max_steps": 2}


def test_fields_without_a_name_change_the_recommended_method(tmp_path):
    kept = [line for line in GOOD.splitlines() if not line.startswith(("method", "  learning_rate"))]
    config = load_config(write(tmp_path, "\n".join(kept)), ["method.r=16"])
    assert config.method == {**RECOMMENDED, "r": 16}
    assert config.training["learning_rate"] == RECOMMENDED_LEARNING_RATE
    assert config.recommended
    again = load_config(write(tmp_path, dump_config(config), "again.yaml"))
    assert (again.method, again.training, again.recommended) == (config.method, config.training, False)
    other = load_config(write(tmp_path, "\n".join(kept)), ["method={name: mlora, r: 16}"])
    assert (other.method, other.recommended) == ({"name": "mlora", "r": 16}, False)
    assert "learning_rate" not in other.training


def test_a_run_made_in_python_has_the_same_checks():
    fields = GOOD_FIELDS
    assert RunConfig(**fields, method={}).method == RECOMMENDED
    assert RunConfig(**fields).base_dir == Path.cwd()
    with pytest.raises(ValueError, match="max_stepz"):
        RunConfig(**fields, training={"max_stepz": 1})
    with pytest.raises(ValueError, match="num_heads must be at least 1"):
        RunConfig(**fields, method={"num_heads": 0})


def test_all_errors_of_a_file_come_together_each_in_its_place(tmp_path):
    path = write(
        tmp_path,
        """\
model_name_or_path: some/model
modle: {dtype: float32}
model:
  dtype: f32
method: {name: rlora, r: eight, num_headz: 3}
tasks:
  - {name: a, train: a.jsonl, metrik: loss}
  - train: b.jsonl
    weight: -1
mixture: {strategy: temprature}
data:
  max_len: 5
training:
  max_stepz: 4
  seed: 3
  eval_strategy: epochs
  report_to: 3
evaluation: {batch_sise: 3}
learning_rate: 3
zzz: 1
""",
    )
    found = problems_of(path, ["training.logging_steps=many", "tasks.5.weight=1"])
    said = {where: (problem.what, problem.fix) for where, problem in found.items()}
    assert said.pop(":20: zzz")[1].startswith("known here: model_name_or_path, ")
    expected = {
        ":1: output_dir": ("`output_dir` is missing", ""),
        ":2: modle": ("unknown key `modle`", "did you mean `model`?"),
        ":4: model.dtype": ("should be 'auto', 'float32', 'bfloat16' or 'float16', not 'f32'", ""),
        ":5: method.num_headz": ("unknown key `num_headz`", "did you mean `num_heads`?"),
        ":5: method.r": ("should be a valid integer, not 'eight'", ""),
        ":7: tasks[0].metrik": ("unknown key `metrik`", "did you mean `metric`?"),
        ":8: tasks[1].name": ("`name` is missing", ""),
        ":9: tasks[1].weight": ("should be greater than 0, not -1", ""),
        ":10: mixture.strategy": (
            "should be 'proportional', 'temperature', 'uniform' or 'weights', not 'temprature'",
            "",
        ),
        ":12: data.max_len": ("unknown key `max_len`", "did you mean `max_length`?"),
        ":14: training.max_stepz": ("unknown key `max_stepz`", "did you mean `max_steps`?"),
        ":15: training.seed": ("`seed` does not stand under training", "move `seed` to the top of the file"),
        ":16: training.eval_strategy": ("should be 'no', 'steps' or 'epoch', not 'epochs'", ""),
        ":17: training.report_to": ("should be a valid string or a valid list, not 3", ""),
        ":18: evaluation.batch_sise": ("unknown key `batch_sise`", "did you mean `batch_size`?"),
        ":19: learning_rate": ("unknown key `learning_rate`", "write it under training: as training.learning_rate"),
        "--set training.logging_steps": ("should be a valid number, not 'many'", ""),
        "--set tasks.5.weight": ("tasks holds 2 items, so '5' is no position in it", "count from 0"),
    }
    assert list(said.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("override", "where", "what"),
    [
        ("method={name: rloora}", "--set method: method.name", "unknown method `rloora`"),
        ("method.name=hydra_lora", "--set method.name", "unknown method `hydra_lora`"),
        ("method.name=[rlora]", "--set method.name", "unknown method `['rlora']`"),
        ("method=rlora", "--set method", "should be a mapping with a `name`"),
        ("method.num_heads=0", "--set method.num_heads", "num_heads must be at least 1, not 0"),
        ("method.r=0", "--set method.r", "r must be at least 1, not 0"),
        ("method.init=papr", "--set method.init", "init is one of paper,"),
        ("method.target_modules=3", "--set method.target_modules", "not 3"),
        ("method.peft_type=LORA", "--set method.peft_type", "unknown key `peft_type`"),
        ("training.loss_normalization=tokens", "--set training.loss_normalization", "not 'tokens'"),
        ("training.load_best_model_at_end=true", ":9: training", "save and eval strategy to match"),
        ("training=", "--set training", "should be a valid dictionary, not None"),
        ("mixture={batching: balanced, strategy: weights}", "--set mixture", "equal share"),
        ("tasks=[]", "--set tasks", "at least 1 item"),
        ("seed=-1", "--set seed", "should be from 0 to 2**32 - 1, not -1"),
        ("seed=4294967296", "--set seed", "should be from 0 to 2**32 - 1, not 4294967296"),
        ("compare={seeds: [0, 4294967296]}", "--set compare: compare.seeds[1]", "2**32 - 1, not 4294967296"),
        ("compare={selection_seed: 4294967296}", "--set compare: compare.selection_seed", "2**32 - 1, not 4294967296"),
        ("training.data_seed=4294967296", "--set training.data_seed", "2**32 - 1, not 4294967296"),
        ("output_dir=''", "--set output_dir", "at least 1 character"),
        ("tasks.0.name=a b", "--set tasks.0.name", "not 'a b'"),
        ("tasks.0.name=mean", "--set tasks.0.name", "no task can be called `mean`"),
        ("tasks.0.name=loss", "--set tasks.0.name", "no task can be called `loss`"),
        ("tasks.0.train=''", "--set tasks.0.train", "at least 1 character"),
        ("model_name_or_path=~nouser9/m", "--set model_name_or_path", "no home folder is known for `~nouser9`"),
        ("output_dir=~nouser9/x", "--set output_dir", "no home folder is known for `~nouser9`"),
        ("method={name: cora, basis: ~nouser9/b}", "--set method: method.basis", "no home folder is known"),
        ("training.log_level=chatty", "--set training.log_level", "unknown log_level 'chatty'"),
        ("training.log_level_replica=chatty", "--set training.log_level_replica", "unknown log_level_replica 'chatty'"),
        ("training.accelerator_config=no.json", "--set training.accelerator_config", "no.json: No such file"),
        ("training.accelerator_config={foo: 1}", ":9: training", "unexpected keyword argument 'foo'"),
        ("base_dir=x", "--set base_dir", "unknown key `base_dir`"),
    ],
)
def test_one_wrong_value(tmp_path, override, where, what):
    found = problems_of(write(tmp_path, GOOD), [override])
    assert list(found) == [where]
    assert what in found[where].what


def test_the_nearest_method_is_named(tmp_path):
    found = problems_of(write(tmp_path, GOOD), ["method={name: rlroa}"])
    assert found["--set method: method.name"].fix == "did you mean `rlora`?"
    found = problems_of(write(tmp_path, GOOD), ["method={name: zzz}"])
    known = found["--set method: method.name"].fix
    assert all(method.name in known for method in methods())


def test_unknown_keys_are_measured_against_the_chosen_method(tmp_path):
    found = problems_of(write(tmp_path, GOOD), ["method={name: lora, num_heads: 3, rank_patern: {}}"])
    assert found["--set method: method.num_heads"].what == "unknown key `num_heads`"
    assert found["--set method: method.rank_patern"].fix == "did you mean `rank_pattern`?"


@pytest.mark.parametrize("method", [*methods(), None], ids=lambda m: m.name if m else "lora")
def test_every_method_is_accepted_by_name(tmp_path, method):
    name = method.name if method else "lora"
    needed = ", basis: subspace.safetensors" if name == "cora" else ""
    config = load_config(write(tmp_path, GOOD), [f"method={{name: {name}, r: 16{needed}}}"])
    assert config.method.items() >= {"name": name, "r": 16}.items()


def test_methods_that_go_by_task_are_told_how_many_there_are(tmp_path):
    path = write(tmp_path, GOOD)
    assert load_config(path, ["method={name: mtl_lora}"]).method["num_tasks"] == 2
    assert load_config(path, ["method={name: mtl_lora, num_tasks: 5}"]).method["num_tasks"] == 5
    assert "num_tasks" not in load_config(path).method
    found = problems_of(path, ["method={name: mtl_lora, num_tasks: 1}"])
    assert found["--set method: method.num_tasks"].what == "num_tasks is 1, but there are 2 tasks"


def test_every_training_argument_is_a_key(tmp_path):
    path = write(tmp_path, GOOD)
    defaults = TrainingArguments(output_dir=str(tmp_path))
    for field in dataclasses.fields(TrainingArguments):
        if not field.init or field.name in ("output_dir", "seed"):
            continue
        value = getattr(defaults, field.name)
        if isinstance(value, bool | int | float | str) and not hasattr(value, "value"):
            config = load_config(
                path, ["training={}", f"training.{field.name}={yaml.safe_dump(value).splitlines()[0]}"]
            )
            assert config.training[field.name] == value, field.name


def test_liger_kernels_are_asked_for_where_they_are_installed(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD)
    for there in (True, False):
        monkeypatch.setattr("headwater.training.arguments.is_liger_kernel_available", lambda there=there: there)
        if there:
            assert load_config(path, ["training.use_liger_kernel=true"]).training["use_liger_kernel"] is True
    found = problems_of(path, ["training.use_liger_kernel=true"])
    assert found["--set training.use_liger_kernel"].what == "liger-kernel 0.3.0 or newer is not installed"
    assert load_config(path, ["training.use_liger_kernel=false"])


@pytest.mark.parametrize("kind", [RunConfig, PreferConfig, MetaConfig])
def test_the_output_folder_may_begin_with_the_home_folder(tmp_path, monkeypatch, kind):
    """transformers expands it, so that whoever reads the config must get the same folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    name = {PreferConfig: "prefer", MetaConfig: "meta"}.get(kind)
    path = Path(__file__).parents[2] / "examples" / f"{name}.yaml" if name else write(tmp_path, GOOD)
    config = load_config(path, ["output_dir=~/runs/a"], model=kind)
    assert config.output_dir == str(tmp_path / "runs" / "a")
    assert yaml.safe_load(dump_config(config))["output_dir"] == config.output_dir
    assert load_config(path, ["output_dir=runs/~a"], model=kind).output_dir == "runs/~a"


def test_words_that_yaml_once_took_for_booleans(tmp_path):
    config = load_config(write(tmp_path, GOOD), ["training.save_strategy=no", "training.bf16=false"])
    assert config.training["save_strategy"] == "no"
    assert config.training["bf16"] is False


def test_resume_takes_true_or_a_folder(tmp_path):
    path = write(tmp_path, GOOD)
    for text, value in (("true", True), ("runs/x/checkpoint-3", "runs/x/checkpoint-3")):
        key = "training.resume_from_checkpoint"
        assert load_config(path, [f"{key}={text}"]).training["resume_from_checkpoint"] == value


def test_dumped_text_is_complete_and_reads_back_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text("{}")
    (tmp_path / "weights").mkdir()
    config = load_config(write(tmp_path, GOOD), ["model_name_or_path=weights", "tasks.1.train=org/hub-name"])
    (tmp_path / "elsewhere").mkdir()
    again = load_config(write(tmp_path / "elsewhere", dump_config(config)))
    assert again.tasks[0].train == str(tmp_path / "a" / "train.jsonl")
    assert again.tasks[0].test == "a/test.jsonl"  # not there, so it may be a hub name
    assert again.tasks[1].train == "org/hub-name"
    assert again.model_name_or_path == str(tmp_path / "weights")
    assert again.output_dir == str(tmp_path / "runs" / "first")
    assert (again.method, again.training, again.mixture) == (config.method, config.training, config.mixture)
    assert dump_config(again) == dump_config(config)
    assert set(yaml.safe_load(dump_config(config))) == set(RunConfig.model_fields) - {"compare"}


def test_a_local_model_starts_from_the_files_folder_then_from_here(tmp_path, monkeypatch):
    here = tmp_path / "here"
    for folder in (tmp_path / "file" / "model", here / "model", here / "other"):
        folder.mkdir(parents=True)
    (tmp_path / "file" / "basis.safetensors").write_text("")
    monkeypatch.chdir(here)

    def named(name):
        return load_config(write(tmp_path / "file", GOOD.replace("some/model", name))).model_name_or_path

    assert named("model") == str(tmp_path / "file" / "model")
    assert named("other") == str(here / "other")
    assert named("org/name") == "org/name"
    assert RunConfig(**{**GOOD_FIELDS, "model_name_or_path": "model"}).model_name_or_path == str(here / "model")
    method = "{name: cora, r: 4, basis: basis.safetensors}"
    path = write(tmp_path / "file", re.sub("method: .*", f"method: {method}", GOOD))
    assert load_config(path).method["basis"] == str(tmp_path / "file" / "basis.safetensors")
    # what was typed here is meant from here
    assert load_config(path, ["model_name_or_path=model"]).model_name_or_path == str(here / "model")
    assert load_config(path, ["model_name_or_path=."]).model_name_or_path == str(here)
    (here / "basis.safetensors").write_text("")
    for override in (f"method={method}", "method.basis=basis.safetensors"):
        assert load_config(path, [override]).method["basis"] == str(here / "basis.safetensors")


def test_a_dumped_run_with_an_alignment_loss_still_leaves_its_batches_open(tmp_path):
    path = write(tmp_path, GOOD)
    open_ = load_config(write(tmp_path, dump_config(load_config(path, ["align={kind: kl}"])), "open.yaml"))
    assert open_.align.kind == "kl"
    assert "batching" not in open_.mixture.model_fields_set
    mixed = load_config(path, ["align={kind: kl}", "mixture.batching=mixed"])
    assert "batching" in load_config(write(tmp_path, dump_config(mixed), "mixed.yaml")).mixture.model_fields_set
    found = problems_of(path, ["align={kind: mmd, token_mode: per_position}"])
    assert list(found) == ["--set align: align.token_mode"]


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 64),
    rate=st.floats(1e-8, 1.0),
    weight=st.floats(1e-6, 1e6),
    modules=st.none() | st.just("all-linear") | st.lists(st.sampled_from(["up_proj", "no", "1e3", "q:v"]), min_size=1),
    strategy=st.sampled_from(["no", "steps", "epoch"]),
)
def test_values_survive_dump_and_load(tmp_path_factory, r, rate, weight, modules, strategy):
    config = RunConfig(
        model_name_or_path="m",
        method={"name": "rlora", "r": r, "target_modules": modules},
        tasks=[{"name": "a", "train": "a.jsonl", "weight": weight}],
        training={"learning_rate": rate, "save_strategy": strategy},
        output_dir="o",
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config))
    again = load_config(path)
    assert (again.method, again.training, again.tasks) == (config.method, config.training, config.tasks)


@pytest.mark.parametrize("name", ["prefer", "meta"])
def test_a_tasks_file_may_be_one_for_prefer_or_meta(name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.yaml"
    assert load_config(path, model=TasksFile).tasks
    with pytest.raises(HeadwaterError, match="unknown key `metta`"):
        load_config(path, ["metta=1"], model=TasksFile)


def test_a_tasks_file_needs_only_tasks(tmp_path):
    path = write(tmp_path, "tasks: [{name: a, test: a.jsonl}]\nevaluation: {batch_size: 2}\n")
    config = load_config(path, model=TasksFile)
    assert config.model_fields_set == {"tasks", "evaluation"}
    assert list(problems_of(path)) == [":1: model_name_or_path", ":1: output_dir"]
    assert list(problems_of(write(tmp_path, "taskz: []\n"), model=TasksFile)) == [":1: tasks", ":1: taskz"]
