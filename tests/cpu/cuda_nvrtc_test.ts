/** NVRTC without a GPU: compiling, the cache, and what a mistake in a kernel looks like. */
import assert from "node:assert/strict";
import { DiskCache } from "../../ffi/cache.ts";
import { architecture, cudaIncludeFolders, Nvrtc } from "../../ffi/cuda/nvrtc.ts";
import { CompileError, FfiError } from "../../ffi/errors.ts";
import { firstErrors } from "../../ffi/gpu_compiler.ts";
import { specialize } from "../../kernels/gpu.ts";
import LAYER_NORM_CU from "../../kernels/layer_norm.cu" with { type: "text" };
import { inFolder } from "../support/folders.ts";

/** Why there is nothing to compile with, or undefined. */
function missingNvrtc(): string | undefined {
  try {
    new Nvrtc(13)[Symbol.dispose]();
    return undefined;
  } catch (error) {
    if (error instanceof FfiError) return error.message.split(". Searched:")[0];
    throw error;
  }
}

const skip = missingNvrtc();

function testNvrtc(title: string, body: (nvrtc: Nvrtc) => void | Promise<void>): void {
  Deno.test({
    name: `nvrtc: ${title}${skip === undefined ? "" : ` (skipped: ${skip})`}`,
    ignore: skip !== undefined,
    fn: async () => {
      using nvrtc = new Nvrtc(13);
      await body(nvrtc);
    },
  });
}

/** A small kernel with a line that tests can break. */
function kernel(line = "out[0] = fromFloat<T>(toFloat(out[0]) * N);") {
  const text = [
    "// Doubles.",
    '#include "common.cuh"',
    "",
    `extern "C" __global__ void twice(T* out) {`,
    line,
    "}",
  ];
  return specialize({ name: "twice.cu", text: text.join("\n") }, { T: "bf16" }, { N: 2 });
}

testNvrtc("layer_norm.cu becomes a cubin for Hopper", (nvrtc) => {
  const source = specialize(
    { name: "layer_norm.cu", text: LAYER_NORM_CU },
    { T: "bf16", W: "bf16" },
    { N: 8, VECTORS: 2, BLOCK: 192, THREADS: 192 },
  );
  const cubin = nvrtc.compile(source, "sm_90a");
  assert.deepEqual([...cubin.subarray(0, 4)], [0x7f, 0x45, 0x4c, 0x46]); // ELF
  assert(new TextDecoder("latin1").decode(cubin).includes("layerNorm"));
});

testNvrtc(
  "a cubin is kept, and made again for another text, GPU or compiler",
  (nvrtc) =>
    inFolder((folder) => {
      const cache = new DiskCache(folder, (message) => assert.fail(message));
      const files = () => [...Deno.readDirSync(folder)].length;
      const first = nvrtc.compile(kernel(), "sm_90a", cache);
      assert.equal(files(), 1);
      assert.deepEqual(nvrtc.compile(kernel(), "sm_90a", cache), first);
      assert.equal(files(), 1);
      assert.notDeepEqual(nvrtc.compile(kernel(), "sm_80", cache), first);
      nvrtc.compile(kernel("out[1] = out[0];"), "sm_90a", cache);
      assert.equal(files(), 3);
    }),
);

testNvrtc("an error has the file's name and the line that its editor shows", (nvrtc) => {
  assert.throws(() => nvrtc.compile(kernel("out[0] = nothing;"), "sm_90a"), (error) => {
    assert.ok(error instanceof CompileError);
    const first = 'twice.cu(5): error: identifier "nothing" is undefined';
    assert.equal(error.message, `twice.cu does not compile for sm_90a: ${first}`);
    // All of the log, in lines, with the place below.
    assert.ok(error.log.startsWith(`${first}\n`), error.log);
    assert.match(error.log, /^ +out\[0\] = nothing;\n +\^$/m);
    return true;
  });
  const broken = kernel();
  assert.throws(
    () => nvrtc.compile({ ...broken, text: broken.text.replace("struct bf16 {", "struct bf16 [") }, "sm_90a"),
    /common\.cuh\(\d+\): error: /,
  );
  assert.throws(() => nvrtc.compile(kernel(), "sm_1"), /NVRTC_ERROR_INVALID_OPTION.*--gpu-architecture/);
});

testNvrtc("headers of the toolkit are found", (nvrtc) => {
  if (nvrtc.includeFolders.length === 0) return;
  const source = { name: "half.cu", text: "#include <cuda_fp8.h>\n__global__ void f(__nv_fp8_e4m3*) {}" };
  assert(nvrtc.compile(source, "sm_90a").length > 0);
});

Deno.test("nvrtc: GPUs have their names, with an a from Hopper on", () => {
  assert.equal(architecture([8, 0]), "sm_80");
  assert.equal(architecture([8, 9]), "sm_89");
  assert.equal(architecture([9, 0]), "sm_90a");
  assert.equal(architecture([10, 3]), "sm_103a");
});

Deno.test("nvrtc: include folders beside the library come first, then the toolkits, those that exist", () => {
  const all = () => true;
  assert.deepEqual(cudaIncludeFolders("/env/nvidia/cu13/lib/libnvrtc.so.13", [13, 1], all), [
    "/env/nvidia/cu13/include",
    "/env/nvidia/cuda_runtime/include",
    "/usr/local/cuda-13.1/include",
    "/usr/local/cuda/include",
  ]);
  assert.deepEqual(
    cudaIncludeFolders(
      "/env/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
      [12, 8],
      (path) => path.startsWith("/env"),
    ),
    ["/env/nvidia/cuda_nvrtc/include", "/env/nvidia/cuda_runtime/include"],
  );
  assert.deepEqual(cudaIncludeFolders("libnvrtc.so.12", [12, 8], all), [
    "/usr/local/cuda-12.8/include",
    "/usr/local/cuda/include",
  ]);
});

Deno.test("nvrtc: a long log is cut to its first errors", () => {
  assert.equal(
    firstErrors("a.cu(1): error: x\n    y\n    ^\n\n1 error detected in the compilation\n"),
    "a.cu(1): error: x",
  );
  const many = Array.from({ length: 6 }, (_, i) => `a.cu(${i}): error: e${i}`).join("\n");
  assert.equal(
    firstErrors(many),
    "a.cu(0): error: e0; a.cu(1): error: e1; a.cu(2): error: e2; a.cu(3): error: e3; and 2 more",
  );
  assert.equal(firstErrors("something else\n"), "something else");
});
