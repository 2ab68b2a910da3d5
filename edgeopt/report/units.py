"""Figures as people read them."""

from __future__ import annotations

import math

#: Long names of checks and measurements; any other name is shown with its underscores as spaces.
TITLES = {
    "accuracy_drop": "accuracy drop",
    "accuracy_kept": "accuracy kept",
    "sqnr_db": "SQNR",
    "source_sqnr_db": "SQNR, float file to source",
    "max_abs_error": "largest error",
    "speedup": "speed-up",
    "latency_ms": "latency",
    "predicted_latency_ms": "latency on the device",
    "size_bytes": "size",
    "peak_memory_bytes": "peak memory",
    "cpu_operators": "operators on the CPU",
    "accelerated": "operators on the accelerator",
    "sram_bytes": "SRAM",
    "storage_bytes": "storage for weights",
    "transfer_bytes": "moved over the link",
    "sram_traffic_bytes": "SRAM traffic",
    "storage_traffic_bytes": "storage traffic",
    "onchip_bytes": "parameters on the chip",
    "offchip_bytes": "parameters off the chip",
    "macs": "MACs",
    "host_agreement": "answers as on this machine",
    "host_identical": "identical to this machine",
    "host_sqnr_db": "SQNR to this machine",
    "time_to_first_token_ms": "time to first token",
    "encoder_latency_ms": "encoder",
    "prefill_latency_ms": "prefill",
    "decoder_step_ms": "decoder, one step",
    "tokens_per_second": "tokens per second",
    "cache_bytes": "cache",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "wer": "word error rate",
    "top1": "top-1",
    "top5": "top-5",
}


def title(name: str) -> str:
    """ "sqnr_db@phone:cortex-a76" -> "SQNR@phone:cortex-a76"."""
    plain, at, place = name.partition("@")
    return TITLES.get(plain, plain.replace("_", " ")) + at + place


def quantity(value: float | None, unit: str) -> str:
    """A value in its unit: bytes as KiB, MiB or GiB, fractions as per cent, times to three digits.

    None is "not measured"; an infinite SQNR, which identical outputs have, is "exact".
    """
    if value is None or math.isnan(value):
        return "not measured"
    if unit == "dB" and value == math.inf:
        return "exact"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    match unit:
        case "bytes":
            return _bytes(value)
        case "fraction":
            return f"{100 * value:.2f} %"
        case "fraction of range":
            return f"{100 * value:.3g} % of range"
        case "ms":
            return f"{three_digits(value)} ms"
        case "x":
            return f"{value:.2f}x"
        case "dB":
            return f"{value:.1f} dB"
        case "cycles" | "MACs" | "instructions":
            return _count(value)
        case "operators":
            return f"{value:.0f}"
        case "tokens/s":
            return f"{value:.0f}" if value >= 100 else three_digits(value)
        case _:
            return f"{value:.4g} {unit}".rstrip()


def _count(value: float) -> str:
    """176_800 -> "177 k"."""
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{three_digits(value / limit)}{letter}"
    return f"{value:.0f}"


def three_digits(value: float) -> str:
    """1234, 123, 12.3, 1.23, 0.012: as many decimals as mean something."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 4)}f}"


def _bytes(value: float) -> str:
    if abs(value) < 1 << 10:
        return f"{value:.0f} B"
    if abs(value) < 1 << 20:
        return f"{value / (1 << 10):.1f} KiB"
    if abs(value) < 1 << 30:
        return f"{value / (1 << 20):.2f} MiB"
    return f"{value / (1 << 30):.2f} GiB"
