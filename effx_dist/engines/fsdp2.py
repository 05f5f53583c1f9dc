"""FSDP2 (``torch.distributed.fsdp.fully_shard``): mesh, sharding, gradient accumulation, clipping.

Parameters become DTensors, so the optimizers and the Checkpointer see their pieces without help
from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from effx_dist.shard import Group, SoloGroup, TorchGroup

ALONE = -1
"""The local rank of a process that no launcher has given one."""


def init(
    device_type: str | None = None, replicas: int = 1, timeout: timedelta = timedelta(minutes=10)
) -> DeviceMesh:
    """Join the ranks that the launcher started and arrange them in a mesh.

    Args:
        device_type: "cuda" (nccl) or "cpu" (gloo); None: cuda where there is one.
        replicas: 1 for FSDP (axis "shard"); more for HSDP, the world being ``replicas`` x shards
            (axes "replicate", "shard").
        timeout: how long a collective waits before it fails.

    Raises ValueError where the replicas do not divide the world. Without a launcher, this process
    is the whole world.
    """
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        _join(kind, timeout)
    world_size = dist.get_world_size()
    if world_size % replicas:
        raise ValueError(f"{replicas=}: must divide the world size {world_size}")
    if replicas == 1:
        return init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        kind, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard")
    )


def _join(kind: str, timeout: timedelta) -> None:
    if kind == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank(0))
    # gloo beside nccl: checkpoints and sample plans talk from host memory
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if dist.get_node_local_rank(ALONE) != ALONE:
        dist.init_process_group(backend, timeout=timeout)
        return
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def device_of(mesh: DeviceMesh) -> torch.device:
    """The device that this rank trains on."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def data_group(mesh: DeviceMesh) -> Group:
    """The ranks that differ in samples: all of a mesh made by :func:`init`."""
    return TorchGroup() if mesh.size() > 1 else SoloGroup()


def shard(
    model: nn.Module, mesh: DeviceMesh, layers: Iterable[nn.Module], mixed_precision: bool = False
) -> nn.Module:
    """Shard each of ``layers`` and then the model over the mesh, in place; returns it.

    Args:
        model: on any device, the same values on every rank.
        mesh: from :func:`init`.
        layers: the modules to gather one at a time, such as decoder layers.
        mixed_precision: compute in bfloat16, reduce gradients in float32; parameters stay float32.

    Parameters are not broadcast: build the model from the same seed on every rank.
    """
    policy = MixedPrecisionPolicy()
    if mixed_precision:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model.to(device_of(mesh))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def set_gradient_sync(model: nn.Module, is_last_micro_step: bool) -> None:
    """Reduce gradients over the ranks only in the last micro-step of an accumulation. Call before
    each forward."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last_micro_step)
        model.set_is_last_backward(is_last_micro_step)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients in place so that their norm over all ranks is at most ``max_norm``; returns
    the norm before.

    Collective over the ranks that share the parameters, and one wait for the device.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm)
