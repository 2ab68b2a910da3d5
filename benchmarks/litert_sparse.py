"""Dense against sparse .tflite files of XNNPACK in turns, with and without AVX: python ... [--no-avx] FILE...

XNNPACK never computes sparse on x86 processors with AVX. --no-avx clears those bits in XNNPACK's own record of the
processor, in this process, so that its 128-bit SSE kernels run: dense ones and sparse ones. That shows that a file gets
the sparse kernels, and is the nearest to 128-bit ARM NEON that an x86 machine has; it is no measurement of a phone.
Times are CPU time of one thread (milliseconds), which other processes of a busy machine disturb less.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import time
from pathlib import Path

import numpy as np

_LIBRARY = "libpywrap_litert_common.so"
_SSE_BITS = 0xF  # xnn_arch_x86_ssse3, _sse4_1 and what came before them
_FLAGS_WORD = 1  # of struct xnn_hardware_config, LiteRT 2.3.0


def hide_avx() -> None:
    """Clear every bit beyond SSE4.1 in XNNPACK's record of the processor. LiteRT 2.3.0 only."""
    import ai_edge_litert

    library = Path(ai_edge_litert.__file__).parent / _LIBRARY
    listed = subprocess.run(["nm", str(library)], check=True, capture_output=True, text=True).stdout
    address = {p[2]: int(p[0], 16) for line in listed.splitlines() if len(p := line.split()) == 3}
    mapped = next(line.split() for line in Path("/proc/self/maps").read_text().splitlines() if _LIBRARY in line)
    base = int(mapped[0].partition("-")[0], 16) - int(mapped[2], 16)
    config = ctypes.CFUNCTYPE(ctypes.c_void_p)(base + address["xnn_init_hardware_config"])()
    (ctypes.c_uint64 * 2).from_address(config)[_FLAGS_WORD] &= _SSE_BITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-avx", action="store_true")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    from ai_edge_litert import interpreter as litert

    litert.Interpreter(options.files[0])  # loads the library
    if options.no_avx:
        hide_avx()
    interpreters = [litert.Interpreter(file, num_threads=1) for file in options.files]
    for interpreter in interpreters:
        interpreter.allocate_tensors()
        detail = interpreter.get_input_details()[0]
        noise = np.random.default_rng(0).normal(size=detail["shape"])
        interpreter.set_tensor(detail["index"], noise.astype(detail["dtype"]))
        interpreter.invoke()
    outputs = [i.get_tensor(i.get_output_details()[0]["index"]) for i in interpreters]
    times: list[list[float]] = [[] for _ in interpreters]
    for _ in range(options.runs):
        for taken, interpreter in zip(times, interpreters, strict=True):
            start = time.thread_time()
            interpreter.invoke()
            taken.append(time.thread_time() - start)
    for file, taken, output in zip(options.files, times, outputs, strict=True):
        off = np.abs(output - outputs[0]).max() / np.abs(outputs[0]).max()
        print(f"{file}: median {np.median(taken) * 1e3:.2f} ms, least {min(taken) * 1e3:.2f} ms, {off:.1e} off")


if __name__ == "__main__":
    main()
