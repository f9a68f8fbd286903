"""YAML with marks: values are YAML 1.2's, and every place is the true line."""

import math

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headwater.errors import HeadwaterError
from headwater.marked_yaml import apply_overrides, dump, field_name, parse_document, parse_value, read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E3", 1e3),
        ("-.5", -0.5),
        (".inf", math.inf),
        ("010", 10),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'7'", "7"),
        ("[a, 1]", ["a", 1]),
        ("{1: a}", {"1": "a"}),
        ("all-linear", "all-linear"),
    ],
)
def test_scalars(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


keys = st.text("abcdefgh_", min_size=1, max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


@settings(deadline=None)
@example({"a": "\x85", "b": ["\u2028", "\ufeff", "é"]})
@given(st.dictionaries(keys, values, min_size=1, max_size=4))
def test_what_is_dumped_is_read_back_and_every_place_is_its_line(data):
    text = dump(data)
    assert yaml.safe_load(text) == data
    document = parse_document(text, "f.yaml")
    assert document.data == data
    lines = text.splitlines()
    for key in data:
        place = document.where((key,))
        line = int(place.split(":")[1])
        # PyYAML writes keys that look like other types in quotes
        assert lines[line - 1].lstrip("'\"").startswith(key)
        assert place == f"f.yaml:{line}: {key}"


def test_brackets_without_end_are_an_error():
    with pytest.raises(HeadwaterError, match="nested too deeply"):
        parse_value("[" * 5000)


def test_places_of_nested_values_and_of_missing_ones():
    document = parse_document("a: 1\ntasks:\n  - name: x\n    weight: 2\n  - {name: y,\n     weight: 3}\n", "f.yaml")
    assert document.where(("tasks", 0, "weight")) == "f.yaml:4: tasks[0].weight"
    assert document.where(("tasks", 1, "weight")) == "f.yaml:6: tasks[1].weight"
    assert document.where(("tasks", 1, "train")) == "f.yaml:5: tasks[1].train"
    assert document.where(("nothing",)) == "f.yaml:1: nothing"


def test_merge_keys_and_aliases():
    text = "base: &b {r: 8, alpha: 16}\none: {<<: *b, r: 4}\ntwo: *b\nthree: {<<: *b}\nlist: [&x {<<: *b, r: 2}, *x]\n"
    document = parse_document(text, "f.yaml")
    assert document.data["one"] == {"r": 4, "alpha": 16}
    assert document.data["two"] == document.data["three"] == {"r": 8, "alpha": 16}
    assert document.data["list"] == [{"r": 2, "alpha": 16}] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", "f.yaml:2"),
        ("a: 1\n\tb: 2\n", "f.yaml:2"),
        ("- a\n- b\n", "f.yaml:1: the file should be a mapping"),
        ("# nothing\n", "f.yaml: the file is empty"),
        ("a: &x [*x]\n", "f.yaml:1: not valid YAML"),
        ("a: !!python/object:os.system {}\n", "f.yaml:1: not valid YAML"),
        ("a: !!int word\n", "f.yaml:1: not valid YAML"),
        ("? [a, b]\n: 1\n", "f.yaml:1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML"),
        ("a: 1\nb: \x07\n", "f.yaml:2: not valid YAML"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused_with_its_line(text, message):
    with pytest.raises(HeadwaterError) as caught:
        parse_document(text, "f.yaml")
    assert message in str(caught.value)


def test_every_repeated_key_is_named():
    with pytest.raises(HeadwaterError) as caught:
        parse_document("a: 1\nb: {c: 1, c: 2}\na: 3\n", "f.yaml")
    assert [p.where for p in caught.value.problems] == ["f.yaml:3: a", "f.yaml:2: b.c"]
    assert "first in line 1" in caught.value.problems[0].what


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "first.yaml").write_text("a: 1\n")
    with pytest.raises(HeadwaterError, match=r"frist\.yaml: there is no such file\n.*first\.yaml"):
        read_document(tmp_path / "frist.yaml")
    with pytest.raises(HeadwaterError, match="does not exist either"):
        read_document(tmp_path / "no" / "first.yaml")
    with pytest.raises(HeadwaterError, match=r"this is a folder; a YAML file is needed here\n.*first\.yaml"):
        read_document(tmp_path)


def test_overrides_set_typed_values_where_they_say():
    document = parse_document("a: {b: 1}\ntasks:\n  - {weight: 1}\n", "f.yaml")
    problems = apply_overrides(
        document, ["a.b=2e-4", "new.deep.key=[x, y]", "tasks.0.weight=3", "tasks.1={weight: 4}", "a.c=x=y", "a.d="]
    )
    assert problems == []
    assert document.data == {
        "a": {"b": 2e-4, "c": "x=y", "d": None},
        "new": {"deep": {"key": ["x", "y"]}},
        "tasks": [{"weight": 3}, {"weight": 4}],
    }
    assert document.where(("a", "b")) == "--set a.b"
    assert document.where(("tasks", 0, "weight")) == "--set tasks.0.weight"
    assert document.where(("tasks", 0, "train")) == "f.yaml:3: tasks[0].train"
    assert document.where(("tasks", 1, "weight")) == "--set tasks.1: tasks[1].weight"


def test_an_override_replaces_the_places_below_it():
    document = parse_document("method: {name: a, r: 3}\n", "f.yaml")
    apply_overrides(document, ["method={name: b}"])
    assert document.where(("method", "r")) == "--set method: method.r"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "--set a: an override should look like key=value"),
        ("=3", "--set =3: an override should look like key=value"),
        ("a..b=3", "an override should look like key=value"),
        ("a.b.c=3", "--set a.b.c: a.b is not a mapping"),
        ("tasks.2.weight=1", "--set tasks.2.weight: tasks holds 1 items, so '2' is no position in it"),
        ("tasks.1.weight=1", "'1' is no position"),
        ("tasks.x=1", "'x' is no position"),
        ("tasks.-1=1", "'-1' is no position"),
        ("a.b=[1", "--set a.b: '[1': not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_applied(override, message):
    document = parse_document("a: {b: 1}\ntasks: [{weight: 1}]\n", "f.yaml")
    (problem,) = apply_overrides(document, [override])
    assert message in str(problem)
    assert document.data == {"a": {"b": 1}, "tasks": [{"weight": 1}]}


def test_field_names():
    assert field_name(("tasks", 0, "train")) == "tasks[0].train"
    assert field_name(("training", "max_steps")) == "training.max_steps"
