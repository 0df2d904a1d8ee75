/** Times of whole pictures, and of their parts. */
import { isGpu, type PowerMeter } from "../../ffi/gpu.ts";
import { UsageError } from "./errors.ts";
import type { FluxPipeline, GenerateOptions, GenerateResult, Picture } from "./pipeline.ts";

/** Defaults of the programs: flux-fast's. */
export const WARMUPS = 3;
export const RUNS = 10;

/** What several times have in common, in their own unit. */
export interface Statistics {
  /** Their sum, divided by how many they are. */
  readonly mean: number;
  /** Of the sample, divided by one less than its size, as torch has it; 0 for a single value. */
  readonly variance: number;
  /** The middle one, or the mean of the two in the middle. */
  readonly median: number;
  /** The smallest. */
  readonly min: number;
  /** The largest. */
  readonly max: number;
}

/** Throws {@link UsageError} for no values. */
export function statistics(values: readonly number[]): Statistics {
  if (values.length === 0) throw new UsageError("statistics of no values");
  const sorted = values.toSorted((a, b) => a - b);
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const middle = values.length >> 1;
  return {
    mean,
    variance: values.length === 1 ? 0 : squares / (values.length - 1),
    median: values.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2,
    min: sorted[0],
    max: sorted[sorted.length - 1],
  };
}

/** Milliseconds of one picture on the wall clock. */
export interface PictureTimes {
  /** From the prompt to pixels on the host. */
  readonly whole: number;
  /** Tokenizers and text encoders. */
  readonly text: number;
  /** The autoencoder's encoder; 0 without a picture to edit. */
  readonly image: number;
  /** Of each denoising step. */
  readonly steps: readonly number[];
  /** The autoencoder, and the look for NaN in what it gives. */
  readonly decode: number;
  /** To 8-bit pixels, and these to the host. */
  readonly postprocess: number;
}

/** How often {@link measure} draws. */
export interface MeasureOptions {
  /** Pictures that are drawn first, without being timed. */
  readonly warmups: number;
  /** Pictures that are timed. */
  readonly runs: number;
  /** Called with how many pictures are drawn, before the first and after each. */
  readonly onPicture?: (done: number) => void;
}

/** What {@link measure} gives. */
export interface Measurement {
  /** Of each timed picture. */
  readonly times: readonly PictureTimes[];
  /** Milliseconds of the first picture, timed or not: kernels are compiled, algorithms measured and graphs recorded in it. */
  readonly first: number;
  /** The last one. */
  readonly picture: Picture;
  /** What was used, all defaults filled in. */
  readonly settings: GenerateResult["settings"];
  /** What the GPU did while pictures were timed. */
  readonly power?: Power;
}

/** A GPU at work. */
export interface Power {
  /** On average; undefined where work was too short for the meter. */
  readonly watts?: number;
  /** Of the multiprocessors' clock, in MHz; undefined where it was never read. */
  readonly megahertz?: Statistics;
}

/** Milliseconds between looks at a clock. */
const CLOCK_INTERVAL = 20;
/** Milliseconds that make a mean of watts: a meter's joules change every 100 or so. */
const METERED = 1000;

/** Reads a meter until it is stopped. */
function watchPower(meter: PowerMeter): () => Power {
  const megahertz: number[] = [];
  const timer = setInterval(() => megahertz.push(meter.megahertz()), CLOCK_INTERVAL);
  const [joules, start] = [meter.joules(), performance.now()];
  return () => {
    clearInterval(timer);
    const milliseconds = performance.now() - start;
    const watts = 1000 * (meter.joules() - joules) / milliseconds;
    meter[Symbol.dispose]();
    const known = megahertz.filter((clock) => !Number.isNaN(clock));
    return {
      ...(milliseconds >= METERED && !Number.isNaN(watts) && { watts }),
      ...(known.length > 0 && { megahertz: statistics(known) }),
    };
  };
}

/**
 * Draws the same picture again and again, and times it: with the model loaded, and the device idle before and after.
 *
 * @throws UsageError for no runs, and what {@link FluxPipeline.generate} throws.
 */
export async function measure(
  pipeline: FluxPipeline,
  drawing: GenerateOptions,
  { warmups, runs, onPicture }: MeasureOptions,
): Promise<Measurement> {
  const { device } = pipeline.plan;
  const times: PictureTimes[] = [];
  let last: GenerateResult | undefined;
  let first = NaN;
  let stop: (() => Power) | undefined;
  let power: Power | undefined;
  onPicture?.(0);
  try {
    for (let run = 0; run < warmups + runs; run++) {
      await device.synchronize();
      if (run === warmups) {
        const meter = isGpu(device) ? device.powerMeter() : undefined;
        stop = meter && watchPower(meter);
      }
      const start = performance.now();
      last = await pipeline.generate(drawing);
      await device.synchronize();
      const end = performance.now();
      const { text, image, steps, decode, pixels } = last.milliseconds;
      if (run === 0) first = end - start;
      if (run >= warmups) {
        times.push({ whole: end - start, text, image, steps, decode: decode - pixels, postprocess: pixels });
      }
      onPicture?.(run + 1);
    }
  } finally {
    power = stop?.();
  }
  if (last === undefined || times.length === 0) throw new UsageError("measure: give one run or more");
  return { times, first, picture: last.images[0], settings: last.settings, ...(power && { power }) };
}

/** {@link Statistics} of each part of a picture, in milliseconds. */
export interface PartStatistics {
  readonly whole: Statistics;
  readonly text: Statistics;
  readonly image: Statistics;
  /** One for each step. */
  readonly steps: readonly Statistics[];
  /** Of all steps of all pictures. */
  readonly step: Statistics;
  readonly decode: Statistics;
  readonly postprocess: Statistics;
}

/** Statistics over pictures of one number of steps. */
export function partStatistics(times: readonly PictureTimes[]): PartStatistics {
  const of = (part: "whole" | "text" | "image" | "decode" | "postprocess") =>
    statistics(times.map((picture) => picture[part]));
  return {
    whole: of("whole"),
    text: of("text"),
    image: of("image"),
    steps: times[0].steps.map((_, step) => statistics(times.map(({ steps }) => steps[step]))),
    step: statistics(times.flatMap(({ steps }) => steps)),
    decode: of("decode"),
    postprocess: of("postprocess"),
  };
}
