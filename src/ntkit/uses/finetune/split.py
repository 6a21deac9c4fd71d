"""A network cut in two: the backbone, up to the features z, and the head, which makes outputs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntkit.errors import InputError, ModelError
from ntkit.tangent.linearize import Tangent, linearize
from ntkit.tangent.readout import Logits, logits
from ntkit.tangent.untouched import check_evaluation, evaluating, untouched

if TYPE_CHECKING:
    from ntkit.tangent.examples import Batch, Examples
    from ntkit.tangent.readout import Select

# Examples of one forward pass.
BATCH = 256


@dataclass(frozen=True, eq=False)
class Split:
    """A network, and which of its modules are the head.

    The features z of an example are what comes into the first of these modules, flattened to h numbers.

    Attributes:
        model: in evaluation mode where anything is measured; it is never changed.
        head: the name of a module, or names of several: a re-initialised last block and the layers after it.
        select: takes the (N, C) logits out of the network's output, if it is not a tensor.
    """

    model: nn.Module
    head: str | Sequence[str]
    select: Select | None = None

    def __post_init__(self) -> None:
        """Look the names up.

        Raises:
            ModelError: if there is no such module.
        """
        names = (self.head,) if isinstance(self.head, str) else tuple(self.head)
        known = [name for name, _ in self.model.named_modules() if name]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ModelError(
                f"the network has no module {unknown[0] if unknown else ''!r} that could be its head: expected one or "
                f"some of {', '.join(known)}"
            )
        object.__setattr__(self, "head", names)

    @property
    def names(self) -> tuple[str, ...]:
        """The modules of the head."""
        return tuple(self.head)

    def in_head(self, name: str) -> bool:
        """Whether a parameter or buffer of this name belongs to the head."""
        return any(name.startswith(f"{module}.") for module in self.names)

    def modules(self) -> list[nn.Module]:
        """Those of the head."""
        return [self.model.get_submodule(name) for name in self.names]

    def tangent(self) -> Tangent:
        """The backbone at its parameters, for the features (n, h) that it gives: its kernel is the slow one.

        Raises:
            ModelError: if no parameter of the backbone requires gradients.
        """
        taking = {n for n, p in self.model.named_parameters() if p.requires_grad and not self.in_head(n)}
        if not taking:
            raise ModelError(
                "the backbone has no parameter that requires gradients: nothing in it can be tuned. Unfreeze some, or "
                "name fewer modules as the head"
            )
        prefix = "model."
        return linearize(Backbone(self.model, self.names), parameters=lambda n, _: n.removeprefix(prefix) in taking)

    def features(self, x: Any, *, batch: int = BATCH) -> Tensor:
        """The features z of N examples, (N, h). Cost: N forward passes, up to the head.

        Raises:
            ModelError: if the head is not called once for each example, or is active Dropout or BatchNorm.
        """
        backbone = Backbone(self.model, self.names)
        check_evaluation(self.model)
        # frozen backbones have features too
        reading = linearize(backbone, parameters=lambda _, parameter: parameter.is_floating_point())
        examples = reading.examples(x)
        self.check(examples)
        return reading.outputs(examples, batch=batch)

    def outputs(self, x: Any, *, batch: int = BATCH) -> Tensor:
        """The logits of N examples, (N, C). Cost: N forward passes."""
        whole = linearize(
            self.model, readout=Logits(self.select), parameters=lambda _, parameter: parameter.is_floating_point()
        )
        return whole.outputs(x, batch=batch)

    def pulled(self, some: Batch, cotangents: Callable[[Tensor], Tensor]) -> Tensor:
        """(dg/dz)^T u of some examples, (n, h), with the cotangents u (n, C) given as a function of the outputs.

        Cost: one forward pass, and one backward pass through the head.
        """
        tap = _Leaf()
        with untouched(self.model), hooked(self.modules(), tap):
            outputs = logits(some.call(self.model), self.select)
            assert tap.leaf is not None  # `check` has seen it
            (found,) = torch.autograd.grad(outputs, tap.leaf, cotangents(outputs.detach()), allow_unused=True)
        found = torch.zeros_like(tap.leaf) if found is None else found
        return found.detach().flatten(1)

    def check(self, examples: Examples) -> Anatomy:
        """Run the first examples, to see that the head is called once and nothing but the head comes after.

        Raises:
            ModelError: if not, naming the module.
        """
        some = examples.batch(slice(0, 3), self.device)
        tap, owners = _Count(), self._owners()
        late = [_Late(name, tap) for name in owners]
        # in evaluation mode for this run alone: BatchNorm in training mode would count it
        with evaluating(self.model), untouched(self.model), torch.no_grad():
            with hooked(self.modules(), tap), _each_hooked(list(owners.values()), late):
                outputs = logits(some.call(self.model), self.select)
            self._require_once(tap, some, [note.name for note in late if note.seen])
            assert tap.features is not None
            return Anatomy(tuple(tap.features.shape[1:]), outputs.shape[1], self._alone(tap, outputs))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _owners(self) -> dict[str, nn.Module]:
        """Modules with parameters of their own that are not the head's."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if any(not self.in_head(f"{name}.{own}" if name else own) for own, _ in module.named_parameters("", False))
        }

    def _require_once(self, tap: _Count, some: Batch, late: list[str]) -> None:
        most = max(tap.calls.values(), default=0)
        if tap.features is None or len(tap.calls) < len(self.names):
            missing = [n for n in self.names if id(self.model.get_submodule(n)) not in tap.calls]
            raise ModelError(
                f"the module {missing[0]!r} is never called with a tensor: expected one that every example passes"
            )
        if most > 1 or len(tap.features) != some.size:
            raise ModelError(
                f"the head {', '.join(self.names)} is not called once per example: {most} calls, the first with "
                f"{len(tap.features)} rows for {some.size} examples. Name a module that sees each example once"
            )
        if late:
            raise ModelError(
                f"the module {late[0]!r} has parameters and is called after the head has begun: name it as a part of "
                f"the head, head={(*self.names, late[0])!r}"
            )

    def _alone(self, tap: _Count, outputs: Tensor) -> bool:
        """Whether the network's outputs are the head's own, from the features alone."""
        if len(self.names) > 1 or not tap.plain:
            return False
        assert tap.features is not None
        found = self.modules()[0](tap.features.clone())
        return isinstance(found, Tensor) and found.shape == outputs.shape and bool(torch.equal(found, outputs))


@dataclass(frozen=True)
class Anatomy:
    """What a trial run finds out.

    Attributes:
        shape: of the features of one example, before they are flattened.
        outputs: C.
        alone: whether the outputs follow from the features through the one module of the head and nothing else.
    """

    shape: tuple[int, ...]
    outputs: int
    alone: bool


class Backbone(nn.Module):
    """A network up to its head, as a module: gives the features (n, h). Shares all parameters; runs no head."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.training = model.training  # a new module says that it is being trained

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The features.

        Raises:
            ModelError: if the head is not reached.
        """
        with hooked([self.model.get_submodule(name) for name in self.names], _stop):
            try:
                self.model(*args, **kwargs)
            except _Reached as reached:
                return reached.features.flatten(1)
        raise ModelError(
            f"the module {', '.join(self.names)!r} is never called with a tensor: expected one that every example "
            "passes"
        )


class _Reached(BaseException):
    """Ends a forward pass at the head; not an Exception, so that no model takes it for one of its own."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = first_tensor(args, kwargs)
    if found is not None:
        raise _Reached(found)


class _Leaf:
    """Puts a leaf of the graph in the place of the features, when the head begins."""

    def __init__(self) -> None:
        self.leaf: Tensor | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        found = first_tensor(args, kwargs)
        if found is None or self.leaf is not None:
            return None
        self.leaf = found.detach().requires_grad_()
        given = self.leaf.clone()  # what the head may write into
        return (
            tuple(given if a is found else a for a in args),
            {name: given if a is found else a for name, a in kwargs.items()},
        )


class _Count:
    """Notes the features and how often each module is called."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.plain = False
        self.calls: dict[int, int] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = first_tensor(args, kwargs)
        if found is None:
            return
        self.calls[id(module)] = self.calls.get(id(module), 0) + 1
        if self.features is None:
            self.features, self.plain = found.detach().clone(), len(args) == 1 and not kwargs


class _Late:
    """Notes whether a module is called after the head has begun."""

    def __init__(self, name: str, tap: _Count) -> None:
        self.name, self.tap, self.seen = name, tap, False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = self.seen or self.tap.features is not None


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """A hook before modules are called; gone afterwards, also after an error."""
    with _each_hooked(modules, [hook] * len(modules)):
        yield


@contextmanager
def _each_hooked(modules: Sequence[nn.Module], hooks: Sequence[Callable[..., Any]]) -> Iterator[None]:
    handles = []
    try:
        for module, hook in zip(modules, hooks, strict=True):
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating point tensor among a call's arguments: the features."""
    every = (*args, *kwargs.values())
    return next((a for a in every if isinstance(a, Tensor) and a.is_floating_point() and a.ndim > 1), None)


def as_split(split: Split) -> Split:
    """The same, refused if it is something else.

    Raises:
        InputError: if it is no Split.
    """
    if not isinstance(split, Split):
        raise InputError(f"expected a network cut in two, Split(model, head='fc'): got {type(split).__name__}")
    return split
