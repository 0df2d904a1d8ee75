/**
 * 8-bit floats. E4M3 and E5M2 of the Open Compute Project's OFP8 specification: 4 exponent bits, bias 7, largest 448, no
 * infinities, one NaN pattern for each sign; and bias 15, with IEEE-like infinities and NaNs. And E4M3 "FNUZ" (finite, no
 * negative zero) as AMD's MI300 has it: bias 8, largest 240, the code of -0 is the only NaN.
 */

/** What a GPU's E4M3 is. */
export type Float8Format = "ocp" | "fnuz";

/** The format of a GPU, by its {@link GpuLimits.architecture}: MI300 is gfx942. */
export function float8FormatOf(architecture: string): Float8Format {
  return /^gfx94[0-2]$/.test(architecture) ? "fnuz" : "ocp";
}

/** The largest value of E4M3. */
export const FLOAT8_LARGEST: Readonly<Record<Float8Format, number>> = { ocp: 448, fnuz: 240 };

function decodeTable(
  exponentBits: number,
  bias: number,
  special: (code: number) => number | undefined,
): Float32Array {
  const mantissaBits = 7 - exponentBits;
  return Float32Array.from({ length: 256 }, (_, code) => {
    const sign = code & 0x80 ? -1 : 1;
    const exponent = (code & 0x7f) >> mantissaBits;
    const mantissa = (code & ((1 << mantissaBits) - 1)) / (1 << mantissaBits);
    const value = exponent === 0 ? mantissa * 2 ** (1 - bias) : (1 + mantissa) * 2 ** (exponent - bias);
    return sign * (special(code) ?? value);
  });
}

const E4M3: Readonly<Record<Float8Format, Float32Array>> = {
  ocp: decodeTable(4, 7, (code) => (code & 0x7f) === 0x7f ? NaN : undefined),
  fnuz: decodeTable(4, 8, (code) => code === 0x80 ? NaN : undefined),
};
const E5M2 = decodeTable(5, 15, (code) => {
  const magnitude = code & 0x7f;
  return magnitude < 0x7c ? undefined : magnitude === 0x7c ? Infinity : NaN;
});

/** Widens 8-bit float codes, exactly. @param format what E4M3 is; there is one E5M2. */
export function float8ToFloat32(
  source: Uint8Array,
  target: Float32Array,
  dtype: "f8e4m3" | "f8e5m2",
  format: Float8Format = "ocp",
): void {
  const table = dtype === "f8e4m3" ? E4M3[format] : E5M2;
  for (let i = 0; i < target.length; i++) target[i] = table[source[i]];
}

/** How E4M3 is made of float32's bits. */
interface Rounding {
  readonly nan: number;
  readonly largest: { readonly bits: number; readonly code: number };
  /** The smallest normal value. */
  readonly normal: number;
  /** What takes the exponent from one bias to the other. */
  readonly bias: number;
  /** Below the smallest normal value, the steps are float32's at this power of two and above: an addition rounds. */
  readonly steps: number;
  /** Of the smallest value above 0. */
  readonly smallest: number;
}

const ROUNDINGS: Readonly<Record<Float8Format, Rounding>> = {
  ocp: {
    nan: 0x7f,
    largest: { bits: 0x43e00000, code: 0x7e },
    normal: 0x3c800000,
    bias: 0x3c000000,
    steps: 2 ** 14,
    smallest: 2 ** -9,
  },
  fnuz: {
    nan: 0x80,
    largest: { bits: 0x43700000, code: 0x7f },
    normal: 0x3c000000,
    bias: 0x3b800000,
    steps: 2 ** 13,
    smallest: 2 ** -10,
  },
};

/**
 * Rounds to the nearest E4M3 value, ties to even. What is larger than the largest, infinities too, becomes that; a NaN stays
 * one (without its sign).
 */
export function float32ToFloat8(
  source: Float32Array,
  target: Uint8Array,
  format: Float8Format = "ocp",
): void {
  const { nan, largest, normal, bias, steps, smallest } = ROUNDINGS[format];
  const negativeZero = format === "ocp";
  const bits = new Uint32Array(source.buffer, source.byteOffset, source.length);
  for (let i = 0; i < bits.length; i++) {
    const magnitude = bits[i] & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      target[i] = nan;
      continue;
    }
    let code: number;
    if (magnitude >= largest.bits) code = largest.code;
    else if (magnitude < normal) code = (Math.fround(Math.abs(source[i]) + steps) - steps) / smallest;
    else code = (magnitude - bias + 0x7ffff + ((magnitude >>> 20) & 1)) >>> 20;
    target[i] = code === 0 && !negativeZero ? 0 : code | (bits[i] >>> 24 & 0x80);
  }
}
