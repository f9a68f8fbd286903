"""What the bandit sees of a batch: the last-token hidden states of its prompts, centred, projected, and a constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headwater.evaluation.forward import accepts, base_of, input_device, pad, task_keywords

Matrix = NDArray[np.float64]


def prompt_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    fill: int,
    task_index: int | None = None,
    batch_size: int = 16,
) -> Matrix:
    """The last layer's hidden state at each prompt's last token: float64 `(prompts, hidden size)`.

    Call it inside `evaluating(model)`. Neither the batch size nor the padding has a say in the values.

    Args:
        prompts: token ids, at least one per prompt.
        fill: the id that padding is made of (masked).
        task_index: of the prompts, where the adapter goes by task.
    """
    found = np.empty((len(prompts), base_of(model).config.get_text_config().hidden_size))
    caught: list[Tensor] = []
    head = base_of(model).get_output_embeddings()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded = pad([prompts[i] for i in batch], fill).to(input_device(model))
        last = torch.tensor([len(prompts[i]) - 1 for i in batch])

        def keep(_module: nn.Module, args: tuple[Tensor, ...], last: Tensor = last) -> tuple[Tensor, ...]:
            states = args[0][torch.arange(len(last)), last.to(args[0].device)]
            caught.append(states)
            return (states[:, None], *args[1:])  # the head need not see the other positions

        handle = head.register_forward_pre_hook(keep)
        try:
            model(
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                **({"use_cache": False} if accepts(model, "use_cache") else {}),
                **task_keywords(model, task_index, len(batch)),
            )
        finally:
            handle.remove()
        found[batch] = caught.pop().cpu().double().numpy()  # Apple's GPUs have no float64
    return found


class Projection:
    """Centres hidden states on their mean over the training prompts and keeps their main directions.

    The states of a language model share one large direction, which tells prompts apart by little; without it, what is
    learned of one kind of prompt is not taken for all others. A constant stands in its place: with centred directions
    alone, what is good for one kind would count as bad for the opposite one, and what is good for all could not be
    said at all. Fitted once, so that contexts keep their meaning.

    Args:
        states: `(n, hidden size)`, from which mean and principal directions are taken.
        dim: so many directions; where the states span fewer, the rest are 0.
    """

    def __init__(self, states: Matrix, dim: int):
        self.mean = states.mean(0)
        _, lengths, directions = np.linalg.svd(states - self.mean, full_matrices=False)
        spanned = int((lengths > 1e-9 * max(lengths[0], 1e-300)).sum())
        kept = directions[: min(dim, spanned)]
        self.directions = np.zeros((dim, states.shape[1]))
        self.directions[: len(kept)] = kept

    @classmethod
    def restored(cls, mean: Matrix, directions: Matrix) -> Projection:
        """The projection that had these two."""
        projection = cls.__new__(cls)
        projection.mean, projection.directions = mean, directions
        return projection

    def __call__(self, states: Matrix) -> NDArray[np.float64]:
        """The context of a batch, `(dim + 1,)`, of length 1: the mean of its prompts' states, projected and brought to
        length 1, with a 1 behind it."""
        projected = self.directions @ (states.mean(0) - self.mean)
        context = np.append(projected / max(float(np.linalg.norm(projected)), 1e-300), 1.0)
        return context / np.linalg.norm(context)
