"""GPUs by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atesd_kernels.tools.gpus import BY_ARCH


@dataclass(frozen=True)
class GPUSpec:
    """A GPU by its data sheet, and the shares of it we expect to reach (our assumptions, not measured).

    Attributes:
        memory: bytes; flops: dense bf16 FLOPs per second; bandwidth: of its memory, bytes per second.
        link, network: bytes per second to a GPU in the same node, and in another node, each way.
        node: GPUs per node.
        of_memory: share that a plan may fill; allocator, CUDA and libraries need the rest.
        of_flops, of_bandwidth, of_link: shares that layers, decoding and collectives reach.
        latency: minimum duration of a collective, in seconds.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    node: int = 8
    of_memory: float = 0.9
    of_flops: float = 0.5
    of_bandwidth: float = 0.6
    of_link: float = 0.7
    latency: float = 20e-6

    def wire(self, processes: int) -> float:
        """Returns the bytes per second that a process sends in a group of this size."""
        return self.of_link * (self.link if processes <= self.node else self.network)


# From NVIDIA's data sheets: H100 and H200 SXM (NVLink 900 GB/s, half of it each way), and DGX H100 (400 Gb/s of network
# per GPU)
H100 = GPUSpec(
    "H100 SXM 80 GB",
    memory=80e9,
    flops=BY_ARCH["sm_90"].tflops * 1e12,
    bandwidth=BY_ARCH["sm_90"].terabytes * 1e12,
    link=450e9,
    network=50e9,
)
H200 = replace(H100, name="H200 SXM 141 GB", memory=141e9, bandwidth=4.8e12)
