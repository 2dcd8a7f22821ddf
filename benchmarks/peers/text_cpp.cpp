// A scripted TextPipeline in C++, for `benchmarks/text.py --cpp`: batches in on stdin (a line with the number of texts, then a line each),
// CPU seconds and the sum of the ids out on stdout.
#include <ctime>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

static double now() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char** argv) {
    if (argc != 2) { std::cerr << "usage: text_cpp PIPELINE.pt\n"; return 2; }
    torch::jit::getProfilingMode() = false;
    at::set_num_threads(1);
    c10::InferenceMode guard;
    auto pipeline = torch::jit::load(argv[1]);
    auto tokenize = pipeline.get_method("tokenize");
    std::cout << "ready" << std::endl;
    for (std::string line; std::getline(std::cin, line);) {
        std::vector<std::string> texts(std::stoul(line));
        for (auto& t : texts) std::getline(std::cin, t);
        const double start = now();
        std::string bytes;
        auto offsets = torch::empty({int64_t(texts.size()) + 1}, torch::kInt64);
        auto at = offsets.data_ptr<int64_t>();
        at[0] = 0;
        for (size_t i = 0; i < texts.size(); i++) {
            bytes += texts[i];
            at[i + 1] = int64_t(bytes.size());
        }
        auto data = torch::from_blob(bytes.data(), {int64_t(bytes.size())}, torch::kUInt8);
        auto tokens = tokenize({data, offsets}).toTuple();
        const double took = now() - start;
        std::cout << took << ' ' << tokens->elements()[0].toTensor().sum().item<int64_t>() << std::endl;
    }
}
