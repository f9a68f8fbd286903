"""Retrieval and composition on adapters that were really trained, one per task of the demo.

    python -m benchmarks.pool_quality --work DIR --json benchmarks/results/pool_quality.json    # again to go on

On CPUs with bfloat16 units `--dtype bfloat16 --attention eager` takes half the time.

Trains a small plain LoRA adapter per task (kept in DIR, so that a second run goes on from there): rank 2 on the last
15 layers' `down_proj`, 80 steps of 4 rows, the settings of `examples/meta.yaml`. Puts them into a pool with 20 sample
texts each, all from training rows, and scores held-out test rows:

- `retrieval`: how often it finds the adapter of a row's task first, and among the first three; also with the tasks'
  prompt templates ("Tweet: ...") taken off, which makes it a question of content;
- `known`: every way of composing, on the same rows;
- `new`: every task treated as new, its own adapter out of the pool: the ways again, and LoRA-Flow and LoRAHub fitted
  on some of its training rows; each way against the model without an adapter, row by row.

Nothing is chosen by looking at test rows: all settings are the defaults.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from headwater.base_model import load_base_model
from headwater.cli.pool import sample_texts
from headwater.compose import AdapterPool, PooledModel
from headwater.compose.arrow import Arrow
from headwater.compose.contrastive import ContrastiveSpec, fine_tune
from headwater.compose.encoder import load_encoder
from headwater.compose.flow import FlowGate, FlowSpec, train_gates
from headwater.compose.hub import HubSpec, search
from headwater.compose.retriever import Retriever
from headwater.compose.scoring import RETRIEVED, WAYS, Composition, score_way
from headwater.config import load_config
from headwater.data.encode import DataSpec, encode_rows
from headwater.data.tasks import Task, TaskSpec, load_tasks
from headwater.evaluation import EvaluationSpec, TaskScore, interval, score_tasks
from headwater.evaluation.forward import pad_id
from headwater.evaluation.scoring import sample
from headwater.training import train

from . import measure, models

SAMPLES = 20
LAYERS = list(range(15, 30))
PARTS = ("retrieval", "known", "new")
RUN = """\
model_name_or_path: {model}
model: {{dtype: float32}}
method: {{name: lora, r: 2, lora_alpha: 8, target_modules: [down_proj], layers_to_transform: {layers}}}
tasks: [{{name: {task}, train: {file}}}]
data: {{max_length: 256}}
training:
  max_steps: {steps}
  per_device_train_batch_size: 4
  learning_rate: 2e-3
  lr_scheduler_type: constant
  loss_normalization: example
  save_steps: 100000
  report_to: none
seed: {seed}
output_dir: {output}
"""


def train_adapters(folder: Path, tasks: Mapping[str, Path], options: Any) -> dict[str, Path]:
    """One run per task; those that are there already are kept."""
    adapters = {}
    for name, source in tasks.items():
        output = folder / "runs" / name
        adapters[name] = output / "adapter"
        if adapters[name].is_dir():
            continue
        output.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.yaml"
        fields = {"model": options.model, "task": name, "file": source / "train.jsonl", "output": output}
        file.write_text(RUN.format(**fields, layers=options.layers, steps=options.steps, seed=options.seed))
        train(load_config(file, ["training.overwrite_output_dir=true"]))
    return adapters


def make_pool(
    folder: Path, adapters: Mapping[str, Path], tasks: Sequence[Task], options: Any, model: Any
) -> AdapterPool:
    if (folder / "pool" / "pool.json").is_file():
        return AdapterPool(folder / "pool")
    pool = AdapterPool.create(folder / "pool", str(options.model), model)
    for task in tasks:
        texts = sample_texts(task.train, SAMPLES, options.seed)
        pool.add(adapters[task.name], task.name, samples=texts, same_base=True)
    return pool


def without_template(text: str) -> str:
    """A prompt of the demo without what its task puts around every text: "News: " before, "\\nSection:" behind."""
    return re.sub(r"^[A-Z][A-Za-z ]*: ", "", re.sub(r"\n[A-Z][a-z]+:$", "", text))


def retrieval(encoder: Any, samples: Mapping[str, Sequence[str]], rows: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Shares of rows whose own adapter is found first and among the first three, with 95 % intervals."""
    retriever = Retriever(encoder, samples)
    places = []
    for name, texts in rows.items():
        found = retriever.retrieve(texts, len(samples))
        places += [[other for other, _ in row].index(name) + 1 for row in found]
    result: dict[str, Any] = {"n": len(places)}
    for k in (1, 3):
        hits = [float(place <= k) for place in places]
        result[f"top-{k}"] = {"share": sum(hits) / len(hits), "interval": list(interval(hits))}
    return result


def all_retrieval(tasks: Sequence[Task], options: Any) -> dict[str, Any]:
    """Retrieval with and without templates, with the encoder as it comes and fine-tuned on the pool's samples."""
    found = {}
    for text, strip in (("prompts", lambda t: t), ("without templates", without_template)):
        samples = {t.name: [strip(x) for x in sample_texts(t.train, SAMPLES, options.seed)] for t in tasks}
        rows = {task.name: [strip(row.prompt) for row in task.test] for task in tasks}
        encoder = load_encoder()
        found[f"{text}, encoder as it comes"] = retrieval(encoder, samples, rows)
        fine_tune(encoder, samples, ContrastiveSpec(seed=options.seed))
        found[f"{text}, fine-tuned on the samples"] = retrieval(encoder, samples, rows)
    return found


def summary(scores: Mapping[str, TaskScore]) -> dict[str, Any]:
    """Per task and over all rows: score, n, 95 % interval."""
    correct = [value for score in scores.values() for value in score.correct]
    tasks = {s.task: {"value": s.value, "n": s.n, "interval": s.detail["interval"]} for s in scores.values()}
    return {"mean": sum(correct) / len(correct), "n": len(correct), "interval": list(interval(correct)), "tasks": tasks}


def won_and_lost(scores: TaskScore, base: TaskScore) -> dict[str, int]:
    """How many rows are right where the base model is wrong, and the other way round."""
    pairs = list(zip(scores.correct, base.correct, strict=True))
    return {"won": sum(a > b for a, b in pairs), "lost": sum(a < b for a, b in pairs)}


def new_task(found: Composition, task: Task, options: Any) -> dict[str, Any]:
    """A task whose own adapter is out of the pool: what the others make of it, fitted on its training rows or not.

    LoRA-Flow starts at the adapter that retrieval puts nearest to the task's sample texts, if none is named.
    """
    evaluation, data = EvaluationSpec(), DataSpec()
    assert found.retriever is not None
    texts = sample_texts(task.train, SAMPLES, options.seed)
    scores = dict(zip(found.retriever.names, found.retriever.scores(texts).mean(0).tolist(), strict=True))
    names = [name for name in found.pool.names if name != task.name]
    start = options.start or max(names, key=lambda name: scores[name])
    rows = encode_rows(task.train, found.tokenizer, data, 0)[0]
    fill, model = pad_id(found.tokenizer), found.pooled.model

    def score(ready: Any) -> Mapping[str, TaskScore]:
        with ready:
            return score_tasks(model, found.tokenizer, [task], evaluation, data, max_rows=options.rows)

    outside = Composition(found.pool, found.pooled, found.tokenizer, found.retriever, exclude_own=True)
    ways = {
        name: score_way(way, outside, [task], evaluation, data, max_rows=options.rows)
        for name, way in {"start": start, **{way: way for way in ("base", "own", *RETRIEVED)}}.items()
    }
    ways["uniform"] = score(found.pooled.rows([dict.fromkeys(names, 1 / len(names))]))
    ways["arrow"] = score(Arrow(found.pooled, found.pool, names).on())
    hub = search(found.pooled, names, rows, fill, HubSpec(seed=options.seed))
    ways["hub"] = score(found.pooled.all_rows(found.pooled.place(hub.adapter)))
    gate = FlowGate(found.pooled, names, start)
    spec = FlowSpec(examples=options.flow_examples, epochs=options.flow_epochs, seed=options.seed)
    losses = train_gates(gate, rows, fill, spec)
    ways["flow"] = score(gate.on())
    return {
        "start": start,
        "hub": {"weights": hub.weights, "optimiser": hub.optimiser, "objective": hub.objective},
        "flow": {"examples": spec.examples, "epochs": spec.epochs, "first": losses[0], "last": losses[-1]},
        "ways": {
            way: {**summary(scored), **won_and_lost(scored[task.name], ways["base"][task.name])}
            for way, scored in ways.items()
        },
    }


def together(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each way over the rows of all new tasks; p is of the exact McNemar test against the base model."""
    found = {}
    for way in next(iter(parts.values()))["ways"]:
        won, lost = (sum(part["ways"][way][what] for part in parts.values()) for what in ("won", "lost"))
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        tasks = {name: part["ways"][way]["tasks"][name] for name, part in parts.items()}
        hits = [float(i < round(task["value"] * task["n"])) for task in tasks.values() for i in range(task["n"])]
        mean = {"mean": sum(hits) / len(hits), "n": len(hits), "interval": list(interval(hits))}
        against = {"won": won, "lost": lost, "p": float(p)}
        found[way] = {**mean, **against, "tasks": {name: task["value"] for name, task in tasks.items()}}
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "")
    parser.add_argument("--work", type=Path, required=True, help="where adapters and the pool are kept")
    parser.add_argument(
        "--model", type=Path, default=models.demo_model(), help="a model's folder; the demo's by default"
    )
    parser.add_argument("--tasks", type=Path, default=None, help="folder of tasks; the demo's by default")
    parser.add_argument("--steps", type=int, default=80, help="training steps of each adapter, 4 rows each")
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS, help="layers to adapt")
    parser.add_argument("--only", nargs="*", default=None, help="leave out all other tasks")
    parser.add_argument("--rows", type=int, default=60, help="test rows of each task to score")
    parser.add_argument("--new-tasks", nargs="*", default=None, help="those to treat as new; all by default")
    parser.add_argument("--start", default=None, help="the adapter at which LoRA-Flow starts; the nearest by default")
    parser.add_argument("--flow-examples", type=int, default=200)
    parser.add_argument("--flow-epochs", type=int, default=1, help="the paper takes 5")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--dtype", default="float32", help="of the model when it is scored; adapters train in float32")
    parser.add_argument("--attention", default=None, help="transformers' attn_implementation")
    options = parser.parse_args(argv)
    measure.prepare(options)
    source = options.tasks or models.demo_model().parents[1] / "tasks"
    folders = {folder.name: folder for folder in sorted(source.iterdir()) if (folder / "train.jsonl").is_file()}
    folders = {name: folder for name, folder in folders.items() if not options.only or name in options.only}
    results: dict[str, Any] = {"environment": measure.environment(options)}
    if options.json is not None and options.json.is_file():  # a run that was cut short goes on
        earlier = json.loads(options.json.read_text())
        results = earlier if earlier["environment"] == results["environment"] else results

    def once(part: str, compute: Callable[[], Any], among: dict[str, Any] = results) -> None:
        if part not in among:
            among[part] = compute()
            measure.write(options.json, results)
            print(json.dumps({part: among[part]}), flush=True)

    options.work.mkdir(parents=True, exist_ok=True)
    specs = [
        TaskSpec(name=name, train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"))
        for name, folder in folders.items()
    ]
    tasks = load_tasks(specs, options.work)
    if "retrieval" in options.parts:
        once("retrieval", lambda: all_retrieval(tasks, options))
    if not {"known", "new"} & set(options.parts):
        return results
    adapters = train_adapters(options.work, folders, options)
    model, tokenizer = load_base_model(str(options.model), dtype=options.dtype, attn_implementation=options.attention)
    pool = make_pool(options.work, adapters, tasks, options, model)
    retriever = Retriever.of(pool, load_encoder())
    found = Composition(pool, PooledModel(model, pool.load), tokenizer, retriever)
    rows = {task.name: sample(task.test, options.rows) for task in tasks}
    once("chance", lambda: {n: sum(1 / len(row.choices) for row in part) / len(part) for n, part in rows.items()})

    def score(way: str) -> dict[str, Any]:
        return summary(score_way(way, found, tasks, EvaluationSpec(), DataSpec(), max_rows=options.rows))

    for way in WAYS if "known" in options.parts else ():
        once(way, functools.partial(score, way), results.setdefault("ways", {}))
    if "new" in options.parts:
        fresh = results.setdefault("new tasks", {})
        for task in (task for task in tasks if not options.new_tasks or task.name in options.new_tasks):
            once(task.name, functools.partial(new_task, found, task, options), fresh)
            results["new tasks together"] = together(fresh)
            measure.write(options.json, results)
        print(json.dumps(results["new tasks together"]))
    return results


if __name__ == "__main__":
    main()
