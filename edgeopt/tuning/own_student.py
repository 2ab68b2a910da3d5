"""A student of another architecture: it takes the model's place where a distillation step names one."""

from __future__ import annotations

from dataclasses import replace

from edgeopt.compression.steps import Distil, Step
from edgeopt.errors import UsageError
from edgeopt.sources import SourceOptions, as_torch, load_model
from edgeopt.step_keys import STUDENTS
from edgeopt.types import Model, StepRecord


def names_network(step: Step) -> bool:
    return isinstance(step, Distil) and step.student not in STUDENTS


def own_student(step: Step, original: Model, seed: int) -> Model | None:
    """The network that the step trains instead of the model; None where it trains the model or what is made of it.

    It reads what the original reads: the same inputs, preprocessing and labels. Its first weights are drawn from the
    seed, unless its code seeds torch itself: else a run that was stopped would start from another student.

    Raises UsageError where only one of the two writes sequences, and any error of `load_model`.
    """
    if not isinstance(step, Distil) or not names_network(step):
        return None
    import torch

    written = original.generation
    options = SourceOptions(
        name=original.name,
        inputs=() if written else original.inputs,
        preprocessing=original.preprocessing,
        labels=original.labels,
        max_source_length=written.max_source if written else None,
        max_target_length=written.max_target if written else None,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        student = as_torch(load_model(step.student, options))
    if (student.generation is None) != (written is None):
        raise UsageError(
            "one of teacher and student writes sequences, the other does not",
            where=f"student {step.student!r}",
            fix="give a student of the teacher's kind",
        )
    record = StepRecord(
        "student", {"class": str(student.history[-1].config.get("class")), "sha256": student.source_sha256}
    )
    return replace(student, history=(*original.history, record), source_sha256=original.source_sha256)
