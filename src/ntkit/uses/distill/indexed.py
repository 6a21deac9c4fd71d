"""A data set that says which example it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from ntkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sized


class Indexed(Dataset):
    """(number, example) instead of example, like `enumerate`: for numbers, (x, y) in DataLoader(Indexed(data), ...).

    Shuffling, samplers, workers and augmentation stay as they are: the number is that of the example in `dataset`.
    """

    def __init__(self, dataset: Any) -> None:
        """Wrap a map-style data set: one with a length and examples by number.

        Raises:
            InputError: if it has none.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise InputError(
                f"dataset: got {type(dataset).__name__}, expected one with a length and examples by number. An "
                "IterableDataset has no numbers of its own: let it give one with each example"
            )
        self.dataset: Sized = dataset

    def __len__(self) -> int:
        """Number of examples N."""
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        """The example with its number."""
        return number, self.dataset[number]  # pyright: ignore[reportIndexIssue]
