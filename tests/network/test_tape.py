"""A tape leaves nothing behind."""

import copy

import pytest

from growconv.network.tape import Tape
from tests.network import hand

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def test_a_tape_leaves_no_hook_and_other_threads_alone() -> None:
    model, x, _ = hand.build("pair")
    before = copy.deepcopy(model.state_dict())
    with Tape(model) as tape:
        model(x)
    assert tape.steps
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()(x)
    assert before.keys() == model.state_dict().keys()
