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
from headwater.training.run import mixture_of

from . import layers, measure, models
from .layers import FLOOR, LOOP

MAX_LENGTH, DROPOUT = 256, 0.1
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
OURS, TRL_OURS, TRL_LORA = "headwater train, R-LoRA", "TRL SFTTrainer, R-LoRA", "TRL SFTTrainer, PEFT LoRA"


def run_file(
    folder: Path, *, r: int, N: int, steps: int, batch: int, dtype: str, model: str, tasks: list[dict[str, Any]]
) -> Any:
    """The demo's mixture as a run of `headwater train`, without rows to score."""
    training = {"max_steps": steps, "per_device_train_batch_size": batch, "logging_steps": 10, **QUIET}
    method = {
        "name": "rlora",
        "r": r,
        "num_heads": N,
        "lora_alpha": 16,
        "head_dropout": DROPOUT,
        "target_modules": models.MLP,
    }
    parts = {
        "model_name_or_path": model,
        "model": {"dtype": dtype},
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
    model: Any, rows: dict[str, list[Encoded]], config: Any, pad: int, folder: Path, batch: int
) -> HeadwaterTrainer:
    args = HeadwaterArguments(output_dir=str(folder), max_steps=1, per_device_train_batch_size=batch, **QUIET)
    return HeadwaterTrainer(model, args, train=rows, pad_token_id=pad, mixture=mixture_of(config, batch))


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
            trainers[name] = trainer_of(model, rows, config, pad, Path(folder), options.batch)
        loader = trainers[FLOOR].get_train_dataloader()
        batches = [batch for batch, _ in zip(loader, range(options.rounds + 1), strict=False)]
        steps = {name: training_step(trainer, batches) for name, trainer in trainers.items()}
        seconds = measure.interleave(steps, rounds=options.rounds, warmup=1, seed=options.seed)
        saved = {
            name: measure.saved_bytes(
                lambda t=trainer: t.compute_loss(t.model, dict(batches[0]), num_items_in_batch=options.batch),
                without=trainer.model,
            )
            for name, trainer in trainers.items()
        }
    tokens = [int(batch["attention_mask"].sum()) for batch in batches][1 : options.rounds + 1]
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

    def __init__(self) -> None:
        self.tokens = self.slots = 0
        self.started = self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.hook = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens += int(kwargs["attention_mask"].sum())
        self.slots += kwargs["attention_mask"].numel()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.tokens, self.slots, self.started = 0, 0, measure.clock("cpu")
        self.seconds = measure.clock("cpu") - self.started

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()


@contextlib.contextmanager
def clocked() -> Iterator[Clock]:
    """Every Trainer made inside carries the clock: `headwater train` takes no callbacks."""
    clock = Clock()
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


def train_with_trl(
    model: Any, rows: list[Encoded], tokenizer: Any, steps: int, folder: Path, seed: int, batch: int
) -> None:
    """SFTTrainer on rows that are encoded already, in the columns that it makes itself; the collation is its own.

    Two of its defaults are changed, to headwater's: bf16 (which this CPU emulates) and gradient checkpointing are off.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        logging_steps=10,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        seed=seed,
        **QUIET,
    )
    SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()


def compare_trainers(
    base: Any, rows: dict[str, list[Encoded]], config: Any, tokenizer: Any, options: Any
) -> dict[str, Any]:
    r, N, steps = options.r, options.num_heads, config.training["max_steps"]
    every = [row for task in rows.values() for row in task]
    speeds: dict[str, list[float]] = {OURS: [], TRL_OURS: [], TRL_LORA: []}
    useful: dict[str, list[float]] = {name: [] for name in speeds}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rlora = models.ours(base, "rlora", r=r, N=N, dropout=DROPOUT, num_tasks=len(rows))
            lora = models.peft_lora(base, r, DROPOUT)
            again = config.model_copy(update={"seed": repeat})
            trl = {"rows": every, "tokenizer": tokenizer, "steps": steps, "folder": Path(folder)}
            trl |= {"seed": repeat, "batch": options.batch}
            runs: dict[str, Callable[[], None]] = {
                OURS: lambda c=again: train_with_headwater(c),
                TRL_OURS: lambda m=rlora, t=trl: train_with_trl(m, **t),
                TRL_LORA: lambda m=lora, t=trl: train_with_trl(m, **t),
            }
            for name, run in runs.items():
                with clocked() as clock, contextlib.redirect_stdout(io.StringIO()):
                    run()
                speeds[name].append(clock.tokens / clock.seconds)
                useful[name].append(clock.tokens / clock.slots)
    faster = [ours / trl for ours, trl in zip(speeds[OURS], speeds[TRL_OURS], strict=True)]
    return {
        "steps": steps,
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
        help="of the base model; bfloat16 with eager attention",
    )
    parser.add_argument("--steps", type=int, default=25, help="steps of a run of each trainer")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each trainer; 0 leaves them out")
    parser.add_argument("--tasks", type=Path, default=cache_dir() / "demo" / "tasks", help="folder of task folders")
    options = parser.parse_args(argv)
    measure.prepare(options)
    warnings.filterwarnings("ignore", message=".*head dropout on heads of this starting size")
    transformers.utils.logging.set_verbosity_error()
    tasks = [{"name": path.name, "train": str(path / "train.jsonl")} for path in sorted(options.tasks.iterdir())]
    with tempfile.TemporaryDirectory() as folder:
        config = run_file(
            Path(folder),
            r=options.r,
            N=options.num_heads,
            steps=options.steps,
            batch=options.batch,
            dtype=options.dtype,
            model=options.model,
            tasks=tasks,
        )
        # PyTorch's fused attention is slow in bfloat16 on CPUs
        attention = {"attn_implementation": "eager"} if options.dtype == "bfloat16" else {}
        base, tokenizer = load_base_model(options.model, dtype=options.dtype, **attention)
        loaded = load_tasks([TaskSpec(**task) for task in tasks], Path.cwd())
        rows = {task.name: encode_rows(task.train, tokenizer, config.data, task.index)[0] for task in loaded}
        pad = tokenizer.pad_token_id
        steps = compare_steps(base, rows, config, pad, options)
        trainers = compare_trainers(base, rows, config, tokenizer, options) if options.repeats else None
    show(steps, trainers, options.batch)
    results = {"environment": measure.environment(options), "steps": steps, "trainers": trainers}
    measure.write(options.json, results)
    return results


if __name__ == "__main__":
    main()
