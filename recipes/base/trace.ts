/**
 * Where the time of one picture goes, as a file for chrome://tracing and Perfetto (the Trace Event Format's complete
 * events: name, start and duration in microseconds). Parts are on the wall clock with the device waited for; operators
 * are what the host spends in them: computing on the CPU, issuing on a GPU. Operators of a recorded graph do not show.
 */
import type { Ops } from "./ops.ts";
import { FluxPipeline, type GenerateOptions } from "./pipeline.ts";

/** One complete event. */
export interface TraceEvent {
  readonly name: string;
  readonly ph: "X";
  readonly pid: 1;
  /** The line that it is drawn in: 1 for parts, 2 for operators. */
  readonly tid: 1 | 2;
  /** Microseconds since the picture was begun. */
  readonly ts: number;
  readonly dur: number;
  readonly args?: Readonly<Record<string, string>>;
}

/** Draws a picture and notes when what was done. The names of the parts are flux-fast's. */
export async function tracePicture(
  pipeline: FluxPipeline,
  drawing: GenerateOptions,
): Promise<readonly TraceEvent[]> {
  const { model, plan } = pipeline;
  const origin = performance.now();
  const events: TraceEvent[] = [];
  const add = (name: string, tid: 1 | 2, start: number, end: number, args?: TraceEvent["args"]) => {
    const span = { ts: 1000 * (start - origin), dur: 1000 * (end - start) };
    events.push({ name, ph: "X", pid: 1, tid, ...span, ...(args === undefined ? {} : { args }) });
  };
  const watched = new FluxPipeline(model, {
    ...plan,
    ops: watchOps(plan.ops, (name, start, end, shapes) => {
      if (name === "toPixels") endPart("decoding", start);
      add(name, 2, start, end, { shapes });
    }),
  });
  let partStart = performance.now();
  const endPart = (name: string, end: number) => {
    add(name, 1, partStart, end);
    partStart = end;
  };
  await watched.generate({
    ...drawing,
    onProgress: ({ step }) => endPart(step === 0 ? "prompt_encoding" : "denoising_step", performance.now()),
  });
  endPart("postprocessing", performance.now());
  return events;
}

type Watch = (name: string, start: number, end: number, shapes: string) => void;

/** The same operators; `watch` is called after each. */
function watchOps(ops: Ops, watch: Watch): Ops {
  const watched = Object.entries(ops).map(([name, op]) => {
    const call = op as (...args: unknown[]) => unknown;
    return [name, (...args: unknown[]) => {
      const start = performance.now();
      const result = call(...args);
      watch(name, start, performance.now(), shapesOf(args));
      return result;
    }];
  });
  return Object.fromEntries(watched) as Ops;
}

/** Shapes of the tensors among an operator's arguments: `"1x4096x64 3072x64"`. */
function shapesOf(args: readonly unknown[]): string {
  return args.flat().filter((arg): arg is { readonly shape: readonly number[] } =>
    typeof arg === "object" && arg !== null && "shape" in arg
  ).map(({ shape }) => shape.join("x")).join(" ");
}

/** The file's content: JSON, gzipped for a path that ends in `.gz`. */
export async function encodeTrace(
  events: readonly TraceEvent[],
  path: string,
): Promise<Uint8Array<ArrayBuffer>> {
  const text = new Blob([JSON.stringify({ traceEvents: events, displayTimeUnit: "ms" })]);
  const stream = /\.gz$/i.test(path)
    ? text.stream().pipeThrough(new CompressionStream("gzip"))
    : text.stream();
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
