// Uses mmembed.hpp as a program would: mmembed_test ARTIFACT IMAGE. Prints "ok" when every check holds.
// mmembed_test --tokenize PIPELINE TEXTS OUT BATCH: a scripted TextPipeline alone, see tokenize_file.
#include "mmembed.hpp"

#include <fstream>
#include <iostream>
#include <thread>

using mmembed::Embedder, mmembed::Image;

#define CHECK(x) \
  do { if (!(x)) { std::cerr << __FILE__ << ":" << __LINE__ << ": " << #x << " does not hold\n"; return 1; } } while (0)

template <class F>
std::string error_of(F f) {
  try { f(); } catch (const mmembed::Error& e) { return e.what(); }
  return "";
}

// TEXTS holds B, B+1 offsets (int64) and the bytes; OUT gets rows, columns, ids and mask (int64) of each batch.
int tokenize_file(const char* pipeline, const char* texts, const char* out, int64_t batch) {
  torch::NoGradGuard no_grad;
  torch::jit::getProfilingMode() = false;
  at::set_num_threads(1);
  auto module = torch::jit::load(pipeline);
  auto tokenize = module.get_method("tokenize");
  std::ifstream in(texts, std::ios::binary);
  int64_t rows = 0;
  in.read(reinterpret_cast<char*>(&rows), 8);
  torch::Tensor offsets = torch::empty({rows + 1}, torch::kInt64);
  in.read(reinterpret_cast<char*>(offsets.data_ptr()), 8 * (rows + 1));
  torch::Tensor data = torch::empty({offsets[-1].item<int64_t>()}, torch::kUInt8);
  in.read(reinterpret_cast<char*>(data.data_ptr()), data.numel());
  CHECK(in.good());
  std::ofstream to(out, std::ios::binary);
  for (int64_t i = 0; i < rows; i += batch) {
    torch::Tensor part = offsets.slice(0, i, std::min(i + batch, rows) + 1);
    int64_t first = part[0].item<int64_t>();
    auto tokens = tokenize({data.slice(0, first, part[-1].item<int64_t>()), part - first}).toTuple();
    torch::Tensor ids = tokens->elements()[0].toTensor().contiguous(), mask = tokens->elements()[1].toTensor().contiguous();
    CHECK(ids.dtype() == torch::kInt64 && ids.sizes() == mask.sizes());
    int64_t shape[2] = {ids.size(0), ids.size(1)};
    to.write(reinterpret_cast<char*>(shape), 16);
    for (auto& x : {ids, mask}) to.write(reinterpret_cast<const char*>(x.data_ptr()), 8 * x.numel());
  }
  try {
    tokenize({data, offsets + 1});
    return 1;
  } catch (const std::exception& e) {
    CHECK(std::string(e.what()).find("offsets must rise from 0") != std::string::npos);
  }
  std::cout << "ok\n";
  return 0;
}

int main(int argc, char** argv) {
  if (argc == 6 && std::string(argv[1]) == "--tokenize") return tokenize_file(argv[2], argv[3], argv[4], std::stoll(argv[5]));
  if (argc != 3) return 2;
  const std::string path = argv[1], picture = argv[2];
  Embedder emb(path);
  const int64_t D = emb.dim();

  // the card
  CHECK(emb.card() == mmembed::read_card(path));
  CHECK(emb.short_hash().size() == 12 && emb.card().find(emb.short_hash()) != std::string::npos);

  // empty batches
  CHECK(emb.encode_text({}).sizes() == torch::IntArrayRef({0, D}));
  CHECK(emb.tokenize({}).ids.size(0) == 0);
  CHECK(emb.encode_image({}).embedding.sizes() == torch::IntArrayRef({0, D}));

  // any bytes are a text
  const std::string nul("a\0b", 3), broken("\xff\xfe\xe4\xb8");
  torch::Tensor text = emb.encode_text({nul, broken, "", std::string(100000, 'x')});
  CHECK(text.sizes() == torch::IntArrayRef({4, D}));
  CHECK(torch::allclose(text.norm(2, 1), torch::ones(4), 1e-5, 1e-5));

  // one bad item harms no neighbour
  Image good = Image::file(picture);
  torch::Tensor alone = emb.encode_image({good}).embedding;
  auto mixed = emb.encode_image({Image::bytes("not an image"), good, Image::file("/no/such/file"), Image::bytes(""),
                                 Image::rgb(torch::zeros({2, 2})), Image::rgb(torch::zeros({3, 0, 4}, torch::kUInt8))});
  CHECK(mixed.ok(1) && torch::equal(mixed.embedding[1], alone[0]));
  for (size_t i : {0, 2, 3, 4, 5}) CHECK(!mixed.ok(i) && mixed.embedding[i].abs().sum().item<float>() == 0);
  CHECK(mixed.errors[2] == "/no/such/file: No such file or directory");
  CHECK(mixed.errors[0].find('\n') == std::string::npos && mixed.errors[0].size() < 200);
  CHECK(emb.probe(good).error.empty() && emb.probe(good).width > 0);
  CHECK(!emb.probe(Image::bytes("not an image")).error.empty());

  // decoded pixels, scores
  torch::Tensor rgb = torch::randint(0, 256, {3, 40, 60}, torch::kUInt8);
  CHECK(emb.encode_image({Image::rgb(rgb)}).ok(0));
  CHECK(emb.score(text, alone).sizes() == torch::IntArrayRef({4, 1}));
  CHECK(error_of([&] { emb.score(torch::zeros({1, D}), torch::zeros({1, D + 1})); }).rfind("image must have the shape", 0) == 0);

  // small batches give what large ones give
  mmembed::Options two;
  two.batch_size = 2;
  Embedder small(path, two);
  std::vector<std::string> texts = {"a", "a red circle", "", "b", "c"};
  CHECK(torch::allclose(small.encode_text(texts), emb.encode_text(texts), 1e-5, 1e-5));
  CHECK(torch::allclose(small.encode_image({good, good, good}).embedding, alone.expand({3, D}), 1e-5, 1e-5));

  // several threads
  torch::Tensor want = emb.encode_text(texts);
  std::vector<torch::Tensor> got(4);
  std::vector<std::thread> threads;
  for (auto& g : got) threads.emplace_back([&] { for (int i = 0; i < 5; ++i) g = emb.encode_text(texts); });
  for (auto& t : threads) t.join();
  for (auto& g : got) CHECK(torch::equal(g, want));

  // what is no artifact
  CHECK(error_of([] { Embedder("/no/such/model.pt"); }) == "/no/such/model.pt: No such file or directory");
  CHECK(error_of([&] { Embedder e(picture); }).find("is not an mmembed artifact") != std::string::npos);
  CHECK(error_of([&] { mmembed::Options zero; zero.batch_size = 0; Embedder e(path, zero); }) == "batch_size must be at least 1");

  std::cout << "ok\n";
}
