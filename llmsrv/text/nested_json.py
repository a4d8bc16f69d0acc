"""Reads JSON that arrived as a string inside other JSON, from a client or from a model.

JSON can escape half of a character: "\\ud83d" is the first of the two surrogates of an emoji.
Python decodes it to a string that is not valid Unicode, which fails later and far away, when it is
encoded or tokenized.  So it is replaced here, as UTF-8 decoders replace what they cannot read.
Source: RFC 8259 section 8.2.
"""

import json
import re
from typing import Any

# An escaped backslash, a pair of surrogates, or one alone.
_SURROGATES = re.compile(
    r"\\(?:\\|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2}))"
)


def loads(text: str) -> Any:
    """The value; half of an escaped character becomes U+FFFD.

    Raises ValueError if it is not JSON, RecursionError if it is nested too deeply."""
    if "\\u" in text:
        text = _SURROGATES.sub(lambda match: r"\ufffd" if match["half"] else match[0], text)
    return json.loads(text)
