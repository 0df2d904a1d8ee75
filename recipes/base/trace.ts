/**
 * Where the time of one picture goes, as a file for ui.perfetto.dev and chrome://tracing (the Trace Event Format: name,
 * start and duration in microseconds). It has three kinds of lines:
 *
 * - the pipeline's parts, on the wall clock with the device waited for;
 * - operators, with what the host spends in them: computing on the CPU, issuing on a GPU;
 * - a GPU's kernels, copies and fills, by its streams and on its own clock.
 *
 * Under a GPU's profiler the picture is drawn twice. The first one records the graphs anew, since only those that are
 * recorded under it show their kernels; the second one is the trace. Operators inside of a graph do not show: the host does
 * not issue them any more.
 */
import { briefly, FfiError } from "../../ffi/errors.ts";
import { type GpuActivity, type GpuDevice, type GpuProfiler, isGpu } from "../../ffi/gpu.ts";
import type { Ops } from "./ops.ts";
import { FluxPipeline, type GenerateOptions } from "./pipeline.ts";

/** Something that took time. */
export interface Span {
  readonly name: string;
  readonly cat: "part" | "operator" | GpuActivity["kind"];
  readonly ph: "X";
  /** The group of lines, and the line in it; {@link LineName}s say what they are called. */
  readonly pid: number;
  readonly tid: number;
  /** Microseconds since the picture was begun. */
  readonly ts: number;
  readonly dur: number;
  readonly args?: Readonly<Record<string, string | number>>;
}

/** What a group of lines, or a line, is called. */
export interface LineName {
  readonly name: "process_name" | "thread_name";
  readonly ph: "M";
  readonly pid: number;
  readonly tid: number;
  readonly args: { readonly name: string };
}

export type TraceEvent = LineName | Span;

/** Groups of lines, and those of the host. */
const HOST = 1;
const GPU = 2;
const PARTS = 1;
const OPERATORS = 2;

/**
 * Draws a picture and notes when what was done. The names of the parts are flux-fast's. Where a GPU has no profiler, the
 * trace has no kernels, and `onWarning` is told why.
 *
 * @returns names first, then spans in the order of their starts.
 */
export async function tracePicture(
  pipeline: FluxPipeline,
  drawing: GenerateOptions,
): Promise<readonly TraceEvent[]> {
  const { device } = pipeline.plan;
  const watched = new WatchedPipeline(pipeline, drawing);
  await using profiler = isGpu(device) ? await openProfiler(device, drawing.onWarning) : undefined;
  if (profiler === undefined) {
    await watched.draw();
    return inOrder(hostLines(), watched.spans);
  }
  await watched.draw();
  const { activities, lost } = await profiler.profile(() => watched.draw());
  if (lost > 0) {
    drawing.onWarning?.(`the trace lacks ${lost} kernels or copies, for which the profiler had no room`);
  }
  return inOrder(
    [...hostLines(), ...gpuLines(device.name, activities)],
    [...watched.spans, ...activities.map((activity) => gpuSpan(activity, watched.origin))],
  );
}

/** The GPU's profiler, or undefined, with a word to the user, where it cannot be had. */
async function openProfiler(
  device: GpuDevice,
  onWarning?: (message: string) => void,
): Promise<GpuProfiler | undefined> {
  try {
    return await device.openProfiler();
  } catch (error) {
    if (!(error instanceof FfiError)) throw error;
    const hint = error.hint === undefined ? "" : `; ${error.hint}`;
    onWarning?.(`the trace is written without the GPU's kernels: ${briefly(error)}${hint}`);
    return undefined;
  }
}

/** A pipeline that notes what the host does for its latest picture. */
class WatchedPipeline {
  /** When that picture was begun, on the clock of `performance.now()`. */
  origin = 0;
  spans: Span[] = [];
  readonly #pipeline: FluxPipeline;
  readonly #drawing: GenerateOptions;

  constructor({ model, plan }: FluxPipeline, drawing: GenerateOptions) {
    this.#drawing = drawing;
    this.#pipeline = new FluxPipeline(model, {
      ...plan,
      ops: watchOps(plan.ops, (name, start, end, shapes) => {
        this.#add(name, "operator", start, end, { shapes });
      }),
    });
  }

  async draw(): Promise<void> {
    this.spans = [];
    this.origin = performance.now();
    const { started, milliseconds } = await this.#pipeline.generate(this.#drawing);
    const { text, image, steps, decode, pixels } = milliseconds;
    // As the device's work went, which a GPU's host has issued before.
    const parts: [string, number][] = [
      ["prompt_encoding", text],
      ...(image > 0 ? [["image_encoding", image] as [string, number]] : []),
      ...steps.map((time): [string, number] => ["denoising_step", time]),
      ["decoding", decode - pixels],
      ["postprocessing", pixels],
    ];
    let start = started;
    for (const [name, time] of parts) {
      this.#add(name, "part", start, start + time);
      start += time;
    }
  }

  #add(name: string, cat: "part" | "operator", start: number, end: number, args?: Span["args"]): void {
    const place = { pid: HOST, tid: cat === "part" ? PARTS : OPERATORS };
    const time = timesOf(start, end, this.origin);
    this.spans.push({ name, cat, ph: "X", ...place, ...time, ...(args === undefined ? {} : { args }) });
  }
}

function hostLines(): LineName[] {
  return [
    lineName("process_name", HOST, 0, "host"),
    lineName("thread_name", HOST, PARTS, "pipeline"),
    lineName("thread_name", HOST, OPERATORS, "operators (host)"),
  ];
}

function gpuLines(device: string, activities: readonly GpuActivity[]): LineName[] {
  const streams = [...new Set(activities.map(({ stream }) => stream))].sort((a, b) => a - b);
  return [
    lineName("process_name", GPU, 0, device),
    ...streams.map((stream) => lineName("thread_name", GPU, stream, `GPU stream ${stream}`)),
  ];
}

function lineName(what: LineName["name"], pid: number, tid: number, name: string): LineName {
  return { name: what, ph: "M", pid, tid, args: { name } };
}

function gpuSpan({ kind, name, stream, start, end, details }: GpuActivity, origin: number): Span {
  return { name, cat: kind, ph: "X", pid: GPU, tid: stream, ...timesOf(start, end, origin), args: details };
}

/** Milliseconds as microseconds since `origin`, to the nanosecond. */
function timesOf(start: number, end: number, origin: number): Pick<Span, "ts" | "dur"> {
  const nanoseconds = (milliseconds: number) => Math.round(milliseconds * 1e6);
  return { ts: nanoseconds(start - origin) / 1000, dur: nanoseconds(end - start) / 1000 };
}

/** What contains others comes before them. */
function inOrder(names: readonly LineName[], spans: readonly Span[]): TraceEvent[] {
  return [...names, ...spans.toSorted((a, b) => a.ts - b.ts || b.dur - a.dur)];
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
