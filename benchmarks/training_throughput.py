"""Training a whole language model: step time, saved activations and tokens per second.

    python -m benchmarks.training_throughput --json benchmarks/results/training_throughput.json
    python -m benchmarks.training_throughput --repeats 0 --dtype bfloat16 --batch 16 \\
        --json benchmarks/results/training_steps-bfloat16-16.json

First, one step (forward, loss, backward, optimiser) on the same real batches under the same trainer, for each method;
the floor is the frozen model's own forward and backward. Then `headwater train` against TRL's SFTTrainer with its
default collation on the same encoded rows, batch size and model, in tokens per second that are not padding.
The demo's model and tasks are used; run `headwater demo` once to have them.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from rich.console import Console
from transformers import TrainerCallback

from headwater.base_model import cache_dir, load_base_model
from headwater.config import load_config
from headwater.data.encode import Encoded, encode_rows
from headwater.data.tasks import TaskSpec, load_tasks
from headwater.training import HeadwaterArguments, HeadwaterTrainer
from headwater.training.accounts import real_tokens
from headwater.training.run import mixture_of

from . import layers, measure, models
from .layers import FLOOR, LOOP

MAX_LENGTH, DROPOUT = 256, 0.1
WARMUP = {"cpu": 1, "cuda": 4}  # steps that are not timed
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
OURS, TRL_OURS, TRL_LORA = "headwater train, R-LoRA", "TRL SFTTrainer, R-LoRA", "TRL SFTTrainer, PEFT LoRA"


def where(device: str) -> dict[str, Any]:
    """Trainer's arguments for a device; on a GPU under autocast, as people train there."""
    return {"use_cpu": True, "bf16": False} if device == "cpu" else {"bf16": True}


def batching(options: Any) -> dict[str, Any]:
    """How headwater's trainer is to make its batches."""
    return {"auto": {}, "packed": {"padding_free": True}, "padded": {"padding_free": False}}[options.batches]


def run_file(folder: Path, options: Any, tasks: list[dict[str, Any]]) -> Any:
    """The demo's mixture as a run of `headwater train`, without rows to score."""
    training = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "logging_steps": 10,
        **QUIET,
        **where(options.device),
        **batching(options),
    }
    method = {
        "name": "rlora",
        "r": options.r,
        "num_heads": options.num_heads,
        "lora_alpha": 16,
        "head_dropout": DROPOUT,
        "target_modules": models.MLP,
    }
    parts = {
        "model_name_or_path": options.model,
        "model": {"dtype": options.dtype},
        "method": method,
        "tasks": [{"name": task["name"], "train": task["train"]} for task in tasks],
        "mixture": {"strategy": "proportional"},
        "data": {"max_length": MAX_LENGTH, "on_too_long": "truncate_prompt"},
        "training": training,
        "output_dir": str(folder / "run"),
    }
    from headwater.marked_yaml import dump

    path = folder / "run.yaml"
    path.write_text(dump(parts), encoding="utf-8")
    return load_config(path)


# -- one step under one trainer


def trainer_of(
    model: Any, rows: dict[str, list[Encoded]], config: Any, pad: int, folder: Path, options: Any
) -> HeadwaterTrainer:
    known = {
        "max_steps": 1,
        "per_device_train_batch_size": options.batch,
        **QUIET,
        **where(options.device),
        **batching(options),
    }
    args = HeadwaterArguments(output_dir=str(folder), **known)
    return HeadwaterTrainer(model, args, train=rows, pad_token_id=pad, mixture=mixture_of(config, options.batch))


def training_step(trainer: HeadwaterTrainer, batches: Sequence[dict[str, Any]]) -> Callable[[], None]:
    """Trains on the next batch, as Trainer does; only the optimiser is missing where nothing is trained."""
    model: Any = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = trainer.create_optimizer() if trained else None
    turn = iter(range(10**9))

    def run() -> None:
        batch = dict(batches[next(turn) % len(batches)])
        trainer.training_step(model, batch, torch.tensor(trainer.args.per_device_train_batch_size))
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def compare_steps(base: Any, rows: dict[str, list[Encoded]], config: Any, pad: int, options: Any) -> dict[str, Any]:
    r, N = options.r, options.num_heads
    fields = {"r": r, "N": N, "dropout": DROPOUT, "num_tasks": len(rows)}
    built = {
        FLOOR: models.frozen(base),
        f"PEFT LoRA r={r}": models.peft_lora(base, r, DROPOUT),
        f"PEFT LoRA r={N * r}": models.peft_lora(base, N * r, DROPOUT),
        LOOP: models.public_loop(base, r=r, N=N, dropout=DROPOUT),
        **{layers.title_of(name): models.ours(base, name, **fields) for name in options.methods},
    }
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, model in built.items():
            model.train()
            # the gradient reaches the first layer in every variant, as the floor's must to be one
            model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
            trainers[name] = trainer_of(model, rows, config, pad, Path(folder), options)
        loader = trainers[FLOOR].get_train_dataloader()
        batches = [batch for batch, _ in zip(loader, range(options.rounds + WARMUP[options.device]), strict=False)]
        steps = {name: training_step(trainer, batches) for name, trainer in trainers.items()}
        how = {"warmup": WARMUP[options.device], "device": options.device, "seed": options.seed}
        seconds = measure.interleave(steps, rounds=options.rounds, **how)
        saved = {
            name: measure.saved_bytes(
                lambda t=trainer: t.compute_loss(t.model, dict(batches[0]), num_items_in_batch=options.batch),
                without=trainer.model,
            )
            for name, trainer in trainers.items()
        }
    tokens = [int(real_tokens(batch)) for batch in batches][WARMUP[options.device] :]
    ratio = measure.ratios(seconds, FLOOR)
    to_lora = measure.ratios(seconds, f"PEFT LoRA r={r}")
    return {
        "floor_seconds": measure.spread(seconds[FLOOR]),
        "tokens_per_step": measure.spread(tokens),
        "variants": {
            name: {
                "time": ratio[name],
                "tokens_per_second": sum(tokens) / sum(seconds[name]),
                "speed_to_peft_lora": 1 / to_lora[name]["median"],
                "saved_bytes": saved[name],
                "saved_to_floor": saved[name] / saved[FLOOR],
            }
            for name in built
        },
    }


# -- whole trainers


class Clock(TrainerCallback):
    """Tokens and time of a training run, from the end of its first step to the end of its last."""

    def __init__(self, device: str) -> None:
        self.device, self.tokens, self.slots = device, 0, 0
        self.started = self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.hook = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens += int(real_tokens(kwargs))
        self.slots += kwargs["input_ids"].numel()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.tokens, self.slots, self.started = 0, 0, measure.clock(self.device)
        self.seconds = measure.clock(self.device) - self.started

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()


@contextlib.contextmanager
def clocked(device: str) -> Iterator[Clock]:
    """Every Trainer made inside carries the clock: `headwater train` takes no callbacks."""
    clock = Clock(device)
    known = transformers.trainer.DEFAULT_CALLBACKS
    transformers.trainer.DEFAULT_CALLBACKS = [*known, clock]  # type: ignore[list-item]
    try:
        yield clock
    finally:
        transformers.trainer.DEFAULT_CALLBACKS = known


def train_with_headwater(config: Any) -> None:
    from headwater.training import train

    config = config.model_copy(update={"training": {**config.training, "overwrite_output_dir": True}})
    train(config, console=Console(file=io.StringIO()))


def train_with_trl(model: Any, rows: list[Encoded], tokenizer: Any, folder: Path, seed: int, options: Any) -> None:
    """SFTTrainer on rows that are encoded already, in the columns that it makes itself; the collation is its own.

    Two of its defaults are changed, to headwater's: gradient checkpointing is off, and on a CPU bf16.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        logging_steps=10,
        gradient_checkpointing=False,
        max_length=None,
        seed=seed,
        **QUIET,
        **where(options.device),
    )
    SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()


def compare_trainers(
    base: Any, rows: dict[str, list[Encoded]], config: Any, tokenizer: Any, options: Any
) -> dict[str, Any]:
    r, N = options.r, options.num_heads
    every = [row for task in rows.values() for row in task]
    speeds: dict[str, list[float]] = {OURS: [], TRL_OURS: [], TRL_LORA: []}
    useful: dict[str, list[float]] = {name: [] for name in speeds}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rlora = models.ours(base, "rlora", r=r, N=N, dropout=DROPOUT, num_tasks=len(rows))
            lora = models.peft_lora(base, r, DROPOUT)
            again = config.model_copy(update={"seed": repeat})
            trl = {"rows": every, "tokenizer": tokenizer, "folder": Path(folder), "seed": repeat, "options": options}
            runs: dict[str, Callable[[], None]] = {
                OURS: lambda c=again: train_with_headwater(c),
                TRL_OURS: lambda m=rlora, t=trl: train_with_trl(m, **t),
                TRL_LORA: lambda m=lora, t=trl: train_with_trl(m, **t),
            }
            for name, run in runs.items():
                with clocked(options.device) as clock, contextlib.redirect_stdout(io.StringIO()):
                    run()
                speeds[name].append(clock.tokens / clock.seconds)
                useful[name].append(clock.tokens / clock.slots)
    faster = [ours / trl for ours, trl in zip(speeds[OURS], speeds[TRL_OURS], strict=True)]
    return {
        "steps": options.steps,
        "headwater_to_trl": measure.spread(faster),
        "trainers": {
            name: {
                "useful_tokens_per_second": measure.spread(speeds[name]),
                "share_of_useful_tokens": measure.spread(useful[name]),
            }
            for name in speeds
        },
    }


def show(steps: dict[str, Any], trainers: dict[str, Any] | None, batch: int) -> None:
    floor = steps["floor_seconds"]["median"]
    title = f"one training step of {batch} rows\nfloor: frozen model, forward + backward, {floor:.2f} s"
    rows = [
        [
            name,
            measure.show_ratio(v["time"]),
            f"{v['speed_to_peft_lora']:.2f}",
            f"{v['saved_bytes'] / 2**20:.0f}",
            f"{v['saved_to_floor']:.2f}",
        ]
        for name, v in steps["variants"].items()
    ]
    columns = ["", "time / floor, median (min-max)", "speed / PEFT LoRA's", "saved MiB", "saved / floor"]
    measure.print_table(title, columns, rows)
    if trainers is None:
        return
    rows = []
    for name, v in trainers["trainers"].items():
        speed, useful = v["useful_tokens_per_second"], v["share_of_useful_tokens"]
        rows.append([name, f"{speed['median']:.0f} ({speed['min']:.0f}-{speed['max']:.0f})", f"{useful['median']:.1%}"])
    ratio = measure.show_ratio(trainers["headwater_to_trl"])
    title = f"{trainers['steps']} steps of {batch} rows; headwater train / SFTTrainer, both R-LoRA: {ratio}"
    measure.print_table(title, ["", "useful tokens/s, median (min-max)", "not padding"], rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "", rounds=7)
    parser.add_argument("--model", default=str(models.demo_model()), help="a language model; the demo's by default")
    parser.add_argument("--methods", nargs="*", default=layers.method_names(), help="methods to run, by name")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="rows of a batch")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the base model",
    )
    parser.add_argument(
        "--batches",
        choices=("auto", "packed", "padded"),
        default="auto",
        help="of headwater's trainer (padding_free)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=25, help="steps of a run of each trainer")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each trainer; 0 leaves them out")
    parser.add_argument("--tasks", type=Path, default=cache_dir() / "demo" / "tasks", help="folder of task folders")
    options = parser.parse_args(argv)
    measure.prepare(options)
    warnings.filterwarnings("ignore", message=".*head dropout on heads of this starting size")
    transformers.utils.logging.set_verbosity_error()
    tasks = [{"name": path.name, "train": str(path / "train.jsonl")} for path in sorted(options.tasks.iterdir())]
    with tempfile.TemporaryDirectory() as folder:
        config = run_file(Path(folder), options, tasks)
        base, tokenizer = load_base_model(options.model, dtype=options.dtype)
        base = base.to(options.device)
        loaded = load_tasks([TaskSpec(**task) for task in tasks], Path.cwd())
        rows = {task.name: encode_rows(task.train, tokenizer, config.data, task.index)[0] for task in loaded}
        pad = tokenizer.pad_token_id
        steps = compare_steps(base, rows, config, pad, options)
        trainers = compare_trainers(base, rows, config, tokenizer, options) if options.repeats else None
    show(steps, trainers, options.batch)
    results = {"environment": measure.environment(options, options.device), "steps": steps, "trainers": trainers}
    measure.write(options.json, results)
    return results


if __name__ == "__main__":
    main()
