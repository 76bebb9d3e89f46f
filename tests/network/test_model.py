"""A model by its names, wrapped or not, and as it was after it has been looked at."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from growconv.errors import ArgumentTypeError
from growconv.network.find import find_sites
from tests.network import zoo
from tests.network.test_proof import reasons


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = module


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.torch.jit:FutureWarning")  # torch's own
def test_wrapped_models_are_refused_by_name() -> None:
    model, example = zoo.build("chain")
    compiled = torch.compile(model)
    for wrapped, says in (
        (compiled, "_orig_mod"),
        (nn.DataParallel(model), "model.module"),
        (Wrapper(model), "model.module"),
        (torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1))), "the module that was scripted"),
    ):
        with pytest.raises(ArgumentTypeError, match=r"(wrapped|scripted) model") as caught:
            find_sites(wrapped, example)
        assert says in str(caught.value)


@pytest.mark.parametrize("name", ["residual", "grouped", "channels_last"])
def test_finding_sites_changes_nothing(name: str) -> None:
    model, example = zoo.build(name)
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    state, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    find_sites(model, example)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_chance_of_numpy_and_python_is_the_same_in_every_run() -> None:
    class DropPath(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            if not self.training or np.random.rand() + random.random() > 1:  # noqa: NPY002
                y = y + torch.relu(self.b(y))
            return self.c(y)

    found = reasons(DropPath().double())
    assert [path for path, reason in found.items() if reason is None] == ["a", "b"]
