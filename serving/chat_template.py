"""Chat templates: a conversation to the prompt text that a model was trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from .tokenizer import Tokenizer
from .tokenizer_config import read_json

PROBE = "paddock probe"


class ChatTemplate:
    """The chat template of a model folder. Templates are data from strangers: they run in Jinja's sandbox.

    The names templates may use are Hugging Face's: messages, tools, add_generation_prompt, bos_token, eos_token and the
    tokenizer's other named tokens, raise_exception(message), strftime_now(format), the filter tojson (which escapes
    nothing for HTML), loop controls, and `{% generation %}` blocks.
    """

    def __init__(self, templates: Mapping[str, str], origin: str, special_tokens: Mapping[str, Any]) -> None:
        """`templates`: source by name, "default" and perhaps "tool_use". Raises ValueError for a syntax error."""
        self._origin = origin
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in templates.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"chat template of {origin}, line {error.lineno}: {error.message}") from error
        self._takes_parts = bool(templates) and self._wants_parts()

    @classmethod
    def load(cls, folder: Path | str, tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate:
        """The folder's `chat_template.jinja` (with `additional_chat_templates/`), else that of tokenizer_config.json.

        override: a template file's path, or a template itself. A folder without a template loads, for completions
        need none; `render` then says so. Raises ValueError naming what cannot be read.
        """
        folder = Path(folder)
        if override is not None:
            return cls({"default": _read_override(override)}, "--chat-template", tokenizer.special_tokens)
        if (path := folder / "chat_template.jinja").is_file():
            named = {extra.stem: extra for extra in (folder / "additional_chat_templates").glob("*.jinja")}
            templates = {name: _read(file) for name, file in {**named, "default": path}.items()}
        else:
            path = folder / "tokenizer_config.json"
            templates = _from_config(path, read_json(path).get("chat_template"))
        return cls(templates, str(path if templates else folder), tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Prompt text of OpenAI-style messages; encode it with `Tokenizer.encode`, which adds BOS if it is not there.

        Content that is a list of text parts is joined with newlines where the template wants a string. `kwargs` are
        further names for the template. Raises ValueError if there is no template, a message is malformed, holds
        something other than text, or the template refuses or fails.
        """
        if not self._templates:
            raise ValueError(f"{self._origin} has no chat template; give one with --chat-template")
        if not isinstance(messages, Sequence) or not messages:
            raise ValueError("messages must be a list that is not empty")
        prepared = [self._prepare(i, message) for i, message in enumerate(messages)]
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ValueError(f"{self._origin} has no default chat template, only {sorted(self._templates)}")
        names = {**self._special_tokens, **kwargs, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return self._run(name, {**names, "messages": prepared})

    def _run(self, name: str, names: Mapping[str, Any]) -> str:
        try:
            return self._templates[name].render(names)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error.message}") from error
        except Exception as error:  # a template's own mistakes surface as any Python error: 1 + "a", 1 / 0, ...
            raise ValueError(f"chat template failed with {type(error).__name__}: {error}") from error

    def _wants_parts(self) -> bool:
        """Whether the template shows content only when it is a list of parts: found by trying, not by reading it."""

        def shows(content: Any) -> bool:
            message = {"role": "user", "content": content}
            names = {**self._special_tokens, "messages": [message], "tools": None, "add_generation_prompt": True}
            try:
                return PROBE in self._run("default" if "default" in self._templates else min(self._templates), names)
            except ValueError:
                return False

        return not shows(PROBE) and shows([{"type": "text", "text": PROBE}])

    def _prepare(self, i: int, message: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}] must be an object with a role")
        prepared = dict(message)
        content = message.get("content")
        if isinstance(content, str):
            parts = [content]
        elif isinstance(content, Sequence):
            parts = [_text_of(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)]
        elif content is None and message["role"] == "assistant":
            parts = None
        else:
            raise ValueError(f"messages[{i}].content must be a string or a list of text parts")
        if parts is not None:
            as_parts = [{"type": "text", "text": text} for text in parts]
            prepared["content"] = as_parts if self._takes_parts else "\n".join(parts)
        if calls := message.get("tool_calls"):
            if not isinstance(calls, Sequence):
                raise ValueError(f"messages[{i}].tool_calls must be a list")
            prepared["tool_calls"] = [_with_parsed_arguments(call, i) for call in calls]
        return prepared


def _text_of(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{where} is of type {kind!r}, but this model reads only {{'type': 'text', 'text': ...}}")
    return part["text"]


def _with_parsed_arguments(call: Any, i: int) -> dict[str, Any]:
    """A tool call with its arguments as an object: OpenAI's clients send JSON text, templates expect the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"messages[{i}].tool_calls must be objects with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"messages[{i}].tool_calls: arguments are not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat template {path} cannot be read: {error}") from error


def _read_override(override: str) -> str:
    if "{{" in override or "{%" in override or "\n" in override:
        return override
    return _read(Path(override))


def _from_config(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: chat_template must be a string or a list of name and template") from error
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ValueError(f"{path}: chat_template holds a name or template that is not a string")
    return named


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is only a scope."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
