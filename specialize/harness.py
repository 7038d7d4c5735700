"""lm-evaluation-harness drives our generator: ``python -m specialize.harness run --model specialize --tasks …``.

The harness asks for log-likelihoods and for greedy or sampled text; all of a task's requests go to the generator at
once, which batches them itself. Needs the extra ``lm-eval``; nothing else of the package imports this module.
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py), and lm_eval is an extra.
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    missing = "lm-evaluation-harness is not installed; pip install 'specialize[lm-eval]'"
    if __name__ == "__main__":
        print(f"specialize: {missing}", file=sys.stderr)
        raise SystemExit(2) from None
    raise InputError(missing) from None

_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("specialize")
class HarnessModel(TemplateLM):
    """The harness's model ``specialize``. ``pretrained`` is a model folder, a GGUF file or a name that ``specialize
    fetch`` brings, ``adapter`` an adapter folder; ``dtype``, ``device``, ``quantize`` and ``kv_dtype`` mean what they
    mean to ``specialize generate``. ``max_gen_toks`` holds where a task names no limit. Batches form by themselves: the
    harness's ``batch_size`` is taken and not needed.
    """

    def __init__(
        self,
        pretrained: str = "",
        adapter: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        quantize: str | None = None,
        kv_dtype: str = "auto",
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
        generator: Any = None,
        **unknown: Any,
    ):
        """``generator``: one that is loaded already, with ``adapter`` a name it knows, instead of ``pretrained``."""
        super().__init__()
        if unknown:
            allowed = "pretrained, adapter, dtype, device, quantize, kv_dtype, max_gen_toks"
            raise InputError(f"--model_args {', '.join(sorted(unknown))}: unknown; allowed: {allowed}")
        if generator is None:
            from .progress import Reporter
            from .standalone import existing_model, load_generator

            if not pretrained:
                raise InputError("--model_args: give pretrained=MODEL, a folder, a .gguf file or a fetch name")
            model = existing_model(pretrained, Reporter())
            generator, adapter = load_generator(
                model, adapter=adapter, dtype=dtype, device=device or "auto", quantize=quantize, kv_dtype=kv_dtype
            )
        if generator.tokenizer is None:
            raise InputError("the harness gives text, and this generator has no tokenizer")
        self.generator, self.adapter = generator, adapter
        self.tokenizer = generator.tokenizer
        self.max_length = generator.max_context - 1  # of what is read; one place is kept for what is drawn
        self.max_gen_toks = int(max_gen_toks)
        self._name = str(pretrained)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which even the first token is scored: BOS, else EOS."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{Path(self._name).name}-{self.tokenizer.fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special ones are added unless told otherwise or the text begins with BOS already."""
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        twice = add_special_tokens is None and len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_id
        return ids[1:] if twice else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, is it the greedy one); contexts lose their beginning where they
        do not fit."""
        pairs = []
        for _names, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: {self.max_length} fit at most"
                )
            pairs.append((context[-room:], continuation))
        scores = self.generator.score_greedy(pairs, adapter=self.adapter)
        found = [(float(sum(logprobs)), bool(greedy)) for logprobs, greedy in scores]
        for (names, _context, _continuation), answer in zip(requests, found, strict=True):
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts. Long ones go through in windows: each token is predicted once, the last window
        with as much before it as fits."""
        windows, owners = [], []
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = utils.make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """One continuation of each context, up to the first of the strings ``until``."""
        prompts, params = [], []
        for request in requests:
            context, wanted = request.args
            sampling = self._sampling(wanted)
            room = self.max_length + 1 - sampling.max_tokens
            if room < 1:
                raise InputError(
                    f"max_gen_toks {sampling.max_tokens}: prompt and text share {self.max_length + 1} tokens of context"
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(sampling)
        done = self.generator.generate(prompts, params, adapter=self.adapter)
        for request, completion in zip(requests, done, strict=True):
            if completion.error:
                raise RuntimeError(completion.error)
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return [completion.text for completion in done]

    def _sampling(self, wanted: dict[str, Any]) -> Any:
        """The engine's settings for the harness's. Without ``do_sample`` or a temperature decoding is greedy."""
        from .engine.sampler import SamplingParams

        options = {key: value for key, value in wanted.items() if value is not None}
        until = options.pop("until", [])
        limits = [options.pop(name) for name in _LIMITS if name in options]
        sample = options.pop("do_sample", options.get("temperature", 0.0) > 0)
        options.pop("use_cache", None)
        if unknown := sorted(set(options) - _SAMPLING):
            raise InputError(f"--gen_kwargs {', '.join(unknown)}: unknown; allowed: {', '.join(sorted(_SAMPLING))}")
        options["temperature"] = float(options.get("temperature", 1.0)) if sample else 0.0
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        return SamplingParams(max_tokens=int(limits[0]) if limits else self.max_gen_toks, stop=stop, **options)


def main() -> None:
    """The harness's own command line, which now knows the model ``specialize``."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        print(f"specialize: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
