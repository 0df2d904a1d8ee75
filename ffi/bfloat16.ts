/**
 * bfloat16 is the upper half of a float32: the same 8 exponent bits and 7 mantissa bits.
 * Both directions work on bit patterns, because JavaScript has no bfloat16 array.
 */

/** Widens bfloat16 bit patterns, exactly. */
export function bfloat16ToFloat32(source: Uint16Array, target: Float32Array): void {
  const bits = new Uint32Array(target.buffer, target.byteOffset, target.length);
  for (let i = 0; i < bits.length; i++) bits[i] = source[i] << 16;
}

/** Rounds to the nearest bfloat16, ties to even; a NaN stays a (quiet) NaN, values over the largest become infinite. */
export function float32ToBfloat16(source: Float32Array, target: Uint16Array): void {
  const bits = new Uint32Array(source.buffer, source.byteOffset, source.length);
  for (let i = 0; i < bits.length; i++) {
    const b = bits[i];
    target[i] = (b & 0x7fffffff) > 0x7f800000 ? (b >>> 16) | 0x40 : (b + 0x7fff + ((b >>> 16) & 1)) >>> 16;
  }
}

/** The bfloat16 nearest to `value`, as a number. */
export function roundToBfloat16(value: number): number {
  const one = Float32Array.of(value);
  const half = new Uint16Array(1);
  float32ToBfloat16(one, half);
  bfloat16ToFloat32(half, one);
  return one[0];
}
