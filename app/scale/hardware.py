"""The machine that estimates of time and memory assume."""

from dataclasses import dataclass

from modules.errors import require_positive


@dataclass(frozen=True)
class Hardware:
    """One kind of device and how such devices are connected. Bandwidths are of one device in one direction.

    The presets in `configs/hardware` have makers' figures; `mfu` and `latency` are assumptions of ours, to be replaced
    by what a machine was measured to do.
    """

    name: str = "H100 SXM, 8 in a node, NVLink and 400 Gb/s for each"
    """what it is"""
    peak_flops: float = 989e12
    """dense FLOP/s of one device at the precision of products"""
    mfu: float = 0.4
    """share of the peak that products reach while no communication is waited for: an assumption"""
    intra_bandwidth: float = 450e9
    """bytes per second between devices of a node"""
    inter_bandwidth: float = 50e9
    """bytes per second from a device to another node"""
    devices_per_node: int = 8
    """devices that share the fast connection"""
    memory_bytes: float = 80e9
    """of one device"""
    latency: float = 30e-6
    """seconds that a collective takes on top of its bytes: an assumption"""
    storage_bandwidth: float = 1e9
    """bytes per second that one rank writes of a checkpoint, all at once: an assumption"""
    device_mtbf: float = 50e3
    """hours that one device works between two failures: Llama 3's 419 in 54 days on 16,384 (arXiv 2407.21783)"""

    def __post_init__(self) -> None:
        speeds = ("peak_flops", "mfu", "intra_bandwidth", "inter_bandwidth", "storage_bandwidth")
        names = (*speeds, "memory_bytes", "latency", "device_mtbf")
        numbers = {f"hardware.{name}": float(getattr(self, name)) for name in names}
        require_positive(**numbers, **{"hardware.devices_per_node": self.devices_per_node})

    def seconds(self, wire_bytes: float, ranks: int, stride: int, is_all_to_all: bool = False) -> float:
        """Of one collective of a group that sends so many bytes from each of its ranks.

        Ranks of a group are `stride` apart. A ring passes through a node once, over the network connections of all
        ranks that the group has there; in an all-to-all each rank sends to every other by its own connection.
        """
        together = min(ranks, max(1, self.devices_per_node // stride))
        if together == ranks:
            return wire_bytes / self.intra_bandwidth
        if is_all_to_all:
            outside = wire_bytes * (ranks - together) / (ranks - 1)
            return max(outside / self.inter_bandwidth, (wire_bytes - outside) / self.intra_bandwidth)
        return wire_bytes / min(self.intra_bandwidth, together * self.inter_bandwidth)
