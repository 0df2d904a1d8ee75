import { dtypeBytes } from "../ffi/dtype.ts";
import { Float } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import { expect } from "./check.ts";
import { writeFloat32 } from "./cpu.ts";
import { gpuOf, launch } from "./gpu.ts";
import RANDOM_FILL_CU from "./random_fill.cu" with { type: "text" };

const SOURCE = { name: "random_fill.cu", text: RANDOM_FILL_CU };
const BLOCK = 256;

export interface RandomFillOptions {
  /** Whole number; its low 64 bits count. */
  readonly seed: number | bigint;
  /** Which of the seed's 2^32 independent sequences, each of 2^66 elements. */
  readonly stream: number;
  /** `"normal"`: mean 0 and variance 1 (at most 5.8 from 0); `"uniform"`: from 0 up to, not including, 1. */
  readonly kind: "normal" | "uniform";
  /** Each number is multiplied by this, then `shift` is added. */
  readonly scale: number;
  readonly shift: number;
}

/**
 * Fills a tensor with random numbers from a counter-based generator, Philox 4x32-10 (Salmon et al. 2011, "Parallel random
 * numbers: as easy as 1, 2, 3"). Element `i` depends on seed, stream and `i` only, whatever the device, and up to
 * rounding whatever the dtype. Uniform numbers are the same bit for bit on all devices, normal ones up to rounding.
 *
 * @param out dense. @throws ShapeError for a strided tensor, or a stream that is no whole number from 0 to 2^32 - 1.
 */
export function fillRandom(out: Tensor, options: RandomFillOptions): void {
  const { stream, kind, scale, shift } = options;
  expect(out.isContiguous, "fillRandom", () => `${out} is strided, expected a dense tensor`);
  expect(stream === stream >>> 0, "fillRandom", () => `stream ${stream} is no whole number below 2^32`);
  const seed = BigInt.asIntN(64, BigInt(options.seed));
  const gpu = gpuOf(out);
  if (gpu === undefined) {
    const values = new Float32Array(out.size);
    fillRandomReference(values, { ...options, seed });
    writeFloat32(out, values); // also where weights lie, outside of the arena
    return;
  }
  const width = 16 / dtypeBytes(out.dtype);
  launch(gpu, SOURCE, {
    entry: "randomFill",
    types: { T: out.dtype },
    constants: { N: width, ALIGNED: out.pointer % 16n === 0n ? 1 : 0, NORMAL: kind === "normal" ? 1 : 0 },
    grid: Math.ceil(out.size / (width * BLOCK)),
    block: BLOCK,
    args: [out, BigInt(out.size), seed, BigInt(stream), new Float(scale), new Float(shift)],
  });
}

/** {@link fillRandom} of f32 values. */
export function fillRandomReference(out: Float32Array, options: RandomFillOptions): void {
  const { stream, kind, scale, shift } = options;
  const seed = BigInt.asUintN(64, BigInt(options.seed));
  const key = [Number(seed & 0xffffffffn), Number(seed >> 32n)] as const;
  const words = new Uint32Array(4);
  for (let start = 0; start < out.length; start += 4) {
    const block = start / 4;
    words.set([block, block / 2 ** 32, stream, 0]);
    philox4x32(words, key);
    const [a, b, c, d] = Array.from(words, (word) => (word >>> 8) * 2 ** -24);
    const drawn = kind === "normal" ? [...boxMuller(a, b), ...boxMuller(c, d)] : [a, b, c, d];
    for (let i = 0; i < Math.min(4, out.length - start); i++) {
      out[start + i] = Math.fround(drawn[i]) * Math.fround(scale) + Math.fround(shift);
    }
  }
}

/** Two independent normal numbers from two uniform ones in [0, 1) (Box & Muller 1958). */
function boxMuller(a: number, b: number): [number, number] {
  const radius = Math.sqrt(-2 * Math.log(1 - a));
  const angle = 2 * Math.PI * (b - 0.5);
  return [radius * Math.cos(angle), radius * Math.sin(angle)];
}

/** Turns a counter of four 32-bit words into four random words, in place: ten rounds of Philox with a 64-bit key. */
export function philox4x32(words: Uint32Array, key: readonly [low: number, high: number]): void {
  let [key0, key1] = key;
  for (let round = 0; round < 10; round++) {
    const [w0, w1, w2, w3] = words;
    words[0] = multiplyHigh(0xcd9e8d57, w2) ^ w1 ^ key0;
    words[1] = Math.imul(0xcd9e8d57, w2);
    words[2] = multiplyHigh(0xd2511f53, w0) ^ w3 ^ key1;
    words[3] = Math.imul(0xd2511f53, w0);
    key0 = (key0 + 0x9e3779b9) | 0;
    key1 = (key1 + 0xbb67ae85) | 0;
  }
}

/** Upper 32 bits of the product of two unsigned 32-bit numbers. */
function multiplyHigh(a: number, b: number): number {
  const [aHigh, aLow, bHigh, bLow] = [a >>> 16, a & 0xffff, b >>> 16, b & 0xffff];
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16); // below 2^32
  const carry = (aLow * bHigh) + (middle % 2 ** 16); // below 2^32
  return aHigh * bHigh + Math.floor(middle / 2 ** 16) + Math.floor(carry / 2 ** 16);
}
