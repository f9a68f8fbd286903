"""What watching the gates costs a training step: the monitor's own CPU time beside the steps that it watches.

python -m benchmarks.gate_monitor MODEL_FOLDER --method rlora --logging-steps 10
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from headwater import make_config
from headwater.analysis.gates import GateRecorder
from headwater.methods.call import Call
from headwater.training.gate_monitor import GateMonitor
from headwater.tuner import Context

FIELDS: dict[str, dict[str, Any]] = {
    "rlora": {"r": 8, "num_heads": 3, "lora_alpha": 2},
    "moe_lora": {"r": 4, "num_experts": 8, "top_k": 2},
    "smora": {"r": 64, "top_k": 8},
}
OWN = [
    *((GateMonitor, name) for name in ("step_begins", "batch_ends", "close_window", "look_back")),
    (GateRecorder, "_see"),
    (Call, "saw_gate"),
    (Context, "carry_through_checkpoints"),
]


class Clock:
    """Adds up the CPU time of wrapped functions; one inside another counts once."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def wrap(self, owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return plain(*args, **kwargs)
            self._inside, began = True, time.process_time()
            try:
                return plain(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += time.process_time() - began

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--method", default="rlora", choices=FIELDS)
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = make_config(args.method, target_modules=targets, task_type="CAUSAL_LM", **FIELDS[args.method])
    model = get_peft_model(base, config).train()
    ids = torch.randint(0, base.config.vocab_size, (args.rows, args.length))
    clock, monitor = Clock(), GateMonitor(model)
    for owner, name in OWN:
        clock.wrap(owner, name)

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        model.zero_grad()

    step()
    clock.seconds, began = 0.0, time.process_time()
    for n in range(args.steps):
        monitor.step_begins(n)
        step()
        monitor.batch_ends()
        if (n + 1) % args.logging_steps == 0:
            monitor.close_window()
            monitor.look_back(n + 1)
    total = time.process_time() - began
    print(
        f"{args.method}, {args.rows} x {args.length} tokens, a log every {args.logging_steps} of {args.steps} steps: "
        f"{total / args.steps:.3f} s a step, of which the monitor {1e3 * clock.seconds / args.steps:.2f} ms, "
        f"{clock.seconds / total:.2%}"
    )


if __name__ == "__main__":
    main()
