// Cutting up PTX text.
#pragma once

#include <string>
#include <vector>

namespace lminf::interpreter {

bool is_space(char c);
bool is_word(char c);  // of a name
std::string trimmed(const std::string& text);
bool starts_with(const std::string& text, const char* prefix);
bool contains(const std::string& text, const char* part);

// At separators outside of brackets; pieces are trimmed. Nothing gives no pieces.
std::vector<std::string> split(const std::string& text, char separator);

// The text with comments blanked out; lines keep their numbers.
std::string without_comments(const std::string& text);

}  // namespace lminf::interpreter
