// PTX text to instructions: statements, names and operands here; each group of opcodes decodes its
// own (arithmetic.cpp, conversion.cpp, ...).
#pragma once

#include <initializer_list>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "fault.h"
#include "program.h"

namespace lminf::interpreter {

void decode_function(Module& module, const FunctionText& text, Function& function);

// "ld.global.v4.u32 {a, b, c, d}, [e]" taken apart.
struct Spelling {
  std::vector<std::string> parts;     // ld, global, v4, u32
  std::vector<std::string> operands;  // {a, b, c, d} and [e]
  std::vector<Type> types;            // those among the parts, in order

  bool has(const char* part) const;
  bool has_any(std::initializer_list<const char*> parts) const;
};

class Decoder {
 public:
  Decoder(Module& module, const FunctionText& text, Function& function);
  void run();

  // Throws Fault: the line, the statement, what is wrong with it.
  [[noreturn]] void refuse(const std::string& what) const;
  // Beside types and the opcode itself, a spelling may have these parts alone; and so many
  // operands.
  void allow(const Spelling& s, std::initializer_list<const char*> parts) const;
  void expect_operands(const Spelling& s, size_t least, size_t most) const;

  int row(const std::string& operand);                // -1 for "_"
  std::vector<int> rows(const std::string& operand);  // {a, b} or one
  int number(const std::string& operand) const;       // an immediate
  // `in_registers`: whether the address names a parameter that is held in a register.
  Address address(const std::string& operand, std::vector<int>* coordinates = nullptr,
                  bool* in_registers = nullptr);
  // The first `n_out` operands are written, the others read.
  void plain_operands(const Spelling& s, Instruction& i, size_t n_out, size_t n_in);
  void warp_sync(Instruction& i, int member_row = -1) const;
  void branch_to(const std::string& label);  // of the instruction being decoded
  const Function* callee(const std::string& name);

 private:
  void declare(const std::string& statement);
  void statement(const std::string& text);
  int new_row() { return function_.rows++; }
  int constant(const std::string& key, uint64_t value);

  Module& module_;
  const FunctionText& text_;
  Function& function_;
  std::vector<std::unordered_map<std::string, int>> scopes_;
  std::unordered_map<std::string, int> fixed_rows_;  // of constants and special registers
  std::unordered_map<std::string, int> parameter_rows_;
  std::unordered_map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
  int line_ = 0;
  std::string statement_;
};

// What fills in an instruction whose opcode (its first part) it is looked up by.
using Decode = void (*)(Decoder&, const Spelling&, Instruction&);
using OpcodeTable = std::map<std::string, Decode>;

// Each group's.
void add_arithmetic(OpcodeTable& table);
void add_conversions(OpcodeTable& table);
void add_memory(OpcodeTable& table);
void add_control(OpcodeTable& table);
void add_warp(OpcodeTable& table);
void add_matrix(OpcodeTable& table);
void add_copies(OpcodeTable& table);  // cp.async and cp.async.bulk
void add_mbarrier(OpcodeTable& table);
void add_wgmma(OpcodeTable& table);

}  // namespace lminf::interpreter
