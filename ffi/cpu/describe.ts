import { cpus } from "node:os";

/** The CPU's model and cores, e.g. `"AMD EPYC 9R14, 2 cores"`; the model only with --allow-sys=cpus. */
export function describeCpu(): string {
  const cores = coreCount();
  return `${modelName() ?? `${Deno.build.arch} CPU`}, ${cores === 1 ? "1 core" : `${cores} cores`}`;
}

/** Cores that this process may use. */
export function coreCount(): number {
  return Math.max(1, navigator.hardwareConcurrency);
}

/** Threads for heavy work: `FLUX_CPU_THREADS` where it is set and may be read, else one per core. */
export function threadCount(): number {
  const variable = "FLUX_CPU_THREADS";
  if (Deno.permissions.querySync({ name: "env", variable }).state !== "granted") return coreCount();
  const wanted = Number(Deno.env.get(variable));
  return Number.isInteger(wanted) && wanted >= 1 ? Math.min(wanted, 256) : coreCount();
}

function modelName(): string | undefined {
  if (Deno.permissions.querySync({ name: "sys", kind: "cpus" }).state !== "granted") return undefined;
  return cpus().at(0)?.model.trim() || undefined;
}
