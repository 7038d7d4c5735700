"""lm-evaluation-harness over our generator, against scoring and decoding one sequence at a time without a cache.

Needs the extra ``lm-eval``, which the test installation leaves out for its weight; without it these are skipped.
"""

# pyright: reportMissingImports=false
# lm_eval is an extra; the sibling folders join the package when it is installed (setup.py).
import json
from types import SimpleNamespace

import pytest
import torch
from specialize.engine.generator import Generator
from specialize.engine.naive import naive_generate, naive_logits
from specialize.engine.sampler import SamplingParams

from specialize.errors import InputError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'specialize[lm-eval]'")

from specialize.harness import HarnessModel


@pytest.fixture(scope="module")
def generator(tiny):
    return Generator.from_pretrained(tiny.inputs["model"], dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def model(generator):
    return HarnessModel(generator=generator)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def naive_score(generator, context, continuation):
    """(log-likelihood, greedy?) of ids after ids."""
    logprobs = naive_logits(generator.model, context + continuation).log_softmax(-1)[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return float(logprobs.gather(1, target[:, None]).sum()), bool((logprobs.argmax(-1) == target).all())


def test_loglikelihood(generator, model):
    encode = generator.tokenizer.encode
    contexts = ["The cat that we saw", "On day 3 the dog", "Say whether the animal sleeps.\nyes", "The owl "]
    endings = [" was asleep", " went to the barn and had a rest", " no", "flew"]
    pairs = list(zip(contexts, endings, strict=True))
    greedy = naive_generate(
        generator.model,
        encode(contexts[0]),
        SamplingParams(max_tokens=3, temperature=0.0),
        tokenizer=generator.tokenizer,
    )
    if encode(contexts[0] + greedy.text) == encode(contexts[0]) + list(greedy.token_ids):
        pairs.append((contexts[0], greedy.text))
    found = model.loglikelihood(requests(*pairs, ("", "The cat")), disable_tqdm=True)
    truths = []
    for context, ending in pairs:
        # A blank at the end of a context belongs to the continuation, as tokens begin with it.
        bare = context.rstrip()
        whole = encode(context + ending)
        truths.append(naive_score(generator, encode(bare), whole[len(encode(bare)) :]))
    truths.append(naive_score(generator, [0], encode("The cat")))  # <end> stands before a text without context
    assert [value for value, _ in found] == pytest.approx([value for value, _ in truths], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in truths]


def test_long_contexts_lose_their_beginning(generator, model):
    encode = generator.tokenizer.encode
    context, ending = "On day 3 the dog went to the cave. " * 60, " It ate 5 seeds."
    assert len(encode(context)) > generator.max_context
    whole, bare = encode(context + ending), encode(context.rstrip())
    continuation = whole[len(bare) :]
    kept = bare[-(generator.max_context - len(continuation)) :]
    [(value, _)] = model.loglikelihood(requests((context, ending)), disable_tqdm=True)
    assert len(kept) + len(continuation) == generator.max_context
    assert value == pytest.approx(naive_score(generator, kept, continuation)[0], abs=1e-2)
    with pytest.raises(InputError, match="cannot be scored"):
        model.loglikelihood(requests(("The", " cat" * 600)), disable_tqdm=True)


def test_rolling_windows_predict_each_token_once(generator, model):
    encode = generator.tokenizer.encode
    long = "The fox went to the wood and had a rest there for some hours. " * 80
    ids, window = encode(long), generator.max_context - 1
    assert len(ids) > 2 * window
    # Whole windows follow each other, each after the token before it; the last reaches back as far as it may.
    expected = naive_score(generator, [0], ids[:window])[0]
    at = window
    while at + window < len(ids):
        expected += naive_score(generator, ids[at - 1 : at], ids[at : at + window])[0]
        at += window
    rest = ids[at:]
    expected += naive_score(generator, ids[len(ids) - window - 1 : at], rest)[0]
    short = "The hen ate 3 seeds."
    found = model.loglikelihood_rolling(requests((long,), (short,)), disable_tqdm=True)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] == pytest.approx(naive_score(generator, [0], encode(short))[0], abs=1e-3)


def test_generate_until(generator, model):
    encode, end = generator.tokenizer.encode, SamplingParams(max_tokens=24, temperature=0.0)
    contexts = ["The cat", "On day 3 the", "Evening 1: the dog sat awake on the"]
    plain = [naive_generate(generator.model, encode(c), end, tokenizer=generator.tokenizer).text for c in contexts]
    stop = next(c for c in plain[0][3:] if c.isalnum())
    found = model.generate_until(
        requests(
            *((c, {"until": ["<end>"], "max_gen_toks": 24}) for c in contexts),
            (contexts[0], {"until": stop, "max_new_tokens": 24, "do_sample": False, "temperature": 0.9}),
        ),
        disable_tqdm=True,
    )
    assert found[:3] == plain
    assert found[3] == plain[0].partition(stop)[0]
    drawn = {"until": [], "max_gen_toks": 24, "do_sample": True, "temperature": 1.0, "seed": 5}
    twice = [model.generate_until(requests((contexts[0], drawn)), disable_tqdm=True) for _ in range(2)]
    assert twice[0] == twice[1] != [plain[0]]
    with pytest.raises(InputError, match="num_beams: unknown"):
        model.generate_until(requests(("The", {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(InputError, match="share 512 tokens"):
        model.generate_until(requests(("The", {"max_gen_toks": 512})), disable_tqdm=True)


def test_arguments(tiny):
    with pytest.raises(InputError, match="give pretrained=MODEL"):
        HarnessModel()
    with pytest.raises(InputError, match="colour: unknown; allowed: pretrained"):
        HarnessModel.create_from_arg_string("pretrained=x,colour=red")
    loaded = HarnessModel.create_from_arg_string(f"pretrained={tiny.inputs['model']},dtype=fp32", {"batch_size": 8})
    assert loaded.prefix_token_id == 0 and loaded.tokenizer_name.startswith("model-")
    assert loaded.tok_encode("The cat") == loaded.tokenizer.encode("The cat")


def test_the_harness_runs_a_task(generator, model, tmp_path):
    """A multiple-choice task through the whole harness: its accuracy is that of the naive scores."""
    pytest.importorskip("datasets")
    import lm_eval

    rows = [
        {"question": f"The {animal} was asleep in the", "choices": ["barn", "old road", "night"], "answer": n % 3}
        for n, animal in enumerate(("cat", "dog", "owl", "fox", "hen", "bat"))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "places",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    result = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, log_samples=False)
    encode = generator.tokenizer.encode
    right = 0
    for row in rows:
        context = encode(row["question"])
        scores = [
            naive_score(generator, context, encode(f"{row['question']} {c}")[len(context) :])[0] for c in row["choices"]
        ]
        right += scores.index(max(scores)) == row["answer"]
    assert result is not None and result["results"]["places"]["acc,none"] == pytest.approx(right / len(rows))
