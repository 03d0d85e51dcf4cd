#include "decode.h"

#include <algorithm>
#include <cstdlib>

#include "text.h"

namespace lminf::interpreter {
namespace {

Type type_of(const std::string& name) {
  static const std::map<std::string, Type> types{
      {"pred", Type::kPred}, {"b8", Type::kB8},       {"b16", Type::kB16},      {"b32", Type::kB32},
      {"b64", Type::kB64},   {"u8", Type::kU8},       {"u16", Type::kU16},      {"u32", Type::kU32},
      {"u64", Type::kU64},   {"s8", Type::kS8},       {"s16", Type::kS16},      {"s32", Type::kS32},
      {"s64", Type::kS64},   {"f16", Type::kF16},     {"bf16", Type::kBF16},    {"f32", Type::kF32},
      {"f64", Type::kF64},   {"f16x2", Type::kF16x2}, {"bf16x2", Type::kBF16x2}};
  const auto found = types.find(name);
  return found == types.end() ? Type::kNone : found->second;
}

const OpcodeTable& opcodes() {
  static const OpcodeTable table = [] {
    OpcodeTable t;
    add_arithmetic(t);
    add_conversions(t);
    add_memory(t);
    add_control(t);
    add_warp(t);
    add_matrix(t);
    add_copies(t);
    add_mbarrier(t);
    add_wgmma(t);
    return t;
  }();
  return table;
}

const std::map<std::string, Special>& special_registers() {
  static const std::map<std::string, Special> registers{
      {"%tid.x", Special::kTidX},       {"%tid.y", Special::kTidY},
      {"%tid.z", Special::kTidZ},       {"%ntid.x", Special::kNtidX},
      {"%ntid.y", Special::kNtidY},     {"%ntid.z", Special::kNtidZ},
      {"%ctaid.x", Special::kCtaidX},   {"%ctaid.y", Special::kCtaidY},
      {"%ctaid.z", Special::kCtaidZ},   {"%nctaid.x", Special::kNctaidX},
      {"%nctaid.y", Special::kNctaidY}, {"%nctaid.z", Special::kNctaidZ},
      {"%laneid", Special::kLaneId},    {"%warpid", Special::kWarpId}};
  return registers;
}

// ".param .align 8 .b8 name[16]" and the like.
Parameter parameter(const std::string& text) {
  Parameter p;
  for (const std::string& word : split(text, ' ')) {
    if (!starts_with(word, ".")) continue;
    const Type type = type_of(word.substr(1));
    if (type != Type::kNone) p.bytes = bytes_of(type);
  }
  p.alignment = p.bytes;
  if (const size_t at = text.find(".align"); at != std::string::npos) {
    p.alignment = std::atoi(text.c_str() + at + 6);
  }
  p.name = text.substr(text.find_last_of(" \t") + 1);
  if (const size_t at = p.name.find('['); at != std::string::npos) {
    p.bytes *= std::atoi(p.name.c_str() + at + 1);
    p.name = p.name.substr(0, at);
  }
  return p;
}

}  // namespace

bool Spelling::has(const char* part) const {
  return std::find(parts.begin(), parts.end(), part) != parts.end();
}

bool Spelling::has_any(std::initializer_list<const char*> wanted) const {
  return std::any_of(wanted.begin(), wanted.end(), [&](const char* part) { return has(part); });
}

void decode_function(Module& module, const FunctionText& text, Function& function) {
  Decoder(module, text, function).run();
}

Decoder::Decoder(Module& module, const FunctionText& text, Function& function)
    : module_(module), text_(text), function_(function), line_(text.line) {}

void Decoder::refuse(const std::string& what) const {
  throw Fault("PTX line " + std::to_string(line_) + " `" + statement_.substr(0, 120) +
              "`: " + what + " (in " + text_.name + ")");
}

void Decoder::allow(const Spelling& s, std::initializer_list<const char*> parts) const {
  for (size_t k = 1; k < s.parts.size(); ++k) {
    const bool known = type_of(s.parts[k]) != Type::kNone ||
                       std::find(parts.begin(), parts.end(), s.parts[k]) != parts.end();
    if (!known) refuse("." + s.parts[k] + " is not known of " + s.parts[0]);
  }
}

void Decoder::expect_operands(const Spelling& s, size_t least, size_t most) const {
  if (s.operands.size() < least || s.operands.size() > most) {
    refuse(std::to_string(s.operands.size()) + " operands");
  }
}

void Decoder::run() {
  function_.name = text_.name;
  function_.is_entry = text_.is_entry;
  scopes_.emplace_back();
  for (const std::string& each : split(text_.parameters, ',')) {
    Parameter p = parameter(each);
    if (p.bytes == 0 || p.alignment == 0) refuse("parameter " + each);
    const int end = function_.parameter_bytes;
    p.offset = (end + p.alignment - 1) / p.alignment * p.alignment;
    function_.parameter_bytes = p.offset + p.bytes;
    if (!function_.is_entry) {
      function_.parameter_rows.push_back(new_row());
      parameter_rows_[p.name] = function_.parameter_rows.back();
    }
    function_.parameters.push_back(p);
  }
  if (const size_t at = text_.directives.find(".maxntid"); at != std::string::npos) {
    function_.most_threads = 1;
    for (const std::string& side : split(text_.directives.substr(at + 8), ',')) {
      function_.most_threads *= std::max(1, std::atoi(side.c_str()));
    }
  }

  const std::string& body = text_.body;
  for (size_t at = 0; at < body.size();) {
    const char c = body[at];
    if (is_space(c) || c == ';' || c == '{' || c == '}') {
      if (c == '{') scopes_.emplace_back();
      if (c == '}') scopes_.pop_back();
      line_ += c == '\n';
      ++at;
      continue;
    }
    size_t end = at;
    while (end < body.size() && is_word(body[end])) ++end;
    size_t colon = end;
    while (colon < body.size() && body[colon] == ' ') ++colon;
    if (end > at && colon < body.size() && body[colon] == ':' && body[colon + 1] != ':') {
      labels_[body.substr(at, end - at)] = static_cast<int>(function_.code.size());
      at = colon + 1;
      continue;
    }
    end = body.find(';', at);
    if (end == std::string::npos) {
      statement_ = trimmed(body.substr(at));
      refuse("no semicolon ends this");
    }
    statement_ = trimmed(body.substr(at, end - at));
    if (statement_[0] == '.') {
      declare(statement_);
    } else {
      statement(statement_);
    }
    line_ += static_cast<int>(std::count(body.begin() + at, body.begin() + end, '\n'));
    at = end + 1;
  }
  Instruction end;
  end.flow = Flow::kReturn;
  end.line = line_;
  end.text = "end of the body";
  function_.code.push_back(end);
  for (const auto& [index, label] : jumps_) {
    const auto found = labels_.find(label);
    if (found == labels_.end()) {
      line_ = function_.code[index].line;
      refuse("no label " + label);
    }
    function_.code[index].target = found->second;
  }
}

void Decoder::declare(const std::string& text) {
  if (starts_with(text, ".pragma") || starts_with(text, ".loc")) return;
  const bool is_register = starts_with(text, ".reg"), is_parameter = starts_with(text, ".param");
  if (!is_register && !is_parameter) refuse("a declaration that is not known");
  if (contains(text, "[") || contains(text, ".align")) refuse("an array");
  const size_t type = text.find('.', 1);
  const size_t names = text.find_first_of(" \t", type);
  if (type == std::string::npos || names == std::string::npos) refuse("a declaration");
  for (const std::string& name : split(text.substr(names), ',')) {
    const size_t count = name.find('<');
    if (count == std::string::npos) {
      scopes_.back()[name] = new_row();
      continue;
    }
    const int n = std::atoi(name.c_str() + count + 1);
    for (int k = 0; k < n; ++k)
      scopes_.back()[name.substr(0, count) + std::to_string(k)] = new_row();
  }
}

void Decoder::statement(const std::string& text) {
  Instruction i;
  i.line = line_;
  i.text = text.substr(0, 120);
  std::string rest = text;
  if (rest[0] == '@') {
    const size_t end = rest.find_first_of(" \t\n");
    std::string guard = rest.substr(1, end - 1);
    if (guard[0] == '!') {
      i.guard_inverted = true;
      guard = guard.substr(1);
    }
    i.guard = row(guard);
    rest = trimmed(rest.substr(end));
  }
  const size_t end = rest.find_first_of(" \t\n");
  Spelling s;
  s.parts = split(rest.substr(0, end), '.');
  if (end != std::string::npos) s.operands = split(rest.substr(end), ',');
  for (size_t k = 1; k < s.parts.size(); ++k) {
    const Type type = type_of(s.parts[k]);
    if (type != Type::kNone) s.types.push_back(type);
  }
  if (!s.types.empty()) i.type = s.types[0];
  i.source_type = s.types.size() > 1 ? s.types[1] : i.type;
  i.flush = s.has("ftz");
  const auto opcode = opcodes().find(s.parts[0]);
  if (opcode == opcodes().end()) refuse("the opcode is not known");
  opcode->second(*this, s, i);
  const bool executes = i.flow == Flow::kNext || i.flow == Flow::kWarpSync || i.flow == Flow::kSpin;
  if (executes && i.execute == nullptr) refuse("not for this type");
  function_.code.push_back(std::move(i));
}

int Decoder::constant(const std::string& key, uint64_t value) {
  const auto [at, is_new] = fixed_rows_.try_emplace(key, function_.rows);
  if (is_new) {
    new_row();
    function_.constants.emplace_back(at->second, value);
  }
  return at->second;
}

int Decoder::row(const std::string& operand) {
  if (operand == "_") return -1;
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->find(operand);
    if (found != scope->end()) return found->second;
  }
  if (operand.empty()) refuse("an operand is missing");
  if (operand[0] == '%') {
    const auto special = special_registers().find(operand);
    if (special == special_registers().end()) refuse("operand " + operand + " is not known");
    const auto [at, is_new] = fixed_rows_.try_emplace(operand, function_.rows);
    if (is_new) {
      new_row();
      function_.specials.emplace_back(at->second, special->second);
    }
    return at->second;
  }
  const std::string prefix = operand.substr(0, 2);
  if (prefix == "0f" || prefix == "0F" || prefix == "0d" || prefix == "0D") {
    return constant(operand, std::strtoull(operand.c_str() + 2, nullptr, 16));
  }
  if (operand[0] == '-') {
    return constant(operand, static_cast<uint64_t>(std::strtoll(operand.c_str(), nullptr, 0)));
  }
  if (operand[0] >= '0' && operand[0] <= '9') {
    return constant(operand, std::strtoull(operand.c_str(), nullptr, 0));
  }
  if (const auto found = module_.symbols().find(operand); found != module_.symbols().end()) {
    return constant(operand, found->second);
  }
  if (const auto found = parameter_rows_.find(operand); found != parameter_rows_.end()) {
    return found->second;
  }
  for (const Parameter& p : function_.parameters) {
    if (p.name == operand) return constant(operand, static_cast<uint64_t>(p.offset));
  }
  refuse("operand " + operand + " is not known");
}

std::vector<int> Decoder::rows(const std::string& operand) {
  if (operand.empty() || operand[0] != '{') return {row(operand)};
  std::vector<int> all;
  for (const std::string& each : split(operand.substr(1, operand.size() - 2), ',')) {
    all.push_back(row(each));
  }
  return all;
}

int Decoder::number(const std::string& operand) const {
  char* end = nullptr;
  const int64_t value = std::strtoll(operand.c_str(), &end, 0);
  if (operand.empty() || *end != '\0') refuse(operand + " must be an immediate");
  return static_cast<int>(value);
}

Address Decoder::address(const std::string& operand, std::vector<int>* coordinates,
                         bool* in_registers) {
  if (operand.size() < 3 || operand.front() != '[' || operand.back() != ']') {
    refuse(operand + " is no address");
  }
  const auto pieces = split(operand.substr(1, operand.size() - 2), ',');
  std::string base = pieces[0];
  Address a;
  if (const size_t plus = base.find('+', 1); plus != std::string::npos) {
    a.offset = std::strtoll(base.c_str() + plus + 1, nullptr, 0);
    base = trimmed(base.substr(0, plus));
  }
  if (in_registers != nullptr) {
    *in_registers = parameter_rows_.count(base) > 0;
    for (const auto& scope : scopes_) *in_registers |= base[0] != '%' && scope.count(base) > 0;
  }
  a.row = row(base);
  if (pieces.size() > 1) {
    if (coordinates == nullptr) refuse(operand + " has coordinates");
    *coordinates = rows(pieces[1]);
  }
  return a;
}

void Decoder::plain_operands(const Spelling& s, Instruction& i, size_t n_out, size_t n_in) {
  expect_operands(s, n_out + n_in, n_out + n_in);
  for (size_t k = 0; k < s.operands.size(); ++k) {
    (k < n_out ? i.out : i.in).push_back(row(s.operands[k]));
    if (k >= n_out && i.in.back() < 0) refuse("_ is read");
  }
  if (n_out == 1 && i.out[0] < 0) refuse("the result goes nowhere");
}

void Decoder::warp_sync(Instruction& i, int member_row) const {
  i.flow = Flow::kWarpSync;
  i.member_row = member_row;
}

void Decoder::branch_to(const std::string& label) {
  jumps_.emplace_back(function_.code.size(), label);
}

const Function* Decoder::callee(const std::string& name) {
  const Function* f = module_.function(name);
  if (f == nullptr) refuse("no function " + name);
  return f;
}

}  // namespace lminf::interpreter
