// Embeds texts and image files with an exported artifact, or scores pairs of them, and prints one JSON object a line.
#include "mmembed_json.hpp"

#include <sys/resource.h>

#include <chrono>

using mmembed::crc32, mmembed::numbers, mmembed::quote;

namespace {

const char* kUsage =
    "usage: mmembed_cli MODEL [--card] [options] [image files]\n"
    "  --text T         a text (again for more)\n"
    "  --text-file F    a file that holds one text: every byte of it, NULs and broken UTF-8 included\n"
    "  --lines F        a file with one text a line\n"
    "  --image F        an image file (again for more)\n"
    "  --rgb HxW:F      a file that holds decoded RGB, H*W*3 bytes, channel after channel (artifacts without file decode)\n"
    "  --batch N        rows that the towers see at once (64)\n"
    "  --decoders N     threads that decode images (1)\n"
    "  --threads N      threads for one operation\n"
    "  --device D       cpu, cuda, cuda:1, ...\n"
    "  --max-pixels N   of an image; the artifact's own limit where that is less\n"
    "  --kernels K      what multiplies in float32 on a CPU: onednn, torch, or auto for the quicker one ($MMEMBED_KERNELS, auto)\n"
    "  --check          hold every record of the file to its CRC-32 before it is loaded\n"
    "  --memory         read the file and load it from memory\n"
    "  --dump DIR       write each image's pixels, uint8 (3, S, S), to DIR/<index>.bin\n"
    "  --torchcodec F   libtorchcodec_image.so\n"
    "  --card           print the identity card and stop\n"
    "  --computes       load the model, print in what its towers multiply on this processor, and stop\n"
    "  --time N         answer the texts, then the images, N times after a warm-up; print only what that took\n"
    "Prints {\"kind\": \"text\", \"index\", \"ids\", \"embedding\"} and {\"kind\": \"image\", \"index\", \"crc32\" of the pixels,\n"
    "\"embedding\"} or {\"kind\": \"image\", \"index\", \"error\"}. An artifact that scores pairs has no embeddings; with as many texts as\n"
    "images it prints {\"kind\": \"pair\", \"index\", \"scores\"} for text i with image i, too.\n"
    "Exit status: 0, 1 when an item failed, 2 when nothing ran.\n";

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

double cpu_seconds() {
  rusage u{};
  getrusage(RUSAGE_SELF, &u);
  return static_cast<double>(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * static_cast<double>(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

// Milliseconds of each of `n` rounds, wall clock and CPU of all threads, after one that does not count.
template <class F>
void clock_one(const mmembed::Embedder& emb, const char* kind, size_t items, int64_t n, F f) {
  if (!items) return;
  std::vector<double> wall, cpu;
  for (int64_t i = 0; i <= n; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const double used = cpu_seconds();
    f();
    if (!i) continue;
    wall.push_back(1e3 * std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    cpu.push_back(1e3 * (cpu_seconds() - used));
  }
  const auto list = [](const std::vector<double>& x) { return numbers(torch::tensor(x)); };
  std::printf("{\"kind\": \"%s\", \"items\": %zu, \"wall_ms\": %s, \"cpu_ms\": %s, \"computes\": %s}\n", kind, items, list(wall).c_str(), list(cpu).c_str(),
              quote(emb.computes()).c_str());
}

void clock_it(const mmembed::Embedder& emb, const std::vector<std::string>& texts, const std::vector<mmembed::Image>& images, int64_t n) {
  emb.warmup();
  if (emb.pairs()) return clock_one(emb, "pair", texts.size(), n, [&] { emb.score_pairs(texts, images); });
  clock_one(emb, "text", texts.size(), n, [&] { emb.encode_text(texts); });
  clock_one(emb, "image", images.size(), n, [&] { emb.encode_image(images); });
}

int run(int argc, char** argv) {
  std::string model, dump;
  std::vector<std::string> texts;
  std::vector<mmembed::Image> images;
  mmembed::Options options;
  bool card = false, computes = false, memory = false;
  int64_t timed = 0;
  for (int i = 1; i < argc; ++i) {
    std::string a = argv[i];
    auto value = [&] {
      if (i + 1 >= argc) throw mmembed::Error(a + " wants a value");
      return std::string(argv[++i]);
    };
    if (a == "--help" || a == "-h") { std::fputs(kUsage, stdout); return 0; }
    else if (a == "--card") card = true;
    else if (a == "--computes") computes = true;
    else if (a == "--text") texts.push_back(value());
    else if (a == "--text-file") texts.push_back(mmembed::read_file(value()));
    else if (a == "--lines") {
      std::istringstream lines(mmembed::read_file(value()));
      for (std::string line; std::getline(lines, line);) texts.push_back(line);
    }
    else if (a == "--image") images.push_back(mmembed::Image::file(value()));
    else if (a == "--rgb") images.push_back(read_rgb(value()));
    else if (a == "--batch") options.batch_size = number(a, value());
    else if (a == "--decoders") options.decoders = static_cast<int>(number(a, value()));
    else if (a == "--time") timed = number(a, value());
    else if (a == "--threads") options.threads = static_cast<int>(number(a, value()));
    else if (a == "--device") options.device = device(value());
    else if (a == "--max-pixels") options.max_pixels = number(a, value());
    else if (a == "--kernels") options.kernels = value();
    else if (a == "--check") options.check = true;
    else if (a == "--memory") memory = true;
    else if (a == "--dump") dump = value();
    else if (a == "--torchcodec") options.torchcodec = value();
    else if (a.rfind("--", 0) == 0) throw mmembed::Error("unknown option " + a + "; see --help");
    else if (model.empty()) model = a;
    else images.push_back(mmembed::Image::file(a));
  }
  if (model.empty()) { std::fputs(kUsage, stderr); return 2; }
  if (card) { std::puts(mmembed::read_card(model).c_str()); return 0; }

  const mmembed::Embedder emb = memory ? mmembed::Embedder::from_memory(mmembed::read_file(model), options) : mmembed::Embedder(model, options);
  if (computes) return std::puts(emb.computes().c_str()), 0;
  if (timed) return clock_it(emb, texts, images, timed), 0;
  const size_t step = static_cast<size_t>(options.batch_size);
  for (size_t i = 0; i < texts.size(); i += step) {
    std::vector<std::string> batch(texts.begin() + i, texts.begin() + std::min(i + step, texts.size()));
    mmembed::Tokens tokens = emb.tokenize(batch);
    torch::Tensor e = emb.pairs() ? torch::Tensor() : emb.encode_text(batch);
    for (size_t j = 0; j < batch.size(); ++j)
      std::printf("{\"kind\": \"text\", \"index\": %zu, \"ids\": %s, \"mask\": %s%s}\n", i + j, numbers(tokens.ids[j]).c_str(),
                  numbers(tokens.mask[j]).c_str(), e.defined() ? (", \"embedding\": " + numbers(e[j])).c_str() : "");
  }
  bool failed = false;
  const mmembed::Encoded encoded = emb.pairs() ? mmembed::Encoded{} : emb.encode_image(images);
  const std::vector<mmembed::Pixels> pixels = emb.preprocess(images);
  for (size_t i = 0; i < images.size(); ++i) {
    if (!pixels[i].error.empty()) {
      failed = true;
      std::printf("{\"kind\": \"image\", \"index\": %zu, \"error\": %s}\n", i, quote(pixels[i].error).c_str());
      continue;
    }
    const torch::Tensor levels = pixels[i].levels.contiguous();
    const auto* bytes = static_cast<const uint8_t*>(levels.data_ptr());
    const size_t size = static_cast<size_t>(levels.numel());
    if (!dump.empty()) {
      std::ofstream out(dump + "/" + std::to_string(i) + ".bin", std::ios::binary);
      out.write(reinterpret_cast<const char*>(bytes), static_cast<std::streamsize>(size));
      if (!out) throw mmembed::Error("cannot write pixels to --dump " + dump);
    }
    std::printf("{\"kind\": \"image\", \"index\": %zu, \"crc32\": \"%08x\"%s}\n", i, crc32(bytes, size),
                emb.pairs() ? "" : (", \"embedding\": " + numbers(encoded.embedding[static_cast<int64_t>(i)])).c_str());
  }
  if (emb.pairs() && !texts.empty() && !images.empty()) {
    const mmembed::Scored done = emb.score_pairs(texts, images);
    for (size_t i = 0; i < texts.size(); ++i) {
      if (done.ok(i)) std::printf("{\"kind\": \"pair\", \"index\": %zu, \"scores\": %s}\n", i, numbers(done.scores[static_cast<int64_t>(i)]).c_str());
      else std::printf("{\"kind\": \"pair\", \"index\": %zu, \"error\": %s}\n", i, quote(done.errors[i]).c_str());
    }
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
