"""What GPUs and the links between them can do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are peaks, of one direction where there are two."""

    name: str
    memory_bytes: float
    """That CUDA reports"""
    bf16_flops: float
    """Dense, a second"""
    memory_bandwidth: float
    """Bytes a second"""
    nvlink: float
    """Bytes a second to the other GPUs of its host"""


GIB = 2**30
# Memory: the total capacity in torch's out-of-memory messages. Rates: NVIDIA's data sheets of A100 80GB SXM
# (2021), H100 SXM (2023), H200 SXM (2024), DGX B200 (2024; a GPU is 1/8); sparse figures are halved, and
# NVLink's totals, which count both directions, too.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 79.15 * GIB, 312e12, 2.039e12, 300e9),
        Gpu("H100", 79.10 * GIB, 989e12, 3.35e12, 450e9),
        Gpu("H200", 139.80 * GIB, 989e12, 4.8e12, 450e9),
        Gpu("B200", 178.35 * GIB, 2250e12, 8.0e12, 900e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan, and what of their peaks a run is supposed to reach."""

    gpu: Gpu
    gpus_per_host: int = 8
    network: float = 50e9
    """Bytes a second of a GPU to another host: 400 Gb/s"""
    sync_link: float = 50e9
    """Bytes a second from the trainer to the rollout servers, all ranks together"""
    compute_efficiency: float = 0.40
    """Share of bf16_flops that matrix products reach; NVIDIA reports 0.4 to 0.5 for dense training on H100"""
    link_efficiency: float = 0.8
    """Share of a link's peak that collectives reach"""
    decode_efficiency: float = 0.6
    """Share of the memory bandwidth that generation reaches"""
    reserve_bytes: float = 4e9
    """CUDA's context, NCCL's buffers, and what the allocator cannot use"""
