"""`paddock convert`."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Raises CheckpointError (a ValueError)."""
    from paddock.checkpoints import convert, resolve_model

    source = resolve_model(args.source, revision=args.revision)
    convert(source, Path(args.destination), args.dtype, progress=True)
    print(f"wrote {args.destination}")
    return 0
