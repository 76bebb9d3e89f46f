"""Blocks that are copied: weights, groups, and what stays the identity."""

import torch

from growconv.network.depth import insert_copy
from tests.network.test_depth import build


def test_a_copy_has_the_weights_and_the_groups_of_its_block() -> None:
    model, example = build()
    model.block.n.weight.requires_grad_(False)
    norms = [p for n, p in model.named_parameters() if ".n." in n or ".m." in n]
    others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
    optimizer = torch.optim.SGD([{"params": others}, {"params": norms[1:], "weight_decay": 0.0}], lr=0.1)
    insert_copy(model, "block", optimizer=optimizer)
    original, inserted = model.block.original, model.block.inserted
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), inserted.parameters(), strict=True))
    members = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert id(inserted.a.weight) in members[0]
    assert id(inserted.m.weight) in members[1]
    assert all(id(inserted.n.weight) not in each for each in members)
    model(example)


def test_the_copy_of_an_identity_is_zero_where_the_branch_ends() -> None:
    model, example = build()
    event = insert_copy(model, "block", example_input=example, identity=True)
    assert "with m at zero" in str(event.reason)
    assert model.block.inserted.m.weight.abs().max() == 0
    assert model.block.original.m.weight.abs().max() > 0
