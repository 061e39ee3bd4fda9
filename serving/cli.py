"""The `paddock` program. Commands import what they need when they run, so that --help is instant."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from .cli_flags import add_engine_flags, add_sampling_flags
from .cli_plan import add_plan_flags

DEBUG_VARIABLE = "PADDOCK_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 when the engine failed, 2 when the user asked for the impossible."""
    args = build_parser().parse_args(argv)
    _set_up_logging(args.log_level or args.usual_log_level)
    module = importlib.import_module(f".{args.module}", __package__)
    try:
        return getattr(module, args.function)(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left; Python must not try to flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"paddock: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paddock",
        description="Serve Llama models sharded over many accelerators. Without a model, the bundled one is used.",
        epilog=f"{DEBUG_VARIABLE}=1 in the environment shows where an error came from.",
    )
    parser.add_argument("--log-level", default=None, choices=("debug", "info", "warning", "error"), help="what to log")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_bench(commands)
    _add_sweep(commands)
    _add_plan(commands)
    _add_convert(commands)
    _command(commands, "collect-env", "collect_env", "print versions, devices and memory, for a bug report")
    return parser


def _add_serve(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "serve", "cli_serve", "serve a model over an OpenAI-compatible HTTP API")
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port (default: %(default)s; 0: any free)")
    group.add_argument("--api-key", metavar="KEY", help="ask clients for this key; also PADDOCK_API_KEY")
    group.add_argument(
        "--max-concurrent-requests",
        type=int,
        default=512,
        metavar="N",
        help="requests answered at once, a thread each; more are refused with 503 (default: %(default)s)",
    )
    group.add_argument(
        "--shutdown-grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="time for running requests after SIGTERM or Ctrl+C (default: %(default)s)",
    )
    group.add_argument(
        "--plan-only", action="store_true", help="say what the layout asked for takes on these devices; serve nothing"
    )
    add_engine_flags(parser)


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "generate", "cli_generate", "continue a text")
    parser.add_argument("prompt", metavar="PROMPT", help="the text; - reads it from standard input")
    add_sampling_flags(parser)
    add_engine_flags(parser)


def _add_chat(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "chat", "cli_generate", "talk with a model in the terminal", function="chat")
    parser.add_argument("--system", metavar="TEXT", help="what the system message says")
    add_sampling_flags(parser)
    add_engine_flags(parser)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser("bench", help="measure speed", description="Measure speed.")
    kinds = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    throughput = _command(kinds, "throughput", "bench_throughput", "tokens per second of a batch of requests, offline")
    throughput.add_argument(
        "--workload",
        choices=("W1", "W2", "W3", "W4"),
        help="a fixed workload, see docs/numbers.md, with its own lengths and concurrency",
    )
    throughput.add_argument("--num-prompts", type=int, metavar="N", help="(default: the workload's, else 100)")
    throughput.add_argument("--concurrency", type=int, metavar="N", help="requests at once (default: all)")
    _add_lengths(throughput, 128, 128)
    add_engine_flags(throughput)

    latency = _command(kinds, "latency", "bench_latency", "time of a batch of equal requests, and of a step in it")
    latency.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default: %(default)s)")
    latency.add_argument("--num-iters", type=int, default=5, metavar="N", help="measured runs (default: %(default)s)")
    latency.add_argument(
        "--num-iters-warmup", type=int, default=1, metavar="N", help="runs before (default: %(default)s)"
    )
    latency.add_argument(
        "--profile", metavar="FOLDER", help="write a profile for XProf or Perfetto, and say where a step's time goes"
    )
    _add_lengths(latency, 32, 128)
    add_engine_flags(latency)

    serve = _command(kinds, "serve", "bench_serve", "latencies of a running server under a stream of arrivals")
    serve.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    serve.add_argument("--api-key", metavar="KEY", help="the server's key; also PADDOCK_API_KEY")
    serve.add_argument("--num-prompts", type=int, metavar="N", help="requests (default: 100, or all of a trace)")
    serve.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="X",
        help="arrivals per second (default: all at once)",
    )
    serve.add_argument(
        "--max-concurrency", type=int, metavar="N", help="hold arrivals back beyond so many (default: none)"
    )
    serve.add_argument("--trace", metavar="CSV", help="replay TIMESTAMP,ContextTokens,GeneratedTokens")
    serve.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="of the trace's clock (default: %(default)s)"
    )
    serve.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths, prompts and arrivals (default: 0)")
    _add_lengths(serve, 128, 128)

    startup = _command(kinds, "startup", "bench_startup", "time from the program's start to a ready engine")
    add_engine_flags(startup)


def _add_lengths(parser: argparse.ArgumentParser, prompt: int, output: int) -> None:
    text = "tokens: N, or LOW:HIGH to draw from (default: %(default)s)"
    parser.add_argument("--input-len", default=str(prompt), metavar="N", help=f"prompt {text}")
    parser.add_argument("--output-len", default=str(output), metavar="N", help=f"generated {text}")


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "sweep", "cli_sweep", "try many layouts: bytes, collectives, speed, tokens")
    group = parser.add_argument_group("sweep", "every layout with every batch size and prompt length")
    group.add_argument("--meshes", nargs="+", default=[], metavar="MESH", help="as --mesh, each with the default rules")
    group.add_argument("--presets", nargs="+", default=[], metavar="NAME", help="as --layout, over all devices")
    group.add_argument(
        "--layouts", nargs="+", default=[], metavar="LAYOUT", help="'mesh=tensor=4; rules=vocab=; preset=; name='"
    )
    group.add_argument("--config", metavar="FILE", help="TOML: [[layout]] tables, batch_sizes, input_lens, output_len")
    group.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="sequences at once (default: 8)")
    group.add_argument("--input-lens", nargs="+", type=int, metavar="N", help="tokens of a prompt (default: 128)")
    group.add_argument("--output-len", type=int, metavar="N", help="tokens after each prompt (default: 32)")
    group.add_argument("--devices", type=int, metavar="N", help="run on so many virtual CPU devices")
    group.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS", help="per layout (default: 900)")
    group.add_argument(
        "--out", default="sweep", metavar="FOLDER", help="rows.jsonl, report.html and logs; a second run goes on there"
    )
    group.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    group.add_argument(
        "--explain", action="store_true", help="say what the one layout given does to each array; run nothing"
    )
    add_engine_flags(parser)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "plan", "cli_plan", "which layouts of a model fit which accelerators, and how fast")
    add_plan_flags(parser)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "convert", "cli_convert", "write a Hugging Face checkpoint as Orbax, which loads into any mesh"
    )
    parser.add_argument("source", metavar="SRC", help="model folder or Hub id")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the checkpoint's)"
    )


def _command(
    commands: argparse._SubParsersAction, name: str, module: str, text: str, function: str = "run"
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    # Commands whose output is a text to read stay quiet.
    usual_log_level = "warning" if module == "cli_generate" else "info"
    parser.set_defaults(module=module, function=function, usual_log_level=usual_log_level)
    return parser


def _set_up_logging(level: str) -> None:
    """Paddock's own messages from `level` on, others' warnings; all on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    logging.getLogger("paddock").setLevel(level.upper())


if __name__ == "__main__":
    sys.exit(main())
