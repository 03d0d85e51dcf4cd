"""What is special about the CUDA kernels' PTX, interpreted (csrc/ptx_interpreter); the op tests
themselves run on the backends "ptx" and "ptx_sm90" beside the others."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import emulated
import pytest
import torch
from cases import DTYPES, call, check_lambda_attn, frequencies, options, qkv, randn
from test_emulated import check_merge_overlaps
from test_lambda_decode import Cache, step
from test_middle_topk import case as middle_case

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(emulated.missing("ptx") is not None, reason=f"{emulated.missing('ptx')}"),
]


@pytest.fixture(autouse=True)
def _interpreted():
    with emulated.way("ptx"):
        yield
        emulated.module().set_schedule_seed(0)
        emulated.module().restore_kernel_texts()
        emulated.module().shorten("")


def test_cpp_tests_pass():
    """Each group of opcodes by the ISA's rules, and every PTX wrapper, compiled by nvcc."""
    names = ["ptx_interpreter_test", "ptx_sm80_test", "ptx_sm90_test"]
    folder = emulated.build(*names, name="ptx")
    for name in names:
        done = subprocess.run([folder / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_of_the_build_is_understood():
    """Also those that no test happens to run."""
    emulated.module().decode_all()
    targets = {target for target, _, _ in emulated.module().kernel_texts()}
    assert targets == {"80", "90", "90a"}


@pytest.mark.parametrize(
    ("capability", "target"), [(80, "80"), (89, "80"), (90, "90a"), (100, "90"), (120, "90")]
)
def test_a_device_runs_what_a_driver_would_take(capability, target):
    q, k, v = qkv(40, 50, dtype=torch.bfloat16)
    emulated.module().take_launches()
    with emulated.device(capability=capability):
        check_lambda_attn("ptx", q, k, v, n_global=3, window=20, **options("rope", 2, 64))
    launches = emulated.module().take_launches()
    assert {launch["target"] for launch in launches} == {target}
    assert launches[-1]["kernel"] == f"lambda_attn_sm{90 if capability == 90 else 80}"


@pytest.mark.parametrize(("capability", "target"), [(80, "80"), (90, "90a"), (100, "90")])
def test_every_kernel_of_the_build_runs(capability, target):
    """In every type and head dim that is compiled; the op tests ask whether it is right."""
    emulated.module().take_launches()
    for dtype, head_dim in itertools.product(DTYPES, (64, 65, 80, 96, 128, 256, 520)):
        q, k, v = qkv(20, 40, head_dim=head_dim, dtype=dtype)
        cache = Cache.empty(1, 1, 256, 4, head_dim, dtype)
        for x in cache.tensors():
            x.normal_()
        token = [x[:, :, :1] for x in (q, k, v)]
        with emulated.device(capability=capability):
            for option in ("rope", "distance bias"):
                score = dict(options(option, 2, head_dim, 300), max_distance=300)
                call("ptx", "lambda_attn", q, k, v, 3, 9, **score)
                step("ptx", *token, cache, torch.tensor([700]), 256, **score)
            call("ptx", "clamped_rope", q, torch.arange(20), frequencies(64))
            for seqlen in (100, 2100):
                call("ptx", "middle_topk", **middle_case(seqlen, head_dim=head_dim, dtype=dtype))
    launches = emulated.module().take_launches()
    assert {launch["target"] for launch in launches} == {target}
    not_run = {name for _, name, _ in kernels_named("", target)} - {x["name"] for x in launches}
    # The first is for the driver to tell of; the others' code stands in 9.0a alone.
    expected = ("probe_kernel", *(["lambda_attn_sm90"] if target != "90a" else []))
    assert {name for name in not_run if not any(part in name for part in expected)} == set()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("backend", ["ptx", "ptx_sm90"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_another_order_gives_the_same_bits(backend, seed, head_dim):
    """Warps, blocks and copies in another order: nothing depends on who comes first."""
    q, k, v = qkv(300, 310, heads_q=4, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16)
    score = dict(options("all", 4, head_dim), max_distance=160)

    def attend():
        return check_lambda_attn(backend, q, k, v, n_global=20, window=140, **score)

    in_turn = attend()
    emulated.module().set_schedule_seed(seed)
    for ours, expected in zip(attend(), in_turn, strict=True):
        assert torch.equal(ours, expected)


def kernels_named(part: str, target: str) -> list[tuple[str, str, str]]:
    """Target, name and body of each kernel whose name holds `part`."""
    return [x for x in emulated.module().kernel_texts() if x[0] == target and part in x[1]]


@pytest.mark.parametrize("option", ["rope", "distance bias hides"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_merge_of_the_splits_overlaps_them(option, dtype):
    check_merge_overlaps(option, dtype)


# --- A driver that refuses, and what the launchers then do ---


def attend_without_rope() -> str:
    """Nothing is launched before the tensor maps are made. Returns the kernel that ran last."""
    q, k, v = qkv(40, 50, dtype=torch.bfloat16)
    emulated.module().take_launches()
    with emulated.device(capability=90):
        check_lambda_attn("ptx", q, k, v, n_global=0, window=20)
    return emulated.module().take_launches()[-1]["kernel"]


def test_a_thread_without_a_context_gets_one():
    """The op may be its first CUDA work, and the driver's own calls bind none."""
    attend_without_rope()  # the device's facts are known now
    emulated.module().forget_context()
    assert attend_without_rope() == "lambda_attn_sm90"


@pytest.mark.parametrize("made_before", range(5))
def test_a_tensor_that_the_driver_does_not_map_takes_the_other_kernel(made_before):
    emulated.module().refuse_tensor_maps(calls=1, after=made_before)
    # q, out, k and v
    assert attend_without_rope() == f"lambda_attn_sm{80 if made_before < 4 else 90}"
    assert attend_without_rope() == f"lambda_attn_sm{90 if made_before < 4 else 80}"
    assert attend_without_rope() == "lambda_attn_sm90"


def test_a_driver_function_that_was_not_found_is_asked_for_again():
    """In a process of its own: this one may have found it before."""
    program = """
import emulated, test_ptx
with emulated.way("ptx"):
    emulated.module().hide_entry_points(calls=1)
    print(test_ptx.attend_without_rope(), test_ptx.attend_without_rope())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["lambda_attn_sm80", "lambda_attn_sm90"]


# --- Planted faults: the PTX as text, changed in one place ---


def attend(capability: int) -> None:
    """Far, near and window tiles, several of each; the rows of Q are rotated in between. One block
    takes all tiles of queries in turn where blocks stay."""
    q, k, v = qkv(300, 310, heads_q=2, heads_kv=1, head_dim=64, dtype=torch.bfloat16)
    with emulated.device(capability=capability, multiprocessors=1):
        check_lambda_attn(
            "ptx", q, k, v, n_global=20, window=140, max_distance=160, **options("rope", 2, 64)
        )


def decode() -> None:
    """One token against a full ring, in several splits that are merged by an overlapping launch."""
    cache = Cache.empty(1, 1, 300, 9, 64, torch.bfloat16)
    for x in cache.tensors():
        x.copy_(randn(3, tuple(x.shape), dtype=x.dtype)[0])
    q, k, v = randn(5, (1, 4, 1, 64), (1, 1, 1, 64), (1, 1, 1, 64), dtype=torch.bfloat16)
    with emulated.device(capability=90):
        step(
            "ptx", q, k, v, cache, torch.tensor([1000]), 300, max_distance=350,
            **options("rope", 4, 64),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel of the build, by parts of its name, and what runs it."""

    ptx: str
    parts: tuple[str, ...]
    run: Callable[[], None]

    def text(self) -> tuple[str, str, str]:
        first, *others = self.parts
        named = kernels_named(first, self.ptx)
        [found] = [text for text in named if all(part in text[1] for part in others)]
        return found


SM80 = Target("80", ("lambda_attn_sm80", "bfloat16", "Li64E"), lambda: attend(80))
SM90 = Target("90a", ("lambda_attn_sm90", "bfloat16", "Li64E"), lambda: attend(90))
DECODE = Target("90a", ("lambda_decode_sm80", "bfloat16", "Li64E"), decode)
MERGE = Target("90a", ("lambda_decode_merge", "bfloat16"), decode)

WRONG = "max error|differ in being finite"  # the numbers themselves
RACE = "race: .*(nothing orders|still under way)"


@dataclasses.dataclass(frozen=True)
class Planted:
    """A pattern in a kernel's body, what takes its place, and how the fault shows.

    `only`: the occurrences that this run passes and that matter to it; none named: all. Each is
    changed alone.
    """

    name: str
    target: Target
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    shows: str
    only: tuple[int, ...] = ()

    def bodies(self) -> Iterator[tuple[str, str, str]]:
        ptx, name, body = self.target.text()
        found = list(re.finditer(self.pattern, body))
        assert found, f"{self.pattern} is not in {name}"
        for match in [found[n] for n in self.only] or found:
            new = self.replacement
            changed = match.expand(new) if isinstance(new, str) else new(match)
            yield ptx, name, body[: match.start()] + changed + body[match.end() :]


# A register operand by another one that is worked out from it.
def worked_out(instruction: str, operation: str) -> tuple[str, str]:
    planted = ".reg .b32 planted; " + operation.format(r"\2") + r" \1planted;"
    return rf"({instruction}[^;]*, )(%r\d+);", planted


BAR_SYNC, BAR_ARRIVE, WARP_SYNC = (rf"bar\.{x}[^;]*;" for x in ("sync", "arrive", r"warp\.sync"))
WRONG_PARITY = worked_out(r"mbarrier\.try_wait\.parity", "xor.b32 planted, {}, 1;")
SHORT_BYTES = worked_out(r"mbarrier\.arrive\.expect_tx", "sub.s32 planted, {}, 128;")
HALF_BYTES = worked_out(r"mbarrier\.arrive\.expect_tx", "shr.u32 planted, {}, 1;")
MORE_BYTES = worked_out(r"mbarrier\.arrive\.expect_tx", "add.s32 planted, {}, 128;")
# What a matrix descriptor has beside its address: the swizzle in bits 62 and 63, from bit 32 on the
# 16 bytes from eight rows to the next eight.
DESCRIPTOR = r"or\.b64 (%rd\d+), (%rd\d+), (\d{19});"


def with_descriptor(changed_bits: int) -> Callable[[re.Match[str]], str]:
    return lambda m: f"or.b64 {m[1]}, {m[2]}, {int(m[3]) ^ changed_bits};"


PLANTED = [
    Planted(
        "ldmatrix that does not transpose", SM80,
        r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1", WRONG,
    ),
    Planted(
        "ldmatrix that transposes", SM80,
        r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared", WRONG,
    ),
    Planted("no barrier", SM80, BAR_SYNC, "", RACE),
    Planted("no bar.warp.sync", SM80, WARP_SYNC, "", RACE),
    Planted(
        "a wait for copies too weak", SM80, r"cp\.async\.wait_group 0", "cp.async.wait_group 1",
        RACE, only=(0,),
    ),
    Planted("no barrier on Hopper", SM90, BAR_SYNC, "", "race: |twice|ended with|no mbarrier"),
    Planted("no bar.arrive", SM90, BAR_ARRIVE, "", "deadlock: .*warp 4 at barrier 1"),
    Planted("no bar.warp.sync on Hopper", SM90, WARP_SYNC, "", RACE),
    Planted(
        "no fence.proxy.async", SM90, r"fence\.proxy\.async[^;]*;", "",
        "race: .*no fence.proxy.async between",
    ),
    Planted(
        "no fence.mbarrier_init", SM90, r"fence\.mbarrier_init[^;]*;", "", "no fence.mbarrier_init",
    ),
    Planted("wrong parity", SM90, *WRONG_PARITY, "race: |deadlock: .* spins"),
    Planted("short expect_tx", SM90, *SHORT_BYTES, "128 bytes more than its phase expects"),
    Planted("half of expect_tx", SM90, *HALF_BYTES, "bytes more than|phase is over while a copy"),
    Planted("more expect_tx", SM90, *MORE_BYTES, "deadlock: .* spins"),
    Planted("no arrival", SM90, r"mbarrier\.arrive\.shared[^;]*;", "", "deadlock: .* spins"),
    # Before some of them no register was touched since the one before.
    Planted(
        "no wgmma.fence", SM90, r"wgmma\.fence[^;]*;", "", "wgmma.fence", only=(0, 1, 3, 5, 7),
    ),
    Planted(
        "no wgmma.commit_group", SM90, r"wgmma\.commit_group[^;]*;", "",
        "a register of a wgmma under way|race: ",
    ),
    Planted(
        "a wait for wgmma too weak", SM90, r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 1",
        "a register of a wgmma under way|race: ",
    ),
    Planted(
        "no wait for bulk stores", SM90, r"cp\.async\.bulk\.wait_group[^;]*;", "",
        "ends before its bulk stores|race: ",
    ),
    Planted(
        "a descriptor of another swizzle", SM90, DESCRIPTOR, with_descriptor(3 << 62),
        f"{WRONG}|race: ",
    ),
    Planted(
        "a descriptor of another stride", SM90, DESCRIPTOR, with_descriptor(32 << 32),
        f"{WRONG}|race: ",
    ),
    Planted("no barrier in decoding", DECODE, BAR_SYNC, "", RACE),
    Planted("no bar.warp.sync in decoding", DECODE, WARP_SYNC, "", RACE, only=(0, 1, 2)),
    Planted(
        "no wait for the launch before", MERGE, r"griddepcontrol\.wait;", "",
        "no griddepcontrol.wait comes before",
    ),
]  # fmt: skip


@pytest.mark.parametrize("target", [SM80, SM90, DECODE], ids=["sm80", "sm90", "decode"])
def test_the_kernels_are_sound_without_a_planted_fault(target):
    target.run()


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_fault_is_found(planted):
    """By the order of accesses or by the numbers, in the schedule that runs first."""
    for ptx, name, body in planted.bodies():
        emulated.module().replace_kernel_text(ptx, name, body)
        with pytest.raises((RuntimeError, AssertionError), match=planted.shows):
            planted.target.run()


def test_a_fault_names_kernel_thread_and_line():
    ptx, name, body = SM80.text()
    emulated.module().replace_kernel_text(ptx, name, body.replace("bar.sync", "trap; bar.sync", 1))
    where = (
        r"kernel \S*lambda_attn_sm80\S*, block \(0,0,0\), thread \(\d+,0,0\), PTX line \d+ `trap`"
    )
    with pytest.raises(RuntimeError, match=where):
        SM80.run()


def test_text_that_is_not_understood_is_named_with_its_line():
    ptx, name, body = SM80.text()
    emulated.module().replace_kernel_text(ptx, name, body.replace("bar.sync", "baz.sync", 1))
    with pytest.raises(RuntimeError, match=r"PTX line \d+ `baz\.sync 0`: the opcode is not known"):
        SM80.run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["argument 0", "argument 1", "argument 2", "output 0", "output 1"])
def test_every_tensor_has_its_own_bounds(name, dtype):
    """One of half its size, whatever lies behind it."""
    q, k, v = qkv(40, 40, heads_kv=2, dtype=dtype)
    emulated.module().shorten(name)
    with pytest.raises(RuntimeError, match=r"outside every tensor: '\w+ \d'"):
        emulated.ops().lambda_attn(q, k, v, 3, 20)
