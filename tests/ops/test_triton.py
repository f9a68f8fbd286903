"""The Triton kernels: through Triton's interpreter, on a GPU where there is one, and compiled for GPUs elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_cases.py")
TESTS = Path(__file__).parents[1]


def run_cases(device: str, **variables: str) -> None:
    path = os.pathsep.join([str(TESTS), str(TESTS / "methods"), *sys.path])
    environment = {**os.environ, "HEADWATER_TEST_DEVICE": device, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_kernels_through_the_interpreter():
    run_cases("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu():
    run_cases("cuda", TRITON_INTERPRET="0")


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headwater.ops import triton_dropout, triton_heads

wide = ("z", "z_0", "h", "dh", "dz", "dz_0", "x", "dx", "down", "u", "du", "clean", "of_clean", "d_clean")
pointers = {"gate": "*fp32", "dgate": "*fp32", "seed": "*i64", "size": "i64", "out": "*i8"}
types = {"bf16": tl.float32, "fp32": tl.float32, "fp64": tl.float64}
heads, reads = [triton_heads._forward, triton_heads._backward], [triton_dropout._read, triton_dropout._add_back]
cases = [(kernel, gate, "bf16") for kernel in (*heads, triton_dropout._keep_mask) for gate in (0, 1, 2)]
for kernel, gate, dtype in cases + [(kernel, gate, dtype) for kernel in reads for gate in (0, 1) for dtype in types]:
    constants = dict(SCALE=1.25, START=-0.5 * gate, DROPS=True, GATE=gate, AGAIN=gate > 0, WIDE=types[dtype])
    constants |= dict(HEADS=4, RANKS=8, TOKENS=128, ENTRIES=1024, ALIGNED=gate == 0, ADDS=gate == 0, STEPS=4)
    if kernel in reads:
        blocks = (triton_dropout.READ, triton_dropout.BACK)[reads.index(kernel)][dtype == "bf16"]
        constants |= dict(RANKS=16, CLEAN=32 * gate, TOKENS=blocks["TOKENS"], COLUMNS=blocks["COLUMNS"])
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    names = kernel.arg_names
    pointers |= {name: "*" + dtype for name in wide} | dict.fromkeys(
        ("found", "found_clean"), "*fp64" if dtype == "fp64" else "*fp32"
    )
    if dtype == "bf16" and gate:
        pointers["u"] = "*fp32"  # `read_exactly`
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        text = triton.compile(source, target=target, options={"enable_fp_fusion": True}).asm
        assert "st.local" not in text.get("ptx", ""), "registers spill"
"""


def test_kernels_compile_for_gpus_that_are_not_here():
    """Types and operations that the interpreter takes and a compiler does not; needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on the CPU")
def test_a_tensor_on_the_cpu_is_refused(monkeypatch):
    from headwater import HeadwaterError
    from headwater.ops import gated_heads

    monkeypatch.setenv("HEADWATER_OPS", "triton")
    with pytest.raises(HeadwaterError, match=r"need a GPU[\s\S]*HEADWATER_OPS"):
        gated_heads(torch.ones(3, 2), torch.ones(3, 2))


def test_triton_that_is_not_installed_is_said(monkeypatch):
    from headwater import HeadwaterError
    from headwater.ops import dispatch

    monkeypatch.setattr(dispatch, "triton_is_here", lambda: False)
    assert dispatch.implementation(torch.device("cuda")) == "autograd"
    monkeypatch.setenv("HEADWATER_OPS", "triton")
    with pytest.raises(HeadwaterError, match=r"not installed[\s\S]*headwater\[triton\]"):
        dispatch.implementation(torch.device("cuda"))
