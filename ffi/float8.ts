/**
 * 8-bit floats of the Open Compute Project's OFP8 specification: E4M3 (4 exponent bits, bias 7, largest 448, no
 * infinities, one NaN pattern for each sign) and E5M2 (bias 15, IEEE-like infinities and NaNs).
 */
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
    return sign * (special(code & 0x7f) ?? value);
  });
}

const TABLES = {
  f8e4m3: decodeTable(4, 7, (code) => code === 0x7f ? NaN : undefined),
  f8e5m2: decodeTable(5, 15, (code) => code < 0x7c ? undefined : code === 0x7c ? Infinity : NaN),
} as const;

/** Widens 8-bit float codes, exactly. */
export function float8ToFloat32(source: Uint8Array, target: Float32Array, dtype: keyof typeof TABLES): void {
  const table = TABLES[dtype];
  for (let i = 0; i < target.length; i++) target[i] = table[source[i]];
}

/**
 * Rounds to the nearest E4M3 value, ties to even. What is larger than 448, infinities too, becomes 448; a NaN stays one
 * (without its sign).
 */
export function float32ToFloat8(source: Float32Array, target: Uint8Array): void {
  const bits = new Uint32Array(source.buffer, source.byteOffset, source.length);
  for (let i = 0; i < bits.length; i++) {
    const magnitude = bits[i] & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      target[i] = 0x7f;
      continue;
    }
    let code: number;
    if (magnitude >= 0x43e00000) code = 0x7e; // 448
    else if (magnitude < 0x3c800000) {
      // Below 2^-6 the steps are 2^-9, which are float32's between 2^14 and 2^15: the addition rounds.
      code = (Math.fround(Math.abs(source[i]) + 2 ** 14) - 2 ** 14) * 2 ** 9;
    } else code = (magnitude - 0x3c000000 + 0x7ffff + ((magnitude >>> 20) & 1)) >>> 20;
    target[i] = code | (bits[i] >>> 24 & 0x80);
  }
}

/**
 * What a GPU's E4M3 is: the OCP's, or "fnuz" (finite, no negative zero: bias 8, largest 240, its only NaN is 0x80), which
 * AMD's MI300 (gfx940 to gfx942) has.
 */
export type Float8Format = "ocp" | "fnuz";

/** The format of a GPU, by its {@link GpuLimits.architecture}. */
export function float8FormatOf(architecture: string): Float8Format {
  return /^gfx94[0-2]$/.test(architecture) ? "fnuz" : "ocp";
}
