/**
 * AITER without AMD's hardware: its table of kernels, what a code object says, the arguments against a C struct, and whole
 * calls through the shim to a kernel that reads its arguments as AITER's do and computes attention.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { FfiError } from "../../ffi/errors.ts";
import { Float } from "../../ffi/gpu.ts";
import { aiterArguments, aiterTakesPlan, ARGUMENT_BYTES, ARGUMENTS, kernelIn } from "../../ffi/hip/aiter.ts";
import { kernelMetadata } from "../../ffi/hip/code_object.ts";
import { Hiprtc } from "../../ffi/hip/hiprtc.ts";
import { openHip } from "../../ffi/hip/open.ts";
import { packStruct } from "../../ffi/struct.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { attentionReference } from "../../kernels/attention.ts";
import { cast } from "../../kernels/cast.ts";
import { libraryAttention } from "../../kernels/library_attention.ts";
import { compareWithHeaders, missingHeaders } from "../support/cuda_headers.ts";
import { missingCompiler } from "../support/fake_cuda.ts";
import { valuesOf } from "../support/golden.ts";
import { debiansHiprtc } from "../support/hip_compiler.ts";
import { hipOnCpu } from "../support/hip_shim.ts";
import { inFolder } from "../support/folders.ts";
import { noise } from "../support/providers.ts";

const HEADER = "dtype,hdim_q,hdim_v,mask,mode,bf16_cvt,ts_qo,ts_kv,knl_name,co_name";
const ROWS = [
  "bf16,128,128,0,0,1,256,32,_ZN5aiter24fmha_fwd_hd128_bf16_rtnaE,fwd_hd128_bf16_rtna.co",
  "bf16,128,128,0,0,0,256,32,_ZN5aiter24fmha_fwd_hd128_bf16_rtneE,fwd_hd128_bf16_rtne.co",
  "bf16,128,128,2,0,0,256,32,causal,causal.co",
  "bf16,128,128,0,1,0,256,32,group,group.co",
  "bf16,192,128,0,0,0,128,32,wide,wide.co",
  "fp8,128,128,0,0,1,256,64,_ZN5aiter18fmha_fwd_hd128_fp8E,fwd_hd128_fp8.co",
];

Deno.test("AITER's table says which kernel is for dense batches without a mask, rounding to nearest even", () => {
  const csv = [HEADER, ...ROWS, ""].join("\n");
  assert.deepEqual(kernelIn(csv, "bf16"), {
    name: "_ZN5aiter24fmha_fwd_hd128_bf16_rtneE",
    file: "fwd_hd128_bf16_rtne.co",
    tile: 256,
  });
  assert.deepEqual(kernelIn(csv.replaceAll("\n", "\r\n"), "f8e4m3"), {
    name: "_ZN5aiter18fmha_fwd_hd128_fp8E",
    file: "fwd_hd128_fp8.co",
    tile: 256,
  });
  // gfx950's tables call it so, and have one way to round.
  const other = [HEADER, "fp8bf16,128,128,0,0,0,256,64,k,k.co", "bf16,128,128,0,0,2,256,64,b,b.co"].join(
    "\n",
  );
  assert.equal(kernelIn(other, "f8e4m3")?.name, "k");
  assert.equal(kernelIn(other, "bf16")?.name, "b");
  for (
    const damaged of [
      "",
      HEADER,
      "a,b\n1,2",
      [HEADER, "bf16,128,128,0,0,0,256,32,k,../../etc/passwd"].join("\n"),
      [HEADER, "bf16,128,128,0,0,0,none,32,k,k.co"].join("\n"),
      [HEADER, "bf16,128,128,0,0,0"].join("\n"),
    ]
  ) {
    assert.equal(kernelIn(damaged, "bf16"), undefined, damaged);
  }
});

/** What stands in a code object's note, for kernels with so many bytes of arguments. */
function note(...sizes: number[]): Uint8Array<ArrayBuffer> {
  const key = new TextEncoder().encode(".kernarg_segment_size");
  return Uint8Array.from(sizes.flatMap((size) => [
    0xa0 | 0x15,
    ...key,
    ...(size < 0x80 ? [size] : size < 0x100 ? [0xcc, size] : [0xcd, size >> 8, size & 0xff]),
    0xc0,
    0xc0,
    0xc0,
    0xc0,
  ]));
}

Deno.test("a code object's metadata is read in each of MessagePack's forms, and not guessed", () => {
  for (const size of [12, 200, 512, 656]) {
    assert.deepEqual(kernelMetadata(note(size)), { argumentBytes: size });
  }
  assert.deepEqual(kernelMetadata(note(656, 656)), { argumentBytes: 656 });
  assert.equal(kernelMetadata(note(656, 512)), undefined, "kernels that differ");
  assert.equal(kernelMetadata(new Uint8Array(0)), undefined);
  assert.equal(kernelMetadata(note(656).subarray(0, 23)), undefined, "cut");
});

const hiprtc = debiansHiprtc();
Deno.test({
  name: `the metadata of a real code object${typeof hiprtc === "string" ? ` (skipped: ${hiprtc})` : ""}`,
  ignore: typeof hiprtc === "string",
  fn: () => {
    // Behind its own arguments a kernel has hidden ones, as many as its version has.
    const text = (parameters: string) => `extern "C" __global__ void k(${parameters}) {}`;
    const sizes = ["long long a", "long long a, long long b, long long c, long long d"].map((parameters) =>
      kernelMetadata((hiprtc as Hiprtc).compile({ name: "k.cu", text: text(parameters) }, "gfx90a"))!
        .argumentBytes
    );
    assert.ok(sizes[0] >= 8);
    assert.equal(sizes[1] - sizes[0], 24);
  },
});

const noHeaders = await missingHeaders("stddef.h");
Deno.test({
  name: `AITER's arguments lie as in C${noHeaders === undefined ? "" : ` (skipped: ${noHeaders})`}`,
  ignore: noHeaders !== undefined,
  fn: () =>
    inFolder(async (folder) => {
      // In the order of the arguments, each in a slot of 16 bytes.
      const names = Object.keys(ARGUMENTS);
      const slots = (count: number) =>
        names.slice(0, count).map((name) => `  _Alignas(16) unsigned long long ${name};\n`).join("");
      const bf16 = names.indexOf("qDescale");
      const header = join(folder, "arguments.h");
      Deno.writeTextFileSync(
        header,
        `struct Bf16 {\n${slots(bf16)}};\nstruct Fp8 {\n${slots(names.length)}};\n`,
      );
      const offsets = names.map((name) => [`offsetof(struct Fp8, ${name})`, ARGUMENTS[name as "q"]]);
      const wrong = await compareWithHeaders([header], {
        ...Object.fromEntries(offsets),
        "sizeof(struct Bf16)": ARGUMENT_BYTES.bf16,
        "sizeof(struct Fp8)": ARGUMENT_BYTES.f8e4m3,
      });
      assert.equal(wrong, undefined);
    }),
});

Deno.test("structs refuse what does not fit", () => {
  assert.deepEqual(
    [...packStruct(16, [[0, -1], [4, new Float(1)], [8, 2n ** 63n]])],
    [255, 255, 255, 255, 0, 0, 128, 63, 0, 0, 0, 0, 0, 0, 0, 128],
  );
  assert.deepEqual([...packStruct(4, [[0, 0xffffffff]])], [255, 255, 255, 255]);
  for (const fields of [[[14, 1]], [[2, 1]], [[4, 1n]], [[-4, 1]], [[0, 2 ** 32]], [[0, 0.5]]] as const) {
    assert.throws(() => packStruct(16, fields), FfiError);
  }
});

const memory = { device: undefined as never, pointer: 0x10000n, byteLength: 2 ** 40 };
const tensor = (dtype: "bf16" | "f8e4m3" | "f32", shape: number[], strides?: number[], offset = 0) =>
  new Tensor(memory, dtype, shape, strides, offset);

Deno.test("AITER's arguments: strides in bytes, sizes, scales; and what it takes", () => {
  const q = tensor("f8e4m3", [2, 300, 24, 128], [300 * 9216, 9216, 128, 1], 64);
  const k = tensor("f8e4m3", [2, 400, 24, 128]);
  const out = tensor("bf16", [2, 300, 24, 128], [300 * 15360, 15360, 128, 1]);
  const plan = { q, k, v: k, out, scale: 0.25 };
  const view = new DataView(aiterArguments(plan, 256, 0x77n).buffer);
  assert.equal(view.byteLength, 656);
  const number = (name: keyof typeof ARGUMENTS) => view.getUint32(ARGUMENTS[name], true);
  assert.equal(view.getBigUint64(ARGUMENTS.q, true), 0x10040n);
  assert.equal(view.getFloat32(ARGUMENTS.scale, true), 0.25);
  assert.deepEqual(
    [number("queries"), number("keys"), number("heads"), number("headsOfKey"), number("qHeadDim")],
    [300, 400, 24, 1, 128],
  );
  assert.deepEqual(
    [number("qToken"), number("qTile"), number("qHead"), number("qBatch")],
    [9216, 256 * 9216, 128, 300 * 9216],
  );
  assert.deepEqual(
    [number("outToken"), number("outHead"), number("outBatch")],
    [2 * 15360, 256, 2 * 300 * 15360],
  );
  assert.equal(view.getBigUint64(ARGUMENTS.vDescale, true), 0x77n);
  assert.equal(number("hasLse") + number("lse"), 0);
  assert.ok(aiterTakesPlan(plan));
  const bf16 = tensor("bf16", [1, 7, 2, 128]);
  const small = { q: bf16, k: bf16, v: bf16, out: bf16, scale: 1 };
  assert.equal(aiterArguments(small, 256, 0n).length, 512);
  assert.ok(aiterTakesPlan(small));
  assert.ok(!aiterTakesPlan({ ...small, q: k }), "one dtype");
  assert.ok(!aiterTakesPlan({ ...small, out: tensor("f32", [1, 7, 2, 128]) }));
  const narrow = tensor("bf16", [1, 7, 2, 64]);
  assert.ok(!aiterTakesPlan({ q: narrow, k: narrow, v: narrow, out: narrow, scale: 1 }), "heads of 128");
  const far = tensor("bf16", [2, 7, 2, 128], [2 ** 30, 256, 128, 1]);
  assert.ok(!aiterTakesPlan({ ...small, q: far }), "strides of 32 bits");
});

/** A kernel of this name that finds its arguments where AITER's do, and computes attention plainly. */
function standIn(name: string, float8: boolean): string {
  const slots = Object.keys(ARGUMENTS).slice(0, float8 ? undefined : ARGUMENTS.qDescale / 16);
  const parameters = slots.flatMap((slot) => [`long long ${slot}`, `long long ${slot}Pad`]).join(", ");
  const read = float8
    ? `unsigned c = ((const unsigned char*)p)[0], m = c & 0x7f;
       float x = __uint_as_float(m << 20) * 1.329227995784916e36f;
       return c & 0x80 ? -x : x;`
    : `return __uint_as_float((unsigned)*(const unsigned short*)p << 16);`;
  const descale = float8 ? "*(const float*)qDescale * *(const float*)kDescale" : "1.0f";
  return `
__device__ float at(const char* p) { ${read} }
extern "C" __global__ void ${name}(${parameters}) {
  const int query = blockIdx.x * 256 + threadIdx.x;
  if (threadIdx.x >= 256 || query >= queries || option != 5 || headsOfKey != 1 || qHeadDim != 128 || vHeadDim != 128 ||
      qTile != 256 * qToken || blockIdx.y >= heads || hasLse || lse) return;
  const int size = ${float8 ? 1 : 2};
  const char* qs = (const char*)q + blockIdx.z * qBatch + blockIdx.y * qHead + query * qToken;
  const char* ks = (const char*)k + blockIdx.z * kBatch + blockIdx.y * kHead;
  const char* vs = (const char*)v + blockIdx.z * vBatch + blockIdx.y * vHead;
  unsigned short* os = (unsigned short*)((char*)out + blockIdx.z * outBatch + blockIdx.y * outHead + query * outToken);
  float sums[128] = {}, total = 0;
  for (int key = 0; key < keys; key++) {
    float logit = 0;
    for (int d = 0; d < 128; d++) logit += at(qs + d * size) * at(ks + key * kToken + d * size);
    const float weight = expf(logit * __uint_as_float((unsigned)scale) * ${descale});
    total += weight;
    for (int d = 0; d < 128; d++) sums[d] += weight * at(vs + key * vToken + d * size);
  }
  for (int d = 0; d < 128; d++) os[d] = (unsigned short)(__float_as_uint(sums[d] / total) + 0x8000u >> 16);
}`;
}

const skip = missingCompiler();
const cuda = skip === undefined ? hipOnCpu() : undefined;

/** AITER's folder for the shim's GPU, with stand-ins for its kernels; \`sizes\` are what they say of their arguments. */
function install(folder: string, sizes: Record<string, number>): void {
  const files = join(folder, "gfx950/fmha_v3_fwd");
  Deno.mkdirSync(files, { recursive: true });
  Deno.writeTextFileSync(join(files, "fmha_fwd.csv"), [HEADER, ...ROWS].join("\n"));
  using compiler = new Hiprtc();
  for (const [file, size] of Object.entries(sizes)) {
    const name = ROWS.find((row) => row.endsWith(`,${file}`))!.split(",").at(-2)!;
    const image = compiler.compile({ name: file, text: standIn(name, file.includes("fp8")) }, "gfx950");
    Deno.writeFileSync(join(files, file), new Uint8Array([...image, ...note(size)]));
  }
}

function aiterTest(title: string, sizes: Record<string, number>, body: () => void | Promise<void>): void {
  Deno.test({
    name: `AITER by the shim: ${title}${skip === undefined ? "" : ` (skipped: ${skip})`}`,
    ignore: skip !== undefined,
    fn: () =>
      inFolder(async (folder) => {
        cuda!.reset();
        install(folder, sizes);
        Deno.env.set("AITER_ASM_DIR", folder);
        try {
          await body();
        } finally {
          Deno.env.delete("AITER_ASM_DIR");
        }
      }),
  });
}

const BOTH = { "fwd_hd128_bf16_rtne.co": 512, "fwd_hd128_fp8.co": 656 };

aiterTest("attends in bfloat16 and float8, recorded too, and says that it is there", BOTH, async () => {
  const warnings: string[] = [];
  using device = openHip(0, { onWarning: (message) => warnings.push(message) });
  const [batch, queries, keys, heads] = [2, 5, 7, 3];
  const draw = (tokens: number, seed: number) => {
    const values = new Float32Array(batch * tokens * heads * 128).map((_, i) => noise(seed)(i));
    return cast(Tensor.fromFloat32(device, values, [batch, tokens, heads, 128]), "bf16");
  };
  const [q, k, v] = [draw(queries, 1), draw(keys, 2), draw(keys, 3)];
  const expected = new Float32Array(q.size);
  const [qs, ks, vs] = [await valuesOf(q), await valuesOf(k), await valuesOf(v)];
  const shape = { batch, queries, keys, heads, headDim: 128 };
  attentionReference(expected, qs, ks, vs, new Float32Array(0), shape, 128 ** -0.5, false);
  for (const [dtype, limit] of [["bf16", 0.005], ["f8e4m3", 0.05]] as const) {
    const out = Tensor.empty(device, q.shape, "bf16");
    const run = () => void libraryAttention(device, "aiter", { q, k, v }, dtype, { out });
    const check = async () => {
      (await valuesOf(out)).forEach((y, i) =>
        assert.ok(Math.abs(y - expected[i]) < limit, `${dtype} ${i}: ${y}`)
      );
    };
    run();
    await check();
    using graph = device.record(run);
    device.upload(new Uint8Array(out.byteLength), out.memory);
    graph.replay();
    await check();
  }
  // What no library is named for is AITER's as well.
  assert.ok(device.attention({ q, k, v, out: Tensor.empty(device, q.shape, "bf16"), scale: 1 }));
  assert.deepEqual(warnings, []);
  assert.match(device.properties().providers.attention, /^AITER/);
});

aiterTest(
  "a kernel with other arguments is refused by its file",
  { ...BOTH, "fwd_hd128_fp8.co": 672 },
  () => {
    using device = openHip(0);
    const x = Tensor.empty(device, [1, 4, 2, 128], "f8e4m3");
    const out = Tensor.empty(device, [1, 4, 2, 128], "bf16");
    assert.throws(() => device.attention({ library: "aiter", q: x, k: x, v: x, out, scale: 1 }), {
      name: "FfiError",
      message: /fwd_hd128_fp8\.co takes 672 bytes of arguments, this program knows the kernel with 656/,
      hint: /leave out --attention aiter/,
    });
  },
);

aiterTest("unasked, a kernel that is not known is a warning", { "fwd_hd128_bf16_rtne.co": 528 }, () => {
  const warnings: string[] = [];
  using device = openHip(0, { onWarning: (message) => warnings.push(message) });
  const x = Tensor.empty(device, [1, 4, 2, 128], "bf16");
  for (let i = 0; i < 2; i++) assert.equal(device.attention({ q: x, k: x, v: x, out: x, scale: 1 }), false);
  assert.equal(warnings.length, 1);
  assert.match(
    warnings[0],
    /our own kernel's.*fwd_hd128_bf16_rtne\.co takes 528 bytes.*report AITER's version/,
  );
});

aiterTest("a missing file is an error that says how to get it back", { "fwd_hd128_fp8.co": 656 }, () => {
  using device = openHip(0);
  const x = Tensor.empty(device, [1, 4, 2, 128], "bf16");
  assert.throws(() => device.attention({ library: "aiter", q: x, k: x, v: x, out: x, scale: 1 }), {
    name: "FfiError",
    message: /^AITER's .*fwd_hd128_bf16_rtne\.co cannot be read/,
    hint: /pip install amd-aiter --force-reinstall/,
  });
});
