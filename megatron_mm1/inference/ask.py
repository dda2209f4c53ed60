"""`mm1 generate` and `mm1 score`: prompts from the command line or JSON lines, answers to the same."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import batched
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from megatron_mm1.arguments import FAILED
from megatron_mm1.data.chat import Chat
from megatron_mm1.errors import UserError
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.images import read_image
from megatron_mm1.inference.jsonl import answer_fields, generation_request, read_line, scoring_request
from megatron_mm1.inference.loading import ParallelSizes, open_engine
from megatron_mm1.inference.prompts import prompt_of
from megatron_mm1.inference.requests import Failure, Generation, GenerationRequest, Sampling, Score, ScoringRequest
from megatron_mm1.parallel.groups import launcher_ranks

_BATCHES_AT_A_TIME = 4
"""Of lines that each copy of the model is given before answers are written."""
_BLIND = "the model was trained with data.text_only, so it sees no images: use another, or leave them out"


def generate_main(args: Namespace) -> int:
    """`args` has checkpoint, prompt and image or input, output, max_new_tokens, stop, temperature, top_k, top_p, seed,
    batch_size, chat, chat_template, tokenizer and the fields of `ParallelSizes`; the exit code.

    Raises:
        UserError: the checkpoint, the layout, an option or the prompt cannot be used.
    """
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    if args.input is not None:
        if args.image:
            raise UserError("--image goes with --prompt: name the images of --input in its lines")
        options = ("max_new_tokens", "stop", "temperature", "top_k", "top_p")
        defaults = {name: getattr(args, name) for name in options}

        def request(number: int, fields: Mapping[str, Any], folder: Path) -> GenerationRequest:
            return generation_request(fields, folder, defaults={**defaults, "seed": args.seed + number})

        return _answer_lines(args, request, lambda engine, requests: engine.generate(requests))
    prompt = prompt_of(args.prompt, [read_image(path) for path in args.image])
    asked = GenerationRequest(
        prompt=prompt, max_new_tokens=args.max_new_tokens, stop=tuple(args.stop), sampling=sampling
    )
    with _engine(args, batch_size=1) as engine:
        if args.image and engine.config.data.text_only:
            raise UserError(_BLIND)
        is_writer = torch.distributed.get_rank() == 0
        stream = is_writer and args.output is None
        [answer] = engine.generate([asked], on_text=_print_piece if stream else None)
        if isinstance(answer, Failure):
            raise UserError(answer.message)
    if stream:
        print()
    elif is_writer:
        fields = {"prompt": args.prompt, "images": [str(path) for path in args.image], **answer_fields(answer)}
        args.output.write_text(json.dumps(fields, ensure_ascii=False) + "\n")
    return 0


def score_main(args: Namespace) -> int:
    """`args` has checkpoint, input, output, batch_size, chat, chat_template, tokenizer and `ParallelSizes`' fields;
    the exit code.
    """

    def request(number: int, fields: Mapping[str, Any], folder: Path) -> ScoringRequest:
        return scoring_request(fields, folder)

    return _answer_lines(args, request, lambda engine, requests: engine.score(requests))


def _engine(args: Namespace, *, batch_size: int) -> AbstractContextManager[Engine]:
    return open_engine(
        args.checkpoint,
        sizes=ParallelSizes.of(args),
        batch_size=batch_size,
        chat=Chat.of(args),
        tokenizer=args.tokenizer,
    )


def _print_piece(index: int, text: str) -> None:
    print(text, end="", flush=True)


def _answer_lines[Request, Answer: Generation | Score](
    args: Namespace,
    request: Callable[[int, Mapping[str, Any], Path], Request],
    ask: Callable[[Engine, Sequence[Request]], list[Answer | Failure]],
) -> int:
    """Answer the lines of a file in their order; 1 where some could not be."""
    lines, folder = _read_lines(args.input)
    num_failed = 0
    with (
        _engine(args, batch_size=args.batch_size) as engine,
        _writing(args.output) as file,
        _progress(len(lines), silent=args.output is None) as progress,
    ):
        together = _BATCHES_AT_A_TIME * args.batch_size * engine.replica.count
        for chunk in batched(enumerate(lines), together):
            for fields, answer in _answer_chunk(engine, chunk, folder, request=request, ask=ask):
                num_failed += isinstance(answer, Failure)
                if file is not None:
                    print(json.dumps({**fields, **answer_fields(answer)}, ensure_ascii=False), file=file, flush=True)
            progress.update(len(chunk))
        if num_failed and torch.distributed.get_rank() == 0:
            print(f"mm1: {num_failed} of {len(lines)} lines could not be answered: see their error", file=sys.stderr)
    return FAILED if num_failed else 0


def _answer_chunk[Request, Answer: Generation | Score](
    engine: Engine,
    chunk: Sequence[tuple[int, str]],
    folder: Path,
    *,
    request: Callable[[int, Mapping[str, Any], Path], Request],
    ask: Callable[[Engine, Sequence[Request]], list[Answer | Failure]],
) -> list[tuple[dict[str, Any], Answer | Failure]]:
    """(fields, answer) of each line, on every rank; each copy of the model answers its share."""

    def prepared(number: int, line: str) -> tuple[dict[str, Any], Request | Failure]:
        fields: dict[str, Any] = {"line": number + 1}
        try:
            fields = read_line(line)
            if engine.config.data.text_only and fields.get("images"):
                raise UserError(_BLIND)
            return fields, request(number, fields, folder)
        except UserError as error:
            return fields, Failure(str(error))

    def answered(share: Sequence[tuple[int, str]]) -> list[tuple[dict[str, Any], Answer | Failure]]:
        asked = [prepared(number, line) for number, line in share]
        answers = iter(ask(engine, [what for _, what in asked if not isinstance(what, Failure)]))
        return [(fields, what if isinstance(what, Failure) else next(answers)) for fields, what in asked]

    return engine.replica.share_out(chunk, answered)


def _read_lines(path: Path) -> tuple[list[str], Path]:
    """Lines that are not blank, and the folder that file names in them are relative to."""
    if str(path) == "-" and launcher_ranks()[1] > 1:
        raise UserError("several processes cannot share standard input: give --input a file")
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} has no lines: give one JSON object on each")
    return lines, Path() if str(path) == "-" else path.parent


@contextmanager
def _writing(output: Path | None) -> Iterator[TextIO | None]:
    """The file that rank 0 writes to; None on others."""
    if torch.distributed.get_rank() > 0:
        yield None
    elif output is None:
        yield sys.stdout
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", encoding="utf-8") as file:
            yield file


def _progress(total: int, *, silent: bool) -> "tqdm[Any]":
    # None: shown on a terminal only.
    return tqdm(total=total, unit="line", disable=True if silent or torch.distributed.get_rank() else None)
