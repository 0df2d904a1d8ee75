import { cpus } from "node:os";
import { FfiError } from "../errors.ts";

/** The CPU's model and cores, e.g. `"AMD EPYC 9R14, 2 cores"`; the model only with --allow-sys=cpus. */
export function describeCpu(): string {
  const cores = coreCount();
  return `${modelName() ?? `${Deno.build.arch} CPU`}, ${cores === 1 ? "1 core" : `${cores} cores`}`;
}

/** Cores that this process may use. */
export function coreCount(): number {
  return Math.max(1, navigator.hardwareConcurrency);
}

/** Threads beyond one per core only wait for one another; a few times the cores leave room for experiments. */
const THREADS_PER_CORE = 4;

/**
 * Threads for heavy work: `FLUX_CPU_THREADS` where it is set and may be read, else one per core.
 *
 * @throws {FfiError} when the variable is no whole number from 1 to four times the cores
 */
export function threadCount(): number {
  const variable = "FLUX_CPU_THREADS";
  if (Deno.permissions.querySync({ name: "env", variable }).state !== "granted") return coreCount();
  const text = Deno.env.get(variable)?.trim();
  if (text === undefined || text === "") return coreCount();
  const most = THREADS_PER_CORE * coreCount();
  const wanted = /^\d+$/.test(text) ? Number(text) : NaN;
  if (!(wanted >= 1 && wanted <= most)) {
    throw new FfiError(`${variable} is ${JSON.stringify(text)}: give a whole number from 1 to ${most}`, {
      hint: `leave it unset for one thread per core (${coreCount()})`,
    });
  }
  return wanted;
}

function modelName(): string | undefined {
  if (Deno.permissions.querySync({ name: "sys", kind: "cpus" }).state !== "granted") return undefined;
  return cpus().at(0)?.model.trim() || undefined;
}
