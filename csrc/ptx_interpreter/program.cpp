// PTX text to functions: the module's own statements.
#include "program.h"

#include <algorithm>
#include <cstdlib>

#include "decode.h"
#include "fault.h"
#include "text.h"

namespace lminf::interpreter {

int bytes_of(Type type) {
  switch (type) {
    case Type::kPred:
    case Type::kB8:
    case Type::kU8:
    case Type::kS8:
      return 1;
    case Type::kB16:
    case Type::kU16:
    case Type::kS16:
    case Type::kF16:
    case Type::kBF16:
      return 2;
    case Type::kB64:
    case Type::kU64:
    case Type::kS64:
    case Type::kF64:
      return 8;
    default:
      return 4;
  }
}

bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

bool is_float(Type type) {
  return type == Type::kF16 || type == Type::kBF16 || type == Type::kF32 || type == Type::kF64;
}

namespace {

[[noreturn]] void refuse(int line, const std::string& what) {
  throw Fault("PTX line " + std::to_string(line) + ": " + what);
}

// Reads the module statement by statement and knows the line.
class Reader {
 public:
  explicit Reader(const std::string& text) : text_(text) {}

  int line() const { return line_; }
  bool at_end() {
    while (at_ < text_.size() && is_space(text_[at_])) step();
    return at_ >= text_.size();
  }
  char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void step() { line_ += text_[at_++] == '\n'; }
  bool begins(const char* word) const {
    return text_.compare(at_, std::string(word).size(), word) == 0;
  }

  std::string until(const char* stops) {
    const size_t begin = at_;
    const std::string set(stops);
    while (at_ < text_.size() && set.find(text_[at_]) == std::string::npos) step();
    return text_.substr(begin, at_ - begin);
  }

  // From behind an opening brace to behind the one that closes it.
  std::string body() {
    const size_t begin = at_;
    const int first_line = line_;
    for (int depth = 1; at_ < text_.size();) {
      const char c = text_[at_];
      step();
      depth += (c == '{') - (c == '}');
      if (depth == 0) return text_.substr(begin, at_ - 1 - begin);
    }
    refuse(first_line, "the brace that opens here is never closed");
  }

 private:
  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
};

}  // namespace

Module::Module(const std::string& original) {
  const std::string text = without_comments(original);
  Reader reader(text);
  while (!reader.at_end()) {
    if (reader.begins(".version") || reader.begins(".address_size")) {
      reader.until("\n");
      continue;
    }
    if (reader.begins(".target")) {
      const std::string target = reader.until("\n");
      const size_t at = target.find("sm_");
      if (at == std::string::npos) refuse(reader.line(), "no target in " + target);
      capability_ = std::atoi(target.c_str() + at + 3);
      is_specific_ = contains(target, ("sm_" + std::to_string(capability_) + "a").c_str());
      continue;
    }
    const int line = reader.line();
    const std::string head = trimmed(reader.until("({;"));
    const bool is_entry = contains(head, ".entry"), is_function = contains(head, ".func");
    if (is_entry || is_function) {
      const char* word = is_entry ? ".entry" : ".func";
      FunctionText function;
      function.is_entry = is_entry;
      function.name = trimmed(head.substr(head.find(word) + std::string(word).size()));
      if (function.name.empty()) refuse(line, "a function that returns something");
      if (reader.next() == '(') {
        reader.step();
        function.parameters = reader.until(")");
        reader.step();
      }
      function.directives = reader.until("{;");
      const bool is_declaration = reader.next() == ';';
      reader.step();
      if (is_declaration) continue;
      function.line = reader.line();
      function.body = reader.body();
      texts_[function.name] = function;
      continue;
    }
    if (contains(head, ".shared")) {
      if (!contains(head, ".extern")) refuse(line, "shared memory of a fixed size: " + head);
      std::string name = head.substr(head.find_last_of(" \t") + 1);
      name = name.substr(0, name.find('['));
      symbols_[name] = kSharedBase;
      reader.step();
      continue;
    }
    if (!head.empty()) refuse(line, "not known in a module: " + head.substr(0, 80));
    reader.step();
  }
}

bool Module::replace(const std::string& name, const std::string& body) {
  const auto text = texts_.find(name);
  if (text == texts_.end()) return false;
  text->second.body = body;
  functions_.erase(name);
  return true;
}

const Function* Module::function(const std::string& name) {
  auto& made = functions_[name];
  if (made == nullptr) {
    const auto text = texts_.find(name);
    if (text == texts_.end()) return nullptr;
    made = std::make_unique<Function>();
    try {
      decode_function(*this, text->second, *made);
    } catch (...) {
      functions_.erase(name);
      throw;
    }
  }
  return made.get();
}

}  // namespace lminf::interpreter
