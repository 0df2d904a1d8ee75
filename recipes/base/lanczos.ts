/**
 * Resampling of 8-bit pictures as Pillow's `Image.resize(size, LANCZOS)` does it, bit for bit (`src/libImaging/Resample.c`):
 * rows first, then columns, each with weights in fixed point and a result that is rounded to 8 bits. Diffusers resizes
 * pictures so before they are encoded, and a Kontext model's answer depends on each bit of them.
 */

/** Lobes of the sinc on each side: Duchon 1979, "Lanczos filtering in one and two dimensions". */
const LOBES = 3;
/** Weights are whole multiples of 2^-22: what 32 bits leave beside the pixel's 8 and room for overshoot. */
const PRECISION_BITS = 22;

/** For each pixel of the result: the first pixel that it is made of, and its weights. */
interface Taps {
  readonly first: Int32Array;
  /** `[pixels, most]`, zero behind a pixel's own. */
  readonly weights: Int32Array;
  /** Most pixels that one is made of. */
  readonly most: number;
}

/**
 * A picture in another size.
 *
 * @param rgb `[height, width, 3]`. @returns `[toHeight, toWidth, 3]`; `rgb` itself where the size stays.
 */
export function resizeLanczos(
  rgb: Uint8Array,
  width: number,
  height: number,
  toWidth: number,
  toHeight: number,
): Uint8Array {
  const narrowed = width === toWidth ? rgb : resizeRows(rgb, width, height, toWidth);
  return height === toHeight ? narrowed : resizeColumns(narrowed, toWidth, height, toHeight);
}

function resizeRows(rgb: Uint8Array, width: number, height: number, toWidth: number): Uint8Array {
  const { first, weights, most } = tapsOf(width, toWidth);
  const out = new Uint8Array(toWidth * height * 3);
  for (let row = 0, to = 0; row < height; row++) {
    for (let column = 0; column < toWidth; column++) {
      let from = (row * width + first[column]) * 3;
      let [r, g, b] = [HALF, HALF, HALF];
      for (let tap = column * most; tap < (column + 1) * most; tap++, from += 3) {
        const weight = weights[tap];
        if (weight === 0) continue; // behind the last of a row
        r += rgb[from] * weight;
        g += rgb[from + 1] * weight;
        b += rgb[from + 2] * weight;
      }
      out[to++] = rounded(r);
      out[to++] = rounded(g);
      out[to++] = rounded(b);
    }
  }
  return out;
}

function resizeColumns(rgb: Uint8Array, width: number, height: number, toHeight: number): Uint8Array {
  const { first, weights, most } = tapsOf(height, toHeight);
  const line = width * 3;
  const out = new Uint8Array(line * toHeight);
  const sums = new Int32Array(line);
  for (let row = 0; row < toHeight; row++) {
    sums.fill(HALF);
    for (let tap = 0; tap < most; tap++) {
      const weight = weights[row * most + tap];
      if (weight === 0) continue;
      const from = (first[row] + tap) * line;
      for (let i = 0; i < line; i++) sums[i] += rgb[from + i] * weight;
    }
    for (let i = 0; i < line; i++) out[row * line + i] = rounded(sums[i]);
  }
  return out;
}

/** Rounds to nearest. */
const HALF = 1 << (PRECISION_BITS - 1);

/** A sum in fixed point, to 8 bits. */
function rounded(sum: number): number {
  const value = sum >> PRECISION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** Which of `size` pixels those of a line of `toSize` are made of. */
function tapsOf(size: number, toSize: number): Taps {
  const scale = size / toSize;
  const stretch = Math.max(scale, 1); // smaller pictures see more pixels, larger ones the same few
  const support = LOBES * stretch;
  const most = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(toSize);
  const weights = new Int32Array(toSize * most);
  for (let pixel = 0; pixel < toSize; pixel++) {
    const center = (pixel + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(size, Math.trunc(center + support + 0.5));
    const exact = Array.from(
      { length: end - start },
      (_, i) => lanczos((i + start - center + 0.5) * (1 / stretch)),
    );
    const sum = exact.reduce((a, b) => a + b, 0);
    first[pixel] = start;
    exact.forEach((weight, i) => {
      const scaled = weight / sum * 2 ** PRECISION_BITS;
      weights[pixel * most + i] = Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
  }
  return { first, weights, most };
}

function lanczos(x: number): number {
  return x >= -LOBES && x < LOBES ? sinc(x) * sinc(x / LOBES) : 0;
}

function sinc(x: number): number {
  if (x === 0) return 1;
  const angle = x * Math.PI;
  return Math.sin(angle) / angle;
}
