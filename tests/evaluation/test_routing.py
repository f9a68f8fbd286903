"""Head use per task and head similarity, against softmax and cosine done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model

import headwater
from headwater.analysis import heads
from headwater.analysis.routing import Texts, head_similarity, mean_gates, routing_by_task, task_texts
from headwater.data.encode import DataSpec
from headwater.data.rows import Row
from headwater.data.tasks import Task

MODULES = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]


def adapted(tiny_llama, method: str = "rlora", **fields):
    if method != "lora":
        fields["num_heads"] = 3
    model = get_peft_model(
        tiny_llama(),
        headwater.make_config(method, r=4, lora_alpha=8, target_modules=["up_proj"], task_type="CAUSAL_LM", **fields),
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=generator)
    return model.eval()


def gates_by_hand(model, sequences) -> dict[str, np.ndarray]:
    """Softmax of the router over the inputs of each layer, one sequence at a time."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in MODULES}
    hooks = [
        model.get_base_model()
        .get_submodule(name)
        .register_forward_pre_hook(lambda _module, args, name=name: seen[name].append(args[0][0].double()))
        for name in MODULES
    ]
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence]))
    for hook in hooks:
        hook.remove()
    routers = {name: held.router.double() for name, held in heads(model).items()}
    return {
        name: (torch.cat(inputs) @ routers[name].T).softmax(-1).mean(0).detach().numpy()
        for name, inputs in seen.items()
    }


def test_mean_gates_leave_padding_out(tiny_llama):
    model = adapted(tiny_llama)
    sequences = [list(range(5, 5 + length)) for length in (1, 30, 4, 12, 2, 2, 9, 17, 3, 8)]
    found = mean_gates(model, Texts(sequences), fill=258)
    wanted = gates_by_hand(model, sequences)
    assert list(found) == MODULES
    for name in MODULES:
        assert found[name].numpy() == pytest.approx(wanted[name], abs=1e-5)
        assert np.ptp(wanted[name]) > 0.05  # the heads are used unequally, so a wrong mean would show


def test_mean_gates_of_a_vocabulary_head_are_over_all_tokens(tiny_llama):
    config = headwater.make_config("rlora", r=4, num_heads=3, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    sequences, inputs = [[1, 2, 3, 4, 5], [9, 8]], []
    handle = model.get_base_model().lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence]))
    handle.remove()
    expected = (torch.cat(inputs) @ heads(model)["lm_head"].router.T).softmax(-1).mean(0)
    found = mean_gates(model, Texts(sequences, [1, 1]), fill=0)["lm_head"]
    torch.testing.assert_close(torch.as_tensor(found).float(), expected.detach())


def test_routing_tells_tasks_apart(tiny_llama, tiny_tokenizer):
    model = adapted(tiny_llama).train()
    texts = {"letters": "abc", "digits": "12345"}
    tasks = [
        Task(name, i, "loss", 1.0, train=[Row(text, text * 2)], validation=[], test=[])
        for i, (name, text) in enumerate(texts.items())
    ]
    routing = routing_by_task(model, tiny_tokenizer, tasks, DataSpec())["routing"]
    assert model.training
    model.eval()
    for name, text in texts.items():
        wanted = gates_by_hand(model, [[*tiny_tokenizer(text * 3)["input_ids"], 257]])
        assert list(routing[name]) == MODULES
        for module in MODULES:
            assert routing[name][module] == pytest.approx(wanted[module].tolist(), abs=1e-5)
    assert routing["letters"][MODULES[0]] != pytest.approx(routing["digits"][MODULES[0]], abs=1e-3)


def test_held_out_rows_are_looked_at_where_there_are_some(tiny_llama, tiny_tokenizer):
    task = Task("a", 0, "loss", 1.0, train=[Row("seen", "x")], test=[Row("held", "y")])
    texts = task_texts(adapted(tiny_llama), tiny_tokenizer, task, DataSpec(), 4)
    assert texts.sequences == [[*tiny_tokenizer("heldy")["input_ids"], 257]]


def test_rows_that_are_too_long_do_not_stop_it(tiny_llama, tiny_tokenizer):
    """It runs when the training is done; an error here would cost the run its results."""
    model = adapted(tiny_llama)
    rows = [Row("x" * 600, "y"), Row("ab", "c")]
    tasks = [Task("a", 0, "loss", 1.0, train=[], validation=[], test=rows)]
    found = routing_by_task(model, tiny_tokenizer, tasks, DataSpec(max_length=8))["routing"]["a"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in ("x" * 512, "abc")]
    wanted = gates_by_hand(model, [ids[0], [*ids[1], 257]])
    assert found[MODULES[0]] == pytest.approx(wanted[MODULES[0]].tolist(), abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "mlora"])
def test_without_a_router_there_is_no_routing(tiny_llama, tiny_tokenizer, method):
    model = adapted(tiny_llama, method)
    tasks = [Task("a", 0, "loss", 1.0, train=[], validation=[], test=[Row("a", "b")])]
    assert routing_by_task(model, tiny_tokenizer, tasks, DataSpec()) == {"routing": {"a": {}}, "gates": {}}


def test_head_similarity(tiny_llama):
    model = adapted(tiny_llama)
    held = heads(model)[MODULES[0]]
    held.B.data[1] = -2 * held.B.data[0]
    held.B.data[2] = 0
    found = head_similarity(model)
    assert list(found) == MODULES
    assert found[MODULES[0]] == [
        pytest.approx([1, -1, 0], abs=1e-6),
        pytest.approx([-1, 1, 0], abs=1e-6),
        pytest.approx([0, 0, 0], abs=1e-6),
    ]
    flat = heads(model)[MODULES[1]].B.detach().double().numpy().reshape(3, -1)
    for i in range(3):
        for j in range(3):
            cosine = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
            assert found[MODULES[1]][i][j] == pytest.approx(cosine, abs=1e-6)


def test_plain_lora_has_no_heads_to_compare(tiny_llama):
    assert head_similarity(adapted(tiny_llama, "lora")) == {}


def test_heads_are_the_active_adapters_or_the_named_ones(tiny_llama):
    first = headwater.make_config("rlora", r=4, num_heads=3, head_dropout=0.0, target_modules=["up_proj"])
    model = get_peft_model(tiny_llama(), first, "news")
    model.add_adapter(
        "other", headwater.make_config("rlora", r=2, num_heads=2, head_dropout=0.0, target_modules=["up_proj"])
    )
    assert [held.B.shape[0] for held in heads(model).values()] == [3, 3]
    assert [len(found) for found in head_similarity(model, "other").values()] == [2, 2]
    model.set_adapter("other")
    assert [len(found) for found in head_similarity(model).values()] == [2, 2]
    with pytest.raises(headwater.HeadwaterError, match=r"(?s)no adapter 'default'.*there are news, other"):
        head_similarity(model, "default")
    with pytest.raises(headwater.HeadwaterError, match=r"(?s)no adapter 'x'.*there are default"):
        heads(adapted(tiny_llama, "lora"), "x")
    model.base_model.set_adapter(["news", "other"])
    with pytest.raises(headwater.HeadwaterError, match="2 adapters are active"):
        heads(model)
