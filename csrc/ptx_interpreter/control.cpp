// Branches, calls, ends, barriers of the block, fences, griddepcontrol, setmaxnreg.
#include "decode.h"
#include "machine.h"
#include "text.h"

namespace lminf::interpreter {
namespace {

// Writes of one thread to generic memory are seen in order here, so that fences between threads
// order nothing by themselves: only what hands them on does.
void nothing(Warp&, const Instruction&, LaneMask) {}

void fence_proxy_async(Warp& warp, const Instruction&, LaneMask lanes) {
  warp.block->order->fence_async(warp, lanes);
}

// The copy engine sees the mbarriers that these lanes have made.
void fence_mbarrier_init(Warp& warp, const Instruction&, LaneMask lanes) {
  const Order& order = *warp.block->order;
  for (auto& [address, barrier] : warp.block->mbarriers) {
    for_lanes(lanes, [&, &made = barrier](int lane) {
      made.init_fenced |= made.init_thread == order.thread(warp, lane);
    });
  }
}

void trap(Warp& warp, const Instruction& i, LaneMask lanes) {
  fault(warp, i, first_lane(lanes), "trap");
}

// What comes after it in the order of the block may count on the launch before.
void grid_wait(Warp& warp, const Instruction&, LaneMask lanes) {
  Order& order = *warp.block->order;
  warp.block->has_waited = true;
  Gathered done;
  order.release(order.launch_before(), 1, done);
  order.acquire(warp, lanes, order.finished(std::move(done)));
}

void launch_dependents(Warp& warp, const Instruction&, LaneMask) {
  Block& block = *warp.block;
  if (!block.has_triggered) ++block.launch->triggered;
  block.has_triggered = true;
}

// The registers of all warps together must fit a multiprocessor's.
void set_registers(Warp& warp, const Instruction& i, LaneMask) {
  constexpr int kRegisters = 65536;
  warp.maximum_registers = i.number;
  int total = 0;
  for (const Warp& w : warp.block->warps) {
    if (w.maximum_registers == 0) return;
    total += kLanes * w.maximum_registers;
  }
  if (total > kRegisters) {
    fault(warp, i, -1,
          std::to_string(total) + " registers in all warps, but there are " +
              std::to_string(kRegisters));
  }
}

// --- Decoding ---

void decode_bra(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"uni"});
  d.expect_operands(s, 1, 1);
  i.flow = Flow::kBranch;
  d.branch_to(s.operands[0]);
}

void decode_ret(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"uni"});
  d.expect_operands(s, 0, 0);
  i.flow = Flow::kReturn;
}

void decode_trap(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {});
  i.execute = trap;
}

void decode_call(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"uni"});
  if (s.operands.size() != 2) d.refuse("a call with results, or of a pointer");
  i.flow = Flow::kCall;
  i.callee = d.callee(s.operands[0]);
  const std::string& arguments = s.operands[1];
  for (const std::string& each : split(arguments.substr(1, arguments.size() - 2), ',')) {
    i.in.push_back(d.row(each));
  }
  if (i.in.size() != i.callee->parameter_rows.size()) d.refuse("number of arguments");
}

// bar.sync a{, b}; bar.arrive a, b; bar.warp.sync membermask. Mode 1: waits.
void decode_bar(Decoder& d, const Spelling& s, Instruction& i) {
  if (s.has("warp")) {
    d.allow(s, {"warp", "sync"});
    d.expect_operands(s, 1, 1);
    i.execute = [](Warp& warp, const Instruction&, LaneMask lanes) {
      warp.block->order->sync_lanes(warp, lanes);
    };
    d.warp_sync(i, d.row(s.operands[0]));
    return;
  }
  d.allow(s, {"cta", "sync", "arrive", "aligned"});
  const bool waits = s.has("sync");
  if (!waits && !s.has("arrive")) d.refuse("a reduction");
  d.expect_operands(s, waits ? 1 : 2, 2);
  for (const std::string& each : s.operands) i.in.push_back(d.row(each));
  i.flow = Flow::kBarrier;
  i.mode = waits;
}

void decode_fence(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s,
          {"proxy", "async", "async::generic", "async.shared::cta", "shared::cta", "global",
           "mbarrier_init", "release", "acquire", "cluster", "cta", "gpu", "sys", "acq_rel", "sc"});
  i.execute = s.has("mbarrier_init") ? fence_mbarrier_init
              : s.has("proxy")       ? fence_proxy_async
                                     : nothing;
}

void decode_membar(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"cta", "gl", "sys"});
  i.execute = nothing;
}

void decode_griddepcontrol(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"wait", "launch_dependents"});
  i.execute = s.has("wait") ? grid_wait : launch_dependents;
}

void decode_setmaxnreg(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"inc", "dec", "sync", "aligned"});
  d.expect_operands(s, 1, 1);
  i.number = d.number(s.operands[0]);
  if (i.number < 24 || i.number > 256 || i.number % 8 != 0) d.refuse("24 to 256 in steps of 8");
  i.execute = set_registers;
  d.warp_sync(i);
}

}  // namespace

void add_control(OpcodeTable& table) {
  table["bra"] = decode_bra;
  table["ret"] = decode_ret;
  table["exit"] = decode_ret;
  table["trap"] = decode_trap;
  table["call"] = decode_call;
  table["bar"] = decode_bar;
  table["barrier"] = decode_bar;
  table["fence"] = decode_fence;
  table["membar"] = decode_membar;
  table["griddepcontrol"] = decode_griddepcontrol;
  table["setmaxnreg"] = decode_setmaxnreg;
}

}  // namespace lminf::interpreter
