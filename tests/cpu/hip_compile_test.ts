/**
 * All portable kernels, as recipes and tests specialize them, compiled for AMD's GPUs: by clang with HIP's own headers for
 * gfx942 (MI300X) and gfx950 (MI355X), and by the real hipRTC of Debian, which is of ROCm 5.2, for the newest GPU that it
 * knows (gfx90a). Nothing is run.
 */
import assert from "node:assert/strict";
import type { Hiprtc } from "../../ffi/hip/hiprtc.ts";
import { clangFor, debiansHiprtc, type HipCompiler } from "../support/hip_compiler.ts";
import { kernelSources, type UsedSource } from "../support/kernel_sources.ts";

/** Kernels of instructions that one vendor has. */
const NOT_PORTABLE: ReadonlySet<string> = new Set(["flash_attention.cu", "fused_linear.cu"]);

const limitsOf = (architecture: string) => ({
  architecture,
  multiprocessors: 304,
  warpSize: 64,
  sharedBytesPerBlock: 65536,
  convAddsBias: false,
});

const SOURCES = await kernelSources(limitsOf("gfx942"));

Deno.test("the texts to compile for AMD's GPUs are of every portable kernel file", () => {
  const folder = new URL("../../kernels/", import.meta.url);
  const files = Array.from(Deno.readDirSync(folder), ({ name }) => name).filter((name) =>
    name.endsWith(".cu")
  );
  const used = new Set(SOURCES.map(({ name }) => name));
  assert.deepEqual([...used].sort(), files.filter((name) => !NOT_PORTABLE.has(name)).sort());
  // What a portable file is not allowed to have outside of NVIDIA's branches shows when it is compiled.
  assert.ok(SOURCES.length > 60, `only ${SOURCES.length} texts`);
});

/**
 * Several texts as one: each in a namespace of its own, so that the headers are read once. Entries lose their C names.
 */
function together(sources: readonly UsedSource[]): string {
  const parts = sources.map(({ text }, i) =>
    `namespace n${i} {\n${text.replaceAll('extern "C" __global__', "__global__")}\n}`
  );
  return parts.join("\n");
}

for (const architecture of ["gfx942", "gfx950"]) {
  const compiler = clangFor(architecture);
  // Begun at once, so that two cores compile for two GPUs.
  const all = typeof compiler === "string" ? undefined : compiler.compile(together(SOURCES), ["-O1"]);
  const skip = typeof compiler === "string" ? compiler : undefined;
  const test = (title: string, body: (compiler: HipCompiler) => Promise<void>) =>
    Deno.test({
      name: `${architecture}: ${title}${skip === undefined ? "" : ` (skipped: ${skip})`}`,
      ignore: skip !== undefined,
      fn: () => body(compiler as HipCompiler),
    });

  test("every portable kernel compiles", async () => {
    const { assembly, log } = await all!;
    assert.ok(assembly !== undefined, log);
    const kernels = [...assembly.matchAll(/^\s*\.amdhsa_kernel (\S+)$/gm)].length;
    const entries = SOURCES.flatMap(({ text }) => [...text.matchAll(/extern "C" __global__/g)]).length;
    assert.equal(kernels, entries);
    // 64 threads in step, and no registers spilled to memory by the wave's width.
    assert.match(assembly, /\.amdhsa_wavefront_size32 0|wavefront_size: +64|\.wavefront_size: 64/);
  });

  test("float8 is the GPU's own format, by its own instructions", async ({ compile }) => {
    const [source] = SOURCES.filter(({ name, text }) =>
      name === "quantize_float8.cu" && text.includes("constexpr int N = 8;")
    );
    const probe = `${source.text}\nextern "C" __device__ const float theLargest = FLOAT8_LARGEST;`;
    const { assembly, log } = await compile(probe, ["-O3"]);
    assert.ok(assembly !== undefined, log);
    assert.match(assembly, /v_cvt_pk_fp8_f32/);
    const largest = architecture === "gfx942" ? 0x43700000 : 0x43e00000; // 240, 448
    assert.match(assembly, new RegExp(`theLargest:\\s+\\.long\\s+(${largest}|0x${largest.toString(16)})`));
  });

  test("attention multiplies by the matrix units, without spilling", async ({ compile }) => {
    const [source] = SOURCES.filter(({ name }) => name === "portable_attention.cu");
    const { assembly, log } = await compile(source.text, ["-O3"]);
    assert.ok(assembly !== undefined, log);
    assert.ok((assembly.match(/v_mfma_f32_32x32x8_bf16/g) ?? []).length >= 32);
    assert.match(assembly, /ScratchSize: 0\b/);
  });

  test("a mistake is found", async ({ compile }) => {
    const { assembly, log } = await compile(
      'extern "C" __global__ void k(float* p) { p[0] = nonsense; }',
      [],
    );
    assert.equal(assembly, undefined);
    assert.match(log, /error: use of undeclared identifier 'nonsense'/);
  });
}

const hiprtc = debiansHiprtc();
const noHiprtc = typeof hiprtc === "string" ? hiprtc : undefined;
const named = (title: string) => `hiprtc: ${title}${noHiprtc === undefined ? "" : ` (skipped: ${noHiprtc})`}`;

Deno.test({
  name: named("the real one takes our calls, options and kernels"),
  ignore: noHiprtc !== undefined,
  fn: () => {
    const compiler = hiprtc as Hiprtc;
    assert.equal(compiler.version.length, 2);
    compiler.compile({ name: "all", text: together(SOURCES) }, "gfx90a");
    for (const name of ["layer_norm.cu", "softmax.cu", "quantize_float8.cu", "portable_attention.cu"]) {
      const source = SOURCES.find((one) => one.name === name)!;
      const image = compiler.compile(source, "gfx90a");
      assert.deepEqual([...image.subarray(0, 4)], [0x7f, 0x45, 0x4c, 0x46], "an ELF file");
      const text = new TextDecoder("latin1").decode(image);
      for (const entry of source.entries) assert.ok(text.includes(`${entry}.kd`), `${name} has ${entry}`);
    }
  },
});

Deno.test({
  name: named("an error has the file's name and the line that its editor shows"),
  ignore: noHiprtc !== undefined,
  fn: () => {
    const text = '#line 7 "mine.cu"\nextern "C" __global__ void k(float* p) { p[0] = nonsense; }';
    assert.throws(() => (hiprtc as Hiprtc).compile({ name: "mine.cu", text }, "gfx90a"), {
      name: "CompileError",
      message:
        /^mine\.cu does not compile for gfx90a: \S*mine\.cu:7:\d+: error: use of undeclared identifier/,
    });
  },
});
