"""The errors that a person sees, one exit code per branch.

An `EdgeoptError` carries three short texts: what is wrong, where, and how to mend it. The command line prints
them as one line and exits with the branch's code; nothing else of ours may reach the user as a traceback.
"""

from __future__ import annotations

from typing import ClassVar


class EdgeoptError(Exception):
    """Base of every error that edgeopt raises on purpose.

    Args:
        problem: what is wrong, one sentence without a full stop.
        where: the file, key, tensor or layer concerned.
        fix: what the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.problem = problem
        self.where = where
        self.fix = fix
        super().__init__(self.line())

    def line(self) -> str:
        """The whole error as one line of text."""
        head = f"{self.where}: {self.problem}" if self.where else self.problem
        text = f"{head}; {self.fix}" if self.fix else head
        return " ".join(text.split())


class GateError(EdgeoptError):
    """The result was made, but it is not good enough."""

    exit_code = 1


class UsageError(EdgeoptError):
    """A flag, a configuration key, a data set or an input file is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """edgeopt.toml, a target or a device profile has a mistake."""


class DataError(UsageError):
    """A data set is empty, unreadable, or does not fit the model."""


class TamperedError(UsageError):
    """A bundle or an archive is not what its manifest says."""


class MissingError(EdgeoptError):
    """A package, a tool or a device that this work needs is not on this machine."""

    exit_code = 3

    @classmethod
    def extra(cls, package: str, extra: str, purpose: str) -> MissingError:
        """The error for a Python package that one of our extras installs."""
        return cls(f"{purpose} needs the package {package!r}", fix=f"pip install 'edgeopt[{extra}]'")


class ConversionError(EdgeoptError):
    """The model can't be converted to this format; names the operator and the layer where known."""

    exit_code = 4
