"""What `edgeopt export` costs beside a bare script with the same converter, quantizer and calibration runs.

    python benchmarks/overhead.py [WORK_DIR]

EfficientNet-Lite0, 128 calibration pictures; each side is a whole process, wall time and peak resident memory as the
operating system counts them, alternating, three times. Needs ../shared/data. Prints a Markdown table.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from imagenet_halves import split

HERE = Path(__file__).resolve().parent
REPEATS = 3
#: Target -> the bare route; converters and calibration runs are the same as ours.
PAIRS = {
    "android-int8": "litert channel-last",
    "android-onnx-int8": "onnx per-channel U8S8",
    "android-executorch-int8": "executorch",
}

BARE = """
import sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
sys.path.insert(0, {here!r})
from vendor_routes import build
from edgeopt.examples.efficientnet_lite0 import model

def picture(path):
    image = Image.open(path).convert("RGB")
    width, height = image.size
    side = int(0.875 * min(width, height))
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.BICUBIC)
    return ((np.asarray(image, np.float32) - 127) / 128).transpose(2, 0, 1)[None].copy()

class Pictures:
    paths = sorted(Path({pictures!r}).glob("*.jpg"))[:128]
    def __iter__(self):
        return ({{"image": picture(path)}} for path in self.paths)
    def __getitem__(self, index):
        return {{"image": picture(self.paths[index])}}
    def __len__(self):
        return len(self.paths)

build({route!r}, model().module.eval(), torch.zeros(1, 3, 224, 224), Pictures(), Path({out!r}))
"""


def main(work: Path) -> None:
    even, odd = split(work / "pictures")
    (work / "bare").mkdir(exist_ok=True)
    print("| target | bare script | edgeopt export | ratio | peak memory, bare | edgeopt | ratio |")
    print("|---|---|---|---|---|---|---|")
    for target, route in PAIRS.items():
        out = work / "bare" / ("model" + {"android-int8": ".tflite", "android-onnx-int8": ".onnx"}.get(target, ".pte"))
        bare = [sys.executable, "-c", BARE.format(here=str(HERE), pictures=str(even), route=route, out=str(out))]
        ours = [sys.executable, "-m", "edgeopt", "export", "--example", "efficientnet-lite0", "--target", target]
        ours += ["--calibration", str(even), "--evaluation", str(odd), "--num-evaluation-samples", "16"]
        ours += ["--output-dir", str(work / "overhead")]
        pairs = [(_run(bare), _run(ours)) for _ in range(REPEATS)]
        times = [statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
        peaks = [statistics.median(pair[side][1] for pair in pairs) for side in (0, 1)]
        ratios = [statistics.median(pair[1][k] / pair[0][k] for pair in pairs) for k in (0, 1)]
        print(
            f"| {target} | {times[0]:.1f} s | {times[1]:.1f} s | {ratios[0]:.2f} "
            f"| {peaks[0]:.2f} GB | {peaks[1]:.2f} GB | {ratios[1]:.2f} |",
            flush=True,
        )


def _run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident gigabytes of one process."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit {process.returncode}: {' '.join(command)[:200]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/edgeopt-benchmark"))
