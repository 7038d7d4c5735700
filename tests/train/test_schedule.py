import pytest
from specialize.train.schedule import SCHEDULES, learning_rate_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_rises_to_one_and_never_reaches_the_end(schedule, warmup):
    factors = [
        learning_rate_factor(s, num_steps=20, num_warmup_steps=warmup, schedule=schedule, min_factor=0.1)
        for s in range(20)
    ]
    assert factors[warmup] == pytest.approx(1.0) == max(factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert min(factors) > 0.1
    assert schedule == "constant" or factors[-1] < 0.25
