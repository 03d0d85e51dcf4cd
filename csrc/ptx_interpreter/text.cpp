#include "text.h"

#include <cctype>
#include <cstring>

namespace lminf::interpreter {

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%';
}

std::string trimmed(const std::string& text) {
  size_t begin = 0, end = text.size();
  while (begin < end && is_space(text[begin])) ++begin;
  while (end > begin && is_space(text[end - 1])) --end;
  return text.substr(begin, end - begin);
}

bool starts_with(const std::string& text, const char* prefix) {
  return text.compare(0, std::strlen(prefix), prefix) == 0;
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> pieces;
  std::string piece;
  int depth = 0;
  for (const char c : text) {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == separator && depth == 0) {
      pieces.push_back(trimmed(piece));
      piece.clear();
    } else {
      piece += c;
    }
  }
  if (!trimmed(piece).empty() || !pieces.empty()) pieces.push_back(trimmed(piece));
  return pieces;
}

std::string without_comments(const std::string& text) {
  std::string kept = text;
  for (size_t i = 0; i + 1 < kept.size(); ++i) {
    if (kept[i] != '/' || (kept[i + 1] != '/' && kept[i + 1] != '*')) continue;
    const bool to_line_end = kept[i + 1] == '/';
    while (i < kept.size()) {
      if (to_line_end && kept[i] == '\n') break;
      const bool ends = !to_line_end && kept[i] == '*' && i + 1 < kept.size() && kept[i + 1] == '/';
      if (kept[i] != '\n') kept[i] = ' ';
      ++i;
      if (ends) {
        kept[i] = ' ';
        break;
      }
    }
  }
  return kept;
}

}  // namespace lminf::interpreter
