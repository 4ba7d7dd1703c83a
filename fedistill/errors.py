"""The one kind of error that a user, or another site, is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedistillError(Exception):
    """A mistake that the user can mend: one sentence that says what is wrong, where, and what to do.

    `code` is a short stable word. Only the code and the sentence may cross the wire, so the sentence of an error
    raised at a site must not quote private data.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence

    def __reduce__(self) -> tuple[type[FedistillError], tuple[str, str]]:
        return type(self), (self.code, self.sentence)  # so that it survives the way back from a worker process


def unknown(kind: str, given: str, valid: Iterable[str]) -> FedistillError:
    """An error for a name that does not exist, with the nearest one that does."""
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(names)}."
    return FedistillError(f"unknown-{kind.replace(' ', '-')}", f"Unknown {kind} '{given}': {hint}")
