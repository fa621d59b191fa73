"""Kernels in Triton compute the selective scan on a GPU, forward and backward; torch_scan.py states the recurrence.

A warp holds the states of some channels of one sequence, a tile (N, D), in registers, and walks along the sequence:
nothing of the size (batch, L, D, N) is written. Neighbouring lanes are channels, so that for small N each has all the
states of its channel and sums over them by itself. It goes by blocks of positions, as many as registers hold, whose
inputs are loaded ahead of the arithmetic; the backward pass computes the states of a block again from the last one
that was kept. What is summed over channels, the gradients for B and C, is added atomically, in any order.

Triton is optional: this module is imported where it is there and serves. With TRITON_INTERPRET=1 the kernels run on a
CPU, slowly, so that they can be tested without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operators import CHUNK, define_scan, kept_shape, position_major

KEPT_EVERY = tl.constexpr(CHUNK)
POSITIONS = tl.constexpr(8)  # of a block
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3e38)


def forward(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep) -> tuple[Tensor, ...]:
    """Implement the contract in `operators`."""
    batch, channels, length = u.shape
    y, last_state = position_major(u), A.new_empty(batch, A.shape[1], channels)
    ungated = position_major(u, A.dtype) if keep and gate is not None else A.new_empty(0)
    kept = A.new_empty(kept_shape(u, A) if keep else 0)
    tile = _tile(A.shape[1])
    u, time_step, B, C, gate = map(_by_position, (u, time_step, B, C, gate))
    inputs = u, time_step, A.T.contiguous(), B, C, D, gate, time_step_bias, _by_position(initial_state)
    sizes = length, channels, A.shape[1]
    grid = triton.cdiv(channels, tile["BLOCK_D"]), batch
    _scan_forward[grid](*inputs, y, last_state, ungated, kept, *sizes, softplus, keep, **tile)
    return y, last_state.mT.contiguous(), ungated, kept


def backward(
    grad_y, grad_last_state, u, time_step, A, B, C, D, gate, time_step_bias, softplus, ungated, kept
) -> tuple[Tensor, ...]:
    """Implement the contract in `operators`."""
    batch, channels, length = u.shape
    tile = _tile(A.shape[1])
    of_u, of_step, of_gate = (A.new_empty(batch, length, channels) for _ in range(3))
    of_B, of_C = A.new_zeros(2, batch, length, A.shape[1])
    of_A, of_state = (A.new_empty(batch, A.shape[1], channels) for _ in range(2))
    of_D, of_bias = A.new_empty(2, batch, channels)

    ungated = None if gate is None else ungated
    rows_u, rows_step, rows_B, rows_C, rows_gate = map(_by_position, (u, time_step, B, C, gate))
    inputs = rows_u, rows_step, A.T.contiguous(), rows_B, rows_C, D, rows_gate, time_step_bias
    saved = *map(_by_position, (grad_y, grad_last_state, ungated)), kept
    gradients = of_u, of_step, of_A, of_B, of_C, of_D, of_gate, of_bias, of_state
    grid = triton.cdiv(channels, tile["BLOCK_D"]), batch
    _scan_backward[grid](*inputs, *saved, *gradients, length, channels, A.shape[1], softplus, **tile)

    of_u, of_step, of_B, of_C = map(_like, (u, time_step, B, C), (of_u, of_step, of_B, of_C))
    of_gate = None if gate is None else _like(gate, of_gate)
    of_A, of_state = of_A.sum(0).T.contiguous(), of_state.mT.contiguous()
    return of_u, of_step, of_A, of_B, of_C, of_D.sum(0), of_gate, of_bias.sum(0), of_state


def _tile(state_size: int) -> dict[str, int]:
    """Return the tile of a warp: a power of two that holds N, and channels beside it, so that a lane has 16 values."""
    states = triton.next_power_of_2(max(state_size, 1))
    return {"BLOCK_N": states, "BLOCK_D": min(max(512 // states, 2), 32), "num_warps": 1}


def _by_position(tensor: Tensor | None) -> Tensor | None:
    """Return (batch, X, Y) as (batch, Y, X), contiguous, as most projections of a Mamba layer make it."""
    return None if tensor is None else tensor.transpose(1, 2).contiguous()


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return the values, (batch, L, X), in the dtype and the memory order of the tensor, (batch, X, L)."""
    return torch.empty_like(tensor).copy_(values.transpose(1, 2))


# Lengths vary from batch to batch: no kernel is compiled anew for one that 16 divides.
@triton.jit(do_not_specialize=["length"])
def _scan_forward(
    u, time_step, A, B, C, D, gate, bias, initial_state, y, last_state, ungated, kept, length, channels,
    states: tl.constexpr, softplus: tl.constexpr, keep: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = (n[:, None] < states) & (d[None, :] < channels)
    entries = n[:, None] * channels + d[None, :]  # of a matrix (N, D)
    origin, of_batch = batch * length, batch * channels * states

    rate = _load_rate(A, entries, inside)
    skip, offset = _load_vector(D, d, channels), _load_vector(bias, d, channels)
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if initial_state is not None:
        h = tl.load(initial_state + of_batch + entries, inside, other=0)
    for start in range(0, length, POSITIONS):
        chunk = start // KEPT_EVERY
        if keep and start == chunk * KEPT_EVERY:
            position = batch * tl.cdiv(length, KEPT_EVERY) + chunk
            tl.store(kept + position * channels * states + entries, h, inside)
        us = _load_rows(u, origin, start, length, channels, d)
        steps = _effective_steps(time_step, origin, start, length, channels, d, offset, softplus)
        outputs = ()
        for k in tl.static_range(POSITIONS):
            b = _load_row(B, origin, start + k, length, states, n)
            c = _load_row(C, origin, start + k, length, states, n)
            h = tl.exp2(rate * steps[k][None, :]) * h + (steps[k] * us[k])[None, :] * b[:, None]
            outputs = outputs + (tl.sum(h * c[:, None], 0) + skip * us[k],)
        if gate is not None:
            if keep:
                _store_rows(ungated, outputs, origin, start, length, channels, d)
            gates = _load_rows(gate, origin, start, length, channels, d)
            gated = ()
            for k in tl.static_range(POSITIONS):
                gated = gated + (outputs[k] * gates[k] * tl.sigmoid(gates[k]),)
            outputs = gated
        _store_rows(y, outputs, origin, start, length, channels, d)
    tl.store(last_state + of_batch + entries, h, inside)


@triton.jit(do_not_specialize=["length"])
def _scan_backward(
    u, time_step, A, B, C, D, gate, bias, grad_y, grad_last_state, ungated, kept,
    of_u, of_step, of_A, of_B, of_C, of_D, of_gate, of_bias, of_state, length, channels,
    states: tl.constexpr, softplus: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = (n[:, None] < states) & (d[None, :] < channels)
    entries = n[:, None] * channels + d[None, :]  # of a matrix (N, D)
    origin, of_batch = batch * length, batch * channels * states

    rate = _load_rate(A, entries, inside)
    skip, offset = _load_vector(D, d, channels), _load_vector(bias, d, channels)
    dh = tl.load(grad_last_state + of_batch + entries, inside, other=0)
    d_rate = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_skip, d_offset = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    blocks = tl.cdiv(length, POSITIONS)
    for later in range(0, blocks):
        start = (blocks - 1 - later) * POSITIONS
        chunk = start // KEPT_EVERY
        position = batch * tl.cdiv(length, KEPT_EVERY) + chunk
        h = tl.load(kept + position * channels * states + entries, inside, other=0)
        if start > chunk * KEPT_EVERY:  # a block later than that
            us = _load_rows(u, origin, start - POSITIONS, length, channels, d)
            steps = _effective_steps(time_step, origin, start - POSITIONS, length, channels, d, offset, softplus)
            for k in tl.static_range(POSITIONS):
                b = _load_row(B, origin, start - POSITIONS + k, length, states, n)
                h = tl.exp2(rate * steps[k][None, :]) * h + (steps[k] * us[k])[None, :] * b[:, None]

        grads = _load_rows(grad_y, origin, start, length, channels, d)
        if gate is not None:
            gates = _load_rows(gate, origin, start, length, channels, d)
            outputs = _load_rows(ungated, origin, start, length, channels, d)
            d_gates, through = (), ()
            for k in tl.static_range(POSITIONS):
                open_ = tl.sigmoid(gates[k])
                d_gates = d_gates + (grads[k] * outputs[k] * open_ * (1 + gates[k] * (1 - open_)),)
                through = through + (grads[k] * gates[k] * open_,)
            grads = through
            _store_rows(of_gate, d_gates, origin, start, length, channels, d)

        us = _load_rows(u, origin, start, length, channels, d)
        steps = _effective_steps(time_step, origin, start, length, channels, d, offset, softplus)
        before = ()
        for k in tl.static_range(POSITIONS):
            b = _load_row(B, origin, start + k, length, states, n)
            before = before + (h,)
            h = tl.exp2(rate * steps[k][None, :]) * h + (steps[k] * us[k])[None, :] * b[:, None]
            _add_row(of_C, tl.sum(h * grads[k][None, :], 1), origin, start + k, length, states, n)

        d_us, d_steps = (), ()  # from the last position to the first
        for k in tl.static_range(POSITIONS - 1, -1, -1):
            b = _load_row(B, origin, start + k, length, states, n)
            c = _load_row(C, origin, start + k, length, states, n)
            dh += grads[k][None, :] * c[:, None]
            _add_row(of_B, tl.sum(dh * (steps[k] * us[k])[None, :], 1), origin, start + k, length, states, n)
            d_drive = tl.sum(dh * b[:, None], 0)
            dh *= tl.exp2(rate * steps[k][None, :])
            d_exponent = dh * before[k]  # ∂loss/∂(Δ A)
            d_rate += d_exponent * steps[k][None, :]
            d_step = LN_2 * tl.sum(d_exponent * rate, 0) + d_drive * us[k]
            if softplus:
                d_step *= tl.sigmoid(_load_row(time_step, origin, start + k, length, channels, d) + offset)
            d_step = tl.where(start + k < length, d_step, 0)  # for the bias, which has a part of every position
            d_offset += d_step
            d_skip += grads[k] * us[k]
            d_us, d_steps = (d_drive * steps[k] + grads[k] * skip,) + d_us, (d_step,) + d_steps
        _store_rows(of_u, d_us, origin, start, length, channels, d)
        _store_rows(of_step, d_steps, origin, start, length, channels, d)

    tl.store(of_A + of_batch + entries, d_rate, inside)
    tl.store(of_state + of_batch + entries, dh, inside)
    tl.store(of_D + batch * channels + d, d_skip, d < channels)
    tl.store(of_bias + batch * channels + d, d_offset, d < channels)


@triton.jit
def _load_rate(A, entries, inside):
    """Load A / log 2; finite, so that Δ = 0 beyond the end moves nothing where A is minus infinity."""
    rate = LOG2_E * tl.load(A + entries, inside, other=0)
    return tl.where(rate < LOWEST, LOWEST, rate)  # NaN stays


@triton.jit
def _effective_steps(time_step, origin, start, length, channels, d, offset, softplus: tl.constexpr):
    """Return Δ of a block; it is zero beyond the end, where nothing moves then."""
    raws = _load_rows(time_step, origin, start, length, channels, d)
    steps = ()
    for k in tl.static_range(POSITIONS):
        steps = steps + (tl.where(start + k < length, _effective_step(raws[k], offset, softplus), 0),)
    return steps


@triton.jit
def _effective_step(raw, offset, softplus: tl.constexpr):
    """Return Δ: with softplus log(1 + e^x), without losing the digits of a small e^x."""
    x = raw + offset
    if softplus:
        small = tl.exp(-tl.abs(x))
        sum_ = 1 + small
        exact = sum_ == 1
        log1p = tl.where(exact, small, tl.log(sum_) * (small / tl.where(exact, 1, sum_ - 1)))
        x = tl.maximum(x, 0) + log1p
    return x


@triton.jit
def _load_vector(pointer, columns, width):
    """Load entries of a vector (width,): zero beyond its end, or where there is none."""
    values = tl.zeros(columns.shape, tl.float32)
    if pointer is not None:
        values = tl.load(pointer + columns, columns < width, other=0)
    return values


@triton.jit
def _within(columns, row, length, width):
    """Return the mask for a row of a matrix (length, width)."""
    return columns < tl.where(row < length, width, 0)


@triton.jit
def _load_row(pointer, origin, row, length, width, columns):
    """Load a row of a matrix (length, width): zero beyond its ends."""
    offsets, mask = (origin + row) * width + columns, _within(columns, row, length, width)
    return tl.load(pointer + offsets, mask, other=0).to(tl.float32)


@triton.jit
def _load_rows(pointer, origin, start, length, width, columns):
    """Load the rows of a block."""
    rows = ()
    for k in tl.static_range(POSITIONS):
        rows = rows + (_load_row(pointer, origin, start + k, length, width, columns),)
    return rows


@triton.jit
def _store_rows(pointer, rows, origin, start, length, width, columns):
    for k in tl.static_range(POSITIONS):
        offsets = (origin + start + k) * width + columns
        tl.store(pointer + offsets, rows[k], _within(columns, start + k, length, width))


@triton.jit
def _add_row(pointer, values, origin, row, length, width, columns):
    offsets, mask = (origin + row) * width + columns, _within(columns, row, length, width)
    tl.atomic_add(pointer + offsets, values, mask, sem="relaxed")


scan = define_scan("triton", forward, backward)
