"""Train the bundled model: a small Llama on Shakespeare's plays, by JAX and optax, in minutes on one GPU.

    python examples/train_demo.py --out checkpoints/bundled --retrain
    python examples/train_demo.py --evaluate checkpoints/bundled

The text is cut in three: training (90% of the bytes), validation (5%, picks the step to stop at) and test (the last
5%, measured once at the end). With --retrain, a second run of as many steps from scratch trains on the first two.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

import jax
from demo_card import write_card
from demo_data import BOS, EOS, TEXT, Streams, load_tokenizer, split, train_tokenizer
from demo_folder import evaluate, save
from demo_training import Recipe, Trainer

from paddock.model import LlamaConfig, param_specs


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="print a folder's bits per byte, train nothing")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--log", type=Path, default=Path("build/train_demo.log"), help="file for the table")
    parser.add_argument("--retrain", action="store_true", help="train again on training and validation part together")
    data = parser.add_argument_group("data")
    data.add_argument("--vocab-size", type=int, default=1024)
    data.add_argument("--tokenizer", choices=["unigram", "bpe"], default="unigram")
    data.add_argument("--cut-rate", type=float, default=0.08, help="cuts per character in the sampled variants")
    data.add_argument("--sampled", type=int, default=16, help="variants of the text with randomly cut subwords")
    data.add_argument("--exact", type=int, default=16, help="variants tokenized as inference does")
    data.add_argument("--chat-share", type=float, default=0.2, help="share of the text written as chats")
    model = parser.add_argument_group("model")
    for name, size in (("embed", 256), ("layers", 6), ("heads", 8), ("kv-heads", 4), ("head-dim", 32), ("mlp", 768)):
        model.add_argument(f"--{name}", type=int, default=size)
    model.add_argument("--max-position", type=int, default=1024)
    model.add_argument("--rope-theta", type=float, default=10000.0)
    recipe = parser.add_argument_group("recipe")
    for field in dataclasses.fields(Recipe):
        numbers = {"nargs": "+", "type": int} if field.name == "contexts" else {"type": type(field.default)}
        recipe.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **numbers)
    return parser


def model_config(args: argparse.Namespace) -> LlamaConfig:
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab_size,
        "hidden_size": args.embed,
        "intermediate_size": args.mlp,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "max_position_embeddings": args.max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return LlamaConfig.from_dict(described, source="the command line")


def repeatable_command() -> str:
    """This run's command for the card: where this run happened to write is left out."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--out", "--log"):
        places.add_argument(name)
    choices = places.parse_known_args()[1]
    return shlex.join(["python", "examples/train_demo.py", "--out", "checkpoints/bundled", *choices])


def main() -> None:
    args = arguments().parse_args()
    train, validation, test = split(TEXT.read_text())
    if args.evaluate:
        print(f"{args.evaluate}: {evaluate(args.evaluate, test):.4f} bits per byte on the test part")
        return
    args.contexts = tuple(args.contexts)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    config = model_config(args)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w") as file:

        def log(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")

        command = repeatable_command()
        log(f"{command}\non {jax.devices()[0].device_kind}")
        num_parameters = sum(spec.num_bytes for spec in param_specs(config, dtype="uint8").values())
        tokenizer_model = train_tokenizer(train, args.vocab_size, args.tokenizer)
        tokenizer = load_tokenizer(tokenizer_model)
        streams = [
            Streams.build(
                tokenizer, text, num_sampled=args.sampled, num_exact=args.exact, cut_rate=args.cut_rate,
                chat_share=args.chat_share, seed=args.seed,
            )
            for text in ([train, train + validation] if args.retrain else [train])
        ]  # fmt: skip
        width = max(part.tokens.shape[1] for part in streams)
        log(f"{num_parameters:,} parameters, {int(streams[0].lengths[-1]):,} training tokens")

        trainer = Trainer(config, recipe)
        held_out = tokenizer.encode(validation), len(validation.encode())
        params, best_step = trainer.run(streams[0], held_out, log, width=width)
        log(f"best on the validation part: step {best_step}")
        told = (
            f"AdamW with weight decay, dropout, subword sampling and averaged weights, on the first 90% of the text;\n"
            f"the weights of step {best_step} of {recipe.steps} were the best on the next 5%."
        )
        trained_on = train
        if args.retrain:
            params, _ = trainer.run(streams[1], None, log, width=width, stop_at=best_step)
            trained_on = train + validation
            told += "\nAs many steps from scratch on both parts then gave the weights stored here."
        save(args.out, config, params, tokenizer_model)
        bpb = write_card(args.out, trained_on=trained_on, test=test, command=command, recipe=told, kind=args.tokenizer)
        size = sum(path.stat().st_size for path in args.out.iterdir())
        log(f"{args.out.name}: {bpb:.4f} bits per byte on the test part, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
