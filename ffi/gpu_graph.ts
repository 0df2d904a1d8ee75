import { FfiError } from "./errors.ts";
import type { Graph } from "./gpu.ts";
import type { GpuRuntime } from "./gpu_runtime.ts";

/** A recording, ready to run. */
export class RuntimeGraph implements Graph {
  #executable: bigint | undefined;

  constructor(
    private readonly driver: GpuRuntime,
    private readonly stream: bigint,
    executable: bigint,
    private readonly onDispose: () => void,
  ) {
    this.#executable = executable;
  }

  replay(): void {
    if (this.#executable === undefined) throw new FfiError("the graph was disposed");
    this.driver.graphLaunch(this.#executable, this.stream);
  }

  [Symbol.dispose](): void {
    if (this.#executable === undefined) return;
    this.driver.graphExecDestroy(this.#executable);
    this.#executable = undefined;
    this.onDispose();
  }
}
