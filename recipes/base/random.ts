/**
 * torch's CPU random generator, bit for bit: `torch.manual_seed(n)` followed by `torch.randn(...)`.
 *
 * A FLUX seed means "these starting latents", so equal images need equal bits, not only an equal distribution.
 *
 * What is reproduced (torch 2.13, x86 with AVX2, which AVX-512 machines use too because torch registers no
 * AVX-512 variant of `normal_`):
 * - the engine: mt19937 (Matsumoto and Nishimura 1998), seeded with the low 32 bits of the seed;
 *   `aten/src/ATen/core/MT19937RNGEngine.h`;
 * - 16 or more values: Box-Muller over blocks of 16 in float32 (kernels/box_muller.ts);
 * - fewer than 16 values: Box-Muller in float64, two values at a time, the second kept for the next call;
 *   `aten/src/ATen/core/DistributionsHelper.h`.
 *
 * Not reproduced: torch on CPUs without AVX2 (ARM among them) takes libm's log, sin and cos and differs in the
 * last bits. Older torch releases drew bfloat16 in bfloat16 arithmetic and gave other bfloat16 numbers; their
 * float32 numbers come from the same algorithm.
 */

import { BOX_MULLER_BLOCK as BLOCK, boxMuller16 } from "../../kernels/box_muller.ts";
import { UsageError } from "./errors.ts";

const STATE = 624;
const SHIFT = 397;

/** A stream of random numbers with torch.Generator's state: the engine and the kept second normal. */
export class Generator {
  /** The seed as given, for file names and metadata. */
  readonly seed: bigint;
  readonly #state = new Uint32Array(STATE);
  #next = STATE;
  /** Second half of the last scalar Box-Muller pair. The block path neither reads nor clears it, as in torch. */
  #kept: number | undefined;

  /**
   * As `torch.Generator().manual_seed(seed)`: any integer from -2^63 to 2^64-1; only its low 32 bits matter.
   * @throws UsageError for a fraction, a number that float64 does not hold exactly, or one out of range.
   */
  constructor(seed: bigint | number) {
    if (typeof seed === "number" && !Number.isSafeInteger(seed)) {
      throw new UsageError(`seed ${seed} is not an exact integer: give a whole number (bigint above 2^53)`);
    }
    this.seed = BigInt(seed);
    if (this.seed < -(2n ** 63n) || this.seed >= 2n ** 64n) {
      throw new UsageError(`seed ${seed} is out of range: give a whole number from -2^63 to 2^64-1`);
    }
    const state = this.#state;
    state[0] = Number(BigInt.asUintN(32, this.seed));
    for (let i = 1; i < STATE; i++) {
      state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    }
  }

  /**
   * `torch.randn(count, dtype=torch.float32, generator=this)`.
   * @returns float32 [count], standard normal.
   * @throws UsageError when count is not a whole number of zero or more.
   */
  randn(count: number): Float32Array<ArrayBuffer> {
    checkCount(count);
    const out = new Float32Array(count);
    if (count < BLOCK) {
      for (let i = 0; i < count; i++) out[i] = this.#scalarNormal();
      return out;
    }
    this.#fillUniform(out);
    for (let i = 0; i + BLOCK <= count; i += BLOCK) boxMuller16(out, i);
    if (count % BLOCK !== 0) {
      // torch redraws the last 16 values, over the tail and over part of the block before it.
      for (let i = count - BLOCK; i < count; i++) out[i] = this.#uniform();
      boxMuller16(out, count - BLOCK);
    }
    return out;
  }

  /**
   * `torch.randn(count, dtype=torch.bfloat16, generator=this)`: drawn and transformed in float32, then rounded.
   * Unlike the float32 path it draws no uniforms for an incomplete last block before redrawing the last 16, so
   * for counts that are not multiples of 16 the streams differ.
   * @returns bfloat16 bit patterns [count].
   * @throws UsageError when count is not a whole number of zero or more.
   */
  randnBfloat16(count: number): Uint16Array<ArrayBuffer> {
    checkCount(count);
    const out = new Uint16Array(count);
    const block = new Float32Array(BLOCK);
    const bits = new Uint32Array(block.buffer);
    if (count < BLOCK) {
      for (let i = 0; i < count; i++) {
        block[0] = this.#scalarNormal();
        out[i] = roundToBfloat16(bits[0]);
      }
      return out;
    }
    const drawBlock = (start: number) => {
      for (let j = 0; j < BLOCK; j++) block[j] = this.#uniform();
      boxMuller16(block, 0);
      for (let j = 0; j < BLOCK; j++) out[start + j] = roundToBfloat16(bits[j]);
    };
    for (let i = 0; i + BLOCK <= count; i += BLOCK) drawBlock(i);
    if (count % BLOCK !== 0) drawBlock(count - BLOCK);
    return out;
  }

  /**
   * What {@link randn} and {@link randnBfloat16} transform by kernels/box_muller.ts where `count` is a multiple of 16: the
   * numbers go to a GPU this way, which transforms them faster.
   * @returns float32 [count], multiples of 2^-24 from 0 up to, not including, 1.
   * @throws UsageError when count is no multiple of 16.
   */
  uniforms(count: number): Float32Array<ArrayBuffer> {
    checkCount(count);
    if (count % BLOCK !== 0) throw new UsageError(`uniforms: count ${count} is no multiple of ${BLOCK}`);
    const out = new Float32Array(count);
    this.#fillUniform(out);
    return out;
  }

  /** As many {@link #uniform} in a row, a generation at a time: a picture has hundreds of thousands, which its GPU waits for. */
  #fillUniform(out: Float32Array): void {
    const state = this.#state;
    for (let at = 0; at < out.length;) {
      const first = this.#generation();
      const count = Math.min(out.length - at, STATE - first);
      for (let i = 0; i < count; i++) out[at + i] = uniformOf(temper(state[first + i]));
      this.#next = first + count;
      at += count;
    }
  }

  /** The engine's next 32 bits, tempered; as a signed integer, since the callers mask it anyway. */
  #random(): number {
    const at = this.#generation();
    this.#next = at + 1;
    return temper(this.#state[at]);
  }

  /** Where the next word stands in the state, of a new generation when the last one is used up. */
  #generation(): number {
    if (this.#next < STATE) return this.#next;
    twist(this.#state);
    return 0;
  }

  /** Uniform float32 in [0, 1): 24 random bits. */
  #uniform(): number {
    return uniformOf(this.#random());
  }

  /** Uniform float64 in [0, 1): the low 53 bits of two draws, the first draw being the high word. */
  #uniformDouble(): number {
    const high = this.#random() & 0x1fffff;
    const low = this.#random() >>> 0;
    return (high * 2 ** 32 + low) * 2 ** -53;
  }

  #scalarNormal(): number {
    if (this.#kept !== undefined) {
      const value = this.#kept;
      this.#kept = undefined;
      return value;
    }
    const u1 = this.#uniformDouble();
    const u2 = this.#uniformDouble();
    const radius = Math.sqrt(-2 * Math.log1p(-u2));
    const theta = 2 * Math.PI * u1;
    this.#kept = radius * Math.sin(theta) + 0; // + 0: torch adds the mean, which turns -0 into 0
    return radius * Math.cos(theta) + 0;
  }
}

function checkCount(count: number): void {
  if (!Number.isSafeInteger(count) || count < 0) {
    throw new UsageError(`randn: count ${count} is not a whole number of zero or more`);
  }
}

/** Uniform float32 in [0, 1): 24 of a word's bits. */
function uniformOf(word: number): number {
  return (word & 0xffffff) * 2 ** -24;
}

/** A word of mt19937's state as it is given out, a signed integer. */
function temper(word: number): number {
  let y = word;
  y ^= y >>> 11;
  y ^= (y << 7) & 0x9d2c5680;
  y ^= (y << 15) & 0xefc60000;
  return y ^ y >>> 18;
}

/** One generation of mt19937: 624 new words in place. */
function twist(state: Uint32Array): void {
  // Pieces in which neither neighbour wraps around: V8 does not like to look at each word.
  for (let i = 0; i < STATE - SHIFT; i++) state[i] = state[i + SHIFT] ^ mixed(state[i], state[i + 1]);
  for (let i = STATE - SHIFT; i < STATE - 1; i++) {
    state[i] = state[i + SHIFT - STATE] ^ mixed(state[i], state[i + 1]);
  }
  state[STATE - 1] = state[SHIFT - 1] ^ mixed(state[STATE - 1], state[0]);
}

function mixed(word: number, following: number): number {
  const both = (word & 0x80000000) | (following & 0x7fffffff);
  return (both >>> 1) ^ (-(following & 1) & 0x9908b0df);
}

/** float32 bits (finite) to bfloat16 bits, to nearest even. */
function roundToBfloat16(bits: number): number {
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}
