"""SparseAdapter: what the device holds, what the host holds, and that the plan knows both."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from sparse_adapter_cases import FAMILIES, applied, build

import tightfit
from tightfit import SparseAdapter
from tightfit.core.memory import allocator_peak, live_bytes
from tightfit.methods.sparse_adapter.bank import HostBank, Shape, free_bytes

MIB = 2**20


def rows(tokens=4, length=32):
    return (tokens, length)


def test_doubling_the_width_adds_nothing_to_the_device_and_is_planned_on_the_host():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=500
    )
    skeleton = tightfit.skeleton(config, task="causal-lm")
    plans = [
        tightfit.plan(skeleton, SparseAdapter(width=width, max_resident=512, groups="auto"), batch=(4, 64))
        for width in (16384, 32768)
    ]
    assert abs(plans[1].peak_bytes - plans[0].peak_bytes) < MIB
    for plan, width, groups in zip(plans, (16384, 32768), (512, 512)):
        assert plan.by_category["host"] == 2 * (16 * 2 * width * 256 + 5 * width + groups * 256 * 4)
        assert plan.trainable_parameters == 2
    stock = tightfit.plan(skeleton, batch=(4, 64))
    assert plans[0].peak_bytes < stock.peak_bytes  # the base is frozen


@pytest.mark.parametrize("fields", [{}, {"groups": 8, "probe": 2}, {"dtype": "bfloat16"}, {"store": "disk"}])
def test_host_bytes_are_those_of_the_arrays(fields):
    own = {"rows_dtype" if key == "dtype" else key: value for key, value in fields.items()}
    _, _, part = applied("llama", width=64, **own)
    for layer in part.layers:
        bank = layer.bank
        arrays = [bank.tensor(name) for name in bank.shape.arrays()]
        real = sum(a.nbytes for a in (*arrays, bank.step, bank.touched, bank.router))
        assert real == bank.shape.nbytes
    assert part.report()["host_bytes"] == part.host_bytes() == sum(layer.bank.shape.nbytes for layer in part.layers)
    plan = tightfit.plan(build("llama"), SparseAdapter(width=64, top_k=5, **fields), batch=rows())
    assert plan.by_category["host"] == part.host_bytes()


CASES = [
    ("llama", {}),
    ("t5", {"retain": "refetch"}),
    ("bert", {"selection": "union"}),
    *(pytest.param(family, {}, marks=pytest.mark.slow) for family in FAMILIES[1:]),
    pytest.param("llama", {"retain": "refetch"}, marks=pytest.mark.slow),
    pytest.param("llama", {"lookahead": 1}, marks=pytest.mark.slow),
    pytest.param("llama", {"groups": 8, "probe": 2, "gate": "sigmoid"}, marks=pytest.mark.slow),
]


@pytest.mark.filterwarnings(r"ignore:SparseAdapter\(max_resident=:UserWarning")
@pytest.mark.parametrize(("family", "fields"), CASES, ids=str)
def test_the_plan_is_the_real_step_where_the_slot_is_full(family, fields):
    model, recipe = build(family), SparseAdapter(width=256, top_k=8, max_resident=48, **fields)
    found = tightfit.plan(model, recipe, batch=rows()).verify()
    assert abs(found.peak_error) < 1e-3
    for name, predicted, measured in found.rows():
        if name not in ("optimizer", "zero grad"):
            assert abs(predicted / measured - 1) < 1e-3, name


@pytest.mark.parametrize("fields", [{}, pytest.param({"groups": 16, "probe": 4}, marks=pytest.mark.slow)])
def test_a_step_asks_the_allocator_for_the_same_whatever_the_width(fields):
    peaks = []
    for width in (512, 8192):
        model, found, _ = applied("llama", width=width, top_k=4, max_resident=128, **fields)
        optimizer, batch = found.optimizer(lr=0.01), models.batch(model)

        def step(model=model, optimizer=optimizer, batch=batch):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        gc.collect()
        before = live_bytes()
        peaks.append(allocator_peak(step) - before)
        assert max(p.numel() for p in model.parameters()) < width * 32 or width == 512
    assert peaks[0] == peaks[1]


def test_refetching_keeps_no_slot_for_backward():
    plans = {
        retain: tightfit.plan(
            tightfit.skeleton(build("llama").config, task="causal-lm"),
            SparseAdapter(width=4096, top_k=32, max_resident=1024, retain=retain),
            batch=rows(),
        )
        for retain in ("keep", "refetch")
    }
    slot = 1024 * 2 * 32 * 4
    kept = plans["keep"].simulation.saved_bytes - plans["refetch"].simulation.saved_bytes
    assert kept == 2 * slot


def test_files_of_a_disk_store_have_no_name_and_vanish():
    shape = Shape(width=64, size=32, dtype=torch.float32, groups=0, store="disk")
    bank = HostBank(shape, hollow=False)
    maps = Path("/proc/self/maps").read_text()
    assert maps.count("tightfit-rows-") == 4 and maps.count("(deleted)") >= 4
    bank.tensor("rows").fill_(3.0)
    assert (bank.tensor("rows") == 3.0).all()
    bank.close()
    gc.collect()
    assert "tightfit-rows-" not in Path("/proc/self/maps").read_text()
    assert free_bytes("disk") > 0 and free_bytes("memory") > 0


LIMITED = """
import resource, sys, torch
sys.path[:0] = sys.argv[2:]
import models, tightfit
from tightfit import SparseAdapter
torch.set_num_threads(1)
model = models.build("llama")
batch = models.batch(model)
model(**batch).loss.backward()
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + 2**27, data + 2**27))
recipe = SparseAdapter(width=2**18, top_k=8, groups="auto", store=sys.argv[1], where="layers.0.mlp")
applied = tightfit.apply(model, recipe)
optimizer = applied.optimizer(lr=0.1)
losses = []
for _ in range(4):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
assert losses[-1] < losses[0], losses
print("trained", SparseAdapter.of(applied).host_bytes() > 2**27)
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_rows_that_the_memory_cannot_hold_train_from_disk(store):
    folder = os.path.dirname(os.path.dirname(__file__))
    run = subprocess.run([sys.executable, "-c", LIMITED, store, folder], capture_output=True, text=True)
    if store == "disk":
        assert run.stdout.split() == ["trained", "True"], run.stderr
    else:
        assert run.returncode != 0 and "MemoryError" in run.stderr
