"""Stop strings, looked for in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Lets text through until a stop string is complete, holding back an end that may be the start of one.

    The match that ends first wins, and of those the longest: how the text was cut into pieces makes no difference.

    matched: the stop string that was found, None so far. Whatever comes after it is dropped.
    """

    def __init__(self, stop: Sequence[str] = (), *, include_stop_str_in_output: bool = False) -> None:
        """Raises ValueError for an empty stop string."""
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError("stop must be a list of non-empty strings")
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._include = include_stop_str_in_output
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""

    def add(self, text: str, *, check: bool = True) -> str:
        """Text that may be shown now. With check=False (before `min_tokens`) no match may contain this text."""
        if self.matched is not None:
            return ""
        text = self._held + text
        self._held = ""
        if not check:
            return text
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            return text[: end if self._include else start]
        if held := self._unfinished(text):
            self._held = text[-held:]
            return text[:-held]
        return text

    def finish(self) -> str:
        """What was held back, when no more text will come."""
        text, self._held = self._held, ""
        return text

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
