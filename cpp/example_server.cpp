// A server in one file: JSON lines in, JSON lines out, on standard input or on a TCP port of this machine.
//   example_server MODEL                  {"id": 1, "text": "a red boat"}  ->  {"id": 1, "embedding": [...]}
//   example_server MODEL --port 7000      the same over TCP; {"image_base64": "..."} sends a picture
// On standard input {"image": "cat.jpg"} names a file. An artifact that scores pairs wants a text and an image in each line and answers
// {"id", "scores": [...], "labels": [...]}. What cannot be answered is {"id", "error"}, and harms nobody else: lines of
// all callers go to the towers together, in batches of at most --batch items that waited --wait-ms milliseconds at most.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <future>
#include <iostream>
#include <mutex>

#include "mmembed_json.hpp"

namespace {

using mmembed::Embedder, mmembed::Error, mmembed::Image;

struct Request {
  std::string id = "null";
  bool has_text = false, has_image = false;
  std::string text;
  Image image;
};

struct Job {
  Request request;
  std::promise<std::string> answer;
};

std::string failed(const std::string& id, const std::string& why) {
  return "{\"id\": " + id + ", \"error\": " + mmembed::quote(why) + "}";
}

Request read_request(const std::string& line, bool files) {
  auto fields = mmembed::Reader(line).object();
  Request r;
  for (auto& [key, value] : fields) {
    if (key == "id") r.id = value.find_first_not_of("-0123456789") == std::string::npos && !value.empty() ? value : mmembed::quote(value);
    else if (key == "text") r.has_text = true, r.text = std::move(value);
    else if (key == "image" && files) r.has_image = true, r.image = Image::file(value);
    else if (key == "image_base64") r.has_image = true, r.image = Image::bytes(mmembed::from_base64(value));
    else throw Error("unknown key " + key + (key == "image" ? ": send image_base64" : ""));
  }
  return r;
}

// Gathers requests of all callers and answers them in batches, in a thread of its own.
class Batcher {
 public:
  Batcher(const Embedder& emb, std::chrono::milliseconds wait, size_t limit)
      : emb_(emb), wait_(wait), limit_(limit), thread_([this] { run(); }) {}
  ~Batcher() {
    { std::lock_guard lock(mutex_); stop_ = true; }
    arrived_.notify_all();
    thread_.join();
  }

  std::future<std::string> ask(Request request) {
    Job job{std::move(request), {}};
    auto future = job.answer.get_future();
    std::unique_lock lock(mutex_);
    taken_.wait(lock, [&] { return jobs_.size() < limit_; });  // a caller that is too fast waits
    jobs_.push_back(std::move(job));
    arrived_.notify_one();
    return future;
  }

 private:
  void run() {
    const size_t most = static_cast<size_t>(emb_.options().batch_size);
    std::unique_lock lock(mutex_);
    while (true) {
      arrived_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      const auto until = std::chrono::steady_clock::now() + wait_;
      arrived_.wait_until(lock, until, [&] { return stop_ || jobs_.size() >= most; });
      std::vector<Job> batch;
      while (!jobs_.empty() && batch.size() < most) {
        batch.push_back(std::move(jobs_.front()));
        jobs_.pop_front();
      }
      lock.unlock();
      taken_.notify_all();
      answer(batch);
      lock.lock();
    }
  }

  void answer(std::vector<Job>& batch) {
    std::vector<std::string> answers(batch.size());
    std::vector<size_t> at_text, at_image, at_pair;
    std::vector<std::string> texts;
    std::vector<Image> images;
    for (size_t i = 0; i < batch.size(); ++i) {
      const Request& r = batch[i].request;
      if (emb_.pairs() ? !(r.has_text && r.has_image) : r.has_text == r.has_image) {
        answers[i] = failed(r.id, emb_.pairs() ? "this model scores pairs: send text and image" : "send either text or image");
        continue;
      }
      if (r.has_text) texts.push_back(r.text);
      if (r.has_image) images.push_back(r.image);
      (emb_.pairs() ? at_pair : r.has_text ? at_text : at_image).push_back(i);
    }
    try {
      auto row = [&](size_t i, const char* what, const torch::Tensor& x) {
        return "{\"id\": " + batch[i].request.id + ", \"" + what + "\": " + mmembed::numbers(x);
      };
      if (!at_pair.empty()) {
        const auto done = emb_.score_pairs(texts, images);
        std::string labels;
        for (const auto& label : emb_.labels()) labels += (labels.empty() ? "" : ", ") + mmembed::quote(label);
        for (size_t k = 0; k < at_pair.size(); ++k)
          answers[at_pair[k]] = done.ok(k) ? row(at_pair[k], "scores", done.scores[static_cast<int64_t>(k)]) + ", \"labels\": [" + labels + "]}"
                                           : failed(batch[at_pair[k]].request.id, done.errors[k]);
      }
      if (!at_text.empty()) {
        const torch::Tensor done = emb_.encode_text(texts);
        for (size_t k = 0; k < at_text.size(); ++k) answers[at_text[k]] = row(at_text[k], "embedding", done[static_cast<int64_t>(k)]) + "}";
      }
      if (!at_image.empty()) {
        const auto done = emb_.encode_image(images);
        for (size_t k = 0; k < at_image.size(); ++k)
          answers[at_image[k]] = done.ok(k) ? row(at_image[k], "embedding", done.embedding[static_cast<int64_t>(k)]) + "}"
                                            : failed(batch[at_image[k]].request.id, done.errors[k]);
      }
    } catch (const std::exception& e) {  // not for bad items: out of memory, a device that is gone
      for (size_t i = 0; i < batch.size(); ++i)
        if (answers[i].empty()) answers[i] = failed(batch[i].request.id, mmembed::reason(e));
    }
    for (size_t i = 0; i < batch.size(); ++i) batch[i].answer.set_value(std::move(answers[i]));
  }

  const Embedder& emb_;
  const std::chrono::milliseconds wait_;
  const size_t limit_;
  bool stop_ = false;
  std::deque<Job> jobs_;
  std::mutex mutex_;
  std::condition_variable arrived_, taken_;
  std::thread thread_;
};

// Answers of one caller in the order of its lines; `write` returns false when the caller has gone.
template <class Next, class Write>
void converse(Batcher& batcher, bool files, Next next, Write write) {
  std::deque<std::future<std::string>> waiting;
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false, gone = false;
  std::thread writer([&] {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return done || !waiting.empty(); });
      if (waiting.empty()) return;
      auto answer = std::move(waiting.front());
      waiting.pop_front();
      lock.unlock();
      const bool sent = write(answer.get() + "\n");
      lock.lock();
      gone = gone || !sent;
      changed.notify_all();
    }
  });
  std::string line;
  while (next(line)) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    std::future<std::string> answer;
    try {
      answer = batcher.ask(read_request(line, files));
    } catch (const std::exception& e) {
      std::promise<std::string> at_once;
      at_once.set_value(failed("null", e.what()));
      answer = at_once.get_future();
    }
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return gone || waiting.size() < 1024; });
    if (gone) break;
    waiting.push_back(std::move(answer));
    changed.notify_all();
  }
  { std::lock_guard lock(mutex); done = true; }
  changed.notify_all();
  writer.join();
}

// Lines of a socket, none longer than `longest` bytes.
class Lines {
 public:
  Lines(int socket, size_t longest) : socket_(socket), longest_(longest) {}
  bool operator()(std::string& line) {
    size_t at, from = 0;
    while ((at = buffer_.find('\n', from)) == std::string::npos) {
      if (buffer_.size() > longest_) return false;
      from = buffer_.size();
      char chunk[65536];
      const ssize_t n = recv(socket_, chunk, sizeof chunk, 0);
      if (n <= 0) return false;
      buffer_.append(chunk, static_cast<size_t>(n));
    }
    line = buffer_.substr(0, at);
    buffer_.erase(0, at + 1);
    return true;
  }

 private:
  int socket_;
  size_t longest_;
  std::string buffer_;
};

int listen_on(int port) {
  const int server = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
  setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  if (bind(server, reinterpret_cast<sockaddr*>(&address), sizeof address) || listen(server, 64))
    throw Error("--port " + std::to_string(port) + ": " + std::strerror(errno));
  socklen_t size = sizeof address;
  getsockname(server, reinterpret_cast<sockaddr*>(&address), &size);
  std::fprintf(stderr, "listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
  return server;
}

int run(int argc, char** argv) {
  std::string model;
  mmembed::Options options;
  options.batch_size = 16;
  int port = -1, wait = 2;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    auto value = [&] {
      char* end = nullptr;
      const long n = i + 1 < argc ? std::strtol(argv[++i], &end, 10) : -1;
      if (n < 0 || !end || *end) throw Error(a + " wants a whole number");
      return static_cast<int>(n);
    };
    if (a == "--port") port = value();
    else if (a == "--batch") options.batch_size = value();
    else if (a == "--wait-ms") wait = value();
    else if (a == "--threads") options.threads = value();
    else if (a == "--decoders") options.decoders = value();
    else if (a == "--device" && i + 1 < argc) options.device = torch::Device(argv[++i]);
    else if (a.rfind("--", 0) == 0 || !model.empty()) throw Error("unknown option " + a);
    else model = a;
  }
  if (model.empty()) {
    std::fputs("usage: example_server MODEL [--port N] [--batch N] [--wait-ms N] [--threads N] [--decoders N] [--device D]\n", stderr);
    return 2;
  }
  std::signal(SIGPIPE, SIG_IGN);
  const Embedder emb(model, options);
  emb.warmup({1, options.batch_size});
  Batcher batcher(emb, std::chrono::milliseconds(wait), 4096);
  if (port < 0) {
    converse(batcher, true, [](std::string& line) { return static_cast<bool>(std::getline(std::cin, line)); },
             [](const std::string& line) { return std::fputs(line.c_str(), stdout) >= 0 && std::fflush(stdout) == 0; });
    return 0;
  }
  const int server = listen_on(port);
  while (true) {
    const int caller = accept(server, nullptr, nullptr);
    if (caller < 0) continue;
    std::thread([&batcher, caller] {
      converse(batcher, false, Lines(caller, 64u << 20), [caller](const std::string& line) {
        for (size_t sent = 0; sent < line.size();) {
          const ssize_t n = send(caller, line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
          if (n <= 0) return false;
          sent += static_cast<size_t>(n);
        }
        return true;
      });
      close(caller);
    }).detach();
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "example_server: %s\n", mmembed::reason(e).c_str());
    return 2;
  }
}
