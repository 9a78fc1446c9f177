"""The index of a prepared store: its samples as they were found when it was made, and what has been damaged since."""

from collections.abc import Mapping
from pathlib import Path

from ssr_fast.data.cache import Report
from ssr_fast.data.diagnosis import Diagnosis, Index, Problem, Sample
from ssr_fast.data.geometry import fitted_size
from ssr_fast.data.labels import train_id_table
from ssr_fast.data.layouts import Layout
from ssr_fast.data.roots import option_name
from ssr_fast.data.store import ImageStore, open_store
from ssr_fast.errors import UserError

_DEFAULTS = {"split": "train", "condition": ""}


def diagnose_store(
    root: Path, asked: Mapping[str, str], labelled: bool, option: str, report: Report, again: bool = False
) -> Diagnosis:
    """What a store holds, and its damaged files.

    Args:
        root: folder of the store.
        asked: layout, split, condition and classes (file) that the user asks for; the store has one of each.
        labelled: the labels are wanted.
        option: prefix of option names in errors, such as data.source; empty for `prepare`.
        report: takes one-line messages.
        again: read all files through, also those that were whole before and have not changed.

    Raises:
        UserError: it is not finished, its index is damaged, or it is not what is asked for.
    """
    store = open_store(root, option_name(option, "root"))
    if asked["classes"]:
        raise UserError(
            f"{option_name(option, 'classes')} {asked['classes']} has no effect with the prepared store {root}, which "
            f"knows its classes; leave it out"
        )
    for name in ("layout", "split", "condition"):
        value, found = asked[name], store.recipe.options[name]
        left_out = not option and value == _DEFAULTS.get(name)  # `prepare` looks at what is there
        if value not in (found, "auto") and not left_out:
            has = f"{name} {found}" if found else f"no {name}"
            raise UserError(
                f"{option_name(option, name)} is {value or 'empty'} and the prepared store {root} was made with {has}; "
                f"give the same, or another store"
            )
    if labelled and not store.recipe.options["labelled"]:
        raise UserError(
            f"{option_name(option, 'root')} {root} is a prepared store without labels; make it without --unlabelled"
        )
    layout = Layout(
        store.recipe.options["layout"], root, store.classes, train_id_table(store.classes.count), store=store
    )
    samples = tuple(
        Sample(
            row.name,
            str(root / row.image),
            str(root / row.label) if labelled and row.label is not None else None,
            row.width,
            row.height,
            row.counts if labelled else None,
        )
        for row in store.rows
    )
    rows = [Problem(error.path, error.problem, error.advice) for error in store.damage(report, again)]
    return Diagnosis(layout, labelled, tuple(rows), samples, store.notes, len(samples), len(samples) * labelled)


def check_sizes(store: ImageStore, resize: tuple[int, int] | None, option: str) -> None:
    """A store holds images of one size each, which must be the size that is asked for, or the originals'.

    Raises:
        UserError: they are of another size.
    """
    if store.box is None:
        return
    for row in store.rows:
        if fitted_size(row.width, row.height, resize) != row.stored:
            box = " ".join(map(str, store.box))
            asked = "null" if resize is None else " ".join(map(str, resize))
            raise UserError(
                f"{option_name(option, 'resize')} is {asked} and the images of the prepared store {store.folder} were "
                f"resized to fit {box}; give {option_name(option, 'resize')} {box}, or make another store"
            )


def require_originals(index: Index, option: str) -> None:
    """Scores are counted at the labels' own sizes.

    Raises:
        UserError: the index is of a store whose labels were resized.
    """
    store = index.layout.store
    if store is not None and store.box is not None:
        raise UserError(
            f"{option_name(option, 'root')} {store.folder} is a prepared store of resized labels, and scores are "
            f"counted at the labels' own sizes; give the original data set, or a store made without --resize"
        )
