/**
 * What notebooks of Deno's Jupyter kernel need beside tensors, which show themselves: pictures, drawings, progress bars.
 * A value that has a `Jupyter.display` method shows itself as the last one of a cell, or by `Deno.jupyter.display(value)`.
 */
import { JUPYTER_DISPLAY } from "../../ffi/tensor_display.ts";
import { UsageError } from "./errors.ts";
import { encodePng } from "./image.ts";
import type { Picture } from "./pipeline.ts";
import { escapeXml } from "./xml.ts";

/** Something that a notebook shows. */
export interface Displayable {
  /** Content by MIME type. */
  [JUPYTER_DISPLAY](): Promise<Record<string, string>>;
}

/** The part of `Deno.jupyter` that is used here. */
interface Jupyter {
  display(
    content: unknown,
    options?: { raw?: boolean; display_id?: string; update?: boolean },
  ): Promise<void>;
}

/** `Deno.jupyter`, or undefined in a program, where looking at it throws. */
function jupyter(): Jupyter | undefined {
  try {
    return (Deno as unknown as { jupyter?: Jupyter }).jupyter;
  } catch {
    return undefined;
  }
}

/** A picture, shown as PNG. */
export function showPicture(picture: Picture): Displayable {
  const { width, height } = picture;
  return {
    [JUPYTER_DISPLAY]: async () => ({
      "text/plain": `picture of ${width} x ${height} pixels`,
      "image/png": await pngOf(picture),
    }),
  };
}

/**
 * Pictures beside one another, with captions below them.
 *
 * @throws UsageError where there are not as many captions as pictures.
 */
export function showPictures(pictures: readonly Picture[], captions: readonly string[]): Displayable {
  if (pictures.length !== captions.length) {
    throw new UsageError(`showPictures: ${pictures.length} pictures and ${captions.length} captions`);
  }
  return {
    [JUPYTER_DISPLAY]: async () => {
      const figures = await Promise.all(pictures.map(async (picture, i) => {
        const caption = escapeXml(captions[i]);
        const image = `<img alt="${caption}" src="data:image/png;base64,${await pngOf(picture)}"/>`;
        return `<figure style="display: inline-block; margin: 4px">${image}<figcaption>${caption}</figcaption></figure>`;
      }));
      return { "text/plain": captions.join(" | "), "text/html": `<div>${figures.join("")}</div>` };
    },
  };
}

/** An SVG drawing. */
export function showSvg(svg: string): Displayable {
  return {
    [JUPYTER_DISPLAY]: () => Promise.resolve({ "text/plain": "drawing", "image/svg+xml": svg }),
  };
}

async function pngOf({ rgb, width, height }: Picture): Promise<string> {
  return (await encodePng(rgb, width, height)).toBase64();
}

/** What a notebook shows in one place, each time instead of what it has shown there before. */
export class NotebookPlace {
  static #count = 0;
  readonly #id = `flux-recipes-${NotebookPlace.#count++}-${crypto.randomUUID()}`;
  readonly #jupyter: Jupyter;
  #shown = false;
  #next: Record<string, string> | undefined;
  #sending: Promise<void> | undefined;

  private constructor(jupyter: Jupyter) {
    this.#jupyter = jupyter;
  }

  /** A place of its own below the cell that runs; undefined in a program. */
  static open(): NotebookPlace | undefined {
    const kernel = jupyter();
    return kernel === undefined ? undefined : new NotebookPlace(kernel);
  }

  /** Shows content by MIME type. What comes while the last one is on its way waits, and only the newest of it is sent. */
  show(content: Record<string, string>): void {
    this.#next = content;
    this.#sending ??= this.#send().finally(() => this.#sending = undefined);
  }

  async #send(): Promise<void> {
    while (this.#next !== undefined) {
      const content = this.#next;
      this.#next = undefined;
      const update = this.#shown;
      this.#shown = true;
      await this.#jupyter.display(content, { raw: true, display_id: this.#id, update });
    }
  }
}

/** A progress bar as HTML, the same as text. @param share 0 to 1. @param note stands behind it. */
export function progressContent(label: string, share: number, note: string): Record<string, string> {
  const percent = Math.round(100 * Math.min(1, Math.max(0, share || 0))); // of nothing, NaN is done
  return {
    "text/plain": `${label} ${percent} %  ${note}`,
    "text/html":
      `<div>${escapeXml(label)} <progress value="${percent}" max="100" style="width: 20em"></progress> ` +
      `${escapeXml(note)}</div>`,
  };
}
