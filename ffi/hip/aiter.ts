/**
 * AITER, AMD's library of assembled kernels: attention from its prebuilt code objects, which are loaded and launched as our
 * own kernels are. Python does not run, and nothing of AITER's own code; the twin of cuda/flash_attn3.ts.
 *
 * Where: `aiter_meta/hsa/<architecture>/fmha_v3_fwd` in the package `amd-aiter`, or in the folder that `AITER_ASM_DIR`
 * names, as AITER reads it. `fmha_fwd.csv` there says which file has which kernel.
 *
 * Source: `csrc/cpp_itfs/mha_fwd.cu` and `csrc/include/mha_fwd.h` of ROCm/aiter (2026-08), and the files' own metadata. A
 * kernel whose arguments have another size than these is refused: their layout has no version.
 */
import { FfiError } from "../errors.ts";
import { type AttentionPlan, Float } from "../gpu.ts";
import { dtypeBytes } from "../dtype.ts";
import { findFileInPackages, packageVersion, readEnv } from "../library.ts";
import { packStruct } from "../struct.ts";
import type { Tensor } from "../tensor.ts";
import { kernelMetadata } from "./code_object.ts";
import type { HipContext } from "./context.ts";

export const INSTALL_AITER = "pip install amd-aiter";

/** Heads of other sizes it has no kernel for. */
const HEAD_DIM = 128;
/** Threads of a block. */
const THREADS = 512;
/** MI308, which has files of its own among gfx942, has 80 compute units; MI300 has 228 and more. */
const MI308_UNITS = 80;
/** AITER's `how_v3_bf16_cvt`: P is rounded to nearest, ties to even. */
const NEAREST_EVEN = "0";

/** Offsets of the arguments, in bytes: each has a slot of 16. Strides are in bytes. */
export const ARGUMENTS = {
  out: 0x00,
  q: 0x10,
  k: 0x20,
  v: 0x30,
  lse: 0x40,
  scale: 0x50,
  queries: 0x60,
  qToken: 0x70,
  qTile: 0x80,
  qHead: 0x90,
  qBatch: 0xa0,
  headsOfKey: 0xb0,
  kToken: 0xc0,
  kHead: 0xd0,
  kBatch: 0xe0,
  option: 0xf0,
  hasLse: 0x100,
  keys: 0x110,
  qHeadDim: 0x120,
  vHeadDim: 0x130,
  heads: 0x140,
  vToken: 0x150,
  vHead: 0x160,
  vBatch: 0x170,
  outToken: 0x180,
  outHead: 0x190,
  outBatch: 0x1a0,
  queryOffsets: 0x1b0,
  keyOffsets: 0x1c0,
  lseHead: 0x1d0,
  queryPadding: 0x1e0,
  keyPadding: 0x1f0,
  qDescale: 0x200,
  kDescale: 0x210,
  vDescale: 0x220,
  qDescaleBatch: 0x230,
  qDescaleHead: 0x240,
  kDescaleBatch: 0x250,
  kDescaleHead: 0x260,
  vDescaleBatch: 0x270,
  vDescaleHead: 0x280,
} as const;

/** How many bytes of arguments kernels have: without and with what scales of float8 need. */
export const ARGUMENT_BYTES = { bf16: 0x200, f8e4m3: 0x290 } as const;
/** AITER's `s_opt` without a mask. */
const OPTION = 5;

type Kind = keyof typeof ARGUMENT_BYTES;

/** A row of `fmha_fwd.csv`, as far as it says which kernel is where. */
export interface AiterKernel {
  readonly name: string;
  readonly file: string;
  /** Queries of a block. */
  readonly tile: number;
}

/** The kernel for dense batches without a mask in `fmha_fwd.csv`; undefined where it has none. */
export function kernelIn(csv: string, kind: Kind): AiterKernel | undefined {
  const [header = "", ...lines] = csv.split(/\r?\n/);
  const columns = header.split(",").map((name) => name.trim());
  const rows = lines.filter((line) => line !== "").map((line) => {
    const values = line.split(",").map((value) => value.trim());
    return Object.fromEntries(columns.map((name, i) => [name, values[i]]));
  });
  const dtypes = kind === "bf16" ? ["bf16"] : ["fp8", "fp8bf16"];
  const fitting = rows.filter((row) =>
    dtypes.includes(row.dtype) && row.hdim_q === String(HEAD_DIM) && row.hdim_v === String(HEAD_DIM) &&
    row.mask === "0" && row.mode === "0"
  );
  const row = fitting.find(({ bf16_cvt }) => bf16_cvt === NEAREST_EVEN) ?? fitting[0];
  if (row === undefined || !/^\w+$/.test(row.knl_name ?? "") || !/^[\w.]+\.co$/.test(row.co_name ?? "")) {
    return undefined;
  }
  const tile = Number(row.ts_qo);
  return Number.isInteger(tile) && tile > 0 ? { name: row.knl_name, file: row.co_name, tile } : undefined;
}

/** What it attends to: heads of 128, all bf16, or q, k and v in E4M3 with a bf16 result. */
export function aiterTakesPlan({ q, k, v, out }: AttentionPlan): boolean {
  if (q.shape[3] !== HEAD_DIM || out.dtype !== "bf16" || (q.dtype !== "bf16" && q.dtype !== "f8e4m3")) {
    return false;
  }
  if (k.dtype !== q.dtype || v.dtype !== q.dtype) return false;
  // Its strides are 32-bit numbers of bytes.
  return [q, k, v, out].every(({ strides, shape }) =>
    strides.every((stride, i) => 2 * stride * shape[i] < 2 ** 31)
  );
}

/** The arguments of a launch, packed. @param descale address of an f32 one, for float8. */
export function aiterArguments(plan: AttentionPlan, tile: number, descale: bigint): Uint8Array<ArrayBuffer> {
  const { q, k, v, out, scale } = plan;
  const kind: Kind = q.dtype === "f8e4m3" ? "f8e4m3" : "bf16";
  const bytes = ({ dtype, strides }: Tensor, dim: number) => strides[dim] * dtypeBytes(dtype);
  return packStruct(ARGUMENT_BYTES[kind], [
    [ARGUMENTS.out, out.pointer],
    [ARGUMENTS.q, q.pointer],
    [ARGUMENTS.k, k.pointer],
    [ARGUMENTS.v, v.pointer],
    [ARGUMENTS.scale, new Float(scale)],
    [ARGUMENTS.queries, q.shape[1]],
    [ARGUMENTS.qToken, bytes(q, 1)],
    [ARGUMENTS.qTile, tile * bytes(q, 1)],
    [ARGUMENTS.qHead, bytes(q, 2)],
    [ARGUMENTS.qBatch, bytes(q, 0)],
    [ARGUMENTS.headsOfKey, 1],
    [ARGUMENTS.kToken, bytes(k, 1)],
    [ARGUMENTS.kHead, bytes(k, 2)],
    [ARGUMENTS.kBatch, bytes(k, 0)],
    [ARGUMENTS.option, OPTION],
    [ARGUMENTS.keys, k.shape[1]],
    [ARGUMENTS.qHeadDim, HEAD_DIM],
    [ARGUMENTS.vHeadDim, HEAD_DIM],
    [ARGUMENTS.heads, q.shape[2]],
    [ARGUMENTS.vToken, bytes(v, 1)],
    [ARGUMENTS.vHead, bytes(v, 2)],
    [ARGUMENTS.vBatch, bytes(v, 0)],
    [ARGUMENTS.outToken, bytes(out, 1)],
    [ARGUMENTS.outHead, bytes(out, 2)],
    [ARGUMENTS.outBatch, bytes(out, 0)],
    ...(kind === "bf16"
      ? []
      : [ARGUMENTS.qDescale, ARGUMENTS.kDescale, ARGUMENTS.vDescale].map((at) => [at, descale] as const)),
  ]);
}

/** Where AITER's code objects for an architecture are, and the package's version where it is one. */
export interface AiterFolder {
  readonly path: string;
  readonly version: string | undefined;
}

/** Finds them. Throws {@link LibraryNotFoundError}. */
export function findAiter(architecture: string): AiterFolder {
  const inside = `${architecture}/fmha_v3_fwd/fmha_fwd.csv`;
  const named = readEnv("AITER_ASM_DIR");
  const places = named === undefined
    ? []
    : [{ from: "AITER_ASM_DIR", path: `${named.replace(/\/+$/, "")}/${inside}` }];
  const { path, folder } = findFileInPackages("AITER", `aiter_meta/hsa/${inside}`, INSTALL_AITER, places);
  return {
    path: path.slice(0, -"/fmha_fwd.csv".length),
    version: folder === undefined ? undefined : packageVersion(folder, "amd_aiter"),
  };
}

/** A kernel, loaded. */
interface Loaded extends AiterKernel {
  readonly module: bigint;
  readonly handle: bigint;
}

/** Attention by AITER on one device; its files are looked for at the first use. */
export class Aiter implements Disposable {
  readonly #loaded = new Map<Kind, Loaded>();
  #found: AiterFolder | undefined;
  // Buffers made first: V8 may move what a small typed array makes for itself, and `#extra` has addresses.
  readonly #bytes = new BigUint64Array(new ArrayBuffer(8));
  readonly #arguments = new Uint8Array(new ArrayBuffer(ARGUMENT_BYTES.f8e4m3));
  readonly #extra = new BigUint64Array(new ArrayBuffer(5 * 8));

  constructor(
    private readonly context: HipContext,
    markers: readonly [pointer: number, size: number, end: number],
  ) {
    const address = (buffer: BufferSource) => Deno.UnsafePointer.value(Deno.UnsafePointer.of(buffer));
    const [pointer, size, end] = markers.map(BigInt);
    this.#extra.set([pointer, address(this.#arguments), size, address(this.#bytes), end]);
  }

  /** E.g. `"0.1.9"`; undefined where nothing says it. Throws {@link LibraryNotFoundError} where it is not installed. */
  get version(): string | undefined {
    return this.#folder.version;
  }

  /**
   * Issues attention to the device's stream and returns true, or returns false for what {@link aiterTakesPlan} does not
   * take. Softmax is in f32.
   *
   * @throws {FfiError} where it is not installed, or has another kernel than this knows
   */
  attention(plan: AttentionPlan): boolean {
    if (!aiterTakesPlan(plan)) return false;
    const { q, out } = plan;
    if (out.size === 0) return true;
    const kind: Kind = q.dtype === "f8e4m3" ? "f8e4m3" : "bf16";
    const { name, tile, handle } = this.#kernel(kind);
    const { driver, stream } = this.context;
    let descale = 0n;
    if (kind === "f8e4m3") {
      descale = this.context.workspace(4);
      driver.memsetD32Async(descale, 0x3f800000, 1, stream); // 1.0
    }
    const packed = aiterArguments(plan, tile, descale);
    this.#arguments.set(packed);
    this.#bytes[0] = BigInt(packed.length);
    const grid = [Math.ceil(q.shape[1] / tile), q.shape[2], q.shape[0]] as const;
    driver.launchKernel(handle, grid, [THREADS, 1, 1], 0, stream, null, this.#extra, name);
    return true;
  }

  [Symbol.dispose](): void {
    for (const { module } of this.#loaded.values()) this.context.driver.moduleUnload(module);
    this.#loaded.clear();
  }

  get #folder(): AiterFolder {
    return this.#found ??= findAiter(this.context.architecture);
  }

  #kernel(kind: Kind): Loaded {
    let loaded = this.#loaded.get(kind);
    if (loaded === undefined) this.#loaded.set(kind, loaded = this.#load(kind));
    return loaded;
  }

  #load(kind: Kind): Loaded {
    const { path } = this.#folder;
    const { architecture, multiprocessors, driver } = this.context;
    const kernel = kernelIn(Deno.readTextFileSync(`${path}/fmha_fwd.csv`), kind);
    const words = kind === "bf16" ? "bfloat16" : "float8";
    if (kernel === undefined) {
      throw new FfiError(`AITER has no kernel for attention in ${words} in ${path}/fmha_fwd.csv`, {
        hint: `${INSTALL_AITER} --upgrade`,
      });
    }
    const own = architecture !== "gfx942" ? "" : multiprocessors <= MI308_UNITS ? "MI308/" : "MI300/";
    const file = `${path}/${own}${kernel.file}`;
    const image = readFile(file);
    const size = kernelMetadata(image)?.argumentBytes;
    if (size !== ARGUMENT_BYTES[kind]) {
      throw new FfiError(
        `${file} takes ${
          size ?? "an unknown number of"
        } bytes of arguments, this program knows the kernel with ` +
          `${ARGUMENT_BYTES[kind]}`,
        { hint: "leave out --attention aiter, and report AITER's version" },
      );
    }
    const module = driver.moduleLoadData(image, file);
    return { ...kernel, module, handle: driver.moduleGetFunction(module, kernel.name, file) };
  }
}

function readFile(path: string): Uint8Array<ArrayBuffer> {
  try {
    return Deno.readFileSync(path);
  } catch (error) {
    throw new FfiError(`AITER's ${path} cannot be read: ${error instanceof Error ? error.message : error}`, {
      cause: error,
      hint: `${INSTALL_AITER} --force-reinstall`,
    });
  }
}
