/**
 * NVIDIA's libraries are more than a gigabyte, and a first picture waits for the disk where nobody has read them since the
 * machine started. They are read while other things go on: the context is made, weights load.
 */
import { readAhead } from "../cpu/libc.ts";
import { candidatePaths, type ListFolder, listFolder, type ReadEnv, readEnv } from "../library.ts";
import { cudaSonames } from "./versions.ts";

/** What cuDNN opens beside itself, from its own folder, for convolutions and attention as graphs. */
const OF_CUDNN = /^libcudnn_(graph|ops|cnn|heuristic|engines_precompiled|engines_runtime_compiled)\.so\.9$/;

/**
 * Reads them in the background, all at once: a thread that had to begin the next one may be busy for long.
 *
 * @param newest version of CUDA that the driver takes.
 */
export async function readLibrariesAhead(newest: number): Promise<void> {
  await Promise.all(librariesToRead(newest, readEnv, listFolder).map(readAhead));
}

/** Where they are found first, as far as that is in a folder that is known: the loader has places of its own. Pure. */
export function librariesToRead(newest: number, env: ReadEnv, listFolder: ListFolder): string[] {
  const find = (sonames: readonly string[]) =>
    candidatePaths(sonames, env, listFolder).flatMap(({ paths }) => paths).find((path) => path.includes("/"));
  const cudnn = find(["libcudnn.so.9"]);
  const folder = cudnn?.replace(/\/[^/]*$/, "");
  const beside = folder === undefined
    ? []
    : [...(listFolder(folder) ?? [])].filter((name) => OF_CUDNN.test(name));
  return [
    find(cudaSonames("libnvrtc", newest)),
    find(cudaSonames("libcublasLt", newest)),
    cudnn,
    ...beside.sort().map((name) => `${folder}/${name}`),
  ].filter((path) => path !== undefined);
}
