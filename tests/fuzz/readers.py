"""Every reader of a user's file, with small valid files to mutate: what the fuzzers and their findings share.

A `Reader` is given bytes and must read them or raise `InputError`; anything else is a finding.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save
from specialize.engine.adapter_format import CONFIG_FILE, MIXTURE_FILE, WEIGHTS_FILE, load_modules, save_part_matrices
from specialize.engine.chat_template import render_chat
from specialize.engine.config import ModelConfig
from specialize.engine.convert import BinFolder
from specialize.engine.gguf import GGUFFile
from specialize.engine.mixture import adapter_files
from specialize.engine.quantize import Quantization, QuantizedView, read_weight, stored_quantization
from specialize.engine.tokenizer import Tokenizer, tokenizer_from_gguf
from specialize.engine.weights import RandomTensors, SafetensorsFolder, open_checkpoint
from specialize.retrieval.corpus import chunk, read_corpus
from specialize.retrieval.index import Index
from specialize.train.checkpoint import load_checkpoint, save_checkpoint
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from specialize.errors import InputError
from specialize.ledger import Item, Ledger, Reply
from specialize.recipe import Recipe, read_recipe, remembered_inputs, write_recipe
from specialize.records import fingerprint, read_seeds, read_tasks, read_training_rows
from specialize.standalone import read_prompts

MAX_SECONDS = 10.0  # that a reader may take over a small file: above the five that a chat template has
MAX_EXTRA_BYTES = 2 << 30

CONFIG = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "bos_token_id": 1,
    "eos_token_id": [2, 3], "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN = {
    **CONFIG, "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
}  # fmt: skip
MPT = {
    "model_type": "mpt", "vocab_size": 8, "d_model": 4, "n_heads": 2, "n_layers": 1, "expansion_ratio": 2,
    "max_seq_len": 16, "no_bias": True,
    "attn_config": {"alibi": True, "clip_qkv": 6.0, "attn_type": "multihead_attention"},
}  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[{{ m.content | trim }}]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
MESSAGES = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "yes"}]


@dataclass(frozen=True)
class Reader:
    """``read(folder, data)`` reads ``data`` in an empty folder. ``kind`` says how its files are built, for mutation:
    "json", "jsonl", "safetensors", "text" or "binary"."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path, bytes], object]
    kind: str = "binary"

    def check(self, data: bytes) -> bool:
        """Whether ``data`` was accepted; raises whatever else than InputError the reader raised."""
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory_disk()) as folder:
            try:
                self.read(Path(folder), data)
            except InputError as error:
                assert len(str(error)) <= InputError.MAX_CHARACTERS, "an endless complaint"
                return False
        return True


def _memory_disk() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return dict(RandomTensors(ModelConfig.from_dict(CONFIG, source="seed"), 0).items())


def _file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _read_safetensors(folder: Path, data: bytes) -> None:
    _file(folder, "config.json", _dumps(CONFIG))
    _file(folder, "model.safetensors", data)
    _, tensors = open_checkpoint(folder)
    for name in tensors:
        tensors[name]


def _read_shard_index(folder: Path, data: bytes) -> None:
    (folder / "model").mkdir()
    _file(folder, "outside.safetensors", save(_tensors()))
    _file(folder / "model", "model-1.safetensors", save(_tensors()))
    _file(folder / "model", "model.safetensors.index.json", data)
    tensors = SafetensorsFolder(folder / "model")
    assert all(file.parent.resolve() == (folder / "model").resolve() for file in tensors.files), "left its folder"


def _shard_index_seeds() -> list[bytes]:
    return [_dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(_tensors(), "model-1.safetensors")})]


def _read_config(folder: Path, data: bytes) -> None:
    _file(folder, "config.json", data)
    config = ModelConfig.from_folder(folder)
    stored_quantization(folder)
    hash(config)


def _read_quantized_config(folder: Path, data: bytes) -> None:
    _file(folder, "config.json", data)
    _file(folder, "model.safetensors", save(_quantized_tensors()))
    config, tensors = open_checkpoint(folder)
    if stored_quantization(folder) is not None:
        read_weight(tensors, "quantized.layers.0.qkv", "int8", str(folder))
    assert config


@cache
def _quantized_tensors() -> dict[str, torch.Tensor]:
    config = ModelConfig.from_dict(CONFIG, source="seed")
    return dict(QuantizedView(config, _tensors(), Quantization("int8"), "seed").items())


def _read_quantized(folder: Path, data: bytes) -> None:
    _file(folder, "config.json", _dumps(CONFIG | {"quantization_config": Quantization("int8").to_dict()}))
    _file(folder, "model.safetensors", data)
    _, tensors = open_checkpoint(folder)
    for linear in ("qkv", "o", "gate_up", "down"):
        read_weight(tensors, f"quantized.layers.0.{linear}", "int8", str(folder))


@cache
def _gguf_seeds() -> list[bytes]:
    found = []
    for model, kind in (("gpt2", gguf.GGMLQuantizationType.Q8_0), ("llama", gguf.GGMLQuantizationType.F16)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            writer = gguf.GGUFWriter(path, "llama")
            writer.add_block_count(1)
            writer.add_context_length(16)
            writer.add_embedding_length(32)
            writer.add_feed_forward_length(32)
            writer.add_head_count(2)
            writer.add_head_count_kv(1)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_rope_freq_base(10000.0)
            writer.add_tokenizer_model(model)
            writer.add_tokenizer_pre("gpt-2")
            tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "▁"]
            writer.add_token_list(tokens)
            writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
            if model == "gpt2":
                writer.add_token_merges(["a b"])
            else:
                writer.add_token_scores([-float(i) for i in range(len(tokens))])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_chat_template(TEMPLATE)
            rows = np.linspace(-1, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
            for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
                raw = gguf.quants.quantize(rows, kind)
                writer.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=kind)
            for name in ("attn_k", "attn_v"):
                writer.add_tensor(f"blk.0.{name}.weight", rows[:16])
            for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
                writer.add_tensor(f"{name}.weight", rows[0])
            writer.add_tensor("token_embd.weight", rows[:8])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            found.append(path.read_bytes())
    return found


def _read_gguf(folder: Path, data: bytes) -> None:
    path = _file(folder, "m.gguf", data)
    file = GGUFFile(path)
    complaints = []
    try:
        open_checkpoint(path)
        for name in file:
            file[name]
    except InputError as error:
        complaints.append(error)
    _use(tokenizer_from_gguf(file.metadata, str(path)))
    if complaints:
        raise complaints[0]


def _use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b ab <s>")
    tokenizer.decode(ids)
    tokenizer.encode_batch(["a", ""])
    decoder = tokenizer.decoder()
    for token_id in ids:
        decoder.push(token_id)
    decoder.finish()
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template(MESSAGES)


@cache
def _tokenizer_seeds() -> list[bytes]:
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ"])}
    bpe = Backend(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>"])
    pieces = Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("▁", -1.5)], unk_id=0))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return [backend.to_str().encode() for backend in (bpe, pieces, words)]


def _read_tokenizer(folder: Path, data: bytes) -> None:
    _file(folder, "tokenizer.json", data)
    _use(Tokenizer.from_pretrained(folder))


def _read_tokenizer_config(folder: Path, data: bytes) -> None:
    _file(folder, "tokenizer.json", _tokenizer_seeds()[0])
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        _file(folder, name, data)
    _use(Tokenizer.from_pretrained(folder))


def _tokenizer_config_seeds() -> list[bytes]:
    common = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "bos_token_id": 1, "eos_token_id": [2]}
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "x"}]
    return [_dumps(common | {"chat_template": template}) for template in (TEMPLATE, named)]


def _read_template(folder: Path, data: bytes) -> None:
    template = data.decode("utf-8", errors="replace")
    render_chat(template, {"bos_token": "<s>", "eos_token": "</s>"}, MESSAGES, True, source="model")


def _template_seeds() -> list[bytes]:
    macros = (
        "{%- macro show(x, depth=0) -%}{{ x ~ depth }}{%- endmacro -%}{%- set ns = namespace(n=0, all=[]) -%}"
        "{%- for i in range(3) -%}{%- set ns.n = ns.n * 2 + i -%}{%- set ns.all = ns.all + [show(i)] -%}{%- endfor -%}"
        "{{ ns.all | join(', ') | replace('1', 'one') }}{{ messages | tojson }}{{ '%s' if false else [ns.n] * 3 }}"
    )
    return [TEMPLATE.encode(), macros.encode()]


@cache
def _adapter_files() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        parts = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 4), torch.ones(4, 2))}
        save_part_matrices(folder, parts, rank=2, alpha=4, targets=["q_proj"], alpha_pattern={"q_proj": 3})
        return (Path(folder) / CONFIG_FILE).read_bytes(), (Path(folder) / WEIGHTS_FILE).read_bytes()


def _read_adapter_config(folder: Path, data: bytes) -> None:
    _file(folder, CONFIG_FILE, data)
    _file(folder, WEIGHTS_FILE, _adapter_files()[1])
    load_modules(folder)


def _read_adapter_weights(folder: Path, data: bytes) -> None:
    _file(folder, CONFIG_FILE, _adapter_files()[0])
    _file(folder, WEIGHTS_FILE, data)
    load_modules(folder)


def _mixture_manifest() -> bytes:
    files = ["router.safetensors", *(f"experts/{i}/{name}" for i in range(2) for name in (CONFIG_FILE, WEIGHTS_FILE))]
    manifest = {
        "format": "mixture of experts", "version": 1, "base_model": "tiny", "base": {"embedding in bf16": "ab"},
        "top_k": 1, "experts": ["one", "two"], "sha256": dict.fromkeys(files, "0" * 64),
    }  # fmt: skip
    return json.dumps(manifest).encode()


def _read_mixture_manifest(folder: Path, data: bytes) -> None:
    _file(folder, MIXTURE_FILE, data)
    for name in json.loads(_mixture_manifest())["sha256"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _file(folder, name, b"")
    adapter_files(folder)


class _Letters:
    """An embedder without weights: counts of a few letters, normalised."""

    dim, fingerprint = 4, "letters"

    def embed(self, texts: list[str], /) -> np.ndarray:
        rows = np.array([[1.0 + text.count(c) for c in "aeio"] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@cache
def _index_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-index-", dir=_memory_disk()))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    corpus = "".join(
        json.dumps({"id": str(i), "title": f"t{i}", "text": text}) + "\n"
        for i, text in enumerate(["a cat sat", "one more idea", "no ear", "pie in the oven", "aeio", "xyz"])
    )
    Index.build(_file(folder, "c.jsonl", corpus.encode()), folder / "index", _Letters())
    return folder / "index"


def _index_reader(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, data: bytes) -> None:
        out = folder / "index"
        shutil.copytree(_index_folder(), out)
        (out / name).write_bytes(data)
        index = Index.load(out, _Letters())
        for mode in ("hybrid", "exact"):
            index.search(["a cat and one pie"], k=3, mode=mode)

    return read


def _index_seeds(name: str) -> Callable[[], list[bytes]]:
    return lambda: [(_index_folder() / name).read_bytes()]


@cache
def _ledger_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "l.sqlite"
        with Ledger(path) as ledger:
            ledger.begin_stage("index", "f", {"a": 1})
            ledger.end_stage("index", {"n": 2})
            ledger.add_items([Item(f"i{n}", 1, 0, "corpus", "k", "do it", "x" * 50) for n in range(3)])
            ledger.add_reply(Reply("r0", "i0", "response", 0, "text", "stop", 3, {"seed": 1}))
            ledger.decide([("i0", "kept", "", "", "text", 0.5), ("i1", "rejected", "short", "", "", None)])
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            database.execute("PRAGMA journal_mode=DELETE")
        database.close()
        return [path.read_bytes()]


def _read_ledger(folder: Path, data: bytes) -> None:
    with Ledger(_file(folder, "ledger.sqlite", data)) as ledger:
        ledger.stages()
        ledger.items()
        ledger.item_ids()
        ledger.replies("response")
        ledger.counts()
        ledger.reasons()
        ledger.reply_times("response")
        ledger.answer_times(1)
        ledger.decide([("i2", "kept", "", "", "t", 1.0)])
        ledger.add_seconds("index", 1.0)


def _lines(*rows: Any) -> bytes:
    return b"".join(_dumps(row) + b"\n" for row in rows)


def _read_seeds(folder: Path, data: bytes) -> None:
    for seed in read_seeds(_file(folder, "s.jsonl", data)):
        fingerprint(seed.instruction, seed.input, seed.output)


def _read_rows(folder: Path, data: bytes) -> None:
    for row in read_training_rows(_file(folder, "r.jsonl", data)):
        fingerprint(row)


def _read_prompts(folder: Path, data: bytes) -> None:
    fingerprint(read_prompts(_file(folder, "p.jsonl", data)))


def _read_task(folder: Path, data: bytes) -> None:
    for task in read_tasks(_file(folder, "t.json", data)):
        fingerprint(task.name, task.instruction, [e.outputs for e in task.examples])


def _read_recipe(folder: Path, data: bytes) -> None:
    path = _file(folder, "r.yaml", data)
    recipe, inputs = read_recipe(path)
    remembered_inputs(path)
    write_recipe(recipe, inputs, folder / "again.yaml")
    assert read_recipe(folder / "again.yaml")[0] == recipe


def _recipe_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_recipe(Recipe(), {"model": "m", "seeds": "s.jsonl"}, Path(folder) / "r.yaml")
        whole = (Path(folder) / "r.yaml").read_bytes()
    return [whole, b"name: x\nseed: 3\ntune: {rank: 8, learning_rate: 5e-4}\nevaluate:\n  shots: [0, 1]\n"]


def _corpus_reader(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, data: bytes) -> None:
        for number, document in enumerate(read_corpus(_file(folder, name, data))):
            for passage in chunk(document):
                passage.searchable.encode()
            assert number < 100_000

    return read


def _parquet_seeds() -> list[bytes]:
    found = []
    for compression in ("none", "zstd"):
        sink = io.BytesIO()
        columns = {"id": ["a", "b"], "title": ["t", None], "text": ["one two", "three"], "year": [1, 2]}
        pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression=compression)
        found.append(sink.getvalue())
    return found


def _xml_seeds() -> list[bytes]:
    article = (
        "<PubmedArticle><MedlineCitation><PMID>1</PMID><Article><ArticleTitle>A <i>title</i></ArticleTitle><Abstract>"
        '<AbstractText Label="AIM">One &amp; two</AbstractText><AbstractText>Three</AbstractText></Abstract></Article>'
        "</MedlineCitation></PubmedArticle>"
    )
    plain = f'<?xml version="1.0" encoding="UTF-8"?>\n<PubmedArticleSet>{article}</PubmedArticleSet>'
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;">]><PubmedArticleSet>&c;</PubmedArticleSet>'
    return [plain.encode(), bomb.encode()]


def _gzip_seeds() -> list[bytes]:
    return [gzip.compress(data, mtime=0) for data in _xml_seeds()]


@cache
def _checkpoint_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "c", {"a": torch.ones(3), "b": torch.arange(2)}, {"step": 3, "losses": [0.1]})
        return [(Path(folder) / "c").read_bytes()]


def _read_bin(folder: Path, data: bytes) -> None:
    _file(folder, "pytorch_model.bin", data)
    BinFolder(folder)


@cache
def _bin_seeds() -> list[bytes]:
    sink, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"a.weight": torch.ones(2, 3)}, sink)
    torch.save({"a.weight": torch.ones(2, 3)}, legacy, _use_new_zipfile_serialization=False)
    return [sink.getvalue(), legacy.getvalue()]


_SEEDS = _lines(
    {"instruction": "Do it.", "input": "x", "output": "y", "task": "k"}, {"instruction": "b", "output": "c"}
)
_ROWS = _lines({"instruction": "Do.", "input": "", "output": "y"}, {"prompt": "p", "response": "r"})
_TASK = {
    "name": "t", "instruction": "Answer.", "metric": "token_f1", "labels": ["yes", "no"],
    "shots": [{"input": "a", "output": "yes"}], "examples": [{"input": "b", "outputs": ["no", "nope"]}],
}  # fmt: skip

READERS = {
    reader.name: reader
    for reader in (
        Reader("safetensors", lambda: [save(_tensors())], _read_safetensors, "safetensors"),
        Reader("shard-index", _shard_index_seeds, _read_shard_index, "json"),
        Reader("config", lambda: [_dumps(CONFIG), _dumps(YARN), _dumps(MPT)], _read_config, "json"),
        Reader(
            "quantized-config",
            lambda: [_dumps(CONFIG | {"quantization_config": Quantization("int8").to_dict()})],
            _read_quantized_config,
            "json",
        ),
        Reader("quantized", lambda: [save(_quantized_tensors())], _read_quantized, "safetensors"),
        Reader("gguf", _gguf_seeds, _read_gguf),
        Reader("tokenizer", _tokenizer_seeds, _read_tokenizer, "json"),
        Reader("tokenizer-config", _tokenizer_config_seeds, _read_tokenizer_config, "json"),
        Reader("chat-template", _template_seeds, _read_template, "text"),
        Reader("adapter-config", lambda: [_adapter_files()[0]], _read_adapter_config, "json"),
        Reader("mixture-manifest", lambda: [_mixture_manifest()], _read_mixture_manifest, "json"),
        Reader("adapter-weights", lambda: [_adapter_files()[1]], _read_adapter_weights, "safetensors"),
        Reader("index-manifest", _index_seeds("manifest.json"), _index_reader("manifest.json"), "json"),
        Reader("index-graph", _index_seeds("hnsw.bin"), _index_reader("hnsw.bin")),
        Reader("index-embeddings", _index_seeds("embeddings/000000.npy"), _index_reader("embeddings/000000.npy")),
        Reader(
            "index-words",
            _index_seeds("bm25/indices.csc.index.npy"),
            _index_reader("bm25/indices.csc.index.npy"),
        ),
        Reader("ledger", _ledger_seeds, _read_ledger),
        Reader("seeds", lambda: [_SEEDS], _read_seeds, "jsonl"),
        Reader("rows", lambda: [_ROWS], _read_rows, "jsonl"),
        Reader("prompts", lambda: [_lines({"prompt": "p"}, {"prompt_ids": [1, 2]})], _read_prompts, "jsonl"),
        Reader("task", lambda: [_dumps(_TASK)], _read_task, "json"),
        Reader("recipe", _recipe_seeds, _read_recipe, "text"),
        Reader(
            "corpus-jsonl",
            lambda: [_lines({"id": "1", "title": "t", "text": "x y"}, {"id": 2, "text": "z"})],
            _corpus_reader("c.jsonl"),
            "jsonl",
        ),
        Reader("corpus-markdown", lambda: ["# Title\n\nSome täxt.\n".encode()], _corpus_reader("c.md"), "text"),
        Reader("corpus-parquet", _parquet_seeds, _corpus_reader("c.parquet")),
        Reader("corpus-xml", _xml_seeds, _corpus_reader("c.xml"), "text"),
        Reader("corpus-xml-gz", _gzip_seeds, _corpus_reader("c.xml.gz"), "gzip"),
        Reader("checkpoint", _checkpoint_seeds, lambda folder, data: load_checkpoint(_file(folder, "c", data)),
               "safetensors"),
        Reader("bin", _bin_seeds, _read_bin),
    )
}  # fmt: skip


def repack(kind: str, data: bytes, change: Callable[[Any], Any]) -> bytes:
    """``data`` with its structured part (JSON value, one line's value, safetensors header, gzip content) passed
    through ``change``; as it was where it has none."""
    try:
        if kind == "gzip":
            return gzip.compress(change(gzip.decompress(data)), mtime=0)
        if kind == "safetensors":
            (size,) = struct.unpack_from("<Q", data)
            header = _dumps(change(json.loads(data[8 : 8 + size])))
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
        if kind == "json":
            return _dumps(change(json.loads(data)))
        if kind == "jsonl":
            return b"".join(
                _dumps(row) + b"\n" for row in list(change([json.loads(line) for line in data.splitlines()]))
            )
    except (ValueError, RecursionError, struct.error, OSError, EOFError, zlib.error, AttributeError, TypeError):
        pass
    return data
