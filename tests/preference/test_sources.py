"""Reward sources against plain readings of what they should say."""

import pytest
import torch
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from headwater.config import dump_config, load_config
from headwater.data.encode import DataSpec
from headwater.data.rows import Row
from headwater.data.tasks import Task
from headwater.errors import HeadwaterError
from headwater.marked_yaml import dump, parse_document
from headwater.preference.sources import exact_match, find_function, make_sources
from headwater.preference.spec import PreferConfig, SourceSpec

TASK = Task("t", 0, "exact_match")
ROWS = [Row("ask one:", " yes"), Row("and two, longer:", " no")]
RESPONSES = [[" yes", " no, never", ""], [" no"]]


def save(folder, seed):
    make_tiny_llama(seed).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def source(tmp_path, **fields):
    return make_sources([SourceSpec(name="s", **fields)], DataSpec(), tmp_path)[0]


def log_probs(model, tokenizer, prompt, response):
    """Of each token of the response, read plainly."""
    before, after = tokenizer(prompt).input_ids, tokenizer(response).input_ids or [tokenizer.eos_token_id]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([[*before, *after]])).logits[0].double().log_softmax(-1)
    return [float(logs[len(before) + i - 1, token]) for i, token in enumerate(after)]


def test_log_likelihood_is_the_mean_over_the_responses_own_tokens(tmp_path):
    path = save(tmp_path / "m", 3)
    found = source(tmp_path, kind="log_likelihood", model=path).scores(TASK, ROWS, RESPONSES)
    model, tokenizer = make_tiny_llama(3), make_tiny_tokenizer()
    for row, texts, values in zip(ROWS, RESPONSES, found, strict=True):
        for text, value in zip(texts, values, strict=True):
            expected = log_probs(model, tokenizer, row.prompt, text)
            assert value == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_dpo_implicit_is_the_difference_of_two_models_sums(tmp_path):
    one, two = save(tmp_path / "m", 3), save(tmp_path / "r", 4)
    found = source(tmp_path, kind="dpo_implicit", model=one, reference=two).scores(TASK, ROWS, RESPONSES)
    tokenizer = make_tiny_tokenizer()
    for row, texts, values in zip(ROWS, RESPONSES, found, strict=True):
        for text, value in zip(texts, values, strict=True):
            ours, theirs = (sum(log_probs(make_tiny_llama(s), tokenizer, row.prompt, text)) for s in (3, 4))
            assert value == pytest.approx(ours - theirs, abs=1e-4)
    same = source(tmp_path, kind="dpo_implicit", model=one, reference=one).scores(TASK, ROWS, RESPONSES)
    assert same == [[0.0, 0.0, 0.0], [0.0]]


def save_classifier(folder, labels=1, template=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=labels, pad_token_id=258, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = make_tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("template", [True, False])
def test_classifier_scores_the_conversation_whatever_the_padding(tmp_path, template):
    model, tokenizer = save_classifier(tmp_path / "c", template=template)
    made = source(tmp_path, kind="classifier", model=str(tmp_path / "c"))
    found = made.scores(TASK, ROWS, RESPONSES)
    for row, texts, values in zip(ROWS, RESPONSES, found, strict=True):
        for text, value in zip(texts, values, strict=True):
            whole = row.prompt + text
            if template:
                whole = f"<|user|>{row.prompt}<eos><|assistant|>{text.strip()}<eos>"
            ids = torch.tensor([tokenizer(whole).input_ids])
            with torch.no_grad():
                assert value == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-5)
    assert [list(map(float, v)) for v in made.checked_scores(TASK, ROWS, RESPONSES)] == found


def test_a_classifier_of_two_classes_is_no_reward_model(tmp_path):
    save_classifier(tmp_path / "c", labels=2)
    with pytest.raises(HeadwaterError, match="2 outputs; a reward model has one"):
        source(tmp_path, kind="classifier", model=str(tmp_path / "c")).scores(TASK, ROWS, RESPONSES)


def test_functions_of_a_file_beside_the_yaml_and_of_a_package(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def length(*, prompt, response, answer, task):\n    return len(response) + 100 * (task == 't')\n"
    )
    found = source(tmp_path, kind="function", function="mine:length").scores(TASK, ROWS, RESPONSES)
    assert found == [[104.0, 110.0, 100.0], [103.0]]
    packaged = source(tmp_path, kind="function", function="headwater.preference.sources:exact_match")
    assert packaged.scores(TASK, ROWS, RESPONSES) == [[1.0, 0.0, 0.0], [1.0]]
    assert find_function("headwater.preference.sources:exact_match", tmp_path) is exact_match


def test_everything_that_is_missing_is_said_at_once(tmp_path):
    (tmp_path / "mine.py").write_text("def length(**_):\n    return 1.0\n")
    (tmp_path / "torn.py").write_text("def length(:\n")
    specs = [
        SourceSpec(name="a", kind="function", function="mine:lenght"),
        SourceSpec(name="b", kind="function", function="nowhere.at_all:f"),
        SourceSpec(name="c", kind="function", function="torn:length"),
        SourceSpec(name="d", kind="log_likelihood", model=str(tmp_path / "no-model")),
        SourceSpec(name="e", kind="dpo_implicit", model=save(tmp_path / "m", 0), reference=str(tmp_path / "none")),
    ]
    with pytest.raises(HeadwaterError) as caught:
        make_sources(specs, DataSpec(), tmp_path)
    said = {problem.where: str(problem) for problem in caught.value.problems}
    assert "it has: length" in said["preference.sources.0.function"]
    assert "No module named 'nowhere'" in said["preference.sources.1.function"]
    assert "SyntaxError" in said["preference.sources.2.function"]
    assert "no-model is no model" in said["preference.sources.3.model"]
    assert "none is no model" in said["preference.sources.4.reference"]
    assert len(said) == 5


def test_models_are_found_as_the_base_model_is(tmp_path, monkeypatch):
    """Beside the file first, else in the current folder; there alone what comes from the command line; or from home."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home / "h", here / "only", here / "both", tmp_path / "both"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    models = {
        "asked for": None,
        "both": tmp_path / "both",
        "only": here / "only",
        "~/h": home / "h",
        "org/name": "org/name",
    }
    sources = [{"name": f"s{i}", "kind": "dpo_implicit", "model": m, "reference": m} for i, m in enumerate(models)]
    run = {"model_name_or_path": "both", "tasks": [{"name": "a", "train": "a"}], "output_dir": "o"}
    (tmp_path / "run.yaml").write_text(dump({**run, "preference": {"sources": sources}}))
    config = load_config(tmp_path / "run.yaml", ["preference.sources.0.model=both"], model=PreferConfig)
    config.settle_models()
    found = [source.model for source in config.preference.sources]
    assert found == [str(here / "both"), *map(str, list(models.values())[1:])]
    assert [source.reference for source in config.preference.sources] == ["asked for", *found[1:]]
    assert config.model_name_or_path == str(tmp_path / "both")
    written = parse_document(dump_config(config), "").data["preference"]["sources"]
    assert [source["model"] for source in written] == found  # so that it is the same model wherever the run goes on


@pytest.mark.parametrize("suffix", [".gguf", ".bin"])
def test_files_that_a_source_cannot_be_loaded_from_are_refused(tmp_path, suffix):
    gguf, other = tmp_path / f"m{suffix}", tmp_path / f"other{suffix}"
    gguf.write_bytes(b"GGUF and so on")
    other.write_bytes(b"PK and so on")
    classifier = {"name": "c", "kind": "classifier", "model": str(gguf)}
    specs = [SourceSpec(**classifier), SourceSpec(name="d", kind="log_likelihood", model=str(other))]
    with pytest.raises(HeadwaterError) as caught:
        make_sources(specs, DataSpec(), tmp_path)
    said = {problem.where: problem for problem in caught.value.problems}
    assert "only language models are read, no classifiers" in said["preference.sources.0.model"].what
    assert "folder with safetensors" in said["preference.sources.0.model"].fix
    assert "other" in said["preference.sources.1.model"].what
    assert "not GGUF" in said["preference.sources.1.model"].what
    assert make_sources([SourceSpec(name="d", kind="log_likelihood", model=str(gguf))], DataSpec(), tmp_path)
