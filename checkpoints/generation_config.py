"""What a checkpoint's `generation_config.json` says of generation: where to stop, and how to sample by default."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt

from paddock.model import LlamaConfig

from .errors import CheckpointError

NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults for requests that do not say otherwise; None where the checkpoint does not say either.

    As in vLLM, a sampling field of the file replaces the server's own default, and `max_new_tokens` limits requests
    that give no `max_tokens`. Beyond vLLM, which does not look at it, an explicit `"do_sample": false` makes the
    default temperature 0: it is how such a checkpoint asks for greedy decoding.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def from_folder(cls, folder: Path, config: LlamaConfig) -> GenerationConfig:
        """Read the file if there is one; EOS ids that it lacks are the config's.

        Raises CheckpointError naming the file and the field.
        """
        path = Path(folder) / NAME
        if not path.exists():
            return cls(config.eos_token_ids)
        try:
            said = _File.model_validate_json(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "json_invalid":
                raise CheckpointError(f"{path} is not JSON: {first['msg']}") from error
            field = str(first["loc"][0]) if first["loc"] else "the whole"
            raise CheckpointError(f"{path}: {field} is {first['input']!r}: {first['msg']}") from error
        eos = said.eos_token_id if isinstance(said.eos_token_id, list) else [said.eos_token_id]
        ids = tuple(dict.fromkeys(i for i in eos if i is not None))
        return cls(
            eos_token_ids=config.eos_token_ids if said.eos_token_id is None else ids,
            temperature=0.0 if said.do_sample is False else said.temperature,
            top_p=said.top_p,
            top_k=said.top_k,
            min_p=said.min_p,
            repetition_penalty=said.repetition_penalty,
            max_new_tokens=said.max_new_tokens,
        )

    def sampling_defaults(self) -> dict[str, Any]:
        """The fields that the checkpoint sets, by their names in `SamplingParams`."""
        fields = dataclasses.asdict(self)
        del fields["eos_token_ids"]
        fields["max_tokens"] = fields.pop("max_new_tokens")
        return {name: value for name, value in fields.items() if value is not None}


class _File(pydantic.BaseModel):
    """The fields that are read; the file holds many more, which concern transformers alone."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    eos_token_id: NonNegativeInt | list[NonNegativeInt] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 (transformers) and -1 (vLLM) both mean all tokens
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    max_new_tokens: PositiveInt | None = None
