"""What PyTorch may expect of the ops: schemas, fake kernels, torch.compile, and a stable ABI."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import lminf_cuda
from lminf_cuda import ops

lminf = torch.ops.lminf
# No autograd test: there is no backward, and asking for one is an error (test_errors.py).
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def qkv(b, hq, hkv, sq, sk, d, dtype=torch.float32):
    shapes = (b, hq, sq, d), (b, hkv, sk, d), (b, hkv, sk, d)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def transposed(*tensors):
    """The [B, H, S, D] view of [B, S, H, D] memory, as transformers passes it."""
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)


def last_dim_strided(*tensors):
    return tuple(t.repeat_interleave(2, dim=-1)[..., ::2] for t in tensors)


def windows_into_one_vector():
    """Every query overlaps the next in memory, so the output cannot have q's strides."""
    return torch.randn(64).as_strided((1, 2, 5, 8), (0, 8, 1, 1))


def attn_samples():
    f = torch.rand(4)
    heads = torch.rand(4)
    plain = qkv(2, 4, 2, 9, 12, 16)
    yield "plain", (*plain, 2, 4), {}
    yield "bfloat16", (*qkv(1, 2, 2, 5, 5, 8, torch.bfloat16), 0, 3), {}
    yield "transposed", (*transposed(*plain), 2, 4), {"inv_freq": f, "max_distance": 7}
    yield "last dim strided", (*last_dim_strided(*plain), 2, 4), {"inv_freq": f}
    yield "sliced", (plain[0][:, :, 2:8], *plain[1:], 2, 4), {"inv_freq": f.double()}
    yield "expanded", (plain[0][:1].expand(3, -1, -1, -1), *qkv(3, 1, 2, 1, 12, 16)[1:], 2, 4), {}
    yield "overlapping", (windows_into_one_vector(), *qkv(1, 1, 1, 1, 6, 8)[1:], 2, 4), {}
    yield "scores", (*plain, 2, 4), {"alibi_slopes": heads, "sink_logits": heads, "softcap": 5.0}
    yield "bias", (*plain, 2, 4), {"distance_bias": torch.rand(4, 9).bfloat16(), "max_distance": 8}
    yield "padding", (*plain, 2, 4), {"k_start": torch.tensor([-3, 0]), "scale": 0.3}
    moved = {"global_k": plain[1][:, :, :2], "global_v": plain[2][:, :, :2], "k_rotated": 3}
    yield "moved on", (*plain, 2, 4), {**moved, "inv_freq": f, "k_start": torch.tensor([5, 90])}
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    yield "packed", (*qkv(1, 4, 2, 9, 9, 16), 2, 4), {"cu_seqlens": offsets, "inv_freq": f}
    yield "no queries", (*qkv(1, 4, 2, 0, 9, 16), 2, 4), {}
    yield "no rows", (*qkv(0, 4, 2, 3, 9, 16), 2, 4), {}
    yield "one dim", (*qkv(1, 1, 1, 3, 9, 1), 2, 4), {}


def decode_samples():
    for name, c, g, options in [
        ("plain", 6, 2, {}),
        ("no global slots", 4, 0, {"softcap": 3.0}),
        ("all options", 9, 3, {"max_distance": 7, "inv_freq": torch.rand(3), "rope_scaling": 1.2}),
        ("bias", 6, 2, {"distance_bias": torch.rand(5, 4).mT}),
    ]:
        q, k, v = qkv(2, 4, 2, 1, 1, 8)
        caches = (torch.zeros(2, 2, slots, 8) for slots in (c, c, g, g))
        yield name, (q, k, v, *caches, torch.tensor([1, 17]), 4), options
    q, k, v = transposed(*qkv(1, 2, 2, 1, 1, 8, torch.half))
    caches = transposed(*(torch.zeros(1, 2, 5, 8, dtype=torch.half) for _ in range(4)))
    yield "transposed, idle", (q, k, v, *caches, torch.tensor([-1]), 5), {}


def rope_samples():
    x = torch.randn(2, 3, 5, 8)
    ids = torch.arange(5) * 1000
    yield "shared positions", (x, ids, torch.rand(4)), {}
    yield "own positions", (x, torch.stack([ids, -ids]), torch.rand(2)), {"max_position": 900}
    yield "one row of positions", (x.half(), ids[None], torch.rand(4)), {"interleaved": True}
    yield "transposed", (*transposed(x), ids, torch.rand(4).double()), {"scaling": 1.5}
    yield "last dim strided", (*last_dim_strided(x), ids, torch.rand(4)), {}
    yield "strided positions", (x, torch.arange(10)[::2], torch.rand(4)), {}


def middle_samples():
    f, heads = torch.rand(4), torch.rand(4)
    for name, dtype, positions, kwargs in [
        ("plain", torch.float32, [11, 30], {}),
        ("all options", torch.float32, [11, 3], {"alibi_slopes": heads, "sink_logits": heads}),
        ("bias", torch.float32, [11, 30], {"distance_bias": torch.rand(4, 6)}),
        ("own first keys", torch.bfloat16, [40, -1], {"k_start": torch.tensor([29, -20])}),
    ]:
        q, k, v = qkv(2, 4, 2, 1, 12, 16, dtype)
        rest = (torch.zeros(2, 4, 1), torch.tensor(positions), 2, 3, 5, 4)
        yield name, (q, k, v, torch.zeros_like(q), *rest), {"inv_freq": f, **kwargs}
        yield f"{name}, transposed", (*transposed(q, k, v, q), *rest), {"inv_freq": f, **kwargs}


SAMPLES = [
    pytest.param(op, args, kwargs, id=f"{op}, {name}")
    for op, samples in [
        ("lambda_attn", attn_samples),
        ("lambda_decode", decode_samples),
        ("clamped_rope", rope_samples),
        ("middle_topk", middle_samples),
    ]
    for name, args, kwargs in samples()
]


def on_device(device, args, kwargs):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))


@pytest.mark.parametrize(("op", "args", "kwargs"), SAMPLES)
def test_opcheck(device, op, args, kwargs):
    args, kwargs = on_device(device, args, kwargs)
    torch.library.opcheck(getattr(lminf, op).default, args, kwargs, test_utils=OPCHECKS)


@pytest.mark.parametrize(("op", "args", "kwargs"), SAMPLES)
def test_fake_kernels_tell_shape_strides_and_dtype(device, op, args, kwargs):
    args, kwargs = on_device(device, args, kwargs)
    function = getattr(lminf, op)
    real = function(*args, **kwargs)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, mode.from_tensor, (args, kwargs)
        )
        fake = function(*args, **kwargs)
    for ours, told in zip(
        *((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True
    ):
        assert (ours.shape, ours.dtype, ours.device) == (told.shape, told.dtype, told.device)
        assert ours.stride() == told.stride()


@pytest.mark.parametrize("op", ["lambda_attn", "lambda_decode", "clamped_rope", "middle_topk"])
def test_tags(op):
    tags = getattr(lminf, op).default.tags
    assert torch.Tag.pt2_compliant_tag in tags
    assert torch.Tag.needs_exact_strides in tags


class Layer(torch.nn.Module):
    """A transformer layer with the op in its middle."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.qkv = torch.nn.Linear(32, 3 * 32)
        self.out = torch.nn.Linear(32, 32)
        self.register_buffer("inv_freq", 10000.0 ** -torch.linspace(0, 0.9, 4))

    def forward(self, x):  # [B, S, 32]
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = lminf_cuda.lambda_attention(q, k, v, n_global=2, window=5, inv_freq=self.inv_freq)
        return x + self.out(y.transpose(1, 2).reshape(b, s, 32))


def test_compile_gives_one_graph_and_the_same_output(device):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = torch.nn.Sequential(Layer(), Layer()).to(device)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for x in torch.randn(2, 2, 23, 32, device=device):
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1
    targets = [node.target for node in counter.graphs[0].graph.nodes]
    calls = [target for target in targets if "lambda_attn" in str(target)]
    assert len(calls) == 2
    with torch.no_grad():
        for length in (31, 47):  # any length after one more compilation
            x = torch.randn(2, length, 32, device=device)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 2


def test_compile_keeps_the_writes_of_lambda_decode():
    torch._dynamo.reset()
    _, args, kwargs = next(iter(decode_samples()))
    eager = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    compiled = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    step = torch.compile(lambda *a: lminf.lambda_decode(*a, **kwargs), fullgraph=True)
    for expected, got in zip(lminf.lambda_decode(*eager, **kwargs), step(*compiled), strict=True):
        assert torch.equal(expected, got)
    for expected, got in zip(eager[3:7], compiled[3:7], strict=True):
        assert expected.any()
        assert torch.equal(expected, got)


def test_build_facts():
    assert ops.backends()[0] == "cpu"
    assert ops.cpu_isa()
    assert lminf_cuda.__version__


def run_python(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_importing_needs_no_transformers(tmp_path):
    result = run_python("import sys, lminf_cuda; print('transformers' in sys.modules)", tmp_path)
    assert result.stdout.strip() == "False", result.stderr


def test_a_missing_extension_is_said_in_one_line(tmp_path):
    code = "import sys; sys.modules['lminf_cuda._C'] = None; import lminf_cuda"
    result = run_python(code, tmp_path)
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: lminf_cuda cannot load its compiled kernels")
    assert "pip install ." in last_line
    assert "C++17 compiler" in last_line


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_the_extension_uses_stable_abis_only():
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", ops._C.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    # C++ names of PyTorch would break with its next version; the stable ABI is C functions.
    mangled = [s for s in symbols if s.startswith("_Z")]
    assert not [s for s in mangled if any(part in s for part in ("c10", "at6", "2at", "5torch"))]
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols)
    assert ".abi3." in Path(ops._C.__file__).name
