/** How much of a GPU's memory FLUX.1-dev's weights take while they are loaded and composed, of real sizes, on a GPU that holds nothing. */
import assert from "node:assert/strict";
import { Arena } from "../../ffi/arena.ts";
import type { Memory, MemoryPurpose } from "../../ffi/device.ts";
import { ALIGNMENT } from "../../ffi/gpu_segment.ts";
import { NullGpu } from "../../ffi/null_gpu.ts";
import { Model } from "../../recipes/base/model.ts";
import { piecesFor } from "../../recipes/base/pieces.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { recipesFor } from "../../recipes/switches.ts";
import { fluxDev } from "../support/flux_dev.ts";
import { likeH100 } from "../support/null_gpu.ts";

/** Plans weights as a real GPU does. */
class Planned extends NullGpu {
  readonly #arena = new Arena(0, 2 ** 40, ALIGNMENT);
  readonly #starts = new Map<Memory, number>();
  used = 0;
  /** The end of the last block, at most. */
  most = 0;

  override alloc(byteLength: number, purpose?: MemoryPurpose): Memory {
    const memory = super.alloc(byteLength);
    if (purpose !== "weights") return memory;
    this.#starts.set(memory, this.#arena.alloc(byteLength)!);
    this.used += byteLength;
    this.most = Math.max(this.most, this.#arena.end);
    return memory;
  }

  override free(memory: Memory): void {
    const start = this.#starts.get(memory);
    if (start === undefined) return;
    this.#arena.free(start);
    this.#starts.delete(memory);
    this.used -= memory.byteLength;
  }
}

for (
  const [title, switches, kept, beside] of [
    ["exact", { disable_quant: true, disable_fa3: true }, 33.76e9, 0.05e9],
    ["float8", {}, 18.32e9, 1.6e9],
  ] as const
) {
  Deno.test(`weights: what recipes make of them takes little beside them (${title})`, async () => {
    const gpu = new Planned(likeH100());
    const recipes = recipesFor({ compile_export_mode: "compile", ...switches }, "cuda");
    const model = await Model.hollow(fluxDev(), gpu, "bf16", piecesFor(recipes));
    const plan = compose(eagerPlan(gpu, model.weights), ...recipes);
    assert.ok(plan.recipes.length > 4);
    assert.ok(Math.abs(gpu.used - kept) < 0.01e9, `${gpu.used} bytes`);
    assert.ok(gpu.most < gpu.used + beside, `${gpu.most} bytes at most, for ${gpu.used}`);
  });
}
