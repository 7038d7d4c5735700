from __future__ import annotations

import numpy as np
import pytest
from specialize.engine.sampler import SamplingParams, stream_key

from specialize.errors import InputError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", -1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("n", 0), ("stop", ("",)),
        ("seed", "1"), ("logprobs", -1), ("logprobs", 1000), ("max_tokens", True),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(field, value):
    with pytest.raises(InputError, match=f"sampling: {field} is "):
        SamplingParams(**{field: value})


def test_one_stop_string_needs_no_tuple():
    assert SamplingParams(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_stream_keys_are_int64_and_differ():
    keys = {stream_key(seed, request, index) for seed in range(20) for request in range(20) for index in range(5)}
    assert len(keys) == 2000
    assert np.array(list(keys), np.int64).min() < 0
    assert stream_key(-1, 2**70, 3) == stream_key(-1, 2**70, 3)
