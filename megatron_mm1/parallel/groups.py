"""Process groups: made once from the parallel configuration, then passed to whoever communicates."""

import os
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import ParallelConfig
from megatron_mm1.errors import UserError


def initialize_process_group(*, timeout_minutes: int) -> torch.distributed.Store:
    """Join the job: NCCL where there are GPUs, gloo elsewhere; a single process when no launcher set the environment.

    torchrun's variables are used where they are set, then Slurm's (plain `srun`, with MASTER_ADDR and MASTER_PORT
    exported).

    Returns:
        The job's key-value store.
    """
    rank, world_size, local_rank = launcher_ranks()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if world_size == 1 and "MASTER_PORT" not in os.environ:
        store: torch.distributed.Store = torch.distributed.HashStore()
    else:
        os.environ.setdefault("MASTER_PORT", "29500")
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            # torchrun's agent already serves a store on this port
            is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(minutes=timeout_minutes),
        )
        # A restarted job finds the keys of the attempt before it in the agent's store.
        store = torch.distributed.PrefixStore(f"mm1/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_device_index(local_rank))
        backend = "nccl"
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=timeout_minutes)
    )
    return store


def _device_index(local_rank: int) -> int:
    """This rank's GPU among those it sees, of which Slurm may show it one only."""
    count = torch.cuda.device_count()
    if count == 1 and "SLURM_STEP_ID" in os.environ:
        return 0
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this process sees {count}; start at most {count} per node"
        )
    return local_rank


def launcher_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's variables, else Slurm's, else one process."""
    for rank, size, local in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        # A shell inside an allocation has Slurm's variables too: only `srun` starts numbered tasks in a step of their
        # own.
        if rank in os.environ and (rank == "RANK" or "SLURM_STEP_ID" in os.environ):
            return int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, "0"))
    return 0, 1, 0


def build_process_groups(parallel: ParallelConfig, *, seed: int) -> ProcessGroupCollection:
    """Make every process group of this layout and seed the random number generators.

    Args:
        parallel: sizes; the data-parallel size is what is left of the world size.
        seed: pipeline stages draw different numbers, and so do tensor-parallel ranks where they hold different slices;
            data- and context-parallel ranks draw the same.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    seed += 100 * groups.pp.rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)  # of the CPU's generator, from which plain torch modules draw
    return groups


def solo_group() -> torch.distributed.ProcessGroup:
    """A group of this rank alone, for modules that take a group and shall not be split."""
    return torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)


def destroy_process_groups() -> None:
    """Undo `build_process_groups`, so that the same processes can try another layout.

    Forgetting the groups is not enough: each gloo group keeps threads of its own, and tens of layouts have thousands.
    """
    parallel_state.destroy_model_parallel()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
