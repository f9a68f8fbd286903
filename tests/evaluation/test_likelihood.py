"""Choices and losses, against the plain way: one sequence at a time, no padding, no cache, float64 log-softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import headwater
import headwater.evaluation.forward as forward
from headwater.evaluation.forward import chunks, evaluating
from headwater.evaluation.likelihood import choice_log_probs, completion_losses

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}

EXPERTS = {"head_dim": 8, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}


def _gemma(attention: str) -> Gemma3ForCausalLM:
    # A window of 6 is shorter than most prompts here, so keys fall out of the sliding layer's cache.
    config = Gemma3TextConfig(
        **SIZES,
        **SPECIAL,
        **ROPE,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=0.5,
        attn_implementation=attention,
    )
    return Gemma3ForCausalLM(config)


MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **SPECIAL, **ROPE, attn_implementation="sdpa")),
    "gemma3-eager": lambda: _gemma("eager"),
    "gemma3-sdpa": lambda: _gemma("sdpa"),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, **SPECIAL, state_size=4)),
    "minimax": lambda: MiniMaxForCausalLM(MiniMaxConfig(**SIZES, **SPECIAL, **ROPE, **EXPERTS)),
}
WITHOUT_CACHE = {"bloom", "mamba", "minimax"}  # no position_ids, no keys and values at all, or others beside them


def make(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for parameter in model.parameters():  # initial weights are so small that logits would hardly differ
            if parameter.dim() == 2:
                parameter.data.mul_(5)
    return model


def plain_log_prob(model, prompt, choice) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + j, token].item() for j, token in enumerate(choice))


def random_rows(count: int, seed: int = 0, longest: int = 24):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()

    prompts = [draw(1, longest) for _ in range(count)]
    shared = [7, 8]
    choices = [[draw(1, 5), [*shared, 9], [*shared, 9, 10], [11], shared][: 2 + i % 4] for i in range(count)]
    return prompts, choices


def score(model, prompts, choices, **options):
    with evaluating(model):
        return choice_log_probs(model, prompts, choices, fill=0, **options)


@pytest.mark.parametrize("name", MODELS)
def test_choices_equal_the_plain_way(name):
    model = make(name)
    prompts, choices = random_rows(9)
    found = score(model, prompts, choices, batch_size=4)
    for prompt, options, values in zip(prompts, choices, found, strict=True):
        wanted = [plain_log_prob(model, prompt, choice) for choice in options]
        assert values == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gemma3-sdpa", "mamba"])
def test_a_row_depends_on_neither_batch_size_nor_neighbours(name):
    model = make(name)
    prompts, choices = random_rows(8, seed=1)
    alone = [score(model, [p], [c], batch_size=1)[0] for p, c in zip(prompts, choices, strict=True)]
    for batch_size in (3, 8):
        for values, wanted in zip(score(model, prompts, choices, batch_size=batch_size), alone, strict=True):
            assert values == pytest.approx(wanted, abs=1e-4)
    backwards = score(model, prompts[::-1], choices[::-1], batch_size=4)[::-1]
    assert all(b == pytest.approx(a, abs=1e-4) for a, b in zip(alone, backwards, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=12),
            st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=5),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 4),
)
def test_any_choices_equal_the_plain_way(rows, batch_size):
    """A vocabulary of 3 for choices makes shared beginnings, equal choices and choices within choices common."""
    model = make("qwen2")
    prompts, choices = [prompt for prompt, _ in rows], [options for _, options in rows]
    found = score(model, prompts, choices, batch_size=batch_size)
    for prompt, options, values in zip(prompts, choices, found, strict=True):
        assert values == pytest.approx([plain_log_prob(model, prompt, choice) for choice in options], abs=1e-4)


class Counter:
    """Counts real tokens through the model and positions through its vocabulary head."""

    def __init__(self, model):
        self.tokens = self.logits = 0
        model.register_forward_pre_hook(self._inputs, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(self._head)

    def _inputs(self, _module, _args, kwargs):
        width = kwargs["input_ids"].shape[1]
        self.tokens += int(kwargs["attention_mask"][:, -width:].sum())

    def _head(self, _module, args, _output):
        self.logits += args[0].shape[:-1].numel()


def test_each_prompt_runs_once_and_few_logits_are_made():
    model = make("qwen2")
    prompts = [[5] * 20, [6] * 10]
    single, tails = [[11], [12], [13]], [[7, 8, 9], [7, 8, 10], [11]]

    counter = Counter(model)
    score(model, prompts, [single, single])
    assert (counter.tokens, counter.logits) == (30, 2)

    counter.tokens = counter.logits = 0
    score(model, prompts, [tails, tails])
    assert (counter.tokens, counter.logits) == (30 + 2 * 2, 2 + 2 * 2)  # per prompt only the tail 7, 8 is left to run

    counter.tokens = counter.logits = 0
    with evaluating(model):
        completion_losses(model, [[5] * 20], [[-100] * 17 + [5] * 3], fill=0)
    assert (counter.tokens, counter.logits) == (20, 3)


def test_a_head_that_is_no_module_call_still_scores():
    """Some models multiply by the embedding themselves; then all logits are made, and the right ones taken."""
    model = make("qwen2")
    model.get_output_embeddings = lambda: None
    prompts, choices = random_rows(5)
    single = [[[11], [12]]] * 5  # read in the middle of rows that are padded on the right
    for options in (choices, single):
        for prompt, row, values in zip(prompts, options, score(model, prompts, options), strict=True):
            assert values == pytest.approx([plain_log_prob(model, prompt, choice) for choice in row], abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_the_plain_way(name):
    model = make(name)
    prompts, choices = random_rows(7, seed=2)
    rows = [[*prompt, *options[0]] for prompt, options in zip(prompts, choices, strict=True)]
    labels = [[-100] * len(p) + row[len(p) :] for p, row in zip(prompts, rows, strict=True)]
    labels[0] = list(rows[0])  # all of it: the first token is predicted by nothing
    with evaluating(model):
        found = completion_losses(model, rows, labels, fill=0, batch_size=3)
    for i, (total, count) in enumerate(found):
        split = 1 if i == 0 else len(prompts[i])
        assert count == len(rows[i]) - split
        assert -total == pytest.approx(plain_log_prob(model, rows[i][:split], rows[i][split:]), abs=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "bloom"])
def test_a_method_that_goes_by_the_prompt_does_not_see_the_answer(name):
    settings = {"r": 2, "num_factors": 8, "target_modules": "all-linear", "init_seed": 0, "task_type": "CAUSAL_LM"}
    model = get_peft_model(make(name), headwater.make_config("cond_mixlora", **settings)).eval()
    for path, parameter in model.named_parameters():
        if path.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.3)
    prompts, choices = random_rows(6)
    answers = [max(options, key=len) for options in choices]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):  # as in training, where labels come with the forward
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            expected.append(model(input_ids=ids, labels=labels).loss.item() * len(answer))
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [[-100] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
    with evaluating(model):
        losses = [total for total, _ in completion_losses(model, rows, labels, fill=0, batch_size=4)]
        likelihoods = choice_log_probs(model, prompts, [[answer] for answer in answers], fill=0, batch_size=4)
        answers_seen = [total for total, _ in completion_losses(model, rows, rows, fill=0, batch_size=4)]
    assert losses == pytest.approx(expected, abs=1e-4)
    assert [-sums[0] for sums in likelihoods] == pytest.approx(expected, abs=1e-4)
    assert answers_seen != pytest.approx(expected, abs=1.0)


def test_progress_counts_every_prompt():
    model = make("qwen2")
    prompts, choices = random_rows(7)
    seen: list[int] = []
    score(model, prompts, choices, batch_size=3, on_batch=seen.append)
    assert seen == [3, 3, 1]


def test_modes_and_random_state_come_back_even_after_an_error():
    model = make("qwen2").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()

    def fail_inside():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise RuntimeError("a forward failed")

    with pytest.raises(RuntimeError, match="forward failed"):
        fail_inside()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 8))
def test_chunks_keep_the_budget(sizes, batch_size):
    old, forward.LOGITS_BUDGET = forward.LOGITS_BUDGET, 1000
    try:
        runs = list(chunks(sizes, batch_size, vocabulary=10))
    finally:
        forward.LOGITS_BUDGET = old
    assert [item for run in runs for item in run] == list(range(len(sizes)))
    for run in runs:
        assert 1 <= len(run) <= batch_size
        assert len(run) == 1 or max(sizes[i] for i in run) * len(run) * 10 <= 1000
