"""transformers + PEFT (on a GPU with Liger's kernels, if asked) on padded batches, one optimizer step a command."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from protocol import serve, versions


class Peer:
    def __init__(self) -> None:
        self.model: Any = None

    def load(
        self, rows: str, dtype: str, device: str, threads: int, learning_rate: float, model: str | None = None,
        adapter: str | None = None, config: dict[str, Any] | None = None, rank: int = 8, liger: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """``model`` with the ``adapter`` to start from, or random weights of ``config``, all linear layers adapted."""
        import peft
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        base: Any
        if config is not None:
            settings = transformers.AutoConfig.for_model(**config)
            with torch.device(device):
                base = transformers.AutoModelForCausalLM.from_config(settings, dtype=wanted)
        else:
            path = Path(str(model))
            where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
            folder = str(path.parent if where else path)
            base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, **where)
        if liger:
            self._use_liger(base)
        if adapter is not None:
            tuned = peft.PeftModel.from_pretrained(base.to(device), adapter, is_trainable=True)
        else:
            tuned = peft.get_peft_model(
                base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            )
        tuned.train()
        self.model, self.device = tuned, device
        self.rows = json.loads(Path(rows).read_text())
        self.trained = [p for p in tuned.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=0.0)
        return {"versions": versions("torch", "transformers", "peft", *(["liger-kernel"] if liger else []))}

    @staticmethod
    def _use_liger(model: Any) -> None:
        from liger_kernel.transformers import monkey_patch

        kind = model.config.model_type
        if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise RuntimeError(f"Liger has no kernels for models of type {kind}")
        monkey_patch._apply_liger_kernel_to_instance(model=model)

    def step(self, first: int, last: int) -> dict[str, Any]:
        """Trains on rows ``first:last``."""
        import torch

        batch, device = self.rows[first:last], self.device
        self._synchronize()
        start = time.perf_counter()
        longest = max(len(prompt) + len(response) for prompt, response in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), -100)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for i, (prompt, response) in enumerate(batch):
            length = len(prompt) + len(response)
            ids[i, :length] = torch.tensor(prompt + response)
            labels[i, len(prompt) : length] = torch.tensor(response)
            mask[i, :length] = 1
        tokens = int(mask.sum())
        loss = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.float().square().sum()) for p in self.trained if p.grad is not None))
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = float(loss.detach())
        self._synchronize()
        return {"seconds": time.perf_counter() - start, "loss": value, "tokens": tokens, "grad_norm": norm}

    def _synchronize(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


if __name__ == "__main__":
    peer = Peer()
    serve(load=peer.load, step=peer.step)
