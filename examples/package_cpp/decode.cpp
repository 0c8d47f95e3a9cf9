// Decodes greedily with a package of accelpass, without Python: decode FILE NEW TOKEN...
//
// The two libraries are loaded by torch's own loader. What they do not hold lies beside them in the same file: the weights, which
// are mapped into memory and read where they are, and layout.txt, which says what goes where. The hashes of the manifest are not
// checked here; accelpass.open does.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

using Constants = std::unordered_map<std::string, at::Tensor>;

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"int8", at::kChar},
      {"uint8", at::kByte},    {"int32", at::kInt},    {"int64", at::kLong},        {"bool", at::kBool}};
  auto found = known.find(name);
  if (found == known.end()) throw std::runtime_error("a dtype that this example does not know: " + name);
  return found->second;
}

// What layout.txt says, with the weights as tensors over the mapped file.
struct Layout {
  int64_t capacity = 0, batch = 0;
  std::map<std::string, size_t> logits;
  std::vector<at::Tensor> states;
  std::map<std::string, Constants> constants;

  Layout(const std::string& text, char* weights) {
    std::istringstream lines(text);
    std::unordered_map<std::string, at::Tensor> tensors;
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::string kind, name, dtype;
      words >> kind;
      if (kind == "decoder") {
        words >> capacity >> batch;
      } else if (kind == "logits") {
        words >> name;
        words >> logits[name];
      } else if (kind == "state") {
        double fill;
        words >> dtype >> fill;
        states.push_back(at::full(sizes(words), fill, at::dtype(dtype_of(dtype))));
      } else if (kind == "weight") {
        int64_t offset;
        words >> name >> dtype >> offset;
        tensors[name] = at::from_blob(weights + offset, sizes(words), at::dtype(dtype_of(dtype)));
      } else if (kind == "constant") {
        std::string weight;
        words >> name >> dtype >> weight;  // the graph, and what its library calls the weight
        constants[name][dtype] = tensors.at(weight);
      }
    }
  }

  static std::vector<int64_t> sizes(std::istringstream& words) {
    std::vector<int64_t> found;
    for (int64_t size; words >> size;) found.push_back(size);
    return found;
  }
};

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "decode FILE NEW TOKEN TOKEN...: a package of a decoder, how many tokens to make, a prompt of two or more\n";
    return 2;
  }
  const std::string path = argv[1];
  caffe2::serialize::PyTorchStreamReader archive(path);
  auto [text, length] = archive.getRecord("data/accelpass/layout.txt");
  const size_t start = archive.getRecordOffset("data/accelpass/weights.bin");
  const int file = open(path.c_str(), O_RDONLY);
  struct stat about;
  fstat(file, &about);
  void* mapped = mmap(nullptr, about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  Layout layout(std::string(static_cast<char*>(text.get()), length), static_cast<char*>(mapped) + start);

  torch::inductor::AOTIModelPackageLoader prompt(path, "prompt"), decode(path, "decode");
  prompt.get_runner()->update_constant_buffer(layout.constants["prompt"], false, true, /*user_managed=*/true);
  decode.get_runner()->update_constant_buffer(layout.constants["decode"], false, true, /*user_managed=*/true);

  const int64_t wanted = std::stoll(argv[2]);
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::stoll(argv[i]));
  const int64_t tokens = ids.size();
  if (tokens + wanted - 1 > layout.capacity) throw std::runtime_error("the package has room for fewer tokens");
  at::Tensor current = at::tensor(ids, at::kLong).unsqueeze(0).repeat({layout.batch, 1});
  for (int64_t made = 0; made < wanted; ++made) {
    std::vector<at::Tensor> inputs = {current};
    inputs.insert(inputs.end(), layout.states.begin(), layout.states.end());  // written in place
    const std::string graph = made == 0 ? "prompt" : "decode";
    at::Tensor logits = (made == 0 ? prompt : decode).run(inputs)[layout.logits[graph]];
    at::Tensor next = logits.select(1, -1).argmax(-1);
    std::cout << next[0].item<int64_t>() << (made + 1 < wanted ? " " : "\n") << std::flush;
    current = next.unsqueeze(1);
  }
  munmap(mapped, about.st_size);
  close(file);
}
