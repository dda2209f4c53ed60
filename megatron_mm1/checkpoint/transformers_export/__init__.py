"""A whole MM1 as a folder that transformers loads with trust_remote_code, and such a folder as an MM1."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mm1.checkpoint.rules import export_plan, import_plan
from megatron_mm1.checkpoint.safetensors_folder import IMAGE_PROCESSOR, PROCESSOR, SafetensorsFolder, read_json
from megatron_mm1.checkpoint.tensors import Plan, TensorSource
from megatron_mm1.checkpoint.transformers_export.configuration import (
    MODEL_TYPE,
    check_exportable,
    from_transformers,
    to_transformers,
)
from megatron_mm1.checkpoint.transformers_export.correspondence import EMBEDDING, mm1_correspondence
from megatron_mm1.checkpoint.transformers_export.tokenizer import tokenizer_files
from megatron_mm1.config import DataConfig, MM1Config, ModelConfig
from megatron_mm1.config.derived import padded_vocab_size
from megatron_mm1.data import tiling
from megatron_mm1.data.chat import Chat
from megatron_mm1.data.images import geometry
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.errors import UserError

__all__ = ["MODEL_TYPE", "data_settings", "export_transformers", "import_from_transformers"]

_CODE = {
    **{file.stem: file for file in sorted((Path(__file__).parent / "files").glob("*_mm1.py"))},
    "geometry_mm1": Path(geometry.__file__),
    "tiling_mm1": Path(tiling.__file__),
}
"""What the folder carries to be loaded with trust_remote_code, by module: its own code, and two files of training's."""
_IMPORTS = {"megatron_mm1.data.images.geometry": ".geometry_mm1", "megatron_mm1.data.tiling": ".tiling_mm1"}
_TILING = ("image_tiling", "min_image_tiles", "max_image_tiles")
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_PROCESSOR = "processing_mm1.MM1Processor"
_IMAGE_PROCESSOR = "image_processing_mm1.MM1ImageProcessor"


def export_transformers(
    config: MM1Config, source: TensorSource, *, chat: Chat | None = None
) -> tuple[dict[str, Any], Plan, dict[str, bytes | str]]:
    """A folder for `AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)`.

    Reads the tokenizer that the configuration names.

    Args:
        config: of the run that made the weights.
        source: the weights under our names.
        chat: for a model that was trained on conversations: the folder has their template, and an answer ends where the
            assistant's turn does.

    Returns:
        config.json, the tensors of the safetensors files, and the contents of the other files by name: code,
        tokenizer, preprocessing and generation settings.

    Raises:
        UserError: a part of the model is the user's own, the tokenizer or its template cannot be used, or the weights
            do not fit the configuration.
    """
    check_exportable(config.model)
    tokenizer = open_tokenizer(config.data.tokenizer)
    vocab_rows = _vocab_rows(config.model, source)
    if tokenizer.vocab_size > vocab_rows:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but the model only {vocab_rows} embeddings: "
            "set data.tokenizer to the one it was trained with"
        )
    plan = export_plan(mm1_correspondence(config.model, vocab_rows=vocab_rows), source, what="an MM1")
    special_ids = {
        "image_token_id": tokenizer.image_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    their_config = to_transformers(
        config.model,
        vocab_rows=vocab_rows,
        seq_length=config.data.seq_length,
        special_ids=special_ids,
        dtype=_usual_dtype(plan),
    )
    files: dict[str, bytes | str] = {f"{module}.py": _code(file) for module, file in _CODE.items()}
    files |= tokenizer_files(tokenizer, max_length=config.data.seq_length)
    files |= _processor_files(config, tokenizer)
    ends = [tokenizer.eos_id]
    if chat is not None:
        template = chat.open(tokenizer)
        files["chat_template.jinja"] = template.source
        ends = list(dict.fromkeys([*map(tokenizer.control_id, template.ends), *ends]))
    files["generation_config.json"] = _generation_config(special_ids, ends, tokenizer.vocab_size, vocab_rows=vocab_rows)
    return their_config, plan, files


def _code(file: Path) -> str:
    text = file.read_text()
    for module, carried in _IMPORTS.items():
        text = text.replace(f"from {module} import", f"from {carried} import")
    return text


def import_from_transformers(config: Mapping[str, Any], source: TensorSource) -> tuple[ModelConfig, Plan]:
    """The whole model of an exported folder: its configuration and its tensors under our names, bit for bit.

    Args:
        config: config.json, parsed.
        source: the weights under the folder's names.

    Raises:
        UserError: this is no exported MM1, or the weights do not fit its configuration.
    """
    model, vocab_rows = from_transformers(config)
    check_exportable(model)
    return model, import_plan(mm1_correspondence(model, vocab_rows=vocab_rows), source, what="an exported MM1")


def data_settings(folder: SafetensorsFolder, model: ModelConfig) -> dict[str, Any]:
    """Fields of `DataConfig` that an exported folder states: its tokenizer, its length, and how images become tokens.

    Raises:
        UserError: a file of it is damaged.
    """
    tokenizer = next((folder.path / name for name in _TOKENIZERS if (folder.path / name).is_file()), None)
    settings: dict[str, Any] = {} if tokenizer is None else {"tokenizer": str(tokenizer)}
    length = int(folder.config["text_config"]["max_position_embeddings"])
    most_images = max(0, (length - 2) // model.connector.tokens_per_image)
    settings |= {"seq_length": length, "max_images_per_sequence": most_images}
    images, processor = folder.image_processor or {}, read_json(folder.path / PROCESSOR) or {}
    settings |= {name: images.get(name, getattr(DataConfig(), name)) for name in _TILING}  # old folders say nothing
    settings["tile_indicators"] = processor.get("tile_indicators", False)
    settings["text_only"] = not processor.get("takes_images", True)
    return settings


def _vocab_rows(model: ModelConfig, source: TensorSource) -> int:
    """As the weights have them: how far the vocabulary is padded depends on the layout it was trained in."""
    embedding = source.tensors.get(EMBEDDING)
    return embedding.shape[0] if embedding is not None else padded_vocab_size(model.decoder.vocab_size)


def _usual_dtype(plan: Plan) -> str:
    sizes: Counter[str] = Counter()
    for planned in plan:
        sizes[str(planned.info.dtype).removeprefix("torch.")] += planned.info.num_bytes
    return sizes.most_common(1)[0][0]


def _processor_files(config: MM1Config, tokenizer: Tokenizer) -> dict[str, str]:
    vision, data = config.model.vision, config.data
    images = {
        "auto_map": {"AutoImageProcessor": _IMAGE_PROCESSOR, "AutoProcessor": _PROCESSOR},
        "image_processor_type": "MM1ImageProcessor",
        "processor_class": "MM1Processor",
        "image_size": vision.image_size,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "image_resize": vision.image_resize,
        **{name: getattr(data, name) for name in _TILING},
    }
    processor = {
        "auto_map": {"AutoProcessor": _PROCESSOR},
        "processor_class": "MM1Processor",
        "tokens_per_image": config.model.connector.tokens_per_image,
        "image_token": tokenizer.symbol(tokenizer.image_id),
        "takes_images": not data.text_only,
        "tile_indicators": data.tile_indicators,
        "control_symbols": {name: tokenizer.control_id(name) for name in tokenizer.controls},
    }
    return {
        IMAGE_PROCESSOR: json.dumps(images, indent=2),
        PROCESSOR: json.dumps(processor, indent=2),
    }


def _generation_config(special_ids: Mapping[str, int], ends: Sequence[int], pieces: int, *, vocab_rows: int) -> str:
    """Greedy; what is no text is never generated: images, padding, beginnings of text, rows that are no piece."""
    ids: dict[str, Any] = dict(special_ids)
    symbols = dict.fromkeys([ids.pop("image_token_id"), ids["pad_token_id"], ids["bos_token_id"]])
    never = [symbol for symbol in symbols if symbol not in ends]  # one id may both pad and end texts
    never += range(pieces, vocab_rows)
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    return json.dumps({**ids, "do_sample": False, "suppress_tokens": never}, indent=2)
