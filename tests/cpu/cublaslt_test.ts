/**
 * cuBLASLt without a GPU: the mapping to column-major products in plain TypeScript, the constants against installed
 * headers, descriptors in the real library, and whole calls against a stand-in that computes on the CPU.
 */
import assert from "node:assert/strict";
import fc from "fast-check";
import { type ColumnMajor, columnMajorGemm, type Gemm } from "../../ffi/column_major_gemm.ts";
import type { CpuDevice } from "../../ffi/cpu/device.ts";
import { openCpu } from "../../ffi/cpu/open.ts";
import type { CudaContext } from "../../ffi/cuda/context.ts";
import { CublasLt, CublasLtLibrary, HEADER } from "../../ffi/cuda/cublaslt.ts";
import type { MatmulPlan } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { FfiError } from "../../ffi/errors.ts";
import { contiguousStrides, Tensor } from "../../ffi/tensor.ts";
import { compareWithHeaders, compileC, missingHeaders } from "../support/cuda_headers.ts";
import {
  assertAccurate,
  geluTanh,
  noise,
  poisoned,
  readBack,
  type Sample,
  sample,
} from "../support/providers.ts";
import { checkFloat8, float8Problem } from "../support/float8_products.ts";
import STAND_IN from "../support/cublaslt_on_cpu.c" with { type: "text" };

const memory = { device: undefined as never, pointer: 0n, byteLength: 0 };

function matrix(
  dtype: DType,
  shape: readonly number[],
  strides = contiguousStrides(shape),
  offset = 0,
): Tensor {
  return new Tensor(memory, dtype, shape, strides, offset);
}

function gemmOf(a: Tensor, b: Tensor, out: Tensor, bias?: Tensor): Gemm {
  const gemm = columnMajorGemm({ a, b, out, bias });
  assert(gemm !== undefined);
  return gemm;
}

Deno.test("columnMajorGemm: a Linear layer is weight^T times tokens", () => {
  const gemm = gemmOf(
    matrix("bf16", [4352, 3072]),
    matrix("bf16", [9216, 3072]),
    matrix("bf16", [4352, 9216]),
    matrix("bf16", [9216]),
  );
  assert.deepEqual(gemm, {
    a: { dtype: "bf16", rows: 3072, columns: 9216, ld: 3072, batchStride: 0 },
    transposeA: true,
    b: { dtype: "bf16", rows: 3072, columns: 4352, ld: 3072, batchStride: 0 },
    transposeB: false,
    d: { dtype: "bf16", rows: 9216, columns: 4352, ld: 9216, batchStride: 0 },
    batch: 1,
    swapped: true,
    bias: "bf16",
    activation: undefined,
    scaling: undefined,
  });
});

Deno.test("columnMajorGemm: attention's products of all heads, through views of [tokens, heads, dim]", () => {
  const [heads, queries, keys, dim] = [24, 512, 640, 128];
  const headsOf = (tokens: number) => matrix("bf16", [heads, tokens, dim], [dim, heads * dim, 1]);
  const logits = gemmOf(headsOf(queries), headsOf(keys), matrix("f32", [heads, queries, keys]));
  assert.deepEqual(logits, {
    a: { dtype: "bf16", rows: dim, columns: keys, ld: heads * dim, batchStride: dim },
    transposeA: true,
    b: { dtype: "bf16", rows: dim, columns: queries, ld: heads * dim, batchStride: dim },
    transposeB: false,
    d: { dtype: "f32", rows: keys, columns: queries, ld: keys, batchStride: queries * keys },
    batch: heads,
    swapped: true,
    bias: undefined,
    activation: undefined,
    scaling: undefined,
  });
  const weights = matrix("bf16", [heads, queries, keys]);
  const values = gemmOf(weights, headsOf(keys).permute([0, 2, 1]), headsOf(queries));
  assert.deepEqual(values, {
    a: { dtype: "bf16", rows: dim, columns: keys, ld: heads * dim, batchStride: dim },
    transposeA: false,
    b: { dtype: "bf16", rows: keys, columns: queries, ld: keys, batchStride: queries * keys },
    transposeB: false,
    d: { dtype: "bf16", rows: dim, columns: queries, ld: heads * dim, batchStride: dim },
    batch: heads,
    swapped: true,
    bias: undefined,
    activation: undefined,
    scaling: undefined,
  });
});

Deno.test("columnMajorGemm: a result with dense columns keeps the plan's order", () => {
  const gemm = gemmOf(
    matrix("f32", [2, 3], [1, 7]),
    matrix("f32", [5, 3]),
    matrix("f32", [2, 5], [1, 4]),
  );
  assert.deepEqual(gemm, {
    a: { dtype: "f32", rows: 2, columns: 3, ld: 7, batchStride: 0 },
    transposeA: false,
    b: { dtype: "f32", rows: 3, columns: 5, ld: 3, batchStride: 0 },
    transposeB: false,
    d: { dtype: "f32", rows: 2, columns: 5, ld: 4, batchStride: 0 },
    batch: 1,
    swapped: false,
    bias: undefined,
    activation: undefined,
    scaling: undefined,
  });
});

Deno.test("columnMajorGemm refuses what does not fit, with the operands", () => {
  const refused = (message: RegExp, a: Tensor, b: Tensor, out: Tensor, bias?: Tensor) =>
    assert.throws(() => columnMajorGemm({ a, b, out, bias }), { name: "ShapeError", message });
  const x = matrix("f32", [2, 3]);
  const w = matrix("f32", [5, 3]);
  const out = matrix("f32", [2, 5]);
  refused(/rank 2 or 3.*a f32 \[2, 3\].*out f32 \[10\]/, x, w, matrix("f32", [10]));
  refused(/rank 2 or 3/, x, matrix("f32", [1, 5, 3]), out);
  refused(/do not fit together/, x, matrix("f32", [5, 4]), out);
  refused(
    /do not fit together/,
    matrix("f32", [2, 2, 3]),
    matrix("f32", [3, 5, 3]),
    matrix("f32", [2, 2, 5]),
  );
  refused(/no i32 here/, matrix("i32", [2, 3]), matrix("i32", [5, 3]), out);
  refused(/a and b differ/, x, matrix("bf16", [5, 3]), out);
  refused(/out is neither/, x, w, matrix("bf16", [2, 5]));
  refused(/nothing to sum/, matrix("f32", [2, 0]), matrix("f32", [5, 0]), out);
  refused(/no dense dimension/, matrix("f32", [2, 3], [6, 2]), w, out);
  refused(/overlap/, matrix("f32", [2, 3], [2, 1]), w, out);
  refused(/bias is not/, x, w, out, matrix("f32", [4]));
  refused(/bias is not/, x, w, out, matrix("f32", [5], [2]));
  refused(/bias is not/, x, w, out, matrix("bf16", [5]));
  refused(/dense rows/, x, w, matrix("f32", [2, 5], [1, 2]), matrix("f32", [5]));
  assert.equal(columnMajorGemm({ a: matrix("f32", [0, 3]), b: w, out: matrix("f32", [0, 5]) }), undefined);
});

/** A float8 Linear layer of 4352 tokens, with what a test changes. */
function float8Plan(change: Partial<MatmulPlan> = {}): MatmulPlan {
  return {
    a: matrix("f8e4m3", [4352, 3072]),
    b: matrix("f8e4m3", [9216, 3072]),
    bias: matrix("bf16", [9216]),
    out: matrix("bf16", [4352, 9216]),
    activation: "geluTanh",
    scaleA: matrix("f32", [4352]),
    scaleB: matrix("f32", [9216]),
    ...change,
  };
}

Deno.test("columnMajorGemm: float8 is weight^T times tokens, scaled by rows or as a whole", () => {
  const expected: Gemm = {
    a: { dtype: "f8e4m3", rows: 3072, columns: 9216, ld: 3072, batchStride: 0 },
    transposeA: true,
    b: { dtype: "f8e4m3", rows: 3072, columns: 4352, ld: 3072, batchStride: 0 },
    transposeB: false,
    d: { dtype: "bf16", rows: 9216, columns: 4352, ld: 9216, batchStride: 0 },
    batch: 1,
    swapped: true,
    bias: "bf16",
    activation: "geluTanh",
    scaling: "row",
  };
  assert.deepEqual(columnMajorGemm(float8Plan()), expected);
  const one = matrix("f32", [1]);
  assert.deepEqual(columnMajorGemm(float8Plan({ scaleA: one, scaleB: one })), {
    ...expected,
    scaling: "tensor",
  });
  // One token is a row, whose scale stands beside those of the weight's rows; tokens may be any number.
  for (const tokens of [1, 17]) {
    const gemm = columnMajorGemm(float8Plan({
      a: matrix("f8e4m3", [tokens, 3072]),
      out: matrix("f32", [tokens, 9216]),
      scaleA: matrix("f32", [tokens]),
    }));
    assert.equal(gemm?.scaling, "row");
  }
});

Deno.test("columnMajorGemm refuses float8 that the matrix units do not read, with the operands", () => {
  const refused = (message: RegExp, change: Partial<MatmulPlan>) =>
    assert.throws(() => columnMajorGemm(float8Plan(change)), { name: "ShapeError", message });
  const one = matrix("f32", [1]);
  refused(/scales are neither.*a f8e4m3 \[4352, 3072\].*scaleA f32 \[1\].*geluTanh/, { scaleA: one });
  refused(/scales are neither/, { scaleB: one });
  refused(/scales are neither/, { scaleA: undefined, scaleB: undefined });
  refused(/scales are neither/, { scaleA: matrix("f32", [4352], [2]) });
  refused(/scales are neither/, { scaleA: matrix("f32", [4352, 1]) });
  refused(/scales are neither/, { scaleB: matrix("bf16", [9216]) });
  refused(/only f8e4m3 operands have scales/, {
    a: matrix("bf16", [4352, 3072]),
    b: matrix("bf16", [9216, 3072]),
  });
  refused(/a and b differ/, { a: matrix("bf16", [4352, 3072]) });
  refused(/out is neither f32 nor bf16/, { out: matrix("f8e4m3", [4352, 9216]) });
  refused(/bias is not a dense \[n\] in bf16/, {
    bias: matrix("f32", [9216]),
    out: matrix("f32", [4352, 9216]),
  });
  refused(/rows of float8 matrices are dense/, { a: matrix("f8e4m3", [4352, 3072], [1, 4352]) });
  refused(/rows of float8 matrices are dense/, { b: matrix("f8e4m3", [9216, 3072], [1, 9216]) });
  refused(/multiples of 16/, { a: matrix("f8e4m3", [4352, 3072], [3080, 1]) });
  refused(/multiples of 16/, { b: matrix("f8e4m3", [9216, 3072], [3080, 1]) });
  refused(/multiples of 16/, { a: matrix("f8e4m3", [4352, 24]), b: matrix("f8e4m3", [9216, 24]) });
  refused(/multiples of 16/, {
    b: matrix("f8e4m3", [24, 3072]),
    bias: undefined,
    out: matrix("bf16", [4352, 24]),
    scaleB: matrix("f32", [24]),
  });
  refused(/no batch/, {
    a: matrix("f8e4m3", [2, 16, 32]),
    b: matrix("f8e4m3", [2, 16, 32]),
    out: matrix("bf16", [2, 16, 16]),
  });
});

/** A matrix of a plan, rank 2 or 3, by how it lies: which of its last two dimensions is dense, and gaps. */
interface Form {
  readonly rowsDense: boolean;
  readonly gap: number;
  readonly batchGap: number;
  /** Batch entries between matrix rows instead of behind one another, as heads lie between tokens. */
  readonly interleaved: boolean;
}

const form: fc.Arbitrary<Form> = fc.record({
  rowsDense: fc.boolean(),
  gap: fc.integer({ min: 0, max: 3 }),
  batchGap: fc.integer({ min: 0, max: 5 }),
  interleaved: fc.boolean(),
});
const size = fc.integer({ min: 1, max: 7 });
const problem = fc.record({
  m: size,
  n: size,
  k: size,
  batch: fc.option(fc.integer({ min: 1, max: 4 }), { nil: undefined }),
  a: form,
  b: form,
  out: form,
  bias: fc.boolean(),
  activation: fc.constantFrom(undefined, "geluTanh" as const),
  alpha: fc.constantFrom(1, 0.5, -3),
  seed: fc.nat(),
});
type Problem = typeof problem extends fc.Arbitrary<infer T> ? T : never;

/** Dimension orders and gaps for `sample`, where it can express the form; the gap is behind the innermost dimension. */
function placement(form: Form, rank: number): { order: readonly number[]; gap: number; where: "device" } {
  const inner = form.rowsDense ? [0, 1] : [1, 0];
  if (rank === 2) return { order: inner, gap: form.gap, where: "device" };
  const [slow, fast] = inner.map((dim) => dim + 1);
  return { order: form.interleaved ? [slow, 0, fast] : [0, slow, fast], gap: form.gap, where: "device" };
}

/** What the library is told, computed in plain TypeScript. */
function emulate(
  gemm: Gemm,
  a: ArrayLike<number>,
  b: ArrayLike<number>,
  d: Float64Array,
  alpha: number,
): void {
  const at = ({ ld, batchStride }: ColumnMajor, i: number, row: number, column: number) =>
    i * batchStride + row + column * ld;
  const k = gemm.transposeA ? gemm.a.rows : gemm.a.columns;
  assert.equal(gemm.transposeB ? gemm.b.columns : gemm.b.rows, k);
  assert.equal(gemm.transposeA ? gemm.a.columns : gemm.a.rows, gemm.d.rows);
  assert.equal(gemm.transposeB ? gemm.b.rows : gemm.b.columns, gemm.d.columns);
  for (const { ld, rows } of [gemm.a, gemm.b, gemm.d]) assert(ld >= rows);
  for (let i = 0; i < gemm.batch; i++) {
    for (let row = 0; row < gemm.d.rows; row++) {
      for (let column = 0; column < gemm.d.columns; column++) {
        let sum = 0;
        for (let l = 0; l < k; l++) {
          sum += a[gemm.transposeA ? at(gemm.a, i, l, row) : at(gemm.a, i, row, l)] *
            b[gemm.transposeB ? at(gemm.b, i, column, l) : at(gemm.b, i, l, column)];
        }
        d[at(gemm.d, i, row, column)] = alpha * sum;
      }
    }
  }
}

Deno.test("columnMajorGemm: the column-major product is the plan's product, for all layouts", () => {
  fc.assert(fc.property(problem, ({ m, n, k, batch, a, b, out, alpha, seed }) => {
    const lead = batch === undefined ? [] : [batch];
    const lay = (rows: number, columns: number, form: Form) => {
      const shape = [...lead, rows, columns];
      const { order, gap } = placement(form, shape.length);
      const strides: number[] = [];
      let step = 1;
      for (const [i, dim] of order.toReversed().entries()) {
        strides[dim] = step;
        step = step * shape[dim] + (i === 0 ? gap : i === 1 ? form.batchGap : 0);
      }
      return {
        tensor: matrix("f32", shape, strides),
        data: Float64Array.from({ length: step }, noise(seed)),
      };
    };
    const [x, w, y] = [lay(m, k, a), lay(n, k, b), lay(m, n, out)];
    const gemm = gemmOf(x.tensor, w.tensor, y.tensor);
    const [first, second] = gemm.swapped ? [w.data, x.data] : [x.data, w.data];
    y.data.fill(NaN);
    emulate(gemm, first, second, y.data, alpha);
    const element = (tensor: Tensor, index: number[]) =>
      tensor.strides.reduce((at, stride, dim) => at + stride * index[dim], 0);
    for (let i = 0; i < (batch ?? 1); i++) {
      const entry = batch === undefined ? [] : [i];
      for (let row = 0; row < m; row++) {
        for (let column = 0; column < n; column++) {
          let sum = 0;
          for (let l = 0; l < k; l++) {
            sum += x.data[element(x.tensor, [...entry, row, l])] *
              w.data[element(w.tensor, [...entry, column, l])];
          }
          const actual = y.data[element(y.tensor, [...entry, row, column])];
          assert(Math.abs(actual - alpha * sum) < 1e-12, `${actual} is not ${alpha * sum}`);
        }
      }
    }
  }));
});

const noHeaders = await missingHeaders("cublasLt.h");
Deno.test({
  name: `cuBLASLt's constants are those of cublasLt.h${
    noHeaders === undefined ? "" : ` (skipped: ${noHeaders})`
  }`,
  ignore: noHeaders !== undefined,
  fn: async () => assert.equal(await compareWithHeaders(["cublasLt.h"], HEADER), undefined),
});

function missingLibrary(): string | undefined {
  try {
    new CublasLtLibrary(13)[Symbol.dispose]();
    return undefined;
  } catch (error) {
    if (error instanceof FfiError) return error.message.split(". ")[0];
    throw error;
  }
}

const noLibrary = missingLibrary();
Deno.test({
  name: `the real cuBLASLt takes our descriptors${noLibrary === undefined ? "" : ` (skipped: ${noLibrary})`}`,
  ignore: noLibrary !== undefined,
  fn: () => {
    using library = new CublasLtLibrary(13);
    for (const dtype of ["f32", "bf16", "f16"] as const) {
      for (const lead of [[], [24]]) {
        const plan = {
          a: matrix(dtype, [...lead, 7, 16]),
          b: matrix(dtype, [...lead, 9, 16]),
          out: matrix(dtype, [...lead, 7, 9]),
          bias: matrix(dtype, [9]),
        };
        using descriptors = library.describe(columnMajorGemm(plan)!);
        library.setOperation(
          descriptors.operation,
          HEADER.CUBLASLT_MATMUL_DESC_BIAS_POINTER,
          BigUint64Array.of(0x1000n),
        );
        using _preference = library.preference([256, 16, 2, 2]);
      }
    }
    const one = matrix("f32", [1]);
    const changes: Partial<MatmulPlan>[] = [
      {},
      { bias: undefined },
      { activation: undefined, bias: undefined },
      { scaleA: one, scaleB: one },
    ];
    for (const change of changes) {
      using descriptors = library.describe(columnMajorGemm(float8Plan(change))!);
      for (const side of ["A", "B"] as const) {
        const address = BigUint64Array.of(0x1000n);
        library.setOperation(
          descriptors.operation,
          HEADER[`CUBLASLT_MATMUL_DESC_${side}_SCALE_POINTER`],
          address,
        );
      }
    }
    assert.throws(
      () => library.setOperation(0n, HEADER.CUBLASLT_MATMUL_DESC_EPILOGUE, Int32Array.of(1)),
      /cublasLtMatmulDescSetAttribute failed for attribute 7: CUBLAS_STATUS_INVALID_VALUE \(7\)/,
    );
  },
});

/** A CublasLt over the stand-in, and what the stand-in counted. */
interface StandIn {
  readonly library: CublasLt;
  readonly heuristicCalls: () => number;
  readonly objects: () => number;
}

async function withStandIn(body: (standIn: StandIn) => Promise<void> | void): Promise<void> {
  const folder = await Deno.makeTempDir();
  const before = Deno.env.get("FLUX_LIB_PATH");
  try {
    const path = `${folder}/libcublasLt.so.13`;
    assert.equal(await compileC(STAND_IN, ["-O1", "-shared", "-fPIC", "-o", path]), undefined);
    Deno.env.set("FLUX_LIB_PATH", folder);
    const counters = Deno.dlopen(path, {
      standInHeuristicCalls: { parameters: [], result: "i32" },
      standInObjects: { parameters: [], result: "i32" },
    });
    const context = {
      driver: { enter() {}, driverGetVersion: () => [13, 0] },
      stream: 5n,
      capability: [9, 0],
      // As a device that measures: all ways are tried, and the last one is taken.
      choose: (_key: string, ways: () => readonly (() => boolean)[]) => ways().map((way) => way()).length - 1,
      workspace: (bytes: number) => {
        assert.equal(bytes, 32 * 2 ** 20);
        return 0x7000n;
      },
    } as unknown as CudaContext;
    const library = new CublasLt(context);
    try {
      await body({
        library,
        heuristicCalls: () => counters.symbols.standInHeuristicCalls(),
        objects: () => counters.symbols.standInObjects(),
      });
    } finally {
      library[Symbol.dispose]();
      assert.equal(counters.symbols.standInObjects(), 0, "descriptors or handles were not destroyed");
      counters.close();
    }
  } finally {
    if (before === undefined) Deno.env.delete("FLUX_LIB_PATH");
    else Deno.env.set("FLUX_LIB_PATH", before);
    await Deno.remove(folder, { recursive: true });
  }
}

const standInTest = (name: string, body: (standIn: StandIn) => Promise<void> | void) =>
  Deno.test({
    name: `cuBLASLt on a stand-in: ${name}${noHeaders === undefined ? "" : ` (skipped: ${noHeaders})`}`,
    ignore: noHeaders !== undefined,
    fn: () => withStandIn(body),
  });

standInTest("whole calls agree with float64 at any shape and layout, batched or not", async ({ library }) => {
  assert.equal(library.version, "13.1.0");
  using device = await openCpu({ provider: "wasm", threads: 1 });
  fc.assert(fc.property(problem, fc.constantFrom("f32", "bf16", "mixed"), (drawn, kind) => {
    check(library, device, drawn, kind === "f32" ? "f32" : "bf16", kind === "bf16" ? "bf16" : "f32");
  }));
});

function check(
  library: CublasLt,
  device: CpuDevice,
  { m, n, k, batch, a, b, out, bias, activation, alpha, seed }: Problem,
  dtype: "f32" | "bf16",
  outDtype: "f32" | "bf16",
): void {
  device.scope(() => {
    const lead = batch === undefined ? [] : [batch];
    const rank = lead.length + 2;
    const outForm = bias ? { ...out, rowsDense: true } : out;
    const x = sample(device, [...lead, m, k], dtype, placement(a, rank), noise(seed));
    const w = sample(device, [...lead, n, k], dtype, placement(b, rank), noise(seed + 1));
    const flat = { order: [0], gap: seed % 3, where: "device" } as const;
    const shift: Sample | undefined = bias ? sample(device, [n], outDtype, flat, noise(seed + 2)) : undefined;
    const y = poisoned(device, [...lead, m, n], outDtype, placement(outForm, rank));
    const expected = new Float64Array(y.size);
    const magnitude = new Float64Array(y.size);
    for (let at = 0; at < y.size; at++) {
      const i = Math.floor(at / (m * n));
      const row = Math.floor(at / n) % m;
      const column = at % n;
      for (let l = 0; l < k; l++) {
        const product = alpha * x.values[(i * m + row) * k + l] * w.values[(i * n + column) * k + l];
        expected[at] += product;
        magnitude[at] += Math.abs(product);
      }
      expected[at] += shift?.values[column] ?? 0;
      magnitude[at] += Math.abs(shift?.values[column] ?? 0);
      if (activation !== undefined) expected[at] = geluTanh(expected[at]);
    }
    library.matmul({ a: x.tensor, b: w.tensor, out: y, bias: shift?.tensor, alpha, activation });
    assertAccurate(readBack(y), expected, magnitude, outDtype);
  });
}

standInTest("float8 agrees with float64, with one scale or with one a row", async ({ library }) => {
  using device = await openCpu({ provider: "wasm", threads: 1 });
  fc.assert(
    fc.property(float8Problem, (drawn) => checkFloat8(device, (plan) => library.matmul(plan), drawn)),
  );
});

standInTest("products that differ in scales or activation only are kept apart", async (standIn) => {
  using device = await openCpu({ provider: "wasm", threads: 1 });
  const [a, b] = [2, 16].map((rows) =>
    Tensor.fromBytes(device, new Uint8Array(rows * 16).fill(0x38), [rows, 16], "f8e4m3") // ones
  );
  const scale = (values: number[]) => Tensor.fromFloat32(device, values, [values.length]);
  const run = (scaleA: Tensor, scaleB: Tensor, activation?: "geluTanh") => {
    const out = Tensor.empty(device, [2, 16], "f32");
    const before = standIn.heuristicCalls();
    standIn.library.matmul({ a, b, out, scaleA, scaleB, activation });
    return {
      values: [...readBack(out)].filter((_, i) => i % 16 < 2),
      asked: standIn.heuristicCalls() - before,
    };
  };
  const columns = Array.from({ length: 16 }, (_, j) => j === 1 ? 4 : 1);
  assert.deepEqual(run(scale([1]), scale([0.5])), { values: [8, 8, 8, 8], asked: 1 });
  assert.deepEqual(run(scale([1, 3]), scale(columns)), { values: [16, 64, 48, 192], asked: 1 });
  // Other scales at other addresses, and nothing is prepared again.
  assert.deepEqual(run(scale([2]), scale([0.25])), { values: [8, 8, 8, 8], asked: 0 });
  assert.deepEqual(run(scale([3, 1]), scale(columns)), { values: [48, 192, 16, 64], asked: 0 });
  const { values, asked } = run(scale([-1]), scale([2 ** -4]), "geluTanh");
  assert.equal(asked, 1);
  assert.ok(values.every((value) => Math.abs(value - geluTanh(-1)) < 1e-6), `${values}`);
  assert.deepEqual(run(scale([-1]), scale([2 ** -4])), { values: [-1, -1, -1, -1], asked: 0 });
  assert.throws(() => run(scale([1]), scale(columns)), { name: "ShapeError", message: /scales are neither/ });
});

standInTest("a product is prepared once, for all addresses of the same alignment", async (standIn) => {
  using device = await openCpu({ provider: "wasm", threads: 1 });
  const plan = (shift: number): MatmulPlan => ({
    a: Tensor.fromFloat32(device, [0, 1, 2, 3, 4, 5, 6, 7], [8]).narrow(0, shift, 6).reshape([2, 3]),
    b: Tensor.fromFloat32(device, [1, 0, 0, 1, 1, 1], [2, 3]),
    out: Tensor.empty(device, [2, 2], "f32"),
  });
  const before = standIn.heuristicCalls();
  const calls: number[] = [];
  for (const shift of [0, 0, 1, 1, 2]) {
    device.scope(() => {
      const drawn = plan(shift);
      standIn.library.matmul(drawn);
      assert.deepEqual([...readBack(drawn.out)], [shift, 3 * shift + 3, shift + 3, 3 * shift + 12]);
    });
    calls.push(standIn.heuristicCalls() - before);
  }
  // Memory of the CPU device is aligned to 64: shifted views are aligned to 4 and 8.
  assert.deepEqual([calls[2] - calls[1], calls[3] - calls[2], calls[4] - calls[3]], [1, 0, 1]);
});

standInTest(
  "what it has no algorithm for is refused by name, and nothing is left behind",
  async (standIn) => {
    using device = await openCpu({ provider: "wasm", threads: 1 });
    const objects = standIn.objects();
    const a = Tensor.fromFloat32(device, [1, 2], [1, 2]);
    const b = Tensor.fromFloat32(device, new Float32Array(26), [13, 2]);
    assert.throws(
      () => standIn.library.matmul({ a, b, out: Tensor.empty(device, [1, 13], "f32") }),
      {
        name: "FfiError",
        message:
          /cuBLASLt 13\.1\.0 has no algorithm for a f32 \[1, 2\].*, b f32 \[13, 2\].*, out f32 \[1, 13\]/,
      },
    );
    assert.equal(standIn.objects(), objects);
  },
);
