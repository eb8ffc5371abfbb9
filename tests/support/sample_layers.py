"""Sample calls of every op that sums, looks up, or is a layer of its own."""

import torch
from calls import Call, call, fixed, ints, truth, x, x_for


def complex_numbers(*shape: int) -> torch.Tensor:
    return torch.complex(fixed(*shape), fixed(*shape)).requires_grad_()


_INF = float("inf")
_EQUAL = ("max", "min", "linalg_vector_norm")
_OF_ALL = ("max", "min", "prod", "var", "std", "median", "nanmedian")


def reduction() -> list[Call]:
    symbolic = {4: "s0", 5: "s1"}
    return [
        call("sum.dim_IntList", x(4, 5, 6), (1,)),
        call("sum.dim_IntList", x(4, 5, 6), (0, -1), True),
        call("sum.dim_IntList", x(4, 5, 6), (1, 2), symbolic=symbolic),
        call("sum.dim_IntList", truth(4, 5), (1,)),
        call("sum.default", x(4, 5)),
        call("sum.dim_IntList", x(), ()),
        call("max.dim", x(), 0),
        call("logsumexp.default", x(), (0,)),
        call("softmax.int", x(), 0),
        call("sum.dim_IntList", x(1, 5), (0,), True),
        call("nansum.default", x(4, 5, 6), (1,)),
        call("nansum.default", x(4, 5)),
        call("count_nonzero.default", truth(4, 5)),
        call("count_nonzero.default", truth(4, 5), 1),
        call("count_nonzero.dim_IntList", ints(4, 5, 6, low=0, high=3), (0, 2)),
        call("trace.default", x(4, 5)),
        call("aminmax.default", x_for(torch.aminmax, 4, 5, 6), dim=1),
        call("aminmax.default", x_for(torch.aminmax, 4, 5)),
        call("any.dims", truth(4, 5, 6), (0, 2)),
        call("all.dims", truth(4, 5, 6), (1,), True),
        call("median.dim", x(4, 5, 6), 1),
        call("nanmedian.dim", x(4, 5, 6), -1, True),
        call("norm.Scalar", x(4, 5)),
        call("var_mean.correction", x(4, 5, 6), (1,), correction=0),
        call("std_mean.correction", x(4, 5, 6), (0, -1), keepdim=True),
        call("_fft_r2c.default", x(4, 5, 8), (2,), 0, True),
        call("_fft_r2c.default", x(4, 5, 8), (1, 2), 1, False),
        call("_fft_c2c.default", complex_numbers(4, 5, 6), (1,), 0, True),
        call("_fft_c2r.default", complex_numbers(4, 5, 6), (0,), 2, 6),
        call("renorm.default", x(4, 5, 6), 2, 1, 0.5),
        call("cdist.default", x(3, 4, 6), x(3, 5, 6)),
        call("cdist.default", x(3, 4, 6), x(3, 5, 6), 1.0, 1),
        call("kthvalue.default", x(4, 5, 6), 2),
        call("mode.default", ints(4, 5, 6), 1),
        call("cummax.default", x(4, 5, 6), 1),
        call("cummin.default", x(4, 5, 6), -1),
        call("sort.stable", x(4, 5, 6), stable=True, dim=1),
        call("amax.default", ints(4, 5, 6), (1,)),
        call("amax.default", torch.ones(4, 5, 6).double().requires_grad_(), (1,)),
        call("argmax.default", ints(4, 7, high=3), 1),
        call("max.dim", ints(4, 5, 6), 0),
        call("amax.default", x(4, 5, 6), (1,)),
        call("amin.default", x(4, 5, 6), (0, 2), True),
        call("amax.default", x(4, 5)),
        call("argmax.default", x(4, 5, 6), 1),
        call("argmax.default", x(4, 5)),
        # The one dim of a vector, which no argument names.
        *(call(f"{name}.default", x(7)) for name in ("amax", "amin", "argmax", "argmin")),
        call("amax.default", x(7), (), True),
        # Integers that have no negatives, or whose least one is its own, and truth values.
        *(
            call(f"{name}.default", numbers, (1,) if name.startswith("am") else 1)
            for name in ("amax", "amin", "argmin")
            for numbers in (ints(3, 7, low=0, high=9).to(torch.uint8), ints(3, 7) - 2**63)
        ),
        call("amin.default", truth(3, 7), (1,)),
        call("min.dim", ints(3, 7, low=0).to(torch.uint8), 1),
        call("argmin.default", x(4, 5, 6), -1, True),
        call("logsumexp.default", x(4, 5, 6), (1,)),
        call("any.dim", truth(4, 5, 6), 1),
        call("all.dim", truth(4, 5, 6), 1, True),
        call("prod.dim_int", x(4, 5, 6), 1),
        call("var.correction", x(4, 5, 6), (1,), correction=0),
        call("var.dim", x(4, 5, 6), (-1,), True),
        call("std.correction", x(4, 5, 6), (1, 2), correction=1, keepdim=True),
        call("max.dim", x(4, 5, 6), 1),
        call("min.dim", x(4, 5, 6), -1, True),
        call("std.dim", x(4, 5, 6), (1,), False),
        *(call(f"{name}.default", x(4, 5)) for name in _OF_ALL),
        *(call(f"{name}.default", truth(4, 5)) for name in ("any", "all")),
        call("std.default", x(4, 5), False),
        call("amax.default", x(5, 6), (1,), symbolic={5: "s0"}),
        call("argmax.default", x(5, 6), 1, symbolic={5: "s0"}),
        call("argmin.default", x(5, 6), 0, symbolic={5: "s0"}),
        call("logsumexp.default", x(4, 5), (0, 1), True),
        call("log_softmax.int", x(5, 6), 0, symbolic={5: "s0"}),
        call("softmax.int", x(4, 5), 1, torch.float64),
        call("softmax.int", x(5, 6), -1, symbolic={5: "s0"}),
        call("cumsum.default", x(5, 6), 1, symbolic={5: "s0"}),
        call("linalg_vector_norm.default", x(4, 5, 6), 2, (1,), True),
        call("linalg_vector_norm.default", x(4, 5, 6)),
        call("norm.ScalarOpt_dim", x(4, 5, 6), 2, (-1,)),
        *(
            call(f"{name}.default", x(5, 4, 6), symbolic={5: "s0"})
            for name in ("max", "min", "prod", "var", "std")
        ),
        *(call(f"{name}.default", torch.ones(4, 5).double().requires_grad_()) for name in _EQUAL),
        *(call(f"{name}.default", ints(4, 5)) for name in ("max", "min", "prod")),
        call("min.default", ints(4, 5).to(torch.uint8)),
        call("amin.default", ints(4, 5).to(torch.uint8), (1,)),
        *(call(f"{name}.default", truth(5, 4), symbolic={5: "s0"}) for name in ("any", "all")),
        call("prod.dim_int", fixed(5, 4).requires_grad_(), 0, True, symbolic={5: "s0"}),
        call("prod.default", torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 5.0]]).double()),
        call("logsumexp.default", x(4, 5, 6), (0, 2)),
        call("amin.default", x(5, 4, 6), (0, 1), symbolic={5: "s0"}),
        call("std.correction", x(4, 5, 6), None, correction=0),
        call("var.correction", x(4, 5, 6), (-1, 0), keepdim=True),
        call("var_mean.correction", x(5, 4, 6), symbolic={5: "s0"}),
        call("std_mean.correction", x(4, 5, 6), (1,)),
        *(call("linalg_vector_norm.default", x(4, 5, 6), p, (0, 2)) for p in (1, 3.0, 0, _INF)),
        call("linalg_vector_norm.default", x(5, 6), symbolic={5: "s0"}),
        call("norm.ScalarOpt_dim", x(4, 5, 6), None, (0, 1), True),
        call("norm.Scalar", x(4, 5), 1),
        call("linalg_vector_norm.default", complex_numbers(4, 5), 2, (1,)),
        call("topk.default", x(4, 5, 6), 2),
        call("topk.default", x(4, 5, 6), 3, 1),
        call("sort.default", x(4, 5, 6)),
        call("sort.default", x(4, 5, 6), 0, True),
        call("cosine_similarity.default", x(4, 5, 6), x(5, 6), -1),
        call("cosine_similarity.default", x(4, 5, 6), x(4, 5, 6)),
        call("cumsum.default", x(4, 5, 6), 1),
        call("cumprod.default", x(4, 5, 6), 1),
        call("logcumsumexp.default", x(4, 5, 6), -1),
        call("softmax.int", x(4, 5, 6), -1),
        call("log_softmax.int", x(4, 5, 6), 1),
        call("_softmax.default", x(4, 5, 6), -2, False),
        call("_log_softmax.default", x(4, 5, 6), -2, False),
    ]


def normalization() -> list[Call]:
    train, evaluate = (True, 0.1, 1e-5, False), (False, 0.1, 1e-5, False)
    means, spreads = fixed(6), x(6, signs=False).detach()
    name = "_native_batch_norm_legit_functional.default"
    return [
        call("layer_norm.default", x(4, 5, 6), (6,), x(6), x(6)),
        call("layer_norm.default", x(4, 5, 6), (5, 6), x(5, 6)),
        call("layer_norm.default", x(4, 5, 6), (6,)),
        call("rms_norm.default", x(4, 5, 6), (6,), x(6), 1e-5),
        call("rms_norm.default", x(4, 5, 6), (6,)),
        call("layer_norm.default", x(5, 6), (6,), x(6), x(6), symbolic={5: "s0"}),
        call("group_norm.default", x(5, 12, 7), 4, x(12), x(12), symbolic={5: "s0"}),
        call("native_layer_norm.default", x(4, 5, 6), (6,), x(6), x(6), 1e-5),
        call("native_layer_norm.default", x(4, 5, 6), (5, 6), None, None, 1e-5),
        call("group_norm.default", x(5, 12, 7), 4, x(12), x(12)),
        call("group_norm.default", x(5, 10, 3, 7), 5),
        call("group_norm.default", x(5, 6), 1),
        call("batch_norm.default", x(5, 6, 7), x(6), x(6), None, None, *train),
        call("batch_norm.default", x(5, 6, 7), None, None, means, spreads, *train),
        call("batch_norm.default", x(5, 6), x(6), x(6), means, spreads, *evaluate),
        call("native_batch_norm.default", x(5, 6, 7), x(6), x(6), None, None, *train[:3]),
        call("native_batch_norm.default", x(5, 6), None, None, None, None, *train[:3]),
        call(name, x(5, 6, 7), x(6), x(6), means, spreads, *train[:3]),
        call(name, x(3, 6, 4, 2), None, None, means, spreads, *train[:3]),
        call(name, x(5, 6, 3), x(6), x(6), means, spreads, *train[:3], symbolic={5: "s0"}),
        call("group_norm.default", x(4, 10, 3), 2, x(10), x(10)),
        call("group_norm.default", x(5, 6, 2, 3), 1, x(6), x(6), symbolic={5: "s0"}),
        call("instance_norm.default", x(5, 6, 7), None, None, None, None, *train),
        call("instance_norm.default", x(2, 3, 5, 4), x(3), x(3), None, None, *train),
        call(
            "instance_norm.default", x(2, 3, 5), x(3), None, None, None, *train, symbolic={5: "s0"}
        ),
        call("instance_norm.default", x(5, 6, 7), x(6), x(6), None, None, *train),
        call("instance_norm.default", x(5, 6, 7), x(6), x(6), means, spreads, *evaluate),
    ]


def attention() -> list[Call]:
    name = "scaled_dot_product_attention.default"
    q, k, v = x(4, 6, 5, 8), x(4, 6, 7, 8), x(4, 6, 7, 9)
    grouped = (x(4, 12, 5, 8), x(4, 3, 7, 8), x(4, 3, 7, 8))
    return [
        call(name, q, k, v),
        call(name, q, k, v, fixed(5, 7)),
        call(name, q, k, v, truth(4, 1, 5, 7) | True),
        call(name, q, k, v, fixed(4, 6, 5, 7)),
        call(name, q, k, v, x(1, 6, 5, 7)),
        call(name, x(9, 4, 5, 8), x(9, 4, 7, 8), x(9, 4, 7, 8), x(1, 4, 5, 7)),
        call(name, q, k, v, x(4, 1, 5, 7), symbolic={4: "s0"}),
        call(name, q, k, v, None, 0.0, True),
        call(name, q, k, v, is_causal=True, scale=0.3),
        call(name, *grouped, enable_gqa=True),
        call(name, *grouped, truth(12, 1, 7) | True, enable_gqa=True),
        call(name, *grouped, enable_gqa=True, symbolic={12: "s0", 3: "s1"}),
        # With as many keys as queries all ranks have the same work under a causal mask.
        call(name, x(2, 4, 9, 3), x(2, 2, 9, 3), x(2, 2, 9, 3), None, 0.0, True, enable_gqa=True),
        call(name, x(6, 5, 8), x(6, 7, 8), x(6, 7, 8)),
        call(name, x(5, 7, 8, 6), x(5, 7, 8, 6), x(5, 7, 8, 6), symbolic={5: "s0", 8: "s1"}),
        call(name, x(4, 5, 8, 6), x(4, 5, 8, 6), x(4, 5, 8, 6), symbolic={4: "s0", 8: "s1"}),
    ]


def places(*shape: int, axis: int = 1) -> torch.Tensor:
    """Return an index in which no place occurs twice along a dim."""
    return fixed(*shape).argsort(axis)


def indexing() -> list[Call]:
    return [
        call("scatter.src", x(4, 7, 5), 1, places(4, 7, 5), x(4, 7, 5)),
        call("scatter.src", x(4, 7, 5), -1, places(4, 2, 5, axis=2), fixed(4, 6, 5)),
        call("scatter.value", x(4, 7, 5), 1, ints(4, 3, 5, high=7), 0.5),
        call("scatter.value", x(4, 7, 5), 1, ints(4, 3, 5, high=7), 0),
        call("scatter_add.default", x(4, 7, 5), 1, ints(4, 6, 5, high=7), x(4, 6, 5)),
        call("scatter_add.default", x(7), 0, ints(6, high=7), x(6)),
        call("scatter_add.default", x(4, 7, 5), 1, ints(4, 6, 3, high=7), fixed(4, 6, 5)),
        call("scatter_add.default", x(5, 7), 1, ints(5, 6, high=7), x(5, 6), symbolic={5: "s0"}),
        *(
            call("scatter_reduce.two", x(4, 7), 0, ints(6, 7, high=4), x(6, 7), way)
            for way in ("sum", "mean", "amax", "prod")
        ),
        call("index_add.default", x(4, 7, 5), 1, ints(6, high=7), x(4, 6, 5), alpha=2),
        call("index_copy.default", x(4, 7, 5), -2, torch.tensor([5, 1]), x(4, 2, 5)),
        call("index_fill.int_Scalar", x(4, 7, 5), 1, ints(6, high=7), 0.5),
        call("index_fill.int_Scalar", x(4, 7, 5), 1, ints(6, high=7), 0),
        call("index_fill.int_Tensor", x(4, 7, 5), 1, ints(6, high=7), x()),
        call("index_reduce.default", x(4, 7), 1, ints(6, high=7), x(4, 6), "mean"),
        call("index_put.default", x(7, 5, 6), (torch.tensor([3, 1]),), x(2, 5, 6)),
        call("index_put.default", x(4, 7, 5), (None, torch.tensor([3, 1])), x(2, 5)),
        call("index_put.default", x(4, 7, 5), (None, torch.tensor([3, 1])), x(4, 1, 1)),
        call("index_put.default", x(7, 8, 5), (ints(3, 1, high=7), ints(6, high=8)), x(), True),
        call(
            "index_put.default",
            x(4, 7, 5, 8),
            (ints(6, high=4), None, None, ints(6, high=8)),
            x(6, 7, 5),
            True,
        ),
        call("index_put.default", x(4, 7, 5), (None, truth(7)), x()),
        call("index_put.default", x(4, 7, 5), (truth(4, 7),), x(5)),
        call("_unsafe_index_put.default", x(7, 5), (torch.tensor([3, 1]),), x(2, 5)),
        call("bucketize.Tensor", x(4, 5), fixed(6).sort().values),
        call("isin.Tensor_Tensor", ints(4, 5), ints(3)),
        call("searchsorted.Tensor", fixed(4, 6).sort().values, x(4, 5)),
        call("searchsorted.Tensor", fixed(6).sort().values, x(4, 5), right=True),
        call("take.default", x(4, 5), ints(3, 6, high=20)),
        call("masked_scatter.default", x(4, 5), truth(4, 5), x(20)),
        call("put.default", x(4, 5), torch.tensor([3, 11]), x(2)),
        call("index_select.default", ints(7, 5), 0, ints(4, high=7)),
        call("gather.default", ints(7, 5), 0, ints(4, 5, high=7)),
        call("gather.default", x(), 0, torch.tensor(0)),
        call("scatter.src", x(), 0, torch.tensor(0), x()),
        call("index_put.default", x(4, 5, 6), (None, truth(5, 6)), x(4, 1)),
        call("embedding.default", x(9, 6), ints(4, 5, high=9)),
        call("embedding.default", x(10, 6), ints(4, 5, low=0, high=10), 3),
        call("embedding.default", x(9, 6), ints(4, 5, low=0), -1, True, False),
        call("embedding.default", x(9, 6), ints(4, 5), symbolic={4: "s0", 5: "s1"}),
        call("index_select.default", x(4, 5, 6), 1, ints(7, high=5)),
        call("index_select.default", x(4, 5, 6), -1, ints(1, high=5)),
        call("gather.default", x(4, 7, 5), 1, ints(4, 6, 5, high=7)),
        call("gather.default", x(5, 7, 6), -1, ints(5, 7, 3, high=6), symbolic={5: "s0"}),
        call("gather.default", x(4, 7, 5), -1, ints(4, 6, 3, high=5)),
        call("index.Tensor", x(4, 7, 5), (None, ints(6, high=7))),
        call("index.Tensor", x(7, 4, 5), (ints(3, 6, high=7),)),
        call("index.Tensor", x(7, 8, 5), (ints(3, 1, high=7), ints(6, high=8))),
        call("index.Tensor", x(4, 7, 5, 8), (None, ints(6, high=7), None, ints(6, high=8))),
        call("index.Tensor", x(4, 7, 5), (None, truth(7))),
        call("index.Tensor", ints(4, 7), (None, ints(6, high=7)), symbolic={6: "s0"}),
    ]


def losses() -> list[Call]:
    logits, target = x(8, 9), ints(8)
    ignored = torch.where(torch.arange(8) % 3 == 0, -100, target)
    name = "cross_entropy_loss.default"
    calls = [call(name, x(5, 9), ints(5), None, reduction) for reduction in (0, 1, 2)]
    calls += [call(name, logits, ignored, None, reduction) for reduction in (0, 1, 2)]
    spoken = (x(6, 5, 7), ints(5, 3, high=7), ints(5, low=5, high=7), ints(5, low=0, high=4))
    for symbolic in ({}, {5: "s0"}):
        calls.append(Call("autoparallel.ctc_loss.default", (*spoken, 0, False), {}, symbolic))
    calls += [
        call(name, logits, target),
        call(name, logits, target, None, 1, 4),
        call(name, logits, target, x(9, signs=False).detach()),
        call(name, logits, target, None, 1, -100, 0.1),
        call(name, logits, x(8, 9)),
        call(name, x(4, 9, 5), ints(4, 5)),
        call(name, x(4, 8, 6), ints(4, 6, high=8), None, 2, symbolic={4: "s0", 6: "s1"}),
        call(name, x(4, 8, 5, 3), ints(4, 5, 3, high=8)),
        call(name, x(4, 9, 5), ints(4, 5), None, 0),
        call(name, x(9), ints()),
        call(name, x(8, 6), ints(8, high=6), None, 1, symbolic={8: "s0"}),
        call(name, x(5, 7), ints(5, high=7), None, 1, symbolic={5: "s0"}),
    ]
    for loss in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        calls += [call(f"{loss}.default", x(4, 5), x(4, 5), way) for way in (0, 1, 2)]
    zero_one, weight = x(4, 5, signs=False), x(5, signs=False).detach()
    for way in (0, 1, 2):
        calls += [
            call("soft_margin_loss.default", x(4, 5), fixed(4, 5), way),
            call("kl_div.default", x(4, 5), zero_one, way),
            call("kl_div.default", x(4, 5), x(4, 5), way, log_target=True),
            call("binary_cross_entropy.default", zero_one, zero_one.detach(), weight, way),
            call("nll_loss.default", x(8, 9), ignored, None, way),
            call("nll_loss_nd.default", x(4, 9, 5), ints(4, 5), x(9, signs=False).detach(), way),
        ]
        name = "binary_cross_entropy_with_logits.default"
        calls.append(call(name, x(4, 5), zero_one.detach(), None, weight, way))
        calls.append(call(name, x(4, 5), zero_one.detach(), weight, None, way))
    calls.append(call("mse_loss.default", x(4, 5), x(4, 5)))
    return calls


def convolution() -> list[Call]:
    ten = {5: "s0", 10: "2*s0"}
    three = {3: "s0", 6: "2*s0", 9: "3*s0", 12: "4*s0"}
    calls = [
        call("conv1d.default", x(5, 6, 9), x(8, 6, 3)),
        call("conv1d.default", x(6, 9), x(8, 6, 3), x(8)),
        call("conv1d.padding", x(4, 6, 9), x(8, 6, 3), x(8), (1,), "same"),
        call("conv1d.default", x(4, 8, 9), x(8, 1, 3), x(8), (1,), (2,), (1,), 8),
        call("conv1d.default", x(3, 10, 7), x(15, 2, 3), None, (1,), (0,), (1,), 5),
        call("conv2d.default", x(5, 6, 7, 8), x(8, 6, 3, 2), None, (2, 1), (1, 1)),
        call("conv2d.padding", x(4, 6, 7, 8), x(5, 6, 3, 2), None, (1, 1), "valid"),
        call("conv2d.default", x(3, 6, 7, 8), x(5, 6, 2, 2), symbolic={3: "s0"}),
        # A weight that is computed: as many rows, or groups, as an input is long.
        call("conv2d.default", x(4, 6, 7, 8), x(5, 6, 2, 2), symbolic={5: "s0"}),
        call("conv1d.default", x(4, 6, 7), x(10, 3, 2), x(10), (1,), (0,), (1,), 2, symbolic=ten),
        *(
            call(
                "conv1d.default",
                x(*batch, 6, 7),
                x(9, 2, 2),
                None,
                (1,),
                (0,),
                (1,),
                3,
                symbolic=three,
            )
            for batch in ((), (2,))
        ),
        call(
            "conv_transpose1d.default",
            x(2, 6, 7),
            x(6, 4, 2),
            x(12),
            (1,),
            (0,),
            (0,),
            3,
            symbolic=three,
        ),
        # Windows with gaps, and such as reach over more than the next part.
        call("conv2d.default", x(2, 3, 11, 8), x(4, 3, 3, 3), x(4), (2, 2), (1, 1), (2, 1)),
        call("conv1d.default", x(2, 3, 11), x(4, 3, 5), x(4), (3,), (4,)),
        call("conv_transpose1d.default", x(2, 3, 5), x(3, 4, 2), None, (4,), (0,), (2,)),
        call("max_pool2d.default", x(2, 3, 9, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
        call("avg_pool2d.default", x(2, 3, 9, 8), (3, 3), (1, 2), (1, 0)),
        call("upsample_nearest2d.vec", x(2, 3, 5, 7), None, (2.0, 3.0)),
        call("upsample_nearest2d.vec", x(2, 3, 10, 7), None, (3.05, 2.0)),
        call("upsample_linear1d.vec", x(4, 5, 6), None, False, (3.0,)),
        call("upsample_bilinear2d.vec", x(2, 3, 5, 7), (10, 21), False, None),
        call("upsample_bicubic2d.vec", x(2, 3, 5, 7), None, False, (2.0, 1.0)),
        call("upsample_trilinear3d.vec", x(2, 3, 4, 3, 5), None, False, (2.0, 1.0, 3.0)),
        call("conv3d.default", x(2, 4, 5, 6, 7), x(5, 4, 2, 2, 3)),
        call("conv3d.padding", x(2, 4, 5, 6, 7), x(5, 4, 2, 2, 3), x(5)),
        call("conv2d.default", x(5, 6, 7, 8), x(8, 6, 3, 2), x(8), (2, 1), padding=(1, 1)),
        call("conv2d.default", x(3, 6, 7, 8), x(5, 6, 2, 2), x(5), symbolic={3: "s0"}),
        call("im2col.default", x(5, 4, 7, 8), (3, 2), (1, 1), (1, 0), (2, 1)),
        call("im2col.default", x(5, 7, 8), (3, 2), (1, 1), (1, 0), (2, 1)),
        call("col2im.default", x(5, 24, 28), (7, 8), (3, 2), (1, 1), (1, 0), (2, 1)),
        call("grid_sampler.default", x(5, 4, 6, 7), fixed(5, 3, 8, 2), 0, 0, False),
        call("grid_sampler.default", x(4, 3, 6, 7), x(4, 3, 8, 2), 0, 1, True),
        call("grid_sampler_2d.default", x(4, 3, 6, 7), x(4, 3, 8, 2), 0, 1, True),
        call("grid_sampler_3d.default", x(4, 3, 2, 5, 6), x(4, 2, 5, 7, 3), 0, 0, True),
        call("affine_grid_generator.default", x(5, 2, 3), (5, 3, 6, 7), False),
        call("_upsample_nearest_exact1d.vec", x(4, 5, 6), None, (2.0,)),
        call("_upsample_nearest_exact2d.vec", x(3, 4, 5, 6), (7, 9), None),
        call("_upsample_nearest_exact3d.vec", x(2, 3, 4, 5, 6), None, (2.0, 2.0, 2.0)),
        call("_upsample_bilinear2d_aa.vec", x(3, 4, 8, 9), (5, 6), False, None),
        call("_upsample_bicubic2d_aa.vec", x(3, 4, 8, 9), (5, 6), True, None),
        call("conv_transpose1d.default", x(5, 6, 9), x(6, 8, 3), x(8)),
        call("conv1d.default", x(2, 10, 7), x(12, 5, 3), x(12), (1,), (0,), (1,), 2),
        call("conv1d.default", x(10, 7), x(12, 5, 3), x(12), (1,), (0,), (1,), 2),
        call("conv2d.padding", x(2, 8, 4, 5), x(10, 4, 2, 2), x(10), (1, 1), "same", groups=2),
        call("conv2d.default", x(3, 8, 4, 5), x(6, 4, 2, 2), groups=2, symbolic={3: "s0"}),
        call("conv_transpose1d.default", x(2, 8, 5), x(8, 5, 3), x(10), (2,), (0,), (0,), 2),
        call("conv_transpose2d.input", x(6, 4, 5), x(6, 5, 2, 3), x(5), (2, 1), (1, 0)),
        call("conv_transpose3d.input", x(2, 4, 3, 2, 4), x(4, 5, 2, 1, 2), x(5)),
        call("conv_transpose1d.default", x(3, 8, 9), x(8, 2, 3), None, (2,), (0,), (0,), 4),
        call("conv_transpose2d.input", x(5, 6, 7, 8), x(6, 4, 2, 2), None, (2, 2)),
        call("conv_transpose3d.input", x(2, 4, 3, 6, 7), x(4, 5, 2, 2, 3)),
        call("max_pool2d_with_indices.default", x(3, 4, 9, 8), (2, 2)),
        call("upsample_nearest1d.vec", x(4, 5, 6), None, (2.0,)),
        call("upsample_nearest2d.vec", x(3, 4, 5, 6), None, (2.0, 2.0)),
        call("upsample_nearest3d.vec", x(2, 3, 4, 5, 6), None, (2.0, 2.0, 2.0)),
        call("upsample_linear1d.vec", x(4, 5, 6), (9,), False, None),
        call("upsample_bilinear2d.vec", x(3, 4, 5, 6), (8, 9), True, None),
        call("upsample_bicubic2d.vec", x(3, 4, 5, 6), (8, 9), False, None),
        call("upsample_trilinear3d.vec", x(2, 3, 4, 5, 6), (7, 8, 9), False, None),
    ]
    for n, operand in ((1, x(4, 5, 9)), (2, x(3, 4, 9, 8)), (3, x(2, 4, 7, 6, 8))):
        calls += [
            call(f"max_pool{n}d.default", operand, (2,) * n, (2,) * n),
            call(f"avg_pool{n}d.default", operand, (2,) * n, (2,) * n),
            call(f"adaptive_max_pool{n}d.default", operand, (3,) * n),
            call(f"adaptive_avg_pool{n}d.default", operand, (3,) * n),
        ]
    return [*calls, call("avg_pool2d.default", x(5, 9, 8), (3, 3))]


def recurrent() -> list[Call]:
    def weights(gates: int, features: int = 3, hidden: int = 4) -> tuple[torch.Tensor, ...]:
        rows = gates * hidden
        return x(rows, features), x(rows, hidden), x(rows), x(rows)

    def state() -> torch.Tensor:
        return x(1, 5, 4)

    calls = [
        call(f"{name}.input", x(6, 5, 3), state(), weights(gates), *_ONE_LAYER, False)
        for name, gates in (("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))
    ]
    both = (state(), state())
    calls.append(call("lstm.input", x(5, 6, 3), both, weights(4), *_ONE_LAYER, True))
    return calls


_ONE_LAYER = (True, 1, 0.0, True, False)
