import type { ConvPlan } from "../device.ts";

/** f32 copies of a band's input and output, as a provider may make them, take about this many bytes. */
const BAND_BYTES = 64 * 2 ** 20;

/**
 * Cuts a convolution of a large picture into convolutions of bands of output rows over the same tensors, so that what
 * a provider holds besides them stays bounded. A small one is returned whole.
 */
export function convBands(plan: ConvPlan, bandBytes = BAND_BYTES): ConvPlan[] {
  const { x, weight, out, stride, padding: [top, left, bottom, right] } = plan;
  const [images, , height] = x.shape;
  const kernelHeight = weight.shape[2];
  if (4 * (x.size + out.size) <= bandBytes || out.size === 0) return [plan];
  if (Math.max(top, bottom) >= kernelHeight) return [plan]; // a band could lie in the padding alone
  const outHeight = out.shape[2];
  const wanted = Math.ceil(4 * (x.size + out.size) / images / bandBytes);
  const rows = Math.ceil(outHeight / Math.min(outHeight, wanted)); // even bands: the same few layouts come again
  const bands: ConvPlan[] = [];
  for (let image = 0; image < images; image++) {
    for (let first = 0; first < outHeight; first += rows) {
      const count = Math.min(rows, outHeight - first);
      // Input rows from `start` up to `end` of the picture; those outside of it are this band's padding.
      const start = first * stride - top;
      const end = (first + count - 1) * stride - top + kernelHeight;
      const from = Math.max(start, 0);
      const to = Math.min(end, height);
      bands.push({
        ...plan,
        x: x.narrow(0, image, 1).narrow(2, from, to - from),
        out: out.narrow(0, image, 1).narrow(2, first, count),
        padding: [from - start, left, end - to, right],
      });
    }
  }
  return bands;
}
