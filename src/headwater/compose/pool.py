"""A folder of LoRA adapters that share a base model.

POOL/base.json                    the base model's name and fingerprint
POOL/pool.json                    the adapters: hashes of their files, sample texts, where they came from
POOL/adapters/<name>/             adapter_config.json and adapter_model.safetensors, as PEFT reads them
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..base_model import load_base_model, sha256_of
from ..errors import HeadwaterError, Problem
from ..files import NotWritten, saying_why, write_json
from ..paths import expanded
from .adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter, read_config
from .base import BaseFingerprint

if TYPE_CHECKING:
    from torch import nn

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
WAYS = ("base", "own", "uniform", "selection", "mixture", "fusion", "arrow")
"""Ways to use a pool's adapters, beside an adapter by its name."""
_IN_REQUESTS = ("auto", "base")
_INDEX, _BASE, _ADAPTERS, _LOCK = "pool.json", "base.json", "adapters", ".lock"
_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_PATIENCE = 60.0  # seconds to wait for another process that changes the pool

_Model = TypeVar("_Model", bound=BaseModel)


class Entry(BaseModel):
    """One adapter of a pool.

    Args:
        sha256: of its files, by name.
        rank: the largest rank that it has on a layer.
        layers: number of layers that it adapts.
        parameters: numbers that it holds.
        trained_on: the base model that its own config names.
        samples: texts of the kind that it was trained on, by which requests find it.
    """

    model_config = ConfigDict(extra="forbid")

    sha256: dict[str, str]
    rank: int = Field(ge=1)
    layers: int = Field(ge=1)
    parameters: int = Field(ge=1)
    trained_on: str = ""
    samples: list[str] = Field(default_factory=list)


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")
    schema_version: int = Field(1, alias="schema", ge=1, le=1)
    adapters: dict[str, Entry] = Field(default_factory=dict)


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    fingerprint: BaseFingerprint


class AdapterPool:
    """The adapters of a pool folder; `create` makes one, `AdapterPool(folder)` opens it.

    Attributes:
        path: the folder.
        base_model: hub id, folder or GGUF file of the base model.
        fingerprint: what that model looks like.
        entries: name -> `Entry`, in the order in which they were added.

    Raises:
        HeadwaterError: there is no pool in the folder, or its index is damaged.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        if not (self.path / _INDEX).is_file():
            fix = "headwater pool create makes one"
            raise HeadwaterError(Problem("there is no adapter pool in this folder", str(folder), fix))
        base = _read(self.path / _BASE, _Base)
        self.base_model, self.fingerprint = base.name, base.fingerprint
        self.entries = _read(self.path / _INDEX, _Index).adapters
        # Adapters could once be named after the other ways: such a pool can be opened, and the adapter be taken out.
        problems = [p for name in self.entries for p in _name_problems(name, (), _IN_REQUESTS)]
        if problems:
            raise HeadwaterError(*problems)

    @classmethod
    def create(cls, folder: str | Path, base_model: str, model: nn.Module | None = None) -> AdapterPool:
        """Make an empty pool.

        Args:
            folder: made if missing; must be empty.
            base_model: hub id, folder or GGUF file.
            model: that model, if it is loaded already.

        Raises:
            HeadwaterError: the folder is not empty, or the model cannot be loaded.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise HeadwaterError(Problem("this is there already and not an empty folder", str(path)))
        if model is None:
            model, _ = load_base_model(base_model)
        fingerprint = BaseFingerprint.of(model)
        where = expanded(base_model, base_model)
        name = str(where.resolve()) if where.exists() else base_model
        try:
            with saying_why(path):
                (path / _ADAPTERS).mkdir(parents=True, exist_ok=True)
            write_json(path / _BASE, _Base(name=name, fingerprint=fingerprint).model_dump(mode="json"))
            write_json(path / _INDEX, _Index(schema=1).model_dump(mode="json", by_alias=True))
        except NotWritten:
            # or the folder would not be empty when there is room and it is tried again
            (path / _BASE).unlink(missing_ok=True)
            shutil.rmtree(path / _ADAPTERS, ignore_errors=True)
            raise
        return cls(path)

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added."""
        return list(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Entry:
        self.require(name)
        return self.entries[name]

    def require(self, *names: str) -> None:
        """Check that the pool has these adapters.

        Raises:
            HeadwaterError: it lacks some.
        """
        fix = f"it has {', '.join(self.entries)}" if self.entries else "it is empty; headwater pool add fills it"
        missing = [name for name in names if name not in self.entries]
        if missing:
            raise HeadwaterError(*(Problem(f"the pool has no adapter {n!r}", str(self.path), fix) for n in missing))

    def folder(self, name: str) -> Path:
        """The adapter's folder, which PEFT can load as well."""
        self.require(name)
        return self.path / _ADAPTERS / name

    def load(self, name: str) -> Adapter:
        """Read an adapter, in the dtype in which it is stored.

        Raises:
            HeadwaterError: there is none, its files are not those that were added, or they are broken.
        """
        entry, folder = self[name], self.folder(name)
        problems = self._changed(name, entry)
        if problems:
            raise HeadwaterError(*problems)
        return read_adapter(folder, name, self.fingerprint.layers)

    def add(self, folder: str | Path, name: str, *, samples: Sequence[str] = (), same_base: bool = False) -> Entry:
        """Copy an adapter into the pool.

        Args:
            folder: a PEFT LoRA adapter.
            name: letters, digits, `.`, `_` and `-`; not `auto` or one of `WAYS`, which stand for other
                things.
            samples: texts of the kind that the adapter was trained on.
            same_base: take it that the adapter was trained on the pool's base model, whatever base model it names.

        Raises:
            HeadwaterError: all that is wrong with the name, the adapter or its base model.
        """
        problems = _name_problems(name, self.names)
        source = Path(folder)
        try:
            adapter = read_adapter(source, name, self.fingerprint.layers)
            trained_on = str(read_config(source).get("base_model_name_or_path") or "")
            problems += [] if same_base else self.base_problems(trained_on, source)
        except HeadwaterError as error:
            problems += error.problems
        if any(not isinstance(text, str) or not text.strip() for text in samples):
            problems.append(Problem("a sample text is empty", name))
        if problems:
            raise HeadwaterError(*problems)
        target = self.path / _ADAPTERS / name
        with saying_why(target):
            beside = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent)
        with beside:
            work = Path(beside.name) / name  # within, because Python makes temporary folders for their owner alone
            with saying_why(target):
                work.mkdir()
                for file in _FILES:
                    shutil.copyfile(source / file, work / file)
            entry = Entry(
                sha256={file: sha256_of(work / file) for file in _FILES},
                rank=max(factors.rank for factors in adapter.layers.values()),
                layers=len(adapter.layers),
                parameters=sum(f.A.numel() + f.B.numel() for f in adapter.layers.values()),
                trained_on=trained_on,
                samples=list(samples),
            )
            read_adapter(work, name, self.fingerprint.layers)  # what was copied is what was checked
            with self._alone():
                if problems := _name_problems(name, self.names):
                    raise HeadwaterError(*problems)
                shutil.rmtree(target, ignore_errors=True)  # left over from an addition that was cut short
                work.rename(target)
                try:
                    self._write({**self.entries, name: entry})
                except NotWritten:
                    shutil.rmtree(target, ignore_errors=True)
                    raise
        return entry

    def remove(self, name: str) -> None:
        """Take an adapter out of the pool and delete its copy.

        Raises:
            HeadwaterError: there is none of that name.
        """
        with self._alone():
            folder = self.folder(name)
            self._write({known: entry for known, entry in self.entries.items() if known != name})
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def check(self) -> list[Problem]:
        """Read everything and return all that is wrong: files missing, changed, broken, linked or unknown."""
        problems = []
        for name, entry in self.entries.items():
            found = self._changed(name, entry)
            try:
                read_adapter(self.folder(name), name, self.fingerprint.layers)
            except HeadwaterError as error:
                found += [p for p in error.problems if p not in found]
            problems += found
        there = self.path / _ADAPTERS
        for folder in sorted(there.iterdir()) if there.is_dir() else ():
            if folder.name not in self.entries:
                fix = "delete it, or add it with headwater pool add"
                problems.append(Problem("the pool does not list this", str(folder), fix))
            elif folder.is_dir() and not folder.is_symlink():
                strange = sorted(file for file in folder.iterdir() if file.name not in _FILES)
                problems += [Problem("this does not belong to an adapter", str(file), "delete it") for file in strange]
        return problems

    def _changed(self, name: str, entry: Entry) -> list[Problem]:
        problems = []
        folder = self.path / _ADAPTERS / name
        for file in _FILES:
            path = folder / file
            if any(part.is_symlink() for part in (folder.parent, folder, path)):
                problems.append(Problem("a pool follows no symbolic links", str(path), "add the adapter again"))
            elif not path.is_file():
                problems.append(Problem("this file is missing", str(path), "add the adapter again"))
            elif sha256_of(path) != entry.sha256.get(file):
                fix = "remove the adapter and add it again if the change was meant"
                problems.append(Problem("this file is not the one that was added", str(path), fix))
        return problems

    def base_problems(self, trained_on: str, source: Path) -> list[Problem]:
        """Whether the adapter's base model is the pool's: by name, else by looking at it where it lies here."""
        local = expanded(trained_on, str(source / CONFIG_FILE)) if trained_on else None
        if trained_on and (trained_on == self.base_model or (local and str(local.resolve()) == self.base_model)):
            return []
        where = str(source / CONFIG_FILE)
        if local is not None and local.exists():
            model, _ = load_base_model(trained_on)
            found = self.fingerprint.differences(BaseFingerprint.of(model))
            what = f"the adapter was trained on another base model, {trained_on}: {'; '.join(found)}"
            return [Problem(what, where, f"the pool's is {self.base_model}")] if found else []
        what = f"the adapter names {trained_on!r} as its base model, and the pool's is {self.base_model!r}"
        fix = "if both are the same model, add it with --same-base (in Python: same_base=True)"
        return [Problem(what, where, fix)]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process changes the pool meanwhile, and `entries` are those that are there now."""
        lock = FileLock(self.path / _LOCK, timeout=_PATIENCE)
        with saying_why(self.path / _LOCK):  # the pool may be somebody else's, to read only
            try:
                lock.acquire()
            except Timeout:
                what = f"another process has been changing this pool for {_PATIENCE:g} seconds"
                raise HeadwaterError(Problem(what, str(self.path), "try again when it has finished")) from None
        try:
            self.entries = _read(self.path / _INDEX, _Index).adapters
            yield
        finally:
            lock.release()

    def _write(self, entries: dict[str, Entry]) -> None:
        index = _Index(schema=1, adapters=entries)
        write_json(self.path / _INDEX, index.model_dump(mode="json", by_alias=True))
        self.entries = entries


def _name_problems(name: str, taken: Sequence[str], kept: Sequence[str] = (*_IN_REQUESTS, *WAYS)) -> list[Problem]:
    if not re.fullmatch(NAME, name):
        fix = "use letters, digits, '.', '_' and '-', at most 64, a letter or digit first"
        return [Problem(f"{name!r} cannot be an adapter's name", "", fix)]
    if name.lower() in kept:
        return [Problem(f"the name {name!r} stands for a way to use a pool's adapters", "", "choose another")]
    if name.lower() in (other.lower() for other in taken):
        return [Problem(f"the pool has an adapter {name!r} already", "", "remove it first, or choose another name")]
    return []


def _read(file: Path, kind: type[_Model]) -> _Model:
    try:
        return kind.model_validate_json(file.read_bytes())
    except OSError as error:
        raise HeadwaterError(Problem(f"not readable: {error}", str(file))) from None
    except ValidationError as error:
        places = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()[:5]]
        raise HeadwaterError(
            *(Problem(f"{place}: {text}" if place else text, str(file)) for place, text in places)
        ) from None
