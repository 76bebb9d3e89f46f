"""The optimizer follows: groups, order, options, state of old entries; what cannot follow is refused."""

import inspect

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentTypeError, SurgeryError
from growconv.network.find import find_sites
from growconv.network.optimizer import add_parameters, replace_parameters
from tests.network import zoo

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


def trained(optimizer_name: str) -> tuple:
    model, example = zoo.build("residual")
    groups = [
        {"params": [model.a1.weight, model.head.bias], "lr": 0.3, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p is not model.a1.weight and p is not model.head.bias]},
    ]
    optimizer = OPTIMIZERS[optimizer_name](groups)
    for _ in range(3):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
    return model, example, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_and_groups_follow(name: str) -> None:
    model, example, optimizer = trained(name)
    order = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    position = {key: (g, i) for g, ids in enumerate(order) for i, key in enumerate(ids)}
    old = {path: position[id(p)] for path, p in model.named_parameters()}
    states = {
        path: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for path, p in model.named_parameters()
    }
    site = find_sites(model, example)[1]
    growconv.grow(model, site, zoo.random_growth(site, 3), 0.0, optimizer)
    for path, parameter in model.named_parameters():
        group, index = old[path]
        assert optimizer.param_groups[group]["params"][index] is parameter
        for key, before in states[path].items():
            after = optimizer.state[parameter][key]
            if not isinstance(before, torch.Tensor) or before.numel() == 1:
                assert after == before
                continue
            kept = after[tuple(slice(0, size) for size in before.shape)]
            assert torch.equal(kept, before)
            assert after.count_nonzero() == before.count_nonzero()  # new entries start at zero
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    optimizer.zero_grad()
    model(example).square().mean().backward()
    optimizer.step()


def test_old_entries_train_as_if_nothing_had_happened() -> None:
    ours, example, optimizer = trained("adam")
    theirs, _, reference = trained("adam")
    sites = find_sites(ours, example)
    growth = zoo.random_growth(sites[1], 2)
    growconv.grow(ours, sites[1], growth, 0.0, optimizer)
    for model, step in ((ours, optimizer), (theirs, reference)):
        model.eval()
        step.zero_grad()
        model(example).square().mean().backward()
        step.step()
    torch.testing.assert_close(ours.a1.weight[:4], theirs.a1.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.a2.weight[:, :4], theirs.a2.weight, rtol=1e-12, atol=1e-14)


def test_an_optimizer_that_was_left_out_trains_nothing_and_is_refused_when_it_is_passed_later() -> None:
    model, example, first = trained("sgd")
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    site = find_sites(model, example)[1]
    growconv.grow(model, site, zoo.random_growth(site, 1), 0.0, first)
    values = [parameter.detach().clone() for parameter in model.parameters()]
    second.zero_grad()
    model(example).sum().backward()
    stale = [p for p in second.param_groups[0]["params"] if all(p is not q for q in model.parameters())]
    assert stale
    assert all(p.grad is None for p in stale)
    second.step()
    for parameter, before in zip(model.parameters(), values, strict=True):
        assert any(parameter is p for p in second.param_groups[0]["params"]) or torch.equal(parameter, before)
    with pytest.raises(SurgeryError, match="does not own"):
        growconv.grow(model, site, zoo.random_growth(site, 1), 0.0, second)


def test_two_optimizers_that_share_parameters_both_follow() -> None:
    model, example, first = trained("sgd")
    second = torch.optim.Adam(model.parameters(), lr=0.1)
    site = find_sites(model, example)[1]
    growconv.grow(model, site, zoo.random_growth(site, 1), 0.0, [first, second])
    model(example).sum().backward()
    first.step()
    second.step()


def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, parameters: list) -> bool:
    same = all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    return (
        same
        and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        and all(p in set(parameters) or p.dim() == 0 for p in owned)
    )


def test_an_optimizer_that_does_not_own_the_parameters_is_refused() -> None:
    model, example, _ = trained("sgd")
    other = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    state, parameters = {k: v.clone() for k, v in model.state_dict().items()}, list(model.parameters())
    site = find_sites(model, example)[1]
    with pytest.raises(SurgeryError, match="does not own") as caught:
        growconv.grow(model, site, zoo.random_growth(site, 1), 1.0, other)
    assert "a1.weight" in str(caught.value)
    assert unchanged(model, other, state, parameters)


def test_state_that_cannot_be_enlarged_is_refused() -> None:
    model, example, _ = trained("sgd")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(example).square().mean()
        loss.backward()
        return loss

    site = find_sites(model, example)[-1]  # not the first parameter, which holds the history
    growconv.grow(model, site, zoo.random_growth(site, 1), 0.0, optimizer)  # before the first step there is none
    optimizer.step(closure)
    state, parameters = {k: v.clone() for k, v in model.state_dict().items()}, list(model.parameters())
    with pytest.raises(SurgeryError, match="state d of LBFGS cannot be enlarged"):
        growconv.grow(model, site, zoo.random_growth(site, 1), 1.0, optimizer)
    assert unchanged(model, optimizer, state, parameters)


class Factored(torch.optim.Optimizer):
    """Somebody's optimizer with a state of lower rank."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["row_mean"] = parameter.flatten(1).mean(1) if parameter.dim() > 1 else 0.0


class Unknown(Factored):
    """Somebody's optimizer with a tensor and a number."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].update(trace=torch.ones_like(parameter), count=3)


def test_unknown_state_that_cannot_be_enlarged_is_named() -> None:
    model, example = zoo.build("residual")
    optimizer = Factored(model.parameters())
    optimizer.step()
    state, parameters = {k: v.clone() for k, v in model.state_dict().items()}, list(model.parameters())
    site = find_sites(model, example)[1]
    with pytest.raises(SurgeryError, match="row_mean of Factored cannot be enlarged") as caught:
        growconv.grow(model, site, zoo.random_growth(site, 1), 1.0, optimizer)
    assert "a1.weight" in str(caught.value)
    assert unchanged(model, optimizer, state, parameters)


def test_unknown_optimizers_keep_numbers_and_get_zeros() -> None:
    model, example = zoo.build("residual")
    optimizer = Unknown(model.parameters())
    optimizer.step()
    site = find_sites(model, example)[1]
    growconv.grow(model, site, zoo.random_growth(site, 2), 1.0, optimizer)
    state = optimizer.state[model.a1.weight]
    assert state["count"] == 3
    assert bool((state["trace"][:4] == 1).all())
    assert bool((state["trace"][4:] == 0).all())
    assert set(state) == {"trace", "count"}


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        (lambda p: torch.optim.Rprop(p, lr=0.02), "step_size", 0.02),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), "sum", 0.5),
    ],
)
def test_state_that_does_not_begin_at_zero(build, name: str, value: float) -> None:
    model, example = zoo.build("residual")
    optimizer = build(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
    site = find_sites(model, example)[1]
    growconv.grow(model, site, zoo.random_growth(site, 2), 1.0, optimizer)
    torch.testing.assert_close(optimizer.state[model.a1.weight][name][4:], torch.full_like(model.a1.weight[4:], value))


def test_names_of_parameters_stay_beside_them() -> None:
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([("first", first), ("second", second)], lr=0.1)
    add_parameters([optimizer], first, [third])
    group = optimizer.param_groups[0]
    assert group["param_names"] == ["first", "second", "added.2"]
    replace_parameters([optimizer], [("first", first)], [nn.Parameter(torch.ones(3))])
    assert group["param_names"] == ["added.0", "second", "added.2"]
    assert [p.numel() for p in group["params"]] == [3, 2, 2]
    assert group["params"][1] is second
    optimizer.load_state_dict(optimizer.state_dict())


def test_new_parameters_need_an_owner_of_the_old_ones() -> None:
    parameter, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with pytest.raises(SurgeryError, match="no group to join"):
        add_parameters([optimizer], other, [nn.Parameter(torch.ones(2))], "layer")
    add_parameters([], other, [parameter])


def test_something_that_is_no_optimizer() -> None:
    model, example, _ = trained("sgd")
    site = find_sites(model, example)[0]
    grow = inspect.unwrap(growconv.grow)  # without the types that the tests check at run time
    with pytest.raises(ArgumentTypeError, match="no optimizer"):
        grow(model, site, zoo.random_growth(site, 1), 1.0, "adam")
