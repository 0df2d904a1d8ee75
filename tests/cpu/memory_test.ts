/** The CPU device's memory: the arena of activations, weights beside it, and what the autoencoder holds at once. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { Arena } from "../../ffi/arena.ts";
import { type CpuDevice, type CpuMemory, viewOf } from "../../ffi/cpu/device.ts";
import { openCpu } from "../../ffi/cpu/open.ts";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { add } from "../../kernels/add.ts";
import { cast } from "../../kernels/cast.ts";
import { readFloat32 } from "../../kernels/cpu.ts";
import { groupNormSilu } from "../../kernels/group_norm_silu.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { autoencoderWeightShapes, decode, encode } from "../../recipes/base/autoencoder.ts";
import { Model } from "../../recipes/base/model.ts";
import { eagerOps, type Ops } from "../../recipes/base/ops.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { castWeights, weightsFrom } from "../../recipes/base/weights.ts";
import { FLUX_AUTOENCODER } from "../support/flux_autoencoder.ts";
import { goldenPath } from "../support/golden.ts";
import { PROVIDERS } from "../support/providers.ts";

const MIB = 2 ** 20;

Deno.test("arena: blocks are aligned, inside and apart; all merges again; nothing fits only where nothing can", () => {
  const limit = 1 << 16;
  const steps = fc.array(fc.oneof(fc.record({ bytes: fc.nat(9000) }), fc.record({ free: fc.nat() })), {
    maxLength: 200,
  });
  fc.assert(
    fc.property(steps, (drawn) => {
      const arena = new Arena(64, limit, 64);
      const bytes = new Uint8Array(limit);
      const blocks: { start: number; size: number; poison: number }[] = [];
      const release = (index: number) => {
        const [{ start, size, poison }] = blocks.splice(index, 1);
        assert(
          bytes.subarray(start, start + size).every((byte) => byte === poison),
          "another block wrote here",
        );
        assert.equal(arena.free(start), size);
        assert.throws(() => arena.free(start), FfiError);
      };
      for (const [i, step] of drawn.entries()) {
        if ("bytes" in step) {
          const size = arena.blockSize(step.bytes);
          assert(size >= Math.max(step.bytes, 1) && size < step.bytes + 65);
          const start = arena.alloc(step.bytes);
          if (start === undefined) {
            assert(!gaps(blocks, limit).some((gap) => gap >= size), "a free range was overlooked");
            continue;
          }
          assert.equal(start % 64, 0);
          assert(start >= 64 && start + size <= limit);
          blocks.push({ start, size, poison: i });
          bytes.fill(i, start, start + size);
        } else if (blocks.length > 0) {
          release(step.free % blocks.length);
        }
        assert.equal(arena.end, Math.max(64, ...blocks.map(({ start, size }) => start + size)));
      }
      while (blocks.length > 0) release(blocks.length >> 1);
      assert.equal(arena.end, 64, "all is given back");
      assert.equal(arena.alloc(limit - 64), 64, "and is one range again");
      assert.equal(arena.alloc(1), undefined);
    }),
    { numRuns: 300 },
  );
});

/** Lengths of the free ranges between `blocks`, from 64 up to `limit`. */
function gaps(blocks: readonly { start: number; size: number }[], limit: number): number[] {
  const sorted = blocks.toSorted((a, b) => a.start - b.start);
  const ends = [64, ...sorted.map(({ start, size }) => start + size)];
  return ends.map((end, i) => (sorted[i]?.start ?? limit) - end);
}

Deno.test("arena: the smallest range that is large enough is taken", () => {
  const arena = new Arena(0, 1 << 16, 64);
  const [large, , small] = [640, 64, 128, 64].map((bytes) => arena.alloc(bytes)!);
  arena.free(large);
  arena.free(small);
  assert.equal(arena.alloc(100), small);
  assert.equal(arena.alloc(100), large);
});

for (const { name, skip, open } of PROVIDERS.slice(0, 2)) {
  Deno.test({
    name: `${name}: pictures of many sizes take no more than the largest one needs`,
    ignore: skip !== undefined,
    fn: async () => {
      using device = await open();
      using model = await Model.load(goldenPath("schnell-like"), device);
      const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), baselineFp32));
      for (const side of [32, 208, 64, 256, 96, 240, 128, 160, 48, 256]) {
        const [height, width] = [side, 272 - side];
        await pipeline.generate({ prompt: "a", seed: 1, numInferenceSteps: 1, height, width });
      }
      const { peak, reserved } = device.memoryUse();
      assert(reserved <= 1.2 * peak + MIB, `${reserved} bytes for a peak of ${peak}`);
    },
  });
}

Deno.test("cast weights lie outside of the arena, unharmed by scopes, and count as weights", async () => {
  using device = await openCpu({ provider: "wasm", threads: 1 });
  const bits = new Uint16Array(3 * MIB + 5).map((_, i) => i & 0x7f7f);
  const mapped = new Uint8Array(bits.byteLength + 1); // an odd address, as in a file
  mapped.set(new Uint8Array(bits.buffer), 1);
  const weight = new Tensor(device.place(mapped.subarray(1)), "bf16", [bits.length]);
  const before = device.memoryUse();
  const plan = weightsFrom(new Map([["w", weight]]));
  const wide = device.scope(() => castWeights(plan, "f32", eagerOps)).get("w");
  const after = device.memoryUse();
  assert.equal(after.current, before.current);
  assert.equal(after.weights - before.weights, bits.length * 4);
  assert(after.peak - before.peak < 8 * MIB, "whole copies went through the arena");
  assert.equal((wide.memory as CpuMemory).wasmOffset, undefined);
  assert.equal(wide.pointer % 64n, 0n);
  const values = viewOf(wide, "f32", wide.size);
  const words = new Uint32Array(values.buffer, values.byteOffset, values.length);
  assert(words.every((word, i) => word === bits[i] << 16));
  const narrow = castWeights(weightsFrom(new Map([["w", wide]])), "bf16", eagerOps).get("w");
  assert(viewOf(narrow, "bf16", narrow.size).every((word, i) => word === bits[i]));
  assert.equal(castWeights(plan, "bf16", eagerOps).get("w"), weight, "the same dtype is shared");

  wide.dispose();
  assert.equal(device.memoryUse().weights, before.weights + bits.byteLength);
  assert.equal(values.length, 0, "freed at once");
  assert.throws(() => wide.dispose(), FfiError);
  assert.throws(
    () => device.alloc(2 ** 52, "weights"),
    (error: unknown) =>
      error instanceof OutOfMemoryError && /weight of .* weights take 6\.0 MiB already/.test(error.message) &&
      /bfloat16 weights take half/.test(error.hint ?? ""),
  );
});

Deno.test("weights that nothing refers to any more are given back", async () => {
  using device = await openCpu({ provider: "wasm", threads: 1 });
  let allocated = 0;
  // Each is of a size that asks for a garbage collection sooner or later; at most 12 GiB of address space.
  for (let i = 0; i < 48; i++, allocated += 256 * MIB) {
    device.alloc(256 * MIB, "weights");
    await new Promise((resolve) => setTimeout(resolve, 1));
    if (device.memoryUse().weights < allocated) return;
  }
  assert.fail("nothing was collected");
});

Deno.test("packed copies of weights are counted wherever they lie", async () => {
  for (const { skip, open } of PROVIDERS.slice(0, 2)) {
    if (skip !== undefined) continue;
    using device = await open();
    const b = weight(device, 256);
    const a = Tensor.fromFloat32(device, new Float32Array(64 * 256).fill(1), [64, 256]);
    const out = Tensor.empty(device, [64, 256], "f32");
    const total = () => device.memoryUse().current + device.memoryUse().weights;
    const before = total();
    device.conv({
      x: a.reshape([1, 256, 8, 8]),
      weight: b.reshape([256, 256, 1, 1]),
      out: out.reshape([1, 256, 8, 8]),
      stride: 1,
      padding: [0, 0, 0, 0],
    });
    assert(total() - before >= 256 * 256 * 4);
    device.free(b.memory);
    assert.equal(total(), before, "they go with their weight");
  }
});

/** A square weight of ones, placed outside of the arena. */
function weight(device: CpuDevice, side: number): Tensor {
  const values = new Float32Array(side * side).fill(1);
  return new Tensor(device.place(new Uint8Array(values.buffer)), "f32", [side, side]);
}

/** Bytes of the largest block that there is room for, packed weights gone. */
function largestBlock(device: CpuDevice): number {
  let [fits, fails] = [0, 4096 * MIB];
  while (fails - fits > 64) {
    const middle = Math.floor((fits + fails) / 128) * 64;
    try {
      device.free(device.alloc(middle));
      fits = middle;
    } catch (error) {
      if (!(error instanceof OutOfMemoryError)) throw error;
      fails = middle;
    }
  }
  return fits;
}

Deno.test("where activations fill the arena, packed weights make room; then the error says what there is", async () => {
  using device = await openCpu({ provider: "wasm", threads: 1 });
  const b = weight(device, 512);
  const a = Tensor.fromFloat32(device, new Float32Array(2 * 512).fill(1), [2, 512]);
  const out = Tensor.empty(device, [2, 512], "f32");
  device.matmul({ a, b, out, constant: true });
  const packed = 512 * 512 * 4;
  assert.equal(device.memoryUse().weights, packed);
  const most = largestBlock(device);
  const hog = device.alloc(most - 65536);
  assert.equal(device.memoryUse().weights, 0, "the packed weights went");
  assert.throws(
    () => device.matmul({ a, b, out, constant: true }), // no room to pack either
    (error: unknown) =>
      error instanceof OutOfMemoryError && /in use of at most 4096\.0 MiB/.test(error.message) &&
      /--height/.test(error.hint ?? ""),
  );
  device.free(hog);
  viewOf(out, "f32", out.size).fill(0);
  device.matmul({ a, b, out, constant: true });
  assert(viewOf(out, "f32", out.size).every((value) => value === 512));
  const rest = device.alloc(most - packed);
  const other = weight(device, 64);
  device.matmul({ a: a.narrow(1, 0, 64), b: other, out: out.narrow(1, 0, 64), constant: true }); // takes b's place
  assert.equal(viewOf(out, "f32", 1)[0], 64);
  device.free(rest);
});

Deno.test("group norm with SiLU holds two pictures, a bf16 sum hardly more than its three", async () => {
  using device = await openCpu({ provider: "wasm", threads: 1 });
  const x = Tensor.empty(device, [1, 64, 128, 128], "f32");
  viewOf(x, "f32", x.size).fill(1);
  const ones = Tensor.fromFloat32(device, new Float32Array(64).fill(1), [64]);
  const before = device.memoryUse().current;
  const y = device.scope(() => groupNormSilu(x, 8, ones, ones, 1e-6));
  assert(device.memoryUse().peak - before < 1.1 * x.byteLength);
  assert(Math.abs(viewOf(y, "f32", y.size)[y.size - 1] - 1 / (1 + Math.exp(-1))) < 1e-6);
  assert.equal(viewOf(x, "f32", 1)[0], 1, "the input is left alone");
  for (const tensor of [x, y]) tensor.dispose();

  const values = Float32Array.from({ length: 8 * MIB }, (_, i) => i % 128);
  const wide = Tensor.fromFloat32(device, values, [8, MIB]);
  const narrow = cast(wide, "bf16");
  const sum = add(narrow, narrow);
  const use = device.memoryUse();
  assert(use.peak - use.current < 16 * MIB, "f32 copies of whole pictures");
  assert(readFloat32(sum).every((value, i) => value === 2 * values[i]));
});

/** Operators that allocate what they return and compute nothing: only sizes matter. */
function shapesOnly(): Ops {
  const like = (x: Tensor) => Tensor.empty(x.device, x.shape, x.dtype);
  return {
    ...eagerOps,
    add: (a, _, place) => place ?? like(a),
    attention: like,
    cast: (x, dtype) => Tensor.empty(x.device, x.shape, dtype),
    contiguous: (x) => x.isContiguous ? x : like(x),
    conv2d: (x, w, _bias, { stride = 1 } = {}) =>
      Tensor.empty(x.device, [x.shape[0], w.shape[0], x.shape[2] / stride, x.shape[3] / stride], x.dtype),
    groupNorm: like,
    groupNormSilu: like,
    linear: (x, w) => Tensor.empty(x.device, [...x.shape.slice(0, -1), w.shape[0]], x.dtype),
    linears: (x, layers) =>
      layers.map(({ weight }) => Tensor.empty(x.device, [...x.shape.slice(0, -1), weight.shape[0]], x.dtype)),
    scaleShift: like,
    upsampleNearest: (x) =>
      Tensor.empty(x.device, [x.shape[0], x.shape[1], 2 * x.shape[2], 2 * x.shape[3]], x.dtype),
  };
}

Deno.test("FLUX.1's autoencoder at 1024 x 1024 leaves room in the arena, in float32 too", async () => {
  for (const dtype of ["bf16", "f32"] as const) {
    using device = await openCpu({ provider: "wasm", threads: 1 });
    const none = device.place(new Uint8Array());
    const weights = weightsFrom(
      new Map(
        [...autoencoderWeightShapes(FLUX_AUTOENCODER)].map((
          [name, shape],
        ) => [name, new Tensor(none, dtype, shape)]),
      ),
    );
    const latents = Tensor.empty(device, [2, 16, 128, 128], "f32");
    const pair = device.scope(() => decode(FLUX_AUTOENCODER, weights, shapesOnly(), latents));
    assert.deepEqual(pair.shape, [2, 3, 1024, 1024]);
    const picture = pair.narrow(0, 0, 1);
    // 256 channels at full size before and after the norm, and 128 behind the convolution.
    const pictures = (2 * 256 + 128) * MIB * (dtype === "f32" ? 4 : 2);
    const { peak, reserved } = device.memoryUse();
    assert(peak <= pictures + 64 * MIB, `${dtype}: ${peak} bytes`);
    assert(reserved <= 1.25 * peak, `${dtype}: ${reserved} bytes reserved for ${peak}`);
    device.scope(() => encode(FLUX_AUTOENCODER, weights, shapesOnly(), picture));
    assert(device.memoryUse().peak <= pictures + 64 * MIB);
  }
});
