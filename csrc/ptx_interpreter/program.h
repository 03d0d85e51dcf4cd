// A PTX module as the interpreter holds it: functions of decoded instructions.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lminf::interpreter {

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kBF16,
  kF32,
  kF64,
  kF16x2,
  kBF16x2,
};
int bytes_of(Type type);
bool is_signed(Type type);
bool is_float(Type type);

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kParam };

using LaneMask = uint32_t;
constexpr int kLanes = 32;
constexpr LaneMask kAllLanes = 0xffffffffu;

struct Warp;
struct Instruction;
struct Function;
// Runs one instruction for the lanes of a mask, never for none.
using Execute = void (*)(Warp&, const Instruction&, LaneMask);

// What the scheduler (schedule.cpp) has to do with an instruction.
enum class Flow : uint8_t {
  kNext,    // nothing: execute, go on
  kBranch,  // lanes may part
  kReturn,  // lanes end, or leave the function
  kCall,
  kWarpSync,  // the lanes of its membermask meet here, then execute together
  kBarrier,   // bar.sync and bar.arrive: whole warps
  kSpin,      // a test that may have to be repeated: other warps run first when it fails
};

// A register's value plus an offset.
struct Address {
  int row = -1;
  int64_t offset = 0;
};

// Registers are rows of 32 lanes; constants and special registers have rows too.
struct Instruction {
  Execute execute = nullptr;
  Flow flow = Flow::kNext;
  Type type = Type::kNone, source_type = Type::kNone;
  Space space = Space::kGeneric;
  bool guard_inverted = false;
  bool flush = false;                // .ftz
  bool flag = false, flag2 = false;  // an opcode's own: .trans, .expect_tx, majors of wgmma
  bool is_wgmma = false;
  int guard = -1;            // row of the predicate, -1: none
  std::vector<int> out, in;  // rows written and read; -1: the bit bucket "_"
  Address address, other;
  std::vector<int> coordinates;  // rows, of a tensor copy
  int number = 0;                // an opcode's own: bytes, groups left, N of wgmma
  int mode = 0, mode2 = 0;       // an opcode's own: comparison, rounding, kind of shuffle
  int target = -1;               // of a branch: index in the code
  int member_row = -1;           // of a membermask; -1: all lanes (.aligned)
  const Function* callee = nullptr;
  int line = 0;  // in the PTX text
  std::string text;
};

enum class Special : uint8_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
};

struct Parameter {
  std::string name;
  int bytes = 0, alignment = 0, offset = 0;
};

struct Function {
  std::string name;
  bool is_entry = false;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  std::vector<int> parameter_rows;  // of a .func: a register for each
  int most_threads = 0;             // .maxntid, 0: not said
  std::vector<Instruction> code;
  int rows = 0;
  std::vector<std::pair<int, uint64_t>> constants;
  std::vector<std::pair<int, Special>> specials;
};

// Where a function stands in the text.
struct FunctionText {
  bool is_entry = false;
  std::string name, parameters, directives, body;
  int line = 0;  // of the body's first character
};

class Module {
 public:
  // Throws Fault with the line of what it does not understand. Functions are decoded when they are
  // first asked for: a module holds many that a test never runs.
  explicit Module(const std::string& text);

  int capability() const { return capability_; }
  std::string target() const { return std::to_string(capability_) + (is_specific_ ? "a" : ""); }
  bool is_specific() const { return is_specific_; }  // sm_90a: runs on that capability alone
  const std::map<std::string, FunctionText>& texts() const { return texts_; }
  const Function* function(const std::string& name);  // null: there is none of that name
  bool replace(const std::string& name, const std::string& body);  // false: there is none

  // Addresses of the names of shared memory.
  const std::map<std::string, uint64_t>& symbols() const { return symbols_; }

 private:
  int capability_ = 0;
  bool is_specific_ = false;
  std::map<std::string, FunctionText> texts_;
  std::map<std::string, std::unique_ptr<Function>> functions_;
  std::map<std::string, uint64_t> symbols_;
};

// Where shared memory begins in its window. Not 0: an address of 0 is then a fault. A multiple of
// 1024, the largest alignment that a kernel may ask for.
constexpr uint32_t kSharedBase = 1024;

}  // namespace lminf::interpreter
