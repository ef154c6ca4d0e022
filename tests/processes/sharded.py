"""One of several processes: trains sharded models in mixed precision, unbroken and taken up from a checkpoint.

`python -m torch.distributed.run --standalone --nproc_per_node 2 sharded.py PRECISION FOLDER KEY...`
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
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint import state_dict as states  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402

SAVED, STEPS = 2, 4
POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


def sharded(case, seed, policy):
    """(model, applied, optimizer) of a case, as a script makes them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, applied = pc.applied_to(case, seed=seed)
    for block in pc.blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=POLICIES[policy])
    fully_shard(model, mesh=mesh, mp_policy=POLICIES[policy])
    return model, applied, applied.optimizer(torch.optim.AdamW, lr=1e-2)


def train(model, optimizer, steps):
    return pc.loop(model, optimizer, [pc.batch(model, step, dist.get_rank()) for step in steps])


def rest(model, applied, optimizer, random):
    """The steps after the checkpoint, and everything as they leave it."""
    torch.set_rng_state(random)
    losses = train(model, optimizer, range(SAVED, STEPS))
    return {"losses": losses, "after": pc.state_of(model, applied)}


def with_dcp(folder, model, applied, optimizer, save):
    """torch.distributed.checkpoint: every process its own shards."""
    held, moments = states.get_state_dict(model, optimizer)
    kept = {"model": held, "optimizer": moments, "recipe": applied.state_dict()}
    if save:
        dcp.save(kept, checkpoint_id=folder / "dcp")
        return
    dcp.load(kept, checkpoint_id=folder / "dcp")
    states.set_state_dict(model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
    applied.load_state_dict(kept["recipe"])


def with_full_states(folder, model, applied, optimizer, save):
    """Whole state dicts, which one process writes; what the recipe keeps besides, each process for itself."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=save)
    path, own = folder / "whole.pt", folder / f"recipe-{dist.get_rank()}.pt"
    if save:
        held, moments = states.get_state_dict(model, optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save({"model": held, "optimizer": moments}, path)
        torch.save(applied.state_dict(), own)
        dist.barrier()
        return
    kept = torch.load(path, weights_only=True)
    states.set_state_dict(
        model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"], options=options
    )
    applied.load_state_dict(torch.load(own, weights_only=True))


WAYS = {"dcp": with_dcp, "full": with_full_states}


def run(case, policy, folder):
    model, applied, optimizer = sharded(case, 0, policy)
    torch.manual_seed(5 + dist.get_rank())
    first = train(model, optimizer, range(SAVED))
    for way in WAYS.values():
        way(folder, model, applied, optimizer, save=True)
    random = torch.get_rng_state()
    found = {"first": first, "whole": rest(model, applied, optimizer, random)}
    for name, way in WAYS.items():
        again = sharded(case, 1, policy)  # what apply draws is other than in the run
        way(folder, *again, save=False)
        found[name] = rest(*again, random)
    model, applied, optimizer = sharded(case, 0, "fp32")
    torch.manual_seed(5 + dist.get_rank())
    return {**found, "fp32": train(model, optimizer, range(STEPS))}


def main(policy, folder, *keys):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number, key in enumerate(keys):
        own = Path(folder) / f"{number}"
        own.mkdir(parents=True, exist_ok=True)
        try:
            out = run(pc.CASES[key], policy, own)
        except Exception as error:
            out = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(out, f"{folder}/{number}-{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
