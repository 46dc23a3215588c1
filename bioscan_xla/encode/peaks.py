"""Peak speeds of TPUs from their data sheets, for utilisation and plans.

Reference: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
"""

TPU_PEAK_FLOPS = {
    "v2": 22.5e12,
    "v3": 61.5e12,
    "v4": 275e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6e": 918e12,
}
"""bfloat16 FLOP/s of a device: a core of v2 and v3, a chip of the others."""

TPU_NAMES = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}
"""Names that devices report, if not the generation's name."""
