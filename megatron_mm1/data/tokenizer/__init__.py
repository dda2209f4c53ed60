"""Tokenizers: SentencePiece models and Hugging Face's tokenizer.json behind one interface, and how to make them."""

from megatron_mm1.data.tokenizer.base import CHAT_SYMBOLS, IMAGE_SYMBOL, Tokenizer
from megatron_mm1.data.tokenizer.extending import extend_tokenizer
from megatron_mm1.data.tokenizer.opening import open_tokenizer
from megatron_mm1.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megatron_mm1.data.tokenizer.tokenizer_json import HuggingFaceTokenizer
from megatron_mm1.data.tokenizer.training import train_tokenizer

__all__ = [
    "CHAT_SYMBOLS",
    "IMAGE_SYMBOL",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "extend_tokenizer",
    "open_tokenizer",
    "train_tokenizer",
]
