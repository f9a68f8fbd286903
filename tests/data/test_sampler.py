"""The sampler's promises: exact shares, even repetition, little padding, any epoch at will, and accelerate's shards."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import headwater.data.sampler as sampler_module
from headwater.data.mixture import MixtureSpec, apportion, shares
from headwater.data.sampler import MixtureBatchSampler
from headwater.errors import HeadwaterError

quick = settings(max_examples=60, deadline=None)

BATCHINGS = ["mixed", "balanced", "by_length", "homogeneous"]


@st.composite
def mixtures(draw, batchings=tuple(BATCHINGS)):
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any))
    parts = [draw(st.floats(0.1, 5)) if n else 0.0 for n in sizes]
    batch_size = draw(st.integers(1, 12))
    lengths = [np.random.default_rng(n).integers(1, 100, n).tolist() for n in sizes]
    batching = draw(st.sampled_from(batchings))
    tasks = sum(n > 0 for n in sizes)
    assume(-(-sum(sizes) // batch_size) >= tasks if batching == "homogeneous" else sum(sizes) >= tasks)
    return lengths, [p / sum(parts) for p in parts], batch_size, draw(st.integers(0, 5)), batching


def owner(lengths, index: int) -> int:
    """The task that a global row index belongs to, by counting."""
    for task, rows in enumerate(lengths):
        if index < len(rows):
            return task
        index -= len(rows)
    raise AssertionError(f"no such row: {index}")


def per_task(lengths, batches) -> list[int]:
    counts = Counter(owner(lengths, index) for batch in batches for index in batch)
    return [counts[task] for task in range(len(lengths))]


def epochs(sampler, count: int) -> list[list[list[int]]]:
    return [list(sampler) for _ in range(count)]


@quick
@given(mixtures())
def test_an_epoch_is_as_many_draws_as_rows_in_full_batches_but_the_last(mixture):
    sampler = MixtureBatchSampler(*mixture)
    lengths, _, batch_size, *_ = mixture
    total = sum(map(len, lengths))
    for batches in epochs(sampler, 2):
        sizes = [len(batch) for batch in batches]
        assert sum(sizes) == total
        assert len(sizes) == len(sampler) == -(-total // batch_size)
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)


@quick
@given(mixtures(["mixed", "by_length"]))
def test_realised_shares_are_the_apportionment_and_are_reported(mixture):
    lengths, given_shares, *_ = mixture
    sampler = MixtureBatchSampler(*mixture)
    reported = sampler.realised_shares()
    flat = [n for task in lengths for n in task]
    for batches in epochs(sampler, 3):
        counts = per_task(lengths, batches)
        assert counts == apportion(given_shares, len(flat)) == reported["rows"]
    assert sum(reported["row_shares"]) == pytest.approx(1)
    assert sum(reported["token_shares"]) == pytest.approx(1)


@quick
@given(mixtures(), st.integers(0, 40))
def test_shares_of_the_first_batches_of_a_run_are_counted(mixture, count):
    lengths = mixture[0]
    sampler = MixtureBatchSampler(*mixture)
    reported = sampler.realised_shares(count)
    batches = [batch for epoch in epochs(sampler, count // len(sampler) + 1) for batch in epoch][:count]
    flat = [n for task in lengths for n in task]
    tokens = [0] * len(lengths)
    for index in (i for batch in batches for i in batch):
        tokens[owner(lengths, index)] += flat[index]
    assert reported["rows"] == per_task(lengths, batches)
    assert reported["tokens"] == tokens


@quick
@given(mixtures())
def test_rows_of_a_task_repeat_evenly_over_epochs(mixture):
    lengths = mixture[0]
    sampler = MixtureBatchSampler(*mixture)
    seen = Counter(index for epoch in epochs(sampler, 5) for batch in epoch for index in batch)
    start = 0
    for rows in lengths:
        counts = [seen[start + i] for i in range(len(rows))]
        assert max(counts, default=0) - min(counts, default=0) <= 1
        start += len(rows)


@quick
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 12))
def test_proportional_epochs_show_every_row_once(sizes, batch_size):
    lengths = [[5] * n for n in sizes]
    sampler = MixtureBatchSampler(lengths, shares(sizes, [1.0] * len(sizes), MixtureSpec()), batch_size, 0)
    for epoch in epochs(sampler, 2):
        assert sorted(index for batch in epoch for index in batch) == list(range(sum(sizes)))


@quick
@given(mixtures(), st.integers(0, 3), st.integers(0, 3))
def test_setting_the_epoch_goes_to_its_start_from_anywhere(mixture, before, epoch):
    sampler, whole = (MixtureBatchSampler(*mixture) for _ in range(2))
    sampler.set_epoch(before)
    next(iter(sampler))
    sampler.set_epoch(epoch)
    assert [*sampler, *sampler] == [batch for one in epochs(whole, epoch + 2)[epoch:] for batch in one]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_order_differs_between_epochs_and_seeds_and_repeats_with_the_same(batching):
    lengths = [[7] * 40, [9] * 30]

    def run(seed):
        return epochs(MixtureBatchSampler(lengths, [0.5, 0.5], 4, seed, batching), 3)

    assert run(0) == run(0)
    orders = [str(epoch) for seed in (0, 1) for epoch in run(seed)]
    assert len(set(orders)) == 6


def test_tasks_of_equal_size_are_shuffled_each_in_its_own_way():
    sampler = MixtureBatchSampler([[1] * 20] * 2, [0.5, 0.5], 4, 0)
    first, second = (sampler._draws(task, 0) - 20 * task for task in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()


def test_each_pass_through_a_task_has_an_order_of_its_own():
    sampler = MixtureBatchSampler([[5] * 40, [5] * 120], [0.5, 0.5], 4, 0)
    first, _, _, fourth = ({i for batch in epoch for i in batch if i >= 40} for epoch in epochs(sampler, 4))
    assert len(first) == len(fourth) == 80  # both open a pass through the 120 rows
    assert first != fourth


def test_each_epoch_has_an_order_of_batches_of_its_own():
    sampler = MixtureBatchSampler([range(1, 161)], [1.0], 4, 0)
    first, second = ([sorted(batch) for batch in epoch] for epoch in epochs(sampler, 2))
    assert sorted(first) == sorted(second)  # one window and one task, so rows of like length always meet
    assert first != second


@quick
@given(mixtures(["homogeneous"]))
def test_homogeneous_batches_hold_one_task_and_batches_follow_the_shares(mixture):
    lengths, given_shares, *_ = mixture
    sampler = MixtureBatchSampler(*mixture)
    batches = list(sampler)
    tasks = [{owner(lengths, index) for index in batch} for batch in batches]
    assert all(len(found) == 1 for found in tasks)
    counts = Counter(found.pop() for found in tasks)
    assert [counts[t] for t in range(len(lengths))] == apportion(given_shares, len(sampler))
    assert sampler.realised_shares()["rows"] == per_task(lengths, batches)


@quick
@given(mixtures(["balanced"]))
def test_balanced_batches_hold_every_task_equally_and_the_extra_one_rotates(mixture):
    lengths = mixture[0]
    sampler = MixtureBatchSampler(*mixture)
    present = [task for task, rows in enumerate(lengths) if rows]
    batches = list(sampler)
    for batch in batches:
        counts = per_task(lengths, [batch])
        assert max(counts) - min(counts[task] for task in present) <= 1
    total = per_task(lengths, batches)
    assert max(total) - min(total[task] for task in present) <= 1


def test_balanced_batches_over_many_windows_still_show_every_row_once():
    lengths = [list(range(1, 401))] * 3
    batches = list(MixtureBatchSampler(lengths, [1 / 3] * 3, 2, 0, "balanced"))
    assert sorted(i for batch in batches for i in batch) == list(range(1200))


@pytest.mark.parametrize("batching", ["mixed", "by_length", "homogeneous"])
def test_every_stretch_of_an_epoch_has_the_shares(batching):
    lengths = [[5] * 3000, [5] * 500, [5] * 100]
    given_shares = [0.6, 0.3, 0.1]
    batches = list(MixtureBatchSampler(lengths, given_shares, 8, 0, batching))
    for start in range(0, len(batches) - 100, 50):
        rows = per_task(lengths, batches[start : start + 100])
        assert [n / sum(rows) for n in rows] == pytest.approx(given_shares, abs=0.05)


def realistic_lengths(rng) -> list[list[int]]:
    """Tokens of eight tasks like sentiment, acceptability, paraphrase, questions with choices, and worked sums."""
    shapes = [(25, 0.35), (28, 0.15), (75, 0.25), (30, 0.15), (60, 0.3), (70, 0.35), (75, 0.35), (180, 0.4)]
    return [np.clip(rng.lognormal(np.log(m), s, 1500), 12, 1000).astype(int).tolist() for m, s in shapes]


def padding_of(lengths, batch_size, batching) -> float:
    """The share of an epoch's positions that are padding where each batch is as wide as its longest row."""
    flat = [n for task in lengths for n in task]
    batches = list(MixtureBatchSampler(lengths, [1 / len(lengths)] * len(lengths), batch_size, 0, batching))
    positions = sum(max(flat[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(flat[i] for batch in batches for i in batch) / positions


@pytest.mark.parametrize("batch_size", [4, 8, 16, 32])
@pytest.mark.parametrize("batching", ["by_length", "homogeneous"])
def test_padding_stays_under_a_tenth_on_realistic_lengths(batch_size, batching):
    assert padding_of(realistic_lengths(np.random.default_rng(0)), batch_size, batching) < 0.1


def test_the_seed_decides_which_rows_meet_not_only_their_order_within_a_task():
    one_each = [[1]] * 12
    plans = [sorted(map(sorted, MixtureBatchSampler(one_each, [1 / 12] * 12, 3, seed))) for seed in (0, 1)]
    assert plans[0] != plans[1]


@pytest.mark.parametrize("batching", ["mixed", "balanced"])
def test_padding_of_batches_of_several_tasks_is_less_than_by_chance(batching, monkeypatch):
    lengths = realistic_lengths(np.random.default_rng(0))
    dealt = padding_of(lengths, 32, batching)
    monkeypatch.setattr(sampler_module, "WINDOW", 1)
    assert dealt < 0.9 * padding_of(lengths, 32, batching)


def test_mixed_batches_hold_the_shares_whatever_the_lengths():
    rng = np.random.default_rng(0)
    lengths = [rng.integers(low, low + 5, n).tolist() for low, n in ((10, 300), (40, 600), (400, 900))]
    given_shares = [1 / 6, 2 / 6, 3 / 6]
    for batch in MixtureBatchSampler(lengths, given_shares, 12, 0):
        counts = per_task(lengths, [batch])
        assert all(abs(n - 12 * share) <= 2 for n, share in zip(counts, given_shares, strict=True))


def test_length_does_not_follow_the_order_of_batches():
    lengths = realistic_lengths(np.random.default_rng(1))
    flat = [n for task in lengths for n in task]
    batches = list(MixtureBatchSampler(lengths, [1 / 8] * 8, 8, 0))
    widths = np.array([max(flat[i] for i in batch) for batch in batches])
    correlation = np.corrcoef(widths[:-1], widths[1:])[0, 1]
    assert abs(correlation) < 0.1


def test_dropping_the_last_batch_loses_no_row_for_good():
    sampler = MixtureBatchSampler([[5] * 11], [1.0], 4, 0, drop_last=True)
    runs = epochs(sampler, 11)
    assert {len(batch) for run in runs for batch in run} == {4}
    assert {len(run) for run in runs} == {len(sampler)} == {2}
    assert set(Counter(i for run in runs for batch in run for i in batch).values()) == {8}


@quick
@given(mixtures(), st.integers(1, 3), st.booleans())
def test_two_processes_share_out_every_batch(mixture, epoch, split_batches):
    lengths, given_shares, batch_size, seed, batching = mixture
    batch_size *= 2 if split_batches else 1
    assume(batching != "homogeneous" or -(-sum(map(len, lengths)) // batch_size) >= sum(map(bool, lengths)))

    def make():
        sampler = MixtureBatchSampler(lengths, given_shares, batch_size, seed, batching)
        sampler.set_epoch(epoch)
        return sampler

    def shard(rank):
        return BatchSamplerShard(make(), num_processes=2, process_index=rank, split_batches=split_batches)

    reference = list(make())
    ranks = [list(shard(rank)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(shard(0))
    joined = [i for pair in zip(*ranks, strict=True) for part in pair for i in part]
    drawn = [i for batch in reference for i in batch]
    # accelerate fills the last round from the first batches; up to there every draw comes once, in order.
    assert joined[: len(drawn)] == drawn
    assert len(joined) - len(drawn) < 2 * batch_size


def test_a_prepared_loader_goes_through_the_epochs():
    lengths = [[5] * 20, [9] * 13]
    sampler = MixtureBatchSampler(lengths, [0.5, 0.5], 4, 0)
    loader = torch.utils.data.DataLoader(list(range(33)), batch_sampler=sampler)
    prepared = prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
    reference = epochs(MixtureBatchSampler(lengths, [0.5, 0.5], 4, 0), 2)
    for epoch in range(2):
        prepared.set_epoch(epoch)
        assert [batch.tolist() for batch in prepared] == reference[epoch]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([[5, 5]], [1.0], 0, 0), "the batch size is 0"),
        (([[5], [5]], [1.0], 1, 0), "do not fit 2 tasks"),
        (([[5], [5]], [0.7, 0.7], 1, 0), "do not fit 2 tasks"),
        (([[5], [5]], [float("nan"), 1.0], 1, 0), "do not fit 2 tasks"),
        (([[5], [5]], [1.5, -0.5], 1, 0), "do not fit 2 tasks"),
        (([], [], 1, 0), "do not fit 0 tasks"),
        (([[5], []], [0.5, 0.5], 1, 0), "task 1 has a share of 0.5 and no training rows"),
        (([[5], [5]], [0.5, 0.5], 4, 0, "homogeneous"), "1 draws cannot hold all of 2 tasks"),
        (([[5], [5]], [0.5, 0.5], 4, 0, "mixed", True), "2 training rows do not fill one batch of 4"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(HeadwaterError, match=said):
        MixtureBatchSampler(*arguments)


@quick
@given(st.integers(0, 2**40))
def test_any_seed_will_do(seed):
    assert list(MixtureBatchSampler([[5] * 9], [1.0], 4, seed))
