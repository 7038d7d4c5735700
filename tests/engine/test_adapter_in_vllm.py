"""Our adapter folders in vLLM: it loads them, and greedy decoding gives the tokens that we give."""

import json
import os
import subprocess

import pytest
import torch
from specialize.bench.peers.install import environments_folder
from specialize.engine.convert import convert
from specialize.engine.generator import Generator
from specialize.engine.model import Model
from specialize.engine.sampler import SamplingParams
from specialize.train.lora import TrainableLora

# Runs in vLLM's own environment: `specialize bench peers` makes it.
SCRIPT = """
import json, sys

def main():
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    job = json.load(open(sys.argv[1]))
    engine = LLM(
        model=job["model"], dtype="float32", max_num_seqs=4, max_model_len=256, enable_lora=True, max_lora_rank=8,
        enforce_eager=True, disable_log_stats=True,
    )
    params = SamplingParams(max_tokens=job["tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    found = {}
    for name, adapter in (("base", None), ("adapter", LoRARequest("adapter", 1, job["adapter"]))):
        outputs = engine.generate(prompts, params, lora_request=adapter, use_tqdm=False)
        found[name] = [list(output.outputs[0].token_ids) for output in outputs]
    json.dump(found, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""
PROMPTS = [
    "The heart is a muscle that",
    "def shorten(path, width=40):",
    "List the exceptions that the text names:",
    "One, two,",
]
TOKENS = 16


@pytest.mark.slow
def test_vllm_gives_our_tokens_from_our_adapter(smollm2, tmp_path):
    python = environments_folder() / "vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("vLLM's environment is not there; `specialize bench peers` makes it")
    folder = convert(smollm2, tmp_path / "model", dtype=torch.float32)
    model = Model.from_pretrained(folder, dtype=torch.float32, device="cpu")
    lora = TrainableLora(model, rank=8, alpha=16, targets="all")
    torch.manual_seed(0)
    with torch.no_grad():
        for _, b in lora.part_matrices().values():
            b.normal_(std=0.05)
    lora.save(tmp_path / "adapter", base_model=str(folder))
    del model, lora

    generator = Generator.from_pretrained(folder, dtype="fp32", device="cpu", adapters={"a": tmp_path / "adapter"})
    prompts = [generator.tokenizer.encode(prompt) for prompt in PROMPTS]
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    ours = {
        name: [list(done.token_ids) for done in generator.generate(prompts, params, adapter=adapter)]
        for name, adapter in (("base", None), ("adapter", "a"))
    }
    assert all(plain != tuned for plain, tuned in zip(ours["base"], ours["adapter"], strict=True))

    (tmp_path / "script.py").write_text(SCRIPT)
    job = {"model": str(folder), "adapter": str(tmp_path / "adapter"), "prompts": prompts, "tokens": TOKENS}
    (tmp_path / "job.json").write_text(json.dumps(job))
    settings = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [str(python), str(tmp_path / "script.py"), str(tmp_path / "job.json"), str(tmp_path / "found.json")]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "found.json").read_text()) == ours
