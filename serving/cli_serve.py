"""`paddock serve`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from .cli_flags import engine_config
from .engine_config import EngineConfig
from .processes import Processes


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit code. Raises ValueError for what the user can change."""
    if args.model_positional and args.model:
        raise ValueError(f"the model is named twice: {args.model_positional} and --model {args.model}")
    config = engine_config(args)
    if args.model_positional:
        config = dataclasses.replace(config, model=args.model_positional)
    if not args.shutdown_grace >= 0:
        raise ValueError(f"--shutdown-grace must be at least 0, got {args.shutdown_grace}")
    if args.max_concurrent_requests < 1:
        raise ValueError(f"--max-concurrent-requests must be at least 1, got {args.max_concurrent_requests}")
    if args.plan_only:
        from .cli_plan import present

        print(present(config))
        return 0
    processes = Processes.of(config)
    if processes is not None and processes.index:
        _end_on_signals(terminated=128 + signal.SIGTERM)  # until it follows
        with _fails_at_once():
            _follow(config)
        return 0
    from . import wsgi

    sock = wsgi.bind(args.host, args.port)
    _end_on_signals(terminated=0)  # until the server listens, and has something to finish
    with sock:
        from . import cli_engine
        from .server import create_app

        print(f"Paddock loads {config.model or 'the bundled model'} and compiles its steps", flush=True)
        with _fails_at_once() if processes is not None else contextlib.nullcontext():
            engine = cli_engine.start_engine(config)
        app = create_app(
            engine,
            api_key=args.api_key or os.environ.get("PADDOCK_API_KEY"),
            max_concurrent_requests=args.max_concurrent_requests,
        )
        code = wsgi.serve(app, engine, sock, grace_seconds=args.shutdown_grace, name=engine.model_name)
    if code:
        _exit_at_once(code)
    return code


def _follow(config: EngineConfig) -> None:
    """Process 0 decides when this one ends: a signal often comes to both, and process 0 still finishes requests."""
    from .follower import follow

    def on_signal(number: int, frame: object) -> None:
        print("Paddock ends with process 0; another signal ends this process at once", file=sys.stderr, flush=True)
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)

    def on_ready() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    follow(config, on_ready=on_ready)


def _end_on_signals(*, terminated: int) -> None:
    """SIGTERM and Ctrl+C end the program in their handler, with code `terminated` and 130. Raised from there as an
    exception they would be lost where Python ignores those, in a destructor or a weak reference's callback, and could
    leave a lock held that others wait for."""

    def end(number: int, frame: object) -> None:
        if os.isatty(2):
            os.write(2, b"\n")  # after a progress bar
        os._exit(terminated if number == signal.SIGTERM else 130)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


@contextlib.contextmanager
def _fails_at_once() -> Iterator[None]:
    """An error ends the program as `cli.main` would, but without waiting for other processes."""
    try:
        yield
    except Exception as error:
        print(f"paddock: {error}", file=sys.stderr)
        _exit_at_once(2 if isinstance(error, ValueError | OSError) else 1)


def _exit_at_once(code: int) -> NoReturn:
    """A device is lost or hangs, or a process is, and what JAX would do at exit might wait for it for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
