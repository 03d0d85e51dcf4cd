// wgmma.mma_async for every N, which PTX wants as one literal list of registers each. Included by
// ptx/sm90.cuh alone.
//
// LMINF_QUADS_n(f, s) is f(0, 1, 2, 3) s() f(4, 5, 6, 7) ... up to n accumulators; f makes of four
// indices four operands or four places in the text, s the comma between them. LMINF_WGMMA then
// spells Wgmma<N>, given the indices of the operands that follow the N / 2 accumulators.
#pragma once

#include "../common/device.cuh"

namespace lminf::cuda::ptx {

template <int kN>
struct Wgmma;

#define LMINF_COMMA() ,
#define LMINF_TEXT_COMMA() ", "
#define LMINF_OPERANDS(i, j, k, l) "+f"(d[i]), "+f"(d[j]), "+f"(d[k]), "+f"(d[l])
#define LMINF_PLACES(i, j, k, l) "%" #i ", %" #j ", %" #k ", %" #l

// clang-format off
#define LMINF_QUADS_4(f, s) f(0, 1, 2, 3)
#define LMINF_QUADS_8(f, s) LMINF_QUADS_4(f, s) s() f(4, 5, 6, 7)
#define LMINF_QUADS_12(f, s) LMINF_QUADS_8(f, s) s() f(8, 9, 10, 11)
#define LMINF_QUADS_16(f, s) LMINF_QUADS_12(f, s) s() f(12, 13, 14, 15)
#define LMINF_QUADS_20(f, s) LMINF_QUADS_16(f, s) s() f(16, 17, 18, 19)
#define LMINF_QUADS_24(f, s) LMINF_QUADS_20(f, s) s() f(20, 21, 22, 23)
#define LMINF_QUADS_28(f, s) LMINF_QUADS_24(f, s) s() f(24, 25, 26, 27)
#define LMINF_QUADS_32(f, s) LMINF_QUADS_28(f, s) s() f(28, 29, 30, 31)
#define LMINF_QUADS_36(f, s) LMINF_QUADS_32(f, s) s() f(32, 33, 34, 35)
#define LMINF_QUADS_40(f, s) LMINF_QUADS_36(f, s) s() f(36, 37, 38, 39)
#define LMINF_QUADS_44(f, s) LMINF_QUADS_40(f, s) s() f(40, 41, 42, 43)
#define LMINF_QUADS_48(f, s) LMINF_QUADS_44(f, s) s() f(44, 45, 46, 47)
#define LMINF_QUADS_52(f, s) LMINF_QUADS_48(f, s) s() f(48, 49, 50, 51)
#define LMINF_QUADS_56(f, s) LMINF_QUADS_52(f, s) s() f(52, 53, 54, 55)
#define LMINF_QUADS_60(f, s) LMINF_QUADS_56(f, s) s() f(56, 57, 58, 59)
#define LMINF_QUADS_64(f, s) LMINF_QUADS_60(f, s) s() f(60, 61, 62, 63)
#define LMINF_QUADS_68(f, s) LMINF_QUADS_64(f, s) s() f(64, 65, 66, 67)
#define LMINF_QUADS_72(f, s) LMINF_QUADS_68(f, s) s() f(68, 69, 70, 71)
#define LMINF_QUADS_76(f, s) LMINF_QUADS_72(f, s) s() f(72, 73, 74, 75)
#define LMINF_QUADS_80(f, s) LMINF_QUADS_76(f, s) s() f(76, 77, 78, 79)
#define LMINF_QUADS_84(f, s) LMINF_QUADS_80(f, s) s() f(80, 81, 82, 83)
#define LMINF_QUADS_88(f, s) LMINF_QUADS_84(f, s) s() f(84, 85, 86, 87)
#define LMINF_QUADS_92(f, s) LMINF_QUADS_88(f, s) s() f(88, 89, 90, 91)
#define LMINF_QUADS_96(f, s) LMINF_QUADS_92(f, s) s() f(92, 93, 94, 95)
#define LMINF_QUADS_100(f, s) LMINF_QUADS_96(f, s) s() f(96, 97, 98, 99)
#define LMINF_QUADS_104(f, s) LMINF_QUADS_100(f, s) s() f(100, 101, 102, 103)
#define LMINF_QUADS_108(f, s) LMINF_QUADS_104(f, s) s() f(104, 105, 106, 107)
#define LMINF_QUADS_112(f, s) LMINF_QUADS_108(f, s) s() f(108, 109, 110, 111)
#define LMINF_QUADS_116(f, s) LMINF_QUADS_112(f, s) s() f(112, 113, 114, 115)
#define LMINF_QUADS_120(f, s) LMINF_QUADS_116(f, s) s() f(116, 117, 118, 119)
#define LMINF_QUADS_124(f, s) LMINF_QUADS_120(f, s) s() f(120, 121, 122, 123)
#define LMINF_QUADS_128(f, s) LMINF_QUADS_124(f, s) s() f(124, 125, 126, 127)
// clang-format on

// The accumulate flag must be a predicate; the two literals 1 leave the signs of a and b.
#define LMINF_WGMMA_SHARED(N, R, TYPE, i0, i1, i2, i3, i4)                                  \
  asm volatile(                                                                             \
      "{\n"                                                                                 \
      ".reg .pred accumulate;\n"                                                            \
      "setp.ne.b32 accumulate, %" #i2                                                       \
      ", 0;\n"                                                                              \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LMINF_QUADS_##R( \
          LMINF_PLACES, LMINF_TEXT_COMMA) "}, %" #i0 ", %" #i1 ", accumulate, 1, 1, %" #i3  \
                                          ", %" #i4 ";\n}\n"                                \
      : LMINF_QUADS_##R(LMINF_OPERANDS, LMINF_COMMA)                                        \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMajorA), "n"(kMajorB))

#define LMINF_WGMMA_REGISTERS(N, R, TYPE, i0, i1, i2, i3, i4, i5, i6)                          \
  asm volatile(                                                                                \
      "{\n"                                                                                    \
      ".reg .pred accumulate;\n"                                                               \
      "setp.ne.b32 accumulate, %" #i5                                                          \
      ", 0;\n"                                                                                 \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LMINF_QUADS_##R(    \
          LMINF_PLACES, LMINF_TEXT_COMMA) "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 \
                                          ", accumulate, 1, 1, %" #i6 ";\n}\n"                 \
      : LMINF_QUADS_##R(LMINF_OPERANDS, LMINF_COMMA)                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
        "n"(kMajorB))

#define LMINF_WGMMA(N, R, i0, i1, i2, i3, i4, i5, i6)                                         \
  template <>                                                                                 \
  struct Wgmma<N> {                                                                           \
    template <bool kBf16, int kMajorA, int kMajorB>                                           \
    LMINF_DEVICE static void shared(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) { \
      if constexpr (kBf16) {                                                                  \
        LMINF_WGMMA_SHARED(N, R, "bf16", i0, i1, i2, i3, i4);                                 \
      } else {                                                                                \
        LMINF_WGMMA_SHARED(N, R, "f16", i0, i1, i2, i3, i4);                                  \
      }                                                                                       \
    }                                                                                         \
    template <bool kBf16, int kMajorB>                                                        \
    LMINF_DEVICE static void registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b,     \
                                       bool accumulate) {                                     \
      if constexpr (kBf16) {                                                                  \
        LMINF_WGMMA_REGISTERS(N, R, "bf16", i0, i1, i2, i3, i4, i5, i6);                      \
      } else {                                                                                \
        LMINF_WGMMA_REGISTERS(N, R, "f16", i0, i1, i2, i3, i4, i5, i6);                       \
      }                                                                                       \
    }                                                                                         \
  };

LMINF_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
LMINF_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
LMINF_WGMMA(24, 12, 12, 13, 14, 15, 16, 17, 18)
LMINF_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
LMINF_WGMMA(40, 20, 20, 21, 22, 23, 24, 25, 26)
LMINF_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
LMINF_WGMMA(56, 28, 28, 29, 30, 31, 32, 33, 34)
LMINF_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
LMINF_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42)
LMINF_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
LMINF_WGMMA(88, 44, 44, 45, 46, 47, 48, 49, 50)
LMINF_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
LMINF_WGMMA(104, 52, 52, 53, 54, 55, 56, 57, 58)
LMINF_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
LMINF_WGMMA(120, 60, 60, 61, 62, 63, 64, 65, 66)
LMINF_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
LMINF_WGMMA(136, 68, 68, 69, 70, 71, 72, 73, 74)
LMINF_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
LMINF_WGMMA(152, 76, 76, 77, 78, 79, 80, 81, 82)
LMINF_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
LMINF_WGMMA(168, 84, 84, 85, 86, 87, 88, 89, 90)
LMINF_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
LMINF_WGMMA(184, 92, 92, 93, 94, 95, 96, 97, 98)
LMINF_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
LMINF_WGMMA(200, 100, 100, 101, 102, 103, 104, 105, 106)
LMINF_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
LMINF_WGMMA(216, 108, 108, 109, 110, 111, 112, 113, 114)
LMINF_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
LMINF_WGMMA(232, 116, 116, 117, 118, 119, 120, 121, 122)
LMINF_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
LMINF_WGMMA(248, 124, 124, 125, 126, 127, 128, 129, 130)
LMINF_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef LMINF_WGMMA
#undef LMINF_WGMMA_REGISTERS
#undef LMINF_WGMMA_SHARED
#undef LMINF_PLACES
#undef LMINF_OPERANDS
#undef LMINF_TEXT_COMMA
#undef LMINF_COMMA

}  // namespace lminf::cuda::ptx
