"""Which kernel serves a call: kernel_plan and decode_plan, with no GPU and nothing computed."""

import pytest
import torch
from cases import LOW_PRECISION, frequencies, qkv, randn

import lminf_cuda
from lminf_cuda import KernelPlan, decode_plan, kernel_plan, ops


def spread(shape, dtype=torch.bfloat16):
    """A tensor of any size in the memory of one row."""
    return torch.empty(shape[-1], dtype=dtype).expand(shape)


def decode_arguments(batch=1, heads_q=8, heads_kv=2, head_dim=64, window=1000, dtype=torch.float32):
    ring, few = (batch, heads_kv, 1024, head_dim), (batch, heads_kv, 16, head_dim)
    one = (batch, heads_kv, 1, head_dim)
    q, *rest = randn(0, (batch, heads_q, 1, head_dim), one, one, ring, ring, few, few, dtype=dtype)
    return q, *rest, torch.full((batch,), 5000), window


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_which_kernel_serves_a_forward(dtype):
    """16-bit elements in aligned rows run on tensor cores, everything else on ordinary ones."""

    def kernel(*tensors):
        return kernel_plan(*tensors, 2, 4, device_capability=80).kernel

    assert kernel(*qkv(8, 8, dtype=dtype)) == "sm80"
    assert kernel(*qkv(8, 8, dtype=dtype, head_dim=40)) == "sm80"
    assert kernel(*qkv(8, 8)) == "plain"
    assert kernel(*qkv(8, 8, dtype=dtype, head_dim=60)) == "plain"
    assert kernel(*qkv(8, 8, dtype=dtype, head_dim=264)) == "plain"
    wide = [torch.cat([x, x], -1) for x in qkv(8, 8, dtype=dtype)]
    assert kernel(*(x[..., 8:72] for x in wide)) == "sm80"
    assert kernel(*(x[..., 3:67] for x in wide)) == "plain"


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_which_kernel_serves_a_step(dtype):
    def kernel(**changes):
        return decode_plan(*decode_arguments(**changes), device_capability=80).kernel

    assert kernel(dtype=dtype) == "sm80"
    assert kernel() == "plain"
    assert kernel(dtype=dtype, head_dim=60) == "plain"
    assert kernel(dtype=dtype, head_dim=264) == "plain"


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_which_kernel_serves_a_forward_on_hopper(dtype):
    """On compute capability 9.0 alone, what the tensor cores cover in tensors that TMA covers: a
    side that is stepped over has a stride of its own."""

    def kernel(q, k, v, window=4, device_capability=90, **options):
        plan = kernel_plan(q, k, v, 2, window, device_capability=device_capability, **options)
        return plan.kernel

    for head_dim in (8, 40, 64, 80, 128, 136, 256):
        assert kernel(*qkv(8, 8, dtype=dtype, head_dim=head_dim)) == "sm90"
    q, k, v = qkv(8, 8, batch=2, heads_q=4, heads_kv=2, dtype=dtype)
    for options in (
        {"inv_freq": frequencies(64)},
        {"softcap": 2.0, "alibi_slopes": torch.ones(4), "sink_logits": torch.ones(4)},
        {"k_start": torch.zeros(2, dtype=torch.int64)},
    ):
        assert kernel(q, k, v, **options) == "sm90"
    own_globals = {"global_k": k[:, :, :2], "global_v": v[:, :, :2]}
    assert kernel(q, k, v, window=16, **own_globals) == "sm90"
    assert kernel(q, k, v, window=15, **own_globals) == "sm80"  # a tile might hold unused slots
    assert kernel(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))) == "sm90"
    for other in (80, 86, 89, 100, 120):
        assert kernel(q, k, v, device_capability=other) == "sm80"
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert kernel(q[:1], k[:1], v[:1], cu_seqlens=starts) == "sm80"
    assert kernel(*qkv(8, 8)) == "plain"
    assert kernel(*qkv(8, 8, dtype=dtype, head_dim=60)) == "plain"
    assert kernel(*qkv(8, 8, dtype=dtype, head_dim=264)) == "plain"
    assert kernel(*(torch.cat([x, x], -1)[..., 3:67] for x in (q, k, v))) == "plain"

    # A side repeated by a stride of 0; keys that are rotated are read from where that puts them.
    one = k[:, :1].expand(-1, 2, -1, -1)
    assert kernel(q, k, one) == kernel(q, one, v) == "sm80"
    assert kernel(q, one, v, inv_freq=frequencies(64)) == "sm90"


def test_a_plan_in_full_on_hopper():
    """Tiles of 128 queries and 128 keys, two slots of the one and two stages of the other
    (csrc/cuda/prefill/sm90_tiles.h), and as many blocks as there are multiprocessors, or tiles."""
    q, k, v = (torch.empty(2, heads, 1000, 128, dtype=torch.bfloat16) for heads in (8, 4, 4))
    options = dict(inv_freq=frequencies(128), device_capability=90)
    plan = kernel_plan(q, k, v, 16, 200, multiprocessors=78, **options)
    assert plan == KernelPlan(
        kernel="sm90",
        block_m=128,
        block_n=128,
        splits=1,
        overlaps=False,
        blocks=78,
        threads=384,
        shared_bytes=2 * 128 * (2 * 128 + 4 * 128) + 2 * 640 + 256,
        workspace_bytes=2 * 4 * (1000 + 16) * 128 * 2,
    )
    assert kernel_plan(q, k, v, 16, 200, multiprocessors=132, **options).blocks == 128


def test_a_plan_in_full():
    """Tiles of 128 queries and 48 keys (csrc/cuda/common/plan.h); the workspace holds the keys
    rotated by position and the 16 global ones rotated by -max_distance."""
    q, k, v = (spread((2, heads, 1000, 128)) for heads in (8, 4, 4))
    plan = kernel_plan(q, k, v, 16, 200, inv_freq=frequencies(128), device_capability=80)
    assert plan == KernelPlan(
        kernel="sm80",
        block_m=128,
        block_n=48,
        splits=1,
        overlaps=False,
        blocks=8 * 8 * 2,
        threads=128,
        shared_bytes=2 * 128 * (128 + 4 * 48) + 640,
        workspace_bytes=2 * 4 * (1000 + 16) * 128 * 2,
    )
    assert kernel_plan(q, k, v, 16, 200, device_capability=(8, 0)).workspace_bytes == 0
    assert kernel_plan(q, k, v, 16, 1000, device_capability=80, inv_freq=frequencies(128)) == (
        KernelPlan(**{**vars(plan), "workspace_bytes": 2 * 4 * 1000 * 128 * 2})
    )


def test_the_workspace_grows_with_the_keys_that_are_met():
    """300 queries, window 4096: 4395 keys in windows, and the global ones; not the keys between."""

    def keys(seqlen_k, seqlen_q=300, window=4096, **options):
        q, k = spread((1, 32, seqlen_q, 128)), spread((1, 8, seqlen_k, 128))
        plan = kernel_plan(
            q, k, k, 16, window, inv_freq=frequencies(128), device_capability=90, **options
        )
        assert plan.workspace_bytes % (8 * 128 * 2) == 0
        return plan.workspace_bytes // (8 * 128 * 2)

    for seqlen_k in (5_000, 100_000, 20_000_000):
        assert keys(seqlen_k) == 300 + 4096 - 1 + 16
        assert keys(seqlen_k, max_distance=4900) == 300 + 4096 - 1 + 16 + 16
        assert keys(seqlen_k, seqlen_q=1, window=1) == 1 + 16
    # The windows reach all keys: among them are the near ones, and none is far.
    assert keys(4395, max_distance=4200) == 4395 + 16
    assert keys(4000) == 4000
    assert keys(4396, max_distance=4395) == 4395 + 16 + 16


def test_splits_fill_the_device():
    """As many blocks as are resident at once, and about eight tiles of 16 keys a split."""

    def splits(multiprocessors, capability=80, **changes):
        arguments = decode_arguments(**{"dtype": torch.bfloat16, **changes})
        plan = decode_plan(
            *arguments, device_capability=capability, multiprocessors=multiprocessors
        )
        assert plan.blocks == arguments[0].shape[0] * 2 * plan.splits
        assert (plan.workspace_bytes > 0) == (plan.splits > 1)
        assert plan.overlaps == (capability >= 90 and plan.splits > 1)
        return plan.splits

    # Three blocks of two key heads each, by registers; four of the plain kernel.
    assert [splits(n) for n in (1, 2, 4, 132)] == [1, 3, 6, 8]
    assert [splits(n, dtype=torch.float32) for n in (1, 2, 4, 132)] == [2, 4, 8, 8]
    assert splits(4, batch=8) == 1
    # 70 KiB a block at head dim 128, 36 at 64: 228 KiB a multiprocessor, 164 or 100.
    assert [splits(4, c, head_dim=128) for c in (80, 86, 89, 90, 100, 120)] == [4, 2, 2, 6, 6, 2]
    assert [splits(4, c) for c in (80, 86, 89, 90, 100, 120)] == [6, 4, 4, 6, 6, 4]
    # 16 tiles are worth two splits, 15 one; after that a few tiles more are a split more.
    assert [splits(132, window=n) for n in (224, 225, 240, 241, 368, 369)] == [1, 2, 2, 3, 3, 4]


def test_splits_of_a_layer_of_an_8b_model_on_an_h200():
    """32 / 8 heads, head dim 128, window 4096, 16 global tokens: 257 tiles of keys. At batch 1 two
    blocks on each of the 132 multiprocessors, of two tiles a warp."""
    for batch, splits in ((1, 33), (2, 24), (4, 12), (8, 6), (16, 3), (32, 1)):
        one = spread((batch, 8, 1, 128))
        ring, few = (torch.empty(batch, 8, n, 128, dtype=torch.bfloat16) for n in (4096, 16))
        plan = decode_plan(
            spread((batch, 32, 1, 128)), one, one, ring, ring, few, few,
            torch.zeros(batch, dtype=torch.int64), 4096, device_capability=90,
        )  # fmt: skip
        assert plan == KernelPlan(
            kernel="sm80",
            block_m=16,
            block_n=16,
            splits=splits,
            overlaps=splits > 1,
            blocks=batch * 8 * splits,
            threads=128,
            shared_bytes=2 * 128 * (16 + 2) + 4 * (2 * 2 * 16 * 2 * 128 + 16 * 8),
            workspace_bytes=0 if splits == 1 else batch * 32 * splits * (8 + 4 * 128),
        )


def test_planning_runs_nothing():
    arguments = decode_arguments()
    cache = [x.clone() for x in arguments[3:7]]
    decode_plan(*arguments, device_capability=80)
    decode_plan(*arguments)
    for before, after in zip(cache, arguments[3:7], strict=True):
        assert torch.equal(before, after)
    q, k, v = qkv(300, 300)
    kernel_plan(q, k, v, 2, 30)
    out, _ = torch.ops.lminf.lambda_attn(q, k, v, 2, 30)  # and the next call runs again
    expected = lminf_cuda.reference.lambda_attention(q, k, v, n_global=2, window=30)
    torch.testing.assert_close(out, expected, rtol=0, atol=3e-6)


def test_the_plan_on_a_cpu():
    plan = kernel_plan(*qkv(300, 300), 2, 30)
    assert plan.kernel == ops.cpu_isa()
    assert plan.threads == torch.get_num_threads()
    assert plan.blocks >= 1 and plan.block_m >= 1 and plan.workspace_bytes == 0
    assert decode_plan(*decode_arguments()).kernel == ops.cpu_isa()


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (1, 2, 0, 8)], ids=["no batch", "no queries"])
def test_nothing_to_do(shape):
    q, k = torch.zeros(shape), torch.zeros(shape[0], 2, 5, 8)
    for capability in (None, 80):
        assert kernel_plan(q, k, k, 1, 2, device_capability=capability).kernel == "none"


def test_refusals():
    q, k, v = qkv(8, 8)
    with pytest.raises(ValueError, match="device_capability is 75, but must be at least 80"):
        kernel_plan(q, k, v, 1, 2, device_capability=75)
    with pytest.raises(ValueError, match="multiprocessors is 0"):
        kernel_plan(q, k, v, 1, 2, device_capability=80, multiprocessors=0)
    with pytest.raises(ValueError, match="window is 0"):
        kernel_plan(q, k, v, 1, 0, device_capability=80)
    with pytest.raises(TypeError):
        kernel_plan(q, k, v, 1, device_capability=80, windows=3)


def test_more_batch_entries_times_heads_than_a_grid_is_high():
    """65,535 is the limit of a grid's second and third dimension, 2^31 - 1 that of the first."""
    q, k, v = (spread((70_000, heads, 5, 64)) for heads in (4, 2, 2))
    plan = kernel_plan(q, k, v, 1, 2, device_capability=80)
    assert plan.blocks == 70_000 * 4


def test_more_elements_than_an_int32_counts():
    """Keys of 2^31 elements and more, in one head and over all heads."""
    for shape in ((1, 1, (1 << 31) - 1, 64), (3, 8, 1 << 26, 128)):
        k = spread(shape)
        q = spread((*shape[:2], 10, shape[3]))
        plan = kernel_plan(q, k, k, 4, 100, device_capability=80)
        assert plan.kernel == "sm80" and plan.blocks == shape[0] * shape[1]
    rows = spread((1 << 28, 8, 1, 1))
    with pytest.raises(RuntimeError, match="needs 2147483648 blocks, a launch takes at most"):
        kernel_plan(rows, rows, rows, 0, 1, device_capability=80)
    with pytest.raises(ValueError, match="positions must stay below 2\\^31"):
        kernel_plan(q, spread((3, 8, 1 << 31, 128)), spread((3, 8, 1 << 31, 128)), 4, 100)
