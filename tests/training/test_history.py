"""`history.jsonl`, when something has damaged it."""

import re

import pytest

from headwater.errors import HeadwaterError
from headwater.training.history import History


@pytest.mark.parametrize(
    "damage", [b"\x8a\x01", b'{"kind": "eval", "step"', b"[]", b'{"kind": "eval"}', b'{"kind": "eval", "step": null}']
)
def test_a_damaged_line_is_named(tmp_path, damage):
    history = History(tmp_path / "history.jsonl")
    history.append({"kind": "train", "step": 1})
    with history.path.open("ab") as file:
        file.write(damage)
    assert [line["step"] for line in history.lines()] == [1]  # the last line may be torn
    with history.path.open("ab") as file:
        file.write(b"\n")
    before = history.path.read_bytes()
    for read in (history.lines, history.start, lambda: history.scores(1, {})):
        with pytest.raises(HeadwaterError, match=re.escape(f"{history.path}:2: this line is damaged")):
            read()
    assert history.path.read_bytes() == before
