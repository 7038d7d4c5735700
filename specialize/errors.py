"""The one exception that means "the user gave something unusable", and the JSON reader whose every complaint can become
one. Every package may import this leaf."""

import json
from typing import Any


class InputError(ValueError):
    """Wrong input. The message is one line: what was given, what is allowed, what to do. The CLI exits with code 2.

    A message may quote what it found in a file, however long that is: beyond ``MAX_CHARACTERS`` its middle is left out.
    """

    MAX_CHARACTERS = 2000

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > self.MAX_CHARACTERS:
            text = f"{text[: self.MAX_CHARACTERS - 400]} … {text[-390:]}"
        super().__init__(text)


def parse_json(text: str | bytes) -> Any:
    """As ``json.loads``, but every defect is a ValueError: nesting deeper than the interpreter's stack, and escapes
    that spell half a character (``"\\ud800"``), which no file or tokenizer could take later on."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if ("\\ud" in text or "\\uD" in text) if isinstance(text, str) else (b"\\ud" in text or b"\\uD" in text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value
