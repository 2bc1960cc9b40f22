import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.errors import InputError
from llmkd.losses.schedules import Shape, dynamic_temperature, learning_rate, scheduled

unhurried = settings(deadline=None)  # a busy machine is no failure
every_shape = pytest.mark.parametrize("shape", get_args(Shape))
decays = pytest.mark.parametrize("shape", ["cosine", "linear"])
runs = st.integers(1, 300).flatmap(lambda total: st.tuples(st.integers(0, total - 1), st.just(total)))


def rates(warmup, total, shape, peak=1.0, final=0.0, steps=None):
    return [
        learning_rate(step, peak=peak, final=final, warmup=warmup, total=total, shape=shape)
        for step in range(steps or total)
    ]


def test_values_worked_by_hand():
    assert rates(2, 6, "linear") == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0])
    assert rates(2, 6, "cosine") == pytest.approx([0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])
    assert rates(2, 6, "constant") == pytest.approx([0.5, 1, 1, 1, 1, 1])
    assert rates(0, 5, "linear", peak=2, final=1) == pytest.approx([2, 1.75, 1.5, 1.25, 1])


@every_shape
@unhurried
@given(runs, st.floats(1e-8, 1.0), st.floats(0, 1))
def test_any_run(shape, run, peak, share):
    """Starts above 0, climbs to the peak, then never climbs again and ends at final (at the peak in a run of one)."""
    warmup, total = run
    final = peak * share
    values = rates(warmup, total, shape, peak, final)
    top = max(warmup - 1, 0)
    assert 0 < values[0] and max(values) == pytest.approx(peak) == values[top]
    assert all(a < b for a, b in zip(values[:top], values[1 : top + 1], strict=True))
    assert all(a >= b * (1 - 1e-12) for a, b in zip(values[top:], values[top + 1 :], strict=False))
    if top < total - 1:
        assert values[-1] == (peak if shape == "constant" else pytest.approx(final, rel=1e-9, abs=1e-20))


@unhurried
@given(runs)
def test_cosine_starts_above_linear_and_ends_below(run):
    warmup, total = run
    top = max(warmup - 1, 0)
    cosine, linear = rates(warmup, total, "cosine")[top:], rates(warmup, total, "linear")[top:]
    for step, (high, low) in enumerate(zip(cosine, linear, strict=True)):
        if step > (len(cosine) - 1) / 2:
            high, low = low, high
        assert high >= low - 1e-12


@every_shape
def test_a_run_of_one_step_takes_it_at_the_peak(shape):
    assert rates(0, 1, shape, peak=0.3) == [0.3]


@every_shape
def test_warmup_of_one_step_is_the_peak_at_once(shape):
    assert rates(1, 4, shape)[0] == 1
    assert rates(1, 4, shape) == rates(0, 4, shape)


@decays
def test_warmup_that_leaves_one_step_ends_at_final(shape):
    assert rates(3, 4, shape, final=0.1) == pytest.approx([1 / 3, 2 / 3, 1, 0.1])


@decays
def test_final_is_met_exactly_and_kept_after_the_end(shape):
    assert rates(10, 100, shape, peak=1e-4, final=1e-5, steps=120)[99:] == [1e-5] * 21
    assert rates(10, 100, shape, steps=120)[99:] == [0] * 21


@decays
def test_final_equal_to_the_peak_is_constant(shape):
    assert rates(3, 20, shape, final=1.0) == rates(3, 20, "constant")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"warmup": 100}, "100 warm-up steps in 100 training steps: write a number from 0 to 99"),
        ({"warmup": 500}, "500 warm-up steps"),
        ({"warmup": -1}, "-1 warm-up steps"),
        ({"total": 0, "warmup": 0}, "0 training steps.*from 1 up"),
        ({"shape": "cosin"}, "'cosin' is not known: choose from cosine, linear, constant"),
        ({"peak": 0.0}, "peak learning rate 0.0"),
        ({"peak": float("nan")}, "peak learning rate nan"),
        ({"peak": float("inf")}, "peak learning rate inf"),
        ({"final": -1e-5}, "final learning rate -1e-05"),
        ({"final": 2e-4}, "final learning rate 0.0002: write a number from 0 to the peak, 0.0001"),
        ({"final": float("nan")}, "final learning rate nan"),
    ],
)
def test_mistakes_are_named_with_their_cure(changed, message):
    settings = {"peak": 1e-4, "final": 0.0, "warmup": 10, "total": 100, "shape": "cosine"}
    with pytest.raises(InputError, match=message):
        learning_rate(0, **{**settings, **changed})


# ---------------------------------------------------------------------------------------------------------------------
# Weights and temperatures


def values(shape, total=11, initial=3.0, final=1.0, until=1.0):
    return [scheduled(step, total, initial=initial, final=final, until=until, shape=shape) for step in range(total + 3)]


def test_scheduled_values_worked_by_hand():
    assert values("linear", 5, 4, 0) == pytest.approx([4, 3, 2, 1, 0, 0, 0, 0])
    assert values("linear", 8, 1, 4, until=0.5) == pytest.approx([1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4])
    assert values("cosine", 5, 1, 0)[:5] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]
    )
    assert values("constant", 3, 2, 9) == [2] * 6


@decays
@unhurried
@given(st.integers(1, 300), st.floats(0, 10), st.floats(0, 10), st.floats(0.01, 1))
def test_any_schedule_goes_one_way_from_its_start_to_its_end(shape, total, initial, final, until):
    found = values(shape, total, initial, final, until)
    assert found[0] == initial and found[-1] == final
    assert found[max(round(until * total) - 1, 1)] == final
    way = 1 if final >= initial else -1
    assert all((b - a) * way >= -1e-12 for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("until", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(until):
    with pytest.raises(InputError, match="above 0 and up to 1"):
        scheduled(1, 10, initial=1.0, final=0.0, until=until, shape="linear")


def dynamic(student_ce, teacher_ce, step=0, current=8.0, total=10, **bounds):
    settings = {"initial": 8.0, "minimum": 1.0, "maximum": 100.0, **bounds}
    return dynamic_temperature(current, step, total, student_ce=student_ce, teacher_ce=teacher_ce, **settings)


def test_dynamic_temperature_worked_by_hand():
    aim = lambda *given, **options: (dynamic(*given, **options) - 0.9 * 8.0) / 0.1  # noqa: E731
    assert aim(2.0, 2.0) == pytest.approx(8)  # no gap: the start
    assert aim(1.0, 3.0) == pytest.approx(8)  # a student better than its teacher
    assert aim(2.9, 2.0) == pytest.approx(8)  # less than one nat behind: a = -0.9/0.1 < 1
    assert aim(5.0, 1.0) == pytest.approx(8 * 4 / 3)  # d = -4: a = 4/3
    assert aim(2.5, 1.0) == pytest.approx(8 * 1.35)  # d = -1.5: a = 3, above 2
    assert aim(2.0, 1.0) == pytest.approx(8 * 1.35)  # d = -1: a has no bound
    assert aim(2.0, 2.0, step=5) == pytest.approx(4)  # half way: half of it
    assert aim(2.0, 2.0, step=10) == pytest.approx(1)  # the end: the minimum
    assert aim(5.0, 1.0, maximum=9.0) == pytest.approx(9)


@unhurried
@given(st.floats(0, 20), st.floats(0, 20), st.integers(0, 10), st.floats(4, 8))
def test_a_dynamic_temperature_stays_within_its_bounds(student_ce, teacher_ce, step, current):
    found = dynamic(student_ce, teacher_ce, step, current, minimum=4.0, maximum=8.0)
    assert 4 - 1e-9 <= found <= 8 + 1e-9 and abs(found - current) <= 0.4 + 1e-9
