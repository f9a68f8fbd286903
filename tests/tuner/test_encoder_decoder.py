"""A model with an encoder and a decoder: each has rows, padding and losses of its own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
    T5Config,
    T5ForConditionalGeneration,
)

import headwater
from headwater import HeadwaterError
from headwater.tuner import MethodLayer, context_of

IDS = torch.tensor([0, 2])


def make_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, feed_forward_proj="gated-silu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def adapted(method, **fields):
    config = headwater.make_config(
        method, target_modules=["q", "wi_0"], task_type="SEQ_2_SEQ_LM", lora_dropout=0.0, init_seed=1, **fields
    )
    model = get_peft_model(make_t5(), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def text(length, seed=0):
    return torch.randint(2, 99, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("method", "fields"), [("mtl_lora", {"num_tasks": 3}), ("moe_lora", {"router": "task", "num_tasks": 3, "top_k": 0})]
)
def test_generation_goes_by_task_with_and_without_a_cache(method, fields):
    """Oracle: the likeliest tokens, read one by one from plain forwards of each row alone."""
    model = adapted(method, **fields).eval()
    x = text(7)
    expected = []
    for row, task in zip(x, IDS, strict=True):
        written = [0]
        for _ in range(5):
            logits = model(
                input_ids=row[None], decoder_input_ids=torch.tensor([written]), headwater_task_ids=task[None]
            ).logits
            written.append(int(logits[0, -1].argmax()))
        expected.append(written)
    for cache in (True, False):
        found = model.generate(
            input_ids=x, headwater_task_ids=IDS, use_cache=cache, do_sample=False, min_new_tokens=5, max_new_tokens=5,
            eos_token_id=None,
        )  # fmt: skip
        assert found.tolist() == expected
    beams = model.generate(input_ids=x, headwater_task_ids=IDS, num_beams=2, max_new_tokens=3)
    assert beams.shape[0] == 2
    with pytest.raises(HeadwaterError, match="none was given"):
        model.generate(input_ids=x, max_new_tokens=2)


def test_generation_after_a_forward_that_was_interrupted():
    """By Ctrl-C, which PyTorch calls no hooks for."""
    model = adapted("mtl_lora", num_tasks=3).eval()
    expected = model.generate(input_ids=text(7), headwater_task_ids=IDS, max_new_tokens=5)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.base_model.model.decoder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=text(4), labels=text(4), headwater_task_ids=IDS.flip(0))
    hook.remove()
    assert torch.equal(model.generate(input_ids=text(7), headwater_task_ids=IDS, max_new_tokens=5), expected)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("make_model", ["t5", "bart"])
def test_padding_on_either_side_changes_no_loss(make_model, plain):
    """Of layers that read the encoder's output in the decoder, too, and where both come to the same length."""
    base = make_t5() if make_model == "t5" else BartForConditionalGeneration(bart_config())
    targets = ["q", "k", "v", "wi_0"] if make_model == "t5" else ["q_proj", "k_proj", "v_proj", "fc1"]
    fields = {"target_modules": targets, "r": 2}
    model = get_peft_model(base, LoraConfig(**fields)).train() if plain else balanced(base, **fields)
    headwater.align(model, weight=1.0)
    generator = torch.Generator().manual_seed(4)
    x, labels = (torch.randint(3, 99, (4, n), generator=generator) for n in (20, 12))
    ids, pad = torch.tensor([0, 0, 1, 1]), torch.nn.functional.pad
    found = []
    for read, written in ((0, 0), (8, 0), (0, 8), (4, 12)):
        mask = pad(torch.ones_like(x), (0, read))
        filled = pad(labels, (0, written), value=-100)
        model(input_ids=pad(x, (0, read), value=1), attention_mask=mask, labels=filled, headwater_task_ids=ids)
        found.append(dict(context_of(model).last_losses))
    assert found[0]["align"] > 0
    for losses in found[1:]:
        torch.testing.assert_close(losses, found[0], rtol=1e-4, atol=1e-5)


def test_labels_of_several_classes_are_no_text():
    torch.manual_seed(0)
    base = BartForSequenceClassification(bart_config(problem_type="multi_label_classification"))
    model = balanced(base, target_modules=["fc1", "v_proj"])
    x = torch.cat([text(6), torch.full((2, 1), 2)], 1)
    found = []
    for read in (0, 5):
        mask = torch.nn.functional.pad(torch.ones_like(x), (0, read))
        padded = torch.nn.functional.pad(x, (0, read), value=1)
        model(input_ids=padded, attention_mask=mask, labels=torch.ones(2, 3))
        found.append(dict(context_of(model).last_losses))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def bart_config(**fields):
    return BartConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, num_labels=3,
        pad_token_id=1, eos_token_id=2, dropout=0.0, **fields,
    )  # fmt: skip


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_losses_count_each_stacks_own_tokens(mode):
    """Encoder and decoder of one length, with padding in different places. Oracle: each layer's formula."""
    fields = {"balance_loss": "mixtral", "num_experts": 3, "top_k": 2}
    model = adapted("moe_lora", balance_loss_weight=0.0, **fields).train()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    labels = text(6, seed=1)
    labels[0, 4:] = -100
    inputs, layers = {}, [m for m in model.modules() if isinstance(m, MethodLayer)]
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0])) for m in layers]
    batch = {"input_ids": text(6), "attention_mask": mask, "labels": labels}
    model(**batch)
    for hook in hooks:
        hook.remove()
    names = {m: n for n, m in model.named_modules()}
    expected = []
    for layer, x in inputs.items():
        kept = (mask if ".encoder." in names[layer] else labels != -100).bool()
        probabilities = torch.softmax(x[kept] @ layer.branches["default"].router.T, -1)
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2, -1).indices, 1.0)
        expected.append(3 * (probabilities.mean(0) * chosen.mean(0)).sum())
    losing = adapted("moe_lora", balance_loss_weight=0.5, **fields).train()
    if mode is not None:
        losing.gradient_checkpointing_enable({"use_reentrant": mode})
        losing.enable_input_require_grads()
    loss = losing(**batch).loss
    torch.testing.assert_close(context_of(losing).last_losses["balance"], torch.stack(expected).mean().detach())
    (loss * 256).backward()
    scaled = {n: p.grad / 256 for n, p in losing.named_parameters() if p.grad is not None}
    losing.zero_grad()
    losing(**batch).loss.backward()
    for n, p in losing.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(scaled[n], p.grad)


def balanced(base, **fields):
    """MoE-LoRA whose router hears of nothing but its balance loss: the experts write nothing yet."""
    config = headwater.make_config(
        "moe_lora", num_experts=3, balance_loss="mixtral", balance_loss_weight=0.5, lora_dropout=0.0, init_seed=1,
        **{"target_modules": ["q", "wi_0"], **fields},
    )  # fmt: skip
    return get_peft_model(base, config).train()


def of_routers(model, part=""):
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n.endswith("router") and part in n])


def test_an_encoder_that_ran_before_its_decoder_follows_the_same_loss():
    model = balanced(make_t5())
    base, batch = model.get_base_model(), {"input_ids": text(6), "labels": text(5, seed=1)}
    model(**batch).loss.backward()
    expected = of_routers(model)
    assert expected.norm() > 0
    model.zero_grad()
    encoded = base.get_encoder()(input_ids=batch["input_ids"])
    (model(encoder_outputs=encoded, labels=batch["labels"]).loss * 8).backward()
    torch.testing.assert_close(of_routers(model) / 8, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_encoder_alone_is_checkpointed_and_followed(reentrant):
    model = balanced(make_t5())
    encoder = model.get_base_model().get_encoder()

    def gradient(factor):
        encoder.zero_grad()
        loss = encoder(inputs_embeds=model.get_input_embeddings()(text(6)).requires_grad_())[0].square().mean()
        headwater.follow_loss(model, loss)
        (loss * factor).backward()
        return of_routers(encoder) / factor

    expected = gradient(1.0)
    assert expected.norm() > 0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradient(8.0), expected)


@pytest.mark.parametrize("kind", ["raises", "none", "itself"])
def test_a_model_that_does_not_say_where_its_encoder_is_can_be_adapted(kind):
    class Silent(T5ForConditionalGeneration):
        def get_encoder(self):
            if kind == "raises":
                raise NotImplementedError
            return None if kind == "none" else self

    torch.manual_seed(0)
    model = balanced(Silent(make_t5().config))
    batch = {"input_ids": text(6), "labels": text(5, seed=1)}
    found = []
    for factor in (1.0, 8.0):
        model.zero_grad()
        (model(**batch).loss * factor).backward()
        found.append(of_routers(model) / factor)
    assert found[0].norm() > 0
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("head", [BartModel, BartForSequenceClassification])
def test_a_decoder_that_reads_what_the_model_shifts_knows_its_rows(head):
    torch.manual_seed(0)
    config_of = headwater.make_config("mtl_lora", num_tasks=3, target_modules=["fc1"], init_seed=1)
    model = get_peft_model(head(bart_config()), config_of).eval()
    x = torch.cat([text(6), torch.full((2, 1), 2)], 1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.empty(parameter.shape).normal_(0, 0.3, generator=torch.Generator().manual_seed(3))

    def out(ids):
        return model(input_ids=x, headwater_task_ids=ids)[0]

    assert torch.equal(out(torch.tensor([1])), out(torch.tensor([1, 1])))
    assert not torch.allclose(out(torch.tensor([1])), out(torch.tensor([1, 2])))


def test_a_choice_by_the_prompt_has_none_in_a_decoder():
    with pytest.raises(HeadwaterError, match="encoder-decoder"):
        adapted("cond_mixlora")
