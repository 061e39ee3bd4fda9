"""`paddock serve`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys

from .cli_flags import engine_config


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
    from . import wsgi

    sock = wsgi.bind(args.host, args.port)
    # Until the server listens there is nothing to finish: a signal simply ends the program.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with sock:
        from . import cli_engine
        from .server import create_app

        print(f"Paddock loads {config.model or 'the bundled model'} and compiles its steps", flush=True)
        engine = cli_engine.start_engine(config)
        app = create_app(
            engine,
            api_key=args.api_key or os.environ.get("PADDOCK_API_KEY"),
            max_concurrent_requests=args.max_concurrent_requests,
        )
        code = wsgi.serve(app, engine, sock, grace_seconds=args.shutdown_grace, name=engine.model_name)
    if code:
        # The device is lost or hangs, and what JAX would do at exit might wait for it for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
