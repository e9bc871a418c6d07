"""Text, tokens, weights, files and figures: what comes in and what goes out.

Nothing here imports a module above it. `data.load_tokenizer` and `data.rows` are what the programs
use most.
"""

from data.text import rows  # noqa: F401
from data.tokens import load_tokenizer  # noqa: F401
