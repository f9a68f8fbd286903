"""Generation, against the plain way: one prompt at a time, no padding, no cache, the likeliest token each time."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import AddedToken

import headwater
from headwater.data.encode import DataSpec, encode_rows
from headwater.data.rows import Row
from headwater.errors import HeadwaterError
from headwater.evaluation import generate_text
from headwater.evaluation.forward import evaluating
from headwater.evaluation.generate import end_ids, generate_from_ids

PROMPTS = ["hello", "a much longer prompt than the other ones", "x", "two words"]


def peaked(model):
    """The same model with logits far enough apart that rounding never decides."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    return model


def plain_tokens(model, prompt, ends, limit) -> list[int]:
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < limit:
            token = int(model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].argmax())
            if token in ends:
                break
            tokens.append(token)
    return tokens


@pytest.fixture
def ending(tiny_llama, tiny_tokenizer):
    """A model, its prompts as ids, and what it says to them when the third prompt's fourth token ends an answer."""
    model = peaked(tiny_llama())
    prompts = [tiny_tokenizer(text)["input_ids"] for text in PROMPTS]
    end = plain_tokens(model, prompts[2], (), 4)[-1]
    model.generation_config.eos_token_id = [end, 299]
    ends = {end, 299, tiny_tokenizer.eos_token_id}
    return model, prompts, [plain_tokens(model, prompt, ends, 12) for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_answers_equal_the_plain_way(ending, tiny_tokenizer, batch_size):
    model, prompts, wanted = ending
    model.generation_config.repetition_penalty = 5.0  # what the model would like does not matter
    model.generation_config.temperature = 0.1
    with evaluating(model):
        found = generate_from_ids(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=batch_size)
    assert [answer.text for answer in found] == [tiny_tokenizer.decode(t, skip_special_tokens=True) for t in wanted]
    assert [answer.finished for answer in found] == [len(tokens) < 12 for tokens in wanted]
    assert found[2].finished


def test_a_settled_row_stops_and_the_others_go_on(ending, tiny_tokenizer):
    model, prompts, wanted = ending
    running = next(i for i, tokens in enumerate(wanted) if len(tokens) == 12)
    steps = []

    def settled(i: int, text: str) -> bool:
        steps.append(i)
        return i != running

    with evaluating(model):
        found = generate_from_ids(model, tiny_tokenizer, prompts, max_new_tokens=12, settled=settled)
    for i, (answer, tokens) in enumerate(zip(found, wanted, strict=True)):
        kept = tokens if i == running else tokens[:1]
        assert answer.text == tiny_tokenizer.decode(kept, skip_special_tokens=True)
        assert answer.finished == (i != running)
        assert steps.count(i) == (12 if i == running else 1)


def test_text_prompts_and_rows_give_the_same(ending, tiny_tokenizer):
    model, _, wanted = ending
    rows = [PROMPTS[0], Row(prompt=PROMPTS[1], completion="something else"), *PROMPTS[2:]]
    texts = generate_text(model, tiny_tokenizer, rows, max_new_tokens=12)
    assert texts == [tiny_tokenizer.decode(tokens, skip_special_tokens=True) for tokens in wanted]


def test_a_conversation_is_answered_where_the_assistant_speaks(ending, tiny_tokenizer):
    model, *_ = ending
    asked = ({"role": "user", "content": "hi"},)
    text = "<|user|>hi<eos><|assistant|>"
    answered = (*asked, {"role": "assistant", "content": "never read"})
    by_hand = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = plain_tokens(model, by_hand, {*model.generation_config.eos_token_id, 257}, 6)
    found = generate_text(model, tiny_tokenizer, [Row("", "", messages=m) for m in (asked, answered)], max_new_tokens=6)
    assert found == [tiny_tokenizer.decode(wanted, skip_special_tokens=True)] * 2


@pytest.mark.parametrize("named", [False, True])
def test_what_closes_a_turn_in_the_chat_template_ends_an_answer(tiny_llama, tiny_tokenizer, named):
    """As training has it there, though base models have another end token."""
    model = tiny_llama()
    assert end_ids(model, tiny_tokenizer) == [257]
    if named:
        tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    else:  # as a tokenizer.json may have it
        tiny_tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("<eos>", "<|im_end|>\n")
    row = Row("", "", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    (trained,), _ = encode_rows([row], tiny_tokenizer, DataSpec(), 0)
    assert trained.labels[-1] == tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(model, tiny_tokenizer) == [257, trained.labels[-1]]
    for template in (None, "{{ messages + 1 }}", {"tools": "{{ messages }}"}):  # none that can be asked
        tiny_tokenizer.chat_template = template
        assert end_ids(model, tiny_tokenizer) == [257]


def test_settings_of_the_model_s_own_change_no_answer(ending, tiny_tokenizer):
    model, prompts, wanted = ending
    wanted = [tiny_tokenizer.decode(tokens[:6], skip_special_tokens=True) for tokens in wanted]
    model.generation_config.update(suppress_tokens=list(range(0, 250, 2)), encoder_repetition_penalty=9.0,
                                   min_p=0.9, stop_strings=["a"], bad_words_ids=[[5]])  # fmt: skip
    own = model.generation_config
    with evaluating(model):
        found = generate_from_ids(model, tiny_tokenizer, prompts, max_new_tokens=6)
    assert [answer.text for answer in found] == wanted
    assert model.generation_config is own


def test_sampling_follows_its_seed_and_leaves_the_random_state(tiny_llama, tiny_tokenizer):
    model = tiny_llama()  # nearly flat logits: two seeds almost surely differ
    before = torch.get_rng_state()

    def draw(seed: int) -> list[str]:
        return generate_text(model, tiny_tokenizer, PROMPTS, max_new_tokens=10, temperature=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_samples_are_what_repeated_prompts_give_and_run_the_prompt_once(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    prompts = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6]]
    seen: list[tuple[int, ...]] = []
    options = {"max_new_tokens": 3, "temperature": 1.0}
    with evaluating(model):
        torch.manual_seed(0)
        expected = generate_from_ids(model, tiny_tokenizer, [p for p in prompts for _ in range(4)], **options)
        handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        torch.manual_seed(0)
        found = generate_from_ids(model, tiny_tokenizer, prompts, samples=4, **options)
        handle.remove()
    assert found == expected
    assert len({answer.text for answer in found[:4]}) > 1
    assert seen == [(3, 5), (12, 1), (12, 1), (12, 1)]  # all but the last token of three prompts, then their samples


def test_several_samples_of_one_task_are_all_that_tasks(tiny_llama, tiny_tokenizer):
    config = headwater.make_config("mtl_lora", num_tasks=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(peaked(tiny_llama()), config)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    prompts, options = [[5, 6, 7, 8], [9, 10]], {"max_new_tokens": 6, "temperature": 1e-9}
    with evaluating(model):
        first, second = (
            generate_from_ids(model, tiny_tokenizer, prompts, task_index=task, **options) for task in (0, 1)
        )
        found = generate_from_ids(model, tiny_tokenizer, prompts, task_index=1, samples=2, **options)
    assert found == [answer for answer in second for _ in range(2)]
    assert first != second


def test_several_samples_of_a_method_that_goes_by_the_prompt_see_all_of_it(tiny_llama, tiny_tokenizer):
    settings = {"r": 2, "num_factors": 16, "target_modules": "all-linear", "init_seed": 0, "task_type": "CAUSAL_LM"}
    model = get_peft_model(peaked(tiny_llama()), headwater.make_config("cond_mixlora", **settings))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    prompts, options = [[5, 6, 7, 8], [9, 10], [11, 250]], {"max_new_tokens": 6, "temperature": 1e-9}
    with evaluating(model):
        alone = [answer for p in prompts for answer in generate_from_ids(model, tiny_tokenizer, [p], **options)]
        found = generate_from_ids(model, tiny_tokenizer, prompts, samples=2, **options)
    assert found == [answer for answer in alone for _ in range(2)]


def test_sampling_draws_from_the_whole_vocabulary(tiny_llama, tiny_tokenizer):
    """Of the 50 likeliest tokens alone, as transformers would by default, there could be no 60 different ones."""
    model, options = tiny_llama(), {"max_new_tokens": 1, "temperature": 100.0}
    with evaluating(model):
        torch.manual_seed(0)
        found = generate_from_ids(model, tiny_tokenizer, [[5, 6]], samples=400, **options)
    assert len({answer.text for answer in found}) > 60


def test_top_p_near_zero_is_greedy(ending, tiny_tokenizer):
    model, *_ = ending
    greedy = generate_text(model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    assert generate_text(model, tiny_tokenizer, PROMPTS, max_new_tokens=6, temperature=2.0, top_p=1e-6) == greedy


@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 1e-320])
def test_a_temperature_near_zero_is_greedy(ending, tiny_tokenizer, temperature):
    model, *_ = ending
    greedy = generate_text(model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    assert generate_text(model, tiny_tokenizer, PROMPTS, max_new_tokens=6, temperature=temperature) == greedy


def test_by_default_answers_end_where_the_model_does(tiny_llama, tiny_tokenizer, caplog):
    model = tiny_llama(max_position_embeddings=24)
    length = len(tiny_tokenizer("a longer one")["input_ids"])
    prompts = ["a longer one", "short"]
    found = generate_text(model, tiny_tokenizer, prompts)
    assert f"answers end after {24 - length} tokens" in caplog.text
    assert found == generate_text(model, tiny_tokenizer, prompts, max_new_tokens=24 - length)
    with pytest.raises(HeadwaterError, match=r"prompt 2.*tokens of prompt and 1 of answer"):
        generate_text(model, tiny_tokenizer, ["short", "long " * 10])
    caplog.clear()
    generate_text(tiny_llama(max_position_embeddings=300), tiny_tokenizer, ["short"])
    assert not caplog.text


def test_every_wrong_setting_is_named(tiny_llama, tiny_tokenizer):
    with pytest.raises(HeadwaterError) as caught:
        generate_text(
            tiny_llama(max_position_embeddings=32),
            tiny_tokenizer,
            ["", "short", "long " * 10],
            max_new_tokens=0,
            temperature=-1,
            top_p=0,
            batch_size=0,
            seed=2**32,
        )
    message = str(caught.value)
    for named in ("max_new_tokens", "temperature", "top_p", "batch_size", "seed", "prompt 1: ", "prompt 3: ", "32"):
        assert named in message
    assert "prompt 2" not in message


def test_one_prompt_is_no_list_of_prompts(tiny_llama, tiny_tokenizer):
    with pytest.raises(HeadwaterError, match="'Review: good' is one prompt, not a list"):
        generate_text(tiny_llama(), tiny_tokenizer, "Review: good", max_new_tokens=1)
