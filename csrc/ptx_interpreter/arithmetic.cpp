// Arithmetic, logic, comparisons, selection and moves.
#include <cmath>
#include <type_traits>
#include <utility>

#include "decode.h"
#include "machine.h"

namespace lminf::interpreter {
namespace {

// --- What one lane computes, on operands of one type ---

// Integers wrap; the host's own overflow is never asked.
template <typename T>
using Wide = std::conditional_t<std::is_integral_v<T>, uint64_t, T>;

template <typename T>
T negated(T x) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(0 - static_cast<uint64_t>(x));
  return -x;
}
template <typename T>
constexpr bool is_minus_one(T x) {
  return std::is_signed_v<T> && x == static_cast<T>(-1);
}

constexpr auto kAdd = [](auto x, auto y) {
  return static_cast<Wide<decltype(x)>>(x) + static_cast<Wide<decltype(x)>>(y);
};
constexpr auto kSub = [](auto x, auto y) {
  return static_cast<Wide<decltype(x)>>(x) - static_cast<Wide<decltype(x)>>(y);
};
constexpr auto kMul = [](auto x, auto y) {
  return static_cast<Wide<decltype(x)>>(x) * static_cast<Wide<decltype(x)>>(y);
};
constexpr auto kMad = [](auto x, auto y, auto z) {
  return kMul(x, y) + static_cast<Wide<decltype(x)>>(z);
};
constexpr auto kMulHigh = [](auto x, auto y) {
  using Double = std::conditional_t<std::is_signed_v<decltype(x)>, __int128, unsigned __int128>;
  return static_cast<Double>(x) * static_cast<Double>(y) >> 8 * sizeof(x);
};
constexpr auto kDiv = [](auto x, auto y) {  // of integers by zero: all ones
  if constexpr (std::is_integral_v<decltype(x)>) {
    if (y == 0) return static_cast<decltype(x)>(-1);
    if (is_minus_one(y)) return negated(x);
  }
  return static_cast<decltype(x)>(x / y);
};
constexpr auto kRem = [](auto x, auto y) {
  return y == 0 ? x : is_minus_one(y) ? decltype(x){0} : static_cast<decltype(x)>(x % y);
};
constexpr auto kMax = [](auto x, auto y) {  // of a NaN and a number: the number
  if constexpr (std::is_integral_v<decltype(x)>) return x > y ? x : y;
  return x > y || y != y || (x == y && !std::signbit(x)) ? x : y;
};
constexpr auto kMin = [](auto x, auto y) {
  if constexpr (std::is_integral_v<decltype(x)>) return x < y ? x : y;
  return x < y || y != y || (x == y && std::signbit(x)) ? x : y;
};
constexpr auto kAnd = [](auto x, auto y) { return x & y; };
constexpr auto kOr = [](auto x, auto y) { return x | y; };
constexpr auto kXor = [](auto x, auto y) { return x ^ y; };
constexpr auto kNot = [](auto x) { return ~x; };
// The first operand's sign on the second.
constexpr auto kCopySign = [](auto x, auto y) { return std::copysign(y, x); };
constexpr auto kNeg = [](auto x) { return negated(x); };
constexpr auto kAbs = [](auto x) {
  if constexpr (std::is_integral_v<decltype(x)>) {
    return x < 0 ? negated(x) : x;
  } else {
    return std::fabs(x);
  }
};
constexpr auto kSqrt = [](auto x) { return std::sqrt(x); };
constexpr auto kReciprocal = [](auto x) { return decltype(x){1} / x; };
constexpr auto kFma = [](auto x, auto y, auto z) { return std::fma(x, y, z); };

// --- For all lanes ---

template <const auto& f, typename T, size_t... k>
void each_lane(Warp& warp, const Instruction& i, LaneMask lanes, std::index_sequence<k...>) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t* in[] = {warp.row(i.in[k])...};
  for_lanes(lanes, [&](int l) { put<T>(d[l], static_cast<T>(f(get<T>(in[k][l])...))); });
}
template <const auto& f, size_t kIn, typename T>
void apply(Warp& warp, const Instruction& i, LaneMask lanes) {
  each_lane<f, T>(warp, i, lanes, std::make_index_sequence<kIn>());
}

// Products as wide as both factors together, and a sum with them.
template <typename T, typename Double>
void multiply_wide(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]);
  for_lanes(lanes, [&](int l) {
    put<Double>(d[l], static_cast<Double>(Double{get<T>(a[l])} * Double{get<T>(b[l])}));
  });
}
template <typename T, typename Double>
void multiply_add_wide(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]), *c = warp.row(i.in[2]);
  for_lanes(lanes, [&](int l) {
    put<Double>(d[l], static_cast<Double>(
                          kMad(Double{get<T>(a[l])}, Double{get<T>(b[l])}, get<Double>(c[l]))));
  });
}

// Amounts past the width shift everything out.
template <typename T>
void shift_left(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]);
  for_lanes(lanes, [&](int l) {
    const auto n = static_cast<uint32_t>(b[l]);
    const auto x = static_cast<uint64_t>(get<T>(a[l]));
    put<T>(d[l], n >= 8 * sizeof(T) ? T{0} : static_cast<T>(x << n));
  });
}
template <typename T>
void shift_right(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]);
  for_lanes(lanes, [&](int l) {
    const auto n = static_cast<uint32_t>(b[l]);
    const T x = get<T>(a[l]);
    const T all_out = std::is_signed_v<T> && x < 0 ? static_cast<T>(-1) : T{0};
    put<T>(d[l], n >= 8 * sizeof(T) ? all_out : static_cast<T>(x >> n));
  });
}

// d = b with `length` bits of a put in from `position` on.
void bit_field_insert(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]);
  const uint64_t *position = warp.row(i.in[2]), *length = warp.row(i.in[3]);
  for_lanes(lanes, [&](int l) {
    const uint64_t p = position[l] & 255, n = length[l] & 255;
    const uint64_t field = n >= 32 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
    const uint64_t mask = p >= 32 ? 0 : field << p;
    const uint64_t moved = p >= 32 ? 0 : (a[l] & 0xffffffff) << p;
    put<uint32_t>(d[l], static_cast<uint32_t>((b[l] & ~mask) | (moved & mask)));
  });
}

// --- Approximations: the exact result, rounded ---

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

template <typename F>
void approximate(Warp& warp, const Instruction& i, LaneMask lanes, F f) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t* a = warp.row(i.in[0]);
  for_lanes(lanes, [&](int l) {
    const float x = get<float>(a[l]);
    const float y = f(i.flush ? flushed(x) : x);
    put<float>(d[l], i.flush ? flushed(y) : y);
  });
}
void exp2_approx(Warp& warp, const Instruction& i, LaneMask lanes) {
  approximate(warp, i, lanes, [](float x) { return static_cast<float>(std::exp2(double{x})); });
}
void reciprocal_approx(Warp& warp, const Instruction& i, LaneMask lanes) {
  approximate(warp, i, lanes, [](float x) { return 1.0f / x; });
}
// For 2^126 < |y| < 2^128 the quotient is 0, and NaN where x is infinite.
void divide_approx(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]);
  for_lanes(lanes, [&](int l) {
    const float x = get<float>(a[l]), y = get<float>(b[l]);
    float q = x / y;
    if (std::fabs(y) > 0x1p126f && !std::isinf(y)) {
      q = std::isinf(x) ? NAN : std::copysign(0.0f, q);
    }
    put<float>(d[l], q);
  });
}

// --- Comparison and selection ---

enum Comparison {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan,
};

template <typename T>
bool compare(int comparison, T x, T y) {
  const bool unordered = x != x || y != y;
  switch (comparison) {
    case kEq:
      return x == y;
    case kNe:
      return !unordered && x != y;
    case kLt:
      return x < y;
    case kLe:
      return x <= y;
    case kGt:
      return x > y;
    case kGe:
      return x >= y;
    case kEqu:
      return unordered || x == y;
    case kNeu:
      return x != y;
    case kLtu:
      return unordered || x < y;
    case kLeu:
      return unordered || x <= y;
    case kGtu:
      return unordered || x > y;
    case kGeu:
      return unordered || x >= y;
    case kNum:
      return !unordered;
    default:
      return unordered;
  }
}

template <typename T>
void set_predicate(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]);
  for_lanes(lanes, [&](int l) { d[l] = compare(i.mode, get<T>(a[l]), get<T>(b[l])); });
}

uint64_t low_bits(Type type) {
  const int bytes = bytes_of(type);
  return type == Type::kPred ? 1 : bytes == 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bytes) - 1;
}

void select(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]), *p = warp.row(i.in[2]);
  const uint64_t kept = low_bits(i.type);
  for_lanes(lanes, [&](int l) { d[l] = (p[l] != 0 ? a[l] : b[l]) & kept; });
}

void not_predicate(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t* a = warp.row(i.in[0]);
  for_lanes(lanes, [&](int l) { d[l] = a[l] == 0; });
}

void move(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t* a = warp.row(i.in[0]);
  const uint64_t kept = low_bits(i.type);
  for_lanes(lanes, [&](int l) { d[l] = a[l] & kept; });
}
// The first element is the lowest.
void pack(Warp& warp, const Instruction& i, LaneMask lanes) {
  const auto width = static_cast<int>(8 * static_cast<size_t>(bytes_of(i.type)) / i.in.size());
  const uint64_t part = (uint64_t{1} << width) - 1;
  for_lanes(lanes, [&](int l) {
    uint64_t value = 0;
    for (size_t k = 0; k < i.in.size(); ++k) {
      value |= (warp.row(i.in[k])[l] & part) << (width * static_cast<int>(k));
    }
    warp.row(i.out[0])[l] = value;
  });
}
void unpack(Warp& warp, const Instruction& i, LaneMask lanes) {
  const auto width = static_cast<int>(8 * static_cast<size_t>(bytes_of(i.type)) / i.out.size());
  const uint64_t part = (uint64_t{1} << width) - 1;
  for_lanes(lanes, [&](int l) {
    const uint64_t value = warp.row(i.in[0])[l];
    for (size_t k = 0; k < i.out.size(); ++k) {
      if (i.out[k] >= 0) warp.row(i.out[k])[l] = value >> (width * static_cast<int>(k)) & part;
    }
  });
}

// --- Decoding ---

// Calls use(a value of the instruction's type) and gives what that gives; null for other types.
template <typename Use>
Execute for_integers(Type type, Use use) {
  switch (type) {
    case Type::kU16:
    case Type::kB16:
      return use(uint16_t{});
    case Type::kS16:
      return use(int16_t{});
    case Type::kU32:
    case Type::kB32:
      return use(uint32_t{});
    case Type::kS32:
      return use(int32_t{});
    case Type::kU64:
    case Type::kB64:
      return use(uint64_t{});
    case Type::kS64:
      return use(int64_t{});
    default:
      return nullptr;
  }
}
template <typename Use>
Execute for_floats(Type type, Use use) {
  return type == Type::kF32   ? use(float{})
         : type == Type::kF64 ? use(double{})
                              : static_cast<Execute>(nullptr);
}
template <typename Use>
Execute for_numbers(Type type, Use use) {
  const Execute found = for_integers(type, use);
  return found != nullptr ? found : for_floats(type, use);
}

// The function for an instruction's type, null where there is none.
template <const auto& f, size_t kIn>
Execute on_integers(Type type) {
  return for_integers(type, [](auto x) -> Execute { return apply<f, kIn, decltype(x)>; });
}
template <const auto& f, size_t kIn>
Execute on_floats(Type type) {
  return for_floats(type, [](auto x) -> Execute { return apply<f, kIn, decltype(x)>; });
}
template <const auto& f, size_t kIn>
Execute on_numbers(Type type) {
  return for_numbers(type, [](auto x) -> Execute { return apply<f, kIn, decltype(x)>; });
}

template <Execute (*kPick)(Type), size_t kIn>
void decode_simple(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"rn"});
  d.plain_operands(s, i, 1, kIn);
  i.execute = kPick(i.type);
}

template <const auto& f>
void decode_logic(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {});
  d.plain_operands(s, i, 1, 2);
  i.execute = i.type == Type::kPred ? apply<f, 2, uint64_t> : on_integers<f, 2>(i.type);
}

void decode_not(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {});
  d.plain_operands(s, i, 1, 1);
  i.execute = i.type == Type::kPred ? not_predicate : on_integers<kNot, 1>(i.type);
}

void decode_mul(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"rn", "lo", "hi", "wide"});
  d.plain_operands(s, i, 1, 2);
  if (s.has("wide")) {
    i.execute = i.type == Type::kS32   ? multiply_wide<int32_t, int64_t>
                : i.type == Type::kU32 ? multiply_wide<uint32_t, uint64_t>
                : i.type == Type::kS16 ? multiply_wide<int16_t, int32_t>
                : i.type == Type::kU16 ? multiply_wide<uint16_t, uint32_t>
                                       : static_cast<Execute>(nullptr);
  } else if (s.has("hi")) {
    i.execute = on_integers<kMulHigh, 2>(i.type);
  } else {
    i.execute = on_numbers<kMul, 2>(i.type);
  }
}

void decode_mad(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"lo", "wide"});
  d.plain_operands(s, i, 1, 3);
  if (s.has("wide")) {
    i.execute = i.type == Type::kS32   ? multiply_add_wide<int32_t, int64_t>
                : i.type == Type::kU32 ? multiply_add_wide<uint32_t, uint64_t>
                                       : static_cast<Execute>(nullptr);
  } else {
    i.execute = on_integers<kMad, 3>(i.type);
  }
}

void decode_div(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"rn", "approx"});
  d.plain_operands(s, i, 1, 2);
  const bool approx = s.has("approx");
  i.execute = !approx                ? on_numbers<kDiv, 2>(i.type)
              : i.type == Type::kF32 ? divide_approx
                                     : static_cast<Execute>(nullptr);
}

void decode_rcp(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"rn", "approx", "ftz"});
  d.plain_operands(s, i, 1, 1);
  const bool approx = s.has("approx");
  if (!approx && i.flush) d.refuse(".ftz is known of rcp.approx alone");
  i.execute = !approx                ? on_floats<kReciprocal, 1>(i.type)
              : i.type == Type::kF32 ? reciprocal_approx
                                     : static_cast<Execute>(nullptr);
}

void decode_exp2(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"approx", "ftz"});
  d.plain_operands(s, i, 1, 1);
  if (i.type == Type::kF32) i.execute = exp2_approx;
}

void decode_bit_field(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {});
  d.plain_operands(s, i, 1, 4);
  if (i.type == Type::kB32) i.execute = bit_field_insert;
}

void decode_shl(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {});
  d.plain_operands(s, i, 1, 2);
  i.execute = for_integers(i.type, [](auto x) -> Execute { return shift_left<decltype(x)>; });
}

void decode_shr(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {});
  d.plain_operands(s, i, 1, 2);
  i.execute = for_integers(i.type, [](auto x) -> Execute { return shift_right<decltype(x)>; });
}

void decode_setp(Decoder& d, const Spelling& s, Instruction& i) {
  static const std::map<std::string, int> comparisons{
      {"eq", kEq},   {"ne", kNe},   {"lt", kLt},   {"lo", kLt},   {"le", kLe},   {"ls", kLe},
      {"gt", kGt},   {"hi", kGt},   {"ge", kGe},   {"hs", kGe},   {"equ", kEqu}, {"neu", kNeu},
      {"ltu", kLtu}, {"leu", kLeu}, {"gtu", kGtu}, {"geu", kGeu}, {"num", kNum}, {"nan", kNan}};
  const auto comparison = s.parts.size() == 3 ? comparisons.find(s.parts[1]) : comparisons.end();
  if (comparison == comparisons.end()) d.refuse("the comparison is not known");
  d.plain_operands(s, i, 1, 2);
  i.mode = comparison->second;
  i.execute = for_numbers(i.type, [](auto x) -> Execute { return set_predicate<decltype(x)>; });
}

void decode_selp(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {});
  d.plain_operands(s, i, 1, 3);
  i.execute = select;
}

void decode_mov(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {});
  d.expect_operands(s, 2, 2);
  if (i.type == Type::kNone) d.refuse("no type");
  i.out = d.rows(s.operands[0]);
  i.in = d.rows(s.operands[1]);
  if (i.out.size() > 1 && i.in.size() > 1) d.refuse("vectors on both sides");
  i.execute = i.out.size() > 1 ? unpack : i.in.size() > 1 ? pack : move;
}

}  // namespace

void add_arithmetic(OpcodeTable& table) {
  table["add"] = decode_simple<on_numbers<kAdd, 2>, 2>;
  table["sub"] = decode_simple<on_numbers<kSub, 2>, 2>;
  table["mul"] = decode_mul;
  table["mad"] = decode_mad;
  table["fma"] = decode_simple<on_floats<kFma, 3>, 3>;
  table["div"] = decode_div;
  table["rem"] = decode_simple<on_integers<kRem, 2>, 2>;
  table["max"] = decode_simple<on_numbers<kMax, 2>, 2>;
  table["min"] = decode_simple<on_numbers<kMin, 2>, 2>;
  table["neg"] = decode_simple<on_numbers<kNeg, 1>, 1>;
  table["abs"] = decode_simple<on_numbers<kAbs, 1>, 1>;
  table["sqrt"] = decode_simple<on_floats<kSqrt, 1>, 1>;
  table["rcp"] = decode_rcp;
  table["ex2"] = decode_exp2;
  table["copysign"] = decode_simple<on_floats<kCopySign, 2>, 2>;
  table["and"] = decode_logic<kAnd>;
  table["or"] = decode_logic<kOr>;
  table["xor"] = decode_logic<kXor>;
  table["not"] = decode_not;
  table["shl"] = decode_shl;
  table["shr"] = decode_shr;
  table["bfi"] = decode_bit_field;
  table["setp"] = decode_setp;
  table["selp"] = decode_selp;
  table["mov"] = decode_mov;
}

}  // namespace lminf::interpreter
