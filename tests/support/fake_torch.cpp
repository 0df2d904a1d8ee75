// A libtorch without PyTorch, for tests: the functions of its C shim that ffi/cuda/torch.ts and fake_flash_attn3.cpp call, with
// a dispatcher for operators of tensors, numbers and options of these.
//
// As the real one does, a call uses up the tensors on the stack and deletes the values of options that are there; results are
// the caller's; what an operator throws ends the call with status 1. What is made is counted until it is gone. With SINCE_2_13
// it has the functions that PyTorch has from 2.13 on; with LACKS_IMPL it has none to register an operator's body with.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <vector>

using u64 = uint64_t;
using Body = void (*)(u64* stack, u64 arguments, u64 results);

namespace {

enum { BFLOAT16 = 15, FLOAT8_E4M3FN = 24, FLOAT32 = 6, CUDA = 1 };

struct Tensor {
  void* data = nullptr;
  int32_t dtype = 0;
  bool owns = false;
  std::vector<int64_t> sizes, strides;
};
struct Guard { u64 before; };
struct Library { std::string name; };
struct Argument { bool tensor, optional; };
struct Operator {
  std::vector<Argument> arguments;
  u64 results;
  Body body = nullptr;
};

std::map<std::string, Operator> operators;
std::string report, failing, raised;
int alive, failAfter;
u64 current;

// Runs `body`, or fails where the test has asked for it.
template <typename F> int call(const char* name, F body) {
  try {
    if (failing == name && failAfter-- == 0) {
      failing.clear();
      throw std::string(name) + " was told to fail\nand there is more to say";
    }
    body();
    return 0;
  } catch (const std::string& text) {
    raised = text;
  } catch (const std::exception& error) {
    raised = error.what();
  }
  return 1;
}

template <typename T> T* made(T* object) {
  alive++;
  return object;
}

// Which arguments are tensors, which may be None, and how many results there are.
Operator parse(const std::string& schema) {
  Operator op;
  size_t arrow = schema.find("->");
  for (size_t at = schema.find('(') + 1; at < arrow;) {
    size_t end = std::min(schema.find(',', at), arrow);
    std::string type = schema.substr(at, schema.find(' ', at) - at);
    op.arguments.push_back({type.compare(0, 6, "Tensor") == 0, type.back() == '?'});
    at = end + 1;
  }
  op.results = 1;
  for (char c : schema.substr(arrow)) op.results += c == ',';
  return op;
}

void dispatch(const Operator& op, u64* stack) {
  u64 values[64] = {};
  for (size_t i = 0; i < op.arguments.size(); i++) {
    values[i] = stack[i];
    if (!op.arguments[i].optional || stack[i] == 0) continue;
    u64* given = (u64*)stack[i];
    values[i] = (u64) new u64(*given);
    delete given;
  }
  op.body(values, op.arguments.size(), op.results);
  memcpy(stack, values, op.results * sizeof(u64));
}

}  // namespace

extern "C" {

// -- for the tests -----------------------------------------------------------------------------------------------

void fake_torch_reset(void) {
  report.clear(), failing.clear(), raised.clear();
  alive = 0;
}
// The next call of this function but `after` fails.
void fake_torch_fail(const char* name, int after) { failing = name, failAfter = after; }
int fake_torch_alive(void) { return alive; }
const char* fake_torch_report(void) { return report.c_str(); }
void fake_torch_note(const char* line) { report += line; }

// -- versions and enumerations -----------------------------------------------------------------------------------

#ifdef SINCE_2_13
u64 aoti_torch_abi_version(void) { return 2ull << 56 | 13ull << 48; }
const char* torch_exception_get_what_without_backtrace(void) { return raised.c_str(); }
int torch_new_stable_ivalue(u64** value) {
  return call(__func__, [&] { *value = new u64; });
}
#else
u64 aoti_torch_abi_version(void) { return 2ull << 56 | 11ull << 48 | 1ull << 40; }
#endif
int32_t aoti_torch_device_type_cuda(void) { return CUDA; }
int32_t aoti_torch_dtype_bfloat16(void) { return BFLOAT16; }
int32_t aoti_torch_dtype_float8_e4m3fn(void) { return FLOAT8_E4M3FN; }
int32_t aoti_torch_dtype_float32(void) { return FLOAT32; }

// -- tensors and streams -----------------------------------------------------------------------------------------

int aoti_torch_create_tensor_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                       int64_t offset, int32_t dtype, int32_t type, int32_t, Tensor** result) {
  return call(__func__, [&] {
    if (offset != 0 || type != CUDA) throw std::string("a tensor elsewhere");
    *result = made(new Tensor{data, dtype, false, {sizes, sizes + dims}, {strides, strides + dims}});
  });
}
int aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                             int32_t, Tensor** result) {
  *result = made(new Tensor{malloc(16), dtype, true, {sizes, sizes + dims}, {strides, strides + dims}});
  return 0;
}
int aoti_torch_new_uninitialized_tensor(Tensor** result) {
  *result = made(new Tensor);
  return 0;
}
int aoti_torch_delete_tensor_object(Tensor* tensor) {
  return call(__func__, [&] {
    if (tensor->owns) free(tensor->data);
    delete tensor;
    alive--;
  });
}
int aoti_torch_get_data_ptr(Tensor* tensor, void** result) { *result = tensor->data; return 0; }
int aoti_torch_get_dtype(Tensor* tensor, int32_t* result) { *result = tensor->dtype; return 0; }
int aoti_torch_get_device_type(Tensor*, int32_t* result) { *result = CUDA; return 0; }
int aoti_torch_get_dim(Tensor* tensor, int64_t* result) { *result = (int64_t)tensor->sizes.size(); return 0; }
int aoti_torch_get_size(Tensor* tensor, int64_t dim, int64_t* result) { *result = tensor->sizes[dim]; return 0; }
int aoti_torch_get_stride(Tensor* tensor, int64_t dim, int64_t* result) { *result = tensor->strides[dim]; return 0; }

int aoti_torch_create_cuda_stream_guard(u64 stream, int32_t, Guard** result) {
  return call(__func__, [&] {
    *result = made(new Guard{current});
    current = stream;
  });
}
int aoti_torch_delete_cuda_stream_guard(Guard* guard) {
  return call(__func__, [&] {
    current = guard->before;
    delete guard;
    alive--;
  });
}
int aoti_torch_get_current_cuda_stream(int32_t, u64* stream) { *stream = current; return 0; }

// -- operators ---------------------------------------------------------------------------------------------------

int aoti_torch_library_init_def(const char* name, const char*, uint32_t, Library** result) {
  *result = new Library{name};
  return 0;
}
int aoti_torch_library_def(Library* self, const char* schema) {
  std::string text = schema;
  operators[self->name + "::" + text.substr(0, text.find('('))] = parse(text);
  return 0;
}
int aoti_torch_library_init_impl(const char* name, const char*, const char*, uint32_t, Library** result) {
  *result = new Library{name};
  return 0;
}
#ifndef LACKS_IMPL
int torch_library_impl(Library* self, const char* name, Body body, u64) {
  operators[self->name + "::" + name].body = body;
  return 0;
}
#endif
int aoti_torch_delete_library_object(Library* library) { delete library; return 0; }

int aoti_torch_call_dispatcher(const char* name, const char* overload, u64* stack) {
  return call(__func__, [&] {
    if (overload[0] || !operators.count(name)) throw "Could not find schema for " + std::string(name) + ".";
    dispatch(operators[name], stack);
  });
}

}  // extern "C"
