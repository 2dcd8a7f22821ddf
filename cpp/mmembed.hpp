// mmembed: run an exported artifact from C++. Header only; needs libtorch (C++20) and, for artifacts that decode image
// files themselves, the library libtorchcodec_image.so of the Python package torchcodec.
//
//   mmembed::Embedder emb("model.pt");
//   torch::Tensor text = emb.encode_text({"a small red circle"});              // (1, D), unit length
//   mmembed::Encoded image = emb.encode_image({mmembed::Image::file("cat.jpg")});
//   if (!image.ok(0)) std::cerr << image.errors[0] << '\n';                    // one bad item harms no neighbour
//   torch::Tensor scores = emb.score(text, image.embedding);                   // (1, 1)
//
// An artifact is code: load only files that you trust.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

namespace mmembed {

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

struct Tokens {
  torch::Tensor ids, mask;  // int64 (B, L)
};

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

// What a batch of images became. A row whose error is not empty holds zeros.
struct Encoded {
  torch::Tensor embedding;          // float32 (B, D)
  std::vector<std::string> errors;  // "" for every item that went well
  bool ok(size_t i) const { return errors.at(i).empty(); }
};

struct Pixels {
  torch::Tensor levels;  // uint8 (3, S, S); undefined when error is not empty
  std::string error;
};

struct Options {
  torch::Device device = torch::kCPU;
  int threads = 0;            // for one operation; 0 leaves torch's own setting
  std::string torchcodec;     // libtorchcodec_image.so; empty searches as register_image_ops says
  int64_t batch_size = 64;    // rows that the towers see at once
};

inline bool image_ops_registered(bool heic = false) {
  const char* name = heic ? "torchcodec_ns::decode_heic" : "torchcodec_ns::decode_jpeg";
  return c10::Dispatcher::singleton().findSchema({name, ""}).has_value();
}

// Loads a library that lies beside libtorch_cpu.so, if there is one: programs link no more of libtorch than they must.
inline void load_beside(const char* library) {
  Dl_info here;
  if (!dladdr(reinterpret_cast<void*>(&at::get_num_threads), &here) || !here.dli_fname) return;
  std::string folder(here.dli_fname);
  dlopen((folder.substr(0, folder.rfind('/') + 1) + library).c_str(), RTLD_NOW | RTLD_GLOBAL);
}

// Registers torchcodec's image operators. Tried in turn: `path`, $MMEMBED_TORCHCODEC, the file found when this program
// was built, the loader's own search path. The operator for HEIC lies in a library beside it, which wants libheif.
inline void register_image_ops(const std::string& path = "", bool heic = false) {
  if (image_ops_registered(heic)) return;
  load_beside("libtorch_cuda.so");  // the library of the CUDA wheels wants both
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
    if (dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL) && image_ops_registered(heic)) return;
    const char* message = dlerror();
    if (why.empty()) why = message ? message : file + " registers no image operators";
  }
  if (heic) throw Error("this artifact decodes HEIC and needs libheif: apt install libheif1 (" + why + ")");
  throw Error("this artifact decodes image files and needs torchcodec's image operators: set MMEMBED_TORCHCODEC to "
              "libtorchcodec_image.so (in the Python package torchcodec), or export with decode=False (" + why + ")");
}

// The identity card (JSON) of an artifact, read without loading the model.
inline std::string read_card(const std::string& path) {
  { std::ifstream in(path, std::ios::binary); if (!in) throw Error(path + ": " + std::strerror(errno)); }
  try {
    caffe2::serialize::PyTorchStreamReader archive(path);
    if (archive.hasRecord("extra/card.json")) {
      auto [data, size] = archive.getRecord("extra/card.json");
      return std::string(static_cast<const char*>(data.get()), size);
    }
  } catch (const std::exception&) {
    throw Error(path + " is not an mmembed artifact, or is truncated: it is no complete zip archive");
  }
  throw Error(path + " is not an mmembed artifact: it holds no identity card");
}

// A string or literal field on the top level of the card, "" when absent. The card is flat where hosts need it.
inline std::string card_field(const std::string& card, const std::string& key) {
  std::smatch m;
  if (std::regex_search(card, m, std::regex("\"" + key + "\": ?(\"([^\"]*)\"|[^,}\\s]+)")))
    return m[2].matched ? m[2] : m[1];
  return "";
}

// A loaded artifact. Calls are const and may come from several threads; what they return lies on the CPU.
class Embedder {
 public:
  explicit Embedder(const std::string& path, Options options = {})
      : options_(std::move(options)), card_(read_card(path)) {
    if (options_.batch_size < 1) throw Error("batch_size must be at least 1");
    if (card_field(card_, "decode") == "true") {
      register_image_ops(options_.torchcodec);
      if (card_field(card_, "heic") == "true") register_image_ops(options_.torchcodec, true);
    }
    if (options_.device.is_cuda()) load_beside("libtorch_cuda.so");
    if (options_.threads > 0) at::set_num_threads(options_.threads);
    torch::jit::getProfilingMode() = false;  // its recompilations make the first calls slow
    try {
      module_ = torch::jit::load(path, options_.device);
    } catch (const std::exception& e) {
      throw Error(path + " cannot be loaded: " + reason(e));
    }
    module_.eval();
    dim_ = module_.attr("dim").toInt();
  }

  const std::string& card() const { return card_; }
  std::string short_hash() const { return card_field(card_, "short_hash"); }
  int64_t dim() const { return dim_; }

  Tokens tokenize(const std::vector<std::string>& texts) const {
    torch::NoGradGuard no_grad;
    auto [data, offsets] = pack(texts.begin(), texts.end());
    auto fields = call("tokenize", {data, offsets}).toTuple();
    return {fields->elements()[0].toTensor(), fields->elements()[1].toTensor()};
  }

  // float32 (B, D). Any bytes are a text: what is not valid UTF-8 becomes U+FFFD.
  torch::Tensor encode_text(const std::vector<std::string>& texts) const {
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
    if (!image.error.empty()) return {"", 0, 0, 0, 0, 1, 1, image.error};
    auto f = call("probe", {image.data}).toTuple()->elements();
    return {f[0].toStringRef(), f[1].toInt(), f[2].toInt(), f[3].toInt(), f[4].toInt(),
            f[5].toInt(), f[6].toInt(), f[7].toStringRef()};
  }

  // One image to uint8 (3, S, S), or the reason why not. Never throws for a bad image.
  Pixels preprocess(const Image& image) const {
    torch::NoGradGuard no_grad;
    if (!image.error.empty()) return {torch::Tensor(), image.error};
    try {
      return {call("preprocess_image", {image.data}).toTensor(), ""};
    } catch (const Error& e) {
      return {torch::Tensor(), e.what()};
    }
  }

  // Never throws for a bad image: its row is zeros and its error says why.
  Encoded encode_image(const std::vector<Image>& images) const {
    torch::NoGradGuard no_grad;
    Encoded out{torch::zeros({static_cast<int64_t>(images.size()), dim_}), std::vector<std::string>(images.size())};
    std::vector<torch::Tensor> levels;
    std::vector<int64_t> rows;
    auto flush = [&] {
      if (rows.empty()) return;
      torch::Tensor e = call("encode_pixels", {torch::stack(levels)}).toTensor();
      out.embedding.index_copy_(0, torch::tensor(rows), e.to(torch::kCPU));
      levels.clear();
      rows.clear();
    };
    for (size_t i = 0; i < images.size(); ++i) {
      Pixels p = preprocess(images[i]);
      out.errors[i] = p.error;
      if (!p.error.empty()) continue;
      levels.push_back(p.levels);
      rows.push_back(static_cast<int64_t>(i));
      if (static_cast<int64_t>(rows.size()) == options_.batch_size) flush();
    }
    flush();
    return out;
  }

  // Scores float32 (T, I) of embeddings (T, D) and (I, D).
  torch::Tensor score(const torch::Tensor& text, const torch::Tensor& image) const {
    torch::NoGradGuard no_grad;
    return call("score", {text.to(options_.device), image.to(options_.device)}).toTensor().to(torch::kCPU);
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

  c10::IValue call(const char* method, std::vector<c10::IValue> inputs) const {
    try {
      return module_.get_method(method)(std::move(inputs));
    } catch (const std::exception& e) {
      throw Error(reason(e));
    }
  }

  Options options_;
  std::string card_;
  torch::jit::Module module_;
  int64_t dim_ = 0;
};

}  // namespace mmembed
