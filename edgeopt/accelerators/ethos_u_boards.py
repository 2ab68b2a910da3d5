"""Memories of boards that Vela's own configuration file doesn't describe, as their makers publish them for Vela.

Keys are Vela's: an access port per memory, the memory's clock as a fraction of the NPU's, bursts in bytes and latencies
in cycles of the NPU.
"""

from __future__ import annotations

#: Name of the system configuration -> keys of its section.
BOARDS: dict[str, dict[str, str]] = {
    # github.com/alifsemi/alif_ml-embedded-evaluation-kit, scripts/vela/ensemble_vela.ini: RTSS_HP_SRAM_MRAM
    "Alif_HP_Sram_Mram": {
        "core_clock": "400e6",
        "axi0_port": "Sram",
        "axi1_port": "OffChipFlash",
        "Sram_clock_scale": "0.762",
        "Sram_burst_length": "8",
        "Sram_read_latency": "29",
        "Sram_write_latency": "29",
        "OffChipFlash_clock_scale": "0.121",
        "OffChipFlash_burst_length": "16",
        "OffChipFlash_read_latency": "60",
        "OffChipFlash_write_latency": "60",
    },
    # The same file: RTSS_HE_SRAM_MRAM
    "Alif_HE_Sram_Mram": {
        "core_clock": "160e6",
        "axi0_port": "Sram",
        "axi1_port": "OffChipFlash",
        "Sram_clock_scale": "1.0",
        "Sram_burst_length": "8",
        "Sram_read_latency": "13",
        "Sram_write_latency": "13",
        "OffChipFlash_clock_scale": "0.303",
        "OffChipFlash_burst_length": "16",
        "OffChipFlash_read_latency": "24",
        "OffChipFlash_write_latency": "24",
    },
}
