import type { ConvPlan, DeviceProperties, MatmulPlan, Memory } from "../device.ts";
import { dtypeBytes } from "../dtype.ts";
import { FfiError, ShapeError } from "../errors.ts";
import type { Tensor } from "../tensor.ts";
import CONV_WAT from "./conv.wat" with { type: "text" };
import { type Allocate, Converter, copyRange, wasmAddress } from "./convert.ts";
import { describeCpu } from "./describe.ts";
import type { CpuDevice, CpuMemory } from "./device.ts";
import MATMUL_WAT from "./matmul.wat" with { type: "text" };
import { PackedCache } from "./packed_cache.ts";
import { type CpuProvider, requireFloat } from "./provider.ts";
import type { Kernel, WasmRunner } from "./runner.ts";
import { readVector } from "./vector.ts";

/** Rows of `a` and of `b` per panel: the register tile of matmul.wat. */
const TILE_ROWS = 6;
const TILE_COLS = 8;
/** Panels of `a` in one job: 32 slices, 256 deep, are 192 KiB and stay in the second-level cache. */
const MAX_ROW_PANELS = 32;
/** Work that is worth waking another thread for, and worth being a job of its own (floating-point operations). */
const FLOPS_PER_JOB = 1_000_000;
/** Panels that are made for one call are made in chunks of at most this many bytes. */
const CHUNK_BYTES = 64 * 2 ** 20;
/** Patches of a picture are used once, right after they were made: fewer bytes, so that caches still hold them. */
const PATCH_BYTES = 8 * 2 ** 20;
/** Constant operands stay packed within this many bytes of the 4 GiB that WebAssembly can address. */
const PACKED_BYTES = 2 ** 30;

/** Panels in WebAssembly memory: rows of a matrix, `width` wide and all of `k` deep. */
interface Panels {
  readonly address: number;
  readonly rows: number;
}

/** A matrix operand `[rows, k]` and what is known about it. */
interface Operand {
  readonly tensor: Tensor;
  readonly rows: number;
  readonly rowStride: number;
  readonly kStride: number;
  readonly constant: boolean;
}

/** A matrix of f32 in WebAssembly memory with dense rows; strides in bytes. */
interface Target {
  readonly address: number;
  readonly rowBytes: number;
}

/** What is added to a product: element (i, j) at `address + i * row + floor(j / 8) * panel + (j mod 8) * 4`. */
interface Addend {
  readonly address: number;
  readonly row: number;
  readonly panel: number;
}

/**
 * Matrix products and convolutions in WebAssembly SIMD: needs nothing installed. f32 inside; bf16 operands are widened
 * while they are packed, a bf16 result is rounded once at the end.
 */
export class WasmProvider implements CpuProvider {
  readonly #pack: Kernel;
  readonly #multiply: Kernel;
  readonly #convert: Converter;
  readonly #patches: Kernel;
  readonly #packed: PackedCache<CpuMemory>;
  /** 64 zero bytes: the addend where there is no bias. */
  readonly #zeros: CpuMemory;

  /** `note` says why a faster provider was not taken; it goes into {@link properties}. */
  constructor(
    private readonly device: CpuDevice,
    private readonly runner: WasmRunner,
    private readonly note: string | undefined = undefined,
  ) {
    const { pack, multiply } = runner.module("matmul.wat", MATMUL_WAT);
    const { patches } = runner.module("conv.wat", CONV_WAT);
    this.#pack = pack;
    this.#multiply = multiply;
    this.#convert = new Converter(device, runner);
    this.#patches = patches;
    this.#packed = new PackedCache(PACKED_BYTES, (memory) => device.free(memory));
    this.#zeros = device.reserve(64);
    device.upload(new Uint8Array(64), this.#zeros);
  }

  properties(): DeviceProperties {
    const { description } = this.runner;
    const matmul = description + (this.note === undefined ? "" : ` (${this.note})`);
    return {
      description: describeCpu(),
      providers: { matmul, conv: description },
      nativeBfloat16: false,
    };
  }

  matmul(plan: MatmulPlan): void {
    const { a, b, bias, out, alpha = 1, constant = false } = plan;
    const [m, k] = a.shape;
    const n = b.shape[0];
    if (m === 0 || n === 0) return;
    requireFloat("matmul", a, b, out, bias);
    const left = operand(a, false);
    const right = operand(b, constant);
    this.device.withScratch((scratch) => {
      // Results are stored along their rows; where those are the columns of `out`, its transpose is computed.
      const transposed = out.strides[1] !== 1 && n > 1;
      if (transposed && out.strides[0] !== 1 && m > 1) {
        throw new ShapeError(`matmul: ${out} has no dense dimension`);
      }
      const rows = transposed ? n : m;
      const cols = transposed ? m : n;
      const outRow = out.strides[transposed ? 1 : 0];
      const { target, finish } = this.#target(scratch, out, rows, cols, outRow);
      const addend = this.#addend(scratch, bias, transposed ? "rows" : "columns");
      const [x, y] = transposed ? [right, left] : [left, right];
      this.#eachChunk(scratch, y, k, TILE_COLS, (columns, firstColumn) => {
        this.#eachChunk(scratch, x, k, TILE_ROWS, (panels, firstRow) => {
          this.#product(
            panels,
            columns,
            k,
            { ...target, address: target.address + firstRow * target.rowBytes + firstColumn * 4 },
            {
              ...addend,
              address: addend.address + firstRow * addend.row + firstColumn / TILE_COLS * addend.panel,
            },
            alpha,
          );
        });
      });
      finish();
    });
  }

  conv(plan: ConvPlan): void {
    const { x, weight, bias, out, stride, padding: [top, left, bottom, right] } = plan;
    const [images, channels, height, width] = x.shape;
    const [outChannels, , kernelHeight, kernelWidth] = weight.shape;
    const [, , outHeight, outWidth] = out.shape;
    requireFloat("conv", x, weight, out, bias);
    const pixels = outHeight * outWidth;
    if (images * outChannels * pixels === 0) return;
    const order = kernelOrder(weight);
    const k = channels * kernelHeight * kernelWidth;
    const kernel: Operand = {
      tensor: weight,
      rows: outChannels,
      rowStride: weight.strides[0],
      kStride: order.stride,
      constant: true,
    };
    const outPixel = pixelStride(out, outHeight, outWidth);
    const planar = outPixel === 1 || pixels === 1; // NCHW: a row of the product is a channel, else (NHWC) a pixel
    if (!planar && out.strides[1] !== 1 && outChannels > 1) throw unsupported("conv", out);
    const pointwise = kernelHeight === 1 && kernelWidth === 1 && stride === 1 &&
      top + left + bottom + right === 0;

    this.device.withScratch((scratch) => {
      const wide = this.#convert.float32(x, scratch);
      const picture = wasmAddress(wide)!;
      const table = pointwise ? 0 : this.#tapTable(scratch, wide, order.taps);
      const addend = this.#addend(scratch, bias, planar ? "rows" : "columns", outChannels);
      const panelWidth = planar ? TILE_COLS : TILE_ROWS;
      const chunk = Math.max(24, Math.floor(PATCH_BYTES / (k * 4) / 24) * 24);
      const patches =
        scratch(Math.ceil(Math.min(chunk, pixels) / panelWidth) * panelWidth * k * 4).byteOffset;
      this.#eachChunk(scratch, kernel, k, planar ? TILE_ROWS : TILE_COLS, (kernels, firstChannel) => {
        for (let image = 0; image < images; image++) {
          const from = picture + image * wide.strides[0] * 4;
          // One image of `out` as a matrix of f32: dense rows of pixels (planar) or of channels.
          const outImage = narrowImage(out, image);
          const [rows, cols] = planar ? [outChannels, pixels] : [pixels, outChannels];
          const outRow = planar ? out.strides[1] : outPixel;
          const { target, finish } = this.#target(scratch, outImage, rows, cols, outRow);
          for (let first = 0; first < pixels; first += chunk) {
            const count = Math.min(chunk, pixels - first);
            const jobs = Math.ceil(count / panelWidth);
            const alone = count * k < 50_000;
            if (pointwise) {
              const pixel = pixelStride(wide, height, width);
              this.runner.run(
                this.#pack,
                jobs,
                [patches, from + first * pixel * 4, count, k, pixel, wide.strides[1], panelWidth, 0],
                alone,
              );
            } else {
              // deno-fmt-ignore
              this.runner.run(
                this.#patches,
                jobs,
                [
                  patches, from, table, k, first, pixels, outWidth, height, width, wide.strides[2] * 4, wide.strides[3] * 4,
                  stride, top, left, kernelHeight - 1, kernelWidth - 1, panelWidth,
                ],
                alone,
              );
            }
            const seen: Panels = { address: patches, rows: count };
            const [row, column] = planar ? [firstChannel, first] : [first, firstChannel];
            this.#product(
              planar ? kernels : seen,
              planar ? seen : kernels,
              k,
              { ...target, address: target.address + row * target.rowBytes + column * 4 },
              {
                ...addend,
                address: addend.address + firstChannel * addend.row + firstChannel / TILE_COLS * addend.panel,
              },
              1,
            );
          }
          finish();
        }
      });
    });
  }

  forget(memory: Memory): void {
    this.#packed.forget(memory);
  }

  packedBytes(): number {
    return this.#packed.bytes;
  }

  trim(): boolean {
    const found = this.#packed.bytes > 0;
    this.#packed.clear();
    return found;
  }

  [Symbol.dispose](): void {
    this.#packed.clear();
    this.device.free(this.#zeros);
  }

  /** Where a product is stored: `out` itself, or f32 scratch that `finish` rounds into it. */
  #target(
    scratch: Allocate,
    out: Tensor,
    rows: number,
    cols: number,
    outRow: number,
  ): { target: Target; finish: () => void } {
    const address = wasmAddress(out);
    if (address === undefined) throw new FfiError(`cpu: ${out} lies in memory that cannot be written`);
    if (out.dtype === "f32") return { target: { address, rowBytes: outRow * 4 }, finish: () => {} };
    const wide = scratch(rows * cols * 4).byteOffset;
    return {
      target: { address: wide, rowBytes: cols * 4 },
      finish: () => this.#convert.store(wide, rows, cols, out, outRow, 1),
    };
  }

  /** Lays the bias out so that the tile kernel finds it under `along` rows or columns. */
  #addend(
    scratch: Allocate,
    bias: Tensor | undefined,
    along: "rows" | "columns",
    length = bias?.size ?? 0,
  ): Addend {
    if (bias === undefined) return { address: this.#zeros.byteOffset, row: 0, panel: 0 };
    const values = readVector(bias);
    const panels = along === "columns" ? Math.ceil(length / TILE_COLS) : length;
    const address = scratch(panels * TILE_COLS * 4).byteOffset;
    const laid = new Float32Array(this.device.wasmMemory.buffer, address, panels * TILE_COLS);
    if (along === "columns") {
      laid.set(values);
      return { address, row: 0, panel: TILE_COLS * 4 };
    }
    for (let row = 0; row < length; row++) laid.fill(values[row], row * TILE_COLS, (row + 1) * TILE_COLS);
    return { address, row: TILE_COLS * 4, panel: 0 };
  }

  /** Hands `use` the operand's panels: all at once from the cache if it is constant, else chunk by chunk. */
  #eachChunk(
    scratch: Allocate,
    operand: Operand,
    k: number,
    width: number,
    use: (panels: Panels, firstRow: number) => void,
  ): void {
    const { rows, constant, tensor } = operand;
    const bytes = Math.ceil(rows / width) * width * k * 4;
    if (constant) {
      const packed = this.#packed.get(tensor, `${width} wide`, bytes, () => {
        const memory = this.device.reserve(bytes);
        try {
          this.#packRows(memory.byteOffset, operand, 0, rows, k, width);
          return memory;
        } catch (error) {
          this.device.free(memory);
          throw error;
        }
      });
      if (packed !== undefined) return use({ address: packed.byteOffset, rows }, 0);
    }
    const chunk = Math.max(1, Math.floor(CHUNK_BYTES / (k * 4 * width))) * width;
    const address = scratch(Math.min(bytes, chunk * k * 4)).byteOffset;
    for (let first = 0; first < rows; first += chunk) {
      const count = Math.min(chunk, rows - first);
      this.#packRows(address, operand, first, count, k, width);
      use({ address, rows: count }, first);
    }
  }

  /** Packs rows `first .. first + count - 1` of an operand into panels at `to`. */
  #packRows(to: number, operand: Operand, first: number, count: number, k: number, width: number): void {
    const { tensor, rowStride, kStride } = operand;
    const size = dtypeBytes(tensor.dtype);
    const bf16 = tensor.dtype === "bf16" ? 1 : 0;
    const address = wasmAddress(tensor);
    if (address !== undefined) {
      const from = address + first * rowStride * size;
      const jobs = Math.ceil(count / width);
      this.runner.run(
        this.#pack,
        jobs,
        [to, from, count, k, rowStride, kStride, width, bf16],
        count * k < 50_000,
      );
      return;
    }
    // Weights lie where the checkpoint is mapped: bring them into reach in pieces.
    this.device.withScratch((scratch) => {
      const rowBytes = Math.max(rowStride, 1) * size;
      const piece = Math.max(1, Math.floor(CHUNK_BYTES / 4 / rowBytes / width)) * width;
      const extent = (rows: number) => (rows - 1) * rowStride + (k - 1) * kStride + 1;
      const copy = scratch(extent(Math.min(piece, count)) * size).byteOffset;
      for (let done = 0; done < count; done += piece) {
        const rows = Math.min(piece, count - done);
        copyRange(tensor, (first + done) * rowStride, extent(rows), copy, this.device.wasmMemory);
        const jobs = Math.ceil(rows / width);
        const panel = to + done * k * 4;
        this.runner.run(
          this.#pack,
          jobs,
          [panel, copy, rows, k, rowStride, kStride, width, bf16],
          rows * k < 50_000,
        );
      }
    });
  }

  /** `target = alpha * a @ b^T + addend` over packed panels, cut into jobs for the threads. */
  #product(a: Panels, b: Panels, k: number, target: Target, addend: Addend, alpha: number): void {
    const rowPanels = Math.ceil(a.rows / TILE_ROWS);
    const colPanels = Math.ceil(b.rows / TILE_COLS);
    const panelFlops = 2 * TILE_ROWS * TILE_COLS * k;
    const flops = rowPanels * colPanels * panelFlops;
    const wanted = Math.max(1, Math.min(8 * this.runner.threads, Math.floor(flops / FLOPS_PER_JOB)));
    const rowBlocks = Math.ceil(rowPanels / MAX_ROW_PANELS);
    const rowBlock = Math.ceil(rowPanels / rowBlocks);
    const colBlocks = Math.min(colPanels, Math.ceil(wanted / rowBlocks));
    const colBlock = Math.ceil(colPanels / colBlocks);
    const jobs = Math.ceil(rowPanels / rowBlock) * Math.ceil(colPanels / colBlock);
    // deno-fmt-ignore
    this.runner.run(
      this.#multiply,
      jobs,
      [
        a.address, b.address, target.address, a.rows, b.rows, k, target.rowBytes,
        addend.address, addend.row, addend.panel, alpha, rowBlock, colBlock,
      ],
      flops < FLOPS_PER_JOB,
    );
  }

  /** The kernel's taps, one per k, as conv.wat reads them: dy, dx and the element's offset in bytes. */
  #tapTable(scratch: Allocate, x: Tensor, taps: readonly Tap[]): number {
    const address = scratch(taps.length * 12).byteOffset;
    const table = new Int32Array(this.device.wasmMemory.buffer, address, taps.length * 3);
    const [, channel, row, pixel] = x.strides;
    let at = 0;
    for (const tap of taps) {
      table[at++] = tap.dy;
      table[at++] = tap.dx;
      table[at++] = (tap.channel * channel + tap.dy * row + tap.dx * pixel) * 4;
    }
    return address;
  }
}

/** One weight of an output channel: which input it meets. */
interface Tap {
  readonly channel: number;
  readonly dy: number;
  readonly dx: number;
}

/** The order in which a filter's weights lie in memory (channels first or last), as one stride and the taps. */
function kernelOrder(weight: Tensor): { stride: number; taps: Tap[] } {
  const [, channels, height, width] = weight.shape;
  const [, channel, row, pixel] = weight.strides;
  const taps: Tap[] = [];
  const stride = height * width === 1 ? channel : pixel;
  if ((channel === height * width * stride || channels === 1) && (row === width * stride || height === 1)) {
    for (let c = 0; c < channels; c++) {
      for (let dy = 0; dy < height; dy++) {
        for (let dx = 0; dx < width; dx++) taps.push({ channel: c, dy, dx });
      }
    }
    return { stride, taps };
  }
  if (pixel === channels * channel && (row === width * pixel || height === 1)) {
    for (let dy = 0; dy < height; dy++) {
      for (let dx = 0; dx < width; dx++) for (let c = 0; c < channels; c++) taps.push({ channel: c, dy, dx });
    }
    return { stride: channel, taps };
  }
  if (height * width === 1) {
    for (let c = 0; c < channels; c++) taps.push({ channel: c, dy: 0, dx: 0 });
    return { stride: channel, taps };
  }
  throw unsupported("conv", weight);
}

/** Distance of a picture's neighbouring pixels, where one stride reaches them all. */
function pixelStride(picture: Tensor, height: number, width: number): number {
  const [, , row, pixel] = picture.strides;
  if (width === 1) return row;
  if (height !== 1 && row !== width * pixel) throw unsupported("conv", picture);
  return pixel;
}

/** Image `index` of a batch `[n, c, h, w]`. */
function narrowImage(pictures: Tensor, index: number): Tensor {
  return pictures.narrow(0, index, 1);
}

function operand(tensor: Tensor, constant: boolean): Operand {
  const [rows] = tensor.shape;
  return { tensor, rows, rowStride: tensor.strides[0], kStride: tensor.strides[1], constant };
}

function unsupported(op: string, tensor: Tensor): ShapeError {
  return new ShapeError(`${op}: strides [${tensor.strides}] of ${tensor} are neither NCHW's nor NHWC's`);
}
