"""The demonstration model's data: the text and its parts, the tokenizer, and streams of documents to train on."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
BOS, EOS = 1, 2
# Turns become speeches, of two who talk to each other in the training part, each ended by </s>; a system message is the
# Chorus speaking first.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}{{ 'Chorus:\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'ROMEO:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'JULIET:\\n' }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ message['content'] | trim }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'JULIET:\\n' }}{% endif %}"
)


def split(text: str, shares: tuple[float, ...] = (0.9, 0.95)) -> tuple[str, ...]:
    """Cut `text` at these shares of its bytes, moved on to the next line start: train, validation, test."""
    data = text.encode()
    cuts = [0, *(data.index(b"\n", int(len(data) * share)) + 1 for share in shares), len(data)]
    return tuple(data[start:end].decode() for start, end in itertools.pairwise(cuts))


def train_tokenizer(text: str, vocab_size: int, kind: str) -> bytes:
    """A SentencePiece model (`kind` bpe or unigram) with byte fallback, as the bytes of its `tokenizer.model`.

    Nothing is normalised and no prefix is added, so that decoding gives back the text to the byte and a speech
    has the same tokens at the start of a document as in the middle.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        num_threads=1,  # the pieces depend on it
        minloglevel=2,
    )
    return model.getvalue()


def load_tokenizer(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def documents(speeches: list[str], chat_share: float, rng: np.random.Generator) -> Iterator[list[str]]:
    """Cut consecutive speeches into documents; each part of a document is followed by </s>.

    A plain document is one part, the play as written, ~20 speeches long: </s> is rare in it and costs no bits per
    byte worth naming. A chat is ~4 parts, a speech each, as the chat template writes them.
    """
    means = {"chat": 4, "plain": 20}
    # Documents are drawn, speeches are counted: without the weights, chats would be too small a share.
    weights = chat_share / means["chat"], (1 - chat_share) / means["plain"]
    start = 0
    while start < len(speeches):
        kind = "chat" if rng.random() < weights[0] / sum(weights) else "plain"
        end = start + int(rng.geometric(1 / means[kind]))
        part = speeches[start:end]
        yield part if kind == "chat" else ["\n\n".join(part)]
        start = end


def cut(text: str, rate: float, rng: np.random.Generator) -> list[str]:
    """`text` in pieces, cut before a character with probability `rate`."""
    places = np.flatnonzero(rng.random(len(text)) < rate).tolist()
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)]) if start < end]


@dataclasses.dataclass(frozen=True)
class Streams:
    """Variants of one text, each a stream of tokens: other documents, and other subwords in the sampled ones.

    `tokens` is [variants, longest] padded, `lengths` [variants]; the last `num_exact` variants are tokenized as
    inference does. In the others the text is cut at random, before a character in `cut_rate` of cases, and the pieces
    are tokenized alone: subword regularisation (Kudo 2018) by means that a seed repeats.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_exact: int
    num_bytes: int

    @classmethod
    def build(
        cls,
        tokenizer: sentencepiece.SentencePieceProcessor,
        text: str,
        *,
        num_sampled: int,
        num_exact: int,
        cut_rate: float,
        chat_share: float,
        seed: int,
    ) -> Streams:
        rng = np.random.default_rng(seed)
        speeches = [speech for speech in text.split("\n\n") if speech]
        variants = []
        for index in range(num_sampled + num_exact):
            rate = cut_rate if index < num_sampled else 0.0
            stream: list[int] = []
            for parts in documents(speeches, chat_share, rng):
                stream.append(BOS)
                for part in parts:
                    for ids in tokenizer.encode(cut(part, rate, rng)):
                        stream += ids
                    stream.append(EOS)
            variants.append(stream)
        lengths = np.array([len(stream) for stream in variants], np.int32)
        tokens = np.zeros((len(variants), lengths.max()), np.int32)
        for row, stream in zip(tokens, variants, strict=True):
            row[: len(stream)] = stream
        return cls(tokens, lengths, num_exact, len(text.encode()))

    @property
    def tokens_per_byte(self) -> float:
        """Of the exact variants, or of all where there are none."""
        return float(self.lengths[-self.num_exact :].mean()) / self.num_bytes
