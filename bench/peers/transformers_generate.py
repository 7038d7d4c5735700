"""transformers' ``generate`` on one padded batch, as a process that takes one JSON command a line and answers with one.

Commands: {"load": {"path", "dtype", "device", "threads"}}, {"run": {"prompts", "new_tokens", "temperature", "top_p"}}
and {"greedy": {"prompts", "new_tokens"}}. Answers: {"version"}, {"seconds", "token_ids"}, or {"error"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Peer:
    def __init__(self) -> None:
        self.model: Any = None

    def load(self, path: str, dtype: str, device: str, threads: int | None) -> dict[str, Any]:
        import torch
        import transformers

        if threads:
            torch.set_num_threads(threads)
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        place = Path(path)
        where = {"gguf_file": place.name} if place.suffix == ".gguf" else {}
        folder = str(place.parent if where else place)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, **where)
        model.generation_config.eos_token_id = None  # the end token is ignored
        self.model = model.to(device).eval()
        return {"version": transformers.__version__}

    def run(self, prompts: list[list[int]], new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        import torch

        model = self.model
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # padded on the left
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None, **sampling,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "token_ids": out[:, width:].tolist()}

    def greedy(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """One prompt at a time, so that padding cannot matter."""
        return {"token_ids": [self.run([prompt], new_tokens, 0.0, 1.0)["token_ids"][0] for prompt in prompts]}


def main() -> None:
    peer = Peer()
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries' chatter must not mix with the answers
    for line in sys.stdin:
        [(name, arguments)] = json.loads(line).items()
        try:
            answer = {"load": peer.load, "run": peer.run, "greedy": peer.greedy}[name](**arguments)
        except Exception as error:  # noqa: BLE001  (told to the benchmark, whatever it is)
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
