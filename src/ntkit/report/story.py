"""A study in plain sentences: the page for somebody who has not read the papers, with the measured numbers in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ntkit.report import pictures
from ntkit.report.page import Card, Figure, Page, Section, Strip, Table, Tile
from ntkit.report.words import (
    NOT_DEFINED,
    a_thing,
    cosine,
    count,
    distance,
    number,
    percent,
    plus_minus,
    score,
    sentence,
    signed,
)
from ntkit.uses.convergence import EXPECTED_SLOPE
from ntkit.uses.study import FIRST, FULL, PSEUDO, TRACE

if TYPE_CHECKING:
    from ntkit.uses.convergence import Convergence
    from ntkit.uses.study import Evidence, Fit, KernelFacts, State, Study, Task

# A cheap kernel that keeps this share of what the trace kernel keeps of the exact one counts as about as good.
CLOSE = 0.9


@dataclass(frozen=True)
class Subject:
    """What a study was made of, for the words of the page.

    Attributes:
        title: of the page.
        lead: one paragraph: the network, the data, the training.
        made: notes for those who want to do it again: seeds, sizes, versions, seconds.
        thing: what an example is called, in the singular: "image" or "example".
        cross_entropy: whether the last state is known to be trained with cross-entropy, from the first one.
    """

    title: str
    lead: str
    made: tuple[str, ...]
    thing: str = "example"
    cross_entropy: bool = False


def page(subject: Subject, study: Study, task: Task, convergence: Convergence | None = None) -> Page:
    """The page of a study."""
    sections = [
        _meaning(subject, study),
        _alike(subject, study),
        _closeness(subject, study) if study.outputs > 1 else None,
        _directions(study),
        _movement(study),
        _prediction(subject, study),
        _speakers(subject, study, task),
        _widening(convergence),
        Section("How this was made", subject.made, notes=("All numbers are in results.json beside this page.",)),
    ]
    return Page(
        title=subject.title,
        lead=subject.lead,
        cards=_cards(study),
        findings=tuple(_findings(study, convergence)),
        sections=tuple(section for section in sections if section is not None),
        footer=f"Made by ntkit: {count(study.parameters)} parameters, {count(study.train_examples)} training and "
        f"{count(study.test_examples)} test {subject.thing}s. This page needs no other file and no network.",
    )


def summary(study: Study) -> Table:
    """One row per state and kernel: what the terminal shows at the end, and the page as well."""
    rows = []
    for state in study.states:
        rows.append((sentence(state.name), *[""] * 6))
        rows.append(("network", *[""] * 5, score(study, state.test_score)))
        for facts in state.kernels:
            fits = {fit.examples: score(study, fit.test_score) for fit in state.fits if fit.label == facts.label}
            rows.append(
                (
                    facts.label,
                    "exact" if facts.fidelity is None else plus_minus(facts),
                    number(facts.spectrum.condition_number),
                    f"{facts.spectrum.entropy_rank:.1f}",
                    _aligned(facts, study),
                    fits.get(study.compared, ""),
                    fits.get(study.train_examples, ""),
                )
            )
    return Table(
        caption=f"Test {study.score_name} from {count(study.compared)} and from all {count(study.train_examples)} "
        f"training examples; the other columns from {count(study.compared)}."
        + (f" The full kernel has {study.outputs} rows per example." if study.outputs > 1 else ""),
        columns=(
            "",
            "distance",
            "condition",
            "rank",
            "align",
            f"test {count(study.compared)}",
            f"test {count(study.train_examples)}",
        ),
        rows=tuple(rows),
    )


# ---------------------------------------------------------------- the parts of the page


def _aligned(facts: KernelFacts, study: Study) -> str:
    """With the labels; the full kernel's is on another scale."""
    if facts.alignment is None:
        return "" if facts.label == FULL.label and study.outputs > 1 else NOT_DEFINED
    return cosine(facts.alignment.centred, 2)


def _full(state: State) -> KernelFacts:
    return state.kernel(FULL.label)


def _main(state: State, study: Study) -> Fit:
    return state.fit(study.main, study.train_examples)


def _cards(study: Study) -> tuple[Card, ...]:
    last = study.states[-1]
    cards = [Card(score(study, last.test_score), f"test {study.score_name} of the network {last.name}")]
    cards += [
        Card(
            score(study, _main(state, study).test_score),
            f"test {study.score_name} of its {study.main} kernel alone, {state.name}",
        )
        for state in study.states
    ]
    cards += [
        Card(
            percent(distance(state.kernel(PSEUDO.label)), 0), f"distance of the pNTK from the exact kernel {state.name}"
        )
        for state in study.states
        if study.outputs > 1
    ]
    return tuple(cards)


def _findings(study: Study, convergence: Convergence | None) -> list[str]:
    first, last = study.states[0], study.states[-1]
    own = _main(first, study).test_score
    found = [
        f"The kernel of the network {first.name}, used alone in a regression on {count(study.train_examples)} "
        f"labelled examples, reaches {score(study, own)} on new ones; the network {last.name} reaches "
        f"{score(study, last.test_score)}: {_compared(own, last.test_score, study)}."
    ]
    if len(study.states) > 1:
        later = _main(last, study).test_score
        whole = study.movements[0]
        found.append(
            f"Between the two states the kernel moved: {_moved(study)} With the kernel {last.name} the same regression "
            f"reaches {score(study, later)}. So the network "
            + (
                "did not stay in the regime in which one fixed kernel describes it."
                if whole.cka is None or whole.cka < 0.9
                else "stayed close to the regime in which one fixed kernel describes it."
            )
        )
    if study.outputs > 1:
        found += [_advice(state, study) for state in study.states]
    if convergence is not None:
        slope = convergence.sum_slope
        found.append(
            f"In wider networks the cheap pNTK comes closer to the exact kernel: its distance falls like width to the "
            f"power {signed(slope.value)} (± {slope.standard_error:.2f}); "
            + ("theory and earlier work expect" if convergence.as_expected else "this is outside what is expected,")
            + f" {signed(EXPECTED_SLOPE[0])} to {signed(EXPECTED_SLOPE[1])}."
        )
    return found


def _compared(ours: float, theirs: float, study: Study) -> str:
    if study.score_name != "accuracy":
        return "the kernel alone is better" if ours > theirs else "the network is better"
    middle = (ours + theirs) / 2
    noise = 2 * math.sqrt(2 * middle * (1 - middle) / study.test_examples)
    if abs(ours - theirs) <= noise:
        return f"a difference that {count(study.test_examples)} test examples cannot tell from chance"
    return (
        "the kernel alone is better" if ours > theirs else "training the network gains more than its first kernel has"
    )


def _moved(study: Study) -> str:
    whole = study.movements[0]
    before, after = (_full(state).mean_diagonal for state in (study.states[0], study.states[-1]))
    factor = after / before
    if factor >= 1:
        scale = f"it grew {factor:,.{0 if factor > 10 else 1}f}-fold"
    else:
        scale = f"it shrank to {percent(factor)} of its size"
    if whole.cka is None:
        return f"{scale}, and to one of the two all examples are alike, so that there is no shape to compare."
    return (
        f"{scale}, and its shape agrees with the first one only to {percent(whole.cka, 0)} (CKA, 100% is the same)."
        if whole.cka < 0.9
        else f"{scale}, and its shape still agrees with the first one to {percent(whole.cka, 0)} (CKA)."
    )


def _advice(state: State, study: Study) -> str:
    pseudo, trace = state.kernel(PSEUDO.label), state.kernel(TRACE.label)
    floor = distance(trace)
    text = (
        f"{sentence(state.name)} the pNTK (sum of the {study.outputs} logits) is {plus_minus(pseudo)} away from the "
        f"exact kernel; the least that any kernel with one number per pair can reach is {plus_minus(trace)} (the "
        "trace kernel). "
    )
    if _as_good(pseudo, trace):
        text += "So the pNTK, the cheapest, is about as good as any of its kind here."
    else:
        others = [facts for facts in state.kernels if facts.label not in (FULL.label, PSEUDO.label, TRACE.label)]
        near = [facts for facts in others if _as_good(facts, trace)]
        text += "The sum of logits is the wrong read-out here: use the trace kernel" + (
            ", or for less work "
            + " or ".join(f"{_by_name(facts.label)} ({plus_minus(facts)})" for facts in near)
            + "."
            if near
            else "."
        )
    if floor > 0.5:
        text += " Even that is far: where the interplay between the outputs matters, use the full kernel."
    return text


def _as_good(facts: KernelFacts, trace: KernelFacts) -> bool:
    kept, most = (1 - distance(each) ** 2 for each in (facts, trace))
    return kept >= CLOSE * most


def _by_name(label: str) -> str:
    if label == FIRST.label:
        return "the first logit alone"
    return f"the mean over {label}" if "signs" in label else label


def _meaning(subject: Subject, study: Study) -> Section:
    return Section(
        "What is being looked at",
        (
            f"The tangent kernel of a network answers one question: if a training step on {a_thing(subject.thing)} A "
            f"changes the answer for A, how much does the answer for {a_thing(subject.thing)} B change with it? A "
            "large number means that the network treats A and B alike at this moment of its training. The number "
            "follows exactly from the network's derivatives; nothing has to be trained to know it.",
            "The network has one output, so the kernel holds one number for each pair."
            if study.outputs == 1
            else f"The network has {study.outputs} outputs, so the exact (full) kernel holds {study.outputs} x "
            f"{study.outputs} numbers for each pair. Cheap kernels keep one: the pNTK takes the sum of the outputs, "
            "the trace kernel the average over the outputs one by one, the first logit just one of them. They are up "
            f"to {study.outputs**2} times smaller; this page measures what that costs.",
        ),
        tables=(summary(study),),
        notes=(
            "Distance: the size of what is missing, as a share of the size of the exact kernel (relative Frobenius "
            "error), estimated from random examples, ± one standard error. Condition: largest over smallest "
            "eigenvalue; above a million, solving becomes delicate. Rank: how many directions the kernel really uses "
            "(exponential of the entropy of its spectrum). Align: 1 if the kernel alone would sort the examples by "
            "label, 0 if it knows nothing of the labels (centred kernel alignment).",
        ),
    )


def _alike(subject: Subject, study: Study) -> Section | None:
    states = [state for state in study.states if state.similarity is not None]
    if not states:
        return None
    figures = []
    for state in states:
        facts = state.similarity
        assert facts is not None
        figures.append(
            Figure(
                pictures.similarity(facts),
                f"{sentence(state.name)}: two {subject.thing}s of one class are alike by {facts.within:+.2f} on "
                f"average, two of different classes by {facts.between:+.2f} (1 is the same, 0 is unrelated).",
            )
        )
    return Section(
        "What the network finds alike",
        (
            f"Each point of a picture is a pair of {subject.thing}s, sorted by class. Blue: a training step on one "
            "moves the answer for the other the same way; orange: the opposite way. Blue squares along the diagonal "
            "mean that the network already groups the classes, before its answers are looked at.",
        ),
        tuple(figures),
    )


def _closeness(subject: Subject, study: Study) -> Section:
    paragraphs = [
        "The bars say how much of the exact kernel each cheap one misses; lower is better. The trace kernel is the "
        "best that one number per pair can be, so its bar is the floor for the others."
    ]
    ends = (study.states[0], study.states[-1])
    last = ends[1]
    before, after = (distance(state.kernel(PSEUDO.label)) for state in ends)
    if len(study.states) > 1 and subject.cross_entropy:
        sizes = [state.kernel(PSEUDO.label).mean_diagonal / state.kernel(TRACE.label).mean_diagonal for state in ends]
        paragraphs.append(
            "A known trap: training with cross-entropy (without weight decay) never changes the sum of the last "
            "layer's rows, because its gradients over the classes add up to zero. All other directions grow, and the "
            "sum, on which predictions do not depend at all, says less and less about the network. Here the pNTK "
            f"shrank from {percent(sizes[0], 0)} to {percent(sizes[1], 0)} of the size of the trace kernel, and its "
            f"distance from the exact kernel went from {percent(before, 0)} to {percent(after, 0)}."
            if sizes[1] < sizes[0] and after > before
            else "A known trap, that the sum of the logits says less and less about a network trained with "
            f"cross-entropy, did not show this time: the distance of the pNTK went from {percent(before, 0)} to "
            f"{percent(after, 0)}."
        )
    elif not _as_good(last.kernel(PSEUDO.label), last.kernel(TRACE.label)):
        paragraphs.append(
            f"The pNTK {last.name} is clearly above the floor. If the network was trained with cross-entropy that is "
            "to be expected: such training leaves the sum of the last layer's rows where it was while all other "
            "directions grow, and predictions do not depend on the sum at all."
        )
    paragraphs += [
        f"What to use. {_advice(last, study)} Where only the predictions of a regression count, compare the scores "
        "below: they suffer much less than the entries of the kernel."
    ]
    return Section(
        "How close the cheap kernels are to the exact one",
        tuple(paragraphs),
        (Figure(pictures.fidelity(study.states), _closeness_caption(study)),),
        notes=(
            "The same distances with every block of "
            f"{count(study.compared)} {subject.thing}s instead of a sample: "
            + "; ".join(
                f"{state.name} "
                + ", ".join(f"{k.label} {percent(k.error, 0)}" for k in state.kernels if k.fidelity is not None)
                for state in study.states
            )
            + ".",
        ),
    )


def _closeness_caption(study: Study) -> str:
    parts = []
    for state in study.states:
        found = ", ".join(f"{k.label} {plus_minus(k)}" for k in state.kernels if k.fidelity is not None)
        parts.append(f"{sentence(state.name)}: {found}.")
    return " ".join(parts) + " Thin lines: one standard error."


def _directions(study: Study) -> Section:
    several = study.outputs > 1
    labels = [FULL.label, PSEUDO.label, TRACE.label] if several else [FULL.label]
    figures = []
    for state in study.states:
        full = _full(state).spectrum
        caption = f"{sentence(state.name)}: condition number {number(full.condition_number)} for the full kernel"
        if several:
            pseudo = state.kernel(PSEUDO.label).spectrum
            caption += (
                f", {number(pseudo.condition_number)} for the pNTK; the largest eigenvalue of the pNTK is "
                f"{number(pseudo.largest / full.largest)} times the exact one"
            )
        figures.append(Figure(pictures.spectra(state, labels), caption + "."))
    first = _full(study.states[0]).spectrum
    return Section(
        "Fast and slow directions",
        (
            "Gradient descent learns each eigenvector of the kernel at a speed given by its eigenvalue. A steep curve "
            "means that a few directions are learnt at once and the rest hardly ever. Here the full kernel of "
            f"{count(study.compared)} examples has {count(len(first.eigenvalues))} directions and uses "
            f"{first.entropy_rank:.1f} of them {study.states[0].name}"
            + (
                f", {_full(study.states[-1]).spectrum.entropy_rank:.1f} {study.states[-1].name}"
                if len(study.states) > 1
                else ""
            )
            + " (effective rank).",
        ),
        tuple(figures),
        notes=("Each eigenvalue of a cheap kernel counts once per output, as it does when it stands for the full one.",)
        if several
        else (),
    )


def _movement(study: Study) -> Section:
    paragraphs = []
    tables = ()
    if study.movements:
        paragraphs.append(
            "If the kernel stood still during training, the network would be a linear model in disguise and the kernel "
            f"{study.states[0].name} would tell its whole future. {sentence(_moved(study))}"
        )
        tables = (
            Table(
                f"{sentence(study.states[0].name)} against {study.states[-1].name}",
                ("", "relative change", "1 - cosine", "CKA"),
                tuple(
                    (
                        moved.label,
                        number(moved.drift.relative_change),
                        f"{moved.drift.cosine_distance:.3f}",
                        cosine(moved.cka, 3),
                    )
                    for moved in study.movements
                ),
            ),
        )
    names = [max(state.layers, key=state.layers.__getitem__) for state in study.states]
    shares = "; ".join(
        f"{state.name} the largest share, {percent(state.layers[name], 0)}, comes from layer {name}"
        for state, name in zip(study.states, names, strict=True)
    )
    paragraphs.append(
        "The kernel is a sum over the layers, so one can ask which layers would do the learning: " + shares + "."
    )
    return Section(
        "How training moved the kernel, and where it lives" if study.movements else "Where the kernel lives",
        tuple(paragraphs),
        (Figure(pictures.layers(study.states), "Share of the trace of the exact kernel that each layer contributes."),),
        tables,
        notes=(
            "Relative change sees a change of scale; the cosine and CKA do not. CKA leaves the mean over the "
            "examples out as well.",
        )
        if study.movements
        else (),
    )


def _prediction(subject: Subject, study: Study) -> Section:
    first, last = study.states[0], study.states[-1]
    small = [fit for fit in last.fits if fit.examples == study.compared]
    figures = [
        Figure(
            pictures.scores(study.states, study.score_name, study.test_examples),
            ("Hollow: " + first.name + "; full: " + last.name + ". " if len(study.states) > 1 else "")
            + f"Dashed: the network {last.name}, {score(study, last.test_score)}."
            + (" Thin lines: one standard error of the test set." if study.score_name == "accuracy" else ""),
        )
    ]
    figures += [
        Figure(
            pictures.ridge(state.ridge_check, f"{state.ridge_check.label} {state.name}"),
            f"{sentence(state.name)}: leave-one-out promises the error of each ridge without looking at the test set; "
            + _regret(state.ridge_check.regret),
        )
        for state in study.states
    ]
    spread = max(f.test_score for f in small) - min(f.test_score for f in small)
    paragraphs = [
        f"Kernel regression predicts a new {subject.thing} from the labelled ones, weighted by the kernel. It is "
        "where the network would end if it were trained for ever, on squared error, with its kernel frozen. No "
        "training is needed, only one linear system.",
        f"From {count(study.compared)} examples the kernels {last.name} reach "
        + ", ".join(f"{score(study, f.test_score)} ({f.label})" for f in small)
        + (
            f": they differ by {percent(spread)}, far less than the kernels themselves."
            if study.score_name == "accuracy"
            else "."
        ),
    ]
    tables = tuple(_fits(state, study) for state in study.states)
    searched = sorted({fit.ridge_from for fit in last.fits if fit.ridge_from < fit.examples})
    notes = [
        "Predictions start from zero, not from the network's own answers, so that the kernel is judged alone. The "
        "ridge is the one with the least leave-one-out error, in units of the kernel's mean diagonal entry."
        + (f" For the largest fits it was chosen on {count(searched[-1])} of the examples." if searched else "")
    ]
    if study.compared_test < study.test_examples:
        notes.append(
            f"Regressions on {count(study.compared)} examples are scored on {count(study.compared_test)} of the "
            f"{count(study.test_examples)} test examples, because the full kernel is dear."
        )
    if len(study.states) > 1:
        notes.append(
            f"The kernel {last.name} has seen the training labels through the weights, if the network was trained on "
            "these examples: its leave-one-out scores are then too good, its test scores are not."
        )
    return Section("Predicting with the kernel alone", tuple(paragraphs), tuple(figures), tables, notes=tuple(notes))


def _fits(state: State, study: Study) -> Table:
    rows = [
        (
            fit.label,
            count(fit.examples),
            number(fit.relative_ridge),
            score(study, fit.train_score),
            score(study, fit.loo_score),
            score(study, fit.test_score),
            f"{fit.seconds:.1f}",
        )
        for fit in state.fits
    ]
    rows.append(("network", "", "", score(study, state.train_score), "", score(study, state.test_score), ""))
    return Table(
        caption=f"Kernel regression {state.name}: {study.score_name}",
        columns=("", "examples", "ridge", "training", "left out", "test", "seconds"),
        rows=tuple(rows),
    )


def _regret(regret: float) -> str:
    if regret < 1.005:
        return "the ridge it chooses is the best one for the test set as well."
    return f"the ridge it chooses has a test error {percent(regret - 1)} above that of the best one."


def _speakers(subject: Subject, study: Study, task: Task) -> Section | None:
    state = study.states[-1]
    strips = [_strip(evidence, task) for evidence in state.evidence]
    found = tuple(strip for strip in strips if strip is not None)
    if not found:
        return None
    return Section(
        f"Which training {subject.thing}s speak for an answer",
        (
            "A kernel prediction is a sum over the training examples, so it can be taken apart. Left: a test "
            f"{subject.thing} and the answer; right: the training {subject.thing}s that speak for this answer and are "
            "more "
            f"like it than the average test {subject.thing} is, strongest first. Wrong answers come first: their "
            "speakers "
            "show what the network took the image for.",
        ),
        gallery=found,
        notes=(f"From the regression with the {_main(state, study).label} kernel {state.name}.",),
    )


def _strip(evidence: Evidence, task: Task) -> Strip | None:
    image = pictures.thumbnail(task.x_test[evidence.test])
    tiles = [pictures.thumbnail(task.x_train[n]) for n in evidence.train]
    if image is None:
        return None
    right = evidence.truth == evidence.predicted
    caption = f"answer {evidence.predicted}, right" if right else f"answer {evidence.predicted}, is {evidence.truth}"
    return Strip(
        Tile(image, caption),
        right,
        tuple(Tile(t, f"a {c}") for t, c in zip(tiles, evidence.classes, strict=True) if t is not None),
    )


def _widening(facts: Convergence | None) -> Section | None:
    if facts is None:
        return None
    low, high = facts.widths[0], facts.widths[-1]

    def mean(width: int, name: str) -> float:
        values = [getattr(point, name) for point in facts.at(width)]
        return sum(values) / len(values)

    slope, largest = facts.sum_slope, facts.largest_slope
    verdict = "as expected" if facts.as_expected else "outside the expected band"
    return Section(
        "Wider networks have simpler kernels",
        (
            f"Random networks of two hidden layers, {len(facts.seeds)} of each width, before any training. The pNTK "
            f"is {percent(mean(low, 'sum_error'), 0)} away from the exact kernel at width {low} and "
            f"{percent(mean(high, 'sum_error'), 0)} at width {high}. On the double logarithmic picture that is a "
            f"line of slope {signed(slope.value)} ± {slope.standard_error:.2f}, {verdict} "
            f"({signed(EXPECTED_SLOPE[0])} to {signed(EXPECTED_SLOPE[1])}): the theorem of Mohamadi, Bae and "
            "Sutherland (2023) says one over the square root of the width.",
            f"The largest eigenvalue follows, with slope {signed(largest.value)} ± {largest.standard_error:.2f}. The "
            f"condition number of the exact kernel goes from {number(mean(low, 'condition_full'))} to "
            f"{number(mean(high, 'condition_full'))}, that of the pNTK from {number(mean(low, 'condition_sum'))} to "
            f"{number(mean(high, 'condition_sum'))}.",
        ),
        (
            Figure(
                pictures.widths(facts),
                f"Dots: single networks on {facts.examples} images; lines: means. The shaded wedge has the expected "
                "slopes.",
            ),
        ),
        notes=("This holds at initialisation; the section on closeness shows what training does to it.",),
    )
