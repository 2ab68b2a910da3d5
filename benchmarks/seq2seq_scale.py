"""What an encoder-decoder of 375 million parameters costs to export: memory, time, size, and the latency it has then.

    python benchmarks/seq2seq_scale.py TARGET [--scale full|eighth|small] [--work DIR] [--threads 1] [--json FILE]

The network is a T5 with random weights (1.5 GB in float32 at full scale), written once to WORK/<scale> and loaded from
there as `edgeopt export --model hf:DIR` would. Every part is exported through the workbench, float and at the target's
scheme. Prints Markdown; figures are of this machine.

Memory is resident memory of this process and its children, at its peak in each stage, mapped files included (Linux).
What counts as the network's is what exceeds the same export of a toy network in the same process: the converters'
libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np

from edgeopt.config import RunConfig
from edgeopt.generation.parts import split
from edgeopt.generation.samples import part_dataset
from edgeopt.plan import Job, plan_jobs
from edgeopt.progress import Silent
from edgeopt.runtimes import HOST_RUNTIMES
from edgeopt.sources import SourceOptions, load_model
from edgeopt.types import LayerRules, Measurement, Model, PartName, Sample
from edgeopt.validation.benchmark import benchmark
from edgeopt.validation.worker import peak, reset_peak
from edgeopt.workbench import Workbench

T = TypeVar("T")

#: d_model, d_ff, encoder and decoder layers, heads, vocabulary.
SCALES = {
    "full": (1024, 3904, 12, 16, 32128),  # 375.8 million parameters
    "eighth": (512, 2048, 6, 8, 8032),  # 48.2 million
    "small": (512, 2048, 2, 8, 8032),  # 18.8 million
    "toy": (32, 64, 1, 2, 64),
}
SOURCE, TARGET = 64, 64
SAMPLES = 4
EVERY_S = 0.1


@dataclass(frozen=True)
class Stage:
    """`cpu_seconds`: of the processor, children included, which other programs' work does not lengthen; `peak_bytes`:
    highest resident memory, of children too."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class PartFigures:
    part: str
    float_bytes: int
    quantized_bytes: int
    latency: tuple[Measurement, ...]


@dataclass(frozen=True)
class Outcome:
    """`weights_bytes`: of the whole network in float32, each weight once; `baseline_bytes`: after the toy's export."""

    target: str
    scale: str
    threads: int
    parameters: int
    weights_bytes: int
    baseline_bytes: int
    peak_bytes: int
    seconds: float
    stages: tuple[Stage, ...]
    parts: tuple[PartFigures, ...] = field(default=())

    @property
    def growth(self) -> float:
        """Peak above the baseline, in sizes of the float network."""
        return (self.peak_bytes - self.baseline_bytes) / self.weights_bytes


class Watch:
    """Progress that notes each step's time and peak memory."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.prefix = ""
        self._title: str | None = None
        self._start = self._cpu = 0.0
        self._sampled = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._ended.set()
        self._thread.join()

    def step(self, title: str) -> None:
        self.close()
        self._title, self._sampled = f"{self.prefix}{title}", 0
        self._start, self._cpu = time.perf_counter(), _cpu_seconds()
        reset_peak()

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        return Silent().track(items, title, total)

    def close(self) -> None:
        """End the current step."""
        if self._title is not None:
            seconds, cpu = time.perf_counter() - self._start, _cpu_seconds() - self._cpu
            self.stages.append(Stage(self._title, seconds, cpu, max(peak(), self._sampled)))
        self._title = None

    def _sample(self) -> None:
        while not self._ended.wait(EVERY_S):
            if children := _descendants(os.getpid()):
                self._sampled = max(self._sampled, sum(map(_proportional, [os.getpid(), *children])))


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _proportional(pid: int) -> int:
    """Resident bytes, what several processes share divided among them; 0 for one that has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class Sentences:
    """Random token ids as the network's samples, always the same."""

    is_labelled = False
    class_names: tuple[str, ...] = ()

    def __init__(self, model: Model, vocabulary: int) -> None:
        self._model, self._vocabulary = model, vocabulary

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < SAMPLES:
            raise IndexError(index)
        generator = np.random.default_rng(index)
        inputs = {
            spec.name: np.ones((1, SOURCE), np.int64)
            if "mask" in spec.name
            else generator.integers(2, self._vocabulary, (1, SOURCE if spec is self._model.inputs[0] else TARGET))
            for spec in self._model.inputs
        }
        return Sample(inputs, None, f"random {index}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(SAMPLES))

    def fingerprint(self) -> str:
        return sha256(f"random {SAMPLES} of {self._vocabulary}".encode()).hexdigest()


def prepared(scale: str, work: Path) -> Path:
    """The network's folder; made by a process of its own, whose memory is not counted."""
    folder = work / scale
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, "--make", scale, str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def make(scale: str, folder: Path) -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    width, inner, layers, heads, vocabulary = SCALES[scale]
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=inner,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def export(
    scale: str, job: Job, folder: Path, work: Path, watch: Watch, threads: int, wanted: frozenset[str], timed: bool
) -> tuple[Model, list[PartFigures]]:
    """Export every part, and time it beside its float twin."""
    watch.step("Loading the model")
    options = SourceOptions(task="text2text-generation", max_source_length=SOURCE, max_target_length=TARGET)
    model = load_model(f"hf:{folder}", options)
    watch.step("Taking it apart")
    parts: Mapping[PartName, Model] = split(model)
    data = Sentences(model, SCALES[scale][-1])
    figures = []
    for name, part in parts.items():
        if name not in wanted:
            continue
        watch.prefix = f"{name}: "
        with TemporaryDirectory(dir=work) as scratch:
            samples = part_dataset(model, name, parts, data, seed=0)
            bench = Workbench(part, samples, LayerRules(), 0, Path(scratch), watch)
            twin = bench.float_artifact(job.target.format)
            made = twin
            if not job.scheme.is_plain_float:
                made, _ = bench.quantized_artifact(job.target.format, job.scheme, job.estimator)
            latency: tuple[Measurement, ...] = ()
            if timed:
                watch.step("Timing")
                runtime = HOST_RUNTIMES[job.target.format]
                latency = benchmark(made, twin if made is not twin else None, runtime, samples[0].inputs, threads)
            figures.append(PartFigures(name, twin.size_bytes, made.size_bytes, latency))
    watch.prefix = ""
    watch.close()
    return model, figures


def run(target: str, scale: str, work: Path, threads: int, wanted: frozenset[str], timed: bool) -> Outcome:
    """The figures of one target; the toy goes first, for what the libraries take by themselves."""
    (job,) = plan_jobs(RunConfig(target=(target,), calibration="random", recipe=("none",)))
    with Watch() as watch:
        export("toy", job, prepared("toy", work), work, watch, threads, wanted, timed=False)
        baseline, folder = reset_peak(), prepared(scale, work)
        watch.stages.clear()
        start = time.perf_counter()
        model, figures = export(scale, job, folder, work, watch, threads, wanted, timed)
        seconds = time.perf_counter() - start
        assert model.module is not None
        sizes = [parameter.numel() for parameter in model.module.parameters()]
    peak_bytes = max(stage.peak_bytes for stage in watch.stages)
    return Outcome(
        target, scale, threads, sum(sizes), 4 * sum(sizes), baseline, peak_bytes, seconds,
        tuple(watch.stages), tuple(figures),
    )  # fmt: skip


def table(outcome: Outcome) -> str:
    """Markdown: the stages, then the files."""
    mb, size = 1e6, outcome.weights_bytes
    head = (
        f"{outcome.target}, {outcome.parameters / 1e6:.1f} M parameters, {size / 1e9:.3f} GB in float32: "
        f"{outcome.seconds:.0f} s, peak {outcome.peak_bytes / 1e9:.2f} GB = {outcome.peak_bytes / size:.2f} x its size "
        f"({outcome.growth:.2f} x without the {outcome.baseline_bytes / 1e9:.2f} GB of libraries)"
    )
    lines = [
        head,
        "",
        "| stage | s | CPU s | peak MB |",
        "|---|---|---|---|",
        *(
            f"| {stage.name} | {stage.seconds:.1f} | {stage.cpu_seconds:.1f} | {stage.peak_bytes / mb:.0f} |"
            for stage in outcome.stages
        ),
        "",
        f"| part | float MB | exported MB | float ms | exported ms | speed-up, {outcome.threads} thread(s) |",
        "|---|---|---|---|---|---|",
    ]
    for part in outcome.parts:
        found = {(m.name, m.subject): m for m in part.latency}
        cells = [part.part, f"{part.float_bytes / mb:.1f}", f"{part.quantized_bytes / mb:.1f}"]
        for key in (("latency_ms", "float"), ("latency_ms", "quantized"), ("speedup", "quantized")):
            m = found.get(key)
            spread = f" ({m.spread[0]:.2f}-{m.spread[1]:.2f})" if m is not None and m.spread is not None else ""
            cells.append(f"{m.value:.2f}{spread}" if m is not None else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--scale", choices=sorted(SCALES), default="eighth")
    parser.add_argument("--work", type=Path, default=Path("build/scale"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", default="encoder,decoder")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    wanted = frozenset(given.parts.split(","))
    outcome = run(given.target, given.scale, given.work, given.threads, wanted, not given.no_timing)
    print(table(outcome), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps({**asdict(outcome), "growth": outcome.growth}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
