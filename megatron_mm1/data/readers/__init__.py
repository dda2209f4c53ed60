"""Readers turn a data set as people keep it into documents; chosen by a name below or by the import path of a class."""

from megatron_mm1.data.readers.base import Reader, RejectRecord, Row, Shard
from megatron_mm1.data.readers.jsonlines import (
    Captions,
    JsonLinesReader,
    Questions,
    question_answer,
    question_prompt,
)
from megatron_mm1.data.readers.registry import READERS, open_reader

__all__ = [
    "READERS",
    "Captions",
    "JsonLinesReader",
    "Questions",
    "Reader",
    "RejectRecord",
    "Row",
    "Shard",
    "open_reader",
    "question_answer",
    "question_prompt",
]
