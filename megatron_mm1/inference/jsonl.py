"""Requests and answers as JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mm1.errors import UserError
from megatron_mm1.inference.images import read_image
from megatron_mm1.inference.prompts import prompt_of
from megatron_mm1.inference.requests import (
    Failure,
    Generation,
    GenerationRequest,
    Prompt,
    Sampling,
    Score,
    ScoringRequest,
)

_TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "prompt": (str, "text"),
    "images": (list, "a list of file names"),
    "continuation": (str, "text"),
    "with_end": (bool, "true or false"),
    "max_new_tokens": (int, "a whole number"),
    "stop": (list, "a list of texts"),
    "temperature": ((int, float), "a number"),
    "top_k": ((int, type(None)), "a whole number or null"),
    "top_p": ((int, float), "a number"),
    "seed": (int, "a whole number"),
}


def generation_request(fields: Mapping[str, Any], folder: Path, *, defaults: Mapping[str, Any]) -> GenerationRequest:
    """The request that a line's fields make; others than the known ones are for the reader of the answers.

    Args:
        folder: what image files are relative to.
        defaults: of max_new_tokens, stop, temperature, top_k, top_p and seed.

    Raises:
        UserError: a field is missing or cannot be used, or an image is missing.
    """
    values = {**defaults, **fields}
    _check(values, required=("prompt",))
    return GenerationRequest(
        prompt=_prompt(values, folder),
        max_new_tokens=values["max_new_tokens"],
        stop=tuple(values["stop"]),
        sampling=Sampling(**{name: values[name] for name in ("temperature", "top_k", "top_p", "seed")}),
    )


def scoring_request(fields: Mapping[str, Any], folder: Path) -> ScoringRequest:
    """As `generation_request`."""
    _check(fields, required=("prompt", "continuation"))
    return ScoringRequest(
        prompt=_prompt(fields, folder),
        continuation=fields["continuation"],
        with_end=fields.get("with_end", True),
    )


def read_line(line: str) -> dict[str, Any]:
    """The fields of a line.

    Raises:
        UserError: it holds no JSON object.
    """
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(f"this is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError("this is no JSON object")
    return fields


def answer_fields(answer: Generation | Score | Failure) -> dict[str, Any]:
    """What an answer adds to its line."""
    match answer:
        case Generation():
            return {
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "num_tokens": len(answer.token_ids),
            }
        case Score():
            return {
                "log_likelihood": answer.log_likelihood,
                "num_tokens": answer.num_tokens,
                "token_log_likelihoods": list(answer.token_log_likelihoods),
            }
        case Failure():
            return {"error": answer.message}


def _check(fields: Mapping[str, Any], *, required: tuple[str, ...]) -> None:
    for name in required:
        if name not in fields:
            raise UserError(f"the field {name!r} is missing")
    for name, (types, what) in _TYPES.items():
        value = fields.get(name)
        is_right = isinstance(value, types) and (types is bool or not isinstance(value, bool))
        if isinstance(value, list):
            is_right = is_right and all(isinstance(entry, str) for entry in value)
        if name in fields and not is_right:
            raise UserError(f"{name} is {json.dumps(value)}: give {what}")


def _prompt(fields: Mapping[str, Any], folder: Path) -> Prompt:
    return prompt_of(fields["prompt"], [read_image(folder / name) for name in fields.get("images", ())])
