"""What `headwater prefer` is told: a run's file with one more section, `preference:`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from headwater.config import RECOMMENDED, RunConfig, local_path, start_of
from headwater.config_keys import method_configs, method_name
from headwater.errors import HeadwaterError, Problem
from headwater.marked_yaml import KeyPath
from headwater.seeds import Seed

SINGLE = "single:"
BEST_SINGLE = "best_single"
_STRATEGIES = ("linucb", "exp3", "random", "round_robin", "ensemble", BEST_SINGLE, f"{SINGLE}SOURCE")
_NEEDS = {
    "function": ("function",),
    "classifier": ("model",),
    "log_likelihood": ("model",),
    "dpo_implicit": ("model", "reference"),
}
# There is nothing to evaluate during training but what the bandit itself asks for.
_NO_USE = ("eval_steps", "eval_strategy", "load_best_model_at_end", "metric_for_best_model", "loss_normalization")


class SourceSpec(BaseModel):
    """One reward source.

    Args:
        name: letters, digits, `.`, `_` and `-`.
        kind: `function` calls Python; `classifier` is a sequence classification model with one output;
            `log_likelihood` a language model's mean log-probability of the response's tokens; `dpo_implicit` the
            difference of two models' log-probabilities of the response.
        function: `package.module:name`, or `module:name` of a file beside the YAML file; called as
            `name(prompt=..., response=..., answer=..., task=...)`, it returns a number, higher for better.
        model, reference: hub id, folder or, but for a `classifier`, GGUF file; local ones are found as
            `model_name_or_path` is.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["function", "classifier", "log_likelihood", "dpo_implicit"]
    function: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    model: str | None = None
    reference: str | None = None

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        given = {key for key in ("function", "model", "reference") if getattr(self, key) is not None}
        problems = [
            Problem(f"`{key}` is missing, which kind: {self.kind} needs", key)
            for key in _NEEDS[self.kind]
            if key not in given
        ]
        problems += [
            Problem(f"kind: {self.kind} has no use for `{key}`", key) for key in sorted(given - {*_NEEDS[self.kind]})
        ]
        if problems:
            raise HeadwaterError(*problems)
        return self


class PreferenceSpec(BaseModel):
    """How responses are sampled, judged and learned from.

    Args:
        sources: the reward sources, the arms of the bandit.
        strategies: who decides which source judges a batch. `linucb` is LASeR; `exp3` a bandit without context;
            `random`, `round_robin` and `single:SOURCE` are controls that ask one source too; `best_single` trains with
            each source alone and keeps, for each seed, the run that scores best on the validation rows; `ensemble`
            asks all and takes the mean of their standardised scores. Each is trained on its own, with every seed.
        seeds: one run for each; the file's `seed` alone by default.
        bandit_reward: what a pick was worth. `loss` is minus the batch's training loss, as in the paper;
            `loss_decrease` by how much the step lowered that loss; `validation` by how much the step raised the
            log-probability, per token, of the right answers of the task's validation rows.
        alpha: LinUCB's exploration, >= 0.
        gamma: Exp3's exploration, in (0, 1].
        window: scale rewards by the quantiles of so many latest ones instead of all.
        context: hidden states of the `policy` as it is (the paper's) or of the `base` model, which do not drift.
        context_dim: directions of the hidden states that are kept, > 0.
        responses: sampled for each prompt, >= 2.
        temperature: of the sampling, > 0: greedy answers would all be the same.
        max_new_tokens: most tokens of a response.
        pairs_per_prompt: most pairs made of a prompt's responses, > 0.
        min_gap: two responses make a pair only if their scores differ by more than this, >= 0.
        objective: `dpo+nll`, `dpo`, or `raft`: the log-likelihood of each prompt's best response alone.
        beta: DPO's, > 0.
        validation_rows: rows of a task that `bandit_reward: validation` looks at, > 0.
        good: task -> the source known to be good for it; only counted in the report, never shown to the bandit.
    """

    model_config = ConfigDict(extra="forbid")

    sources: list[SourceSpec]
    strategies: list[str] = ["linucb"]
    seeds: list[Seed] = []
    bandit_reward: Literal["loss", "loss_decrease", "validation"] = "loss"
    alpha: float = Field(1.0, ge=0)
    gamma: float = Field(0.2, gt=0, le=1)
    window: int | None = Field(None, ge=2)
    context: Literal["policy", "base"] = "policy"
    context_dim: int = Field(64, gt=0)
    responses: int = Field(8, ge=2)
    temperature: float = Field(0.8, gt=0)
    max_new_tokens: int = Field(64, gt=0)
    pairs_per_prompt: int = Field(4, gt=0)
    min_gap: float = Field(0.0, ge=0)
    objective: Literal["dpo+nll", "dpo", "raft"] = "dpo+nll"
    beta: float = Field(0.1, gt=0)
    validation_rows: int = Field(16, gt=0)
    good: dict[str, str] = {}

    @field_validator("sources")
    @classmethod
    def _sources_are_there(cls, sources: list[SourceSpec]) -> list[SourceSpec]:
        if not sources:
            fix = "name at least one, e.g. {name: exact, kind: function, function: my_rewards:exact}"
            raise HeadwaterError(Problem("there are no reward sources", "", fix))
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise HeadwaterError(Problem(f"two sources are called {', '.join(twice)}", ""))
        return sources

    @field_validator("strategies")
    @classmethod
    def _strategies_are_known(cls, strategies: list[str]) -> list[str]:
        fix = f"any of: {', '.join(_STRATEGIES)}, where SOURCE is the name of a source"
        unknown = [s for s in strategies if s not in _STRATEGIES[:-1] and not s.startswith(SINGLE)]
        problems = [Problem(f"unknown strategy `{strategy}`", "", fix) for strategy in unknown]
        if not strategies:
            problems.append(Problem("there is no strategy", "", fix))
        if problems:
            raise HeadwaterError(*problems)
        return strategies

    @field_validator("strategies", "seeds")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError("something is listed twice")
        return values

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [source.name for source in self.sources]
        problems = []
        for strategy in self.strategies:
            source = strategy.removeprefix(SINGLE)
            if source != strategy and source not in names:
                what = f"there is no source `{source}`"
                problems.append(Problem(what, "strategies", f"the sources are: {', '.join(names)}"))
        problems += [
            Problem(f"there is no source `{source}`", f"good.{task}", f"the sources are: {', '.join(names)}")
            for task, source in self.good.items()
            if source not in names
        ]
        if problems:
            raise HeadwaterError(*problems)
        return self


def _is_dropout(field: str, value: Any) -> bool:
    """Whether a method's field is a rate of dropout; HydraLoRA's `input_dropout` is a kind of it."""
    return field.endswith("dropout") and isinstance(value, int | float)


class PreferConfig(RunConfig):
    """A run's file with a `preference` section. Batches hold prompts of one task; `align` and dropout have no place.

    Args:
        preference: reward sources, who picks among them, and how pairs are made.
    """

    preference: PreferenceSpec

    _recommended_rate: ClassVar[float | None] = None  # it was found for other losses than DPO's

    @model_validator(mode="before")
    @classmethod
    def _without_dropout(cls, data: Any) -> Any:
        """Most methods drop out by default; here the policy is compared with its own frozen copy."""
        method = data.get("method", RECOMMENDED) if isinstance(data, dict) else None
        name = method_name(method)
        known = method_configs().get(name) if isinstance(name, str) else None
        if known is None or not isinstance(method, dict):  # said elsewhere
            return data
        off = {f.name: 0.0 for f in dataclasses.fields(known) if _is_dropout(f.name, f.default) and f.default}
        return {**data, "method": {**off, **method}}

    @model_validator(mode="after")
    def _fits_preference_training(self) -> Self:
        problems = [
            Problem(f"{key} is {value}; dropout would add noise to the log-probability ratios of DPO", f"method.{key}",
                    "set it to 0")
            for key, value in self.method.items()
            if _is_dropout(key, value) and value
        ]  # fmt: skip
        problems += [
            Problem(f"`{key}` has no effect here: tasks are scored before and after", f"training.{key}", "leave it out")
            for key in _NO_USE
            if key in self.training
        ]
        if self.align is not None:
            problems.append(Problem("an alignment loss needs batches of several tasks", "align", "leave it out"))
        if self.mixture.model_fields_set & {"batching"} and self.mixture.batching != "homogeneous":
            what = "one source judges a whole batch, so that a batch holds prompts of one task"
            problems.append(Problem(what, "mixture.batching", "leave it out, or set it to homogeneous"))
        known = [task.name for task in self.tasks]
        problems += [
            Problem(f"there is no task `{task}`", f"preference.good.{task}", f"the tasks are: {', '.join(known)}")
            for task in self.preference.good
            if task not in known
        ]
        needing = ["bandit_reward: validation"] if self.preference.bandit_reward == "validation" else []
        needing += [f"the strategy {BEST_SINGLE}"] if BEST_SINGLE in self.preference.strategies else []
        problems += [
            Problem(f"{what} needs rows of {task.name}", "tasks", "give the task a `validation`")
            for what in needing
            for task in self.tasks
            if task.train and not task.validation
        ]
        if problems:
            raise HeadwaterError(*problems)
        return self

    @property
    def seeds(self) -> list[int]:
        """The seeds that each strategy is trained with."""
        return self.preference.seeds or [self.seed]

    def settle_models(self) -> None:
        """Makes local paths of the sources' models absolute, by the rule of `model_name_or_path`."""
        for index, source in enumerate(self.preference.sources):
            for key in ("model", "reference"):
                if name := getattr(source, key):
                    base = start_of(self._document, ("preference", "sources", index, key), self.base_dir)
                    with contextlib.suppress(HeadwaterError):  # an unknown home folder: the model is not found then
                        setattr(source, key, local_path(Path.cwd(), local_path(base, name)))

    def _path_of(self, name: str) -> KeyPath | None:
        first, *rest = name.split(".")
        if first == "preference":
            return (first, *(int(part) if part.isdecimal() else part for part in rest))
        return super()._path_of(name)
