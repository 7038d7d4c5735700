"""Token ids, decoding and chat templates against transformers, and what strangers' files may not do."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from specialize.engine.config import ModelConfig
from specialize.engine.tokenizer import Tokenizer, tokenizer_from_gguf
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from specialize.errors import InputError

PIECES = (
    "the", " patient", "\n", "\n\n", "  ", "    ", "\t", "\r\n", "def f(x):", "return", " x == 1.5e-3;", "{",
    "}", "[]", "'s", "'LL", "don't", "I'm", "é", "ñandú", "Ω", "λx.x", "\u4e2d\u6587", "\u65e5\u672c\u8a9e",
    "\ud55c\uad6d\uc5b4", "Привет", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940", "\U0001f600",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1eb\U0001f1f7", "\U0001f3fd",
    "e\u0301", "\u200b", "\xa0", "\u3000", "\ufb01", "½", "²", "Ⅷ", "\u0663", "\uff11\uff12", "0", "7", "42",
    "1234567", "3.14", "HP:0001250", "IL-6", "p<0.05", "±", "≥", "α-synuclein", "<|im_start|>", "<|im_end|>",
    "<|endoftext|>", "<repo_name>", "</s>", "http://a.b/c?d=e&f", "#include <x>", "/* c */", "\\n", "\"q\"",
    "\u2026", "\u2014", "!!!", "???", "a" * 40, "ABC", "camelCase", "snake_case", "\x00", "\x1b", "\ufeff",
    "\uffff", "\U0001d4b3", "\U0001f701",
)  # fmt: skip


def varied_strings(count: int = 1000, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    strings = [*PIECES, "", " "]
    while len(strings) < count:
        kind = rng.random()
        if kind < 0.7:
            strings.append("".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12))))
        elif kind < 0.85:
            strings.append(" ".join(rng.choice(PIECES) for _ in range(rng.randint(1, 30))))
        else:
            points = (rng.choice((0x7F, 0x2FF, 0xFFF, 0xFFFF, 0x1FFFF)) for _ in range(rng.randint(1, 20)))
            chars = (chr(rng.randint(1, top)) for top in points)
            strings.append("".join(c for c in chars if not 0xD800 <= ord(c) < 0xE000))
    return strings


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


def test_smollm2_ids_equal_transformers_on_varied_strings(ours, theirs):
    """transformers' GGUF reader knows the merges but not the splitting that the file names ("smollm": each digit alone,
    then GPT-2's pattern); it is told here. Without that the two differ only where several blanks precede a digit."""
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    strings = varied_strings()
    assert len(strings) == 1000
    wrong = [s for s in strings if ours.encode(s) != theirs.encode(s)]
    assert wrong == []


def test_batch_encoding_equals_single(ours):
    strings = varied_strings(200, seed=1)
    assert ours.encode_batch(strings) == [ours.encode(s) for s in strings]


def test_decoding_equals_transformers_and_round_trips(ours, theirs):
    for text in varied_strings(300, seed=2):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        known = all(len(ours.encode(c)) > 0 for c in set(text))  # SmolLM2's vocabulary lacks some bytes
        if known:
            assert ours.decode(ids, skip_special=False) == text


def assert_incremental(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = tokenizer.decoder()
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


def test_incremental_decoding_joins_to_the_whole(ours):
    rng = random.Random(0)
    for text in varied_strings(300, seed=3):
        assert_incremental(ours, ours.encode(text))
    for _ in range(100):  # ids that are no UTF-8 together
        assert_incremental(ours, [rng.randrange(ours.vocab_size) for _ in range(30)])


def test_incremental_decoding_never_shows_half_a_character(ours):
    decoder = ours.decoder()
    pieces = [decoder.push(i) for i in ours.encode("naïve 👩‍👩‍👧‍👦 日本語")]
    assert not any("\ufffd" in piece for piece in pieces)


def test_smollm2_chat_template_equals_transformers(ours, theirs):
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
        ],
    ):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_smollm2_special_tokens(ours):
    assert ours.eos_ids == (2,) and ours.bos_id == 1
    assert ours.encode("<|im_start|>a<|im_end|>")[0::2] == [1, 2]
    assert ours.decode([1, *ours.encode("a"), 2]) == "a"


def test_tokenizer_and_vocabulary_must_agree(ours):
    ours.check_vocabulary(ModelConfig("llama", 49152, 8, 8, 1, 1))
    with pytest.raises(InputError, match="ids up to 49151, but the model has 1000 embeddings"):
        ours.check_vocabulary(ModelConfig("llama", 1000, 8, 8, 1, 1))


def test_text_must_be_valid(ours):
    with pytest.raises(InputError, match="not valid Unicode"):
        ours.encode("a\ud800b")
    with pytest.raises(InputError, match="it must be a string"):
        ours.encode(3)


def train_bpe(byte_fallback: bool) -> Backend:
    """A small tokenizer: byte-level, or SentencePiece-like with byte fallback."""
    corpus = ["the cat sat on the mat", "hello world, hello there", "naïve café", "def f(x): return x + 1"] * 4
    if not byte_fallback:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    else:
        backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    backend.train_from_iterator(corpus, trainer)
    return backend


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_folders_equal_transformers(byte_fallback, tmp_path):
    from transformers import PreTrainedTokenizerFast

    backend = train_bpe(byte_fallback)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    backend = Backend.from_str(json.dumps(state))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.chat_template = (
        "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m['content'] | trim }}\n{% endfor %}"
    )
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in varied_strings(300, seed=4):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert_incremental(ours, ids)
    assert [ours.bos_id, *ours.eos_ids] == [theirs.bos_token_id, theirs.eos_token_id]
    messages = [{"role": "user", "content": " hi "}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False)


def sentencepiece_metadata(scores: bool) -> dict:
    """The metadata of a GGUF file for the byte-fallback tokenizer above."""
    state = json.loads(train_bpe(True).to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    ranks = {left + right: i for i, (left, right) in enumerate(state["merges"])}
    types = [2 if t == "<unk>" else 3 if t in ("<s>", "</s>") else 6 if t.startswith("<0x") else 1 for t in tokens]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    if scores:
        metadata["tokenizer.ggml.scores"] = [-float(ranks.get(t, 1e6 if len(t) > 1 else 0)) for t in tokens]
    else:
        metadata["tokenizer.ggml.merges"] = [" ".join(m) for m in state["merges"]]
    return metadata


@pytest.mark.parametrize("scores", [True, False])
def test_sentencepiece_in_gguf(scores):
    ours, original = tokenizer_from_gguf(sentencepiece_metadata(scores), "test.gguf"), train_bpe(True)
    for text in ("the cat", " the cat", "hello  world", "naïve 日本", "a\nb", ""):
        ids = ours.encode(text)
        assert ids[0] == 1 and ours.decode(ids) == text
        if not text.startswith(" "):
            assert ids[1:] == original.encode(text).ids
        assert_incremental(ours, ids)


def test_gguf_pre_tokenizers(ours, smollm2):
    from specialize.engine.gguf import GGUFFile

    metadata = dict(GGUFFile(smollm2).metadata)
    counts = {}
    for name in ("smollm", "gpt-2", "qwen2", "llama-bpe", "tekken"):
        metadata["tokenizer.ggml.pre"] = name
        tokenizer = tokenizer_from_gguf(metadata, "x.gguf")
        counts[name] = len(tokenizer.backend.pre_tokenizer.pre_tokenize_str("ab 12345\n\nIT's x"))
    assert counts == {"smollm": 12, "gpt-2": 7, "qwen2": 11, "llama-bpe": 8, "tekken": 11}
    metadata["tokenizer.ggml.pre"] = "grandma"
    with pytest.raises(InputError, match="'grandma' is not supported; allowed: default"):
        tokenizer_from_gguf(metadata, "x.gguf")
    with pytest.raises(InputError, match="tokenizer 'bert' is not supported"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "bert"}, "x.gguf")


def test_broken_folders(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a usable tokenizer") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def with_template(template: str) -> Tokenizer:
    return Tokenizer(train_bpe(False), chat_template=template, source="model")


MESSAGES = [{"role": "user", "content": "hi"}]


def test_templates_can_refuse_and_use_what_they_need():
    assert with_template("{{ messages | tojson }}").apply_chat_template(MESSAGES) == json.dumps(MESSAGES)
    assert with_template("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}x")
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        with_template("{{ raise_exception('roles must alternate') }}").apply_chat_template(MESSAGES)
    with pytest.raises(InputError, match="carries no chat template"):
        Tokenizer(train_bpe(False)).apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'x'.format_map({}) }}{{ '{0:999999999}'.format(1) }}",
        "{% for",
        "{{ 'x'.ljust(999999999) }}",
        "{{ 'x' | indent(999999999) }}",
        "{{ 'x' | center(999999999) }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{{ nothing.at.all }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "x" * 300_000,
    ],
)
def test_hostile_templates_are_stopped(template):
    started = time.process_time()
    with pytest.raises(InputError) as error:
        with_template(template).apply_chat_template(MESSAGES)
    assert "\n" not in str(error.value)
    assert time.process_time() - started < 10
