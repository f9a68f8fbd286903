"""Generation: with and without cache, beams, several sequences a prompt, sampling; task ids all along."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from transformers import CompileConfig

import headwater

from .helpers import adapt, config, stir, task_kwargs, tokens
from .rows import BY_ID

LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 258}


@pytest.fixture
def model(row, tiny_llama):
    # large, so that the adapter (and the task) decides what is written; heads of that size warn of dropout noise
    return adapt(row, tiny_llama(), lora_alpha=64, **row.no_dropout)


def generate(row, model, x, *, first_task=0, **kwargs):
    return model.generate(input_ids=x, **LENGTH, **task_kwargs(row, x.shape[0], first_task), **kwargs)


def test_the_adapter_decides_what_is_written(row, model):
    x = tokens(rows=3)
    found = generate(row, model, x, do_sample=False)
    with model.disable_adapter():
        base = model.generate(input_ids=x, do_sample=False, **LENGTH)
    assert not torch.equal(found, base)
    if row.needs_task_ids:
        assert not torch.equal(found, generate(row, model, x, first_task=1, do_sample=False))


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_cache_changes_nothing_and_rows_do_not_mix(row, model, how):
    """Oracle: without a cache, every prompt on its own under its own task."""
    x = tokens(rows=3)
    together = generate(row, model, x, use_cache=True, **how)
    alone = [generate(row, model, x[n : n + 1], first_task=n, use_cache=False, **how) for n in range(3)]
    assert together.shape[0] == 3 * how.get("num_return_sequences", 1)
    assert torch.equal(together, torch.cat(alone))


def test_a_layer_that_runs_at_several_depths_remembers_its_prompt_at_each(tiny_llama):
    row, base, x = BY_ID["cond_mixlora"], tiny_llama(), tokens(rows=3)
    base.model.layers[1].mlp = base.model.layers[0].mlp
    model = adapt(row, base, lora_alpha=64, **row.no_dropout)
    cached, whole = (
        generate(row, model, x, use_cache=use, do_sample=False, output_logits=True, return_dict_in_generate=True)
        for use in (True, False)
    )
    for found, expected in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_gradients_through_a_forward_behind_a_cache_are_of_the_prompt_s_choice(tiny_llama):
    row, ids = BY_ID["cond_mixlora"], tokens(rows=2)
    model = adapt(row, tiny_llama(), lora_alpha=64, **row.no_dropout)
    by_hand, found = [], []
    weights = [p for name, p in model.named_parameters() if name.endswith(".B")]
    for gradients, cached in ((by_hand, False), (found, True)):
        if cached:
            with torch.no_grad():
                cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            logits = model(input_ids=ids[:, -1:], past_key_values=cache, attention_mask=torch.ones_like(ids)).logits
        else:  # the same keys and values, and the same choice, as the last token is none of the prompt
            labels = torch.full_like(ids, -100)
            labels[:, -1] = ids[:, -1]
            logits = model(input_ids=ids, labels=labels).logits
        gradients += torch.autograd.grad(logits[:, -1].pow(2).mean(), weights[-1:])
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-4)


def test_a_vocabulary_head_that_goes_by_the_prompt_sees_all_of_it(tiny_llama):
    row, x = BY_ID["cond_mixlora"], tokens(rows=3)
    model = adapt(row, tiny_llama(), lora_alpha=64, target_modules=["lm_head"], **row.no_dropout)
    found = generate(row, model, x, do_sample=False, output_logits=True, return_dict_in_generate=True).logits[0]
    torch.testing.assert_close(found, model(input_ids=x).logits[:, -1])


def test_static_cache(row, model):
    x = tokens(rows=3)
    expected = generate(row, model, x, do_sample=False)
    assert torch.equal(generate(row, model, x, do_sample=False, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", ["rlora", "mtl_lora", "moe_lora", "smora", "cond_mixlora"])
def test_static_cache_compiled_as_on_an_accelerator(name, tiny_llama):
    """One graph without a break, and the second prompt, in the same cache, begins anew."""
    row, compiled = BY_ID[name], CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapt(row, tiny_llama(), lora_alpha=64, **row.no_dropout)
    for seed in (0, 1):
        x = tokens(rows=3, seed=seed)
        expected = generate(row, model, x, do_sample=False)
        found = generate(row, model, x, do_sample=False, cache_implementation="static", compile_config=compiled)
        assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_sampling_several_sequences_sees_the_right_logits(row, model):
    """Oracle: a plain forward over what was written, ids repeated by hand; labels tell prompt and answer apart."""
    x = tokens(rows=2)
    torch.manual_seed(0)
    out = generate(
        row, model, x, do_sample=True, num_return_sequences=3, return_dict_in_generate=True, output_logits=True
    )
    ids = {"headwater_task_ids": torch.tensor([0, 0, 0, 1, 1, 1])} if row.needs_task_ids else {}
    with torch.no_grad():
        labels = out.sequences.clone()
        labels[:, : x.shape[1]] = -100
        expected = model(input_ids=out.sequences, labels=labels, **ids).logits[:, 6:-1]
    assert len({tuple(s.tolist()) for s in out.sequences}) > 2, "nothing was sampled"
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=1e-3, rtol=1e-3)


def test_left_padding_changes_nothing(row, model):
    x = tokens(rows=2)
    padded = torch.cat([torch.full((2, 3), 258), x], dim=1)
    mask = (padded != 258).long()
    found = generate(row, model, padded, attention_mask=mask, do_sample=False)
    assert torch.equal(found[:, 3:], generate(row, model, x, do_sample=False))


def test_the_context_manager_serves_generate_as_the_keyword_does(row, model):
    x = tokens(rows=3)
    for how in ({"do_sample": False}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = generate(row, model, x, **how)
        with headwater.task_ids(model, [0, 1, 2]):
            assert torch.equal(model.generate(input_ids=x, **LENGTH, **how), expected)
            assert torch.equal(model.get_base_model().generate(input_ids=x, **LENGTH, **how), expected)
            uncached = model.get_base_model().generate(input_ids=x, use_cache=False, **LENGTH, **how)
            assert uncached.shape == expected.shape


def test_missing_ids_are_named_by_generate_as_well(row, model):
    if row.needs_task_ids:
        with pytest.raises(headwater.HeadwaterError, match="none was given"):
            model.generate(input_ids=tokens(), **LENGTH)


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_without_a_task_type_it_is_the_same(row, tiny_llama, copied):
    """PEFT then calls the base model's own `generate`. A copy's is the copy's, whatever becomes of the original."""
    model = adapt(row, tiny_llama(), task_type=None, lora_alpha=64, **row.no_dropout)
    x = tokens(rows=2)
    expected = generate(row, adapt(row, tiny_llama(), lora_alpha=64, **row.no_dropout), x, do_sample=False)
    if copied is not None:
        model, original = copied(model), model
        stir(original, seed=5)
    assert torch.equal(generate(row, model, x, do_sample=False), expected)
    assert torch.equal(generate(row, model.get_base_model(), x, do_sample=False, use_cache=False), expected)
    with headwater.task_ids(model, [0, 1]):
        assert torch.equal(model.generate(input_ids=x, do_sample=False, **LENGTH), expected)
    if row.name == "cond_mixlora":
        with pytest.raises(headwater.HeadwaterError, match=r"prefill_chunk_size: .*whole prompt"):
            generate(row, model, x, do_sample=False, prefill_chunk_size=4)


def test_unloading_gives_the_base_model_its_own_generate_back(tiny_llama):
    base = tiny_llama()
    assert adapt(BY_ID["mlora"], base).unload() is base
    assert "generate" not in base.__dict__
    base.generate = before = functools.partial(type(base).generate, base)
    model = adapt(BY_ID["mtl_lora"], base)
    model.add_adapter("other", config(BY_ID["mtl_lora"]))
    assert generate(BY_ID["mtl_lora"], model, tokens()).shape == (2, 13)
    assert model.unload() is base
    assert base.generate is before


@pytest.mark.parametrize("target", ["q_proj", "up_proj"])
def test_a_model_that_nobody_holds_frees_its_weights_at_once(tiny_llama, target):
    """Without the garbage collector, which no one waits for before the next model is loaded."""
    model = adapt(BY_ID["rlora"], tiny_llama(), target_modules=[target])
    kept = weakref.ref(model.get_base_model().lm_head.weight)
    gc.disable()
    try:
        del model
        assert kept() is None
    finally:
        gc.enable()


def test_ids_for_some_of_the_prompts_are_not_guessed(model, row):
    x = tokens(rows=4)
    for ids in ([0, 1], [0, 1, 2]):
        with pytest.raises(headwater.HeadwaterError, match=f"{len(ids)} task ids do not fit a batch of 4 rows"):
            model.generate(input_ids=x, headwater_task_ids=torch.tensor(ids), **LENGTH)
        with pytest.raises(headwater.HeadwaterError, match="do not fit"), headwater.task_ids(model, ids):
            model.generate(input_ids=x, **LENGTH)
    one = model.generate(input_ids=x, headwater_task_ids=torch.tensor([1]), do_sample=False, **LENGTH)
    each = model.generate(input_ids=x, headwater_task_ids=torch.ones(4).long(), do_sample=False, **LENGTH)
    assert torch.equal(one, each)


def test_a_prompt_in_chunks_is_written_on_alike_or_refused(model, row):
    x = tokens(rows=2, length=9)
    expected = generate(row, model, x, do_sample=False)
    if row.name == "cond_mixlora":
        with pytest.raises(headwater.HeadwaterError, match=r"prefill_chunk_size: .*whole prompt"):
            generate(row, model, x, do_sample=False, prefill_chunk_size=4)
    else:
        assert torch.equal(generate(row, model, x, do_sample=False, prefill_chunk_size=4), expected)
