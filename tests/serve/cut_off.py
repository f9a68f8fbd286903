"""A Python that ends while its engine is inside of an operation of PyTorch."""

from __future__ import annotations

import threading

import torch
from tiny_models import make_tiny_tokenizer

from headwater.serve import Engine, Route, Sampling

from .engines import Plain, make_prompts


def main() -> None:
    began, large = threading.Event(), torch.ones(2000, 2000, dtype=torch.float64)

    def work(rows: int) -> None:
        began.set()
        large @ large

    engine = Engine(Plain(), make_tiny_tokenizer(), on_step=work)
    for prompt in make_prompts(20):  # some are being answered, some wait
        engine.submit(prompt, Route("plain"), Sampling(400), lambda piece: None)
    began.wait()


if __name__ == "__main__":
    main()
