"""The recorder inside the training loops of Lightning and Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ntkit.errors import InputError

if TYPE_CHECKING:
    from torch import nn


class Recorder(Protocol):
    """What looks at a network now and then: `PathRecorder`, `KernelRecorder`."""

    @property
    def last(self) -> int | None:
        """The last step that was recorded."""
        ...

    def record(self, model: nn.Module, step: int) -> bool:
        """Look, if it is time."""
        ...

    def rewind(self, step: int) -> None:
        """Set aside what was recorded from this step on."""
        ...


def lightning_callback(*recorders: Recorder, network: str | None = None) -> Any:
    """A callback for `lightning.Trainer(callbacks=[...])`: records before training and after every step.

    A run that goes on from a checkpoint sets aside what had been recorded after it.

    Args:
        recorders: one or more.
        network: name of the attribute of the LightningModule that is the network; itself by default.

    Raises:
        InputError: if Lightning is not installed.
    """
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError as error:
        raise InputError('this needs Lightning: pip install "ntkit[lightning]"') from error

    class Recording(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero:
                _begin(recorders, _network(pl_module, network), trainer.global_step)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.is_global_zero:
                _go_on(recorders, _network(pl_module, network), trainer.global_step)

    return Recording()


def trainer_callback(*recorders: Recorder) -> Any:
    """A callback for `transformers.Trainer(callbacks=[...])`: records before training and after every step.

    A run that goes on from a checkpoint sets aside what had been recorded after it.

    Args:
        recorders: one or more; with `select=lambda output: output.logits`.

    Raises:
        InputError: if transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise InputError('this needs transformers: pip install "ntkit[transformers]"') from error

    class Recording(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                _begin(recorders, kwargs["model"], state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                _go_on(recorders, kwargs["model"], state.global_step)

    return Recording()


def _begin(recorders: tuple[Recorder, ...], model: nn.Module, step: int) -> None:
    for recorder in recorders:
        if step > 0:
            recorder.rewind(step)
        recorder.record(model, step)


def _go_on(recorders: tuple[Recorder, ...], model: nn.Module, step: int) -> None:
    for recorder in recorders:
        if recorder.last is None or step > recorder.last:  # a step of several batches ends once
            recorder.record(model, step)


def _network(module: Any, name: str | None) -> nn.Module:
    return module if name is None else module.get_submodule(name)
