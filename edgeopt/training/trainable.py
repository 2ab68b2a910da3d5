"""A network as the loop trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeopt.errors import ConversionError, UsageError
from edgeopt.training.calls import outputs_of
from edgeopt.types import EstimatorSpec

Batches = Callable[[], Iterable[Sequence[Tensor]]]


class Trainable(nn.Module):
    """A network that the loop can train, judge and keep; in float, where no subclass says otherwise.

    Args:
        network: trained in place.
        sample_rows: entries of the first dimension that one sample has, per argument.

    Attributes:
        network: the same.
        frozen_statistics: in training mode, batch normalization stays with its running statistics.
        sample_rows: as given.
        rows: the same once the network is to be run sample by sample, which freezes the statistics too; None hands
            it whole batches.
    """

    def __init__(self, network: nn.Module, sample_rows: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.frozen_statistics = False
        self.sample_rows = sample_rows
        self.rows: tuple[int, ...] | None = None

    def forward(self, *arguments: Tensor) -> object:
        return self.run(*arguments) if self.rows is None else outputs_of(self.run, arguments, self.rows)

    def run(self, *arguments: Tensor) -> object:
        """One call of the network."""
        return self.network(*arguments)

    def train(self, mode: bool = True) -> Trainable:
        """Training mode, but for batch normalization whose statistics are frozen."""
        super().train(mode)
        if self.frozen_statistics or self.rows is not None:
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def calibrate(self, batches: Batches, count: int, estimator: EstimatorSpec, *, keep_learned: bool = True) -> None:
        """Find anew what depends on the weights as they are now: nothing, in float."""
        del batches, count, estimator, keep_learned

    def quantization_parameters(self) -> list[nn.Parameter]:
        """What is trained beside the network's own parameters."""
        return []

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of `torch.utils.checkpoint` for parts of the network."""
        return nullcontext(), nullcontext()

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Inside the block the network computes its activations again in the backward pass.

        Raises UsageError where it does not offer that.
        """
        disable = self._checkpoint()
        try:
            yield
        finally:
            if callable(disable):
                disable()

    def _checkpoint(self) -> object:
        """Switch it on; the function that switches it off again, where there is one."""
        how = {"use_reentrant": False, "context_fn": self.checkpoint_contexts}
        for part in self.network.modules():
            # transformers renames the methods: the old names warn where the new ones are.
            for word in ("activation", "gradient"):
                enable = getattr(part, f"{word}_checkpointing_enable", None)
                if callable(enable):
                    try:
                        enable(**{f"{word}_checkpointing_kwargs": how})
                    except ValueError as error:
                        raise UsageError(str(error), where="gradient-checkpointing", fix="leave it out") from error
                    return getattr(part, f"{word}_checkpointing_disable", None)
        raise UsageError(
            "the model does not offer it (no gradient_checkpointing_enable)",
            where="gradient-checkpointing",
            fix="leave it out, or use a smaller --batch-size with --gradient-accumulation",
        )


@contextmanager
def thawed(network: nn.Module) -> Iterator[None]:
    """Inside the block all parameters of a network can be trained if none could, as in a model loaded for inference;
    one of which only a part is frozen stays so.

    Raises:
        ConversionError: there is no parameter to train.
    """
    parameters = list(network.parameters())
    if any(parameter.requires_grad for parameter in parameters):
        yield
        return
    frozen = [parameter for parameter in parameters if parameter.is_floating_point()]
    if not frozen:
        raise ConversionError(
            "the model has no parameters to train: its weights are constants of a graph",
            fix="give the model as a Python factory (file.py:factory)",
        )
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
