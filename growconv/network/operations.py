"""The kinds of aten operations that numbers are sent through (`network.trace`); what is in none of them blocks.

Operations that torch itself makes of simpler ones need no entry: numbers go through their steps.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch._decomp import decomposition_table
from torch._ops import OpOverload


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALIASES = _names("detach alias lift_fresh")
"""The result is the argument itself, on the same memory."""

VIEWS = _names("view _unsafe_view reshape _reshape_alias view_copy")
"""The same entries in another shape; that is the second argument."""

STRUCTURAL = ALIASES | VIEWS
STRUCTURAL |= _names(
    """
    permute transpose t slice select cat stack split split_with_sizes unbind squeeze unsqueeze expand repeat flip roll
    index_select clone _to_copy unfold as_strided native_channel_shuffle channel_shuffle pixel_shuffle pixel_unshuffle
    diagonal select_scatter slice_scatter index gather rot90 unsafe_split split_copy permute_copy narrow_copy
    constant_pad_nd
    """
)
"""Entries move and nothing is computed: these are run on the numbers themselves."""

_GRID_KINDS = _names(
    """
    max_pool mkldnn_max_pool fractional_max_pool max_unpool avg_pool adaptive_avg_pool _adaptive_avg_pool
    adaptive_max_pool upsample_nearest _upsample_nearest_exact reflection_pad replication_pad
    """
)
RESIZING = frozenset(f"{kind}{axes}d" for kind in _GRID_KINDS for axes in (1, 2, 3))
RESIZING |= _names(
    """
    max_pool2d_with_indices max_pool3d_with_indices upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d
    """
)
"""Every location of the result reads many locations of the same entry of the leading axes."""

CUTTING = _names("roi_align roi_pool")
"""The same of axis 1 alone: parts of any sample, as torchvision cuts them out for boxes."""

REPEATABLE = _names("mean amax amin max min var std var_mean std_mean median")
"""Reductions whose result stays as it is when every entry comes twice; see `is_repeatable`."""

ALONG_LAST = _names("sort topk mode")
"""Reductions that go along the last axis where none is named; the others go along all."""

_REDUCTIONS = _names(
    "sum prod all any argmax argmin _softmax _log_softmax logsumexp cumsum cumprod count_nonzero nansum"
)
REDUCING = dict.fromkeys(REPEATABLE | ALONG_LAST | _REDUCTIONS, 1) | {"linalg_vector_norm": 2, "norm": 2, "topk": 2}
"""Entries along some axes are computed together; the number is the position of the argument that names the axes."""

POINTWISE = _names(
    """
    native_dropout dropout bernoulli lerp where masked_fill clamp hardtanh leaky_relu elu relu relu6 hardswish
    hardsigmoid mish silu gelu softplus threshold celu rrelu_with_noise rrelu_with_noise_functional selu prelu
    _prelu_kernel alpha_dropout feature_dropout normal poisson _standard_gamma
    """
)
"""Elementwise operations that do not carry torch's own tag for them in every version."""

NORMALIZING = _names(
    """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
    _batch_norm_with_update _batch_norm_no_update batch_norm _batch_norm_impl_index
    """
)
"""One scale and shift for each entry of axis 1; the arguments after the first are per entry, or None."""

LAYER_NORMS = _names("native_layer_norm _fused_rms_norm")
"""One scale and shift for each entry of the last axes, which are normalised together."""

TOLD_ALL_SIZES = VIEWS | LAYER_NORMS | {"split_with_sizes", "expand"}
"""Operations that are told how many entries there are, not only where to part them."""

CREATING = _names(
    """
    empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_zeros new_empty new_full new_ones
    new_empty_strided uniform_ normal_ zero_ fill_ fill bernoulli_ random_ exponential_ isnan
    """
)
"""Results without channels, though made from or written to a tensor that has some."""

WRITING = _names("copy_ index_put_ _index_put_impl_ masked_scatter_ index_copy_ scatter_")
"""Results of one tensor put into another, in place."""

PRODUCTS = _names("mm bmm addmm baddbmm")
"""Matrix products outside of layers."""

_FOLLOWED = STRUCTURAL | RESIZING | CUTTING | REDUCING.keys() | NORMALIZING | LAYER_NORMS
_FOLLOWED |= CREATING | WRITING | PRODUCTS


@cache
def in_steps(func: OpOverload) -> Callable | None:
    """What computes the same in simpler operations, by torch's own table; None for what is in one of these kinds."""
    if name_of(func) in _FOLLOWED or is_pointwise(func):
        return None
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return func.decompose if composite else decomposition_table.get(func)


@cache
def name_of(func: OpOverload) -> str:
    """Name of an operation without namespace and overload: "relu_"."""
    return func.overloadpacket._qualified_op_name.split("::")[1]


@cache
def is_pointwise(func: OpOverload) -> bool:
    """Whether an operation, or the one that it does in place, computes entry by entry."""
    name = name_of(func).removesuffix("_")
    packet = getattr(torch.ops.aten, name, None)
    others = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return name in POINTWISE or any(torch.Tag.pointwise in each.tags for each in (func, *others))


def is_repeatable(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether a reduction gives the same when every entry comes twice: no sum, and no variance over n - 1."""
    name = name_of(func)
    if name not in REPEATABLE or not name.startswith(("var", "std")):
        return name in REPEATABLE
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | dict(kwargs)
    correction = given.get("correction", given.get("unbiased", True))
    return correction is not None and not correction
