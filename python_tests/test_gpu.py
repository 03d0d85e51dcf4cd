"""What a GPU alone can settle."""

import threading

import pytest
import torch
from cases import check_lambda_attn, options, qkv, run_reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_prefill_is_its_threads_first_cuda_work() -> None:
    """No rope: nothing is launched before the tensor maps are made, on a thread without context."""
    tensors = [x.cuda() for x in qkv(40, 50, dtype=torch.bfloat16)]
    torch.ops.lminf.lambda_attn(*tensors, 0, 20)  # the facts of the device are known now
    results = []

    def run() -> None:
        results.append(torch.ops.lminf.lambda_attn(*tensors, 0, 20)[0].cpu())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    check_lambda_attn("cuda", *qkv(40, 50, dtype=torch.bfloat16), n_global=0, window=20)
    assert len(results) == 1 and results[0].isfinite().all()


@pytest.mark.parametrize("option", ["none", "rope"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_transposed_views(head_dim: int, option: str) -> None:
    """[B, S, H, D] memory seen as [B, H, S, D]: a head stride below that of a row."""
    q, k, v = qkv(300, 310, batch=2, heads_q=4, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16)
    views = [x.transpose(1, 2).contiguous().cuda().transpose(1, 2) for x in (q, k, v)]
    score = options(option, 4, head_dim)
    on_gpu = {name: x.cuda() for name, x in score.items()}
    out, _ = torch.ops.lminf.lambda_attn(*views, 20, 140, max_distance=160, **on_gpu)
    common = dict(n_global=20, window=140, max_distance=160, **score)
    truth, _ = run_reference(q, k, v, True, **common)
    eager, _ = run_reference(q, k, v, False, **common)
    assert (out.cpu() - truth).abs().max() <= 2 * (eager - truth).abs().max()
