"""Base models: from the hub, from a local folder, or from a GGUF file that is turned into safetensors once.

Weights are only ever read from safetensors or GGUF; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HeadwaterError, Problem
from .files import open_to_readers
from .paths import expanded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def cache_dir() -> Path:
    """The folder for what can be made again: ``$HEADWATER_CACHE``, else ``~/.cache/headwater``. May not exist yet.

    Raises:
        HeadwaterError: ``$HEADWATER_CACHE`` begins with a home folder that nobody has.
    """
    chosen = os.environ.get("HEADWATER_CACHE")
    return expanded(chosen, "HEADWATER_CACHE") if chosen else Path.home() / ".cache" / "headwater"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_base_model(
    name_or_path: str,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: Any = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a hub id, a local folder in the transformers layout, or a ``.gguf`` file. A GGUF file is
            dequantised to float32 safetensors under `cache_dir` the first time and loaded from there afterwards.
        dtype: ``auto`` (as stored; float32 for GGUF), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run model code that comes with a hub repository or folder.
        device_map: handed to transformers; None loads on the CPU.
        attn_implementation: handed to transformers; None lets it choose.

    Returns:
        The model in eval mode and the tokenizer. The tokenizer always has a pad token (the end-of-sequence token where
        it had none), so padding must be masked by length, never by id. Embeddings are never resized.

    Raises:
        HeadwaterError: missing or unusable file or folder, unreachable hub, broken GGUF, missing ``gguf`` package, or
            an unknown `dtype`.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise HeadwaterError(Problem(f"unknown dtype {dtype!r}", "model.dtype", f"one of: {', '.join(DTYPES)}"))
    source = _resolve(name_or_path)
    tokenizer = _load_tokenizer(source, trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            attn_implementation=attn_implementation,
            use_safetensors=True,
        )
    except Exception as error:
        raise _explained(error, source) from error
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    return model, tokenizer


def load_to_run(
    name_or_path: str, device: torch.device, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_base_model` for whoever runs the model and does not only look at its weights: it goes to `device`.

    Without a `device_map` in `options`, that is; and a quantised model may be on its GPU already.
    """
    model, tokenizer = load_base_model(name_or_path, **options)
    if options.get("device_map") is None and model.device.type == "cpu":
        model.to(device)  # type: ignore[arg-type]
    return model, tokenizer


def own_device(*, use_cpu: bool = False) -> torch.device:
    """This process's GPU, as Trainer takes it, else the CPU.

    Apple's GPUs are left alone: they have no float64, in which losses are summed up and tokens drawn.
    """
    import torch

    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _contiguous(_head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """transformers gives the vocabulary head a strided view of each prompt's last position, which torch on the CPU
    multiplies row by row: 2 to 5 times slower in float32, over 100 times in bfloat16."""
    return (args[0].contiguous(), *args[1:])


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of what `load_base_model` would load. Its arguments, result and errors are the same."""
    return _load_tokenizer(_resolve(name_or_path), trust_remote_code)


def shape_of(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A base model on the meta device: its layers and their sizes, no weights.

    Raises:
        HeadwaterError: there is no such model, or its config cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = _resolve(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HeadwaterError(Problem(f"the base model's config cannot be loaded: {reason}", name)) from error


def dequantise_gguf(path: Path, cache: Path | None = None) -> Path:
    """The folder with a GGUF file's model as float32 safetensors, and its tokenizer; made on first use.

    Args:
        path: a GGUF file of a causal language model that transformers knows.
        cache: where the folder goes, under ``gguf/``; `cache_dir` by default. Its name holds the hash of the file's
            content, so the file may move. It appears only when it is whole.

    Raises:
        HeadwaterError: not a GGUF file, one that is cut short or unknown, or no ``gguf`` package.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise HeadwaterError(
                Problem("not a GGUF file", str(path), "give a hub id, a model folder, or a .gguf file that is complete")
            )
    target = (cache or cache_dir()) / "gguf" / f"{path.stem}-{sha256_of(path)[:16]}"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise HeadwaterError(
            Problem("reading a GGUF file needs the gguf package", str(path), "pip install 'headwater[gguf]'")
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
            work = Path(beside) / target.name  # within, because Python makes temporary folders for their owner alone
            work.mkdir()
            _dequantise(path, work)
            open_to_readers(work)
            try:
                work.rename(target)
            except OSError:
                # Another process finished the same file first; its folder has the same content.
                if not (target / "config.json").is_file():
                    raise
    except HeadwaterError:
        raise
    except Exception as error:
        reason = f"could not dequantise this GGUF file: {error or type(error).__name__}"
        fix = f"fetch the file again if it is cut short; make sure {target.parent} has room for the float32 weights"
        raise HeadwaterError(Problem(reason, str(path), fix)) from error
    return target


def _load_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _explained(error, source) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise HeadwaterError(Problem("the tokenizer has neither a pad token nor an end-of-sequence token", source))
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _resolve(name_or_path: str) -> str:
    """A hub id unchanged, or the path of a folder that transformers can load."""
    path = expanded(name_or_path, name_or_path)
    if not os.path.exists(path):  # Path.exists raises on long names
        if name_or_path.startswith((".", "/", "~")) or name_or_path.endswith(".gguf") or name_or_path.count("/") > 1:
            raise HeadwaterError(Problem("no such file or folder", name_or_path, f"looked for {path.absolute()}"))
        return name_or_path
    if path.is_file():
        return str(dequantise_gguf(path))
    if not (path / "config.json").is_file():
        fix = "give the folder that holds config.json, the tokenizer and *.safetensors"
        if (path / "adapter_config.json").is_file():
            fix = "this is an adapter; give its base model here"
        raise HeadwaterError(Problem("no config.json in this folder", str(path), fix))
    return str(path)


def _explained(error: Exception, source: str) -> HeadwaterError:
    """Say in one screen why transformers could not load `source`."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if Path(source).exists():
        weights = [*Path(source).glob("*.safetensors"), *Path(source).glob("*.safetensors.index.json")]
        fix = "" if weights else "there is no *.safetensors here; save the model with save_pretrained() first"
        return HeadwaterError(Problem(f"could not load the model: {reason}", source, fix))
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    fix = "check the name and the connection (`hf auth login` for a gated model), or give a local folder or a GGUF file"
    if offline:
        fix = "HF_HUB_OFFLINE is set, so nothing is fetched: give a local folder or a GGUF file, or unset it"
    return HeadwaterError(Problem(f"could not load the model from the hub: {reason}", source, fix))


def _dequantise(path: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parent = str(path.parent.resolve())
    tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=path.name)
    # A transformers too old for GgufConfig always unpacks to dense weights.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    model = AutoModelForCausalLM.from_pretrained(parent, gguf_file=path.name, dtype=torch.float32, **options)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
