"""`mm1 caption`: describe image files."""

from argparse import Namespace

import torch

from megatron_mm1.data.chat import Chat
from megatron_mm1.errors import UserError
from megatron_mm1.inference.images import read_image
from megatron_mm1.inference.loading import ParallelSizes, open_engine
from megatron_mm1.inference.requests import Failure, GenerationRequest


def caption_main(args: Namespace) -> None:
    """Print "file: caption" for each image: `args` has checkpoint, image (paths), max_new_tokens, chat, chat_template,
    tokenizer and the fields of `ParallelSizes`.

    Raises:
        UserError: a file is missing or no image, or the checkpoint cannot be used or was trained without images.
    """
    prompts = [(read_image(path),) for path in args.image]
    with open_engine(
        args.checkpoint, sizes=ParallelSizes.of(args), chat=Chat.of(args), tokenizer=args.tokenizer
    ) as engine:
        if engine.config.data.text_only:
            raise UserError(f"{args.checkpoint} was trained with data.text_only, so it sees no images: use another")
        answers = engine.generate(
            [GenerationRequest(prompt=prompt, max_new_tokens=args.max_new_tokens) for prompt in prompts]
        )
        if torch.distributed.get_rank() == 0:
            for path, answer in zip(args.image, answers, strict=True):
                print(f"{path}: {answer.message if isinstance(answer, Failure) else answer.text.strip()}")
