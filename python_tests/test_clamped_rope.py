"""clamped_rope against the float64 reference."""

import pytest
import torch
from cases import DTYPES, NAN, assert_right, call, frequencies, randn

from lminf_cuda import reference

POSITIONS = {
    "from 0": torch.arange(37),
    "descending": torch.arange(37).flip(0),
    "negative": torch.arange(37) - 20,
    "around 2^24": torch.arange(37) + (1 << 24) - 17,
    "around 2e8": torch.arange(37) + 200_000_000,
    "up to 2^31 - 1": torch.arange(37) + (1 << 31) - 37,
    "down to -2^31 + 1": torch.arange(37) - (1 << 31) + 1,
    "repeated": torch.zeros(37, dtype=torch.int64) + 5,
}
LIMITS = [None, 0, 1, 16, 200_000_010, -3, (1 << 63) - 1]


def check(backend, x, positions, inv_freq, **options):
    out = call(backend, "clamped_rope", x, positions, inv_freq, **options)
    assert out.dtype == x.dtype
    if torch.empty_like(x).stride(-1) == 1:
        assert out.stride() == torch.empty_like(x).stride()
    truth = reference.clamped_rope(x.double(), positions, inv_freq, **options)
    eager = None
    if x.dtype != torch.float32:
        eager = reference.clamped_rope(x, positions, inv_freq, **options)
    assert_right("rotated", out, truth, eager)
    rest = slice(2 * len(inv_freq), None)
    assert torch.equal(out[..., rest], x[..., rest])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("limit", LIMITS)
def test_positions(backend, positions, limit, dtype):
    (x,) = randn(0, (2, 3, 37, 64), dtype=dtype)
    check(backend, x, positions, frequencies(64), max_position=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "dims",
    [(2, 2), (3, 2), (8, 8), (40, 40), (40, 10), (64, 32), (65, 64), (72, 72), (80, 32), (96, 96),
     (128, 128), (256, 64), (260, 258)],
    ids=str,
)  # fmt: skip
def test_head_dims(backend, dims, interleaved, dtype):
    head_dim, rotary_dim = dims
    (x,) = randn(1, (1, 2, 19, head_dim), dtype=dtype)
    for inv_freq in (frequencies(rotary_dim), frequencies(rotary_dim).double() * (1 + 1e-9)):
        check(
            backend,
            x,
            torch.arange(19) * 7,
            inv_freq,
            max_position=100,
            scaling=1.3,
            interleaved=interleaved,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_of_each_row(backend, dtype):
    (x,) = randn(2, (3, 2, 11, 16), dtype=dtype)
    positions = torch.stack([torch.arange(11) + start for start in (0, -6, 200_000_000)])
    check(backend, x, positions, frequencies(16), max_position=150_000_000)
    strided = torch.full((3, 22), -999)
    strided[:, ::2] = positions
    check(backend, x, strided[:, ::2], frequencies(16))
    check(backend, x, positions[1:2].expand(3, -1), frequencies(16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend, dtype):
    (data,) = randn(3, (2, 3, 13, 20), dtype=dtype)
    room = torch.full((2, 3 + 1, 13 + 4, 20 + 6), NAN, dtype=dtype)
    sliced = room[:, 1:, 2:-2, 3:-3]
    sliced.copy_(data)
    for x in (
        data.transpose(1, 2).contiguous().transpose(1, 2),
        data.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        data.mT.contiguous().mT,
        sliced,
        data[:1].expand(4, -1, -1, -1),
    ):
        check(backend, x, torch.arange(13), frequencies(16))


def test_nothing_to_rotate(backend):
    (x,) = randn(4, (2, 3, 0, 16))
    out = call(backend, "clamped_rope", x, torch.arange(0), frequencies(16))
    assert out.shape == x.shape


def test_turning_back_gives_the_input(backend):
    (x,) = randn(5, (1, 2, 50, 32))
    positions = torch.arange(50) * 1_000_003
    there = call(backend, "clamped_rope", x, positions, frequencies(32), scaling=2.0)
    back = call(backend, "clamped_rope", there, -positions, frequencies(32), scaling=0.5)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("position", [0, 1000, 16_777_217, 200_000_000])
def test_scores_depend_on_distance_alone(backend, position):
    """What float32 angles lose: at 2e8 neighbouring positions would turn by the same angle."""
    q, k = randn(6, (1, 1, 8, 64), (1, 1, 8, 64))
    inv_freq = frequencies(64)

    def scores(start):
        positions = torch.arange(8) + start
        return (
            call(backend, "clamped_rope", q, positions, inv_freq)
            @ call(backend, "clamped_rope", k, positions, inv_freq).mT
        )

    torch.testing.assert_close(scores(position), scores(0), rtol=0, atol=1e-5)
