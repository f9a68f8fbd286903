"""TRL's DPOTrainer on batches of prompts: responses are sampled, judged by the picked source and paired as it goes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from headwater.data.encode import DataSpec, encode_completion, encode_end, encode_prompt
from headwater.data.mixture import MixtureSpec, shares
from headwater.data.rows import Row
from headwater.data.sampler import MixtureBatchSampler
from headwater.data.tasks import Task
from headwater.errors import HeadwaterError
from headwater.evaluation.forward import evaluating, pad_id
from headwater.evaluation.generate import generate_from_ids
from headwater.files import write_json
from headwater.preference.bandits import Picker, QuantileScale
from headwater.preference.contexts import Projection, prompt_states
from headwater.preference.pairs import Pair, make_pairs, mean_of_standardised
from headwater.preference.sources import Scores, Source
from headwater.preference.spec import PreferenceSpec
from headwater.preference.validation import Validation
from headwater.training.adapter import load_default
from headwater.training.method_callback import MethodCallback
from headwater.training.write_errors import whole_or_gone
from headwater.tuner import follow_loss, is_adapted
from headwater.tuner.context import KEYWORD, LABELS
from headwater.tuner.model import REFERENCE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE, TENSORS = "bandit.json", "bandit.safetensors"
_FIT_ON = 512
LOSSES = {"dpo+nll": ["sigmoid", "sft"], "dpo": ["sigmoid"], "raft": ["sft"]}
"""TRL's names of the objectives' parts, all of weight 1."""


@dataclass
class Round:
    """What happened in one batch.

    Args:
        task: whose prompts it held.
        queried: the sources that scored it: one, or all of an ensemble.
        pairs: how many pairs its responses gave; with none there is nothing to learn.
        loss: of the batch, before its step.
        raw, reward: what the pick was worth, before and after scaling to [0, 1].
    """

    step: int
    task: str
    queried: list[str]
    pairs: int
    loss: float | None = None
    raw: float | None = None
    reward: float | None = None


@dataclass
class _Pending:
    """A round whose worth is known only after the optimiser's step."""

    round: Round
    arm: int
    context: np.ndarray
    inputs: dict[str, Tensor]
    task: Task
    p: float  # of the pick, when it was made: other rounds of the step may be learned from first
    before: float = 0.0


@dataclass
class Responses:
    """Different responses of each prompt: texts, and their token ids with the end token where they came to an end."""

    texts: list[list[str]] = field(default_factory=list)
    ids: list[list[list[int]]] = field(default_factory=list)


class PreferenceTrainer(DPOTrainer):
    """Iterative preference training in which one reward source judges each batch.

    Per batch: the context of its prompts, a source picked by `picker`, sampled responses, pairs within each prompt, one
    step of TRL's loss on them, and the step's worth as the bandit's reward. An iteration is one pass over the prompts;
    at its start the adapter is copied to a frozen one, the reference of DPO. Checkpoints hold both, and the bandit.

    Args:
        model: a causal language model with a PEFT adapter called `default`.
        args: TRL's settings; `per_device_train_batch_size` counts prompts.
        tasks: those with training rows are trained on; their rows' completions only reach the reward sources.
        tokenizer: the model's.
        sources: the arms, in the order of the picker's.
        picker: who picks. With `ensemble` all sources are asked, and it only keeps account of the dropped ones.
        spec, data: the file's sections.
        mixture: shares of the tasks.
        states: hidden states known of `(task, row)`, for `context: base`; filled as it goes, to be shared by runs.
    """

    args: DPOConfig
    model: Any

    def __init__(
        self,
        model: PeftModel,
        args: DPOConfig,
        *,
        tasks: Sequence[Task],
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[Source],
        picker: Picker,
        ensemble: bool = False,
        spec: PreferenceSpec,
        data: DataSpec,
        mixture: MixtureSpec,
        states: dict[tuple[int, int], np.ndarray] | None = None,
        callbacks: Iterable[TrainerCallback] = (),
    ):
        self.tasks, self.sources, self.picker, self.ensemble = list(tasks), list(sources), picker, ensemble
        self.spec, self.states = spec, {} if states is None else states
        self.scale = QuantileScale(spec.window)
        self.rounds: list[Round] = []
        self.iteration = -1
        self.projection: Projection | None = None
        self._pending: list[_Pending] = []
        self._loss = 0.0
        self._known: tuple[tuple[int, int], float] = ((-1, -1), 0.0)
        self.prompts = [[encode_prompt(row, tokenizer, data) for row in task.train] for task in self.tasks]
        sizes = [len(prompts) for prompts in self.prompts]
        self.shares = shares(sizes, [task.weight for task in self.tasks], mixture)
        places = [(t, r) for t, size in enumerate(sizes) for r in range(size)]
        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=Dataset.from_list([{"task": t, "row": r} for t, r in places]),
            processing_class=tokenizer,
            callbacks=[_Settle(self), MethodCallback(), *callbacks],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.tokenizer, self.data = tokenizer, data
        self.collate = DataCollatorForPreference(pad_id(tokenizer), max_length=data.max_length)
        self.validation = Validation(tokenizer, data, spec.validation_rows)

    # What TRL and transformers ask for

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # prompts have no responses yet

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one task's prompts each."""
        self.sampler = MixtureBatchSampler(
            [[len(p) for p in prompts] for prompts in self.prompts],
            self.shares,
            self.args.per_device_train_batch_size,
            seed=self.args.seed,
            batching="homogeneous",
        )
        prompts: Any = self.train_dataset
        loader: DataLoader = DataLoader(prompts, batch_sampler=self.sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # a batch of prompts does not say what it will cost

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One round. A batch without a pair changes nothing, and teaches the bandit nothing."""
        made = self._play(inputs)
        if made is None:
            return torch.zeros((), device=self.args.device)
        if self.picker.learns and self.spec.bandit_reward == "validation":
            made.before = self._validated(made.task)
        loss = super().training_step(model, made.inputs, num_items_in_batch)
        made.round.loss = self._loss
        self._pending.append(made)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if is_adapted(self.model):
            follow_loss(self.model, loss)
        self._loss = float(loss.detach())
        if not np.isfinite(self._loss):
            raise HeadwaterError(f"the loss is {self._loss} at step {self.state.global_step + 1}; lower learning_rate")
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # trainer_state.json is written last, so a folder that has it has all of the bandit, too.
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with whole_or_gone(folder):
            self.save_bandit(folder)
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_default(self.model, Path(resume_from_checkpoint))
        self.load_bandit(Path(resume_from_checkpoint))

    # The bandit's state

    def save_bandit(self, folder: Path) -> None:
        """Writes the bandit, its rewards, its contexts' projection and all rounds as safetensors and JSON."""
        tensors, values = self.picker.state()
        if self.projection is not None:
            tensors = {**tensors, "mean": self.projection.mean, "directions": self.projection.directions}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / TENSORS)
        write_json(
            folder / STATE,
            {
                "picker": values,
                "rewards": self.scale.history,
                "iteration": self.iteration,
                "rounds": [asdict(r) for r in self.rounds],
            },
        )

    def load_bandit(self, folder: Path) -> None:
        """Takes over what `save_bandit` wrote."""
        tensors = load_file(folder / TENSORS)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if "mean" in tensors:
            self.projection = Projection.restored(tensors.pop("mean"), tensors.pop("directions"))
        self.picker.load(tensors, state["picker"])
        self.scale.history = list(state["rewards"])
        self.iteration = state["iteration"]
        self.rounds = [Round(**r) for r in state["rounds"]]

    # A round

    def _play(self, batch: Sequence[dict[str, int]]) -> _Pending | None:
        task = self.tasks[batch[0]["task"]]
        number = len(self.rounds)
        if (iteration := number // len(self.sampler)) != self.iteration:
            self._freeze_reference()
            self.iteration = iteration
        rows = [task.train[place["row"]] for place in batch]
        context = self._context([(place["task"], place["row"]) for place in batch])
        responses = self._sample(rows, [self.prompts[p["task"]][p["row"]] for p in batch], task, number)
        arm, queried, scores = self._ask(task, rows, responses, context)
        p = self.picker.probability(arm)
        pairs = make_pairs(
            scores,
            per_prompt=self.spec.pairs_per_prompt,
            min_gap=self.spec.min_gap,
            best_only=self.spec.objective == "raft",
            seed=f"{self.args.seed} {number}",
        )
        round_ = Round(self.state.global_step + 1, task.name, queried, len(pairs))
        self.rounds.append(round_)
        if not pairs:
            return None
        return _Pending(round_, arm, context, self._inputs(batch, responses, pairs, task), task, p)

    def _freeze_reference(self) -> None:
        """Copies the adapter as it is, buffers too, to the frozen one."""
        state = get_peft_model_state_dict(self.model, adapter_name="default")
        set_peft_model_state_dict(self.model, state, adapter_name=REFERENCE)

    def _context(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        if self.projection is None:
            every = [(t, r) for t, prompts in enumerate(self.prompts) for r in range(len(prompts))]
            stride = -(-len(every) // _FIT_ON)
            self.projection = Projection(self._hidden(every[::stride]), self.spec.context_dim)
        return self.projection(self._hidden(places))

    def _hidden(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """The prompts' last-token states, `(prompts, hidden size)`."""
        base = self.spec.context == "base"
        known = self.states if base else {}
        for t in {t for t, _ in places}:
            new = [place for place in places if place[0] == t and place not in known]
            if not new:
                continue
            with evaluating(self.model), self.model.disable_adapter() if base else torch.no_grad():
                prompts = [self.prompts[t][r] for _, r in new]
                found = prompt_states(self.model, prompts, fill=pad_id(self.tokenizer), task_index=self.tasks[t].index)
            known |= dict(zip(new, found, strict=True))
        return np.stack([known[place] for place in places])

    def _sample(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]], task: Task, number: int) -> Responses:
        n = self.spec.responses
        with evaluating(self.model):
            # Of the seed and the round alone: a resumed run samples what the run that was stopped would have.
            torch.manual_seed((self.args.seed * 1_000_003 + number) % (1 << 63))
            answers = generate_from_ids(
                self.model,
                self.tokenizer,
                prompts,
                task_index=task.index,
                max_new_tokens=self.spec.max_new_tokens,
                temperature=self.spec.temperature,
                samples=n,
                batch_size=len(prompts),
            )
        responses = Responses()
        for start, row in zip(range(0, len(answers), n), rows, strict=True):
            ends: dict[str, bool] = {}
            for answer in answers[start : start + n]:
                ends[answer.text] = ends.get(answer.text, False) or answer.finished
            end = encode_end(row, self.tokenizer, self.data)
            ids = {t: [*encode_completion(t, self.tokenizer), *(end if ended else [])] for t, ended in ends.items()}
            responses.texts.append([text for text, tokens in ids.items() if tokens])
            responses.ids.append([tokens for tokens in ids.values() if tokens])
        return responses

    def _ask(
        self, task: Task, rows: Sequence[Row], responses: Responses, context: np.ndarray
    ) -> tuple[int, list[str], Scores]:
        """The picked arm, who was asked, and the scores. A source that fails is dropped, and another one is picked."""
        while True:
            arm = self.picker.choose(context)
            asked = self.picker.alive if self.ensemble else [arm]
            found: list[Scores] = []
            for i in asked:
                try:
                    found.append(self.sources[i].checked_scores(task, rows, responses.texts))
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}" if not isinstance(error, HeadwaterError) else str(error)
                    self.picker.drop(i, reason)
                    what = f"reward source {self.sources[i].name} failed and is asked no more ({reason})"
                    warnings.warn(what, stacklevel=2)
            if found:
                break
        queried = [self.sources[i].name for i in asked if i in self.picker.alive]
        return arm, queried, mean_of_standardised(found) if self.ensemble else found[0]

    def _inputs(
        self, batch: Sequence[dict[str, int]], responses: Responses, pairs: Sequence[Pair], task: Task
    ) -> dict[str, Tensor]:
        """TRL's batch: all chosen, then all rejected sequences."""
        inputs = self.collate(
            [
                {
                    "prompt_ids": self.prompts[batch[pair.prompt]["task"]][batch[pair.prompt]["row"]],
                    "chosen_ids": responses.ids[pair.prompt][pair.chosen],
                    "rejected_ids": responses.ids[pair.prompt][pair.rejected],
                }
                for pair in pairs
            ]
        )
        if is_adapted(self.model):  # a loss of training may go by the task where no forward needs it
            inputs[KEYWORD] = torch.full((2 * len(pairs),), task.index)
            # what the prompt is: of TRL's trainers only newer ones give the model labels
            inputs[LABELS] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return inputs

    def settle(self) -> None:
        """After an optimiser step: tell the bandit what its picks were worth."""
        pending, self._pending = self._pending, []
        for item in pending:
            if not self.picker.learns:
                continue
            item.round.raw = self._worth(item)
            item.round.reward = self.scale(item.round.raw)
            self.picker.update(item.arm, item.context, item.round.reward, item.p)

    def _validated(self, task: Task) -> float:
        """The task's validation now. What one step ended with, the next one of the same task begins with."""
        now = self.state.global_step, task.index
        if self._known[0] != now:
            self._known = now, self.validation(self.model, task)
        return self._known[1]

    def _worth(self, item: _Pending) -> float:
        assert item.round.loss is not None
        if self.spec.bandit_reward == "loss":
            return -item.round.loss
        if self.spec.bandit_reward == "validation":
            return self._validated(item.task) - item.before
        with evaluating(self.model):
            self.compute_loss(self.model, self._prepare_inputs(item.inputs))
        self._metrics["eval"].clear()
        return item.round.loss - self._loss


class _Settle(TrainerCallback):
    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.settle()
