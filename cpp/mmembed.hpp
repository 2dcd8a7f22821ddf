// mmembed: run an exported artifact from C++. Header only; needs libtorch (C++20) and, for artifacts that decode image
// files themselves, the library libtorchcodec_image.so of the Python package torchcodec.
//
//   mmembed::Embedder emb("model.pt");
//   torch::Tensor text = emb.encode_text({"a small red circle"});              // (1, D), unit length
//   mmembed::Encoded image = emb.encode_image({mmembed::Image::file("cat.jpg")});
//   if (!image.ok(0)) std::cerr << image.errors[0] << '\n';                    // one bad item harms no neighbour
//   torch::Tensor scores = emb.score(text, image);                             // (1, 1), NaN for an image that failed
//
//   mmembed::Embedder fast("model.pt2");                                       // compiled: the same calls, the same answers
//
//   mmembed::Embedder judge("pairs.pt");                                       // of a PairClassifier
//   mmembed::Scored match = judge.score_pairs({"a red circle"}, {mmembed::Image::file("cat.jpg")});  // (1, C), C labels
//
// An artifact is code: load only files that you trust.
#pragma once

#include <dlfcn.h>
#if defined(__GLIBC__) && defined(__LP64__)
#include <link.h>
#include <sys/mman.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <ATen/autocast_mode.h>
#include <caffe2/serialize/file_adapter.h>
#include <caffe2/serialize/in_memory_adapter.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

namespace mmembed {

inline constexpr int64_t kFormatVersion = 1;  // of the artifacts that this header reads

// Every error of this header; what() is one sentence.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The sentence inside a torch error: the last line of a TorchScript traceback that names an exception, else the first
// line; without the exception's type and the place in torchcodec's sources.
inline std::string reason(const std::exception& e) {
  static const std::regex type("^(builtins\\.)?\\w*(Error|Exception): "), place("^\\w+, /\\S+:\\d+, ");
  const auto* c10_error = dynamic_cast<const c10::Error*>(&e);
  std::istringstream lines(c10_error ? c10_error->what_without_backtrace() : e.what());
  std::string line, found;
  while (std::getline(lines, line)) {
    if (line.size() > 1000) line.resize(1000);  // std::regex recurses along the line
    const bool blank = line.find_first_not_of(" \t\r") == std::string::npos;
    if (!blank && (found.empty() || std::regex_search(line, type))) found = line;
  }
  return std::regex_replace(std::regex_replace(found, type, ""), place, "");
}

// Returns the content of a file; throws Error with the path where it cannot be read.
inline std::string read_file(const std::string& path) {
  if (std::filesystem::is_directory(path)) throw Error(path + ": " + std::strerror(EISDIR));
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Error(path + ": " + std::strerror(errno));
  std::ostringstream out;
  out << in.rdbuf();
  if (in.bad()) throw Error(path + ": " + std::strerror(errno ? errno : EIO));
  return out.str();
}

inline torch::Tensor as_bytes(const std::string& data) {  // uint8 (N,)
  torch::Tensor t = torch::empty({static_cast<int64_t>(data.size())}, torch::kUInt8);
  if (!data.empty()) std::memcpy(t.data_ptr(), data.data(), data.size());
  return t;
}

// Token ids, and 1 where an id is not padding.
struct Tokens {
  torch::Tensor ids, mask;  // int64 (B, L)
};

// The header of an image file, read without decoding it.
struct ImageInfo {
  std::string format;  // "jpeg", "png", "webp", "gif", "avif", "rgb" or "" when not recognised
  int64_t width, height, bits, channels, orientation, frames;
  std::string error;  // "" or why this file will not be decoded
};

// An image file's bytes, or decoded RGB uint8 (3, H, W), or the error that kept it from being read.
struct Image {
  torch::Tensor data;
  std::string error;

  static Image bytes(const std::string& data) { return {as_bytes(data), ""}; }
  static Image rgb(torch::Tensor pixels) { return {std::move(pixels), ""}; }
  static Image file(const std::string& path) {
    try {
      return bytes(read_file(path));
    } catch (const Error& e) {
      return {torch::Tensor(), e.what()};
    }
  }
};

// Embeddings of a batch of images. The row of an image that failed is zeros.
struct Encoded {
  torch::Tensor embedding;          // (B, D), float32 unless the artifact stores int8 or bits
  std::vector<std::string> errors;  // of each image; "" for success
  bool ok(size_t i) const { return errors.at(i).empty(); }
};

// Scores of a batch of pairs. The row of a pair whose image failed is NaN.
struct Scored {
  torch::Tensor scores;             // float32 (B, C), before softmax
  std::vector<std::string> errors;  // of each pair; "" for success
  bool ok(size_t i) const { return errors.at(i).empty(); }
};

// The most probable labels of every item, best first.
struct Labelled {
  std::vector<std::vector<std::string>> labels;  // of each item: those that reach their thresholds, at most K
  torch::Tensor index;                           // int64 (B, K): which label; -1 where none reaches its threshold
  torch::Tensor probability;                     // float32 (B, K); 0 where none reaches its threshold
};

// One image as its tower sees it, before normalisation.
struct Pixels {
  torch::Tensor levels;  // uint8 (3, S, S); undefined when error is not empty
  std::string error;
};

struct Options {
  torch::Device device = torch::kCPU;
  int threads = 0;            // for one operation; 0 leaves torch's own setting
  std::string torchcodec;     // libtorchcodec_image.so; empty searches as register_image_ops says
  int64_t batch_size = 64;    // rows that the towers see at once
  int decoders = 1;           // threads that decode the images of one call
  int64_t max_pixels = 0;     // of an image, from its header; the artifact's own limit where that is less, or for 0
  bool check = false;         // hold every record of the file to its CRC-32 before it is loaded
  std::string kernels;        // what multiplies in float32 on a CPU: "onednn", "torch", or "auto" for the quicker one; "": as $MMEMBED_KERNELS says, or "auto"
};

inline bool image_ops_registered(bool heic = false) {
  const char* name = heic ? "torchcodec_ns::decode_heic" : "torchcodec_ns::decode_jpeg";
  return c10::Dispatcher::singleton().findSchema({name, ""}).has_value();
}

// Loads a library that lies beside libtorch_cpu.so, if there is one: programs link no more of libtorch than they must.
inline bool load_beside(const char* library) {
  Dl_info here;
  if (!dladdr(reinterpret_cast<void*>(&at::get_num_threads), &here) || !here.dli_fname) return false;
  std::string folder(here.dli_fname);
  return dlopen((folder.substr(0, folder.rfind('/') + 1) + library).c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr;
}

// libjpeg and libpng print on stderr what they think of a file, whoever sent it, and torchcodec does not stop them. In the
// copies that torchcodec's wheel brings, and nowhere else, `stderr` becomes a stream that leads nowhere. Why a file cannot be
// decoded stands in the error of its item.
inline void silence_decoders() {
#if defined(__GLIBC__) && defined(__LP64__)
  static std::FILE** const nowhere = new std::FILE*(std::fopen("/dev/null", "w"));
  if (!*nowhere) return;
  dl_iterate_phdr([](dl_phdr_info* library, size_t, void*) {
    if (!std::strstr(library->dlpi_name, "torchcodec.libs/")) return 0;
    const char* base = reinterpret_cast<const char*>(library->dlpi_addr);
    const ElfW(Dyn)* entry = nullptr;
    const char *fixed = nullptr, *fixed_end = nullptr;  // what the loader made read-only
    for (size_t i = 0; i < library->dlpi_phnum; ++i) {
      const auto& part = library->dlpi_phdr[i];
      if (part.p_type == PT_DYNAMIC) entry = reinterpret_cast<const ElfW(Dyn)*>(base + part.p_vaddr);
      if (part.p_type == PT_GNU_RELRO) fixed = base + part.p_vaddr, fixed_end = fixed + part.p_memsz;
    }
    const ElfW(Rela)* places = nullptr;
    const ElfW(Sym)* symbols = nullptr;
    const char* names = nullptr;
    size_t bytes = 0;
    for (; entry && entry->d_tag != DT_NULL; ++entry) {
      if (entry->d_tag == DT_RELA) places = reinterpret_cast<const ElfW(Rela)*>(entry->d_un.d_ptr);
      else if (entry->d_tag == DT_RELASZ) bytes = entry->d_un.d_val;
      else if (entry->d_tag == DT_SYMTAB) symbols = reinterpret_cast<const ElfW(Sym)*>(entry->d_un.d_ptr);
      else if (entry->d_tag == DT_STRTAB) names = reinterpret_cast<const char*>(entry->d_un.d_ptr);
    }
    if (!places || !symbols || !names) return 0;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (size_t i = 0; i < bytes / sizeof(ElfW(Rela)); ++i) {
      if (std::strcmp(names + symbols[ELF64_R_SYM(places[i].r_info)].st_name, "stderr")) continue;
      char* slot = const_cast<char*>(base) + places[i].r_offset;
      char* start = slot - reinterpret_cast<uintptr_t>(slot) % page;
      if (mprotect(start, page, PROT_READ | PROT_WRITE)) continue;
      *reinterpret_cast<std::FILE***>(slot) = nowhere;
      if (slot >= fixed && slot < fixed_end) mprotect(start, page, PROT_READ);
    }
    return 0;
  }, nullptr);
#endif
}

// Beside a libtorch without CUDA, what torchcodec's wheel of PyPI links and never calls on the CPU: libraries of the same names in
// $MMEMBED_CUDA_STAND_INS, or where the build made them (cmake/mmembedLibtorch.cmake).
inline void load_cuda_stand_ins() {
  std::string folder;
#ifdef MMEMBED_CUDA_STAND_INS
  folder = MMEMBED_CUDA_STAND_INS;
#endif
  if (const char* env = std::getenv("MMEMBED_CUDA_STAND_INS"); env && *env) folder = env;
  std::error_code none;
  if (folder.empty()) return;
  for (const auto& file : std::filesystem::directory_iterator(folder, none))
    if (file.is_regular_file(none)) dlopen(file.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
}

// Registers torchcodec's image operators. Tried in turn: `path`, $MMEMBED_TORCHCODEC, the file found when this program
// was built, the loader's own search path. The operator for HEIC lies in a library beside it, which wants libheif.
inline void register_image_ops(const std::string& path = "", bool heic = false) {
  if (image_ops_registered(heic)) return;
  if (!load_beside("libtorch_cuda.so")) load_cuda_stand_ins();  // the library of the CUDA wheels wants both
  load_beside("libtorch.so");
  std::vector<std::string> tries;
  const char* env = std::getenv("MMEMBED_TORCHCODEC");
  if (!path.empty()) {
    tries = {path};
  } else if (env && *env) {
    tries = {env};
  } else {
#ifdef MMEMBED_TORCHCODEC_IMAGE
    tries.push_back(MMEMBED_TORCHCODEC_IMAGE);
#endif
    tries.push_back("libtorchcodec_image.so");
  }
  std::string why;
  for (auto file : tries) {
    const size_t at = file.rfind("_image");
    if (heic && at != std::string::npos) file.replace(at, 6, "_heic");
    if (dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL) && image_ops_registered(heic)) return silence_decoders();
    const char* message = dlerror();
    if (why.empty()) why = message ? message : file + " registers no image operators";
  }
  if (heic) throw Error("this artifact decodes HEIC and needs libheif: apt install libheif1 (" + why + ")");
  if (std::regex_search(why, std::regex("lib(nvrtc|cudart|c10_cuda|torch_cuda)\\.so")))
    throw Error("this artifact decodes image files, and this torchcodec links CUDA, which this libtorch is without: build with "
                "mmembed's CMake files, which make stand-ins, and give them TORCHCODEC_IMAGE; or take a torchcodec without CUDA, "
                "or export with decode=False (" + why + ")");
  throw Error("this artifact decodes image files and needs torchcodec's image operators: set MMEMBED_TORCHCODEC to "
              "libtorchcodec_image.so (in the Python package torchcodec), or export with decode=False (" + why + ")");
}

// CRC-32 as zip archives have it, eight bytes at a time.
inline uint32_t crc32(const uint8_t* data, size_t size, uint32_t before = 0) {
  static const auto table = [] {
    std::array<std::array<uint32_t, 256>, 8> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      t[0][i] = c;
    }
    for (size_t k = 1; k < 8; ++k)
      for (size_t i = 0; i < 256; ++i) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 0xFF];
    return t;
  }();
  uint32_t c = ~before;
  for (; size >= 8; data += 8, size -= 8) {
    c ^= static_cast<uint32_t>(data[0]) | static_cast<uint32_t>(data[1]) << 8 | static_cast<uint32_t>(data[2]) << 16 | static_cast<uint32_t>(data[3]) << 24;
    c = table[7][c & 0xFF] ^ table[6][c >> 8 & 0xFF] ^ table[5][c >> 16 & 0xFF] ^ table[4][c >> 24] ^ table[3][data[4]] ^
        table[2][data[5]] ^ table[1][data[6]] ^ table[0][data[7]];
  }
  for (; size; ++data, --size) c = c >> 8 ^ table[0][(c ^ *data) & 0xFF];
  return ~c;
}

// An artifact as a file, or as bytes in memory.
class Archive {
 public:
  explicit Archive(const std::string& path) : name_(path), path_(path) {
    if (std::filesystem::is_directory(path)) throw Error(path + " is not an mmembed artifact: it is a folder");
    { std::ifstream in(path, std::ios::binary); if (!in) throw Error(path + ": " + std::strerror(errno)); }
    in_ = std::make_shared<caffe2::serialize::FileAdapter>(path);
  }
  explicit Archive(std::string_view content)
      : name_("the artifact in memory"), content_(content),
        in_(std::make_shared<caffe2::serialize::MemoryReadAdapter>(content.data(), static_cast<off_t>(content.size()))) {}

  const std::string& name() const { return name_; }
  const std::shared_ptr<caffe2::serialize::ReadAdapterInterface>& in() const { return in_; }

  // f(path): of the file itself, or of one that is written for the call.
  template <class F>
  auto with_path(F f) const {
    if (!path_.empty()) return f(path_);
    struct Temporary {
      std::string path = (std::filesystem::temp_directory_path() / "mmembed-XXXXXX.pt2").string();
      int file = mkstemps(path.data(), 4);
      ~Temporary() { if (file >= 0) close(file), unlink(path.c_str()); }
    } made;
    for (size_t done = 0; done < content_.size() || made.file < 0;) {
      const ssize_t n = made.file < 0 ? -1 : write(made.file, content_.data() + done, content_.size() - done);
      if (n < 0) throw Error(made.path + ": " + std::strerror(errno));
      done += static_cast<size_t>(n);
    }
    return f(made.path);
  }

  // Returns the identity card, JSON.
  std::string card() const {
    std::string found;
    try {
      caffe2::serialize::PyTorchStreamReader archive(in_);
      if (archive.hasRecord("extra/card.json")) {
        auto [data, size] = archive.getRecord("extra/card.json");
        found = std::string(static_cast<const char*>(data.get()), size);
      }
    } catch (const std::exception&) {
      throw Error(name_ + " is not an mmembed artifact, or is truncated: it is no complete zip archive");
    }
    if (found.empty()) throw Error(name_ + " is not an mmembed artifact: it holds no identity card");
    return found;
  }

  // The first record that is not what its CRC-32 says, "" for none; torch does not look at it.
  std::string damaged() const {
    const uint64_t size = in_->size();
    std::string tail = bytes(size - std::min<uint64_t>(size, 65557), std::min<uint64_t>(size, 65557));
    const size_t end = tail.rfind("PK\5\6");
    if (end == std::string::npos || tail.size() - end < 22) return "the directory";
    uint64_t count = number(tail, end + 10, 2), at = number(tail, end + 16, 4), length = number(tail, end + 12, 4);
    if (count == 0xFFFF || at == 0xFFFFFFFF || length == 0xFFFFFFFF) {
      if (end < 20 || tail.compare(end - 20, 4, "PK\6\7")) return "the directory";
      const std::string wide = bytes(number(tail, end - 12, 8), 56);
      if (wide.compare(0, 4, "PK\6\6")) return "the directory";
      count = number(wide, 32, 8), length = number(wide, 40, 8), at = number(wide, 48, 8);
    }
    if (at > size || length > size - at) return "the directory";
    const std::string all = bytes(at, length);
    for (size_t i = 0; count; --count) {
      if (all.size() < i + 46 || all.compare(i, 4, "PK\1\2")) return "the directory";
      const uint64_t method = number(all, i + 10, 2), crc = number(all, i + 16, 4), named = number(all, i + 28, 2), extra = number(all, i + 30, 2);
      uint64_t stored = number(all, i + 20, 4), whole = number(all, i + 24, 4), place = number(all, i + 42, 4);
      if (all.size() < i + 46 + named + extra) return "the directory";
      const std::string full = all.substr(i + 46, named), name = full.substr(full.find('/') + 1);
      for (size_t x = i + 46 + named; x + 4 <= i + 46 + named + extra; x += 4 + number(all, x + 2, 2)) {
        if (number(all, x, 2) != 1) continue;  // sizes of eight bytes
        size_t y = x + 4;
        for (uint64_t* value : {&whole, &stored, &place})
          if (*value == 0xFFFFFFFF && y + 8 <= all.size()) *value = number(all, y, 8), y += 8;
      }
      const std::string head = bytes(place, 30);
      if (head.compare(0, 4, "PK\3\4")) return name;
      uint64_t from = place + 30 + number(head, 26, 2) + number(head, 28, 2);
      uint32_t sum = 0;
      if (method) {
        caffe2::serialize::PyTorchStreamReader archive(in_);
        try {
          auto [data, n] = archive.getRecord(name);
          sum = crc32(static_cast<const uint8_t*>(data.get()), n);
        } catch (const std::exception&) {
          return name;
        }
      } else {
        for (uint64_t left = stored; left;) {
          const std::string part = bytes(from, std::min<uint64_t>(left, 1 << 20));
          sum = crc32(reinterpret_cast<const uint8_t*>(part.data()), part.size(), sum);
          from += part.size(), left -= part.size();
        }
      }
      if (sum != crc) return name;
      i += 46 + named + extra + number(all, i + 32, 2);
    }
    return "";
  }

 private:
  std::string bytes(uint64_t at, uint64_t n) const {
    std::string out(n, '\0');
    if (n && in_->read(at, out.data(), n, "archive") != n) throw Error(name_ + " is damaged: it ends within a record");
    return out;
  }

  static uint64_t number(const std::string& x, size_t at, size_t width) {
    uint64_t out = 0;
    for (size_t i = width; i--;) out = out << 8 | static_cast<uint8_t>(x.at(at + i));
    return out;
  }

  std::string name_, path_;
  std::string_view content_;
  std::shared_ptr<caffe2::serialize::ReadAdapterInterface> in_;
};

// The identity card (JSON) of an artifact, read without loading the model.
inline std::string read_card(const std::string& path) { return Archive(path).card(); }

// A string or literal field on the top level of the card, "" when absent. The card is flat where hosts need it.
inline std::string card_field(const std::string& card, const std::string& key) {
  std::smatch m;
  if (std::regex_search(card, m, std::regex("\"" + key + "\": ?(\"([^\"]*)\"|[^,}\\s]+)")))
    return m[2].matched ? m[2] : m[1];
  return "";
}

// f(0) ... f(n - 1) in `threads` threads; the first exception comes out.
template <class F>
void in_threads(size_t n, int threads, F f) {
  const size_t workers = std::min(n, static_cast<size_t>(std::max(threads, 1)));
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  auto work = [&] {
    try {
      for (size_t i; (i = next.fetch_add(1)) < n;) f(i);
    } catch (...) {
      if (!failed.test_and_set()) failure = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  try {
    for (size_t i = 1; i < workers; ++i) pool.emplace_back(work);
  } catch (const std::system_error&) {  // the system gives no more threads: those that there are do the work
  }
  work();
  for (auto& t : pool) t.join();
  if (failure) std::rethrow_exception(failure);
}

// Whether this processor has the instructions for "bf16", "fp16" or "int8" (by torch._int_mm), and torch's oneDNN uses them; true where that is not known.
inline bool multiplies(const std::string& precision) {
#if defined(__x86_64__)
  if (precision != "bf16" && precision != "fp16" && precision != "int8") return true;
  const auto found = at::cpu::get_cpu_capabilities();
  auto has = [&](const std::string& name) {
    const auto at = found.find(name);
    return at != found.end() && at->second.isBool() && at->second.toBool();
  };
  const bool int8 = precision == "int8";
  if (!at::hasMKLDNN() || (int8 ? !has("avx512_vnni") : !has("avx512_" + precision) && !has("amx_" + precision))) return false;
  const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_" + (int8 ? "bf16" : precision) + "_supported", ""});
  return op && op->typed<bool()>().call();
#else
  return precision != "int8" || at::hasMKLDNN();
#endif
}

// What `export(model, "model.pt2")` wrote: tokenizer and towers compiled by AOTInductor, and the rest of the artifact as
// TorchScript. call() answers as the methods of a TorchScript artifact do.
class Package {
 public:
  static constexpr const char* kRest = "mmembed/rest.pt";

  static bool is(const Archive& file) { return caffe2::serialize::PyTorchStreamReader(file.in()).hasRecord(kRest); }

  // What the programs multiply in: "fp32", "bf16" or "fp16".
  static std::string multiplied(const std::string& card) {
    const std::string made = card_field(card.substr(card.find("\"compiled\"")), "multiplies"), precision = card_field(card, "precision");
    return !made.empty() ? made : precision.empty() ? "fp32" : precision;  // packages of before name the precision alone
  }

  Package(const Archive& file, const std::string& card, size_t runners = 2) {
    const std::string made = card_field(card.substr(card.find("\"compiled\"")), "cpu"), here = at::get_cpu_capability();
    const std::map<std::string, int> level = {{"DEFAULT", 0}, {"AVX2", 1}, {"AVX512", 2}};
    if (level.count(made) && (!level.count(here) || level.at(here) < level.at(made)))
      throw Error(file.name() + " was compiled for " + made + ", this processor has " + here + ": export it here, or with cpu='" + here + "'");
    if (const std::string kind = multiplied(card); !multiplies(kind))
      throw Error(file.name() + " was compiled to multiply in " + kind + ", which this processor (" + here +
                  ") would emulate: export it here, or take the .pt, which computes in fp32 here");
    load_beside("libtorch_cuda.so");  // the programs name libtorch.so as what they need
    load_beside("libtorch.so");
    caffe2::serialize::PyTorchStreamReader archive(file.in());
    auto [data, size] = archive.getRecord(kRest);
    std::istringstream in(std::string(static_cast<const char*>(data.get()), size));
    rest_ = torch::jit::load(in, torch::kCPU);
    plain_ = rest_.attr("before_text").toModule().type()->name()->name() == "SameTexts";  // no step of the user's before the tokenizer
    file.with_path([&](const std::string& path) {
      for (const char* name : {"tokenize", "text", "image", "pair"}) {
        const std::string folder = std::string("data/aotinductor/") + name + "/";
        for (const auto& record : archive.getAllRecords())
          if (record.rfind(folder, 0) == 0 && !programs_.count(name))
            programs_[name] = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path, name, false, runners);
      }
      return true;
    });
  }

  const torch::jit::Module& rest() const { return rest_; }

  c10::IValue call(const std::string& method, std::vector<c10::IValue> inputs) const {
    auto rest = [&](const std::string& name, std::vector<c10::IValue> x) { return rest_.get_method(name)(std::move(x)); };
    if (method == "encode_pixels" && inputs[0].toTensor().size(0) > 0) return run("image", {inputs[0].toTensor()})[0];
    const bool pairs = method == "score_pairs" && inputs[2].toTensor().size(0) > 0;
    if (!pairs && method != "tokenize" && method != "encode_text_bytes") return rest(method, std::move(inputs));
    std::vector<torch::Tensor> x = {inputs[0].toTensor(), inputs[1].toTensor()};  // as pack() makes them
    if (x[1].size(0) == 1) return rest(method, std::move(inputs));                // no texts
    if (!plain_) {
      auto after = rest("tokenize", {x[0], x[1]}).toTuple();
      x = {after->elements()[0].toTensor(), after->elements()[1].toTensor()};
    }
    x = run("tokenize", x);
    if (method == "tokenize") return c10::ivalue::Tuple::create({x[0], x[1]});
    if (pairs) x.push_back(inputs[2].toTensor());
    return run(pairs ? "pair" : "text", x)[0];
  }

 private:
  std::vector<torch::Tensor> run(const std::string& program, std::vector<torch::Tensor> inputs) const {
    for (auto& x : inputs) x = x.contiguous();
    return programs_.at(program)->run(inputs);
  }

  torch::jit::Module rest_;
  bool plain_ = true;
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> programs_;
};

// While it lives, a program's own autocast is off in this thread: an artifact computes in the types that it was exported with.
struct AutocastOff {
  const bool cpu = at::autocast::is_autocast_enabled(at::kCPU), cuda = at::autocast::is_autocast_enabled(at::kCUDA);
  AutocastOff() { set(false, false); }
  ~AutocastOff() { set(cpu, cuda); }
  AutocastOff(const AutocastOff&) = delete;
  AutocastOff& operator=(const AutocastOff&) = delete;

 private:
  void set(bool on_cpu, bool on_cuda) const {
    if (cpu) at::autocast::set_autocast_enabled(at::kCPU, on_cpu);
    if (cuda) at::autocast::set_autocast_enabled(at::kCUDA, on_cuda);
  }
};

// The tower computes in float32 from now on: its weights, and what tracing wrote down of their type. Not after its first call.
inline void widen(torch::jit::Module tower) {
  const auto half = [](at::ScalarType t) { return t == torch::kHalf || t == torch::kBFloat16; };
  tower.to(torch::kFloat);
  std::function<void(torch::jit::Graph&, torch::jit::Block*)> visit = [&](torch::jit::Graph& graph, torch::jit::Block* block) {
    for (torch::jit::Node* node : block->nodes()) {
      for (torch::jit::Block* inner : node->blocks()) visit(graph, inner);
      if (node->kind() == torch::jit::prim::Constant && node->output()->type()->isSubtypeOf(*c10::TensorType::get())) {
        const auto value = torch::jit::toIValue(node->output());
        if (value && value->isTensor() && half(value->toTensor().scalar_type()))
          node->t_(torch::jit::attr::value, value->toTensor().to(torch::kFloat));
      }
      const auto* schema = node->maybeSchema();
      for (size_t i = 0; schema && i < node->inputs().size() && i < schema->arguments().size(); ++i) {
        const auto value = torch::jit::toIValue(node->input(i));
        if (schema->arguments()[i].name() != "dtype" || !value || !value->isInt() || !half(static_cast<at::ScalarType>(value->toInt()))) continue;
        torch::jit::WithInsertPoint here(node);
        node->replaceInput(i, graph.insertConstant(static_cast<int64_t>(torch::kFloat)));
      }
    }
  };
  for (torch::jit::Module part : tower.modules()) {
    if (part.hasattr("dtype") && part.attr("dtype").isInt()) part.setattr("dtype", static_cast<int64_t>(torch::kFloat));
    for (const auto& method : part.get_methods()) visit(*method.graph(), method.graph()->block());
  }
}

// Which kernel is quick on this processor, as mmembed/runtime/processor.py has it: timed once, and kept in the same file as Python's.
class Kernels {
 public:
  // "onednn" or "torch", for the linear layers of an exported tower; `fixed`: without timing.
  static std::string chosen(std::string kernels, bool fixed) {
    const char* env = std::getenv("MMEMBED_KERNELS");
    const std::string source = kernels.empty() && env && *env ? "MMEMBED_KERNELS" : "kernels";
    if (kernels.empty()) kernels = env && *env ? env : "auto";
    if (kernels != "auto" && kernels != "onednn" && kernels != "torch")
      throw Error(source + " must be one of auto, onednn, torch, got '" + kernels + "'");
    if (!at::hasMKLDNN()) return "torch";
    if (kernels != "auto" || fixed) return kernels == "auto" ? "onednn" : kernels;
    static std::mutex once;
    static std::map<std::string, std::string> known;
    const std::lock_guard<std::mutex> lock(once);
    const std::string folder_name = folder(), name = described();
    std::string& choice = known[folder_name + "/" + name];
    if (!choice.empty()) return choice;
    const std::string file = folder_name + "/" + name + ".json";
    if (!folder_name.empty()) choice = kept(file);
    if (!choice.empty()) return choice;
    const auto [onednn, own] = timed();
    choice = own < 0.95 * onednn ? "torch" : "onednn";
    if (!folder_name.empty()) choice = keep(folder_name, file, choice, onednn, own);
    return choice;
  }

  // The processor, its instruction sets, torch's version and its threads, in characters that a file's name may have.
  static std::string described() {
    const auto found = at::cpu::get_cpu_capabilities();
    std::vector<std::string> flags;
    std::string name = "processor";
    for (const auto& [key, value] : found) {
      if (value.isBool() && value.toBool()) flags.push_back(key);
      if (key == "cpu_name" && value.isString() && !value.toStringRef().empty()) name = value.toStringRef();
    }
    std::sort(flags.begin(), flags.end());
    for (const char* limit : {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"}) {
      const char* value = std::getenv(limit);
      flags.push_back(value ? value : "");
    }
    std::string all;
    for (size_t i = 0; i < flags.size(); ++i) all += (i ? "," : "") + flags[i];
    char sum[16];
    std::snprintf(sum, sizeof sum, "%08x", crc32(reinterpret_cast<const uint8_t*>(all.data()), all.size()));
    std::ostringstream whole;
    whole << name << ' ' << at::get_cpu_capability() << ' ' << sum << " torch " << TORCH_VERSION_MAJOR << '.' << TORCH_VERSION_MINOR << '.' << TORCH_VERSION_PATCH
          << " threads " << at::get_num_threads();
    return std::regex_replace(whole.str(), std::regex("[^A-Za-z0-9.]+"), "-");
  }

 private:
  static std::string folder() {  // "" for no such place
    const char *base = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
    const std::string place = base && *base ? base : home && *home ? std::string(home) + "/.cache" : "";
    return place.empty() || place[0] != '/' ? "" : place + "/mmembed/kernels";
  }

  static std::string kept(const std::string& file) {  // "" for none, or a damaged one
    try {
      const std::string found = card_field(read_file(file), "linear");
      return found == "onednn" || found == "torch" ? found : "";
    } catch (const std::exception&) {
      return "";
    }
  }

  // The choice that is in the file now: the first one stays. A place that cannot be written does no harm.
  static std::string keep(const std::string& folder, const std::string& file, const std::string& choice, double onednn, double own) {
    std::error_code none;
    std::filesystem::create_directories(folder, none);
    std::string draft = folder + "/XXXXXX.draft";
    const int handle = mkstemps(draft.data(), 6);
    if (handle < 0) return choice;
    char text[160];
    const int length = std::snprintf(text, sizeof text, "{\"linear\": \"%s\", \"ms\": {\"onednn\": %.3f, \"torch\": %.3f}}\n", choice.c_str(), 1e3 * onednn, 1e3 * own);
    const bool written = write(handle, text, static_cast<size_t>(length)) == length;
    close(handle);
    std::string now = choice;
    if (written && link(draft.c_str(), file.c_str()) && errno == EEXIST) {
      now = kept(file);
      if (now.empty() && !std::rename(draft.c_str(), file.c_str())) return choice;  // it was damaged
      if (now.empty()) now = choice;
    }
    unlink(draft.c_str());
    return now;
  }

  // Seconds of a linear layer of 768 to 1,536 on 256 rows, with oneDNN and with torch's own product: the shortest of turns of 50 ms.
  static std::pair<double, double> timed() {
    const torch::NoGradGuard no_grad;
    const torch::Tensor x = torch::rand({256, 768}) - .5, weight = torch::rand({1536, 768}) - .5, bias = torch::rand({1536}) - .5;
    const auto call = [](const char* name, std::vector<c10::IValue> stack) {
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
      return stack[0].toTensor();
    };
    const torch::Tensor packed = call("mkldnn::_reorder_linear_weight", {weight, c10::IValue(int64_t{64})});
    const c10::List<std::optional<at::Scalar>> nothing;
    const std::array<std::function<void()>, 2> ways = {
        [&] { call("mkldnn::_linear_pointwise", {x, packed, bias, "gelu", nothing, "none"}); },
        [&] { torch::gelu(torch::linear(x, weight, bias)); }};
    const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
    std::array<double, 2> best = {1e9, 1e9};
    const double end = now() + .05;
    for (int turn = 0; turn < 100 && (turn < 2 || now() < end); ++turn)
      for (size_t i = 0; i < ways.size(); ++i) {
        const double start = now();
        ways[i]();
        if (turn) best[i] = std::min(best[i], now() - start);  // the first call makes the kernel
      }
    return {best[0], best[1]};
  }
};

// A loaded artifact, scripted or compiled. Calls are const and may come from several threads; what they return lies on the CPU.
class Embedder {
 public:
  explicit Embedder(const std::string& path, Options options = {}) : Embedder(Archive(path), std::move(options)) {}

  // Of an artifact's content, which is not needed any more afterwards.
  static Embedder from_memory(std::string_view content, Options options = {}) { return Embedder(Archive(content), std::move(options)); }

  Embedder(const Archive& file, Options options) : options_(std::move(options)), card_(file.card()) {
    const std::string& path = file.name();
    auto at_least = [](const char* name, int64_t value, int64_t least) {
      if (value >= least) return;
      throw Error(std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
    };
    at_least("batch_size", options_.batch_size, 1);
    at_least("decoders", options_.decoders, 1);
    at_least("threads", options_.threads, 0);
    at_least("max_pixels", options_.max_pixels, 0);
    Kernels::chosen(options_.kernels, true);  // a wrong word is refused before anything is loaded
    if (card_field(card_, "format") != "mmembed") throw Error(path + " is not an mmembed artifact: its card is not an mmembed card");
    if (const std::string v = card_field(card_, "format_version"); std::atoll(v.c_str()) > kFormatVersion)
      throw Error(path + " has format " + v + "; this header reads up to " + std::to_string(kFormatVersion) + ": take a newer mmembed.hpp");
    if (card_field(card_, "decode") == "true") {
      register_image_ops(options_.torchcodec);
      if (card_field(card_, "heic") == "true") register_image_ops(options_.torchcodec, true);
    }
    if (options_.device.is_meta()) throw Error("device must be cpu, cuda, cuda:1 or the like, got meta");
    if (options_.device.is_cuda()) {
      load_beside("libtorch_cuda.so");
      if (!at::hasCUDA()) throw Error("device " + options_.device.str() + ": libtorch sees no CUDA device here");
    }
    if (options_.threads > 0) at::set_num_threads(options_.threads);
    torch::jit::getProfilingMode() = false;  // its recompilations make the first calls slow
    if (options_.check)
      if (const std::string bad = file.damaged(); !bad.empty())
        throw Error(path + " is damaged: " + bad + " is not as it was written; copy it anew, or export it again");
    const bool compiled = Package::is(file);
    if (compiled && !options_.device.is_cpu())
      throw Error(path + " was compiled for the CPU, not for " + options_.device.str() + ": load the TorchScript artifact there");
    try {
      if (compiled) package_ = std::make_shared<Package>(file, card_);
      module_ = compiled ? package_->rest() : torch::jit::load(file.in(), options_.device);
    } catch (const Error&) {
      throw;
    } catch (const std::exception& e) {
      const bool lacks = std::string(e.what()).find("builtin op: mkldnn") != std::string::npos;
      throw Error(path + " cannot be loaded: " + (lacks ? "its towers call oneDNN, which this torch lacks; export it with portable=True" : reason(e)));
    }
    module_.eval();
    if (const std::string precision = card_field(card_, "precision"); options_.device.is_cpu() && !compiled && !multiplies(precision)) {
      auto net = module_.attr("model").toModule().attr("net").toModule();
      for (const char* name : {"text", "image"}) widen(net.attr(name).toModule());
    }
    if (options_.device.is_cpu() && !compiled && card_field(card_, "portable") == "true" && !multiplies("int8"))
      for (const auto& layer : module_.modules())
        if (layer.find_method("widen")) layer.get_method("widen")(std::vector<torch::jit::IValue>{});
    if (options_.device.is_cpu() && at::hasMKLDNN()) settle(compiled);
    computes_ = line(compiled);
    dim_ = module_.attr("dim").toInt();
    if (module_.find_method("labels"))
      for (const auto& label : call("labels", {}).toListRef()) labels_.push_back(label.toStringRef());
    pairs_ = module_.find_method("score_pairs").has_value();
    if (!pairs_) type_ = call("encode_text_bytes", empty_text()).toTensor().scalar_type();
  }

  const std::string& card() const { return card_; }
  std::string short_hash() const { return card_field(card_, "short_hash"); }
  int64_t dim() const { return dim_; }                                // width of an embedding, or number of labels
  bool pairs() const { return pairs_; }                               // whether the artifact scores pairs instead of embedding
  const std::vector<std::string>& labels() const { return labels_; }  // class names; empty for an artifact without labels
  const Options& options() const { return options_; }
  const std::string& computes() const { return computes_; }           // the arithmetic of the towers on this processor, in a line

  Tokens tokenize(const std::vector<std::string>& texts) const {
    torch::NoGradGuard no_grad;
    auto [data, offsets] = pack(texts.begin(), texts.end());
    auto fields = call("tokenize", {data, offsets}).toTuple();
    return {fields->elements()[0].toTensor().to(torch::kCPU), fields->elements()[1].toTensor().to(torch::kCPU)};
  }

  // Runs made-up items in batches of each size, so that the first real calls are not slow.
  void warmup(const std::vector<int64_t>& sizes = {1}) const {
    for (int64_t n : sizes) {
      if (n < 1) throw Error("sizes must be at least 1, got " + std::to_string(n));
      const std::vector<std::string> texts(static_cast<size_t>(n), "a photo of a small red circle");
      const std::vector<Image> images(static_cast<size_t>(n), Image::rgb(torch::zeros({3, 8, 8}, torch::kUInt8)));
      for (int i = 0; i < 2; ++i) {
        if (pairs_) score_pairs(texts, images);
        else encode_text(texts), encode_image(images);
      }
    }
  }

  // Embeds texts, UTF-8, to (B, D). Bytes that are not valid UTF-8 become U+FFFD.
  torch::Tensor encode_text(const std::vector<std::string>& texts) const {
    embeds("encode_text");
    torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> rows;
    const size_t step = static_cast<size_t>(options_.batch_size);
    for (size_t i = 0; i < texts.size() || rows.empty(); i += step) {
      auto [data, offsets] = pack(texts.begin() + i, texts.begin() + std::min(i + step, texts.size()));
      rows.push_back(call("encode_text_bytes", {data, offsets}).toTensor());
    }
    return (rows.size() == 1 ? rows[0] : torch::cat(rows)).to(torch::kCPU);
  }

  ImageInfo probe(const Image& image) const {
    if (const std::string error = unusable(image); !error.empty()) return {"", 0, 0, 0, 0, 1, 1, error};
    auto f = call("probe", {here(image)}).toTuple()->elements();
    return {f[0].toStringRef(), f[1].toInt(), f[2].toInt(), f[3].toInt(), f[4].toInt(),
            f[5].toInt(), f[6].toInt(), f[7].toStringRef()};
  }

  // Decodes and resizes one image to uint8 (3, S, S). Never throws for a bad image: it gets an error.
  Pixels preprocess(const Image& image) const {
    torch::NoGradGuard no_grad;
    if (const std::string error = unusable(image); !error.empty()) return {torch::Tensor(), error};
    if (const std::string error = too_large(image); !error.empty()) return {torch::Tensor(), error};
    try {
      return {call("preprocess_image", {here(image)}).toTensor(), ""};
    } catch (const Error& e) {
      return {torch::Tensor(), e.what()};
    }
  }

  // Decodes and resizes images in options().decoders threads.
  std::vector<Pixels> preprocess(const std::vector<Image>& images) const {
    std::vector<Pixels> out(images.size());
    in_threads(images.size(), options_.decoders, [&](size_t i) { out[i] = preprocess(images[i]); });
    return out;
  }

  // Embeds images to (B, D). Never throws for a bad image: its row is zeros, and its error gives the reason.
  Encoded encode_image(const std::vector<Image>& images) const {
    embeds("encode_image");
    torch::NoGradGuard no_grad;
    Encoded out{torch::zeros({static_cast<int64_t>(images.size()), dim_}, type_), std::vector<std::string>(images.size())};
    each_batch(images, out.errors, [&](const std::vector<int64_t>& rows, const torch::Tensor& levels) {
      torch::Tensor e = call("encode_pixels", {levels}).toTensor();
      out.embedding.index_copy_(0, torch::tensor(rows), e.to(torch::kCPU));
    });
    return out;
  }

  // Scores text i with image i, for each of labels(). Never throws for a bad image: its pair is NaN.
  Scored score_pairs(const std::vector<std::string>& texts, const std::vector<Image>& images) const {
    if (!pairs_) throw Error("this artifact embeds: call score(text, image) with embeddings; score_pairs is for a PairClassifier's");
    if (texts.size() != images.size())
      throw Error(std::to_string(texts.size()) + " texts and " + std::to_string(images.size()) + " images are not pairs");
    torch::NoGradGuard no_grad;
    Scored out{torch::full({static_cast<int64_t>(texts.size()), dim_}, std::nan("")), std::vector<std::string>(texts.size())};
    each_batch(images, out.errors, [&](const std::vector<int64_t>& rows, const torch::Tensor& levels) {
      std::vector<std::string> batch;
      for (int64_t r : rows) batch.push_back(texts[static_cast<size_t>(r)]);
      auto [data, offsets] = pack(batch.begin(), batch.end());
      out.scores.index_copy_(0, torch::tensor(rows), call("score_pairs", {data, offsets, levels}).toTensor().to(torch::kCPU));
    });
    return out;
  }

  // An older name of score_pairs.
  [[deprecated("Embedder::scores is now called score_pairs")]]
  Scored scores(const std::vector<std::string>& texts, const std::vector<Image>& images) const { return score_pairs(texts, images); }

  // Names the best labels for scores (B, C) of pairs, or for embeddings (B, D) where the artifact was exported with labels: at most
  // top_k, 0 for the artifact's own number. A row of zeros or NaN, of an item that failed, has none.
  Labelled classify(const torch::Tensor& rows, int64_t top_k = 0) const {
    if (labels_.empty()) throw Error("this artifact has no labels: export it with labels=");
    torch::NoGradGuard no_grad;
    if (top_k < 0) throw Error("top_k must be 0 or more, got " + std::to_string(top_k));
    auto f = call(pairs_ ? "classify_scores" : "classify_embedding", {fitting(rows, "rows", "B"), top_k}).toTuple()->elements();
    const torch::Tensor bad = pairs_ ? rows.isnan().any(1).cpu() : failed(rows), without = bad.unsqueeze(1);
    Labelled out{{}, f[1].toTensor().to(torch::kCPU).masked_fill(without, -1), f[2].toTensor().to(torch::kCPU).masked_fill(without, 0)};
    for (const auto& row : f[0].toListRef()) {
      const bool skip = bad[static_cast<int64_t>(out.labels.size())].item<bool>();
      out.labels.emplace_back();
      if (skip) continue;
      for (const auto& label : row.toListRef()) out.labels.back().push_back(label.toStringRef());
    }
    return out;
  }

  // Scores every text embedding (T, D) with every image embedding (I, D): float32 (T, I). A row of zeros, of an item that failed, scores
  // NaN; a binary embedding may be all zeros, so pass the Encoded of encode_image there.
  torch::Tensor score(const torch::Tensor& text, const torch::Tensor& image) const {
    embeds("score");
    torch::NoGradGuard no_grad;
    torch::Tensor out = call("score", {fitting(text, "text", "T"), fitting(image, "image", "I")}).toTensor().to(torch::kCPU);
    return out.masked_fill(failed(text).unsqueeze(1).logical_or(failed(image)), std::nan(""));
  }

  // Scores text embeddings (T, D) with the result of encode_image; an image that failed scores NaN.
  torch::Tensor score(const torch::Tensor& text, const Encoded& image) const {
    return score(text, image.embedding).masked_fill(failed(image), std::nan(""));
  }

 private:
  template <class It>
  static std::pair<torch::Tensor, torch::Tensor> pack(It begin, It end) {
    std::string all;
    std::vector<int64_t> offsets = {0};
    for (It it = begin; it != end; ++it) {
      all += *it;
      offsets.push_back(static_cast<int64_t>(all.size()));
    }
    return {as_bytes(all), torch::tensor(offsets, torch::kInt64)};
  }

  static std::vector<c10::IValue> empty_text() {
    return {torch::empty({0}, torch::kUInt8), torch::zeros({1}, torch::kInt64)};
  }

  static std::string said(const torch::Tensor& x) { return std::string(c10::toString(x.scalar_type())) + " " + c10::str(x.sizes()); }

  static std::string unusable(const Image& image) {
    if (!image.error.empty()) return image.error;
    if (!image.data.defined()) return "image is an undefined tensor";
    const bool file = image.data.dim() == 1, rgb = image.data.dim() == 3 && image.data.size(0) == 3 && image.data.numel() > 0;
    if (image.data.scalar_type() == torch::kUInt8 && (file || rgb)) return "";
    return "image must be uint8: a file (N,) or decoded RGB (3, H, W), got " + said(image.data);
  }

  // Why an image has more pixels than options().max_pixels; what else is wrong with it the artifact says.
  std::string too_large(const Image& image) const {
    if (!options_.max_pixels) return "";
    const ImageInfo info = probe(image);
    if (!info.error.empty() || info.width <= options_.max_pixels / std::max<int64_t>(info.height, 1)) return "";
    return info.format + " of " + std::to_string(info.width) + " x " + std::to_string(info.height) + " pixels is more than max_pixels=" +
           std::to_string(options_.max_pixels);
  }

  // Rows of zeros, bool (B,): an item that failed. Not told from an embedding of bits, which may be all zeros.
  torch::Tensor failed(const torch::Tensor& rows) const { return type_ == torch::kUInt8 ? torch::zeros({rows.size(0)}, torch::kBool) : rows.eq(0).all(1).cpu(); }

  static torch::Tensor failed(const Encoded& image) {
    torch::Tensor out = torch::zeros({static_cast<int64_t>(image.errors.size())}, torch::kBool);
    for (size_t i = 0; i < image.errors.size(); ++i) out[static_cast<int64_t>(i)] = !image.ok(i);
    return out;
  }

  static torch::Tensor here(const Image& image) {
    const torch::Tensor x = image.data.to(torch::kCPU);
    return x.dim() == 1 ? x.contiguous() : x;
  }

  // Embeddings, or the scores of pairs, on the model's device.
  torch::Tensor fitting(const torch::Tensor& x, const char* name, const char* rows) const {
    if (!x.defined()) throw Error(std::string(name) + " is an undefined tensor");
    if (x.dim() != 2 || x.size(1) != dim_ || x.scalar_type() != type_)
      throw Error(std::string(name) + " must have the shape (" + rows + ", " + std::to_string(dim_) + ") and the type " + c10::toString(type_) + ", got " + said(x));
    return x.to(options_.device);
  }

  void embeds(const char* method) const {
    if (pairs_) throw Error(std::string(method) + ": this artifact scores pairs and has no embeddings: call score_pairs(texts, images)");
  }

  // f(rows, levels) for every batch of good images; the reasons of the others go to `errors`.
  template <class F>
  void each_batch(const std::vector<Image>& images, std::vector<std::string>& errors, F f) const {
    const size_t step = static_cast<size_t>(options_.batch_size);
    std::vector<torch::Tensor> levels;
    std::vector<int64_t> rows;
    auto flush = [&] {
      if (rows.empty()) return;
      f(rows, torch::stack(levels));
      levels.clear();
      rows.clear();
    };
    for (size_t i = 0; i < images.size(); i += step) {
      const size_t n = std::min(step, images.size() - i);
      std::vector<Pixels> decoded(n);
      in_threads(n, options_.decoders, [&](size_t k) { decoded[k] = preprocess(images[i + k]); });
      for (size_t k = 0; k < n; ++k) {
        errors[i + k] = decoded[k].error;
        if (!decoded[k].error.empty()) continue;
        levels.push_back(std::move(decoded[k].levels));
        rows.push_back(static_cast<int64_t>(i + k));
        if (rows.size() == step) flush();
      }
    }
    flush();
  }

  // Weights in oneDNN's order for this processor, once; those of linear layers in float32 stay as they are where torch's own product is quicker.
  void settle(bool compiled) {
    const auto chooses = [](const torch::jit::Module& layer) { return layer.hasattr("own") && layer.attr("weight").toTensor().scalar_type() == torch::kFloat; };
    bool any = false, fixed = card_field(card_, "deterministic") != "";
    for (const auto& layer : module_.modules()) any = any || chooses(layer);
    const bool own = Kernels::chosen(options_.kernels, compiled || fixed || !any) == "torch";
    for (torch::jit::Module layer : module_.modules()) {
      if (own && chooses(layer)) layer.setattr("own", true);
      else if (layer.find_method("pack")) layer.get_method("pack")(std::vector<torch::jit::IValue>{});
    }
  }

  std::string line(bool compiled) const {
    const std::string quantize = card_field(card_, "quantize"), said = card_field(card_, "precision"), precision = said.empty() ? "fp32" : said;
    const std::string here = at::get_cpu_capability();
    if (!options_.device.is_cpu()) return quantize.empty() ? precision : quantize;
    if (const std::string made = compiled ? Package::multiplied(card_) : precision; made != precision)
      return made + ": compiled for a processor that does not multiply " + precision;
    if (!multiplies(precision)) return "fp32: this processor (" + here + ") does not multiply " + precision;
    if (!quantize.empty() && card_field(card_, "portable") == "true" && !multiplies("int8"))
      return "fp32: torch has no int8 kernel for this processor (" + here + "), and a portable file calls no oneDNN";
    int64_t steps = 0;
    bool own = false, seven = false;
    for (const auto& layer : module_.modules()) {
      own = own || (layer.hasattr("own") && layer.attr("own").toBool());
      if (!layer.hasattr("steps") || !layer.find_method("pack")) continue;
      const int64_t n = layer.attr("steps").toInt();
      steps = std::max(steps, n), seven = seven || n == 126;
    }
    if (quantize.empty()) return precision + (own ? ", linear layers by torch's own product" : "");
    return steps > 0 ? "int8, inputs of " + std::string(seven ? "7" : "8") + " bits by oneDNN (" + here + ")" : "int8";
  }

  c10::IValue call(const char* method, std::vector<c10::IValue> inputs) const {
    const AutocastOff steady;
    const torch::jit::GraphOptimizerEnabledGuard apart(false);  // of this thread: each function prepared once, not written out in every caller
    try {
      return package_ ? package_->call(method, std::move(inputs)) : module_.get_method(method)(std::move(inputs));
    } catch (const std::exception& e) {
      throw Error(reason(e));
    }
  }

  Options options_;
  std::string card_, computes_;
  torch::jit::Module module_;         // for a package its rest
  std::shared_ptr<Package> package_;  // null for TorchScript
  int64_t dim_ = 0;
  bool pairs_ = false;
  std::vector<std::string> labels_;
  torch::ScalarType type_ = torch::kFloat32;
};

}  // namespace mmembed
