"""LLaVA-1.5 at tiny size, as others have it: the layouts of its JSON, its parts, and a training loop without us.

The loop is transformers' processor, model and schedule with torch's AdamW, an example at a time.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import sentencepiece
import torch
import transformers
from torch import Tensor

from tests.conftest import REPOSITORY
from tests.corpora import WORDS, encoded, sentence
from tests.pretrained import TOWER, decoder, randomize

TEMPLATES = REPOSITORY / "examples" / "llava15"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PIECES, VOCABULARY, GROWN = 360, 366, 384
"""Pieces of a SentencePiece model of Llama's kind; with our six symbols; and the rows that a decoder has then."""
IMAGE_ID = PIECES
TEMPLATE = {"align": "plain", "sft": "vicuna_v1"}
SIZES = ((40, 28), (28, 60), (36, 36), (72, 20), (31, 33))
"""Of images, px. The margins of their centres are whole, or rounded alike by CLIP's and by transformers' code."""

Record = dict[str, Any]


def write_tokenizer(file: Path) -> None:
    """A SentencePiece model with Llama's settings."""
    rng = np.random.default_rng(0)
    texts = [f"{SYSTEM} USER: {sentence(rng, 5)} ASSISTANT: {sentence(rng, 5)}" for _ in range(50)]
    text = file.with_suffix(".txt")
    text.write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text),
        model_prefix=str(file.with_suffix("")),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


def write_records(folder: Path) -> dict[str, list[Record]]:
    """`align.json` and `sft.json` as the published files have their records, beside a folder of images."""
    rng = np.random.default_rng(1)
    images = []
    for number, size in enumerate(SIZES * 3):
        images.append(f"{number:05d}/{number}.png")
        path = folder / "images" / images[-1]
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(size=size, seed=number))
    records = {
        "align": [_caption(rng, str(rng.choice(images)), number) for number in range(26)],
        "sft": [_conversation(rng, str(rng.choice(images)), number) for number in range(26)],
    }
    for stage, rows in records.items():
        (folder / f"{stage}.json").write_text(json.dumps(rows))
    return records


def _caption(rng: np.random.Generator, image: str, number: int) -> Record:
    question = ("Render a clear and concise summary of the photo.\n<image>", "<image>\nWhat is this?")[number % 2]
    return _record(number, image, [question, sentence(rng, 1 + number % 7)])


def _conversation(rng: np.random.Generator, image: str, number: int) -> Record:
    """With the image in front or behind of the first question, or text alone, some of which the assistant begins."""
    turns = [sentence(rng, int(rng.integers(1, 9))) for _ in range(2 * (1 + number % 3))]
    if number % 5 == 4:
        return _record(number, None, turns, greeted=bool(number % 2))
    turns[0] = f"<image>\n{turns[0]}?" if number % 2 else f"{turns[0]}?\n<image>"
    turns[-1] += "\n- " + str(rng.choice(WORDS))
    return _record(number, image, turns)


def _record(number: int, image: str | None, turns: list[str], *, greeted: bool = False) -> Record:
    """Turns by the human and the assistant, one after the other; `greeted`, the assistant has said something before."""
    said = [{"from": speaker, "value": turn} for speaker, turn in zip(cycle(("human", "gpt")), turns, strict=False)]
    if greeted:
        said.insert(0, {"from": "gpt", "value": "Hello."})
    return {"id": str(number), **({} if image is None else {"image": image}), "conversations": said}


def write_parts(folder: Path) -> None:
    """`clip` and `llama` as their projects publish them."""
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    randomize(tower)
    tower.save_pretrained(folder / "clip")
    theirs = decoder(
        "llama",
        vocab_size=PIECES,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=2048,
    )
    theirs.save_pretrained(folder / "llama")


def plain_examples(folder: Path, records: Sequence[Record], *, stage: str) -> list[dict[str, Tensor]]:
    """What transformers' processor makes of records, as its model takes them: one example each, with its labels."""
    side = TOWER["image_size"]
    pixels = transformers.LlavaImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=stage == "sft"
    )
    processor = plain_processor(folder, pixels, stage=stage)
    return [plain_example(processor, record, folder / "images") for record in records]


def plain_processor(folder: Path, pixels: Any, *, stage: str) -> transformers.LlavaProcessor:
    """transformers' own, of the tokenizer in `folder`, an image processor and the stage's template."""
    tokenizer = transformers.LlamaTokenizer.from_pretrained(
        folder / "llama", legacy=True, extra_special_tokens={"image_token": "<image>"}
    )
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_ID
    return transformers.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=TOWER["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(TEMPLATES / f"{TEMPLATE[stage]}.jinja").read_text(),
    )


def plain_example(processor: transformers.LlavaProcessor, record: Record, images: Path) -> dict[str, Tensor]:
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    pictures = {"images": [PIL.Image.open(images / record["image"])]} if "image" in record else {}
    encoding = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs=pictures,
    )
    trained = torch.as_tensor(encoding.pop("assistant_masks")).view_as(encoding["input_ids"]).bool()
    return {**encoding, "labels": encoding["input_ids"].masked_fill(~trained, -100)}


@dataclass(frozen=True)
class Step:
    """What a step reports: the loss before it, the gradient norm before clipping, and the learning rate."""

    loss: float
    grad_norm: float
    lr: float


class PlainLlava:
    """transformers' LLaVA of the parts in `folder`, with this projector.

    Args:
        projector: its four tensors, by the names that they have there.
    """

    def __init__(self, folder: Path, projector: dict[str, Tensor]) -> None:
        tower = transformers.CLIPVisionModel.from_pretrained(folder / "clip")
        text = transformers.LlamaForCausalLM.from_pretrained(folder / "llama")
        config = transformers.LlavaConfig(
            vision_config=tower.config,
            text_config=text.config,
            image_token_id=IMAGE_ID,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        self.model = transformers.LlavaForConditionalGeneration(config).train()
        self.model.model.vision_tower.load_state_dict(tower.state_dict())
        self.model.model.language_model.load_state_dict(text.model.state_dict())
        self.model.lm_head.load_state_dict(text.lm_head.state_dict())
        self.model.model.multi_modal_projector.load_state_dict(projector)
        self.model.resize_token_embeddings(GROWN, mean_resizing=False)
        with torch.no_grad():
            for table in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
                table.weight[PIECES:] = 0

    def train(
        self, batches: Sequence[Sequence[dict[str, Tensor]]], *, parts: Sequence[str], lr: float, warmup: int
    ) -> Iterator[Step]:
        """A step for each of `batches`, of the parameters whose names hold one of `parts`.

        As transformers' Trainer by default: the loss is the mean over the trained tokens of the whole batch, the
        gradient norm is at most 1, and AdamW does not decay.
        """
        trained = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
            trained += [parameter] if parameter.requires_grad else []
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
        for batch in batches:
            num_trained = sum((example["labels"] != -100).sum() for example in batch)
            loss = 0.0
            for example in batch:
                mean = self.model(**example, num_items_in_batch=num_trained).loss
                mean.backward()
                loss += mean.item()
            norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
            yield Step(loss, norm, scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
