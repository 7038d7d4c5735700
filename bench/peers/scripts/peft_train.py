"""Peer of the tuning benchmark: transformers + PEFT on padded batches, one optimizer step per line of standard input.

Started by bench/train.py with settings as JSON; reads "FIRST LAST" and answers with seconds, loss and tokens as JSON.
Needs torch, transformers and peft in its Python, and nothing of ours.
"""

import json
import math
import sys
import time
from pathlib import Path

import peft
import torch
import transformers


def load(path: Path, dtype: torch.dtype):
    if path.suffix == ".gguf":
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def answer(**values):
    print(json.dumps(values), flush=True)


def main() -> None:
    settings = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings["dtype"]]
    device = settings["device"]
    model = peft.PeftModel.from_pretrained(
        load(Path(settings["model"]), dtype).to(device), settings["adapter"], is_trainable=True
    )
    model.train()
    rows = json.loads(Path(settings["rows"]).read_text())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=0.0)
    answer(torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__)
    for line in sys.stdin:
        first, last = map(int, line.split())
        batch = rows[first:last]
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
        loss = model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.float().square().sum()) for p in trained if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        answer(seconds=time.perf_counter() - start, loss=value, tokens=tokens, grad_norm=norm)


if __name__ == "__main__":
    main()
