"""What PartialEmbedding saves, measured at the allocator, and what it must not allocate on the way."""

import gc

import models
import pytest
import torch
import transformers as hf
from partial_embedding_cases import own_loss, table
from torch.utils._python_dispatch import TorchDispatchMode

import tightfit
from tightfit import PartialEmbedding
from tightfit.core import memory
from tightfit.core.host import is_mapped

ROWS, WIDTH, KEPT = 20_000, 64, 2_000
TABLE = ROWS * WIDTH * 4
AWAY = (ROWS - KEPT) * WIDTH * 4


def bert():
    config = hf.BertConfig(**models.SIZE | {"hidden_size": WIDTH}, vocab_size=ROWS, max_position_embeddings=64)
    return hf.BertForSequenceClassification(config)


def llama(tied=False):
    config = hf.LlamaConfig(**models.SIZE | {"hidden_size": WIDTH}, vocab_size=ROWS, tie_word_embeddings=tied)
    return hf.LlamaForCausalLM(config)


def recipe(**fields):
    return PartialEmbedding(ids=range(KEPT), **fields)


def test_the_rows_leave_the_allocator_and_come_back(monkeypatch):
    monkeypatch.setattr("tightfit.core.host._BLOCK_BYTES", TABLE // 10)  # several blocks
    model = bert()
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    gc.collect()
    before = memory.live_bytes()
    with tightfit.apply(model, recipe()) as applied:
        gc.collect()
        maps = ROWS * (4 + 8)  # slot of each id; kept and dropped ids
        assert before - memory.live_bytes() == pytest.approx(AWAY - maps, rel=0.01)
        codec = PartialEmbedding.of(applied).codecs[0]
        assert is_mapped(codec.home) and codec.home.shape == (ROWS - KEPT, WIDTH)
        assert applied.report()["methods"]["PartialEmbedding"]["host_bytes"] == AWAY
    assert all(torch.equal(stock[name], value) for name, value in model.state_dict().items())
    del applied, codec
    gc.collect()
    assert memory.live_bytes() == pytest.approx(before, rel=1e-3)


@pytest.mark.slow
def test_applying_and_removing_take_at_most_one_more_table(monkeypatch):
    monkeypatch.setattr("tightfit.core.host._BLOCK_BYTES", TABLE // 10)
    model, held = llama(), []
    mapped = AWAY * 2  # of two tables; the profiler sees mapped files too
    for act, mapped_now in (
        (lambda: held.append(tightfit.apply(model, recipe(head="split"))), mapped),
        (lambda: held.pop().remove(), 0),
    ):
        gc.collect()
        before = memory.live_bytes()
        peak = memory.allocator_peak(act) - mapped_now
        gc.collect()
        assert peak <= max(before, memory.live_bytes()) + 0.5 * TABLE


@pytest.mark.slow
def test_the_peak_of_a_step_falls_as_planned():
    """Weight, gradient and two moments of each dropped row are gone from the measured peak."""
    batch = {"input_ids": torch.randint(5, KEPT, (4, 32)), "labels": torch.zeros(4, dtype=torch.long)}
    peaks, planned = [], []
    for transform in (None, recipe()):
        model = bert()
        planned.append(tightfit.plan(model, transform, batch=batch).peak_bytes)
        applied = tightfit.apply(model, transform)
        optimizer = applied.optimizer(lr=1e-4)

        def step(model=model, optimizer=optimizer):
            own_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        gc.collect()
        before = memory.live_bytes()
        peaks.append(memory.allocator_peak(step) - before + sum(p.nbytes for p in model.parameters()) * 3)
        del model, applied, optimizer, step
    assert peaks[0] - peaks[1] == pytest.approx(planned[0] - planned[1], rel=0.05)
    assert peaks[0] - peaks[1] > 3.9 * AWAY


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("head", ["full", "split", "pruned"])
@pytest.mark.filterwarnings("ignore:PartialEmbedding.head='pruned'")
def test_no_step_makes_tokens_times_vocabulary(head):
    model = llama(tied=True)
    tightfit.apply(model, recipe(head=head))
    tokens = 1024
    ids = torch.randint(5, KEPT, (1, tokens))
    with Largest() as largest:
        model(input_ids=ids, labels=ids).loss.backward()
    rows = KEPT if head == "pruned" else ROWS
    assert largest.elements <= max(32 * 2**20 // 4, tokens * KEPT, len(table(model)) * WIDTH)
    assert largest.elements < tokens * rows or head == "pruned"


def test_a_state_dict_makes_one_full_table_and_keeps_it_while_it_lives():
    model = llama(tied=True)
    tightfit.apply(model, recipe(head="split"))
    made = []

    class Tables(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty.memory_format and out.numel() == ROWS * WIDTH:
                made.append(out.device)
            return out

    with Tables():
        first = model.state_dict()
        second = model.state_dict()
    assert made == [torch.device("cpu")]
    assert first["lm_head.weight"] is not None
    assert first["lm_head.weight"].data_ptr() == second["model.embed_tokens.weight"].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [bert, llama])
def test_saving_makes_no_full_table_on_the_gpu(make, tmp_path):
    model = make().cuda()
    before = torch.cuda.memory_allocated()
    applied = tightfit.apply(model, recipe(head="split"))
    assert before - torch.cuda.memory_allocated() > 0.95 * (AWAY - 12 * ROWS)
    torch.cuda.reset_peak_memory_stats()
    level = torch.cuda.memory_allocated()
    model.state_dict()
    model.save_pretrained(tmp_path / "live")
    applied.save(tmp_path / "own")
    applied.export(tmp_path / "export")
    assert torch.cuda.max_memory_allocated() - level < 0.1 * TABLE
    ids = torch.randint(5, KEPT, (2, 16), device="cuda")
    labels = torch.zeros(2, dtype=torch.long, device="cuda") if make is bert else ids
    model(input_ids=ids, labels=labels).loss.backward()
    torch.cuda.synchronize()
