"""What a step of each method of `headwater compare` costs: its time, and the most memory that a process takes for it.

    headwater compare examples/studies/small/methods.yaml
    python -m benchmarks.method_costs examples/studies/small/methods.yaml --study methods
    python -m benchmarks.study methods        # the page with these costs

Runs of a comparison may share a machine, and then their times mean nothing. Here each method trains for a few steps by
`headwater train`, in a process of its own and one after the other, in another order in each round. What is found goes
into `results/study-NAME.json`, whose methods, at equal parameters, are what is run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from .measure import RESULTS, device_name, write


def run_file(study: Path, entry: dict[str, Any], steps: int, output: Path) -> dict[str, Any]:
    """The study's file with one of its methods, without scores."""
    content = yaml.safe_load(study.read_text(encoding="utf-8"))
    given = content.pop("compare")["methods"]
    own = next((m for m in given if isinstance(m, dict) and m.get("label") == entry["label"]), {})
    for task in content["tasks"]:
        task["train"] = str((study.parent / task["train"]).resolve())
        del task["test"], task["validation"]
    content["method"] = entry["method"]
    content["mixture"] |= own.get("mixture", {})
    content |= {"align": own["align"]} if "align" in own else {}
    content["training"] |= {"max_steps": steps, "learning_rate": entry["learning_rate"], "save_strategy": "no"}
    return content | {"output_dir": str(output)}


def costs(content: dict[str, Any], folder: Path, threads: int) -> tuple[float, int]:
    """Seconds of a step, and the bytes that the process had in memory at most."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "out.txt").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "headwater", "train", str(file)], env=environment, stdout=out, stderr=out
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit((folder / "out.txt").read_text())
    result = json.loads((Path(content["output_dir"]) / "results.json").read_text(encoding="utf-8"))
    return result["train_seconds"] / result["steps"], used.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs of a comparison's methods, one after the other.")
    parser.add_argument("file", type=Path, help="the study's YAML file")
    parser.add_argument("--study", required=True, help="NAME of results/study-NAME.json")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    path = RESULTS / f"study-{options.study}.json"
    study = json.loads(path.read_text(encoding="utf-8"))
    (part,) = study["comparisons"]
    found: dict[str, list[tuple[float, int]]] = {m["label"]: [] for m in part["methods"]}
    for number in range(options.rounds):
        for entry in random.Random(number).sample(part["methods"], len(part["methods"])):
            with tempfile.TemporaryDirectory() as folder:
                content = run_file(options.file, entry, options.steps, Path(folder) / "run")
                found[entry["label"]].append(costs(content, Path(folder), options.threads))
            print(number, entry["label"], found[entry["label"]][-1], flush=True)
    for entry in part["methods"]:
        seconds, memory = zip(*found[entry["label"]], strict=True)
        entry |= {"seconds_per_step": round(statistics.mean(seconds), 4), "peak_memory_bytes": max(memory)}
    part["costs"] = {
        "command": f"python -m benchmarks.method_costs {options.file.as_posix()} --study {options.study} "
        f"--steps {options.steps} --rounds {options.rounds}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device_name("cpu"),
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "each_round": {label: [list(one) for one in rounds] for label, rounds in found.items()},
    }
    write(path, study)


if __name__ == "__main__":
    main()
