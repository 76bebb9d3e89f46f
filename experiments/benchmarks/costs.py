"""What convolutions cost, counted by growconv.conv_cost; prints the table of docs/convolutions.md.

python -m experiments.benchmarks.costs
"""

from typing import Any

from torch import nn

import growconv
from experiments.benchmarks.table import markdown_table

SIZE = (32, 32)
COLUMNS = ("change", "M multiplications", "on padding", "M additions", "weights")


def layers() -> list[tuple[str, nn.Module]]:
    """The 64 → 128 convolution, one change at a time."""

    def conv(inside: int = 64, outside: int = 128, **settings: Any) -> nn.Module:
        options: dict[str, Any] = {"kernel_size": 3, "padding": 1, **settings}
        return nn.Conv2d(inside, outside, **options)

    def factorized(kind: Any, rank: Any, implementation: str) -> nn.Module:
        return kind(64, 128, 3, padding=1, rank=rank, implementation=implementation)

    cp, tucker = growconv.CPConv2d, growconv.TuckerConv2d
    return [
        ("64 → 128, 3×3, padding 1", conv()),
        ("128 → 128: twice the inputs", conv(128, 128)),
        ("128 → 256: twice both", conv(128, 256)),
        ("5×5, padding 2", conv(kernel_size=5, padding=2)),
        ("no padding", conv(padding=0)),
        ("stride 2", conv(stride=2)),
        ("dilation 2, padding 2", conv(dilation=2, padding=2)),
        ("4 groups", conv(groups=4)),
        ("CP rank 93, factorized", factorized(cp, 93, "factorized")),
        ("CP rank 93, mobilenet", factorized(cp, 93, "mobilenet")),
        ("CP rank 93, reconstructed", factorized(cp, 93, "reconstructed")),
        ("Tucker (32, 16), factorized", factorized(tucker, (32, 16), "factorized")),
        ("Tucker (32, 16), reconstructed", factorized(tucker, (32, 16), "reconstructed")),
    ]


def table() -> str:
    """The table as Markdown."""
    rows = []
    for name, layer in layers():
        cost = growconv.conv_cost(layer, SIZE)
        rows.append(
            [
                name,
                f"{cost.multiplications / 1e6:.2f}",
                f"{cost.padding_multiplications / cost.multiplications:.1%}",
                f"{cost.additions / 1e6:.2f}",
                str(sum(parameter.numel() for parameter in layer.parameters())),
            ]
        )
    return markdown_table(COLUMNS, rows)


if __name__ == "__main__":
    print(table())
