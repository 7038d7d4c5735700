"""transformers: ``generate`` on one batch padded on the left, or its continuous batching (``generate_batch``)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from protocol import serve, versions

PAGE_TOKENS = 64  # of its KV cache on a CPU


class Peer:
    def __init__(self) -> None:
        self.model: Any = None
        self.continuous = False

    def load(
        self, model: str, dtype: str, device: str, threads: int | None, batch: int, max_context: int,
        continuous: bool = False, **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        import torch
        import transformers

        if threads:
            torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        path = Path(model)
        if path.suffix == ".gguf":
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=wanted
            )
        else:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=wanted)
        loaded.generation_config.eos_token_id = None  # the end token is ignored
        self.model = loaded.to(device).eval()
        self.continuous = continuous
        self.batch, self.max_context = batch, max_context
        return {"versions": versions("transformers", "torch")}

    def run(self, prompts: list[list[int]], new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        import torch

        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if self.continuous:  # makes its tensors in one thread and writes them in another: not in inference mode
            return self._run_continuous(prompts, new_tokens, sampling)
        with torch.inference_mode():
            return self._run_padded(prompts, new_tokens, sampling)

    def _run_padded(self, prompts: list[list[int]], new_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        import torch

        model = self.model
        began = time.perf_counter()
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None, **sampling,
        )  # fmt: skip
        token_ids = out[:, width:].tolist()
        return {"seconds": time.perf_counter() - began, "token_ids": token_ids}

    def _run_continuous(self, prompts: list[list[int]], new_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0, **sampling)
        sizes: dict[str, Any] = {}
        if self.model.device.type == "cpu":  # left to itself it takes nearly all the memory there is
            pages = self.batch * -(-self.max_context // PAGE_TOKENS)
            sizes = {"page_size": PAGE_TOKENS, "num_blocks": pages, "max_batch_tokens": 1024}
        began = time.perf_counter()
        results = self.model.generate_batch(
            inputs=prompts, generation_config=config, progress_bar=False,
            continuous_batching_config=ContinuousBatchingConfig(**sizes),
        )  # fmt: skip
        seconds = time.perf_counter() - began
        by_prompt = {tuple(result.prompt_ids): list(result.generated_tokens) for result in results.values()}
        if len(results) < len(prompts):
            raise RuntimeError(f"{len(prompts) - len(results)} of {len(prompts)} requests came back with nothing")
        return {"seconds": seconds, "token_ids": [by_prompt[tuple(prompt)] for prompt in prompts]}


if __name__ == "__main__":
    peer = Peer()
    serve(load=peer.load, run=peer.run)
