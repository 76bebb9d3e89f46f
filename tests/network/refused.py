"""One layer whose outputs cannot grow, or only in a way of their own, each time for another reason."""

import torch
from torch import Tensor, nn


class Refused(nn.Module):
    """`a` and what comes between it and `b`.

    Args:
        how: what comes between.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(2 if how == "literal slice" else 4, 2, 1)
        self.norm = nn.LayerNorm([4, 5, 5]) if how == "layer norm of maps" else nn.Identity()
        self.rms = nn.RMSNorm(4) if how == "rms norm" else None
        self.recurrent = nn.LSTM(4, 4) if how == "recurrent" else None
        self.offset = torch.ones(4, 1, 1)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x), x)) if self.how != "output" else self.a(x)

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        """What the case is about."""
        how = self.how
        if how == "literal view":
            return y.view(-1, 4, 25).tanh().view(-1, 4, 5, 5)
        if how == "literal slice":
            return y[:, 1:3]
        if how == "softmax":
            return y.softmax(1)
        if how == "input":
            return y + torch.cat([x, x[:, :1]], 1)
        if how == "channel mean":
            return y - y.mean(1, keepdim=True)
        if how == "layer norm of maps":
            return self.norm(y)
        if how == "rms norm":
            return self.rms(y.transpose(1, 3)).transpose(1, 3)
        if how == "recurrent":
            return self.recurrent(y.flatten(2).permute(2, 0, 1))[0].permute(1, 2, 0).unflatten(2, (5, 5))
        if how == "gather":
            return y[:, torch.tensor([3, 2, 1, 0])]
        if how == "matrix":
            return torch.einsum("nchw,cd->ndhw", y, torch.eye(4))
        if how == "sort":
            return y.sort(1).values
        if how == "fixed tensor":
            return y + self.offset
        return y
