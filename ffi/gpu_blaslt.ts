/**
 * Products by cuBLASLt and hipBLASLt on one device: which algorithm is taken is decided here, for both
 * (gpu_blaslt_library.ts has their functions). The libraries know column-major matrices; column_major_gemm.ts says which of
 * them a plan's row-major ones are.
 */
import { columnMajorGemm, type Gemm, MATRIX_DTYPES } from "./column_major_gemm.ts";
import type { MatmulPlan } from "./device.ts";
import { FfiError } from "./errors.ts";
import { type BlasLtLibrary, type GemmDescriptors, WORKSPACE_BYTES } from "./gpu_blaslt_library.ts";
import type { GpuContext } from "./gpu_context.ts";
import { describeMatmul } from "./matmul_plan.ts";
import { NumberMap } from "./number_map.ts";
import type { Tensor } from "./tensor.ts";

/** Algorithms that are asked for: some turn out to be refused only when they are called, and the best may not be first. */
const CANDIDATES = 16;
/** Alignments above this make no difference. */
const MAX_ALIGNMENT = 256;
/** Numbers in {@link writeKey}'s key: six per matrix, one per address, two per vector, activation, dtypes. */
const KEY_LENGTH = 3 * 6 + 4 + 3 * 2 + 1 + 1;

/** A product that was prepared, for all plans of the same shapes, strides, dtypes and alignments. */
interface Prepared {
  readonly swapped: boolean;
  readonly descriptors: GemmDescriptors;
  /** What the library thinks the fastest first; one that it refuses when called leaves the list. */
  readonly candidates: Algorithm[];
  /** Whether it was decided which of them comes first. */
  chosen: boolean;
}

interface Algorithm {
  /** The library's own description of it. */
  readonly algo: Uint8Array<ArrayBuffer>;
  readonly workspaceBytes: number;
}

/**
 * Products on one device. Each distinct product is prepared once (descriptors, and the algorithm that the library's
 * heuristics put first); later calls look it up and fill in the addresses.
 */
export class BlasLt<Symbols extends Deno.ForeignLibraryInterface> implements Disposable {
  /** E.g. `"13.1.0"`. */
  readonly version: string;
  readonly #lib: BlasLtLibrary<Symbols>;
  readonly #handle: bigint;
  readonly #prepared = new NumberMap<Prepared>(KEY_LENGTH);
  readonly #alpha = new Float32Array(1);
  readonly #beta = new Float32Array(1);
  readonly #address = new BigUint64Array(1);

  /**
   * @param library opened for this; it is closed with this.
   * @param version asked for with the handle.
   * @throws {FfiError} where there is no handle for this GPU and driver
   */
  constructor(
    protected readonly context: GpuContext,
    library: BlasLtLibrary<Symbols>,
    version: (handle: bigint) => string,
  ) {
    this.#lib = library;
    try {
      context.driver.enter();
      this.#handle = library.created("Create", library.functions.create);
      this.version = version(this.#handle);
    } catch (error) {
      library[Symbol.dispose]();
      throw error;
    }
  }

  /**
   * Issues a product to the device's stream. `a` and `b` are both f32, both bf16 or both f16, `out` f32 or their dtype,
   * `bias` of `out`'s dtype. Sums are in f32, and f32 inputs are multiplied as they are (no TF32); parts of sums that
   * are made apart are added in f32 too. With `a` and `b` in f8e4m3, `out` is f32 or bf16 and `bias` bf16; their sums
   * stay in the matrix units (with fewer bits than f32 has), which is faster.
   *
   * Any sizes, strides and element-aligned addresses are handed to the library as they are: its heuristics choose
   * kernels with narrower loads for odd ones. What it has no kernel for is refused by name, nothing is emulated.
   *
   * @throws {ShapeError} for operands that do not fit together, a bias with a result whose columns are dense, and
   *   float8 in other layouts and sizes than the matrix units read
   * @throws {FfiError} for what the library does not do, and for every other status, with the plan
   */
  matmul(plan: MatmulPlan): void {
    const { a: { pointer: pointerA }, b: { pointer: pointerB }, out: { pointer: pointerOut }, bias } = plan;
    const pointerBias = bias === undefined ? 0n : bias.pointer;
    const prepared = this.#preparedFor(plan, pointerA, pointerB, pointerOut, pointerBias);
    if (prepared === undefined) return;
    const { swapped, descriptors: { operation }, candidates } = prepared;
    if (bias !== undefined) this.#setAddress(operation, this.#lib.header.desc.biasPointer, pointerBias);
    if (plan.scaleA !== undefined) this.#setScales(operation, plan, swapped);
    this.#alpha[0] = plan.alpha ?? 1;
    this.context.driver.enter();
    const [first, second] = swapped ? [pointerB, pointerA] : [pointerA, pointerB];
    if (!prepared.chosen) this.#chooseFirst(plan, prepared, first, second, pointerOut);
    if (candidates.length === 0) throw this.#refusal(plan);
    while (true) {
      const status = this.#issue(prepared, candidates[0], first, second, pointerOut);
      if (status === this.#lib.header.success) return;
      if (status !== this.#lib.header.notSupported || candidates.length === 1) {
        throw this.#lib.failure("Matmul", status, describeMatmul(plan));
      }
      candidates.shift();
    }
  }

  /** Whether there is an algorithm for a product. */
  takes(plan: MatmulPlan): boolean {
    const { a, b, out, bias } = plan;
    const prepared = this.#preparedFor(plan, a.pointer, b.pointer, out.pointer, bias?.pointer ?? 0n);
    return prepared === undefined || prepared.candidates.length > 0;
  }

  /** What was prepared for such plans; undefined where the result has no elements. */
  #preparedFor(
    plan: MatmulPlan,
    pointerA: bigint,
    pointerB: bigint,
    pointerOut: bigint,
    pointerBias: bigint,
  ): Prepared | undefined {
    writeKey(this.#prepared.key, plan, pointerA, pointerB, pointerOut, pointerBias);
    const known = this.#prepared.get();
    if (known !== undefined) return known;
    const gemm = columnMajorGemm(plan);
    if (gemm === undefined) return undefined;
    this.context.driver.enter();
    const prepared = this.#prepare(plan, gemm);
    this.#prepared.set(prepared);
    return prepared;
  }

  #refusal(plan: MatmulPlan): FfiError {
    return new FfiError(`${this.#lib.name} ${this.version} has no algorithm for ${describeMatmul(plan)}`);
  }

  /** Puts the algorithm first that the device chooses. */
  #chooseFirst(plan: MatmulPlan, prepared: Prepared, a: bigint, b: bigint, out: bigint): void {
    const { candidates } = prepared;
    prepared.chosen = true;
    if (candidates.length < 2) return;
    const scaled = plan.scaleA === undefined ? "" : `, ${plan.scaleA.size} scales`;
    const work = `${describeMatmul(plan)}${scaled}, ${plan.activation}, of ${candidates.length}`;
    const index = this.context.choose(
      `${this.#lib.name} ${this.version} ${work}`,
      () =>
        candidates.map((algorithm) => () =>
          this.#issue(prepared, algorithm, a, b, out) === this.#lib.header.success
        ),
    );
    candidates.unshift(...candidates.splice(index, 1));
  }

  /** Returns the library's status. */
  #issue(
    { descriptors }: Prepared,
    { algo, workspaceBytes }: Algorithm,
    a: bigint,
    b: bigint,
    out: bigint,
  ): number {
    return this.#lib.functions.matmul(
      this.#handle,
      descriptors.operation,
      this.#alpha,
      a,
      descriptors.a,
      b,
      descriptors.b,
      this.#beta,
      out, // C, which beta = 0 leaves unread
      descriptors.d,
      out,
      descriptors.d,
      algo,
      // Always the same size, so that the scratch does not grow and move with each new shape.
      workspaceBytes === 0 ? 0n : this.context.workspace(WORKSPACE_BYTES),
      BigInt(workspaceBytes),
      this.context.stream,
    );
  }

  [Symbol.dispose](): void {
    this.context.driver.enter();
    for (const { descriptors } of this.#prepared.values()) descriptors[Symbol.dispose]();
    this.#prepared.clear();
    this.#lib.check("Destroy", this.#lib.functions.destroy(this.#handle));
    this.#lib[Symbol.dispose]();
  }

  #prepare(plan: MatmulPlan, gemm: Gemm): Prepared {
    const { header } = this.#lib;
    const descriptors = this.#lib.describe(gemm);
    try {
      // The heuristics read the alignment of the bias from its address, and whether there are scales from theirs.
      if (plan.bias !== undefined) {
        this.#setAddress(descriptors.operation, header.desc.biasPointer, plan.bias.pointer);
      }
      if (gemm.scaling !== undefined) this.#setScales(descriptors.operation, plan, gemm.swapped);
      const [a, b] = gemm.swapped ? [plan.b, plan.a] : [plan.a, plan.b];
      const alignments = [a, b, plan.out, plan.out].map(({ pointer }) => alignmentOf(pointer));
      using preference = this.#lib.preference(alignments);
      const candidates = this.#candidates(descriptors, preference.handle, plan);
      return { swapped: gemm.swapped, descriptors, candidates, chosen: false };
    } catch (error) {
      descriptors[Symbol.dispose]();
      throw error;
    }
  }

  #candidates(descriptors: GemmDescriptors, preference: bigint, plan: MatmulPlan): Algorithm[] {
    const { operation, a, b, d } = descriptors;
    const { header } = this.#lib;
    const stride = header.resultBytes;
    const results = new Uint8Array(CANDIDATES * stride);
    const count = new Int32Array(1);
    const status = this.#lib.functions.matmulAlgoGetHeuristic(
      this.#handle,
      operation,
      a,
      b,
      d,
      d,
      preference,
      CANDIDATES,
      results,
      count,
    );
    // Which sizes it has kernels for with scales for rows, nobody knows beforehand.
    if (status === this.#lib.header.notSupported && plan.scaleA !== undefined) return [];
    this.#lib.check("MatmulAlgoGetHeuristic", status, () => describeMatmul(plan));
    const view = new DataView(results.buffer);
    const candidates: Algorithm[] = [];
    for (let at = 0; at < count[0] * stride; at += stride) {
      const state = view.getInt32(at + header.stateOffset, true);
      if (state !== this.#lib.header.success) continue;
      const workspaceAt = at + header.workspaceOffset;
      candidates.push({
        algo: results.slice(at, at + header.algoBytes),
        workspaceBytes: Number(view.getBigUint64(workspaceAt, true)),
      });
    }
    if (candidates.length === 0 && plan.scaleA === undefined) throw this.#refusal(plan);
    return candidates;
  }

  #setScales(operation: bigint, { scaleA, scaleB }: MatmulPlan, swapped: boolean): void {
    const [first, second] = swapped ? [scaleB!, scaleA!] : [scaleA!, scaleB!];
    const [pointerA, pointerB] = this.#lib.scalePointers(scaleA!.size * scaleB!.size > 1 ? "row" : "tensor");
    this.#setAddress(operation, pointerA, first.pointer);
    this.#setAddress(operation, pointerB, second.pointer);
  }

  #setAddress(operation: bigint, attribute: number, pointer: bigint): void {
    this.#address[0] = pointer;
    this.#lib.setOperation(operation, attribute, this.#address);
  }
}

/** Writes all that a prepared product depends on; plans with the same numbers share it. */
function writeKey(
  key: Float64Array,
  { a, b, bias, out, activation, scaleA, scaleB }: MatmulPlan,
  pointerA: bigint,
  pointerB: bigint,
  pointerOut: bigint,
  pointerBias: bigint,
): void {
  writeMatrix(key, 0, a);
  writeMatrix(key, 6, b);
  writeMatrix(key, 12, out);
  key[18] = alignmentOf(pointerA);
  key[19] = alignmentOf(pointerB);
  key[20] = alignmentOf(pointerOut);
  key[21] = bias === undefined ? 0 : alignmentOf(pointerBias);
  writeVector(key, 22, bias);
  writeVector(key, 24, scaleA);
  writeVector(key, 26, scaleB);
  key[28] = activation === undefined ? 0 : 1;
  key[29] = 0;
  for (const tensor of [a, b, out, bias, scaleA, scaleB]) key[29] = key[29] * 32 + dtypeCode(tensor);
}

function writeMatrix(key: Float64Array, at: number, { shape, strides }: Tensor): void {
  const rank = shape.length;
  // -1 keeps rank 2 apart from a batch of one.
  key[at] = rank === 3 ? shape[0] : -1;
  key[at + 1] = rank === 3 ? strides[0] : -rank;
  key[at + 2] = shape[rank - 2];
  key[at + 3] = strides[rank - 2];
  key[at + 4] = shape[rank - 1];
  key[at + 5] = strides[rank - 1];
}

function writeVector(key: Float64Array, at: number, vector: Tensor | undefined): void {
  key[at] = vector === undefined ? -1 : vector.rank === 1 ? vector.shape[0] : -2;
  key[at + 1] = vector === undefined ? 0 : vector.strides[0];
}

function dtypeCode(tensor: Tensor | undefined): number {
  return tensor === undefined ? 31 : MATRIX_DTYPES.indexOf(tensor.dtype) + 1;
}

/** The largest power of two that divides an address, up to {@link MAX_ALIGNMENT}. */
function alignmentOf(pointer: bigint): number {
  const low = Number(BigInt.asUintN(8, pointer));
  return low === 0 ? MAX_ALIGNMENT : low & -low;
}
