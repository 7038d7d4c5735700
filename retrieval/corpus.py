"""Reads the corpus formats (JSONL, folders of text, Parquet, PubMed XML) as a stream of documents, and cuts documents
into passages of words with overlap. A malformed place is an InputError that names file and line."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from specialize.errors import InputError, parse_json

from .parquet_pages import largest_pages

DEFAULT_MAX_WORDS = 150  # about 230 WordPiece tokens of biomedical prose; MiniLM reads 256
DEFAULT_OVERLAP_WORDS = 30
MAX_RECORD_BYTES = 64 << 20  # one document; far above the longest article, and what a hostile file may make us hold
MAX_XML_DEPTH = 200
MAX_PAGE_BYTES = 128_000_000  # of a Parquet column, unpacked; DuckDB writes pages of 100 MB
MAX_BATCH_BYTES = 128 << 20  # of Parquet rows read at once: the fewer, the larger they may be


@dataclass(frozen=True)
class Document:
    """One text of the corpus. ``id`` is unique in it."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Passage:
    """A piece of a document that fits a prompt. ``id`` is the document's, with ``#n`` when it was cut."""

    id: str
    document_id: str
    title: str
    text: str

    @property
    def searchable(self) -> str:
        """Title and text as one string: what is embedded and what BM25 counts."""
        return f"{self.title}. {self.text}" if self.title else self.text


@dataclass(frozen=True)
class _Located:
    document: Document
    place: str  # "corpus.jsonl:17"
    revisions_allowed: bool = False


def read_corpus(path: str | Path) -> Iterator[Document]:
    """Documents of a corpus, one at a time, in a stable order.

    ``path`` is a ``.jsonl``, ``.parquet``, ``.xml`` or ``.xml.gz`` file, a ``.txt`` or ``.md`` file, or a folder of
    such files (read recursively, sorted by name). An id that occurs twice is an error, except among PubMed files,
    where the file with the later name holds the newer revision of a record and wins.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no corpus at {path}: give a .jsonl, .parquet, .xml(.gz) file or a folder of .txt/.md files")
    files = _files(path)
    seen: dict[str, str] = {}
    num_documents = 0
    for file in files:
        for located in _read_file(file, path if path.is_dir() else path.parent):
            document = located.document
            first = seen.get(document.id)
            if first is not None:
                if located.revisions_allowed:
                    continue
                raise InputError(f"{located.place}: id {document.id!r} occurs again (first at {first}); ids are unique")
            seen[document.id] = located.place
            num_documents += 1
            yield document
    if num_documents == 0:
        raise InputError(f"corpus {path} holds no documents with text")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if _kind(path) is None:
            raise InputError(f"{path}: unknown kind of corpus file; allowed are {', '.join(_READERS)}")
        return [path]
    found = sorted(
        file for file in path.rglob("*") if file.is_file() and _kind(file) is not None and not file.name.startswith(".")
    )
    if not found:
        raise InputError(f"folder {path} holds no corpus files; allowed are {', '.join(_READERS)}")
    xml = [file for file in found if _kind(file) in (".xml", ".xml.gz")]
    # PubMed numbers its files in time; from the last to the first, the newest revision of a record comes first.
    return [file for file in found if file not in set(xml)] + xml[::-1]


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    return next((suffix for suffix in _READERS if name.endswith(suffix)), None)


def _read_file(file: Path, root: Path) -> Iterator[_Located]:
    kind = _kind(file)
    assert kind is not None
    try:
        yield from _READERS[kind](file, root)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise InputError(f"{file}: damaged gzip file ({error})") from error
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error


def _read_jsonl(file: Path, root: Path) -> Iterator[_Located]:
    with file.open("rb") as lines:
        for number, raw in enumerate(iter(lambda: lines.readline(MAX_RECORD_BYTES + 1), b""), start=1):
            place = f"{file}:{number}"
            if len(raw) > MAX_RECORD_BYTES:
                raise InputError(f"{place}: a line of more than {MAX_RECORD_BYTES >> 20} MiB; cut the document")
            if not raw.strip():
                continue
            try:
                row = parse_json(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{place}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
            except ValueError as error:
                raise InputError(f"{place}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f'{place}: expected an object {{"id", "title", "text"}}, got {type(row).__name__}')
            yield _located(row, place)


def _located(row: dict[str, Any], place: str) -> _Located:
    missing = [key for key in ("id", "text") if row.get(key) is None]
    if missing:
        raise InputError(f'{place}: no "{missing[0]}"; a document has "id", "text" and maybe "title"')
    values: dict[str, str] = {}
    for key in ("id", "title", "text"):
        value = row.get(key)
        if key == "id" and type(value) is int:
            value = str(value)
        if value is None:
            value = ""
        if not isinstance(value, str):
            raise InputError(f'{place}: "{key}" must be a string, got {type(value).__name__}')
        values[key] = value.strip()
        if not values[key] and key != "title":
            raise InputError(f'{place}: "{key}" is empty')
    return _Located(Document(values["id"], values["title"], values["text"]), place)


def _read_text(file: Path, root: Path) -> Iterator[_Located]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start}); convert it or take it out of the folder") from error
    title = file.stem
    heading = re.match(r"\s*#\s+(.+)\n?", text)
    if file.suffix.lower() == ".md" and heading:
        title, text = heading.group(1).strip(), text[heading.end() :]
    if text.strip():  # an empty file in a folder of notes is no error
        yield _Located(Document(file.relative_to(root).as_posix(), title, text.strip()), str(file))


def _read_parquet(file: Path, root: Path) -> Iterator[_Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(
            file, thrift_string_size_limit=MAX_RECORD_BYTES, thrift_container_size_limit=10_000_000
        )
        names = table.schema_arrow.names
        missing = [name for name in ("id", "text") if name not in names]
        if missing:
            raise InputError(f'{file}: no column "{missing[0]}"; it has {", ".join(names)}')
        columns = [name for name in ("id", "title", "text") if name in names]
        for name in columns:
            _check_column(table.schema_arrow.field(name).type, name, file)
        pages = largest_pages(file, table.metadata, columns)
        if (largest := max(pages.values())) > MAX_PAGE_BYTES:
            raise InputError(
                f"{file}: a page of {largest / 1e6:.0f} MB once unpacked; allowed are {MAX_PAGE_BYTES / 1e6:.0f} MB: "
                "write the file anew with smaller pages"
            )
        num_rows = min(max(MAX_BATCH_BYTES // max(sum(pages.values()), 1), 1), 1024)
        row_number = 0
        for batch in table.iter_batches(batch_size=num_rows, columns=columns):
            for cells in zip(*batch.columns, strict=True):  # a row at a time: Python's strings come on top of Arrow's
                row_number += 1
                row = {name: cell.as_py() for name, cell in zip(batch.schema.names, cells, strict=True)}
                yield _located(row, f"{file}: row {row_number}")
    except InputError:
        raise
    except (pyarrow.ArrowException, ValueError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file}: damaged or not a Parquet file ({reason})") from error


def _check_column(kind: Any, name: str, file: Path) -> None:
    """Lists and values of a set width may be of any size in a small file; a document has neither."""
    from pyarrow import types

    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_primitive(plain) or types.is_null(plain) or str(plain) in _TEXTS):
        raise InputError(f'{file}: column "{name}" holds {kind!s:.80}; it must hold strings')


def _read_pubmed(file: Path, root: Path) -> Iterator[_Located]:
    """PubMed's citation XML as distributed by the NLM: one document per article with an abstract, id ``pmid-N``."""
    from xml.etree.ElementTree import Element, ParseError

    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    opener = gzip.open if file.name.lower().endswith(".gz") else open
    with opener(file, "rb") as handle:
        stream = _Bounded(cast(BinaryIO, handle), str(file))
        root_element: Element | None = None
        try:
            depth = 0
            for event, element in iterparse(cast(BinaryIO, stream), events=("start", "end")):
                if root_element is None:
                    root_element = element
                depth += 1 if event == "start" else -1
                if depth > MAX_XML_DEPTH:
                    raise InputError(f"{file}: elements within elements, more than {MAX_XML_DEPTH} deep")
                if event == "end" and element.tag in ("PubmedArticle", "PubmedBookArticle"):
                    document = _pubmed_document(element)
                    if document is not None:
                        yield _Located(document, f"{file}: {document.id}", revisions_allowed=True)
                    element.clear()  # what is parsed would otherwise stay in memory
                    stream.begin_record()
                elif event == "end" and depth == 1:
                    element.clear()
                    stream.begin_record()
                if event == "end" and depth == 1:
                    root_element.clear()  # type: ignore[union-attr]
        except (LookupError, UnicodeError) as error:
            raise InputError(f"{file}: its XML names an unknown encoding ({error})") from error
        except ParseError as error:
            raise InputError(f"{file}:{error.position[0]}: not well-formed XML ({error})") from error
        except DefusedXmlException as error:
            raise InputError(f"{file}: refused, it declares XML entities ({type(error).__name__})") from error
        except (EOFError, zlib.error) as error:
            raise InputError(f"{file}: damaged or cut-off gzip file ({error})") from error


class _Bounded:
    """A stream that refuses to give more than `MAX_RECORD_BYTES` for one record: what is kept while parsing is bounded
    by the record, however little the compressed file is."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name, self._given = stream, name, 0

    def begin_record(self) -> None:
        self._given = 0

    def read(self, size: int = -1) -> bytes:
        # expat before 2.6 scans a comment or value that is not at its end yet anew with each piece: few, large pieces.
        data = self._stream.read(max(size, 1 << 20))
        self._given += len(data)
        if self._given > MAX_RECORD_BYTES:
            raise InputError(f"{self._name}: an article of more than {MAX_RECORD_BYTES >> 20} MiB")
        return data

    def close(self) -> None:
        self._stream.close()


def _pubmed_document(article: Any) -> Document | None:
    pmid = article.findtext("./MedlineCitation/PMID") or article.findtext(".//PMID")
    parts = []
    for part in article.iterfind(".//Abstract/AbstractText"):
        text = _inner_text(part)
        label = part.get("Label")
        if text:
            parts.append(f"{label.capitalize()}: {text}" if label and label.upper() != "UNLABELLED" else text)
    if not pmid or not parts:
        return None
    title = article.find(".//ArticleTitle")
    return Document(f"pmid-{pmid.strip()}", _inner_text(title) if title is not None else "", " ".join(parts))


def _inner_text(element: Any) -> str:
    return " ".join("".join(element.itertext()).split())


_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_READERS = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".xml": _read_pubmed,
    ".xml.gz": _read_pubmed,
    ".txt": _read_text,
    ".md": _read_text,
}


def chunk(
    document: Document, max_words: int = DEFAULT_MAX_WORDS, overlap_words: int = DEFAULT_OVERLAP_WORDS
) -> list[Passage]:
    """Passages of at most ``max_words`` words; neighbours share ``overlap_words``. The text between words is kept."""
    if max_words < 1 or not 0 <= overlap_words < max_words:
        raise InputError(
            f"chunks of {max_words} words with {overlap_words} overlapping: words must be ≥ 1 and overlap below that"
        )
    spans = [match.span() for match in re.finditer(r"\S+", document.text)]
    if len(spans) <= max_words:
        return [Passage(document.id, document.id, document.title, document.text)] if spans else []
    passages = []
    start = 0
    while True:
        stop = min(start + max_words, len(spans))
        text = document.text[spans[start][0] : spans[stop - 1][1]]
        passages.append(Passage(f"{document.id}#{len(passages)}", document.id, document.title, text))
        if stop == len(spans):
            return passages
        start = stop - overlap_words
