// What the lanes of a warp tell each other: shfl, vote, elect. None of them orders memory.
#include "decode.h"
#include "machine.h"
#include "text.h"

namespace lminf::interpreter {
namespace {

enum Shuffle { kUp, kDown, kButterfly, kIndex };

void shuffle(Warp& warp, const Instruction& i, LaneMask lanes) {
  const uint64_t *a = warp.row(i.in[0]), *b = warp.row(i.in[1]), *c = warp.row(i.in[2]);
  uint64_t values[kLanes];
  bool in_range[kLanes];
  for_lanes(lanes, [&](int lane) {
    const int amount = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(c[lane] & 31);
    const int segment = static_cast<int>(c[lane] >> 8 & 31);
    const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
    int source = lane;
    switch (i.mode) {
      case kUp:
        source = lane - amount;
        in_range[lane] = source >= highest;
        break;
      case kDown:
        source = lane + amount;
        in_range[lane] = source <= highest;
        break;
      case kButterfly:
        source = lane ^ amount;
        in_range[lane] = source <= highest;
        break;
      default:
        source = lowest | (amount & ~segment);
        in_range[lane] = source <= highest;
    }
    if (!in_range[lane]) source = lane;
    if ((lanes >> source & 1) == 0) {
      fault(warp, i, lane, "takes from lane " + std::to_string(source) + ", which gives nothing");
    }
    values[lane] = a[source] & 0xffffffff;
  });
  for_lanes(lanes, [&](int lane) {
    if (i.out[0] >= 0) warp.row(i.out[0])[lane] = values[lane];
    if (i.out.size() > 1 && i.out[1] >= 0) warp.row(i.out[1])[lane] = in_range[lane];
  });
}

enum Vote { kAny, kAll, kUniform, kBallot };

void vote(Warp& warp, const Instruction& i, LaneMask lanes) {
  LaneMask ballot = 0;
  const uint64_t* a = warp.row(i.in[0]);
  for_lanes(lanes, [&](int lane) {
    if ((a[lane] != 0) != i.flag) ballot |= 1u << lane;
  });
  uint64_t result = ballot;
  if (i.mode == kAny) result = ballot != 0;
  if (i.mode == kAll) result = ballot == lanes;
  if (i.mode == kUniform) result = ballot == lanes || ballot == 0;
  uint64_t* d = warp.row(i.out[0]);
  for_lanes(lanes, [&](int lane) { d[lane] = result; });
}

// Any lane may be chosen; here the first.
void elect(Warp& warp, const Instruction& i, LaneMask lanes) {
  const int chosen = first_lane(lanes);
  for_lanes(lanes, [&](int lane) {
    if (i.out[0] >= 0) warp.row(i.out[0])[lane] = static_cast<uint64_t>(chosen);
    warp.row(i.out[1])[lane] = lane == chosen;
  });
}

// --- Decoding ---

void decode_shuffle(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"sync", "up", "down", "bfly", "idx"});
  d.expect_operands(s, 5, 5);
  if (!s.has("sync")) d.refuse(".sync is missing");
  for (const std::string& each : split(s.operands[0], '|')) i.out.push_back(d.row(each));
  for (size_t k = 1; k < 4; ++k) i.in.push_back(d.row(s.operands[k]));
  i.mode = s.has("up") ? kUp : s.has("down") ? kDown : s.has("bfly") ? kButterfly : kIndex;
  i.execute = shuffle;
  d.warp_sync(i, d.row(s.operands[4]));
}

void decode_vote(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"sync", "any", "all", "uni", "ballot"});
  d.expect_operands(s, 3, 3);
  if (!s.has("sync")) d.refuse(".sync is missing");
  i.out = {d.row(s.operands[0])};
  std::string predicate = s.operands[1];
  i.flag = predicate[0] == '!';
  if (i.flag) predicate = predicate.substr(1);
  i.in = {d.row(predicate)};
  i.mode = s.has("any") ? kAny : s.has("all") ? kAll : s.has("uni") ? kUniform : kBallot;
  i.execute = vote;
  d.warp_sync(i, d.row(s.operands[2]));
}

void decode_elect(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"sync"});
  d.expect_operands(s, 2, 2);
  for (const std::string& each : split(s.operands[0], '|')) i.out.push_back(d.row(each));
  if (i.out.size() != 2 || i.out[1] < 0) d.refuse("a lane and a predicate are needed");
  i.execute = elect;
  d.warp_sync(i, d.row(s.operands[1]));
}

}  // namespace

void add_warp(OpcodeTable& table) {
  table["shfl"] = decode_shuffle;
  table["vote"] = decode_vote;
  table["elect"] = decode_elect;
}

}  // namespace lminf::interpreter
