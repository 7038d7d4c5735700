"""llama.cpp by the low-level batch interface of llama-cpp-python: all sequences of a run decode in one batch."""

# pyright: reportMissingImports=false

from __future__ import annotations

import time
from typing import Any

from protocol import serve, versions

CHUNK = 512  # prompt tokens a call


class Peer:
    def __init__(self) -> None:
        self.context: Any = None
        self.batch: Any = None

    def load(
        self, gguf: str, threads: int | None, batch: int, max_context: int, device: str = "cpu", **_: Any
    ) -> dict[str, Any]:
        import llama_cpp

        llama_cpp.llama_backend_init()
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, None)
        model_params = llama_cpp.llama_model_default_params()
        if device == "cpu":
            model_params.n_gpu_layers = 0
        # Weights repacked for AMX: a segmentation fault at the first call (0.3.36, a Q4_1 file, Xeon with AMX).
        model_params.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(gguf.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"{gguf}: llama.cpp cannot load this file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * max_context
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = batch
        params.kv_unified = True
        if threads:
            params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context of this size")
        self.batch = llama_cpp.llama_batch_init(max(CHUNK, batch), 0, 1)
        return {"versions": versions("llama-cpp-python")}

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One call for (token, position, sequence, wants logits) rows."""
        import llama_cpp

        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _sampler(self, temperature: float, top_p: float, seed: int) -> Any:
        import llama_cpp

        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if temperature > 0:
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(top_p, 1))
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(temperature))
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
        else:
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain

    def run(self, prompts: list[list[int]], new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        import llama_cpp

        samplers = [self._sampler(temperature, top_p, seed) for seed in range(len(prompts))]
        sample = llama_cpp.llama_sampler_sample
        began = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens: list[list[int]] = [[] for _ in prompts]
        pending: list[tuple[int, int, int, bool]] = []

        def flush() -> None:
            self._decode(pending)
            for i, (_, _, sequence, wants) in enumerate(pending):
                if wants:
                    tokens[sequence].append(sample(samplers[sequence], self.context, i))
            pending.clear()

        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                pending.append((token, position, sequence, position == len(prompt) - 1))
                if len(pending) == CHUNK:
                    flush()
        if pending:
            flush()
        for step in range(new_tokens - 1):
            pending += [(tokens[s][-1], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)]
            flush()
        seconds = time.perf_counter() - began
        for sampler in samplers:
            llama_cpp.llama_sampler_free(sampler)
        return {"seconds": seconds, "token_ids": tokens}


if __name__ == "__main__":
    peer = Peer()
    serve(load=peer.load, run=peer.run)
