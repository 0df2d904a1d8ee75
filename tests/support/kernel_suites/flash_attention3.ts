/** FlashAttention-3 as a library, on a GPU against attention's TypeScript reference on the same rounded inputs. */
import assert from "node:assert/strict";
import { findFlashAttention3 } from "../../../ffi/cuda/flash_attn3.ts";
import { ShapeError } from "../../../ffi/errors.ts";
import { float32ToFloat8, float8ToFloat32 } from "../../../ffi/float8.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { LibraryNotFoundError } from "../../../ffi/library.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { attentionReference } from "../../../kernels/attention.ts";
import type { AttentionDType } from "../../../kernels/attention_tiles.ts";
import {
  hasLibraryAttention,
  libraryAttention,
  libraryAttentionTakes,
} from "../../../kernels/library_attention.ts";
import { jointAttention, jointAttentionByNamed } from "../../../kernels/joint_attention.ts";
import type { QkvStream } from "../../../kernels/joint_qk_norm_rope.ts";
import { assertClose } from "../compare.ts";
import { valuesOf } from "../golden.ts";
import { TEST_GPU } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { testOn } from "../test_device.ts";
import { columns, frame, NONE, sample } from "./samples.ts";

const HEAD_DIM = 128;
const DTYPES: readonly AttentionDType[] = ["f8e4m3", "bf16"];

/** What may be lost: the result is rounded to bf16, in float8 the softmax's weights are rounded, too. */
function limit({ name }: GpuDevice, dtype: AttentionDType): number {
  return dtype === "bf16" || name.includes("emulated") ? 0.004 : 0.04;
}

interface Sizes {
  readonly batch: number;
  readonly queries: number;
  readonly keys: number;
  readonly heads: number;
  /** Of q's values: large ones make the softmax sharp. */
  readonly spread: number;
}

/** FLUX.1-schnell's tokens are for GPUs only. */
function cases({ name }: GpuDevice): Sizes[] {
  const all = [
    [1, 128, 128, 1, 1],
    [1, 1, 1, 1, 1],
    [2, 200, 300, 3, 1],
    [1, 64, 16, 2, 4],
    [1, 33, 257, 2, 8],
    ...(name.includes("emulated") ? [] : [
      [1, 4352, 4352, 24, 1],
      [2, 1153, 1153, 24, 2],
      [1, 300, 1000, 24, 8],
    ]),
  ];
  return all.map(([batch, queries, keys, heads, spread]) => ({ batch, queries, keys, heads, spread }));
}

/** Values as attention multiplies them. */
function rounded(values: Float32Array, dtype: AttentionDType): Float32Array {
  if (dtype === "bf16") return values; // as they were drawn
  const codes = new Uint8Array(values.length);
  float32ToFloat8(values, codes);
  const result = new Float32Array(values.length);
  float8ToFloat32(codes, result, dtype);
  return result;
}

/** Where a dense `[batch, tokens, heads, 128]` has these tokens, in order. */
function tokensOf(values: Float32Array, { batch, heads }: Sizes, tokens: number, chosen: readonly number[]) {
  const row = heads * HEAD_DIM;
  return Float32Array.from({ length: batch * chosen.length * row }, (_, i) => {
    const token = chosen[Math.floor(i / row) % chosen.length];
    return values[(Math.floor(i / row / chosen.length) * tokens + token) * row + i % row];
  });
}

/** The tests run where it is installed; elsewhere their names say that it is not. */
export function flashAttention3Suite(): void {
  const gpu = TEST_GPU.name === "cuda" ? { ...TEST_GPU, skip: TEST_GPU.skip ?? notInstalled() } : TEST_GPU;
  const test = (title: string, body: (device: GpuDevice) => void | Promise<void>) =>
    testOn(gpu, `flashAttention3: ${title}`, async (device) => {
      if (hasLibraryAttention(device, "fa3", "bf16")) return await body(device);
      // Not Hopper: it says so, and nothing is computed.
      device.scope(() => {
        const x = Tensor.empty(device, [1, 2, 1, HEAD_DIM], "bf16");
        assert.throws(() => libraryAttention(device, "fa3", { q: x, k: x, v: x }, "bf16"), ShapeError);
      });
    });

  test("is near its reference on rounded inputs: FLUX's sizes, odd lengths, batches, sharp softmax", async (device) => {
    for (const dtype of DTYPES) {
      for (const sizes of cases(device)) {
        const { batch, queries, keys, heads, spread } = sizes;
        const draw = (tokens: number, seed: number, size: number) =>
          sample(device, [batch, tokens, heads, HEAD_DIM], "bf16", (i) => 2 * size * noise(seed)(i));
        const [q, k, v] = [draw(queries, 1, spread), draw(keys, 2, 1), draw(keys, 3, 1)];
        const out = libraryAttention(device, "fa3", { q: q.tensor, k: k.tensor, v: v.tensor }, dtype);
        // The first and the last of a tile, of the tokens, and some between.
        const chosen = [...new Set([0, 1, 127, 128, queries >> 1, queries - 1])].filter((i) => i < queries);
        const expected = new Float32Array(batch * chosen.length * heads * HEAD_DIM);
        attentionReference(
          expected,
          rounded(tokensOf(q.values, sizes, queries, chosen), dtype),
          rounded(k.values, dtype),
          rounded(v.values, dtype),
          NONE,
          { batch, queries: chosen.length, keys, heads, headDim: HEAD_DIM },
          HEAD_DIM ** -0.5,
          false,
        );
        const actual = tokensOf(await valuesOf(out), sizes, queries, chosen);
        assertClose(actual, expected, limit(device, dtype), `${dtype} ${JSON.stringify(sizes)}`);
        for (const { memory } of [q.tensor, k.tensor, v.tensor, out]) device.free(memory);
      }
    }
  });

  test("reads slices of a product, writes into columns, takes a scale", async (device) => {
    const [tokens, heads] = [70, 2];
    const width = heads * HEAD_DIM;
    for (const dtype of DTYPES) {
      const shape = [1, tokens, heads, HEAD_DIM];
      const slices = [1, 2, 3].map((seed) =>
        columns(device, [1, tokens, width], "bf16", noise(seed), 3 * width)
      );
      const [q, k, v] = slices.map(({ tensor }) => tensor.reshape(shape));
      const place = frame(device, [1, tokens, width], "bf16", 64);
      const out = place.inside.reshape(shape);
      assert.equal(libraryAttention(device, "fa3", { q, k, v }, dtype, { out, scale: 0.5 }), out);
      const expected = new Float32Array(tokens * width);
      const sizes = { batch: 1, queries: tokens, keys: tokens, heads, headDim: HEAD_DIM };
      const [qs, ks, vs] = slices.map(({ values }) => rounded(values, dtype));
      attentionReference(expected, qs, ks, vs, NONE, sizes, 0.5, false);
      const whole = await valuesOf(place.whole);
      const beside = Array.from(place.filled(expected), Number.isNaN);
      assertClose(whole.filter((_, i) => !beside[i]), expected, limit(device, dtype), dtype);
      assert.ok(whole.every((value, i) => !beside[i] || Number.isNaN(value)), "what is beside it stays");
      for (const { tensor } of slices) device.free(tensor.memory);
      device.free(place.whole.memory);
    }
  });

  test("in a recorded graph computes what it computes at once, again and again", async (device) => {
    for (const dtype of DTYPES) {
      const shape = [1, 200, 3, HEAD_DIM];
      const drawn = (seed: number) => sample(device, shape, "bf16", noise(seed)).tensor;
      const [x, out] = [drawn(1), Tensor.empty(device, shape, "bf16")];
      const attend = () => {
        const middle = libraryAttention(device, "fa3", { q: x, k: x, v: x }, dtype);
        libraryAttention(device, "fa3", { q: middle, k: x, v: x }, dtype, { out });
      };
      device.scope(attend); // as graphExecute does
      using graph = device.record(() => device.scope(attend));
      for (const seed of [2, 3]) {
        const other = drawn(seed);
        device.upload(await device.download(other), x.memory);
        device.scope(attend);
        const expected = await device.download(out);
        device.upload(new Uint8Array(out.byteLength), out.memory);
        for (let i = 0; i < 3; i++) graph.replay();
        assert.deepEqual(await device.download(out), expected, `${dtype}, inputs ${seed}`);
        device.free(other.memory);
      }
      for (const { memory } of [x, out]) device.free(memory);
    }
  });

  test("serves joint attention: two streams, and one whose v is a slice", async (device) => {
    const [heads, width] = [2, 2 * HEAD_DIM];
    const memories = new Set<Tensor["memory"]>();
    const kept = (tensor: Tensor) => (memories.add(tensor.memory), tensor);
    const stream = (tokens: number, seed: number): QkvStream => {
      const shape = [1, tokens, heads, HEAD_DIM];
      const slice = (i: number) =>
        kept(columns(device, [1, tokens, width], "bf16", noise(seed + i), width).tensor).reshape(shape);
      const norm = (i: number) =>
        kept(sample(device, [HEAD_DIM], "bf16", (at) => 1 + noise(i)(at) / 4).tensor);
      return { q: slice(0), k: slice(1), v: slice(2), normQ: norm(3), normK: norm(4) };
    };
    for (const streams of [[stream(20, 10), stream(45, 20)], [stream(65, 30)]]) {
      const table = (phase: number) =>
        kept(sample(device, [65, HEAD_DIM], "f32", (i) => Math.cos((i >> 1) + phase)).tensor);
      const [cos, sin] = [table(0), table(-Math.PI / 2)];
      const expected = kept(jointAttention(streams, cos, sin, 1e-6));
      for (const dtype of DTYPES) {
        const actual = kept(jointAttentionByNamed(device, "fa3", streams, cos, sin, 1e-6, dtype));
        const allowed = dtype === "bf16" ? 0.01 : 0.1;
        assertClose(await valuesOf(actual), await valuesOf(expected), allowed, `${streams.length} ${dtype}`);
      }
    }
    for (const memory of memories) device.free(memory);
  });

  test("refuses what does not fit", (device) =>
    device.scope(() => {
      const x = Tensor.empty(device, [1, 6, 2, HEAD_DIM], "bf16");
      const refuses = (qkv: { q: Tensor; k: Tensor; v: Tensor }, out?: Tensor) =>
        assert.throws(
          () => libraryAttention(device, "fa3", qkv, "f8e4m3", out === undefined ? {} : { out }),
          ShapeError,
        );
      const all = { q: x, k: x, v: x };
      refuses({ ...all, v: x.narrow(1, 0, 5) });
      refuses({ ...all, k: x.narrow(2, 0, 1) });
      refuses({ ...all, k: x.narrow(1, 0, 0), v: x.narrow(1, 0, 0) });
      const narrow = x.narrow(3, 0, 64);
      refuses({ q: narrow, k: narrow, v: narrow });
      refuses(all, x.narrow(1, 0, 5));
      refuses(all, Tensor.empty(device, x.shape, "f32"));
      assert.ok(libraryAttentionTakes(x));
      for (const other of [narrow, x.narrow(1, 0, 0), Tensor.empty(device, x.shape, "f32")]) {
        assert.ok(!libraryAttentionTakes(other), String(other));
      }
    }));
}

function notInstalled(): string | undefined {
  try {
    findFlashAttention3();
    return undefined;
  } catch (error) {
    if (!(error instanceof LibraryNotFoundError)) throw error;
    return `${error.message.split(" (")[0]}: ${error.hint}`;
  }
}
