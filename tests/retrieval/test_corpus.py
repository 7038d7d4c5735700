"""Readers, their errors with file and line, and chunking."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from specialize.retrieval.corpus import Document, chunk, read_corpus

from specialize.errors import InputError

PUBMED = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2024//EN" "https://dtd.nlm.nih.gov/x.dtd">
<PubmedArticleSet>
<PubmedArticle><MedlineCitation><PMID Version="1">11</PMID><Article><ArticleTitle>Iron in <i>E. coli</i>.</ArticleTitle>
<Abstract><AbstractText Label="BACKGROUND">Iron &amp; zinc matter.</AbstractText>
<AbstractText Label="RESULTS">Both   <b>rose</b>.</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>
<PubmedArticle><MedlineCitation><PMID>12</PMID><Article><ArticleTitle>No abstract here</ArticleTitle></Article>
</MedlineCitation></PubmedArticle>
<PubmedArticle><MedlineCitation><PMID>13</PMID><Article><ArticleTitle>Plain</ArticleTitle>
<Abstract><AbstractText>One part only.</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>
</PubmedArticleSet>
"""


def test_jsonl(tmp_path):
    file = tmp_path / "c.jsonl"
    rows = [{"id": "a", "title": "T", "text": "one two"}, {"id": 7, "text": "drei é"}]
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(read_corpus(file)) == [Document("a", "T", "one two"), Document("7", "", "drei é")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"id": "b", "text": ', "not a JSON object"),
        (b"[1, 2]", "expected an object"),
        (b'{"id": "b"}', 'no "text"'),
        (b'{"text": "x"}', 'no "id"'),
        (b'{"id": "b", "text": "  "}', '"text" is empty'),
        (b'{"id": "b", "text": 5}', '"text" must be a string'),
        (b'{"id": ["b"], "text": "x"}', '"id" must be a string'),
        (b'{"id": "a", "text": "again"}', "occurs again"),
        (b'{"id": "b", "text": "\xff"}', "not UTF-8"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, says):
    file = tmp_path / "c.jsonl"
    file.write_bytes(b'{"id": "a", "text": "good"}\n' + line + b"\n")
    with pytest.raises(InputError, match=says) as caught:
        list(read_corpus(file))
    assert f"{file}:2" in str(caught.value) and "\n" not in str(caught.value)


def test_empty_missing_and_unknown(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "x.pdf").write_text("x")
    (tmp_path / "folder").mkdir()
    for path, says in [
        ("empty.jsonl", "no documents"),
        ("none.jsonl", "no corpus at"),
        ("x.pdf", "unknown kind"),
        ("folder", "no corpus files"),
    ]:
        with pytest.raises(InputError, match=says):
            list(read_corpus(tmp_path / path))


def test_folder_of_texts(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("# Heading\n\nfirst *text*")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "ignored.html").write_text("<p>")
    assert list(read_corpus(tmp_path)) == [
        Document("a.md", "Heading", "first *text*"),
        Document("b.txt", "b", "second"),
        Document("sub/c.txt", "c", "third"),
    ]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bad\.txt.*UTF-8"):
        list(read_corpus(tmp_path))


def test_parquet(tmp_path):
    file = tmp_path / "c.parquet"
    table = pyarrow.table({"text": ["one", "two"], "id": ["a", "b"], "title": ["T", None], "other": [1, 2]})
    pyarrow.parquet.write_table(table, file)
    assert list(read_corpus(file)) == [Document("a", "T", "one"), Document("b", "", "two")]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), file)
    with pytest.raises(InputError, match='no column "id"'):
        list(read_corpus(file))
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a", "b"], "text": ["one", None]}), file)
    with pytest.raises(InputError, match="row 2"):
        list(read_corpus(file))
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="damaged"):
        list(read_corpus(file))


def test_pubmed_xml(tmp_path):
    expected = [
        Document("pmid-11", "Iron in E. coli.", "Background: Iron & zinc matter. Results: Both rose."),
        Document("pmid-13", "Plain", "One part only."),
    ]
    (tmp_path / "p.xml").write_text(PUBMED)
    assert list(read_corpus(tmp_path / "p.xml")) == expected
    (tmp_path / "p.xml.gz").write_bytes(gzip.compress(PUBMED.encode()))
    assert list(read_corpus(tmp_path / "p.xml.gz")) == expected


def test_pubmed_newer_revision_wins(tmp_path):
    (tmp_path / "pubmed24n0001.xml").write_text(PUBMED)
    (tmp_path / "pubmed24n0002.xml").write_text(PUBMED.replace("One part only.", "Corrected."))
    texts = {document.id: document.text for document in read_corpus(tmp_path)}
    assert texts["pmid-13"] == "Corrected." and len(texts) == 2


def test_pubmed_damaged(tmp_path):
    file = tmp_path / "p.xml"
    file.write_text(PUBMED[:400])
    with pytest.raises(InputError, match=r"p\.xml:\d+: not well-formed"):
        list(read_corpus(file))
    file.write_text('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "cc">]><a>&b;</a>')
    with pytest.raises(InputError, match="entities"):
        list(read_corpus(file))
    zipped = tmp_path / "q.xml.gz"
    zipped.write_bytes(gzip.compress(PUBMED.encode())[:-200])
    with pytest.raises(InputError, match="gzip"):
        list(read_corpus(zipped))
    zipped.write_bytes(b"plain text")
    with pytest.raises(InputError, match="gzip"):
        list(read_corpus(zipped))


@given(
    st.lists(st.text("abc.", min_size=1, max_size=5), max_size=60),
    st.integers(1, 20),
    st.integers(0, 19),
)
def test_chunks_cover_the_text(tokens, max_words, overlap):
    overlap = min(overlap, max_words - 1)
    passages = chunk(Document("d", "t", " ".join(tokens)), max_words, overlap)
    rebuilt: list[str] = []
    for number, passage in enumerate(passages):
        words = passage.text.split()
        assert 1 <= len(words) <= max_words
        if number:
            assert words[:overlap] == rebuilt[len(rebuilt) - overlap :] or overlap == 0
            assert len(words) > overlap
        rebuilt += words[overlap if number else 0 :]
    assert rebuilt == tokens
    assert len({passage.id for passage in passages}) == len(passages)


def test_chunk_settings_are_checked():
    for max_words, overlap in [(0, 0), (5, 5), (5, -1)]:
        with pytest.raises(InputError, match="words"):
            chunk(Document("d", "", "x"), max_words, overlap)
