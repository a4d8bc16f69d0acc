"""What the API counts, in plain integers; metrics.py turns them into Prometheus' text."""

from collections import Counter
from dataclasses import dataclass
from dataclasses import field


@dataclass
class Counters:
    """Of one model, since the server started; choices are counted when they end."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # by finish reason
