// A project that knows mmembed by find_package alone: consumer ARTIFACT prints the shape of an embedding.
#include <iostream>

#include <mmembed.hpp>

int main(int, char** argv) {
  const torch::Tensor e = mmembed::Embedder(argv[1]).encode_text({"a red circle"});
  std::cout << e.size(0) << " x " << e.size(1) << "\n";
}
