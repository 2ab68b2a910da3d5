// The runner on files: one cold inference, some to warm up, some to time; outputs and figures to files.

#include <sys/resource.h>

#include <cstdio>
#include <memory>

#include "mark.hpp"
#include "program.hpp"

namespace edgeopt {
namespace {

struct Closer {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Closer>;

// Where an input goes, and what it is read from.
struct InputFile {
  std::size_t index;
  std::string path;
  TensorInfo type;
};

// [NAME=]FILE:TYPE:SIZES. Names and paths may hold "=" and ":", so the type is taken from the end, and only what the
// model calls an input counts as a name.
InputFile parse_input(const std::string& text, const std::vector<TensorInfo>& infos, std::size_t position) {
  const std::size_t last = text.rfind(':');
  const std::size_t middle = last == std::string::npos || last == 0 ? std::string::npos : text.rfind(':', last - 1);
  if (middle == std::string::npos) throw UsageError("--input " + text + " is not [NAME=]FILE:TYPE:SIZES");
  InputFile input{position, text.substr(0, middle), {}};
  try {
    input.type = parse_type(text.substr(middle + 1));
  } catch (const Error& error) {
    throw UsageError("--input " + text + ": " + error.what());
  }
  std::size_t longest = 0;
  for (std::size_t i = 0; i < infos.size(); ++i) {
    const std::string start = infos[i].name + "=";
    if (start.size() > 1 && start.size() > longest && text.compare(0, start.size(), start) == 0) {
      longest = start.size();
      input.index = i;
    }
  }
  input.path.erase(0, longest);
  return input;
}

Tensor read_tensor(const InputFile& input) {
  const File file(std::fopen(input.path.c_str(), "rb"));
  if (!file) throw Error("can't read " + input.path);
  Tensor tensor = make_tensor(input.type.dtype, input.type.shape);
  const std::size_t got = std::fread(tensor.data.data(), 1, tensor.data.size(), file.get());
  if (got != tensor.data.size() || std::fgetc(file.get()) != EOF) {
    throw Error(input.path + " does not have the " + std::to_string(tensor.data.size()) +
                " bytes that its shape and type need");
  }
  return tensor;
}

std::vector<Tensor> read_inputs(const Arguments& arguments, const std::vector<TensorInfo>& infos) {
  if (arguments.inputs.size() != infos.size()) {
    throw Error("got " + std::to_string(arguments.inputs.size()) + " inputs, the model takes " +
                std::to_string(infos.size()));
  }
  std::vector<Tensor> inputs(infos.size());
  std::vector<bool> given(infos.size(), false);
  for (std::size_t i = 0; i < arguments.inputs.size(); ++i) {
    const InputFile input = parse_input(arguments.inputs[i], infos, i);
    if (given[input.index]) throw UsageError("input " + std::to_string(input.index) + " is given twice");
    given[input.index] = true;
    inputs[input.index] = read_tensor(input);
  }
  return inputs;
}

void write_file(const std::string& path, const void* data, std::size_t bytes) {
  File file(std::fopen(path.c_str(), "wb"));
  const bool written = file && std::fwrite(data, 1, bytes, file.get()) == bytes;
  // Some file systems tell of a full disk only now.
  if (!written || std::fclose(file.release()) != 0) throw Error("can't write " + path);
}

// The most memory that the process has held, in KiB.
long peak_kb() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
  return usage.ru_maxrss / 1024;
#else
  return usage.ru_maxrss;
#endif
}

// Writes the outputs; returns how the figures list them.
std::string write_outputs(const Model& model, const std::vector<Tensor>& outputs, const std::string& directory) {
  std::string json = "[";
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const std::string name = "output_" + std::to_string(i) + ".bin";
    write_file(directory + "/" + name, outputs[i].data.data(), outputs[i].data.size());
    json += std::string(i > 0 ? ", " : "") + "{\"name\": " + quoted(model.outputs()[i].name) + ", \"dtype\": \"" +
            name_of(outputs[i].dtype) + "\", \"shape\": " + json_of(outputs[i].shape) + ", \"file\": " + quoted(name) +
            "}";
  }
  return json + "]";
}

}  // namespace

void run_once(const Arguments& arguments) {
  std::unique_ptr<Model> model;
  const double load_ms = milliseconds([&] { model = Model::open(arguments.model, arguments.threads); });
  const std::vector<Tensor> inputs = read_inputs(arguments, model->inputs());
  std::vector<Tensor> outputs;
  const auto run = [&] {
    const Mark marked(arguments.mark);
    outputs = model->run(inputs);
  };
  const double first_ms = milliseconds(run);
  for (int i = 0; i < arguments.warmup; ++i) run();
  std::string latencies = "[";
  for (int i = 0; i < arguments.runs; ++i) latencies += (i > 0 ? ", " : "") + json_of(milliseconds(run));
  const long peak = peak_kb();  // before files are written
  const std::string written =
      arguments.output_directory.empty() ? "[]" : write_outputs(*model, outputs, arguments.output_directory);
  const std::string json = "{\"load_ms\": " + json_of(load_ms) + ", \"first_ms\": " + json_of(first_ms) +
                           ", \"latencies_ms\": " + latencies + "], \"peak_kb\": " + std::to_string(peak) +
                           ", \"outputs\": " + written + "}\n";
  if (!arguments.json.empty()) write_file(arguments.json, json.data(), json.size());
}

}  // namespace edgeopt
