"""From a run's file and its `compare:` section to one config per method, all with the same trainable parameters."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.compare.budget import field_to_solve, solvable, solve, trainable_parameters
from headwater.compare.spec import CompareSpec, Variant
from headwater.errors import HeadwaterError, Problem
from headwater.methods.registry import methods
from headwater.training.run import mixture_of, training_arguments

if TYPE_CHECKING:
    from headwater.config import RunConfig


@dataclass(frozen=True)
class Planned:
    """One method of a comparison, ready to be trained with any seed.

    Args:
        config: its run, but for seed and folder.
        parameters: what it trains, counted.
        field: the field that was solved for; empty where the method is as given.
        learning_rates: to choose from; empty where there is no choice.
    """

    label: str
    config: RunConfig
    parameters: int
    field: str = ""
    learning_rates: tuple[float, ...] = ()

    def run(self, seed: int, folder: Path) -> RunConfig:
        """The config of one run."""
        return self.config.model_copy(update={"seed": seed, "output_dir": str(folder)})

    def with_learning_rate(self, rate: float) -> Planned:
        training = {**self.config.training, "learning_rate": rate}
        return dataclasses.replace(self, config=self.config.model_copy(update={"training": training}))


@dataclass(frozen=True)
class Plan:
    """All of a comparison, before anything is trained.

    Args:
        config: the file's.
        spec: what is compared; `methods` are those that take part.
        budget: the trainable parameters that all should have; None where nothing is matched.
    """

    config: RunConfig
    spec: CompareSpec
    budget: int | None
    methods: list[Planned]

    def deviation(self, planned: Planned) -> float | None:
        """How far a method is from the budget, as a share of it."""
        return None if self.budget is None else planned.parameters / self.budget - 1


def make_plan(config: RunConfig) -> Plan:
    """Checks what is compared and solves for equal trainable parameters.

    Raises:
        HeadwaterError: for everything that is wrong with the section or a method; where a method cannot come near
            enough to the budget.
    """
    spec = config.compare or CompareSpec()
    if not spec.methods:
        fix = "give --methods a,b,c, or a `compare:` section with `methods`"
        raise HeadwaterError(Problem("there is nothing to compare", config.where("compare"), fix))
    runs = _configs(config, spec)
    matched = spec.match != "none"
    budget = spec.parameters if matched else None
    measure = _measure(config, spec) if matched else 0
    planned: dict[int, Planned] = {}
    for index, (label, run) in sorted(enumerate(runs.items()), key=lambda entry: entry[0] != measure):
        variant = spec.methods[index]
        match = variant.match or spec.match
        field = ""
        try:
            if match == "none" or (index == measure and spec.parameters is None):
                count = trainable_parameters(run, run.method)
            else:
                field = field_to_solve(run.method["name"], match)
                # One method's own `match`, where others have none, goes by the first one's count.
                section, count = solve(run, field, budget or planned[measure].parameters)
                run = run.model_copy(update={"method": section})
        except HeadwaterError as error:
            place = config.where("compare", "methods", index, "match")
            problems = [dataclasses.replace(p, where=place) if p.where == "match" else p for p in error.problems]
            raise run.placed(HeadwaterError(*problems)) from error.__cause__
        budget = budget or (count if matched else None)
        rates = () if "learning_rate" in variant.training else tuple(spec.learning_rate)
        planned[index] = Planned(label, run, count, field, rates)
    plan = Plan(config, spec, budget, [planned[index] for index in range(len(runs))])
    _refuse_far(plan)
    return plan


def _measure(config: RunConfig, spec: CompareSpec) -> int:
    """Whose trainable parameters all should have: the method's that the file itself has, or else the first one's. A
    first one with fields of its own was given its size on purpose."""
    bare = [
        variant.method.get("name", config.method["name"]) if variant.method.keys() <= {"name"} else None
        for variant in spec.methods
    ]
    own = config.method["name"]
    return bare.index(own) if bare[0] and own in bare else 0


def _configs(config: RunConfig, spec: CompareSpec) -> dict[str, RunConfig]:
    """Each method's run by label.

    Raises:
        HeadwaterError: with every problem of every method.
    """
    problems: list[Problem] = []
    runs: dict[str, RunConfig] = {}
    for index, variant in enumerate(spec.methods):
        label = _label(config, variant)
        place = config.where("compare", "methods", index)
        if label in runs:
            fix = "give one of them a `label` of its own, such as rlora+init"
            problems.append(Problem(f"two methods are called {label}", place, fix))
        try:
            runs[label] = _config_of(config, index, variant)
        except HeadwaterError as error:
            problems += error.problems
    if problems:
        raise HeadwaterError(*dict.fromkeys(problems))
    return runs


def _label(config: RunConfig, variant: Variant) -> str:
    return variant.label or variant.method.get("name", config.method["name"])


def _config_of(config: RunConfig, index: int, variant: Variant) -> RunConfig:
    from headwater.config import changed
    from headwater.config_keys import method_fields

    name = variant.method.get("name", config.method["name"])
    taken = {key: value for key, value in config.method.items() if key in method_fields(name)}
    sections: dict[str, Any] = {
        "compare": None,
        "method": {**taken, **variant.method, "name": name},
        "training": {**config.training, **variant.training},
    }
    if "align" in variant.model_fields_set:
        sections["align"] = variant.align and variant.align.model_dump()
    if variant.mixture:
        sections["mixture"] = {**config.mixture.model_dump(exclude_unset=True), **variant.mixture}
    if variant.train_on is not None:
        sections["tasks"] = _tasks_trained_on(config, index, variant.train_on)
    # A value's place is the method's own, else the file's.
    known, prefix = config._document.places, ("compare", "methods", index)
    places = {path: place for path, place in known.items() if path and path[0] in sections}
    places |= {path[3:]: place for path, place in known.items() if path[:3] == prefix and len(path) > 3}
    if "name" in variant.method:
        places[("method", "name")] = known.get((*prefix, "method", "name")) or config.where(*prefix)
    run = changed(config, sections, places)
    problems = [
        Problem(f"{key} has no say in a comparison", run.where("training", key), "finished runs are kept by themselves")
        for key in ("resume_from_checkpoint", "overwrite_output_dir")
        if run.training.get(key)
    ]
    if problems:
        raise HeadwaterError(*problems)
    try:
        mixture_of(run, training_arguments(run).per_device_train_batch_size)  # or hours of other runs would come first
    except HeadwaterError as error:
        raise run.placed(error) from error
    return run


def _tasks_trained_on(config: RunConfig, index: int, names: list[str]) -> list[dict[str, Any]]:
    """The tasks, those that are not named without training rows: they keep their ids and are scored."""
    known = [task.name for task in config.tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        place = config.where("compare", "methods", index, "train_on")
        raise HeadwaterError(Problem(f"no task is called {', '.join(unknown)}", place, f"known: {', '.join(known)}"))
    kept = [task.model_dump(exclude_unset=True) for task in config.tasks]
    return [task if task["name"] in names else {**task, "train": None} for task in kept]


def _refuse_far(plan: Plan) -> None:
    """Raises:
    HeadwaterError: naming every method that was solved for and is too far from the budget.
    """
    problems = []
    for index, planned in enumerate(plan.methods):
        deviation = plan.deviation(planned) or 0.0
        if not planned.field or abs(deviation) <= plan.spec.tolerance:
            continue
        value = planned.config.method.get(planned.field)
        others = [name for name in solvable(planned.config.method["name"]) if name != planned.field]
        another = f"solve for another (match: {' or '.join(others)}), " if others else ""
        problems.append(
            Problem(
                f"{planned.label} cannot have {plan.budget:,} trainable parameters to within "
                f"{plan.spec.tolerance:.0%}: the nearest is {planned.parameters:,} ({deviation:+.1%}) with "
                f"{planned.field} {value}",
                plan.config.where("compare", "methods", index),
                f"change its other fields, {another}choose a larger number (compare.parameters), or allow the "
                "difference (compare.tolerance)",
            )
        )
    if problems:
        raise HeadwaterError(*problems)


def choose(config: RunConfig, names: Sequence[str] | None, changes: dict[str, Any]) -> RunConfig:
    """The config with what the command line says about its comparison.

    Args:
        names: labels of the file, or methods; None leaves the file's.
        changes: fields of the section that replace the file's.

    Raises:
        HeadwaterError: on a name that is neither, or a value out of range.
    """
    from headwater.config import changed

    spec = config.compare or CompareSpec()
    section = {**spec.model_dump(exclude_unset=True), **changes}
    if names is not None:
        section["methods"] = [_named(name, config, spec) for name in names]
    places = {path: place for path, place in config._document.places.items() if path[:1] == ("compare",)}
    for key in [*changes, *(["methods"] if names is not None else [])]:
        places = {path: place for path, place in places.items() if path[1:2] != (key,)}
        places[("compare", key)] = f"--{key}"
    return changed(config, {"compare": section}, places)


def _named(name: str, config: RunConfig, spec: CompareSpec) -> dict[str, Any]:
    labels = [_label(config, variant) for variant in spec.methods]
    if name in labels:
        return spec.methods[labels.index(name)].model_dump(exclude_unset=True)
    known = ["lora", *(m.name for m in methods())]
    if name in known:
        return {"method": {"name": name}}
    both = [*dict.fromkeys([*labels, *known])]
    close = difflib.get_close_matches(name, both, n=1, cutoff=0.5)
    fix = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(both)}"
    raise HeadwaterError(Problem(f"`{name}` is neither a method nor a label of the file", "--methods", fix))
