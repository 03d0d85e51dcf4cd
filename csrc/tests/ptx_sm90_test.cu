// Every wrapper of ptx/sm90.cuh and ptx/grid.cuh against a result worked out element by element
// here. Compiled as C++ it tests the emulation's host bodies, compiled by nvcc for sm_90a the
// instructions themselves: both must give these very bits. The numbers are small integers, so that
// every order of summation gives the same.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "../cuda/ptx/grid.cuh"
#include "../cuda/ptx/sm80.cuh"
#include "../cuda/ptx/sm90.cuh"
#include "check.h"
#include "device_buffer.h"
#if defined(LMINF_PTX_INTERPRETER)
#include "../ptx_interpreter/control.h"
#endif

namespace lminf::test {
namespace {

using cuda::bf16;
using cuda::fp16;
using cuda::Swizzle;
using cuda::ptx::Major;

// Where a byte of a tile stands whose rows are one span wide, from the pictures of the swizzles:
// the chunks of row r change places by r, of every second row, or of every fourth.
constexpr int place(int row, int byte, int span) {
  const int chunk = byte / 16;
  const int moved = span == 128  ? chunk ^ (row & 7)
                    : span == 64 ? chunk ^ (row >> 1 & 3)
                    : span == 32 ? chunk ^ (row >> 2 & 1)
                                 : chunk;
  return row * span + moved * 16 + byte % 16;
}

// --- mbarrier: one warp hands numbers to another, one slot, several phases ---

__global__ void mbarrier_kernel(int* out, int rounds) {
#if LMINF_SM90A
  unsigned char* memory = cuda::shared_memory();
  cuda::SharedArray<int> slot(memory, 32);
  const uint32_t full = cuda::shared_address(memory + 128);
  const uint32_t empty = full + 8;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    cuda::ptx::mbarrier_init(full, 32);
    cuda::ptx::mbarrier_init(empty, 32);
    cuda::ptx::fence_barrier_init();
  }
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    if (thread < 32) {
      cuda::ptx::mbarrier_wait(empty, (round & 1) ^ 1);
      slot[thread] = 100 * round + thread;
      cuda::ptx::mbarrier_arrive(full);
    } else {
      cuda::ptx::mbarrier_wait(full, round & 1);
      out[32 * round + thread - 32] = slot[63 - thread];
      cuda::ptx::mbarrier_arrive(empty);
    }
  }
#else
  __trap();
#endif
}

void test_mbarrier() {
  constexpr int kRounds = 5;
  DeviceBuffer<int> out(32 * kRounds);
  cuda::launch("mbarrier", mbarrier_kernel, {1, 64, 144}, nullptr, out.data(), kRounds);
  CHECK(synchronize(), "mbarrier kernel");
  for (int i = 0; i < 32 * kRounds; ++i) {
    CHECK(out[i] == i / 32 * 100 + 31 - i % 32, "value " + std::to_string(i));
  }
}

// --- Bulk copy ---

__global__ void bulk_kernel(const uint32_t* in, uint32_t* out) {
#if LMINF_SM90A
  unsigned char* memory = cuda::shared_memory();
  cuda::SharedArray<uint32_t> words(memory, 64);
  const uint32_t barrier = cuda::shared_address(memory + 256);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    cuda::ptx::mbarrier_init(barrier, 1);
    cuda::ptx::fence_barrier_init();
    cuda::ptx::mbarrier_arrive_expect_tx(barrier, 192);
    cuda::ptx::bulk_load(cuda::shared_address(memory + 16), in, 128, barrier);
    cuda::ptx::bulk_load(cuda::shared_address(memory + 144), in + 36, 64, barrier);
  }
  __syncthreads();
  cuda::ptx::mbarrier_wait(barrier, 0);
  for (int i = thread; i < 48; i += 32) out[i] = words[4 + i];
#else
  __trap();
#endif
}

void test_bulk_load() {
  DeviceBuffer<uint32_t> in(64), out(48);
  for (int i = 0; i < 64; ++i) in[i] = 0x9E3779B9u * static_cast<uint32_t>(i + 1);
  cuda::launch("bulk", bulk_kernel, {1, 32, 272}, nullptr, static_cast<const uint32_t*>(in.data()),
               out.data());
  CHECK(synchronize(), "bulk kernel");
  for (int i = 0; i < 48; ++i) {
    CHECK(out[i] == in[i < 32 ? i : i + 4], "word " + std::to_string(i));
  }
}

// --- TMA: a transposed view, boxes inside, across and beyond every edge, there and back ---

constexpr int kBoxRows = 16, kBoxHeads = 2;

struct Corner {
  int dim, row, head, batch;
};

__global__ void tma_kernel(const __grid_constant__ cuda::TensorMap from,
                           const __grid_constant__ cuda::TensorMap to, uint16_t* raw, Corner corner,
                           int box_bytes) {
#if LMINF_SM90A
  unsigned char* memory = cuda::shared_memory();
  cuda::SharedArray<uint16_t> elements(memory, box_bytes / 2);
  const uint32_t tile = cuda::shared_address(memory);
  const uint32_t copy = tile + static_cast<uint32_t>((box_bytes + 1023) / 1024 * 1024);
  cuda::SharedArray<uint16_t> second(memory + (box_bytes + 1023) / 1024 * 1024, box_bytes / 2);
  const uint32_t barrier = copy + static_cast<uint32_t>(box_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  cuda::ptx::tma_prefetch_map(from);
  if (thread == 0) {
    cuda::ptx::mbarrier_init(barrier, 1);
    cuda::ptx::fence_barrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    cuda::ptx::mbarrier_arrive_expect_tx(barrier, box_bytes);
    cuda::ptx::tma_load_4d(tile, from, barrier, corner.dim, corner.row, corner.head, corner.batch);
  }
  cuda::ptx::mbarrier_wait(barrier, 0);
  for (int i = thread; i < box_bytes / 2; i += 32) {
    raw[i] = elements[i];
    second[i] = static_cast<uint16_t>(elements[i] + 1);
  }
  cuda::ptx::fence_proxy_async();
  __syncthreads();
  if (thread == 0) {
    cuda::ptx::tma_store_4d(to, copy, corner.dim, corner.row, corner.head, corner.batch);
    cuda::ptx::tma_store_commit();
    cuda::ptx::tma_store_wait_read<0>();
    cuda::ptx::tma_store_wait<0>();
  }
#else
  __trap();
#endif
}

void test_tma() {
  // [batch, row, head, dim] in memory, seen as [batch, head, row, dim].
  constexpr int kDim = 72, kRows = 40, kHeads = 3, kBatch = 2;
  constexpr int kSize = kBatch * kRows * kHeads * kDim;
  DeviceBuffer<uint16_t> in(kSize), out(kSize), raw(128 * kBoxRows * kBoxHeads);
  for (int i = 0; i < kSize; ++i) in[i] = static_cast<uint16_t>(i * 7 + 3);
  const auto at = [](int d, int r, int h, int b) {
    return ((b * kRows + r) * kHeads + h) * kDim + d;
  };
  const Corner corners[] = {{0, 0, 0, 0},  {0, 16, 1, 1},  {64, 32, 0, 1}, {-8, -5, 0, 0},
                            {3, 39, 2, 1}, {0, 40, 0, 0},  {0, 0, -1, 0},  {0, 0, 0, 2},
                            {72, 0, 0, 0}, {0, -16, 0, 0}, {1, 30, 2, 0},  {-70, 5, 1, -1}};
  for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128}) {
    const int span = swizzle == Swizzle::kNone ? 48 : cuda::swizzle_bytes(swizzle);
    const auto map_of = [&](const uint16_t* base) {
      return cuda::encode_tensor_map({base,
                                      {kDim, kRows, kHeads, kBatch},
                                      {1, kHeads * kDim, kDim, kRows * kHeads * kDim},
                                      {span / 2, kBoxRows, kBoxHeads, 1},
                                      swizzle});
    };
    const int box_bytes = span * kBoxRows * kBoxHeads;
    for (const Corner& c : corners) {
      for (int i = 0; i < kSize; ++i) out[i] = 0xABCD;
      cuda::launch("tma", tma_kernel, {1, 32, 2 * ((box_bytes + 1023) / 1024 * 1024) + 8}, nullptr,
                   map_of(in.data()), map_of(out.data()), raw.data(), c, box_bytes);
      CHECK(synchronize(), "tma kernel");
      const std::string which = "span " + std::to_string(span) + " corner " +
                                std::to_string(c.dim) + "," + std::to_string(c.row) + "," +
                                std::to_string(c.head) + "," + std::to_string(c.batch);
      const auto inside = [&](int d, int r, int h, int b) {
        return d >= 0 && d < kDim && r >= 0 && r < kRows && h >= 0 && h < kHeads && b >= 0 &&
               b < kBatch;
      };
      for (int row = 0; row < kBoxRows * kBoxHeads; ++row) {
        for (int e = 0; e < span / 2; ++e) {
          const int d = c.dim + e, r = c.row + row % kBoxRows, h = c.head + row / kBoxRows;
          const int want = inside(d, r, h, c.batch) ? in[at(d, r, h, c.batch)] : 0;
          CHECK(raw[place(row, 2 * e, span) / 2] == want,
                which + ": row " + std::to_string(row) + " element " + std::to_string(e));
        }
      }
      for (int b = 0; b < kBatch; ++b) {
        for (int r = 0; r < kRows; ++r) {
          for (int h = 0; h < kHeads; ++h) {
            for (int d = 0; d < kDim; ++d) {
              const bool stored = b == c.batch && h >= c.head && h < c.head + kBoxHeads &&
                                  r >= c.row && r < c.row + kBoxRows && d >= c.dim &&
                                  d < c.dim + span / 2;
              const int i = at(d, r, h, b);
              const uint16_t want = stored ? static_cast<uint16_t>(in[i] + 1) : 0xABCD;
              CHECK(out[i] == want, which + ": stored element " + std::to_string(i));
            }
          }
        }
      }
    }
  }
}

void test_tensor_map_limits() {
  alignas(16) static uint16_t memory[64];
  const auto problem = [](auto change) {
    cuda::TensorMapShape shape{
        memory, {64, 4, 2, 1}, {1, 64, 256, 1}, {64, 4, 1, 1}, Swizzle::k128};
    change(shape);
    const char* text = cuda::tensor_map_problem(shape);
    return std::string(text == nullptr ? "" : text);
  };
  using Shape = cuda::TensorMapShape;
  CHECK(problem([](Shape&) {}).empty(), "sound: a batch of one may have any stride");
  CHECK(!problem([](Shape& s) { s.base = memory + 1; }).empty(), "base");
  CHECK(!problem([](Shape& s) { s.stride[0] = 2; }).empty(), "innermost stride");
  CHECK(!problem([](Shape& s) { s.stride[1] = 68; }).empty(), "row stride not 16 bytes");
  CHECK(!problem([](Shape& s) { s.stride[2] = 0; }).empty(), "no head stride");
  CHECK(!problem([](Shape& s) { s.stride[2] = int64_t{1} << 40; }).empty(), "head stride");
  CHECK(!problem([](Shape& s) { s.box[1] = 257; }).empty(), "box rows");
  CHECK(!problem([](Shape& s) { s.box[0] = 128; }).empty(), "box past the span");
  CHECK(!problem([](Shape& s) { s.size[1] = 0; }).empty(), "nothing there");
  bool refused = false;
  try {
    cuda::encode_tensor_map({memory, {64, 4, 2, 1}, {1, 60, 256, 1}, {64, 4, 1, 1}, Swizzle::k128});
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused, "a row stride of 120 bytes");
}

// --- wgmma ---

constexpr int kSteps = 4, kDepth = 16 * kSteps;  // of k

enum class From { kRegisters, kSharedK, kSharedMN };

// Fills an operand's tile with x[row][k], and gives the descriptor of its k-step `step`.
template <typename T, Swizzle kSwizzle, bool kMnMajor>
struct Operand {
  static constexpr int kSpan = cuda::swizzle_bytes(kSwizzle), kColumns = kSpan / 2;

  static constexpr int bytes(int rows) {
    return kMnMajor ? (rows + kColumns - 1) / kColumns * kDepth * kSpan
                    : (kDepth + kColumns - 1) / kColumns * rows * kSpan;
  }

  LMINF_DEVICE static void fill(unsigned char* tile, const float* x, int rows) {
    cuda::SharedArray<T> elements(tile, bytes(rows) / 2);
    for (int i = static_cast<int>(threadIdx.x); i < rows * kDepth; i += 128) {
      const int row = i / kDepth, k = i % kDepth;
      const int line = kMnMajor ? k : row, column = kMnMajor ? row : k;
      const int box = column / kColumns * (kMnMajor ? kDepth : rows) * kSpan;
      elements[(box + place(line, column % kColumns * 2, kSpan)) / 2] = cuda::from_float<T>(x[i]);
    }
  }

  LMINF_DEVICE static cuda::ptx::Descriptor descriptor(uint32_t tile, int rows, int step) {
    using namespace cuda::ptx;
    if constexpr (kSwizzle == Swizzle::kNone) {
      // Rows of 16 bytes: eight of them 128 bytes; from one box to the next, `box` bytes.
      const int box = (kMnMajor ? kDepth : rows) * 16;
      return kMnMajor ? make_descriptor<kSwizzle>(tile, 128, box).plus(step * 256)
                      : make_descriptor<kSwizzle>(tile, box, 128).plus(step * 2 * box);
    } else if constexpr (kMnMajor) {
      return mn_major_descriptor<kSwizzle>(tile, kDepth * kSpan).plus(step * 16 * kSpan);
    } else {
      const int box = step * 16 / kColumns;
      return k_major_descriptor<kSwizzle>(tile).plus(box * rows * kSpan + step * 32 % kSpan);
    }
  }
};

template <typename T, int kN, From kA, Swizzle kSwizzle, Major kMajorB>
__global__ void wgmma_kernel(const float* a, const float* b, const float* c, float* d,
                             bool accumulate) {
#if LMINF_SM90A
  using A = Operand<T, kSwizzle, kA == From::kSharedMN>;
  using B = Operand<T, kSwizzle, kMajorB == Major::kMN>;
  constexpr int kBytesA = (A::bytes(64) + 1023) / 1024 * 1024;
  unsigned char* memory = cuda::shared_memory();
  const uint32_t tile_a = cuda::shared_address(memory), tile_b = tile_a + kBytesA;
  A::fill(memory, a, 64);
  B::fill(memory + kBytesA, b, kN);
  cuda::ptx::fence_proxy_async();
  __syncthreads();

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int top = thread / 32 * 16 + lane / 4, left = lane % 4 * 2;
  float acc[kN / 2];
  uint32_t fragment[kSteps][4];
#pragma unroll
  for (int r = 0; r < kN / 2; ++r) {
    acc[r] = c[(top + r / 2 % 2 * 8) * kN + r / 4 * 8 + left + r % 2];
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float* pair = a + (top + r % 2 * 8) * kDepth + 16 * s + left + r / 2 * 8;
      fragment[s][r] = cuda::pack<T>(pair[0], pair[1]);
    }
  }
  cuda::ptx::pin_registers(acc);
  cuda::ptx::wgmma_fence();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const cuda::ptx::Descriptor step_b = B::descriptor(tile_b, kN, s);
    const bool add = s > 0 || accumulate;
    if constexpr (kA == From::kRegisters) {
      cuda::ptx::wgmma<T, kMajorB>(acc, fragment[s], step_b, add);
    } else {
      constexpr Major kMajorA = kA == From::kSharedMN ? Major::kMN : Major::kK;
      cuda::ptx::wgmma<T, kMajorA, kMajorB>(acc, A::descriptor(tile_a, 64, s), step_b, add);
    }
  }
  cuda::ptx::wgmma_commit();
  cuda::ptx::wgmma_wait<0>(acc);
#pragma unroll
  for (int r = 0; r < kN / 2; ++r) {
    d[(top + r / 2 % 2 * 8) * kN + r / 4 * 8 + left + r % 2] = acc[r];
  }
#else
  __trap();
#endif
}

template <typename T, int kN, From kA, Swizzle kSwizzle, Major kMajorB>
void test_wgmma(bool accumulate) {
  DeviceBuffer<float> a(64 * kDepth), b(kN * kDepth), c(64 * kN), d(64 * kN);
  for (int i = 0; i < 64 * kDepth; ++i) a[i] = static_cast<float>((i * 37 + i / 64 * 11) % 29 - 14);
  for (int i = 0; i < kN * kDepth; ++i) {
    b[i] = static_cast<float>((i * 53 + i / 64 * 5) % 31 - 15) * 0.25f;
  }
  for (int i = 0; i < 64 * kN; ++i) c[i] = static_cast<float>(i % 17 - 8);
  using A = Operand<T, kSwizzle, kA == From::kSharedMN>;
  using B = Operand<T, kSwizzle, kMajorB == Major::kMN>;
  const int bytes = (A::bytes(64) + 1023) / 1024 * 1024 + B::bytes(kN);
  cuda::launch("wgmma", wgmma_kernel<T, kN, kA, kSwizzle, kMajorB>, {1, 128, bytes}, nullptr,
               static_cast<const float*>(a.data()), static_cast<const float*>(b.data()),
               static_cast<const float*>(c.data()), d.data(), accumulate);
  CHECK(synchronize(), "wgmma kernel");
  const std::string which =
      std::string(sizeof(T) == 2 && std::is_same_v<T, bf16> ? "bf16" : "fp16") + " N " +
      std::to_string(kN) + " A " + std::to_string(static_cast<int>(kA)) + " span " +
      std::to_string(cuda::swizzle_bytes(kSwizzle)) + " B " +
      std::to_string(static_cast<int>(kMajorB)) + (accumulate ? " accumulating" : "");
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kN; ++column) {
      float want = accumulate ? c[row * kN + column] : 0.0f;
      for (int k = 0; k < kDepth; ++k) want += a[row * kDepth + k] * b[column * kDepth + k];
      CHECK(d[row * kN + column] == want,
            which + ": row " + std::to_string(row) + " column " + std::to_string(column));
    }
  }
}

template <int... kIndices>
void test_every_n(std::integer_sequence<int, kIndices...>) {
  (test_wgmma<bf16, 8 * (kIndices + 1), From::kSharedK, Swizzle::k128, Major::kK>(false), ...);
  (test_wgmma<fp16, 8 * (kIndices + 1), From::kRegisters, Swizzle::k128, Major::kMN>(true), ...);
}

template <typename T, int kN, Swizzle kSwizzle>
void test_layouts() {
  test_wgmma<T, kN, From::kRegisters, kSwizzle, Major::kK>(true);
  test_wgmma<T, kN, From::kRegisters, kSwizzle, Major::kMN>(false);
  test_wgmma<T, kN, From::kSharedK, kSwizzle, Major::kK>(true);
  test_wgmma<T, kN, From::kSharedK, kSwizzle, Major::kMN>(false);
  test_wgmma<T, kN, From::kSharedMN, kSwizzle, Major::kK>(false);
  test_wgmma<T, kN, From::kSharedMN, kSwizzle, Major::kMN>(true);
}

template <typename T, int kN>
void test_swizzles() {
  test_layouts<T, kN, Swizzle::kNone>();
  test_layouts<T, kN, Swizzle::k32>();
  test_layouts<T, kN, Swizzle::k64>();
  test_layouts<T, kN, Swizzle::k128>();
}

// --- Two groups under way at once: the older one's results are there, the newer one's later ---

__global__ void groups_kernel(float* out) {
#if LMINF_SM90A
  using Tile = Operand<bf16, Swizzle::k128, false>;
  unsigned char* memory = cuda::shared_memory();
  const uint32_t tile = cuda::shared_address(memory);
  const int thread = static_cast<int>(threadIdx.x);
  cuda::SharedArray<bf16> elements(memory, 64 * kDepth);
  for (int i = thread; i < 64 * kDepth; i += 128) elements[i] = cuda::from_float<bf16>(1.0f);
  cuda::ptx::fence_proxy_async();
  __syncthreads();
  float first[4], second[4];
  using namespace cuda::ptx;
  wgmma_fence();
  wgmma<bf16, Major::kK, Major::kK>(first, Tile::descriptor(tile, 64, 0),
                                    Tile::descriptor(tile, 64, 0), false);
  wgmma_commit();
  wgmma_fence();
  for (int s = 0; s < kSteps; ++s) {
    wgmma<bf16, Major::kK, Major::kK>(second, Tile::descriptor(tile, 64, s),
                                      Tile::descriptor(tile, 64, s), s > 0);
  }
  wgmma_commit();
  wgmma_wait<1>(first);
  out[thread] = first[0] + first[3];
  wgmma_wait<0>(second);
  out[128 + thread] = second[1];
#else
  __trap();
#endif
}

void test_groups() {
  DeviceBuffer<float> out(256);
  cuda::launch("groups", groups_kernel, {1, 128, 64 * kDepth * 2}, nullptr, out.data());
  CHECK(synchronize(), "groups kernel");
  for (int i = 0; i < 256; ++i) {
    CHECK(out[i] == (i < 128 ? 32.0f : 64.0f), "sum " + std::to_string(i));
  }
}

// --- stmatrix: the matrices of ptx_sm80_test.cu, the other way round ---

__global__ void store_matrices_kernel(uint16_t* out, bool transposed) {
#if LMINF_SM90A
  unsigned char* memory = cuda::shared_memory();
  cuda::SharedArray<uint16_t> elements(memory, 256);
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t r[4];
  for (int m = 0; m < 4; ++m) {
    r[m] = 0;
    for (int half = 0; half < 2; ++half) {
      const int row = transposed ? lane % 4 * 2 + half : lane / 4;
      const int column = transposed ? lane / 4 : lane % 4 * 2 + half;
      r[m] |= static_cast<uint32_t>(64 * m + 8 * row + column) << (16 * half);
    }
  }
  const uint32_t row = cuda::shared_address(&elements[8 * lane]);
  if (transposed) {
    cuda::ptx::store_matrices_transposed(row, r);
  } else {
    cuda::ptx::store_matrices(row, r);
  }
  __syncwarp();
  for (int e = lane; e < 256; e += 32) out[e] = elements[e];
#else
  __trap();
#endif
}

void test_store_matrices() {
  for (const bool transposed : {false, true}) {
    DeviceBuffer<uint16_t> out(256);
    cuda::launch("stmatrix", store_matrices_kernel, {1, 32, 512}, nullptr, out.data(), transposed);
    CHECK(synchronize(), "stmatrix kernel");
    for (int e = 0; e < 256; ++e) CHECK(out[e] == e, "element " + std::to_string(e));
  }
}

// --- Roles: registers handed over, barriers that one side only arrives at, one lane elected ---

__global__ void __launch_bounds__(384, 1) roles_kernel(int* out) {
#if LMINF_SM90A
  unsigned char* memory = cuda::shared_memory();
  cuda::SharedArray<int> values(memory, 128);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = cuda::ptx::warp_index(), warpgroup = cuda::ptx::warpgroup_index();
  if (warpgroup == 0) {
    cuda::ptx::registers_decrease<40>();
    values[thread] = 3 * thread;
    cuda::ptx::named_barrier_arrive(2, 384);
    if (cuda::ptx::elect_one()) out[256 + warp] += 7;
  } else {
    cuda::ptx::registers_increase<232>();
    cuda::ptx::named_barrier(2, 384);
    out[thread - 128] = values[thread % 128] + warpgroup;
  }
#else
  __trap();
#endif
}

void test_roles() {
  DeviceBuffer<int> out(260);
  for (int i = 0; i < 260; ++i) out[i] = 0;
  cuda::launch("roles", roles_kernel, {1, 384, 512}, nullptr, out.data());
  CHECK(synchronize(), "roles kernel");
  for (int i = 0; i < 256; ++i) {
    CHECK(out[i] == 3 * (i % 128) + 1 + i / 128, "thread " + std::to_string(i));
  }
  for (int warp = 0; warp < 4; ++warp) CHECK(out[256 + warp] == 7, "one lane of each warp");
}

// --- Programmatic dependent launch ---

__global__ void first_kernel(int* out, int blocks) {
#if LMINF_SM90A
  cuda::ptx::grid_launch_dependents();
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 32) {
    out[static_cast<int>(blockIdx.x) * 1024 + i] = i + blocks;
  }
#else
  __trap();
#endif
}

__global__ void second_kernel(const int* in, int* out, int blocks) {
#if LMINF_SM90A
  cuda::ptx::grid_wait();
  int sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < 1024 * blocks; i += 32) sum += in[i];
  out[threadIdx.x] = sum;
#else
  __trap();
#endif
}

void test_dependent_launch() {
  constexpr int kBlocks = 64;
  DeviceBuffer<int> between(1024 * kBlocks), out(32);
  cuda::launch("first", first_kernel, {kBlocks, 32, 0}, nullptr, between.data(), kBlocks);
  cuda::launch("second", second_kernel, {1, 32, 0, true}, nullptr,
               static_cast<const int*>(between.data()), out.data(), kBlocks);
  CHECK(synchronize(), "dependent kernels");
  for (int thread = 0; thread < 32; ++thread) {
    int want = 0;
    for (int i = thread; i < 1024; i += 32) want += kBlocks * (i + kBlocks);
    CHECK(out[thread] == want, "thread " + std::to_string(thread));
  }
}

bool is_hopper() {
#if defined(LMINF_EMULATION)
  return true;
#else
  int device = 0, major = 0;
  return has_device() && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
#endif
}

void test_all() {
  test_mbarrier();
  test_bulk_load();
  test_tma();
  test_tensor_map_limits();
  test_swizzles<bf16, 64>();
#if !defined(LMINF_THREAD_SANITIZER)  // to which every N is the same
  test_swizzles<fp16, 96>();
  test_swizzles<bf16, 256>();
  test_every_n(std::make_integer_sequence<int, 32>());
#endif
  test_groups();
  test_store_matrices();
  test_roles();
  test_dependent_launch();
}

}  // namespace
}  // namespace lminf::test

int main() {
  using namespace lminf::test;
#if defined(LMINF_PTX_INTERPRETER)
  lminf::interpreter::Device hopper;
  hopper.capability = 90;
  lminf::interpreter::set_device(hopper);
#endif
  if (!is_hopper()) {
    std::printf("ptx_sm90_test: no device of compute capability 9.x, nothing was tested\n");
    return 77;
  }
#if defined(LMINF_EMULATION)
  lminf::emulation::Device device;
  device.capability = 90;
  lminf::emulation::set_device(device);
#endif
  test_all();
#if defined(LMINF_EMULATION) && !defined(LMINF_THREAD_SANITIZER)
  for (uint64_t seed = 1; seed < 4; ++seed) {
    lminf::emulation::set_schedule_seed(seed);
    test_all();
  }
#elif defined(LMINF_PTX_INTERPRETER)
  lminf::interpreter::set_schedule_seed(1);
  test_all();
#endif
  return finish_tests("ptx_sm90_test");
}
