"""Files made to blow up: each is refused, or read, within seconds of processor time and a set amount of memory."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import shutil
import socket
import struct
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save
from specialize.engine.chat_template import render_chat
from specialize.engine.convert import BinFolder, convert
from specialize.engine.generator import Generator
from specialize.engine.gguf import GGUFFile
from specialize.engine.tokenizer import Tokenizer, tokenizer_from_gguf
from specialize.engine.weights import SafetensorsFolder
from specialize.retrieval.corpus import read_corpus
from specialize.retrieval.index import Index
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from specialize.errors import InputError
from specialize.recipe import read_recipe

sys.path.insert(0, str(Path(__file__).parent))
from readers import CONFIG, MESSAGES, READERS, TEMPLATE, _index_folder, _Letters

MAX_SECONDS = 8.0  # of processor time, the slowest being a template that is stopped after five


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


@contextmanager
def bounded(max_bytes: int = 400 << 20):
    """What is read inside takes at most so much more memory than there was, and `MAX_SECONDS`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = _peak_bytes(), time.process_time()
    yield
    assert time.process_time() - started < MAX_SECONDS
    assert _peak_bytes() - before < max_bytes


def refused(call, match: str, max_bytes: int = 400 << 20) -> None:
    with bounded(max_bytes), pytest.raises(InputError, match=match or None) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) <= InputError.MAX_CHARACTERS


# --- archives and XML ------------------------------------------------------------------------------------------------

ARTICLE = "<PubmedArticle><MedlineCitation><PMID>1</PMID><Article><Abstract><AbstractText>"


@pytest.mark.parametrize("start", [ARTICLE, "<!-- ", ""], ids=["text", "comment", "space"])
def test_gzip_that_unpacks_to_gigabytes(start, tmp_path):
    member = gzip.compress(b" " * (4 << 20), mtime=0)
    head = gzip.compress(f"<PubmedArticleSet>{start}".encode(), mtime=0)
    file = tmp_path / "c.xml.gz"
    file.write_bytes(head + member * 1000)  # 4 GiB in 4 MB
    refused(lambda: list(read_corpus(file)), "an article of more than 64 MiB")


def test_xml_entities(tmp_path):
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    file = tmp_path / "c.xml"
    for declared in (
        f'[<!ENTITY l0 "ha">{laughs}]', '[<!ENTITY l9 SYSTEM "file:///etc/passwd">]',
        '[<!ENTITY % l9 SYSTEM "x"> %l9;]', f'[<!ENTITY l9 "{"a" * 100_000}">]',
    ):  # fmt: skip
        file.write_text(f"<!DOCTYPE x {declared}><PubmedArticleSet>{ARTICLE}{'&l9;' * 100}")
        refused(lambda: list(read_corpus(file)), "refused, it declares XML entities")


def test_xml_asks_no_server(tmp_path):
    """PubMed's files name a document type on the network; nothing is fetched."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        place = f"http://127.0.0.1:{server.getsockname()[1]}/x.dtd"
        ends = "</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle></PubmedArticleSet>"
        (tmp_path / "c.xml").write_text(f'<!DOCTYPE x SYSTEM "{place}"><PubmedArticleSet>{ARTICLE}text{ends}')
        assert [document.text for document in read_corpus(tmp_path / "c.xml")] == ["text"]
        with pytest.raises(TimeoutError):
            server.accept()


def test_xml_nested_without_end(tmp_path):
    (tmp_path / "c.xml").write_text("<a>" * 500_000)
    refused(lambda: list(read_corpus(tmp_path / "c.xml")), "more than 200 deep")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(file: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), file, compression="zstd", store_schema=False, **options)
    return file


def _zigzag(value: int) -> bytes:
    value, out = value << 1, bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_parquet_pages_that_declare_too_much(tmp_path):
    text = "a" * (3 << 20)
    file = _parquet(tmp_path / "c.parquet", {"id": ["1"], "text": [text]}, use_dictionary=False)
    assert [document.text for document in read_corpus(file)] == [text]
    data = file.read_bytes()
    (size,) = [
        found.group() for found in re.finditer(rb"(?s)\x15\x00\x15(.{4})", data)
        if 3 << 21 <= int.from_bytes(_plain(found[1]), "big") <= (3 << 21) + 100
    ]  # fmt: skip
    file.write_bytes(data.replace(size, b"\x15\x00\x15" + _zigzag((1 << 27) - 1)))
    refused(lambda: list(read_corpus(file)), "a page of 134 MB once unpacked; allowed are 128 MB")


def _plain(varint: bytes) -> bytes:
    return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(varint)).to_bytes(8, "big")


def test_parquet_values_that_repeat(tmp_path):
    """One long text that thousands of rows point at: 40 GB in some kB are read a few rows at a time."""
    count = 5000
    text = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["a" * (8 << 20)]))
    file = _parquet(tmp_path / "c.parquet", {"id": [str(i) for i in range(count)], "text": text})
    assert file.stat().st_size < 100_000
    with bounded(500 << 20):
        found = [len(document.text) for document in itertools.islice(read_corpus(file), 50)]
    assert found == [8 << 20] * 50


def test_parquet_columns_of_any_width(tmp_path):
    wide = pa.array([None] * 100, pa.binary(1 << 16))
    for column, kind in ((pa.array([["a"]] * 100), "list<"), (wide, r"fixed_size_binary\[65536\]")):
        file = _parquet(tmp_path / "c.parquet", {"id": ["1"] * 100, "text": column})
        refused(lambda file=file: list(read_corpus(file)), f'column "text" holds {kind}')


# --- YAML and JSON ---------------------------------------------------------------------------------------------------


def test_yaml(tmp_path):
    file = tmp_path / "r.yaml"
    laughs = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 10))
    for text, match in (
        (f"l0: &l0 ha\n{laughs}", "anchors"), ("a: &a [*a]", "anchors"),
        ("[" * 200_000, "deep"), ("{a: " * 50_000, "deep"),
        ("- " * 100_000, "deep"), ("? " * 100_000, "deep"), ("a:\n" + "x" * (1 << 18), "larger than 256 KiB"),
        ("!!python/object/apply:os.system ['true']", ""),
    ):  # fmt: skip
        file.write_text(text)
        refused(lambda: read_recipe(file), match)


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.kind in ("json", "jsonl")])
def test_json_nested_without_end(name, tmp_path):
    for number, data in enumerate((b"[" * 1_000_000, b'{"a":' * 1_000_000, b"9" * 1_000_000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        refused(lambda folder=folder, data=data: READERS[name].read(folder, data), "")


# --- weights ---------------------------------------------------------------------------------------------------------


def _safetensors(header: dict | bytes, content: bytes = bytes(64), size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def _entry(*offsets: int, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        _safetensors({"a": _entry(0, 16), "b": _entry(0, 16)}, bytes(16)),
        _safetensors({"a": _entry(0, 16), "b": _entry(8, 24)}, bytes(24)),
        _safetensors({"a": _entry(0, 1 << 62, shape=(1 << 60,))}),
        _safetensors({"a": _entry(0, 16, shape=(1 << 32, 1 << 32))}),
        _safetensors({"a": _entry(16, 0)}),
        _safetensors({"a": _entry(-16, 0)}),
        _safetensors({"a": _entry(1 << 63, (1 << 63) + 16)}),
        _safetensors({"a": _entry(0, 16)}, bytes(8)),
        _safetensors({"a": _entry(0, 16)}, size=1 << 63),
        _safetensors({"a": _entry(0, 16)}, size=99_000_000),
        _safetensors(b"[" * 1_000_000),
        _safetensors({f"t{i}": _entry(0, 0, shape=(0,)) for i in range(20_000)}, b""),
    ],
    ids=lambda data: str(len(data)),
)
def test_safetensors_headers(data, tmp_path):
    for name in ("safetensors", "quantized", "adapter-weights", "checkpoint"):
        folder = tmp_path / name
        folder.mkdir()
        refused(lambda name=name, folder=folder: READERS[name].read(folder, data), "")


def _gguf(num_tensors: int, num_values: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + rest


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        _gguf(1 << 60, 0, b""),
        _gguf(0, 1 << 60, b""),
        _gguf(0, 1, struct.pack("<Q", 1 << 62)),
        _gguf(0, 1, _string(b"k") + struct.pack("<IQ", 8, 1 << 63)),
        *(_gguf(0, 1, _string(b"k") + struct.pack("<IIQ", 9, kind, 1 << 62) + bytes(64)) for kind in (0, 8, 9, 10, 12)),
        _gguf(0, 1, _string(b"k") + struct.pack("<IIQ", 9, 9, 1) * 100),
        _gguf(1, 0, _string(b"t") + struct.pack("<I4QIQ", 4, *[1 << 40] * 4, 0, 0)),
        _gguf(1, 0, _string(b"t") + struct.pack("<IQIQ", 1, 1 << 61, 0, 0) + bytes(64)),
        _gguf(1, 0, _string(b"t") + struct.pack("<IQIQ", 1, 16, 0, 1 << 62) + bytes(64)),
        _gguf(1, 0, _string(b"t") + struct.pack("<I", 1 << 31)),
        _gguf(3, 0, b"".join(_string(n) + struct.pack("<IQIQ", 1, 16, 0, 0) for n in (b"a", b"b", b"c")) + bytes(64)),
    ],
)  # fmt: skip
def test_gguf_counts(data, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    refused(lambda: GGUFFile(tmp_path / "m.gguf"), r"m\.gguf")


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickled_checkpoints_name_the_conversion(suffix, tmp_path):
    file = tmp_path / f"pytorch_model{suffix}"
    torch.save({}, file)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for source in (tmp_path, file):
        refused(lambda source=source: Generator.from_pretrained(source), f"pickle.*specialize convert {tmp_path} NEW")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickled_checkpoints_are_converted(suffix, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(READERS["safetensors"].seeds()[0])
    (source / "config.json").write_text(json.dumps(CONFIG))
    tensors = dict(SafetensorsFolder(source).items())
    torch.save(tensors, source / f"pytorch_model{suffix}")
    (source / "model.safetensors").unlink()
    torch.save({"state": 1}, source / "optimizer.pt")
    written = SafetensorsFolder(convert(source, tmp_path / "target"))
    assert set(written) == set(tensors) and all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert not [f for f in (tmp_path / "target").iterdir() if f.suffix in (".bin", ".pt", ".pth")]


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    sink = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, sink)
    with zipfile.ZipFile(sink) as whole, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as bomb:
        for member in whole.infolist():
            data = whole.read(member)
            packed = member.filename.endswith("data.pkl")
            kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            bomb.writestr(member.filename, data + bytes(100 << 20) * packed, kind)
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 200_000
    refused(lambda: BinFolder(tmp_path), "is compressed, which torch never does", 50 << 20)


def test_tensors_that_repeat_what_is_stored(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "pytorch_model.bin")
    refused(lambda: BinFolder(tmp_path), "tensor a is larger than what is stored of it", 50 << 20)


# --- tokenizers and templates ----------------------------------------------------------------------------------------


def _folder(tmp_path: Path, **parts) -> Path:
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    for name, part in parts.items():
        setattr(backend, name, part)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    return tmp_path


TEN = [normalizers.Replace("a", "a" * 10)] * 12


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Sequence(TEN)},
        {"normalizer": normalizers.Sequence([normalizers.Replace(Regex(""), "aa")] * 12)},
        {"normalizer": normalizers.Sequence([normalizers.Sequence(TEN[:3]), normalizers.Sequence(TEN[:3])])},
        {"normalizer": normalizers.Sequence([normalizers.Replace("a", "ﷺ"), normalizers.NFKD()] * 6)},
        {"normalizer": normalizers.Sequence([normalizers.Prepend("a" * 1000)] * 3)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 40)},
        {"post_processor": processors.Sequence([processors.TemplateProcessing(single=["$A"] * 100)] * 5)},
        {"decoder": decoders.Sequence([decoders.Replace("a", "a" * 10)] * 12)},
    ],
    ids=["ten", "empty", "nested", "nfkd", "prepend", "bytes", "template", "decoder"],
)
def test_tokenizers_that_multiply_the_text(parts, tmp_path):
    folder = _folder(tmp_path, **parts)
    refused(lambda: Tokenizer.from_pretrained(folder), "times as long; allowed is 5000")


def test_a_tokenizer_that_uses_known_steps_is_taken(tmp_path):
    steps = [normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    folder = _folder(tmp_path, normalizer=normalizers.Sequence(steps), pre_tokenizer=pre_tokenizers.Metaspace())
    assert Tokenizer.from_pretrained(folder).encode("ab") == [0, 1]


def test_patterns_that_search_for_ever(tmp_path):
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in ("(a+)+b", "(?=(a+)+b)", "(a*)*b")]
    for number, split in enumerate(splits):
        (tmp_path / str(number)).mkdir()
        tokenizer = Tokenizer.from_pretrained(_folder(tmp_path / str(number), pre_tokenizer=split))
        for call in (tokenizer.encode, lambda text, t=tokenizer: t.encode_batch([text])):
            with bounded():
                try:
                    call("a" * 20_000)
                except InputError as error:
                    assert "cannot tokenize" in str(error)


def test_merges_without_end(tmp_path):
    """Many merges, and in a GGUF file tokens whose every cut is a merge."""
    vocab = {chr(0x100 + i): i for i in range(1000)}
    raw = json.loads(Backend(models.BPE(vocab=vocab, merges=[])).to_str())
    raw["model"]["merges"] = [["Ā", "ā"]] * 300_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    refused(lambda: Tokenizer.from_pretrained(tmp_path), "not a usable tokenizer", 600 << 20)
    tokens = ["<unk>", *("a" * n for n in range(1, 257))]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    with bounded():
        assert tokenizer_from_gguf(metadata, "m.gguf").encode("a" * 2000)
    metadata["tokenizer.ggml.tokens"] = ["<unk>", *(chr(97 + i) * n for i in range(20) for n in range(1, 1025))]
    refused(lambda: tokenizer_from_gguf(metadata, "m.gguf"), "merges without end", 200 << 20)
    metadata["tokenizer.ggml.tokens"] = [*tokens, "a" * 1025]
    refused(lambda: tokenizer_from_gguf(metadata, "m.gguf"), "no text of at most 1024 characters")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% set ns = namespace(a=[0]) %}{% for i in range(100) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set ns = namespace(a=[0]) %}{% for i in range(100) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
        "{% set ns = namespace(n=9) %}{% for i in range(1000) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
        "{% for a in 'x' * 9000 %}{% for b in 'x' * 9000 %}{% endfor %}{% endfor %}",
        "{% for i in range(199999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ ('x' * 9999) | replace('x', 'y' * 9999) }}",
        "{{ (['x' * 9999] * 9999) | join('y' * 9999) }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% set d = dict(a=messages) %}{% for i in range(99999) %}{{ d | tojson }}{{ d | tojson }}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('true') }}",
    ],
)  # fmt: skip
def test_templates_that_loop_or_grow(template):
    refused(lambda: render_chat(template, {}, MESSAGES, True, source="model"), "chat template", 300 << 20)


def test_templates_in_every_file_that_carries_one(tmp_path):
    bomb = "{% for i in range(1000000000) %}{% endfor %}"
    folder = _folder(tmp_path)
    for name, text in (
        ("tokenizer_config.json", json.dumps({"chat_template": bomb})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": bomb}]})),
        ("chat_template.jinja", bomb),
    ):
        (folder / name).write_text(text)
        tokenizer = Tokenizer.from_pretrained(folder)
        refused(lambda t=tokenizer: t.apply_chat_template(MESSAGES), "loops more than")
        (folder / name).write_text(json.dumps({"chat_template": TEMPLATE}) if name.endswith("json") else TEMPLATE)


# --- indexes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path):
    return shutil.copytree(_index_folder(), tmp_path / "index")


@pytest.mark.parametrize("name", ["../outside.jsonl", "/etc/passwd", "a/../../b"])
def test_an_index_names_no_files(name, index):
    """Its files have fixed names; a manifest that brings names of its own is no manifest."""
    manifest = index / "manifest.json"
    fields = json.loads(manifest.read_text())
    for key in ("passages", "embeddings", "hnsw", name):
        manifest.write_text(json.dumps({**fields, key: name}))
        refused(lambda: Index.load(index, _Letters()), "manifest.json is damaged")
    manifest.write_text(json.dumps({**fields, "embedder": name}))
    refused(lambda: Index.load(index, _Letters()), "was made with embedder")


@pytest.mark.parametrize("name", ["passages.jsonl", "hnsw.bin", "embeddings/000000.npy", "bm25/data.csc.index.npy"])
def test_links_in_an_index_give_nothing_away(name, index, tmp_path):
    """A link to another file is read as that part of the index, which it is not; nothing is written through it."""
    secret = tmp_path / "secret"
    secret.write_text("a secret of the user\n" * 20)
    (index / name).unlink()
    (index / name).symlink_to(secret)
    with pytest.raises(InputError) as error:
        Index.load(index, _Letters()).search(["a cat"], mode="exact")
    assert "secret of" not in str(error.value) and secret.read_text() == "a secret of the user\n" * 20


def test_counts_of_an_index(index):
    manifest = index / "manifest.json"
    fields = json.loads(manifest.read_text())
    for key in ("dim", "count", "M", "hnsw_bytes"):
        for value in (10**12, 2**39, -1, 10**30):
            manifest.write_text(json.dumps({**fields, key: value}))
            refused(lambda: Index.load(index, _Letters()), "")


def test_shards_stay_in_their_folder_through_links(tmp_path):
    """A name in an index of shards leaves no folder; a link that the user's cache made is followed, as any file is."""
    folder = tmp_path / "model"
    folder.mkdir()
    blob = tmp_path / "blob"
    blob.write_bytes(save({"a": torch.zeros(2)}))
    (folder / "model-1.safetensors").symlink_to(blob)
    index = folder / "model.safetensors.index.json"
    for name in (
        "../blob",
        "../blob.safetensors",
        str(blob),
        "a/../../blob.safetensors",
        "..\\x.safetensors",
        "\0.safetensors",
    ):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(lambda: SafetensorsFolder(folder), r"is no \*\.safetensors file name in this folder")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert set(SafetensorsFolder(folder)) == {"a"}
