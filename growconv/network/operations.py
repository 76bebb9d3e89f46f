"""The kinds of aten operations that numbers are sent through (`network.trace`); what is in none of them blocks."""

import torch

STRUCTURAL = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "cat",
        "stack",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "squeeze",
        "unsqueeze",
        "expand",
        "repeat",
        "flip",
        "roll",
        "index_select",
        "clone",
        "detach",
        "alias",
        "lift_fresh",
        "_to_copy",
        "contiguous",
        "unfold",
        "as_strided",
        "native_channel_shuffle",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "diagonal",
        "movedim",
        "im2col",
        "select_scatter",
        "slice_scatter",
        "index",
        "gather",
        "take_along_dim",
        "rot90",
        "narrow",
        "unsafe_split",
        "unsafe_chunk",
        "split_copy",
        "view_copy",
        "permute_copy",
        "narrow_copy",
        "constant_pad_nd",
    ]
)
"""Entries move and nothing is computed: these are run on the numbers themselves."""

RESIZING = frozenset(
    [
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "mkldnn_max_pool2d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
        "max_unpool2d",
        "max_unpool3d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_trilinear3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "grid_sampler_2d",
        "grid_sampler_3d",
        "reflection_pad1d",
        "reflection_pad2d",
        "reflection_pad3d",
        "replication_pad1d",
        "replication_pad2d",
        "replication_pad3d",
    ]
)
"""Every location of the result reads many locations of the same entry of the leading axes."""

REDUCING = dict.fromkeys(
    [
        "mean",
        "sum",
        "amax",
        "amin",
        "max",
        "min",
        "prod",
        "all",
        "any",
        "argmax",
        "argmin",
        "_softmax",
        "_log_softmax",
        "softmax",
        "log_softmax",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "logsumexp",
        "cumsum",
        "cumprod",
        "median",
        "mode",
        "sort",
        "topk",
        "count_nonzero",
        "nanmean",
        "nansum",
    ],
    1,
) | {"linalg_vector_norm": 2, "norm": 2}
"""Entries along some axes are computed together; the number is the position of the argument that names the axes."""

REPEATABLE = frozenset(
    ["mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "median", "native_layer_norm"]
)
"""Of those, the ones whose result stays as it is when every entry comes twice."""

POINTWISE = frozenset(
    [
        "native_dropout",
        "dropout",
        "bernoulli",
        "lerp",
        "where",
        "masked_fill",
        "clamp",
        "hardtanh",
        "leaky_relu",
        "elu",
        "relu",
        "relu6",
        "hardswish",
        "hardsigmoid",
        "mish",
        "silu",
        "gelu",
        "softplus",
        "threshold",
        "celu",
        "rrelu_with_noise",
        "rrelu_with_noise_functional",
        "selu",
        "prelu",
        "_prelu_kernel",
        "alpha_dropout",
        "feature_dropout",
    ]
)
"""Elementwise operations that do not carry torch's own tag for them in every version."""

NORMALIZING = frozenset(
    [
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "batch_norm",
        "cudnn_batch_norm",
        "_batch_norm_with_update",
        "_batch_norm_no_update",
        "miopen_batch_norm",
        "_batch_norm_impl_index",
    ]
)
"""One scale and shift for each entry of axis 1; the arguments after the first are per entry, or None."""

LAYER_NORMS = frozenset(["native_layer_norm", "layer_norm", "_fused_rms_norm"])
"""One scale and shift for each entry of the last axes, which are normalised together."""

CREATING = frozenset(
    [
        "empty",
        "zeros",
        "ones",
        "arange",
        "full",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand",
        "randn",
        "randint",
        "new_zeros",
        "new_empty",
        "new_full",
        "new_ones",
        "scalar_tensor",
        "linspace",
        "eye",
        "uniform_",
        "normal_",
        "zero_",
        "fill_",
        "bernoulli_",
        "randperm",
        "rand_like",
        "randn_like",
        "fill",
        "empty_strided",
        "new_empty_strided",
        "_local_scalar_dense",
        "is_same_size",
        "sym_size",
        "sym_stride",
        "_assert_async",
        "random_",
        "exponential_",
        "is_pinned",
        "isnan",
    ]
)
"""Results without channels."""

WRITING = frozenset(["copy_", "index_put_", "_index_put_impl_", "masked_scatter_", "index_copy_", "scatter_"])
"""Results of one tensor put into another, in place."""

PRODUCTS = frozenset(["mm", "bmm", "addmm", "baddbmm"])
"""Matrix products outside of layers."""


def pointwise(name: str) -> bool:
    """Whether an operation, by its name without the underscore of one in place, computes entry by entry."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if packet is not None else []
    return name in POINTWISE or any(torch.Tag.pointwise in getattr(packet, each).tags for each in overloads)
