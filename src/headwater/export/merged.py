"""The base model with the adapter in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_merged(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Merges the adapter and writes the model as safetensors, with its tokenizer. `model` is used up.

    Args:
        model: a `PeftModel` whose method merges; headwater's or PEFT's own.

    Raises:
        NotMergeable: if no single weight equals an adapted layer.
        HeadwaterError: if the base is quantised, an adapted layer shares its weight with the embeddings, or the result
            is not finite.
    """
    embeddings = model.get_base_model().get_input_embeddings().weight
    shared = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and getattr(module.get_base_layer(), "weight", None) is embeddings
    ]
    if shared:
        raise HeadwaterError(
            *(
                Problem(
                    f"{name.removeprefix('base_model.model.')} shares its weight with the input embeddings, which "
                    "merging would change, too",
                    fix="leave --merge out and keep the adapter beside the model",
                )
                for name in shared
            )
        )
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
