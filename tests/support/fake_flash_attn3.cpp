// FlashAttention-3's library as it looks from outside, for tests: it registers `fwd` with the schema of
// hopper/flash_api_stable.cpp through PyTorch's C shim (fake_torch.cpp's, or the real one), and refuses what that refuses and
// what we do not ask for. Instead of attending it fills `out` with ones.
//
// NAMESPACE: the operator's. SCHEMA_START: another text in front of the schema's options; OPTIONS_SHIFT: how many of them it
// adds. KEY: the dispatch key.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#ifndef NAMESPACE
#define NAMESPACE "fa3_fwd"
#endif
#ifndef SCHEMA_START
#define SCHEMA_START "fwd(Tensor q,Tensor k,Tensor v,"
#endif
#ifndef OPTIONS_SHIFT
#define OPTIONS_SHIFT 0
#endif
#ifndef KEY
#define KEY "CUDA"
#endif

using u64 = uint64_t;
struct Tensor;
struct Library;

extern "C" {
int32_t aoti_torch_dtype_bfloat16(void);
int32_t aoti_torch_dtype_float8_e4m3fn(void);
int32_t aoti_torch_dtype_float32(void);
int aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor**);
int aoti_torch_new_uninitialized_tensor(Tensor**);
int aoti_torch_delete_tensor_object(Tensor*);
int aoti_torch_get_data_ptr(Tensor*, void**);
int aoti_torch_get_dtype(Tensor*, int32_t*);
int aoti_torch_get_device_type(Tensor*, int32_t*);
int aoti_torch_get_dim(Tensor*, int64_t*);
int aoti_torch_get_size(Tensor*, int64_t, int64_t*);
int aoti_torch_get_stride(Tensor*, int64_t, int64_t*);
int aoti_torch_get_current_cuda_stream(int32_t, u64*);
int aoti_torch_library_init_def(const char*, const char*, uint32_t, Library**);
int aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, Library**);
int aoti_torch_library_def(Library*, const char*);
int torch_library_impl(Library*, const char*, void (*)(u64*, u64, u64), u64);
// Only fake_torch.cpp has it.
__attribute__((weak)) void fake_torch_note(const char*);
// Only Python has it.
void* PyModule_Create2(void*, int);
void* PyInit__C(void) { return PyModule_Create2(nullptr, 1013); }
}

namespace {

const char SCHEMA[] = SCHEMA_START
    "Tensor(k_new!)? k_new = None,Tensor(v_new!)? v_new = None,Tensor? q_v = None,Tensor(out!)? out = None,"
    "Tensor? cu_seqlens_q = None,Tensor? cu_seqlens_k = None,Tensor? cu_seqlens_k_new = None,"
    "Tensor? seqused_q = None,Tensor? seqused_k = None,int? max_seqlen_q = None,int? max_seqlen_k = None,"
    "Tensor? page_table = None,Tensor? kv_batch_idx = None,Tensor? leftpad_k = None,Tensor? rotary_cos = None,"
    "Tensor? rotary_sin = None,Tensor? seqlens_rotary = None,Tensor? q_descale = None,Tensor? k_descale = None,"
    "Tensor? v_descale = None,float? softmax_scale = None,bool is_causal = False,int window_size_left = -1,"
    "int window_size_right = -1,int attention_chunk = 0,float softcap = 0.0,bool is_rotary_interleaved = False,"
    "Tensor? scheduler_metadata = None,int num_splits = 0,bool? pack_gqa = None,int sm_margin = 0"
    ") -> (Tensor(out!), Tensor, Tensor, Tensor)";
enum { OUT = 6, SCALE = 23, CAUSAL, LEFT, RIGHT, CHUNK, SOFTCAP, INTERLEAVED, METADATA, SPLITS, PACK, MARGIN, ARGUMENTS };

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

struct View {
  Tensor* tensor;
  void* data;
  int32_t dtype;
  int64_t size[4], stride[4];

  explicit View(u64 handle) : tensor((Tensor*)handle) {
    int64_t dims;
    aoti_torch_get_dim(tensor, &dims);
    require(dims == 4, "a tensor has " + std::to_string(dims) + " dimensions");
    aoti_torch_get_data_ptr(tensor, &data);
    aoti_torch_get_dtype(tensor, &dtype);
    for (int i = 0; i < 4; i++) {
      aoti_torch_get_size(tensor, i, &size[i]);
      aoti_torch_get_stride(tensor, i, &stride[i]);
    }
  }
  ~View() { aoti_torch_delete_tensor_object(tensor); }
  View(const View&) = delete;

  std::string text() const {
    std::string all = dtype == aoti_torch_dtype_float8_e4m3fn() ? "f8" : dtype == aoti_torch_dtype_bfloat16() ? "bf16" : "?";
    for (int64_t s : size) all += " " + std::to_string(s);
    all += " /";
    for (int64_t s : stride) all += " " + std::to_string(s);
    return all;
  }
};

// The value of an option that is there.
u64 take(u64 option) {
  u64 value = *(u64*)option;
  delete (u64*)option;
  return value;
}
double asDouble(u64 bits) { return __builtin_bit_cast(double, bits); }

void fwd(u64* stack, u64 arguments, u64 results) {
  auto at = [&](int i) -> u64& { return stack[i < 3 ? i : i + OPTIONS_SHIFT]; };
  View q(at(0)), k(at(1)), v(at(2));
  require(arguments == ARGUMENTS + OPTIONS_SHIFT && results == 4, "another schema");
  require(at(OUT) != 0 && at(SCALE) != 0, "out and softmax_scale are not given");
  View out(take(at(OUT)));
  double scale = asDouble(take(at(SCALE)));
  for (int i = 3; i < SCALE; i++) require(i == OUT || at(i) == 0, "option " + std::to_string(i) + " is given");
  for (int i = 0; i < OPTIONS_SHIFT; i++) require(stack[3 + i] == 0, "an added option is given");
  bool defaults = at(CAUSAL) == 0 && (int64_t)at(LEFT) == -1 && (int64_t)at(RIGHT) == -1 && at(CHUNK) == 0 &&
                  asDouble(at(SOFTCAP)) == 0 && at(INTERLEAVED) == 0 && at(METADATA) == 0 && at(PACK) == 0 && at(MARGIN) == 0;
  require(defaults && at(SPLITS) == 1, "a number is not its default");

  require(q.dtype == k.dtype && q.dtype == v.dtype, "query, key and value must have the same dtype");
  require(out.dtype == aoti_torch_dtype_bfloat16(), "For FP8 input, output must have dtype BF16");
  require(k.size[1] == v.size[1] && q.size[0] == k.size[0] && q.size[2] == k.size[2], "sizes do not fit");
  for (const View* x : {&q, &k, &v, &out}) require(x->stride[3] == 1, "last dimension is not contiguous");
  for (int i = 0; i < 4; i++) require(out.size[i] == q.size[i], "out must have query's size");

  int64_t sizes[] = {q.size[0], q.size[2], q.size[1]}, strides[] = {q.size[2] * q.size[1], q.size[1], 1};
  Tensor *alias, *lse, *rest[2];
  int32_t device;
  aoti_torch_get_device_type(q.tensor, &device);
  aoti_torch_empty_strided(3, sizes, strides, aoti_torch_dtype_float32(), device, 0, &lse);
  for (Tensor*& none : rest) aoti_torch_new_uninitialized_tensor(&none);
  aoti_torch_new_uninitialized_tensor(&alias);
  for (int64_t i = 0; i < out.size[0] * out.size[1] * out.size[2] * out.size[3]; i++) {
    int64_t d = i % out.size[3], head = i / out.size[3] % out.size[2];
    int64_t token = i / (out.size[3] * out.size[2]) % out.size[1], sample = i / (out.size[3] * out.size[2] * out.size[1]);
    ((uint16_t*)out.data)[sample * out.stride[0] + token * out.stride[1] + head * out.stride[2] + d] = 0x3f80;
  }
  if (fake_torch_note) {
    u64 stream;
    aoti_torch_get_current_cuda_stream(0, &stream);
    char numbers[64];
    snprintf(numbers, sizeof numbers, "scale %.4f stream %llu", scale, (unsigned long long)stream);
    fake_torch_note(("q " + q.text() + "\nk " + k.text() + "\nv " + v.text() + "\nout " + out.text() + "\n" + numbers + "\n").c_str());
  }
  stack[0] = (u64)alias;
  stack[1] = (u64)lse;
  stack[2] = (u64)rest[0];
  stack[3] = (u64)rest[1];
}

__attribute__((constructor)) void registerOperator() {
  Library *definitions, *bodies;
  aoti_torch_library_init_def(NAMESPACE, __FILE__, __LINE__, &definitions);
  aoti_torch_library_def(definitions, SCHEMA);
  aoti_torch_library_init_impl(NAMESPACE, KEY, __FILE__, __LINE__, &bodies);
  torch_library_impl(bodies, "fwd", fwd, 2ull << 56 | 9ull << 48);
}

}  // namespace
