"""Kernels in Triton compute the scan with scalar decay on a GPU, in the matrix form that `torch_scalar_decay` states.

A program has a block (N, p) of the states of one head of one sequence in registers, and walks along the sequence by
chunks, in the backward pass from the last to the first. Entries of a state do not act upon each other, so each block is
a scan of its own; what blocks, or heads of a group, add to the same number is written apart and summed afterwards,
always in the same order. A product of matrices is three in TF32, which together keep the digits of float32; where a
GPU has no TF32 it is one in float32.

Triton is optional: this module is imported where it is there and serves. It is interpreted as `triton_scan` is.
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
    grid, sizes, tile = _launch(x, B)
    y, last_state = A.new_empty(grid[2], *x.shape), A.new_empty(last_shape(x, B))
    kept = A.new_empty(kept_shape(x, B) if keep else 0)
    inputs = map(_contiguous, (x, time_step, A, B, C, D, initial_state))
    _scan_forward[grid](*inputs, y, last_state, kept, *sizes, keep, **tile)
    return _total(y), last_state, kept


def backward(grad_y, grad_last_state, x, time_step, A, B, C, D, kept) -> tuple[Tensor, ...]:
    """Implement the contract in `scalar_decay_operators`."""
    grid, sizes, tile = _launch(x, B)
    (batch, length, heads, _), (groups, states) = x.shape, B.shape[2:]
    of_x, of_step = A.new_empty(grid[2], *x.shape), A.new_empty(*time_step.shape, *grid[1:])
    of_A, of_D = A.new_empty(2, batch, heads, *grid[1:])
    of_B, of_C = A.new_empty(2, batch, length, groups, heads // groups, grid[1], states)
    of_state = A.new_empty(last_shape(x, B))
    inputs = map(_contiguous, (grad_y, grad_last_state, x, time_step, A, B, C, D, kept))
    _scan_backward[grid](*inputs, of_x, of_step, of_A, of_B, of_C, of_D, of_state, *sizes, **tile)
    of_x, of_step, of_B, of_C = _total(of_x), of_step.sum((3, 4)), of_B.sum((3, 4)), of_C.sum((3, 4))
    of_A, of_D = of_A.sum((0, 2, 3)), of_D.sum((0, 2, 3))
    return of_x.to(x.dtype), of_step, of_A, of_B.to(B.dtype), of_C.to(C.dtype), of_D, of_state


def _launch(x: Tensor, B: Tensor) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, int]]:
    """Return the grid, (batch · heads, blocks of p, blocks of N), the sizes that a kernel takes, and its tile."""
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    tile = _tile(head_dim, states)
    grid = batch * heads, triton.cdiv(head_dim, tile["BLOCK_P"]), triton.cdiv(states, tile["BLOCK_N"])
    return grid, (length, heads, groups, head_dim, states), tile


def _tile(head_dim: int, states: int) -> dict[str, int]:
    """Return the tile of a program: powers of two that hold p and N, or blocks of them that registers hold."""
    block_p, block_n = (max(triton.next_power_of_2(size), 16) for size in (head_dim, states))  # 16: the least of a product
    return {"BLOCK_P": min(block_p, 64), "BLOCK_N": min(block_n, 128), "num_warps": 4}


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _total(parts: Tensor) -> Tensor:
    """Return the sum of the parts; a single one is not copied."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


# Lengths vary from batch to batch: no kernel is compiled anew for one that 16 divides.
@triton.jit(do_not_specialize=["length"])
def _scan_forward(
    x, time_step, A, B, C, D, initial_state, y, last_state, kept, length, heads, groups, head_dim, states,
    keep: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head, p, n, inside, of_state = _block(heads, head_dim, states, BLOCK_P, BLOCK_N)
    rate, skip = tl.load(A + head), _load_skip(D, head)
    y += tl.program_id(2) * length.to(tl.int64) * tl.num_programs(0) * head_dim  # each block of N has a part
    h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if initial_state is not None:
        h = tl.load(initial_state + of_state, inside, other=0)
    for chunk in range(0, tl.cdiv(length, POSITIONS)):
        if keep:
            of_kept = _kept_offsets(batch, chunk, head, length, heads, groups, head_dim, states, p, n)
            tl.store(kept + of_kept, h, inside)
        of_head, of_group, real = _rows(batch, chunk, head, length, heads, groups)
        step, u = tl.load(time_step + of_head, real, other=0), _load(x, of_head, real, p, head_dim)
        b, c = _load(B, of_group, real, n, states), _load(C, of_group, real, n, states)
        within, from_start, to_end, whole = _decays(step, rate, real)
        drive = u * step[:, None]
        outputs = skip * u + from_start[:, None] * _product(c, h)
        outputs += _product(_product(c, tl.trans(b)) * within, drive)
        _store(y, outputs, of_head, real, p, head_dim)
        h = whole * h + _product(tl.trans(b), drive * to_end[:, None])
    tl.store(last_state + of_state, h, inside)


@triton.jit(do_not_specialize=["length"])
def _scan_backward(
    grad_y, grad_last_state, x, time_step, A, B, C, D, kept, of_x, of_step, of_A, of_B, of_C, of_D, of_initial_state,
    length, heads, groups, head_dim, states, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head, p, n, inside, of_state = _block(heads, head_dim, states, BLOCK_P, BLOCK_N)
    rate, skip = tl.load(A + head), _load_skip(D, head)
    part, parts = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2), tl.num_programs(1) * tl.num_programs(2)
    of_x += tl.program_id(2) * length.to(tl.int64) * tl.num_programs(0) * head_dim  # each block of N has a part
    dh = tl.load(grad_last_state + of_state, inside, other=0)
    d_rate, d_skip = 0.0, 0.0
    chunks = tl.cdiv(length, POSITIONS)
    for later in range(0, chunks):
        chunk = chunks - 1 - later
        of_kept = _kept_offsets(batch, chunk, head, length, heads, groups, head_dim, states, p, n)
        h = tl.load(kept + of_kept, inside, other=0)
        of_head, of_group, real = _rows(batch, chunk, head, length, heads, groups)
        step, u = tl.load(time_step + of_head, real, other=0), _load(x, of_head, real, p, head_dim)
        b, c = _load(B, of_group, real, n, states), _load(C, of_group, real, n, states)
        within, from_start, to_end, whole = _decays(step, rate, real)
        drive, grad = u * step[:, None], _load(grad_y, of_head, real, p, head_dim)

        # through the state before the chunk, and the one after it
        grad_before, remaining = grad * from_start[:, None], drive * to_end[:, None]
        d_drive = _product(b, dh) * to_end[:, None]
        d_from_start = tl.sum(_product(c, h) * grad_before, 1)
        d_to_end = tl.sum(d_drive * drive, 1)
        d_whole = tl.sum(dh * h) * whole
        d_b, d_c = _product(remaining, tl.trans(dh)), _product(grad_before, tl.trans(h))
        dh = whole * dh + _product(tl.trans(c), grad_before)

        # within the chunk
        scores, d_scores = _product(c, tl.trans(b)), _product(grad, tl.trans(drive)) * within
        d_drive += _product(tl.trans(scores * within), grad)
        d_within = d_scores * scores
        d_b += _product(tl.trans(d_scores), c)
        d_c += _product(d_scores, b)

        # log decay t is a part of all decays that lead over it: from s < t to l ≥ t
        d_log = tl.sum(tl.where(_below_diagonal(), tl.cumsum(d_within, 0, reverse=True), 0), 1) + d_whole
        d_log += tl.cumsum(d_from_start, 0, reverse=True) + tl.cumsum(d_to_end, 0) - d_to_end
        d_step = d_log * rate + tl.sum(d_drive * u, 1)
        d_rate += tl.sum(d_log * step)
        d_skip += tl.sum(grad * u)
        tl.store(of_step + of_head * parts + part, d_step, real)
        _store(of_x, d_drive * step[:, None] + skip * grad, of_head, real, p, head_dim)
        of_maps = of_head * tl.num_programs(1) + tl.program_id(1)
        _store(of_B, d_b, of_maps, real, n, states)
        _store(of_C, d_c, of_maps, real, n, states)

    of_block = tl.program_id(0) * parts + part
    tl.store(of_A + of_block, d_rate)
    tl.store(of_D + of_block, tl.where(tl.program_id(2) == 0, d_skip, 0))
    tl.store(of_initial_state + of_state, dh, inside)


@triton.jit
def _block(heads, head_dim, states, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return whose states a program has: batch, head, p, N, which of them are real; and where they lie in a state."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n[:, None] < states) & (p[None, :] < head_dim)
    return row // heads, row % heads, p, n, inside, (row * head_dim + p[None, :]) * states + n[:, None]


@triton.jit
def _kept_offsets(batch, chunk, head, length, heads, groups, head_dim, states, p, n):
    """Return where the block of a state lies in (batch, chunks, G, N, heads / G · p)."""
    of_group = heads // groups
    matrix = (batch * tl.cdiv(length, POSITIONS) + chunk) * groups + head // of_group
    return (matrix * states + n[:, None]) * (of_group * head_dim) + head % of_group * head_dim + p[None, :]


@triton.jit
def _rows(batch, chunk, head, length, heads, groups):
    """Return the rows of a chunk in (batch · L · heads, …), in (batch · L · G, …), and which of them are real."""
    position = chunk * POSITIONS + tl.arange(0, POSITIONS)
    token = batch * length + position
    return token * heads + head, token * groups + head // (heads // groups), position < length


@triton.jit
def _decays(step, rate, real):
    """Return `torch_scalar_decay.Decays` of a chunk, and what is left of a state after the whole chunk."""
    log = step * rate
    log = tl.where(log < LOWEST, LOWEST, log)  # NaN stays
    log = tl.where(real, log, 0).to(tl.float64)
    sums, total = tl.cumsum(log, 0), tl.sum(log, 0)
    t = tl.arange(0, POSITIONS)
    within = (sums[:, None] - sums[None, :]).to(tl.float32)
    within = tl.exp(tl.where(t[:, None] < t[None, :], float("-inf"), within))
    return within, tl.exp(sums.to(tl.float32)), tl.exp((total - sums).to(tl.float32)), tl.exp(total.to(tl.float32))


@triton.jit
def _below_diagonal():
    t = tl.arange(0, POSITIONS)
    return t[:, None] > t[None, :]


@triton.jit
def _product(left, right):
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _load_skip(D, head):
    """Load D of the head: zero where there is none, and in all blocks of N but the first."""
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head, tl.program_id(2) == 0, other=0)
    return skip


@triton.jit
def _load(pointer, rows, real, columns, width):
    """Load a tile of a matrix with rows of a width: zero beyond its ends."""
    inside = real[:, None] & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * width + columns[None, :], inside, other=0).to(tl.float32)


@triton.jit
def _store(pointer, tile, rows, real, columns, width):
    inside = real[:, None] & (columns[None, :] < width)
    tl.store(pointer + rows[:, None] * width + columns[None, :], tile, inside)


scan = define_scalar_decay_scan("triton", forward, backward)
