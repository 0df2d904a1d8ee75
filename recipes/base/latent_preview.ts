/**
 * What latents will look like, without the decoder: an autoencoder's latents are close to a small picture whose colours
 * are a linear function of the channels. The function is fitted to the loaded autoencoder by least squares, from pairs
 * of latents and the pixels that the decoder made of them: first of squares of random colour, which cost one run of the
 * decoder, then of every picture that was drawn anyway, which are more like what comes next.
 */
import { Tensor } from "../../ffi/tensor.ts";
import { spatialFactor } from "./autoencoder.ts";
import { ShapeError } from "../../ffi/errors.ts";
import { packLatents } from "./latents.ts";
import type { FluxPipeline, Picture } from "./pipeline.ts";
import { Generator } from "./random.ts";

/** Side of a square of one colour, in latents: the decoder looks at the neighbours, and the middle is what counts. */
const SQUARE = 4;
/** How much a latent of a drawn picture counts against one of the squares. */
const DRAWN_WEIGHT = 4;
/** Added to the diagonal, for each latent seen: pictures may leave directions of the latents empty. */
const RIDGE = 1e-3;

export class LatentPreview {
  /** Sums of `x^T x` `[inputs, inputs]` and `x^T y` `[inputs, 3]`, where x is the channels and 1, and y is a colour. */
  readonly #xx: Float64Array;
  readonly #xy: Float64Array;
  /** `[inputs, 3]`, as the sums have it. */
  #map: Float64Array;
  #weight = 0;
  readonly #inputs: number;

  private constructor(private readonly channels: number, private readonly factor: number) {
    this.#inputs = channels + 1;
    this.#xx = new Float64Array(this.#inputs ** 2);
    this.#xy = new Float64Array(this.#inputs * 3);
    this.#map = new Float64Array(this.#inputs * 3);
  }

  /**
   * Fits to the pipeline's autoencoder, by one run of its decoder for a picture of this size: the one that is to be
   * drawn, for which all is compiled anyway.
   *
   * @param width in pixels, a multiple of twice the autoencoder's factor; so is `height`.
   */
  static fit(pipeline: FluxPipeline, width: number, height: number): LatentPreview {
    const { plan: { device, ops }, model: { configs } } = pipeline;
    const factor = spatialFactor(configs.vae);
    const preview = new LatentPreview(configs.vae.latent_channels, factor);
    const [columns, rows] = [width / factor, height / factor];
    const squares = randomSquares(preview.channels, rows, columns);
    const rgb = new Uint8Array(width * height * 3);
    device.scope(() => {
      const latents = Tensor.fromFloat32(device, squares, [1, preview.channels, rows, columns]);
      const pixels = pipeline.decodeLatents(packLatents(ops, latents), rows, columns);
      void device.download(ops.toPixels(pixels), rgb); // has copied when it returns: its tensors go with the scope
    });
    preview.#add(squares, { width, height, rgb }, 1);
    return preview;
  }

  /**
   * Takes a picture into account.
   *
   * @param latents that it was decoded from, `[channels, height / factor, width / factor]`.
   */
  learn(latents: Float32Array, picture: Picture): void {
    this.#add(latents, picture, DRAWN_WEIGHT);
  }

  /**
   * The picture, a pixel for each latent.
   *
   * @param latents `[channels, height, width]`. @param height of the latents. @param width of the latents.
   */
  render(latents: Float32Array, height: number, width: number): Picture {
    const { channels } = this;
    const size = height * width;
    if (latents.length !== channels * size) {
      throw new ShapeError(`preview: ${latents.length} latents for ${channels} x ${height} x ${width}`);
    }
    const rgb = new Uint8Array(size * 3);
    for (let at = 0; at < size; at++) {
      for (let colour = 0; colour < 3; colour++) {
        let sum = this.#map[channels * 3 + colour];
        for (let c = 0; c < channels; c++) sum += latents[c * size + at] * this.#map[c * 3 + colour];
        rgb[at * 3 + colour] = Math.min(255, Math.max(0, Math.round(sum * 255)));
      }
    }
    return { width, height, rgb };
  }

  #add(latents: Float32Array, picture: Picture, weight: number): void {
    const { channels, factor } = this;
    const inputs = this.#inputs;
    const size = (picture.width / factor) * (picture.height / factor);
    if (latents.length !== channels * size) {
      throw new ShapeError(
        `preview: ${latents.length} latents for a picture of ${picture.width} x ${picture.height}`,
      );
    }
    const colours = averageColours(picture, factor);
    const x = new Float64Array(inputs).fill(1);
    for (let at = 0; at < size; at++) {
      for (let c = 0; c < channels; c++) x[c] = latents[c * size + at];
      for (let i = 0; i < inputs; i++) {
        const weighted = weight * x[i];
        for (let j = 0; j < inputs; j++) this.#xx[i * inputs + j] += weighted * x[j];
        for (let c = 0; c < 3; c++) this.#xy[i * 3 + c] += weighted * colours[at * 3 + c];
      }
    }
    this.#weight += weight * size;
    const ridged = this.#xx.slice();
    for (let i = 0; i < inputs; i++) ridged[i * inputs + i] += RIDGE * this.#weight;
    this.#map = solve(ridged, this.#xy, inputs, 3);
  }
}

/** Normal numbers for each channel, the same within a square: `[channels, rows, columns]`, always the same ones. */
function randomSquares(channels: number, rows: number, columns: number): Float32Array {
  const across = Math.ceil(columns / SQUARE);
  const each = across * Math.ceil(rows / SQUARE);
  const values = new Generator(0).randn(channels * each);
  return Float32Array.from({ length: channels * rows * columns }, (_, i) => {
    const channel = Math.floor(i / (rows * columns));
    const row = Math.floor(i / columns) % rows;
    return values[channel * each + Math.floor(row / SQUARE) * across + Math.floor(i % columns / SQUARE)];
  });
}

/** Means over squares of `factor` pixels, 0 to 1: `[height / factor, width / factor, 3]`. */
function averageColours({ width, height, rgb }: Picture, factor: number): Float64Array {
  const columns = width / factor;
  const sums = new Float64Array(columns * (height / factor) * 3);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const to = (Math.floor(y / factor) * columns + Math.floor(x / factor)) * 3;
      for (let c = 0; c < 3; c++) sums[to + c] += rgb[(y * width + x) * 3 + c];
    }
  }
  return sums.map((sum) => sum / (255 * factor ** 2));
}

/** Solves `a x = b` for a symmetric positive definite `a` `[n, n]` and `b` `[n, columns]`, by Cholesky's factors. */
function solve(a: Float64Array, b: Float64Array, n: number, columns: number): Float64Array {
  const l = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = a[i * n + j];
      for (let k = 0; k < j; k++) sum -= l[i * n + k] * l[j * n + k];
      l[i * n + j] = i === j ? Math.sqrt(sum) : sum / l[j * n + j];
    }
  }
  const x = b.slice();
  for (let column = 0; column < columns; column++) {
    const at = (i: number) => i * columns + column;
    for (let i = 0; i < n; i++) {
      for (let k = 0; k < i; k++) x[at(i)] -= l[i * n + k] * x[at(k)];
      x[at(i)] /= l[i * n + i];
    }
    for (let i = n - 1; i >= 0; i--) {
      for (let k = i + 1; k < n; k++) x[at(i)] -= l[k * n + i] * x[at(k)];
      x[at(i)] /= l[i * n + i];
    }
  }
  return x;
}
