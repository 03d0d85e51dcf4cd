// Every wrapper of ptx/sm80.cuh against a result worked out element by element here. Compiled as
// C++ it tests the emulation's host bodies, compiled by nvcc the instructions themselves: both must
// give these very bits (exp2_approx: within its stated error).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "../cuda/ptx/sm80.cuh"
#include "check.h"
#include "device_buffer.h"

namespace lminf::test {
namespace {

using cuda::bf16;
using cuda::fp16;

// --- cp.async: two groups, the second zero-filled for odd threads ---

__global__ void copy_kernel(const uint32_t* in, uint32_t* out) {
  unsigned char* memory = cuda::shared_memory();
  cuda::SharedArray<uint32_t> words(memory, 2 * 32 * 4);
  const int thread = static_cast<int>(threadIdx.x);
  cuda::ptx::copy_async(cuda::shared_address(&words[4 * thread]), in + 4 * thread, true);
  cuda::ptx::copy_async_commit();
  cuda::ptx::copy_async(cuda::shared_address(&words[128 + 4 * thread]), in + 128 + 4 * thread,
                        thread % 2 == 0);
  cuda::ptx::copy_async_commit();
  cuda::ptx::copy_async_wait<1>();
  for (int e = 0; e < 4; ++e) out[4 * thread + e] = words[4 * thread + e];
  cuda::ptx::copy_async_wait<0>();
  for (int e = 0; e < 4; ++e) out[128 + 4 * thread + e] = words[128 + 4 * thread + e];
}

void test_copy_async() {
  DeviceBuffer<uint32_t> in(256), out(256);
  for (int i = 0; i < 256; ++i) {
    in[i] = 0x9E3779B9u * static_cast<uint32_t>(i + 1);
    out[i] = 0xDEADBEEFu;
  }
  cuda::launch("copy", copy_kernel, {1, 32, 1024}, nullptr, static_cast<const uint32_t*>(in.data()),
               out.data());
  CHECK(synchronize(), "copy kernel");
  for (int i = 0; i < 256; ++i) {
    const bool zero = i >= 128 && (i - 128) / 4 % 2 == 1;
    CHECK(out[i] == (zero ? 0u : in[i]), "word " + std::to_string(i));
  }
}

// --- ldmatrix: element (matrix m, row r, column c) is the number 64 m + 8 r + c ---

__global__ void matrix_kernel(uint32_t* out, bool transposed) {
  unsigned char* memory = cuda::shared_memory();
  cuda::SharedArray<uint16_t> elements(memory, 256);
  const int lane = static_cast<int>(threadIdx.x);
  for (int e = lane; e < 256; e += 32) elements[e] = static_cast<uint16_t>(e);
  __syncwarp();
  uint32_t r[4];
  const uint32_t row = cuda::shared_address(&elements[8 * lane]);
  if (transposed) {
    cuda::ptx::load_matrices_transposed(r, row);
  } else {
    cuda::ptx::load_matrices(r, row);
  }
  for (int m = 0; m < 4; ++m) out[4 * lane + m] = r[m];
}

void test_load_matrices() {
  for (const bool transposed : {false, true}) {
    DeviceBuffer<uint32_t> out(128);
    cuda::launch("matrix", matrix_kernel, {1, 32, 512}, nullptr, out.data(), transposed);
    CHECK(synchronize(), "matrix kernel");
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        for (int half = 0; half < 2; ++half) {
          const int row = transposed ? lane % 4 * 2 + half : lane / 4;
          const int column = transposed ? lane / 4 : lane % 4 * 2 + half;
          const uint32_t got = out[4 * lane + m] >> (16 * half) & 0xffffu;
          CHECK(got == static_cast<uint32_t>(64 * m + 8 * row + column),
                "lane " + std::to_string(lane) + " matrix " + std::to_string(m) +
                    (transposed ? " transposed" : ""));
        }
      }
    }
  }
}

// --- mma: small integers, so that every order of summation gives the same bits ---

template <typename T>
__global__ void mma_kernel(const float* a, const float* b, const float* c, float* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  uint32_t fa[4];
  for (int r = 0; r < 4; ++r) {
    const int row = g + 8 * (r % 2), k = 2 * t + 8 * (r / 2);
    fa[r] = cuda::pack<T>(a[16 * row + k], a[16 * row + k + 1]);
  }
  uint32_t fb[2];
  for (int r = 0; r < 2; ++r) {
    const int k = 2 * t + 8 * r;
    fb[r] = cuda::pack<T>(b[8 * k + g], b[8 * (k + 1) + g]);
  }
  float acc[4];
  for (int e = 0; e < 4; ++e) acc[e] = c[8 * (g + 8 * (e / 2)) + 2 * t + e % 2];
  cuda::ptx::mma<T>(acc, fa, fb[0], fb[1]);
  for (int e = 0; e < 4; ++e) d[8 * (g + 8 * (e / 2)) + 2 * t + e % 2] = acc[e];
}

template <typename T>
void test_mma(const char* type) {
  DeviceBuffer<float> a(256), b(128), c(128), d(128);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>((i * 37 + 11) % 29 - 14);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>((i * 53 + 5) % 31 - 15) * 0.25f;
  for (int i = 0; i < 128; ++i) c[i] = static_cast<float>(i % 17 - 8);
  cuda::launch("mma", mma_kernel<T>, {1, 32, 0}, nullptr, static_cast<const float*>(a.data()),
               static_cast<const float*>(b.data()), static_cast<const float*>(c.data()), d.data());
  CHECK(synchronize(), "mma kernel");
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float want = c[8 * row + column];
      for (int k = 0; k < 16; ++k) want += a[16 * row + k] * b[8 * k + column];
      CHECK(d[8 * row + column] == want, std::string(type) + " row " + std::to_string(row) +
                                             " column " + std::to_string(column));
    }
  }
}

// --- ex2.approx ---

__global__ void exp2_kernel(const float* in, float* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    out[i] = cuda::ptx::exp2_approx(in[i]);
  }
}

void test_exp2() {
  constexpr int kValues = 2048;
  DeviceBuffer<float> in(kValues + 4), out(kValues + 4);
  for (int i = 0; i < kValues; ++i) in[i] = -120.0f + 0.123f * static_cast<float>(i);
  in[kValues] = -INFINITY;
  in[kValues + 1] = INFINITY;
  in[kValues + 2] = -140.0f;  // 2^-140 is subnormal
  in[kValues + 3] = NAN;
  cuda::launch("exp2", exp2_kernel, {1, 32, 0}, nullptr, static_cast<const float*>(in.data()),
               out.data(), kValues + 4);
  CHECK(synchronize(), "exp2 kernel");
  for (int i = 0; i < kValues; ++i) {
    const double want = std::exp2(static_cast<double>(in[i]));
    if (want > 3.4e38) {
      CHECK(std::isinf(out[i]), "2^" + std::to_string(in[i]));
    } else {
      CHECK(std::fabs(out[i] - want) <= want * 0x1p-22, "2^" + std::to_string(in[i]));
    }
  }
  CHECK(out[kValues] == 0.0f, "2^-inf");
  CHECK(std::isinf(out[kValues + 1]), "2^inf");
  CHECK(out[kValues + 2] == 0.0f, "a subnormal result is flushed");
  CHECK(std::isnan(out[kValues + 3]), "2^NaN");
}

// --- named barrier: two warps trade through shared memory, the third takes no part ---

__global__ void barrier_kernel(int* out) {
  unsigned char* memory = cuda::shared_memory();
  cuda::SharedArray<int> values(memory, 64);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= 64) return;
  values[thread] = 3 * thread;
  cuda::ptx::named_barrier(1, 64);
  out[thread] = values[63 - thread];
}

void test_named_barrier() {
  DeviceBuffer<int> out(64);
  cuda::launch("barrier", barrier_kernel, {1, 96, 256}, nullptr, out.data());
  CHECK(synchronize(), "barrier kernel");
  for (int i = 0; i < 64; ++i) CHECK(out[i] == 3 * (63 - i), "thread " + std::to_string(i));
}

// --- shuffles and votes, which the emulation gives by their CUDA names ---

__global__ void vote_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_xor_sync(cuda::kFullWarp, 10 * lane, 5);
  out[32 + lane] = __shfl_sync(cuda::kFullWarp, 10 * lane, (lane + 7) % 32);
  out[64 + lane] = static_cast<int>(__ballot_sync(cuda::kFullWarp, lane % 3 == 0));
  out[96 + lane] = __any_sync(cuda::kFullWarp, lane == 31) * 2 + __any_sync(cuda::kFullWarp, 0);
}

void test_votes() {
  DeviceBuffer<int> out(128);
  cuda::launch("vote", vote_kernel, {1, 32, 0}, nullptr, out.data());
  CHECK(synchronize(), "vote kernel");
  unsigned thirds = 0;
  for (int lane = 0; lane < 32; lane += 3) thirds |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(out[lane] == 10 * (lane ^ 5), "shuffle xor, lane " + std::to_string(lane));
    CHECK(out[32 + lane] == 10 * ((lane + 7) % 32), "shuffle, lane " + std::to_string(lane));
    CHECK(static_cast<unsigned>(out[64 + lane]) == thirds, "ballot, lane " + std::to_string(lane));
    CHECK(out[96 + lane] == 2, "any, lane " + std::to_string(lane));
  }
}

}  // namespace
}  // namespace lminf::test

int main() {
  using namespace lminf::test;
  if (!has_device()) {
    std::printf("ptx_sm80_test: no CUDA device, nothing was tested\n");
    return 77;
  }
  test_copy_async();
  test_load_matrices();
  test_mma<lminf::cuda::bf16>("bf16");
  test_mma<lminf::cuda::fp16>("fp16");
  test_exp2();
  test_named_barrier();
  test_votes();
  return finish_tests("ptx_sm80_test");
}
