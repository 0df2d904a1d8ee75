/** The thread of a {@link PngEncoder}: encodes what it is sent, one after the other. */
import { parentPort } from "node:worker_threads";
import { encodePng } from "./image.ts";

/** What it is sent, and what it answers; errors as their messages. */
export interface PngJob {
  readonly rgb: Uint8Array;
  readonly width: number;
  readonly height: number;
  readonly metadata: Readonly<Record<string, string>>;
}
export type PngAnswer = { readonly png: Uint8Array<ArrayBuffer> } | { readonly problem: string };

parentPort?.on("message", async ({ rgb, width, height, metadata }: PngJob) => {
  let answer: PngAnswer;
  try {
    answer = { png: await encodePng(rgb, width, height, { ...metadata }) };
  } catch (error) {
    answer = { problem: error instanceof Error ? error.message : String(error) };
  }
  parentPort?.postMessage(answer);
});
