"""A process that generates holds no more after hundreds of requests than after a few: no program, tensor or page each.

In processes of their own, since what libraries keep lives as long as the process.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

_RUN = """
import random, sys
import psutil, torch
from specialize.engine.adapter import save_part_matrices
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator
from specialize.engine.model import Model
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig

mode, folder = sys.argv[1:]
torch.set_num_threads(1)
config = ModelConfig("llama", 256, 64, 128, 2, 4, num_kv_heads=2, max_context=512)
model = Model.random(config, 0, dtype=torch.bfloat16, std=0.1)
parts = {}
for adapted in model.adaptable:
    for part in adapted.parts:
        parts[part.path] = torch.randn(8, adapted.linear.in_features), torch.randn(part.stop - part.start, 8)
save_part_matrices(folder, parts, rank=8, alpha=8, targets=["q", "k", "v", "o", "gate", "up", "down"])
# the cache's 4 MiB may fill, and nothing more
engine = EngineConfig(num_pages=1024, max_sequences=16, max_batch_tokens=1024, prefix_cache=mode == "prefix_cache")
generator = Generator(model, None, engine, {"expert": folder})
rng = random.Random(0)

def serve(count):
    prompts = [[rng.randrange(256) for _ in range(rng.randrange(2, 300))] for _ in range(count)]
    adapter = [rng.choice([None, "expert"]) if mode == "adapter" else None for _ in prompts]
    params = SamplingParams(max_tokens=3, temperature=0.7, ignore_eos=True)
    assert len(generator.generate(prompts, params, adapter=adapter)) == count
    return psutil.Process().memory_info().rss

few = [serve(100) for _ in range(3)]
print(serve(400) - few[-1])
"""


@pytest.mark.parametrize("mode", ["plain", "prefix_cache", "adapter"])
def test_resident_memory_does_not_grow_with_requests(mode, tmp_path):
    arguments = [sys.executable, "-c", _RUN, mode, str(tmp_path / "expert")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 << 20
