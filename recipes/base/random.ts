/**
 * torch's CPU random generator, bit for bit: `torch.manual_seed(n)` followed by `torch.randn(...)`.
 *
 * A FLUX seed means "these starting latents", so equal images need equal bits, not only an equal distribution.
 *
 * What is reproduced (torch 2.13, x86 with AVX2, which AVX-512 machines use too because torch registers no
 * AVX-512 variant of `normal_`):
 * - the engine: mt19937 (Matsumoto and Nishimura 1998), seeded with the low 32 bits of the seed;
 *   `aten/src/ATen/core/MT19937RNGEngine.h`;
 * - 16 or more values: Box-Muller over blocks of 16 in float32, where log, sin and cos are Cephes polynomials,
 *   `aten/src/ATen/native/cpu/DistributionTemplates.h` and `avx_mathfun.h`. GCC contracts some products and sums
 *   there into fused multiply-adds; `fma` below marks exactly those;
 * - fewer than 16 values: Box-Muller in float64, two values at a time, the second kept for the next call;
 *   `aten/src/ATen/core/DistributionsHelper.h`.
 *
 * Not reproduced: torch on CPUs without AVX2 (ARM among them) takes libm's log, sin and cos and differs in the
 * last bits. Older torch releases drew bfloat16 in bfloat16 arithmetic and gave other bfloat16 numbers; their
 * float32 numbers come from the same algorithm.
 */

import { UsageError } from "./errors.ts";

const STATE = 624;
const SHIFT = 397;
const BLOCK = 16;

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
    for (let i = 0; i < count; i++) out[i] = this.#uniform();
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

  /** The engine's next 32 bits, tempered; as a signed integer, since the callers mask it anyway. */
  #random(): number {
    if (this.#next === STATE) {
      twist(this.#state);
      this.#next = 0;
    }
    let y = this.#state[this.#next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    y ^= y >>> 18;
    return y;
  }

  /** Uniform float32 in [0, 1): 24 random bits. */
  #uniform(): number {
    return (this.#random() & 0xffffff) * 2 ** -24;
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

/** One generation of mt19937: 624 new words in place. */
function twist(state: Uint32Array): void {
  for (let i = 0; i < STATE; i++) {
    const following = state[i + 1 === STATE ? 0 : i + 1];
    const mixed = (state[i] & 0x80000000) | (following & 0x7fffffff);
    const other = state[i + SHIFT < STATE ? i + SHIFT : i + SHIFT - STATE];
    state[i] = other ^ (mixed >>> 1) ^ (following & 1 ? 0x9908b0df : 0);
  }
}

/** float32 bits (finite) to bfloat16 bits, to nearest even. */
function roundToBfloat16(bits: number): number {
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

// Everything below computes in float32: each result of *, + and - passes Math.fround once, which for float32
// operands equals the hardware's float32 operation (double rounding is harmless at these widths).

const { fround } = Math;

/**
 * float32 fused multiply-add, a * b + c rounded once. The product of two float32 is exact in float64; the sum is
 * rounded to 53 bits and then to 24. That can differ from one rounding, but does not here: the uniforms have 2^24
 * values each, and for none of them does any step below land on a midpoint that the 53-bit sum made.
 */
function fma(a: number, b: number, c: number): number {
  return fround(a * b + c);
}

// Cephes' single-precision coefficients (S. Moshier), as in torch's avx_mathfun.h (J. Pommier, G. Garberoglio).
const SQRT_HALF = fround(0.707106781186547524);
const LOG_0 = fround(7.0376836292e-2);
const LOG_1 = fround(-1.1514610310e-1);
const LOG_2 = fround(1.1676998740e-1);
const LOG_3 = fround(-1.2420140846e-1);
const LOG_4 = fround(1.4249322787e-1);
const LOG_5 = fround(-1.6668057665e-1);
const LOG_6 = fround(2.0000714765e-1);
const LOG_7 = fround(-2.4999993993e-1);
const LOG_8 = fround(3.3333331174e-1);
/** ln 2 in two parts: the high one has few bits, so that its product with an exponent is exact. */
const LN2_LOW = fround(-2.12194440e-4);
const LN2_HIGH = 0.693359375;
const FOUR_OVER_PI = fround(1.27323954473516);
/** pi/4 in three parts, negated (Cody and Waite). */
const PI4_HIGH = -0.78515625;
const PI4_MIDDLE = fround(-2.4187564849853515625e-4);
const PI4_LOW = fround(-3.77489497744594108e-8);
const SIN_0 = fround(-1.9515295891e-4);
const SIN_1 = fround(8.3321608736e-3);
const SIN_2 = fround(-1.6666654611e-1);
const COS_0 = fround(2.443315711809948e-5);
const COS_1 = fround(-1.388731625493765e-3);
const COS_2 = fround(4.166664568298827e-2);
const TWO_PI = fround(2 * Math.PI);

/** Natural logarithm of a float32 m * 2^-24 with m an integer from 1 to 2^24, in float32. */
function log(u: number): number {
  // u = x * 2^exponent with x in [0.5, 1); moved to [sqrt(1/2), sqrt(2)) and shifted by one.
  const bitLength = 32 - Math.clz32(u * 2 ** 24);
  let exponent = bitLength - 24;
  let x = u * 2 ** -exponent;
  if (x < SQRT_HALF) {
    exponent -= 1;
    x = fround(fround(x - 1) + x);
  } else {
    x = x - 1; // exact
  }
  const z = fround(x * x);
  let y = fma(LOG_0, x, LOG_1);
  y = fma(y, x, LOG_2);
  y = fma(y, x, LOG_3);
  y = fma(y, x, LOG_4);
  y = fma(y, x, LOG_5);
  y = fma(y, x, LOG_6);
  y = fma(y, x, LOG_7);
  y = fma(y, x, LOG_8);
  y = fma(fround(y * x), z, fround(exponent * LN2_LOW));
  y = fround(y - z * 0.5);
  return fma(exponent, LN2_HIGH, fround(x + y));
}

/**
 * The Box-Muller transform of 16 values in place, float32: uniforms [8 of u1, 8 of u2] become
 * [8 of r cos t, 8 of r sin t] with r = sqrt(-2 ln(1 - u1)) and t = 2 pi u2.
 */
function boxMuller16(data: Float32Array, start: number): void {
  for (let i = start; i < start + 8; i++) {
    const radius = fround(Math.sqrt(-2 * log(1 - data[i]))); // 1 - u1 is exact: u1 has 24 bits
    const theta = fround(TWO_PI * data[i + 8]);

    // The octant, made even, tells which polynomial and sign serve sine and cosine.
    const octant = (Math.trunc(fround(theta * FOUR_OVER_PI)) + 1) & ~1;
    let x = fma(octant, PI4_HIGH, theta);
    x = fma(octant, PI4_MIDDLE, x);
    x = fma(octant, PI4_LOW, x);
    const z = fround(x * x);

    let cos = fma(COS_0, z, COS_1);
    cos = fma(cos, z, COS_2);
    cos = fma(fround(cos * z), z, z * -0.5);
    cos = fround(cos + 1);

    let sin = fma(SIN_0, z, SIN_1);
    sin = fma(sin, z, SIN_2);
    sin = fma(fround(sin * z), x, x);

    const swap = (octant & 2) !== 0;
    const sine = (octant & 4) !== 0 ? -(swap ? cos : sin) : swap ? cos : sin;
    const cosine = ((octant - 2) & 4) === 0 ? -(swap ? sin : cos) : swap ? sin : cos;
    // + 0: torch multiplies by the standard deviation 1 and adds the mean 0, which turns -0 into 0.
    data[i] = radius * cosine + 0;
    data[i + 8] = radius * sine + 0;
  }
}
