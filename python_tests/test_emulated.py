"""What is special about the CUDA kernels as the emulation runs them; the op tests themselves run on
the backend "emulated" beside the others."""

import subprocess
import time

import emulated
import pytest
import torch
from cases import DTYPES, check_lambda_attn, frequencies, options, qkv, randn, run_reference

from lminf_cuda import decode_plan

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}"),
]


@pytest.fixture
def shuffled(request):
    emulated.module().set_schedule_seed(request.param)
    yield
    emulated.module().set_schedule_seed(0)


@pytest.mark.parametrize("shuffled", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_order_of_threads_gives_the_same_bits(shuffled, dtype):
    """Every order gives one result: nothing depends on who comes first."""
    q, k, v = qkv(150, 200, heads_q=4, heads_kv=2, dtype=dtype)
    score = dict(options("all", 4, 64, 60), max_distance=60)
    out, lse = emulated.ops().lambda_attn(q, k, v, 20, 40, **score)
    emulated.module().set_schedule_seed(0)
    in_turn, lse_in_turn = emulated.ops().lambda_attn(q, k, v, 20, 40, **score)
    assert torch.equal(out, in_turn) and torch.equal(lse, lse_in_turn)


@pytest.mark.parametrize("shuffled", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_order_of_threads_decodes_the_same_bits(shuffled, dtype):
    def step():
        q, k, v, *cache = randn(
            4, (2, 4, 1, 64), *[(2, 2, 1, 64)] * 2, *[(2, 2, n, 64) for n in (300, 300, 9, 9)],
            dtype=dtype,
        )  # fmt: skip
        positions = torch.tensor([1000, 40])
        score = dict(options("rope", 4, 64), max_distance=350)
        return (*emulated.ops().lambda_decode(q, k, v, *cache, positions, 300, **score), *cache)

    shuffled_results = step()
    emulated.module().set_schedule_seed(0)
    for ours, in_turn in zip(shuffled_results, step(), strict=True):
        assert torch.equal(ours, in_turn)


@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_a_device_of_another_size_decodes_the_same(multiprocessors):
    """The number of splits follows the device's multiprocessors."""
    arguments = randn(
        4, (1, 4, 1, 64), *[(1, 2, 1, 64)] * 2, *[(1, 2, n, 64) for n in (1024, 1024, 9, 9)]
    )
    arguments += [torch.tensor([3000]), 1024]
    usual, usual_lse = emulated.ops().lambda_decode(*arguments)
    emulated.module().set_device(multiprocessors=multiprocessors)
    out, lse = emulated.ops().lambda_decode(*arguments)
    emulated.module().set_device()
    torch.testing.assert_close(out, usual, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, usual_lse, rtol=0, atol=1e-6)


def check_merge_overlaps(option, dtype):
    """From compute capability 9.0 on, in code for it, as the plan says; it changes no bit. With a
    bias the kernels on tensor cores have a second one also where there is one split."""
    window = 300
    score = dict(options(option, 4, 64, window), max_distance=window)
    for multiprocessors in (1, 6):
        results = {}
        for capability, code in ((80, True), (89, True), (90, False), (90, True), (120, True)):
            q, k, v, *cache = randn(
                4, (2, 4, 1, 64), *[(2, 2, 1, 64)] * 2, *[(2, 2, n, 64) for n in (300, 300, 9, 9)],
                dtype=dtype,
            )  # fmt: skip
            arguments = (q, k, v, *cache, torch.tensor([1000, 40]), window)
            facts = dict(capability=capability, multiprocessors=multiprocessors, has_sm90=code)
            emulated.module().take_launches()
            with emulated.device(**facts):
                results[capability, code] = (
                    *emulated.ops().lambda_decode(*arguments, **score),
                    *cache,
                )
            first, *rest = emulated.module().take_launches()
            plan = decode_plan(
                *arguments, device_capability=capability, multiprocessors=multiprocessors, **score
            )
            assert first["kernel"] == f"lambda_decode_{plan.kernel}"
            assert first["blocks"] == plan.blocks == 4 * plan.splits
            can_overlap = capability >= 90 and code
            assert first["triggered"] == (first["blocks"] if can_overlap else 0)
            assert not first["overlaps"]
            assert len(rest) == (plan.splits > 1)
            assert (plan.splits > 1) == (multiprocessors > 1)
            for launch in rest:
                assert launch["kernel"] == "lambda_decode_merge" and launch["blocks"] == 8
                assert launch["overlaps"] == can_overlap
            assert plan.overlaps == (capability >= 90 and len(rest) == 1)
        for capability, code in ((90, False), (120, True)):
            alike = zip(results[capability, code], results[90, True], strict=True)
            assert all(torch.equal(x, y) for x, y in alike)


@pytest.mark.parametrize("shuffled", [0, 1, 2], indirect=True)
@pytest.mark.parametrize("option", ["rope", "distance bias hides"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_merge_of_the_splits_overlaps_them(shuffled, option, dtype):
    check_merge_overlaps(option, dtype)


@pytest.mark.parametrize("head_dim", [40, 128, 264])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_in_more_splits_than_are_merged_at_once(head_dim, dtype):
    """64 are read together (decode/launch.cu), and 128 dims; a split may hold nothing visible."""
    window = 8700
    q, k, v, *caches = randn(
        6, (1, 2, 1, head_dim), *[(1, 1, 1, head_dim)] * 2,
        *[(1, 1, n, head_dim) for n in (window, window, 2, 2)], dtype=dtype,
    )  # fmt: skip
    for position in (40, 20_000):
        cache = [x.clone() for x in caches]
        with emulated.device(capability=90, multiprocessors=132):
            out, lse = emulated.ops().lambda_decode(
                q, k, v, *cache, torch.tensor([position]), window, sink_logits=torch.ones(2)
            )
        assert emulated.module().take_launches()[-2]["blocks"] > 64
        slots = torch.arange(max(0, position - window + 1), position) % window
        few = 2 if position > window else 0
        keys = torch.cat([caches[2][:, :, :few], caches[0][:, :, slots], k], 2)
        values = torch.cat([caches[3][:, :, :few], caches[1][:, :, slots], v], 2)
        kwargs = dict(n_global=0, window=1 << 20, sink_logits=torch.ones(2))
        truth, truth_lse = run_reference(q, keys, values, True, **kwargs)
        eager, _ = run_reference(q, keys, values, False, **kwargs)
        bound = 5e-6 if dtype == torch.float32 else 2 * (eager - truth).abs().max() + 1e-3
        assert (out - truth).abs().max() <= bound
        assert (lse - truth_lse).abs().max() <= (5e-6 if dtype == torch.float32 else 5e-3)


def test_the_kernel_for_hopper_runs_where_it_is_built_and_covers():
    """On compute capability 9.0; without code for sm_90a in the build, the generic one does."""

    def kernel(*tensors, score=None, **facts):
        with emulated.device(capability=90, **facts):
            return emulated.kernel(*tensors, 2, 4, **(score or {}))

    low, full = qkv(8, 8, dtype=torch.bfloat16), qkv(8, 8)
    assert kernel(*low) == "sm90"
    assert kernel(*low, has_sm90a=False) == "sm80"
    assert kernel(*low, score={"distance_bias": torch.zeros(2, 5)}) == "sm80"
    assert kernel(*full) == "plain"
    assert emulated.kernel(*low, 2, 4) == "sm80"


@pytest.mark.parametrize("shuffled", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("multiprocessors", [1, 5, 132])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_another_order_of_threads_gives_the_same_bits_on_hopper(
    shuffled, multiprocessors, head_dim
):
    """Nor does it matter how many tiles a block takes in turn."""
    q, k, v = qkv(300, 310, heads_q=4, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16)
    score = dict(options("all", 4, head_dim), max_distance=160)
    with emulated.device(capability=90, multiprocessors=multiprocessors):
        out, lse = emulated.ops().lambda_attn(q, k, v, 20, 140, **score)
    emulated.module().set_schedule_seed(0)
    in_turn, lse_in_turn = check_lambda_attn(
        "emulated_sm90", q, k, v, n_global=20, window=140, **score
    )
    assert torch.equal(out, in_turn) and torch.equal(lse, lse_in_turn)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_unused_slots_of_the_globals_on_hopper(head_dim):
    """TMA brings whole tiles of 16 global tokens; what no query sees yet may hold anything."""
    q, k, v = qkv(10, 10, head_dim=head_dim, dtype=torch.bfloat16)
    few = [torch.full((1, 1, 16, head_dim), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    for x, filled in zip(few, (k, v), strict=True):
        x[:, :, :10] = filled
    with emulated.device(capability=90):
        check_lambda_attn(
            "emulated", q, k, v, n_global=16, window=3, max_distance=5, global_k=few[0],
            global_v=few[1], **options("rope", 2, head_dim),
        )  # fmt: skip


@pytest.mark.parametrize("n_global", [0, 3])
def test_keys_that_are_not_read_as_they_stand_may_have_any_strides_on_hopper(n_global):
    """Rotated keys come from the workspace, so TMA never sees those that are given."""
    q, k, v = qkv(20, 20, dtype=torch.bfloat16)
    few = qkv(1, 1, dtype=torch.bfloat16)[1].expand(-1, -1, n_global, -1)
    for keys, held in ((k[:, :, :1].expand_as(k), {}), (k, {"global_k": few, "global_v": v})):
        held = {name: x[:, :, :n_global] for name, x in held.items()}
        score = options("rope", 2, 64)
        with emulated.device(capability=90):
            assert emulated.kernel(q, keys, v, n_global, 30, **held, **score) == "sm90"
            check_lambda_attn("emulated", q, keys, v, n_global=n_global, window=30, **held, **score)


def test_too_large_a_head_dim_is_refused():
    q, k, v = qkv(4, 4, head_dim=2049)
    with pytest.raises(ValueError, match="head dim is 2049, but on CUDA it must be at most 2048"):
        emulated.ops().lambda_attn(q, k, v, 1, 2)


@pytest.mark.parametrize("window", [600, 1000, 1024])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_in_several_splits(head_dim, window, dtype):
    """A window long enough to be cut up, at positions before, at and past its edges."""
    batch, heads_q, heads_kv, n_global = 1, 6, 1, 20
    ring = (batch, heads_kv, 1024, head_dim)
    one, few = (batch, heads_kv, 1, head_dim), (batch, heads_kv, n_global, head_dim)
    for position in (0, 15, window - 1, window, window + 7, 5 * window + 3):
        q, k, v, ring_k, ring_v, global_k, global_v = randn(
            7, (batch, heads_q, 1, head_dim), one, one, ring, ring, few, few, dtype=dtype
        )
        score = dict(options("none", heads_q, head_dim))
        cache = [x.clone() for x in (ring_k, ring_v, global_k, global_v)]
        out, lse = emulated.ops().lambda_decode(
            q, k, v, *cache, torch.tensor([position]), window, **score
        )
        # Without rotation the cache is the sequence, in another order.
        first = max(0, position - window + 1)
        slots = torch.arange(first, position) % 1024
        globals_seen = max(0, min(n_global, first))
        keys = torch.cat([global_k[:, :, :globals_seen], ring_k[:, :, slots], k], 2)
        values = torch.cat([global_v[:, :, :globals_seen], ring_v[:, :, slots], v], 2)
        kwargs = dict(n_global=0, window=1 << 20)
        truth, truth_lse = run_reference(q, keys, values, True, **kwargs)
        eager, _ = run_reference(q, keys, values, False, **kwargs)
        bound = 5e-6 if dtype == torch.float32 else 2 * (eager - truth).abs().max() + 1e-3
        assert (out - truth).abs().max() <= bound, position
        assert (lse - truth_lse).abs().max() <= (5e-6 if dtype == torch.float32 else 5e-3)


def test_many_packed_sequences_with_many_globals():
    """More global keys than rows: the far keys then stand row by row (prefill/launch.cu)."""
    lengths = [3, 40, 0, 70, 1, 25]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = qkv(sum(lengths), sum(lengths), dtype=torch.float32)
    check_lambda_attn(
        "emulated", q, k, v, n_global=50, window=6, cu_seqlens=starts, **options("rope", 2, 64)
    )


def test_speed():
    """512 tokens, two heads, D 64: the emulation is fast enough to test with."""
    q, k, v = qkv(512, 512, heads_kv=2, dtype=torch.bfloat16)
    emulated.module()
    start = time.perf_counter()
    emulated.ops().lambda_attn(q, k, v, 16, 512, inv_freq=frequencies(64))
    assert time.perf_counter() - start < 3.0


@pytest.mark.slow
def test_cpp_tests_pass():
    """The planted faults are caught, and every PTX wrapper's host body is right."""
    names = ["emulation_test", "emulation_sm90_test", "emulation_overlap_test"]
    names += ["ptx_sm80_test", "ptx_sm90_test"]
    folder = emulated.build(*names)
    for name in names:
        done = subprocess.run([folder / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_more_batch_entries_times_heads_than_a_grid_is_high():
    """65,535 is the limit of a grid's second and third dimension. All but the first and the last
    entry are padding, whose blocks have next to nothing to do."""
    batch = 66_000
    q, k, v = randn(5, *[(batch, 1, 1, 8)] * 3, dtype=torch.bfloat16)
    k_start = torch.full((batch,), -1)
    real = [0, batch - 1]
    k_start[real] = 0
    out, lse = emulated.ops().lambda_attn(q, k, v, 0, 2, k_start=k_start)
    assert torch.equal(out[real], v[real])
    padding = slice(1, batch - 1)
    assert (out[padding] == 0).all() and (lse[padding] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_past_32_bits(dtype):
    """Batch entries, heads and rows further apart than an int32 counts elements. The memory between
    them is never touched, so it is never there."""
    far = (1 << 31) + 64
    room = torch.empty(2 * far + 64 * 64, dtype=dtype)
    q, k, v = qkv(40, 40, batch=2, dtype=dtype)

    def spread(x, stride):
        view = room.as_strided(x.shape, stride)
        view.copy_(x)
        return view

    score = dict(n_global=3, window=9, **options("rope", 2, 64))
    check_lambda_attn("emulated", q, spread(k, (far, 0, 64, 1)), v, **score)
    few = [x[:1, :, :3] for x in (k, v)]
    rows = [spread(x, (0, 0, far, 1)) for x in few]
    check_lambda_attn("emulated", q[:1, :, :3], rows[0], few[1], **score)
    check_lambda_attn("emulated", q[:1, :, :3], few[0], spread(few[1], (0, 0, far, 1)), **score)
