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
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):  # PEFT's LoRA would merge into it with a warning
        what = "the base model is quantised, and merged weights would be rounded again"
        fix = "name an unquantised base model in its place, or leave --merge out and keep the adapter beside the model"
        raise HeadwaterError(Problem(what, base.name_or_path, fix))
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    shared = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and getattr(module.get_base_layer(), "weight", None) is embeddings.weight
        and (tied or module is not embeddings)
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
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except HeadwaterError:
        raise
    except ValueError as error:  # PEFT's own methods
        fix = "leave --merge out and keep the adapter beside the model, or train it anew if its numbers are broken"
        raise HeadwaterError(Problem(f"PEFT cannot merge this adapter: {error}", fix=fix)) from error
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
