"""The demonstration model's card: its README.md with measured numbers and unedited samples."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import sentencepiece
from baselines import trigram, xz
from demo_data import BOS, EOS
from demo_eval import sample
from demo_folder import evaluate, load

PROMPTS = [
    "<s>ROMEO:\nHow fares the night, and wherefore art thou awake?</s>JULIET:\n",
    "<s>PETRUCHIO:\n",
    "<s>KING RICHARD III:\nWhat news from the north?\n\nMessenger:\n",
]
CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# Paddock's bundled model

A Llama with grouped-query attention, small enough to travel with the source: it is here so that every part of the
engine can be tried on a model that was really trained. It writes in the manner of Shakespeare's plays, knows nothing
else, and is no use as an assistant.

| | |
|---|---|
| parameters | {parameters:,} ({embed}, tied embeddings) |
| layers x width, mlp | {layers} x {width}, {mlp} |
| heads / kv heads / head_dim | {heads} / {kv_heads} / {head_dim} |
| vocabulary | {vocab}, SentencePiece {kind} with byte fallback |
| context | {context} tokens |
| stored as | {dtype} |

## Bits per byte

On the last 5% of the text ({test_bytes:,} bytes, which neither the training nor the tokenizer's saw), from the stored
weights, all tokens counted, in windows of {context} tokens that step by half:

| | bits per byte |
|---|---|
| **this model** | **{bpb:.3f}** |
| byte trigram, interpolated (Witten-Bell), on the same training text | {trigram:.3f} |
| xz -9e, given the training text before it | {xz_after:.3f} |
| xz -9e, alone | {xz_alone:.3f} |

## Training

{recipe}

Command, on {device}:

```
{command}
```

The text is 1.1 MB of Shakespeare's plays ("tiny Shakespeare"), which are in the public domain.

## Chat

The template makes speeches of turns: the user speaks as ROMEO, the model answers as JULIET, and a system message is
the Chorus speaking first. Each speech ends with `</s>`, which the model learned in a share of its training documents.

## Samples

Unedited, temperature {temperature}, by full recompute of the sequence at each token; `</s>` ends a speech.

{samples}
"""


def write_card(
    folder: Path, *, trained_on: str, test: str, command: str, recipe: str, kind: str, temperature: float = 0.8
) -> float:
    """Measure the folder as stored, write its README.md and return its bits per byte on `test`."""
    config, params, tokenizer = load(folder)
    bpb, (xz_after, xz_alone) = evaluate(folder, test), xz(trained_on, test)
    samples = []
    for seed, prompt in enumerate(PROMPTS):
        ids = prompt_ids(tokenizer, prompt)
        drawn = tokenizer.decode(sample(config, params, ids, max_tokens=160, temperature=temperature, seed=seed))
        samples.append(f"Prompt `{json.dumps(prompt)[1:-1]}`, seed {seed}:\n\n```\n{drawn}\n```")
    facts = {
        "parameters": sum(value.size for value in params.values()),
        "embed": f"{config.vocab_size * config.embed_dim:,} of them",
        "layers": config.num_layers, "width": config.embed_dim, "mlp": config.mlp_dim,
        "heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "vocab": config.vocab_size, "kind": kind, "context": config.max_position, "dtype": config.dtype,
        "test_bytes": len(test.encode()), "bpb": bpb, "trigram": trigram(trained_on, test),
        "xz_after": xz_after, "xz_alone": xz_alone, "recipe": recipe, "command": command,
        "device": jax.devices()[0].device_kind, "temperature": temperature, "samples": "\n\n".join(samples),
    }  # fmt: skip
    (folder / "README.md").write_text(CARD.format(**facts))
    return bpb


def prompt_ids(tokenizer: sentencepiece.SentencePieceProcessor, prompt: str) -> list[int]:
    """Tokens of a prompt in which <s> and </s> are written out."""
    ids: list[int] = []
    for index, part in enumerate(prompt.removeprefix("<s>").split("</s>")):
        ids += [EOS if index else BOS, *tokenizer.encode(part)]
    return ids
