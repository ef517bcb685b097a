"""Arguments of PyTorch's operations, from which their legal forms are made."""

from dataclasses import dataclass

import torch

EXAMPLES = 3


@dataclass(frozen=True)
class Batch:
    """A tensor with an example's own part along its first axis."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Fixed:
    """A tensor that all examples share, and that is no parameter."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Indices:
    """Integers, below 4, with an example's own along the first axis."""

    shape: tuple[int, ...]


X, CHANNELS = Batch((4, 6)), Batch((4, 5, 6))
SPATIAL = {n: Batch((4, 5, 6, 4)[: n + 1]) for n in (1, 2, 3)}
FACTORS = [X, Parameter((6,)), Parameter((4, 1)), Fixed((6,))]


def conv(rank, transposed=False):
    shape = Parameter((4, 3, *(2,) * rank) if transposed else (6, 2, *(2,) * rank))
    inputs = Batch((4, *(6, 5, 4)[:rank]))
    name = f"conv_transpose{rank}d" if transposed else f"conv{rank}d"
    spatial = {"stride": [[2] * rank], "dilation": [[1] * rank, [2] * rank]}
    groups = {"groups": [1]} if transposed else {"groups": [2]}
    if transposed:
        bias = Parameter((3,))
        padding = {"padding": [[1] * rank], "output_padding": [[0] * rank, [1] * rank]}
    else:
        bias, padding = Parameter((6,)), {"padding": [[1] * rank, "valid", "same"]}
        spatial["stride"] = [[1] * rank, [2] * rank]
    options = {**spatial, **padding, **groups, "weight": [shape], "bias": [bias]}
    return name, {"input": [inputs], **options}


ALONG = """
    amax amin sum mean logsumexp prod std var max min median sort cumsum cumprod cummax cummin
    logcumsumexp softmax log_softmax _safe_softmax glu
""".split()

# What arguments are, by operation; those left out are made of their types.
GIVEN = dict(
    [
        *(conv(rank) for rank in (1, 2, 3)),
        *(conv(rank, transposed=True) for rank in (1, 2, 3)),
        (
            "linear",
            {"input": [X, Batch((6,))], "weight": [Parameter((5, 6))], "bias": [Parameter((5,))]},
        ),
        ("mm", {"self": [Batch((6,))], "mat2": [Parameter((6, 5))]}),
        ("mv", {"self": [Batch((6,))], "vec": [Parameter((6,))]}),
        ("bmm", {"self": [X], "mat2": [Batch((6, 5))]}),
        (
            "addmm",
            {
                "self": [Parameter((5,)), Batch((5,))],
                "mat1": [Batch((6,))],
                "mat2": [Parameter((6, 5))],
            },
        ),
        (
            "addmv",
            {"self": [Parameter((1,)), Batch(())], "mat": [Batch((6,))], "vec": [Parameter((6,))]},
        ),
        (
            "baddbmm",
            {"self": [Batch((4, 5)), Parameter((4, 5))], "batch1": [X], "batch2": [Batch((6, 5))]},
        ),
        (
            "embedding",
            {
                "weight": [Parameter((4, 5))],
                "indices": [Indices((6,)), Indices(())],
                "padding_idx": [-1, 2],
            },
        ),
        (
            "embedding_bag",
            {
                "weight": [Parameter((4, 5))],
                "indices": [Indices(())],
                "offsets": [torch.arange],
                "mode": [0, 1],
                "padding_idx": [-1],
                "per_sample_weights": [None, Fixed((EXAMPLES,))],
                "include_last_offset": [False],
            },
        ),
        (
            "layer_norm",
            {
                "input": [X],
                "normalized_shape": [[6], [4, 6]],
                "weight": [Parameter((6,)), Parameter((4, 6))],
                "bias": [Parameter((6,)), Parameter((4, 6))],
            },
        ),
        (
            "native_layer_norm",
            {
                "input": [X],
                "normalized_shape": [[6]],
                "weight": [Parameter((6,))],
                "bias": [Parameter((6,))],
                "eps": [1e-5],
            },
        ),
        (
            "group_norm",
            {
                "input": [CHANNELS, Batch((4,))],
                "num_groups": [2],
                "weight": [Parameter((4,))],
                "bias": [Parameter((4,))],
            },
        ),
        (
            "batch_norm",
            {
                "input": [CHANNELS, Batch((4,))],
                "weight": [Parameter((4,))],
                "bias": [Parameter((4,))],
                "running_mean": [Fixed((4,))],
                "running_var": [Fixed((4,))],
                "momentum": [0.1],
                "eps": [1e-5],
                "cudnn_enabled": [True],
            },
        ),
        ("prelu", {"self": [X], "weight": [Parameter((1,)), Parameter((4,))]}),
        (
            "expand",
            {
                "self": [Parameter((4, 6)), Parameter((1, 1, 6)), Batch((4, 1))],
                "size": [[EXAMPLES, 4, 6]],
            },
        ),
        ("repeat", {"self": [Parameter((4, 6)), X], "repeats": [[EXAMPLES, 1, 2], [1, 2, 1]]}),
        ("lerp", {"self": [X], "end": FACTORS, "weight": [Batch((4, 6)), 0.3]}),
        ("where", {"condition": [torch.bool], "self": FACTORS, "other": FACTORS}),
        ("masked_fill", {"self": [X], "mask": [torch.bool], "value": [0.3, Parameter(())]}),
        ("select", {"self": [X], "dim": [1, -1], "index": [1, -1]}),
        (
            "slice",
            {
                "self": [X],
                "dim": [1, -1],
                "start": [None, 1, -3],
                "end": [None, 3, -1],
                "step": [1, 2],
            },
        ),
        ("unbind", {"self": [X], "dim": [1, -1]}),
        ("cat", {"tensors": [[X, X], [X, Parameter((4, 6))]], "dim": [1, -1]}),
        ("stack", {"tensors": [[X, X]], "dim": [0, 1, -1]}),
        ("permute", {"self": [X], "dims": [[0, 2, 1], [0, -1, 1]]}),
        ("transpose", {"self": [X], "dim0": [1], "dim1": [2, -1]}),
        *((name, {"self": [X], "diagonal": [0, 1]}) for name in ("tril", "triu")),
        *(
            (f"{name}split", {"self": [X], "split_size": [2, 3], "dim": [1, -1]})
            for name in ("", "unsafe_")
        ),
        *(
            (f"{name}split_with_sizes", {"self": [X], "split_sizes": [[1, 3]], "dim": [1]})
            for name in ("", "unsafe_")
        ),
        ("log1p", {"self": [X]}),
        (
            "grid_sampler_3d",
            {
                "input": [Batch((2, 3, 4, 5))],
                "grid": [Batch((2, 2, 3, 3))],
                "interpolation_mode": [0, 1],
                "padding_mode": [0, 1],
            },
        ),
        ("alias", {"self": [X]}),
        (
            "view",
            {"self": [X], "size": [[EXAMPLES, 24], [EXAMPLES, 2, 2, 6]], "dtype": [torch.float64]},
        ),
        ("unsqueeze", {"self": [X], "dim": [1, -1]}),
        ("squeeze", {"self": [Batch((1, 6))], "dim": [1, [1]]}),
        ("unfold", {"self": [X], "dimension": [1, -1], "size": [2], "step": [1, 2]}),
        ("gather", {"self": [X], "dim": [1], "index": [Indices((4, 6))]}),
        (
            "scatter",
            {"self": [X], "dim": [2], "index": [Indices((4, 6))], "src": [X], "value": [0.5]},
        ),
        ("index_select", {"self": [X], "dim": [1, -1], "index": [torch.int64]}),
        (
            "index",
            {"self": [X], "indices": [[None, torch.int64], [None, torch.int64, torch.int64]]},
        ),
        ("flip", {"self": [X], "dims": [[1], [1, -1]]}),
        ("roll", {"self": [X], "shifts": [[1], [1, 2]], "dims": [[1], [1, 2]]}),
        (
            "constant_pad_nd",
            {"self": [X], "pad": [[1, 2], [1, 0, 0, 2], [1, 0, 0, 2, 0, 0]], "value": [0.0, 0.5]},
        ),
        *(
            (f"reflection_pad{n}d", {"self": [SPATIAL[n]], "padding": [[1, 2] * n]})
            for n in (1, 2, 3)
        ),
        *(
            (f"replication_pad{n}d", {"self": [SPATIAL[n]], "padding": [[1, 2] * n]})
            for n in (1, 2, 3)
        ),
        *(
            (
                f"max_pool{n}d",
                {
                    "self": [SPATIAL[n]],
                    "kernel_size": [[2] * n],
                    "stride": [[], [1] * n],
                    "padding": [[0] * n, [1] * n],
                    "dilation": [[1] * n],
                },
            )
            for n in (1, 2, 3)
        ),
        *(
            (
                f"avg_pool{n}d",
                {
                    "self": [SPATIAL[n]],
                    "kernel_size": [[2] * n],
                    "stride": [[], [1] * n],
                    "padding": [[0] * n, [1] * n],
                },
            )
            for n in (2, 3)
        ),
        *(
            (f"adaptive_avg_pool{n}d", {"self": [SPATIAL[n]], "output_size": [[2] * n]})
            for n in (2, 3)
        ),
        *(
            (f"adaptive_max_pool{n}d", {"self": [SPATIAL[n]], "output_size": [[2] * n]})
            for n in (2, 3)
        ),
        *(
            (
                f"{kind}{n}d",
                {
                    "self": [SPATIAL[n]],
                    "input": [SPATIAL[n]],
                    "output_size": [[7] * n],
                    "scale_factors": [None],
                    **{f"scales{s}": [None] for s in ("", "_h", "_w", "_d")},
                },
            )
            for kind, n in (
                ("upsample_linear", 1),
                ("upsample_nearest", 1),
                ("upsample_nearest", 2),
                ("_upsample_nearest_exact", 2),
                ("upsample_bilinear", 2),
                ("upsample_bicubic", 2),
                ("upsample_nearest", 3),
                ("upsample_trilinear", 3),
            )
        ),
        ("pixel_shuffle", {"self": [CHANNELS], "upscale_factor": [2]}),
        ("pixel_unshuffle", {"self": [Batch((2, 4, 6))], "downscale_factor": [2]}),
        (
            "im2col",
            {
                "self": [CHANNELS],
                "kernel_size": [[2, 2]],
                "dilation": [[1, 1]],
                "padding": [[0, 0], [1, 1]],
                "stride": [[1, 1]],
            },
        ),
        (
            "col2im",
            {
                "self": [Batch((8, 12))],
                "output_size": [[4, 5]],
                "kernel_size": [[2, 2]],
                "dilation": [[1, 1]],
                "padding": [[0, 0]],
                "stride": [[1, 1]],
            },
        ),
        (
            "grid_sampler_2d",
            {
                "input": [CHANNELS],
                "grid": [Batch((3, 2, 2))],
                "interpolation_mode": [0, 1, 2],
                "padding_mode": [0, 1],
            },
        ),
        (
            "scaled_dot_product_attention",
            {
                "query": [CHANNELS],
                "key": [CHANNELS],
                "value": [CHANNELS],
                "attn_mask": [None, Fixed((5, 5)), Parameter((5, 5))],
                "dropout_p": [0.0],
                "scale": [None, 0.5],
            },
        ),
        (
            "nll_loss",
            {
                "self": [Batch((4,)), CHANNELS],
                "target": [Indices(()), Indices((5, 6))],
                "weight": [None, Fixed((4,))],
                "reduction": [0],
            },
        ),
        (
            "nll_loss2d",
            {
                "self": [CHANNELS],
                "target": [Indices((5, 6))],
                "weight": [None, Fixed((4,))],
                "reduction": [0],
            },
        ),
        *(
            (
                name,
                {
                    "self": [X],
                    "target": [X, Fixed((EXAMPLES, 4, 6))],
                    "reduction": [0],
                    "weight": [None, Fixed((6,))],
                    "pos_weight": [None, Fixed((6,))],
                },
            )
            for name in (
                "mse_loss",
                "smooth_l1_loss",
                "huber_loss",
                "soft_margin_loss",
                "binary_cross_entropy",
                "binary_cross_entropy_with_logits",
            )
        ),
        (
            "clamp",
            {"self": [X], "min": [None, 0.2, Parameter((6,))], "max": [None, 0.9, Parameter((6,))]},
        ),
        (
            "_to_copy",
            {
                "self": [X],
                "dtype": [torch.float32, torch.float64],
                "layout": [None],
                "device": [None],
                "pin_memory": [None],
            },
        ),
        ("norm", {"self": [X], "p": [2, 1, None], "dim": [[1], [1, 2]]}),
        ("linalg_vector_norm", {"self": [X], "ord": [2, 1], "dim": [[1], [-1], [1, 2]]}),
        *((name, {"self": [X], "k": [2], "dim": [1, -1]}) for name in ("topk", "kthvalue")),
        *(
            (name, {"self": [X], "dim": [1, -1, [1], [1, 2]], "correction": [None, 1, 0]})
            for name in ALONG
        ),
    ]
)
