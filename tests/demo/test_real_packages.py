"""The demo's real texts, downloaded: `HEADWATER_DOWNLOAD=1 pytest tests/demo/test_real_packages.py`."""

from __future__ import annotations

import os

import pytest

from headwater.data.tasks import TaskSpec, load_tasks, majority, overlap
from headwater.demo import prepare
from headwater.demo.splits import text_key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("HEADWATER_DOWNLOAD") != "1", reason="set HEADWATER_DOWNLOAD=1: fetches 50 MB"),
]


def test_the_real_tasks_keep_their_promises(tmp_path):
    found = prepare(tmp_path, progress=print, with_model=False)
    tasks = load_tasks([TaskSpec(**entry) for entry in found.tasks], tmp_path)
    assert len(tasks) >= 5
    for task in tasks:
        assert len(task.test) >= 200
        assert len(task.train) >= 800
        assert len(task.validation) >= 100
        assert overlap(task) == 0
        keys = [text_key(row.prompt) for part in (task.train, task.validation, task.test) for row in part]
        assert len(keys) == len(set(keys))
        assert majority(task.test, task.metric) == pytest.approx(found.majority[task.name])
        # No class is favoured by more than what one short class (grain, in Reuters) leaves over.
        assert majority(task.test, task.metric) <= 1.1 / len(task.test[0].choices)
        assert max(len(row.prompt.split()) for row in task.train + task.test) < 60
