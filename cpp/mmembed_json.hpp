// The little JSON that the programs of this folder need: strings out, flat objects in.
#pragma once

#include <cctype>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "mmembed.hpp"

namespace mmembed {

// How many bytes the UTF-8 sequence at s[i] has; 0 where there is none.
inline size_t utf8_sequence(const std::string& s, size_t i) {
  auto byte = [&](size_t k) { return k < s.size() ? static_cast<unsigned char>(s[k]) : 0u; };
  unsigned lead = byte(i), low = 0x80, high = 0xBF;
  size_t size = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (size_t k = 1; k < size; ++k, low = 0x80, high = 0xBF)
    if (byte(i + k) < low || byte(i + k) > high) return 0;
  return size;
}

// JSON string of bytes that may not be UTF-8: a byte that is not becomes U+FFFD.
inline std::string quote(const std::string& s) {
  std::string out = "\"";
  char buffer[8];
  for (size_t i = 0; i < s.size();) {
    unsigned char c = s[i];
    size_t size = utf8_sequence(s, i);
    if (size == 0) out += "\\ufffd";
    else if (c == '"' || c == '\\') { out += '\\'; out += static_cast<char>(c); }
    else if (c < 0x20 || c == 0x7F) { std::snprintf(buffer, sizeof buffer, "\\u%04x", c); out += buffer; }
    else out += s.substr(i, size);
    i += size ? size : 1;
  }
  return out + "\"";
}

// One row of numbers as a JSON array: integers as such, else nine digits, which give a float32 back; NaN is null.
inline std::string numbers(const torch::Tensor& row) {
  const torch::Tensor r = row.cpu().contiguous();
  const bool whole = !r.is_floating_point();
  const torch::Tensor x = r.to(whole ? torch::kInt64 : torch::kFloat32);
  std::string out = "[";
  char buffer[32];
  for (int64_t j = 0; j < x.numel(); ++j) {
    if (j) out += ", ";
    if (whole) std::snprintf(buffer, sizeof buffer, "%lld", static_cast<long long>(x.data_ptr<int64_t>()[j]));
    else std::snprintf(buffer, sizeof buffer, "%.9g", x.data_ptr<float>()[j]);
    out += !whole && std::isnan(x.data_ptr<float>()[j]) ? "null" : buffer;
  }
  return out + "]";
}

// A flat JSON object: keys to strings, decoded; numbers and literals as they stand. Throws Error for anything else.
class Reader {
 public:
  explicit Reader(const std::string& line) : s_(line) {}

  std::map<std::string, std::string> object() {
    std::map<std::string, std::string> out;
    expect('{');
    if (peek() != '}') {
      do {
        const std::string key = string();
        expect(':');
        out[key] = peek() == '"' ? string() : literal();
      } while (next(','));
    }
    expect('}');
    if (peek()) fail("more after the object");
    return out;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error("not a flat JSON object: " + what + " at byte " + std::to_string(i_));
  }
  char peek() {
    while (i_ < s_.size() && (s_[i_] == ' ' || s_[i_] == '\t' || s_[i_] == '\r' || s_[i_] == '\n')) ++i_;
    return i_ < s_.size() ? s_[i_] : '\0';
  }
  bool next(char c) { return peek() == c ? ++i_, true : false; }
  void expect(char c) { if (!next(c)) fail(std::string("no '") + c + "'"); }

  std::string literal() {
    const size_t start = i_;
    while (i_ < s_.size() && (std::isalnum(static_cast<unsigned char>(s_[i_])) || std::strchr("+-.", s_[i_]))) ++i_;
    const std::string word = s_.substr(start, i_ - start);
    static const std::regex form("true|false|null|-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?");
    if (word.size() > 40 || !std::regex_match(word, form)) fail("a value is not a string, number or literal");
    return word;
  }

  unsigned hex() {
    unsigned value = 0;
    for (int k = 0; k < 4; ++k, ++i_) {
      const char c = i_ < s_.size() ? s_[i_] : '\0';
      if (!std::isxdigit(static_cast<unsigned char>(c))) fail("a broken \\u");
      value = value * 16 + static_cast<unsigned>(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return value;
  }

  // A lone half of a surrogate pair goes on as its three bytes, which the tokenizer reads as U+FFFD.
  std::string string() {
    expect('"');
    std::string out;
    while (i_ < s_.size() && s_[i_] != '"') {
      if (s_[i_] != '\\') { out += s_[i_++]; continue; }
      if (++i_ >= s_.size()) fail("a string without its end");
      const char c = s_[i_++];
      if (c != 'u') {
        static const std::map<char, char> plain = {{'"', '"'}, {'\\', '\\'}, {'/', '/'}, {'b', '\b'}, {'f', '\f'}, {'n', '\n'}, {'r', '\r'}, {'t', '\t'}};
        if (!plain.count(c)) fail("an unknown escape");
        out += plain.at(c);
        continue;
      }
      unsigned code = hex();
      if (code >= 0xD800 && code < 0xDC00 && s_.compare(i_, 2, "\\u") == 0) {
        const size_t here = i_;
        i_ += 2;
        const unsigned low = hex();
        if (low >= 0xDC00 && low < 0xE000) code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        else i_ = here;
      }
      if (code < 0x80) out += static_cast<char>(code);
      else if (code < 0x800) { out += static_cast<char>(0xC0 | code >> 6); out += static_cast<char>(0x80 | (code & 63)); }
      else if (code < 0x10000) {
        out += static_cast<char>(0xE0 | code >> 12);
        out += static_cast<char>(0x80 | (code >> 6 & 63));
        out += static_cast<char>(0x80 | (code & 63));
      } else {
        out += static_cast<char>(0xF0 | code >> 18);
        for (int shift = 12; shift >= 0; shift -= 6) out += static_cast<char>(0x80 | (code >> shift & 63));
      }
    }
    if (i_++ >= s_.size()) fail("a string without its end");
    return out;
  }

  const std::string& s_;
  size_t i_ = 0;
};

// The bytes of base 64 text; throws Error for what is none.
inline std::string from_base64(const std::string& text) {
  std::string out;
  uint32_t bits = 0;
  int n = 0;
  size_t end = text.find_last_not_of("=\n");
  for (size_t i = 0; end != std::string::npos && i <= end; ++i) {
    const char c = text[i];
    const int v = c >= 'A' && c <= 'Z' ? c - 'A' : c >= 'a' && c <= 'z' ? c - 'a' + 26 : c >= '0' && c <= '9' ? c - '0' + 52
                : c == '+' || c == '-' ? 62 : c == '/' || c == '_' ? 63 : -1;
    if (v < 0) throw Error("image_base64 is not base 64");
    bits = bits << 6 | static_cast<uint32_t>(v);
    if ((n += 6) >= 8) out += static_cast<char>(bits >> (n -= 8) & 0xFF);
  }
  return out;
}

}  // namespace mmembed
