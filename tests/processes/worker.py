"""One of several processes: trains the named cases under one engine and writes what came out.

`python -m torch.distributed.run --standalone --nproc_per_node 2 worker.py ENGINE FOLDER KEY...`
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "processes")]

import process_cases as pc  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


def with_accelerate(case, folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    # seeds differ, as where nobody sets any: what apply draws must come from the first process
    model, applied = pc.applied_to(case, seed=rank)
    optimizer = applied.optimizer(torch.optim.SGD, lr=pc.RATE)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    out = _steps(case, rank, model, applied, wrapped, optimizer, accelerator.backward)
    if rank == 0:
        pc.leave(applied, folder)
    return out


def with_fsdp(case, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, applied = pc.applied_to(case)
    for block in pc.blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = applied.optimizer(torch.optim.SGD, lr=pc.RATE)
    out = _steps(case, dist.get_rank(), model, applied, model, optimizer, torch.Tensor.backward)
    pc.leave(applied, folder)
    return out


def with_trainer(case, folder):
    rank = dist.get_rank()
    model, applied = pc.applied_to(case, seed=rank)
    pc.train_with_trainer(case, model, applied, folder, processes=dist.get_world_size())
    if rank == 0:
        pc.leave(applied, folder)
    return {"after": pc.state_of(model, applied)}


def _steps(case, rank, model, applied, wrapped, optimizer, backward):
    batches = [pc.batch(model, step, rank) for step in range(pc.STEPS)]
    out = {}
    if case.draws:
        torch.manual_seed(5 + rank)
        backward(wrapped(**batches[0]).loss)
        out["gradients"] = pc.gradients_of(model)
        optimizer.zero_grad()
        out["own"] = _mean_of_own_gradients(case, rank, batches[0])
    torch.manual_seed(5 + rank)
    losses = torch.tensor(pc.loop(wrapped, optimizer, batches, backward))
    dist.all_reduce(losses)
    return {**out, "losses": (losses / dist.get_world_size()).tolist(), "after": pc.state_of(model, applied)}


def _mean_of_own_gradients(case, rank, batch):
    """What each process finds for itself, with the random numbers it used, summed by hand."""
    model, _ = pc.applied_to(case)
    torch.manual_seed(5 + rank)
    model(**batch).loss.backward()
    own = pc.gradients_of(model)
    for gradient in own.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return own


ENGINES = {"ddp": with_accelerate, "trainer": with_trainer, "fsdp2": with_fsdp}


def main(engine, folder, *keys):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number, key in enumerate(keys):
        own = Path(folder) / f"{number}"
        try:
            out = ENGINES[engine](pc.CASES[key], own)
        except Exception as error:
            kind = "refused" if type(error).__module__.startswith("tightfit") else "error"
            out = {kind: f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(out, f"{folder}/{number}-{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
