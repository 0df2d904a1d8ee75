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
