/**
 * A program of its own for cudnn_test.ts: plans attention with the real cuDNN for an H100 that is not there, and prints
 * of each plan, and of it restored from its JSON, what can be compared. cuDNN compiles such kernels with NVRTC and hands
 * them to libcuda.so.1; the first argument is a stand-in for it, which must not stay in the tests' own process.
 */
import { CudnnBackend } from "../../ffi/cuda/cudnn_backend.ts";
import { CudnnPlanner, type Layout } from "../../ffi/cuda/cudnn_plan.ts";
import type { DType } from "../../ffi/dtype.ts";
import { H100 } from "./h100.ts";

interface AttentionCase {
  readonly dtype: DType;
  readonly queries: number;
  readonly keys: number;
  readonly heads: number;
  readonly headDim: number;
  /** Elements from one token of v and of the output to the next, where these are columns of something wider. */
  readonly rows?: readonly [v: number, out: number];
}

/** What is planned. */
export const ATTENTION_CASES: readonly AttentionCase[] = [
  { dtype: "bf16", queries: 4352, keys: 4352, heads: 24, headDim: 128 },
  { dtype: "bf16", queries: 4352, keys: 4352, heads: 24, headDim: 128, rows: [21504, 15360] },
  { dtype: "f16", queries: 77, keys: 77, heads: 12, headDim: 64 },
  { dtype: "bf16", queries: 100, keys: 50, heads: 3, headDim: 8 },
  { dtype: "bf16", queries: 64, keys: 64, heads: 2, headDim: 100 },
];

if (import.meta.main) {
  Deno.dlopen(Deno.args[0], {}); // found by its soname from now on
  using backend = new CudnnBackend();
  using planner = new CudnnPlanner(backend, { deviceProperties: H100 });
  for (const { dtype, queries, keys, heads, headDim, rows = [] } of ATTENTION_CASES) {
    const layout = (tokens: number, row = heads * headDim): Layout => {
      const strides = [tokens * row, row, headDim, 1];
      return { dtype, shape: [2, tokens, heads, headDim], strides, alignment: 16 };
    };
    const [q, k, v, out] = [layout(queries), layout(keys), layout(keys, rows[0]), layout(queries, rows[1])];
    try {
      const start = performance.now();
      using plan = planner.attention({ q, k, v, out });
      const planned = performance.now();
      using restored = planner.restore(plan.json());
      console.log(JSON.stringify({
        workspaceBytes: plan.workspaceBytes,
        notes: plan.numericalNotes,
        restored: restored.workspaceBytes,
        milliseconds: { planning: planned - start, restoring: performance.now() - planned },
      }));
    } catch (error) {
      console.log(JSON.stringify({ error: String(error) }));
    }
  }
}
