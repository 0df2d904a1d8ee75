// Makes the fake driver of fake_cuda.c run kernels: NVRTC's part compiles their texts with g++ and the emulation of simt.hpp,
// a "cubin" is the library that comes out, and a launch runs it by simt_runtime.cpp. Both are linked together with this.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <mutex>
#include <regex>
#include <string>

#include "simt.hpp"

namespace {

// How to compile is known when this is compiled, so that any process that opens the library can: CPU_COMMAND, the
// compiler with its flags; CPU_HEADER, the path of simt.hpp; CPU_FOLDER, for files.
const std::string command = CPU_COMMAND, header = CPU_HEADER, folder = CPU_FOLDER;
std::atomic<int> compiled;

std::string slurp(const std::string& path) {
  std::string text;
  if (FILE* file = fopen(path.c_str(), "rb")) {
    char buffer[65536];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
    fclose(file);
  }
  return text;
}
void spill(const std::string& path, const void* bytes, size_t count) {
  FILE* file = fopen(path.c_str(), "wb");
  if (!file) abort();
  fwrite(bytes, 1, count, file);
  fclose(file);
}
char* copied(const std::string& text) {
  char* bytes = (char*)malloc(text.size() + 1);
  memcpy(bytes, text.c_str(), text.size() + 1);
  return bytes;
}

struct Function {
  int (*parameters)(int*);
  int (*sharedBytes)();
  void (*launch)(const SimtLaunch*, SimtFault*);
  int count, codes[128];
};

}  // namespace

extern "C" {

// Returns whether it compiles: the image, or the compiler's words.
int cpu_compile(const char* text, const char* name, char** image, uint64_t* bytes, char** log) {
  static std::mutex compiling;  // several threads call
  const std::lock_guard<std::mutex> lock(compiling);
  static std::map<std::string, std::string> known;  // what this process has compiled, by the text
  const auto before = known.find(text);
  if (before != known.end()) return *image = copied(before->second), *bytes = before->second.size(), 1;
  const std::string stem = folder + "/kernel" + std::to_string(getpid()) + "_" + std::to_string(compiled++);
  std::string body = text, exports;
  static const std::regex entry("extern \"C\" __global__ void(?: __launch_bounds__\\([^)]*\\))?\\s+(\\w+)\\(");
  for (std::sregex_iterator at(body.begin(), body.end(), entry), end; at != end; ++at) {
    exports += "SIMT_EXPORT_NAMED(" + (*at)[1].str() + ", _" + (*at)[1].str() + ")\n";
  }
  std::string source = "#include \"" + header + "\"\nnamespace {\n#line 1 \"" + name + "\"\n" + body + "\n}\n" + exports;
  spill(stem + ".cpp", source.data(), source.size());
  const int status = system((command + " " + stem + ".cpp -o " + stem + ".so 2> " + stem + ".log").c_str());
  if (status != 0) return *log = copied(slurp(stem + ".log")), 0;
  const std::string& library = known[text] = slurp(stem + ".so");
  *image = copied(library);
  *bytes = library.size();
  return 1;
}

// An ELF file ends with its section headers.
void* cpu_load(const void* image) {
  const unsigned char* elf = (const unsigned char*)image;
  if (memcmp(elf, "\177ELF", 4) != 0) return nullptr;
  uint64_t at;
  uint16_t size, count;
  memcpy(&at, elf + 40, 8), memcpy(&size, elf + 58, 2), memcpy(&count, elf + 60, 2);
  const std::string path = folder + "/module" + std::to_string(getpid()) + "_" + std::to_string(compiled++) + ".so";
  spill(path, image, at + (uint64_t)size * count);
  void* module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!module) fprintf(stderr, "%s\n", dlerror());
  unlink(path.c_str());
  return module;
}
void cpu_unload(void* module) { dlclose(module); }

void* cpu_function(void* module, const char* name) {
  const auto symbol = [&](const char* stem) { return dlsym(module, (std::string(stem) + "_" + name).c_str()); };
  Function* function = new Function;
  function->parameters = (int (*)(int*))symbol("simtParameters");
  function->sharedBytes = (int (*)())symbol("simtSharedBytes");
  function->launch = (void (*)(const SimtLaunch*, SimtFault*))symbol("simtLaunch");
  if (!function->launch) return delete function, nullptr;
  function->count = function->parameters(function->codes);
  return function;
}
void cpu_forget(void* function) { delete (Function*)function; }
int cpu_shared(void* function) { return ((Function*)function)->sharedBytes(); }

// How many bytes of arguments a kernel takes; its parameters lie one behind the other, at multiples of their size.
int cpu_argument_bytes(void* opaque) {
  const Function* function = (Function*)opaque;
  int at = 0;
  for (int i = 0; i < function->count; i++) {
    const char kind = (char)(function->codes[i] & 0xff);
    const int size = kind == 'p' || kind == 'l' ? 8 : 4;
    at = (at + size - 1) / size * size + size;
  }
  return at;
}

// Returns 0, or what went wrong as a number of simt_runtime.cpp's.
int cpu_launch(void* opaque, const uint32_t* grid, const uint32_t* block, uint32_t shared, unsigned char* arguments) {
  const Function* function = (Function*)opaque;
  void* pointers[128];
  int at = 0;
  for (int i = 0; i < function->count; i++) {
    const char kind = (char)(function->codes[i] & 0xff);
    const int size = kind == 'p' || kind == 'l' ? 8 : 4;
    at = (at + size - 1) / size * size;
    pointers[i] = arguments + at;
    at += size;
  }
  SimtLaunch launch;
  for (int i = 0; i < 3; i++) launch.grid[i] = (int)grid[i], launch.block[i] = (int)block[i];
  launch.sharedBytes = (int)shared;
  launch.arguments = pointers;
  SimtFault fault;
  function->launch(&launch, &fault);
  return fault.code;
}
}
