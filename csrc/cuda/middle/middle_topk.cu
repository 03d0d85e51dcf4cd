// Middle tokens: of the keys between the global tokens and the window, each head's top_k with the
// largest score at distance m join the softmax there.
//
//   s_j = scale * <R(m) q, k_j> - slope * m + bias[m], then capped,   j in [n_global, i - window]
//   out = (2^lse_Λ out_Λ + sum over the chosen j of 2^s_j v_j) / (2^lse_Λ + sum of 2^s_j)
//
// Schedule: all keys stand at one distance, so the query is rotated once and the keys not at all.
// A block takes one row, up to kHeads query heads of one key head, and one split of the keys; they
// stream by in tiles of kTileKeys, a few lanes a key. Then a warp a head looks for scores above the
// least of its list, which stands sorted in the workspace; few are, so lists are short work. A
// second kernel, a block for each query head, merges the splits' lists and adds up the values.
// Among equal scores the earlier key is chosen, however the keys are split.
#include "../common/plan.h"
#include "../common/rotary.cuh"
#include "../common/score.cuh"

namespace lminf::cuda {
namespace {

constexpr int kHeads = 4;  // query heads of a tile
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileKeys = 128;
constexpr int kKeysAtOnce = 4;  // of one group of lanes: loads under way
static_assert(kWarps == kHeads, "a warp for each head's list");

struct MiddleShape {
  int64_t head_tiles = 1;  // per key head
  int64_t splits = 1;
  int64_t position_bytes = 0;   // of the lists' positions, at the workspace's start
  int64_t workspace_bytes = 0;  // of these and the lists' scores
};

MiddleShape middle_shape(const MiddleTopkParams& p, int multiprocessors) {
  check_head_dim("middle_topk", p.head_dim);
  constexpr int64_t kLeastKeys = 1024;  // of a split
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  MiddleShape shape;
  shape.head_tiles = ceil_div(p.heads_q / p.heads_kv, kHeads);
  const int64_t blocks = max64(1, p.batch * p.heads_kv * shape.head_tiles);
  const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors / blocks;
  shape.splits = max64(1, min64(wanted, p.seqlen_k / kLeastKeys));
  const int64_t entries = p.batch * p.heads_q * shape.splits * p.top_k;
  shape.position_bytes = aligned_up(entries * 8);
  shape.workspace_bytes = shape.position_bytes + entries * 4;
  return shape;
}

struct MiddleLaunch {
  MiddleTopkParams p;
  int64_t splits = 1;
  int64_t head_tiles = 1;       // tiles of kHeads query heads per key head
  int lanes = kWarpSize;        // that share a key: a power of two
  float* score = nullptr;       // [B, Hq, splits, K] in falling order, -inf where there are fewer
  int64_t* position = nullptr;  // [B, Hq, splits, K], -1 where there are fewer
};

// One head's largest scores so far, kept by a whole warp.
struct TopList {
  float* score;
  int64_t* position;
  int64_t size;

  LMINF_DEVICE float least() const { return load_global(score + size - 1); }

  LMINF_DEVICE void clear(int lane) const {
    for (int64_t n = lane; n < size; n += kWarpSize) {
      store_global(score + n, minus_infinity());
      store_global(position + n, int64_t{-1});
    }
    __syncwarp();
  }

  // For s above least(); what stands at its place and after it moves on by one.
  LMINF_DEVICE void insert(float s, int64_t j, int lane) const {
    for (int64_t first = (size - 1) / kWarpSize * kWarpSize; first >= 0; first -= kWarpSize) {
      const int64_t n = first + lane;
      const bool there = n < size;
      const float own = there ? load_global(score + n) : s;
      const float before = there && n > 0 ? load_global(score + n - 1) : s;
      const bool moves = there && s > before;
      const bool lands = there && !moves && s > own;
      const int64_t moved = moves ? load_global(position + n - 1) : j;
      __syncwarp();  // all have read
      if (moves || lands) {
        store_global(score + n, moves ? before : s);
        store_global(position + n, moved);
      }
      __syncwarp();
      if (__any_sync(kFullWarp, there && !moves)) return;
    }
  }
};

LMINF_DEVICE TopList top_list(const MiddleLaunch& l, int64_t row, int64_t split) {
  const int64_t first = (row * l.splits + split) * l.p.top_k;
  return {l.score + first, l.position + first, l.p.top_k};
}

LMINF_DEVICE int64_t first_position(const MiddleTopkParams& p, int64_t b) {
  return p.k_start != nullptr ? load_global(p.k_start + b) : 0;
}

// The keys to choose from, by position; none where they are fewer than top_k.
LMINF_DEVICE Range candidates(const MiddleTopkParams& p, int64_t b) {
  const int64_t i = load_global(p.positions + b), first = first_position(p, b);
  if (i < 0) return {0, 0};
  const Range keys = middle_keys({first, first + p.seqlen_k}, i, p.n_global, p.window);
  return keys.hi - keys.lo < p.top_k ? Range{0, 0} : keys;
}

// Four blocks a multiprocessor, as planned: told nothing, ptxas aims at more, and spills.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) middle_select_kernel(const MiddleLaunch l) {
  using Vec = Packed<T, kVec>;
  const MiddleTopkParams& p = l.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim);
  int64_t block = blockIdx.x;
  const int64_t split = block % l.splits;
  block /= l.splits;
  const int64_t head_tile = block % l.head_tiles;
  block /= l.head_tiles;
  const int64_t kv_head = block % p.heads_kv, b = block / p.heads_kv;
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t first_head = kv_head * group + head_tile * kHeads;
  const int heads = static_cast<int>(min64(kHeads, group - head_tile * kHeads));
  const bool keeps_list = warp < heads;
  const TopList list = top_list(l, b * p.heads_q + first_head + (keeps_list ? warp : 0), split);
  if (keeps_list) list.clear(lane);
  const Range all = candidates(p, b);
  if (all.empty()) return;
  // A bias of -inf hides all of a head's keys.
  const bool looks =
      keeps_list && bias_at(p.score, first_head + warp, p.distance, 0) != minus_infinity();
  const int64_t count = all.hi - all.lo, first = first_position(p, b);
  const Range keys = {all.lo + count * split / l.splits, all.lo + count * (split + 1) / l.splits};

  // --- Queries, rotated by the distance and scaled ---
  const SharedArray<float> q(shared_memory(), kHeads * head_dim);
  const SharedArray<float> scores(shared_memory() + 4 * kHeads * head_dim, kHeads * kTileKeys);
  for (int i = thread; i < kHeads * head_dim; i += kThreads) {
    const int h = i / head_dim, dim = i % head_dim;
    const T* row = row_at<const T>(p.q, p.q_stride, b, first_head + h);
    float x = 0.0f;
    if (h < heads && dim >= p.rope.rotary_dim) {
      x = to_float(load_global(row + dim));
    } else if (h < heads) {
      x = rotated_element(p.rope, row, dim, p.distance) * p.rope.scaling;
    }
    q[i] = x * p.score.scale;
  }
  __syncthreads();

  // --- The split's keys, a tile at a time ---
  const int lanes = l.lanes, own = thread % lanes, groups = kThreads / lanes;
  const T* k_rows = row_at<const T>(p.k, p.k_stride, b, kv_head);
  float least = minus_infinity();  // of this warp's list
  for (int64_t tile = keys.lo; tile < keys.hi; tile += kTileKeys) {
    const int n_keys = static_cast<int>(min64(kTileKeys, keys.hi - tile));
    for (int column = thread / lanes; column < kTileKeys; column += groups * kKeysAtOnce) {
      float sum[kHeads][kKeysAtOnce] = {};
      for (int dim = own * kVec; dim < head_dim; dim += lanes * kVec) {
        Vec data[kKeysAtOnce];
#pragma unroll
        for (int n = 0; n < kKeysAtOnce; ++n) {
          // A key past the last is another copy of the last one.
          const int64_t j = tile + min64(column + n * groups, n_keys - 1);
          data[n] = load_global(
              reinterpret_cast<const Vec*>(k_rows + (j - first) * p.k_stride.seq + dim));
        }
#pragma unroll
        for (int n = 0; n < kKeysAtOnce; ++n) {
          float key[kVec];
          unpack_elements<T, kVec>(data[n], key);
#pragma unroll
          for (int h = 0; h < kHeads; ++h) {
            if (h >= heads) break;
#pragma unroll
            for (int e = 0; e < kVec; ++e) {
              sum[h][n] = fmaf(q[h * head_dim + dim + e], key[e], sum[h][n]);
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kKeysAtOnce; ++n) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if (h >= heads) break;
          float x = sum[h][n];
          for (int mask = lanes / 2; mask > 0; mask /= 2) {
            x += __shfl_xor_sync(kFullWarp, x, mask);
          }
          const int at = column + n * groups;
          if (own == 0 && at < kTileKeys) scores[h * kTileKeys + at] = x;
        }
      }
    }
    __syncthreads();
    if (looks) {
      for (int first_column = 0; first_column < n_keys; first_column += kWarpSize) {
        const int column = first_column + lane;
        const float s = column < n_keys ? scores[warp * kTileKeys + column] : minus_infinity();
        // NaN and -inf are never among the largest.
        uint32_t above = __ballot_sync(kFullWarp, s > least);
        for (int from = 0; above != 0; ++from, above >>= 1) {
          if ((above & 1) == 0) continue;
          const float candidate = __shfl_sync(kFullWarp, s, from);
          if (!(candidate > least)) continue;
          list.insert(candidate, tile + first_column + from, lane);
          least = list.least();
        }
      }
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) middle_merge_kernel(const MiddleLaunch l) {
  const MiddleTopkParams& p = l.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x, b = row / p.heads_q, head = row % p.heads_q;
  const TopList top = top_list(l, row, 0);

  // --- One list of them all, by the first warp ---
  if (thread < kWarpSize) {
    for (int64_t split = 1; split < l.splits; ++split) {
      const TopList other = top_list(l, row, split);
      for (int64_t n = 0; n < p.top_k; ++n) {
        const float s = load_global(other.score + n);
        if (!(s > top.least())) break;  // nor is any after it
        top.insert(s, load_global(other.position + n), thread);
      }
    }
  }
  __syncthreads();
  for (int64_t n = thread; n < p.top_k; n += kThreads) {
    store_global(p.chosen + row * p.top_k + n, load_global(top.position + n));
  }

  // --- Their softmax with that of the Λ result ---
  const T* lambda_out = row_at<const T>(p.lambda_out, p.lambda_out_stride, b, head);
  T* out = row_at<T>(p.out, p.out_stride, b, head);
  const float lambda_lse = load_global(p.lambda_lse + row);
  if (load_global(top.position) < 0) {
    for (int dim = thread; dim < p.head_dim; dim += kThreads) {
      store_global(out + dim, load_global(lambda_out + dim));
    }
    if (thread == 0) store_global(p.lse + row, lambda_lse);
    return;
  }
  // The sink's logit is in the denominator of `lambda_out`, and stays in that of `out`.
  const float lambda = lambda_lse * kLog2e;
  const float sink = Sink(p.score, head).logit * kLog2e;
  const float slope = alibi_slope(p.score, head);
  const float bias = bias_at(p.score, head, p.distance, 0);
  const Scoring scoring(p.score);
  const auto finished = [&](const float* product) {
    return scoring.after_scale<true>(load_global(product), slope, static_cast<float>(p.distance),
                                     bias);
  };
  // A cap keeps the order of the products, so the first score is the largest.
  const float visible_max = fmaxf(finished(top.score), lambda);
  const float max = fmaxf(visible_max, sink);
  const float seen = exp2f(lambda - max), sunk = exp2f(sink - max);
  const int64_t first = first_position(p, b);
  const T* v_rows = row_at<const T>(p.v, p.v_stride, b, head / (p.heads_q / p.heads_kv));
  for (int dim = thread; dim < p.head_dim; dim += kThreads) {
    float total = to_float(load_global(lambda_out + dim)) * (seen + sunk), sum = 0.0f;
    float visible = exp2f(lambda - visible_max);  // which a large sink leaves alone
    for (int64_t n = 0; n < p.top_k; ++n) {
      const int64_t j = load_global(top.position + n);
      if (j < 0) break;
      const float score = finished(top.score + n);
      const float weight = exp2f(score - max);
      sum += weight;
      visible += exp2f(score - visible_max);
      const T value = load_global(v_rows + (j - first) * p.v_stride.seq + dim);
      total = fmaf(weight, to_float(value), total);
    }
    store_global(out + dim, from_float<T>(total / (seen + sunk + sum)));
    if (dim == 0) store_global(p.lse + row, (visible_max + log2f(visible)) * kLn2);
  }
}

template <typename T, int kVec>
void run(MiddleLaunch l, Stream stream) {
  const MiddleTopkParams& p = l.p;
  l.lanes = 1;
  while (l.lanes < kWarpSize && l.lanes * kVec < p.head_dim) l.lanes *= 2;
  const int shared = 4 * kHeads * (static_cast<int>(p.head_dim) + kTileKeys);
  launch("middle_select", middle_select_kernel<T, kVec>,
         {p.batch * p.heads_kv * l.head_tiles * l.splits, kThreads, shared}, stream, l);
  launch("middle_merge", middle_merge_kernel<T>, {p.batch * p.heads_q, kThreads, 0}, stream, l);
}

template <typename T>
void run(const MiddleLaunch& l, Stream stream) {
  constexpr int kVec = kChunkElements<T>;
  const Strides& s = l.p.k_stride;
  const bool chunks = reinterpret_cast<uintptr_t>(l.p.k) % 16 == 0 && s.batch % kVec == 0 &&
                      s.head % kVec == 0 && s.seq % kVec == 0 && l.p.head_dim % kVec == 0;
  chunks ? run<T, kVec>(l, stream) : run<T, 1>(l, stream);
}

}  // namespace

template <>
KernelPlan plan_of(const MiddleTopkParams& p, const DeviceFacts& device) {
  const MiddleShape shape = middle_shape(p, device.multiprocessors);
  KernelPlan plan;
  plan.kernel = name_of(AttnKernel::kPlain);
  plan.block_m = kHeads;
  plan.splits = shape.splits;
  plan.blocks = p.batch * p.heads_kv * shape.head_tiles * shape.splits;
  check_blocks("middle_topk", plan.blocks);
  plan.workspace_bytes = shape.workspace_bytes;
  return plan;
}

template <>
void run_op(const MiddleTopkParams& params, const DeviceFacts& device, void* workspace,
            Stream stream) {
  const MiddleShape shape = middle_shape(params, device.multiprocessors);
  MiddleLaunch l;
  l.p = params;
  l.splits = shape.splits;
  l.head_tiles = shape.head_tiles;
  l.position = static_cast<int64_t*>(workspace);
  l.score = reinterpret_cast<float*>(static_cast<char*>(workspace) + shape.position_bytes);
  with_element_type(params.dtype, [&](auto element) { run<decltype(element)>(l, stream); });
}

}  // namespace lminf::cuda
