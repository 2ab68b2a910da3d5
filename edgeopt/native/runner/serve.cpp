// The runner as a server: requests on stdin, answers on stdout. The protocol is in main.cpp.

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <new>
#include <optional>
#include <sstream>

#include "mark.hpp"
#include "program.hpp"

namespace edgeopt {
namespace {

// Longer than any request of ours; a line that goes on and on must not fill the memory.
constexpr std::size_t kLongestLine = 1 << 20;

// The stream that answers go to. Whatever a runtime's library prints to stdout from now on lands on stderr, where it
// can't be mistaken for an answer.
std::FILE* claim_stdout() {
  std::fflush(stdout);
  const int own = dup(STDOUT_FILENO);
  if (own < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) throw Error("can't set up stdout");
  std::FILE* stream = fdopen(own, "wb");
  if (stream == nullptr) throw Error("can't set up stdout");
  return stream;
}

void answer(std::FILE* out, const std::string& json) {
  std::fprintf(out, "%s\n", json.c_str());
  std::fflush(out);
}

std::string error_json(const std::string& reason) { return "{\"error\": " + quoted(reason) + "}"; }

// A line without its end; nothing at the end of the input.
std::optional<std::string> read_line(std::FILE* in) {
  std::string line;
  for (int letter = std::fgetc(in); letter != EOF; letter = std::fgetc(in)) {
    if (letter == '\n') return line;
    if (line.size() == kLongestLine) throw Error("the request's first line is too long");
    line += static_cast<char>(letter);
  }
  if (!line.empty()) throw Error("the input ends within a request");
  return std::nullopt;
}

// "run TYPE:SIZES ..." -> what follows it on the stream.
std::vector<TensorInfo> parse_request(const std::string& line) {
  std::istringstream words(line);
  std::string word;
  if (!(words >> word) || word != "run") throw Error("a request begins with 'run'");
  std::vector<TensorInfo> tensors;
  while (words >> word) tensors.push_back(parse_type(word));
  return tensors;
}

void read_exactly(std::FILE* in, unsigned char* to, std::size_t bytes) {
  if (std::fread(to, 1, bytes, in) != bytes) throw Error("the input ends within a request");
}

void skip(std::FILE* in, std::size_t bytes) {
  unsigned char block[1 << 16];
  while (bytes > 0) {
    const std::size_t part = std::min(bytes, sizeof block);
    read_exactly(in, block, part);
    bytes -= part;
  }
}

// The values of a request. Where they don't fit into memory they are read all the same, so that the stream stays in
// step, and `problem` says so.
std::vector<Tensor> read_tensors(std::FILE* in, const std::vector<TensorInfo>& announced, std::string& problem) {
  std::vector<Tensor> tensors;
  for (const TensorInfo& info : announced) {
    Tensor tensor;
    try {
      tensor = make_tensor(info.dtype, info.shape);
    } catch (const std::bad_alloc&) {
      problem = "the request does not fit into memory";
      skip(in, elements_of(info.shape) * size_of(info.dtype));
      continue;
    }
    read_exactly(in, tensor.data.data(), tensor.data.size());
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

void send(std::FILE* out, const std::vector<Tensor>& outputs, double spent) {
  std::string json = "{\"ms\": " + json_of(spent) + ", \"outputs\": [";
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    json += std::string(i > 0 ? ", " : "") + "{\"dtype\": \"" + name_of(outputs[i].dtype) +
            "\", \"shape\": " + json_of(outputs[i].shape) + "}";
  }
  std::fprintf(out, "%s]}\n", json.c_str());
  for (const Tensor& output : outputs) std::fwrite(output.data.data(), 1, output.data.size(), out);
  std::fflush(out);
}

void answer_request(Model& model, std::FILE* in, std::FILE* out, const std::vector<TensorInfo>& announced, bool mark) {
  std::string problem;
  const std::vector<Tensor> inputs = read_tensors(in, announced, problem);
  if (!problem.empty()) return answer(out, error_json(problem));
  std::vector<Tensor> outputs;
  double spent = 0;
  try {
    spent = milliseconds([&] {
      const Mark marked(mark);
      outputs = model.run(inputs);
    });
  } catch (const std::exception& error) {
    return answer(out, error_json(error.what()));
  }
  send(out, outputs, spent);
}

}  // namespace

int serve(const Arguments& arguments) {
  std::FILE* out = claim_stdout();
  std::unique_ptr<Model> model;
  double load_ms = 0;
  try {
    load_ms = milliseconds([&] { model = Model::open(arguments.model, arguments.threads); });
  } catch (const std::exception& error) {
    answer(out, error_json(error.what()));
    return 1;
  }
  answer(out, "{\"ready\": true, \"inputs\": " + json_of(model->inputs()) + ", \"outputs\": " +
                  json_of(model->outputs()) + ", \"load_ms\": " + json_of(load_ms) + "}");
  try {
    while (const auto line = read_line(stdin)) {
      answer_request(*model, stdin, out, parse_request(*line), arguments.mark);
      if (std::ferror(out) != 0) throw Error("nobody reads the answers");
    }
  } catch (const std::exception& error) {
    // Without its first line nobody knows where the next request begins.
    answer(out, error_json(error.what()));
    return 2;
  }
  return 0;
}

}  // namespace edgeopt
