"""FLOPs are counted as torch's own counter counts them, also where they are counted once for many batches."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from growconv.statistics.flops import FlopMeter, count_once


@pytest.mark.parametrize("outer", [FlopMeter, lambda: FlopCounterMode(display=False)])
def test_work_that_is_known_counts_in_every_meter(outer):
    left, right, known, runs = torch.rand(3, 4), torch.rand(4, 5), {}, []

    def work():
        runs.append(left @ right)

    with outer() as all_of_it, FlopMeter() as own:
        for _ in range(3):
            count_once(known, 0, work)
        count_once(known, "another", work)
    total = 4 * 2 * 3 * 4 * 5
    assert own.flops == total == (all_of_it.flops if isinstance(all_of_it, FlopMeter) else all_of_it.get_total_flops())
    assert len(runs) == 4
    assert known == dict.fromkeys([0, "another"], total // 4)
    count_once(known, 0, work)  # nobody counts
    assert own.flops == total
    assert len(runs) == 5
