import { type Pieces, piecesFor } from "../../recipes/base/pieces.ts";
import type { Recipe } from "../../recipes/base/plan.ts";

/** How the programs load a model for these recipes, but in the smallest pieces, of one block each; undefined for all at once. */
export function smallestPiecesFor(recipes: readonly Recipe[]): Pieces | undefined {
  const pieces = piecesFor(recipes);
  return pieces && { ...pieces, pieceBytes: 1 };
}
