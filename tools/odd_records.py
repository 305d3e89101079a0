"""Collect what is wrong with the records of a data set, so that all of it is told at once."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from utils.errors import UserError

EMPTY = "empty mask"
MISSING_PHOTO, MISSING_MASK = "missing photo", "missing mask"


class OddError(UserError):
    """Tells what is wrong with one record; such records are counted by `kind`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class OddRecords:
    """Collects the odd records of a set, one problem each.

    Args:
        skip: leave them out; else they refuse the set.
        skip_empty: leave those out whose mask is empty.
    """

    def __init__(self, skip: bool = False, skip_empty: bool = False) -> None:
        self._skip, self._skip_empty = skip, skip_empty
        self._found: dict[tuple[str | None, int], tuple[str, str]] = {}  # kind, text

    @contextmanager
    def catch(self, kind: str, split: object, record: int) -> Iterator[None]:
        """Note a `UserError` that ends the block, under its own kind or else `kind`."""
        split = split if isinstance(split, str) else None  # none that can be read
        try:
            yield
        except UserError as error:
            self._found.setdefault((split, record), (getattr(error, "kind", kind), str(error)))

    def of_split(self, split: str) -> list[str]:
        """Return a line for each odd record of a split, or of none that can be read."""
        return [text for (place, _), (_, text) in self._found.items() if place in (split, None)]

    def settle(self) -> None:
        """List what is left out, or refuse the set with a `UserError`."""
        kinds = Counter(kind for kind, _ in self._found.values())
        lines = [line for kind in kinds for line in self._lines(kind)]
        is_refused = not self._skip and set(kinds) - ({EMPTY} if self._skip_empty else set())
        if is_refused and len(lines) == 1:
            raise UserError(f"{lines[0]}; --skip-odd leaves such records out")
        for line in lines:
            print(line, file=sys.stderr)
        counts = ", ".join(f"{count} of kind {kind!r}" for kind, count in kinds.most_common())
        told = f"{len(self._found)} odd records ({counts}), listed above"
        if is_refused:
            raise UserError(f"{told}; nothing written: put them right, or add --skip-odd")
        if lines:
            print(f"note: left out {told}")

    def _lines(self, kind: str) -> list[str]:
        """Return the different problems of a kind; files that are missing share one line."""
        texts = list(dict.fromkeys(text for found, text in self._found.values() if found == kind))
        if kind in (MISSING_PHOTO, MISSING_MASK) and len(texts) > 1:
            more = f" and {len(texts) - 1} more do not exist"
            return [texts[0].replace(" does not exist", more, 1)]
        return texts
