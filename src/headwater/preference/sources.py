"""Reward sources: what gives a response to a prompt a number, higher for better."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from headwater.base_model import load_to_run
from headwater.data.encode import DataSpec, encode_completion, encode_prompt
from headwater.data.rows import Row
from headwater.data.tasks import Task
from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.forward import evaluating, pad_id
from headwater.evaluation.likelihood import choice_log_probs
from headwater.preference.spec import SourceSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scores = list[list[float]]
Responses = Sequence[Sequence[str]]
Reward = Callable[..., float]


class Source(ABC):
    """A reward source. Models are loaded when they are first asked, and kept.

    Args:
        name: what it is called.
    """

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def scores(self, task: Task, rows: Sequence[Row], responses: Responses) -> Scores:
        """A number for each response to each row's prompt, higher for better."""

    def checked_scores(self, task: Task, rows: Sequence[Row], responses: Responses) -> Scores:
        """As `scores`.

        Raises:
            HeadwaterError: a score is missing or not finite.
        """
        found = self.scores(task, rows, responses)
        for row, values, texts in zip(rows, found, responses, strict=True):
            if len(values) != len(texts):
                raise HeadwaterError(Problem(f"{len(values)} scores for {len(texts)} responses", row.where))
            if not all(math.isfinite(value) for value in values):
                raise HeadwaterError(Problem("a score is not a finite number", row.where))
        return found


class Function(Source):
    """A Python function, such as a checker of verifiable answers.

    Args:
        function: called with the keywords `prompt`, `response`, `answer` (the row's completion) and `task` (its name).
    """

    def __init__(self, name: str, function: Reward):
        super().__init__(name)
        self.function = function

    def scores(self, task: Task, rows: Sequence[Row], responses: Responses) -> Scores:
        return [
            [
                float(self.function(prompt=row.prompt, response=text, answer=row.completion, task=task.name))
                for text in texts
            ]
            for row, texts in zip(rows, responses, strict=True)
        ]


class LogLikelihood(Source):
    """A language model's log-probability of the response behind the prompt, in nats, the prompt not counted.

    Args:
        model: hub id, folder or GGUF file.
        data: how rows become tokens.
        device: where the model goes.
        mean: divide by the response's number of tokens, so that short responses are not better for being short.
    """

    def __init__(self, name: str, model: str, data: DataSpec, device: torch.device, *, mean: bool = True):
        super().__init__(name)
        self.path, self.data, self.device, self.mean = model, data, device, mean

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_to_run(self.path, self.device)

    def scores(self, task: Task, rows: Sequence[Row], responses: Responses) -> Scores:
        model, tokenizer = self.loaded
        prompts = [encode_prompt(row, tokenizer, self.data) for row in rows]
        # A response without a token of its own is the end of the text.
        tokens = [[encode_completion(t, tokenizer) or [tokenizer.eos_token_id] for t in texts] for texts in responses]
        with evaluating(model):
            sums = choice_log_probs(model, prompts, tokens, fill=pad_id(tokenizer))
        if not self.mean:
            return sums
        return [
            [total / len(ids) for total, ids in zip(totals, lists, strict=True)]
            for totals, lists in zip(sums, tokens, strict=True)
        ]


class DpoImplicit(Source):
    """The reward that a model trained with DPO stands for: log p_model(response) - log p_reference(response)."""

    def __init__(self, name: str, model: str, reference: str, data: DataSpec, device: torch.device):
        super().__init__(name)
        self.model = LogLikelihood(name, model, data, device, mean=False)
        self.reference = LogLikelihood(name, reference, data, device, mean=False)

    def scores(self, task: Task, rows: Sequence[Row], responses: Responses) -> Scores:
        pairs = zip(self.model.scores(task, rows, responses), self.reference.scores(task, rows, responses), strict=True)
        return [[a - b for a, b in zip(*values, strict=True)] for values in pairs]


class Classifier(Source):
    """A reward model: sequence classification with one output. Its chat template is used where it has one."""

    def __init__(self, name: str, model: str, device: torch.device, batch_size: int = 16):
        super().__init__(name)
        self.path, self.device, self.batch_size = model, device, batch_size

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.path)
        model = AutoModelForSequenceClassification.from_pretrained(self.path, use_safetensors=True)
        if model.config.num_labels != 1:
            what = f"the model has {model.config.num_labels} outputs; a reward model has one"
            raise HeadwaterError(Problem(what, self.path))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The model reads its score at the last token that is not padding, and knows padding by this id.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return model.to(self.device).eval(), tokenizer

    def scores(self, task: Task, rows: Sequence[Row], responses: Responses) -> Scores:
        model, tokenizer = self.loaded
        texts = [self._text(tokenizer, row, text) for row, mine in zip(rows, responses, strict=True) for text in mine]
        found: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = tokenizer(
                texts[start : start + self.batch_size],
                padding=True,
                return_tensors="pt",
                add_special_tokens=not tokenizer.chat_template,
            ).to(self.device)
            with torch.no_grad():
                found += model(**batch).logits[:, 0].float().tolist()
        values = iter(found)
        return [[next(values) for _ in mine] for mine in responses]

    @staticmethod
    def _text(tokenizer: Any, row: Row, response: str) -> str:
        if not tokenizer.chat_template:
            return row.prompt + response
        turns = list(row.messages[:-1]) or [{"role": "user", "content": row.prompt}]
        answer = {"role": "assistant", "content": response.strip()}
        return tokenizer.apply_chat_template([*turns, answer], tokenize=False)


def make_sources(
    specs: Sequence[SourceSpec], data: DataSpec, base_dir: Path, device: torch.device | str = "cpu"
) -> list[Source]:
    """The sources that a file names. Functions are imported; of models it is checked that their config can be read.

    Args:
        data: how rows become tokens for language models.
        base_dir: the folder of the YAML file, where a function's module is looked for first.
        device: where models go.

    Raises:
        HeadwaterError: every function or model that is not there.
    """
    sources: list[Source] = []
    problems = []
    device = torch.device(device)
    for i, spec in enumerate(specs):
        try:
            sources.append(_make(spec, data, base_dir, device))
        except HeadwaterError as error:
            where = f"preference.sources.{i}"
            problems += [Problem(p.what, f"{where}.{p.where}" if p.where else where, p.fix) for p in error.problems]
    if problems:
        raise HeadwaterError(*problems)
    return sources


def _make(spec: SourceSpec, data: DataSpec, base_dir: Path, device: torch.device) -> Source:
    if spec.function is not None:
        return Function(spec.name, find_function(spec.function, base_dir))
    assert spec.model is not None
    for key, path in (("model", spec.model), ("reference", spec.reference)):
        if path is not None:
            _check_model(key, path, spec.kind)
    if spec.kind == "classifier":
        return Classifier(spec.name, spec.model, device)
    if spec.reference is not None:
        return DpoImplicit(spec.name, spec.model, spec.reference, data, device)
    return LogLikelihood(spec.name, spec.model, data, device)


def _check_model(key: str, path: str, kind: str) -> None:
    from transformers import AutoConfig

    is_file = os.path.isfile(path)  # `load_base_model` takes that for GGUF, whatever it is called
    if is_file and kind == "classifier":
        what = f"{path} is a file, and of GGUF files only language models are read, no classifiers"
        raise HeadwaterError(Problem(what, key, "give a hub id, or a folder with safetensors"))
    try:
        if not is_file:
            AutoConfig.from_pretrained(path)
        elif not _is_gguf(path):
            raise ValueError("this file is not GGUF")
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HeadwaterError(Problem(f"{path} is no model: {reason}", key)) from error


def _is_gguf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def find_function(name: str, base_dir: Path) -> Reward:
    """The function `module:name`: of `module.py` in `base_dir` if there is one, else of an installed module.

    Raises:
        HeadwaterError: the module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    path = base_dir / f"{module_name.replace('.', '/')}.py"
    try:
        module = _run_file(path) if path.is_file() else importlib.import_module(module_name)
    except Exception as error:
        what = f"{path if path.is_file() else module_name} cannot be imported: {type(error).__name__}: {error}"
        fix = "" if path.is_file() else f"put {path.name} beside the YAML file, or install the package"
        raise HeadwaterError(Problem(what, "function", fix)) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        fix = f"it has: {', '.join(known[:8])}" if known else ""
        raise HeadwaterError(Problem(f"{module_name} has no function `{attribute}`", "function", fix))
    return function


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"headwater_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact_match(*, response: str, answer: str, **_: str) -> float:
    """1.0 if the response is the answer, white space at both ends aside: `headwater.preference.sources:exact_match`."""
    return float(response.strip() == answer.strip())
