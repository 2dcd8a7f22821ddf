// Embeds texts and image files with an exported artifact and prints one JSON object a line.
#include "mmembed.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <iostream>

namespace {

const char* kUsage =
    "usage: mmembed_cli MODEL [--card] [options] [image files]\n"
    "  --text T         a text (again for more)\n"
    "  --text-file F    a file that holds one text: every byte of it, NULs and broken UTF-8 included\n"
    "  --lines F        a file with one text a line\n"
    "  --image F        an image file (again for more)\n"
    "  --rgb HxW:F      a file that holds decoded RGB, H*W*3 bytes, channel after channel (artifacts without file decode)\n"
    "  --batch N        rows that the towers see at once (64)\n"
    "  --threads N      threads for one operation\n"
    "  --device D       cpu, cuda, cuda:1, ...\n"
    "  --dump DIR       write each image's pixels, uint8 (3, S, S), to DIR/<index>.bin\n"
    "  --torchcodec F   libtorchcodec_image.so\n"
    "  --card           print the identity card and stop\n"
    "Prints {\"kind\": \"text\", \"index\", \"ids\", \"embedding\"} and {\"kind\": \"image\", \"index\", \"crc32\" of the pixels,\n"
    "\"embedding\"} or {\"kind\": \"image\", \"index\", \"error\"}. Exit status: 0, 1 when an item failed, 2 when nothing ran.\n";

uint32_t crc32(const uint8_t* data, size_t size) {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t c = 0xFFFFFFFFu;
  for (size_t i = 0; i < size; ++i) c = table[(c ^ data[i]) & 0xFF] ^ (c >> 8);
  return c ^ 0xFFFFFFFFu;
}

// How many bytes the UTF-8 sequence at s[i] has; 0 where there is none.
size_t sequence(const std::string& s, size_t i) {
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
std::string quote(const std::string& s) {
  std::string out = "\"";
  char buffer[8];
  for (size_t i = 0; i < s.size();) {
    unsigned char c = s[i];
    size_t size = sequence(s, i);
    if (size == 0) out += "\\ufffd";
    else if (c == '"' || c == '\\') { out += '\\'; out += static_cast<char>(c); }
    else if (c < 0x20 || c == 0x7F) { std::snprintf(buffer, sizeof buffer, "\\u%04x", c); out += buffer; }
    else out += s.substr(i, size);
    i += size ? size : 1;
  }
  return out + "\"";
}

void print_row(const torch::Tensor& row, const char* key) {  // one row, float32 or int64
  std::printf(", \"%s\": [", key);
  torch::Tensor r = row.cpu().contiguous();
  for (int64_t j = 0; j < r.numel(); ++j) {
    if (j) std::printf(", ");
    if (r.scalar_type() == torch::kInt64) std::printf("%lld", static_cast<long long>(r.data_ptr<int64_t>()[j]));
    else std::printf("%.9g", r.data_ptr<float>()[j]);
  }
  std::printf("]");
}

torch::Device device(const std::string& name) {
  try {
    return torch::Device(name);
  } catch (const std::exception&) {
    throw mmembed::Error("--device wants cpu, cuda, cuda:1 or the like, got '" + name + "'");
  }
}

int64_t number(const std::string& option, const std::string& value) {
  try {
    size_t end = 0;
    int64_t n = std::stoll(value, &end);
    if (end == value.size() && n >= 1) return n;
  } catch (const std::exception&) {
  }
  throw mmembed::Error(option + " wants a whole number of at least 1, got '" + value + "'");
}

mmembed::Image read_rgb(const std::string& spec) {
  static const std::regex form("(\\d+)x(\\d+):(.*)");
  std::smatch m;
  if (!std::regex_match(spec, m, form)) throw mmembed::Error("--rgb wants HxW:FILE, got '" + spec + "'");
  int64_t h = number("--rgb", m[1]), w = number("--rgb", m[2]);
  try {
    std::string data = mmembed::read_file(m[3]);
    if (static_cast<int64_t>(data.size()) != 3 * h * w)
      return {torch::Tensor(), m[3].str() + " holds " + std::to_string(data.size()) + " bytes, not 3*" + m[1].str() + "*" + m[2].str()};
    return mmembed::Image::rgb(mmembed::as_bytes(data).view({3, h, w}));
  } catch (const mmembed::Error& e) {
    return {torch::Tensor(), e.what()};
  }
}

int run(int argc, char** argv) {
  std::string model, dump;
  std::vector<std::string> texts;
  std::vector<mmembed::Image> images;
  mmembed::Options options;
  bool card = false;
  for (int i = 1; i < argc; ++i) {
    std::string a = argv[i];
    auto value = [&] {
      if (i + 1 >= argc) throw mmembed::Error(a + " wants a value");
      return std::string(argv[++i]);
    };
    if (a == "--help" || a == "-h") { std::fputs(kUsage, stdout); return 0; }
    else if (a == "--card") card = true;
    else if (a == "--text") texts.push_back(value());
    else if (a == "--text-file") texts.push_back(mmembed::read_file(value()));
    else if (a == "--lines") {
      std::istringstream lines(mmembed::read_file(value()));
      for (std::string line; std::getline(lines, line);) texts.push_back(line);
    }
    else if (a == "--image") images.push_back(mmembed::Image::file(value()));
    else if (a == "--rgb") images.push_back(read_rgb(value()));
    else if (a == "--batch") options.batch_size = number(a, value());
    else if (a == "--threads") options.threads = static_cast<int>(number(a, value()));
    else if (a == "--device") options.device = device(value());
    else if (a == "--dump") dump = value();
    else if (a == "--torchcodec") options.torchcodec = value();
    else if (a.rfind("--", 0) == 0) throw mmembed::Error("unknown option " + a + "; see --help");
    else if (model.empty()) model = a;
    else images.push_back(mmembed::Image::file(a));
  }
  if (model.empty()) { std::fputs(kUsage, stderr); return 2; }
  if (card) { std::puts(mmembed::read_card(model).c_str()); return 0; }

  mmembed::Embedder emb(model, options);
  const size_t step = static_cast<size_t>(options.batch_size);
  for (size_t i = 0; i < texts.size(); i += step) {
    std::vector<std::string> batch(texts.begin() + i, texts.begin() + std::min(i + step, texts.size()));
    mmembed::Tokens tokens = emb.tokenize(batch);
    torch::Tensor e = emb.encode_text(batch);
    for (size_t j = 0; j < batch.size(); ++j) {
      std::printf("{\"kind\": \"text\", \"index\": %zu", i + j);
      print_row(tokens.ids[j], "ids");
      print_row(tokens.mask[j], "mask");
      print_row(e[j], "embedding");
      std::puts("}");
    }
  }
  bool failed = false;
  mmembed::Encoded encoded = emb.encode_image(images);
  for (size_t i = 0; i < images.size(); ++i) {
    if (!encoded.ok(i)) {
      failed = true;
      std::printf("{\"kind\": \"image\", \"index\": %zu, \"error\": %s}\n", i, quote(encoded.errors[i]).c_str());
      continue;
    }
    torch::Tensor levels = emb.preprocess(images[i]).levels.contiguous();
    const auto* bytes = static_cast<const uint8_t*>(levels.data_ptr());
    const size_t size = static_cast<size_t>(levels.numel());
    if (!dump.empty()) {
      std::ofstream out(dump + "/" + std::to_string(i) + ".bin", std::ios::binary);
      out.write(reinterpret_cast<const char*>(bytes), static_cast<std::streamsize>(size));
      if (!out) throw mmembed::Error("cannot write pixels to --dump " + dump);
    }
    std::printf("{\"kind\": \"image\", \"index\": %zu, \"crc32\": \"%08x\"", i, crc32(bytes, size));
    print_row(encoded.embedding[static_cast<int64_t>(i)], "embedding");
    std::puts("}");
  }
  return failed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "mmembed_cli: %s\n", mmembed::reason(e).c_str());
    return 2;
  }
}
