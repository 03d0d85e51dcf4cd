"""Gradients over several processes: DDP and FSDP2 of a tiny patched model, with gloo on CPUs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import tiny_model, tokens
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lminf_cuda import patch_model

PROCESSES = 2


def model() -> Any:
    torch.manual_seed(0)
    return patch_model(tiny_model().requires_grad_(True).train(), n_global=3, window=12)


def ids() -> Tensor:
    return tokens(2 * PROCESSES, 40)


def gradients(of: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda g=p.grad: g)().clone()
        for name, p in of.named_parameters()
    }


def data_parallel(mine: Tensor) -> dict[str, Tensor]:
    parallel = DistributedDataParallel(model())
    parallel(mine, labels=mine).loss.backward()
    return gradients(parallel)


def fully_sharded(mine: Tensor) -> dict[str, Tensor]:
    sharded = model()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    sharded(mine, labels=mine).loss.backward()
    return gradients(sharded)


def work(rank: int, run: Callable[[Tensor], dict[str, Tensor]], port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)
    try:
        torch.save(run(ids().chunk(PROCESSES)[rank]), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("run", [data_parallel, fully_sharded])
def test_gradients_are_those_of_one_process(
    run: Callable[[Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (run, port, str(tmp_path)), nprocs=PROCESSES)
    alone = model()
    sum(alone(part, labels=part).loss for part in ids().chunk(PROCESSES)).div(PROCESSES).backward()
    wanted = gradients(alone)
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=2e-6, msg=name)
