"""What a file's `compare:` section and the command line make of its methods, and what they refuse."""

from __future__ import annotations

import functools
import re
import shutil
import sys
from pathlib import Path

import pytest
from comparing import FILE, plan_of, write_file

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from cli_support import run_main

from headwater.compare.plan import choose, make_plan
from headwater.config import load_config
from headwater.errors import HeadwaterError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("plan"))


def methods(value):
    return f"compare.methods={value}"


def test_a_method_takes_the_files_fields_that_it_has(path):
    plan = plan_of(
        path,
        "method={name: rlora, r: 4, num_heads: 2, init: official_intended, target_modules: [up_proj]}",
        methods("[rlora, hydralora, lora, {label: own, method: {name: rlora, num_heads: 3, init: paper}}]"),
        "compare.tolerance=0.9",
    )
    sections = [planned.config.method for planned in plan.methods]
    assert [s["name"] for s in sections] == ["rlora", "hydralora", "lora", "rlora"]
    assert [s.get("num_heads") for s in sections] == [2, 2, None, 3]
    assert [s.get("init") for s in sections] == ["official_intended", None, None, "paper"]
    assert all(s["target_modules"] == ["up_proj"] for s in sections)
    assert [planned.label for planned in plan.methods] == ["rlora", "hydralora", "lora", "own"]


def test_a_method_changes_training_alignment_and_what_it_is_trained_on(path):
    plan = plan_of(
        path,
        "align={kind: kl, weight: 0.5}",
        "mixture={strategy: uniform}",
        methods(
            "[lora, {label: slow, method: lora, training: {learning_rate: 1e-3}, align: null},"
            " {label: mmd, method: lora, align: {kind: mmd}, mixture: {batching: balanced}},"
            " {label: one, method: lora, train_on: [colours]}]"
        ),
    )
    first, slow, mmd, one = (planned.config for planned in plan.methods)
    assert (first.training["learning_rate"], slow.training["learning_rate"]) == (2e-1, 1e-3)
    assert slow.training["max_steps"] == 4
    assert (first.align.weight, slow.align, mmd.align.kind) == (0.5, None, "mmd")
    assert [(c.mixture.strategy, c.mixture.batching) for c in (first, mmd)] == [
        ("uniform", "mixed"),
        ("uniform", "balanced"),
    ]
    assert [task.train is None for task in one.tasks] == [True, False]
    assert [task.test for task in one.tasks] == [task.test for task in first.tasks]


def test_parameters_are_the_first_methods_or_a_given_number(path):
    plan = plan_of(path)
    assert plan.budget == plan.methods[0].parameters
    assert plan.methods[0].field == ""  # it is as given
    assert plan.methods[1].field == "r"
    given = plan_of(path, "compare.parameters=4000")
    assert given.budget == 4000
    assert [planned.field for planned in given.methods] == ["r", "r"]
    assert all(abs(given.deviation(planned)) < 0.25 for planned in given.methods)
    heads = plan_of(path, "compare.match=heads", "compare.parameters=4000")
    assert [planned.field for planned in heads.methods] == ["r", "num_heads"]


def test_nothing_is_matched_where_none_is_asked_for(path):
    plan = plan_of(path, "compare.match=none")
    assert plan.budget is None
    assert [planned.config.method["r"] for planned in plan.methods] == [4, 4]
    own = plan_of(path, methods("[lora, {method: hydralora, match: none}, {label: b, method: hydralora}]"))
    assert [planned.field for planned in own.methods] == ["", "", "r"]


@pytest.mark.parametrize(
    ("methods", "measure"),
    [
        ("[lora, hydralora, {label: again, method: hydralora}]", 1),
        ("[{method: {name: lora, r: 5}}, hydralora]", 0),
        ("[lora, {method: {name: hydralora, num_heads: 3}}]", 0),
        ("[lora, rlora]", 0),
    ],
)
def test_the_size_is_that_of_the_files_own_method_where_it_is_compared(tmp_path, methods, measure):
    path = write_file(tmp_path)
    own = "method={name: hydralora, r: 4, num_heads: 2, target_modules: [up_proj, down_proj]}"
    plan = plan_of(path, own, f"compare.methods={methods}", "compare.tolerance=1")
    assert [p.field for p in plan.methods] == ["" if i == measure else "r" for i in range(len(plan.methods))]
    assert plan.budget == plan.methods[measure].parameters


def test_a_single_run_does_not_look_at_the_section(path):
    config = load_config(path)
    assert config.compare is not None
    assert config.method["name"] == "lora"


def test_the_command_line_chooses_by_label_or_method(path, capsys):
    headwater = functools.partial(run_main, capsys, "compare", path, "--dry-run")
    shown = headwater("--methods", "heads,mlora,lora", "--parameters", "4000")
    assert shown.code == 0
    lines = [line.split() for line in shown.out.splitlines()]
    assert [line[:2] for line in lines if len(line) > 3 and line[0] in ("heads", "mlora", "lora")] == [
        ["heads", "hydralora"],
        ["mlora", "mlora"],
        ["lora", "lora"],
    ]
    assert not (path.parent / "out").exists()


def test_a_method_without_a_name_is_chosen_by_that_of_the_files_method(path):
    config = load_config(path, [methods("[{training: {learning_rate: 1e-3}}, hydralora]")])
    (planned,) = make_plan(choose(config, ["lora"], {})).methods
    assert (planned.label, planned.config.training["learning_rate"]) == ("lora", 1e-3)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((methods("[lora, loar]"),), ["unknown method `loar`", "did you mean"]),
        ((methods("[lora, lora]"),), ["two methods are called lora", "label"]),
        ((methods("[{label: figures, method: lora}]"),), ["taken by a folder"]),
        ((methods("[{label: a/b, method: lora}]"),), ["label"]),
        ((methods("[{method: lora, trainnig: {}}]"),), ["unknown key `trainnig`", "did you mean `training`"]),
        ((methods("[{method: {name: rlora, num_haeds: 3}}]"),), ["num_haeds", "did you mean `num_heads`"]),
        ((methods("[{method: {name: rlora, num_heads: 0}}]"),), ["num_heads must be at least 1"]),
        ((methods("[{method: lora, training: {max_stepz: 3}}]"),), ["did you mean `max_steps`"]),
        ((methods("[{method: lora, train_on: [cats]}]"),), ["no task is called cats", "animals, colours"]),
        (
            (methods("[lora, {method: hydralora, match: lora_alpha}]"),),
            ["compare.methods[1].match", "no field 'lora_alpha'"],
        ),
        (
            (
                methods(
                    "[lora, {label: a, method: lora, align: {kind: kl}, training: {per_device_train_batch_size: 2}}]"
                ),
            ),
            ["per_device_train_batch_size", "alignment loss compares tasks", "at least 4 rows"],
        ),
        (("compare.seeds=[0, 1, 0]",), ["compare.seeds", "0 is given more than once"]),
        (("compare.seeds=[0.5]",), ["compare.seeds", "valid integer"]),
        (("compare.seeds=[]",), ["compare.seeds"]),
        (("compare.seeds=[-1]",), ["compare.seeds"]),
        (("compare.learning_rate=[1e-3, 0]",), ["compare.learning_rate", "greater than 0"]),
        (("compare.learning_rate=[1e-3]", "compare.seeds=[1000]"), ["selection_seed 1000 is one of seeds"]),
        (("compare.match=rnak",), ["compare.match", "'rank', 'heads' or 'none'"]),
        (("compare.parameters=100",), ["cannot have 100 trainable parameters", "nearest is", "tolerance"]),
        (("compare.parameters=10000000000",), ["cannot have 10,000,000,000 trainable parameters", "(-"]),
        (("training.overwrite_output_dir=true",), ["overwrite_output_dir has no say in a comparison"]),
        (("compare.methods=[]",), ["there is nothing to compare"]),
    ],
)
def test_what_is_wrong_is_said(path, overrides, said):
    with pytest.raises(HeadwaterError) as caught:
        plan_of(path, *overrides)
    for text in said:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("lora", "change its other fields, choose a larger number"),
        ("rlora", "solve for another (match: num_heads), choose"),
        ("moe_lora", "solve for another (match: num_experts), choose"),
    ],
)
def test_only_fields_that_a_method_has_are_advised(path, method, advice):
    with pytest.raises(HeadwaterError) as caught:
        plan_of(path, methods(f"[{{label: x, method: {method}, match: rank}}]"), "compare.parameters=100")
    assert advice in str(caught.value)


def test_problems_have_the_line_of_the_method_that_has_them(tmp_path):
    lines = FILE.replace("  methods: [lora, {{label: heads, method: {{name: hydralora, num_heads: 2}}}}]\n", (
        "  methods:\n    - lora\n    - label: heads\n      method:\n        name: hydralora\n        num_heads: 0\n"
        "    - method: {{name: rlora, gamma: -1}}\n"
    ))  # fmt: skip
    path = write_file(tmp_path, lines)
    number = {line.strip(): n for n, line in enumerate(path.read_text().splitlines(), 1)}
    with pytest.raises(HeadwaterError) as caught:
        make_plan(load_config(path))
    heads, gamma = (problem.where for problem in caught.value.problems)
    assert heads == f"{path}:{number['num_heads: 0']}: method.num_heads"
    assert gamma == f"{path}:{number['- method: {name: rlora, gamma: -1}']}: method.gamma"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "lora,rlroa"], ["--methods", "`rlroa` is neither", "did you mean `rlora`"]),
        (["--methods", "lora", "--seeds", "0,1,1"], ["--seeds", "1 is given more than once"]),
        (["--methods", "lora", "--seeds", "0,x"], ["--seeds", "valid integer"]),
        (["--match", "ranks"], ["--match", "'rank', 'heads' or 'none'"]),
        (["--parameters", "7"], ["cannot have 7 trainable parameters"]),
        (["--set", "method.target_modules=[nope]"], ["no layer of", "up_proj"]),
    ],
)
def test_what_is_wrong_with_the_options_is_said_without_a_traceback(path, capsys, arguments, said):
    done = run_main(capsys, "compare", path, *arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    for text in said:
        assert text in done.err
    assert not (path.parent / "out").exists()


def test_the_documented_file_is_accepted(path):
    text = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    model = load_config(path).model_name_or_path
    (path.parent / "documented.yaml").write_text(yaml.replace("HuggingFaceTB/SmolLM2-135M-Instruct", model))
    for name in ("reviews", "reviews_test", "support", "support_test"):
        shutil.copy(path.parent / "animals-train.jsonl", path.parent / f"{name}.jsonl")
    plan = plan_of(path.parent / "documented.yaml", "compare.tolerance=0.1")
    assert [planned.label for planned in plan.methods] == ["lora", "hydralora", "hydralora+init", "rlora", "lora+align"]
    assert [len(planned.learning_rates) for planned in plan.methods] == [3, 0, 3, 3, 3]
    assert plan.methods[4].config.align.weight == 0.1
    assert plan.methods[0].config.align is None
