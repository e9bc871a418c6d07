"""Text, tokens, weights, and the model that ships. `data.tokenizer` and `data.rows` are what the studies use.
"""

from data.bpe import tokenizer  # noqa: F401
from data.text import rows  # noqa: F401
