#include "schedule.h"

#include <cstdio>
#include <numeric>

#include "copies.h"

namespace lminf::interpreter {

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

Size3 Block::thread(int warp, int lane) const {
  const auto number = static_cast<uint32_t>(warp * kLanes + lane);
  const Size3& size = launch->block;
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

namespace {

std::string show(const Size3& at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

std::string name_of(const Block& block) {
  return "kernel " + block.launch->function->name + ", block " + show(block.index);
}

}  // namespace

void fault(const Warp& warp, const Instruction& i, int lane, const std::string& what) {
  const std::string who = lane < 0 ? "warp " + std::to_string(warp.index)
                                   : "thread " + show(warp.block->thread(warp.index, lane));
  throw Fault(name_of(*warp.block) + ", " + who + ", PTX line " + std::to_string(i.line) + " `" +
              i.text + "`: " + what);
}

namespace {

// --- Frames ---

// Registers of frames that have ended: allocating megabytes for each warp takes time.
std::vector<std::vector<uint64_t>>& spare_registers() {
  static std::vector<std::vector<uint64_t>> spare;
  return spare;
}

uint64_t special(const Warp& warp, int lane, Special which) {
  const Block& block = *warp.block;
  const Size3 thread = block.thread(warp.index, lane);
  const Size3 &size = block.launch->block, &grid = block.launch->grid;
  switch (which) {
    case Special::kTidX:
      return thread.x;
    case Special::kTidY:
      return thread.y;
    case Special::kTidZ:
      return thread.z;
    case Special::kNtidX:
      return size.x;
    case Special::kNtidY:
      return size.y;
    case Special::kNtidZ:
      return size.z;
    case Special::kCtaidX:
      return block.index.x;
    case Special::kCtaidY:
      return block.index.y;
    case Special::kCtaidZ:
      return block.index.z;
    case Special::kNctaidX:
      return grid.x;
    case Special::kNctaidY:
      return grid.y;
    case Special::kNctaidZ:
      return grid.z;
    case Special::kLaneId:
      return static_cast<uint64_t>(lane);
    case Special::kWarpId:
      return static_cast<uint64_t>(warp.index);
  }
  return 0;
}

void enter(Warp& warp, const Function& function, LaneMask lanes) {
  Frame frame;
  frame.function = &function;
  frame.alive = lanes;
  auto& spare = spare_registers();
  if (!spare.empty()) {
    frame.registers = std::move(spare.back());
    spare.pop_back();
  }
  const size_t needed = static_cast<size_t>(function.rows) * kLanes;
  if (frame.registers.size() < needed) frame.registers.resize(needed);
  for (const auto& [row, value] : function.constants) {
    std::fill_n(&frame.registers[static_cast<size_t>(row) * kLanes], kLanes, value);
  }
  for (const auto& [row, which] : function.specials) {
    for (int lane = 0; lane < kLanes; ++lane) {
      frame.registers[static_cast<size_t>(row * kLanes + lane)] = special(warp, lane, which);
    }
  }
  warp.frames.push_back(std::move(frame));
}

void leave(Warp& warp) {
  spare_registers().push_back(std::move(warp.frames.back().registers));
  warp.frames.pop_back();
}

// --- A warp ---

// Registers of wgmmas under way may not be touched; when others were is remembered.
void watch_registers(Warp& warp, const Instruction& i) {
  MatrixState& state = warp.matrix;
  if (i.is_wgmma || !state.used || warp.frames.size() > 1) return;
  ++state.clock;
  const auto touch = [&](int row, const char* verb) {
    if (row < 0) return;
    if (state.busy_until[static_cast<size_t>(row)] > state.done) {
      fault(warp, i, -1, std::string("a register of a wgmma under way is ") + verb);
    }
    state.touched_at[static_cast<size_t>(row)] = state.clock;
  };
  for (const int row : i.in) touch(row, "read");
  for (const int row : i.out) touch(row, "written");
}

void end_warp(Warp& warp, const Instruction& last) {
  warp.is_done = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Lane& l = warp.lanes[lane];
    if (!l.open_stores.empty() || !l.store_groups.empty()) {
      fault(warp, last, lane, "ends before its bulk stores have read their source");
    }
  }
  if (warp.matrix.used && (!warp.matrix.open_reads.empty() || !warp.matrix.reads.empty())) {
    fault(warp, last, -1, "ends with wgmmas under way");
  }
}

// A whole warp at bar.sync or bar.arrive.
void arrive_at_barrier(Warp& warp, const Instruction& i, LaneMask lanes) {
  Block& block = *warp.block;
  const int lane = first_lane(lanes);
  const auto operand = [&](size_t k) { return static_cast<uint32_t>(warp.row(i.in[k])[lane]); };
  const uint32_t id = operand(0);
  const auto all = static_cast<uint32_t>(block.warps.size() * kLanes);
  const uint32_t expected = i.in.size() > 1 ? operand(1) : all;
  if (id > 15) fault(warp, i, lane, "barrier " + std::to_string(id) + ", there are 16");
  if (expected == 0 || expected % kLanes != 0 || expected > all) {
    fault(
        warp, i, lane,
        std::to_string(expected) + " threads at a barrier, must be whole warps of " + "the block");
  }
  NamedBarrier& barrier = block.barriers[id];
  if (barrier.arrived > 0 && barrier.expected != expected) {
    fault(warp, i, lane,
          "barrier " + std::to_string(id) + " is of " + std::to_string(barrier.expected) +
              " threads for others");
  }
  const uint32_t own_bit = 1u << warp.index;
  if ((barrier.warps & own_bit) != 0) {
    fault(warp, i, lane, "arrives twice at barrier " + std::to_string(id) + " before it is over");
  }
  barrier.warps |= own_bit;
  barrier.expected = expected;
  barrier.arrived += kLanes;
  block.order->release(warp, warp.present, barrier.gathered);
  ++block.progress;
  const bool waits = i.mode != 0;
  if (waits) warp.waits_at = static_cast<int>(id);
  if (barrier.arrived < expected) return;
  const KnowledgePtr handed_on = block.order->finished(std::move(barrier.gathered));
  barrier = {};
  for (Warp& w : block.warps) {
    if (w.waits_at != static_cast<int>(id)) continue;
    w.waits_at = -1;
    block.order->acquire(w, w.present, handed_on);
  }
}

// The lanes of a warp that execute together: all those at one place.
class Group {
 public:
  Group(Warp& warp, bool last_ones);
  // Until the lanes part, meet others, wait, or have run so many instructions.
  void run(int& quantum);

 private:
  void set_pc(LaneMask lanes, int pc) {
    for_lanes(lanes, [&](int lane) { frame_.pc[lane] = pc; });
  }
  LaneMask guarded(const Instruction& i) const;
  bool meet(const Instruction& i, LaneMask lanes);  // false: the group ends here

  Warp& warp_;
  Frame& frame_;
  LaneMask lanes_ = 0;
  int pc_ = 0, others_ = INT32_MAX;  // where the next lanes stand
};

Group::Group(Warp& warp, bool last_ones) : warp_(warp), frame_(warp.frame()) {
  const LaneMask runnable = frame_.alive & ~frame_.waiting;
  // Those behind run first, so that they catch up with the others.
  pc_ = last_ones ? -1 : INT32_MAX;
  for_lanes(runnable, [&](int lane) {
    pc_ = last_ones ? std::max(pc_, frame_.pc[lane]) : std::min(pc_, frame_.pc[lane]);
  });
  for_lanes(runnable, [&](int lane) {
    if (frame_.pc[lane] == pc_) {
      lanes_ |= 1u << lane;
    } else if (frame_.pc[lane] > pc_) {
      others_ = std::min(others_, frame_.pc[lane]);
    }
  });
}

LaneMask Group::guarded(const Instruction& i) const {
  if (i.guard < 0) return lanes_;
  const uint64_t* predicate = warp_.row(i.guard);
  LaneMask lanes = 0;
  for_lanes(lanes_, [&](int lane) {
    if ((predicate[lane] != 0) != i.guard_inverted) lanes |= 1u << lane;
  });
  return lanes;
}

bool Group::meet(const Instruction& i, LaneMask lanes) {
  LaneMask here = lanes;
  for_lanes(frame_.waiting, [&](int lane) {
    if (frame_.pc[lane] == pc_) here |= 1u << lane;
  });
  LaneMask needed = frame_.alive;
  if (i.member_row >= 0) {
    const int lane = first_lane(lanes);
    needed = static_cast<LaneMask>(warp_.row(i.member_row)[lane]) & warp_.present;
    if ((needed >> lane & 1) == 0) fault(warp_, i, lane, "is not in its own membermask");
    if ((needed & ~frame_.alive) != 0) {
      fault(warp_, i, lane, "waits for a lane that has ended, or is elsewhere");
    }
  } else if (i.flow == Flow::kWarpSync && frame_.alive != warp_.present) {
    fault(warp_, i, first_lane(lanes), "an .aligned instruction without all lanes of the warp");
  }
  set_pc(lanes_ & ~lanes, pc_ + 1);
  if ((here & needed) != needed) {
    frame_.waiting |= lanes;
    set_pc(lanes, pc_);
    return false;
  }
  frame_.waiting &= ~here;
  set_pc(here, pc_ + 1);
  if (i.flow == Flow::kBarrier) {
    arrive_at_barrier(warp_, i, here);
    return false;
  }
  i.execute(warp_, i, here);
  return here == lanes_;
}

void Group::run(int& quantum) {
  for (;;) {
    const Instruction& i = frame_.function->code[static_cast<size_t>(pc_)];
    const LaneMask lanes = guarded(i);
    ++warp_.block->launch->instructions;
    --quantum;
    if (warp_.matrix.used && lanes != 0) watch_registers(warp_, i);
    switch (i.flow) {
      case Flow::kNext:
      case Flow::kSpin:
        if (lanes != 0) i.execute(warp_, i, lanes);
        ++pc_;
        break;
      case Flow::kBranch:
        if (lanes != lanes_ && lanes != 0) {
          set_pc(lanes, i.target);
          set_pc(lanes_ & ~lanes, pc_ + 1);
          return;
        }
        pc_ = lanes != 0 ? i.target : pc_ + 1;
        break;
      case Flow::kReturn:
        frame_.alive &= ~lanes;
        set_pc(lanes_ & ~lanes, pc_ + 1);
        return;
      case Flow::kCall: {
        set_pc(lanes_, pc_ + 1);
        if (lanes == 0) return;
        std::vector<std::vector<uint64_t>> arguments;
        for (const int row : i.in) arguments.emplace_back(warp_.row(row), warp_.row(row) + kLanes);
        enter(warp_, *i.callee, lanes);  // frame_ may have moved
        for (size_t k = 0; k < arguments.size(); ++k) {
          std::copy(arguments[k].begin(), arguments[k].end(),
                    warp_.row(i.callee->parameter_rows[k]));
        }
        return;
      }
      case Flow::kWarpSync:
      case Flow::kBarrier:
        if (lanes != 0 && !meet(i, lanes)) return;
        ++pc_;
        break;
    }
    if (quantum <= 0 || warp_.has_spun || pc_ >= others_) {
      set_pc(lanes_, pc_);
      return;
    }
  }
}

void run_warp(Warp& warp, int quantum) {
  bool last_ones = warp.has_spun;  // those behind wait for something: let others pass
  warp.has_spun = false;
  while (quantum > 0 && warp.waits_at < 0 && !warp.has_spun) {
    Frame& frame = warp.frame();
    if ((frame.alive & ~frame.waiting) == 0) {
      if (frame.alive != 0) {
        const int lane = first_lane(frame.waiting);
        fault(warp, frame.function->code[static_cast<size_t>(frame.pc[lane])], lane,
              "the lanes of this warp never meet here");
      }
      const Instruction& last = frame.function->code.back();
      if (warp.frames.size() == 1) return end_warp(warp, last);
      leave(warp);
      continue;
    }
    Group(warp, last_ones).run(quantum);
    last_ones = false;
  }
}

// --- A block ---

std::string where_all_wait(const Block& block) {
  std::string text;
  for (const Warp& w : block.warps) {
    if (w.is_done) continue;
    const Frame& frame = w.frame();
    const int pc = frame.pc[first_lane(frame.alive)];
    text += text.empty() ? "" : "; ";
    text += "warp " + std::to_string(w.index) + " ";
    text += w.waits_at >= 0 ? "at barrier " + std::to_string(w.waits_at) : "spins";
    text += " near PTX line " +
            std::to_string(frame.function->code[static_cast<size_t>(std::max(0, pc - 1))].line);
  }
  return text;
}

void run_block(Block& block) {
  constexpr uint64_t kLongestTurn = 400;
  const uint64_t most_idle = 1000 + 200 * block.warps.size();
  uint64_t idle = 0, seen = 0;
  std::vector<Warp*> ready;
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (Warp& w : block.warps) {
      all_done &= w.is_done;
      if (!w.is_done && w.waits_at < 0) ready.push_back(&w);
    }
    if (all_done) break;
    const bool must_land = ready.empty() || idle > 4 * block.warps.size();
    if (!block.loads.empty() && (must_land || block.random() % 4 == 0)) {
      land_load(block, block.random() % block.loads.size());
      continue;
    }
    if (ready.empty() || idle > most_idle) {
      throw Fault(name_of(block) + ": deadlock: " + where_all_wait(block));
    }
    Warp& warp = *ready[block.random() % ready.size()];
    run_warp(warp, 1 + static_cast<int>(block.random() % kLongestTurn));
    idle = block.progress == seen && warp.is_spinning ? idle + 1 : 0;
    seen = block.progress;
  }
  if (!block.loads.empty()) {
    throw Fault(name_of(block) + ": ended with a bulk copy under way (PTX line " +
                std::to_string(block.loads[0].instruction->line) + ")");
  }
  for (int id = 0; id < 16; ++id) {
    if (block.barriers[id].arrived == 0) continue;
    throw Fault(name_of(block) + ": ended with " + std::to_string(block.barriers[id].arrived) +
                " of " + std::to_string(block.barriers[id].expected) + " threads at barrier " +
                std::to_string(id));
  }
  if (block.launch->overlaps && !block.has_waited) {
    throw Fault(name_of(block) +
                ": no thread called griddepcontrol.wait, in a launch that may "
                "overlap the one before it");
  }
}

uint64_t schedule_seed = 0;

}  // namespace

void set_schedule(uint64_t seed) { schedule_seed = seed; }

void run(Launch& launch) {
  static Order order;
  std::mt19937_64 random(schedule_seed);
  std::vector<uint64_t> blocks(launch.grid.count());
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (schedule_seed != 0) std::shuffle(blocks.begin(), blocks.end(), random);
  const uint64_t threads = launch.block.count();
  const auto warps = static_cast<int>((threads + kLanes - 1) / kLanes);
  for (const uint64_t number : blocks) {
    Block block;
    block.launch = &launch;
    block.number = number;
    block.index = {static_cast<uint32_t>(number % launch.grid.x),
                   static_cast<uint32_t>(number / launch.grid.x % launch.grid.y),
                   static_cast<uint32_t>(number / launch.grid.x / launch.grid.y)};
    block.shared.assign(launch.shared_bytes, 0xff);  // NaN in every type
    block.random.seed(random());
    block.lands_late = schedule_seed == 0;
    order.start(warps, launch.shared_bytes);
    block.order = &order;
    block.warps.resize(static_cast<size_t>(warps));
    for (int w = 0; w < warps; ++w) {
      Warp& warp = block.warps[static_cast<size_t>(w)];
      warp.block = &block;
      warp.index = w;
      const uint64_t left = threads - static_cast<uint64_t>(w) * kLanes;
      warp.present = left >= kLanes ? kAllLanes : (1u << left) - 1;
      enter(warp, *launch.function, warp.present);
    }
    run_block(block);
    for (Warp& warp : block.warps) leave(warp);
  }
}

}  // namespace lminf::interpreter
