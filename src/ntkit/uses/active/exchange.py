"""Questions out and answers in, as files: for a spreadsheet, for Label Studio, for Argilla."""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ntkit.errors import InputError, StoreError

if TYPE_CHECKING:
    import os

# The name of a point's number in files.
NUMBER = "ntkit_id"
# Names of columns that are not the items'.
OWN = frozenset({NUMBER, "score", "guess", "label"})
# What stands in a spreadsheet for a point that cannot be labelled.
SKIP = "skip"
# As the author of what is suggested.
AGENT = "ntkit"

# What people see of a point, by its number: a text, the address of an image.
Items = Mapping[int, Mapping[str, Any]] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answers:
    """What a file says.

    Attributes:
        numbers: points with a label.
        labels: their classes.
        skipped: points that could not be labelled.
    """

    numbers: list[int]
    labels: list[int]
    skipped: list[int]


@dataclass(frozen=True)
class Exchange(ABC):
    """A kind of file.

    Attributes:
        names: of the classes, in order; their numbers by default.
        needs_items: whether the tool refuses a point of which nothing can be seen.
    """

    names: Sequence[str] | None = None
    needs_items: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            InputError: if one is empty, or two are the same; spaces around a name do not count, as in answers.
        """
        names = [str(name).strip() for name in self.names or ()]
        if not all(names):
            raise InputError(f"class {names.index('')} has an empty name: expected one for each, got {names}")
        if len(set(names)) < len(names):
            raise InputError(f"two classes have the same name: {', '.join(names)}")

    def write(
        self,
        path: str | os.PathLike[str],
        numbers: Sequence[int] | np.ndarray,
        scores: Sequence[float] | np.ndarray,
        *,
        items: Items | None = None,
        guesses: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Points to be labelled, best first.

        Args:
            path: of the file, which is written whole or not at all; one that is there is replaced.
            numbers: of points.
            scores: what each is worth.
            items: what people are to see of each point.
            guesses: the network's own classes, shown as a suggestion.

        Raises:
            InputError: if there is not one finite score (item, guess) for each point, or a guess is no class.
            StoreError: if the file cannot be written.
        """
        points, worth = [int(i) for i in numbers], [float(s) for s in scores]
        if len(worth) != len(points) or (guesses is not None and len(guesses) != len(points)):
            raise InputError(f"one score and one guess for each of {len(points)} points: got {len(worth)} scores")
        bad = [i for i, score in zip(points, worth, strict=True) if not math.isfinite(score)]
        if bad:
            raise InputError(f"scores are finite numbers: that of point {bad[0]} is not. Leave the point out")
        shown = [_item(items, i) for i in points]
        said = [None if guesses is None else self.name(int(guesses[k])) for k in range(len(points))]
        text = self._written(points, worth, shown, said)
        place = Path(path)
        half = place.with_name(place.name + ".part")
        try:
            half.write_text(text, encoding="utf-8", newline="")
            half.replace(place)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise StoreError(f"{place}: cannot write the questions ({error}). Nothing is lost; try again") from error

    def read(self, path: str | os.PathLike[str]) -> Answers:
        """Answers, of those questions that have one.

        Raises:
            InputError: if the file cannot be read, an answer is no class, or a point has two different answers.
        """
        place = Path(path)
        try:
            text = place.read_text(encoding="utf-8-sig")  # spreadsheets begin their files with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{place}: cannot read the answers ({error})") from error
        found: dict[int, int | None] = {}
        for number, answer in self._read(text, place):
            try:
                label = None if answer is None else self.parse(answer)
            except InputError as error:
                raise InputError(f"{place}: the answer to point {number} is {error}") from error
            if number in found and found[number] != label:
                raise InputError(f"{place}: point {number} has two answers: choose one")
            found[number] = label
        return Answers(
            [i for i, label in found.items() if label is not None],
            [label for label in found.values() if label is not None],
            [i for i, label in found.items() if label is None],
        )

    @abstractmethod
    def _written(
        self, points: list[int], scores: list[float], shown: list[dict[str, Any]], guesses: list[str | None]
    ) -> str: ...

    @abstractmethod
    def _read(self, text: str, place: Path) -> Iterable[tuple[int, str | None]]:
        """Numbers and answers; None for what could not be labelled."""

    def name(self, label: int) -> str:
        """A class as people see it.

        Raises:
            InputError: if there is none of that number.
        """
        most = math.inf if self.names is None else len(self.names) - 1
        if not 0 <= label <= most:
            expected = "0, 1, 2, ..." if self.names is None else f"0 to {most}"
            raise InputError(f"a guess is a class by its number: got {label}, expected one of {expected}")
        return str(label) if self.names is None else str(self.names[label])

    def parse(self, answer: object) -> int:
        """A class by its name, or by its number where classes have no names.

        Raises:
            InputError: if there is none like that.
        """
        text = str(answer).strip()
        if self.names is not None:
            known = {str(name).strip(): k for k, name in enumerate(self.names)}
            if text in known:
                return known[text]
            expected = ", ".join(known)
        else:
            try:
                value = float(text)  # spreadsheets write 3 as 3.0
            except ValueError:
                value = -1.0
            if value >= 0 and value.is_integer():  # infinity is none
                return int(value)
            expected = "0, 1, 2, ..."
        raise InputError(f"{text!r}: expected one of {expected}")


@dataclass(frozen=True)
class CSV(Exchange):
    """A table with the columns `ntkit_id`, `score`, `guess`, those of the items, and an empty `label` to fill in.

    A row whose label is left empty has no answer yet; `skip` is for what cannot be labelled.
    """

    def _written(
        self, points: list[int], scores: list[float], shown: list[dict[str, Any]], guesses: list[str | None]
    ) -> str:
        columns = dict.fromkeys(name for item in shown for name in item)
        taken = OWN & set(columns)
        if taken:
            raise InputError(f"items have a column {sorted(taken)[0]!r}, which is one of the table's own: rename it")
        extra = ["guess"] if any(g is not None for g in guesses) else []
        out = io.StringIO()
        table = csv.DictWriter(out, [NUMBER, "score", *extra, *columns, "label"], lineterminator="\n", restval="")
        table.writeheader()
        for number, score, item, guess in zip(points, scores, shown, guesses, strict=True):
            more = {"guess": guess} if extra else {}
            table.writerow({NUMBER: number, "score": repr(score), **more, **item, "label": ""})
        return out.getvalue()

    def _read(self, text: str, place: Path) -> Iterable[tuple[int, str | None]]:
        head = text.split("\n", 1)[0]
        separator = max(",;\t", key=head.count)  # some countries' spreadsheets separate by semicolons
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        names = table.fieldnames or []
        if NUMBER not in names or "label" not in names:
            raise InputError(f"{place}: expected the columns {NUMBER} and label, got {', '.join(names) or 'none'}")
        twice = [name for name in (NUMBER, "label") if names.count(name) > 1]
        if twice:
            raise InputError(f"{place}: there are {names.count(twice[0])} columns {twice[0]}: keep one")
        for row in table:
            if None in row:  # where the further cells are put: all behind a stray separator would be read wrong
                raise InputError(
                    f"{place}: line {table.line_num} has more cells than the {len(names)} of the first line: a text "
                    f"with a {separator!r} in it stands in quotes"
                )
            answer = (row["label"] or "").strip()
            if not answer:
                continue
            skipped = answer == SKIP and SKIP not in (str(name).strip() for name in self.names or ())
            yield _number(row[NUMBER], place), None if skipped else answer


@dataclass(frozen=True)
class LabelStudio(Exchange):
    """Tasks for Label Studio with a `Choices` tag, and its JSON export.

    A task's prediction has the score 1 for the least valuable point of a batch and 0 for the most valuable, because
    Label Studio's uncertainty sampling shows the lowest first. Annotations that were cancelled count as skipped.

    Attributes:
        choices: name of the `Choices` tag.
        shown: name of the tag that it belongs to (its `toName`).
    """

    choices: str = "label"
    shown: str = "item"

    def _written(
        self, points: list[int], scores: list[float], shown: list[dict[str, Any]], guesses: list[str | None]
    ) -> str:
        tasks = []
        for number, score, item, guess in zip(points, _from_zero_to_one(scores), shown, guesses, strict=True):
            result = [] if guess is None else [self._choice(guess)]
            prediction = {"model_version": AGENT, "score": 1 - score, "result": result}
            tasks.append({"data": {**item, NUMBER: number}, "predictions": [prediction]})
        return json.dumps(tasks, indent=1, ensure_ascii=False)

    def _choice(self, name: str) -> dict[str, Any]:
        return {"from_name": self.choices, "to_name": self.shown, "type": "choices", "value": {"choices": [name]}}

    def _read(self, text: str, place: Path) -> Iterable[tuple[int, str | None]]:
        mine, others = False, set[str]()
        for task in _records(text, place):
            done = task.get("annotations") or []
            if not isinstance(done, list):
                raise InputError(f"{place}: annotations are a list: export from Label Studio as JSON, not JSON-MIN")
            number = _number(_part(task, "data", dict, place).get(NUMBER), place)
            for annotation in _objects(done, "annotations", place):
                if annotation.get("was_cancelled"):
                    yield number, None
                    continue
                chosen = []
                for part in _objects(_part(annotation, "result", list, place), "results", place):
                    if part.get("type") == "choices" and part.get("from_name") == self.choices:
                        chosen += _part(_part(part, "value", dict, place), "choices", list, place)
                    elif part.get("type") == "choices":
                        others.add(str(part.get("from_name")))
                if len(chosen) > 1:
                    raise InputError(f"{place}: point {number} has {len(chosen)} choices: expected one class")
                if chosen:
                    mine = True
                    yield number, chosen[0]
        if others and not mine:
            raise _no_answer(place, "tag", self.choices, others, "LabelStudio(choices=...)")


@dataclass(frozen=True)
class Argilla(Exchange):
    """Records for Argilla 2, as `dataset.records.from_json` reads and `to_json` writes them.

    A record's score is in its metadata. A response whose status is "discarded" counts as skipped, one with another than
    "submitted" as none. But `to_json` leaves the status out, and what was discarded or is a draft has its value all the
    same: export the records with the status "submitted" alone, and skip those that were discarded by hand.

    Attributes:
        question: name of the label question.
    """

    question: str = "label"
    needs_items: ClassVar[bool] = True

    def _written(
        self, points: list[int], scores: list[float], shown: list[dict[str, Any]], guesses: list[str | None]
    ) -> str:
        records = []
        if not all(shown):
            raise InputError("Argilla takes no record without fields: give items, what people are to see")
        for number, score, item, guess in zip(points, scores, shown, guesses, strict=True):
            said = {} if guess is None else {self.question: {"value": guess, "score": None, "agent": AGENT}}
            records.append({
                "id": str(number), "fields": item, "metadata": {NUMBER: number, "score": score}, "suggestions": said,
                "responses": {}, "vectors": {},
            })  # fmt: skip
        return json.dumps(records, indent=1, ensure_ascii=False)

    def _read(self, text: str, place: Path) -> Iterable[tuple[int, str | None]]:
        mine, others = False, set[str]()
        for record in _records(text, place):
            number, responses = _number(record.get("id"), place), _part(record, "responses", dict, place)
            others.update(name for name in responses if name != self.question)
            for response in _objects(_part(responses, self.question, list, place), "responses", place):
                value, status = response.get("value"), response.get("status") or "submitted"
                mine = True
                if status == "discarded":
                    yield number, None
                elif status == "submitted" and value is not None:
                    yield number, value
        if others and not mine:
            raise _no_answer(place, "question", self.question, others, "Argilla(question=...)")


FORMATS: dict[str, type[Exchange]] = {"csv": CSV, "labelstudio": LabelStudio, "argilla": Argilla}


def exchange(path: str | os.PathLike[str], fmt: str | None = None, names: Sequence[str] | None = None) -> Exchange:
    """The kind of a file, by name or by the end of its path.

    Raises:
        InputError: if it is not known.
    """
    found = fmt or ("csv" if Path(path).suffix == ".csv" else None)
    if found not in FORMATS:
        raise InputError(
            f"the kind of {path}: got {found or Path(path).suffix!r}, expected one of {', '.join(FORMATS)}"
        )
    return FORMATS[found](names)


def export_tasks(
    path: str | os.PathLike[str],
    numbers: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    *,
    fmt: str | None = None,
    names: Sequence[str] | None = None,
    items: Items | None = None,
    guesses: Sequence[int] | np.ndarray | None = None,
) -> None:
    """Write points to be labelled; `CSV`, `LabelStudio` and `Argilla` do the same and can be told more.

    Args:
        path: of the file.
        numbers: of points, best first.
        scores: what each is worth.
        fmt: "csv", "labelstudio" or "argilla"; by default what the path ends with.
        names: of the classes, in order; their numbers by default.
        items: what people are to see of each point.
        guesses: the network's own classes.

    Raises:
        InputError: if anything does not fit.
        StoreError: if the file cannot be written.
    """
    exchange(path, fmt, names).write(path, numbers, scores, items=items, guesses=guesses)


def import_annotations(
    path: str | os.PathLike[str], *, fmt: str | None = None, names: Sequence[str] | None = None
) -> Answers:
    """Read the answers of a file that `export_tasks` has written, or of the other tool's export.

    Raises:
        InputError: if it cannot be read, an answer is no class, or a point has two different answers.
    """
    return exchange(path, fmt, names).read(path)


def _item(items: Items | None, number: int) -> dict[str, Any]:
    if items is None:
        return {}
    try:
        return dict(items[number])
    except (KeyError, IndexError) as error:
        raise InputError(f"there is no item for point {number}: expected one for every point that is asked") from error


def _number(value: Any, place: Path) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise InputError(f"{place}: {NUMBER} is the number of a point: got {value!r}") from error


def _records(text: str, place: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: is not JSON ({error})") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InputError(f"{place}: expected a list of tasks")
    return found


def _part(whole: dict[str, Any], name: str, kind: type, place: Path) -> Any:
    """A part of a task, empty where it is left out or null.

    Raises:
        InputError: if it is of another kind.
    """
    found = whole.get(name)
    if found is not None and not isinstance(found, kind):
        expected = "a list" if kind is list else "an object"
        raise InputError(f"{place}: {name}: expected {expected}, got {json.dumps(found)[:40]}")
    return kind() if found is None else found


def _objects(found: list[Any], what: str, place: Path) -> list[dict[str, Any]]:
    """Entries of a list as they are.

    Raises:
        InputError: if one is no object.
    """
    bad = [one for one in found if not isinstance(one, dict)]
    if bad:
        raise InputError(f"{place}: {what} are objects: got {json.dumps(bad[0])[:40]}")
    return found


def _no_answer(place: Path, what: str, name: str, others: set[str], reader: str) -> InputError:
    return InputError(
        f"{place}: no answer is one to the {what} {name!r}, those that are there are to {', '.join(sorted(others))}: "
        f"give that {what} the name {name!r}, or read them with {reader}"
    )


def _from_zero_to_one(scores: list[float]) -> list[float]:
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    return [(score - low) / (high - low) if high > low else 1.0 for score in scores]
