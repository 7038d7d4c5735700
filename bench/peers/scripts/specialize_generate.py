"""Ours, as a process like the peers' own, in the Python that runs the benchmark."""

# pyright: reportMissingImports=false

from __future__ import annotations

import time
from typing import Any

from protocol import serve, versions


class Peer:
    def __init__(self) -> None:
        self.generator: Any = None

    def load(
        self, source: str, dtype: str, device: str, threads: int | None, batch: int, quantize: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        import torch
        from specialize.engine.generator import Generator
        from specialize.engine.scheduler import EngineConfig

        if threads:
            torch.set_num_threads(threads)
        extra: dict[str, Any] = {"quantize": quantize} if quantize else {}
        # Runs repeat the same prompts: with the prefix cache on, every run but the first would skip the prompts.
        config = EngineConfig(max_sequences=batch, prefix_cache=False)
        self.generator = Generator.from_pretrained(source, dtype=dtype, device=device, config=config, **extra)
        return {"versions": versions("specialize", "torch")}

    def run(self, prompts: list[list[int]], new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        from specialize.engine.sampler import SamplingParams

        params = SamplingParams(max_tokens=new_tokens, temperature=temperature, top_p=top_p, ignore_eos=True)
        began = time.perf_counter()
        completions = self.generator.generate(prompts, params)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "token_ids": [list(completion.token_ids) for completion in completions]}


if __name__ == "__main__":
    peer = Peer()
    serve(load=peer.load, run=peer.run)
