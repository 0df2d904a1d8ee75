import type { DType } from "../ffi/dtype.ts";
import { Tensor } from "../ffi/tensor.ts";
import BOX_MULLER_CU from "./box_muller.cu" with { type: "text" };
import { expect } from "./check.ts";
import { onCpu } from "./cpu.ts";
import { blockSize, gpuOf, launch } from "./gpu.ts";

const SOURCE = { name: "box_muller.cu", text: BOX_MULLER_CU };

/** Numbers that torch transforms together. */
export const BOX_MULLER_BLOCK = 16;

/**
 * torch's normal numbers from its uniform ones (Box & Muller 1958): bit for bit what `torch.randn` makes of them on a
 * CPU with AVX2, and the same on every device. In each block of 16, eight of `u1` and eight of `u2` become eight of
 * `r cos t` and eight of `r sin t`, with `r = sqrt(-2 ln(1 - u1))` and `t = 2 pi u2`. log, sin and cos are Cephes
 * polynomials in float32, as in torch's `aten/src/ATen/native/cpu/DistributionTemplates.h` and `avx_mathfun.h`.
 *
 * @param uniform f32 `[n]`, n a multiple of 16, dense: multiples of 2^-24 from 0 up to, not including, 1.
 * @param dtype of the result, rounded once from float32. @returns `[n]`.
 * @throws ShapeError for other dtypes and sizes.
 */
export function boxMuller(uniform: Tensor, dtype: DType): Tensor {
  expect(
    uniform.dtype === "f32" && uniform.isContiguous && uniform.size % BOX_MULLER_BLOCK === 0,
    "boxMuller",
    () => `uniform is ${uniform}, expected dense f32, a multiple of ${BOX_MULLER_BLOCK} of them`,
  );
  const out = Tensor.empty(uniform.device, uniform.shape, dtype);
  const gpu = gpuOf(out);
  if (gpu === undefined) return onCpu(out, [uniform], boxMullerReference);
  const pairs = uniform.size / 2;
  const block = blockSize(gpu, pairs);
  launch(gpu, SOURCE, {
    entry: "boxMuller",
    types: { T: dtype },
    grid: Math.ceil(pairs / block),
    block,
    args: [out, uniform, pairs],
  });
  return out;
}

/** {@link boxMuller} of f32 values. */
export function boxMullerReference(out: Float32Array, uniform: Float32Array): void {
  out.set(uniform);
  for (let start = 0; start < out.length; start += BOX_MULLER_BLOCK) boxMuller16(out, start);
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
export function boxMuller16(data: Float32Array, start: number): void {
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
