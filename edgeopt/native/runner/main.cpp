// edgeopt-runner: runs one model file, in a phone or in what stands in for one.
//
//     edgeopt-runner MODEL [--threads N] [--mark] --serve
//     edgeopt-runner MODEL [--threads N] [--mark] --input [NAME=]FILE:TYPE:SIZES ... [--output-dir DIR]
//                    [--warmup W] [--runs R] [--json FILE]
//
// Which formats it runs depends on the implementation of edgeopt::Model that it was linked with. Exit codes: 0 good,
// 1 the model can't be opened or run (one line on stderr), 2 wrong usage. --mark surrounds every inference with the
// system call of mark.hpp.
//
// On files: inputs are raw little-endian numbers in C order, in the order of the file's inputs where they have no
// NAME. SIZES are joined by commas and empty for a scalar: "x=pixels.bin:uint8:1,224,224,3". The first inference is
// timed as the cold one, W more warm up, R more are timed. DIR, which must exist, gets output_<k>.bin; FILE gets
//
//     {"load_ms", "first_ms", "latencies_ms": [...], "peak_kb", "outputs": [{"name", "dtype", "shape", "file"}]}
//
// As a server it first writes one line of JSON, ended by "\n":
//
//     {"ready": true, "inputs": [{"name", "dtype", "shape"}], "outputs": [...], "load_ms"}    shapes: see TensorInfo
//     {"error": "..."}    the file can't be opened; it then exits with 1
//
// and then answers requests until stdin ends, when it exits with 0. A request is one line of text, then the values of
// all inputs in that order, without anything between them:
//
//     run TYPE:SIZES TYPE:SIZES ...\n
//     <raw bytes of input 0><raw bytes of input 1>...
//
// So the number of bytes follows from the line. The answer is one line of JSON, then the values of all outputs:
//
//     {"ms": 12.5, "outputs": [{"dtype", "shape"}, ...]}\n
//     <raw bytes of output 0>...
//
// or {"error": "..."} and nothing more, where the inputs don't fit or the runtime fails; the next request may follow.
// After a first line that can't be read, or an end within a request, it answers with an error and exits with 2.
// Sizes of free dimensions may change from one request to the next. Whatever libraries print goes to stderr.

#include <cstdio>
#include <exception>
#include <string>

#include "program.hpp"

namespace edgeopt {
namespace {

constexpr const char* kUsage =
    "usage: edgeopt-runner MODEL [--threads N] [--mark] (--serve | --input [NAME=]FILE:TYPE:SIZES ... "
    "[--output-dir DIR] [--warmup W] [--runs R] [--json FILE])";

int parse_count(const std::string& flag, const std::string& text, int least) {
  const bool digits = !text.empty() && text.size() <= 7 && text.find_first_not_of("0123456789") == std::string::npos;
  const int value = digits ? std::stoi(text) : -1;
  if (value < least) throw UsageError(flag + " takes a number of at least " + std::to_string(least));
  return value;
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  std::size_t next = 0;
  const auto value_of = [&](const std::string& flag) {
    if (next == words.size()) throw UsageError(flag + " lacks its value");
    return words[next++];
  };
  while (next < words.size()) {
    const std::string word = words[next++];
    if (word == "--serve") {
      arguments.serve = true;
    } else if (word == "--mark") {
      arguments.mark = true;
    } else if (word == "--threads") {
      arguments.threads = parse_count(word, value_of(word), 1);
    } else if (word == "--warmup") {
      arguments.warmup = parse_count(word, value_of(word), 0);
    } else if (word == "--runs") {
      arguments.runs = parse_count(word, value_of(word), 0);
    } else if (word == "--input") {
      arguments.inputs.push_back(value_of(word));
    } else if (word == "--output-dir") {
      arguments.output_directory = value_of(word);
    } else if (word == "--json") {
      arguments.json = value_of(word);
    } else if (word.rfind("--", 0) == 0 || !arguments.model.empty()) {
      throw UsageError("unknown argument " + word);
    } else {
      arguments.model = word;
    }
  }
  if (arguments.model.empty()) throw UsageError("no model file is named");
  const bool files = !arguments.inputs.empty() || !arguments.output_directory.empty() || !arguments.json.empty();
  if (arguments.serve && files) throw UsageError("--serve takes no files");
  return arguments;
}

}  // namespace
}  // namespace edgeopt

int main(int count, char** words) {
  try {
    const auto arguments = edgeopt::parse(std::vector<std::string>(words + 1, words + count));
    if (arguments.serve) return edgeopt::serve(arguments);
    edgeopt::run_once(arguments);
    return 0;
  } catch (const edgeopt::UsageError& error) {
    std::fprintf(stderr, "edgeopt-runner: %s\n%s\n", error.what(), edgeopt::kUsage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "edgeopt-runner: %s\n", error.what());
    return 1;
  }
}
