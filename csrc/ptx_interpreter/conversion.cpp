// cvt.
#include <cmath>
#include <limits>

#include "decode.h"
#include "machine.h"

namespace lminf::interpreter {

// To the nearest, ties to even; NaN is the canonical one.
uint16_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  auto bits = get<uint32_t>(0);
  std::memcpy(&bits, &value, 4);
  bits += 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>(bits >> 16);
}

uint16_t to_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

namespace {

enum Rounding { kAsIs, kNearestEven, kToZero, kDown, kUp };  // to an integral value

double integral(double x, int rounding) {
  switch (rounding) {
    case kNearestEven:
      return std::nearbyint(x);
    case kToZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    case kUp:
      return std::ceil(x);
    default:
      return x;
  }
}

// Clamped to the range; NaN is 0, and for 64 bits the lowest number.
template <typename T>
T saturated(double x) {
  constexpr T kLow = std::numeric_limits<T>::min(), kHigh = std::numeric_limits<T>::max();
  if (std::isnan(x)) return sizeof(T) == 8 ? static_cast<T>(uint64_t{1} << 63) : T{0};
  if (x <= static_cast<double>(kLow)) return kLow;
  if (x >= static_cast<double>(kHigh)) return kHigh;
  return static_cast<T>(x);
}

double to_double(uint64_t bits, Type type) {
  switch (type) {
    case Type::kF16:
      return from_f16(static_cast<uint16_t>(bits));
    case Type::kBF16:
      return from_bf16(static_cast<uint16_t>(bits));
    case Type::kF32:
      return get<float>(bits);
    default:
      return get<double>(bits);
  }
}

uint64_t from_double(double x, Type type) {
  uint64_t bits = 0;
  switch (type) {
    case Type::kF16:
      return to_f16(static_cast<float>(x));
    case Type::kBF16:
      return to_bf16(static_cast<float>(x));
    case Type::kF32:
      put(bits, static_cast<float>(x));
      return bits;
    case Type::kF64:
      put(bits, x);
      return bits;
    case Type::kS32:
      put(bits, saturated<int32_t>(x));
      return bits;
    case Type::kU32:
      put(bits, saturated<uint32_t>(x));
      return bits;
    case Type::kS64:
      put(bits, saturated<int64_t>(x));
      return bits;
    default:
      put(bits, saturated<uint64_t>(x));
      return bits;
  }
}

void from_float(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t* a = warp.row(i.in[0]);
  for_lanes(lanes, [&](int l) {
    d[l] = from_double(integral(to_double(a[l], i.source_type), i.mode), i.type);
  });
}

// Narrower integers are cut off, wider ones take the source's sign.
void from_integer(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t* a = warp.row(i.in[0]);
  const int unused = 64 - 8 * bytes_of(i.source_type);
  const int dropped = 64 - 8 * bytes_of(i.type);
  for_lanes(lanes, [&](int l) {
    const uint64_t top = a[l] << unused;
    const bool negative = is_signed(i.source_type) && top >> 63 != 0;
    const uint64_t x = is_signed(i.source_type)
                           ? static_cast<uint64_t>(static_cast<int64_t>(top) >> unused)
                           : top >> unused;
    switch (i.type) {
      case Type::kF32:
        put(d[l], negative ? static_cast<float>(static_cast<int64_t>(x)) : static_cast<float>(x));
        break;
      case Type::kF64:
        put(d[l], negative ? static_cast<double>(static_cast<int64_t>(x)) : static_cast<double>(x));
        break;
      default:
        d[l] = x << dropped >> dropped;
    }
  });
}

// The first source becomes the high half.
template <uint16_t (*kTo)(float)>
void pack_two(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* d = warp.row(i.out[0]);
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]);
  for_lanes(lanes,
            [&](int l) { d[l] = uint64_t{kTo(get<float>(a[l]))} << 16 | kTo(get<float>(b[l])); });
}

void decode_cvt(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"rn", "rni", "rzi", "rmi", "rpi"});
  if (s.types.size() != 2) d.refuse("two types are needed");
  if (i.type == Type::kBF16x2 || i.type == Type::kF16x2) {
    d.plain_operands(s, i, 1, 2);
    if (i.source_type != Type::kF32) d.refuse("from another type than f32");
    i.execute = i.type == Type::kBF16x2 ? pack_two<to_bf16> : pack_two<to_f16>;
    return;
  }
  d.plain_operands(s, i, 1, 1);
  i.mode = s.has("rni")   ? kNearestEven
           : s.has("rzi") ? kToZero
           : s.has("rmi") ? kDown
           : s.has("rpi") ? kUp
                          : kAsIs;
  if (!is_float(i.source_type)) {
    if (i.type == Type::kF16 || i.type == Type::kBF16) d.refuse("an integer to 16-bit floats");
    i.execute = from_integer;
    return;
  }
  const bool to_integer = !is_float(i.type);
  if (to_integer && i.mode == kAsIs) d.refuse("no rounding to an integer");
  if (to_integer && bytes_of(i.type) < 4) d.refuse("a float to a short integer");
  const bool narrows =
      (i.type == Type::kF16 || i.type == Type::kBF16) && i.source_type == Type::kF64;
  if (narrows) d.refuse("f64 to 16-bit floats");
  i.execute = from_float;
}

}  // namespace

void add_conversions(OpcodeTable& table) { table["cvt"] = decode_cvt; }

}  // namespace lminf::interpreter
