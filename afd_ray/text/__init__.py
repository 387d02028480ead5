"""Text in and out: tokenizer, chat template, and tokens turned back into text as they arrive."""

from afd_ray.text.detokenizer import IncrementalDetokenizer
from afd_ray.text.tokenizer import Tokenizer, TokenizerError

__all__ = ["IncrementalDetokenizer", "Tokenizer", "TokenizerError"]
