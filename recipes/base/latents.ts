import type { Tensor } from "../../ffi/tensor.ts";
import type { Ops } from "./ops.ts";

/**
 * Packs squares of 2 x 2 latent pixels into one token (diffusers' `FluxPipeline._pack_latents`).
 *
 * @param latents `[batch, channels, height, width]`, height and width even.
 * @returns dense `[batch, height / 2 * width / 2, 4 channels]`; a token's values are channel by channel, each row by
 * row.
 */
export function packLatents(ops: Ops, latents: Tensor): Tensor {
  const [batch, channels, height, width] = latents.shape;
  const squares = latents.reshape([batch, channels, height / 2, 2, width / 2, 2]).permute([0, 2, 4, 1, 3, 5]);
  return ops.contiguous(squares).reshape([batch, height / 2 * (width / 2), channels * 4]);
}

/**
 * Reverses {@link packLatents}.
 *
 * @param packed `[batch, tokens, 4 channels]`. @param height of the latents. @param width of the latents.
 * @returns dense `[batch, channels, height, width]`.
 */
export function unpackLatents(ops: Ops, packed: Tensor, height: number, width: number): Tensor {
  const [batch, , values] = packed.shape;
  const channels = values / 4;
  const squares = packed.reshape([batch, height / 2, width / 2, channels, 2, 2]).permute([0, 3, 1, 4, 2, 5]);
  return ops.contiguous(squares).reshape([batch, channels, height, width]);
}

/**
 * Positions of the text and image tokens on FLUX.1's three axes: text stands at the origin, a token of the i-th image at
 * `(i, row, column)` (diffusers' `FluxPipeline._prepare_latent_image_ids`; for the second image, the reference picture,
 * `FluxKontextPipeline.prepare_latents`).
 *
 * @param images rows and columns of tokens of each.
 * @returns `[textTokens + imageTokens, 3]`, row-major.
 */
export function positionIds(textTokens: number, images: readonly TokenGrid[]): Float32Array {
  const ids = new Float32Array(
    images.reduce((sum, { rows, columns }) => sum + rows * columns, textTokens) * 3,
  );
  let at = textTokens * 3;
  images.forEach(({ rows, columns }, image) => {
    for (let token = 0; token < rows * columns; token++, at += 3) {
      ids[at] = image;
      ids[at + 1] = Math.floor(token / columns);
      ids[at + 2] = token % columns;
    }
  });
  return ids;
}

/** How an image's tokens lie. */
export interface TokenGrid {
  readonly rows: number;
  readonly columns: number;
}
