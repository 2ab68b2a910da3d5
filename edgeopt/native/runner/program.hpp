// The parts of the runner program (main.cpp) and what they share.

#ifndef EDGEOPT_PROGRAM_HPP_
#define EDGEOPT_PROGRAM_HPP_

#include <chrono>
#include <string>
#include <vector>

#include "edgeopt_model.hpp"

namespace edgeopt {

// The command line was wrong: exit code 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

struct Arguments {
  std::string model;
  int threads = 1;
  bool serve = false;
  bool mark = false;
  std::vector<std::string> inputs;  // [NAME=]FILE:DTYPE:SIZES each
  std::string output_directory;
  int warmup = 0;
  int runs = 0;
  std::string json;
};

// Answers requests until stdin ends (serve.cpp). Returns the exit code.
int serve(const Arguments& arguments);

// Runs the model on files (once.cpp). Throws Error.
void run_once(const Arguments& arguments);

// Milliseconds that `action` takes.
template <typename Action>
double milliseconds(const Action& action) {
  const auto begin = std::chrono::steady_clock::now();
  action();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

// "float32:1,3,224,224" -> a type and a shape; no sizes for a scalar. Throws Error.
TensorInfo parse_type(const std::string& text);

// JSON text.
std::string quoted(const std::string& text);
std::string json_of(double value);
std::string json_of(const Shape& shape);
std::string json_of(const std::vector<TensorInfo>& infos);

}  // namespace edgeopt

#endif  // EDGEOPT_PROGRAM_HPP_
