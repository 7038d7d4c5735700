"""Text <-> token ids, and chat templates, from what a model folder or a GGUF file carries.

The work is done by the ``tokenizers`` package; templates run in jinja2's sandbox with limits on size, loops and time.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from specialize.errors import InputError

from .chat_template import render_chat
from .config import ModelConfig, read_json, shown
from .tokenizer_growth import check_growth

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What `tokenizer.ggml.pre` of a GGUF file means: patterns to split by, one after the other.
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "gpt-2", "mpt", "olmo", "jais"), (_GPT2_SPLIT,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", _GPT2_SPLIT)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3"), (_MODERN_SPLIT % "{1,3}",)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_MODERN_SPLIT % "",)),
    "tekken": (_TEKKEN_SPLIT,),
}
# Every cut of a token is looked at to find its merges, so work and memory grow with the square of its length; no known
# vocabulary has a token of a hundred characters that is not whole by itself, or five million characters in its merges.
_MAX_TOKEN_CHARS, _MAX_CUT_CHARS, _MAX_MERGE_CHARS = 1024, 256, 20_000_000
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # tokenizer.ggml.token_type


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes as printable characters: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return spelled | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """A model's tokenizer. ``eos_ids`` end a generation; ``vocab_size`` is one more than the largest token id;
    ``chat_template`` is None where the model carries none."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        source: str = "tokenizer",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.source = backend, source
        self.bos_id, self.eos_ids = bos_id, tuple(dict.fromkeys(eos_ids))
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._alphabet = byte_alphabet()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @staticmethod
    def from_pretrained(path: str | Path) -> Tokenizer:
        """Reads ``tokenizer.json`` and its companions from a folder, or the tokenizer inside a ``.gguf`` file."""
        path = Path(path)
        if path.suffix == ".gguf":
            from .gguf import GGUFFile

            return tokenizer_from_gguf(GGUFFile(path).metadata, str(path))
        return _from_folder(path)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines ids."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def check_vocabulary(self, config: ModelConfig) -> None:
        """Raises InputError where the tokenizer gives ids that the model has no embedding for."""
        if self.vocab_size > config.vocab_size:
            raise InputError(
                f"{self.source}: gives token ids up to {self.vocab_size - 1}, but the model has {config.vocab_size} "
                "embeddings; this tokenizer belongs to another model"
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens spelled out in it are recognised."""
        try:
            return self.backend.encode(_text(text), add_special_tokens=add_special_tokens).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  (plain Exception where parts lack; a panic, which is none, in a regex)
            raise self._unusable(error) from None

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        checked = [_text(t) for t in texts]
        try:
            encodings = self.backend.encode_batch_fast(checked, add_special_tokens=add_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  (as in `encode`)
            raise self._unusable(error) from None
        return [encoding.ids for encoding in encodings]

    def _unusable(self, error: BaseException) -> InputError:
        return error if isinstance(error, InputError) else InputError(f"{self.source}: cannot tokenize ({error})")

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        try:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)
        except (KeyboardInterrupt, SystemExit, OverflowError):  # an id that is no id is the caller's
            raise
        except BaseException as error:  # noqa: BLE001  (as in `encode`)
            raise self._unusable(error) from None

    def decoder(self, skip_special: bool = True) -> IncrementalDecoder:
        """A decoder that takes ids one by one and gives out text as soon as it is certain."""
        return IncrementalDecoder(self, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token of a byte-level vocabulary."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if all(c in self._alphabet for c in token):
            return bytes(self._alphabet[c] for c in token)
        return token.encode()

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, from which `from_pretrained` makes the same tokenizer."""
        self.backend.save(str(folder / "tokenizer.json"))
        options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, ids in (("bos_token", [self.bos_id]), ("eos_token", self.eos_ids)):
            if ids and ids[0] is not None:
                options[name] = self.backend.id_to_token(ids[0])
        if self.chat_template is not None:
            options["chat_template"] = self.chat_template
        text = json.dumps(options, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Renders messages ``{"role", "content"}``. Encode the result with ``add_special_tokens=False``."""
        if self.chat_template is None:
            raise InputError(f"{self.source}: the model carries no chat template; pass plain prompts")
        tokens = {
            "bos_token": self.backend.id_to_token(self.bos_id) if self.bos_id is not None else "",
            "eos_token": self.backend.id_to_token(self.eos_ids[0]) if self.eos_ids else "",
        }
        return render_chat(
            self.chat_template, {**tokens, **variables}, messages, add_generation_prompt, source=self.source
        )


class IncrementalDecoder:
    """Joins to the same text as decoding all ids at once, and never shows half a character.

    `push` returns what the new id made certain; `finish` returns what is left, broken bytes as U+FFFD.
    """

    MAX_PENDING = 8  # a character has at most four bytes, so more pending tokens than this are broken text

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer._byte_level else None
        self._ids: list[int] = []
        self._prefix = self._read = 0  # ids[prefix:read] are shown already and kept as context for what follows

    def push(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer._special:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._ids.append(token_id)
        return self._advance(final=len(self._ids) - self._read > self.MAX_PENDING)

    def finish(self) -> str:
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        shown = self._tokenizer.decode(self._ids[self._prefix : self._read], skip_special=False)
        text = self._tokenizer.decode(self._ids[self._prefix :], skip_special=False)
        if text.endswith("\ufffd") and not final:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(shown) :]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"a text to tokenize is a {type(value).__name__}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text is not valid Unicode: {error}") from None
    return value


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        other = " (tokenizer.model alone is not enough)" if (folder / "tokenizer.model").exists() else ""
        raise InputError(f"{file}: no such file; a model folder needs it{other}")
    try:
        backend = Backend.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  (the package raises plain Exception, and its panics are no Exception)
        raise InputError(f"{file}: not a usable tokenizer ({error})") from None
    check_growth(backend, str(file))
    options = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    eos: list[int] = []
    for value in (
        generation.get("eos_token_id"),
        config.get("eos_token_id"),
        _token_id(backend, options.get("eos_token")),
    ):
        eos += value if isinstance(value, list) else [] if value is None else [value]
    bos = _token_id(backend, options.get("bos_token"))
    template = options.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [e for e in template if isinstance(e, dict) and e.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if (folder / "chat_template.jinja").exists():
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / 'chat_template.jinja'}: not readable ({error})") from None
    bos = bos if bos is not None else config.get("bos_token_id")
    _check_parts(str(folder), [*eos, *([] if bos is None else [bos])], template)
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=eos,
        chat_template=template,
        source=str(folder),
    )


def _check_parts(source: str, ids: Sequence[Any], template: Any) -> None:
    for value in ids:
        if type(value) is not int or not 0 <= value < 2**31:
            raise InputError(f"{source}: {shown(value)} is no token id")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{source}: the chat template is a {type(template).__name__}; it must be text")


def _token_id(backend: Backend, token: Any) -> int | None:
    if isinstance(token, dict):
        token = token.get("content")
    return backend.token_to_id(token) if isinstance(token, str) else None


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes: byte-level BPE ("gpt2") or SentencePiece ("llama")."""
    try:
        return _from_gguf(metadata, source)
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  (values of the wrong type; the package's plain Exceptions and panics)
        raise InputError(f"{source}: its tokenizer is damaged ({error})") from None


def _from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise InputError(f"{source}: tokenizer {kind!r} is not supported; allowed: gpt2, llama")
    if not all(isinstance(token, str) and len(token) <= _MAX_TOKEN_CHARS for token in tokens):
        raise InputError(
            f"{source}: a token is no text of at most {_MAX_TOKEN_CHARS} characters; the file is corrupted"
        )
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    backend = (_byte_level if kind == "gpt2" else _sentencepiece)(metadata, tokens, source)
    vocab = backend.get_vocab(with_added_tokens=False)
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        names = [token for token, t in zip(tokens, types, strict=True) if t == wanted and token in vocab]
        added = [AddedToken(token, normalized=False, special=special) for token in names]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    bos, eos = ids["bos"], [i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None]
    start = [tokens[bos]] if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and bos is not None else []
    end = [tokens[eos[0]]] if metadata.get("tokenizer.ggml.add_eos_token", False) and eos else []
    if start or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end],
            special_tokens=[(t, tokens.index(t)) for t in dict.fromkeys([*start, *end])],
        )
    template = metadata.get("tokenizer.chat_template")
    _check_parts(source, [*eos, *([] if bos is None else [bos])], template)
    return Tokenizer(backend, bos_id=bos, eos_ids=eos, chat_template=template, source=source)


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], source: str) -> Backend:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise InputError(f"{source}: pre-tokenizer {name!r} is not supported; allowed: {', '.join(_PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    known = [m for m in merges if len(m) == 2 and m[0] in vocab and m[1] in vocab and m[0] + m[1] in vocab]
    ignore_merges = name in ("llama-bpe", "llama3", "llama-v3", "tekken")
    backend = Backend(models.BPE(vocab=vocab, merges=known, ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PRE_TOKENIZERS[name]]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    if name in ("qwen2", "deepseek-r1-qwen", "stablelm2"):
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], source: str) -> Backend:
    """SentencePiece BPE: pairs merge best score first, so the merges follow from the scores."""
    vocab = {token: i for i, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        scores = metadata.get("tokenizer.ggml.scores") or [-float(i) for i in range(len(tokens))]
        ranked, num_chars = [], 0
        for token, token_id in vocab.items():
            if len(token) > _MAX_CUT_CHARS:
                continue
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            found = [(vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab]
            num_chars += len(found) * len(token)
            if num_chars > _MAX_MERGE_CHARS:
                raise InputError(f"{source}: its tokens have merges without end; the file is corrupted")
            ranked += [(-scores[token_id], token_id, a, b, left, right) for a, b, left, right in found]
        merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    # SentencePiece puts a blank before every stretch of text, also before one that starts with a blank.
    start = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
