"""A call of each attention op on a GPU, on small shapes: for compute-sanitizer, and to see whether
the extension has kernels for this GPU."""

import torch
from cases import call, options, qkv

for dtype in (torch.bfloat16, torch.float32):
    q, k, v = qkv(150, 200, heads_q=4, heads_kv=2, dtype=dtype)
    call("cuda", "lambda_attn", q, k, v, 20, 40, max_distance=60, **options("all", 4, 64))
    ring, few = (torch.randn(1, 2, n, 64).to(dtype) for n in (300, 20))
    one = (x[:, :, :1] for x in (q, k, v))
    kept = (ring, ring.clone(), few, few.clone(), torch.tensor([1000]))
    call("cuda", "lambda_decode", *one, *kept, 300, max_distance=350, **options("rope", 4, 64))
