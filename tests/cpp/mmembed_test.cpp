// Uses mmembed.hpp as a program would: mmembed_test ARTIFACT PAIRS IMAGE. Prints "ok" when every check holds.
// mmembed_test --leak ARTIFACT PAIRS IMAGE CALLS: prints how the process grew over so many calls, see leak.
// mmembed_test --tokenize PIPELINE TEXTS OUT BATCH: a scripted TextPipeline alone, see tokenize_file.
#include "mmembed_json.hpp"

#include <algorithm>
#include <fstream>
#include <iostream>
#include <limits>
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

// Megabytes of anonymous memory, swapped or not: files that are mapped come and go as the machine likes.
double used() {
  std::ifstream in("/proc/self/status");
  std::string word;
  double kb = 0, sum = 0;
  while (in >> word)
    if ((word == "RssAnon:" || word == "VmSwap:") && in >> kb) sum += kb;
  return sum / 1e3;
}

// Everything the header does, good items and broken ones, `calls` times; the growth after the first fifth is printed in megabytes, and
// four times the least of the other fifths: what leaks grows in each of them, a heap that settles late in one.
int leak(const std::string& path, const std::string& pair_path, const std::string& picture, int calls) {
  mmembed::Options options;
  options.threads = 1;
  options.batch_size = 2;
  const Embedder emb(path, options), judge(pair_path, options);
  const Image good = Image::file(picture), bad = Image::bytes("broken");
  const std::string whole = mmembed::read_file(picture);
  double least = std::numeric_limits<double>::infinity(), first = 0, before = 0;
  for (int i = 0; i < calls; ++i) {
    if (i && i % (calls / 5) == 0) {
      const double now = used();
      if (i == calls / 5) first = now;
      else least = std::min(least, now - before);
      before = now;
    }
    torch::Tensor text = emb.encode_text({"a red circle", "\xff", std::to_string(i)});
    auto image = emb.encode_image({good, bad, Image::bytes(whole.substr(0, whole.size() / 2)), Image::file("/no/such/file")});
    emb.score(text, image.embedding);
    emb.tokenize({"a"});
    emb.probe(good);
    judge.score_pairs({"a", "b"}, {good, bad});
    judge.classify(judge.score_pairs({"a"}, {good}).scores, 1);
    CHECK(!error_of([&] { emb.score(text, torch::zeros({1, 1})); }).empty());
    CHECK(!error_of([&] { judge.encode_text({"a"}); }).empty());
  }
  const double last = used();
  std::cout << last - first << " " << 4 * std::min(least, last - before) << "\n";
  return 0;
}

int main(int argc, char** argv) {
  if (argc == 6 && std::string(argv[1]) == "--leak") return leak(argv[2], argv[3], argv[4], std::stoi(argv[5]));
  if (argc == 6 && std::string(argv[1]) == "--tokenize") return tokenize_file(argv[2], argv[3], argv[4], std::stoll(argv[5]));
  if (argc != 4) return 2;
  const std::string path = argv[1], pair_path = argv[2], picture = argv[3];
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

  // an item that failed is never ahead of one that did not
  const torch::Tensor ranked = emb.score(text, mixed);
  CHECK(ranked.sizes() == torch::IntArrayRef({4, 6}) && torch::allclose(ranked.select(1, 1), emb.score(text, alone).select(1, 0), 1e-5, 1e-5));
  for (int64_t i : {0, 2, 3, 4, 5}) CHECK(ranked.select(1, i).isnan().all().item<bool>());
  CHECK(torch::allclose(emb.score(text, mixed.embedding), ranked, 0, 0, true));
  CHECK(emb.score(torch::zeros({1, D}), alone).isnan().all().item<bool>());

  // a limit on pixels below the artifact's own
  mmembed::Options few;
  few.max_pixels = 99;
  const Embedder careful(path, few);
  auto limited = careful.encode_image({good, Image::rgb(torch::zeros({3, 9, 11}, torch::kUInt8)), Image::rgb(torch::zeros({3, 10, 10}, torch::kUInt8)), Image::bytes("x")});
  const auto header = emb.probe(good);
  CHECK(limited.errors[0] == header.format + " of " + std::to_string(header.width) + " x " + std::to_string(header.height) + " pixels is more than max_pixels=99");
  CHECK(limited.ok(1) && limited.errors[2] == "rgb of 10 x 10 pixels is more than max_pixels=99" && limited.errors[3] == emb.preprocess(Image::bytes("x")).error);
  CHECK(error_of([&] { mmembed::Options o; o.max_pixels = -1; Embedder e(path, o); }) == "max_pixels must be at least 0, got -1");

  // from memory, which is given up afterwards; damage is found where it is looked for
  mmembed::Options sure;
  sure.check = true;
  auto content = std::make_unique<std::string>(mmembed::read_file(path));
  const Embedder held = Embedder::from_memory(*content, sure);
  const Embedder looked(path, sure);
  CHECK(held.card() == emb.card() && looked.card() == emb.card());
  for (const auto& [mark, at] : std::vector<std::pair<std::string, size_t>>{{"top_k must not be negative", 3}, {"data.pkl", 4000}, {"PK\1\2", 17}}) {
    std::string hurt = *content;
    hurt[hurt.find(mark) + at] ^= 1;
    CHECK(error_of([&] { Embedder::from_memory(hurt, sure); }).rfind("the artifact in memory is damaged: ", 0) == 0);
  }
  CHECK(error_of([&] { Embedder::from_memory(content->substr(0, content->size() / 2)); }).rfind("the artifact in memory is not an mmembed artifact, or is truncated", 0) == 0);
  CHECK(error_of([&] { Embedder::from_memory(""); }).find("is not an mmembed artifact") != std::string::npos);
  content.reset();
  CHECK(torch::equal(held.encode_text({"a"}), emb.encode_text({"a"})) && torch::equal(held.encode_image({good}).embedding, alone));

  // a program's own autocast is its own
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const torch::Tensor inside = Embedder(path).encode_text({"a"});
  CHECK(at::autocast::is_autocast_enabled(at::kCPU));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  CHECK(torch::equal(inside, emb.encode_text({"a"})));

  // small batches give what large ones give
  mmembed::Options two;
  two.batch_size = 2;
  Embedder small(path, two);
  std::vector<std::string> texts = {"a", "a red circle", "", "b", "c"};
  CHECK(torch::allclose(small.encode_text(texts), emb.encode_text(texts), 1e-5, 1e-5));
  CHECK(torch::allclose(small.encode_image({good, good, good}).embedding, alone.expand({3, D}), 1e-5, 1e-5));

  // several threads, each with calls of every kind, broken items among them
  const std::vector<Image> pictures{good, Image::bytes("broken"), good};
  const torch::Tensor want = emb.encode_text(texts), seen = emb.encode_image(pictures).embedding, scored = emb.score(want, seen);
  std::atomic<int> same{0};
  std::vector<std::thread> threads;
  for (int k = 0; k < 4; ++k)
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) {
        const torch::Tensor t = emb.encode_text(texts);
        const mmembed::Encoded e = emb.encode_image(pictures);
        const bool apart = !error_of([&] { emb.score(t, torch::zeros({1, 1})); }).empty();
        same += apart && torch::equal(t, want) && torch::equal(e.embedding, seen) && !e.ok(1) && torch::allclose(emb.score(t, e.embedding), scored, 0, 0, true) &&
                torch::equal(emb.preprocess(good).levels, emb.preprocess(pictures[2]).levels);
      }
    });
  for (auto& t : threads) t.join();
  CHECK(same == 20);

  // threads that decode change nothing
  mmembed::Options wide;
  wide.decoders = 3;
  Embedder many(path, wide);
  many.warmup({1, 3});
  const std::vector<Image> mixture = {good, Image::bytes("x"), good, Image::rgb(rgb), Image::file("/no"), good, good};
  auto one = emb.encode_image(mixture), three = many.encode_image(mixture);
  CHECK(torch::equal(one.embedding, three.embedding) && one.errors == three.errors && !one.ok(1) && one.ok(3));

  // pairs
  Embedder judge(pair_path);
  judge.warmup();
  CHECK(judge.pairs() && !emb.pairs() && judge.labels() == std::vector<std::string>({"mismatch", "match"}));
  auto pairs = judge.score_pairs({"a red circle", "b", "c"}, {good, Image::bytes("x"), Image::rgb(rgb)});
  CHECK(pairs.scores.sizes() == torch::IntArrayRef({3, 2}) && pairs.ok(0) && !pairs.ok(1) && pairs.ok(2));
  CHECK(pairs.scores[1].isnan().all().item<bool>() && !pairs.scores[0].isnan().any().item<bool>());
  CHECK(torch::equal(pairs.scores[0], judge.score_pairs({"a red circle", "c"}, {good, Image::rgb(rgb)}).scores[0]));
  CHECK(judge.score_pairs({}, {}).scores.sizes() == torch::IntArrayRef({0, 2}));
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  CHECK(torch::equal(judge.scores({"a red circle"}, {good}).scores, judge.score_pairs({"a red circle"}, {good}).scores));  // its older name
#pragma GCC diagnostic pop
  auto found = judge.classify(pairs.scores.index({torch::tensor({0, 2})}), 1);
  CHECK(found.labels.size() == 2 && found.labels[0].size() == 1 && found.index.sizes() == torch::IntArrayRef({2, 1}));
  CHECK(found.labels[0][0] == judge.labels()[static_cast<size_t>(pairs.scores[0].argmax().item<int64_t>())]);

  // wrong calls name what is wrong
  CHECK(error_of([&] { judge.encode_text({"a"}); })== "encode_text: this artifact scores pairs and has no embeddings: call score_pairs(texts, images)");
  CHECK(error_of([&] { judge.encode_image({good}); }).rfind("encode_image: this artifact scores pairs", 0) == 0);
  CHECK(error_of([&] { emb.score_pairs({"a"}, {good}); })== "this artifact embeds: call score(text, image) with embeddings; score_pairs is for a PairClassifier's");
  CHECK(error_of([&] { judge.score_pairs({"a"}, {}); }) == "1 texts and 0 images are not pairs");
  CHECK(error_of([&] { emb.classify(text); }).rfind("this artifact has no labels", 0) == 0);
  CHECK(error_of([&] { emb.score(torch::Tensor(), alone); }) == "text is an undefined tensor");
  CHECK(error_of([&] { emb.score(text, alone[0]); }) == "image must have the shape (I, " + std::to_string(D) + ") and the type Float, got Float [" + std::to_string(D) + "]");
  CHECK(error_of([&] { emb.score(text.to(torch::kDouble), alone); }).rfind("text must have the shape (T, ", 0) == 0);
  CHECK(error_of([&] { judge.classify(torch::zeros({2, 3})); }) == "rows must have the shape (B, 2) and the type Float, got Float [2, 3]");
  CHECK(error_of([&] { judge.classify(pairs.scores, -1); }) == "top_k must be 0 or more, got -1");
  CHECK(emb.preprocess(Image{}).error == "image is an undefined tensor");
  for (const torch::Tensor& wrong : {torch::zeros({3, 4, 4}), torch::zeros({5}), torch::zeros({4, 5, 5}, torch::kUInt8), torch::zeros({2, 2}, torch::kUInt8),
                                     torch::zeros({3, 0, 4}, torch::kUInt8), torch::zeros({}, torch::kUInt8)})
    for (const std::string& error : {emb.preprocess(Image::rgb(wrong)).error, emb.encode_image({Image::rgb(wrong)}).errors[0], emb.probe(Image::rgb(wrong)).error})
      CHECK(error.rfind("image must be uint8: a file (N,) or decoded RGB (3, H, W), got ", 0) == 0);
  CHECK(emb.preprocess(Image::rgb(torch::zeros({4, 4}))).error == "image must be uint8: a file (N,) or decoded RGB (3, H, W), got Float [4, 4]");
  const torch::Tensor apart = torch::stack({good.data, good.data}, 1).select(1, 0);  // every other byte of a buffer
  CHECK(!apart.is_contiguous() && torch::equal(emb.preprocess(Image{apart, ""}).levels, emb.preprocess(good).levels));
  CHECK(torch::equal(emb.preprocess(Image::rgb(rgb.flip(2).flip(2).permute({0, 2, 1}).contiguous().permute({0, 2, 1}))).levels, emb.preprocess(Image::rgb(rgb)).levels));
  CHECK(error_of([&] { emb.warmup({0}); }) == "sizes must be at least 1, got 0");
  CHECK(error_of([&] { mmembed::Options o; o.threads = -1; Embedder e(path, o); }) == "threads must be at least 0, got -1");
  CHECK(error_of([&] { mmembed::Options o; o.decoders = 0; Embedder e(path, o); }) == "decoders must be at least 1, got 0");
  CHECK(error_of([&] { mmembed::Options o; o.device = torch::kMeta; Embedder e(path, o); }) == "device must be cpu, cuda, cuda:1 or the like, got meta");
  CHECK(error_of([] { Embedder("/tmp"); }) == "/tmp is not an mmembed artifact: it is a folder");
  if (!at::hasCUDA()) {
    mmembed::Options gpu;
    gpu.device = torch::kCUDA;
    CHECK(error_of([&] { Embedder e(path, gpu); }) == "device cuda: libtorch sees no CUDA device here");
  }

  // JSON of the programs
  auto fields = mmembed::Reader(R"( {"id": -1.5e3, "t": "a\"\u00e9\ud83d\ude00\n", "n": null, "e": ""} )").object();
  CHECK(fields.size() == 4 && fields["id"] == "-1.5e3" && fields["t"] == "a\"\xc3\xa9\xf0\x9f\x98\x80\n" && fields["n"] == "null" && fields["e"].empty());
  CHECK(mmembed::Reader("{}").object().empty());
  for (const char* broken : {"", "{", "[]", "{\"a\"}", "{\"a\": }", "{\"a\": [1]}", "{\"a\": 01}", "{\"a\": \"x}", "{\"a\": \"\\x\"}", "{\"a\": 1} 2", "{\"a\": 1,}"})
    CHECK(error_of([&] { mmembed::Reader(broken).object(); }).rfind("not a flat JSON object", 0) == 0);
  CHECK(mmembed::from_base64("AP8gYQ==") == std::string("\0\xff a", 4) && mmembed::from_base64("").empty());
  CHECK(!error_of([] { mmembed::from_base64("a!b"); }).empty());
  CHECK(mmembed::quote(std::string("a\"\n\xff\xc3\xa9", 6)) == "\"a\\\"\\u000a\\ufffd\xc3\xa9\"");

  // what is no artifact
  CHECK(error_of([] { Embedder("/no/such/model.pt"); }) == "/no/such/model.pt: No such file or directory");
  CHECK(error_of([&] { Embedder e(picture); }).find("is not an mmembed artifact") != std::string::npos);
  CHECK(error_of([&] { mmembed::Options zero; zero.batch_size = 0; Embedder e(path, zero); }) == "batch_size must be at least 1, got 0");

  std::cout << "ok\n";
}
