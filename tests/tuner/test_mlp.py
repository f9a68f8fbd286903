"""The gated feed-forward block as one function: where it runs, where it must not, and what it saves."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headwater
from headwater.ops.gated_mlp import _activation
from headwater.tuner.mlp import _is_gated_block

from .helpers import TARGETS, adapt, assert_near, gradients, train_loss
from .rows import BY_ID
from .test_fused import saved_bytes, step, watch

ROW = BY_ID["rlora"]


def blocks_run(model: nn.Module, row=ROW) -> int:
    """How many blocks ran as one function in a forward with gradients."""
    names, todo = [], [train_loss(row, model).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names.append(node)
            todo += [following for following, _ in node.next_functions]
    return sum(node.name() == "_GatedMLPBackward" for node in names)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite", "olmo2"]
)
def test_the_usual_blocks_are_known_by_their_text(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = next(getattr(module, name) for name in dir(module) if name.endswith("MLP"))
    assert _is_gated_block(kind)


def test_other_blocks_are_left_alone(tiny_llama):
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Halved(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / 2

    assert not _is_gated_block(Halved)
    base = tiny_llama()
    for layer in base.model.layers:
        layer.mlp.__class__ = Halved
    model = adapt(ROW, base).train()
    assert blocks_run(model) == 0


@pytest.mark.parametrize("targets", [TARGETS, ["up_proj"], ["down_proj", "q_proj"], ["gate_proj", "down_proj"]])
@pytest.mark.parametrize("base", [{}, {"mlp_bias": True}, {"hidden_act": "gelu_pytorch_tanh"}])
def test_any_projections_biases_and_activations(tiny_llama, monkeypatch, targets, base):
    model = adapt(ROW, tiny_llama(**base).double(), autocast=False, target_modules=targets).double().train()
    assert blocks_run(model) == 2
    found, expected = (step(ROW, model, monkeypatch, ops) for ops in (None, "reference"))
    assert_near(found, expected, relative=1e-9)


@pytest.mark.parametrize("row_id", ["rlora", "mlora", "hydralora"])
def test_gate_and_up_of_different_ranks_do_not_share(tiny_llama, monkeypatch, row_id):
    fields = {"rank_pattern": {"up_proj": 3}, "lora_dropout": 0.2}
    row = BY_ID[row_id]
    model = adapt(row, tiny_llama().double(), autocast=False, **fields).double().train()
    assert blocks_run(model, row) == 2
    found, expected = (step(row, model, monkeypatch, ops) for ops in (None, "reference"))
    assert_near(found, expected, relative=1e-9)


def test_only_attention_adapted_leaves_the_block_as_it_is(tiny_llama):
    model = adapt(ROW, tiny_llama(), target_modules=["q_proj"]).train()
    assert all("forward" not in module.__dict__ for module in model.modules())


def disable(model):
    model.base_model.disable_adapter_layers()


def merge(model):
    model.merge_adapter()


def second_adapter(model):
    model.add_adapter("second", headwater.make_config("mlora", r=2, target_modules=TARGETS, init_seed=5))
    model.base_model.set_adapter(["default", "second"])


def hook_on_base(model):
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").register_forward_hook(lambda *_: None)
    model.get_submodule("base_model.model.model.layers.1.mlp.act_fn").register_forward_hook(lambda *_: None)


def trained_base(model):
    for layer in model.base_model.model.model.layers:
        layer.mlp.down_proj.base_layer.weight.requires_grad_()


@pytest.mark.parametrize("state", [disable, merge, second_adapter, watch, hook_on_base, trained_base])
def test_out_of_the_ordinary_each_layer_runs_by_itself(tiny_llama, monkeypatch, state):
    row = BY_ID["mlora"]
    model = adapt(row, tiny_llama().double(), autocast=False).double().train()
    assert blocks_run(model, row) == 2
    state(model)
    for name, parameter in model.named_parameters():
        if "input_layernorm" in name:
            parameter.requires_grad_()  # something to train, where the adapter does not take part
    assert blocks_run(model.double(), row) == 0
    found, expected = (step(row, model, monkeypatch, ops) for ops in (None, "reference"))
    assert_near(found, expected, relative=1e-9)


def test_an_activation_with_parameters_is_trained(tiny_llama, monkeypatch):
    model = adapt(ROW, tiny_llama(hidden_act="prelu").double(), autocast=False).double().train()
    for layer in model.base_model.model.model.layers:
        layer.mlp.act_fn.requires_grad_()
    assert blocks_run(model) == 0
    found, expected = (step(ROW, model, monkeypatch, ops) for ops in (None, "reference"))
    assert_near(found, expected, relative=1e-9)
    assert sum("act_fn" in name for name in found) == 2


def test_unloading_leaves_no_trace_and_the_class_never_changed(tiny_llama):
    base = tiny_llama()
    kinds = [type(module) for module in base.modules()]
    model = adapt(BY_ID["mlora"], base)
    assert [type(layer.mlp).__name__ for layer in base.model.layers] == ["LlamaMLP", "LlamaMLP"]
    assert sum("forward" in module.__dict__ for module in base.modules()) == 2
    plain = model.unload()
    assert [type(module) for module in plain.modules()] == kinds
    assert not any({"forward", "_replicate_for_data_parallel"} & module.__dict__.keys() for module in plain.modules())


def test_a_copys_block_runs_the_copys_layers(tiny_llama):
    model = adapt(ROW, tiny_llama(), **ROW.no_dropout).train()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert blocks_run(twin) == 2
    train_loss(ROW, twin).backward()
    assert all(g.abs().max() > 0 for name, g in gradients(twin).items() if name.endswith(".A"))


@pytest.mark.parametrize("method", ["rlora", "hydralora", "mlora"])
def test_saves_less_than_the_frozen_model(tiny_llama, method):
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    frozen = tiny_llama(**sizes).requires_grad_(False).train()
    x = torch.randn(2, 16, 96, requires_grad=True)
    least = saved_bytes(lambda x: frozen(inputs_embeds=x).logits, x, frozen)
    model = adapt(BY_ID[method], tiny_llama(**sizes)).train()
    assert saved_bytes(lambda x: model(inputs_embeds=x).logits, x, model) <= least
    watch(model)
    assert saved_bytes(lambda x: model(inputs_embeds=x).logits, x, model) > least


def test_matmuls_of_a_block_read_x_once_for_each_weight(tiny_llama):
    """Counted: 3 wide matmuls forward, 3 backward. Of thin ones, each adapted projection writes once and finds its
    ranks' and its heads' gradients; gate and up share x, so they read it, add to its gradient and find their
    down-projections' in one each."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.matmuls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.matmuls += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return function(*args, **(kwargs or {}))

    mlp = adapt(ROW, tiny_llama(), lora_dropout=0.0).train().base_model.model.model.layers[0].mlp
    x = torch.randn(1, 40, 32, requires_grad=True)
    with Count() as counter:
        mlp(x).sum().backward()
    assert counter.matmuls == 3 + 3 + 3 * (1 + 2) + 2 * (1 + 2)


@pytest.mark.parametrize(("row_id", "most"), [("rlora", 250), ("mlora", 215), ("hydralora", 325)])
def test_operations_of_a_block(tiny_llama, row_id, most):
    """Counted, not timed: with few tokens, a training step's time is that of its calls. Views count, too."""
    from .test_few_tokens import Calls

    dropout = {} if row_id == "hydralora" else {"lora_dropout": 0.0}
    mlp = adapt(BY_ID[row_id], tiny_llama(), **dropout).train().base_model.model.model.layers[0].mlp
    x = torch.randn(1, 40, 32, requires_grad=True)
    mlp(x).sum().backward()
    with Calls() as counter:
        mlp(x).sum().backward()
    assert counter.count <= most


@pytest.mark.parametrize("row_id", ["rlora", "mlora", "hydralora", "mtl_lora", "multilora"])
@pytest.mark.parametrize("whole_block", [True, False])
def test_backward_takes_the_weights_that_forward_cast(tiny_llama, row_id, whole_block):
    """Adapters in float32 on a base in bfloat16."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        """Of matrices to bfloat16 that are not as long as the batch."""

        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            to_half = function.overloadpacket is torch.ops.aten._to_copy and kwargs["dtype"] is torch.bfloat16
            self.count += to_half and args[0].dim() == 2 and x.shape[1] not in args[0].shape
            return function(*args, **(kwargs or {}))

    row = BY_ID[row_id]
    model = adapt(row, tiny_llama().bfloat16()).train()
    if not whole_block:
        watch(model)
    x = torch.randn(1, 41, 32, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # the first makes tables, too
        with Casts() as forward, headwater.task_ids(model, [0]):
            y = model(inputs_embeds=x).logits.sum()
        with Casts() as backward:
            y.backward()
    assert forward.count > 0
    assert backward.count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_derivative_of_silu_is_its_graphs(dtype):
    generator = torch.Generator().manual_seed(0)
    gate, da = (torch.randn(70, 33, generator=generator).to(dtype) for _ in range(2))
    mine, graphs = (_activation(act, gate) for act in (F.silu, nn.SiLU()))
    assert torch.equal(mine[0], graphs[0])
    assert torch.equal(mine[1](da), graphs[1](da))
