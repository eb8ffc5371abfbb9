"""Programs that once failed, as small as they could be made. Each is split in all ways below."""

from __future__ import annotations

from fuzz_programs import Program
from fuzz_split import Split

__all__ = ["ON_SEVERAL_AXES", "REGRESSIONS", "WAYS"]

WAYS = tuple(
    Split(world_size, seed, 0.0, data_parallel)
    for world_size in (2, 3, 5)
    for seed in (0, 1)
    for data_parallel in (False, True)
)

REGRESSIONS = {
    "a reduced dim of size 1 that is kept: the result is as large as the operand": Program("""
        i0 = input(4, 3, 6)
        p0 = parameter(6)
        v0 = i0 * p0
        v1a, v1b, v1c, v1d = v0.chunk(4, dim=0)
        v2 = v1d.logsumexp(0, keepdim=True)
        v3 = v1a.logsumexp((0, 1), keepdim=True)
        return {'a': v2, 'b': (v3)}
    """),
    "second derivatives: groups that do not divide by the ranks": Program("""
        p0 = parameter(2, 7, 5)
        p1 = parameter(14, 1, 1)
        v0 = F.conv1d(p0, p1, groups=7)
        return v0.sin()
    """),
    "second derivatives: blocks of unequal size": Program("""
        p0 = parameter(4, 19)
        p1 = parameter(19)
        v0 = p0 * p1
        v1a, v1b = v0.split((14, 5), dim=-1)
        return v1a.sin(), v1b.cos()
    """),
    "no input": Program("""
        p0 = parameter(5)
        return p0.tanh()
    """),
    "a size that is 1 for all that fits, though it is written otherwise": Program("""
        i0 = input(1, 12, 2)
        v0 = i0[:, :, 1::2]
        v1 = v0 / v0.square().add(1)
        return (v1 * v1).sum(), v1
    """),
    "a complex result that all ranks hold": Program("""
        g0 = given(4, 5, 2)
        p0 = parameter(2)
        v0 = torch.view_as_complex(g0)
        v1 = g0 * p0
        return v1.square().mean(), v0
    """),
    "a branch on a size": Program("""
        i0 = input(3, 6)
        v0 = i0 * 2 if i0.size(0) > 4 else i0 * 3
        return v0 + 1 if i0.size(1) % 2 == 0 else v0
    """),
    "strides of a dim of size 1, which torch's batch norm reads wrongly": Program("""
        g0 = given(1, 9, 2, 12)
        p0 = parameter(12)
        p1 = parameter(12)
        v0 = g0.movedim(3, -3)
        v1 = F.batch_norm(v0, None, None, p0, p1, training=True)
        return v1
    """),
    "ops that refuse nothing, where a rank has nothing for some inputs": Program("""
        i0 = input(4, 9, 3, 4)
        p0 = parameter(5, 9, 1, 1)
        v0 = F.interpolate(i0, scale_factor=2.0)
        v1 = F.adaptive_avg_pool2d(v0, 2)
        v2 = F.conv2d(v0, p0).var((1, 2, 3))
        return (v1 * v0.mean()).sum(), v2
    """),
    "a number minus a tensor, as torch spells it": Program("""
        p0 = parameter(4, 5)
        p1 = parameter(5)
        return torch.rsub(p0, p1)
    """),
    "sizes that add up to a fixed one": Program("""
        i0 = input(7)
        i1 = input(6)
        p0 = parameter(12, 13)
        return F.linear(torch.cat((i0, i1)), p0)
    """),
    "a number that follows from a size, and is no whole number": Program("""
        i0 = input(4, 4, 6)
        p0 = parameter(4, 2)
        p1 = parameter(4, 2, 2)
        v0a, v0b, v0c = i0.chunk(3, dim=-1)
        v1 = v0b * (0.1 / v0b.size(2))
        return torch.baddbmm(p0, v0b, p1), v1
    """),
}

# Programs with the one way in which they failed on a mesh of several axes.
ON_SEVERAL_AXES = {
    "second derivatives: a rank has nothing to look up": (
        Program("""
        i0 = integers(3, 7)
        p0 = parameter(7, 4)
        v0 = F.embedding(i0, p0)
        return v0.sin()
        """),
        Split(4, conversions=0.3, data_parallel=True),
    ),
    "what the first rank keeps of a copy that is dropped, where the others make zeros": (
        Program("""
        i0 = input(12)
        p0 = parameter(12, 12)
        p1 = parameter(12, 6)
        p2 = parameter(12)
        v0 = F.linear(i0, p0)
        v1a, v1b = v0.chunk(2, -1)
        v2 = F.silu(v1a) * v1b
        v3 = F.linear(v2, p1, p2)
        v5 = v1a.select(-1, 5)
        return {'a': v5, 'b': (v3)}
        """),
        Split(3, 0, 1.0, data_parallel=True, sparing=True),
    ),
    "a look-up that keeps no mask where a rank has no index, at the end of a block": (
        Program("""
        i1 = integers(2, 3)
        p0 = parameter(3, 3)
        p1 = parameter(3, 1)
        p2 = parameter(8, 9)
        i2 = integers(8, 9)
        v0 = F.embedding(i1, p0, padding_idx=2)
        v1 = torch.matmul(v0, p1)
        v2 = v1.swapaxes(1, 0)
        v3 = v2.transpose(1, 0)
        v4 = torch.ops.aten.nll_loss.default(p2, i2, None, 1)
        v8 = F.kl_div(v0, v0.sigmoid().detach(), reduction='sum')
        v9 = v8 + v4.square().mean() + v3.square().mean()
        return v9, i2
        """),
        Split(6, 14854, 0.3, True, whole=0.5, sizes=(2, 3), sparing=True),
    ),
    "a product that keeps no copy where a rank has no rows": (
        Program("""
        g0 = given(6, 3, 4, 1)
        p0 = parameter(2)
        p1 = parameter(24, 1)
        p2 = parameter(1, 8)
        p3 = parameter(20, 2)
        p4 = parameter(2, 10)
        p5 = parameter(2)
        v0a, v0b = g0.chunk(2, dim=2)
        v1 = p0 @ v0b
        v3 = F.linear(v1, p1)
        v4a, v4b, v4c = v3.chunk(3, dim=-1)
        v5 = v4a.reshape(v1.size(0), v1.size(1), 4, 2).transpose(1, 2)
        v6 = v4b.reshape(v1.size(0), v1.size(1), 4, 2).transpose(1, 2)
        v7 = v4c.reshape(v1.size(0), v1.size(1), 4, 2).transpose(1, 2)
        v8 = F.scaled_dot_product_attention(v5, v6, v7, is_causal=False)
        v9 = v8.transpose(1, 2).reshape(v1.size(0), v1.size(1), 8)
        v10 = F.linear(v9, p2) + v1
        v12 = F.pad(v6, (0, 0))
        v13 = F.linear(v7, p3)
        v14 = F.glu(v13, -1)
        v15 = F.linear(v14, p4, p5)
        v16 = v15.square().mean()
        v17 = v16 + v15.square().mean() + v12.square().mean() + v10.square().mean()
        return v17
        """),
        Split(6, 15449, 0.3, True, sizes=(3, 2), sparing=True),
    ),
    "a reshape that is a view where a rank has one head": (
        Program("""
        p0 = parameter(4, 5)
        g0 = given(5)
        p1 = parameter(5, 6, 3)
        p2 = parameter(1, 5, 4)
        p3 = parameter(1, 5, 4)
        p4 = parameter(16, 3)
        p5 = parameter(16, 4)
        p6 = parameter(16)
        p7 = parameter(27, 4)
        p8 = parameter(4, 9)
        i1 = integers(4, 5)
        v0 = torch.ops.aten.clamp_min.Tensor(p0, g0)
        v1 = v0.transpose(0, 0)
        w0 = [p4, p5, p6, p6]
        v2a, v2b, v2c = torch.lstm(p1, [p2, p3], w0, True, 1, 0.0, True, False, True)
        v3 = v0.unflatten(0, (4,))
        v4 = F.linear(v2c, p7)
        v5a, v5b, v5c = v4.chunk(3, dim=-1)
        v6 = v5a.reshape(v2c.size(0), 5, 3, 3).transpose(1, 2)
        v7 = v5b.reshape(v2c.size(0), 5, 3, 3).transpose(1, 2)
        v8 = v5c.reshape(v2c.size(0), 5, 3, 3).transpose(1, 2)
        v9 = F.scaled_dot_product_attention(v6, v7, v8, is_causal=False)
        v10 = v9.transpose(1, 2).reshape(v2c.size(0), 5, 9)
        v11 = F.linear(v10, p8) + v2c
        v12 = torch.outer(p6, p6)
        v13 = F.nll_loss(v3.log_softmax(-1), i1)
        return v13, v12, v11, v3, v2b, v2a, v1
        """),
        Split(4, 256, 0.0, True, whole=0.5, sizes=(2, 2), sparing=True),
    ),
    "half of a product, as a pending sum that the first rank makes again of what it has": (
        Program("""
        p0 = parameter(2, 5)
        p1 = parameter(20, 5)
        v6 = F.pad(p0, (0, 0))
        v7 = F.linear(v6, p1)
        v8a, v8b = v7.chunk(2, -1)
        v9 = F.silu(v8a) * v8b
        return v8b.square().mean() + v9.square().mean()
        """),
        Split(2, 28, 0.3, sequence_parallel=False, sparing=True),
    ),
    "a block that is made again of a product, which is summed piece by piece elsewhere": (
        Program("""
        i0 = input(4, 12)
        p1 = parameter(8, 12)
        p2 = parameter(4, 8)
        v4 = F.linear(i0.tanh(), p1)
        v5 = v4.sin().cos()
        return F.linear(v5, p2)
        """),
        Split(2, 75, 0.0, False, True, whole=0.5, sparing=True),
    ),
    "statistics of a batch that are returned, to which torch gives no gradient": (
        Program("""
        i0 = input(6, 4)
        p0 = parameter(5, 6)
        p1 = parameter(4, 4)
        n0 = torch.ops.aten.native_batch_norm
        v0a, v0b, v0c = n0(p0, None, None, None, None, True, 0.1, 1e-05)
        v1 = F.linear(i0, p1)
        v2a, v2b, v2c = v1.chunk(3, dim=0)
        v3 = v2c * 1.25
        v3.add_(v2c)
        v5 = v3.narrow(0, 0, 1)
        v6 = (v5 * v5).sum()
        return v6, v0c
        """),
        Split(5, 254, 0.0, sparing=True),
    ),
    "a product keeps a copy of what was padded on its way, on the rank with the shorter part": (
        Program("""
        i0 = integers(4, 5)
        p2 = parameter(5, 6)
        i1 = integers(7, 1)
        b0 = blocks_lists(3, 7, 5)
        v3 = F.embedding(i0, p2)
        v4 = v3.unsqueeze(2)
        v5 = v4.index_select(2, i1)
        v6 = functools.reduce(lambda y, block: y + [*block][-1]([*block][0](y).tanh()), b0, v5)
        v8 = F.adaptive_avg_pool1d(v6, 2)
        v9 = torch.cat((v8, v4), 2)
        return v9.square().mean()
        """),
        Split(2, 75, data_parallel=True, sparing=True),
    ),
    "a check, whose result nothing reads, among the ops that are made again": (
        Program("""
        p1 = parameter(7, 5)
        p2 = parameter(4, 7, 5)
        t0 = truths(7)
        p3 = parameter(4, 4, 5, 7)
        p4 = parameter(4, 5)
        p5 = parameter(5)
        i0 = integers(7, 5)
        v1 = torch.ops.aten.index.Tensor(p2, [None, t0])
        v2 = torch.einsum('abc,abcz->zbac', v1, p3)
        v3 = torch.ops.aten.mul.Tensor(p4, p5)
        v4 = F.nll_loss(p1.log_softmax(-1), i0)
        return {'a': v4, 'b': (v3, v2)}
        """),
        Split(6, 520, 1.0, True, whole=0.5, sizes=(2, 3), remaking=True),
    ),
    "a copy that is made again begins ahead, and one that is kept goes the same way first": (
        Program("""
        g1 = given(4, 6)
        b0 = blocks_sequences(5, 6, 9)
        p0 = parameter(5, 6)
        i0 = integers(5, 6)
        v0 = functools.reduce(lambda y, block: y + [*block][-1]([*block][0](y).tanh()), b0, g1)
        v1 = F.linear(g1, p0)
        v2 = F.nll_loss(p0.log_softmax(-1), i0)
        return v2, v1, v0, i0
        """),
        Split(8, 500, 1.0, True, whole=0.5, sizes=(2, 2, 2), sparing=True),
    ),
    "a sum of a product of which a rank has no part, of rows in another order in memory": (
        Program("""
        g0 = given(5, 8, 8, 2)
        b0 = blocks_dicts(5, 2, 4)
        v0 = functools.reduce(lambda y, b: y + b.last(b.first(y).tanh()), reversed(b0), g0)
        v1 = v0 * 1.25
        v2 = v1.unsqueeze(0)
        v2.add_(1.0)
        return v2
        """),
        Split(6, 56, 1.0, whole=0.5, sizes=(2, 3)),
    ),
}
