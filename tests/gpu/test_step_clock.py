"""On a GPU a step's time is the device's, and nothing waits for it before it is read."""

from __future__ import annotations

import time

import pytest
import torch

from llmkd.distributed.clocks import WARM_UP, StepClock

pytestmark = pytest.mark.gpu


def test_events_time_the_work_and_not_what_stands_between() -> None:
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")
    gpu = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=gpu)

    def work() -> None:
        for _ in range(20):
            torch.mm(matrix, matrix)

    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    alone = time.perf_counter() - began

    clock = StepClock(gpu)
    began = time.perf_counter()
    for number in clock.timed(range(WARM_UP + 4)):
        work()
        clock.end()
        if number == 1:
            issued = time.perf_counter() - began
            torch.cuda.synchronize()
            time.sleep(3 * alone)  # a validation
    seconds, _ = clock.read()
    assert issued < alone  # two steps were issued, and neither was waited for
    assert seconds == pytest.approx((WARM_UP + 4) * alone, rel=0.2)
    cost = clock.cost()
    assert cost is not None and cost["steps"] == 4 and "cpu_seconds" not in cost
    assert cost["median_seconds"] == pytest.approx(alone, rel=0.2)
