"""Dense peak rates of GPUs, for model FLOP utilisation. A device that is not in the table has none.

Source: NVIDIA's data sheets (H100 and H200 Tensor Core GPU 2023-2024, A100 2021, L40S 2023, L4 2023, RTX 4090 Ada
white paper 2022). The sheets that give tensor-core figures with sparsity are halved; boost clocks, so upper bounds.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Dense FLOP/s by how products are computed."""

    bf16: float
    tf32: float
    fp32: float


_TABLE = {
    "H200": Peak(989e12, 494.7e12, 67e12),
    "H100 NVL": Peak(835e12, 417.5e12, 60e12),
    "H100 PCIe": Peak(756e12, 378e12, 51e12),
    "H100": Peak(989e12, 494.7e12, 67e12),  # SXM5, which the driver calls "H100 80GB HBM3"
    "A100": Peak(312e12, 156e12, 19.5e12),
    "L40S": Peak(362e12, 183e12, 91.6e12),
    "L4": Peak(121e12, 60e12, 30.3e12),
    "RTX 4090": Peak(165.2e12, 82.6e12, 82.6e12),
}


def find_peak(device_name: str) -> Peak | None:
    """The peak of a device by the name that the driver gives it, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    words = device_name.split()
    for name, peak in _TABLE.items():
        wanted = name.split()
        if any(words[place : place + len(wanted)] == wanted for place in range(len(words))):
            return peak
        # the A100's and the PCIe cards' names are hyphenated: "NVIDIA A100-SXM4-80GB"
        if len(wanted) == 1 and any(word.partition("-")[0] == name for word in words):
            return peak
    return None
