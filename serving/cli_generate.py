"""`paddock generate` and `paddock chat`: text to the terminal as it is made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .cli_engine import running_engine
from .cli_flags import engine_config, sampling_params
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .front import Front

DEFAULT_MAX_TOKENS = 128
CHAT_HELP = "/reset forgets the conversation, /exit (or Ctrl+D) ends; Ctrl+C stops an answer"


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for a prompt or option that cannot be had."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with running_engine(engine_config(args)) as engine:
        ids = _tokenize(engine, prompt)
        limit = max(1, min(DEFAULT_MAX_TOKENS, engine.max_model_len - len(ids)))
        write_answer(engine, ids, sampling_params(args, engine.default_params, max_tokens=limit))
    return 0


def chat(args: argparse.Namespace) -> int:
    """Raises ValueError if the model has no chat template, or an option cannot be had."""
    with running_engine(engine_config(args)) as engine:
        params = sampling_params(args, engine.default_params, max_tokens=None)
        if sys.stdin.isatty():
            print(CHAT_HELP, file=sys.stderr)
        converse(engine, params, _lines(), args.system)
    return 0


def converse(engine: Front, params: SamplingParams, lines: Iterator[str], system: str | None = None) -> None:
    """Answer each line with the conversation so far in mind. Raises ValueError if there is no chat template."""
    if engine.chat_template is None:
        raise ValueError("chat needs a tokenizer and a chat template, and this model has none")
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in lines:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(start)
        elif line == "/help":
            print(CHAT_HELP, file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = write_answer(engine, _tokenize(engine, engine.chat_template.render(asked)), params)
            except ValueError as error:  # as when the conversation has outgrown the context
                print(f"paddock: {error} (/reset starts anew)", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]


def write_answer(engine: Front, prompt: list[int], params: SamplingParams) -> str:
    """Print what the model says as it says it; Ctrl+C ends it there. Returns the text."""
    stream = engine.submit(prompt, params)
    text = ""
    try:
        for output in stream:
            piece = output.outputs[0].text
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        stream.abort()
    print(flush=True)
    return text


def _tokenize(engine: Front, text: str) -> list[int]:
    if engine.tokenizer is None:
        raise ValueError("this model has no tokenizer, so there is no text to generate")
    return engine.tokenizer.encode(text)


def _lines() -> Iterator[str]:
    """What the user types, or the lines of a pipe."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() its line editing
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
