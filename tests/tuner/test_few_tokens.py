"""Decoding: gated heads in few calls on copies of the weights, which must never be old ones."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import headwater

from .helpers import adapt, stir, task_kwargs, tokens
from .rows import BY_ID

NAME = "model.layers.0.mlp.up_proj"
BY_ROW = {"mtl_lora", "moe_lora-by-task", "taskprobe", "cond_mixlora"}  # what they do is decided for a whole row
ROWS = [row_id for row_id in BY_ID if row_id not in BY_ROW]


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def made(row_id, tiny_llama):
    model = adapt(BY_ID[row_id], tiny_llama().double(), autocast=False).double().eval()
    return model, model.get_submodule(f"base_model.model.{NAME}")


def expected(layer, x):
    """The same tokens among many, where nothing is kept."""
    with torch.no_grad():
        return layer(x.repeat(20, 1))[: x.shape[0]]


def check(layer, x):
    """Right before and after it is held, and held in the end."""
    with torch.no_grad():
        found = [layer(x) for _ in range(4)]
    for y in found:
        torch.testing.assert_close(y, expected(layer, x), rtol=1e-10, atol=1e-10)
    assert torch.equal(found[2], found[3])
    with torch.no_grad():
        layer(x)
        layer(x)


@pytest.mark.parametrize("row_id", ROWS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_few_tokens_are_what_they_are_among_many(row_id, tiny_llama, tokens):
    _, layer = made(row_id, tiny_llama)
    x = torch.randn(tokens, 32, dtype=torch.float64)
    check(layer, x)
    assert layer.held[0].decoder
    assert (expected(layer, x) - layer.base_layer(x)).abs().max() > 0.1


@pytest.mark.parametrize("row_id", ROWS)
def test_no_write_is_missed(row_id, tiny_llama):
    model, layer = made(row_id, tiny_llama)
    x, branch = torch.randn(2, 32, dtype=torch.float64), layer.branch("default")
    check(layer, x)
    for tensor in filter(torch.is_floating_point, [*branch.parameters(), *branch.buffers()]):
        with torch.no_grad():
            tensor.add_(torch.randn_like(tensor))  # as an optimiser does
        check(layer, x)
        tensor.data = tensor.data + 1.0  # as `to` does
        check(layer, x)
        tensor.data.mul_(0.5)  # PyTorch does not see this one; the next prompt does
        check_after_prompt = expected(layer, x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), check_after_prompt, rtol=1e-10, atol=1e-10)
    stir(model, seed=3)
    check(layer, x)


def test_a_training_step_drops_what_is_kept(tiny_llama):
    model, layer = made("rlora", tiny_llama)
    x = torch.randn(2, 32, dtype=torch.float64)
    check(layer, x)
    assert layer.held[0].decoder
    model.train()
    layer(x)
    model.eval()
    assert not layer.held[0].decoder


def test_copies_and_pickles_keep_nothing(tiny_llama):
    _, layer = made("rlora", tiny_llama)
    check(layer, torch.randn(1, 32, dtype=torch.float64))
    assert layer.held[0].decoder
    assert not copy.deepcopy(layer).held[0].decoder
    assert not pickle.loads(pickle.dumps(layer)).held[0].decoder


def test_observers_see_every_token(tiny_llama):
    model, layer = made("rlora", tiny_llama)
    x, seen = torch.randn(1, 32, dtype=torch.float64), []
    check(layer, x)
    with headwater.observe(model, lambda name, gate: seen.append(gate)), torch.no_grad():
        layer(x)
        layer(x)
    assert len(seen) == 2


@pytest.mark.parametrize(("row_id", "most"), [("rlora", 20), ("hydralora", 17), ("mlora", 6)])
def test_calls_for_one_token(row_id, most, tiny_llama):
    """Counted, not timed: what a decoded token costs beyond the frozen layer; views count, too."""
    _, layer = made(row_id, tiny_llama)
    assert calls_beyond(layer, layer.base_layer) <= most


def calls_beyond(run, frozen) -> int:
    """Calls of one decoded token, once what is held has been made, without those of the frozen part."""
    x, counts = torch.randn(1, 32, dtype=torch.float64), []
    for function in (run, run, run, frozen):
        with torch.inference_mode(), Calls() as counter:
            function(x)
        counts.append(counter.count)
    return counts[2] - counts[3]


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj", "o_proj"]])
def test_a_model_decodes_as_the_reference_does(row, tiny_llama, targets, monkeypatch):
    """Also methods that look at the whole row, or at its task."""
    model = adapt(row, tiny_llama().double(), autocast=False, target_modules=targets).double().eval()
    stir(model)
    ids, found = tokens(2, 20), {}
    for ops in ("reference", ""):
        monkeypatch.setenv("HEADWATER_OPS", ops)
        with torch.no_grad():
            seen = model(input_ids=ids, use_cache=True, **task_kwargs(row, 2))
            logits = [seen.logits]
            for token in range(3):
                step = {"input_ids": ids[:, token : token + 1], "past_key_values": seen.past_key_values}
                seen = model(**step, use_cache=True, **task_kwargs(row, 2))
                logits.append(seen.logits)
        found[ops] = torch.cat(logits, 1)
    torch.testing.assert_close(found[""], found["reference"], rtol=1e-9, atol=1e-9)
    layer = next(m for name, m in model.named_modules() if name.endswith(targets[0]))
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    assert layer.held[0].decoder or held(mlp)


# -- the whole gated block


def block_of(row_id, tiny_llama, **fields):
    model = adapt(BY_ID[row_id], tiny_llama(mlp_bias=True).double(), autocast=False, **fields).double().eval()
    return model, model.get_submodule("base_model.model.model.layers.0.mlp")


def held(block) -> bool:
    return block.forward.args[1].decoder is not None


PARTS = [["gate_proj", "up_proj", "down_proj"], ["up_proj"], ["gate_proj", "down_proj"], ["down_proj"]]


@pytest.mark.parametrize("row_id", ROWS)
@pytest.mark.parametrize("targets", PARTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_block_of_few_tokens_is_what_it_is_among_many(row_id, tiny_llama, targets, tokens):
    _, block = block_of(row_id, tiny_llama, target_modules=targets)
    x = torch.randn(1, tokens, 32, dtype=torch.float64)
    for _ in range(2):
        check(block, x.flatten(0, 1))
        assert held(block)
    with torch.no_grad():
        assert torch.equal(block(x)[0], block(x[0]))


def test_gate_and_up_of_different_ranks(tiny_llama):
    _, block = block_of("rlora", tiny_llama, rank_pattern={"gate_proj": 2})
    check(block, torch.randn(2, 32, dtype=torch.float64))
    assert held(block)


def test_no_write_to_a_block_is_missed(tiny_llama):
    model, block = block_of("rlora", tiny_llama)
    x = torch.randn(2, 32, dtype=torch.float64)
    check(block, x)
    for tensor in [*block.parameters(), *block.buffers()]:
        with torch.no_grad():
            tensor.add_(torch.randn_like(tensor))
        check(block, x)
    stir(model, seed=3)
    check(block, x)


def replace_parameter(model, block):
    branch = block.up_proj.branch("default")
    branch.B = torch.nn.Parameter(torch.randn_like(branch.B))


def replace_base(model, block):
    linear = block.down_proj.base_layer
    linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight), requires_grad=False)


def replace_branch(model, block):
    block.gate_proj.branches["default"] = copy.deepcopy(block.gate_proj.branches["other"])


def rescale(model, block):
    block.gate_proj.branch("default").scaling *= 2


def double_output(model, block):
    block.up_proj.register_forward_hook(lambda module, args, y: 2 * y)


def double_inner_output(model, block):
    block.down_proj.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def replace_base_forward(model, block):
    linear = block.up_proj.base_layer
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


def replace_branch_forward(model, block):
    branch = block.gate_proj.branch("default")
    forward = branch.forward
    branch.forward = lambda *args: 2 * forward(*args)


def replace_activation(model, block):
    block.act_fn = torch.nn.ReLU()


CHANGES = {
    "another adapter": lambda model, block: model.set_adapter("other"),
    "off": lambda model, block: model.base_model.disable_adapter_layers(),
    "merged": lambda model, block: model.merge_adapter(),
    "dtype": lambda model, block: block.float().double(),
    **{f.__name__: f for f in (replace_parameter, replace_base, replace_branch, rescale)},
    **{f.__name__: f for f in (double_output, double_inner_output, replace_activation)},
    **{f.__name__: f for f in (replace_base_forward, replace_branch_forward)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_tokens_is_seen(change, tiny_llama):
    model, block = block_of("mlora", tiny_llama)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    stir(model, "other", seed=5)
    model.double().eval()
    x = torch.randn(2, 32, dtype=torch.float64)
    check(block, x)
    with torch.no_grad():
        before = [run(x) for run in (block, block.gate_proj, block.up_proj)]  # by themselves, the layers hold theirs
        CHANGES[change](model, block)
        after = [run(x) for run in (block, block.gate_proj, block.up_proj)]
    expectations = [expected(run, x) for run in (block, block.gate_proj, block.up_proj)]
    for found, right in zip(after, expectations, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    changed = [not torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(after, before, strict=True)]
    assert any(changed) == (change not in ("merged", "dtype"))


def test_who_switches_adapters_with_every_token_makes_nothing(tiny_llama):
    model, block = block_of("mlora", tiny_llama)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    x = torch.randn(2, 32, dtype=torch.float64)
    with torch.no_grad():
        for name in ["default", "other"] * 2:
            model.set_adapter(name)
            block(x)
            assert not held(block)
        block(x)
        assert held(block)


def test_a_list_of_adapters_that_grows_is_seen(tiny_llama):
    model, block = block_of("mlora", tiny_llama)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    stir(model, "other", seed=5)
    model.double().eval()
    x, names = torch.randn(2, 32, dtype=torch.float64), ["default"]
    model.base_model.set_adapter(names)
    check(block, x)
    names.append("other")  # PEFT keeps the caller's list
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected(block, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("verb", [lambda model: model.delete_adapter("default"), lambda model: model.float()])
def test_what_is_deleted_or_moved_is_not_held(verb, tiny_llama):
    model, block = block_of("mlora", tiny_llama)
    check(block, torch.randn(2, 32, dtype=torch.float64))
    check(block.up_proj, torch.randn(2, 32, dtype=torch.float64))
    branch = weakref.ref(block.up_proj.branch("default"))
    assert held(block)
    assert block.up_proj.held[0].decoder
    verb(model)
    assert not held(block)
    assert not block.up_proj.held[0].decoder
    gc.collect()
    assert (branch() is None) == (not block.up_proj.branches)


@pytest.mark.parametrize("row_id", ["rlora", "hydralora", "mlora", "multilora", "cora", "lori", "smora"])
def test_what_is_held_is_of_one_moment(row_id, tiny_llama):
    """Writes that PyTorch does not see: all weights are the old ones then, until the next prompt."""
    _, layer = made(row_id, tiny_llama)
    x = torch.randn(2, 32, dtype=torch.float64)
    check(layer, x)
    with torch.no_grad():
        before = layer(x)
        for tensor in layer.branch("default").parameters():
            tensor.data.mul_(2.0)
        assert torch.equal(layer(x), before)


def test_a_block_holds_nothing_past_a_prompt_a_step_or_in_a_copy(tiny_llama):
    model, block = block_of("rlora", tiny_llama)
    x = torch.randn(2, 32, dtype=torch.float64)
    check(block, x)
    assert not held(copy.deepcopy(block))
    expected(block, x)  # many tokens
    assert not held(block)
    check(block, x)
    assert block(x).requires_grad
    assert not held(block)
    check(block, x)
    model.train()
    block(x)
    model.eval()
    assert not held(block)
    check(block, x)
    with model.disable_adapter(), torch.no_grad():
        plain = block(x)
    assert not held(block)
    assert not torch.allclose(plain, expected(block, x))


def test_observers_see_the_gates_of_a_block(tiny_llama):
    model, block = block_of("rlora", tiny_llama)
    x, seen = torch.randn(1, 32, dtype=torch.float64), {}
    with headwater.observe(model, lambda name, gate: seen.setdefault(name.rpartition(".")[2], []).append(gate)):
        expected(block, x)
        with torch.no_grad():
            block(x)
            block(x)
    assert {name: len(gates) for name, gates in seen.items()} == {"gate_proj": 3, "up_proj": 3, "down_proj": 3}
    for many, first, second in seen.values():
        torch.testing.assert_close(first, many[:1])
        assert torch.equal(first, second)


def test_a_block_decodes_under_autocast(tiny_llama):
    model = adapt(BY_ID["rlora"], tiny_llama()).eval()
    block, x = model.get_submodule("base_model.model.model.layers.0.mlp"), torch.randn(2, 32)
    with torch.no_grad():
        wide = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = block(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wide, rtol=0.05, atol=0.05 * wide.abs().max().item())


def test_a_base_of_another_dtype(tiny_llama):
    _, layer = made("rlora", tiny_llama)
    x = torch.randn(2, 32, dtype=torch.float64)
    check(layer, x)
    layer.base_layer.bfloat16()
    with torch.no_grad():
        assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("row_id", "most"), [("rlora", 30), ("hydralora", 26), ("mlora", 11)])
def test_calls_for_one_token_of_a_block(row_id, most, tiny_llama):
    """Counted, not timed: beyond the frozen block. By itself each of the three layers takes up to 20."""
    _, block = block_of(row_id, tiny_llama)
    assert calls_beyond(block, tiny_llama(mlp_bias=True).double().model.layers[0].mlp) <= most


def test_a_short_prompt_sees_what_pytorch_does_not(tiny_llama):
    """Oracle: the same forwards of a model that holds nothing."""
    model, block = block_of("rlora", tiny_llama)
    ids = torch.tensor([[1, 2, 3]])

    def tokens_of(model):
        found = []
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            for token in (ids[:, -1:], ids[:, :1], ids[:, 1:2], None):
                found.append(out.logits)
                if token is not None:
                    out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return found

    before = tokens_of(model)
    assert held(block)
    for again, once in zip(tokens_of(model), before, strict=True):
        assert torch.equal(again, once)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    found, expected = tokens_of(model), tokens_of(copy.deepcopy(model))
    for a, b, c in zip(found, expected, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(a, c)


def test_weights_at_an_address_that_was_another_adapters_are_not_taken_for_its_own(tiny_llama):
    _, block = block_of("rlora", tiny_llama)
    x = torch.randn(2, 32, dtype=torch.float64)
    check(block, x)
    weights = [tensor for tensor in block.parameters() if tensor.requires_grad]
    addresses = {tensor.data_ptr() for tensor in weights}
    for tensor in weights:  # the old memory is nobody's now, but for what is held
        tensor.data = tensor.data.clone()
    again = [torch.empty_like(tensor) for _ in range(20) for tensor in weights]
    assert not addresses & {tensor.data_ptr() for tensor in again}
    check(block, x)


def test_no_new_module_comes_to_lie_at_the_address_of_an_old_one(tiny_llama):
    _, block = block_of("rlora", tiny_llama)
    check(block, torch.randn(2, 32, dtype=torch.float64))
    held_modules = [weakref.ref(block.up_proj.base_layer), weakref.ref(block.up_proj.branch("default"))]
    del block.up_proj.base_layer, block.up_proj.branches["default"]
    gc.collect()
    assert all(module() is not None for module in held_modules)


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_projection_in_train_mode_drops(tiny_llama, name):
    _, block = block_of("rlora", tiny_llama)
    x = torch.randn(2, 32, dtype=torch.float64)
    check(block, x)
    getattr(block, name).branch("default").train()
    with torch.no_grad():
        assert not torch.equal(block(x), block(x))


def test_hooks_on_all_modules_see_the_projections(tiny_llama):
    from torch.nn.modules.module import register_module_forward_hook

    _, block = block_of("rlora", tiny_llama)
    x, seen = torch.randn(2, 32, dtype=torch.float64), []
    check(block, x)
    hook = register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        with torch.no_grad():
            block(x)
    finally:
        hook.remove()
    assert {block.gate_proj, block.up_proj, block.down_proj} <= set(seen)
