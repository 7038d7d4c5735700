"""OpenVINO GenAI with continuous batching, on the GGUF file itself: its 4- and 8-bit weights stay as they are."""

# pyright: reportMissingImports=false

from __future__ import annotations

import time
from typing import Any

from protocol import serve, versions


class Peer:
    def __init__(self) -> None:
        self.pipeline: Any = None

    def load(self, gguf: str, threads: int | None, batch: int, kv_gib: int, **_: Any) -> dict[str, Any]:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = kv_gib
        scheduler.max_num_seqs = batch
        scheduler.enable_prefix_caching = False  # runs repeat the same prompts
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(gguf, scheduler, "CPU", properties)
        return {"versions": versions("openvino-genai", "openvino")}

    def run(self, prompts: list[list[int]], new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        import numpy
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.apply_chat_template = False
        if temperature > 0:
            config.do_sample = True
            config.temperature = temperature
            config.top_p = top_p
        inputs = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        began = time.perf_counter()
        results = self.pipeline.generate(inputs, [config] * len(inputs))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "token_ids": [list(result.m_generation_ids[0]) for result in results]}


if __name__ == "__main__":
    peer = Peer()
    serve(load=peer.load, run=peer.run)
