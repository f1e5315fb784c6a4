"""The words that tiny tokenizers know: those of the pipeline's own source, so templates stay short.

A pipeline drops a fixed number of tokens of its prompt template and cuts what is too long. With
words of its own source a tiny tokenizer needs one or two tokens a word, as real ones do.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache

EXAMPLES = (
    "a small red cube on a wooden table, soft light",
    "a green bird sings near the water while waves roll in",
    "blurry, low quality, worst quality",
    "cat dog glass car bus white black left right moving up down",
)


@cache
def texts(module: str) -> tuple[str, ...]:
    """Every string constant of a module's source that holds a space, and a few sentences."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return EXAMPLES
    constants = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return (*EXAMPLES, *(text for text in constants if 8 < len(text) < 3000 and " " in text))
