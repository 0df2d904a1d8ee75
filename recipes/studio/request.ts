/** What a page of the studio may ask for, and what it is told. */
import { z } from "zod";
import { UsageError } from "../base/errors.ts";
import { MAX_SIDE, MAX_STEPS } from "../base/pipeline.ts";

const LONGEST_PROMPT = 4000;

/** One message for whatever is wrong with it. */
const whole = (most: number) => {
  const error = `give a whole number from 1 to ${most}`;
  return z.number({ error }).int({ error }).min(1, { error }).max(most, { error });
};

const drawingSchema = z.strictObject({
  prompt: z.string().max(LONGEST_PROMPT).refine((text) => text.trim() !== "", "is empty: say what to draw"),
  /** A whole number as text, since it goes beyond what JSON's numbers hold; "" for one at random. */
  seed: z.string().regex(/^([+-]?\d{1,20})?$/, "is no whole number"),
  width: whole(MAX_SIDE),
  height: whole(MAX_SIDE),
  steps: whole(MAX_STEPS).optional(),
  /** One of those that the studio lists. */
  model: z.string(),
  /** Names of recipes: one choice, or two to compare. */
  configurations: z.array(z.array(z.string()).max(32)).min(1).max(2),
});

/** What to draw, and with which recipes. */
export type Drawing = z.infer<typeof drawingSchema>;

/** Throws {@link UsageError} that says which value is wrong, and why. */
export function parseDrawing(value: unknown): Drawing {
  const { data, error } = drawingSchema.safeParse(value);
  if (data !== undefined) return data;
  const [{ path, message }] = error!.issues;
  throw new UsageError(`${path.length === 0 ? "the request" : path.join(".")}: ${message}`);
}

/** Milliseconds by part. */
export interface PartTimes {
  readonly text: number;
  readonly steps: readonly number[];
  readonly decode: number;
}

/** What a page is told while its job waits and runs, in this order; `side` is the index of the configuration. */
export type StudioEvent =
  /** `ahead`: jobs that are to be done before. */
  | { readonly type: "queued"; readonly ahead: number }
  | { readonly type: "loading"; readonly side: number }
  | { readonly type: "note"; readonly message: string }
  | {
    readonly type: "step";
    readonly side: number;
    readonly step: number;
    readonly steps: number;
    /** RGB of a small picture, base64. */
    readonly preview: string;
    readonly width: number;
    readonly height: number;
  }
  | {
    readonly type: "picture";
    readonly side: number;
    /** A PNG, base64. */
    readonly png: string;
    readonly width: number;
    readonly height: number;
    readonly steps: number;
    readonly seed: string;
    readonly recipes: readonly string[];
    /** No recipe trades quality. */
    readonly exact: boolean;
    readonly milliseconds: PartTimes;
    /** Bytes of weights, and of activations at most. */
    readonly memory: { readonly weights: number; readonly peak: number };
  }
  /** All is drawn. Of two pictures: how close they are. */
  | {
    readonly type: "done";
    readonly comparison?: {
      readonly equal: boolean;
      /** In dB; absent for equal ones. */
      readonly psnr?: number;
      readonly largestError: number;
    };
  }
  | { readonly type: "error"; readonly message: string; readonly hint?: string };
