// The PTX interpreter, opcode group by opcode group, against the PTX ISA's own rules; and the
// faults that it must report. The instructions of matrices and bulk copies have tests of their own:
// ptx_sm80_test.cu and ptx_sm90_test.cu, compiled by nvcc and run here.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../ptx_interpreter/control.h"
#include "../ptx_interpreter/fault.h"
#include "../ptx_interpreter/memory.h"
#include "../ptx_interpreter/schedule.h"
#include "check.h"

namespace lminf::test {
namespace {

using interpreter::Fault;
using interpreter::Launch;
using interpreter::Module;
using interpreter::Size3;

struct Result {
  std::vector<uint64_t> out;  // a word for each thread
  std::string fault;          // empty: none
};

struct Options {
  Size3 grid{1, 1, 1}, block{32, 1, 1};
  std::vector<uint64_t> in = std::vector<uint64_t>(64);
  uint32_t shared_bytes = 1024;
  uint64_t seed = 0;
  bool overlaps = false;
  std::string functions;  // beside the kernel
};

// Line 15 of the text is the body's first.
constexpr int kFirstLine = 15;

// %r0 is the thread's number, %rd3 and %rd4 the addresses of its words of `in` and `out`.
Result run(const std::string& body, const Options& options = {}) {
  const std::string text =
      ".version 8.0\n.target sm_90a\n.address_size 64\n"
      ".extern .shared .align 1024 .b8 memory[];\n" +
      options.functions +
      ".visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)\n{\n"
      ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .f32 %f<32>;\n"
      ".reg .b64 %rd<16>; .reg .f64 %fd<8>;\n"
      "ld.param.u64 %rd0, [k_param_0];\nld.param.u64 %rd1, [k_param_1];\n"
      "mov.u32 %r0, %tid.x;\nmul.wide.u32 %rd2, %r0, 8;\nadd.s64 %rd3, %rd0, %rd2;\n"
      "add.s64 %rd4, %rd1, %rd2;\n" +
      body + "\nret;\n}\n";
  Result result;
  result.out.assign(64, ~uint64_t{0});
  interpreter::clear_globals();
  interpreter::register_region(options.in.data(), 8 * options.in.size(), "in");
  interpreter::register_region(result.out.data(), 8 * result.out.size(), "out");
  interpreter::set_schedule(options.seed);
  try {
    Module module(text);
    Launch launch;
    launch.function = module.function("k");
    launch.grid = options.grid;
    launch.block = options.block;
    launch.shared_bytes = options.shared_bytes;
    launch.overlaps = options.overlaps;
    const uint64_t pointers[2] = {reinterpret_cast<uint64_t>(options.in.data()),
                                  reinterpret_cast<uint64_t>(result.out.data())};
    launch.parameters.resize(sizeof(pointers));
    std::memcpy(launch.parameters.data(), pointers, sizeof(pointers));
    interpreter::run(launch);
  } catch (const Fault& fault) {
    result.fault = fault.what();
  }
  return result;
}

void check_word(const std::string& body, const char* register_name, uint64_t want) {
  const Result r = run(body + "\nst.global.u64 [%rd4], " + register_name + ";");
  CHECK(r.fault.empty() && r.out[0] == want && r.out[31] == want,
        body + ": " + std::to_string(r.out[0]) + " instead of " + std::to_string(want) + r.fault);
}
// Leaves its result in %r1, %rd5, %f1 or %p1.
void check_u32(const std::string& body, uint32_t want) {
  check_word(body + " cvt.u64.u32 %rd9, %r1;", "%rd9", want);
}
void check_s32(const std::string& body, int32_t want) {
  check_u32(body, static_cast<uint32_t>(want));
}
void check_u64(const std::string& body, uint64_t want) { check_word(body, "%rd5", want); }
void check_f32(const std::string& body, float want) {
  uint32_t bits;
  std::memcpy(&bits, &want, 4);
  check_u32(body + " mov.b32 %r1, %f1;", bits);
}
void check_pred(const std::string& body, bool want) {
  check_u32(body + " selp.u32 %r1, 1, 0, %p1;", want);
}
std::string bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  char text[16];
  std::snprintf(text, sizeof(text), "0f%08X", bits);
  return text;
}

void check_fault(const std::string& body, const std::string& part, const Options& options = {}) {
  const Result r = run(body, options);
  CHECK(r.fault.find(part) != std::string::npos, body + "\n  reported: " + r.fault);
}
void check_sound(const std::string& body, const Options& options = {}) {
  const Result r = run(body, options);
  CHECK(r.fault.empty(), body + "\n  reported: " + r.fault);
}

constexpr float kInf = std::numeric_limits<float>::infinity();
const std::string kNan = "0f7FC00000", kInfinity = "0f7F800000";

// --- Values ---

void test_integers() {
  check_s32("add.s32 %r1, 2147483647, 1;", INT32_MIN);
  check_s32("sub.s32 %r1, -2147483648, 1;", INT32_MAX);
  check_u64("add.s64 %rd5, 9223372036854775807, 1;", uint64_t{1} << 63);
  check_s32("mul.lo.s32 %r1, 65537, 65537;", 131073);
  check_s32("mul.hi.s32 %r1, -7, 1717986919;", -3);
  check_u32("mul.hi.u32 %r1, 4294967295, 4294967295;", 4294967294u);
  check_u64("mul.hi.u64 %rd5, -1, -1;", ~uint64_t{0} - 1);
  check_u64("mul.wide.s32 %rd5, -3, 5;", static_cast<uint64_t>(int64_t{-15}));
  check_u64("mul.wide.u32 %rd5, 4294967295, 2;", 8589934590u);
  check_u32("mov.u16 %h1, 65535; mul.wide.u16 %r1, %h1, 8;", 524280);
  check_s32("mad.lo.s32 %r1, 100000, 100000, -3;", 1410065408 - 3);
  check_s32("div.s32 %r1, -7, 2;", -3);
  check_s32("rem.s32 %r1, -7, 2;", -1);
  check_s32("mov.u32 %r2, 0; div.s32 %r1, 7, %r2;", -1);
  check_s32("div.s32 %r1, -2147483648, -1;", INT32_MIN);
  check_s32("rem.s32 %r1, -2147483648, -1;", 0);
  check_u32("div.u32 %r1, 4294967295, 2;", 2147483647u);
  check_s32("min.s32 %r1, -1, 1;", -1);
  check_u32("min.u32 %r1, -1, 1;", 1);
  check_s32("max.s32 %r1, -1, 1;", 1);
  check_s32("neg.s32 %r1, -2147483648;", INT32_MIN);
  check_s32("abs.s32 %r1, -5;", 5);
  // A shift past the width leaves nothing, or the sign.
  check_u32("shl.b32 %r1, 1, 32;", 0);
  check_u32("shl.b32 %r1, 3, 31;", 1u << 31);
  check_u32("shr.u32 %r1, -1, 33;", 0);
  check_s32("shr.s32 %r1, -8, 40;", -1);
  check_s32("shr.s32 %r1, -8, 1;", -4);
  check_u64("shr.u64 %rd5, -1, 63;", 1);
  check_u32("and.b32 %r1, 12, 10;", 8);
  check_u32("or.b32 %r1, 12, 10;", 14);
  check_u32("xor.b32 %r1, 12, 10;", 6);
  check_u32("not.b32 %r1, 0;", ~0u);
  check_u32("bfi.b32 %r1, 255, 0, 4, 8;", 0xff0);
  check_u32("bfi.b32 %r1, 0, -1, 28, 8;", 0x0fffffff);
  check_u32("bfi.b32 %r1, 5, 9, 3, 0;", 9);
}

void test_floats() {
  // One rounding: (1 + 2^-23)^2 - 1 is not 2^-22.
  const std::string x = bits_of(1.0f + 0x1p-23f), minus_one = bits_of(-1.0f);
  check_f32("fma.rn.f32 %f1, " + x + ", " + x + ", " + minus_one + ";", 0x1p-22f + 0x1p-46f);
  check_f32("mul.f32 %f2, " + x + ", " + x + "; add.f32 %f1, %f2, " + minus_one + ";", 0x1p-22f);
  check_f32("max.f32 %f1, " + kNan + ", " + bits_of(-2.0f) + ";", -2.0f);
  check_f32("min.f32 %f1, " + bits_of(3.0f) + ", " + kNan + ";", 3.0f);
  check_f32("max.f32 %f1, " + bits_of(-0.0f) + ", " + bits_of(0.0f) + ";", 0.0f);
  check_f32("min.f32 %f1, " + bits_of(0.0f) + ", " + bits_of(-0.0f) + ";", -0.0f);
  check_f32("neg.f32 %f1, " + bits_of(0.0f) + ";", -0.0f);
  check_f32("abs.f32 %f1, " + bits_of(-1.5f) + ";", 1.5f);
  check_f32("copysign.f32 %f1, " + bits_of(-1.0f) + ", " + bits_of(7.0f) + ";", -7.0f);
  check_f32("rcp.rn.f32 %f1, " + bits_of(3.0f) + ";", 1.0f / 3.0f);
  check_f32("div.rn.f32 %f1, " + bits_of(1.0f) + ", " + bits_of(0.0f) + ";", kInf);
  check_f32("sqrt.rn.f32 %f1, " + bits_of(2.0f) + ";", std::sqrt(2.0f));
  // The ISA's table of ex2.
  check_f32("ex2.approx.ftz.f32 %f1, " + bits_of(-kInf) + ";", 0.0f);
  check_f32("ex2.approx.ftz.f32 %f1, " + bits_of(-0.0f) + ";", 1.0f);
  check_f32("ex2.approx.ftz.f32 %f1, " + kInfinity + ";", kInf);
  check_f32("ex2.approx.ftz.f32 %f1, " + bits_of(-130.0f) + ";", 0.0f);
  check_f32("ex2.approx.f32 %f1, " + bits_of(-130.0f) + ";", 0x1p-130f);
  check_f32("ex2.approx.f32 %f1, " + bits_of(5.0f) + ";", 32.0f);
  check_f32("rcp.approx.ftz.f32 %f1, " + bits_of(0x1p-130f) + ";", kInf);
  // Of div.approx: a divisor past 2^126 gives 0, and NaN under an infinity.
  check_f32("div.approx.f32 %f1, " + bits_of(6.0f) + ", " + bits_of(3.0f) + ";", 2.0f);
  check_f32("div.approx.f32 %f1, " + bits_of(1.0f) + ", " + bits_of(-0x1p127f) + ";", -0.0f);
  check_pred("div.approx.f32 %f1, " + kInfinity + ", " + bits_of(0x1p127f) +
                 "; setp.nan.f32 %p1, %f1, %f1;",
             true);
}

void test_comparisons() {
  struct Case {
    const char* name;
    bool less, equal, more, unordered;
  };
  const Case cases[] = {
      {"eq", false, true, false, false}, {"ne", true, false, true, false},
      {"lt", true, false, false, false}, {"le", true, true, false, false},
      {"gt", false, false, true, false}, {"ge", false, true, true, false},
      {"equ", false, true, false, true}, {"neu", true, false, true, true},
      {"ltu", true, false, false, true}, {"leu", true, true, false, true},
      {"gtu", false, false, true, true}, {"geu", false, true, true, true},
      {"num", true, true, true, false},  {"nan", false, false, false, true},
  };
  const std::string one = bits_of(1.0f), two = bits_of(2.0f);
  for (const Case& c : cases) {
    const std::string setp = std::string("setp.") + c.name + ".f32 %p1, ";
    check_pred(setp + one + ", " + two + ";", c.less);
    check_pred(setp + two + ", " + two + ";", c.equal);
    check_pred(setp + two + ", " + one + ";", c.more);
    check_pred(setp + kNan + ", " + one + ";", c.unordered);
    check_pred(setp + one + ", " + kNan + ";", c.unordered);
  }
  check_pred("setp.lt.s32 %p1, -1, 1;", true);
  check_pred("setp.lt.u32 %p1, -1, 1;", false);
  check_pred("setp.hi.u32 %p1, -1, 1;", true);
  check_pred("mov.u16 %h1, -1; setp.gt.s16 %p1, %h1, -2;", true);
  check_pred("setp.eq.s32 %p2, 1, 1; setp.eq.s32 %p3, 1, 2; xor.pred %p1, %p2, %p3;", true);
  check_pred("setp.eq.s32 %p2, 1, 1; not.pred %p1, %p2;", false);
  check_f32("setp.eq.s32 %p1, 1, 2; selp.f32 %f1, " + one + ", " + two + ", %p1;", 2.0f);
}

void test_conversions() {
  const auto to_s32 = [](const char* rounding, float x, int32_t want) {
    check_s32(std::string("cvt.") + rounding + ".s32.f32 %r1, " + bits_of(x) + ";", want);
  };
  to_s32("rni", 2.5f, 2);
  to_s32("rni", 3.5f, 4);
  to_s32("rni", -2.5f, -2);
  to_s32("rzi", -2.9f, -2);
  to_s32("rmi", -2.1f, -3);
  to_s32("rpi", 2.1f, 3);
  to_s32("rzi", 3e9f, INT32_MAX);
  to_s32("rzi", -3e9f, INT32_MIN);
  to_s32("rzi", std::nanf(""), 0);
  check_u32("cvt.rzi.u32.f32 %r1, " + bits_of(-5.0f) + ";", 0);
  check_f32("cvt.rni.f32.f32 %f1, " + bits_of(0.5f) + ";", 0.0f);
  check_f32("cvt.rn.f32.s32 %f1, -16777217;", -16777216.0f);
  check_f32("mov.u64 %rd6, -1; cvt.rn.f32.u64 %f1, %rd6;", 0x1p64f);
  check_f32("cvt.rn.f32.f64 %f1, 0d3FF0000010000000;", 1.0f);  // a tie, to even
  check_u64("mov.u32 %r2, -5; cvt.s64.s32 %rd5, %r2;", static_cast<uint64_t>(int64_t{-5}));
  check_u64("mov.u32 %r2, -5; cvt.u64.u32 %rd5, %r2;", 0xfffffffb);
  check_u32("mov.u64 %rd6, 4294967297; cvt.u32.u64 %r1, %rd6;", 1);
  check_s32("mov.u16 %h1, 65535; cvt.s32.s16 %r1, %h1;", -1);
  // 16-bit floats: ties to even, overflow to infinity, the first source high.
  const std::string tie = bits_of(1.0f + 0x1p-8f), past = bits_of(1.0f + 0x3p-8f);
  check_u32("cvt.rn.bf16x2.f32 %r1, " + tie + ", " + past + ";", 0x3f803f82);
  check_u32("cvt.rn.f16x2.f32 %r1, " + bits_of(65520.0f) + ", " + bits_of(0x1p-24f) + ";",
            0x7c000001);
  check_f32("mov.u16 %h1, 0x3c01; cvt.f32.f16 %f1, %h1;", 1.0f + 0x1p-10f);
  check_f32("mov.u16 %h1, 0xc049; cvt.f32.bf16 %f1, %h1;", -3.140625f);
  check_u32("mov.u16 %h1, 0x1234; mov.u16 %h2, 0x5678; mov.b32 %r1, {%h1, %h2};", 0x56781234);
  check_u64("mov.b64 %rd6, {1, 2}; mov.b64 {%r2, %r3}, %rd6; cvt.u64.u32 %rd5, %r3;", 2);
}

// --- Flow ---

void test_flow() {
  // Lanes leave a loop after as many rounds as their number.
  Result r = run(R"(
mov.u32 %r1, 0;
mov.u32 %r2, 0;
L: setp.ge.s32 %p1, %r2, %r0;
@%p1 bra D;
add.s32 %r1, %r1, %r2;
add.s32 %r2, %r2, 1;
bra.uni L;
D: bar.warp.sync -1;
shfl.sync.idx.b32 %r3, %r1, 31, 31, -1;
add.s32 %r1, %r1, %r3;
cvt.u64.u32 %rd5, %r1;
st.global.u64 [%rd4], %rd5;)");
  for (uint64_t lane = 0; lane < 32; ++lane) {
    const uint64_t want = lane * (lane - 1) / 2 + 465;
    CHECK(r.fault.empty() && r.out[lane] == (lane == 0 ? 465 : want),
          "lane " + std::to_string(lane));
  }
  Options with_function;
  with_function.functions =
      ".func twice(.param .b64 twice_param_0, .param .b32 twice_param_1) { .reg .b64 %rd<4>;"
      " .reg .b32 %r<2>; ld.param.u64 %rd1, [twice_param_0]; ld.param.u32 %r1, [twice_param_1];"
      " cvt.u64.u32 %rd2, %r1; add.s64 %rd2, %rd2, %rd2; st.u64 [%rd1], %rd2; ret; } ";
  r = run(R"(
setp.lt.s32 %p1, %r0, 20;
@!%p1 bra E;
{
.param .b64 param0; st.param.b64 [param0+0], %rd4;
.param .b32 param1; st.param.b32 [param1+0], %r0;
call.uni twice, (param0, param1);
}
E:)",
          with_function);
  for (uint64_t lane = 0; lane < 32; ++lane) {
    CHECK(r.fault.empty() && r.out[lane] == (lane < 20 ? 2 * lane : ~uint64_t{0}),
          "call, lane " + std::to_string(lane) + r.fault);
  }
  // x, y, z.
  Options block;
  block.block = {4, 3, 2};
  r = run(R"(
mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ntid.x; mov.u32 %r4, %ntid.y;
mad.lo.s32 %r5, %r2, %r4, %r1;
mad.lo.s32 %r5, %r5, %r3, %r0;
mul.wide.u32 %rd5, %r5, 8; add.s64 %rd6, %rd1, %rd5;
mov.u32 %r6, %laneid; cvt.u64.u32 %rd7, %r6; st.global.u64 [%rd6], %rd7;)",
          block);
  for (uint64_t t = 0; t < 24; ++t) CHECK(r.fault.empty() && r.out[t] == t, "thread of x, y, z");
}

void test_warp() {
  const auto shuffled = [](const std::string& kind, const std::string& b, const std::string& c) {
    return run("shfl.sync." + kind + ".b32 %r1|%p1, %r0, " + b + ", " + c +
               ", -1; selp.u32 %r2, 1, 0, %p1; mov.b64 %rd5, {%r1, %r2}; st.global.u64 [%rd4], "
               "%rd5;");
  };
  struct Case {
    const char *kind, *b, *c;
    int (*source)(int);
    bool (*in_range)(int);
  };
  const Case cases[] = {
      {"bfly", "5", "31", [](int l) { return l ^ 5; }, [](int) { return true; }},
      {"up", "3", "0", [](int l) { return l < 3 ? l : l - 3; }, [](int l) { return l >= 3; }},
      {"down", "4", "31", [](int l) { return l > 27 ? l : l + 4; }, [](int l) { return l <= 27; }},
      {"idx", "9", "31", [](int) { return 9; }, [](int) { return true; }},
      // Segments of eight lanes.
      {"idx", "9", "6175", [](int l) { return l / 8 * 8 + 1; }, [](int) { return true; }},
      {"down", "1", "6175", [](int l) { return l % 8 == 7 ? l : l + 1; },
       [](int l) { return l % 8 != 7; }},
  };
  for (const Case& c : cases) {
    const Result r = shuffled(c.kind, c.b, c.c);
    for (int lane = 0; lane < 32; ++lane) {
      const uint64_t want =
          static_cast<uint64_t>(c.source(lane)) | static_cast<uint64_t>(c.in_range(lane)) << 32;
      CHECK(r.fault.empty() && r.out[static_cast<size_t>(lane)] == want,
            std::string(c.kind) + " " + c.c + ", lane " + std::to_string(lane));
    }
  }
  check_u32("setp.lt.s32 %p1, %r0, 3; vote.sync.ballot.b32 %r1, %p1, -1;", 7);
  check_pred("setp.lt.s32 %p2, %r0, 3; vote.sync.any.pred %p1, %p2, -1;", true);
  check_pred("setp.lt.s32 %p2, %r0, 3; vote.sync.all.pred %p1, %p2, -1;", false);
  check_pred("setp.lt.s32 %p2, %r0, 40; vote.sync.all.pred %p1, !%p2, -1;", false);
  check_u32("elect.sync _|%p1, -1; vote.sync.ballot.b32 %r1, %p1, -1;", 1);
  check_fault("setp.lt.s32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, 65535;",
              "takes from lane 16, which gives nothing");
  check_fault(
      "setp.lt.s32 %p1, %r0, 16; @%p1 bra L; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; ret;"
      " L: vote.sync.any.pred %p2, %p1, -1;",
      "never meet here");
  check_fault("setp.lt.s32 %p1, %r0, 16; @%p1 ret; bar.warp.sync -1;", "waits for a lane that has");
}

void test_memory() {
  Options options;
  for (size_t i = 0; i < 64; ++i) options.in[i] = 0x8070605040302010u + i;
  const auto loaded = [&](const char* type, const char* to, const char* offset) {
    return run(std::string("ld.global.") + type + " " + to + ", [%rd3+" + offset +
                   "]; st.global.u64 [%rd4], %rd5;",
               options);
  };
  CHECK(loaded("u8", "%rd5", "7").out[1] == 0x80, "u8");
  CHECK(loaded("s8", "%rd5", "7").out[1] == 0xffffffffffffff80u, "s8");
  CHECK(loaded("s32", "%rd5", "4").out[2] == 0xffffffff80706050u, "s32");
  CHECK(loaded("u16", "%rd5", "2").out[2] == 0x4030, "u16");
  Result r =
      run("mul.wide.u32 %rd6, %r0, 16; shr.u64 %rd6, %rd6, 1; and.b64 %rd6, %rd6, -16;"
          " add.s64 %rd6, %rd0, %rd6; ld.global.v2.u64 {%rd7, %rd8}, [%rd6];"
          " st.global.u64 [%rd4], %rd8;",
          options);
  CHECK(r.fault.empty() && r.out[4] == options.in[5] && r.out[5] == options.in[5], "vector");
  // Shared memory by its own and by generic addresses; parameters by generic ones.
  check_u64(
      "mov.u32 %r1, memory; mad.lo.s32 %r1, %r0, 8, %r1; st.shared.u64 [%r1], 77;"
      " cvt.u64.u32 %rd6, %r1; cvta.shared.u64 %rd6, %rd6; ld.u64 %rd5, [%rd6];",
      77);
  r =
      run("mov.b64 %rd5, k_param_1; cvta.param.u64 %rd5, %rd5; ld.u64 %rd6, [%rd5];"
          " sub.s64 %rd6, %rd6, %rd1; st.global.u64 [%rd4], %rd6;");
  CHECK(r.fault.empty() && r.out[3] == 0, "parameters by generic addresses");
  check_pred("ld.shared.f32 %f2, [memory]; setp.nan.f32 %p1, %f2, %f2;", true);  // not written

  check_fault("ld.global.u64 %rd5, [%rd3+512];", "outside every tensor: 'in");
  check_fault("ld.global.u64 %rd5, [%rd3+4];", "not aligned to 8 bytes");
  check_fault("st.shared.u32 [memory+1024], 1;", "shared address 1024 (+4) outside");
  check_fault("mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];", "outside the block's 1024 bytes");
  check_fault("mov.b64 %rd5, k_param_0; cvta.param.u64 %rd5, %rd5; st.u64 [%rd5], %rd1;",
              "writes a parameter");
  check_fault("trap;", "PTX line " + std::to_string(kFirstLine) + " `trap`: trap");
  check_fault("trap;", "kernel k, block (0,0,0), thread (0,0,0)");
}

void test_what_is_not_understood() {
  const auto line = [](int n) { return "PTX line " + std::to_string(kFirstLine + n); };
  check_fault("mov.u32 %r1, 0;\nfrobnicate.b32 %r1, %r1;", line(1) + " `frobnicate.b32 %r1, %r1`");
  check_fault("\n\nadd.sat.s32 %r1, %r1, %r1;", line(2));
  check_fault("add.sat.s32 %r1, %r1, %r1;", ".sat is not known of add");
  check_fault("bra nowhere;", "no label nowhere");
  check_fault("/* a\ncomment */ mov.u32 %r1, %unknown; // and\n", line(1));
  check_fault("add.s32 %r1, %r1;", "2 operands");
  check_fault("ld.local.u32 %r1, [%rd0];", "local memory");
  check_fault("atom.global.add.u32 %r1, [%rd0], 1;", "the opcode is not known");
  Options fixed;
  fixed.functions = ".shared .align 4 .b8 fixed[16];";
  check_fault("", "PTX line 5: shared memory of a fixed size", fixed);
}

// --- Order ---

const std::string kStore =  // each thread its word of shared memory
    "mov.u32 %r1, memory; shl.b32 %r2, %r0, 2; add.s32 %r2, %r2, %r1; st.shared.u32 [%r2], %r0;\n";
const std::string kLoadNext =  // the word of the next thread, of 64 or of 32
    "add.s32 %r3, %r0, 1; and.b32 %r3, %r3, %r9; shl.b32 %r3, %r3, 2; add.s32 %r3, %r3, %r1;\n"
    "ld.shared.u32 %r4, [%r3]; cvt.u64.u32 %rd5, %r4; st.global.u64 [%rd4], %rd5;\n";

void test_order() {
  Options two;
  two.block = {64, 1, 1};
  const std::string among_64 = "mov.u32 %r9, 63;\n", among_32 = "mov.u32 %r9, 31;\n";
  for (uint64_t seed = 0; seed < 5; ++seed) {
    two.seed = seed;
    check_sound(among_64 + kStore + "bar.sync 0;\n" + kLoadNext, two);
    check_fault(among_64 + kStore + kLoadNext, "nothing orders the two", two);
    check_fault(among_64 + kStore + "bar.warp.sync -1;\n" + kLoadNext, "nothing orders the two",
                two);
    check_sound(among_32 + kStore + "bar.warp.sync -1;\n" + kLoadNext);
    check_fault(among_32 + kStore + kLoadNext, "race: reads shared memory at ");
    // A shuffle makes lanes meet, and orders no memory.
    check_fault(among_32 + kStore + "shfl.sync.idx.b32 %r5, %r0, 0, 31, -1;\n" + kLoadNext,
                "which thread (");
    // Writing again what others may still read.
    check_fault(among_64 + kStore + "bar.sync 0;\n" + kLoadNext + "st.shared.u32 [%r2], 0;",
                "nothing orders the two", two);
    check_sound(
        among_64 + kStore + "bar.sync 0;\n" + kLoadNext + "bar.sync 0; st.shared.u32 [%r2], 0;",
        two);
    // The first warp only arrives: it does not know of the second one's writes.
    const std::string arrive =
        "setp.lt.s32 %p1, %r0, 32; @%p1 bar.arrive 1, 64; @!%p1 bar.sync 1, 64;\n";
    check_sound(among_64 + kStore + arrive + "@%p1 bra E;\nmov.u32 %r9, 63; " + kLoadNext + "E:",
                two);
    check_fault(among_64 + kStore + arrive + kLoadNext, "nothing orders the two", two);
  }
  check_fault("st.shared.u32 [memory], %r0;", "race: writes shared memory at 0");
  // Two bytes that share a word.
  check_sound(
      "mov.u32 %r1, memory; shl.b32 %r2, %r0, 1; add.s32 %r2, %r2, %r1; mov.u16 %h1, 1;"
      " st.shared.u16 [%r2], %h1;");
}

void test_barriers() {
  Options two;
  two.block = {64, 1, 1};
  check_fault("setp.lt.s32 %p1, %r0, 32; @%p1 bar.sync 1, 64;", "deadlock: warp 0 at barrier 1",
              two);
  check_fault("setp.lt.s32 %p1, %r0, 32; @%p1 bar.arrive 1, 64;",
              "ended with 32 of 64 threads at barrier 1", two);
  check_fault("bar.sync 16;", "there are 16", two);
  check_fault("setp.lt.s32 %p1, %r0, 32; @%p1 bar.arrive 1, 64; bar.sync 0; @!%p1 bar.sync 1, 32;",
              "barrier 1 is of 64 threads for others", two);
  check_fault("bar.sync 1, 48;", "48 threads at a barrier", two);
  check_fault("setp.lt.s32 %p1, %r0, 16; @%p1 bra L; bar.sync 0; ret; L: bar.sync 1;",
              "never meet here");
}

const std::string kWait =
    "W: mbarrier.try_wait.parity.shared::cta.b64 %p4, [memory+512], %r8; @!%p4 bra W;\n";

void test_mbarriers() {
  Options two;
  two.block = {64, 1, 1};
  const std::string init =
      "setp.eq.s32 %p2, %r0, 0; mov.u32 %r7, 32; @%p2 mbarrier.init.shared::cta.b64 [memory+512], "
      "%r7;\n";
  const std::string hand_over =  // the first warp's words to the second
      "mov.u32 %r8, 0; mov.u32 %r9, 31; setp.lt.s32 %p1, %r0, 32; @!%p1 bra C;\n" + kStore +
      "mbarrier.arrive.shared::cta.b64 _, [memory+512]; bra.uni E;\nC: mov.u32 %r1, memory;\n" +
      kWait + kLoadNext + "E:";
  for (uint64_t seed = 0; seed < 5; ++seed) {
    two.seed = seed;
    check_sound(init + "bar.sync 0;\n" + hand_over, two);
    std::string wrong = hand_over;
    wrong.replace(wrong.find("%r8, 0"), 6, "%r8, 1");
    // Passes at once, or never once the phase is over.
    const std::string fault = run(init + "bar.sync 0;\n" + wrong, two).fault;
    CHECK(fault.find("race: ") != std::string::npos ||
              fault.find("deadlock: warp 1 spins") != std::string::npos,
          "wrong parity: " + fault);
  }
  check_fault(init + hand_over, "mbarrier", two);
  check_fault("mbarrier.arrive.shared::cta.b64 _, [memory+512];", "there is no mbarrier at");
  check_fault(init +
                  "bar.sync 0; mbarrier.arrive.shared::cta.b64 _, [memory+512]; mov.u32 %r8, 1;" +
                  kWait + "mov.u32 %r8, 1;" +
                  "V: mbarrier.try_wait.parity.shared::cta.b64 %p4, "
                  "[memory+512], %r8; @!%p4 bra V;",
              "deadlock: warp 0 spins");
  check_fault(init + "bar.sync 0; st.shared.u32 [memory+516], 1;",
              "an ordinary access to the mbarrier");
  check_fault(
      "mov.u32 %r7, 1; setp.eq.s32 %p2, %r0, 0; @%p2 mbarrier.init.shared::cta.b64 "
      "[memory+516], %r7;",
      "not aligned to 8 bytes");
}

// A row of 128 bytes by the copy engine, and back; each text without what it stands for is a fault.
void test_bulk_copies() {
  Options options;
  const std::string init =
      "setp.eq.s32 %p1, %r0, 0; @!%p1 bra A; mov.u32 %r7, 1;"
      " mbarrier.init.shared::cta.b64 [memory+512], %r7;\n";
  const std::string fence = "fence.mbarrier_init.release.cluster;\n";
  const std::string load =
      "mov.u32 %r10, memory; mov.u32 %r11, memory; add.s32 %r11, %r11, 512;"
      " mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+512], 128;"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd0], 128, "
      "[%r11];\n";
  const std::string read = "A: bar.warp.sync -1; mov.u32 %r8, 0;\n" + kWait +
                           "mov.u32 %r1, memory; shl.b32 %r2, %r0, 2; add.s32 %r2, %r2, %r1;"
                           " ld.shared.u32 %r3, [%r2];";
  const auto replaced = [](std::string text, const std::string& from, const std::string& to) {
    text.replace(text.find(from), from.size(), to);
    return text;
  };
  for (uint64_t seed = 0; seed < 5; ++seed) {
    options.seed = seed;
    check_sound(init + fence + load + read, options);
    check_fault(init + load + read, "no fence.mbarrier_init", options);
    check_fault(init + fence + load + replaced(read, kWait, ""), "race: reads", options);
    check_fault(init + fence + load + replaced(read, "%r8, 0", "%r8, 1"), "race: reads", options);
    check_fault(init + fence + replaced(load, "+512], 128", "+512], 112") + read,
                "more than its phase", options);
    check_fault(init + fence + replaced(load, "+512], 128", "+512], 144") + read, "deadlock",
                options);
    // Ordinary writes before it are the generic proxy's.
    const std::string before = "@%p1 st.shared.u32 [memory], 1;\n";
    const std::string write = replaced(init, "@!%p1 bra A;", before + "@!%p1 bra A;");
    check_fault(write + fence + load + read, "with no fence.proxy.async between", options);
    check_sound(write + fence + "fence.proxy.async.shared::cta;\n" + load + read, options);
  }
}

void test_element_copies() {
  Options options;
  const std::string copy =
      "mov.u32 %r1, memory; shl.b32 %r2, %r0, 3; add.s32 %r2, %r2, %r1;\n"
      "cp.async.ca.shared.global [%r2], [%rd3], 8; cp.async.commit_group;\n";
  const std::string wait = "cp.async.wait_group 0;\n", read = "ld.shared.u64 %rd5, [%r2];";
  const std::string next = "xor.b32 %r2, %r2, 8; ld.shared.u64 %rd5, [%r2];";
  for (uint64_t seed = 0; seed < 5; ++seed) {
    options.seed = seed;
    check_sound(copy + wait + read, options);
    check_fault(copy + read, "that write is still under way", options);
    check_fault(copy + "cp.async.wait_group 1;\n" + read, "that write is still under way", options);
    check_sound(copy + wait + "bar.warp.sync -1;\n" + next, options);
    check_fault(copy + wait + next, "nothing orders the two", options);
    check_fault(copy + wait + "bar.warp.sync -1;\n" + next + copy, "race: writes", options);
  }
}

void test_dependent_launches() {
  Options overlapping;
  overlapping.overlaps = true;
  overlapping.block = {64, 1, 1};
  const std::string by_one = "setp.eq.s32 %p1, %r0, 0; @%p1 griddepcontrol.wait;\n";
  for (uint64_t seed = 0; seed < 5; ++seed) {
    overlapping.seed = seed;
    check_sound("griddepcontrol.wait; ld.global.u64 %rd5, [%rd3];", overlapping);
    check_sound(by_one + "bar.sync 0; ld.global.u64 %rd5, [%rd3];", overlapping);
    check_fault(by_one + "ld.global.u64 %rd5, [%rd3];", "no griddepcontrol.wait comes before",
                overlapping);
    check_fault("mov.u32 %r1, 0;", "no thread called griddepcontrol.wait", overlapping);
  }
}

// Blocks run one after another here; on a device nothing orders them.
void test_blocks() {
  Options two;
  two.grid = {2, 1, 1};
  const std::string own =  // a word for each thread of both blocks
      "mov.u32 %r5, %ctaid.x; shl.b32 %r5, %r5, 8; cvt.u64.u32 %rd5, %r5; add.s64 %rd6, %rd4, "
      "%rd5;\n"
      "add.s64 %rd7, %rd3, %rd5; ld.global.u64 %rd8, [%rd7]; st.global.u64 [%rd6], %rd8;\n";
  for (uint64_t seed = 0; seed < 3; ++seed) {
    two.seed = seed;
    check_sound(own + "ld.global.u64 %rd8, [%rd3];", two);
    check_fault(own + "ld.global.u64 %rd8, [%rd4];", "which another block of this launch has", two);
    check_fault("st.global.u64 [%rd4], %rd0;", "which another block of this launch has", two);
    check_fault(
        "ld.global.u64 %rd8, [%rd4]; setp.eq.s32 %p1, %r0, 0; @%p1 st.global.u64 [%rd4], %rd0;",
        "which another block of this launch has", two);
  }
}

}  // namespace
}  // namespace lminf::test

int main() {
  using namespace lminf::test;
  test_integers();
  test_floats();
  test_comparisons();
  test_conversions();
  test_flow();
  test_warp();
  test_memory();
  test_what_is_not_understood();
  test_order();
  test_barriers();
  test_mbarriers();
  test_bulk_copies();
  test_element_copies();
  test_dependent_launches();
  test_blocks();
  return finish_tests("ptx_interpreter_test");
}
