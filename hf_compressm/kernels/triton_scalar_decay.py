"""Kernels in Triton compute the scan with scalar decay on a GPU, in the matrix form that `torch_scalar_decay` states.

One kernel walks along the sequence: a program has a block (N, p) of the state of a head in registers, and leaves the
states before every chunk in memory; gradients go through the same kernel, from the last chunk to the first. All else
is computed for all chunks at once from what lies there. What is summed over the heads of a group is summed by one
program, so that every sum has one order. A product of matrices is three products in TF32, which together keep the
digits of float32; on a GPU of AMD it is one in float32.

No tile grows with N, p or L, so that layers with sizes of their own share the kernels that were compiled for one.
Triton is optional, and can be interpreted, as `triton_scan` says.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scalar_decay_operators import CHUNK, define_scalar_decay_scan, kept_shape, last_shape
from .torch_scalar_decay import VANISHED

POSITIONS, LOWEST = tl.constexpr(CHUNK), tl.constexpr(VANISHED)
PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


def forward(x, time_step, A, B, C, D, initial_state, keep) -> tuple[Tensor, Tensor, Tensor]:
    """Implement the contract in `scalar_decay_operators`."""
    x, time_step, A, B, C, D, initial_state = map(_contiguous, (x, time_step, A, B, C, D, initial_state))
    y, last_state, kept = (A.new_empty(shape) for shape in (x.shape, last_shape(x, B), kept_shape(x, B)))
    sizes, tile, blocks_p, blocks_n = _launch(x, B)
    heads, chunks = len(x) * len(A), kept.shape[1]  # heads of all sequences
    states = initial_state, kept, last_state
    _pass_states[heads, blocks_p, blocks_n](B, x, time_step, A, *states, *sizes, backward=False, **tile)
    _outputs[heads * chunks, blocks_p](x, time_step, A, B, C, D, kept, y, *sizes, **tile)
    return y, last_state, kept if keep else A.new_empty(0)


def backward(grad_y, grad_last_state, x, time_step, A, B, C, D, kept) -> tuple[Tensor, ...]:
    """Implement the contract in `scalar_decay_operators`."""
    grad_y, x, time_step, A, B, C, D = map(_contiguous, (grad_y, x, time_step, A, B, C, D))
    of_x, of_step, of_B, of_C, grad_kept = map(torch.empty_like, (x, time_step, B, C, kept))
    of_A, of_D = A.new_empty(2, *kept.shape[:2], len(A))
    of_state = A.new_empty(last_shape(x, B))
    sizes, tile, blocks_p, blocks_n = _launch(x, B)
    heads, groups, chunks = len(x) * len(A), len(x) * B.shape[2], kept.shape[1]  # heads, groups of all sequences
    states = grad_last_state.contiguous(), grad_kept, of_state
    _pass_states[heads, blocks_p, blocks_n](C, grad_y, time_step, A, *states, *sizes, backward=True, **tile)
    inputs = grad_y, x, time_step, A, B, C, kept, grad_kept
    _input_gradients[(heads * chunks,)](*inputs, D, of_x, of_step, of_A, of_D, *sizes, **tile)
    _map_gradients[groups * chunks, blocks_n](*inputs, of_B, of_C, *sizes, **tile)
    return of_x, of_step, of_A.sum((0, 1)), of_B, of_C, of_D.sum((0, 1)), of_state


def _launch(x: Tensor, B: Tensor) -> tuple[tuple[int, ...], dict[str, int], int, int]:
    """Return the sizes that every kernel takes, its tile, and the numbers of blocks of p and of N."""
    _, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    tile = _tile(head_dim, states)
    blocks = (triton.cdiv(size, tile[name]) for size, name in ((head_dim, "BLOCK_P"), (states, "BLOCK_N")))
    return (length, heads, groups, head_dim, states), tile, *blocks


def _tile(head_dim: int, states: int) -> dict[str, int]:
    """Return the blocks of p and N that a program takes at a time: powers of two, not less than a product takes."""
    block_p, block_n = (min(max(triton.next_power_of_2(size), 16), 32) for size in (head_dim, states))
    return {"BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# Lengths vary from batch to batch: no kernel is compiled anew for one that 16 divides.
@triton.jit(do_not_specialize=["length"])
def _pass_states(
    maps, values, time_step, A, first_state, kept, last_state, length, heads, groups, head_dim, states,
    backward: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass states through all chunks, and keep those before each; backward their gradients, and those after each."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n[:, None] < states) & (p[None, :] < head_dim)
    entries = (row * head_dim + p[None, :]) * states + n[:, None]
    rate = tl.load(A + head)
    h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if first_state is not None:
        h = tl.load(first_state + entries, inside, other=0)
    chunks = tl.cdiv(length, POSITIONS)
    for k in range(0, chunks):
        chunk = chunks - 1 - k if backward else k
        of_kept = _kept_offsets(batch * chunks + chunk, head, n, p, heads, groups, head_dim, states)
        tl.store(kept + of_kept, h, inside)
        token, real = _tokens(batch, chunk, length)
        of_head, of_group = token * heads + head, token * groups + head // (heads // groups)
        step = tl.load(time_step + of_head, real, other=0)
        _, from_start, to_end, whole = _decays(step, rate, real)
        weight = from_start if backward else step * to_end
        added = _load(values, of_head, real, p, head_dim) * weight[:, None]
        h = whole * h + _product(tl.trans(_load(maps, of_group, real, n, states)), added)
    tl.store(last_state + entries, h, inside)


@triton.jit(do_not_specialize=["length"])
def _outputs(
    x, time_step, A, B, C, D, kept, y, length, heads, groups, head_dim, states,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute y of a chunk, a block of p, from the state before it."""
    piece, head, token, real = _chunk(heads, length)
    of_head, of_group = token * heads + head, token * groups + head // (heads // groups)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    step = tl.load(time_step + of_head, real, other=0)
    sums, from_start, _, _ = _decays(step, tl.load(A + head), real)
    weights = _row_products(C, B, of_group, real, states, BLOCK_N) * _within(sums)
    before = tl.zeros((POSITIONS, BLOCK_P), tl.float32)
    for first in range(0, states, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        h = _load_kept(kept, piece, head, n, p, heads, groups, head_dim, states)
        before += _product(_load(C, of_group, real, n, states), h)
    u = _load(x, of_head, real, p, head_dim)
    outputs = before * from_start[:, None] + _product(weights, u * step[:, None])
    if D is not None:
        outputs += tl.load(D + head) * u
    _store(y, outputs, of_head, real, p, head_dim)


@triton.jit(do_not_specialize=["length"])
def _input_gradients(
    grad_y, x, time_step, A, B, C, kept, grad_kept, D, of_x, of_step, of_A, of_D,
    length, heads, groups, head_dim, states, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients for x and Δ of a head in a chunk, and its part of those for A and D."""
    piece, head, token, real = _chunk(heads, length)
    of_head, of_group = token * heads + head, token * groups + head // (heads // groups)
    rate = tl.load(A + head)
    step = tl.load(time_step + of_head, real, other=0)
    sums, from_start, to_end, whole = _decays(step, rate, real)
    weights = _row_products(C, B, of_group, real, states, BLOCK_N) * _within(sums)

    # log decay t is a part of all decays that lead over it: from s < t to l ≥ t
    t = tl.arange(0, POSITIONS)
    d_within = weights * _row_products(grad_y, x, of_head, real, head_dim, BLOCK_P) * step[None, :]
    d_log = tl.sum(tl.where(t[:, None] > t[None, :], tl.cumsum(d_within, 0, reverse=True), 0), 1)

    d_step = tl.zeros((POSITIONS,), tl.float32)
    d_from_start, d_to_end, d_whole, d_skip = d_step, d_step, 0.0, 0.0
    for start in range(0, head_dim, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        u, grad = _load(x, of_head, real, p, head_dim), _load(grad_y, of_head, real, p, head_dim)
        before = tl.zeros((POSITIONS, BLOCK_P), tl.float32)
        d_drive = tl.zeros((POSITIONS, BLOCK_P), tl.float32)
        for first in range(0, states, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            h = _load_kept(kept, piece, head, n, p, heads, groups, head_dim, states)
            dh = _load_kept(grad_kept, piece, head, n, p, heads, groups, head_dim, states)
            before += _product(_load(C, of_group, real, n, states), h)
            d_drive += _product(_load(B, of_group, real, n, states), dh)
            d_whole += tl.sum(h * dh)
        d_drive *= to_end[:, None]
        d_from_start += tl.sum(before * grad, 1) * from_start
        d_to_end += tl.sum(d_drive * u, 1) * step
        d_drive += _product(tl.trans(weights), grad)
        d_step += tl.sum(d_drive * u, 1)
        d_u = d_drive * step[:, None]
        if D is not None:
            d_u += tl.load(D + head) * grad
            d_skip += tl.sum(grad * u)
        _store(of_x, d_u, of_head, real, p, head_dim)

    d_log += tl.cumsum(d_from_start, 0, reverse=True) + tl.cumsum(d_to_end, 0) - d_to_end
    d_log += d_whole * whole
    tl.store(of_step + of_head, d_step + d_log * rate, real)
    tl.store(of_A + piece * heads + head, tl.sum(d_log * step))
    tl.store(of_D + piece * heads + head, d_skip)


@triton.jit(do_not_specialize=["length"])
def _map_gradients(
    grad_y, x, time_step, A, B, C, kept, grad_kept, of_B, of_C, length, heads, groups, head_dim, states,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients for B and C of a group in a chunk, a block of N."""
    piece, group, token, real = _chunk(groups, length)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d_b, d_c = tl.zeros((POSITIONS, BLOCK_N), tl.float32), tl.zeros((POSITIONS, BLOCK_N), tl.float32)
    d_scores = tl.zeros((POSITIONS, POSITIONS), tl.float32)
    for k in range(0, heads // groups):
        head = group * (heads // groups) + k
        of_head = token * heads + head
        step = tl.load(time_step + of_head, real, other=0)
        sums, from_start, to_end, _ = _decays(step, tl.load(A + head), real)
        d_weights = _row_products(grad_y, x, of_head, real, head_dim, BLOCK_P) * step[None, :]
        d_scores += d_weights * _within(sums)
        for start in range(0, head_dim, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            u, grad = _load(x, of_head, real, p, head_dim), _load(grad_y, of_head, real, p, head_dim)
            h = _load_kept(kept, piece, head, n, p, heads, groups, head_dim, states)
            dh = _load_kept(grad_kept, piece, head, n, p, heads, groups, head_dim, states)
            d_b += _product(u * (step * to_end)[:, None], tl.trans(dh))
            d_c += _product(grad * from_start[:, None], tl.trans(h))
    of_group = token * groups + group
    d_b += _product(tl.trans(d_scores), _load(C, of_group, real, n, states))
    d_c += _product(d_scores, _load(B, of_group, real, n, states))
    _store(of_B, d_b, of_group, real, n, states)
    _store(of_C, d_c, of_group, real, n, states)


@triton.jit
def _chunk(of_each, length):
    """Return which of (batch · chunks) a program has, which head or group, the tokens, and which of them are real."""
    program, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(length, POSITIONS)
    piece = program // of_each
    token, real = _tokens(piece // chunks, piece % chunks, length)
    return piece, program % of_each, token, real


@triton.jit
def _tokens(batch, chunk, length):
    """Return where the positions of a chunk lie in (batch · L), and which of them are real."""
    position = chunk * POSITIONS + tl.arange(0, POSITIONS)
    return batch * length + position, position < length


@triton.jit
def _decays(step, rate, real):
    """Return the sums of Δ A over a chunk, and the decays from its start, to its end, and over the whole.

    The sums are float64 and no step goes below `LOWEST`: a small difference of two large ones keeps its digits. Beyond
    the end of the sequence nothing decays.
    """
    log = step * rate
    log = tl.where(log < LOWEST, LOWEST, log)  # NaN stays
    log = tl.where(real, log, 0).to(tl.float64)
    sums, total = tl.cumsum(log, 0), tl.sum(log, 0)
    to_end = (total - sums).to(tl.float32)
    return sums, tl.exp(sums.to(tl.float32)), tl.exp(to_end), tl.exp(total.to(tl.float32))


@triton.jit
def _within(sums):
    """Return what is left at the position of the row of a state at that of the column, zero above the diagonal."""
    t = tl.arange(0, POSITIONS)
    log = (sums[:, None] - sums[None, :]).to(tl.float32)
    return tl.exp(tl.where(t[:, None] < t[None, :], float("-inf"), log))


@triton.jit
def _row_products(left, right, rows, real, width, BLOCK: tl.constexpr):
    """Return the products of the rows of a chunk in one matrix with those in another, (l, l)."""
    products = tl.zeros((POSITIONS, POSITIONS), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        row, other = _load(left, rows, real, columns, width), _load(right, rows, real, columns, width)
        products += _product(row, tl.trans(other))
    return products


@triton.jit
def _product(left, right):
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _load(pointer, rows, real, columns, width):
    """Load a tile of a matrix with rows of a width: zero beyond its ends."""
    inside = real[:, None] & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * width + columns[None, :], inside, other=0).to(tl.float32)


@triton.jit
def _store(pointer, tile, rows, real, columns, width):
    inside = real[:, None] & (columns[None, :] < width)
    tl.store(pointer + rows[:, None] * width + columns[None, :], tile, inside)


@triton.jit
def _kept_offsets(piece, head, n, p, heads, groups, head_dim, states):
    """Return where a block of the state of a head lies in (batch · chunks, G, N, heads / G · p)."""
    per_group = heads // groups
    rows, columns = (piece * groups + head // per_group) * states + n, head % per_group * head_dim + p
    return rows[:, None] * (per_group * head_dim) + columns[None, :]


@triton.jit
def _load_kept(kept, piece, head, n, p, heads, groups, head_dim, states):
    offsets = _kept_offsets(piece, head, n, p, heads, groups, head_dim, states)
    return tl.load(kept + offsets, (n[:, None] < states) & (p[None, :] < head_dim), other=0)


scan = define_scalar_decay_scan("triton", forward, backward)
