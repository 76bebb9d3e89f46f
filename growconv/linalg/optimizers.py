"""Torch's optimizers without the import of torch._dynamo."""

import inspect

import torch
from torch.optim import Optimizer


class _WithoutDynamo(Optimizer):
    """Torch's optimizers import torch._dynamo at their first call, to keep torch.compile out of their own code.

    That import takes as long as torch itself. A run compiles at most its model, so the bare methods serve it as well.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class SGD(_WithoutDynamo, torch.optim.SGD):
    """torch.optim.SGD without the import of torch._dynamo."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class AdamW(_WithoutDynamo, torch.optim.AdamW):
    """torch.optim.AdamW without the import of torch._dynamo."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Adam(_WithoutDynamo, torch.optim.Adam):
    """torch.optim.Adam without the import of torch._dynamo."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
