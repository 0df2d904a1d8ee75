/** A worker thread of {@link WasmRunner}: takes jobs from the board until the main thread stops it. */
import { workerData } from "node:worker_threads";
import { JobBoard, type KernelFunction, type WorkerData } from "./job_board.ts";

const { board, memory, scratch }: WorkerData = workerData;
const kernels = new Map<number, KernelFunction[]>();

new JobBoard(board).serve((bytes, key, exportIndex) => {
  let found = kernels.get(key);
  if (found === undefined) {
    const module = new WebAssembly.Module(bytes());
    const { exports } = new WebAssembly.Instance(module, { env: { memory, scratch } });
    found = WebAssembly.Module.exports(module).map(({ name }) => exports[name] as KernelFunction);
    kernels.set(key, found);
  }
  return found[exportIndex];
});
