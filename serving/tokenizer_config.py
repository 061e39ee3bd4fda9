"""The JSON files beside a vocabulary, and the tokens that they add to it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token matched in the text before the vocabulary is.

    lstrip, rstrip: it takes the white space before, after it; single_word: it never matches inside a word.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say.

    values: tokenizer_config.json as it is; added: tokens by id; named_tokens: "bos_token", ... to text;
    extra_tokens: further special tokens.
    """

    folder: Path
    values: dict[str, Any]
    added: dict[int, AddedToken]
    named_tokens: dict[str, str]
    extra_tokens: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> TokenizerConfig:
        """Read what is there; a folder without these files gives an empty config. Raises ValueError naming the file."""
        path = folder / "tokenizer_config.json"
        values = read_json(path)
        named_in = {**read_json(folder / "special_tokens_map.json"), **values}
        added: dict[int, AddedToken] = {}
        try:
            for content, token in read_json(folder / "added_tokens.json").items():
                added[int(token)] = AddedToken(content)
            for token, entry in values.get("added_tokens_decoder", {}).items():
                flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip", "single_word")}
                added[int(token)] = AddedToken(entry["content"], **flags)
            named = {name: _content(named_in[name]) for name in NAMED_TOKENS if named_in.get(name) is not None}
            extra = named_in.get("additional_special_tokens") or named_in.get("extra_special_tokens") or ()
            extra_tokens = tuple(_content(entry) for entry in (extra.values() if isinstance(extra, dict) else extra))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: a token listed in its tokenizer settings is malformed: {error!r}") from error
        for token, entry in added.items():
            if entry.content in {*named.values(), *extra_tokens}:
                added[token] = dataclasses.replace(entry, special=True)
        return cls(folder, values, added, named, extra_tokens)

    @property
    def special_texts(self) -> set[str]:
        """Spellings of all tokens that these files call special."""
        return {*self.named_tokens.values(), *self.extra_tokens} | {t.content for t in self.added.values() if t.special}

    def choose(self, flag: str, tokens: list[int], default: list[int]) -> list[int]:
        """`tokens` or nothing as a boolean of tokenizer_config.json says; `default` where it says nothing."""
        value = self.values.get(flag)
        if value is None:
            return default
        if value and not tokens:
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: {flag} is true but there is no such token")
        return tokens if value else []


NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _content(entry: Any) -> str:
    content = entry["content"] if isinstance(entry, dict) else entry
    if not isinstance(content, str):
        raise ValueError(f"expected a token's text, found {content!r}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, {} if there is no such file. Raises ValueError naming the file if it is anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


class AddedTokens:
    """Finds added tokens in a text, for the formats whose library knows nothing of them; the longest match wins."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._tokens = {added.content: (token, added) for token, added in tokens.items()}
        self._all = self._pattern(lambda added: True)
        self._ordinary = self._pattern(lambda added: not added.special)

    def _pattern(self, wanted: Callable[[AddedToken], bool]) -> re.Pattern[str] | None:
        chosen = [added for _, added in self._tokens.values() if added.content and wanted(added)]
        chosen.sort(key=lambda added: -len(added.content))
        spelled = (re.escape(added.content) for added in chosen)
        words = (rf"(?<!\w){s}(?!\w)" if a.single_word else s for s, a in zip(spelled, chosen, strict=True))
        return re.compile("|".join(words)) if chosen else None

    def split(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """The text as ids of added tokens and the non-empty strings between them; special ones only if asked for."""
        pattern = self._all if parse_special else self._ordinary
        start = 0
        for match in pattern.finditer(text) if pattern else ():
            token, added = self._tokens[match[0]]
            between = text[start : match.start()]
            if between := between.rstrip() if added.lstrip else between:
                yield between
            yield token
            start = match.end()
            if added.rstrip:
                start = WHITE_SPACE.match(text, start).end()  # type: ignore[union-attr]  # it matches the empty string
        if start < len(text):
            yield text[start:]


WHITE_SPACE = re.compile(r"\s*")
