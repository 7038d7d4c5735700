"""How much a tokenizer.json may make of a text: its steps are a stranger's, and a dozen replacements of one letter by
ten make a terabyte of one letter, at which the package ends the process."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

from tokenizers import Tokenizer as Backend

from specialize.errors import InputError

MAX_GROWTH = 5000  # the widest of known models, ALBERT's, is below 1,000 by this count
# Bytes out per byte in, at most. NFKC and NFKD spell U+FDFA, three bytes, with 33.
_WIDEST = {"NFKC": 11, "NFKD": 11, "NFC": 3, "NFD": 3, "Lowercase": 1.5, "BertNormalizer": 5, "ByteLevel": 2}
_CHILDREN = ("normalizers", "pretokenizers", "decoders", "processors")


def check_growth(backend: Backend, source: str) -> None:
    """Raises InputError where encoding or decoding may multiply the length of a text by more than `MAX_GROWTH`."""
    try:
        encoding = math.prod(_growth(part) for part in (backend.normalizer, backend.pre_tokenizer))
        for factor in (encoding, _growth(backend.post_processor), _growth(backend.decoder)):
            if factor > MAX_GROWTH:
                raise InputError(
                    f"{source}: its steps may make a text {factor:.3g} times as long; allowed is {MAX_GROWTH}; such a "
                    "tokenizer is not used"
                )
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not a usable tokenizer (a step cannot be read: {error})") from None


def _growth(part: Any) -> float:
    if part is None:
        return 1.0
    return _factor(json.loads(part.__getstate__()))


def _factor(step: dict[str, Any]) -> float:
    kind = step["type"]
    if kind == "Sequence":
        return math.prod(_factor(child) for name in _CHILDREN for child in step.get(name, ()))
    if kind == "Replace":
        size, found = len(step["content"].encode()), step["pattern"].get("String")
        # A regular expression may match the empty string, at every place.
        return max(1.0, size / len(found.encode())) if found else 1.0 + size
    if kind == "Prepend":
        return 1.0 + len(step["prepend"].encode())
    if kind == "Metaspace":
        return 1.0 + len(step["replacement"].encode())
    if kind == "Precompiled":
        return _longest_replacement(step["precompiled_charsmap"])
    if kind == "TemplateProcessing":
        return max(_pieces(step["single"], step), _pieces(step["pair"], step))
    return _WIDEST.get(kind, 1.0)


def _longest_replacement(charsmap: str) -> float:
    """SentencePiece's table: the size of a trie, the trie, then the replacements, each ended by a zero byte."""
    table = base64.b64decode(charsmap)
    (trie_bytes,) = struct.unpack_from("<I", table)
    return float(max(map(len, table[4 + trie_bytes :].split(b"\0")), default=1) or 1)


def _pieces(template: list[dict[str, Any]], step: dict[str, Any]) -> float:
    tokens = step["special_tokens"]
    return sum(len(tokens[p["SpecialToken"]["id"]]["ids"]) if "SpecialToken" in p else 1.0 for p in template)
