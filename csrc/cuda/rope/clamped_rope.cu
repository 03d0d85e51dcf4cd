// out[pair t of row n] = scaling * R(min(position(n), max_position) * inv_freq[t]) x[pair t of n]
//
// Schedule: a thread owns one unit of a row, kVec pairs, or kVec dims that pass through, and walks
// over up to kHeadsPerThread heads, so that an angle is reduced in float64 once and used for all of
// them. kVec elements are 16 bytes where layout and alignment allow, else one element at a time.
#include "../common/rotary.cuh"
#include "rotate_rows.h"

namespace lminf::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeadsPerThread = 8;

// The pairs (2t, 2t + 1) of two runs laid end to end.
template <int kVec>
LMINF_DEVICE void rotate_neighbours(const CosSin (&angle)[kVec], float (&a)[kVec],
                                    float (&c)[kVec]) {
  if constexpr (kVec == 1) {
    rotate_pair(angle[0], a[0], c[0]);
  } else {
#pragma unroll
    for (int e = 0; e < kVec / 2; ++e) {
      rotate_pair(angle[e], a[2 * e], a[2 * e + 1]);
      rotate_pair(angle[kVec / 2 + e], c[2 * e], c[2 * e + 1]);
    }
  }
}

// Row n of batch entry b of `out`.
struct PlacedRow {
  int64_t source, position;  // in x
  bool there;                // whether x has it
};

LMINF_DEVICE PlacedRow placed_row(const RotateParams& p, int64_t b, int64_t n) {
  const RowPositions& r = p.positions;
  auto sequence_start = [&](int64_t i) { return int64_t{load_global(r.cu_seqlens + i)}; };
  const int64_t start = r.start != nullptr ? load_global(r.start + b) : 0;
  PlacedRow row = {n, 0, true};
  switch (r.kind) {
    case RowPositions::kGiven:
      row.position = load_global(r.ids + b * r.ids_stride + n);
      break;
    case RowPositions::kAsKeys:
      row.source += r.first;
      row.position = start + row.source;
      if (r.cu_seqlens != nullptr) {
        row.position =
            row.source - sequence_start(find_sequence(r.n_sequences, row.source, sequence_start));
      }
      break;
    case RowPositions::kByPosition:
      row.position = n + max64(start, 0);
      row.source = row.position - start;
      break;
    case RowPositions::kBySequence:
      row.position = n;
      row.source = sequence_start(b) + n;
      row.there = row.source < sequence_start(b + 1);
      return row;
  }
  row.there = row.source < p.x_rows;
  return row;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) rotate_rows_kernel(const RotateParams p) {
  using Vec = Packed<T, kVec>;
  const int half = p.rope.rotary_dim / 2;
  const int64_t pair_units = half / kVec;
  const int64_t units = pair_units + (p.head_dim - p.rope.rotary_dim) / kVec;
  const int64_t head_groups = ceil_div(p.heads, kHeadsPerThread);

  int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t unit = index % units;
  index /= units;
  const int64_t n = index % p.rows;
  index /= p.rows;
  const int64_t first_head = index % head_groups * kHeadsPerThread;
  const int64_t b = index / head_groups;
  if (b >= p.batch) return;

  const PlacedRow row = placed_row(p, b, n);
  if (!row.there) return;
  const int64_t heads = min64(kHeadsPerThread, p.heads - first_head);
  const T* x = row_at<const T>(p.x, p.x_stride, b, first_head, row.source);
  T* out = row_at<T>(p.out, p.out_stride, b, first_head, n);

  if (unit >= pair_units) {
    const int64_t dim = p.rope.rotary_dim + (unit - pair_units) * kVec;
    for (int64_t h = 0; h < heads; ++h) {
      store_global(reinterpret_cast<Vec*>(out + h * p.out_stride.head + dim),
                   load_global(reinterpret_cast<const Vec*>(x + h * p.x_stride.head + dim)));
    }
    return;
  }

  // The unit's pairs stand in two runs of kVec dims: (t.., t + R/2..), or side by side.
  const int t0 = static_cast<int>(unit) * kVec;
  const int64_t run_a = p.rope.interleaved ? 2 * t0 : t0;
  const int64_t run_b = p.rope.interleaved ? 2 * t0 + kVec : t0 + half;
  const bool copied = row.source < p.copied_rows;
  CosSin angle[kVec];
  if (!copied) {
    const int64_t position = min64(max64(row.position, p.least_position), p.max_position);
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      angle[e] = rotation(position, load_frequency(p.rope, t0 + e));
      angle[e].cos *= p.rope.scaling;
      angle[e].sin *= p.rope.scaling;
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    const T* from = x + h * p.x_stride.head;
    T* to = out + h * p.out_stride.head;
    Vec a = load_global(reinterpret_cast<const Vec*>(from + run_a));
    Vec c = load_global(reinterpret_cast<const Vec*>(from + run_b));
    if (!copied) {
      float first[kVec], second[kVec];
      unpack_elements<T, kVec>(a, first);
      unpack_elements<T, kVec>(c, second);
      if (p.rope.interleaved) {
        rotate_neighbours(angle, first, second);
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e) rotate_pair(angle[e], first[e], second[e]);
      }
      a = pack_elements<T, kVec>(first);
      c = pack_elements<T, kVec>(second);
    }
    store_global(reinterpret_cast<Vec*>(to + run_a), a);
    store_global(reinterpret_cast<Vec*>(to + run_b), c);
  }
}

bool fits_chunks(const void* data, const Strides& s, int vec) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && s.batch % vec == 0 && s.head % vec == 0 &&
         s.seq % vec == 0;
}

template <typename T, int kVec>
void run(const RotateParams& p, Stream stream) {
  const int64_t units = p.rope.rotary_dim / 2 / kVec + (p.head_dim - p.rope.rotary_dim) / kVec;
  const int64_t threads = p.batch * p.rows * ceil_div(p.heads, kHeadsPerThread) * units;
  launch("rotate_rows", rotate_rows_kernel<T, kVec>, {ceil_div(threads, kThreads), kThreads, 0},
         stream, p);
}

template <typename T>
void run(const RotateParams& p, Stream stream) {
  constexpr int kVec = kChunkElements<T>;
  const bool chunks = fits_chunks(p.x, p.x_stride, kVec) &&
                      fits_chunks(p.out, p.out_stride, kVec) && p.rope.rotary_dim / 2 % kVec == 0 &&
                      (p.head_dim - p.rope.rotary_dim) % kVec == 0;
  if (chunks) {
    run<T, kVec>(p, stream);
  } else {
    run<T, 1>(p, stream);
  }
}

}  // namespace

void rotate_rows(const RotateParams& params, Stream stream) {
  with_element_type(params.dtype, [&](auto element) { run<decltype(element)>(params, stream); });
}

template <>
KernelPlan plan_of(const ClampedRopeParams&, const DeviceFacts&) {
  return {};
}

template <>
void run_op(const ClampedRopeParams& p, const DeviceFacts&, void*, Stream stream) {
  RotateParams r;
  r.dtype = p.dtype;
  r.x = p.x;
  r.out = p.out;
  r.x_stride = p.x_stride;
  r.out_stride = p.out_stride;
  r.batch = p.batch;
  r.heads = p.heads;
  r.rows = r.x_rows = p.seqlen;
  r.head_dim = p.head_dim;
  r.rope = p.rope;
  r.positions.kind = RowPositions::kGiven;
  r.positions.ids = p.position_ids;
  r.positions.ids_stride = p.position_batch_stride;
  if (p.has_max_position) r.max_position = p.max_position;
  rotate_rows(r, stream);
}

}  // namespace lminf::cuda
